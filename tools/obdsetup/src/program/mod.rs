// SPDX-License-Identifier: GPL-2.0

//! Other programs that obdsetup runs: dmsetup, mkfs, tar, qemu-img. All of them are started here.
//!
//! A program gets an environment of its own ([`environment`]), is killed when this process ends
//! ([`guard`]), and runs in a process group of its own, so that the terminal's signals reach only
//! this process. A signal ends the wait for the program, and then the program. A program without
//! progress is ended, too ([`progress`]). The lines on its standard error are kept ([`lines`]): the
//! caller shows them as warnings if the program succeeds; the error has them if it fails.

mod environment;
pub(crate) mod guard;
mod lines;
mod progress;

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{self, BufRead, BufReader};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, ExitStatus, Stdio};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{bail, Context, Result};
use rustix::process::{kill_process_group, waitid, Pid, Signal, WaitId, WaitIdOptions};

use crate::terminal::exit::{self, Failure, Lines};
use crate::terminal::interrupt;
use guard::Files;
use lines::Lines as Kept;
pub(crate) use progress::Patience;

/// Shortest and longest time between two checks of a running program.
const POLL: (Duration, Duration) = (Duration::from_millis(1), Duration::from_millis(16));

/// How often to look, [`POLL`]`.0` apart, whether a signal that has ended a program was for obdsetup, too.
const SIGNAL_POLLS: u32 = 1000;

/// Standard input of a program that gets no input.
const NULL: &str = "/dev/null";

/// Returns the absolute path of an existing file. No program mistakes an absolute path for an option,
/// or for a protocol such as `nbd:`.
pub(crate) fn path(path: &Path) -> Result<PathBuf> {
    let absolute = path.canonicalize();
    absolute.with_context(|| format!("{}: cannot read", path.display()))
}

/// A program to run.
pub(crate) struct Program {
    name: String,
    need: String,
    args: Vec<OsString>,
    env: BTreeMap<&'static str, OsString>,
    patience: Patience,
    heeds_signals: bool,
    files: Files,
    input: Option<File>,
    /// Gets the program's standard output. If set, the program finishes its work even if this
    /// process is killed.
    note: Option<File>,
    version: Option<Version>,
}

/// The version of a program that is needed, and the argument that makes it print its version.
struct Version {
    arg: &'static str,
    needed: (u32, u32),
}

/// How a program ended, and what it printed.
pub(crate) struct Ended {
    pub(crate) status: ExitStatus,
    pub(crate) said: Said,
}

impl Ended {
    /// Returns the error for a program that failed.
    pub(crate) fn into_error(self) -> anyhow::Error {
        failure(self.said, self.status).into()
    }
}

/// What a program printed on standard error.
#[must_use = "the user has to see warnings: tell() shows them"]
pub(crate) struct Said {
    name: String,
    lines: Vec<String>,
}

impl Said {
    /// Returns the lines: each once, and only the first ones if there are very many.
    pub(crate) fn lines(&self) -> &[String] {
        &self.lines
    }

    /// Shows the lines to the user as warnings. A line that a program prints in several runs is
    /// shown once.
    pub(crate) fn tell(&self) {
        static TOLD: Mutex<BTreeSet<String>> = Mutex::new(BTreeSet::new());
        for line in &self.lines {
            let warning = format!("warning: {}: {line}", self.name);
            let mut told = TOLD.lock().unwrap_or_else(PoisonError::into_inner);
            if told.insert(warning.clone()) {
                crate::terminal::tell(&warning);
            }
        }
    }
}

