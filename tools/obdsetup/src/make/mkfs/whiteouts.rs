// SPDX-License-Identifier: GPL-2.0

//! Whiteouts: names in a layer of an image that hide names of the layers below.
//!
//! Source: OCI image specification, `layer.md`.

use std::collections::{HashMap, HashSet};

use anyhow::Result;

use super::tree::{Id, Kind, Tree};

/// Prefix of whiteouts.
const PREFIX: &[u8] = b".wh.";
/// Prefix of names that AUFS reserves.
const META: &[u8] = b".wh..wh.";
/// The whiteout that hides everything in its directory.
const OPAQUE: &[u8] = b".wh..wh..opq";

/// A member of a layer that is not a file, by its name: an instruction, or nothing.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Special<'a> {
    /// Hides a name in a directory: the path of the directory, and the name.
    Whiteout(&'a [u8], &'a [u8]),
    /// Hides everything in the directory with this path.
    Opaque(&'a [u8]),
    /// Hides nothing, and is left out.
    Nothing,
}

impl<'a> Special<'a> {
    /// Returns what the member `path` is; `None` for an ordinary file.
    pub(super) fn of(path: &'a [u8]) -> Result<Option<Self>, &'static str> {
        let slash = path.iter().rposition(|&byte| byte == b'/');
        let (directory, name) = match slash {
            Some(slash) => {
                let (directory, name) = path.split_at(slash);
                (directory, name.get(1..).unwrap_or_default())
            }
            None => (b"".as_slice(), path),
        };
        for part in directory.split(|&byte| byte == b'/') {
            if part.starts_with(META) {
                return Ok(Some(Self::Nothing));
            }
            if part.starts_with(PREFIX) {
                return Err("is below a whiteout (.wh.NAME), which is no directory");
            }
        }
        if name == OPAQUE {
            return Ok(Some(Self::Opaque(directory)));
        }
        if name.starts_with(META) {
            return Ok(Some(Self::Nothing));
        }
        match name.strip_prefix(PREFIX) {
            Some(b"" | b"." | b"..") => Err("a whiteout (.wh.NAME) of no name"),
            Some(hidden) => Ok(Some(Self::Whiteout(directory, hidden))),
            None => Ok(None),
        }
    }

    /// Returns the hidden path, or the path of the directory in which everything is hidden.
    pub(super) fn path(&self) -> Vec<u8> {
        match *self {
            Self::Whiteout(b"", name) => name.to_vec(),
            Self::Whiteout(directory, name) => [directory, name].join(&b'/'),
            Self::Opaque(directory) => directory.to_vec(),
            Self::Nothing => Vec::new(),
        }
    }
}

/// What a layer has set and hidden so far.
#[derive(Default)]
pub(super) struct Own {
    /// The names that the layer has set, by directory.
    names: HashMap<Id, HashSet<Vec<u8>>>,
    /// The names that whiteouts have hidden, each with its directory. Hiding a name again has no effect, so it is
    /// skipped: many whiteouts of one name could cause endless work.
    hidden: HashSet<(Id, Vec<u8>)>,
    /// Directories in which everything of the layers below is hidden, at all depths.
    emptied: HashSet<Id>,
}

impl Own {
    /// Records that the layer has set a name.
    pub(super) fn add(&mut self, directory: Id, name: &[u8]) {
        self.names
            .entry(directory)
            .or_default()
            .insert(name.to_vec());
    }

    fn has(&self, directory: Id, name: &[u8]) -> bool {
        let names = self.names.get(&directory);
        names.is_some_and(|names| names.contains(name))
    }

    /// Hides a name, and everything below it, except what the layer itself has set. Returns directories
    /// that stay only because the layer has set names in them.
    pub(super) fn hide(&mut self, tree: &mut Tree, directory: Id, name: &[u8]) -> Result<Vec<Id>> {
        let mut stay = Vec::new();
        if let Some(id) = tree.child(directory, name) {
            if self.hidden.insert((directory, name.to_vec())) {
                self.hide_one(tree, directory, name, id, &mut stay)?;
            }
        }
        Ok(stay)
    }

