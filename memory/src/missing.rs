//! Memory whose missing pages are supplied on demand, by userfaultfd.
//!
//! Whoever touches a page that is not there waits until it is placed. Pages of 4 KiB are made with their
//! content in one step, never where one exists. A huge page comes in parts: they are written to its file,
//! by a second mapping of ours, and when all are there the page is shown to the guest.
//!
//! ```text
//!                          guest's mapping, watched          ours
//!   4 KiB    UFFDIO_COPY ────────▶ page
//!   huge                           page ◀── UFFDIO_CONTINUE ── file ◀── parts
//! ```

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Once;

use ferry_dirtylog::Region;
use ferry_pages::{PAGE_BYTES, Run};

use crate::mapping::Mapping;
use crate::userfault::{Happened, Step, Userfault};
use crate::view::Part;
use crate::{GuestView, MemoryError};

/// Who may wait for a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Waiters {
    /// Code in user mode only: a system call that comes upon a missing page fails. Needs no privilege.
    User,
    /// KVM and system calls, too. Needs `/dev/userfaultfd` or a privilege.
    All,
}

/// Something happened to memory that is watched.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Touch {
    /// A thread waits for the page at frame `gfn`, or for the huge page around it.
    Fault {
        /// The page.
        gfn: u64,
        /// The thread's number in the system; 0 where it is not told ([`Waiters::User`]).
        thread: u32,
        /// It wants to write.
        write: bool,
    },
    /// These pages are being given back to the host (a balloon, say): they read as zeros from now on, and
    /// whoever gives them back waits until this was read.
    Removed(Run),
}

/// What came of placing pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Placed {
    /// Pages from the first on that are there now, whoever placed them.
    pub pages: u64,
    /// The others were not placed because memory is being given back: read the events, then try again.
    pub again: bool,
}

/// Memory of a machine whose missing pages are watched. Dropped, it is plain memory again, and who waits
/// goes on (with pages of zeros, or with what came of a huge page).
#[derive(Debug)]
pub struct MissingPages {
    view: GuestView,
    userfault: Userfault,
    /// Those that are watched.
    registered: Vec<Region>,
    /// Huge pages, by our second mapping.
    behind: GuestView,
    /// Once only: the memory may be another's to watch later.
    let_go: Once,
}

impl MissingPages {
    /// Watches all memory of `view`.
    ///
    /// # Errors
    /// No access to userfaultfd, memory that another one watches, or too few huge pages.
    pub fn watch(view: GuestView, waiters: Waiters) -> Result<Self, MemoryError> {
        let regions = view.regions().to_vec();
        let mut missing = Self::open(view, Userfault::open(waiters))?;
        missing.behind = Mapping::behind(regions.iter().filter(|region| region.unit > 1))?;
        for region in regions {
            missing.register(region, false)?;
        }
        Ok(missing)
    }

    /// Watches all memory of `view`, which is of pages of 4 KiB, so that its pages can come and go: those that are given
    /// back are not told ([`Touch::Removed`]), and an [`UffdWriteProtect`](ferry_dirtylog::UffdWriteProtect)
    /// may track the writes at the same time.
    ///
    /// # Errors
    /// As [`watch`](Self::watch), or memory in huge pages.
    pub fn watch_for_swap(view: GuestView) -> Result<Self, MemoryError> {
        let regions = view.regions().to_vec();
        if let Some(region) = regions.iter().find(|region| region.unit > 1) {
            return Err(MemoryError::Huge { run: region.run });
        }
        let mut missing = Self::open(view, Userfault::open_for_swap())?;
        missing.behind = Mapping::behind(regions.iter().filter(|r| r.backing.is_some()))?;
        for region in regions {
            missing.register(region, true)?;
        }
        Ok(missing)
    }

    /// Watches the private memory of `view` that can be watched, for the process's own threads.
    pub(crate) fn private(view: GuestView) -> Option<Self> {
        let private: Vec<Region> =
            view.regions().iter().filter(|r| r.backing.is_none()).copied().collect();
        let mut missing = Self::open(view, Userfault::open(Waiters::User)).ok()?;
        for region in private {
            // What is not registered is filled by plain copies.
            let _ = missing.register(region, false);
        }
        Some(missing)
    }

