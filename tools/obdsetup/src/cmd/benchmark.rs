// SPDX-License-Identifier: GPL-2.0

//! `obdsetup benchmark`.

use std::fmt::Write;
use std::hint::black_box;
use std::time::{Duration, Instant};

use anyhow::{anyhow, Result};
use overlaybd::codec::{Decoder, Encoder, Method};
use overlaybd::crc32c;
use overlaybd::format::num::to_u64;
use overlaybd::format::zfile::{block_crc, Algorithm};
use serde::Serialize;

use crate::terminal::interrupt;
use crate::terminal::{print, print_json};

/// Arguments of `benchmark`.
#[derive(clap::Args)]
#[command(after_help = "Examples:
  obdsetup benchmark
  obdsetup benchmark --json | jq '.decompression[] | select(.block_size==65536)'

Decompresses in memory, with one thread and no I/O, and shows the decompressed bytes per second. The \
sample is artificial, the same on all machines, and compressed with the levels that `create` uses by \
default. The kernel has other decompressors than obdsetup, and their speed may differ. Takes a few \
seconds.")]
pub(crate) struct Args {
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Bytes of the sample: more than the caches of a single CPU usually hold.
const SAMPLE: usize = 4 << 20;
/// Shortest time of a measurement.
const AT_LEAST: Duration = Duration::from_millis(200);
const BLOCK_SIZES: [usize; 5] = [4096, 8192, 16384, 32768, 65536];

#[derive(Serialize)]
struct Report {
    sample_size: usize,
    decompression: Vec<Speed>,
    crc32c: Crc,
}

#[derive(Serialize)]
struct Speed {
    algorithm: &'static str,
    block_size: usize,
    /// Stored bytes per byte of the sample.
    ratio: f64,
    /// Decompressed bytes per second.
    bytes_per_second: f64,
}

#[derive(Serialize)]
struct Crc {
    bytes_per_second: f64,
}

/// Runs `benchmark`.
pub(crate) fn run(args: &Args) -> Result<()> {
    let sample = sample(SAMPLE);
    let mut decompression = Vec::new();
    for algorithm in [Algorithm::Lz4, Algorithm::Zstd] {
        for block_size in BLOCK_SIZES {
            decompression.push(decompress(&sample, algorithm, block_size)?);
        }
    }
    let report = Report {
        sample_size: sample.len(),
        decompression,
        crc32c: Crc {
            bytes_per_second: rate(sample.len(), || {
                for block in sample.chunks(4096) {
                    black_box(block_crc(black_box(block), crc32c));
                }
                Ok(())
            })?,
        },
    };
    match args.json {
        true => print_json(&report),
        false => print(&describe(&report)),
    }
}

fn describe(report: &Report) -> String {
    let mib = |rate: f64| rate / f64::from(1 << 20);
    let mut text = String::from(
        "# In memory, one thread, no I/O; MiB/s of decompressed data\n\
         # Algorithm | Block size | Compressed to |        Speed\n",
    );
    for speed in &report.decompression {
        let _ = writeln!(
            text,
            "{:>11}   {:>9}k   {:>12.1}%   {:>7.0} MiB/s",
            speed.algorithm,
            speed.block_size / 1024,
            speed.ratio * 100.0,
            mib(speed.bytes_per_second)
        );
    }
    let crc = mib(report.crc32c.bytes_per_second);
    let _ = writeln!(
        text,
        "{:>11}   {:>10}   {:>13}   {crc:>7.0} MiB/s",
        "CRC-32C", "-", "-"
    );
    text
}

/// Compresses `sample` in blocks, and measures how fast it is decompressed.
fn decompress(sample: &[u8], algorithm: Algorithm, block_size: usize) -> Result<Speed> {
    let method = Method {
        algorithm,
        level: None,
    };
    let mut encoder = Encoder::new(method)?;
    let mut stored = Vec::new();
    let mut ends = Vec::new();
    for block in sample.chunks(block_size) {
        encoder.encode(block, &mut stored)?;
        ends.push(stored.len());
    }
    let mut decoder = Decoder::default();
    // As large as the sample: reads of a disk don't write to the same memory again and again, either.
    let mut out = vec![0; sample.len()];
    let bytes_per_second = rate(sample.len(), || {
        let mut start = 0;
        for (&end, block) in ends.iter().zip(out.chunks_mut(block_size)) {
            let bytes = stored.get(start..end).unwrap_or_default();
            decoder.decode(algorithm, black_box(bytes), black_box(block))?;
            start = end;
        }
        Ok(())
    })?;
    if out != sample {
        return Err(anyhow!("{} gives other bytes back", algorithm.name()));
    }
    Ok(Speed {
        algorithm: algorithm.name(),
        block_size,
        ratio: to_u64(stored.len()) as f64 / to_u64(sample.len()) as f64,
        bytes_per_second,
    })
}

/// Calls `pass`, which processes `bytes` bytes, several times. Returns the bytes per second of the fastest
/// call, because other work on the machine can only make it slower. The first call isn't measured: the kernel
/// still has to allocate memory then.
fn rate(bytes: usize, mut pass: impl FnMut() -> Result<()>) -> Result<f64> {
    pass()?;
    let start = Instant::now();
    let mut best = Duration::MAX;
    while start.elapsed() < AT_LEAST {
        interrupt::check()?;
        let this = Instant::now();
        pass()?;
        best = best.min(this.elapsed());
    }
    Ok(to_u64(bytes) as f64 / best.as_secs_f64())
}

/// Returns words of an invented language with random bytes and zeros between them. It compresses to about
/// half its size, like programs.
fn sample(len: usize) -> Vec<u8> {
    let mut random = Random(1);
    let words: Vec<Vec<u8>> = (0..4096)
        .map(|_| {
            let len = 2 + random.below(10);
            (0..len).map(|_| b'a' + random.byte() % 26).collect()
        })
        .collect();
    let mut sample = Vec::with_capacity(len + 64);
    while sample.len() < len {
        match random.below(8) {
            0 => sample.extend((0..16).map(|_| random.byte())),
            1 => sample.extend([0; 24]),
            _ => {
                // Some words are more frequent than others.
                let nth = random.below(64) * random.below(64);
                sample.extend(words.get(nth).into_iter().flatten());
                sample.push(b' ');
            }
        }
    }
    sample.truncate(len);
    sample
}

/// A linear congruential generator. It returns the same numbers on every machine.
struct Random(u32);

impl Random {
    fn byte(&mut self) -> u8 {
        self.0 = self.0.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        self.0.to_be_bytes()[0]
    }

    /// Returns a number below `end`, which is at most 256.
    fn below(&mut self, end: usize) -> usize {
        usize::from(self.byte()) % end
    }
}
