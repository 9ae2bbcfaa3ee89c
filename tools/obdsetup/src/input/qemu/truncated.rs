// SPDX-License-Identifier: GPL-2.0

//! Finds images that are cut off. qemu-img takes what is behind the end of a file for zeros, so that it converts
//! such images without an error.
//!
//! Each format has tables with the places of its data. They are read here, and the end of the data is compared
//! with the end of the file. `qemu-img map` doesn't help: a table that is cut off shows an empty disk there, and it
//! has no offsets for compressed data and for vhdx.
//!
//! Only what belongs to the disk counts: the last block of a file may end with the disk. What comes after the
//! data, such as a footer that is there twice, may be missing.
//!
//! Every value is hostile. A table is read in pieces, and no piece is kept. Tables that overlap are refused, so that
//! all tables together have no more bytes than the file, whose size bounds the time. qemu-img has checked the header
//! before; for a header that it would refuse, nothing is found here.

mod hypervisors;
mod qcow2;
mod vmdk;

use std::fs::File;
use std::io::{Seek, SeekFrom};
use std::path::Path;

use anyhow::{Context, Result};
use overlaybd::format::num::{to_u64, to_usize};

use super::vmdk::{open, read};
use crate::files::json::bad;
use crate::input::kind;
use crate::terminal::interrupt;

/// Number of bytes of a table that are read at once, at most.
const PIECE: usize = 64 << 10;
/// Length of a sector, in which some formats count.
const SECTOR: u64 = 512;

/// Checks that the image at `path`, which has the format `format`, is complete, and so are the other files with its
/// data. `size` is the size of its disk in bytes. Messages call the image `name`.
pub(super) fn check(path: &Path, name: &Path, format: &str, size: u64) -> Result<()> {
    if format == super::VMDK {
        return vmdk::check(path, name);
    }
    if format == super::RAW {
        return raw(path, name);
    }
    let find = match format {
        super::QCOW2 => qcow2::find,
        "qed" => hypervisors::qed,
        "vdi" => hypervisors::vdi,
        "vpc" => hypervisors::vpc,
        "vhdx" => hypervisors::vhdx,
        "parallels" => hypervisors::parallels,
        _ => return Ok(()),
    };
    let mut image = Image::open(path, name)?;
    find(&mut image, size)?;
    image.finish()
}

/// Checks that the raw disk at `path`, a backing file, is not shorter than its partition table or file system says, and
/// that its size is a multiple of 512 bytes.
fn raw(path: &Path, name: &Path) -> Result<()> {
    let Some(what) = kind::fault_of_raw(path)? else {
        return Ok(());
    };
    let what = format!(
        "a disk, and the backing file of an image, but {what}: incomplete download or copy? `qemu-img convert -O raw' \
         makes a disk of that image as it is, and `convert --from raw' takes that"
    );
    Err(bad(name, &what))
}

/// An image, or another file with its data.
struct Image<'a> {
    name: &'a Path,
    file: File,
    /// Size of the file in bytes.
    size: u64,
    /// The end of what is known to belong to the image.
    end: u64,
    /// Number of bytes given to [`Self::claim`].
    claimed: u64,
}

impl<'a> Image<'a> {
    fn open(path: &Path, name: &'a Path) -> Result<Self> {
        let opened = open(path).and_then(|mut file| {
            // Of a block device, too.
            let size = file.seek(SeekFrom::End(0))?;
            Ok((file, size))
        });
        let (file, size) = opened.with_context(|| format!("{}: cannot read", name.display()))?;
        Ok(Self {
            name,
            file,
            size,
            end: 0,
            claimed: 0,
        })
    }

    /// Notes that `len` bytes at `at` belong to the image.
    fn has(&mut self, at: u64, len: u64) {
        self.end = self.end.max(at.saturating_add(len));
    }

    /// Notes that `len` bytes at `at` belong to the image. They are those of the disk of `size` bytes from `start`
    /// on, and what is behind the end of the disk doesn't count.
    fn has_data(&mut self, at: u64, len: u64, start: u64, size: u64) {
        let len = len.min(size.saturating_sub(start));
        if len != 0 {
            self.has(at, len);
        }
    }

    /// Called before `len` bytes of the file are read that nothing else in the image may have, such as those of a
    /// table. Returns an error if all these bytes together are more than the file has.
    fn claim(&mut self, len: u64) -> Result<()> {
        self.claimed = self.claimed.saturating_add(len);
        if self.claimed <= self.size {
            return Ok(());
        }
        self.finish()?;
        Err(bad(
            self.name,
            "damaged: its tables or compressed blocks overlap: `qemu-img check' may say more",
        ))
    }

