// SPDX-License-Identifier: GPL-2.0

//! `Documentation/troubleshooting.rst` has every message: the kernel's phrases and log lines, the
//! library's errors, and what `status` says.

#![allow(missing_docs, clippy::unwrap_used)]

use std::fs;
use std::path::{Path, PathBuf};

use overlaybd::format::Fault;
use walkdir::WalkDir;

/// Fewest words of a piece of a message that can be searched for.
const WORDS: usize = 2;

fn clone() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

/// A text with one blank where there are several, or line breaks.
fn plain(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

fn page() -> String {
    plain(&fs::read_to_string(clone().join("Documentation/troubleshooting.rst")).unwrap())
}

/// What a file of Rust has in front of its tests, without comments.
fn source(path: &Path) -> String {
    let text = fs::read_to_string(path).unwrap();
    let text = text.split("#[cfg(test)]").next().unwrap();
    let lines = text
        .lines()
        .filter(|line| !line.trim_start().starts_with("//"));
    lines.collect::<Vec<_>>().join("\n")
}

/// The string literals in a source, those with `prefix` in front of them.
fn literals(source: &str, prefix: &str) -> Vec<String> {
    let mut found = Vec::new();
    let mut rest = source;
    while let Some(start) = rest.find('"') {
        let wanted = rest[..start].ends_with(prefix);
        rest = &rest[start + 1..];
        let mut text = String::new();
        let mut end = rest.len();
        let mut chars = rest.char_indices();
        while let Some((at, c)) = chars.next() {
            match c {
                '"' => {
                    end = at + 1;
                    break;
                }
                '\\' => match chars.next() {
                    // A line that goes on: all blanks after it are left out.
                    Some((_, '\n')) => {
                        while chars.as_str().starts_with(char::is_whitespace) {
                            chars.next();
                        }
                    }
                    Some((_, 'n')) => text.push('\n'),
                    Some((_, other)) => text.push(other),
                    None => {}
                },
                c => text.push(c),
            }
        }
        rest = &rest[end..];
        if wanted {
            found.push(text);
        }
    }
    found
}

/// What of a format string is the same in each message.
fn pieces(format: &str) -> Vec<String> {
    let mut pieces = vec![String::new()];
    let mut depth = 0;
    for c in format.chars() {
        match c {
            '{' => {
                depth += 1;
                pieces.push(String::new());
            }
            '}' => depth -= 1,
            c if depth == 0 => pieces.last_mut().unwrap().push(c),
            _ => {}
        }
    }
    let trimmed = pieces.iter().map(|piece| {
        let piece = piece.trim_matches(|c: char| !c.is_alphanumeric() && c != '`' && c != '\'');
        plain(piece)
    });
    trimmed
        .filter(|piece| piece.split(' ').count() >= WORDS)
        .collect()
}

#[test]
fn phrases_of_the_kernel() {
    let page = page();
    let mut count = 0;
    for entry in WalkDir::new(clone().join("rust")) {
        let entry = entry.unwrap();
        if entry.path().extension().is_none_or(|name| name != "rs") {
            continue;
        }
        for phrase in literals(&source(entry.path()), "c") {
            if phrase.starts_with(|c: char| c.is_ascii_uppercase()) {
                count += 1;
                assert!(
                    page.contains(&phrase),
                    "{}: {phrase}",
                    entry.path().display()
                );
            }
        }
        for line in source(entry.path()).split("pr_err!(").skip(1) {
            let format = literals(line, "").into_iter().next().unwrap();
            for piece in pieces(&format) {
                assert!(page.contains(&piece), "{}: {piece}", entry.path().display());
            }
        }
    }
    // Those of the image, and those of the table line.
    assert!(count >= Fault::ALL.len() + 15, "{count}");
}

#[test]
fn faults_of_images() {
    let page = page();
    for fault in Fault::ALL {
        let row = format!("{} {} ", fault.phrase().to_str().unwrap(), fault.field());
        assert!(page.contains(&plain(&row)), "{row}");
    }
}

#[test]
fn errors_of_user_space() {
    let page = page();
    let mut count = 0;
    for file in [
        "overlaybd/src/error.rs",
        "obdsetup/src/dm/access.rs",
        "obdsetup/src/overview/health.rs",
    ] {
        let text = source(&clone().join("tools").join(file));
        for literal in literals(&text, "") {
            for piece in pieces(&literal) {
                count += 1;
                assert!(page.contains(&piece), "{file}: {piece:?} of {literal:?}");
            }
        }
    }
    assert!(count >= 25, "{count}");
}

#[test]
fn what_counts_as_a_message() {
    let source = "a(\"one \\\"two\\\" \\\n     three\", c\"Phrase of it\")";
    assert_eq!(literals(source, ""), ["one \"two\" three", "Phrase of it"]);
    assert_eq!(literals(source, "c"), ["Phrase of it"]);
    let format = "{x}: zfile block {n:#x} at byte {at}: no";
    assert_eq!(pieces(format), ["zfile block", "at byte"]);
}
