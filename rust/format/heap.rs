// SPDX-License-Identifier: GPL-2.0

//! A binary heap in a slice. The first item is the smallest one.

/// Reorders the items of `heap` so that they are a heap.
pub fn make<T: Copy + PartialOrd>(heap: &mut [T]) {
    for at in (0..heap.len() / 2).rev() {
        if let Some(&item) = heap.get(at) {
            sift_down(heap, at, item);
        }
    }
}

/// Replaces the first item of `heap` by `item`, or removes the first item if `item` is `None`.
/// Returns the heap with the remaining items.
pub fn replace_first<T: Copy + PartialOrd>(heap: &mut [T], item: Option<T>) -> &mut [T] {
    let (heap, item) = match (item, heap.split_last_mut()) {
        (Some(_), _) | (None, None) => (heap, item),
        (None, Some(_)) => {
            let last = heap.len() - 1;
            let (rest, removed) = heap.split_at_mut(last);
            (rest, removed.first().copied())
        }
    };
    let Some(item) = item else {
        return heap;
    };
    sift_down(heap, 0, item);
    heap
}

/// Puts `item` at index `at` of `heap`. As long as a child is smaller than `item`, moves the
/// smallest child up, and `item` down to the child's place.
fn sift_down<T: Copy + PartialOrd>(heap: &mut [T], mut at: usize, item: T) {
    loop {
        let left = 2 * at + 1;
        let (child, &smaller) = match (heap.get(left), heap.get(left + 1)) {
            (Some(a), Some(b)) if b < a => (left + 1, b),
            (Some(a), _) => (left, a),
            (None, _) => break,
        };
        match heap.get_mut(at) {
            Some(slot) if smaller < item => *slot = smaller,
            _ => break,
        }
        at = child;
    }
    if let Some(slot) = heap.get_mut(at) {
        *slot = item;
    }
}
