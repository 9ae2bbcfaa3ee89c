// SPDX-License-Identifier: GPL-2.0

//! A layer, with or without tar wrapper and compression.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::format::lsmt::{self, Segment};
use crate::format::num::{le64, to_u64};
use crate::format::{self, tar, Blob, Fault};
use crate::on_disk::lsmt::Labels;
use crate::{Error, FileBlob, Part, Result, ZfileReader};

/// The content of a blob without the tar wrapper and the compression.
pub enum Payload {
    /// The bytes of the file, or of the member if it is a tar: not compressed.
    Plain(Part),
    /// The original file of a ZFile.
    Zfile(Box<ZfileReader>),
}

impl Payload {
    /// Finds the tar wrapper and the ZFile in `file`. The content usually is an LSMT file; this
    /// function doesn't check it.
    ///
    /// # Errors
    ///
    /// One of the `Tar` and `Zfile` faults, and read errors.
    pub fn open(file: Arc<FileBlob>) -> Result<Self> {
        let path = file.path().to_owned();
        Self::open_inner(file).map_err(|error| error.in_file(&path))
    }

    fn open_inner(file: Arc<FileBlob>) -> Result<Self> {
        let payload = tar::payload(&*file);
        let payload = payload.map_err(|error: Error| error.with_size(file.size()))?;
        let part = match payload {
            Some(tar::Payload { start, len }) => Part::new(file, start, len)?,
            None => Part::whole(file),
        };
        let zfile = ZfileReader::open(part.clone());
        let zfile = zfile.map_err(|error| error.with_size(part.size()))?;
        Ok(match zfile {
            Some(zfile) => Self::Zfile(Box::new(zfile)),
            None => Self::Plain(part),
        })
    }

    /// Returns the file of the blob.
    pub fn file(&self) -> &Arc<FileBlob> {
        self.blob().file()
    }

    /// Returns the ZFile, or `None` if the content isn't compressed.
    pub fn zfile(&self) -> Option<&ZfileReader> {
        match self {
            Self::Plain(_) => None,
            Self::Zfile(zfile) => Some(zfile),
        }
    }

    /// Returns the content of the tar wrapper, or the whole file without a wrapper.
    pub fn blob(&self) -> &Part {
        match self {
            Self::Plain(part) => part,
            Self::Zfile(zfile) => zfile.blob(),
        }
    }

    /// Returns whether the file has a tar wrapper.
    pub fn in_tar(&self) -> bool {
        // Only a tar header moves the content away from the start of the file.
        self.blob().start() > 0
    }
}

impl Blob for Payload {
    type Error = Error;

    fn size(&self) -> u64 {
        match self {
            Self::Plain(part) => part.size(),
            Self::Zfile(zfile) => zfile.size(),
        }
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        match self {
            Self::Plain(part) => part.read_at(offset, buf),
            Self::Zfile(zfile) => zfile.read_at(offset, buf),
        }
        .map_err(|error| error.in_file(self.file().path()))
    }

    fn stream(
        &self,
        offset: u64,
        len: u64,
        sink: &mut dyn FnMut(&[u8]) -> Result<()>,
    ) -> Result<()> {
        match self {
            Self::Plain(part) => part.stream(offset, len, sink),
            Self::Zfile(zfile) => zfile.stream(offset, len, sink),
        }
    }
}

/// An open layer. Its header, trailer and index are checked.
pub struct LayerReader {
    payload: Payload,
    lsmt: lsmt::Layer,
    trailer: lsmt::RawHeader,
    ident: Ident,
    segments: Arc<Vec<Segment>>,
}

/// The fields of a layer that identify it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Ident {
    /// UUID as text; empty if the layer has none.
    pub uuid: String,
    /// UUID of the layer below as text; empty if the layer has none.
    pub parent: String,
    /// The user's text, 256 bytes at most.
    pub user_tag: Vec<u8>,
}

impl Ident {
    /// Returns the texts in the fields of a trailer.
    fn of(labels: &Labels) -> Self {
        Self {
            uuid: String::from_utf8_lossy(text(&labels.uuid)).into_owned(),
            parent: String::from_utf8_lossy(text(&labels.parent)).into_owned(),
            user_tag: text(&labels.user_tag).to_vec(),
        }
    }

