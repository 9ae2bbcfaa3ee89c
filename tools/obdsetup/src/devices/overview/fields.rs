// SPDX-License-Identifier: GPL-2.0

//! Gives names to the fields of the targets' INFO lines, in the order in which the targets print them.

use serde::{Serialize, Serializer};
use serde_json::Value;

use crate::devices::dm::control::Line;

/// Names of the fields of `zfile`'s INFO line, in order.
const ZFILE: &[&str] = &[
    "state",
    "algorithm",
    "block_size",
    "blocks",
    "table_memory",
    "reads",
    "read_bytes",
    "decompressed_blocks",
    "read_errors",
    "corrupt_blocks",
    "cached_blocks",
    "cache_hits",
    "cache_mode",
    "cache_memory",
    "cache_limit",
];
/// Names of the fields of `lsmt`'s INFO line, in order.
const LSMT: &[&str] = &["layers", "segments", "size", "index_memory", "failed_reads"];

/// Names of the fields of `snapshot`'s INFO line, in order: `<used>/<total>` sectors of the store, and the
/// number of used sectors that have metadata.
const SNAPSHOT: &[&str] = &["usage", "metadata_sectors"];

/// Fields with their names.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Fields(Vec<(String, Value)>);

impl Fields {
    /// Returns all fields, in order.
    pub(crate) fn iter(&self) -> impl Iterator<Item = &(String, Value)> {
        self.0.iter()
    }

    fn get(&self, name: &str) -> Option<&Value> {
        let mut fields = self.0.iter();
        fields.find_map(|(field, value)| (field == name).then_some(value))
    }

    /// Returns the field `name` as a number; 0 if the field is missing or a text.
    pub(crate) fn number(&self, name: &str) -> u64 {
        self.get(name).and_then(Value::as_u64).unwrap_or(0)
    }

    /// Returns the field `name` as a text; `None` if the field is missing or a number.
    pub(crate) fn text(&self, name: &str) -> Option<&str> {
        self.get(name).and_then(Value::as_str)
    }
}

impl Serialize for Fields {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map(self.0.iter().map(|(name, value)| (name, value)))
    }
}

/// Names the fields of an INFO line. A field without a name here, as a newer module may have, is
/// called `field_N`: N is its position in the whole line, from 0.
pub(crate) fn named(line: &Line) -> Fields {
    let names = match line.target.as_str() {
        "zfile" | "zfile_target" => ZFILE,
        "lsmt" | "lsmt-dax" | "lsmt_target" => LSMT,
        "snapshot" => SNAPSHOT,
        _ => &[],
    };
    let words = line.params.split_whitespace().enumerate();
    let fields = words.map(|(nth, word)| {
        let name = names.get(nth).map(|&name| name.to_owned());
        let value = match word.parse::<u64>() {
            Ok(number) => Value::from(number),
            Err(_) => Value::from(word),
        };
        (name.unwrap_or_else(|| format!("field_{nth}")), value)
    });
    Fields(fields.collect())
}

/// Returns the numbers, `MAJOR:MINOR`, of the devices that a table line names.
pub(crate) fn numbers(line: &Line) -> Vec<String> {
    let is_number = |word: &&str| {
        let digits = |part: &str| !part.is_empty() && part.bytes().all(|b| b.is_ascii_digit());
        word.split_once(':')
            .is_some_and(|(major, minor)| digits(major) && digits(minor))
    };
    let mut words = line.params.split_whitespace();
    // Only these words are devices. Other words, such as options, may have the same form.
    let words: Vec<&str> = match line.target.as_str() {
        "lsmt" | "lsmt-dax" => {
            let count = words.next().and_then(|word| word.parse().ok());
            words.step_by(2).take(count.unwrap_or(0)).collect()
        }
        "zfile" | "linear" => words.take(1).collect(),
        _ => words.collect(),
    };
    let numbers = words.into_iter().filter(is_number);
    numbers.map(str::to_owned).collect()
}

#[cfg(test)]
mod tests {
    use super::{named, Line};

    #[test]
    fn info_lines() {
        let line = |target: &str, info: &str| {
            named(&Line {
                start: 0,
                len: 8,
                target: target.to_owned(),
                params: info.to_owned(),
            })
        };
        let zfile = line("zfile", "C lz4 4096 281 703 1 2 3 4 5 6 7 all 4224 65536 8");
        assert_eq!(zfile.text("state"), Some("C"));
        assert_eq!(zfile.number("corrupt_blocks"), 5);
        assert_eq!(zfile.number("cache_hits"), 7);
        assert_eq!(zfile.text("cache_mode"), Some("all"));
        assert_eq!(zfile.number("cache_memory"), 4224);
        assert_eq!(zfile.number("cache_limit"), 65536);
        assert_eq!(zfile.number("field_15"), 8);
        let first = serde_json::to_string(&zfile).unwrap_or_default();
        assert!(
            first.starts_with(r#"{"state":"C","algorithm":"lz4""#),
            "{first}"
        );
        let lsmt = line("lsmt", "2 100 8388608 1600");
        assert_eq!(lsmt.number("index_memory"), 1600);
        assert_eq!(lsmt.number("failed_reads"), 0);
        let lsmt = line("lsmt", "2 100 8388608 1600 3");
        assert_eq!(lsmt.number("failed_reads"), 3);
        assert_eq!(line("linear", "").iter().count(), 0);
    }
}
