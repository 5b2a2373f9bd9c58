//! Bringing pages back: when they are touched, and those behind them in a row.

use std::collections::HashMap;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::sync::{Arc, MutexGuard, PoisonError, TryLockError};
use std::time::{Duration, Instant};

use ferry_codec::{Codec, PackedPage, Packer, page_digest};
use ferry_dirtylog::DirtySource;
use ferry_memory::{Away, MemoryError, Stay, Touch};
use ferry_pager::hurry;
use ferry_pages::{PAGE_BYTES, PageSet, Run};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::{read, write};

use crate::file::{SwapFile, page_buffer};
use crate::pool::{Filed, Found};
use crate::state::State;
use crate::swap::{Handle, Inner};
use crate::track::SwapTracker;

/// A file that could not be read is tried again after this.
const TRY_AGAIN: Duration = Duration::from_secs(1);
/// Pages brought along at most when they are touched in a row.
const LONGEST_ROW: u64 = 16;

/// Pages mapped as zeros at most where memory is touched for the first time.
const AHEAD: u64 = 64;

/// Who touches memory while none can be freed waits for no longer than this.
const HELD_BACK: Duration = Duration::from_millis(100);

/// What trouble with a page begins with.
const PAGE: &str = "page ";

const ZEROS: [u8; PAGE_BYTES] = [0; PAGE_BYTES];

/// What became of a page that is to be brought back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Brought {
    /// It is there, or will be soon.
    Back,
    /// The file must be read.
    Filed(Filed),
    /// It cannot be placed now.
    Later,
}

impl Inner {
    /// Reads faults until the end.
    pub(crate) fn serve_faults(&self) {
        hurry();
        let Some(serving) = self.serving.get() else { return };
        let mut touches = Vec::new();
        loop {
            let fd = serving.missing.fd();
            let mut fds =
                [PollFd::new(&fd, PollFlags::IN), PollFd::new(&serving.bell, PollFlags::IN)];
            let soon = Timespec { tv_sec: 0, tv_nsec: 10_000_000 };
            // Interrupted or not, what is there is read.
            let _ = poll(&mut fds, (!self.later().is_empty()).then_some(&soon));
            if self.is_ending() {
                return;
            }
            if fds[1].revents().contains(PollFlags::IN) {
                let _ = read(&serving.bell, &mut [0; 8]);
            }
            touches.clear();
            if let Err(e) = serving.missing.read(&mut touches) {
                self.state().trouble(format!("touches of pages cannot be read: {e}"));
                std::thread::sleep(TRY_AGAIN);
                continue;
            }
            let read = Instant::now();
            let mut last = None;
            let again = std::mem::take(&mut *self.later());
            for (gfn, write) in again {
                self.answer(gfn, write, read);
            }
            for touch in &touches {
                // Removals are not told in this mode.
                let Touch::Fault { gfn, write, .. } = *touch else { continue };
                if self.answer(gfn, write, read) {
                    last = Some(gfn);
                }
            }
            if let Some(gfn) = last {
                self.bring_row(gfn);
            }
            self.relieve();
        }
    }

    fn later(&self) -> MutexGuard<'_, Vec<(u64, bool)>> {
        self.later.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Somebody waits for page `gfn`: brings it, now, from the file, or when it can be had. Whether it is there.
    pub(crate) fn answer(&self, gfn: u64, wants_to_write: bool, since: Instant) -> bool {
        let Some(serving) = self.serving.get() else { return false };
        let brought = self.bring(gfn, wants_to_write, since);
        let is_read = || matches!(brought, Brought::Filed(_)) && serving.reads.send(gfn).is_ok();
        if brought != Brought::Back && !is_read() {
            self.later().push((gfn, wants_to_write));
            // The thread that reads faults tries again.
            let _ = write(&serving.bell, &1u64.to_ne_bytes());
        }
        brought == Brought::Back
    }

