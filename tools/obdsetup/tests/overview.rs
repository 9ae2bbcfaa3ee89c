// SPDX-License-Identifier: GPL-2.0

//! The meaning of names of layers, messages about incomplete layers and other files, and `list` without stacks.

use std::fs;
use std::path::Path;

use predicates::prelude::*;
use predicates::str::contains;

use crate::common::{tests, Place};

tests! {
    a_name_means_the_same_whatever_exists;
    incomplete_copies_are_said_to_be_that;
    what_is_no_layer;
    list_without_stacks needs no_stacks();
    list_without_sysfs needs no_sysfs();
}

fn a_name_means_the_same_whatever_exists() {
    let place = Place::new();
    fs::write(place.path("disk.raw"), [7; 8192]).unwrap();
    let run = |line: &str| place.run(line);
    let said = "a:4096: cannot open: No such file or directory; \
                if the end is a size, write a:size=4096";
    run("info a:4096").code(4).stderr(contains(said));
    run("create --image disk.raw a:4096").success();
    run("info a:4096").success().stdout(contains("a:4096: "));
    // Even if there is a file `a', the word is a name, not `a' and a size.
    run("create --image disk.raw a").success();
    run("info a:4096").success().stdout(contains("a:4096: "));
    // A name whose end looks like a size.
    run("create --image disk.raw a:size=512").success();
    run("info a:size=512").code(3);
    run("info a:size=512:size=-")
        .success()
        .stdout(contains("a:size=512: "));
    run("info a:size=12q")
        .code(1)
        .stderr(contains("`12q` is not a size"));
    run("info missing").code(4).stderr(contains("write").not());
}

/// Cuts off `layer` at each length in `places`. Returns the messages of the commands that read the result.
fn cut(place: &Place, layer: &str, places: &[usize]) -> Vec<String> {
    let bytes = fs::read(place.path(layer)).unwrap();
    let mut said = Vec::new();
    for &len in places {
        fs::write(place.path("cut"), &bytes[..len]).unwrap();
        for command in ["info", "verify", "dump", "table"] {
            let done = place.run(&format!("{command} cut")).code(3);
            let text = String::from_utf8_lossy(&done.get_output().stderr).into_owned();
            said.push(format!("{layer}, {len} bytes, {command}: {text}"));
        }
    }
    said
}

fn incomplete_copies_are_said_to_be_that() {
    let place = Place::new();
    let disk: Vec<u8> = (0..400_000u32)
        .map(|n| (n.wrapping_mul(n) >> 7) as u8)
        .collect();
    fs::write(place.path("disk.raw"), disk).unwrap();
    for (layer, options) in [
        ("lz4.obd", ""),
        ("bare.obd", "--algorithm none"),
        ("tar.obd", "--tar"),
    ] {
        let line = format!("create --raw --image disk.raw {options} {layer}");
        place.run(&line).success();
        let len = fs::metadata(place.path(layer)).unwrap().len() as usize;
        let missing = if layer == "tar.obd" { 3000 } else { 520 };
        let places = [1, 511, 512, 1025, 5000, 100_000, len - missing];
        for text in cut(&place, layer, &places) {
            assert!(text.contains("incomplete copy"), "{text}");
        }
        for text in cut(&place, layer, &[0]) {
            assert!(text.ends_with(": cut: the file is empty\n"), "{text}");
        }
    }
}

fn what_is_no_layer() {
    let place = Place::new();
    fs::create_dir(place.path("dir")).unwrap();
    fs::write(
        place.path("passwd"),
        "root:x:0:0:root:/root:/bin/sh\n".repeat(99),
    )
    .unwrap();
    fs::write(place.path("disk.qcow2"), b"QFI\xfb\0\0\0\x03".repeat(999)).unwrap();
    for command in ["info", "verify", "dump", "open x", "table"] {
        let run = |name: &str| place.run(&format!("{command} {name}"));
        for name in ["passwd", "disk.qcow2"] {
            run(name)
                .code(3)
                .stderr(contains("not an OverlayBD layer: ").and(contains("`obdsetup convert'")));
        }
        run("dir").code(1).stderr(contains("is a directory"));
    }
}

/// Requires sysfs, and a machine without device-mapper devices, since those may belong to a stack.
fn no_stacks() -> Option<String> {
    let Ok(mut devices) = fs::read_dir("/sys/block") else {
        return Some("no /sys/block".to_owned());
    };
    let mapped = |name: String| name.starts_with("dm-");
    devices
        .any(|device| mapped(device.unwrap().file_name().to_string_lossy().into_owned()))
        .then(|| "this machine has mapped devices".to_owned())
}

/// Requires that sysfs is not mounted.
fn no_sysfs() -> Option<String> {
    let there = Path::new("/sys/block").exists();
    there.then(|| "/sys is mounted".to_owned())
}

fn list_without_stacks() {
    let place = Place::new();
    place
        .run("list")
        .success()
        .stdout("")
        .stderr("obdsetup: no stack is set up\n");
    place.run("list --json --check").success().stdout("[]\n");
}

fn list_without_sysfs() {
    Place::new()
        .run("list")
        .code(4)
        .stdout("")
        .stderr(contains("is /sys mounted?"));
}
