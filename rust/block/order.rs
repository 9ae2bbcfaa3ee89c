// SPDX-License-Identifier: GPL-2.0

//! The order in which the workers of a device take jobs from its two queues: that of the small jobs
//! and that of the others.
//!
//! - Each queue is FIFO.
//! - A small job overtakes the jobs of the other queue, until small jobs of [`SHARE`] bytes or more
//!   have overtaken the first of these. Then that job has its turn.
//! - A small job never waits for a job that was queued later.
//!
//! This code decides from numbers only. It makes no kernel calls, allocates nothing, and has no
//! `unsafe`; the lists are in `workers.rs`. A test of the user-space library includes this file:
//! `tools/overlaybd/tests/order.rs`.

#![forbid(unsafe_code)]

/// Number of bytes of small jobs after which the first of the other jobs has its turn.
pub(crate) const SHARE: u32 = 128 << 10;

/// One of the two queues.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// The queue of the small jobs.
    Small,
    /// The queue of the other jobs.
    Other,
}

/// What decides when a job has its turn.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Ticket {
    /// Number of jobs that were queued before it, in both queues.
    order: u64,
    /// Number of bytes to process, if the job is small.
    small: Option<u32>,
}

impl Ticket {
    /// Makes the ticket of a job that isn't queued.
    pub(crate) const fn none() -> Self {
        Self {
            order: 0,
            small: None,
        }
    }

    /// Returns the queue to which the job belongs.
    pub(crate) fn kind(self) -> Kind {
        match self.small {
            Some(_) => Kind::Small,
            None => Kind::Other,
        }
    }
}

/// Gives a ticket to each job, and decides which job is next.
pub(crate) struct Turns {
    /// Number of tickets given so far.
    queued: u64,
    /// Bytes of small jobs that have overtaken the first other job.
    overtaken: u32,
}

impl Turns {
    /// Makes the state for two empty queues.
    pub(crate) const fn new() -> Self {
        Self {
            queued: 0,
            overtaken: 0,
        }
    }

    /// Returns the ticket of a job that is queued now. `small` is the number of bytes to process,
    /// above 0, if the job is small.
    pub(crate) fn ticket(&mut self, small: Option<u32>) -> Ticket {
        let order = self.queued;
        self.queued += 1;
        Ticket { order, small }
    }

    /// Returns the queue whose first job is next; `None` if both are empty. The caller must remove
    /// that job from the queue. `small` and `other` are the tickets of the first small job and of
    /// the first other one.
    pub(crate) fn next(&mut self, small: Option<Ticket>, other: Option<Ticket>) -> Option<Kind> {
        match (small, other) {
            (Some(small), Some(other)) if small.order < other.order => Some(Kind::Small),
            (Some(small), Some(_)) if self.overtaken < SHARE => {
                let bytes = small.small.unwrap_or(0);
                self.overtaken = self.overtaken.saturating_add(bytes);
                Some(Kind::Small)
            }
            (_, Some(_)) => {
                self.overtaken = 0;
                Some(Kind::Other)
            }
            (Some(_), None) => Some(Kind::Small),
            (None, None) => None,
        }
    }
}
