// SPDX-License-Identifier: GPL-2.0

//! Reads which ranges of a thin volume are mapped, from the XML of thin_dump(8) and thin_delta(8).
//!
//! The volume has the disk of the layers as its external origin. A block that is not mapped has the data of
//! the origin, so it need not be read to make a layer.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::ops::Range;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;

use anyhow::{Context, Result};
use overlaybd::format::lsmt::MAX_END;
use overlaybd::format::SECTOR_SIZE;
use quick_xml::events::{BytesStart, Event};
use quick_xml::Reader;
use rustix::fs::{major, minor};

use crate::devices::dm::system;
use crate::devices::dm::Control;
use crate::terminal::exit::{self, Failure};

/// Which parts of a thin volume are mapped.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Map {
    /// The ranges of the volume that are mapped, in bytes: ascending, without overlaps.
    pub(crate) ranges: Vec<Range<u64>>,
    /// The ID of the volume in its pool, and its number of mapped sectors of 512 bytes. `None` for the XML of
    /// thin_delta, which has neither.
    volume: Option<(u64, u64)>,
}

impl Map {
    /// Reads the XML at `path`.
    pub(crate) fn read(path: &Path) -> Result<Self> {
        let context = || format!("{}: cannot read", path.display());
        if !path.metadata().with_context(context)?.is_file() {
            let message = format!(
                "{}: not a file with the output of thin_dump or thin_delta",
                path.display()
            );
            return Err(Failure::usage(message));
        }
        let file = File::open(path).with_context(context)?;
        parse(BufReader::new(file)).map_err(|what| {
            let message = format!(
                "{}: {what}: give what thin_dump or thin_delta has written",
                path.display()
            );
            Failure::error(exit::BAD_IMAGE, message)
        })
    }

    /// If `path` is a thin volume of device-mapper, checks that the volume's ID and its present number of mapped
    /// sectors are those in the XML.
    pub(crate) fn check(&self, path: &Path) -> Result<()> {
        let meta = path
            .metadata()
            .with_context(|| path.display().to_string())?;
        if !meta.file_type().is_block_device() {
            return Ok(());
        }
        let number = format!("{}:{}", major(meta.rdev()), minor(meta.rdev()));
        let name = std::fs::read_to_string(system::system(&number).join("dm/name"));
        let (Ok(name), Some(volume)) = (name, self.volume) else {
            return Ok(());
        };
        match Control::open()?.thin_volume(name.trim_end()) {
            Some(now) if now != volume => {
                let message = format!(
                    "{}: has ID {} in its pool and {} mapped sectors, but the file of --thin-map is of a \
                     volume with ID {} and {} mapped sectors: run thin_dump again",
                    path.display(),
                    now.0,
                    now.1,
                    volume.0,
                    volume.1
                );
                Err(Failure::error(exit::BAD_IMAGE, message))
            }
            _ => Ok(()),
        }
    }
}

/// Parses the XML. An error says what is wrong, and where.
fn parse(text: impl BufRead) -> Result<Map, String> {
    let mut reader = Reader::from_reader(text);
    let mut buffer = Vec::new();
    let mut block = None;
    let mut volumes = 0;
    // The ID and the number of mapped blocks.
    let mut volume = None;
    let mut ranges = Vec::new();
    // Number of open tags.
    let mut depth = 0_u64;
    loop {
        let at = reader.buffer_position();
        buffer.clear();
        let event = reader.read_event_into(&mut buffer);
        let event = event.map_err(|error| format!("byte {at}: {error}"))?;
        match event {
            Event::Start(_) => depth += 1,
            // The reader has checked that this tag closes the one that was opened last.
            Event::End(_) => depth = depth.saturating_sub(1),
            Event::Eof if depth > 0 => return Err(format!("byte {at}: the XML is cut off")),
            Event::Eof => break,
            _ => {}
        }
        let (Event::Start(tag) | Event::Empty(tag)) = event else {
            continue;
        };
        let number = |name: &str| {
            number(&tag, name)
                .ok_or_else(|| format!("byte {at}: attribute `{name}' is missing, or is no number"))
        };
        let (begin, length) = match tag.name().as_ref() {
            b"superblock" => {
                let sectors = number("data_block_size")?;
                block = Some(sectors).filter(|sectors| (1..MAX_END).contains(sectors));
                continue;
            }
            b"device" => {
                volumes += 1;
                volume = Some((number("dev_id")?, number("mapped_blocks")?));
                continue;
            }
            b"diff" => {
                volumes += 1;
                continue;
            }
            b"single_mapping" => (number("origin_block")?, 1),
            b"range_mapping" => (number("origin_begin")?, number("length")?),
            b"different" | b"left_only" | b"right_only" => (number("begin")?, number("length")?),
            _ => continue,
        };
        let block = block.ok_or("no size of blocks before the first mapping")?;
        let end = begin.checked_add(length).and_then(|end| bytes(end, block));
        let range = bytes(begin, block).zip(end);
        let (start, end) =
            range.ok_or_else(|| format!("byte {at}: a mapping beyond the end of any disk"))?;
        ranges.push(start..end);
    }
    // If the XML had several volumes, mappings of another volume would be taken for those of this one.
    if volumes != 1 {
        return Err(format!(
            "has {volumes} volumes, and one is wanted (thin_dump --dev-id)"
        ));
    }
    ranges.retain(|range| !range.is_empty());
    ranges.sort_unstable_by_key(|range| range.start);
    let mut end = 0;
    // No overflow: the ranges don't overlap, and end at 2^59 bytes or before.
    let mut sum = 0;
    for range in &ranges {
        if range.start < end {
            return Err(format!("maps byte {} of the volume twice", range.start));
        }
        end = range.end;
        sum += (range.end - range.start) / SECTOR_SIZE;
    }
    let volume = match volume {
        None => None,
        Some((id, blocks)) => {
            let sectors = block.unwrap_or(0);
            if blocks.checked_mul(sectors) != Some(sum) {
                return Err(format!(
                    "maps {sum} sectors, but `mapped_blocks' is {blocks}, with {sectors} sectors each"
                ));
            }
            Some((id, sum))
        }
    };
    Ok(Map { ranges, volume })
}

