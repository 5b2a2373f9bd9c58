//! Moving pages out: which, when, and from the pool to the file.

use std::sync::PoisonError;
use std::time::{Duration, Instant};

use ferry_codec::{PackedPage, Packer, is_zero, page_digest};
use ferry_dirtylog::{DirtySource, UffdWriteProtect};
use ferry_memory::{Aside, MemoryError, Moved};
use ferry_pages::{PAGE_BYTES, PageSet};
use memmap2::MmapMut;

use crate::file::{SwapFile, buffer};
use crate::swap::{Inner, State};

/// Pages moved out together: who touches one of them waits for no more than these.
pub(crate) const BATCH: usize = 32;
/// Victims chosen at a time.
const CHOSEN: usize = 2048;
/// Cold pages that are moved out at each look to see whether they are read.
const PROBES: usize = 64;
/// How often memory is looked at, at most and at least.
const SHORTEST_LOOK: Duration = Duration::from_secs(1);
const LONGEST_LOOK: Duration = Duration::from_secs(30);
/// What a look costs the guest for each page that it writes again: it is to lose no more than a fiftieth of its time.
const COST_OF_LOOK: Duration = Duration::from_micros(10 * 50);
/// What trouble with it begins with.
pub(crate) const FILE: &str = "the swap file";
const POOL: &str = "the swap pool";
/// How long until what could not be done is tried again.
const PAUSE: Duration = Duration::from_millis(100);

impl Inner {
    /// Looks at memory, and moves pages out where the limit is passed, until the end.
    pub(crate) fn move_out(&self) {
        let mut tracker = UffdWriteProtect::registered(self.memory.regions().to_vec())
            .map_err(|e| self.state().trouble(format!("writes cannot be tracked: {e}")))
            .ok();
        let mut buffers = Buffers::new(self.file.is_some());
        let (mut next_look, mut is_tracking) = (Instant::now(), false);
        let mut count_again = Instant::now();
        while !self.is_ending() {
            if Instant::now() >= next_look {
                let (wait, tracking) = self.look(tracker.as_mut(), is_tracking);
                is_tracking = tracking;
                next_look = Instant::now() + wait;
            }
            if count_again.elapsed() >= PAUSE {
                count_again = Instant::now();
                // It stays as it was counted last.
                let _ = self.count();
            }
            let mut stuck = false;
            if self.state().surplus() > 0 {
                let _moving = self.stay.write().unwrap_or_else(PoisonError::into_inner);
                stuck = self.move_out_some() == 0;
            }
            match &mut buffers {
                Ok(buffers) => match self.write_back(buffers) {
                    Some(0) => {}
                    Some(_) => stuck = false,
                    None => stuck = true,
                },
                Err(e) => self.state().trouble(format!("no memory to write the swap file by: {e}")),
            }
            let state = self.state();
            if (state.surplus() == 0 || stuck) && !self.is_ending() {
                let until = next_look.saturating_duration_since(Instant::now()).min(PAUSE);
                drop(self.wanted.wait_timeout(state, until));
            }
        }
    }

    /// Finds out what was written since the last look; when the next is due.
    fn look(&self, tracker: Option<&mut UffdWriteProtect>, was_tracking: bool) -> (Duration, bool) {
        let Some(tracker) = tracker else { return (LONGEST_LOOK, false) };
        // A migration tracks by the same marks: it tells what it finds.
        if self.state().suspects.is_some() {
            return (SHORTEST_LOOK, true);
        }
        let mut written = PageSet::new();
        if let Err(e) = tracker.collect(&mut written) {
            self.state().trouble(format!("writes cannot be tracked: {e}"));
            return (LONGEST_LOOK, false);
        }
        let Ok(resident) = self.count() else { return (LONGEST_LOOK, false) };
        let mut state = self.state();
        if !was_tracking {
            state.ages.look(&written);
        }
        self.probe(&mut state, &resident);
        drop(state);
        for _ in 0..PROBES / BATCH {
            let _moving = self.stay.write().unwrap_or_else(PoisonError::into_inner);
            if !self.state().probes.is_empty() {
                self.move_out_some();
            }
        }
        let wait = COST_OF_LOOK.saturating_mul(u32::try_from(written.len()).unwrap_or(u32::MAX));
        (wait.clamp(SHORTEST_LOOK, LONGEST_LOOK), false)
    }

