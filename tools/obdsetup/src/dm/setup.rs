// SPDX-License-Identifier: GPL-2.0

//! Setting up the devices of a plan with one dmsetup, and taking devices down with another.
//!
//! `dmsetup create --concise` makes many devices. Tables name the devices below by their numbers, so
//! the numbers are chosen here, among those that are free, but for the first device. Another program may
//! take one first: then all begins again with others.

use std::collections::BTreeSet;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{bail, Context, Result};

use super::control::{dmsetup, Control, Line, State};
use super::lock::Lock;
use super::plan::{Device, Lower, Plan, Target};
use super::udev::{Udev, Wait};
use crate::exit::{self, Failure};
use crate::{in_use, interrupt};

/// How often other numbers are tried.
const TRIES: u32 = 20;
/// Numbers below this one are device-mapper's.
const NUMBERS: u32 = 1 << 20;
/// Longest text for one dmsetup: the kernel takes arguments of up to 128 KiB.
const LONGEST: usize = 100 << 10;
/// How long somebody may have a device open that is to go, as udev does to look at it.
const PATIENCE: Duration = Duration::from_secs(5);
const POLL: Duration = Duration::from_millis(100);

/// Devices that were set up, or are being so. They are taken down when this is dropped, unless
/// [`Self::keep`] was called.
pub(crate) struct SetUp<'a> {
    control: &'a Control,
    lock: &'a Lock,
    plan: &'a Plan,
    udev: Udev,
    /// The numbers that this attempt has chosen for the devices.
    numbers: Vec<String>,
    /// Whether the first device may be ours. Who makes it has the name: locks don't tell of an
    /// obdsetup that sees another `/run`.
    begun: bool,
    kept: bool,
}

impl<'a> SetUp<'a> {
    /// Sets up the devices of `plan`, lowest first; `below` returns the numbers of files and devices
    /// below. The caller holds `lock`, and has seen that none of the devices exists.
    pub(crate) fn new(
        control: &'a Control,
        lock: &'a Lock,
        plan: &'a Plan,
        below: &dyn Fn(Lower) -> Option<String>,
    ) -> Result<Self> {
        let mut all = Self {
            control,
            lock,
            plan,
            udev: Udev::find(),
            numbers: Vec::new(),
            begun: false,
            kept: false,
        };
        let major = major()?;
        for attempt in 0..TRIES {
            let minors = free_minors(&control.states()?, plan.devices.len(), attempt);
            all.numbers = minors.iter().map(|nth| format!("{major}:{nth}")).collect();
            all.begun = false;
            let Err(error) = all.create(&minors, below)? else {
                return Ok(all);
            };
            if let Some(error) = all.why(below, error)? {
                return Err(error);
            }
            all.take_down()?;
        }
        bail!("other programs took all {TRIES} sets of device numbers that were tried: try again")
    }

    /// Keeps the devices.
    pub(crate) fn keep(mut self) {
        self.kept = true;
    }

    /// Creates the devices, and waits for udev. The inner error is dmsetup's.
    fn create(
        &mut self,
        minors: &[u32],
        below: &dyn Fn(Lower) -> Option<String>,
    ) -> Result<Result<()>> {
        let wait = self.udev.begin(self.control, self.lock)?;
        let mut created = self.create_first(&wait, below);
        let others = self.plan.devices.iter().zip(minors).skip(1);
        let specs: Vec<String> = others
            .map(|(device, minor)| {
                concise(device, Some(*minor), &table(device, &self.numbers, below))
            })
            .collect();
        for text in join(&specs) {
            if created.is_err() || interrupt::check().is_err() {
                break;
            }
            created = self.run_create(&wait, &text);
        }
        let name = self.plan.devices.last().map_or("", |top| &top.name);
        let waited = match interrupt::check() {
            Err(error) => Err(error.into()),
            Ok(()) => wait.end(name),
        };
        if waited.is_err() {
            // Nor is it waited for when the devices are taken down.
            self.udev = self.udev.unawaited();
        }
        waited.map(|()| created)
    }

