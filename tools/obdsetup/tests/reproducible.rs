// SPDX-License-Identifier: GPL-2.0

//! The same files give the same bytes. The clock, the time zone, the locale, the user, the host and
//! the umask make no difference, nor do inode numbers, holes, and the order of directory entries,
//! extended attributes and hard links.

use std::fs::{self, File};
use std::os::unix::fs::{chown, FileExt, PermissionsExt};
use std::path::Path;
use std::process::{Command, Output};
use std::time::{Duration, Instant};

use assert_cmd::cargo::cargo_bin;
use libtest_mimic::Trial;
use rustix::fs::{mknodat, AtFlags, FileType, Mode, Timespec, Timestamps, XattrFlags, CWD};

use crate::common::needs::{self, Need};
use crate::common::{trial, Place};

/// The file systems, and what each needs.
const FILE_SYSTEMS: [(&str, Needs); 6] = [
    ("erofs", || None),
    ("btrfs", || None),
    ("ext2", needs::e2fsprogs),
    ("ext3", needs::e2fsprogs),
    ("ext4", needs::e2fsprogs),
    ("squashfs", needs::mksquashfs),
];

/// Returns why a file system cannot be made on this machine; `None` if it can.
type Needs = fn() -> Need;

/// A test for a file system.
type Test = fn(&'static str);

/// Returns the tests: most of them once for each file system, and those that don't depend on one.
pub(crate) fn trials() -> Vec<Trial> {
    let xattrs = needs::xattrs();
    let root = needs::device_nodes().or_else(|| xattrs.clone());
    let locale = needs::locale().err();
    let tests: [(&str, Test, Need); 9] = [
        ("same_tree_same_bytes", same_tree_same_bytes, None),
        ("attributes_and_fifos", attributes_and_fifos, xattrs),
        ("what_only_root_has", what_only_root_has, root),
        ("all_wrappings", all_wrappings, None),
        ("source_date_epoch", source_date_epoch, None),
        ("another_locale", another_locale, locale),
        ("another_host", another_host, needs::other_host()),
        ("another_user", another_user, no_other_user()),
        ("large_holes_cost_nothing", large_holes_cost_nothing, None),
    ];
    let mut trials = vec![
        trial(module_path!(), "bad_epoch", &[], bad_epoch),
        trial(
            module_path!(),
            "content_makes_the_uuid",
            &[],
            content_makes_the_uuid,
        ),
    ];
    for (name, test, need) in tests {
        for (fs, of_fs) in FILE_SYSTEMS {
            // mksquashfs reads the whole hole.
            if name == "large_holes_cost_nothing" && fs == "squashfs" {
                continue;
            }
            let needs = [need.clone(), of_fs()];
            let name = format!("{name}: {fs}");
            trials.push(trial(module_path!(), &name, &needs, move || test(fs)));
        }
    }
    trials
}

/// Names of files in the tree, in the order in which the first tree gets them.
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

/// The environment in which obdsetup is run.
#[derive(Default)]
struct Here {
    env: Vec<(String, String)>,
    /// Commands that the shell runs before obdsetup.
    before: &'static str,
    /// A program and its arguments that runs the shell.
    through: &'static [&'static str],
}

impl Here {
    fn with(env: &[(&str, &str)]) -> Self {
        let owned = |&(name, value): &(&str, &str)| (name.to_owned(), value.to_owned());
        Self {
            env: env.iter().map(owned).collect(),
            ..Self::default()
        }
    }

    /// Another time zone, umask, home directory and user name, and variables that change what programs do.
    fn elsewhere() -> Self {
        let mut there = Self::with(&[
            ("TZ", "Pacific/Auckland"),
            ("LC_ALL", "C.UTF-8"),
            ("MKE2FS_CONFIG", "/dev/null"),
            ("TAR_OPTIONS", "--exclude=*"),
            ("HOME", "/nonexistent"),
            ("USER", "somebody"),
            ("LOGNAME", "somebody"),
        ]);
        there.before = "umask 077;";
        there
    }

    fn output(&self, place: &Path, line: &str) -> Output {
        let script = format!("{} exec \"$@\"", self.before);
        let mut words: Vec<&str> = self.through.to_vec();
        words.extend(["sh", "-c", &script, "sh"]);
        let mut command = Command::new(words[0]);
        command.args(&words[1..]).arg(cargo_bin!("obdsetup"));
        command.args(line.split(' ').filter(|word| !word.is_empty()));
        command.current_dir(place).env_remove("SOURCE_DATE_EPOCH");
        let env = self.env.iter().map(|(name, value)| (name, value));
        command.envs(env).output().unwrap()
    }
}

