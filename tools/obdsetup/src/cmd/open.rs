// SPDX-License-Identifier: GPL-2.0

//! `obdsetup open`.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::os::unix::fs::FileTypeExt;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use clap::error::{ContextKind, ErrorKind};
use clap::Parser;
use overlaybd::{dax, Payload, Stack};
use rustix::process::{getrlimit, setrlimit, Resource, Rlimit};

use crate::devices::dm::backing::Backing;
use crate::devices::dm::control::State;
use crate::devices::dm::identity::Identity;
use crate::devices::dm::identity::Place;
use crate::devices::dm::lock::Lock;
use crate::devices::dm::plan::{self, Lower, TargetOptions};
use crate::devices::dm::setup::{self, Below, Removal, SetUp};
use crate::devices::dm::share;
use crate::devices::dm::udev::Udev;
use crate::devices::dm::{self, Control, Plan};
use crate::devices::store::opening;
use crate::devices::tab;
use crate::files::in_use::InUseArgs;
use crate::input::chain::ChainArgs;
use crate::input::journal;
use crate::input::layer_name::{LayerArg, Purpose};
use crate::input::layers::{expand, plan_stack};
use crate::input::partitions;
use crate::input::partitions::Partition;
use crate::terminal::exit::{self, Failure};
use crate::terminal::interrupt;
use crate::terminal::print;
use crate::terminal::size;

/// How long to wait until a half-built stack stays unchanged.
const PATIENCE: Duration = Duration::from_secs(20);
const POLL: Duration = Duration::from_millis(250);
/// Largest number of open files for a layer: its own, two loop devices, two devices that are held open, and two
/// locks. `FILES` is the largest number of all other open files.
const FILES_EACH: u64 = 7;
const FILES: u64 = 64;

/// Arguments of `open`.
#[derive(Clone, clap::Args)]
#[command(after_help = "Examples:
  obdsetup open app base.obd app.obd && mount -o ro /dev/mapper/app /mnt
  obdsetup open vol /dev/vdb /dev/vdc:size=758556     blobs on block devices
  obdsetup open app config.v1.json
      a stack of containerd's, if its layers are on this machine
  obdsetup open app
      the layers that /etc/overlaybdtab has for app
  obdsetup open --zfile data data.zf             the content of a plain ZFile
  obdsetup open --partitions vm vm.obd && mount -o ro /dev/mapper/vm-part1 /mnt
  obdsetup open --create --writable app.changes app base.obd
      what is written goes to app.changes

A file system that was not unmounted cleanly needs an option to be mounted without replaying its \
journal: noload (ext4), norecovery (xfs), rescue=nologreplay (btrfs).

Files get read-only loop devices, which are removed with the devices over them. Stacks that have the \
file of a layer in common share one device for it if their options for it are the same. If a step \
fails, all that was set up before is removed. Needs dmsetup(8).

With --partitions, the partition table is read once, when the disk is opened; `close' removes the \
devices of the partitions, too. An extended partition, which only holds other partitions, gets no \
device. Needs partx(8).

With --writable, the disk takes writes, which go to a store. The next time that the disk is opened \
with this store, it has what was written. A store can only be used with the layers that it was made \
for. `create --changes' makes a layer of the changes in it.")]
pub(crate) struct Args {
    /// Name of the device, /dev/mapper/NAME
    name: String,

    /// Read files through the page cache, not with direct I/O
    #[arg(long)]
    buffered: bool,

    /// Make separate devices for the layers, which no other stack uses
    #[arg(long)]
    private: bool,

    /// Take writes, and keep them in FILE, a store of changes; it may be a block device
    #[arg(long, value_name = "FILE", conflicts_with = "zfile")]
    writable: Option<PathBuf>,

    /// Size of the store that is made, or that an existing store grows to (if not given: a file has room for
    /// all of the disk, and takes space on its file system only as it is filled; a device is used completely)
    #[arg(long, value_name = "SIZE", value_parser = size::parse)]
    store_size: Option<u64>,

