// SPDX-License-Identifier: GPL-2.0

//! Handles what a file system, or obdsetup itself, cannot store. A loss of data is an error unless the
//! user allows it. Other losses, such as of precision, flags or sockets, are warnings. Every loss is
//! reported, except that of flags about how a file system stores a file: see [`FLAGS`].

use std::collections::BTreeMap;

use anyhow::Result;
use rustix::fs::IFlags;

use super::tree::{show, Id, Kind, Meta, Time, Tree, Unread, ROOT};
use super::{FileSystem, Options};
use crate::terminal::exit::Failure;
use crate::terminal::warn;

/// Prefix of the names of POSIX ACLs.
const ACL: &[u8] = b"system.posix_acl_";
/// Prefixes of the extended attributes that every [`FileSystem`] can store.
const KINDS: [&[u8]; 3] = [b"user.", b"trusted.", b"security."];

/// Flags of chattr(1) that change what programs see of a file, what they may do with it, or when its data is on
/// disk, with their names in chattr(1). All other flags but encryption are about how a file system stores a file,
/// and their loss is not reported.
const FLAGS: [(IFlags, &str); 9] = [
    (IFlags::IMMUTABLE, "immutable"),
    (IFlags::APPEND, "append only"),
    (IFlags::NODUMP, "no dump"),
    (IFlags::NOATIME, "no atime updates"),
    (IFlags::SYNC, "synchronous updates"),
    (IFlags::DIRSYNC, "synchronous directory updates"),
    (IFlags::JOURNALING, "data journaling"),
    // FS_CASEFOLD_FL and FS_VERITY_FL.
    (
        IFlags::from_bits_retain(0x4000_0000),
        "case-insensitive names",
    ),
    (IFlags::from_bits_retain(0x0010_0000), "verity"),
];
/// FS_ENCRYPT_FL.
const ENCRYPTED: IFlags = IFlags::from_bits_retain(0x0800);

/// In a tar, mksquashfs and mkfs.erofs misread this minor number, and all larger ones, as negative numbers.
const MINORS: u32 = 1 << 19;

/// The kinds of losses, in the order of the messages.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Loss {
    Acl,
    AclNames,
    NfsAcl,
    Xattr,
    XattrName,
    XattrEmpty,
    Properties,
    Devices,
    Sockets,
    Fraction,
    Range,
    Flags,
    Encryption,
}

impl Loss {
    /// Returns the first part of the message: what is lost. `flags` are the flags that files have.
    fn what(self, fs: FileSystem, flags: IFlags) -> String {
        let what = match self {
            Self::Flags => {
                let names = FLAGS.iter().filter(|(flag, _)| flags.contains(*flag));
                let names: Vec<&str> = names.map(|(_, name)| *name).collect();
                return format!("flags are not kept, see chattr(1) ({})", names.join(", "));
            }
            Self::Encryption => return "encryption is not kept".to_owned(),
            Self::Acl => "POSIX ACLs".to_owned(),
            Self::AclNames => {
                return "POSIX ACLs with names of users or groups are not kept (`tar --numeric-owner` stores \
                        numbers)"
                    .to_owned()
            }
            Self::NfsAcl => return "ACLs of NFS are not kept".to_owned(),
            Self::Xattr => "extended attributes other than user, trusted and security".to_owned(),
            Self::XattrName => "extended attributes with \"=\" in the name".to_owned(),
            Self::XattrEmpty => "empty extended attributes of the root directory".to_owned(),
            Self::Properties => "properties of a btrfs".to_owned(),
            Self::Devices => format!("devices with a minor number of {MINORS} or more"),
            Self::Sockets => "sockets".to_owned(),
            Self::Fraction => "fractions of a second in times".to_owned(),
            Self::Range => match fs {
                FileSystem::Squashfs => "times before 1970 or after 2106-02-07".to_owned(),
                _ => "times before 1901-12-13 or after 2446-05-10".to_owned(),
            },
        };
        // The file system could hold these, but mkfs gets its files from a tar.
        let made = match self {
            Self::XattrName | Self::XattrEmpty | Self::Devices | Self::Sockets => {
                " made from a tar"
            }
            _ => "",
        };
        format!("{}{made} cannot hold {what}", fs.name())
    }

    /// Returns what happens to the files.
    fn becomes(self) -> &'static str {
        match self {
            Self::Devices | Self::Sockets => "left out",
            Self::Fraction => ROUNDED,
            Self::Range => CHANGED,
            Self::Encryption => "readable by all who have the layer",
            _ => "stored without them",
        }
    }

    /// Returns whether the loss needs the user's permission.
    fn is_data(self) -> bool {
        matches!(
            self,
            Self::Acl
                | Self::AclNames
                | Self::NfsAcl
                | Self::Xattr
                | Self::XattrName
                | Self::XattrEmpty
                | Self::Devices
        )
    }
}

/// The files with a loss: their number, and the paths of the first [`NAMED`] of them.
#[derive(Default)]
pub(super) struct Places {
    count: u64,
    first: Vec<String>,
}

impl Places {
    /// Adds the file `path`.
    pub(super) fn add(&mut self, path: &[u8]) {
        self.count += 1;
        if self.first.len() < NAMED {
            self.first.push(show(path));
        }
    }

    /// Returns the number of files, what happens to them, and the first paths. Returns `None` if there are no files.
    pub(super) fn text(&self, becomes: &str) -> Option<String> {
        let plural = if self.count == 1 { "file" } else { "files" };
        let more = match usize::try_from(self.count) {
            Ok(count) if count <= NAMED => "",
            _ => " ...",
        };
        let (count, first) = (self.count, self.first.join(" "));
        (count > 0).then(|| format!("{count} {plural} {becomes}: {first}{more}"))
    }
}

