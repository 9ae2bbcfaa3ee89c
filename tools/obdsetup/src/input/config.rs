// SPDX-License-Identifier: GPL-2.0

//! Reads `config.v1.json`, with which containerd's overlaybd snapshotter describes a stack.

use std::io::ErrorKind;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use anyhow::Result;
use overlaybd::format::merge::MAX_LAYERS;
use serde::{Deserialize, Serialize};

use crate::files::json;
use crate::input::archive::brief;
use crate::input::layer_name::LayerArg;
use crate::terminal::exit::{self, Failure};

/// Longest path in bytes (PATH_MAX without the zero at the end).
const MAX_PATH: usize = 4095;
/// Names of a layer's file in its directory, in the order in which the snapshotter looks for them.
const NAMES: [&str; 3] = ["overlaybd.commit", ".commit", "overlaybd.sealed"];

/// The fields of a `config.v1.json` that obdsetup reads or writes.
#[derive(Debug, Default, Deserialize, Serialize)]
#[serde(default, rename_all = "camelCase")]
pub(crate) struct Config {
    /// The URL from which layers without a file would be fetched.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) repo_blob_url: Option<String>,
    /// Layers, lowest first.
    pub(crate) lowers: Vec<Lower>,
    /// The writable layer on top. If it names no files, there is none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) upper: Option<Upper>,
}

/// A layer.
#[derive(Debug, Default, Deserialize, Serialize)]
#[serde(default, rename_all = "camelCase")]
pub(crate) struct Lower {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) file: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) dir: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) digest: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) target_file: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) target_digest: Option<String>,
}

/// A writable layer.
#[derive(Debug, Default, Deserialize, Serialize)]
#[serde(default)]
pub(crate) struct Upper {
    pub(crate) index: Option<String>,
    pub(crate) data: Option<String>,
}

/// Returns whether `layer` is a `config.v1.json`: whether its name ends with `.json`, without a size.
pub(crate) fn is_config(layer: &LayerArg) -> bool {
    layer.size.is_none() && layer.path.extension().is_some_and(|name| name == "json")
}

/// Returns the layers that the `config.v1.json` at `path` lists, lowest first. Relative names in the file are
/// relative to the directory of `path`.
pub(crate) fn layers(path: &Path) -> Result<Vec<LayerArg>> {
    let text = json::read(path, path)?;
    let config: Config = json::parse(&text, path, "a config.v1.json")?;
    let place = crate::files::place::directory(path);
    let refuse = |what: String| Failure::usage(format!("{}: {what}", path.display()));
    if config.lowers.is_empty() {
        return Err(refuse("no `lowers`: lists no layers".to_owned()));
    }
    if let Some(Upper { index, data }) = &config.upper {
        if given(index).or(given(data)).is_some() {
            return Err(refuse(
                "the stack has a writable layer on top (`upper`), which cannot be read".to_owned(),
            ));
        }
    }
    if config.lowers.len() > MAX_LAYERS {
        return Err(refuse(format!(
            "lists {} layers, expected 1 to {MAX_LAYERS}",
            config.lowers.len()
        )));
    }
    let layers = config.lowers.iter().enumerate();
    layers
        .map(|(nth, lower)| {
            let file = file(lower, place).map_err(|what| refuse(format!("layer {nth}: {what}")))?;
            if let Some(what) = missing(&file, place) {
                let message = format!("{}: layer {nth}: {what}", path.display());
                return Err(Failure::error(exit::DEVICE, message));
            }
            Ok(LayerArg {
                path: file,
                size: None,
            })
        })
        .collect()
}

/// Returns what is wrong with the name of a layer's file, if it is too long or the file doesn't exist.
fn missing(file: &Path, place: &Path) -> Option<String> {
    let bytes = file.as_os_str().as_bytes();
    if bytes.len() > MAX_PATH {
        return Some(format!(
            "the path {} is longer than the {MAX_PATH} bytes that a path can have",
            brief(bytes)
        ));
    }
    let exists = file.symlink_metadata();
    if exists.map_err(|error| error.kind()).err() != Some(ErrorKind::NotFound) {
        return None;
    }
    let moved = file.file_name().map(|name| place.join(name));
    Some(match moved.filter(|moved| moved.exists()) {
        Some(moved) => format!(
            "{} does not exist, but {} does: if the directory was moved, change the paths in the file",
            file.display(),
            moved.display()
        ),
        None => format!("{} does not exist", file.display()),
    })
}

/// Returns the file of a layer, or the reason why there is none. Relative names are relative to `place`.
fn file(lower: &Lower, place: &Path) -> Result<PathBuf, String> {
    if given(&lower.target_file)
        .or(given(&lower.target_digest))
        .is_some()
    {
        return Err("a TurboOCI layer, which cannot be read".to_owned());
    }
    if let Some(file) = given(&lower.file) {
        return Ok(place.join(file));
    }
    let dir = given(&lower.dir).map(|dir| place.join(dir));
    if let Some(dir) = &dir {
        let mut files = NAMES.iter().map(|name| dir.join(name));
        if let Some(file) = files.find(|file| file.exists()) {
            return Ok(file);
        }
    }
    let none = |dir: &Path| {
        let [first, second, third] = NAMES;
        format!("no {first}, {second} or {third} in {}", dir.display())
    };
    Err(match (given(&lower.digest), dir) {
        (Some(digest), Some(dir)) => format!("{digest} is in a registry only: {}", none(&dir)),
        (Some(digest), None) => {
            format!("{digest} is in a registry only: neither `file' nor `dir' is given")
        }
        (None, Some(dir)) => none(&dir),
        (None, None) => "neither `file' nor `dir' is given".to_owned(),
    })
}

/// Returns the text; `None` if it is missing or empty.
fn given(text: &Option<String>) -> Option<&str> {
    text.as_deref().filter(|text| !text.is_empty())
}