/// Runs obdsetup with the words of `line` as arguments, and checks that it succeeds.
fn run(place: &Path, line: &str, here: &Here) {
    let output = here.output(place, line);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{line}: {said}");
}

/// Sets the times of the last access and the last change of a file. For a symbolic link, sets its own times.
fn set_time(path: &Path, seconds: i64, nanoseconds: i64) {
    let time = Timespec {
        tv_sec: seconds,
        tv_nsec: nanoseconds,
    };
    let times = Timestamps {
        last_access: time,
        last_modification: time,
    };
    rustix::fs::utimensat(CWD, path, &times, AtFlags::SYMLINK_NOFOLLOW).unwrap();
}

/// The argument `more` of [`make`] for a tree without additions.
fn nothing(_: &Path, _: usize) {}

/// Makes the tree `root`, and calls `more` to add to it. Another `turn` makes the same tree in another way.
fn make(root: &Path, turn: usize, more: impl Fn(&Path, usize)) {
    fs::create_dir_all(root.join("sub/empty")).unwrap();
    // Files that are removed again. They change the inode numbers and, in some file systems, the order of entries.
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
        // Zeros instead of a hole.
        sparse.write_all_at(&[0; 200_000], 400_000).unwrap();
    }
    // Another name of two files. The order in which the two names are made differs between the trees.
    let links = [["zeta", "sub/hard"], ["link", "sub/again"]];
    std::os::unix::fs::symlink("sub/hard", root.join("link")).unwrap();
    for [one, two] in links {
        let (one, two) = (root.join(one), root.join(two));
        if turn > 0 {
            fs::rename(&one, &two).unwrap();
            rustix::fs::linkat(CWD, &two, CWD, &one, AtFlags::empty()).unwrap();
        } else {
            rustix::fs::linkat(CWD, &one, CWD, &two, AtFlags::empty()).unwrap();
        }
    }
    more(root, turn);
    for entry in walkdir::WalkDir::new(root).contents_first(true) {
        let entry = entry.unwrap();
        match entry.file_type().is_symlink() {
            true => set_time(entry.path(), 1_600_000_000, 500_000_000),
            false => set_time(entry.path(), 1_700_000_000, 123_456_789),
        }
    }
    fs::set_permissions(root, fs::Permissions::from_mode(0o2751)).unwrap();
    set_time(root, 5_000_000_000, 123_456_789);
}

/// Makes a tar of a tree, with all metadata that GNU tar can store. The name is that of the tree with `.tar`.
fn pack(place: &Path, tree: &str) {
    let done = Command::new("tar")
        .args(["--format=pax", "--sparse", "--numeric-owner"])
        .args(["--acls", "--xattrs", "--xattrs-include=*", "-cf"])
        .args([&format!("{tree}.tar"), "-C", tree, "."])
        .current_dir(place)
        .output()
        .unwrap();
    assert!(done.status.success(), "{done:?}");
}

/// Checks that the trees `one` and `two` in `place` give the same bytes: `one` in the environment `here`, `two` in
/// the environment `there`, and each of them from the directory and from a tar.
fn is_the_same(fs: &str, place: &Path, here: &Here, there: &Here) {
    for (nth, (tree, at)) in [("one", here), ("two", there)].into_iter().enumerate() {
        pack(place, tree);
        let options = match fs {
            // squashfs cannot hold access control lists.
            "squashfs" => "--fs squashfs --allow-loss",
            fs => &format!("--fs {fs}"),
        };
        run(
            place,
            &format!("create --directory {tree} {options} dir{nth}.obd"),
            at,
        );
        run(
            place,
            &format!("convert {tree}.tar tar{nth}.obd {options}"),
            at,
        );
        // So that the second tree is converted in another second.
        std::thread::sleep(Duration::from_millis(if nth == 0 { 1100 } else { 0 }));
    }
    let read = |name: &str| fs::read(place.join(name)).unwrap();
    let first = read("dir0.obd");
    for other in ["dir1.obd", "tar0.obd", "tar1.obd"] {
        assert!(read(other) == first, "{fs}: {other} differs");
    }
}

fn here() -> Here {
    Here::with(&[("TZ", "UTC0"), ("LC_ALL", "C")])
}

/// Makes the tree in both ways, and checks [`is_the_same`].
fn trees_are_the_same(fs: &str, there: &Here, more: impl Fn(&Path, usize)) {
    let place = Place::new();
    for (turn, tree) in ["one", "two"].iter().enumerate() {
        make(&place.path(tree), turn, &more);
    }
    is_the_same(fs, place.dir(), &here(), there);
}

