// SPDX-License-Identifier: GPL-2.0

//! Disk images of virtual machines: `convert` makes a stack of layers from a chain of qcow2 images, and `export` makes
//! a chain from a stack, with one image for each layer. Images that cannot be converted are refused with the reason.

use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::process::CommandExt;

use predicates::prelude::PredicateBooleanExt;
use predicates::str::{contains, starts_with};
use proptest::prelude::*;
use proptest::test_runner::{Config, TestCaseError, TestRunner};
use rustix::process::Signal;

use crate::common::{needs, noise, runs, soon, stop, tests, Place};

tests! {
    a_chain_becomes_layers needs qemu_img();
    one_layer_of_a_chain needs qemu_img();
    chains_that_are_refused needs qemu_img();
    images_that_are_refused needs qemu_img();
    files_of_others needs qemu_img();
    extents_of_others needs qemu_img();
    extents_that_hide needs qemu_img();
    many_extents needs qemu_img();
    failures_of_qemu_img;
    failures_of_qemu_img_that_writes;
    names_that_are_not_utf8 needs qemu_img();
    images_that_are_cut_off needs qemu_img();
    images_that_are_preallocated needs qemu_img(), needs::program("qemu-io");
    compressed_clusters_at_the_end needs qemu_img();
    files_of_a_chain_that_are_cut_off needs qemu_img();
    raw_backing_files_that_are_cut_off needs qemu_img(), needs::e2fsprogs();
    extents_that_are_cut_off needs qemu_img();
    extents_alone needs qemu_img();
    extents_of_nested_files needs qemu_img();
    extents_of_vsphere needs qemu_img();
    disks_in_images_that_are_cut_off needs qemu_img(), needs::e2fsprogs();
    raw_disks_that_are_cut_off needs needs::e2fsprogs(), needs::program("mkfs.xfs"), needs::program("mkfs.btrfs"),
        needs::mksquashfs(), needs::mkfs_erofs(), needs::program("sfdisk"), needs::program("mkswap");
    raw_disks_that_are_not_padded needs needs::mksquashfs(), needs::program("sfdisk");
    raw_disks_with_traces needs needs::e2fsprogs(), needs::program("sfdisk");
    backing_files_of_other_formats needs qemu_img();
    copies_for_dax needs qemu_img();
    a_qcow2_of_a_stack needs qemu_img();
    a_qcow2_over_a_file_that_is_read_only needs qemu_img();
    a_chain_of_a_stack needs qemu_img();
    what_export_does_not_do;
    any_stack_there_and_back needs qemu_img();
    nothing_is_left_of_a_chain;
}

/// Requires the program qemu-img.
fn qemu_img() -> needs::Need {
    needs::program("qemu-img")
}

/// Returns a disk with data and zeros. Disks with different `nth` differ in some clusters, and in size.
fn disk(nth: usize) -> Vec<u8> {
    let mut disk = vec![0; (2 + nth) << 20];
    disk[..1 << 20].copy_from_slice(&noise(1 << 20, 5));
    for n in 1..=nth {
        // Data is overwritten, data is zeroed, and there is data where none was.
        disk[n << 17..][..4096].copy_from_slice(&noise(4096, n as u32));
        disk[(n << 17) + 65536..][..65536].fill(0);
        disk[(1 << 20) + (n << 18)..][..700].fill(n as u8);
    }
    disk
}

impl Place {
    /// Makes the qcow2 image `name` of the disk `raw`, over `below` in the same directory, with `options`.
    fn overlay(&self, raw: &str, below: &str, options: &str, name: &str) {
        let raw = self.path(raw).canonicalize().unwrap();
        let raw = raw.display();
        self.tool(&format!(
            "qemu-img create -q -f qcow2 -F raw -b {raw} difference"
        ));
        self.tool(&format!(
            "qemu-img rebase -f qcow2 -F qcow2 -b {below} difference"
        ));
        self.tool(&format!(
            "qemu-img convert -f qcow2 -O qcow2 {options} -B {below} -F qcow2 difference {name}"
        ));
        fs::remove_file(self.path("difference")).unwrap();
    }

    /// Returns a place with the chain `a.qcow2`, `b.qcow2`, `c.qcow2`, lowest first, and the disks `0.raw` to
    /// `2.raw` that these images show. `b.qcow2` is compressed.
    fn with_chain() -> Self {
        let place = Self::new();
        for nth in 0..3 {
            place.write(&format!("{nth}.raw"), &disk(nth));
        }
        place.tool("qemu-img convert -f raw -O qcow2 0.raw a.qcow2");
        place.overlay("1.raw", "a.qcow2", "-c", "b.qcow2");
        place.overlay("2.raw", "b.qcow2", "-o cluster_size=4k", "c.qcow2");
        place
    }

    /// Returns the UUID and the parent UUID of each layer.
    fn idents(&self, layers: &str) -> Vec<(String, String)> {
        let json = self.json(&format!("info --json {layers}"));
        let field = |layer: &serde_json::Value, name: &str| {
            layer["lsmt"][name].as_str().unwrap().to_owned()
        };
        let layers = json.as_array().unwrap().iter();
        layers
            .map(|layer| (field(layer, "uuid"), field(layer, "parent_uuid")))
            .collect()
    }

    /// Checks that `convert` refuses `name` with exit code `code` and a message that contains `said`, and makes no
    /// file.
    fn chain_refused(&self, name: &str, code: i32, said: &str) {
        let before = self.names();
        self.run(&format!("convert {name} out"))
            .code(code)
            .stderr(contains(said));
        assert_eq!(self.names(), before, "{said}");
    }
}

fn a_chain_becomes_layers() {
    let place = Place::with_chain();
    place.ok("convert c.qcow2 vm");
    assert_eq!(
        crate::common::names(&place.path("vm")),
        ["config.v1.json", "layer0.obd", "layer1.obd", "layer2.obd"]
    );
    // The layers up to layer N show the same disk as image N of the chain.
    let mut layers = String::new();
    for nth in 0..3 {
        layers += &format!(" vm/layer{nth}.obd");
        assert!(place.dump(&layers) == disk(nth), "{nth}");
    }
    assert!(place.dump("vm/config.v1.json") == disk(2));
    place.ok(&format!("verify {layers}"));
    let idents = place.idents(&layers);
    assert_eq!((&idents[1].1, &idents[2].1), (&idents[0].0, &idents[1].0));
    place
        .run("dump vm/layer0.obd vm/layer2.obd")
        .code(3)
        .stderr(contains("a layer is missing"));
    // A layer has only the differences from the layers below.
    let size = |name: &str| place.path(name).metadata().unwrap().len();
    assert!(size("vm/layer1.obd") < 20 << 10 && size("vm/layer2.obd") < 20 << 10);
    // The layers have the UUIDs of those that `create` makes of the disks, whatever the compression.
    place.ok("create --image 0.raw --skip-zeros --raw 0.obd");
    place.ok("create --base 0.obd --image 1.raw --raw --grow 1.obd");
    assert_eq!(place.idents("0.obd 1.obd"), idents[..2]);
    place.ok("convert c.qcow2 other --algorithm none");
    let others = " other/layer0.obd other/layer1.obd other/layer2.obd";
    assert_eq!(place.idents(others), idents);

    // From another directory, through a symbolic link, and with a raw image as the lowest one.
    fs::create_dir(place.path("sub")).unwrap();
    std::os::unix::fs::symlink("../c.qcow2", place.path("sub/link")).unwrap();
    place.ok("convert sub/link sub/vm");
    assert!(place.dump("sub/vm/config.v1.json") == disk(2));
    place.tool("qemu-img rebase -u -f qcow2 -F raw -b 0.raw b.qcow2");
    place.ok("convert c.qcow2 raw");
    assert_eq!(
        place.idents(" raw/layer0.obd raw/layer1.obd raw/layer2.obd"),
        idents
    );
    // An existing directory stays.
    place
        .run("convert c.qcow2 vm")
        .code(5)
        .stderr(contains("vm: exists already; remove it first"));
    assert!(!place.names().iter().any(|name| name.starts_with('.')));
}

fn one_layer_of_a_chain() {
    let place = Place::with_chain();
    place.ok("convert --flatten c.qcow2 one.obd");
    assert!(place.dump("one.obd") == disk(2));
    // An image without a backing file becomes one layer without --flatten, too.
    place.ok("convert a.qcow2 a.obd");
    assert!(place.dump("a.obd") == disk(0));
    place
        .run("convert --flatten 0.raw --from raw x.obd")
        .code(1)
        .stderr(contains(
            "is no qcow2 image; --flatten is for those with backing files",
        ));
    for option in [
        "--force",
        "--user-tag x",
        "--uuid 00000000-0000-0000-0000-000000000001",
    ] {
        place
            .run(&format!("convert c.qcow2 vm {option}"))
            .code(1)
            .stderr(contains("no --force and no identity is for it"));
        place
            .run(
                &format!("convert --flatten c.qcow2 one.obd --force {option}")
                    .replace("--force --force", "--force"),
            )
            .success();
    }
    // Internal snapshots of an image don't become layers.
    place.tool("qemu-img snapshot -c before b.qcow2");
    place.run("convert c.qcow2 vm").success().stderr(contains(
        "b.qcow2: has 1 internal snapshots, which are left out",
    ));
    assert!(place.dump("vm/config.v1.json") == disk(2));
}

