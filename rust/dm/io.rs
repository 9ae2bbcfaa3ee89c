// SPDX-License-Identifier: GPL-2.0

//! An I/O that a target still processes after its map function has returned.
//!
//! An [`Io`] goes through a chain of steps: lower read, worker, end. Each step is a function that
//! takes the `Io` by value, so it always has exactly one owner, and it ends once.
//!
//! The state of an I/O is in device-mapper's per-bio data, together with the lower bio. Only the
//! buffer is allocated separately. Each device keeps a spare buffer for reads when no memory is
//! available ([`Spares`]).
//!
//! Lock order: no other lock is held together with the lock of [`Spares`].

use core::mem::MaybeUninit;
use core::ptr::NonNull;

use kernel::prelude::*;
use kernel::sync::LockClassKey;

use super::target::Live;
use super::{Deferred, DeviceId};
use crate::block::{Buffer, Job, Lock, Pages, Pool, Status, Workers};
use crate::sys;

/// A function that continues an I/O.
type Step<T> = fn(Io<T>);
/// A function that continues an I/O after its lower read, whose result it gets.
type ReadStep<T> = fn(Io<T>, Result<(), Status>);

/// The state of an I/O in device-mapper's per-bio data.
#[repr(C)]
pub(super) struct Frame<T: Deferred> {
    live: NonNull<Live<T>>,
    request: T::Request,
    buffer: Option<Buffer>,
    job: Job,
    step: Option<Step<T>>,
    /// Length in bytes of the buffer that the I/O needs.
    wanted: usize,
    /// Whether a worker has processed the I/O. From then on, only workers submit its lower reads,
    /// and workers may sleep, even if the bio has `REQ_NOWAIT`.
    deferred: bool,
    read_step: Option<ReadStep<T>>,
    /// The next I/O in the queue of those that wait for memory.
    next: Option<Io<T>>,
    lower: MaybeUninit<sys::bio>,
    lower_vec: MaybeUninit<sys::bio_vec>,
}

/// Returns the size in bytes of the per-bio data for an I/O of `T`.
pub(crate) const fn frame_size<T: Deferred>() -> usize {
    // Per-bio data has the alignment of a bio.
    assert!(align_of::<Frame<T>>() <= align_of::<sys::bio>());
    size_of::<Frame<T>>()
}

/// An I/O that hasn't ended. If it is dropped, it ends with an error.
///
/// # Invariants
///
/// Points to an initialised frame in the per-bio data of a bio that hasn't ended. This object owns
/// both. The frame's `live` is valid until the bio ends. The lower bio isn't in flight, and the job
/// isn't queued.
pub(crate) struct Io<T: Deferred>(NonNull<Frame<T>>);

// SAFETY: The fields of the frame may be sent, and only the owner uses the bio.
unsafe impl<T: Deferred> Send for Io<T> {}

impl<T: Deferred> Io<T> {
    /// Initialises the frame of a bio.
    ///
    /// # Safety
    ///
    /// The bio belongs to the target `live`, and its per-bio data has room for a frame. The caller
    /// passes the ownership of the bio to the `Io`.
    pub(super) unsafe fn new(
        bio: NonNull<sys::bio>,
        live: NonNull<Live<T>>,
        request: T::Request,
    ) -> Self {
        // SAFETY: The bio is a clone that device-mapper made, with this much per-bio data.
        let data = unsafe { sys::dm_per_bio_data(bio.as_ptr(), frame_size::<T>()) };
        let frame: *mut Frame<T> = data.cast();
        // SAFETY: The per-bio data is valid memory for a frame, aligned, and not in use.
        unsafe {
            frame.write(Frame {
                live,
                request,
                buffer: None,
                job: Job::new(),
                step: None,
                wanted: 0,
                deferred: false,
                read_step: None,
                next: None,
                lower: MaybeUninit::uninit(),
                lower_vec: MaybeUninit::uninit(),
            })
        };
        // SAFETY: Per-bio data is never at address 0.
        // INVARIANT: The frame is initialised, and a target outlives its bios.
        Self(unsafe { NonNull::new_unchecked(frame) })
    }

