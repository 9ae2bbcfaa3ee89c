// SPDX-License-Identifier: GPL-2.0

//! `obdsetup close`.

use std::collections::BTreeSet;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::Result;

use crate::devices::dm::control::State;
use crate::devices::dm::lock::Lock;
use crate::devices::dm::plan::check_name;
use crate::devices::dm::setup::{self, Removal};
use crate::devices::dm::share;
use crate::devices::dm::stack::part;
use crate::devices::dm::system;
use crate::devices::dm::udev::Udev;
use crate::devices::dm::{self, Control, Stack};
use crate::devices::store::closing::Closing;
use crate::terminal::exit::{self, Failure};
use crate::terminal::interrupt;

/// How long to wait if someone has a device open. Programs such as udev open new devices for a moment.
const PATIENCE: Duration = Duration::from_secs(2);

/// Arguments of `close`.
#[derive(clap::Args)]
#[command(after_help = "Examples:
  obdsetup close app
  obdsetup close --deferred app      as soon as nobody uses it

Also removes the devices of the disk's partitions, and the devices below the disk with their loop \
devices, except those that other stacks use. The store of a writable disk is kept, with everything \
that was written.")]
pub(crate) struct Args {
    /// Name that was given to `open`
    name: String,

    /// If the device is in use, do not fail: it is removed as soon as nobody uses it
    #[arg(long)]
    deferred: bool,
}

/// Runs `close`.
pub(crate) fn run(args: &Args) -> Result<()> {
    check_name(&args.name)?;
    let control = Control::open()?;
    let Some(found) = Stack::find(&control, &args.name)? else {
        return close_nothing(&control, &args.name);
    };
    let lock = Lock::take(&found.name)?;
    dm::clear_left(&lock);
    // Look again: another obdsetup may have changed the stack before this one got the lock.
    let all = control.states()?;
    let Some(stack) = Stack::among(&all, &args.name) else {
        return Err(not_ours(&control, &args.name)?);
    };
    if stack.is_half_built() {
        crate::terminal::tell(&format!(
            "device {} was left half built by an obdsetup that was killed: removing {}",
            stack.name,
            stack.names().join(", ")
        ));
    }
    if let Some(top) = stack.top().filter(|_| !args.deferred) {
        if let Some(used) = in_use(&control, &stack, &top.name)? {
            let message = format!("device {used} is in use; --deferred removes it later");
            return Err(Failure::error(exit::BUSY, message));
        }
    }
    let shared = stack.shared(&all);
    let left = share::left_for_long(&control, &all)?;
    let mut names = match (stack.top(), args.deferred) {
        // The kernel removes each of them when it is closed, whichever stack is the last one.
        (_, true) => shared.iter().map(|state| state.name.clone()).collect(),
        (Some(_), false) => unused(&stack.devices, &shared),
        (None, false) => Vec::new(),
    };
    names.extend(left.names);
    let removal = Removal {
        deferred: args.deferred,
        despite_signals: false,
    };
    let own = stack.names();
    let store = Closing::of(&control, &stack).unwrap_or_else(|error| {
        // The stack must be removed anyway.
        crate::terminal::tell_error("warning: ", &error);
        None
    });
    setup::remove(&control, &lock, &own, &names, removal, Udev::find())?;
    drop(left.locks);
    // An error of the store is returned at the end. The shared devices must be removed anyway, because the stack
    // can't be found by its name any more.
    let ended = store.map_or(Ok(()), Closing::end);
    if shared.iter().any(|state| !names.contains(&state.name)) {
        remove_unused(&control, &lock, &shared)?;
    }
    let numbers = shared.iter().map(|state| state.number.clone()).collect();
    share::set_caches(&control, &numbers);
    share::clear_left(&control);
    ended
}

