// SPDX-License-Identifier: GPL-2.0

//! `obdsetup open`.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::os::unix::fs::FileTypeExt;
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
use crate::layers::{expand, open_stack, LayerArg};
use crate::{interrupt, journal, tab};

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

A file system that was not unmounted cleanly needs an option to be mounted without replaying its
journal: noload (ext4), norecovery (xfs), rescue=nologreplay (btrfs).

Files get read-only loop devices, which vanish with the device. Stacks that have a layer's file in
common use one device for it, if they ask for the same options. If any step fails, what was set up
before it is taken down. Needs dmsetup(8).")]
pub(crate) struct Args {
    /// Name of the device, /dev/mapper/NAME
    name: String,

    /// Read files through the page cache, not with direct I/O
    #[arg(long)]
    buffered: bool,

    /// Make devices of its own for each layer, which no other stack uses
    #[arg(long)]
    private: bool,

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
    Ok(line.args)
}

impl Args {
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
        args.layers.zfile |= mine.zfile;
        args.layers.dax |= mine.dax;
        args.layers.chain |= &mine.chain;
        args.layers.in_use |= &mine.in_use;
        args.layers.lsmt_opt.extend(mine.lsmt_opt.iter().cloned());
        args.layers.zfile_opt.extend(mine.zfile_opt.iter().cloned());
        Ok(Cow::Owned(args))
    }
}

impl LayersArgs {
    /// [`Args::or_tab`] for a command that has no other arguments.
    pub(crate) fn plan_or_tab(&self, name: &str) -> Result<Planned> {
        let args = Args {
            name: name.to_owned(),
            buffered: false,
            private: true,
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
            let stack = open_stack(&layers, &self.chain)?;
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
    let Planned {
        layers: named,
        opened,
        plan,
    } = args
        .layers
        .plan(&args.name, (!args.private).then_some(args.buffered))?;
    let paths = named.iter().map(|layer| layer.path.as_path());
    args.layers.in_use.check_below(paths)?;
    let control = Control::open()?;
    let (lock, states) = make_way(&control, &args.name, &plan)?;
    allow_files(named.len());

    let mut below = Backings {
        payloads: opened.payloads(),
        buffered: args.buffered,
        lock: &lock,
        backings: BTreeMap::new(),
    };
    let set_up = SetUp::new(&control, &lock, &plan, states, &mut below)?;
    interrupt::check()?;
    let node = dm::node(&args.name).display().to_string();
    print(&format!("{node}\n"))?;
    if let Some(note) = opened.journal_note(&node) {
        crate::tell(&note);
    }
    let adopted = set_up.adopted();
    set_up.keep();
    share::set_caches(&control, &adopted);
    Ok(())
}

/// The files and devices of the layers, as far as tables name them.
struct Backings<'a> {
    payloads: Vec<&'a Payload>,
    buffered: bool,
    lock: &'a Lock,
    /// By layer, and whether it is the last bytes of it.
    backings: BTreeMap<(usize, bool), Backing>,
}

impl Backings<'_> {
    fn place(lower: Lower) -> Option<(usize, bool)> {
        match lower {
            Lower::Layer(nth) => Some((nth, false)),
            Lower::Tail(nth) => Some((nth, true)),
            Lower::Device(_) => None,
        }
    }
}

impl Below for Backings<'_> {
    fn provide(&mut self, lower: Lower) -> Result<()> {
        interrupt::check()?;
        let place = Self::place(lower).filter(|place| !self.backings.contains_key(place));
        let Some((nth, is_tail)) = place else {
            return Ok(());
        };
        let payload = self.payloads.get(nth).context("a layer without a file")?;
        // Its name may lead to another by now.
        let file = payload.file().file();
        let meta = file.metadata()?;
        let backing = if is_tail {
            Backing::bytes(&plan::tail(payload)?, self.lock)?
        } else if meta.file_type().is_block_device() {
            Backing::device(&meta)
        } else {
            Backing::file(file, !self.buffered, self.lock)?
        };
        self.backings.insert((nth, is_tail), backing);
        Ok(())
    }

    fn number(&self, lower: Lower) -> Option<String> {
        let backing = self.backings.get(&Self::place(lower)?);
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
