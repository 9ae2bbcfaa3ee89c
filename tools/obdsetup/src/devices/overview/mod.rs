// SPDX-License-Identifier: GPL-2.0

//! The open stacks, their layers, and their health.
//!
//! - [`sysfs`]: information that every user can read.
//! - [`changes`]: how full the store of a writable disk is.
//! - [`health`]: problems in one line, and the exit code.
//! - [`fields`]: the targets' status with the names of its fields.

pub(crate) mod changes;
pub(crate) mod fields;
pub(crate) mod health;
pub(crate) mod sysfs;

use std::collections::{BTreeMap, BTreeSet};
use std::fs::Metadata;
use std::path::Path;

use anyhow::Result;
use serde::Serialize;

use self::changes::Changes;
pub(crate) use self::fields::numbers;
use crate::devices::dm::backing::{is_over, FileId};
use crate::devices::dm::identity::{self, Kind};
use crate::devices::dm::inspect::Device;
use crate::devices::dm::lock::Lock;
use crate::devices::dm::plan::LSMT_DAX;
use crate::devices::dm::stack::{part, Rank};
use crate::devices::dm::Control;

/// Largest number of devices between a layer and its file.
const DEPTH: usize = 4;

/// A stack.
#[derive(Debug)]
pub(crate) struct Stack {
    /// The name given to `open`.
    pub(crate) name: String,
    /// Its devices with their ranks, topmost first.
    pub(crate) devices: Vec<(Rank, Device)>,
    /// Lowest first.
    pub(crate) layers: Vec<Layer>,
    /// The store of changes, if the disk is writable.
    pub(crate) changes: Option<Changes>,
    /// Stacks that share a file or an inner device with this one.
    pub(crate) shared_with: Vec<String>,
    /// Whether the stack is half-built because an obdsetup is working on it.
    pub(crate) busy: bool,
}

/// A layer.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Layer {
    /// Name of its zfile device.
    pub(crate) zfile: Option<String>,
    /// Path of its file or block device.
    pub(crate) file: String,
    /// Number of corrupt blocks that were read.
    pub(crate) corrupt_blocks: u64,
    /// Number of failed reads of the lower device.
    pub(crate) read_errors: u64,
    /// If the file was cut short: its size in bytes, and the size that its loop device had.
    pub(crate) cut: Option<(u64, u64)>,
    /// Which reads of its zfile device go through the cache, if known.
    pub(crate) cache: Option<String>,
    /// Device number of its topmost device.
    number: String,
    /// Other stacks that use that device.
    pub(crate) shared_with: Vec<String>,
}

/// A partition of the disk that has a device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct Partition {
    pub(crate) number: u32,
    /// Name of its device.
    pub(crate) name: String,
    /// Its first byte in the disk.
    pub(crate) start: Option<u64>,
    /// Bytes.
    pub(crate) size: u64,
    pub(crate) open_count: u32,
}

impl Partition {
    fn of(number: u32, device: &Device) -> Self {
        let line = device.table.first();
        let start = line.and_then(|line| line.params.split_whitespace().nth(1)?.parse().ok());
        let bytes = |sectors: u64| sectors.saturating_mul(512);
        Self {
            number,
            name: device.state.name.clone(),
            start: start.map(bytes),
            size: bytes(line.map_or(0, |line| line.len)),
            open_count: device.state.open_count,
        }
    }
}

impl Stack {
    /// Returns the disk, if it exists.
    pub(crate) fn top(&self) -> Option<&Device> {
        match self.devices.first() {
            Some((Rank::Top, device)) => Some(device),
            _ => None,
        }
    }

    /// Returns whether a device is missing, or has no table, or the partitions are not there yet.
    pub(crate) fn is_half_built(&self) -> bool {
        let is_unfinished =
            |(rank, device): &(Rank, Device)| *rank == Rank::Mark || !device.state.live;
        self.top().is_none() || self.devices.iter().any(is_unfinished)
    }

