// SPDX-License-Identifier: GPL-2.0

//! Tests that run `obdsetup` as users do. All test files are one program, so that they share [`common`].
//! The program has its own harness: a test whose requirements are missing is skipped, with the reason.

#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used)]

mod archives;
mod changes;
mod cli;
mod common;
mod disks;
mod folders;
mod hostile;
mod identity;
mod limits;
mod messages;
mod oci;
mod overview;
mod programs;
mod reproducible;

use std::fs;
use std::path::Path;

use common::{names, trial};

fn main() {
    let args = libtest_mimic::Arguments::from_args();
    let files = [
        archives::trials(),
        archives::trials_of_programs(),
        changes::trials(),
        cli::trials(),
        disks::trials(),
        folders::trials(),
        hostile::trials(),
        identity::trials(),
        limits::trials(),
        messages::trials(),
        oci::trials(),
        overview::trials(),
        programs::trials(),
        reproducible::trials(),
        vec![trial(
            "main",
            "no_test_is_left_out",
            &[],
            no_test_is_left_out,
        )],
    ];
    let trials = files.into_iter().flatten().collect();
    libtest_mimic::run(&args, trials).exit();
}

/// Fails if a function has the attribute `#[test]`, which this harness doesn't run, or if a file of tests is missing
/// in `main`. The compiler reports neither.
fn no_test_is_left_out() {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests");
    for name in names(&dir).iter().filter(|name| name.ends_with(".rs")) {
        let text = fs::read_to_string(dir.join(name)).unwrap();
        let marked = text.lines().any(|line| line.trim() == "#[test]");
        assert!(
            !marked,
            "{name}: list the test in tests! and remove #[test]"
        );
        assert!(
            name == "main.rs" || include_str!("main.rs").contains(&name.replace(".rs", "::trials")),
            "{name}"
        );
    }
}
