//! The simulated world: two hosts, the network between them, a clock, and what goes wrong.

#![expect(clippy::cast_possible_truncation, reason = "a simulated machine has 64 pages")]

mod destination_host;
mod judge;
mod memory;
mod network;
mod paging;
mod plan;
mod rounds;
mod serving;
mod source_host;
mod watch;
mod words;

use std::time::Duration;

use ferry_protocol::{DestinationEvent, Goals, Mode, RunPermit, SourceEvent, wire};
use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};

use crate::rules::{Broken, Kept, Rule};
use crate::{End, Plant};
use destination_host::DestinationHost;
use memory::{Memory, PAGES, Stamp, bit};
use network::{Network, Packet};
use plan::Plan;
use source_host::SourceHost;

const SESSION: u128 = 77;
const NEVER: u64 = u64::MAX;
/// Once nothing goes wrong any more, all is over within this virtual time. The longest is a minute until an
/// answer is given up, half a minute in doubt, a minute of attempts to come back, and as long that what came
/// is kept.
const LONGEST_CALM_US: u64 = 240_000_000;
/// No run has as many events: one that has goes in circles.
const MOST_STEPS: u64 = 60_000;

/// A machine before it moves.
struct Departure {
    memory: Memory,
    /// What the destination has of it from an earlier time.
    old: Vec<(u64, Stamp)>,
    permit: RunPermit,
    /// The guest's last write.
    version: u32,
}

/// Hears each event and action, in words.
pub type Listener = Box<dyn FnMut(&str)>;

/// One machine on its way, with all that happens to it.
pub struct World {
    rng: SmallRng,
    plant: Plant,
    plan: Plan,
    now: u64,
    steps: u64,
    /// Nothing went wrong since.
    calm_since: u64,
    net: Network,
    source: SourceHost,
    destination: DestinationHost,
    /// The guest's last write: it counts them, on whichever side it runs.
    version: u32,
    /// What the guest would find in its memory if it had never moved; before it runs at the destination, that is
    /// the source's.
    truth: Option<Memory>,
    /// The link was cut while the source was at work.
    cut: bool,
    listener: Option<Listener>,
}

impl World {
    /// A world in which goes wrong what the seed says; with a fault of our own, or [`Plant::Nothing`].
    pub fn new(seed: u64, plant: Plant) -> Self {
        let mut w = Self::quiet(seed);
        w.plant = plant;
        w.plan_trouble();
        w
    }

    /// A world in which nothing goes wrong.
    pub fn quiet(seed: u64) -> Self {
        let mut rng = SmallRng::seed_from_u64(seed);
        let resident = (0..PAGES).filter(|_| rng.random_bool(0.7)).fold(0, |m, p| m | bit(p));
        let memory = Memory::first_versions(resident);
        // Some pages as they once were, some as they never were, if there is an old copy at all.
        let share = [0.0, 0.9][rng.random_range(0..2)];
        let old: Vec<u64> = (0..PAGES).filter(|_| rng.random_bool(share)).collect();
        let version = |rng: &mut SmallRng| if rng.random_bool(0.7) { 1 } else { 7 << 20 };
        let old = old.into_iter().map(|p| (p, Stamp::new(p, version(&mut rng)))).collect();
        let permit = RunPermit::for_new_machine(1);
        let mut world = Self::leg(rng, Departure { memory, old, permit, version: 1 });
        world.plan.round_trip = world.rng.random_bool(0.3);
        world
    }

    fn leg(mut rng: SmallRng, departure: Departure) -> Self {
        let modes = [Mode::Auto, Mode::PreCopy, Mode::PostCopy, Mode::Hybrid];
        let mode = modes[rng.random_range(0..modes.len())];
        let mut goals = Goals::default();
        if mode != Mode::PreCopy && rng.random_bool(0.7) {
            // Less than any switchover is expected to take.
            goals.max_downtime = Duration::from_millis(1);
            goals.max_total = Duration::from_secs(2);
        }
        let latency_us = rng.random_range(10..3000);
        let Departure { memory, old, permit, version } = departure;
        Self {
            source: SourceHost::new(&mut rng, (goals, mode), memory, permit),
            destination: DestinationHost::new(old),
            net: Network::new(latency_us),
            plant: Plant::Nothing,
            plan: Plan::default(),
            now: 0,
            steps: 0,
            calm_since: 0,
            version,
            truth: None,
            cut: false,
            listener: None,
            rng,
        }
    }

    /// The same, with someone who hears of everything.
    #[must_use]
    pub fn heard_by(mut self, listener: Listener) -> Self {
        self.listener = Some(listener);
        self
    }

    /// Runs to the end, perhaps there and back.
    ///
    /// # Errors
    /// A rule was broken.
    pub fn run(mut self) -> Result<End, Broken> {
        let round_trip = self.plan.round_trip;
        let end = self.run_leg()?;
        match self.departure_back() {
            Some(departure) if round_trip && end.moved() => {
                let mut back = Self::leg(self.rng, departure);
                back.plant = self.plant;
                back.listener = self.listener;
                if self.plan.troubled {
                    back.plan_trouble();
                }
                back.tell("fate", || "the machine goes back to where it came from".into());
                let end = back.run_leg()?;
                Ok(if end.moved() { End::MovedThereAndBack } else { end })
            }
            _ => Ok(end),
        }
    }

