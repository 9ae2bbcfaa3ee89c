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

use super::print;
use crate::chain::ChainArgs;
use crate::dm::backing::Backing;
use crate::dm::control::State;
use crate::dm::lock::Lock;
use crate::dm::plan::{self, Lower, Place, TargetOptions};
use crate::dm::setup::{self, Below, Removal, SetUp};
use crate::dm::share::{self, Identity};
use crate::dm::udev::Udev;
use crate::dm::{self, Control, Plan};
use crate::exit::{self, Failure};
use crate::in_use::InUseArgs;
use crate::layers::{expand, plan_stack, LayerArg};
use crate::store::opening;
use crate::{interrupt, journal, partitions, size, tab};

/// How long it is waited for that nothing happens to half a stack any more.
const PATIENCE: Duration = Duration::from_secs(20);
const POLL: Duration = Duration::from_millis(250);
/// Most open files for a layer: its own, two loop devices, two devices that are held, two locks. And
/// those besides.
const FILES_EACH: u64 = 7;
const FILES: u64 = 64;

/// Arguments of `open`.
#[derive(Clone, clap::Args)]
#[command(after_help = "Examples:
  obdsetup open app base.obd app.obd && mount -o ro /dev/mapper/app /mnt
  obdsetup open vol /dev/vdb /dev/vdc:size=758556     blobs on block devices
  obdsetup open app config.v1.json               what containerd set up, if its layers are here
  obdsetup open app                              what /etc/overlaybdtab has under that name
  obdsetup open --zfile data data.zf             the content of a plain ZFile
  obdsetup open --partitions vm disk.obd && mount -o ro /dev/mapper/vm-part1 /mnt
  obdsetup open --create --writable app.changes app base.obd     what is written goes to app.changes

A file system that was not unmounted cleanly needs an option to be mounted without replaying its
journal: noload (ext4), norecovery (xfs), rescue=nologreplay (btrfs).

Files get read-only loop devices, which vanish with the device. Stacks that have a layer's file in
common use one device for it, if they ask for the same options. If any step fails, what was set up
before it is taken down. Needs dmsetup(8).

With --partitions, the partitions are read once, when the disk is opened, and go with it. A partition that
only holds others, an extended one, gets no device. Needs partx(8).

With --writable, the disk takes writes, which go to a store beside the layers and are there again when
the disk is opened with it the next time. A store belongs to the layers that it was made with. `create
--changes' makes a layer of what is in it.")]
pub(crate) struct Args {
    /// Name of the device, /dev/mapper/NAME
    name: String,

    /// Read files through the page cache, not with direct I/O
    #[arg(long)]
    buffered: bool,

    /// Make devices of its own for each layer, which no other stack uses
    #[arg(long)]
    private: bool,

    /// Take writes, and keep them in FILE, a store of changes; it may be a block device
    #[arg(long, value_name = "FILE", conflicts_with = "zfile")]
    writable: Option<PathBuf>,

    /// Bytes of a store that is made, or that one becomes larger to (a file has room for all of the disk
    /// if not given, and takes room on its file system as it is filled; a device has all of it)
    #[arg(long, value_name = "SIZE", value_parser = size::parse)]
    store_size: Option<u64>,

    /// Whether the size is that of the table, which is a minimum.
    #[arg(skip)]
    size_of_tab: bool,

    /// Make the store where it is not there, or the device is empty
    #[arg(long)]
    create: bool,

    /// Make a device of each partition of the disk, too: /dev/mapper/NAME-partN
    #[arg(long)]
    partitions: bool,

    /// Open a store that was not closed on another machine, which has it open no more
    #[arg(long)]
    take_over: bool,

    #[command(flatten)]
    pub(crate) layers: LayersArgs,
}

/// What is to be set up.
#[derive(Clone, clap::Args)]
pub(crate) struct LayersArgs {
    /// Layers, lowest first: files or block devices; DEVICE:size=BYTES where the blob is shorter; or a
    /// config.v1.json that lists them. Without, /etc/overlaybdtab has them, and options
    #[arg(value_name = "LAYER")]
    layers: Vec<LayerArg>,

    /// The one LAYER is a ZFile, and its content is the disk
    #[arg(long)]
    zfile: bool,

    /// Let file systems map the layers, which are on pmem devices: see `mount -o dax'
    #[arg(long, conflicts_with = "zfile")]
    dax: bool,

    /// An optional parameter for the lsmt target, passed on as it is
    #[arg(long, value_name = "OPTION", conflicts_with = "zfile")]
    lsmt_opt: Vec<String>,

    /// An optional parameter for the zfile targets, passed on as it is, say "cache_blocks 64"
    #[arg(long, value_name = "OPTION")]
    zfile_opt: Vec<String>,

    #[command(flatten)]
    chain: ChainArgs,

    #[command(flatten)]
    in_use: InUseArgs,
}

/// The layers, opened.
pub(crate) enum Opened {
    Stack(Stack),
    Zfile(Payload),
}

/// What is set up, and how.
pub(crate) struct Planned {
    /// The layers by their names.
    pub(crate) layers: Vec<LayerArg>,
    pub(crate) opened: Opened,
    pub(crate) plan: Plan,
}

impl Opened {
    /// What to know before the file system on the disk is mounted.
    fn journal_note(&self, node: &str) -> Option<String> {
        match self {
            Self::Stack(stack) => journal::note(stack, node),
            Self::Zfile(payload) => journal::note(payload, node),
        }
    }

