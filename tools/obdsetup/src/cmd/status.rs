// SPDX-License-Identifier: GPL-2.0

//! `obdsetup status`.

use std::path::Path;

use anyhow::Result;
use serde::Serialize;

use super::close::not_ours;
use crate::devices::dm::backing::loop_file;
use crate::devices::dm::control::Line;
use crate::devices::dm::inspect;
use crate::devices::dm::plan::check_name;
use crate::devices::dm::{node, Control};
use crate::devices::overview::changes::Changes;
use crate::devices::overview::fields::{named, Fields};
use crate::devices::overview::health::{self, Health};
use crate::devices::overview::{find, numbers, stacks, Partition, Stack};
use crate::terminal::exit::Failure;
use crate::terminal::plain;
use crate::terminal::size;
use crate::terminal::{print, print_json};

/// Where sysfs is mounted.
const SYS: &str = "/sys";

/// Arguments of `status`.
#[derive(clap::Args)]
#[command(after_help = "Examples:
  obdsetup status app
  obdsetup status app >/dev/null || echo app needs a look
  obdsetup status --json app | jq '.layers[] | select(.health != \"ok\") | .file'

The first line is the health; a line for each layer follows, lowest first. The exit code is 0 if no \
problem was found, 3 if a corrupt block was read, 4 if reads failed, if the file of a layer is \
shorter than it was, if the store of changes is lost or at least 90 % full, or if the stack is half \
built or suspended.")]
pub(crate) struct Args {
    /// Name that was given to `open`
    name: String,

    /// Show every device with its table, files and counters, too
    #[arg(short, long)]
    verbose: bool,

    /// Print JSON
    #[arg(long, conflicts_with = "verbose")]
    json: bool,
}

#[derive(Serialize)]
struct Report {
    name: String,
    health: Health,
    message: String,
    notes: Vec<String>,
    size: Option<u64>,
    /// Whether the disk has DAX; null if it has no table.
    dax: Option<bool>,
    open_count: Option<u32>,
    corrupt_blocks: u64,
    read_errors: u64,
    shared_with: Vec<String>,
    layers: Vec<Layer>,
    partitions: Vec<Partition>,
    changes: Option<Changes>,
    devices: Vec<Device>,
}

#[derive(Serialize)]
struct Layer {
    file: String,
    health: Health,
    corrupt_blocks: u64,
    read_errors: u64,
    zfile: Option<String>,
    cache: Option<String>,
    shared_with: Vec<String>,
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
    status: Fields,
}

/// The file behind a loop device that a table names.
#[derive(Debug, PartialEq, Eq, Serialize)]
struct LoopFile {
    device: String,
    file: String,
}

/// Runs `status`.
pub(crate) fn run(args: &Args) -> Result<()> {
    check_name(&args.name)?;
    let control = Control::open()?;
    let Some(stack) = find(stacks(&control, Path::new(SYS))?, &args.name) else {
        return Err(not_ours(&control, &args.name)?);
    };
    let report = report(stack);
    if args.json {
        print_json(&report)?;
    } else {
        let mut text = summary(&report);
        if args.verbose {
            report
                .devices
                .iter()
                .for_each(|device| describe(device, &mut text));
        }
        print(&text)?;
    }
    match report.health {
        Health::Ok | Health::Busy => Ok(()),
        health => {
            let message = format!("{}: {}", report.name, report.message);
            Err(Failure::error(health.code(), message))
        }
    }
}

fn report(stack: Stack) -> Report {
    let layers: Vec<Layer> = stack
        .layers
        .iter()
        .map(|layer| Layer {
            file: layer.file.clone(),
            health: Health::of_layer(layer),
            corrupt_blocks: layer.corrupt_blocks,
            read_errors: layer.read_errors,
            zfile: layer.zfile.clone(),
            cache: layer.cache.clone(),
            shared_with: layer.shared_with.clone(),
        })
        .collect();
    Report {
        health: Health::of(&stack),
        message: health::line(&stack),
        notes: health::notes(&stack),
        size: stack.size(),
        dax: stack.has_dax(),
        open_count: stack.open_count(),
        partitions: stack.partitions(),
        corrupt_blocks: stack.corrupt_blocks(),
        read_errors: stack.read_errors(),
        layers,
        changes: stack.changes,
        name: stack.name,
        shared_with: stack.shared_with,
        devices: stack
            .devices
            .into_iter()
            .map(|(_, device)| collect(device))
            .collect(),
    }
}