/// Returns the error for a program that failed. It has the exit code for a full disk if that is the cause.
fn failure(said: Said, status: ExitStatus) -> Lines {
    let Said { name, lines } = said;
    if status.signal() == Some(Signal::XFSZ.as_raw()) {
        let text = format!(
            "{name}: a file that it writes became larger than the limit of the shell allows (`ulimit -f`)"
        );
        return full(text, Vec::new());
    }
    let start = format!("{name} failed ({status})");
    match lines.iter().any(|line| is_about_room(line)) {
        true => Lines {
            status: status.code(),
            ..full(start, lines)
        },
        false => Lines {
            code: exit::USAGE,
            status: status.code(),
            is_full: false,
            start,
            lines,
        },
    }
}

/// Returns the error for a program that could not write its output.
pub(crate) fn full(start: String, lines: Vec<String>) -> Lines {
    Lines {
        code: exit::DEVICE,
        status: None,
        is_full: true,
        start,
        lines,
    }
}

/// Returns whether a program says in `line` that there is no room for what it writes. Programs have no exit code
/// for that, but print the system's text.
pub(crate) fn is_about_room(line: &str) -> bool {
    let texts = [
        "No space left on device",
        "Disk quota exceeded",
        "File too large",
    ];
    texts.iter().any(|text| line.contains(text))
}

impl Program {
    /// Prepares to run the program `name`. `need` says what it is needed for.
    pub(crate) fn new(name: impl Into<String>, need: impl Into<String>) -> Self {
        Self {
            name: name.into(),
            need: need.into(),
            args: Vec::new(),
            env: BTreeMap::new(),
            patience: Patience::default(),
            heeds_signals: true,
            files: Files::Few,
            input: None,
            note: None,
            version: None,
        }
    }

    /// Adds an argument.
    pub(crate) fn arg(&mut self, arg: impl AsRef<OsStr>) -> &mut Self {
        self.args.push(arg.as_ref().to_owned());
        self
    }

    /// Adds arguments.
    pub(crate) fn args<T: AsRef<OsStr>>(&mut self, args: impl IntoIterator<Item = T>) -> &mut Self {
        self.args
            .extend(args.into_iter().map(|arg| arg.as_ref().to_owned()));
        self
    }

    /// Sets a variable in the program's environment, which has only a few others.
    pub(crate) fn env(&mut self, name: &'static str, value: impl AsRef<OsStr>) -> &mut Self {
        self.env.insert(name, value.as_ref().to_owned());
        self
    }

    /// Names a file that the program writes. Growth of the file counts as progress.
    pub(crate) fn writes(&mut self, path: &Path) -> &mut Self {
        self.patience.add_output(path);
        self
    }

    /// Sets what counts as progress, and how long to wait without progress.
    pub(crate) fn patience(&mut self, patience: Patience) -> &mut Self {
        self.patience = patience;
        self
    }

    /// Lets the program have as many files open as the user may allow it (`ulimit -H -n`).
    pub(crate) fn opens_many_files(&mut self) -> &mut Self {
        self.files = Files::Many;
        self
    }

    /// Makes the program read `file`, from its present position, as standard input.
    pub(crate) fn input(&mut self, file: File) -> &mut Self {
        self.input = Some(file);
        self
    }

    /// Makes the program write its standard output to `file`, and finish its work even if this
    /// process is killed: `file` then shows what the program has done. For programs that end quickly.
    pub(crate) fn leaves_note(&mut self, file: File) -> &mut Self {
        self.note = Some(file);
        self
    }

    /// Sets the needed version. The program is first run with `arg` to get its version. If the
    /// version is older, the program isn't run with its arguments: it could misunderstand an option,
    /// and succeed.
    pub(crate) fn needs_version(&mut self, arg: &'static str, needed: (u32, u32)) -> &mut Self {
        self.version = Some(Version { arg, needed });
        self
    }

