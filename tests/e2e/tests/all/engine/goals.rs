//! What the operator asks for: how far the guest may be held back, and other goals while it moves.

use std::time::{Duration, Instant};

use ferry_migrate::{
    Goals, Guest, OutcomeKind, Progress, SendEvent, SendHandle, SendOptions, Tuning,
};
use ferry_process_guest::Tracker;
use ferry_refvmm::DirtyLog;

use super::{ARENA_PAGES, BUSY, MIB, assert_completed, assert_goes_on_at_source, options};
use crate::stage::{
    Destination, Kvm, Link, Maker, Process, Subject, eventually, goes_on, has_kvm, migrate,
};

/// Less than the guest writes, by far; and more than it writes in a hundredth of its time on any computer.
const NARROW: u64 = 40_000_000;

fn hard(max_slowdown: u8, max_total: Duration) -> SendOptions {
    let goals = Goals { max_downtime: Duration::from_millis(100), max_total, max_slowdown };
    SendOptions { goals, bandwidth_bytes_per_s: Some(NARROW), ..options(1) }
}

fn held_back_it_moves<M: Maker>(maker: &M) {
    let mut source = maker.busy_guest();
    let destination = Destination::start(Link::Memory, maker.host());
    let sent = migrate(&mut source, &destination.connector, &hard(0, Duration::from_secs(2)));
    assert_eq!(sent.report.outcome, OutcomeKind::Failed, "{}", sent.report.reason);
    for word in
        ["--max-total", "needs a link of", "--max-downtime", "--max-slowdown", "--mode auto"]
    {
        assert!(sent.report.reason.contains(word), "{word}: {}", sent.report.reason);
    }
    destination.void();

    let sent = migrate(&mut source, &destination.connector, &hard(99, Duration::from_secs(60)));
    assert_completed(&sent);
    let decisions = &sent.report.decisions;
    assert!(decisions.iter().any(|d| d.decision == "slow"), "{decisions:#?}");
    assert!(decisions.last().is_some_and(|d| d.decision == "switch-over" && d.slowed_percent > 0));
    goes_on(&destination.arrival().expect("a machine").0, ARENA_PAGES);
}

#[test]
fn a_guest_that_writes_faster_than_the_link_carries_moves_by_rounds_if_it_may_be_held_back() {
    let workload = BUSY.to_owned();
    let memory_bytes = 256 * MIB;
    held_back_it_moves(&Process {
        tracker: Tracker::UffdWriteProtect,
        memory_bytes,
        workload: workload.clone(),
    });
    if has_kvm() {
        held_back_it_moves(&Kvm { dirty_log: DirtyLog::Ring, memory_bytes, workload });
    }
}

fn written_within(guest: &impl Subject, time: Duration) -> u64 {
    let before = guest.written();
    std::thread::sleep(time);
    guest.written() - before
}

fn goes_on_at_full_speed<M: Maker>(maker: &M) {
    let time = Duration::from_millis(400);
    let mut source = maker.busy_guest();
    source.throttle(99).unwrap();
    let mut slow = 0;
    eventually("a guest that is held back goes on", || {
        slow = written_within(&source, time);
        slow > 0
    });
    let full_speed = |guest: &M::Subject, when: &str| {
        eventually(when, || {
            let now = written_within(guest, time);
            println!("{when}: {now} pages, {slow} held back");
            now > 3 * slow
        });
    };
    source.throttle(0).unwrap();
    full_speed(&source, "let go, it is at full speed");

    let destination = Destination::start(Link::Memory, maker.host());
    let sent = migrate(&mut source, &destination.connector, &hard(50, Duration::from_secs(2)));
    assert_eq!(sent.report.outcome, OutcomeKind::Failed, "{}", sent.report.reason);
    assert!(sent.report.decisions.iter().any(|d| d.decision == "slow"), "{:#?}", sent.report);
    assert_goes_on_at_source(&sent, &source);
    full_speed(&source, "given up, it is at full speed");
}

