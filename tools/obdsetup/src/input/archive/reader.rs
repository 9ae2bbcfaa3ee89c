// SPDX-License-Identifier: GPL-2.0

//! Reads a tar, block by block.

use std::fs::File;
use std::io::{ErrorKind, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result};
use overlaybd::format::num::{to_u64, to_usize};
use sha2::{Digest, Sha256};

use crate::terminal::exit::{self, Failure};
use crate::terminal::interrupt;

use super::header::{is_header, pad, Header, BLOCK};
use super::pax::{Extended, Records};
use super::{Compression, Member, Unpack};

/// Limit in bytes for all extended headers and long names before a member.
const MAX_HEADER: u64 = 8 << 20;
/// Number of bytes of content passed on at once.
const PIECE: usize = 256 << 10;

/// A tar that is being read.
pub(crate) struct Archive {
    path: PathBuf,
    pub(super) compression: Option<Compression>,
    input: Unpack,
    /// Number of bytes read so far, decompressed.
    at: u64,
    /// Number of bytes of the last member's content that are not read yet, and of the padding after them.
    pub(super) left: u64,
    pub(super) padding: u64,
    pub(super) global: Records,
    pub(super) global_len: u64,
    /// The name of the last member, for errors.
    pub(super) name: String,
    ended: bool,
    /// Whether to print warnings; `false` if an earlier pass has printed them.
    warns: bool,
    /// Whether an end marker is required, because nothing else shows that the archive is complete.
    needs_marker: bool,
    /// Hashes all bytes of the decompressed tar; `None` unless it is a [`Self::layer`].
    hasher: Option<Sha256>,
    /// The file, if it is an ordinary one that is not compressed.
    plain: Option<Arc<File>>,
}

impl Archive {
    /// Opens the tar at `path`, with any compression.
    ///
    /// # Errors
    ///
    /// If the file cannot be opened or read.
    pub(crate) fn open(path: &Path) -> Result<Self> {
        Self::open_as(path, path)
    }

    /// Opens the tar at `path`, which messages call `name`.
    fn open_as(path: &Path, name: &Path) -> Result<Self> {
        let cannot = || format!("{}: cannot read", name.display());
        let mut file = File::open(path).with_context(cannot)?;
        let mut head = Vec::new();
        let mut start = (&mut file).take(to_u64(BLOCK));
        start.read_to_end(&mut head).with_context(cannot)?;
        std::io::Seek::rewind(&mut file).with_context(cannot)?;
        // A tar begins with a name, which may look like the magic number of a compression.
        let compression = match head.first_chunk().is_some_and(is_header) {
            true => None,
            false => Compression::of(&head),
        };
        let is_plain = compression.is_none() && file.metadata().with_context(cannot)?.is_file();
        let plain = is_plain.then(|| file.try_clone()).transpose();
        Ok(Self {
            path: name.to_owned(),
            plain: plain.with_context(cannot)?.map(Arc::new),
            compression,
            input: Unpack::new(file, compression),
            at: 0,
            left: 0,
            padding: 0,
            global: Records::default(),
            global_len: 0,
            name: String::new(),
            ended: false,
            warns: true,
            needs_marker: true,
            hasher: None,
        })
    }

    /// Opens the layer of a container image in the file `path`. The caller has checked the digest,
    /// which shows that the file is complete. Messages use `name`; `warns` is whether to print
    /// warnings.
    ///
    /// # Errors
    ///
    /// As [`Self::open`].
    pub(crate) fn layer(path: &Path, name: &Path, warns: bool) -> Result<Self> {
        Ok(Self {
            warns,
            needs_marker: false,
            hasher: Some(Sha256::new()),
            ..Self::open_as(path, name)?
        })
    }

    /// Returns the compression of the file.
    pub(crate) fn compression(&self) -> Option<Compression> {
        self.compression
    }

    /// Returns the file, and the offset of the next byte in it, if the file can be read there again.
    pub(crate) fn in_file(&self) -> Option<(Arc<File>, u64)> {
        self.plain.clone().map(|file| (file, self.at))
    }

    /// Returns the SHA-256, in hexadecimal, of the decompressed bytes of a [`Self::layer`] that were
    /// read so far. After [`Self::next`] has returned `None`, this is OCI's DiffID.
    pub(crate) fn diff_id(&self) -> String {
        let hasher = self.hasher.clone().unwrap_or_default();
        format!("{:x}", hasher.finalize())
    }

    /// Opens a tar that was read to its end before, without printing warnings again.
    ///
    /// # Errors
    ///
    /// As [`Self::open`].
    pub(crate) fn again(path: &Path) -> Result<Self> {
        Ok(Self {
            warns: false,
            ..Self::open(path)?
        })
    }

