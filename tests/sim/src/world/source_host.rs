//! The source's host: a guest that writes, its dirty log, and what the engine does for `Source` until the
//! hand-over.

use std::time::Duration;

use ferry_protocol::{
    Goals, MachineSpec, Mode, Outcome, Progress, RunPermit, Source, SourceAction, SourceEvent,
    ToDestination,
};
use rand::RngExt;
use rand::rngs::SmallRng;

use super::memory::{Mask, Memory, PAGES, bit, mask, pages, set};
use super::network::{CONTROL, Packet, URGENT};
use super::plan::Fate;
use super::rounds::Round;
use super::serving::{Serving, Spool};
use super::{Plant, SESSION, World};
use crate::rules::{Kept, Rule};

pub(crate) struct SourceHost {
    pub(super) machine: Source,
    /// Which process runs it: what an earlier one was told comes to nothing.
    pub(super) process: u32,
    /// When `machine` began.
    pub(super) began: u64,
    /// A busy host looks at its clock late.
    late_us: u64,
    pub(super) goals: Goals,
    pub(super) rejoin_for: Duration,
    pub(super) memory: Memory,
    /// Digests of the destination's old copy.
    pub(super) recalled: [Option<u64>; PAGES as usize],
    /// Memory when tracking started.
    pub(super) at_start: Memory,
    pub(super) dirty: Mask,
    /// Harvested, and on their way to `machine`.
    pub(super) handed: Vec<Mask>,
    /// What `machine` says that it owes.
    pub(super) debt: Mask,
    pub(super) tracking: bool,
    writes_per_ms: u64,
    /// Percent by which its vCPUs are held back.
    pub(super) throttled: u8,
    /// Its VMM can hold vCPUs back.
    can_throttle: bool,
    /// The operator changed the goals: they may be such that it fails.
    pub(super) tuned: bool,
    /// Pages are re-armed long before they are read.
    pub(super) arms_at_once: bool,
    pub(super) runs: bool,
    pub(super) dead: bool,
    permit: Option<RunPermit>,
    /// Memory as it was when the guest stood still, before and after state was saved.
    pub(super) at_stop: Option<Memory>,
    pub(super) at_pause: Option<Memory>,
    pub(super) harvests_while_paused: u32,
    pub(super) rounds: Vec<Round>,
    /// The pages of the last rounds.
    pub(super) rounds_sent: Vec<(u32, Mask)>,
    /// Sent on links before this one; only a fault remembers it.
    pub(super) sent_before: Mask,
    pub(super) batches_read: u32,
    pub(super) serving: Option<Serving>,
    pub(super) serves: u32,
    /// What the last `Serve` before a lost link had not sent.
    pub(super) unsent: Option<Mask>,
    /// Asked for before `Serve` said what is owed now.
    pub(super) early_requests: Vec<u64>,
    pub(super) spool: Option<Spool>,
    /// Not whole before its time comes.
    pub(super) spooling: Option<Spool>,
    /// When one of the present commit is whole.
    pub(super) spool_due_at: Option<u64>,
    /// Nothing is left of the source but its spool.
    pub(super) by_spool: bool,
    pub(super) lost_at: Option<u64>,
    pub(super) last_round: Mask,
    pub(super) asked: bool,
    /// The link was lost before the guest was ever paused.
    pub(super) cut_early: bool,
    pub(super) reattached: bool,
    /// Runs on the operator's word that the destination is dead.
    pub(super) fenced: bool,
    pub(super) outcome: Option<Outcome>,
    /// When it ended, nothing had gone wrong for so long.
    pub(super) in_vain_us: u64,
    pub(super) returned: Mask,
    /// Harvested, and not installed at the destination since.
    pub(super) unpaid: Mask,
}