    /// Creates the first device. The kernel chooses its number: when the kernel refuses the table,
    /// dmsetup cannot remove a device whose number it was given, and then nothing tells whether the
    /// device is ours.
    fn create_first(
        &mut self,
        wait: &Wait<'_>,
        below: &dyn Fn(Lower) -> Option<String>,
    ) -> Result<()> {
        let Some(device) = self.plan.devices.first() else {
            return Ok(());
        };
        let text = concise(device, None, &table(device, &self.numbers, below));
        let created = self.run_create(wait, &text);
        self.begun = created.is_ok() || interrupt::check().is_err();
        if self.begun {
            let states = self.control.states()?;
            let own = states.into_iter().find(|state| state.uuid == device.uuid);
            if let (Some(own), Some(number)) = (own, self.numbers.first_mut()) {
                *number = own.number;
            }
        }
        created
    }

    fn run_create(&self, wait: &Wait<'_>, text: &str) -> Result<()> {
        let mut program = dmsetup();
        program.arg("create").args(wait.options());
        program.args(["--concise", text]);
        self.control.run_program(&mut program).map(|_| ())
    }

    /// Returns why the devices could not be created; nothing where others took their numbers.
    fn why(
        &self,
        below: &dyn Fn(Lower) -> Option<String>,
        error: anyhow::Error,
    ) -> Result<Option<anyhow::Error>> {
        let now = self.control.states()?;
        let mut devices = self.plan.devices.iter().zip(&self.numbers);
        let is_there = |(device, number): &(&Device, &String)| {
            self.begun && now.iter().any(|state| is(state, device, number))
        };
        let Some((device, number)) = devices.find(|device| !is_there(device)) else {
            return Ok(Some(error));
        };
        if let Some(error) = in_the_way(&now, device) {
            return Ok(Some(error));
        }
        if now.iter().any(|state| state.number == *number) {
            return Ok(None);
        }
        let lines = table(device, &self.numbers, below);
        let lower = device.table.iter().flat_map(Target::lower);
        for number in lower.filter_map(below) {
            if let Some(place) = in_use::mounted_on(&number) {
                let message = format!(
                    "cannot set up device {}: block device {number} is mounted on {place}: unmount it",
                    device.name
                );
                return Ok(Some(Failure::error(exit::BUSY, message)));
            }
        }
        let ours = lines
            .iter()
            .any(|line| matches!(line.target.as_str(), "zfile" | "lsmt"));
        let hint = match Path::new("/sys/module/dm_overlaybd").exists() {
            false if ours => super::access::NO_MODULE,
            // Only there a target says why it says no.
            _ => "; dmesg has the reason",
        };
        let lines: Vec<String> = lines.iter().map(Line::to_string).collect();
        let context = format!(
            "cannot set up device {} with table `{}`{hint}",
            device.name,
            lines.join("; ")
        );
        Ok(Some(error.context(context)))
    }

    /// Removes the devices of this attempt that are there.
    fn take_down(&self) -> Result<()> {
        if !self.begun {
            return Ok(());
        }
        let names = ours(&self.control.states()?, &self.plan.devices, &self.numbers);
        let removal = Removal {
            deferred: false,
            despite_signals: true,
        };
        remove(self.control, self.lock, &names, removal, self.udev)
    }
}

impl Drop for SetUp<'_> {
    fn drop(&mut self) {
        if self.kept {
            return;
        }
        if let Err(error) = self.take_down() {
            crate::tell(&crate::message(&error));
        }
    }
}

/// Whether `state` is of `device`, which was to get `number`. It may have been renamed since.
fn is(state: &State, device: &Device, number: &str) -> bool {
    state.uuid == device.uuid && state.number == number
}

/// Returns the names of those of the devices `all` that are `devices` with `numbers`, top first.
/// Another number is that of a device which another obdsetup has made.
fn ours(all: &[State], devices: &[Device], numbers: &[String]) -> Vec<String> {
    let devices = devices.iter().zip(numbers).rev();
    devices
        .filter_map(|(device, number)| all.iter().find(|state| is(state, device, number)))
        .map(|state| state.name.clone())
        .collect()
}

