// SPDX-License-Identifier: GPL-2.0

//! `systemd-overlaybdsetup-generator`: makes units for the stacks in `/etc/overlaybdtab`, similar to those of
//! systemd-veritysetup-generator(8). The generator is a link to obdsetup, which looks at the name with which
//! it was started.

use std::ffi::{OsStr, OsString};
use std::fmt::Write as _;
use std::fs::{self, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::symlink;
use std::path::{Component, Path, PathBuf};

use anyhow::{Context, Result};

use crate::cmd::open;
use crate::devices::tab::{self, Entry};
use crate::input::layer_name::LayerArg;
use crate::terminal::exit::Failure;

/// Time limit in seconds for an `open` at boot or a `close`. It is longer than obdsetup waits for another
/// obdsetup and for udev. Without a limit, systemd would wait for a oneshot for ever. After the limit,
/// systemd sends the first signal only to obdsetup, not to its dmsetup, because obdsetup needs dmsetup to
/// remove what it has set up.
const TIMEOUT: u32 = 300;

/// Number of partitions for which a disk's unit has dependencies: mounting one of them starts the unit, and
/// all are unmounted before the unit stops. The actual partitions are known only when the disk is open. Images
/// of machines have few.
const PARTITIONS: u32 = 16;

/// The name under which systemd starts this program.
pub(crate) const NAME: &str = "systemd-overlaybdsetup-generator";

/// Makes the units for overlaybdtab in the first of the directories `args`. Returns whether this succeeded for
/// all lines. Prints the errors.
pub(crate) fn run(args: &[OsString]) -> bool {
    // If systemd has started this, no one reads standard error, so errors also go to the kernel log. Tests
    // and users set the variable, to use another table.
    let by_systemd = std::env::var_os(tab::VARIABLE).is_none();
    let tell = |error: &anyhow::Error| {
        let text = crate::terminal::plain(&format!("{NAME}: {error:#}")) + "\n";
        let _ = io::stderr().write_all(text.as_bytes());
        if let (true, Ok(mut log)) = (by_systemd, OpenOptions::new().write(true).open("/dev/kmsg"))
        {
            let _ = log.write_all(format!("<3>{text}").as_bytes());
        }
    };
    let words = fs::read_to_string("/proc/cmdline").unwrap_or_default();
    let off = |word| matches!(word, "overlaybdtab=no" | "overlaybdtab=0");
    if words.split_whitespace().any(off) {
        return true;
    }
    let Some(directory) = args.first() else {
        tell(&Failure::usage("expected a directory for units"));
        return false;
    };
    let made = std::env::current_exe()
        .context("cannot find this program")
        .and_then(|program| generate(&tab::path(), &program, Path::new(directory)));
    let wrong = made.unwrap_or_else(|error| vec![error]);
    wrong.iter().for_each(tell);
    wrong.is_empty()
}

/// Makes the units for the table `tab` in `directory`; they run `program`. Returns the errors in single lines,
/// which don't prevent the units for other lines.
///
/// # Errors
///
/// If the table cannot be read.
fn generate(tab: &Path, program: &Path, directory: &Path) -> Result<Vec<anyhow::Error>> {
    let mut wrong = Vec::new();
    let mut names = Vec::new();
    for entry in tab::read(tab)? {
        let made = entry.and_then(|entry| {
            if names.contains(&entry.name) {
                return Err(Failure::usage(format!("`{}' is there twice", entry.name)));
            }
            names.push(entry.name.clone());
            open::parse(&entry)
                .and_then(|_| add(&entry, tab, program, directory))
                .with_context(|| format!("cannot make a unit for `{}'", entry.name))
        });
        wrong.extend(made.err());
    }
    Ok(wrong)
}

/// Makes the unit for `entry`.
fn add(entry: &Entry, tab: &Path, program: &Path, directory: &Path) -> Result<()> {
    let instance = escape(entry.name.as_bytes());
    let unit = format!("systemd-overlaybdsetup@{instance}.service");
    fs::write(directory.join(&unit), text(entry, tab, program)?)?;
    // A mount of the device or of a partition starts the unit.
    for device in [instance].into_iter().chain(partitions(entry)) {
        want(
            directory,
            &format!("dev-mapper-{device}.device.requires"),
            &unit,
        )?;
    }
    if !entry.noauto {
        let how = if entry.nofail { "wants" } else { "requires" };
        want(directory, &format!("overlaybdsetup.target.{how}"), &unit)?;
    }
    Ok(())
}

/// Returns the names of the devices of the partitions that the disk of `entry` may have, escaped for names of
/// units.
fn partitions(entry: &Entry) -> impl Iterator<Item = String> + '_ {
    let numbers = (1..=PARTITIONS).filter(|_| entry.has_partitions());
    numbers.map(|number| escape(format!("{}-part{number}", entry.name).as_bytes()))
}

