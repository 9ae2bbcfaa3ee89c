// SPDX-License-Identifier: GPL-2.0

//! Sets up the devices of a plan, and removes devices, each with a few runs of dmsetup.
//!
//! `dmsetup create --concise` makes many devices. Tables refer to the devices below by their numbers, so free
//! numbers are chosen in advance, except for the first device that isn't shared. If another program takes one of
//! these numbers first, everything starts again with other numbers.
//!
//! Shared devices are made first, and are held open before a table names them. While a device is held, no one
//! can remove it, and no other device can get its number.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use anyhow::{bail, Context, Result};

use super::control::{dmsetup, Control, Line, State};
use super::identity;
use super::lock::Lock;
use super::plan::{Device, Lower, Plan, LSMT_DAX};
use super::share::{self, Attempt, Hold};
use super::system;
use super::udev::{Udev, Wait};
use super::QUIET;
use crate::files::in_use;
use crate::terminal::exit::{self, Failure};
use crate::terminal::interrupt;

/// Largest number of attempts. Each chooses other device numbers.
const TRIES: u32 = 20;
/// How many times to assume, when making a shared device fails, that another obdsetup was making it, too.
const CONFLICTS: u32 = 3;
/// All minor numbers of device-mapper are smaller than this one.
const NUMBERS: u32 = 1 << 20;
/// Longest text for one dmsetup: the kernel limits an argument to 128 KiB.
const LONGEST: usize = 100 << 10;
/// How long to wait if someone, for example udev, has a device open that is to be removed.
const PATIENCE: Duration = Duration::from_secs(5);
const POLL: Duration = Duration::from_millis(100);

/// The files and devices below the devices of a plan.
pub(crate) trait Below {
    /// Prepares `lower`. Called before a table names it.
    fn provide(&mut self, lower: Lower) -> Result<()>;
    /// Returns the number of `lower`, `MAJOR:MINOR`, if it was prepared.
    fn number(&self, lower: Lower) -> Option<String>;
}

/// Devices that were set up or are being set up. Dropping this removes them, unless [`Self::keep`] was
/// called.
pub(crate) struct SetUp<'a> {
    control: &'a Control,
    lock: &'a Lock,
    plan: &'a Plan,
    udev: Udev,
    /// The number of each device of the plan: the actual number of a device that is held, the number that
    /// this attempt has chosen for a device to make.
    numbers: Vec<String>,
    /// The shared devices that are held, by their indexes in the plan.
    holds: BTreeMap<usize, Hold>,
    /// The locks of the shared devices that this attempt is about to make.
    locks: Vec<Lock>,
    /// The indexes of the shared devices that this attempt makes.
    made: Vec<usize>,
    /// Whether a shared device was removed after it was made and before it could be held.
    lost: bool,
    /// How many times making shared devices has failed, presumably because another obdsetup interfered.
    conflicts: u32,
    /// Whether this process may have made the first device that isn't shared. Making this device reserves the
    /// name, because locks don't exclude an obdsetup that has another `/run`.
    begun: bool,
    kept: bool,
}

impl<'a> SetUp<'a> {
    /// Sets up the devices of `plan`, lowest first, except shared ones that exist. `states` are all devices.
    /// The caller holds `lock`, and has checked that no device of the plan that isn't shared exists.
    pub(crate) fn new(
        control: &'a Control,
        lock: &'a Lock,
        plan: &'a Plan,
        states: Vec<State>,
        below: &mut dyn Below,
    ) -> Result<Self> {
        let mut all = Self {
            control,
            lock,
            plan,
            udev: Udev::find(),
            numbers: Vec::new(),
            holds: BTreeMap::new(),
            locks: Vec::new(),
            made: Vec::new(),
            lost: false,
            conflicts: 0,
            begun: false,
            kept: false,
        };
        let major = major()?;
        let mut states = Some(states);
        for attempt in 0..TRIES {
            let states = all.adopt(states.take())?;
            let todo = all.wanted();
            if attempt == 0 {
                all.tell_of_other_options(&states, &todo);
            }
            for lower in all.devices(&todo).flat_map(|(_, device)| device.lower()) {
                if !matches!(lower, Lower::Device(_)) {
                    below.provide(lower)?;
                }
            }
            let minors = free_minors(&states, todo.len(), attempt);
            all.numbers = vec![String::new(); plan.devices.len()];
            for (nth, hold) in &all.holds {
                if let Some(number) = all.numbers.get_mut(*nth) {
                    number.clone_from(&hold.number);
                }
            }
            for (nth, minor) in todo.iter().zip(&minors) {
                if let Some(number) = all.numbers.get_mut(*nth) {
                    *number = format!("{major}:{minor}");
                }
            }
            let Err(error) = all.create(&todo, &minors, below)? else {
                return Ok(all);
            };
            if let Some(error) = all.why(&todo, below, error)? {
                return Err(error);
            }
            all.take_down()?;
        }
        bail!("other programs took the chosen device numbers in all {TRIES} attempts: try again")
    }

