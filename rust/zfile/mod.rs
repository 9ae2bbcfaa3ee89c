// SPDX-License-Identifier: GPL-2.0

//! The `zfile` target: a compressed file as a disk.
//!
//! ```text
//! <start> <len> zfile <dev> <blob bytes | -> [<#opt_params> <opt_params>…]
//! ```
//!
//! - [`table`]: the table line and the status.
//! - [`io`]: the path of a read.
//! - [`cache`]: blocks that were decompressed of late.

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

/// What all `zfile` targets share: the cache, and working memory, made with the first device that
/// needs it.
#[pin_data]
pub(crate) struct Shared {
    /// Given back before the cache is.
    _shrinker: Shrinker<Cache>,
    tidier: Pin<KBox<Tidier<Cache>>>,
    cache: Arc<Cache>,
    pool: Arc<Pool>,
    #[pin]
    lz4: Mutex<Option<Arc<Contexts>>>,
    #[pin]
    zstd: Mutex<Option<Arc<Contexts>>>,
}

impl Shared {
    /// Has nothing in it yet.
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
        // Not under the lock: this may wait long for memory. Of two that are made at once, one stays.
        let contexts = Contexts::new(algorithm)?;
        Ok(made.lock().get_or_insert(contexts).clone())
    }
}

/// Which reads go through the cache.
#[derive(Clone, Copy, Default, PartialEq, Eq)]
enum Mode {
    /// Those of a part of a block.
    #[default]
    Parts,
    /// All.
    All,
    /// None.
    None,
}

impl Mode {
    /// All of them, with the words of the status and of messages.
    const WORDS: [(Self, &'static CStr); 3] = [
        (Self::Parts, c"parts"),
        (Self::All, c"all"),
        (Self::None, c"none"),
    ];

    /// The mode that a word stands for.
    fn from_word(word: &CStr) -> Option<Self> {
        let found = Self::WORDS.iter().find(|(_, name)| *name == word);
        found.map(|&(mode, _)| mode)
    }

    /// Its word.
    fn word(self) -> &'static str {
        let found = Self::WORDS.iter().find(|&&(mode, _)| mode == self);
        found
            .and_then(|(_, name)| name.to_str().ok())
            .unwrap_or("-")
    }
}

/// The mode of a device, which a message changes while reads are mapped.
struct Modes {
    /// What the table line says.
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

    /// The mode now.
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
    /// Where the ZFile starts on its device, in bytes: behind a tar header, or at 0.
    start: u64,
    /// Bytes in a block of its device.
    device_block: u64,
    /// Bytes of the blob, where the table line tells.
    blob_bytes: Option<u64>,
    shared: Arc<Shared>,
    /// Its part of the cache, unless the table line says that there is none.
    part: Option<Part>,
    /// Which reads go through the cache.
    modes: Modes,
    /// Most blocks of it in the cache, where the table line tells.
    cache_blocks: Option<usize>,
    /// Whether the kernel panics when a block is corrupt.
    panic_on_corruption: bool,
    spares: Pin<KBox<dm::Spares<Zfile>>>,
    stats: Stats,
}

/// What the status shows. What every read counts, each CPU counts for itself.
struct Stats {
    /// Reads of the lower device.
    reads: Counter,
    /// Bytes that they asked for.
    read_bytes: Counter,
    /// Blocks that were decompressed.
    blocks: Counter,
    /// Blocks that reads found in the cache, or being loaded.
    cache_hits: Counter,
    /// Reads that the lower device failed.
    read_errors: Atomic<u64>,
    /// Blocks that were found corrupt.
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
