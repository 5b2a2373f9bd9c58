//! From guest pages to frames: the hot path of a migration.
//!
//! A page is copied out of guest memory once, straight to the place that it has in a raw frame. There,
//! still in the first-level cache, it is tested for zero (which ends at the first block for nearly every
//! page of data) and hashed. A page of zeros gives its place to the next one, so frames are dense
//! without moving anything:
//!
//! ```text
//!  buffer   [ room for header and run table | page 0 | page 1 | … | page 255 ]
//!  frame               [ header | run table | page 0 | … | page n ]            the run table ends where
//!                                                                              the pages begin
//! ```
//! Since the run table is known last, the frame begins wherever the table's length says. A raw frame
//! is then sent from the buffer itself. The buffer comes back to the builder when the link has let go
//! of the frame: no allocation and no clearing for each batch.

use std::collections::VecDeque;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use ferry_pages::{PAGE_BYTES, Run};

use crate::compress::Compressor;
use crate::frame::{HEADER_BYTES, Preamble, RUN_BYTES};
use crate::{
    Codec, CodecChooser, MAX_BATCH_BYTES, MAX_BATCH_PAGES, MAX_ZERO_RUNS, is_zero, page_check,
    page_digest,
};

/// Where the pages begin in a buffer: room for the longest run table.
const PAGES_AT: usize = HEADER_BYTES + MAX_BATCH_PAGES * RUN_BYTES;
/// Buffers that may be with the link and still come back: a little more than a link's send window.
const MAX_BUFFERS: usize = 12;

/// Why a page was not taken into the batch: finish it and begin the next.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NotTaken {
    /// There is no room for another page, or for another run of zero pages.
    #[error("the batch is full")]
    Full,
    /// The page does not come after the one before it.
    #[error("the page's frame does not ascend")]
    NotAscending,
}

/// What a batch of candidate pages came to.
#[derive(Clone, Debug)]
pub struct Built<'a> {
    /// The data pages, ready for the link; none when every page was zero.
    pub frame: Option<Bytes>,
    /// The pages that the destination has, if there are any: ready for the link, and how many.
    pub same: Option<(Bytes, u64)>,
    /// How they are written: raw where compression did not make them smaller.
    pub codec: Codec,
    /// The data pages.
    pub runs: &'a [Run],
    /// The digest of each data page, in the order of `runs`.
    pub digests: &'a [u64],
    /// The pages that were zero: collect them, and send them by [`zero_frames`].
    pub zeros: &'a [Run],
}

/// Makes frames out of guest pages. One serves any number of batches.
#[derive(Default)]
pub struct BatchBuilder {
    round: u32,
    buffer: BytesMut,
    sent: VecDeque<Bytes>,
    compressor: Compressor,
    next_gfn: u64,
    runs: Vec<Run>,
    digests: Vec<u64>,
    zeros: Vec<Run>,
    same: Vec<Run>,
    /// Wrapping sum of the checks of `same`.
    checks: u64,
    samples: usize,
}

impl BatchBuilder {
    /// An empty one; its buffers are made as they are needed.
    pub fn new() -> Self {
        Self::default()
    }

    /// Begins a batch of pages read in `round`, dropping what was not finished.
    pub fn begin(&mut self, round: u32) {
        self.round = round;
        self.next_gfn = 0;
        self.runs.clear();
        self.digests.clear();
        self.zeros.clear();
        self.same.clear();
        self.checks = 0;
    }

    /// Data pages that the batch still has room for.
    pub fn room(&self) -> usize {
        MAX_BATCH_PAGES - self.digests.len()
    }

    fn same_pages(&self) -> u64 {
        self.same.iter().map(|run| run.pages).sum()
    }

    /// Data pages in the batch.
    pub fn data_pages(&self) -> usize {
        self.digests.len()
    }

