// SPDX-License-Identifier: GPL-2.0

//! The identity of the disk of a stack. A store has it, so that no other disk gets the changes.

use sha2::{Digest, Sha256};

use crate::identity::is_placed;
use crate::layer::Ident;
use crate::Stack;

/// Prefixes of the hashed bytes: for a top layer whose UUID covers the layers below, and for all layers.
const TOP: &[u8] = b"dm-overlaybd origin 1: top\0";
const ALL: &[u8] = b"dm-overlaybd origin 1: all\0";

/// Identity of a disk.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Origin {
    /// SHA-256 that identifies the disk.
    pub digest: [u8; 32],
    /// UUID of the topmost layer, for messages; empty if it has none.
    pub uuid: String,
}

impl Origin {
    /// Returns the identity of the disk of `stack`. It is made from the UUID of the topmost layer if that is
    /// made from the content of all layers; otherwise from the UUIDs, sizes and indexes of all layers.
    pub fn of(stack: &Stack) -> Self {
        let ident = stack.layers().last().map(|layer| layer.ident());
        let uuid = ident.map_or("", |ident| ident.uuid.as_str());
        let uuid = match Ident::is_known(uuid) {
            true => uuid.to_ascii_uppercase(),
            false => String::new(),
        };
        let mut hasher = Sha256::new();
        match is_placed(&uuid) {
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
                        hasher.update(segment.to_bytes());
                    }
                }
            }
        }
        hasher.update(stack.sectors().to_le_bytes());
        Self {
            digest: hasher.finalize().into(),
            uuid,
        }
    }
}
