// SPDX-License-Identifier: GPL-2.0

//! Device-mapper devices and what is below them.
//!
//! - [`plan`]: which devices a stack of layers takes, and their tables. Pure.
//! - [`backing`]: files as loop devices.
//! - [`control`]: making, finding and removing devices, with dmsetup(8).

pub(crate) mod backing;
pub(crate) mod control;
pub(crate) mod plan;

pub(crate) use control::{Control, DmFailure};
pub(crate) use plan::Plan;

/// The node of device `name`.
pub(crate) fn node(name: &str) -> std::path::PathBuf {
    std::path::Path::new("/dev/mapper").join(name)
}
