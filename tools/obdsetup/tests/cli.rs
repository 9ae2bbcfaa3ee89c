// SPDX-License-Identifier: GPL-2.0

//! Runs `obdsetup` as users do, and checks its results, exit codes and messages, and which files are left.

use std::fs;
use std::io::Cursor;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use assert_cmd::cargo::cargo_bin;
use assert_cmd::Command;
use overlaybd::codec::Method;
use overlaybd::format::zfile;
use overlaybd::wrap::{self, Wrapping};
use overlaybd::zfile_writer;
use predicates::prelude::*;
use predicates::str::{contains, starts_with};
use rustix::process::Signal;

use crate::common::{image, names, needs, noise, soon, stop, tests, Place};

tests! {
    create_and_dump;
    differences;
    layers_for_dax;
    long_holes_and_dax;
    reasons_against_dax;
    layers_with_zeros_after_them;
    disks_that_lost_their_holes;
    create_from_a_directory needs needs::e2fsprogs();
    ext4_that_has_no_dax needs needs::e2fsprogs();
    erofs_that_has_no_dax needs needs::mkfs_erofs();
    times_in_small_inodes needs needs::e2fsprogs();
    commit;
    merge;
    export;
    stacks_of_containerd;
    convert_images;
    convert_with_qemu_img needs needs::program("qemu-img");
    convert_to_ext4 needs needs::e2fsprogs();
    convert_to_erofs needs needs::program("fsck.erofs");
    convert_to_erofs_by_its_program needs needs::mkfs_erofs(), needs::program("fsck.erofs");
    failed_conversions_leave_nothing;
    convert_oci_images;
    hostile_names_and_files;
    line_breaks_in_names;
    a_colon_in_a_name needs needs::e2fsprogs();
    options_that_do_not_apply;
    output_that_cannot_be_written;
    full_disks needs needs::mounts(), needs::e2fsprogs(), needs::mkfs_erofs(), needs::mksquashfs(),
        needs::program("qemu-img");
    files_beyond_the_limit_of_the_shell;
    inputs_of_other_kinds;
    help_on_80_columns;
    a_reader_that_does_not_read;
    images_beyond_4_gib;
    benchmark;
    json_is_documented;
    completions_and_manual_pages needs needs::program("bash");
    pages_without_warnings needs needs::program("man");
    exit_codes;
    errors_tell_field_and_offset;
    existing_files_stay;
    names_that_no_output_has;
    tables;
    signals_leave_nothing;
    signals_stop_started_programs;
    overlaybdtab;
    overlaybdtab_has_the_options_of_open;
    generator;
    a_disk_is_not_for_a_terminal needs needs::program("script");
}

fn layers_for_dax() {
    let place = Place::new();
    // Two pages of data, one of zeros, and a hole.
    let mut disk = noise(8192, 1);
    disk.resize(12288, 0);
    place.write("disk.raw", &disk);
    let file = fs::OpenOptions::new()
        .write(true)
        .open(place.path("disk.raw"));
    file.unwrap().set_len(65536).unwrap();
    disk.resize(65536, 0);
    place.ok("create --image disk.raw --dax a");
    assert!(place.dump("a") == disk);
    let info = place.json("info --json a");
    assert_eq!(info[0]["lsmt"]["data_size"], 12288);
    assert_eq!(info[0]["lsmt"]["dax_page_size"], 4096);
    assert!(info[0]["lsmt"]["dax_misfit"].is_null());
    place.ok("verify --dax a");
    place.run("info a").stdout(contains("in pages of up to 4"));
    // The disk's data begins at 2 MiB, after the places where the kernel looks for info blocks.
    let layer = fs::read(place.path("a")).unwrap();
    assert!(layer[4096..2 << 20].iter().all(|&byte| byte == 0));
    assert!(layer[2 << 20..].starts_with(&disk[..12288]));

    // Zeros that replace data of a lower layer are stored as data, not as a zeroed segment.
    disk[20480..24576].fill(7);
    let mut upper = disk.clone();
    upper[0..4096].fill(0);
    place.write("upper.raw", &upper);
    place.ok("create --image upper.raw --base a --dax b");
    assert!(place.dump("a b") == upper);
    assert_eq!(place.json("info --json b")[0]["lsmt"]["zeroed_size"], 0);

    // With units larger than a page, too, if only the second page of a unit has zeros that are not in a hole.
    place.write("full.raw", &noise(131_072, 9));
    place.ok("create --image full.raw --dax full");
    let file = fs::File::create(place.path("holes.raw")).unwrap();
    file.set_len(131_072).unwrap();
    file.write_all_at(&[0; 4096], 4096).unwrap();
    drop(file);
    place.ok("create --image holes.raw --base full --dax --granularity 64k over");
    let lsmt = &place.json("info --json over")[0]["lsmt"];
    assert_eq!(
        (&lsmt["data_size"], &lsmt["zeroed_size"]),
        (&65_536.into(), &65_536.into())
    );

    // A layer in a ZFile or a tar cannot be used for DAX. commit --dax makes one that can.
    place.ok("create --image disk.raw --tar wrapped");
    place
        .run("verify --dax wrapped")
        .code(3)
        .stderr("obdsetup: wrapped: is compressed: `commit --dax' unwraps it\n");
    let report = place.run("verify --dax --json --ignore-identity wrapped");
    report
        .code(3)
        .stdout(contains("\"ok\": false").and(contains("is compressed")));
    // What the identity says comes first, and only for that there is the option.
    place
        .run("verify --dax wrapped wrapped")
        .code(3)
        .stderr(contains("the same layer twice").and(contains("--ignore-identity")));
    place
        .run("verify --dax --ignore-identity wrapped wrapped")
        .code(3)
        .stderr(contains(
            "wrapped: is compressed: `commit --dax' unwraps it; 1 more\n",
        ));
    place.ok("commit --dax wrapped plain");
    place.ok("verify --dax plain");
    place.ok("commit --algorithm none --tar plain tar");
    place
        .run("verify --dax tar")
        .code(3)
        .stderr(contains("is in a tar"));

    // Data of the disk that the kernel would take for an info block of the pmem device.
    for signature in ["NVDIMM_PFN_INFO", "NVDIMM_DAX_INFO", "BTT_ARENA_INFO"] {
        let mut hostile = disk.clone();
        hostile[..16].fill(0);
        hostile[..signature.len()].copy_from_slice(signature.as_bytes());
        place.write("hostile.raw", &hostile);
        place.ok("create --force --image hostile.raw --algorithm none hostile");
        place
            .run("verify --dax hostile")
            .code(3)
            .stderr(contains("byte 4096 begins an info block"));
        let info = place.json("info --json hostile");
        assert!(info[0]["lsmt"]["dax_page_size"].is_null());
        place.ok("commit --force --dax hostile harmless");
        place.ok("verify --dax harmless");
        assert!(place.dump("harmless") == hostile);
    }

    // merge has the option --dax, too.
    place.ok("merge --lowest --dax -o merged a b");
    place.ok("verify --dax merged");
    assert!(place.dump("merged") == upper);

    place.write("odd.raw", &disk[..8192 + 512]);
    place
        .run("create --image odd.raw --dax x")
        .code(1)
        .stderr(contains("ends within a page"));
    for (command, message) in [
        (
            "create --image disk.raw --dax --algorithm zstd x",
            "cannot be mapped",
        ),
        (
            "create --image disk.raw --dax --granularity 512 x",
            "pages of 4096",
        ),
        (
            "create --image disk.raw --dax --skip-zeros x",
            "cannot be used with",
        ),
        ("open app a --dax", "is a file"),
    ] {
        place.run(command).code(1).stderr(contains(message));
    }
}

/// Runs that are longer than an index entry are cut between pages. commit --dax cuts the runs of other makers again.
fn long_holes_and_dax() {
    let place = Place::new();
    let mut disk = noise(20 << 20, 21);
    place.write("base.raw", &disk);
    place.ok("create --image base.raw --dax --granularity 64k base");
    let pages = |layer: &str| {
        let info = place.json(&format!("info --json {layer}"));
        info[0]["lsmt"]["dax_page_size"].as_u64()
    };
    // A long run of data, for the largest pages.
    assert_eq!(pages("base"), Some(65_536));
    // The same disk with holes of 9 MiB and 4 MiB, which are 13 MiB of zeros after each other.
    let holes = |name: &str, data: &[std::ops::Range<usize>]| {
        let file = fs::File::create(place.path(name)).unwrap();
        file.set_len(20 << 20).unwrap();
        for range in data {
            let at = u64::try_from(range.start).unwrap();
            file.write_all_at(&disk[range.clone()], at).unwrap();
        }
    };
    let (end, mib) = (disk.len(), 1 << 20);
    holes("long.raw", &[0..4 * mib, 13 * mib..end]);
    holes("next.raw", &[0..4 * mib, 17 * mib..end]);
    place.ok("create --base base --image long.raw --dax --granularity 64k long");
    assert_eq!(pages("long"), Some(65_536));
    place.ok("create --base base --base long --image next.raw --dax --granularity 64k next");
    for (options, name) in [("", "middle"), ("--lowest", "lowest")] {
        let below = match options {
            "" => "",
            _ => "base",
        };
        place.ok(&format!(
            "merge {options} --dax -o {name} {below} long next"
        ));
        assert_eq!(pages(name), Some(65_536), "{name}");
    }
    disk[4 * mib..17 * mib].fill(0);
    assert!(place.dump("base long next") == disk);
    assert!(place.dump("base middle") == disk);
    assert!(place.dump("lowest") == disk);

    // Entries as older versions wrote them: the first one is cut within a page.
    let mut layer = place.read("long");
    let entry = layer
        .chunks_exact(16)
        .rposition(|entry| {
            let [first, second] =
                [&entry[..8], &entry[8..]].map(|half| u64::from_le_bytes(half.try_into().unwrap()));
            first & ((1 << 50) - 1) == 8192 && first >> 50 == 16_256 && (second >> 55) & 1 == 1
        })
        .unwrap()
        * 16;
    for (at, start, length) in [(entry, 8192_u64, 16_383), (entry + 16, 24_575, 2049)] {
        let word = start | (length << 50);
        layer[at..at + 8].copy_from_slice(&u64::to_le_bytes(word));
    }
    place.write("old", &layer);
    assert!(place.dump("base old") == place.dump("base long"));
    place
        .run("verify --dax old")
        .code(3)
        .stderr(contains("16383 sectors at sector 8192"));
    place.ok("commit --dax old new");
    assert_eq!(pages("new"), Some(65_536));
    assert!(place.dump("base new") == place.dump("base long"));
}

