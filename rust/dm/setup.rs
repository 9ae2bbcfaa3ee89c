// SPDX-License-Identifier: GPL-2.0

//! Constructs a target from a table line.

use core::ptr::NonNull;

use kernel::alloc::AllocError;
use kernel::prelude::*;
use kernel::sync::Arc;

use super::{Device, DeviceId};
use crate::block::Queue;
use crate::format;
use crate::sys;

/// The reason why a table line or a message is refused: a short phrase, the error number that the
/// caller gets, and, if the image is the reason, what was found in it.
#[derive(Clone, Copy)]
pub(crate) struct Failure {
    pub(super) phrase: &'static CStr,
    pub(super) error: Error,
    found: Option<format::Error>,
}

impl Failure {
    /// Makes a failure.
    pub(crate) const fn new(phrase: &'static CStr, error: Error) -> Self {
        Self {
            phrase,
            error,
            found: None,
        }
    }

    /// Logs why a message to the device `name` is refused.
    pub(super) fn tell(&self, name: &str) {
        pr_err!("{name}: {}\n", self.phrase.to_str().unwrap_or("-"));
    }

    /// Logs what was found in the image of the device `name`, if the image is the reason.
    pub(super) fn explain(&self, name: &str) {
        if let Some(found) = &self.found {
            pr_err!(
                "{name}: {} at byte {}: found {}, expected {}\n",
                found.fault.field(),
                found.offset,
                found.found,
                found.fault.expected()
            );
        }
    }
}

impl From<format::Error> for Failure {
    fn from(error: format::Error) -> Self {
        Self {
            phrase: error.fault.phrase(),
            error: EINVAL,
            found: Some(error),
        }
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        if error == ENOMEM {
            AllocError.into()
        } else {
            Self::new(c"Internal error", error)
        }
    }
}

impl From<AllocError> for Failure {
    fn from(_: AllocError) -> Self {
        Self::new(c"Cannot allocate memory", ENOMEM)
    }
}

/// The number of a mapped device as text.
pub(crate) struct DeviceName([u8; 16]);

impl DeviceName {
    /// Returns the number of the mapped device of target `ti`.
    ///
    /// # Safety
    ///
    /// `ti` is valid.
    pub(super) unsafe fn of(ti: *mut sys::dm_target) -> Self {
        let mut name = Self([0; 16]);
        // SAFETY: The caller's promise.
        let table = unsafe { (*ti).table };
        // SAFETY: A target's table is valid.
        let raw = unsafe { sys::dm_table_device_name(table) };
        // SAFETY: A mapped device's name is a C string, which doesn't change.
        let raw = unsafe { CStr::from_char_ptr(raw) }.to_bytes();
        // The last byte stays NUL.
        let len = raw.len().min(name.0.len() - 1);
        if let (Some(to), Some(from)) = (name.0.get_mut(..len), raw.get(..len)) {
            to.copy_from_slice(from);
        }
        name
    }

    /// Returns the number as `major:minor`.
    pub(crate) fn as_c_str(&self) -> &CStr {
        CStr::from_bytes_until_nul(&self.0).unwrap_or(c"?")
    }

    /// Returns the number as `major:minor`.
    pub(crate) fn as_str(&self) -> &str {
        self.as_c_str().to_str().unwrap_or("?")
    }
}

/// Returns the name of the target type of `ti`.
///
/// # Safety
///
/// `ti` is valid.
pub(super) unsafe fn type_name(ti: *mut sys::dm_target) -> &'static CStr {
    // SAFETY: The caller's promise.
    let target_type = unsafe { (*ti).type_ };
    // SAFETY: A target's type is valid.
    let name = unsafe { (*target_type).name };
    // SAFETY: A type's name is a static string.
    unsafe { CStr::from_char_ptr(name) }
}

/// A target that is being constructed.
///
/// # Invariants
///
/// `target` is a target whose constructor is running.
pub(crate) struct Setup<'a, C> {
    pub(super) target: NonNull<sys::dm_target>,
    pub(super) devices: KVec<Device>,
    pub(super) context: &'a Arc<C>,
}

