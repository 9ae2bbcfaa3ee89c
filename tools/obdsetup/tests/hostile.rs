// SPDX-License-Identifier: GPL-2.0

//! `obdsetup convert` of malicious tars, and of tars with names and numbers that no file can have.

use predicates::prelude::PredicateBooleanExt;
use predicates::str::contains;

use crate::common::tars::{header, member, pax, sign, tar};
use crate::common::{gzip, needs, tests, Place};

tests! {
    names_are_no_commands;
    names_that_no_file_has;
    numbers_that_no_file_has;
    many_headers_of_a_member;
    headers_for_all_members;
    compressed_tars_and_data_after_the_end_marker;
    names_that_look_like_disks;
    large_files_with_holes;
    acls_that_name_users needs needs::e2fsprogs();
    acls_that_are_the_mode;
    records_of_other_programs;
    names_that_are_not_utf8_stay;
}

impl Place {
    /// Checks that `convert` refuses the tar with exit code 3 for each file system, and that the message is short
    /// and contains `said`.
    fn impossible(&self, bytes: &[u8], said: &str) {
        for fs in ["erofs", "btrfs", "ext4"] {
            let done = self.convert(bytes, &format!("--fs {fs}")).code(3);
            let done = done.stderr(contains(said).and(contains("member ")));
            assert!(done.get_output().stderr.len() < 2000, "{done}");
        }
    }
}

/// Returns a tar of a file with this extended attribute.
fn with_xattr(name: &[u8], value: &[u8]) -> Vec<u8> {
    let key = [b"SCHILY.xattr.", name].concat();
    tar(&[pax(&[(&key, value)]), member("file", b'0', b"x")])
}

/// An attribute's name that ends with a command, after so many blanks that a program which splits
/// long lines would run it: `convert` refuses the name, and the command is not run.
fn names_are_no_commands() {
    let place = Place::new();
    let told = place.path("told");
    for blanks in [8190, 4090, 8185] {
        let mut name = b"user.".to_vec();
        name.resize(name.len() + blanks, b' ');
        name.extend(format!("!echo told >{} #", told.display()).bytes());
        place.impossible(&with_xattr(&name, b"a"), "extended attribute ");
        assert!(!told.exists());
    }
}

fn names_that_no_file_has() {
    let place = Place::new();
    let long = |len: usize| vec![b'n'; len];
    let user = |len: usize| [b"user.".to_vec(), long(len)].concat();
    place
        .convert(&with_xattr(&user(250), b"a"), "--fs erofs")
        .success();
    place.impossible(&with_xattr(&user(251), b"a"), "a name of 256 bytes");
    place.impossible(&with_xattr(&user(2 << 20), b"a"), "a name of 2097157 bytes");
    place.impossible(&with_xattr(b"user.", b"a"), "its name is empty");
    place.impossible(&with_xattr(b"user.a\0b", b"a"), "its name has a zero byte");
    place.impossible(
        &with_xattr(b"user.a", &long(65_537)),
        "a value of 65537 bytes",
    );
    let named = |path: &[u8]| tar(&[pax(&[(b"path", path)]), member("file", b'0', b"x")]);
    place.convert(&named(&long(255)), "--fs erofs").success();
    place.impossible(&named(&long(256)), "a name of 256 bytes in the path");
    place.impossible(&named(&long(2 << 20)), "a path of 2097152 bytes");
    place.impossible(
        &named(&[b"a/".repeat(30_000), b"f".to_vec()].concat()),
        "a path of 60001 bytes",
    );
    let link = |target: &[u8]| tar(&[pax(&[(b"linkpath", target)]), member("file", b'2', b"")]);
    place.convert(&link(&long(4000)), "--fs btrfs --allow-loss");
    place.impossible(
        &link(&long(4096)),
        "a symbolic link to a path of 4096 bytes",
    );
    place.impossible(
        &link(b"a\0b"),
        "a zero byte in the target of the symbolic link",
    );
    // Each path is short, but each link leads further down.
    let mut members = vec![];
    let mut deep = b"l".to_vec();
    for _ in 0..3 {
        let target = b"d/".repeat(700);
        members.push(pax(&[(b"path", &deep), (b"linkpath", &target)]));
        members.push(member("link", b'2', b""));
        deep.extend_from_slice(b"/l");
    }
    members.push(pax(&[(b"path", &deep)]));
    members.push(member("file", b'0', b""));
    place.impossible(
        &tar(&members),
        "with links followed, a path of more than 4095 bytes",
    );
}