/// Returns the error where a device has the name or the UUID that `device` is to get.
pub(crate) fn in_the_way(all: &[State], device: &Device) -> Option<anyhow::Error> {
    let message = if all.iter().any(|state| state.name == device.name) {
        format!("device {} exists already", device.name)
    } else {
        let other = all.iter().find(|state| state.uuid == device.uuid)?;
        let (name, now) = (&device.name, &other.name);
        format!("device {name} exists already: it was renamed, and is {now} now")
    };
    Some(Failure::error(exit::BUSY, message))
}

/// How devices are removed.
#[derive(Clone, Copy)]
pub(crate) struct Removal {
    /// Those that are in use go when they no longer are.
    pub(crate) deferred: bool,
    /// A signal does not end it: it is what is done after a signal.
    pub(crate) despite_signals: bool,
}

/// Removes the devices `names`, top first.
pub(crate) fn remove(
    control: &Control,
    lock: &Lock,
    names: &[String],
    how: Removal,
    udev: Udev,
) -> Result<()> {
    let Some(top) = names.first() else {
        return Ok(());
    };
    let end = Instant::now() + PATIENCE;
    let mut left = names.to_vec();
    loop {
        let wait = udev.begin(control, lock)?;
        let mut program = dmsetup();
        program.arg("remove").args(wait.options());
        program.args(how.deferred.then_some("--deferred"));
        program.arg("--").args(&left);
        if how.despite_signals {
            program.despite_signals();
        }
        let removed = control.run_program(&mut program);
        wait.end(top)?;
        let Err(error) = removed else {
            return Ok(());
        };
        if !how.despite_signals {
            interrupt::check()?;
        }
        let now = control.states()?;
        left.retain(|name| now.iter().any(|state| state.name == *name));
        let Some(next) = left.first() else {
            return Ok(());
        };
        if Instant::now() >= end {
            let in_use = |state: &State| state.name == *next && state.open_count > 0;
            return Err(match now.iter().any(in_use) {
                true => Failure::error(exit::BUSY, format!("device {next} is in use")),
                false => error.context(format!("cannot remove device {next}")),
            });
        }
        std::thread::sleep(POLL);
    }
}

/// Returns the major number of mapped devices.
fn major() -> Result<u32> {
    let text = std::fs::read_to_string("/proc/devices").context("/proc/devices")?;
    let major = text
        .lines()
        .skip_while(|line| *line != "Block devices:")
        .filter_map(|line| line.trim().split_once(' '))
        .find_map(|(number, name)| (name == "device-mapper").then(|| number.parse().ok())?);
    major.context("/proc/devices: the kernel has no device-mapper (modprobe dm_mod)")
}

/// Returns `count` minor numbers that none of the devices `all` has: the lowest ones, but when that
/// has failed, some that another obdsetup doesn't try, too.
fn free_minors(all: &[State], count: usize, attempt: u32) -> Vec<u32> {
    let minor = |state: &State| state.number.split_once(':')?.1.parse().ok();
    let used: BTreeSet<u32> = all.iter().filter_map(minor).collect();
    let mut start = 0;
    if attempt > 0 {
        let room = u32::try_from(count).unwrap_or(NUMBERS);
        let steps = (std::process::id() % 61 + 1).saturating_mul(attempt);
        let last = used.last().map_or(0, |last| last.saturating_add(1));
        start = last.saturating_add(room.saturating_mul(steps)) % NUMBERS;
    }
    let all = (start..NUMBERS).chain(0..start);
    all.filter(|minor| !used.contains(minor))
        .take(count)
        .collect()
}

/// Returns the table of a device; `numbers` are those of the plan's devices.
fn table(
    device: &Device,
    numbers: &[String],
    below: &dyn Fn(Lower) -> Option<String>,
) -> Vec<Line> {
    let resolve = |lower: Lower| {
        let number = match lower {
            Lower::Device(nth) => numbers.get(nth).cloned(),
            lower => below(lower),
        };
        number.unwrap_or_default()
    };
    let lines = device.table.iter().map(|target| Line {
        start: target.start,
        len: target.len,
        target: target.name.to_owned(),
        params: target.params(&resolve),
    });
    lines.collect()
}

