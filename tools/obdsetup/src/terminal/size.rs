// SPDX-License-Identifier: GPL-2.0

//! Sizes on the command line.

/// Parses a number of bytes: digits, perhaps followed by `k`, `m`, `g` or `t` (powers of 1024), also as `kB` or
/// `KiB`.
pub(crate) fn parse(text: &str) -> Result<u64, String> {
    let wrong = || format!("`{text}` is not a size such as 512, 64k, 10m, 1g or 2t");
    let end = text.find(|c: char| !c.is_ascii_digit());
    let (digits, unit) = text.split_at(end.unwrap_or(text.len()));
    let shift = match unit.to_ascii_lowercase().as_str() {
        "" | "b" => 0,
        "k" | "kb" | "kib" => 10,
        "m" | "mb" | "mib" => 20,
        "g" | "gb" | "gib" => 30,
        "t" | "tb" | "tib" => 40,
        _ => return Err(wrong()),
    };
    let number: u64 = digits.parse().map_err(|_| wrong())?;
    number.checked_mul(1 << shift).ok_or_else(wrong)
}

/// Returns a size for people: the exact number of bytes, and an approximate size.
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
        for wrong in [
            "",
            "k",
            "-1",
            "+1",
            " 1",
            "1 k",
            "1kk",
            "1bb",
            "1ib",
            "1.5g",
            "99999999999t",
        ] {
            assert!(parse(wrong).is_err(), "{wrong}");
        }
    }
}
