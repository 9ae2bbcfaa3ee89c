// SPDX-License-Identifier: GPL-2.0

//! `obdsetup`: sets up OverlayBD images as block devices; makes, checks and dumps them.
//!
//! - [`cmd`]: a file for each subcommand, its arguments and what it does.
//! - [`dm`]: device-mapper and loop devices.
//! - The other files: what several subcommands need.

#![forbid(unsafe_code)]

mod bar;
mod cmd;
mod config;
mod dm;
mod exit;
mod image_layer;
mod interrupt;
mod kind;
mod layer_out;
mod layers;
mod mkfs;
mod oci;
mod output;
mod raw_out;
mod size;
mod tool;
mod usage;
mod wrap_args;

use std::io::{self, Write};
use std::process::ExitCode;

use clap::{CommandFactory, Parser};

/// Set up, make, convert and check OverlayBD images.
#[derive(Parser)]
#[command(name = "obdsetup", version, after_help = exit::HELP, max_term_width = 100)]
struct Cli {
    #[command(subcommand)]
    command: cmd::Command,
}

/// The command as it is on the command line, for what is made of that.
fn command() -> clap::Command {
    Cli::command()
}

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            let code = if error.use_stderr() {
                exit::USAGE
            } else {
                exit::SUCCESS
            };
            // Nobody is left to tell where the terminal is gone.
            let _ = error.print();
            return ExitCode::from(code);
        }
    };
    match interrupt::watch().and_then(|()| cli.command.run()) {
        Ok(()) => ExitCode::from(exit::SUCCESS),
        Err(error) => {
            let code = exit::code(&error);
            // A reader that has seen enough, say head(1), closed standard output: no need to tell.
            if code != exit::PIPE {
                let _ = writeln!(io::stderr(), "obdsetup: {}", message(&error));
            }
            ExitCode::from(code)
        }
    }
}

/// An error and its causes. The library's errors tell theirs themselves.
fn message(error: &anyhow::Error) -> String {
    let mut parts = Vec::new();
    for cause in error.chain() {
        parts.push(cause.to_string());
        if cause.is::<overlaybd::Error>() {
            break;
        }
    }
    parts.join(": ")
}