    /// Reads into `bytes` what is at `at`. What is behind the end is zeros.
    fn read(&self, bytes: &mut [u8], at: u64) -> Result<()> {
        let len = read(&self.file, bytes, at)
            .with_context(|| format!("{}: cannot read", self.name.display()))?;
        bytes.get_mut(len..).unwrap_or_default().fill(0);
        Ok(())
    }

    /// Returns what is at `at`. What is behind the end is zeros.
    fn head<const N: usize>(&self, at: u64) -> Result<[u8; N]> {
        let mut head = [0; N];
        self.read(&mut head, at)?;
        Ok(head)
    }

    /// Calls `each` with each entry of a table, and with its number. The table is at `at`, and has `count` entries
    /// of `width` bytes. It belongs to the image; entries that are cut off are left out.
    fn table(
        &mut self,
        at: u64,
        count: u64,
        width: usize,
        mut each: impl FnMut(&mut Self, u64, &[u8]) -> Result<()>,
    ) -> Result<()> {
        let len = to_u64(width);
        self.has(at, count.saturating_mul(len));
        let count = count.min(self.size.saturating_sub(at) / len);
        // No overflow, here and below: the table is in the file.
        self.claim(count * len)?;
        let at_once = count.min(to_u64(PIECE / width));
        let mut piece = vec![0; to_usize(at_once) * width];
        let mut nth = 0;
        while nth < count {
            interrupt::check()?;
            let entries = (count - nth).min(at_once);
            let piece = piece.get_mut(..to_usize(entries) * width);
            let piece = piece.unwrap_or_default();
            self.read(piece, at + nth * len)?;
            for entry in piece.chunks_exact(width) {
                each(self, nth, entry)?;
                nth += 1;
            }
        }
        Ok(())
    }

    /// Returns an error if the image goes on behind the end of the file.
    fn finish(&self) -> Result<()> {
        if self.end <= self.size {
            return Ok(());
        }
        let what = format!(
            "truncated: the file ends at byte {}, and its data should end at byte {} or later: incomplete download or \
             copy?",
            self.size, self.end
        );
        Err(bad(self.name, &what))
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::*;
    use crate::input::kind::Kind;
    use clap::ValueEnum;

    /// Returns what is said of an image with these bytes, for a disk of `size` bytes.
    fn said(format: &str, bytes: &[u8], len: u64, size: u64) -> Result<String> {
        let dir = tempfile::tempdir()?;
        let path = dir.path().join("image");
        std::fs::write(&path, bytes)?;
        File::options().write(true).open(&path)?.set_len(len)?;
        let error = check(&path, Path::new("name"), format, size).err();
        Ok(error.map_or_else(String::new, |error| error.to_string()))
    }

    #[test]
    fn any_bytes() -> Result<()> {
        let magic = |format: &str, turn: u32| match format {
            "qcow2" => vec![0x51, 0x46, 0x49, 0xfb, 0, 0, 0, 3],
            "vmdk" if turn % 2 == 0 => b"COWD".to_vec(),
            "vmdk" => b"KDMV".to_vec(),
            "vpc" => b"conectix".to_vec(),
            "parallels" => b"WithoutFreeSpace".to_vec(),
            _ => Vec::new(),
        };
        let mut state = 1_u32;
        let mut random = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            state >> 16
        };
        let mut found = 0;
        for format in Kind::value_variants()
            .iter()
            .filter_map(|kind| kind.for_qemu())
        {
            for turn in 0..300 {
                let mut bytes = magic(format, turn);
                while bytes.len() < 2048 {
                    // Many small numbers, so that some of them make sense.
                    bytes.push(match random() % 4 {
                        0 => random() as u8,
                        1 => 1 << (random() % 8),
                        _ => 0,
                    });
                }
                for (at, piece) in [(16, &b"\0\0\0\0\0\0\x02\0"[..]), (512, &b"cxsparse"[..])] {
                    if let Some(to) = bytes
                        .get_mut(at..at + piece.len())
                        .filter(|_| format == "vpc")
                    {
                        to.copy_from_slice(piece);
                    }
                }
                if let Some(bits) = bytes.get_mut(20..24).filter(|_| format == "qcow2") {
                    bits.copy_from_slice(&(9 + random() % 13).to_be_bytes());
                }
                let size = u64::from(random()) << (random() % 47);
                found +=
                    usize::from(said(format, &bytes, 2048, size)?.starts_with("name: truncated: "));
            }
        }
        assert!(found > 300, "{found}");
        Ok(())
    }