    fn frame(&self) -> &Frame<T> {
        // SAFETY: By the type invariant the frame is valid.
        unsafe { self.0.as_ref() }
    }

    fn frame_mut(&mut self) -> &mut Frame<T> {
        // SAFETY: By the type invariant the frame is valid, and `self` owns it.
        unsafe { self.0.as_mut() }
    }

    fn live(&self) -> &Live<T> {
        // SAFETY: By the type invariant it is valid until the bio ends, and ending the bio consumes
        // `self`.
        unsafe { self.frame().live.as_ref() }
    }

    fn bio(&self) -> NonNull<sys::bio> {
        // SAFETY: By the type invariant the frame is in the per-bio data of a bio, which has this
        // size.
        let bio =
            unsafe { sys::dm_bio_from_per_bio_data(self.0.as_ptr().cast(), frame_size::<T>()) };
        // SAFETY: A bio is never at address 0.
        unsafe { NonNull::new_unchecked(bio) }
    }

    /// Returns the target.
    pub(crate) fn target(&self) -> &T {
        self.live().target()
    }

    /// Reports that block `block` of the target is corrupt. Panics if `panic` is set. May be called
    /// in any context.
    pub(crate) fn tell_corrupt(&self, block: u64, panic: bool) {
        let alerts = self.live().alerts();
        alerts.corrupt(block);
        if panic {
            alerts.panic();
        }
    }

    /// Returns the target's own state of the I/O.
    pub(crate) fn request(&self) -> &T::Request {
        &self.frame().request
    }

    /// Returns a mutable reference to the target's own state of the I/O.
    pub(crate) fn request_mut(&mut self) -> &mut T::Request {
        &mut self.frame_mut().request
    }

    /// Returns the buffer of the I/O, if it has one. The lower read fills it.
    pub(crate) fn buffer(&self) -> Option<&Buffer> {
        self.frame().buffer.as_ref()
    }

    /// Returns whether to decompress `bytes` bytes now, on this CPU, instead of in a worker: if
    /// `bytes` is at most the module parameter `at_once_bytes`, interrupts are on, no other task
    /// needs the CPU, and the read isn't of the idle class.
    pub(crate) fn at_once(&self, bytes: u64) -> bool {
        // SAFETY: By the type invariant the bio hasn't ended, and no one else changes it.
        let ioprio = unsafe { (*self.bio().as_ptr()).bi_ioprio };
        let bytes = u32::try_from(bytes).unwrap_or(u32::MAX);
        // SAFETY: This only reads the state of this CPU.
        unsafe { sys::obd_at_once(bytes, ioprio) }
    }

    /// Returns whether the read has the idle class of I/O priorities.
    pub(crate) fn is_idle_class(&self) -> bool {
        // SAFETY: By the type invariant the bio hasn't ended, and no one else changes it.
        let ioprio = unsafe { (*self.bio().as_ptr()).bi_ioprio };
        // SAFETY: This only looks at the number.
        unsafe { sys::obd_is_idle_class(ioprio) }
    }

