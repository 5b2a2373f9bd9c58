//! Sharing in a hosting process: a machine's equal pages are looked for and merged, when somebody asks for it.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError, TryLockError};
use std::time::{Duration, Instant};

use ferry_dirtylog::{DirtySource, TrackError};
use ferry_migrate::{Guest, PageSet, words};
use ferry_sharing::{Between, Fingerprints, Options, SAMPLE_BITS, Sharing, Tenant};
use ferry_swap::Swap;

use crate::machine::AnyMachine;
use crate::protocol::{ShareInfo, ShareRequest};

/// One burst of the kernel's merging takes no longer; what is left is for the next.
const PATIENCE: Duration = Duration::from_secs(10);
/// Hashes told at most.
const MOST_FINGERPRINTS: u64 = 1 << 18;
/// When nobody asked for a pass for so long, nobody will.
const IDLE: Duration = Duration::from_secs(100);
/// A process that ends waits no longer for a pass.
const ENDS_WITHIN: Duration = Duration::from_secs(2);

/// Looks at one machine, a pass at a time.
#[derive(Default)]
pub(crate) struct Sharer {
    work: Mutex<Option<Work>>,
    /// How many wait for a pass to be over.
    waiting: AtomicU32,
    last: Mutex<Option<ShareInfo>>,
}

struct Work {
    sharing: Sharing,
    tenant: Tenant,
    between: Between,
    /// None while they must not be at work.
    trackers: Option<Vec<Box<dyn DirtySource>>>,
    asked: Instant,
}

impl Drop for Work {
    fn drop(&mut self) {
        stop(self.trackers.take());
    }
}

impl Sharer {
    /// One pass over `machine`. Waits for one that is under way; then `refuse` may have a reason against it.
    pub(crate) fn pass(
        &self,
        machine: &AnyMachine,
        swap: impl Fn() -> Option<Swap>,
        refuse: impl Fn() -> Result<(), String>,
        request: ShareRequest,
    ) -> Result<(ShareInfo, Option<Fingerprints>), String> {
        let mut work = self.work();
        refuse()?;
        let work = Work::renew(&mut work, machine, &request)?;
        work.asked = Instant::now();
        let written = work.written(machine)?;
        work.sharing.set_first(request.first);
        if let Some(twins) = request.elsewhere {
            work.sharing.set_elsewhere(twins);
        }
        work.sharing.pass(&written).map_err(|e| words(&e))?;
        if request.merge {
            let stop = || self.waiting.load(Ordering::Relaxed) > 0;
            work.sharing.merge(PATIENCE, &stop);
        }
        let swap = swap().filter(|swap| swap.figures().limit_bytes.is_some());
        if let Some(swap) = &swap {
            work.propose(swap)?;
        }
        let info = work.info(swap.is_some());
        *self.last.lock().unwrap_or_else(PoisonError::into_inner) = Some(info.clone());
        let pages = machine.spec().memory_bytes() / crate::machine::PAGE_BYTES;
        let fingerprints =
            request.fingerprints.then(|| work.sharing.fingerprints(sample_bits(pages)));
        Ok((info, fingerprints))
    }