fn chains_that_are_refused() {
    let place = Place::with_chain();
    // An image that is smaller than its backing file.
    place.tool("qemu-img create -q -f qcow2 -F qcow2 -b c.qcow2 small.qcow2 1M");
    place.chain_refused(
        "small.qcow2",
        1,
        "is for a disk of 1048576 bytes, and its backing file, ",
    );
    place.ok("convert --flatten small.qcow2 small.obd");
    assert!(place.dump("small.obd") == disk(2)[..1 << 20]);

    let rebase = |options: &str| place.tool(&format!("qemu-img rebase -u -f qcow2 {options}"));
    fs::rename(place.path("a.qcow2"), place.path("away")).unwrap();
    place.chain_refused("c.qcow2", 4, "a.qcow2, is missing: copy it there");
    fs::rename(place.path("away"), place.path("a.qcow2")).unwrap();
    for (backing, format, code, said) in [
        (
            "c.qcow2",
            "qcow2",
            3,
            "is its own backing file, directly or through others",
        ),
        (
            "a.qcow2",
            "qcow2",
            3,
            "is its own backing file, directly or through others",
        ),
        (
            "nbd://localhost/x",
            "raw",
            1,
            "its backing file, nbd://localhost/x, is no file on this machine",
        ),
        (
            "json:{\"driver\":\"file\",\"filename\":\"0.raw\"}",
            "raw",
            1,
            "is described with options of QEMU, and obdsetup takes only the name of a file",
        ),
        (
            "file:0.raw",
            "raw",
            1,
            "its backing file, file:0.raw, is named with file: in front, and obdsetup takes only the name itself",
        ),
        (
            "0.raw",
            "luks",
            1,
            "has the format luks, of which obdsetup makes no layers",
        ),
        ("0.raw", "qcow2", 3, "qemu-img failed"),
        ("/etc/hostname", "raw", 1, "is outside "),
    ] {
        rebase(&format!("-F {format} -b {backing} a.qcow2"));
        place.chain_refused("c.qcow2", code, said);
    }
    // An image that doesn't say the format of its backing file, as old tools make it: here, the header extension
    // with the format gets an unknown type.
    rebase("-F raw -b 0.raw a.qcow2");
    let mut bytes = place.read("a.qcow2");
    let at = bytes
        .windows(4)
        .position(|word| word == [0xe2, 0x79, 0x2a, 0xca])
        .unwrap();
    bytes[at..at + 4].copy_from_slice(b"none");
    place.write("a.qcow2", &bytes);
    place.chain_refused("c.qcow2", 1, "does not say which format its backing file, ");
}

/// The backing file must be in or below the directory of the image, also after symbolic links are followed, unless
/// --allow-outside is given. A FIFO or character device is always refused.
fn files_of_others() {
    let place = Place::with_chain();
    fs::create_dir(place.path("in")).unwrap();
    let make = |backing: &str| {
        fs::remove_file(place.path("in/x.qcow2")).ok();
        place.tool(&format!(
            "qemu-img create -q -u -f qcow2 -F raw -b {backing} in/x.qcow2 2M"
        ));
    };
    let full = place.path("0.raw").canonicalize().unwrap();
    std::os::unix::fs::symlink("../0.raw", place.path("in/link")).unwrap();
    for backing in ["../0.raw", full.to_str().unwrap(), "link"] {
        make(backing);
        place.chain_refused(
            "in/x.qcow2",
            1,
            "--allow-outside permits that, if you trust",
        );
        for options in ["--flatten", ""] {
            place
                .run(&format!("convert {options} --allow-outside in/x.qcow2 out"))
                .success();
            let layers = if options.is_empty() {
                "out/config.v1.json"
            } else {
                "out"
            };
            assert!(place.dump(layers) == disk(0));
            let out = place.path("out");
            fs::remove_dir_all(&out)
                .or_else(|_| fs::remove_file(&out))
                .unwrap();
        }
    }
    place.tool("mkfifo in/pipe");
    for backing in ["pipe", "/dev/zero"] {
        make(backing);
        for options in ["", "--flatten", "--allow-outside"] {
            place
                .run(&format!("convert {options} in/x.qcow2 out"))
                .code(1)
                .stderr(contains("is neither a file nor a block device"));
        }
    }
    place
        .run("convert --allow-outside 0.raw --from raw out")
        .code(1)
        .stderr(contains("names no other files; --allow-outside is for"));
    // With --allow-outside, messages say of which file each layer is made.
    place
        .run("convert --allow-outside c.qcow2 vm")
        .success()
        .stderr(contains("layer 0: of ").and(contains("/a.qcow2")));
}

impl Place {
    /// Checks that `convert` refuses `name`, with and without --allow-outside, and that the message contains `said`.
    fn never_converted(&self, name: &str, said: &str) {
        for options in ["", "--allow-outside"] {
            self.run(&format!("convert {name} out.obd {options}"))
                .code(1)
                .stderr(contains(said));
        }
        assert!(!self.path("out.obd").exists());
    }
}

/// The files with data that a vmdk image names are checked as a backing file is.
fn extents_of_others() {
    let place = Place::with_chain();
    fs::create_dir_all(place.path("in/sub")).unwrap();
    for kind in [
        "monolithicFlat",
        "monolithicSparse",
        "twoGbMaxExtentFlat",
        "twoGbMaxExtentSparse",
        "streamOptimized",
    ] {
        place.tool(&format!(
            "qemu-img convert -f raw -O vmdk -o subformat={kind} 0.raw in/x.vmdk"
        ));
        place.ok("convert in/x.vmdk out.obd --force");
        assert!(place.dump("out.obd") == disk(0), "{kind}");
    }
    let len = disk(0).len() / 512;
    let describe = |line: &str| {
        let text = format!(
            "# Disk DescriptorFile\nversion=1\nCID=fffffffe\nparentCID=ffffffff\n\
             createType=\"monolithicFlat\"\n{line}\nddb.adapterType = \"ide\"\n"
        );
        place.write("in/x.vmdk", text.as_bytes());
    };
    let flat = |name: &str| describe(&format!("RW {len} FLAT \"{name}\" 0"));
    fs::remove_file(place.path("out.obd")).unwrap();
    fs::copy(place.path("0.raw"), place.path("in/sub/disk")).unwrap();
    flat("sub/disk");
    place.ok("convert in/x.vmdk out.obd");
    assert!(place.dump("out.obd") == disk(0));
    fs::remove_file(place.path("out.obd")).unwrap();

    let full = place.path("0.raw").canonicalize().unwrap();
    let full = full.to_str().unwrap();
    std::os::unix::fs::symlink("../0.raw", place.path("in/link")).unwrap();
    for name in ["../0.raw", full, "link"] {
        for odd in [false, true] {
            match odd {
                false => flat(name),
                true => describe(&format!("RW\n{len}\tFLAT\n\"{name}\" 0")),
            }
            let done = place.run("convert in/x.vmdk out.obd").code(1);
            done.stderr(contains("a file with its data, ").and(contains("0.raw, is outside ")));
            place.ok("convert --allow-outside in/x.vmdk out.obd");
            assert!(place.dump("out.obd") == disk(0));
            fs::remove_file(place.path("out.obd")).unwrap();
        }
    }
    // An extent in the directory of the image, whose own descriptor names a file outside.
    flat("../0.raw");
    let mut bytes = b"KDMV\x01".to_vec();
    bytes.resize(512, 0);
    bytes[28] = 1;
    bytes.extend(place.read("in/x.vmdk"));
    place.write("in/nested", &bytes);
    describe(&format!("RW {len} SPARSE \"nested\""));
    let done = place.run("convert in/x.vmdk out.obd").code(1);
    done.stderr(contains("0.raw, is outside "));
    flat("none");
    place.run("convert in/x.vmdk out.obd").code(4).stderr(
        contains("a file with its data, ").and(contains("none, is missing: copy it there\n")),
    );
    place.tool("mkfifo in/pipe");
    flat("pipe");
    place.never_converted("in/x.vmdk", "pipe, is neither a file nor a block device");
    // Not the address of a server: a name that doesn't begin with a slash is relative to the directory.
    flat("nbd://localhost/x");
    place
        .run("convert in/x.vmdk out.obd")
        .code(4)
        .stderr(contains(
            "in/nbd://localhost/x, is missing: copy it there\n",
        ));
    for name in ["nbd:x", "file:x"] {
        fs::copy(place.path("0.raw"), place.path("in").join(name)).unwrap();
        flat(name);
        place.ok("convert in/x.vmdk out.obd");
        assert!(place.dump("out.obd") == disk(0), "{name}");
        fs::remove_file(place.path("out.obd")).unwrap();
    }
    // If the image is compressed, the name would lead elsewhere.
    flat("sub/disk");
    place.tool("gzip -k in/x.vmdk");
    place.never_converted(
        "in/x.vmdk.gz --from vmdk",
        "is compressed, and has its data in another file, sub/disk",
    );
}

/// Descriptors that would make obdsetup or qemu-img read files that they must not read, or wait for ever.
fn extents_that_hide() {
    let place = Place::with_chain();
    fs::create_dir(place.path("in")).unwrap();
    let describe = |lines: &str| {
        let text = format!(
            "# Disk DescriptorFile\nversion=1\nCID=fffffffe\nparentCID=ffffffff\n\
             createType=\"monolithicFlat\"\n{lines}\n"
        );
        place.write("in/x.vmdk", text.as_bytes());
    };
    let refused = |options: &str, code: i32, said: &str| {
        place
            .run(&format!("convert {options} in/x.vmdk out.obd"))
            .code(code)
            .stderr(contains(said));
        assert!(!place.path("out.obd").exists(), "{said}");
    };
    // A read of /proc/kmsg waits.
    for kind in ["FLAT", "SPARSE"] {
        describe(&format!("RW 1 {kind} \"/proc/kmsg\" 0"));
        refused("", 1, "/proc/kmsg, is outside ");
    }
    place.tool("mkfifo in/pipe");
    describe("RW 1 SPARSE \"pipe\"");
    refused(
        "--allow-outside",
        1,
        "pipe, is neither a file nor a block device",
    );
    let lines = |count: usize| -> String {
        let lines: Vec<String> = (0..count)
            .map(|nth| format!("RW 1 FLAT \"{nth}\" 0\n"))
            .collect();
        lines.concat()
    };
    for nth in 0..4096 {
        fs::hard_link(place.path("0.raw"), place.path(&format!("in/{nth}"))).unwrap();
    }
    describe(&(lines(4096) + "RW 1 FLAT \"../0.raw\" 0\n"));
    refused("", 3, "x.vmdk: names more than 4096 files");
    // A header in which the offset of the descriptor has the highest bit.
    let mut bytes = b"KDMV\x01".to_vec();
    bytes.resize(512, 0);
    bytes[28] = 1;
    bytes[35] = 0x80;
    bytes.extend(place.read("in/x.vmdk"));
    place.write("in/x.vmdk", &bytes);
    refused("", 3, "x.vmdk: the offset of its descriptor is too large");
}

