//! Writes that are reported by whoever makes them: devices, and anything else that writes guest memory
//! without a vCPU.
//!
//! The order is the whole of it: a writer writes, *then* marks; the tracker takes the mark, *then* the
//! page is copied. A mark that is taken therefore covers bytes that the copy sees.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use ferry_pages::{PAGE_BYTES, PageSet, Run};
use vm_memory::bitmap::{Bitmap, BitmapSlice, NewBitmap, WithBitmapSlice};
use vm_memory::{Address, GuestMemoryBackend, GuestMemoryRegion};

use crate::{DirtySource, TrackError};

/// One bit a page of one stretch of memory; clones share the bits.
///
/// As the bitmap of a vm-memory region (`GuestMemoryMmap<RegionBitmap>`) it is marked by every write that
/// goes through vm-memory; [`SoftwareBitmap::of_memory`] then tracks the machine.
#[derive(Clone, Default)]
pub struct RegionBitmap {
    words: Arc<[AtomicU64]>,
    pages: u64,
}

impl RegionBitmap {
    /// A clean bitmap for `pages` pages.
    pub fn new(pages: u64) -> Self {
        let words = usize::try_from(pages.div_ceil(64)).unwrap_or(usize::MAX);
        Self { words: (0..words).map(|_| AtomicU64::new(0)).collect(), pages }
    }

    /// How many pages it covers.
    pub fn pages(&self) -> u64 {
        self.pages
    }

    /// Marks `count` pages from page `first` on; those beyond the end are ignored.
    pub fn mark(&self, first: u64, count: u64) {
        let end = first.saturating_add(count).min(self.pages);
        let mut at = first;
        while at < end {
            let bits = (64 - at % 64).min(end - at);
            let mask = (u64::MAX >> (64 - bits)) << (at % 64);
            if let Some(word) = usize::try_from(at / 64).ok().and_then(|w| self.words.get(w)) {
                // Always a read-modify-write. Looking first, to spare one for a bit that is set, would
                // allow the look to pass the write of the data: the tracker takes the old mark and copies
                // the old bytes, and nothing marks the new ones.
                word.fetch_or(mask, Ordering::Release);
            }
            at += bits;
        }
    }

    fn is_marked(&self, page: u64) -> bool {
        let word = usize::try_from(page / 64).ok().and_then(|w| self.words.get(w));
        word.is_some_and(|w| w.load(Ordering::Relaxed) >> (page % 64) & 1 == 1)
    }

    /// Takes all marks; `found` gets page number and bits of each word that has any.
    fn take(&self, mut found: impl FnMut(u64, u64)) {
        for (i, word) in (0_u64..).zip(self.words.iter()) {
            // A clean word stays shared among the caches. A mark that comes after this look is found
            // next time.
            if word.load(Ordering::Relaxed) != 0 {
                // Acquire: the copy that follows sees what was written before the mark.
                found(i * 64, word.swap(0, Ordering::Acquire));
            }
        }
    }
}

impl std::fmt::Debug for RegionBitmap {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "RegionBitmap({} pages)", self.pages)
    }
}

impl<'a> WithBitmapSlice<'a> for RegionBitmap {
    type S = RegionBitmapSlice<'a>;
}

impl Bitmap for RegionBitmap {
    fn mark_dirty(&self, offset: usize, len: usize) {
        if len > 0 {
            let (first, last) = (offset / PAGE_BYTES, offset.saturating_add(len - 1) / PAGE_BYTES);
            self.mark(first as u64, (last - first) as u64 + 1);
        }
    }

    fn dirty_at(&self, offset: usize) -> bool {
        self.is_marked((offset / PAGE_BYTES) as u64)
    }

    fn slice_at(&self, offset: usize) -> RegionBitmapSlice<'_> {
        RegionBitmapSlice { of: self, offset }
    }
}

