// SPDX-License-Identifier: GPL-2.0

//! `obdsetup create --changes`: a layer made of a store equals the layer made of the whole changed disk.
//! Stores that cannot be used are refused with the reason.

use std::fs::File;
use std::os::unix::fs::FileExt;

use overlaybd::changes::exceptions::full_size;
use overlaybd::changes::{Head, Origin, State};
use overlaybd::Stack;
use predicates::str::contains;

use crate::common::changes::{entry, head, pieces, Chunk};
use crate::common::{noise, tests, Place};

tests! {
    same_layer_as_of_the_whole_disk;
    a_large_disk;
    stores_that_are_refused;
    what_is_no_store;
    bases_that_are_wrong;
    options_of_other_inputs;
    thin_volumes;
}

const CREATE: &str = "create --changes store --base a --base b";

/// The head and the chunks of a store that no disk uses.
struct Changes {
    head: Head,
    chunks: Vec<Chunk>,
}

impl Place {
    /// Returns a place with two layers, `a` and `b`, of a disk of `size` bytes, and with that disk as `disk`.
    fn with_two_layers(size: u64) -> Self {
        let place = Self::new();
        File::create(place.path("disk"))
            .unwrap()
            .set_len(size)
            .unwrap();
        place.edit("disk", 0, &noise(300_000, 1));
        place.ok("create --image disk a");
        place.edit("disk", 100_000, &noise(50_000, 2));
        place.edit("disk", size - 9_000, &noise(9_000, 3));
        place.ok("create --base a --image disk b");
        place
    }

    /// Writes to a file, and closes it, because obdsetup refuses files that are open for writing.
    fn edit(&self, name: &str, at: u64, bytes: &[u8]) {
        let file = File::options().write(true).open(self.path(name));
        file.unwrap().write_all_at(bytes, at).unwrap();
    }

    /// Returns the origin that identifies the layers, and the number of sectors of their disk.
    fn origin(&self, layers: &[&str]) -> (Origin, u64) {
        let paths: Vec<_> = layers.iter().map(|layer| self.path(layer)).collect();
        let stack = Stack::open(&paths).unwrap();
        (Origin::of(&stack, true).unwrap(), stack.sectors())
    }

    /// Writes `chunks` to a new store, the file `store`, and to `disk`.
    fn change(&self, chunks: Vec<Chunk>) -> Changes {
        let (origin, sectors) = self.origin(&["a", "b"]);
        let head = head(sectors, full_size(sectors) / 8, origin);
        for (at, bytes) in &chunks {
            let end = (sectors * 512 - at * 4096).min(4096) as usize;
            self.edit("disk", at * 4096, &bytes[..end]);
        }
        let changes = Changes { head, chunks };
        self.store(&changes, |_| {});
        changes
    }

    /// Writes the file `store`, with the head as changed by `edit`.
    fn store(&self, changes: &Changes, edit: impl FnOnce(&mut Head)) {
        let mut head = changes.head.clone();
        edit(&mut head);
        let file = File::create(self.path("store")).unwrap();
        file.set_len(4096 + head.store * 512).unwrap();
        for (at, bytes) in pieces(&head, &changes.chunks) {
            file.write_all_at(&bytes, at).unwrap();
        }
    }
}

/// Returns chunks that are changed, changed in part, written without a change, or zeroed, and the last chunk of
/// the disk.
fn some(place: &Place, size: u64) -> Vec<Chunk> {
    let disk = place.read("disk");
    let old = |at: usize| {
        let mut bytes = disk[at * 4096..].to_vec();
        bytes.resize(4096, 0xee);
        bytes
    };
    let mut part = old(70);
    part[9] ^= 1;
    let last = (size - 1) / 4096;
    vec![
        (70, part),
        (3, noise(4096, 7)),
        (4, noise(4096, 8)),
        (30, old(30)),
        (2, vec![0; 4096]),
        // The layers have no data here.
        (200, vec![0; 4096]),
        (201, noise(4096, 9)),
        (last, noise(4096, 10)),
    ]
}

