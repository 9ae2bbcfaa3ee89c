// SPDX-License-Identifier: GPL-2.0

//! The digest that identifies the disk of a stack. It is recorded in a store, so that the changes are never used with
//! another disk.

use sha2::{Digest, Sha256};

use crate::format::lsmt::HEADER_SIZE;
use crate::format::num::to_usize;
use crate::format::Blob;
use crate::identity::is_placed;
use crate::layer::Ident;
use crate::on_disk::lsmt::entry;
use crate::{LayerReader, Result, Stack};

/// Prefixes of the hashed bytes: `TOP` if only the UUID of the topmost layer is hashed, `ALL` if all layers are.
const TOP: &[u8] = b"dm-overlaybd origin 1: top\0";
const ALL: &[u8] = b"dm-overlaybd origin 1: all\0";

/// Samples of the data of a layer without UUID, in bytes: the first `FIRST`, and `PIECES` pieces of `PIECE` bytes,
/// evenly spaced.
const FIRST: u64 = 64 << 10;
const PIECE: u64 = 4096;
const PIECES: u64 = 64;

/// What identifies a disk.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Origin {
    /// SHA-256 that identifies the disk.
    pub digest: [u8; 32],
    /// UUID of the topmost layer, for messages; empty if it has none.
    pub uuid: String,
}

impl Origin {
    /// Returns what identifies the disk of `stack`. The digest is made from the size of the disk and from the UUID
    /// of the topmost layer, if that UUID is made from the content of all layers. `fits` says whether the caller
    /// has checked that the UUID was made from these layers. Otherwise, the digest is made from the size of the
    /// disk, the UUIDs, sizes and indexes of all layers, and samples of the data of layers without UUID.
    ///
    /// # Errors
    ///
    /// Read errors, and corrupt blocks.
    pub fn of(stack: &Stack, fits: bool) -> Result<Self> {
        let ident = stack.layers().last().map(|layer| layer.ident());
        let uuid = ident.map_or("", |ident| ident.uuid.as_str());
        let uuid = match Ident::is_known(uuid) {
            true => uuid.to_ascii_uppercase(),
            false => String::new(),
        };
        let mut hasher = Sha256::new();
        match fits && is_placed(&uuid) {
            true => {
                hasher.update(TOP);
                hasher.update(&uuid);
            }
            false => {
                hasher.update(ALL);
                for layer in stack.layers() {
                    hasher.update(layer.ident().uuid.to_ascii_uppercase());
                    hasher.update([0]);
                    hasher.update(layer.lsmt().virtual_size().to_le_bytes());
                    for segment in layer.segments() {
                        hasher.update(entry(segment));
                    }
                    if !Ident::is_known(&layer.ident().uuid) {
                        sample(layer, &mut hasher)?;
                    }
                }
            }
        }
        hasher.update(stack.sectors().to_le_bytes());
        Ok(Self {
            digest: hasher.finalize().into(),
            uuid,
        })
    }
}

/// Hashes samples of the data of `layer`.
fn sample(layer: &LayerReader, hasher: &mut Sha256) -> Result<()> {
    let len = layer.trailer().index_offset.saturating_sub(HEADER_SIZE);
    let mut buffer = vec![0; to_usize(FIRST.min(len))];
    layer.payload().read_at(HEADER_SIZE, &mut buffer)?;
    hasher.update(&buffer);
    buffer.truncate(to_usize(PIECE));
    let step = (len - PIECE.min(len)) / PIECES;
    for nth in 1..=PIECES {
        let at = HEADER_SIZE + nth * step;
        layer.payload().read_at(at, &mut buffer)?;
        hasher.update(&buffer);
    }
    Ok(())
}
