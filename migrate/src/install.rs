//! Installing pages at the destination: no old copy over a newer one, no page faulted in for nothing.

use std::io;
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use ferry_codec::{Batch, Codec};
use ferry_memory::{Away, Filler, GuestView, MemoryError};
use ferry_pager::{Faults, Next, Notice, Pager};
use ferry_pages::{Layout, PAGE_BYTES, PageSet, Run};
use ferry_postcopy::{Admission, CHUNK_PAGES, ChunkLedger, by_chunk};
use tokio::io::unix::AsyncFd;
use tokio::runtime::Handle;
use tokio::task::AbortHandle;

use crate::kept;

/// Writes verified batches into guest memory; several lanes at once.
pub(crate) struct Installer {
    view: GuestView,
    layout: Layout,
    /// One lock for each 2 MiB that the layout touches. The ledger behind it is made when the first
    /// page arrives.
    chunks: Vec<Mutex<Option<Box<ChunkLedger>>>>,
    /// Chunks in front of each extent, and the extent's first chunk number.
    extents: Vec<(Run, u64, usize)>,
    /// Held for reading while a batch is installed.
    stage: RwLock<Stage>,
}

/// What is done with pages that come.
enum Stage {
    /// The machine does not run: they are written.
    Filling(Filler),
    /// The machine runs, or is about to: they are placed where they are owed.
    Paging { pager: Pager, after: u32, _faults: Reader },
    /// The last page came while the machine ran; more copies are for nothing.
    Drained,
    /// Nothing is to come.
    Closed,
}

/// What became of a batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Installed {
    /// Its pages are in the memory of a machine that does not run yet.
    Filled,
    /// Its pages are here, for a machine that runs.
    Paged,
    /// It came too late.
    Closed,
}

/// A task that ends with its pager.
struct Reader(AbortHandle);

impl Drop for Reader {
    fn drop(&mut self) {
        self.0.abort();
    }
}

#[expect(
    deprecated,
    reason = "unsound for a type that changes or closes its descriptor, which a pager's does not"
)]
fn faults_fd(faults: Faults) -> io::Result<AsyncFd<Faults>> {
    AsyncFd::new(faults)
}

/// Reads faults where the urgent lane is: whoever asks for pages need not be woken on another core.
async fn read_faults(mut faults: AsyncFd<Faults>) {
    while let Ok(mut ready) = faults.readable_mut().await {
        loop {
            match ready.get_inner_mut().answer() {
                Next::End => return,
                // Those that wait are asked for first.
                Next::Soon => tokio::task::yield_now().await,
                Next::Wait => break,
            }
        }
        ready.clear_ready();
    }
}

const ZERO_PAGE: [u8; PAGE_BYTES] = [0; PAGE_BYTES];

impl Installer {
    pub(crate) fn new(view: GuestView, layout: Layout) -> Self {
        let chunk_pages = CHUNK_PAGES as u64;
        let mut extents = Vec::new();
        let mut count = 0;
        for e in layout.extents() {
            let (first, last) = (e.start / chunk_pages, (e.end() - 1) / chunk_pages);
            extents.push((*e, first, count));
            // A machine's memory fits into this process: so does the number of its chunks.
            count += usize::try_from(last - first + 1).unwrap_or(0);
        }
        let chunks = (0..count).map(|_| Mutex::new(None)).collect();
        let stage = RwLock::new(Stage::Filling(Filler::new(view.clone())));
        Self { view, layout, chunks, extents, stage }
    }

    pub(crate) fn view(&self) -> &GuestView {
        &self.view
    }

    pub(crate) fn layout(&self) -> &Layout {
        &self.layout
    }

    fn chunk(&self, number: u64, gfn: u64) -> Option<&Mutex<Option<Box<ChunkLedger>>>> {
        let after = self.extents.partition_point(|(e, ..)| e.start <= gfn);
        let (_, first, before) = self.extents[..after].last()?;
        self.chunks.get(before + usize::try_from(number.checked_sub(*first)?).ok()?)
    }

    /// Calls `act` with the ledger of page `gfn`, which is held meanwhile, and the page's place in it; nothing if the
    /// machine has no such page.
    fn in_chunk<T>(&self, gfn: u64, act: impl FnOnce(&mut ChunkLedger, usize) -> T) -> Option<T> {
        let (number, page) = (gfn / CHUNK_PAGES as u64, gfn % CHUNK_PAGES as u64);
        let mut chunk = self.chunk(number, gfn)?.lock().unwrap_or_else(PoisonError::into_inner);
        Some(act(chunk.get_or_insert_with(Box::default), usize::try_from(page).unwrap_or(0)))
    }

