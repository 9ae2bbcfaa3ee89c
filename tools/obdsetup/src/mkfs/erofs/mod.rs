// SPDX-License-Identifier: GPL-2.0

//! erofs. Without compression it is simple enough to be written here ([`write`]): mkfs.erofs stores
//! holes as zeros, and takes the order of a directory from the source, or loses sockets and some
//! numbers of devices. With options for it, say to compress, it does the work ([`program`]).

mod program;
mod write;

use std::path::Path;

use anyhow::Result;
use tempfile::NamedTempFile;

use super::tree::Tree;
use super::{Options, Stamp};

/// Makes the file system of `tree` in a file in `place`.
pub(super) fn make(
    tree: &Tree,
    options: &Options<'_>,
    stamp: &Stamp,
    place: &Path,
) -> Result<NamedTempFile> {
    match options.args.is_empty() {
        true => write::make(tree, stamp, place),
        false => program::make(tree, options, stamp, place),
    }
}
