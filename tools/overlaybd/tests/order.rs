// SPDX-License-Identifier: GPL-2.0

//! Tests the order in which the workers of the kernel module take jobs: by examples, and with
//! random jobs. What is expected of these is computed from the history of the jobs, and shares no
//! state with the module's code.

#![allow(missing_docs, clippy::unwrap_used)]

// The build of the kernel module runs clippy on this file, with the kernel's choice of lints, and
// uses all of it.
#[allow(clippy::all, dead_code)]
#[path = "../../../rust/block/order.rs"]
mod order;

use std::collections::VecDeque;

use order::{Kind, Ticket, Turns};
use proptest::collection::vec;
use proptest::prelude::*;

const KIB: u32 = 1 << 10;

/// Number of bytes of small jobs after which another job has its turn, as documented.
const SHARE: u64 = 128 << 10;

/// A job: the number of its bytes if it is small, `None` for other jobs.
type Job = Option<u32>;

/// What happens to a device.
#[derive(Clone, Copy, Debug)]
enum Step {
    Queue(Job),
    Take,
}

/// What has happened to a job. Jobs have numbers, from 0, in the order in which they were queued.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Event {
    Queued(usize),
    Taken(usize),
}

/// A queue of `rust/block/workers.rs`, of job numbers.
type Fifo = VecDeque<(Ticket, usize)>;

/// The list of `rust/block/workers.rs`, with job numbers.
struct List {
    small: Fifo,
    others: Fifo,
    turns: Turns,
}

impl List {
    fn new() -> Self {
        Self {
            small: Fifo::new(),
            others: Fifo::new(),
            turns: Turns::new(),
        }
    }

    fn queue(&mut self, kind: Kind) -> &mut Fifo {
        match kind {
            Kind::Small => &mut self.small,
            Kind::Other => &mut self.others,
        }
    }

    fn push(&mut self, number: usize, job: Job) {
        let ticket = self.turns.ticket(job);
        self.queue(ticket.kind()).push_back((ticket, number));
    }

    fn next(&mut self) -> Option<usize> {
        let first = |queue: &Fifo| queue.front().map(|&(ticket, _)| ticket);
        let kind = self.turns.next(first(&self.small), first(&self.others))?;
        let (_, number) = self.queue(kind).pop_front().unwrap();
        Some(number)
    }
}

/// The jobs of a device, and what has happened to them.
#[derive(Debug)]
struct History {
    jobs: Vec<Job>,
    events: Vec<Event>,
}

impl History {
    /// Does `steps`, and then takes jobs until the list says that there are no more.
    fn new(steps: &[Step]) -> Self {
        let (mut list, mut jobs, mut events) = (List::new(), Vec::new(), Vec::new());
        for &step in steps {
            match step {
                Step::Queue(job) => {
                    events.push(Event::Queued(jobs.len()));
                    list.push(jobs.len(), job);
                    jobs.push(job);
                }
                Step::Take => events.extend(list.next().map(Event::Taken)),
            }
        }
        events.extend(std::iter::from_fn(|| list.next()).map(Event::Taken));
        Self { jobs, events }
    }

    /// Returns the bytes of job `number` if it is small, otherwise 0.
    fn bytes(&self, number: usize) -> u64 {
        self.jobs[number].unwrap_or(0).into()
    }

    fn is_small(&self, number: usize) -> bool {
        self.jobs[number].is_some()
    }

    /// Returns the numbers of the jobs that were taken, in this order.
    fn taken(&self) -> Vec<usize> {
        let taken = |event: &Event| match *event {
            Event::Taken(number) => Some(number),
            Event::Queued(_) => None,
        };
        self.events.iter().filter_map(taken).collect()
    }

    /// Returns the jobs that were waiting before event `at`, in the order in which they were
    /// queued.
    fn waiting(&self, at: usize) -> Vec<usize> {
        let (before, rest) = self.events.split_at(at);
        let queued = (0..self.jobs.len()).filter(|&job| before.contains(&Event::Queued(job)));
        queued
            .filter(|&job| rest.contains(&Event::Taken(job)))
            .collect()
    }

