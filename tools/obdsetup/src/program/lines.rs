// SPDX-License-Identifier: GPL-2.0

//! The lines that a program prints on standard error. Repeated lines are kept once. The number of
//! lines and their length are limited.

use std::io::{self, Read};

/// Largest number of different lines that are kept.
const MOST: usize = 64;
/// Largest number of bytes of a line that are kept.
const LONGEST: usize = 4096;

/// Lines, in the order of their first occurrence.
#[derive(Debug, Default)]
pub(super) struct Lines {
    /// A line and its number of occurrences.
    lines: Vec<(String, u64)>,
    /// Number of lines dropped, repeated ones too, because there were [`MOST`] others already.
    dropped: u64,
    /// A line that isn't complete yet.
    open: Vec<u8>,
}

impl Lines {
    /// Reads each of `input` to its end.
    pub(super) fn read<R: Read>(&mut self, input: impl Iterator<Item = R>) -> io::Result<()> {
        let mut piece = [0; 4096];
        for mut input in input {
            loop {
                match input.read(&mut piece) {
                    Ok(0) => break,
                    Ok(got) => self.add(piece.get(..got).unwrap_or_default()),
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                    Err(error) => return Err(error),
                }
            }
        }
        self.end_line();
        Ok(())
    }

    /// Returns the lines. The last one is the number of dropped lines, if any.
    pub(super) fn into_vec(self) -> Vec<String> {
        let shown = self.lines.into_iter().map(|(line, times)| match times {
            1 => line,
            times => format!("{line} ({times} times)"),
        });
        let rest = (self.dropped > 0).then(|| format!("... and {} more lines", self.dropped));
        shown.chain(rest).collect()
    }

    fn add(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            match byte {
                b'\n' | b'\r' => self.end_line(),
                byte if self.open.len() < LONGEST => self.open.push(byte),
                _ => {}
            }
        }
    }

    fn end_line(&mut self) {
        let open = std::mem::take(&mut self.open);
        let line = String::from_utf8_lossy(&open);
        let line = line.trim();
        if line.is_empty() {
            return;
        }
        if let Some((_, times)) = self.lines.iter_mut().find(|(known, _)| known == line) {
            *times += 1;
        } else if self.lines.len() < MOST {
            self.lines.push((line.to_owned(), 1));
        } else {
            self.dropped += 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{Lines, MOST};

    fn lines(text: &[u8]) -> Vec<String> {
        let mut lines = Lines::default();
        assert!(lines.read([text].into_iter()).is_ok());
        lines.into_vec()
    }

    #[test]
    fn each_line_once() {
        assert_eq!(
            lines(b"b\n a \n\nb\r\nb\nlast"),
            ["b (3 times)", "a", "last"]
        );
        assert!(lines(b"").is_empty());
    }

    #[test]
    fn not_too_many() {
        let many: Vec<String> = (0..MOST + 5).map(|nth| format!("line {nth}")).collect();
        let shown = lines(many.join("\n").as_bytes());
        assert_eq!(shown.len(), MOST + 1);
        assert_eq!(
            shown.last().map(String::as_str),
            Some("... and 5 more lines")
        );
        assert_eq!(lines(&[b'x'; 100_000]).concat().len(), super::LONGEST);
    }
}