    /// Counts the pages in memory. Those that come while they are counted are added: never too few are known of.
    fn count(&self) -> Result<PageSet, MemoryError> {
        let before = self.state().came;
        let resident = self.memory.resident()?;
        let mut state = self.state();
        state.resident = resident.len() + state.came.saturating_sub(before);
        Ok(resident)
    }

    /// Estimates what share of memory is in use: what was written, and of the rest the share of probes that came
    /// back.
    fn probe(&self, state: &mut State, resident: &PageSet) {
        let young = state.ages.young(resident);
        let probes = std::mem::take(&mut state.probes);
        let back = probes.iter().filter(|gfn| !state.pool.pages().contains(**gfn)).count();
        let read = if probes.is_empty() { 1.0 } else { back as f64 / probes.len() as f64 };
        let all = resident.len() + state.pool.holds().pages;
        if all > 0 {
            let cold = resident.len().saturating_sub(young) as f64;
            state.figures.active = (young as f64 + read * cold) / all as f64;
        }
        if state.limit_pages.is_none() {
            return;
        }
        let chosen = state.ages.coldest(resident, CHOSEN, false);
        let step = (chosen.len() / PROBES).max(1);
        state.probes = chosen.iter().step_by(step).take(PROBES).copied().collect();
        for gfn in state.probes.iter().rev() {
            state.victims.push_front(*gfn);
        }
    }

    /// Moves out a batch of pages, if there are any; how many went. Whoever calls it holds `stay` for writing.
    pub(crate) fn move_out_some(&self) -> usize {
        let aside = &mut *self.aside.lock().unwrap_or_else(PoisonError::into_inner);
        let (aside, packer) = (&aside.0, &mut aside.1);
        let victims = self.victims();
        let mut moved = Vec::new();
        for gfn in &victims {
            let region =
                self.memory.regions().iter().find(|r| r.run.start <= *gfn && *gfn < r.run.end());
            let Some(region) = region else { continue };
            match aside.take(region, *gfn, moved.len() as u64) {
                Ok(Moved::Yes) => moved.push(*gfn),
                Ok(Moved::Absent | Moved::Busy) => self.give_up(*gfn),
                Err(e) => {
                    self.state().trouble(format!("{e}"));
                    self.give_up(*gfn);
                }
            }
        }
        let mut gone = 0;
        let mut page = [0; PAGE_BYTES];
        for (slot, gfn) in (0..).zip(&moved) {
            gone += usize::from(self.put_away(*gfn, slot, aside, packer, &mut page));
        }
        if let Err(e) = aside.clear(moved.len() as u64) {
            self.state().trouble(format!("pages that were moved out still take memory: {e}"));
        }
        self.state().stuck = (gone == 0).then(Instant::now);
        gone
    }

    /// The next pages to be moved out, on their way from here on.
    fn victims(&self) -> Vec<u64> {
        if self.state().victims.is_empty() {
            let Ok(resident) = self.memory.resident() else { return Vec::new() };
            let mut state = self.state();
            let mut chosen = state.ages.coldest(&resident, CHOSEN, false);
            if chosen.is_empty() {
                // Nothing is cold, and yet the limit is one.
                chosen = state.ages.coldest(&resident, CHOSEN / 8, true);
            }
            state.victims.extend(chosen);
        }
        let mut state = self.state();
        let count = state.victims.len().min(BATCH);
        let mut victims: Vec<u64> = state.victims.drain(..count).collect();
        victims.retain(|gfn| !state.is_recent(*gfn));
        let State { transit, suspects, pool, .. } = &mut *state;
        let mut leaving = Vec::new();
        for gfn in victims {
            if pool.pages().contains(gfn) || transit.contains_key(&gfn) {
                continue;
            }
            transit.insert(gfn, false);
            if let Some(suspects) = suspects {
                suspects.insert(gfn);
            }
            leaving.push(gfn);
        }
        leaving
    }

    /// Page `gfn` was not moved out.
    fn give_up(&self, gfn: u64) {
        let wanted = self.state().transit.remove(&gfn) == Some(true);
        if wanted {
            self.bring(gfn, true, Instant::now());
        }
    }

