//! The source after the hand-over: it serves what it owes, by itself or what is left of it by its spool.

use std::time::Duration;

use ferry_pages::{Layout, PageSet, Run};
use ferry_postcopy::{PushPace, PushQueue};
use ferry_protocol::{Outcome, Source, Spooled, wire};
use rand::RngExt;

use super::memory::{Mask, Memory, PAGES, bit, mask, of_run};
use super::network::{Kind, Packet, URGENT};
use super::plan::Fate;
use super::{NEVER, Plant, World};
use crate::rules::{Kept, Rule};

/// Owed pages that are being sent.
pub(crate) struct Serving {
    /// Which `Serve` this is.
    pub(super) turn: u32,
    round: u32,
    owed: Mask,
    queue: PushQueue,
    pace: PushPace,
}

/// Owed pages on the source's disk.
#[derive(Clone)]
pub(crate) struct Spool {
    /// The `Spooled` in it.
    words: Vec<u8>,
    pub(super) owed: Mask,
    pub(super) memory: Memory,
    /// Of all memory.
    pub(super) digest: u64,
    whole_at: u64,
}

impl World {
    pub(super) fn serve(&mut self, round: u32, owed: PageSet, record: &[PageSet]) -> Kept {
        let mut owed = mask(&owed);
        if self.destination.lacked.take().is_some_and(|lacked| lacked != owed) {
            return Err(Rule::NoLostBit.broken("what is served is not what was lacking"));
        }
        if self.plant == Plant::ServeOnlyUnsent
            && let Some(unsent) = self.source.unsent.take()
        {
            owed &= unsent;
        }
        self.source.serves += 1;
        let queue = PushQueue::new(
            super::memory::set(owed),
            record.iter().flat_map(PageSet::runs).collect(),
        );
        let (turn, pace) = (self.source.serves, PushPace::new(None));
        self.source.serving = Some(Serving { turn, round, owed, queue, pace });
        self.begin_spooling(owed)?;
        for page in std::mem::take(&mut self.source.early_requests) {
            self.requested(page)?;
        }
        self.tempt_fate();
        Ok(())
    }

    /// The next batch, when the pace lets it go.
    pub(super) fn push(&mut self, turn: u32) {
        let most = self.rng.random_range(1..8);
        let now = Duration::from_micros(self.now);
        let Some(serving) = self.source.serving.as_mut().filter(|s| s.turn == turn) else { return };
        let wait = serving.pace.may_send(now, most * 4096);
        if !wait.is_zero() {
            let at = self.now + wait.as_micros() as u64 + 1;
            return self.net.at(at, Packet::PushTurn(turn));
        }
        let round = serving.round;
        let which = serving.queue.next(most).into_iter().fold(0, |m, run| m | of_run(run));
        if which == 0 || self.source.dead {
            return;
        }
        let pages = self.source.read(which, true, Plant::Nothing);
        let bytes = 4096 * pages.iter().filter(|(_, content)| content.is_some()).count() as u64;
        let Some(serving) = &mut self.source.serving else { return };
        if bytes > 0 {
            serving.pace.sent(now, bytes);
        }
        self.send_batch(round, Kind::Push { turn, bytes, sent_at: self.now }, pages);
        if self.plant == Plant::ForgetWhenSent {
            super::memory::pages(which)
                .for_each(|page| self.source.memory[page] = super::Stamp::ZERO);
        }
        let at = self.now + self.rng.random_range(0..self.net.latency_us);
        self.net.at(at, Packet::PushTurn(turn));
    }

    pub(super) fn acknowledged(&mut self, turn: u32, bytes: u64, sent_at: u64) {
        let Some(serving) = self.source.serving.as_mut().filter(|s| s.turn == turn) else { return };
        if bytes > 0 {
            let round_trip = Duration::from_micros(self.now - sent_at);
            serving.pace.acked(Duration::from_micros(self.now), bytes, round_trip);
        }
    }

    pub(super) fn requested(&mut self, page: u64) -> Kept {
        let Some(serving) = &mut self.source.serving else {
            self.source.early_requests.push(page);
            return Ok(());
        };
        if serving.owed & bit(page) == 0 {
            return Err(Rule::Peace.broken(format!("page {page} is asked for and not owed")));
        }
        // Sent even if it was pushed a moment ago.
        serving.queue.fault(page);
        serving.pace.urgent(Duration::from_micros(self.now), 4096);
        let round = serving.round;
        let pages = self.source.read(bit(page), false, Plant::Nothing);
        let batch = self.batch(round, Kind::Urgent, pages);
        self.net.send(self.now, &mut self.rng, URGENT, Packet::Batch(batch));
        Ok(())
    }

    pub(super) fn stop_serving(&mut self) {
        if let Some(mut serving) = self.source.serving.take() {
            let left = serving.queue.next(NEVER).into_iter();
            self.source.unsent = Some(left.fold(0, |m, run| m | of_run(run)));
        }
        self.source.early_requests.clear();
    }