    /// The blobs, lowest first.
    pub(crate) fn payloads(&self) -> Vec<&Payload> {
        match self {
            Self::Stack(stack) => plan::payloads(stack.layers()),
            Self::Zfile(payload) => vec![payload],
        }
    }
}

/// The arguments alone, as a line of the table gives them.
#[derive(Parser)]
#[command(disable_help_flag = true)]
struct TabLine {
    #[command(flatten)]
    args: Args,
}

/// The arguments that a line of the table has.
pub(crate) fn parse(entry: &tab::Entry) -> Result<Args> {
    let line = TabLine::try_parse_from(entry.arguments()).map_err(|error| {
        if let (ErrorKind::UnknownArgument, Some(option)) =
            (error.kind(), error.get(ContextKind::InvalidArg))
        {
            let option = option.to_string();
            let option = option.trim_start_matches("--");
            return Failure::usage(format!("unknown option `{option}': see overlaybdtab(5)"));
        }
        // The first line says it; what follows is on the usage of a command line.
        let text = error.to_string();
        let text = text.lines().next().unwrap_or_default();
        Failure::usage(text.trim_start_matches("error: "))
    })?;
    // Each boot would do it again, with a file system that isn't mounted, or another disk.
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
    /// Checks that the options fit each other, wherever each is from.
    fn check(&self) -> Result<()> {
        let is_for_store = self.create || self.take_over || self.store_size.is_some();
        let message = match &self.writable {
            None if is_for_store => "--create, --store-size and --take-over are for --writable",
            Some(_) if self.layers.zfile => "--writable is for layers, not for --zfile",
            // Linear devices may begin within a page, and overlap: one page, two files.
            _ if self.partitions && self.layers.dax => {
                "--partitions is not for --dax, with which one file system has the whole disk"
            }
            _ => return Ok(()),
        };
        Err(Failure::usage(message))
    }

    /// These arguments, or, where no layer is among them, with what the table has for this name.
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
    /// Looks at the store that keeps what is written.
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
    /// [`Args::or_tab`] for a command that has no other arguments.
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

    /// Opens and checks the layers, and plans the devices. With `shared`, those of layers are for other
    /// stacks, too, that read files through the page cache, or don't, as this says.
    fn plan(&self, name: &str, shared: Option<bool>) -> Result<Planned> {
        plan::check_name(name)?;
        let layers = match self.zfile {
            true => self.layers.clone(),
            false => expand(&self.layers)?,
        };
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
            // A pmem device has one user.
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
        let payload = Payload::open(layer.open()?)?;
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

/// Checks that file systems can map the layers of `stack`, which are on `places`.
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

    // What a kill has left may have had it open.
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
    let partitions = match args.partitions {
        true => plan_partitions(&control, &args.name, &plan)?,
        false => Plan::default(),
    };
    // Dropped before the disk is.
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
    // One that takes writes replays it.
    if let Some(note) = opened.journal_note(&node).filter(|_| store.is_none()) {
        crate::tell(&note);
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

/// Plans the devices of the partitions of the disk `name`, the last device of `plan`, which is there.
fn plan_partitions(control: &Control, name: &str, plan: &Plan) -> Result<Plan> {
    let sectors = plan.devices.last().map_or(0, plan::Device::sectors);
    let found = partitions::read(name, &dm::node(name), sectors)?;
    let partitions = Plan::for_partitions(name, plan, &found);
    let all = control.states()?;
    let mut devices = partitions.devices.iter();
    match devices.find_map(|device| setup::in_the_way(&all, device)) {
        Some(error) => Err(error),
        None => Ok(partitions),
    }
}

/// Makes the devices of `partitions`, which are over `disk`, and removes the mark of the disk `name`, which
/// was there because they were not.
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

/// The disk that partitions are over, by its number.
struct Disk(Option<String>);

impl Below for Disk {
    fn provide(&mut self, _: Lower) -> Result<()> {
        Ok(())
    }

    fn number(&self, lower: Lower) -> Option<String> {
        self.0.clone().filter(|_| lower == Lower::Disk)
    }
}

/// The files and devices of the layers and of the store, as far as tables name them.
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
                // Its name may lead to another by now.
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

/// Makes sure that there may be enough open files for a stack of so many layers.
fn allow_files(layers: usize) {
    let needed = u64::try_from(layers).map_or(u64::MAX, |n| n.saturating_mul(FILES_EACH) + FILES);
    let now = getrlimit(Resource::Nofile);
    if now.current.is_some_and(|current| current < needed) {
        let current = Some(now.maximum.map_or(needed, |maximum| maximum.min(needed)));
        // Without, opening one of them says what is wrong.
        let _ = setrlimit(Resource::Nofile, Rlimit { current, ..now });
    }
}

/// Returns what there is of stack `name`, where it is not all of it.
fn half_built(all: &[State], name: &str) -> Option<dm::Stack> {
    dm::Stack::among(all, name).filter(|stack| stack.name == name && stack.is_half_built())
}

/// Returns all devices when nothing has happened to those of stack `name` for a while: an obdsetup
/// that sees another `/run`, as one in a container, may just set it up. `all` are the devices now.
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

/// Takes the lock for stack `name`, and removes what an obdsetup that was killed has left of it.
/// Returns all devices, too. Fails where there are other devices with the names of `plan`.
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
        crate::tell(&format!(
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
    // The one that was asked for is the one to be named.
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
