// SPDX-License-Identifier: GPL-2.0

//! `obdsetup convert` of container images, and `apply`. The disk that the layers make is read with the reader of
//! erofs that the tests have.

use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::time::{Duration, Instant};

use predicates::prelude::PredicateBooleanExt;
use predicates::str::contains;
use rustix::process::Signal;
use sha2::{Digest, Sha256};

use crate::common::erofs::{read, Files};
use crate::common::tars::{header, member, pax, sign, tar};
use crate::common::{gzip, names, noise, soon, stop, tests, Place};

tests! {
    whiteouts;
    kinds_change;
    hard_links_over_layers;
    attributes_devices_and_holes;
    fingerprints;
    layers_are_small;
    the_same_bytes;
    cached_layers_are_over_their_own;
    forms_of_images;
    names_of_files_of_archives;
    archives_of_builders;
    platforms_in_descriptions;
    long_and_short_names;
    for_a_registry;
    what_a_registry_gets_can_be_read;
    descriptions_are_read_first;
    apply;
    the_root_gets_attributes;
    many_sparse_files;
    holes_of_a_tree;
    damaged_file_systems;
    hostile_images;
    hostile_layouts;
    much_work_of_few_bytes;
    many_names_in_few_bytes;
    archives_that_are_refused_at_once;
    long_files_of_many_names;
    signals;
}

const OCI_TAR: &str = "application/vnd.oci.image.layer.v1.tar";
const CONFIG: &str = "application/vnd.oci.image.config.v1+json";

impl Place {
    /// Returns the sorted names in a directory, hidden ones included.
    fn names_in(&self, name: &str) -> Vec<String> {
        names(&self.path(name))
    }

    /// Makes and converts an image of the tars `layers`, and returns the files of the resulting disk.
    fn files(&self, layers: &[Vec<u8>]) -> Files {
        let _ = fs::remove_dir_all(self.path("app"));
        image(&self.path("layout"), layers);
        self.run("convert layout app").success().stdout("");
        read(&self.dump("app/config.v1.json"))
    }
}

fn digest(bytes: &[u8]) -> String {
    format!("{:x}", Sha256::digest(bytes))
}

/// An OCI image layout.
struct Layout<'a> {
    root: &'a Path,
    manifests: Vec<String>,
    /// The annotations of the manifests that are added from now on, as JSON.
    annotations: String,
}