    /// What the last pass found and did.
    pub(crate) fn last(&self) -> Option<ShareInfo> {
        self.last.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Does `act` while no pass and no tracker of this is at work: others may have the machine's. The next pass
    /// begins anew, unless it is refused.
    pub(crate) fn aside<R>(&self, act: impl FnOnce() -> R) -> R {
        self.waiting.fetch_add(1, Ordering::Relaxed);
        let mut work = self.work();
        self.waiting.fetch_sub(1, Ordering::Relaxed);
        if let Some(work) = &mut *work {
            stop(work.trackers.take());
        }
        act()
    }

    /// Stops the trackers, which cost the guest something, when nobody asks any more.
    pub(crate) fn rest(&self) {
        if let Ok(mut work) = self.work.try_lock()
            && let Some(work) = work.as_mut().filter(|work| work.asked.elapsed() > IDLE)
        {
            stop(work.trackers.take());
        }
    }

    /// Ends merging, so that the host's settings are what they were when this process is gone.
    pub(crate) fn end(&self) {
        // For good: what comes now ends at once.
        self.waiting.fetch_add(1, Ordering::Relaxed);
        let begun = Instant::now();
        while begun.elapsed() < ENDS_WITHIN
            && matches!(self.work.try_lock(), Err(TryLockError::WouldBlock))
        {
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    fn work(&self) -> MutexGuard<'_, Option<Work>> {
        self.work.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Work {
    /// What there is, if it is for the tenant that is asked for; else from the beginning.
    fn renew<'a>(
        old: &'a mut Option<Self>,
        machine: &AnyMachine,
        request: &ShareRequest,
    ) -> Result<&'a mut Self, String> {
        let tenant = request.tenant.clone().or_else(|| old.as_ref().map(|w| w.tenant.clone()));
        let tenant = tenant.unwrap_or_default();
        let between = match request.between_tenants {
            Some(true) => Between::AllTenants,
            Some(false) => Between::OneTenant,
            None => old.as_ref().map_or(Between::OneTenant, |w| w.between),
        };
        if let Some(other) = old.as_mut().filter(|w| w.tenant != tenant || w.between != between) {
            // What is merged for another tenant must not stay so.
            other.sharing.withdraw().map_err(|e| words(&e))?;
            *old = None;
        }
        if old.is_none() {
            let options = Options { tenant: tenant.clone(), between, ..Options::default() };
            // Pages that are away must not be read, or they would come back.
            let sharing = Sharing::new(machine.memory().plain(), options).map_err(|e| words(&e))?;
            *old = Some(Self { sharing, tenant, between, trackers: None, asked: Instant::now() });
        }
        old.as_mut().ok_or_else(|| "pages cannot be looked at".to_owned())
    }

    /// The pages that were written since the last pass; all, if nobody looked since.
    fn written(&mut self, machine: &AnyMachine) -> Result<PageSet, String> {
        let all = || machine.memory().regions().iter().map(|r| r.run).collect::<PageSet>();
        let (mut trackers, begins) = match self.trackers.take() {
            Some(trackers) => (trackers, false),
            None => (machine.clone().dirty_sources().map_err(|e| words(&e))?, true),
        };
        let mut written = if begins { all() } else { PageSet::new() };
        let tracked = collect(&mut trackers, begins, &mut written);
        match tracked {
            Ok(()) => self.trackers = Some(trackers),
            Err(e) => {
                // What was written is not known: they begin anew.
                stop(Some(trackers));
                return Err(format!("what the guest writes cannot be tracked: {}", words(&e)));
            }
        }
        Ok(written)
    }

    /// Hands to swap what the kernel does not merge.
    fn propose(&self, swap: &Swap) -> Result<(), String> {
        let (zeros, unwritten) = self.sharing.to_swap();
        swap.give_back_zeros(&zeros).map_err(|e| words(&e))?;
        let instead = self.sharing.report().why_not().is_some_and(|why| !why.is_for_now());
        swap.prefer(&if instead { unwritten } else { PageSet::new() });
        Ok(())
    }

    fn info(&self, can_swap: bool) -> ShareInfo {
        let report = self.sharing.report();
        let why_not = report.why_not();
        ShareInfo {
            tenant: self.tenant.clone(),
            scanned_pages: report.pass.scanned_pages,
            changing_pages: report.pass.unstable_pages,
            lasting_pages: report.counts.held,
            zero_pages: report.counts.zero,
            equal_pages: report.counts.equal,
            advised_ranges: report.ranges as u64,
            advised_equal_pages: report.proposed_pages,
            merged_pages: report.read_back.merging_pages,
            profit_bytes: report.read_back.profit_bytes,
            at_rest: report.rest.at_rest,
            for_now: why_not.is_some_and(|why| why.is_for_now()),
            why_not: why_not.map(|why| words(why)),
            can_swap,
        }
    }
}

fn collect(
    trackers: &mut [Box<dyn DirtySource>],
    begins: bool,
    written: &mut PageSet,
) -> Result<(), TrackError> {
    for tracker in trackers.iter_mut() {
        if begins {
            tracker.start()?;
        }
        tracker.collect(written)?;
    }
    trackers.iter_mut().try_for_each(|tracker| tracker.rearm(written))
}

fn stop(trackers: Option<Vec<Box<dyn DirtySource>>>) {
    for mut tracker in trackers.into_iter().flatten() {
        if let Err(e) = tracker.stop() {
            tracing::warn!("{}", words(&e));
        }
    }
}

/// So thin a sample that what is told of a machine of `pages` pages is bounded.
fn sample_bits(pages: u64) -> u8 {
    let thinner = (pages >> SAMPLE_BITS).div_ceil(MOST_FINGERPRINTS).max(1);
    // At most 64.
    SAMPLE_BITS + u8::try_from(thinner.next_power_of_two().trailing_zeros()).unwrap_or(u8::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_told_of_a_machine_is_bounded() {
        for (pages, bits) in [(0, 4), (1 << 22, 4), ((1 << 22) + 16, 5), (1 << 24, 6)] {
            assert_eq!(sample_bits(pages), bits, "{pages}");
        }
    }
}
