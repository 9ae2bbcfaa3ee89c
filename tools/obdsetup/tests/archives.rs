// SPDX-License-Identifier: GPL-2.0

//! What `obdsetup convert` and `create` do with archives and disks of many kinds, and with damaged
//! ones. They detect the kind by the content of a file, never by its name.

use std::fs;
use std::io::Write;

use libtest_mimic::Trial;
use predicates::str::contains;

use crate::common::tars::{header, member, pax, sign, tar};
use crate::common::{gzip, needs, tests, trial, Place};

tests! {
    tars_of_all_compressions;
    damaged_tars;
    layers_and_packed_images;
    directories_with_packed_images;
    directories_of_layers;
    other_archives;
    disks;
    mutations;
    other_headers;
    granularity;
}

/// Returns `size` zeros, with the bytes of each part at the offset of the part.
fn at(size: usize, parts: &[(usize, &[u8])]) -> Vec<u8> {
    let mut bytes = vec![0; size];
    for (at, part) in parts {
        bytes[*at..*at + part.len()].copy_from_slice(part);
    }
    bytes
}

fn rootfs() -> Vec<u8> {
    let text = "some text, over and over\n".repeat(20_000);
    tar(&[
        member("./", b'5', b""),
        member("./etc/", b'5', b""),
        member("./etc/hostname", b'0', b"here\n"),
        member("./text", b'0', text.as_bytes()),
    ])
}

fn bzip2(bytes: &[u8]) -> Vec<u8> {
    let mut bzip2 = bzip2::write::BzEncoder::new(Vec::new(), bzip2::Compression::fast());
    bzip2.write_all(bytes).unwrap();
    bzip2.finish().unwrap()
}

fn xz(bytes: &[u8]) -> Vec<u8> {
    let mut xz = liblzma::write::XzEncoder::new(Vec::new(), 0);
    xz.write_all(bytes).unwrap();
    xz.finish().unwrap()
}

fn lzma(bytes: &[u8]) -> Vec<u8> {
    let options = liblzma::stream::LzmaOptions::new_preset(0).unwrap();
    let lzma = liblzma::stream::Stream::new_lzma_encoder(&options).unwrap();
    let mut lzma = liblzma::write::XzEncoder::new_stream(Vec::new(), lzma);
    lzma.write_all(bytes).unwrap();
    lzma.finish().unwrap()
}

/// Compresses to an lzip file: the stream of an lzma file, with the header and trailer of lzip.
fn lzip(bytes: &[u8]) -> Vec<u8> {
    let mut options = liblzma::stream::LzmaOptions::new_preset(0).unwrap();
    options.dict_size(1 << 20);
    let stream = liblzma::stream::Stream::new_lzma_encoder(&options).unwrap();
    let mut lzma = liblzma::write::XzEncoder::new_stream(Vec::new(), stream);
    lzma.write_all(bytes).unwrap();
    let lzma = lzma.finish().unwrap();
    let mut crc = flate2::Crc::new();
    crc.update(bytes);
    let size = (bytes.len() as u64).to_le_bytes();
    let stream = &lzma[13..];
    let len = (6 + stream.len() as u64 + 20).to_le_bytes();
    [
        b"LZIP\x01\x14",
        stream,
        &crc.sum().to_le_bytes(),
        &size,
        &len,
    ]
    .concat()
}

fn zstd(bytes: &[u8]) -> Vec<u8> {
    zstd::encode_all(bytes, 1).unwrap()
}

fn lz4(bytes: &[u8]) -> Vec<u8> {
    let mut lz4 = lz4::EncoderBuilder::new().build(Vec::new()).unwrap();
    lz4.write_all(bytes).unwrap();
    let (bytes, done) = lz4.finish();
    done.unwrap();
    bytes
}

fn lz4_legacy(bytes: &[u8]) -> Vec<u8> {
    let block = lz4::block::compress(bytes, None, false).unwrap();
    let len = u32::try_from(block.len()).unwrap().to_le_bytes();
    [b"\x02\x21\x4c\x18".as_slice(), &len, &block].concat()
}

