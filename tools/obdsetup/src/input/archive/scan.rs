// SPDX-License-Identifier: GPL-2.0

//! Finds out what a tar or directory is by the names in it, and checks that a tar is complete.

use std::fs::DirEntry;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use anyhow::Result;

use super::{brief, Archive, Member, MemberKind};

/// Prefix of names in a layer of an image that hide files of the layers below.
const WHITEOUT: &[u8] = b".wh.";
/// Endings of the names of virtual machines' disks and descriptions.
const DISKS: [&[u8]; 8] = [
    b".img", b".qcow2", b".raw", b".vdi", b".vhd", b".vhdx", b".vmdk", b".vmx",
];

/// Returns whether a file with this name, in a layer of an image, hides files of the layers below.
pub(crate) fn is_whiteout(name: &[u8]) -> bool {
    name.starts_with(WHITEOUT)
}

/// An archive with another purpose than a tree of files, or a directory with the content of such an archive.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Package {
    /// The output of `docker save`.
    Docker,
    /// An OCI image layout.
    Oci,
    /// A virtual machine: an OVF description and its disks.
    Ova,
    /// A virtual machine of Xen: a description, and disks in pieces.
    Xva,
    /// A virtual machine for Vagrant: a description and its disks.
    Vagrant,
    /// A container, or a virtual machine, of LXD or Incus.
    Lxd,
    /// The description of a container or virtual machine of LXD or Incus, without its files.
    LxdMetadata,
    /// A backup of LXD or Incus.
    LxdBackup,
    /// One disk and no other file, except perhaps a `manifest.json`: the form in which clouds import disks.
    Disk,
}

impl Package {
    /// Returns the message that the archive `path` is not converted, with what to do.
    pub(crate) fn refusal(self, path: &Path) -> String {
        self.message(
            path,
            &format!("unpack it, `tar -xf {}`, then ", path.display()),
        ) + "; --from tar converts its files"
    }

    /// Returns the message that the directory `path` is not converted, with what to do.
    pub(crate) fn refusal_of_directory(self, path: &Path) -> String {
        self.message(path, "") + "; --from directory converts its files"
    }

    fn message(self, path: &Path, first: &str) -> String {
        let name = path.display();
        match self {
            // Used for directories only, because `convert` reads such archives.
            Self::Docker | Self::Oci => format!(
                "{name}: a container image (docker save) in a directory, no tree of files: make the archive again, \
                 `tar -C {name} -cf saved.tar .`, and convert that"
            ),
            Self::Ova => format!("{name}: a virtual machine (OVA), no tree of files: {first}convert its disk"),
            Self::Xva => format!(
                "{name}: a virtual machine of Xen (XVA), no tree of files: its disk is in pieces, of which `xva-img` \
                 makes a raw one"
            ),
            Self::Vagrant => format!(
                "{name}: a virtual machine for Vagrant (box), no tree of files: {first}convert its disk"
            ),
            Self::Lxd => format!(
                "{name}: an image of LXD or Incus, no tree of files: {first}convert what is in it, the directory rootfs \
                 or the disk rootfs.img"
            ),
            Self::LxdMetadata => format!(
                "{name}: the description of an image of LXD or Incus, without its files: those are in another file, \
                 with rootfs or disk in its name"
            ),
            Self::LxdBackup => format!(
                "{name}: a backup of LXD or Incus, no tree of files: {first}convert what is in it, the directory rootfs \
                 or the disk"
            ),
            Self::Disk => format!("{name}: a disk in an archive, no tree of files: {first}convert the disk"),
        }
    }
}

/// The findings about a tar or directory.
#[derive(Clone, Debug, Default)]
pub(crate) struct Findings {
    pub(crate) package: Option<Package>,
    /// The first whiteout of an image's layer.
    pub(crate) whiteout: Option<String>,
}

/// Collects findings, one member after the other.
#[derive(Default)]
pub(crate) struct Scan {
    findings: Findings,
    members: u64,
    /// Number of files. A `manifest.json` doesn't count: it may describe a disk that is the only other file.
    files: u64,
    manifest: bool,
    /// Whether there is a layer or a blob, which a manifest would name.
    layers: bool,
    layout: bool,
    index: bool,
    /// Whether an OVF description is in the root directory, and whether it is the first member.
    ovf: bool,
    ovf_first: bool,
    /// Whether a disk is in the root directory or in Hyper-V's directory for disks.
    disk: bool,
    metadata_json: bool,
    metadata_yaml: bool,
    /// Whether there is a directory `rootfs` or a file `rootfs.img`.
    rootfs: bool,
    /// Whether there is a file that is not part of [`Package::LxdMetadata`].
    others: bool,
    backup: bool,
    ova_xml: bool,
    pieces: bool,
}

impl Scan {
    /// Adds a member.
    pub(crate) fn see(&mut self, member: &Member) {
        if self.findings.whiteout.is_none() && is_whiteout(member.file_name()) {
            self.findings.whiteout = Some(brief(&member.path));
        }
        self.name(&member.path, matches!(member.kind, MemberKind::Directory));
    }

