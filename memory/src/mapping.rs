//! Memory for a guest, owned.

#![expect(unsafe_code, reason = "mmap and munmap")]

use std::ffi::CString;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::ptr::NonNull;

use ferry_dirtylog::Region;
use ferry_pages::{PAGE_BYTES, Run};

use crate::MemoryError;

/// Untouched memory of this process for a guest, unmapped when dropped.
///
/// Nothing is reserved or populated: a page comes into being when it is first written (shared memory:
/// also when first read). No advice about huge pages is given.
#[derive(Debug)]
pub struct Mapping {
    host: NonNull<u8>,
    bytes: usize,
    memfd: Option<OwnedFd>,
}

// SAFETY: the value is an address and a length; it gives out neither references nor unguarded access.
unsafe impl Send for Mapping {}
// SAFETY: as above; all methods take `&self` and read plain fields.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps `pages` pages of private memory.
    ///
    /// # Errors
    /// The host has no room (in address space, or under a limit).
    pub fn anonymous(pages: u64) -> Result<Self, MemoryError> {
        Self::map(pages, None).map_err(|source| MemoryError::Map { pages, how: "private", source })
    }

    /// Maps `pages` pages of shared memory behind a descriptor, which can be handed to other processes.
    ///
    /// # Errors
    /// The host has no room, or no descriptors are left.
    pub fn memfd(name: &str, pages: u64) -> Result<Self, MemoryError> {
        let make = || {
            let fd = memfd(name)?;
            let bytes = pages.checked_mul(PAGE_BYTES as u64).ok_or(io::ErrorKind::OutOfMemory)?;
            let file = File::from(fd);
            file.set_len(bytes)?;
            Self::map(pages, Some(file.into()))
        };
        make().map_err(|source| MemoryError::Map { pages, how: "memfd", source })
    }

    fn map(pages: u64, memfd: Option<OwnedFd>) -> io::Result<Self> {
        let bytes = usize::try_from(pages)
            .ok()
            .and_then(|pages| pages.checked_mul(PAGE_BYTES))
            .ok_or(io::ErrorKind::OutOfMemory)?;
        let kind = if memfd.is_some() {
            libc::MAP_SHARED
        } else {
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS
        };
        // SAFETY: a new mapping where the kernel likes; nothing that exists is replaced.
        let host = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                bytes,
                libc::PROT_READ | libc::PROT_WRITE,
                kind | libc::MAP_NORESERVE,
                memfd.as_ref().map_or(-1, AsRawFd::as_raw_fd),
                0,
            )
        };
        if host == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        // The address goes to the kernel and to others as a number (`Region::host`).
        let _ = host.expose_provenance();
        let host = NonNull::new(host.cast()).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(Self { host, bytes, memfd })
    }

    /// Address of the first page in this process.
    pub fn host(&self) -> usize {
        self.host.as_ptr() as usize
    }

    /// How many pages.
    pub fn pages(&self) -> u64 {
        (self.bytes / PAGE_BYTES) as u64
    }

    /// The descriptor, of shared memory.
    pub fn fd(&self) -> Option<BorrowedFd<'_>> {
        self.memfd.as_ref().map(AsFd::as_fd)
    }

    /// All of it as guest memory from frame `gfn` on, in memory slot `slot`.
    pub fn region(&self, gfn: u64, slot: u32) -> Region {
        Region {
            run: Run::new(gfn, self.pages()),
            host: self.host(),
            slot,
            backing: self.memfd.as_ref().map(|fd| (fd.as_raw_fd(), 0)),
        }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: this is the mapping that `map` made, whole. Who uses its address after this broke the
        // contract of `GuestView::new`, or KVM's slot lost its memory (which a guest sees as a fault).
        unsafe { libc::munmap(self.host.as_ptr().cast(), self.bytes) };
    }
}

fn memfd(name: &str) -> io::Result<OwnedFd> {
    let name = CString::new(name)?;
    // SAFETY: `name` is a C string that outlives the call.
    let fd = unsafe { libc::memfd_create(name.as_ptr(), libc::MFD_CLOEXEC) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor is new and nobody else's.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}
