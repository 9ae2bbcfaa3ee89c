// SPDX-License-Identifier: GPL-2.0

//! Decompresses a file and checks its checksums. Several compressed files in a row count as one,
//! except `.lzma` files. A file that ends early or is followed by other data is an error.

use std::fs::File;
use std::io::{self, BufRead, ErrorKind, Read};

use liblzma::stream::Stream;
use overlaybd::format::num::to_usize;

use super::compression::Compression;
use super::source::Source;

/// Memory limit of a decoder of xz, lzma or lzip, in bytes. `xz -9` needs 65 MiB.
const XZ_MEMORY: u64 = 256 << 20;
/// Longest block of the old LZ4 format, in bytes.
const LEGACY_BLOCK: usize = 8 << 20;

/// The decompressed content of a file.
pub(crate) struct Unpack {
    compression: Option<Compression>,
    state: State,
}

enum State {
    /// Not compressed.
    Plain(Source),
    /// Before the first compressed file (`true`: one must follow), or after one (`false`: none need follow).
    Between(Source, bool),
    Gzip(Box<flate2::bufread::GzDecoder<Source>>),
    Bzip2(bzip2::bufread::BzDecoder<Source>),
    /// xz, lzma and lzip.
    Lzma(liblzma::bufread::XzDecoder<Source>),
    Zstd(zstd::stream::read::Decoder<'static, Source>),
    Lz4(lz4::Decoder<Source>),
    Lz4Legacy(Legacy),
    /// At the end or after an error, with the offset in the compressed file.
    Done(u64),
}

impl Unpack {
    /// Decompresses `file`, whose position must be 0. `None` means that it is not compressed.
    pub(crate) fn new(file: File, compression: Option<Compression>) -> Self {
        let source = Source::new(file);
        let state = match compression {
            None => State::Plain(source),
            Some(_) => State::Between(source, true),
        };
        Self { compression, state }
    }

    /// Returns the decoder's offset in the compressed file.
    pub(crate) fn position(&self) -> u64 {
        match &self.state {
            State::Plain(source) | State::Between(source, _) => source.position(),
            State::Gzip(decoder) => decoder.get_ref().position(),
            State::Bzip2(decoder) => decoder.get_ref().position(),
            State::Lzma(decoder) => decoder.get_ref().position(),
            State::Zstd(decoder) => decoder.get_ref().position(),
            State::Lz4(decoder) => decoder.reader().position(),
            State::Lz4Legacy(legacy) => legacy.source.position(),
            State::Done(at) => *at,
        }
    }

    /// Skips up to `len` bytes without reading them, none of them after the end of the file. Returns their number: 0 if
    /// the file is compressed.
    pub(crate) fn skip(&mut self, len: u64) -> io::Result<u64> {
        match &mut self.state {
            State::Plain(source) => source.skip(len),
            _ => Ok(0),
        }
    }

    /// Starts to decompress the next compressed file. At the end, returns [`State::Done`], unless a
    /// compressed file `must` follow.
    fn begin(&self, mut source: Source, must: bool) -> io::Result<State> {
        let Some(compression) = self.compression else {
            return Ok(State::Plain(source));
        };
        let head = source.fill_buf()?;
        if head.is_empty() && !must {
            return Ok(State::Done(source.position()));
        }
        if !must && matches!(head, [0, ..]) {
            // Files from tapes or downloads, and xz files, may be padded with zeros.
            skip_zeros(&mut source)?;
            return self.begin(source, false);
        }
        // If the buffer ends within the magic number, the decoder checks it.
        let head: Vec<u8> = head.iter().copied().take(Compression::LOOKS_AT).collect();
        let continues = head.len() < Compression::LOOKS_AT
            || Compression::of(&head).is_some_and(|found| compression.may_be_followed_by(found));
        if !must && (compression == Compression::Lzma || !continues) {
            return Err(io::Error::new(
                ErrorKind::InvalidData,
                "something else follows the compressed data",
            ));
        }
        Ok(match compression {
            Compression::Gzip => State::Gzip(Box::new(flate2::bufread::GzDecoder::new(source))),
            Compression::Bzip2 => State::Bzip2(bzip2::bufread::BzDecoder::new(source)),
            Compression::Xz => lzma(source, Stream::new_stream_decoder(XZ_MEMORY, 0)?),
            Compression::Lzma => lzma(source, Stream::new_lzma_decoder(XZ_MEMORY)?),
            Compression::Lzip => lzma(source, Stream::new_lzip_decoder(XZ_MEMORY, 0)?),
            Compression::Zstd => {
                let decoder = zstd::stream::read::Decoder::with_buffer(source)?;
                State::Zstd(decoder.single_frame())
            }
            Compression::Lz4 => State::Lz4(lz4::Decoder::new(source)?),
            Compression::Lz4Legacy => State::Lz4Legacy(Legacy::new(source)?),
        })
    }

