// SPDX-License-Identifier: GPL-2.0

//! Safe abstractions over bios, their pages and I/O buffers.
//!
//! - [`Status`]: how an I/O ended, `blk_status_t`.
//! - [`Pages`], [`Dest`]: the memory that a read fills, which user space may see and change.
//! - [`Buffer`]: memory for a lower read.
//! - [`Data`]: memory of a cached block.
//! - [`Pool`]: pages for both, which are used again.
//! - [`memory`]: how memory is asked for.
//! - [`Lock`]: a spinlock that interrupt handlers may take, held with interrupts off.
//! - [`Counter`]: a counter for each CPU.
//! - [`Shrinker`]: a cache that the kernel can make smaller; [`quota`]: how large it may be.
//! - [`Tidy`]: what is done from time to time.
//! - [`Workers`]: workers of a device, on all CPUs; [`Queue`]: what those of many devices share.
//!
//! C headers: `include/linux/bio.h`, `include/linux/blk_types.h`.

mod buffer;
mod counter;
mod data;
pub(crate) mod memory;
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