    /// Adds a name, which has no slash at its end.
    fn name(&mut self, path: &[u8], is_directory: bool) {
        self.members += 1;
        self.rootfs |= path == b"rootfs" && is_directory || path.starts_with(b"rootfs/");
        self.pieces |= path.starts_with(b"Ref:");
        if is_directory {
            return;
        }
        let is_top = !path.contains(&b'/');
        let tar = path.ends_with(b".tar") && path.iter().filter(|&&byte| byte == b'/').count() < 2;
        self.layers |= tar || path.starts_with(b"blobs/sha256/") || is_of_builder(path);
        self.ovf |= is_top && path.ends_with(b".ovf");
        self.ovf_first |= self.ovf && self.members == 1;
        let is_disk = DISKS.iter().any(|end| path.ends_with(end));
        self.disk |= is_disk && (is_top || path.starts_with(b"Virtual Hard Disks/"));
        self.others |= path != b"metadata.yaml" && !path.starts_with(b"templates/");
        match path {
            b"manifest.json" | b"repositories" => self.manifest = true,
            b"oci-layout" => self.layout = true,
            b"index.json" => self.index = true,
            b"metadata.json" => self.metadata_json = true,
            b"metadata.yaml" => self.metadata_yaml = true,
            b"rootfs.img" => self.rootfs = true,
            b"backup/index.yaml" => self.backup = true,
            b"ova.xml" => self.ova_xml = true,
            _ => {}
        }
        self.files += u64::from(path != b"manifest.json");
    }

    /// Returns the findings about all members.
    pub(crate) fn finish(self) -> Findings {
        let found = [
            (self.manifest && self.layers, Package::Docker),
            (self.layout && self.index, Package::Oci),
            (self.ova_xml && self.pieces, Package::Xva),
            // Checked before OVA, because boxes of VirtualBox also have an OVF description.
            (self.metadata_json && self.disk, Package::Vagrant),
            (self.ovf_first || self.ovf && self.disk, Package::Ova),
            (self.backup, Package::LxdBackup),
            (self.metadata_yaml && self.rootfs, Package::Lxd),
            (self.metadata_yaml && !self.others, Package::LxdMetadata),
            (self.disk && self.files == 1, Package::Disk),
        ];
        let package = found.into_iter().find(|(is_it, _)| *is_it);
        Findings {
            package: package.map(|(_, package)| package),
            ..self.findings
        }
    }
}

/// Returns whether `path` is the name of a layer, `<SHA-256>.tar.gz`, or of a configuration, `sha256:<SHA-256>`, as
/// tools that build images without docker write them beside a `manifest.json`.
fn is_of_builder(path: &[u8]) -> bool {
    let hex = path.strip_suffix(b".tar.gz");
    let hex = hex.or_else(|| path.strip_prefix(b"sha256:"));
    hex.is_some_and(|hex| hex.len() == 64 && hex.iter().all(u8::is_ascii_hexdigit))
}

/// Reads the tar at `path` to its end. Returns the findings.
///
/// # Errors
///
/// If the tar is damaged or cannot be read.
pub(crate) fn check(path: &Path) -> Result<Findings> {
    let mut archive = Archive::open(path)?;
    let mut scan = Scan::default();
    while let Some(member) = archive.next()? {
        scan.see(&member);
    }
    Ok(scan.finish())
}

/// Returns what the directory `root` is; `None` if it is an ordinary tree of files.
///
/// # Errors
///
/// If the directory cannot be read.
pub(crate) fn check_directory(root: &Path) -> Result<Option<Package>> {
    let mut scan = Scan::default();
    for (name, entry) in entries(root)? {
        let is_directory = entry.file_type()?.is_dir();
        scan.name(&name, is_directory);
        // The names that matter are at most one level down. If a directory there cannot be read, `convert` reports
        // this later.
        if let (true, Ok(below)) = (is_directory, entries(&entry.path())) {
            for (below, entry) in below {
                let is_directory = entry.file_type().is_ok_and(|kind| kind.is_dir());
                scan.name(&[name.as_slice(), b"/", &below].concat(), is_directory);
            }
        }
    }
    let package = scan.finish().package;
    // A directory with one disk is not refused: its files are to be converted, not the disk.
    Ok(package.filter(|package| *package != Package::Disk))
}

/// Returns the entries of a directory, sorted by name.
fn entries(path: &Path) -> std::io::Result<Vec<(Vec<u8>, DirEntry)>> {
    let entries = std::fs::read_dir(path)?.map(|entry| {
        let entry = entry?;
        Ok((entry.file_name().as_bytes().to_vec(), entry))
    });
    let mut entries = entries.collect::<std::io::Result<Vec<_>>>()?;
    entries.sort_by(|(one, _), (other, _)| one.cmp(other));
    Ok(entries)
}