impl SourceHost {
    pub(super) fn new(
        rng: &mut SmallRng,
        (goals, mode): (Goals, Mode),
        memory: Memory,
        permit: RunPermit,
    ) -> Self {
        let spec = MachineSpec {
            name: "m".into(),
            vmm: "world".into(),
            extents: vec![(0, PAGES)],
            vcpus: 2,
            cpu_features: Vec::new(),
            devices: Vec::new(),
            config: Vec::new(),
        };
        let rejoin_for = Duration::from_millis(rng.random_range(100..60_000));
        let machine = Source::new(spec, Some(1), 0b1111, 3, (goals, mode), rejoin_for);
        Self {
            machine,
            process: 0,
            began: 0,
            late_us: if rng.random_bool(0.5) { 0 } else { rng.random_range(0..3000) },
            goals,
            rejoin_for,
            memory,
            recalled: [None; PAGES as usize],
            at_start: memory,
            dirty: 0,
            handed: Vec::new(),
            debt: 0,
            tracking: false,
            writes_per_ms: rng.random_range(0..4),
            throttled: 0,
            can_throttle: rng.random_bool(0.8),
            tuned: false,
            arms_at_once: rng.random_bool(0.5),
            runs: true,
            dead: false,
            permit: Some(permit),
            at_stop: None,
            at_pause: None,
            harvests_while_paused: 0,
            rounds: Vec::new(),
            rounds_sent: Vec::new(),
            sent_before: 0,
            batches_read: 0,
            serving: None,
            serves: 0,
            unsent: None,
            early_requests: Vec::new(),
            spool: None,
            spooling: None,
            spool_due_at: None,
            by_spool: false,
            lost_at: None,
            last_round: 0,
            asked: false,
            cut_early: false,
            reattached: false,
            fenced: false,
            outcome: None,
            in_vain_us: 0,
            returned: 0,
            unpaid: 0,
        }
    }

    pub(super) fn deadline(&self) -> Option<u64> {
        let deadline = self.machine.deadline().filter(|_| !self.dead)?;
        Some(self.began + deadline.as_micros() as u64 + self.late_us)
    }

    /// A process that begins with a spool knows of no old copy.
    pub(super) fn forget_old_copy(&mut self) {
        self.recalled = [None; PAGES as usize];
    }
}

impl World {
    pub(super) fn source_guest_writes(&mut self, us: u64) {
        let speed = 100 - u64::from(self.source.throttled);
        let budget = (us.min(20_000) * self.source.writes_per_ms * speed).div_ceil(100_000);
        for _ in 0..budget.min(100) {
            if self.source.runs {
                self.source_writes();
            }
        }
    }

    fn source_writes(&mut self) {
        let page = self.rng.random_range(0..PAGES);
        self.source.memory[page] = self.next_content(page);
        if self.source.tracking {
            self.source.dirty |= bit(page);
        }
    }

    pub(super) fn feed_source(&mut self, event: SourceEvent) -> Kept {
        if self.source.dead {
            return Ok(());
        }
        let since = Duration::from_micros(self.now - self.source.began);
        self.tell("source       <-", || super::words::source_event(&event));
        let handed = match &event {
            SourceEvent::Harvested(pages) | SourceEvent::TrackingStarted(pages) => mask(pages),
            _ => 0,
        };
        self.source.machine.handle(since, event);
        if let Some(at) = self.source.handed.iter().position(|h| *h == handed) {
            self.source.handed.swap_remove(at);
        }
        let owed_before = self.source.debt;
        self.note_debt()?;
        while let Some(action) = self.source.machine.poll() {
            self.tell("source       ->", || super::words::source_action(&action));
            self.act_source(action)?;
        }
        match &self.source.outcome {
            // It is kept for later.
            Some(Outcome::Detached { .. }) => self.source.debt |= owed_before,
            Some(_) => self.source.debt = 0,
            None => {}
        }
        Ok(())
    }

    pub(super) fn note_debt(&mut self) -> Kept {
        self.source.debt = 0;
        for owed in self.source.machine.debt() {
            let pages = mask(owed);
            if u64::from(pages.count_ones()) != owed.len() {
                return Err(Rule::Bounded.broken("the source owes pages that the machine has not"));
            }
            self.source.debt |= pages;
        }
        Ok(())
    }

    pub(super) fn later(&mut self, event: SourceEvent) {
        let at = self.now + self.rng.random_range(1..800);
        self.net.at(at, Packet::Event(self.source.process, event));
    }

