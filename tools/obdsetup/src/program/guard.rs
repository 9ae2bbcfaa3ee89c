// SPDX-License-Identifier: GPL-2.0

//! Makes a program die when this process does, however that ends.
//!
//! Only a process itself can ask the kernel for that (`PR_SET_PDEATHSIG`). So this program runs once
//! more, under the name [`NAME`]: it asks for it, and becomes the program. The kernel goes by the
//! thread that started the process, so the thread that starts a program has to wait for it, too.

use std::ffi::OsString;
use std::os::unix::process::{parent_id, CommandExt};
use std::path::Path;
use std::process::Command;

use rustix::process::{set_parent_process_death_signal, Signal};

/// The name under which this program becomes another.
pub(crate) const NAME: &str = "obdsetup-program";

/// Returns the command that runs the program at `path`; arguments for it can be added.
pub(super) fn command(path: &Path) -> Command {
    // The unit tests' program is not obdsetup.
    if cfg!(test) || !Path::new(SELF).exists() {
        return Command::new(path);
    }
    let mut command = Command::new(SELF);
    command.arg0(NAME);
    command.arg(std::process::id().to_string()).arg(path);
    command
}

const SELF: &str = "/proc/self/exe";

/// Returns the command that runs the program at `path` to its end, also where this process is gone by
/// then.
pub(super) fn outliving(path: &Path) -> Command {
    Command::new(path)
}

/// Becomes the program that `args` name, as [`command`] gives them: the number of the parent, the
/// program's path, its arguments. Returns why it cannot.
pub(crate) fn run(args: &[OsString]) -> String {
    let [parent, path, args @ ..] = args else {
        return format!("{NAME}: for obdsetup's own use only");
    };
    let shown = Path::new(path).display();
    if let Err(error) = set_parent_process_death_signal(Some(Signal::KILL)) {
        return format!("cannot tie {shown} to obdsetup: {error}");
    }
    // The parent may have died before that.
    if parent.to_str() != Some(&parent_id().to_string()) {
        return "obdsetup is gone".to_owned();
    }
    let error = Command::new(path).args(args).exec();
    format!("cannot run {shown}: {error}")
}
