// SPDX-License-Identifier: GPL-2.0

//! Work on several threads, with results and errors that don't depend on their number.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Mutex;

use rayon::prelude::*;

/// Calls `each` for the items, on the threads of rayon's pool, at most `most` of them. Returns the results in the
/// order of the items, up to the first error in this order; the caller must not use results after an error. `init`
/// makes a state for each thread.
///
/// The threads take the items in order, and none after an error. So the items before the one that failed have all
/// begun; they are completed, since one of them may fail, too.
///
/// # Panics
///
/// If `init`, `each` or the iterator panics.
pub fn map<T, S, R: Send, E: Send>(
    items: impl Iterator<Item = T> + Send,
    most: usize,
    init: impl Fn() -> S + Sync,
    each: impl Fn(&mut S, T) -> Result<R, E> + Sync,
) -> impl Iterator<Item = Result<R, E>> {
    let items = Mutex::new(items.enumerate());
    let next = || items.lock().ok()?.next();
    let failed = AtomicBool::new(false);
    let work = |_| {
        let mut state = init();
        let mut results = Vec::new();
        while !failed.load(Ordering::Relaxed) {
            let Some((nth, item)) = next() else {
                break;
            };
            let result = each(&mut state, item);
            if result.is_err() {
                failed.store(true, Ordering::Relaxed);
            }
            results.push((nth, result));
        }
        results
    };
    let threads = rayon::current_num_threads().min(most).max(1);
    let shares = (0..threads).into_par_iter().with_max_len(1).map(work);
    let shares: Vec<_> = shares.collect();
    let mut results: Vec<_> = shares.into_iter().flatten().collect();
    results.sort_unstable_by_key(|&(nth, _)| nth);
    results.into_iter().map(|(_, result)| result)
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::time::Duration;

    use rayon::{ThreadPoolBuildError, ThreadPoolBuilder};

    use super::map;

    #[test]
    fn the_first_error_in_order_wins() -> Result<(), ThreadPoolBuildError> {
        for threads in [1, 2, 5] {
            let pool = ThreadPoolBuilder::new().num_threads(threads).build()?;
            let calls = AtomicUsize::new(0);
            let each = |_: &mut (), nth: usize| {
                calls.fetch_add(1, Ordering::Relaxed);
                match nth {
                    // The first one to fail in order is the last one in time.
                    300 => {
                        std::thread::sleep(Duration::from_millis(50));
                        Err(nth)
                    }
                    301.. => Err(nth),
                    _ => Ok(2 * nth),
                }
            };
            let with = |len: usize| {
                pool.install(|| map(0..len, 9, || (), each).collect::<Result<Vec<_>, _>>())
            };
            assert_eq!(with(0), Ok(Vec::new()));
            assert_eq!(with(300), Ok((0..300).map(|nth| 2 * nth).collect()));
            calls.store(0, Ordering::Relaxed);
            assert_eq!(with(100_000), Err(300));
            let calls = calls.load(Ordering::Relaxed);
            assert!((301..=300 + threads).contains(&calls), "{calls}");
        }
        Ok(())
    }

    #[test]
    fn not_more_threads_than_wanted() -> Result<(), ThreadPoolBuildError> {
        let pool = ThreadPoolBuilder::new().num_threads(5).build()?;
        let (now, most) = <(AtomicUsize, AtomicUsize)>::default();
        let each = |_: &mut (), _| {
            most.fetch_max(now.fetch_add(1, Ordering::Relaxed) + 1, Ordering::Relaxed);
            std::thread::sleep(Duration::from_millis(1));
            now.fetch_sub(1, Ordering::Relaxed);
            Ok::<_, ()>(())
        };
        let done = pool.install(|| map(0..50, 2, || (), each).count());
        assert_eq!(done, 50);
        assert!(most.into_inner() <= 2);
        Ok(())
    }
}
