// SPDX-License-Identifier: GPL-2.0

//! An I/O that a target works on after its map function has returned.
//!
//! An [`Io`] is an owned step of a chain: lower read, worker, end. Each step is a plain function
//! that takes the `Io`, so there is always exactly one owner, and the I/O ends once.
//!
//! Its state lives in device-mapper's per-bio data; the lower bio is a part of it. Nothing is
//! allocated but the buffer, for which each device keeps a spare one ([`Spares`]).
//!
//! Lock order: the lock of [`Spares`] is taken alone.

use core::mem::MaybeUninit;
use core::ptr::NonNull;

use kernel::prelude::*;
use kernel::sync::LockClassKey;

use super::target::Live;
use super::{Deferred, DeviceId};
use crate::block::{Buffer, Job, Lock, Pages, Pool, Status, Workers};
use crate::sys;

/// What an I/O does next.
type Step<T> = fn(Io<T>);
/// What an I/O does when its lower read has ended.
type ReadStep<T> = fn(Io<T>, Result<(), Status>);

/// An I/O in a bio's per-bio data.
#[repr(C)]
pub(super) struct Frame<T: Deferred> {
    live: NonNull<Live<T>>,
    request: T::Request,
    buffer: Option<Buffer>,
    job: Job,
    step: Option<Step<T>>,
    /// Bytes that it waits for.
    wanted: usize,
    /// Whether a worker has had it: what it does may sleep then, also if its bio must not wait.
    deferred: bool,
    read_step: Option<ReadStep<T>>,
    /// The next in a queue of those that wait for memory.
    next: Option<Io<T>>,
    lower: MaybeUninit<sys::bio>,
    lower_vec: MaybeUninit<sys::bio_vec>,
}

/// Bytes of per-bio data that an I/O of `T` takes.
pub(crate) const fn frame_size<T: Deferred>() -> usize {
    // Per-bio data is aligned as much as a bio is.
    assert!(align_of::<Frame<T>>() <= align_of::<sys::bio>());
    size_of::<Frame<T>>()
}

/// An I/O that hasn't ended. Dropped, it ends with an error.
///
/// # Invariants
///
/// Points to an initialised frame in the per-bio data of a bio that hasn't ended, owned by this;
/// `live` in it is valid until the bio ends. No lower bio is in flight and its job isn't queued.
pub(crate) struct Io<T: Deferred>(NonNull<Frame<T>>);

// SAFETY: The parts may be sent, and the bio is touched by its owner only.
unsafe impl<T: Deferred> Send for Io<T> {}

impl<T: Deferred> Io<T> {
    /// Makes the frame of a bio.
    ///
    /// # Safety
    ///
    /// The bio is one of the target `live`, whose per-bio data has room for a frame; the caller
    /// gives its ownership away.
    pub(super) unsafe fn new(
        bio: NonNull<sys::bio>,
        live: NonNull<Live<T>>,
        request: T::Request,
    ) -> Self {
        // SAFETY: The bio is a clone of device-mapper's with this much per-bio data.
        let data = unsafe { sys::dm_per_bio_data(bio.as_ptr(), frame_size::<T>()) };
        let frame: *mut Frame<T> = data.cast();
        // SAFETY: The per-bio data is there, aligned, and not in use.
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
        // SAFETY: By the type invariant.
        unsafe { self.0.as_ref() }
    }

    fn frame_mut(&mut self) -> &mut Frame<T> {
        // SAFETY: By the type invariant; nobody else has the frame.
        unsafe { self.0.as_mut() }
    }

    fn live(&self) -> &Live<T> {
        // SAFETY: By the type invariant it is valid until the bio ends, which takes `self`.
        unsafe { self.frame().live.as_ref() }
    }

    fn bio(&self) -> NonNull<sys::bio> {
        // SAFETY: By the type invariant the frame is a bio's per-bio data of this size.
        let bio =
            unsafe { sys::dm_bio_from_per_bio_data(self.0.as_ptr().cast(), frame_size::<T>()) };
        // SAFETY: A bio is never at address 0.
        unsafe { NonNull::new_unchecked(bio) }
    }

    /// The target.
    pub(crate) fn target(&self) -> &T {
        self.live().target()
    }

    /// Tells of a corrupt block of the target, in any context. With `panic`, the kernel panics.
    pub(crate) fn tell_corrupt(&self, block: u64, panic: bool) {
        let alerts = self.live().alerts();
        alerts.corrupt(block);
        if panic {
            alerts.panic();
        }
    }

