// SPDX-License-Identifier: GPL-2.0

//! Safe abstractions over device-mapper.
//!
//! A target implements [`Target`]; a [`Registration`] makes it known. Then:
//!
//! ```text
//! table line -> Target::new(Setup, Args)         process context, may sleep and allocate
//! bio        -> Target::map(Bio) -> Mapped       never blocks; several at once
//!                 Bio::remap                     device-mapper sends it on
//!                 Bio::zero, refuse              ended
//!                 Bio::begin -> Io               the target works on it:
//!                   Io::attach -> read -> defer -> … -> Io::end
//! page       -> Target::DAX -> Memory            never blocks; for file systems that map it
//! ```
//!
//! Who has a [`Bio`] or an [`Io`] owns an I/O that hasn't ended. Each of their final methods takes
//! it by value, so an I/O ends once; an [`Io`] that is dropped ends with an error.
//!
//! Devices belong to the table, not to the target, which names them by [`DeviceId`]: they cannot
//! outlive the table. Device-mapper destroys a table only when no I/O of it is left, so a target
//! outlives its I/O; [`Io::end`] takes the I/O with every reference to the target. What a step owns
//! beside the I/O it gives back before that. The works of a target are cancelled and waited for
//! before the target may go, and the module's end waits for those that are still in its code
//! ([`LastOut`]).
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

/// Lets others run; in process context.
pub(crate) fn cond_resched() {
    // SAFETY: Callers are in process context, without locks.
    unsafe { crate::sys::obd_cond_resched() }
}

/// Dropped when all else of the module is gone, waits until no task is in its code any more.
///
/// The end of a lower read runs in a task where the lower device ends it in one. Such a task may be
/// preempted on its way back from what has ended the I/O, or has handed it to a worker, while the
/// device is removed.
pub(crate) struct LastOut;

impl Drop for LastOut {
    fn drop(&mut self) {
        // SAFETY: Modules are unloaded in process context, without locks.
        unsafe { crate::sys::obd_synchronize_rcu_tasks() }
    }
}

/// Fails if the current task was killed.
pub(crate) fn check_killed() -> Result<(), Failure> {
    // SAFETY: Looks at the current task only.
    if unsafe { crate::sys::obd_fatal_signal_pending() } {
        return Err(Failure::new(c"Interrupted", EINTR));
    }
    Ok(())
}
