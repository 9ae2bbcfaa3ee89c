// SPDX-License-Identifier: GPL-2.0

//! The devices below a target.

use core::ptr::NonNull;

use crate::sys;

/// Names a device of a target: the first that its constructor opened is 0.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct DeviceId(pub(super) u8);

impl DeviceId {
    /// The device that the constructor opened as its `nth`, from 0.
    pub(crate) const fn nth(nth: u8) -> Self {
        Self(nth)
    }
}

/// A block device that a table holds open for reading.
///
/// # Invariants
///
/// `target` is valid, and `dev` was got for it with `dm_get_device` and wasn't put. `bdev` is the
/// block device of `dev`, for as long.
pub(crate) struct Device {
    target: NonNull<sys::dm_target>,
    dev: NonNull<sys::dm_dev>,
    /// Here as well, so that a remapped bio waits for memory once less.
    bdev: *mut sys::block_device,
    /// Sectors of it that the target uses, from the first.
    used: u64,
}

// SAFETY: A device may be used and put from any thread.
unsafe impl Send for Device {}
// SAFETY: Nothing is changed through a shared reference.
unsafe impl Sync for Device {}

impl Device {
    /// Takes over a device that `dm_get_device` gave.
    ///
    /// # Safety
    ///
    /// `dev` was got for `target` and is put by nobody else; `target` outlives the result.
    pub(super) unsafe fn new(target: NonNull<sys::dm_target>, dev: NonNull<sys::dm_dev>) -> Self {
        // SAFETY: By the safety requirement it is open.
        let bdev = unsafe { dev.as_ref() }.bdev;
        // INVARIANT: By the safety requirement; device-mapper doesn't change `bdev`.
        let mut device = Self {
            target,
            dev,
            bdev,
            used: 0,
        };
        device.used = device.sectors();
        device
    }

    /// The block device.
    pub(crate) fn bdev(&self) -> *mut sys::block_device {
        self.bdev
    }

    /// The device as device-mapper knows it.
    pub(super) fn as_ptr(&self) -> *mut sys::dm_dev {
        self.dev.as_ptr()
    }

    /// Its number as `major:minor`, what a table line names it by.
    pub(crate) fn name(&self) -> &str {
        // SAFETY: By the type invariant the device is valid; its name doesn't change.
        let name = unsafe { &(*self.dev.as_ptr()).name };
        let end = name.iter().position(|&c| c == 0).unwrap_or(name.len());
        name.get(..end)
            .and_then(|name| core::str::from_utf8(name).ok())
            .unwrap_or("-")
    }

    /// Size in sectors, whole blocks only.
    pub(crate) fn sectors(&self) -> u64 {
        // SAFETY: By the type invariant the device is open.
        let sectors = unsafe { sys::obd_bdev_nr_sectors(self.bdev()) };
        // A block size is a power of two of 512 at least.
        sectors & !(u64::from(self.logical_block_size() / 512) - 1)
    }

    /// Whether its I/O may wait for a device of this module, now or once it gets another table: it
    /// is a mapped device, or another one that passes bios on.
    ///
    /// Devices with request queues have hardware below them, or a server or a file (loop, nbd,
    /// ublk). Those may lie on one of ours, too, but have no thread in reserve themselves, so nothing
    /// can rely on them without memory. The kernel's own storage targets (nvmet behind nvme-loop,
    /// LIO) do have one: a zfile behind such a target on the same host must not be below another.
    pub(super) fn may_stack(&self) -> bool {
        // SAFETY: By the type invariant the device is open.
        unsafe { sys::obd_bdev_may_stack(self.bdev()) }
    }

    /// Says that the target uses the first `bytes` bytes only.
    pub(super) fn set_used(&mut self, bytes: u64) {
        self.used = bytes.div_ceil(512);
    }

    /// Sectors that the target uses, from the first, as whole blocks of `block` bytes, a power of
    /// two: a mapped device has the largest blocks of those below.
    pub(super) fn used(&self, block: u32) -> u64 {
        let block = u64::from(block / 512).max(1);
        let whole = self.sectors() & !(block - 1);
        self.used.next_multiple_of(block).min(whole)
    }

    /// Size in bytes.
    pub(crate) fn size(&self) -> u64 {
        // No overflow: the block layer bounds sizes to 2^63 - 1 bytes.
        self.sectors() * 512
    }

    /// Bytes in a block, the unit of reads.
    pub(crate) fn logical_block_size(&self) -> u32 {
        // SAFETY: By the type invariant the device is open.
        unsafe { sys::obd_bdev_logical_block_size(self.bdev()) }
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        // SAFETY: By the type invariant it was got for this target and wasn't put.
        unsafe { sys::dm_put_device(self.target.as_ptr(), self.dev.as_ptr()) };
    }
}
