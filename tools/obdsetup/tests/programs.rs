// SPDX-License-Identifier: GPL-2.0

//! The programs that obdsetup starts: their environment, their messages, and their end. A script takes the place
//! of mksquashfs.

use std::fs;
use std::path::Path;
use std::process::{Child, Command, Output};

use crate::common::{needs, runs, soon, tests, Place};

tests! {
    the_environment_has_no_say;
    programs_of_the_administrator_are_found needs in_sbin("mkfs.ext4");
    warnings_are_shown;
    errors_are_quoted_whole_and_once;
    programs_without_room;
    versions_that_are_too_old_are_told_of;
    signals_while_files_are_copied needs needs::e2fsprogs();
    a_program_dies_with_obdsetup;
    a_signal_ends_the_program_and_leaves_nothing;
    a_signal_for_both_is_no_failure_of_the_program;
    who_is_not_root_is_told_so needs needs::ordinary_user();
}

fn in_sbin(program: &str) -> needs::Need {
    let places = ["/usr/sbin", "/sbin"];
    let there = places.iter().any(|at| Path::new(at).join(program).exists());
    (!there).then(|| format!("no {program} in /usr/sbin or /sbin"))
}

/// A place with a directory `tree` and the script `bin/mksquashfs`. Unless the script handles `-version` itself,
/// it succeeds without output when obdsetup asks for the version.
struct Mksquashfs(Place);

impl Mksquashfs {
    fn new(script: &str) -> Self {
        let place = Place::new();
        fs::create_dir_all(place.path("tree/sub")).unwrap();
        fs::create_dir(place.path("bin")).unwrap();
        place.write("tree/f1", b"content");
        let name = place.dir().display().to_string();
        let no_version = match script.contains("-version") {
            true => "",
            false => "[ \"$1\" != -version ] || exit 0\n",
        };
        place.script(
            "bin/mksquashfs",
            &format!("PLACE='{name}'\n{no_version}{script}"),
        );
        Self(place)
    }

    fn text(&self, name: &str) -> String {
        String::from_utf8(self.0.read(name)).unwrap()
    }

    /// Returns the command `obdsetup`, not started yet, which finds the script.
    fn obdsetup(&self) -> Command {
        self.0.with_programs("bin")
    }

    /// Returns the command, not started yet, that makes a layer of `tree`.
    fn create(&self) -> Command {
        let mut command = self.obdsetup();
        command.args("create --directory tree --fs squashfs out.obd".split(' '));
        command
    }