type Pack = fn(&[u8]) -> Vec<u8>;
const COMPRESSIONS: &[(&str, Pack)] = &[
    ("gzip", gzip),
    ("bzip2", bzip2),
    ("xz", xz),
    ("lzma", lzma),
    ("lzip", lzip),
    ("zstd", zstd),
    ("lz4", lz4),
    ("lz4", lz4_legacy),
];

fn tars_of_all_compressions() {
    let place = Place::new();
    let rootfs = rootfs();
    // A tar as of Unix v7, without a magic: only the checksums of the headers show that it is one.
    let mut old = rootfs.clone();
    let mut header = 0;
    for len in [0, 0, 1, 977] {
        old[header + 257..header + 265].fill(0);
        sign(&mut old[header..header + 512]);
        header += 512 + len * 512;
    }
    place.convert(&rootfs, "--fs erofs").success();
    let wanted = place.dump("out.obd");
    let text = b"some text, over and over\n";
    assert!(wanted.windows(text.len()).any(|bytes| bytes == text));
    for (name, pack) in COMPRESSIONS {
        let done = place.convert(&pack(&rootfs), "--fs erofs");
        done.success().stderr("");
        assert!(place.dump("out.obd") == wanted, "{name}");
    }
    place.convert(&old, "--fs erofs").success();
    assert!(place.dump("out.obd") == wanted);
    // Compressed files one after the other are read as one, and zeros after them are ignored.
    let (first, second) = rootfs.split_at(1000);
    for pack in [gzip, bzip2, xz, zstd, lz4] as [Pack; 5] {
        let both = [pack(first), pack(second), vec![0; 1024]].concat();
        place.convert(&both, "--fs erofs").success();
        assert!(place.dump("out.obd") == wanted);
    }
    for (name, pack) in COMPRESSIONS {
        let packed = pack(&rootfs);
        for cut in [packed.len() - 1, packed.len() - 7, packed.len() / 2] {
            // lzma has no magic: if too little of it is left, it is not recognised.
            if *name == "lzma" && cut < packed.len() - 7 {
                place.refused(&packed[..cut], "--from raw");
                continue;
            }
            place.damaged(&packed[..cut], "incomplete download or copy?");
        }
        place.damaged(&pack(&rootfs[..1700]), "rootfs.tar.gz: ");
        // Text is of no known kind, also after decompression.
        let text = pack(b"To whom it may concern");
        match *name {
            "lzma" => place.refused(&text, "--from raw"),
            name => place.refused(&text, &format!("compressed with {name}, but")),
        }
    }
}

fn damaged_tars() {
    let place = Place::new();
    let rootfs = rootfs();
    for len in (512..rootfs.len() - 1024)
        .step_by(9973)
        .chain([1536, rootfs.len() - 1024])
    {
        place.damaged(&rootfs[..len], "incomplete download or copy?");
        let done = place.convert(&rootfs[..len], "--fs erofs");
        done.code(3)
            .stderr(contains("incomplete download or copy?"));
    }
    let cut = &rootfs[..rootfs.len() - 20_000];
    place.damaged(cut, "member \"./text\": the tar ends at byte");
    let mut flipped = rootfs.clone();
    flipped[2100] ^= 1;
    place.damaged(
        &flipped,
        "the block at byte 2048, behind member \"./etc/hostname\", is no header",
    );
    let mut flipped = gzip(&rootfs);
    let middle = flipped.len() - 6;
    flipped[middle] ^= 1;
    place.damaged(&flipped, "gzip data is damaged");
    place.damaged(
        &tar(&[member("../../etc/passwd", b'0', b"x")]),
        "name \"../../etc/passwd\": \"..\" leads out",
    );
    // A member below a link that may lead out of the tree, and one below a link to itself.
    for (target, said) in [
        (
            "..",
            "goes through the symbolic link ./link, whose target .. is absolute or has \"..\"",
        ),
        ("/etc", "whose target /etc is absolute"),
        ("link", "goes through more than 40 symbolic links"),
    ] {
        let mut link = header("link", b'2', 0);
        link[157..157 + target.len()].copy_from_slice(target.as_bytes());
        sign(&mut link);
        let start = rootfs[..rootfs.len() - 1024].to_vec();
        place.damaged(&tar(&[start, link, member("link/x", b'0', b"x")]), said);
    }
    place.damaged(
        &[rootfs.clone(), rootfs].concat(),
        "another archive follows",
    );
}

