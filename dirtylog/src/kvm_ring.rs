//! vCPU writes by KVM's dirty rings: one ring a vCPU, in which the kernel writes each page once.
//!
//! A page is put into a ring when it becomes writable, and stays so until its entry was read, marked and
//! `KVM_RESET_DIRTY_RINGS` called. A ring that is full stops its vCPU (`KVM_EXIT_DIRTY_RING_FULL`): the
//! vCPU's own thread then empties the rings, and what it finds waits for the next `collect`.
//!
//! ```text
//!   vCPU thread ── exit "ring full" ──► on_full ─┐
//!                                                ├─ harvest, reset ──► pending ──► collect
//!   migration thread ── collect ─────────────────┘   (under one lock: the kernel wants one resetter)
//! ```
//!
//! # A ring that overflows
//! A KVM that emulates a guest's kernel instead of running it can write more pages than a ring holds before
//! it looks whether it is full. That is found here; the pages are lost. The next `collect` therefore turns
//! logging off and on, which protects every page anew, and *then* reports all: what was written before is
//! in the report, what is written later is logged. How the ring itself gets back in step, see `DirtyRing`.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use ferry_pages::{PageSet, Run};
use kvm_bindings::{KVM_CAP_DIRTY_LOG_RING, KVM_CAP_DIRTY_LOG_RING_ACQ_REL};
use kvm_ioctls::{VcpuFd, VmFd};

use crate::kvm::DirtyRing;
use crate::{DirtySource, Region, TrackError, kvm, pagemap, place};

const NAME: &str = "kvm-ring";

/// The dirty rings of a machine, shared by its vCPU threads and a [`KvmRing`].
///
/// Rings that are enabled and not tracked cost nothing: the kernel logs only memory slots that a
/// `KvmRing` has started on.
pub struct KvmRings {
    vm: Arc<VmFd>,
    entries: u32,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    rings: Vec<DirtyRing>,
    /// The tracked memory slots; empty when nothing tracks.
    regions: Vec<Region>,
    /// Harvested and not collected yet.
    pending: PageSet,
    /// Slot and page of an entry that no region has: a page that cannot be reported.
    stray: Option<(u32, u64)>,
    /// A ring has overflowed: pages were lost that the next `collect` must make up for.
    overflowed: bool,
    /// The operator was told.
    warned: bool,
}

impl KvmRings {
    /// Enables rings of at least `entries_per_vcpu` entries on a machine that has no vCPU yet.
    ///
    /// The number is rounded up to a power of two that fills pages, and bounded by what the kernel takes.
    /// On such a machine `KVM_GET_DIRTY_LOG`, and so [`KvmBitmap`](crate::KvmBitmap), does not work.
    ///
    /// # Errors
    /// The kernel has no dirty rings, or the machine has vCPUs already.
    pub fn enable(vm: &Arc<VmFd>, entries_per_vcpu: u32) -> Result<Self, TrackError> {
        let fail = |what: String, error| Err(TrackError::new(NAME, what, error));
        let offered = [KVM_CAP_DIRTY_LOG_RING_ACQ_REL, KVM_CAP_DIRTY_LOG_RING]
            .map(|cap| (cap, kvm::extension(vm, cap)))
            .into_iter()
            .find(|(_, max_bytes)| *max_bytes > 0);
        let Some((capability, max_bytes)) = offered else {
            let what = "this kernel has no dirty rings: use the bitmap".into();
            return fail(what, io::ErrorKind::Unsupported.into());
        };
        let entry_bytes = DirtyRing::ENTRY_BYTES as u64;
        let smallest = ferry_pages::PAGE_BYTES as u64 / entry_bytes;
        let entries = u64::from(entries_per_vcpu).next_power_of_two().max(smallest);
        let entries = u32::try_from(entries.min(max_bytes / entry_bytes)).unwrap_or(u32::MAX);
        if let Err(error) = kvm::enable(vm, capability, u64::from(entries) * entry_bytes) {
            return fail(
                format!(
                    "enabling rings of {entries} entries (before the first vCPU, once, not too small)"
                ),
                error,
            );
        }
        Ok(Self { vm: Arc::clone(vm), entries, state: Mutex::default() })
    }

    /// Entries of each ring.
    pub fn entries(&self) -> u32 {
        self.entries
    }

    /// Takes in a vCPU of the machine, before it runs with tracking on.
    ///
    /// # Errors
    /// Its ring cannot be mapped.
    pub fn add_vcpu(&self, vcpu: &VcpuFd) -> Result<(), TrackError> {
        let ring = DirtyRing::map(vcpu, self.entries)
            .map_err(|e| TrackError::new(NAME, "mapping the dirty ring of a vCPU", e))?;
        self.lock().rings.push(ring);
        Ok(())
    }

    /// Empties the rings: what the thread of `vcpu` does each time that it left with
    /// `KVM_EXIT_DIRTY_RING_FULL`, and at no other time, before it runs on.
    ///
    /// No page is lost: the next `collect` returns it.
    ///
    /// # Errors
    /// The kernel refused to reset the rings.
    pub fn on_full(&self, vcpu: &VcpuFd) -> Result<(), TrackError> {
        let mut state = self.lock();
        state.drain(&self.vm)?;
        let Some(ring) = state.rings.iter_mut().find(|r| r.is_of(vcpu)) else { return Ok(()) };
        if ring.release(|| kvm::reset_dirty_rings(&self.vm)).map_err(reset_failed)? {
            state.note_overflow();
        }
        Ok(())
    }

