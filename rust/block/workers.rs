// SPDX-License-Identifier: GPL-2.0

//! Workers of a device: one for each CPU. They take jobs from one list, and need no memory to make
//! progress.
//!
//! The workers of many devices share a [`Queue`], a workqueue. If there is no memory for more
//! threads, its rescuer thread runs all of them, one after the other. So a worker must never wait
//! for a worker of the same queue. A worker may wait for:
//!
//! - A codec context. The thread that has it waits for nothing.
//! - Completions of the file system or device on top. They are called as if from an interrupt
//!   (`bio_in_atomic()` is true), so they must not wait. Otherwise erofs, for example, would
//!   decompress in its completion, and wait for memory.
//! - The submission of a lower read, which may wait for tags or memory of the lower device. A
//!   device has its own queue if its lower device may be on another device of this module: see
//!   `Device::may_stack`.
//! - The budget of the control group that a lower read is charged to, if the lower disk has
//!   `io.cost` or `io.latency`. This concerns only reads that a worker submits: after memory was
//!   short, or after a lower read for the cache failed. If there is no memory for another thread,
//!   other devices wait, too.
//!
//! If there is memory, a worker that waits delays no other one, as each has its own thread.
//!
//! A job wakes the worker of the CPU that queues it. If that worker is busy, the job wakes the next
//! idle one, so that several CPUs work on the parts of a large read. A worker takes the next job of
//! the list, whichever CPU queued it. Workers of CPUs that are offline or isolated (`isolcpus=`,
//! `nohz_full=`, isolated cpuset partitions) are not woken.
//!
//! Small jobs overtake other ones, so a small read does not wait for all parts of the large reads
//! before it: see [`order`](super::order), which has the rules.
//!
//! Lock order: the list's lock, then the workqueue's own. Both may be taken in any context but NMI.
//!
//! C headers: `include/linux/workqueue.h`, `include/linux/cpumask.h`,
//! `include/linux/sched/isolation.h`.

use core::ptr::NonNull;

use kernel::cpu::CpuId;
use kernel::cpumask::CpumaskVar;
use kernel::prelude::*;
use kernel::sync::Arc;
use kernel::types::Opaque;

use super::order::{Kind, Ticket, Turns};
use super::Lock;
use crate::sys;

/// Jobs that a worker runs before it lets other work items run on its CPU.
const BATCH: usize = 64;

/// A step for a worker to run. It is embedded in another structure, such as the frame of an `Io`.
pub(crate) struct Job {
    next: *mut Job,
    run: Option<unsafe fn(NonNull<Job>)>,
    ticket: Ticket,
}

impl Job {
    /// Makes a job that isn't queued.
    pub(crate) const fn new() -> Self {
        Self {
            next: core::ptr::null_mut(),
            run: None,
            ticket: Ticket::none(),
        }
    }
}

/// A queue of jobs.
///
/// # Invariants
///
/// `first` starts a list of queued jobs, linked by `next`; `last` is its end unless it is empty.
/// Each job is valid, belongs to the queue, and has a function that any thread may call with it
/// once.
struct Fifo {
    first: *mut Job,
    last: *mut Job,
}

// SAFETY: By the type invariant, any thread may run the jobs.
unsafe impl Send for Fifo {}

impl Fifo {
    const fn new() -> Self {
        // INVARIANT: There is no job.
        Self {
            first: core::ptr::null_mut(),
            last: core::ptr::null_mut(),
        }
    }

    fn is_empty(&self) -> bool {
        self.first.is_null()
    }

    /// Returns the ticket of the first job.
    fn first(&self) -> Option<Ticket> {
        // SAFETY: By the type invariant it is valid if there is one.
        unsafe { self.first.as_ref() }.map(|job| job.ticket)
    }

