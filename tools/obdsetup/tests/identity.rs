// SPDX-License-Identifier: GPL-2.0

//! Layers have a UUID and the UUID of the layer below them; stacks whose UUIDs don't match are refused. A file that
//! replaces another keeps its permissions. Files to which other processes may write are not read.

use std::fs::{self, File};
use std::os::unix::fs::{symlink, MetadataExt, PermissionsExt};

use predicates::prelude::*;
use predicates::str::contains;

use crate::common::{needs, tests, Place};

tests! {
    layers_know_themselves_and_their_parents;
    wrong_stacks_are_refused;
    layers_without_identity_are_as_they_were;
    another_place_is_another_uuid;
    images_of_another_size;
    layers_end_on_a_sector;
    what_is_replaced_keeps_its_permissions;
    what_is_replaced_keeps_its_owner needs needs::root();
    what_is_replaced_keeps_its_access_control_list needs needs::xattrs();
    what_others_write_to_is_not_read;
}

impl Place {
    /// Returns a place with a stack of three layers, `a`, `b` and `c`, and with the disks of which they were made,
    /// `a.raw`, `b.raw` and `c.raw`.
    fn with_stack() -> Self {
        let place = Self::new();
        let mut below = String::new();
        for (nth, name) in ["a", "b", "c"].iter().enumerate() {
            place.write(&format!("{name}.raw"), &disk(nth));
            place.ok(&format!("create {below} --image {name}.raw {name}"));
            below += &format!(" --base {name}");
        }
        place
    }

    /// Returns the UUID and the parent UUID of a layer.
    fn ident(&self, layer: &str) -> (String, String) {
        let json = self.json(&format!("info --json {layer}"));
        let field = |name: &str| json[0]["lsmt"][name].as_str().unwrap().to_owned();
        (field("uuid"), field("parent_uuid"))
    }
}

const NIL: &str = "00000000-0000-0000-0000-000000000000";
/// With this option, `create` makes a layer without UUID, as other tools do.
const FOREIGN: &str = "--uuid 00000000-0000-0000-0000-000000000000";

/// Returns a disk of 3 MiB, with data in each MiB. Disks with different `nth` differ in some blocks.
fn disk(nth: usize) -> Vec<u8> {
    let mut disk = vec![0; 3 << 20];
    for (at, byte) in disk.iter_mut().enumerate() {
        *byte = (at / 512 * 7 + at % 13) as u8;
    }
    for n in 1..=nth {
        disk[n << 20..][..8192].fill(n as u8);
    }
    disk
}

fn layers_know_themselves_and_their_parents() {
    let place = Place::with_stack();
    let [a, b, c] = ["a", "b", "c"].map(|name| place.ident(name));
    assert_eq!(a.1, NIL);
    assert_eq!((&b.1, &c.1), (&a.0, &b.0));
    for (uuid, _) in [&a, &b, &c] {
        assert!(
            uuid.starts_with("6F626431-") && uuid.as_bytes()[14] == b'8',
            "{uuid}"
        );
    }
    assert!(a.0 != b.0 && b.0 != c.0);
    place.ok("verify a b c");

    // The same content has the same UUID, however it is wrapped, on any number of threads.
    for options in [
        "",
        "--algorithm zstd --tar",
        "--algorithm none",
        "--threads 1",
    ] {
        place.ok(&format!(
            "create --base a --image b.raw other {options} --force"
        ));
        assert_eq!(place.ident("other"), b, "{options}");
    }
    // The same input and options give the same bytes.
    place.ok("create --base a --image b.raw other --force");
    assert!(place.read("other") == place.read("b"));
    place.ok("convert --from raw a.raw again");
    place.ok("create --skip-zeros --image a.raw other --force");
    assert_eq!(place.ident("again"), place.ident("other"));

    // A layer over another parent, or with other segments, has another UUID.
    place.ok("create --image b.raw alone");
    place.ok("create --granularity 512 --base a --image c.raw fine");
    place
        .run("commit --parent-uuid 11111111-2222-4333-8444-555566667777 c other --force")
        .success();
    assert!(place.ident("alone").0 != b.0 && place.ident("fine").0 != c.0);
    assert_eq!(
        place.ident("other").1,
        "11111111-2222-4333-8444-555566667777"
    );

    // `commit` keeps the UUID, whether it keeps the LSMT file unchanged or writes a new one.
    for options in [
        "--algorithm none",
        "--compact",
        "--tar --algorithm zstd",
        "--user-tag x",
    ] {
        place.ok(&format!("commit b other --force {options}"));
        assert_eq!(place.ident("other"), b, "{options}");
    }
    // A merged layer has the UUID of the topmost layer and the parent UUID of the lowest one.
    place.ok("merge -o bc b c");
    assert_eq!(place.ident("bc"), (c.0.clone(), a.0.clone()));
    place.ok("merge -o abc --lowest a b c");
    assert_eq!(place.ident("abc"), (c.0.clone(), NIL.to_owned()));
    place.ok("verify a bc");
    place.ok("verify abc");
}

