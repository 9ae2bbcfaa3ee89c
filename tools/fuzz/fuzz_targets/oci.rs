// SPDX-License-Identifier: GPL-2.0

//! Container images through `obdsetup convert`: layouts and archives with layers of random members,
//! whiteouts and links among them, of which any bytes are changed, with digests made right again or not.
//! What nobody has changed is put together as a model says; what was changed is refused, with nothing
//! left behind, or makes a file system in which all is consistent.

#![no_main]
#![allow(missing_docs, clippy::expect_used, clippy::panic, clippy::unwrap_used)]

#[allow(dead_code)]
#[path = "../../obdsetup/tests/common/erofs.rs"]
mod erofs;
#[allow(dead_code)]
#[path = "../../obdsetup/tests/common/tars.rs"]
mod tars;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::ffi::OsString;
use std::fs;
use std::io::Write;
use std::path::Path;

use libfuzzer_sys::arbitrary::{Result, Unstructured};
use libfuzzer_sys::fuzz_target;
use overlaybd::{LayerReader, Stack};
use overlaybd_fuzz::{init, memory};
use sha2::{Digest, Sha256};

/// Most bytes of memory: buffers, most of all those of zstd.
const MAX_MEMORY: usize = 64 << 20;
/// Parts of paths.
const PARTS: [&str; 16] = [
    "a",
    "b",
    "c",
    "l",
    ".",
    ".wh.a",
    ".wh.b",
    ".wh.l",
    ".wh..wh..opq",
    ".wh..wh.x",
    ".wh.",
    "..",
    "a b",
    ".wh",
    "d",
    "f",
];
const TAR: &str = "application/vnd.oci.image.layer.v1.tar";

/// A member of a layer.
struct Member {
    kind: u8,
    mode: u16,
    path: String,
    target: String,
    content: Vec<u8>,
}

/// What a change is made to.
mod level {
    pub(crate) const CONFIG: u8 = 4;
    pub(crate) const MANIFEST: u8 = 5;
    pub(crate) const INDEX: u8 = 6;
    pub(crate) const FILES: u8 = 7;
    pub(crate) const COUNT: u8 = 8;
}

/// Bytes that are changed. Levels below [`level::CONFIG`] are layers.
struct Patch {
    level: u8,
    /// Whether bytes are inserted, or replace as many, or that many are removed.
    how: u8,
    at: u16,
    value: Vec<u8>,
}

struct Case {
    /// Each with how it is compressed.
    layers: Vec<(u8, Vec<Member>)>,
    patches: Vec<Patch>,
    /// A layout, an archive of it, or what `docker save` writes.
    form: u8,
    /// Whether an image for a registry is made, and that taken again.
    twice: bool,
}

fn read_path(input: &mut Unstructured<'_>) -> Result<String> {
    let count = input.arbitrary::<u8>()? % 4;
    let mut path = Vec::new();
    for _ in 0..=count {
        path.push(PARTS[usize::from(input.arbitrary::<u8>()? % 16)]);
    }
    Ok(path.join("/"))
}

fn read_member(input: &mut Unstructured<'_>) -> Result<Member> {
    let [kind, mode, len, fill]: [u8; 4] = input.arbitrary()?;
    let kind = b"05120536"[usize::from(kind % 8)];
    let path = read_path(input)?;
    let target = match kind {
        b'1' | b'2' => format!("{}{}", ["", "/"][usize::from(mode & 1)], read_path(input)?),
        _ => String::new(),
    };
    let len = if kind == b'0' {
        usize::from(len) * 41
    } else {
        0
    };
    Ok(Member {
        kind,
        mode: u16::from(mode) << 1,
        path,
        target,
        content: vec![fill; len],
    })
}

fn read(data: &[u8]) -> Result<Case> {
    let mut input = Unstructured::new(data);
    let [layers, patches, form]: [u8; 3] = input.arbitrary()?;
    let mut case = Case {
        layers: Vec::new(),
        patches: Vec::new(),
        form: form % 3,
        twice: form & 0x80 != 0,
    };
    for _ in 0..=layers % 4 {
        let [packed, count]: [u8; 2] = input.arbitrary()?;
        let members = (0..count % 12).map(|_| read_member(&mut input));
        let members = members.collect::<Result<Vec<_>>>()?;
        case.layers.push((packed % 3, members));
    }
    for _ in 0..patches % 8 {
        if input.is_empty() {
            break;
        }
        let [level, how, len]: [u8; 3] = input.arbitrary()?;
        let at = input.arbitrary()?;
        let value = input.bytes(input.len().min(usize::from(len % 64) + 1))?;
        case.patches.push(Patch {
            level: level % level::COUNT,
            how: how % 3,
            at,
            value: value.to_vec(),
        });
    }
    Ok(case)
}

