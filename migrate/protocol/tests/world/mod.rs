//! The simulated world: guest, two hosts, network, clock.

#![expect(clippy::cast_possible_truncation, reason = "a simulated machine has 64 pages")]

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use ferry_pages::{PageSet, Run};
use ferry_postcopy::{Admission, ChunkLedger};
use ferry_protocol::{
    Arrival, Destination, DestinationAction, DestinationEvent, Goals, MachineSpec, Outcome,
    RunPermit, Source, SourceAction, SourceEvent, ToDestination, ToSource, Verdict,
};
use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};

const PAGES: u64 = 64;
const LANES: usize = 3;
const SESSION: u128 = 77;

/// A fault of our own, planted to see that the checks find it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Plant {
    Nothing,
    DropHarvestedBit,
    SkipHarvestAfterSave,
    /// The destination installs without asking the ledger, and lanes deliver a page twice.
    NoLedger,
    ResumeAfterCommit,
}

/// How a run ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum End {
    Moved,
    MovedAfterInquiry,
    StayedAndRuns,
    ReclaimedAfterInquiry,
    PausedInDoubt,
}

#[derive(Debug)]
enum Packet {
    ToDestination(ToDestination),
    ToSource(ToSource),
    Batch {
        round: u32,
        pages: Vec<(u64, u64)>,
    },
    /// A second copy of a batch, which only a faulty lane makes.
    Echo {
        round: u32,
        pages: Vec<(u64, u64)>,
    },
    /// An inquiry on a connection of its own, and its answer.
    Inquiry,
    Answer(Option<Verdict>),
    SourceLost,
    DestinationLost,
    Event(SourceEvent),
    DestinationEvent(DestinationEvent),
}

pub(crate) struct World {
    rng: SmallRng,
    plant: Plant,
    now: u64,
    source: Source,
    destination: Destination,
    /// In flight: time and a number that keeps each channel's order.
    packets: BTreeMap<(u64, u64), Packet>,
    serial: u64,
    channel_free_at: [u64; 4],
    guest: Vec<u64>,
    guest_dirty: PageSet,
    tracking: bool,
    source_runs: bool,
    copy: Vec<u64>,
    ledger: ChunkLedger,
    destination_runs: bool,
    memory_at_pause: Option<Vec<u64>>,
    held_permit: Option<RunPermit>,
    writes_per_ms: u64,
    latency_us: u64,
    cut_at: Option<u64>,
    cut: bool,
    destination_dies: bool,
    destination_dead: bool,
    network_heals: bool,
    cancel_at: Option<u64>,
    asked: bool,
    refuse_load: bool,
    harvests_while_paused: u32,
    outcome: Option<Outcome>,
    arrival: Option<Arrival>,
    returned: PageSet,
    /// Harvested, and not installed at the destination since.
    debt: PageSet,
    source_actions: VecDeque<SourceAction>,
}

impl World {
    pub(crate) fn new(seed: u64, plant: Plant) -> Self {
        let mut w = Self::quiet(seed);
        w.plant = plant;
        let horizon = 60_000 + w.latency_us * 40;
        if w.rng.random_bool(0.5) {
            w.cut_at = Some(w.rng.random_range(0..horizon));
            w.network_heals = w.rng.random_bool(0.7);
            w.destination_dies = w.rng.random_bool(0.2);
        }
        if w.rng.random_bool(0.2) {
            w.cancel_at = Some(w.rng.random_range(0..horizon));
        }
        w.refuse_load = w.rng.random_bool(0.05);
        w
    }

    pub(crate) fn quiet(seed: u64) -> Self {
        let mut rng = SmallRng::seed_from_u64(seed);
        let spec = MachineSpec {
            name: "m".into(),
            vmm: "world".into(),
            extents: vec![(0, PAGES)],
            vcpus: 1,
            cpu_features: Vec::new(),
            devices: Vec::new(),
            config: Vec::new(),
        };
        let writes_per_ms = rng.random_range(0..4);
        let latency_us = rng.random_range(10..3000);
        let guest = (0..PAGES).map(|p| if rng.random_bool(0.7) { p + 1 } else { 0 }).collect();
        Self {
            rng,
            plant: Plant::Nothing,
            now: 0,
            source: Source::new(spec, 0b1111, 3, Goals::default()),
            destination: Destination::new(SESSION, 0b0111),
            packets: BTreeMap::new(),
            serial: 0,
            channel_free_at: [0; 4],
            guest,
            guest_dirty: PageSet::new(),
            tracking: false,
            source_runs: true,
            copy: vec![0; PAGES as usize],
            ledger: ChunkLedger::default(),
            destination_runs: false,
            memory_at_pause: None,
            held_permit: Some(RunPermit::for_new_machine(1)),
            writes_per_ms,
            latency_us,
            cut_at: None,
            cut: false,
            destination_dies: false,
            destination_dead: false,
            network_heals: true,
            cancel_at: None,
            asked: false,
            refuse_load: false,
            harvests_while_paused: 0,
            outcome: None,
            arrival: None,
            returned: PageSet::new(),
            debt: PageSet::new(),
            source_actions: VecDeque::new(),
        }
    }