    /// Returns the memory to fill.
    pub(crate) fn pages(&self) -> Pages<'_> {
        // SAFETY: By the type invariant the bio hasn't ended, and it doesn't end while `self` is
        // borrowed.
        unsafe { Pages::new(self.bio()) }
    }

    /// Gives the I/O a buffer, all of which its lower read will fill. Releases the buffer that the
    /// I/O had before.
    pub(crate) fn attach(&mut self, buffer: Buffer) {
        self.release_buffer();
        self.frame_mut().buffer = Some(buffer);
    }

    /// Returns the status with which to end the I/O if there is no memory for its buffer: a bio
    /// with `REQ_NOWAIT` must not wait, and a read-ahead should not. Returns `None` for all other
    /// I/Os, which have to wait.
    pub(crate) fn without_memory(&self) -> Option<Status> {
        // SAFETY: By the type invariant the bio hasn't ended, and no one else changes it.
        let flags = unsafe { (*self.bio().as_ptr()).bi_opf };
        if flags & sys::OBD_REQ_NOWAIT != 0 {
            Some(Status::AGAIN)
        } else {
            (flags & sys::OBD_REQ_RAHEAD != 0).then_some(Status::IO_ERROR)
        }
    }

    /// Gives the I/O the device's spare buffer, now or when another I/O has returned that buffer,
    /// and continues with `step`. If memory becomes available while the I/O waits, it may get
    /// another buffer instead. The I/O fails if the spare buffer is shorter than `len` bytes.
    pub(crate) fn wait_for_spare(mut self, len: usize, step: Step<T>) {
        let frame = self.frame_mut();
        frame.step = Some(step);
        frame.wanted = len;
        let live = frame.live;
        // SAFETY: By the type invariant the target is valid until the I/O ends. Once the I/O is in
        // the queue, another thread may end it, but only after taking the lock of the `Spares`. If
        // the I/O was queued, releasing this lock is the last use of the target here.
        let spares = unsafe { live.as_ref() }.target().spares();
        if let Some(io) = spares.take_or_wait(self) {
            step(io);
        }
    }

    /// Continues in a worker with the step that was stored when the I/O began to wait.
    fn go_on(mut self) {
        match self.frame_mut().step.take() {
            Some(step) => self.defer(step),
            // Doesn't happen: an I/O that waits has a step. This would end it with an error.
            None => drop(self),
        }
    }

    /// Takes over the spare buffer, and sets its length to that which the I/O needs. Nothing of it
    /// counts as filled.
    fn adopt(&mut self, mut buffer: Buffer) {
        let frame = self.frame_mut();
        // If the buffer is too short, its length is set to 0, and `read` fails.
        if buffer.reset(frame.wanted).is_err() {
            let _ = buffer.reset(0);
        }
        frame.buffer = Some(buffer);
    }

    /// Reads from sector `sector` of `device` until the buffer is full, and continues with `step`,
    /// which may be called in interrupt context. May sleep, except if called from the map function
    /// with a bio that has `REQ_NOWAIT`: then the read may end with [`Status::AGAIN`]. Ends the I/O
    /// with an error if the target has no such device, or the I/O has no buffer.
    ///
    /// `shared` is set if other reads may wait for this one. Then the lower read is neither a
    /// read-ahead nor one that fails fast, nor of the idle class or in the background.
    ///
    /// The control group of the bio is charged. A read into the spare buffer is charged to the root
    /// group and has no priority: all reads of the device may wait for that buffer, so the limits
    /// of one group must not delay it.
    pub(crate) fn read(mut self, device: DeviceId, sector: u64, shared: bool, step: ReadStep<T>) {
        let Some(bdev) = self.live().device(device).map(|device| device.bdev()) else {
            return;
        };
        let bio = self.bio();
        let no_priority = shared && self.is_idle_class();
        let frame = self.frame_mut();
        let deferred = frame.deferred;
        let lower = NonNull::from(&mut frame.lower).cast::<sys::bio>();
        let vec = NonNull::from(&mut frame.lower_vec).cast::<sys::bio_vec>();
        let Some(buffer) = frame.buffer.as_mut().filter(|buffer| !buffer.is_empty()) else {
            return;
        };
        frame.read_step = Some(step);

        let spare = buffer.is_spare();
        // SAFETY: The bio is valid, and no one else changes it.
        let original = unsafe { bio.as_ref() };
        let (mut flags, ioprio) = (original.bi_opf & sys::OBD_REQ_INHERITED, original.bi_ioprio);
        if shared {
            flags &= !sys::OBD_REQ_ALONE;
        }
        if deferred {
            flags &= !sys::OBD_REQ_NOWAIT;
        }
        // SAFETY: The frame, the buffer in it and the device stay valid and in place until the I/O
        // ends. The I/O doesn't end before `read_done` has uninitialised the lower bio.
        let ready = unsafe { buffer.init_read(lower, vec, core::ptr::null_mut(), flags) };
        if ready.is_err() {
            // SAFETY: Initialised above, and not in flight.
            unsafe { sys::bio_uninit(lower.as_ptr()) };
            return;
        }
        // SAFETY: The lower bio was initialised above and isn't in flight.
        let fields = unsafe { &mut *lower.as_ptr() };
        // Set only now: if initialised with a device, the bio would belong to the control group of
        // this task.
        fields.bi_bdev = bdev;
        fields.bi_ioprio = if spare || no_priority { 0 } else { ioprio };
        fields.bi_iter.bi_sector = sector;
        fields.bi_end_io = Some(Self::read_done);
        fields.bi_private = self.into_raw().cast();
        if spare {
            // SAFETY: The lower bio is initialised and has a device.
            unsafe { sys::obd_bio_associate_root(lower.as_ptr()) };
            // SAFETY: The lower bio is complete. `read_done` takes the ownership of the I/O.
            unsafe { sys::submit_bio_noacct(lower.as_ptr()) };
        } else {
            // SAFETY: The lower bio is complete except for its control group, which this call sets.
            // `bio` is a clone that device-mapper made, and hasn't ended. `read_done` takes the
            // ownership of the I/O.
            unsafe { sys::dm_submit_bio_remap(bio.as_ptr(), lower.as_ptr()) };
        }
    }

    /// The completion function of a lower read. Called in any context.
    ///
    /// # Safety
    ///
    /// `lower` is the lower bio of a frame. [`Io::read`] has submitted it, and passed the ownership
    /// of the I/O to this function.
    unsafe extern "C" fn read_done(lower: *mut sys::bio) {
        // SAFETY: The bio has ended and is valid.
        let (frame, status) = unsafe { ((*lower).bi_private, (*lower).bi_status) };
        // SAFETY: It has ended, so no one else uses it.
        unsafe { sys::bio_uninit(lower) };
        // SAFETY: `read` stored the frame there, and passed the ownership of the I/O to this
        // function.
        let mut io = unsafe { Self::from_raw(frame.cast()) };
        let result = Status::check(status);
        let frame = io.frame_mut();
        if let (Ok(()), Some(buffer)) = (result, frame.buffer.as_mut()) {
            // SAFETY: A read of the whole buffer has succeeded.
            unsafe { buffer.set_filled() };
        }
        if let Some(step) = frame.read_step.take() {
            step(io, result);
        }
    }

    /// Continues with `step` in a worker.
    pub(crate) fn defer(self, step: Step<T>) {
        self.queue(step, None);
    }

    /// Continues with `step`, which processes only `bytes` bytes, in a worker, before larger steps.
    /// `bytes` must be above 0.
    pub(crate) fn defer_small(self, step: Step<T>, bytes: u32) {
        self.queue(step, Some(bytes));
    }

    /// Continues with `step` in a worker. For `small` see [`Workers::push`].
    fn queue(mut self, step: Step<T>, small: Option<u32>) {
        let frame = self.frame_mut();
        frame.step = Some(step);
        let live = frame.live;
        // SAFETY: By the type invariant the target is valid until the I/O ends.
        let Some(workers) = unsafe { live.as_ref() }.workers() else {
            return;
        };
        let frame = self.into_raw();
        // SAFETY: The frame is valid; this points into it.
        let job = unsafe { &raw mut (*frame).job };
        // SAFETY: A field of a frame is never at address 0.
        let job = unsafe { NonNull::new_unchecked(job) };
        // SAFETY: The job is in the frame, which stays in place until the I/O ends. By the type
        // invariant it isn't queued. `run` owns the I/O from now on; an I/O may be sent to any
        // thread. The workers are dropped with the target, which outlives the I/O, and no worker
        // drops the target.
        unsafe { Workers::push(workers, job, small, Self::run) };
    }

    /// The function of a job. Called by a worker.
    ///
    /// # Safety
    ///
    /// `job` is the job of a frame. [`Io::queue`] has pushed it, and passed the ownership of the
    /// I/O to this function.
    unsafe fn run(job: NonNull<Job>) {
        // SAFETY: The job is a field of a frame.
        let frame = unsafe { job.byte_sub(core::mem::offset_of!(Frame<T>, job)) };
        // SAFETY: `queue` has passed the ownership of the I/O to this function.
        let mut io = unsafe { Self::from_raw(frame.as_ptr().cast()) };
        io.frame_mut().deferred = true;
        if io.frame().buffer.as_ref().is_some_and(Buffer::is_spare) {
            io.target().spares().retry(io.target().pool());
        }
        if let Some(step) = io.frame_mut().step.take() {
            step(io);
        }
    }

    /// Ends the I/O.
    pub(crate) fn end(mut self, result: Result<(), Status>) {
        self.finish(result);
        core::mem::forget(self);
    }

    /// Returns the buffer to the pool, or the spare buffer to the [`Spares`].
    fn release_buffer(&mut self) {
        match self.frame_mut().buffer.take() {
            Some(buffer) if buffer.is_spare() => {
                self.target().spares().give_back(buffer);
            }
            Some(buffer) => buffer.recycle(self.target().pool()),
            None => {}
        }
    }

    /// Ends the I/O. The caller must not use `self` after that.
    fn finish(&mut self, result: Result<(), Status>) {
        self.release_buffer();
        let bio = self.bio();
        // SAFETY: By the type invariant the frame is initialised. It isn't used after this.
        unsafe { self.0.drop_in_place() };
        // SAFETY: The bio is valid.
        unsafe { sys::obd_flush_dcache_bio(bio.as_ptr()) };
        // SAFETY: The bio is valid.
        unsafe { (*bio.as_ptr()).bi_status = Status::raw(result) };
        // Completions of the file system or device on top must not wait here: see the top of
        // `block/workers.rs`.
        // SAFETY: By the type invariant the bio hasn't ended, and `self` owns it.
        unsafe { sys::obd_bio_endio_atomic(bio.as_ptr()) };
    }

    /// Converts to a raw pointer, which stands for the ownership of the I/O.
    fn into_raw(self) -> *mut Frame<T> {
        let frame = self.0.as_ptr();
        core::mem::forget(self);
        frame
    }

    /// Takes the ownership of the I/O back.
    ///
    /// # Safety
    ///
    /// `frame` is from [`Io::into_raw`], and this is called once for it. Its lower bio isn't in
    /// flight, and its job isn't queued.
    unsafe fn from_raw(frame: *mut Frame<T>) -> Self {
        // SAFETY: A frame is never at address 0.
        // INVARIANT: By the safety requirement.
        Self(unsafe { NonNull::new_unchecked(frame) })
    }
}