    /// Appends a job.
    ///
    /// # Safety
    ///
    /// `job` is valid, has a function that any thread may call with it once, and belongs to the
    /// queue from now on.
    unsafe fn push(&mut self, job: NonNull<Job>) {
        let job = job.as_ptr();
        // SAFETY: The caller's promise.
        unsafe { (*job).next = core::ptr::null_mut() };
        if self.first.is_null() {
            self.first = job;
        } else {
            // SAFETY: The list isn't empty, so by the type invariant `last` is a valid job of it.
            unsafe { (*self.last).next = job };
        }
        // INVARIANT: `job` is the end of the list now.
        self.last = job;
    }

    /// Removes and returns the first job.
    fn pop(&mut self) -> Option<NonNull<Job>> {
        let job = NonNull::new(self.first)?;
        // SAFETY: By the type invariant it is valid.
        self.first = unsafe { job.as_ref() }.next;
        Some(job)
    }
}

/// The jobs of a device, and the set of its idle workers.
///
/// # Invariants
///
/// While there are jobs, `busy` isn't 0, or the holder of the lock is about to wake a worker: a
/// worker checks the list once more before it becomes idle.
///
/// `idle` has the CPUs whose worker is neither running nor queued; `busy` is the number of the
/// other workers.
struct List {
    small: Fifo,
    others: Fifo,
    turns: Turns,
    idle: KBox<CpumaskVar>,
    busy: usize,
    /// A mask for [`List::wake`] to compute in.
    scratch: KBox<CpumaskVar>,
}

// SAFETY: The queues may be sent to another thread; CPU masks are plain memory.
unsafe impl Send for List {}

impl List {
    /// Returns the queue of the jobs of `kind`.
    fn queue(&mut self, kind: Kind) -> &mut Fifo {
        match kind {
            Kind::Small => &mut self.small,
            Kind::Other => &mut self.others,
        }
    }

    /// Appends a job. For `small` see [`Workers::push`].
    ///
    /// # Safety
    ///
    /// As for [`Fifo::push`]. If no worker is busy, the caller wakes one before it unlocks the
    /// list.
    unsafe fn push(&mut self, mut job: NonNull<Job>, small: Option<u32>) {
        let ticket = self.turns.ticket(small);
        // SAFETY: The caller's promise.
        unsafe { job.as_mut() }.ticket = ticket;
        // SAFETY: The caller's promise.
        unsafe { self.queue(ticket.kind()).push(job) };
    }

    /// Removes and returns the next job.
    fn next(&mut self) -> Option<NonNull<Job>> {
        let kind = self.turns.next(self.small.first(), self.others.first())?;
        self.queue(kind).pop()
    }

    /// Chooses the worker to wake for a new job from CPU `here`: that of `here`, or the next idle
    /// one whose CPU is online and not isolated. Marks it as busy. Returns its CPU, or `None` if no
    /// worker has to be woken, as others are busy.
    ///
    /// Must be called on `here` with interrupts off, so that no CPU can go offline.
    fn wake(&mut self, here: CpuId) -> Option<CpuId> {
        let scratch = self.scratch.as_raw();
        // SAFETY: Both masks are valid, and no two references exist to the one that is written to.
        let cpu = unsafe { sys::obd_cpu_for_work(self.idle.as_raw(), scratch, here.as_u32()) };
        let cpu = CpuId::from_u32(cpu)
            // All housekeeping CPUs are offline: the worker of this CPU has to run the job.
            .or_else(|| (self.busy == 0).then_some(here))?;
        self.idle.clear(cpu);
        self.busy += 1;
        Some(cpu)
    }

    /// Removes and returns the next job, for the worker of `cpu`. If there is none, marks that
    /// worker as idle.
    fn pop(&mut self, cpu: CpuId) -> Option<NonNull<Job>> {
        let job = self.next();
        if job.is_none() {
            // INVARIANT: There are no jobs.
            self.idle.set(cpu);
            self.busy -= 1;
        }
        job
    }

    /// Marks the worker of `cpu` as idle, even if there are jobs. If there are, returns the CPU of
    /// the worker to wake for them: another CPU if this one has been isolated or has gone offline.
    fn pass(&mut self, cpu: CpuId) -> Option<CpuId> {
        self.idle.set(cpu);
        self.busy -= 1;
        if self.small.is_empty() && self.others.is_empty() {
            return None;
        }
        self.wake(CpuId::current())
    }
}

