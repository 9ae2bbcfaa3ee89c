// SPDX-License-Identifier: GPL-2.0

//! Container images and tars, converted by `obdsetup convert`. An input has layers of random members, such as
//! files, links and whiteouts. They are an OCI layout, an archive of one, what `docker save` writes, or the first
//! layer is converted as a tar of files. Patches change any bytes, before or after checksums and digests of these
//! bytes are computed.
//!
//! Without patches, the result must have the files that a model has, which knows only whole paths. With patches,
//! the image is refused, and nothing is left behind, or the result is a consistent file system. The same layers
//! give the same bytes in each form, and in any order of an archive's files.

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
use overlaybd::format::Blob;
use overlaybd::{LayerReader, Stack};
use overlaybd_fuzz::{init, memory};
use sha2::{Digest, Sha256};

/// Memory limit in bytes: buffers, and an extended header of the maximum length.
const MAX_MEMORY: usize = 64 << 20;
/// Components of paths.
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
    ".wh..",
];
/// Kinds of members, as in a tar header. Those that are here twice are chosen more often.
const KINDS: [u8; 8] = *b"05120536";
const TAR: &str = "application/vnd.oci.image.layer.v1.tar";
const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const INDEX: &str = "application/vnd.oci.image.index.v1+json";
const XATTR: &[u8] = b"user.n";

/// The form in which the layers are converted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Form {
    /// An OCI image layout in a directory.
    Layout,
    /// An OCI image layout in an archive.
    Archive,
    /// What `docker save` writes.
    Saved,
    /// No image: the tar of the first layer, converted as a tar of files.
    Files,
}

/// How the name of a member is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Naming {
    Header,
    Pax,
    /// In a member of its own before this one, as GNU tar stores long names.
    Long,
    /// The first component in the header's field for a prefix.
    Prefix,
}

/// A member of a layer.
struct Member {
    kind: u8,
    naming: Naming,
    mode: u16,
    path: String,
    target: String,
    content: Vec<u8>,
    /// The value of the extended attribute [`XATTR`].
    xattr: Option<Vec<u8>>,
}

struct Layer {
    /// Compression: 0 for none, 1 for gzip, 2 for zstd.
    packing: u8,
    /// The name of its file in what `docker save` writes.
    name: String,
    members: Vec<Member>,
}

/// The bytes that a patch changes. Level `n` below [`level::PACKED`] is the tar of layer `n`.
mod level {
    /// The compressed tar of the first layer. The next three levels are those of the other layers.
    pub(crate) const PACKED: u8 = 4;
    pub(crate) const CONFIG: u8 = 8;
    pub(crate) const MANIFEST: u8 = 9;
    pub(crate) const INDEX: u8 = 10;
    /// Each file of a layout, or an archive of them.
    pub(crate) const FILES: u8 = 11;
    /// The archive, compressed.
    pub(crate) const ARCHIVE: u8 = 12;
    pub(crate) const COUNT: u8 = 13;
}

/// A change of bytes.
struct Patch {
    level: u8,
    /// 0: `value` replaces as many bytes; 1: it is inserted; 2: as many bytes are removed.
    how: u8,
    at: u16,
    value: Vec<u8>,
}

/// How an archive of `docker save` stores a layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stored {
    /// Under its digest.
    Digest,
    /// Under any name.
    Name,
    /// Under another name; the layer's name is a symbolic link to that.
    Symlink,
    /// Under another name; the layer's name is a hard link to that.
    HardLink,
}

/// What an image has besides manifest, config and layers. It must not change the result.
struct Others {
    /// Number of nested indexes between `index.json` and the manifest.
    depth: u8,
    /// Whether the image is listed twice.
    twice: bool,
    /// Whether the index has an attestation.
    attestation: bool,
    /// Whether there is an image for another platform, too.
    foreign: bool,
    /// Whether the command line has `--platform`.
    told: bool,
}

/// What follows the first conversion.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Second {
    Nothing,
    /// The image is converted to an image for a registry, and that is converted.
    Registry,
    /// The same layers in another form, or in another order.
    Other,
}

