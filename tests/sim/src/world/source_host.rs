//! The source's host: a guest that writes, its dirty log, and what the engine does for `Source`.

use std::collections::BTreeMap;
use std::time::Duration;

use ferry_pages::{PageSet, Run};
use ferry_postcopy::PushQueue;
use ferry_protocol::{
    Goals, MachineSpec, Mode, Outcome, Progress, RunPermit, Source, SourceAction, SourceEvent,
    ToDestination,
};
use rand::RngExt;
use rand::rngs::SmallRng;

use super::network::{CONTROL, Fate, LANES, Packet, Pages, URGENT};
use super::{NEVER, PAGES, Plant, SAME, SESSION, World, digest, run_pages};

/// Owed pages that are being sent.
struct Serving {
    /// Which `Serve` this is.
    turn: u32,
    round: u32,
    queue: PushQueue,
}

pub(crate) struct SourceHost {
    machine: Source,
    /// When `machine` began.
    began: u64,
    goals: Goals,
    rejoin_for: Duration,
    memory: Vec<u64>,
    /// Digests of the destination's old copy.
    recalled: BTreeMap<u64, u64>,
    /// Memory when tracking started.
    at_start: Vec<u64>,
    dirty: PageSet,
    pub(crate) tracking: bool,
    writes_per_ms: u64,
    pub(crate) runs: bool,
    pub(crate) dead: bool,
    permit: Option<RunPermit>,
    /// Memory as it was when the guest stood still.
    pub(crate) at_pause: Option<Vec<u64>>,
    harvests_while_paused: u32,
    serving: Option<Serving>,
    pub(crate) serves: u32,
    /// What the last `Serve` before a lost link had not sent.
    unsent: Option<PageSet>,
    /// Asked for before `Serve` said what is owed now.
    early_requests: Vec<u64>,
    lost_at: Option<u64>,
    pub(crate) last_round: PageSet,
    pub(crate) asked: bool,
    /// The link was lost before the guest was ever paused.
    pub(crate) cut_early: bool,
    pub(crate) reattached: bool,
    pub(crate) outcome: Option<Outcome>,
    pub(crate) returned: PageSet,
    /// Harvested, and not installed at the destination since.
    pub(crate) debt: PageSet,
}

impl SourceHost {
    pub(crate) fn new(rng: &mut SmallRng, (goals, mode): (Goals, Mode)) -> Self {
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
        Self {
            machine: Source::new(spec, Some(1), 0b1111, 3, (goals, mode), rejoin_for),
            began: 0,
            goals,
            rejoin_for,
            memory: (0..PAGES).map(|p| if rng.random_bool(0.7) { p + 1 } else { 0 }).collect(),
            recalled: BTreeMap::new(),
            at_start: Vec::new(),
            dirty: PageSet::new(),
            tracking: false,
            writes_per_ms: rng.random_range(0..4),
            runs: true,
            dead: false,
            permit: Some(RunPermit::for_new_machine(1)),
            at_pause: None,
            harvests_while_paused: 0,
            serving: None,
            serves: 0,
            unsent: None,
            early_requests: Vec::new(),
            lost_at: None,
            last_round: PageSet::new(),
            asked: false,
            cut_early: false,
            reattached: false,
            outcome: None,
            returned: PageSet::new(),
            debt: PageSet::new(),
        }
    }

    pub(crate) fn deadline(&self) -> Option<u64> {
        let deadline = self.machine.deadline().filter(|_| !self.dead)?;
        Some(self.began + deadline.as_micros() as u64)
    }

    fn write_page(&mut self, rng: &mut SmallRng) {
        let page = rng.random_range(0..PAGES);
        let content = &mut self.memory[page as usize];
        *content = match rng.random_range(0..20) {
            0 | 1 => 0,
            // As it was once.
            2 => page + 1,
            _ => *content + 1000,
        };
        if self.tracking {
            self.dirty.insert(page);
        }
    }

