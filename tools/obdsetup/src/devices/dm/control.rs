// SPDX-License-Identifier: GPL-2.0

//! Gets the state of device-mapper devices, and runs dmsetup(8).
//!
//! The reasons to use dmsetup and not the `devicemapper` crate: up to 0.34.7, the crate refuses every call if
//! no udev daemon runs. 0.34.8 always waits for udev, without a time limit, and for one device after the
//! other. If a signal ends the process, its semaphore is left. In another IPC namespace than udev's, it waits
//! for ever. The crate makes no nodes, either. libdm, on which dmsetup is a thin layer, has options for all of
//! this, and obdsetup can kill a program.
//!
//! Nothing here parses messages for people. If dmsetup fails, its message is quoted, and the reason is found
//! by looking at the devices again.
//!
//! dmsetup cannot keep udev from scanning the inner devices. The rules in `tools/udev` do that: they go by
//! the UUIDs.

use std::fmt;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};

use super::access;
use crate::program::Program;
use crate::terminal::exit::{self, Failure};

/// If this variable is set, libdm doesn't use udev.
pub(super) const DISABLE_UDEV: &str = "DM_DISABLE_UDEV";

/// Returns dmsetup, to be run with arguments that the caller adds.
pub(super) fn dmsetup() -> Program {
    let mut program = Program::new("dmsetup", "mapped devices");
    if let Some(value) = std::env::var_os(DISABLE_UDEV) {
        program.env(DISABLE_UDEV, value);
    }
    program
}

/// The state of a device, as device-mapper reports it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct State {
    pub(crate) name: String,
    pub(crate) uuid: String,
    /// `MAJOR:MINOR`.
    pub(crate) number: String,
    pub(crate) open_count: u32,
    pub(crate) read_only: bool,
    pub(crate) suspended: bool,
    /// Whether the device has a live table.
    pub(crate) live: bool,
}

/// Largest number of attempts to list all devices, and the time between them. dmsetup fails if a device is
/// removed while it lists them.
const LOOKS: u32 = 20;
const BETWEEN_LOOKS: Duration = Duration::from_millis(50);

/// Returns whether the kernel has device-mapper, and this process may use it.
fn is_usable() -> bool {
    rustix::process::geteuid().is_root() && Path::new("/sys/class/misc/device-mapper").exists()
}

/// The columns that [`State::parse`] reads.
const COLUMNS: &str = "name,uuid,major,minor,open,readonly,suspended,tables_loaded";
/// Separates the columns. libdm escapes this character in names.
const SEPARATOR: char = '|';

impl State {
    /// Parses a line of `dmsetup info`. Returns `None` if it isn't about a device.
    fn parse(line: &str) -> Option<Self> {
        let fields: Vec<&str> = line.split(SEPARATOR).map(str::trim).collect();
        let [name, uuid, major, minor, open, read_only, suspended, tables] = fields[..] else {
            return None;
        };
        // A device that was removed after dmsetup had listed it.
        if major == "0" {
            return None;
        }
        Some(Self {
            name: name.to_owned(),
            uuid: uuid.to_owned(),
            number: format!("{major}:{minor}"),
            open_count: open.parse().ok()?,
            read_only: is_set(read_only, "Read-only"),
            suspended: is_set(suspended, "Suspended"),
            live: matches!(tables, "Live" | "Both"),
        })
    }
}

/// Returns whether a column is set: it shows `word` or 1.
fn is_set(column: &str, word: &str) -> bool {
    column == "1" || column.eq_ignore_ascii_case(word)
}

/// A line of a table or a status: start and length in sectors, the target, and the rest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Line {
    pub(crate) start: u64,
    pub(crate) len: u64,
    pub(crate) target: String,
    pub(crate) params: String,
}

