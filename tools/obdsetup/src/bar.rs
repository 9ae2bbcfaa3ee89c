// SPDX-License-Identifier: GPL-2.0

//! The progress bar of long work. There is none where standard error isn't a terminal.

use indicatif::{ProgressBar, ProgressStyle};

use crate::interrupt;

/// A bar, gone when dropped.
pub(crate) struct Bar(ProgressBar);

impl Bar {
    /// A bar for `len` bytes of work.
    pub(crate) fn new(what: &'static str, len: u64) -> Self {
        // Hidden by itself where standard error isn't a terminal.
        let bar = ProgressBar::new(len).with_message(what);
        let template = "{msg} {wide_bar} {bytes}/{total_bytes} {bytes_per_sec} {eta}";
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style);
        }
        Self(bar)
    }

    /// Counts `bytes` as done. Fails where a signal asked to stop.
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
