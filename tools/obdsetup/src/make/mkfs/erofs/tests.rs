// SPDX-License-Identifier: GPL-2.0

//! Hostile layers below: whatever bytes they have, the result must be an error or a layer. New file systems: how
//! threads write, and files that change meanwhile.

use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use anyhow::Result;
use overlaybd::format::num::{to_u64, to_usize};
use overlaybd::format::Blob;
use overlaybd::layer::Ident;
use overlaybd::wrap::Wrapping;
use overlaybd::{diff, FileBlob, Stack};
use proptest::prelude::*;
use tempfile::TempDir;

use super::disk::Disk;
use super::write::{Out, BLOCK, INODE};
use super::{grow, read, Fresh, Growing};
use crate::input::archive::Archive;
use crate::make::layer_out::LayerOut;
use crate::make::mkfs::tree::Tree;
use crate::make::mkfs::{from_dir, from_tar, Stamp};
use crate::tars::{self, member, pax, tar};

/// Puts the tar of `members` over the layers below, and writes the layer.
fn apply(below: &[PathBuf], members: &[Vec<u8>], to: &Path) -> Result<()> {
    let place = TempDir::new()?;
    let path = place.path().join("tar");
    std::fs::write(&path, tar(members))?;
    let below = match below {
        [] => None,
        below => Some(Stack::open(below)?),
    };
    let mut archive = Archive::layer(&path, &path, false)?;
    let delta = crate::make::mkfs::apply(&mut archive, &path, below, "", false, place.path())?;
    delta.write(Ident::default(), LayerOut::with(to, Wrapping::default())?)
}

/// Returns layers with files of each kind, some with several names, and directories with entries in
/// blocks.
fn layers() -> &'static [PathBuf] {
    static MADE: OnceLock<(TempDir, Vec<PathBuf>)> = OnceLock::new();
    let (_, layers) = MADE.get_or_init(|| {
        let place = TempDir::new().unwrap();
        let mut members = vec![
            pax(&[(b"SCHILY.xattr.user.name", b"value")]),
            member("d/e", b'5', b""),
            member("d/e/file", b'0', &[7; 9000]),
            member("d/small", b'0', b"content"),
            member("d/fifo", b'6', b""),
            member("d/device", b'3', b""),
        ];
        let mut link = member("d/link", b'2', b"");
        link[157..163].copy_from_slice(b"target");
        tars::sign(&mut link);
        members.push(link);
        let mut sparse = vec![0; 100_000];
        sparse[50_000] = 1;
        members.push(member("sparse", b'0', &sparse));
        members.extend((0..300).map(|nth| member(&format!("many/{nth}"), b'0', b"")));
        let layers = vec![place.path().join("0"), place.path().join("1")];
        apply(&[], &members, &layers[0]).unwrap();
        let more = [
            member("d/more", b'0', b"more"),
            member("many/.wh.7", b'0', b""),
        ];
        apply(&layers[..1], &more, &layers[1]).unwrap();
        (place, layers)
    });
    layers
}

/// Changes bytes of the disk of [`layers`], and adds a layer. Returns the error about the disk, if any.
fn changed(changes: &[(u64, Vec<u8>)]) -> Option<String> {
    let stack = Stack::open(layers()).unwrap();
    let size = stack.size();
    let disk = Disk::new(Some(stack), tempfile::tempfile().unwrap());
    for (at, bytes) in changes {
        let at = at % (size - 16);
        disk.write(bytes, at).unwrap();
    }
    let state = match read::read(&disk) {
        Ok(state) => state,
        Err(error) => return Some(error.to_string()),
    };
    let mut growing = Growing { disk, state };
    let place = TempDir::new().unwrap();
    let path = place.path().join("tar");
    let members = [
        member("d/e/new", b'0', b"new"),
        member("many/.wh..wh..opq", b'0', b""),
    ];
    std::fs::write(&path, tar(&members)).unwrap();
    let mut archive = Archive::layer(&path, &path, false).unwrap();
    // An error here is not about the disk: the changed bytes may have renamed directories.
    from_tar::apply(&mut archive, &path, growing.tree(), false, place.path()).ok()?;
    match grow::write(&growing.state, &growing.disk, (uuid::Uuid::nil(), 1)) {
        Ok(blocks) => assert!(blocks * BLOCK >= size),
        Err(error) => return Some(error.to_string()),
    }
    None
}

