// SPDX-License-Identifier: GPL-2.0

//! The same files make the same bytes, whatever the clock, the time zone, the locale, the order in
//! directories, inodes and holes.

#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::ffi::OsStr;
use std::fs::{self, File};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::Path;
use std::process::{Command, Output};
use std::time::{Duration, SystemTime};

use tempfile::TempDir;

/// Names of files in the tree, in the order in which one of the trees is made.
const NAMES: [&str; 8] = [
    "zeta",
    "alpha",
    "Beta",
    "-dash",
    "with blank",
    "ä",
    "e\nf",
    "10",
];

fn has(program: &str) -> bool {
    let places = ["/usr/sbin", "/sbin", "/usr/bin", "/bin"];
    places
        .iter()
        .any(|place| Path::new(place).join(program).exists())
}

/// The file systems that can be made here.
fn file_systems() -> Vec<&'static str> {
    let mut all = vec!["erofs", "btrfs"];
    if has("mke2fs") && has("debugfs") {
        all.extend(["ext2", "ext3", "ext4"]);
    }
    if has("mksquashfs") {
        all.push("squashfs");
    }
    all
}

fn obdsetup(place: &Path, args: &[&OsStr], env: &[(&str, &str)]) -> Output {
    let mut command = Command::new(assert_cmd::cargo::cargo_bin("obdsetup"));
    command.args(args).current_dir(place);
    command.env_remove("SOURCE_DATE_EPOCH");
    command.envs(env.iter().copied()).output().unwrap()
}

/// Runs it with words as arguments, and checks that it succeeds.
fn run(place: &Path, line: &str, env: &[(&str, &str)]) {
    let args: Vec<&OsStr> = line.split(' ').map(OsStr::new).collect();
    let output = obdsetup(place, &args, env);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{line}: {said}");
}

/// Makes the tree `root`; `turn` changes how, but not what it is.
fn make(root: &Path, turn: usize) {
    let when = |seconds| SystemTime::UNIX_EPOCH + Duration::new(seconds, 123_456_789);
    fs::create_dir_all(root.join("sub/empty")).unwrap();
    // Other inodes, and another order in directories of some file systems.
    for nth in 0..turn * 5 {
        fs::write(root.join(format!("gone{nth}")), b"").unwrap();
    }
    let mut names = NAMES;
    names.rotate_left(turn * 3);
    for name in names {
        fs::write(root.join(name), format!("what is in {name}").repeat(300)).unwrap();
        fs::write(root.join("sub").join(name), b"").unwrap();
    }
    for nth in 0..turn * 5 {
        fs::remove_file(root.join(format!("gone{nth}"))).unwrap();
    }
    let sparse = File::create(root.join("sparse")).unwrap();
    sparse.set_len(1 << 20).unwrap();
    sparse.write_all_at(&[7; 5000], 300_000).unwrap();
    if turn > 0 {
        // Zeros in the place of a hole.
        sparse.write_all_at(&[0; 200_000], 400_000).unwrap();
    }
    fs::hard_link(root.join("zeta"), root.join("sub/hard")).unwrap();
    std::os::unix::fs::symlink("sub/hard", root.join("link")).unwrap();
    let touched = Command::new("touch")
        .args(["--no-dereference", "--date=@1600000000.5"])
        .arg(root.join("link"))
        .status();
    assert!(touched.unwrap().success());
    for entry in walkdir::WalkDir::new(root).contents_first(true) {
        let entry = entry.unwrap();
        if !entry.file_type().is_symlink() {
            let file = File::open(entry.path()).unwrap();
            file.set_modified(when(1_700_000_000)).unwrap();
        }
    }
    fs::set_permissions(root, fs::Permissions::from_mode(0o2751)).unwrap();
    File::open(root)
        .unwrap()
        .set_modified(when(5_000_000_000))
        .unwrap();
}

#[test]
fn same_tree_same_bytes() {
    let place = TempDir::new().unwrap();
    let place = place.path();
    make(&place.join("one"), 0);
    make(&place.join("two"), 1);
    let here: &[_] = &[("TZ", "UTC0"), ("LC_ALL", "C")];
    let there: &[_] = &[
        ("TZ", "Pacific/Auckland"),
        ("LC_ALL", "C.UTF-8"),
        ("MKE2FS_CONFIG", "/dev/null"),
        ("TAR_OPTIONS", "--exclude=*"),
    ];
    for tree in ["one", "two"] {
        let tar = Command::new("tar")
            .args(["--format=pax", "--sparse", "--numeric-owner", "-cf"])
            .args([&format!("{tree}.tar"), "-C", tree, "."])
            .current_dir(place)
            .status();
        assert!(tar.unwrap().success());
    }
    for fs in file_systems() {
        for (nth, (tree, env)) in [("one", here), ("two", there)].into_iter().enumerate() {
            run(
                place,
                &format!("create --directory {tree} --fs {fs} dir{nth}.obd --force"),
                env,
            );
            run(
                place,
                &format!("convert {tree}.tar tar{nth}.obd --fs {fs} --force"),
                env,
            );
            // Clocks count seconds.
            std::thread::sleep(Duration::from_millis(
                1100 * (1 - u64::try_from(nth).unwrap()),
            ));
        }
        let read = |name: &str| fs::read(place.join(name)).unwrap();
        let first = read("dir0.obd");
        for other in ["dir1.obd", "tar0.obd", "tar1.obd"] {
            assert!(read(other) == first, "{fs}: {other} differs");
        }
    }
}

