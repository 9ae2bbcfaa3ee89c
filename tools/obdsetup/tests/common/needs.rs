// SPDX-License-Identifier: GPL-2.0

//! Requirements of tests that may be missing.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use rustix::fs::{IFlags, XattrFlags};
use tempfile::TempDir;

/// Why a test cannot run here; `None` if it can.
pub(crate) type Need = Option<String>;

/// Returns the path of a program; `None` if it is missing. As obdsetup does, looks in `PATH`, `/usr/sbin` and
/// `/sbin`.
pub(crate) fn find(program: &str) -> Option<PathBuf> {
    let path = std::env::var("PATH").unwrap_or_default();
    format!("{path}:/usr/sbin:/sbin")
        .split(':')
        .map(|dir| Path::new(dir).join(program))
        .find(|file| file.is_file())
}

/// Requires that a program is installed.
pub(crate) fn program(name: &str) -> Need {
    find(name).is_none().then(|| format!("no {name}"))
}

/// Requires at least version `needed` of a program that prints its version with `arg`. If no version is found
/// in its output, the requirement counts as met.
fn version(name: &str, arg: &str, needed: (u32, u32)) -> Need {
    let Some(file) = find(name) else {
        return program(name);
    };
    let output = Command::new(file).arg(arg).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let mut words = text.split_whitespace();
    let found = words.find_map(|word| {
        let (major, rest) = word.split_once('.')?;
        let digits = |text: &str| {
            text.split(|c: char| !c.is_ascii_digit())
                .next()?
                .parse()
                .ok()
        };
        Some((digits(major)?, digits(rest)?))
    });
    let (major, minor) = needed;
    (found? < needed).then(|| format!("{name} is older than {major}.{minor}"))
}

/// Requires a mksquashfs that obdsetup can use.
pub(crate) fn mksquashfs() -> Need {
    version("mksquashfs", "-version", (4, 6))
}

/// Requires a mkfs.erofs that obdsetup can use.
pub(crate) fn mkfs_erofs() -> Need {
    version("mkfs.erofs", "--version", (1, 8))
}

/// Requires the programs for ext2, ext3 and ext4.
pub(crate) fn e2fsprogs() -> Need {
    program("mkfs.ext4").or_else(|| program("debugfs"))
}

/// Requires that the test is run by root.
pub(crate) fn root() -> Need {
    let is_root = rustix::process::geteuid().is_root();
    (!is_root).then(|| "for root only".to_owned())
}

/// Requires that the test is not run by root.
pub(crate) fn ordinary_user() -> Need {
    let is_root = rustix::process::geteuid().is_root();
    is_root.then(|| "not for root".to_owned())
}

/// Requires root, and that device nodes can be made. In some containers, not even root can make them.
pub(crate) fn device_nodes() -> Need {
    root().or_else(|| {
        let place = TempDir::new().unwrap();
        let made = Command::new("mknod")
            .arg(place.path().join("null"))
            .args(["c", "1", "3"])
            .stderr(Stdio::null())
            .status();
        let made = made.is_ok_and(|status| status.success());
        (!made).then(|| "device nodes cannot be made".to_owned())
    })
}

/// Requires extended attributes and access control lists in the directory for temporary files.
pub(crate) fn xattrs() -> Need {
    let place = TempDir::new().unwrap();
    let flags = XattrFlags::empty();
    let set = rustix::fs::setxattr(place.path(), "user.a", b"b", flags);
    let set = set.and_then(|()| rustix::fs::setxattr(place.path(), ACL, &acl(1234), flags));
    let error = set.err()?;
    Some(format!(
        "no extended attributes for temporary files: {error}"
    ))
}

/// Sets flags of a file or directory, in addition to those that it has.
pub(crate) fn set_flags(path: &Path, flags: IFlags) -> std::io::Result<()> {
    let file = std::fs::File::open(path)?;
    let before = rustix::fs::ioctl_getflags(&file)?;
    Ok(rustix::fs::ioctl_setflags(&file, before | flags)?)
}

/// Requires flags of chattr(1) in the directory for temporary files.
pub(crate) fn flags() -> Need {
    let place = TempDir::new().unwrap();
    let error = set_flags(place.path(), IFlags::NODUMP | IFlags::NOATIME).err()?;
    Some(format!("no flags for temporary files: {error}"))
}