#[test]
fn nothing_changed() {
    assert_eq!(changed(&[]), None);
    // The magic number, and the root directory's inode.
    assert!(changed(&[(1024, vec![0])]).is_some_and(|said| said.contains("no erofs")));
    let root = changed(&[(1024 + 14, vec![0xff, 0xff])]);
    assert!(root.is_some_and(|said| said.contains("inode at byte")));
}

/// Neither the file system nor the error depends on the number of threads.
#[test]
fn threads_do_not_matter() {
    let place = TempDir::new().unwrap();
    let files = place.path().join("files");
    std::fs::create_dir(&files).unwrap();
    for nth in 0..=200_u8 {
        let content = vec![nth; usize::from(nth) * 137];
        std::fs::write(files.join(nth.to_string()), content).unwrap();
    }
    let mut holes = vec![0; 3 << 20];
    holes[1 << 20] = 1;
    std::fs::write(files.join("holes"), holes).unwrap();
    let make = |threads: usize, missing: &[&str]| -> Result<Vec<u8>> {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads);
        pool.build()?.install(|| {
            let tree = from_dir::read(&files, false)?;
            for name in missing {
                std::fs::remove_file(files.join(name))?;
            }
            let stamp = Stamp::of(&tree, &[])?;
            let made = Fresh::new(tree, &stamp, false, place.path());
            for name in missing {
                std::fs::write(files.join(name), b"again")?;
            }
            bytes_of(&made?)
        })
    };
    let wanted = make(1, &[]).unwrap();
    for threads in [2, 5] {
        assert!(make(threads, &[]).unwrap() == wanted, "{threads} threads");
    }
    for threads in [1, 2, 5] {
        let error = make(threads, &["99", "98", "holes"]).unwrap_err();
        let wanted = format!("{}: cannot read", files.join("98").display());
        assert_eq!(error.to_string(), wanted, "{threads} threads");
    }
}

/// Reads the whole disk.
fn bytes_of(made: &Fresh) -> Result<Vec<u8>> {
    let mut disk = vec![1; to_usize(made.size())];
    let mut reader = made.reader();
    // In pieces that end within blocks and files.
    let mut at = 0;
    for piece in disk.chunks_mut(70 * 512) {
        reader.read(at, piece)?;
        at += to_u64(piece.len());
    }
    reader.finish()?;
    Ok(disk)
}

fn of_tree(tree: Tree, place: &Path) -> Result<Fresh> {
    let stamp = Stamp::of(&tree, &[])?;
    Fresh::new(tree, &stamp, false, place)
}

/// Files with data only beside the inode, only in blocks, in both, and in chunks.
fn all_layouts(files: &Path) {
    std::fs::create_dir(files).unwrap();
    let mut holes = vec![0; 1 << 20];
    holes[70_000..80_000].fill(3);
    holes[900_000] = 4;
    let contents = [
        ("a-small", vec![1; 1000]),
        ("b-blocks", vec![2; 303_000]),
        ("c-both", vec![5; 41_000]),
        ("d-chunks", holes),
    ];
    for (name, content) in contents {
        std::fs::write(files.join(name), content).unwrap();
    }
}

