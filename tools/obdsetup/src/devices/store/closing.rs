// SPDX-License-Identifier: GPL-2.0

//! What `close` does with a store: it records in the head that the store is complete, that it was too small,
//! or that a write to it has failed.

use std::fs::File;
use std::path::PathBuf;

use anyhow::{bail, Context, Result};
use overlaybd::changes::{Exceptions, Head, State};
use overlaybd::FileBlob;
use rustix::fs::FlockOperation;

use super::{drop_cache, lock, write_head};
use crate::devices::dm::system;
use crate::devices::dm::{self, backing, Control};

/// First word of dm-snapshot's status if the store was too small.
const OVERFLOW: &str = "Overflow";

/// The locked store of a disk that is about to be closed.
pub(crate) struct Closing {
    /// The block device below the store's device. Its first bytes are the head.
    file: File,
    /// The number of that block device.
    lower: String,
    /// The UUID of the store's device.
    uuid: String,
    /// The name of the stack.
    name: String,
    head: Head,
    /// The state that follows from dm-snapshot's status; `None` if the status is unknown.
    outcome: Option<State>,
}

impl Closing {
    /// Returns the store of `stack`. Returns `None` if its disk isn't writable, or if the stack is
    /// half-built: then it is unknown whether all writes have succeeded.
    pub(crate) fn of(control: &Control, stack: &dm::Stack) -> Result<Option<Self>> {
        let (Some(top), Some(store)) = (stack.top(), stack.store()) else {
            return Ok(None);
        };
        if stack.is_half_built() {
            return Ok(None);
        }
        let lower = system::lower(&store.number).into_iter().next();
        let lower = lower.with_context(|| format!("device {} has no lower device", store.name))?;
        let file = backing::open_by_number(&lower)?;
        // If the store is a block device, the lock prevents that another disk is made with it before the head
        // is written.
        let what = format!("the store of device {}", stack.name);
        lock(&file, FlockOperation::NonBlockingLockExclusive, &what)?;
        let status = control.status_words(&[&top.name], 0);
        let mut closing = Self {
            head: read(&file, &stack.name)?,
            file,
            lower,
            uuid: store.uuid.clone(),
            name: stack.name.clone(),
            outcome: status.get(&top.name).map(|word| outcome(word)),
        };
        if let Some(state @ (State::Overflowed | State::Failed)) = closing.outcome {
            closing.set(state)?;
        }
        Ok(Some(closing))
    }

    /// Records that the store was closed. Called after the devices were removed.
    pub(crate) fn end(mut self) -> Result<()> {
        let why = match self.outcome {
            _ if system::number_of_uuid(&self.uuid).is_some() => "is still in use",
            None => "has not reported whether its writes succeeded",
            Some(_) => return self.close(),
        };
        crate::terminal::tell(&format!(
            "note: device {} {why}: its store counts as not closed until it is opened and closed again",
            self.name
        ));
        Ok(())
    }

    /// The part of [`Self::end`] that writes the head. The devices don't exist any more.
    fn close(&mut self) -> Result<()> {
        // The changes must be on disk before the head.
        self.file.sync_all().context("cannot sync the store")?;
        if !system::users(&self.lower).is_empty() || read(&self.file, &self.name)? != self.head {
            bail!(
                "the store of device {} was opened by another program meanwhile",
                self.name
            );
        }
        if self.head.state != State::Open {
            return Ok(());
        }
        // The store may have become full after the status was read.
        let file = self.file.try_clone()?;
        let blob = FileBlob::from_file(file, &PathBuf::from(&self.name))?;
        let exceptions = Exceptions::read(&blob, &self.head)
            .with_context(|| format!("the store of device {}", self.name))?;
        self.set(match exceptions.has_room() {
            true => State::Closed,
            false => State::Overflowed,
        })
    }

    /// Writes the state to the head, if the head says that the store is open.
    fn set(&mut self, state: State) -> Result<()> {
        if self.head.state != State::Open {
            return Ok(());
        }
        self.head.state = state;
        write_head(&self.file, &self.head).with_context(|| {
            format!(
                "cannot note in the store of device {} how it was closed",
                self.name
            )
        })
    }
}

/// Reads the head of the store of disk `name`.
fn read(file: &File, name: &str) -> Result<Head> {
    let context = || format!("cannot read the store of device {name}");
    drop_cache(file).with_context(context)?;
    let blob = FileBlob::from_file(
        file.try_clone().with_context(context)?,
        &PathBuf::from(name),
    );
    Head::read(&blob.with_context(context)?).with_context(context)
}

/// Returns the state for a store whose dm-snapshot has a status that begins with `word`.
fn outcome(word: &str) -> State {
    let is_number = |text: &str| text.parse::<u64>().is_ok();
    match word.split_once('/') {
        _ if word == OVERFLOW => State::Overflowed,
        Some((used, size)) if is_number(used) && is_number(size) => State::Closed,
        // Invalid; Merge failed; Unknown; words of later kernels.
        _ => State::Failed,
    }
}

#[cfg(test)]
mod tests {
    use overlaybd::changes::State;

    use super::outcome;

    #[test]
    fn only_a_fill_level_is_closed() {
        assert_eq!(outcome("16/2048"), State::Closed);
        assert_eq!(outcome("Overflow"), State::Overflowed);
        for word in ["Invalid", "Merge", "Unknown", "", "/", "1/", "x/2"] {
            assert_eq!(outcome(word), State::Failed, "{word}");
        }
    }
}
