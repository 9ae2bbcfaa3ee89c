// SPDX-License-Identifier: GPL-2.0

//! Target types and targets.
//!
//! C header: `include/linux/device-mapper.h`.

use core::marker::PhantomData;
use core::ptr::NonNull;

use kernel::error::to_result;
use kernel::ffi;
use kernel::prelude::*;
use kernel::sync::Arc;
use kernel::types::Opaque;

use super::alert::Alerts;
use super::dax::{self, Claim};
use super::setup::{type_name, DeviceName};
use super::{Args, Bio, Dax, Device, DeviceId, Emit, Failure, Mapped, Setup, Spares};
use crate::block::{Pool, Queue, Status, Workers};
use crate::sys;

/// A function that handles a message. Gets the words of the message; the first word is the
/// message's name. Returns an error if the message is refused.
pub(crate) type Message<T> = fn(&T, Args<'_>) -> Result<(), Failure>;

/// A read-only target.
pub(crate) trait Target: Send + Sync + Sized + 'static {
    /// Data that all targets of the type share.
    type Context: Send + Sync + 'static;

    /// Version of the target type. It changes with the arguments, messages and status of the
    /// targets.
    const VERSION: [u32; 3];
    /// Whether the target can map bios with `REQ_NOWAIT`.
    const NOWAIT: bool = false;
    /// Size of the per-bio data in bytes: [`frame_size`] for a [`Deferred`] target, otherwise 0.
    ///
    /// [`frame_size`]: super::frame_size
    const PER_BIO_DATA: usize = 0;
    /// Handles a message (`dmsetup message`); `None` if the target has no messages. Called in
    /// process context, while other CPUs may map bios.
    const MESSAGE: Option<Message<Self>> = None;
    /// Called when a read that the target has remapped ends with an error; `None` if the target
    /// doesn't remap reads. May be called in any context, on several CPUs at once. Not called for
    /// read-ahead, nor for errors that are caused by the request and not by the storage.
    const READ_FAILED: Option<fn(&Self)> = None;
    /// Name of the variable in the uevent for the first fault. Its value is the number of a corrupt
    /// block, or the error number of a failed read.
    const ALERT: &'static CStr;
    /// The functions for DAX; `None` for a target without DAX. A target with DAX is alone in its
    /// table, and no other target with DAX uses its devices (see [`Claim`]). The target must show
    /// each page of its devices at one place of the mapped device only.
    const DAX: Option<Dax<Self>> = None;

    /// Makes a target from the arguments of its table line. Called in process context. May sleep.
    ///
    /// # Errors
    ///
    /// The reason why the line is refused.
    fn new(setup: &mut Setup<'_, Self::Context>, args: Args<'_>) -> Result<Self, Failure>;

    /// Maps a bio. Must not block. Called on several CPUs at once.
    fn map<'a>(&self, bio: Bio<'a, Self>) -> Mapped<'a>;

    /// Writes the status: counters and state.
    fn info(&self, out: &mut Emit<'_>);

    /// Writes the arguments of the table line. `devices` are in the order in which they were
    /// opened.
    fn table(&self, devices: &[Device], out: &mut Emit<'_>);

    /// Writes the values that IMA measures, each as `,key=value`.
    fn ima(&self, devices: &[Device], out: &mut Emit<'_>);

    /// Adjusts the limits of the mapped device, which were computed from those of the lower
    /// devices.
    fn limits(&self, limits: &mut Limits<'_>);
}

/// A target that still processes bios after its map function has returned.
pub(crate) trait Deferred: Target {
    /// The target's own state of an I/O.
    type Request: Send;

    /// Returns the object that keeps the device's spare buffer.
    fn spares(&self) -> &Spares<Self>;

    /// Returns the pool that the other buffers come from and go back to.
    fn pool(&self) -> &Pool;
}

/// The limits of a device.
pub(crate) struct Limits<'a>(&'a mut sys::queue_limits);

impl Limits<'_> {
    /// Sets the logical block size to `bytes` bytes, and allows reads of any number of logical
    /// blocks from any block on, into memory that is aligned to `bytes`. Removes the limits on
    /// chunks and alignment: those of the lower devices don't apply, because the sectors of the
    /// mapped device are at other places on the lower devices.
    pub(crate) fn set_logical_block_size(&mut self, bytes: u32) {
        self.0.logical_block_size = bytes;
        self.0.dma_alignment = bytes - 1;
        self.0.chunk_sectors = 0;
        self.0.alignment_offset = 0;
        self.0.flags &= !sys::OBD_BLK_FLAG_MISALIGNED;
    }

    /// Sets the preferred sizes of reads in bytes: `block` is the smallest one, `optimal` a large
    /// one.
    pub(crate) fn set_preferred(&mut self, block: u32, optimal: u32) {
        self.0.physical_block_size = block;
        self.0.io_min = block;
        self.0.io_opt = optimal;
    }

    /// Says that the device doesn't support polling for completions.
    pub(crate) fn clear_poll(&mut self) {
        self.0.features &= !sys::OBD_BLK_FEAT_POLL;
    }
}

/// A target with its devices: what `ti->private` points to.
///
/// # Invariants
///
/// `devices` are in the order in which they were opened, that of their [`DeviceId`]s. `workers` is
/// set for targets with per-bio data, `claim` for targets with DAX.
pub(super) struct Live<T> {
    // Dropped first. Dropping it waits for workers that have ended their I/O and are about to
    // return.
    workers: Option<Pin<KBox<Workers>>>,
    // Dropped before the target. Dropping it waits for an event that is being sent.
    alerts: Pin<KBox<Alerts>>,
    // Dropped before `devices`, which it claims.
    claim: Option<Claim>,
    target: T,
    devices: KVec<Device>,
    begin: u64,
}

impl<T: Target> Live<T> {
    pub(super) fn target(&self) -> &T {
        &self.target
    }

    pub(super) fn device(&self, id: DeviceId) -> Option<&Device> {
        self.devices.get(usize::from(id.0))
    }

    /// Returns the workers for the I/Os of the target; `None` if it isn't a [`Deferred`] target.
    pub(super) fn workers(&self) -> Option<NonNull<Workers>> {
        self.workers.as_deref().map(NonNull::from)
    }

    /// Returns the object that reports the target's faults.
    pub(super) fn alerts(&self) -> &Alerts {
        &self.alerts
    }

    /// Returns the target's claim on its devices; `None` for a target without DAX.
    pub(super) fn claim(&self) -> Option<&Claim> {
        self.claim.as_ref()
    }

    /// Returns the first sector of the target in the mapped device.
    pub(super) fn begin(&self) -> u64 {
        self.begin
    }
}

/// Keeps a target type registered with device-mapper. Dropping it unregisters the type.
///
/// # Invariants
///
/// `raw` is registered, and is a field of this object, so that constructors find this object.
/// `queue` is set for targets with per-bio data.
#[pin_data(PinnedDrop)]
pub(crate) struct Registration<T: Target> {
    #[pin]
    raw: Opaque<sys::target_type>,
    context: Arc<T::Context>,
    queue: Option<Arc<Queue>>,
    _target: PhantomData<T>,
}

// SAFETY: A registration is only made and dropped; device-mapper synchronises its use of `raw`.
unsafe impl<T: Target> Send for Registration<T> {}
// SAFETY: As above; the context and the queue may be shared.
unsafe impl<T: Target> Sync for Registration<T> {}

impl<T: Target> Registration<T> {
    /// Registers target type `name`. A [`Deferred`] target needs `queue`. Its workers run on that
    /// queue, except those of a device that needs its own: see [`Setup::queue`].
    ///
    /// # Errors
    ///
    /// [`EEXIST`] if the name is taken.
    pub(crate) fn new(
        name: &'static CStr,
        module: &'static ThisModule,
        context: Arc<T::Context>,
        queue: Option<Arc<Queue>>,
    ) -> impl PinInit<Self, Error> {
        try_pin_init!(Self {
            context,
            queue,
            _target: PhantomData,
            // INVARIANT: Registered here, in place.
            raw <- Opaque::try_ffi_init(move |slot: *mut sys::target_type| {
                // SAFETY: `slot` is memory for a target type.
                unsafe { slot.write(Self::target_type(name, module)) };
                // SAFETY: The type is complete, and pinned until it is unregistered.
                to_result(unsafe { sys::dm_register_target(slot) })
            }),
        }? Error)
    }

    fn target_type(name: &'static CStr, module: &'static ThisModule) -> sys::target_type {
        let mut features = 0;
        if T::NOWAIT {
            features |= sys::DM_TARGET_NOWAIT;
        }
        if T::DAX.is_some() {
            features |= sys::DM_TARGET_SINGLETON;
        }
        sys::target_type {
            features: u64::from(features),
            name: name.as_char_ptr(),
            module: module.as_ptr(),
            version: T::VERSION,
            ctr: Some(Self::ctr),
            dtr: Some(Self::dtr),
            map: Some(Self::map),
            end_io: match T::READ_FAILED {
                Some(_) => Some(Self::end_io),
                None => None,
            },
            status: Some(Self::status),
            message: match T::MESSAGE {
                Some(_) => Some(Self::message),
                None => None,
            },
            preresume: match T::DAX {
                Some(_) => Some(Self::preresume),
                None => None,
            },
            iterate_devices: Some(Self::iterate_devices),
            io_hints: Some(Self::io_hints),
            direct_access: match T::DAX {
                Some(_) => Some(Self::direct_access),
                None => None,
            },
            dax_zero_page_range: match T::DAX {
                Some(_) => Some(Self::dax_zero_page_range),
                None => None,
            },
            ..Default::default()
        }
    }

    /// # Safety
    ///
    /// Called by device-mapper: `ti` is a new target of this type, and `argv` its arguments.
    unsafe extern "C" fn ctr(
        ti: *mut sys::dm_target,
        argc: ffi::c_uint,
        argv: *mut *mut ffi::c_char,
    ) -> ffi::c_int {
        // SAFETY: The caller's promise.
        match unsafe { Self::construct(ti, argc, argv) } {
            Ok(()) => 0,
            Err(failure) => {
                // SAFETY: The target is valid, and so is its table, whose device has a name.
                let name = unsafe { DeviceName::of(ti) };
                failure.explain(name.as_str());
                // SAFETY: The target is valid. Device-mapper only reads the phrase.
                unsafe { (*ti).error = failure.phrase.as_char_ptr().cast_mut() };
                failure.error.to_errno()
            }
        }
    }

    /// # Safety
    ///
    /// As [`Registration::ctr`].
    unsafe fn construct(
        ti: *mut sys::dm_target,
        argc: ffi::c_uint,
        argv: *mut *mut ffi::c_char,
    ) -> Result<(), Failure> {
        // SAFETY: The target is valid, and so is its type.
        let raw = unsafe { (*ti).type_ };
        // SAFETY: By the type invariant the type is a field of a registration. Device-mapper has a
        // reference to the module, which keeps the registration.
        let registration = unsafe { &*kernel::container_of!(Opaque::cast_from(raw), Self, raw) };
        let mut setup = Setup {
            target: NonNull::new(ti).ok_or(EINVAL)?,
            devices: KVec::new(),
            context: &registration.context,
        };
        // SAFETY: The caller's promise.
        let args = unsafe { Args::new(argc, argv) };
        if let Some(dax) = T::DAX {
            // Done even if the table is refused later: the parked claims that this removes would
            // keep the module loaded.
            (dax.claims)(setup.context()).sweep();
            Claim::require_first_table(&setup)?;
        }
        let target = T::new(&mut setup, args)?;
        let claim = match T::DAX {
            Some(dax) => Some(Claim::new(&setup, (dax.claims)(setup.context()))?),
            None => None,
        };
        let workers = match &registration.queue {
            None => None,
            Some(queue) => Some(Workers::new(setup.queue(queue)?)?),
        };
        // SAFETY: The target is valid until `dtr` has dropped the `Live` with the alerts, or until
        // this function has failed and dropped the alerts.
        let alerts = unsafe { Alerts::new(setup.target, T::ALERT) }?;
        // SAFETY: The target is valid.
        let begin = unsafe { (*ti).begin };
        // INVARIANT: `setup` opened the devices in this order.
        let live = Live {
            workers,
            alerts,
            claim,
            target,
            devices: setup.devices,
            begin,
        };
        let live = KBox::into_raw(KBox::new(live, GFP_KERNEL)?);
        // SAFETY: The target is valid, and no one else uses it while its constructor runs.
        let fields = unsafe { &mut *ti };
        fields.private = live.cast();
        fields.per_io_data_size = T::PER_BIO_DATA as u32;
        // A target with per-bio data submits its lower reads with `dm_submit_bio_remap`, except
        // those into the spare buffer.
        fields.set_accounts_remapped_io(T::PER_BIO_DATA != 0);
        Ok(())
    }

    /// # Safety
    ///
    /// Called by device-mapper once for a target that `ctr` made, when no I/O of it is left.
    unsafe extern "C" fn dtr(ti: *mut sys::dm_target) {
        // SAFETY: The target is valid.
        let live = unsafe { (*ti).private };
        // SAFETY: `ctr` stored the box there.
        drop(unsafe { KBox::from_raw(live.cast::<Live<T>>()) });
    }

    /// # Safety
    ///
    /// Called by device-mapper for a target that `ctr` made and that isn't destroyed during `'a`.
    unsafe fn live<'a>(ti: *mut sys::dm_target) -> &'a Live<T> {
        // SAFETY: The target is valid.
        let live = unsafe { (*ti).private };
        // SAFETY: `ctr` stored it there. Until `dtr` there are only shared references to it.
        unsafe { &*live.cast() }
    }

    /// # Safety
    ///
    /// Called by device-mapper for a target that `ctr` made, with a clone of a bio for it.
    unsafe extern "C" fn map(ti: *mut sys::dm_target, bio: *mut sys::bio) -> ffi::c_int {
        // SAFETY: The caller's promise: the table isn't destroyed during the call.
        let live = unsafe { Self::live(ti) };
        // SAFETY: A bio is never at address 0.
        let bio = unsafe { NonNull::new_unchecked(bio) };
        // SAFETY: The caller's promise; the bio is ours until this function returns, or longer if
        // it returns `DM_MAPIO_SUBMITTED`.
        let bio = unsafe { Bio::new(bio, live) };
        bio.map_or(Mapped::KILL, |bio| live.target.map(bio)).code()
    }

    /// # Safety
    ///
    /// Called by device-mapper for a target that `ctr` made, with a clone of a bio that has ended,
    /// and its status.
    unsafe extern "C" fn end_io(
        ti: *mut sys::dm_target,
        bio: *mut sys::bio,
        error: *mut sys::blk_status_t,
    ) -> ffi::c_int {
        // SAFETY: The caller's promise.
        let status = Status::check(unsafe { *error });
        if let (Err(status), Some(failed)) = (status, T::READ_FAILED) {
            // SAFETY: The bio is valid until this function has returned.
            let ahead = unsafe { (*bio).bi_opf } & sys::OBD_REQ_RAHEAD != 0;
            if !ahead && !status.is_of_request() {
                // SAFETY: The caller's promise: a table outlives its I/O.
                let live = unsafe { Self::live(ti) };
                failed(&live.target);
                live.alerts.raise(status.errno());
            }
        }
        sys::DM_ENDIO_DONE as ffi::c_int
    }

    /// # Safety
    ///
    /// Called by device-mapper for a target that `ctr` made, with a buffer of `maxlen` bytes.
    unsafe extern "C" fn status(
        ti: *mut sys::dm_target,
        status_type: sys::status_type_t,
        _flags: ffi::c_uint,
        result: *mut ffi::c_char,
        maxlen: ffi::c_uint,
    ) {
        // SAFETY: The caller's promise.
        let live = unsafe { Self::live(ti) };
        let Some(result) = NonNull::new(result) else {
            return;
        };
        // SAFETY: The caller's promise.
        let mut out = unsafe { Emit::new(result.cast(), maxlen as usize) };
        match status_type {
            sys::status_type_t_STATUSTYPE_INFO => live.target.info(&mut out),
            sys::status_type_t_STATUSTYPE_TABLE => live.target.table(&live.devices, &mut out),
            sys::status_type_t_STATUSTYPE_IMA => {
                // SAFETY: The target is valid.
                let name = unsafe { type_name(ti) };
                let [major, minor, patch] = T::VERSION;
                out.put(fmt!(
                    "target_name={},target_version={major}.{minor}.{patch}",
                    name.to_str().unwrap_or("-")
                ));
                // Keeps room for the `;` at the end.
                out.reserve(1);
                live.target.ima(&live.devices, &mut out);
                out.reserve(0);
                out.put(fmt!(";"));
            }
            _ => {}
        }
    }

    /// # Safety
    ///
    /// Called by device-mapper for a target that `ctr` made, with the words of a message.
    unsafe extern "C" fn message(
        ti: *mut sys::dm_target,
        argc: ffi::c_uint,
        argv: *mut *mut ffi::c_char,
        _result: *mut ffi::c_char,
        _maxlen: ffi::c_uint,
    ) -> ffi::c_int {
        // SAFETY: The caller's promise: the table isn't destroyed during the call.
        let live = unsafe { Self::live(ti) };
        // SAFETY: The caller's promise.
        let args = unsafe { Args::new(argc, argv) };
        let Some(message) = T::MESSAGE else {
            return EINVAL.to_errno();
        };
        match message(&live.target, args) {
            Ok(()) => 0,
            Err(failure) => {
                // SAFETY: The target is valid, and so is its table, whose device has a name.
                let name = unsafe { DeviceName::of(ti) };
                failure.tell(name.as_str());
                failure.error.to_errno()
            }
        }
    }

    /// # Safety
    ///
    /// Called by device-mapper for a target that `ctr` made, with a function to call.
    unsafe extern "C" fn iterate_devices(
        ti: *mut sys::dm_target,
        callout: sys::iterate_devices_callout_fn,
        data: *mut ffi::c_void,
    ) -> ffi::c_int {
        // SAFETY: The caller's promise.
        let live = unsafe { Self::live(ti) };
        let Some(callout) = callout else { return 0 };
        let blocks = live.devices.iter().map(Device::logical_block_size);
        let block = blocks.max().unwrap_or(512);
        for device in &live.devices {
            // SAFETY: The caller's promise; the device is one of the target's.
            let ret = unsafe { callout(ti, device.as_ptr(), 0, device.used(block), data) };
            if ret != 0 {
                return ret;
            }
        }
        0
    }

    /// # Safety
    ///
    /// Called by device-mapper for a target that `ctr` made, before the device is resumed.
    unsafe extern "C" fn preresume(ti: *mut sys::dm_target) -> ffi::c_int {
        // SAFETY: The caller's promise.
        let live = unsafe { Self::live(ti) };
        // Never fails, because device-mapper has already replaced the old table, and a device that
        // stays suspended cannot be unmounted.
        if let Some(claim) = live.claim() {
            claim.begin();
        }
        0
    }

    /// # Safety
    ///
    /// Called by device-mapper for a target that `ctr` made, with pointers that are null or valid
    /// for a write. The table isn't destroyed during the call.
    unsafe extern "C" fn direct_access(
        ti: *mut sys::dm_target,
        page: ffi::c_ulong,
        pages: ffi::c_long,
        mode: sys::dax_access_mode,
        kaddr: *mut *mut ffi::c_void,
        pfn: *mut ffi::c_ulong,
    ) -> ffi::c_long {
        // SAFETY: The caller's promise.
        let live = unsafe { Self::live(ti) };
        // The other mode, `DAX_RECOVERY_WRITE`, is for writes.
        if mode != sys::dax_access_mode_DAX_ACCESS {
            return EIO.to_errno() as ffi::c_long;
        }
        // SAFETY: The caller's promise.
        match unsafe { dax::direct_access(live, page as u64, pages, kaddr, pfn) } {
            Ok(found) => found,
            Err(error) => error.to_errno() as ffi::c_long,
        }
    }

    /// # Safety
    ///
    /// Called by device-mapper.
    unsafe extern "C" fn dax_zero_page_range(
        _ti: *mut sys::dm_target,
        _page: ffi::c_ulong,
        _pages: usize,
    ) -> ffi::c_int {
        EIO.to_errno()
    }

    /// # Safety
    ///
    /// Called by device-mapper for a target that `ctr` made, with limits that this function may
    /// change.
    unsafe extern "C" fn io_hints(ti: *mut sys::dm_target, limits: *mut sys::queue_limits) {
        // SAFETY: The caller's promise.
        let live = unsafe { Self::live(ti) };
        // SAFETY: The caller's promise.
        live.target.limits(&mut Limits(unsafe { &mut *limits }));
    }
}

#[pinned_drop]
impl<T: Target> PinnedDrop for Registration<T> {
    fn drop(self: Pin<&mut Self>) {
        // SAFETY: By the type invariant the type is registered. When the module is unloaded, no
        // target of the type is left, because each one has a reference to the module. If the module
        // fails to load, a target of a type that was already registered may exist. All modules with
        // target types have this gap. To make it small, the names that another module may have
        // registered are registered first.
        unsafe { sys::dm_unregister_target(self.raw.get()) };
    }
}