    fn read_some(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        loop {
            let read = match &mut self.state {
                State::Plain(source) => return source.read(buf),
                State::Done(_) => return Ok(0),
                State::Between(..) => 0,
                State::Gzip(decoder) => decoder.read(buf)?,
                State::Bzip2(decoder) => decoder.read(buf)?,
                State::Lzma(decoder) => decoder.read(buf)?,
                State::Zstd(decoder) => decoder.read(buf)?,
                State::Lz4(decoder) => decoder.read(buf)?,
                State::Lz4Legacy(legacy) => legacy.read(buf)?,
            };
            if read > 0 {
                return Ok(read);
            }
            let at = self.position();
            let (source, must) = match std::mem::replace(&mut self.state, State::Done(at)) {
                State::Between(source, must) => (source, must),
                State::Plain(source) => (source, false),
                State::Gzip(decoder) => (decoder.into_inner(), false),
                State::Bzip2(decoder) => (decoder.into_inner(), false),
                State::Lzma(decoder) => (decoder.into_inner(), false),
                State::Zstd(decoder) => (decoder.finish(), false),
                State::Lz4(decoder) => {
                    let (source, finished) = decoder.finish();
                    finished.map_err(|_| early_end())?;
                    (source, false)
                }
                State::Lz4Legacy(legacy) => (legacy.source, false),
                State::Done(_) => return Ok(0),
            };
            self.state = self.begin(source, must)?;
        }
    }
}

impl Read for Unpack {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        if buf.is_empty() {
            return Ok(0);
        }
        let read = self.read_some(buf);
        if read.is_err() {
            // Decoders cannot continue after an error.
            self.state = State::Done(self.position());
        }
        read
    }
}

impl Compression {
    /// Returns whether data of this compression may be followed by data of `next`: by data of the same
    /// compression, and zstd and LZ4 also by a skippable frame, which [`Self::of`] takes for zstd.
    fn may_be_followed_by(self, next: Self) -> bool {
        let skippable = |one| matches!(one, Self::Zstd | Self::Lz4);
        self == next || skippable(self) && next == Self::Zstd
    }
}

fn lzma(source: Source, stream: Stream) -> State {
    State::Lzma(liblzma::bufread::XzDecoder::new_stream(source, stream))
}

fn early_end() -> io::Error {
    ErrorKind::UnexpectedEof.into()
}

fn skip_zeros(source: &mut Source) -> io::Result<()> {
    loop {
        let buf = source.fill_buf()?;
        let zeros = buf.iter().take_while(|&&byte| byte == 0).count();
        let end = zeros < buf.len() || buf.is_empty();
        source.consume(zeros);
        if end {
            return Ok(());
        }
    }
}

/// The old LZ4 format: a magic number, then blocks with their lengths, up to the end of the file or
/// the next magic number. It has no checksum.
struct Legacy {
    source: Source,
    block: Vec<u8>,
    /// Number of bytes of `block` already returned.
    taken: usize,
}

impl Legacy {
    fn new(mut source: Source) -> io::Result<Self> {
        let mut magic = [0; 4];
        source.read_exact(&mut magic)?;
        Ok(Self {
            source,
            block: Vec::new(),
            taken: 0,
        })
    }

    /// Decodes the next block. Returns `false` at the end of the file or before the next magic number.
    fn next_block(&mut self) -> io::Result<bool> {
        let corrupt = || io::Error::new(ErrorKind::InvalidData, "corrupt block");
        let head = self.source.fill_buf()?;
        if head.is_empty() || head.starts_with(b"\x02\x21\x4c\x18") {
            return Ok(false);
        }
        let mut len = [0; 4];
        self.source.read_exact(&mut len)?;
        let len = to_usize(u32::from_le_bytes(len).into());
        // Incompressible data grows by one part in 255.
        if len == 0 || len > LEGACY_BLOCK + LEGACY_BLOCK / 255 + 16 {
            return Err(corrupt());
        }
        let mut stored = vec![0; len];
        self.source.read_exact(&mut stored)?;
        self.block.resize(LEGACY_BLOCK, 0);
        let len = i32::try_from(LEGACY_BLOCK).ok();
        let len = lz4::block::decompress_to_buffer(&stored, len, &mut self.block);
        self.block.truncate(len.map_err(|_| corrupt())?);
        self.taken = 0;
        Ok(true)
    }
}

impl Read for Legacy {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        while self.taken == self.block.len() {
            if !self.next_block()? {
                return Ok(0);
            }
        }
        let mut rest = self.block.get(self.taken..).unwrap_or_default();
        let read = rest.read(buf)?;
        self.taken += read;
        Ok(read)
    }
}