    /// Ends installing: returns when no page is being written, and none will be again.
    pub(crate) fn close(&self) {
        *self.stage.write().unwrap_or_else(PoisonError::into_inner) = Stage::Closed;
    }

    /// Gives back what is here of `stale`, of a machine that does not run yet: newer copies come later.
    pub(crate) fn clear(&self, stale: &PageSet) -> Result<(), MemoryError> {
        let stage = self.stage.read().unwrap_or_else(PoisonError::into_inner);
        let Stage::Filling(_) = &*stage else { return Ok(()) };
        let mut here = self.view.resident()?;
        here.intersect_with(stale);
        self.view.discard_all(&here)
    }

    /// From now on pages come on demand: those of `owed`, and no others, in rounds after `after`. See [`Pager::start`].
    /// Faults are read on `runtime`.
    pub(crate) fn page(
        self: &Arc<Self>,
        runtime: &Handle,
        (owed, after): (PageSet, u32),
        notify: impl Fn(Notice) + Send + Sync + 'static,
    ) -> Result<(), MemoryError> {
        let mut stage = self.stage.write().unwrap_or_else(PoisonError::into_inner);
        // The memory can be watched by one only.
        *stage = Stage::Closed;
        let (pager, faults) = match self.view.away() {
            Some(away) => kept::start(self, &away, owed, notify)?,
            None => Pager::start(&self.view, owed, notify)?,
        };
        let _context = runtime.enter();
        let faults = faults_fd(faults).map_err(|source| MemoryError::Userfault { source })?;
        let faults = Reader(runtime.spawn(read_faults(faults)).abort_handle());
        *stage = Stage::Paging { pager, after, _faults: faults };
        Ok(())
    }

    /// Ends paging: memory is plain from here on.
    pub(crate) fn drain(&self) {
        let mut stage = self.stage.write().unwrap_or_else(PoisonError::into_inner);
        if let Stage::Paging { .. } = *stage {
            *stage = Stage::Drained;
        }
    }

    /// Whether pages come on demand, and not all are here.
    pub(crate) fn is_paging(&self) -> bool {
        self.pager(|_| ()).is_some()
    }

    /// Pages that the source owes, and those of them that threads wait for; nothing where there is no pager.
    pub(crate) fn missing(&self) -> Option<(PageSet, Vec<u64>)> {
        let (mut missing, mut waited) =
            self.pager(|pager| (pager.missing(), pager.outstanding()))?;
        if let Some(kept) = self.view.away().map(|away| away.pages()) {
            missing.subtract(&kept);
            waited.retain(|gfn| !kept.contains(*gfn));
        }
        Some((missing, waited))
    }

    /// Calls `ask` with the pager, where there is one.
    pub(crate) fn pager<T>(&self, ask: impl FnOnce(&Pager) -> T) -> Option<T> {
        match &*self.stage.read().unwrap_or_else(PoisonError::into_inner) {
            Stage::Paging { pager, .. } => Some(ask(pager)),
            Stage::Filling(_) | Stage::Drained | Stage::Closed => None,
        }
    }

    /// Installs the pages of `batch` that are not late.
    pub(crate) fn install(&self, batch: &Batch<'_>) -> Result<Installed, MemoryError> {
        let stage = self.stage.read().unwrap_or_else(PoisonError::into_inner);
        let filler = match &*stage {
            Stage::Filling(filler) => filler,
            // A frame of a round before the hand-over: its pages have changed since.
            Stage::Paging { after, .. } if batch.round <= *after => return Ok(Installed::Paged),
            Stage::Paging { pager, .. } => {
                return self.place(pager, batch).map(|()| Installed::Paged);
            }
            Stage::Drained => return Ok(Installed::Paged),
            Stage::Closed => return Ok(Installed::Closed),
        };
        if batch.codec == Codec::Packed
            && let Some(away) = self.view.away()
        {
            return self.keep(away.as_ref(), filler, batch).map(|()| Installed::Filled);
        }
        let mut digests = batch.digests;
        for (run, mut bytes) in batch.run_bytes() {
            for (number, first, part) in by_chunk(run) {
                let Some(chunk) = self.chunk(number, part.start) else { continue };
                let mut chunk = chunk.lock().unwrap_or_else(PoisonError::into_inner);
                let ledger = chunk.get_or_insert_with(Box::default);
                if batch.codec == Codec::Zero {
                    self.install_zeros(ledger, first, part, batch.round)?;
                } else {
                    // A run has its bytes and digests: the decoder saw to it.
                    let pages = usize::try_from(part.pages).unwrap_or(0);
                    let (these, rest) = bytes.split_at(pages * PAGE_BYTES);
                    let (of_these, later) = digests.split_at(pages);
                    (bytes, digests) = (rest, later);
                    self.install_data(filler, ledger, (first, part), batch.round, these, of_these)?;
                }
            }
        }
        Ok(Installed::Filled)
    }