    /// Returns the next member; `None` at the end. Unread content of the last member is skipped,
    /// but checked: it must be complete and decompress without errors.
    ///
    /// # Errors
    ///
    /// If the archive is damaged, has impossible values, or cannot be read.
    pub(crate) fn next(&mut self) -> Result<Option<Member>> {
        if self.ended {
            return Ok(None);
        }
        self.skip()?;
        let mut extended = Extended::default();
        let mut first = None;
        let mut room = MAX_HEADER;
        loop {
            interrupt::check()?;
            let at = self.at;
            let start = *first.get_or_insert(at);
            let mut block = [0; BLOCK];
            let read = self.fill(&mut block)?;
            if read == 0 || block.iter().all(|&byte| byte == 0) && read == BLOCK {
                if start != at {
                    return Err(self.bad("the archive ends behind an extended header"));
                }
                self.end(read != 0)?;
                return Ok(None);
            }
            if read < BLOCK {
                let what = format!("a header of {BLOCK} bytes at byte {at} is cut off");
                return Err(self.cut_off(&what));
            }
            let Some(header) = Header::new(&block) else {
                return Err(self.no_header(at));
            };
            let number = |number| self.in_header(at, number);
            let size = number(header.size())?;
            match header.kind() {
                kind @ (b'x' | b'X' | b'g' | b'L' | b'K') => {
                    let payload = self.payload(at, size, &mut room)?;
                    self.extend(kind, at, &payload, &mut extended)?;
                    if kind == b'g' && start == at {
                        first = None;
                    }
                }
                b'V' => {
                    // A volume label is no member, and extended headers don't apply to it.
                    self.left = size;
                    self.padding = pad(size);
                    self.skip()?;
                    first = None;
                }
                b'M' => {
                    return Err(self.bad(&format!(
                        "the member at byte {at} continues in another volume: join the parts \
                         first (`tar --multi-volume`)"
                    )));
                }
                _ => return self.member(start, at, &header, size, extended).map(Some),
            }
        }
    }

    /// Passes the content of `member`, which must be the last one that [`Self::next`] returned, to
    /// `sink`: offsets in the file, and the bytes there. Leaves out holes.
    ///
    /// # Errors
    ///
    /// The error of `sink`, and the errors of [`Self::next`].
    pub(crate) fn content(
        &mut self,
        member: &Member,
        mut sink: impl FnMut(u64, &[u8]) -> Result<()>,
    ) -> Result<()> {
        let mut buffer = vec![0; PIECE.min(to_usize(member.size))];
        for extent in &member.extents {
            let mut done = 0;
            while done < extent.len {
                interrupt::check()?;
                let want = to_u64(buffer.len()).min(extent.len - done);
                let piece = buffer.get_mut(..to_usize(want)).unwrap_or_default();
                self.read_content(piece)?;
                sink(extent.offset + done, piece)?;
                done += want;
            }
        }
        Ok(())
    }

    /// Reads the rest of the file after the last member. `marked` is whether it begins with an end
    /// marker, a block of zeros. Warns if other data follows. Fails if another archive follows, or if
    /// a required end marker is missing.
    fn end(&mut self, marked: bool) -> Result<()> {
        self.ended = true;
        let end = self.at;
        if !marked && self.compression.is_none() && end > 0 && self.needs_marker {
            return Err(self.cut_off(
                "no end marker (a block of zeros) is there; if nothing is missing, `truncate \
                 --size=+1024 FILE` adds it",
            ));
        }
        // Read to the end of the file: only there does the decompressor report some errors.
        let mut piece = vec![0; PIECE];
        let mut other = false;
        loop {
            interrupt::check()?;
            let read = self.fill(&mut piece)?;
            if read == 0 {
                break;
            }
            let piece = piece.get(..read).unwrap_or_default();
            let used = |block: &&[u8]| block.iter().any(|&byte| byte != 0);
            let Some(block) = piece.chunks(BLOCK).find(used).filter(|_| !other) else {
                continue;
            };
            other = true;
            if block.first_chunk().is_some_and(is_header) {
                return Err(self.bad(&format!(
                    "another archive follows the end marker at byte {end}: join them with `tar \
                     --concatenate`, or convert one alone"
                )));
            }
            let message = format!(
                "{}: what follows the end marker at byte {end} is ignored",
                self.path.display()
            );
            if self.warns {
                crate::terminal::warn(&[message]);
            }
        }
        Ok(())
    }

