// SPDX-License-Identifier: GPL-2.0

//! The `zfile` target: a read-only device with the content of a compressed file.
//!
//! ```text
//! <start> <len> zfile <dev> <blob bytes | -> [<#opt_params> <opt_params>…]
//! ```
//!
//! - [`table`]: the table line and the status.
//! - [`io`]: the path of a read.
//! - [`cache`]: the cache of decompressed blocks.

mod cache;
mod io;
mod table;

use kernel::prelude::*;
use kernel::sync::atomic::{Atomic, Relaxed};
use kernel::sync::{new_mutex, Arc, Mutex};

use crate::block::{Counter, Pool, Shrinker, Tidier};
use crate::codec::Contexts;
use crate::dm;
use crate::format::zfile::{Algorithm, Geometry, JumpTable};

use cache::{Cache, Part};

/// State that all `zfile` targets share: the cache, the pool, and the codec contexts of each
/// algorithm, which are made with the first device that needs them.
#[pin_data]
pub(crate) struct Shared {
    /// Declared before the cache, so that it is unregistered before the cache is freed.
    _shrinker: Shrinker<Cache>,
    /// Armed when blocks were added to the cache. The pool has a tidier of its own.
    tidier: Pin<KBox<Tidier<Cache>>>,
    cache: Arc<Cache>,
    pool: Arc<Pool>,
    #[pin]
    lz4: Mutex<Option<Arc<Contexts>>>,
    #[pin]
    zstd: Mutex<Option<Arc<Contexts>>>,
}

impl Shared {
    /// Makes an empty cache and no contexts.
    ///
    /// # Errors
    ///
    /// [`ENOMEM`].
    pub(crate) fn new() -> Result<Arc<Self>> {
        let pool = Pool::new()?;
        let cache = Cache::new(pool.clone())?;
        Arc::pin_init(
            try_pin_init!(Self {
                _shrinker: Shrinker::new(cache.clone())?,
                tidier: Tidier::new(cache.clone())?,
                cache,
                pool,
                lz4 <- new_mutex!(None),
                zstd <- new_mutex!(None),
            }? Error),
            GFP_KERNEL,
        )
    }

    /// Returns the codec contexts of `algorithm`. Makes them for the first device that needs them;
    /// for later devices, adds those of CPUs that have come online since.
    ///
    /// # Errors
    ///
    /// [`ENOMEM`].
    fn contexts(&self, algorithm: Algorithm) -> Result<Arc<Contexts>> {
        let made = match algorithm {
            Algorithm::Lz4 => &self.lz4,
            Algorithm::Zstd => &self.zstd,
        };
        let there = made.lock().clone();
        if let Some(contexts) = there {
            contexts.fill()?;
            return Ok(contexts);
        }
        // Made without the lock, since allocation may wait long. If two threads do this at the same
        // time, the first result is kept, and the other one is freed.
        let contexts = Contexts::new(algorithm)?;
        Ok(made.lock().get_or_insert(contexts).clone())
    }
}

/// Which reads go through the cache.
#[derive(Clone, Copy, Default, PartialEq, Eq)]
enum Mode {
    /// Reads of a part of a block.
    #[default]
    Parts,
    /// All reads.
    All,
    /// No reads.
    None,
}

impl Mode {
    /// All modes, with their words in the status and in messages.
    const WORDS: [(Self, &'static CStr); 3] = [
        (Self::Parts, c"parts"),
        (Self::All, c"all"),
        (Self::None, c"none"),
    ];

    /// Returns the mode with the word `word`.
    fn from_word(word: &CStr) -> Option<Self> {
        let found = Self::WORDS.iter().find(|(_, name)| *name == word);
        found.map(|&(mode, _)| mode)
    }

    /// Returns the word of the mode.
    fn word(self) -> &'static str {
        let found = Self::WORDS.iter().find(|&&(mode, _)| mode == self);
        found
            .and_then(|(_, name)| name.to_str().ok())
            .unwrap_or("-")
    }
}

/// The mode of a device. A message may change it while reads are mapped.
struct Modes {
    /// The mode in the table line.
    own: Mode,
    now: Atomic<u32>,
}

impl Modes {
    fn new(own: Mode) -> Self {
        Self {
            own,
            now: Atomic::new(own as u32),
        }
    }

    /// Returns the current mode.
    fn get(&self) -> Mode {
        let now = self.now.load(Relaxed);
        let found = Mode::WORDS.iter().find(|&&(mode, _)| mode as u32 == now);
        found.map_or(self.own, |&(mode, _)| mode)
    }

    fn set(&self, mode: Mode) {
        self.now.store(mode as u32, Relaxed);
    }
}

/// A `zfile` target.
pub(crate) struct Zfile {
    contexts: Arc<Contexts>,
    geometry: Geometry,
    table: JumpTable<KVVec<u64>, KVVec<u16>>,
    /// Start of the ZFile on its lower device in bytes: after the tar header, or 0.
    start: u64,
    /// Length of a logical block of the lower device in bytes, a power of two.
    device_block: u64,
    /// Length of the blob in bytes, if the table line has it.
    blob_bytes: Option<u64>,
    shared: Arc<Shared>,
    /// The device's part of the cache; `None` if the table line has `cache_blocks 0`.
    part: Option<Part>,
    /// Which reads go through the cache.
    modes: Modes,
    /// The device's share of the cache in blocks, if the table line sets it.
    cache_blocks: Option<usize>,
    /// Whether to panic when a block is corrupt.
    panic_on_corruption: bool,
    spares: Pin<KBox<dm::Spares<Zfile>>>,
    stats: Stats,
}

/// The counters in the status. Those that every read changes are per-CPU counters.
struct Stats {
    /// Lower reads.
    reads: Counter,
    /// Bytes that these lower reads requested.
    read_bytes: Counter,
    /// Decompressed blocks.
    blocks: Counter,
    /// Blocks that reads found cached or being loaded.
    cache_hits: Counter,
    /// Lower reads that failed, other than with `BLK_STS_AGAIN`.
    read_errors: Atomic<u64>,
    /// How often a block was found corrupt. A block counts each time.
    corrupt: Atomic<u64>,
}

impl Stats {
    /// # Errors
    ///
    /// [`ENOMEM`].
    fn new() -> Result<Self> {
        Ok(Self {
            reads: Counter::new()?,
            read_bytes: Counter::new()?,
            blocks: Counter::new()?,
            cache_hits: Counter::new()?,
            read_errors: Atomic::new(0),
            corrupt: Atomic::new(0),
        })
    }
}
