// SPDX-License-Identifier: GPL-2.0

//! Safe abstractions over the pages of bios, memory, counters, shrinkers and workqueues.
//!
//! - [`Status`]: the status of an I/O that has ended, `blk_status_t`.
//! - [`Pages`], [`Dest`]: the memory that a read fills, which user space may read and change.
//! - [`Buffer`]: memory for a lower read.
//! - [`Data`]: memory of a cached block.
//! - [`Pool`]: free pages for buffers and cached blocks.
//! - [`memory`]: the flags of memory allocations.
//! - [`Lock`]: a spinlock that interrupt handlers may take, held with interrupts off.
//! - [`Counter`]: a counter with a number for each CPU.
//! - [`Shrinker`]: frees memory of a cache when memory is short; [`quota`]: the memory that the
//!   cache uses, and its limit.
//! - [`Tidy`]: a function that runs every few seconds.
//! - [`Workers`]: the workers of a device, one for each CPU; [`Queue`]: the workqueue on which
//!   workers of many devices run; [`order`]: the order in which workers take jobs.
//!
//! C headers: `include/linux/bio.h`, `include/linux/blk_types.h`.

mod buffer;
mod counter;
mod data;
pub(crate) mod memory;
mod order;
mod pages;
mod piece;
mod pool;
pub(crate) mod quota;
mod shrinker;
mod status;
mod tidy;
mod workers;

pub(crate) use buffer::Buffer;
pub(crate) use counter::Counter;
pub(crate) use data::Data;
pub(crate) use pages::{Dest, Pages};
pub(crate) use pool::Pool;
pub(crate) use shrinker::{Shrink, Shrinker};
pub(crate) use status::Status;
pub(crate) use tidy::{Tidier, Tidy};
pub(crate) use workers::{Job, Queue, Workers};

pub(crate) use crate::compat::SpinLockIrq as Lock;
