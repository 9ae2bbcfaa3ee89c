// SPDX-License-Identifier: GPL-2.0

//! What names mean, and what messages say.

#![allow(missing_docs, clippy::unwrap_used)]

use std::path::Path;

use assert_cmd::Command;
use predicates::prelude::*;
use predicates::str::contains;
use tempfile::TempDir;

/// `obdsetup` in a directory, with the arguments of `line`.
fn obdsetup(place: &Path, line: &str) -> Command {
    let mut command = Command::cargo_bin("obdsetup").unwrap();
    command.current_dir(place);
    command.args(line.split_whitespace());
    command
}

#[test]
fn a_name_means_the_same_whatever_exists() {
    let place = TempDir::new().unwrap();
    std::fs::write(place.path().join("disk.raw"), [7; 8192]).unwrap();
    let run = |line: &str| obdsetup(place.path(), line).assert();
    let said = "a:4096: cannot open: No such file or directory (os error 2); \
                if the end is a size, write a:size=4096";
    run("info a:4096").code(4).stderr(contains(said));
    run("create --image disk.raw a:4096").success();
    run("info a:4096").success().stdout(contains("a:4096: "));
    // `a' alone does not make a size of the rest.
    run("create --image disk.raw a").success();
    run("info a:4096").success().stdout(contains("a:4096: "));
    // A name that ends as if it had a size.
    run("create --image disk.raw a:size=512").success();
    run("info a:size=512").code(1);
    run("info a:size=512:size=-")
        .success()
        .stdout(contains("a:size=512: "));
    run("info a:size=12q")
        .code(1)
        .stderr(contains("`12q` is not a size"));
    run("info missing").code(4).stderr(contains("write").not());
}
