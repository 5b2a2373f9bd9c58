//! Every write through this process's mapping, by userfaultfd write-protection in asynchronous mode.
//!
//! The kernel resolves the write faults itself and notes them in the page table; `PAGEMAP_SCAN` finds the
//! pages written and protects them again in one step (Linux 6.7; Documentation/admin-guide/mm/pagemap.rst
//! and userfaultfd.rst). Works for plain memory and for KVM guests.
//!
//! # What "written" means where nothing is mapped
//! Private memory: a page that has no entry in the page table was never written, and one that is written
//! gets an unprotected entry, which reads as written. Nothing needs to be noted for untouched memory.
//!
//! Shared memory (memfd): the kernel may drop an entry (reclaim) and leave nothing behind, so "no entry"
//! must read as written, and every untouched page gets a marker (an entry of 8 bytes, no page).
//!
//! Huge pages (hugetlb) are shared, but never reclaimed: no entry is dropped, and they are as private memory. A
//! write to one is reported as a write to all of it.

use std::io;

use ferry_pages::{PageSet, Run};
use userfaultfd::{FeatureFlags, RegisterMode, Uffd, UffdBuilder};

use crate::pagemap::{Categories, Pagemap, Scan};
use crate::{DirtySource, Region, TrackError, place};

const NAME: &str = "uffd-wp";
/// `UFFD_FEATURE_WP_UNPOPULATED` and `UFFD_FEATURE_WP_ASYNC` of `linux/userfaultfd.h`.
const WP_UNPOPULATED: u64 = 1 << 13;
const WP_ASYNC: u64 = 1 << 15;

/// Finds private pages written; says nothing of pages without an entry, and leaves them so.
const PRIVATE: Scan = Scan {
    all: Categories::WRITTEN,
    none: Categories::NONE,
    any: Categories::PRESENT.or(Categories::SWAPPED),
    tell: Categories::NONE,
    write_protect: true,
};
/// Finds shared pages written. Asking for exactly this makes the kernel count a page without an entry as
/// written (`pagemap_scan_pmd_entry`).
const SHARED: Scan = Scan { any: Categories::NONE, tell: Categories::WRITTEN, ..PRIVATE };

/// Dirty tracking of plain memory by asynchronous write-protection. Re-arms as it collects.
///
/// While it tracks, the memory belongs to its userfaultfd: it cannot be registered with another (a
/// post-copy pager) at the same time. Where one has it for good (swap), that one's serves: see
/// [`registered`](Self::registered).
pub struct UffdWriteProtect {
    /// None where another one has registered the memory.
    uffd: Option<Uffd>,
    pagemap: Pagemap,
    regions: Vec<Region>,
    started: bool,
}

impl UffdWriteProtect {
    /// A tracker of `regions`, mappings of this process that stay as they are while it tracks.
    ///
    /// # Errors
    /// No access to userfaultfd, or a kernel before 6.7.
    pub fn new(regions: Vec<Region>) -> Result<Self, TrackError> {
        let uffd = UffdBuilder::new()
            .close_on_exec(true)
            .non_blocking(true)
            .user_mode_only(true)
            .require_features(FeatureFlags::from_bits_retain(WP_UNPOPULATED | WP_ASYNC))
            .create()
            .map_err(|e| {
                let what = "opening userfaultfd with asynchronous write-protection \
                            (Linux 6.7 or later, read and write access to /dev/userfaultfd)";
                TrackError::new(NAME, what, userfault_error(e))
            })?;
        let pagemap =
            Pagemap::open().map_err(|e| TrackError::new(NAME, "opening /proc/self/pagemap", e))?;
        Ok(Self { uffd: Some(uffd), pagemap, regions, started: false })
    }

    /// A tracker of `regions`, private memory that is registered with another userfaultfd for asynchronous
    /// write-protection, and stays so while this tracks.
    ///
    /// A page that is taken away and brought back reads as written; while it is away, nothing tells whether it was.
    /// Whoever takes pages away reports them.
    ///
    /// # Errors
    /// `/proc` is not mounted or hidden.
    pub fn registered(regions: Vec<Region>) -> Result<Self, TrackError> {
        let pagemap =
            Pagemap::open().map_err(|e| TrackError::new(NAME, "opening /proc/self/pagemap", e))?;
        Ok(Self { uffd: None, pagemap, regions, started: false })
    }

    fn arm(&mut self, region: Region) -> Result<(), TrackError> {
        let fail = |what: &str, e| TrackError::new(NAME, format!("{what} {}", place(&region)), e);
        let (start, bytes) = region.host_span();
        if let Some(uffd) = &self.uffd {
            uffd.register_with_mode(start, bytes, RegisterMode::WRITE_PROTECT).map_err(|e| {
                fail("registering (no other userfaultfd may have it)", userfault_error(e))
            })?;
        }
        if let Some(uffd) = self.uffd.as_ref().filter(|_| may_lose_entries(&region)) {
            uffd.write_protect(start, bytes)
                .map_err(|e| fail("write-protecting", userfault_error(e)))
        } else {
            self.pagemap
                .scan(region.host, region.run.pages, PRIVATE, |_, _| {})
                .map_err(|e| fail("write-protecting", e))
        }
    }
}

impl DirtySource for UffdWriteProtect {
    fn name(&self) -> &'static str {
        NAME
    }

    fn start(&mut self) -> Result<(), TrackError> {
        self.started = true;
        for region in self.regions.clone() {
            self.arm(region)?;
        }
        Ok(())
    }

    fn collect(&mut self, into: &mut PageSet) -> Result<(), TrackError> {
        for region in &self.regions {
            let scan = if may_lose_entries(region) { SHARED } else { PRIVATE };
            self.pagemap
                .scan(region.host, region.run.pages, scan, |first, pages| {
                    into.insert_run(Run::new(region.run.start + first, pages));
                })
                .map_err(|e| TrackError::new(NAME, format!("scanning {}", place(region)), e))?;
        }
        Ok(())
    }

    fn rearm(&mut self, _pages: &PageSet) -> Result<(), TrackError> {
        Ok(())
    }

    fn stop(&mut self) -> Result<(), TrackError> {
        self.started = false;
        let Some(uffd) = &self.uffd else { return Ok(()) };
        for region in &self.regions {
            let (start, bytes) = region.host_span();
            uffd.unregister(start, bytes).map_err(|e| {
                TrackError::new(
                    NAME,
                    format!("unregistering {}", place(region)),
                    userfault_error(e),
                )
            })?;
        }
        Ok(())
    }
}

impl Drop for UffdWriteProtect {
    fn drop(&mut self) {
        // Closing the descriptor would do as well; but the memory may be gone already, which is no fault.
        if self.started {
            let _ = self.stop();
        }
    }
}

fn may_lose_entries(region: &Region) -> bool {
    region.backing.is_some() && region.unit == 1
}

/// What the system said.
pub fn userfault_error(error: userfaultfd::Error) -> io::Error {
    use userfaultfd::Error;
    match error {
        Error::OpenDevUserfaultfd(e) => e,
        Error::SystemError(errno) | Error::CopyFailed(errno) | Error::ZeropageFailed(errno) => {
            io::Error::from_raw_os_error(errno as i32)
        }
        other => io::Error::other(other),
    }
}
