//! Which pages of a running guest changed.
//!
//! A [`DirtySource`] watches guest memory. Several may watch the same machine (vCPU writes by KVM,
//! device writes by a software bitmap): what they find is OR-ed into one [`PageSet`].
//!
//! | backend | watches | begins from clean | re-arms |
//! |---|---|---|---|
//! | [`KvmBitmap`] | vCPUs | populated pages read as dirty until re-armed | by `rearm`, just before a copy |
//! | [`KvmRing`] | vCPUs | yes | as it collects |
//! | [`UffdWriteProtect`] | every writer through this process's mapping; huge pages as a whole | yes | as it collects |
//! | [`SoftwareBitmap`] | whoever marks: devices | yes | as it collects |
//!
//! No backend reports a discard (`MADV_DONTNEED`, a punched hole) or a write through another mapping of
//! shared memory. This crate does not know what is done with a dirty page.

mod kvm;
mod kvm_bitmap;
mod kvm_ring;
pub mod pagemap;
mod software;
mod uffd_wp;

use std::io;

use ferry_pages::{PAGE_BYTES, PageSet, Run};

pub use kvm_bitmap::KvmBitmap;
pub use kvm_ring::{KvmRing, KvmRings};
pub use software::{RegionBitmap, RegionBitmapSlice, SoftwareBitmap};
pub use uffd_wp::{UffdWriteProtect, userfault_error};

/// Where a stretch of guest memory lies on this host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Region {
    /// The guest frames.
    pub run: Run,
    /// Address of the first page in this process.
    pub host: usize,
    /// The KVM memory slot, for a KVM guest.
    pub slot: u32,
    /// The descriptor and offset that back the mapping, where it is shared (memfd); `None` where it is
    /// private.
    pub backing: Option<(std::os::fd::RawFd, u64)>,
    /// How many pages the host holds or lacks together: 1, or 512 where the memory is of huge pages
    /// (hugetlb), which is always shared.
    pub unit: u64,
}

impl Region {
    /// Address and bytes in this process, as the kernel is given them.
    pub fn host_span(&self) -> (*mut std::ffi::c_void, usize) {
        let bytes =
            usize::try_from(self.run.pages).unwrap_or(usize::MAX).saturating_mul(PAGE_BYTES);
        (std::ptr::with_exposed_provenance_mut(self.host), bytes)
    }

    /// The pages that the host holds or lacks together with page `gfn` of this region.
    pub fn unit_of(&self, gfn: u64) -> Run {
        Run::new(gfn - (gfn - self.run.start) % self.unit, self.unit)
    }

    /// The part of `run` that lies in this region.
    pub fn overlap(&self, run: Run) -> Option<Run> {
        let start = run.start.max(self.run.start);
        let end = run.end().min(self.run.end());
        (start < end).then(|| Run::new(start, end - start))
    }
}

/// Why tracking failed.
#[derive(Debug, thiserror::Error)]
#[error("dirty tracking ({source_name}): {what}")]
pub struct TrackError {
    /// The backend's name.
    pub source_name: &'static str,
    /// What it was doing, where.
    pub what: String,
    /// The system's word.
    #[source]
    pub source: io::Error,
}

impl TrackError {
    pub(crate) fn new(
        source_name: &'static str,
        what: impl Into<String>,
        source: io::Error,
    ) -> Self {
        Self { source_name, what: what.into(), source }
    }
}

/// A region by its frames, for an error's text.
pub(crate) fn place(region: &Region) -> String {
    format!("slot {} (frames {:#x}..{:#x})", region.slot, region.run.start, region.run.end())
}

/// A tracker of guest writes.
///
/// Call order: `start`, then any number of `collect` and `rearm`, then `stop`; and again from `start`. A
/// tracker that is dropped stops.
///
/// # What to send first
/// Pages that hold data are listed *after* `start` returned: whatever was written before is in the list,
/// whatever is written later is reported.
///
/// # The debt rule
/// A page that [`collect`](Self::collect) reported is a debt of the caller until its content is
/// delivered. A page is copied only after [`rearm`](Self::rearm) returned for it, so that a write after
/// the copy began is reported by a later `collect`. A backend that re-arms while it collects makes
/// `rearm` a no-op.
pub trait DirtySource: Send {
    /// The backend's name, for reports.
    fn name(&self) -> &'static str;
    /// Begins to track: every write from here on is reported. Where the backend cannot begin from
    /// "clean" it may report more pages than were written, never fewer.
    ///
    /// # Errors
    /// The kernel refused.
    fn start(&mut self) -> Result<(), TrackError>;
    /// Adds to `into` the pages written since they were last re-armed.
    ///
    /// # Errors
    /// The kernel refused; `into` may have been added to.
    fn collect(&mut self, into: &mut PageSet) -> Result<(), TrackError>;
    /// Re-arms exactly `pages`: no other page, or a write that nobody collected would be forgotten.
    /// Callers pass a window of memory at a time, just before they copy it.
    ///
    /// # Errors
    /// The kernel refused.
    fn rearm(&mut self, pages: &PageSet) -> Result<(), TrackError>;
    /// Ends tracking and what it cost the guest.
    ///
    /// # Errors
    /// The kernel refused.
    fn stop(&mut self) -> Result<(), TrackError>;
}
