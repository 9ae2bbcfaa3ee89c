// SPDX-License-Identifier: GPL-2.0

//! Finds programs, and sets their environment.
//!
//! The user's environment could change what a program does: `TAR_OPTIONS`, `MKE2FS_CONFIG`, `GZIP`,
//! `ZSTD_CLEVEL`, `SOURCE_DATE_EPOCH`. A program gets only the variables that are named here, and
//! those that the caller sets for it.

use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};

use rustix::fs::Access;

/// Directories that are searched after those of the user's `PATH`. The `PATH` of ordinary users on
/// Debian, and that of cron, lacks some of these.
const DIRECTORIES: [&str; 6] = [
    "/usr/local/sbin",
    "/usr/local/bin",
    "/usr/sbin",
    "/usr/bin",
    "/sbin",
    "/bin",
];

/// Variables that are passed on. `TMPDIR` is the user's choice of a place for large files. The
/// others are for the dynamic linker and fakeroot(1): this process runs with them, too.
const PASSED_ON: [&str; 4] = ["TMPDIR", "LD_PRELOAD", "LD_LIBRARY_PATH", "FAKEROOTKEY"];

/// Returns the environment that every program gets.
pub(super) fn passed_on() -> Vec<(&'static str, OsString)> {
    let mut all: Vec<_> = PASSED_ON
        .into_iter()
        .filter_map(|name| Some((name, std::env::var_os(name)?)))
        .collect();
    all.push(("LC_ALL", OsString::from("C")));
    if let Ok(path) = std::env::join_paths(directories(std::env::var_os("PATH").as_deref())) {
        all.push(("PATH", path));
    }
    all
}

/// Returns the path of the program `name`, which is an absolute path, or a name to search for.
pub(super) fn find(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH");
    directories(path.as_deref())
        .into_iter()
        .map(|directory| directory.join(name))
        .find(|file| is_program(file))
}

/// Returns the absolute directories of `path`, then [`DIRECTORIES`]. Relative directories are left
/// out, because they depend on the current directory.
fn directories(path: Option<&OsStr>) -> Vec<PathBuf> {
    let mut all: Vec<PathBuf> = Vec::new();
    let users = path.map(std::env::split_paths).into_iter().flatten();
    for directory in users.chain(DIRECTORIES.iter().map(PathBuf::from)) {
        if directory.is_absolute() && !all.contains(&directory) {
            all.push(directory);
        }
    }
    all
}

fn is_program(file: &Path) -> bool {
    file.is_file() && rustix::fs::access(file, Access::EXEC_OK).is_ok()
}

#[cfg(test)]
mod tests {
    use super::{directories, find};
    use std::ffi::OsStr;
    use std::path::Path;

    #[test]
    fn where_programs_are() {
        let all = directories(Some(OsStr::new("/opt/x:.::bin:/usr/sbin")));
        assert_eq!(all.first().map(|d| d.as_path()), Some(Path::new("/opt/x")));
        assert_eq!(all.iter().filter(|d| d.ends_with("usr/sbin")).count(), 1);
        assert!(all.iter().all(|d| d.is_absolute()));
        assert!(directories(None).contains(&"/sbin".into()));
        assert_eq!(find("/bin/sh").as_deref(), Some(Path::new("/bin/sh")));
        assert!(find("no-such-program").is_none());
        // A directory is no program.
        assert!(find("/bin").is_none());
    }
}