    fn act_source(&mut self, action: SourceAction) -> Kept {
        match action {
            SourceAction::Send(m) => {
                self.net.say_to_destination(self.now, &mut self.rng, &m)?;
                let committed = matches!(m, ToDestination::Commit { .. });
                if committed && self.plant == Plant::ResumeAfterCommit {
                    self.source.runs = true;
                }
            }
            SourceAction::OpenLanes { session, codecs } => {
                if session != SESSION || codecs != 0b0111 {
                    return Err(Rule::Peace.broken("negotiated something else"));
                }
                if self.source.lost_at.is_some() {
                    self.tempt_fate();
                }
                self.net.lanes_open = true;
                self.net.send(self.now, &mut self.rng, URGENT, Packet::UrgentOpen);
                let at = self.now + self.rng.random_range(1..800 + self.net.latency_us * 4);
                let open = Packet::Event(self.source.process, SourceEvent::LanesOpen);
                self.net.at_on_link(at, open);
            }
            SourceAction::Recall { pages: which, digests } => {
                for (page, digest) in pages(mask(&which)).zip(digests) {
                    self.source.recalled[page as usize] = Some(digest);
                }
            }
            SourceAction::Forget => self.source.forget_old_copy(),
            SourceAction::StartTracking => {
                self.source.at_start = self.source.memory;
                self.source.tracking = true;
                let resident = self.source.memory.differing(&Memory::ZERO);
                self.source.handed.push(resident);
                self.later(SourceEvent::TrackingStarted(set(resident)));
            }
            SourceAction::Throttle(0) if self.plant == Plant::HeldBack => {}
            SourceAction::Throttle(percent) if self.source.can_throttle => {
                self.source.throttled = percent;
            }
            SourceAction::Throttle(_) => {
                self.later(SourceEvent::CannotThrottle("no way to".into()));
            }
            SourceAction::Sample(pages) => self.source.dirty &= !mask(&pages),
            SourceAction::Harvest => self.harvest(),
            SourceAction::SendPages { round, pages } => self.begin_round(round, mask(&pages)),
            SourceAction::Pause => {
                self.source.runs = false;
                let permit = self.source.permit.take();
                let permit =
                    permit.ok_or_else(|| Rule::OneRuns.broken("paused without a permit"))?;
                self.source.at_stop = Some(self.source.memory);
                self.later(SourceEvent::Paused(permit));
            }
            SourceAction::SaveState => {
                // Draining devices dirties memory.
                self.source_writes();
                self.source.at_pause = Some(self.source.memory);
                self.later(SourceEvent::StateSaved(vec![1, 2, 3]));
            }
            SourceAction::Resume(permit) => {
                self.source.permit = Some(permit);
                self.source.runs = true;
                self.source.harvests_while_paused = 0;
                if self.plant != Plant::SpoolOfOldCommit {
                    (self.source.spool, self.source.spooling) = (None, None);
                    self.source.spool_due_at = None;
                }
            }
            SourceAction::ReturnDirty(pages) => {
                let dropped = if self.plant == Plant::DropReturned { 0b11 } else { 0 };
                self.source.returned |= mask(&pages) & !dropped;
            }
            SourceAction::StopTracking => self.source.tracking = false,
            SourceAction::Serve { round, owed, record } => self.serve(round, owed, &record)?,
            SourceAction::Push => {
                let Some(serving) = &self.source.serving else {
                    return Err(Rule::Peace.broken("pushes what is not served"));
                };
                self.net.at(self.now, Packet::PushTurn(serving.turn));
            }
            SourceAction::Rejoin { done, .. } => self.rejoin(done),
            SourceAction::DigestMemory => {
                let spool = self.source.spool.as_ref().filter(|_| self.source.by_spool);
                let sum = spool.map_or_else(|| self.source.memory.digest(), |spool| spool.digest);
                self.later(SourceEvent::MemoryDigest(sum));
            }
            SourceAction::Tell(progress) => self.told(&progress),
            SourceAction::Finish(outcome) => self.source_finished(outcome)?,
        }
        Ok(())
    }