    /// Adds the page at frame `gfn`. `fill` copies its bytes to the [`PAGE_BYTES`] that it is given
    /// (all of them: what was there before is not cleared). Frames ascend within a batch.
    ///
    /// # Errors
    /// `fill` was not called, and the batch is as it was: finish it and begin the next.
    pub fn push(&mut self, gfn: u64, fill: impl FnOnce(&mut [u8])) -> Result<(), NotTaken> {
        self.push_unless(gfn, fill, |_| false)
    }

    /// The same, but the page is only named if `has` says that the destination has one with that digest.
    ///
    /// # Errors
    /// As [`push`](Self::push).
    pub fn push_unless(
        &mut self,
        gfn: u64,
        fill: impl FnOnce(&mut [u8]),
        has: impl FnOnce(u64) -> bool,
    ) -> Result<(), NotTaken> {
        if gfn < self.next_gfn {
            return Err(NotTaken::NotAscending);
        }
        let full = self.room() == 0 || self.same_pages() == MAX_BATCH_PAGES as u64;
        if full || self.zeros.len() == MAX_ZERO_RUNS {
            return Err(NotTaken::Full);
        }
        if self.buffer.is_empty() {
            self.buffer = self.free_buffer();
        }
        let at = PAGES_AT + self.digests.len() * PAGE_BYTES;
        let page = &mut self.buffer[at..at + PAGE_BYTES];
        fill(page);
        if is_zero(page) {
            append(&mut self.zeros, gfn);
        } else {
            let digest = page_digest(gfn, page);
            if has(digest) {
                self.checks = self.checks.wrapping_add(page_check(gfn, page));
                append(&mut self.same, gfn);
            } else {
                self.digests.push(digest);
                append(&mut self.runs, gfn);
            }
        }
        self.next_gfn = gfn.saturating_add(1);
        Ok(())
    }

    /// Adds the page at frame `gfn`, which was seen to be zero where it lies: spares the copy.
    ///
    /// # Errors
    /// As [`push`](Self::push).
    pub fn push_zero(&mut self, gfn: u64) -> Result<(), NotTaken> {
        if gfn < self.next_gfn {
            return Err(NotTaken::NotAscending);
        }
        if self.zeros.len() == MAX_ZERO_RUNS {
            return Err(NotTaken::Full);
        }
        append(&mut self.zeros, gfn);
        self.next_gfn = gfn.saturating_add(1);
        Ok(())
    }

    /// The bytes of one data page, and how many `codec` makes of them: a cheap look at whether
    /// compressing the batch is worth it. None in a batch without data.
    pub fn sample(&mut self, codec: Codec) -> Option<(usize, usize)> {
        let pages = self.digests.len();
        // Another place in each batch, so that a pattern in memory does not fool it.
        self.samples = self.samples.wrapping_add(101);
        let at = PAGES_AT + self.samples.checked_rem(pages)? * PAGE_BYTES;
        let page = &self.buffer[at..at + PAGE_BYTES];
        let encoded = self.compressor.compress(codec, page).map_or(PAGE_BYTES, <[u8]>::len);
        Some((PAGE_BYTES, encoded))
    }

