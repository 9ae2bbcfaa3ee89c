// SPDX-License-Identifier: GPL-2.0

//! Signals that ask to stop. They only set a flag; long work looks at it and fails, and so all
//! that was half-made is removed on the way out.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};

use anyhow::{Context, Result};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};

static STOP: OnceLock<Arc<AtomicBool>> = OnceLock::new();

/// Begins to watch for signals.
pub(crate) fn watch() -> Result<()> {
    let stop = STOP.get_or_init(Arc::default);
    for signal in [SIGINT, SIGTERM, SIGHUP] {
        signal_hook::flag::register(signal, Arc::clone(stop))
            .context("cannot watch for signals")?;
    }
    Ok(())
}

/// Fails where a signal came.
pub(crate) fn check() -> overlaybd::Result<()> {
    match STOP.get() {
        Some(stop) if stop.load(Ordering::Relaxed) => Err(overlaybd::Error::Interrupted),
        _ => Ok(()),
    }
}