/// A file whose bytes are not those of its fingerprint is an error, wherever it changes, and whenever.
#[test]
fn changes_between_the_readings_are_noticed() {
    let place = TempDir::new().unwrap();
    let files = place.path().join("files");
    all_layouts(&files);
    let set = |name: &str, at: u64, byte: u8| {
        let file = std::fs::File::options().write(true).open(files.join(name));
        file.unwrap().write_all_at(&[byte], at).unwrap();
    };
    let tree = || from_dir::read(&files, false).unwrap();
    let changes = [
        ("a-small", 999, 1),
        ("b-blocks", 0, 2),
        ("b-blocks", 302_999, 2),
        ("c-both", 40_959, 5),
        // Beside the inode.
        ("c-both", 40_960, 5),
        ("c-both", 40_999, 5),
        ("d-chunks", 70_000, 3),
        ("d-chunks", 900_000, 4),
    ];
    for (name, at, old) in changes {
        let said = |result: Result<Vec<u8>>| {
            let said = result.map(drop).unwrap_err().to_string();
            let wanted = "was changed while it was read: try again when nobody changes it";
            assert_eq!(said, format!("{}: {wanted}", files.join(name).display()));
        };
        // Before the inodes are written, and after that.
        let read = tree();
        set(name, at, 99);
        said(of_tree(read, place.path()).and_then(|made| bytes_of(&made)));
        set(name, at, old);
        if name == "a-small" {
            continue;
        }
        if at < 40_960 || name != "c-both" {
            let made = of_tree(tree(), place.path()).unwrap();
            set(name, at, 99);
            said(bytes_of(&made));
            set(name, at, old);
        } else {
            // Changed only while the inodes were written.
            let read = tree();
            set(name, at, 99);
            let made = of_tree(read, place.path());
            set(name, at, old);
            said(made.and_then(|made| bytes_of(&made)));
        }
    }
    // What is added while the file is read again is not read. What is missing is an error.
    let made = of_tree(tree(), place.path()).unwrap();
    let wanted = bytes_of(&made).unwrap();
    let mut blocks = wanted.windows(4096);
    let start = blocks.position(|block| block.iter().all(|&byte| byte == 2));
    let start = start.unwrap() + 4096;
    let file = std::fs::File::options()
        .write(true)
        .open(files.join("b-blocks"))
        .unwrap();
    let mut disk = vec![1; wanted.len()];
    let mut reader = made.reader();
    reader.read(0, &mut disk[..start]).unwrap();
    file.write_all_at(&[7; 5000], 303_000).unwrap();
    reader.read(to_u64(start), &mut disk[start..]).unwrap();
    reader.finish().unwrap();
    assert!(disk == wanted);
    // What was added before that is an error.
    let said = bytes_of(&made).map(drop).unwrap_err().to_string();
    let text = "was changed while it was read: try again when nobody changes it";
    let path = files.join("b-blocks");
    assert_eq!(said, format!("{}: {text}", path.display()));
    file.set_len(303_000).unwrap();
    let made = of_tree(tree(), place.path()).unwrap();
    let mut reader = made.reader();
    reader.read(0, &mut disk[..start]).unwrap();
    file.set_len(200_000).unwrap();
    let rest = reader.read(to_u64(start), &mut disk[start..]);
    assert_eq!(
        rest.unwrap_err().to_string(),
        format!("{}: cannot read, or it became shorter", path.display())
    );
    // Another kind of file: to open it would take forever.
    let made = of_tree(tree(), place.path()).unwrap();
    std::fs::rename(&path, place.path().join("kept")).unwrap();
    rustix::fs::mknodat(
        rustix::fs::CWD,
        &path,
        rustix::fs::FileType::Fifo,
        rustix::fs::Mode::RUSR,
        0,
    )
    .unwrap();
    let said = bytes_of(&made).map(drop).unwrap_err().to_string();
    let text = "was replaced while it was read: try again when nobody changes it";
    assert_eq!(said, format!("{}: {text}", path.display()));
}

/// As [`changes_between_the_readings_are_noticed`], for the files in a tar.
#[test]
fn a_tar_that_changes_is_noticed() {
    let place = TempDir::new().unwrap();
    let path = place.path().join("tar");
    let content: Vec<u8> = (1..=250).cycle().take(50_000).collect();
    let bytes = tar(&[
        member("file", b'0', &content),
        member("small", b'0', b"abc"),
    ]);
    std::fs::write(&path, &bytes).unwrap();
    let tree = || from_tar::read(&path, place.path()).unwrap();
    let wanted = bytes_of(&of_tree(tree(), place.path()).unwrap()).unwrap();
    let made = of_tree(tree(), place.path()).unwrap();
    let mut other = bytes.clone();
    other[512 + 30_000] ^= 1;
    std::fs::write(&path, &other).unwrap();
    let said = bytes_of(&made).map(drop).unwrap_err().to_string();
    let text = "was changed while it was read: try again when nobody changes it";
    assert_eq!(said, format!("{}: {text}", path.display()));
    // The content of a compressed tar is copied when it is read.
    let packed = zstd::bulk::compress(&bytes, 1).unwrap();
    std::fs::write(&path, packed).unwrap();
    let made = of_tree(tree(), place.path()).unwrap();
    std::fs::write(&path, b"").unwrap();
    assert!(bytes_of(&made).unwrap() == wanted);
}