    fn bring(&self, gfn: u64, write: bool, since: Instant) -> Brought {
        let mut state = self.state();
        if let Some(wanted) = state.transit.get_mut(&gfn) {
            *wanted = true;
            return Brought::Back;
        }
        match self.restore(&mut state, gfn) {
            Ok(Some(Brought::Back)) => {
                state.figures.pages_in += 1;
                state.pool_waits.saturating_record(nanos(since));
                Brought::Back
            }
            Ok(Some(filed)) => filed,
            Ok(None) => {
                let placed = match write {
                    // The shared page of zeros would be replaced at once.
                    true => self.place(gfn, &ZEROS),
                    false => self.place_zeros(gfn),
                };
                state.figures.first_touches += 1;
                // What is read is written soon after, mostly, and of that nobody is told.
                state.have_come(1);
                if write {
                    self.map_ahead(&mut state, gfn);
                }
                self.or_later(&mut state, gfn, placed)
            }
            Err(e) => self.or_later(&mut state, gfn, Err(e)),
        }
    }

    fn or_later(&self, state: &mut State, gfn: u64, placed: Result<bool, MemoryError>) -> Brought {
        match placed {
            Ok(true) => Brought::Back,
            Ok(false) => Brought::Later,
            Err(e) => {
                state
                    .trouble(format!("page {gfn:#x} cannot be given to the guest, who waits: {e}"));
                Brought::Later
            }
        }
    }

    /// Whether the page is there now.
    pub(crate) fn place(&self, gfn: u64, page: &[u8]) -> Result<bool, MemoryError> {
        let Some(serving) = self.serving.get() else { return Ok(false) };
        serving.missing.place(gfn, page).map(|placed| !placed.again)
    }

    fn place_zeros(&self, gfn: u64) -> Result<bool, MemoryError> {
        let Some(serving) = self.serving.get() else { return Ok(false) };
        serving.missing.place_zeros(Run::new(gfn, 1)).map(|placed| !placed.again)
    }

    /// Brings page `gfn` back from the pool; none if it is not away.
    fn restore(&self, state: &mut State, gfn: u64) -> Result<Option<Brought>, MemoryError> {
        let mut page = [0; PAGE_BYTES];
        let State { pool, packer, .. } = state;
        let kept = match pool.find(gfn) {
            None => return Ok(None),
            Some(Found::Filed(filed)) => return Ok(Some(Brought::Filed(filed))),
            Some(Found::Here(kept)) => kept,
        };
        let PackedPage { codec, bytes, digest, .. } = kept;
        unpack(packer, codec, bytes, (gfn, digest), &mut page)?;
        let back = self.give_back(state, gfn, &page)?;
        Ok(Some(if back { Brought::Back } else { Brought::Later }))
    }

    /// Places `page`, the content of page `gfn`, which is away no more then; whether it could be.
    fn give_back(&self, state: &mut State, gfn: u64, page: &[u8]) -> Result<bool, MemoryError> {
        let placed = self.place(gfn, page)?;
        if placed {
            state.pool.remove(gfn);
            state.is_back(gfn);
        }
        Ok(placed)
    }

    /// Memory is touched for the first time mostly in a row: spares the touches that come next a wait, as long as the
    /// limit is far. A page of zeros takes no memory; those that are mapped count as if they were written, until all
    /// are counted again.
    fn map_ahead(&self, state: &mut State, gfn: u64) {
        let room = state.limit_pages.unwrap_or(u64::MAX).saturating_sub(state.used());
        let (Some(serving), true) = (self.serving.get(), room > 8 * AHEAD) else { return };
        // Shared memory has no page of zeros that takes none.
        let Some(region) = self.region_of(gfn).filter(|r| r.backing.is_none()) else { return };
        let ahead = Run::new(gfn + 1, AHEAD.min(region.run.end() - gfn - 1));
        let away = state.pool.pages().runs_in(ahead).next().map(|run| run.start);
        let leaving =
            state.transit.keys().copied().filter(|gfn| ahead.start <= *gfn && *gfn < ahead.end());
        let end = away.into_iter().chain(leaving).min().unwrap_or(ahead.end());
        if end > ahead.start {
            serving.missing.map_zeros(Run::new(ahead.start, end - ahead.start));
            state.have_come(end - ahead.start);
        }
    }

