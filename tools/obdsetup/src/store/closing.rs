// SPDX-License-Identifier: GPL-2.0

//! What `close` does with a store: says in its head that all is in it, or that it was too small.

use std::fs::File;
use std::os::unix::fs::FileExt;

use anyhow::{Context, Result};
use overlaybd::changes::{head, Head, State};
use rustix::fs::Advice;

use super::write_head;
use crate::dm::{self, backing, share, Control};

/// What dm-snapshot's status begins with where the store was too small.
const OVERFLOW: &str = "Overflow";

/// The store of a disk that is about to be closed.
pub(crate) struct Closing {
    /// The file or device, by way of what the store's device is over.
    file: File,
    /// The UUID of the store's device.
    uuid: String,
    /// The name of the stack.
    name: String,
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
        let closing = Self {
            file: backing::open_by_number(&lower)?,
            uuid: store.uuid.clone(),
            name: stack.name.clone(),
        };
        let status = control.status_words(&[&top.name], 0);
        if status.get(&top.name).is_some_and(|word| word == OVERFLOW) {
            closing.set(State::Overflowed)?;
        }
        Ok(Some(closing))
    }

    /// Notes that the store was closed, after the devices were removed.
    pub(crate) fn end(self) -> Result<()> {
        if share::number_of_uuid(&self.uuid).is_some() {
            crate::tell(&format!(
                "note: device {} is still in use: its store counts as not closed until it is opened and \
                 closed again",
                self.name
            ));
            return Ok(());
        }
        // What was written comes first.
        self.file.sync_all().context("cannot sync the store")?;
        self.set(State::Closed)
    }

    /// Sets the state, where the store is open.
    fn set(&self, state: State) -> Result<()> {
        let _ = rustix::fs::fadvise(&self.file, 0, None, Advice::DontNeed);
        let mut bytes = [0; head::USED];
        let context = || {
            format!(
                "cannot note in the store of device {} that it is closed",
                self.name
            )
        };
        self.file
            .read_exact_at(&mut bytes, 0)
            .with_context(context)?;
        let mut head = Head::from_bytes(&bytes).with_context(context)?;
        if head.state == State::Open {
            head.state = state;
            write_head(&self.file, &head).with_context(context)?;
        }
        Ok(())
    }
}