    /// Runs to the end; an error is a broken rule.
    pub(crate) fn run(mut self) -> Result<End, String> {
        self.feed_source(SourceEvent::Connected)?;
        for _ in 0..200_000 {
            if self.outcome.is_some() && self.packets.is_empty() {
                break;
            }
            self.step()?;
        }
        self.judge()
    }

    fn step(&mut self) -> Result<(), String> {
        let packet_at = self.packets.keys().next().map(|k| k.0);
        let deadline = self.source.deadline().map(|d| d.as_micros() as u64);
        let next = [packet_at, deadline, self.cancel_at, self.cut_at].into_iter().flatten().min();
        let Some(next) = next else { return Err("nothing will ever happen again".into()) };
        let before = self.now;
        self.now = next.max(self.now);
        self.guest_writes(self.now - before);
        if self.cut_at.is_some_and(|t| t <= self.now) {
            self.cut_at = None;
            self.cut_link();
        } else if self.cancel_at.is_some_and(|t| t <= self.now) {
            self.cancel_at = None;
            self.feed_source(SourceEvent::Cancel)?;
        } else if packet_at.is_some_and(|t| t <= self.now) {
            let (_, packet) = self.packets.pop_first().unwrap();
            self.deliver(packet)?;
        } else {
            self.feed_source(SourceEvent::Tick)?;
        }
        if self.source_runs && self.destination_runs {
            return Err("the machine runs twice".into());
        }
        Ok(())
    }

    fn guest_writes(&mut self, us: u64) {
        let budget = (us.min(20_000) * self.writes_per_ms).div_ceil(1000);
        for _ in 0..budget.min(200) {
            if self.source_runs {
                self.write_page();
            }
        }
    }

    fn write_page(&mut self) {
        let page = self.rng.random_range(0..PAGES);
        self.guest[page as usize] += 1000;
        if self.tracking {
            self.guest_dirty.insert(page);
        }
    }

    /// The link breaks: what is on it is lost, and both ends learn of it in their own time.
    fn cut_link(&mut self) {
        self.cut = true;
        self.packets.retain(|_, p| matches!(p, Packet::Event(_) | Packet::DestinationEvent(_)));
        if self.destination_dies && !self.destination_runs {
            self.destination_dead = true;
            self.packets.retain(|_, p| !matches!(p, Packet::DestinationEvent(_)));
        }
        let late = self.rng.random_range(0..5_000_000);
        self.put_at(self.now + late, Packet::SourceLost);
        let late = self.rng.random_range(0..5_000_000);
        self.put_at(self.now + late, Packet::DestinationLost);
    }

    fn put_at(&mut self, at: u64, packet: Packet) {
        self.serial += 1;
        self.packets.insert((at, self.serial), packet);
    }

    /// Puts a packet on channel 0 (control, either way) or a lane: delayed, never reordered within.
    fn put(&mut self, channel: usize, packet: Packet) {
        if self.cut {
            return;
        }
        let delay = self.latency_us + self.rng.random_range(0..self.latency_us * 2);
        let at = (self.now + delay).max(self.channel_free_at[channel]);
        self.channel_free_at[channel] = at;
        self.put_at(at, packet);
    }

