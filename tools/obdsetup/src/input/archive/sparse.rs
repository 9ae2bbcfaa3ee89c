// SPDX-License-Identifier: GPL-2.0

//! The maps of sparse files in a tar, which say where the data is. There are four formats.
//!
//! Source: GNU tar's manual, "Storing Sparse Files".

use anyhow::Result;
use overlaybd::format::num::{to_u64, to_usize};

use super::header::{self, Header, BLOCK, MAP_ENTRY};
use super::pax::{self, BadRecord, Records};
use super::reader::Archive;
use super::Extent;

/// Largest number of extents of a sparse file.
const MAX_EXTENTS: usize = 1 << 22;

impl Archive {
    /// Returns the size of a file in bytes, holes included, and its extents with data. Reads the map if
    /// the file is sparse; other files have one extent, or none if they are empty.
    pub(super) fn extents(
        &mut self,
        at: u64,
        header: &Header<'_>,
        pax: &Records,
    ) -> Result<(u64, Vec<Extent>)> {
        let stored = self.left;
        let what = format!("member {:?} at byte {at}: ", self.name);
        let record = |bad: BadRecord| format!("{what}the value of {} is wrong", bad.0);
        let number = |key| match pax.number(key) {
            Ok(number) => match number.map(u64::try_from).transpose() {
                Ok(number) => Ok(number),
                Err(_) => Err(record(BadRecord(key))),
            },
            Err(bad) => Err(record(bad)),
        };
        let get = |key| number(key).map_err(|text| self.bad(&text));
        let (size, extents) = if header.kind() == b'S' {
            if !header.is_gnu() {
                return Err(self.bad(&format!("{what}a sparse file that only star can read")));
            }
            let size = self.in_header(at, header.real_size())?;
            (size, self.old_map(at, header)?)
        } else if let Some(major) = get("GNU.sparse.major")? {
            if major != 1 {
                return Err(self.bad(&format!("{what}sparse format {major} is unknown")));
            }
            let size = get("GNU.sparse.realsize")?;
            let size = size.ok_or_else(|| self.bad(&format!("{what}no GNU.sparse.realsize")))?;
            (size, self.map_in_content(at)?)
        } else if let Some(map) = pax.map().map_err(|bad| self.bad(&record(bad)))? {
            let size = get("GNU.sparse.size")?;
            let size = size.ok_or_else(|| self.bad(&format!("{what}no GNU.sparse.size")))?;
            (size, map)
        } else {
            let all = Extent {
                offset: 0,
                len: stored,
            };
            return Ok((
                stored,
                [all].into_iter().filter(|all| all.len > 0).collect(),
            ));
        };
        // An extent of length 0 at the end marks a hole at the end.
        let extents: Vec<Extent> = extents
            .into_iter()
            .filter(|extent| extent.len > 0)
            .collect();
        let (mut end, mut sum) = (0, 0u64);
        for extent in &extents {
            let behind = extent.offset.checked_add(extent.len);
            match behind.filter(|&behind| extent.offset >= end && behind <= size) {
                Some(behind) => end = behind,
                None => return Err(self.bad(&format!("{what}the map of a sparse file is wrong"))),
            }
            sum += extent.len;
        }
        if sum != self.left {
            return Err(self.bad(&format!(
                "{what}the map of a sparse file has {sum} bytes of data, {} follow",
                self.left
            )));
        }
        Ok((size, extents))
    }

    /// Reads the map of a sparse file in old GNU tar's format: in the header, and in blocks after
    /// it.
    pub(super) fn old_map(&mut self, at: u64, header: &Header<'_>) -> Result<Vec<Extent>> {
        let mut extents = Vec::new();
        let (map, mut more) = header.sparse();
        self.map_entries(at, map, &mut extents)?;
        while more {
            let mut block = [0; BLOCK];
            if self.fill(&mut block)? < BLOCK {
                return Err(self.cut_off("the map of a sparse file is cut off"));
            }
            let (map, again) = header::sparse_continued(&block);
            self.map_entries(at, map, &mut extents)?;
            more = again;
        }
        Ok(extents)
    }

    pub(super) fn map_entries(&self, at: u64, map: &[u8], to: &mut Vec<Extent>) -> Result<()> {
        for entry in map.chunks_exact(MAP_ENTRY) {
            let (offset, len) = entry.split_at(MAP_ENTRY / 2);
            // An empty field ends the map.
            if len.iter().all(|&byte| byte == 0) {
                break;
            }
            let number = |field| {
                let number = header::number(field).and_then(|number| u64::try_from(number).ok());
                number.ok_or_else(|| {
                    self.bad(&format!("the map of the sparse file at byte {at} is wrong"))
                })
            };
            to.push(Extent {
                offset: number(offset)?,
                len: number(len)?,
            });
        }
        self.check_extents(to.len())
    }

    pub(super) fn check_extents(&self, extents: usize) -> Result<()> {
        match extents <= MAX_EXTENTS {
            true => Ok(()),
            false => Err(self.bad(&format!(
                "member {:?}: a sparse file in more than {MAX_EXTENTS} parts",
                self.name
            ))),
        }
    }

    /// Reads the map of a sparse file in format 1.0: lines of decimal numbers before the data of the
    /// file, padded to whole blocks.
    pub(super) fn map_in_content(&mut self, at: u64) -> Result<Vec<Extent>> {
        let wrong = format!(
            "member {:?} at byte {at}: the map of a sparse file is wrong",
            self.name
        );
        let mut numbers = Vec::new();
        let mut digits = Vec::new();
        let mut count = None;
        while count.is_none_or(|count| numbers.len() < count) {
            let mut block = [0; BLOCK];
            if self.left < to_u64(BLOCK) {
                return Err(self.bad(&wrong));
            }
            self.read_content(&mut block)?;
            for byte in block {
                if byte != b'\n' {
                    digits.push(byte);
                    continue;
                }
                let number = pax::decimal(&digits).and_then(|number| u64::try_from(number).ok());
                let number = number.ok_or_else(|| self.bad(&wrong))?;
                digits.clear();
                match count {
                    None => {
                        self.check_extents(to_usize(number))?;
                        count = Some(to_usize(number) * 2);
                    }
                    Some(_) => numbers.push(number),
                }
                if count == Some(numbers.len()) {
                    break;
                }
            }
            // No valid number has so many digits.
            if digits.len() > BLOCK {
                return Err(self.bad(&wrong));
            }
        }
        let pairs = numbers.chunks_exact(2);
        Ok(pairs
            .filter_map(|pair| match *pair {
                [offset, len] => Some(Extent { offset, len }),
                _ => None,
            })
            .collect())
    }
}
