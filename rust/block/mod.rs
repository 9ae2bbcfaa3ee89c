// SPDX-License-Identifier: GPL-2.0

//! Safe abstractions over bios, their pages and I/O buffers.
//!
//! - [`Status`]: how an I/O ended, `blk_status_t`.
//! - [`Pages`], [`Dest`]: the memory that a read fills, which user space may see and change.
//! - [`Buffer`]: memory for a lower read.
//! - [`memory`]: how memory is asked for.
//! - [`Lock`]: a spinlock that interrupt handlers may take, held with interrupts off.
//! - [`Counter`]: a counter for each CPU.
//! - [`Shrinker`]: a cache that the kernel can make smaller.
//! - [`Workers`]: workers of a device, on all CPUs; [`Queue`]: what those of many devices share.
//!
//! C headers: `include/linux/bio.h`, `include/linux/blk_types.h`.

mod buffer;
mod counter;
pub(crate) mod memory;
mod pages;
mod shrinker;
mod status;
mod workers;

pub(crate) use buffer::Buffer;
pub(crate) use counter::Counter;
pub(crate) use pages::{Dest, Pages};
pub(crate) use shrinker::{Shrink, Shrinker};
pub(crate) use status::Status;
pub(crate) use workers::{Job, Queue, Workers};

pub(crate) use crate::compat::SpinLockIrq as Lock;

/// Whether interrupts are off, so that what takes longer is better left to a worker.
pub(crate) fn interrupts_off() -> bool {
    // SAFETY: Only looks at the state of this CPU.
    unsafe { crate::sys::obd_in_interrupt_off() }
}
