//! Guest memory by frame number: pages copied in and out, given back, populated ahead.

#![expect(unsafe_code, reason = "raw copies from and to memory that a guest may change")]

use std::any::Any;
use std::io;
use std::sync::{Arc, PoisonError, RwLock};

use ferry_dirtylog::Region;
use ferry_pages::{PAGE_BYTES, PageSet, Run};

use crate::discards::Discards;
use crate::{Away, Mapping, MemoryError, resident};

/// The memory of one machine, seen by frame number.
///
/// A copy of a page that the guest is writing may be torn: that is for the dirty log to mend. No
/// reference into guest memory is ever formed.
#[derive(Clone, Debug)]
pub struct GuestView {
    /// Ascending, disjoint.
    regions: Arc<[Region]>,
    /// What keeps them mapped.
    _owner: Arc<dyn Any + Send + Sync>,
    shared: Arc<Shared>,
}

/// What all clones of a view have in common.
#[derive(Debug, Default)]
struct Shared {
    away: RwLock<Option<Arc<dyn Away>>>,
    discards: Discards,
}

/// A part of a request that lies in one region.
pub(crate) struct Part {
    /// Where in this process.
    pub(crate) host: *mut u8,
    pub(crate) bytes: usize,
    pub(crate) run: Run,
    pub(crate) region: Region,
}

impl Part {
    pub(crate) fn address(&self) -> u64 {
        self.host as u64
    }
}

impl GuestView {
    /// A view of `regions`, in any order.
    ///
    /// # Errors
    /// Two of them overlap.
    ///
    /// # Safety
    /// Each region's `run.pages` pages from address `host` are mapped readable and writable, its `backing`
    /// is that mapping's, and both stay so until this view and its clones are gone. Nothing in this
    /// process holds a reference into them or relies on their content: any byte may change at any time.
    pub unsafe fn new(mut regions: Vec<Region>) -> Result<Self, MemoryError> {
        regions.sort_by_key(|r| r.run.start);
        if let Some(pair) = regions.windows(2).find(|w| w[0].run.end() > w[1].run.start) {
            return Err(MemoryError::Overlap(pair[0].run, pair[1].run));
        }
        Ok(Self { regions: regions.into(), _owner: Arc::new(()), shared: Arc::default() })
    }

    /// A view of `mappings`, each from a frame on, which are its own: they go with it and its clones.
    ///
    /// # Errors
    /// Two of them overlap.
    pub fn of(mappings: Vec<(u64, Mapping)>) -> Result<Self, MemoryError> {
        let regions = (0..).zip(&mappings).map(|(slot, (gfn, m))| m.region(*gfn, slot)).collect();
        // SAFETY: each region is all of a mapping that the view keeps, and nobody else can reach.
        Ok(unsafe { Self::new(regions) }?.keeping(mappings))
    }

    /// The same view, which keeps `owner` (the mapping, say) until it and its clones are gone.
    #[must_use]
    pub fn keeping(self, owner: impl Any + Send + Sync) -> Self {
        Self { _owner: Arc::new(owner), ..self }
    }

    /// The same memory for whoever keeps pages elsewhere: what it reads is in memory, what it gives back is not
    /// noted.
    #[must_use]
    pub fn plain(&self) -> Self {
        Self { shared: Arc::default(), ..self.clone() }
    }

    /// From now on, pages of this view and its clones may be with `away`; not if they may be with another: false.
    #[must_use]
    pub fn attach(&self, away: Arc<dyn Away>) -> bool {
        let mut place = self.shared.away.write().unwrap_or_else(PoisonError::into_inner);
        let free = place.is_none();
        place.get_or_insert(away);
        free
    }

