// SPDX-License-Identifier: GPL-2.0

//! What decompression needs beside its source and its destination.
//!
//! A worker borrows its CPU's context for one I/O. Who has one never waits for I/O, so waiting for
//! it is short, and needs no memory.

use kernel::cpu::CpuId;
use kernel::prelude::*;
use kernel::sync::{new_mutex, Arc, Mutex, MutexGuard};

use super::{lz4, zstd::Decompressor, Corrupt};
use crate::block::{memory, Dest};
use crate::compat;
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
    fn new(algorithm: Algorithm) -> Result<Self> {
        let codec = match algorithm {
            Algorithm::Lz4 => Codec::Lz4,
            Algorithm::Zstd => Codec::Zstd(Decompressor::new()?),
        };
        let bounce = compat::zeroed(MAX_BLOCK_SIZE as usize, memory::LARGE)?;
        Ok(Self { codec, bounce })
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

/// The contexts of one algorithm, one for each CPU, shared by all devices.
///
/// Lock order: under a context's mutex spinlocks may be taken. No I/O is waited for or ended there.
pub(crate) struct Contexts {
    /// That of CPU 0.
    first: Pin<KBox<Mutex<Context>>>,
    others: KVec<Pin<KBox<Mutex<Context>>>>,
}

impl Contexts {
    /// Allocates contexts for all CPUs.
    ///
    /// # Errors
    ///
    /// [`ENOMEM`].
    pub(crate) fn new(algorithm: Algorithm) -> Result<Arc<Self>> {
        let count = kernel::cpu::nr_cpu_ids() as usize;
        let context = || KBox::pin_init(new_mutex!(Context::new(algorithm)?), GFP_KERNEL);
        let first = context()?;
        let mut others = KVec::with_capacity(count, GFP_KERNEL)?;
        for _ in 1..count {
            others.push(context()?, GFP_KERNEL)?;
        }
        Ok(Arc::new(Self { first, others }, GFP_KERNEL)?)
    }

    /// Borrows the context of this CPU; waits for it in process context. Another thread may have
    /// it, which then was here, too.
    pub(crate) fn borrow(&self) -> MutexGuard<'_, Context> {
        let nth = CpuId::current().as_u32().checked_sub(1);
        let context = nth.and_then(|nth| self.others.get(nth as usize));
        context.unwrap_or(&self.first).lock()
    }
}