fn numbers_that_no_file_has() {
    let place = Place::new();
    let device = |major: &[u8], minor: &[u8]| {
        let mut block = header("null", b'3', 0);
        block[329..329 + major.len()].copy_from_slice(major);
        block[337..337 + minor.len()].copy_from_slice(minor);
        sign(&mut block);
        tar(&[block])
    };
    place
        .convert(&device(b"0007777\0", b"3777777\0"), "--fs btrfs")
        .success();
    place.impossible(&device(b"0010000\0", b"0000001\0"), "device number 4096:1");
    place.impossible(
        &device(b"0000001\0", b"4000000\0"),
        "device number 1:1048576",
    );
    place.impossible(
        &device(b"\x80\0\0\0\xff\xff\xff\xff", b"0000001\0"),
        "device number 4294967295:1",
    );
    let long = [
        pax(&[(b"SCHILY.devmajor", b"4096")]),
        device(b"0000001\0", b"0000001\0"),
    ];
    place.impossible(&long.concat(), "device number 4096:1");
    let sparse = tar(&[
        pax(&[
            (b"GNU.sparse.size", b"9223372036854775808"),
            (b"GNU.sparse.map", b"0,1"),
        ]),
        member("file", b'0', b"x"),
    ]);
    place.impossible(&sparse, "a size of 9223372036854775808 bytes");
}

fn many_headers_of_a_member() {
    let place = Place::new();
    let value = vec![b'v'; 3 << 20];
    let large = pax(&[(b"comment", &value)]);
    let twice = [large.clone(), large.clone(), member("a", b'0', b"")].concat();
    place
        .convert(&tar(&[twice.clone(), twice]), "--fs erofs")
        .success();
    let thrice = tar(&[large.clone(), large.clone(), large, member("a", b'0', b"")]);
    let done = place.convert(&thrice, "--fs erofs").code(3);
    done.stderr(
        contains("the extended header at byte 6293504 has")
            .and(contains("more than 8388608 for one member")),
    );
}

/// The number of records for all members is limited, because they cost time for each member.
fn headers_for_all_members() {
    let place = Place::new();
    let for_all = |records: &[(&[u8], &[u8])]| {
        let mut header = pax(records);
        header[156] = b'g';
        sign(&mut header);
        header
    };
    let comments = |keys: usize, count: usize| {
        let keys: Vec<String> = (0..count)
            .map(|nth| format!("comment.{}", nth % keys))
            .collect();
        let records = keys.iter().map(|key| (key.as_bytes(), b"x".as_slice()));
        for_all(&records.collect::<Vec<_>>())
    };
    let files = |header: Vec<u8>| {
        let files = (0..2000).map(|nth| member(&format!("{nth}"), b'0', b""));
        tar(&[header].into_iter().chain(files).collect::<Vec<_>>())
    };
    // Records with the same keys, as joined archives have them, count once.
    let many = comments(3, 2000);
    place.convert(&files(many), "--fs erofs").success();
    let few = [comments(100, 100), comments(100, 100)].concat();
    place.convert(&files(few), "--fs erofs").success();
    for header in [
        comments(101, 101),
        comments(2000, 2000),
        [comments(100, 100), for_all(&[(b"comment", b"x")])].concat(),
    ] {
        let done = place.convert(&files(header), "--fs erofs").code(3);
        done.stderr(
            contains("the headers for all members, up to the one at byte ")
                .and(contains(", have more than 100 records")),
        );
    }
    let map = "0,0,".repeat(10_000) + "0,0";
    let map = for_all(&[
        (b"GNU.sparse.size", b"0"),
        (b"GNU.sparse.map", map.as_bytes()),
    ]);
    let done = place.convert(&files(map), "--fs erofs").code(3);
    done.stderr(contains(
        "the header for all members at byte 0 describes a sparse file",
    ));
}

/// A compressed tar needs no end marker. Data after the end marker is ignored, with one warning,
/// whether the tar is compressed or not. The name of the file doesn't matter.
fn compressed_tars_and_data_after_the_end_marker() {
    let place = Place::new();
    // The end of the compressed data is the end of the tar.
    place
        .convert(&gzip(&member("file", b'0', b"x")), "--fs erofs")
        .success()
        .stderr("");
    let mut more = tar(&[member("file", b'0', b"x")]);
    more.extend([7; 512]);
    for bytes in [gzip(&more), more] {
        let done = place.convert(&bytes, "--fs erofs").success();
        done.stderr(
            contains("what follows the end marker")
                .count(1)
                .and(contains("rootfs.tar.gz: ")),
        );
    }
}

fn names_that_look_like_disks() {
    let place = Place::new();
    for name in [
        "QED",
        "vhdxfile",
        "conectix",
        "KDMV\x01",
        "COWD",
        "QFI",
        "# Disk DescriptorFile",
    ] {
        let tar = tar(&[member(name, b'0', b"x")]);
        place.convert(&tar, "--fs erofs").success();
    }
}

fn large_files_with_holes() {
    let place = Place::new();
    for size in [1_u64 << 59, (1 << 62) + 1, (1 << 63) - 1] {
        let size = size.to_string();
        let tar = tar(&[
            pax(&[
                (b"GNU.sparse.size", size.as_bytes()),
                (b"GNU.sparse.map", b"0,0"),
            ]),
            member("file", b'0', b""),
        ]);
        place.convert(&tar, "--fs erofs").success();
        let dump = place.dump("out.obd");
        // Finds the inode by the size of the file. The data must be in chunks (layout 4), and in the chunk format only
        // bits of the chunk size may be set.
        let size: u64 = size.parse().unwrap();
        let at = dump
            .chunks(32)
            .position(|slot| slot[8..16] == size.to_le_bytes());
        let at = at.unwrap() * 32;
        assert_eq!(dump[at] >> 1, 4, "{size}");
        let format = &dump[at + 16..at + 20];
        assert!(
            format[0] <= 31 && format[1..] == [0; 3],
            "{size}: {format:?}"
        );
    }
}

