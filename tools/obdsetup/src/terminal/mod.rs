// SPDX-License-Identifier: GPL-2.0

//! Output to the user and to the program that has started obdsetup: messages, results, exit codes, progress; and
//! signals.
//!
//! - [`exit`]: exit codes.
//! - [`interrupt`]: signals that ask to stop.
//! - [`bar`]: a progress bar.
//! - [`size`]: sizes on the command line.
//!
//! This folder uses no other one.

pub(crate) mod bar;
pub(crate) mod exit;
pub(crate) mod interrupt;
pub(crate) mod size;

use std::io::{self, Write};

use anyhow::{Context, Result};

/// Advice for a file that is no layer.
const NO_LAYER: &str = "`obdsetup convert' makes layers of disk images, tars and directories";

/// The error if standard output fails.
pub(crate) const NO_OUTPUT: &str = "standard output: cannot write";

/// Prints `text` on standard output. A closed pipe is an error, not a panic.
pub(crate) fn print(text: &str) -> Result<()> {
    let mut out = io::stdout().lock();
    // Flushed here, because an error at the end of the process would be ignored.
    let done = out.write_all(text.as_bytes()).and_then(|()| out.flush());
    done.context(NO_OUTPUT)
}

/// Prints a value as JSON.
pub(crate) fn print_json(value: &impl serde::Serialize) -> Result<()> {
    print(&format!("{}\n", serde_json::to_string_pretty(value)?))
}

/// A message that is escaped already, perhaps with line breaks that are meant. It is no `str` and cannot be formatted,
/// because [`tell`] would escape it again.
#[derive(Debug)]
pub(crate) struct Message(String);

impl Message {
    /// Returns the text, for callers of the library.
    pub(crate) fn into_text(self) -> String {
        self.0
    }
}

/// Prints a message on standard error, as one line.
pub(crate) fn tell(message: &str) {
    tell_message(&Message(plain(message)));
}

/// Prints an error with its causes on standard error, after `before`, which is empty or, for example, `warning: `.
pub(crate) fn tell_error(before: &str, error: &anyhow::Error) {
    tell_message(&message(before, error));
}

fn tell_message(Message(text): &Message) {
    let text = format!("obdsetup: {text}\n");
    // Ignored: if standard error fails, there is no other way to report it.
    let _ = io::stderr().write_all(text.as_bytes());
}

/// Escapes control characters, except tabs. Parts of a text may come from an image, or be names of files: they must
/// neither control the terminal nor look like a line of obdsetup's own.
pub(crate) fn plain(text: &str) -> String {
    let mut plain = String::with_capacity(text.len());
    for c in text.chars() {
        match c.is_control() && c != '\t' {
            true => plain.extend(c.escape_default()),
            false => plain.push(c),
        }
    }
    plain
}

/// Returns the message for an error with its causes, after the text `before`: only [`Lines`](exit::Lines) has more than
/// one line. The messages of the library's errors include their causes already.
pub(crate) fn message(before: &str, error: &anyhow::Error) -> Message {
    let mut parts = Vec::new();
    for cause in error.chain() {
        parts.push(match cause.is::<exit::Lines>() {
            true => cause.to_string(),
            false => plain(&cause.to_string()),
        });
        if let Some(error) = cause.downcast_ref::<overlaybd::Error>() {
            if error.fault() == Some(overlaybd::format::Fault::LsmtMagic) {
                parts.push(NO_LAYER.to_owned());
            }
            break;
        }
    }
    Message(plain(before) + &without_numbers(&parts.join(": ")))
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

/// Prints warnings on standard error.
pub(crate) fn warn(warnings: &[String]) {
    for warning in warnings {
        tell(&format!("warning: {warning}"));
    }
}

#[cfg(test)]
mod tests {
    use super::exit::{Failure, Lines};
    use super::{message, plain};

    #[test]
    fn names_make_no_lines() {
        assert_eq!(
            plain("a\nb\r\u{1b}\u{85}\tc\\n"),
            "a\\nb\\r\\u{1b}\\u{85}\tc\\n"
        );
        let error = Failure::usage("x\nobdsetup: forged: no disk").context("y\nz");
        let told = |before: &str, error: &anyhow::Error| message(before, error).into_text();
        assert_eq!(told("", &error), "y\\nz: x\\nobdsetup: forged: no disk");
        let lines = Lines {
            code: 1,
            status: Some(1),
            is_full: false,
            start: "mkfs failed".to_owned(),
            lines: vec!["first".to_owned(), "a\nsecond".to_owned()],
        };
        let error = anyhow::Error::from(lines).context("y\nz");
        assert_eq!(told("", &error), "y\\nz: mkfs failed: first\n  a\\nsecond");
        // The lines of a program stay lines, whatever is in front.
        assert_eq!(
            told("note: a\nb: ", &error),
            "note: a\\nb: y\\nz: mkfs failed: first\n  a\\nsecond"
        );
    }
}
