// SPDX-License-Identifier: GPL-2.0

//! Makes tars, block by block.

/// Returns a header with a correct checksum.
pub(crate) fn header(name: &str, kind: u8, size: usize) -> Vec<u8> {
    let mut block = vec![0; 512];
    let mut put = |at: usize, bytes: &[u8]| block[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, name.as_bytes());
    put(100, b"0000755\0");
    put(108, b"0001750\0");
    put(116, b"0000144\0");
    put(124, format!("{size:011o}\0").as_bytes());
    put(136, b"14524770400\0");
    put(156, &[kind]);
    put(257, b"ustar\x0000");
    sign(&mut block);
    block
}

/// Corrects the checksum of the header at the start of `block`.
pub(crate) fn sign(block: &mut [u8]) {
    block[148..156].fill(b' ');
    let sum: u32 = block[..512].iter().map(|&byte| u32::from(byte)).sum();
    block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
}

/// Returns a header and the content, padded to whole blocks.
pub(crate) fn member(name: &str, kind: u8, content: &[u8]) -> Vec<u8> {
    let mut block = header(name, kind, content.len());
    block.extend_from_slice(content);
    block.resize(block.len().next_multiple_of(512), 0);
    block
}

/// Returns an extended header for the next member, with these keys and values.
pub(crate) fn pax(records: &[(&[u8], &[u8])]) -> Vec<u8> {
    let mut text = Vec::new();
    for (key, value) in records {
        let rest = key.len() + value.len() + 3;
        let mut len = rest + 1;
        while len != rest + len.to_string().len() {
            len = rest + len.to_string().len();
        }
        text.extend_from_slice(format!("{len} ").as_bytes());
        text.extend_from_slice(&[*key, b"=", *value, b"\n"].concat());
    }
    member("PaxHeaders/x", b'x', &text)
}

/// Returns a whole archive, with an end marker.
pub(crate) fn tar(members: &[Vec<u8>]) -> Vec<u8> {
    let mut tar = members.concat();
    tar.resize(tar.len() + 1024, 0);
    tar
}