fn same_layer_as_of_the_whole_disk() {
    for size in [3 << 20, (3 << 20) + 1536] {
        let place = Place::with_two_layers(size);
        place.change(some(&place, size));
        for options in [
            "",
            "--algorithm none",
            "--algorithm zstd --block-size 64k --tar",
            "--granularity 512",
            "--granularity 1m",
            "--uuid 00000000-0000-0000-0000-000000000000 --user-tag mine",
        ] {
            place.ok(&format!("{CREATE} fast --force {options}"));
            place.ok(&format!(
                "create --image disk --base a --base b slow --force {options}"
            ));
            assert!(place.read("fast") == place.read("slow"), "{size} {options}");
        }
        place.ok("create --image disk --base a --base b slow --force");
        place.ok(&format!("{CREATE} fast --force"));
        place.ok("export a b fast -o out");
        assert!(place.read("out") == place.read("disk"));
    }
    // A store to which nothing was written.
    let place = Place::with_two_layers(3 << 20);
    place.change(Vec::new());
    place.ok(&format!("{CREATE} fast"));
    place.ok("create --image disk --base a --base b slow");
    assert!(place.read("fast") == place.read("slow"));
}

/// 10 MiB of changes, spread over a disk of 100 GiB.
fn a_large_disk() {
    let size = 100 << 30;
    let place = Place::with_two_layers(size);
    let step = size / 4096 / 2560;
    let chunk = |nth: u64| (nth * 997 % 2560 * step, noise(4096, nth as u32));
    place.change((0..2560).map(chunk).collect());
    let start = std::time::Instant::now();
    place.ok(&format!("{CREATE} fast"));
    let took = start.elapsed();
    place.ok("create --image disk --base a --base b slow");
    assert!(place.read("fast") == place.read("slow"));
    // Much less than reading the whole disk would take.
    assert!(took.as_secs() < 60, "{took:?}");
}

fn stores_that_are_refused() {
    let size = 3 << 20;
    let place = Place::with_two_layers(size);
    let changes = place.change(some(&place, size));
    let refused = |said: &str| {
        let done = place.run(&format!("{CREATE} out")).code(3);
        done.stderr(contains("store: ")).stderr(contains(said));
        assert!(!place.path("out").exists());
    };
    place.store(&changes, |head| head.state = State::Open);
    refused("was not closed when it was open last: `obdsetup open --writable' it");
    place.store(&changes, |head| head.state = State::Overflowed);
    refused("was full, and writes to the disk failed");
    place.store(&changes, |head| head.state = State::Failed);
    refused("a write to it failed when it was open last");
    place.store(&changes, |head| head.origin.digest[0] ^= 1);
    refused("has the changes of another disk");
    place.store(&changes, |head| head.disk += 8);
    refused("has the changes of another disk");

    let edit = |at: u64, bytes: &[u8]| {
        place.store(&changes, |_| {});
        place.edit("store", at, bytes);
    };
    edit(4096 + 4, &[0]);
    refused("the changes are lost");
    edit(4096, b"snAP");
    refused("snapshot magic at byte 4096");
    edit(entry(&changes.head, 2), &[0xff; 8]);
    refused("exception 2 of the store at byte 8224");
    edit(entry(&changes.head, 2), &70u64.to_le_bytes());
    refused("disk chunk 70 is there twice");
    edit(20, &[7]);
    refused("head CRC at byte 508");
    let len = 4096 + changes.head.store * 512 - 1;
    place.store(&changes, |_| {});
    let file = File::options().write(true).open(place.path("store"));
    file.unwrap().set_len(len).unwrap();
    refused("the store of changes is cut short");
}

fn what_is_no_store() {
    let place = Place::with_two_layers(3 << 20);
    place.write("empty", b"");
    for (name, said) in [
        ("a", "not a store of changes: begins with"),
        ("disk", "not a store of changes"),
        ("empty", "not a store of changes"),
    ] {
        let done = place.run(&format!("create --changes {name} --base a --base b out"));
        done.code(3).stderr(contains(said));
    }
    let done = place.run("create --changes none --base a out");
    done.code(4).stderr(contains("none: cannot open"));
    place.run("create --changes a out").code(1);
    place
        .run("create --changes a --image b --base a out")
        .code(1);
    place.run("open --writable a --zfile x a").code(1);
    for option in ["--store-size 1g", "--create", "--take-over"] {
        let done = place.run(&format!("open {option} x a")).code(1);
        done.stderr(contains("are for --writable"));
    }
    assert!(!place.path("out").exists());
}