    /// A tracker of `regions`, which are memory slots of the machine with no other flag than logging.
    pub fn source(self: &Arc<Self>, regions: Vec<Region>) -> KvmRing {
        KvmRing { rings: Arc::clone(self), regions, started: false }
    }

    /// The state is whole after every step, so that a thread which panicked left nothing half done.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// Moves what the rings hold to `pending` and re-arms it.
    fn drain(&mut self, vm: &VmFd) -> Result<(), TrackError> {
        let Self { rings, regions, pending, stray, .. } = self;
        let mut overflowed = false;
        // One after the other: what the kernel says to have re-armed is then of one ring.
        for ring in rings {
            let mut unknown = None;
            let torn = ring.empty(
                || kvm::reset_dirty_rings(vm),
                |slot, page| {
                    let region = regions.iter().find(|r| r.slot == slot && page < r.run.pages);
                    match region {
                        Some(region) => {
                            pending.insert(region.run.start + page);
                        }
                        None => unknown = Some((slot, page)),
                    }
                },
            );
            let torn = torn.map_err(reset_failed)?;
            overflowed |= torn;
            if !torn {
                *stray = stray.or(unknown);
            }
        }
        if overflowed {
            self.note_overflow();
        }
        Ok(())
    }

    fn note_overflow(&mut self) {
        // With nothing tracked, what the rings hold is of nobody's interest.
        if self.regions.is_empty() {
            return;
        }
        self.overflowed = true;
        if !std::mem::replace(&mut self.warned, true) {
            tracing::warn!(
                "a vCPU dirtied more pages than its dirty ring holds before the kernel stopped it, as happens \
                 where KVM emulates the guest's kernel: no page is lost, but all of the machine's memory counts \
                 as dirty again each time; --dirty-log bitmap avoids it"
            );
        }
    }
}

fn reset_failed(error: io::Error) -> TrackError {
    TrackError::new(NAME, "resetting the dirty rings", error)
}

/// Dirty tracking of vCPU writes by the rings of [`KvmRings`]. Re-arms as it collects.
///
/// Vcpus may run meanwhile. On a CPU that logs pages in hardware (PML) the last few hundred pages of a
/// running vCPU are reported after it left guest mode; a paused one hides nothing.
pub struct KvmRing {
    rings: Arc<KvmRings>,
    regions: Vec<Region>,
    started: bool,
}

impl KvmRing {
    fn log(&self, on: bool) -> Result<(), TrackError> {
        for region in &self.regions {
            kvm::log_dirty_pages(&self.rings.vm, region, on).map_err(|e| {
                let on = if on { "on" } else { "off" };
                TrackError::new(
                    NAME,
                    format!("turning dirty logging {on} for {}", place(region)),
                    e,
                )
            })?;
        }
        Ok(())
    }
}

/// Adds all pages that a guest can have written. (A page of shared memory may hold data without being
/// mapped, so that all of it counts.)
fn insert_written(region: &Region, into: &mut PageSet) {
    let run = region.run;
    let scanned = match region.backing {
        None => pagemap::populated(region.host, run.pages, |first, pages| {
            into.insert_run(Run::new(run.start + first, pages));
        }),
        Some(_) => Err(io::ErrorKind::Unsupported.into()),
    };
    if scanned.is_err() {
        into.insert_run(run);
    }
}

impl DirtySource for KvmRing {
    fn name(&self) -> &'static str {
        NAME
    }

    fn start(&mut self) -> Result<(), TrackError> {
        self.started = true;
        let mut state = self.rings.lock();
        state.drain(&self.rings.vm)?;
        // What was left of an earlier time says nothing about this one.
        state.pending.clear();
        state.stray = None;
        state.overflowed = false;
        state.regions.clone_from(&self.regions);
        drop(state);
        self.log(true)
    }

    fn collect(&mut self, into: &mut PageSet) -> Result<(), TrackError> {
        let mut state = self.rings.lock();
        state.drain(&self.rings.vm)?;
        if state.overflowed {
            // What a ring loses from here on is found by a later drain.
            self.log(false)?;
            self.log(true)?;
            state.overflowed = false;
            for region in &self.regions {
                insert_written(region, into);
            }
        }
        into.union_with(&std::mem::take(&mut state.pending));
        match state.stray.take() {
            None => Ok(()),
            Some((slot, page)) => {
                let what = format!(
                    "the kernel logged page {page:#x} of slot {slot}, which is not tracked"
                );
                Err(TrackError::new(NAME, what, io::ErrorKind::InvalidData.into()))
            }
        }
    }

    fn rearm(&mut self, _pages: &PageSet) -> Result<(), TrackError> {
        Ok(())
    }

    fn stop(&mut self) -> Result<(), TrackError> {
        self.started = false;
        self.log(false)?;
        let mut state = self.rings.lock();
        state.drain(&self.rings.vm)?;
        *state = State { rings: std::mem::take(&mut state.rings), ..State::default() };
        Ok(())
    }
}

impl Drop for KvmRing {
    fn drop(&mut self) {
        if self.started
            && let Err(error) = self.stop()
        {
            tracing::warn!(%error, "the guest goes on with dirty logging");
        }
    }
}