    /// Writes what is owed to a spool, in the background.
    fn begin_spooling(&mut self, owed: Mask) -> Kept {
        if !self.plan.spool || self.source.by_spool || self.source.spooling.is_some() {
            return Ok(());
        }
        let words = wire::encode(&self.source.machine.spooled());
        let words = words.map_err(|e| Rule::Bounded.broken(e.to_string()))?;
        let stopped = self.source.at_stop.filter(|_| self.plant == Plant::SpoolBeforeSave);
        let from = stopped.unwrap_or(self.source.memory);
        let mut memory = Memory::ZERO;
        super::memory::pages(owed).for_each(|page| memory[page] = from[page]);
        let whole_at = self.now + self.rng.random_range(0..60_000);
        let digest = self.source.memory.digest();
        self.source.spool_due_at.get_or_insert(whole_at);
        self.source.spooling = Some(Spool { words, owed, memory, digest, whole_at });
        Ok(())
    }

    /// What is on the disk.
    pub(super) fn spool(&self) -> Option<&Spool> {
        self.source.spool.as_ref()
    }

    /// The source's process ends, or its migration: only what is whole stays.
    fn settle_spool(&mut self) {
        let Some(mut written) = self.source.spooling.take() else { return };
        if self.plant == Plant::SpoolHalfWritten {
            (PAGES / 2..PAGES).for_each(|page| written.memory[page] = super::Stamp::ZERO);
        } else if written.whole_at > self.now {
            return;
        }
        self.source.spool = Some(written);
    }

    pub(super) fn end_spooling(&mut self, outcome: &Outcome) {
        if matches!(outcome, Outcome::Detached { .. }) {
            // It is waited for.
            if let Some(spool) = &mut self.source.spooling {
                spool.whole_at = self.now;
            }
            self.settle_spool();
        } else if !self.source.by_spool || matches!(outcome, Outcome::Completed { .. }) {
            (self.source.spooling, self.source.spool) = (None, None);
        }
    }

    /// An operator who does not give up is told how it ended.
    pub(super) fn ask_operator(&mut self, outcome: &Outcome) {
        if !self.plan.operator_persists {
            return;
        }
        let at = self.now + self.rng.random_range(0..20_000_000);
        match outcome {
            Outcome::InDoubt { .. } | Outcome::Detached { .. } if self.destination.dead => {
                self.fate_at(at, Fate::Fence);
            }
            Outcome::Detached { .. } if !self.hopeless() => {
                let again = if self.source.by_spool { Fate::ServeSpool } else { Fate::Reattach };
                self.fate_at(at, again);
            }
            _ => {}
        }
    }

    pub(super) fn reattach(&mut self) -> Kept {
        // Its process may be dead by now.
        let Some(Outcome::Detached { reattach, .. }) =
            self.source.outcome.take_if(|o| matches!(o, Outcome::Detached { .. }))
        else {
            return Ok(());
        };
        let machine = Source::reattach(reattach, self.source.goals, self.source.rejoin_for);
        self.source.reattached = true;
        self.begin_again(machine)
    }

    fn begin_again(&mut self, machine: Source) -> Kept {
        let s = &mut self.source;
        s.machine = machine;
        s.process += 1;
        s.began = self.now;
        s.lost_at = Some(self.now);
        self.note_debt()
    }

    /// Its guest, its memory and its machine are gone.
    pub(super) fn source_dies(&mut self) {
        let s = &mut self.source;
        let stays =
            matches!(s.outcome, None | Some(Outcome::Detached { .. } | Outcome::InDoubt { .. }));
        if s.dead || s.fenced || !stays {
            return;
        }
        (s.dead, s.runs, s.outcome) = (true, false, None);
        s.spool_due_at.take_if(|at| *at > self.now);
        self.cut = true;
        self.stop_serving();
        self.drop_link();
        self.settle_spool();
        if self.source.spool.is_some() && self.plan.operator_persists && !self.hopeless() {
            let at = self.now + self.rng.random_range(0..20_000_000);
            self.fate_at(at, Fate::ServeSpool);
        }
    }

    /// A new process serves what the spool holds.
    pub(super) fn serve_spool(&mut self) -> Kept {
        let detached = matches!(self.source.outcome, Some(Outcome::Detached { .. }));
        let free = self.source.dead || self.source.by_spool && detached;
        let Some(spool) = self.source.spool.clone().filter(|_| free && !self.hopeless()) else {
            return Ok(());
        };
        let damaged = |why: String| Rule::Peace.broken(format!("the spool: {why}"));
        let layout = Layout::new(vec![Run::new(0, PAGES)]).map_err(|e| damaged(e.to_string()))?;
        let spooled: Spooled = wire::decode(&spool.words).map_err(|e| damaged(e.to_string()))?;
        let reattach = spooled.reattach(&layout).map_err(damaged)?;
        let machine = Source::reattach(reattach, self.source.goals, self.source.rejoin_for);
        let s = &mut self.source;
        (s.dead, s.by_spool, s.outcome) = (false, true, None);
        (s.tracking, s.dirty) = (false, 0);
        s.handed.clear();
        s.memory = spool.memory;
        s.runs = self.plant == Plant::SpoolRuns;
        s.forget_old_copy();
        self.begin_again(machine)
    }

    /// Everyone is sure that the destination's process is dead: what is here may run.
    pub(super) fn fence(&mut self) {
        if !self.destination.dead {
            return;
        }
        let permit = match self.source.outcome.take() {
            Some(Outcome::InDoubt { permit, .. }) => Some(permit.fenced_by_operator()),
            Some(Outcome::Detached { reattach, .. }) => reattach.fenced_by_operator(),
            other => {
                self.source.outcome = other;
                return;
            }
        };
        self.source.fenced = permit.is_some();
        self.source.runs = permit.is_some();
        self.source.outcome = Some(Outcome::Cancelled);
    }
}
