//! Memory whose missing pages are supplied on demand, by userfaultfd.
//!
//! Whoever touches a page that is not there waits until it is placed. `UFFDIO_COPY` makes a page with its
//! content in one step and never touches one that exists: nothing that the guest wrote can be overwritten
//! (Documentation/admin-guide/mm/userfaultfd.rst).

#![expect(unsafe_code, reason = "the kernel copies to memory that is given by address")]

use std::ffi::c_void;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use ferry_dirtylog::Region;
use ferry_pages::{PAGE_BYTES, Run};
use userfaultfd::{Error, Event, FeatureFlags, IoctlFlags, RegisterMode, Uffd, UffdBuilder};

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
    /// A thread waits for the page at frame `gfn`.
    Fault {
        /// The page.
        gfn: u64,
        /// The thread's number in the system; 0 where it is not told ([`Waiters::User`]).
        thread: u32,
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
/// goes on (with pages of zeros).
#[derive(Debug)]
pub struct MissingPages {
    view: GuestView,
    uffd: Uffd,
    /// Host address ranges by region, of those that are watched.
    registered: Vec<Region>,
}

impl MissingPages {
    /// Watches all memory of `view`.
    ///
    /// # Errors
    /// No access to userfaultfd, or memory that another one watches.
    pub fn watch(view: GuestView, waiters: Waiters) -> Result<Self, MemoryError> {
        let regions = view.regions().to_vec();
        let mut missing = Self::open(view, waiters)?;
        for region in regions {
            missing.register(region)?;
        }
        Ok(missing)
    }

    /// Watches the private memory of `view` that can be watched, for the process's own threads.
    pub(crate) fn private(view: GuestView) -> Option<Self> {
        let private: Vec<Region> =
            view.regions().iter().filter(|r| r.backing.is_none()).copied().collect();
        let mut missing = Self::open(view, Waiters::User).ok()?;
        for region in private {
            // What is not registered is filled by plain copies.
            let _ = missing.register(region);
        }
        Some(missing)
    }

    /// Whether this process may watch memory for `waiters`.
    ///
    /// # Errors
    /// It may not.
    pub fn available(waiters: Waiters) -> Result<(), MemoryError> {
        descriptor(waiters).map(drop)
    }

    fn open(view: GuestView, waiters: Waiters) -> Result<Self, MemoryError> {
        Ok(Self { view, uffd: descriptor(waiters)?, registered: Vec::new() })
    }

    fn register(&mut self, region: Region) -> Result<(), MemoryError> {
        let (start, bytes) = region.host_span();
        let refused = |source| MemoryError::Refused {
            what: "watch (no other userfaultfd may) missing pages of",
            run: region.run,
            source,
        };
        let can = self
            .uffd
            .register_with_mode(start, bytes, RegisterMode::MISSING)
            .map_err(|e| refused(io_error(e)))?;
        self.registered.push(region);
        if can.contains(IoctlFlags::COPY | IoctlFlags::WAKE) {
            Ok(())
        } else {
            Err(refused(io::ErrorKind::Unsupported.into()))
        }
    }

    pub(crate) fn is_watched(&self, region: &Region) -> bool {
        self.registered.contains(region)
    }

    /// The descriptor: readable when there are events.
    pub fn fd(&self) -> BorrowedFd<'_> {
        // SAFETY: it is open as long as `self` is borrowed.
        unsafe { BorrowedFd::borrow_raw(self.uffd.as_raw_fd()) }
    }

    /// Appends what happened since the last call to `out`; does not wait.
    ///
    /// # Errors
    /// The kernel's word was not understood.
    pub fn read(&self, out: &mut Vec<Touch>) -> io::Result<()> {
        loop {
            match self.uffd.read_event() {
                Ok(None) => return Ok(()),
                Ok(Some(Event::Pagefault { addr, thread_id, .. })) => {
                    let thread = u32::try_from(thread_id.as_raw()).unwrap_or(0);
                    out.extend(self.gfn(addr).map(|gfn| Touch::Fault { gfn, thread }));
                }
                Ok(Some(Event::Remove { start, end })) => {
                    let (Some(first), bytes) =
                        (self.gfn(start), (end as usize).saturating_sub(start as usize))
                    else {
                        continue;
                    };
                    out.push(Touch::Removed(Run::new(first, (bytes / PAGE_BYTES) as u64)));
                }
                // Not asked for.
                Ok(Some(_)) => {}
                Err(e) => match io_error(e) {
                    e if e.kind() == io::ErrorKind::Interrupted => {}
                    e if e.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                    e => return Err(e),
                },
            }
        }
    }

    fn gfn(&self, address: *mut c_void) -> Option<u64> {
        let address = address as usize;
        self.registered.iter().find_map(|region| {
            let page = (address.checked_sub(region.host)? / PAGE_BYTES) as u64;
            (page < region.run.pages).then(|| region.run.start + page)
        })
    }

    /// Places `bytes`, whole pages, from frame `gfn` on, and wakes who waits for them. Pages that are there
    /// stay as they are.
    ///
    /// # Errors
    /// Part of it is not watched guest memory, or the host is out of memory.
    pub fn place(&self, gfn: u64, bytes: &[u8]) -> Result<Placed, MemoryError> {
        self.copy(gfn, bytes, Step::Here)
    }

    /// Places pages as [`place`](Self::place) does, up to the first that is there; how many.
    pub(crate) fn place_new(&self, gfn: u64, bytes: &[u8]) -> Result<u64, MemoryError> {
        self.copy(gfn, bytes, Step::Again).map(|placed| placed.pages)
    }

    /// `existing`: what to do at a page that is there.
    fn copy(&self, gfn: u64, bytes: &[u8], existing: Step) -> Result<Placed, MemoryError> {
        let mut rest = bytes;
        self.each_step("fill", Run::new(gfn, (bytes.len() / PAGE_BYTES) as u64), |at, len| {
            // SAFETY: a part of a mapping that is guest memory (contract of `GuestView::new`), on whose
            // content nothing relies; `rest` is ours, and at least `len` long. Pages that exist are not
            // changed.
            let copied = unsafe { self.uffd.copy(rest.as_ptr().cast(), at, len, true) };
            let step = match copied {
                Ok(bytes) => Step::Done(bytes),
                // Up to a page that is there; a negative number says that nothing was copied.
                Err(Error::PartiallyCopied(bytes)) if bytes > 0 && bytes <= len => {
                    Step::Done(bytes)
                }
                Err(Error::PartiallyCopied(_)) => Step::Again,
                Err(Error::CopyFailed(errno)) if errno as i32 == libc::EEXIST => existing,
                Err(e) => return Err(io_error(e)),
            };
            let done = match step {
                Step::Done(bytes) => bytes,
                Step::Here => PAGE_BYTES,
                Step::Again => 0,
            };
            rest = &rest[done.min(rest.len())..];
            Ok(step)
        })
    }

    /// Places pages of zeros at `run`, and wakes who waits for them. Pages that are there stay as they are.
    ///
    /// # Errors
    /// As [`place`](Self::place).
    pub fn place_zeros(&self, run: Run) -> Result<Placed, MemoryError> {
        let mut by_page = false;
        self.each_step("fill", run, |at, len| {
            let len = if by_page { PAGE_BYTES } else { len };
            // SAFETY: as in `place`.
            Ok(match unsafe { self.uffd.zeropage(at, len, true) } {
                Ok(bytes) => Step::Done(bytes),
                Err(Error::ZeropageFailed(errno)) if errno as i32 == libc::EEXIST => Step::Here,
                // How far it came is not told: a page at a time from here on.
                Err(Error::ZeropageFailed(errno)) if errno as i32 == libc::EAGAIN && !by_page => {
                    by_page = true;
                    Step::Done(0)
                }
                Err(Error::ZeropageFailed(errno)) if errno as i32 == libc::EAGAIN => Step::Again,
                Err(e) => return Err(io_error(e)),
            })
        })
    }

    /// Wakes who waits for the page at frame `gfn`, which is there.
    ///
    /// # Errors
    /// It is not watched guest memory.
    pub fn wake(&self, gfn: u64) -> Result<(), MemoryError> {
        self.view.each(gfn, PAGE_BYTES, |part| {
            let woken = self.uffd.wake(part.host.cast(), PAGE_BYTES);
            woken.map_err(|e| refused("wake who waits for", &part, io_error(e)))
        })
    }

    /// Calls `step` with address and length of what is left of each part of `run`, until all is done.
    fn each_step(
        &self,
        what: &'static str,
        run: Run,
        mut step: impl FnMut(*mut c_void, usize) -> io::Result<Step>,
    ) -> Result<Placed, MemoryError> {
        let mut placed = Placed { pages: 0, again: false };
        let bytes = usize::try_from(run.pages).unwrap_or(usize::MAX).saturating_mul(PAGE_BYTES);
        self.view.each(run.start, bytes, |part| {
            let mut at = 0;
            while at < part.bytes && !placed.again {
                let next = step(part.host.wrapping_add(at).cast(), part.bytes - at);
                match next.map_err(|e| refused(what, &part, e))? {
                    Step::Done(bytes) => at += bytes,
                    Step::Here => {
                        // Somebody may have begun to wait just as it came.
                        let page = part.host.wrapping_add(at).cast();
                        let woken = self.uffd.wake(page, PAGE_BYTES);
                        woken.map_err(|e| refused("wake who waits for", &part, io_error(e)))?;
                        at += PAGE_BYTES;
                    }
                    Step::Again => placed.again = true,
                }
            }
            placed.pages += (at / PAGE_BYTES) as u64;
            Ok(())
        })?;
        Ok(placed)
    }
}