/// Returns a command line with the stack `layers` for each command that takes a stack.
fn commands(layers: &str) -> Vec<String> {
    let bases: Vec<&str> = layers
        .split(' ')
        .flat_map(|name| ["--base", name])
        .collect();
    let bases = bases.join(" ");
    vec![
        format!("verify {layers}"),
        format!("verify --json {layers}"),
        format!("export --force -o out {layers}"),
        format!("dump --force -o out {layers}"),
        format!("table {layers}"),
        format!("open obd-identity-test {layers}"),
        format!("create {bases} --image c.raw out --force"),
        format!("merge --lowest --force -o out {layers}"),
    ]
}

fn wrong_stacks_are_refused() {
    let place = Place::with_stack();
    place.write("x.raw", &disk(0)[..2 << 20]);
    place.ok("create --image x.raw x");
    place.ok("create --image c.raw forgotten");
    let [a, b] = ["a", "b"].map(|name| place.ident(name).0);
    for (layers, said) in [
        ("a c b", format!("c: was made over a layer with UUID {b}, but the layer below it, a, has UUID {a}: the layers are in the wrong order")),
        ("c b a", "was made over a layer with UUID".to_owned()),
        ("a c", "a layer is missing, or another layer is in its place".to_owned()),
        ("b c", format!("b: was made over a layer with UUID {a}, but no layer is below it: give all layers")),
        ("a b b c", format!("b: has UUID {b}, as b has: the same layer twice")),
        ("x b c", "b: was made over a layer with UUID".to_owned()),
        ("a forgotten", "forgotten: was made as a lowest layer, but a is below it".to_owned()),
        ("a b x", "x: was made as a lowest layer".to_owned()),
    ] {
        for command in commands(layers) {
            place
                .run(&command)
                .code(3)
                .stderr(contains(&said).and(contains("--ignore-identity")));
            assert!(!place.path("out").exists(), "{command}");
        }
        // A merge of layers from the middle of a stack doesn't need the layers below, but all between.
        if layers != "b c" {
            place.run(&format!("merge -o out {layers}")).code(3).stderr(contains(&said));
        }
        let mut warns = vec![format!("dump --ignore-identity --force -o out {layers}")];
        warns.push(format!("verify --ignore-identity {layers}"));
        warns.push(format!("table --ignore-identity {layers}"));
        for command in warns {
            place
                .run(&command)
                .success()
                .stderr(contains("warning: ").and(contains(&said)));
        }
        let _ = fs::remove_file(place.path("out"));
    }
    let done = place.run("verify --json a c").code(3);
    let report: serde_json::Value = serde_json::from_slice(&done.get_output().stdout).unwrap();
    assert_eq!(report["ok"], false);
    assert_eq!(report["chain_errors"].as_array().unwrap().len(), 1);

    // An upper layer alone is no whole stack, but `verify`, `info` and `merge` take it.
    for command in [
        "dump b --force -o out",
        "table b",
        "open obd-identity-test b",
    ] {
        place
            .run(command)
            .code(3)
            .stderr(contains("no layer is below it"));
    }
    place
        .run("verify b")
        .success()
        .stderr(contains(format!("UUID {a}, which is not checked")));
    place.ok("info b");
    place.ok("merge -o out b");
}

