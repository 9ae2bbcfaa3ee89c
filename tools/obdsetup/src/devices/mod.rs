// SPDX-License-Identifier: GPL-2.0

//! Stacks of layers as block devices.
//!
//! - [`dm`]: makes, finds and removes the devices of a stack.
//! - [`store`]: stores of changes, which keep what is written to a disk.
//! - [`overview`]: the state of all stacks, for `list` and `status`.
//! - [`tab`]: the stacks to set up at boot.

pub(crate) mod dm;
pub(crate) mod overview;
pub(crate) mod store;
pub(crate) mod tab;
