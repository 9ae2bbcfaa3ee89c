// SPDX-License-Identifier: GPL-2.0

//! Plans which devices a stack of layers needs, and their tables.
//!
//! ```text
//! layer file -> loop ───────────────> NAME-zfileN ─┐
//! layer file -> loop + tail -> NAME-blobN -> NAME-zfileN ─┼─> NAME
//! plain layer on a device ────────────────────────────────┘
//! ```
//!
//! A loop device ends at the last whole sector of its file. If the file has more bytes after it, these bytes,
//! padded to a sector, are copied to a file in memory with a second loop device. `NAME-blobN` joins the two.
//!
//! A writable disk has a snapshot device on top, which keeps the changes in a store:
//!
//! ```text
//! store file -> loop -> NAME-store ─┐
//!                       NAME-image ─┴─> NAME
//! ```
//!
//! Each partition is a device over the disk, `NAME-partN`. These devices have their own plan, because the partitions
//! are known only when the disk can be read. Until the devices exist, another device, `NAME-partitions`, which no one
//! reads, marks the stack as half-built, in case obdsetup is killed before.
//!
//! In a plan with shared devices, the devices below the disk belong to the layers' files, not to the stack
//! ([`share`](super::share)). A compressed file has one zfile device, over a linear device if the file doesn't
//! end with a whole sector. Any other file has one linear device.

use std::fmt::Write;

use anyhow::Result;
use overlaybd::changes::head;
use overlaybd::format::merge::sectors;
use overlaybd::format::{Blob, SECTOR_SIZE};
use overlaybd::{LayerReader, Payload, Stack};

use super::identity::{Identity, Kind, Place, Source, UUID_PREFIX};
use crate::input::partitions::Partition;
use crate::terminal::exit::{self, Failure};

/// Longest name. The UUID that contains it must fit in device-mapper's 128 bytes.
const MAX_NAME: usize = 100;

/// The target of a disk with DAX.
pub(crate) const LSMT_DAX: &str = "lsmt-dax";

/// What is directly below a target.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Lower {
    /// The file or device of layer `.0`.
    Layer(usize),
    /// The last bytes of the file of layer `.0`, padded to a sector: see [`tail`].
    Tail(usize),
    /// The store of changes.
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
    /// The parameters after the name.
    pub(crate) params: Vec<Word>,
}

impl Target {
    /// Returns the files and devices below.
    pub(crate) fn lower(&self) -> impl Iterator<Item = Lower> + '_ {
        self.params.iter().filter_map(|word| match word {
            Word::Lower(lower) => Some(*lower),
            Word::Text(_) => None,
        })
    }

    /// Returns the parameters as text. `resolve` returns the word for a file or device below.
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

/// A device to make.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Device {
    pub(crate) name: String,
    pub(crate) uuid: String,
    pub(crate) table: Vec<Target>,
    /// Whether the device can be written to.
    pub(crate) writable: bool,
    /// The file or device below, if the device is a shared one.
    pub(crate) shared: Option<Source>,
}

impl Device {
    /// Returns the files and devices below.
    pub(crate) fn lower(&self) -> impl Iterator<Item = Lower> + '_ {
        self.table.iter().flat_map(Target::lower)
    }

    /// Returns the length in sectors.
    pub(crate) fn sectors(&self) -> u64 {
        self.table.last().map_or(0, |last| last.start + last.len)
    }
}

/// Devices to make, lowest first. The last one is the disk, except in a plan of partitions.
#[derive(Debug, Default)]
pub(crate) struct Plan {
    pub(crate) devices: Vec<Device>,
}

/// Optional parameters of the targets, as the user gave them.
#[derive(Debug, Default)]
pub(crate) struct TargetOptions {
    /// For `zfile` targets.
    pub(crate) zfile: Vec<String>,
    /// For the `lsmt` target.
    pub(crate) lsmt: Vec<String>,
    /// Whether the disk has DAX.
    pub(crate) dax: bool,
}

/// The words of a table line for the blob of a layer.
struct BlobWords {
    lower: Lower,
    bytes: String,
}

impl Plan {
    /// Plans the devices for `stack`, whose layers are on `places`. With `shared`, the keys of the layers,
    /// the devices below the disk are shared ones.
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
                name: if options.dax { LSMT_DAX } else { "lsmt" },
                params,
            }],
            writable: false,
            shared: None,
        });
        Ok(plan)
    }

    /// Puts a snapshot device on top of the disk `name`, which keeps the changes in a store. The caller sets
    /// the size of the store later, with [`Self::set_store`].
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
        // P: the changes persist. O: reports overflow. If the store is full, the changes in it can still be
        // read.
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

    /// Sets the table of the store's device: the `sectors` after the head of the store.
    pub(crate) fn set_store(&mut self, sectors: u64) {
        let mut devices = self.devices.iter_mut();
        // It is the only device without a table.
        if let Some(store) = devices.find(|device| device.table.is_empty()) {
            let head = head::SIZE / SECTOR_SIZE;
            store.table = vec![linear(0, sectors, Lower::Store, head)];
        }
    }

    /// Adds the mark of the stack `name`, which is removed when its partitions exist.
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
        // Before the disk, so that the indexes of devices that others refer to don't change.
        let place = self.devices.len().saturating_sub(1);
        self.devices.insert(place, mark);
    }

    /// Plans the devices for `partitions` of the disk `name`, which is the last device of `disk`.
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

    /// Plans the devices for a disk that is the content of a ZFile.
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

    /// Adds the blob device of `payload`, if the layer is a file that needs one: if the file doesn't end with a
    /// whole sector, or if the layer is shared and has no zfile device. Other stacks find a shared layer by the
    /// UUID of a device.
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

    /// Adds a device, unless it is a shared one that was added before: a layer may be in a stack twice.
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
            // The exact size of the original file. The zfile device is longer if that isn't a multiple of the
            // sector size.
            bytes: size.to_string(),
        })
    }
}

/// Returns the UUIDs of the writable disk `name`, and of the device of its store.
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

/// Returns the UUID of partition `number` of the disk with UUID `disk`, in the form that kpartx uses. From
/// its prefix libblkid, and so udev, knows that it is a partition of that disk.
fn partition_uuid(number: u32, disk: &str) -> String {
    format!("part{number}-{disk}")
}

/// Returns the number of the partition with `uuid`, and the UUID of its disk.
pub(super) fn parse_partition(uuid: &str) -> Option<(u32, &str)> {
    let (number, disk) = uuid.strip_prefix("part")?.split_once('-')?;
    // parse() would accept a sign.
    let is_number = number.bytes().all(|byte| byte.is_ascii_digit());
    Some((number.parse().ok().filter(|_| is_number)?, disk))
}

/// Returns a table line for `len` sectors of `lower`, starting with its sector `from`.
fn linear(start: u64, len: u64, lower: Lower, from: u64) -> Target {
    Target {
        start,
        len,
        name: "linear",
        params: vec![Word::Lower(lower), Word::Text(from.to_string())],
    }
}

/// Returns name and UUID of the private device for layer `nth` of the stack `name`.
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

/// Returns the last bytes of a layer's file, which a loop device doesn't show, padded to a sector.
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

/// Checks a device name. Only characters that libdm doesn't escape are allowed, so the node has exactly this
/// name.
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

/// Returns the payloads of the layers.
pub(crate) fn payloads(layers: &[LayerReader]) -> Vec<&Payload> {
    layers.iter().map(LayerReader::payload).collect()
}
