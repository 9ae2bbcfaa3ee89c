// SPDX-License-Identifier: GPL-2.0

//! Reads `/etc/overlaybdtab`: a table of stacks to set up at boot, with their names.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::devices::dm::plan::check_name;
use crate::terminal::exit::Failure;

/// The path of the table.
const PATH: &str = "/etc/overlaybdtab";
/// The environment variable that can name another table.
pub(crate) const VARIABLE: &str = "OVERLAYBDTAB";

/// A line.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Entry {
    pub(crate) name: String,
    /// Layers in the form of the command line, lowest first.
    pub(crate) layers: Vec<OsString>,
    pub(crate) noauto: bool,
    pub(crate) nofail: bool,
    pub(crate) initrd: bool,
    /// The other options: options of `open` without the dashes.
    pub(crate) options: Vec<OsString>,
}

/// Returns the path of the table.
pub(crate) fn path() -> PathBuf {
    std::env::var_os(VARIABLE).map_or_else(|| PATH.into(), PathBuf::from)
}

/// Parses the lines of the table at `path`. Returns an entry or an error for each line that is neither empty nor a
/// comment; no entries if there is no table.
pub(crate) fn read(path: &Path) -> Result<Vec<Result<Entry>>> {
    let text = match std::fs::read(path) {
        Ok(text) => text,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Vec::new(),
        Err(error) => {
            return Err(error).with_context(|| format!("{}: cannot read", path.display()))
        }
    };
    let lines = text.split(|&byte| byte == b'\n').zip(1..);
    let entries =
        lines.filter_map(|(line, number)| {
            let entry = Entry::parse(line).transpose()?;
            Some(entry.map_err(|what| {
                Failure::usage(format!("{}: line {number}: {what:#}", path.display()))
            }))
        });
    Ok(entries.collect())
}

/// Returns the line for `name`.
pub(crate) fn find(path: &Path, name: &str) -> Result<Entry> {
    let mut wrong = None;
    for entry in read(path)? {
        match entry {
            Ok(entry) if entry.name == name => return Ok(entry),
            Ok(_) => {}
            Err(error) => wrong = wrong.or(Some(error)),
        }
    }
    // If a line cannot be parsed, report that: it may be the one for `name`.
    Err(wrong.unwrap_or_else(|| {
        Failure::usage(format!(
            "no LAYER given, and {} has no `{name}'",
            path.display()
        ))
    }))
}

impl Entry {
    /// Parses a line. Returns `None` for an empty line or a comment.
    fn parse(line: &[u8]) -> Result<Option<Self>> {
        let fields: Vec<&[u8]> = line
            .split(u8::is_ascii_whitespace)
            .filter(|field| !field.is_empty())
            .collect();
        let (name, layers, options) = match fields[..] {
            [] => return Ok(None),
            [first, ..] if first.starts_with(b"#") => return Ok(None),
            [name, layers] => (name, layers, &b""[..]),
            [name, layers, options] => (name, layers, options),
            _ => {
                let found = fields.len();
                return Err(Failure::usage(format!(
                    "expected 2 or 3 fields (name, layers and perhaps options), found {found}"
                )));
            }
        };
        let mut entry = Self {
            name: String::from_utf8_lossy(name).into_owned(),
            ..Self::default()
        };
        check_name(&entry.name)?;
        for layer in layers.split(|&byte| byte == b',') {
            let layer = unescape(layer);
            if !layer.as_bytes().starts_with(b"/") {
                let layer = layer.to_string_lossy();
                return Err(Failure::usage(format!(
                    "layer `{layer}': expected an absolute name"
                )));
            }
            entry.layers.push(layer);
        }
        for option in options.split(|&byte| byte == b',') {
            match option {
                b"" | b"-" | b"none" | b"defaults" | b"auto" | b"fail" => {}
                b"noauto" => entry.noauto = true,
                b"nofail" => entry.nofail = true,
                b"x-initrd.attach" => entry.initrd = true,
                b"_netdev" => {
                    return Err(Failure::usage(
                        "option `_netdev': give `noauto' here and `_netdev' in /etc/fstab",
                    ))
                }
                option if option.starts_with(b"x-") => {}
                option => {
                    entry.options.push(unescape(option));
                    if entry.store().is_some_and(|store| !store.starts_with("/")) {
                        return Err(Failure::usage(
                            "option `writable=': expected an absolute name",
                        ));
                    }
                }
            }
        }
        if entry.initrd && entry.store().is_some_and(|store| !is_device(store)) {
            return Err(Failure::usage(
                "option `writable=': in the initramfs, the store must be a block device",
            ));
        }
        Ok(Some(entry))
    }