fn layers_and_packed_images() {
    let place = Place::new();
    let layer = tar(&[member("etc/", b'5', b""), member("etc/.wh.motd", b'0', b"")]);
    place.refused(&layer, "--keep-whiteouts");
    place.refused(
        &gzip(&layer),
        "\"etc/.wh.motd\" hides a file of the layers below",
    );
    let opaque = tar(&[member("etc/.wh..wh..opq", b'0', b"")]);
    place.refused(&opaque, "a layer of a container image");
    let file = |name: &str| member(name, b'0', b"{}");
    let docker = tar(&[
        file("0123.json"),
        file("abc/layer.tar"),
        file("manifest.json"),
    ]);
    place.damaged(&docker, "manifest.json: not what `docker save' writes");
    let old = tar(&[file("abc/layer.tar"), file("repositories")]);
    place.damaged(&old, "no manifest.json");
    let oci = tar(&[
        file("blobs/sha256/00"),
        file("index.json"),
        file("oci-layout"),
    ]);
    place.damaged(&oci, "rootfs.tar.gz: index.json: not an image index");
    place.damaged(&zstd(&oci), "not an image index");
    let ova = tar(&[file("vm.ovf"), file("disk.vmdk"), file("vm.mf")]);
    place.refused(&ova, "a virtual machine (OVA)");
    fs::create_dir(place.path("dir")).unwrap();
    place.write("dir/version", b"Directory Transport Version: 1.1\n");
    place.write("dir/manifest.json", b"{}");
    place
        .run("convert dir out.obd")
        .code(1)
        .stderr(contains("skopeo copy dir:dir"));
    fs::remove_dir_all(place.path("dir")).unwrap();
    place
        .convert(&layer, "--keep-whiteouts --fs erofs")
        .success();
    let refused = [
        (["metadata.json", "box.img"], "for Vagrant (box)"),
        (["metadata.yaml", "rootfs.img"], "an image of LXD or Incus"),
        (
            ["metadata.yaml", "templates/x"],
            "in another file, with rootfs or disk",
        ),
        (
            ["backup/index.yaml", "backup/x"],
            "a backup of LXD or Incus",
        ),
        (["manifest.json", "disk.raw"], "a disk in an archive"),
        (["ova.xml", "Ref:1/0"], "a virtual machine of Xen (XVA)"),
    ];
    for (names, said) in refused {
        let archive = tar(&names.map(file));
        place.refused(&archive, said);
        place.refused(&gzip(&archive), said);
        place.convert(&archive, "--from tar --fs erofs").success();
    }
    place.convert(&docker, "--from tar --fs erofs").success();
    // In this combination, these names do not make a tar a packed image.
    let plain = tar(&[
        file("manifest.json"),
        file("usr/share/x.tar"),
        file("usr/vm.ovf"),
    ]);
    place.convert(&plain, "--fs erofs").success();
}

/// A directory with the content of a packed image is refused, as the archive itself is.
fn directories_with_packed_images() {
    let place = Place::new();
    fs::create_dir_all(place.path("saved/0123")).unwrap();
    place.write("saved/manifest.json", b"[]");
    place.write("saved/repositories", b"{}");
    place.write("saved/0123/layer.tar", b"");
    let refused = |said: &str| {
        place
            .run("convert saved out.obd --fs erofs")
            .code(1)
            .stderr(contains(said));
        assert!(!place.path("out.obd").exists());
    };
    refused(
        "`tar -C saved -cf saved.tar .`, and convert that; --from directory converts its files",
    );
    place
        .run("convert --from directory saved out.obd --fs erofs")
        .success();
    fs::remove_file(place.path("out.obd")).unwrap();
    fs::remove_dir_all(place.path("saved")).unwrap();
    fs::create_dir(place.path("saved")).unwrap();
    place.write("saved/vm.ovf", b"x");
    place.write("saved/disk1.vmdk", b"x");
    refused("saved: a virtual machine (OVA), no tree of files: convert its disk");
}

