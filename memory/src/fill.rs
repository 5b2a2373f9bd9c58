//! Filling memory that is mostly untouched, as pages arrive from elsewhere.
//!
//! A page that is first written by a plain copy costs a fault, and the kernel clears what is overwritten
//! at once. userfaultfd's `UFFDIO_COPY` makes the page with its content, and many in one call: about a
//! third less time in all.

#![expect(unsafe_code, reason = "the kernel copies to memory that is given by address")]

use std::io;

use ferry_dirtylog::Region;
use ferry_pages::PAGE_BYTES;
use userfaultfd::{Error, RegisterMode, Uffd, UffdBuilder};

use crate::view::Part;
use crate::{GuestView, MemoryError};

/// Fills the memory of a machine that has not run yet; several threads at once.
///
/// While it lives, whoever else touches a page that is not there yet waits until it is filled, or until
/// this is dropped. Where the memory cannot be registered with userfaultfd (it is shared, or belongs to
/// another one, or there is none), it is filled by plain copies.
#[derive(Debug)]
pub struct Filler {
    view: GuestView,
    uffd: Option<Uffd>,
    registered: Vec<Region>,
}

impl Filler {
    /// A filler of all of `view`.
    pub fn new(view: GuestView) -> Self {
        // In user mode only: a system call that comes upon a missing page fails instead of waiting, and
        // no privilege is needed.
        let uffd =
            UffdBuilder::new().close_on_exec(true).non_blocking(true).user_mode_only(true).create();
        let uffd = uffd.ok();
        let private = view.regions().iter().filter(|region| region.backing.is_none());
        let registered = uffd.as_ref().map_or_else(Vec::new, |uffd| {
            let takes = |region: &&Region| {
                let (start, bytes) = span(region);
                uffd.register_with_mode(start, bytes, RegisterMode::MISSING).is_ok()
            };
            private.filter(takes).copied().collect()
        });
        Self { view, uffd, registered }
    }

    /// Copies `bytes`, whole pages, to memory from frame `gfn` on, whatever is there.
    ///
    /// # Errors
    /// Part of it is not guest memory (nothing was written), or the host is out of memory.
    pub fn fill(&self, gfn: u64, bytes: &[u8]) -> Result<(), MemoryError> {
        let mut rest = bytes;
        self.view.each(gfn, bytes.len(), |part| {
            let (now, later) = rest.split_at(part.bytes);
            rest = later;
            match &self.uffd {
                Some(uffd) if self.registered.contains(&part.region) => self.make(uffd, &part, now),
                _ => {
                    self.view.prefault_write(part.run)?;
                    self.view.write(part.run.start, now)
                }
            }
        })
    }

    /// Makes the pages of `part` with content `bytes`; writes those that are there.
    fn make(&self, uffd: &Uffd, part: &Part, bytes: &[u8]) -> Result<(), MemoryError> {
        let mut done = 0;
        while done < bytes.len() {
            let rest = &bytes[done..];
            let at = part.host.wrapping_add(done);
            // SAFETY: the part is a mapping that is guest memory (contract of `GuestView::new`), on whose
            // content nothing relies; `rest` is ours. Pages that exist are not changed.
            let copied = unsafe { uffd.copy(rest.as_ptr().cast(), at.cast(), rest.len(), true) };
            done += match copied {
                Ok(copied) => copied,
                // Up to a page that is there; nothing at all shows as a negative number.
                Err(Error::PartiallyCopied(copied)) if copied <= rest.len() => copied,
                Err(Error::PartiallyCopied(_)) => 0,
                Err(Error::CopyFailed(errno)) if errno as i32 == libc::EEXIST => {
                    let page = &rest[..rest.len().min(PAGE_BYTES)];
                    self.view.write(part.run.start + (done / PAGE_BYTES) as u64, page)?;
                    page.len()
                }
                Err(e) => {
                    let source = match e {
                        Error::CopyFailed(errno) => io::Error::from_raw_os_error(errno as i32),
                        other => io::Error::other(other),
                    };
                    return Err(MemoryError::Refused { what: "fill", run: part.run, source });
                }
            };
        }
        Ok(())
    }
}

impl Drop for Filler {
    fn drop(&mut self) {
        let Some(uffd) = &self.uffd else { return };
        for region in &self.registered {
            let (start, bytes) = span(region);
            // Closing the descriptor would do as well, but later if it was inherited.
            let _ = uffd.unregister(start, bytes);
        }
    }
}

fn span(region: &Region) -> (*mut std::ffi::c_void, usize) {
    let bytes = usize::try_from(region.run.pages).unwrap_or(usize::MAX).saturating_mul(PAGE_BYTES);
    (std::ptr::with_exposed_provenance_mut(region.host), bytes)
}
