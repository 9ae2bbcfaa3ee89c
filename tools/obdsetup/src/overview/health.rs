// SPDX-License-Identifier: GPL-2.0

//! The health of a stack: one word, one line, and an exit code.

use serde::Serialize;

use super::changes::Changes;
use super::{Layer, Stack};
use crate::exit;

/// The health of a stack or layer. If several apply, the first one is used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Health {
    /// A device has read a corrupt block.
    Corrupt,
    /// What was written to the disk is lost.
    Lost,
    /// The file of a layer is shorter than when it was opened.
    Cut,
    /// Reads of a lower device, or of the disk, have failed.
    ReadErrors,
    /// The store has no room for what is written to the disk.
    Full,
    /// Some of the stack's devices are missing.
    HalfBuilt,
    /// Some devices are missing because an obdsetup is working on the stack.
    Busy,
    /// A device is suspended, so reads wait.
    Suspended,
    /// The store will soon have no room.
    NearlyFull,
    /// No problem is known.
    Ok,
}

impl Health {
    /// Returns the health in one word.
    pub(crate) fn word(self) -> &'static str {
        match self {
            Self::Corrupt => "CORRUPT",
            Self::Lost => "LOST",
            Self::Cut => "CUT SHORT",
            Self::ReadErrors => "READ ERRORS",
            Self::Full => "FULL",
            Self::HalfBuilt => "HALF BUILT",
            Self::Busy => "busy",
            Self::Suspended => "SUSPENDED",
            Self::NearlyFull => "NEARLY FULL",
            Self::Ok => "ok",
        }
    }

    /// Returns the exit code.
    pub(crate) fn code(self) -> u8 {
        match self {
            Self::Ok | Self::Busy => exit::SUCCESS,
            Self::Corrupt => exit::BAD_IMAGE,
            Self::Lost
            | Self::Cut
            | Self::ReadErrors
            | Self::Full
            | Self::HalfBuilt
            | Self::Suspended
            | Self::NearlyFull => exit::DEVICE,
        }
    }

    /// Returns the health of a layer.
    pub(crate) fn of_layer(layer: &Layer) -> Self {
        match layer {
            Layer {
                corrupt_blocks: 1..,
                ..
            } => Self::Corrupt,
            Layer { cut: Some(_), .. } => Self::Cut,
            Layer {
                read_errors: 1.., ..
            } => Self::ReadErrors,
            _ => Self::Ok,
        }
    }

    /// Returns the health of a stack.
    pub(crate) fn of(stack: &Stack) -> Self {
        let layers = stack.layers.iter().map(Self::of_layer).min();
        let layers = layers.unwrap_or(Self::Ok);
        let changes = stack.changes.as_ref().map_or(Self::Ok, Self::of_changes);
        let devices = || stack.devices.iter().map(|(_, device)| device);
        let devices = if stack.failed_reads() > 0 {
            Self::ReadErrors
        } else if stack.is_half_built() {
            match stack.busy {
                true => Self::Busy,
                false => Self::HalfBuilt,
            }
        } else if devices().any(|device| device.state.suspended) {
            Self::Suspended
        } else {
            Self::Ok
        };
        layers.min(changes).min(devices)
    }

    /// Returns the health of a store.
    fn of_changes(changes: &Changes) -> Self {
        if changes.lost {
            Self::Lost
        } else if changes.overflowed {
            Self::Full
        } else if changes.is_nearly_full() {
            Self::NearlyFull
        } else {
            Self::Ok
        }
    }
}

/// Returns one line about a stack's health, with what to do.
pub(crate) fn line(stack: &Stack) -> String {
    let health = Health::of(stack);
    let word = health.word();
    let layers = || {
        let layers = stack.layers.iter();
        layers.filter(|layer| Health::of_layer(layer) == health)
    };
    let first = layers().next();
    let file = first.map_or("", |layer| layer.file.as_str());
    let more = match (layers().count(), health) {
        (0 | 1, _) => String::new(),
        (n, Health::Cut) => format!(" (one of {n} such layers)"),
        (n, _) => format!(" (total of {n} such layers)"),
    };
    let sum = |of: fn(&Layer) -> u64| layers().map(of).fold(0, u64::saturating_add);
    let name = &stack.name;
    let changes = stack.changes.as_ref();
    let store = changes.map_or("", |changes| changes.file.as_str());
    match health {
        Health::Ok => word.to_owned(),
        Health::Lost => format!(
            "{word}: a write to {store} failed, and with it all that was written to the disk is lost; dmesg \
             says what is wrong with the storage below"
        ),
        Health::Full => format!(
            "{word}: {store} has no room for what is written to the disk, and writes fail; close the stack, \
             open it with a larger --store-size, and check the file system"
        ),
        Health::NearlyFull => {
            let percent = changes.map_or(0, Changes::percent);
            format!(
                "{word}: {percent} % of what {store} can hold is used, and writes fail when it is full; make \
                 room on its file system, or close the stack and open it with a larger --store-size"
            )
        }
        Health::Corrupt => {
            let times = times(sum(|layer| layer.corrupt_blocks));
            format!(
                "{word}: a corrupt block of {file} was read{times}{more}; `obdsetup verify' of \
                 that file lists its corrupt blocks"
            )
        }
        Health::Cut => {
            let (there, size) = first.and_then(|layer| layer.cut).unwrap_or_default();
            format!(
                "{word}: {file} has {there} bytes now, and had {size} when it was opened{more}; \
                 close the stack, restore the file, open again"
            )
        }
        Health::ReadErrors if first.is_none() => {
            let times = times(stack.failed_reads());
            format!(
                "{word}: a read of the disk failed{times}, in a layer that counts no errors; dmesg \
                 says which device has failed"
            )
        }
        Health::ReadErrors => {
            let times = times(sum(|layer| layer.read_errors));
            format!(
                "{word}: a read of {file} failed{times}{more}; dmesg says what is wrong with the \
                 storage below"
            )
        }
        Health::HalfBuilt => {
            format!("{word}: an open or close was killed; `obdsetup close {name}' clears it")
        }
        Health::Busy => format!("{word}: being set up or taken down"),
        Health::Suspended => {
            let mut devices = stack
                .devices
                .iter()
                .filter(|(_, device)| device.state.suspended);
            let device = devices.next().map_or("", |(_, device)| &device.state.name);
            format!("{word}: reads wait until `dmsetup resume {device}'")
        }
    }
}

