// SPDX-License-Identifier: GPL-2.0

//! The C boundary: bindings of device-mapper, the codecs and the shims, as bindgen makes them, and
//! the kernel crate's own bindings.
//!
//! Only the abstractions in [`crate::dm`], [`crate::block`] and [`crate::codec`] use this module.
//! All code may use [`compat`], which handles the differences between kernels.
//!
//! C headers: `include/linux/device-mapper.h`, `include/dm_overlaybd.h`.

#![allow(
    clippy::all,
    clippy::cast_lossless,
    clippy::ptr_as_ptr,
    clippy::ref_as_ptr,
    clippy::undocumented_unsafe_blocks,
    dead_code,
    improper_ctypes,
    missing_docs,
    non_camel_case_types,
    non_snake_case,
    non_upper_case_globals,
    unknown_lints,
    unnecessary_transmutes,
    unreachable_pub,
    unsafe_op_in_unsafe_fn
)]

pub(crate) mod compat;

pub(crate) use kernel::bindings::*;
use kernel::ffi;

include!(env!("OBD_BINDINGS"));