    /// Whether the size is from the table. Then it is a minimum.
    #[arg(skip)]
    size_of_tab: bool,

    /// Make the store if the file does not exist or the device is empty
    #[arg(long)]
    create: bool,

    /// Make a device for each partition of the disk, too: /dev/mapper/NAME-partN
    #[arg(long)]
    partitions: bool,

    /// Open a store that another machine has not closed; it must not be open there any more
    #[arg(long)]
    take_over: bool,

    #[command(flatten)]
    pub(crate) layers: LayersArgs,
}

/// The layers to set up.
#[derive(Clone, clap::Args)]
pub(crate) struct LayersArgs {
    /// Layers, lowest first: files or block devices; DEVICE:size=BYTES if the blob is shorter than the
    /// device; or a config.v1.json that lists layers. If none is given, layers and options are those that
    /// /etc/overlaybdtab has for NAME
    #[arg(value_name = "LAYER")]
    layers: Vec<LayerArg>,

    /// The one LAYER is a ZFile, and its content is the disk
    #[arg(long)]
    zfile: bool,

    /// Let file systems map the layers, which are on pmem devices: see `mount -o dax'
    #[arg(long, conflicts_with = "zfile")]
    dax: bool,

    /// An optional parameter for the lsmt target, passed on unchanged
    #[arg(long, value_name = "OPTION", conflicts_with = "zfile")]
    lsmt_opt: Vec<String>,

    /// An optional parameter for the zfile targets, passed on unchanged, such as "cache_blocks 64"
    #[arg(long, value_name = "OPTION")]
    zfile_opt: Vec<String>,

    #[command(flatten)]
    chain: ChainArgs,

    #[command(flatten)]
    in_use: InUseArgs,
}

/// The opened layers.
pub(crate) enum Opened {
    Stack(Stack),
    Zfile(Payload),
}

/// The layers with the plan to set them up.
pub(crate) struct Planned {
    /// The layers as named by the user.
    pub(crate) layers: Vec<LayerArg>,
    pub(crate) opened: Opened,
    pub(crate) plan: Plan,
}

impl Opened {
    /// Returns a note if the file system on the disk can be mounted only with certain options.
    fn journal_note(&self, node: &str) -> Option<String> {
        match self {
            Self::Stack(stack) => journal::note(stack, node),
            Self::Zfile(payload) => journal::note(payload, node),
        }
    }

    /// As [`Self::journal_note`], for a partition with the node `node`.
    fn journal_note_of_part(&self, part: Partition, node: &str) -> Option<String> {
        match self {
            Self::Stack(stack) => journal::note_of_part(stack, part, node),
            Self::Zfile(payload) => journal::note_of_part(payload, part, node),
        }
    }

    /// Returns the payloads, lowest first.
    pub(crate) fn payloads(&self) -> Vec<&Payload> {
        match self {
            Self::Stack(stack) => plan::payloads(stack.layers()),
            Self::Zfile(payload) => vec![payload],
        }
    }
}

/// A parser for the arguments that a line of the table has.
#[derive(Parser)]
#[command(disable_help_flag = true)]
struct TabLine {
    #[command(flatten)]
    args: Args,
}

/// Returns the arguments from a line of the table.
pub(crate) fn parse(entry: &tab::Entry) -> Result<Args> {
    let line = TabLine::try_parse_from(entry.arguments()).map_err(|error| {
        if let (ErrorKind::UnknownArgument, Some(option)) =
            (error.kind(), error.get(ContextKind::InvalidArg))
        {
            let option = option.to_string();
            let option = option.trim_start_matches("--");
            return Failure::usage(format!("unknown option `{option}': see overlaybdtab(5)"));
        }
        // Only the first line: the others are about the usage of a command line.
        let text = error.to_string();
        let text = text.lines().next().unwrap_or_default();
        Failure::usage(text.trim_start_matches("error: "))
    })?;
    // Such an option would apply at each boot, also when a file system isn't mounted or there is another
    // disk.
    for (option, is_there) in [
        ("create", line.args.create),
        ("take-over", line.args.take_over),
    ] {
        if is_there {
            let message = format!("option `{option}' is for the command line only");
            return Err(Failure::usage(message));
        }
    }
    line.args.check()?;
    Ok(line.args)
}

