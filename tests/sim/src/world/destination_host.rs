//! The destination's host: memory that fills, missing pages that come on demand, and a guest that reads and
//! writes them.

use std::collections::{BTreeMap, HashSet};
use std::time::Duration;

use ferry_pages::{PageSet, Run};
use ferry_postcopy::{Admission, Admit, ChunkLedger, Demand, Fault};
use ferry_protocol::{
    Arrival, Built, Destination, DestinationAction, DestinationEvent, Fetched, Recalled, ToSource,
    Verdict,
};
use rand::RngExt;

use super::network::{CONTROL, Fate, Packet, Pages, URGENT};
use super::{PAGES, Plan, Plant, SAME, SESSION, World, digest, run_pages};

const VCPUS: usize = 2;
/// The thread that loads state waits for pages as a vCPU does.
const LOADER: usize = VCPUS;

/// A touch that waits for its page.
#[derive(Clone, Copy, Debug)]
struct Touch {
    page: u64,
    write: bool,
}

pub(crate) struct DestinationHost {
    pub(crate) machine: Destination,
    pub(crate) copy: Vec<u64>,
    /// What a bundle has of the machine.
    old: BTreeMap<u64, u64>,
    /// Owed, named, and not to be had from it.
    lacking: PageSet,
    /// What the guest finds in its memory if all is well; none before it runs.
    pub(crate) expected: Option<Vec<u64>>,
    /// Pages that are absent fault, once it is so arranged.
    pub(crate) absent: PageSet,
    ledger: ChunkLedger,
    /// Pages of the rounds before the hand-over are not taken any more.
    closed: bool,
    last_round: u32,
    pub(crate) demand: Option<Demand>,
    /// Admitted and being copied: nothing is discarded meanwhile.
    copying: HashSet<u64>,
    waiting: [Option<Touch>; VCPUS + 1],
    writes: u64,
    /// The newest link that the source came by, and whether its urgent channel is open.
    link: u32,
    /// That link was given up, and what came is kept.
    holds: bool,
    urgent: bool,
    asked_for: HashSet<(u32, u64)>,
    /// What the source was last told to be missing.
    pub(crate) lacked: Option<PageSet>,
    all_here: bool,
    pub(crate) paging_broken: bool,
    /// Thrown away while it ran.
    pub(crate) abandoned: bool,
    pub(crate) runs: bool,
    pub(crate) ever_ran: bool,
    pub(crate) dead: bool,
    pub(crate) arrival: Option<Arrival>,
}

impl DestinationHost {
    pub(crate) fn new(old: BTreeMap<u64, u64>) -> Self {
        Self {
            machine: Destination::new(SESSION, 0b0111),
            copy: vec![0; PAGES as usize],
            old,
            lacking: PageSet::new(),
            expected: None,
            absent: PageSet::new(),
            ledger: ChunkLedger::default(),
            closed: false,
            last_round: 0,
            demand: None,
            copying: HashSet::new(),
            waiting: [None; VCPUS + 1],
            writes: 0,
            link: 0,
            holds: false,
            urgent: false,
            asked_for: HashSet::new(),
            lacked: None,
            all_here: false,
            paging_broken: false,
            abandoned: false,
            runs: false,
            ever_ran: false,
            dead: false,
            arrival: None,
        }
    }

    pub(crate) fn die(&mut self) {
        self.dead = true;
        self.runs = false;
    }

    /// Whether what comes on that link is an event; its pages are installed either way.
    pub(crate) fn listens_to(&self, link: u32) -> bool {
        link == self.link && !self.holds
    }

    pub(crate) fn deadline(&self) -> Option<u64> {
        let deadline = self.machine.deadline().filter(|_| !self.dead)?;
        Some(deadline.as_micros() as u64)
    }

    pub(crate) fn asked_for_verdict(&self, plan: &Plan) -> Option<Verdict> {
        if self.dead {
            return plan.destination_restarts.then_some(Verdict::Unknown);
        }
        Some(self.machine.verdict())
    }

    /// Pages that are owed and not here.
    pub(crate) fn missing(&self) -> PageSet {
        self.demand.as_ref().map(|d| d.missing().clone()).unwrap_or_default()
    }

    pub(crate) fn waits(&self) -> bool {
        self.waiting.iter().any(Option::is_some)
    }

    /// A page that is there is read, and perhaps written.
    fn access(&mut self, touch: Touch) -> Result<(), String> {
        let page = touch.page as usize;
        // The loader reads before the guest runs.
        let Some(expected) = &mut self.expected else { return Ok(()) };
        if self.copy[page] != expected[page] {
            return Err(format!(
                "the guest reads {} in page {page} where {} is right",
                self.copy[page], expected[page]
            ));
        }
        if touch.write {
            self.writes += 1;
            expected[page] = self.writes << 32;
            self.copy[page] = expected[page];
        }
        Ok(())
    }
}

