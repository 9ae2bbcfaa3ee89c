// SPDX-License-Identifier: GPL-2.0

//! `obdsetup list`.

use std::fmt::Write;
use std::path::Path;

use anyhow::Result;
use serde::Serialize;

use crate::devices::dm::{share, Control};
use crate::devices::overview::health::{self, Health};
use crate::devices::overview::{stacks, sysfs, Partition, Stack};
use crate::terminal::exit::{self, Failure, Lines};
use crate::terminal::{plain, print, print_json};

/// Where sysfs is mounted.
const SYS: &str = "/sys";
/// Printed for values that are not known.
const NONE: &str = "-";

/// Arguments of `list`.
#[derive(clap::Args)]
#[command(after_help = "Examples:
  obdsetup list
  obdsetup list --check >/dev/null
      for cron: one line for each stack that is not well
  obdsetup list --json | jq -r '.[] | select(.health != \"ok\") | .name'

DAX is yes for disks that were opened with --dax. PARTITIONS has the numbers of the partitions that \
have devices (open --partitions). SHARED WITH has the names of other stacks that use a file or \
device of this one. Users other than root get names and sizes only, and exit code 2.")]
pub(crate) struct Args {
    /// If stacks are not healthy, exit with the code that `status` has for the worst of them, and print a
    /// line for each on standard error
    #[arg(long)]
    check: bool,

    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// A stack.
#[derive(Debug, Default, Serialize)]
struct Row {
    name: String,
    size: Option<u64>,
    /// Number of layers; null if not known.
    layers: Option<usize>,
    /// Null if not known.
    health: Option<Health>,
    message: String,
    /// Whether the disk has DAX; null if not known.
    dax: Option<bool>,
    open_count: Option<u32>,
    corrupt_blocks: u64,
    read_errors: u64,
    partitions: Vec<Partition>,
    shared_with: Vec<String>,
}

/// Runs `list`.
pub(crate) fn run(args: &Args) -> Result<()> {
    let sys = Path::new(SYS);
    let seen = sysfs::stacks(sys)?;
    let is_root = rustix::process::geteuid().is_root();
    // Devices without a table are seen only through device-mapper, not in sysfs.
    let rows: Vec<Row> = if is_root && sys.join("class/misc/device-mapper").exists() {
        let control = Control::open()?;
        let rows = stacks(&control, sys)?.iter().map(row).collect();
        let left = share::left(&control.states()?).names;
        if !left.is_empty() {
            crate::terminal::tell(&format!(
                "note: no stack uses {}: unless one is just being closed, an obdsetup that was killed has \
                 left it, and the next close of any stack removes it",
                left.join(", ")
            ));
        }
        rows
    } else {
        let row = |(name, seen): (String, sysfs::Seen)| Row {
            name,
            size: seen.size,
            ..Row::default()
        };
        seen.into_iter().map(row).collect()
    };
    if args.json {
        print_json(&rows)?;
    } else if rows.is_empty() {
        crate::terminal::tell("no stack is set up");
    } else {
        print(&table(&rows))?;
    }
    if !is_root && !rows.is_empty() {
        let message = "must be root to see the health of stacks: names and sizes only";
        return Err(Failure::error(exit::PERMISSION, message));
    }
    let ill = |row: &&Row| row.health.map_or(exit::SUCCESS, Health::code) != exit::SUCCESS;
    match rows.iter().filter(ill).min_by_key(|row| row.health) {
        Some(worst) if args.check => {
            let lines: Vec<String> = rows
                .iter()
                .filter(ill)
                .map(|row| format!("{}: {}", row.name, row.message))
                .collect();
            let code = worst.health.map_or(exit::SUCCESS, Health::code);
            Err(Lines {
                code,
                status: None,
                is_full: false,
                start: String::new(),
                lines,
            }
            .into())
        }
        _ => Ok(()),
    }
}

fn row(stack: &Stack) -> Row {
    Row {
        name: stack.name.clone(),
        size: stack.size(),
        layers: Some(stack.layers.len()),
        health: Some(Health::of(stack)),
        message: health::line(stack),
        dax: stack.has_dax(),
        open_count: stack.open_count(),
        corrupt_blocks: stack.corrupt_blocks(),
        read_errors: stack.read_errors(),
        partitions: stack.partitions(),
        shared_with: stack.shared_with.clone(),
    }
}

/// Returns the table for people.
fn table(rows: &[Row]) -> String {
    let name = |row: &Row| plain(&row.name);
    let width = rows.iter().map(|row| name(row).len()).max().unwrap_or(0);
    let width = width.max("NAME".len());
    let mut text = format!(
        "{:<width$}  {:>11}  {:>6}  {:<11}  {:<3}  {:<10}  SHARED WITH\n",
        "NAME", "SIZE", "LAYERS", "HEALTH", "DAX", "PARTITIONS"
    );
    for row in rows {
        let size = row.size.map_or_else(
            || NONE.to_owned(),
            |size| indicatif::BinaryBytes(size).to_string(),
        );
        let layers = row
            .layers
            .map_or_else(|| NONE.to_owned(), |n| n.to_string());
        let health = row.health.map_or("unknown", Health::word);
        let dax = match row.dax {
            Some(true) => "yes",
            _ => NONE,
        };
        let shared = match row.shared_with.as_slice() {
            [] => NONE.to_owned(),
            names => plain(&names.join(",")),
        };
        let numbers = row.partitions.iter();
        let numbers: Vec<String> = numbers.map(|part| part.number.to_string()).collect();
        let partitions = match numbers.as_slice() {
            [] => NONE.to_owned(),
            numbers => numbers.join(","),
        };
        let _ = writeln!(
            text,
            "{:<width$}  {size:>11}  {layers:>6}  {health:<11}  {dax:<3}  {partitions:<10}  {shared}",
            name(row)
        );
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows() {
        let partition = |number| Partition {
            number,
            name: format!("app-part{number}"),
            start: None,
            size: 512,
            open_count: 0,
        };
        let rows = [
            Row {
                name: "app".to_owned(),
                size: Some(256 << 20),
                layers: Some(2),
                health: Some(Health::Corrupt),
                dax: Some(true),
                partitions: [1, 12].map(partition).to_vec(),
                shared_with: vec!["a".to_owned(), "b".to_owned()],
                ..Row::default()
            },
            Row {
                name: "half".to_owned(),
                ..Row::default()
            },
            Row {
                name: "none".to_owned(),
                dax: Some(false),
                ..Row::default()
            },
        ];
        assert_eq!(
            table(&rows),
            "NAME         SIZE  LAYERS  HEALTH       DAX  PARTITIONS  SHARED WITH\n\
             app    256.00 MiB       2  CORRUPT      yes  1,12        a,b\n\
             half            -       -  unknown      -    -           -\n\
             none            -       -  unknown      -    -           -\n"
        );
    }
}