    /// Pages are touched one after the other: brings those that come next.
    fn bring_row(&self, gfn: u64) {
        let mut state = self.state();
        let (last, length) = state.row;
        let follows = gfn > last && gfn - last <= length + 1;
        let length = if follows { (length * 2).clamp(1, LONGEST_ROW) } else { 0 };
        state.row = (gfn + length, length);
        for next in gfn + 1..=gfn + length {
            if state.transit.contains_key(&next) || state.excess() > 0 {
                continue;
            }
            if matches!(self.restore(&mut state, next), Ok(Some(Brought::Back))) {
                state.figures.prefetched += 1;
            }
        }
    }

    /// Reads pages that are wanted from the file, until the end.
    pub(crate) fn read_file(&self, wanted: &Receiver<u64>) {
        hurry();
        let (Some(file), Ok(mut buffer)) = (&self.file, page_buffer()) else {
            return self.state().trouble("no memory to read the swap file by".into());
        };
        let mut failed: HashMap<u64, Instant> = HashMap::new();
        loop {
            let (gfn, since) = match wanted.recv_timeout(TRY_AGAIN) {
                Ok(gfn) => (gfn, Instant::now()),
                Err(RecvTimeoutError::Timeout) => (u64::MAX, Instant::now()),
                Err(RecvTimeoutError::Disconnected) => return,
            };
            if self.is_ending() {
                return;
            }
            let due =
                failed.iter().filter(|(_, at)| at.elapsed() >= TRY_AGAIN).map(|(gfn, _)| *gfn);
            let due: Vec<u64> = due.collect();
            for gfn in due.into_iter().chain((gfn != u64::MAX).then_some(gfn)) {
                failed.remove(&gfn);
                if let Err(why) = self.bring_filed(gfn, file, &mut buffer, since) {
                    self.state().trouble(why);
                    failed.insert(gfn, Instant::now());
                }
            }
            if failed.is_empty() {
                self.relieve();
            }
        }
    }

    fn bring_filed(
        &self,
        gfn: u64,
        file: &SwapFile,
        buffer: &mut [u8],
        since: Instant,
    ) -> Result<(), String> {
        // While it is read, its segment may be moved or its page overwritten: then once more.
        loop {
            let filed = match self.bring(gfn, true, since) {
                Brought::Back => return Ok(()),
                Brought::Later => {
                    return Err(format!("page {gfn:#x} cannot be given to the guest"));
                }
                Brought::Filed(filed) => filed,
            };
            let read = file.read(filed.place, buffer);
            let mut state = self.state();
            if !state.pool.is_still(gfn, filed) || state.transit.contains_key(&gfn) {
                continue;
            }
            let words = |why: String| {
                format!(
                    "page {gfn:#x} cannot be read from the swap file, and the guest waits for it: {why}; stop the \
                     machine if it cannot be mended"
                )
            };
            let bytes = read.map_err(|e| words(e.to_string()))?;
            let mut page = [0; PAGE_BYTES];
            let of = (gfn, filed.digest);
            unpack(&mut state.packer, filed.codec, bytes, of, &mut page)
                .map_err(|e| words(e.to_string()))?;
            match self.give_back(&mut state, gfn, &page) {
                Ok(true) => {}
                Ok(false) => return Err(words("memory is being given back".into())),
                Err(e) => return Err(words(e.to_string())),
            }
            state.figures.pages_in += 1;
            state.file_waits.saturating_record(nanos(since));
            // If another one cannot be read, that is said again.
            state.over(PAGE);
            return Ok(());
        }
    }
}

fn nanos(since: Instant) -> u64 {
    u64::try_from(since.elapsed().as_nanos()).unwrap_or(u64::MAX)
}

/// Fills `page` from what is kept of `gfn`, if that is what it was.
fn unpack(
    packer: &mut Packer,
    codec: Codec,
    bytes: &[u8],
    (gfn, digest): (u64, u64),
    page: &mut [u8],
) -> Result<(), MemoryError> {
    let unpacked = packer.unpack(codec, bytes, page);
    let unpacked = unpacked.and_then(|()| match page_digest(gfn, page) == digest {
        true => Ok(()),
        false => Err("what is there is not what was written".into()),
    });
    unpacked.map_err(|why| MemoryError::Away { gfn, why })
}

