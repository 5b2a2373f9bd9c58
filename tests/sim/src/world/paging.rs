//! The destination while pages are missing: a guest that reads and writes them, and pages that come on demand.

use std::time::Duration;

use ferry_pages::{PageSet, Run};
use ferry_postcopy::{Admit, Demand, Fault};
use ferry_protocol::{DestinationEvent, Fetched, Verdict};
use rand::RngExt;

use super::memory::{Memory, PAGES, Stamp, bit, mask, of_run, pages};
use super::network::{Batch, Packet, URGENT};
use super::plan::Fate;
use super::{Plant, World};
use crate::rules::{Kept, Rule};

pub(super) const VCPUS: usize = 2;
/// The thread that loads state waits for pages as a vCPU does.
pub(super) const LOADER: usize = VCPUS;

/// A touch that waits for its page.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Touch {
    pub(super) page: u64,
    pub(super) write: bool,
}

impl World {
    /// From now on, absent pages are waited for.
    pub(super) fn page(&mut self, owed: PageSet, after: u32) {
        let d = &mut self.destination;
        d.after = after;
        d.missing = mask(&owed);
        let came = d.copy.differing(&Memory::ZERO);
        d.absent = !came;
        if self.plant != Plant::KeepStaleCopies {
            pages(d.missing).for_each(|page| d.copy[page] = Stamp::ZERO);
            d.absent |= d.missing;
        }
        d.demand = Some(Demand::new(owed));
        if self.plan.paging_breaks {
            let at = self.soon();
            self.fate_at(at, Fate::PagingBreaks);
        }
        if self.plan.discards {
            for _ in 0..self.rng.random_range(1..4) {
                let at = self.soon();
                self.net.at(at, Packet::Discard);
            }
        }
    }

    pub(super) fn paging_breaks(&mut self) -> Kept {
        if self.destination.all_here || self.destination.arrival.is_some() {
            return Ok(());
        }
        self.destination.paging_broken = true;
        self.feed_destination(DestinationEvent::PagingBroken("userfaultfd: read failed".into()))
    }

    pub(super) fn abandon(&mut self) -> Kept {
        let d = &mut self.destination;
        if d.missing == 0 || d.machine.verdict() != Verdict::Ran || !d.runs {
            return Ok(());
        }
        (d.runs, d.abandoned) = (false, true);
        self.feed_destination(DestinationEvent::Abandoned)
    }

    pub(super) fn destination_guest_runs(&mut self) -> Kept {
        for vcpu in 0..VCPUS {
            if !self.destination.runs || self.destination.waiting[vcpu].is_some() {
                continue;
            }
            for _ in 0..self.rng.random_range(0..3) {
                let page = self.rng.random_range(0..PAGES);
                let write = self.rng.random_bool(0.4);
                if !self.touch(vcpu, Touch { page, write })? {
                    break;
                }
            }
        }
        Ok(())
    }

    /// Whether the page was there; otherwise the thread waits, and the kernel tells of it soon.
    pub(super) fn touch(&mut self, vcpu: usize, touch: Touch) -> Kept<bool> {
        if self.destination.absent & bit(touch.page) == 0 {
            return self.access(touch).map(|()| true);
        }
        self.destination.waiting[vcpu] = Some(touch);
        let at = self.now + self.rng.random_range(0..50);
        self.net.at(at, Packet::Fault { vcpu, page: touch.page });
        Ok(false)
    }

    /// A page that is there is read, and perhaps written.
    fn access(&mut self, touch: Touch) -> Kept {
        let page = touch.page;
        // The loader reads before the guest runs.
        let Some(truth) = self.truth else { return Ok(()) };
        if self.destination.copy[page] != truth[page] {
            return Err(Rule::LastVersion.broken(format!(
                "the guest reads {:?} in page {page} where {:?} is right",
                self.destination.copy[page], truth[page]
            )));
        }
        if touch.write {
            let content = self.next_content(page);
            self.destination.copy[page] = content;
            self.note_truth(page, content);
        }
        Ok(())
    }

    fn note_truth(&mut self, page: u64, content: Stamp) {
        if let Some(truth) = &mut self.truth {
            truth[page] = content;
        }
    }

    /// What `Demand` says now.
    fn note_missing(&mut self) {
        let d = &mut self.destination;
        d.missing = d.demand.as_ref().map_or(0, |demand| mask(demand.missing()));
    }

    pub(super) fn fault(&mut self, vcpu: usize, page: u64) -> Kept {
        let now = Duration::from_micros(self.now);
        let gone = self.destination_is_gone();
        let d = &mut self.destination;
        let Some(demand) = d.demand.as_mut().filter(|_| !gone) else {
            return Ok(());
        };
        match demand.fault(page, now, vcpu as u32) {
            Fault::Ask if d.copying & bit(page) != 0 => {
                Err(Rule::Bounded.broken(format!("page {page} is asked for and coming in")))
            }
            Fault::Ask => self.ask_for(page),
            Fault::Asked => Ok(()),
            Fault::Zero => {
                d.absent &= !bit(page);
                self.wake(page)
            }
            Fault::Here if d.absent & bit(page) != 0 => {
                Err(Rule::LastVersion.broken(format!("page {page} is said to be here, and is not")))
            }
            Fault::Here => self.wake(page),
        }
    }

