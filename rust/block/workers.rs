// SPDX-License-Identifier: GPL-2.0

//! Workers of a device: one for each CPU. They take jobs from one list, and make progress without
//! memory.
//!
//! A job wakes the worker of the CPU that it comes from. Where that is at work already, it wakes
//! another one, so that the parts of a large read are worked on by several CPUs. Who is done takes
//! what is next, wherever it came from. CPUs that are isolated from the scheduler are left alone.
//!
//! Lock order: the list's lock, then the workqueue's own. Both are taken in any context.
//!
//! C header: `include/linux/workqueue.h`.

use core::ptr::NonNull;

use kernel::prelude::*;
use kernel::types::Opaque;

use super::Lock;
use crate::sys;

/// Workers that aren't at work and are looked at, at most, to find one for a job.
const TRIES: usize = 8;

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

/// Jobs, first in, first out, and who is at work on them.
///
/// # Invariants
///
/// `first` starts a list of queued jobs, linked by `next`; `last` is its end where it isn't empty.
/// All of them are valid, have a function that may be called with them, once and by any thread, and
/// belong to the list. While there are any, a worker is at work, or is about to be woken by who has
/// the lock: it looks at the list once more before it isn't.
///
/// `busy` says of each worker whether it is at work; `idle` is the number of those that aren't.
struct List {
    first: *mut Job,
    last: *mut Job,
    busy: KVec<bool>,
    idle: usize,
}

// SAFETY: By the type invariant, jobs may be done by any thread.
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

    /// Chooses who is to be woken for one job more: `here`, an online CPU, or the next one that
    /// isn't at work. `None` where others are.
    fn wake(&mut self, here: usize) -> Option<usize> {
        let count = self.busy.len();
        if self.idle == 0 {
            return None;
        }
        let all = Iterator::chain(here..count, 0..here);
        let nth = all
            .filter(|&nth| self.busy.get(nth) == Some(&false))
            // Not for long: interrupts are off.
            .take(TRIES)
            .find(|&nth| takes_work(nth))
            // Somebody has to do it.
            .or_else(|| (self.idle == count).then_some(here))?;
        *self.busy.get_mut(nth)? = true;
        self.idle -= 1;
        Some(nth)
    }

    /// Gives worker `nth` the first one. Where there is none, it isn't at work any more.
    fn pop(&mut self, nth: usize) -> Option<NonNull<Job>> {
        let Some(job) = NonNull::new(self.first) else {
            // INVARIANT: There are no jobs.
            if let Some(busy) = self.busy.get_mut(nth) {
                *busy = false;
                self.idle += 1;
            }
            return None;
        };
        // SAFETY: By the type invariant it is valid.
        self.first = unsafe { job.as_ref() }.next;
        Some(job)
    }
}

/// Whether a CPU is online and isn't isolated. It may go offline; then others do its works.
fn takes_work(cpu: usize) -> bool {
    // SAFETY: May be called with any number below `nr_cpu_ids`.
    unsafe { sys::obd_cpu_takes_work(cpu as u32) }
}

/// A CPU's worker.
#[repr(C)]
struct Worker {
    work: Opaque<sys::work_struct>,
    workers: NonNull<Workers>,
    /// Its number, that of its CPU.
    nth: usize,
}

/// The workers of a device.
///
/// # Invariants
///
/// `queue` is a valid workqueue, owned by this. `each` has an initialised worker for each number
/// below `nr_cpu_ids`, whose `workers` is this and whose `nth` is that number.
#[pin_data(PinnedDrop)]
pub(crate) struct Workers {
    queue: NonNull<sys::workqueue_struct>,
    each: KVec<Worker>,
    #[pin]
    list: Lock<List>,
}

// SAFETY: Workqueues and works are used from any thread.
unsafe impl Send for Workers {}
// SAFETY: As above; the list is behind a lock.
unsafe impl Sync for Workers {}