    /// Of a header and tables with a million clusters, of which each is alone.
    #[test]
    fn a_million_clusters() -> Result<()> {
        // Clusters of 512 bytes. The first table is at byte 512; each of the others has 64 entries.
        let (tables, entries) = (16_384_u64, 64_u64);
        let mut bytes = b"QFI\xfb\0\0\0\x02".to_vec();
        bytes.resize(20, 0);
        bytes.extend(9_u32.to_be_bytes());
        bytes.resize(36, 0);
        bytes.extend((tables as u32).to_be_bytes());
        bytes.extend(512_u64.to_be_bytes());
        bytes.resize(512, 0);
        let first = 512 + tables * 8;
        for nth in 0..tables {
            bytes.extend((first + nth * 512).to_be_bytes());
        }
        let data = first + tables * 512;
        for nth in 0..tables * entries {
            bytes.extend((data + nth * 1024).to_be_bytes());
        }
        let size = tables * entries * 512;
        let end = data + (tables * entries - 1) * 1024 + 512;
        let start = Instant::now();
        assert_eq!(said("qcow2", &bytes, end, size)?, "");
        assert!(start.elapsed() < Duration::from_secs(60));
        let cut_off = format!(
            "ends at byte {}, and its data should end at byte {end} or later",
            end - 1
        );
        assert!(said("qcow2", &bytes, end - 1, size)?.contains(&cut_off));
        // The last cluster of the disk is not needed as a whole.
        assert_eq!(said("qcow2", &bytes, end - 1, size - 1)?, "");
        Ok(())
    }

    /// Small files with many entries for the same bytes, which would be read again and again.
    #[test]
    fn tables_that_overlap() -> Result<()> {
        const SAID: &str = "name: damaged: its tables or compressed blocks overlap: ";
        let file = |parts: &[(usize, &[u8])]| {
            let mut bytes = Vec::new();
            for (at, part) in parts {
                bytes.resize(bytes.len().max(at + part.len()), 0);
                bytes[*at..at + part.len()].copy_from_slice(part);
            }
            bytes
        };
        // Clusters of 2 MiB. All entries of the first table have the same table.
        let bytes = file(&[
            (0, b"QFI\xfb\0\0\0\x02"),
            (20, &21_u32.to_be_bytes()),
            (36, &65_536_u32.to_be_bytes()),
            (40, &(2_u64 << 20).to_be_bytes()),
            (2 << 20, &(4_u64 << 20).to_be_bytes().repeat(65_536)),
        ]);
        let start = Instant::now();
        assert!(said("qcow2", &bytes, 48 << 20, 1 << 55)?.starts_with(SAID));
        // Clusters of 4 KiB, and tables of 16 clusters.
        let bytes = file(&[
            (0, b"QED\0"),
            (4, &4096_u32.to_le_bytes()),
            (8, &16_u32.to_le_bytes()),
            (40, &65_536_u64.to_le_bytes()),
            (65_536, &131_072_u64.to_le_bytes().repeat(8192)),
        ]);
        assert!(said("qed", &bytes, 1 << 20, 1 << 38)?.starts_with(SAID));
        // Blocks with their lengths in front: 16 tables with 512 entries, all for the same block.
        let (tables, entries) = (16_u64, 512_u64);
        let firsts: Vec<u8> = (0..tables)
            .flat_map(|nth| (2 + 4 * nth as u32).to_le_bytes())
            .collect();
        let seconds = 100_u32.to_le_bytes().repeat((tables * entries) as usize);
        let bytes = file(&[
            (0, b"KDMV"),
            (8, &(1_u32 << 17).to_le_bytes()),
            (12, &(tables * entries * 128).to_le_bytes()),
            (20, &128_u64.to_le_bytes()),
            (44, &(entries as u32).to_le_bytes()),
            (56, &1_u64.to_le_bytes()),
            (77, &[1, 0]),
            (512, &firsts),
            (1024, &seconds),
        ]);
        assert!(said("vmdk", &bytes, 256 << 10, 0)?.starts_with(SAID));
        assert!(start.elapsed() < Duration::from_secs(60));
        // The same number of entries, and a file that has room for so many blocks.
        assert_eq!(said("vmdk", &bytes, 8 << 20, 0)?, "");
        Ok(())
    }
}
