// SPDX-License-Identifier: GPL-2.0

//! The arguments of a table line.

use core::marker::PhantomData;

use kernel::prelude::*;

use super::{Device, Emit, Failure};

/// The arguments that are left.
///
/// # Invariants
///
/// `argv` points to `argc` C strings, all valid for `'a`.
pub(crate) struct Args<'a> {
    argv: *const *const kernel::ffi::c_char,
    argc: usize,
    _strings: PhantomData<&'a CStr>,
}

impl<'a> Args<'a> {
    /// Wraps what device-mapper hands to a constructor.
    ///
    /// # Safety
    ///
    /// `argv` points to `argc` C strings that are valid and don't change for `'a`.
    pub(super) unsafe fn new(argc: u32, argv: *mut *mut kernel::ffi::c_char) -> Self {
        // INVARIANT: By the safety requirement.
        Self {
            argv: argv.cast(),
            argc: argc as usize,
            _strings: PhantomData,
        }
    }

    /// How many are left.
    pub(crate) fn len(&self) -> usize {
        self.argc
    }

    /// Takes the next one.
    pub(crate) fn next(&mut self) -> Option<&'a CStr> {
        self.argc = self.argc.checked_sub(1)?;
        // SAFETY: By the type invariant there was at least one left.
        let arg = unsafe { *self.argv };
        // SAFETY: As above; this is at most one behind the last.
        // INVARIANT: One less is left.
        self.argv = unsafe { self.argv.add(1) };
        // SAFETY: By the type invariant it is a C string that lives for `'a`.
        Some(unsafe { CStr::from_char_ptr(arg) })
    }

    /// Takes the next one, or fails with `phrase`.
    pub(crate) fn required(&mut self, phrase: &'static CStr) -> Result<&'a CStr, Failure> {
        self.next().ok_or(Failure::new(phrase, EINVAL))
    }
}

/// Reads a decimal number.
pub(crate) fn number(arg: &CStr) -> Option<u64> {
    let digits = arg.to_bytes().iter().all(u8::is_ascii_digit);
    arg.to_str().ok().filter(|_| digits)?.parse().ok()
}

/// Takes `<blob bytes | ->`; `None` for the whole device.
pub(crate) fn blob_bytes(args: &mut Args<'_>) -> Result<Option<u64>, Failure> {
    let arg = args.required(c"Missing blob size")?;
    if arg == c"-" {
        return Ok(None);
    }
    match number(arg) {
        Some(bytes) => Ok(Some(bytes)),
        None => Err(Failure::new(c"Invalid blob size", EINVAL)),
    }
}

/// Takes `[<#opt_params>`; what is left then are the optional parameters, as many as it says.
pub(crate) fn option_count(args: &mut Args<'_>) -> Result<(), Failure> {
    let Some(count) = args.next() else {
        return Ok(());
    };
    if number(count) == Some(args.len() as u64) {
        Ok(())
    } else {
        Err(Failure::new(
            c"Invalid number of optional arguments",
            EINVAL,
        ))
    }
}

/// What a target says of an optional parameter that it doesn't know.
pub(crate) const UNKNOWN_OPTION: Failure = Failure::new(c"Unrecognized optional argument", EINVAL);

/// Writes `<dev> <blob bytes | ->`.
pub(crate) fn put_blob(out: &mut Emit<'_>, device: &Device, bytes: Option<u64>) {
    match bytes {
        Some(bytes) => out.put(fmt!("{} {bytes}", device.name())),
        None => out.put(fmt!("{} -", device.name())),
    }
}