impl<T: Deferred> Drop for Io<T> {
    fn drop(&mut self) {
        self.finish(Err(Status::IO_ERROR));
    }
}

/// A FIFO queue of I/Os. If the queue is dropped, the I/Os in it end with an error.
///
/// # Invariants
///
/// `first` starts a list of I/Os, linked by `next`. Unless the list is empty, `last` is the frame
/// of the last I/O in it.
pub(crate) struct IoQueue<T: Deferred> {
    first: Option<Io<T>>,
    last: *mut Frame<T>,
}

// SAFETY: The I/Os may be sent; `last` points to one of them.
unsafe impl<T: Deferred> Send for IoQueue<T> {}

impl<T: Deferred> IoQueue<T> {
    /// Makes an empty queue.
    pub(crate) const fn new() -> Self {
        // INVARIANT: The list is empty.
        Self {
            first: None,
            last: core::ptr::null_mut(),
        }
    }

    /// Appends `io`.
    pub(crate) fn push(&mut self, io: Io<T>) {
        let frame = io.0.as_ptr();
        if self.first.is_none() {
            self.first = Some(io);
        } else {
            // SAFETY: The list isn't empty, so by the type invariant `last` is the frame of an I/O
            // in it. The list owns that I/O.
            unsafe { (*self.last).next = Some(io) };
        }
        // INVARIANT: `io` is the end of the list now.
        self.last = frame;
    }

