// SPDX-License-Identifier: GPL-2.0

//! The programs that obdsetup runs: what they get, what becomes of what they say, how they end.
//! A script plays mksquashfs.

#![allow(missing_docs, clippy::unwrap_used)]

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

use tempfile::TempDir;

/// A place with a directory `tree`, and `bin/mksquashfs`, a script.
struct Place(TempDir);

impl Place {
    fn new(script: &str) -> Self {
        let place = Self(tempfile::tempdir().unwrap());
        fs::create_dir_all(place.path("tree/sub")).unwrap();
        fs::write(place.path("tree/f1"), "content").unwrap();
        fs::create_dir(place.path("bin")).unwrap();
        let program = place.path("bin/mksquashfs");
        let place_name = place.0.path().display();
        fs::write(
            &program,
            format!("#!/bin/sh\nPLACE='{place_name}'\n{script}\n"),
        )
        .unwrap();
        fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
        place
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn read(&self, name: &str) -> String {
        fs::read_to_string(self.path(name)).unwrap()
    }

    /// obdsetup, which finds the script.
    fn obdsetup(&self) -> Command {
        let mut command = Command::new(assert_cmd::cargo::cargo_bin!("obdsetup"));
        let path = std::env::var("PATH").unwrap_or_default();
        command.env("PATH", format!("{}:{path}", self.path("bin").display()));
        command.current_dir(self.0.path()).stdin(Stdio::null());
        command
    }

    /// obdsetup, about to make a layer.
    fn create(&self) -> Command {
        let mut command = self.obdsetup();
        command.args([
            "create",
            "--directory",
            "tree",
            "--fs",
            "squashfs",
            "out.obd",
        ]);
        command
    }

    /// What lies in the place, but for what was put there.
    fn left(&self) -> Vec<String> {
        let names = fs::read_dir(self.0.path()).unwrap();
        let names = names.map(|entry| entry.unwrap().file_name().into_string().unwrap());
        names
            .filter(|name| !["tree", "bin", "pid"].contains(&name.as_str()))
            .collect()
    }
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// Whether a process runs: one that nobody waited for doesn't.
fn runs(pid: &str) -> bool {
    let stat = fs::read_to_string(Path::new("/proc").join(pid).join("stat"));
    stat.is_ok_and(|stat| !stat.contains(") Z "))
}

/// Waits for something, for a while.
fn wait_for(mut done: impl FnMut() -> bool) -> bool {
    (0..1000).any(|_| {
        std::thread::sleep(Duration::from_millis(10));
        done()
    })
}

/// Waits until the script has told its number; the number.
fn number(place: &Place, child: &mut Child) -> String {
    let told = wait_for(|| {
        assert!(child.try_wait().unwrap().is_none(), "obdsetup has ended");
        fs::read_to_string(place.path("pid")).is_ok_and(|pid| pid.ends_with('\n'))
    });
    assert!(told, "the program was not started");
    place.read("pid").trim().to_owned()
}

const COPY: &str = "head -c 65536 /dev/zero >\"$2\"";
const SLEEP: &str = "echo $$ >$PLACE/pid; exec sleep 1000";

#[test]
fn the_environment_has_no_say() {
    let place = Place::new(&format!("env >$PLACE/env; {COPY}"));
    let bad = [
        "TAR_OPTIONS",
        "MKE2FS_CONFIG",
        "GZIP",
        "XZ_OPT",
        "ZSTD_CLEVEL",
        "ZSTD_NBTHREADS",
        "POSIXLY_CORRECT",
        "ENV",
        "LANG",
        "LC_MESSAGES",
    ];
    let mut command = place.create();
    command.envs(bad.map(|name| (name, "bad")));
    let output = command.env("TMPDIR", place.path("tree")).output().unwrap();
    assert!(output.status.success(), "{}", said(&output));
    let env = place.read("env");
    for name in bad {
        assert!(
            !env.lines()
                .any(|line| line.starts_with(&format!("{name}="))),
            "{name}: {env}"
        );
    }
    assert!(env.lines().any(|line| line == "LC_ALL=C"), "{env}");
    let tmpdir = format!("TMPDIR={}", place.path("tree").display());
    assert!(env.lines().any(|line| line == tmpdir), "{env}");
}

#[test]
fn programs_of_the_administrator_are_found() {
    let place = Place::new(COPY);
    let system = ["/usr/sbin", "/sbin"]
        .iter()
        .any(|at| Path::new(at).join("mkfs.ext4").exists());
    if !system {
        eprintln!("skipped: no mkfs.ext4 in /usr/sbin or /sbin");
        return;
    }
    let mut command = place.obdsetup();
    command.args(["create", "--directory", "tree", "--fs", "ext4", "out.obd"]);
    let output = command
        .env("PATH", "/usr/local/bin:/usr/bin:/bin")
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", said(&output));
    let mut command = place.obdsetup();
    command.args(["create", "--directory", "tree", "--fs", "ext4", "other.obd"]);
    let output = command.env_remove("PATH").output().unwrap();
    assert!(output.status.success(), "{}", said(&output));
}

#[test]
fn warnings_are_shown() {
    let place = Place::new(&format!("echo odd thing >&2; echo odd thing >&2; {COPY}"));
    let output = place.create().output().unwrap();
    assert!(output.status.success(), "{}", said(&output));
    let wanted = "obdsetup: warning: mksquashfs: odd thing (2 times)\n";
    assert!(said(&output).contains(wanted), "{}", said(&output));
    assert_eq!(said(&output).matches("odd thing").count(), 1);
}

#[test]
fn errors_are_quoted_whole_and_once() {
    let place = Place::new("for i in 1 2 3; do echo no room >&2; done; echo gave up >&2; exit 3");
    let output = place.create().output().unwrap();
    assert_eq!(output.status.code(), Some(1), "{}", said(&output));
    assert!(
        said(&output).contains("no room (3 times)\ngave up\n"),
        "{}",
        said(&output)
    );
    assert_eq!(said(&output).matches("no room").count(), 1);
    assert!(place.left().is_empty(), "{:?}", place.left());
}

#[test]
fn a_program_dies_with_obdsetup() {
    let place = Place::new(SLEEP);
    let mut child = place.create().spawn().unwrap();
    let pid = number(&place, &mut child);
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(wait_for(|| !runs(&pid)), "the program runs on");
}

#[test]
fn a_signal_ends_the_program_and_leaves_nothing() {
    for signal in ["INT", "TERM", "HUP"] {
        let place = Place::new(SLEEP);
        let mut child = place.create().spawn().unwrap();
        let pid = number(&place, &mut child);
        let mut sent = Command::new("kill");
        sent.arg(format!("-{signal}")).arg(child.id().to_string());
        assert!(sent.status().unwrap().success());
        assert_eq!(child.wait().unwrap().code(), Some(130), "{signal}");
        assert!(!runs(&pid), "{signal}: the program runs on");
        assert!(place.left().is_empty(), "{signal}: {:?}", place.left());
    }
}

#[test]
fn who_is_not_root_is_told_so() {
    if rustix::process::geteuid().is_root() {
        eprintln!("skipped: this is root");
        return;
    }
    let place = Place::new(COPY);
    for command in [["close", "x"], ["status", "x"]] {
        let output = place.obdsetup().args(command).output().unwrap();
        assert_eq!(output.status.code(), Some(2), "{}", said(&output));
        assert!(said(&output).contains("root"), "{}", said(&output));
    }
}