/// A layer has all that is not zeros, in units of any size; its UUID depends on all bytes.
#[test]
fn runs_and_content() {
    let place = TempDir::new().unwrap();
    let files = place.path().join("files");
    all_layouts(&files);
    let name = "n".repeat(200);
    for nth in 0..100 {
        std::fs::write(files.join(format!("{name}{nth}")), b"").unwrap();
    }
    std::os::unix::fs::symlink("t".repeat(3000), files.join("long-link")).unwrap();
    // In chunks of two blocks, since 2^16 is the largest number of chunks; a chunk may have a block of zeros.
    let large = std::fs::File::create(files.join("large")).unwrap();
    large.set_len(300 << 20).unwrap();
    large.write_all_at(&[9; 4096], 8192).unwrap();
    large.write_all_at(&[9; 5000], 100 << 20).unwrap();
    let read = || from_dir::read(&files, false).unwrap();
    let sizes = [512, 2048, 4096, 8192, 1 << 16, 1 << 20].map(|granule| (granule, false));
    // A layer for DAX has all blocks, with zeros or not.
    for (granule, dax) in sizes.into_iter().chain([(4096, true), (1 << 16, true)]) {
        let tree = read();
        let stamp = Stamp::of(&tree, &[]).unwrap();
        let made = Fresh::new(tree, &stamp, dax, place.path()).unwrap();
        let disk = bytes_of(&made).unwrap();
        let options = diff::Options {
            granule,
            skip_zeros: !dax,
            keep_zeros: dax,
        };
        let runs = made.runs(options).unwrap();
        let mut file = tempfile::NamedTempFile::new().unwrap();
        std::io::Write::write_all(&mut file, &disk).unwrap();
        let image = FileBlob::open(file.path(), None).unwrap();
        let wanted = diff::of(&image, None, options, &|_| Ok(())).unwrap();
        assert_eq!(runs, wanted.runs, "{granule}");
        let sectors: u64 = runs.iter().map(|run| run.length).sum();
        assert!(!dax || sectors == made.size() / 512, "{granule}");
        // The layer's writer reads only these.
        let mut reader = made.reader();
        for run in runs {
            let (start, end) = (to_usize(run.offset * 512), to_usize(run.end() * 512));
            let mut bytes = vec![1; end - start];
            reader.read(run.offset * 512, &mut bytes).unwrap();
            assert!(bytes == disk[start..end], "{granule}: {run:?}");
        }
        reader.finish().unwrap();
    }
    let made = of_tree(read(), place.path()).unwrap();
    let content = made.content().unwrap();
    assert_eq!(
        of_tree(read(), place.path()).unwrap().content().unwrap(),
        content
    );
    let mut seen = vec![content];
    let mut check = |what: &str| {
        let content = of_tree(read(), place.path()).unwrap().content().unwrap();
        assert!(!seen.contains(&content), "{what}");
        seen.push(content);
    };
    for (name, at) in [
        ("a-small", 5),
        ("b-blocks", 200_000),
        ("c-both", 40_999),
        ("d-chunks", 900_000),
    ] {
        let path = files.join(name);
        let file = std::fs::File::options().write(true).open(&path).unwrap();
        let when = file.metadata().unwrap().modified().unwrap();
        file.write_all_at(&[77], at).unwrap();
        file.set_modified(when).unwrap();
        check(name);
    }
    large.write_all_at(&[9; 4096], 8192 + 4096).unwrap();
    check("a block within a chunk");
    std::fs::rename(files.join("b-blocks"), files.join("b-block")).unwrap();
    check("a name");
}

/// Generates values that are likely to exceed a limit.
fn bytes() -> impl Strategy<Value = Vec<u8>> {
    prop_oneof![
        any::<[u8; 1]>().prop_map(|bytes| bytes.to_vec()),
        any::<[u8; 2]>().prop_map(|bytes| bytes.to_vec()),
        any::<[u8; 8]>().prop_map(|bytes| bytes.to_vec()),
        prop_oneof![
            Just(0u64),
            Just(1),
            Just(u64::MAX),
            Just(u64::MAX >> 1),
            Just(u64::from(u32::MAX)),
            Just(BLOCK),
            Just(INODE),
        ]
        .prop_map(|number| number.to_le_bytes().to_vec()),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 2000,
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    #[test]
    fn any_bytes(changes in prop::collection::vec((1024u64..1 << 20, bytes()), 1..6)) {
        changed(&changes);
    }
}
