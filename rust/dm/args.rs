// SPDX-License-Identifier: GPL-2.0

//! The arguments of a table line.

use core::marker::PhantomData;

use kernel::prelude::*;

use super::{Device, Emit, Failure};

/// The arguments of a table line or a message that were not taken yet.
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
    /// Wraps the arguments that device-mapper passes to a constructor or a message function.
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

    /// Returns how many arguments are left.
    pub(crate) fn len(&self) -> usize {
        self.argc
    }

    /// Removes and returns the next argument. Returns `None` if none is left.
    pub(crate) fn next(&mut self) -> Option<&'a CStr> {
        self.argc = self.argc.checked_sub(1)?;
        // SAFETY: By the type invariant `argv` has this argument: at least one was left.
        let arg = unsafe { *self.argv };
        // SAFETY: As above; the result points at most one past the last argument.
        // INVARIANT: `argc` was decremented above.
        self.argv = unsafe { self.argv.add(1) };
        // SAFETY: By the type invariant it is a C string that lives for `'a`.
        Some(unsafe { CStr::from_char_ptr(arg) })
    }

    /// Removes and returns the next argument. If none is left, fails with [`EINVAL`] and `phrase`.
    pub(crate) fn required(&mut self, phrase: &'static CStr) -> Result<&'a CStr, Failure> {
        self.next().ok_or(Failure::new(phrase, EINVAL))
    }
}

/// Parses a decimal number. Returns `None` if `arg` isn't one, or is above `u64::MAX`.
pub(crate) fn number(arg: &CStr) -> Option<u64> {
    let digits = arg.to_bytes().iter().all(u8::is_ascii_digit);
    arg.to_str().ok().filter(|_| digits)?.parse().ok()
}

/// Takes the argument `<blob bytes | ->`. Returns `None` for `-`: the blob is the whole device.
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

/// Takes the argument `<#opt_params>`, if there is one. Fails with [`EINVAL`] if its value isn't
/// the number of the arguments that follow.
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

/// The error for an optional parameter that the target doesn't know.
pub(crate) const UNKNOWN_OPTION: Failure = Failure::new(c"Unrecognized optional argument", EINVAL);

/// Writes `<dev> <blob bytes | ->`.
pub(crate) fn put_blob(out: &mut Emit<'_>, device: &Device, bytes: Option<u64>) {
    match bytes {
        Some(bytes) => out.put(fmt!("{} {bytes}", device.name())),
        None => out.put(fmt!("{} -", device.name())),
    }
}
