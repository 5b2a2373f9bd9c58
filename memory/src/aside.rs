//! Taking pages out of a machine that runs: each is moved aside in one step, so that no write is lost.
//!
//! `UFFDIO_MOVE` (Linux 6.8) changes page tables and copies nothing: who touches the page after it finds none.
//! Only private memory has pages that can be moved.
//!
//! Linux 6.18 may move a page and say that it did not: where the page's entry changes (it is written for the first
//! time, say) while it is being moved, `move_pages` in `mm/userfaultfd.c` tries again, succeeds, still holds the error
//! of the first attempt, and tries a third time, which finds its own page in the slot: `EEXIST`. To believe that is
//! to lose the page. So whoever is refused looks where the page is.

#![expect(unsafe_code, reason = "an ioctl that moves pages by address")]

use std::io;

use ferry_dirtylog::Region;
use ferry_pages::{PAGE_BYTES, Run};
use vmm_sys_util::ioctl::{_IOC_READ, _IOC_WRITE, ioctl_expr, ioctl_with_mut_ref};

use crate::{GuestView, Mapping, MemoryError, Userfault};

/// `struct uffdio_move`.
#[repr(C)]
struct MoveArg {
    dst: u64,
    src: u64,
    len: u64,
    mode: u64,
    moved: i64,
}

/// `UFFDIO_MOVE`.
fn uffdio_move() -> libc::c_ulong {
    #[expect(clippy::cast_possible_truncation, reason = "40 bytes")]
    ioctl_expr(_IOC_READ | _IOC_WRITE, 0xaa, 5, size_of::<MoveArg>() as u32)
}

/// What became of a page that was to be moved aside.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Moved {
    /// It is aside.
    Yes,
    /// There is none.
    Absent,
    /// It is in use by the kernel, or shared with others (KSM): it stays.
    Busy,
}

/// Room beside a machine's memory to which its pages are moved, one to a slot.
#[derive(Debug)]
pub struct Aside {
    userfault: Userfault,
    /// Slot n is at frame n.
    slots: GuestView,
    host: u64,
}

impl Aside {
    /// Room for `slots` pages.
    ///
    /// # Errors
    /// No access to userfaultfd, or a kernel that cannot move pages (before Linux 6.8).
    pub fn new(slots: u64) -> Result<Self, MemoryError> {
        let fail = |source| MemoryError::Userfault { source };
        let userfault = Userfault::open_for_moves().map_err(fail)?;
        let mapping = Mapping::anonymous(slots)?;
        userfault.watch(&mapping.region(0, 0), false).map_err(fail)?;
        let host = mapping.host() as u64;
        Ok(Self { userfault, slots: GuestView::of(vec![(0, mapping)])?, host })
    }

    /// Moves page `gfn` of `region` to `slot`, which is empty.
    ///
    /// # Errors
    /// The kernel refused for another reason than that of [`Moved::Busy`].
    pub fn take(&self, region: &Region, gfn: u64, slot: u64) -> Result<Moved, MemoryError> {
        let run = Run::new(gfn, 1);
        if region.overlap(run).is_none() || slot >= self.slots.regions()[0].run.pages {
            return Err(MemoryError::Outside { run });
        }
        let page = PAGE_BYTES as u64;
        let mut arg = MoveArg {
            dst: self.host + slot * page,
            src: region.host as u64 + (gfn - region.run.start) * page,
            len: page,
            mode: 0,
            moved: 0,
        };
        for _ in 0..8 {
            // SAFETY: the argument is ours, and as long as it says. The page moves from guest memory, on whose
            // content nothing relies (contract of `GuestView::new`), to a mapping of ours that is reached by
            // copies only.
            let ret = unsafe { ioctl_with_mut_ref(&self.userfault.fd(), uffdio_move(), &mut arg) };
            if ret == 0 {
                return Ok(Moved::Yes);
            }
            let error = io::Error::last_os_error();
            match error.raw_os_error() {
                Some(libc::ENOENT) => return Ok(Moved::Absent),
                Some(libc::EAGAIN | libc::EINTR) => arg.moved = 0,
                Some(libc::EBUSY) => return Ok(Moved::Busy),
                // The slot was empty: what is in it now is the page.
                Some(libc::EEXIST) if !is_there(arg.src) => return Ok(Moved::Yes),
                _ => return Err(MemoryError::Refused { what: "move aside", run, source: error }),
            }
        }
        Ok(Moved::Busy)
    }

    /// Copies the page in `slot`.
    ///
    /// # Errors
    /// There is no such slot.
    pub fn read(&self, slot: u64, page: &mut [u8]) -> Result<(), MemoryError> {
        self.slots.read(slot, page)
    }

    /// Empties the first `slots` slots.
    ///
    /// # Errors
    /// The kernel refused.
    pub fn clear(&self, slots: u64) -> Result<(), MemoryError> {
        self.slots.discard(Run::new(0, slots))
    }
}

/// Whether there is a page of private memory at `address`, be it one of zeros.
fn is_there(address: u64) -> bool {
    let mut there = 0;
    let page = std::ptr::without_provenance_mut(usize::try_from(address).unwrap_or(0));
    // SAFETY: one byte is written for the one page, of which nothing is touched.
    while unsafe { libc::mincore(page, PAGE_BYTES, &raw mut there) } < 0 {
        // The kernel has no memory just now; the page is ours, and mapped.
        if io::Error::last_os_error().raw_os_error() != Some(libc::EAGAIN) {
            return false;
        }
    }
    there & 1 == 1
}
