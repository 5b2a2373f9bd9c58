//! What a migration tells while it goes on, and how it ends.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::Refusal;
use crate::permit::PermitStub;
use crate::policy::{Decision, RoundFacts};
use crate::source::Reattach;

/// What whoever watches is told.
#[derive(Clone, Debug, PartialEq)]
pub enum Progress {
    /// The destination took the machine.
    Accepted,
    /// Link and guest were looked at; the move begins.
    Sampled,
    /// A round begins.
    RoundStarted {
        /// Number, from 1.
        round: u32,
        /// Pages in it.
        pages: u64,
    },
    /// A round is over.
    RoundDone {
        /// What it did.
        facts: RoundFacts,
        /// Link rate, bytes/s.
        rate_bytes_per_s: f64,
        /// Bytes that a page takes on the link.
        bytes_per_page: f64,
        /// The shortest acknowledgement so far.
        round_trip: Duration,
        /// Expected downtime.
        expected_downtime: Duration,
        /// Percent of their time that vCPUs were held back.
        slowed: u8,
        /// What was decided.
        decision: Decision,
    },
    /// The guest stands still.
    Paused,
    /// The permit was sent.
    Committed,
    /// The machine runs at the destination.
    Running,
    /// The link was lost after the commit.
    InDoubt(String),
    /// The machine runs at the destination, and fetches `pages` pages.
    Fetching {
        /// Pages that were owed at the hand-over, or are after a lost link.
        pages: u64,
    },
    /// The link was lost while the machine fetched its pages; the source tries to come back.
    LinkLost(String),
}

/// How a migration ended, seen from the source.
#[derive(Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The machine runs at the destination.
    Completed {
        /// Whether both digests of memory are the same; `None` if they could not be compared.
        digest_verified: Option<bool>,
        /// What is to be said of it: why it converged, or why the digest was not verified.
        reason: String,
    },
    /// The operator cancelled; the machine runs here.
    Cancelled,
    /// The destination refused; the machine runs here.
    Refused(Vec<Refusal>),
    /// It failed before the commit, or was refused after it; the machine runs here.
    Failed(String),
    /// The link was lost after the commit and the destination cannot be asked: the machine stays
    /// paused here, its state safe, until the operator decides.
    InDoubt {
        /// What happened.
        reason: String,
        /// The way back to a permit.
        permit: PermitStub,
    },
    /// The machine runs at the destination, some of its pages are still here, and the destination could
    /// not be reached for a while: whoever touches such a page waits. The migration can be taken up again.
    /// [`Reattach::is_in_doubt`] where not even that is known: then the machine stays paused here as above.
    Detached {
        /// What happened.
        reason: String,
        /// With what to go on.
        reattach: Reattach,
    },
}

/// How the destination fetched pages while the machine ran, measured there.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fetched {
    /// Touches of pages that were not there.
    pub faults: u64,
    /// Pages that threads waited for, and that were asked for.
    pub requested: u64,
    /// Pages that were there before anyone touched them.
    pub pushed: u64,
    /// Copies of pages that were there already.
    pub late: u64,
    /// Touches of pages that the source never had.
    pub zeros: u64,
    /// From reading a fault until its page was placed: mean, ns.
    pub wait_mean_ns: u64,
    /// Median, ns.
    pub wait_p50_ns: u64,
    /// 90th percentile, ns.
    pub wait_p90_ns: u64,
    /// 99th percentile, ns.
    pub wait_p99_ns: u64,
    /// Longest, ns.
    pub wait_max_ns: u64,
    /// All waits of each thread together, ns; the threads in no order.
    pub waited_by_thread_ns: Vec<u64>,
    /// From the pager's start until the last page came, ns.
    pub took_ns: u64,
    /// From the machine's start until its vCPUs waited for pages for less than a tenth of their time in any
    /// 50 ms that followed, ns.
    pub full_speed_ns: u64,
}

/// When the parts of the switchover happened, since the start of the migration.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Switchover {
    /// Pause was asked for.
    pub pause: Duration,
    /// The vCPUs stood still.
    pub paused: Duration,
    /// The last harvest before saving was done.
    pub harvested: Duration,
    /// State was saved.
    pub saved: Duration,
    /// The commit was sent.
    pub committed: Duration,
    /// The destination's word that it runs had come.
    pub running: Duration,
    /// At the destination, from the commit's arrival until the last page, µs.
    pub destination_pages_us: u64,
    /// At the destination, loading state, µs.
    pub destination_load_us: u64,
    /// At the destination, starting vCPUs, µs.
    pub destination_resume_us: u64,
}