/// qemu-img opens all extents at once, and most shells let a program open 1024 files unless it asks for more.
fn many_extents() {
    const COUNT: usize = 1100;
    let place = Place::new();
    let disk = noise(COUNT * 4096, 3);
    let mut text = "# Disk DescriptorFile\nversion=1\nCID=fffffffe\nparentCID=ffffffff\n\
                    createType=\"twoGbMaxExtentFlat\"\n"
        .to_owned();
    for (nth, part) in disk.chunks(4096).enumerate() {
        place.write(&format!("f{nth}"), part);
        text += &format!("RW 8 FLAT \"f{nth}\" 0\n");
    }
    text += "ddb.adapterType = \"ide\"\n";
    place.write("x.vmdk", text.as_bytes());
    let run = |limits: &str, out: &str| {
        let mut shell = std::process::Command::new("sh");
        let script = format!("{limits} && exec \"$@\"");
        shell.args(["-c", script.as_str(), "sh"]);
        shell.arg(place.with_programs("").get_program());
        shell.args(["convert", "x.vmdk", out]);
        shell.current_dir(place.dir()).output().unwrap()
    };
    let done = run("ulimit -S -n 256", "out.obd");
    assert!(done.status.success(), "{done:?}");
    assert!(place.dump("out.obd") == disk);
    // The most that is allowed is too little.
    let done = run("ulimit -S -n 256 && ulimit -H -n 256", "other.obd");
    assert_eq!(done.status.code(), Some(1), "{done:?}");
    let said = String::from_utf8_lossy(&done.stderr).into_owned();
    assert!(
        said.contains("x.vmdk: has more files than a program may have open: raise the limit"),
        "{said}"
    );
}

/// Only some failures of qemu-img are faults of the image. A script takes the place of qemu-img.
fn failures_of_qemu_img() {
    /// Fails only when the image is converted.
    const INFO: &str = "[ \"$1\" != info ] || { echo '{\"virtual-size\": 4096}'; exit 0; }\n";
    let says = |text: &str| format!("echo \"qemu-img: {text}\" >&2; exit 1");
    for (script, code, said) in [
        (
            says("Could not open 'x': Image is not in qcow2 format"),
            3,
            "x: cannot read: qemu-img failed (exit status: 1): ",
        ),
        (says("Could not open 'x': Permission denied"), 2, ""),
        (says("Failed to get shared 'write' lock"), 5, ""),
        (says("Could not open 'x': Unknown driver 'qcow2'"), 1, ""),
        (
            says("Could not open 'x': Too many open files"),
            1,
            "x: has more files than a program may have open",
        ),
        (
            says("Could not open 'x': 'file' driver requires 'x' to be a regular file"),
            1,
            "",
        ),
        (says("Could not open 'x': No such file or directory"), 4, ""),
        (says("Could not open 'x': Stale file handle"), 4, ""),
        (
            says("Could not open 'x': Transport endpoint is not connected"),
            4,
            "",
        ),
        // The file can be read, so it is the image. Then the file is gone.
        (says("Could not read L1 table: Input/output error"), 3, ""),
        (
            format!("{INFO}rm \"$6\"; {}", says("error while reading at byte 0: Input/output error")),
            4,
            "x: cannot read: qemu-img failed",
        ),
        (
            format!("{INFO}{}", says("error while writing at byte 0: Input/output error")),
            4,
            "obdsetup: cannot write a temporary file: qemu-img failed",
        ),
        // qemu-img cannot be started, or ends by a signal, with or without a line before.
        (
            "echo 'error while loading shared libraries: libx.so: No such file or directory' >&2; exit 127"
                .to_owned(),
            1,
            "exit status: 127",
        ),
        ("kill -KILL $$".to_owned(), 1, "signal: 9"),
        (
            "echo 'warning: odd' >&2; kill -KILL $$".to_owned(),
            1,
            "signal: 9",
        ),
        (
            "ulimit -c 0; echo 'Assertion failed.' >&2; kill -ABRT $$".to_owned(),
            1,
            "signal: 6",
        ),
    ] {
        let place = Place::new();
        let mut bytes = b"QFI\xfb".to_vec();
        bytes.resize(4096, 0);
        place.write("x", &bytes);
        fs::create_dir(place.path("bin")).unwrap();
        place.script("bin/qemu-img", &script);
        let convert = || {
            let mut command = place.with_programs("bin");
            command.args(["convert", "--from", "qcow2", "x", "out"]);
            let done = command.output().unwrap();
            let text = String::from_utf8_lossy(&done.stderr).into_owned();
            (done.status.code(), text)
        };
        let (found, text) = convert();
        assert_eq!(found, Some(code), "{script}: {text}");
        assert!(text.contains(said), "{script}: {text}");
        assert!(!place.path("out").exists(), "{script}");
        // A file that the kernel cannot execute.
        place.write("bin/qemu-img", b"#!/no/such/shell\n");
        if place.path("x").exists() {
            let (found, text) = convert();
            assert_eq!(found, Some(1), "{text}");
            assert!(text.contains("cannot run "), "{text}");
        }
    }
}

/// `export` has the same exit codes for failures of qemu-img as `convert`, but no failure is the fault of an image.
fn failures_of_qemu_img_that_writes() {
    for (text, code) in [
        ("error while writing at byte 0: Input/output error", 4),
        ("error while writing at byte 0: No space left on device", 4),
        ("error while reading at byte 0: Input/output error", 4),
        ("Could not open 'x': No such file or directory", 4),
        ("Could not create 'x': Permission denied", 2),
        ("Could not open 'x': Operation not permitted", 2),
        ("Failed to get \"write\" lock", 5),
        ("Could not open 'x': Device or resource busy", 5),
        ("Unknown driver 'qcow2'", 1),
        ("Could not open 'x': Too many open files", 1),
        ("Could not open 'x': Image is not in qcow2 format", 1),
    ] {
        let place = Place::with_layer();
        fs::create_dir(place.path("bin")).unwrap();
        place.script(
            "bin/qemu-img",
            &format!(
                "echo 'qemu-img: '\"{}\" >&2; exit 1",
                text.replace('"', "\\\"")
            ),
        );
        for chain in [None, Some("--chain")] {
            let mut command = place.with_programs("bin");
            command.args(["export", "--to", "qcow2", "-o", "out", "layer.obd"]);
            let done = command.args(chain).output().unwrap();
            let said = String::from_utf8_lossy(&done.stderr).into_owned();
            assert_eq!(done.status.code(), Some(code), "{text}: {said}");
            assert!(
                said.contains("qemu-img failed") && said.contains(text),
                "{said}"
            );
            assert!(!place.path("out").exists(), "{text}");
        }
    }
}

/// The message about a name for which qemu-img's output doesn't show which file it is.
const SAID: &str = "has a name that is not UTF-8, or has the character U+FFFD";

/// qemu-img prints the same character for all bytes that are not UTF-8.
fn names_that_are_not_utf8() {
    let place = Place::with_chain();
    fs::create_dir(place.path("in")).unwrap();
    let len = disk(0).len() / 512;
    let path = |name: &[u8]| place.path("in").join(OsStr::from_bytes(name));
    let flat = |name: &[u8]| {
        let mut text = b"# Disk DescriptorFile\nversion=1\nCID=fffffffe\nparentCID=ffffffff\n\
                         createType=\"monolithicFlat\"\n"
            .to_vec();
        text.extend(format!("RW {len} FLAT \"").as_bytes());
        text.extend(name);
        text.extend(b"\" 0\n");
        place.write("in/x.vmdk", &text);
    };
    // Makes an image whose header has `name` as the name of its backing file.
    let over = |name: &[u8]| {
        fs::remove_file(place.path("in/x.qcow2")).ok();
        let same = "x".repeat(name.len());
        place.tool(&format!(
            "qemu-img create -q -u -f qcow2 -F raw -b {same} in/x.qcow2 2M"
        ));
        let mut bytes = place.read("in/x.qcow2");
        let at = u64::from_be_bytes(*bytes[8..].first_chunk().unwrap()) as usize;
        bytes[at..at + name.len()].copy_from_slice(name);
        place.write("in/x.qcow2", &bytes);
    };
    let refused = |options: &str, name: &str, said: &str| {
        place
            .run(&format!("convert {options} in/{name} out"))
            .code(1)
            .stderr(contains(said));
        assert!(!place.path("out").exists(), "{said}");
    };
    let odd = b"x\xff";
    let shown = "x\u{fffd}".as_bytes();
    std::os::unix::fs::symlink("../0.raw", path(odd)).unwrap();
    fs::copy(place.path("1.raw"), path(shown)).unwrap();
    flat(odd);
    refused("", "x.vmdk", "0.raw, is outside ");
    refused("--allow-outside", "x.vmdk", SAID);
    for name in [odd.as_slice(), shown] {
        over(name);
        for options in ["", "--flatten", "--allow-outside"] {
            refused(options, "x.qcow2", SAID);
        }
    }
    // The other way round: the name with U+FFFD leads outside, the one that is not UTF-8 doesn't.
    fs::remove_file(path(odd)).unwrap();
    fs::rename(path(shown), path(odd)).unwrap();
    std::os::unix::fs::symlink("../0.raw", path(shown)).unwrap();
    flat(odd);
    refused("", "x.vmdk", SAID);
    flat(shown);
    refused("", "x.vmdk", "0.raw, is outside ");
    refused("--allow-outside", "x.vmdk", SAID);

    // Two directories with these names.
    for (at, name) in [odd.as_slice(), shown].into_iter().enumerate() {
        fs::remove_file(path(name)).unwrap();
        fs::create_dir(path(name)).unwrap();
        fs::copy(place.path(&format!("{at}.raw")), path(name).join("disk")).unwrap();
    }
    flat(b"disk");
    fs::copy(place.path("in/x.vmdk"), path(odd).join("x.vmdk")).unwrap();
    over(b"disk");
    fs::copy(place.path("in/x.qcow2"), path(odd).join("x.qcow2")).unwrap();
    place.tool("qemu-img convert -f raw -O vmdk 0.raw sparse.vmdk");
    fs::copy(
        place.path("sparse.vmdk"),
        path(odd).join(OsStr::from_bytes(b"\xfe.vmdk")),
    )
    .unwrap();
    let convert = |name: &[u8]| {
        let mut command = match name.ends_with(b"qcow2") {
            true => place.command("convert --flatten"),
            false => place.command("convert"),
        };
        command.arg(path(odd).join(OsStr::from_bytes(name)));
        command.arg("out.obd");
        command.assert()
    };
    for name in ["x.vmdk".as_bytes(), b"x.qcow2", b"\xfe.vmdk"] {
        convert(name).success().stderr("");
        assert!(place.dump("out.obd") == disk(0), "{name:?}");
        fs::remove_file(place.path("out.obd")).unwrap();
    }
    // An absolute name in the other directory, which looks like the directory of the image.
    let mut other = path(shown).canonicalize().unwrap().into_os_string();
    other.push("/disk");
    flat(other.as_bytes());
    fs::rename(place.path("in/x.vmdk"), path(odd).join("x.vmdk")).unwrap();
    convert(b"x.vmdk").code(1).stderr(contains("is outside "));
    over(other.as_bytes());
    fs::rename(place.path("in/x.qcow2"), path(odd).join("x.qcow2")).unwrap();
    convert(b"x.qcow2").code(1).stderr(contains(SAID));
}

