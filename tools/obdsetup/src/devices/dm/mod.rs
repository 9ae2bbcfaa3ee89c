// SPDX-License-Identifier: GPL-2.0

//! Device-mapper devices and what is below them.
//!
//! - [`plan`]: which devices a stack of layers needs, and their tables. Has no side effects.
//! - [`backing`]: attaches files to loop devices.
//! - [`access`]: checks whether this process may use device-mapper.
//! - [`control`]: gets the state of devices, with dmsetup(8).
//! - [`inspect`]: gets the state of many devices at once.
//! - [`stack`]: finds the devices of a stack.
//! - [`setup`]: makes and removes the devices of a stack.
//! - [`share`]: finds and holds shared devices.
//! - [`identity`]: names and UUIDs of devices, and the keys of layers.
//! - [`system`]: block devices in sysfs.
//! - [`udev`]: waits for udev.
//! - [`lock`]: lets only one obdsetup at a time work on a stack.

mod access;
pub(crate) mod backing;
pub(crate) mod control;
pub(crate) mod identity;
pub(crate) mod inspect;
pub(crate) mod lock;
pub(crate) mod plan;
pub(crate) mod setup;
pub(crate) mod share;
pub(crate) mod stack;
pub(crate) mod system;
pub(crate) mod udev;

pub(crate) use control::Control;
pub(crate) use plan::Plan;
pub(crate) use stack::Stack;

/// How long a half-built stack, or a device without a table, must stay unchanged before it counts as left by
/// an obdsetup that was killed. Locks don't tell, because an obdsetup that has another `/run`, for example in
/// a container, may be making it.
pub(crate) const QUIET: std::time::Duration = std::time::Duration::from_secs(3);

/// Returns the path of the node of device `name`.
pub(crate) fn node(name: &str) -> std::path::PathBuf {
    std::path::Path::new("/dev/mapper").join(name)
}

/// Removes what the note of `lock` describes: the things that a holder of the lock has left because it was
/// killed.
pub(crate) fn clear_left(lock: &lock::Lock) {
    udev::clear_left(lock);
    backing::clear_left(lock);
}
