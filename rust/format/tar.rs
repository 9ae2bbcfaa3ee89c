// SPDX-License-Identifier: GPL-2.0

//! The tar wrapper around a layer: one regular file, possibly with extended headers before it.
//!
//! Source: POSIX.1-2017 `pax`, "ustar Interchange Format" and "pax Interchange Format".

use super::num::{bytes_at, to_u64};
use super::{Blob, Error, Fault};

/// Length of a tar block in bytes.
const BLOCK: u64 = 512;
/// Largest number of headers that are read to find the file, its own included. Wrappers usually
/// have one or two.
const MAX_HEADERS: u32 = 64;
/// Length of the longest pax payload that is read, in bytes.
const MAX_PAX: u64 = 1 << 20;

/// Byte offsets of the fields in a tar header.
mod field {
    use core::ops::Range;

    pub(super) const SIZE: Range<usize> = 124..136;
    pub(super) const CHECKSUM: Range<usize> = 148..156;
    pub(super) const TYPE: usize = 156;
    pub(super) const MAGIC: usize = 257;
}

/// The bytes of a blob that are the content of the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Payload {
    /// Offset of the first byte in the blob.
    pub start: u64,
    /// Length in bytes.
    pub len: u64,
}

/// Finds the file in a tar wrapper. Returns `None` if `blob` doesn't start with a tar header.
///
/// # Errors
///
/// [`Fault::TarHeader`], [`Fault::TarSize`], [`Fault::TarPax`] or [`Fault::TarMember`], and the
/// errors of reading `blob`.
pub fn payload<B: Blob>(blob: &B) -> Result<Option<Payload>, B::Error> {
    let mut block = [0; 512];
    if blob.size() < BLOCK {
        return Ok(None);
    }
    blob.read_at(0, &mut block)?;
    if !is_header(&block) {
        return Ok(None);
    }

    let mut at = 0;
    let mut pax_size = None;
    for _ in 0..MAX_HEADERS {
        let size = octal(&block[field::SIZE]).ok_or(Error::new(
            Fault::TarSize,
            at + to_u64(field::SIZE.start),
            0,
        ))?;
        // No overflow: the header was read, so it is within the blob.
        let data = at + BLOCK;
        match block[field::TYPE] {
            b'x' => pax_size = read_pax(blob, data, size)?.or(pax_size),
            // A global header, or a GNU long name or long link name: skipped, nothing in it is
            // needed.
            b'g' | b'L' | b'K' => {}
            b'0' | b'\0' | b'7' => {
                let len = pax_size.filter(|&n| n > 0).unwrap_or(size);
                let end = data.checked_add(len).filter(|&end| end <= blob.size());
                return match end {
                    Some(_) => Ok(Some(Payload { start: data, len })),
                    None => Err(Error::new(Fault::TarSize, at, len).into()),
                };
            }
            other => {
                let at = at + to_u64(field::TYPE);
                return Err(Error::new(Fault::TarMember, at, other.into()).into());
            }
        }
        at = size
            .checked_next_multiple_of(BLOCK)
            .and_then(|padded| data.checked_add(padded))
            .filter(|&next| next <= blob.size().saturating_sub(BLOCK))
            .ok_or(Error::new(Fault::TarSize, at, size))?;
        blob.read_at(at, &mut block)?;
        if !is_header(&block) {
            return Err(Error::new(Fault::TarHeader, at, 0).into());
        }
    }
    Err(Error::new(Fault::TarHeader, at, MAX_HEADERS.into()).into())
}

/// Returns whether `block` is a ustar or GNU tar header with the right checksum.
fn is_header(block: &[u8; 512]) -> bool {
    match &bytes_at::<8>(block, field::MAGIC) {
        b"ustar  \0" => {}
        [b'u', b's', b't', b'a', b'r', _, b'0', b'0'] => {}
        _ => return false,
    }
    let Some(wanted) = octal(&block[field::CHECKSUM]) else {
        return false;
    };
    // Old writers added up the bytes as signed numbers.
    let (mut unsigned, mut signed) = (0u64, 0i64);
    for (at, &byte) in block.iter().enumerate() {
        let byte = if field::CHECKSUM.contains(&at) {
            b' '
        } else {
            byte
        };
        unsigned += u64::from(byte);
        signed += i64::from(i8::from_ne_bytes([byte]));
    }
    wanted == unsigned || i64::try_from(wanted) == Ok(signed)
}

