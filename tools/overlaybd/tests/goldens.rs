// SPDX-License-Identifier: GPL-2.0

//! Reads every golden image. Images that upstream's tools wrote must read as the manifest says;
//! malformed images must be refused.
//!
//! The images are in `$OBD_GOLDENS`; scripts/lib.sh has the default. Without images, the test
//! prints `skipped: no golden images`, and its only case counts as ignored. Images above 4 GiB take
//! minutes and only run with `--include-ignored`.

use std::collections::HashMap;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use libtest_mimic::{Arguments, Failed, Trial};
use overlaybd::format::Blob;
use overlaybd::{FileBlob, Payload, Stack};
use sha2::{Digest, Sha256};

type Outcome = Result<(), Failed>;

/// Larger images take too long to be read in every run.
const LARGE: u64 = 4 << 30;

fn main() {
    let args = Arguments::from_args();
    let trials = match goldens() {
        Some(dir) => trials(&dir),
        None => {
            println!("skipped: no golden images");
            let name = "goldens (skipped: no golden images, see OBD_GOLDENS)";
            vec![Trial::test(name, || Err("no golden images".into())).with_ignored_flag(true)]
        }
    };
    libtest_mimic::run(&args, trials).exit();
}

/// Returns the directory of the golden images.
fn goldens() -> Option<PathBuf> {
    let dir = PathBuf::from(std::env::var_os("OBD_GOLDENS")?);
    dir.join("MANIFEST.tsv").is_file().then_some(dir)
}

/// A row of a table, by column name.
type Row = HashMap<String, String>;

/// Reads a table whose first line names the columns.
fn read_table(path: &Path) -> Vec<Row> {
    let text = std::fs::read_to_string(path).unwrap_or_default();
    let mut lines = text.lines();
    let names: Vec<&str> = lines.next().unwrap_or_default().split('\t').collect();
    lines
        .map(|line| {
            let values = line.split('\t').map(str::to_owned);
            names
                .iter()
                .map(|&name| name.to_owned())
                .zip(values)
                .collect()
        })
        .collect()
}

fn trials(dir: &Path) -> Vec<Trial> {
    let mut trials = Vec::new();
    for row in read_table(&dir.join("MANIFEST.tsv")) {
        let dir = dir.to_owned();
        let name = row["path"].clone();
        let kind = row["kind"].clone();
        let large =
            row["virtual_size"].parse::<u64>().is_ok_and(|n| n > LARGE) && row["sha256_raw"] != "-";
        let name = match large {
            true => format!("{name} (skipped: takes minutes, see --include-ignored)"),
            false => name,
        };
        let trial: Trial = match kind.as_str() {
            "zfile" => Trial::test(name, move || read_zfile(&dir, &row)),
            "aux" => continue,
            "turboOCI" => Trial::test(name, move || refused(&[dir.join(&row["path"])])),
            "stack-bad" | "bad" => Trial::test(name, move || refused(&layers(&dir, &row))),
            _ if row["path"] == "special/big-4t.lsmt" => {
                trials.push(
                    Trial::test("special/big-4t.probes.tsv", move || read_probes(&dir))
                        .with_kind("probes"),
                );
                continue;
            }
            _ => Trial::test(name, move || read_stack(&dir, &row)).with_ignored_flag(large),
        };
        trials.push(trial.with_kind(kind));
    }
    let malformed = dir.join("malformed");
    for row in read_table(&malformed.join("VERDICTS.tsv")) {
        let malformed = malformed.clone();
        let name = format!("malformed/{}", row["path"]);
        let kind = row["wanted"].clone();
        trials.push(Trial::test(name, move || judge(&malformed, &row)).with_kind(kind));
    }
    trials
}

/// Returns the layers of a row of the manifest, lowest first.
fn layers(dir: &Path, row: &Row) -> Vec<PathBuf> {
    row["layers_lowest_first"]
        .split(',')
        .map(|layer| dir.join(layer))
        .collect()
}

