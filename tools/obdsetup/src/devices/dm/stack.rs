// SPDX-License-Identifier: GPL-2.0

//! Finds the devices of a stack: by their UUIDs, because anyone may rename a device. Shared devices are found
//! by the tables of the stacks that use them.

use anyhow::Result;

use super::control::{Control, State};
use super::identity;
use super::identity::UUID_PREFIX;
use super::plan::parse_partition;
use super::system;

/// The existing devices of a stack, top first.
#[derive(Debug)]
pub(crate) struct Stack {
    /// The name that was given to `open`.
    pub(crate) name: String,
    pub(crate) devices: Vec<State>,
    /// Whether the first device is the disk.
    has_top: bool,
}

impl Stack {
    /// Returns the stack whose disk has the name `name`, or got it from `open`.
    pub(crate) fn find(control: &Control, name: &str) -> Result<Option<Self>> {
        Ok(Self::among(&control.states()?, name))
    }

    /// As [`Self::find`], among the devices `all`.
    pub(crate) fn among(all: &[State], name: &str) -> Option<Self> {
        let renamed = all
            .iter()
            .filter(|state| state.name == name)
            .find_map(|state| match part(&state.uuid)? {
                (Rank::Top, stack) => Some(stack),
                _ => None,
            });
        let stack = renamed.unwrap_or(name);
        let mut found: Vec<(Rank, State)> = all
            .iter()
            .filter_map(|state| match part(&state.uuid)? {
                (rank, of) if of == stack => Some((rank, state.clone())),
                _ => None,
            })
            .collect();
        found.sort_by_key(|(rank, _)| *rank);
        let (lowest, _) = found.first()?;
        Some(Self {
            name: stack.to_owned(),
            has_top: *lowest == Rank::Top,
            devices: found.into_iter().map(|(_, state)| state).collect(),
        })
    }

    /// Returns the disk.
    pub(crate) fn top(&self) -> Option<&State> {
        self.devices.first().filter(|_| self.has_top)
    }

    /// Returns the device of the store of changes, if the disk is writable.
    pub(crate) fn store(&self) -> Option<&State> {
        let mut devices = self.devices.iter();
        devices.find(|state| matches!(part(&state.uuid), Some((Rank::Store, _))))
    }

    /// Returns the shared devices below the disk, upper ones first. `all` are all devices.
    pub(crate) fn shared<'b>(&self, all: &'b [State]) -> Vec<&'b State> {
        let below = self.top().map(|top| system::below(&top.number));
        let below = below.unwrap_or_default();
        let mut found: Vec<_> = all
            .iter()
            .filter(|state| below.contains(&state.number))
            .filter_map(|state| Some((identity::parse(&state.uuid)?.0, state)))
            .collect();
        found.sort_by_key(|(kind, _)| *kind);
        found.into_iter().map(|(_, state)| state).collect()
    }

    /// Returns the existing devices of partitions of the disk.
    pub(crate) fn partitions(&self) -> impl Iterator<Item = &State> {
        let devices = self.devices.iter();
        devices.filter(|state| is_partition(&state.uuid))
    }

    /// Returns the disk or the partition that someone has open; `None` if no one has.
    pub(crate) fn in_use(&self) -> Option<&State> {
        let mut partitions = self.partitions();
        if let Some(used) = partitions.find(|state| state.open_count > 0) {
            return Some(used);
        }
        let own = self.partitions().count();
        let by_others =
            |top: &&State| usize::try_from(top.open_count).is_ok_and(|count| count > own);
        self.top().filter(by_others)
    }

    /// Returns whether the stack is half-built, because an obdsetup was killed: the disk is missing, a device
    /// has no table, or the partitions are still to be made.
    pub(crate) fn is_half_built(&self) -> bool {
        let is_mark = |state: &State| matches!(part(&state.uuid), Some((Rank::Mark, _)));
        !self.has_top
            || self
                .devices
                .iter()
                .any(|state| !state.live || is_mark(state))
    }

    /// Returns the current names of the devices: partitions first, then the others from the top.
    pub(crate) fn names(&self) -> Vec<String> {
        let devices = self.devices.iter();
        let below = devices.filter(|state| !is_partition(&state.uuid));
        let all = self.partitions().chain(below);
        all.map(|device| device.name.clone()).collect()
    }
}

/// Returns whether `uuid` is the UUID of a partition of a stack's disk.
fn is_partition(uuid: &str) -> bool {
    matches!(part(uuid), Some((Rank::Partition(_), _)))
}

/// The role of a device in a stack. Ordered from the top, except that partitions are over the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Rank {
    /// The disk.
    Top,
    /// Partition `.0` of the disk.
    Partition(u32),
    /// Below a writable disk: the device that shows the layers.
    Image,
    /// The device of the store of changes.
    Store,
    /// The mark, which exists until the partitions do.
    Mark,
    /// The zfile device of layer `.0`.
    Zfile(usize),
    /// The blob device of layer `.0`.
    Blob(usize),
}

