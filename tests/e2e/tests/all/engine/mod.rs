//! The engine end to end, in one process: real guests with a workload, over memory and over QUIC on
//! loopback.

mod balloon;
mod cancels;
mod faults;
mod goals;
mod moves;
mod post_copy;
mod trouble;

use std::time::Duration;

use ferry_migrate::{Goals, Left, Mode, OutcomeKind, SendOptions, Sent, Whereabouts};

use crate::stage::{Subject, goes_on};

const MIB: u64 = 1 << 20;

/// Two workers that come to any of 16 MiB again and again, as fast as they can; the rest of memory is
/// never touched.
const BUSY: &str = "pattern=random arena=16M fill=all fill_random=60 random=60";
const ARENA_PAGES: u64 = 16 * MIB / 4096;

/// Goals that a busy guest on a busy computer meets, by pre-copy.
fn options(lanes: u16) -> SendOptions {
    let goals = Goals {
        max_downtime: Duration::from_secs(2),
        max_total: Duration::from_secs(60),
        ..Goals::default()
    };
    SendOptions { goals, mode: Mode::PreCopy, lanes, ..SendOptions::default() }
}

#[track_caller]
fn assert_completed(sent: &Sent) {
    let report = &sent.report;
    assert_eq!(report.outcome, OutcomeKind::Completed, "{}", report.reason);
    assert!(report.digest_verified && !report.memory_differs, "{}", report.reason);
    assert_eq!(report.machine, Whereabouts::RunsAtDestination);
    assert!(matches!(sent.left, Left::Nothing), "{:?}", sent.left);
}

/// The machine goes on at its source, unharmed.
#[track_caller]
fn assert_goes_on_at_source(sent: &Sent, source: &impl Subject) {
    assert_eq!(sent.report.machine, Whereabouts::RunsAtSource, "{}", sent.report.reason);
    assert!(matches!(sent.left, Left::Running), "{:?}", sent.left);
    assert!(source.runs());
    goes_on(source, 100);
}
