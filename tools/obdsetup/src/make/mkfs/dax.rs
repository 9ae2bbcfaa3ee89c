// SPDX-License-Identifier: GPL-2.0

//! Checks that DAX can map the files of a new file system. Arguments for mkfs may have made it in another way than
//! obdsetup does.

use std::fs::File;
use std::os::unix::fs::FileExt;

use anyhow::{Context, Result};
use overlaybd::dax::PAGE_SIZES;
use overlaybd::format::num::le32;

use super::FileSystem;
use crate::terminal::exit::Failure;

/// Byte of the image at which ext4 and erofs have their superblock.
const SUPERBLOCK: u64 = 1024;
/// Byte in the superblock of ext4 with the binary logarithm of the block size in KiB.
const EXT_LOG_BLOCK: usize = 24;
/// Byte in the superblock of ext4 with the incompatible features, and the feature `inline_data`.
const EXT_FEATURES: usize = 96;
const EXT_INLINE_DATA: u32 = 0x8000;
/// Byte in the superblock of erofs with the binary logarithm of the block size in bytes.
const EROFS_LOG_BLOCK: usize = 12;
/// Byte in the superblock of erofs with the incompatible features, and those of compressed files: `lz4_0padding`,
/// `compr_cfgs` or `big_pcluster`, `ztailpacking`, `fragments` or `dedupe`.
const EROFS_FEATURES: usize = 80;
const EROFS_COMPRESSED: u32 = 0x33;
/// Bytes in the superblock of erofs with the compression algorithms, or with the distance of matches if only LZ4 is
/// used. They are not 0 if there is compression, of which old forms have no feature.
const EROFS_ALGORITHMS: std::ops::Range<usize> = 84..86;

/// Checks the superblock of the file system `fs` in `image`, which is an ext4 or erofs.
pub(super) fn check(fs: FileSystem, image: &File) -> Result<()> {
    let mut block = [0; 1024];
    let read = image.read_exact_at(&mut block, SUPERBLOCK);
    read.context("cannot read the superblock of the new file system")?;
    let byte = |at: usize| u32::from(block.get(at).copied().unwrap_or_default());
    let shift = match fs {
        FileSystem::Erofs => byte(EROFS_LOG_BLOCK),
        _ => 10 + byte(EXT_LOG_BLOCK),
    };
    let size = 1_u64.checked_shl(shift).unwrap_or_default();
    if !PAGE_SIZES.contains(&size) {
        return Err(Failure::usage(format!(
            "--dax needs a file system with blocks of 4096 bytes, or of 16384 or 65536 for kernels with such pages, \
             and this {} has blocks of {size} bytes: leave out the --mkfs-arg for its blocks",
            fs.name()
        )));
    }
    if fs == FileSystem::Erofs {
        let algorithms = block.get(EROFS_ALGORITHMS).unwrap_or_default();
        let is_compressed = algorithms.iter().any(|&byte| byte != 0);
        if is_compressed || le32(&block, EROFS_FEATURES) & EROFS_COMPRESSED != 0 {
            return Err(Failure::usage(
                "--dax needs a file system without compression, and this erofs has it: leave out the --mkfs-arg \
                 for that",
            ));
        }
    } else if le32(&block, EXT_FEATURES) & EXT_INLINE_DATA != 0 {
        return Err(Failure::usage(format!(
            "--dax needs a file system without data beside inodes, and this {} has inline_data: leave out the \
             --mkfs-arg for that",
            fs.name()
        )));
    }
    Ok(())
}
