// SPDX-License-Identifier: GPL-2.0

//! The subcommands. Each one has a file, which parses its arguments and calls the other folders.

mod apply;
mod benchmark;
mod close;
mod commit;
mod completions;
mod convert;
mod create;
mod dump;
mod export;
mod info;
mod list;
mod man;
mod merge;
pub(crate) mod open;
mod status;
mod table;
mod verify;

use anyhow::Result;
use clap::{CommandFactory, Parser, Subcommand};

use crate::terminal::exit;

/// Set up, make, convert and check OverlayBD images.
#[derive(Parser)]
#[command(name = "obdsetup", version, after_help = exit::HELP, max_term_width = 100)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// Returns the description of the command line, for manual pages and completions.
fn command() -> clap::Command {
    Cli::command()
}

/// The subcommand to run.
#[derive(Subcommand)]
pub(crate) enum Command {
    /// Make a layer from a disk image, a directory, or the difference to other layers
    Create(create::Args),
    /// Make a layer from qcow2, vmdk, raw, a directory or a tar; make a stack from a container image
    Convert(convert::Args),
    /// Make a layer from a tar with whiteouts, a layer of a container image, over other layers
    Apply(apply::Args),
    /// Compress and wrap a layer, or unwrap it
    Commit(commit::Args),
    /// Join several layers into one
    Merge(merge::Args),
    /// Show what a file is: wrapping, every field, sizes
    Info(info::Args),
    /// Set up a stack of layers as a block device
    Open(open::Args),
    /// Remove the devices of a stack that `open` has set up
    Close(close::Args),
    /// Show the health of a stack that `open` has set up
    Status(status::Args),
    /// List the stacks that `open` has set up
    List(list::Args),
    /// Print the device-mapper tables that `open` would load
    Table(table::Args),
    /// Check every index and every block of layers
    Verify(verify::Args),
    /// Write the content of a stack's disk, or a part of it, to standard output or a file
    Dump(dump::Args),
    /// Make a disk image from a stack of layers
    Export(export::Args),
    /// Show how fast this machine decompresses
    Benchmark(benchmark::Args),
    /// Print the completion script for a shell
    Completions(completions::Args),
    /// Write the manual pages of the subcommands
    #[command(hide = true)]
    Man(man::Args),
}

impl Command {
    /// Runs the subcommand.
    pub(crate) fn run(self) -> Result<()> {
        match self {
            Self::Create(args) => create::run(&args),
            Self::Convert(args) => convert::run(&args),
            Self::Apply(args) => apply::run(&args),
            Self::Commit(args) => commit::run(&args),
            Self::Merge(args) => merge::run(&args),
            Self::Info(args) => info::run(&args),
            Self::Open(args) => open::run(&args),
            Self::Close(args) => close::run(&args),
            Self::Status(args) => status::run(&args),
            Self::List(args) => list::run(&args),
            Self::Table(args) => table::run(&args),
            Self::Verify(args) => verify::run(&args),
            Self::Dump(args) => dump::run(&args),
            Self::Export(args) => export::run(&args),
            Self::Benchmark(args) => benchmark::run(&args),
            Self::Completions(args) => completions::run(&args, &command()),
            Self::Man(args) => man::run(&args, command()),
        }
    }
}
