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
    let said = "a:4096: cannot open: No such file or directory; \
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

/// The errors of all commands that read a layer, for one that is cut at each of `places`.
fn cut(place: &Path, layer: &str, places: &[usize]) -> Vec<String> {
    let bytes = std::fs::read(place.join(layer)).unwrap();
    let mut said = Vec::new();
    for &len in places {
        std::fs::write(place.join("cut"), &bytes[..len]).unwrap();
        for command in ["info", "verify", "dump", "table"] {
            let done = obdsetup(place, &format!("{command} cut")).assert().code(3);
            let text = String::from_utf8_lossy(&done.get_output().stderr).into_owned();
            said.push(format!("{layer}, {len} bytes, {command}: {text}"));
        }
    }
    said
}

#[test]
fn incomplete_copies_are_said_to_be_that() {
    let place = TempDir::new().unwrap();
    let disk: Vec<u8> = (0..400_000u32)
        .map(|n| (n.wrapping_mul(n) >> 7) as u8)
        .collect();
    std::fs::write(place.path().join("disk.raw"), disk).unwrap();
    for (layer, options) in [
        ("lz4.obd", ""),
        ("bare.obd", "--algorithm none"),
        ("tar.obd", "--tar"),
    ] {
        let line = format!("create --image disk.raw {options} {layer}");
        obdsetup(place.path(), &line).assert().success();
        let len = std::fs::metadata(place.path().join(layer)).unwrap().len() as usize;
        let missing = if layer == "tar.obd" { 3000 } else { 520 };
        let places = [1, 511, 512, 1025, 5000, 100_000, len - missing];
        for text in cut(place.path(), layer, &places) {
            assert!(text.contains("incomplete copy"), "{text}");
        }
        for text in cut(place.path(), layer, &[0]) {
            assert!(text.ends_with(": cut: the file is empty\n"), "{text}");
        }
    }
}

#[test]
fn what_is_no_layer() {
    let place = TempDir::new().unwrap();
    std::fs::create_dir(place.path().join("dir")).unwrap();
    std::fs::write(
        place.path().join("passwd"),
        "root:x:0:0:root:/root:/bin/sh\n".repeat(99),
    )
    .unwrap();
    std::fs::write(
        place.path().join("disk.qcow2"),
        b"QFI\xfb\0\0\0\x03".repeat(999),
    )
    .unwrap();
    for command in ["info", "verify", "dump", "open x", "table"] {
        let run = |name: &str| obdsetup(place.path(), &format!("{command} {name}")).assert();
        for name in ["passwd", "disk.qcow2"] {
            run(name)
                .code(3)
                .stderr(contains("not an OverlayBD layer: ").and(contains("`obdsetup convert'")));
        }
        run("dir").code(1).stderr(contains("is a directory"));
    }
}

#[test]
fn list_without_stacks() {
    let place = TempDir::new().unwrap();
    // Of a machine that has some, nothing is known here.
    if std::fs::read_dir("/sys/block").is_ok_and(|mut devices| {
        devices.any(|device| {
            device
                .unwrap()
                .file_name()
                .to_string_lossy()
                .starts_with("dm-")
        })
    }) {
        return;
    }
    // Where sysfs is not mounted, nobody can tell.
    if !Path::new("/sys/block").exists() {
        obdsetup(place.path(), "list")
            .assert()
            .code(4)
            .stdout("")
            .stderr(contains("is /sys mounted?"));
        return;
    }
    obdsetup(place.path(), "list")
        .assert()
        .success()
        .stdout("")
        .stderr("obdsetup: no stack is set up\n");
    obdsetup(place.path(), "list --json --check")
        .assert()
        .success()
        .stdout("[]\n");
}