fn layers_without_identity_are_as_they_were() {
    let place = Place::with_stack();
    for (name, base) in [
        ("fa", ""),
        ("fb", "--base fa"),
        ("fc", "--base fa --base fb"),
    ] {
        let raw = &name[1..];
        place.ok(&format!("create {FOREIGN} {base} --image {raw}.raw {name}"));
        assert_eq!(place.ident(name), (NIL.to_owned(), NIL.to_owned()));
    }
    for layers in ["fa fb fc", "fb", "fa fc fb", "fa fa"] {
        place.ok(&format!("verify {layers}"));
        place.ok(&format!("dump --force -o out {layers}"));
    }
    place
        .run("info fa")
        .success()
        .stdout(contains("cannot be checked"));
    place.run("info a").success().stdout(contains("lowest"));
    place
        .run("info b")
        .success()
        .stdout(contains("over the parent only"));
    // A layer over one without UUID has a UUID, but is not marked as a lowest layer.
    place.ok("create --base fa --image b.raw over");
    place.ok("verify fa over");
    place.ok("verify a over");
    place
        .run("info over")
        .success()
        .stdout(contains("cannot be checked"));
    // A layer merged from layers without UUIDs fits over the same layer.
    place.ok("merge -o fbc fb fc");
    place.ok("verify fa fbc");
    // `commit` makes no UUID for a layer without one, because a stack may have the same content twice.
    place.ok("commit --compact fb compact");
    place.ok("commit --compact --tar fb compact2");
    assert_eq!(place.ident("compact").0, NIL);
    place.ok("verify fa compact compact2");
    // A layer that obdsetup made over a layer with a UUID is refused over a layer that has lost its UUID.
    place.ok(&format!("commit {FOREIGN} b lost"));
    place
        .run("verify a lost c")
        .code(3)
        .stderr(contains("has no UUID: whether it is the right layer"));
    // With layers of other tools, a smaller layer over a larger one is only a warning.
    place.write("small.raw", &disk(0)[..1 << 20]);
    place.ok(&format!("create {FOREIGN} --image small.raw small"));
    place
        .run("verify fa small")
        .success()
        .stderr(contains("the end is cut off"));
}

/// If the UUID of a layer is computed from its parent, the layer gets another UUID over another parent.
fn another_place_is_another_uuid() {
    const OTHER: &str = "11111111-2222-4333-8444-555566667777";
    let place = Place::with_stack();
    let [a, b, c] = ["a", "b", "c"].map(|name| place.ident(name));
    // A layer as other tools make it: with a UUID, without a parent UUID.
    place.ok(&format!(
        "create --base a --uuid {OTHER} --parent-uuid {NIL} --image b.raw foreign"
    ));
    place.ok("create --base a --base foreign --image c.raw over");
    assert_eq!(place.ident("over").1, OTHER);
    place
        .run("merge -o m foreign over")
        .success()
        .stderr(contains("does not keep UUID").and(contains("--ignore-identity")));
    assert_ne!(place.ident("m").0, place.ident("over").0);
    place.ok("verify a m");
    place.ok(&format!("merge -o m2 --parent-uuid {} foreign over", a.0));
    assert_eq!(place.ident("m2"), (place.ident("over").0, a.0.clone()));
    place.ok("verify a m2");

    let tells = |line: &str, now: &str| {
        place
            .run(line)
            .success()
            .stderr(contains(now).count(1).and(contains("note: ").count(1)));
    };
    let text = format!(
        "and no longer {}, since its UUID depends on the layer below",
        c.0
    );
    tells(&format!("commit --parent-uuid {OTHER} c moved"), &text);
    let moved = place.ident("moved");
    assert!(moved.0 != c.0 && moved.1 == OTHER, "{moved:?}");
    let text = format!("back: has UUID {}, and no longer {}", c.0, moved.0);
    tells(&format!("commit --parent-uuid {} moved back", b.0), &text);
    assert_eq!(place.ident("back"), c);
    // If the user gives the UUID, there is no note.
    place.ok(&format!(
        "commit --parent-uuid {OTHER} --uuid {} c asked",
        c.0
    ));
    let lower = b.0.to_lowercase();
    place.ok(&format!("commit --parent-uuid {lower} c same"));
    assert_eq!(place.ident("same").0, c.0);
    // A UUID that another tool gave stays.
    place.ok(&format!("commit --parent-uuid {} foreign named", a.0));
    assert_eq!(place.ident("named").0, OTHER);
    let text = format!("none: has no UUID, and had {}", b.0);
    tells(&format!("commit --parent-uuid {NIL} b none"), &text);
    assert_eq!(place.ident("none"), (NIL.to_owned(), NIL.to_owned()));
    place.ok("verify a none");
}

