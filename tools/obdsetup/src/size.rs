// SPDX-License-Identifier: GPL-2.0

//! Sizes on the command line.

/// Reads a number of bytes: digits, perhaps followed by `k`, `m`, `g` or `t` (powers of 1024).
pub(crate) fn parse(text: &str) -> Result<u64, String> {
    let wrong = || format!("`{text}` is not a size such as 512, 64k, 10m, 1g or 2t");
    let lower = text.to_ascii_lowercase();
    let lower = lower.trim_end_matches("ib").trim_end_matches('b');
    let (digits, shift) = match lower.chars().last() {
        Some('k') => (lower.trim_end_matches('k'), 10),
        Some('m') => (lower.trim_end_matches('m'), 20),
        Some('g') => (lower.trim_end_matches('g'), 30),
        Some('t') => (lower.trim_end_matches('t'), 40),
        _ => (lower, 0),
    };
    let number: u64 = digits.parse().map_err(|_| wrong())?;
    number.checked_mul(1 << shift).ok_or_else(wrong)
}

/// Reads a size that fits in 32 bits.
pub(crate) fn parse_u32(text: &str) -> Result<u32, String> {
    u32::try_from(parse(text)?).map_err(|_| format!("`{text}` is too large"))
}

/// A size for people: exact bytes, and about how much that is.
pub(crate) fn show(bytes: u64) -> String {
    match bytes {
        0..1024 => format!("{bytes} bytes"),
        _ => format!("{bytes} bytes ({})", indicatif::BinaryBytes(bytes)),
    }
}

#[cfg(test)]
mod tests {
    use super::parse;

    #[test]
    fn sizes() {
        assert_eq!(parse("512"), Ok(512));
        assert_eq!(parse("64k"), Ok(65536));
        assert_eq!(parse("1GiB"), Ok(1 << 30));
        assert!(parse("k").is_err());
        assert!(parse("-1").is_err());
        assert!(parse("99999999999t").is_err());
    }
}