/// Whiteouts, names with which a layer hides files of lower layers, are refused in directories as
/// they are in tars.
fn directories_of_layers() {
    let place = Place::new();
    for name in [".wh.motd", ".wh..wh..opq"] {
        fs::create_dir_all(place.path("layer/etc")).unwrap();
        place.write(&format!("layer/etc/{name}"), b"");
        for command in [
            "convert layer out.obd --fs erofs",
            "create --directory layer --fs erofs out.obd",
        ] {
            place
                .run(command)
                .code(1)
                .stderr(contains(format!(
                    "layer/etc/{name}: a name with which a layer"
                )))
                .stderr(contains("--keep-whiteouts"));
            assert!(!place.path("out.obd").exists());
            place.run(&format!("{command} --keep-whiteouts")).success();
            fs::remove_file(place.path("out.obd")).unwrap();
        }
        fs::remove_dir_all(place.path("layer")).unwrap();
    }
    place.write("disk.raw", &disk());
    place
        .run("convert disk.raw out.obd --keep-whiteouts")
        .code(1)
        .stderr(contains("is no directory or tar"));
}

fn other_archives() {
    let place = Place::new();
    let cases: &[(&[u8], &str)] = &[
        (
            b"PK\x03\x04\x14\0",
            "a zip archive: unpack it, then `obdsetup convert DIRECTORY`",
        ),
        (b"PK\x05\x06", "zip"),
        (
            b"070701000000",
            "a cpio archive: unpack it, `cpio -i -d <rootfs.tar.gz`",
        ),
        (b"070702000000", "cpio"),
        (b"070707000000", "cpio"),
        (b"7z\xbc\xaf\x27\x1c\0\x04", "7-Zip"),
        (b"Rar!\x1a\x07\x01\0", "RAR"),
        (
            b"!<arch>\ndebian-binary   ",
            "a Debian package: `dpkg-deb --fsys-tarfile rootfs.tar.gz`",
        ),
        (b"!<arch>\n", "an ar archive"),
        (b"\xed\xab\xee\xdb\x03\0", "an RPM package"),
        (
            b"\x3a\xff\x26\xed\x01\0\0\0",
            "an Android sparse image: `simg2img rootfs.tar.gz disk.raw`",
        ),
        (b"\x1f\x9d\x90", "compress(1)"),
        (b"\x89LZO\0\r\n\x1a\n", "lzop"),
        (b"QFI\xfb\0\0\0\x01", "qcow"),
        (b"MSWIM\0\0\0", "WIM"),
        (b"MSCF\0\0\0\0", "a cabinet file"),
        (b"xar!\0\x1c", "a xar archive"),
        (b"ANDROID!", "an Android boot image"),
        (b"LRZI\0\x06", "lrzip"),
        (b"\x1f\x1e\0", "pack(1)"),
        (b"Bochs Virtual HD Image", "a Bochs image"),
        (b"#!/bin/sh\n#V2.0 Format\n", "a cloop image"),
        (
            b"EVF\x09\x0d\x0a\xff\0",
            "an Expert Witness image: `ewfexport`",
        ),
        (b"partclone-image", "a Partclone image: `partclone.restore`"),
        (
            b"version https://git-lfs.github.com/spec/v1\n",
            "a pointer of git-lfs: `git lfs pull`",
        ),
        (
            b"\x7fELF\x02\x01\x01\0AI\x02",
            "an AppImage: a program that unpacks itself with `--appimage-extract`: only if you trust it",
        ),
        (
            b"VMA\0\0\0\0\x01",
            "a backup of Proxmox VE (VMA): `vma extract rootfs.tar.gz DIRECTORY`",
        ),
        (
            b"#!/usr/bin/env run-singularity\n\0SIF_MAGIC",
            "a Singularity image (SIF)",
        ),
        (b"<!DOCTYPE html>", "a web page: the download went wrong"),
        (b"\x7fELF\x02\x01\x01", "a program"),
    ];
    for (bytes, said) in cases {
        let mut file = bytes.to_vec();
        file.resize(2048, 7);
        place.refused(&file, said);
        place.refused(bytes, said);
        let name = said.split(':').next().unwrap();
        place.refused(&gzip(&file), name);
        // With --from raw, any file is taken as a disk.
        place.convert(&file, "--from raw").success();
        // create --image refuses the file with the same message.
        place
            .run("create --image rootfs.tar.gz x")
            .code(1)
            .stderr(contains(*said));
    }
    // The old binary cpio format, in both byte orders.
    let old = [
        b"\xc7\x71\x01\0\x02\0\xa4\x81\0\0\0\0\x01\0\0\0\0\0\0\0\x02\0\0\0\0\0a\0".as_slice(),
        b"\x71\xc7\0\x01\0\x02\x81\xa4\0\0\0\0\0\x01\0\0\0\0\0\0\0\x02\0\0\0\0a\0",
    ];
    for old in old {
        place.refused(old, "a cpio archive");
    }
    place.refused(&at(2048, &[(1536, b"koly\0\0\0\x04")]), "DMG");
}

