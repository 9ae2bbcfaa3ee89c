// SPDX-License-Identifier: GPL-2.0

//! `Documentation/troubleshooting.rst` has every message: the kernel's phrases and log lines, the
//! library's errors, what `status` says, and all texts of obdsetup itself.

use std::fs;
use std::path::{Path, PathBuf};

use overlaybd::format::Fault;
use walkdir::WalkDir;

use crate::common::tests;

tests! {
    phrases_of_the_kernel;
    faults_of_images;
    errors_of_user_space;
    what_obdsetup_says;
    what_counts_as_a_message;
}

/// Pieces of messages with fewer words are not searched for.
const WORDS: usize = 2;

fn clone() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

/// Replaces blanks and line breaks in a row by one blank.
fn plain(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

fn page() -> String {
    let page = fs::read_to_string(clone().join("Documentation/troubleshooting.rst")).unwrap();
    let page = plain(&page);
    // Literals are in double backquotes in the page, and in single ones in messages.
    format!("{page} {}", page.replace("``", "`"))
}

/// Returns a Rust source up to its tests, without lines of comments.
fn source(path: &Path) -> String {
    let text = fs::read_to_string(path).unwrap();
    let text = text.split("#[cfg(test)]").next().unwrap();
    let lines = text
        .lines()
        .filter(|line| !line.trim_start().starts_with("//"));
    lines.collect::<Vec<_>>().join("\n")
}

/// Returns the string literals of a source that have `prefix` before the quote.
fn literals(source: &str, prefix: &str) -> Vec<String> {
    let mut found = Vec::new();
    let mut rest = source;
    while let Some(start) = rest.find('"') {
        // The character literal `'"'` begins no string.
        let alone = rest[..start].ends_with('\'') && rest[start + 1..].starts_with('\'');
        let wanted = !alone && rest[..start].ends_with(prefix);
        rest = &rest[start + 1..];
        if alone {
            continue;
        }
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
                    // The string continues in the next line, after the blanks at its start.
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

/// Returns the parts of a format string, of at least [`WORDS`] words, that are the same in each message.
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
    // Phrases for each fault of an image, and for errors in a table line.
    assert!(count >= Fault::ALL.len() + 15, "{count}");
}

fn faults_of_images() {
    let page = page();
    for fault in Fault::ALL {
        let row = format!("{} {} ", fault.phrase().to_str().unwrap(), fault.field());
        assert!(page.contains(&plain(&row)), "{row}");
    }
}

fn errors_of_user_space() {
    let page = page();
    let mut count = 0;
    for file in [
        "overlaybd/src/error.rs",
        "overlaybd/src/changes/fault.rs",
        "obdsetup/src/devices/dm/access.rs",
        "obdsetup/src/devices/overview/health.rs",
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

/// String literals of two words or more that are no messages: file, start of the literal, reason.
const NO_MESSAGES: &[(&str, &str, &str)] = &[
    ("cmd/benchmark.rs", "# In memory", "a heading of results"),
    (
        "cmd/create.rs",
        "neither --image",
        "the command line is refused before",
    ),
    (
        "cmd/info.rs",
        "lsmt ",
        "a name of a field; obdsetup(8) has them",
    ),
    ("cmd/info.rs", "tar ", "as above"),
    ("cmd/info.rs", "zfile ", "as above"),
    ("cmd/info.rs", "over the parent", "what a field says"),
    ("cmd/list.rs", "{:<width$}", "a heading of results"),
    ("cmd/man.rs", "SEE ALSO", "a heading of a manual page"),
    ("cmd/man.rs", "System Administration", "as above"),
    (
        "cmd/open.rs",
        "a layer without a file",
        "the plan names the layers that there are",
    ),
    (
        "cmd/open.rs",
        "a plan with a store, and none",
        "the plan has the store that there is",
    ),
    ("cmd/status.rs", "deferred remove", "a name of a field"),
    ("cmd/status.rs", "open count", "as above"),
    (
        "devices/dm/control.rs",
        "Command failed",
        "what dmsetup says, left out",
    ),
    (
        "devices/dm/inspect.rs",
        "DEFERRED REMOVE",
        "what dmsetup says",
    ),
    ("devices/dm/share.rs", "cache auto", "what dmsetup is told"),
    (
        "devices/dm/setup.rs",
        "Block devices:",
        "what the kernel says",
    ),
    (
        "devices/dm/udev.rs",
        "udev cookies",
        "what is kept in a file",
    ),
    ("terminal/exit.rs", "Exit codes:", "a part of --help"),
    ("boot/generator.rs", "# Automatically", "a unit file"),
    ("boot/generator.rs", "\n[Service]", "as above"),
    (
        "terminal/mod.rs",
        " (os error ",
        "what is left out of messages",
    ),
    (
        "make/mkfs/btrfs/mod.rs",
        "chunk tree",
        "what a UUID is made of",
    ),
    (
        "make/mkfs/ext/mod.rs",
        "Could not allocate",
        "what mke2fs says",
    ),
    ("make/mkfs/ext/mod.rs", "Not enough space", "as above"),
    ("make/mkfs/ext/mod.rs", "Illegal inode", "as above"),
    ("make/mkfs/ext/mod.rs", "debugfs 1.", "what debugfs says"),
    (
        "make/mkfs/ext/mod.rs",
        "Insufficient space",
        "what debugfs says",
    ),
    ("make/mkfs/ext/mod.rs", "debugfs: ", "as above"),
    ("make/mkfs/ext/mod.rs", "ls -l ", "a command for debugfs"),
    (
        "make/mkfs/btrfs/files.rs",
        "a file without inode",
        "a bug, if it is ever seen",
    ),
    ("make/mkfs/btrfs/files.rs", "no room for data", "as above"),
    (
        "make/mkfs/btrfs/format.rs",
        "an item does not fit",
        "as above",
    ),
    ("make/mkfs/btrfs/format.rs", "too many items", "as above"),
    ("make/mkfs/btrfs/format.rs", "too many pointers", "as above"),
    (
        "make/mkfs/btrfs/mod.rs",
        "content of what is no file",
        "as above",
    ),
    ("make/mkfs/btrfs/mod.rs", "data without a place", "as above"),
    (
        "make/mkfs/btrfs/mod.rs",
        "the metadata does not fit",
        "as above",
    ),
    (
        "make/mkfs/btrfs/pack.rs",
        "a block has no place",
        "as above",
    ),
    (
        "make/mkfs/erofs/fresh.rs",
        "a file without a place",
        "as above",
    ),
    ("make/mkfs/erofs/grow.rs", "no plan", "as above"),
    (
        "make/mkfs/erofs/write.rs",
        "a file without a place",
        "as above",
    ),
    (
        "make/mkfs/erofs/write.rs",
        "an extended attribute of an unknown",
        "as above",
    ),
    (
        "make/mkfs/erofs/write.rs",
        "data without a place",
        "as above",
    ),
    (
        "make/mkfs/erofs/write.rs",
        "no place for a fingerprint",
        "as above",
    ),
    ("make/mkfs/ext/mod.rs", "a file has no inode", "as above"),
    ("make/mkfs/ext/mod.rs", "no such name", "as above"),
    (
        "make/mkfs/from_tar.rs",
        "a directory was not made",
        "as above",
    ),
    ("make/mkfs/pax.rs", "a tar cannot hold sockets", "as above"),
    ("make/mkfs/stamp.rs", "hash too short", "as above"),
    ("make/mkfs/witness.rs", "no random numbers", "as above"),
    ("make/mkfs/tree.rs", "no such node", "as above"),
    ("make/mkfs/tree.rs", "node {id} is no directory", "as above"),
    (
        "oci/cache.rs",
        "obdsetup image layer",
        "what a name is made of",
    ),
    (
        "program/guard.rs",
        "{NAME}: for obdsetup's",
        "nobody runs it by hand",
    ),
    ("program/mod.rs", "No space left", "what programs say"),
    ("program/mod.rs", "Disk quota", "as above"),
    (
        "program/mod.rs",
        "the user has to see",
        "for developers of obdsetup",
    ),
];

/// Each string literal of two words or more is taken for a message, unless it is in [`NO_MESSAGES`]. So no
/// message is missed, whichever function prints it.
fn what_obdsetup_says() {
    let page = page();
    let src = clone().join("tools/obdsetup/src");
    let mut unused: Vec<_> = NO_MESSAGES.iter().collect();
    let mut missing = Vec::new();
    let mut count = 0;
    for entry in WalkDir::new(&src).sort_by_file_name() {
        let entry = entry.unwrap();
        let file = entry.path().strip_prefix(&src).unwrap().to_str().unwrap();
        if !file.ends_with(".rs") || file.ends_with("tests.rs") {
            continue;
        }
        // The help of a command is no message.
        let text = source(entry.path()).replace("after_help = \"", "help(b\"");
        let bytes = literals(&text, "b");
        for literal in literals(&text, "") {
            let known =
                |(of, start, _): &(&str, &str, &str)| *of == file && literal.starts_with(start);
            if bytes.contains(&literal) {
                continue;
            }
            if NO_MESSAGES.iter().any(known) {
                unused.retain(|exception| !known(exception));
                continue;
            }
            for piece in pieces(&literal) {
                count += 1;
                if !page.contains(&piece) {
                    missing.push(format!("{file}: {piece}"));
                }
            }
        }
    }
    assert!(
        missing.is_empty(),
        "not in the page:\n{}",
        missing.join("\n")
    );
    assert!(unused.is_empty(), "no such texts: {unused:?}");
    assert!(count >= 400, "{count}");
}

fn what_counts_as_a_message() {
    let source = "a(\"one \\\"two\\\" \\\n     three\", c\"Phrase of it\")";
    assert_eq!(literals(source, ""), ["one \"two\" three", "Phrase of it"]);
    assert_eq!(literals(source, "c"), ["Phrase of it"]);
    assert_eq!(literals("['\"', \"as it is\"]", ""), ["as it is"]);
    let format = "{x}: zfile block {n:#x} at byte {at}: no";
    assert_eq!(pieces(format), ["zfile block", "at byte"]);
}