/// Makes the link to `unit` in the directory `by`, such as `x.target.wants`, in `directory`.
fn want(directory: &Path, by: &str, unit: &str) -> Result<()> {
    let place = directory.join(by);
    fs::create_dir_all(&place)?;
    symlink(Path::new("..").join(unit), place.join(unit))?;
    Ok(())
}

/// Returns the text of the unit for `entry`. The name needs no quotes: see [`crate::devices::dm::plan::check_name`].
fn text(entry: &Entry, tab: &Path, program: &Path) -> Result<String> {
    let name = &entry.name;
    let mut text = format!(
        "# Automatically generated by {NAME}

[Unit]
Description=OverlayBD Image %I
Documentation=man:overlaybdtab(5) man:obdsetup(8)
SourcePath={}
DefaultDependencies=no
IgnoreOnIsolate=true
Wants=blockdev@dev-mapper-%i.target
Before=blockdev@dev-mapper-%i.target umount.target
After=systemd-udevd-kernel.socket
Conflicts=umount.target
",
        plain(tab)?
    );
    for partition in partitions(entry) {
        let target = format!("blockdev@dev-mapper-{partition}.target");
        writeln!(text, "Wants={target}\nBefore={target}")?;
    }
    // If the initramfs has set up the stack, this unit neither opens nor closes it.
    if entry.initrd {
        writeln!(text, "ConditionPathExists=!/dev/mapper/{name}")?;
    }
    // With `noauto` or `nofail`, the unit may start after the target: the stack may need something that
    // starts later, for example the network.
    if !entry.noauto && !entry.nofail {
        text.push_str("Before=overlaybdsetup.target\n");
    }
    let mut files = false;
    let layers = entry.layers.iter().map(|layer| blob(layer));
    let store = entry.store().map(|store| Ok(store.to_owned()));
    for path in layers.chain(store) {
        let path = path?;
        if path.components().any(|part| part == Component::ParentDir) {
            return Err(Failure::usage(format!("{path:?}: `..' in a name")));
        }
        // For a device, depend on its unit; for a file, on the mounts of the directories in its path.
        match tab::is_device(&path) {
            true => {
                let device = format!("{}.device", escape_path(&path));
                writeln!(text, "BindsTo={device}\nAfter={device}")?;
            }
            false => {
                files = true;
                writeln!(text, "RequiresMountsFor=\"{}\"", plain(&path)?)?;
            }
        }
    }
    if files {
        // This service makes /dev/loop-control, which the first loop device needs.
        let service = "systemd-tmpfiles-setup-dev.service";
        writeln!(text, "Wants={service}\nAfter={service}")?;
    }
    let program = plain(program)?;
    write!(
        text,
        "
[Service]
Type=oneshot
RemainAfterExit=yes
KillMode=mixed
TimeoutStartSec={TIMEOUT}
TimeoutStopSec={TIMEOUT}
ExecStart=\"{program}\" open {name}
ExecStop=\"{program}\" close {name}
"
    )?;
    Ok(text)
}

/// Returns the file or device of a layer.
fn blob(layer: &OsStr) -> Result<PathBuf> {
    let layer = LayerArg::try_from(layer.to_owned());
    Ok(layer.map_err(Failure::usage)?.path)
}

/// Returns a path for use within quotes in a unit. A backslash is refused, because its meaning there depends
/// on what follows.
fn plain(path: &Path) -> Result<String> {
    let text = path.to_str().filter(|text| {
        !text
            .chars()
            .any(|c| c.is_control() || matches!(c, '"' | '\\'))
    });
    match text {
        Some(text) => Ok(text.replace('%', "%%")),
        None => Err(Failure::usage(format!(
            "{path:?}: a unit cannot name this file; it must be UTF-8 without quotes, backslashes and control characters"
        ))),
    }
}

/// Escapes a text for a unit's name, as `systemd-escape` does.
fn escape(bytes: &[u8]) -> String {
    let mut text = String::new();
    for &byte in bytes {
        match byte {
            b'/' => text.push('-'),
            b'.' if text.is_empty() => text.push_str("\\x2e"),
            b'.' | b':' | b'_' => text.push(byte.into()),
            byte if byte.is_ascii_alphanumeric() => text.push(byte.into()),
            byte => text.push_str(&format!("\\x{byte:02x}")),
        }
    }
    text
}

