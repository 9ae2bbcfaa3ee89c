// SPDX-License-Identifier: GPL-2.0

//! Workers of a device: one for each CPU. They take jobs from one list, and make progress without
//! memory.
//!
//! The workers of many devices share a [`Queue`]. Its thread in reserve runs them, one after the
//! other, if there is no memory for other threads. So a worker must never wait for a worker of the
//! same queue. What one may wait for:
//!
//! - A codec context. Its holder waits for nothing.
//! - The end of an I/O, where what is above may do its own work. It is called as if from an interrupt
//!   (`bio_in_atomic()` is true), so it must not wait. Otherwise erofs would decompress in the call,
//!   and wait for memory.
//! - Submission of a lower read, for tags and memory of the lower device. Devices whose lower device
//!   may lie on one of ours have queues of their own: see `Device::may_stack`.
//! - The budget of the control group that a lower read is charged to, where the lower disk has
//!   `io.cost` or `io.latency`: only reads that a worker submits, after memory was short or a shared
//!   load failed. Other devices are held up for as long as there is no memory for threads either.
//!
//! If there is memory, a worker that waits holds up no other one, as each has a thread of its own.
//!
//! A job wakes the worker of the CPU that it comes from. If that one is busy, the job wakes the next
//! idle one, so that several CPUs work on the parts of a large read. A worker takes the next job of
//! the list, whichever CPU it came from. CPUs that are offline or isolated (`isolcpus=`,
//! `nohz_full=`, isolated cpuset partitions) are not woken.
//!
//! Lock order: the list's lock, then the workqueue's own. Both are taken in any context.
//!
//! C headers: `include/linux/workqueue.h`, `include/linux/cpumask.h`,
//! `include/linux/sched/isolation.h`.

use core::ptr::NonNull;

use kernel::cpu::CpuId;
use kernel::cpumask::CpumaskVar;
use kernel::prelude::*;
use kernel::sync::Arc;
use kernel::types::Opaque;

use super::Lock;
use crate::sys;

/// Jobs that a worker does before others of its CPU have a turn.
const BATCH: usize = 64;

/// Something to do, in the memory of who wants it done.
pub(crate) struct Job {
    next: *mut Job,
    run: Option<unsafe fn(NonNull<Job>)>,
}

impl Job {
    /// A job that isn't queued.
    pub(crate) const fn new() -> Self {
        Self {
            next: core::ptr::null_mut(),
            run: None,
        }
    }
}

/// Jobs, first in, first out, and which workers are idle.
///
/// # Invariants
///
/// `first` starts a list of queued jobs, linked by `next`; `last` is its end unless it is empty.
/// All of them are valid, have a function that may be called with them, once and by any thread, and
/// belong to the list. While there are any, `busy` isn't 0, or the holder of the lock is about to
/// wake a worker: a worker looks at the list once more before it becomes idle.
///
/// `idle` has the CPUs whose worker is neither running nor queued; `busy` is the number of the other
/// workers.
struct List {
    first: *mut Job,
    last: *mut Job,
    idle: KBox<CpumaskVar>,
    busy: usize,
    /// Memory to compute with.
    scratch: KBox<CpumaskVar>,
}

// SAFETY: By the type invariant, any thread may do the jobs; CPU masks are plain memory.
unsafe impl Send for List {}

impl List {
    /// Puts a job at the end.
    ///
    /// # Safety
    ///
    /// `job` is valid, has a function that may be called with it, once and by any thread, and
    /// belongs to the list now. If nobody is at work, the caller wakes a worker under the lock.
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

    /// Chooses the worker to wake for a new job from CPU `here`: that of `here`, or the next idle one
    /// of a CPU that is online and not isolated. `None` if there is none, as others are busy then.
    ///
    /// Must be called with interrupts off on `here`, so that no CPU can leave the online ones.
    fn wake(&mut self, here: CpuId) -> Option<CpuId> {
        let scratch = self.scratch.as_raw();
        // SAFETY: Both masks are valid, and no two references exist to the one that is written to.
        let cpu = unsafe { sys::obd_cpu_for_work(self.idle.as_raw(), scratch, here.as_u32()) };
        let cpu = CpuId::from_u32(cpu)
            // All housekeeping CPUs are offline: one has to do the job.
            .or_else(|| (self.busy == 0).then_some(here))?;
        self.idle.clear(cpu);
        self.busy += 1;
        Some(cpu)
    }

    /// Takes the first job, for the worker of `cpu`. If there is none, that worker becomes idle.
    fn pop(&mut self, cpu: CpuId) -> Option<NonNull<Job>> {
        let Some(job) = NonNull::new(self.first) else {
            // INVARIANT: There are no jobs.
            self.idle.set(cpu);
            self.busy -= 1;
            return None;
        };
        // SAFETY: By the type invariant it is valid.
        self.first = unsafe { job.as_ref() }.next;
        Some(job)
    }