    /// Some pages as they once were, some as they never were, if there is an old copy at all.
    pub(crate) fn old_copy(&self, rng: &mut SmallRng) -> BTreeMap<u64, u64> {
        let share = [0.0, 0.9][rng.random_range(0..2)];
        let pages = (0..PAGES).filter(|_| rng.random_bool(share)).collect::<Vec<_>>();
        pages.into_iter().map(|p| (p, if rng.random_bool(0.7) { p + 1 } else { p + 7 })).collect()
    }

    fn contents(&self, pages: impl Iterator<Item = u64>) -> Pages {
        pages.map(|p| (p, self.memory[p as usize])).collect()
    }

    /// The same, but pages that the destination has are only named.
    fn named(&self, pages: impl Iterator<Item = u64>, plant: Plant) -> Pages {
        let compared = |p: u64| match plant {
            Plant::CompareBeforeRearm => self.at_start[p as usize],
            _ => self.memory[p as usize],
        };
        let has = |p: u64| self.recalled.get(&p).is_some_and(|d| *d == digest(p, compared(p)));
        let content = |p: u64| if has(p) { SAME } else { self.memory[p as usize] };
        pages.map(|p| (p, content(p))).collect()
    }
}

impl World {
    pub(crate) fn source_guest_writes(&mut self, us: u64) {
        let budget = (us.min(20_000) * self.source.writes_per_ms).div_ceil(1000);
        for _ in 0..budget.min(200) {
            if self.source.runs {
                self.source.write_page(&mut self.rng);
            }
        }
    }

    pub(crate) fn feed_source(&mut self, event: SourceEvent) -> Result<(), String> {
        if self.source.dead {
            return Ok(());
        }
        let since = Duration::from_micros(self.now - self.source.began);
        self.trace(|| format!("source      <- {event:?}"));
        self.source.machine.handle(since, event);
        while let Some(action) = self.source.machine.poll() {
            self.trace(|| format!("source      -> {action:?}"));
            self.act_source(action)?;
        }
        Ok(())
    }

    fn later(&mut self, event: SourceEvent) {
        let at = self.now + self.rng.random_range(1..800);
        self.net.at(at, Packet::Event(event));
    }

    fn act_source(&mut self, action: SourceAction) -> Result<(), String> {
        match action {
            SourceAction::Send(m) => {
                let committed = matches!(m, ToDestination::Commit { .. });
                self.net.send(self.now, &mut self.rng, CONTROL, Packet::ToDestination(m));
                if committed && self.plant == Plant::ResumeAfterCommit {
                    self.source.runs = true;
                }
            }
            SourceAction::OpenLanes { session, codecs } => {
                if session != SESSION || codecs != 0b0111 {
                    return Err("negotiated something else".into());
                }
                if self.source.lost_at.is_some() {
                    self.tempt_fate();
                }
                self.net.send(self.now, &mut self.rng, URGENT, Packet::UrgentOpen);
                let at = self.now + self.rng.random_range(1..800 + self.net.latency_us * 4);
                self.net.at_on_link(at, Packet::Event(SourceEvent::LanesOpen));
            }
            SourceAction::Recall { pages, digests } => {
                self.source.recalled.extend(run_pages(&pages).zip(digests));
            }
            SourceAction::Forget => self.source.recalled.clear(),
            SourceAction::StartTracking => {
                self.source.at_start.clone_from(&self.source.memory);
                self.source.tracking = true;
                let holds_data = |p: &u64| self.source.memory[*p as usize] != 0;
                let resident = (0..PAGES).filter(holds_data).map(|p| Run::new(p, 1)).collect();
                self.later(SourceEvent::TrackingStarted(resident));
            }
            SourceAction::Sample(pages) => self.source.dirty.subtract(&pages),
            SourceAction::Harvest => self.harvest(),
            SourceAction::SendPages { round, pages } => self.send_pages(round, &pages),
            SourceAction::Pause => {
                self.source.runs = false;
                let permit = self.source.permit.take().ok_or("paused without a permit")?;
                self.later(SourceEvent::Paused(permit));
            }
            SourceAction::SaveState => {
                // Draining devices dirties memory.
                self.source.write_page(&mut self.rng);
                self.source.at_pause = Some(self.source.memory.clone());
                self.later(SourceEvent::StateSaved(vec![1, 2, 3]));
            }
            SourceAction::Resume(permit) => {
                self.source.permit = Some(permit);
                self.source.runs = true;
                self.source.harvests_while_paused = 0;
            }
            SourceAction::ReturnDirty(pages) => self.source.returned.union_with(&pages),
            SourceAction::StopTracking => self.source.tracking = false,
            SourceAction::Serve { round, owed, record } => self.serve(round, owed, &record)?,
            SourceAction::Push => {
                let turn = self.source.serving.as_ref().ok_or("pushes what is not served")?.turn;
                self.net.at(self.now, Packet::PushTurn(turn));
            }
            SourceAction::Rejoin { done, .. } => self.rejoin(done),
            SourceAction::DigestMemory => {
                let sum = (0..).zip(&self.source.memory);
                let sum = sum.fold(0u64, |s, (p, c)| s.wrapping_add(digest(p, *c)));
                self.later(SourceEvent::MemoryDigest(sum));
            }
            SourceAction::Tell(progress) => self.told(&progress),
            SourceAction::Finish(outcome) => self.source_finished(outcome)?,
        }
        Ok(())
    }