    /// Keeps the devices.
    pub(crate) fn keep(mut self) {
        self.kept = true;
    }

    /// Returns the number of the last device of the plan.
    pub(crate) fn number(&self) -> Option<&str> {
        self.numbers.last().map(String::as_str)
    }

    /// Returns the numbers of the shared devices that existed before.
    pub(crate) fn adopted(&self) -> BTreeSet<String> {
        let holds = self.holds.iter();
        let adopted = holds.filter(|(nth, _)| !self.made.contains(nth));
        adopted.map(|(_, hold)| hold.number.clone()).collect()
    }

    /// Returns the devices of the plan with the indexes `nths`, and these indexes.
    fn devices<'b>(&'b self, nths: &'b [usize]) -> impl Iterator<Item = (usize, &'b Device)> + 'b {
        let devices = nths.iter();
        devices.filter_map(|&nth| Some((nth, self.plan.devices.get(nth)?)))
    }

    /// Returns the indexes of the devices that have to be made, lowest first. Shared devices that only held devices
    /// need are left out.
    fn wanted(&self) -> Vec<usize> {
        let mut wanted: BTreeSet<usize> =
            self.plan.devices.len().checked_sub(1).into_iter().collect();
        let mut found = Vec::new();
        for (nth, device) in self.plan.devices.iter().enumerate().rev() {
            if device.shared.is_some() && !wanted.contains(&nth) || self.holds.contains_key(&nth) {
                continue;
            }
            found.push(nth);
            wanted.extend(device.lower().filter_map(|lower| match lower {
                Lower::Device(nth) => Some(nth),
                _ => None,
            }));
        }
        found.reverse();
        found
    }

    /// Holds the shared devices that exist, and takes the locks for those that have to be made. Returns the
    /// states of all devices before that. `known` are these states, if the caller has just got them.
    fn adopt(&mut self, mut known: Option<Vec<State>>) -> Result<Vec<State>> {
        self.holds.clear();
        self.locks.clear();
        self.made.clear();
        self.lost = false;
        let plan = self.plan;
        let mut locked: BTreeSet<&str> = BTreeSet::new();
        let end = Instant::now() + PATIENCE;
        // Devices without a table, and the time since when they are unchanged.
        let mut half_built = (Vec::new(), Instant::now());
        loop {
            interrupt::check()?;
            let states = match known.take() {
                Some(states) => states,
                None => self.control.states()?,
            };
            let mut left = Vec::new();
            // From the top: devices that are needed only below a held device are skipped.
            for nth in (0..plan.devices.len()).rev() {
                if !self.wanted().contains(&nth) {
                    continue;
                }
                let Some(device) = plan.devices.get(nth).filter(|d| d.shared.is_some()) else {
                    continue;
                };
                let Some(state) = states.iter().find(|state| state.uuid == device.uuid) else {
                    continue;
                };
                match share::hold(state, device.sectors())? {
                    Attempt::Held(hold) => drop(self.holds.insert(nth, hold)),
                    Attempt::Unfinished => left.push(state.clone()),
                    // No one is making it, because this process has its lock.
                    Attempt::Suspended if locked.contains(device.uuid.as_str()) => {
                        return Err(share::suspended(&state.name));
                    }
                    Attempt::Suspended | Attempt::Gone => {}
                }
            }
            let missing = self.wanted().into_iter().filter_map(|nth| {
                let device = plan.devices.get(nth).filter(|d| d.shared.is_some())?;
                Some(device.uuid.as_str())
            });
            let missing: BTreeSet<&str> = missing.collect();
            if !missing.is_subset(&locked) {
                // Always in the same order, starting with no lock held, so that there is no deadlock.
                self.locks.clear();
                locked.extend(missing);
                for uuid in &locked {
                    self.locks.push(share::lock_device(uuid)?);
                }
                continue;
            }
            if left.is_empty() {
                self.verify()?;
                return Ok(states);
            }
            if half_built.0 != left {
                half_built = (left, Instant::now());
            }
            let (left, since) = &half_built;
            let names: Vec<String> = left.iter().map(|state| state.name.clone()).collect();
            if since.elapsed() < QUIET {
                // An obdsetup that has another `/run` may be making them in spite of the locks.
                std::thread::sleep(POLL);
            } else if self.locks.iter().all(Lock::is_held) {
                self.remove_left(&names)?;
            } else if Instant::now() >= end {
                let message = format!("device {} is half built", names.join(", "));
                return Err(Failure::error(exit::BUSY, message));
            } else {
                std::thread::sleep(POLL);
            }
        }
    }

    /// Removes shared devices without a table, which an obdsetup that was killed has left.
    fn remove_left(&self, names: &[String]) -> Result<()> {
        let how = Removal {
            deferred: false,
            despite_signals: false,
        };
        remove(self.control, self.lock, names, &[], how, self.udev)
            .with_context(|| format!("cannot remove {}, which is half built", names.join(", ")))
    }

    /// Checks that the held devices are over the right files and devices.
    fn verify(&self) -> Result<()> {
        let held = self.holds.iter().filter_map(|(nth, hold)| {
            let device = self.plan.devices.get(*nth)?;
            Some((device.name.as_str(), hold.number.as_str(), device.shared?))
        });
        share::verify(&held.collect::<Vec<_>>())
    }

    /// Reports layers that already have a device with other options, and so aren't shared.
    fn tell_of_other_options(&self, all: &[State], todo: &[usize]) {
        let mut told = BTreeSet::new();
        for (_, device) in self.devices(todo) {
            let layer = identity::parse(&device.uuid).map(|(_, layer)| layer);
            if let Some(other) = identity::with_other_options(all, &device.uuid) {
                // Once for each layer: a layer may have a zfile device and a blob device.
                if !told.insert(layer) {
                    continue;
                }
                crate::terminal::tell(&format!(
                    "note: device {other} is of the same layer with other options: not shared, {} is made",
                    device.name
                ));
            }
        }
    }

    /// Creates the devices `todo`, and waits for udev. The inner result is that of dmsetup.
    fn create(&mut self, todo: &[usize], minors: &[u32], below: &dyn Below) -> Result<Result<()>> {
        let is_shared = |nth: usize| {
            let device = self.plan.devices.get(nth);
            device.is_some_and(|device| device.shared.is_some())
        };
        let numbered = todo.iter().copied().zip(minors.iter().copied());
        let (shared, own): (Vec<_>, Vec<_>) = numbered.partition(|(nth, _)| is_shared(*nth));
        self.made = shared.iter().map(|(nth, _)| *nth).collect();
        let wait = self.udev.begin(self.control, self.lock)?;
        let shared = join(&self.specs(&shared, below));
        let mut created = self.create_shared(&wait, &shared);
        let (first, others) = own.split_at(own.len().min(1));
        if let Some(&(nth, _)) = first.first() {
            if created.is_ok() && interrupt::check().is_ok() {
                created = self.create_first(&wait, nth, below);
            }
        }
        for text in join(&self.specs(others, below)) {
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
            // Don't wait for udev when the devices are removed, either.
            self.udev = self.udev.unawaited();
        }
        waited.map(|()| created)
    }

    /// Returns the texts for `dmsetup create --concise`. `devices` are indexes in the plan, with minor
    /// numbers.
    fn specs(&self, devices: &[(usize, u32)], below: &dyn Below) -> Vec<String> {
        let specs = devices.iter().filter_map(|&(nth, minor)| {
            let device = self.plan.devices.get(nth)?;
            Some(concise(
                device,
                Some(minor),
                &table(device, &self.numbers, below),
            ))
        });
        specs.collect()
    }

    /// Creates the first device that isn't shared, which has the index `nth`. The kernel chooses its number.
    /// Otherwise, if the kernel refused the table, dmsetup could not remove the device, and it would be
    /// unknown whether this process has made the device.
    fn create_first(&mut self, wait: &Wait<'_>, nth: usize, below: &dyn Below) -> Result<()> {
        let Some(device) = self.plan.devices.get(nth) else {
            return Ok(());
        };
        let text = concise(device, None, &table(device, &self.numbers, below));
        let created = self.run_create(wait, &text);
        self.begun = created.is_ok() || interrupt::check().is_err();
        if self.begun {
            let own = match system::number_of_uuid(&device.uuid) {
                Some(own) => Some(own),
                None => {
                    let states = self.control.states()?;
                    let own = states.into_iter().find(|state| state.uuid == device.uuid);
                    own.map(|own| own.number)
                }
            };
            if let (Some(own), Some(number)) = (own, self.numbers.get_mut(nth)) {
                *number = own;
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

    /// Creates the shared devices in `texts`, holds them, and releases their locks.
    fn create_shared(&mut self, wait: &Wait<'_>, texts: &[String]) -> Result<()> {
        for text in texts {
            interrupt::check()?;
            self.run_create(wait, text)?;
        }
        if texts.is_empty() {
            // Others have made them while this process waited for the locks.
            self.locks.clear();
            return Ok(());
        }
        for nth in self.made.clone() {
            let (Some(device), Some(number)) = (self.plan.devices.get(nth), self.numbers.get(nth))
            else {
                continue;
            };
            let state = State {
                name: device.name.clone(),
                uuid: device.uuid.clone(),
                number: number.clone(),
                live: true,
                ..State::default()
            };
            match share::hold(&state, device.sectors())? {
                Attempt::Held(hold) => {
                    share::forget_cache(&device.uuid);
                    self.holds.insert(nth, hold);
                }
                _ => {
                    self.lost = true;
                    bail!("device {} is gone", device.name);
                }
            }
        }
        self.locks.clear();
        Ok(())
    }

    /// Returns why the devices `todo` could not be created. Returns `None` if the caller should try again,
    /// because others took their numbers or have made a shared device.
    fn why(
        &mut self,
        todo: &[usize],
        below: &dyn Below,
        error: anyhow::Error,
    ) -> Result<Option<anyhow::Error>> {
        if self.lost {
            return Ok(None);
        }
        let Ok(now) = self.control.states() else {
            return Ok(Some(error));
        };
        // Another obdsetup may have made a shared device meanwhile, if it has another `/run`. It may have
        // chosen the same number.
        let is_made = |(_, device): (usize, &Device)| {
            device.shared.is_some() && now.iter().any(|state| state.uuid == device.uuid)
        };
        // The other obdsetup may also have removed a shared device that this one has made, because it took the
        // device for one that a kill had left. Otherwise a device stays, even if the kernel has refused its table.
        let is_live = |device: &Device| {
            let mut live = now.iter().filter(|state| state.live);
            live.any(|state| state.uuid == device.uuid)
        };
        let failed = self
            .devices(todo)
            .find(|(_, device)| device.shared.is_some() && !is_live(device));
        let is_gone = failed.is_some_and(|failed| !is_made(failed));
        let all_held = self.made.iter().all(|nth| self.holds.contains_key(nth));
        let by_others = is_gone || self.devices(todo).any(is_made);
        if !all_held && self.conflicts < CONFLICTS && by_others {
            self.conflicts += 1;
            return Ok(None);
        }
        let mut devices = self
            .devices(todo)
            .filter_map(|(nth, device)| Some((device, self.numbers.get(nth)?)));
        let ours = |(device, number): &(&Device, &String)| {
            let may_be_ours = self.begun || device.shared.is_some();
            let mut ours = now.iter().filter(|state| is(state, device, number));
            ours.next().filter(|_| may_be_ours)
        };
        let is_done = |device: &_| ours(device).is_some_and(|state| state.live);
        let Some((device, number)) = devices.find(|device| !is_done(device)) else {
            return Ok(Some(error));
        };
        // If the device exists without a table, the kernel has refused the table: dmsetup fails to remove the
        // device then, because it gives the kernel both the name and the number.
        if ours(&(device, number)).is_none() {
            if device.shared.is_some() && now.iter().any(|state| state.uuid == device.uuid) {
                return Ok(None);
            }
            if let Some(error) = in_the_way(&now, device) {
                return Ok(Some(error));
            }
            if now.iter().any(|state| state.number == *number) {
                return Ok(None);
            }
        }
        let lines = table(device, &self.numbers, below);
        let lower = device.lower();
        for number in lower.filter_map(|lower| below.number(lower)) {
            if let Some(place) = in_use::mounted_on(&number) {
                let message = format!(
                    "cannot set up device {}: block device {number} is mounted on {place}: unmount it",
                    device.name
                );
                return Ok(Some(Failure::error(exit::BUSY, message)));
            }
            if let Some(user) = self.user(&number, &lines, &now) {
                let message = format!(
                    "cannot set up device {}: block device {number} is in use by {user}: close that first",
                    device.name
                );
                return Ok(Some(Failure::error(exit::BUSY, message)));
            }
        }
        let hint = match self.missing_target(&lines) {
            Some(target) => super::access::no_target(target),
            // Targets report their reason only in the kernel log.
            None => "; dmesg has the reason".to_owned(),
        };
        let lines: Vec<String> = lines.iter().map(Line::to_string).collect();
        let context = format!(
            "cannot set up device {} with table `{}`{hint}",
            device.name,
            lines.join("; ")
        );
        Ok(Some(error.context(context)))
    }

    /// Returns the device that uses block device `number` in a way that excludes `table`; `None` if none is found.
    /// `all` are all mapped devices.
    fn user(&self, number: &str, table: &[Line], all: &[State]) -> Option<String> {
        let wants_dax = table.iter().any(|line| line.target == LSMT_DAX);
        let system::Users { own, others } = system::users_of_any_part(number);
        let own = own.into_iter().map(|user| (user, false));
        let mut users = own.chain(others.into_iter().map(|user| (user, true)));
        users.find_map(|(user, is_other_part)| {
            let Some(state) = all.iter().find(|state| state.number == user) else {
                // Such devices have a block device for themselves.
                return Some(system::name(&user));
            };
            // Mapped devices can have a block device in common, unless both have DAX. But the kernel gives a disk to
            // nobody while a partition of it is in use, and the other way round.
            let has_dax = || {
                let targets = self.control.targets(&state.name);
                targets.iter().any(|target| target == LSMT_DAX)
            };
            let excludes = is_other_part || wants_dax && has_dax();
            excludes.then(|| format!("device {}", state.name))
        })
    }

    /// Returns a target in `table` that the kernel doesn't have. The kernel has tried to load it.
    fn missing_target<'b>(&self, table: &'b [Line]) -> Option<&'b str> {
        let there = self.control.run(&["targets"]).ok()?;
        let is_there = |name: &str| {
            let mut names = there.lines().map(|line| line.split_whitespace().next());
            names.any(|there| there == Some(name))
        };
        let mut names = table.iter().map(|line| line.target.as_str());
        names.find(|name| !is_there(name))
    }

    /// Removes the devices that this attempt has made, and shared ones that existed before and have no users
    /// any more. Shared ones that others use now stay.
    fn take_down(&mut self) -> Result<()> {
        let mut made = std::mem::take(&mut self.made);
        let adopted = std::mem::take(&mut self.holds);
        let adopted: BTreeMap<usize, String> = adopted
            .into_iter()
            .filter(|(nth, _)| !made.contains(nth))
            .map(|(nth, hold)| (nth, hold.number))
            .collect();
        let mut gone = BTreeSet::new();
        for (nth, number) in adopted.iter().rev() {
            if let Some(known) = self.numbers.get(*nth) {
                if known == number && system::users(number).is_subset(&gone) {
                    gone.insert(number.clone());
                    made.push(*nth);
                }
            }
        }
        made.sort_unstable();
        if !self.begun && made.is_empty() {
            self.locks.clear();
            return Ok(());
        }
        let all = self.control.states()?;
        let own: Vec<usize> = match self.begun {
            true => (0..self.plan.devices.len()).collect(),
            false => Vec::new(),
        };
        let names = |nths: &[usize], shared: bool| {
            let devices = self
                .devices(nths)
                .filter(|(_, d)| d.shared.is_some() == shared);
            let devices = devices.filter_map(|(nth, d)| Some((d, self.numbers.get(nth)?)));
            ours(&all, &devices.collect::<Vec<_>>())
        };
        let (own, shared) = (names(&own, false), names(&made, true));
        let removal = Removal {
            deferred: false,
            despite_signals: true,
        };
        let removed = remove(self.control, self.lock, &own, &shared, removal, self.udev);
        self.locks.clear();
        removed
    }
}

