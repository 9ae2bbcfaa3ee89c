// SPDX-License-Identifier: GPL-2.0

//! Detects whether a program makes progress. A program without progress is ended, since nobody
//! would wait for it in a script or at boot.
//!
//! Signs of progress are bytes that the program read or wrote (`/proc/PID/io`), and the size of a file
//! that it writes. CPU time is no sign, since an endless loop uses CPU time, too. A program with a
//! thread that waits for a disk (state D), or with a stopped thread (state T), is not ended.
//!
//! The limit is generous: even an emulated compressor reads or writes within seconds.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::process::Pid;

use crate::terminal::exit::{self, Failure};

/// How long a program may make no progress by default.
const BOUND: Duration = Duration::from_secs(600);
/// How often progress is checked.
const LOOK: Duration = Duration::from_secs(1);

/// How long to wait for a program without progress, and what counts as progress.
pub(crate) struct Patience {
    bound: Duration,
    outputs: Vec<PathBuf>,
    other: Option<Other>,
}

/// Progress of something else that the program waits for.
struct Other {
    look: Box<dyn Fn() -> String>,
    /// The error if nothing changes.
    message: String,
}

impl Default for Patience {
    fn default() -> Self {
        Self {
            bound: BOUND,
            outputs: Vec::new(),
            other: None,
        }
    }
}

impl Patience {
    /// Returns the patience for a program that waits for something else, whose progress changes the
    /// value that `look` returns. If the value stays the same for `bound`, the program is ended with
    /// the error `message`.
    pub(crate) fn with(
        bound: Duration,
        look: impl Fn() -> String + 'static,
        message: String,
    ) -> Self {
        let look = Box::new(look);
        Self {
            bound,
            outputs: Vec::new(),
            other: Some(Other { look, message }),
        }
    }

    /// Sets how long a program may make no progress.
    #[cfg(test)]
    pub(super) fn set_bound(&mut self, bound: Duration) {
        self.bound = bound;
    }

    pub(super) fn add_output(&mut self, path: &Path) {
        self.outputs.push(path.to_owned());
    }

    /// Returns the error for a program that was ended.
    pub(super) fn failure(&self, name: &str, said: &[String]) -> anyhow::Error {
        if let Some(other) = &self.other {
            return Failure::error(exit::DEVICE, other.message.clone());
        }
        let mut message = format!(
            "{name} was ended: it has not read or written a byte for {} s",
            self.bound.as_secs()
        );
        if !said.is_empty() {
            message = format!("{message}; it said: {}", said.join("; "));
        }
        Failure::error(exit::USAGE, message)
    }

    /// Starts to watch the program `pid`.
    pub(super) fn watch(&self, pid: Pid) -> Watch<'_> {
        Watch {
            patience: self,
            pid,
            look: LOOK.min(self.bound / 8),
            last_look: Instant::now(),
            stalled: Duration::ZERO,
            signs: None,
        }
    }
}

/// The last signs of progress of a program.
pub(super) struct Watch<'a> {
    patience: &'a Patience,
    pid: Pid,
    look: Duration,
    last_look: Instant,
    /// How long nothing has changed.
    stalled: Duration,
    signs: Option<Vec<String>>,
}

impl Watch<'_> {
    /// Returns whether the program has made no progress for too long.
    pub(super) fn has_stalled(&mut self, now: Instant) -> bool {
        if now.duration_since(self.last_look) < self.look {
            return false;
        }
        self.last_look = now;
        let signs = self.signs();
        if signs.is_none() || signs != self.signs {
            self.stalled = Duration::ZERO;
            self.signs = signs;
            return false;
        }
        // Add up checks instead of taking the time: this process may have been stopped in between.
        self.stalled += self.look;
        self.stalled >= self.patience.bound
    }

    /// Returns values that change with progress; `None` if they are unavailable, or the program
    /// waits for a reason beyond its control.
    fn signs(&self) -> Option<Vec<String>> {
        if let Some(other) = &self.patience.other {
            return Some(vec![(other.look)()]);
        }
        let process = PathBuf::from(format!("/proc/{}", self.pid.as_raw_nonzero()));
        let threads = fs::read_dir(process.join("task")).ok()?;
        for thread in threads.flatten() {
            if matches!(state(&thread.path()), Some('D' | 'T' | 't')) {
                return None;
            }
        }
        let mut signs = vec![fs::read_to_string(process.join("io")).ok()?];
        for path in &self.patience.outputs {
            let meta = fs::metadata(path).ok();
            signs.push(format!(
                "{:?}",
                meta.map(|meta| (meta.size(), meta.blocks()))
            ));
        }
        Some(signs)
    }
}

/// Returns the state of a thread, a letter.
fn state(thread: &Path) -> Option<char> {
    let stat = fs::read_to_string(thread.join("stat")).ok()?;
    // The name is in parentheses, and can have any characters.
    let (_, rest) = stat.rsplit_once(')')?;
    rest.trim_start().chars().next()
}
