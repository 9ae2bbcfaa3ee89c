// SPDX-License-Identifier: GPL-2.0

//! Programs that do a part of the work: mkfs, tar, qemu-img.

use std::io::{BufRead, BufReader, ErrorKind, Read, Seek};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{bail, Context, Result};

use crate::exit::Failure;
use crate::interrupt;

/// How often it is looked whether the program has ended, or a signal came.
const POLL: Duration = Duration::from_millis(10);

/// Runs `command` to its end, `need` being what it is needed for. What it prints is dropped, but for
/// its error messages where it fails.
pub(crate) fn run(command: &mut Command, need: &str) -> Result<()> {
    let mut errors = tempfile::tempfile().context("cannot make a temporary file")?;
    command.stdout(Stdio::null()).stderr(errors.try_clone()?);
    let mut child = Running(spawn(command, need)?);
    let status = loop {
        if let Some(status) = child.0.try_wait()? {
            break status;
        }
        interrupt::check()?;
        std::thread::sleep(POLL);
    };
    // The terminal's signals stop the program too.
    interrupt::check()?;
    if status.success() {
        return Ok(());
    }
    let mut text = Vec::new();
    errors.rewind()?;
    errors.read_to_end(&mut text)?;
    let text = String::from_utf8_lossy(&text);
    bail!("{} failed ({status}): {}", name(command), text.trim())
}

/// Runs `command` and hands over the lines that it prints.
pub(crate) fn lines(command: &mut Command, need: &str, mut each: impl FnMut(&str)) -> Result<()> {
    command.stdout(Stdio::piped());
    let mut child = Running(spawn(command, need)?);
    if let Some(out) = child.0.stdout.take() {
        for line in BufReader::new(out).split(b'\n') {
            interrupt::check()?;
            each(&String::from_utf8_lossy(&line?));
        }
    }
    let status = child.0.wait()?;
    interrupt::check()?;
    if !status.success() {
        bail!("{} failed ({status})", name(command));
    }
    Ok(())
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