/// Returns what the device with `uuid` is, and the name that `open` gave its stack. Returns `None` for a
/// shared device, which belongs to no stack.
pub(crate) fn part(uuid: &str) -> Option<(Rank, &str)> {
    if identity::is_shared(uuid) {
        return None;
    }
    if let Some((number, disk)) = parse_partition(uuid) {
        return match disk.strip_prefix(UUID_PREFIX).and_then(|_| part(disk))? {
            (Rank::Top, name) => Some((Rank::Partition(number), name)),
            _ => None,
        };
    }
    let rest = uuid.strip_prefix(UUID_PREFIX)?;
    let (kind, name) = rest.split_once('-')?;
    let layer = || {
        let (name, nth) = name.rsplit_once('-')?;
        Some((name, nth.parse().ok()?))
    };
    match kind {
        "LSMT" | "ZFILE" | "WRITABLE" => Some((Rank::Top, name)),
        "IMAGE" => Some((Rank::Image, name)),
        "STORE" => Some((Rank::Store, name)),
        "MARK" => Some((Rank::Mark, name)),
        "LAYER" => layer().map(|(name, nth)| (Rank::Zfile(nth), name)),
        "BLOB" => layer().map(|(name, nth)| (Rank::Blob(nth), name)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::super::control::State;
    use super::{part, Rank, Stack};

    fn state(name: &str, uuid: &str) -> State {
        State {
            name: name.to_owned(),
            uuid: uuid.to_owned(),
            number: "254:0".to_owned(),
            open_count: 0,
            read_only: true,
            suspended: false,
            live: true,
        }
    }

    #[test]
    fn parts() {
        assert_eq!(
            part("OVERLAYBD-LSMT-a-zfile1"),
            Some((Rank::Top, "a-zfile1"))
        );
        assert_eq!(
            part("OVERLAYBD-LAYER-a-0-12"),
            Some((Rank::Zfile(12), "a-0"))
        );
        assert_eq!(part("OVERLAYBD-BLOB-a-0"), Some((Rank::Blob(0), "a")));
        for none in [
            "",
            "LVM-a",
            "OVERLAYBD-a",
            "OVERLAYBD-BLOB-a",
            "OVERLAYBD-LAYER-a-x",
        ] {
            assert_eq!(part(none), None, "{none}");
        }
        assert!(Rank::Top < Rank::Zfile(0) && Rank::Zfile(9) < Rank::Blob(0));
        assert_eq!(part("OVERLAYBD-WRITABLE-a"), Some((Rank::Top, "a")));
        assert_eq!(part("OVERLAYBD-STORE-a-b"), Some((Rank::Store, "a-b")));
        assert!(Rank::Top < Rank::Image && Rank::Store < Rank::Zfile(0));
        assert_eq!(
            part("part12-OVERLAYBD-LSMT-a-b"),
            Some((Rank::Partition(12), "a-b"))
        );
        for none in [
            "part1-LVM-a",
            "part1-OVERLAYBD-STORE-a",
            "part1-part1-OVERLAYBD-LSMT-a",
            "part+1-OVERLAYBD-LSMT-a",
            "part-OVERLAYBD-LSMT-a",
            "part99999999999-OVERLAYBD-LSMT-a",
        ] {
            assert_eq!(part(none), None, "{none}");
        }
    }

    #[test]
    fn partitions() {
        let mut all = vec![
            state("a-partitions", "OVERLAYBD-MARK-a"),
            state("a", "OVERLAYBD-LSMT-a"),
            state("a-part2", "part2-OVERLAYBD-LSMT-a"),
            state("a-part1", "part1-OVERLAYBD-LSMT-a"),
            state("a-zfile0", "OVERLAYBD-LAYER-a-0"),
        ];
        let among = |all: &[State]| Stack::among(all, "a").unwrap_or_else(|| unreachable!());
        assert!(among(&all).is_half_built());
        all.remove(0);
        assert!(!among(&all).is_half_built());
        assert_eq!(among(&all).names(), ["a-part1", "a-part2", "a", "a-zfile0"]);
        let used = |all: &[State]| among(all).in_use().map(|state| state.name.clone());
        // The devices of the partitions have the disk open.
        all[0].open_count = 2;
        assert_eq!(used(&all), None);
        all[0].open_count = 3;
        assert_eq!(used(&all).as_deref(), Some("a"));
        all[1].open_count = 1;
        assert_eq!(used(&all).as_deref(), Some("a-part2"));
        // Without its disk.
        all.remove(0);
        assert!(among(&all).is_half_built());
    }

    #[test]
    fn stacks() {
        let mut all = vec![
            state("a-blob0", "OVERLAYBD-BLOB-a-0"),
            state("odd", "OVERLAYBD-LAYER-a-0"),
            state("new", "OVERLAYBD-LSMT-a"),
            state("b", "OVERLAYBD-LAYER-b-0"),
            state("c", "LVM-c"),
        ];
        for name in ["a", "new"] {
            let stack = Stack::among(&all, name).unwrap_or_else(|| unreachable!());
            assert_eq!(stack.names(), ["new", "odd", "a-blob0"]);
            assert_eq!(stack.name, "a");
            assert!(!stack.is_half_built());
        }
        // An inner device is no stack, whatever its name.
        for name in ["odd", "a-blob0", "c", "d"] {
            assert!(Stack::among(&all, name).is_none(), "{name}");
        }
        let half = |all: &[State], name| Stack::among(all, name).is_some_and(|s| s.is_half_built());
        assert!(half(&all, "b"));
        all[1].live = false;
        assert!(half(&all, "a"));
        all.remove(2);
        assert!(Stack::among(&all, "new").is_none());
        assert!(half(&all, "a"));
        let mut all = vec![
            state("w-store", "OVERLAYBD-STORE-w"),
            state("w-image", "OVERLAYBD-IMAGE-w"),
        ];
        assert!(half(&all, "w"));
        all.push(state("w", "OVERLAYBD-WRITABLE-w"));
        let stack = Stack::among(&all, "w").unwrap_or_else(|| unreachable!());
        assert_eq!(stack.names(), ["w", "w-image", "w-store"]);
        assert_eq!(stack.store(), all.first());
        // The current name of a disk takes precedence over the name in a UUID.
        let all = [
            state("a", "OVERLAYBD-LSMT-b"),
            state("b", "OVERLAYBD-LSMT-a"),
        ];
        let stack = Stack::among(&all, "a").unwrap_or_else(|| unreachable!());
        assert_eq!((stack.name.as_str(), stack.devices.len()), ("b", 1));
    }
}