fn images_of_another_size() {
    let place = Place::with_stack();
    let mut longer = disk(1);
    longer.extend_from_slice(&[9; 4096]);
    place.write("longer.raw", &longer);
    place.write("shorter.raw", &disk(1)[..(3 << 20) - 512]);
    let size = 3 << 20;
    place
        .run("create --base a --image longer.raw out")
        .code(1)
        .stderr(contains(format!(
            "longer.raw: has {} bytes, but the layers below are a disk of {size} bytes: --grow",
            size + 4096
        )));
    for grow in ["", "--grow"] {
        place
            .run(&format!("create --base a --image shorter.raw out {grow}"))
            .code(1)
            .stderr(contains(format!(
                "{} bytes, but the layers below are a disk of {size}",
                size - 512
            )));
    }
    assert!(!place.path("out").exists());
    place.ok("create --base a --image longer.raw --grow out");
    place.ok("verify a out");
    place.ok("export -o back.raw a out");
    assert!(place.read("back.raw") == longer);
    // Sizes are compared in whole sectors, because the device of a disk has only those.
    place.write("odd.raw", &longer[..size + 100]);
    place.write("even.raw", &longer[..size + 512]);
    place.ok("create --raw --image odd.raw odd");
    place.ok("create --base odd --image even.raw even");
    place.ok("verify odd even");
}

fn layers_end_on_a_sector() {
    let place = Place::new();
    for len in [1, 511, 4096, 100_000, 1_000_003] {
        place.write("disk.raw", &disk(0)[..len]);
        for wrapping in [
            "",
            "--no-crc",
            "--tar",
            "--algorithm zstd --block-size 64k",
            "--algorithm zstd --tar",
            "--algorithm none",
            "--algorithm none --tar",
        ] {
            for command in [
                "create --raw --image disk.raw layer",
                "convert --from raw disk.raw converted",
                "merge layer -o merged",
            ] {
                place.ok(&format!("{command} --force {wrapping}"));
            }
            for made in ["layer", "converted", "merged"] {
                let said = format!("{made}: {len} bytes, {wrapping}");
                assert_eq!(place.read(made).len() % 512, 0, "{said}");
            }
            place.ok("verify layer");
            let table = place.run("table layer").success();
            let table = String::from_utf8(table.get_output().stdout.clone()).unwrap();
            assert!(
                !table.contains("TAIL") && table.lines().count() <= 2,
                "{table}"
            );
            place.ok("commit --force --tar layer other");
            place.ok("commit --force other other.obd");
            assert_eq!(place.read("other.obd").len() % 512, 0);
        }
    }
}

fn what_is_replaced_keeps_its_permissions() {
    let place = Place::with_stack();
    place.write("out", b"old");
    let path = place.path("out");
    let mode = || path.metadata().unwrap().mode() & 0o7777;
    for command in [
        "create --image a.raw --force out",
        "commit --force a out",
        "merge --force -o out a b",
        "convert --from raw --force a.raw out",
        "export --force -o out a b",
        "dump --force -o out a b",
    ] {
        for wanted in [0o600, 0o640, 0o444, 0o666] {
            fs::set_permissions(&path, fs::Permissions::from_mode(wanted)).unwrap();
            place.ok(command);
            assert_eq!(mode(), wanted, "{command}");
        }
    }
    // If the output is a symbolic link, its target is replaced or made. If the replaced file has other names,
    // a message says so.
    symlink("target", place.path("link")).unwrap();
    place.ok("commit --force a link");
    assert!(place.path("link").is_symlink() && place.read("target") == place.read("a"));
    fs::hard_link(place.path("target"), place.path("name")).unwrap();
    place
        .run("commit --force b target")
        .success()
        .stderr(contains("has 2 names (hard links)"));
    assert!(place.read("name") == place.read("a"));
}

