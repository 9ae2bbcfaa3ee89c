// SPDX-License-Identifier: GPL-2.0

//! Converts container images to layers.
//!
//! - [`layout`]: reads an OCI image layout, and finds the chosen image. [`packed`] makes a layout from an
//!   archive.
//! - [`spec`]: names and structures of the image specification. [`job`]: the options.
//! - [`ready`]: converts images whose layers are OverlayBD layers already.
//! - [`image`]: converts ordinary images, whose layers are tars. [`cache`] keeps the new layers.
//!
//! The result is a [directory](crate::make::made): layers with a `config.v1.json`, or an OCI image layout.

mod cache;
mod image;
mod job;
mod layout;
mod packed;
mod ready;
mod spec;

use anyhow::Result;

pub(crate) use self::job::{Choice, Job};
use self::layout::Layout;
use crate::files::place::directory;
use crate::make::made::Made;
use crate::terminal::exit::Failure;

/// Makes a directory from an image. The directory gets its name only when it is complete.
pub(crate) fn convert(job: &Job<'_>) -> Result<()> {
    let place = directory(job.out);
    let made = match job.choice.oci {
        true => Made::without_list(job.out)?,
        false => Made::new(job.out)?,
    };
    let layout = match job.input.is_dir() {
        true => Layout::of(job.input),
        false => packed::unpack(job.input, place, job.choice)?,
    };
    let (image, manifest) = layout.choose(job.choice)?;
    if ready::is_ready(&layout, &manifest) {
        if job.shapes_layers || job.choice.oci || job.choice.cache.is_some() {
            return Err(Failure::usage(format!(
                "{}: is an image whose layers are OverlayBD layers, which stay as they are: \
                 options for wrapping, --allow-loss, --oci and --cache do not apply",
                job.input.display()
            )));
        }
        return ready::convert(&layout, &image, manifest, made);
    }
    image::convert(job, &layout, &image, &manifest, made)
}
