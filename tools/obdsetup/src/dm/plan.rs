// SPDX-License-Identifier: GPL-2.0

//! Which devices a stack of layers takes, and what their tables say.
//!
//! ```text
//! layer file -> loop ───────────────> NAME-zfileN ─┐
//! layer file -> loop + tail -> NAME-blobN -> NAME-zfileN ─┼─> NAME
//! plain layer on a device ────────────────────────────────┘
//! ```
//!
//! A loop device ends at the last whole sector of its file. Where the file goes on, the rest of
//! it, padded to a sector, is a second loop device, over a file in memory; `NAME-blobN` joins the
//! two.
//!
//! A disk that takes writes has a snapshot on top, which keeps them in a store:
//!
//! ```text
//! store file -> loop -> NAME-store ─┐
//!                       NAME-image ─┴─> NAME
//! ```
//!
//! Each partition is a device over the disk, `NAME-partN`. They have a plan of their own, since only the
//! disk tells which there are. Until they are there, `NAME-partitions`, of which nobody reads, marks the
//! stack as one that is not complete: a kill may leave it so.
//!
//! In a plan that shares, the devices below the disk are those of the layers' files, whichever stack
//! has them ([`share`](super::share)): each file has one of `zfile`, or one of `linear` where it is
//! not compressed.

use std::fmt::Write;

use anyhow::Result;
use overlaybd::changes::head;
use overlaybd::format::merge::sectors;
use overlaybd::format::{Blob, SECTOR_SIZE};
use overlaybd::{LayerReader, Payload, Stack};

use super::share::{Identity, Kind, Source};
use crate::exit::{self, Failure};
use crate::partitions::Partition;

/// Longest name: the UUID that is made of it must fit in device-mapper's 128 bytes.
const MAX_NAME: usize = 100;

/// What the UUIDs of all our devices start with. The type follows, then the name of the stack:
/// `LSMT`, `ZFILE` and `WRITABLE` are disks; `IMAGE` and `STORE`, below a disk that takes writes, and
/// `LAYER` and `BLOB`, with the number of their layer behind the name, are for other devices of the stack
/// only; `MARK` is the mark of a stack whose partitions are not there yet. udev's rules go by the type.
/// The UUID of a partition is [`partition_uuid`].
pub(crate) const UUID_PREFIX: &str = "OVERLAYBD-";

/// Where a target gets its sectors from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Lower {
    /// The file or device of layer `.0`.
    Layer(usize),
    /// The last bytes of the file of layer `.0`, padded to a sector.
    Tail(usize),
    /// The file or device that keeps what is written.
    Store,
    /// The disk, in a plan of its partitions.
    Disk,
    /// Device `.0` of the plan.
    Device(usize),
}

/// A word of a table line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Word {
    Text(String),
    Lower(Lower),
}

/// A line of a table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Target {
    /// First sector in the device.
    pub(crate) start: u64,
    /// Length in sectors.
    pub(crate) len: u64,
    /// Name of the target.
    pub(crate) name: &'static str,
    /// What follows it.
    pub(crate) params: Vec<Word>,
}

impl Target {
    /// Returns what is below.
    pub(crate) fn lower(&self) -> impl Iterator<Item = Lower> + '_ {
        self.params.iter().filter_map(|word| match word {
            Word::Lower(lower) => Some(*lower),
            Word::Text(_) => None,
        })
    }

    /// What follows the target's name, with `resolve` giving the words for what is below.
    pub(crate) fn params(&self, resolve: &dyn Fn(Lower) -> String) -> String {
        let words: Vec<String> = self
            .params
            .iter()
            .map(|word| match word {
                Word::Text(text) => text.clone(),
                Word::Lower(lower) => resolve(*lower),
            })
            .collect();
        words.join(" ")
    }
}

/// A device to be made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Device {
    pub(crate) name: String,
    pub(crate) uuid: String,
    pub(crate) table: Vec<Target>,
    /// Whether it takes writes.
    pub(crate) writable: bool,
    /// For a device that other stacks may use: what it is over.
    pub(crate) shared: Option<Source>,
}

