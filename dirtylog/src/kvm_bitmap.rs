//! vCPU writes by KVM's dirty bitmap, re-armed piece by piece just before pages are sent.
//!
//! With `KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2` a log that was read stays set, and its pages writable, until
//! `KVM_CLEAR_DIRTY_LOG` names them. So a page is write-protected once, right before it is copied, and a
//! write between the harvest and the copy costs the guest no fault. Where the kernel also offers
//! "initially set", turning the log on protects nothing: every bit begins as set.
//!
//! ```text
//!   start ── all bits set ──► clear those without a page behind them (nothing to protect: cheap)
//!   rearm(window) ── clear its pages ──► copy them ──► collect
//! ```

use std::sync::Arc;

use ferry_pages::{PageSet, Run};
use kvm_bindings::{
    KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, KVM_DIRTY_LOG_INITIALLY_SET,
    KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE,
};
use kvm_ioctls::VmFd;

use crate::{DirtySource, Region, TrackError, kvm, pagemap, place};

const NAME: &str = "kvm-bitmap";
/// Pages of one CLEAR (64 MiB): the kernel holds its MMU lock meanwhile, and vCPUs wait for it.
const CLEAR_PAGES: u64 = 16384;
/// Dirty tracking of vCPU writes by `KVM_GET_DIRTY_LOG` and `KVM_CLEAR_DIRTY_LOG`.
///
/// Where "initially set" is offered, the first `collect` reports every page that was populated at `start`
/// and has not been re-armed since: more than was written, never fewer.
pub struct KvmBitmap {
    vm: Arc<VmFd>,
    regions: Vec<Region>,
    /// Re-arming is ours to do.
    manual: bool,
    /// Every bit is set when logging is turned on.
    initially_set: bool,
    started: bool,
}

impl KvmBitmap {
    /// A tracker of `regions`, which are memory slots of `vm` with no other flag than dirty logging. Not
    /// for a machine on which dirty rings are enabled.
    ///
    /// # Errors
    /// The kernel offers manual protection and refuses to turn it on.
    pub fn new(vm: Arc<VmFd>, regions: Vec<Region>) -> Result<Self, TrackError> {
        let wanted = u64::from(KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE | KVM_DIRTY_LOG_INITIALLY_SET);
        let offered = kvm::extension(&vm, KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2) & wanted;
        let manual = offered & u64::from(KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE) != 0;
        if manual {
            kvm::enable(&vm, KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, offered)
                .map_err(|e| TrackError::new(NAME, "enabling manual dirty-log protection", e))?;
        }
        let initially_set = manual && offered & u64::from(KVM_DIRTY_LOG_INITIALLY_SET) != 0;
        Ok(Self::with(vm, regions, manual, initially_set))
    }

    /// A tracker as on a kernel without manual protection: reading the log clears it, and re-arms all.
    ///
    /// # Errors
    /// The kernel refuses to turn manual protection off.
    pub fn without_manual_protect(vm: Arc<VmFd>, regions: Vec<Region>) -> Result<Self, TrackError> {
        if kvm::extension(&vm, KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2) != 0 {
            kvm::enable(&vm, KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, 0)
                .map_err(|e| TrackError::new(NAME, "disabling manual dirty-log protection", e))?;
        }
        Ok(Self::with(vm, regions, false, false))
    }

    fn with(vm: Arc<VmFd>, regions: Vec<Region>, manual: bool, initially_set: bool) -> Self {
        Self { vm, regions, manual, initially_set, started: false }
    }

