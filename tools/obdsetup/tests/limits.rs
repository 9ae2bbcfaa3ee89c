// SPDX-License-Identifier: GPL-2.0

//! Directories with the longest names, paths and links, the largest extended attributes and device
//! numbers, and flags of files; and a signal during long work.

use std::fs;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use predicates::prelude::*;
use predicates::str::contains;
use rustix::fs::{mkdirat, mknodat, openat, FileType, IFlags, Mode, OFlags, XattrFlags, CWD};
use rustix::process::Signal;

use crate::common::tars::{member, pax, tar};
use crate::common::{needs, noise, stop, tests, Place};

tests! {
    longest_names;
    longest_paths;
    names_with_the_same_hash;
    links_that_are_as_long_as_can_be needs needs::e2fsprogs();
    large_attributes needs needs::e2fsprogs(), needs::large_xattrs();
    attributes_that_do_not_fit needs needs::e2fsprogs();
    largest_device_numbers needs needs::e2fsprogs(), needs::mksquashfs(), needs::device_nodes();
    flags_are_told_of_once needs needs::flags();
    an_interrupt_ends_the_btrfs_writer_at_once;
}

/// One warning names all flags of chattr(1) that a layer doesn't keep. Flags that concern only how a file is
/// stored are not reported.
fn flags_are_told_of_once() {
    let place = Place::new();
    fs::create_dir_all(place.path("tree/sub")).unwrap();
    for name in ["tree/a", "tree/b", "tree/sub/c", "tree/sub/plain"] {
        place.write(name, b"content");
    }
    for fs in ["erofs", "btrfs"] {
        place.ok(&format!("create --directory tree --fs {fs} before.{fs}"));
    }
    for name in ["tree/a", "tree/b", "tree/sub", "tree/sub/c"] {
        needs::set_flags(&place.path(name), IFlags::NODUMP).unwrap();
    }
    needs::set_flags(&place.path("tree/b"), IFlags::NODUMP | IFlags::NOATIME).unwrap();
    for fs in ["erofs", "btrfs"] {
        let said =
            "obdsetup: warning: flags are not kept, see chattr(1) (no dump, no atime updates): \
                    4 files stored without them: ./a ./b ./sub ...\n";
        place
            .run(&format!("create --directory tree --fs {fs} after.{fs}"))
            .success()
            .stderr(said);
        // The flags don't change the layer.
        assert!(place.read(&format!("before.{fs}")) == place.read(&format!("after.{fs}")));
    }
    needs::set_flags(&place.path("tree"), IFlags::NODUMP).unwrap();
    place
        .run("convert tree root.obd --fs erofs")
        .success()
        .stderr(contains("5 files stored without them: ./ ./a ./b ..."));
}

/// Names of 255 bytes, the longest that the kernel allows.
fn longest_names() {
    let place = Place::new();
    let long = "n".repeat(255);
    fs::create_dir_all(place.path(&format!("tree/{long}"))).unwrap();
    place.write(&format!("tree/{long}/{long}"), b"what is in the file");
    for fs in ["erofs", "btrfs"] {
        place.ok(&format!("create --directory tree --fs {fs} {fs}.obd"));
        let found = place.dump(&format!("{fs}.obd"));
        let at = |text: &[u8]| {
            found
                .windows(text.len())
                .filter(|part| *part == text)
                .count()
        };
        assert!(at(long.as_bytes()) >= 2, "{fs}");
        assert_eq!(at(b"what is in the file"), 1, "{fs}");
    }
}

/// In btrfs, all names in a directory with the same crc32c are in one item.
fn names_with_the_same_hash() {
    use std::os::unix::ffi::OsStrExt;

    let place = Place::new();
    fs::create_dir_all(place.path("tree/sub")).unwrap();
    let mut made = 0;
    for nth in 0.. {
        let start = format!("{nth:0200}");
        // The state of the CRC after `start`. With it in the last four bytes, the state at the end is always the same.
        let state = !crc32c::crc32c_append(1, start.as_bytes());
        let name = [start.as_bytes(), &state.to_le_bytes()].concat();
        if name.iter().any(|byte| b"\0/".contains(byte)) {
            continue;
        }
        let path = place
            .path("tree/sub")
            .join(std::ffi::OsStr::from_bytes(&name));
        fs::write(path, b"").unwrap();
        made += 1;
        if made == 60 {
            place.ok("create --directory tree --fs btrfs few.obd");
        }
        if made == 80 {
            break;
        }
    }
    place
        .run("create --directory tree --fs btrfs many.obd")
        .code(1)
        .stderr(contains("./sub/000").and(contains(
            "more names with the same hash (crc32c) are in one place than btrfs can hold",
        )));
    place.ok("create --directory tree --fs erofs many.obd");
}