impl Drop for SetUp<'_> {
    fn drop(&mut self) {
        if self.kept {
            return;
        }
        if let Err(error) = self.take_down() {
            crate::terminal::tell_error("", &error);
        }
    }
}

/// Returns whether `state` is the state of `device`, for which `number` was chosen. The device may have been
/// renamed.
fn is(state: &State, device: &Device, number: &str) -> bool {
    state.uuid == device.uuid && state.number == number
}

/// Returns the current names of `devices`, top first, as far as they are in `all` and have their numbers. A
/// device with another number was made by another obdsetup.
fn ours(all: &[State], devices: &[(&Device, &String)]) -> Vec<String> {
    let devices = devices.iter().rev();
    devices
        .filter_map(|(device, number)| all.iter().find(|state| is(state, device, number)))
        .map(|state| state.name.clone())
        .collect()
}

/// Returns the error if a device has the name or the UUID of `device` already.
pub(crate) fn in_the_way(all: &[State], device: &Device) -> Option<anyhow::Error> {
    let message = if all.iter().any(|state| state.name == device.name) {
        format!("device {} exists already", device.name)
    } else {
        let other = all.iter().find(|state| state.uuid == device.uuid)?;
        let (name, now) = (&device.name, &other.name);
        format!("device {name} exists already: it was renamed to {now}")
    };
    Some(Failure::error(exit::BUSY, message))
}

