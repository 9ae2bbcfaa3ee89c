// SPDX-License-Identifier: GPL-2.0

//! Stores of changes. A store keeps the changes to the disk of a stack. The layers do not change.
//!
//! ```text
//! head, 4 KiB | the exception store of dm-snapshot
//! ```
//!
//! The exception store has the chunks of the disk that were written, but does not say which disk they belong
//! to. The head identifies the disk, and says whether the store was closed.
//!
//! - [`head`]: the head.
//! - [`exceptions`]: the list of the chunks that were written.
//! - [`origin`]: the digest that identifies the disk of a stack.
//! - [`disk`]: the disk with the changes of a store.
//! - [`mapped`]: a disk, and a list of the ranges that were written.
//! - [`fault`]: the faults of a store.
//!
//! The kernel module doesn't read stores, so this is not in `rust/format`.
//! Description: `Documentation/formats/changes.rst`.

pub mod disk;
pub mod exceptions;
pub mod fault;
pub mod head;
pub mod mapped;
pub mod origin;

pub use disk::Changed;
pub use exceptions::Exceptions;
pub use fault::Fault;
pub use head::{Head, Host, State};
pub use mapped::Mapped;
pub use origin::Origin;