/// Makes `count` directories in `top`, one inside the other, each with a name of 200 bytes.
fn chain(top: &std::path::Path, count: usize) {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY;
    let mut at: OwnedFd = openat(CWD, top, flags, Mode::empty()).unwrap();
    let name = "d".repeat(200);
    for _ in 0..count {
        mkdirat(&at, name.as_str(), Mode::from_raw_mode(0o755)).unwrap();
        at = openat(&at, name.as_str(), flags, Mode::empty()).unwrap();
    }
}

fn longest_paths() {
    let place = Place::new();
    fs::create_dir(place.path("tree")).unwrap();
    chain(&place.path("tree"), 19);
    place.ok("create --directory tree --fs erofs out.obd");
    fs::create_dir(place.path("deep")).unwrap();
    chain(&place.path("deep"), 30);
    for fs in ["erofs", "btrfs"] {
        let done = place.run(&format!("create --directory deep --fs {fs} x.obd"));
        let done = done.code(1).stderr(
            contains("/deep/ddd")
                .and(contains("more than 4095"))
                .and(contains("move the directory")),
        );
        assert!(done.get_output().stderr.len() < 1000, "{done}");
    }
    assert_eq!(place.names(), ["deep", "out.obd", "tree"]);
}

/// The kernel allows targets of up to 4095 bytes.
fn links_that_are_as_long_as_can_be() {
    let place = Place::new();
    fs::create_dir(place.path("tree")).unwrap();
    let target = "t/".repeat(2047) + "t";
    std::os::unix::fs::symlink(&target, place.path("tree/link")).unwrap();
    for fs in ["erofs", "ext4", "btrfs"] {
        place.ok(&format!("create --directory tree --fs {fs} {fs}.obd"));
        let found = place.dump(&format!("{fs}.obd"));
        let there = found
            .windows(target.len())
            .any(|part| part == target.as_bytes());
        assert!(there, "{fs}");
    }
}

/// Extended attributes that an ext4 has no room for: because it is full, because of its small blocks, or in any ext4.
/// debugfs names no file, and the first file with large attributes need not be the reason.
fn attributes_that_do_not_fit() {
    let place = Place::new();
    let with = |name: &str, sizes: &[usize]| {
        let records = sizes.iter().enumerate().map(|(nth, &size)| {
            let key = format!("SCHILY.xattr.user.{nth}").into_bytes();
            // No two values are the same, so that no block is shared.
            let value = format!("{name}{}", "x".repeat(size - name.len()));
            (key, value.into_bytes())
        });
        let records: Vec<(Vec<u8>, Vec<u8>)> = records.collect();
        let records: Vec<(&[u8], &[u8])> = records
            .iter()
            .map(|(key, value)| (key.as_slice(), value.as_slice()))
            .collect();
        [pax(&records), member(name, b'0', b"")].concat()
    };
    let large = member("large", b'0', &noise(3400 << 10, 5));
    let small = (0..30).map(|nth| with(&format!("f{nth:02}"), &[1500]));
    // This one fits in a block.
    let members = [large, with("wide", &[3900])].into_iter().chain(small);
    place.write("full.tar", &tar(&members.collect::<Vec<_>>()));
    place.write("small.tar", &tar(&[with("file", &[1500])]));
    let both = [with("first", &[3850]), with("second", &[3000, 1500])];
    place.write("both.tar", &tar(&both));
    for (command, said) in [
        (
            "full.tar --size 8m",
            "too small for these files: give a larger --size, or none, so that it is estimated: debugfs \
             failed: ea_set: ",
        ),
        (
            "small.tar --size 360k",
            "./file: extended attribute user.0: with the others of the file, 1506 bytes are more than an ext4 with \
             blocks of 1024 bytes can hold: use --mkfs-arg=-b4096, or --fs erofs",
        ),
        (
            "both.tar",
            "./second: extended attribute user.0: with the others of the file, 4512 bytes are more than ext4 can hold",
        ),
    ] {
        place
            .run(&format!("convert {command} out --fs ext4"))
            .code(1)
            .stderr(contains(said));
    }
    for command in [
        "full.tar",
        "full.tar --size 16m",
        "small.tar --size 360k --mkfs-arg=-b4096",
    ] {
        place
            .run(&format!("convert {command} out --force --fs ext4"))
            .success();
    }
}

