// SPDX-License-Identifier: GPL-2.0

//! The program, which calls the library of the same name.

#![forbid(unsafe_code)]

use std::process::ExitCode;

fn main() -> ExitCode {
    obdsetup::main()
}