    /// Puts `io` before all others.
    fn push_front(&mut self, mut io: Io<T>) {
        let rest = self.first.take();
        if rest.is_none() {
            // INVARIANT: `io` is the only one.
            self.last = io.0.as_ptr();
        }
        io.frame_mut().next = rest;
        self.first = Some(io);
    }

    /// Removes and returns the first I/O.
    pub(crate) fn pop(&mut self) -> Option<Io<T>> {
        let mut io = self.first.take()?;
        self.first = io.frame_mut().next.take();
        Some(io)
    }
}

impl<T: Deferred> Default for IoQueue<T> {
    fn default() -> Self {
        Self::new()
    }
}

impl<T: Deferred> Drop for IoQueue<T> {
    fn drop(&mut self) {
        // One by one: a recursive drop of the list could overflow the kernel stack.
        while let Some(io) = self.pop() {
            drop(io);
        }
    }
}

/// A device's spare buffer, and the I/Os that wait for it.
#[pin_data]
pub(crate) struct Spares<T: Deferred> {
    #[pin]
    state: Lock<State<T>>,
}

/// The data behind the lock of a [`Spares`].
///
/// # Invariants
///
/// While I/Os wait, `buffer` is `None`: an I/O has the spare buffer.
struct State<T: Deferred> {
    buffer: Option<Buffer>,
    waiting: IoQueue<T>,
}

