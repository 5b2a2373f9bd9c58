//! Saving a machine to a bundle, while it runs or for good.
//!
//! A machine that goes on is saved as pre-copy would send it: all pages that hold data, then those that
//! it dirtied meanwhile, until few are left. Then it stands still: the last pages are *copied to memory*,
//! its state is saved, and it goes on; only after that are they written to the file. The disk is never
//! waited for while the guest stands still, unless it dirties more than is kept in memory.
//!
//! ```text
//!  track ─ round 1 ─ round 2 ─ … ─┤ pause · harvest · copy · save · harvest · copy · resume ├─ write ─ commit
//!                                  └──────────────── the stop ─────────────────┘
//! ```
//!
//! A machine that is saved for good is watched for a moment, then paused, and ends only when its bundle is on the
//! disk. It keeps its permit until then: whatever goes wrong, it goes on here.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use ferry_bundle::{BundleError, BundleId, Chain, Committed, Draft, RECORD_PAGES, Sum};
use ferry_memory::{GuestView, MemoryError};
use ferry_pages::{PAGE_BYTES, PageSet, Run};
use ferry_protocol::RunPermit;
use serde::{Deserialize, Serialize};

use crate::round::{Round, Trackers};
use crate::tracking::Tracking;
use crate::{Guest, GuestError, report, send, tracking, words};

/// So many dirty pages are copied while the guest stands still: a millisecond or two.
const LAST_PAGES: u64 = 1024;
/// No more rounds than this: a guest that dirties as fast as pages are written is stopped with what
/// is left.
const MAX_ROUNDS: u32 = 12;
/// Most that is kept in memory of the last pages: what is more is written while the guest stands still.
const KEPT_PAGES: u64 = 16384;
/// How long a machine is watched first: what it touches is its working set.
const SAMPLE: Duration = Duration::from_millis(100);
/// How often whoever watches hears of bytes written.
const TELL_EVERY: Duration = Duration::from_millis(200);

/// What a page costs that is copied while the guest stands still: about twice what was measured.
const COPY_ONE: Duration = Duration::from_micros(2);
/// Pausing, saving state and resuming.
const OVERHEAD: Duration = Duration::from_millis(2);

/// How to save.
#[derive(Clone, Debug)]
pub struct SaveOptions {
    /// Store what is not in this bundle, which must be of the same machine.
    pub base: Option<Arc<Chain>>,
    /// The machine ends here once it is saved.
    pub stop: bool,
    /// One that goes on is not saved if it would stand still for longer than this.
    pub max_stop: Duration,
}

impl Default for SaveOptions {
    /// No base; the machine goes on, after 200 ms at most.
    fn default() -> Self {
        Self { base: None, stop: false, max_stop: Duration::from_millis(200) }
    }
}

/// What whoever watches a save is told.
#[derive(Clone, Debug, PartialEq)]
pub enum SaveEvent {
    /// A round of this many pages begins.
    Round {
        /// Number, from 1.
        round: u32,
        /// Pages in it.
        pages: u64,
    },
    /// Bytes of memory written so far; several times a second.
    Written {
        /// Bytes.
        bytes: u64,
    },
    /// The guest goes on, after a stop this long.
    GoesOn(Duration),
    /// All is written, and goes to the disk.
    Syncing,
}

/// Ends a save from another thread, before its commit; the machine goes on.
#[derive(Clone, Debug, Default)]
pub struct SaveCanceller(Arc<AtomicBool>);

impl SaveCanceller {
    /// Cancels.
    pub fn cancel(&self) {
        self.0.store(true, Ordering::Relaxed);
    }

    fn check(&self) -> Result<(), SaveError> {
        if self.0.load(Ordering::Relaxed) { Err(SaveError::Cancelled) } else { Ok(()) }
    }
}

/// Why a machine was not saved. It goes on, but for [`NotResumed`](Self::NotResumed).
#[derive(Debug, thiserror::Error)]
pub enum SaveError {
    /// The bundle could not be written, or its base is not one.
    #[error(transparent)]
    Bundle(#[from] BundleError),
    /// The machine cannot be paused, or its state cannot be saved.
    #[error(transparent)]
    Guest(#[from] GuestError),
    /// Its memory cannot be read.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// It dirties its memory faster than pages are written.
    #[error(
        "the guest dirties {dirty} pages while {pages} are written: it would stand still for about {} ms, allowed are {} ms; save it when it is less busy, or allow more by --max-stop",
        .expected.as_millis(), .allowed.as_millis()
    )]
    TooBusy {
        /// Pages that are dirty after the last round.
        dirty: u64,
        /// Pages in that round.
        pages: u64,
        /// The stop that it would take.
        expected: Duration,
        /// The stop that is allowed.
        allowed: Duration,
    },
    /// Its writes cannot be tracked, or its state cannot be encoded.
    #[error("{0}")]
    Failed(String),
    /// The operator cancelled.
    #[error("the save was cancelled")]
    Cancelled,
    /// The machine stood still, and could not go on.
    #[error("the machine stands still and cannot go on: {why}")]
    NotResumed {
        /// Its right to run.
        permit: RunPermit,
        /// Why.
        why: GuestError,
        /// Why it was not saved either, if it was not.
        unsaved: Option<Box<SaveError>>,
    },
}

