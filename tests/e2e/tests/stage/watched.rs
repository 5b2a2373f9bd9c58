//! A guest with a witness beside it, and with faults that stand for a wrong implementation.
//!
//! The witness counts machines that run: it is told before a guest is let go and after it stood still,
//! so that it cannot miss a moment in which two run.

use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use ferry_dirtylog::{DirtySource, SoftwareBitmap, TrackError};
use ferry_memory::GuestView;
use ferry_migrate::{
    Guest, GuestError, Host, MachineSpec, Refusal, RunPermit, StateReader, StateWriter,
};
use ferry_pages::{PAGE_BYTES, PageSet, Run};

use super::Subject;

/// Sees how many of a machine's guests run.
#[derive(Debug, Default)]
pub struct Witness {
    running: AtomicI32,
    twice: AtomicBool,
    starts: AtomicI32,
}

impl Witness {
    pub fn new() -> Arc<Self> {
        Arc::default()
    }

    fn starts(&self) {
        self.starts.fetch_add(1, Ordering::SeqCst);
        if self.running.fetch_add(1, Ordering::SeqCst) > 0 {
            self.twice.store(true, Ordering::SeqCst);
        }
    }

    fn stopped(&self) {
        self.running.fetch_sub(1, Ordering::SeqCst);
    }

    /// How many run now.
    pub fn running(&self) -> i32 {
        assert!(!self.twice.load(Ordering::SeqCst), "the machine ran at both ends at once");
        self.running.load(Ordering::SeqCst)
    }

    /// How many times a guest was let go.
    pub fn times_started(&self) -> i32 {
        self.starts.load(Ordering::SeqCst)
    }
}

/// What a faulty implementation does wrong, on purpose.
#[derive(Clone, Copy, Debug, Default)]
pub struct Faults {
    /// One page's bit is dropped from each harvest.
    pub drop_one_harvested: bool,
    /// The machine's last page is written when it stands still, and again by `save`, as devices that
    /// are drained do; both times it is marked.
    pub drained_devices_write: bool,
    /// What is dirty after `save` is not collected.
    pub skip_harvest_after_save: bool,
}

/// What a drained device writes, first and last.
const DRAINED_AT_PAUSE: u8 = 0xaa;
pub const DRAINED_BY_SAVE: u8 = 0xd1;

/// What was harvested and what was given back.
#[derive(Debug, Default)]
pub struct Debts {
    /// Each harvest since the last acknowledged round: [`acknowledge`](Self::acknowledge) forgets the
    /// others.
    harvested: Vec<PageSet>,
    returned: PageSet,
}

impl Debts {
    /// A round was acknowledged: of the harvests only the last is still owed.
    pub fn acknowledge(&mut self) {
        let last = self.harvested.pop();
        self.harvested = last.into_iter().collect();
    }

    /// Pages owed and not returned; forgets everything.
    pub fn settle(&mut self) -> (PageSet, PageSet) {
        let mut owed = PageSet::new();
        for set in std::mem::take(&mut self.harvested) {
            owed.union_with(&set);
        }
        let returned = std::mem::take(&mut self.returned);
        (owed, returned)
    }
}

/// A guest that is watched.
pub struct Watched<G> {
    pub guest: G,
    witness: Arc<Witness>,
    faults: Faults,
    marks: Arc<SoftwareBitmap>,
    saved: Arc<AtomicBool>,
    pub debts: Arc<Mutex<Debts>>,
    runs: bool,
}

impl<G: Guest> Watched<G> {
    /// Watches a guest that runs.
    pub fn running(guest: G, witness: &Arc<Witness>) -> Self {
        witness.starts();
        let mut watched = Self::parked(guest, witness);
        watched.runs = true;
        watched
    }

    fn parked(guest: G, witness: &Arc<Witness>) -> Self {
        let extents = guest.spec().extents;
        let marks = extents.iter().map(|&(start, pages)| Run::new(start, pages));
        Self {
            marks: Arc::new(SoftwareBitmap::new(marks)),
            guest,
            witness: Arc::clone(witness),
            faults: Faults::default(),
            saved: Arc::default(),
            debts: Arc::default(),
            runs: false,
        }
    }

    #[must_use]
    pub fn with_faults(mut self, faults: Faults) -> Self {
        self.faults = faults;
        self
    }

    fn device_writes(&self, byte: u8) -> Result<(), GuestError> {
        let gfn = self.last_page();
        let written = self.memory().write(gfn, &[byte; PAGE_BYTES]);
        written.map_err(|e| GuestError::with("the device's page cannot be written", e))?;
        self.marks.mark(gfn);
        Ok(())
    }

