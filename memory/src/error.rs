//! What can go wrong with guest memory.

use std::io;

use ferry_pages::Run;

/// Why guest memory could not be had, reached, or given back.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// cannot map memory of the host
    #[error(
        "cannot map {pages} pages of guest memory ({how}): lower the guest's memory or free some"
    )]
    Map {
        /// How many pages of 4 KiB.
        pages: u64,
        /// Which kind of memory.
        how: &'static str,
        /// The system's word.
        #[source]
        source: io::Error,
    },
    /// memory that is not in whole huge pages
    #[error(
        "guest memory of {pages} pages of 4 KiB is not in whole huge pages of 2 MiB: give the machine a multiple \
         of 2 MiB, or no huge pages"
    )]
    NotHuge {
        /// How many pages of 4 KiB.
        pages: u64,
    },
    /// the host has not enough huge pages
    #[error(
        "cannot have {needed} huge pages of 2 MiB for guest memory, {free} are free: reserve more, as root, by \
         `sysctl vm.nr_hugepages={enough}`, or use no huge pages"
    )]
    HugePages {
        /// How many huge pages.
        needed: u64,
        /// How many nobody has.
        free: u64,
        /// How many the host would have in all if it had enough.
        enough: u64,
        /// The system's word.
        #[source]
        source: io::Error,
    },
    /// a page that the machine does not have
    #[error("frames {:#x}..{:#x} are not all guest memory", run.start, run.end())]
    Outside {
        /// What was asked for.
        run: Run,
    },
    /// the kernel refused something about a stretch of guest memory
    #[error("cannot {what} frames {:#x}..{:#x}", run.start, run.end())]
    Refused {
        /// What was being done.
        what: &'static str,
        /// Where.
        run: Run,
        /// The system's word.
        #[source]
        source: io::Error,
    },
    /// no userfaultfd that serves KVM and system calls
    #[error(
        "cannot open userfaultfd for pages on demand: run as root, or give this user read and write \
         access to /dev/userfaultfd"
    )]
    Userfault {
        /// The system's word.
        #[source]
        source: io::Error,
    },
    /// memory in huge pages where pages come and go
    #[error(
        "frames {:#x}..{:#x} are in huge pages, which cannot be swapped: give the machine none",
        run.start, run.end()
    )]
    Huge {
        /// Which.
        run: Run,
    },
    /// a page that is kept elsewhere and cannot be had
    #[error("page {gfn:#x} is swapped out and cannot be read now: {why}")]
    Away {
        /// The page.
        gfn: u64,
        /// What is in the way.
        why: String,
    },
    /// regions that overlap
    #[error("guest memory regions at frames {:#x} and {:#x} overlap", .0.start, .1.start)]
    Overlap(Run, Run),
}
