//! What the kernel does for us with another process: its missing pages, and its number.
//!
//! `UFFDIO_COPY` makes a page with its content in one step and never touches one that exists
//! (Documentation/admin-guide/mm/userfaultfd.rst). All addresses are Firecracker's; nothing in this
//! process lies there.

#![expect(unsafe_code, reason = "the kernel copies to another process's memory; SO_PEERCRED")]

use std::ffi::c_void;
use std::io;
use std::mem::size_of;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, IntoRawFd, OwnedFd};

use ferry_pages::PAGE_BYTES;
use userfaultfd::{Error, Event, EventBuffer, Uffd};

/// Events taken at a time: a guest that gives memory back without end must not keep faults waiting.
const EVENTS: usize = 64;
/// An address that may be named in a question.
const SOMEWHERE: u64 = 1 << 30;

/// Something happened to watched memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Touch {
    /// A thread waits for the page at this address.
    Fault(u64),
    /// Memory between these addresses is being given back.
    Removed(u64, u64),
}

/// A userfaultfd that another process made for its own memory.
#[derive(Debug)]
pub(crate) struct Userfault(Uffd);

impl Userfault {
    /// Takes a descriptor that came from elsewhere.
    ///
    /// # Errors
    /// It is not a userfaultfd.
    pub(crate) fn adopt(fd: OwnedFd) -> io::Result<Self> {
        // Its mode is shared with Firecracker, which does not read it.
        rustix::io::ioctl_fionbio(&fd, true)?;
        // SAFETY: the descriptor is ours, and open. Of another kind of file the ioctls below are errors.
        let uffd = Self(unsafe { Uffd::from_raw_fd(fd.into_raw_fd()) });
        // Nobody waits there; only a userfaultfd knows the question.
        uffd.wake(SOMEWHERE, PAGE_BYTES as u64)?;
        Ok(uffd)
    }

    /// Readable when something happened.
    pub(crate) fn fd(&self) -> BorrowedFd<'_> {
        // SAFETY: it is open as long as `self` is borrowed.
        unsafe { BorrowedFd::borrow_raw(self.0.as_raw_fd()) }
    }

    /// What happened, as far as it fits; does not wait.
    pub(crate) fn read(&self) -> io::Result<Vec<Touch>> {
        let mut buffer = EventBuffer::new(EVENTS);
        let events = match self.0.read_events(&mut buffer).map_err(io_error) {
            Ok(events) => events,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => return Ok(Vec::new()),
            Err(e) => return Err(e),
        };
        let mut touches = Vec::new();
        for event in events {
            match event.map_err(io_error)? {
                Event::Pagefault { addr, .. } => touches.push(Touch::Fault(addr as u64)),
                Event::Remove { start, end } => {
                    touches.push(Touch::Removed(start as u64, end as u64));
                }
                // Firecracker does not ask for others.
                _ => {}
            }
        }
        Ok(touches)
    }

    /// Places `bytes`, whole pages of `page_bytes`, at `address`, and wakes who waits for them. Pages that
    /// are there stay as they are. Returns how many bytes from the first on are there now: fewer than all
    /// where memory is being given back; then read what happened, and try again.
    pub(crate) fn place(&self, address: u64, bytes: &[u8], page_bytes: usize) -> io::Result<usize> {
        let mut at = 0;
        while at < bytes.len() {
            let (to, rest) = (address + at as u64, &bytes[at..]);
            // SAFETY: `rest` is ours to read. The kernel writes to memory of the process that registered
            // it with this descriptor, and only where no page is: nothing of this process is changed.
            match unsafe { self.0.copy(rest.as_ptr().cast(), pointer(to), rest.len(), true) } {
                Ok(placed) => at += placed,
                // Up to a page that is there; a negative number says that nothing was copied.
                Err(Error::PartiallyCopied(placed)) if placed > 0 && placed <= rest.len() => {
                    at += placed;
                }
                Err(Error::PartiallyCopied(_)) => break,
                Err(Error::CopyFailed(errno)) if errno as i32 == libc::EEXIST => {
                    // Somebody may have begun to wait just as it came.
                    self.wake(to, page_bytes as u64)?;
                    at += page_bytes;
                }
                Err(e) => return Err(io_error(e)),
            }
        }
        Ok(at)
    }

    /// Places a page of zeros, as [`place`](Self::place) does; whether it is there now.
    pub(crate) fn place_zeros(&self, address: u64, page_bytes: usize) -> io::Result<bool> {
        if page_bytes > PAGE_BYTES {
            // There is no zero page of this size to map.
            let zeros = vec![0; page_bytes];
            return Ok(self.place(address, &zeros, page_bytes)? == page_bytes);
        }
        // SAFETY: as in `place`.
        match unsafe { self.0.zeropage(pointer(address), PAGE_BYTES, true) } {
            Ok(_) => Ok(true),
            Err(Error::ZeropageFailed(errno)) if errno as i32 == libc::EEXIST => {
                self.wake(address, PAGE_BYTES as u64)?;
                Ok(true)
            }
            Err(Error::ZeropageFailed(errno)) if errno as i32 == libc::EAGAIN => Ok(false),
            Err(e) => Err(io_error(e)),
        }
    }

    /// Wakes who waits at `address`: it looks again.
    pub(crate) fn wake(&self, address: u64, bytes: u64) -> io::Result<()> {
        self.0.wake(pointer(address), length(bytes)?).map_err(io_error)
    }

    /// Ends watching `bytes` at `address`: missing pages there read as zeros from now on.
    pub(crate) fn let_go(&self, address: u64, bytes: u64) -> io::Result<()> {
        self.0.unregister(pointer(address), length(bytes)?).map_err(io_error)
    }

    /// Whether a thread that gives memory back still waits until that is read: the kernel then refuses all
    /// requests with this word, before it looks at what they are about.
    pub(crate) fn is_removing(&self) -> bool {
        // SAFETY: as in `place`. A page of zeros where nothing is watched is an error, and changes nothing.
        let asked = unsafe { self.0.zeropage(pointer(SOMEWHERE), PAGE_BYTES, true) };
        matches!(asked, Err(Error::ZeropageFailed(errno)) if errno as i32 == libc::EAGAIN)
    }
}

/// The number of the process that connected; none if it cannot be seen from here (another PID namespace).
pub(crate) fn peer_of(socket: impl AsFd) -> io::Result<Option<rustix::process::Pid>> {
    let mut peer = libc::ucred { pid: 0, uid: 0, gid: 0 };
    let mut bytes = libc::socklen_t::try_from(size_of::<libc::ucred>()).unwrap_or(0);
    // SAFETY: both pointers are to locals, and `bytes` is the length of the first.
    let failed = unsafe {
        libc::getsockopt(
            socket.as_fd().as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_PEERCRED,
            (&raw mut peer).cast(),
            &raw mut bytes,
        )
    };
    if failed != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(rustix::process::Pid::from_raw(peer.pid))
}

fn pointer(address: u64) -> *mut c_void {
    std::ptr::without_provenance_mut(usize::try_from(address).unwrap_or(0))
}

fn length(bytes: u64) -> io::Result<usize> {
    usize::try_from(bytes).map_err(io::Error::other)
}

fn io_error(e: Error) -> io::Error {
    match e {
        Error::SystemError(errno) | Error::CopyFailed(errno) | Error::ZeropageFailed(errno) => {
            io::Error::from_raw_os_error(errno as i32)
        }
        other => io::Error::other(other),
    }
}