    /// The last page of memory, which the guests' workloads leave alone.
    pub fn last_page(&self) -> u64 {
        self.guest.spec().extents.last().map_or(0, |e| e.0 + e.1 - 1)
    }
}

impl<G> Drop for Watched<G> {
    fn drop(&mut self) {
        if self.runs {
            self.witness.stopped();
        }
    }
}

impl<G: Guest> Guest for Watched<G> {
    super::pass_on!(spec machine memory load);

    fn dirty_sources(&mut self) -> Result<Vec<Box<dyn DirtySource>>, GuestError> {
        let mut inner = self.guest.dirty_sources()?;
        inner.push(Box::new(Arc::clone(&self.marks)));
        self.saved.store(false, Ordering::SeqCst);
        Ok(vec![Box::new(Harvester {
            inner,
            faults: self.faults,
            saved: Arc::clone(&self.saved),
            debts: Arc::clone(&self.debts),
            begun: false,
            victims: PageSet::new(),
        })])
    }

    fn return_dirty(&mut self, pages: &PageSet) {
        self.debts.lock().unwrap().returned.union_with(pages);
        self.guest.return_dirty(pages);
    }

    fn pause(&mut self) -> Result<RunPermit, GuestError> {
        let permit = self.guest.pause()?;
        self.runs = false;
        self.witness.stopped();
        if self.faults.drained_devices_write {
            self.device_writes(DRAINED_AT_PAUSE)?;
        }
        Ok(permit)
    }

    fn resume(&mut self, permit: RunPermit) -> Result<(), (RunPermit, GuestError)> {
        self.witness.starts();
        let resumed = self.guest.resume(permit);
        self.runs = resumed.is_ok();
        if resumed.is_err() {
            self.witness.stopped();
        }
        resumed
    }

    fn save(&mut self, out: &mut StateWriter) -> Result<(), GuestError> {
        self.guest.save(out)?;
        if self.faults.drained_devices_write {
            // By then a lane has copied what was written at the pause.
            std::thread::sleep(Duration::from_millis(200));
            self.device_writes(DRAINED_BY_SAVE)?;
        }
        self.saved.store(true, Ordering::SeqCst);
        Ok(())
    }
}

impl<G: Subject> Subject for Watched<G> {
    fn written(&self) -> u64 {
        self.guest.written()
    }
    fn wrong(&self) -> Option<String> {
        self.guest.wrong()
    }
    fn runs(&self) -> bool {
        self.guest.runs()
    }
    fn is_busy(&self) -> bool {
        self.guest.is_busy()
    }
}

/// Collects from a guest's trackers, as well as the faults allow.
struct Harvester {
    inner: Vec<Box<dyn DirtySource>>,
    faults: Faults,
    saved: Arc<AtomicBool>,
    debts: Arc<Mutex<Debts>>,
    /// The first collection belongs to the start: what it finds is sent as resident.
    begun: bool,
    /// Pages whose bits were dropped, one at each harvest. The next bit of such a page would make it
    /// good: it is dropped as well.
    victims: PageSet,
}

impl DirtySource for Harvester {
    fn name(&self) -> &'static str {
        "watched"
    }

    fn start(&mut self) -> Result<(), TrackError> {
        self.begun = false;
        self.inner.iter_mut().try_for_each(|s| s.start())
    }

    fn collect(&mut self, into: &mut PageSet) -> Result<(), TrackError> {
        if self.faults.skip_harvest_after_save && self.saved.load(Ordering::SeqCst) {
            return Ok(());
        }
        let mut found = PageSet::new();
        for source in &mut self.inner {
            source.collect(&mut found)?;
        }
        if self.begun {
            if self.faults.drop_one_harvested {
                found.subtract(&self.victims);
                if let Some(gfn) = found.last() {
                    found.remove(gfn);
                    self.victims.insert(gfn);
                }
            }
            self.debts.lock().unwrap().harvested.push(found.clone());
        }
        self.begun = true;
        into.union_with(&found);
        Ok(())
    }

    fn rearm(&mut self, pages: &PageSet) -> Result<(), TrackError> {
        self.inner.iter_mut().try_for_each(|s| s.rearm(pages))
    }

    fn stop(&mut self) -> Result<(), TrackError> {
        self.inner.iter_mut().try_for_each(|s| s.stop())
    }
}

/// A host whose guests are watched.
pub struct WatchedHost<H> {
    pub host: H,
    pub witness: Arc<Witness>,
}

impl<H: Host> Host for WatchedHost<H> {
    type Guest = Watched<H::Guest>;

    fn prepare(&self, spec: &MachineSpec) -> Result<Self::Guest, Vec<Refusal>> {
        Ok(Watched::parked(self.host.prepare(spec)?, &self.witness))
    }
}
