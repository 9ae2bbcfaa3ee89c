// SPDX-License-Identifier: GPL-2.0

//! What all tests share: a directory of its own for each, `obdsetup` run in it, and what a test needs
//! that may be missing.

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

/// Nothing may wait for what doesn't come.
const PATIENCE: Duration = Duration::from_secs(120);
/// The name of the file that [`Place::convert`] converts, which says something else than it is.
pub(crate) const INPUT: &str = "rootfs.tar.gz";

/// Makes the function `trials`, which gives the tests of a file: a line for each, its name and what it
/// needs. A test that no line names is code that nobody calls, of which the compiler warns.
macro_rules! tests {
    ($($test:ident $(needs $($need:expr),+)?;)+) => {
        /// The tests of this file.
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

/// A test, which is skipped where one of `needs` says why it cannot be met. The cause is in its name,
/// since that is what is printed of it.
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

/// A directory of its own, and `obdsetup` run in it.
pub(crate) struct Place(pub(crate) TempDir);

impl Place {
    pub(crate) fn new() -> Self {
        Self(TempDir::new().unwrap())
    }

    /// One that has [`image`] as `disk.raw`, and a layer of it, `layer.obd`.
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

    /// The names that are there, hidden ones too.
    pub(crate) fn names(&self) -> Vec<String> {
        names(self.dir())
    }

    /// `obdsetup` with the words of `line`.
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

    /// Runs it without a word of its own.
    pub(crate) fn ok(&self, line: &str) {
        self.run(line).success().stderr("");
    }

    pub(crate) fn json(&self, line: &str) -> serde_json::Value {
        let done = self.run(line).success();
        serde_json::from_slice(&done.get_output().stdout).unwrap()
    }

    /// What layers read as, lowest first.
    pub(crate) fn dump(&self, layers: &str) -> Vec<u8> {
        let done = self.run(&format!("dump {layers}")).success();
        done.get_output().stdout.clone()
    }

    /// `obdsetup`, about to be started, with directory `programs` in front of those that have the
    /// programs that it finds.
    pub(crate) fn with_programs(&self, programs: &str) -> std::process::Command {
        let mut command = std::process::Command::new(cargo_bin!("obdsetup"));
        let path = std::env::var("PATH").unwrap_or_default();
        command.env("PATH", format!("{}:{path}", self.path(programs).display()));
        command.current_dir(self.dir()).stdin(Stdio::null());
        command
    }

    /// Starts it, with the place in front of the programs that it finds.
    pub(crate) fn start(&self, line: &str) -> Child {
        self.with_programs("")
            .args(line.split_whitespace())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap()
    }

    /// `convert` of `bytes` as [`INPUT`], to `out.obd`; what is made must be all or nothing.
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

    /// `convert` refuses `bytes` with code 1 and says this.
    pub(crate) fn refused(&self, bytes: &[u8], said: &str) {
        self.convert(bytes, "").code(1).stderr(contains(said));
    }

    /// `convert` says that `bytes` are damaged.
    pub(crate) fn damaged(&self, bytes: &[u8], said: &str) {
        self.convert(bytes, "").code(3).stderr(contains(said));
    }

    /// Runs another program here, successfully; gives what it prints.
    pub(crate) fn output_of(&self, program: &str, args: &[&str]) -> Vec<u8> {
        let mut command = std::process::Command::new(needs::find(program).unwrap());
        let command = command.args(args).current_dir(self.dir());
        let done = command.stdin(Stdio::null()).output().unwrap();
        assert!(done.status.success(), "{program} {args:?}: {done:?}");
        done.stdout
    }

    /// [`Self::output_of`] with the words of `line`, of what prints text.
    pub(crate) fn tool(&self, line: &str) -> String {
        let words: Vec<&str> = line.split_whitespace().collect();
        String::from_utf8(self.output_of(words[0], &words[1..])).unwrap()
    }
}

/// The names in a directory, hidden ones too.
pub(crate) fn names(directory: &Path) -> Vec<String> {
    let mut names: Vec<String> = fs::read_dir(directory)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

/// Bytes that don't compress.
pub(crate) fn noise(len: usize, seed: u32) -> Vec<u8> {
    let mut state = seed;
    (0..len)
        .map(|_| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 24) as u8
        })
        .collect()
}

/// The bytes, compressed by gzip.
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

/// Whether something comes true within half a minute.
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

/// Whether a process runs: one that nobody waited for doesn't.
pub(crate) fn runs(pid: &str) -> bool {
    let stat = fs::read_to_string(Path::new("/proc").join(pid).join("stat"));
    stat.is_ok_and(|stat| !stat.contains(") Z "))
}

/// Sends a signal, and waits for the end of the process. Returns its exit code, if it has one.
pub(crate) fn stop(child: &mut Child, signal: Signal) -> Option<i32> {
    rustix::process::kill_process(Pid::from_child(child), signal).unwrap();
    soon(|| child.try_wait().unwrap().is_some());
    let _ = child.kill();
    child.wait().unwrap().code()
}