impl World {
    pub(crate) fn feed_destination(&mut self, event: DestinationEvent) -> Result<(), String> {
        if self.destination.dead {
            return Ok(());
        }
        self.trace(|| format!("destination <- {event:?}"));
        self.destination.machine.handle(Duration::from_micros(self.now), event);
        while let Some(action) = self.destination.machine.poll() {
            self.trace(|| format!("destination -> {action:?}"));
            if let Some(answer) = self.act_destination(action)? {
                self.answer(answer);
            }
        }
        Ok(())
    }

    fn answer(&mut self, event: DestinationEvent) {
        let at = self.now + self.rng.random_range(1..800);
        self.net.at(at, Packet::DestinationEvent(event));
    }

    fn act_destination(
        &mut self,
        action: DestinationAction,
    ) -> Result<Option<DestinationEvent>, String> {
        Ok(Some(match action {
            DestinationAction::Send(m) => {
                // On an older link than the source's, it is lost.
                if self.destination.listens_to(self.net.link) {
                    self.net.send(self.now, &mut self.rng, CONTROL, Packet::ToSource(m));
                }
                return Ok(None);
            }
            DestinationAction::Build { .. } => {
                let no_post_copy = self.plan.no_post_copy.then(|| "no userfaultfd".to_owned());
                let old =
                    self.destination.old.iter().map(|(p, content)| (*p, digest(*p, *content)));
                let recalled = Recalled::pack(old);
                DestinationEvent::Built(Ok(Built { no_post_copy, recalled }))
            }
            DestinationAction::AcceptLanes { .. } => return Ok(None),
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
            DestinationAction::Page(owed) => {
                if self.plan.no_post_copy {
                    return Err("owes pages to a host that cannot take them".into());
                }
                if self.plan.refuse_paging {
                    DestinationEvent::Paging(Err("userfaultfd: no memory".into()))
                } else {
                    self.page(owed);
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
            DestinationAction::Resume(_permit) => {
                let d = &mut self.destination;
                (d.runs, d.ever_ran) = (true, true);
                d.expected.clone_from(&self.source.at_pause);
                DestinationEvent::Resumed(Ok(()))
            }
            DestinationAction::Digest => {
                let discarded =
                    self.destination.demand.as_ref().is_some_and(|d| d.counts().discarded > 0);
                let sum = self.destination.ledger.digest_sum();
                DestinationEvent::Digest((!discarded).then_some(sum))
            }
            DestinationAction::Finish(arrival) => {
                if self.destination.arrival.replace(arrival).is_some() {
                    return Err("the destination finished twice".into());
                }
                return Ok(None);
            }
        }))
    }

    /// From now on, absent pages are waited for.
    fn page(&mut self, owed: PageSet) {
        let d = &mut self.destination;
        let came = (0..PAGES).filter(|p| d.copy[*p as usize] != 0).map(|p| Run::new(p, 1));
        d.absent.insert_run(Run::new(0, PAGES));
        d.absent.subtract(&came.collect());
        if self.plant != Plant::KeepStaleCopies {
            for page in run_pages(&owed) {
                d.copy[page as usize] = 0;
            }
            d.absent.union_with(&owed);
        }
        d.demand = Some(Demand::new(owed));
        if self.plan.paging_breaks {
            let at = self.now + self.rng.random_range(0..self.net.latency_us * 30);
            self.fate_at(at, Fate::PagingBreaks);
        }
        if self.plan.discards {
            for _ in 0..self.rng.random_range(1..4) {
                let at = self.now + self.rng.random_range(0..self.net.latency_us * 30);
                self.net.at(at, Packet::Discard);
            }
        }
    }

    pub(crate) fn paging_breaks(&mut self) -> Result<(), String> {
        if self.destination.all_here || self.destination.arrival.is_some() {
            return Ok(());
        }
        self.destination.paging_broken = true;
        self.feed_destination(DestinationEvent::PagingBroken("userfaultfd: read failed".into()))
    }

    pub(crate) fn abandon(&mut self) -> Result<(), String> {
        let d = &mut self.destination;
        if d.missing().is_empty() || d.machine.verdict() != Verdict::Ran || !d.runs {
            return Ok(());
        }
        (d.runs, d.abandoned) = (false, true);
        self.feed_destination(DestinationEvent::Abandoned)
    }

    /// Whether nobody there will ever want a page again.
    pub(crate) fn destination_is_gone(&self) -> bool {
        let d = &self.destination;
        d.dead || d.abandoned || d.paging_broken
    }

    pub(crate) fn destination_guest_runs(&mut self) -> Result<(), String> {
        for vcpu in 0..VCPUS {
            for _ in 0..self.rng.random_range(0..3) {
                if !self.destination.runs || self.destination.waiting[vcpu].is_some() {
                    break;
                }
                let page = self.rng.random_range(0..PAGES);
                let write = self.rng.random_bool(0.4);
                self.touch(vcpu, Touch { page, write })?;
            }
        }
        Ok(())
    }

    /// Whether the page was there; otherwise the thread waits, and the kernel tells of it soon.
    fn touch(&mut self, vcpu: usize, touch: Touch) -> Result<bool, String> {
        if !self.destination.absent.contains(touch.page) {
            return self.destination.access(touch).map(|()| true);
        }
        self.destination.waiting[vcpu] = Some(touch);
        let at = self.now + self.rng.random_range(0..50);
        self.net.at(at, Packet::Fault { vcpu, page: touch.page });
        Ok(false)
    }

    pub(crate) fn fault(&mut self, vcpu: usize, page: u64) -> Result<(), String> {
        let now = Duration::from_micros(self.now);
        let gone = self.destination_is_gone();
        let d = &mut self.destination;
        let Some(demand) = d.demand.as_mut().filter(|_| !gone) else {
            return Ok(());
        };
        match demand.fault(page, now, vcpu as u32) {
            Fault::Ask if d.copying.contains(&page) => Err(format!("page {page} is coming in")),
            Fault::Ask => self.ask_for(page),
            Fault::Asked => Ok(()),
            Fault::Zero => {
                if d.absent.remove(page) {
                    d.copy[page as usize] = 0;
                }
                self.wake(page)
            }
            Fault::Here if d.absent.contains(page) => Err(format!("page {page} is not here")),
            Fault::Here => self.wake(page),
        }
    }

    fn ask_for(&mut self, page: u64) -> Result<(), String> {
        let d = &mut self.destination;
        if !d.urgent {
            // Asked for as soon as the source is back.
            return Ok(());
        }
        if !d.asked_for.insert((d.link, page)) {
            return Err(format!("page {page} was asked for twice on one link"));
        }
        self.net.send(self.now, &mut self.rng, URGENT, Packet::Request(page));
        Ok(())
    }

    /// A page that will not come out of the old copy, whether or not a thread waits for it.
    fn ask_for_lacking(&mut self, page: u64) {
        if self.destination.urgent {
            self.net.send(self.now, &mut self.rng, URGENT, Packet::Request(page));
        }
    }

    pub(crate) fn urgent_open(&mut self) -> Result<(), String> {
        self.destination.urgent = true;
        let d = &self.destination;
        let outstanding: Vec<u64> = d.demand.iter().flat_map(Demand::outstanding).collect();
        let mut lacking = d.lacking.clone();
        lacking.intersect_with(&d.missing());
        outstanding.into_iter().try_for_each(|page| self.ask_for(page))?;
        run_pages(&lacking).for_each(|page| self.ask_for_lacking(page));
        Ok(())
    }

    /// All that wait for `page` go on.
    fn wake(&mut self, page: u64) -> Result<(), String> {
        for vcpu in 0..=LOADER {
            let waiting = &mut self.destination.waiting[vcpu];
            let Some(touch) = waiting.take_if(|touch| touch.page == page) else { continue };
            self.destination.access(touch)?;
            if vcpu == LOADER {
                self.answer(DestinationEvent::Loaded(Ok(())));
            }
        }
        Ok(())
    }

    pub(crate) fn pages_came(
        &mut self,
        round: u32,
        pages: &Pages,
        announced: bool,
    ) -> Result<(), String> {
        if self.destination.dead || self.destination.arrival.is_some() {
            return Ok(());
        }
        let pages = &self.recall(pages);
        if self.destination.demand.is_some() {
            return self.owed_pages_came(round, pages);
        }
        let lacking: PageSet =
            pages.iter().filter(|(_, c)| *c == SAME).map(|(p, _)| Run::new(*p, 1)).collect();
        if announced && !lacking.is_empty() && self.plant != Plant::SilentlyLacking {
            self.feed_destination(DestinationEvent::Lacking(lacking))?;
        }
        let d = &mut self.destination;
        if !d.closed {
            d.last_round = d.last_round.max(round);
            for &(page, content) in pages.iter().filter(|(_, content)| *content != SAME) {
                let admission = d.ledger.admit(page as usize, round, digest(page, content));
                if admission != Admission::Late || self.plant == Plant::NoLedger {
                    d.copy[page as usize] = content;
                }
                self.source.debt.remove(page);
            }
        }
        if announced {
            self.feed_destination(DestinationEvent::Installed { round })
        } else {
            Ok(())
        }
    }

    /// Pages that are only named, out of the old copy; those that cannot be read stay named.
    fn recall(&self, pages: &Pages) -> Pages {
        let d = &self.destination;
        let read = |page: u64| match self.plant {
            _ if self.plan.old_copy_damaged && page.is_multiple_of(3) => SAME,
            Plant::StaleCopy => d.old[&page] + 3,
            _ => d.old[&page],
        };
        pages
            .iter()
            .map(|&(p, content)| (p, if content == SAME { read(p) } else { content }))
            .collect()
    }

    fn owed_pages_came(&mut self, round: u32, pages: &Pages) -> Result<(), String> {
        for &(page, content) in pages {
            let d = &mut self.destination;
            let Some(demand) = d.demand.as_mut().filter(|_| !d.paging_broken) else { break };
            if round <= d.last_round {
                continue;
            }
            if content == SAME {
                if demand.missing().contains(page) {
                    d.lacking.insert(page);
                    self.ask_for_lacking(page);
                }
                continue;
            }
            if self.plant == Plant::NoDemand {
                d.copy[page as usize] = content;
            }
            if demand.admit(page) == Admit::Install {
                d.copying.insert(page);
                let at = self.now + self.rng.random_range(0..800);
                self.net.at(at, Packet::Installed { round, page, content });
            }
        }
        Ok(())
    }

    pub(crate) fn installed(&mut self, round: u32, page: u64, content: u64) -> Result<(), String> {
        let gone = self.destination_is_gone();
        let d = &mut self.destination;
        d.copying.remove(&page);
        let Some(demand) = d.demand.as_mut().filter(|_| !gone) else {
            return Ok(());
        };
        demand.installed(page, Duration::from_micros(self.now));
        d.ledger.admit(page as usize, round, digest(page, content));
        // As the kernel does it: not over a page that is there.
        if d.absent.remove(page) {
            d.copy[page as usize] = content;
        }
        self.source.debt.remove(page);
        self.wake(page)?;
        self.tell_if_all_here();
        Ok(())
    }

    fn tell_if_all_here(&mut self) {
        let d = &mut self.destination;
        if !d.all_here && d.demand.as_ref().is_some_and(Demand::is_complete) {
            d.all_here = true;
            self.answer(DestinationEvent::AllHere(Fetched::default()));
        }
    }

    pub(crate) fn discard(&mut self) -> Result<(), String> {
        let start = self.rng.random_range(0..PAGES - 4);
        let run = Run::new(start, self.rng.random_range(1..4));
        let d = &mut self.destination;
        let Some(demand) = d.demand.as_mut().filter(|_| d.runs && !d.paging_broken) else {
            return Ok(());
        };
        if !d.copying.is_empty() {
            self.net.at(self.now + 10, Packet::Discard);
            return Ok(());
        }
        for page in run.start..run.end() {
            d.copy[page as usize] = 0;
            d.expected.iter_mut().for_each(|e| e[page as usize] = 0);
        }
        d.absent.insert_run(run);
        for page in demand.discarded(run) {
            self.destination.absent.remove(page);
            self.wake(page)?;
        }
        self.tell_if_all_here();
        Ok(())
    }

    pub(crate) fn destination_lost(&mut self, link: u32) -> Result<(), String> {
        if link != self.destination.link {
            return Ok(());
        }
        self.destination.urgent = false;
        self.feed_destination(DestinationEvent::LinkLost("link cut".into()))
    }

    /// The source says hello to the session on a new link.
    pub(crate) fn hello_again(&mut self, done: u32) -> Result<(), String> {
        self.destination.link = self.net.link;
        self.destination.holds = false;
        self.destination.urgent = false;
        let over = self.destination.dead || self.destination.arrival.is_some();
        if over && let Some(verdict) = self.destination.asked_for_verdict(&self.plan) {
            let verdict = Packet::ToSource(ToSource::Verdict(verdict));
            self.net.send(self.now, &mut self.rng, CONTROL, verdict);
            return Ok(());
        }
        let owed = self.destination.missing();
        self.destination.lacked = self.destination.demand.is_some().then(|| owed.clone());
        let held = |after| {
            let pages = self.destination.ledger.newer_than(after);
            pages.map(|page| Run::new(page as u64, 1)).collect::<PageSet>()
        };
        let held = if self.plant == Plant::ClaimOldPages {
            let mut old = held(0);
            old.intersect_with(&self.source.last_round);
            old
        } else {
            held(done)
        };
        self.feed_destination(DestinationEvent::Rejoined { held, owed })?;
        match self.net.late_commit.take() {
            Some(commit) if self.plant == Plant::TakeLateCommit => {
                self.feed_destination(DestinationEvent::Message(commit))
            }
            _ => Ok(()),
        }
    }
}
