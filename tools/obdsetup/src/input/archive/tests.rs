// SPDX-License-Identifier: GPL-2.0

//! Tests the reader with archives of GNU tar, and with damaged and malicious ones.

use std::fs;
use std::io::Write;
use std::path::Path;
use std::process::Command;
use std::sync::OnceLock;

use proptest::prelude::*;
use tempfile::TempDir;

use super::{check, Archive, Compression, Device, Extent, Member, MemberKind, Time};

use crate::tars::{self, header, member, sign};

fn pax(records: &[(&str, &[u8])]) -> Vec<u8> {
    let records: Vec<_> = records
        .iter()
        .map(|&(key, value)| (key.as_bytes(), value))
        .collect();
    tars::pax(&records)
}

fn end(members: Vec<u8>) -> Vec<u8> {
    tars::tar(&[members])
}

/// Returns the members, each with its content. Holes are zeros in the content.
fn read(path: &Path) -> anyhow::Result<Vec<(Member, Vec<u8>)>> {
    let mut archive = Archive::open(path)?;
    let mut all = Vec::new();
    while let Some(member) = archive.next()? {
        // No valid file here is larger.
        let mut content = vec![0; usize::try_from(member.size.min(64 << 20))?];
        archive.content(&member, |offset, bytes| {
            let at = usize::try_from(offset)?;
            if let Some(to) = content.get_mut(at..at + bytes.len()) {
                to.copy_from_slice(bytes);
            }
            Ok(())
        })?;
        all.push((member, content));
    }
    Ok(all)
}

fn read_bytes(bytes: &[u8]) -> anyhow::Result<Vec<(Member, Vec<u8>)>> {
    let mut file = tempfile::NamedTempFile::new()?;
    file.write_all(bytes)?;
    read(file.path())
}

/// Returns the message with which the archive is refused. Checks that the exit code is `BAD_IMAGE`.
fn refused(bytes: &[u8]) -> String {
    match read_bytes(bytes) {
        Ok(members) => panic!("{members:?}"),
        Err(error) => {
            assert_eq!(
                crate::terminal::exit::code(&error),
                crate::terminal::exit::BAD_IMAGE,
                "{error}"
            );
            error.to_string()
        }
    }
}

fn tool(dir: &TempDir, program: &str, args: &[&str]) {
    let done = Command::new(program)
        .args(args)
        .current_dir(dir.path())
        .output();
    let done = done.unwrap();
    assert!(done.status.success(), "{program} {args:?}: {done:?}");
}

#[test]
fn all_that_a_member_has() {
    let mut tar = pax(&[
        ("path", b"a//./b/c"),
        ("mtime", b"-1.25"),
        ("uid", b"4000000000"),
        ("SCHILY.xattr.user.a%3Db", b"1\n2\0\n"),
        ("SCHILY.acl.access", b"user::rw-"),
    ]);
    tar.extend(member("short", b'0', b"content"));
    tar.extend(member("link", b'2', b""));
    let link = tar.len() - 512;
    tar[link + 157..link + 160].copy_from_slice(b"to/");
    sign(&mut tar[link..]);
    let mut device = header("null", b'3', 0);
    device[329..337].copy_from_slice(b"0000001\0");
    device[337..345].copy_from_slice(b"0000003\0");
    sign(&mut device);
    tar.extend(device);
    tar.extend(member("./", b'5', b""));
    let all = read_bytes(&end(tar)).unwrap();
    let [(file, content), (link, _), (null, _), (root, _)] = all.as_slice() else {
        panic!("{all:?}");
    };
    assert_eq!(content, b"content");
    let wanted = Member {
        at: 0,
        path: b"a/b/c".to_vec(),
        kind: MemberKind::File,
        mode: 0o755,
        uid: 4_000_000_000,
        gid: 100,
        mtime: Time {
            seconds: -2,
            nanoseconds: 750_000_000,
        },
        size: 7,
        extents: vec![Extent { offset: 0, len: 7 }],
        xattrs: vec![(b"user.a=b".to_vec(), b"1\n2\0\n".to_vec())],
        records: vec![(b"SCHILY.acl.access".to_vec(), b"user::rw-".to_vec())],
    };
    assert_eq!(*file, wanted);
    assert_eq!(link.kind, MemberKind::Symlink(b"to/".to_vec()));
    assert_eq!(
        (link.uid, link.mtime.seconds, link.mtime.nanoseconds),
        (1000, 1_700_000_000, 0)
    );
    assert_eq!(
        null.kind,
        MemberKind::CharDevice(Device { major: 1, minor: 3 })
    );
    assert_eq!(
        (root.path.as_slice(), &root.kind),
        (b"".as_slice(), &MemberKind::Directory)
    );
}

