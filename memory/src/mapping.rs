//! Memory for a guest, owned.

#![expect(unsafe_code, reason = "mmap and munmap")]

use std::ffi::CString;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::ptr::NonNull;

use ferry_dirtylog::Region;
use ferry_pages::{PAGE_BYTES, Run};

use crate::{GuestView, MemoryError};

/// Pages of 4 KiB in a huge page. The only size that is used: others are not found on every CPU.
pub const HUGE_PAGES: u64 = 512;
/// What the kernel tells of huge pages of this size.
const HUGE_FIGURES: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB";

/// Untouched memory of this process for a guest, unmapped when dropped.
///
/// Nothing is populated: a page comes into being when it is first written (shared memory: also when first
/// read). Huge pages are reserved, all others are not.
#[derive(Debug)]
pub struct Mapping {
    host: NonNull<u8>,
    bytes: usize,
    memfd: Option<OwnedFd>,
    unit: u64,
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
        let kind = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        let mapped = Self::map(pages, kind, None);
        mapped.map_err(|source| MemoryError::Map { pages, how: "private", source })
    }

    /// Maps `pages` pages of memory for a machine: huge ones if `huge_pages`, else private memory.
    ///
    /// # Errors
    /// As [`huge`](Self::huge) and [`anonymous`](Self::anonymous).
    pub fn for_machine(pages: u64, huge_pages: bool) -> Result<Self, MemoryError> {
        if huge_pages { Self::huge(pages) } else { Self::anonymous(pages) }
    }

    /// Maps `pages` pages of shared memory in huge pages of 2 MiB (hugetlb), and reserves these.
    ///
    /// # Errors
    /// It is not in whole huge pages, or the host has not so many free.
    pub fn huge(pages: u64) -> Result<Self, MemoryError> {
        if !pages.is_multiple_of(HUGE_PAGES) {
            return Err(MemoryError::NotHuge { pages });
        }
        let make = || {
            let file = memfd("ferry-huge", pages, libc::MFD_HUGETLB | libc::MFD_HUGE_2MB)?;
            let mut mapped = Self::map(pages, libc::MAP_SHARED, Some((file.as_raw_fd(), 0)))?;
            (mapped.memfd, mapped.unit) = (Some(file), HUGE_PAGES);
            Ok(mapped)
        };
        make().map_err(|source| few_huge_pages(pages, source))
    }

    /// A view of `regions`, which are of huge pages, by mappings of their own. What of it was given back is
    /// reserved again.
    pub(crate) fn behind<'a>(
        regions: impl IntoIterator<Item = &'a Region>,
    ) -> Result<GuestView, MemoryError> {
        let (mut second, mut mappings) = (Vec::new(), Vec::new());
        for region in regions {
            let pages = region.run.pages;
            let mapped = Self::map(pages, libc::MAP_SHARED, region.backing);
            let mapped = mapped.map_err(|source| few_huge_pages(pages, source))?;
            second.push(Region { host: mapped.host(), ..*region });
            mappings.push(mapped);
        }
        // SAFETY: the view keeps the mappings, whole and as the regions say, which are used by it only.
        Ok(unsafe { GuestView::new(second) }?.keeping(mappings))
    }

    /// Maps `pages` pages of shared memory behind a descriptor, which can be handed to other processes.
    ///
    /// # Errors
    /// The host has no room, or no descriptors are left.
    pub fn memfd(name: &str, pages: u64) -> Result<Self, MemoryError> {
        let make = || {
            let file = memfd(name, pages, 0)?;
            let kind = libc::MAP_SHARED | libc::MAP_NORESERVE;
            let mut mapped = Self::map(pages, kind, Some((file.as_raw_fd(), 0)))?;
            mapped.memfd = Some(file);
            Ok(mapped)
        };
        make().map_err(|source| MemoryError::Map { pages, how: "memfd", source })
    }

    /// `file`: descriptor and offset.
    fn map(pages: u64, kind: i32, file: Option<(RawFd, u64)>) -> io::Result<Self> {
        let bytes = usize::try_from(pages)
            .ok()
            .and_then(|pages| pages.checked_mul(PAGE_BYTES))
            .ok_or(io::ErrorKind::OutOfMemory)?;
        let (fd, offset) = file.unwrap_or((-1, 0));
        let offset = i64::try_from(offset).map_err(io::Error::other)?;
        // SAFETY: a new mapping where the kernel likes; nothing that exists is replaced.
        let host = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                bytes,
                libc::PROT_READ | libc::PROT_WRITE,
                kind,
                fd,
                offset,
            )
        };
        if host == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        // The address goes to the kernel and to others as a number (`Region::host`).
        let _ = host.expose_provenance();
        let host = NonNull::new(host.cast()).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(Self { host, bytes, memfd: None, unit: 1 })
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
            unit: self.unit,
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

fn memfd(name: &str, pages: u64, flags: u32) -> io::Result<OwnedFd> {
    let name = CString::new(name)?;
    let bytes = pages.checked_mul(PAGE_BYTES as u64).ok_or(io::ErrorKind::OutOfMemory)?;
    // SAFETY: `name` is a C string that outlives the call.
    let fd = unsafe { libc::memfd_create(name.as_ptr(), libc::MFD_CLOEXEC | flags) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor is new and nobody else's.
    let file = File::from(unsafe { OwnedFd::from_raw_fd(fd) });
    file.set_len(bytes)?;
    Ok(file.into())
}

fn few_huge_pages(pages: u64, source: io::Error) -> MemoryError {
    let all = figure("nr_hugepages").unwrap_or(0);
    let (free, needed) = (free_huge_pages(), pages / HUGE_PAGES);
    MemoryError::HugePages { needed, free, enough: (all + needed).saturating_sub(free), source }
}

/// Huge pages that nobody uses or has reserved; none where the kernel has no such pages.
fn free_huge_pages() -> u64 {
    figure("free_hugepages")
        .zip(figure("resv_hugepages"))
        .map_or(0, |(free, reserved)| free - reserved.min(free))
}

fn figure(name: &str) -> Option<u64> {
    std::fs::read_to_string(format!("{HUGE_FIGURES}/{name}")).ok()?.trim().parse().ok()
}