fn acls_that_name_users() {
    let place = Place::new();
    let acl = |text: &[u8]| {
        tar(&[
            pax(&[(b"SCHILY.acl.access", text)]),
            member("file", b'0', b"x"),
            member("other", b'0', b"x"),
        ])
    };
    let names = acl(b"user::rw-,user:joe:r--,group::r--,mask::r--,other::---");
    for fs in ["erofs", "btrfs", "ext4"] {
        let done = place.convert(&names, &format!("--fs {fs}")).code(1);
        done.stderr(
            contains("1 file stored without them: ./file").and(contains("--numeric-owner")),
        );
        let done = place.convert(&names, &format!("--fs {fs} --allow-loss"));
        done.success()
            .stderr(contains("1 file stored without them: ./file"));
    }
    let root = acl(b"user::rw-,user:root:r--,group::r--,mask::r--,other::---");
    place.convert(&root, "--fs erofs").success().stderr("");
    let done = place.convert(&acl(b"user::x:y:z"), "--fs erofs").code(3);
    done.stderr(contains("member ./file at byte 0: POSIX ACL: "));
}

/// The kernel stores no ACL that the mode can express, so GNU tar run by root makes a file without one.
fn acls_that_are_the_mode() {
    let place = Place::new();
    let dump = |records: &[(&[u8], &[u8])]| {
        let tar = tar(&[pax(records), member("dir/", b'5', b"")]);
        place
            .convert(&tar, "--fs erofs --algorithm none")
            .success()
            .stderr("");
        place.dump("out.obd")
    };
    let list = b"user::rwx\ngroup::r-x\nother::r-x";
    let plain = dump(&[(b"comment", b"x")]);
    assert!(plain == dump(&[(b"SCHILY.acl.access", list)]));
    assert!(plain != dump(&[(b"SCHILY.acl.access", b"user::rwx,group::r-x,other::---")]));
    // The default ACL, for new files in a directory, stays.
    assert!(plain != dump(&[(b"SCHILY.acl.default", list)]));
}

fn records_of_other_programs() {
    let place = Place::new();
    let records = |records: &[(&[u8], &[u8])]| {
        tar(&[
            pax(records),
            member("file", b'0', b"x"),
            pax(records),
            member("more", b'0', b"x"),
        ])
    };
    let usual = records(&[
        (b"comment", b"x"),
        (b"atime", b"1.5"),
        (b"SCHILY.ino", b"7"),
        (b"LIBARCHIVE.creationtime", b"1"),
    ]);
    place.convert(&usual, "--fs erofs").success().stderr("");
    let flags = records(&[(b"SCHILY.fflags", b"immutable")]);
    let done = place.convert(&flags, "--fs erofs").success();
    done.stderr(
        contains("\"SCHILY.fflags\" are ignored")
            .count(1)
            .and(contains("./file")),
    );
    let nfs = records(&[(b"SCHILY.acl.ace", b"owner@:rwx::allow")]);
    let done = place.convert(&nfs, "--fs erofs").code(1);
    done.stderr(contains(
        "ACLs of NFS are not kept: 2 files stored without them: ./file ./more",
    ));
    place.convert(&nfs, "--fs erofs --allow-loss").success();
    // The same attribute, as two programs write it.
    let dump = |tar: &[u8]| {
        place.convert(tar, "--fs erofs").success().stderr("");
        place.dump("out.obd")
    };
    let plain = dump(&records(&[(b"SCHILY.xattr.user.a b", b"foo\0")]));
    assert!(plain == dump(&records(&[(b"LIBARCHIVE.xattr.user.a%20b", b"Zm9vAA")])));
    place
        .convert(
            &records(&[(b"LIBARCHIVE.xattr.user.a", b"?")]),
            "--fs erofs",
        )
        .code(3)
        .stderr(contains("the value of LIBARCHIVE.xattr.user.a is wrong"));
}

fn names_that_are_not_utf8_stay() {
    let place = Place::new();
    let other = Place::new();
    let told = other.path("told").display().to_string();
    other.script(
        "mksquashfs",
        &format!("printf '%s\\n' \"$@\" >>'{told}'\nexit 1"),
    );
    let root = tar(&[
        pax(&[(b"SCHILY.xattr.user.\xff", b"a")]),
        member("./", b'5', b""),
    ]);
    place.write("rootfs.tar.gz", &root);
    let path = std::env::var("PATH").unwrap_or_default();
    let path = format!("{}:{path}", other.dir().display());
    let mut command = place.command("convert rootfs.tar.gz out.obd --fs squashfs");
    command.env("PATH", path).assert().failure();
    let told = other.read("told");
    let wanted = b"/ x user.\xff=0sYQ==";
    assert!(told.split(|&byte| byte == b'\n').any(|line| line == wanted));
}