#[test]
fn archives_of_gnu_tar() {
    let dir = TempDir::new().unwrap();
    let tree = dir.path().join("tree");
    fs::create_dir(&tree).unwrap();
    let long = "n".repeat(120);
    fs::create_dir(tree.join(&long)).unwrap();
    fs::write(tree.join(&long).join(&long), "deep").unwrap();
    std::os::unix::fs::symlink("t".repeat(150), tree.join("symlink")).unwrap();
    fs::write(tree.join("plain"), vec![7; 100_000]).unwrap();
    fs::hard_link(tree.join("plain"), tree.join("plain2")).unwrap();
    // So many extents that maps of the old format need more blocks, and a hole at the end.
    let mut sparse = vec![0; 2 << 20];
    let file = fs::File::create(tree.join("sparse")).unwrap();
    for part in 0..60 {
        let at = part * 32768 + 4096;
        std::os::unix::fs::FileExt::write_all_at(&file, &[9; 4096], at as u64).unwrap();
        sparse[at..at + 4096].fill(9);
    }
    file.set_len(2 << 20).unwrap();

    let formats: &[&[&str]] = &[
        &["--format=gnu"],
        &["--format=gnu", "--sparse"],
        &["--format=pax"],
        &["--format=pax", "--sparse", "--sparse-version=0.0"],
        &["--format=pax", "--sparse", "--sparse-version=0.1"],
        &["--format=pax", "--sparse", "--sparse-version=1.0"],
    ];
    for format in formats {
        let mut args = format.to_vec();
        args.extend([
            "--create",
            "--sort=name",
            "--file",
            "a.tar",
            "-C",
            "tree",
            ".",
        ]);
        tool(&dir, "tar", &args);
        let all = read(&dir.path().join("a.tar")).unwrap();
        let find = |name: &str| {
            let found = all
                .iter()
                .find(|(member, _)| member.path == name.as_bytes());
            found.unwrap_or_else(|| panic!("{format:?}: {name}"))
        };
        assert_eq!(find(&format!("{long}/{long}")).1, b"deep", "{format:?}");
        assert_eq!(find("symlink").0.kind, MemberKind::Symlink(vec![b't'; 150]));
        assert_eq!(find("plain").1, vec![7; 100_000], "{format:?}");
        assert_eq!(
            find("plain2").0.kind,
            MemberKind::HardLink(b"plain".to_vec())
        );
        let (member, content) = find("sparse");
        assert!(*content == sparse, "{format:?}");
        assert_eq!(member.size, 2 << 20);
        if format.contains(&"--sparse") {
            assert_eq!(member.extents.len(), 60, "{format:?}: {:?}", member.extents);
        }
        assert_eq!(find("").0.kind, MemberKind::Directory);
        let meta = fs::metadata(tree.join("plain")).unwrap();
        let nanoseconds = std::os::unix::fs::MetadataExt::mtime_nsec(&meta);
        if format.contains(&"--format=pax") {
            assert_eq!(i64::from(find("plain").0.mtime.nanoseconds), nanoseconds);
        }
        let whole = fs::read(dir.path().join("a.tar")).unwrap();
        // A cut-off archive has no end marker.
        let data = whole.iter().rposition(|&byte| byte != 0).unwrap() + 1;
        for at in (512..=data)
            .step_by(7919)
            .chain([data.next_multiple_of(512)])
        {
            let error = refused(&whole[..at]);
            assert!(error.contains("incomplete download"), "{at}: {error}");
        }
    }
}

