// SPDX-License-Identifier: GPL-2.0

//! `obdsetup completions`.

use anyhow::Result;
use clap::Command;
use clap_complete::Shell;

/// Arguments of `completions`.
#[derive(clap::Args)]
#[command(after_help = "Examples:
  obdsetup completions bash >/usr/share/bash-completion/completions/obdsetup
  obdsetup completions zsh >/usr/share/zsh/site-functions/_obdsetup
  obdsetup completions fish >/usr/share/fish/vendor_completions.d/obdsetup.fish

`make install` installs these files, below its PREFIX.")]
pub(crate) struct Args {
    /// The shell
    #[arg(value_enum)]
    shell: Shell,
}

/// Runs `completions`. `all` describes the command line.
pub(crate) fn run(args: &Args, all: &Command) -> Result<()> {
    // Leave out hidden subcommands: otherwise, the shell would offer them.
    let shown = all.get_subcommands().filter(|sub| !sub.is_hide_set());
    let mut shown = Command::new("obdsetup")
        .version(env!("CARGO_PKG_VERSION"))
        .subcommands(shown.cloned());
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut shown, "obdsetup", &mut script);
    crate::terminal::print(&String::from_utf8_lossy(&script))
}