/// What happens to files with fractions of a second in times, and with times that the file system cannot hold.
pub(super) const ROUNDED: &str = "rounded down";
pub(super) const CHANGED: &str = "changed to the nearest time possible";
/// Largest number of paths in a message.
const NAMED: usize = 3;

/// Removes from `tree` what the file system cannot hold, and warns about it. Returns an error if data
/// would be lost, unless the options allow that. The error ends with `instead`, which tells the user
/// what to do.
pub(super) fn fit(tree: &mut Tree, options: &Options<'_>, instead: &str) -> Result<()> {
    let (fs, allow) = (options.fs, options.allow_loss);
    // mksquashfs reads the files from a tar, and so does mkfs.erofs. Without arguments, obdsetup
    // writes the erofs itself.
    let through_tar = match fs {
        FileSystem::Erofs => !options.args.is_empty(),
        fs => fs == FileSystem::Squashfs,
    };
    let mut lost: BTreeMap<Loss, Places> = BTreeMap::new();
    let mut flags = IFlags::empty();
    let mut note = |loss: Loss, path: &[u8]| lost.entry(loss).or_default().add(path);
    let root = &mut tree.node_mut(ROOT)?.meta;
    flags |= flags_of(root);
    fit_meta(root, fs, through_tar, |loss| note(loss, b""));
    // mksquashfs gets the root directory's attributes on its command line. There, an empty value is an
    // error.
    let count = root.xattrs.len();
    root.xattrs
        .retain(|_, value| fs != FileSystem::Squashfs || !value.is_empty());
    if root.xattrs.len() < count {
        note(Loss::XattrEmpty, b"");
    }
    let mut left_out: Vec<(Id, Vec<u8>)> = Vec::new();
    let names = tree.names();
    for name in names.iter() {
        let node = tree.node_mut(name.id)?;
        let loss = match node.kind {
            Kind::Socket if through_tar => Some(Loss::Sockets),
            Kind::CharDevice(device) | Kind::BlockDevice(device)
                if through_tar && device.minor >= MINORS =>
            {
                Some(Loss::Devices)
            }
            _ => None,
        };
        if let Some(loss) = loss {
            note(loss, &names.path(name));
            left_out.push((name.parent, name.last().to_vec()));
        } else if name.first {
            // Once for each file, however many hard links it has.
            flags |= flags_of(&node.meta);
            fit_meta(&mut node.meta, fs, through_tar, |loss| {
                note(loss, &names.path(name));
            });
        }
    }
    for (parent, name) in left_out {
        tree.unlink(parent, &name)?;
    }
    let mut refused = Vec::new();
    for (loss, places) in lost {
        let files = places.text(loss.becomes()).unwrap_or_default();
        let text = format!("{}: {files}", loss.what(fs, flags));
        match loss.is_data() && !allow {
            true => refused.push(text),
            false => warn(&[text]),
        }
    }
    if refused.is_empty() {
        return Ok(());
    }
    Err(Failure::usage(format!("{}: {instead}", refused.join("; "))))
}

/// Returns the flags of a file.
fn flags_of(meta: &Meta) -> IFlags {
    let flags = meta.unread.iter().map(|unread| match unread {
        Unread::Flags(flags) => *flags,
        _ => IFlags::empty(),
    });
    flags.fold(IFlags::empty(), |all, flags| all | flags)
}

/// Removes from `meta` what `fs` cannot hold. Calls `note` once for each kind of loss.
fn fit_meta(meta: &mut Meta, fs: FileSystem, through_tar: bool, mut note: impl FnMut(Loss)) {
    let mut noted = Vec::new();
    for unread in std::mem::take(&mut meta.unread) {
        match unread {
            Unread::AclNames => noted.push(Loss::AclNames),
            Unread::NfsAcl => noted.push(Loss::NfsAcl),
            Unread::Flags(flags) => {
                let lost = FLAGS.iter().any(|(flag, _)| flags.contains(*flag));
                noted.extend(lost.then_some(Loss::Flags));
                noted.extend(flags.contains(ENCRYPTED).then_some(Loss::Encryption));
            }
        }
    }
    meta.xattrs.retain(|name, _| {
        let loss = match () {
            () if name.starts_with(ACL) => (fs == FileSystem::Squashfs).then_some(Loss::Acl),
            () if name.starts_with(b"btrfs.") => {
                (fs != FileSystem::Btrfs).then_some(Loss::Properties)
            }
            () if !KINDS.iter().any(|kind| name.starts_with(kind)) => Some(Loss::Xattr),
            // mkfs reads the attribute from a tar, in which `=` ends the name.
            () if through_tar && name.contains(&b'=') => Some(Loss::XattrName),
            () => None,
        };
        noted.extend(loss);
        loss.is_none()
    });
    let time = &mut meta.mtime;
    let (first, last) = match fs {
        FileSystem::Ext2 | FileSystem::Ext3 | FileSystem::Ext4 => {
            (i64::from(i32::MIN), (1 << 34) + i64::from(i32::MIN) - 1)
        }
        FileSystem::Squashfs => (0, i64::from(u32::MAX)),
        FileSystem::Btrfs | FileSystem::Erofs => (i64::MIN, i64::MAX),
    };
    let kept = time.seconds.clamp(first, last);
    if kept != time.seconds {
        noted.push(Loss::Range);
        *time = Time {
            seconds: kept,
            nanoseconds: 0,
        };
    } else if fs == FileSystem::Squashfs && time.nanoseconds != 0 {
        noted.push(Loss::Fraction);
        time.nanoseconds = 0;
    }
    noted.sort_unstable();
    noted.dedup();
    noted.into_iter().for_each(&mut note);
}
