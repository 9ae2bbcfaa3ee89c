// SPDX-License-Identifier: GPL-2.0

//! Device-mapper devices and what is below them.
//!
//! - [`plan`]: which devices a stack of layers takes, and their tables. Pure.
//! - [`backing`]: files as loop devices.
//! - [`access`]: whether this process may talk to device-mapper.
//! - [`control`]: looking at devices, with dmsetup(8).
//! - [`inspect`]: reading the state of many devices at once.
//! - [`stack`]: which devices belong together.
//! - [`setup`]: making and removing the devices of a stack.
//! - [`share`]: devices of layers that several stacks use.
//! - [`udev`]: waiting for udev.
//! - [`lock`]: one obdsetup at a time for a stack.

mod access;
pub(crate) mod backing;
pub(crate) mod control;
pub(crate) mod inspect;
pub(crate) mod lock;
pub(crate) mod plan;
pub(crate) mod setup;
pub(crate) mod share;
pub(crate) mod stack;
pub(crate) mod udev;

pub(crate) use control::Control;
pub(crate) use plan::Plan;
pub(crate) use stack::Stack;

/// For how long nothing may happen to half a stack, or to a device without a table, before it is taken for
/// what a kill has left: an obdsetup that sees another `/run`, as one in a container, may just make it.
pub(crate) const QUIET: std::time::Duration = std::time::Duration::from_secs(3);

/// The node of device `name`.
pub(crate) fn node(name: &str) -> std::path::PathBuf {
    std::path::Path::new("/dev/mapper").join(name)
}

/// Clears what the note of `lock` tells of: what a holder has left who was killed.
pub(crate) fn clear_left(lock: &lock::Lock) {
    udev::clear_left(lock);
    backing::clear_left(lock);
}
