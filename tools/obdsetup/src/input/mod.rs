// SPDX-License-Identifier: GPL-2.0

//! The inputs of the commands.
//!
//! - [`kind`]: detects the type of a file by its content.
//! - [`layer_name`]: a layer's name on the command line. [`layers`] opens the layers of a stack, [`config`] reads
//!   the list of layers that containerd's snapshotter writes, [`chain`] checks whether layers fit on each other.
//! - [`archive`]: tars, compressed or not.
//! - [`qemu`]: disk images of virtual machines. [`partitions`] reads the partitions of a disk, [`journal`] detects
//!   file systems that were not unmounted cleanly.

pub(crate) mod archive;
pub(crate) mod chain;
pub(crate) mod config;
pub(crate) mod journal;
pub(crate) mod kind;
pub(crate) mod layer_name;
pub(crate) mod layers;
pub(crate) mod partitions;
pub(crate) mod qemu;
