// SPDX-License-Identifier: GPL-2.0

//! What decompression needs beside its source and its destination.
//!
//! A worker borrows a context for one I/O. Who has one never waits for I/O, so waiting for one is
//! short, and needs no memory.

use kernel::alloc::flags::__GFP_NOWARN;
use kernel::prelude::*;
use kernel::sync::{new_condvar, new_mutex, CondVar, Mutex};

use super::{lz4, zstd::Decompressor, Corrupt};
use crate::block::Dest;
use crate::format::zfile::{Algorithm, MAX_BLOCK_SIZE};

/// Working memory of one worker.
pub(crate) struct Context {
    codec: Codec,
    bounce: VVec<u8>,
}

enum Codec {
    Lz4,
    Zstd(Decompressor),
}

impl Codec {
    fn decompress(&mut self, stored: &[u8], dest: &Dest<'_>) -> Result<(), Corrupt> {
        match self {
            Codec::Lz4 => lz4::decompress(stored, dest),
            Codec::Zstd(zstd) => zstd.decompress(stored, dest),
        }
    }
}

impl Context {
    fn new(algorithm: Algorithm) -> Result<KBox<Self>> {
        let codec = match algorithm {
            Algorithm::Lz4 => Codec::Lz4,
            Algorithm::Zstd => Codec::Zstd(Decompressor::new()?),
        };
        let bounce = VVec::zeroed(MAX_BLOCK_SIZE as usize, GFP_KERNEL | __GFP_NOWARN)?;
        Ok(KBox::new(Self { codec, bounce }, GFP_KERNEL)?)
    }

    /// Decompresses `stored`, which must fill `dest` exactly.
    ///
    /// # Errors
    ///
    /// [`Corrupt`] where it is malformed, shorter or longer.
    pub(crate) fn decompress(&mut self, stored: &[u8], dest: &Dest<'_>) -> Result<(), Corrupt> {
        self.codec.decompress(stored, dest)
    }

    /// Decompresses a block of `len` bytes into `data`, which has room for that.
    ///
    /// # Errors
    ///
    /// [`Corrupt`] as above, and where there is less room.
    pub(crate) fn decompress_into(
        &mut self,
        stored: &[u8],
        len: usize,
        data: &mut KVec<u8>,
    ) -> Result<(), Corrupt> {
        data.clear();
        let room = data.spare_capacity_mut().get_mut(..len).ok_or(Corrupt)?;
        self.codec.decompress(stored, &Dest::from(room))?;
        // SAFETY: There is room for `len` bytes, and decompression has filled all of them.
        unsafe { data.inc_len(len) };
        Ok(())
    }

    /// Decompresses a block of `len` bytes, and gives it.
    ///
    /// # Errors
    ///
    /// [`Corrupt`] as above, and where `len` is more than a block may have.
    pub(crate) fn decompress_bounced(
        &mut self,
        stored: &[u8],
        len: usize,
    ) -> Result<&[u8], Corrupt> {
        let bounce = self.bounce.get_mut(..len).ok_or(Corrupt)?;
        self.codec.decompress(stored, &Dest::from(&mut *bounce))?;
        Ok(bounce)
    }
}

/// The contexts of one algorithm, shared by all devices: one for each CPU once a device uses it.
#[pin_data]
pub(crate) struct Contexts {
    algorithm: Algorithm,
    #[pin]
    pool: Mutex<Pool>,
    #[pin]
    returned: CondVar,
}

/// # Invariants
///
/// `free` has a capacity of at least `total`, the number of contexts.
struct Pool {
    free: KVec<KBox<Context>>,
    total: usize,
}

impl Contexts {
    /// An empty pool.
    pub(crate) fn new(algorithm: Algorithm) -> impl PinInit<Self> {
        // INVARIANT: No contexts.
        let pool = Pool {
            free: KVec::new(),
            total: 0,
        };
        pin_init!(Self {
            algorithm,
            pool <- new_mutex!(pool),
            returned <- new_condvar!(),
        })
    }

    /// Allocates contexts up to `count`.
    ///
    /// # Errors
    ///
    /// [`ENOMEM`].
    pub(crate) fn provide(&self, count: usize) -> Result {
        // Nothing is allocated under the lock that workers take: reclaim may wait for them.
        while self.pool.lock().total < count {
            let context = Context::new(self.algorithm)?;
            let mut free = KVec::with_capacity(count, GFP_KERNEL)?;
            let mut pool = self.pool.lock();
            if pool.total >= count {
                break;
            }
            // Room for those that are borrowed, too; nothing of this allocates or fails.
            while let Some(context) = pool.free.pop() {
                let _ = free.push_within_capacity(context);
            }
            let _ = free.push_within_capacity(context);
            // INVARIANT: The capacity is `count`, which is at least the new total.
            pool.total += 1;
            let old = core::mem::replace(&mut pool.free, free);
            drop(pool);
            drop(old);
            self.returned.notify_one();
        }
        Ok(())
    }

    /// Borrows a context; waits for one in process context.
    pub(crate) fn borrow(&self) -> Borrowed<'_> {
        let mut pool = self.pool.lock();
        loop {
            if let Some(context) = pool.free.pop() {
                return Borrowed {
                    contexts: self,
                    context: Some(context),
                };
            }
            self.returned.wait(&mut pool);
        }
    }
}

/// A context that goes back when it is dropped.
pub(crate) struct Borrowed<'a> {
    contexts: &'a Contexts,
    context: Option<KBox<Context>>,
}

impl Borrowed<'_> {
    /// The context; it is there until this is dropped.
    pub(crate) fn get(&mut self) -> Option<&mut Context> {
        self.context.as_deref_mut()
    }
}

impl Drop for Borrowed<'_> {
    fn drop(&mut self) {
        if let Some(context) = self.context.take() {
            // Cannot fail: by the invariant of the pool there is room.
            let _ = self.contexts.pool.lock().free.push_within_capacity(context);
            self.contexts.returned.notify_one();
        }
    }
}
