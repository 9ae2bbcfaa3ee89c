// SPDX-License-Identifier: GPL-2.0

//! Programs that do a part of the work: mkfs, tar, qemu-img.

use std::io::{self, BufRead, BufReader, ErrorKind, Read, Seek};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

use anyhow::{bail, Context, Result};

use crate::exit::Failure;
use crate::interrupt;

/// How often it is looked whether the program has ended, or a signal came.
const POLL: Duration = Duration::from_millis(10);

/// The absolute name of a file that exists: no program takes that for an option, nor for a protocol
/// such as `nbd:`.
pub(crate) fn path(path: &Path) -> Result<PathBuf> {
    let absolute = path.canonicalize();
    absolute.with_context(|| format!("{}: cannot read", path.display()))
}

/// Runs `command` to its end, `need` being what it is needed for. What it prints is dropped, but for
/// its error messages where it fails.
pub(crate) fn run(command: &mut Command, need: &str) -> Result<()> {
    lines(command, need, |_| ())
}

/// Runs `command` as [`run`] does, and hands over the lines that it prints.
pub(crate) fn lines(
    command: &mut Command,
    need: &str,
    mut each: impl FnMut(&str) + Send,
) -> Result<()> {
    let mut errors = tempfile::tempfile().context("cannot make a temporary file")?;
    command.stdout(Stdio::piped()).stderr(errors.try_clone()?);
    let mut child = Running(spawn(command, need)?);
    let out = child.0.stdout.take();
    let (status, read) = std::thread::scope(|scope| {
        // It ends when the program does, which wait() sees to.
        let reader = scope.spawn(|| -> io::Result<()> {
            for line in out
                .into_iter()
                .flat_map(|out| BufReader::new(out).split(b'\n'))
            {
                each(&String::from_utf8_lossy(&line?));
            }
            Ok(())
        });
        let status = wait(child);
        (status, reader.join())
    });
    let status = status?;
    match read {
        Ok(read) => read.with_context(|| format!("cannot read what {} says", name(command)))?,
        Err(panic) => std::panic::resume_unwind(panic),
    }
    if status.success() {
        return Ok(());
    }
    let mut text = Vec::new();
    errors.rewind()?;
    errors.read_to_end(&mut text)?;
    let text = String::from_utf8_lossy(&text);
    bail!("{} failed ({status}): {}", name(command), text.trim())
}

/// Waits for the end of a program, which comes at once where a signal asks to stop.
fn wait(mut child: Running) -> Result<ExitStatus> {
    loop {
        let status = child.0.try_wait()?;
        // The terminal's signals stop the program too.
        interrupt::check()?;
        if let Some(status) = status {
            return Ok(status);
        }
        std::thread::sleep(POLL);
    }
}

fn spawn(command: &mut Command, need: &str) -> Result<Child> {
    let child = command.env("LC_ALL", "C").stdin(Stdio::null()).spawn();
    child.map_err(|error| match error.kind() {
        ErrorKind::NotFound => Failure::usage(format!(
            "{} is not installed; it is needed for {need}",
            name(command)
        )),
        _ => anyhow::Error::from(error).context(format!("cannot run {}", name(command))),
    })
}

fn name(command: &Command) -> String {
    command.get_program().to_string_lossy().into_owned()
}

/// A program that doesn't outlive us where we stop early.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        // Both do nothing where it has ended.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
