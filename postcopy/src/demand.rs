//! Which owed pages the destination has asked for, who waits for them, and what may still be installed.
//!
//! ```text
//!             fault                  admit           installed
//!   owed ───────────────▶ owed, ───────────▶ owed, ─────────────▶ here
//!     │  (or pushed: no   asked for          coming in              │
//!     │      fault)                              │ not_installed     │
//!     │                    ▲─────────────────────┘                   │
//!     └───────── discarded, from any state ──▶ gone ◀───────────────┘
//! ```

use std::collections::{BTreeMap, HashMap, HashSet};
use std::time::Duration;

use ferry_pages::{PageSet, Run};
use hdrhistogram::Histogram;

use crate::WaitedTime;

/// What to do about a touch of an absent page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// Ask the source for it: this thread is the first to want it.
    Ask,
    /// It was asked for, or is being installed: the thread wakes when it is here.
    Asked,
    /// The source holds nothing for it: give a zero page. Where the kernel says that a page is there
    /// already, wake the thread.
    Zero,
    /// It came while the fault was on its way: wake the thread.
    Here,
}

/// Whether a page that came may be installed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Admit {
    /// Install it, then call [`Demand::installed`] or [`Demand::not_installed`].
    Install,
    /// It is here, coming in, discarded, or was never owed: drop this copy.
    Late,
}

/// A wait that has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Waited {
    /// The thread that wanted the page first.
    pub waiter: u32,
    /// How long that thread waited.
    pub wait: Duration,
    /// How many threads waited, the first included.
    pub waiters: usize,
}

/// What a [`Demand`] has counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DemandCounts {
    /// Faults, of pages owed and not.
    pub faults: u64,
    /// Pages asked for (each once, however many threads wait).
    pub requested: u64,
    /// Pages that were installed with nobody waiting for them.
    pub pushed: u64,
    /// Copies that came for nothing: the page was here, or no longer wanted.
    pub late: u64,
    /// Faults answered by a zero page.
    pub zeros: u64,
    /// Owed pages that the guest gave up before they came.
    pub discarded: u64,
}

/// Threads that wait for one page.
#[derive(Clone, Debug)]
struct Waiting {
    /// Place in the order of requests.
    order: u64,
    first: (u32, Duration),
    /// All others; seldom any.
    more: Vec<(u32, Duration)>,
}

/// The destination's ledger of faults after the hand-over.
///
/// It says what becomes of each fault and of each page that comes; the caller reads faults, asks the
/// source and installs pages. Time is any clock that does not go back.
///
/// Hold its lock from [`admit`](Self::admit) until [`installed`](Self::installed), and from before a
/// discard is *read* from the kernel until [`discarded`](Self::discarded) has returned: the guest goes on
/// once its discard was read, and a page installed after that would bring old content back.
#[derive(Clone, Debug)]
pub struct Demand {
    /// Owed and not here.
    missing: PageSet,
    /// Arrived, or given as zero.
    here: PageSet,
    /// Given up by the guest. Such a page never counts as here: the kernel may drop it at any time after
    /// the discard was read, and a thread that is only woken would fault for ever.
    gone: PageSet,
    /// Admitted and not yet installed; still in `missing`.
    installing: HashSet<u64>,
    waiting: HashMap<u64, Waiting>,
    next_order: u64,
    waits: BTreeMap<u32, Duration>,
    waited: WaitedTime,
    /// Each wait that has ended, ns.
    nanos: Histogram<u64>,
    counts: DemandCounts,
}

/// A wait of a minute is the longest that is told apart, and three digits of it.
const LONGEST_NS: u64 = 60_000_000_000;

impl Demand {
    /// A ledger of a machine for which the source still holds `owed`; every other page reads as zero.
    /// Pages that came before the hand-over are not the ledger's: they never fault.
    pub fn new(owed: PageSet) -> Self {
        Self {
            missing: owed,
            here: PageSet::new(),
            gone: PageSet::new(),
            installing: HashSet::new(),
            waiting: HashMap::new(),
            next_order: 0,
            waits: BTreeMap::new(),
            waited: WaitedTime::default(),
            nanos: Histogram::new_with_max(LONGEST_NS, 3)
                .unwrap_or_else(|_| unreachable!("bounds are constants")),
            counts: DemandCounts::default(),
        }
    }

    /// Thread `waiter` touched `gfn`, which was absent.
    pub fn fault(&mut self, gfn: u64, now: Duration, waiter: u32) -> Fault {
        self.counts.faults += 1;
        if !self.missing.contains(gfn) {
            if self.here.contains(gfn) {
                return Fault::Here;
            }
            if !self.gone.contains(gfn) {
                self.here.insert(gfn);
            }
            self.counts.zeros += 1;
            return Fault::Zero;
        }
        if let Some(waiting) = self.waiting.get_mut(&gfn) {
            // The kernel may report one wait of one thread more than once.
            let known = waiting.first.0 == waiter || waiting.more.iter().any(|w| w.0 == waiter);
            if !known {
                waiting.more.push((waiter, now));
            }
            return Fault::Asked;
        }
        let order = self.next_order;
        self.next_order += 1;
        self.waiting.insert(gfn, Waiting { order, first: (waiter, now), more: Vec::new() });
        if self.installing.contains(&gfn) {
            return Fault::Asked;
        }
        self.counts.requested += 1;
        Fault::Ask
    }