    /// Returns whether a text is a UUID other than all zeros: 32 hexadecimal digits, with or
    /// without hyphens. Readers treat any other text as no UUID.
    pub fn is_known(uuid: &str) -> bool {
        let is_text = |byte: u8| byte == b'-' || byte.is_ascii_hexdigit();
        uuid.bytes().all(is_text)
            && uuid.bytes().filter(u8::is_ascii_hexdigit).count() == 32
            && uuid.bytes().any(|byte| !matches!(byte, b'0' | b'-'))
    }
}

/// Returns the bytes of `field` before its first NUL.
fn text(field: &[u8]) -> &[u8] {
    field.split(|&byte| byte == 0).next().unwrap_or_default()
}

impl LayerReader {
    /// Opens the layer in the file or block device at `path`. `size` limits the blob to that many
    /// bytes from the start, for a block device or file that is longer than the blob.
    ///
    /// # Errors
    ///
    /// [`Error::InFile`] with the format fault or the read error.
    pub fn open(path: &Path, size: Option<u64>) -> Result<Self> {
        Self::from_file(Arc::new(FileBlob::open(path, size)?))
    }

    /// Opens the layer in `file`.
    ///
    /// # Errors
    ///
    /// As [`LayerReader::open`].
    pub fn from_file(file: Arc<FileBlob>) -> Result<Self> {
        Self::from_payload(Payload::open(file)?)
    }

    /// Opens the layer in `payload`.
    ///
    /// # Errors
    ///
    /// As [`LayerReader::open`].
    pub fn from_payload(payload: Payload) -> Result<Self> {
        let path = payload.file().path().to_owned();
        Self::from_payload_inner(payload).map_err(|error| error.in_file(&path))
    }

    fn from_payload_inner(payload: Payload) -> Result<Self> {
        let lsmt = lsmt::Layer::read(&payload).map_err(|error| match &payload {
            Payload::Plain(part) => error.with_size(part.size()),
            Payload::Zfile(_) => error,
        })?;
        let mut bytes = [0; 512];
        let at = payload.size() - lsmt::HEADER_SIZE;
        payload.read_at(at, &mut bytes)?;
        // Doesn't fail, unless the file changes while it is read.
        let trailer = lsmt::RawHeader::parse(&bytes).ok_or(format::Error::new(
            Fault::LsmtTrailerMagic,
            at,
            le64(&bytes, 0),
        ))?;
        let mut segments = Vec::new();
        lsmt.read_index(&payload, |segment| {
            segments.push(segment);
            Ok(())
        })?;
        segments.shrink_to_fit();
        Ok(Self {
            payload,
            lsmt,
            trailer,
            ident: Ident::of(&Labels::parse(&bytes)),
            segments: Arc::new(segments),
        })
    }

    /// Returns the path that the layer was opened by.
    pub fn path(&self) -> PathBuf {
        self.payload.file().path().to_owned()
    }

    /// Returns the LSMT file, with its wrapping.
    pub fn payload(&self) -> &Payload {
        &self.payload
    }

    /// Returns the fields of the trailer that readers need, checked.
    pub fn lsmt(&self) -> &lsmt::Layer {
        &self.lsmt
    }

    /// Returns the trailer as it is on disk. It was read again after the checks: if the file has
    /// changed in between, the values are unchecked.
    pub fn trailer(&self) -> &lsmt::RawHeader {
        &self.trailer
    }

    /// Returns the fields that identify the layer.
    pub fn ident(&self) -> &Ident {
        &self.ident
    }

    /// Returns the segments of the index, ascending, without padding.
    pub fn segments(&self) -> &[Segment] {
        &self.segments
    }

    /// Returns a reference to the segments that can outlive the reader.
    pub(crate) fn share_segments(&self) -> Arc<Vec<Segment>> {
        Arc::clone(&self.segments)
    }

    /// Reads all bytes of the layer. Checks every block if the layer is a ZFile, and returns the
    /// corrupt blocks.
    ///
    /// # Errors
    ///
    /// Read errors, and the error that `progress` returns.
    pub fn verify(&self, progress: crate::Progress<'_>) -> Result<Vec<crate::error::BlockError>> {
        match &self.payload {
            Payload::Zfile(zfile) => zfile.verify(progress),
            // Without a ZFile, nothing can be checked except that every byte is readable.
            Payload::Plain(part) => part
                .stream(0, part.size(), &mut |piece| progress(to_u64(piece.len())))
                .map(|()| Vec::new()),
        }
        .map_err(|error| error.in_file(self.payload.file().path()))
    }

    /// Returns the sum of what [`LayerReader::verify`] passes to `progress`, in bytes.
    pub fn verify_len(&self) -> u64 {
        self.payload.size()
    }
}