    /// Whether this process may watch memory for `waiters`.
    ///
    /// # Errors
    /// It may not.
    pub fn available(waiters: Waiters) -> Result<(), MemoryError> {
        Userfault::open(waiters).map(drop).map_err(|source| MemoryError::Userfault { source })
    }

    fn open(view: GuestView, userfault: io::Result<Userfault>) -> Result<Self, MemoryError> {
        let userfault = userfault.map_err(|source| MemoryError::Userfault { source })?;
        let behind = Mapping::behind([])?;
        Ok(Self { view, userfault, registered: Vec::new(), behind, let_go: Once::new() })
    }

    fn register(&mut self, region: Region, writes: bool) -> Result<(), MemoryError> {
        let watched = self.userfault.watch(&region, writes);
        watched.map_err(|source| MemoryError::Refused {
            what: "watch (no other userfaultfd may) missing pages of",
            run: region.run,
            source,
        })?;
        self.registered.push(region);
        Ok(())
    }

    pub(crate) fn is_watched(&self, region: &Region) -> bool {
        self.registered.contains(region)
    }

    /// The descriptor: readable when there are events.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.userfault.fd()
    }

    /// Appends what happened since the last call to `out`, as far as it is taken at a time; does not wait.
    ///
    /// # Errors
    /// The kernel's word was not understood.
    pub fn read(&self, out: &mut Vec<Touch>) -> io::Result<()> {
        out.extend(self.userfault.read()?.into_iter().filter_map(|happened| match happened {
            Happened::Fault { address, thread, write } => {
                Some(Touch::Fault { gfn: self.gfn(address)?, thread, write })
            }
            Happened::Removed(start, end) => {
                let pages = end.saturating_sub(start) / PAGE_BYTES as u64;
                Some(Touch::Removed(Run::new(self.gfn(start)?, pages)))
            }
        }));
        Ok(())
    }

    fn gfn(&self, address: u64) -> Option<u64> {
        self.registered.iter().find_map(|region| {
            let page = address.checked_sub(region.host as u64)? / PAGE_BYTES as u64;
            (page < region.run.pages).then(|| region.run.start + page)
        })
    }

    /// Places `bytes`, whole pages, from frame `gfn` on, and wakes who waits for them. Pages that are there
    /// stay as they are. Not for huge pages: see [`write_part`](Self::write_part).
    ///
    /// # Errors
    /// Part of it is not watched guest memory, or the host is out of memory.
    pub fn place(&self, gfn: u64, bytes: &[u8]) -> Result<Placed, MemoryError> {
        let mut rest = bytes;
        self.each(Run::new(gfn, (bytes.len() / PAGE_BYTES) as u64), |part| {
            let (now, later) = rest.split_at(part.bytes);
            rest = later;
            self.userfault.place(part.address(), now, PAGE_BYTES)
        })
    }

    /// Places pages as [`place`](Self::place) does, up to the first that is there; how many.
    pub(crate) fn place_new(&self, gfn: u64, bytes: &[u8]) -> Result<u64, MemoryError> {
        let mut rest = bytes;
        let placed = self.each(Run::new(gfn, (bytes.len() / PAGE_BYTES) as u64), |part| {
            let (now, later) = rest.split_at(part.bytes);
            rest = later;
            let mut at = 0;
            while at < part.bytes {
                match self.userfault.copy(part.address() + at as u64, &now[at..])? {
                    Step::Done(bytes) => at += bytes,
                    Step::Here | Step::Absent | Step::Again => break,
                }
            }
            Ok(at)
        })?;
        Ok(placed.pages)
    }

    /// Writes `bytes`, whole pages from frame `gfn` on, to huge pages that are not there: nobody sees them
    /// until [`place_zeros`](Self::place_zeros).
    ///
    /// # Errors
    /// Part of it is not in huge pages, or the host has no more of them.
    pub fn write_part(&self, gfn: u64, bytes: &[u8]) -> Result<(), MemoryError> {
        let run = Run::new(gfn, (bytes.len() / PAGE_BYTES) as u64);
        // A plain write would end the process where the host has no page.
        self.behind.prefault_write(run)?;
        self.behind.write(gfn, bytes)
    }

    /// Makes the pages of `run` be there, zeros but for what was written by
    /// [`write_part`](Self::write_part), and wakes who waits for them. Pages that are there stay as they are.
    /// Of a huge page, all of it is meant.
    ///
    /// # Errors
    /// As [`place`](Self::place).
    pub fn place_zeros(&self, run: Run) -> Result<Placed, MemoryError> {
        self.each(run, |part| match part.region.unit {
            1 => self.userfault.place_zeros(part.address(), part.bytes, PAGE_BYTES),
            _ => self.show(part),
        })
    }

    /// Takes page `gfn` of shared memory, which is there, out of the mapping, and copies it: whoever touches it from
    /// here on waits until it is placed or shown.
    ///
    /// # Errors
    /// It is not in shared memory.
    pub fn take_shared(&self, gfn: u64, page: &mut [u8]) -> Result<(), MemoryError> {
        self.view.hide(Run::new(gfn, 1))?;
        self.behind.read(gfn, page)
    }

    /// Gives page `gfn`, which was taken, back to the host.
    ///
    /// # Errors
    /// The kernel refused.
    pub fn drop_shared(&self, gfn: u64) -> Result<(), MemoryError> {
        self.behind.discard(Run::new(gfn, 1))
    }

    /// Maps the shared page of zeros at the pages of `run`, up to the first that is there: whoever writes to one
    /// later gets a page of its own from the kernel. Nobody is told how far it came, and nothing is woken for those
    /// that were there.
    pub fn map_zeros(&self, run: Run) {
        let _ = self.each(run, |part| {
            // Partly done is as good as done.
            let _ = self.userfault.zeros(part.address(), part.bytes);
            Ok(part.bytes)
        });
    }

    /// Shows huge pages; how many bytes of them are there.
    fn show(&self, part: &Part) -> io::Result<usize> {
        let unit = part.region.unit;
        let bytes = usize::try_from(unit).unwrap_or(1) * PAGE_BYTES;
        let mut at = 0;
        while at < part.bytes {
            let address = part.address() + at as u64;
            match self.userfault.show(address, bytes)? {
                Step::Done(bytes) => at += bytes,
                Step::Here => {
                    // Somebody may have begun to wait just as it came.
                    self.userfault.wake(address, bytes)?;
                    at += bytes;
                }
                Step::Absent => {
                    let first = part.run.start + (at / PAGE_BYTES) as u64;
                    self.behind.prefault_write(Run::new(first, unit)).map_err(io::Error::other)?;
                }
                Step::Again => break,
            }
        }
        Ok(at)
    }

    /// Calls `place` for the parts of `run`, which says how many bytes of each are there.
    fn each(
        &self,
        run: Run,
        mut place: impl FnMut(&Part) -> io::Result<usize>,
    ) -> Result<Placed, MemoryError> {
        let mut placed = Placed { pages: 0, again: false };
        let bytes = usize::try_from(run.pages).unwrap_or(usize::MAX).saturating_mul(PAGE_BYTES);
        self.view.each(run.start, bytes, |part| {
            if placed.again {
                return Ok(());
            }
            let there = place(&part).map_err(|source| MemoryError::Refused {
                what: "place",
                run: part.run,
                source,
            })?;
            placed.pages += (there / PAGE_BYTES) as u64;
            placed.again = there < part.bytes;
            Ok(())
        })?;
        Ok(placed)
    }

    /// Ends watching: memory is plain from now on, as when this is dropped.
    pub fn let_go(&self) {
        self.let_go.call_once(|| self.end());
    }

    fn end(&self) {
        for region in &self.registered {
            let (_, bytes) = region.host_span();
            // Closing the descriptor would do as well, but later if it was inherited.
            let _ = self.userfault.let_go(region.host as u64, bytes);
        }
        // The kernel lists the huge pages that are mapped; who asks which hold data asks for the guest's mapping.
        let huge = self.behind.regions().iter().any(|region| region.unit > 1);
        if let (true, Ok(written)) = (huge, self.behind.resident()) {
            for run in written.runs() {
                let _ = self.view.prefault_write(run);
            }
        }
    }
}

impl Drop for MissingPages {
    fn drop(&mut self) {
        self.let_go();
    }
}