/// Escapes an absolute path for a unit's name, as `systemd-escape --path` does.
fn escape_path(path: &Path) -> String {
    // components() leaves out repeated slashes and `.`.
    let parts = path.components().skip(1);
    let parts: Vec<&[u8]> = parts.map(|part| part.as_os_str().as_bytes()).collect();
    match parts[..] {
        [] => "-".to_owned(),
        _ => escape(&parts.join(&b'/')),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use proptest::prelude::*;

    use super::*;

    type Units = HashMap<String, String>;

    /// Returns the units for a table, with their texts and the links to them, and the number of errors.
    fn units(table: &[u8]) -> Result<(Units, usize)> {
        let place = tempfile::tempdir()?;
        let (tab, out) = (place.path().join("tab"), place.path().join("out"));
        fs::write(&tab, table)?;
        fs::create_dir(&out)?;
        let wrong = generate(Path::new(&tab), Path::new("/usr/sbin/obdsetup"), &out)?;
        let mut units = Units::new();
        for entry in walkdir::WalkDir::new(&out).min_depth(1) {
            let entry = entry?;
            if !entry.file_type().is_dir() {
                // Reads links, too: a link that leads nowhere is an error.
                let name = entry.path().strip_prefix(&out)?.display().to_string();
                let text = fs::read_to_string(entry.path())?;
                units.insert(name, text.replace(&tab.display().to_string(), "TAB"));
            }
        }
        Ok((units, wrong.len()))
    }

    fn names(units: &Units) -> Vec<&str> {
        let mut names: Vec<&str> = units.keys().map(String::as_str).collect();
        names.sort_unstable();
        names
    }

    #[test]
    fn a_unit() -> Result<()> {
        let (units, wrong) = units(b"my-app /srv/base.obd,/dev/vg/a-b:4096 nofail\n")?;
        assert_eq!(wrong, 0);
        let unit = r"systemd-overlaybdsetup@my\x2dapp.service";
        assert_eq!(
            names(&units),
            [
                &format!(r"dev-mapper-my\x2dapp.device.requires/{unit}"),
                &format!("overlaybdsetup.target.wants/{unit}"),
                unit
            ]
        );
        assert_eq!(
            units.get(unit).map(String::as_str),
            Some(
                r#"# Automatically generated by systemd-overlaybdsetup-generator

[Unit]
Description=OverlayBD Image %I
Documentation=man:overlaybdtab(5) man:obdsetup(8)
SourcePath=TAB
DefaultDependencies=no
IgnoreOnIsolate=true
Wants=blockdev@dev-mapper-%i.target
Before=blockdev@dev-mapper-%i.target umount.target
After=systemd-udevd-kernel.socket
Conflicts=umount.target
RequiresMountsFor="/srv/base.obd"
BindsTo=dev-vg-a\x2db.device
After=dev-vg-a\x2db.device
Wants=systemd-tmpfiles-setup-dev.service
After=systemd-tmpfiles-setup-dev.service

[Service]
Type=oneshot
RemainAfterExit=yes
KillMode=mixed
TimeoutStartSec=300
TimeoutStopSec=300
ExecStart="/usr/sbin/obdsetup" open my-app
ExecStop="/usr/sbin/obdsetup" close my-app
"#
            )
        );
        Ok(())
    }

    /// A unit waits for the device that the layer names, whether or not that exists now. A number after a
    /// colon is a size only if the name of the device cannot have a colon: see `layer_name`.
    #[test]
    fn devices_with_colons() -> Result<()> {
        let name = "/dev/disk/by-id/usb-Kingston_DT_1-0:0";
        let sized = format!("{name}:size=4096");
        for (layer, bound) in [
            (name, r"dev-disk-by\x2did-usb\x2dKingston_DT_1\x2d0:0"),
            (&sized, r"dev-disk-by\x2did-usb\x2dKingston_DT_1\x2d0:0"),
            (
                "/dev/disk/by-path/pci-0000:00:1f.2",
                r"dev-disk-by\x2dpath-pci\x2d0000:00:1f.2",
            ),
            ("/dev/mapper/a:4096", "dev-mapper-a:4096"),
            ("/dev/vdb:4096", "dev-vdb"),
        ] {
            let (units, wrong) = units(format!("u {layer}\n").as_bytes())?;
            assert_eq!(wrong, 0);
            let unit = &units["systemd-overlaybdsetup@u.service"];
            let line = format!("\nBindsTo={bound}.device\n");
            assert!(unit.contains(&line), "{layer}: {unit}");
        }
        let (units, wrong) = units(b"u /dev/shm/a.obd\nv /dev/vdb:size=x\n")?;
        assert_eq!(wrong, 1);
        let unit = &units["systemd-overlaybdsetup@u.service"];
        assert!(
            unit.contains("\nRequiresMountsFor=\"/dev/shm/a.obd\"\n"),
            "{unit}"
        );
        Ok(())
    }

    #[test]
    fn stores() -> Result<()> {
        let (units, wrong) =
            units(b"a /a writable=/srv/a.store\nb /b writable=/dev/vdb\nc /c writable=/../x\nd /d writable=/x,create\ne /e writable=/x,take-over\nf /f store-size=1g\n")?;
        assert_eq!(wrong, 4);
        let has = |name: &str, text: &str| {
            units[&format!("systemd-overlaybdsetup@{name}.service")].contains(text)
        };
        assert!(has("a", "\nRequiresMountsFor=\"/srv/a.store\"\n"));
        assert!(has("b", "\nBindsTo=dev-vdb.device\n"));
        Ok(())
    }

    #[test]
    fn options() -> Result<()> {
        let (units, wrong) = units(b"a /a\nb /b noauto\nc /c x-initrd.attach\n")?;
        assert_eq!(wrong, 0);
        let has = |unit: &str, text: &str| units[unit].contains(text);
        let unit = |name: &str| format!("systemd-overlaybdsetup@{name}.service");
        // `left`: whether the unit leaves a stack alone that the initramfs has opened.
        for (name, required, left) in [("a", true, false), ("b", false, false), ("c", true, true)] {
            let by_target = format!("overlaybdsetup.target.requires/{}", unit(name));
            let by_device = format!("dev-mapper-{name}.device.requires/{}", unit(name));
            assert_eq!(units.contains_key(&by_target), required, "{name}");
            assert!(units.contains_key(&by_device), "{name}");
            assert_eq!(has(&unit(name), "Before=overlaybdsetup.target\n"), required);
            let condition = format!("ConditionPathExists=!/dev/mapper/{name}\n");
            assert_eq!(has(&unit(name), &condition), left);
        }
        Ok(())
    }

    #[test]
    fn partitions() -> Result<()> {
        let (units, wrong) = units(b"a-b /a partitions,noauto\n")?;
        assert_eq!(wrong, 0);
        let unit = r"systemd-overlaybdsetup@a\x2db.service";
        assert_eq!(units.len(), 2 + 16);
        for device in [r"a\x2db", r"a\x2db\x2dpart1", r"a\x2db\x2dpart16"] {
            let link = format!("dev-mapper-{device}.device.requires/{unit}");
            assert!(units.contains_key(&link), "{link}");
        }
        let text = &units[unit];
        let target = r"blockdev@dev-mapper-a\x2db\x2dpart16.target";
        assert!(text.contains(&format!("\nWants={target}\nBefore={target}\n")));
        Ok(())
    }

    #[test]
    fn wrong_lines_leave_the_others() -> Result<()> {
        let table = b"../../etc /a\nok /b\nok /c\nup /dev/../etc\nquote /a\"b\nlast /c\n\
            option /a frobnicate\nvalue /a zfile-opt\nnet /a _netdev\n";
        let (units, wrong) = units(table)?;
        assert_eq!(wrong, 7);
        let made: Vec<&str> = names(&units)
            .into_iter()
            .filter(|name| !name.contains('/'))
            .collect();
        assert_eq!(
            made,
            [
                "systemd-overlaybdsetup@last.service",
                "systemd-overlaybdsetup@ok.service"
            ]
        );
        Ok(())
    }

    /// The results of systemd-escape(1) of systemd 252.
    #[test]
    fn escapes() {
        for (name, escaped) in [
            ("a-b", r"a\x2db"),
            ("x#+.:=@_", r"x\x23\x2b.:\x3d\x40_"),
            (".9", r"\x2e9"),
        ] {
            assert_eq!(escape(name.as_bytes()), escaped);
        }
        for (path, escaped) in [
            ("/dev/vg/base", "dev-vg-base"),
            (
                "/dev//disk/by-partlabel/a b/",
                r"dev-disk-by\x2dpartlabel-a\x20b",
            ),
            ("/dev/./x", "dev-x"),
            (
                "/dev/disk/by-label/é%",
                r"dev-disk-by\x2dlabel-\xc3\xa9\x25",
            ),
            ("/dev/.x", "dev-.x"),
            ("/", "-"),
        ] {
            assert_eq!(escape_path(Path::new(path)), escaped);
        }
    }

    /// Reverses `escape`.
    fn unescape(text: &str) -> Vec<u8> {
        let mut bytes = Vec::new();
        let mut rest = text;
        while let Some(first) = rest.chars().next() {
            let code = rest.strip_prefix("\\x").and_then(|rest| rest.get(..2));
            match code.and_then(|code| u8::from_str_radix(code, 16).ok()) {
                Some(byte) => {
                    bytes.push(byte);
                    rest = &rest[4..];
                }
                None => {
                    bytes.push(if first == '-' { b'/' } else { first as u8 });
                    rest = &rest[1..];
                }
            }
        }
        bytes
    }

    /// Returns a field of the table that stands for `bytes`.
    fn field(bytes: &[u8]) -> String {
        let codes: Vec<String> = bytes.iter().map(|byte| format!("\\{byte:03o}")).collect();
        codes.concat()
    }

    const KEYS: [&str; 20] = [
        "After",
        "Before",
        "BindsTo",
        "ConditionPathExists",
        "Conflicts",
        "DefaultDependencies",
        "Description",
        "Documentation",
        "KillMode",
        "TimeoutStartSec",
        "TimeoutStopSec",
        "ExecStart",
        "ExecStop",
        "IgnoreOnIsolate",
        "RemainAfterExit",
        "RequiresMountsFor",
        "SourcePath",
        "Type",
        "Wants",
        "#",
    ];

    proptest! {
        /// For any name of a layer, the unit depends on the layer's file, or there is no unit. The unit has
        /// no unexpected lines.
        #[test]
        fn hostile_layers(bytes in "[ -~é\\n\\t\\r]{0,12}", device: bool) {
            let path = format!("{}{bytes}", if device { "/dev/" } else { "/" });
            let table = format!("app {}\n", field(path.as_bytes()));
            let (units, wrong) = units(table.as_bytes()).unwrap_or_default();
            let Some(unit) = units.get("systemd-overlaybdsetup@app.service") else {
                prop_assert_eq!((units.len(), wrong), (0, 1));
                let refused = |c: char| c.is_control() || matches!(c, '"' | '\\');
                prop_assert!(path.contains("..") || !device && path.contains(refused));
                return Ok(());
            };
            prop_assert_eq!((units.len(), wrong), (3, 0));
            let mut found = None;
            for line in unit.lines().filter(|line| !line.is_empty() && !line.starts_with('[')) {
                let (key, value) = line.split_once('=').unwrap_or(("#", ""));
                prop_assert!(KEYS.contains(&key), "{}", line);
                match key {
                    "BindsTo" => found = value.strip_suffix(".device").map(unescape),
                    "RequiresMountsFor" => {
                        let value = value.trim_matches('"');
                        prop_assert!(!value.replace("%%", "").contains(['%', '"']));
                        found = Some(value.replace("%%", "%").into_bytes());
                    }
                    _ => {}
                }
            }
            // The size after a device isn't part of its name.
            let path = blob(OsStr::new(&path)).unwrap_or_default();
            let found = found.unwrap_or_default();
            let found = Path::new("/").join(OsStr::from_bytes(&found));
            prop_assert_eq!(found.components().collect::<Vec<_>>(), path.components().collect::<Vec<_>>());
        }

        /// For any name of a stack, all files are in the directory, and unescaping the instance in the name
        /// of the unit gives the name of the stack.
        #[test]
        fn hostile_names(name in "[!-~]{1,9}|[-#+.:=@_a-c0]{1,9}") {
            let (units, wrong) = units(format!("{name} /a\n").as_bytes()).unwrap_or_default();
            if name.starts_with('#') {
                prop_assert_eq!((units.len(), wrong), (0, 0));
            } else if crate::devices::dm::plan::check_name(&name).is_err() {
                prop_assert_eq!((units.len(), wrong), (0, 1));
            } else {
                prop_assert_eq!((units.len(), wrong), (3, 0));
                for unit in names(&units) {
                    let (_, instance) = unit.rsplit_once('@').unwrap_or_default();
                    let instance = instance.trim_end_matches(".service");
                    prop_assert_eq!(unescape(instance), name.as_bytes());
                }
            }
        }
    }
}