/// What a save did.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SaveReport {
    /// The bundle's id.
    pub id: BundleId,
    /// The base's.
    pub base: Option<BundleId>,
    /// Whether the machine goes on; it ended otherwise.
    pub runs_on: bool,
    /// From the command until the bundle was on the disk.
    pub total_ms: f64,
    /// How long the guest stood still. Of a machine that ended: from its stop until the bundle was on
    /// the disk.
    pub stop_ms: f64,
    /// Rounds of pages, the last one with the guest paused included.
    pub rounds: u32,
    /// Pages read, those that were read again included.
    pub pages_read: u64,
    /// Pages read while the guest stood still.
    pub pages_in_stop: u64,
    /// Pages of data in the bundle.
    pub data_pages: u64,
    /// Pages in the bundle that are zero, and are not in the base.
    pub zero_pages: u64,
    /// Pages in the record of the working set.
    pub record_pages: u64,
    /// Bytes of the bundle's memory.
    pub memory_bytes: u64,
    /// Bytes of vCPU and device state.
    pub state_bytes: u64,
    /// Digest of all memory.
    pub memory_digest: Sum,
}

/// Saves `guest` to a bundle at `dir`. Blocks until the bundle is on the disk; `watch` is called from
/// this thread.
///
/// # Errors
/// What was at `dir` before is still whole, and the machine goes on, unless the error says otherwise.
pub fn save(
    guest: &mut dyn Guest,
    dir: &Path,
    options: &SaveOptions,
    canceller: &SaveCanceller,
    watch: &mut dyn FnMut(SaveEvent),
) -> Result<SaveReport, SaveError> {
    let (began, spec) = (Instant::now(), guest.spec());
    let mut stop = Duration::ZERO;
    if let Some(base) = &options.base {
        // The machine's number is in its permit.
        let (machine, stood) = number_of(guest)?;
        stop += stood;
        base.check_base_of(machine, &spec.extents)?;
    }
    let draft = Draft::begin(dir, spec, options.base.clone())?;
    let view = guest.memory();
    let page = vec![0; PAGE_BYTES];
    let (counts, told) = (Counts::default(), Instant::now());
    let saving = Saving { draft, options, view, page, canceller, watch, counts, told };
    let (committed, stood, counts) =
        if options.stop { saving.for_good(guest) } else { saving.running(guest) }?;
    stop += stood;
    Ok(SaveReport {
        id: committed.id,
        base: options.base.as_ref().map(|base| base.manifest().id),
        runs_on: !options.stop,
        total_ms: report::ms(began.elapsed()),
        stop_ms: report::ms(stop),
        rounds: counts.rounds,
        pages_read: counts.pages_read,
        pages_in_stop: counts.pages_in_stop,
        data_pages: committed.memory.data_pages,
        zero_pages: committed.memory.zero_pages,
        record_pages: committed.record_pages,
        memory_bytes: committed.memory.bytes,
        state_bytes: committed.state.bytes,
        memory_digest: committed.memory.digest,
    })
}

/// The machine's lasting number, and how long it stood still to be asked.
fn number_of(guest: &mut dyn Guest) -> Result<(BundleId, Duration), SaveError> {
    let began = Instant::now();
    let permit = guest.pause()?;
    let machine = BundleId(permit.machine());
    match guest.resume(permit) {
        Ok(()) => Ok((machine, began.elapsed())),
        Err((permit, why)) => Err(SaveError::NotResumed { permit, why, unsaved: None }),
    }
}

/// The pages that `guest` touches in [`SAMPLE`], and those of them that it writes.
fn sample(guest: &mut dyn Guest, view: &GuestView) -> Result<[PageSet; 2], String> {
    let (mut tracking, resident) = Tracking::start(guest, view)?;
    let look = tracking::look(view);
    let written = tracking.rearm(&resident).and_then(|()| {
        std::thread::sleep(SAMPLE);
        tracking.harvest()
    });
    tracking.stop(guest);
    written.map(|written| [tracking::touched(look), written])
}

#[derive(Clone, Copy, Default)]
struct Counts {
    rounds: u32,
    pages_read: u64,
    pages_in_stop: u64,
}

