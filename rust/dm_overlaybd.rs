// SPDX-License-Identifier: GPL-2.0

//! Device-mapper targets for OverlayBD images.
//!
//! The targets are read-only: `zfile` decompresses a ZFile, `lsmt` merges a stack of layers, and
//! `lsmt-dax` does the same with DAX.
//!
//! ```text
//! zfile, lsmt                targets: table lines and the path of a bio; no unsafe code
//! dm, block, codec           abstractions over the kernel
//! format                     the on-disk formats: no kernel calls, no unsafe code
//! sys                        the C boundary: bindings, shims, and differences between kernels
//! ```
//!
//! Design: `Documentation/design.rst`.

use kernel::prelude::*;
use kernel::sync::Arc;

mod block;
mod codec;
mod dm;
#[allow(unreachable_pub, reason = "the tools use these files, too")]
mod format;
mod lsmt;
mod sys;
mod zfile;

use block::Queue;
use dm::Registration;
use lsmt::Lsmt;
use sys::compat;
use zfile::Zfile;

module! {
    type: OverlayBd,
    name: "dm_overlaybd",
    authors: ["The dm-overlaybd developers"],
    description: "Device-mapper targets for OverlayBD images",
    license: "GPL",
    alias: ["dm-zfile", "dm-lsmt", "dm-zfile_target", "dm-lsmt_target", "dm-lsmt-dax"],
}

/// The registered target types. The first two have the names of "dm overlaybd", the targets in C
/// that were proposed for the kernel in May 2023 (an RFC).
#[pin_data]
struct OverlayBd {
    #[pin]
    zfile_target: Registration<Zfile>,
    #[pin]
    lsmt_target: Registration<Lsmt<false>>,
    #[pin]
    zfile: Registration<Zfile>,
    #[pin]
    lsmt: Registration<Lsmt<false>>,
    #[pin]
    lsmt_dax: Registration<Lsmt<true>>,
    // Must be the last field, so that it is dropped after all target types are unregistered.
    _last_out: dm::LastOut,
}

impl kernel::InPlaceModule for OverlayBd {
    fn init(module: &'static ThisModule) -> impl PinInit<Self, Error> {
        pin_init::pin_init_scope(move || {
            let shared = zfile::Shared::new()?;
            let claims = Arc::pin_init(dm::Claims::new(), GFP_KERNEL)?;
            let queue = Some(Queue::new(c"overlaybd")?);
            Ok(try_pin_init!(Self {
                zfile_target <- Registration::new(c"zfile_target", module, shared.clone(), queue.clone()),
                lsmt_target <- Registration::new(lsmt::LEGACY_NAME, module, claims.clone(), None),
                zfile <- Registration::new(c"zfile", module, shared, queue),
                lsmt <- Registration::new(c"lsmt", module, claims.clone(), None),
                lsmt_dax <- Registration::new(c"lsmt-dax", module, claims, None),
                _last_out: dm::LastOut,
            }? Error))
        })
    }
}