    /// Returns the partitions of the disk, in the order of their numbers.
    pub(crate) fn partitions(&self) -> Vec<Partition> {
        let devices = self.devices.iter();
        let partitions = devices.filter_map(|(rank, device)| match rank {
            Rank::Partition(number) => Some(Partition::of(*number, device)),
            _ => None,
        });
        partitions.collect()
    }

    /// Returns how many times the disk and its partitions are open; `None` if the disk doesn't exist.
    pub(crate) fn open_count(&self) -> Option<u32> {
        let mut count = self.top()?.state.open_count;
        for partition in self.partitions() {
            // The device of the partition has the disk open: don't count that.
            count = count.saturating_sub(1).saturating_add(partition.open_count);
        }
        Some(count)
    }

    /// Returns how many reads of the disk have failed; 0 if a layer has counted a corrupt block or a
    /// failed read. Layers without a zfile device count neither.
    pub(crate) fn failed_reads(&self) -> u64 {
        let counted = |layer: &Layer| layer.corrupt_blocks > 0 || layer.read_errors > 0;
        if self.layers.iter().any(counted) {
            return 0;
        }
        let lines = self.devices.iter().flat_map(|(_, device)| &device.status);
        lines
            .map(|line| fields::named(line).number("failed_reads"))
            .fold(0, u64::saturating_add)
    }

    /// Returns the number of corrupt blocks that were read.
    pub(crate) fn corrupt_blocks(&self) -> u64 {
        let counts = self.layers.iter().map(|layer| layer.corrupt_blocks);
        counts.fold(0, u64::saturating_add)
    }

    /// Returns the number of failed reads, of the lower devices or of the disk.
    pub(crate) fn read_errors(&self) -> u64 {
        let counts = self.layers.iter().map(|layer| layer.read_errors);
        counts.fold(self.failed_reads(), u64::saturating_add)
    }

    /// Returns whether the disk has DAX (`open --dax`); `None` if it has no table.
    pub(crate) fn has_dax(&self) -> Option<bool> {
        let line = self.top()?.table.first()?;
        Some(line.target == LSMT_DAX)
    }

    /// Returns the size of the disk in bytes.
    pub(crate) fn size(&self) -> Option<u64> {
        let last = self.top()?.table.last()?;
        Some(last.start.saturating_add(last.len).saturating_mul(512))
    }
}

/// Returns all stacks, by name.
pub(crate) fn stacks(control: &Control, sys: &Path) -> Result<Vec<Stack>> {
    let ours = |uuid: &str| part(uuid).is_some() || identity::is_shared(uuid);
    let mut stacks = group(control.inspect(&ours)?, sys);
    for stack in stacks.iter_mut().filter(|stack| stack.is_half_built()) {
        stack.busy = Lock::is_busy(&stack.name);
    }
    Ok(stacks)
}

/// Returns the stack that `name` means: by the name of its disk, or, if that was renamed, by the
/// name given to `open`.
pub(crate) fn find(stacks: Vec<Stack>, name: &str) -> Option<Stack> {
    let by_device = |stack: &Stack| stack.top().is_some_and(|top| top.state.name == name);
    let place = stacks.iter().position(by_device);
    let place = place.or_else(|| stacks.iter().position(|stack| stack.name == name));
    place.and_then(|place| stacks.into_iter().nth(place))
}

/// Groups `devices` into stacks.
fn group(devices: Vec<Device>, sys: &Path) -> Vec<Stack> {
    let mut groups: BTreeMap<String, Vec<(Rank, Device)>> = BTreeMap::new();
    let by_number: BTreeMap<String, Device> = devices
        .iter()
        .map(|device| (device.state.number.clone(), device.clone()))
        .collect();
    for device in devices {
        if let Some((rank, name)) = part(&device.state.uuid) {
            let name = name.to_owned();
            groups.entry(name).or_default().push((rank, device));
        }
    }
    let mut stacks: Vec<Stack> = groups
        .into_iter()
        .map(|(name, mut devices)| {
            devices.sort_by_key(|(rank, _)| *rank);
            let starts = starts(&devices);
            let layers = starts
                .iter()
                .map(|number| layer(number, &by_number, sys))
                .collect();
            for (nth, number) in starts.iter().enumerate() {
                add_shared(&mut devices, nth, number, &by_number);
            }
            devices.sort_by_key(|(rank, _)| *rank);
            let of = |wanted: Rank| {
                let mut found = devices.iter().filter(|(rank, _)| *rank == wanted);
                found.next().map(|(_, device)| device)
            };
            let changes = match (of(Rank::Top), of(Rank::Store)) {
                (Some(top), Some(store)) => Changes::of(top, store, sys),
                _ => None,
            };
            Stack {
                name,
                devices,
                layers,
                changes,
                shared_with: Vec::new(),
                busy: false,
            }
        })
        .collect();
    share(&mut stacks);
    stacks
}

