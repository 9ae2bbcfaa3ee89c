// SPDX-License-Identifier: GPL-2.0

//! Checks whether layers fit on each other, by their UUIDs, the UUIDs of their parents, and their sizes.

use std::collections::HashMap;
use std::ops::BitOrAssign;

use anyhow::Result;
use clap::Args;
use overlaybd::format::merge::sectors;
use overlaybd::identity::is_placed;
use overlaybd::layer::Ident;
use overlaybd::{dax, LayerReader};

use crate::terminal::exit::{self, Failure};
use crate::terminal::warn;

/// Arguments of all commands that take a stack of layers.
#[derive(Args, Clone, Debug, Default)]
pub(crate) struct ChainArgs {
    /// Only warn if the UUIDs or sizes of the layers show that they do not fit on each other
    #[arg(long)]
    ignore_identity: bool,
}

impl ChainArgs {
    /// Checks `layers`, lowest first. Prints warnings. Returns an error if the stack is certainly wrong.
    pub(crate) fn check(&self, layers: &[LayerReader], part: Part) -> Result<()> {
        let mut found = Findings::of(layers, part);
        self.apply(&mut found);
        warn(&found.warnings);
        found.into_error(false).map_or(Ok(()), Err)
    }

    /// Changes the errors to warnings if the user asked for that.
    pub(crate) fn apply(&self, found: &mut Findings) {
        if self.ignore_identity {
            let errors = std::mem::take(&mut found.errors);
            found.warnings.splice(0..0, errors);
        }
    }
}

impl BitOrAssign<&Self> for ChainArgs {
    fn bitor_assign(&mut self, other: &Self) {
        self.ignore_identity |= other.ignore_identity;
    }
}

/// Which part of a stack the given layers are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Part {
    /// All of it: the lowest layer has no parent.
    Whole,
    /// Consecutive layers of a stack, without the layers below.
    Middle,
}

/// The problems that were found.
#[derive(Debug, Default)]
pub(crate) struct Findings {
    /// Problems that show that the stack is wrong.
    pub(crate) errors: Vec<String>,
    /// Reasons why file systems cannot map the pages of layers with DAX: one text for each layer and kind
    /// of reason. No option turns them into warnings.
    pub(crate) misfits: Vec<String>,
    /// Problems that may be harmless.
    pub(crate) warnings: Vec<String>,
}

impl Findings {
    /// Checks `layers`, lowest first.
    pub(crate) fn of(layers: &[LayerReader], part: Part) -> Self {
        let mut found = Self::default();
        if let (Part::Whole, Some(lowest)) = (part, layers.first()) {
            found.check_lowest(lowest);
        }
        let mut by_uuid: HashMap<String, &LayerReader> = HashMap::new();
        for layer in layers.iter().filter(|layer| has_uuid(layer)) {
            let uuid = layer.ident().uuid.to_ascii_uppercase();
            match by_uuid.get(&uuid) {
                Some(other) => found.errors.push(format!(
                    "{}: has UUID {uuid}, as {} has: the same layer twice",
                    layer.path().display(),
                    other.path().display()
                )),
                None => drop(by_uuid.insert(uuid, layer)),
            }
        }
        for pair in layers.windows(2) {
            if let [below, above] = pair {
                let parent = above.ident().parent.to_ascii_uppercase();
                found.check_pair(below, above, by_uuid.contains_key(&parent));
            }
        }
        found.check_sizes(layers);
        found
    }

    /// Returns whether nothing was found.
    pub(crate) fn is_empty(&self) -> bool {
        self.errors.is_empty() && self.misfits.is_empty() && self.warnings.is_empty()
    }

