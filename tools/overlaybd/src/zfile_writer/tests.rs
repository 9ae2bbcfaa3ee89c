// SPDX-License-Identifier: GPL-2.0

//! How threads compress: see also `tests/recreate.rs`, which compares with upstream's bytes.

#![allow(clippy::unwrap_used)]

use std::io::{self, Cursor, Seek, SeekFrom, Write};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use rayon::prelude::*;
use rayon::{ThreadPool, ThreadPoolBuilder};

use super::{write_in, Options, Sink, BATCH, GROUP};
use crate::codec::{Encoder, Method};
use crate::format::zfile::{self, Algorithm};
use crate::progress::{never, Check};
use crate::{crc32c, Error, Result};

const THREADS: [usize; 3] = [1, 2, 5];

fn pool(threads: usize) -> ThreadPool {
    let builder = ThreadPoolBuilder::new().num_threads(threads);
    builder.build().unwrap()
}

fn options(algorithm: Algorithm, block_size: u32) -> Options {
    Options {
        method: Method {
            algorithm,
            level: None,
        },
        block_size,
        crc: true,
        overwrite_header: true,
        whole_sectors: false,
    }
}

/// Bytes of which some can be compressed.
fn content(len: usize) -> Vec<u8> {
    let mut state = 1_u64;
    let mut bytes = Vec::with_capacity(len + 8);
    while bytes.len() < len {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        let word = (state >> 24).to_le_bytes();
        match bytes.len() / 256 % 3 {
            0 => bytes.extend_from_slice(&word),
            _ => bytes.extend([word[0] & 3; 8]),
        }
    }
    bytes.truncate(len);
    bytes
}

/// Writes a ZFile with the pool of this number of threads, on a thread of the pool or on another one.
fn with<W: Write + Seek + Send>(
    pool: &ThreadPool,
    inside: bool,
    out: W,
    options: Options,
    check: Check<'_>,
    produce: impl FnOnce(Sink<'_>) -> Result<()> + Send,
) -> Result<W> {
    let work = || {
        // On a thread of the pool, this is what `write` does.
        pool.in_place_scope(|scope| write_in(scope, out, options, check, produce))
    };
    let (out, _) = match inside {
        true => pool.install(work),
        false => work(),
    }?;
    Ok(out)
}

/// Returns blocks and index, made without threads.
fn model(data: &[u8], options: Options) -> Vec<u8> {
    let mut encoder = Encoder::new(options.method).unwrap();
    let (mut blocks, mut index) = (Vec::new(), Vec::new());
    for block in data.chunks(options.block_size as usize) {
        let mut stored = Vec::new();
        encoder.encode(block, &mut stored).unwrap();
        let crc = zfile::block_crc(&stored, crc32c);
        stored.extend(crc.to_le_bytes());
        index.extend((stored.len() as u32).to_le_bytes());
        blocks.extend(stored);
    }
    blocks.extend(index);
    blocks
}

#[test]
fn groups_have_whole_blocks() {
    let mut size = zfile::MIN_BLOCK_SIZE;
    while size <= zfile::MAX_BLOCK_SIZE {
        assert_eq!(GROUP % size as usize, 0, "{size}");
        size *= 2;
    }
    assert_eq!(BATCH % GROUP, 0);
}

#[test]
fn threads_do_not_matter() {
    let pools = THREADS.map(pool);
    let all = content(2 * BATCH + GROUP + 77);
    for (algorithm, block_size) in [
        (Algorithm::Lz4, 512),
        (Algorithm::Lz4, 4096),
        (Algorithm::Lz4, 65536),
        (Algorithm::Zstd, 16384),
    ] {
        let block = block_size as usize;
        for len in [
            0,
            1,
            block - 1,
            block,
            block + 1,
            GROUP - 1,
            GROUP,
            GROUP + block,
            BATCH - 1,
            BATCH,
            BATCH + 1,
            2 * BATCH,
            all.len(),
        ] {
            let options = options(algorithm, block_size);
            let data = &all[..len];
            let wanted = model(data, options);
            let mut first = None;
            for (pool, inside) in pools.iter().flat_map(|pool| [(pool, false), (pool, true)]) {
                // Pieces that end anywhere, or one for all.
                let piece = match inside {
                    true => len.max(1),
                    false => 1_000_003,
                };
                let out = Cursor::new(Vec::new());
                let out = with(pool, inside, out, options, &never, |sink| {
                    data.chunks(piece).try_for_each(sink)
                });
                let out = out.unwrap().into_inner();
                let what = format!("{algorithm:?}, {block_size}, {len} bytes, inside: {inside}");
                let end = out.len() - 512;
                assert!(out[512..end] == wanted, "{what}");
                assert!(first.get_or_insert_with(|| out.clone()) == &out, "{what}");
            }
        }
    }
}

/// The only thread of the pool compresses and has work of the producer, too.
fn one_thread(pool: &ThreadPool, inside: bool) {
    let data = content(3 * BATCH + 5);
    let options = options(Algorithm::Lz4, 4096);
    let out = Cursor::new(Vec::new());
    let out = with(pool, inside, out, options, &never, |sink| {
        data.chunks(1 << 20).try_for_each(|piece| {
            let copy = pool.install(|| piece.par_iter().copied().collect::<Vec<_>>());
            sink(&copy)
        })
    });
    let out = out.unwrap().into_inner();
    assert!(out[512..out.len() - 512] == model(&data, options));
}

#[test]
fn one_thread_makes_progress() {
    let pool = pool(1);
    one_thread(&pool, false);
    one_thread(&pool, true);
    // A pool that has no thread of its own.
    let alone = std::thread::spawn(|| {
        let builder = ThreadPoolBuilder::new().num_threads(1);
        let pool = builder.use_current_thread().build().unwrap();
        one_thread(&pool, false);
    });
    alone.join().unwrap();
}

/// Produces a GiB. Counts the bytes that the sink accepts.
fn endless(count: &AtomicU64) -> impl FnOnce(Sink<'_>) -> Result<()> + Send + '_ {
    move |sink: Sink<'_>| {
        let piece = content(1 << 20);
        for _ in 0..1024 {
            sink(&piece)?;
            count.fetch_add(1 << 20, Ordering::Relaxed);
        }
        Ok(())
    }
}

#[test]
fn an_interrupt_ends_it() {
    for (threads, inside) in THREADS.iter().flat_map(|&n| [(n, false), (n, true)]) {
        let (calls, errors, count) = <(AtomicU64, AtomicU64, AtomicU64)>::default();
        let check = || match calls.fetch_add(1, Ordering::Relaxed) {
            // After this number of blocks, in the second batch.
            3000.. => {
                errors.fetch_add(1, Ordering::Relaxed);
                Err(Error::Interrupted)
            }
            _ => Ok(()),
        };
        let out = Cursor::new(Vec::new());
        let options = options(Algorithm::Lz4, 4096);
        let result = with(
            &pool(threads),
            inside,
            out,
            options,
            &check,
            endless(&count),
        );
        assert!(matches!(result, Err(Error::Interrupted)));
        // The threads check before each block, and end at the first error.
        let errors = errors.into_inner();
        assert!(errors <= 2 * (BATCH / GROUP) as u64 + 1, "{errors}");
        let count = count.into_inner();
        assert!(count < 3 * BATCH as u64, "{count}");
    }
}

/// A file that becomes full.
struct Full<'a> {
    room: u64,
    is_full: &'a AtomicBool,
}

