// SPDX-License-Identifier: GPL-2.0

//! The tar wrapper. The target compares the reader with a model that has the whole file in memory
//! and parses it as text.

#![no_main]
#![allow(missing_docs, clippy::expect_used, clippy::panic)]

use libfuzzer_sys::arbitrary::{Result, Unstructured};
use libfuzzer_sys::fuzz_target;
use overlaybd::format::tar::{payload, Payload};
use overlaybd::format::{Blob, Fault};
use overlaybd::tar_writer;
use overlaybd_fuzz::common::{checksum, put};
use overlaybd_fuzz::{init, memory, Sparse};

/// Largest pax payload that is allowed, in bytes.
const MAX_PAX: u128 = 1 << 20;

/// Returns the header block at `at`, with zeros after the end of the blob.
fn block(blob: &Sparse, at: u64) -> [u8; 512] {
    let mut block = [0; 512];
    let there = blob.size().saturating_sub(at).min(512) as usize;
    blob.read_at(at, &mut block[..there])
        .expect("within the blob");
    block
}

fn is_header(block: &[u8; 512]) -> bool {
    let ustar = block.starts_with_at(257, b"ustar") && block.starts_with_at(263, b"00");
    if !ustar && !block.starts_with_at(257, b"ustar  \0") {
        return false;
    }
    let mut bytes = *block;
    bytes[148..156].fill(b' ');
    let unsigned: i128 = bytes.iter().map(|&byte| i128::from(byte)).sum();
    let signed: i128 = bytes.iter().map(|&byte| i128::from(byte as i8)).sum();
    let sum = number(&block[148..156]).map(|sum| sum as i128);
    sum == Some(unsigned) || sum == Some(signed)
}

trait StartsWithAt {
    fn starts_with_at(&self, at: usize, what: &[u8]) -> bool;
}

impl StartsWithAt for [u8; 512] {
    fn starts_with_at(&self, at: usize, what: &[u8]) -> bool {
        self[at..].starts_with(what)
    }
}

/// Parses a number field. Returns `None` if it is malformed or exceeds 64 bits.
fn number(field: &[u8]) -> Option<u128> {
    let number = if field[0] == 0x80 {
        field[1..]
            .iter()
            .fold(0u128, |n, &byte| (n << 8) | u128::from(byte))
    } else {
        let text: String = field.iter().map(|&byte| char::from(byte)).collect();
        let text = text.trim_start_matches([' ', '\t', '\n', '\r', '\x0c']);
        let text = text.split(['\0', ' ']).next().unwrap_or_default();
        match text {
            "" => 0,
            _ if text.starts_with('+') => return None,
            _ => u128::from_str_radix(text, 8).ok()?,
        }
    };
    (number < 1 << 64).then_some(number)
}

/// Returns the last size in a pax payload; `None` if a record is malformed.
fn pax(mut bytes: &[u8]) -> Option<Option<u128>> {
    let decimal = |text: &[u8]| -> Option<u128> {
        let digits = text.iter().all(u8::is_ascii_digit);
        let text = std::str::from_utf8(text).ok().filter(|_| digits)?;
        let text = text.trim_start_matches('0');
        let number = if text.is_empty() {
            0
        } else {
            text.parse().ok()?
        };
        (number < 1 << 64).then_some(number)
    };
    let mut size = None;
    while !bytes.is_empty() {
        let space = bytes
            .iter()
            .position(|&byte| byte == b' ')
            .filter(|&at| at > 0)?;
        let len = usize::try_from(decimal(&bytes[..space])?).ok()?;
        let (head, rest) = (len <= bytes.len() && len >= space + 3).then(|| bytes.split_at(len))?;
        let body = head[space + 1..].strip_suffix(b"\n")?;
        if let Some(value) = body.strip_prefix(b"size=") {
            size = Some(decimal(value)?);
        } else {
            // A newline after the first bytes of `size=` is an error.
            let same = body
                .iter()
                .zip(b"size=")
                .take_while(|(a, b)| a == b)
                .count();
            if body.get(same) == Some(&b'\n') {
                return None;
            }
        }
        bytes = rest;
    }
    Some(size)
}