impl Args {
    /// Checks that the options fit together, whether from the command line or from the table.
    fn check(&self) -> Result<()> {
        let is_for_store = self.create || self.take_over || self.store_size.is_some();
        let message = match &self.writable {
            None if is_for_store => "--create, --store-size and --take-over are for --writable",
            Some(_) if self.layers.zfile => {
                "--writable and --zfile exclude each other (writable= and zfile in overlaybdtab)"
            }
            Some(_) if self.layers.dax => {
                "--writable is not for --dax: a disk with a dm-snapshot above has no DAX"
            }
            // Devices of partitions may begin within a page, and may overlap, so files of two file systems could
            // have the same page.
            _ if self.partitions && self.layers.dax => {
                "--partitions is not for --dax, with which one file system has the whole disk"
            }
            _ => return Ok(()),
        };
        Err(Failure::usage(message))
    }

    /// Returns these arguments. If they have no layers, adds the layers and options that the table has for
    /// this name.
    fn or_tab(&self) -> Result<Cow<'_, Self>> {
        if !self.layers.layers.is_empty() {
            return Ok(Cow::Borrowed(self));
        }
        let path = tab::path();
        let entry = tab::find(&path, &self.name)?;
        let mut args =
            parse(&entry).with_context(|| format!("{}: `{}'", path.display(), self.name))?;
        let mine = &self.layers;
        args.buffered |= self.buffered;
        args.private |= self.private;
        args.partitions |= self.partitions;
        args.writable = self.writable.clone().or(args.writable);
        args.size_of_tab = self.store_size.is_none();
        args.store_size = self.store_size.or(args.store_size);
        args.create = self.create;
        args.take_over = self.take_over;
        args.layers.zfile |= mine.zfile;
        args.layers.dax |= mine.dax;
        args.layers.chain |= &mine.chain;
        args.layers.in_use |= &mine.in_use;
        args.layers.lsmt_opt.extend(mine.lsmt_opt.iter().cloned());
        args.layers.zfile_opt.extend(mine.zfile_opt.iter().cloned());
        Ok(Cow::Owned(args))
    }
}

impl Args {
    /// Checks the store of changes.
    fn store(&self, opened: &Opened) -> Result<Option<opening::Found>> {
        match (&self.writable, opened) {
            (None, _) | (_, Opened::Zfile(_)) => Ok(None),
            (Some(path), Opened::Stack(stack)) => {
                let wish = opening::Wish {
                    bytes: self.store_size,
                    at_least: self.size_of_tab,
                    create: self.create,
                    take_over: self.take_over,
                };
                opening::Found::new(path, stack, &wish).map(Some)
            }
        }
    }
}

impl LayersArgs {
    /// Plans the devices for `name`. As in [`Args::or_tab`], the table has layers and options if these arguments
    /// have no layers. For commands that have only these arguments.
    pub(crate) fn plan_or_tab(&self, name: &str) -> Result<Planned> {
        let args = Args {
            name: name.to_owned(),
            buffered: false,
            private: true,
            writable: None,
            store_size: None,
            size_of_tab: false,
            create: false,
            take_over: false,
            partitions: false,
            layers: self.clone(),
        };
        args.or_tab()?.layers.plan(name, None)
    }