    /// Returns the bytes of small jobs that had overtaken `other` before event `at`, since it was
    /// the first of its queue.
    fn overtaken(&self, other: usize, at: usize) -> u64 {
        let queued_or_taken_before = |event: &Event| match *event {
            Event::Queued(number) => number == other,
            Event::Taken(number) => !self.is_small(number),
        };
        let before = &self.events[..at];
        let first = before.iter().rposition(queued_or_taken_before).unwrap();
        let bytes = |event: &Event| match *event {
            Event::Taken(number) if number > other => self.bytes(number),
            _ => 0,
        };
        before[first..].iter().map(bytes).sum()
    }

    /// Returns each event at which a job is taken: its place, the job, and the jobs that wait.
    fn takings(&self) -> impl Iterator<Item = (usize, usize, Vec<usize>)> + '_ {
        let taken = move |(at, event): (usize, &Event)| match *event {
            Event::Taken(job) => Some((at, job, self.waiting(at))),
            Event::Queued(_) => None,
        };
        self.events.iter().enumerate().filter_map(taken)
    }
}

/// Returns in which order `jobs` are taken if all are queued first.
fn order_of(jobs: &[Job]) -> Vec<Job> {
    let steps: Vec<Step> = jobs.iter().copied().map(Step::Queue).collect();
    let taken = History::new(&steps).taken();
    taken.into_iter().map(|number| jobs[number]).collect()
}

/// Returns `count` small jobs of `kib` KiB.
fn small(kib: u32, count: usize) -> Vec<Job> {
    vec![Some(kib * KIB); count]
}

/// A job that isn't small.
const OTHER: [Job; 1] = [None];

#[test]
fn share_is_as_documented() {
    assert_eq!(u64::from(order::SHARE), SHARE);
}

#[test]
fn nothing_waits() {
    assert!(order_of(&[]).is_empty());
    assert_eq!(order_of(&small(4, 1)), small(4, 1));
    assert_eq!(order_of(&OTHER), OTHER);
}

/// This fails if there is one queue only.
#[test]
fn a_small_job_overtakes_all_others() {
    let jobs = [vec![None; 64], small(4, 1)].concat();
    assert_eq!(order_of(&jobs), [small(4, 1), vec![None; 64]].concat());
}

#[test]
fn others_have_their_turn() {
    let jobs = [&OTHER[..], &OTHER, &small(16, 20)].concat();
    let wanted = [
        &small(16, 8)[..],
        &OTHER,
        &small(16, 8),
        &OTHER,
        &small(16, 4),
    ]
    .concat();
    assert_eq!(order_of(&jobs), wanted);
}

/// The last job that overtakes may exceed the share.
#[test]
fn overtaking_ends_with_a_whole_job() {
    let jobs = [&OTHER[..], &small(60, 5)].concat();
    assert_eq!(
        order_of(&jobs),
        [&small(60, 3)[..], &OTHER, &small(60, 2)].concat()
    );
    let longest = vec![Some(u32::MAX); 3];
    let jobs = [&OTHER[..], &OTHER, &small(4, 1), &longest].concat();
    let (one, rest) = longest.split_at(1);
    let wanted = [&small(4, 1)[..], one, &OTHER, one, &OTHER, &rest[1..]].concat();
    assert_eq!(order_of(&jobs), wanted);
}

/// Small jobs that overtake nothing don't count.
#[test]
fn earlier_small_jobs_use_no_share() {
    let jobs = [&small(16, 50)[..], &OTHER, &small(16, 10)].concat();
    assert_eq!(
        order_of(&jobs),
        [&small(16, 58)[..], &OTHER, &small(16, 2)].concat()
    );
}

/// A small job that comes after each one that is taken does not keep another job waiting for ever.
#[test]
fn an_endless_stream_of_small_jobs() {
    let mut steps = vec![Step::Queue(None)];
    for _ in 0..100 {
        steps.extend([Step::Queue(Some(4 * KIB)), Step::Take]);
    }
    let taken = History::new(&steps).taken();
    assert_eq!(taken.iter().position(|&number| number == 0), Some(32));
}

/// Generates the bytes of a small job: usually a multiple of 4 KiB, so that the share is often used
/// up exactly.
fn length() -> impl Strategy<Value = u32> {
    prop_oneof![
        12 => (1..=16u32).prop_map(|pages| pages * 4 * KIB),
        6 => 1..=64 * KIB,
        1 => u32::MAX - 1..=u32::MAX,
    ]
}

