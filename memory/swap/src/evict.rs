//! Moving pages out of memory: which, and when.

use std::sync::PoisonError;
use std::time::{Duration, Instant};

use ferry_codec::{PackedPage, Packer, is_zero, page_digest};
use ferry_dirtylog::{DirtySource, UffdWriteProtect};
use ferry_memory::{MemoryError, Moved};
use ferry_pages::{PAGE_BYTES, PageSet, Run};

use crate::state::State;
use crate::swap::Inner;
use crate::write_back::Buffers;

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
const POOL: &str = "the swap pool";
/// How long until a page is placed again that could not be.
const AGAIN: Duration = Duration::from_millis(1);
/// How long until what could not be done is tried again.
const PAUSE: Duration = Duration::from_millis(100);

impl Inner {
    /// Looks at memory, and moves pages out where the limit is passed, until the end.
    pub(crate) fn move_out(&self) {
        let mut tracker = UffdWriteProtect::registered(self.memory.regions().to_vec())
            .map_err(|e| self.state().trouble(format!("writes cannot be tracked: {e}")))
            .ok();
        let mut buffers = Buffers::new(self.file.is_some());
        let mut next_look = Instant::now();
        let mut count_again = Instant::now();
        while !self.is_ending() {
            if Instant::now() >= next_look {
                next_look = Instant::now() + self.look(tracker.as_mut());
            }
            if count_again.elapsed() >= PAUSE {
                count_again = Instant::now();
                // It stays as it was counted last.
                let _ = self.count();
            }
            let mut stuck = false;
            if !self.state().zeros.is_empty() {
                let _moving = self.stay.write().unwrap_or_else(PoisonError::into_inner);
                self.move_aside(Self::zeros, false);
            }
            if self.state().surplus() > 0 {
                let _moving = self.stay.write().unwrap_or_else(PoisonError::into_inner);
                stuck = !self.move_out_some();
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
            if state.zeros.is_empty() && (state.surplus() == 0 || stuck) && !self.is_ending() {
                let until = next_look.saturating_duration_since(Instant::now()).min(PAUSE);
                drop(self.wanted.wait_timeout(state, until));
            }
        }
    }

    /// Finds out what was written since the last look; when the next is due.
    fn look(&self, tracker: Option<&mut UffdWriteProtect>) -> Duration {
        let Some(tracker) = tracker else { return LONGEST_LOOK };
        let mut written = PageSet::new();
        {
            let _alone = self.marks.lock().unwrap_or_else(PoisonError::into_inner);
            let collected = tracker.collect(&mut written);
            let mut state = self.state();
            if let Some(suspects) = &mut state.suspects {
                suspects.union_with(&written);
            }
            written.union_with(&std::mem::take(&mut state.seen));
            if let Err(e) = collected {
                state.trouble(format!("writes cannot be tracked: {e}"));
                return LONGEST_LOOK;
            }
        }
        let Ok(resident) = self.count() else { return LONGEST_LOOK };
        let mut state = self.state();
        state.ages.look(&written);
        self.probe(&mut state, &resident);
        drop(state);
        for _ in 0..PROBES / BATCH {
            let _moving = self.stay.write().unwrap_or_else(PoisonError::into_inner);
            if !self.state().probes.is_empty() {
                self.move_out_some();
            }
        }
        let wait = COST_OF_LOOK.saturating_mul(u32::try_from(written.len()).unwrap_or(u32::MAX));
        wait.clamp(SHORTEST_LOOK, LONGEST_LOOK)
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

    /// Moves out a batch of pages, if there are any; whether it is of use to go on at once. Whoever calls it holds
    /// `stay` for writing.
    pub(crate) fn move_out_some(&self) -> bool {
        let (gone, busy) = self.move_aside(Self::victims, true);
        let mut state = self.state();
        // Of those that were chosen together, some may be shared with others, and the next ones not.
        let goes_on = gone > 0 || busy > 0 && !state.victims.is_empty();
        state.stuck = (!goes_on).then(Instant::now);
        goes_on
    }

    /// Moves out the pages that `choose` chooses: those of zeros, or, if `any`, all; how many went, and how many
    /// cannot be moved. Whoever calls it holds `stay` for writing.
    fn move_aside(&self, choose: impl Fn(&Self) -> Vec<u64>, any: bool) -> (usize, usize) {
        let aside = &mut *self.aside.lock().unwrap_or_else(PoisonError::into_inner);
        let (aside, packer) = (&aside.0, &mut aside.1);
        let victims = choose(self);
        let (mut moved, mut gone, mut busy) = (Vec::new(), 0, 0);
        let mut page = [0; PAGE_BYTES];
        for gfn in &victims {
            let Some(region) = self.region_of(*gfn) else {
                self.settle(*gfn);
                continue;
            };
            if region.backing.is_some() {
                gone += usize::from(self.take_shared((*gfn, any), packer, &mut page));
                continue;
            }
            match aside.take(region, *gfn, moved.len() as u64) {
                Ok(Moved::Yes) => moved.push(*gfn),
                Ok(Moved::Absent) => self.settle(*gfn),
                Ok(Moved::Busy) => {
                    busy += 1;
                    self.state().ages.returned(*gfn);
                    self.settle(*gfn);
                }
                Err(e) => {
                    self.state().trouble(format!("{e}"));
                    self.settle(*gfn);
                }
            }
        }
        for (slot, gfn) in (0..).zip(&moved) {
            if let Err(e) = aside.read(slot, &mut page) {
                // It cannot be: the slot is there.
                self.state().trouble(format!("page {gfn:#x}: {e}"));
            }
            gone += usize::from(self.put_away((*gfn, any), packer, &page));
            self.settle(*gfn);
        }
        if let Err(e) = aside.clear(moved.len() as u64) {
            self.state().trouble(format!("pages that were moved out still take memory: {e}"));
        }
        (gone, busy)
    }

    /// The next pages that may be of zeros, on their way from here on.
    fn zeros(&self) -> Vec<u64> {
        let mut state = self.state();
        let all = state.zeros.runs().flat_map(|run| run.start..run.end());
        let next: Vec<u64> = all.take(BATCH).collect();
        for gfn in &next {
            state.zeros.remove_run(Run::new(*gfn, 1));
        }
        state.depart(next)
    }

    /// The next pages to be moved out, on their way from here on.
    fn victims(&self) -> Vec<u64> {
        if self.state().victims.is_empty() {
            let Ok(resident) = self.memory.resident() else { return Vec::new() };
            let mut state = self.state();
            let mut chosen = state.preferred(&resident);
            if chosen.is_empty() {
                chosen = state.ages.coldest(&resident, CHOSEN, false);
            }
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
        state.depart(victims)
    }

    /// Page `gfn` is in transit no more; who touched it meanwhile finds it where it is.
    fn settle(&self, gfn: u64) {
        let wanted = self.state().transit.remove(&gfn) == Some(true);
        if wanted {
            self.answer(gfn, true, Instant::now());
        }
    }

    /// Moves page `gfn` of shared memory out; whether it went.
    fn take_shared(
        &self,
        (gfn, any): (u64, bool),
        packer: &mut Packer,
        page: &mut [u8; PAGE_BYTES],
    ) -> bool {
        let Some(serving) = self.serving.get() else { return false };
        let taken = serving.missing.take_shared(gfn, page);
        let gone = taken.is_ok() && self.put_away((gfn, any), packer, page);
        let dropped = if gone { serving.missing.drop_shared(gfn) } else { taken };
        if let Err(e) = dropped {
            self.state()
                .trouble(format!("page {gfn:#x} that is moved out still takes memory: {e}"));
        }
        // Who touched it after it was put away found it in transit.
        self.settle(gfn);
        gone
    }

    /// Drops `page`, the content of page `gfn`, if it is of zeros, or puts it into the pool if `any` may go or the
    /// limit asks for it, or back; whether it went.
    fn put_away(
        &self,
        (gfn, any): (u64, bool),
        packer: &mut Packer,
        page: &[u8; PAGE_BYTES],
    ) -> bool {
        let zero = is_zero(page);
        let digest = page_digest(gfn, page);
        let (codec, bytes) = packer.pack(page);
        let mut state = self.state();
        let wanted = state.transit.get(&gfn) == Some(&true);
        let may_go = !wanted && (any || state.excess() > 0);
        let kept =
            !wanted && zero || may_go && state.pool.keep(&PackedPage { gfn, codec, bytes, digest });
        if kept {
            state.figures.pages_out += 1;
            state.over(POOL);
            state.figures.zero_pages += u64::from(zero);
            state.resident = state.resident.saturating_sub(1);
        } else {
            // With a file, there is room again soon, or that is told.
            if may_go && self.file.is_none() {
                state.trouble(format!(
                    "{POOL} is full, and pages stay in memory: give the machine more swap, or a higher limit"
                ));
            }
            drop(state);
            self.put_back(gfn, page);
            state = self.state();
        }
        // Whoever touches it from here on is served when it is settled.
        state.transit.insert(gfn, false);
        kept
    }

    /// Puts the only copy of page `gfn` back into memory.
    fn put_back(&self, gfn: u64, page: &[u8; PAGE_BYTES]) {
        loop {
            // Nobody waits for the lock meanwhile: who touches it finds it in transit.
            match self.place(gfn, page) {
                Ok(true) => return,
                Ok(false) => {}
                // It is over.
                Err(_) if self.is_ending() => return,
                Err(_) if self.is_let_go() => {
                    // The memory is plain again, and what is not there reads as zeros.
                    let _ = self.memory.write(gfn, page);
                    return;
                }
                Err(e) => self.state().trouble(format!("page {gfn:#x} cannot be put back: {e}")),
            }
            std::thread::sleep(AGAIN);
        }
    }
}

impl State {
    /// Those of `gfns` that are in memory and stay there no longer.
    fn depart(&mut self, gfns: Vec<u64>) -> Vec<u64> {
        let Self { transit, suspects, pool, .. } = self;
        let mut leaving = Vec::new();
        for gfn in gfns {
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

    /// The next of the pages that are preferred: those that are cold.
    fn preferred(&mut self, resident: &PageSet) -> Vec<u64> {
        let Self { preferred, ages, .. } = self;
        preferred.intersect_with(resident);
        let all = preferred.runs().flat_map(|run| run.start..run.end());
        let chosen: Vec<u64> = all.filter(|gfn| ages.is_cold(*gfn)).take(CHOSEN).collect();
        for gfn in &chosen {
            preferred.remove_run(Run::new(*gfn, 1));
        }
        chosen
    }
}