impl NewBitmap for RegionBitmap {
    fn with_len(len: usize) -> Self {
        Self::new(len.div_ceil(PAGE_BYTES) as u64)
    }
}

/// A [`RegionBitmap`] seen from an offset on, as vm-memory hands it to a slice of memory.
#[derive(Clone, Debug)]
pub struct RegionBitmapSlice<'a> {
    of: &'a RegionBitmap,
    offset: usize,
}

impl WithBitmapSlice<'_> for RegionBitmapSlice<'_> {
    type S = Self;
}

impl BitmapSlice for RegionBitmapSlice<'_> {}

impl Bitmap for RegionBitmapSlice<'_> {
    fn mark_dirty(&self, offset: usize, len: usize) {
        self.of.mark_dirty(self.offset.saturating_add(offset), len);
    }

    fn dirty_at(&self, offset: usize) -> bool {
        self.of.dirty_at(self.offset.saturating_add(offset))
    }

    fn slice_at(&self, offset: usize) -> Self {
        Self { of: self.of, offset: self.offset.saturating_add(offset) }
    }
}

/// Dirty tracking by marks, of a whole machine. Re-arms as it collects.
///
/// Shared as `Arc<SoftwareBitmap>`: writers mark, and the `Arc` itself is the [`DirtySource`]. Marks are
/// kept also while nothing tracks (an atomic operation each); `start` drops them.
#[derive(Debug)]
pub struct SoftwareBitmap {
    parts: Vec<(Run, RegionBitmap)>,
}

impl SoftwareBitmap {
    /// A clean bitmap of the frames of `extents`.
    pub fn new(extents: impl IntoIterator<Item = Run>) -> Self {
        Self { parts: extents.into_iter().map(|run| (run, RegionBitmap::new(run.pages))).collect() }
    }

    /// The marks of all regions of a vm-memory guest memory.
    pub fn of_memory<M>(memory: &M) -> Self
    where
        M: GuestMemoryBackend,
        M::R: GuestMemoryRegion<B = RegionBitmap>,
    {
        let part = |region: &M::R| {
            let start = region.start_addr().raw_value() / PAGE_BYTES as u64;
            let bits = region.bitmap().of.clone();
            (Run::new(start, bits.pages), bits)
        };
        Self { parts: memory.iter().map(part).collect() }
    }

    /// Marks a frame, after it was written. A frame that the machine does not have is ignored.
    pub fn mark(&self, gfn: u64) {
        self.mark_run(Run::new(gfn, 1));
    }

    /// Marks the frames of `run`, after they were written.
    pub fn mark_run(&self, run: Run) {
        for (part, bits) in &self.parts {
            let start = run.start.max(part.start);
            let end = run.end().min(part.end());
            if start < end {
                bits.mark(start - part.start, end - start);
            }
        }
    }

    /// Marks the pages of `bytes` bytes from guest-physical `address`, after they were written.
    pub fn mark_range(&self, address: u64, bytes: u64) {
        if bytes > 0 {
            let (first, last) = (
                address / PAGE_BYTES as u64,
                address.saturating_add(bytes - 1) / PAGE_BYTES as u64,
            );
            self.mark_run(Run::new(first, last - first + 1));
        }
    }
}

impl DirtySource for Arc<SoftwareBitmap> {
    fn name(&self) -> &'static str {
        "software"
    }

    fn start(&mut self) -> Result<(), TrackError> {
        self.parts.iter().for_each(|(_, bits)| bits.take(|_, _| {}));
        Ok(())
    }

    fn collect(&mut self, into: &mut PageSet) -> Result<(), TrackError> {
        for (run, bits) in &self.parts {
            bits.take(|first, word| into.insert_bitmap(run.start + first, &[word], 64));
        }
        Ok(())
    }

    fn rearm(&mut self, _pages: &PageSet) -> Result<(), TrackError> {
        Ok(())
    }

    fn stop(&mut self) -> Result<(), TrackError> {
        Ok(())
    }
}