    /// Returns the store of changes, if the stack has one.
    pub(crate) fn store(&self) -> Option<&Path> {
        let mut options = self.options.iter();
        let store = options.find_map(|option| option.as_bytes().strip_prefix(b"writable="));
        store.map(|store| Path::new(OsStr::from_bytes(store)))
    }

    /// Returns whether the partitions of the disk get devices.
    pub(crate) fn has_partitions(&self) -> bool {
        self.options.iter().any(|option| option == "partitions")
    }

    /// Returns the line as arguments of `open`. The first is the name of the command, as in `argv`.
    pub(crate) fn arguments(&self) -> Vec<OsString> {
        let mut arguments = vec!["open".into()];
        for option in &self.options {
            let mut argument = OsString::from("--");
            argument.push(option);
            arguments.push(argument);
        }
        arguments.extend(["--".into(), self.name.clone().into()]);
        arguments.extend(self.layers.iter().cloned());
        arguments
    }
}

/// Returns whether a path is the path of a device. `/dev/shm` has files.
pub(crate) fn is_device(path: &Path) -> bool {
    path.starts_with("/dev") && !path.starts_with("/dev/shm")
}

/// Unescapes a field: `\` and three octal digits stand for a byte, as in fstab(5).
fn unescape(field: &[u8]) -> OsString {
    let mut bytes = Vec::new();
    let mut rest = field;
    while let [first, after @ ..] = rest {
        let code = after.get(..3).filter(|_| *first == b'\\');
        match code.and_then(octal) {
            Some(byte) => {
                bytes.push(byte);
                rest = after.get(3..).unwrap_or_default();
            }
            None => {
                bytes.push(*first);
                rest = after;
            }
        }
    }
    OsString::from_vec(bytes)
}

/// Returns the byte that three octal digits stand for.
fn octal(digits: &[u8]) -> Option<u8> {
    // from_str_radix() would accept a sign.
    let digits = digits.iter().all(u8::is_ascii_digit).then_some(digits)?;
    u8::from_str_radix(OsStr::from_bytes(digits).to_str()?, 8).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Result<Option<Entry>> {
        Entry::parse(line.as_bytes())
    }

    #[test]
    fn lines() -> Result<()> {
        assert_eq!(parse("")?, None);
        assert_eq!(parse(" \t # app /a")?, None);
        let entry = parse("app\t /srv/a.obd,/dev/vdb:4096 ")?.unwrap_or_default();
        assert_eq!(entry.name, "app");
        assert_eq!(entry.layers, ["/srv/a.obd", "/dev/vdb:4096"]);
        assert!(!entry.noauto && !entry.nofail && !entry.initrd && entry.options.is_empty());
        let line = r"app /a\040b\054c nofail,noauto,x-initrd.attach,x-more,buffered,zfile-opt=cache_blocks\04064";
        let entry = parse(line)?.unwrap_or_default();
        assert_eq!(entry.layers, ["/a b,c"]);
        assert!(entry.noauto && entry.nofail && entry.initrd);
        assert_eq!(
            entry.arguments(),
            [
                "open",
                "--buffered",
                "--zfile-opt=cache_blocks 64",
                "--",
                "app",
                "/a b,c"
            ]
        );
        assert_eq!(entry.store(), None);
        let entry = parse(r"app /a buffered,writable=/b\040c")?.unwrap_or_default();
        assert_eq!(entry.store(), Some(Path::new("/b c")));
        assert!(parse("app /a writable=b").is_err());
        // A store in the initramfs would be lost with it.
        assert!(parse("app /a x-initrd.attach,writable=/b").is_err());
        assert!(parse("app /a writable=/dev/shm/b,x-initrd.attach").is_err());
        assert!(parse("app /a x-initrd.attach,writable=/dev/vdb").is_ok());
        Ok(())
    }

    #[test]
    fn wrong_lines() {
        for (line, said) in [
            (
                "app",
                "expected 2 or 3 fields (name, layers and perhaps options), found 1",
            ),
            (
                "app /a - more",
                "expected 2 or 3 fields (name, layers and perhaps options), found 4",
            ),
            ("a/b /a", "name `a/b'"),
            ("-a /a", "name `-a'"),
            ("app a.obd", "layer `a.obd': expected an absolute name"),
            ("app /a,,/b", "layer `'"),
            ("app /a _netdev", "option `_netdev'"),
        ] {
            let error = parse(line).map_err(|error| error.to_string());
            let error = error.err().unwrap_or_default().replace('`', "'");
            assert!(error.contains(&said.replace('`', "'")), "{line}: {error}");
        }
    }

    #[test]
    fn escapes() {
        assert_eq!(unescape(br"\040\134\\0401\9"), r" \\ 1\9");
        assert_eq!(unescape(br"\777\+12\"), r"\777\+12\");
    }
}