    /// Reads the payload of an extended header. Subtracts its size from `room`, the number of bytes
    /// that are still allowed.
    fn payload(&mut self, at: u64, size: u64, room: &mut u64) -> Result<Vec<u8>> {
        *room = room.checked_sub(size).ok_or_else(|| {
            self.bad(&format!(
                "the extended header at byte {at} has {size} bytes; together with those before it, \
                 that is more than {MAX_HEADER} for one member"
            ))
        })?;
        self.left = size;
        self.padding = pad(size);
        let mut payload = vec![0; to_usize(size)];
        self.read_content(&mut payload)?;
        self.skip()?;
        Ok(payload)
    }

    /// Fills `buf` with the next bytes of the last member's content. Fails if fewer are left.
    pub(super) fn read_content(&mut self, buf: &mut [u8]) -> Result<()> {
        let wanted = to_u64(buf.len());
        if wanted > self.left {
            return Err(self.content_cut_off());
        }
        let read = to_u64(self.fill(buf)?);
        self.left -= read;
        match read == wanted {
            true => Ok(()),
            false => Err(self.content_cut_off()),
        }
    }

    /// Skips the rest of the last member and the padding after it.
    fn skip(&mut self) -> Result<()> {
        let rest = self.left.checked_add(self.padding);
        let Some(mut rest) = rest else {
            return Err(self.content_cut_off());
        };
        if self.plain.is_some() && self.hasher.is_none() && rest > to_u64(PIECE) {
            let skipped = self.input.skip(rest);
            let skipped = skipped.map_err(|error| self.unreadable(error))?;
            self.at += skipped;
            self.left = self.left.saturating_sub(skipped);
            rest -= skipped;
        }
        let mut buffer = vec![0; PIECE.min(to_usize(rest))];
        while rest > 0 {
            interrupt::check()?;
            let want = to_u64(buffer.len()).min(rest);
            let read = self.fill(buffer.get_mut(..to_usize(want)).unwrap_or_default())?;
            let read = to_u64(read);
            self.left = self.left.saturating_sub(read);
            rest -= read;
            if read < want {
                return Err(self.content_cut_off());
            }
        }
        (self.left, self.padding) = (0, 0);
        Ok(())
    }

    /// Reads until `buf` is full or the archive ends. Returns the number of bytes read.
    pub(super) fn fill(&mut self, buf: &mut [u8]) -> Result<usize> {
        let mut done = 0;
        while let Some(rest) = buf.get_mut(done..).filter(|rest| !rest.is_empty()) {
            match self.input.read(rest) {
                Ok(0) => break,
                Ok(read) => {
                    if let Some(hasher) = &mut self.hasher {
                        hasher.update(rest.get(..read).unwrap_or_default());
                    }
                    done += read;
                    self.at += to_u64(read);
                }
                Err(error)
                    if error.kind() == ErrorKind::Interrupted && error.raw_os_error().is_some() => {
                }
                Err(error) => return Err(self.unreadable(error)),
            }
        }
        Ok(done)
    }

    /// Returns the error for a failed read of the file, or for a failed decompression.
    fn unreadable(&self, error: std::io::Error) -> anyhow::Error {
        let path = self.path.display();
        if error.raw_os_error().is_some() {
            return anyhow::Error::from(error).context(format!("{path}: cannot read"));
        }
        unpack_error(&self.path, self.compression, self.input.position(), &error)
    }

    fn no_header(&self, at: u64) -> anyhow::Error {
        match self.name.is_empty() {
            true => self.bad("no tar: its first block is no header"),
            false => self.bad(&format!(
                "the block at byte {at}, behind member {:?}, is no header: the archive is damaged",
                self.name
            )),
        }
    }

    fn content_cut_off(&self) -> anyhow::Error {
        self.cut_off(&format!(
            "member {:?}: the tar ends at byte {}, {} bytes are missing",
            self.name, self.at, self.left
        ))
    }

    pub(super) fn cut_off(&self, what: &str) -> anyhow::Error {
        self.bad(&format!("{what}: incomplete download or copy?"))
    }

    pub(super) fn bad(&self, what: &str) -> anyhow::Error {
        Failure::error(exit::BAD_IMAGE, format!("{}: {what}", self.path.display()))
    }
}

/// Returns the error for a file that cannot be decompressed. `at` is the offset in the compressed
/// file.
pub(crate) fn unpack_error(
    path: &Path,
    compression: Option<Compression>,
    at: u64,
    error: &std::io::Error,
) -> anyhow::Error {
    let what = compression.map_or("data", Compression::name);
    let path = path.display();
    let text = match error.kind() {
        ErrorKind::UnexpectedEof => format!(
            "{path}: the {what} data ends early, at byte {at} of the file: incomplete download or \
             copy?"
        ),
        _ => format!("{path}: the {what} data is damaged before byte {at} of the file: {error}"),
    };
    Failure::error(exit::BAD_IMAGE, text)
}