/// Parses a number: octal digits, possibly after blanks and before a blank or NUL, or GNU's
/// base-256 form. An empty field is 0. Returns `None` if the number is malformed or doesn't fit.
fn octal(field: &[u8]) -> Option<u64> {
    if let Some((&0x80, digits)) = field.split_first() {
        return digits.iter().try_fold(0u64, |n, &byte| {
            n.checked_mul(256)?.checked_add(byte.into())
        });
    }
    let digits = field.trim_ascii_start();
    let end = digits
        .iter()
        .position(|&byte| byte == 0 || byte == b' ')
        .unwrap_or(digits.len());
    digits
        .iter()
        .take(end)
        .try_fold(0u64, |n, &byte| match byte {
            b'0'..=b'7' => n.checked_mul(8)?.checked_add((byte - b'0').into()),
            _ => None,
        })
}

/// Reads the pax payload of `len` bytes at byte `at`. Returns the value of the last `size` record,
/// if there is one.
fn read_pax<B: Blob>(blob: &B, at: u64, len: u64) -> Result<Option<u64>, B::Error> {
    if len > MAX_PAX {
        return Err(Error::new(Fault::TarPax, at, len).into());
    }
    let mut parser = Pax::new();
    blob.stream(at, len, &mut |piece| {
        for &byte in piece {
            parser
                .feed(byte)
                .ok_or(Error::new(Fault::TarPax, at, byte.into()))?;
        }
        Ok(())
    })?;
    match parser.state {
        State::Length if parser.left == 0 => Ok(parser.size),
        _ => Err(Error::new(Fault::TarPax, at, len).into()),
    }
}

/// A parser of pax records, `LENGTH KEY=VALUE\n`, that takes one byte at a time.
struct Pax {
    state: State,
    /// Bytes of this record that are still to come, its newline included. In [`State::Length`], the
    /// number of bytes of this record so far.
    left: u64,
    /// The number that has been parsed so far.
    number: u64,
    /// Bytes of the key that have matched [`Pax::KEY`].
    key: usize,
    /// The value of the last `size` record.
    size: Option<u64>,
}

/// The part of a record that a [`Pax`] expects next.
#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    Length,
    Key,
    Size,
    Skip,
}

impl Pax {
    const KEY: &'static [u8] = b"size=";

    fn new() -> Self {
        Self {
            state: State::Length,
            left: 0,
            number: 0,
            key: 0,
            size: None,
        }
    }

    /// Takes the next byte. Returns `None` if the record is malformed.
    fn feed(&mut self, byte: u8) -> Option<()> {
        if self.state == State::Length {
            self.left += 1;
            match byte {
                b'0'..=b'9' => self.push(byte)?,
                b' ' if self.left > 1 => {
                    // At least one byte of key and the newline must follow.
                    self.left = self.number.checked_sub(self.left).filter(|&n| n >= 2)?;
                    (self.state, self.number, self.key) = (State::Key, 0, 0);
                }
                _ => return None,
            }
            return Some(());
        }

        self.left = self.left.checked_sub(1)?;
        let last = self.left == 0;
        // The last byte of a record must be a newline. Only skipped parts may have more newlines.
        if last != (byte == b'\n') && (last || self.state != State::Skip) {
            return None;
        }
        match self.state {
            State::Key if Self::KEY.get(self.key) == Some(&byte) => {
                self.key += 1;
                if self.key == Self::KEY.len() {
                    self.state = State::Size;
                }
            }
            State::Key => self.state = State::Skip,
            State::Size if !last => match byte {
                b'0'..=b'9' => self.push(byte)?,
                _ => return None,
            },
            State::Size => self.size = Some(self.number),
            State::Length | State::Skip => {}
        }
        if last {
            (self.state, self.number, self.left) = (State::Length, 0, 0);
        }
        Some(())
    }

    /// Appends a decimal digit to the number.
    fn push(&mut self, digit: u8) -> Option<()> {
        self.number = self
            .number
            .checked_mul(10)?
            .checked_add((digit - b'0').into())?;
        Some(())
    }
}