fn collect(device: inspect::Device) -> Device {
    let inspect::Device {
        state,
        deferred_remove,
        table,
        status,
    } = device;
    let status = status
        .iter()
        .map(named)
        .chain(std::iter::repeat_with(Fields::default));
    Device {
        sectors: table.last().map_or(0, |line| line.start + line.len),
        targets: table
            .iter()
            .zip(status)
            .map(|(table, status)| Target {
                table: table.to_string(),
                files: files(table, &|number| loop_file(Path::new(SYS), number)),
                status,
            })
            .collect(),
        name: state.name,
        uuid: state.uuid,
        device: state.number,
        open_count: state.open_count,
        read_only: state.read_only,
        suspended: state.suspended,
        deferred_remove,
    }
}

/// Returns the files behind the loop devices that `line` names. `look` returns the file behind device
/// `MAJOR:MINOR`.
fn files(line: &Line, look: &dyn Fn(&str) -> Option<String>) -> Vec<LoopFile> {
    let files = numbers(line).into_iter().filter_map(|device| {
        Some(LoopFile {
            file: look(&device)?,
            device,
        })
    });
    files.collect()
}

/// Appends a line to `text`. Names in it are escaped.
fn add(text: &mut String, line: &str) {
    text.push_str(&plain(line));
    text.push('\n');
}

/// Returns a short summary for operators.
fn summary(report: &Report) -> String {
    let mut text = String::new();
    add(&mut text, &format!("health: {}", report.message));
    for note in &report.notes {
        add(&mut text, &format!("note: {note}"));
    }
    let disk = report.devices.first().filter(|_| report.size.is_some());
    let (name, layers) = (&report.name, report.layers.len());
    let line = match (disk, report.size) {
        (Some(disk), Some(bytes)) => format!(
            "{}: {}, {layers} layers{}, {}",
            node(&disk.name).display(),
            size::show(bytes),
            match report.dax {
                Some(true) => ", DAX",
                _ => "",
            },
            match report.open_count {
                Some(0) => "not in use",
                _ => "in use",
            }
        ),
        _ => format!("{name}: devices of {layers} layers, but no disk"),
    };
    add(&mut text, &line);
    if !report.shared_with.is_empty() {
        let line = format!("layers in common with: {}", report.shared_with.join(", "));
        add(&mut text, &line);
    }
    for (nth, layer) in report.layers.iter().enumerate() {
        let file = layer.file.escape_debug();
        let shared = match layer.shared_with.as_slice() {
            [] => String::new(),
            names => format!("  (one device with {})", names.join(", ")),
        };
        let line = format!("{nth:>5}  {:<11}  {file}{shared}", layer.health.word());
        add(&mut text, &line);
    }
    for partition in &report.partitions {
        let line = format!(
            "partition {}: {}, {}, {}",
            partition.number,
            node(&partition.name).display(),
            size::show(partition.size),
            match partition.open_count {
                0 => "not in use",
                _ => "in use",
            }
        );
        add(&mut text, &line);
    }
    if let Some(changes) = &report.changes {
        let line = format!(
            "writes go to {}: {} of {} used; with the space that is available now, it is {} % full",
            changes.file.escape_debug(),
            indicatif::BinaryBytes(changes.used),
            indicatif::BinaryBytes(changes.size),
            changes.percent()
        );
        add(&mut text, &line);
    }
    text
}

/// Appends everything that is known about a device to `text`.
fn describe(device: &Device, text: &mut String) {
    text.push('\n');
    add(text, &format!("{}:", node(&device.name).display()));
    let mut line = |name: &str, value: &dyn std::fmt::Display| {
        add(text, &format!("  {name:<20} {value}"));
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
            // Escaped, because a file name may contain line breaks and other control characters.
            line("file", &format_args!("{device} {}", file.escape_debug()));
        }
        for (name, value) in target.status.iter() {
            let value = match value.as_str() {
                Some(text) => text.to_owned(),
                None => value.to_string(),
            };
            line(&name.replace('_', " "), &value);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{files, Line, LoopFile};

    #[test]
    fn files_behind_tables() {
        let line = Line {
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
