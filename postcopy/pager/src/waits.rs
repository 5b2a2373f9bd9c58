//! How long threads waited for pages.

use std::time::Duration;

use ferry_postcopy::{DemandCounts, WaitedTime};
use hdrhistogram::Histogram;

/// What a pager measured.
#[derive(Clone, Debug)]
pub struct Waits {
    /// Faults, and what became of the pages; huge pages count as one.
    pub counts: DemandCounts,
    /// Each wait for a page, from reading the fault to placing the page, ns.
    pub nanos: Histogram<u64>,
    /// All waits of each thread together, by the thread's number in the system.
    pub by_thread: Vec<(u32, Duration)>,
    /// When threads waited, since the pager's start.
    pub waited: WaitedTime,
}