/// Tests with the output of archivers and compressors: one for each command. They need the programs.
pub(crate) fn trials_of_programs() -> Vec<Trial> {
    let archives = [
        ("zip", "zip -q - name", "a zip archive"),
        ("cpio", "echo name | cpio -o -H newc", "a cpio archive"),
        ("cpio", "echo name | cpio -o -H crc", "a cpio archive"),
        ("cpio", "echo name | cpio -o -H odc", "a cpio archive"),
        ("cpio", "echo name | cpio -o -H bin", "a cpio archive"),
        ("ar", "ar q x.a name && cat x.a", "an ar archive"),
    ];
    let compressions = [
        ("gzip", "gzip -c disk"),
        ("bzip2", "bzip2 -c disk"),
        ("xz", "xz -c disk"),
        ("xz", "xz --format=lzma -c disk"),
        ("zstd", "zstd -q -c disk"),
        ("zstd", "zstd -q --long=27 -c disk"),
        ("lz4", "lz4 -q -c disk"),
        ("lz4", "lz4 -q -l -c disk"),
        ("lz4", "lz4 -q -BX -9 -c disk"),
    ];
    let name = |command: &str| format!("output_is_recognised: {command}");
    let archives = archives.map(|(program, command, said)| {
        let needs = [needs::program(program)];
        trial(module_path!(), &name(command), &needs, move || {
            let place = Place::new();
            place.write("name", b"content\n");
            let archive = place.output_of("sh", &["-c", command]);
            Place::new().refused(&archive, said);
        })
    });
    let compressions = compressions.map(|(program, command)| {
        let needs = [needs::program(program)];
        trial(module_path!(), &name(command), &needs, move || {
            let place = Place::new();
            place.write("disk", &disk());
            let packed = place.output_of("sh", &["-c", command]);
            let other = Place::new();
            other.convert(&packed, "").success();
            assert!(other.dump("out.obd") == disk());
        })
    });
    archives.into_iter().chain(compressions).collect()
}

/// A disk with a partition table, and pseudo-random bytes.
fn disk() -> Vec<u8> {
    let mut disk = at(300 << 10, &[(450, b"\x83"), (510, b"\x55\xaa")]);
    let mut state = 1u32;
    for byte in &mut disk[4096..40_000] {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        *byte = (state >> 24) as u8;
    }
    disk
}