    /// Places what is owed of `batch`, and notes the digests of what was.
    fn place(&self, pager: &Pager, batch: &Batch<'_>) -> Result<(), MemoryError> {
        let mut digests = batch.digests;
        for (run, bytes) in batch.run_bytes() {
            let note = |gfn: u64, digest: u64| {
                self.in_chunk(gfn, |ledger, page| ledger.admit(page, batch.round, digest));
            };
            if batch.codec == Codec::Zero {
                pager.install_zeros(run, |gfn| note(gfn, 0))?;
            } else {
                let (these, rest) = digests.split_at(usize::try_from(run.pages).unwrap_or(0));
                digests = rest;
                pager.install(run.start, bytes, |gfn| {
                    let at = usize::try_from(gfn - run.start).unwrap_or(0);
                    note(gfn, these[at]);
                })?;
            }
        }
        Ok(())
    }

    /// Keeps the pages of `batch`, which came packed, as they are: the source had them elsewhere than in memory,
    /// too. Where there is no room for one, it is written to memory.
    fn keep(&self, away: &dyn Away, filler: &Filler, batch: &Batch<'_>) -> Result<(), MemoryError> {
        let (pages, _) = batch.raw.as_chunks::<PAGE_BYTES>();
        for (page, raw) in batch.packed().zip(pages) {
            let kept = self.in_chunk(page.gfn, |ledger, at| {
                match ledger.admit(at, batch.round, page.digest) {
                    Admission::Late => return Ok(()),
                    Admission::OverZeros => {}
                    Admission::OverData => self.view.discard(Run::new(page.gfn, 1))?,
                }
                if away.keep(&page) { Ok(()) } else { filler.fill(page.gfn, raw) }
            });
            kept.unwrap_or(Ok(()))?;
        }
        Ok(())
    }

    fn install_zeros(
        &self,
        ledger: &mut ChunkLedger,
        first: usize,
        part: Run,
        round: u32,
    ) -> Result<(), MemoryError> {
        for (page, gfn) in (first..).zip(part.start..part.end()) {
            // Zero over untouched memory stays untouched, and what was there is given back, where a page can be.
            if ledger.admit(page, round, 0) == Admission::OverData {
                match self.view.regions().iter().any(|r| r.unit > 1) {
                    true => self.view.write(gfn, &ZERO_PAGE)?,
                    false => self.view.discard(Run::new(gfn, 1))?,
                }
            }
        }
        Ok(())
    }

    /// Copies what is not late, in stretches as long as can be: a fault for each page would cost more
    /// than all else that is done for it here.
    fn install_data(
        &self,
        filler: &Filler,
        ledger: &mut ChunkLedger,
        (first, part): (usize, Run),
        round: u32,
        bytes: &[u8],
        digests: &[u64],
    ) -> Result<(), MemoryError> {
        // What came before may be kept elsewhere: a plain write would wait for its page.
        let away = self.view.away().is_some();
        let mut at = 0;
        while at < digests.len() {
            let (begin, mut untouched) = (at, away);
            while let Some(digest) = digests.get(at) {
                match ledger.admit(first + at, round, *digest) {
                    Admission::Late => break,
                    Admission::OverZeros => untouched = true,
                    Admission::OverData => {}
                }
                at += 1;
            }
            if at > begin {
                let (gfn, pages) =
                    (part.start + begin as u64, &bytes[begin * PAGE_BYTES..at * PAGE_BYTES]);
                if untouched { filler.fill(gfn, pages) } else { self.view.write(gfn, pages) }?;
            }
            // The late one.
            at += 1;
        }
        Ok(())
    }

    /// Pages that are here from rounds after `round`.
    pub(crate) fn held(&self, round: u32) -> PageSet {
        let mut pages = PageSet::new();
        for (extent, first, before) in &self.extents {
            let chunks = self.chunks[*before..].iter().zip(*first..);
            for (chunk, number) in
                chunks.take_while(|(_, n)| n * (CHUNK_PAGES as u64) < extent.end())
            {
                let chunk = chunk.lock().unwrap_or_else(PoisonError::into_inner);
                for page in chunk.iter().flat_map(|ledger| ledger.newer_than(round)) {
                    pages.insert(number * CHUNK_PAGES as u64 + page as u64);
                }
            }
        }
        pages
    }

    /// Wrapping sum of the digests of all pages as installed.
    pub(crate) fn digest_sum(&self) -> u64 {
        self.chunks.iter().fold(0, |sum, chunk| {
            let chunk = chunk.lock().unwrap_or_else(PoisonError::into_inner);
            sum.wrapping_add(chunk.as_ref().map_or(0, |c| c.digest_sum()))
        })
    }
}