    /// Makes the worker of `cpu` idle, though there may be jobs. Chooses the worker to wake for them:
    /// another one if that CPU has been isolated or has gone offline.
    fn pass(&mut self, cpu: CpuId) -> Option<CpuId> {
        self.idle.set(cpu);
        self.busy -= 1;
        if self.first.is_null() {
            return None;
        }
        self.wake(CpuId::current())
    }
}

/// A workqueue with a thread in reserve, for the workers of any number of devices.
///
/// # Invariants
///
/// Is a valid workqueue, owned by this.
pub(crate) struct Queue(NonNull<sys::workqueue_struct>);

// SAFETY: Workqueues are used from any thread.
unsafe impl Send for Queue {}
// SAFETY: As above.
unsafe impl Sync for Queue {}

impl Queue {
    /// Makes a workqueue, with a name that `ps` shows.
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
        // SAFETY: By the type invariant it is valid and ours; no worker of it is left.
        unsafe { sys::destroy_workqueue(self.0.as_ptr()) };
    }
}

/// A CPU's worker.
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

// SAFETY: Works are used from any thread.
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
        // Without CONFIG_CPUMASK_OFFSTACK, a mask of its own must not be moved; in a box the list may be.
        let mask = || KBox::new(CpumaskVar::new_zero(GFP_KERNEL)?, GFP_KERNEL);
        let mut idle = mask()?;
        idle.setall();
        // INVARIANT: The list is empty, and no worker is queued.
        let list = List {
            first: core::ptr::null_mut(),
            last: core::ptr::null_mut(),
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
                        // SAFETY: There is memory for it, which doesn't move any more.
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

    /// Has a worker call `run` with `job`, in process context. May be called in any context but NMI.
    ///
    /// Takes a pointer, since `this` may be gone when the call returns.
    ///
    /// # Safety
    ///
    /// `job` is valid, isn't queued, and belongs to `this` until `run` is called. `run` may be
    /// called with it, once and by any thread. `this` is valid at least until then; it is dropped by
    /// none of its workers, which are waited for.
    pub(crate) unsafe fn push(
        this: NonNull<Self>,
        mut job: NonNull<Job>,
        run: unsafe fn(NonNull<Job>),
    ) {
        // SAFETY: The caller's promise.
        unsafe { job.as_mut() }.run = Some(run);
        // SAFETY: The caller's promise. No job can be taken, and so `this` stays, until the lock is
        // released.
        let lock = unsafe { &(*this.as_ptr()).list };
        let mut list = lock.lock();
        // SAFETY: The caller's promise; the worker that `wake` chooses is queued below.
        unsafe { list.push(job) };
        let chosen = list.wake(CpuId::current());
        if let Some(cpu) = chosen {
            // Under the lock, as `this` may be gone after it.
            // SAFETY: As above.
            let this = unsafe { this.as_ref() };
            // INVARIANT: A worker that was idle isn't queued, so this always queues it.
            this.queue_worker(cpu);
        }
    }

    /// Queues the worker of `cpu`. If the CPU goes offline, the workqueue runs it elsewhere.
    fn queue_worker(&self, cpu: CpuId) {
        if let Some(worker) = self.each.get(cpu.as_u32() as usize) {
            let (queue, work) = (self.queue.0.as_ptr(), worker.work.get());
            // SAFETY: By the type invariant queue and work are valid; `cpu` is or was online.
            unsafe { sys::queue_work_on(cpu.into(), queue, work) };
        }
    }

    /// What a worker runs: some jobs. If there are more, it queues a worker for them, usually itself,
    /// behind whatever else the workqueue has to run on its CPU.
    ///
    /// # Safety
    ///
    /// `work` is that of a [`Worker`], whose workers aren't dropped before this has returned.
    unsafe extern "C" fn work_fn(work: *mut sys::work_struct) {
        // SAFETY: The work is the first field of a worker.
        let worker = unsafe { &*work.cast::<Worker>() };
        // SAFETY: The caller's promise, and the type invariant.
        let this = unsafe { worker.workers.as_ref() };
        for _ in 0..BATCH {
            let job = this.list.lock().pop(worker.cpu);
            let Some(job) = job else { return };
            // SAFETY: What was in the list is valid.
            if let Some(run) = unsafe { job.as_ref() }.run {
                // SAFETY: The pusher of the job has promised that this may be called.
                unsafe { run(job) };
            }
            // SAFETY: This is process context, without locks.
            unsafe { sys::obd_cond_resched_tasks_rcu_qs() };
        }
        let mut list = this.list.lock();
        // INVARIANT: A worker that was idle isn't queued, so this always queues it. This one may be:
        // it counts as idle from here on, and is run once more after it has returned.
        if let Some(cpu) = list.pass(worker.cpu) {
            this.queue_worker(cpu);
        }
    }
}

#[pinned_drop]
impl PinnedDrop for Workers {
    fn drop(self: Pin<&mut Self>) {
        // No job is left, but a worker may be about to return, with a reference to this, or be
        // queued once more.
        for worker in &self.each {
            // SAFETY: By the type invariant the work is initialised. This waits for it, and nothing
            // queues it any more.
            unsafe { sys::cancel_work_sync(worker.work.get()) };
        }
    }
}
