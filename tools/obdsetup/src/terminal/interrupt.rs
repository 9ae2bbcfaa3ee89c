// SPDX-License-Identifier: GPL-2.0

//! Signals that ask to stop. They only set a flag. Long work checks the flag and returns an error, so that
//! incomplete results are removed before the program ends.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};

use anyhow::{Context, Result};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM, SIGXFSZ};

use crate::terminal::exit::INTERRUPTED;

const SIGNALS: [i32; 3] = [SIGINT, SIGTERM, SIGHUP];

static STOP: OnceLock<Arc<AtomicBool>> = OnceLock::new();

/// Begins to watch for signals.
pub(crate) fn watch() -> Result<()> {
    let stop = STOP.get_or_init(Arc::default);
    for signal in SIGNALS {
        signal_hook::flag::register(signal, Arc::clone(stop))
            .context("cannot watch for signals")?;
    }
    // A write beyond `ulimit -f` fails, and does not end the program, which removes what is half-made. Not
    // ignored, since programs that this one starts would inherit that.
    signal_hook::flag::register(SIGXFSZ, Arc::default()).context("cannot watch for signals")?;
    Ok(())
}

/// From now on, a signal ends the program immediately. Called when nothing has to be removed.
pub(crate) fn end_at_once() -> Result<()> {
    for signal in SIGNALS {
        let always = Arc::new(AtomicBool::new(true));
        signal_hook::flag::register_conditional_shutdown(signal, INTERRUPTED.into(), always)
            .context("cannot watch for signals")?;
    }
    Ok(())
}

/// Returns an error if a signal has asked to stop.
pub(crate) fn check() -> overlaybd::Result<()> {
    match STOP.get() {
        Some(stop) if stop.load(Ordering::Relaxed) => Err(overlaybd::Error::Interrupted),
        _ => Ok(()),
    }
}
