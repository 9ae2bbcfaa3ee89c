// SPDX-License-Identifier: GPL-2.0

//! Combines and checks the headers of a member.

use anyhow::Result;
use overlaybd::format::num::to_u64;

use super::header::pad;
use super::header::{BadField, Header};
use super::pax::{BadRecord, Extended};
use super::reader::Archive;
use super::{member, Device, Member, MemberKind, Time};

/// Limit in bytes for all headers together that apply to all members. git writes one of 52 bytes.
const MAX_GLOBAL: u64 = 64 << 10;
/// Largest number of records, with different keys, that apply to all members. Each member gets all of them.
const MAX_GLOBAL_RECORDS: usize = 100;

impl Archive {
    /// Adds the extended header of type `kind` at byte `at` to `to`, which is for the next member, or to the
    /// records for all members.
    pub(super) fn extend(
        &mut self,
        kind: u8,
        at: u64,
        payload: &[u8],
        to: &mut Extended,
    ) -> Result<()> {
        let text = || {
            let text = payload.split(|&byte| byte == 0).next();
            text.unwrap_or_default().to_vec()
        };
        let parsed = match kind {
            b'L' => {
                to.name = Some(text());
                Some(())
            }
            b'K' => {
                to.link = Some(text());
                Some(())
            }
            b'g' => {
                self.global_len += to_u64(payload.len());
                if self.global_len > MAX_GLOBAL {
                    return Err(self.bad(&format!(
                        "the headers for all members, up to the one at byte {at}, have more than \
                         {MAX_GLOBAL} bytes"
                    )));
                }
                let parsed = self.global.parse(payload);
                self.global.merge();
                self.check_global(at)?;
                parsed
            }
            _ => to.pax.parse(payload),
        };
        parsed.ok_or_else(|| {
            self.bad(&format!(
                "the extended header at byte {at} has a malformed record"
            ))
        })
    }

    /// Checks the records that apply to all members, after those of the header at byte `at` were added. Their number
    /// is limited, because they are copied and searched for each member.
    fn check_global(&self, at: u64) -> Result<()> {
        if self.global.count() > MAX_GLOBAL_RECORDS {
            return Err(self.bad(&format!(
                "the headers for all members, up to the one at byte {at}, have more than \
                 {MAX_GLOBAL_RECORDS} records"
            )));
        }
        match self.global.has_sparse() {
            true => Err(self.bad(&format!(
                "the header for all members at byte {at} describes a sparse file, which can be only \
                 one of them"
            ))),
            false => Ok(()),
        }
    }