    /// Who keeps pages that are not in memory, if there is one.
    pub fn away(&self) -> Option<Arc<dyn Away>> {
        self.shared.away.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// What is given back from now on: see [`DiscardLog`](crate::DiscardLog).
    pub(crate) fn discards(&self) -> &Discards {
        &self.shared.discards
    }

    /// The regions, ascending.
    pub fn regions(&self) -> &[Region] {
        &self.regions
    }

    /// Copies memory from the beginning of frame `gfn` on into `out`, which may be any number of bytes. Pages that
    /// are [`Away`] stay there.
    ///
    /// # Errors
    /// Part of it is not guest memory (nothing was copied), or is away and cannot be had now.
    pub fn read(&self, gfn: u64, out: &mut [u8]) -> Result<(), MemoryError> {
        let Some(away) = self.away() else { return self.read_here(gfn, out) };
        self.regions_of(Run::new(gfn, out.len().div_ceil(PAGE_BYTES) as u64))?;
        let _stay = away.stay();
        for (gfn, out) in (gfn..).zip(out.chunks_mut(PAGE_BYTES)) {
            if out.len() == PAGE_BYTES {
                if !away.read(gfn, out)? {
                    self.read_here(gfn, out)?;
                }
                continue;
            }
            let mut page = [0; PAGE_BYTES];
            if away.read(gfn, &mut page)? {
                out.copy_from_slice(&page[..out.len()]);
            } else {
                self.read_here(gfn, out)?;
            }
        }
        Ok(())
    }

    fn read_here(&self, gfn: u64, out: &mut [u8]) -> Result<(), MemoryError> {
        let mut rest = out.as_mut_ptr();
        self.each(gfn, out.len(), |part| {
            // SAFETY: the part is mapped (contract of `new`, bounds by `each`); `rest` has as many bytes
            // left, and is not guest memory, to which nobody has a reference. Only bytes are copied, of
            // which any value is good, so that a race with the guest tears data but breaks nothing.
            unsafe {
                std::ptr::copy_nonoverlapping(part.host, rest, part.bytes);
                rest = rest.add(part.bytes);
            }
            Ok(())
        })
    }

    /// Whether the page at frame `gfn` is zero, found without copying it; looks no further than the first
    /// block that is not. A write at the same time may go unseen, as in [`read`](Self::read).
    ///
    /// # Errors
    /// It is not guest memory.
    pub fn is_zero(&self, gfn: u64) -> Result<bool, MemoryError> {
        /// Wide enough for vector instructions, short enough to cost little on a page of data.
        type Block = [u64; 32];
        let away = self.away();
        let _stay = away.as_ref().map(|away| away.stay());
        // Who keeps a page elsewhere keeps none of zeros.
        if let Some(away) = &away
            && away.has(gfn)
        {
            return Ok(false);
        }
        let mut zero = true;
        self.each(gfn, PAGE_BYTES, |part| {
            let blocks = part.host.cast::<Block>();
            zero = (0..part.bytes / size_of::<Block>()).all(|i| {
                // SAFETY: in the part, which is mapped (contract of `new`, bounds by `each`), and aligned
                // as a page is. The block is copied out, and any value of it is good.
                let block = unsafe { blocks.add(i).read() };
                block.iter().fold(0, |all, word| all | word) == 0
            });
            Ok(())
        })?;
        Ok(zero)
    }

    /// Appends the pages of `run` to `out`.
    ///
    /// # Errors
    /// Part of it is not guest memory; nothing was appended.
    pub fn read_run(&self, run: Run, out: &mut Vec<u8>) -> Result<(), MemoryError> {
        let bytes = self.bytes_of(run)?;
        // A run that is too long for the machine must not ask for room.
        self.regions_of(run)?;
        out.reserve(bytes);
        if self.away().is_some() {
            let filled = out.len();
            out.resize(filled + bytes, 0);
            return self.read(run.start, &mut out[filled..]).inspect_err(|_| out.truncate(filled));
        }
        self.each(run.start, bytes, |part| {
            let filled = out.len();
            // SAFETY: as in `read`; the room was reserved, and is initialised by the copy before the
            // length says so.
            unsafe {
                std::ptr::copy_nonoverlapping(part.host, out.as_mut_ptr().add(filled), part.bytes);
                out.set_len(filled + part.bytes);
            }
            Ok(())
        })
    }

    /// Copies `bytes` to memory from the beginning of frame `gfn` on.
    ///
    /// # Errors
    /// Part of it is not guest memory; nothing was written.
    pub fn write(&self, gfn: u64, bytes: &[u8]) -> Result<(), MemoryError> {
        self.overwritten(Run::new(gfn, (bytes.len() / PAGE_BYTES) as u64));
        let mut rest = bytes;
        self.each(gfn, bytes.len(), |part| {
            let (now, later) = rest.split_at(part.bytes);
            // SAFETY: the part is mapped writable (contract of `new`, bounds by `each`), and `now` is not
            // guest memory, to which nobody has a reference.
            unsafe { std::ptr::copy_nonoverlapping(now.as_ptr(), part.host, now.len()) };
            rest = later;
            Ok(())
        })
    }

    /// The pages of `run` get new content: what is kept of them elsewhere is old.
    pub(crate) fn overwritten(&self, run: Run) {
        if let Some(away) = self.away() {
            away.forget(run);
        }
    }

    /// The pages that hold data, in memory (see [`resident`](crate::resident())) or [`Away`].
    ///
    /// # Errors
    /// The kernel cannot tell.
    pub fn resident(&self) -> Result<PageSet, MemoryError> {
        let Some(away) = self.away() else { return resident(&self.regions) };
        // A page that comes back between the two looks is in the first.
        let mut pages = away.pages();
        let _stay = away.stay();
        pages.union_with(&resident(&self.regions)?);
        pages.union_with(&away.pages());
        Ok(pages)
    }

    /// Gives the pages of `run` back to the host: they read as zeros.
    ///
    /// # Errors
    /// Part of it is not guest memory (nothing was given back), or the kernel refused.
    pub fn discard(&self, run: Run) -> Result<(), MemoryError> {
        let away = self.away();
        // Nothing of it leaves memory meanwhile, to come back later.
        let _stay = away.as_ref().map(|away| away.stay());
        if let Some(away) = &away {
            self.regions_of(run)?;
            away.forget(run);
        }
        // By the mapping, not the descriptor: who watches the memory is told of it.
        let discarded = self.advise("discard", run, |region| match region.backing {
            None => libc::MADV_DONTNEED,
            Some(_) => libc::MADV_REMOVE,
        });
        // Not before: a copy that is made of a page that was noted must be of zeros.
        self.shared.discards.note(run);
        discarded
    }

    /// Gives `pages` back to the host, as [`discard`](Self::discard) does each run of them: scattered pages in few calls,
    /// where the kernel can (Linux 6.14).
    ///
    /// # Errors
    /// As there; some were given back.
    pub fn discard_all(&self, pages: &PageSet) -> Result<(), MemoryError> {
        let away = self.away();
        let _stay = away.as_ref().map(|away| away.stay());
        let mut batch = Batch { refused: false, parts: Vec::new() };
        let mut runs = Vec::new();
        for run in pages.runs() {
            let regions = self.regions_of(run)?;
            let plain =
                regions.iter().take_while(|r| r.run.start < run.end()).all(|r| r.backing.is_none());
            if !plain || batch.refused {
                self.discard(run)?;
                continue;
            }
            if let Some(away) = &away {
                away.forget(run);
            }
            self.each(run.start, self.bytes_of(run)?, |part| {
                batch.push(&part);
                Ok(())
            })?;
            runs.push(run);
            if batch.is_full() {
                self.discard_batch(&mut batch, &mut runs)?;
            }
        }
        self.discard_batch(&mut batch, &mut runs)
    }

    fn discard_batch(&self, batch: &mut Batch, runs: &mut Vec<Run>) -> Result<(), MemoryError> {
        let done = batch.discard();
        for run in runs.drain(..) {
            match done {
                true => self.shared.discards.note(run),
                false => self.discard(run)?,
            }
        }
        Ok(())
    }

    /// Takes the pages of `run`, whole huge pages, out of the mapping: their content stays in the file, and
    /// is back when they are next touched.
    ///
    /// # Errors
    /// Part of it is not guest memory (nothing was taken), or the kernel refused.
    pub fn hide(&self, run: Run) -> Result<(), MemoryError> {
        self.advise("unmap", run, |_| libc::MADV_DONTNEED)
    }

    /// Populates the pages of `run` as if each were written, in one call: cheaper than a fault each, for
    /// pages that are about to be filled. Their content stays.
    ///
    /// # Errors
    /// Part of it is not guest memory, or the host is out of memory.
    pub fn prefault_write(&self, run: Run) -> Result<(), MemoryError> {
        self.advise("populate", run, |_| libc::MADV_POPULATE_WRITE)
    }

    /// Tells the kernel `advice` for the pages of `run`, which depends on the region; `what` is tried by it.
    fn advise(
        &self,
        what: &'static str,
        run: Run,
        advice: impl Fn(&Region) -> i32,
    ) -> Result<(), MemoryError> {
        self.each(run.start, self.bytes_of(run)?, |part| {
            let run = part.run;
            madvise(&part, advice(&part.region)).map_err(|source| MemoryError::Refused {
                what,
                run,
                source,
            })
        })
    }

    fn bytes_of(&self, run: Run) -> Result<usize, MemoryError> {
        usize::try_from(run.pages)
            .ok()
            .and_then(|pages| pages.checked_mul(PAGE_BYTES))
            .ok_or(MemoryError::Outside { run })
    }

    /// The regions from that of the run's first page on, if all of the run is guest memory.
    fn regions_of(&self, run: Run) -> Result<&[Region], MemoryError> {
        let regions = &self.regions[self.regions.partition_point(|r| r.run.end() <= run.start)..];
        let mut known_to = run.start;
        for region in regions {
            if known_to >= run.end() || region.run.start > known_to {
                break;
            }
            known_to = region.run.end();
        }
        let wraps = run.start.checked_add(run.pages).is_none();
        if known_to < run.end() || wraps { Err(MemoryError::Outside { run }) } else { Ok(regions) }
    }

    /// Calls `act` for the parts of `bytes` bytes from frame `gfn` on, once all are known to be there.
    pub(crate) fn each(
        &self,
        gfn: u64,
        bytes: usize,
        mut act: impl FnMut(Part) -> Result<(), MemoryError>,
    ) -> Result<(), MemoryError> {
        let asked = Run::new(gfn, bytes.div_ceil(PAGE_BYTES) as u64);
        let regions = self.regions_of(asked)?;
        let mut left = bytes;
        for region in regions {
            let Some(run) = region.overlap(asked) else { break };
            // In range of a mapping that exists, and so of the address space.
            let offset = usize::try_from(run.start - region.run.start).unwrap_or(0) * PAGE_BYTES;
            let len = usize::try_from(run.pages).unwrap_or(0).saturating_mul(PAGE_BYTES).min(left);
            let host = std::ptr::with_exposed_provenance_mut(region.host + offset);
            act(Part { host, bytes: len, run, region: *region })?;
            left -= len;
        }
        Ok(())
    }
}

/// `PIDFD_SELF`: instead of a descriptor, this process itself.
const THIS_PROCESS: i32 = -10_000;

/// Parts of anonymous memory that are given back in one call.
struct Batch {
    /// The kernel refused one.
    refused: bool,
    parts: Vec<libc::iovec>,
}

impl Batch {
    /// As many as the kernel takes at once (`UIO_MAXIOV`).
    const MOST: usize = 1024;

