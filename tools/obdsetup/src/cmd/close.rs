// SPDX-License-Identifier: GPL-2.0

//! `obdsetup close`.

use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::Result;

use crate::dm::control::State;
use crate::dm::plan::check_name;
use crate::dm::Control;
use crate::exit::{self, Failure};

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
    let devices = control.stack(&args.name)?;
    if devices.is_empty() {
        return Err(not_ours(&control, &args.name)?);
    }
    for device in devices {
        if !args.deferred && device.name == args.name && is_in_use(&control, device.clone())? {
            return Err(Failure::error(
                exit::BUSY,
                format!(
                    "device {} is in use; --deferred removes it later",
                    args.name
                ),
            ));
        }
        control.remove(&device.name, args.deferred)?;
    }
    Ok(())
}

/// Whether `device` is in use, and stays so: udev may look at it just now.
fn is_in_use(control: &Control, mut device: State) -> Result<bool> {
    let end = Instant::now() + PATIENCE;
    while device.open_count > 0 {
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
        Some(state) => format!(
            "device {name} is not an OverlayBD device: UUID `{}`",
            state.uuid
        ),
        None => format!("device {name} does not exist"),
    };
    Ok(Failure::error(exit::DEVICE, message))
}
