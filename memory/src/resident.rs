//! Which pages hold data, found without bringing any into being.

#![expect(unsafe_code, reason = "lseek on a descriptor that is somebody else's")]

use std::io;
use std::os::fd::RawFd;

use ferry_dirtylog::{Region, pagemap};
use ferry_pages::{PAGE_BYTES, PageSet, Run};

use crate::MemoryError;

/// The pages of `regions` that hold data: all others read as zeros.
///
/// Private memory: pages in memory or swapped out, but for the shared page of zeros. Shared memory: pages
/// that the file has, whoever made them; of huge pages, those that were touched by this mapping.
///
/// # Errors
/// The kernel cannot tell (`PAGEMAP_SCAN` needs Linux 6.7).
pub fn resident(regions: &[Region]) -> Result<PageSet, MemoryError> {
    let mut pages = PageSet::new();
    for region in regions {
        let run = region.run;
        let mut found = |first: u64, count: u64| {
            pages.insert_run(Run::new(run.start + first, count));
        };
        match region.backing {
            None => pagemap::populated(region.host, run.pages, found),
            // Of huge pages the kernel does not say what the file has; but it never drops one that is mapped.
            Some(_) if region.unit > 1 => pagemap::populated(region.host, run.pages, found),
            Some((fd, offset)) => file_data(fd, offset, run.pages, &mut found),
        }
        .map_err(|source| MemoryError::Refused {
            what: "find the resident pages of",
            run,
            source,
        })?;
    }
    Ok(pages)
}

/// Finds data in `pages` pages of a file from byte `offset` on.
fn file_data(
    fd: RawFd,
    offset: u64,
    pages: u64,
    found: &mut impl FnMut(u64, u64),
) -> io::Result<()> {
    const PAGE: u64 = PAGE_BYTES as u64;
    let end = offset + pages * PAGE;
    let mut at = offset;
    while at < end {
        let Some(data) = seek(fd, at, libc::SEEK_DATA)? else { return Ok(()) };
        // There is a hole at the end of every file.
        let hole = seek(fd, data, libc::SEEK_HOLE)?.unwrap_or(end).min(end);
        if data < hole {
            let (first, last) = ((data - offset) / PAGE, (hole - 1 - offset) / PAGE);
            found(first, last - first + 1);
        }
        at = hole.max(data);
        if data >= end {
            return Ok(());
        }
    }
    Ok(())
}

/// Where data or a hole begins, from `at` on; `None` if there is none.
fn seek(fd: RawFd, at: u64, whence: i32) -> io::Result<Option<u64>> {
    let at = i64::try_from(at).map_err(|_| io::ErrorKind::InvalidInput)?;
    // SAFETY: the call takes no pointer. The file's position, which it moves, is used by nobody: guest
    // memory is mapped, never read through the descriptor.
    let found = unsafe { libc::lseek(fd, at, whence) };
    if let Ok(found) = u64::try_from(found) {
        return Ok(Some(found));
    }
    let error = io::Error::last_os_error();
    if error.raw_os_error() == Some(libc::ENXIO) { Ok(None) } else { Err(error) }
}