    /// The machine where it arrived, and what its source kept of it.
    fn departure_back(&mut self) -> Option<Departure> {
        let memory = self.truth.filter(|_| self.destination.runs)?;
        let permit = self.destination.permit.take()?;
        let kept = self.source.at_pause?;
        let old = (0..PAGES).map(|p| (p, kept[p])).filter(|(_, stamp)| !stamp.is_zero());
        let old = if self.rng.random_bool(0.8) { old.collect() } else { Vec::new() };
        Some(Departure { memory, old, permit, version: self.version })
    }

    fn run_leg(&mut self) -> Kept<End> {
        self.feed_source(SourceEvent::Connected)?;
        loop {
            let over = self.source.outcome.is_some() || self.source.dead;
            if over && self.net.is_empty() && self.destination.deadline().is_none() {
                return self.judge();
            }
            self.step()?;
        }
    }

    fn step(&mut self) -> Kept {
        let packet_at = self.net.next_at();
        let (here, there) = (self.source.deadline(), self.destination.deadline());
        let next = [packet_at, here, there].into_iter().flatten().min();
        let Some(next) = next else { return Err(self.stuck()) };
        let before = self.now;
        self.now = next.max(self.now);
        self.steps += 1;
        self.source_guest_writes(self.now - before);
        self.destination_guest_runs()?;
        if packet_at.is_some_and(|t| t <= self.now) {
            if let Some(packet) = self.net.pop() {
                self.arrive(packet)?;
            }
        } else if here == Some(next) {
            self.feed_source(SourceEvent::Tick)?;
        } else {
            self.feed_destination(DestinationEvent::Tick)?;
        }
        self.watch()
    }

    /// What travels comes, unless something befalls its link just before.
    fn arrive(&mut self, packet: Packet) -> Kept {
        let Some(travels) = packet.travels().filter(|_| self.plan.troubled) else {
            return self.deliver(packet);
        };
        if self.strike(travels, true)? {
            return Ok(());
        }
        self.deliver(packet)?;
        self.strike(travels, false).map(drop)
    }

    fn deliver(&mut self, packet: Packet) -> Kept {
        match packet {
            Packet::ToDestination(link, bytes) => {
                if !self.destination.listens_to(link) && self.plant != Plant::OldLinksCount {
                    return Ok(());
                }
                self.feed_destination(DestinationEvent::Message(decoded(&bytes)?))
            }
            Packet::ToSource(link, bytes) => {
                if link != self.net.link && self.plant != Plant::OldLinksCount {
                    return Ok(());
                }
                self.feed_source(SourceEvent::Message(decoded(&bytes)?))
            }
            Packet::Batch(batch) => self.pages_came(batch),
            Packet::Ack { turn, bytes, sent_at } => {
                self.acknowledged(turn, bytes, sent_at);
                Ok(())
            }
            Packet::UrgentOpen => self.urgent_open(),
            Packet::Request(page) => self.requested(page),
            Packet::Hello { done } => self.hello_again(done),
            Packet::Closed => self.destination_lost(self.net.link),
            Packet::SourceLost(link) if link != self.net.link => Ok(()),
            Packet::SourceLost(_) => self.feed_source(SourceEvent::LinkLost("link cut".into())),
            Packet::DestinationLost(link) => self.destination_lost(link),
            Packet::DestinationLaneLost(link) if link != self.destination.link => Ok(()),
            Packet::DestinationLaneLost(_) => {
                self.feed_destination(DestinationEvent::LinkLost("a lane broke".into()))
            }
            Packet::Event(process, e) if process == self.source.process => self.feed_source(e),
            Packet::Event(..) => Ok(()),
            Packet::DestinationEvent(e) => self.feed_destination(e),
            Packet::RoundTurn(round) => {
                self.send_more(round);
                Ok(())
            }
            Packet::PushTurn(turn) => {
                self.push(turn);
                Ok(())
            }
            Packet::Fault { vcpu, page } => self.fault(vcpu, page),
            Packet::Installed { round, page, content } => self.installed(round, page, content),
            Packet::InstallLate(batch) => self.install(&batch),
            Packet::Discard => self.discard(),
            Packet::Fate(fate) => self.befall(fate),
        }
    }

    fn tell(&mut self, who: &str, words: impl FnOnce() -> String) {
        if let Some(listener) = &mut self.listener {
            listener(&format!("{:>12.3} ms  {who:<15} {}", self.now as f64 / 1e3, words()));
        }
    }

    /// The guest writes `page`: something new, zeros, or what it had there once.
    fn next_content(&mut self, page: u64) -> Stamp {
        match self.rng.random_range(0..20) {
            0 | 1 => Stamp::ZERO,
            2 => Stamp::new(page, 1),
            _ => {
                self.version += 1;
                Stamp::new(page, self.version)
            }
        }
    }
}

fn decoded<T: serde::de::DeserializeOwned>(bytes: &[u8]) -> Kept<T> {
    wire::decode(bytes).map_err(|e| Rule::Peace.broken(e.to_string()))
}
