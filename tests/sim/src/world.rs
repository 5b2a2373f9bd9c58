//! The simulated world: two hosts, the network between them, a clock, and what goes wrong.

#![expect(clippy::cast_possible_truncation, reason = "a simulated machine has 64 pages")]

mod destination_host;
mod judge;
mod network;
mod source_host;

use std::time::Duration;

use ferry_protocol::{DestinationEvent, Goals, Mode, SourceEvent};
use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};

use destination_host::DestinationHost;
use network::{Fate, Network, Packet};
use source_host::SourceHost;

const PAGES: u64 = 64;
const SESSION: u128 = 77;
const NEVER: u64 = u64::MAX;

/// A fault of our own, planted to see that the checks find it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Plant {
    Nothing,
    DropHarvestedBit,
    SkipHarvestAfterSave,
    /// The destination installs without asking the ledger, and lanes deliver a page twice.
    NoLedger,
    ResumeAfterCommit,
    /// Copies of owed pages that came before the hand-over stay where the guest sees them.
    KeepStaleCopies,
    /// Pages that come after the hand-over are installed without asking `Demand`.
    NoDemand,
    /// After a lost link, the source serves what it had not sent.
    ServeOnlyUnsent,
    ResumeAfterDetach,
    /// To a source that comes back, the destination says that it has every page that ever came.
    ClaimOldPages,
    /// The destination takes a commit that an old link brings after the source came back.
    TakeLateCommit,
    /// The destination's old copy is not the one that it told the digests of.
    StaleCopy,
    /// The source compares pages with the old copy as they were before they were re-armed.
    CompareBeforeRearm,
    /// The destination does not say that it lacks pages of its old copy.
    SilentlyLacking,
}

/// In place of what a page holds: what the destination's old copy has.
const SAME: u64 = u64::MAX;

/// How a run ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    Moved,
    MovedAfterInquiry,
    MovedByPostCopy,
    /// The link was lost before the commit, and the source came back.
    MovedAfterCut,
    /// The link was lost while pages were owed, and the source came back.
    MovedAfterRejoin,
    ReattachedAndMoved,
    StayedAndRuns,
    ReclaimedAfterInquiry,
    /// Taken up again, the source learned that the destination never ran the machine.
    ReattachedAndReclaimed,
    PausedInDoubt,
    Detached,
    /// The source died while it owed pages; what the destination has not got is lost.
    SourceDied,
}

/// What goes wrong in a run, beside what waits in the network from the start.
#[derive(Default)]
struct Plan {
    /// Cuts to come after the one before was mended, or after the commit.
    more_cuts: u32,
    /// The network does not come back after a cut, or only after very long.
    stays_down: bool,
    long_outages: bool,
    cut_kills_destination: bool,
    /// The process that answers in place of the dead one knows no session; otherwise nobody answers.
    destination_restarts: bool,
    destination_dies_later: bool,
    source_dies: bool,
    cancels_rejoining: bool,
    operator_persists: bool,
    refuse_load: bool,
    refuse_paging: bool,
    no_post_copy: bool,
    paging_breaks: bool,
    abandons: bool,
    discards: bool,
    /// Pages of the old copy cannot be read.
    old_copy_damaged: bool,
}

pub struct World {
    rng: SmallRng,
    plant: Plant,
    plan: Plan,
    mode: Mode,
    now: u64,
    net: Network,
    source: SourceHost,
    destination: DestinationHost,
    /// The link was cut while the source was at work.
    cut: bool,
    /// Print each event and action.
    pub traced: bool,
}

