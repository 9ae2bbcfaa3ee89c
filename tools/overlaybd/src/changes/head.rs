// SPDX-License-Identifier: GPL-2.0

//! The head of a store: 4 KiB before the exception store of dm-snapshot.

use crate::format::lsmt::MAX_END;
use crate::format::num::{bytes_at, le32, le64, to_usize};
use crate::format::{Blob, SECTOR_SIZE};
use crate::zfile_writer::put;
use crate::{Error, Result};

use super::fault::{Fault, MAGIC_LEN};
use super::origin::Origin;

/// Size in bytes.
pub const SIZE: u64 = 4096;
/// Number of bytes in use: one sector, which a disk writes completely or not at all.
pub const USED: usize = 512;
const MAGIC: &[u8; MAGIC_LEN] = b"obdsetup changes";
const VERSION: u32 = 1;
/// Size in sectors of a chunk of a new store.
pub const CHUNK: u32 = 8;
/// Largest size in sectors of a chunk: 1 MiB.
const MAX_CHUNK: u32 = 2048;
/// Length of a UUID as text.
const UUID_LEN: usize = 36;

/// Byte offsets of the fields; numbers are little-endian.
mod field {
    pub(super) const VERSION: usize = 16;
    pub(super) const STATE: usize = 20;
    pub(super) const DISK: usize = 24;
    pub(super) const STORE: usize = 32;
    pub(super) const CHUNK: usize = 40;
    pub(super) const DIGEST: usize = 48;
    pub(super) const UUID: usize = 80;
    pub(super) const MACHINE: usize = 116;
    pub(super) const BOOT: usize = 132;
    pub(super) const CRC: usize = 508;
}

/// State of a store.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// Closed. The store has every chunk that was written. A later write to one of these chunks may have
    /// failed, with an error to the writer.
    Closed,
    /// Open, or was not closed: the machine went down, an obdsetup was killed, or the kernel removed
    /// the devices later (`close --deferred`).
    Open,
    /// The store has no room. Writes have failed because of this, or may have failed.
    Overflowed,
    /// dm-snapshot has given up the store, usually because a write to it failed. Changes may be
    /// missing.
    Failed,
}

impl State {
    fn number(self) -> u32 {
        match self {
            Self::Closed => 0,
            Self::Open => 1,
            Self::Overflowed => 2,
            Self::Failed => 3,
        }
    }
}

/// A machine, and one boot of it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Host {
    /// machine-id(5); zeros if not known.
    pub machine: [u8; 16],
    /// ID that the kernel makes at each boot; zeros if not known.
    pub boot: [u8; 16],
}

impl Host {
    /// Returns whether `other` is certainly a different machine. A container has its own machine ID, but the
    /// boot ID of its host.
    pub fn is_other(&self, other: &Self) -> bool {
        let unknown = [0; 16];
        self.machine != other.machine
            && self.machine != unknown
            && other.machine != unknown
            && (self.boot != other.boot || self.boot == unknown)
    }
}

/// The head of a store.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Head {
    /// State of the store.
    pub state: State,
    /// Size of the disk in sectors: 1 to 2^50.
    pub disk: u64,
    /// Size of the exception store in sectors: 1 to 2^50.
    pub store: u64,
    /// Size of a chunk in sectors: a power of two from 8 to 2048.
    pub chunk: u32,
    /// The disk that the changes belong to.
    pub origin: Origin,
    /// The machine that has opened the store last.
    pub host: Host,
}

impl Head {
    /// Reads the head of the store at the start of `blob`, and checks that `blob` is long enough for the store.
    ///
    /// # Errors
    ///
    /// [`Fault::Magic`], [`Fault::Field`], [`Fault::Short`]; read errors.
    pub fn read<B: Blob>(blob: &B) -> Result<Self>
    where
        Error: From<B::Error>,
    {
        let mut bytes = [0; USED];
        let there = to_usize(blob.size()).min(USED);
        if let Some(start) = bytes.get_mut(..there) {
            blob.read_at(0, start)?;
        }
        let head = Self::from_bytes(&bytes)?;
        // No overflow: both are below 2^60.
        let wanted = SIZE + head.store * SECTOR_SIZE;
        match blob.size() {
            there if there < wanted => Err(Fault::Short { there, wanted }.into()),
            _ => Ok(head),
        }
    }