/// Each kind of reason is counted for each layer, and the layer or image that has it is named.
fn reasons_against_dax() {
    let place = Place::new();
    // Two sectors at odd places, then two pages, whose data is within pages of the layer.
    let mut disk = vec![0_u8; 65_536];
    for (at, len) in [(512, 512), (4608, 512), (8192, 4096), (16_384, 4096)] {
        disk[at..at + len].copy_from_slice(&noise(len, 3));
    }
    place.write("disk.raw", &disk);
    let options = "--skip-zeros --granularity 512";
    place.ok(&format!(
        "create --image disk.raw {options} --algorithm none odd"
    ));
    place.ok(&format!("create --image disk.raw {options} wrapped"));
    let way_out = "are not whole pages: write the disk to a file with `export --no-sparse', of which `create --dax' \
                   makes a layer that fits";
    let sectors = |layer| {
        format!("{layer}: 1 sectors at sector 1 of the disk {way_out} (and 1 more of this kind)")
    };
    let stored = "odd: 8 sectors at sector 16 of the disk are stored from sector 10 of the layer on, which is within a \
                  page: `commit --dax' writes a layer with them in whole pages (and 1 more of this kind)";
    let wrapped = "wrapped: is compressed: `commit --dax' unwraps it";
    let all = [
        sectors("odd"),
        stored.to_owned(),
        wrapped.to_owned(),
        sectors("wrapped"),
    ];
    place
        .run("verify --dax --ignore-identity odd wrapped")
        .code(3)
        .stdout(format!(
            "odd: no error, but not for DAX\nwrapped: no error, but not for DAX\n{}\n",
            all.join("\n")
        ))
        .stderr(contains(format!("obdsetup: {}; 3 more\n", all[0])));
    let report = place.run("verify --dax --ignore-identity --json odd wrapped");
    let report: serde_json::Value =
        serde_json::from_slice(&report.code(3).get_output().stdout).unwrap();
    assert_eq!(report["chain_errors"].as_array().unwrap().len(), 4);
    // Problems of UUIDs are listed, too.
    place
        .run("verify odd odd wrapped")
        .code(3)
        .stdout(contains("the same layer twice").and(contains("was made as a lowest layer")));

    // commit and merge cannot change the places on the disk. They name the layer at fault.
    for layer in ["odd", "wrapped"] {
        place
            .run(&format!("commit --dax {layer} new"))
            .code(1)
            .stderr(format!("obdsetup: {}\n", sectors(layer)));
    }
    let mut upper = noise(32_768, 4);
    place.write("fine.raw", &upper);
    let file = fs::OpenOptions::new()
        .write(true)
        .open(place.path("fine.raw"));
    file.unwrap().set_len(65_536).unwrap();
    place.ok("create --image fine.raw --dax fine");
    upper.resize(65_536, 0);
    upper[41_472..41_984].fill(1);
    place.write("upper.raw", &upper);
    place.ok("create --image upper.raw --base fine --granularity 512 upper");
    place
        .run("merge --lowest --dax -o new fine upper")
        .code(1)
        .stderr(contains(
            "obdsetup: upper: 1 sectors at sector 81 of the disk",
        ));
    // Not a layer whose odd sectors a layer above hides.
    let mut disk = vec![0_u8; 65_536];
    for (at, len, name, base) in [
        (512, 512, "low", ""),
        (0, 4096, "cover", "--base low"),
        (41_472, 512, "top", "--base low --base cover"),
    ] {
        disk[at..at + len].copy_from_slice(&noise(len, 1 + u32::try_from(at).unwrap()));
        place.write("disk.raw", &disk);
        let options = if base.is_empty() {
            options
        } else {
            "--granularity 512"
        };
        place.ok(&format!("create --image disk.raw {base} {options} {name}"));
    }
    place
        .run("merge --lowest --dax -o new low cover top")
        .code(1)
        .stderr(format!(
            "obdsetup: top: 1 sectors at sector 81 of the disk {way_out}\n"
        ));
    place.ok("merge --lowest --dax -o covered low cover");
    // So do create and convert, of a disk that ends within a page.
    place.write("short.raw", &noise(65_024, 4));
    let size = "has a disk of 65024 bytes, which ends within a page: make the disk larger";
    for command in [
        "create --image short.raw --dax new",
        "convert --from raw short.raw --dax new",
    ] {
        place
            .run(command)
            .code(1)
            .stderr(contains(format!("obdsetup: short.raw: {size}")));
    }
    place.ok("create --image short.raw short");
    for command in ["commit --dax short new", "merge --dax -o new short"] {
        place
            .run(command)
            .code(1)
            .stderr(contains(format!("obdsetup: short: {size}")));
    }
    assert!(!place.path("new").exists());
}

/// Returns a ZFile of `content` whose header has not all fields, and whose length is not that of whole sectors.
fn streamed_zfile(content: &[u8]) -> Vec<u8> {
    let wrapping = Wrapping {
        zfile: Some(zfile_writer::Options {
            method: Method {
                algorithm: zfile::Algorithm::Lz4,
                level: None,
            },
            block_size: 4096,
            crc: true,
            overwrite_header: false,
            whole_sectors: false,
        }),
        tar: false,
    };
    let mut out = Cursor::new(Vec::new());
    wrap::write(&mut out, wrapping, &|| Ok(()), |sink| sink(content)).unwrap();
    out.into_inner()
}

