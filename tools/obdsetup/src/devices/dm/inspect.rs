// SPDX-License-Identifier: GPL-2.0

//! Gets the state of many devices at once, with a few calls of dmsetup, however many devices there are.

use std::collections::HashMap;

use anyhow::Result;

use super::control::{Control, Line, State};

/// Largest number of attempts. One fails if a device is removed meanwhile.
const TRIES: u32 = 3;
/// The words of `dmsetup info` for a device that the kernel will remove when it is closed.
const DEFERRED: &str = "DEFERRED REMOVE";

/// A device, its table and its status.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Device {
    pub(crate) state: State,
    /// Whether the kernel will remove the device when it is closed.
    pub(crate) deferred_remove: bool,
    /// Empty if no table is live.
    pub(crate) table: Vec<Line>,
    /// One line for each line of the table.
    pub(crate) status: Vec<Line>,
}

impl Control {
    /// Returns the devices for whose UUIDs `wanted` returns true.
    pub(crate) fn inspect(&self, wanted: &dyn Fn(&str) -> bool) -> Result<Vec<Device>> {
        let mut tries = 1;
        loop {
            let mut states = self.states()?;
            states.retain(|state| wanted(&state.uuid));
            match self.devices(states) {
                // A device may have been removed meanwhile.
                Err(_) if tries < TRIES => tries += 1,
                devices => return devices,
            }
        }
    }

    fn devices(&self, states: Vec<State>) -> Result<Vec<Device>> {
        let names: Vec<&str> = states.iter().map(|state| state.name.as_str()).collect();
        if names.is_empty() {
            return Ok(Vec::new());
        }
        let ask = |command: &[&str]| self.run(&[command, &names].concat());
        let mut tables = lines(&names, &ask(&["table"])?);
        let mut status = lines(&names, &ask(&["status", "--noflush"])?);
        let deferred = deferred(&ask(&["info"])?);
        let devices = states.into_iter().map(|state| Device {
            deferred_remove: deferred.contains(&state.name),
            table: tables.remove(&state.name).unwrap_or_default(),
            status: status.remove(&state.name).unwrap_or_default(),
            state,
        });
        Ok(devices.collect())
    }

    /// Returns word `nth`, counted from 0, of the status of each of the devices `names`, by name. A device
    /// without such a word is missing in the result. If dmsetup fails, as it does if one of the devices was
    /// removed, the result is empty.
    pub(crate) fn status_words(&self, names: &[&str], nth: usize) -> HashMap<String, String> {
        let status = self.run(&[&["status", "--noflush"], names].concat());
        let word = |(name, status): (String, Vec<Line>)| {
            let mut words = status.first()?.params.split_whitespace();
            Some((name, words.nth(nth)?.to_owned()))
        };
        let status = lines(names, &status.unwrap_or_default());
        status.into_iter().filter_map(word).collect()
    }

    /// Returns the targets in the live table of device `name`; none if dmsetup fails.
    pub(super) fn targets(&self, name: &str) -> Vec<String> {
        let table = self.run(&["table", name]).unwrap_or_default();
        let lines = lines(&[name], &table).remove(name).unwrap_or_default();
        lines.into_iter().map(|line| line.target).collect()
    }

    /// Returns the ID of the thin volume `name` in its pool, and the number of its mapped sectors. Returns
    /// `None` if it is no thin volume, or if dmsetup fails.
    pub(crate) fn thin_volume(&self, name: &str) -> Option<(u64, u64)> {
        let word = |command: &[&str], nth: usize| {
            let text = self.run(&[command, &[name]].concat()).ok()?;
            let line = lines(&[name], &text).remove(name)?.into_iter().next()?;
            let is_thin = line.target == "thin";
            let word = line.params.split_whitespace().nth(nth)?.parse().ok();
            word.filter(|_| is_thin)
        };
        // In the table, the pool comes before the ID.
        Some((word(&["table"], 1)?, word(&["status"], 0)?))
    }
}

/// Returns the lines in dmsetup's output `text` for each of the devices `names`. If there is only one device,
/// dmsetup doesn't print its name.
fn lines(names: &[&str], text: &str) -> HashMap<String, Vec<Line>> {
    let mut found: HashMap<String, Vec<Line>> = HashMap::new();
    for row in text.lines() {
        let (name, line) = match (row.split_once(": "), names) {
            (Some((name, line)), _) if names.contains(&name) => (name, line),
            (_, [name]) => (*name, row),
            _ => continue,
        };
        if let Some(line) = Line::parse(line) {
            found.entry(name.to_owned()).or_default().push(line);
        }
    }
    found
}

/// Returns the names of the devices that the kernel will remove when they are closed.
///
/// The kernel shows this only as a flag of the ioctl DM_DEV_STATUS, and calling that would need unsafe code
/// here. sysfs does not have it, and `dmsetup info -c` has no column for it. So this reads words that are
/// meant for people. dmsetup does not translate them, and obdsetup runs it with `LC_ALL=C`. If the words
/// change, `close` and `status` no longer report that the kernel will remove a device. Nothing else depends
/// on them.
fn deferred(info: &str) -> Vec<String> {
    let mut name = "";
    let mut found = Vec::new();
    for row in info.lines() {
        match row.split_once(':') {
            Some(("Name", value)) => name = value.trim(),
            Some(("State", value)) if value.contains(DEFERRED) => found.push(name.to_owned()),
            _ => {}
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::{deferred, lines};

    #[test]
    fn what_dmsetup_prints() {
        let text = "a: 0 8 linear 7:0 0\na: 8 1 linear 7:1 0\nb: 0 8 zfile V lz4\nc: \n";
        let found = lines(&["a", "b", "c"], text);
        assert_eq!((found["a"].len(), found["b"].len()), (2, 1));
        assert_eq!(found["b"][0].params, "V lz4");
        assert!(!found.contains_key("c"));
        let found = lines(&["a"], "0 8 linear 7:0 0\n8 1 linear 7:1 0\n");
        assert_eq!(found["a"].len(), 2);
        let info = "Name:              a\nState:             ACTIVE (READ-ONLY)\n\n\
                    Name:              b\nState:             ACTIVE (DEFERRED REMOVE)\n";
        assert_eq!(deferred(info), ["b"]);
    }
}