fn same_tree_same_bytes(fs: &str) {
    trees_are_the_same(fs, &Here::elsewhere(), nothing);
}

/// Sets extended attributes: in the given order if `turn` is 0, otherwise in reverse order.
fn set_xattrs(path: &Path, turn: usize, xattrs: &[(&str, &[u8])]) {
    let mut xattrs = xattrs.to_vec();
    if turn > 0 {
        xattrs.reverse();
    }
    for (name, value) in xattrs {
        rustix::fs::setxattr(path, name, value, XattrFlags::empty()).unwrap();
    }
}

fn make_node(path: &Path, kind: FileType, device: (u32, u32)) {
    let device = rustix::fs::makedev(device.0, device.1);
    mknodat(CWD, path, kind, Mode::from_raw_mode(0o640), device).unwrap();
}

/// Adds to a tree what any user may make: a FIFO, extended attributes and access control lists.
fn more_of_a_user(root: &Path, turn: usize) {
    make_node(&root.join("fifo"), FileType::Fifo, (0, 0));
    let xattrs: [(&str, &[u8]); 4] = [
        ("user.zz", b"first"),
        ("user.a", b""),
        ("user.\u{e4}", b"\0\xff"),
        (needs::ACL, &needs::acl(1234)),
    ];
    set_xattrs(&root.join("zeta"), turn, &xattrs);
    set_xattrs(&root.join("alpha"), turn, &xattrs[..2]);
    let list: (&str, &[u8]) = ("system.posix_acl_default", &needs::acl(70_000));
    set_xattrs(&root.join("sub"), turn, &[list, xattrs[0]]);
}

fn attributes_and_fifos(fs: &str) {
    trees_are_the_same(fs, &Here::elsewhere(), more_of_a_user);
}

fn what_only_root_has(fs: &str) {
    trees_are_the_same(fs, &Here::elsewhere(), |root: &Path, turn: usize| {
        more_of_a_user(root, turn);
        make_node(&root.join("null"), FileType::CharacterDevice, (1, 3));
        make_node(&root.join("sub/loop"), FileType::BlockDevice, (7, 300));
        make_node(
            &root.join("sub/many"),
            FileType::CharacterDevice,
            (4095, 524_287),
        );
        if fs != "squashfs" {
            make_node(
                &root.join("sub/most"),
                FileType::BlockDevice,
                (4095, 1_048_575),
            );
        }
        chown(root.join("zeta"), Some(4_000_000_000), Some(70_000)).unwrap();
        chown(root.join("null"), Some(0), Some(5)).unwrap();
        // CAP_NET_BIND_SERVICE, permitted and effective, in the kernel's format, revision 2.
        let mut capability = [0; 20];
        capability[..6].copy_from_slice(&[1, 0, 0, 2, 0, 4]);
        let xattrs: [(&str, &[u8]); 2] = [
            ("security.capability", &capability),
            ("trusted.overlay.opaque", b"y"),
        ];
        set_xattrs(&root.join("10"), turn, &xattrs);
        set_xattrs(&root.join("sub"), turn, &xattrs[1..]);
    });
}

fn another_locale(fs: &str) {
    let locale = needs::locale().unwrap();
    let there = Here {
        env: locale.env.clone(),
        ..Here::default()
    };
    trees_are_the_same(fs, &there, nothing);
}

fn another_host(fs: &str) {
    let there = Here {
        before: "echo elsewhere >/proc/sys/kernel/hostname;",
        through: &["unshare", "--uts"],
        ..Here::elsewhere()
    };
    trees_are_the_same(fs, &there, nothing);
}

/// A program and its arguments that runs another program as a user who owns no files.
const AS_NOBODY: &[&str] = &[
    "setpriv",
    "--reuid=65534",
    "--regid=65534",
    "--clear-groups",
];

/// Returns why obdsetup cannot be run as another user; `None` if it can.
fn no_other_user() -> Need {
    needs::root()
        .or_else(|| needs::program("setpriv"))
        .or_else(|| {
            let mut command = Command::new(AS_NOBODY[0]);
            command.args(&AS_NOBODY[1..]).arg(cargo_bin!("obdsetup"));
            let done = command.arg("--version").output().unwrap();
            let cause = "other users cannot get at the program that is tested";
            (!done.status.success()).then(|| cause.to_owned())
        })
}