    /// Returns the names in the place, except those that the test has made.
    fn left(&self) -> Vec<String> {
        let mut names = self.0.names();
        names.retain(|name| !["tree", "bin", "pid"].contains(&name.as_str()));
        names
    }
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// Waits until the script has written its process ID to the file `pid`. Returns the process ID.
fn number(place: &Mksquashfs, child: &mut Child) -> String {
    let told = soon(|| {
        assert!(child.try_wait().unwrap().is_none(), "obdsetup has ended");
        fs::read_to_string(place.0.path("pid")).is_ok_and(|pid| pid.ends_with('\n'))
    });
    assert!(told, "the program was not started");
    place.text("pid").trim().to_owned()
}

const COPY: &str = "head -c 65536 /dev/zero >\"$2\"";
const SLEEP: &str = "echo $$ >$PLACE/pid; exec sleep 1000";

fn the_environment_has_no_say() {
    let place = Mksquashfs::new(&format!("env >$PLACE/env; {COPY}"));
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
    let output = command
        .env("TMPDIR", place.0.path("tree"))
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", said(&output));
    let env = place.text("env");
    for name in bad {
        assert!(
            !env.lines()
                .any(|line| line.starts_with(&format!("{name}="))),
            "{name}: {env}"
        );
    }
    assert!(env.lines().any(|line| line == "LC_ALL=C"), "{env}");
    let tmpdir = format!("TMPDIR={}", place.0.path("tree").display());
    assert!(env.lines().any(|line| line == tmpdir), "{env}");
}

fn programs_of_the_administrator_are_found() {
    let place = Mksquashfs::new(COPY);
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

fn warnings_are_shown() {
    let place = Mksquashfs::new(&format!("echo odd thing >&2; echo odd thing >&2; {COPY}"));
    let output = place.create().output().unwrap();
    assert!(output.status.success(), "{}", said(&output));
    let wanted = "obdsetup: warning: mksquashfs: odd thing (2 times)\n";
    assert!(said(&output).contains(wanted), "{}", said(&output));
    assert_eq!(said(&output).matches("odd thing").count(), 1);
}

fn errors_are_quoted_whole_and_once() {
    let place =
        Mksquashfs::new("for i in 1 2 3; do echo no room >&2; done; echo gave up >&2; exit 3");
    let output = place.create().output().unwrap();
    assert_eq!(output.status.code(), Some(1), "{}", said(&output));
    assert!(
        said(&output).contains("no room (3 times)\n  gave up\n"),
        "{}",
        said(&output)
    );
    assert_eq!(said(&output).matches("no room").count(), 1);
    assert!(place.left().is_empty(), "{:?}", place.left());
}

fn programs_without_room() {
    let text = "echo 'Write failed because No space left on device' >&2; exit 1";
    for (script, wanted) in [
        (text, "Write failed because No space left on device"),
        (
            "echo 'Could not resize file: File too large' >&2; exit 1",
            "Could not resize file: File too large",
        ),
        ("kill -XFSZ $$", "`ulimit -f`"),
    ] {
        let place = Mksquashfs::new(script);
        let output = place.create().output().unwrap();
        assert_eq!(output.status.code(), Some(4), "{}", said(&output));
        let start = "obdsetup: .: no room for the output, or for temporary files, which are made beside it: mksquashfs";
        let said = said(&output);
        assert!(
            said.lines().any(|line| line.starts_with(start)) && said.contains(wanted),
            "{said}"
        );
        assert!(place.left().is_empty(), "{:?}", place.left());
    }
}

/// A program that is too old isn't run: it may misinterpret options that it doesn't know.
fn versions_that_are_too_old_are_told_of() {
    let old =
        "if [ \"$1\" = -version ]; then echo 'mksquashfs version 4.5.1 (2022/03/17)'; exit 0; fi";
    // mksquashfs of Debian 12 misinterprets the options, and succeeds.
    let place = Mksquashfs::new(&format!("{old}; touch \"$PLACE/run\""));
    let output = place.create().output().unwrap();
    assert_eq!(output.status.code(), Some(1), "{}", said(&output));
    let wanted = "mksquashfs is version 4.5, and squashfs file systems need version 4.6 or later";
    assert!(said(&output).contains(wanted), "{}", said(&output));
    assert!(place.left().is_empty(), "{:?}", place.left());
    // A failure of a program that is new enough, and of one whose version is unknown.
    for said_of_it in ["mksquashfs version 4.6.1 (2023/03/25)", "no version"] {
        let new = old.replace("mksquashfs version 4.5.1 (2022/03/17)", said_of_it);
        let place = Mksquashfs::new(&format!("{new}; echo no room >&2; exit 1"));
        let output = place.create().output().unwrap();
        let text = said(&output);
        assert!(
            text.contains("no room") && !text.contains("or later"),
            "{text}"
        );
    }
}

fn signals_while_files_are_copied() {
    let place = Place::new();
    fs::create_dir(place.path("bin")).unwrap();
    fs::create_dir(place.path("many")).unwrap();
    for nth in 0..4000 {
        place.write(&format!("many/{nth}"), b"content");
    }
    let mut command = place.with_programs("bin");
    command.args("create --directory many --fs ext4 out.obd".split(' '));
    let child = command
        .stderr(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let copies = || {
        place
            .names()
            .iter()
            .any(|name| name.starts_with(".obdsetup-"))
    };
    assert!(soon(copies), "no directory of copies");
    let mut sent = Command::new("kill");
    sent.arg("-INT").arg(child.id().to_string());
    assert!(sent.status().unwrap().success());
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(130), "{}", said(&output));
    let mut left = place.names();
    left.sort();
    assert_eq!(left, ["bin", "many"]);
}

fn a_program_dies_with_obdsetup() {
    let place = Mksquashfs::new(SLEEP);
    let mut child = place.create().spawn().unwrap();
    let pid = number(&place, &mut child);
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(soon(|| !runs(&pid)), "the program runs on");
}

fn a_signal_ends_the_program_and_leaves_nothing() {
    for signal in ["INT", "TERM", "HUP"] {
        let place = Mksquashfs::new(SLEEP);
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

/// The program may get the signal of Ctrl-C before obdsetup.
fn a_signal_for_both_is_no_failure_of_the_program() {
    let place = Mksquashfs::new(
        "setsid sh -c \"sleep 0.4; kill -INT $PPID\" </dev/null >/dev/null 2>&1 &\nsleep 0.2\nkill -INT $$",
    );
    let output = place.create().output().unwrap();
    assert_eq!(output.status.code(), Some(130), "{}", said(&output));
    assert!(place.left().is_empty(), "{:?}", place.left());
}

fn who_is_not_root_is_told_so() {
    let place = Mksquashfs::new(COPY);
    for command in [["close", "x"], ["status", "x"]] {
        let output = place.obdsetup().args(command).output().unwrap();
        assert_eq!(output.status.code(), Some(2), "{}", said(&output));
        assert!(said(&output).contains("root"), "{}", said(&output));
    }
}
