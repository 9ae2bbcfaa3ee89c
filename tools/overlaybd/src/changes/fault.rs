// SPDX-License-Identifier: GPL-2.0

//! Faults of a store of changes.

/// Size in bytes of the magic at the start of a store.
pub const MAGIC_LEN: usize = 16;

/// A fault of a store.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Fault {
    /// The file or device is no store: it has no magic.
    #[error("not a store of changes: begins with \"{}\", not with \"obdsetup changes\"", .0.escape_ascii())]
    Magic([u8; MAGIC_LEN]),

    /// A field of the head or of dm-snapshot's header has a wrong value.
    #[error("{field} at byte {at}: found {found}, expected {expected}")]
    Field {
        /// Name of the field.
        field: &'static str,
        /// Byte offset in the file or device.
        at: u64,
        /// Value found.
        found: u64,
        /// Values expected.
        expected: &'static str,
    },

    /// The file or device is shorter than the head says.
    #[error("the store of changes is cut short: it has {there} bytes, and should have {wanted}")]
    Short {
        /// Size in bytes.
        there: u64,
        /// Size in bytes according to the head.
        wanted: u64,
    },

    /// dm-snapshot has marked the store as invalid.
    #[error("the changes are lost: dm-snapshot has marked the store as invalid, since a write to it failed")]
    Invalid,

    /// A chunk of an exception is out of range.
    #[error("exception {nth} of the store at byte {at}: chunk {chunk}, expected {expected}")]
    Chunk {
        /// Number of the exception, from 0.
        nth: u64,
        /// Byte offset in the file or device.
        at: u64,
        /// The chunk.
        chunk: u64,
        /// Chunks expected.
        expected: &'static str,
    },

    /// Two exceptions have the same chunk of the disk, or the same chunk of the store.
    #[error("exceptions of the store: {of} chunk {chunk} is there twice")]
    Twice {
        /// `disk` or `store`.
        of: &'static str,
        /// The chunk.
        chunk: u64,
    },

    /// The list of exceptions doesn't end within the store.
    #[error("exceptions of the store: no end after {count}")]
    NoEnd {
        /// Number of exceptions in the store.
        count: u64,
    },
}