impl Write for Full<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self.room.checked_sub(bytes.len() as u64) {
            Some(room) => self.room = room,
            None => {
                self.is_full.store(true, Ordering::Relaxed);
                return Err(io::ErrorKind::StorageFull.into());
            }
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Seek for Full<'_> {
    fn seek(&mut self, _: SeekFrom) -> io::Result<u64> {
        Ok(0)
    }
}

#[test]
fn a_full_disk_ends_it() {
    for (threads, inside) in THREADS.iter().flat_map(|&n| [(n, false), (n, true)]) {
        let (is_full, more, count) = <(AtomicBool, AtomicU64, AtomicU64)>::default();
        let out = Full {
            room: 100_000,
            is_full: &is_full,
        };
        let check = || {
            if is_full.load(Ordering::Relaxed) {
                more.fetch_add(1, Ordering::Relaxed);
                std::thread::sleep(Duration::from_millis(1));
            }
            Ok(())
        };
        let options = options(Algorithm::Lz4, 512);
        let result = with(
            &pool(threads),
            inside,
            out,
            options,
            &check,
            endless(&count),
        );
        assert!(
            matches!(result.err().unwrap(), Error::Io { what: "write", source }
            if source.kind() == io::ErrorKind::StorageFull)
        );
        // The first batch is written when the second one has been collected, whose 16384 blocks would
        // take seconds.
        let count = count.into_inner();
        assert!(count < 2 * BATCH as u64, "{count}");
        let more = more.into_inner();
        assert!(more < 8000, "{more}");
    }
}

/// An error of the producer is the one that is reported, and ends compression.
#[test]
fn an_error_of_the_producer_ends_it() {
    for threads in THREADS {
        let (ended, more) = <(AtomicBool, AtomicU64)>::default();
        let check = || {
            if ended.load(Ordering::Relaxed) {
                more.fetch_add(1, Ordering::Relaxed);
                std::thread::sleep(Duration::from_millis(1));
            }
            Ok(())
        };
        let out = Cursor::new(Vec::new());
        let options = options(Algorithm::Lz4, 512);
        let result = with(&pool(threads), false, out, options, &check, |sink| {
            sink(&content(BATCH))?;
            ended.store(true, Ordering::Relaxed);
            Err(Error::Invalid("no more".to_owned()))
        });
        assert!(matches!(result.err().unwrap(), Error::Invalid(what) if what == "no more"));
        let more = more.into_inner();
        assert!(more < 8000, "{more}");
    }
}

#[test]
fn a_panic_is_an_error() {
    for (threads, inside) in THREADS.iter().flat_map(|&n| [(n, false), (n, true)]) {
        let calls = AtomicU64::new(0);
        // The writer itself calls it once before, the other calls are for blocks.
        let check = || {
            let nth = calls.fetch_add(1, Ordering::Relaxed);
            assert_ne!(nth, 100, "as a bug would");
            Ok(())
        };
        let data = content(BATCH / 2);
        let out = Cursor::new(Vec::new());
        let options = options(Algorithm::Lz4, 4096);
        let result = with(&pool(threads), inside, out, options, &check, |sink| {
            sink(&data)
        });
        let message = result.err().unwrap().to_string();
        assert_eq!(message, "a thread panicked while it compressed blocks");
    }
}