/// A file that was padded for a hypervisor can be read if its size is given, and a message says so.
fn layers_with_zeros_after_them() {
    let place = Place::new();
    place.write("disk.raw", &noise(65_536, 5));
    // Zeros after the last byte that is not zero: the layer of upstream's tools ends anywhere in a sector.
    let streamed = "as upstream's tools write to a pipe";
    for options in [
        "--dax",
        "--algorithm none",
        "--algorithm none --tar",
        streamed,
    ] {
        if options == streamed {
            place.ok("create --force --image disk.raw --algorithm none plain");
            place.write("layer.lsmt", &streamed_zfile(&place.read("plain")));
            assert!(place.read("layer.lsmt").len() % 512 != 0);
        } else {
            place.ok(&format!(
                "create --force --image disk.raw {options} layer.lsmt"
            ));
        }
        let layer = place.read("layer.lsmt");
        let mut padded = layer.clone();
        padded.resize(layer.len().next_multiple_of(2 << 20), 0);
        place.write("padded", &padded);
        if options.ends_with("--tar") {
            // The tar says how long the layer is.
            place.ok("verify padded");
            continue;
        }
        let size = layer.len();
        for command in ["verify", "info", "dump"] {
            place
                .run(&format!("{command} padded"))
                .code(3)
                .stderr(contains(format!(
                    "; zeros follow a layer of {size} bytes: give padded:size={size}\n"
                )));
            place.ok(&format!("{command} padded:size={size}"));
        }
        assert!(place.dump(&format!("padded:size={size}")) == place.read("disk.raw"));
        // A loop device has all of its file.
        place.write("config.v1.json", br#"{"lowers": [{"file": "padded"}]}"#);
        for command in ["table padded", "open app padded", "table config.v1.json"] {
            place
                .run(command)
                .code(3)
                .stderr(contains(format!(
                    "; zeros follow a layer of {size} bytes, and `open' and `table' use all of a file: cut a copy of \
                     it with `truncate -s {size}'\n"
                )));
        }
        if options == streamed {
            let hint = format!("; zeros follow a layer of {size} bytes");
            for command in ["dump --zfile padded", "table --zfile padded"] {
                place.run(command).code(3).stderr(contains(hint.as_str()));
            }
        }
        // Other bytes follow: the size is not known.
        padded.push(1);
        place.write("padded", &padded);
        place
            .run("verify padded")
            .code(3)
            .stderr(contains("zeros follow").not());
    }
    place.ok("create --force --image disk.raw --dax layer.lsmt");
    let mut padded = place.read("layer.lsmt");
    let size = padded.len();
    padded.resize(4 << 20, 0);
    place.write("padded", &padded);
    place.ok(&format!("verify --dax padded:size={size}"));
    // A loop device has all of its file.
    place
        .run(&format!("table padded:size={size}"))
        .code(1)
        .stderr(contains("only a block device takes :size=BYTES"));
}

/// Over other layers, zeros are left out where the layers below read as zeros, whether they are in a hole of the
/// image or not. With --dax, they are stored, and a warning says how many they are.
fn disks_that_lost_their_holes() {
    let place = Place::new();
    let mut disk = noise(65_536, 6);
    place.write("base.raw", &disk);
    let file = fs::OpenOptions::new()
        .write(true)
        .open(place.path("base.raw"));
    file.unwrap().set_len(20 << 20).unwrap();
    place.ok("create --image base.raw --dax base");
    disk.resize(20 << 20, 0);
    disk[4096..8192].fill(1);
    place.write("disk.raw", &disk);
    let data = |layer: &str| {
        let info = place.json(&format!("info --json {layer}"));
        info[0]["lsmt"]["data_size"].as_u64().unwrap()
    };
    place.ok("create --base base --image disk.raw upper");
    assert_eq!(data("upper"), 4096);
    assert!(place.dump("base upper") == disk);
    let zeros = (20 << 20) - 65_536;
    for (base, stored) in [("--base base", zeros + 4096), ("", 20 << 20)] {
        place
            .run(&format!(
                "create --force {base} --image disk.raw --dax upper"
            ))
            .success()
            .stderr(
                contains(format!("warning: disk.raw: {zeros} bytes (")).and(contains(
                    "are zeros for which the image has no hole, and --dax stores these",
                )),
            );
        assert_eq!(data("upper"), stored);
    }
}

fn create_and_dump() {
    let place = Place::new();
    place.write("disk.raw", &image());
    for options in [
        "",
        "--tar",
        "--algorithm zstd --block-size 64k --level 9",
        "--algorithm none",
        "--algorithm none --tar",
        "--no-crc --skip-zeros --level 9",
        "--threads 1 --granularity 512",
    ] {
        place
            .run(&format!(
                "create --force --raw --image disk.raw layer.obd {options}"
            ))
            .success()
            .stdout("")
            .stderr("");
        place
            .run("dump layer.obd")
            .success()
            .stdout(predicate::eq(image()));
        place
            .run("dump --force --sparse layer.obd -o out.raw")
            .success();
        assert!(place.read("out.raw") == image(), "{options}");
        place
            .run("verify layer.obd")
            .success()
            .stdout("layer.obd: ok\n");
    }
    let whole = place.run("dump --whole-sectors layer.obd").success();
    assert_eq!(whole.get_output().stdout.len() % 512, 0);
    place
        .run("dump layer.obd --offset 300000 --length 3")
        .success()
        .stdout("the");
    assert_eq!(place.names(), ["disk.raw", "layer.obd", "out.raw"]);
}

fn differences() {
    let place = Place::new();
    let mut changed = image();
    place.write("disk.raw", &changed);
    changed[..8192].fill(0);
    changed[120_000..120_100].fill(1);
    changed.extend_from_slice(b" of a larger disk");
    place.write("changed.raw", &changed);
    let uuid = "00000000-0000-4000-8000-0000000000ab";
    place
        .run(&format!(
            "create --raw --image disk.raw base.obd --uuid {uuid}"
        ))
        .success();
    place
        .run("create --base base.obd --raw --image changed.raw --grow top.obd --user-tag top")
        .success();
    let dump = place.run("dump base.obd top.obd").success();
    assert!(dump.get_output().stdout == changed);

    let info = place.json("info --json base.obd top.obd");
    assert_eq!(info[0]["lsmt"]["uuid"], uuid.to_uppercase());
    assert_eq!(info[1]["lsmt"]["parent_uuid"], uuid.to_uppercase());
    assert_eq!(info[1]["lsmt"]["user_tag"], "top");
    assert_eq!(info[1]["lsmt"]["zeroed_size"], 8192);
    assert!(info[1]["lsmt"]["data_size"].as_u64().unwrap() <= 16384);

    place.run("verify base.obd top.obd").success().stderr("");
    place
        .run("verify top.obd base.obd")
        .code(3)
        .stderr(contains(
            "top.obd: was made over a layer with UUID 00000000-",
        ));
    let report = place.json("verify --json base.obd top.obd");
    assert_eq!(report["ok"], true);
    assert_eq!(report["virtual_size"], changed.len());
}

/// Runs `create --dax` for a directory with a file, and checks that it is refused with the message `said`.
fn no_dax(options: &str, said: &str) {
    let place = Place::new();
    fs::create_dir(place.path("rootfs")).unwrap();
    place.write("rootfs/file", b"some text");
    place
        .run(&format!("create --directory rootfs --dax {options} out"))
        .code(1)
        .stderr(contains(said));
    assert_eq!(place.names(), ["rootfs"]);
}

fn ext4_that_has_no_dax() {
    let said = "this ext4 has blocks of 1024 bytes: leave out the --mkfs-arg for its blocks";
    no_dax("--fs ext4 --mkfs-arg=-b1024", said);
    let said = "this ext4 has inline_data: leave out the --mkfs-arg for that";
    no_dax("--fs ext4 --mkfs-arg=-Oinline_data", said);
    let place = Place::new();
    fs::create_dir(place.path("rootfs")).unwrap();
    place.ok("create --directory rootfs --dax --fs ext4 --mkfs-arg=-m1 out");
    place.ok("verify --dax out");
}

fn erofs_that_has_no_dax() {
    no_dax(
        "--fs erofs --mkfs-arg=-b1024",
        "this erofs has blocks of 1024 bytes: leave out the --mkfs-arg for its blocks",
    );
    let said = "needs a file system without compression, and this erofs has it";
    for arg in [
        "-zlz4",
        "-zlz4hc",
        "-zlz4hc --mkfs-arg=-Efragments",
        "-zlz4hc --mkfs-arg=-Ededupe",
        "-zlz4 --mkfs-arg=-Elegacy-compress",
    ] {
        no_dax(&format!("--fs erofs --mkfs-arg={arg}"), said);
    }
    // With data beside its inode, the file would share a block with it: the layer would be smaller by a block.
    let place = Place::new();
    fs::create_dir(place.path("rootfs")).unwrap();
    place.write("rootfs/file", &noise(100, 1));
    let create = "create --directory rootfs --fs erofs --mkfs-arg=";
    place.ok(&format!("{create}-Einline_data beside"));
    place.ok(&format!("{create}-Einline_data --dax apart"));
    let size = |layer| place.dump(layer).len();
    assert!(size("beside") < size("apart"));
}

/// Inodes of 128 bytes have times up to 2038. A later time becomes the last one, and a warning names the file.
fn times_in_small_inodes() {
    let place = Place::new();
    fs::create_dir(place.path("rootfs")).unwrap();
    let since_1970 = |seconds| std::time::UNIX_EPOCH + Duration::from_secs(seconds);
    for (name, seconds) in [("early", 1), ("last", 0x7fff_ffff), ("late", 0x8000_0000)] {
        let file = fs::File::create(place.path("rootfs").join(name)).unwrap();
        file.set_modified(since_1970(seconds)).unwrap();
    }
    let root = fs::File::open(place.path("rootfs")).unwrap();
    root.set_modified(since_1970(1)).unwrap();
    let create = |options: &str| {
        place.run(&format!(
            "create --force --directory rootfs --fs ext4 {options} out"
        ))
    };
    create("--mkfs-arg=-I128").success().stderr(contains(
        "obdsetup: warning: inodes of 128 bytes cannot hold times after 2038-01-19: 1 file changed to the nearest time \
         possible: ./late\n",
    ));
    place.ok("export --force -o disk.raw out");
    let time = |name: &str| {
        let command = format!("stat /{name}");
        let said = place.output_of("debugfs", &["-R", &command, "disk.raw"]);
        let said = String::from_utf8(said).unwrap();
        let line = said
            .lines()
            .find_map(|line| line.trim_start().strip_prefix("mtime: "));
        line.unwrap().split_whitespace().next().unwrap().to_owned()
    };
    let times = ["early", "last", "late"].map(time);
    assert_eq!(times, ["0x00000001", "0x7fffffff", "0x7fffffff"]);
    // Without the option, the time is kept.
    create("").success().stderr("");
    let half = since_1970(1) + Duration::from_millis(500);
    root.set_modified(half).unwrap();
    let file = fs::File::options()
        .write(true)
        .open(place.path("rootfs/early"));
    file.unwrap().set_modified(half).unwrap();
    create("--mkfs-arg=-I128").success().stderr(contains(
        "inodes of 128 bytes cannot hold fractions of a second in times: 2 files rounded down: ./ ./early\n",
    ));
}

fn create_from_a_directory() {
    let place = Place::new();
    fs::create_dir(place.path("rootfs")).unwrap();
    place.write("rootfs/file", b"what is in the file");
    place
        .run("create --directory rootfs --fs ext4 --size 4m layer.obd")
        .success();
    let disk = place.dump("layer.obd");
    assert_eq!(disk.len(), 4 << 20);
    // The field is log2 of the block size, minus 10. A file system of 4 MiB gets blocks of 1 KiB: with
    // blocks of 4 KiB, mkfs.ext4 would give it no journal.
    let block_size = |disk: &[u8]| disk[1024 + 24];
    assert_eq!(block_size(&disk), 0);
    for (args, expected) in [("", 2), ("--mkfs-arg=-b1024", 0)] {
        place
            .run(&format!(
                "create --directory rootfs --fs ext4 --size 8m {args} layer.obd --force"
            ))
            .success();
        assert_eq!(block_size(&place.dump("layer.obd")), expected);
    }
    assert!(disk
        .windows(19)
        .any(|bytes| bytes == b"what is in the file"));
    // Without --size, the size is estimated. There are enough blocks and inodes for many small files.
    place.write("rootfs/noise", &noise(20 << 20, 5));
    for n in 0..3000 {
        place.write(&format!("rootfs/{n}"), b"");
    }
    place
        .run("create --directory rootfs --fs ext4 large.obd")
        .success()
        .stderr("");
    let disk = place.dump("large.obd");
    assert!(disk.len() > 64 << 20 && disk.len() < 256 << 20);
    // Free space is not in the layer.
    assert!(place.read("large.obd").len() < 25 << 20);
    place.write("disk.raw", &disk);
    let said = place.output_of("debugfs", &["-R", "stat /2999", "disk.raw"]);
    assert!(String::from_utf8_lossy(&said).contains("Type: regular"));
    place
        .run("create --directory rootfs --fs ext4 --size 4m small.obd")
        .code(1)
        .stderr(starts_with(
            "obdsetup: cannot make a file system: too small for these files: give a larger --size, or none, so that \
             it is estimated: mkfs.ext4 failed",
        ));
    assert_eq!(
        place.names(),
        ["disk.raw", "large.obd", "layer.obd", "rootfs"]
    );
    // A tree with a name that mke2fs makes itself.
    fs::create_dir_all(place.path("tree/lost+found")).unwrap();
    place.write("tree/lost+found/file", b"found");
    place.ok("create --directory tree --fs ext4 found.obd");
    place.write("disk.raw", &place.dump("found.obd"));
    let said = place.output_of("debugfs", &["-R", "cat /lost+found/file", "disk.raw"]);
    assert_eq!(said, b"found");
    fs::remove_dir_all(place.path("tree/lost+found")).unwrap();
    place.write("tree/lost+found", b"a file");
    let done = place
        .run("create --directory tree --fs ext4 lost.obd")
        .code(1);
    done.stderr(starts_with(
        "obdsetup: cannot make a file system: ./lost+found: is no directory, and ext2, ext3 and ext4 need one",
    ));
}

fn commit() {
    let place = Place::new();
    place.write("disk.raw", &image());
    place
        .run("create --raw --image disk.raw plain.lsmt --algorithm none")
        .success();
    place
        .run("commit plain.lsmt a.obd --algorithm zstd --tar")
        .success();
    place.run("commit a.obd b.lsmt --algorithm none").success();
    assert!(place.read("b.lsmt") == place.read("plain.lsmt"));
    place
        .run("commit a.obd c.lsmt --algorithm none --compact")
        .success();
    assert!(place.read("c.lsmt") == place.read("plain.lsmt"));
    place.run("commit a.obd d.obd --user-tag new").success();
    let info = place.json("info --json d.obd");
    assert_eq!(info[0]["lsmt"]["user_tag"], "new");
    assert_eq!(info[0]["zfile"]["algorithm"], "lz4");
    assert_eq!(info[0]["tar"], serde_json::Value::Null);
    // dump --zfile writes the original file of the ZFile, which is the LSMT file, and not the disk.
    place.run("dump --zfile a.obd -o e.lsmt").success();
    assert!(place.read("e.lsmt") == place.read("plain.lsmt"));
    place
        .run("dump --zfile plain.lsmt")
        .code(3)
        .stderr("obdsetup: plain.lsmt: not a ZFile\n");
}

fn merge() {
    let place = Place::new();
    // a: text in the first half. b: a with zeros over some text. c: b, changed and larger.
    let a = image();
    let mut b = a.clone();
    b[..40_960].fill(0);
    b[200_000..200_100].fill(2);
    let mut c = b.clone();
    c[8192..12_288].fill(3);
    c.extend_from_slice(&noise(20_000, 4));
    for (name, disk) in [("a", &a), ("b", &b), ("c", &c)] {
        place.write(&format!("{name}.raw"), disk);
    }
    let [base, middle, top] = ["1", "2", "3"].map(|n| format!("00000000-0000-4000-8000-{n:0>12}"));
    place
        .run(&format!("create --raw --image a.raw a --uuid {base}"))
        .success();
    place
        .run(&format!(
            "create --base a --raw --image b.raw b --uuid {middle} --algorithm zstd"
        ))
        .success();
    place
        .run(&format!(
            "create --base a --base b --raw --image c.raw --grow c --uuid {top} --tar"
        ))
        .success();

    place
        .run("merge -o all a b c")
        .success()
        .stdout("")
        .stderr("");
    place.run("merge -o upper b c --algorithm none").success();
    place.run("merge -o lower a b --tar").success();
    place
        .run("merge -o lowest b c --lowest")
        .code(3)
        .stderr(contains("no layer is below it"));
    place
        .run("merge -o lowest b c --lowest --ignore-identity")
        .success()
        .stderr(contains("warning: b: was made over"));
    for stack in ["a b c", "all", "a upper", "lower c", "a b all"] {
        assert!(place.dump(stack) == c, "{stack}");
    }
    assert!(place.dump("c all --ignore-identity") == c);
    // Zeroed segments are kept if a layer may be below the result, and dropped with --lowest.
    let info = place.json("info --json upper lowest all lower");
    assert_eq!(info[0]["lsmt"]["zeroed_size"], 40_960 - 4096);
    assert_eq!(info[1]["lsmt"]["zeroed_size"], 0);
    assert_eq!(info[2]["lsmt"]["virtual_size"], c.len());
    assert!(place.dump("lowest") == place.dump("upper --ignore-identity"));
    assert!(place.dump("a lowest") != c);
    // The UUIDs of the results fit those of the other layers.
    assert_eq!(info[0]["lsmt"]["uuid"], top);
    assert_eq!(info[0]["lsmt"]["parent_uuid"], base);
    assert_eq!(info[3]["tar"]["data_offset"], 1536);
    place.run("verify a upper").success().stderr("");
    place.run("verify lower c").success().stderr("");

    place
        .run("merge -o x c b")
        .code(3)
        .stderr(contains("b: was made over a layer with UUID"));
    place
        .run("merge -o c a b c")
        .code(1)
        .stderr(contains("is an input as well"));
    place.run("merge -o all a b c").code(5);
    place
        .run("merge a b c")
        .code(1)
        .stderr(contains("--output"));
    place.run("merge -o y a.raw").code(3);
    assert!(!place.names().contains(&"y".to_owned()));
}

fn export() {
    let place = Place::new();
    let a = image();
    let mut b = a.clone();
    b[..40_960].fill(0);
    // A hole, and data after it.
    b.resize(9 << 20, 0);
    b.extend_from_slice(b"far away");
    place.write("a.raw", &a);
    place.write("b.raw", &b);
    place.run("create --raw --image a.raw a").success();
    place
        .run("create --base a --raw --image b.raw --grow b")
        .success();
    let blocks = |name: &str| {
        use std::os::unix::fs::MetadataExt;
        place.path(name).metadata().unwrap().blocks() * 512
    };
    place.run("export -o x a b").success().stdout("").stderr("");
    assert!(place.read("x") == b);
    assert!(blocks("x") < 1 << 20, "{}", blocks("x"));
    place.run("export --no-sparse -o y a b").success();
    assert!(place.read("y") == b);
    assert!(blocks("y") >= 9 << 20, "{}", blocks("y"));
    let out = place.run("export -o - a b").success();
    assert!(out.get_output().stdout == b);

    place.run("export -o x a").code(5);
    place.run("export --force -o a a b").code(1);
    place.run("export a b").code(1);
    place.run("export --force -o x a").success();
    assert!(place.read("x") == a);
    // If export fails, the old file stays, also with --force.
    let mut bad = place.read("a");
    bad[2000] ^= 1;
    place.write("bad", &bad);
    place.run("export --force -o x bad").code(3);
    assert!(place.read("x") == a);
    assert_eq!(place.names(), ["a", "a.raw", "b", "b.raw", "bad", "x", "y"]);
}

fn stacks_of_containerd() {
    let place = Place::new();
    let a = image();
    let mut b = a.clone();
    b[..40_960].fill(0);
    place.write("a.raw", &a);
    place.write("b.raw", &b);
    fs::create_dir_all(place.path("stack/1")).unwrap();
    place
        .run("create --raw --image a.raw stack/a.obd")
        .success();
    place
        .run("create --base stack/a.obd --raw --image b.raw stack/1/overlaybd.commit")
        .success();
    let config = |text: &str| place.write("stack/config.v1.json", text.as_bytes());
    // config.v1.json as the snapshotter writes it. A relative name is relative to its directory.
    let dir = place.path("stack/1");
    config(&format!(
        r#"{{"repoBlobUrl":"https://registry/v2/app/blobs","lowers":[{{"file":"a.obd"}},
            {{"digest":"sha256:12","size":7,"dir":"{}"}}],"upper":{{}},"resultFile":"/x"}}"#,
        dir.display()
    ));
    let files = "stack/a.obd stack/1/overlaybd.commit";
    assert!(place.dump("stack/config.v1.json") == b);
    assert!(place.dump(files) == b);
    place.run("export -o x stack/config.v1.json").success();
    assert!(place.read("x") == b);
    place.run("merge -o y stack/config.v1.json").success();
    assert!(place.dump("y") == b);
    let report = place.json("verify --json stack/config.v1.json");
    assert_eq!(report["layers"].as_array().unwrap().len(), 2);
    let info = place.json("info --json stack/config.v1.json");
    assert_eq!(info[0]["path"], "stack/a.obd");
    assert_eq!(info[1]["lsmt"]["zeroed_size"], 40_960);
    let table = place.run("table stack/config.v1.json").success();
    let table = String::from_utf8(table.get_output().stdout.clone()).unwrap();
    assert!(
        table.contains("LOOP(stack/a.obd)") && table.contains(" lsmt 2 "),
        "{table}"
    );
    place
        .run("create --base stack/config.v1.json --raw --image a.raw z")
        .success();
    assert!(place.dump("stack/config.v1.json z") == a);
    place
        .run("export --force -o stack/config.v1.json stack/config.v1.json")
        .code(1);

    for (text, code, said) in [
        ("{", 3, "not a config.v1.json: "),
        ("{}", 1, "lists no layers"),
        (
            r#"{"lowers":[{"digest":"sha256:12","size":3}]}"#,
            1,
            "layer 0: sha256:12 is in a registry",
        ),
        (
            r#"{"lowers":[{"file":"a.obd"},{"digest":"sha256:34","dir":"/nowhere"}]}"#,
            1,
            "layer 1: sha256:34 is in a registry only: no overlaybd.commit, .commit or overlaybd.sealed in /nowhere",
        ),
        (r#"{"lowers":[{"size":3}]}"#, 1, "layer 0: neither"),
        (
            r#"{"lowers":[{"file":"a.obd","targetFile":"t"}]}"#,
            1,
            "TurboOCI",
        ),
        (
            r#"{"lowers":[{"file":"a.obd"}],"upper":{"index":"i","data":"d"}}"#,
            1,
            "writable layer",
        ),
        (
            r#"{"lowers":[{"file":"gone"}]}"#,
            4,
            "layer 0: stack/gone does not exist\n",
        ),
        (
            r#"{"lowers":[{"file":"/old/a.obd"}]}"#,
            4,
            "layer 0: /old/a.obd does not exist, but stack/a.obd does: if the directory was moved",
        ),
        (
            &format!(r#"{{"lowers":[{{"file":"{}"}}]}}"#, "x/".repeat(10_000)),
            4,
            "... (20006 bytes) is longer than the 4095 bytes",
        ),
        (
            &format!(
                r#"{{"lowers":[{}{{"file":"gone"}}]}}"#,
                r#"{"file":"a.obd"},"#.repeat(255)
            ),
            1,
            "lists 256 layers, expected 1 to 255",
        ),
    ] {
        config(text);
        place
            .run("dump stack/config.v1.json")
            .code(code)
            .stdout("")
            .stderr(contains(said).and(starts_with("obdsetup: stack/")));
    }
}

fn convert_images() {
    let place = Place::new();
    place.write("disk.raw", &image());
    place
        .run("convert disk.raw a.obd --from raw --algorithm zstd")
        .success()
        .stdout("")
        .stderr("");
    assert!(place.dump("a.obd") == image());
    assert_eq!(
        place.json("info --json a.obd")[0]["zfile"]["algorithm"],
        "zstd"
    );
    place.run("convert disk.raw a.obd --from raw").code(5);
    place
        .run("convert a.obd b.obd")
        .code(1)
        .stderr(contains("a.obd: is an OverlayBD layer"));
    place.run("convert a.obd b.obd --from raw").success();
    assert!(place.dump("b.obd") == place.read("a.obd"));
    place
        .run("convert disk.raw c.obd --from raw --fs ext4")
        .code(1)
        .stderr(contains("is no directory or tar"));
    place.write("x.gz", b"\x1f\x8b\x08 and so on");
    place
        .run("convert x.gz c.obd")
        .code(3)
        .stderr(contains("x.gz: the gzip data is damaged"));

    // If qemu-img is not installed, the message names it.
    place.write("x.qcow2", b"QFI\xfb\0\0\0\x03");
    let installed = ["/usr/local/bin", "/usr/bin", "/bin"];
    if !installed
        .iter()
        .any(|at| Path::new(at).join("qemu-img").exists())
    {
        place
            .command("convert x.qcow2 c.obd")
            .env("PATH", "/nonexistent")
            .assert()
            .code(1)
            .stderr("obdsetup: qemu-img is not installed; it is needed for qcow2 images\n");
    }
    // A script in place of qemu-img, which writes its arguments to a file and copies disk.raw.
    place.script(
        "qemu-img",
        "[ $1 != info ] || exec echo '{\"virtual-size\": 512}'\necho \"$@\" >called\nexec cp disk.raw \"$7\"",
    );
    let path = format!(
        "{}:{}",
        place.dir().display(),
        std::env::var("PATH").unwrap()
    );
    place
        .command("convert x.qcow2 c.obd")
        .env("PATH", path)
        .assert()
        .success();
    let called = String::from_utf8(place.read("called")).unwrap();
    let from = place.path("x.qcow2").canonicalize().unwrap();
    let wanted = format!("convert -f qcow2 -O raw {} ", from.display());
    assert!(
        called.starts_with(&wanted) && called.contains("/.obdsetup-"),
        "{called}"
    );
    assert!(place.dump("c.obd") == image());
    assert!(place.names().iter().all(|name| !name.starts_with('.')));
}

fn convert_with_qemu_img() {
    let place = Place::new();
    let mut disk = image();
    disk.resize(1 << 20, 0);
    place.write("disk.raw", &disk);
    for format in ["qcow2", "vmdk", "vhdx", "vdi"] {
        place.tool(&format!("qemu-img convert -O {format} disk.raw disk"));
        place.run("convert disk layer.obd --force").success();
        let found = place.dump("layer.obd");
        assert!(found[..disk.len()] == disk, "{format}");
        assert!(
            found[disk.len()..].iter().all(|&byte| byte == 0),
            "{format}"
        );
    }
    place.write("disk", b"QFI\xfb\0\0\0\x03 and no more");
    place
        .run("convert disk other.obd")
        .code(3)
        .stderr(starts_with("obdsetup: disk: cannot read: qemu-img failed"));
    assert_eq!(place.names(), ["disk", "disk.raw", "layer.obd"]);
}

/// Returns a place with the directory `rootfs` and two tars of it, and the content of `sub/file`.
fn with_rootfs() -> (Place, Vec<u8>) {
    let place = Place::new();
    fs::create_dir_all(place.path("rootfs/sub")).unwrap();
    let content = noise(100_000, 9);
    place.write("rootfs/sub/file", &content);
    place.write("rootfs/text", b"what is in the file");
    for args in ["-cf rootfs.tar", "-czf rootfs.tar.gz"] {
        place.tool(&format!("tar {args} -C rootfs ."));
    }
    (place, content)
}

const ROOTFS: [&str; 3] = ["rootfs", "rootfs.tar", "rootfs.tar.gz"];

fn convert_to_ext4() {
    let (place, content) = with_rootfs();
    for from in ROOTFS {
        place
            .run(&format!("convert {from} layer.obd --force"))
            .success()
            .stdout("");
        place.write("disk.raw", &place.dump("layer.obd"));
        place.write("script", b"dump /sub/file out\nstat /\n");
        let said = place.tool("debugfs -f script disk.raw");
        assert!(place.read("out") == content, "{from}");
        // The root directory has the usual mode, not that of a temporary directory.
        assert!(said.contains("Mode:  0755"), "{from}: {said}");
        place.tool("e2fsck -fn disk.raw");
    }
}

fn convert_to_erofs() {
    let (place, content) = with_rootfs();
    for from in ROOTFS {
        place
            .run(&format!("convert {from} layer.obd --force --fs erofs"))
            .success();
        place.write("disk.raw", &place.dump("layer.obd"));
        let _ = fs::remove_dir_all(place.path("out.dir"));
        place.tool("fsck.erofs --extract=out.dir disk.raw");
        assert!(place.read("out.dir/sub/file") == content, "{from}");
        assert_eq!(place.read("out.dir/text"), b"what is in the file");
    }
}

/// With --mkfs-arg, mkfs.erofs makes the file system, not obdsetup itself.
fn convert_to_erofs_by_its_program() {
    let (place, content) = with_rootfs();
    place.write(
        "rootfs/long",
        &b"the same again, and so it is small\n".repeat(9000),
    );
    place.tool("tar -cf rootfs.tar -C rootfs .");
    place.ok("create --directory rootfs --fs erofs plain.obd --algorithm none");
    let mut layers = Vec::new();
    for from in ROOTFS.iter().filter(|from| !from.ends_with(".gz")) {
        place.ok(&format!(
            "convert {from} layer.obd --force --fs erofs --mkfs-arg=-zlz4hc --algorithm none"
        ));
        layers.push(place.read("layer.obd"));
        place.write("disk.raw", &place.dump("layer.obd"));
        let _ = fs::remove_dir_all(place.path("out.dir"));
        place.tool("fsck.erofs --extract=out.dir disk.raw");
        for name in ["sub/file", "text", "long"] {
            let found = place.read(&format!("out.dir/{name}"));
            assert!(
                found == place.read(&format!("rootfs/{name}")),
                "{from}: {name}"
            );
        }
        assert_eq!(place.read("out.dir/sub/file"), content);
    }
    // mkfs.erofs has compressed the files.
    assert!(layers[0].len() + 200_000 < place.read("plain.obd").len());
    place
        .run("convert rootfs x.obd --fs erofs --mkfs-arg=--no-such-option")
        .code(1)
        .stderr(contains("mkfs.erofs failed").and(contains("no-such-option")));
    assert!(place
        .names()
        .iter()
        .all(|name| !name.starts_with('.') && name != "x.obd"));
}

fn failed_conversions_leave_nothing() {
    let place = Place::new();
    fs::create_dir(place.path("rootfs")).unwrap();
    place
        .run("convert rootfs x.obd --fs erofs --size 1g")
        .code(1)
        .stderr(contains("erofs takes no --size"));
    place
        .run("convert rootfs x.obd --fs btrfs --mkfs-arg=--mixed")
        .code(1)
        .stderr(contains("--mkfs-arg=--mixed: obdsetup writes btrfs itself"));
    place.write("bad.tar.gz", b"\x1f\x8b\x08 and no more");
    place
        .run("convert bad.tar.gz x.obd --fs erofs")
        .code(3)
        .stderr(contains("bad.tar.gz: the gzip data is damaged"));
    assert_eq!(place.names(), ["bad.tar.gz", "rootfs"]);
}

/// An OCI image layout.
struct Layout<'a>(&'a Place);

