//! The destination's host: what the engine does for `Destination`, and memory that fills until the hand-over.

use std::time::Duration;

use ferry_pages::{PageSet, Run};
use ferry_postcopy::{Admission, ChunkLedger, Demand};
use ferry_protocol::{
    Arrival, Built, Destination, DestinationAction, DestinationEvent, Recalled, RunPermit,
    ToSource, Verdict,
};
use rand::RngExt;

use super::memory::{Mask, Memory, PAGES, Stamp, bit, mask, pages, set};
use super::network::{ACKS, Batch, CONTROL, Kind, Packet, Pages, named};
use super::paging::{LOADER, Touch, VCPUS};
use super::plan::Plan;
use super::{Plant, SESSION, World};
use crate::rules::{Kept, Rule};

pub(crate) struct DestinationHost {
    pub(super) machine: Destination,
    pub(super) copy: Memory,
    /// What a bundle has of the machine.
    old: Vec<(u64, Stamp)>,
    pub(super) old_by_page: [Option<Stamp>; PAGES as usize],
    /// Owed, named, and not to be had from it.
    pub(super) lacking: Mask,
    /// Pages that are absent fault, once it is so arranged.
    pub(super) absent: Mask,
    pub(super) ledger: ChunkLedger,
    /// What the ledger must have: round and serial number of each page's copy.
    newest: [(u32, u32); PAGES as usize],
    /// Pages of the rounds before the hand-over are not taken any more.
    closed: bool,
    /// The last of them.
    pub(super) after: u32,
    pub(super) demand: Option<Demand>,
    /// What it says to be owed and not here.
    pub(super) missing: Mask,
    /// Admitted and being copied: nothing is discarded meanwhile.
    pub(super) copying: Mask,
    pub(super) waiting: [Option<Touch>; VCPUS + 1],
    /// The newest link that the source came by, and whether its urgent channel is open.
    pub(super) link: u32,
    /// That link was given up, and what came is kept.
    holds: bool,
    pub(super) urgent: bool,
    /// On the present link.
    pub(super) asked_for: Mask,
    /// What the source was last told to be missing.
    pub(super) lacked: Option<Mask>,
    pub(super) all_here: bool,
    pub(super) paging_broken: bool,
    /// Thrown away while it ran.
    pub(super) abandoned: bool,
    pub(super) runs: bool,
    pub(super) permit: Option<RunPermit>,
    pub(super) ever_ran: bool,
    pub(super) dead: bool,
    pub(super) arrival: Option<Arrival>,
}

impl DestinationHost {
    pub(super) fn new(old: Vec<(u64, Stamp)>) -> Self {
        let mut old_by_page = [None; PAGES as usize];
        old.iter().for_each(|(page, stamp)| old_by_page[*page as usize] = Some(*stamp));
        Self {
            machine: Destination::new(SESSION, 0b0111),
            copy: Memory::ZERO,
            old,
            old_by_page,
            lacking: 0,
            absent: 0,
            ledger: ChunkLedger::default(),
            newest: [(0, 0); PAGES as usize],
            closed: false,
            after: 0,
            demand: None,
            missing: 0,
            copying: 0,
            waiting: [None; VCPUS + 1],
            link: 0,
            holds: false,
            urgent: false,
            asked_for: 0,
            lacked: None,
            all_here: false,
            paging_broken: false,
            abandoned: false,
            runs: false,
            permit: None,
            ever_ran: false,
            dead: false,
            arrival: None,
        }
    }

    pub(super) fn die(&mut self) {
        self.dead = true;
        self.runs = false;
    }

    /// Whether what comes on that link is an event; its pages are installed either way.
    pub(super) fn listens_to(&self, link: u32) -> bool {
        link == self.link && !self.holds
    }

    pub(super) fn deadline(&self) -> Option<u64> {
        let deadline = self.machine.deadline().filter(|_| !self.dead)?;
        Some(deadline.as_micros() as u64)
    }

    fn verdict(&self, plan: &Plan, plant: Plant) -> Option<Verdict> {
        if self.dead {
            return plan.destination_restarts.then_some(Verdict::Unknown);
        }
        match plant {
            Plant::VerdictForgotten => Some(Verdict::Unknown),
            _ => Some(self.machine.verdict()),
        }
    }

    /// The round of which `page` was installed last.
    pub(super) fn round_of(&self, page: u64) -> u32 {
        self.newest[page as usize].0
    }

    /// What the guest sees, or will.
    pub(super) fn seen(&self) -> &Memory {
        &self.copy
    }

    pub(super) fn waits(&self) -> bool {
        self.waiting.iter().any(Option::is_some)
    }

    /// Writes a copy of `page` that was read as number `serial`: never one older than what is there.
    pub(super) fn put(&mut self, page: u64, content: Stamp, (round, serial): (u32, u32)) -> Kept {
        let newest = &mut self.newest[page as usize];
        if newest.1 > serial && newest.0 != round && self.copy[page] != content {
            return Err(Rule::NoLateOverwrite.broken(format!(
                "page {page} has {:?} of round {}, and {content:?} of round {round} is written over it",
                self.copy[page], newest.0
            )));
        }
        *newest = (round, serial.max(newest.1));
        self.copy[page] = content;
        Ok(())
    }
}