/// Returns the SHA-256 of the first `len` bytes of `blob`, in hexadecimal.
fn sha256<B: Blob<Error = overlaybd::Error>>(blob: &B, len: u64) -> overlaybd::Result<String> {
    let mut hasher = Sha256::new();
    blob.stream(0, len, &mut |piece| {
        hasher.update(piece);
        Ok(())
    })?;
    Ok(hex(&hasher.finalize()))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

fn same(what: &str, found: &str, wanted: &str) -> Outcome {
    if found == wanted {
        return Ok(());
    }
    Err(format!("{what}: found {found}, wanted {wanted}").into())
}

fn read_stack(dir: &Path, row: &Row) -> Outcome {
    let stack = Stack::open(&layers(dir, row))?;
    let size = stack.virtual_size();
    same("virtual size", &size.to_string(), &row["virtual_size"])?;
    // The manifest has no hash of the content of layers that are useless alone.
    if row["sha256_raw"] != "-" {
        same("content", &sha256(&stack, size)?, &row["sha256_raw"])?;
    }
    for layer in stack.layers() {
        let bad = layer.verify(&overlaybd::progress::silent)?;
        if let Some(error) = bad.first() {
            return Err(error.into());
        }
    }
    Ok(())
}

fn read_zfile(dir: &Path, row: &Row) -> Outcome {
    let file = Arc::new(FileBlob::open(&dir.join(&row["path"]), None)?);
    let payload = Payload::open(file)?;
    if payload.zfile().is_none() {
        return Err("not seen as a ZFile".into());
    }
    same("size", &payload.size().to_string(), &row["virtual_size"])?;
    same(
        "content",
        &sha256(&payload, payload.size())?,
        &row["sha256_raw"],
    )
}

fn read_probes(dir: &Path) -> Outcome {
    let stack = Stack::open(&[dir.join("special/big-4t.lsmt")])?;
    for row in read_table(&dir.join("special/big-4t.probes.tsv")) {
        let mut bytes = vec![0; row["length"].parse()?];
        stack.read_at(row["offset"].parse()?, &mut bytes)?;
        same(
            &row["offset"],
            &hex(&Sha256::digest(&bytes)),
            &row["sha256_wanted"],
        )?;
    }
    Ok(())
}

/// Opens the layers as a stack, verifies and reads all of it. Returns its size and SHA-256.
fn read_all(paths: &[PathBuf]) -> overlaybd::Result<(u64, String)> {
    let stack = Stack::open(paths)?;
    for layer in stack.layers() {
        if let Some(&error) = layer.verify(&overlaybd::progress::silent)?.first() {
            return Err(error.into());
        }
    }
    let size = stack.virtual_size();
    Ok((size, sha256(&stack, size)?))
}

fn refused(paths: &[PathBuf]) -> Outcome {
    match read_all(paths) {
        Ok((size, sum)) => Err(format!("reads {size} bytes with sha256 {sum}").into()),
        // A system error is a failure, not a refusal.
        Err(error) if error.io_kind().is_some() => Err(error.into()),
        Err(error) => {
            println!("refused: {error}");
            Ok(())
        }
    }
}

/// Checks the result for a malformed image against the column `wanted`.
fn judge(dir: &Path, row: &Row) -> Outcome {
    let path = dir.join(&row["path"]);
    let wanted = row["wanted"].as_str();
    if wanted.starts_with("reject") {
        return refused(&[path]);
    }
    let (size, sum) = match read_all(&[path]) {
        Ok(read) => read,
        Err(error) if wanted == "either" && error.is_bad_image() => {
            println!("refused: {error}");
            return Ok(());
        }
        Err(error) => return Err(error.into()),
    };
    // The content must be that of the valid image, unless the row says what upstream's reader
    // returns.
    let other = row["upstream_reader"].split("(size ").nth(1);
    let (good_size, good_sum) = match other {
        Some(text) => {
            let mut parts = text.trim_end_matches(')').split(", sha256 ");
            let size = parts.next().unwrap_or_default().parse()?;
            (size, parts.next().unwrap_or_default().to_owned())
        }
        None => read_all(&[dir.join("base.lsmt")])?,
    };
    same("size", &size.to_string(), &good_size.to_string())?;
    if !sum.starts_with(&good_sum) {
        return Err(format!("content {sum}, wanted {good_sum}").into());
    }
    Ok(())
}
