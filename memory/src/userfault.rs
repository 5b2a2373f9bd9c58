//! What userfaultfd does with memory, by address: tells of touches, places pages, shows pages of a file.
//!
//! `UFFDIO_COPY` makes a page with its content in one step, and `UFFDIO_CONTINUE` shows a page that its file
//! has; neither touches a page that is there, so nothing that the guest wrote can be overwritten
//! (Documentation/admin-guide/mm/userfaultfd.rst). Addresses are of the process that registered the memory.

#![expect(unsafe_code, reason = "the kernel copies to memory that is given by address")]

use std::ffi::c_void;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, IntoRawFd, OwnedFd};

use ferry_dirtylog::{Region, userfault_error};
use ferry_pages::PAGE_BYTES;
use userfaultfd::{
    Error, Event, EventBuffer, FeatureFlags, ReadWrite, RegisterMode, Uffd, UffdBuilder,
};

use crate::Waiters;

/// Events taken at a time: a guest that gives memory back without end must not keep faults waiting.
const EVENTS: usize = 64;
/// An address that may be named in a question.
const SOMEWHERE: u64 = 1 << 30;
/// `UFFD_FEATURE_MINOR_HUGETLBFS` and `UFFD_FEATURE_MINOR_SHMEM` of `linux/userfaultfd.h`.
const MINOR: u64 = 1 << 9 | MINOR_SHMEM;
const MINOR_SHMEM: u64 = 1 << 10;
/// `UFFD_FEATURE_MOVE`.
const MOVE: u64 = 1 << 16;
/// `UFFD_FEATURE_WP_UNPOPULATED` and `UFFD_FEATURE_WP_ASYNC`.
const WP_ASYNC: u64 = 1 << 13 | 1 << 15;

/// A userfaultfd, of this process or of another.
#[derive(Debug)]
pub struct Userfault(Uffd);

/// Something happened to watched memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Happened {
    /// A thread waits for the page at this address.
    Fault {
        /// Where.
        address: u64,
        /// The thread's number in the system; 0 where it is not told.
        thread: u32,
        /// It wants to write.
        write: bool,
    },
    /// Memory from the first address up to the second is being given back.
    Removed(u64, u64),
}

/// What became of a request.
#[derive(Clone, Copy)]
pub(crate) enum Step {
    /// So many bytes, from the first on, are there now.
    Done(usize),
    /// The first page is there already.
    Here,
    /// The file has no such page.
    Absent,
    /// Memory is being given back: read what happened, then try again.
    Again,
}

impl Userfault {
    pub(crate) fn open(waiters: Waiters) -> io::Result<Self> {
        let features = match waiters {
            Waiters::User => FeatureFlags::empty(),
            Waiters::All => {
                FeatureFlags::EVENT_REMOVE
                    | FeatureFlags::THREAD_ID
                    | FeatureFlags::MISSING_SHMEM
                    | FeatureFlags::MISSING_HUGETLBFS
                    | FeatureFlags::from_bits_retain(MINOR)
            }
        };
        Self::with(features, waiters == Waiters::User)
    }

    /// For memory whose pages come and go: what is given back is not told, and writes can be tracked.
    pub(crate) fn open_for_swap() -> io::Result<Self> {
        let features = FeatureFlags::THREAD_ID
            | FeatureFlags::MISSING_SHMEM
            | FeatureFlags::from_bits_retain(MINOR_SHMEM | WP_ASYNC);
        Self::with(features, false)
    }

    /// For memory to which pages are moved, by this process alone.
    pub(crate) fn open_for_moves() -> io::Result<Self> {
        Self::with(FeatureFlags::from_bits_retain(MOVE), true)
    }

    fn with(features: FeatureFlags, user_mode_only: bool) -> io::Result<Self> {
        let made = UffdBuilder::new()
            .close_on_exec(true)
            .non_blocking(true)
            .user_mode_only(user_mode_only)
            .require_features(features)
            .create();
        made.map(Self).map_err(userfault_error)
    }