/// Extended attributes up to the size that the kernel allows. If a file system cannot hold one, the message
/// names the file.
fn large_attributes() {
    let place = Place(needs::with_large_xattrs().unwrap());
    fs::create_dir(place.path("tree")).unwrap();
    place.write("tree/file", b"content");
    let set = |len: usize| {
        let value = noise(len, 3);
        let file = place.path("tree/file");
        rustix::fs::setxattr(file, "user.large", &value, XattrFlags::empty()).unwrap();
    };
    set(3000);
    for fs in ["erofs", "ext4", "btrfs"] {
        place.ok(&format!("create --directory tree --fs {fs} {fs}.obd"));
    }
    set(65_000);
    place.ok("create --directory tree --fs erofs erofs.obd --force");
    let disk = place.dump("erofs.obd");
    let value = noise(65_000, 3);
    assert!(disk
        .windows(1000)
        .any(|part| part == &value[64_000..65_000]));
    let refused = |fs: &str, said: &str| {
        let done = place.run(&format!("create --directory tree --fs {fs} x.obd"));
        let said = contains(said).and(contains(format!("than {fs} can hold: use --fs ")));
        done.code(1).stderr(contains("/file: ").and(said));
    };
    refused("ext4", "extended attribute user.large");
    refused("btrfs", "extended attribute user.large");
    // In erofs, the length of a value has 16 bits.
    set(65_536);
    refused("erofs", "more extended attributes");
    assert_eq!(
        place.names(),
        ["btrfs.obd", "erofs.obd", "ext4.obd", "tree"]
    );
}

fn largest_device_numbers() {
    let place = Place::new();
    fs::create_dir(place.path("tree")).unwrap();
    let (mode, device) = (
        Mode::from_raw_mode(0o600),
        rustix::fs::makedev(4095, 1_048_575),
    );
    let node = place.path("tree/node");
    mknodat(CWD, &node, FileType::BlockDevice, mode, device).unwrap();
    for fs in ["erofs", "btrfs", "ext4"] {
        place.ok(&format!("create --directory tree --fs {fs} {fs}.obd"));
    }
    // The kernel's encoding, from the lowest bit: 8 bits of the minor number, the major number, the other bits
    // of the minor number.
    let number = (((0xfffff & !0xff) << 12) | (4095 << 8) | 0xff_u32).to_le_bytes();
    let disk = place.dump("erofs.obd");
    assert!(disk.chunks(4).any(|word| word == number));
    place
        .run("create --directory tree --fs squashfs x.obd")
        .code(1)
        .stderr(contains("devices with a minor number of 524288 or more").and(contains("node")));
    assert!(!place.path("x.obd").exists());
}

fn an_interrupt_ends_the_btrfs_writer_at_once() {
    let place = Place::new();
    for nth in 0..40 {
        fs::create_dir_all(place.path(&format!("tree/{nth}"))).unwrap();
        for file in 0..250 {
            place.write(
                &format!("tree/{nth}/{file}"),
                format!("{nth} {file}").as_bytes(),
            );
        }
    }
    place.write("tree/data", &noise(64 << 20, 1));
    let line = "create --directory tree --fs btrfs out.obd";
    let start = Instant::now();
    place.ok(line);
    let whole = start.elapsed();
    fs::remove_file(place.path("out.obd")).unwrap();
    let mut stopped = 0;
    for nth in 1..10 {
        let mut child = place.start(line);
        std::thread::sleep(whole * nth / 10);
        let asked = Instant::now();
        match stop(&mut child, Signal::INT) {
            // This time, obdsetup ended before the signal.
            Some(0) => fs::remove_file(place.path("out.obd")).unwrap(),
            code => {
                let took = asked.elapsed();
                assert_eq!(code, Some(130), "after {nth}/10 of {whole:?}");
                // On a busy machine, both the whole run and the end after the signal take longer.
                assert!(
                    took < Duration::from_secs(2).max(whole / 10),
                    "{took:?}, after {nth}/10 of {whole:?}"
                );
                stopped += 1;
            }
        }
        assert_eq!(place.names(), ["tree"], "after {nth}/10 of {whole:?}");
    }
    // Later runs may be faster than the first one, by which the times of the signals are chosen. So some signals
    // may come too late, but not all.
    assert!(stopped >= 1, "none was stopped in {whole:?}");
}
