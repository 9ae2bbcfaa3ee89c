// SPDX-License-Identifier: GPL-2.0

//! Early boot: makes the units for the stacks in overlaybdtab. The units run `obdsetup open`.

pub(crate) mod generator;