/// A workqueue with a rescuer thread, for the workers of any number of devices.
///
/// # Invariants
///
/// The pointer is a valid workqueue, owned by this object.
pub(crate) struct Queue(NonNull<sys::workqueue_struct>);

// SAFETY: A workqueue may be used from any thread.
unsafe impl Send for Queue {}
// SAFETY: As above.
unsafe impl Sync for Queue {}

impl Queue {
    /// Makes a workqueue named `name`, which `ps` shows.
    ///
    /// # Errors
    ///
    /// [`ENOMEM`].
    pub(crate) fn new(name: &CStr) -> Result<Arc<Self>> {
        let flags =
            sys::wq_flags_WQ_MEM_RECLAIM | sys::wq_flags_WQ_PERCPU | sys::wq_flags_WQ_CPU_INTENSIVE;
        // SAFETY: `name` is a C string; it is copied.
        let queue = unsafe { sys::obd_alloc_workqueue(name.as_char_ptr(), flags) };
        // INVARIANT: Just made.
        let queue = Self(NonNull::new(queue).ok_or(ENOMEM)?);
        Ok(Arc::new(queue, GFP_KERNEL)?)
    }
}

impl Drop for Queue {
    fn drop(&mut self) {
        // SAFETY: By the type invariant it is valid and ours; no worker runs on it any more.
        unsafe { sys::destroy_workqueue(self.0.as_ptr()) };
    }
}

/// The worker of one CPU.
#[repr(C)]
struct Worker {
    work: Opaque<sys::work_struct>,
    workers: NonNull<Workers>,
    cpu: CpuId,
}

/// The workers of a device.
///
/// # Invariants
///
/// `each` has an initialised worker for each CPU number below `nr_cpu_ids`, whose `workers` is this
/// and whose `cpu` is that number. They are queued on `queue` only.
#[pin_data(PinnedDrop)]
pub(crate) struct Workers {
    queue: Arc<Queue>,
    each: KVec<Worker>,
    #[pin]
    list: Lock<List>,
}

// SAFETY: A work item may be used from any thread.
unsafe impl Send for Workers {}
// SAFETY: As above; the list is behind a lock.
unsafe impl Sync for Workers {}

impl Workers {
    /// Makes workers that run on `queue`.
    ///
    /// # Errors
    ///
    /// [`ENOMEM`].
    pub(crate) fn new(queue: Arc<Queue>) -> Result<Pin<KBox<Self>>> {
        // Without CONFIG_CPUMASK_OFFSTACK, a `CpumaskVar` contains the mask, which must not move.
        // The boxes keep it in place when the list is moved.
        let mask = || KBox::new(CpumaskVar::new_zero(GFP_KERNEL)?, GFP_KERNEL);
        let mut idle = mask()?;
        idle.setall();
        // INVARIANT: The list is empty, and no worker is queued.
        let list = List {
            small: Fifo::new(),
            others: Fifo::new(),
            turns: Turns::new(),
            idle,
            busy: 0,
            scratch: mask()?,
        };
        let key = kernel::static_lock_class!();
        KBox::try_pin_init(
            try_pin_init!(&this in Self {
                each: {
                    let cpus = kernel::cpu::nr_cpu_ids();
                    let mut each = KVec::with_capacity(cpus as usize, GFP_KERNEL)?;
                    for cpu in (0..cpus).filter_map(CpuId::from_u32) {
                        let work = Opaque::uninit();
                        each.push(Worker { work, workers: this, cpu }, GFP_KERNEL)?;
                    }
                    for worker in &each {
                        // SAFETY: The work item has memory, which doesn't move any more.
                        unsafe { sys::obd_init_work(worker.work.get(), Some(Self::work_fn)) };
                    }
                    each
                },
                queue,
                list <- Lock::new(list, c"dm_overlaybd_workers", key),
            }),
            GFP_KERNEL,
        )
    }

