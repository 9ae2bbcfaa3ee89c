// SPDX-License-Identifier: GPL-2.0

//! Waiting for udev: when a device is set up or removed, udev makes or removes its links.
//!
//! libdm's way is a semaphore, the "cookie": each event adds one, and udev takes one away when it
//! has handled the event. All devices of a stack share a cookie, so udev handles their events at the
//! same time.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};

use super::control::Control;
use super::lock::Lock;
use crate::interrupt;
use crate::program::{Patience, Program};

/// How long udev may go without handling an event that we wait for.
const BOUND: Duration = Duration::from_secs(60);
/// There while udevd runs; libdm looks at it, too.
const SOCKET: &str = "/run/udev/control";
/// What a cookie begins with, as dmsetup prints it.
const COOKIES: &str = "0x0D4D";
/// The name of the kernel's first IPC namespace.
const FIRST_IPC: &str = "ipc:[4026531839]";

/// Whether there is a udevd, and whether it sees our semaphores.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Udev {
    /// None runs: libdm makes the nodes.
    Absent,
    /// One runs, but in another IPC namespace, as seen from a container: it would never take
    /// anything away from our cookie. It handles the events all the same; libdm makes the nodes, too,
    /// since `/dev` may not be the one that udev fills.
    Deaf,
    /// One runs.
    Present,
}

impl Udev {
    pub(crate) fn find() -> Self {
        if std::env::var_os(super::control::DISABLE_UDEV).is_some() || !Path::new(SOCKET).exists() {
            return Self::Absent;
        }
        // udevd runs in the first one, which has a number of its own; process 1 may be in ours.
        match std::fs::read_link("/proc/self/ns/ipc") {
            Ok(ours) if ours != Path::new(FIRST_IPC) => Self::Deaf,
            _ => Self::Present,
        }
    }

    /// Returns this, or how to do without waiting.
    pub(crate) fn unawaited(self) -> Self {
        match self {
            Self::Absent => Self::Absent,
            Self::Deaf | Self::Present => Self::Deaf,
        }
    }

    /// Begins something that udev is waited for.
    pub(crate) fn begin<'a>(self, control: &Control, lock: &'a Lock) -> Result<Wait<'a>> {
        let cookie = match self {
            Self::Absent | Self::Deaf => None,
            Self::Present => {
                let mut program = super::control::dmsetup();
                program.arg("udevcreatecookie");
                // So a kill at any moment leaves a note of the cookie, or no cookie.
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
                // Nothing is printed where libdm finds that it cannot wait.
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

/// A wait for udev that has begun. The lock has a note of its cookie.
pub(crate) struct Wait<'a> {
    cookie: Option<Cookie>,
    lock: &'a Lock,
}

/// Removes the cookie that a holder of `lock` has left who was killed.
pub(super) fn clear_left(lock: &Lock) {
    let note = lock.note().filter(|text| text.starts_with(COOKIES));
    let Some(text) = note else {
        return;
    };
    destroy(text.trim());
    lock.set_note("");
}

struct Cookie {
    /// As dmsetup prints it, and takes it.
    text: String,
    /// The semaphore's key.
    key: u32,
}

impl Wait<'_> {
    /// Returns the options for dmsetup commands whose events are waited for.
    pub(crate) fn options(&self) -> Vec<&str> {
        match &self.cookie {
            Some(cookie) => vec!["--udevcookie", &cookie.text],
            // The second one lets libdm make and remove nodes. Without it dmsetup leaves them to udev,
            // even where none runs.
            None => vec!["--noudevsync", "--verifyudev"],
        }
    }

    /// Waits until udev has handled the events of device `name`. This is bounded, and a signal ends
    /// it.
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
        // A signal to all of a service ends dmsetup, too.
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

/// Removes a cookie's semaphore, which nobody else would.
fn destroy(cookie: &str) {
    let mut program = Program::new("ipcrm", "udev cookies");
    program.args(["-S", cookie]).despite_signals();
    // There are 32,000; one that is left harms nobody.
    let _ = program.run().map(|said| said.lines().len());
}

/// Returns the line on the semaphore with `key`: the time of its last change is in it.
fn semaphore(key: u32) -> String {
    let all = std::fs::read_to_string("/proc/sysvipc/sem").unwrap_or_default();
    let key = key.to_string();
    let line = all
        .lines()
        .find(|line| line.split_whitespace().next() == Some(key.as_str()));
    line.unwrap_or_default().to_owned()
}
