// SPDX-License-Identifier: GPL-2.0

//! Making, finding and removing device-mapper devices, by way of dmsetup(8).
//!
//! Why not the `devicemapper` crate: it refuses every call, even a look at a device, where no udev
//! daemon runs (0.33.5 to 0.34.7), as in an initramfs or the test VM; before that it didn't wait
//! for udev at all, or hung without it. libdm, which dmsetup is a thin layer over, does both: it
//! waits for udev where that runs, and makes the nodes itself where it doesn't or where
//! `DM_DISABLE_UDEV` says so.
//!
//! What dmsetup cannot do is keep udev's scanners off the inner devices: the rules in `tools/udev` do
//! that, by their UUIDs.

use std::fmt;
use std::io::ErrorKind;
use std::path::Path;

use anyhow::{Context, Result};

use crate::program::Program;

/// dmsetup failed.
#[derive(Debug)]
pub(crate) struct DmFailure {
    /// What it said.
    message: String,
}

impl DmFailure {
    /// What the kernel said, as far as dmsetup tells.
    pub(crate) fn kind(&self) -> Option<ErrorKind> {
        // What strerror(3) says in the C locale.
        let kinds = [
            ("Permission denied", ErrorKind::PermissionDenied),
            ("Operation not permitted", ErrorKind::PermissionDenied),
            ("Device or resource busy", ErrorKind::ResourceBusy),
            ("Device already exists", ErrorKind::AlreadyExists),
            ("already exists", ErrorKind::AlreadyExists),
        ];
        kinds
            .iter()
            .find(|(text, _)| self.message.contains(text))
            .map(|&(_, kind)| kind)
    }
}

impl fmt::Display for DmFailure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for DmFailure {}

/// What device-mapper says of a device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct State {
    pub(crate) name: String,
    pub(crate) uuid: String,
    /// `MAJOR:MINOR`.
    pub(crate) number: String,
    pub(crate) open_count: u32,
    pub(crate) read_only: bool,
    pub(crate) suspended: bool,
}

/// The columns that [`State::parse`] reads.
const COLUMNS: &str = "name,uuid,major,minor,open,readonly,suspended";
/// What separates them: libdm doesn't leave it in a name.
const SEPARATOR: char = '|';

impl State {
    /// Reads a line of `dmsetup info`; `None` for what isn't a device.
    fn parse(line: &str) -> Option<Self> {
        let fields: Vec<&str> = line.split(SEPARATOR).map(str::trim).collect();
        let [name, uuid, major, minor, open, read_only, suspended] = fields[..] else {
            return None;
        };
        Some(Self {
            name: name.to_owned(),
            uuid: uuid.to_owned(),
            number: format!("{major}:{minor}"),
            open_count: open.parse().ok()?,
            read_only: is_set(read_only, "Read-only"),
            suspended: is_set(suspended, "Suspended"),
        })
    }
}

/// Whether a column that shows a word or a 1 is set.
fn is_set(column: &str, word: &str) -> bool {
    column == "1" || column.eq_ignore_ascii_case(word)
}

/// A line of a table or status: start and length in sectors, target, the rest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Line {
    pub(crate) start: u64,
    pub(crate) len: u64,
    pub(crate) target: String,
    pub(crate) params: String,
}

