// SPDX-License-Identifier: GPL-2.0

//! A progress bar for long work. It is shown only if standard error is a terminal.

use indicatif::{ProgressBar, ProgressStyle};

use crate::terminal::interrupt;

/// A progress bar. Dropping it removes it from the terminal.
pub(crate) struct Bar(ProgressBar);

impl Bar {
    /// Makes a bar for `len` bytes of work. `what` is its label.
    pub(crate) fn new(what: &'static str, len: u64) -> Self {
        // Hides itself if standard error isn't a terminal.
        let bar = ProgressBar::new(len).with_message(what);
        let template = "{msg} {wide_bar} {bytes}/{total_bytes} {bytes_per_sec} {eta}";
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style);
        }
        Self(bar)
    }

    /// Adds `bytes` to the bytes that are done. Returns an error if a signal asked to stop.
    pub(crate) fn advance(&self, bytes: u64) -> overlaybd::Result<()> {
        self.0.inc(bytes);
        interrupt::check()
    }
}

impl Drop for Bar {
    fn drop(&mut self) {
        self.0.finish_and_clear();
    }
}