    fn harvest(&mut self) {
        let mut pages = std::mem::take(&mut self.source.dirty);
        if self.plant == Plant::DropHarvestedBit && self.source.machine.rounds() > 0 {
            pages = pages.runs().skip(1).collect();
        }
        if !self.source.runs {
            self.source.harvests_while_paused += 1;
            if self.source.harvests_while_paused == 2 && self.plant == Plant::SkipHarvestAfterSave {
                pages.clear();
            }
        }
        self.source.debt.union_with(&pages);
        self.later(SourceEvent::Harvested(pages));
    }

    fn send_pages(&mut self, round: u32, pages: &PageSet) {
        self.source.last_round.clone_from(pages);
        let all: Vec<u64> = run_pages(pages).collect();
        if self.source.runs {
            // Re-armed: what was written until now is reported no more.
            self.source.dirty.subtract(pages);
        }
        let mut same = 0;
        for batch in all.chunks(5) {
            let batch = batch.iter().copied();
            let pages = if self.source.runs {
                self.source.named(batch, self.plant)
            } else {
                self.source.contents(batch)
            };
            same += pages.iter().filter(|(_, content)| *content == SAME).count() as u64;
            self.send_batch(round, pages);
        }
        let batches = all.len().div_ceil(5) as u64;
        self.later(SourceEvent::RoundSent { round, batches, bytes: pages.len() * 4096, same });
    }

    fn send_batch(&mut self, round: u32, pages: Pages) {
        let faulty = matches!(self.plant, Plant::NoLedger | Plant::NoDemand);
        if self.rng.random_bool(if faulty { 0.3 } else { 0.03 }) {
            let at = self.now + self.rng.random_range(0..self.net.latency_us * 8);
            self.net.at_on_link(at, Packet::Echo { round, pages: pages.clone() });
        }
        let lane = 1 + self.rng.random_range(0..LANES);
        let batch = Packet::Batch { link: self.net.link, round, pages };
        self.net.send(self.now, &mut self.rng, lane, batch);
    }

    fn serve(&mut self, round: u32, mut owed: PageSet, record: &[PageSet]) -> Result<(), String> {
        if self.destination.lacked.take().is_some_and(|lacked| lacked != owed) {
            return Err("what is served is not what was lacking".into());
        }
        if self.plant == Plant::ServeOnlyUnsent
            && let Some(unsent) = self.source.unsent.take()
        {
            owed.intersect_with(&unsent);
        }
        self.source.serves += 1;
        let record = record.iter().flat_map(PageSet::runs).collect();
        let queue = PushQueue::new(owed, record);
        self.source.serving = Some(Serving { turn: self.source.serves, round, queue });
        for page in std::mem::take(&mut self.source.early_requests) {
            self.requested(page);
        }
        self.tempt_fate();
        Ok(())
    }