/// Returns offset and length of the wrapper's content, or the fault.
fn model(blob: &Sparse) -> std::result::Result<Option<(u128, u128)>, Fault> {
    let size = u128::from(blob.size());
    if size < 512 || !is_header(&block(blob, 0)) {
        return Ok(None);
    }
    let mut at = 0u64;
    let mut pax_size = None;
    for _ in 0..64 {
        let header = block(blob, at);
        let len = number(&header[124..136]).ok_or(Fault::TarSize)?;
        let data = u128::from(at) + 512;
        match header[156] {
            b'x' => {
                if len > MAX_PAX {
                    return Err(Fault::TarPax);
                }
                if data + len > size {
                    return Err(Fault::Truncated);
                }
                let mut bytes = vec![0; len as usize];
                blob.read_at(data as u64, &mut bytes)
                    .expect("within the blob");
                pax_size = pax(&bytes).ok_or(Fault::TarPax)?.or(pax_size);
            }
            b'g' | b'L' | b'K' => {}
            b'0' | b'7' | 0 => {
                let len = pax_size.filter(|&len| len > 0).unwrap_or(len);
                let there = data + len <= size;
                return there.then_some(Some((data, len))).ok_or(Fault::TarSize);
            }
            _ => return Err(Fault::TarMember),
        }
        let next = data + len.next_multiple_of(512);
        if next + 512 > size {
            return Err(Fault::TarSize);
        }
        at = next as u64;
        if !is_header(&block(blob, at)) {
            return Err(Fault::TarHeader);
        }
    }
    Err(Fault::TarHeader)
}

/// Corrects the checksum, and with `magic` the magic number, of each header that can be reached
/// from the first.
fn repair(blob: &mut Sparse, magic: bool) {
    let mut at = 0;
    for _ in 0..70 {
        let Some(bytes) = blob.get_mut(at, 512) else {
            return;
        };
        if magic {
            put(bytes, 257, b"ustar\x0000");
        }
        checksum(bytes, 0);
        let (size, kind) = (number(&bytes[124..136]), bytes[156]);
        let next = size.map(|size| u128::from(at) + 512 + size.next_multiple_of(512));
        match next.and_then(|next| u64::try_from(next).ok()) {
            Some(next) if !matches!(kind, b'0' | b'7' | 0) => at = next,
            _ => return,
        }
    }
}

fn check(data: &[u8]) -> Result<()> {
    let mut input = Unstructured::new(data);
    let fixes: u8 = input.arbitrary()?;
    let step: u8 = input.arbitrary()?;
    let gap: u64 = input.arbitrary()?;
    let bytes = input.take_rest().to_vec();
    let size = gap.saturating_add(bytes.len() as u64);
    let mut blob = Sparse::new(size, vec![(0, bytes)]);
    blob.step = usize::from(step) + 1;
    if fixes & 1 != 0 {
        repair(&mut blob, fixes & 2 != 0);
    }

    let (found, used) = memory(|| payload(&blob));
    assert_eq!(used, 0, "reading a wrapper allocates nothing");
    let wanted = model(&blob);
    if let Ok(Some(Payload { start, len })) = found {
        assert!(start >= 512 && start % 512 == 0);
        assert!(u128::from(start) + u128::from(len) <= blob.size().into());
    }
    let found = found
        .map(|payload| payload.map(|payload| (payload.start.into(), payload.len.into())))
        .map_err(|error| error.fault);
    assert_eq!(found, wanted);
    Ok(())
}

fn seeds() -> Vec<Vec<u8>> {
    let head = tar_writer::head(5000);
    let seed = |fixes: u8, gap: u64, bytes: &[u8]| {
        let mut seed = vec![fixes, 0xff];
        seed.extend(gap.to_le_bytes());
        seed.extend(bytes);
        seed
    };
    // Other records, and the size in the header itself.
    let mut records = head.clone();
    let text = b"13 path=a b\n\n20 size=00000000077\n10 SCHILY\n7 a=bc\n";
    put(&mut records, 512, text);
    put(
        &mut records,
        124,
        format!("{:011o}\0", text.len()).as_bytes(),
    );
    let mut plain = head[1024..].to_vec();
    put(&mut plain, 124, b"\x80\0\0\0\0\0\0\0\0\0\x10\0");
    let mut long_name = [&plain[..], &[b'n'; 512], &head].concat();
    put(&mut long_name, 124, b"00000000100\0");
    put(&mut long_name, 156, b"L");
    put(&mut long_name, 257, b"ustar  \0");
    vec![
        seed(0, 10_000, &head),
        seed(1, 10_000, &records),
        seed(1, 1 << 40, &plain),
        seed(1, 5000, &long_name),
        seed(3, 1 << 63, &head),
    ]
}

fuzz_target!(init: init(seeds), |data: &[u8]| {
    let _ = check(data);
});