impl Device {
    /// Returns what is below.
    pub(crate) fn lower(&self) -> impl Iterator<Item = Lower> + '_ {
        self.table.iter().flat_map(Target::lower)
    }

    /// Returns the length in sectors.
    pub(crate) fn sectors(&self) -> u64 {
        self.table.last().map_or(0, |last| last.start + last.len)
    }
}

/// Devices to be made, lowest first; the last one is what was asked for.
#[derive(Debug, Default)]
pub(crate) struct Plan {
    pub(crate) devices: Vec<Device>,
}

/// Parameters that are passed on to the targets as they are.
#[derive(Debug, Default)]
pub(crate) struct TargetOptions {
    /// For `zfile` targets.
    pub(crate) zfile: Vec<String>,
    /// For the `lsmt` target.
    pub(crate) lsmt: Vec<String>,
    /// Whether the disk is to have DAX.
    pub(crate) dax: bool,
}

/// The blob of a layer as a target sees it.
struct BlobWords {
    lower: Lower,
    bytes: String,
}

impl Plan {
    /// The devices for `stack`, whose layers are on `places`. With `shared`, what the layers are known
    /// by, those below the disk are for other stacks, too.
    pub(crate) fn for_stack(
        name: &str,
        stack: &Stack,
        places: &[Place],
        options: &TargetOptions,
        shared: Option<&[Identity]>,
    ) -> Result<Self> {
        check_name(name)?;
        let mut plan = Self {
            devices: Vec::new(),
        };
        let mut params = vec![Word::Text(stack.layers().len().to_string())];
        for ((nth, layer), &place) in stack.layers().iter().enumerate().zip(places) {
            let identity = shared.and_then(|all| all.get(nth));
            let called = |kind| match identity {
                Some(identity) => identity.device(
                    kind,
                    match kind {
                        Kind::Zfile => &options.zfile,
                        Kind::Blob => &[],
                    },
                ),
                None => private_names(name, nth, kind),
            };
            let source = identity.map(|identity| identity.source);
            let blob = plan.add_blob(called(Kind::Blob), source, nth, layer.payload(), place);
            let blob = match layer.payload().zfile() {
                None => blob,
                Some(_) => {
                    let called = called(Kind::Zfile);
                    plan.add_zfile(called, source, layer.payload(), blob, options)?
                }
            };
            params.push(Word::Lower(blob.lower));
            params.push(Word::Text(blob.bytes));
        }
        push_options(&mut params, &options.lsmt);
        plan.devices.push(Device {
            name: name.to_owned(),
            uuid: format!("{UUID_PREFIX}LSMT-{name}"),
            table: vec![Target {
                start: 0,
                len: stack.sectors(),
                name: if options.dax { "lsmt-dax" } else { "lsmt" },
                params,
            }],
            writable: false,
            shared: None,
        });
        Ok(plan)
    }

    /// Puts a snapshot on top of the disk `name`, which keeps what is written in a store;
    /// [`Self::set_store`] tells its size.
    pub(crate) fn make_writable(&mut self, name: &str) {
        let Some(image) = self.devices.last_mut() else {
            return;
        };
        image.name = format!("{name}-image");
        image.uuid = format!("{UUID_PREFIX}IMAGE-{name}");
        let len = image.sectors();
        let [top_uuid, store_uuid] = writable_uuids(name);
        let image = Lower::Device(self.devices.len() - 1);
        let store = self.add(Device {
            name: format!("{name}-store"),
            uuid: store_uuid,
            table: Vec::new(),
            writable: true,
            shared: None,
        });
        // P: it survives. O: when it is full, what was written before can still be read.
        let words = ["PO".to_owned(), head::CHUNK.to_string()];
        let mut params = vec![Word::Lower(image), Word::Lower(store)];
        params.extend(words.map(Word::Text));
        self.add(Device {
            name: name.to_owned(),
            uuid: top_uuid,
            table: vec![Target {
                start: 0,
                len,
                name: "snapshot",
                params,
            }],
            writable: true,
            shared: None,
        });
    }

    /// Makes the device of the store one of the `sectors` behind its head.
    pub(crate) fn set_store(&mut self, sectors: u64) {
        let mut devices = self.devices.iter_mut();
        // All others have their tables.
        if let Some(store) = devices.find(|device| device.table.is_empty()) {
            let head = head::SIZE / SECTOR_SIZE;
            store.table = vec![linear(0, sectors, Lower::Store, head)];
        }
    }