fn backing_files_of_other_formats() {
    let place = Place::with_chain();
    fs::create_dir(place.path("in")).unwrap();
    place.tool("qemu-img convert -f raw -O vmdk 0.raw below.vmdk");
    fs::copy(place.path("0.raw"), place.path("in/0.raw")).unwrap();
    fs::copy(place.path("below.vmdk"), place.path("in/below.vmdk")).unwrap();
    for (kind, inside, outside) in [
        ("qed", "0.raw -F raw", "../0.raw -F raw"),
        ("vmdk", "below.vmdk -F vmdk", "../below.vmdk -F vmdk"),
    ] {
        let name = format!("in/x.{kind}");
        place.tool(&format!("qemu-img create -q -f {kind} -b {inside} {name}"));
        place.ok(&format!("convert {name} out.obd"));
        assert!(place.dump("out.obd") == disk(0), "{kind}");
        fs::remove_file(place.path("out.obd")).unwrap();
        place.tool(&format!("gzip -kf {name}"));
        place
            .run(&format!("convert {name}.gz out.obd"))
            .code(1)
            .stderr(contains("is compressed, and has a backing file"));
        fs::remove_file(place.path(&name)).unwrap();
        place.tool(&format!("qemu-img create -q -f {kind} -b {outside} {name}"));
        place
            .run(&format!("convert {name} out.obd"))
            .code(1)
            .stderr(contains("its backing file, ").and(contains("is outside ")));
        place.ok(&format!("convert --allow-outside {name} out.obd"));
        assert!(place.dump("out.obd") == disk(0), "{kind}");
        fs::remove_file(place.path("out.obd")).unwrap();
    }
    // An image that doesn't say the format of its backing file: qemu-img would guess it.
    place.tool("qemu-img create -q -u -f qed -F raw -b 0.raw in/x.qed 2M");
    let mut bytes = place.read("in/x.qed");
    // QED_F_BACKING_FORMAT_NO_PROBE
    bytes[16] &= !4;
    place.write("in/x.qed", &bytes);
    place.never_converted("in/x.qed", "does not say which format its backing file, ");
}

/// `--dax` refuses images that are copied to a raw image first: zeros that `--dax` must store would be holes there.
fn copies_for_dax() {
    let place = Place::with_chain();
    for input in ["a.qcow2", "c.qcow2", "--flatten c.qcow2"] {
        place
            .run(&format!("convert --dax --algorithm none {input} out"))
            .code(1)
            .stderr(contains(
                "--dax needs an uncompressed raw disk: `qemu-img convert -S 0 -O raw' makes one, of which `convert \
                 --from raw --dax' makes the layer",
            ));
    }
    place.tool("gzip -k a.qcow2");
    // A disk that is recognised.
    let mut disk = disk(0);
    disk[510..512].copy_from_slice(b"\x55\xaa");
    disk[446..510].fill(0);
    place.write("disk", &disk);
    place.tool("gzip -k disk");
    for (name, said) in [
        (
            "a.qcow2.gz",
            "decompress this one; then `qemu-img convert -S 0 -O raw' makes one, of which `convert --from raw --dax' \
             makes the layer",
        ),
        (
            "disk.gz",
            "decompress this one, and give a copy of that without holes",
        ),
    ] {
        place
            .run(&format!("convert --dax --algorithm none {name} out"))
            .code(1)
            .stderr(contains(format!(
                "--dax needs an uncompressed raw disk: {said}"
            )));
    }
    // The advice for other images.
    let qemu_img = "qemu-img convert -S 0 -O raw";
    for (at, magic, what, how) in [
        (0, b"QFI\xfb\0\0\0\x01".as_slice(), "a qcow image", qemu_img),
        (
            0,
            b"Bochs Virtual HD Image".as_slice(),
            "a Bochs image",
            qemu_img,
        ),
        (
            0,
            b"#!/bin/sh\n#V2.0 Format\n".as_slice(),
            "a cloop image",
            qemu_img,
        ),
        (3584, b"koly\0\0\0\x04".as_slice(), "(DMG)", qemu_img),
        (
            0,
            b"\x3a\xff\x26\xed".as_slice(),
            "Android sparse image",
            "simg2img",
        ),
    ] {
        let mut image = vec![0; 4096];
        image[at..at + magic.len()].copy_from_slice(magic);
        place.write("image", &image);
        let advice = format!("`{how} image disk.raw`, then convert that with --dax");
        for command in ["convert --dax image out", "create --dax --image image out"] {
            place
                .run(command)
                .code(1)
                .stderr(contains(what).and(contains(advice.as_str())));
        }
        place
            .run("convert image out")
            .code(1)
            .stderr(contains(what).and(contains("--dax").not()));
    }
    // convert would refuse these, too.
    for (name, said) in [
        ("a.qcow2", "qcow2: --dax needs an uncompressed raw disk: `qemu-img convert -S 0 -O raw' makes one; --raw "),
        ("disk.gz", "raw, compressed with gzip: --dax needs an uncompressed raw disk: decompress this one, and give a"),
    ] {
        place
            .run(&format!("create --dax --image {name} out"))
            .code(1)
            .stderr(contains(format!(
                "{name}: no disk image as it is, but {said}"
            )));
    }
    // What the last message about a raw disk says.
    place.tool("cp --sparse=never disk copy");
    place.ok("convert --dax --algorithm none copy out");
}

fn images_that_are_refused() {
    let place = Place::with_chain();
    place.tool("qemu-img create -q -f qcow2 --object secret,id=key,data=x -o encrypt.format=luks,encrypt.key-secret=key,encrypt.iter-time=10 locked.qcow2 1M");
    place.chain_refused("locked.qcow2", 1, "locked.qcow2: is encrypted");
    place.tool("qemu-img create -q -f qcow2 -F qcow2 -b locked.qcow2 over.qcow2 1M");
    place.chain_refused("over.qcow2", 1, "locked.qcow2: is encrypted");
    place.tool("qemu-img create -q -f qcow2 empty.qcow2 0");
    let empty = "empty.qcow2: is for a disk of 0 bytes";
    place.chain_refused("empty.qcow2", 1, empty);
    // qemu-img cannot make the disk in every image larger.
    let resize = "`qemu-img resize' makes the disk larger";
    for (format, advice) in [
        ("qcow2", resize),
        ("qed", resize),
        ("vdi", "make the image again"),
        ("parallels", "make the image again"),
    ] {
        let name = format!("none.{format}");
        place.tool(&format!("qemu-img create -q -f {format} {name} 0"));
        let said = format!("is for a disk of 0 bytes: no layer can be made of that; {advice}\n");
        place.chain_refused(&name, 1, &said);
        fs::remove_file(place.path(&name)).unwrap();
    }
    place.tool("gzip -k empty.qcow2");
    place.chain_refused(
        "empty.qcow2.gz",
        1,
        "empty.qcow2.gz: is for a disk of 0 bytes",
    );
    place.tool("qemu-img create -q -f qcow2 -F qcow2 -b empty.qcow2 over.qcow2 1M");
    place.chain_refused("over.qcow2", 1, empty);
    place.ok("convert --flatten over.qcow2 zeros.obd");
    assert!(place.dump("zeros.obd") == vec![0; 1 << 20]);
    fs::remove_file(place.path("zeros.obd")).unwrap();
    // The bit of the header that marks an image as corrupt.
    let mut bytes = place.read("b.qcow2");
    bytes[79] |= 2;
    place.write("b.qcow2", &bytes);
    place.chain_refused("c.qcow2", 3, "b.qcow2: is marked as corrupt");
    place
        .run("convert --flatten c.qcow2 one.obd")
        .code(3)
        .stderr(contains("b.qcow2: is marked as corrupt"));
    // The name of a backing file is relative to the image, and would lead elsewhere from the decompressed copy.
    place.tool("gzip -k c.qcow2");
    place.chain_refused("c.qcow2.gz", 1, "is compressed, and has a backing file");
    // qemu-img looks for the data file in the current directory, and it may be any file.
    place.tool("qemu-img create -q -f qcow2 -o data_file=data data.qcow2 2M");
    place.tool("qemu-img convert -n -f raw -O qcow2 0.raw data.qcow2");
    place.chain_refused("data.qcow2", 1, "has its data in another file, data");
    place.tool("gzip -k data.qcow2");
    place.chain_refused("data.qcow2.gz", 1, "has its data in another file, data");
    place.tool("qemu-img create -q -f qcow2 -F qcow2 -b data.qcow2 over.qcow2 2M");
    place.chain_refused("over.qcow2", 1, "data.qcow2: has its data in another file");
}

/// What is said of an image without its last bytes.
const TRUNCATED: &str = ": truncated: the file ends at byte ";