/// Returns the number of bytes in `blocks` blocks of `sectors` sectors each; `None` if no disk is that large.
fn bytes(blocks: u64, sectors: u64) -> Option<u64> {
    let sectors = blocks.checked_mul(sectors);
    let sectors = sectors.filter(|&sectors| sectors <= MAX_END);
    sectors.map(|sectors| sectors * SECTOR_SIZE)
}

/// Returns the value of an attribute that is a number.
fn number(tag: &BytesStart<'_>, name: &str) -> Option<u64> {
    let attribute = tag.try_get_attribute(name).ok()??;
    std::str::from_utf8(&attribute.value).ok()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::{parse, Map};

    const DUMP: &str = r#"<superblock uuid="" time="0" transaction="1" version="2" data_block_size="128" nr_data_blocks="0">
  <device dev_id="0" mapped_blocks="3" transaction="0" creation_time="0" snap_time="0">
    <range_mapping origin_begin="4" data_begin="0" length="2" time="0"/>
    <single_mapping origin_block="1" data_block="5" time="0"/>
  </device>
</superblock>"#;

    #[test]
    fn what_the_tools_write() {
        let map = Map {
            ranges: vec![1 << 16..2 << 16, 4 << 16..6 << 16],
            volume: Some((0, 3 * 128)),
        };
        assert_eq!(parse(DUMP.as_bytes()), Ok(map));
        let delta = r#"<superblock uuid="" time="1" transaction="1" data_block_size="8" nr_data_blocks="9">
          <diff left="1" right="2"><same begin="0" length="16"/><different begin="16" length="1"/>
          <left_only begin="20" length="2"/><right_only begin="30" length="3"/></diff></superblock>"#;
        assert_eq!(
            parse(delta.as_bytes()).map(|map| map.ranges),
            Ok(vec![
                16 << 12..17 << 12,
                20 << 12..22 << 12,
                30 << 12..33 << 12
            ])
        );
    }

    #[test]
    fn what_is_wrong() {
        for (from, to, said) in [
            (
                "<device",
                "<device dev_id=\"1\" mapped_blocks=\"0\"/><device",
                "has 2 volumes",
            ),
            ("device", "volume", "has 0 volumes"),
            ("\"128\"", "\"0\"", "no size of blocks"),
            ("\"128\"", "\"x\"", "`data_block_size' is missing"),
            ("length=\"2\"", "length=\"-2\"", "`length' is missing"),
            ("\"3\"", "\"4\"", "is 4, with 128 sectors each"),
            ("mapped_blocks", "blocks", "`mapped_blocks' is missing"),
            (
                "\"3\"",
                "\"18446744073709551615\"",
                "but `mapped_blocks' is",
            ),
            (
                "origin_block=\"1\"",
                "origin_block=\"5\"",
                "maps byte 327680 of the volume twice",
            ),
            ("length=\"2\"", "", "`length' is missing"),
            (
                "\"4\"",
                "\"18446744073709551615\"",
                "a mapping beyond the end of any disk",
            ),
            ("\"5\" time", "\"5\"> </a> <b time", "byte "),
        ] {
            let found = parse(DUMP.replace(from, to).as_bytes());
            assert!(
                found.as_ref().is_err_and(|what| what.contains(said)),
                "{to}: {found:?}"
            );
        }
    }

    /// XML that is cut off at any place is an error.
    #[test]
    fn cut_off() {
        for at in 0..DUMP.len() {
            let found = parse(&DUMP.as_bytes()[..at]);
            assert!(found.is_err(), "{at}: {found:?}");
        }
        let found = parse(&DUMP.as_bytes()[..DUMP.len() - "</superblock>".len()]);
        assert!(found.is_err_and(|what| what.ends_with("is cut off")));
    }

    proptest! {
        #[test]
        fn any_text(at in 0..DUMP.len(), len in 0..40usize, bytes in proptest::collection::vec(any::<u8>(), 0..40)) {
            let mut text = DUMP.as_bytes().to_vec();
            let end = (at + len).min(text.len());
            text.splice(at..end, bytes);
            let mut last = 0;
            for range in parse(&text[..]).unwrap_or_default().ranges {
                prop_assert!(last <= range.start && range.start < range.end && range.end <= 1 << 59);
                last = range.end;
            }
        }
    }
}