struct Saving<'a> {
    draft: Draft,
    options: &'a SaveOptions,
    view: GuestView,
    page: Vec<u8>,
    canceller: &'a SaveCanceller,
    watch: &'a mut dyn FnMut(SaveEvent),
    counts: Counts,
    told: Instant,
}

type Done = (Committed, Duration, Counts);

impl Saving<'_> {
    fn for_good(mut self, guest: &mut dyn Guest) -> Result<Done, SaveError> {
        match sample(guest, &self.view) {
            Ok(sampled) => self.draft.record(sampled.iter()),
            // It is but a hint for the next restore.
            Err(why) => tracing::warn!("the bundle has no record of the working set: {why}"),
        }
        let began = Instant::now();
        let permit = guest.pause()?;
        let mut write = || -> Result<Vec<u8>, SaveError> {
            // Saving state may write to memory.
            let state = send::state_of(guest)?;
            let resident = self.view.resident()?;
            self.put_missing(&resident)?;
            self.round(resident, None)?;
            self.counts.pages_in_stop = self.counts.pages_read;
            // It stands still: its memory can be asked what it is.
            let digest = send::digest(&self.view).map_err(SaveError::Failed)?;
            self.draft.require_digest(Sum(digest));
            Ok(state)
        };
        let committed = write().and_then(|state| {
            (self.watch)(SaveEvent::Syncing);
            Ok(self.draft.commit(permit.machine(), &state)?)
        });
        match committed {
            Ok(committed) => Ok((committed, began.elapsed(), self.counts)),
            Err(e) => Err(match guest.resume(permit) {
                Ok(()) => e,
                Err((permit, why)) => {
                    SaveError::NotResumed { permit, why, unsaved: Some(Box::new(e)) }
                }
            }),
        }
    }

    fn running(mut self, guest: &mut dyn Guest) -> Result<Done, SaveError> {
        // It goes on, and pays a fault for each page that it touches again: not for more than a record names.
        let few = self.view.resident()?.len() <= RECORD_PAGES;
        let look = if few { tracking::look(&self.view) } else { None };
        if look.is_some() {
            // Before anything is copied, which touches it.
            std::thread::sleep(SAMPLE);
        }
        let touched = tracking::touched(look);
        let (mut tracking, resident) =
            Tracking::start(guest, &self.view).map_err(SaveError::Failed)?;
        let taken = self.take(guest, &mut tracking, resident);
        tracking.stop(guest);
        let Taken { machine, state, mut last, stood, harvests } = taken?;
        (self.watch)(SaveEvent::GoesOn(stood));
        self.draft.record([touched].iter().chain(&harvests));
        last.write(&mut self.draft)?;
        (self.watch)(SaveEvent::Syncing);
        let committed = self.draft.commit(machine, &state)?;
        Ok((committed, stood, self.counts))
    }

    /// Rounds while the guest runs, then the stop.
    fn take(
        &mut self,
        guest: &mut dyn Guest,
        tracking: &mut Tracking,
        resident: PageSet,
    ) -> Result<Taken, SaveError> {
        self.put_missing(&resident)?;
        let (mut pages, mut dirty) = (resident, PageSet::new());
        let mut harvests = Vec::new();
        for number in 1..=MAX_ROUNDS {
            let (before, began) = (pages.len(), Instant::now());
            self.round(pages, Some(tracking.trackers()))?;
            let took = began.elapsed();
            dirty = tracking.harvest().map_err(SaveError::Failed)?;
            if dirty.len() <= LAST_PAGES {
                break;
            }
            let shrinks = dirty.len() < before / 4 * 3;
            if (number > 2 && !shrinks) || number == MAX_ROUNDS {
                self.check_stop(dirty.len(), before, took)?;
                break;
            }
            pages = std::mem::take(&mut dirty);
            harvests.push(pages.clone());
        }
        let mut last = LastPages::with_room(dirty.len() + dirty.len() / 2 + LAST_PAGES);

        let began = Instant::now();
        let permit = guest.pause()?;
        let machine = permit.machine();
        let mut stand = || -> Result<Vec<u8>, SaveError> {
            dirty.union_with(&tracking.harvest().map_err(SaveError::Failed)?);
            // KVM's bitmap would tell of them again, and they would be copied twice.
            tracking.rearm(&dirty).map_err(SaveError::Failed)?;
            self.copy_last(&dirty, &mut last)?;
            let state = send::state_of(guest)?;
            let late = tracking.harvest().map_err(SaveError::Failed)?;
            self.copy_last(&late, &mut last)?;
            Ok(state)
        };
        let state = stand();
        let resumed = guest.resume(permit);
        let stood = began.elapsed();
        if let Err((permit, why)) = resumed {
            return Err(SaveError::NotResumed { permit, why, unsaved: state.err().map(Box::new) });
        }
        self.counts.rounds += 1;
        harvests.push(dirty);
        Ok(Taken { machine, state: state?, last, stood, harvests })
    }

    /// Refuses a stop for `dirty` pages that would be too long; the last round had `pages` and took `took`.
    fn check_stop(&self, dirty: u64, pages: u64, took: Duration) -> Result<(), SaveError> {
        let (copied, allowed) = (dirty.min(KEPT_PAGES), self.options.max_stop);
        let seconds = |each: f64, pages: u64| each * pages as f64;
        let expected = seconds(COPY_ONE.as_secs_f64(), copied)
            + seconds(took.as_secs_f64() / pages.max(1) as f64, dirty - copied);
        let expected =
            OVERHEAD + Duration::try_from_secs_f64(expected).unwrap_or(Duration::MAX / 2);
        if expected <= allowed {
            return Ok(());
        }
        Err(SaveError::TooBusy { dirty, pages, expected, allowed })
    }

    /// Pages of the base that hold nothing any more: not resident, and so not looked at, which would
    /// bring them into being. One that is written from now on is reported as dirty.
    fn put_missing(&mut self, resident: &PageSet) -> Result<(), SaveError> {
        let Some(base) = &self.options.base else { return Ok(()) };
        let mut missing = base.data_pages();
        missing.subtract(resident);
        Ok(each_page(&missing).try_for_each(|gfn| self.draft.put_zero(gfn))?)
    }

    fn round(&mut self, pages: PageSet, trackers: Option<Trackers>) -> Result<(), SaveError> {
        self.counts.rounds += 1;
        let number = self.counts.rounds;
        (self.watch)(SaveEvent::Round { round: number, pages: pages.len() });
        let round = Round::new(number, pages, trackers);
        loop {
            let batch = round.next_batch().map_err(|e| SaveError::Failed(words(&e)))?;
            if batch.is_empty() {
                return Ok(());
            }
            for gfn in batch.iter().flat_map(|run| run.start..run.end()) {
                self.view.read(gfn, &mut self.page)?;
                self.draft.put(gfn, &self.page)?;
                self.counts.pages_read += 1;
            }
            self.canceller.check()?;
            if self.told.elapsed() >= TELL_EVERY {
                self.told = Instant::now();
                (self.watch)(SaveEvent::Written { bytes: self.draft.written_bytes() });
            }
        }
    }

    fn copy_last(&mut self, pages: &PageSet, last: &mut LastPages) -> Result<(), SaveError> {
        self.counts.pages_read += pages.len();
        self.counts.pages_in_stop += pages.len();
        for run in pages.runs() {
            let mut rest = run;
            while rest.pages > 0 {
                if last.room() == 0 {
                    last.write(&mut self.draft)?;
                }
                let now = Run::new(rest.start, rest.pages.min(last.room()));
                self.view.read_run(now, &mut last.bytes)?;
                last.runs.push(now);
                rest = Run::new(now.end(), rest.pages - now.pages);
            }
        }
        Ok(())
    }
}