/// Run by root, obdsetup keeps the owner, too.
fn what_is_replaced_keeps_its_owner() {
    let place = Place::with_stack();
    place.write("out", b"old");
    let path = place.path("out");
    std::os::unix::fs::chown(&path, Some(1234), Some(2345)).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o640)).unwrap();
    place.ok("commit --force a out");
    let meta = path.metadata().unwrap();
    let mode = meta.mode() & 0o7777;
    assert_eq!((meta.uid(), meta.gid(), mode), (1234, 2345, 0o640));
}

fn what_is_replaced_keeps_its_access_control_list() {
    let place = Place::with_stack();
    place.write("out", b"old");
    let path = place.path("out");
    let list = needs::acl(1234);
    rustix::fs::setxattr(&path, needs::ACL, &list, rustix::fs::XattrFlags::empty()).unwrap();
    place.ok("commit --force b out");
    let mut found = vec![0; 1024];
    let len = rustix::fs::getxattr(&path, needs::ACL, &mut found).unwrap();
    assert_eq!(found[..len], list);
}

fn what_others_write_to_is_not_read() {
    let place = Place::with_stack();
    let said = |name: &str| {
        contains(format!("{name}: process {}", std::process::id()))
            .and(contains("has it open for writing"))
            .and(contains("--allow-in-use"))
    };
    let image = File::options()
        .append(true)
        .open(place.path("a.raw"))
        .unwrap();
    for command in [
        "create --image a.raw out",
        "create --base a --image a.raw out",
        "convert --from raw a.raw out",
    ] {
        place.run(command).code(5).stderr(said("a.raw"));
        assert!(!place.path("out").exists());
    }
    // A layer or a tar that is in use is refused, too, by each command that reads its content.
    let layer = File::options().append(true).open(place.path("a")).unwrap();
    let archive = File::options()
        .append(true)
        .create(true)
        .open(place.path("t.tar"))
        .unwrap();
    archive.set_len(1024).unwrap();
    for (command, name) in [
        ("commit a out", "a"),
        ("commit --compact a out", "a"),
        ("merge -o out a b", "a"),
        ("export -o out a b", "a"),
        ("dump -o out a", "a"),
        ("verify a b", "a"),
        ("create --base a --base b --image c.raw out", "a"),
        ("apply t.tar --base b --ignore-identity out", "t.tar"),
        ("apply t.tar --base a out", "a"),
        ("convert --from tar t.tar --fs erofs out", "t.tar"),
    ] {
        place.run(command).code(5).stderr(said(name));
        assert!(!place.path("out").exists(), "{command}");
    }
    place.ok("commit --allow-in-use a out");
    place.ok("merge --allow-in-use -o out a b --force");
    place.ok("export --allow-in-use -o out a b --force");
    place.ok("dump --allow-in-use -o out a --force");
    place.ok("verify --allow-in-use a b");
    // `info` doesn't read the data of a layer, so it takes one that is in use.
    place.ok("info a");
    drop((layer, archive));
    fs::remove_file(place.path("out")).unwrap();
    place.ok("create --allow-in-use --image a.raw out");
    place.ok("convert --from raw --allow-in-use a.raw out --force");
    drop(image);
    // A file that is open only for reading is not in use.
    let reader = File::open(place.path("a.raw")).unwrap();
    place.ok("create --image a.raw out --force");
    drop(reader);

    let layer = File::options()
        .read(true)
        .write(true)
        .open(place.path("b"))
        .unwrap();
    place
        .run("open obd-identity-test a b c")
        .code(5)
        .stderr(said("b"));
    drop(layer);
    place
        .run("open obd-identity-test a b c")
        .failure()
        .stderr(contains("open for writing").not());
}
