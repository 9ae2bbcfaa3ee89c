// SPDX-License-Identifier: GPL-2.0

//! Device-mapper's ioctls, by way of the `devicemapper` crate, which also waits for udev.

use std::fmt;

use anyhow::{Context, Result};
use devicemapper::{errors, DevId, DeviceInfo, DmError, DmFlags, DmName, DmOptions, DmUuid, DM};

use super::node;

/// A failed ioctl.
#[derive(Debug)]
pub(crate) struct DmFailure(DmError);

impl DmFailure {
    /// What the kernel said.
    pub(crate) fn errno(&self) -> Option<i32> {
        match &self.0 {
            DmError::Core(errors::Error::Ioctl(_, _, _, errno)) => Some(**errno as i32),
            _ => None,
        }
    }
}

impl fmt::Display for DmFailure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.errno() {
            Some(errno) => std::io::Error::from_raw_os_error(errno).fmt(f),
            None => self.0.fmt(f),
        }
    }
}

impl std::error::Error for DmFailure {}

/// `ENXIO`: there is no such device.
const ENXIO: i32 = 6;

/// What device-mapper says of a device.
pub(crate) struct State {
    pub(crate) name: String,
    pub(crate) uuid: String,
    pub(crate) major: u32,
    pub(crate) minor: u32,
    pub(crate) open_count: i32,
    pub(crate) read_only: bool,
    pub(crate) suspended: bool,
    pub(crate) deferred_remove: bool,
}

impl State {
    fn new(info: &DeviceInfo) -> Self {
        let has = |flag| info.flags().contains(flag);
        Self {
            name: info.name().map(ToString::to_string).unwrap_or_default(),
            uuid: info.uuid().map(ToString::to_string).unwrap_or_default(),
            major: info.device().major,
            minor: info.device().minor,
            open_count: info.open_count(),
            read_only: has(DmFlags::DM_READONLY),
            suspended: has(DmFlags::DM_SUSPEND),
            deferred_remove: has(DmFlags::DM_DEFERRED_REMOVE),
        }
    }
}

/// A line of a table or status: start and length in sectors, target, the rest.
pub(crate) type Line = (u64, u64, String, String);

/// An open `/dev/mapper/control`.
pub(crate) struct Control(DM);

impl Control {
    /// Opens it.
    pub(crate) fn open() -> Result<Self> {
        let path = std::path::Path::new("/dev/mapper/control");
        if let Err(error) = std::fs::File::open(path) {
            // The crate's own error doesn't say which: no module, or no permission.
            return Err(error).context("cannot open /dev/mapper/control (modprobe dm-mod?)");
        }
        let dm = DM::new().map_err(DmFailure);
        Ok(Self(dm.context("cannot open device-mapper")?))
    }

    /// Makes a read-only device, loads its table, and brings it up. Gives its number.
    pub(crate) fn create(
        &self,
        name: &str,
        uuid: &str,
        inner: bool,
        table: &[Line],
    ) -> Result<(u32, u32)> {
        let options = match inner {
            // udev's rules leave it alone: no blkid, no LVM, no links by UUID.
            true => DmOptions::private(),
            false => DmOptions::default(),
        };
        let read_only = options.set_flags(DmFlags::DM_READONLY);
        let dm_name = DmName::new(name).map_err(DmFailure)?;
        let dm_uuid = DmUuid::new(uuid).map_err(DmFailure)?;
        let id = DevId::Name(dm_name);
        let info = self
            .0
            .device_create(dm_name, Some(dm_uuid), read_only)
            .map_err(DmFailure)
            .with_context(|| format!("cannot create device {name}"))?;
        let brought_up = self.bring_up(&id, table, options, read_only);
        if let Err(error) = brought_up.with_context(|| format!("cannot set up device {name}")) {
            // Nobody can use it without a table.
            let _ = self.0.device_remove(&id, DmOptions::default());
            return Err(error);
        }
        let (major, minor) = (info.device().major, info.device().minor);
        if let Err(error) = node::ensure(name, major, minor) {
            let _ = self.remove(name, false);
            return Err(error);
        }
        Ok((major, minor))
    }

    fn bring_up(
        &self,
        id: &DevId<'_>,
        table: &[Line],
        options: DmOptions,
        read_only: DmOptions,
    ) -> Result<()> {
        self.0
            .table_load(id, table, read_only)
            .map_err(DmFailure)
            .with_context(|| {
                let lines: Vec<String> = table.iter().map(show_line).collect();
                format!(
                    "the kernel refuses the table `{}` (dmesg has the reason)",
                    lines.join("; ")
                )
            })?;
        self.0
            .device_suspend(id, options)
            .map_err(DmFailure)
            .context("cannot resume")?;
        Ok(())
    }