    /// Returns the member that the headers describe. `start` is the offset of the first of them, `at` that of
    /// `header`, and `size` the size in `header`.
    pub(super) fn member(
        &mut self,
        start: u64,
        at: u64,
        header: &Header<'_>,
        size: u64,
        extended: Extended,
    ) -> Result<Member> {
        let pax = extended.pax.over(&self.global);
        let name = pax.get(b"GNU.sparse.name").or(pax.get(b"path"));
        let name = name
            .map(<[u8]>::to_vec)
            .or(extended.name)
            .unwrap_or_else(|| header.name());
        self.name = member::brief(&name);
        let record = |bad: BadRecord| {
            self.bad(&format!(
                "the value of {} in a header before byte {at} is wrong",
                bad.0
            ))
        };
        let here = |text: &str| self.bad(&format!("member {:?} at byte {at}: {text}", self.name));
        let field = |number: Result<i128, BadField>| {
            number.map_err(|bad| here(&format!("the {} is no number", bad.0)))
        };

        let is_directory = name.ends_with(b"/");
        let path = self.checked_name(at, &name)?;
        let size = match pax.number("size").map_err(record)? {
            Some(size) => u64::try_from(size).map_err(|_| here("the size is negative"))?,
            None => size,
        };
        let link = pax.get(b"linkpath").map(<[u8]>::to_vec);
        let link = link.or(extended.link).unwrap_or_else(|| header.link());
        let device = || -> Result<Device> {
            let number = |key, number| {
                // Numbers that don't fit in the header are in a record.
                let number = match pax.number(key).map_err(record)? {
                    Some(number) => number,
                    None => field(number)?,
                };
                u32::try_from(number).map_err(|_| here("the device number does not fit"))
            };
            Ok(Device {
                major: number("SCHILY.devmajor", header.major())?,
                minor: number("SCHILY.devminor", header.minor())?,
            })
        };
        // Number of bytes of content that follow the header.
        let mut stored = size;
        let kind = match header.kind() {
            b'0' | b'\0' | b'7' if is_directory => MemberKind::Directory,
            b'0' | b'\0' | b'7' | b'S' => MemberKind::File,
            b'1' => {
                // As in GNU tar, links never have content.
                stored = 0;
                MemberKind::HardLink(self.checked_name(at, &link)?)
            }
            b'2' => MemberKind::Symlink(link),
            b'3' => MemberKind::CharDevice(device()?),
            b'4' => MemberKind::BlockDevice(device()?),
            b'5' | b'D' => MemberKind::Directory,
            b'6' => MemberKind::Fifo,
            other => {
                let other = other.escape_ascii();
                return Err(here(&format!("type '{other}' is none that obdsetup knows")));
            }
        };
        if matches!(kind, MemberKind::Symlink(ref link) if link.is_empty()) {
            return Err(here("a symbolic link without a target"));
        }
        if path.is_empty() && kind != MemberKind::Directory {
            return Err(here("only a directory can be the root directory"));
        }
        let id = |key, number| -> Result<u32> {
            let number = match pax.number(key).map_err(record)? {
                Some(number) => number,
                None => field(number)?,
            };
            let number = match number {
                // NFS uses -2 for nobody.
                -0x8000_0000..=-2 => number + (1 << 32),
                number => number,
            };
            let fits = u32::try_from(number)
                .ok()
                .filter(|&number| number < u32::MAX);
            fits.ok_or_else(|| here(&format!("{key} {number} does not fit in 32 bits")))
        };
        let mtime = match pax.time("mtime").map_err(record)? {
            Some(time) => time,
            None => Time {
                seconds: i64::try_from(field(header.mtime())?)
                    .map_err(|_| here("the mtime does not fit"))?,
                nanoseconds: 0,
            },
        };
        let mode = field(header.mode())? & 0o7777;
        let mode = u32::try_from(mode).unwrap_or_default();
        let (uid, gid) = (id("uid", header.uid())?, id("gid", header.gid())?);
        self.left = stored;
        self.padding = pad(stored);
        let (size, extents) = match kind {
            MemberKind::File => self.extents(at, header, &pax)?,
            _ => (0, Vec::new()),
        };
        let (xattrs, records) = pax.rest();
        Ok(Member {
            at: start,
            path,
            kind,
            mode,
            uid,
            gid,
            mtime,
            size,
            extents,
            xattrs,
            records,
        })
    }

    /// Returns the name of a member, or the target of a hard link, in the form of [`Member::path`]. Fails
    /// if it is empty, or has a NUL or `..`.
    pub(super) fn checked_name(&self, at: u64, name: &[u8]) -> Result<Vec<u8>> {
        let here = |text: &str| {
            let name = member::brief(name);
            Err(self.bad(&format!(
                "member {:?} at byte {at}: name {name:?}: {text}",
                self.name
            )))
        };
        if name.contains(&0) {
            return here("has a zero byte, which no name can have");
        }
        if name.is_empty() {
            return here("is empty");
        }
        match member::normal(name) {
            Some(name) => Ok(name),
            None => here("\"..\" leads out of the directory that the tar is unpacked in"),
        }
    }

    /// Returns a number of the header at byte `at`, or the error if it is invalid.
    pub(super) fn in_header(&self, at: u64, number: Result<i128, BadField>) -> Result<u64> {
        match number.map(u64::try_from) {
            Ok(Ok(number)) => Ok(number),
            Ok(Err(_)) => {
                Err(self.bad(&format!("a number in the header at byte {at} does not fit")))
            }
            Err(BadField(name, place)) => {
                let byte = at + to_u64(place);
                Err(self.bad(&format!("the {name} at byte {byte} is no number")))
            }
        }
    }
}
