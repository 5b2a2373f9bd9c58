//! Filling memory that is mostly untouched, as pages arrive from elsewhere.
//!
//! A page that is first written by a plain copy costs a fault, and the kernel clears what is overwritten
//! at once. userfaultfd's `UFFDIO_COPY` makes the page with its content, and many in one call: about a
//! third less time in all.

use ferry_pages::{PAGE_BYTES, Run};

use crate::missing::MissingPages;
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
    missing: Option<MissingPages>,
}

impl Filler {
    /// A filler of all of `view`.
    pub fn new(view: GuestView) -> Self {
        Self { missing: MissingPages::private(view.clone()), view }
    }

    /// Copies `bytes`, whole pages, to memory from frame `gfn` on, whatever is there.
    ///
    /// # Errors
    /// Part of it is not guest memory (nothing was written), or the host is out of memory.
    pub fn fill(&self, gfn: u64, bytes: &[u8]) -> Result<(), MemoryError> {
        self.view.overwritten(Run::new(gfn, (bytes.len() / PAGE_BYTES) as u64));
        let mut rest = bytes;
        self.view.each(gfn, bytes.len(), |part| {
            let (now, later) = rest.split_at(part.bytes);
            rest = later;
            match &self.missing {
                Some(missing) if missing.is_watched(&part.region) => self.make(missing, &part, now),
                _ => {
                    self.view.prefault_write(part.run)?;
                    self.view.write(part.run.start, now)
                }
            }
        })
    }

    /// Makes the pages of `part` with content `bytes`; writes those that are there.
    fn make(&self, missing: &MissingPages, part: &Part, bytes: &[u8]) -> Result<(), MemoryError> {
        let (mut gfn, mut rest) = (part.run.start, bytes);
        while !rest.is_empty() {
            let made = missing.place_new(gfn, rest)?;
            gfn += made;
            rest = &rest[usize::try_from(made).unwrap_or(0) * PAGE_BYTES..];
            if let Some(page) = rest.get(..PAGE_BYTES) {
                self.view.write(gfn, page)?;
                gfn += 1;
                rest = &rest[PAGE_BYTES..];
            }
        }
        Ok(())
    }
}