/// How devices are removed.
#[derive(Clone, Copy)]
pub(crate) struct Removal {
    /// Whether the kernel removes devices that are in use later, when they are closed.
    pub(crate) deferred: bool,
    /// Whether signals are ignored during the removal. Set when cleaning up after a signal.
    pub(crate) despite_signals: bool,
}

/// Removes the devices `names`, top first, then the devices `shared` below them. If someone has one of `shared`
/// open, the kernel removes it when it is closed. `lock` keeps the note on the wait for udev.
pub(crate) fn remove(
    control: &Control,
    lock: &Lock,
    names: &[String],
    shared: &[String],
    mut how: Removal,
    udev: Udev,
) -> Result<()> {
    let mut left = [names, shared].concat();
    let Some(top) = left.first().cloned() else {
        return Ok(());
    };
    let end = Instant::now() + PATIENCE;
    loop {
        // Programs such as udev may have shared devices open for a moment: the kernel removes these devices later.
        let only_shared = left.iter().all(|name| shared.contains(name));
        how.deferred |= only_shared;
        let wait = udev.begin(control, lock)?;
        let mut program = dmsetup();
        program.arg("remove").args(wait.options());
        program.args(how.deferred.then_some("--deferred"));
        let count = batch(&left);
        program.arg("--").args(left.iter().take(count));
        if how.despite_signals {
            program.despite_signals();
        }
        let removed = control.run_program(&mut program);
        wait.end(&top)?;
        let Err(error) = removed else {
            left.drain(..count);
            if left.is_empty() {
                return Ok(());
            }
            continue;
        };
        if !how.despite_signals {
            interrupt::check()?;
        }
        let now = control.states()?;
        let before = left.len();
        left.retain(|name| now.iter().any(|state| state.name == *name));
        let Some(next) = left.first() else {
            return Ok(());
        };
        // dmsetup fails at a device that was removed meanwhile, and doesn't process those after it: try
        // again. Also try again if only shared devices are left, because the next attempt uses --deferred.
        let goes_on =
            left.len() < before || !how.deferred && left.iter().all(|name| shared.contains(name));
        if !goes_on && Instant::now() >= end {
            let in_use = |state: &State| state.name == *next && state.open_count > 0;
            return Err(match now.iter().any(in_use) {
                true => Failure::error(exit::BUSY, format!("device {next} is in use")),
                false => error.context(format!("cannot remove device {next}")),
            });
        }
        std::thread::sleep(POLL);
    }
}