    fn deliver(&mut self, packet: Packet) -> Result<(), String> {
        match packet {
            Packet::ToDestination(m) => self.feed_destination(DestinationEvent::Message(m)),
            Packet::ToSource(m) => self.feed_source(SourceEvent::Message(m)),
            Packet::Batch { round, pages } => {
                self.install(round, &pages);
                self.feed_destination(DestinationEvent::Installed { round })
            }
            Packet::Echo { round, pages } => {
                self.install(round, &pages);
                Ok(())
            }
            Packet::Inquiry => {
                let verdict = (!self.destination_dead).then(|| self.destination.verdict());
                let at = self.now + self.latency_us;
                self.put_at(at, Packet::Answer(verdict));
                Ok(())
            }
            Packet::Answer(Some(verdict)) => {
                self.feed_source(SourceEvent::Message(ToSource::Verdict(verdict)))
            }
            Packet::Answer(None) => {
                self.feed_source(SourceEvent::LinkLost("nobody answers".into()))
            }
            Packet::SourceLost => self.feed_source(SourceEvent::LinkLost("link cut".into())),
            Packet::DestinationLost if self.destination_dead => Ok(()),
            Packet::DestinationLost => {
                self.feed_destination(DestinationEvent::LinkLost("link cut".into()))
            }
            Packet::Event(e) => self.feed_source(e),
            Packet::DestinationEvent(e) => self.feed_destination(e),
        }
    }

    fn install(&mut self, round: u32, pages: &[(u64, u64)]) {
        if self.destination_runs || self.destination_dead {
            return;
        }
        for &(page, value) in pages {
            let admission = self.ledger.admit(page as usize, round, value);
            if admission != Admission::Late || self.plant == Plant::NoLedger {
                self.copy[page as usize] = value;
            }
            self.debt.remove(page);
        }
    }

    fn feed_source(&mut self, event: SourceEvent) -> Result<(), String> {
        self.source.handle(Duration::from_micros(self.now), event);
        while let Some(action) = self.source.poll() {
            self.source_actions.push_back(action);
        }
        while let Some(action) = self.source_actions.pop_front() {
            self.act_source(action)?;
        }
        Ok(())
    }

    fn later(&mut self, event: SourceEvent) {
        let at = self.now + self.rng.random_range(1..800);
        self.put_at(at, Packet::Event(event));
    }

    fn act_source(&mut self, action: SourceAction) -> Result<(), String> {
        match action {
            SourceAction::Send(m) => {
                let committed = matches!(m, ToDestination::Commit { .. });
                self.put(0, Packet::ToDestination(m));
                if committed && self.plant == Plant::ResumeAfterCommit {
                    self.source_runs = true;
                }
            }
            SourceAction::OpenLanes { session, codecs } => {
                if session != SESSION || codecs != 0b0111 {
                    return Err("negotiated something else".into());
                }
                self.later(SourceEvent::LanesOpen);
            }
            SourceAction::StartTracking => {
                self.tracking = true;
                let resident =
                    (0..PAGES).filter(|p| self.guest[*p as usize] != 0).map(|p| Run::new(p, 1));
                let resident = resident.collect();
                self.later(SourceEvent::TrackingStarted(resident));
            }
            SourceAction::Harvest => {
                let mut pages = std::mem::take(&mut self.guest_dirty);
                if self.plant == Plant::DropHarvestedBit && self.source.rounds() > 0 {
                    pages = pages.runs().skip(1).collect();
                }
                if !self.source_runs {
                    self.harvests_while_paused += 1;
                    if self.harvests_while_paused == 2 && self.plant == Plant::SkipHarvestAfterSave
                    {
                        pages.clear();
                    }
                }
                self.debt.union_with(&pages);
                self.later(SourceEvent::Harvested(pages));
            }
            SourceAction::SendPages { round, pages } => self.send_pages(round, &pages),
            SourceAction::Pause => {
                self.source_runs = false;
                let permit = self.held_permit.take().ok_or("paused without a permit")?;
                self.later(SourceEvent::Paused(permit));
            }
            SourceAction::SaveState => {
                // Draining devices dirties memory.
                self.write_page();
                self.memory_at_pause = Some(self.guest.clone());
                self.later(SourceEvent::StateSaved(vec![1, 2, 3]));
            }
            SourceAction::Resume(permit) => {
                self.held_permit = Some(permit);
                self.source_runs = true;
            }
            SourceAction::ReturnDirty(pages) => self.returned.union_with(&pages),
            SourceAction::StopTracking => self.tracking = false,
            SourceAction::Inquire { .. } => {
                self.asked = true;
                let reachable = self.network_heals && self.rng.random_bool(0.5);
                let at = self.now + self.latency_us;
                let packet = if reachable { Packet::Inquiry } else { Packet::Answer(None) };
                self.put_at(at, packet);
            }
            SourceAction::DigestMemory => {
                let sum = self.guest.iter().fold(0u64, |s, v| s.wrapping_add(*v));
                self.later(SourceEvent::MemoryDigest(sum));
            }
            SourceAction::Tell(_) => {}
            SourceAction::Finish(outcome) => {
                if self.outcome.replace(outcome).is_some() {
                    return Err("finished twice".into());
                }
            }
        }
        Ok(())
    }

