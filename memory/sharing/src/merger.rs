//! Has the kernel merge pages of one machine: advises ranges, wakes the kernel's thread, reads back.

#![expect(unsafe_code, reason = "madvise on memory that is mapped for a guest")]

use std::io;
use std::time::Duration;

use ferry_dirtylog::Region;
use ferry_memory::GuestView;
use ferry_pages::{PageSet, Run};

use crate::ksmd::{ProcessFigures, Rest};
use crate::lease::Lease;
use crate::{Between, Ksm, MergeError, Tenant};

/// What the kernel had merged when its thread came to rest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Merged {
    /// Of this process, all its machines together.
    pub own: ProcessFigures,
    /// Of all processes of the host.
    pub host: crate::HostFigures,
    /// How it came to rest.
    pub rest: Rest,
}

/// Advises the kernel of pages of one machine.
///
/// While any are advised, no other tenant's may be on this host: a lock says so to other processes of Ferry,
/// until this is dropped. Drop it after the machine's memory, or [`withdraw`](Self::withdraw) first.
#[derive(Debug)]
pub struct Merger {
    view: GuestView,
    ksm: Ksm,
    /// Whose, where tenants are kept apart.
    tenant: Option<Tenant>,
    advised: PageSet,
    lease: Option<Lease>,
}

impl Merger {
    /// A merger that has advised nothing.
    pub fn new(view: GuestView, ksm: Ksm, tenant: Tenant, between: Between) -> Self {
        let tenant = Some(tenant).filter(|_| between == Between::OneTenant);
        Self { view, ksm, tenant, advised: PageSet::new(), lease: None }
    }

    /// The pages that are advised.
    pub fn advised(&self) -> &PageSet {
        &self.advised
    }

    /// Advises exactly `wanted` from now on. Pages that are advised no longer are each their own again when
    /// this returns, which takes as much memory as merging them gave back.
    ///
    /// # Errors
    /// The kernel merges no such memory, another tenant's pages are merged, or the kernel refused: then what was
    /// advised is what [`advised`](Self::advised) says.
    pub fn advise(&mut self, wanted: &PageSet) -> Result<(), MergeError> {
        let mut withdrawn = self.advised.clone();
        withdrawn.subtract(wanted);
        self.tell(&withdrawn, libc::MADV_UNMERGEABLE)?;
        let mut advised = wanted.clone();
        advised.subtract(&self.advised);
        if !advised.is_empty() {
            self.check_private(&advised)?;
            if self.lease.is_none() {
                self.lease = Some(Lease::take(&self.ksm, self.tenant.as_ref())?);
            }
            self.tell(&advised, libc::MADV_MERGEABLE)?;
        }
        if self.advised.is_empty() {
            self.lease = None;
        }
        Ok(())
    }

    /// Advises nothing any more; every page is its own again.
    ///
    /// # Errors
    /// As [`advise`](Self::advise).
    pub fn withdraw(&mut self) -> Result<(), MergeError> {
        self.advise(&PageSet::new())
    }

    /// Has the kernel merge what is advised, on the whole host, until it comes to rest, `patience` is over, or
    /// `stop` says so; waits as long for another process that does the same. Nothing is done if nothing is
    /// advised.
    ///
    /// # Errors
    /// The kernel's thread cannot be woken.
    pub fn merge(&self, patience: Duration, stop: &dyn Fn() -> bool) -> Result<Merged, MergeError> {
        if self.advised.is_empty() {
            return Ok(Merged::default());
        }
        let burst = self.ksm.burst(patience)?;
        let rest = burst.wait(patience, stop)?;
        let merged = Merged { own: Ksm::own_figures(), host: self.ksm.figures()?, rest };
        burst.end()?;
        Ok(merged)
    }

    /// The kernel takes the advice for shared memory, and does nothing.
    fn check_private(&self, pages: &PageSet) -> Result<(), MergeError> {
        let shared = self.view.regions().iter().filter(|r| r.backing.is_some());
        match shared.flat_map(|r| pages.runs_in(r.run)).next() {
            Some(run) => Err(MergeError::SharedMemory { run }),
            None => Ok(()),
        }
    }

    fn tell(&mut self, pages: &PageSet, advice: i32) -> Result<(), MergeError> {
        for region in self.view.regions() {
            for run in pages.runs_in(region.run) {
                madvise(region, run, advice).map_err(|source| match source.raw_os_error() {
                    Some(libc::EINVAL) => MergeError::NoKsm { path: self.ksm.run_path() },
                    _ => MergeError::Advise { run, source },
                })?;
                match advice {
                    libc::MADV_MERGEABLE => self.advised.insert_run(run),
                    _ => self.advised.remove_run(run),
                };
            }
        }
        Ok(())
    }
}

/// Advises the kernel of `run`, a part of `region`, which is of a [`GuestView`].
fn madvise(region: &Region, run: Run, advice: i32) -> io::Result<()> {
    let part = Region { run, host: host_of(region, run), ..*region };
    let (start, bytes) = part.host_span();
    // SAFETY: the part lies in a region of a view that is alive, and so is mapped (contract of
    // `GuestView::new`). Merging and un-merging change neither mappings nor what any page reads as.
    match unsafe { libc::madvise(start, bytes, advice) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Where `run`, a part of `region`, begins.
fn host_of(region: &Region, run: Run) -> usize {
    let before =
        Region { run: Run::new(region.run.start, run.start - region.run.start), ..*region };
    region.host + before.host_span().1
}
