// SPDX-License-Identifier: GPL-2.0

//! What the fuzz targets share: sparse blobs, the memory that is used, seeds, images for tests.
//!
//! An input of a target is a few integers, little-endian, that say how to make the image, and then
//! bytes of it. Checksums are made right on demand, so that they stop nobody.

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

/// What `work` gives, and the most bytes of memory that it had at once. C libraries don't count.
pub fn memory<T>(work: impl FnOnce() -> T) -> (T, usize) {
    let before = ALLOCATOR.current_usage();
    ALLOCATOR.reset_peak_usage();
    let result = work();
    (result, ALLOCATOR.peak_usage().saturating_sub(before))
}

/// To be called once, before anything else: keeps all work in this thread. Where the environment
/// says `OBD_SEEDS=DIR`, writes the seeds of the target there; run it with `-runs=0` then.
pub fn init(seeds: impl FnOnce() -> Vec<Vec<u8>>) {
    // Overflow checks come with them.
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
