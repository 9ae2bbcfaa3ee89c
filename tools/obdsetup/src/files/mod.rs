// SPDX-License-Identifier: GPL-2.0

//! Files of any kind.
//!
//! - [`in_use`]: looks for anyone who may write to a file while it is read.
//! - [`json`]: reads JSON files of other programs.
//! - [`place`]: directories of files, and temporary files.

pub(crate) mod in_use;
pub(crate) mod json;
pub(crate) mod place;
