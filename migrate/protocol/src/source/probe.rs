//! How each move begins that copies pages before the hand-over: with a sample of the link and of what the guest writes.
//!
//! A few pages are sent as rounds of their own, spread over memory and more each time, until they say what the link
//! carries. All pages are re-armed first, so that what is harvested meanwhile is what the guest wrote since.

use std::time::Duration;

use ferry_pages::{PageSet, Run};

use super::{Phase, Source, SourceAction};
use crate::forecast::Sampled;
use crate::outcome::{Outcome, Progress};
use crate::policy::RoundFacts;

/// Pages in each sample, as far as they are needed: the first one tells the round trip.
const SAMPLES: [u64; 4] = [16, 1024, 4096, 16_384];
/// A sample that took so long told what the link carries.
const TELLING: Duration = Duration::from_millis(100);
/// Within so many round trips a link may still be opening its window, if it carries more than so many times what it
/// carried of the sample before.
const OPENING: u32 = 20;
const STEADY: f64 = 1.25;
/// How long the guest is looked at, and how often at least, where nothing else is to be done.
const LOOK: Duration = Duration::from_millis(200);
const LOOKS: u32 = 4;
/// Frames that are taken to be written to alike: 2 MiB.
const ALIKE: u64 = 512;
/// Neighbours that are sampled together.
const TOGETHER: u64 = 16;

/// How far the look is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Look {
    /// The move begins with it, unless no page is to be copied before the hand-over.
    First,
    /// The machine stays here.
    Only,
    /// It was, or is not worth while any more.
    Over,
}

/// A look that is under way.
#[derive(Debug)]
pub(super) struct Probe {
    began: Duration,
    samples: usize,
    /// What the link carries is known.
    known: bool,
    /// The last sample had all pages that were not sent yet.
    all: bool,
    sampled: Sampled,
    written: PageSet,
}

impl Probe {
    /// Pages that were harvested at `now`.
    fn wrote(&mut self, now: Duration, pages: &PageSet) {
        self.written.union_with(pages);
        self.sampled.written.push((now.saturating_sub(self.began), self.written.len()));
    }

    /// What the last sample took.
    fn sent(&mut self, facts: &RoundFacts) {
        let s = &mut self.sampled;
        let first = s.round_trip.is_zero();
        s.round_trip =
            if first { facts.acknowledged_in } else { s.round_trip.min(facts.acknowledged_in) };
        let took = facts.took.saturating_sub(s.round_trip).max(Duration::from_micros(1));
        let sent = facts.pages.saturating_sub(facts.same);
        if sent == 0 || (first && !self.known) {
            return;
        }
        let rate = facts.bytes.max(1) as f64 / took.as_secs_f64();
        let opening = rate > STEADY * s.rate_bytes_per_s && took < OPENING * s.round_trip;
        s.rate_bytes_per_s = rate;
        s.bytes_per_page = facts.bytes as f64 / sent as f64;
        self.known |= facts.took >= TELLING && !opening;
    }
}

impl Source {
    /// Only looks: the machine stays here.
    pub fn look_only(&mut self) {
        self.look = Look::Only;
    }

    /// Its rounds are samples, and not of all pages yet.
    pub fn is_sampling(&self) -> bool {
        self.probe.as_ref().is_some_and(|probe| !probe.all)
    }

    /// What was measured when the move began, once it was.
    pub fn sampled(&self) -> Option<&Sampled> {
        self.sampled.as_ref()
    }

    /// Why the destination cannot take pages after the hand-over.
    pub fn no_post_copy(&self) -> Option<&str> {
        self.policy.why_no_post_copy()
    }

    pub(super) fn begin_look(&mut self, now: Duration) {
        let written = PageSet::new();
        let sampled = Sampled { pages: self.pending.len(), ..Sampled::default() };
        self.probe =
            Some(Probe { began: now, samples: 0, known: false, all: false, sampled, written });
        self.actions.push_back(SourceAction::Sample(self.pending.clone()));
        self.send_sample(now);
    }

    fn send_sample(&mut self, now: Duration) {
        let Some(probe) = &mut self.probe else { return };
        let pages = spread(&self.pending, SAMPLES[probe.samples]);
        probe.samples += 1;
        self.pending.subtract(&pages);
        probe.all = self.pending.is_empty();
        self.begin_round_of(now, pages);
    }

    /// What a sample told, and `written` since the last harvest.
    pub(super) fn probed(&mut self, now: Duration, facts: Option<RoundFacts>, written: &PageSet) {
        let Some(probe) = &mut self.probe else { return };
        probe.wrote(now, written);
        probe.known |= probe.samples == SAMPLES.len() || probe.all;
        if let Some(facts) = &facts {
            probe.sent(facts);
        }
        if !probe.known {
            return self.send_sample(now);
        }
        let looked = now.saturating_sub(probe.began);
        let look = if self.look == Look::Only { LOOK } else { Duration::ZERO };
        if looked < look {
            self.phase = Phase::Sampling;
            self.deadline = Some(now + (look - looked).min(LOOK / LOOKS));
            return;
        }
        // Then that was the first round.
        let round = facts.filter(|_| probe.all);
        let Some(Probe { mut sampled, written, .. }) = self.probe.take() else { return };
        let mut around = around(&written);
        around.intersect_with(&self.pending);
        sampled.around = around.len();
        let leave_out = sampled.left_out(&self.policy) > 0;
        self.sampled = Some(sampled);
        if self.look == Look::Only {
            self.abort("it was looked at only (ferry preflight); it has not left its host");
            return self.finish(Outcome::Cancelled);
        }
        self.look = Look::Over;
        self.tell(Progress::Sampled);
        match round {
            Some(facts) => self.decide(now, facts),
            // Still a debt, and sent with what is dirty after the round.
            None if leave_out => {
                self.pending.subtract(&around);
                self.begin_move(now);
                self.pending.union_with(&around);
            }
            None => self.begin_move(now),
        }
    }
}

/// Memory that `written` lies in.
fn around(written: &PageSet) -> PageSet {
    let mut around = PageSet::new();
    for run in written.runs() {
        let from = run.start - run.start % ALIKE;
        around.insert_run(Run::new(from, run.end().next_multiple_of(ALIKE) - from));
    }
    around
}

/// About `count` of `pages`, in small runs from all over them.
fn spread(pages: &PageSet, count: u64) -> PageSet {
    let every = (pages.len() / count.max(1)).max(1);
    let mut chosen = PageSet::new();
    let mut index = 0;
    for run in pages.runs() {
        let mut at = run.start;
        while at < run.end() {
            let group = index / TOGETHER;
            let here = (TOGETHER - index % TOGETHER).min(run.end() - at);
            if group.is_multiple_of(every) {
                chosen.insert_run(Run::new(at, here));
            }
            (at, index) = (at + here, index + here);
        }
    }
    chosen
}
