// SPDX-License-Identifier: GPL-2.0

//! What is made.
//!
//! - [`output`]: a file that gets its name only when it is complete; [`made`], a directory.
//! - [`layer_args`]: arguments of all commands that make a layer. [`layer_out`] writes the layer.
//! - [`mkfs`]: makes a file system of a directory or a tar.
//! - [`image_layer`]: makes a layer of a disk image. [`raw_out`] makes a disk image of layers.

pub(crate) mod image_layer;
pub(crate) mod layer_args;
pub(crate) mod layer_out;
pub(crate) mod made;
pub(crate) mod mkfs;
pub(crate) mod output;
pub(crate) mod raw_out;