    /// Puts the page in `slot` into the pool, or back; whether it went.
    fn put_away(
        &self,
        gfn: u64,
        slot: u64,
        aside: &Aside,
        packer: &mut Packer,
        page: &mut [u8; PAGE_BYTES],
    ) -> bool {
        if let Err(e) = aside.read(slot, page) {
            // It cannot be: the slot is there.
            self.state().trouble(format!("page {gfn:#x}: {e}"));
        }
        let zero = is_zero(page);
        let digest = page_digest(gfn, page);
        let (codec, bytes) = packer.pack(page);
        let mut state = self.state();
        let wanted = state.transit.get(&gfn) == Some(&true);
        let kept = !wanted && (zero || state.pool.keep(&PackedPage { gfn, codec, bytes, digest }));
        if kept {
            state.figures.pages_out += 1;
            state.over(POOL);
            state.figures.zero_pages += u64::from(zero);
            state.resident = state.resident.saturating_sub(1);
        } else {
            // With a file, there is room again soon, or that is told.
            if !wanted && self.file.is_none() {
                state.trouble(format!(
                    "{POOL} is full, and pages stay in memory: give the machine more swap, or a higher limit"
                ));
            }
            // The only copy: it must go back.
            while let Err(e) = self.place(gfn, page) {
                // Nobody watches the memory any more: what is away is gone with this, too.
                if self.is_ending() {
                    break;
                }
                state.trouble(format!("page {gfn:#x} cannot be put back: {e}"));
                std::thread::sleep(PAUSE);
            }
        }
        state.transit.remove(&gfn);
        kept
    }
}

/// What segments are written and read by.
struct Buffers {
    out: MmapMut,
    back: MmapMut,
}

impl Buffers {
    /// None where there is no file.
    fn new(file: bool) -> std::io::Result<Option<Self>> {
        if !file {
            return Ok(None);
        }
        Ok(Some(Self { out: buffer()?, back: buffer()? }))
    }
}

impl Inner {
    /// Writes the oldest pages of the pool to the file until an eighth of the pool is free; how many segments that
    /// were, none if it cannot be done now.
    fn write_back(&self, buffers: &mut Option<Buffers>) -> Option<u32> {
        let mut wrote = 0;
        let (Some(file), Some(buffers)) = (&self.file, buffers) else { return Some(0) };
        while !self.is_ending() {
            let taken = {
                let mut state = self.state();
                if !state.pool.is_nearly_full() {
                    return Some(wrote);
                }
                // The last one is for `compact`.
                match state.pool.segments.free() {
                    0 | 1 => None,
                    _ => state.pool.segments.take(),
                }
            };
            let Some(segment) = taken else {
                if self.compact(file, buffers) {
                    continue;
                }
                self.state()
                    .trouble(format!("{FILE} is full: what the pool cannot take stays in memory"));
                return None;
            };
            let leaving = self.state().pool.take_oldest(segment, &mut buffers.out);
            let written = file.write(segment, &buffers.out);
            let mut state = self.state();
            match written {
                Ok(()) => state.pool.are_filed(&leaving),
                Err(_) => state.pool.stay(&leaving),
            }
            state.pool.segments.settle(segment);
            if let Err(e) = written {
                state.trouble(format!(
                    "{FILE} cannot be written, and its pages stay in the pool: {e}"
                ));
                return None;
            }
            state.over(FILE);
            if leaving.is_empty() {
                return Some(wrote);
            }
            wrote += 1;
        }
        Some(wrote)
    }

    /// Writes what is of use in two segments to a third; whether one became free.
    fn compact(&self, file: &SwapFile, buffers: &mut Buffers) -> bool {
        let Some(to) = self.state().pool.segments.take() else { return false };
        let (mut moving, mut at) = (Vec::new(), 0);
        let emptiest = self.state().pool.segments.emptiest_two();
        for from in &emptiest {
            if let Err(e) = file.read_segment(*from, &mut buffers.back) {
                self.state().trouble(format!("{FILE} cannot be read: {e}"));
                continue;
            }
            let (more, end) =
                self.state().pool.move_blobs(*from, &buffers.back, (to, &mut buffers.out, at));
            moving.extend(more);
            at = end;
        }
        let written = moving.is_empty() || file.write(to, &buffers.out).is_ok();
        let mut state = self.state();
        let before = state.pool.segments.free();
        if written {
            state.pool.are_moved(&moving);
        }
        state.pool.segments.settle(to);
        // The one that it took, and another.
        state.pool.segments.free() > before + usize::from(moving.is_empty())
    }
}