struct Case {
    layers: Vec<Layer>,
    patches: Vec<Patch>,
    form: Form,
    /// How an archive is compressed.
    packing: u8,
    /// Whether the checksums of tar headers are corrected after a patch.
    sums: bool,
    stored: Stored,
    /// The file of an archive that comes first; with the highest bit, the order is reversed.
    order: u8,
    others: Others,
    second: Second,
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
    let [bits, mode, len, fill]: [u8; 4] = input.arbitrary()?;
    let kind = KINDS[usize::from(bits % 8)];
    let path = read_path(input)?;
    let target = match kind {
        b'1' | b'2' => format!("{}{}", ["", "/"][usize::from(mode & 1)], read_path(input)?),
        _ => String::new(),
    };
    let len = match kind {
        b'0' => usize::from(len) * 41,
        _ => 0,
    };
    let namings = [Naming::Header, Naming::Pax, Naming::Long, Naming::Prefix];
    Ok(Member {
        kind,
        naming: namings[usize::from((bits >> 3) % 4)],
        mode: u16::from(mode) << 1,
        path,
        target,
        content: vec![fill; len],
        xattr: (bits & 0x20 != 0).then(|| vec![fill, mode]),
    })
}

fn read(data: &[u8]) -> Result<Case> {
    let mut input = Unstructured::new(data);
    let [layers, patches, form, how, order, others]: [u8; 6] = input.arbitrary()?;
    let forms = [Form::Layout, Form::Archive, Form::Saved, Form::Files];
    let stored = [
        Stored::Digest,
        Stored::Name,
        Stored::Symlink,
        Stored::HardLink,
    ];
    let second = [
        Second::Nothing,
        Second::Registry,
        Second::Other,
        Second::Other,
    ];
    let mut case = Case {
        layers: Vec::new(),
        patches: Vec::new(),
        form: forms[usize::from(form % 4)],
        packing: (form >> 2) % 3,
        sums: how & 1 != 0,
        stored: stored[usize::from((how >> 1) % 4)],
        order,
        others: Others {
            depth: others % 4,
            twice: others & 4 != 0,
            attestation: others & 8 != 0,
            foreign: others & 16 != 0,
            told: others & 32 != 0,
        },
        second: second[usize::from((how >> 3) % 4)],
    };
    for _ in 0..=layers % 4 {
        let [packing, count]: [u8; 2] = input.arbitrary()?;
        let name = read_path(&mut input)?;
        let members = (0..count % 12).map(|_| read_member(&mut input));
        case.layers.push(Layer {
            packing: packing % 3,
            name,
            members: members.collect::<Result<Vec<_>>>()?,
        });
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

fn pack(how: u8, bytes: Vec<u8>) -> Vec<u8> {
    match how {
        0 => bytes,
        1 => {
            let level = flate2::Compression::fast();
            let mut gzip = flate2::write::GzEncoder::new(Vec::new(), level);
            gzip.write_all(&bytes).unwrap();
            gzip.finish().unwrap()
        }
        _ => zstd::encode_all(bytes.as_slice(), 1).unwrap(),
    }
}

/// Returns a member of any kind, with the target of a link.
fn link(name: &str, kind: u8, target: &str, content: &[u8]) -> Vec<u8> {
    let mut bytes = tars::member(name, kind, content);
    bytes[157..157 + target.len()].copy_from_slice(target.as_bytes());
    tars::sign(&mut bytes);
    bytes
}

/// Corrects the checksums of all headers that can be reached from the first.
fn sign_all(tar: &mut [u8]) {
    let mut at = 0;
    while let Some(header) = tar.get_mut(at..at + 512) {
        if header.iter().all(|&byte| byte == 0) {
            return;
        }
        tars::sign(header);
        let text: String = header[124..136].iter().map(|&b| char::from(b)).collect();
        let size = usize::from_str_radix(text.trim_matches(['\0', ' ']), 8).unwrap_or_default();
        at += 512 + size.min(tar.len()).next_multiple_of(512);
    }
}

/// Returns whether a file in the tar may have a million bytes or more of holes. A few bytes of the tar can make any
/// number of them, and a gigabyte takes seconds to hash.
fn has_large_holes(tar: &[u8]) -> bool {
    let is_digit = |byte: &&u8| byte.is_ascii_digit();
    let mut fields = tar.windows(5).zip(5..).filter(|(text, _)| text == b"size=");
    let records = fields.any(|(_, at)| tar[at..].iter().take_while(is_digit).count() > 6);
    let mut sparse = tar.chunks_exact(512).filter(|block| block[156] == b'S');
    records
        || sparse.any(|block| {
            let digits = block[483..495].iter().skip_while(|b| b" \0".contains(b));
            let zeros = digits.skip_while(|&&byte| byte == b'0');
            block[483] >= 0x80 || zeros.take_while(is_digit).count() > 6
        })
}

impl Member {
    fn bytes(&self) -> Vec<u8> {
        let mut records: Vec<(&[u8], &[u8])> = Vec::new();
        if let Some(value) = &self.xattr {
            records.push((b"SCHILY.xattr.user.n", value));
        }
        let mut bytes = Vec::new();
        let mut name = "x";
        let mut prefix = "";
        match self.naming {
            Naming::Pax => records.push((b"path", self.path.as_bytes())),
            Naming::Long => {
                let text = format!("{}\0", self.path);
                bytes = tars::member("././@LongLink", b'L', text.as_bytes());
            }
            Naming::Prefix => {
                (prefix, name) = self.path.split_once('/').unwrap_or(("", &self.path))
            }
            Naming::Header => name = &self.path,
        }
        if !records.is_empty() {
            bytes.extend(tars::pax(&records));
        }
        let mut own = link(name, self.kind, &self.target, &self.content);
        own[100..108].copy_from_slice(format!("{:07o}\0", self.mode).as_bytes());
        own[345..345 + prefix.len()].copy_from_slice(prefix.as_bytes());
        tars::sign(&mut own);
        bytes.extend(own);
        bytes
    }

    /// Returns whether the member is a whiteout, or is left out.
    fn is_whiteout(&self) -> bool {
        self.path.split('/').any(|part| part.starts_with(".wh."))
    }
}

/// Returns a descriptor with a platform.
fn on(described: &str, os: &str, architecture: &str) -> String {
    let start = described.strip_suffix('}').unwrap();
    format!(r#"{start},"platform":{{"architecture":"{architecture}","os":"{os}"}}}}"#)
}

/// The files of an image by name, and its links: name, kind, target.
#[derive(Default)]
struct Image {
    files: BTreeMap<String, Vec<u8>>,
    links: Vec<(String, u8, String)>,
}

impl Image {
    /// Adds a blob. Returns its name and its descriptor.
    fn blob(&mut self, bytes: Vec<u8>, kind: &str) -> (String, String) {
        let (hex, size) = (digest(&bytes), bytes.len());
        let name = format!("blobs/sha256/{hex}");
        self.files.insert(name.clone(), bytes);
        let described =
            format!(r#"{{"mediaType":"{kind}","digest":"sha256:{hex}","size":{size}}}"#);
        (name, described)
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

    fn patched(&self, level: u8, text: String) -> Vec<u8> {
        let mut bytes = text.into_bytes();
        self.patch(level, &mut bytes);
        bytes
    }

    fn is_patched(&self, levels: std::ops::Range<u8>) -> bool {
        self.patches
            .iter()
            .any(|patch| levels.contains(&patch.level))
    }

    /// Returns the tar of layer `nth`, and the compressed tar, both patched.
    fn layer(&self, nth: u8, layer: &Layer) -> (Vec<u8>, Vec<u8>) {
        let members: Vec<Vec<u8>> = layer.members.iter().map(Member::bytes).collect();
        let mut tar = tars::tar(&members);
        self.patch(nth, &mut tar);
        if self.sums && self.is_patched(nth..nth + 1) {
            sign_all(&mut tar);
        }
        let mut packed = pack(layer.packing, tar.clone());
        self.patch(level::PACKED + nth, &mut packed);
        (tar, packed)
    }

    /// Returns the files of the image in a form.
    fn image(&self, form: Form) -> Image {
        let mut image = Image::default();
        let (mut layers, mut ids, mut names) = (Vec::new(), Vec::new(), Vec::new());
        for (nth, layer) in (0u8..).zip(&self.layers) {
            let (tar, packed) = self.layer(nth, layer);
            ids.push(format!(r#""sha256:{}""#, digest(&tar)));
            let kind = format!(
                "{TAR}{}",
                ["", "+gzip", "+zstd"][usize::from(layer.packing)]
            );
            if form == Form::Saved && self.stored != Stored::Digest {
                let (name, real) = (layer.saved_name(nth), format!("real{nth}.tar"));
                let up = "../".repeat(name.matches('/').count());
                let file = match self.stored {
                    Stored::Symlink => {
                        image
                            .links
                            .push((name.clone(), b'2', format!("{up}{real}")));
                        real
                    }
                    Stored::HardLink => {
                        image.links.push((name.clone(), b'1', real.clone()));
                        real
                    }
                    Stored::Name | Stored::Digest => name.clone(),
                };
                image.files.insert(file, packed);
                names.push(format!(r#""{name}""#));
                continue;
            }
            let (name, described) = image.blob(packed, &kind);
            names.push(format!(r#""{name}""#));
            layers.push(described);
        }
        let config = format!(
            r#"{{"architecture":"amd64","os":"linux","config":{{}},"rootfs":{{"type":"layers","diff_ids":[{}]}}}}"#,
            ids.join(",")
        );
        let config = self.patched(level::CONFIG, config);
        let (config_name, config) = image.blob(config, "application/vnd.oci.image.config.v1+json");
        if form == Form::Saved {
            let saved = format!(
                r#"{{"Config":"{config_name}","RepoTags":["a:b"],"Layers":[{}]}}"#,
                names.join(",")
            );
            let count = 1 + usize::from(self.others.twice);
            let saved = format!("[{}]", vec![saved; count].join(","));
            let saved = self.patched(level::MANIFEST, saved);
            image.files.insert("manifest.json".to_owned(), saved);
            return image;
        }
        let manifest = |layers: &[String]| {
            let layers = layers.join(",");
            format!(r#"{{"schemaVersion":2,"config":{config},"layers":[{layers}]}}"#)
        };
        let own = self.patched(level::MANIFEST, manifest(&layers));
        let (_, own) = image.blob(own, MANIFEST);
        let mut entries = vec![own];
        if self.others.twice {
            entries.push(entries[0].clone());
        }
        if self.others.foreign {
            // With two platforms, the index must have the platform of each. That of this machine is x86-64.
            entries = entries
                .iter()
                .map(|own| on(own, "linux", "amd64"))
                .collect();
            let (_, foreign) = image.blob(manifest(&layers[..1]).into_bytes(), MANIFEST);
            entries.push(on(&foreign, "linux", "mips"));
        }
        if self.others.attestation {
            let nothing = format!(
                r#"{{"mediaType":"{MANIFEST}","digest":"sha256:{:064}","size":1}}"#,
                0
            );
            entries.push(on(&nothing, "unknown", "unknown"));
        }
        let index = |entries: &[String]| {
            let entries = entries.join(",");
            format!(r#"{{"schemaVersion":2,"manifests":[{entries}]}}"#)
        };
        for _ in 0..self.others.depth {
            entries = vec![image.blob(index(&entries).into_bytes(), INDEX).1];
        }
        let index = index(&entries);
        let index = self.patched(level::INDEX, index);
        image.files.insert("index.json".to_owned(), index);
        let version = br#"{"imageLayoutVersion":"1.0.0"}"#;
        image
            .files
            .insert("oci-layout".to_owned(), version.to_vec());
        image
    }

    /// Writes the image in a form to `place`.
    fn write(&self, place: &Path, form: Form, order: u8) {
        if form == Form::Files {
            fs::write(place, self.layer(0, &self.layers[0]).1).unwrap();
            return;
        }
        let image = self.image(form);
        if form == Form::Layout {
            fs::create_dir_all(place.join("blobs/sha256")).unwrap();
            for (name, mut bytes) in image.files {
                self.patch(level::FILES, &mut bytes);
                fs::write(place.join(name), bytes).unwrap();
            }
            return;
        }
        let files = image.files.iter();
        let files = files.map(|(name, bytes)| tars::member(name, b'0', bytes));
        let links = image.links.iter();
        let links = links.map(|(name, kind, target)| link(name, *kind, target, b""));
        let mut members: Vec<Vec<u8>> = files.chain(links).collect();
        let count = members.len();
        members.rotate_left(usize::from(order & 0x7f) % count);
        if order & 0x80 != 0 {
            members.reverse();
        }
        let mut tar = tars::tar(&members);
        self.patch(level::FILES, &mut tar);
        if self.sums && self.is_patched(level::FILES..level::ARCHIVE) {
            sign_all(&mut tar);
        }
        let mut packed = pack(self.packing, tar);
        self.patch(level::ARCHIVE, &mut packed);
        fs::write(place, packed).unwrap();
    }

    /// Returns whether `obdsetup` finds the layers in an archive of `docker save` by their names: not if a component
    /// is `.` or `..`.
    fn names_fit(&self, form: Form) -> bool {
        let fits = |layer: &Layer| {
            layer
                .name
                .split('/')
                .all(|part| !matches!(part, "." | ".."))
        };
        form != Form::Saved || self.stored == Stored::Digest || self.layers.iter().all(fits)
    }

    /// Returns another form and order that must give the same result; `None` if a patch changes bytes that only this
    /// form and order have.
    fn other(&self) -> Option<(Form, u8)> {
        let form = match self.form {
            _ if self.is_patched(level::FILES..level::COUNT) => return None,
            Form::Files => return None,
            form if self.is_patched(level::CONFIG..level::FILES) => form,
            Form::Layout => Form::Archive,
            Form::Archive => Form::Saved,
            Form::Saved => Form::Layout,
        };
        let fit = self.names_fit(form) && self.names_fit(self.form);
        fit.then_some((form, self.order.wrapping_add(0x81)))
    }
}

impl Layer {
    fn saved_name(&self, nth: u8) -> String {
        format!("n{nth}/{}", self.name)
    }
}

/// A file in the model: an inode.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Node {
    /// Type and permissions.
    mode: u16,
    /// Content of a file, target of a symbolic link, or number of a device.
    what: Vec<u8>,
    xattr: Option<Vec<u8>>,
}

impl Node {
    fn new(mode: u16, what: Vec<u8>) -> Self {
        Self {
            mode,
            what,
            xattr: None,
        }
    }

    /// Returns a directory that has no member of its own, only members in it.
    fn unsaid() -> Self {
        Self::new(DIRECTORY | 0o755, Vec::new())
    }
}

/// A tree of files, as a list of paths.
#[derive(Default)]
struct Model {
    nodes: Vec<Node>,
    /// The node of each path, as an index of `nodes`. The path of the root directory is empty.
    paths: BTreeMap<String, usize>,
    /// The paths that the layer that is being added has set.
    own: BTreeSet<String>,
    /// Whether a tar of files is read, which has no whiteouts.
    plain: bool,
}

/// The error of a layer that must be refused.
#[derive(Debug)]
struct Refused;

type Step<T> = std::result::Result<T, Refused>;

const TYPE: u16 = 0o170_000;
const DIRECTORY: u16 = 0o040_000;
const SYMLINK: u16 = 0o120_000;

fn parts(path: &str) -> impl DoubleEndedIterator<Item = &str> {
    path.split('/').filter(|part| !matches!(*part, "" | "."))
}

impl Model {
    fn new(plain: bool) -> Self {
        let mut model = Self {
            plain,
            ..Self::default()
        };
        model.set(String::new(), Node::unsaid());
        model
    }

    /// Returns all paths with their nodes.
    fn tree(&self) -> BTreeMap<&String, &Node> {
        let paths = self.paths.iter();
        paths.map(|(path, &id)| (path, &self.nodes[id])).collect()
    }

    fn node(&self, path: &str) -> Option<&Node> {
        self.paths.get(path).map(|&id| &self.nodes[id])
    }

    fn is_directory(&self, path: &str) -> bool {
        self.node(path)
            .is_some_and(|node| node.mode & TYPE == DIRECTORY)
    }

    fn set(&mut self, path: String, node: Node) {
        self.nodes.push(node);
        self.link(path, self.nodes.len() - 1);
    }

    /// Makes `path` a name of node `id`. If another node has this name, the name is taken from it, and everything
    /// inside is removed.
    fn link(&mut self, path: String, id: usize) {
        let inside = format!("{path}/");
        if self.paths.get(&path) != Some(&id) && !path.is_empty() {
            self.paths.retain(|other, _| !other.starts_with(&inside));
            self.own.retain(|other| !other.starts_with(&inside));
        }
        self.own.insert(path.clone());
        self.paths.insert(path, id);
    }

    /// Returns an error if the file at `path` must not be replaced: in a tar of files, a directory that isn't empty.
    fn clear(&self, path: &str) -> Step<()> {
        match self.plain && !self.inside(path).is_empty() {
            true => Err(Refused),
            false => Ok(()),
        }
    }

    /// Follows symbolic links, and returns the path of the directory that `path` leads to. With `make`, makes missing
    /// directories; without, returns `None` if one is missing.
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
                self.set(next.clone(), Node::unsaid());
                at = next;
                continue;
            };
            match node.mode & TYPE {
                DIRECTORY => at = next,
                SYMLINK => {
                    followed += 1;
                    let target = String::from_utf8(node.what).unwrap();
                    let leads_out = target.starts_with('/') || parts(&target).any(|p| p == "..");
                    if followed > 40 || self.plain && leads_out {
                        return Err(Refused);
                    }
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

    /// Returns all paths below a directory.
    fn inside(&self, path: &str) -> Vec<String> {
        let start = format!("{path}/");
        let all = self.paths.keys().filter(|other| other.starts_with(&start));
        all.cloned().collect()
    }

    /// Removes those of `paths` that only layers below have set.
    fn hide(&mut self, mut paths: Vec<String>) {
        // The deepest first.
        paths.sort();
        for path in paths.iter().rev() {
            let Some(&id) = self.paths.get(path).filter(|_| !self.own.contains(path)) else {
                continue;
            };
            if self.inside(path).is_empty() {
                self.paths.remove(path);
            } else {
                // Keep the directory for the files of this layer in it.
                self.nodes[id] = Node::unsaid();
            }
        }
    }

    /// Splits a path into the directory and the last component.
    fn split(path: &str) -> Option<(String, &str)> {
        let all: Vec<&str> = parts(path).collect();
        let (last, directory) = all.split_last()?;
        Some((directory.join("/"), last))
    }

    /// Applies the member `name` in `directory` if it is a whiteout. Returns whether no file is made of it.
    fn whiteout(&mut self, directory: &str, name: &str) -> Step<bool> {
        for part in parts(directory) {
            if part.starts_with(".wh..wh.") {
                return Ok(true);
            }
            if part.starts_with(".wh.") {
                return Err(Refused);
            }
        }
        if name.starts_with(".wh..wh.") {
            if name == ".wh..wh..opq" {
                if let Some(at) = self.walk(directory, false)? {
                    self.hide(self.inside(&at));
                }
            }
            return Ok(true);
        }
        let Some(hidden) = name.strip_prefix(".wh.") else {
            return Ok(false);
        };
        if matches!(hidden, "" | "." | "..") {
            return Err(Refused);
        }
        if let Some(at) = self.walk(directory, false)? {
            let path = format!("{at}/{hidden}");
            let mut all = self.inside(&path);
            all.push(path);
            self.hide(all);
        }
        Ok(true)
    }

    fn member(&mut self, member: &Member) -> Step<()> {
        let leads_out = |path: &str| parts(path).any(|part| part == "..");
        if leads_out(&member.path) || member.kind == b'1' && leads_out(&member.target) {
            return Err(Refused);
        }
        let with = |kind: u16, what: Vec<u8>| Node {
            mode: kind,
            what,
            xattr: member.xattr.clone(),
        };
        let Some((directory, name)) = Self::split(&member.path) else {
            self.nodes[0] = with(DIRECTORY | member.mode, Vec::new());
            return match member.kind {
                b'5' => Ok(()),
                _ => Err(Refused),
            };
        };
        if !self.plain && self.whiteout(&directory, name)? {
            return Ok(());
        }
        let at = self.walk(&directory, true)?.ok_or(Refused)?;
        let path = format!("{at}/{name}");
        let node = match member.kind {
            b'1' => {
                self.own.insert(path.clone());
                let (directory, name) = Self::split(&member.target).ok_or(Refused)?;
                let there = self.walk(&directory, true)?.ok_or(Refused)?;
                let there = format!("{there}/{name}");
                if self.is_directory(&there) {
                    return Err(Refused);
                }
                let id = *self.paths.get(&there).ok_or(Refused)?;
                self.clear(&path)?;
                self.link(path, id);
                return Ok(());
            }
            b'5' => with(DIRECTORY | member.mode, Vec::new()),
            b'2' => with(SYMLINK | 0o777, member.target.clone().into_bytes()),
            b'3' => with(0o020_000 | member.mode, vec![0; 4]),
            b'6' => with(0o010_000 | member.mode, Vec::new()),
            _ => with(0o100_000 | member.mode, member.content.clone()),
        };
        if member.kind == b'5' && self.is_directory(&path) {
            let id = self.paths[&path];
            self.nodes[id] = node;
            self.own.insert(path);
            return Ok(());
        }
        self.clear(&path)?;
        self.set(path, node);
        Ok(())
    }
}

/// Returns the files that the layers have. With `whiteouts_first`, each layer's whiteouts are moved to its front.
fn model(case: &Case, whiteouts_first: bool) -> Step<Model> {
    let plain = case.form == Form::Files;
    let mut model = Model::new(plain);
    for layer in case.layers.iter().take(if plain { 1 } else { usize::MAX }) {
        model.own.clear();
        let mut members: Vec<&Member> = layer.members.iter().collect();
        if whiteouts_first {
            members.sort_by_key(|member| !member.is_whiteout());
        }
        for member in members {
            model.member(member)?;
        }
    }
    Ok(model)
}

/// Returns the files that the image must have if there are no patches.
fn wanted(case: &Case) -> Step<Model> {
    if !case.names_fit(case.form) {
        return Err(Refused);
    }
    let found = model(case, false)?;
    let members = || case.layers.iter().flat_map(|layer| &layer.members);
    let links = members().any(|member| matches!(member.kind, b'1' | b'2'));
    if case.form != Form::Files && !links {
        // Whiteouts hide files of layers below, wherever in the tar they are. (Not compared with links, which may lead
        // to files that are hidden.)
        let other = model(case, true).expect("what is accepted in one order");
        assert_eq!(other.tree(), found.tree(), "the model: whiteouts first");
    }
    Ok(found)
}

/// Runs `obdsetup convert FROM TO` with more arguments. If it fails, returns the exit code and the message.
fn convert(from: &Path, to: &Path, more: &[&str]) -> std::result::Result<(), (u8, String)> {
    let mut args: Vec<OsString> = vec!["obdsetup".into(), "convert".into(), from.into(), to.into()];
    args.extend(more.iter().map(OsString::from));
    obdsetup::run(args)
}

/// Returns the sorted names in a directory.
fn names(place: &Path) -> Vec<String> {
    let entries = fs::read_dir(place).expect("a directory");
    let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let mut names: Vec<String> = names.collect();
    names.sort();
    names
}

/// Returns the files in the directory `app` by name.
fn made(app: &Path) -> BTreeMap<String, Vec<u8>> {
    let names = names(app).into_iter();
    let files = names.map(|name| (name.clone(), fs::read(app.join(name)).expect("a file")));
    files.collect()
}

/// Returns the files in the file system of the layer `app`, or of the stack in the directory `app`.
fn files_of(app: &Path) -> erofs::Files {
    let mut layers: Vec<_> = (0..4)
        .map(|nth| app.join(format!("layer{nth}.obd")))
        .collect();
    layers.retain(|path| path.exists());
    if app.is_file() {
        layers = vec![app.to_owned()];
    }
    let layers = layers.iter();
    let layers = layers.map(|path| LayerReader::open(path, None).expect("a layer"));
    let stack = Stack::new(layers.collect()).expect("a stack");
    let mut disk = vec![0; usize::try_from(stack.size()).expect("a small disk")];
    stack
        .read_at(0, &mut disk)
        .expect("what was made can be read");
    erofs::read(&disk)
}

/// Compares the files of the result with the model.
fn compare(files: &erofs::Files, model: &Model) {
    let wanted: Vec<&String> = model.paths.keys().collect();
    assert_eq!(files.keys().collect::<Vec<_>>(), wanted, "paths");
    let mut inodes: BTreeMap<usize, u64> = BTreeMap::new();
    for (path, &id) in &model.paths {
        let (node, found) = (&model.nodes[id], &files[path]);
        assert_eq!(found.mode, node.mode, "{path}: mode");
        if node.mode & TYPE != DIRECTORY {
            assert_eq!(found.what, node.what, "{path}");
        }
        let mut xattrs = found.xattrs.clone();
        assert_eq!(xattrs.remove(XATTR), node.xattr, "{path}: xattr");
        assert!(xattrs.is_empty(), "{path}: {xattrs:?}");
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
    let mut tars = (0u8..).zip(&case.layers);
    if tars.any(|(nth, layer)| has_large_holes(&case.layer(nth, layer).0)) {
        return Ok(());
    }
    let root = tempfile::tempdir().expect("a directory");
    let place = root.path().join("a/b");
    fs::create_dir_all(&place).expect("a directory");
    let [image, app, pushed] = ["image", "app", "pushed"].map(|name| place.join(name));
    case.write(&image, case.form, case.order);
    let told: &[&str] = match case.form {
        Form::Files => &["--from", "tar", "--fs", "erofs", "--keep-whiteouts"],
        _ if case.others.told => &["--from", "oci", "--platform", "linux/amd64"],
        _ => &["--from", "oci"],
    };
    let (done, used) = memory(|| convert(&image, &app, told));
    assert!(used <= MAX_MEMORY, "{used} bytes");
    // Nothing else is written.
    let alone = |wanted: &[&str]| {
        assert_eq!(names(root.path()), ["a"]);
        assert_eq!(names(&root.path().join("a")), ["b"]);
        assert_eq!(names(&place), wanted);
    };
    let wanted = case.patches.is_empty().then(|| wanted(&case));
    let files = match &done {
        Err((code, message)) => {
            match &wanted {
                None => assert!(matches!(code, 1 | 3 | 4), "{code}: {message}"),
                Some(Err(Refused)) => assert_eq!(*code, 3, "{message}"),
                Some(Ok(_)) => panic!("{message}"),
            }
            assert!(!message.is_empty());
            alone(&["image"]);
            None
        }
        Ok(()) => {
            assert!(!matches!(wanted, Some(Err(Refused))), "not refused");
            alone(&["app", "image"]);
            Some(files_of(&app))
        }
    };
    if let (Some(files), Some(Ok(model))) = (&files, &wanted) {
        compare(files, model);
        let layers = (0..case.layers.len()).map(|nth| format!("layer{nth}.obd"));
        let others = ["config.v1.json", "image.json"].map(str::to_owned);
        if case.form != Form::Files {
            assert!(names(&app).into_iter().eq(others.into_iter().chain(layers)));
        }
    }
    match (case.second, case.other(), &files) {
        (Second::Registry, Some(_), Some(files))
            if !case.is_patched(level::CONFIG..level::COUNT) =>
        {
            // Not with a patched config: for a registry, `convert` reads more of it, which the patch may have damaged.
            let told = [told, &["--oci"]].concat();
            convert(&image, &pushed, &told).expect("for a registry, too");
            fs::remove_dir_all(&app).expect("it is ours");
            convert(&pushed, &app, &[]).expect("what was made is taken");
            assert_eq!(&files_of(&app), files);
        }
        (Second::Other, Some((form, order)), _) => {
            let before = done.map(|()| made(&app)).map_err(|(code, _)| code);
            for path in [&image, &app] {
                // `app` is missing if the image was refused.
                let _ = fs::remove_file(path).or_else(|_| fs::remove_dir_all(path));
            }
            case.write(&image, form, order);
            let done = convert(&image, &app, told);
            let after = done.map(|()| made(&app)).map_err(|(code, _)| code);
            assert!(before == after, "{form:?}: not the same");
        }
        _ => {}
    }
    Ok(())
}

/// Returns a member as an input has it: bits for the kind and more, then the components of path and target as indexes
/// of [`PARTS`].
fn seed_member(bits: u8, path: &[u8], target: &[u8]) -> Vec<u8> {
    let mut bytes = vec![bits, 0xf6, 7, b'x'];
    for path in [path, target].iter().filter(|path| !path.is_empty()) {
        bytes.push(path.len() as u8 - 1);
        bytes.extend(*path);
    }
    bytes
}

fn seeds() -> Vec<Vec<u8>> {
    let [file, directory, link, symlink]: [u8; 4] = [0, 1, 2, 3];
    let [pax, long, prefix, xattr]: [u8; 4] = [8, 16, 24, 32];
    // Indexes of `PARTS`.
    let [a, b, c, l, hide_a, opaque]: [u8; 6] = [0, 1, 2, 3, 5, 8];
    let member = seed_member;
    let lower = [
        member(directory | xattr, &[a], &[]),
        member(file | pax, &[a, b], &[]),
        member(file | prefix, &[a, c], &[]),
        member(link, &[b], &[a, b]),
        member(symlink | long, &[l], &[a]),
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
            member(file | xattr, &[a], &[]),
        ],
    ];
    let levels = [
        0,
        1,
        level::PACKED,
        level::CONFIG,
        level::MANIFEST,
        level::INDEX,
        level::FILES,
        level::ARCHIVE,
    ];
    let mut seeds = Vec::new();
    for (nth, upper) in (0u8..).zip(&uppers) {
        for form in 0..4 {
            let packing = (form + nth) % 3;
            // Combine each `Stored` but one with each `Second`.
            let how = ((nth + 1) << 1) | (((form + nth) % 3) << 3);
            let others = 5 * form + 20 * nth;
            let mut seed = vec![1, 0, form | (packing << 2), how, nth, others];
            for (packing, members) in [(0, &lower[..]), (packing, upper)] {
                seed.extend([packing, members.len() as u8, 1, a, l]);
                seed.extend(members.concat());
            }
            seeds.push(seed.clone());
            for level in levels {
                let mut seed = seed.clone();
                seed[1] = 1;
                seed[3] |= 1;
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
