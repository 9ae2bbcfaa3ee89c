// SPDX-License-Identifier: GPL-2.0

//! Writes layers, disk images and directories.
//!
//! - [`output`]: a file that gets its name only when it is complete; [`made`]: such a directory.
//! - [`layer_args`]: arguments of all commands that make a layer. [`layer_out`] writes the layer.
//! - [`mkfs`]: makes a file system from a directory or a tar.
//! - [`image_layer`]: makes a layer from a disk image. [`raw_out`] writes the disk of layers.

pub(crate) mod image_layer;
pub(crate) mod layer_args;
pub(crate) mod layer_out;
pub(crate) mod made;
pub(crate) mod mkfs;
pub(crate) mod output;
pub(crate) mod raw_out;