impl World {
    pub(super) fn feed_destination(&mut self, event: DestinationEvent) -> Kept {
        if self.destination.dead {
            return Ok(());
        }
        self.tell("destination  <-", || super::words::destination_event(&event));
        self.destination.machine.handle(Duration::from_micros(self.now), event);
        while let Some(action) = self.destination.machine.poll() {
            self.tell("destination  ->", || super::words::destination_action(&action));
            if let Some(answer) = self.act_destination(action)? {
                self.answer(answer);
            }
        }
        Ok(())
    }

    pub(super) fn answer(&mut self, event: DestinationEvent) {
        let at = self.now + self.rng.random_range(1..800);
        self.net.at(at, Packet::DestinationEvent(event));
    }

    /// On an older link than the source's, it is lost.
    fn say(&mut self, message: &ToSource) -> Kept {
        if let ToSource::RoundDone { round, lacking } = message {
            let layout = ferry_pages::Layout::new(vec![Run::new(0, PAGES)]);
            let lacking = layout.ok().and_then(|layout| lacking.unpack(&layout).ok());
            self.watch_round_done(*round, mask(&lacking.unwrap_or_default()))?;
        }
        if self.destination.listens_to(self.net.link) {
            self.net.say_to_source(self.now, &mut self.rng, message)?;
        }
        Ok(())
    }

    fn act_destination(&mut self, action: DestinationAction) -> Kept<Option<DestinationEvent>> {
        Ok(Some(match action {
            DestinationAction::Send(m) => {
                self.say(&m)?;
                return Ok(None);
            }
            DestinationAction::Build { .. } => {
                let no_post_copy = self.plan.no_post_copy.then(|| "no userfaultfd".to_owned());
                let old = self.destination.old.iter().map(|(p, stamp)| (*p, stamp.digest(*p)));
                let recalled = Recalled::pack(old);
                DestinationEvent::Built(Ok(Built { no_post_copy, recalled }))
            }
            DestinationAction::AcceptLanes { .. } => return Ok(None),
            DestinationAction::Clear(stale) => {
                let more = if self.plant == Plant::ClearMore { !mask(&stale) } else { 0 };
                let stale = mask(&stale) | more & more.wrapping_neg();
                pages(stale).for_each(|page| self.destination.copy[page] = Stamp::ZERO);
                return Ok(None);
            }
            DestinationAction::Hold => {
                // Its channels are closed: the source learns of it, if it has not gone on already.
                self.destination.holds = true;
                let (at, link) = (self.now + self.net.latency_us, self.destination.link);
                if link == self.net.link {
                    self.net.lose_link(&mut self.rng);
                    self.net.at(at, Packet::SourceLost(link));
                }
                return Ok(None);
            }
            DestinationAction::Page { owed, after } => {
                if self.plan.no_post_copy {
                    let why = "owes pages to a host that cannot take them";
                    return Err(Rule::TrueEnd.broken(why));
                }
                if self.plan.refuse_paging {
                    DestinationEvent::Paging(Err("userfaultfd: no memory".into()))
                } else {
                    self.page(owed, after);
                    DestinationEvent::Paging(Ok(()))
                }
            }
            DestinationAction::Load(state) if state == [1, 2, 3] && !self.plan.refuse_load => {
                self.destination.closed = true;
                if self.destination.demand.is_some() && self.rng.random_bool(0.3) {
                    let page = self.rng.random_range(0..PAGES);
                    if !self.touch(LOADER, Touch { page, write: false })? {
                        return Ok(None);
                    }
                }
                DestinationEvent::Loaded(Ok(()))
            }
            DestinationAction::Load(_) => DestinationEvent::Loaded(Err("bad section".into())),
            DestinationAction::Resume(permit) => {
                let d = &mut self.destination;
                (d.runs, d.ever_ran, d.permit) = (true, true, Some(permit));
                let Some(memory) = self.source.at_pause else {
                    return Err(Rule::OneRuns.broken("runs without ever being paused"));
                };
                self.truth = Some(memory);
                DestinationEvent::Resumed(Ok(()))
            }
            DestinationAction::Digest => {
                let sum = self.destination.ledger.digest_sum();
                DestinationEvent::Digest((!self.discarded()).then_some(sum))
            }
            DestinationAction::Finish(arrival) => {
                if self.destination.arrival.replace(arrival).is_some() {
                    return Err(Rule::TrueEnd.broken("the destination finished twice"));
                }
                // What was said is still sent; then the control channel is closed.
                if self.destination.listens_to(self.net.link) {
                    let closed = Packet::SourceLost(self.net.link);
                    self.net.send(self.now, &mut self.rng, CONTROL, closed);
                }
                return Ok(None);
            }
        }))
    }

    /// Whether the guest gave owed pages up before they came.
    pub(super) fn discarded(&self) -> bool {
        self.destination.demand.as_ref().is_some_and(|d| d.counts().discarded > 0)
    }

    /// Whether nobody there will ever want a page again.
    pub(super) fn destination_is_gone(&self) -> bool {
        let d = &self.destination;
        d.dead || d.abandoned || d.paging_broken
    }