    /// Adds the mark of the stack `name`, which is there until its partitions are.
    pub(crate) fn add_mark(&mut self, name: &str) {
        let (name, uuid) = mark(name);
        let mark = Device {
            name,
            uuid,
            table: vec![Target {
                start: 0,
                len: 1,
                name: "error",
                params: Vec::new(),
            }],
            writable: false,
            shared: None,
        };
        // Before the disk, which no other device of the plan is over.
        let place = self.devices.len().saturating_sub(1);
        self.devices.insert(place, mark);
    }

    /// The devices for `partitions` of the disk `name`, which is the last device of `disk`.
    pub(crate) fn for_partitions(name: &str, disk: &Self, partitions: &[Partition]) -> Self {
        let disk = disk.devices.last();
        let devices = partitions.iter().map(|partition| Device {
            name: format!("{name}-part{}", partition.number),
            uuid: partition_uuid(partition.number, disk.map_or("", |disk| &disk.uuid)),
            table: vec![linear(0, partition.len, Lower::Disk, partition.start)],
            writable: disk.is_some_and(|disk| disk.writable),
            shared: None,
        });
        Self {
            devices: devices.collect(),
        }
    }

    /// The devices for the content of a ZFile.
    pub(crate) fn for_zfile(
        name: &str,
        payload: &Payload,
        place: Place,
        options: &TargetOptions,
    ) -> Result<Self> {
        check_name(name)?;
        let mut plan = Self {
            devices: Vec::new(),
        };
        let blob = plan.add_blob(private_names(name, 0, Kind::Blob), None, 0, payload, place);
        let called = (name.to_owned(), format!("{UUID_PREFIX}ZFILE-{name}"));
        plan.add_zfile(called, None, payload, blob, options)?;
        Ok(plan)
    }

    /// Adds what is to be over the file of `payload`: what joins it, where it doesn't end with a sector,
    /// and what other stacks find it by, where nothing else does.
    fn add_blob(
        &mut self,
        called: (String, String),
        shared: Option<Source>,
        nth: usize,
        payload: &Payload,
        place: Place,
    ) -> BlobWords {
        let size = payload.file().size();
        let bytes = match place {
            Place::WholeDevice => "-".to_owned(),
            Place::File | Place::PartOfDevice => size.to_string(),
        };
        let whole = size / SECTOR_SIZE;
        let is_odd = size % SECTOR_SIZE != 0;
        let is_found = shared.is_none() || payload.zfile().is_some();
        if place != Place::File || !is_odd && is_found {
            let lower = Lower::Layer(nth);
            return BlobWords { lower, bytes };
        }
        let mut table = vec![linear(0, whole, Lower::Layer(nth), 0)];
        if is_odd {
            table.push(linear(whole, 1, Lower::Tail(nth), 0));
        }
        let (name, uuid) = called;
        let lower = self.add(Device {
            name,
            uuid,
            table,
            writable: false,
            shared,
        });
        BlobWords { lower, bytes }
    }

    /// Adds a device. The same layer may be in a stack twice: its shared device is there once.
    fn add(&mut self, device: Device) -> Lower {
        let same = |other: &Device| device.shared.is_some() && other.uuid == device.uuid;
        let nth = self.devices.iter().position(same);
        Lower::Device(nth.unwrap_or_else(|| {
            self.devices.push(device);
            self.devices.len() - 1
        }))
    }

    fn add_zfile(
        &mut self,
        called: (String, String),
        shared: Option<Source>,
        payload: &Payload,
        blob: BlobWords,
        options: &TargetOptions,
    ) -> Result<BlobWords> {
        let size = payload.size();
        if size == 0 {
            let path = payload.file().path().display();
            return Err(Failure::error(
                exit::USAGE,
                format!("{path}: a ZFile of size 0 cannot be a device"),
            ));
        }
        let mut params = vec![Word::Lower(blob.lower), Word::Text(blob.bytes)];
        push_options(&mut params, &options.zfile);
        let (name, uuid) = called;
        let lower = self.add(Device {
            name,
            uuid,
            table: vec![Target {
                start: 0,
                len: sectors(size),
                name: "zfile",
                params,
            }],
            writable: false,
            shared,
        });
        Ok(BlobWords {
            lower,
            // The device is longer than that where the file doesn't end with a sector.
            bytes: size.to_string(),
        })
    }
}

