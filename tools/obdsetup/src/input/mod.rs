// SPDX-License-Identifier: GPL-2.0

//! What is read.
//!
//! - [`kind`]: what a file is, by its content.
//! - [`layer_name`]: a layer's name on the command line. [`layers`] opens the layers of a stack, [`config`] reads
//!   the list of them that containerd's snapshotter writes, [`chain`] checks whether they fit on each other.
//! - [`archive`]: tars, packed or not.
//! - [`qemu`]: disk images of virtual machines. [`partitions`] and [`journal`] look into a disk.

pub(crate) mod archive;
pub(crate) mod chain;
pub(crate) mod config;
pub(crate) mod journal;
pub(crate) mod kind;
pub(crate) mod layer_name;
pub(crate) mod layers;
pub(crate) mod partitions;
pub(crate) mod qemu;
