// SPDX-License-Identifier: GPL-2.0

//! A layer, whatever it is wrapped in.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::format::lsmt::{self, Segment};
use crate::format::num::to_u64;
use crate::format::{tar, Blob};
use crate::{Error, FileBlob, Part, Result, ZfileReader};

/// What a blob holds, with the tar wrapper and the compression peeled off.
pub enum Payload {
    /// The bytes as they stand in the file.
    Plain(Part),
    /// The original file of a ZFile.
    Zfile(Box<ZfileReader>),
}

impl Payload {
    /// Finds the tar wrapper and the ZFile in `file`. Most often what is inside is an LSMT file,
    /// but that isn't looked at.
    ///
    /// # Errors
    ///
    /// One of the `Tar` and `Zfile` faults, and what reading fails with.
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

    /// The file that it is in.
    pub fn file(&self) -> &Arc<FileBlob> {
        self.blob().file()
    }

    /// The ZFile, where there is one.
    pub fn zfile(&self) -> Option<&ZfileReader> {
        match self {
            Self::Plain(_) => None,
            Self::Zfile(zfile) => Some(zfile),
        }
    }

    /// What is in the tar wrapper, or the whole file where there is no wrapper.
    pub fn blob(&self) -> &Part {
        match self {
            Self::Plain(part) => part,
            Self::Zfile(zfile) => zfile.blob(),
        }
    }

    /// Whether there is a tar wrapper.
    pub fn in_tar(&self) -> bool {
        // Only behind a tar header does a payload start elsewhere.
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

/// A layer, opened: header, trailer and index checked.
pub struct LayerReader {
    payload: Payload,
    lsmt: lsmt::Layer,
    ident: Ident,
    segments: Arc<Vec<Segment>>,
}

/// What a layer says of itself.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Ident {
    /// UUID as text; empty where there is none.
    pub uuid: String,
    /// UUID of the layer below as text; empty where there is none.
    pub parent: String,
    /// The user's text, 256 bytes at most.
    pub user_tag: Vec<u8>,
}

impl Ident {
    /// Takes the fields out of a trailer.
    fn read(trailer: &[u8; 512]) -> Self {
        let text = |at: usize, len: usize| {
            let bytes = trailer.get(at..at + len).unwrap_or_default();
            let end = bytes.iter().position(|&byte| byte == 0);
            bytes.get(..end.unwrap_or(len)).unwrap_or_default()
        };
        Self {
            uuid: String::from_utf8_lossy(text(lsmt::field::UUID, 37)).into_owned(),
            parent: String::from_utf8_lossy(text(lsmt::field::PARENT, 37)).into_owned(),
            user_tag: text(lsmt::field::USER_TAG, 256).to_vec(),
        }
    }

    /// Whether a text is a UUID, and not all zeros: 32 hexadecimal digits, with or without hyphens.
    /// The field is of no use to a reader otherwise, so what else is there means none.
    pub fn is_known(uuid: &str) -> bool {
        let is_text = |byte: u8| byte == b'-' || byte.is_ascii_hexdigit();
        uuid.bytes().all(is_text)
            && uuid.bytes().filter(u8::is_ascii_hexdigit).count() == 32
            && uuid.bytes().any(|byte| !matches!(byte, b'0' | b'-'))
    }
}

impl LayerReader {
    /// Opens the layer in the file or block device at `path`. Of a block device, `size` says how
    /// many bytes from its start are the blob.
    ///
    /// # Errors
    ///
    /// [`Error::InFile`] with the format fault or what reading fails with.
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
        let mut trailer = [0; 512];
        payload.read_at(payload.size() - lsmt::HEADER_SIZE, &mut trailer)?;
        let mut segments = Vec::new();
        lsmt.read_index(&payload, |segment| {
            segments.push(segment);
            Ok(())
        })?;
        segments.shrink_to_fit();
        Ok(Self {
            payload,
            lsmt,
            ident: Ident::read(&trailer),
            segments: Arc::new(segments),
        })
    }

    /// The path that it was opened by.
    pub fn path(&self) -> PathBuf {
        self.payload.file().path().to_owned()
    }

    /// The LSMT file and what it is wrapped in.
    pub fn payload(&self) -> &Payload {
        &self.payload
    }

    /// The checked trailer.
    pub fn lsmt(&self) -> &lsmt::Layer {
        &self.lsmt
    }

    /// What the layer says of itself.
    pub fn ident(&self) -> &Ident {
        &self.ident
    }

    /// The index, padding left out, ascending.
    pub fn segments(&self) -> &[Segment] {
        &self.segments
    }

    /// The index, for keeping.
    pub(crate) fn share_segments(&self) -> Arc<Vec<Segment>> {
        Arc::clone(&self.segments)
    }

    /// Reads and checks all data: every block of the ZFile, or every segment where there is none.
    /// Gives the blocks that are corrupt.
    ///
    /// # Errors
    ///
    /// What reading fails with, and what `progress` stops with.
    pub fn verify(&self, progress: crate::Progress<'_>) -> Result<Vec<crate::error::BlockError>> {
        match &self.payload {
            Payload::Zfile(zfile) => zfile.verify(progress),
            // Nothing to check against; but all of it must be readable.
            Payload::Plain(part) => part
                .stream(0, part.size(), &mut |piece| progress(to_u64(piece.len())))
                .map(|()| Vec::new()),
        }
        .map_err(|error| error.in_file(self.payload.file().path()))
    }

    /// How much [`LayerReader::verify`] will tell its `progress`, in bytes.
    pub fn verify_len(&self) -> u64 {
        self.payload.size()
    }
}