impl World {
    pub fn new(seed: u64, plant: Plant) -> Self {
        let mut w = Self::quiet(seed);
        w.plant = plant;
        let horizon =
            60_000 + w.net.latency_us * 40 + if w.mode == Mode::PostCopy { 100_000 } else { 0 };
        if w.rng.random_bool(0.5) {
            let at = w.rng.random_range(0..horizon);
            w.fate_at(at, Fate::Cut);
        }
        if w.rng.random_bool(0.2) {
            let at = w.rng.random_range(0..horizon);
            w.fate_at(at, Fate::Cancel);
        }
        let rng = &mut w.rng;
        w.plan = Plan {
            more_cuts: if rng.random_bool(0.5) { rng.random_range(0..5) } else { 0 },
            stays_down: rng.random_bool(0.15),
            long_outages: rng.random_bool(0.3),
            cut_kills_destination: rng.random_bool(0.15),
            destination_restarts: rng.random_bool(0.5),
            destination_dies_later: rng.random_bool(0.05),
            source_dies: rng.random_bool(0.05),
            cancels_rejoining: rng.random_bool(0.1),
            operator_persists: rng.random_bool(0.7),
            refuse_load: rng.random_bool(0.05),
            refuse_paging: rng.random_bool(0.03),
            no_post_copy: rng.random_bool(0.08),
            paging_breaks: rng.random_bool(0.04),
            abandons: rng.random_bool(0.04),
            discards: rng.random_bool(0.1),
            old_copy_damaged: rng.random_bool(0.2),
        };
        w
    }

    /// A world in which nothing goes wrong.
    pub fn quiet(seed: u64) -> Self {
        let mut rng = SmallRng::seed_from_u64(seed);
        let modes = [Mode::Auto, Mode::PreCopy, Mode::PostCopy, Mode::Hybrid];
        let mode = modes[rng.random_range(0..modes.len())];
        let mut goals = Goals::default();
        if mode != Mode::PreCopy && rng.random_bool(0.7) {
            // Less than any switchover is expected to take.
            goals.max_downtime = Duration::from_millis(1);
            goals.max_total = Duration::from_secs(2);
        }
        let latency_us = rng.random_range(10..3000);
        let source = SourceHost::new(&mut rng, (goals, mode));
        let destination = DestinationHost::new(source.old_copy(&mut rng));
        Self {
            source,
            destination,
            net: Network::new(latency_us),
            plant: Plant::Nothing,
            plan: Plan::default(),
            mode,
            now: 0,
            cut: false,
            traced: false,
            rng,
        }
    }

    /// Runs to the end; an error is a broken rule.
    pub fn run(mut self) -> Result<End, String> {
        self.feed_source(SourceEvent::Connected)?;
        for _ in 0..200_000 {
            let over = self.source.outcome.is_some() || self.source.dead;
            if over && self.net.is_empty() && self.destination.deadline().is_none() {
                break;
            }
            self.step()?;
        }
        self.judge()
    }

    fn step(&mut self) -> Result<(), String> {
        let packet_at = self.net.next_at();
        let (here, there) = (self.source.deadline(), self.destination.deadline());
        let next = [packet_at, here, there].into_iter().flatten().min();
        let Some(next) = next else { return Err(self.stuck()) };
        let before = self.now;
        self.now = next.max(self.now);
        self.source_guest_writes(self.now - before);
        self.destination_guest_runs()?;
        if packet_at.is_some_and(|t| t <= self.now) {
            let packet = self.net.pop().unwrap();
            self.deliver(packet)?;
        } else if here == Some(next) {
            self.feed_source(SourceEvent::Tick)?;
        } else {
            self.feed_destination(DestinationEvent::Tick)?;
        }
        if self.source.runs && self.destination.ever_ran {
            return Err("the machine runs twice".into());
        }
        Ok(())
    }

    fn deliver(&mut self, packet: Packet) -> Result<(), String> {
        match packet {
            Packet::ToDestination(m) => self.feed_destination(DestinationEvent::Message(m)),
            Packet::ToSource(m) => self.feed_source(SourceEvent::Message(m)),
            Packet::Batch { link, round, pages } => {
                self.pages_came(round, &pages, self.destination.listens_to(link))
            }
            Packet::Echo { round, pages } => self.pages_came(round, &pages, false),
            Packet::UrgentOpen => self.urgent_open(),
            Packet::Request(page) => {
                self.requested(page);
                Ok(())
            }
            Packet::Hello { done } => self.hello_again(done),
            Packet::Closed => self.destination_lost(self.net.link),
            Packet::SourceLost(link) if link != self.net.link => Ok(()),
            Packet::SourceLost(_) => self.feed_source(SourceEvent::LinkLost("link cut".into())),
            Packet::DestinationLost(link) => self.destination_lost(link),
            Packet::Event(e) => self.feed_source(e),
            Packet::DestinationEvent(e) => self.feed_destination(e),
            Packet::PushTurn(turn) => {
                self.push(turn);
                Ok(())
            }
            Packet::Fault { vcpu, page } => self.fault(vcpu, page),
            Packet::Installed { round, page, content } => self.installed(round, page, content),
            Packet::Discard => self.discard(),
            Packet::Fate(m) => self.befall(m),
        }
    }