    /// Opens and checks the layers, and plans the devices. If `shared` is `Some`, the devices of layers are
    /// shared; its value says whether files are read through the page cache.
    fn plan(&self, name: &str, shared: Option<bool>) -> Result<Planned> {
        plan::check_name(name)?;
        let layers = match self.zfile {
            true => self.layers.clone(),
            false => expand(&self.layers)?,
        };
        layers.iter().try_for_each(LayerArg::check_size)?;
        let places: Vec<Place> = layers
            .iter()
            .map(|layer| match (layer.is_device(), layer.size) {
                (false, _) => Place::File,
                (true, None) => Place::WholeDevice,
                (true, Some(_)) => Place::PartOfDevice,
            })
            .collect();
        let options = TargetOptions {
            zfile: self.zfile_opt.clone(),
            lsmt: self.lsmt_opt.clone(),
            dax: self.dax,
        };
        if !self.zfile {
            let stack = plan_stack(&layers, &self.chain)?;
            if self.dax {
                check_dax(&stack, &places)?;
            }
            // DAX layers aren't shared: a pmem device can have only one user.
            let identities = match shared.filter(|_| !self.dax) {
                Some(buffered) => {
                    let payloads = plan::payloads(stack.layers());
                    let layers = payloads.iter().zip(&places);
                    let all =
                        layers.map(|(payload, &place)| Identity::of(payload, place, buffered));
                    Some(all.collect::<Result<Vec<_>>>()?)
                }
                None => None,
            };
            let identities = identities.as_deref();
            let plan = Plan::for_stack(name, &stack, &places, &options, identities)?;
            let opened = Opened::Stack(stack);
            return Ok(Planned {
                layers,
                opened,
                plan,
            });
        }
        let ([layer], [place]) = (layers.as_slice(), places.as_slice()) else {
            return Err(Failure::usage("--zfile takes one LAYER"));
        };
        let payload = Payload::open(layer.open()?);
        let payload = payload.map_err(|error| layer.no_layer(error, Purpose::Devices))?;
        if payload.zfile().is_none() {
            return Err(Failure::error(
                exit::BAD_IMAGE,
                format!("{layer}: not a ZFile"),
            ));
        }
        let plan = Plan::for_zfile(name, &payload, *place, &options)?;
        let opened = Opened::Zfile(payload);
        Ok(Planned {
            layers,
            opened,
            plan,
        })
    }
}

/// Checks that file systems can map the layers of `stack`. `places` says what they are stored on.
fn check_dax(stack: &Stack, places: &[Place]) -> Result<()> {
    for (layer, &place) in stack.layers().iter().zip(places) {
        let path = layer.path();
        let path = path.display();
        if place == Place::File {
            return Err(Failure::usage(format!(
                "{path}: is a file: --dax needs a pmem device for each layer"
            )));
        }
        if let Err(misfit) = dax::page_size(layer)? {
            let text = format!("{path}: {misfit}");
            return Err(Failure::error(exit::BAD_IMAGE, text));
        }
    }
    Ok(())
}

/// Runs `open`.
pub(crate) fn run(args: &Args) -> Result<()> {
    let args = args.or_tab()?;
    args.check()?;
    let Planned {
        layers: named,
        opened,
        mut plan,
    } = args
        .layers
        .plan(&args.name, (!args.private).then_some(args.buffered))?;
    let paths = named.iter().map(|layer| layer.path.as_path());
    args.layers.in_use.check_below(paths)?;
    let control = Control::open()?;
    if args.writable.is_some() {
        plan.make_writable(&args.name);
    }
    if args.partitions {
        plan.add_mark(&args.name);
    }
    let (lock, states) = make_way(&control, &args.name, &plan)?;
    allow_files(named.len());

    // Only after make_way(), because a stack that a killed obdsetup has left may have had the store open.
    let store = match args.store(&opened)? {
        Some(found) => {
            plan.set_store(found.sectors());
            Some(found.begin(&args.name)?)
        }
        None => None,
    };
    let mut below = Backings {
        payloads: opened.payloads(),
        store: store.as_ref(),
        buffered: args.buffered,
        lock: &lock,
        backings: BTreeMap::new(),
    };
    let set_up = SetUp::new(&control, &lock, &plan, states, &mut below)?;
    interrupt::check()?;
    let (partitions, found) = match args.partitions {
        true => plan_partitions(&control, &args.name, &plan)?,
        false => Default::default(),
    };
    // Declared after `set_up`, so that partitions are removed before the disk on an error.
    let set_up_partitions = match args.partitions {
        true => Some(add_partitions(
            &control,
            &lock,
            &partitions,
            &set_up,
            &args.name,
        )?),
        false => None,
    };
    let node = dm::node(&args.name).display().to_string();
    let mut nodes = format!("{node}\n");
    for partition in &partitions.devices {
        nodes.push_str(&format!("{}\n", dm::node(&partition.name).display()));
    }
    print(&nodes)?;
    // The file system of a writable disk can replay its journal, so no note is needed.
    if store.is_none() {
        let of_parts = partitions.devices.iter().zip(found).map(|(device, part)| {
            let node = dm::node(&device.name).display().to_string();
            opened.journal_note_of_part(part, &node)
        });
        let notes = std::iter::once(opened.journal_note(&node)).chain(of_parts);
        notes
            .flatten()
            .for_each(|note| crate::terminal::tell(&note));
    }
    let adopted = set_up.adopted();
    if let Some(partitions) = set_up_partitions {
        partitions.keep();
    }
    set_up.keep();
    if let Some(store) = store {
        store.keep();
    }
    share::set_caches(&control, &adopted);
    Ok(())
}