    fn ask_for(&mut self, page: u64) -> Kept {
        let d = &mut self.destination;
        if !d.urgent {
            // Asked for as soon as the source is back.
            return Ok(());
        }
        if d.asked_for & bit(page) != 0 {
            let why = format!("page {page} was asked for twice on one link");
            return Err(Rule::Bounded.broken(why));
        }
        d.asked_for |= bit(page);
        self.request(page);
        Ok(())
    }

    fn request(&mut self, page: u64) {
        // On an older link than the source's, it is lost.
        if self.destination.listens_to(self.net.link) {
            self.net.send(self.now, &mut self.rng, URGENT, Packet::Request(page));
        }
    }

    /// A page that will not come out of the old copy, whether or not a thread waits for it.
    fn ask_for_lacking(&mut self, page: u64) {
        if self.destination.urgent {
            self.request(page);
        }
    }

    pub(super) fn urgent_open(&mut self) -> Kept {
        self.destination.urgent = true;
        let d = &self.destination;
        let outstanding: Vec<u64> = d.demand.iter().flat_map(Demand::outstanding).collect();
        let lacking = d.lacking & d.missing;
        outstanding.into_iter().try_for_each(|page| self.ask_for(page))?;
        pages(lacking).for_each(|page| self.ask_for_lacking(page));
        Ok(())
    }

    /// All that wait for `page` go on.
    fn wake(&mut self, page: u64) -> Kept {
        for vcpu in 0..=LOADER {
            let waiting = &mut self.destination.waiting[vcpu];
            let Some(touch) = waiting.take_if(|touch| touch.page == page) else { continue };
            self.access(touch)?;
            if vcpu == LOADER {
                self.answer(DestinationEvent::Loaded(Ok(())));
            }
        }
        Ok(())
    }

    pub(super) fn owed_pages_came(&mut self, batch: &Batch) -> Kept {
        for &(page, content) in &batch.pages {
            let d = &mut self.destination;
            let Some(demand) = d.demand.as_mut().filter(|_| !d.paging_broken) else { break };
            if batch.round <= d.after && self.plant != Plant::TakeLateRounds {
                continue;
            }
            let Some(content) = content else {
                if d.missing & bit(page) != 0 {
                    d.lacking |= bit(page);
                    self.ask_for_lacking(page);
                }
                continue;
            };
            if self.plant == Plant::NoDemand {
                if d.absent & bit(page) == 0 && d.copy[page] != content {
                    return Err(Rule::NoLateOverwrite.broken(format!(
                        "page {page} is there, and what comes is written over it"
                    )));
                }
                d.copy[page] = content;
            }
            if demand.admit(page) == Admit::Install {
                d.copying |= bit(page);
                let at = self.now + self.rng.random_range(0..800);
                self.net.at(at, Packet::Installed { round: batch.round, page, content });
            }
        }
        Ok(())
    }

    pub(super) fn installed(&mut self, round: u32, page: u64, content: Stamp) -> Kept {
        let gone = self.destination_is_gone();
        let d = &mut self.destination;
        d.copying &= !bit(page);
        let Some(demand) = d.demand.as_mut().filter(|_| !gone) else {
            return Ok(());
        };
        demand.installed(page, Duration::from_micros(self.now));
        d.ledger.admit(page as usize, round, content.digest(page));
        // As the kernel does it: not over a page that is there.
        if d.absent & bit(page) != 0 {
            d.absent &= !bit(page);
            d.copy[page] = content;
        }
        self.source.unpaid &= !bit(page);
        self.note_missing();
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

    pub(super) fn discard(&mut self) -> Kept {
        let start = self.rng.random_range(0..PAGES - 4);
        let run = Run::new(start, self.rng.random_range(1..4));
        let d = &mut self.destination;
        let Some(demand) = d.demand.as_mut().filter(|_| d.runs && !d.paging_broken) else {
            return Ok(());
        };
        if d.copying != 0 {
            self.net.at(self.now + 10, Packet::Discard);
            return Ok(());
        }
        let freed = demand.discarded(run);
        d.absent |= of_run(run);
        for page in run.start..run.end() {
            self.destination.copy[page] = Stamp::ZERO;
            self.note_truth(page, Stamp::ZERO);
        }
        self.note_missing();
        for page in freed {
            self.destination.absent &= !bit(page);
            self.wake(page)?;
        }
        self.tell_if_all_here();
        Ok(())
    }
}