impl Away for Handle {
    fn stay(&self) -> Stay<'_> {
        self.0.stay.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn pages(&self) -> PageSet {
        self.0.state().pool.pages().clone()
    }

    fn has(&self, gfn: u64) -> bool {
        self.0.state().pool.pages().contains(gfn)
    }

    fn read(&self, gfn: u64, page: &mut [u8]) -> Result<bool, MemoryError> {
        {
            let State { pool, packer, .. } = &mut *self.0.state();
            match pool.find(gfn) {
                None => return Ok(false),
                Some(Found::Here(kept)) => {
                    let of = (gfn, kept.digest);
                    return unpack(packer, kept.codec, kept.bytes, of, page).map(|()| true);
                }
                Some(Found::Filed(_)) => {}
            }
        }
        let (mut unpacked, mut packer) = (Ok(()), Packer::default());
        let is_away = self.packed(gfn, &mut |kept| {
            unpacked = unpack(&mut packer, kept.codec, kept.bytes, (gfn, kept.digest), page);
        })?;
        unpacked.map(|()| is_away)
    }

    fn packed(&self, gfn: u64, take: &mut dyn FnMut(&PackedPage<'_>)) -> Result<bool, MemoryError> {
        let fail = |why: String| MemoryError::Away { gfn, why };
        loop {
            let filed = match self.0.state().pool.find(gfn) {
                None => return Ok(false),
                Some(Found::Here(kept)) => {
                    take(&kept);
                    return Ok(true);
                }
                Some(Found::Filed(filed)) => filed,
            };
            let Some(file) = &self.0.file else { return Err(fail("there is no file".into())) };
            let mut buffer = page_buffer().map_err(|e| fail(e.to_string()))?;
            let read = file.read(filed.place, &mut buffer);
            // It may have been moved, or come back.
            if !self.0.state().pool.is_still(gfn, filed) {
                continue;
            }
            let bytes = read.map_err(|e| fail(format!("swap file: {e}")))?;
            take(&PackedPage { gfn, codec: filed.codec, bytes, digest: filed.digest });
            return Ok(true);
        }
    }

    fn keep(&self, page: &PackedPage<'_>) -> bool {
        self.0.state().pool.keep(page)
    }

    fn forget(&self, run: Run) {
        self.0.state().pool.forget(run);
    }

    fn serve(&self) -> Result<(), MemoryError> {
        if self.0.state().pool.pages().is_empty() {
            return Ok(());
        }
        Inner::serve(&self.0).map_err(|e| match e {
            crate::SwapError::Memory(e) => e,
            e => MemoryError::Away { gfn: 0, why: e.to_string() },
        })
    }

    fn tracker(&self) -> Option<Box<dyn DirtySource>> {
        self.0.serving.get()?;
        SwapTracker::new(Arc::clone(&self.0)).map(|tracker| Box::new(tracker) as _)
    }
}

impl Inner {
    /// Moves a few pages out where the limit is passed, in the thread that brought others in: who touches memory
    /// faster than it can be freed waits for it.
    pub(crate) fn relieve(&self) {
        let since = Instant::now();
        while self.is_over() && since.elapsed() < HELD_BACK && !self.ending.load(Ordering::Relaxed)
        {
            if let Ok(_moving) = self.stay.try_write() {
                if self.move_out_some() {
                    return;
                }
            } else if let Err(TryLockError::WouldBlock) = self.aside.try_lock() {
                // The thread that moves pages out is at it: that is as good, and it waits for nobody.
                drop(self.aside.lock());
                return;
            } else {
                // Whoever copies from memory now waits perhaps for this very thread.
                return;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Whether the limit is passed, and something can be done about it. Where it is near, that is begun.
    fn is_over(&self) -> bool {
        let state = self.state();
        if state.surplus() > 0 {
            self.wanted.notify_all();
        }
        let hopeless = state.stuck.is_some_and(|at| at.elapsed() < TRY_AGAIN / 10);
        state.excess() > 0 && (!hopeless || state.file_makes_room(self.file.is_some()))
    }
}
