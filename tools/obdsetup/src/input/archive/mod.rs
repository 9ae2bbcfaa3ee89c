// SPDX-License-Identifier: GPL-2.0

//! Tar archives, compressed or not, as a stream of members.
//!
//! [`Archive`] reads each byte once, checks all that it can, and has byte offsets in its errors.
//! The crate `tar` cannot replace it. That crate ends a record at a newline in an extended attribute,
//! doesn't support sparse files of pax archives or times before 1970, and doesn't tell its offset;
//! it reads names of any length into memory, and if a header is missing, it stops without an error.
//!
//! [`Archive`] behaves like GNU tar run by root. Where GNU tar drops or changes something with at
//! most a warning, [`Archive`] returns an error:
//!
//! - names with `..`, unknown types, sizes that don't fit;
//! - an uncompressed archive without an end marker, a block of zeros: it may have been cut off
//!   between two members. Compressed data shows its end itself.
//!
//! The use of memory is limited, whatever the archive contains.

mod compression;
mod describe;
mod header;
mod member;
mod pax;
mod reader;
mod scan;
mod source;
mod sparse;

mod unpack;

#[cfg(test)]
#[allow(clippy::panic, clippy::unwrap_used)]
mod tests;

pub(crate) use compression::Compression;
pub(crate) use header::{is_header, BLOCK};
pub(crate) use member::{brief, Device, Extent, Member, MemberKind, Time};
pub(crate) use reader::{unpack_error, Archive};
pub(crate) use scan::{check, check_directory, is_whiteout, Package};
pub(crate) use unpack::Unpack;