fn descriptor(waiters: Waiters) -> Result<Uffd, MemoryError> {
    let features = match waiters {
        Waiters::User => FeatureFlags::empty(),
        Waiters::All => {
            FeatureFlags::EVENT_REMOVE | FeatureFlags::THREAD_ID | FeatureFlags::MISSING_SHMEM
        }
    };
    UffdBuilder::new()
        .close_on_exec(true)
        .non_blocking(true)
        .user_mode_only(waiters == Waiters::User)
        .require_features(features)
        .create()
        .map_err(|e| MemoryError::Userfault { source: io_error(e) })
}

#[derive(Clone, Copy)]
enum Step {
    /// So many bytes are there.
    Done(usize),
    /// There is a page.
    Here,
    /// Leave it at that.
    Again,
}

impl Drop for MissingPages {
    fn drop(&mut self) {
        for region in &self.registered {
            let (start, bytes) = region.host_span();
            // Closing the descriptor would do as well, but later if it was inherited.
            let _ = self.uffd.unregister(start, bytes);
        }
    }
}

fn refused(what: &'static str, part: &Part, source: io::Error) -> MemoryError {
    MemoryError::Refused { what, run: part.run, source }
}

fn io_error(e: Error) -> io::Error {
    match e {
        Error::SystemError(errno) | Error::CopyFailed(errno) | Error::ZeropageFailed(errno) => {
            io::Error::from_raw_os_error(errno as i32)
        }
        Error::OpenDevUserfaultfd(e) => e,
        other => io::Error::other(other),
    }
}
