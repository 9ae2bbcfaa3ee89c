// SPDX-License-Identifier: GPL-2.0

//! Device-mapper devices and what is below them.
//!
//! - [`plan`]: which devices a stack of layers takes, and their tables. Pure.
//! - [`backing`]: files as loop devices.
//! - [`control`]: device-mapper's ioctls.
//! - [`node`]: `/dev/mapper` where no udev looks after it.

pub(crate) mod backing;
pub(crate) mod control;
pub(crate) mod node;
pub(crate) mod plan;

pub(crate) use control::{Control, DmFailure};
pub(crate) use plan::Plan;