    fn send_pages(&mut self, round: u32, pages: &PageSet) {
        let mut batches = 0;
        let all: Vec<u64> = pages.runs().flat_map(|r| r.start..r.end()).collect();
        for batch in all.chunks(5) {
            let pages: Vec<_> = batch.iter().map(|p| (*p, self.guest[*p as usize])).collect();
            let lane = 1 + self.rng.random_range(0..LANES);
            if self.plant == Plant::NoLedger && self.rng.random_bool(0.3) {
                let at = self.now + self.rng.random_range(0..self.latency_us * 8);
                self.put_at(at, Packet::Echo { round, pages: pages.clone() });
            }
            self.put(lane, Packet::Batch { round, pages });
            batches += 1;
        }
        self.later(SourceEvent::RoundSent { round, batches, bytes: pages.len() * 4096 });
    }

    fn feed_destination(&mut self, event: DestinationEvent) -> Result<(), String> {
        if self.destination_dead {
            return Ok(());
        }
        self.destination.handle(Duration::from_micros(self.now), event);
        while let Some(action) = self.destination.poll() {
            let answer = match action {
                DestinationAction::Send(m) => {
                    self.put(0, Packet::ToSource(m));
                    continue;
                }
                DestinationAction::Build(_) => DestinationEvent::Built(Ok(())),
                DestinationAction::AcceptLanes { .. } => continue,
                DestinationAction::Load(state) if state == [1, 2, 3] && !self.refuse_load => {
                    DestinationEvent::Loaded(Ok(()))
                }
                DestinationAction::Load(_) => DestinationEvent::Loaded(Err("bad section".into())),
                DestinationAction::Resume(_permit) => {
                    self.destination_runs = true;
                    DestinationEvent::Resumed(Ok(()))
                }
                DestinationAction::Digest => DestinationEvent::Digest(self.ledger.digest_sum()),
                DestinationAction::Finish(arrival) => {
                    if self.arrival.replace(arrival).is_some() {
                        return Err("the destination finished twice".into());
                    }
                    continue;
                }
            };
            let at = self.now + self.rng.random_range(1..800);
            self.put_at(at, Packet::DestinationEvent(answer));
        }
        Ok(())
    }

    fn judge(self) -> Result<End, String> {
        let outcome = self.outcome.as_ref().ok_or("the source never finished")?;
        if self.destination_runs {
            let expected = self.memory_at_pause.as_ref().ok_or("runs without ever being paused")?;
            if &self.copy != expected {
                return Err("the machine runs on memory that is not the guest's".into());
            }
        }
        match outcome {
            Outcome::Completed { digest_verified, .. } => {
                if !self.destination_runs || self.source_runs {
                    return Err("completed, and does not run there".into());
                }
                if *digest_verified != Some(true) && !self.cut {
                    return Err("digests differ".into());
                }
                Ok(if self.asked { End::MovedAfterInquiry } else { End::Moved })
            }
            Outcome::InDoubt { .. } if self.source_runs => Err("in doubt, and runs here".into()),
            Outcome::InDoubt { .. } => Ok(End::PausedInDoubt),
            Outcome::Cancelled | Outcome::Refused(_) | Outcome::Failed(_) => {
                if !self.source_runs || self.destination_runs || self.tracking {
                    return Err(format!("{outcome:?}, and the source does not simply run on"));
                }
                if self.destination.verdict() == Verdict::Ran {
                    return Err("the destination believes that it ran".into());
                }
                let mut unpaid = self.debt;
                unpaid.subtract(&self.returned);
                if !unpaid.is_empty() {
                    return Err(format!("dirty bits lost: {unpaid:?}"));
                }
                Ok(if self.asked { End::ReclaimedAfterInquiry } else { End::StayedAndRuns })
            }
        }
    }
}