impl<T: Deferred> Spares<T> {
    /// Allocates a spare buffer of `len` bytes.
    ///
    /// # Errors
    ///
    /// [`ENOMEM`].
    pub(crate) fn new(len: usize) -> Result<Pin<KBox<Self>>> {
        // INVARIANT: No I/O waits.
        let state = State {
            buffer: Some(Buffer::new_spare(len)?),
            waiting: IoQueue::new(),
        };
        let key: Pin<&'static LockClassKey> = kernel::static_lock_class!();
        KBox::pin_init(
            pin_init!(Self { state <- Lock::new(state, c"dm_overlaybd_spares", key) }),
            GFP_KERNEL,
        )
    }

    /// Gives the spare buffer to `io` and returns `io`. If another I/O has the buffer, queues `io`
    /// and returns `None`.
    fn take_or_wait(&self, mut io: Io<T>) -> Option<Io<T>> {
        let mut state = self.state.lock();
        if let Some(buffer) = state.buffer.take() {
            drop(state);
            io.adopt(buffer);
            return Some(io);
        }
        // INVARIANT: `buffer` is `None`.
        state.waiting.push(io);
        None
    }

    /// Takes the spare buffer back. If I/Os wait, gives it to the first one, which continues in a
    /// worker.
    fn give_back(&self, buffer: Buffer) {
        let mut state = self.state.lock();
        let Some(mut io) = state.waiting.pop() else {
            // INVARIANT: No I/O waits.
            state.buffer = Some(buffer);
            return;
        };
        drop(state);
        io.adopt(buffer);
        io.go_on();
    }

    /// Gets buffers from `pool` for the I/Os that wait for the spare buffer, until `pool` has no
    /// memory, and continues these I/Os. Called by a worker whose I/O has the spare buffer.
    fn retry(&self, pool: &Pool) {
        loop {
            let first = self.state.lock().waiting.pop();
            let Some(mut io) = first else { return };
            let Some(buffer) = Buffer::try_new(pool, io.frame().wanted) else {
                // INVARIANT: The caller's I/O has the spare buffer, so `buffer` is `None`.
                return self.state.lock().waiting.push_front(io);
            };
            io.attach(buffer);
            io.go_on();
            super::cond_resched();
        }
    }
}
