// SPDX-License-Identifier: GPL-2.0

//! `obdsetup status`.

use std::fmt::Write;
use std::path::Path;

use anyhow::Result;
use serde::Serialize;
use serde_json::{Map, Value};

use super::close::not_ours;
use super::{print, print_json};
use crate::dm::backing::loop_file;
use crate::dm::control::{Line, State};
use crate::dm::plan::check_name;
use crate::dm::{Control, Stack};
use crate::exit::{self, Failure};

/// Arguments of `status`.
#[derive(clap::Args)]
#[command(after_help = "Examples:
  obdsetup status app
  obdsetup status --json app | jq '.devices[].targets[].status.corrupt_blocks'

`file' is what a loop device in the table is over.")]
pub(crate) struct Args {
    /// Name that was given to `open`
    name: String,

    /// Print JSON
    #[arg(long)]
    json: bool,
}

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
];
/// Names of the fields of `lsmt`'s INFO line, in order.
const LSMT: &[&str] = &["layers", "segments", "size", "index_memory"];

#[derive(Serialize)]
struct Report {
    name: String,
    devices: Vec<Device>,
}

#[derive(Serialize)]
struct Device {
    name: String,
    uuid: String,
    device: String,
    sectors: u64,
    open_count: u32,
    read_only: bool,
    suspended: bool,
    deferred_remove: bool,
    targets: Vec<Target>,
}

#[derive(Serialize)]
struct Target {
    table: String,
    files: Vec<LoopFile>,
    status: Map<String, Value>,
}

/// A file on a loop device that a table names.
#[derive(Debug, PartialEq, Eq, Serialize)]
struct LoopFile {
    device: String,
    file: String,
}

/// Runs `status`.
pub(crate) fn run(args: &Args) -> Result<()> {
    check_name(&args.name)?;
    let control = Control::open()?;
    let Some(stack) = Stack::find(&control, &args.name)? else {
        return Err(not_ours(&control, &args.name)?);
    };
    let half_built = stack.is_half_built();
    let devices = stack
        .devices
        .into_iter()
        .map(|state| collect(&control, state))
        .collect::<Result<_>>()?;
    let report = Report {
        name: args.name.clone(),
        devices,
    };
    match args.json {
        true => print_json(&report)?,
        false => print(&describe(&report))?,
    }
    match half_built {
        false => Ok(()),
        true => Err(Failure::error(
            exit::DEVICE,
            format!(
                "device {name} was left half built by an obdsetup that was killed; \
                 `obdsetup close {name}' removes it",
                name = stack.name
            ),
        )),
    }
}

fn collect(control: &Control, state: State) -> Result<Device> {
    let table = control.table(&state.name)?;
    let status = control.status(&state.name)?;
    Ok(Device {
        deferred_remove: control.goes_later(&state.name)?,
        sectors: table.last().map_or(0, |line| line.start + line.len),
        targets: table
            .iter()
            .zip(&status)
            .map(|(table, status)| Target {
                table: table.to_string(),
                files: files(table, &|number| loop_file(Path::new("/sys"), number)),
                status: parse(status),
            })
            .collect(),
        device: state.number,
        name: state.name,
        uuid: state.uuid,
        open_count: state.open_count,
        read_only: state.read_only,
        suspended: state.suspended,
    })
}

/// The files of the loop devices that `line` names; `look` gives the file of device `MAJOR:MINOR`.
fn files(line: &Line, look: &dyn Fn(&str) -> Option<String>) -> Vec<LoopFile> {
    let is_number = |word: &str| {
        let digits = |part: &str| !part.is_empty() && part.bytes().all(|b| b.is_ascii_digit());
        word.split_once(':')
            .is_some_and(|(major, minor)| digits(major) && digits(minor))
    };
    line.params
        .split_whitespace()
        .filter(|word| is_number(word))
        .filter_map(|word| {
            Some(LoopFile {
                device: word.to_owned(),
                file: look(word)?,
            })
        })
        .collect()
}

/// Names the fields of an INFO line. What a newer module adds is `field_N`, counted from 0.
fn parse(line: &Line) -> Map<String, Value> {
    let names = match line.target.as_str() {
        "zfile" | "zfile_target" => ZFILE,
        "lsmt" | "lsmt_target" => LSMT,
        _ => &[],
    };
    line.params
        .split_whitespace()
        .enumerate()
        .map(|(nth, word)| {
            let name = names.get(nth).map(|&name| name.to_owned());
            let value = match word.parse::<u64>() {
                Ok(number) => Value::from(number),
                Err(_) => Value::from(word),
            };
            (name.unwrap_or_else(|| format!("field_{nth}")), value)
        })
        .collect()
}

/// The report for people.
fn describe(report: &Report) -> String {
    let mut text = String::new();
    for device in &report.devices {
        let _ = writeln!(text, "/dev/mapper/{}:", device.name);
        let mut line = |name: &str, value: &dyn std::fmt::Display| {
            let _ = writeln!(text, "  {name:<20} {value}");
        };
        line("device", &device.device);
        line("uuid", &device.uuid);
        line("sectors", &device.sectors);
        line("open count", &device.open_count);
        let mode = match device.read_only {
            true => "read-only",
            false => "read-write",
        };
        line("mode", &mode);
        if device.suspended {
            line("suspended", &"yes");
        }
        if device.deferred_remove {
            line("deferred remove", &"yes");
        }
        for target in &device.targets {
            line("table", &target.table);
            for LoopFile { device, file } in &target.files {
                // A name may have any bytes, line breaks too.
                line("file", &format_args!("{device} {}", file.escape_debug()));
            }
            for (name, value) in &target.status {
                let value = match value {
                    Value::String(text) => text.clone(),
                    other => other.to_string(),
                };
                line(&name.replace('_', " "), &value);
            }
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::{files, parse, LoopFile};

    #[test]
    fn info_lines() {
        let line = |target: &str, info: &str| {
            parse(&super::Line {
                start: 0,
                len: 8,
                target: target.to_owned(),
                params: info.to_owned(),
            })
        };
        let zfile = line("zfile", "C lz4 4096 281 703 1 2 3 4 5 6 7 8");
        assert_eq!(zfile["state"], "C");
        assert_eq!(zfile["corrupt_blocks"], 5);
        assert_eq!(zfile["cache_hits"], 7);
        assert_eq!(zfile["field_12"], 8);
        let lsmt = line("lsmt", "2 100 8388608 1600");
        assert_eq!(lsmt["index_memory"], 1600);
        assert!(line("linear", "").is_empty());
    }

    #[test]
    fn files_behind_tables() {
        let line = super::Line {
            start: 0,
            len: 8,
            target: "lsmt".to_owned(),
            params: "2 254:1 704512 7:3 86016 1 some:option".to_owned(),
        };
        let look = |number: &str| (number == "7:3").then(|| "/srv/app.obd".to_owned());
        let found = LoopFile {
            device: "7:3".to_owned(),
            file: "/srv/app.obd".to_owned(),
        };
        assert_eq!(files(&line, &look), [found]);
    }
}