/// Plans the devices of the partitions of the disk `name`, which is the last device of `plan`, and exists.
/// Returns the plan and the partitions. Fails if another device has a name or UUID of the plan's devices.
fn plan_partitions(control: &Control, name: &str, plan: &Plan) -> Result<(Plan, Vec<Partition>)> {
    let sectors = plan.devices.last().map_or(0, plan::Device::sectors);
    let found = partitions::read(name, &dm::node(name), sectors)?;
    let partitions = Plan::for_partitions(name, plan, &found);
    let all = control.states()?;
    let mut devices = partitions.devices.iter();
    match devices.find_map(|device| setup::in_the_way(&all, device)) {
        Some(error) => Err(error),
        None => Ok((partitions, found)),
    }
}

/// Makes the devices of `partitions`, which are over `disk`. Then removes the mark of the stack `name`, which
/// is complete now.
fn add_partitions<'a>(
    control: &'a Control,
    lock: &'a Lock,
    partitions: &'a Plan,
    disk: &SetUp<'_>,
    name: &str,
) -> Result<SetUp<'a>> {
    let mut below = Disk(disk.number().map(str::to_owned));
    let set_up = SetUp::new(control, lock, partitions, control.states()?, &mut below)?;
    let removal = Removal {
        deferred: false,
        despite_signals: false,
    };
    let (mark, _) = plan::mark(name);
    setup::remove(control, lock, &[mark], &[], removal, Udev::find())?;
    interrupt::check()?;
    Ok(set_up)
}

/// The number of the disk that partitions are over.
struct Disk(Option<String>);

impl Below for Disk {
    fn provide(&mut self, _: Lower) -> Result<()> {
        Ok(())
    }

    fn number(&self, lower: Lower) -> Option<String> {
        self.0.clone().filter(|_| lower == Lower::Disk)
    }
}

/// The files and devices of the layers and of the store that tables name.
struct Backings<'a> {
    payloads: Vec<&'a Payload>,
    store: Option<&'a opening::Opened>,
    buffered: bool,
    lock: &'a Lock,
    backings: BTreeMap<Lower, Backing>,
}

