// SPDX-License-Identifier: GPL-2.0

//! `obdsetup close`.

use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::Result;

use crate::dm::control::State;
use crate::dm::lock::Lock;
use crate::dm::plan::check_name;
use crate::dm::setup::{self, Removal};
use crate::dm::udev::{self, Udev};
use crate::dm::{Control, Stack};
use crate::exit::{self, Failure};
use crate::interrupt;

/// How long somebody may have a device open who only looks at what is new.
const PATIENCE: Duration = Duration::from_secs(2);

/// Arguments of `close`.
#[derive(clap::Args)]
#[command(after_help = "Examples:
  obdsetup close app
  obdsetup close --deferred app      as soon as nobody uses it

Takes the devices below down too; their loop devices go with them.")]
pub(crate) struct Args {
    /// Name that was given to `open`
    name: String,

    /// Do not fail where the device is in use: it goes when it no longer is
    #[arg(long)]
    deferred: bool,
}

/// Runs `close`.
pub(crate) fn run(args: &Args) -> Result<()> {
    check_name(&args.name)?;
    let control = Control::open()?;
    let Some(found) = Stack::find(&control, &args.name)? else {
        return Err(not_ours(&control, &args.name)?);
    };
    let lock = Lock::take(&found.name)?;
    udev::clear_left(&lock);
    // Another may have been at work on it.
    let Some(stack) = Stack::find(&control, &args.name)? else {
        return Err(not_ours(&control, &args.name)?);
    };
    if stack.is_half_built() {
        crate::tell(&format!(
            "device {} was left half built by an obdsetup that was killed: removing {}",
            stack.name,
            stack.names().join(", ")
        ));
    }
    if let Some(top) = stack.top().filter(|_| !args.deferred) {
        if is_in_use(&control, top.clone())? {
            let message = format!("device {} is in use; --deferred removes it later", top.name);
            return Err(Failure::error(exit::BUSY, message));
        }
    }
    let removal = Removal {
        deferred: args.deferred,
        despite_signals: false,
    };
    setup::remove(&control, &lock, &stack.names(), removal, Udev::find())
}

/// Whether `device` is in use, and stays so: udev may look at it just now.
fn is_in_use(control: &Control, mut device: State) -> Result<bool> {
    let end = Instant::now() + PATIENCE;
    while device.open_count > 0 {
        interrupt::check()?;
        if Instant::now() >= end {
            return Ok(true);
        }
        sleep(Duration::from_millis(50));
        match control.state(&device.name)? {
            Some(now) => device = now,
            None => break,
        }
    }
    Ok(false)
}

/// Why there is no stack `name`.
pub(crate) fn not_ours(control: &Control, name: &str) -> Result<anyhow::Error> {
    let message = match control.state(name)? {
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
