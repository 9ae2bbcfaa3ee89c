// SPDX-License-Identifier: GPL-2.0

//! Computes UUIDs from the content of layers: layers with the same content and the same layer below
//! have the same UUID, however they are wrapped.
//!
//! A UUID is part of a SHA-256 over the virtual size, the UUID of the layer below, the runs of
//! sectors, and a SHA-256 of the data in each MiB of the disk. Threads hash these pieces in
//! parallel; the result doesn't depend on the number of threads.
//!
//! The format is described in `Documentation/formats/identity.rst`.

use sha2::{Digest, Sha256};

use crate::format::num::{to_u64, to_usize};
use crate::format::SECTOR_SIZE;
use crate::layer::Ident;
use crate::lsmt_writer::Run;
use crate::{parallel, Progress, Result};

/// Bytes of the disk in one piece: each piece has its own hash.
pub const PIECE: u64 = 1 << 20;
/// Start of the hashed bytes. A change of the number changes the UUID of every layer.
const DOMAIN: &[u8] = b"dm-overlaybd layer identity 1\0";
/// Start of the hashed bytes for a layer that is made of files. No other layer gets the same UUID.
const OF_FILES: &[u8] = b"dm-overlaybd layer identity 2\0";
/// First bytes of the UUID of a layer that is the lowest, or whose UUID is made from that of the layer
/// below, too.
const PLACED: [u8; 4] = *b"obd1";

/// The hashes of a layer's data, with the number of each piece of the disk, ascending.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Pieces(Vec<(u64, [u8; 32])>);

impl Pieces {
    /// Hashes the data of `runs`, which are ascending. `read` reads the disk at a byte offset into
    /// a buffer.
    ///
    /// # Errors
    ///
    /// An error of `read` or `progress`; if several threads fail, that of one of them. `progress`
    /// counts the bytes of data.
    pub fn of(
        runs: &[Run],
        read: impl Fn(u64, &mut [u8]) -> Result<()> + Sync,
        progress: Progress<'_>,
    ) -> Result<Self> {
        let parts = parts(runs);
        let groups: Vec<&[Part]> = parts.chunk_by(|a, b| a.piece() == b.piece()).collect();
        let hash = |buffer: &mut Vec<u8>, group: &&[Part]| {
            let mut hasher = Hasher::default();
            for part in *group {
                let piece = buffer.get_mut(..to_usize(part.len)).unwrap_or_default();
                read(part.start, piece)?;
                hasher.add(piece);
                progress(part.len)?;
            }
            Ok(hasher.finish(group.first().map_or(0, Part::piece)))
        };
        let buffer = || vec![0; to_usize(PIECE)];
        let pieces = parallel::map(groups.iter(), usize::MAX, buffer, hash);
        let pieces = pieces.collect::<Result<Vec<_>>>()?;
        Ok(Self(pieces.into_iter().flatten().collect()))
    }

    /// Collects pieces and their hashes, ascending.
    pub(crate) fn collect(found: impl IntoIterator<Item = (u64, [u8; 32])>) -> Self {
        Self(found.into_iter().collect())
    }
}

/// A range of data within one piece of the disk, in bytes.
struct Part {
    start: u64,
    len: u64,
}

impl Part {
    fn piece(&self) -> u64 {
        self.start / PIECE
    }
}

/// Splits the data of `runs` at the boundaries of pieces.
fn parts(runs: &[Run]) -> Vec<Part> {
    let mut parts = Vec::new();
    for run in runs.iter().filter(|run| !run.zeroed) {
        let (mut start, end) = (run.offset * SECTOR_SIZE, run.end() * SECTOR_SIZE);
        while start < end {
            let len = (end - start).min(PIECE - start % PIECE);
            parts.push(Part { start, len });
            start += len;
        }
    }
    parts
}

/// Hashes the data of one piece.
#[derive(Default)]
pub(crate) struct Hasher(Option<Sha256>);

impl Hasher {
    /// Appends data. Zeros fill up the last sector.
    pub(crate) fn add(&mut self, data: &[u8]) {
        let hasher = self.0.get_or_insert_default();
        hasher.update(data);
        let len = to_u64(data.len());
        let gap = len.next_multiple_of(SECTOR_SIZE) - len;
        hasher.update(vec![0; to_usize(gap)]);
    }