/// Adds the shared devices of layer `nth` to the devices of a stack. `number` is that of the
/// topmost one.
fn add_shared(
    devices: &mut Vec<(Rank, Device)>,
    nth: usize,
    number: &str,
    all: &BTreeMap<String, Device>,
) {
    let mut number = number.to_owned();
    for _ in 0..DEPTH {
        let Some(device) = all.get(&number) else {
            return;
        };
        let rank = match identity::parse(&device.state.uuid) {
            Some((Kind::Zfile, _)) => Rank::Zfile(nth),
            Some((Kind::Blob, _)) => Rank::Blob(nth),
            None => return,
        };
        let is_same = |(_, other): &(Rank, Device)| other.state.number == number;
        if !devices.iter().any(is_same) {
            devices.push((rank, device.clone()));
        }
        let below = device
            .table
            .first()
            .and_then(|line| numbers(line).into_iter().next());
        match below {
            Some(below) => number = below,
            None => return,
        }
    }
}

/// Returns the numbers of the topmost devices of the layers, lowest layer first. In a stack without
/// its disk, only those that exist.
fn starts(devices: &[(Rank, Device)]) -> Vec<String> {
    // Below a writable disk, the image device has the table with the layers.
    let image = devices.iter().find(|(rank, _)| *rank == Rank::Image);
    let disk = match image.or_else(|| devices.first()) {
        Some((Rank::Top | Rank::Image, device)) => device.table.first().map(|line| (device, line)),
        _ => None,
    };
    if let Some((device, line)) = disk {
        return match line.target.as_str() {
            "zfile" => vec![device.state.number.clone()],
            _ => numbers(line),
        };
    }
    let mut layers: BTreeMap<usize, &Device> = BTreeMap::new();
    // The zfile device is above the blob device, and comes first.
    for (rank, device) in devices {
        if let Rank::Zfile(nth) | Rank::Blob(nth) = rank {
            layers.entry(*nth).or_insert(device);
        }
    }
    let numbers = layers.values().map(|device| device.state.number.clone());
    numbers.collect()
}

/// Returns the layer whose topmost device has `number`.
fn layer(number: &str, devices: &BTreeMap<String, Device>, sys: &Path) -> Layer {
    let mut layer = Layer {
        number: number.to_owned(),
        ..Layer::default()
    };
    let mut number = number.to_owned();
    for _ in 0..DEPTH {
        let Some(device) = devices.get(&number) else {
            break;
        };
        if let Some(status) = device.status.first().filter(|line| line.target == "zfile") {
            let fields = fields::named(status);
            layer.zfile = Some(device.state.name.clone());
            layer.corrupt_blocks = fields.number("corrupt_blocks");
            layer.read_errors = fields.number("read_errors");
            layer.cache = fields.text("cache_mode").map(str::to_owned);
            // The state shows corruption even if a later module counts differently.
            if layer.corrupt_blocks == 0 && fields.text("state") == Some("C") {
                layer.corrupt_blocks = 1;
            }
        }
        match device
            .table
            .first()
            .and_then(|line| numbers(line).into_iter().next())
        {
            Some(below) => number = below,
            None => break,
        }
    }
    layer.file = sysfs::name(sys, &number);
    let is_over = |file: &Metadata| is_over(sys, &number, &FileId::of(file)) == Some(true);
    layer.cut = sysfs::cut(sys, &number, &is_over);
    layer
}

