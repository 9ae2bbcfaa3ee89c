// SPDX-License-Identifier: GPL-2.0

//! `obdsetup info`.

use std::fmt::Write;

use anyhow::Result;
use overlaybd::dax;
use overlaybd::format::{lsmt, num::to_u64, Blob, Fault};
use overlaybd::identity::is_placed;
use overlaybd::layer::Ident;
use overlaybd::on_disk::lsmt::Labels;
use overlaybd::on_disk::zfile::Metadata;
use overlaybd::{LayerReader, Payload, ZfileReader};
use serde::Serialize;

use crate::input::layer_name::{LayerArg, Purpose};
use crate::input::layers::expand;
use crate::terminal::plain;
use crate::terminal::size;
use crate::terminal::{print, print_json};

/// Arguments of `info`.
#[derive(clap::Args)]
#[command(after_help = "Examples:
  obdsetup info layer.obd
  obdsetup info --json layer.obd | jq '.[0].lsmt.virtual_size'
  obdsetup info /dev/vdb:size=758556      the first 758556 bytes of a device")]
pub(crate) struct Args {
    /// Layers or ZFiles: files or block devices; NAME:size=BYTES if the blob is shorter than the device, or than
    /// the padded file; or a config.v1.json that lists layers
    #[arg(required = true, value_name = "FILE")]
    files: Vec<LayerArg>,

    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// The information on a file.
#[derive(Serialize)]
struct Info {
    path: String,
    size: u64,
    tar: Option<Tar>,
    zfile: Option<Zfile>,
    lsmt: Option<Lsmt>,
}

#[derive(Serialize)]
struct Tar {
    data_offset: u64,
    data_size: u64,
}

#[derive(Serialize)]
struct Zfile {
    metadata: &'static str,
    flags: u64,
    digest: u32,
    algorithm: &'static str,
    level: u8,
    use_dict: u8,
    block_size: u32,
    crc: bool,
    original_size: u64,
    blocks: u64,
    blocks_size: u64,
    index_offset: u64,
    index_crc: u32,
    jump_table_memory: u64,
}

#[derive(Serialize)]
struct Lsmt {
    virtual_size: u64,
    index_offset: u64,
    index_entries: u64,
    segments: u64,
    data_size: u64,
    zeroed_size: u64,
    header_flags: u32,
    trailer_flags: u32,
    version: [u8; 2],
    uuid: String,
    parent_uuid: String,
    user_tag: String,
    /// Largest size in bytes of the pages with which the layer can be mapped.
    dax_page_size: Option<u64>,
    dax_misfit: Option<String>,
}

/// Runs `info`.
pub(crate) fn run(args: &Args) -> Result<()> {
    let files = expand(&args.files)?;
    let infos = files.iter().map(collect).collect::<Result<Vec<_>>>()?;
    if args.json {
        return print_json(&infos);
    }
    let texts: Vec<String> = infos.iter().map(describe).collect();
    print(&texts.join("\n"))
}

fn collect(arg: &LayerArg) -> Result<Info> {
    let payload = Payload::open(arg.open()?).map_err(|error| arg.no_layer(error, Purpose::Read))?;
    let tar = payload.in_tar().then(|| Tar {
        data_offset: payload.blob().start(),
        data_size: payload.blob().size(),
    });
    let zfile = match payload.zfile() {
        Some(zfile) => Some(zfile_info(zfile)?),
        None => None,
    };
    let size = payload.file().size();
    let lsmt = match LayerReader::from_payload(payload) {
        Ok(layer) => Some(lsmt_info(&layer)?),
        // Not an error for a ZFile, which may have any content. A file that is neither a layer nor a ZFile is
        // an error.
        Err(error)
            if zfile.is_some()
                && matches!(error.fault(), Some(Fault::LsmtMagic | Fault::Truncated)) =>
        {
            None
        }
        Err(error) => return Err(arg.no_layer(error, Purpose::Read)),
    };
    Ok(Info {
        path: arg.to_string(),
        size,
        tar,
        zfile,
        lsmt,
    })
}

fn zfile_info(zfile: &ZfileReader) -> Result<Zfile> {
    let geometry = zfile.geometry();
    let found = Metadata::read(zfile.blob())?;
    Ok(Zfile {
        metadata: match found.in_trailer {
            true => "trailer",
            false => "header",
        },
        flags: found.raw.flags,
        digest: found.raw.digest,
        algorithm: geometry.algorithm().name(),
        level: found.level,
        use_dict: found.use_dict,
        block_size: geometry.block_size(),
        crc: geometry.has_crc(),
        original_size: geometry.size(),
        blocks: geometry.blocks(),
        blocks_size: zfile.stored_len(),
        index_offset: found.raw.index_offset,
        index_crc: found.raw.index_crc,
        jump_table_memory: zfile.table_memory(),
    })
}

fn lsmt_info(layer: &LayerReader) -> Result<Lsmt> {
    let raw = |at| -> Result<(lsmt::RawHeader, Labels)> {
        let mut bytes = [0; 512];
        layer.payload().read_at(at, &mut bytes)?;
        let raw = lsmt::RawHeader::parse(&bytes)
            .ok_or_else(|| anyhow::anyhow!("the file changes while it is read"))?;
        Ok((raw, Labels::parse(&bytes)))
    };
    let (header, _) = raw(0)?;
    let (trailer, labels) = raw(layer.payload().size() - lsmt::HEADER_SIZE)?;
    let bytes_of = |zeroed| -> u64 {
        let lengths = layer.segments().iter().filter(|s| s.zeroed() == zeroed);
        lengths.map(|s| s.length() * 512).sum()
    };
    let ident = layer.ident();
    let dax = dax::page_size(layer)?;
    Ok(Lsmt {
        virtual_size: layer.lsmt().virtual_size(),
        index_offset: trailer.index_offset,
        index_entries: layer.lsmt().entries(),
        segments: to_u64(layer.segments().len()),
        data_size: bytes_of(false),
        zeroed_size: bytes_of(true),
        header_flags: header.flags,
        trailer_flags: trailer.flags,
        version: labels.version,
        uuid: ident.uuid.clone(),
        parent_uuid: ident.parent.clone(),
        user_tag: String::from_utf8_lossy(&ident.user_tag).into_owned(),
        dax_page_size: dax.ok(),
        dax_misfit: dax.err().map(|misfit| misfit.to_string()),
    })
}

/// Returns the information as text for people.
fn describe(info: &Info) -> String {
    let mut text = format!("{}: {}\n", plain(&info.path), size::show(info.size));
    let mut line = |name: &str, value: &dyn std::fmt::Display| {
        let _ = writeln!(text, "  {name:<18} {value}");
    };
    if let Some(tar) = &info.tar {
        line("tar data offset", &tar.data_offset);
        line("tar data size", &size::show(tar.data_size));
    }
    if let Some(zfile) = &info.zfile {
        line("zfile algorithm", &zfile.algorithm);
        line("zfile block size", &zfile.block_size);
        line("zfile CRC", &if zfile.crc { "yes" } else { "no" });
        line("zfile content", &size::show(zfile.original_size));
        line("zfile blocks", &zfile.blocks);
        line("zfile stored", &size::show(zfile.blocks_size));
        line("zfile metadata", &zfile.metadata);
        line("zfile flags", &format_args!("{:#x}", zfile.flags));
        line("zfile digest", &format_args!("{:#010x}", zfile.digest));
        line("zfile level", &zfile.level);
        line("zfile use_dict", &zfile.use_dict);
        line("zfile index offset", &zfile.index_offset);
        line(
            "zfile index CRC",
            &format_args!("{:#010x}", zfile.index_crc),
        );
        line("zfile jump table", &size::show(zfile.jump_table_memory));
    }
    if let Some(lsmt) = &info.lsmt {
        let or_none = |text: &str| match text {
            "" => "none".to_owned(),
            text => text.escape_debug().to_string(),
        };
        line("lsmt virtual size", &size::show(lsmt.virtual_size));
        line("lsmt segments", &lsmt.segments);
        line("lsmt data", &size::show(lsmt.data_size));
        line("lsmt zeroed", &size::show(lsmt.zeroed_size));
        line("lsmt index offset", &lsmt.index_offset);
        line("lsmt index entries", &lsmt.index_entries);
        line(
            "lsmt header flags",
            &format_args!("{:#x}", lsmt.header_flags),
        );
        line(
            "lsmt trailer flags",
            &format_args!("{:#x}", lsmt.trailer_flags),
        );
        let [major, minor] = lsmt.version;
        line("lsmt version", &format_args!("{major}.{minor}"));
        line("lsmt UUID", &or_none(&lsmt.uuid));
        line("lsmt parent UUID", &or_none(&lsmt.parent_uuid));
        line("lsmt place", &place(lsmt));
        line("lsmt user tag", &or_none(&lsmt.user_tag));
        let dax = lsmt
            .dax_misfit
            .as_ref()
            .map(|misfit| format!("no, {misfit}"));
        let pages = size::show(lsmt.dax_page_size.unwrap_or(0));
        let fits = || format!("in pages of up to {pages}");
        line("lsmt DAX", &dax.unwrap_or_else(fits));
    }
    text
}

/// Returns a text that says where in a stack the layer belongs by its UUIDs, or that this cannot be checked.
fn place(lsmt: &Lsmt) -> &'static str {
    let known = Ident::is_known;
    match (known(&lsmt.uuid), known(&lsmt.parent_uuid)) {
        (_, true) => "over the parent only",
        (true, false) if is_placed(&lsmt.uuid) => "lowest",
        _ => "cannot be checked: no UUID says what is below",
    }
}