    /// Asks to install a copy of `gfn`.
    pub fn admit(&mut self, gfn: u64) -> Admit {
        if self.missing.contains(gfn) && self.installing.insert(gfn) {
            return Admit::Install;
        }
        self.counts.late += 1;
        Admit::Late
    }

    /// An admitted page is in the guest's memory. Returns the wait that this ended, if any thread waited.
    ///
    /// A page that was not admitted, or discarded since, changes nothing.
    pub fn installed(&mut self, gfn: u64, now: Duration) -> Option<Waited> {
        if !self.installing.remove(&gfn) {
            return None;
        }
        self.missing.remove(gfn);
        self.here.insert(gfn);
        let Some(Waiting { first, more, .. }) = self.waiting.remove(&gfn) else {
            self.counts.pushed += 1;
            return None;
        };
        for (waiter, since) in std::iter::once(&first).chain(&more) {
            *self.waits.entry(*waiter).or_default() += now.saturating_sub(*since);
            self.waited.add(*since, now);
        }
        let (waiter, since) = first;
        let wait = now.saturating_sub(since);
        self.nanos.saturating_record(u64::try_from(wait.as_nanos()).unwrap_or(u64::MAX));
        Some(Waited { waiter, wait, waiters: 1 + more.len() })
    }

    /// Offers what is owed of the pages of `run` to `put`, stretch by stretch. `put` places pages from the
    /// first of a stretch on, and returns how many are there then; `taken` is told of each. `now` is the
    /// clock. Returns how many pages of `run`, from the first on, need no other try.
    ///
    /// # Errors
    /// That of `put`; what it was offered is owed as before.
    pub fn place<E>(
        &mut self,
        run: Run,
        now: impl Fn() -> Duration,
        mut put: impl FnMut(Run) -> Result<u64, E>,
        mut taken: impl FnMut(u64),
    ) -> Result<u64, E> {
        let mut at = run.start;
        while at < run.end() {
            let first = at;
            while at < run.end() && self.admit(at) == Admit::Install {
                at += 1;
            }
            if first < at {
                let put = put(Run::new(first, at - first));
                let there = first + put.as_ref().map_or(0, |pages| *pages);
                let then = now();
                for gfn in first..there {
                    self.installed(gfn, then);
                    taken(gfn);
                }
                for gfn in there..at {
                    // Who waits for it is served by the next try.
                    let _ = self.not_installed(gfn);
                }
                put?;
                if there < at {
                    return Ok(there - run.start);
                }
            }
            // The page that ended the stretch is late, or behind the run.
            at += 1;
        }
        Ok(run.pages)
    }

    /// An admitted page could not be installed, and its copy is lost: it is owed as before. Returns
    /// whether a thread waits for it, so that it must be asked for (again) at once.
    #[must_use]
    pub fn not_installed(&mut self, gfn: u64) -> bool {
        self.installing.remove(&gfn) && self.waiting.contains_key(&gfn)
    }

    /// The guest gave up the pages of `run`: they read as zero from now on, and a copy on its way is late.
    /// Returns the pages, ascending, that threads wait for: give each a zero page, as for
    /// [`Fault::Zero`]. Such a wait is not counted.
    #[must_use]
    pub fn discarded(&mut self, run: Run) -> Vec<u64> {
        self.counts.discarded += self.missing.count_in(run);
        self.missing.remove_run(run);
        self.here.remove_run(run);
        self.gone.insert_run(run);
        let inside = |gfn: u64| run.start <= gfn && gfn < run.end();
        self.installing.retain(|gfn| !inside(*gfn));
        let mut freed: Vec<u64> = self.waiting.keys().copied().filter(|gfn| inside(*gfn)).collect();
        freed.sort_unstable();
        for gfn in &freed {
            self.waiting.remove(gfn);
        }
        freed
    }

    /// Every page that is owed and not here, whether asked for or not: what the source is told after a
    /// lost link.
    pub fn missing(&self) -> &PageSet {
        &self.missing
    }

    /// The pages that threads wait for, in the order in which they were wanted: what to ask for again
    /// after a lost link.
    pub fn outstanding(&self) -> impl Iterator<Item = u64> + use<> {
        let mut pages: Vec<(u64, u64)> =
            self.waiting.iter().map(|(gfn, waiting)| (waiting.order, *gfn)).collect();
        pages.sort_unstable();
        pages.into_iter().map(|(_, gfn)| gfn)
    }

    /// Whether no page is owed any more.
    pub fn is_complete(&self) -> bool {
        self.missing.is_empty()
    }

    /// What was counted so far.
    pub fn counts(&self) -> DemandCounts {
        self.counts
    }

    /// How long the first thread to want each page waited for it, ns; of waits that have ended.
    pub fn wait_nanos(&self) -> &Histogram<u64> {
        &self.nanos
    }

    /// When threads waited, in all waits that have ended.
    pub fn waited(&self) -> &WaitedTime {
        &self.waited
    }

    /// How long each thread has waited in all its waits that have ended, by thread.
    pub fn waits(&self) -> impl Iterator<Item = (u32, Duration)> + '_ {
        self.waits.iter().map(|(waiter, wait)| (*waiter, *wait))
    }
}