/// What was taken from a machine that goes on.
struct Taken {
    machine: u128,
    state: Vec<u8>,
    last: LastPages,
    stood: Duration,
    /// Pages that the guest wrote meanwhile, the latest last.
    harvests: Vec<PageSet>,
}

/// Pages that were copied while the guest stood still, in the order in which they were.
struct LastPages {
    runs: Vec<Run>,
    bytes: Vec<u8>,
}

impl LastPages {
    /// Room for `pages`, in memory that is there already: its faults shall not be the guest's stop.
    fn with_room(pages: u64) -> Self {
        let pages = usize::try_from(pages.min(KEPT_PAGES)).unwrap_or(0);
        let mut bytes = vec![1; pages * PAGE_BYTES];
        bytes.clear();
        Self { runs: Vec::with_capacity(pages), bytes }
    }

    fn room(&self) -> u64 {
        KEPT_PAGES.saturating_sub((self.bytes.len() / PAGE_BYTES) as u64)
    }

    fn write(&mut self, draft: &mut Draft) -> Result<(), BundleError> {
        let gfns = self.runs.iter().flat_map(|run| run.start..run.end());
        for (gfn, page) in gfns.zip(self.bytes.chunks_exact(PAGE_BYTES)) {
            draft.put(gfn, page)?;
        }
        self.runs.clear();
        self.bytes.clear();
        Ok(())
    }
}

fn each_page(pages: &PageSet) -> impl Iterator<Item = u64> {
    pages.runs().flat_map(|run| run.start..run.end())
}