impl Workers {
    /// Makes workers, with a name that `ps` shows.
    ///
    /// # Errors
    ///
    /// [`ENOMEM`].
    pub(crate) fn new(name: &CStr) -> Result<Pin<KBox<Self>>> {
        let flags =
            sys::wq_flags_WQ_MEM_RECLAIM | sys::wq_flags_WQ_PERCPU | sys::wq_flags_WQ_CPU_INTENSIVE;
        let cpus = kernel::cpu::nr_cpu_ids() as usize;
        // INVARIANT: The list is empty.
        let list = List {
            first: core::ptr::null_mut(),
            last: core::ptr::null_mut(),
            busy: KVec::from_elem(false, cpus, GFP_KERNEL)?,
            idle: cpus,
        };
        let key = kernel::static_lock_class!();
        KBox::try_pin_init(
            try_pin_init!(&this in Self {
                each: {
                    let mut each = KVec::with_capacity(cpus, GFP_KERNEL)?;
                    for nth in 0..cpus {
                        let work = Opaque::uninit();
                        each.push(Worker { work, workers: this, nth }, GFP_KERNEL)?;
                    }
                    for worker in &each {
                        // SAFETY: There is memory for it, which doesn't move any more.
                        unsafe { sys::obd_init_work(worker.work.get(), Some(Self::work_fn)) };
                    }
                    each
                },
                // SAFETY: `name` is a C string; it is copied.
                queue: NonNull::new(unsafe { sys::obd_alloc_workqueue(name.as_char_ptr(), flags) })
                    .ok_or(ENOMEM)?,
                list <- Lock::new(list, c"dm_overlaybd_workers", key),
            }),
            GFP_KERNEL,
        )
    }

    /// Has a worker call `run` with `job`, in process context. May be called in any context but NMI.
    ///
    /// # Safety
    ///
    /// `job` is valid, isn't queued, and belongs to these workers until `run` is called. `run` may
    /// be called with it, once and by any thread. These workers stay at least until then; they are
    /// dropped by none of theirs, which are waited for.
    pub(crate) unsafe fn push(&self, mut job: NonNull<Job>, run: unsafe fn(NonNull<Job>)) {
        // SAFETY: The caller's promise.
        unsafe { job.as_mut() }.run = Some(run);
        let mut list = self.list.lock();
        // SAFETY: The caller's promise; whom `wake` chooses is woken below.
        unsafe { list.push(job) };
        // Under the lock: once it is given back the job may be done, and all of this be gone. Who has
        // it stays on its CPU, too, which so is online.
        let chosen = list
            .wake(super::this_cpu())
            .and_then(|nth| self.each.get(nth));
        if let Some(worker) = chosen {
            let (cpu, work) = (worker.nth as kernel::ffi::c_int, worker.work.get());
            // INVARIANT: A worker that wasn't at work isn't queued, so this can't but wake it.
            // SAFETY: By the type invariant queue and work are valid; the CPU has been online.
            unsafe { sys::queue_work_on(cpu, self.queue.as_ptr(), work) };
        }
    }

    /// What a worker runs.
    ///
    /// # Safety
    ///
    /// `work` is that of a [`Worker`], whose workers aren't dropped before this has returned.
    unsafe extern "C" fn work_fn(work: *mut sys::work_struct) {
        // SAFETY: The work is the first field of a worker.
        let worker = unsafe { &*work.cast::<Worker>() };
        // SAFETY: The caller's promise, and the type invariant.
        let this = unsafe { worker.workers.as_ref() };
        loop {
            let job = this.list.lock().pop(worker.nth);
            let Some(job) = job else { break };
            // SAFETY: What was in the list is valid.
            if let Some(run) = unsafe { job.as_ref() }.run {
                // SAFETY: Who has pushed the job has promised that this may be called.
                unsafe { run(job) };
            }
            // SAFETY: This is process context.
            unsafe { sys::obd_cond_resched() };
        }
    }
}

#[pinned_drop]
impl PinnedDrop for Workers {
    fn drop(self: Pin<&mut Self>) {
        // A worker may be about to return, with a reference to this, which is why it must be pinned.
        // SAFETY: By the type invariant it is valid and ours. This waits for workers.
        unsafe { sys::destroy_workqueue(self.queue.as_ptr()) };
    }
}