    /// Returns the error if the program is too old; `None` if it isn't, or the version is unknown.
    fn too_old(&self) -> Option<String> {
        let version = self.version.as_ref()?;
        let mut found = None;
        // Some programs print the version and fail.
        let _ = Self::new(&self.name, &self.need)
            .arg(version.arg)
            .end(|line| {
                found = found.or_else(|| version_in(line));
            });
        let (major, minor) = version.needed;
        let (is_major, is_minor) = found.filter(|found| *found < version.needed)?;
        Some(format!(
            "{} is version {is_major}.{is_minor}, and {} need version {major}.{minor} or later: \
             install a newer one, or use another file system",
            self.name, self.need
        ))
    }

    /// Lets the program finish its work after a signal, for example to clean up.
    pub(crate) fn despite_signals(&mut self) -> &mut Self {
        self.heeds_signals = false;
        self
    }

    /// Runs the program to its end. Fails if the program does. Drops its standard output.
    pub(crate) fn run(&mut self) -> Result<Said> {
        self.each_line(|_| ())
    }

    /// Runs the program like [`Self::run`], and calls `each` with each line of standard output.
    pub(crate) fn each_line(&mut self, each: impl FnMut(&str) + Send) -> Result<Said> {
        if let Some(old) = self.too_old() {
            bail!(old);
        }
        let Ended { status, said } = self.end(each)?;
        if status.success() {
            return Ok(said);
        }
        Err(Ended { status, said }.into_error())
    }

    /// Runs the program to its end, with any status. Fails if the program cannot be started, is
    /// ended for lack of progress, or a signal asks to stop.
    pub(crate) fn end(&mut self, mut each: impl FnMut(&str) + Send) -> Result<Ended> {
        let mut child = self.spawn()?;
        let (out, errors) = (child.0.stdout.take(), child.0.stderr.take());
        let mut lines = Kept::default();
        let (status, read) = std::thread::scope(|scope| {
            // Both threads end when the program and its children have ended. wait() ends the children.
            let keeper = scope.spawn(|| lines.read(errors.into_iter()));
            let reader = scope.spawn(|| -> io::Result<()> {
                for line in out
                    .into_iter()
                    .flat_map(|out| BufReader::new(out).split(b'\n'))
                {
                    each(&String::from_utf8_lossy(&line?));
                }
                Ok(())
            });
            let status = self.wait(child);
            (status, [reader.join(), keeper.join()])
        });
        let said = Said {
            name: self.name.clone(),
            lines: lines.into_vec(),
        };
        let status = match status? {
            Wait::Ended(status) => status,
            Wait::Stalled => return Err(self.patience.failure(&self.name, said.lines())),
        };
        for read in read {
            match read {
                Ok(read) => read.with_context(|| format!("cannot read what {} says", self.name))?,
                Err(panic) => std::panic::resume_unwind(panic),
            }
        }
        Ok(Ended { status, said })
    }

    fn spawn(&self) -> Result<Running> {
        let path = environment::find(&self.name).ok_or_else(|| {
            Failure::usage(format!(
                "{} is not installed; it is needed for {}",
                self.name, self.need
            ))
        })?;
        let mut command = match self.note {
            Some(_) => guard::outliving(&path),
            None => guard::command(&path, self.files),
        };
        command.args(&self.args).env_clear();
        command.envs(environment::passed_on()).envs(&self.env);
        command.stdin(match &self.input {
            Some(file) => file.try_clone()?,
            None => File::open(NULL).context(NULL)?,
        });
        command.stdout(match &self.note {
            Some(file) => file.try_clone()?.into(),
            None => Stdio::piped(),
        });
        command.stderr(Stdio::piped());
        // The terminal's signals are for this process only.
        command.process_group(0);
        let child = command.spawn();
        child
            .map(Running)
            .with_context(|| format!("cannot run {}", path.display()))
    }