impl Line {
    /// Reads a line as [`Line`] shows it.
    fn parse(line: &str) -> Option<Self> {
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

/// dmsetup, found to work.
pub(crate) struct Control(());

impl Control {
    /// Finds out whether there is a device-mapper to talk to.
    pub(crate) fn open() -> Result<Self> {
        let control = Self(());
        control
            .run(&["version"])
            .context("cannot talk to device-mapper")?;
        Ok(control)
    }

    /// Makes a read-only device and brings it up. Gives its number, `MAJOR:MINOR`.
    pub(crate) fn create(&self, name: &str, uuid: &str, table: &[Line]) -> Result<String> {
        let lines: Vec<String> = table.iter().map(Line::to_string).collect();
        let text = lines.join("\n");
        // Not --verbose: that one takes an argument, and swallows the next option.
        let args = [
            "create",
            name,
            "-v",
            "--uuid",
            uuid,
            "--readonly",
            "--table",
            &text,
        ];
        let said = self.run(&args).with_context(|| {
            format!(
                "cannot set up device {name} with table `{}`",
                lines.join("; ")
            )
        })?;
        match number(&said) {
            Some(number) => Ok(number),
            None => {
                // Nobody else will.
                let _ = self.remove(name, false);
                anyhow::bail!("dmsetup does not tell the number of device {name}")
            }
        }
    }

    /// Removes device `name`. With `deferred`, one that is in use goes when it no longer is.
    pub(crate) fn remove(&self, name: &str, deferred: bool) -> Result<()> {
        // udev may look at a device just when it is to go: that passes.
        let how = if deferred { "--deferred" } else { "--retry" };
        self.run(&["remove", how, name])
            .with_context(|| format!("cannot remove device {name}"))?;
        Ok(())
    }

    /// The state of device `name`; `None` where there is no such device.
    pub(crate) fn state(&self, name: &str) -> Result<Option<State>> {
        match self.columns(&[name]) {
            Ok(text) => Ok(text.lines().find_map(State::parse)),
            Err(error) if error.to_string().contains("does not exist") => Ok(None),
            Err(error) => Err(error).with_context(|| format!("cannot look at device {name}")),
        }
    }

    /// All devices.
    fn states(&self) -> Result<Vec<State>> {
        let text = self.columns(&[]).context("cannot list devices")?;
        Ok(text.lines().filter_map(State::parse).collect())
    }

    /// The columns that [`State::parse`] reads, for the devices `names`, or for all.
    fn columns(&self, names: &[&str]) -> Result<String> {
        let separator = SEPARATOR.to_string();
        let mut args = vec!["info", "-c", "--noheadings", "--separator", &separator];
        args.extend(["-o", COLUMNS]);
        args.extend(names);
        self.run(&args)
    }

    /// Whether device `name` goes when it is no longer in use.
    pub(crate) fn goes_later(&self, name: &str) -> Result<bool> {
        let text = self
            .run(&["info", name])
            .with_context(|| format!("cannot look at device {name}"))?;
        Ok(text.contains("DEFERRED REMOVE"))
    }

    /// The table of device `name`.
    pub(crate) fn table(&self, name: &str) -> Result<Vec<Line>> {
        self.lines("table", name)
    }

    /// The status of device `name`.
    pub(crate) fn status(&self, name: &str) -> Result<Vec<Line>> {
        self.lines("status", name)
    }

    fn lines(&self, what: &str, name: &str) -> Result<Vec<Line>> {
        let text = self
            .run(&[what, name])
            .with_context(|| format!("cannot read the {what} of device {name}"))?;
        Ok(text.lines().filter_map(Line::parse).collect())
    }

    /// The devices of the stack `name`, top first: those that are there and are ours.
    pub(crate) fn stack(&self, name: &str) -> Result<Vec<State>> {
        let mut found: Vec<(Rank, State)> = self
            .states()?
            .into_iter()
            .filter_map(|state| Some((rank(&state.name, name)?, state)))
            .filter(|(rank, state)| rank.uuids(name).contains(&state.uuid))
            .collect();
        found.sort_by_key(|(rank, _)| *rank);
        Ok(found.into_iter().map(|(_, state)| state).collect())
    }

    /// Runs dmsetup; gives what it prints.
    fn run(&self, args: &[&str]) -> Result<String> {
        let mut program = Program::new("dmsetup", "mapped devices");
        program.args(args).despite_signals();
        if let Some(value) = std::env::var_os("DM_DISABLE_UDEV") {
            program.env("DM_DISABLE_UDEV", value);
        }
        let mut text = String::new();
        let done = program.end(|line| {
            text.push_str(line);
            text.push('\n');
        })?;
        if done.status.success() {
            done.said.tell();
            return Ok(text);
        }
        let lines: Vec<&str> = done
            .said
            .lines()
            .iter()
            .map(String::as_str)
            .filter(|line| *line != "Command failed.")
            .collect();
        let mut message = match lines.as_slice() {
            [] => format!("dmsetup failed: {}", done.status),
            lines => lines.join("; "),
        };
        if message.contains("reload ioctl") {
            message.push_str(match Path::new("/sys/module/dm_overlaybd").exists() {
                // A target said no; only there it says why.
                true => " (dmesg has the reason)",
                false => " (the module dm_overlaybd is not there for this kernel)",
            });
        }
        Err(DmFailure { message }.into())
    }
}

/// The number that `dmsetup create -v` tells.
fn number(text: &str) -> Option<String> {
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix("Major, minor:"))?;
    let (major, minor) = line.split_once(',')?;
    Some(format!("{}:{}", major.trim(), minor.trim()))
}

/// What a device is in a stack; ordered from the top.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Rank {
    Top,
    Zfile(usize),
    Blob(usize),
}

impl Rank {
    /// The UUIDs that such a device of stack `name` may have.
    fn uuids(self, name: &str) -> Vec<String> {
        let prefix = super::plan::UUID_PREFIX;
        match self {
            Self::Top => ["LSMT", "ZFILE"]
                .map(|kind| format!("{prefix}{kind}-{name}"))
                .to_vec(),
            Self::Zfile(nth) => vec![format!("{prefix}LAYER-{name}-{nth}")],
            Self::Blob(nth) => vec![format!("{prefix}BLOB-{name}-{nth}")],
        }
    }
}

/// What device `device` would be in stack `name`, by its name.
fn rank(device: &str, name: &str) -> Option<Rank> {
    let rest = device.strip_prefix(name)?;
    if rest.is_empty() {
        return Some(Rank::Top);
    }
    let zfile = rest.strip_prefix("-zfile").map(str::parse);
    let blob = rest.strip_prefix("-blob").map(str::parse);
    match (zfile, blob) {
        (Some(Ok(nth)), _) => Some(Rank::Zfile(nth)),
        (_, Some(Ok(nth))) => Some(Rank::Blob(nth)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::{number, rank, Line, Rank, State};

    #[test]
    fn ranks() {
        assert_eq!(rank("a", "a"), Some(Rank::Top));
        assert_eq!(rank("a-zfile12", "a"), Some(Rank::Zfile(12)));
        assert_eq!(rank("a-blob0", "a"), Some(Rank::Blob(0)));
        assert_eq!(rank("a-b", "a"), None);
        assert_eq!(rank("b", "a"), None);
        assert!(Rank::Top < Rank::Zfile(0) && Rank::Zfile(9) < Rank::Blob(0));
    }

    #[test]
    fn what_dmsetup_prints() {
        let state = State::parse("a-blob0|OVERLAYBD-BLOB-a-0|254|3|1|Read-only|Active");
        let state = state.unwrap_or_else(|| unreachable!());
        assert_eq!(state.number, "254:3");
        assert_eq!(state.open_count, 1);
        assert!(state.read_only && !state.suspended);
        assert_eq!(State::parse("No devices found"), None);
        let said = "Name:              a\nMajor, minor:      254, 2\nNumber of targets: 1\n";
        assert_eq!(number(said).as_deref(), Some("254:2"));
        let line = Line::parse("0 16384 lsmt 2 92 8388608 1600 ");
        assert_eq!(
            line.map(|line| line.to_string()).as_deref(),
            Some("0 16384 lsmt 2 92 8388608 1600")
        );
    }
}