impl<'a> Layout<'a> {
    fn new(root: &'a Path) -> Self {
        let _ = fs::remove_dir_all(root);
        fs::create_dir_all(root.join("blobs/sha256")).unwrap();
        fs::write(root.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#).unwrap();
        Self {
            root,
            manifests: Vec::new(),
            annotations: "{}".to_owned(),
        }
    }

    /// Adds a blob. Returns its descriptor.
    fn blob(&self, bytes: &[u8], kind: &str) -> String {
        let hex = digest(bytes);
        fs::write(self.root.join("blobs/sha256").join(&hex), bytes).unwrap();
        let size = bytes.len();
        format!(r#"{{"mediaType":"{kind}","digest":"sha256:{hex}","size":{size}}}"#)
    }

    /// Adds an image with these descriptors of layers, and writes the index. `more` is added to the fields of the
    /// manifest's descriptor.
    fn image(&mut self, layers: &[String], diff_ids: &[String], more: &str) {
        self.image_for("amd64", layers, diff_ids, more);
    }

    /// As [`Self::image`], for the architecture `arch`.
    fn image_for(&mut self, arch: &str, layers: &[String], diff_ids: &[String], more: &str) {
        let config = config(diff_ids).replace("amd64", arch);
        let config = self.blob(config.as_bytes(), CONFIG);
        self.with(&config, layers, more);
    }

    /// As [`Self::image`], with `config` as the descriptor of the image's description.
    fn with(&mut self, config: &str, layers: &[String], more: &str) {
        let layers = layers.join(",");
        let notes = &self.annotations;
        let manifest = format!(
            r#"{{"schemaVersion":2,"config":{config},"layers":[{layers}],"annotations":{notes}}}"#
        );
        let kind = "application/vnd.oci.image.manifest.v1+json";
        let manifest = self.blob(manifest.as_bytes(), kind);
        let manifest = format!("{}{more}}}", manifest.strip_suffix('}').unwrap());
        self.manifests.push(manifest);
        let index = self.manifests.join(",");
        let index = format!(r#"{{"schemaVersion":2,"manifests":[{index}]}}"#);
        fs::write(self.root.join("index.json"), index).unwrap();
    }
}

/// Returns the description of an image.
fn config(diff_ids: &[String]) -> String {
    let ids: Vec<String> = diff_ids
        .iter()
        .map(|id| format!(r#""sha256:{id}""#))
        .collect();
    let ids = ids.join(",");
    format!(
        r#"{{"architecture":"amd64","os":"linux","config":{{"Cmd":["/hello"],"Env":["A=b"]}},
            "rootfs":{{"type":"layers","diff_ids":[{ids}]}}}}"#
    )
}

/// Makes a layout of one image of these tars.
fn image(root: &Path, tars: &[Vec<u8>]) {
    let mut layout = Layout::new(root);
    let layers: Vec<String> = tars.iter().map(|tar| layout.blob(tar, OCI_TAR)).collect();
    let ids: Vec<String> = tars.iter().map(|tar| digest(tar)).collect();
    layout.image(&layers, &ids, "");
}

/// Returns a member: a file with one hole and no data.
fn hole(name: &str, size: u64) -> Vec<u8> {
    let size = size.to_string();
    let records: [(&[u8], &[u8]); 2] = [
        (b"GNU.sparse.size", size.as_bytes()),
        (b"GNU.sparse.map", b"0,0"),
    ];
    [pax(&records), file(name, "")].concat()
}

/// Returns a member: a hard link (`kind` is '1') or a symbolic link ('2').
fn link(name: &str, kind: u8, target: &str) -> Vec<u8> {
    let mut block = header(name, kind, 0);
    block[157..157 + target.len()].copy_from_slice(target.as_bytes());
    sign(&mut block);
    block
}

fn device(name: &str, kind: u8, major: u32, minor: u32) -> Vec<u8> {
    let mut block = header(name, kind, 0);
    block[329..337].copy_from_slice(format!("{major:07o}\0").as_bytes());
    block[337..345].copy_from_slice(format!("{minor:07o}\0").as_bytes());
    sign(&mut block);
    block
}

fn file(name: &str, content: &str) -> Vec<u8> {
    member(name, b'0', content.as_bytes())
}

fn dir(name: &str) -> Vec<u8> {
    member(name, b'5', b"")
}

/// A tar with a directory and a file in it.
fn etc_tar() -> Vec<u8> {
    tar(&[dir("etc"), file("etc/a", "a")])
}

/// The tars of two layers: the second one has one more file in the same directory.
fn two_tars() -> [Vec<u8>; 2] {
    [etc_tar(), tar(&[file("etc/b", "b")])]
}

fn paths(files: &Files) -> Vec<&str> {
    files
        .keys()
        .map(String::as_str)
        .filter(|path| !path.is_empty())
        .collect()
}

fn content<'a>(files: &'a Files, path: &str) -> &'a str {
    std::str::from_utf8(&files[path].what).unwrap()
}

fn whiteouts() {
    let place = Place::new();
    let lower = tar(&[
        dir("a"),
        file("a/one", "1"),
        file("a/two", "2"),
        dir("a/sub"),
        file("a/sub/x", "x"),
        dir("b"),
        file("b/one", "1"),
        file("top", "t"),
    ]);
    // A whiteout hides only what layers below have, before or after the members of its own layer.
    for order in [0, 1] {
        let mut members = vec![
            file(".wh.a", ""),
            dir("a"),
            file("a/new", "n"),
            file("a/one", "I"),
        ];
        members.rotate_left(order);
        let files = place.files(&[lower.clone(), tar(&members)]);
        assert_eq!(
            paths(&files),
            ["/a", "/a/new", "/a/one", "/b", "/b/one", "/top"],
            "{order}"
        );
        assert_eq!(content(&files, "/a/one"), "I");
    }
    // The same if the layer has only a file in the directory, without members for the directory.
    for order in [0, 1] {
        let mut members = vec![file(".wh.a", ""), file("a/sub/new", "n")];
        members.rotate_left(order);
        let files = place.files(&[lower.clone(), tar(&members)]);
        assert_eq!(
            paths(&files),
            ["/a", "/a/sub", "/a/sub/new", "/b", "/b/one", "/top"]
        );
    }
    // An opaque whiteout, before or after other members, hides all that layers below have in the directory, also in
    // subdirectories.
    for order in [0, 1, 2] {
        let mut members = vec![
            file("a/.wh..wh..opq", ""),
            file("a/sub/y", "y"),
            file("a/two", "II"),
        ];
        members.rotate_left(order);
        let files = place.files(&[lower.clone(), tar(&members)]);
        assert_eq!(
            paths(&files),
            ["/a", "/a/sub", "/a/sub/y", "/a/two", "/b", "/b/one", "/top"]
        );
        assert_eq!(content(&files, "/a/two"), "II");
    }
    let files = place.files(&[
        lower.clone(),
        tar(&[file(".wh..wh..opq", ""), file("z", "z")]),
    ]);
    assert_eq!(paths(&files), ["/z"]);
    // A whiteout of a name of 255 bytes, the maximum.
    let long = "n".repeat(255);
    let hidden = [
        pax(&[(b"path", format!("a/.wh.{long}").as_bytes())]),
        file("x", ""),
    ];
    let shown = [
        pax(&[(b"path", format!("a/{long}").as_bytes())]),
        file("x", "x"),
    ];
    let files = place.files(&[tar(&shown), tar(&hidden)]);
    assert_eq!(paths(&files), ["/a"]);
    // Whiteouts of names that don't exist, or are below a file, and a name that AUFS uses. A third layer adds a
    // hidden file again.
    let files = place.files(&[
        lower.clone(),
        tar(&[
            file(".wh.none", ""),
            file("none/.wh.x", ""),
            file("top/.wh.x", ""),
            file(".wh..wh.plnk", ""),
            file("none/.wh..wh..opq", ""),
            file("a/.wh.two", ""),
            file("b/.wh.one", ""),
        ]),
        tar(&[file("b/one", "again")]),
    ]);
    assert_eq!(
        paths(&files),
        ["/a", "/a/one", "/a/sub", "/a/sub/x", "/b", "/b/one", "/top"]
    );
    assert_eq!(content(&files, "/b/one"), "again");
}

fn kinds_change() {
    let place = Place::new();
    let lower = tar(&[
        dir("dir"),
        file("dir/a", "a"),
        file("dir/b", "b"),
        file("file", "f"),
        link("link", b'2', "dir"),
        file("other", "o"),
    ]);
    let files = place.files(&[
        lower.clone(),
        tar(&[
            file("dir", "now a file"),
            dir("file"),
            file("file/in", "i"),
            dir("link"),
        ]),
    ]);
    assert_eq!(
        paths(&files),
        ["/dir", "/file", "/file/in", "/link", "/other"]
    );
    assert_eq!(content(&files, "/dir"), "now a file");
    assert_eq!(files["/link"].mode, 0o040_755);
    // A directory becomes a symbolic link: later members below it go to its target, and never out of the image.
    let files = place.files(&[
        lower.clone(),
        tar(&[
            dir("away"),
            link("dir", b'2', "/../../away"),
            file("dir/c", "c"),
            link("up", b'2', "../.."),
            file("up/up/top", "t"),
        ]),
    ]);
    assert_eq!(
        paths(&files),
        ["/away", "/away/c", "/dir", "/file", "/link", "/other", "/top", "/up"]
    );
    assert_eq!(content(&files, "/dir"), "/../../away");
    // Members below a symbolic link of the layer below.
    let files = place.files(&[lower, tar(&[file("link/c", "c"), file("link/.wh.a", "")])]);
    assert_eq!(
        paths(&files),
        ["/dir", "/dir/b", "/dir/c", "/file", "/link", "/other"]
    );
}

fn hard_links_over_layers() {
    let place = Place::new();
    let lower = tar(&[
        dir("d"),
        file("d/a", "content"),
        link("d/b", b'1', "d/a"),
        link("s", b'2', "target"),
    ]);
    let files = place.files(&[
        lower.clone(),
        tar(&[
            link("d/c", b'1', "d/a"),
            file("d/.wh.a", ""),
            link("t", b'1', "s"),
        ]),
    ]);
    assert_eq!(paths(&files), ["/d", "/d/b", "/d/c", "/s", "/t"]);
    assert_eq!(files["/d/b"].inode, files["/d/c"].inode);
    assert_eq!(
        (files["/d/c"].links, content(&files, "/d/c")),
        (2, "content")
    );
    assert_eq!(files["/s"].inode, files["/t"].inode);
    // If one of the names is replaced, the other keeps the content.
    let files = place.files(&[lower, tar(&[file("d/a", "new")])]);
    assert_eq!((content(&files, "/d/a"), files["/d/a"].links), ("new", 1));
    assert_eq!(
        (content(&files, "/d/b"), files["/d/b"].links),
        ("content", 1)
    );
}

fn attributes_devices_and_holes() {
    let place = Place::new();
    let capability = b"\x01\0\0\x02\0\x04\0\0\0\0\0\0\0\0\0\0\0\0\0\0";
    let xattrs = pax(&[
        (b"SCHILY.xattr.security.capability", capability),
        (b"SCHILY.xattr.user.a", b"line\nline"),
        (b"SCHILY.xattr.trusted.overlay.opaque", b"y"),
    ]);
    let mut sparse = vec![0; 1 << 20];
    sparse[500_000..500_100].fill(7);
    let big = "0123456789abcdef".repeat(5000);
    image(
        &place.path("layout"),
        &[
            tar(&[dir("d"), file("d/plain", "p")]),
            tar(&[
                [xattrs.clone(), file("ping", "elf")].concat(),
                [xattrs, dir("d")].concat(),
                device("null", b'3', 1, 3),
                device("disk", b'4', 259, 300),
                device("pipe", b'6', 0, 0),
                member("sparse", b'0', &sparse),
                file("big", &big),
                file("a\nnewline", "n"),
            ]),
        ],
    );
    place
        .run("convert layout app")
        .success()
        .stderr(contains("extended attributes of overlayfs are left out: 2"));
    let files = read(&place.dump("app/config.v1.json"));
    for path in ["/ping", "/d"] {
        assert_eq!(files[path].xattrs.len(), 2, "{path}");
        assert_eq!(
            files[path].xattrs[b"security.capability".as_slice()],
            capability
        );
        assert_eq!(files[path].xattrs[b"user.a".as_slice()], b"line\nline");
    }
    assert_eq!(content(&files, "/d/plain"), "p");
    assert_eq!(files["/null"].mode, 0o020_755);
    assert_eq!(files["/null"].what, [3, 1, 0, 0]);
    assert_eq!(files["/disk"].what, [44, 3, 17, 0]);
    assert_eq!(files["/pipe"].mode, 0o010_755);
    assert!(files["/sparse"].what == sparse && files["/sparse"].blocks.len() == 1);
    assert!(content(&files, "/big") == big && content(&files, r"/a\nnewline") == "n");
}

/// [`read`] also checks the value of each fingerprint.
fn fingerprints() {
    let place = Place::new();
    let bare = tar(&[dir("d"), file("empty", "")]);
    let one = tar(&[file("a", "the same"), file("other", "x")]);
    let two = tar(&[file("b", "the same"), link("d/other", b'1', "other")]);
    let files = place.files(std::slice::from_ref(&bare));
    assert!(files.values().all(|node| node.fingerprint.is_none()));
    // The table of prefixes is made with the first fingerprint, and stays.
    let files = place.files(&[bare.clone(), one, two, bare]);
    assert!(files["/a"].fingerprint.is_some());
    assert_eq!(files["/a"].fingerprint, files["/b"].fingerprint);
    assert_ne!(files["/a"].fingerprint, files["/other"].fingerprint);
    assert!(files["/empty"].fingerprint.is_none());
}

/// The size of a layer depends on what it changes, not on how much is below. All other files keep their inodes and
/// blocks.
fn layers_are_small() {
    let place = Place::new();
    let mut members = vec![dir("usr"), dir("usr/share")];
    for nth in 0..400 {
        let content = noise(10_000 + nth as usize, nth);
        members.push(member(&format!("usr/share/file{nth:03}"), b'0', &content));
    }
    let base = tar(&members);
    let before = place.files(&[base.clone()]);
    let layers = [
        base.clone(),
        // A new file in the middle of a directory, a replaced one, a deleted one, and a new directory with a file.
        tar(&[
            member("usr/share/file200a", b'0', &noise(9000, 1000)),
            member("usr/share/file100", b'0', &noise(9000, 1001)),
            file("usr/share/.wh.file300", ""),
            dir("usr/new"),
            member("usr/new/file", b'0', &noise(9000, 1002)),
        ]),
        tar(&[]),
    ];
    let after = place.files(&layers);
    assert_eq!(after.len(), before.len() + 2);
    for (path, node) in &after {
        if path.starts_with("/usr/share/file") && path != "/usr/share/file100" {
            let Some(old) = before.get(path) else {
                continue;
            };
            assert_eq!(old, node, "{path}");
        }
    }
    let size = |nth: usize| {
        fs::metadata(place.path(&format!("app/layer{nth}.obd")))
            .unwrap()
            .len()
    };
    assert!(size(0) > 4_000_000, "{}", size(0));
    // 27,000 bytes of files, and the directories: 400 names have some 10 KiB.
    assert!((27_000..80_000).contains(&size(1)), "{}", size(1));
    assert!(size(2) < 12_000, "{}", size(2));
    // A directory of many names grows from layer to layer.
    let mut many = layers.to_vec();
    for layer in 0..8 {
        let names = (0..60).map(|nth| file(&format!("usr/share/{layer}-{nth}"), "x"));
        many.push(tar(&names.collect::<Vec<_>>()));
    }
    assert_eq!(place.files(&many).len(), after.len() + 480);
    // A directory whose entries are in blocks gets fewer entries.
    let files = place.files(&[
        tar(&[
            dir("d"),
            file("a", "a"),
            file("much-longer-than-the-other", "b"),
            file("z-last", "c"),
        ]),
        tar(&[
            file(".wh.z-last", ""),
            file(".wh.much-longer-than-the-other", ""),
        ]),
    ]);
    assert_eq!(paths(&files), ["/a", "/d"]);
    // A root directory without entries gets many.
    let names = (0..300).map(|nth| file(&format!("name{nth}"), "x"));
    let files = place.files(&[tar(&[]), tar(&names.collect::<Vec<_>>())]);
    assert_eq!(files.len(), 301);
}

fn the_same_bytes() {
    let place = Place::new();
    let one = etc_tar();
    let two = tar(&[file("etc/b", "b"), file("etc/.wh.a", "")]);
    let three = tar(&[file("c", "c")]);
    place.files(&[one.clone(), two.clone()]);
    let read = |name: &str| fs::read(place.path(name)).unwrap();
    let first = (read("app/layer0.obd"), read("app/layer1.obd"));
    // For layers that images have in common, the converted files are equal. The cache makes no difference.
    for run in ["", "--cache cache", "--cache cache"] {
        let _ = fs::remove_dir_all(place.path("other"));
        image(
            &place.path("layout2"),
            &[one.clone(), two.clone(), three.clone()],
        );
        place
            .run(&format!("convert layout2 other {run}"))
            .success()
            .stderr("");
        assert!(
            (read("other/layer0.obd"), read("other/layer1.obd")) == first,
            "{run}"
        );
    }
    assert_eq!(place.names_in("cache").len(), 3);
    // Only the layer that is not in the cache is made: the tar of the lowest one, which is damaged here, isn't read.
    // The new layer equals the one that was made over new layers.
    let unused = place.path("layout2/blobs/sha256").join(digest(&one));
    fs::write(unused, vec![0; one.len()]).unwrap();
    let third = read("other/layer2.obd");
    for name in place.names_in("cache") {
        let path = place.path("cache").join(name);
        if fs::read(&path).unwrap() == third {
            fs::remove_file(path).unwrap();
        }
    }
    fs::remove_dir_all(place.path("other")).unwrap();
    place
        .run("convert layout2 other --cache cache")
        .success()
        .stderr("");
    assert!(read("other/layer2.obd") == third);
    // Other options give other layers.
    image(&place.path("layout2"), &[one, two, three]);
    place
        .run("convert layout2 zstd --cache cache --algorithm zstd")
        .success();
    assert_eq!(place.names_in("cache").len(), 6);
    // A damaged one is made again.
    for name in place.names_in("cache") {
        fs::write(place.path("cache").join(name), "damaged").unwrap();
    }
    fs::remove_dir_all(place.path("other")).unwrap();
    place
        .run("convert layout2 other --cache cache")
        .success()
        .stderr(contains(
            "does not match the digest in its name: the layer is made again",
        ));
    assert!(read("other/layer2.obd") == third);
}

/// A layer has the differences from the layer below. So a cached layer is not used over another layer.
fn cached_layers_are_over_their_own() {
    let place = Place::new();
    let one = etc_tar();
    let other = tar(&[dir("usr"), file("usr/x", "x"), file("y", "y")]);
    let two = tar(&[file("b", "b")]);
    let convert = |tars: &[Vec<u8>]| {
        let _ = fs::remove_dir_all(place.path("app"));
        image(&place.path("layout"), tars);
        place.ok("convert layout app --cache cache");
    };
    let cached = |bytes: &[u8]| {
        let names = place.names_in("cache");
        let is_it = |name: &&String| place.read(&format!("cache/{name}")) == bytes;
        names.iter().find(is_it).unwrap().clone()
    };
    convert(std::slice::from_ref(&other));
    let wrong = place.read("app/layer0.obd");
    let wrong_name = cached(&wrong);
    convert(&[one.clone(), two.clone()]);
    let right_name = cached(&place.read("app/layer0.obd"));
    // Replaces the lowest layer in the cache by another one, as another version might make it.
    let (key, _) = right_name.split_once('-').unwrap();
    let (_, hash) = wrong_name.split_once('-').unwrap();
    fs::remove_file(place.path("cache").join(&right_name)).unwrap();
    place.write(&format!("cache/{key}-{hash}"), &wrong);
    convert(&[one, two]);
    assert!(place.read("app/layer0.obd") == wrong);
    let files = read(&place.dump("app/config.v1.json"));
    assert_eq!(paths(&files), ["/b", "/usr", "/usr/x", "/y"]);
}

fn forms_of_images() {
    let place = Place::new();
    let tars = two_tars();
    let wanted = place.files(&tars);
    let description = fs::read(place.path("app/image.json")).unwrap();
    assert!(String::from_utf8(description)
        .unwrap()
        .contains(r#""Cmd":["/hello"]"#));
    assert_eq!(
        place.names_in("app"),
        ["config.v1.json", "image.json", "layer0.obd", "layer1.obd"]
    );
    let same = |name: &str| {
        let _ = fs::remove_dir_all(place.path("out"));
        place
            .run(&format!("convert {name} out"))
            .success()
            .stdout("")
            .stderr("");
        assert!(read(&place.dump("out/config.v1.json")) == wanted, "{name}");
    };
    // Layers that are compressed with gzip and zstd.
    let ids: Vec<String> = tars.iter().map(|tar| digest(tar)).collect();
    let root = place.path("packed");
    let mut layout = Layout::new(&root);
    let zipped = [
        layout.blob(
            &gzip(&tars[0]),
            "application/vnd.oci.image.layer.v1.tar+gzip",
        ),
        layout.blob(
            &zstd::encode_all(tars[1].as_slice(), 1).unwrap(),
            "application/vnd.oci.image.layer.v1.tar+zstd",
        ),
    ];
    layout.image(&zipped, &ids, "");
    same("packed");
    // An archive of a layout, itself compressed or not.
    let mut members = vec![file("oci-layout", "{}"), dir("blobs"), dir("blobs/sha256")];
    for name in place.names_in("packed/blobs/sha256") {
        let bytes = fs::read(root.join("blobs/sha256").join(&name)).unwrap();
        members.push(member(&format!("blobs/sha256/{name}"), b'0', &bytes));
    }
    members.push(member(
        "index.json",
        b'0',
        &fs::read(root.join("index.json")).unwrap(),
    ));
    fs::write(place.path("oci.tar"), tar(&members)).unwrap();
    same("oci.tar");
    fs::write(place.path("oci.tar.gz"), gzip(&tar(&members))).unwrap();
    same("oci.tar.gz");
    // The old format of docker. One layer is a symbolic link to a layer in another directory.
    let config = config(&ids);
    let name = format!("{}.json", digest(config.as_bytes()));
    let list = format!(
        r#"[{{"Config":"{name}","RepoTags":["x:1","x:2"],"Layers":["0a/layer.tar","0b/layer.tar"]}}]"#
    );
    let saved = |name: &str, list: &str| {
        tar(&[
            dir("0a"),
            member("0a/layer.tar", b'0', &tars[0]),
            file("0a/VERSION", "1.0"),
            dir("0b"),
            link("0b/layer.tar", b'2', "../0c/layer.tar"),
            dir("0c"),
            member("0c/layer.tar", b'0', &tars[1]),
            file(name, &config),
            file("manifest.json", list),
            file("repositories", "{}"),
        ])
    };
    fs::write(place.path("saved.tar"), saved(&name, &list)).unwrap();
    same("saved.tar");
    let other = format!("{}.json", digest(b"other"));
    fs::write(
        place.path("bad.tar"),
        saved(&other, &list.replace(&name, &other)),
    )
    .unwrap();
    place
        .run("convert bad.tar x")
        .code(3)
        .stderr(contains("is not what its digest says"));
    fs::write(
        place.path("bad.tar"),
        saved(&name, &list.replace("0b/", "../0b/")),
    )
    .unwrap();
    place
        .run("convert bad.tar x")
        .code(3)
        .stderr(contains("is missing"));
    // A layout with images for several platforms: by default, the one for this machine is converted.
    let arch = match std::env::consts::ARCH {
        "aarch64" => "arm64",
        "x86_64" => "amd64",
        other => other,
    };
    let mut layout = Layout::new(&root);
    let on = |arch: &str| format!(r#","platform":{{"os":"linux","architecture":"{arch}"}}"#);
    let other = tar(&[file("other", "")]);
    let blob = layout.blob(&other, OCI_TAR);
    layout.image_for("mips64le", &[blob], &[digest(&other)], &on("mips64le"));
    let blobs: Vec<String> = tars.iter().map(|tar| layout.blob(tar, OCI_TAR)).collect();
    layout.image_for(arch, &blobs, &ids, &on(arch));
    same("packed");
    fs::remove_dir_all(place.path("out")).unwrap();
    place
        .run("convert packed out --platform linux/mips64le")
        .success();
    assert_eq!(paths(&read(&place.dump("out/config.v1.json"))), ["/other"]);
    place
        .run("convert packed x --platform linux/s390x")
        .code(1)
        .stderr(contains("no such image"));
    assert!(!place.path("x").exists());
    assert!(place.names().iter().all(|name| !name.starts_with('.')));
}

/// Returns a tar of the layout in the directory `root`.
fn packed(root: &Path) -> Vec<u8> {
    let blobs = root.join("blobs/sha256");
    let mut members = vec![file("oci-layout", "{}")];
    for name in names(&blobs) {
        let bytes = fs::read(blobs.join(&name)).unwrap();
        members.push(member(&format!("blobs/sha256/{name}"), b'0', &bytes));
    }
    let index = fs::read(root.join("index.json")).unwrap();
    members.push(member("index.json", b'0', &index));
    tar(&members)
}

/// Messages name a file by its name in the archive, not by the place where it was unpacked.
fn names_of_files_of_archives() {
    let place = Place::new();
    let root = place.path("layout");
    let layer = etc_tar();
    let ids = [digest(&layer)];
    let long = " ".repeat((4 << 20) + 1);
    let told = |said: &str| {
        let done = place.run("convert packed.tar out");
        let said = format!("packed.tar: {said}");
        done.stderr(contains(said.as_str()).and(contains(".obdsetup-").not()))
    };
    // The index, and a manifest.
    image(&root, std::slice::from_ref(&layer));
    let index = fs::read_to_string(root.join("index.json")).unwrap();
    fs::write(root.join("index.json"), format!("{index}{long}")).unwrap();
    place.write("packed.tar", &packed(&root));
    told("index.json: has more than 4194304 bytes").code(3);
    let mut layout = Layout::new(&root);
    let blob = layout.blob(
        long.as_bytes(),
        "application/vnd.oci.image.manifest.v1+json",
    );
    layout.image(&[], &[], "");
    let index = format!(r#"{{"manifests":[{blob}]}}"#);
    fs::write(root.join("index.json"), index).unwrap();
    place.write("packed.tar", &packed(&root));
    told("blobs/sha256/").code(3);
    // The list and the description in the old format of docker.
    for (name, list) in [
        ("manifest.json", "[]"),
        ("c.json", r#"[{"Config":"c.json","Layers":["l.tar"]}]"#),
    ] {
        let mut members = vec![member("l.tar", b'0', &layer), file(name, &long)];
        if name != "manifest.json" {
            members.push(file("manifest.json", list));
        }
        place.write("packed.tar", &tar(&members));
        told(&format!("{name}: has more than 4194304 bytes")).code(3);
    }
    // OverlayBD layers that don't fit on each other.
    let mut layout = Layout::new(&root);
    let blob = layout.blob(&layer, OCI_TAR);
    layout.image(&[blob], &ids, "");
    place.ok("convert layout made");
    let made = place.read("made/layer0.obd");
    let mut layout = Layout::new(&root);
    let blob = layout.blob(&made, OCI_TAR);
    let id = digest(&made);
    layout.image(&[blob.clone(), blob], &[id.clone(), id], "");
    place.write("packed.tar", &packed(&root));
    told("blobs/sha256/");
}

/// Archives as crane, ko, kaniko and jib write them: like those of `docker save`, but with compressed
/// layers, and names made of digests.
fn archives_of_builders() {
    let place = Place::new();
    let tars = two_tars();
    let wanted = place.files(&tars);
    let ids: Vec<String> = tars.iter().map(|tar| digest(tar)).collect();
    let config = config(&ids);
    let config_digest = digest(config.as_bytes());
    let zipped: Vec<Vec<u8>> = tars.iter().map(|tar| gzip(tar)).collect();
    for (config_name, before, after) in [
        (format!("sha256:{config_digest}"), "", ".tar.gz"),
        ("config.json".to_owned(), "", ".tar.gz"),
        (
            format!("blobs/sha256/{config_digest}"),
            "blobs/sha256/",
            ".tar.gz",
        ),
        // Names of layers without a known form.
        (format!("sha256:{config_digest}"), "parts/of/it/", ""),
    ] {
        let names: Vec<String> = zipped
            .iter()
            .map(|layer| format!("{before}{}{after}", digest(layer)))
            .collect();
        let list = format!(
            r#"[{{"Config":"{config_name}","RepoTags":["x:1"],"Layers":["{}","{}"]}}]"#,
            names[0], names[1]
        );
        let long = |name: &str| pax(&[(b"path", name.as_bytes())]);
        let members = [
            [long(&config_name), file("x", &config)].concat(),
            [long(&names[0]), member("x", b'0', &zipped[0])].concat(),
            [long(&names[1]), member("x", b'0', &zipped[1])].concat(),
            file("manifest.json", &list),
        ];
        place.write("saved.tar", &tar(&members));
        let _ = fs::remove_dir_all(place.path("out"));
        place
            .run("convert saved.tar out --ref x:1")
            .success()
            .stderr("");
        assert!(
            read(&place.dump("out/config.v1.json")) == wanted,
            "{config_name}"
        );
        let mut bad = members.clone();
        bad[0] = [long(&config_name), file("x", &format!("{config} "))].concat();
        place.write("bad.tar", &tar(&bad));
        if config_name.contains("sha256") {
            place
                .run("convert bad.tar x")
                .code(3)
                .stderr(contains("is not what its digest says"));
        }
        assert!(!place.path("x").exists());
    }
    // A tar with only some of these names is a tree of files.
    let hex = digest(b"");
    let plain = tar(&[file("manifest.json", "{}"), file("a.tar.gz", "")]);
    place.write("plain.tar", &plain);
    place.ok("convert plain.tar plain.obd --fs erofs");
    let plain = tar(&[[
        pax(&[(b"path", format!("{hex}.tar.gz").as_bytes())]),
        file("x", ""),
    ]
    .concat()]);
    place.write("plain.tar", &plain);
    place.ok("convert plain.tar plain2.obd --fs erofs");
}

/// If an index doesn't say for which platform an image is, the description of the image does.
fn platforms_in_descriptions() {
    let place = Place::new();
    let root = place.path("layout");
    let add = |layout: &mut Layout<'_>, arch: &str, more: &str| {
        let own = tar(&[file(arch, "")]);
        let blob = layout.blob(&own, OCI_TAR);
        layout.image_for(arch, &[blob], &[digest(&own)], more);
    };
    let mut layout = Layout::new(&root);
    let here = match std::env::consts::ARCH {
        "aarch64" => "arm64",
        "x86_64" => "amd64",
        other => other,
    };
    let all = [here, "mips64le", "ppc64le"];
    for arch in all {
        add(&mut layout, arch, "");
    }
    for arch in all {
        place.ok(&format!("convert layout {arch} --platform linux/{arch}"));
        let files = read(&place.dump(&format!("{arch}/config.v1.json")));
        assert_eq!(paths(&files), [format!("/{arch}")]);
    }
    place.ok("convert layout this");
    let files = read(&place.dump("this/config.v1.json"));
    assert_eq!(paths(&files), [format!("/{here}")]);
    place
        .run("convert layout x --platform linux/s390x")
        .code(1)
        .stderr(contains("no such image; there are: "))
        .stderr(contains("linux/mips64le sha256:"));
    // An index with another platform than the description.
    let on = |arch: &str| format!(r#","platform":{{"os":"linux","architecture":{arch}}}"#);
    let mut layout = Layout::new(&root);
    add(&mut layout, "amd64", &on(r#""arm64""#));
    place
        .run("convert layout x --platform linux/arm64")
        .code(3)
        .stderr(contains(
            "is for linux/arm64 as the index has it, and for linux/amd64 as its own description has it",
        ));
    assert!(!place.path("x").exists());
    // Descriptions often leave out the variant.
    let mut layout = Layout::new(&root);
    add(&mut layout, "arm", &on(r#""arm","variant":"v7""#));
    place.ok("convert layout arm --platform linux/arm/v7");
    // Two images have the same description, but the first one gives a wrong size for it, so it cannot be read. The
    // other image is found nevertheless.
    let own = tar(&[file("a", "")]);
    let mut layout = Layout::new(&root);
    let blob = layout.blob(&own, OCI_TAR);
    let right = layout.blob(config(&[digest(&own)]).as_bytes(), CONFIG);
    let wrong = right.replace(r#""size":"#, r#""size":1"#);
    for config in [wrong, right] {
        layout.with(&config, std::slice::from_ref(&blob), "");
    }
    place.ok("convert layout x --platform linux/amd64");
}

/// Newer versions of docker, and containerd, put the whole name into an annotation of its own, and only
/// the tag into the annotation that had the name before.
fn long_and_short_names() {
    let place = Place::new();
    let root = place.path("layout");
    let mut layout = Layout::new(&root);
    for (name, tag) in [("a", "1"), ("b", "1"), ("b", "2")] {
        let own = tar(&[file(&format!("{name}{tag}"), "")]);
        let blob = layout.blob(&own, OCI_TAR);
        let more = format!(
            r#","annotations":{{"io.containerd.image.name":"registry.example/library/{name}:{tag}",
                "org.opencontainers.image.ref.name":"{tag}"}}"#
        );
        layout.image(&[blob], &[digest(&own)], &more);
    }
    for (name, wanted) in [
        ("registry.example/library/a:1", "/a1"),
        ("registry.example/library/b:1", "/b1"),
        ("2", "/b2"),
    ] {
        let _ = fs::remove_dir_all(place.path("app"));
        place.ok(&format!("convert layout app --ref {name}"));
        let files = read(&place.dump("app/config.v1.json"));
        assert_eq!(paths(&files), [wanted]);
    }
    for choice in ["", "--ref 1"] {
        place
            .run(&format!("convert layout x {choice}"))
            .code(1)
            .stderr(contains("several images"))
            .stderr(contains("registry.example/library/a:1 linux/amd64 sha256:"));
    }
    // The layout that `--oci` makes has both annotations, too.
    place.ok("convert layout pushed --oci --ref registry.example/library/a:1");
    let index = String::from_utf8(place.read("pushed/index.json")).unwrap();
    assert!(index.contains(r#""io.containerd.image.name":"registry.example/library/a:1""#));
    assert!(index.contains(r#""org.opencontainers.image.ref.name":"1""#));
}

fn for_a_registry() {
    let place = Place::new();
    let tars = two_tars();
    let wanted = place.files(&tars);
    place
        .run("convert layout pushed --oci")
        .success()
        .stdout("")
        .stderr("");
    assert_eq!(
        place.names_in("pushed"),
        ["blobs", "index.json", "oci-layout"]
    );
    let blobs = place.names_in("pushed/blobs/sha256");
    assert_eq!(blobs.len(), 4);
    // Nothing in it has the name of its directory, which only a config.v1.json needs as text.
    let odd = std::ffi::OsStr::from_bytes(b"odd\xff");
    let mut command = place.command("convert layout --oci");
    command.arg(odd).assert().success().stderr("");
    assert_eq!(
        fs::read(place.dir().join(odd).join("index.json")).unwrap(),
        place.read("pushed/index.json")
    );
    let mut command = place.command("convert layout");
    let refused = command.arg(place.dir().join(odd).join("x"));
    refused.assert().code(1).stderr(contains("not UTF-8"));
    let blob = |digest: &str| {
        let hex = digest.strip_prefix("sha256:").unwrap();
        fs::read(place.path("pushed/blobs/sha256").join(hex)).unwrap()
    };
    for name in &blobs {
        assert_eq!(&digest(&blob(&format!("sha256:{name}"))), name);
    }
    let json = |bytes: &[u8]| -> serde_json::Value { serde_json::from_slice(bytes).unwrap() };
    let index = json(&fs::read(place.path("pushed/index.json")).unwrap());
    let manifest = json(&blob(index["manifests"][0]["digest"].as_str().unwrap()));
    let config = json(&blob(manifest["config"]["digest"].as_str().unwrap()));
    assert_eq!(config["config"]["Cmd"][0], "/hello");
    let chain = format!("sha256:{} sha256:{}", digest(&tars[0]), digest(&tars[1]));
    let chains = [digest(&tars[0]), digest(chain.as_bytes())];
    let uuid = |hex: &str| {
        let hex = hex.to_uppercase();
        let parts = [
            &hex[..8],
            &hex[8..12],
            &hex[12..16],
            &hex[16..20],
            &hex[20..32],
        ];
        parts.join("-")
    };
    for (nth, chain) in chains.iter().enumerate() {
        let layer = &manifest["layers"][nth];
        assert_eq!(layer["mediaType"], OCI_TAR);
        let notes = &layer["annotations"];
        let note = |name: &str| &notes[format!("containerd.io/snapshot/overlaybd/{name}")];
        assert_eq!(note("version"), "0.1.0");
        assert_eq!(note("blob-digest"), &layer["digest"]);
        assert_eq!(note("blob-size"), &layer["size"].to_string());
        assert_eq!(note("blob-fs-type"), "erofs");
        assert_eq!(config["rootfs"]["diff_ids"][nth], layer["digest"]);
        let bytes = blob(layer["digest"].as_str().unwrap());
        assert_eq!(&bytes[..13], b"overlaybd.pax");
        let name = layer["digest"]
            .as_str()
            .unwrap()
            .replace("sha256:", "pushed/blobs/sha256/");
        let info = place.run(&format!("info --json {name}")).success();
        let info = String::from_utf8(info.get_output().stdout.clone()).unwrap();
        assert!(info.contains(&uuid(chain)), "{info}");
    }
    place.run("convert pushed back").success().stderr("");
    assert!(read(&place.dump("back/config.v1.json")) == wanted);
    place
        .run("convert pushed x --oci")
        .code(1)
        .stderr(contains("OverlayBD layers, which stay"));
    place
        .run("convert pushed x --algorithm zstd")
        .code(1)
        .stderr(contains("which stay"));
}

/// Makes a layout of one image, with `more` before the fields of its description. Returns the descriptor of the
/// description.
fn described(root: &Path, layer: &[u8], more: &str) -> String {
    let mut layout = Layout::new(root);
    let ids = [digest(layer)];
    let own = config(&ids).replacen('{', &format!("{{{more}"), 1);
    let own = layout.blob(own.as_bytes(), CONFIG);
    let blob = layout.blob(layer, OCI_TAR);
    layout.with(&own, &[blob], "");
    own
}

/// `convert` takes the layout that `--oci` has made, whatever the description of the image says.
fn what_a_registry_gets_can_be_read() {
    let place = Place::new();
    let root = place.path("layout");
    let layer = etc_tar();
    let wanted = place.files(std::slice::from_ref(&layer));
    let long = "l".repeat(2000);
    for (own, now) in [
        (r#""os":"linux""#, r#""os":"unknown""#.to_owned()),
        (r#""os":"linux""#, r#""os":"""#.to_owned()),
        (
            r#""architecture":"amd64""#,
            format!(r#""architecture":"{long}""#),
        ),
    ] {
        let config = config(&[digest(&layer)]).replace(own, &now);
        let mut layout = Layout::new(&root);
        let description = layout.blob(config.as_bytes(), CONFIG);
        let blob = layout.blob(&layer, OCI_TAR);
        layout.with(&description, &[blob], "");
        place.ok("convert layout pushed --oci");
        place.ok("convert pushed back");
        assert!(read(&place.dump("back/config.v1.json")) == wanted, "{now}");
        // The same in the old format of docker.
        place.write(
            "saved.tar",
            &saved(&config, &format!("[{}]", entry(&[], &["l.tar"]))),
        );
        place.ok("convert saved.tar saved");
        assert!(read(&place.dump("saved/config.v1.json")) == wanted, "{now}");
        for name in ["pushed", "back", "saved"] {
            fs::remove_dir_all(place.path(name)).unwrap();
        }
    }
}

/// With `--oci`, more of the description is read. Errors in it are found before a layer is made.
fn descriptions_are_read_first() {
    let place = Place::new();
    let root = place.path("layout");
    let layer = etc_tar();
    let deep = format!("{}{}", "[".repeat(200), "]".repeat(200));
    let pad = "a".repeat(3_500_000);
    let longer = format!(r#"["{pad}",{}]"#, vec!["1e15"; 99_000].join(","));
    let objects = format!("[{}]", vec![r#"{"":0}"#; 50_001].join(","));
    for (value, said) in [
        ("1e999", "not an image's description: "),
        (r#""\ud800""#, "not an image's description: "),
        (&deep, "not an image's description: "),
        (
            &objects,
            "has more than 100000 values, too many for such a file",
        ),
        (
            &longer,
            "as it is written for a registry, has more than 4194304 bytes",
        ),
    ] {
        let own = described(&root, &layer, &format!(r#""author":{value},"#));
        let own: serde_json::Value = serde_json::from_str(&own).unwrap();
        let hex = own["digest"].as_str().unwrap().replace("sha256:", "");
        place.ok("convert layout app");
        place
            .run("convert layout pushed --oci --cache cache")
            .code(3)
            .stderr(contains(format!("layout/blobs/sha256/{hex}: {said}")));
        fs::remove_dir_all(place.path("app")).unwrap();
        assert_eq!(place.names(), ["layout"], "{said}");
    }
    // The annotations of the manifest are kept, so they count for the size of the new manifest.
    let mut layout = Layout::new(&root);
    layout.annotations = format!(r#"{{"a":"{}"}}"#, "l".repeat(4_193_000));
    let blob = layout.blob(&layer, OCI_TAR);
    layout.image(&[blob], &[digest(&layer)], "");
    place
        .run("convert layout pushed --oci --cache cache")
        .code(3)
        .stderr(contains(
            "its manifest, as it is written for a registry, has more than 4194304 bytes",
        ));
    assert_eq!(place.names(), ["layout"]);
}

fn apply() {
    let place = Place::new();
    let lower = etc_tar();
    let upper = tar(&[file("etc/b", "b"), file("etc/.wh.a", "")]);
    let wanted = place.files(&[lower.clone(), upper.clone()]);
    fs::write(place.path("lower.tar"), &lower).unwrap();
    fs::write(place.path("upper.tgz"), gzip(&upper)).unwrap();
    place.run("convert lower.tar base.obd --fs erofs").success();
    place
        .run("apply upper.tgz --base base.obd next.obd")
        .success()
        .stdout("")
        .stderr("");
    let files = read(&place.dump("base.obd next.obd"));
    assert_eq!(paths(&files), paths(&wanted));
    assert_eq!(content(&files, "/etc/b"), "b");
    place.run("verify base.obd next.obd").success();
    place
        .run("apply upper.tgz --base base.obd next.obd")
        .code(5);
    place
        .run("apply upper.tgz --base app/config.v1.json onto.obd")
        .success();
    place
        .run("apply upper.tgz --base base.obd --dax x.obd")
        .code(1)
        .stderr(contains("--dax is not for apply"));
    fs::write(place.path("raw"), vec![1; 1 << 20]).unwrap();
    place.run("create --image raw raw.obd --raw").success();
    place
        .run("apply upper.tgz --base raw.obd x.obd")
        .code(1)
        .stderr(contains("there is no erofs in them"));
    let cut = &upper[..upper.len() - 1024];
    fs::write(place.path("cut.tar"), cut).unwrap();
    place
        .run("apply cut.tar --base base.obd x.obd")
        .code(3)
        .stderr(contains("no end marker"));
    // An archive of an image is no layer.
    let list = r#"[{"Config":"c.json","Layers":["l/layer.tar"]}]"#;
    let saved = tar(&[file("manifest.json", list), file("l/layer.tar", "")]);
    let hex = digest(b"");
    let blob = pax(&[(b"path", format!("blobs/sha256/{hex}").as_bytes())]);
    let packed = tar(&[
        file("oci-layout", "{}"),
        file("index.json", "{}"),
        [blob, file("x", "")].concat(),
    ]);
    for archive in [saved, packed] {
        place.write("image.tar", &archive);
        place
            .run("apply image.tar --base base.obd x.obd")
            .code(1)
            .stderr(contains(
                "an archive of an image, no layer of one: use `obdsetup convert'",
            ));
    }
    place
        .run("apply upper.tgz x.obd")
        .code(1)
        .stderr(contains("--base"));
    assert!(!place.path("x.obd").exists());
}

/// The inode of the root directory cannot move. A later layer can nevertheless give it extended attributes.
fn the_root_gets_attributes() {
    let place = Place::new();
    let lower = etc_tar();
    let value = [b'v'; 2000];
    let label = pax(&[(b"SCHILY.xattr.security.label", &value)]);
    let upper = tar(&[[label, dir("./")].concat(), file("b", "b")]);
    let files = place.files(&[lower, upper]);
    assert_eq!(paths(&files), ["/b", "/etc", "/etc/a"]);
    assert_eq!(files[""].xattrs[b"security.label".as_slice()], value);
}

/// The places of the chunks of sparse files in the layers below are not read, so their number has no limit.
fn many_sparse_files() {
    let place = Place::new();
    let mut members: Vec<Vec<u8>> = (0..600)
        .map(|nth| hole(&format!("{nth}"), 2 << 30))
        .collect();
    members.push(file("a", "a"));
    image(
        &place.path("layout"),
        &[tar(&members), tar(&[file("b", "b")])],
    );
    place.ok("convert layout app");
}

/// For fingerprints, holes are hashed, too: in all files together, at most 1 GiB more than there is data.
fn holes_of_a_tree() {
    let place = Place::new();
    let members = [
        hole("a", 700 << 20),
        hole("b", 700 << 20),
        hole("c", 200 << 20),
    ];
    image(&place.path("layout"), &[tar(&members)]);
    place.ok("convert layout app");
    let whole = place.dump("app/config.v1.json");
    let prints = whole.windows(7).filter(|bytes| bytes == b"sha256:");
    assert_eq!(prints.count(), 2);
}

/// `apply` checks all that it reads from an erofs: if that is damaged, the result is an error or a layer.
fn damaged_file_systems() {
    let place = Place::new();
    let tars = tar(&[
        dir("etc"),
        file("etc/a", "a"),
        link("etc/l", b'2', "a"),
        dir("etc/deep"),
        file("etc/deep/x", ""),
    ]);
    fs::write(place.path("lower.tar"), &tars).unwrap();
    fs::write(place.path("upper.tar"), tar(&[file("etc/b", "b")])).unwrap();
    place
        .run("convert lower.tar base.obd --fs erofs --algorithm none")
        .success();
    let good = place.dump("base.obd");
    let mut refused = 0;
    for at in (1024..1200).chain(1216..1700).step_by(5) {
        let mut bad = good.clone();
        bad[at] ^= 0x85;
        fs::write(place.path("raw"), &bad).unwrap();
        let _ = fs::remove_file(place.path("bad.obd"));
        let _ = fs::remove_file(place.path("x.obd"));
        place
            .run("create --image raw --raw bad.obd --algorithm none")
            .success();
        let done = place.run("apply upper.tar --base bad.obd x.obd");
        let output = done.get_output();
        let said = String::from_utf8_lossy(&output.stderr);
        match output.status.code() {
            Some(1 | 3) if said.contains("the layers below: ") => refused += 1,
            // Damage that changes only a name or a time cannot be detected.
            Some(0) => {}
            // The directory of the file in the tar became something else.
            Some(3) if said.contains("./etc/b") => {}
            _ => unreachable!("byte {at}: {:?} {said}", output.status),
        }
    }
    assert!(refused > 30, "{refused}");
}

fn hostile_images() {
    let place = Place::new();
    let root = place.path("layout");
    let good = tar(&[file("a", "a")]);
    let refused = |code: i32, said: &str| {
        place
            .run("convert layout x")
            .code(code)
            .stderr(contains(said));
        assert!(
            !place.path("x").exists() && place.names().iter().all(|name| !name.starts_with('.'))
        );
    };
    let names: Vec<String> = (0..5)
        .map(|nth| format!("SCHILY.xattr.user.{nth}"))
        .collect();
    let value = vec![b'v'; 60_000];
    let many: Vec<(&[u8], &[u8])> = names
        .iter()
        .map(|name| (name.as_bytes(), value.as_slice()))
        .collect();
    // Images of a good layer and one of these.
    for (layer, code, said) in [
        (tar(&[file("../a", "")]), 3, "\"..\" leads out"),
        (tar(&[file("a/../../b", "")]), 3, "\"..\" leads out"),
        (
            tar(&[link("a", b'1', "none")]),
            3,
            "a hard link to ./none, but no file before it has this name",
        ),
        (
            tar(&[link("a", b'1', "../../etc/passwd")]),
            3,
            "\"..\" leads out",
        ),
        (
            tar(&[dir("d"), link("a", b'1', "d")]),
            3,
            "a hard link to ./d, but no file before it has this name",
        ),
        (
            tar(&[file("d/.wh.", "")]),
            3,
            "a whiteout (.wh.NAME) of no name",
        ),
        (
            tar(&[file("d/.wh...", "")]),
            3,
            "a whiteout (.wh.NAME) of no name",
        ),
        (tar(&[file(".wh.d/x", "")]), 3, "is below a whiteout"),
        (
            tar(&[file("f", ""), file("f/x", "")]),
            3,
            "which is no directory",
        ),
        (
            tar(&[link("l", b'2', "m"), link("m", b'2', "l"), file("l/x", "")]),
            3,
            "goes through more than 40 symbolic links",
        ),
        (
            tar(&[file(".wh.a", ""), link("b", b'1', "a")]),
            3,
            "a hard link to ./a, but no file before it has this name",
        ),
        (
            tar(&[pax(&[(b"path", &[b'n'; 256])]), file("x", "")]),
            3,
            "a name of 256 bytes in the path, more than 255",
        ),
        (
            tar(&[file("overlaybd.commit", "LSMT")]),
            3,
            "an OverlayBD layer, no tar of files",
        ),
        (
            gzip(&tar(&[file("overlaybd.commit", "LSMT")])),
            3,
            "an OverlayBD layer, which was compressed",
        ),
        (
            tar(&[
                pax(&[(b"SCHILY.xattr.other.name", b"x")]),
                file("x", ""),
            ]),
            1,
            "cannot hold extended attributes other than user, trusted and security: 1 file stored without them: \
             ./x: --allow-loss makes the layer without them",
        ),
        (
            tar(&[pax(&many), file("x", "")]),
            1,
            "more extended attributes than erofs can hold: make one layer of the image's files, with --fs \
             squashfs",
        ),
        (b"no tar at all".to_vec(), 3, "cut off"),
        (gzip(&good)[..30].to_vec(), 3, "ends early"),
    ] {
        image(&root, &[good.clone(), layer]);
        refused(code, said);
    }
    // Descriptors that don't match the blobs.
    let id = digest(&good);
    let with = |edit: &dyn Fn(String) -> String, ids: &[String]| {
        let mut layout = Layout::new(&root);
        let blob = layout.blob(&good, OCI_TAR);
        layout.image(&[edit(blob)], ids, "");
    };
    let same = |blob: String| blob;
    with(
        &|blob| blob.replace("\"size\":", "\"size\":1"),
        &[id.clone()],
    );
    refused(3, "is not what its digest and size say");
    with(&same, &[id.clone()]);
    let mut other = good.clone();
    other[512] ^= 1;
    fs::write(root.join("blobs/sha256").join(&id), &other).unwrap();
    refused(3, "is not what its digest and size say");
    fs::remove_file(root.join("blobs/sha256").join(&id)).unwrap();
    refused(4, "cannot read");
    with(&same, &[digest(b"another")]);
    refused(3, "the DiffID in the image's description");
    with(&same, &[]);
    refused(3, "rootfs.diff_ids: 0 for 1 layers");
    with(
        &|blob| blob.replace(OCI_TAR, "application/zip"),
        &[id.clone()],
    );
    refused(1, "expected a tar, alone or compressed with gzip or zstd");
    let foreign = "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip";
    with(&|blob| blob.replace(OCI_TAR, foreign), &[id.clone()]);
    fs::remove_file(root.join("blobs/sha256").join(&id)).unwrap();
    refused(1, "a foreign layer");
    // More layers than a stack can have, no layers, and a number that is allowed.
    let empty = tar(&[]);
    image(&root, &vec![empty.clone(); 256]);
    refused(3, "has 256 layers, expected 1 to 255");
    image(&root, &[]);
    refused(3, "has 0 layers");
    let mut many = vec![empty; 129];
    many.push(good);
    assert_eq!(paths(&place.files(&many)), ["/a"]);
    // Options for other inputs.
    for option in [
        "--fs ext4",
        "--size 1g",
        "--force",
        "--keep-whiteouts",
        "--granularity 8k",
        "--uuid 1-2",
    ] {
        place.run(&format!("convert layout y {option}")).code(1);
    }
    assert!(!place.path("y").exists());
}

/// The content of a blob must match its digest, so links and other kinds of files cannot change what is read.
fn hostile_layouts() {
    let place = Place::new();
    let root = place.path("layout");
    let good = tar(&[file("a", "a")]);
    image(&root, std::slice::from_ref(&good));
    let blob = root.join("blobs/sha256").join(digest(&good));
    let refused = |code: i32, said: &str| {
        place
            .run("convert layout x --from oci")
            .code(code)
            .stderr(contains(said));
        assert_eq!(place.names(), ["layout", "other"]);
    };
    // A symbolic link to a file with the right bytes is accepted, one to a file with other bytes isn't.
    fs::rename(&blob, place.path("other")).unwrap();
    std::os::unix::fs::symlink(place.path("other"), &blob).unwrap();
    place.ok("convert layout x");
    fs::remove_dir_all(place.path("x")).unwrap();
    place.write("other", &vec![0; good.len()]);
    refused(3, "is not what its digest and size say");
    for target in ["/dev/zero", "/proc/self/mem", "/", "none"] {
        fs::remove_file(&blob).unwrap();
        std::os::unix::fs::symlink(target, &blob).unwrap();
        let done = place.run("convert layout x");
        assert!(
            matches!(done.get_output().status.code(), Some(3 | 4)),
            "{done}"
        );
    }
    // A FIFO is never waited for.
    for name in [blob.as_path(), &root.join("index.json")] {
        fs::remove_file(name).unwrap();
        place.output_of("mkfifo", &[name.to_str().unwrap()]);
        let done = place.run("convert layout x --from oci");
        assert!(
            matches!(done.get_output().status.code(), Some(1 | 3 | 4)),
            "{done}"
        );
        assert_eq!(place.names(), ["layout", "other"]);
    }
    // An index of 200 images that is named 100 times has few bytes, but its entries would take much memory.
    let mut layout = Layout::new(&root);
    let layer = layout.blob(&good, OCI_TAR);
    layout.image(&[layer], &[digest(&good)], "");
    let of = |entry: &str, count: usize| {
        let entries: Vec<String> = (0..count)
            .map(|nth| {
                entry.replace(
                    '}',
                    &format!(r#","annotations":{{"org.opencontainers.image.ref.name":"{nth}"}}}}"#),
                )
            })
            .collect();
        format!(
            r#"{{"schemaVersion":2,"manifests":[{}]}}"#,
            entries.join(",")
        )
    };
    let many = of(&layout.manifests[0], 200);
    let many = layout.blob(many.as_bytes(), "application/vnd.oci.image.index.v1+json");
    fs::write(root.join("index.json"), of(&many, 10)).unwrap();
    place.ok("convert layout x --ref 7");
    fs::remove_dir_all(place.path("x")).unwrap();
    fs::write(root.join("index.json"), of(&many, 100)).unwrap();
    refused(
        3,
        "has more than 1000 nested indexes, or 10000 entries in all of them",
    );
    fs::write(root.join("index.json"), of(&layout.manifests[0], 10_001)).unwrap();
    refused(3, "or 10000 entries in all of them");
    // An index that is named twice, once with a wrong size.
    let wrong = many.replace(r#""size":"#, r#""size":1"#);
    let both = format!(r#"{{"manifests":[{many},{wrong}]}}"#);
    fs::write(root.join("index.json"), both).unwrap();
    refused(3, "is not what its digest and size say");
    // Texts that would be kept for each of thousands of images.
    let long = "n".repeat(1025);
    let entry = &layout.manifests[0];
    for more in [
        format!(r#","annotations":{{"org.opencontainers.image.ref.name":"{long}"}}}}"#),
        format!(r#","platform":{{"os":"linux","architecture":"{long}"}}}}"#),
    ] {
        let entry = format!("{}{more}", entry.strip_suffix('}').unwrap());
        fs::write(
            root.join("index.json"),
            format!(r#"{{"manifests":[{entry}]}}"#),
        )
        .unwrap();
        refused(
            3,
            "has more than 1024 bytes in the name, digest, type or platform of an image",
        );
    }
    // If the output exists, even as a symbolic link to nothing, or if the cache is no directory, nothing is made.
    image(&root, std::slice::from_ref(&good));
    std::os::unix::fs::symlink("none", place.path("link")).unwrap();
    place.run("convert layout link").code(5);
    place
        .run("convert layout x --cache other")
        .code(5)
        .stderr(contains("other: cannot make a directory"));
    assert_eq!(place.names(), ["layout", "link", "other"]);
}

/// Images of few bytes don't take hours to convert, and don't use up the memory.
fn much_work_of_few_bytes() {
    let place = Place::new();
    const MANY: usize = 20_000;
    let mut members: Vec<Vec<u8>> = (0..MANY).map(|nth| file(&format!("d/{nth}"), "")).collect();
    for _ in 0..MANY {
        members.push(file("d/.wh..wh..opq", ""));
        members.push(file(".wh.d", ""));
    }
    let files = place.files(&[tar(&[dir("d"), file("d/old", "o")]), tar(&members)]);
    assert_eq!(files.len(), MANY + 2);
    assert!(!files.contains_key("/d/old"));

    // A header for all members gives each of them the same attribute of 60 KB.
    let value = vec![b'v'; 60_000];
    let mut all = pax(&[(b"SCHILY.xattr.user.a", &value)]);
    all[156] = b'g';
    sign(&mut all);
    let members = (0..4600).map(|nth| file(&format!("{nth}"), ""));
    let members: Vec<Vec<u8>> = [all].into_iter().chain(members).collect();
    image(&place.path("layout"), &[tar(&members)]);
    place.run("convert layout x").code(3).stderr(contains(
        "those of the members before it have more than 268435456 bytes",
    ));

    // An erofs whose directories share the same 128 KiB of entries.
    const DIRECTORIES: u64 = 240;
    let put16 = |to: &mut [u8], at: usize, number: usize| {
        to[at..at + 2].copy_from_slice(&u16::try_from(number).unwrap().to_le_bytes());
    };
    let entries = |names: &[(String, u64)], len: usize| {
        let mut block = vec![0; names.len() * 12];
        for (nth, (name, inode)) in names.iter().enumerate() {
            let end = block.len();
            block[nth * 12..nth * 12 + 8].copy_from_slice(&inode.to_le_bytes());
            put16(&mut block, nth * 12 + 8, end);
            block.extend(name.as_bytes());
        }
        block.resize(len.max(block.len()), 0);
        block
    };
    let inode = |mode: usize, size: u64, block: u32, layout: usize| {
        let mut inode = vec![0; 64];
        put16(&mut inode, 0, 1 | (layout << 1));
        put16(&mut inode, 4, mode);
        inode[8..16].copy_from_slice(&size.to_le_bytes());
        inode[16..20].copy_from_slice(&block.to_le_bytes());
        inode
    };
    let base = tar(&[file("a", "")]);
    place.files(&[base]);
    let mut disk = place.dump("app/config.v1.json");
    // The inodes behind the superblock: the root directory, the file, and the directories, with 128 bytes for each.
    let root = 1184_usize;
    let place_of = |nth: u64| 4096 + nth * 128;
    put16(&mut disk, 1024 + 14, root / 32);
    let file_at = root as u64 + 64;
    let mut names = vec![
        (".".into(), root as u64 / 32),
        ("..".into(), root as u64 / 32),
    ];
    names.extend((0..DIRECTORIES).map(|nth| (format!("d{nth:03}"), place_of(nth) / 32)));
    let first = 16_u32;
    let root_content = entries(&names, 4096);
    let blocks = u64::try_from(root_content.len().div_ceil(4096)).unwrap();
    assert_eq!(blocks, 1);
    disk.resize(4096 * 17 + (128 << 10), 0);
    disk[root..root + 64].copy_from_slice(&inode(0o040_755, 4096, first, 0));
    disk[root + 64..root + 128].copy_from_slice(&inode(0o100_644, 0, 0, 0));
    disk[4096 * 16..4096 * 17].copy_from_slice(&root_content);
    for block in 0..32 {
        let names: Vec<_> = (0..195)
            .map(|nth| (format!("{block:03}-{nth:04}"), file_at / 32))
            .collect();
        let at = 4096 * (17 + block);
        disk[at..at + 4096].copy_from_slice(&entries(&names, 4096));
    }
    for nth in 0..DIRECTORIES {
        let at = usize::try_from(place_of(nth)).unwrap();
        let dots = [
            (".".into(), place_of(nth) / 32),
            ("..".into(), root as u64 / 32),
        ];
        let tail = entries(&dots, 0);
        let size = (128 << 10) + tail.len() as u64;
        disk[at..at + 64].copy_from_slice(&inode(0o040_755, size, 17, 2));
        disk[at + 64..at + 64 + tail.len()].copy_from_slice(&tail);
    }
    place.write("raw", &disk);
    // A large disk, most of which is a hole.
    let raw = fs::File::options().write(true).open(place.path("raw"));
    raw.unwrap().set_len(64 << 20).unwrap();
    place.write("one.tar", &tar(&[file("b", "")]));
    place.ok("create --image raw --raw shared.obd --algorithm none");
    place
        .run("apply one.tar --base shared.obd out.obd")
        .code(3)
        .stderr(contains("shares its bytes with others"));
}

/// Returns an archive in the old format of `docker save`, with one layer and one description.
fn saved(config: &str, list: &str) -> Vec<u8> {
    tar(&[
        member("l.tar", b'0', &etc_tar()),
        file("c.json", config),
        file("manifest.json", list),
    ])
}

/// Returns the entry of an image in a `manifest.json`.
fn entry(tags: &[String], layers: &[&str]) -> String {
    let tags: Vec<String> = tags.iter().map(|tag| format!("{tag:?}")).collect();
    let tags = tags.join(",");
    format!(r#"{{"Config":"c.json","RepoTags":[{tags}],"Layers":{layers:?}}}"#)
}

/// The names and layers in a manifest.json are limited: each takes a few bytes there, but hundreds in memory.
fn many_names_in_few_bytes() {
    let place = Place::new();
    let layer = etc_tar();
    let config = config(&[digest(&layer)]);
    let write = |images: &[String]| {
        let list = format!("[{}]", images.join(","));
        place.write("saved.tar", &saved(&config, &list));
    };
    let refused = |said: &str| {
        place
            .run("convert saved.tar out")
            .code(3)
            .stderr(contains(said));
        assert_eq!(place.names(), ["saved.tar"]);
    };
    // An OCI index of so many long tags would be larger than the largest index that is read.
    let tags: Vec<String> = (0..10_001).map(|nth| format!("x:{nth:0300}")).collect();
    write(&[entry(&tags, &["l.tar"])]);
    refused("saved.tar: manifest.json: has more than 10000 images and tags");
    write(&[entry(&tags[1..], &["l.tar"])]);
    place.ok(&format!("convert saved.tar out --ref {}", tags[10_000]));
    fs::remove_dir_all(place.path("out")).unwrap();
    write(&vec![entry(&[], &["l.tar"]); 10_001]);
    refused("has more than 10000 images and tags");
    let many = (0..81).map(|_| entry(&[], &["l.tar"; 250]));
    write(&many.collect::<Vec<_>>());
    refused("saved.tar: manifest.json: has more than 20000 layers in all its images");
    // Refused before anything is unpacked: then, a missing layer would be told of.
    for layers in [256, 20_001] {
        write(&[entry(&[], &vec!["none.tar"; layers])]);
        let said = format!("saved.tar: manifest.json: has {layers} layers, expected 1 to 255");
        refused(&said);
    }
    // The index is read instead, if there is one, wherever it is.
    let root = place.path("layout");
    image(&root, std::slice::from_ref(&layer));
    let index = packed(&root);
    let list = format!("[{}]", entry(&[], &["none.tar"; 256]));
    let list = file("manifest.json", &list);
    let members = index.strip_suffix(tar(&[]).as_slice()).unwrap();
    for archive in [
        [list.as_slice(), &index].concat(),
        [members, &list, &tar(&[])].concat(),
    ] {
        place.write("saved.tar", &archive);
        place.ok("convert saved.tar out");
        fs::remove_dir_all(place.path("out")).unwrap();
    }
    fs::remove_dir_all(&root).unwrap();
    // An image with too many layers makes no difference to another image.
    let other = entry(&["x:0".to_owned()], &["l.tar"; 256]);
    write(&[other, entry(&["x:1".to_owned()], &["l.tar"])]);
    place
        .run("convert saved.tar out --ref x:0")
        .code(3)
        .stderr(contains("has 256 layers, expected 1 to 255"));
    place.ok("convert saved.tar out --ref x:1");
    fs::remove_dir_all(place.path("out")).unwrap();
    write(&[entry(&["n".repeat(1025)], &["l.tar"])]);
    refused("has more than 1024 bytes in the name");
    // A name that is too long for a file. A compressed archive could have thousands of such names.
    let name = format!("{}.tar", "n".repeat(5000));
    let members = [
        [
            pax(&[(b"path", name.as_bytes())]),
            member("x", b'0', &layer),
        ]
        .concat(),
        file("c.json", &config),
        file("manifest.json", &format!("[{}]", entry(&[], &[&name]))),
    ];
    place.write("saved.tar", &tar(&members));
    let refused = |said: &str| {
        place
            .run("convert saved.tar out --from oci")
            .code(3)
            .stderr(contains(said));
        assert_eq!(place.names(), ["saved.tar"]);
    };
    refused("has a name of 5004 bytes, more than 1024");
    // Each name is short enough, but the name to which the link leads isn't.
    let long = |name: &str, kind: u8, target: &str| {
        let records: [(&[u8], &[u8]); 2] =
            [(b"path", name.as_bytes()), (b"linkpath", target.as_bytes())];
        [pax(&records), link("x", kind, "x")].concat()
    };
    let name = format!("{}/l.tar", "d".repeat(700));
    let members = [
        long(&name, b'2', &"n".repeat(700)),
        file("c.json", &config),
        file("manifest.json", &format!("[{}]", entry(&[], &[&name]))),
    ];
    place.write("saved.tar", &tar(&members));
    refused("leads to a name of 1401 bytes, more than 1024");
    // Thousands of links would take more memory than files with their content.
    let mut members = members.to_vec();
    members.extend((0..4700).map(|nth| {
        let target = format!("{nth:0900}");
        long(&format!("{target}.tar"), b'1', &target)
    }));
    place.write("saved.tar", &tar(&members));
    refused("has more than 8388608 bytes in the names of files that may be parts of an image");
}

/// An archive without an image that can be converted is refused before its layers are unpacked. Otherwise, the message
/// would be about a wrong layer.
fn archives_that_are_refused_at_once() {
    let place = Place::new();
    let root = place.path("layout");
    let layer = etc_tar();
    let wrong = vec![0_u8; (4 << 20) + 1];
    let pack = |layers: usize, wrong: &[u8]| {
        let mut layout = Layout::new(&root);
        let blob = layout.blob(&layer, OCI_TAR);
        layout.image(&vec![blob; layers], &vec![digest(&layer); layers], "");
        fs::write(root.join("blobs/sha256").join("a".repeat(64)), wrong).unwrap();
        place.write("image.tar", &packed(&root));
        fs::remove_dir_all(&root).unwrap();
    };
    let refused = |options: &str, code: i32, said: &str| {
        place
            .run(&format!("convert image.tar out {options}"))
            .code(code)
            .stderr(contains(said));
        assert_eq!(place.names(), ["image.tar"]);
    };
    // A small layer is not unpacked, either.
    for wrong in [wrong.as_slice(), b"\x1f\x8b a short layer"] {
        for layers in [0, 256] {
            pack(layers, wrong);
            let said = format!("has {layers} layers, expected 1 to 255");
            refused("", 3, &said);
        }
        pack(1, wrong);
        refused("--ref nothing", 1, "no such image; there are: ");
        refused("", 3, "is not what its digest says");
    }
    // Neither an index nor a manifest.json.
    let name = format!("blobs/sha256/{}", "a".repeat(64));
    let blob = member(&name, b'0', &wrong);
    for more in [
        file("repositories", "{}"),
        file("oci-layout", "{}"),
        file("index.json", "{}"),
    ] {
        place.write("image.tar", &tar(&[blob.clone(), more]));
        refused(
            "--from oci",
            3,
            "has layers of an image, but no manifest.json",
        );
    }
    // A manifest.json that cannot be used.
    let large = " ".repeat((4 << 20) + 1);
    for (list, said) in [
        ("[{]", "not what `docker save' writes"),
        (large.as_str(), "has more than 4194304 bytes"),
    ] {
        let list = file("manifest.json", list);
        place.write("image.tar", &tar(&[blob.clone(), list]));
        let said = format!("manifest.json: {said}");
        refused("--from oci", 3, &said);
    }
}

/// A description or index is read once, not for each of the hundreds of images that name it.
fn long_files_of_many_names() {
    let place = Place::new();
    let layer = etc_tar();
    let long = "n".repeat(3_900_000);
    let took = |input: &str| {
        let _ = fs::remove_dir_all(place.path("out"));
        let start = Instant::now();
        place.ok(&format!("convert {input} out --ref x:0"));
        start.elapsed()
    };
    let compare = |one: Duration, many: Duration| {
        assert!(many < one * 10 + Duration::from_secs(2), "{one:?} {many:?}");
    };
    let config = config(&[digest(&layer)]);
    let config = config.replacen('{', &format!(r#"{{"author":"{long}","#), 1);
    let [one, many] = [1, 400].map(|count| {
        let images = (0..count).map(|nth| entry(&[format!("x:{nth}")], &["l.tar"]));
        let images: Vec<String> = images.collect();
        let list = format!("[{}]", images.join(","));
        place.write("saved.tar", &saved(&config, &list));
        took("saved.tar")
    });
    compare(one, many);
    let root = place.path("layout");
    let mut layout = Layout::new(&root);
    let blob = layout.blob(&layer, OCI_TAR);
    layout.image(&[blob], &[digest(&layer)], "");
    let image = &layout.manifests[0];
    let index = format!(r#"{{"a":"{long}","manifests":[{image}]}}"#);
    let index = layout.blob(index.as_bytes(), "application/vnd.oci.image.index.v1+json");
    let [one, many] = [1, 900].map(|count| {
        let name = r#","annotations":{"org.opencontainers.image.ref.name":"x:"#;
        let start = index.strip_suffix('}').unwrap();
        let entries = (0..count).map(|nth| format!(r#"{start}{name}{nth}"}}}}"#));
        let entries: Vec<String> = entries.collect();
        let entries = entries.join(",");
        let index = format!(r#"{{"manifests":[{entries}]}}"#);
        fs::write(root.join("index.json"), index).unwrap();
        took("layout")
    });
    compare(one, many);
}

fn signals() {
    let place = Place::new();
    let layer = tar(&[member("noise", b'0', &noise(48 << 20, 3))]);
    image(&place.path("layout"), std::slice::from_ref(&layer));
    place.write("layer.tar", &layer);
    place.files(&[tar(&[dir("etc")])]);
    image(&place.path("layout"), &[layer]);
    let before = place.names();
    for line in [
        "convert layout out",
        "convert layout out --oci --cache cache",
        "apply layer.tar --base app/config.v1.json out",
    ] {
        for signal in [Signal::INT, Signal::TERM] {
            let more = "--threads 1 --algorithm zstd --level 22 --block-size 64k";
            let mut child = place.start(&format!("{line} {more}"));
            let hidden = |names: Vec<String>| names.iter().any(|name| name.starts_with(".obd"));
            let begun = || match line.starts_with("apply") {
                true => hidden(place.names()),
                // The layer is about to be written.
                false => place
                    .names()
                    .iter()
                    .any(|name| name.starts_with(".obd") && !names(&place.path(name)).is_empty()),
            };
            assert!(soon(begun), "{line}: nothing was begun");
            assert_eq!(stop(&mut child, signal), Some(130), "{line}");
            let mut after = place.names();
            after.retain(|name| name != "cache");
            assert_eq!(after, before, "{line}");
        }
    }
    assert!(place.names_in("cache").is_empty());
}