    /// Waits for the end of the program. If a signal asks to stop, returns an error immediately, which
    /// drops `child` and so ends the program.
    fn wait(&self, mut child: Running) -> Result<Wait> {
        let mut watch = self.patience.watch(child.group());
        let mut poll = POLL.0;
        loop {
            if child.has_ended()? {
                let status = child.finish()?;
                // The signal may be meant for obdsetup, too, which may get it a moment later.
                if self.heeds_signals && asks_to_stop(status) {
                    for _ in 0..SIGNAL_POLLS {
                        interrupt::check()?;
                        std::thread::sleep(POLL.0);
                    }
                }
                return Ok(Wait::Ended(status));
            }
            if self.heeds_signals {
                interrupt::check()?;
            }
            if watch.has_stalled(Instant::now()) {
                return Ok(Wait::Stalled);
            }
            std::thread::sleep(poll);
            poll = (poll * 2).min(POLL.1);
        }
    }
}

/// Returns whether a program was ended by a signal that asks to stop.
fn asks_to_stop(status: ExitStatus) -> bool {
    let signals = [Signal::INT, Signal::TERM, Signal::HUP];
    status
        .signal()
        .is_some_and(|number| signals.iter().any(|signal| signal.as_raw() == number))
}

/// Returns the first version in a line: two numbers with a dot between them.
fn version_in(line: &str) -> Option<(u32, u32)> {
    line.split_whitespace().find_map(|word| {
        let (major, rest) = word.trim_start_matches('v').split_once('.')?;
        let minor = rest.split(|c: char| !c.is_ascii_digit()).next()?;
        Some((major.parse().ok()?, minor.parse().ok()?))
    })
}

/// The reason for the end of a wait.
enum Wait {
    Ended(ExitStatus),
    Stalled,
}

/// A running program. Dropping it ends the program and its children.
struct Running(Child);

impl Running {
    fn group(&self) -> Pid {
        Pid::from_child(&self.0)
    }

    /// Returns whether the program has ended. Its process ID isn't reused before `finish`.
    fn has_ended(&self) -> Result<bool> {
        let options = WaitIdOptions::EXITED | WaitIdOptions::NOHANG | WaitIdOptions::NOWAIT;
        Ok(waitid(WaitId::Pid(self.group()), options)?.is_some())
    }

