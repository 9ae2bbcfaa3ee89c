// SPDX-License-Identifier: GPL-2.0

//! Finds out from its names what kind of archive a tar is, and checks that it is complete.

use std::path::Path;

use anyhow::Result;

use super::{brief, Archive, Member, MemberKind};

/// Prefix of names in a layer of an image that hide files of the layers below.
const WHITEOUT: &[u8] = b".wh.";

/// An archive with another purpose than a tree of files.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Package {
    /// The output of `docker save`.
    Docker,
    /// An OCI image layout in a tar.
    Oci,
    /// A virtual machine: an OVF description and its disks.
    Ova,
}

impl Package {
    /// Returns the message that the virtual machine `path` is not converted, with what to do.
    pub(crate) fn refusal(path: &Path) -> String {
        let file = path.display();
        format!(
            "{file}: a virtual machine (OVA), no tree of files: unpack it, `tar -xf {file}`, then convert its \
             disk; --from tar takes it for files"
        )
    }
}

/// The findings about a tar.
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
    manifest: bool,
    /// Whether something is there that a manifest would name.
    layers: bool,
    layout: bool,
    index: bool,
}

impl Scan {
    /// Adds a member.
    pub(crate) fn see(&mut self, member: &Member) {
        self.members += 1;
        let path = member.path.as_slice();
        if self.findings.whiteout.is_none() && member.file_name().starts_with(WHITEOUT) {
            self.findings.whiteout = Some(brief(path));
        }
        if matches!(member.kind, MemberKind::Directory) {
            return;
        }
        let tar = path.ends_with(b".tar") && path.iter().filter(|&&byte| byte == b'/').count() < 2;
        self.layers |= tar || path.starts_with(b"blobs/sha256/") || is_of_builder(path);
        match path {
            b"manifest.json" | b"repositories" => self.manifest = true,
            b"oci-layout" => self.layout = true,
            b"index.json" => self.index = true,
            path if self.members == 1 && member.is_top_level() && path.ends_with(b".ovf") => {
                self.findings.package = Some(Package::Ova);
            }
            _ => {}
        }
    }

    /// Returns the findings about all members.
    pub(crate) fn finish(self) -> Findings {
        let mut findings = self.findings;
        if self.manifest && self.layers {
            findings.package = Some(Package::Docker);
        } else if self.layout && self.index {
            findings.package = Some(Package::Oci);
        }
        findings
    }
}

/// Whether it has the name of a layer or description as tools that build images without docker write them
/// beside a `manifest.json`: `<SHA-256>.tar.gz`, and `sha256:<SHA-256>`.
fn is_of_builder(path: &[u8]) -> bool {
    let hex = path.strip_suffix(b".tar.gz");
    let hex = hex.or_else(|| path.strip_prefix(b"sha256:"));
    hex.is_some_and(|hex| hex.len() == 64 && hex.iter().all(u8::is_ascii_hexdigit))
}

/// Reads the tar at `path` to its end. Returns the findings.
///
/// # Errors
///
/// If it is damaged, and read errors.
pub(crate) fn check(path: &Path) -> Result<Findings> {
    let mut archive = Archive::open(path)?;
    let mut scan = Scan::default();
    while let Some(member) = archive.next()? {
        scan.see(&member);
    }
    Ok(scan.finish())
}