fn digest(bytes: &[u8]) -> String {
    format!("{:x}", Sha256::digest(bytes))
}

impl Member {
    fn bytes(&self) -> Vec<u8> {
        let mut bytes = tars::member(&self.path, self.kind, &self.content);
        bytes[100..108].copy_from_slice(format!("{:07o}\0", self.mode).as_bytes());
        bytes[157..157 + self.target.len()].copy_from_slice(self.target.as_bytes());
        tars::sign(&mut bytes);
        bytes
    }
}

impl Case {
    fn patch(&self, level: u8, bytes: &mut Vec<u8>) {
        for patch in self.patches.iter().filter(|patch| patch.level == level) {
            let at = usize::from(patch.at) % (bytes.len() + 1);
            let end = (at + patch.value.len()).min(bytes.len());
            match patch.how {
                0 => drop(bytes.splice(at..end, patch.value.iter().copied())),
                1 => drop(bytes.splice(at..at, patch.value.iter().copied())),
                _ => drop(bytes.drain(at..end)),
            }
        }
    }

    /// The files of the image, by name, as its form has them.
    fn files(&self) -> BTreeMap<String, Vec<u8>> {
        let mut files = BTreeMap::new();
        let mut blob = |bytes: Vec<u8>, kind: &str| {
            let (hex, size) = (digest(&bytes), bytes.len());
            files.insert(format!("blobs/sha256/{hex}"), bytes);
            format!(r#"{{"mediaType":"{kind}","digest":"sha256:{hex}","size":{size}}}"#)
        };
        let (mut layers, mut ids, mut names) = (Vec::new(), Vec::new(), Vec::new());
        for (nth, (packed, members)) in (0u8..).zip(&self.layers) {
            let members: Vec<Vec<u8>> = members.iter().map(Member::bytes).collect();
            let mut tar = tars::tar(&members);
            self.patch(nth, &mut tar);
            ids.push(format!(r#""sha256:{}""#, digest(&tar)));
            let (tar, kind) = match packed {
                0 => (tar, TAR.to_owned()),
                1 => {
                    let level = flate2::Compression::fast();
                    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), level);
                    gzip.write_all(&tar).unwrap();
                    (gzip.finish().unwrap(), format!("{TAR}+gzip"))
                }
                _ => (
                    zstd::encode_all(tar.as_slice(), 1).unwrap(),
                    format!("{TAR}+zstd"),
                ),
            };
            names.push(format!(r#""blobs/sha256/{}""#, digest(&tar)));
            layers.push(blob(tar, &kind));
        }
        let config = format!(
            r#"{{"architecture":"amd64","os":"linux","config":{{}},"rootfs":{{"type":"layers","diff_ids":[{}]}}}}"#,
            ids.join(",")
        );
        let patched = |level: u8, text: String| {
            let mut bytes = text.into_bytes();
            self.patch(level, &mut bytes);
            bytes
        };
        let config_bytes = patched(level::CONFIG, config);
        let config_name = format!("blobs/sha256/{}", digest(&config_bytes));
        let config = blob(config_bytes, "application/vnd.oci.image.config.v1+json");
        if self.form == 2 {
            let saved = format!(
                r#"[{{"Config":"{config_name}","RepoTags":["a:b"],"Layers":[{}]}}]"#,
                names.join(",")
            );
            files.insert("manifest.json".to_owned(), patched(level::MANIFEST, saved));
            return files;
        }
        let manifest = format!(
            r#"{{"schemaVersion":2,"config":{config},"layers":[{}]}}"#,
            layers.join(",")
        );
        let manifest = blob(
            patched(level::MANIFEST, manifest),
            "application/vnd.oci.image.manifest.v1+json",
        );
        let index = format!(r#"{{"schemaVersion":2,"manifests":[{manifest}]}}"#);
        files.insert("index.json".to_owned(), patched(level::INDEX, index));
        let version = br#"{"imageLayoutVersion":"1.0.0"}"#;
        files.insert("oci-layout".to_owned(), version.to_vec());
        files
    }

    /// Writes the image to `place`.
    fn write(&self, place: &Path) {
        let files = self.files();
        if self.form == 0 {
            fs::create_dir_all(place.join("blobs/sha256")).unwrap();
            for (name, mut bytes) in files {
                self.patch(level::FILES, &mut bytes);
                fs::write(place.join(name), bytes).unwrap();
            }
            return;
        }
        let members: Vec<Vec<u8>> = files
            .iter()
            .map(|(name, bytes)| tars::member(name, b'0', bytes))
            .collect();
        let mut tar = tars::tar(&members);
        self.patch(level::FILES, &mut tar);
        fs::write(place, tar).unwrap();
    }
}

/// What the model knows of a file: type and mode, and content, target or number.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Node {
    mode: u16,
    what: Vec<u8>,
}

/// The tree, as a list of paths.
#[derive(Default)]
struct Model {
    nodes: Vec<Node>,
    /// Which node a path is; that of the root directory is empty.
    paths: BTreeMap<String, usize>,
    /// The paths that the layer has set.
    own: BTreeSet<String>,
}

/// The layer is refused.
struct Refused;

type Step<T> = std::result::Result<T, Refused>;

const DIRECTORY: u16 = 0o040_000;
const SYMLINK: u16 = 0o120_000;
const UNSAID: u16 = DIRECTORY | 0o755;

fn parts(path: &str) -> impl DoubleEndedIterator<Item = &str> {
    path.split('/').filter(|part| !matches!(*part, "" | "."))
}

/// All that is below a path.
fn below(path: &str) -> String {
    format!("{path}/")
}

impl Model {
    fn new() -> Self {
        let mut model = Self::default();
        model.set(String::new(), UNSAID, Vec::new());
        model
    }

    fn node(&self, path: &str) -> Option<&Node> {
        self.paths.get(path).map(|&id| &self.nodes[id])
    }

    fn is_directory(&self, path: &str) -> bool {
        self.node(path)
            .is_some_and(|node| node.mode & 0o170_000 == DIRECTORY)
    }

    fn set(&mut self, path: String, mode: u16, what: Vec<u8>) {
        self.nodes.push(Node { mode, what });
        self.link(path, self.nodes.len() - 1);
    }

    /// Gives a node a name, which it takes from what has it.
    fn link(&mut self, path: String, id: usize) {
        let inside = below(&path);
        if self.paths.get(&path) != Some(&id) && !path.is_empty() {
            self.paths.retain(|other, _| !other.starts_with(&inside));
            self.own.retain(|other| !other.starts_with(&inside));
        }
        self.own.insert(path.clone());
        self.paths.insert(path, id);
    }

    /// The directory that a path leads to, with links followed.
    fn walk(&mut self, path: &str, make: bool) -> Step<Option<String>> {
        let mut left: VecDeque<String> = parts(path).map(str::to_owned).collect();
        let mut at = String::new();
        let mut followed = 0;
        while let Some(part) = left.pop_front() {
            if part == ".." {
                at.truncate(at.rfind('/').unwrap_or(0));
                continue;
            }
            let next = format!("{at}/{part}");
            let Some(node) = self.node(&next).cloned() else {
                if !make {
                    return Ok(None);
                }
                self.set(next.clone(), UNSAID, Vec::new());
                at = next;
                continue;
            };
            match node.mode & 0o170_000 {
                DIRECTORY => at = next,
                SYMLINK => {
                    followed += 1;
                    if followed > 40 {
                        return Err(Refused);
                    }
                    let target = String::from_utf8(node.what).unwrap();
                    if target.starts_with('/') {
                        at.clear();
                    }
                    for part in parts(&target).rev() {
                        left.push_front(part.to_owned());
                    }
                }
                _ if make => return Err(Refused),
                _ => return Ok(None),
            }
        }
        Ok(Some(at))
    }

    /// Hides what layers below have: a path, and what is in it.
    fn hide(&mut self, path: &str) {
        let mut inside: Vec<String> = self.inside(path);
        inside.push(path.to_owned());
        self.hide_all(inside);
    }

    fn inside(&self, path: &str) -> Vec<String> {
        let start = below(path);
        let all = self.paths.keys().filter(|other| other.starts_with(&start));
        all.cloned().collect()
    }

    fn hide_all(&mut self, mut paths: Vec<String>) {
        // The deepest first.
        paths.sort();
        for path in paths.iter().rev() {
            if self.own.contains(path) || !self.paths.contains_key(path) {
                continue;
            }
            if self.inside(path).is_empty() {
                self.paths.remove(path);
            } else {
                // It stays for what the layer has in it.
                let id = self.paths[path];
                self.nodes[id].mode = UNSAID;
            }
        }
    }

    /// The last part of a path, and the directory that it is in.
    fn split(path: &str) -> Option<(String, &str)> {
        let all: Vec<&str> = parts(path).collect();
        let (last, directory) = all.split_last()?;
        Some((directory.join("/"), last))
    }

    fn member(&mut self, member: &Member) -> Step<()> {
        if parts(&member.path).any(|part| part == "..") {
            return Err(Refused);
        }
        let hard_link = member.kind == b'1';
        if hard_link && parts(&member.target).any(|part| part == "..") {
            return Err(Refused);
        }
        let Some((directory, name)) = Self::split(&member.path) else {
            self.nodes[0].mode = DIRECTORY | member.mode;
            return if member.kind == b'5' {
                Ok(())
            } else {
                Err(Refused)
            };
        };
        for part in parts(&directory) {
            if part.starts_with(".wh..wh.") {
                return Ok(());
            }
            if part.starts_with(".wh.") {
                return Err(Refused);
            }
        }
        if name == ".wh..wh..opq" {
            if let Some(at) = self.walk(&directory, false)? {
                self.hide_all(self.inside(&at));
            }
            return Ok(());
        }
        if name.starts_with(".wh..wh.") {
            return Ok(());
        }
        if let Some(hidden) = name.strip_prefix(".wh.") {
            if hidden.is_empty() {
                return Err(Refused);
            }
            if let Some(at) = self.walk(&directory, false)? {
                self.hide(&format!("{at}/{hidden}"));
            }
            return Ok(());
        }
        let at = self.walk(&directory, true)?.ok_or(Refused)?;
        let path = format!("{at}/{name}");
        match member.kind {
            b'1' => {
                self.own.insert(path.clone());
                let (directory, name) = Self::split(&member.target).ok_or(Refused)?;
                let there = self.walk(&directory, true)?.ok_or(Refused)?;
                let there = format!("{there}/{name}");
                if self.is_directory(&there) {
                    return Err(Refused);
                }
                let id = *self.paths.get(&there).ok_or(Refused)?;
                self.link(path, id);
            }
            b'5' if self.is_directory(&path) => {
                let id = self.paths[&path];
                self.nodes[id].mode = DIRECTORY | member.mode;
                self.own.insert(path);
            }
            b'5' => self.set(path, DIRECTORY | member.mode, Vec::new()),
            b'2' => self.set(path, SYMLINK | 0o777, member.target.clone().into_bytes()),
            b'3' => self.set(path, 0o020_000 | member.mode, vec![0; 4]),
            b'6' => self.set(path, 0o010_000 | member.mode, Vec::new()),
            _ => self.set(path, 0o100_000 | member.mode, member.content.clone()),
        }
        Ok(())
    }
}

/// The files that an image has where nobody has changed it.
fn model(case: &Case) -> Step<Model> {
    let mut model = Model::new();
    for (_, members) in &case.layers {
        model.own.clear();
        for member in members {
            model.member(member)?;
        }
    }
    Ok(model)
}

/// `obdsetup convert`, with further arguments; what is wrong, with its exit code.
fn convert(from: &Path, to: &Path, more: &[&str]) -> std::result::Result<(), (u8, String)> {
    let mut args: Vec<OsString> = vec!["obdsetup".into(), "convert".into(), from.into(), to.into()];
    args.extend(more.iter().map(OsString::from));
    obdsetup::run(args)
}

/// The names in a directory.
fn names(place: &Path) -> Vec<String> {
    let entries = fs::read_dir(place).expect("a directory");
    let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let mut names: Vec<String> = names.collect();
    names.sort();
    names
}

/// The files of the stack in the directory `app`.
fn files_of(app: &Path) -> erofs::Files {
    let layers = (0..4).map(|nth| app.join(format!("layer{nth}.obd")));
    let layers = layers.filter(|path| path.exists());
    let layers = layers.map(|path| LayerReader::open(&path, None).expect("a layer"));
    let stack = Stack::new(layers.collect()).expect("a stack");
    let mut disk = vec![0; usize::try_from(stack.size()).expect("a small disk")];
    stack
        .read_at(0, &mut disk)
        .expect("what was made can be read");
    erofs::read(&disk)
}

/// Compares what was made with the model.
fn compare(files: &erofs::Files, model: &Model) {
    let wanted: Vec<&String> = model.paths.keys().collect();
    assert_eq!(files.keys().collect::<Vec<_>>(), wanted, "paths");
    let mut inodes: BTreeMap<usize, u64> = BTreeMap::new();
    for (path, &id) in &model.paths {
        let (node, found) = (&model.nodes[id], &files[path]);
        assert_eq!(found.mode, node.mode, "{path}: mode");
        if node.mode & 0o170_000 != DIRECTORY {
            assert_eq!(found.what, node.what, "{path}");
        }
        assert_eq!(
            *inodes.entry(id).or_insert(found.inode),
            found.inode,
            "{path}: inode"
        );
    }
    let apart: BTreeSet<&u64> = inodes.values().collect();
    assert_eq!(apart.len(), inodes.len(), "inodes");
}

fn check(data: &[u8]) -> Result<()> {
    let case = read(data)?;
    let place = tempfile::tempdir().expect("a directory");
    let [image, app, pushed] = ["image", "app", "pushed"].map(|name| place.path().join(name));
    case.write(&image);
    let (done, used) = memory(|| convert(&image, &app, &["--from", "oci"]));
    assert!(used <= MAX_MEMORY, "{used} bytes");
    let wanted = case.patches.is_empty().then(|| model(&case));
    if let Err((code, message)) = done {
        assert!(matches!(wanted, None | Some(Err(Refused))), "{message}");
        assert!(matches!(code, 1 | 3 | 4), "{code}: {message}");
        assert!(!message.is_empty());
        assert_eq!(names(place.path()), ["image"]);
        return Ok(());
    }
    assert!(!matches!(wanted, Some(Err(Refused))), "not refused");
    assert_eq!(names(place.path()), ["app", "image"]);
    let files = files_of(&app);
    if let Some(Ok(model)) = wanted {
        compare(&files, &model);
    }
    if case.twice {
        convert(&image, &pushed, &["--from", "oci", "--oci"]).expect("for a registry, too");
        fs::remove_dir_all(&app).expect("it is ours");
        convert(&pushed, &app, &[]).expect("what was made is taken");
        assert_eq!(files_of(&app), files);
    }
    Ok(())
}

fn seeds() -> Vec<Vec<u8>> {
    let [file, directory, link, symlink]: [u8; 4] = [0, 1, 2, 3];
    // Of the parts of paths.
    let [a, b, c, l, hide_a, opaque]: [u8; 6] = [0, 1, 2, 3, 5, 8];
    let member = |kind: u8, path: &[u8], target: &[u8]| {
        let mut bytes = vec![kind, 0xf6, 7, b'x'];
        for path in [path, target].iter().filter(|path| !path.is_empty()) {
            bytes.push(path.len() as u8 - 1);
            bytes.extend(*path);
        }
        bytes
    };
    let lower = [
        member(directory, &[a], &[]),
        member(file, &[a, b], &[]),
        member(file, &[a, c], &[]),
        member(link, &[b], &[a, b]),
        member(symlink, &[l], &[a]),
    ];
    let uppers = [
        vec![
            member(file, &[a, hide_a], &[]),
            member(file, &[a, opaque], &[]),
        ],
        vec![member(file, &[l, b], &[]), member(file, &[hide_a], &[])],
        vec![
            member(link, &[c], &[b]),
            member(symlink, &[a, b], &[c]),
            member(file, &[a], &[]),
        ],
    ];
    let mut seeds = Vec::new();
    for upper in &uppers {
        for form in [0, 0x81, 2] {
            let packed = form & 3;
            let mut seed = vec![1, 0, form];
            for (packed, members) in [(0, &lower[..]), (packed, upper)] {
                seed.extend([packed, members.len() as u8]);
                seed.extend(members.concat());
            }
            seeds.push(seed.clone());
            for level in [
                1,
                level::CONFIG,
                level::MANIFEST,
                level::INDEX,
                level::FILES,
            ] {
                let mut seed = seed.clone();
                seed[1] = 1;
                seed.extend([level, 0, 0, 40, 0, b'x']);
                seeds.push(seed);
            }
        }
    }
    seeds
}

fuzz_target!(init: init(seeds), |data: &[u8]| {
    let _ = check(data);
});
