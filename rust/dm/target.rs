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

/// What handles a message: its words, the first of which says what it is. Fails with why it is
/// refused.
pub(crate) type Message<T> = fn(&T, Args<'_>) -> Result<(), Failure>;

/// A read-only target.
pub(crate) trait Target: Send + Sync + Sized + 'static {
    /// What all targets of the type share.
    type Context: Send + Sync + 'static;

    /// Version of the target type: what it accepts and shows.
    const VERSION: [u32; 3];
    /// Whether `map` and all below it may be called with `REQ_NOWAIT`.
    const NOWAIT: bool = false;
    /// Per-bio data in bytes: [`frame_size`] of a deferred target, else 0.
    ///
    /// [`frame_size`]: super::frame_size
    const PER_BIO_DATA: usize = 0;
    /// Handles a message (`dmsetup message`), in process context, while bios are mapped; `None` for
    /// a target that takes no messages.
    const MESSAGE: Option<Message<Self>> = None;
    /// Called when a read that the target has sent on ends with an error, in any context, on
    /// several CPUs at once; `None` for a target that sends no reads on. Not called for reads that
    /// are marked as read-ahead, nor where the request is the cause, not the storage.
    const READ_FAILED: Option<fn(&Self)> = None;
    /// Name of the variable that tells of the first fault in a uevent: the number of a corrupt
    /// block, or the error number of a failed read.
    const ALERT: &'static CStr;
    /// How file systems map the memory below; `None` for a target without DAX. A target with DAX is
    /// alone in its table, has all of its devices for itself, and has each page of them at one place
    /// only.
    const DAX: Option<Dax<Self>> = None;

    /// Makes a target from the arguments of its table line.
    ///
    /// # Errors
    ///
    /// Why the line is refused.
    fn new(setup: &mut Setup<'_, Self::Context>, args: Args<'_>) -> Result<Self, Failure>;

    /// Maps a bio. Never blocks; runs on several CPUs at once.
    fn map<'a>(&self, bio: Bio<'a, Self>) -> Mapped<'a>;

    /// Writes the status: counters and state.
    fn info(&self, out: &mut Emit<'_>);

    /// Writes the arguments of the table line; `devices` are in the order in which they were
    /// opened.
    fn table(&self, devices: &[Device], out: &mut Emit<'_>);

    /// Writes what is measured by IMA, as `,key=value`.
    fn ima(&self, devices: &[Device], out: &mut Emit<'_>);

    /// Adjusts the limits of the device.
    fn limits(&self, limits: &mut Limits<'_>);
}

/// A target that works on bios after its map function has returned.
pub(crate) trait Deferred: Target {
    /// The target's own state of an I/O.
    type Request: Send;

    /// Its spare buffer.
    fn spares(&self) -> &Spares<Self>;

    /// Where its other buffers go back to.
    fn pool(&self) -> &Pool;
}

/// The limits of a device.
pub(crate) struct Limits<'a>(&'a mut sys::queue_limits);

impl Limits<'_> {
    /// Reads of any number of sectors at any sector, whatever is below: the sectors of what is below lie
    /// elsewhere.
    pub(crate) fn set_logical_block_size(&mut self, bytes: u32) {
        self.0.logical_block_size = bytes;
        self.0.dma_alignment = bytes - 1;
        self.0.chunk_sectors = 0;
        self.0.alignment_offset = 0;
        self.0.flags &= !sys::OBD_BLK_FLAG_MISALIGNED;
    }

    /// The sizes in bytes that reads are best made of: `block` the smallest, `optimal` a large
    /// one.
    pub(crate) fn set_preferred(&mut self, block: u32, optimal: u32) {
        self.0.physical_block_size = block;
        self.0.io_min = block;
        self.0.io_opt = optimal;
    }

    /// Ends of I/O can't be polled for.
    pub(crate) fn clear_poll(&mut self) {
        self.0.features &= !sys::OBD_BLK_FEAT_POLL;
    }
}

/// A target with its devices: what `ti->private` points to.
///
/// # Invariants
///
/// `devices` are in the order in which they were opened, that of their [`DeviceId`]s. `workers` are
/// there for targets with per-bio data, `claim` for those with DAX.
pub(super) struct Live<T> {
    // Dropped first: waits for workers that have ended their I/O and are about to return.
    workers: Option<Pin<KBox<Workers>>>,
    // Waits for an event that is being sent.
    alerts: Pin<KBox<Alerts>>,
    // Before the devices that it is for.
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

    /// The workers for its I/Os.
    pub(super) fn workers(&self) -> Option<NonNull<Workers>> {
        self.workers.as_deref().map(NonNull::from)
    }

    /// What reports its faults.
    pub(super) fn alerts(&self) -> &Alerts {
        &self.alerts
    }

    /// Its claim on its devices.
    pub(super) fn claim(&self) -> Option<&Claim> {
        self.claim.as_ref()
    }

    /// First sector of the target in its device.
    pub(super) fn begin(&self) -> u64 {
        self.begin
    }
}

/// A target type that is known to device-mapper, until it is dropped.
///
/// # Invariants
///
/// `raw` is registered, and its constructors find this registration around it. `queue` is there for
/// targets with per-bio data.
#[pin_data(PinnedDrop)]
pub(crate) struct Registration<T: Target> {
    #[pin]
    raw: Opaque<sys::target_type>,
    context: Arc<T::Context>,
    queue: Option<Arc<Queue>>,
    _target: PhantomData<T>,
}

// SAFETY: A registration is only made and dropped; the rest is device-mapper's.
unsafe impl<T: Target> Send for Registration<T> {}
// SAFETY: As above; the context may be shared.
unsafe impl<T: Target> Sync for Registration<T> {}

impl<T: Target> Registration<T> {
    /// Registers target type `name`. A deferred target needs a queue, which all workers share that
    /// can.
    ///
    /// # Errors
    ///
    /// [`EEXIST`] where the name is taken.
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
        // SAFETY: The caller's promise; the target's type is the one in a registration.
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
        // SAFETY: By the type invariant there is a registration around the type, and
        // device-mapper has a reference to the module that has it.
        let registration = unsafe { &*kernel::container_of!(Opaque::cast_from(raw), Self, raw) };
        let mut setup = Setup {
            target: NonNull::new(ti).ok_or(EINVAL)?,
            devices: KVec::new(),
            context: &registration.context,
        };
        // SAFETY: The caller's promise.
        let args = unsafe { Args::new(argc, argv) };
        if let Some(dax) = T::DAX {
            // Also where the table is refused: parked claims keep the module.
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
        // SAFETY: The target outlives what it has, which is dropped by `dtr`.
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
        // SAFETY: The target is valid, and in its constructor it is ours.
        let fields = unsafe { &mut *ti };
        fields.private = live.cast();
        fields.per_io_data_size = T::PER_BIO_DATA as u32;
        // Its lower reads go through `dm_submit_bio_remap`.
        fields.set_accounts_remapped_io(T::PER_BIO_DATA != 0);
        Ok(())
    }

    /// # Safety
    ///
    /// Called by device-mapper for a target that `ctr` made, once, when no I/O of it is left.
    unsafe extern "C" fn dtr(ti: *mut sys::dm_target) {
        // SAFETY: The target is valid.
        let live = unsafe { (*ti).private };
        // SAFETY: `ctr` put the box there.
        drop(unsafe { KBox::from_raw(live.cast::<Live<T>>()) });
    }

    /// # Safety
    ///
    /// Called by device-mapper for a target that `ctr` made and that isn't destroyed during `'a`.
    unsafe fn live<'a>(ti: *mut sys::dm_target) -> &'a Live<T> {
        // SAFETY: The target is valid.
        let live = unsafe { (*ti).private };
        // SAFETY: `ctr` put it there, and it is only shared until `dtr`.
        unsafe { &*live.cast() }
    }

    /// # Safety
    ///
    /// Called by device-mapper for a target that `ctr` made, with a clone of a bio for it.
    unsafe extern "C" fn map(ti: *mut sys::dm_target, bio: *mut sys::bio) -> ffi::c_int {
        // SAFETY: The caller's promise: the table is in use for the whole call.
        let live = unsafe { Self::live(ti) };
        // SAFETY: A bio is never at address 0.
        let bio = unsafe { NonNull::new_unchecked(bio) };
        // SAFETY: The caller's promise; the bio is ours until it is given back.
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
                // Room for what ends the target's part.
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
        // SAFETY: The caller's promise: the table is in use for the whole call.
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
        // Never fails: the old table is gone, and a device that stays suspended cannot be unmounted.
        if let Some(claim) = live.claim() {
            claim.begin();
        }
        0
    }

    /// # Safety
    ///
    /// Called by device-mapper for a target that `ctr` made, with pointers that are null or valid
    /// for a write. The table is in use for the whole call.
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
        // The other mode is for writes.
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
    /// Called by device-mapper for a target that `ctr` made, with limits that are its to change.
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
        // SAFETY: By the type invariant it is registered. No target of it is left when the module
        // is unloaded: each has a reference to it. A module that fails to load has the hole that
        // all target types have, which is why the names that may be taken are registered first.
        unsafe { sys::dm_unregister_target(self.raw.get()) };
    }
}
