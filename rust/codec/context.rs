// SPDX-License-Identifier: GPL-2.0

//! Codec contexts: the working memory of decompression.
//!
//! A worker borrows the context of its CPU while it decompresses one block for the cache, or all
//! blocks of a read that bypasses the cache. The thread that has a context doesn't wait for I/O or
//! for free memory, so other threads wait for the context only briefly.

use kernel::cpu::CpuId;
use kernel::prelude::*;
use kernel::sync::{new_mutex, Arc, Mutex, MutexGuard, SetOnce};

use super::{lz4, zstd::Decompressor, Corrupt};
use crate::block::{memory, Data, Dest};
use crate::compat;
use crate::format::zfile::{Algorithm, CRC_SIZE, MAX_BLOCK_SIZE};
use crate::sys;

/// Working memory for decompression. One thread at a time uses it.
pub(crate) struct Context {
    /// The decompressor and its memory.
    pub(crate) decoder: Decoder,
    /// Room for the stored bytes of a block, which include its CRC. They are copied to this room if
    /// they are in several pieces of the buffer of the lower read.
    pub(crate) stored: VVec<u8>,
}

/// A decompressor, and a bounce buffer for one decompressed block.
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
    /// Decompresses `stored`, the stored bytes of a block without its CRC. The result must fill
    /// `dest` exactly.
    ///
    /// # Errors
    ///
    /// [`Corrupt`] if `stored` is malformed, or decompresses to another length.
    pub(crate) fn decompress(&mut self, stored: &[u8], dest: &Dest<'_>) -> Result<(), Corrupt> {
        self.codec.decompress(stored, dest)
    }

    /// Decompresses `stored`, the stored bytes of a block without its CRC, into `data`. The
    /// result must have `len` bytes.
    ///
    /// # Errors
    ///
    /// [`Corrupt`] if `stored` is malformed or decompresses to another length, if `data` has no
    /// room for `len` bytes, or if `data` is in several pieces and `len` is above
    /// [`MAX_BLOCK_SIZE`].
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
        // SAFETY: There is room for `len` bytes, and decompression has written all of them.
        unsafe { data.set_filled(len) };
        Ok(())
    }

    /// Decompresses `stored`, the stored bytes of a block without its CRC, into the bounce buffer,
    /// and returns the decompressed bytes. There must be `len` of them.
    ///
    /// # Errors
    ///
    /// [`Corrupt`] if `stored` is malformed or decompresses to another length, or if `len` is above
    /// [`MAX_BLOCK_SIZE`].
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

/// The contexts of one algorithm, shared by all devices that use the algorithm: one for CPU 0, and
/// one for each CPU that was online when such a device was made. A CPU that came online later uses
/// the context of the next lower CPU that has one, until another such device is made.
///
/// Lock order: spinlocks may be taken with a context's mutex held. The thread that holds it must
/// not wait for I/O, and must not end a bio.
pub(crate) struct Contexts {
    algorithm: Algorithm,
    /// The context of CPU 0.
    first: Pin<KBox<Mutex<Context>>>,
    /// The contexts of CPU 1 and the following ones.
    others: KVec<SetOnce<Pin<KBox<Mutex<Context>>>>>,
}

impl Contexts {
    /// Allocates contexts for CPU 0 and for the other CPUs that are online. May sleep.
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

    /// Allocates a context for each online CPU that has none. May sleep.
    ///
    /// # Errors
    ///
    /// [`ENOMEM`].
    pub(crate) fn fill(&self) -> Result {
        for (cpu, context) in (1..).zip(&self.others) {
            // SAFETY: By construction `cpu` is below `nr_cpu_ids`.
            if context.as_ref().is_none() && unsafe { sys::obd_cpu_online(cpu) } {
                // If two threads make one at the same time, one of the two is freed again.
                context.populate(Self::context(self.algorithm)?);
            }
        }
        Ok(())
    }

    /// Borrows the context of this CPU, or of the next lower CPU that has one. Called in process
    /// context. Waits while another thread has that context: a thread that borrowed it on this CPU
    /// and was preempted or moved, or a thread on another CPU that uses the same context.
    pub(crate) fn borrow(&self) -> MutexGuard<'_, Context> {
        let upto = self.others.get(..CpuId::current().as_u32() as usize);
        let context = upto.and_then(|upto| upto.iter().rev().find_map(SetOnce::as_ref));
        context.unwrap_or(&self.first).lock()
    }
}
