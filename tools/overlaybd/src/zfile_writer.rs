// SPDX-License-Identifier: GPL-2.0

//! Writes a ZFile: byte for byte as upstream's tools do with the same codecs, or padded so that a
//! loop device shows all of it.
//!
//! Several threads compress the blocks; neither the output nor the error depends on their number.

use std::io::{self, Seek, SeekFrom, Write};
use std::panic::{catch_unwind, AssertUnwindSafe};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rayon::Scope;

use crate::codec::{Encoder, Method};
use crate::format::num::{to_u64, to_usize};
use crate::format::zfile::{self, field, flag};
use crate::format::SECTOR_SIZE;
use crate::on_disk::zfile as on_disk;
use crate::progress::Check;
use crate::{crc32c, parallel, Error, Result};

/// Number of bytes that one thread compresses at once, and whose stored bytes are written at once. A multiple of
/// every block size, since all are powers of two.
const GROUP: usize = to_usize(zfile::MAX_BLOCK_SIZE as u64);
/// Number of bytes that all threads compress while the next ones are collected.
const BATCH: usize = 128 * GROUP;

/// Consumes the next bytes of a file.
pub type Sink<'a> = &'a mut dyn FnMut(&[u8]) -> Result<()>;

/// The properties of a new ZFile.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Options {
    /// Algorithm and level.
    pub method: Method,
    /// Bytes in a block: a power of two from 512 to 65536. Upstream's tools accept 4096 and more.
    pub block_size: u32,
    /// Whether a CRC follows each block.
    pub crc: bool,
    /// Whether the header is written again at the end, so that readers need no trailer.
    pub overwrite_header: bool,
    /// Whether the ZFile is padded to whole sectors, with zeros between the blocks and the index.
    /// Upstream's tools don't do that, but can read such files.
    pub whole_sectors: bool,
}

