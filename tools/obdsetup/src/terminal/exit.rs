// SPDX-License-Identifier: GPL-2.0

//! Exit codes.

use std::io::ErrorKind;

use crate::terminal::plain;

/// Success.
pub(crate) const SUCCESS: u8 = 0;
/// Wrong parameters, or a failure of another kind.
pub(crate) const USAGE: u8 = 1;
/// No permission.
pub(crate) const PERMISSION: u8 = 2;
/// The image is malformed or corrupt.
pub(crate) const BAD_IMAGE: u8 = 3;
/// A file or device doesn't exist, or reading or writing it failed.
pub(crate) const DEVICE: u8 = 4;
/// A device or file exists already or is in use.
pub(crate) const BUSY: u8 = 5;
/// Standard output was closed. As in a shell: 128 plus the number of SIGPIPE.
pub(crate) const PIPE: u8 = 141;
/// Stopped by a signal. As in a shell: 128 plus the number of SIGINT.
pub(crate) const INTERRUPTED: u8 = 130;

/// The text on exit codes in `--help`.
pub(crate) const HELP: &str = "Exit codes:
  0    success
  1    wrong parameters, or a failure of another kind
  2    no permission
  3    the image is malformed or corrupt
  4    a file or device does not exist, or reading or writing it failed
  5    a file or device exists already, or is in use
  130  stopped by SIGINT, SIGTERM or SIGHUP; nothing half-made is left
  141  standard output was closed before all was written";

/// An error with an explicit exit code.
#[derive(Debug)]
pub(crate) struct Failure {
    /// The exit code.
    pub(crate) code: u8,
    /// The message.
    pub(crate) message: String,
}

impl Failure {
    /// Returns an error with exit code `code`.
    pub(crate) fn error(code: u8, message: impl Into<String>) -> anyhow::Error {
        Self {
            code,
            message: message.into(),
        }
        .into()
    }

    /// Returns the error for a wrong parameter.
    pub(crate) fn usage(message: impl Into<String>) -> anyhow::Error {
        Self::error(USAGE, message)
    }
}

impl std::fmt::Display for Failure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Failure {}

/// An error whose message has several lines. Only here, line breaks in a message are meant: all other ones come from
/// names, and are escaped.
#[derive(Debug)]
pub(crate) struct Lines {
    /// The exit code.
    pub(crate) code: u8,
    /// The exit status of the program that has failed; `None` if a signal ended it, or no program is the cause.
    pub(crate) status: Option<i32>,
    /// Whether a program that obdsetup ran has failed because it could not write its output: a file system is full,
    /// the user's disk quota is used up, or a file became larger than the file system or `ulimit -f` allows.
    pub(crate) is_full: bool,
    /// The start of the first line, in front of what a program has said; may be empty.
    pub(crate) start: String,
    /// The lines, perhaps with names in them.
    pub(crate) lines: Vec<String>,
}

impl std::fmt::Display for Lines {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let lines: Vec<String> = self.lines.iter().map(|line| plain(line)).collect();
        if self.start.is_empty() {
            return f.write_str(&lines.join("\n"));
        }
        f.write_str(&plain(&self.start))?;
        match lines.is_empty() {
            true => Ok(()),
            // The program may have printed a name with a line break. So its lines never look like obdsetup's own.
            false => write!(f, ": {}", lines.join("\n  ")),
        }
    }
}

impl std::error::Error for Lines {}

/// Returns whether the cause of `error` is that a file system is full (`ENOSPC`), that the user's disk quota is used
/// up (`EDQUOT`), that a file cannot be so large (`EFBIG`), or [`Lines::is_full`].
pub(crate) fn is_full(error: &anyhow::Error) -> bool {
    let full = |kind| {
        matches!(
            kind,
            ErrorKind::StorageFull | ErrorKind::QuotaExceeded | ErrorKind::FileTooLarge
        )
    };
    error.chain().any(|cause| {
        let io = cause.downcast_ref::<std::io::Error>();
        let library = cause.downcast_ref::<overlaybd::Error>();
        let lines = cause.downcast_ref::<Lines>();
        lines.is_some_and(|lines| lines.is_full)
            || io.is_some_and(|error| full(error.kind()))
            || library
                .and_then(overlaybd::Error::io_kind)
                .is_some_and(full)
    })
}

/// Returns the exit code for `error`: that of the first cause that has one.
pub(crate) fn code(error: &anyhow::Error) -> u8 {
    error.chain().find_map(known).unwrap_or(USAGE)
}

fn known(cause: &(dyn std::error::Error + 'static)) -> Option<u8> {
    if let Some(failure) = cause.downcast_ref::<Failure>() {
        return Some(failure.code);
    }
    if let Some(lines) = cause.downcast_ref::<Lines>() {
        return Some(lines.code);
    }
    if let Some(error) = cause.downcast_ref::<overlaybd::Error>() {
        return match error.cause() {
            overlaybd::Error::Interrupted => Some(INTERRUPTED),
            error if error.is_bad_image() => Some(BAD_IMAGE),
            error => Some(error.io_kind().map_or(USAGE, io)),
        };
    }
    cause
        .downcast_ref::<std::io::Error>()
        .map(|error| io(error.kind()))
}

/// Returns the exit code for an error of the system.
pub(crate) fn io(kind: ErrorKind) -> u8 {
    match kind {
        ErrorKind::PermissionDenied => PERMISSION,
        ErrorKind::AlreadyExists | ErrorKind::ResourceBusy => BUSY,
        ErrorKind::BrokenPipe => PIPE,
        _ => DEVICE,
    }
}