#[test]
fn all_wrappings() {
    let place = TempDir::new().unwrap();
    let place = place.path();
    make(&place.join("one"), 0);
    for wrapping in [
        "--algorithm lz4",
        "--algorithm zstd --tar",
        "--algorithm none",
    ] {
        for (layer, env) in [("a.obd", ("TZ", "UTC0")), ("b.obd", ("TZ", "Asia/Tokyo"))] {
            let line = format!("create --directory one --fs erofs {wrapping} {layer} --force");
            run(place, &line, &[env]);
            std::thread::sleep(Duration::from_millis(1100));
        }
        let read = |name: &str| fs::read(place.join(name)).unwrap();
        assert!(read("a.obd") == read("b.obd"), "{wrapping}");
    }
}

#[test]
fn source_date_epoch() {
    let place = TempDir::new().unwrap();
    let place = place.path();
    make(&place.join("one"), 0);
    make(&place.join("two"), 1);
    let newer = SystemTime::UNIX_EPOCH + Duration::from_secs(1_750_000_000);
    for name in ["two/zeta", "two/sub", "two"] {
        File::open(place.join(name))
            .unwrap()
            .set_modified(newer)
            .unwrap();
    }
    for fs in file_systems() {
        let epoch = &[("SOURCE_DATE_EPOCH", "1500000000")];
        run(
            place,
            &format!("create --directory one --fs {fs} a.obd --force"),
            epoch,
        );
        run(
            place,
            &format!("create --directory two --fs {fs} b.obd --force"),
            epoch,
        );
        run(
            place,
            &format!("create --directory two --fs {fs} c.obd --force"),
            &[],
        );
        let read = |name: &str| fs::read(place.join(name)).unwrap();
        assert!(read("a.obd") == read("b.obd"), "{fs}");
        assert!(read("b.obd") != read("c.obd"), "{fs}");
    }
    let args = ["create", "--directory", "one", "--fs", "erofs", "d.obd"].map(OsStr::new);
    let output = obdsetup(place, &args, &[("SOURCE_DATE_EPOCH", "yesterday")]);
    assert_eq!(output.status.code(), Some(1));
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(
        said.contains("SOURCE_DATE_EPOCH=yesterday: not a number of seconds"),
        "{said}"
    );
    assert!(!place.join("d.obd").exists());
}

#[test]
fn content_makes_the_uuid() {
    let place = TempDir::new().unwrap();
    let place = place.path();
    make(&place.join("one"), 0);
    run(
        place,
        "create --directory one --fs btrfs --algorithm none a.obd",
        &[],
    );
    let when = fs::metadata(place.join("one/zeta"))
        .unwrap()
        .modified()
        .unwrap();
    let file = File::options()
        .write(true)
        .open(place.join("one/zeta"))
        .unwrap();
    file.write_all_at(b"W", 0).unwrap();
    file.set_modified(when).unwrap();
    run(
        place,
        "create --directory one --fs btrfs --algorithm none b.obd",
        &[],
    );
    let uuid = |name: &str| {
        run(place, &format!("dump {name} -o raw --force"), &[]);
        fs::read(place.join("raw"))
            .unwrap()
            .get(65536 + 32..65536 + 48)
            .unwrap()
            .to_vec()
    };
    assert_ne!(uuid("a.obd"), uuid("b.obd"));
}

#[test]
fn large_holes_cost_nothing() {
    let place = TempDir::new().unwrap();
    let place = place.path();
    fs::create_dir(place.join("d")).unwrap();
    let file = File::create(place.join("d/sparse")).unwrap();
    file.set_len(500 << 30).unwrap();
    file.write_all_at(b"here", 300 << 30).unwrap();
    for fs in file_systems().into_iter().filter(|&fs| fs != "squashfs") {
        let start = std::time::Instant::now();
        run(
            place,
            &format!("create --directory d --fs {fs} {fs}.obd"),
            &[],
        );
        assert!(
            start.elapsed() < Duration::from_secs(60),
            "{fs}: {:?}",
            start.elapsed()
        );
        let len = fs::metadata(place.join(format!("{fs}.obd"))).unwrap().len();
        assert!(len < 1 << 20, "{fs}: {len} bytes");
    }
}
