// SPDX-License-Identifier: GPL-2.0

//! Makes the kernel kill a program when this process ends, for whatever reason.
//!
//! A process can ask for this only for itself (`PR_SET_PDEATHSIG`). So obdsetup runs once more under
//! the name [`NAME`], asks for it, and executes the other program. The kernel kills the program when
//! the thread ends that started it, so the thread that starts a program must also wait for it.
//!
//! On the way, it raises the limit of open files if the program needs many.

use std::ffi::OsString;
use std::os::unix::process::{parent_id, CommandExt};
use std::path::Path;
use std::process::Command;

use rustix::process::{
    getrlimit, set_parent_process_death_signal, setrlimit, Resource, Rlimit, Signal,
};

/// The name under which this program executes another one.
pub(crate) const NAME: &str = "obdsetup-program";

/// The exit code if the program cannot be executed, as in a shell. With 1, the program itself would seem to have failed.
pub(crate) const NOT_RUN: u8 = 127;

/// Returns a command that runs the program at `path`. Arguments can be added. `files` says how many files the program
/// may have open.
pub(super) fn command(path: &Path, files: Files) -> Command {
    // The unit tests run in another program.
    if cfg!(test) || !Path::new(SELF).exists() {
        return Command::new(path);
    }
    let mut command = Command::new(SELF);
    command.arg0(NAME);
    command.arg(std::process::id().to_string());
    command.arg(files.word()).arg(path);
    command
}

const SELF: &str = "/proc/self/exe";

/// How many files a program may have open.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Files {
    /// As many as obdsetup.
    Few,
    /// As many as the user may allow it. Not for all programs: some close all possible files when they start.
    Many,
}

impl Files {
    /// Returns the argument that stands for it.
    fn word(self) -> &'static str {
        match self {
            Self::Few => "few",
            Self::Many => "many",
        }
    }
}

/// Raises the limit of open files as far as the user may.
fn allow_many_files() {
    let limit = getrlimit(Resource::Nofile);
    let most = Rlimit {
        current: limit.maximum,
        ..limit
    };
    // Ignored: perhaps the program needs fewer files.
    let _ = setrlimit(Resource::Nofile, most);
}

/// Returns a command that runs the program at `path`, and is not killed if this process ends first.
pub(super) fn outliving(path: &Path) -> Command {
    Command::new(path)
}

/// Executes the program in `args`, as set by [`command`]: the process ID of the parent, the word
/// of [`Files`], the program's path, its arguments. Returns only if this fails, with the message.
pub(crate) fn run(args: &[OsString]) -> String {
    let [parent, files, path, args @ ..] = args else {
        return format!("{NAME}: for obdsetup's own use only");
    };
    let shown = Path::new(path).display();
    if let Err(error) = set_parent_process_death_signal(Some(Signal::KILL)) {
        return format!("cannot make {shown} end with obdsetup: {error}");
    }
    // The parent may have ended before the kernel was asked.
    if parent.to_str() != Some(&parent_id().to_string()) {
        return "obdsetup has ended".to_owned();
    }
    if files == Files::Many.word() {
        allow_many_files();
    }
    let error = Command::new(path).args(args).exec();
    format!("cannot run {shown}: {error}")
}