/// Requires root, and a mount namespace in which a tmpfs can be mounted.
pub(crate) fn mounts() -> Need {
    root().or_else(|| {
        let place = TempDir::new().unwrap();
        let done = Command::new("unshare")
            .args(["--mount", "mount", "-t", "tmpfs", "none"])
            .arg(place.path())
            .stderr(Stdio::null())
            .status();
        let done = done.is_ok_and(|status| status.success());
        (!done).then(|| "nothing can be mounted".to_owned())
    })
}

/// Requires root, and a UTS namespace in which the host name can be changed.
pub(crate) fn other_host() -> Need {
    root().or_else(|| {
        let command = "hostname elsewhere 2>/dev/null || echo elsewhere >/proc/sys/kernel/hostname";
        let done = Command::new("unshare")
            .args(["--uts", "sh", "-c", command])
            .stderr(Stdio::null())
            .status();
        let done = done.is_ok_and(|status| status.success());
        (!done).then(|| "the host can have no other name".to_owned())
    })
}

/// The extended attribute that holds the access control list of a file.
pub(crate) const ACL: &str = "system.posix_acl_access";

/// Returns an access control list in the kernel's format, in which user `uid` may read.
pub(crate) fn acl(uid: u32) -> Vec<u8> {
    let entry = |tag: u16, permissions: u16, id: u32| {
        let (tag, permissions) = (tag.to_le_bytes(), permissions.to_le_bytes());
        [tag.as_slice(), &permissions, &id.to_le_bytes()].concat()
    };
    [
        vec![2, 0, 0, 0],
        entry(0x01, 6, u32::MAX),
        entry(0x02, 4, uid),
        entry(0x04, 0, u32::MAX),
        entry(0x10, 4, u32::MAX),
        entry(0x20, 0, u32::MAX),
    ]
    .concat()
}

/// A locale that sorts and changes case in other ways than C.
pub(crate) struct Locale {
    /// The environment variables that choose the locale.
    pub(crate) env: Vec<(String, String)>,
    /// The directory with the locale if it was compiled for the test.
    _made: Option<TempDir>,
}

/// Returns an installed locale, or one compiled from installed sources; or the reason why there is none.
pub(crate) fn locale() -> Result<Locale, String> {
    let installed = Command::new("locale").arg("-a").output();
    let installed = installed.map(|output| String::from_utf8_lossy(&output.stdout).into_owned());
    let names = installed.unwrap_or_default();
    let plain = |name: &&str| !["C", "POSIX"].contains(name) && !name.starts_with("C.");
    if let Some(name) = names.lines().find(plain) {
        return Ok(Locale {
            env: vec![("LC_ALL".to_owned(), name.to_owned())],
            _made: None,
        });
    }
    let place = TempDir::new().unwrap();
    let made = Command::new("localedef")
        .args(["-i", "tr_TR", "-f", "UTF-8"])
        .arg(place.path().join("tr_TR.UTF-8"))
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status();
    match made.is_ok_and(|status| status.success()) {
        true => Ok(Locale {
            env: vec![
                ("LC_ALL".to_owned(), "tr_TR.UTF-8".to_owned()),
                ("LOCPATH".to_owned(), place.path().display().to_string()),
            ],
            _made: Some(place),
        }),
        false => Err("no locale but C, and no sources of others".to_owned()),
    }
}

/// Returns a temporary directory in which a file can have an extended attribute of 64 KiB, the largest that the
/// kernel allows; `None` if there is no such file system.
pub(crate) fn with_large_xattrs() -> Option<TempDir> {
    let places = [std::env::temp_dir(), "/dev/shm".into()];
    let dirs = places
        .iter()
        .filter_map(|place| TempDir::new_in(place).ok());
    dirs.into_iter().find(|dir| {
        let value = vec![b'x'; 65_536];
        rustix::fs::setxattr(dir.path(), "user.a", &value, XattrFlags::empty())
            .and_then(|()| rustix::fs::removexattr(dir.path(), "user.a"))
            .is_ok()
    })
}

pub(crate) fn large_xattrs() -> Need {
    let cause = "no file system for temporary files holds attributes of 64 KiB";
    with_large_xattrs().is_none().then(|| cause.to_owned())
}