#[test]
fn vcpus_that_were_held_back_run_at_full_speed_where_the_move_comes_to_nothing() {
    let workload = BUSY.to_owned();
    let memory_bytes = 256 * MIB;
    goes_on_at_full_speed(&Process {
        tracker: Tracker::UffdWriteProtect,
        memory_bytes,
        workload: workload.clone(),
    });
    if has_kvm() {
        goes_on_at_full_speed(&Kvm { dirty_log: DirtyLog::Bitmap, memory_bytes, workload });
    }
}

#[test]
fn goals_and_bandwidth_can_be_changed_while_a_machine_moves() {
    let tracker = Tracker::UffdWriteProtect;
    let maker = Process { tracker, memory_bytes: 256 * MIB, workload: BUSY.into() };
    let mut source = maker.busy_guest();
    let destination = Destination::start(Link::Memory, maker.host());
    // Its first round would take minutes, and it is not allowed to take one second.
    let goals = Goals { max_total: Duration::from_secs(1), ..Goals::default() };
    let how = SendOptions { goals, bandwidth_bytes_per_s: Some(50_000), ..options(1) };
    let handle = SendHandle::default();
    let began = Instant::now();
    let connector = destination.connector.clone();
    let sent = ferry_migrate::send(&mut source, connector, &how, &handle, &mut |event| {
        if let SendEvent::Progress(Progress::RoundStarted { round: 1, .. }) = event {
            handle.tune(Tuning {
                max_downtime: Some(Duration::from_secs(5)),
                max_total: Some(Duration::from_secs(60)),
                bandwidth_bytes_per_s: Some(0),
                ..Tuning::default()
            });
        }
    });
    assert_completed(&sent);
    assert!(began.elapsed() < Duration::from_secs(60));
    goes_on(&destination.arrival().expect("a machine").0, ARENA_PAGES);
}

#[test]
fn a_look_before_the_move_foretells_it_and_leaves_the_machine_where_it_is() {
    let maker = Process {
        tracker: Tracker::UffdWriteProtect,
        memory_bytes: 256 * MIB,
        workload: "pattern=working-set set=1M arena=32M rate=2000 fill=all random=100".into(),
    };
    let mut source = maker.busy_guest();
    let destination = Destination::start(Link::Memory, maker.host());
    // The link's limit makes what it takes known, however busy the computer is.
    let mut how = SendOptions { bandwidth_bytes_per_s: Some(NARROW), ..options(1) };
    how.look_only = true;
    let looked = migrate(&mut source, &destination.connector, &how);
    assert_eq!(looked.report.outcome, OutcomeKind::Cancelled, "{}", looked.report.reason);
    assert_goes_on_at_source(&looked, &source);
    assert!(destination.void().contains("looked at only"));
    let foreseen = looked.report.foreseen.expect("a forecast");
    let asked: Vec<_> = foreseen.ways.iter().map(|way| way.asked.as_str()).collect();
    assert_eq!(asked, ["pre-copy", "auto", "post-copy", "hybrid"]);
    let pages = foreseen.pages;
    assert!((32 * MIB / 4096..40 * MIB / 4096).contains(&pages), "{pages} pages");
    assert!(foreseen.bytes_per_page > 4000.0 && foreseen.round_trip_ms > 0.0, "{foreseen:?}");
    assert!(foreseen.dirty_pages_per_s > 100.0, "{foreseen:?}");

    how.look_only = false;
    let sent = migrate(&mut source, &destination.connector, &how);
    assert_completed(&sent);
    let told = &sent.report.foreseen.as_ref().expect("a forecast").ways[0];
    assert!(told.misses.is_none(), "{told:?}");
    let error = told.total_ms / sent.report.total_ms;
    assert!((0.5..2.0).contains(&error), "{told:?} came to {} ms", sent.report.total_ms);
    goes_on(&destination.arrival().expect("a machine").0, 100);
}
