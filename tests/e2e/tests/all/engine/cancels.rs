//! Until the commit the operator can end a migration: the machine goes on as if nothing had happened.

use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use ferry_migrate::{Guest, OutcomeKind, Progress, SendEvent, SendHandle, SendOptions, Sent};
use ferry_process_guest::Tracker;
use ferry_refvmm::DirtyLog;

use super::{ARENA_PAGES, BUSY, MIB, assert_completed, assert_goes_on_at_source, options};
use crate::stage::{
    Destination, Dice, Kvm, Link, Maker, Process, Subject, Watched, WatchedHost, Witness, goes_on,
    has_kvm,
};

/// When to cancel.
#[derive(Clone, Copy, Debug)]
enum When {
    /// At this piece of news.
    News(u32),
    /// After so long.
    After(Duration),
}

/// Migrates, cancels, and checks what is left; whether the machine left before it was cancelled.
fn cancelled<G: Subject>(
    source: &mut Watched<G>,
    destination: &Destination<Watched<G>>,
    options: &SendOptions,
    when: When,
) -> Option<Sent> {
    let handle = SendHandle::default();
    let debts = source.debts.clone();
    // Debts of an earlier migration are settled.
    debts.lock().unwrap().settle();
    if let When::After(delay) = when {
        let handle = handle.clone();
        std::thread::spawn(move || {
            std::thread::sleep(delay);
            handle.cancel();
        });
    }
    let news = AtomicU32::new(0);
    let mut first_round = None;
    let mut acknowledged = false;
    let sent = ferry_migrate::send(
        source,
        destination.connector.clone(),
        options,
        &handle,
        &mut |event| {
            if let SendEvent::Progress(progress) = event {
                match progress {
                    Progress::RoundStarted { round: 1, pages } => first_round = Some(pages),
                    // A sample was acknowledged.
                    Progress::RoundStarted { .. } => debts.lock().unwrap().acknowledge(),
                    Progress::RoundDone { .. } => {
                        debts.lock().unwrap().acknowledge();
                        acknowledged = true;
                    }
                    _ => {}
                }
                if let When::News(n) = when
                    && news.fetch_add(1, Ordering::SeqCst) == n
                {
                    handle.cancel();
                }
            }
        },
    );
    match sent.report.outcome {
        OutcomeKind::Completed => return Some(sent),
        OutcomeKind::Cancelled => {}
        other => panic!("{other:?}: {}", sent.report.reason),
    }
    assert_goes_on_at_source(&sent, source);
    let (owed, returned) = debts.lock().unwrap().settle();
    let mut missing = owed;
    missing.subtract(&returned);
    assert!(missing.is_empty(), "{} harvested pages were not returned ({when:?})", missing.len());
    if let (Some(pages), false) = (first_round, acknowledged) {
        assert!(returned.len() >= pages, "{} of {pages} pages returned", returned.len());
    }
    None
}

fn cancels_anywhere<M: Maker>(maker: &M, link: Link, whens: impl Iterator<Item = When>) {
    let witness = Witness::new();
    let mut source = Watched::running(maker.busy_guest(), &witness);
    let host = WatchedHost { host: maker.host(), witness: witness.clone() };
    let destination = Destination::start(link, host);
    // Slow enough that most moments come before the commit.
    let slow = SendOptions { bandwidth_bytes_per_s: Some(120_000_000), ..options(2) };
    let (mut kept, mut left) = (0, 0);
    for when in whens {
        if let Some(sent) = cancelled(&mut source, &destination, &slow, when) {
            // Too late: it arrived, and goes on from there.
            assert_completed(&sent);
            source = destination.arrival().expect("a machine").0;
            left += 1;
        } else {
            kept += 1;
        }
        assert_eq!(witness.running(), 1, "{when:?}");
    }
    println!("{kept} times cancelled, {left} times too late");
    assert!(kept > 2, "hardly any moment came before the commit");
    let sent = ferry_migrate::send(
        &mut source,
        destination.connector.clone(),
        &options(2),
        &SendHandle::default(),
        &mut |_| {},
    );
    assert_completed(&sent);
    let (arrived, _) = destination.arrival().expect("a machine");
    goes_on(&arrived, ARENA_PAGES);
    assert!(arrived.memory().resident().unwrap().len() >= ARENA_PAGES);
    assert_eq!(witness.running(), 1);
}

#[test]
fn cancelled_at_each_piece_of_news_the_machine_goes_on_and_nothing_is_lost() {
    for tracker in [Tracker::Software, Tracker::UffdWriteProtect] {
        let maker = Process { tracker, memory_bytes: 64 * MIB, workload: BUSY.into() };
        cancels_anywhere(&maker, Link::Memory, (0..8).map(When::News));
    }
}

#[test]
fn cancelled_at_any_moment_the_machine_goes_on_and_nothing_is_lost() {
    let maker = Process {
        tracker: Tracker::UffdWriteProtect,
        memory_bytes: 64 * MIB,
        workload: BUSY.into(),
    };
    let mut dice = Dice(1);
    for (link, times) in [(Link::Quic, 15), (Link::Tls, 15)] {
        let whens = (0..times).map(|_| When::After(Duration::from_micros(dice.below(400_000))));
        cancels_anywhere(&maker, link, whens);
    }
}

#[test]
fn a_kvm_machine_cancelled_at_any_moment_goes_on_and_nothing_is_lost() {
    if !has_kvm() {
        return;
    }
    for dirty_log in [DirtyLog::Bitmap, DirtyLog::Ring, DirtyLog::WriteProtect] {
        let maker = Kvm { dirty_log, memory_bytes: 64 * MIB, workload: BUSY.into() };
        let mut dice = Dice(2);
        let whens = (0..8).map(|_| When::After(Duration::from_micros(dice.below(400_000))));
        cancels_anywhere(&maker, Link::Memory, whens);
    }
}
