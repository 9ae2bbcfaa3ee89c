// SPDX-License-Identifier: GPL-2.0

//! Early boot: makes the units for the stacks in overlaybdtab. They run `obdsetup open`.

pub(crate) mod generator;