    fn trace(&self, words: impl FnOnce() -> String) {
        if self.traced {
            println!("{:>9.3} ms  {}", self.now as f64 / 1e3, words());
        }
    }

    fn fate_at(&mut self, at: u64, fate: Fate) {
        self.net.at(at, Packet::Fate(fate));
    }

    fn befall(&mut self, fate: Fate) -> Result<(), String> {
        self.trace(|| format!("fate           {fate:?}"));
        match fate {
            Fate::Cut => {
                if self.plan.cut_kills_destination && !self.destination.ever_ran {
                    self.destination.die();
                }
                self.cut_link();
            }
            Fate::Cancel => self.feed_source(SourceEvent::Cancel)?,
            Fate::SourceDies => {
                self.source.dead = self.source.outcome.is_none();
                if self.source.dead {
                    self.cut_link();
                }
            }
            Fate::DestinationDies => {
                self.destination.die();
                self.cut_link();
            }
            Fate::PagingBreaks => self.paging_breaks()?,
            Fate::Abandoned => self.abandon()?,
            Fate::Reattach => self.reattach()?,
        }
        Ok(())
    }

    /// The network breaks: what is on the link is lost, and both ends learn of it in their own time.
    fn cut_link(&mut self) {
        if self.source.outcome.is_none() {
            self.cut = true;
        }
        let outage = match (self.plan.stays_down, self.plan.long_outages) {
            (true, _) if self.rng.random_bool(0.5) => NEVER,
            (_, true) => self.rng.random_range(0..90_000_000),
            _ => self.rng.random_range(0..2_000_000),
        };
        self.net.down_until = self.net.down_until.max(self.now.saturating_add(outage));
        self.drop_link();
        let link = self.net.link;
        // Each channel says so, and the first is not always the only one.
        for _ in 0..self.rng.random_range(1..3) {
            let at = self.now + self.notice();
            self.net.at(at, Packet::SourceLost(link));
        }
    }

    /// Nothing comes or goes on the link any more; the destination learns of it later.
    fn drop_link(&mut self) {
        if self.net.lose_link(&mut self.rng) {
            let at = self.now + self.notice();
            self.net.at(at, Packet::DestinationLost(self.net.link));
        }
    }

    /// How long until a host notices.
    fn notice(&mut self) -> u64 {
        let most = if self.rng.random_bool(0.5) { 20_000 } else { 5_000_000 };
        self.rng.random_range(0..most)
    }

    /// The commit is out, or the source is back: time for the next cut.
    fn tempt_fate(&mut self) {
        if self.plan.more_cuts > 0 {
            self.plan.more_cuts -= 1;
            let soon = self.now + self.rng.random_range(0..self.net.latency_us * 30);
            self.fate_at(soon, Fate::Cut);
        }
    }

    fn reachable(&mut self) -> bool {
        let answers = !self.destination.dead || self.plan.destination_restarts;
        self.now >= self.net.down_until && answers && self.rng.random_bool(0.8)
    }
}

fn run_pages(pages: &ferry_pages::PageSet) -> impl Iterator<Item = u64> + '_ {
    pages.runs().flat_map(|r| r.start..r.end())
}

/// Of a page's place and content; nothing for a zero page.
fn digest(page: u64, content: u64) -> u64 {
    if content == 0 { 0 } else { (content << 8 | page).wrapping_mul(0x9e37_79b9_7f4a_7c15) }
}