    /// Takes a descriptor that came from another process, whose memory it watches.
    ///
    /// # Errors
    /// It is not a userfaultfd.
    pub fn adopt(fd: OwnedFd) -> io::Result<Self> {
        // SAFETY: the descriptor is ours, and open. Of another kind of file the ioctls below are errors.
        let uffd = Self(unsafe { Uffd::from_raw_fd(fd.into_raw_fd()) });
        // Its mode is shared with who made it, who does not read it.
        // SAFETY: the call takes the descriptor and flags.
        if unsafe { libc::fcntl(uffd.0.as_raw_fd(), libc::F_SETFL, libc::O_NONBLOCK) } < 0 {
            return Err(io::Error::last_os_error());
        }
        // Nobody waits there; only a userfaultfd knows the question.
        uffd.wake(SOMEWHERE, PAGE_BYTES)?;
        Ok(uffd)
    }

    /// The descriptor: readable when something happened.
    pub fn fd(&self) -> BorrowedFd<'_> {
        // SAFETY: it is open as long as `self` is borrowed.
        unsafe { BorrowedFd::borrow_raw(self.0.as_raw_fd()) }
    }

    /// Watches missing pages of `region`, and where it is shared, pages that only its file has.
    /// If `writes`, somebody may track those as well.
    pub(crate) fn watch(&self, region: &Region, writes: bool) -> io::Result<()> {
        let (start, bytes) = region.host_span();
        let mut mode = match region.backing {
            None => RegisterMode::MISSING,
            Some(_) => RegisterMode::MISSING | RegisterMode::MINOR,
        };
        mode.set(RegisterMode::WRITE_PROTECT, writes);
        self.0.register_with_mode(start, bytes, mode).map(drop).map_err(userfault_error)
    }

    /// What happened, as far as it is taken at a time; does not wait.
    ///
    /// # Errors
    /// The kernel's word was not understood.
    pub fn read(&self) -> io::Result<Vec<Happened>> {
        let mut buffer = EventBuffer::new(EVENTS);
        let events = match self.0.read_events(&mut buffer).map_err(userfault_error) {
            Ok(events) => events,
            Err(e)
                if matches!(e.kind(), io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock) =>
            {
                return Ok(Vec::new());
            }
            Err(e) => return Err(e),
        };
        let mut happened = Vec::new();
        for event in events {
            match event.map_err(userfault_error)? {
                Event::Pagefault { addr, thread_id, rw, .. } => {
                    let thread = u32::try_from(thread_id.as_raw()).unwrap_or(0);
                    let write = rw == ReadWrite::Write;
                    happened.push(Happened::Fault { address: addr as u64, thread, write });
                }
                Event::Remove { start, end } => {
                    happened.push(Happened::Removed(start as u64, end as u64));
                }
                // Nobody asked for others.
                _ => {}
            }
        }
        Ok(happened)
    }

    pub(crate) fn copy(&self, address: u64, bytes: &[u8]) -> io::Result<Step> {
        // SAFETY: `bytes` is ours to read. The kernel writes to memory that was registered with this
        // descriptor, by whoever vouches for it (contract of `GuestView::new`, or another process), and
        // only where no page is.
        let copied =
            unsafe { self.0.copy(bytes.as_ptr().cast(), pointer(address), bytes.len(), true) };
        match copied {
            Ok(bytes) => Ok(Step::Done(bytes)),
            // Up to a page that is there; a negative number says that nothing was copied.
            Err(Error::PartiallyCopied(done)) if done > 0 && done <= bytes.len() => {
                Ok(Step::Done(done))
            }
            Err(Error::PartiallyCopied(_)) => Ok(Step::Again),
            Err(e) => step_of(userfault_error(e)),
        }
    }

    /// How far it came is not told where memory is being given back ([`Step::Again`]).
    pub(crate) fn zeros(&self, address: u64, bytes: usize) -> io::Result<Step> {
        // SAFETY: as in `copy`.
        let placed = unsafe { self.0.zeropage(pointer(address), bytes, true) };
        placed.map(Step::Done).or_else(|e| step_of(userfault_error(e)))
    }

    /// Shows pages that the file has.
    pub(crate) fn show(&self, address: u64, bytes: usize) -> io::Result<Step> {
        let shown = self.0.r#continue(pointer(address), bytes, true);
        match shown.map_err(userfault_error) {
            Ok(shown) => Ok(Step::Done(usize::try_from(shown).unwrap_or(0))),
            Err(e) if e.raw_os_error() == Some(libc::EFAULT) => Ok(Step::Absent),
            Err(e) => step_of(e),
        }
    }

    /// Places `bytes`, whole pages of `page_bytes`, at `address`, and wakes who waits for them. Pages that
    /// are there stay as they are. Returns how many bytes from the first on are there now: fewer than all
    /// where memory is being given back; then read what happened, and try again.
    ///
    /// # Errors
    /// The memory is not watched, or the host has no more.
    pub fn place(&self, address: u64, bytes: &[u8], page_bytes: usize) -> io::Result<usize> {
        self.each(address, bytes.len(), page_bytes, |to, at| self.copy(to, &bytes[at..]))
    }

    /// Places pages of zeros, as [`place`](Self::place) does.
    ///
    /// # Errors
    /// As [`place`](Self::place).
    pub fn place_zeros(&self, address: u64, bytes: usize, page_bytes: usize) -> io::Result<usize> {
        if page_bytes > PAGE_BYTES {
            // There is no zero page of this size to map.
            return self.place(address, &vec![0; bytes], page_bytes);
        }
        let mut by_page = false;
        self.each(address, bytes, page_bytes, |to, at| {
            match self.zeros(to, if by_page { page_bytes } else { bytes - at })? {
                // How far it came is not told: a page at a time from here on.
                Step::Again if !by_page => {
                    by_page = true;
                    Ok(Step::Done(0))
                }
                step => Ok(step),
            }
        })
    }

    /// Calls `step` with address and offset of what is left of `bytes` at `address`, until all is done or
    /// nothing can be done now; how much was.
    fn each(
        &self,
        address: u64,
        bytes: usize,
        page_bytes: usize,
        mut step: impl FnMut(u64, usize) -> io::Result<Step>,
    ) -> io::Result<usize> {
        let mut at = 0;
        while at < bytes {
            let to = address + at as u64;
            at += match step(to, at)? {
                Step::Done(bytes) => bytes,
                Step::Here | Step::Absent => {
                    // Somebody may have begun to wait just as it came; or only the file has it.
                    if !matches!(self.show(to, page_bytes), Ok(Step::Done(_))) {
                        self.wake(to, page_bytes)?;
                    }
                    page_bytes
                }
                Step::Again => break,
            };
        }
        Ok(at)
    }

    /// Wakes who waits at `address`: it looks again.
    ///
    /// # Errors
    /// It is no address of a page.
    pub fn wake(&self, address: u64, bytes: usize) -> io::Result<()> {
        self.0.wake(pointer(address), bytes).map_err(userfault_error)
    }

    /// Ends watching `bytes` at `address`: missing pages there read as zeros from now on.
    ///
    /// # Errors
    /// The memory is gone.
    pub fn let_go(&self, address: u64, bytes: usize) -> io::Result<()> {
        self.0.unregister(pointer(address), bytes).map_err(userfault_error)
    }

    /// Whether a thread that gives memory back still waits until that is read: the kernel then refuses all
    /// requests with this word, before it looks at what they are about.
    pub fn is_removing(&self) -> bool {
        // A page of zeros where nothing is watched is an error, and changes nothing.
        matches!(self.zeros(SOMEWHERE, PAGE_BYTES), Ok(Step::Again))
    }
}

fn step_of(e: io::Error) -> io::Result<Step> {
    match e.raw_os_error() {
        Some(libc::EEXIST) => Ok(Step::Here),
        Some(libc::EAGAIN) => Ok(Step::Again),
        _ => Err(e),
    }
}

fn pointer(address: u64) -> *mut c_void {
    std::ptr::without_provenance_mut(usize::try_from(address).unwrap_or(0))
}
