// SPDX-License-Identifier: GPL-2.0

//! Safe abstractions over device-mapper.
//!
//! A target type implements [`Target`]; a [`Registration`] registers it with device-mapper. Then:
//!
//! ```text
//! table line -> Target::new(Setup, Args)         process context, may sleep and allocate
//! bio        -> Target::map(Bio) -> Mapped       must not block; on several CPUs at once
//!                 Bio::remap                     device-mapper submits it
//!                 Bio::zero, end, refuse         ended immediately
//!                 Bio::begin -> Io               the target processes it:
//!                   Io::attach -> read -> defer -> … -> Io::end
//! page       -> Target::DAX -> Memory            a file system maps it; must not sleep
//! ```
//!
//! A [`Bio`] or an [`Io`] owns an I/O that hasn't ended. Each of their final methods takes it by
//! value, so an I/O ends once. An [`Io`] that is dropped ends with an error.
//!
//! Devices belong to the table, not to the target, so they cannot outlive the table. A target
//! refers to them by [`DeviceId`]. Device-mapper destroys a table only when the table has no I/O
//! left, so a target outlives its I/O. [`Io::end`] takes the [`Io`], and with it all references to
//! the target that were borrowed from it. A step must drop everything else that it owns before it
//! ends the I/O. Before a target is freed, its work items are cancelled and waited for. Unloading
//! the module waits for tasks that are still in the module's code ([`LastOut`]).
//!
//! C header: `include/linux/device-mapper.h`.

use kernel::prelude::*;

mod alert;
mod args;
mod bio;
mod dax;
mod device;
mod io;
mod meta;
mod setup;
mod status;
mod target;

pub(crate) use args::{blob_bytes, number, option_count, put_blob, Args, UNKNOWN_OPTION};
pub(crate) use bio::{Bio, Mapped};
pub(crate) use dax::{Claims, Dax, Memory, PAGE_SECTORS};
pub(crate) use device::{Device, DeviceId};
pub(crate) use io::{frame_size, Io, IoQueue, Spares};
pub(crate) use meta::MetaReader;
use setup::DeviceName;
pub(crate) use setup::{Failure, Setup};
pub(crate) use status::Emit;
pub(crate) use target::{Deferred, Limits, Message, Registration, Target};

/// Lets other tasks run. Called in process context, without locks.
pub(crate) fn cond_resched() {
    // SAFETY: Callers are in process context, without locks.
    unsafe { crate::sys::obd_cond_resched() }
}

/// When dropped, waits until no task is in the module's code any more. Must be dropped last.
///
/// If the lower device completes a read in a task, [`Io`]'s completion function runs in that task.
/// The function ends the I/O or hands it to a worker. From then on, the mapped device may be
/// removed, and the module unloaded, even if the task has been preempted before it returns from the
/// function.
pub(crate) struct LastOut;

impl Drop for LastOut {
    fn drop(&mut self) {
        // SAFETY: Modules are unloaded in process context, without locks.
        unsafe { crate::sys::obd_synchronize_rcu_tasks() }
    }
}

/// Checks that the current task has no fatal signal pending.
///
/// # Errors
///
/// [`EINTR`] if it has one.
pub(crate) fn check_killed() -> Result<(), Failure> {
    // SAFETY: This only reads the state of the current task.
    if unsafe { crate::sys::obd_fatal_signal_pending() } {
        return Err(Failure::new(c"Interrupted", EINTR));
    }
    Ok(())
}