/// Returns the UUIDs of the disk `name` that takes writes, and of the device of its store.
pub(crate) fn writable_uuids(name: &str) -> [String; 2] {
    ["WRITABLE", "STORE"].map(|kind| format!("{UUID_PREFIX}{kind}-{name}"))
}

/// Returns name and UUID of the mark of the stack `name`.
pub(crate) fn mark(name: &str) -> (String, String) {
    (
        format!("{name}-partitions"),
        format!("{UUID_PREFIX}MARK-{name}"),
    )
}

/// Returns the UUID of partition `number` of the disk with UUID `disk`, as kpartx makes it: what is in
/// front tells libblkid, and so udev, that it is a partition of that disk.
fn partition_uuid(number: u32, disk: &str) -> String {
    format!("part{number}-{disk}")
}

/// Returns the number of the partition with `uuid`, and the UUID of its disk.
pub(super) fn parse_partition(uuid: &str) -> Option<(u32, &str)> {
    let (number, disk) = uuid.strip_prefix("part")?.split_once('-')?;
    // parse() takes a sign, too.
    let is_number = number.bytes().all(|byte| byte.is_ascii_digit());
    Some((number.parse().ok().filter(|_| is_number)?, disk))
}

/// Returns a line of a table: `len` sectors of `lower` from its sector `from` on.
fn linear(start: u64, len: u64, lower: Lower, from: u64) -> Target {
    Target {
        start,
        len,
        name: "linear",
        params: vec![Word::Lower(lower), Word::Text(from.to_string())],
    }
}

/// Returns name and UUID of a device of layer `nth` of the stack `name` alone.
fn private_names(name: &str, nth: usize, kind: Kind) -> (String, String) {
    match kind {
        Kind::Zfile => (
            format!("{name}-zfile{nth}"),
            format!("{UUID_PREFIX}LAYER-{name}-{nth}"),
        ),
        Kind::Blob => (
            format!("{name}-blob{nth}"),
            format!("{UUID_PREFIX}BLOB-{name}-{nth}"),
        ),
    }
}

/// What a layer is on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    /// A file, which needs a loop device.
    File,
    /// A block device of the blob's size.
    WholeDevice,
    /// The first bytes of a block device.
    PartOfDevice,
}

/// The last bytes of a layer's file, which a loop device doesn't show, padded to a sector.
pub(crate) fn tail(payload: &Payload) -> overlaybd::Result<[u8; 512]> {
    let file = payload.file();
    let start = file.size() - file.size() % SECTOR_SIZE;
    let mut bytes = [0; 512];
    for (offset, byte) in (start..file.size()).zip(bytes.chunks_mut(1)) {
        file.read_at(offset, byte)?;
    }
    Ok(bytes)
}

fn push_options(params: &mut Vec<Word>, options: &[String]) {
    if options.is_empty() {
        return;
    }
    // An option with a value is two words.
    let words: Vec<&str> = options.iter().flat_map(|o| o.split_whitespace()).collect();
    params.push(Word::Text(words.len().to_string()));
    params.extend(words.into_iter().map(|word| Word::Text(word.to_owned())));
}

/// Checks a device name: what libdm leaves as it is, so that the node has that very name.
pub(crate) fn check_name(name: &str) -> Result<()> {
    let plain = |c: char| c.is_ascii_alphanumeric() || "#+-.:=@_".contains(c);
    if name.is_empty()
        || name.len() > MAX_NAME
        || !name.chars().all(plain)
        || name.starts_with(['.', '-'])
    {
        let mut message = format!("name `{name}`: expected 1 to {MAX_NAME} ");
        let _ = write!(
            message,
            "letters, digits or any of # + - . : = @ _, no . or - first"
        );
        return Err(Failure::usage(message));
    }
    Ok(())
}

/// The layers of a stack as payloads.
pub(crate) fn payloads(layers: &[LayerReader]) -> Vec<&Payload> {
    layers.iter().map(LayerReader::payload).collect()
}
