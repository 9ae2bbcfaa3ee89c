// SPDX-License-Identifier: GPL-2.0

//! Shared by the fuzz targets: sparse blobs, measuring memory, seeds, test images.
//!
//! An input of a target is a few little-endian integers that say how to make the image, followed by
//! bytes of the image. Bits of these integers select checksums to correct, so that inputs get past
//! the checks of checksums.

#![allow(clippy::expect_used)]

use std::path::Path;

use peak_alloc::PeakAlloc;

#[path = "../../overlaybd/tests/common/mod.rs"]
pub mod common;
pub mod parts;

pub use common::sparse::Sparse;
pub use parts::Parts;

#[global_allocator]
static ALLOCATOR: PeakAlloc = PeakAlloc;

/// Runs `work`. Returns its result and its peak memory in bytes. Memory of C libraries doesn't
/// count.
pub fn memory<T>(work: impl FnOnce() -> T) -> (T, usize) {
    let before = ALLOCATOR.current_usage();
    ALLOCATOR.reset_peak_usage();
    let result = work();
    (result, ALLOCATOR.peak_usage().saturating_sub(before))
}

/// Restricts all work to this thread. Call it once, before anything else. With the environment
/// variable `OBD_SEEDS=DIR`, it also writes the seeds of the target to DIR; run the target with
/// `-runs=0` then.
pub fn init(seeds: impl FnOnce() -> Vec<Vec<u8>>) {
    // Debug builds have overflow checks, too.
    assert!(cfg!(debug_assertions), "build with debug assertions");
    rayon::ThreadPoolBuilder::new()
        .num_threads(1)
        .use_current_thread()
        .build_global()
        .expect("the first pool");
    let Some(dir) = std::env::var_os("OBD_SEEDS") else {
        return;
    };
    for (nth, seed) in seeds().iter().enumerate() {
        let path = Path::new(&dir).join(format!("seed-{nth:02}"));
        std::fs::write(path, seed).expect("seeds can be written");
    }
}