fn disks() {
    let place = Place::new();
    let heads: &[&[(usize, &[u8])]] = &[
        &[(510, b"\x55\xaa")],
        &[(512, b"EFI PART")],
        &[(4096, b"EFI PART")],
        &[
            (1024, b"\x10\0\0\0\x40"),
            (1080, b"\x53\xef"),
            (1100, b"\x01"),
        ],
        &[(0, b"XFSB")],
        &[(65_600, b"_BHRfS_M")],
        &[(1024, b"\xe2\xe1\xf5\xe0")],
        &[(0, b"hsqs")],
        &[(1024, b"\x10\x20\xf5\xf2")],
        &[(3, b"NTFS    ")],
        &[(82, b"FAT32   ")],
        &[(32_769, b"CD001")],
        &[(32_769, b"BEA01"), (34_817, b"NSR02")],
        &[(536, b"LVM2 001")],
        &[(0, b"LUKS\xba\xbe")],
        &[(4086, b"SWAPSPACE2")],
    ];
    for head in heads {
        let disk = at(100 << 10, head);
        place.convert(&disk, "").success();
        assert!(place.dump("out.obd") == disk, "{head:?}");
        place.refused(&disk[..disk.len() - 1], "no whole number of sectors");
        place
            .convert(&disk[..disk.len() - 1], "--from raw")
            .success();
        place
            .run("create --image rootfs.tar.gz x")
            .code(1)
            .stderr(contains("--raw takes it"));
    }
    for (name, pack) in COMPRESSIONS {
        let packed = pack(&disk());
        place.convert(&packed, "").success();
        assert!(place.dump("out.obd") == disk(), "{name}");
        place.damaged(&packed[..packed.len() - 1], "incomplete download or copy?");
        place.damaged(&pack(&disk()[..299_999]), "no whole number of sectors");
        place
            .run("create --image rootfs.tar.gz x")
            .code(1)
            .stderr(contains("compressed with"));
    }
    // These have no magic of any kind, so convert needs --from raw.
    place.refused(&[0; 8192], "--from raw for a disk");
    place.refused(b"", "empty");
    place.refused(&[b'x'; 8192], "--from raw for a disk");
    place.convert(&[0; 8192], "--from raw").success();
    place.convert(&[b'x'; 8191], "--from raw").success();
    // create --image takes content of no known kind as a disk. It refuses a size that is not a
    // multiple of the sector size.
    for unknown in [[0; 8192], [b'x'; 8192]] {
        place.write("rootfs.tar.gz", &unknown);
        place
            .run("create --force --image rootfs.tar.gz out.obd")
            .success();
        place.write("rootfs.tar.gz", &unknown[1..]);
        place
            .run("create --image rootfs.tar.gz x")
            .code(1)
            .stderr(contains("its 8191 bytes are no whole number of sectors"));
        assert!(!place.path("x").exists());
        place
            .run("create --force --raw --image rootfs.tar.gz out.obd")
            .success();
    }
    place.write("rootfs.tar.gz", &rootfs());
    place
        .run("create --image rootfs.tar.gz x")
        .code(1)
        .stderr(contains("but tar"));
    place.run("create --image rootfs.tar.gz x --raw").success();
    place
        .run("create --image x y")
        .code(1)
        .stderr(contains("is an OverlayBD layer"));
}

/// Returns a pseudo-random generator, with the same numbers in each run. Its argument is the bound.
fn numbers() -> impl FnMut(usize) -> usize {
    let mut state = 7u64;
    move |below| {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        (state >> 33) as usize % below
    }
}

/// `convert` of the samples in this source file, cut off and with changed bytes, exits with 0, 1 or 3:
/// it never panics.
fn mutations() {
    let place = Place::new();
    let samples: Vec<Vec<u8>> = COMPRESSIONS
        .iter()
        .map(|(_, pack)| pack(&rootfs()[..4096]))
        .chain([rootfs()[..4096].to_vec(), disk()[..4096].to_vec()])
        .collect();
    let mut random = numbers();
    for _ in 0..60 {
        let mut bytes = samples[random(samples.len())].clone();
        for _ in 0..random(4) {
            let at = random(bytes.len());
            bytes[at] = random(256) as u8;
        }
        bytes.truncate(random(bytes.len() + 1));
        let done = place.convert(&bytes, "--fs erofs");
        let code = done.get_output().status.code();
        assert!(matches!(code, Some(0 | 1 | 3)), "{code:?}: {done}");
    }
}