fn another_user(fs: &str) {
    let place = Place::new();
    let mode = |path: &Path, mode| fs::set_permissions(path, fs::Permissions::from_mode(mode));
    mode(place.dir(), 0o777).unwrap();
    for (turn, tree) in ["one", "two"].iter().enumerate() {
        make(&place.path(tree), turn, nothing);
        mode(&place.path(tree), 0o2755).unwrap();
    }
    let there = Here {
        through: AS_NOBODY,
        ..Here::elsewhere()
    };
    is_the_same(fs, place.dir(), &here(), &there);
}

fn all_wrappings(fs: &str) {
    let place = Place::new();
    make(&place.path("one"), 0, nothing);
    make(&place.path("two"), 1, nothing);
    let wrappings = [
        "--algorithm lz4",
        "--algorithm lz4 --tar",
        "--algorithm zstd --block-size 64k",
        "--algorithm zstd --tar --threads 1",
        "--algorithm none",
        "--algorithm none --tar",
    ];
    let epoch = Here::with(&[("SOURCE_DATE_EPOCH", "1500000000")]);
    let cases = [("one", here()), ("two", Here::elsewhere()), ("one", epoch)];
    let mut made: Vec<Vec<Vec<u8>>> = Vec::new();
    for (tree, at) in &cases {
        let layers = wrappings.iter().map(|wrapping| {
            let line = format!("create --directory {tree} --fs {fs} {wrapping} out.obd --force");
            run(place.dir(), &line, at);
            place.read("out.obd")
        });
        made.push(layers.collect());
        std::thread::sleep(Duration::from_millis(1100));
    }
    for (nth, wrapping) in wrappings.iter().enumerate() {
        assert!(made[0][nth] == made[1][nth], "{wrapping}");
        // With SOURCE_DATE_EPOCH, the times in the layer are others.
        assert!(made[0][nth] != made[2][nth], "{wrapping}");
        let others = made[0].iter().filter(|other| **other == made[0][nth]);
        assert_eq!(others.count(), 1, "{wrapping}");
    }
}

fn source_date_epoch(fs: &str) {
    let place = Place::new();
    make(&place.path("one"), 0, nothing);
    make(&place.path("two"), 1, nothing);
    for name in ["two/zeta", "two/sub", "two"] {
        set_time(&place.path(name), 1_750_000_000, 0);
    }
    pack(place.dir(), "two");
    let epoch = Here::with(&[("SOURCE_DATE_EPOCH", "1500000000")]);
    for (line, at) in [
        ("create --directory one a.obd", &epoch),
        ("create --directory two b.obd", &epoch),
        ("convert two.tar c.obd", &epoch),
        ("create --directory two d.obd", &here()),
    ] {
        run(place.dir(), &format!("{line} --fs {fs}"), at);
    }
    assert!(place.read("a.obd") == place.read("b.obd"));
    assert!(place.read("b.obd") == place.read("c.obd"));
    assert!(place.read("b.obd") != place.read("d.obd"));
}

fn bad_epoch() {
    let place = Place::new();
    fs::create_dir(place.path("one")).unwrap();
    place
        .command("create --directory one --fs erofs d.obd")
        .env("SOURCE_DATE_EPOCH", "yesterday")
        .assert()
        .code(1)
        .stderr(predicates::str::contains(
            "SOURCE_DATE_EPOCH=yesterday: not a number of seconds",
        ));
    assert_eq!(place.names(), ["one"]);
}

fn content_makes_the_uuid() {
    let place = Place::new();
    let place = place.dir();
    make(&place.join("one"), 0, nothing);
    run(
        place,
        "create --directory one --fs btrfs --algorithm none a.obd",
        &Here::default(),
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
        &Here::default(),
    );
    let uuid = |name: &str| {
        run(
            place,
            &format!("dump {name} -o raw --force"),
            &Here::default(),
        );
        fs::read(place.join("raw"))
            .unwrap()
            .get(65536 + 32..65536 + 48)
            .unwrap()
            .to_vec()
    };
    assert_ne!(uuid("a.obd"), uuid("b.obd"));
}

fn large_holes_cost_nothing(fs: &str) {
    let place = Place::new();
    fs::create_dir(place.path("d")).unwrap();
    let file = File::create(place.path("d/sparse")).unwrap();
    file.set_len(500 << 30).unwrap();
    file.write_all_at(b"here", 300 << 30).unwrap();
    let start = Instant::now();
    place
        .run(&format!("create --directory d --fs {fs} out.obd"))
        .success();
    assert!(
        start.elapsed() < Duration::from_secs(60),
        "{:?}",
        start.elapsed()
    );
    let len = fs::metadata(place.path("out.obd")).unwrap().len();
    assert!(len < 1 << 20, "{len} bytes");
}
