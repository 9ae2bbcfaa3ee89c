// SPDX-License-Identifier: GPL-2.0

//! Writes the input of `debugfs -f`: a command in each line. If a line is longer than its buffer of 8 KiB,
//! debugfs takes the rest of the line as the next command, and it passes a command that begins with `!` to
//! the shell. So lines are limited to a much shorter length.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;

use anyhow::{Context, Result};

use crate::terminal::exit::Failure;

/// Longest line in bytes.
const LONGEST: usize = 4000;
/// Message about a word that no command for debugfs can have.
pub(super) const LINE_BREAK: &str =
    "debugfs cannot take a name with a newline or a carriage return: use --fs erofs or btrfs";
const WRITE: &str = "cannot write a temporary file";

/// A script that is being written.
pub(super) struct Script(BufWriter<File>);

impl Script {
    /// Creates the file `path`.
    pub(super) fn new(path: &Path) -> Result<Self> {
        let file = File::create(path).context(WRITE)?;
        Ok(Self(BufWriter::new(file)))
    }

    /// Writes one command, in which names must be quoted. An error if it is too long, has a newline, or
    /// begins with `!`.
    pub(super) fn line(&mut self, command: &[u8]) -> Result<()> {
        if command.len() > LONGEST {
            return Err(Failure::usage(format!(
                "a name or the directory of the output is too long for debugfs, whose commands may \
                 have {LONGEST} bytes: use --fs erofs, or another directory"
            )));
        }
        if command.iter().any(|byte| matches!(byte, b'\n' | b'\r' | 0))
            || command.first() == Some(&b'!')
        {
            return Err(Failure::usage(LINE_BREAK));
        }
        self.0.write_all(command).context(WRITE)?;
        self.0.write_all(b"\n").context(WRITE)
    }

    /// Ends the script.
    pub(super) fn finish(mut self) -> Result<()> {
        self.0.flush().context(WRITE)
    }
}

#[cfg(test)]
mod tests {
    use super::Script;

    #[test]
    fn only_lines_that_debugfs_reads_whole() -> anyhow::Result<()> {
        let dir = tempfile::tempdir()?;
        let path = dir.path().join("script");
        let mut script = Script::new(&path)?;
        let long = [b"ea_set <2> \"user.".as_slice(), &[b' '; 8190], b"!id\" 1"].concat();
        assert!(script.line(&long).is_err());
        assert!(script.line(b"!id").is_err());
        assert!(script.line(b"ls\n!id").is_err());
        script.line(b"ls")?;
        script.finish()?;
        assert_eq!(std::fs::read(&path)?, b"ls\n");
        Ok(())
    }
}