/// Returns how many of `names`, from the first one, fit in the command line of one dmsetup: at least one.
fn batch(names: &[String]) -> usize {
    let ends = names.iter().scan(0, |end, name| {
        *end += name.len() + 1;
        Some(*end)
    });
    ends.take_while(|&end| end <= LONGEST)
        .count()
        .max(1)
        .min(names.len())
}

/// Returns the major number of device-mapper.
fn major() -> Result<u32> {
    let text = std::fs::read_to_string("/proc/devices").context("/proc/devices")?;
    let major = text
        .lines()
        .skip_while(|line| *line != "Block devices:")
        .filter_map(|line| line.trim().split_once(' '))
        .find_map(|(number, name)| (name == "device-mapper").then(|| number.parse().ok())?);
    major.context("/proc/devices: the kernel has no device-mapper (modprobe dm_mod)")
}

/// Returns `count` minor numbers that none of the devices `all` has. The first attempt uses the lowest ones;
/// later attempts use others, so that another obdsetup doesn't try the same.
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

/// Returns the table of a device. `numbers` are the numbers of the plan's devices.
fn table(device: &Device, numbers: &[String], below: &dyn Below) -> Vec<Line> {
    let resolve = |lower: Lower| {
        let number = match lower {
            Lower::Device(nth) => numbers.get(nth).cloned(),
            lower => below.number(lower),
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

/// Returns a device in the form of `dmsetup create --concise`. If `minor` is `None`, the kernel chooses the
/// number.
fn concise(device: &Device, minor: Option<u32>, table: &[Line]) -> String {
    let lines: Vec<String> = table.iter().map(|line| escape(&line.to_string())).collect();
    let (name, uuid) = (escape(&device.name), escape(&device.uuid));
    let minor = minor.map_or_else(String::new, |minor| minor.to_string());
    let mode = match device.writable {
        true => "rw",
        false => "ro",
    };
    format!("{name},{uuid},{minor},{mode},{};", lines.join(","))
}

/// Returns `text` with a backslash before each special character.
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

/// Joins `specs` to as few texts as possible, none longer than [`LONGEST`] unless a single one is.
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
    use super::super::plan::{Target, Word};
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
    fn batches() {
        let names = |count: usize, len: usize| vec!["x".repeat(len); count];
        assert_eq!(batch(&[]), 0);
        assert_eq!(batch(&names(3, 127)), 3);
        assert_eq!(batch(&names(1, 2 * LONGEST)), 1);
        let many = names(20_000, 127);
        let count = batch(&many);
        assert!((700..=LONGEST / 128).contains(&count), "{count}");
    }

    #[test]
    fn what_others_have_made_is_left_alone() {
        let device = |name: &str| Device {
            name: name.to_owned(),
            uuid: format!("OVERLAYBD-{name}"),
            table: Vec::new(),
            writable: false,
            shared: None,
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
        let devices: Vec<_> = devices.iter().zip(&numbers).collect();
        assert_eq!(ours(&all, &devices), ["renamed", "a"]);
    }

    struct Loop;

    impl Below for Loop {
        fn provide(&mut self, _: Lower) -> Result<()> {
            Ok(())
        }

        fn number(&self, _: Lower) -> Option<String> {
            Some("7:1".to_owned())
        }
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
            writable: false,
            shared: None,
        };
        let lines = table(&device, &["254:5".to_owned()], &Loop);
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
