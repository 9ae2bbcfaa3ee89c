// SPDX-License-Identifier: GPL-2.0

//! `obdsetup`: sets up OverlayBD images as block devices; makes, checks and dumps them. It is a library only for
//! the fuzz targets.
//!
//! - [`cmd`]: a file for each subcommand, with its arguments and its work.
//! - [`dm`]: device-mapper and loop devices.
//! - The other files have code that several subcommands need.

#![forbid(unsafe_code)]

mod archive;
mod bar;
mod chain;
mod cmd;
mod config;
mod dm;
mod exit;
mod generator;
mod image_layer;
mod in_use;
mod interrupt;
mod journal;
mod json;
mod kind;
mod layer_args;
mod layer_name;
mod layer_out;
mod layers;
mod made;
mod mkfs;
mod oci;
mod output;
mod overview;
mod partitions;
mod program;
mod qemu;
mod raw_out;
mod size;
mod store;
mod tab;

use std::ffi::OsString;
use std::io::{self, Write};
use std::path::Path;
use std::process::ExitCode;

use clap::{CommandFactory, Parser};

/// The advice if a file is no layer.
const NO_LAYER: &str = "`obdsetup convert' makes layers of disk images, tars and directories";

/// Set up, make, convert and check OverlayBD images.
#[derive(Parser)]
#[command(name = "obdsetup", version, after_help = exit::HELP, max_term_width = 100)]
struct Cli {
    #[command(subcommand)]
    command: cmd::Command,
}

/// Returns the description of the command line, for manual pages and completions.
fn command() -> clap::Command {
    Cli::command()
}

/// Runs the command `obdsetup` with the arguments of the process. Returns its exit code; errors are printed.
pub fn main() -> ExitCode {
    let args: Vec<OsString> = std::env::args_os().collect();
    if let [program, args @ ..] = args.as_slice() {
        if program == program::guard::NAME {
            tell(&program::guard::run(args));
            return ExitCode::from(exit::USAGE);
        }
        if Path::new(program).ends_with(generator::NAME) {
            let code = match generator::run(args) {
                true => exit::SUCCESS,
                false => exit::USAGE,
            };
            return ExitCode::from(code);
        }
    }
    let cli = match Cli::try_parse_from(args) {
        Ok(cli) => cli,
        Err(error) => {
            let code = if error.use_stderr() {
                exit::USAGE
            } else {
                exit::SUCCESS
            };
            return ExitCode::from(match error.print() {
                Err(error) if code == exit::SUCCESS => exit::io(error.kind()),
                // Ignored: if standard error fails, there is no other way to report it.
                _ => code,
            });
        }
    };
    match interrupt::watch().and_then(|()| cli.command.run()) {
        Ok(()) => ExitCode::from(exit::SUCCESS),
        Err(error) => {
            let code = exit::code(&error);
            // Not reported if standard output was closed by a reader that needs no more, for example head(1).
            if code != exit::PIPE {
                tell(&message(&error));
            }
            ExitCode::from(code)
        }
    }
}

/// Runs the command line `args`, of which the first is the name of the command. Does not catch signals.
///
/// # Errors
///
/// Returns the exit code and the message if the arguments are wrong or the command fails.
pub fn run(args: impl IntoIterator<Item = OsString>) -> Result<(), (u8, String)> {
    let cli = Cli::try_parse_from(args).map_err(|error| (exit::USAGE, error.to_string()))?;
    let done = cli.command.run();
    done.map_err(|error| (exit::code(&error), plain(&message(&error))))
}

/// Prints a message on standard error.
fn tell(message: &str) {
    let text = format!("obdsetup: {}\n", plain(message));
    // Ignored: if standard error fails, there is no other way to report it.
    let _ = io::stderr().write_all(text.as_bytes());
}

/// Escapes control characters in a text for people. Parts of it may come from an image, and must not control
/// the terminal.
fn plain(text: &str) -> String {
    let mut plain = String::with_capacity(text.len());
    for c in text.chars() {
        match c.is_control() && !matches!(c, '\n' | '\t') {
            true => plain.extend(c.escape_default()),
            false => plain.push(c),
        }
    }
    plain
}

/// Returns the message for an error with its causes. The messages of the library's errors include their
/// causes already.
fn message(error: &anyhow::Error) -> String {
    let mut parts = Vec::new();
    for cause in error.chain() {
        parts.push(cause.to_string());
        if let Some(error) = cause.downcast_ref::<overlaybd::Error>() {
            if error.fault() == Some(overlaybd::format::Fault::LsmtMagic) {
                parts.push(NO_LAYER.to_owned());
            }
            break;
        }
    }
    without_numbers(&parts.join(": "))
}

/// Removes the error numbers that std appends to messages of the system.
fn without_numbers(text: &str) -> String {
    let mut parts = text.split(" (os error ");
    let mut out = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        let after = part.trim_start_matches(|c: char| c.is_ascii_digit());
        out.push_str(after.strip_prefix(')').unwrap_or(after));
    }
    out
}

#[cfg(test)]
#[path = "../tests/common/tars.rs"]
mod tars;
