// SPDX-License-Identifier: GPL-2.0

//! `obdsetup`: sets up OverlayBD images as block devices; makes, checks and dumps images. This is a library only
//! because the fuzz targets use it.
//!
//! A module uses only modules of its own folder and of the folders below in this list:
//!
//! - [`boot`]: started by systemd under another name, makes units for the stacks in overlaybdtab.
//! - [`cmd`]: a file for each subcommand, with its arguments and its work.
//! - [`devices`]: stacks of device-mapper devices, stores of changes, and overlaybdtab.
//! - [`oci`]: converts container images.
//! - [`make`]: makes layers, file systems, disk images, and the files and directories for them.
//! - [`input`]: reads layers, archives and disk images, and detects the type of a file.
//! - [`files`]: finds out who else uses a file, makes temporary files, reads JSON.
//! - [`program`]: starts other programs.
//! - [`terminal`]: messages, exit codes, signals, the progress bar.

#![forbid(unsafe_code)]

mod boot;
mod cmd;
mod devices;
mod files;
mod input;
mod make;
mod oci;
mod program;
mod terminal;

use std::ffi::OsString;
use std::path::Path;
use std::process::ExitCode;

use clap::Parser;

use crate::boot::generator;
use crate::cmd::Cli;
use crate::terminal::{exit, interrupt, message, plain, tell, tell_error};

/// Runs the command `obdsetup` with the arguments of the process. Returns its exit code; errors are printed.
pub fn main() -> ExitCode {
    let args: Vec<OsString> = std::env::args_os().collect();
    if let [program, args @ ..] = args.as_slice() {
        if program == program::guard::NAME {
            tell(&program::guard::run(args));
            return ExitCode::from(program::guard::NOT_RUN);
        }
        if Path::new(program).ends_with(generator::NAME) {
            let code = match generator::run(args) {
                true => exit::SUCCESS,
                false => exit::USAGE,
            };
            return ExitCode::from(code);
        }
    }
    let cli = match Cli::try_parse_from(&args) {
        Ok(cli) => cli,
        Err(error) => {
            // The message has arguments as they are, which may be names with line breaks.
            let plain = args.iter().map(|arg| plain(&arg.to_string_lossy()));
            let error = Cli::try_parse_from(plain).err().unwrap_or(error);
            let code = if error.use_stderr() {
                exit::USAGE
            } else {
                exit::SUCCESS
            };
            return match error.print() {
                Err(error) if code == exit::SUCCESS => {
                    report(&anyhow::Error::from(error).context(terminal::NO_OUTPUT))
                }
                // Ignored: if standard error fails, there is no other way to report it.
                _ => ExitCode::from(code),
            };
        }
    };
    match interrupt::watch().and_then(|()| cli.command.run()) {
        Ok(()) => ExitCode::from(exit::SUCCESS),
        Err(error) => report(&error),
    }
}

/// Prints an error. Returns its exit code.
fn report(error: &anyhow::Error) -> ExitCode {
    let code = exit::code(error);
    // Not reported if standard output was closed by a reader that needs no more, for example head(1).
    if code != exit::PIPE {
        tell_error("", error);
    }
    ExitCode::from(code)
}

/// Runs the command line `args`, of which the first is the name of the command. Does not catch signals.
///
/// # Errors
///
/// Returns the exit code and the message if the arguments are wrong or the command fails.
pub fn run(args: impl IntoIterator<Item = OsString>) -> Result<(), (u8, String)> {
    let cli = Cli::try_parse_from(args).map_err(|error| (exit::USAGE, error.to_string()))?;
    let done = cli.command.run();
    done.map_err(|error| (exit::code(&error), message("", &error).into_text()))
}

#[cfg(test)]
#[path = "../tests/common/tars.rs"]
mod tars;