    /// Clears and re-arms those of `pages` that lie in `region`, exactly.
    fn clear(&self, region: &Region, pages: &PageSet) -> Result<(), TrackError> {
        let mut rest = region.run;
        while let Some(next) = pages.runs_in(rest).next() {
            // Bounds are multiples of 64 pages of the slot, but for the slot's end; which pages of the
            // window are meant, the bitmap says.
            let at = (next.start - region.run.start) / 64 * 64;
            let window = Run::new(region.run.start + at, CLEAR_PAGES.min(region.run.pages - at));
            let mut bits = Vec::new();
            let mut end = 0;
            for run in pages.runs_in(window) {
                end = run.end() - window.start;
                set_bits(&mut bits, run.start - window.start, run.pages);
            }
            let count = end.next_multiple_of(64).min(window.pages);
            // At most CLEAR_PAGES.
            let count = u32::try_from(count).unwrap_or(u32::MAX);
            kvm::clear_dirty_log(&self.vm, region.slot, at, count, &mut bits).map_err(|e| {
                let what =
                    format!("clearing the log of {count} pages at {at:#x} of {}", place(region));
                TrackError::new(NAME, what, e)
            })?;
            rest = Run::new(window.end(), region.run.end() - window.end());
        }
        Ok(())
    }

    /// Clears the bits of pages that hold nothing: there is nothing to send, and nothing to protect.
    ///
    /// A page that is filled while this runs is filled before `start` returns, and need not be reported.
    fn clear_unpopulated(&self) -> Result<(), TrackError> {
        for region in &self.regions {
            let mut empty: PageSet = [region.run].into_iter().collect();
            let scanned = pagemap::populated(region.host, region.run.pages, |first, pages| {
                empty.remove_run(Run::new(region.run.start + first, pages));
            });
            if let Err(error) = scanned {
                // Only an economy: the caller is told of more pages than it needs to send.
                tracing::warn!(%error, "cannot tell which guest pages are populated; all begin as dirty");
                return Ok(());
            }
            self.clear(region, &empty)?;
        }
        Ok(())
    }
}

impl DirtySource for KvmBitmap {
    fn name(&self) -> &'static str {
        NAME
    }

    fn start(&mut self) -> Result<(), TrackError> {
        self.started = true;
        for region in &self.regions {
            kvm::log_dirty_pages(&self.vm, region, true).map_err(|e| {
                TrackError::new(NAME, format!("turning dirty logging on for {}", place(region)), e)
            })?;
        }
        if self.initially_set {
            self.clear_unpopulated()?;
        }
        Ok(())
    }

    fn collect(&mut self, into: &mut PageSet) -> Result<(), TrackError> {
        for region in &self.regions {
            let log = kvm::dirty_log(&self.vm, region).map_err(|e| {
                TrackError::new(NAME, format!("reading the log of {}", place(region)), e)
            })?;
            into.insert_bitmap(region.run.start, &log, region.run.pages);
        }
        Ok(())
    }

    fn rearm(&mut self, pages: &PageSet) -> Result<(), TrackError> {
        if !self.manual {
            return Ok(());
        }
        self.regions.iter().try_for_each(|region| self.clear(region, pages))
    }

    fn stop(&mut self) -> Result<(), TrackError> {
        self.started = false;
        for region in &self.regions {
            kvm::log_dirty_pages(&self.vm, region, false).map_err(|e| {
                TrackError::new(NAME, format!("turning dirty logging off for {}", place(region)), e)
            })?;
        }
        Ok(())
    }
}

impl Drop for KvmBitmap {
    fn drop(&mut self) {
        if self.started
            && let Err(error) = self.stop()
        {
            tracing::warn!(%error, "the guest goes on with dirty logging");
        }
    }
}

/// Sets `count` bits from bit `first` on, which is behind all that are set.
fn set_bits(words: &mut Vec<u64>, first: u64, count: u64) {
    let mut at = first;
    while at < first + count {
        let bits = (64 - at % 64).min(first + count - at);
        let word = usize::try_from(at / 64).unwrap_or(usize::MAX);
        if words.len() <= word {
            words.resize(word + 1, 0);
        }
        words[word] |= (u64::MAX >> (64 - bits)) << (at % 64);
        at += bits;
    }
}