    /// Hides all names in a directory, as [`Self::hide`] does.
    pub(super) fn hide_all(&mut self, tree: &mut Tree, directory: Id) -> Result<Vec<Id>> {
        let mut stay = Vec::new();
        self.hide_inside(tree, directory, &mut stay)?;
        Ok(stay)
    }

    /// Hides all names in a directory, and adds the directories that stay to `stay`. Does nothing if this was done
    /// before: names that were added since then are the layer's own. Is recursive, but not deep: paths have 4095
    /// bytes at most.
    fn hide_inside(&mut self, tree: &mut Tree, directory: Id, stay: &mut Vec<Id>) -> Result<()> {
        if !self.emptied.insert(directory) {
            return Ok(());
        }
        let children: Vec<(Vec<u8>, Id)> = tree
            .children(directory)
            .map(|(name, id)| (name.to_vec(), id))
            .collect();
        for (name, id) in children {
            self.hide_one(tree, directory, &name, id, stay)?;
        }
        Ok(())
    }

    /// Hides the name of the node `id`, unless the layer has set it or something below it.
    fn hide_one(
        &mut self,
        tree: &mut Tree,
        directory: Id,
        name: &[u8],
        id: Id,
        stay: &mut Vec<Id>,
    ) -> Result<()> {
        let is_directory = matches!(tree.node(id)?.kind, Kind::Directory(_));
        if is_directory {
            self.hide_inside(tree, id, stay)?;
        }
        if self.has(directory, name) {
            return Ok(());
        }
        if is_directory && tree.children(id).next().is_some() {
            stay.push(id);
            return Ok(());
        }
        tree.unlink(directory, name)
    }
}

#[cfg(test)]
mod tests {
    use super::{Own, Special};
    use crate::make::mkfs::from_tar;
    use crate::make::mkfs::tree::{Kind, Meta, Node, Tree, ROOT};

    /// Nested opaque directories: each name is visited once, not once for each directory above it.
    #[test]
    fn hidden_once() -> anyhow::Result<()> {
        const DEPTH: usize = 300;
        let mut tree: Tree = from_tar::empty();
        let meta: Meta = tree.node(ROOT)?.meta.clone();
        let mut own = Own::default();
        let mut chain = vec![ROOT];
        for depth in 0..DEPTH {
            let above = *chain.last().unwrap_or(&ROOT);
            for name in [b"d".as_slice(), b"other"] {
                let id = tree.add(Node {
                    meta: meta.clone(),
                    kind: Kind::Directory(std::collections::BTreeMap::new()),
                });
                tree.link(above, name.to_vec(), id)?;
                if name == b"d" {
                    chain.push(id);
                }
                // The layer has set the last directory, so all directories above it stay.
                if depth + 1 == DEPTH && name == b"d" {
                    own.add(above, name);
                }
            }
        }
        let mut stay = Vec::new();
        for &directory in chain.iter().rev() {
            stay.extend(own.hide_all(&mut tree, directory)?);
        }
        stay.sort_unstable();
        let between = chain.get(1..DEPTH).unwrap_or_default();
        assert_eq!(stay, between);
        for (&directory, &below) in chain.iter().zip(chain.iter().skip(1)) {
            let left: Vec<_> = tree.children(directory).collect();
            assert_eq!(left, [(b"d".as_slice(), below)]);
        }
        Ok(())
    }

    #[test]
    fn names() {
        let of = |path: &'static str| Special::of(path.as_bytes());
        assert_eq!(of("a/b"), Ok(None));
        assert_eq!(of("a/.wh"), Ok(None));
        assert_eq!(of("a/.wh.b"), Ok(Some(Special::Whiteout(b"a", b"b"))));
        assert_eq!(of(".wh.b"), Ok(Some(Special::Whiteout(b"", b"b"))));
        assert_eq!(of("a/b/.wh..wh..opq"), Ok(Some(Special::Opaque(b"a/b"))));
        assert_eq!(of(".wh..wh.plnk"), Ok(Some(Special::Nothing)));
        assert_eq!(of(".wh..wh.plnk/1.2"), Ok(Some(Special::Nothing)));
        for bad in [".wh.", "a/.wh..", ".wh...", ".wh.a/b"] {
            assert!(of(bad).is_err(), "{bad}");
        }
    }
}