    /// Removes device `name`. With `deferred`, one that is in use goes when it no longer is.
    pub(crate) fn remove(&self, name: &str, deferred: bool) -> Result<()> {
        let options = match deferred {
            true => DmOptions::default().set_flags(DmFlags::DM_DEFERRED_REMOVE),
            false => DmOptions::default(),
        };
        let id = DevId::Name(DmName::new(name).map_err(DmFailure)?);
        self.0
            .device_remove(&id, options)
            .map_err(DmFailure)
            .with_context(|| format!("cannot remove device {name}"))?;
        if self.state(name)?.is_none() {
            node::remove(name);
        }
        Ok(())
    }

    /// The state of device `name`; `None` where there is no such device.
    pub(crate) fn state(&self, name: &str) -> Result<Option<State>> {
        let id = DevId::Name(DmName::new(name).map_err(DmFailure)?);
        match self.0.device_info(&id).map_err(DmFailure) {
            Ok(info) => Ok(Some(State::new(&info))),
            Err(error) if error.errno() == Some(ENXIO) => Ok(None),
            Err(error) => Err(error).with_context(|| format!("cannot look at device {name}")),
        }
    }

    /// The table of device `name`.
    pub(crate) fn table(&self, name: &str) -> Result<Vec<Line>> {
        self.lines(name, DmFlags::DM_STATUS_TABLE)
    }

    /// The status of device `name`.
    pub(crate) fn status(&self, name: &str) -> Result<Vec<Line>> {
        self.lines(name, DmFlags::DM_NOFLUSH)
    }

    fn lines(&self, name: &str, flags: DmFlags) -> Result<Vec<Line>> {
        let id = DevId::Name(DmName::new(name).map_err(DmFailure)?);
        let status = self
            .0
            .table_status(&id, DmOptions::default().set_flags(flags))
            .map_err(DmFailure)
            .with_context(|| format!("cannot read the status of device {name}"))?;
        Ok(status.1)
    }

    /// The devices of the stack `name`, top first: those that are there and are ours.
    pub(crate) fn stack(&self, name: &str) -> Result<Vec<State>> {
        let mut found = Vec::new();
        let devices = self.0.list_devices().map_err(DmFailure);
        for (candidate, _, _) in devices.context("cannot list devices")? {
            let candidate = candidate.to_string();
            let Some(rank) = rank(&candidate, name) else {
                continue;
            };
            // It may have gone meanwhile.
            let Some(state) = self.state(&candidate)? else {
                continue;
            };
            if rank.uuids(name).contains(&state.uuid) {
                found.push((rank, state));
            }
        }
        found.sort_by_key(|(rank, _)| *rank);
        Ok(found.into_iter().map(|(_, state)| state).collect())
    }
}

/// What a device is in a stack; ordered from the top.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Rank {
    Top,
    Zfile(usize),
    Blob(usize),
}

impl Rank {
    /// The UUIDs that such a device of stack `name` may have.
    fn uuids(self, name: &str) -> Vec<String> {
        let prefix = super::plan::UUID_PREFIX;
        match self {
            Self::Top => ["LSMT", "ZFILE"]
                .map(|kind| format!("{prefix}{kind}-{name}"))
                .to_vec(),
            Self::Zfile(nth) => vec![format!("{prefix}ZFILE-{name}-{nth}")],
            Self::Blob(nth) => vec![format!("{prefix}BLOB-{name}-{nth}")],
        }
    }
}

/// What device `device` would be in stack `name`, by its name.
fn rank(device: &str, name: &str) -> Option<Rank> {
    let rest = device.strip_prefix(name)?;
    if rest.is_empty() {
        return Some(Rank::Top);
    }
    let zfile = rest.strip_prefix("-zfile").map(str::parse);
    let blob = rest.strip_prefix("-blob").map(str::parse);
    match (zfile, blob) {
        (Some(Ok(nth)), _) => Some(Rank::Zfile(nth)),
        (_, Some(Ok(nth))) => Some(Rank::Blob(nth)),
        _ => None,
    }
}

/// A line as dmsetup(8) shows it.
pub(crate) fn show_line((start, len, target, params): &Line) -> String {
    format!("{start} {len} {target} {params}")
}

#[cfg(test)]
mod tests {
    use super::{rank, Rank};

    #[test]
    fn ranks() {
        assert_eq!(rank("a", "a"), Some(Rank::Top));
        assert_eq!(rank("a-zfile12", "a"), Some(Rank::Zfile(12)));
        assert_eq!(rank("a-blob0", "a"), Some(Rank::Blob(0)));
        assert_eq!(rank("a-b", "a"), None);
        assert_eq!(rank("b", "a"), None);
        assert!(Rank::Top < Rank::Zfile(0) && Rank::Zfile(9) < Rank::Blob(0));
    }
}
