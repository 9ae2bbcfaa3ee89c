// SPDX-License-Identifier: GPL-2.0

//! Reads headers and indexes while a target is constructed.

use core::ptr::NonNull;

use kernel::prelude::*;
use kernel::types::Opaque;

use super::{check_killed, Device, Failure};
use crate::block::{Buffer, Status};
use crate::format::blob::Sink;
use crate::format::num::{to_u64, to_usize};
use crate::format::{blob, Blob, Error as FormatError, Fault};
use crate::sys;

/// Largest number of bytes that [`MetaReader::stream`] reads with one bio.
const CHUNK: usize = 128 << 10;
/// Largest number of bios of [`MetaReader::stream`] that are in flight at the same time.
const DEPTH: usize = 4;

/// Reads the first bytes of a block device as a [`Blob`].
///
/// # Invariants
///
/// `len` is at most the size of the device.
pub(crate) struct MetaReader<'a> {
    device: &'a Device,
    len: u64,
}

impl<'a> MetaReader<'a> {
    /// Makes a reader of the first `len` bytes of `device`, or of all if `len` is `None`.
    ///
    /// # Errors
    ///
    /// If the device has fewer than `len` bytes.
    pub(crate) fn new(device: &'a Device, len: Option<u64>) -> Result<Self, Failure> {
        let size = device.size();
        let len = len.unwrap_or(size);
        if len > size {
            return Err(Failure::new(c"Blob is larger than its device", EINVAL));
        }
        // INVARIANT: Checked above.
        Ok(Self { device, len })
    }
}

impl Blob for MetaReader<'_> {
    type Error = Failure;

    fn size(&self) -> u64 {
        self.len
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), Failure> {
        let mut rest = buf;
        self.stream(offset, to_u64(rest.len()), &mut |piece| {
            let all = core::mem::take(&mut rest);
            // Doesn't fail: a stream has exactly the length that was requested.
            let (head, tail) = all
                .split_at_mut_checked(piece.len())
                .ok_or(FormatError::new(Fault::Truncated, offset, 0))?;
            head.copy_from_slice(piece);
            rest = tail;
            Ok(())
        })
    }

    fn stream(&self, offset: u64, len: u64, sink: Sink<'_, Failure>) -> Result<(), Failure> {
        blob::check_range(self.len, offset, len)?;
        if len == 0 {
            return Ok(());
        }
        let block = u64::from(self.device.logical_block_size());
        let end = offset + len;
        // Whole blocks of the device are read, up to byte `stop`. The next bio to submit starts at
        // byte `ahead`; the bio whose bytes `sink` gets next starts at byte `at`. No overflow:
        // `stop` is within the device, whose size is a multiple of the block size.
        let mut ahead = offset - offset % block;
        let stop = end.next_multiple_of(block);

        let mut reads: KVec<Pin<KBox<Read>>> = KVec::new();
        let mut at = ahead;
        for _ in 0..DEPTH {
            if ahead >= stop {
                break;
            }
            let chunk = (stop - ahead).min(to_u64(CHUNK));
            reads.push(Read::new(to_usize(chunk))?, GFP_KERNEL)?;
            ahead += self.submit(reads.last_mut(), ahead, chunk)?;
        }
        let mut turn = 0;
        while at < stop {
            let read = reads.get_mut(turn).ok_or(EINVAL)?;
            let piece = read.as_mut().wait()?;
            let from = to_usize(offset.saturating_sub(at));
            let to = to_usize((end - at).min(to_u64(piece.len())));
            sink(piece.get(from..to).ok_or(EINVAL)?)?;
            at += to_u64(piece.len());
            check_killed()?;
            if ahead < stop {
                let chunk = (stop - ahead).min(to_u64(CHUNK));
                ahead += self.submit(reads.get_mut(turn), ahead, chunk)?;
            }
            turn = (turn + 1) % DEPTH;
        }
        Ok(())
    }
}

impl MetaReader<'_> {
    /// Starts reading `len` bytes at byte `at`. Returns `len`.
    fn submit(&self, read: Option<&mut Pin<KBox<Read>>>, at: u64, len: u64) -> Result<u64> {
        let read = read.ok_or(EINVAL)?;
        read.as_mut().submit(self.device, at, to_usize(len))?;
        Ok(len)
    }
}

/// A read of a device. The caller waits for it in process context.
///
/// # Invariants
///
/// If `busy` is set, the bio is in flight: the block layer owns the bio, its vector and the buffer,
/// and `done` will be completed once. Otherwise the bio isn't initialised. `done` is always an
/// initialised completion.
#[pin_data(PinnedDrop)]
struct Read {
    #[pin]
    bio: Opaque<sys::bio>,
    #[pin]
    vec: Opaque<sys::bio_vec>,
    #[pin]
    done: Opaque<sys::completion>,
    buffer: Buffer,
    busy: bool,
}