impl<'a, C> Setup<'a, C> {
    /// Returns the data that all targets of the type share.
    pub(crate) fn context(&self) -> Arc<C> {
        self.context.clone()
    }

    /// Returns the name of the target type in the table line.
    pub(crate) fn type_name(&self) -> &'static CStr {
        // SAFETY: By the type invariant the target is valid.
        unsafe { type_name(self.target.as_ptr()) }
    }

    /// Returns the length of the target in sectors.
    pub(crate) fn len(&self) -> u64 {
        // SAFETY: By the type invariant the target is valid.
        unsafe { (*self.target.as_ptr()).len }
    }

    /// Returns the number of the mapped device, for messages.
    pub(crate) fn device_name(&self) -> DeviceName {
        // SAFETY: By the type invariant the target is valid.
        unsafe { DeviceName::of(self.target.as_ptr()) }
    }

    /// Returns an error if the table isn't loaded read-only.
    ///
    /// # Errors
    ///
    /// [`EROFS`].
    pub(crate) fn require_read_only(&self) -> Result<(), Failure> {
        // SAFETY: By the type invariant the target is valid.
        let table = unsafe { (*self.target.as_ptr()).table };
        // SAFETY: A target's table is valid.
        let mode = unsafe { sys::dm_table_get_mode(table) };
        if mode & sys::OBD_BLK_OPEN_WRITE != 0 {
            return Err(Failure::new(c"Device must be readonly", EROFS));
        }
        Ok(())
    }

    /// Opens the device with the path or number `path` for reading.
    ///
    /// # Errors
    ///
    /// The error that opening it returns, or [`E2BIG`] if the target has too many devices.
    pub(crate) fn open(&mut self, path: &CStr) -> Result<DeviceId, Failure> {
        let id = DeviceId(
            u8::try_from(self.devices.len())
                .map_err(|_| Failure::new(c"Too many devices", E2BIG))?,
        );
        self.devices.reserve(1, GFP_KERNEL)?;
        let mut dev = core::ptr::null_mut();
        // SAFETY: By the type invariant the target's constructor is running.
        let ret = unsafe {
            sys::dm_get_device(
                self.target.as_ptr(),
                path.as_char_ptr(),
                sys::OBD_BLK_OPEN_READ,
                &mut dev,
            )
        };
        let opened = kernel::error::to_result(ret).and(NonNull::new(dev).ok_or(ENODEV));
        let dev = opened.map_err(|error| Failure::new(c"Device lookup failed", error))?;
        // SAFETY: The device was just got for the target. All devices are dropped before the target
        // is freed: when the constructor fails, or by the destructor.
        let device = unsafe { Device::new(self.target, dev) };
        self.devices.push(device, GFP_KERNEL)?;
        Ok(id)
    }

    /// Returns a device that was opened.
    pub(crate) fn device(&self, id: DeviceId) -> Result<&Device, Failure> {
        let device = self.devices.get(usize::from(id.0));
        device.ok_or(Failure::new(c"Internal error", EINVAL))
    }

    /// Returns the queue for the target's workers: `shared`, or a new one if the target's I/O may
    /// wait for another device of this module.
    ///
    /// # Errors
    ///
    /// [`ENOMEM`].
    pub(super) fn queue(&self, shared: &Arc<Queue>) -> Result<Arc<Queue>> {
        if !self.devices.iter().any(Device::may_stack) {
            return Ok(shared.clone());
        }
        let name =
            kernel::str::CString::try_from_fmt(fmt!("overlaybd/{}", self.device_name().as_str()))?;
        Queue::new(&name)
    }

    /// Records that the target uses only the first `bytes` bytes of a device.
    pub(crate) fn set_used(&mut self, id: DeviceId, bytes: u64) {
        if let Some(device) = self.devices.get_mut(usize::from(id.0)) {
            device.set_used(bytes);
        }
    }
}