/// Returns `tar` in each compression.
fn compressed(tar: &[u8]) -> Vec<(Compression, Vec<u8>)> {
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    gzip.write_all(tar).unwrap();
    let mut bzip2 = bzip2::write::BzEncoder::new(Vec::new(), bzip2::Compression::fast());
    bzip2.write_all(tar).unwrap();
    let mut xz = liblzma::write::XzEncoder::new(Vec::new(), 0);
    xz.write_all(tar).unwrap();
    let options = liblzma::stream::LzmaOptions::new_preset(0).unwrap();
    let lzma = liblzma::stream::Stream::new_lzma_encoder(&options).unwrap();
    let mut lzma = liblzma::write::XzEncoder::new_stream(Vec::new(), lzma);
    lzma.write_all(tar).unwrap();
    let mut zstd = zstd::Encoder::new(Vec::new(), 1).unwrap();
    zstd.include_checksum(true).unwrap();
    zstd.write_all(tar).unwrap();
    let mut lz4 = lz4::EncoderBuilder::new().build(Vec::new()).unwrap();
    lz4.write_all(tar).unwrap();
    let lz4 = lz4.finish();
    lz4.1.unwrap();
    let mut legacy = b"\x02\x21\x4c\x18".to_vec();
    for block in tar.chunks(8 << 20) {
        let block = lz4::block::compress(block, None, false).unwrap();
        legacy.extend_from_slice(&u32::try_from(block.len()).unwrap().to_le_bytes());
        legacy.extend_from_slice(&block);
    }
    vec![
        (Compression::Gzip, gzip.finish().unwrap()),
        (Compression::Bzip2, bzip2.finish().unwrap()),
        (Compression::Xz, xz.finish().unwrap()),
        (Compression::Lzma, lzma.finish().unwrap()),
        (Compression::Zstd, zstd.finish().unwrap()),
        (Compression::Lz4, lz4.0),
        (Compression::Lz4Legacy, legacy),
    ]
}

/// Returns bytes that compress a little.
fn text(len: usize) -> Vec<u8> {
    let mut state = 1u32;
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 24) as u8 & 0x3f
    };
    (0..len).map(|_| next()).collect()
}

#[test]
fn compressions() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("a.tar");
    let tar = end([member("a", b'0', &text(300_000)), member("b", b'0', b"b")].concat());
    let (first, second) = tar.split_at(100_000);
    for ((compression, whole), (two, rest)) in compressed(&tar).iter().zip(
        compressed(first)
            .iter()
            .zip(compressed(second))
            .map(|((_, a), (_, b))| (a, b)),
    ) {
        fs::write(&path, whole).unwrap();
        let archive = Archive::open(&path).unwrap();
        assert_eq!(archive.compression, Some(*compression));
        let all = read(&path).unwrap();
        assert_eq!(all.len(), 2, "{compression:?}");
        assert!(all[0].1 == text(300_000), "{compression:?}");

        // Several compressed files in a row are allowed, except for lzma, which has no magic number.
        if *compression != Compression::Lzma {
            fs::write(&path, [two.as_slice(), &rest].concat()).unwrap();
            assert_eq!(read(&path).unwrap().len(), 2, "{compression:?}");
        }
        if !matches!(compression, Compression::Lzma | Compression::Lz4Legacy) {
            fs::write(&path, [whole.as_slice(), &[0; 4096]].concat()).unwrap();
            assert_eq!(read(&path).unwrap().len(), 2, "{compression:?}");
            let error = refused(&[whole.as_slice(), b"something that is no such thing"].concat());
            assert!(
                error.contains("something else follows"),
                "{compression:?}: {error}"
            );
        }
        // This must also fail if the cut is so near the end that the tar itself is complete.
        for cut in [1, 5, 9, 100, whole.len() / 2] {
            let error = refused(&whole[..whole.len() - cut]);
            assert!(
                error.contains("incomplete download"),
                "{compression:?} {cut}: {error}"
            );
        }
        // Changed data is detected, except in these formats, which have no checksum here.
        if !matches!(
            compression,
            Compression::Lzma | Compression::Lz4Legacy | Compression::Lz4
        ) {
            let mut flipped = whole.clone();
            flipped[whole.len() / 2] ^= 0x10;
            refused(&flipped);
        }
    }
}