impl Line {
    /// Parses a line in the form in which [`Line`] is printed.
    pub(super) fn parse(line: &str) -> Option<Self> {
        let mut words = line.trim().splitn(4, ' ');
        Some(Self {
            start: words.next()?.parse().ok()?,
            len: words.next()?.parse().ok()?,
            target: words.next()?.to_owned(),
            params: words.next().unwrap_or_default().trim().to_owned(),
        })
    }
}

impl fmt::Display for Line {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            start,
            len,
            target,
            params,
        } = self;
        write!(f, "{start} {len} {target} {params}")
    }
}

/// Access to device-mapper by means of dmsetup.
pub(crate) struct Control(());

impl Control {
    /// Checks that device-mapper can be used.
    pub(crate) fn open() -> Result<Self> {
        access::DEVICE_MAPPER.check()?;
        Ok(Self(()))
    }

    /// Returns the state of device `name`; `None` if there is no such device.
    pub(crate) fn state(&self, name: &str) -> Result<Option<State>> {
        Ok(self.states()?.into_iter().find(|state| state.name == name))
    }

    /// Returns the states of all devices.
    pub(crate) fn states(&self) -> Result<Vec<State>> {
        let separator = SEPARATOR.to_string();
        let mut args = vec!["info", "-c", "--noheadings", "--separator", &separator];
        args.extend(["-o", COLUMNS]);
        let mut looks = 1;
        let text = loop {
            match self.run(&args) {
                Err(_) if looks < LOOKS && is_usable() => {
                    looks += 1;
                    std::thread::sleep(BETWEEN_LOOKS);
                }
                done => break done.context("cannot list devices")?,
            }
        };
        Ok(text.lines().filter_map(State::parse).collect())
    }

    /// Runs dmsetup with `args`, with which it must not wait for udev. Returns its output.
    pub(super) fn run(&self, args: &[&str]) -> Result<String> {
        self.run_program(dmsetup().args(args).despite_signals())
    }

    /// Runs `program`, which is dmsetup. Returns its output.
    pub(super) fn run_program(&self, program: &mut Program) -> Result<String> {
        let mut text = String::new();
        let done = program.end(|line| {
            text.push_str(line);
            text.push('\n');
        })?;
        if done.status.success() {
            done.said.tell();
            return Ok(text);
        }
        let lines = done.said.lines();
        let lines: Vec<&str> = lines
            .iter()
            .map(String::as_str)
            .filter(|line| *line != "Command failed.")
            .collect();
        let mut message = match lines.as_slice() {
            [] => format!("dmsetup failed: {}", done.status),
            lines => format!("dmsetup: {}", lines.join("; ")),
        };
        if !rustix::process::geteuid().is_root() {
            message.push_str("; only root can look at and set up mapped devices");
            return Err(Failure::error(exit::PERMISSION, message));
        }
        if !Path::new("/sys/class/misc/device-mapper").exists() {
            message.push_str("; the kernel has no device-mapper (modprobe dm_mod)");
        }
        Err(Failure::error(exit::DEVICE, message))
    }
}

#[cfg(test)]
mod tests {
    use super::{Line, State};

    #[test]
    fn what_dmsetup_prints() {
        let state = State::parse("a-blob0|OVERLAYBD-BLOB-a-0|254|3|1|Read-only|Active|Live");
        let state = state.unwrap_or_else(|| unreachable!());
        assert_eq!(state.number, "254:3");
        assert_eq!(state.open_count, 1);
        assert!(state.read_only && !state.suspended && state.live);
        let state = State::parse("a||254|3|0|Writeable|Active|Inactive");
        assert!(state.is_some_and(|state| !state.live));
        assert_eq!(State::parse("No devices found"), None);
        assert_eq!(State::parse("a||0|0|0|Writeable|Active|None"), None);
        let line = Line::parse("0 16384 lsmt 2 92 8388608 1600 ");
        assert_eq!(
            line.map(|line| line.to_string()).as_deref(),
            Some("0 16384 lsmt 2 92 8388608 1600")
        );
    }
}