    /// The target's own state of the I/O.
    pub(crate) fn request(&self) -> &T::Request {
        &self.frame().request
    }

    /// The target's own state of the I/O, to change.
    pub(crate) fn request_mut(&mut self) -> &mut T::Request {
        &mut self.frame_mut().request
    }

    /// What the lower read has filled.
    pub(crate) fn buffer(&self) -> Option<&Buffer> {
        self.frame().buffer.as_ref()
    }

    /// Whether so many bytes are better decompressed here and now than by a worker: they are few,
    /// interrupts are on, nothing else wants the CPU, and the read isn't of the idle class.
    pub(crate) fn at_once(&self, bytes: u64) -> bool {
        // SAFETY: By the type invariant the bio hasn't ended, and nobody changes it now.
        let ioprio = unsafe { (*self.bio().as_ptr()).bi_ioprio };
        let bytes = u32::try_from(bytes).unwrap_or(u32::MAX);
        // SAFETY: Only looks at the state of this CPU.
        unsafe { sys::obd_at_once(bytes, ioprio) }
    }

    /// The memory to fill.
    pub(crate) fn pages(&self) -> Pages<'_> {
        // SAFETY: By the type invariant the bio hasn't ended, nor will it while `self` is borrowed.
        unsafe { Pages::new(self.bio()) }
    }

    /// Gives the I/O memory for a lower read, which fills all of it.
    pub(crate) fn attach(&mut self, buffer: Buffer) {
        self.release_buffer();
        self.frame_mut().buffer = Some(buffer);
    }

    /// The status that the I/O ends with where there is no memory for it: a read-ahead isn't worth
    /// waiting for, and a bio with `REQ_NOWAIT` must not wait. `None` for others, which wait.
    pub(crate) fn without_memory(&self) -> Option<Status> {
        // SAFETY: By the type invariant the bio hasn't ended, and nobody changes it now.
        let flags = unsafe { (*self.bio().as_ptr()).bi_opf };
        if flags & sys::OBD_REQ_NOWAIT != 0 {
            Some(Status::AGAIN)
        } else {
            (flags & sys::OBD_REQ_RAHEAD != 0).then_some(Status::IO_ERROR)
        }
    }

    /// Gives the I/O the device's spare buffer, now or when it comes back, and goes on with
    /// `step`. The I/O fails if the spare buffer is shorter than `len` bytes.
    pub(crate) fn wait_for_spare(mut self, len: usize, step: Step<T>) {
        let frame = self.frame_mut();
        frame.step = Some(step);
        frame.wanted = len;
        let live = frame.live;
        // SAFETY: By the type invariant the target is valid until the I/O ends. Once it waits,
        // another thread may end it, but only after it got the lock of the spares, whose release
        // is the last thing that is done with it here.
        let spares = unsafe { live.as_ref() }.target().spares();
        if let Some(io) = spares.take_or_wait(self) {
            step(io);
        }
    }

    /// Goes on in a worker with the step that it has waited with.
    fn go_on(mut self) {
        match self.frame_mut().step.take() {
            Some(step) => self.defer(step),
            // It always has one; dropped, it would end with an error.
            None => drop(self),
        }
    }

    /// Takes over a spare buffer, empty and as long as is wanted.
    fn adopt(&mut self, mut buffer: Buffer) {
        let frame = self.frame_mut();
        // Where it is too short, its length stays 0, and reading fails.
        if buffer.reset(frame.wanted).is_err() {
            let _ = buffer.reset(0);
        }
        frame.buffer = Some(buffer);
    }

    /// Reads from sector `sector` of `device` as much as the buffer holds, and goes on with
    /// `step`, which may run in the context of an interrupt. May sleep, unless this is the context
    /// of the map function and the bio has `REQ_NOWAIT`: then the read may end with
    /// [`Status::AGAIN`].
    ///
    /// `shared` says that other reads may wait for this one: then it isn't a read-ahead, nor one that
    /// fails fast.
    ///
    /// The control group of the bio is charged. A read into the spare buffer is charged to the root
    /// group and has no priority: all reads of the device may wait for that buffer, so it must not
    /// be held up for one group.
    pub(crate) fn read(mut self, device: DeviceId, sector: u64, shared: bool, step: ReadStep<T>) {
        let Some(bdev) = self.live().device(device).map(|device| device.bdev()) else {
            return;
        };
        let bio = self.bio();
        let frame = self.frame_mut();
        let deferred = frame.deferred;
        let lower = NonNull::from(&mut frame.lower).cast::<sys::bio>();
        let vec = NonNull::from(&mut frame.lower_vec).cast::<sys::bio_vec>();
        let Some(buffer) = frame.buffer.as_mut().filter(|buffer| !buffer.is_empty()) else {
            return;
        };
        frame.read_step = Some(step);

        let spare = buffer.is_spare();

        // SAFETY: The bio is valid, and nobody changes it now.
        let original = unsafe { bio.as_ref() };
        let (mut flags, ioprio) = (original.bi_opf & sys::OBD_REQ_INHERITED, original.bi_ioprio);
        if shared {
            flags &= !sys::OBD_REQ_FAILS_EARLY;
        }
        if deferred {
            flags &= !sys::OBD_REQ_NOWAIT;
        }
        // SAFETY: The frame stays where it is until the I/O ends, and so do the buffer in it and
        // the device; the I/O isn't ended before `read_done` has uninitialised the lower bio.
        let ready = unsafe { buffer.init_read(lower, vec, core::ptr::null_mut(), flags) };
        if ready.is_err() {
            // SAFETY: Initialised above, and not in flight.
            unsafe { sys::bio_uninit(lower.as_ptr()) };
            return;
        }
        // SAFETY: The lower bio was initialised above and isn't in flight.
        let fields = unsafe { &mut *lower.as_ptr() };
        // Not before: initialised with a device, the bio would belong to the group of this task.
        fields.bi_bdev = bdev;
        fields.bi_ioprio = if spare { 0 } else { ioprio };
        fields.bi_iter.bi_sector = sector;
        fields.bi_end_io = Some(Self::read_done);
        fields.bi_private = self.into_raw().cast();
        if spare {
            // SAFETY: The lower bio is initialised and has a device.
            unsafe { sys::obd_bio_associate_root(lower.as_ptr()) };
            // SAFETY: The lower bio is complete. `read_done` gets the ownership of the I/O.
            unsafe { sys::submit_bio_noacct(lower.as_ptr()) };
        } else {
            // SAFETY: The lower bio is complete but for its group, which this sets. The other one is
            // a clone of device-mapper's that hasn't ended. `read_done` gets the ownership of the I/O.
            unsafe { sys::dm_submit_bio_remap(bio.as_ptr(), lower.as_ptr()) };
        }
    }

    /// The end of a lower read, in any context.
    ///
    /// # Safety
    ///
    /// `lower` is the lower bio of a frame, submitted by [`Io::read`], which gave the ownership of
    /// the I/O away.
    unsafe extern "C" fn read_done(lower: *mut sys::bio) {
        // SAFETY: The bio has ended and is valid.
        let (frame, status) = unsafe { ((*lower).bi_private, (*lower).bi_status) };
        // SAFETY: It has ended, so nobody else uses it.
        unsafe { sys::bio_uninit(lower) };
        // SAFETY: `read` put the frame there and gave its ownership away.
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

    /// Goes on with `step` in a worker.
    pub(crate) fn defer(mut self, step: Step<T>) {
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
        // SAFETY: The job is in the frame, which stays until the I/O ends, and isn't queued by the
        // type invariant; `run` owns the I/O from now on, which may be sent to any thread. Workers
        // are dropped with the target, which outlives the I/O and isn't dropped by one of them.
        unsafe { Workers::push(workers, job, Self::run) };
    }

    /// What a worker runs.
    ///
    /// # Safety
    ///
    /// `job` is that of a frame, pushed by [`Io::defer`], which gave the ownership of the I/O away.
    unsafe fn run(job: NonNull<Job>) {
        // SAFETY: The job is a part of a frame.
        let frame = unsafe { job.byte_sub(core::mem::offset_of!(Frame<T>, job)) };
        // SAFETY: `defer` gave the ownership away.
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

    /// Gives the memory back.
    fn release_buffer(&mut self) {
        match self.frame_mut().buffer.take() {
            Some(buffer) if buffer.is_spare() => {
                self.target().spares().give_back(buffer);
            }
            Some(buffer) => buffer.recycle(self.target().pool()),
            None => {}
        }
    }

    /// Ends the I/O; `self` is used no more after that.
    fn finish(&mut self, result: Result<(), Status>) {
        self.release_buffer();
        let bio = self.bio();
        // SAFETY: By the type invariant the frame is initialised; it isn't used after this.
        unsafe { self.0.drop_in_place() };
        // SAFETY: The bio is valid.
        unsafe { sys::obd_flush_dcache_bio(bio.as_ptr()) };
        // SAFETY: The bio is valid.
        unsafe { (*bio.as_ptr()).bi_status = Status::raw(result) };
        // What is above must not wait here: see the head of `block/workers.rs`.
        // SAFETY: By the type invariant it hasn't ended, and it is ours to end.
        unsafe { sys::obd_bio_endio_atomic(bio.as_ptr()) };
    }

    /// Gives the ownership away.
    fn into_raw(self) -> *mut Frame<T> {
        let frame = self.0.as_ptr();
        core::mem::forget(self);
        frame
    }

    /// Takes the ownership back.
    ///
    /// # Safety
    ///
    /// `frame` came from [`Io::into_raw`], once; its lower bio isn't in flight and its job isn't
    /// queued.
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

/// A queue of I/Os, first in, first out. Dropped, they end with an error.
///
/// # Invariants
///
/// `first` starts a list of I/Os, linked by `next`; where it isn't empty, `last` is its end.
pub(crate) struct IoQueue<T: Deferred> {
    first: Option<Io<T>>,
    last: *mut Frame<T>,
}

// SAFETY: The I/Os may be sent; `last` is one of them.
unsafe impl<T: Deferred> Send for IoQueue<T> {}

impl<T: Deferred> IoQueue<T> {
    /// An empty queue.
    pub(crate) const fn new() -> Self {
        // INVARIANT: The list is empty.
        Self {
            first: None,
            last: core::ptr::null_mut(),
        }
    }

    /// Puts `io` at the end.
    pub(crate) fn push(&mut self, io: Io<T>) {
        let frame = io.0.as_ptr();
        if self.first.is_none() {
            self.first = Some(io);
        } else {
            // SAFETY: The list isn't empty, so by the type invariant `last` is an I/O in it, which
            // the list owns.
            unsafe { (*self.last).next = Some(io) };
        }
        // INVARIANT: `io` is the end of the list now.
        self.last = frame;
    }

    /// Puts `io` at the start.
    fn push_front(&mut self, mut io: Io<T>) {
        let rest = self.first.take();
        if rest.is_none() {
            // INVARIANT: `io` is the only one.
            self.last = io.0.as_ptr();
        }
        io.frame_mut().next = rest;
        self.first = Some(io);
    }

    /// Takes the first one.
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
        // One by one: the list may be long, and the stack is short.
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

/// What a [`Spares`] guards.
///
/// # Invariants
///
/// While I/Os wait, the spare buffer is out.
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
        // INVARIANT: Nobody waits.
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

    /// Gives the spare buffer to `io`, and `io` back; or keeps it until the buffer is here.
    fn take_or_wait(&self, mut io: Io<T>) -> Option<Io<T>> {
        let mut state = self.state.lock();
        if let Some(buffer) = state.buffer.take() {
            drop(state);
            io.adopt(buffer);
            return Some(io);
        }
        // INVARIANT: The buffer is out.
        state.waiting.push(io);
        None
    }

    /// Takes the spare buffer back; the first that waits gets it, and goes on in a worker.
    fn give_back(&self, buffer: Buffer) {
        let mut state = self.state.lock();
        let Some(mut io) = state.waiting.pop() else {
            // INVARIANT: Nobody waits.
            state.buffer = Some(buffer);
            return;
        };
        drop(state);
        io.adopt(buffer);
        io.go_on();
    }

    /// Lets I/Os that wait go on with other memory, as many as get some, where there is memory
    /// again. Called by a worker whose I/O has the spare buffer.
    fn retry(&self, pool: &Pool) {
        loop {
            let first = self.state.lock().waiting.pop();
            let Some(mut io) = first else { return };
            let Some(buffer) = Buffer::try_new(pool, io.frame().wanted) else {
                // INVARIANT: The caller's I/O has the buffer.
                return self.state.lock().waiting.push_front(io);
            };
            io.attach(buffer);
            io.go_on();
            super::cond_resched();
        }
    }
}
