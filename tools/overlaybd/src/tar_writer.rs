// SPDX-License-Identifier: GPL-2.0

//! The tar wrapper as upstream's `overlaybd-commit -t` writes it: a pax header with the size, and a
//! ustar header with size 0.

use crate::format::num::to_u64;

/// Length of the headers before the payload, in bytes.
pub const HEAD_LEN: u64 = 1536;

/// Returns the three blocks before a payload of `len` bytes.
pub fn head(len: u64) -> Vec<u8> {
    let record = pax_record("size", &len.to_string());
    let mut head = header("overlaybd.pax", b'x', None, to_u64(record.len()));
    head.extend_from_slice(record.as_bytes());
    head.resize(1024, 0);
    head.extend_from_slice(&header("overlaybd.commit", b'0', Some("root"), 0));
    head
}

/// Returns what follows a payload of `len` bytes: padding to a whole block, and two blocks of
/// zeros.
pub fn tail(len: u64) -> Vec<u8> {
    let pad = usize::try_from(len.next_multiple_of(512) - len).unwrap_or_default();
    vec![0; pad + 1024]
}

/// Returns a pax record, which starts with its own length.
fn pax_record(key: &str, value: &str) -> String {
    let body = format!(" {key}={value}\n");
    let mut len = body.len() + 1;
    while body.len() + len.to_string().len() != len {
        len = body.len() + len.to_string().len();
    }
    format!("{len}{body}")
}

/// Returns a header block. `owner` adds the fields that upstream writes for a regular file but not
/// for a pax header.
fn header(name: &str, kind: u8, owner: Option<&str>, size: u64) -> Vec<u8> {
    let mut block = vec![0u8; 512];
    let mut put = |at: usize, text: &str| {
        for (byte, source) in block.iter_mut().skip(at).zip(text.bytes()) {
            *byte = source;
        }
    };
    put(0, name);
    put(124, &format!("{size:>11o} "));
    put(257, "ustar");
    put(263, "00");
    put(148, "        ");
    if let Some(owner) = owner {
        put(100, &format!("{:>6o} ", 0o100_644));
        put(108, &format!("{:>6o} ", 0));
        put(116, &format!("{:>6o} ", 0));
        put(136, &format!("{:>11o} ", 0));
        put(265, owner);
        put(297, owner);
    }
    if let Some(byte) = block.get_mut(156) {
        *byte = kind;
    }
    let sum: u32 = block.iter().map(|&byte| u32::from(byte)).sum();
    for (byte, source) in block
        .iter_mut()
        .skip(148)
        .zip(format!("{sum:>6o} \0").bytes())
    {
        *byte = source;
    }
    block
}
