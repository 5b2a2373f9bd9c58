//! Which pages of shared memory are touched, read or written, in a stretch of time.
//!
//! Shared memory is in a file; what a process maps of it are entries of a page table, which can be dropped at
//! any time (`MADV_DONTNEED`) and come back, each by a fault, when its page is touched. KVM's own entries go
//! with them. So what is mapped some time after all was dropped was touched meanwhile. Trackers of writes
//! lose nothing by it: KVM's logs are not in those entries, and write-protection leaves a marker.
//!
//! Private memory is *in* those entries: to drop them is to lose it. Whether memory is shared is therefore
//! never taken from a [`Region`], but asked of the kernel.

#![expect(unsafe_code, reason = "madvise on guest memory")]

use std::io;

use ferry_dirtylog::Region;
use ferry_dirtylog::pagemap::{Categories, Pagemap, Scan};
use ferry_pages::{PageSet, Run};

use crate::{GuestView, MemoryError};

/// A look at shared memory that has begun.
#[derive(Debug)]
pub struct Touched {
    view: GuestView,
}

impl Touched {
    /// Begins to look at the shared memory of `view`; `None` if none of it is. Each page that is touched from
    /// now on costs who touches it a fault, once.
    ///
    /// # Errors
    /// The kernel does not tell what is shared, or refused.
    pub fn begin(view: &GuestView) -> Result<Option<Self>, MemoryError> {
        let mut any = false;
        for region in shared(view)? {
            let (at, bytes) = region.host_span();
            // SAFETY: the view keeps the mapping. The kernel says that all of it is shared, so its content
            // is the file's, which this does not touch: whoever comes next finds what was there.
            if unsafe { libc::madvise(at, bytes, libc::MADV_DONTNEED) } < 0 {
                return Err(refused("watch", region.run, io::Error::last_os_error()));
            }
            any = true;
        }
        Ok(any.then(|| Self { view: view.clone() }))
    }

    /// The pages that were touched since, by whatever thread of this process: also by one that copies pages.
    ///
    /// # Errors
    /// The kernel cannot tell (`PAGEMAP_SCAN` needs Linux 6.7).
    pub fn pages(&self) -> Result<PageSet, MemoryError> {
        let mut pages = PageSet::new();
        let scan = Scan { all: Categories::PRESENT, ..Scan::default() };
        for Region { run, host, .. } in shared(&self.view)? {
            let found = |first, count| {
                pages.insert_run(Run::new(run.start + first, count));
            };
            Pagemap::open()
                .and_then(|mut pagemap| pagemap.scan(host, run.pages, scan, found))
                .map_err(|source| refused("find the touched pages of", run, source))?;
        }
        Ok(pages)
    }
}

fn refused(what: &'static str, run: Run, source: io::Error) -> MemoryError {
    MemoryError::Refused { what, run, source }
}

/// The regions of `view` that are shared mappings from end to end. None in huge pages: which of those hold
/// data is seen by these entries only.
fn shared(view: &GuestView) -> Result<Vec<Region>, MemoryError> {
    let maps = std::fs::read_to_string("/proc/self/maps");
    let whole = Run::new(view.regions().first().map_or(0, |region| region.run.start), 0);
    let maps =
        maps.map_err(|e| refused("learn from /proc/self/maps what is shared of", whole, e))?;
    let all = view.regions().iter().copied();
    let by_page = |region: &Region| region.backing.is_some() && region.unit == 1;
    Ok(all.filter(|region| by_page(region) && is_shared(region, &maps)).collect())
}

/// Whether shared mappings cover all of `region`, in the words of `/proc/self/maps`: a line for each
/// mapping, ascending, `begin-end rwxs …` in hexadecimal.
fn is_shared(region: &Region, maps: &str) -> bool {
    let (_, bytes) = region.host_span();
    let Some(end) = region.host.checked_add(bytes) else { return false };
    let mut covered = region.host;
    for line in maps.lines() {
        let mut words = line.split(' ');
        let Some((from, to)) = words.next().and_then(|span| span.split_once('-')) else { continue };
        let parsed = (usize::from_str_radix(from, 16), usize::from_str_radix(to, 16));
        let (Ok(from), Ok(to)) = parsed else { continue };
        if from <= covered && covered < to {
            if !words.next().is_some_and(|flags| flags.ends_with('s')) {
                return false;
            }
            covered = to;
        }
        if covered >= end {
            return true;
        }
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_shared_only_where_the_kernel_says_so_of_all_of_it() {
        let maps = "\
            1000-3000 rw-s 00000000 00:01 5 /memfd:a (deleted)\n\
            3000-4000 r--s 00002000 00:01 5 /memfd:a (deleted)\n\
            4000-5000 rw-p 00003000 00:01 5 /memfd:a (deleted)\n\
            7000-8000 rw-s 00000000 00:01 6 /memfd:s\n";
        let cases = [
            (0x1000, 2, true),
            (0x2000, 1, true),
            (0x1000, 3, true),
            (0x1000, 4, false),
            (0x4000, 1, false),
            (0x5000, 1, false),
            (0x7000, 1, true),
            (0x7000, 2, false),
            (0x0, 2, false),
        ];
        for (host, pages, expected) in cases {
            let region =
                Region { run: Run::new(0, pages), host, slot: 0, backing: Some((3, 0)), unit: 1 };
            assert_eq!(is_shared(&region, maps), expected, "{host:#x}, {pages}");
        }
    }
}