/// Whole tars with changed fields in their headers. The checksums are corrected, so that many of these
/// tars are accepted by the reader, and reach the code that makes the file system.
fn other_headers() {
    let place = Place::new();
    let link = |name: &str, kind: u8, target: &[u8]| {
        let mut block = header(name, kind, 0);
        block[157..157 + target.len()].copy_from_slice(target);
        sign(&mut block);
        block
    };
    let members = [
        member("d/", b'5', b""),
        pax(&[
            (b"path", b"d/file"),
            (b"mtime", b"-1.5"),
            (b"SCHILY.xattr.user.a", b"value"),
            (
                b"SCHILY.acl.access",
                b"user::rwx,user:7:r-x,group::r-x,mask::r-x,other::---",
            ),
        ]),
        member("file", b'0', b"content"),
        pax(&[
            (b"GNU.sparse.size", b"100000"),
            (b"GNU.sparse.map", b"8192,4,99999,1"),
        ]),
        member("sparse", b'0', b"12345"),
        link("l", b'2', b"d"),
        member("l/below", b'0', &[b'x'; 5000]),
        link("hard", b'1', b"d/file"),
        header("null", b'3', 0),
        header("fifo", b'6', 0),
    ];
    for fs in ["erofs", "btrfs"] {
        let done = place.convert(&tar(&members), &format!("--fs {fs}"));
        done.success().stderr("");
    }
    let mut random = numbers();
    let mut made = 0;
    for turn in 0..60 {
        let mut members = members.to_vec();
        for _ in 0..=random(3) {
            let nth = random(members.len());
            let block = &mut members[nth];
            // Where to change a byte: in the records of an extended header, or in a field of a header.
            let at = match block[156] {
                b'x' => 512 + random(120),
                _ => {
                    [0, 100, 108, 116, 124, 136, 156, 157, 257, 329, 337, 345][random(12)]
                        + random(8)
                }
            };
            block[at] = match random(3) {
                0 => random(256) as u8,
                1 => b"0123457"[random(7)],
                _ => b"/.\0=% lKLS\x80\xff"[random(12)],
            };
            sign(block);
        }
        if random(4) == 0 {
            let (a, b) = (random(members.len()), random(members.len()));
            members.swap(a, b);
        }
        let fs = ["erofs", "btrfs"][turn % 2];
        let done = place.convert(&tar(&members), &format!("--from tar --fs {fs}"));
        let code = done.get_output().status.code();
        assert!(matches!(code, Some(0 | 1 | 3)), "{code:?}: {done}");
        made += usize::from(code == Some(0));
    }
    // Otherwise the changes would not test the code that makes the file system.
    assert!(made > 15, "{made}");
}

fn granularity() {
    let place = Place::new();
    // Every second sector has data, the others have zeros.
    let mut disk = disk();
    for sector in disk[65_536..131_072].chunks_mut(1024) {
        sector[..512].fill(7);
    }
    place.write("disk", &disk);
    let len = |options: &str| {
        place
            .run(&format!(
                "convert disk out.obd --force --algorithm none {options}"
            ))
            .success();
        assert!(place.dump("out.obd") == disk);
        fs::metadata(place.path("out.obd")).unwrap().len()
    };
    assert_eq!(len(""), len("--granularity 4k"));
    assert!(len("--granularity 512") < len("--granularity 1k"));
    place
        .run("create --image disk fine.obd --skip-zeros --granularity 512 --algorithm none")
        .success();
    assert_eq!(
        fs::metadata(place.path("fine.obd")).unwrap().len(),
        len("--granularity 512")
    );
    place
        .run("convert disk x --granularity 3k")
        .code(1)
        .stderr(contains("power of two"));
}