    /// Ends the rest of the process group, and returns the program's status.
    fn finish(&mut self) -> io::Result<ExitStatus> {
        // Fails only if no process is left.
        let _ = kill_process_group(self.group(), Signal::KILL);
        self.0.wait()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // Not after finish(): another process may have the process ID by then.
        if matches!(self.0.try_wait(), Ok(None)) {
            let _ = self.finish();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::Path;
    use std::time::{Duration, Instant};

    use anyhow::Result;

    use super::{version_in, Lines, Program};

    fn shell(script: &str) -> Program {
        let mut program = Program::new("sh", "tests");
        program.args(["-c", script]);
        program
    }

    /// Returns the text of the error.
    fn error<T>(result: Result<T>) -> String {
        match result {
            Ok(_) => unreachable!("the program did not fail"),
            Err(error) => format!("{error:#}"),
        }
    }

    fn exists(pid: &str) -> bool {
        // A zombie isn't running.
        let stat = fs::read_to_string(Path::new("/proc").join(pid.trim()).join("stat"));
        stat.is_ok_and(|stat| !stat.contains(") Z "))
    }

    #[test]
    fn what_a_program_says() -> Result<()> {
        let mut lines = Vec::new();
        let said = shell("echo one; echo two; echo careful >&2; echo careful >&2")
            .each_line(|line| lines.push(line.to_owned()))?;
        assert_eq!(lines, ["one", "two"]);
        assert_eq!(said.lines(), ["careful (2 times)"]);
        let text = error(shell("echo wrong >&2; echo wrong >&2; echo so it is >&2; exit 3").run());
        assert_eq!(
            text,
            "sh failed (exit status: 3): wrong (2 times)\n  so it is"
        );
        assert_eq!(error(shell("exit 3").run()), "sh failed (exit status: 3)");
        let text = error(Program::new("no-such-program", "tests").run());
        assert_eq!(
            text,
            "no-such-program is not installed; it is needed for tests"
        );
        Ok(())
    }

    #[test]
    fn the_status_is_kept() {
        for (script, status) in [
            ("echo odd >&2; exit 1", Some(1)),
            ("exit 127", Some(127)),
            ("echo odd >&2; kill -KILL $$", None),
        ] {
            let error = shell(script).run().err();
            let lines = error.as_ref().and_then(|error| error.downcast_ref());
            let found = lines.map(|lines: &Lines| lines.status);
            assert_eq!(found, Some(status), "{script}");
        }
    }

    #[test]
    fn versions() {
        for (line, version) in [
            ("mksquashfs version 4.5.1 (2022/03/17)", Some((4, 5))),
            ("mkfs.erofs 1.8.6", Some((1, 8))),
            ("mkfs.erofs (erofs-utils) v1.10-g123", Some((1, 10))),
            ("copyright (C) 2022 a.b <c@d.org>", None),
            ("", None),
        ] {
            assert_eq!(version_in(line), version, "{line}");
        }
    }

    #[test]
    fn the_environment_is_clean() -> Result<()> {
        let mut names = Vec::new();
        shell("env")
            .env("SOURCE_DATE_EPOCH", "7")
            .each_line(|line| names.extend(line.split_once('=').map(|(name, _)| name.to_owned())))?
            .tell();
        names.retain(|name| {
            let passed_on = ["TMPDIR", "LD_LIBRARY_PATH", "LD_PRELOAD", "FAKEROOTKEY"];
            // The shell sets the last three.
            !passed_on.contains(&name.as_str()) && !["PWD", "SHLVL", "_"].contains(&name.as_str())
        });
        names.sort();
        assert_eq!(names, ["LC_ALL", "PATH", "SOURCE_DATE_EPOCH"]);
        Ok(())
    }

    #[test]
    fn no_progress_ends_a_program_and_its_children() -> Result<()> {
        let dir = tempfile::tempdir()?;
        let pid = dir.path().join("pid");
        // The child has the pipes open, too, but nothing may wait for the child.
        let script = format!(
            "sleep 1000 & echo $! >{}; echo odd >&2; while :; do :; done",
            pid.display()
        );
        let mut program = shell(&script);
        program.patience.set_bound(Duration::from_millis(800));
        let start = Instant::now();
        let text = error(program.run());
        assert!(
            text.starts_with("sh was ended: it has not read or written a byte"),
            "{text}"
        );
        assert!(text.ends_with("it said: odd"), "{text}");
        assert!(start.elapsed() < Duration::from_secs(60));
        let pid = fs::read_to_string(pid)?;
        let gone = (0..100).any(|_| {
            std::thread::sleep(Duration::from_millis(20));
            !exists(&pid)
        });
        assert!(gone, "a child is left");
        Ok(())
    }

    #[test]
    fn slow_work_is_not_ended() -> Result<()> {
        let dir = tempfile::tempdir()?;
        let out = dir.path().join("out");
        let script = format!(
            "for i in 1 2 3 4 5 6 7 8; do echo >>{}; sleep 0.2; done",
            out.display()
        );
        let mut program = shell(&script);
        program.patience.set_bound(Duration::from_millis(800));
        let start = Instant::now();
        program.writes(&out).run()?.tell();
        assert!(start.elapsed() > Duration::from_millis(1200));
        Ok(())
    }

    #[test]
    fn what_a_program_leaves_is_ended() -> Result<()> {
        let mut pid = String::new();
        let start = Instant::now();
        let said = shell("sleep 1000 & echo $!").each_line(|line| pid.push_str(line))?;
        assert!(said.lines().is_empty() && start.elapsed() < Duration::from_secs(60));
        let gone = (0..100).any(|_| {
            std::thread::sleep(Duration::from_millis(20));
            !exists(&pid)
        });
        assert!(gone, "a child is left");
        Ok(())
    }
}