/// Writes a ZFile at the current position of `out`. `produce` passes the original file to its sink. Returns `out`,
/// positioned at the end of the ZFile, and the length of the ZFile in bytes.
///
/// The threads of rayon's pool compress 8 MiB while this thread collects the next 8 MiB and writes the ones before.
/// On a thread of the pool, one comes after the other, since such a thread must not wait for the pool. At most two
/// such batches and the stored bytes of two are in memory, 35 MiB; the index, 4 bytes for each block; and for each
/// thread the codec's state.
///
/// `check` is called before each block is compressed, and for all bytes that `produce` passes on: high levels take
/// seconds for 8 MiB.
///
/// # Errors
///
/// [`Error::Invalid`] if the block size is out of range, the errors of `produce` and `check`, and errors of
/// compressing or writing, which the sink returns, too. After an error, compression ends before the next block of
/// each thread.
pub fn write<W: Write + Seek>(
    out: W,
    options: Options,
    check: Check<'_>,
    produce: impl FnOnce(Sink<'_>) -> Result<()>,
) -> Result<(W, u64)> {
    rayon::in_place_scope(|scope| write_in(scope, out, options, check, produce))
}

/// As [`write`], with the threads of the scope's pool.
fn write_in<'scope, W: Write + Seek>(
    scope: &Scope<'scope>,
    out: W,
    options: Options,
    check: Check<'scope>,
    produce: impl FnOnce(Sink<'_>) -> Result<()>,
) -> Result<(W, u64)> {
    let mut writer = ZfileWriter::new(scope, out, options, check)?;
    produce(&mut |bytes| writer.write(bytes))?;
    writer.finish()
}

/// A ZFile that is being written.
struct ZfileWriter<'a, 'scope, W> {
    scope: &'a Scope<'scope>,
    out: W,
    options: Options,
    check: Check<'scope>,
    /// Ends compression when this object is dropped.
    stop: Stop,
    /// Byte offset of the ZFile in `out`.
    start: u64,
    /// Bytes that aren't compressed yet: less than a batch.
    pending: Vec<u8>,
    /// Receives the batch before them.
    compressing: Option<Receiver<Result<Batch>>>,
    /// Memory of groups that are written, to be used again.
    spare: Arc<Spare>,
    /// The index in its format on disk.
    index: Vec<u8>,
    /// Byte offset of the next block in the ZFile; after the last block, offset of the index.
    offset: u64,
    /// Bytes written to the original file so far.
    size: u64,
}

impl<'a, 'scope, W: Write + Seek> ZfileWriter<'a, 'scope, W> {
    /// Starts a ZFile at the current position of `out`.
    fn new(
        scope: &'a Scope<'scope>,
        mut out: W,
        options: Options,
        check: Check<'scope>,
    ) -> Result<Self> {
        let size = options.block_size;
        if !size.is_power_of_two()
            || !(zfile::MIN_BLOCK_SIZE..=zfile::MAX_BLOCK_SIZE).contains(&size)
        {
            return Err(Error::Invalid(format!(
                "block size {size} is not a power of two from {} to {}",
                zfile::MIN_BLOCK_SIZE,
                zfile::MAX_BLOCK_SIZE
            )));
        }
        let start = out.stream_position().map_err(write_error)?;
        let mut writer = Self {
            scope,
            out,
            options,
            check,
            stop: Stop::default(),
            start,
            pending: Vec::new(),
            compressing: None,
            spare: Arc::default(),
            index: Vec::new(),
            offset: zfile::HEADER_SIZE,
            size: 0,
        };
        let header = writer.header(flag::HEADER | flag::DATA_FILE | flag::DIGEST, false);
        writer.out.write_all(&header).map_err(write_error)?;
        Ok(writer)
    }

    /// Appends `data` to the original file.
    fn write(&mut self, mut data: &[u8]) -> Result<()> {
        self.size += to_u64(data.len());
        while !data.is_empty() {
            // Threads that were interrupted are noticed only when the next batch is full.
            (self.check)()?;
            let room = BATCH - self.pending.len();
            let (now, rest) = data.split_at(room.min(data.len()));
            if now.len() > self.pending.capacity() - self.pending.len() {
                // Grows as a vector does, but not beyond a batch.
                let more = now.len().max(self.pending.len()).min(room);
                self.pending.reserve_exact(more);
            }
            self.pending.extend_from_slice(now);
            if self.pending.len() == BATCH {
                self.compress()?;
            }
            data = rest;
        }
        Ok(())
    }

    /// Writes the remaining blocks, the index, the trailer and the header. Returns `out`, and the length of the
    /// ZFile in bytes.
    fn finish(mut self) -> Result<(W, u64)> {
        self.compress()?;
        if let Some(last) = self.compressing.take() {
            self.store(&last)?;
        }
        if self.options.whole_sectors {
            // The header and the trailer have one sector each.
            let len = self.offset + to_u64(self.index.len());
            let gap = len.next_multiple_of(SECTOR_SIZE) - len;
            let zeros = vec![0; to_usize(gap)];
            self.out.write_all(&zeros).map_err(write_error)?;
            self.offset += gap;
        }
        self.out.write_all(&self.index).map_err(write_error)?;
        let trailer = self.header(flag::DATA_FILE | flag::SEALED | flag::DIGEST, true);
        self.out.write_all(&trailer).map_err(write_error)?;
        let len = self.offset + to_u64(self.index.len()) + zfile::HEADER_SIZE;
        if self.options.overwrite_header {
            let flags = flag::HEADER | flag::DATA_FILE | flag::OVERWRITTEN | flag::DIGEST;
            let header = self.header(flags, true);
            seek(&mut self.out, self.start)?;
            self.out.write_all(&header).map_err(write_error)?;
            seek(&mut self.out, self.start + len)?;
        }
        Ok((self.out, len))
    }

    /// Begins to compress the pending bytes. Writes the batch before them, which was compressed while they were
    /// collected.
    fn compress(&mut self) -> Result<()> {
        let data = std::mem::take(&mut self.pending);
        let (options, check) = (self.options, self.check);
        let stopped = Arc::clone(&self.stop.0);
        let spare = Arc::clone(&self.spare);
        let (sender, receiver) = mpsc::channel();
        let work = move || {
            let go_on = || match stopped.load(Ordering::Relaxed) {
                true => Err(Error::Interrupted),
                false => check(),
            };
            let groups = catch_unwind(AssertUnwindSafe(|| {
                compress(&data, options, &spare, &go_on)
            }));
            let groups = groups.unwrap_or_else(|_| Err(panicked()));
            // After an error, nobody receives it.
            let _ = sender.send(groups.map(|groups| Batch { groups, data }));
        };
        // A thread of the pool must not wait for the pool: all of its threads could wait.
        match rayon::current_thread_index() {
            Some(_) => work(),
            None => self.scope.spawn(move |_| work()),
        }
        match self.compressing.replace(receiver) {
            Some(before) => self.store(&before),
            None => Ok(()),
        }
    }

    /// Waits for a batch and writes it.
    fn store(&mut self, batch: &Receiver<Result<Batch>>) -> Result<()> {
        let Batch { groups, mut data } = batch.recv().map_err(|_| panicked())??;
        for group in groups {
            self.out.write_all(group.stored()).map_err(write_error)?;
            self.index.extend_from_slice(&group.lengths);
            self.offset += to_u64(group.len);
            self.spare.keep(group.room);
        }
        // New memory for each batch would take the system's time.
        if self.pending.capacity() == 0 {
            data.clear();
            self.pending = data;
        }
        Ok(())
    }

    /// Returns a header or trailer. `complete` adds the fields that are only known at the end.
    fn header(&self, flags: u64, complete: bool) -> [u8; 512] {
        let Options { method, crc, .. } = self.options;
        let mut bytes = [0; 512];
        put(&mut bytes, 0, &zfile::MAGIC);
        let size = on_disk::STRUCT_SIZE.to_le_bytes();
        put(&mut bytes, on_disk::field::SIZE, &size);
        put(&mut bytes, field::FLAGS, &flags.to_le_bytes());
        if complete {
            let index_crc = crc32c(0, &self.index);
            let count = to_u64(self.index.len() / 4);
            put(&mut bytes, field::INDEX_OFFSET, &self.offset.to_le_bytes());
            put(&mut bytes, field::INDEX_COUNT, &count.to_le_bytes());
            put(&mut bytes, field::ORIGINAL_SIZE, &self.size.to_le_bytes());
            put(&mut bytes, field::INDEX_CRC, &index_crc.to_le_bytes());
        }
        let block_size = self.options.block_size;
        put(&mut bytes, field::BLOCK_SIZE, &block_size.to_le_bytes());
        put(&mut bytes, field::ALGORITHM, &[method.algorithm as u8]);
        put(&mut bytes, field::VERIFY, &[u8::from(crc)]);
        let digest = zfile::digest(&bytes, crc32c);
        put(&mut bytes, field::DIGEST, &digest.to_le_bytes());
        bytes
    }
}

/// Tells the threads that compress to stop when it is dropped.
#[derive(Default)]
struct Stop(Arc<AtomicBool>);

impl Drop for Stop {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// A batch that is compressed.
struct Batch {
    groups: Vec<Group>,
    /// The bytes of which it was made.
    data: Vec<u8>,
}

/// Consecutive blocks of a ZFile.
struct Group {
    /// Their stored bytes, and further bytes.
    room: Vec<u8>,
    /// Number of the stored bytes.
    len: usize,
    /// Their entries of the index.
    lengths: Vec<u8>,
}

impl Group {
    fn stored(&self) -> &[u8] {
        self.room.get(..self.len).unwrap_or_default()
    }
}

/// Memory for the stored bytes of groups.
#[derive(Default)]
struct Spare(Mutex<Vec<Vec<u8>>>);

impl Spare {
    /// Returns at least `len` bytes of any values.
    fn take(&self, len: usize) -> Vec<u8> {
        let mut room = self.rooms().pop().unwrap_or_default();
        if room.len() < len {
            // Not copied, as growing would.
            room = vec![0; len];
        }
        room
    }

    fn keep(&self, room: Vec<u8>) {
        self.rooms().push(room);
    }

    fn rooms(&self) -> MutexGuard<'_, Vec<Vec<u8>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Compresses `data`, which begins with a whole block, with several threads.
fn compress(data: &[u8], options: Options, spare: &Spare, check: Check<'_>) -> Result<Vec<Group>> {
    let method = options.method;
    let groups = parallel::map(
        data.chunks(GROUP),
        usize::MAX,
        || Encoder::new(method),
        |encoder, data| {
            let encoder = encoder.as_mut().map_err(|error| {
                Error::Invalid(format!(
                    "cannot set up {}: {error}",
                    method.algorithm.name()
                ))
            })?;
            group(encoder, data, options, spare, check)
        },
    );
    groups.collect()
}

/// Compresses the blocks of `data`, one after the other.
fn group(
    encoder: &mut Encoder,
    data: &[u8],
    options: Options,
    spare: &Spare,
    check: Check<'_>,
) -> Result<Group> {
    let Options {
        method, block_size, ..
    } = options;
    let blocks = data.chunks(to_usize(block_size.into()));
    let most = u64::from(method.algorithm.bound(block_size) + zfile::CRC_SIZE);
    let mut group = Group {
        // Enough for blocks that don't become shorter.
        room: spare.take(blocks.len() * to_usize(most)),
        len: 0,
        lengths: Vec::with_capacity(blocks.len() * 4),
    };
    for block in blocks {
        check()?;
        let room = group.room.get_mut(group.len..).unwrap_or_default();
        let mut len = encoder.encode_to(block, room).map_err(|source| Error::Io {
            what: "compress",
            source,
        })?;
        if options.crc {
            let stored = room.get(..len).unwrap_or_default();
            let crc = zfile::block_crc(stored, crc32c);
            put(room, len, &crc.to_le_bytes());
            len += to_usize(zfile::CRC_SIZE.into());
        }
        group.len += len;
        let len =
            u32::try_from(len).map_err(|_| Error::Invalid("a block became too long".to_owned()))?;
        group.lengths.extend_from_slice(&len.to_le_bytes());
    }
    Ok(group)
}

fn panicked() -> Error {
    Error::Invalid("a thread panicked while it compressed blocks".to_owned())
}

/// Copies `value` to byte `at` of `bytes`, up to the end of `bytes`.
pub(crate) fn put(bytes: &mut [u8], at: usize, value: &[u8]) {
    for (byte, &source) in bytes.iter_mut().skip(at).zip(value) {
        *byte = source;
    }
}

pub(crate) fn write_error(source: io::Error) -> Error {
    Error::Io {
        what: "write",
        source,
    }
}

pub(crate) fn seek<W: Seek>(out: &mut W, at: u64) -> Result<()> {
    out.seek(SeekFrom::Start(at)).map_err(write_error)?;
    Ok(())
}

#[cfg(test)]
mod tests;
