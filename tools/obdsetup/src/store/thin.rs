// SPDX-License-Identifier: GPL-2.0

//! Where a thin volume was written to, as thin_dump(8) and thin_delta(8) write it in XML.
//!
//! With an external origin, a block of the volume that is not mapped is one of the origin.

use std::ops::Range;
use std::path::Path;

use anyhow::{Context, Result};
use overlaybd::format::lsmt::MAX_END;
use overlaybd::format::SECTOR_SIZE;
use quick_xml::events::{BytesStart, Event};
use quick_xml::Reader;

use crate::exit::{self, Failure};

/// Most bytes of XML: ten million mappings.
const MAX_XML: u64 = 1 << 30;

/// Reads the bytes of the volume that the XML at `path` has mappings of.
pub(crate) fn ranges(path: &Path) -> Result<Vec<Range<u64>>> {
    let size = path
        .metadata()
        .with_context(|| path.display().to_string())?;
    if !size.is_file() || size.len() > MAX_XML {
        let message = format!("{}: not a file of thin_dump or thin_delta", path.display());
        return Err(Failure::usage(message));
    }
    let text = std::fs::read(path).with_context(|| format!("{}: cannot read", path.display()))?;
    parse(&text).map_err(|what| {
        let message = format!(
            "{}: {what}: give what thin_dump or thin_delta has written",
            path.display()
        );
        Failure::error(exit::BAD_IMAGE, message)
    })
}

/// Reads XML; an error says what is wrong, and where.
fn parse(text: &[u8]) -> Result<Vec<Range<u64>>, String> {
    let mut reader = Reader::from_reader(text);
    let mut block = None;
    let mut volumes = 0;
    let mut ranges = Vec::new();
    loop {
        let at = reader.buffer_position();
        let event = reader.read_event();
        let event = event.map_err(|error| format!("byte {at}: {error}"))?;
        let (Event::Start(tag) | Event::Empty(tag)) = event else {
            match event {
                Event::Eof => break,
                _ => continue,
            }
        };
        let number =
            |name: &str| number(&tag, name).ok_or_else(|| format!("byte {at}: no number `{name}'"));
        let (begin, length) = match tag.name().as_ref() {
            b"superblock" => {
                let sectors = number("data_block_size")?;
                block = Some(sectors).filter(|sectors| (1..MAX_END).contains(sectors));
                continue;
            }
            b"device" | b"diff" => {
                volumes += 1;
                continue;
            }
            b"single_mapping" => (number("origin_block")?, 1),
            b"range_mapping" => (number("origin_begin")?, number("length")?),
            b"different" | b"left_only" | b"right_only" => (number("begin")?, number("length")?),
            _ => continue,
        };
        let block = block.ok_or("no size of blocks before the first mapping")?;
        let bytes = |blocks: u64| {
            let sectors = blocks
                .checked_mul(block)
                .filter(|&sectors| sectors <= MAX_END);
            sectors.map(|sectors| sectors * SECTOR_SIZE)
        };
        let end = begin.checked_add(length).and_then(bytes);
        let range = bytes(begin).zip(end);
        let (start, end) = range.ok_or_else(|| format!("byte {at}: behind the end of any disk"))?;
        ranges.push(start..end);
    }
    match volumes {
        1 => Ok(ranges),
        // The mappings of others would be taken for its own.
        n => Err(format!(
            "has {n} volumes, and one is wanted (thin_dump --dev-id)"
        )),
    }
}

/// The number that an attribute is.
fn number(tag: &BytesStart<'_>, name: &str) -> Option<u64> {
    let attribute = tag.try_get_attribute(name).ok()??;
    std::str::from_utf8(&attribute.value).ok()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::parse;

    const DUMP: &str = r#"<superblock uuid="" time="0" transaction="1" version="2" data_block_size="128" nr_data_blocks="0">
  <device dev_id="0" mapped_blocks="3" transaction="0" creation_time="0" snap_time="0">
    <range_mapping origin_begin="4" data_begin="0" length="2" time="0"/>
    <single_mapping origin_block="1" data_block="5" time="0"/>
  </device>
</superblock>"#;

    #[test]
    fn what_the_tools_write() {
        assert_eq!(
            parse(DUMP.as_bytes()),
            Ok(vec![4 << 16..6 << 16, 1 << 16..2 << 16])
        );
        let delta = r#"<superblock uuid="" time="1" transaction="1" data_block_size="8" nr_data_blocks="9">
          <diff left="1" right="2"><same begin="0" length="16"/><different begin="16" length="1"/>
          <left_only begin="20" length="2"/><right_only begin="30" length="3"/></diff></superblock>"#;
        assert_eq!(
            parse(delta.as_bytes()),
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
            ("<device", "<device/><device", "has 2 volumes"),
            ("device", "volume", "has 0 volumes"),
            ("\"128\"", "\"0\"", "no size of blocks"),
            ("\"128\"", "\"x\"", "no number `data_block_size'"),
            ("length=\"2\"", "length=\"-2\"", "no number `length'"),
            ("length=\"2\"", "", "no number `length'"),
            (
                "\"4\"",
                "\"18446744073709551615\"",
                "behind the end of any disk",
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

    proptest! {
        #[test]
        fn any_text(at in 0..DUMP.len(), len in 0..40usize, bytes in proptest::collection::vec(any::<u8>(), 0..40)) {
            let mut text = DUMP.as_bytes().to_vec();
            let end = (at + len).min(text.len());
            text.splice(at..end, bytes);
            for range in parse(&text).unwrap_or_default() {
                prop_assert!(range.start <= range.end && range.end <= 1 << 59);
            }
        }
    }
}
