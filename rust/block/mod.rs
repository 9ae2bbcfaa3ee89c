// SPDX-License-Identifier: GPL-2.0

//! Safe abstractions over bios, their pages, I/O buffers and reads of metadata.
//!
//! - [`Status`]: how an I/O ended, `blk_status_t`.
//! - [`Pages`], [`Dest`]: the memory that a read fills, which user space may see and change.
//! - [`Buffer`]: memory for a lower read.
//! - [`Lock`]: a spinlock that interrupt handlers may take.
//! - [`MetaReader`]: a part of a block device, read in process context.
//! - [`WorkQueue`]: a workqueue of our own.
//!
//! C headers: `include/linux/bio.h`, `include/linux/blk_types.h`.

mod buffer;
mod lock;
mod meta;
mod pages;
mod status;
mod workqueue;

pub(crate) use buffer::Buffer;
pub(crate) use lock::Lock;
pub(crate) use meta::MetaReader;
pub(crate) use pages::{Dest, Pages};
pub(crate) use status::Status;
pub(crate) use workqueue::WorkQueue;
