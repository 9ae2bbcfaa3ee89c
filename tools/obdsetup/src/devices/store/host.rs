// SPDX-License-Identifier: GPL-2.0

//! The machine on which a store is open. The store records the machine, because locks and sysfs don't show what other
//! machines have open.

use std::fs;
use std::path::Path;

use overlaybd::changes::Host;

/// Returns this machine.
pub(super) fn this() -> Host {
    Host {
        // Unknown in an initramfs, whose machine ID may differ after each boot.
        machine: match Path::new("/etc/initrd-release").exists() {
            true => [0; 16],
            false => id("/etc/machine-id"),
        },
        boot: id("/proc/sys/kernel/random/boot_id"),
    }
}

/// Returns the ID in a file; zeros if there is none.
fn id(path: &str) -> [u8; 16] {
    parse(&fs::read_to_string(path).unwrap_or_default()).unwrap_or_default()
}

/// Parses 32 hexadecimal digits, with or without the hyphens of a UUID.
fn parse(text: &str) -> Option<[u8; 16]> {
    let digits: String = text.trim_end().chars().filter(|&c| c != '-').collect();
    let is_right = digits.len() == 32 && digits.bytes().all(|digit| digit.is_ascii_hexdigit());
    let number = u128::from_str_radix(&digits, 16).ok()?;
    is_right.then(|| number.to_be_bytes())
}

/// Returns an ID in the form of machine-id(5).
pub(super) fn show(id: [u8; 16]) -> String {
    format!("{:032x}", u128::from_be_bytes(id))
}

#[cfg(test)]
mod tests {
    use super::{parse, show};

    #[test]
    fn ids() {
        let text = "0123456789abcdef0123456789abcdef";
        assert_eq!(parse(&format!("{text}\n")).map(show).as_deref(), Some(text));
        let uuid = "01234567-89ab-cdef-0123-456789abcdef\n";
        assert_eq!(parse(uuid).map(show).as_deref(), Some(text));
        for wrong in [
            "",
            "uninitialized\n",
            &text[1..],
            "+123456789abcdef0123456789abcdef",
        ] {
            assert_eq!(parse(wrong), None, "{wrong}");
        }
    }
}