/// Finds out which stacks share files, and which share devices.
fn share(stacks: &mut [Stack]) {
    let mut by_file: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    let mut by_device = by_file.clone();
    for stack in &*stacks {
        for layer in &stack.layers {
            for (users, key) in [(&mut by_file, &layer.file), (&mut by_device, &layer.number)] {
                let users = users.entry(key.clone()).or_default();
                users.insert(stack.name.clone());
            }
        }
    }
    let others = |users: Option<&BTreeSet<String>>, name: &str| -> Vec<String> {
        let users = users.into_iter().flatten();
        users.filter(|user| *user != name).cloned().collect()
    };
    for stack in stacks {
        let mut all = BTreeSet::new();
        for layer in &mut stack.layers {
            layer.shared_with = others(by_device.get(&layer.number), &stack.name);
            all.extend(others(by_file.get(&layer.file), &stack.name));
            all.extend(layer.shared_with.iter().cloned());
        }
        stack.shared_with = all.into_iter().collect();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::devices::dm::control::Line;
    use crate::devices::dm::control::State;

    fn device(name: &str, uuid: &str, minor: u32, table: &str, status: &str) -> Device {
        let line = |params: &str| Line {
            start: 0,
            len: 16,
            target: params.split(' ').next().unwrap_or_default().to_owned(),
            params: params.split_once(' ').unwrap_or_default().1.to_owned(),
        };
        let lines = |text: &str| text.lines().map(line).collect();
        Device {
            state: State {
                name: name.to_owned(),
                uuid: uuid.to_owned(),
                number: format!("254:{minor}"),
                open_count: 0,
                read_only: true,
                suspended: false,
                live: true,
            },
            deferred_remove: false,
            table: lines(table),
            status: lines(status),
        }
    }

    #[test]
    fn shared_devices() {
        let digits = "0123456789abcdef0123456789abcdef01234567";
        let layer = |kind: &str| format!("OVERLAYBD-{kind}-{digits}");
        let devices = vec![
            device("x-blob", &layer("BLOB"), 0, "linear 7:1 0", "linear "),
            device(
                "x-zfile",
                &layer("LAYER"),
                1,
                "zfile 254:0 8",
                "zfile V lz4",
            ),
            device(
                "b",
                "OVERLAYBD-LSMT-b",
                3,
                "lsmt 2 254:1 8 7:9 4096",
                "lsmt 2",
            ),
            device("a", "OVERLAYBD-LSMT-a", 2, "lsmt 1 254:1 8", "lsmt 1"),
        ];
        let stacks = group(devices, Path::new("/nonexistent"));
        let names: Vec<&str> = stacks.iter().map(|stack| stack.name.as_str()).collect();
        assert_eq!(names, ["a", "b"]);
        for (stack, other) in stacks.iter().zip(["b", "a"]) {
            let names: Vec<&str> = stack
                .devices
                .iter()
                .map(|(_, device)| device.state.name.as_str())
                .collect();
            assert_eq!(names, [&stack.name, "x-zfile", "x-blob"]);
            assert_eq!(stack.shared_with, [other]);
            assert_eq!(stack.layers[0].shared_with, [other]);
            assert_eq!(stack.layers[0].file, "7:1");
        }
        assert_eq!(stacks[1].layers[1].shared_with, [""; 0]);
    }

    #[test]
    fn partitions() {
        let mut devices = vec![
            device("p", "OVERLAYBD-LSMT-p", 1, "lsmt 1 7:1 8", "lsmt 1"),
            device(
                "p-part12",
                "part12-OVERLAYBD-LSMT-p",
                2,
                "linear 254:1 2048",
                "linear ",
            ),
            device(
                "p-part3",
                "part3-OVERLAYBD-LSMT-p",
                3,
                "linear 254:1 8",
                "linear ",
            ),
        ];
        devices[0].state.open_count = 3;
        devices[1].state.open_count = 4;
        let sys = Path::new("/nonexistent");
        let stacks = group(devices.clone(), sys);
        let stack = &stacks[0];
        assert_eq!(stack.top().map(|top| &*top.state.name), Some("p"));
        assert!(!stack.is_half_built());
        assert_eq!(stack.open_count(), Some(5));
        let found: Vec<_> = stack
            .partitions()
            .into_iter()
            .map(|p| (p.number, p.name, p.start, p.size))
            .collect();
        let wanted = [
            (3, "p-part3".to_owned(), Some(8 * 512), 16 * 512),
            (12, "p-part12".to_owned(), Some(1 << 20), 16 * 512),
        ];
        assert_eq!(found, wanted);
        devices.push(device(
            "p-partitions",
            "OVERLAYBD-MARK-p",
            4,
            "error ",
            "error ",
        ));
        assert!(group(devices, sys)[0].is_half_built());
    }

    #[test]
    fn disks_that_take_writes() {
        let devices = vec![
            device(
                "w",
                "OVERLAYBD-WRITABLE-w",
                4,
                "snapshot 254:2 254:3 PO 8",
                "snapshot 24/16 16",
            ),
            device("w-store", "OVERLAYBD-STORE-w", 3, "linear 7:3 8", "linear "),
            device(
                "w-image",
                "OVERLAYBD-IMAGE-w",
                2,
                "lsmt 2 7:1 8 7:2 -",
                "lsmt 2",
            ),
        ];
        let stacks = group(devices, Path::new("/nonexistent"));
        assert_eq!(stacks.len(), 1);
        let stack = &stacks[0];
        let files: Vec<&str> = stack.layers.iter().map(|layer| &*layer.file).collect();
        assert_eq!(files, ["7:1", "7:2"]);
        assert_eq!((stack.size(), stack.is_half_built()), (Some(8192), false));
        let changes = stack
            .changes
            .as_ref()
            .map(|c| (&*c.file, c.used, c.size, c.overflowed));
        assert_eq!(changes, Some(("7:3", 24 * 512, 8192, false)));
    }

    #[test]
    fn stacks_of_devices() {
        let sys = Path::new("/nonexistent");
        let devices = vec![
            device(
                "new",
                "OVERLAYBD-LSMT-app",
                3,
                "lsmt 2 254:1 8 7:5 4096 2 8:0 9:1",
                "lsmt 2 1 8192 9",
            ),
            device(
                "app-blob0",
                "OVERLAYBD-BLOB-app-0",
                0,
                "linear 7:1 0\nlinear 7:2 0",
                "linear ",
            ),
            device(
                "app-zfile0",
                "OVERLAYBD-LAYER-app-0",
                1,
                "zfile 254:0 8",
                "zfile C lz4 4096 1 2 3 4 5 6 7 8 9",
            ),
            device(
                "b-zfile0",
                "OVERLAYBD-LAYER-b-0",
                4,
                "zfile 7:5 8",
                "zfile V lz4 4096",
            ),
        ];
        let stacks = group(devices, sys);
        let names: Vec<&str> = stacks.iter().map(|stack| stack.name.as_str()).collect();
        assert_eq!(names, ["app", "b"]);
        let app = &stacks[0];
        assert_eq!(app.size(), Some(8192));
        let base = Layer {
            zfile: Some("app-zfile0".to_owned()),
            file: "7:1".to_owned(),
            corrupt_blocks: 7,
            read_errors: 6,
            cut: None,
            cache: None,
            number: "254:1".to_owned(),
            shared_with: Vec::new(),
        };
        assert_eq!(app.layers[0], base);
        assert_eq!(app.layers[1].file, "7:5");
        assert_eq!(app.shared_with, ["b"]);
        // The same file, but not the same device.
        assert_eq!(app.layers[1].shared_with, [""; 0]);
        assert!(stacks[1].top().is_none() && stacks[1].size().is_none());
        assert_eq!(stacks[1].layers.len(), 1);
        // By its current name, and by the name given to `open`.
        for name in ["new", "app"] {
            let stacks = group(
                app.devices
                    .iter()
                    .map(|(_, device)| device.clone())
                    .collect(),
                sys,
            );
            assert_eq!(
                find(stacks, name).map(|stack| stack.name).as_deref(),
                Some("app")
            );
        }
    }
}