    pub(super) fn pages_came(&mut self, batch: Batch) -> Kept {
        if self.destination.dead || self.destination.arrival.is_some() {
            return Ok(());
        }
        let listens = self.destination.listens_to(batch.link) || self.plant == Plant::OldLinksCount;
        if let Kind::Push { turn, bytes, sent_at } = batch.kind
            && batch.link == self.net.link
        {
            let ack = Packet::Ack { turn, bytes, sent_at };
            self.net.send(self.now, &mut self.rng, ACKS, ack);
        }
        let pages = self.recall(&batch.pages);
        let batch = Batch { pages, ..batch };
        if self.destination.demand.is_some() {
            return self.owed_pages_came(&batch);
        }
        let counts = match batch.kind {
            Kind::Lane => listens,
            Kind::Echo => listens && self.plant == Plant::CountDuplicates,
            Kind::Push { .. } | Kind::Urgent => false,
        };
        let lacking = named(&batch.pages);
        if counts && lacking != 0 && self.plant != Plant::SilentlyLacking {
            self.feed_destination(DestinationEvent::Lacking(set(lacking)))?;
        }
        let round = batch.round;
        if self.plant == Plant::AckBeforeInstall {
            let at = self.now + self.rng.random_range(0..20_000);
            self.net.at(at, Packet::InstallLate(batch));
        } else {
            self.install(&batch)?;
        }
        if counts { self.feed_destination(DestinationEvent::Installed { round }) } else { Ok(()) }
    }

    /// Writes what is not late into memory that nobody runs on yet.
    pub(super) fn install(&mut self, batch: &Batch) -> Kept {
        let d = &mut self.destination;
        if d.closed || d.demand.is_some() {
            return Ok(());
        }
        for &(page, content) in &batch.pages {
            let Some(content) = content else { continue };
            let admission = d.ledger.admit(page as usize, batch.round, content.digest(page));
            if admission != Admission::Late || self.plant == Plant::NoLedger {
                d.put(page, content, (batch.round, batch.serial))?;
            }
            self.source.unpaid &= !bit(page);
        }
        Ok(())
    }

    /// Pages that are only named, out of the old copy; those that cannot be read stay named.
    fn recall(&self, pages: &Pages) -> Pages {
        let d = &self.destination;
        let read = |page: u64| {
            let stamp = d.old_by_page[page as usize]
                .filter(|_| !(self.plan.old_copy_damaged && page.is_multiple_of(3)));
            match self.plant {
                // Of an older time than the digests.
                Plant::StaleBase => stamp.map(|_| Stamp::new(page, 3)),
                _ => stamp,
            }
        };
        pages.iter().map(|&(p, content)| (p, content.or_else(|| read(p)))).collect()
    }

    pub(super) fn destination_lost(&mut self, link: u32) -> Kept {
        if link != self.destination.link {
            return Ok(());
        }
        self.destination.urgent = false;
        self.free_loader()?;
        self.feed_destination(DestinationEvent::LinkLost("link cut".into()))
    }

    /// State that is being loaded waits for a page, and the link is lost: it gets zeros, and loading fails.
    fn free_loader(&mut self) -> Kept {
        if self.destination.waiting[LOADER].take().is_none() {
            return Ok(());
        }
        let why = "the link was lost while state was loaded".to_owned();
        self.feed_destination(DestinationEvent::Loaded(Err(why)))
    }

    /// The source says hello to the session on a new link.
    pub(super) fn hello_again(&mut self, done: u32) -> Kept {
        self.free_loader()?;
        self.destination.link = self.net.link;
        self.destination.holds = false;
        self.destination.urgent = false;
        self.destination.asked_for = 0;
        let over = self.destination.dead || self.destination.arrival.is_some();
        let early = self.plant == Plant::VerdictTooEarly && !self.destination.runs;
        if let Some(verdict) = self.destination.verdict(&self.plan, self.plant)
            && (over || early)
        {
            let verdict = if early { Verdict::NeverRan } else { verdict };
            self.tell("destination  ->", || format!("answers for the session: {verdict:?}"));
            let verdict = ToSource::Verdict(verdict);
            return self.net.say_to_source(self.now, &mut self.rng, &verdict);
        }
        let owed = self.destination.missing;
        self.destination.lacked = self.destination.demand.is_some().then_some(owed);
        let held = |after| {
            let pages = self.destination.ledger.newer_than(after);
            pages.map(|page| Run::new(page as u64, 1)).collect::<PageSet>()
        };
        let held = match (self.plant, self.destination.demand.is_some()) {
            (Plant::ClaimOldPages, _) => set(mask(&held(0)) & self.source.last_round),
            (_, true) => PageSet::new(),
            (_, false) => held(done),
        };
        self.feed_destination(DestinationEvent::Rejoined { held, owed: set(owed) })?;
        match self.net.late_commit.take() {
            Some(commit) if self.plant == Plant::TakeLateCommit => {
                self.feed_destination(DestinationEvent::Message(super::decoded(&commit)?))
            }
            _ => Ok(()),
        }
    }
}
