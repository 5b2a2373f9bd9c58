//! What the kernel knows of a stretch of our own memory: `PAGEMAP_SCAN` on `/proc/self/pagemap`.
//!
//! From the kernel's Documentation/admin-guide/mm/pagemap.rst and `include/uapi/linux/fs.h` (Linux 6.7
//! and later). A scan never faults a page in.

#![expect(unsafe_code, reason = "an ioctl that takes addresses")]

use std::fs::File;
use std::io;

use ferry_pages::PAGE_BYTES;
use vmm_sys_util::ioctl::{_IOC_READ, _IOC_WRITE, ioctl_expr, ioctl_with_mut_ref};

/// What a page is, as `PAGEMAP_SCAN` tells it (`PAGE_IS_*`).
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Categories(u64);

impl Categories {
    /// No category.
    pub const NONE: Self = Self(0);
    /// Written since it was write-protected.
    pub const WRITTEN: Self = Self(1 << 1);
    /// Backed by a file (or shared memory).
    pub const FILE: Self = Self(1 << 2);
    /// In memory.
    pub const PRESENT: Self = Self(1 << 3);
    /// Swapped out.
    pub const SWAPPED: Self = Self(1 << 4);
    /// The shared page of zeros: read, never written.
    pub const ZERO_PAGE: Self = Self(1 << 5);

    /// Both.
    pub const fn or(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
}

/// Which pages a scan finds, and what it does to them.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Scan {
    /// Found pages are all of these …
    pub all: Categories,
    /// … none of these …
    pub none: Categories,
    /// … and at least one of these (if any is named).
    pub any: Categories,
    /// What to tell apart: runs of pages that differ in these are found separately.
    pub tell: Categories,
    /// Write-protect what is found, in the same step. The memory must be registered for asynchronous
    /// write-protection (userfaultfd); the scan fails (EPERM) if it is not.
    pub write_protect: bool,
}

/// `struct page_region`: a run of pages alike.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
struct PageRegion {
    start: u64,
    end: u64,
    categories: u64,
}

/// `struct pm_scan_arg`.
#[repr(C)]
struct ScanArg {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    vec: u64,
    vec_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}

/// `_IOWR('f', 16, struct pm_scan_arg)`.
fn pagemap_scan() -> libc::c_ulong {
    #[expect(clippy::cast_possible_truncation, reason = "96 bytes")]
    ioctl_expr(_IOC_READ | _IOC_WRITE, 'f' as u32, 16, size_of::<ScanArg>() as u32)
}

const WP_MATCHING: u64 = 1;
const CHECK_WPASYNC: u64 = 2;
/// Runs taken from the kernel at a time (48 KiB).
const BATCH: usize = 2048;

/// The page map of this process, open.
#[derive(Debug)]
pub struct Pagemap {
    file: File,
    batch: Vec<PageRegion>,
}

impl Pagemap {
    /// Opens the page map.
    ///
    /// # Errors
    /// `/proc` is not mounted or hidden.
    pub fn open() -> io::Result<Self> {
        Ok(Self {
            file: File::open("/proc/self/pagemap")?,
            batch: vec![PageRegion::default(); BATCH],
        })
    }

    /// Finds pages of the `pages` from host address `host`; calls `found` with the first page's number
    /// (counted from `host`) and how many, ascending.
    ///
    /// # Errors
    /// The kernel has no `PAGEMAP_SCAN` (ENOTTY), the memory is not registered as `write_protect` needs
    /// (EPERM), or `host` is not the address of a page.
    pub fn scan(
        &mut self,
        host: usize,
        pages: u64,
        scan: Scan,
        mut found: impl FnMut(u64, u64),
    ) -> io::Result<()> {
        const PAGE: u64 = PAGE_BYTES as u64;
        let start = host as u64;
        let end = pages
            .checked_mul(PAGE)
            .and_then(|bytes| start.checked_add(bytes))
            .ok_or_else(|| io::Error::from_raw_os_error(libc::EINVAL))?;
        let mut arg = ScanArg {
            size: size_of::<ScanArg>() as u64,
            flags: if scan.write_protect { WP_MATCHING | CHECK_WPASYNC } else { 0 },
            start,
            end,
            walk_end: 0,
            vec: self.batch.as_mut_ptr() as u64,
            vec_len: BATCH as u64,
            max_pages: 0,
            category_inverted: scan.none.0,
            category_mask: scan.all.0 | scan.none.0,
            category_anyof_mask: scan.any.0,
            return_mask: scan.tell.0,
        };
        while arg.start < end {
            // SAFETY: the argument and the batch that it points to are ours and as long as they say. The
            // kernel writes to these only; write-protection changes no byte of the memory scanned.
            let ret = unsafe { ioctl_with_mut_ref(&self.file, pagemap_scan(), &mut arg) };
            let count = usize::try_from(ret).map_err(|_| io::Error::last_os_error())?;
            for run in &self.batch[..count.min(BATCH)] {
                found((run.start - start) / PAGE, (run.end - run.start) / PAGE);
            }
            if arg.walk_end <= arg.start {
                return Err(io::Error::other("PAGEMAP_SCAN made no progress"));
            }
            arg.start = arg.walk_end;
        }
        Ok(())
    }
}

/// Finds the pages of memory at `host` that hold data of their own: in memory or swapped out, and not
/// the shared page of zeros. Right for private mappings; a page of shared memory may hold data without
/// being mapped.
///
/// # Errors
/// As [`Pagemap::scan`].
pub fn populated(host: usize, pages: u64, found: impl FnMut(u64, u64)) -> io::Result<()> {
    let scan = Scan {
        none: Categories::ZERO_PAGE,
        any: Categories::PRESENT.or(Categories::SWAPPED),
        ..Scan::default()
    };
    Pagemap::open()?.scan(host, pages, scan, found)
}