/// Removes the devices of `shared`, upper ones first, that no table names any more, and the shared devices that
/// killed obdsetups have left. A device that is open is removed by the kernel when it is closed. Called after the
/// stack was removed: if several stacks are closed at the same time, each close still saw the tables of the
/// other stacks before.
fn remove_unused(control: &Control, lock: &Lock, shared: &[&State]) -> Result<()> {
    let end = Instant::now() + PATIENCE;
    loop {
        let all = control.states()?;
        let is_there = |state: &&&State| {
            let mut same = all.iter().filter(|now| now.uuid == state.uuid);
            same.any(|now| now.number == state.number)
        };
        let mine: Vec<&State> = shared.iter().filter(is_there).copied().collect();
        let left = share::left(&all);
        let mut names = unused(&[], &mine);
        for name in &left.names {
            if !names.contains(name) {
                names.push(name.clone());
            }
        }
        let removal = Removal {
            deferred: true,
            despite_signals: false,
        };
        setup::remove(control, lock, &[], &names, removal, Udev::find())?;
        // A process that holds the lock of a device may be about to use it, or may only have checked it.
        if !left.others || Instant::now() >= end {
            return Ok(());
        }
        drop(left);
        interrupt::check()?;
        sleep(Duration::from_millis(50));
    }
}

/// Returns the names of the devices of `shared` that no table names, except the tables of `own` and of devices in
/// the result. Upper ones come first, in `shared` and in the result.
fn unused(own: &[State], shared: &[&State]) -> Vec<String> {
    let mut gone: BTreeSet<String> = own.iter().map(|state| state.number.clone()).collect();
    let mut names = Vec::new();
    for state in shared {
        if system::users(&state.number).is_subset(&gone) {
            gone.insert(state.number.clone());
            names.push(state.name.clone());
        }
    }
    names
}

/// Called if there is no stack `name`. Removes the shared devices that a killed `open` or `close` of this name
/// has left. If there are none, returns the error that there is no stack `name`.
fn close_nothing(control: &Control, name: &str) -> Result<()> {
    let lock = Lock::take(name)?;
    if lock.was_left() {
        dm::clear_left(&lock);
        share::clear_left(control);
        let left = share::left_for_long(control, &control.states()?)?;
        if !left.names.is_empty() {
            crate::terminal::tell(&format!(
                "device {name} was left half built by an obdsetup that was killed: removing {}",
                left.names.join(", ")
            ));
            let removal = Removal {
                deferred: true,
                despite_signals: false,
            };
            return setup::remove(control, &lock, &[], &left.names, removal, Udev::find());
        }
    }
    Err(not_ours(control, name)?)
}

/// Returns the name of a device that is in use: the disk of `stack`, named `name`, or a partition. First waits for
/// up to [`PATIENCE`] until none is in use, because udev may have a device open for a moment.
fn in_use(control: &Control, stack: &Stack, name: &str) -> Result<Option<String>> {
    let end = Instant::now() + PATIENCE;
    let mut used = stack.in_use().map(|state| state.name.clone());
    while used.is_some() && Instant::now() < end {
        interrupt::check()?;
        sleep(Duration::from_millis(50));
        let now = Stack::among(&control.states()?, name);
        let now = now.as_ref().and_then(Stack::in_use);
        used = now.map(|state| state.name.clone());
    }
    Ok(used)
}

/// Returns the error that says why there is no stack `name`.
pub(crate) fn not_ours(control: &Control, name: &str) -> Result<anyhow::Error> {
    let message = match control.state(name)? {
        Some(state) if part(&state.uuid).is_some() => {
            let stack = part(&state.uuid).map_or("", |(_, stack)| stack);
            format!("device {name} is a part of stack {stack}: give that name")
        }
        Some(state) => {
            let uuid = match state.uuid.as_str() {
                "" => "it has no UUID".to_owned(),
                uuid => format!("its UUID is {uuid}"),
            };
            format!("device {name} was not set up by obdsetup: {uuid}; see dmsetup(8)")
        }
        None => format!("no stack {name} is set up; `obdsetup list' shows those that are"),
    };
    Ok(Failure::error(exit::DEVICE, message))
}