/// Who sees that an image is cut off, and what is said.
#[derive(Clone, Copy, Debug)]
enum Seen {
    /// qemu-img, with these words.
    ByQemu(&'static str),
    /// obdsetup, which says [`TRUNCATED`].
    Here,
    /// Nobody: what is missing is not needed.
    NotNeeded,
}

use Seen::{ByQemu, Here, NotNeeded};

/// Formats, options of qemu-img, and who sees it if this is missing: all but the first 100 bytes, all but the first
/// quarter, the last quarter, the last byte with data, the last byte of the file.
///
/// As seen with qemu-img 10.0. Without the check of obdsetup, each case of `Here` but those of a compressed
/// vmdk and of qed gave a disk with zeros instead of data.
const CUTS: &[(&str, &str, [Seen; 5])] = &[
    (
        "qcow2",
        "",
        [ByQemu("header too short"), Here, Here, Here, Here],
    ),
    (
        "qcow2",
        "-c",
        [ByQemu("header too short"), Here, Here, Here, Here],
    ),
    (
        "qcow2",
        "-o compression_type=zstd -c",
        [ByQemu("header too short"), Here, Here, Here, Here],
    ),
    ("qcow2", "-o compat=0.10", [Here; 5]),
    (
        "qcow2",
        "-o cluster_size=4k",
        [ByQemu("header too short"), Here, Here, Here, Here],
    ),
    (
        "qcow2",
        "-o extended_l2=on,cluster_size=128k",
        [ByQemu("header too short"), Here, Here, Here, Here],
    ),
    (
        "vmdk",
        "",
        [ByQemu("File truncated"), Here, Here, Here, Here],
    ),
    (
        "vmdk",
        "-o subformat=streamOptimized",
        [ByQemu("File truncated"), Here, Here, Here, NotNeeded],
    ),
    (
        "vdi",
        "",
        [ByQemu("unsupported VDI image"), Here, Here, Here, Here],
    ),
    (
        "vdi",
        "-o static=on",
        [ByQemu("unsupported VDI image"), Here, Here, Here, Here],
    ),
    (
        "vpc",
        "",
        [
            ByQemu("Invalid header magic"),
            ByQemu("has been truncated"),
            ByQemu("has been truncated"),
            Here,
            NotNeeded,
        ],
    ),
    (
        "vhdx",
        "-o block_size=1M",
        [
            ByQemu("No valid VHDX header found"),
            ByQemu("Could not open"),
            ByQemu("Could not open"),
            Here,
            Here,
        ],
    ),
    (
        "qed",
        "",
        [
            ByQemu("QED table offset is invalid"),
            Here,
            Here,
            Here,
            Here,
        ],
    ),
    ("parallels", "", [Here; 5]),
    ("parallels", "-o cluster_size=64k", [Here; 5]),
];

impl Place {
    /// Makes the file `name` `len` bytes long.
    fn cut(&self, name: &str, len: u64) {
        let file = fs::File::options()
            .write(true)
            .open(self.path(name))
            .unwrap();
        file.set_len(len).unwrap();
    }

    /// Makes a file of `len` zeros.
    fn cut_new(&self, name: &str, len: u64) {
        self.write(name, b"");
        self.cut(name, len);
    }

