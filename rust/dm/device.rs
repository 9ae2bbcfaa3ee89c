// SPDX-License-Identifier: GPL-2.0

//! The lower devices of a target.

use core::ptr::NonNull;

use crate::sys;

/// Identifies a device of a target. The first device that the constructor opened is 0.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct DeviceId(pub(super) u8);

impl DeviceId {
    /// Returns the ID of the device that the constructor opened as its `nth`, counted from 0.
    pub(crate) const fn nth(nth: u8) -> Self {
        Self(nth)
    }
}

/// A block device that a table holds open for reading.
///
/// # Invariants
///
/// `target` is valid. `dev` was got for it with `dm_get_device` and wasn't put yet. `bdev` is the
/// block device of `dev` during that time.
pub(crate) struct Device {
    target: NonNull<sys::dm_target>,
    dev: NonNull<sys::dm_dev>,
    /// A copy of the pointer in `dev`, so that remapping a bio needs one memory access less.
    bdev: *mut sys::block_device,
    /// How many sectors the target uses, counted from the first one.
    used: u64,
}

// SAFETY: A device may be used and put from any thread.
unsafe impl Send for Device {}
// SAFETY: Nothing is modified through a shared reference.
unsafe impl Sync for Device {}

impl Device {
    /// Takes over a device from `dm_get_device`.
    ///
    /// # Safety
    ///
    /// `dev` was got for `target`, and no one else puts it. `target` outlives the result.
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

    /// Returns the block device.
    pub(crate) fn bdev(&self) -> *mut sys::block_device {
        self.bdev
    }

    /// Returns device-mapper's structure for the device.
    pub(super) fn as_ptr(&self) -> *mut sys::dm_dev {
        self.dev.as_ptr()
    }

    /// Returns the number of the device as `major:minor`, as in a table line.
    pub(crate) fn name(&self) -> &str {
        // SAFETY: By the type invariant the device is valid; its name doesn't change.
        let name = unsafe { &(*self.dev.as_ptr()).name };
        let end = name.iter().position(|&c| c == 0).unwrap_or(name.len());
        name.get(..end)
            .and_then(|name| core::str::from_utf8(name).ok())
            .unwrap_or("-")
    }

    /// Returns the size in sectors, without a partial logical block at the end.
    pub(crate) fn sectors(&self) -> u64 {
        // SAFETY: By the type invariant the device is open.
        let sectors = unsafe { sys::obd_bdev_nr_sectors(self.bdev()) };
        // A logical block size is a power of two, and at least 512.
        sectors & !(u64::from(self.logical_block_size() / 512) - 1)
    }

    /// Returns whether I/O of the device may wait for another device of this module, now or after
    /// the device gets another table: `true` for mapped devices, and for others that pass bios on.
    ///
    /// Returns `false` for devices with request queues. Below these is hardware, a server, or a
    /// file (loop, nbd, ublk). The server or file may use a device of this module, too. But these
    /// drivers have no rescuer thread, so nothing can rely on them when memory is short. The
    /// kernel's own storage targets (nvmet behind nvme-loop, LIO) do have a rescuer thread. So a
    /// zfile device behind such a target on the same host must not be below another zfile device.
    pub(super) fn may_stack(&self) -> bool {
        // SAFETY: By the type invariant the device is open.
        unsafe { sys::obd_bdev_may_stack(self.bdev()) }
    }

    /// Records that the target uses only the first `bytes` bytes of the device.
    pub(super) fn set_used(&mut self, bytes: u64) {
        self.used = bytes.div_ceil(512);
    }

    /// Returns how many sectors the target uses, counted from the first one, rounded up to blocks
    /// of `block` bytes, or down if the device ends before. `block` is a power of two: the largest
    /// logical block size of all lower devices. An lsmt device has this block size, too, and
    /// device-mapper refuses a table whose ranges are not multiples of the block size.
    pub(super) fn used(&self, block: u32) -> u64 {
        let block = u64::from(block / 512).max(1);
        let whole = self.sectors() & !(block - 1);
        self.used.next_multiple_of(block).min(whole)
    }

    /// Returns the size in bytes.
    pub(crate) fn size(&self) -> u64 {
        // No overflow: the block layer bounds sizes to 2^63 - 1 bytes.
        self.sectors() * 512
    }

    /// Returns the length of a logical block in bytes. Reads are whole blocks.
    pub(crate) fn logical_block_size(&self) -> u32 {
        // SAFETY: By the type invariant the device is open.
        unsafe { sys::obd_bdev_logical_block_size(self.bdev()) }
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        // SAFETY: By the type invariant it was got for this target and wasn't put yet.
        unsafe { sys::dm_put_device(self.target.as_ptr(), self.dev.as_ptr()) };
    }
}
