// SPDX-License-Identifier: GPL-2.0

//! What `close` does with a store: says in its head that all is in it, or that it was too small, or that a
//! write to it failed.

use std::fs::File;
use std::path::PathBuf;

use anyhow::{bail, Context, Result};
use overlaybd::changes::{Exceptions, Head, State};
use overlaybd::FileBlob;
use rustix::fs::FlockOperation;

use super::{drop_cache, lock, write_head};
use crate::dm::{self, backing, share, Control};

/// What dm-snapshot's status begins with where the store was too small.
const OVERFLOW: &str = "Overflow";

/// The store of a disk that is about to be closed, locked.
pub(crate) struct Closing {
    /// The file or device, by way of what the store's device is over.
    file: File,
    /// The number of that.
    lower: String,
    /// The UUID of the store's device.
    uuid: String,
    /// The name of the stack.
    name: String,
    head: Head,
    /// How the writes went; nothing where nobody knows.
    outcome: Option<State>,
}

impl Closing {
    /// The store of `stack`; nothing where its disk takes no writes, or isn't all there: then nobody has
    /// seen whether all writes came through.
    pub(crate) fn of(control: &Control, stack: &dm::Stack) -> Result<Option<Self>> {
        let (Some(top), Some(store)) = (stack.top(), stack.store()) else {
            return Ok(None);
        };
        if stack.is_half_built() {
            return Ok(None);
        }
        let lower = share::lower(&store.number).into_iter().next();
        let lower = lower.with_context(|| format!("device {} is over nothing", store.name))?;
        let file = backing::open_by_number(&lower)?;
        // Of a device, nobody makes another disk until its head is written.
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

    /// Notes that the store was closed, after the devices were removed.
    pub(crate) fn end(mut self) -> Result<()> {
        let why = match self.outcome {
            _ if share::number_of_uuid(&self.uuid).is_some() => "is still in use",
            None => "did not tell how its writes went",
            Some(_) => return self.close(),
        };
        crate::tell(&format!(
            "note: device {} {why}: its store counts as not closed until it is opened and closed again",
            self.name
        ));
        Ok(())
    }

    /// [`Self::end`] where the devices are gone.
    fn close(&mut self) -> Result<()> {
        // What was written comes first.
        self.file.sync_all().context("cannot sync the store")?;
        if !share::users(&self.lower).is_empty() || read(&self.file, &self.name)? != self.head {
            bail!(
                "the store of device {} was opened by another meanwhile",
                self.name
            );
        }
        if self.head.state != State::Open {
            return Ok(());
        }
        // Writes may have failed after the status was read.
        let file = self.file.try_clone()?;
        let blob = FileBlob::from_file(file, &PathBuf::from(&self.name))?;
        let exceptions = Exceptions::read(&blob, &self.head)
            .with_context(|| format!("the store of device {}", self.name))?;
        self.set(match exceptions.has_room() {
            true => State::Closed,
            false => State::Overflowed,
        })
    }

    /// Sets the state, where the store is open.
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

/// The state that a store gets whose dm-snapshot has a status that begins with `word`.
fn outcome(word: &str) -> State {
    let is_number = |text: &str| text.parse::<u64>().is_ok();
    match word.split_once('/') {
        _ if word == OVERFLOW => State::Overflowed,
        Some((used, size)) if is_number(used) && is_number(size) => State::Closed,
        // Invalid; Merge failed; Unknown; what later kernels say.
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