#[test]
fn what_is_refused() {
    let one = member("a", b'0', b"a");
    let cases: &[(Vec<u8>, &str)] = &[
        (end(member("../a", b'0', b"a")), "\"..\" leads out"),
        (end(member("a/../../b", b'0', b"a")), "\"..\" leads out"),
        (end(member("x", b'1', b"")), "empty"),
        (
            end(member("x", b'2', b"")),
            "symbolic link without a target",
        ),
        (end(member("x", b'Z', b"")), "type 'Z'"),
        (end(member("x", b'M', b"")), "another volume"),
        (end(member("./.", b'0', b"")), "only a directory"),
        (
            end([pax(&[("path", b"a\0b")]), one.clone()].concat()),
            "zero byte",
        ),
        (
            end([pax(&[("size", b"-1")]), one.clone()].concat()),
            "negative",
        ),
        (
            end([pax(&[("size", b"99999999999999999999")]), one.clone()].concat()),
            "negative",
        ),
        (
            end([pax(&[("uid", b"4294967295")]), one.clone()].concat()),
            "uid 4294967295",
        ),
        (
            end([pax(&[("mtime", b"soon")]), one.clone()].concat()),
            "mtime",
        ),
        (
            end([pax(&[("size", b"18446744073709551615")]), one.clone()].concat()),
            "incomplete",
        ),
        (
            end([member("p", b'x', b"99 path=a\n"), one.clone()].concat()),
            "malformed",
        ),
        (
            end(member("p", b'x', b"9 path=a\n")),
            "behind an extended header",
        ),
        (end(header("p", b'x', 1 << 30)), "more than 8388608"),
        (one.clone(), "no end marker"),
        (
            end([end(one.clone()), one.clone()].concat()),
            "another archive follows the end marker at byte 1536",
        ),
        (
            end([one.clone(), vec![7; 512]].concat()),
            "byte 1024, behind member \"a\"",
        ),
        (vec![7; 5000], "no tar"),
    ];
    for (tar, wanted) in cases {
        let error = refused(tar);
        assert!(error.contains(wanted), "{error}, not {wanted}");
    }
}

