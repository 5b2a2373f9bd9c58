//! What can go wrong when pages are scanned or merged.

use std::io;
use std::path::PathBuf;

use ferry_memory::MemoryError;
use ferry_pages::{LayoutError, Run};

use crate::{Tenant, TooManyPages};

/// Why pages could not be scanned.
#[derive(Debug, thiserror::Error)]
pub enum ScanError {
    /// the kernel does not tell what is in memory
    #[error(
        "cannot ask the kernel which guest pages are in memory: it takes /proc and Linux 6.7 or later"
    )]
    Pagemap(#[source] io::Error),
    /// guest memory cannot be read
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// memory that is no machine's
    #[error("guest memory that cannot be scanned: {0}")]
    Layout(#[from] LayoutError),
    /// too much of it
    #[error(transparent)]
    TooMany(#[from] TooManyPages),
}

/// Why the kernel does not merge pages. None of it is a fault of the machine, which goes on as it is; what can
/// be done instead is said by the report.
#[derive(Debug, thiserror::Error)]
pub enum MergeError {
    /// a kernel without KSM
    #[error("this kernel merges no pages: {path} is missing (it takes CONFIG_KSM)")]
    NoKsm {
        /// What is missing.
        path: PathBuf,
    },
    /// the operator turned it off
    #[error(
        "merging is turned off on this host: {path} says 2 (write 0 or 1 to it to permit merging)"
    )]
    TurnedOff {
        /// The switch.
        path: PathBuf,
    },
    /// not allowed
    #[error(
        "cannot set {path}: run as root, or have the operator turn KSM on (1 in /sys/kernel/mm/ksm/run)"
    )]
    NoPermission {
        /// What could not be written.
        path: PathBuf,
        /// The system's word.
        #[source]
        source: io::Error,
    },
    /// memory that the kernel does not merge
    #[error(
        "the kernel merges private memory only, and frames {:#x}..{:#x} are shared memory or huge pages",
        run.start, run.end()
    )]
    SharedMemory {
        /// The first of it.
        run: Run,
    },
    /// another tenant's pages are merged
    #[error(
        "pages of tenant {:?} are merged on this host now, and the kernel would merge those of tenant {:?} with \
         them: wait until the machines of the former are gone, or allow sharing between tenants",
        theirs.0, ours.0
    )]
    OtherTenant {
        /// Whose pages are merged.
        theirs: Tenant,
        /// Whose were to be.
        ours: Tenant,
    },
    /// another process has the kernel merge
    #[error("another process has the kernel merge pages (it holds {path}): try again later")]
    Busy {
        /// The lock.
        path: PathBuf,
    },
    /// the kernel refused the advice
    #[error("cannot advise the kernel of frames {:#x}..{:#x}", run.start, run.end())]
    Advise {
        /// Where.
        run: Run,
        /// The system's word.
        #[source]
        source: io::Error,
    },
    /// a file of the kernel, or a lock
    #[error("cannot use {path}")]
    File {
        /// Which.
        path: PathBuf,
        /// The system's word.
        #[source]
        source: io::Error,
    },
}

impl MergeError {
    /// Whether it may be otherwise in a moment: no reason to swap instead.
    pub fn is_for_now(&self) -> bool {
        matches!(self, Self::Busy { .. })
    }
}