impl Below for Backings<'_> {
    fn provide(&mut self, lower: Lower) -> Result<()> {
        interrupt::check()?;
        if self.backings.contains_key(&lower) {
            return Ok(());
        }
        let payload = |nth: usize| {
            let payload = self.payloads.get(nth).copied();
            payload.context("a layer without a file")
        };
        let backing = match lower {
            Lower::Device(_) | Lower::Disk => return Ok(()),
            Lower::Tail(nth) => Backing::bytes(&plan::tail(payload(nth)?)?, self.lock)?,
            Lower::Layer(nth) => {
                // Uses the open file, because its name may lead to another file now.
                let file = payload(nth)?.file().file();
                let meta = file.metadata()?;
                match meta.file_type().is_block_device() {
                    true => Backing::device(&meta),
                    false => Backing::file(file, !self.buffered, self.lock)?,
                }
            }
            Lower::Store => {
                let store = self.store.context("a plan with a store, and none")?;
                store.backing(!self.buffered, self.lock)?
            }
        };
        self.backings.insert(lower, backing);
        Ok(())
    }

    fn number(&self, lower: Lower) -> Option<String> {
        let backing = self.backings.get(&lower);
        backing.map(|backing| backing.number.clone())
    }
}

/// Raises the limit of open files, if necessary, for a stack of this number of layers.
fn allow_files(layers: usize) {
    let needed = u64::try_from(layers).map_or(u64::MAX, |n| n.saturating_mul(FILES_EACH) + FILES);
    let now = getrlimit(Resource::Nofile);
    if now.current.is_some_and(|current| current < needed) {
        let current = Some(now.maximum.map_or(needed, |maximum| maximum.min(needed)));
        // If this fails, opening a file will fail and report the limit.
        let _ = setrlimit(Resource::Nofile, Rlimit { current, ..now });
    }
}

/// Returns the stack `name` if it exists and is half-built.
fn half_built(all: &[State], name: &str) -> Option<dm::Stack> {
    dm::Stack::among(all, name).filter(|stack| stack.name == name && stack.is_half_built())
}

/// Waits until the half-built stack `name` has stayed unchanged for [`dm::QUIET`], because an obdsetup that has
/// another `/run`, for example in a container, may be setting it up. Returns all devices after that. `all`
/// are all devices now. Fails if the stack still changes after [`PATIENCE`].
fn settled(control: &Control, name: &str, mut all: Vec<State>) -> Result<Vec<State>> {
    let mut last = Instant::now();
    let end = last + PATIENCE;
    while half_built(&all, name).is_some() && last.elapsed() < dm::QUIET {
        if Instant::now() >= end {
            let message = format!(
                "device {name} is being set up or taken down by another program, perhaps in a \
                 container"
            );
            return Err(Failure::error(exit::BUSY, message));
        }
        std::thread::sleep(POLL);
        interrupt::check()?;
        let now = control.states()?;
        let devices = |all: &[State]| half_built(all, name).map(|stack| stack.devices);
        if devices(&now) != devices(&all) {
            last = Instant::now();
        }
        all = now;
    }
    Ok(all)
}

/// Takes the lock for stack `name`, and removes a half-built stack of that name, which an obdsetup that was
/// killed has left. Returns the lock and all devices. Fails if other devices have names or UUIDs of the
/// plan's devices.
fn make_way(control: &Control, name: &str, plan: &Plan) -> Result<(Lock, Vec<State>)> {
    let lock = Lock::take(name)?;
    dm::clear_left(&lock);
    let mut all = control.states()?;
    if half_built(&all, name).is_some() && lock.is_held() {
        all = settled(control, name, all)?;
    }
    if let Some(left) = half_built(&all, name) {
        if !lock.is_held() {
            let message =
                format!("device {name} is half built; `obdsetup close {name}' removes it");
            return Err(Failure::error(exit::BUSY, message));
        }
        crate::terminal::tell(&format!(
            "device {name} was left half built by an obdsetup that was killed: removing {}",
            left.names().join(", ")
        ));
        let removal = Removal {
            deferred: false,
            despite_signals: false,
        };
        setup::remove(control, &lock, &left.names(), &[], removal, Udev::find())
            .with_context(|| format!("cannot remove what is left of device {name}"))?;
        all = control.states()?;
    }
    // From the last one, so that the error names the disk first.
    match plan
        .devices
        .iter()
        .rev()
        .filter(|device| device.shared.is_none())
        .find_map(|device| setup::in_the_way(&all, device))
    {
        Some(error) => Err(error),
        None => Ok((lock, all)),
    }
}
