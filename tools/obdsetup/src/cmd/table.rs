// SPDX-License-Identifier: GPL-2.0

//! `obdsetup table`.

use std::os::unix::fs::FileTypeExt;

use anyhow::Result;
use overlaybd::Payload;
use serde::Serialize;

use super::open::LayersArgs;
use crate::devices::dm::backing::Backing;
use crate::devices::dm::node;
use crate::devices::dm::plan::Lower;
use crate::input::layer_name::LayerArg;
use crate::terminal::{plain, print, print_json};

/// Arguments of `table`.
#[derive(clap::Args)]
#[command(after_help = "Examples:
  obdsetup table base.obd app.obd
  obdsetup table --name app
      the layers that /etc/overlaybdtab has for app
  obdsetup table --name vol --concise /dev/vdb:size=758556
      for dmsetup create --concise

Prints `DEVICE: LINE` for each device, lowest first, as `dmsetup table` does. Needs neither root nor \
the kernel module. A block device is printed as MAJOR:MINOR. LOOP(FILE) stands for the loop device \
of a file. If the size of the file is no whole number of sectors, TAIL(FILE) stands for a second \
loop device, which has the last bytes.")]
pub(crate) struct Args {
    /// Name of the device
    #[arg(long, default_value = "obd")]
    name: String,

    /// Print JSON
    #[arg(long, conflicts_with = "concise")]
    json: bool,

    /// Print one line for `dmsetup create --concise`
    #[arg(long)]
    concise: bool,

    #[command(flatten)]
    layers: LayersArgs,
}

#[derive(Serialize)]
struct Device {
    name: String,
    uuid: String,
    table: Vec<String>,
}

/// Runs `table`.
pub(crate) fn run(args: &Args) -> Result<()> {
    let planned = args.layers.plan_or_tab(&args.name)?;
    let (layers, plan) = (&planned.layers, &planned.plan);
    let payloads = planned.opened.payloads();
    let words = layers.iter().zip(payloads).map(word);
    let words = words.collect::<Result<Vec<_>>>()?;
    let resolve = |lower: Lower| match lower {
        Lower::Layer(nth) => words.get(nth).cloned().unwrap_or_default(),
        Lower::Tail(nth) => {
            let layer = layers.get(nth);
            format!(
                "TAIL({})",
                layer.map(ToString::to_string).unwrap_or_default()
            )
        }
        // Not in this plan: for a writable disk, this command prints only the table of the device below the
        // store, and it plans no partitions.
        Lower::Store | Lower::Disk => String::new(),
        Lower::Device(nth) => {
            let device = plan.devices.get(nth);
            device.map_or_else(String::new, |device| {
                node(&device.name).display().to_string()
            })
        }
    };
    let devices: Vec<Device> = plan
        .devices
        .iter()
        .map(|device| Device {
            name: device.name.clone(),
            uuid: device.uuid.clone(),
            table: device
                .table
                .iter()
                .map(|target| {
                    let params = target.params(&resolve);
                    format!("{} {} {} {params}", target.start, target.len, target.name)
                })
                .collect(),
        })
        .collect();
    if args.json {
        return print_json(&devices);
    }
    if args.concise {
        let parts: Vec<String> = devices
            .iter()
            .map(|Device { name, uuid, table }| format!("{name},{uuid},,ro,{}", table.join(",")))
            .collect();
        return print(&format!("{}\n", plain(&parts.join(";"))));
    }
    for device in &devices {
        for line in &device.table {
            print(&format!("{}\n", plain(&format!("{}: {line}", device.name))))?;
        }
    }
    Ok(())
}

/// Returns the word that stands for a layer in the printed table.
fn word((layer, payload): (&LayerArg, &Payload)) -> Result<String> {
    let meta = payload.file().file().metadata()?;
    match meta.file_type().is_block_device() {
        true => Ok(Backing::device(&meta).number),
        false => Ok(format!("LOOP({layer})")),
    }
}
