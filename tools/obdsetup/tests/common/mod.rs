// SPDX-License-Identifier: GPL-2.0

//! What the tests share: a directory for each test, in which it runs `obdsetup`, and checks for
//! requirements that may be missing.

#[path = "../../../overlaybd/tests/common/changes.rs"]
pub(crate) mod changes;
pub(crate) mod erofs;
pub(crate) mod needs;
pub(crate) mod tars;

use std::fs;
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use assert_cmd::assert::Assert;
use assert_cmd::cargo::cargo_bin;
use assert_cmd::Command;
use libtest_mimic::Trial;
use predicates::str::contains;
use rustix::process::{Pid, Signal};
use tempfile::TempDir;

/// Time limit for each run of `obdsetup` by [`Place::command`].
const PATIENCE: Duration = Duration::from_secs(120);
/// The name of the file that [`Place::convert`] converts. It usually doesn't match the content.
pub(crate) const INPUT: &str = "rootfs.tar.gz";

/// Makes the function `trials`, which returns the tests of a file. Each line has the name of a test and, after
/// `needs`, its requirements. If no line names a test, the compiler warns of an unused function.
macro_rules! tests {
    ($($test:ident $(needs $($need:expr),+)?;)+) => {
        /// Returns the tests of this file.
        pub(crate) fn trials() -> Vec<libtest_mimic::Trial> {
            vec![$($crate::common::trial(
                module_path!(),
                stringify!($test),
                &[$($($need),+)?],
                $test,
            )),+]
        }
    };
}
pub(crate) use tests;

/// Returns a test. The test is skipped if one of `needs` is a reason why it cannot run. The reason is added to
/// the name of the test, because nothing else is printed for a skipped test.
pub(crate) fn trial(
    module: &str,
    name: &str,
    needs: &[needs::Need],
    test: impl FnOnce() + Send + 'static,
) -> Trial {
    let module = module.split_once("::").map_or(module, |(_, module)| module);
    let cause = needs.iter().flatten().next();
    let skipped = cause.map_or_else(String::new, |cause| format!(" (skipped: {cause})"));
    let run = move || {
        test();
        Ok(())
    };
    Trial::test(format!("{module}::{name}{skipped}"), run).with_ignored_flag(cause.is_some())
}

/// A temporary directory in which a test runs `obdsetup`.
pub(crate) struct Place(pub(crate) TempDir);

impl Place {
    pub(crate) fn new() -> Self {
        Self(TempDir::new().unwrap())
    }

    /// Returns a place with [`image`] as `disk.raw`, and `layer.obd`, a layer made from `disk.raw`.
    pub(crate) fn with_layer() -> Self {
        let place = Self::new();
        place.write("disk.raw", &image());
        place
            .run("create --raw --image disk.raw layer.obd")
            .success();
        place
    }

    /// The directory itself.
    pub(crate) fn dir(&self) -> &Path {
        self.0.path()
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir().join(name)
    }

    pub(crate) fn write(&self, name: &str, bytes: &[u8]) {
        fs::write(self.path(name), bytes).unwrap();
    }

    pub(crate) fn read(&self, name: &str) -> Vec<u8> {
        fs::read(self.path(name)).unwrap()
    }

    /// Writes a shell script that can be run.
    pub(crate) fn script(&self, name: &str, lines: &str) {
        self.write(name, format!("#!/bin/sh\n{lines}\n").as_bytes());
        fs::set_permissions(self.path(name), fs::Permissions::from_mode(0o755)).unwrap();
    }

    /// Returns the sorted names in the directory, hidden ones included.
    pub(crate) fn names(&self) -> Vec<String> {
        names(self.dir())
    }

    /// Returns the command `obdsetup`, not started yet, with the words of `line` as arguments.
    pub(crate) fn command(&self, line: &str) -> Command {
        let obdsetup = std::process::Command::new(cargo_bin!("obdsetup"));
        let mut command = Command::from_std(obdsetup);
        command.current_dir(self.dir());
        command.args(line.split_whitespace());
        command.timeout(PATIENCE);
        command
    }

    pub(crate) fn run(&self, line: &str) -> Assert {
        self.command(line).assert()
    }

    /// Runs `obdsetup`, which must succeed and print nothing on standard error.
    pub(crate) fn ok(&self, line: &str) {
        self.run(line).success().stderr("");
    }

    pub(crate) fn json(&self, line: &str) -> serde_json::Value {
        let done = self.run(line).success();
        serde_json::from_slice(&done.get_output().stdout).unwrap()
    }

    /// Returns the bytes of the disk that `layers`, lowest first, make.
    pub(crate) fn dump(&self, layers: &str) -> Vec<u8> {
        let done = self.run(&format!("dump {layers}")).success();
        done.get_output().stdout.clone()
    }

