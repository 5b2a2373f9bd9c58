//! Rounds at the source: harvested, re-armed, read and put on the lanes a batch at a time.

use ferry_protocol::SourceEvent;
use rand::RngExt;

use super::memory::{Mask, bit, pages, set};
use super::network::{Batch, Kind, LANES, Packet, Pages};
use super::source_host::SourceHost;
use super::{Plant, World};

const BATCH_PAGES: usize = 5;
/// Rounds of which is remembered what was sent.
const ROUNDS_SENT: usize = 8;

/// A round that is being sent.
pub(crate) struct Round {
    number: u32,
    left: Mask,
    /// Re-armed, perhaps long before it is read.
    pub(super) armed: Mask,
    /// The guest ran when it began.
    tracked: bool,
    /// It was given up with its link.
    ended: bool,
    batches: u64,
    pages: u64,
    same: u64,
}

impl SourceHost {
    /// What a lane reads of `pages`; if it `may` name them, not those that the destination has.
    pub(super) fn read(&self, which: Mask, may_name: bool, plant: Plant) -> Pages {
        let compared = match plant {
            Plant::CompareBeforeRearm => &self.at_start,
            _ => &self.memory,
        };
        let has = |p: u64| {
            may_name
                && self.recalled[p as usize]
                    .is_some_and(|d| d == compared[p].digest(p) && !compared[p].is_zero())
        };
        pages(which).map(|p| (p, (!has(p)).then_some(self.memory[p]))).collect()
    }

    /// Nothing more is sent or re-armed for rounds under way.
    pub(super) fn end_rounds(&mut self, plant: Plant) {
        if plant == Plant::StragglerRearms {
            self.rounds.iter_mut().for_each(|round| round.ended = true);
        } else {
            self.rounds.clear();
        }
    }
}

impl World {
    pub(super) fn harvest(&mut self) {
        let mut pages = std::mem::take(&mut self.source.dirty);
        if self.plant == Plant::DropHarvestedBit && self.source.machine.rounds() > 0 {
            pages &= pages.wrapping_sub(1);
        }
        if !self.source.runs {
            self.source.harvests_while_paused += 1;
            if self.source.harvests_while_paused == 2 && self.plant == Plant::SkipHarvestAfterSave {
                pages = 0;
            }
        }
        self.source.unpaid |= pages;
        self.source.handed.push(pages);
        self.later(SourceEvent::Harvested(set(pages)));
    }

    pub(super) fn begin_round(&mut self, number: u32, pages: Mask) {
        let s = &mut self.source;
        s.last_round = pages;
        s.rounds_sent.truncate(ROUNDS_SENT - 1);
        s.rounds_sent.insert(0, (number, pages));
        let mut left = pages;
        if self.plant == Plant::DroppedDebt {
            left &= !std::mem::take(&mut s.sent_before);
        }
        let (tracked, pages) = (s.runs, u64::from(left.count_ones()));
        let (armed, ended, batches, same) = (0, false, 0, 0);
        s.rounds.push(Round { number, left, armed, tracked, ended, batches, pages, same });
        let at = self.now + self.rng.random_range(1..400);
        self.net.at(at, Packet::RoundTurn(number));
    }

    /// The next batch of a round: re-armed, then read.
    pub(super) fn send_more(&mut self, number: u32) {
        let Some(at) = self.source.rounds.iter().position(|r| r.number == number) else { return };
        let (plant, paused) = (self.plant, !self.source.runs);
        if self.source.rounds[at].left == 0 {
            let Round { batches, pages, same, ended, .. } = self.source.rounds.swap_remove(at);
            // One that is still to come is not counted.
            let early = plant == Plant::CommitWithoutLastBatch && paused && batches > 0;
            let batches = batches - u64::from(early);
            if !ended {
                self.later(SourceEvent::RoundSent {
                    round: number,
                    batches,
                    bytes: pages * 4096,
                    same,
                });
            }
            return;
        }
        let batch = pages(self.source.rounds[at].left).take(BATCH_PAGES).fold(0, |m, p| m | bit(p));
        let arms = if self.source.arms_at_once { self.source.rounds[at].left } else { batch };
        let round = &mut self.source.rounds[at];
        round.left &= !batch;
        let last = round.left == 0;
        let arms = if round.tracked { arms & !round.armed } else { 0 };
        let (tracked, ended) = (round.tracked, round.ended);
        round.armed |= arms;
        let mut read = Vec::new();
        if plant == Plant::CopyBeforeRearm {
            read = self.source.read(batch, tracked, plant);
            self.source_guest_writes(1000);
        }
        self.source.dirty &= !arms;
        if plant != Plant::CopyBeforeRearm {
            read = self.source.read(batch, tracked, plant);
        }
        // A lane that was given up hangs for long.
        let most = if ended { self.net.latency_us * 8 } else { 1 + self.net.latency_us / 8 };
        let next = self.now + self.rng.random_range(0..most);
        self.net.at(next, Packet::RoundTurn(number));
        if ended {
            return;
        }
        let round = &mut self.source.rounds[at];
        round.batches += 1;
        round.same += u64::from(super::network::named(&read).count_ones());
        if plant == Plant::CommitWithoutLastBatch && paused && last {
            let batch = self.batch(number, Kind::Lane, read);
            return self.net.at_on_link(self.now + 100_000, Packet::Batch(batch));
        }
        self.send_batch(number, Kind::Lane, read);
    }

    pub(super) fn batch(&mut self, round: u32, kind: Kind, pages: Pages) -> Batch {
        self.source.batches_read += 1;
        Batch { link: self.net.link, round, serial: self.source.batches_read, kind, pages }
    }

    /// Puts pages on one of the lanes; now and then they come twice.
    pub(super) fn send_batch(&mut self, round: u32, kind: Kind, pages: Pages) {
        let batch = self.batch(round, kind, pages);
        let faulty = matches!(self.plant, Plant::NoLedger | Plant::NoDemand);
        if self.rng.random_bool(if faulty { 0.3 } else { 0.03 }) {
            let at = self.now + self.rng.random_range(0..self.net.latency_us * 8);
            let echo = Batch { kind: Kind::Echo, ..batch.clone() };
            self.net.at_on_link(at, Packet::Batch(echo));
        }
        let lane = 1 + self.rng.random_range(0..LANES);
        self.net.send(self.now, &mut self.rng, lane, Packet::Batch(batch));
    }
}