    /// Returns all errors as one; `None` if there are none. `listed` says that the user has seen all of them.
    pub(crate) fn into_error(self, listed: bool) -> Option<anyhow::Error> {
        let how = match listed {
            true => "",
            false => ": `obdsetup verify' lists them",
        };
        let all = |texts: &[String]| {
            let first = texts.first()?;
            Some(match texts.len() - 1 {
                0 => first.clone(),
                more => format!("{first}; {more} more{how}"),
            })
        };
        let wrong = all(&self.errors);
        let wrong = wrong.map(|text| format!("{text}; --ignore-identity makes this a warning"));
        // No option makes a misfit a warning, so its text has no such hint.
        let message = wrong.or_else(|| all(&self.misfits))?;
        Some(Failure::error(exit::BAD_IMAGE, message))
    }

    fn check_lowest(&mut self, lowest: &LayerReader) {
        let parent = &lowest.ident().parent;
        if Ident::is_known(parent) {
            self.errors.push(format!(
                "{}: was made over a layer with UUID {parent}, but no layer is below it: give all \
                 layers, lowest first",
                lowest.path().display()
            ));
        }
    }

    /// Checks two neighbouring layers. `given` is whether the parent of `above` is one of the checked layers.
    fn check_pair(&mut self, below: &LayerReader, above: &LayerReader, given: bool) {
        let (uuid, parent) = (&below.ident().uuid, &above.ident().parent);
        let (path, below_path) = (above.path(), below.path());
        let (path, below_path) = (path.display(), below_path.display());
        if !Ident::is_known(parent) {
            if is_placed(&above.ident().uuid) {
                self.errors.push(format!(
                    "{path}: was made as a lowest layer, but {below_path} is below it: `create \
                     --base' makes layers that go over others"
                ));
            }
            return;
        }
        if !has_uuid(below) {
            let text = format!(
                "{path}: was made over a layer with UUID {parent}, but the layer below it, \
                 {below_path}, has no UUID: whether it is the right layer cannot be checked"
            );
            match is_placed(&above.ident().uuid) {
                true => self.errors.push(text),
                false => self.warnings.push(text),
            }
        } else if !parent.eq_ignore_ascii_case(uuid) {
            let hint = match given {
                true => "the layers are in the wrong order, or one is missing",
                false => "a layer is missing, or another layer is in its place",
            };
            self.errors.push(format!(
                "{path}: was made over a layer with UUID {parent}, but the layer below it, \
                 {below_path}, has UUID {uuid}: {hint}"
            ));
        }
    }

    /// For each layer whose pages a file system cannot map with DAX, adds the reasons to the misfits. Returns for
    /// each layer whether its pages can be mapped.
    pub(crate) fn add_dax(&mut self, layers: &[LayerReader]) -> overlaybd::Result<Vec<bool>> {
        let [page, ..] = dax::PAGE_SIZES;
        let mut fit = Vec::new();
        for layer in layers {
            let path = layer.path();
            let found = dax::layer_misfits(layer, page)?;
            fit.push(found.is_empty());
            let texts = found
                .iter()
                .map(|misfits| format!("{}: {misfits}", path.display()));
            self.misfits.extend(texts);
        }
        Ok(fit)
    }

    /// Checks virtual sizes. A layer may be larger than the layers below it. A smaller layer cuts off the end.
    fn check_sizes(&mut self, layers: &[LayerReader]) {
        let size = |layer: &&LayerReader| layer.lsmt().virtual_size();
        // A layer with the virtual size 0 has the size of the layer below.
        let sized: Vec<&LayerReader> = layers.iter().filter(|layer| size(layer) != 0).collect();
        for pair in sized.windows(2) {
            let [below, above] = pair else { continue };
            if sectors(size(above)) >= sectors(size(below)) {
                continue;
            }
            let text = format!(
                "{}: is for a disk of {} bytes, but the layer below it, {}, is for a larger disk, of {} \
                 bytes: the end is cut off",
                above.path().display(),
                size(above),
                below.path().display(),
                size(below)
            );
            match is_placed(&above.ident().uuid) {
                true => self.errors.push(text),
                false => self.warnings.push(text),
            }
        }
    }
}

fn has_uuid(layer: &LayerReader) -> bool {
    Ident::is_known(&layer.ident().uuid)
}
