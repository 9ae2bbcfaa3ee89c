// SPDX-License-Identifier: GPL-2.0

//! Waits for udev: when a device is set up or removed, udev makes or removes its links.
//!
//! libdm uses a semaphore for this, the "cookie". Each event increments it, and udev decrements it when it
//! has handled the event. All devices of a stack have the same cookie, so udev handles their events at the
//! same time.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};

use super::control::Control;
use super::lock::Lock;
use crate::program::{Patience, Program};
use crate::terminal::interrupt;

/// How long to wait while udev handles none of our events.
const BOUND: Duration = Duration::from_secs(60);
/// Exists while udevd runs. libdm checks this, too.
const SOCKET: &str = "/run/udev/control";
/// Prefix of a cookie, as dmsetup prints it.
const COOKIES: &str = "0x0D4D";
/// The name of the kernel's first IPC namespace.
const FIRST_IPC: &str = "ipc:[4026531839]";

/// Whether udevd runs, and whether it has access to our semaphores.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Udev {
    /// udevd doesn't run. libdm makes the nodes.
    Absent,
    /// udevd runs in another IPC namespace, for example if this is a container. It handles the events, but
    /// would never decrement our cookie. libdm makes the nodes as well, because udev may fill another `/dev`.
    Deaf,
    /// udevd runs in our IPC namespace.
    Present,
}

impl Udev {
    pub(crate) fn find() -> Self {
        if std::env::var_os(super::control::DISABLE_UDEV).is_some() || !Path::new(SOCKET).exists() {
            return Self::Absent;
        }
        // udevd runs in the first IPC namespace, which always has this number. Comparing with process 1
        // wouldn't help, because that may be in our namespace.
        match std::fs::read_link("/proc/self/ns/ipc") {
            Ok(ours) if ours != Path::new(FIRST_IPC) => Self::Deaf,
            _ => Self::Present,
        }
    }

    /// Returns a value with which nothing waits for udev.
    pub(crate) fn unawaited(self) -> Self {
        match self {
            Self::Absent => Self::Absent,
            Self::Deaf | Self::Present => Self::Deaf,
        }
    }

    /// Makes a cookie if udev must be waited for. Called before the dmsetup commands whose events are waited for.
    pub(crate) fn begin<'a>(self, control: &Control, lock: &'a Lock) -> Result<Wait<'a>> {
        let cookie = match self {
            Self::Absent | Self::Deaf => None,
            Self::Present => {
                let mut program = super::control::dmsetup();
                program.arg("udevcreatecookie");
                // dmsetup writes the cookie to the note, so a kill never leaves a cookie without a note.
                let file = lock.note_file();
                let has_note = file.is_some();
                if let Some(file) = file {
                    program.leaves_note(file);
                }
                let made = control.run_program(program.despite_signals());
                if made.is_err() {
                    interrupt::check()?;
                }
                let mut text = made.context("cannot make a udev cookie")?;
                if has_note {
                    text = lock.note().unwrap_or_default();
                }
                let text = text.trim();
                // libdm prints nothing if it finds that it cannot wait.
                let digits = text.strip_prefix("0x");
                let key = digits.and_then(|digits| u32::from_str_radix(digits, 16).ok());
                key.map(|key| Cookie {
                    text: text.to_owned(),
                    key,
                })
            }
        };
        Ok(Wait { cookie, lock })
    }
}

/// A wait for udev that has begun. The note of the lock has its cookie.
pub(crate) struct Wait<'a> {
    cookie: Option<Cookie>,
    lock: &'a Lock,
}

/// Removes the cookie that the last holder of `lock` has left because it was killed.
pub(super) fn clear_left(lock: &Lock) {
    let note = lock.note().filter(|text| text.starts_with(COOKIES));
    let Some(text) = note else {
        return;
    };
    destroy(text.trim());
    lock.set_note("");
}

struct Cookie {
    /// The cookie in dmsetup's format.
    text: String,
    /// The semaphore's key.
    key: u32,
}

impl Wait<'_> {
    /// Returns the options for the dmsetup commands whose events to wait for.
    pub(crate) fn options(&self) -> Vec<&str> {
        match &self.cookie {
            Some(cookie) => vec!["--udevcookie", &cookie.text],
            // With --verifyudev, libdm makes and removes nodes. Without it, dmsetup leaves them to udev, even
            // if udevd doesn't run.
            None => vec!["--noudevsync", "--verifyudev"],
        }
    }

    /// Waits until udev has handled the events of device `name`. The time is limited, and a signal ends the
    /// wait.
    pub(crate) fn end(mut self, name: &str) -> Result<()> {
        let Some(cookie) = self.cookie.take() else {
            return Ok(());
        };
        let key = cookie.key;
        let message = format!(
            "udev has not handled the events of device {name} for {} s: is systemd-udevd stopped \
             or hung? (systemctl status systemd-udevd)",
            BOUND.as_secs()
        );
        let mut program = super::control::dmsetup();
        program.args(["udevreleasecookie", &cookie.text]);
        program.patience(Patience::with(BOUND, move || semaphore(key), message));
        let done = program.run();
        if done.is_err() {
            destroy(&cookie.text);
        }
        self.lock.set_note("");
        // A signal to all processes of a service ends dmsetup, too. Then report the signal, not dmsetup's
        // failure.
        if done.is_err() {
            interrupt::check()?;
        }
        done.map(|said| said.tell())
    }
}

impl Drop for Wait<'_> {
    fn drop(&mut self) {
        if let Some(cookie) = self.cookie.take() {
            destroy(&cookie.text);
            self.lock.set_note("");
        }
    }
}

/// Removes the semaphore of a cookie. No one else would do so.
fn destroy(cookie: &str) {
    let mut program = Program::new("ipcrm", "udev cookies");
    program.args(["-S", cookie]).despite_signals();
    // Errors are ignored: the limit is 32,000 semaphores, and a remaining one does no harm.
    let _ = program.run().map(|said| said.lines().len());
}

/// Returns the line on the semaphore with `key`, which has the time of its last change.
fn semaphore(key: u32) -> String {
    let all = std::fs::read_to_string("/proc/sysvipc/sem").unwrap_or_default();
    let key = key.to_string();
    let line = all
        .lines()
        .find(|line| line.split_whitespace().next() == Some(key.as_str()));
    line.unwrap_or_default().to_owned()
}