/// Returns a device as `dmsetup create --concise` takes it. Without `minor` the kernel chooses one.
fn concise(device: &Device, minor: Option<u32>, table: &[Line]) -> String {
    let lines: Vec<String> = table.iter().map(|line| escape(&line.to_string())).collect();
    let (name, uuid) = (escape(&device.name), escape(&device.uuid));
    let minor = minor.map_or_else(String::new, |minor| minor.to_string());
    format!("{name},{uuid},{minor},ro,{};", lines.join(","))
}

/// Returns `text` with a backslash before what has a meaning.
fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for c in text.chars() {
        if matches!(c, ',' | ';' | '\\') {
            escaped.push('\\');
        }
        escaped.push(c);
    }
    escaped
}

/// Joins `specs` to as few texts as the kernel allows.
fn join(specs: &[String]) -> Vec<String> {
    let mut texts: Vec<String> = Vec::new();
    for spec in specs {
        match texts.last_mut() {
            Some(text) if text.len() + spec.len() <= LONGEST => text.push_str(spec),
            _ => texts.push(spec.clone()),
        }
    }
    texts
}

#[cfg(test)]
mod tests {
    use super::super::plan::Word;
    use super::*;

    #[test]
    fn minors() {
        let state = |minor: u32| State {
            number: format!("254:{minor}"),
            ..State::default()
        };
        let all = [state(0), state(2), state(7)];
        assert_eq!(free_minors(&all, 4, 0), [1, 3, 4, 5]);
        let others = free_minors(&all, 4, 1);
        assert!(others.len() == 4 && others.iter().all(|&minor| minor > 7));
        assert_ne!(free_minors(&all, 4, 2), others);
    }

    #[test]
    fn what_others_have_made_is_left_alone() {
        let device = |name: &str| Device {
            name: name.to_owned(),
            uuid: format!("OVERLAYBD-{name}"),
            table: Vec::new(),
        };
        let state = |name: &str, uuid: &str, number: &str| State {
            name: name.to_owned(),
            uuid: uuid.to_owned(),
            number: number.to_owned(),
            ..State::default()
        };
        let all = [
            state("a", "OVERLAYBD-a", "254:0"),
            state("renamed", "OVERLAYBD-b", "254:1"),
            state("c", "OVERLAYBD-c", "254:7"),
            state("d", "LVM-d", "254:3"),
        ];
        let devices = ["a", "b", "c", "d"].map(device);
        let numbers = ["254:0", "254:1", "254:2", "254:3"].map(str::to_owned);
        assert_eq!(ours(&all, &devices, &numbers), ["renamed", "a"]);
    }

    #[test]
    fn specs() {
        let device = Device {
            name: "a".to_owned(),
            uuid: "OVERLAYBD-BLOB-a-0".to_owned(),
            table: vec![
                Target {
                    start: 0,
                    len: 8,
                    name: "linear",
                    params: vec![Word::Lower(Lower::Layer(0)), Word::Text("0".to_owned())],
                },
                Target {
                    start: 8,
                    len: 1,
                    name: "zfile",
                    params: vec![
                        Word::Lower(Lower::Device(0)),
                        Word::Text("x,y;z\\".to_owned()),
                    ],
                },
            ],
        };
        let lines = table(&device, &["254:5".to_owned()], &|_| Some("7:1".to_owned()));
        assert_eq!(
            concise(&device, Some(6), &lines),
            "a,OVERLAYBD-BLOB-a-0,6,ro,0 8 linear 7:1 0,8 1 zfile 254:5 x\\,y\\;z\\\\;"
        );
        let spec = "x".repeat(LONGEST / 3);
        let texts = join(&vec![spec; 7]);
        assert_eq!(texts.len(), 3);
        assert!(texts.iter().all(|text| text.len() <= LONGEST));
    }
}
