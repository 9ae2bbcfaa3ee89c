// SPDX-License-Identifier: GPL-2.0

//! `obdsetup man`: a manual page for each subcommand.

use std::io::Write;
use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::Command;
use clap_mangen::roff::{bold, roman, Roff};
use clap_mangen::Man;

/// Arguments of `man`.
#[derive(clap::Args)]
#[command(after_help = "Examples:
  obdsetup man /usr/local/share/man/man8

Writes obdsetup-SUBCOMMAND.8 for each subcommand, from the text of --help. `make tools` does this.")]
pub(crate) struct Args {
    /// An existing directory
    #[arg(value_name = "DIR")]
    directory: PathBuf,
}

/// Runs `man`. `command` describes the command line.
pub(crate) fn run(args: &Args, command: Command) -> Result<()> {
    let mut command = command.disable_help_subcommand(true);
    command.build();
    for sub in command.get_subcommands().filter(|sub| !sub.is_hide_set()) {
        let name = format!("obdsetup-{}.8", sub.get_name());
        let path = args.directory.join(name);
        std::fs::write(&path, page(sub)?)
            .with_context(|| format!("{}: cannot write", path.display()))?;
    }
    Ok(())
}

/// Returns the manual page of a subcommand.
fn page(sub: &Command) -> Result<Vec<u8>> {
    let man = Man::new(sub.clone())
        .title(format!("obdsetup-{}", sub.get_name()))
        .section("8")
        // Without a date, man(1) would take the next argument for the date.
        .date("2026-08-01")
        .source(concat!("obdsetup ", env!("CARGO_PKG_VERSION")))
        .manual("System Administration");
    let mut text = Vec::new();
    man.render_title(&mut text)?;
    man.render_name_section(&mut text)?;
    man.render_synopsis_section(&mut text)?;
    man.render_options_section(&mut text)?;
    let help = sub.get_after_help().map(ToString::to_string);
    text.write_all(&rest(&help.unwrap_or_default())?)?;
    Ok(text)
}

/// Formats the text that --help prints after the options: examples, whose line breaks are kept, and
/// paragraphs.
fn rest(help: &str) -> Result<Vec<u8>> {
    let (examples, notes) = help.split_once("\n\n").unwrap_or((help, ""));
    let mut roff = Roff::new();
    if !notes.is_empty() {
        roff.control("SH", ["NOTES"]);
        for (nth, paragraph) in notes.split("\n\n").enumerate() {
            if nth > 0 {
                roff.control("PP", []);
            }
            roff.text([roman(paragraph.replace('\n', " "))]);
        }
    }
    roff.control("SH", ["EXAMPLES"]);
    roff.control("nf", []);
    for line in examples.lines().filter(|line| line.starts_with(' ')) {
        // What an example does may be in the line below, further to the right.
        roff.text([roman(line.strip_prefix("  ").unwrap_or(line))]);
    }
    roff.control("fi", []);
    roff.control("SH", ["SEE ALSO"]);
    roff.text([bold("obdsetup"), roman("(8)")]);
    Ok(roff.render().into_bytes())
}