    /// Queues `job`: a worker calls `run` with it in process context. `small` is the number of
    /// bytes to process, above 0, for a small job, which may overtake others. May be called in any
    /// context but NMI.
    ///
    /// Takes a pointer and not a reference, since `this` may be freed before the call returns.
    ///
    /// # Safety
    ///
    /// `job` is valid, isn't queued, and belongs to `this` until `run` is called. Any thread may
    /// call `run` with it once. `this` is valid at least until then. It must not be dropped by one
    /// of its workers, because dropping waits for them.
    pub(crate) unsafe fn push(
        this: NonNull<Self>,
        mut job: NonNull<Job>,
        small: Option<u32>,
        run: unsafe fn(NonNull<Job>),
    ) {
        // SAFETY: The caller's promise.
        unsafe { job.as_mut() }.run = Some(run);
        // SAFETY: The caller's promise. No worker can take a job, and so `this` stays valid, until
        // the lock is released.
        let lock = unsafe { &(*this.as_ptr()).list };
        let mut list = lock.lock();
        // SAFETY: The caller's promise; the worker that `wake` chooses is queued below.
        unsafe { list.push(job, small) };
        let chosen = list.wake(CpuId::current());
        if let Some(cpu) = chosen {
            // With the lock held, as `this` may be freed once it is released.
            // SAFETY: As above.
            let this = unsafe { this.as_ref() };
            // INVARIANT: A worker that was idle isn't queued, so this always queues it.
            this.queue_worker(cpu);
        }
    }

    /// Queues the worker of `cpu`. If the CPU goes offline, the workqueue runs it on another one.
    fn queue_worker(&self, cpu: CpuId) {
        if let Some(worker) = self.each.get(cpu.as_u32() as usize) {
            let (queue, work) = (self.queue.0.as_ptr(), worker.work.get());
            // SAFETY: By the type invariant queue and work are valid; `cpu` is or was online.
            unsafe { sys::queue_work_on(cpu.into(), queue, work) };
        }
    }

    /// The function of a worker: runs up to [`BATCH`] jobs. If there are more, queues a worker for
    /// them, usually itself, after the other work items of its CPU.
    ///
    /// # Safety
    ///
    /// `work` is that of a [`Worker`]. Its [`Workers`] isn't dropped before this function has
    /// returned.
    unsafe extern "C" fn work_fn(work: *mut sys::work_struct) {
        // SAFETY: The work item is the first field of a worker.
        let worker = unsafe { &*work.cast::<Worker>() };
        // SAFETY: The caller's promise, and the type invariant.
        let this = unsafe { worker.workers.as_ref() };
        for _ in 0..BATCH {
            let job = this.list.lock().pop(worker.cpu);
            let Some(job) = job else { return };
            // SAFETY: By the type invariant of the list, its jobs are valid.
            if let Some(run) = unsafe { job.as_ref() }.run {
                // SAFETY: The caller of `push` has promised that this may be called.
                unsafe { run(job) };
            }
            // SAFETY: This is process context, and no lock is held.
            unsafe { sys::obd_cond_resched_tasks_rcu_qs() };
        }
        let mut list = this.list.lock();
        // INVARIANT: A worker that was idle isn't queued, so this always queues it. The chosen
        // worker may be this one: it counts as idle from here on, and runs once more after it has
        // returned.
        if let Some(cpu) = list.pass(worker.cpu) {
            this.queue_worker(cpu);
        }
    }
}

#[pinned_drop]
impl PinnedDrop for Workers {
    fn drop(self: Pin<&mut Self>) {
        // No job is left. But a worker may be about to return, and still use `self`, or may be
        // queued once more.
        for worker in &self.each {
            // SAFETY: By the type invariant the work is initialised. This waits for it, and nothing
            // queues it any more.
            unsafe { sys::cancel_work_sync(worker.work.get()) };
        }
    }
}