    /// Finishes the batch by `codec`, or raw where that is no larger.
    pub fn finish(&mut self, codec: Codec) -> Built<'_> {
        let raw_bytes = self.digests.len() * PAGE_BYTES;
        let digest = self.digests.iter().fold(0u64, |sum, digest| sum.wrapping_add(*digest));
        let preamble = Preamble { round: self.round, runs: &self.runs, digest };
        let head = preamble.bytes();
        let (frame, codec) = if raw_bytes == 0 {
            (None, Codec::Raw)
        } else if let Some(payload) =
            self.compressor.compress(codec, &self.buffer[PAGES_AT..PAGES_AT + raw_bytes])
        {
            let mut frame = Vec::with_capacity(head + payload.len());
            frame.resize(head, 0);
            preamble.write(codec, payload.len(), &mut frame);
            frame.extend_from_slice(payload);
            (Some(frame.into()), codec)
        } else {
            let start = PAGES_AT - head;
            preamble.write(Codec::Raw, raw_bytes, &mut self.buffer[start..PAGES_AT]);
            let frame = start..PAGES_AT + raw_bytes;
            let frame = if raw_bytes < MAX_BATCH_BYTES / 4 {
                // A small frame does not keep a large buffer waiting for the link.
                Bytes::copy_from_slice(&self.buffer[frame])
            } else {
                let whole = std::mem::take(&mut self.buffer).freeze();
                let frame = whole.slice(frame);
                self.sent.push_back(whole);
                frame
            };
            (Some(frame), Codec::Raw)
        };
        let same = (!self.same.is_empty()).then(|| {
            let preamble = Preamble { round: self.round, runs: &self.same, digest: self.checks };
            let mut frame = vec![0; preamble.bytes()];
            preamble.write(Codec::Same, 0, &mut frame);
            (frame.into(), self.same_pages())
        });
        let (runs, digests, zeros) = (&self.runs, &self.digests, &self.zeros);
        Built { frame, same, codec, runs, digests, zeros }
    }

    /// Finishes the batch by the codec that `chooser` chooses, and tells it what that took by the
    /// clock `now`.
    pub fn finish_chosen(
        &mut self,
        chooser: &mut CodecChooser,
        mut now: impl FnMut() -> Duration,
    ) -> Built<'_> {
        for codec in chooser.begin_batch() {
            let before = now();
            if let Some((raw, encoded)) = self.sample(codec) {
                chooser.sampled(codec, raw, encoded, now().saturating_sub(before));
            }
        }
        let codec = chooser.choose();
        let raw = self.digests.len() * PAGE_BYTES;
        let before = now();
        let built = self.finish(codec);
        let encoded = match (&built.frame, built.codec) {
            (Some(frame), Codec::Lz4 | Codec::Zstd) => frame.len(),
            _ => raw,
        };
        chooser.encoded(codec, raw, encoded, now().saturating_sub(before));
        built
    }

    /// A buffer that the link has let go of, or a new one.
    fn free_buffer(&mut self) -> BytesMut {
        // The link lets go in order: the oldest is free first.
        match self.sent.pop_front().map(Bytes::try_into_mut) {
            Some(Ok(buffer)) => return buffer,
            // Past the bound the link keeps the oldest for itself and frees it when done.
            Some(Err(busy)) if self.sent.len() < MAX_BUFFERS => self.sent.push_front(busy),
            Some(Err(_)) | None => {}
        }
        BytesMut::zeroed(PAGES_AT + MAX_BATCH_BYTES)
    }
}

/// Frames for zero pages: `runs` ascending and disjoint, not empty, in as many frames as they need.
pub fn zero_frames(round: u32, runs: &[Run]) -> impl Iterator<Item = Bytes> + '_ {
    runs.chunks(MAX_ZERO_RUNS).map(move |runs| {
        let preamble = Preamble { round, runs, digest: 0 };
        let mut frame = vec![0; preamble.bytes()];
        preamble.write(Codec::Zero, 0, &mut frame);
        frame.into()
    })
}

/// Adds frame `gfn`, which comes after all of `runs`.
pub(crate) fn append(runs: &mut Vec<Run>, gfn: u64) {
    match runs.last_mut() {
        Some(last) if last.end() == gfn => last.pages += 1,
        _ => runs.push(Run::new(gfn, 1)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_that_the_link_does_not_let_go_of_are_waited_for_up_to_a_bound() {
        let mut builder = BatchBuilder::new();
        let mut with_link = Vec::new();
        for _ in 0..3 * MAX_BUFFERS {
            builder.begin(1);
            for gfn in 0..MAX_BATCH_PAGES as u64 {
                builder.push(gfn, |to| to.fill(7)).unwrap();
            }
            with_link.extend(builder.finish(Codec::Raw).frame);
            assert!(builder.sent.len() <= MAX_BUFFERS + 1);
        }
        assert_eq!(with_link.len(), 3 * MAX_BUFFERS);
        assert!(builder.sent.len() >= MAX_BUFFERS);
    }
}