    /// Returns the command `obdsetup`, not started yet. It looks for programs in the directory `programs`
    /// first.
    pub(crate) fn with_programs(&self, programs: &str) -> std::process::Command {
        let mut command = std::process::Command::new(cargo_bin!("obdsetup"));
        let path = std::env::var("PATH").unwrap_or_default();
        command.env("PATH", format!("{}:{path}", self.path(programs).display()));
        command.current_dir(self.dir()).stdin(Stdio::null());
        command
    }

    /// Starts `obdsetup` with the words of `line` as arguments. It looks for programs in this directory
    /// first.
    pub(crate) fn start(&self, line: &str) -> Child {
        self.with_programs("")
            .args(line.split_whitespace())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap()
    }

    /// Writes `bytes` to [`INPUT`], and runs `convert` with the output `out.obd`. Afterwards, `out.obd` must
    /// exist if `convert` has succeeded, and no other file.
    pub(crate) fn convert(&self, bytes: &[u8], options: &str) -> Assert {
        self.write(INPUT, bytes);
        let _ = fs::remove_file(self.path("out.obd"));
        let done = self.run(&format!("convert {INPUT} out.obd {options}"));
        let made = done.get_output().status.success();
        let mut names = self.names();
        names.retain(|name| name != INPUT);
        assert_eq!(names.len(), usize::from(made), "{names:?}: {done}");
        done
    }

    /// Checks that `convert` refuses `bytes` with exit code 1 and a message that contains `said`.
    pub(crate) fn refused(&self, bytes: &[u8], said: &str) {
        self.convert(bytes, "").code(1).stderr(contains(said));
    }

    /// Checks that `convert` refuses `bytes` as damaged, with exit code 3 and a message that contains `said`.
    pub(crate) fn damaged(&self, bytes: &[u8], said: &str) {
        self.convert(bytes, "").code(3).stderr(contains(said));
    }

    /// Runs another program in this directory. It must succeed. Returns its standard output.
    pub(crate) fn output_of(&self, program: &str, args: &[&str]) -> Vec<u8> {
        let mut command = std::process::Command::new(needs::find(program).unwrap());
        let command = command.args(args).current_dir(self.dir());
        let done = command.stdin(Stdio::null()).output().unwrap();
        assert!(done.status.success(), "{program} {args:?}: {done:?}");
        done.stdout
    }

    /// Runs the program and arguments in `line` as [`Self::output_of`] does. Returns the output as text.
    pub(crate) fn tool(&self, line: &str) -> String {
        let words: Vec<&str> = line.split_whitespace().collect();
        String::from_utf8(self.output_of(words[0], &words[1..])).unwrap()
    }
}

/// Returns the sorted names in a directory, hidden ones included.
pub(crate) fn names(directory: &Path) -> Vec<String> {
    let mut names: Vec<String> = fs::read_dir(directory)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

/// Returns pseudo-random bytes, which don't compress.
pub(crate) fn noise(len: usize, seed: u32) -> Vec<u8> {
    let mut state = seed;
    (0..len)
        .map(|_| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 24) as u8
        })
        .collect()
}

/// Returns the bytes, compressed with gzip.
pub(crate) fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    gzip.write_all(bytes).unwrap();
    gzip.finish().unwrap()
}

/// An image with text, noise and zeros; not a whole number of sectors.
pub(crate) fn image() -> Vec<u8> {
    let mut image = b"some text, over and over\n".repeat(4000);
    image.extend_from_slice(&noise(50_000, 1));
    image.resize(300_000, 0);
    image.extend_from_slice(b"the end");
    image
}

/// Calls `true_now` until it returns `true`, for at most 30 seconds. Returns whether it did.
pub(crate) fn soon(mut true_now: impl FnMut() -> bool) -> bool {
    let start = Instant::now();
    while start.elapsed() < Duration::from_secs(30) {
        if true_now() {
            return true;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    false
}

/// Returns whether a process runs. A zombie doesn't run.
pub(crate) fn runs(pid: &str) -> bool {
    let stat = fs::read_to_string(Path::new("/proc").join(pid).join("stat"));
    stat.is_ok_and(|stat| !stat.contains(") Z "))
}

/// Sends a signal to the process, and waits until it ends. Kills it after 30 seconds. Returns the exit code;
/// `None` if a signal ended it.
pub(crate) fn stop(child: &mut Child, signal: Signal) -> Option<i32> {
    rustix::process::kill_process(Pid::from_child(child), signal).unwrap();
    soon(|| child.try_wait().unwrap().is_some());
    let _ = child.kill();
    child.wait().unwrap().code()
}