#[test]
fn what_is_tolerated() {
    let one = member("/abs//a/", b'0', b"");
    // One block of zeros, or the padding of tapes.
    for zeros in [512, 1024, 10_240, 100_000] {
        let mut tar = one.clone();
        tar.resize(tar.len() + zeros, 0);
        let all = read_bytes(&tar).unwrap();
        assert_eq!(all[0].0.path, b"abs/a");
        assert_eq!(all[0].0.kind, MemberKind::Directory);
    }
    // The compression shows that the archive is complete.
    let gzip = compressed(&one).remove(0).1;
    assert_eq!(read_bytes(&gzip).unwrap().len(), 1);
    // v7: no magic, and a sum of signed characters.
    let mut old = header("\u{e4}", b'\0', 3);
    old[257..265].fill(0);
    old[148..156].fill(b' ');
    let sum: i64 = old.iter().map(|&byte| i64::from(byte as i8)).sum();
    old[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    old.extend_from_slice(b"old");
    old.resize(1024, 0);
    assert_eq!(read_bytes(&end(old)).unwrap()[0].1, b"old");
    // An archive without members, as git makes it from an empty tree.
    let global = member("pax_global_header", b'g', b"20 comment=01234567\n");
    assert!(read_bytes(&end(global.clone())).unwrap().is_empty());
    let both = read_bytes(&end([global, member("a", b'0', b"a")].concat())).unwrap();
    assert_eq!(
        both[0].0.records,
        [(b"comment".to_vec(), b"01234567".to_vec())]
    );
    // The owner -2, which NFS uses, in base 256.
    let mut nobody = header("n", b'0', 0);
    nobody[108..116].copy_from_slice(b"\xff\xff\xff\xff\xff\xff\xff\xfe");
    sign(&mut nobody);
    assert_eq!(read_bytes(&end(nobody)).unwrap()[0].0.uid, u32::MAX - 1);
}

/// Names of members, and the kind of archive that has these names.
fn packages() -> Vec<(&'static [&'static str], Option<super::scan::Package>)> {
    use super::scan::Package;
    vec![
        (&["./vm.ovf", "./disk1.vmdk"], Some(Package::Ova)),
        (&["disk1.vmdk", "vm.mf", "vm.ovf"], Some(Package::Ova)),
        (&["ova.xml", "Ref:4/00000000"], Some(Package::Xva)),
        (
            &["metadata.json", "Vagrantfile", "box.img"],
            Some(Package::Vagrant),
        ),
        (
            &["box.ovf", "box-disk001.vmdk", "metadata.json"],
            Some(Package::Vagrant),
        ),
        (
            &["metadata.json", "Virtual Hard Disks/box.vhdx"],
            Some(Package::Vagrant),
        ),
        (&["disk.raw"], Some(Package::Disk)),
        (&["manifest.json", "disk.raw"], Some(Package::Disk)),
        (&["./image.qcow2"], Some(Package::Disk)),
        (
            &["metadata.yaml", "rootfs/etc/hostname", "templates/x.tpl"],
            Some(Package::Lxd),
        ),
        (&["metadata.yaml", "rootfs.img"], Some(Package::Lxd)),
        (
            &["metadata.yaml", "templates/x.tpl"],
            Some(Package::LxdMetadata),
        ),
        (
            &["backup/index.yaml", "backup/container/rootfs/x"],
            Some(Package::LxdBackup),
        ),
        // Trees of files with some of these names, and a disk with other files beside it.
        (&["metadata.json", "Vagrantfile", "README.md"], None),
        (&["metadata.yaml", "etc/hostname"], None),
        (&["srv/disk.raw"], None),
        (&["disk.raw", "etc/hostname"], None),
        (&["vm.txt", "x.ovf"], None),
    ]
}

#[test]
fn directories_with_packed_images() {
    use super::scan::{check_directory, Package};
    let named = |names: &[&str]| {
        let dir = TempDir::new().unwrap();
        for name in names {
            let path = dir.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, "x").unwrap();
        }
        check_directory(dir.path()).unwrap()
    };
    for (names, wanted) in packages() {
        // A directory with one disk is an ordinary tree of files.
        let wanted = wanted.filter(|package| *package != Package::Disk);
        assert_eq!(named(names), wanted, "{names:?}");
    }
    assert_eq!(
        named(&["manifest.json", "repositories", "0123/layer.tar"]),
        Some(Package::Docker)
    );
    assert_eq!(
        named(&["manifest.json", "0123.json", "0123.tar"]),
        Some(Package::Docker)
    );
    assert_eq!(named(&["manifest.json", "usr/share/a/x.tar"]), None);
    assert_eq!(named(&[]), None);
}

#[test]
fn what_it_is_for() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("a.tar");
    let package = |names: &[&str]| {
        let all: Vec<u8> = names
            .iter()
            .flat_map(|name| member(name, b'0', b"x"))
            .collect();
        fs::write(&path, end(all)).unwrap();
        check(&path).unwrap().package
    };
    use super::scan::Package;
    assert_eq!(
        package(&["a.json", "x/layer.tar", "manifest.json"]),
        Some(Package::Docker)
    );
    assert_eq!(
        package(&["x/layer.tar", "repositories"]),
        Some(Package::Docker)
    );
    assert_eq!(
        package(&["blobs/sha256/x", "index.json", "oci-layout"]),
        Some(Package::Oci)
    );
    assert_eq!(package(&["vm.ovf", "disk1.vmdk"]), Some(Package::Ova));
    for (names, wanted) in packages() {
        assert_eq!(package(names), wanted, "{names:?}");
    }
    assert_eq!(package(&["manifest.json", "etc/passwd"]), None);
    let hex = "0123456789abcdef".repeat(4);
    let layer = format!("{hex}.tar.gz");
    let config = format!("sha256:{hex}");
    for own in [layer.as_str(), &config] {
        assert_eq!(package(&[own, "manifest.json"]), Some(Package::Docker));
        assert_eq!(package(&[own, "x.json"]), None);
    }
    for other in ["a.tar.gz", &format!("d/{layer}"), &layer[1..]] {
        assert_eq!(package(&[other, "manifest.json"]), None);
    }
    assert_eq!(package(&["usr/x.ovf", "etc/passwd"]), None);
    fs::write(&path, end(member("etc/.wh.passwd", b'0', b""))).unwrap();
    assert_eq!(
        check(&path).unwrap().whiteout.as_deref(),
        Some("etc/.wh.passwd")
    );
}