/// Returns " N times" if N is above 1.
fn times(n: u64) -> String {
    match n {
        0 | 1 => String::new(),
        n => format!(" {n} times"),
    }
}

/// Returns notes about a stack that don't concern its health.
pub(crate) fn notes(stack: &Stack) -> Vec<String> {
    let mut notes = Vec::new();
    let Some(top) = stack.top() else {
        return notes;
    };
    if top.state.name != stack.name {
        notes.push(format!("was renamed: it was opened as {}", stack.name));
    }
    if top.deferred_remove {
        notes.push("is removed when nobody has it open (close --deferred)".to_owned());
    }
    notes
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layer(file: &str) -> Layer {
        Layer {
            file: file.to_owned(),
            ..Layer::default()
        }
    }

    #[test]
    fn the_worst_counts() {
        let corrupt = Layer {
            corrupt_blocks: 3,
            read_errors: 1,
            ..layer("/a")
        };
        let failed = Layer {
            read_errors: 1,
            ..layer("/b")
        };
        let cut = Layer {
            cut: Some((5, 1024)),
            read_errors: 9,
            ..layer("/c")
        };
        // Without its disk, the stack is half built, too.
        let mut stack = Stack {
            name: "app".to_owned(),
            devices: Vec::new(),
            layers: vec![layer("/d")],
            changes: None,
            shared_with: Vec::new(),
            busy: true,
        };
        let store = |used, overflowed, lost| {
            Some(Changes {
                file: "/store".to_owned(),
                used,
                size: 100,
                free: None,
                allocated: None,
                holds_all: false,
                overflowed,
                lost,
            })
        };
        stack.changes = store(95, false, false);
        assert_eq!(Health::of(&stack), Health::Busy);
        stack.changes = store(95, true, false);
        let text = line(&stack);
        assert!(text.starts_with("FULL: /store has no room "), "{text}");
        stack.changes = store(95, true, true);
        let text = line(&stack);
        assert!(text.starts_with("LOST: a write to /store failed"), "{text}");
        assert_eq!(Health::of(&stack).code(), 4);
        let nearly = store(95, false, false).map(|changes| Health::of_changes(&changes));
        assert_eq!(nearly.map(Health::code), Some(4));
        stack.changes = None;
        assert_eq!(Health::of(&stack).code(), 0);
        assert_eq!(line(&stack), "busy: being set up or taken down");
        stack.busy = false;
        let mut said = |more: Layer| {
            stack.layers.push(more);
            (Health::of(&stack).code(), line(&stack))
        };
        let (code, text) = said(layer("/e"));
        assert_eq!(code, 4);
        assert!(text.starts_with("HALF BUILT: ") && text.contains("`obdsetup close app'"));
        let (code, text) = said(failed);
        assert_eq!(code, 4);
        assert!(
            text.starts_with("READ ERRORS: a read of /b failed; "),
            "{text}"
        );
        let (code, text) = said(cut);
        assert_eq!(code, 4);
        assert!(
            text.starts_with("CUT SHORT: /c has 5 bytes now, and had 1024 "),
            "{text}"
        );
        let (code, text) = said(corrupt.clone());
        assert_eq!(code, 3);
        let start = "CORRUPT: a corrupt block of /a was read 3 times; ";
        assert!(text.starts_with(start), "{text}");
        let (_, text) = said(corrupt);
        let start = "CORRUPT: a corrupt block of /a was read 6 times (total of 2 such layers); ";
        assert!(text.starts_with(start), "{text}");
    }
}