fn bases_that_are_wrong() {
    let size = 3 << 20;
    let place = Place::with_two_layers(size);
    place.change(some(&place, size));
    let other =
        "has the changes of another disk: that disk has 3145728 bytes (3.00 MiB), and its topmost ";
    for base in ["--base a", "--base c"] {
        place.ok("merge --lowest a b -o c --uuid 00000000-0000-0000-0000-000000000000 --force");
        let done = place
            .run(&format!("create --changes store {base} out"))
            .code(3);
        done.stderr(contains(other));
    }
    // The topmost layer, `b`, is the right one, but the layer below it is another one.
    place.edit("disk", 0, &noise(4096, 77));
    place.ok("create --image disk e");
    let done = place.run("create --changes store --base e --base b --ignore-identity out");
    done.code(3)
        .stderr(contains("has the changes of another disk"));
    // A layer that is only wrapped in another way is accepted.
    place.ok("commit --algorithm none b d");
    place.ok("create --changes store --base a --base d out");
    // So is the merged layer, which has the UUID of the topmost one.
    place.ok("merge a b -o both");
    place.ok("create --changes store --base both out2");
    assert!(place.read("out") == place.read("out2"));
}

/// An option that doesn't apply to the input is refused, not ignored.
fn options_of_other_inputs() {
    let place = Place::with_two_layers(3 << 20);
    std::fs::create_dir(place.path("dir")).unwrap();
    place.write("map", b"");
    let of_directory = [
        "--fs ext4",
        "--size 9m",
        "--mkfs-arg=-q",
        "--allow-loss",
        "--keep-whiteouts",
    ];
    for (input, options) in [
        ("--image disk", &of_directory[..]),
        ("--image disk", &["--thin-map map"]),
        ("--changes a --base a", &of_directory),
        ("--changes a --base a", &["--raw", "--grow"]),
        (
            "--directory dir --fs ext4",
            &["--raw", "--grow", "--thin-map map"],
        ),
    ] {
        for option in options {
            let done = place.run(&format!("create {input} {option} out")).code(1);
            done.stderr(contains("cannot be used with"));
            assert!(!place.path("out").exists(), "{input} {option}");
        }
    }
}

/// A file takes the place of a thin volume. `--thin-map` gives the list of its mapped blocks.
fn thin_volumes() {
    let size = 3 << 20;
    let place = Place::with_two_layers(size);
    let before = place.read("disk");
    place.change(some(&place, size));
    let after = place.read("disk");
    // Blocks of 64 KiB.
    let changed = |nth: &usize| before[nth << 16..][..1 << 16] != after[nth << 16..][..1 << 16];
    let changed: Vec<usize> = (0..48).filter(changed).collect();
    let mapping = |nth: &usize| {
        format!("<single_mapping origin_block=\"{nth}\" data_block=\"9\" time=\"0\"/>")
    };
    let mappings = changed.iter().map(mapping).collect::<Vec<_>>().concat();
    let map = |blocks: usize, mappings: &str| {
        let text = format!(
            "<superblock data_block_size=\"128\">\n\
             <device dev_id=\"0\" mapped_blocks=\"{blocks}\">{mappings}</device></superblock>"
        );
        place.write("map", text.as_bytes());
    };
    map(changed.len(), &mappings);
    let create = "create --changes disk --thin-map map --base a --base b";
    place.ok(&format!("{create} fast"));
    place.ok("create --image disk --base a --base b slow");
    assert!(place.read("fast") == place.read("slow"));
    // Blocks that are not mapped are not compared.
    map(
        1,
        "<range_mapping origin_begin=\"0\" data_begin=\"0\" length=\"1\" time=\"0\"/>",
    );
    place.ok(&format!("{create} first"));
    place.ok("export a b first -o out");
    let out = place.read("out");
    assert!(out[..1 << 16] == after[..1 << 16] && out[1 << 16..] == before[1 << 16..]);

    // A list that is cut off, as by a thin_dump that was killed, and one with another number of blocks than it
    // says.
    for (blocks, end) in [(changed.len(), "cut"), (changed.len() + 1, "")] {
        map(blocks, &mappings);
        let text = place.read("map");
        let len = match end {
            "cut" => text.len() - "</device></superblock>".len(),
            _ => text.len(),
        };
        place.write("map", &text[..len]);
        let said = match end {
            "cut" => "is cut off: give what thin_dump",
            _ => "but `mapped_blocks' is ",
        };
        let done = place.run(&format!("{create} out2")).code(3);
        done.stderr(contains(said));
    }
    map(1, "<single_mapping/>");
    let done = place.run(&format!("{create} out2")).code(3);
    done.stderr(contains("map: byte "))
        .stderr(contains("give what thin_dump or thin_delta has written"));
    let done = place.run("create --changes a --thin-map map --base a --base b out2");
    done.code(3);
    place
        .run("create --image disk --thin-map map --base a out2")
        .code(1);
    map(0, "");
    let done = place.run("create --changes a --thin-map map --base a --base b out2");
    done.code(1)
        .stderr(contains("but the layers below are a disk of"));
    assert!(!place.path("out2").exists());
}