    fn rejoin(&mut self, done: u32) {
        let lost: Mask = self.source.rounds.iter().fold(0, |m, r| m | r.armed);
        self.source.sent_before |= lost | self.source.last_round;
        self.source.end_rounds(self.plant);
        self.stop_serving();
        self.drop_link();
        let at = self.now + self.net.latency_us;
        if !self.reachable() {
            // What an older link still brings is for nobody.
            self.net.link += 1;
            let lost = SourceEvent::LinkLost("nobody answers".into());
            return self.net.at(at, Packet::Event(self.source.process, lost));
        }
        self.net.open_link(self.now, &mut self.rng);
        self.net.send(self.now, &mut self.rng, CONTROL, Packet::Hello { done });
        if self.rng.random_bool(0.3) {
            // Lost again before it was of use.
            self.tempt_fate();
        }
    }

    fn told(&mut self, progress: &Progress) {
        match progress {
            Progress::Committed => {
                self.tempt_fate();
                if self.plan.source_dies && self.rng.random_bool(0.4) {
                    let at = self.now + self.rng.random_range(0..200_000);
                    self.fate_at(at, Fate::SourceDies);
                    if self.rng.random_bool(0.5) {
                        self.cut_link();
                    }
                }
            }
            Progress::RoundStarted { .. } if self.plan.tunes && self.rng.random_bool(0.3) => {
                self.source.tuned = true;
                let goals = Goals {
                    max_downtime: Duration::from_millis(self.rng.random_range(0..60)),
                    max_total: Duration::from_millis(self.rng.random_range(0..60_000)),
                    max_slowdown: self.rng.random_range(0..=100),
                };
                let at = self.soon();
                self.net.at(at, Packet::Event(self.source.process, SourceEvent::Tune(goals)));
            }
            Progress::Running => {
                self.source.lost_at = self.source.lost_at.map(|_| self.now);
                for (planned, what) in [
                    (self.plan.source_dies, Fate::SourceDies),
                    (self.plan.destination_dies_later, Fate::DestinationDies),
                    (self.plan.abandons, Fate::Abandoned),
                ] {
                    if planned {
                        let at = self.soon();
                        self.fate_at(at, what);
                    }
                }
            }
            Progress::InDoubt(_) => {
                self.source.asked = true;
                if self.plant == Plant::DoublePermit {
                    self.source.runs = true;
                }
            }
            Progress::LinkLost(_) => {
                self.source.lost_at = Some(self.now);
                if self.source.at_pause.is_none() {
                    self.source.cut_early = true;
                }
                if self.plant == Plant::SpoolRemovedEarly {
                    (self.source.spool, self.source.spooling) = (None, None);
                }
                if std::mem::take(&mut self.plan.cancels_rejoining) {
                    let at = self.now + self.rng.random_range(0..3_000_000);
                    self.fate_at(at, Fate::Cancel);
                }
            }
            _ => {}
        }
    }

    fn source_finished(&mut self, outcome: Outcome) -> Kept {
        self.stop_serving();
        self.source.end_rounds(Plant::Nothing);
        self.net.send(self.now, &mut self.rng, CONTROL, Packet::Closed);
        if let Outcome::Detached { reattach, .. } = &outcome {
            // The longest pause between two attempts, and the longest until a lost link is noticed.
            let limit = self.source.rejoin_for.as_micros() as u64 + 11_000_000;
            let tried = self.source.lost_at.filter(|_| !reattach.is_in_doubt());
            if tried.is_some_and(|lost| self.now > lost + limit) {
                let why = "tried to come back for longer than it was told to";
                return Err(Rule::Progress.broken(why));
            }
            if self.plant == Plant::ResumeAfterDetach {
                self.source.runs = true;
            }
        }
        if self.source.outcome.is_some() {
            return Err(Rule::TrueEnd.broken("finished twice"));
        }
        let carries = self.now > self.net.down_until;
        self.source.in_vain_us = if carries { self.now.saturating_sub(self.calm_since) } else { 0 };
        self.ask_operator(&outcome);
        self.end_spooling(&outcome);
        self.source.outcome = Some(outcome);
        Ok(())
    }
}