/// Generates steps, in groups of equal ones.
fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        4 => length().prop_map(|bytes| Step::Queue(Some(bytes))),
        3 => Just(Step::Queue(None)),
        4 => Just(Step::Take),
    ];
    let groups = vec((step, 1..8usize), 0..40);
    groups.prop_map(|groups| {
        let groups = groups.into_iter();
        groups
            .flat_map(|(step, count)| vec![step; count])
            .collect::<Vec<_>>()
    })
}

proptest! {
    /// A worker finds a job while there is one, and each job is taken once.
    #[test]
    fn all_jobs_are_taken(steps in steps()) {
        let history = History::new(&steps);
        let mut taken = history.taken();
        taken.sort_unstable();
        prop_assert_eq!(taken, (0..history.jobs.len()).collect::<Vec<_>>());
        // Each step that takes a job has taken one, unless none was waiting.
        let (mut waiting, mut wanted) = (0, Vec::new());
        for step in &steps {
            match step {
                Step::Queue(_) => waiting += 1,
                Step::Take if waiting == 0 => continue,
                Step::Take => waiting -= 1,
            }
            wanted.push(matches!(step, Step::Take));
        }
        wanted.resize(wanted.len() + waiting, true);
        let is_taken = |event: &Event| matches!(event, Event::Taken(_));
        prop_assert_eq!(history.events.iter().map(is_taken).collect::<Vec<_>>(), wanted);
    }

    /// Jobs of one kind keep their order.
    #[test]
    fn each_kind_is_fifo(steps in steps()) {
        let history = History::new(&steps);
        for small in [false, true] {
            let taken = history.taken().into_iter();
            let kind: Vec<_> = taken.filter(|&job| history.is_small(job) == small).collect();
            prop_assert!(kind.is_sorted(), "{:?}", kind);
        }
    }

    /// A small job never waits for a job that was queued later.
    #[test]
    fn small_jobs_wait_for_earlier_ones_only(steps in steps()) {
        let history = History::new(&steps);
        for (_, job, waiting) in history.takings() {
            let first = waiting.into_iter().find(|&other| history.is_small(other));
            prop_assert!(first.is_none_or(|small| job <= small), "{:?} waits for {}", first, job);
        }
    }

    /// A small job overtakes only if less than the share has overtaken the first of the other jobs.
    #[test]
    fn overtaking_ends(steps in steps()) {
        let history = History::new(&steps);
        for (at, job, waiting) in history.takings() {
            let other = waiting.into_iter().find(|&other| !history.is_small(other));
            if let Some(other) = other.filter(|&other| other < job) {
                let bytes = history.overtaken(other, at);
                prop_assert!(bytes < SHARE, "{} overtakes {} after {} bytes", job, other, bytes);
            }
        }
    }

    /// No job is starved: the bytes that overtake it have a limit, which depends on the number of
    /// other jobs that were waiting before it.
    #[test]
    fn nothing_is_starved(steps in steps()) {
        let history = History::new(&steps);
        let longest = history.jobs.iter().flatten().max().copied().unwrap_or(0);
        let taken = history.taken();
        for other in (0..history.jobs.len()).filter(|&job| !history.is_small(job)) {
            let queued = history.events.iter().position(|&event| event == Event::Queued(other));
            let before = history.waiting(queued.unwrap());
            let before = before.into_iter().filter(|&job| !history.is_small(job)).count() as u64;
            let earlier = taken.iter().take_while(|&&job| job != other);
            let bytes = earlier.filter(|&&job| job > other).map(|&job| history.bytes(job));
            let limit = (before + 1) * (SHARE - 1 + u64::from(longest));
            prop_assert!(bytes.sum::<u64>() <= limit, "job {}", other);
        }
    }

    /// An other job is taken before a small one only after the share has overtaken it. This fails
    /// if there is one queue only.
    #[test]
    fn small_jobs_have_their_share(steps in steps()) {
        let history = History::new(&steps);
        for (at, job, waiting) in history.takings().filter(|&(_, job, _)| !history.is_small(job)) {
            if waiting.iter().any(|&other| history.is_small(other)) {
                let bytes = history.overtaken(job, at);
                prop_assert!(bytes >= SHARE, "{} is taken after {} bytes", job, bytes);
            }
        }
    }
}
