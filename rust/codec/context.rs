// SPDX-License-Identifier: GPL-2.0

//! What decompression needs beside its source and its destination.
//!
//! A worker borrows its CPU's context for one I/O. Who has one never waits for I/O, so waiting for
//! it is short, and needs no memory.

use kernel::cpu::CpuId;
use kernel::prelude::*;
use kernel::sync::{new_mutex, Arc, Mutex, MutexGuard, SetOnce};

use super::{lz4, zstd::Decompressor, Corrupt};
use crate::block::{memory, Data, Dest};
use crate::compat;
use crate::format::zfile::{Algorithm, CRC_SIZE, MAX_BLOCK_SIZE};
use crate::sys;

/// Working memory of one worker.
pub(crate) struct Context {
    /// For decompression.
    pub(crate) decoder: Decoder,
    /// Room for what is stored of a block, where that has to be copied to be contiguous.
    pub(crate) stored: VVec<u8>,
}

/// What decompresses.
pub(crate) struct Decoder {
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
        let stored_max = algorithm.bound(MAX_BLOCK_SIZE) + CRC_SIZE;
        Ok(Self {
            decoder: Decoder { codec, bounce },
            stored: compat::zeroed(stored_max as usize, memory::LARGE)?,
        })
    }
}

impl Decoder {
    /// Decompresses `stored`, which must fill `dest` exactly.
    ///
    /// # Errors
    ///
    /// [`Corrupt`] where it is malformed, shorter or longer.
    pub(crate) fn decompress(&mut self, stored: &[u8], dest: &Dest<'_>) -> Result<(), Corrupt> {
        self.codec.decompress(stored, dest)
    }

    /// Decompresses a block of `len` bytes into `data`.
    ///
    /// # Errors
    ///
    /// [`Corrupt`] as above, and where there is less room.
    pub(crate) fn decompress_into(
        &mut self,
        stored: &[u8],
        len: usize,
        data: &mut Data,
    ) -> Result<(), Corrupt> {
        let Some(dest) = data.dest() else {
            let bytes = self.decompress_bounced(stored, len)?;
            return data.fill(bytes).ok_or(Corrupt);
        };
        self.codec
            .decompress(stored, &dest.up_to(len).ok_or(Corrupt)?)?;
        // SAFETY: There is room for `len` bytes, and decompression has filled all of them.
        unsafe { data.set_filled(len) };
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

/// The contexts of one algorithm, shared by all devices: one for each CPU that was online when a
/// device was made. A CPU that came later shares one until the next device is made.
///
/// Lock order: under a context's mutex spinlocks may be taken. No I/O is waited for or ended there.
pub(crate) struct Contexts {
    algorithm: Algorithm,
    /// That of CPU 0.
    first: Pin<KBox<Mutex<Context>>>,
    /// Those of CPU 1 and on.
    others: KVec<SetOnce<Pin<KBox<Mutex<Context>>>>>,
}

impl Contexts {
    /// Allocates contexts for the CPUs that are online.
    ///
    /// # Errors
    ///
    /// [`ENOMEM`].
    pub(crate) fn new(algorithm: Algorithm) -> Result<Arc<Self>> {
        let count = kernel::cpu::nr_cpu_ids() as usize;
        let first = Self::context(algorithm)?;
        let mut others = KVec::with_capacity(count, GFP_KERNEL)?;
        for _ in 1..count {
            others.push(SetOnce::new(), GFP_KERNEL)?;
        }
        let contexts = Self {
            algorithm,
            first,
            others,
        };
        contexts.fill()?;
        Ok(Arc::new(contexts, GFP_KERNEL)?)
    }

    fn context(algorithm: Algorithm) -> Result<Pin<KBox<Mutex<Context>>>> {
        KBox::pin_init(new_mutex!(Context::new(algorithm)?), GFP_KERNEL)
    }

    /// Allocates contexts for CPUs that have come online.
    ///
    /// # Errors
    ///
    /// [`ENOMEM`].
    pub(crate) fn fill(&self) -> Result {
        for (cpu, context) in (1..).zip(&self.others) {
            // SAFETY: By construction `cpu` is below `nr_cpu_ids`.
            if context.as_ref().is_none() && unsafe { sys::obd_cpu_online(cpu) } {
                // Of two that are made at once, one stays.
                context.populate(Self::context(self.algorithm)?);
            }
        }
        Ok(())
    }

    /// Borrows the context of this CPU; waits for it in process context. Another thread may have
    /// it, which then was here, too, or on a CPU that shares it.
    pub(crate) fn borrow(&self) -> MutexGuard<'_, Context> {
        let upto = self.others.get(..CpuId::current().as_u32() as usize);
        let context = upto.and_then(|upto| upto.iter().rev().find_map(SetOnce::as_ref));
        context.unwrap_or(&self.first).lock()
    }
}
