//! What a migration tells while it goes on, and how it ends.

use std::time::Duration;

use crate::Refusal;
use crate::permit::PermitStub;
use crate::policy::RoundFacts;

/// What whoever watches is told.
#[derive(Clone, Debug, PartialEq)]
pub enum Progress {
    /// The destination took the machine.
    Accepted,
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
        /// Expected downtime.
        expected_downtime: Duration,
        /// What was decided, in words.
        decision: String,
    },
    /// The guest stands still.
    Paused,
    /// The permit was sent.
    Committed,
    /// The machine runs at the destination.
    Running,
    /// The link was lost after the commit.
    InDoubt(String),
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