impl Layout<'_> {
    /// Adds a blob. Returns its descriptor, to which the fields in `more` are added.
    fn blob(&self, bytes: &[u8], more: &str) -> String {
        use sha2::Digest;
        let hex = format!("{:x}", sha2::Sha256::digest(bytes));
        fs::create_dir_all(self.0.path("layout/blobs/sha256")).unwrap();
        self.0.write(&format!("layout/blobs/sha256/{hex}"), bytes);
        format!(
            r#"{{"digest":"sha256:{hex}","size":{}{more}}}"#,
            bytes.len()
        )
    }

    fn manifest(&self, layers: &[String], more: &str) -> String {
        let text = format!(r#"{{"schemaVersion":2,"layers":[{}]}}"#, layers.join(","));
        let kind = r#","mediaType":"application/vnd.oci.image.manifest.v1+json""#;
        self.blob(text.as_bytes(), &format!("{kind}{more}"))
    }

    fn index(&self, manifests: &[String]) {
        let text = format!(
            r#"{{"schemaVersion":2,"manifests":[{}]}}"#,
            manifests.join(",")
        );
        self.0.write("layout/index.json", text.as_bytes());
        self.0
            .write("layout/oci-layout", br#"{"imageLayoutVersion":"1.0.0"}"#);
    }
}

fn convert_oci_images() {
    let place = Place::new();
    let a = image();
    let mut b = a.clone();
    b[..40_960].fill(0);
    place.write("a.raw", &a);
    place.write("b.raw", &b);
    place.run("create --raw --image a.raw a --tar").success();
    place.run("create --base a --raw --image b.raw b").success();
    let layout = Layout(&place);
    let layers = [
        layout.blob(&place.read("a"), ""),
        layout.blob(&place.read("b"), ""),
    ];
    layout.index(&[layout.manifest(&layers, "")]);

    place
        .run("convert layout app")
        .success()
        .stdout("")
        .stderr("");
    assert_eq!(
        names(&place.path("app")),
        ["config.v1.json", "layer0.obd", "layer1.obd"]
    );
    assert!(place.read("app/layer0.obd") == place.read("a"));
    assert!(place.dump("app/config.v1.json") == b);
    let config: serde_json::Value =
        serde_json::from_slice(&place.read("app/config.v1.json")).unwrap();
    let file = config["lowers"][1]["file"].as_str().unwrap();
    assert!(Path::new(file).is_absolute() && file.ends_with("app/layer1.obd"));
    place.run("convert layout app").code(5);
    place.run("convert layout app --force").code(1);
    for option in ["--tar", "--algorithm lz4", "--threads 1", "--user-tag x"] {
        place
            .run(&format!("convert layout new {option}"))
            .code(1)
            .stderr(contains("layout: is "));
    }

    // An index with two entries: another index, which has two images and an attestation; and an image.
    let name =
        |name: &str| format!(r#","annotations":{{"org.opencontainers.image.ref.name":"{name}"}}"#);
    let platform =
        |os: &str, arch: &str| format!(r#","platform":{{"os":"{os}","architecture":"{arch}"}}"#);
    let one = layout.manifest(&layers[..1], &platform("linux", "arm64"));
    let two = layout.manifest(&layers, &platform("linux", "amd64"));
    let proof = layout.manifest(&[], &platform("unknown", "unknown"));
    let inner = format!(r#"{{"manifests":[{one},{two},{proof}]}}"#);
    let kind = r#","mediaType":"application/vnd.oci.image.index.v1+json""#;
    let inner = layout.blob(inner.as_bytes(), &format!("{kind}{}", name("v1")));
    layout.index(&[inner, layout.manifest(&layers[..1], &name("v2"))]);
    place
        .run("convert layout x")
        .code(1)
        .stderr(contains("several images").and(contains("v1 linux/arm64 sha256:")));
    place
        .run("convert layout x --ref v3")
        .code(1)
        .stderr(contains("no such image"));
    place.run("convert layout x --ref v2").success();
    assert!(place.dump("x/config.v1.json") == a);
    place
        .run("convert layout y --ref v1 --platform linux/amd64")
        .success();
    assert!(place.dump("y/config.v1.json") == b);

    let arm = |layers: &[String], variant: &str| {
        let kind = r#","platform":{"os":"linux","architecture":"arm","variant":"X"}"#;
        layout.manifest(layers, &kind.replace('X', variant))
    };
    layout.index(&[arm(&layers[..1], "v6"), arm(&layers, "v7")]);
    place
        .run("convert layout v7 --platform linux/arm")
        .code(1)
        .stderr(contains("linux/arm/v6 sha256:"));
    place
        .run("convert layout v7 --platform linux/arm/v7")
        .success();
    fs::remove_dir_all(place.path("v7")).unwrap();

    // If an index is named many times, it is read once, and its image counts once.
    let mut inner = layout.manifest(&layers, &platform("linux", "arm64"));
    for _ in 0..60 {
        let text = format!(r#"{{"manifests":[{}]}}"#, vec![inner; 50].join(","));
        inner = layout.blob(text.as_bytes(), kind);
    }
    layout.index(&vec![inner; 50]);
    place.run("convert layout bombed").success();
    fs::remove_dir_all(place.path("bombed")).unwrap();
    layout.index(&[]);
    place
        .run("convert layout none")
        .code(3)
        .stderr(contains("layout: has no images"));

    // With a wrong layer, convert fails and leaves no directory.
    let turbo =
        r#","annotations":{"containerd.io/snapshot/overlaybd/turbo-oci/target-digest":"x"}"#;
    let wrong = layout
        .blob(b"wrong", "")
        .replace("\"size\":5", "\"size\":6");
    // A blob that is a symbolic link to an endless device, and one whose name is a wrong digest.
    let linked = "1".repeat(64);
    let blobs = place.path("layout/blobs/sha256");
    std::os::unix::fs::symlink("/dev/zero", blobs.join(&linked)).unwrap();
    let device = format!(r#"{{"digest":"sha256:{linked}","size":4096}}"#);
    let renamed = "2".repeat(64);
    fs::write(blobs.join(&renamed), place.read("a")).unwrap();
    let size = place.read("a").len();
    let same_size = format!(r#"{{"digest":"sha256:{renamed}","size":{size}}}"#);
    let escape = r#"{"digest":"sha256:../../../a","size":3}"#.to_owned();
    for (layer, code, said) in [
        (
            layout.blob(b"a tar, say", ""),
            3,
            "is not an OverlayBD layer",
        ),
        (
            layout.blob(&place.read("a"), turbo),
            1,
            "is a TurboOCI layer",
        ),
        (wrong, 3, "is not what its digest and size say"),
        (device, 3, "is not what its digest and size say"),
        (same_size, 3, "is not what its digest and size say"),
        (escape, 3, "expected SHA-256"),
    ] {
        layout.index(&[layout.manifest(&[layer], "")]);
        place
            .run("convert layout z")
            .code(code)
            .stderr(contains(said));
    }
    assert_eq!(
        place.names(),
        ["a", "a.raw", "app", "b", "b.raw", "layout", "x", "y"]
    );
}

fn hostile_names_and_files() {
    let place = Place::with_layer();
    place.tool("mkfifo fifo");
    for command in [
        "info fifo",
        "convert fifo out",
        "create --image fifo out",
        "dump /dev/zero",
        "verify .",
    ] {
        place
            .run(command)
            .code(1)
            .stdout("")
            .stderr(contains("not a file or block device"));
    }
    // --force replaces regular files only.
    fs::create_dir(place.path("dir")).unwrap();
    for command in [
        "create --force --raw --image disk.raw fifo",
        "commit --force layer.obd dir",
        "export --force -o fifo layer.obd",
    ] {
        place
            .run(command)
            .code(1)
            .stderr(contains("exists, and is not a regular file"));
    }
    // If the output is a symbolic link, the link stays, and its target is replaced.
    std::os::unix::fs::symlink("../target", place.path("dir/link")).unwrap();
    place.write("target", b"old");
    place.run("commit layer.obd dir/link").code(5);
    place.run("commit --force layer.obd dir/link").success();
    assert!(place.path("dir/link").is_symlink());
    assert!(place.dump("target") == image());
    // The output cannot be in the directory that it is made from.
    place
        .run("convert dir dir/out")
        .code(1)
        .stderr(contains("cannot be in the directory"));
    assert_eq!(names(&place.path("dir")), ["link"]);

    // Any bytes may be in a name.
    use std::os::unix::ffi::OsStrExt;
    let name = std::ffi::OsStr::from_bytes(b"\xff.obd");
    fs::copy(place.path("layer.obd"), place.dir().join(name)).unwrap();
    place.command("verify").arg(name).assert().success();
    fs::remove_file(place.dir().join(name)).unwrap();

    // Control characters from a file are escaped, so that the terminal doesn't interpret them.
    let config = r#"{"lowers":[{"digest":"\u001b[31m"}]}"#;
    place.write("x.json", config.as_bytes());
    place
        .run("verify x.json")
        .code(1)
        .stderr(contains("layer 0: \\u{1b}[31m is in a registry only"));
    fs::copy(place.path("layer.obd"), place.path("\u{1b}[31m")).unwrap();
    place.write("x.json", br#"{"lowers":[{"file":"\u001b[31m"}]}"#);
    for command in ["verify", "info"] {
        place
            .run(&format!("{command} x.json"))
            .success()
            .stdout(contains("\\u{1b}[31m: "));
    }
    place.write("x.json", &vec![b' '; 5 << 20]);
    place
        .run("verify x.json")
        .code(3)
        .stderr(contains("more than"));

    // A layer that is cut off is not taken for a disk.
    place.write("cut", &place.read("layer.obd")[..20_000]);
    place
        .run("convert cut out")
        .code(1)
        .stderr(contains("begins as an OverlayBD file does"));
    assert!(!place.path("out").exists());
}

/// A name cannot look like a line of obdsetup's own.
fn line_breaks_in_names() {
    let place = Place::with_layer();
    let (name, shown) = ("x\nobdsetup: forged", "x\\nobdsetup: forged");
    let one_line = || contains(shown).and(contains(name).not());
    fs::copy(place.path("layer.obd"), place.path(name)).unwrap();
    for line in ["verify", "info", "table", "table --concise"] {
        let done = place.command(line).arg(name).assert().success();
        done.stdout(one_line());
    }
    // A wrong argument, as by `obdsetup info *`.
    for name in ["--x\nobdsetup: forged", "x\nobdsetup: forged:size=x"] {
        let done = place.command("info").arg(name).assert().code(1);
        done.stderr(one_line());
    }
    // In an error, and in what another program says.
    for (bytes, code) in [(&b"no disk"[..], 1), (b"QFI\xfb\0\0\0\x03 and no more", 3)] {
        place.write(name, bytes);
        if code == 3 && needs::program("qemu-img").is_some() {
            continue;
        }
        let done = place.command("convert").args([name, "out"]).assert();
        done.code(code).stderr(one_line());
    }
}

/// For tar(1), a name with a colon is on another machine. Here it is a file.
fn a_colon_in_a_name() {
    let place = Place::new();
    place.write("file", b"content");
    place.tool("tar -cf plain.tar file");
    fs::rename(place.path("plain.tar"), place.path("a:b.tar")).unwrap();
    for fs in ["ext4", "erofs"] {
        place.ok(&format!("convert a:b.tar {fs}.obd --fs {fs}"));
    }
}

fn options_that_do_not_apply() {
    let place = Place::with_layer();
    for (command, said) in [
        (
            "create --raw --image disk.raw x --algorithm none --level 3",
            "--level",
        ),
        (
            "create --raw --image disk.raw x --algorithm none --block-size 4k",
            "--block-size",
        ),
        ("merge -o x layer.obd --algorithm none --no-crc", "--no-crc"),
        (
            "create --raw --image disk.raw x --algorithm zstd --level 23",
            "1 to 22",
        ),
        ("create --raw --image disk.raw x --level 13", "1 to 12"),
        ("create --raw --image disk.raw x --threads 0", "1..=1024"),
        (
            "create --raw --image disk.raw x --threads 99999",
            "1..=1024",
        ),
        ("create --image disk.raw x --size 1m", "cannot be used with"),
        ("convert disk.raw x --from raw --ref v1", "is no OCI image"),
        (
            "convert disk.raw x --from raw --platform linux/arm64",
            "is no OCI image",
        ),
        (
            "convert disk.raw x --from raw --size 1m",
            "is no directory or tar",
        ),
        ("dump --sparse layer.obd", "--sparse needs --output"),
        ("table --zfile --lsmt-opt x layer.obd", "--lsmt-opt"),
        ("info layer.obd --size 1", "--size"),
    ] {
        place.run(command).code(1).stdout("").stderr(contains(said));
    }
    let tag = "x".repeat(257);
    place
        .run(&format!("commit layer.obd x --user-tag {tag}"))
        .code(1)
        .stderr(contains("257 bytes, more than 256"));
    for command in ["info", "verify", "dump", "export -o x"] {
        let command = format!("{command} layer.obd:size=1m");
        place.run(&command).code(1);
        let command = command.replace("1m", "512");
        place
            .run(&command)
            .code(3)
            .stderr(contains("it has 512 bytes"));
    }
    assert_eq!(place.names(), ["disk.raw", "layer.obd"]);
}

fn output_that_cannot_be_written() {
    let place = Place::with_layer();
    let full = || fs::File::options().write(true).open("/dev/full").unwrap();
    for line in [
        "info layer.obd",
        "verify layer.obd",
        "table layer.obd",
        "dump layer.obd",
        "export -o - layer.obd",
        "completions bash",
    ] {
        let command = |out: Stdio| {
            std::process::Command::new(cargo_bin!("obdsetup"))
                .current_dir(place.dir())
                .args(line.split_whitespace())
                .stdout(out)
                .output()
                .unwrap()
        };
        let done = command(full().into());
        assert_eq!(done.status.code(), Some(4), "{line}");
        let said = String::from_utf8(done.stderr).unwrap();
        assert!(
            said.starts_with("obdsetup: standard output: cannot write: No space left"),
            "{line}: {said}"
        );
        // If the reader has closed the pipe, there is no message, and the exit code is that of SIGPIPE.
        let (reader, writer) = std::os::unix::net::UnixStream::pair().unwrap();
        drop(reader);
        let done = command(std::os::fd::OwnedFd::from(writer).into());
        assert_eq!(done.status.code(), Some(141), "{line}");
        assert_eq!(done.stderr, b"", "{line}");
    }
    for line in ["--help", "help convert", "convert --help", "--version"] {
        let mut help = std::process::Command::new(cargo_bin!("obdsetup"));
        let help = help.args(line.split(' ')).stdout(full());
        let done = help.output().unwrap();
        assert_eq!(done.status.code(), Some(4), "{line}");
        let said = String::from_utf8(done.stderr).unwrap();
        assert_eq!(
            said, "obdsetup: standard output: cannot write: No space left on device\n",
            "{line}"
        );
    }
    place
        .run("dump -o /dev/full layer.obd")
        .code(4)
        .stderr(starts_with("obdsetup: /dev/full: cannot write: No space"));
    assert_eq!(place.names(), ["disk.raw", "layer.obd"]);
}

/// Files of 8 MiB are in `tree`; the file system with the output has 3 MiB.
fn full_disks() {
    let place = Place::new();
    for name in ["tree", "small"] {
        fs::create_dir(place.path(name)).unwrap();
    }
    place.write("tree/f", &noise(8 << 20, 3));
    place.ok("create --directory tree --fs erofs --algorithm none big.obd");
    place.tool("qemu-img convert -q -f raw -O qcow2 tree/f big.qcow2");
    place.tool("tar --format=ustar -cf big.tar tree");
    for line in [
        "create --directory tree --fs ext4 small/o",
        "create --directory tree --fs ext4 --size 64m small/o",
        "create --directory tree --fs btrfs small/o",
        "create --directory tree --fs erofs small/o",
        "create --directory tree --fs erofs --mkfs-arg=-zlz4 small/o",
        "create --directory tree --fs squashfs small/o",
        "convert big.tar small/o",
        "convert big.qcow2 small/o",
        "export -o small/o big.obd",
        "export --to qcow2 -o small/o big.obd",
        "export --to qcow2 --chain -o small/o big.obd",
        "commit --algorithm none big.obd small/o",
    ] {
        let script = format!(
            "mount -t tmpfs -o size=3m none small || exit; '{}' {line}; code=$?; ls -A small; exit $code",
            cargo_bin!("obdsetup").display()
        );
        let done = std::process::Command::new("unshare")
            .args(["--mount", "sh", "-c", &script])
            .current_dir(place.dir())
            .output()
            .unwrap();
        let said = String::from_utf8(done.stderr).unwrap();
        assert_eq!(done.status.code(), Some(4), "{line}: {said}");
        assert_eq!(done.stdout, b"", "{line}");
        assert!(said.contains("obdsetup: small"), "{line}: {said}");
        assert!(said.contains("No space left on device"), "{line}: {said}");
        // Another size does not help, and nobody knows the name of a temporary file.
        for not in ["--size", ".obdsetup-"] {
            assert!(!said.contains(not), "{line}: {said}");
        }
    }
}

fn files_beyond_the_limit_of_the_shell() {
    let place = Place::new();
    fs::create_dir(place.path("tree")).unwrap();
    place.write("tree/f", &noise(1 << 20, 3));
    let script = format!(
        "ulimit -f 1000; exec '{}' create --directory tree --fs erofs o",
        cargo_bin!("obdsetup").display()
    );
    Command::new("sh")
        .args(["-c", &script])
        .current_dir(place.dir())
        .assert()
        .code(4)
        .stderr(contains("File too large"));
    assert_eq!(place.names(), ["tree"]);
}

/// What can be taken for a layer or an image, but isn't one.
fn inputs_of_other_kinds() {
    let place = Place::with_layer();
    fs::create_dir_all(place.path("tree")).unwrap();
    place.write("tree/empty", b"");
    place.write("tree/text", &b"text ".repeat(1000));
    for (tar, files) in [("a.tar", "empty text"), ("b.tar", "text"), ("c.tar", ".")] {
        place.tool(&format!("tar -C tree -cf {tar} {files}"));
        for command in ["info", "verify", "export -o x"] {
            place
                .run(&format!("{command} {tar}"))
                .code(3)
                .stderr(starts_with(format!(
                    "obdsetup: {tar}: a tar, but the first file in it is no OverlayBD layer: `obdsetup convert'"
                )));
        }
    }
    fs::create_dir(place.path("stack")).unwrap();
    place.write("stack/config.v1.json", b"{}");
    fs::create_dir(place.path("layout")).unwrap();
    place.write("layout/oci-layout", b"{}");
    place.tool("mkfifo pipe");
    for (name, code, said) in [
        ("tree", 1, "is a directory, not a file or block device\n"),
        ("stack", 1, "give stack/config.v1.json, which lists"),
        (
            "layout",
            1,
            "an OCI image layout: `obdsetup convert layout OUT' makes",
        ),
        ("pipe", 1, "is a pipe, "),
        ("-", 4, "standard input cannot be the input"),
    ] {
        for command in ["info", "verify", "dump", "table", "export -o x"] {
            place
                .run(&format!("{command} {name}"))
                .code(code)
                .stderr(starts_with(format!("obdsetup: {name}: ")).and(contains(said)));
        }
    }
    for (name, text) in [("pipe", "is a pipe"), ("-", "standard input")] {
        for line in [
            format!("convert {name} x"),
            format!("create --image {name} x"),
        ] {
            let said = place.run(&line).failure();
            said.stderr(starts_with(format!("obdsetup: {name}: ")).and(contains(text)));
        }
    }
    for kind in ["raw", "tar", "qcow2", "directory", "oci"] {
        let said = place.run(&format!("convert --from {kind} - x")).code(4);
        said.stderr(starts_with("obdsetup: -: standard input cannot be"));
    }
    place.run("create x").code(1).stderr(contains(
        "<--image <FILE>|--changes <STORE>|--directory <DIR>>",
    ));
    assert!(!place.path("x").exists());
}

/// No line is cut, and none is broken before it is full.
fn help_on_80_columns() {
    let place = Place::new();
    let help = |line: &str| {
        let done = place.command(line).env("COLUMNS", "80").assert().success();
        String::from_utf8(done.get_output().stdout.clone()).unwrap()
    };
    let main = help("--help");
    let commands = main.split("Commands:\n").nth(1).unwrap();
    let commands = commands.split("\n\n").next().unwrap();
    let names: Vec<&str> = commands
        .lines()
        .filter_map(|line| line.strip_prefix("  ")?.split(' ').next())
        .filter(|name| !name.is_empty() && *name != "help")
        .collect();
    assert!(names.len() >= 16, "{names:?}");
    for name in names {
        let help = help(&format!("{name} --help"));
        let lines: Vec<&str> = help.lines().collect();
        // The line with the usage is as long as the command line.
        for line in lines.iter().filter(|line| !line.starts_with("Usage: ")) {
            assert!(line.chars().count() <= 80, "{name}: {line}");
        }
        let rest = help.split("\nExamples:\n").nth(1).unwrap();
        let lines: Vec<&str> = rest.lines().collect();
        for pair in lines.windows(2) {
            let [line, next] = pair else { unreachable!() };
            if line.is_empty() || next.is_empty() || next.starts_with(' ') {
                continue;
            }
            assert!(!line.starts_with(' '), "{name}: too long: {line}\n{next}");
            let word = next.split(' ').next().unwrap();
            let together = line.chars().count() + 1 + word.chars().count();
            assert!(together > 80, "{name}: {line}\n{next}");
        }
    }
}

fn a_reader_that_does_not_read() {
    let place = Place::new();
    place.write("disk.raw", &noise(1 << 20, 7));
    place
        .run("create --raw --image disk.raw layer.obd")
        .success();
    let mut child = place.start("dump layer.obd");
    // After the first byte, dump waits with the rest, because nobody reads it.
    let mut byte = [0];
    std::io::Read::read_exact(child.stdout.as_mut().unwrap(), &mut byte).unwrap();
    assert_eq!(stop(&mut child, Signal::TERM), Some(130));
}

fn images_beyond_4_gib() {
    let place = Place::new();
    let disk = fs::File::create(place.path("disk.raw")).unwrap();
    disk.set_len(9 << 30).unwrap();
    disk.write_all_at(b"behind 2^32 bytes", 6 << 30).unwrap();
    drop(disk);
    place.run("create --raw --image disk.raw a").success();
    place.run("convert disk.raw b --from raw").success();
    place.run("merge --ignore-identity -o c a b").success();
    place.run("export -o out.raw c").success();
    let out = fs::File::open(place.path("out.raw")).unwrap();
    assert_eq!(out.metadata().unwrap().len(), 9 << 30);
    let mut found = [0; 17];
    out.read_exact_at(&mut found, 6 << 30).unwrap();
    assert_eq!(&found, b"behind 2^32 bytes");
    place
        .run("dump c --offset 6g --length 17")
        .success()
        .stdout("behind 2^32 bytes");
}

fn benchmark() {
    let place = Place::new();
    let report = place.json("benchmark --json");
    let speeds = report["decompression"].as_array().unwrap();
    assert_eq!(speeds.len(), 10);
    for speed in speeds {
        assert!(speed["bytes_per_second"].as_f64().unwrap() > 0.0);
        let ratio = speed["ratio"].as_f64().unwrap();
        assert!(ratio > 0.2 && ratio < 0.9, "{speed}");
    }
    assert_eq!(speeds[9]["algorithm"], "zstd");
    assert_eq!(speeds[9]["block_size"], 65536);
    assert!(report["crc32c"]["bytes_per_second"].as_f64().unwrap() > 0.0);
    place
        .run("benchmark")
        .success()
        .stdout(contains("lz4           4k").and(contains("CRC-32C")));
}

/// Adds the names of all fields in a JSON value to `found`.
fn keys(value: &serde_json::Value, found: &mut Vec<String>) {
    use serde_json::Value;
    match value {
        Value::Array(values) => values.iter().for_each(|value| keys(value, found)),
        Value::Object(map) => {
            for (key, value) in map {
                found.push(key.clone());
                keys(value, found);
            }
        }
        _ => {}
    }
}

fn json_is_documented() {
    let page = include_str!("../../../Documentation/obdsetup.8");
    let section = page.split(".Sh JSON").nth(1).unwrap();
    let section = section.split(".Sh ").next().unwrap();
    let place = Place::new();
    place.write("disk.raw", &image());
    place
        .run("create --raw --image disk.raw layer.obd --tar")
        .success();
    for (line, count) in [
        ("info --json layer.obd", 32),
        ("verify --json layer.obd", 9),
        ("table --json layer.obd", 6),
        ("benchmark --json", 8),
    ] {
        let mut found = Vec::new();
        keys(&place.json(line), &mut found);
        assert!(found.len() >= count, "{line}: {found:?}");
        for key in found {
            let mut words = section.split(|c: char| !c.is_alphanumeric() && c != '_');
            assert!(words.any(|word| word == key), "{line}: {key}");
        }
    }
}

fn completions_and_manual_pages() {
    let place = Place::new();
    for (shell, word) in [
        ("bash", "complete -F _obdsetup"),
        ("zsh", "#compdef obdsetup"),
        ("fish", "complete -c obdsetup"),
    ] {
        place
            .run(&format!("completions {shell}"))
            .success()
            .stdout(contains(word).and(contains("user-tag")))
            // The hidden command `man` is not completed.
            .stdout(contains("manual pages").not().and(contains(" man ").not()));
    }
    place.run("completions nosuch").code(1);
    let script = place.run("completions bash").success();
    place.write("script", &script.get_output().stdout);
    place.tool("bash -n script");

    fs::create_dir(place.path("man")).unwrap();
    place.run("man man").success().stdout("");
    let names = names(&place.path("man"));
    for name in ["create", "merge", "open", "benchmark"] {
        assert!(names.contains(&format!("obdsetup-{name}.8")), "{names:?}");
    }
    assert!(!names.contains(&"obdsetup-man.8".to_owned()));
    let page = String::from_utf8(place.read("man/obdsetup-merge.8")).unwrap();
    for text in [
        "\\-\\-lowest",
        ".SH EXAMPLES",
        ".TH obdsetup-merge 8 2026-08-01 \"obdsetup ",
        "obdsetup merge \\-o app.obd",
        "(8)",
    ] {
        assert!(page.contains(text), "{text}: {page}");
    }
    place.run("man nowhere").code(4);
}

/// overlaybdtab(5) has each option of `open`, except those that are for the command line only.
fn overlaybdtab_has_the_options_of_open() {
    let help = Place::new().run("open --help").success();
    let help = String::from_utf8_lossy(&help.get_output().stdout).into_owned();
    let page = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../Documentation/overlaybdtab.5");
    let page = fs::read_to_string(page).unwrap();
    let items: Vec<&str> = page
        .lines()
        .filter_map(|line| line.strip_prefix(".It Sy "))
        .flat_map(str::split_whitespace)
        .map(|word| word.trim_end_matches('='))
        .collect();
    // A line of an option begins with `--NAME`, or with `-X, --NAME`.
    let options: Vec<&str> = help
        .lines()
        .map(str::trim_start)
        .filter(|line| line.starts_with('-'))
        .filter_map(|line| line.split_once("--")?.1.split_whitespace().next())
        .collect();
    assert!(
        options.contains(&"dax") && options.len() > 10,
        "{options:?}"
    );
    for option in options {
        let command_line_only = ["create", "take-over", "help"].contains(&option);
        assert!(command_line_only || items.contains(&option), "{option}");
    }
}

fn pages_without_warnings() {
    let place = Place::new();
    fs::create_dir(place.path("man")).unwrap();
    place.run("man man").success();
    for name in names(&place.path("man")) {
        let man = needs::find("man").unwrap();
        let mut command = std::process::Command::new(man);
        command
            .args(["--warnings", "-l"])
            .current_dir(place.path("man"));
        let done = command.arg(&name).output().unwrap();
        assert!(done.status.success(), "{name}: {done:?}");
        assert_eq!(String::from_utf8_lossy(&done.stderr), "", "{name}");
    }
}

fn exit_codes() {
    let place = Place::new();
    place.run("").code(1);
    place.run("frobnicate").code(1);
    place.run("--version").success();
    place
        .run("--help")
        .success()
        .stdout(contains("Exit codes:"));
    for command in [
        "create",
        "convert",
        "commit",
        "merge",
        "info",
        "open",
        "close",
        "status",
        "list",
        "table",
        "verify",
        "benchmark",
        "dump",
        "export",
        "completions",
        "man",
    ] {
        place
            .run(&format!("{command} --help"))
            .success()
            .stdout(contains("Examples:").and(contains("obdsetup ")));
    }
    place
        .run("info nothing")
        .code(4)
        .stderr("obdsetup: nothing: cannot open: No such file or directory\n");
    place.write("empty", b"");
    place.write("short", b"short");
    place.write("text", &[b'x'; 9000]);
    fs::create_dir(place.path("files")).unwrap();
    for fs in ["squashfs", "btrfs", "ext2", "ext3"] {
        place
            .run(&format!("create --directory files --fs {fs} --dax none"))
            .code(1)
            .stderr(contains(format!("{fs} has no DAX")));
    }
    fs::remove_dir(place.path("files")).unwrap();
    for (option, value) in [("--partitions", ""), ("--writable", " store")] {
        place
            .run(&format!("open --dax {option}{value} name text"))
            .code(1)
            .stderr(contains(format!("{option} is not for --dax")));
    }
    let not_a_layer = "not an OverlayBD layer: begins with \"xxxxxxxx\", not with a tar, ZFile or \
                       LSMT header: `obdsetup convert' makes layers of disk images, tars and \
                       directories";
    for command in ["info", "dump", "verify", "table"] {
        for (name, said) in [
            ("empty", "the file is empty"),
            (
                "short",
                "too short: it has 5 bytes, 512 bytes are wanted at byte 0: incomplete copy?",
            ),
            ("text", not_a_layer),
        ] {
            place
                .run(&format!("{command} {name}"))
                .code(3)
                .stdout("")
                .stderr(format!("obdsetup: {name}: {said}\n"));
        }
    }
    place
        .run("commit text out --block-size 5k")
        .code(1)
        .stderr(contains("one of 4k, 8k"));
    place
        .run("open bad/name text")
        .code(1)
        .stderr(contains("name `bad/name`"));
    assert_eq!(place.names(), ["empty", "short", "text"]);
}

fn errors_tell_field_and_offset() {
    let place = Place::with_layer();
    let good = place.read("layer.obd");
    // With the digest flag, the digest would be found wrong first. Without it, the block size is.
    let mut bad = good.clone();
    bad[32] &= !0x10;
    bad[72..76].copy_from_slice(&6000u32.to_le_bytes());
    place.write("layer.obd", &bad);
    place.run("info layer.obd").code(3).stderr(
        "obdsetup: layer.obd: zfile block_size at byte 72: found 6000, \
         expected a power of two from 512 to 65536\n",
    );
    // A changed bit in a block in the middle.
    let mut bad = good;
    let at = bad.len() / 2;
    bad[at] ^= 1;
    place.write("layer.obd", &bad);
    place
        .run("verify layer.obd")
        .code(3)
        .stdout(contains("blocks are corrupt"))
        .stderr(contains("layer.obd: zfile block ").and(contains("CRC: found 0x")));
    place.run("dump layer.obd -o out").code(3);
    let report = place.run("verify --json layer.obd").code(3);
    let report: serde_json::Value = serde_json::from_slice(&report.get_output().stdout).unwrap();
    assert_eq!(report["ok"], false);
    assert_eq!(report["layers"][0]["corrupt_blocks"], 1);
    assert_eq!(place.names(), ["disk.raw", "layer.obd"]);
}

fn existing_files_stay() {
    let place = Place::new();
    place.write("disk.raw", &image());
    place.write("out", b"precious");
    for command in ["create --raw --image disk.raw out", "dump layer.obd -o out"] {
        place
            .run("create --force --raw --image disk.raw layer.obd")
            .success();
        place
            .run(command)
            .code(5)
            .stderr("obdsetup: out: exists already; --force replaces it\n");
        assert_eq!(place.read("out"), b"precious");
    }
    place.run("commit layer.obd out").code(5);
    // If a command fails, the old file stays, also with --force.
    place.write("bad", b"not a layer");
    place.run("commit --force bad out").code(3);
    assert_eq!(place.read("out"), b"precious");
    place.run("commit --force layer.obd out").success();
    // An output that is an input, under another name, is refused.
    for command in [
        "commit --force ./layer.obd layer.obd",
        "create --force --raw --image disk.raw ./disk.raw",
    ] {
        place.run(command).code(1);
    }
    assert_ne!(place.read("out"), b"precious");
    assert_eq!(place.names(), ["bad", "disk.raw", "layer.obd", "out"]);
    assert!(place.read("disk.raw") == image());
}

/// Refused before any work is done, by all commands.
fn names_that_no_output_has() {
    let place = Place::with_layer();
    fs::create_dir(place.path("layout")).unwrap();
    place.write("layout/oci-layout", b"{}");
    place.write("files.tar", &[0; 10_240]);
    let before = place.names();
    let commands = [
        "convert --from raw disk.raw OUT",
        "convert --from tar files.tar OUT",
        "create --raw --image disk.raw OUT",
        "create --directory layout --fs erofs OUT",
        "commit layer.obd OUT",
        "merge -o OUT layer.obd",
        "apply files.tar --base layer.obd OUT",
        "export -o OUT layer.obd",
        "export --to qcow2 -o OUT layer.obd",
        "dump -o OUT layer.obd",
    ];
    for command in commands {
        for name in ["out/", "out/.", "./out//"] {
            let done = place.run(&command.replace("OUT", name)).code(1);
            let said = format!("{name}: is a name for a directory, and a file is to be made");
            done.stderr(contains(said));
            assert_eq!(place.names(), before, "{command}");
        }
    }
    let makes_a_layer = |command: &&&str| !command.contains("export") && !command.contains("dump");
    let others = ["convert layout OUT", "convert disk.raw OUT"];
    for command in commands.iter().filter(makes_a_layer).chain(&others) {
        let done = place.run(&command.replace("OUT", "-")).code(1);
        done.stderr(contains("-: the output is not for standard output: "));
        assert_eq!(place.names(), before, "{command}");
    }
    place.ok("commit layer.obd ./-");
    // A directory may have such a name.
    for name in ["a/", "b/."] {
        let done = place.run(&format!("export --to qcow2 --chain -o {name} layer.obd"));
        if needs::program("qemu-img").is_none() {
            done.success();
            assert!(place.path(name).join("layer0.qcow2").is_file(), "{name}");
        }
    }
}

fn tables() {
    let place = Place::new();
    place.write("disk.raw", &image());
    place
        .run("create --raw --image disk.raw plain.lsmt --algorithm none")
        .success();
    place
        .run("create --raw --image disk.raw tar.obd --tar")
        .success();
    // Layers that obdsetup makes have a length in whole sectors. This one gets bytes after its trailer,
    // which are ignored.
    place
        .run("create --raw --image disk.raw layer.obd")
        .success();
    let mut odd = place.read("layer.obd");
    assert_eq!(odd.len() % 512, 0);
    odd.extend_from_slice(b"odd");
    place.write("odd.obd", &odd);
    let odd = odd.len();
    let tar = place.read("tar.obd").len();
    let plain = place.read("plain.lsmt").len();
    let (sectors, whole, disk) = (plain / 512, odd / 512, image().len().div_ceil(512));
    place
        .run("table --name v --ignore-identity plain.lsmt tar.obd odd.obd")
        .success()
        .stdout(format!(
            "v-zfile1: 0 {sectors} zfile LOOP(tar.obd) {tar}\n\
             v-blob2: 0 {whole} linear LOOP(odd.obd) 0\n\
             v-blob2: {whole} 1 linear TAIL(odd.obd) 0\n\
             v-zfile2: 0 {sectors} zfile /dev/mapper/v-blob2 {odd}\n\
             v: 0 {disk} lsmt 3 LOOP(plain.lsmt) {plain} /dev/mapper/v-zfile1 {plain} \
             /dev/mapper/v-zfile2 {plain}\n"
        ));
    place
        .run("table --concise --zfile tar.obd")
        .success()
        .stdout(format!(
            "obd,OVERLAYBD-ZFILE-obd,,ro,0 {sectors} zfile LOOP(tar.obd) {tar}\n"
        ));
    let json = place.json("table --json --lsmt-opt some_option plain.lsmt");
    assert_eq!(json[0]["uuid"], "OVERLAYBD-LSMT-obd");
    assert_eq!(
        json[0]["table"][0],
        format!("0 {disk} lsmt 1 LOOP(plain.lsmt) {plain} 1 some_option")
    );
    place
        .run(&format!("table plain.lsmt:size={plain}"))
        .code(1)
        .stderr(contains("only a block device"));
}

fn signals_leave_nothing() {
    let place = Place::new();
    place.write("disk.raw", &noise(48 << 20, 3));
    for signal in [Signal::INT, Signal::TERM] {
        let mut child = place.start(
            "create --raw --image disk.raw out --threads 1 --algorithm zstd --level 22 --block-size 64k",
        );
        assert!(soon(|| place.names().len() == 2), "no temporary file");
        assert_eq!(stop(&mut child, signal), Some(130));
        assert_eq!(place.names(), ["disk.raw"]);
    }
}

fn signals_stop_started_programs() {
    let place = Place::new();
    place.write("file", b"content");
    place.tool("tar -cf x.tar file");
    place.write("x.qcow2", b"QFI\xfb\0\0\0\x03");
    // Scripts in place of mkfs.ext4 and qemu-img, which don't end by themselves.
    for (program, from) in [("mkfs.ext4", "x.tar"), ("qemu-img", "x.qcow2")] {
        place.script(program, "echo $$ >called\nexec sleep 600");
        let mut child = place.start(&format!("convert {from} out"));
        let called = || fs::read_to_string(place.path("called")).unwrap_or_default();
        assert!(soon(|| called().ends_with('\n')), "{program}");
        assert_eq!(stop(&mut child, Signal::TERM), Some(130));
        // The started program was killed, too.
        let process = PathBuf::from("/proc").join(called().trim());
        assert!(!process.exists(), "{program}");
        fs::remove_file(place.path("called")).unwrap();
        fs::remove_file(place.path(program)).unwrap();
    }
    assert_eq!(place.names(), ["file", "x.qcow2", "x.tar"]);
}

fn overlaybdtab() {
    let place = Place::new();
    place.write("disk.raw", &image());
    place
        .run("create --raw --image disk.raw --algorithm none base.obd")
        .success();
    place
        .run("create --base base.obd --raw --image disk.raw app.obd")
        .success();
    let at = |name: &str| place.path(name).display().to_string();
    let table = format!(
        "# name layers options\n\none {base} zfile\ntwo {base},{app} nofail,x-mine,buffered,zfile-opt=cache_blocks\\0409\nwrong {base} fast\nhalf\n",
        base = at("base.obd"),
        app = at("app.obd"),
    );
    place.write("tab", table.as_bytes());
    let run = |line: &str| {
        place
            .command(line)
            .env("OVERLAYBDTAB", place.path("tab"))
            .assert()
    };
    let by_hand = format!(
        "--name two {} {} --zfile-opt cache_blocks --zfile-opt 9",
        at("base.obd"),
        at("app.obd")
    );
    let by_hand = run(&format!("table {by_hand}")).success();
    let by_hand = String::from_utf8_lossy(&by_hand.get_output().stdout).into_owned();
    assert!(by_hand.contains("two-zfile1"), "{by_hand}");
    run("table --name two").success().stdout(by_hand);
    run("table --name one")
        .code(3)
        .stderr(contains("base.obd: not a ZFile"));
    run("open wrong")
        .code(1)
        .stderr(contains("tab: `wrong': unknown option `fast'"));
    run("open half").code(1).stderr(contains(
        "tab: line 6: expected 2 or 3 fields (name, layers and perhaps options), found 1",
    ));
    place.write("tab", b"");
    run("open none")
        .code(1)
        .stderr(contains("no LAYER given, and").and(contains("has no `none'")));
}

fn generator() {
    let place = Place::new();
    let name = "systemd-overlaybdsetup-generator";
    std::os::unix::fs::symlink(cargo_bin!("obdsetup"), place.path(name)).unwrap();
    fs::create_dir(place.path("units")).unwrap();
    place.write("tab", b"app /dev/vg/app\nwrong\n");
    let run = |tab: &str| {
        Command::new(place.path(name))
            .env("OVERLAYBDTAB", place.path(tab))
            .args(["units", "early", "late"])
            .current_dir(place.path(""))
            .assert()
    };
    run("none").success().stdout("").stderr("");
    assert!(names(&place.path("units")).is_empty());
    run("tab").code(1).stderr(contains(
        "tab: line 2: expected 2 or 3 fields (name, layers and perhaps options), found 1",
    ));
    let unit = "systemd-overlaybdsetup@app.service";
    assert_eq!(
        names(&place.path("units")),
        [
            "dev-mapper-app.device.requires",
            "overlaybdsetup.target.requires",
            unit
        ]
    );
    let text = fs::read_to_string(place.path("units").join(unit)).unwrap();
    let program = fs::canonicalize(cargo_bin!("obdsetup")).unwrap();
    assert!(text.contains(&format!("ExecStart=\"{}\" open app\n", program.display())));
}

fn a_disk_is_not_for_a_terminal() {
    let place = Place::with_layer();
    let program = cargo_bin!("obdsetup").display();
    for command in ["dump layer.obd", "export -o - layer.obd"] {
        let on_terminal = |options: &str| {
            let line = format!("{program} {command} {options}");
            let mut script = Command::new("script");
            script.current_dir(place.dir());
            script.args(["--quiet", "--return", "--command", &line, "/dev/null"]);
            script.timeout(Duration::from_secs(120)).assert()
        };
        on_terminal("")
            .code(1)
            .stdout(contains("not for a terminal"));
        let forced = on_terminal("--force").success();
        let out = &forced.get_output().stdout;
        assert!(out.windows(9).any(|part| part == b"some text"));
        place.run(command).success();
    }
}
