// SPDX-License-Identifier: GPL-2.0

//! Hostile layers below: whatever bytes they have, the result must be an error or a layer. How threads write.

use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use anyhow::Result;
use overlaybd::format::num::to_usize;
use overlaybd::format::Blob;
use overlaybd::layer::Ident;
use overlaybd::wrap::Wrapping;
use overlaybd::Stack;
use proptest::prelude::*;
use tempfile::TempDir;

use super::disk::Disk;
use super::write::{Out, BLOCK, INODE};
use super::{grow, read, Fresh, Growing};
use crate::input::archive::Archive;
use crate::make::layer_out::LayerOut;
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
            let made = made?;
            let mut disk = vec![1; to_usize(made.size())];
            let mut reader = made.reader();
            reader.read(0, &mut disk)?;
            reader.finish()?;
            Ok(disk)
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