    /// Returns the number of the piece and its hash; `None` if it has no data.
    pub(crate) fn finish(self, piece: u64) -> Option<(u64, [u8; 32])> {
        self.0.map(|hasher| (piece, hasher.finalize().into()))
    }
}

/// What the writer of a layer knows about the layer below.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Below<'a> {
    /// Nothing: the layer is the lowest.
    Nothing,
    /// The layer with this UUID.
    Layer(&'a str),
    /// The layer below is unknown or has no UUID.
    Unknown,
}

impl<'a> Below<'a> {
    /// Returns [`Below::Layer`] if `uuid` is a UUID other than zeros, else [`Below::Unknown`].
    pub fn of(uuid: &'a str) -> Self {
        match Ident::is_known(uuid) {
            true => Self::Layer(uuid),
            false => Self::Unknown,
        }
    }
}

/// Returns the UUID, as text, of a layer of `runs`. They must be ascending, and joined where they
/// are adjacent and of the same kind.
pub fn uuid(virtual_size: u64, below: Below<'_>, runs: &[Run], pieces: &Pieces) -> String {
    let mut hasher = start(DOMAIN, virtual_size, runs);
    hasher.update(to_u64(pieces.0.len()).to_le_bytes());
    for (piece, hash) in &pieces.0 {
        hasher.update(piece.to_le_bytes());
        hasher.update(hash);
    }
    finish(hasher, below)
}

/// As [`uuid`], of a layer with a file system that is made of files, so that hashes of them are known: `content` is a
/// hash of everything that the data of the runs depends on.
pub fn uuid_of_files(
    virtual_size: u64,
    below: Below<'_>,
    runs: &[Run],
    content: &[u8; 32],
) -> String {
    let hasher = start(OF_FILES, virtual_size, runs).chain_update(content);
    finish(hasher, below)
}

fn start(domain: &[u8], virtual_size: u64, runs: &[Run]) -> Sha256 {
    let mut hasher = Sha256::new_with_prefix(domain);
    let mut number = |number: u64| hasher.update(number.to_le_bytes());
    number(virtual_size);
    number(to_u64(runs.len()));
    for run in runs {
        number(run.offset);
        number(run.length);
        number(run.zeroed.into());
    }
    hasher
}

fn finish(mut hasher: Sha256, below: Below<'_>) -> String {
    if let Below::Layer(uuid) = below {
        hasher.update(uuid.to_ascii_uppercase());
    }
    let hash: [u8; 32] = hasher.finalize().into();
    let mut bytes = [0; 16];
    for (byte, &hash) in bytes.iter_mut().zip(&hash) {
        *byte = hash;
    }
    if below != Below::Unknown {
        let [a, b, c, d, ..] = &mut bytes;
        [*a, *b, *c, *d] = PLACED;
    }
    // Version 8 of RFC 9562: the format of the other bits is up to us.
    let [_, _, _, _, _, _, version, _, variant, ..] = &mut bytes;
    *version = (*version & 0x0f) | 0x80;
    *variant = (*variant & 0x3f) | 0x80;
    text(&bytes)
}

/// Returns whether `uuid` was made by [`uuid`] or [`uuid_of_files`] for the lowest layer, or from the UUID of the layer
/// below, too. The content of the layers isn't checked.
pub fn is_placed(uuid: &str) -> bool {
    let bytes = uuid.as_bytes();
    let mark = text(&PLACED);
    bytes
        .get(..8)
        .is_some_and(|start| start.eq_ignore_ascii_case(mark.as_bytes()))
        && bytes.get(14) == Some(&b'8')
        && matches!(bytes.get(19), Some(b'8' | b'9' | b'A' | b'B' | b'a' | b'b'))
}

/// Formats the bytes of a UUID as upstream does: upper case, hyphens after 4, 6, 8 and 10 bytes.
fn text(bytes: &[u8]) -> String {
    let mut text = String::new();
    for (nth, byte) in bytes.iter().enumerate() {
        if matches!(nth, 4 | 6 | 8 | 10) {
            text.push('-');
        }
        text.push_str(&format!("{byte:02X}"));
    }
    text
}