    /// Converts the image `image`, and checks that all is as said. If it is converted, it must be the disk `raw`.
    fn converted_or(&self, image: &str, seen: Seen, raw: &[u8], case: &str) {
        let before = self.names();
        let done = self.run(&format!("convert {image} out.obd"));
        let stderr = String::from_utf8(done.get_output().stderr.clone()).unwrap();
        let code = done.get_output().status.code().unwrap();
        if let NotNeeded = seen {
            assert_eq!((code, stderr.as_str()), (0, ""), "{case}");
            assert!(self.dump("out.obd").starts_with(raw), "{case}");
            fs::remove_file(self.path("out.obd")).unwrap();
            return;
        }
        let said = match seen {
            ByQemu(said) => said,
            _ => TRUNCATED,
        };
        let image = image.split(' ').next().unwrap();
        assert!(
            stderr.contains(said) && stderr.contains(image),
            "{case}: {seen:?}: {stderr}"
        );
        assert_eq!(code, 3, "{case}: {stderr}");
        assert_eq!(self.names(), before, "{case}");
    }
}

/// Returns where the data should end, of what was said.
fn end_of_data(stderr: &[u8]) -> Option<u64> {
    let stderr = std::str::from_utf8(stderr).unwrap();
    let (_, end) = stderr.split_once("its data should end at byte ")?;
    end.split_whitespace().next().unwrap().parse().ok()
}

/// A disk with data at its end, not compressed by any of the formats, and holes.
fn disk_with_end() -> Vec<u8> {
    let mut disk = disk(2);
    let len = disk.len();
    disk[len - 100_000..].copy_from_slice(&noise(100_000, 7));
    disk
}

fn images_that_are_cut_off() {
    let place = Place::new();
    let raw = disk_with_end();
    place.write("0.raw", &raw);
    for &(format, options, seen) in CUTS {
        let image = format!("x.{format}");
        place.tool(&format!(
            "qemu-img convert -f raw -O {format} {options} 0.raw {image}"
        ));
        let bytes = place.read(&image);
        let len = bytes.len() as u64;
        // The end of the data, as a file without it shows.
        let mut end = len;
        for less in [1, 513, 1025, 65_537] {
            place.cut(&image, len - less);
            let done = place.run(&format!("convert {image} out.obd --force"));
            if let Some(found) = end_of_data(&done.get_output().stderr) {
                end = found;
                break;
            }
        }
        place.tool("rm -f out.obd");
        let cuts = [100, len / 4, len / 4 * 3, end - 1, len - 1];
        for (cut, seen) in cuts.into_iter().zip(seen) {
            place.write(&image, &bytes);
            place.cut(&image, cut);
            let case = format!("{format} {options}: {cut} of {len}, data ends at {end}");
            place.converted_or(&image, seen, &raw, &case);
        }
        for len in [end, len, len + 1, len + 512] {
            place.write(&image, &bytes);
            place.cut(&image, len);
            place.converted_or(
                &image,
                NotNeeded,
                &raw,
                &format!("{format} {options}: {len}, {end}"),
            );
        }
        // Compressed, the image has another name when it is read.
        place.write(&image, &bytes[..bytes.len() / 4 * 3]);
        place.tool(&format!("gzip -kf {image}"));
        let gzip = format!("{image}.gz");
        place.converted_or(&gzip, seen[2], &raw, &format!("{format} {options}: gzip"));
        fs::remove_file(place.path(&gzip)).unwrap();
        fs::remove_file(place.path(&image)).unwrap();
    }
    // Without its footer, an image of fixed size is a raw disk.
    place.tool("qemu-img convert -f raw -O vpc -o subformat=fixed 0.raw x.vpc");
    place.converted_or("x.vpc", NotNeeded, &raw, "fixed");
    let len = place.path("x.vpc").metadata().unwrap().len();
    place.cut("x.vpc", len - 512);
    place.converted_or(
        "x.vpc --from vpc",
        ByQemu("invalid VPC image"),
        &raw,
        "no footer",
    );
}

/// Images in which places for data were allocated before there is any, and images with few writes, of which a
/// file may end within a cluster.
fn images_that_are_preallocated() {
    // Not a whole number of clusters.
    const LEN: usize = 3_000_832;
    let place = Place::new();
    for (format, options) in [
        ("qcow2", "preallocation=metadata"),
        ("qcow2", "preallocation=metadata,compat=0.10"),
        ("qcow2", "preallocation=metadata,cluster_size=512"),
        (
            "qcow2",
            "preallocation=metadata,extended_l2=on,cluster_size=64k",
        ),
        ("qcow2", "preallocation=falloc"),
        ("qcow2", "preallocation=full"),
        ("qcow2", "cluster_size=2M"),
        ("qcow2", "extended_l2=on,cluster_size=2M"),
        ("vdi", "static=on"),
        ("vdi", "static=off"),
        ("vhdx", "subformat=fixed"),
        ("vhdx", "subformat=dynamic"),
        ("vpc", "subformat=fixed"),
        ("vpc", "subformat=dynamic"),
        ("vmdk", "subformat=monolithicSparse"),
        ("vmdk", "subformat=monolithicFlat"),
        ("vmdk", "subformat=monolithicSparse,zeroed_grain=on"),
        ("qed", "cluster_size=4k"),
        ("parallels", "cluster_size=1M"),
    ] {
        let image = format!("x.{format}");
        let mut raw = vec![0; LEN];
        place.tool(&format!(
            "qemu-img create -q -f {format} -o {options} {image} {LEN}"
        ));
        place.converted_or(&image, NotNeeded, &raw, options);
        for at in [65_024, 512, LEN - 65_536] {
            let write = format!("write -q -P 90 {at} 512");
            place.output_of("qemu-io", &["-f", format, "-c", &write, &image]);
            raw[at..at + 512].fill(90);
            place.converted_or(
                &image,
                NotNeeded,
                &raw,
                &format!("{format} {options}: {at}"),
            );
        }
        let zeros = "write -q -z 0 65536";
        place.output_of("qemu-io", &["-f", format, "-c", zeros, &image]);
        raw[..65_536].fill(0);
        place.converted_or(
            &image,
            NotNeeded,
            &raw,
            &format!("{format} {options}: zeros"),
        );
        for name in place.names() {
            fs::remove_file(place.path(&name)).unwrap();
        }
    }
}

/// Of the last sector with a compressed cluster, the file needs the bytes that are used.
fn compressed_clusters_at_the_end() {
    let place = Place::new();
    let mut raw = noise(1 << 20, 9);
    // Both types of clusters, the compressed one last.
    for byte in &mut raw[(1 << 20) - 65_536..] {
        *byte &= 3;
    }
    place.write("0.raw", &raw);
    for (kind, cluster) in [("zlib", "64k"), ("zlib", "2M"), ("zstd", "64k")] {
        place.tool(&format!(
            "qemu-img convert -f raw -O qcow2 -c -o compression_type={kind},cluster_size={cluster} 0.raw x.qcow2"
        ));
        let len = place.path("x.qcow2").metadata().unwrap().len();
        assert_eq!(len % 512, 0);
        // Some zeros are there for the end of the sector, and then all bytes are needed.
        let bytes = place.read("x.qcow2");
        let used = bytes.iter().rposition(|&byte| byte != 0).unwrap() as u64 + 1;
        assert!(len - used < 511, "{kind} {cluster}");
        for cut in [len, used + 1, used] {
            place.cut("x.qcow2", cut);
            place.converted_or(
                "x.qcow2",
                NotNeeded,
                &raw,
                &format!("{kind} {cluster}: {cut}"),
            );
        }
        for less in [1, 2, 3, 4, 9, 100, 500, 600, 9000] {
            place.cut("x.qcow2", used - less);
            let done = place.run("convert x.qcow2 out.obd");
            // The last bytes may have the mark of the end only.
            if less < 9 && done.get_output().status.success() {
                assert!(place.dump("out.obd") == raw, "{kind} {cluster}: {less}");
                fs::remove_file(place.path("out.obd")).unwrap();
                continue;
            }
            let done = done.code(3);
            assert_eq!(end_of_data(&done.get_output().stderr), Some(len));
        }
        fs::remove_file(place.path("x.qcow2")).unwrap();
    }
    // A cluster that is damaged, of a file with the right length: the image is named, too.
    place.tool("qemu-img convert -f raw -O qcow2 -c -o compression_type=zstd 0.raw x.qcow2");
    let mut bytes = place.read("x.qcow2");
    let at = bytes.iter().rposition(|&byte| byte != 0).unwrap();
    bytes[at - 12_000..at - 6000].fill(0xff);
    place.write("x.qcow2", &bytes);
    place.chain_refused("x.qcow2", 3, "x.qcow2: cannot read: qemu-img failed");
}

fn files_of_a_chain_that_are_cut_off() {
    let place = Place::with_chain();
    for name in ["a.qcow2", "b.qcow2", "c.qcow2"] {
        let bytes = place.read(name);
        for cut in [bytes.len() / 2, bytes.len() - 513] {
            place.write(name, &bytes[..cut]);
            let said = format!("{name}{TRUNCATED}{cut}, and its data should end at byte ");
            place.chain_refused("c.qcow2", 3, &said);
            place.chain_refused("--flatten c.qcow2", 3, &said);
        }
        place.write(name, &bytes);
    }
    // Of a raw file that doesn't say how long its disk is, the rest is zeros in fact.
    place.tool("qemu-img create -q -f qcow2 -F raw -b 0.raw over.qcow2 4M");
    place.cut("0.raw", 1 << 20);
    place.ok("convert --flatten over.qcow2 out.obd");
    assert!(place.dump("out.obd").starts_with(&disk(0)[..1 << 20]));
}

fn raw_backing_files_that_are_cut_off() {
    let place = Place::new();
    place.tool("mkfs.ext4 -q -b 1024 ext4 8M");
    let end = 8 << 20;
    place.cut("ext4", end);
    place.tool("qemu-img create -q -f qcow2 -F raw -b ext4 middle.qcow2 16M");
    place.tool("qemu-img create -q -f qcow2 -F qcow2 -b middle.qcow2 over.qcow2");
    place.ok("convert over.qcow2 whole");
    for (cut, what) in [
        (end - 512, "and its ext file system needs 8388608"),
        (end / 2, "and its ext file system needs 8388608"),
        (end + 1, "no whole number of sectors"),
    ] {
        place.cut("ext4", cut);
        for options in ["", "--flatten "] {
            for said in [
                what,
                "/ext4: a disk, and the backing file of an image, but it",
            ] {
                place.chain_refused(&format!("{options}over.qcow2"), 3, said);
            }
        }
    }
    // The way out that the message names.
    place.cut("ext4", end / 2);
    place.tool("qemu-img convert -O raw over.qcow2 disk");
    place.ok("convert --from raw disk out.obd");
    let disk = place.dump("out.obd");
    let half = place.read("ext4");
    assert!(disk.len() == 16 << 20 && disk.starts_with(&half));
    assert!(disk[half.len()..].iter().all(|&byte| byte == 0));
}

/// A vmdk whose extent has a descriptor itself. The names in that are relative to the directory of the image, too.
fn extents_of_nested_files() {
    let place = Place::new();
    let raw = disk_with_end();
    let len = raw.len() / 512;
    let descriptor = |line: &str| {
        let text = format!(
            "# Disk DescriptorFile\nversion=1\nCID=fffffffe\nparentCID=ffffffff\n\
             createType=\"twoGbMaxExtentSparse\"\n{line}\n"
        );
        text.into_bytes()
    };
    fs::create_dir(place.path("sub")).unwrap();
    let line = format!("RW {len} SPARSE \"sub/nested.vmdk\"");
    place.write("x.vmdk", &descriptor(&line));
    let mut nested = b"KDMV\x01".to_vec();
    nested.resize(512, 0);
    // The sector of the descriptor.
    nested[28] = 1;
    nested.extend(descriptor(&format!("RW {len} FLAT \"data\" 0")));
    place.write("sub/nested.vmdk", &nested);
    place.write("data", &raw);
    place.converted_or("x.vmdk", NotNeeded, &raw, "nested");
    // A file with this name beside the extent is not opened, wherever it leads.
    std::os::unix::fs::symlink("/proc/kmsg", place.path("sub/data")).unwrap();
    place.converted_or("x.vmdk", NotNeeded, &raw, "symbolic link");
    fs::remove_file(place.path("sub/data")).unwrap();
    place.write("sub/data", &raw);
    let (end, cut) = (raw.len(), raw.len() / 2);
    place.cut("data", cut as u64);
    let said = format!("/data{TRUNCATED}{cut}, and its data should end at byte {end} or later");
    place.chain_refused("x.vmdk", 3, &said);
    place
        .run("convert x.vmdk out.obd")
        .code(3)
        .stderr(contains("sub/data").not());
}

/// Extents of the type SESPARSE, as vSphere makes them.
fn extents_of_vsphere() {
    const TABLE: usize = 4096 * 8;
    // The number of the last block. Its lowest 12 bits are stored apart from the others.
    const LAST: u64 = 4097;
    let place = Place::new();
    let part = |len: usize, numbers: &[(usize, u64)]| {
        let mut bytes = vec![0; len];
        for &(at, number) in numbers {
            bytes[at..at + 8].copy_from_slice(&number.to_le_bytes());
        }
        bytes
    };
    let block = |number: u64| (3 << 60) | ((number & 0xfff) << 48) | (number >> 12);
    let head = [
        (0, 0xcafe_babe),
        (8, 0x2_0000_0001),
        // Lengths in sectors: of the disk, which is 32 MiB, of blocks, and of tables.
        (16, 65_536),
        (24, 8),
        (32, 64),
        // Places and lengths of the second header, the first table, all other tables, and the blocks.
        (80, 1),
        (88, 1),
        (128, 2),
        (136, 1),
        (144, 3),
        (152, 128),
        (192, 131),
        (200, 8 * (LAST + 1)),
    ];
    let tables = [
        // The second half of the disk.
        (0, block(1)),
        (TABLE - 8, block(LAST)),
        // The first half, with two blocks of zeros.
        (TABLE, block(0)),
        (TABLE + 16, 2 << 60),
        (TABLE + 24, (1 << 60) | 5),
    ];
    let data = noise(3 * 4096, 3);
    let mut bytes = [
        part(512, &head),
        part(512, &[(0, 0xcafe_cafe)]),
        part(512, &[(0, (1 << 60) | 1), (8, 1 << 60)]),
        part(2 * TABLE, &tables),
        data[..8192].to_vec(),
    ]
    .concat();
    bytes.resize(131 * 512 + LAST as usize * 4096, 0);
    bytes.extend(&data[8192..]);
    let mut raw = vec![0; 32 << 20];
    let middle = raw.len() / 2;
    let last = raw.len() - 4096;
    raw[..4096].copy_from_slice(&data[..4096]);
    raw[middle..middle + 4096].copy_from_slice(&data[4096..8192]);
    raw[last..].copy_from_slice(&data[8192..]);
    place.write("x-s.vmdk", &bytes);
    place.write(
        "x.vmdk",
        b"# Disk DescriptorFile\nversion=1\nCID=fffffffe\nparentCID=ffffffff\n\
          createType=\"seSparse\"\nRW 65536 SESPARSE \"x-s.vmdk\"\n",
    );
    place.converted_or("x.vmdk", NotNeeded, &raw, "seSparse");
    let end = bytes.len();
    // The last ones have a part of the tables only.
    for cut in [end - 1, end - 4096, end / 2, 67_072, 40_000] {
        place.cut("x-s.vmdk", cut as u64);
        let said =
            format!("x-s.vmdk{TRUNCATED}{cut}, and its data should end at byte {end} or later");
        place.chain_refused("x.vmdk", 3, &said);
    }
}

/// Each file with data of a vmdk.
fn extents_that_are_cut_off() {
    let place = Place::new();
    let raw = disk_with_end();
    place.write("0.raw", &raw);
    for (kind, part) in [
        ("monolithicFlat", "x-flat.vmdk"),
        ("twoGbMaxExtentFlat", "x-f001.vmdk"),
        ("twoGbMaxExtentSparse", "x-s001.vmdk"),
    ] {
        place.tool(&format!(
            "qemu-img convert -f raw -O vmdk -o subformat={kind} 0.raw x.vmdk"
        ));
        let bytes = place.read(part);
        place.converted_or("x.vmdk", NotNeeded, &raw, kind);
        let end = bytes.len() as u64;
        for cut in [end - 1, end - 512, end - 65_536, end / 2] {
            place.cut(part, cut);
            let said =
                format!("{part}{TRUNCATED}{cut}, and its data should end at byte {end} or later");
            place.chain_refused("x.vmdk", 3, &said);
        }
        place.write(part, &bytes);
        place.converted_or("x.vmdk", NotNeeded, &raw, kind);
        fs::remove_file(place.path(part)).unwrap();
    }
    // The data begins later, and the file has that of two extents.
    let len = raw.len() as u64 / 512;
    let describe = |line: &str| {
        let text = format!(
            "# Disk DescriptorFile\nversion=1\nCID=fffffffe\nparentCID=ffffffff\n\
             createType=\"monolithicFlat\"\n{line}\n"
        );
        place.write("x.vmdk", text.as_bytes());
    };
    describe(&format!(
        "RW 100 FLAT \"0.raw\" 8\nRW {} VMFS \"0.raw\"\n",
        len - 8
    ));
    place.ok("convert x.vmdk out.obd");
    fs::remove_file(place.path("out.obd")).unwrap();
    describe(&format!(
        "RW 8 FLAT \"0.raw\" 0\nRW\n{}\tFLAT\n\"0.raw\" 9",
        len - 8
    ));
    let (end, more) = (len * 512, (len + 1) * 512);
    let said = format!("0.raw{TRUNCATED}{end}, and its data should end at byte {more} or later");
    place.chain_refused("x.vmdk", 3, &said);
    // One with the place of its tables in a footer, as in images of VMware: before the end marker.
    place.tool("qemu-img convert -f raw -O vmdk -o subformat=streamOptimized 0.raw x.vmdk");
    let mut bytes = place.read("x.vmdk");
    let header = bytes[..512].to_vec();
    bytes[56..64].fill(0xff);
    bytes.resize(bytes.len().next_multiple_of(512), 0);
    let tail = bytes.len();
    // A marker of the footer: one sector, of type 3.
    let mut marker = vec![0; 512];
    (marker[0], marker[12]) = (1, 3);
    bytes.extend([marker, header, vec![0; 512]].concat());
    place.write("x.vmdk", &bytes);
    place.converted_or("x.vmdk", NotNeeded, &raw, "footer");
    // Without the last bytes of the data, but with the footer.
    bytes.drain(tail - 4096..tail);
    place.write("x.vmdk", &bytes);
    place.chain_refused("x.vmdk", 3, &format!("x.vmdk{TRUNCATED}"));
    place.cut("x.vmdk", bytes.len() as u64 - 4096);
    place.chain_refused("x.vmdk", 3, "x.vmdk: cannot read: qemu-img failed");
}

/// An extent in place of the descriptor.
fn extents_alone() {
    let place = Place::new();
    place.write("0.raw", &disk(0));
    for (kind, part, said) in [
        (
            "twoGbMaxExtentSparse",
            "x-s001.vmdk",
            "is an extent of a vmdk",
        ),
        (
            "twoGbMaxExtentFlat",
            "x-f001.vmdk",
            "its name is that of an extent of a vmdk",
        ),
        (
            "monolithicFlat",
            "x-flat.vmdk",
            "its name is that of an extent of a vmdk",
        ),
    ] {
        place.tool(&format!(
            "qemu-img convert -f raw -O vmdk -o subformat={kind} 0.raw x.vmdk"
        ));
        place.chain_refused(part, 1, said);
        place.ok("convert x.vmdk out.obd --force");
    }
    place.chain_refused("--from vmdk x-s001.vmdk", 1, "x-s001.vmdk: is an extent");
    place.tool("gzip -k x-s001.vmdk");
    place.chain_refused("x-s001.vmdk.gz", 1, "x-s001.vmdk.gz: is an extent");
}

impl Place {
    /// Writes a partition table to the disk `name`, and leaves the rest of the disk as it is.
    fn partition(&self, name: &str, table: &str) {
        self.write(&format!("{name}.table"), table.as_bytes());
        let options = "-q --no-reread --no-tell-kernel --wipe never --wipe-partitions never";
        let line = format!("sfdisk {options} {name} <{name}.table");
        self.output_of("sh", &["-c", &line]);
    }
}

/// Images of disks that were cut off before the images were made.
fn disks_in_images_that_are_cut_off() {
    let place = Place::new();
    place.tool("mkfs.ext4 -q -b 1024 ext4 8M");
    place.tool("qemu-img convert -f raw -O qcow2 ext4 whole.qcow2");
    place.ok("convert whole.qcow2 out.obd");
    fs::remove_file(place.path("out.obd")).unwrap();
    place.cut("ext4", 4 << 20);
    for format in ["qcow2", "vmdk", "vdi"] {
        let image = format!("x.{format}");
        place.tool(&format!("qemu-img convert -f raw -O {format} ext4 {image}"));
        place.tool(&format!("gzip -k {image}"));
        for name in [image.clone(), format!("{image}.gz")] {
            let said = format!(
                "{name}: its disk is too short: it has 4194304 bytes, and its ext file system needs 8388608"
            );
            place.chain_refused(&name, 3, &said);
        }
    }
    // In a chain, of each image with its backing files.
    place.tool("qemu-img create -q -f qcow2 -F qcow2 -b x.qcow2 over.qcow2");
    place.chain_refused("over.qcow2", 3, "x.qcow2: its disk is too short");
    // The way out that the message names.
    place.tool("qemu-img convert -O raw x.qcow2 disk");
    place.ok("convert --from raw disk out.obd");
    assert!(place.dump("out.obd") == place.read("ext4"));
}

/// Disks that are shorter than their partition table or file system says.
fn raw_disks_that_are_cut_off() {
    let place = Place::new();
    let partitions = |name: &str, table: &str| {
        place.cut_new(name, 16 << 20);
        place.partition(name, table);
    };
    fs::create_dir(place.path("files")).unwrap();
    place.write("files/a", &noise(100_000, 3));
    place.tool("mkfs.ext4 -q -b 1024 ext4 8M");
    place.tool("mkfs.ext4 -q -O 64bit -b 4096 ext4-64 8M");
    place.cut_new("xfs", 300 << 20);
    place.tool("mkfs.xfs -q xfs");
    place.cut_new("btrfs", 128 << 20);
    place.tool("mkfs.btrfs -q btrfs");
    place.tool("mksquashfs files squashfs -quiet -no-progress -nopad");
    place.tool("mkfs.erofs --quiet erofs files");
    place.cut_new("swap", 8 << 20);
    place.tool("mkswap -q -p 4096 swap");
    partitions(
        "dos",
        "label: dos\nstart=2048, size=10000\nstart=20000, size=5000, type=5\n",
    );
    partitions(
        "gpt",
        "label: gpt\nstart=2048, size=10000\nstart=20000, size=5000\n",
    );
    let len = |name: &str| place.path(name).metadata().unwrap().len();
    for (name, kind, end) in [
        ("ext4", "ext file system", 8 << 20),
        ("ext4-64", "ext file system", 8 << 20),
        ("xfs", "XFS", len("xfs")),
        ("btrfs", "btrfs", len("btrfs")),
        ("squashfs", "squashfs", len("squashfs")),
        ("erofs", "erofs", len("erofs")),
        ("swap", "swap area", 8 << 20),
        ("dos", "partition table", 25_000 * 512),
        // The space for partitions, of which a part is not used.
        ("gpt", "partition table", (16 << 20) - 33 * 512),
    ] {
        let cut = (end - 1) / 512 * 512;
        place.cut(name, cut);
        let names = place.names();
        let said = format!(
            "{name}: a disk, but it has {cut} bytes, and its {kind} needs {end}: incomplete"
        );
        for line in ["convert NAME out.obd", "create --image NAME out.obd"] {
            let done = place.run(&line.replace("NAME", name)).code(1);
            done.stderr(contains(&said));
            assert_eq!(place.names(), names, "{name}");
        }
        if cut > 32 << 20 {
            continue;
        }
        place.tool(&format!("gzip -1k {name}"));
        let said =
            format!("{name}.gz: decompressed, it has {cut} bytes, and its {kind} needs {end}");
        place
            .run(&format!("convert {name}.gz out.obd"))
            .code(3)
            .stderr(contains(&said));
        fs::remove_file(place.path(&format!("{name}.gz"))).unwrap();
        assert_eq!(place.names(), names, "{name}");
        // The user knows better.
        place.ok(&format!("convert --from raw {name} out.obd"));
        fs::remove_file(place.path("out.obd")).unwrap();
        place.cut(name, end.next_multiple_of(512));
        if name == "gpt" {
            let warning = "obdsetup: warning: gpt: the second copy of its partition table, which ends at byte 16777216, \
                is missing, as the disk has 16760320 bytes: incomplete";
            let done = place.run(&format!("convert {name} out.obd --force"));
            done.success().stderr(starts_with(warning));
            place.cut(name, 16 << 20);
            fs::remove_file(place.path("out.obd")).unwrap();
        }
        place.ok(&format!("convert {name} out.obd"));
        fs::remove_file(place.path("out.obd")).unwrap();
    }
}

/// Disks of which only the unused end of the last partition is missing are accepted with a warning.
fn raw_disks_that_are_not_padded() {
    let place = Place::new();
    fs::create_dir(place.path("files")).unwrap();
    place.write("files/a", &noise(100_000, 3));
    place.tool("mksquashfs files squashfs -quiet -no-progress -nopad");
    let squashfs = place.read("squashfs");
    let (start, end) = (20_000 * 512, 25_000 * 512);
    let make = |label: &str| {
        place.cut_new("disk", 64 << 20);
        let table = format!("label: {label}\nstart=2048, size=10000\nstart=20000, size=5000\n");
        place.partition("disk", &table);
        let mut disk = place.read("disk");
        disk.truncate(start);
        disk.extend(&squashfs);
        disk.resize(disk.len().next_multiple_of(512), 0);
        place.write("disk", &disk);
        disk
    };
    let refused = |size: usize, end: u64| {
        place.cut("disk", size as u64);
        let said = format!("it has {size} bytes, and its partition table needs {end}: incomplete");
        let done = place.run("convert disk out.obd").code(1);
        done.stderr(contains(said));
    };
    let disk = make("dos");
    let size = disk.len();
    place.tool("gzip -1k disk");
    let warning = format!(
        "it has {size} bytes, and its partition table needs {end}, but the squashfs in the last partition is complete: \
         taken as it is; for `open --partitions', lengthen the disk with `truncate --size={end}' first\n"
    );
    for (line, name) in [
        ("convert disk out.obd", "disk"),
        ("create --image disk out.obd", "disk"),
        ("convert disk.gz out.obd", "disk.gz"),
    ] {
        let said = format!("obdsetup: warning: {name}: {warning}");
        place.run(line).success().stderr(said);
        assert!(place.dump("out.obd") == disk, "{line}");
        fs::remove_file(place.path("out.obd")).unwrap();
    }
    // Not if the end of the file system is missing, nothing is known about it, or it isn't there at all.
    refused(size - 512, end);
    refused(start + 512, end);
    refused(start, end);
    refused(size, end);
    // The kernel does not use a GUID partition table that is for a larger disk.
    make("gpt");
    refused(size, (64 << 20) - 33 * 512);
}

/// What is left of an earlier use of a disk does not say how long the disk is.
fn raw_disks_with_traces() {
    let place = Place::new();
    place.tool("mkfs.ext4 -q -b 1024 disk 8M");
    place.partition("disk", "label: dos\nstart=2048, size=4096\n");
    // The superblock is still there.
    assert_eq!(place.read("disk")[1080..1082], *b"\x53\xef");
    place.cut("disk", 3 << 20);
    place.ok("convert disk out.obd");
    place.cut("disk", (3 << 20) - 512);
    let said = "it has 3145216 bytes, and its partition table needs 3145728: incomplete";
    place
        .run("convert disk 1.obd")
        .code(1)
        .stderr(contains(said));

    // A GUID partition table that has no place in the master boot record is none.
    place.cut_new("disk", 64 << 20);
    place.partition("disk", "label: gpt\nstart=2048, size=100000\n");
    let gpt = place.read("disk");
    place.cut_new("disk", 3 << 20);
    place.partition("disk", "label: dos\nstart=2048, size=4096\n");
    let mut disk = place.read("disk");
    disk[512..17_408].copy_from_slice(&gpt[512..17_408]);
    place.write("disk", &disk);
    place.ok("convert disk 2.obd");
}

/// Returns a place with a stack of three layers, `0.obd` to `2.obd`, of the disks [`disk`]`(0)` to `disk(2)`.
fn with_stack() -> Place {
    let place = Place::new();
    let mut below = String::new();
    for nth in 0..3 {
        place.write("disk.raw", &disk(nth));
        let more = if nth == 0 { "--skip-zeros" } else { "--grow" };
        place.ok(&format!(
            "create {below} {more} --raw --image disk.raw {nth}.obd"
        ));
        below += &format!(" --base {nth}.obd");
    }
    fs::remove_file(place.path("disk.raw")).unwrap();
    place
}

const STACK: &str = "0.obd 1.obd 2.obd";

fn a_qcow2_of_a_stack() {
    let place = with_stack();
    place.ok(&format!("export --to qcow2 -o disk.qcow2 {STACK}"));
    place.tool("qemu-img check -q -f qcow2 disk.qcow2");
    place.tool("qemu-img convert -f qcow2 -O raw disk.qcow2 back.raw");
    assert!(place.read("back.raw") == disk(2));
    // Zeros take no space.
    let len = place.path("disk.qcow2").metadata().unwrap().len();
    assert!(len < 2 << 20, "{len}");
    place.ok("convert disk.qcow2 back.obd");
    assert!(place.dump("back.obd") == disk(2));
    place
        .run(&format!("export --to qcow2 -o disk.qcow2 {STACK}"))
        .code(5)
        .stderr(contains("exists already; --force replaces it"));
    place.ok("export --to qcow2 -f -o disk.qcow2 0.obd");
    place.ok("convert disk.qcow2 first.obd");
    assert_eq!(place.idents("first.obd"), place.idents("0.obd"));
    assert!(!place.names().iter().any(|name| name.starts_with('.')));
}

/// An ordinary user can replace a file that they may not write to. The new file has the same mode.
fn a_qcow2_over_a_file_that_is_read_only() {
    let place = with_stack();
    let mode = |name: &str| place.path(name).metadata().unwrap().mode() & 0o7777;
    for bits in [0o444, 0o400, 0o640] {
        place.write("disk.qcow2", b"old");
        let set = |name: &str, bits| {
            fs::set_permissions(place.path(name), fs::Permissions::from_mode(bits)).unwrap();
        };
        set("disk.qcow2", bits);
        let mut command = place.with_programs("");
        command.args("export --to qcow2 --force -o disk.qcow2 0.obd".split(' '));
        if rustix::process::geteuid().is_root() {
            for name in ["", "disk.qcow2", "0.obd"] {
                std::os::unix::fs::chown(place.path(name), Some(NOBODY), Some(NOBODY)).unwrap();
            }
            command.uid(NOBODY).gid(NOBODY);
        }
        let done = command.output().unwrap();
        assert!(done.status.success(), "{bits:o}: {done:?}");
        assert_eq!(mode("disk.qcow2"), bits, "{bits:o}");
        place.tool("qemu-img convert -f qcow2 -O raw disk.qcow2 back.raw");
        assert!(place.read("back.raw") == disk(0));
        fs::remove_file(place.path("disk.qcow2")).unwrap();
    }
}

/// The ID of a user and of a group without privileges.
const NOBODY: u32 = 65534;

fn a_chain_of_a_stack() {
    let place = with_stack();
    place.ok(&format!("export --to qcow2 --chain -o vm {STACK}"));
    let names = ["layer0.qcow2", "layer1.qcow2", "layer2.qcow2"];
    assert_eq!(crate::common::names(&place.path("vm")), names);
    for (nth, name) in names.iter().enumerate() {
        let image = format!("vm/{name}");
        place.tool(&format!("qemu-img check -q -f qcow2 {image}"));
        place.tool(&format!(
            "qemu-img convert -f qcow2 -O raw {image} back.raw"
        ));
        assert!(place.read("back.raw") == disk(nth), "{nth}");
        let info: serde_json::Value =
            serde_json::from_str(&place.tool(&format!("qemu-img info --output=json {image}")))
                .unwrap();
        let below = nth.checked_sub(1).map(|below| names[below]);
        assert_eq!(info["backing-filename"].as_str(), below);
        assert_eq!(
            info["backing-filename-format"].as_str(),
            below.map(|_| "qcow2")
        );
    }
    // An image has only the changes of its layer: two clusters with data, and zeros without data.
    let len = place.path("vm/layer1.qcow2").metadata().unwrap().len();
    assert!(len <= 7 << 16, "{len}");
    place.ok("convert vm/layer2.qcow2 back");
    let back = "back/layer0.obd back/layer1.obd back/layer2.obd";
    assert_eq!(place.idents(back), place.idents(STACK));
    place
        .run(&format!("export --to qcow2 --chain -o vm {STACK}"))
        .code(5)
        .stderr(contains("vm: exists already; remove it first"));
}

fn what_export_does_not_do() {
    let place = Place::with_layer();
    for (options, said) in [
        (
            "--chain -o x",
            "--chain makes qcow2 images: give --to qcow2, too",
        ),
        ("--to raw --chain -o x", "--chain makes qcow2 images"),
        (
            "--to qcow2 --no-sparse -o x",
            "--no-sparse is for raw images",
        ),
        (
            "--to qcow2 -o -",
            "a qcow2 image is not for standard output",
        ),
        ("--to qcow2 --chain --force -o x", "cannot be used with"),
        ("--to vmdk -o x", "invalid value 'vmdk'"),
    ] {
        place
            .run(&format!("export {options} layer.obd"))
            .code(1)
            .stderr(contains(said));
    }
    assert_eq!(place.names(), ["disk.raw", "layer.obd"]);
    place.ok("export --to raw -o x layer.obd");
    assert!(place.read("x") == place.read("disk.raw"));
    // A layer that is damaged.
    let mut bytes = place.read("layer.obd");
    bytes[5000] ^= 1;
    place.write("bad.obd", &bytes);
    for options in ["--to qcow2 -o y", "--to qcow2 --chain -o y"] {
        place.run(&format!("export {options} bad.obd")).code(3);
    }
    assert_eq!(place.names(), ["bad.obd", "disk.raw", "layer.obd", "x"]);
}

/// The changes of a layer: the first block of 512 bytes, the number of blocks, and a byte. If the byte is 0, the
/// blocks become zeros; otherwise their content is computed from it.
type Changes = Vec<(usize, usize, u8)>;

fn any_stack_there_and_back() {
    const BLOCKS: usize = 600;
    let change = (0..BLOCKS, 1..64usize, prop_oneof![Just(0u8), 1u8..255]);
    let stacks = proptest::collection::vec(proptest::collection::vec(change, 0..6), 1..4);
    let check = |stack: Vec<Changes>| -> Result<(), TestCaseError> {
        let place = Place::new();
        let mut disk = vec![0; BLOCKS * 512];
        let (mut below, mut layers) = (String::new(), String::new());
        for (nth, changes) in stack.iter().enumerate() {
            for &(from, len, byte) in changes {
                let to = (from + len).min(BLOCKS);
                for (at, block) in disk[from * 512..to * 512].iter_mut().enumerate() {
                    *block = if byte == 0 {
                        0
                    } else {
                        byte.wrapping_add((at / 512) as u8) | 1
                    };
                }
            }
            place.write("disk.raw", &disk);
            let zeros = if nth == 0 { "--skip-zeros" } else { "" };
            place.ok(&format!(
                "create {below} {zeros} --raw --image disk.raw {nth}.obd"
            ));
            below += &format!(" --base {nth}.obd");
            layers += &format!(" {nth}.obd");
        }
        place.ok(&format!("export --to qcow2 --chain -o vm {layers}"));
        place.ok(&format!("export --to qcow2 -o disk.qcow2 {layers}"));
        place.ok("convert disk.qcow2 one.obd");
        prop_assert!(place.dump("one.obd") == disk);
        let last = stack.len() - 1;
        place.ok(&format!("convert vm/layer{last}.qcow2 back"));
        let back = match last {
            // The only image has no backing file, so it becomes a single file.
            0 => "back".to_owned(),
            _ => {
                let names = (0..=last).map(|nth| format!("back/layer{nth}.obd"));
                names.collect::<Vec<_>>().join(" ")
            }
        };
        prop_assert!(place.dump(&back) == disk);
        prop_assert_eq!(place.idents(&back), place.idents(&layers));
        Ok(())
    };
    let config = Config {
        cases: 12,
        failure_persistence: None,
        ..Config::default()
    };
    TestRunner::new(config).run(&stacks, check).unwrap();
}

fn nothing_is_left_of_a_chain() {
    let place = Place::with_layer();
    place.write("x.qcow2", b"QFI\xfb\0\0\0\x03");
    // A script in place of qemu-img: `info` describes an image and its backing file, all else takes for ever.
    place.script(
        "qemu-img",
        "case \"$1 $5\" in\n\
         *x.qcow2) echo '{\"virtual-size\": 512, \"backing-filename\": \"b\", \"full-backing-filename\": \"'$PWD/b'\", \
         \"backing-filename-format\": \"qcow2\"}';;\n\
         info*) echo '{\"virtual-size\": 512}';;\n\
         *) echo $$ >called; exec sleep 600;;\nesac",
    );
    place.write("b", b"");
    let names = place.names();
    for line in [
        "convert x.qcow2 out",
        "export --to qcow2 -o out layer.obd",
        "export --to qcow2 --chain -o out layer.obd",
    ] {
        for signal in [Signal::TERM, Signal::INT, Signal::KILL] {
            let mut child = place.start(line);
            let called = || fs::read_to_string(place.path("called")).unwrap_or_default();
            assert!(soon(|| called().ends_with('\n')), "{line}");
            let code = stop(&mut child, signal);
            let pid = called().trim().to_owned();
            assert!(soon(|| !runs(&pid)), "{line}: qemu-img goes on");
            fs::remove_file(place.path("called")).unwrap();
            if signal == Signal::KILL {
                // Temporary files may be left, but they are hidden, and there is no output.
                for name in place.names() {
                    if name.starts_with(".obdsetup-") {
                        let path = place.path(&name);
                        let removed = fs::remove_dir_all(&path);
                        removed.or_else(|_| fs::remove_file(&path)).unwrap();
                    }
                }
            } else {
                assert_eq!(code, Some(130), "{line}");
            }
            assert_eq!(place.names(), names, "{line}");
        }
    }
}