#[test]
fn bombs_stay_small() {
    // Many zeros in a small gzip file. They are read, but not all kept in memory at once.
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::best());
    gzip.write_all(&header("zeros", b'0', 1 << 27)).unwrap();
    let zeros = vec![0; 1 << 20];
    for _ in 0..128 {
        gzip.write_all(&zeros).unwrap();
    }
    gzip.write_all(&[0; 1024]).unwrap();
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(&gzip.finish().unwrap()).unwrap();
    let mut archive = Archive::open(file.path()).unwrap();
    assert_eq!(archive.next().unwrap().unwrap().size, 1 << 27);
    assert!(archive.next().unwrap().is_none());
    // Data whose decoder would need an unusual amount of memory is refused.
    let mut huge = zstd::Encoder::new(Vec::new(), 1).unwrap();
    huge.window_log(30).unwrap();
    huge.include_contentsize(false).unwrap();
    huge.write_all(&end(member("a", b'0', &text(3000))))
        .unwrap();
    refused(&huge.finish().unwrap());
}

/// Returns an archive with members of many kinds.
fn sample() -> Vec<u8> {
    let map = b"2\n0\n512\n1024\n512\n".to_vec();
    let mut data = map;
    data.resize(512, 0);
    data.resize(512 + 1024, 5);
    let sparse = [
        ("GNU.sparse.major", b"1".as_slice()),
        ("GNU.sparse.minor", b"0"),
        ("GNU.sparse.name", b"s"),
        ("GNU.sparse.realsize", b"4096"),
    ];
    end([
        member("dir/", b'5', b""),
        member("././@LongLink", b'L', &[b'l'; 300]),
        member("l", b'0', &text(3000)),
        pax(&[
            ("path", b"p"),
            ("SCHILY.xattr.user.x", b"y"),
            ("mtime", b"1.5"),
        ]),
        member("p", b'0', b"content"),
        pax(&sparse),
        member("GNUSparseFile.0/s", b'0', &data),
    ]
    .concat())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, ..ProptestConfig::default() })]

    /// Changed or cut-off archives cause no panic and no endless loop.
    #[test]
    fn mutations(
        which in 0..8usize,
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..6),
        fix in any::<bool>(),
        cut in prop::option::of(any::<prop::sample::Index>()),
    ) {
        static SAMPLES: OnceLock<Vec<Vec<u8>>> = OnceLock::new();
        let samples = SAMPLES.get_or_init(|| {
            let compressed = compressed(&sample()).into_iter().map(|(_, bytes)| bytes);
            [sample()].into_iter().chain(compressed).collect()
        });
        let mut bytes = samples[which].clone();
        for (at, byte) in &changes {
            let at = at.index(bytes.len());
            bytes[at] = *byte;
            // Corrects the checksum of the block. A wrong one would stop the reader before the changed field.
            if fix && which == 0 && bytes[at / 512 * 512..].len() >= 512 {
                sign(&mut bytes[at / 512 * 512..]);
            }
        }
        if let Some(cut) = cut {
            bytes.truncate(cut.index(bytes.len()));
        }
        let _ = read_bytes(&bytes);
    }

    /// Random bytes cause no panic and no endless loop.
    #[test]
    fn noise(bytes in prop::collection::vec(any::<u8>(), 0..3000)) {
        let _ = read_bytes(&bytes);
    }
}