impl Read {
    /// Makes a read of at most `capacity` bytes. Doesn't start it.
    fn new(capacity: usize) -> Result<Pin<KBox<Self>>> {
        // INVARIANT: Not busy.
        KBox::pin_init(
            try_pin_init!(Self {
                bio: Opaque::uninit(),
                vec: Opaque::uninit(),
                // SAFETY: The slot is memory for a completion.
                done <- Opaque::ffi_init(|slot| unsafe { sys::init_completion(slot) }),
                // A contiguous buffer that isn't from the pool, like the spare buffers of zfile.
                buffer: Buffer::new_spare(capacity)?,
                busy: false,
            }),
            GFP_KERNEL,
        )
    }

    /// Starts reading `len` bytes from byte `at` of `device`. Both are multiples of its block size.
    fn submit(mut self: Pin<&mut Self>, device: &Device, at: u64, len: usize) -> Result {
        // Waits for an earlier read that is still in flight. The caller doesn't want its bytes, so
        // its status doesn't matter.
        let _ = self.as_mut().settle();
        let bio = NonNull::new(self.bio.get()).ok_or(EINVAL)?;
        let vec = NonNull::new(self.vec.get()).ok_or(EINVAL)?;
        let done = self.done.get();
        let buffer = self.as_mut().project().buffer;
        buffer.reset(len)?;
        // SAFETY: `self` is pinned, and waits for the bio before it is dropped or used again.
        // `device` stays open until the caller has dropped `self`.
        let ready = unsafe { buffer.init_read(bio, vec, device.bdev(), sys::OBD_REQ_META) };
        if ready.is_err() {
            // SAFETY: Initialised above, and not in flight.
            unsafe { sys::bio_uninit(bio.as_ptr()) };
            return ready;
        }
        // SAFETY: The bio was initialised above and isn't in flight yet.
        let fields = unsafe { &mut *bio.as_ptr() };
        fields.bi_iter.bi_sector = at / 512;
        fields.bi_private = done.cast();
        fields.bi_end_io = Some(Self::end_io);
        // INVARIANT: The bio is in flight from here on, and `end_io` completes `done`.
        *self.as_mut().project().busy = true;
        // SAFETY: The bio is a complete read.
        unsafe { sys::submit_bio(bio.as_ptr()) };
        Ok(())
    }

    /// Waits for the read. Returns the bytes that it has read.
    fn wait(mut self: Pin<&mut Self>) -> Result<&[u8], Failure> {
        if !self.busy {
            return Err(EINVAL.into());
        }
        let status = self.as_mut().settle();
        let buffer = self.project().buffer;
        match status {
            Ok(()) => {
                // SAFETY: The read has succeeded.
                unsafe { buffer.set_filled() };
                // Doesn't fail: the buffer is contiguous.
                let bytes = buffer.get(0, buffer.filled());
                Ok(bytes.ok_or(EINVAL)?)
            }
            Err(_) => Err(Failure::new(c"Cannot read metadata", EIO)),
        }
    }

    /// Waits until the bio isn't in flight. Returns its status, or `Ok` if it wasn't in flight.
    fn settle(self: Pin<&mut Self>) -> Result<(), Status> {
        let this = self.project();
        if !*this.busy {
            return Ok(());
        }
        // SAFETY: By the type invariant `done` is initialised, and is completed once for this bio.
        unsafe { sys::wait_for_completion_io(this.done.get()) };
        let bio = this.bio.get();
        // SAFETY: The bio has ended, and no one else uses it any more.
        let status = Status::check(unsafe { (*bio).bi_status });
        // SAFETY: As above.
        unsafe { sys::bio_uninit(bio) };
        // INVARIANT: The bio has ended and is uninitialised.
        *this.busy = false;
        status
    }

    /// The completion function of the bio. Called in any context.
    ///
    /// # Safety
    ///
    /// `bio` was submitted by [`Read::submit`].
    unsafe extern "C" fn end_io(bio: *mut sys::bio) {
        // SAFETY: The bio is valid.
        let done = unsafe { (*bio).bi_private };
        // SAFETY: `submit` stored a completion there. It is valid until it is completed.
        unsafe { sys::complete(done.cast()) };
    }
}

#[pinned_drop]
impl PinnedDrop for Read {
    fn drop(self: Pin<&mut Self>) {
        let _ = self.settle();
    }
}