    /// The next batch, and when the one after it goes: as it pleases the pace.
    pub(crate) fn push(&mut self, turn: u32) {
        let most = self.rng.random_range(1..8);
        let Some(serving) = self.source.serving.as_mut().filter(|s| s.turn == turn) else { return };
        let (round, runs) = (serving.round, serving.queue.next(most));
        if runs.is_empty() || self.source.dead {
            return;
        }
        let pages = runs.iter().flat_map(|r| r.start..r.end());
        let pages = self.source.named(pages, Plant::Nothing);
        self.send_batch(round, pages);
        let at = self.now + self.rng.random_range(0..self.net.latency_us * 2);
        self.net.at(at, Packet::PushTurn(turn));
    }

    pub(crate) fn requested(&mut self, page: u64) {
        let Some(serving) = &mut self.source.serving else {
            return self.source.early_requests.push(page);
        };
        // Sent even if it was pushed a moment ago.
        serving.queue.fault(page);
        let round = serving.round;
        let pages = self.source.contents(std::iter::once(page));
        let batch = Packet::Batch { link: self.net.link, round, pages };
        self.net.send(self.now, &mut self.rng, URGENT, batch);
    }

    fn stop_serving(&mut self) {
        if let Some(mut serving) = self.source.serving.take() {
            self.source.unsent = Some(serving.queue.next(NEVER).into_iter().collect());
        }
        self.source.early_requests.clear();
    }

    fn rejoin(&mut self, done: u32) {
        self.stop_serving();
        self.drop_link();
        let at = self.now + self.net.latency_us;
        if !self.reachable() {
            let lost = SourceEvent::LinkLost("nobody answers".into());
            return self.net.at(at, Packet::Event(lost));
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
            Progress::Committed => self.tempt_fate(),
            Progress::Running => {
                self.source.lost_at = self.source.lost_at.map(|_| self.now);
                let soon = |w: &mut Self| w.now + w.rng.random_range(0..w.net.latency_us * 30);
                for (planned, what) in [
                    (self.plan.source_dies, Fate::SourceDies),
                    (self.plan.destination_dies_later, Fate::DestinationDies),
                    (self.plan.abandons, Fate::Abandoned),
                ] {
                    if planned {
                        let at = soon(self);
                        self.fate_at(at, what);
                    }
                }
            }
            Progress::InDoubt(_) => self.source.asked = true,
            Progress::LinkLost(_) => {
                self.source.lost_at = Some(self.now);
                if self.source.at_pause.is_none() {
                    self.source.cut_early = true;
                }
                if std::mem::take(&mut self.plan.cancels_rejoining) {
                    let at = self.now + self.rng.random_range(0..3_000_000);
                    self.fate_at(at, Fate::Cancel);
                }
            }
            _ => {}
        }
    }

    fn source_finished(&mut self, outcome: Outcome) -> Result<(), String> {
        self.stop_serving();
        self.net.send(self.now, &mut self.rng, CONTROL, Packet::Closed);
        if let Outcome::Detached { reattach, .. } = &outcome {
            // The longest pause between two attempts, and the longest until a lost link is noticed.
            let limit = self.source.rejoin_for.as_micros() as u64 + 11_000_000;
            let tried = self.source.lost_at.filter(|_| !reattach.is_in_doubt());
            if tried.is_some_and(|lost| self.now > lost + limit) {
                return Err("tried to come back for longer than it was told to".into());
            }
            if self.plant == Plant::ResumeAfterDetach {
                self.source.runs = true;
            }
            let pointless = self.destination_is_gone();
            if self.plan.operator_persists && !pointless && self.net.down_until != NEVER {
                let at = self.now + self.rng.random_range(0..20_000_000);
                self.fate_at(at, Fate::Reattach);
            }
        }
        if self.source.outcome.replace(outcome).is_some() {
            return Err("finished twice".into());
        }
        Ok(())
    }

    pub(crate) fn reattach(&mut self) -> Result<(), String> {
        let Some(Outcome::Detached { reattach, .. }) = self.source.outcome.take() else {
            return Err("nothing to take up again".into());
        };
        self.source.machine = Source::reattach(reattach, self.source.goals, self.source.rejoin_for);
        self.source.began = self.now;
        self.source.lost_at = Some(self.now);
        self.source.reattached = true;
        Ok(())
    }
}