    fn is_full(&self) -> bool {
        self.parts.len() >= Self::MOST
    }

    fn push(&mut self, part: &Part) {
        self.parts.push(libc::iovec { iov_base: part.host.cast(), iov_len: part.bytes });
    }

    /// Gives all of it back. False, and perhaps a part of it is not: nor will any other batch be.
    fn discard(&mut self) -> bool {
        let parts = std::mem::take(&mut self.parts);
        let bytes: usize = parts.iter().map(|part| part.iov_len).sum();
        let given = parts.chunks(Self::MOST).map(|parts| {
            // SAFETY: as in `madvise`: each part is whole pages of a mapping that is guest memory, on whose content
            // nothing relies; the list lives through the call.
            unsafe {
                libc::syscall(
                    libc::SYS_process_madvise,
                    THIS_PROCESS,
                    parts.as_ptr(),
                    parts.len(),
                    libc::MADV_DONTNEED,
                    0,
                )
            }
        });
        // What was refused is negative.
        let given: usize = given.map(|given| usize::try_from(given).unwrap_or(0)).sum();
        self.refused |= given != bytes;
        given == bytes
    }
}

fn madvise(part: &Part, advice: i32) -> io::Result<()> {
    loop {
        // SAFETY: the part is whole pages of a mapping that is guest memory (contract of `GuestView::new`),
        // on whose content nothing relies; no mapping is added or removed.
        if unsafe { libc::madvise(part.host.cast(), part.bytes, advice) } == 0 {
            return Ok(());
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}