    /// Parses the bytes in use.
    ///
    /// # Errors
    ///
    /// [`Fault::Magic`], [`Fault::Field`].
    pub fn from_bytes(bytes: &[u8; USED]) -> Result<Self, Fault> {
        let magic: [u8; MAGIC_LEN] = bytes_at(bytes, 0);
        if magic != *MAGIC {
            return Err(Fault::Magic(magic));
        }
        let wrong = |field, at: usize, found, expected| Fault::Field {
            field,
            at: at as u64,
            found,
            expected,
        };
        let check = |right, field, at, found, expected| match right {
            true => Ok(found),
            false => Err(wrong(field, at, found, expected)),
        };
        let number = |at| u64::from(le32(bytes, at));
        let crc = le32(bytes, field::CRC);
        let right = crc == Self::crc(bytes);
        check(
            right,
            "head CRC",
            field::CRC,
            crc.into(),
            "that of the bytes before it",
        )?;
        let version = number(field::VERSION);
        let right = version == u64::from(VERSION);
        check(right, "head version", field::VERSION, version, "1")?;
        let state = match number(field::STATE) {
            0 => State::Closed,
            1 => State::Open,
            2 => State::Overflowed,
            3 => State::Failed,
            found => return Err(wrong("head state", field::STATE, found, "0 to 3")),
        };
        let sectors = |field, at| {
            let found = le64(bytes, at);
            let right = (1..=MAX_END).contains(&found);
            check(right, field, at, found, "1 to 2^50 sectors")
        };
        let disk = sectors("head disk size", field::DISK)?;
        let store = sectors("head store size", field::STORE)?;
        let chunk = le32(bytes, field::CHUNK);
        let right = chunk.is_power_of_two() && (CHUNK..=MAX_CHUNK).contains(&chunk);
        let expected = "a power of two from 8 to 2048 sectors";
        check(
            right,
            "head chunk size",
            field::CHUNK,
            chunk.into(),
            expected,
        )?;
        let uuid: [u8; UUID_LEN] = bytes_at(bytes, field::UUID);
        let uuid = uuid.iter().take_while(|&&byte| byte != 0);
        Ok(Self {
            state,
            disk,
            store,
            chunk,
            origin: Origin {
                digest: bytes_at(bytes, field::DIGEST),
                uuid: uuid.copied().map(char::from).collect(),
            },
            host: Host {
                machine: bytes_at(bytes, field::MACHINE),
                boot: bytes_at(bytes, field::BOOT),
            },
        })
    }

    /// Returns the bytes in use. The rest of the head is zeros.
    pub fn to_bytes(&self) -> [u8; USED] {
        let mut bytes = [0; USED];
        put(&mut bytes, 0, MAGIC);
        put(&mut bytes, field::VERSION, &VERSION.to_le_bytes());
        put(&mut bytes, field::STATE, &self.state.number().to_le_bytes());
        put(&mut bytes, field::DISK, &self.disk.to_le_bytes());
        put(&mut bytes, field::STORE, &self.store.to_le_bytes());
        put(&mut bytes, field::CHUNK, &self.chunk.to_le_bytes());
        put(&mut bytes, field::DIGEST, &self.origin.digest);
        let uuid: Vec<u8> = self.origin.uuid.bytes().take(UUID_LEN).collect();
        put(&mut bytes, field::UUID, &uuid);
        put(&mut bytes, field::MACHINE, &self.host.machine);
        put(&mut bytes, field::BOOT, &self.host.boot);
        let crc = Self::crc(&bytes);
        put(&mut bytes, field::CRC, &crc.to_le_bytes());
        bytes
    }

    fn crc(bytes: &[u8; USED]) -> u32 {
        crate::crc32c(0, bytes.get(..field::CRC).unwrap_or_default())
    }

    /// Returns the size of a chunk in bytes.
    pub fn chunk_bytes(&self) -> u64 {
        u64::from(self.chunk) * SECTOR_SIZE
    }

    /// Returns the number of chunks of the disk. The last one may be partial.
    pub fn disk_chunks(&self) -> u64 {
        self.disk.div_ceil(self.chunk.into())
    }

    /// Returns the number of whole chunks of the exception store.
    pub fn store_chunks(&self) -> u64 {
        self.store / u64::from(self.chunk)
    }
}
