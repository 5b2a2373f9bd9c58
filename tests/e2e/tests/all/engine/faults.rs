//! A wrong implementation is found out: faults are put into trackers, guests and lanes, and each must be
//! noticed, or do no harm.

use std::sync::Mutex;

use bytes::Bytes;
use ferry_codec::{BatchHeader, HEADER_BYTES, RUN_BYTES};
use ferry_migrate::{Guest, OutcomeKind, SendOptions, Sent};
use ferry_pages::{PAGE_BYTES, Run};
use ferry_process_guest::{ProcessHost, Tracker};
use ferry_refvmm::DirtyLog;

use super::{ARENA_PAGES, BUSY, MIB, assert_completed, assert_goes_on_at_source, options};
use crate::stage::{
    DRAINED_BY_SAVE, Deal, Destination, Faults, Kind, Kvm, Link, Maker, Process, Relay, Subject,
    Watched, WatchedHost, Witness, Word, goes_on, has_kvm, migrate, pass,
};

/// Moves a busy guest with `faults`: the report, the guest at the destination, and the bytes of its last
/// page there.
fn move_with<M: Maker>(maker: &M, faults: Faults) -> (Sent, Watched<M::Subject>, Vec<u8>) {
    let witness = Witness::new();
    let mut source = Watched::running(maker.busy_guest(), &witness).with_faults(faults);
    let host = WatchedHost { host: maker.host(), witness };
    let destination = Destination::start(Link::Memory, host);
    // A dropped bit: rounds so long that the guest comes to each page again before it leaves.
    let slowly = faults.drop_one_harvested.then_some(40_000_000);
    let options = SendOptions { bandwidth_bytes_per_s: slowly, ..options(2) };
    let sent = migrate(&mut source, &destination.connector, &options);
    let (arrived, _) = destination.arrival().expect("a machine");
    let mut page = vec![0; PAGE_BYTES];
    arrived.memory().read(arrived.last_page(), &mut page).unwrap();
    (sent, arrived, page)
}

#[track_caller]
fn assert_found_damaged(sent: &Sent) {
    let report = &sent.report;
    assert_eq!(report.outcome, OutcomeKind::Completed);
    assert!(report.memory_differs && !report.digest_verified, "nobody noticed: {report:?}");
    for word in ["memory", "digest", "stop it"] {
        assert!(report.reason.contains(word), "{}", report.reason);
    }
}

fn process(tracker: Tracker) -> Process {
    Process { tracker, memory_bytes: 64 * MIB, workload: BUSY.into() }
}

fn kvm(dirty_log: DirtyLog) -> Kvm {
    Kvm { dirty_log, memory_bytes: 64 * MIB, workload: BUSY.into() }
}

fn each_kind(check: impl Fn(&dyn Fn(Faults) -> (Sent, Vec<u8>))) {
    let with_kvm = has_kvm();
    for kind in Kind::ALL {
        println!("{kind:?}");
        match kind {
            Kind::Process(tracker) => check(&|faults| {
                let (sent, _, page) = move_with(&process(tracker), faults);
                (sent, page)
            }),
            Kind::Kvm(dirty_log) if with_kvm => check(&|faults| {
                let (sent, _, page) = move_with(&kvm(dirty_log), faults);
                (sent, page)
            }),
            Kind::Kvm(_) => {}
        }
    }
}

#[test]
fn one_dropped_dirty_bit_is_found_by_the_digest() {
    each_kind(|move_with| {
        let (sent, _) = move_with(Faults { drop_one_harvested: true, ..Faults::default() });
        assert_found_damaged(&sent);
    });
}

#[test]
fn one_dropped_dirty_bit_is_found_by_the_guest_itself() {
    let faults = Faults { drop_one_harvested: true, ..Faults::default() };
    let (_, arrived, _) = move_with(&process(Tracker::Software), faults);
    let before = arrived.written();
    crate::stage::eventually("the guest finds the page", || arrived.wrong().is_some());
    assert!(!arrived.runs(), "it stopped, {} visits later", arrived.written() - before);
}

#[test]
fn what_devices_write_while_the_machine_is_saved_arrives() {
    each_kind(|move_with| {
        let (sent, page) = move_with(Faults { drained_devices_write: true, ..Faults::default() });
        assert_completed(&sent);
        assert!(page.iter().all(|b| *b == DRAINED_BY_SAVE), "it has {:#x}", page[0]);
    });
}

#[test]
fn a_skipped_harvest_after_save_is_found_by_the_digest() {
    each_kind(|move_with| {
        let faults = Faults {
            drained_devices_write: true,
            skip_harvest_after_save: true,
            ..Faults::default()
        };
        let (sent, page) = move_with(faults);
        assert!(page.iter().all(|b| *b != DRAINED_BY_SAVE));
        assert_found_damaged(&sent);
    });
}

fn runs_of(header: &BatchHeader, frame: &[u8]) -> Vec<Run> {
    let table = &frame[HEADER_BYTES..HEADER_BYTES + usize::from(header.runs) * RUN_BYTES];
    let number = |bytes: &[u8]| u64::from_le_bytes(bytes.try_into().unwrap());
    table.chunks(RUN_BYTES).map(|e| Run::new(number(&e[..8]), number(&e[8..]))).collect()
}

/// A page is in both of the last rounds, with another content in each; the lane delivers them in the
/// wrong order.
#[test]
fn an_old_page_delivered_late_does_not_overwrite_a_newer_one() {
    let maker = process(Tracker::Software);
    let faults = Faults { drained_devices_write: true, ..Faults::default() };
    let witness = Witness::new();
    let mut source = Watched::running(maker.busy_guest(), &witness).with_faults(faults);
    let last_page = source.last_page();
    let host = WatchedHost { host: ProcessHost::default(), witness };
    let destination = Destination::start(Link::Memory, host);
    let held: Mutex<(u32, Option<Bytes>)> = Mutex::default();
    let swapped = std::sync::Arc::new(std::sync::atomic::AtomicU32::new(0));
    let relay = Relay::new(&destination.connector, destination.handle(), false, {
        let swapped = swapped.clone();
        move |word, bytes| {
            let Word::Frame(header) = word else { return Deal::Pass };
            if !runs_of(header, bytes).iter().any(|r| (r.start..r.end()).contains(&last_page)) {
                return Deal::Pass;
            }
            let mut held = held.lock().unwrap();
            held.0 += 1;
            match held.1.take() {
                None => {
                    held.1 = Some(bytes.clone());
                    Deal::Lose
                }
                Some(old) => {
                    swapped.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
                    Deal::Instead(vec![bytes.clone(), old])
                }
            }
        }
    });
    let sent = migrate(&mut source, &relay.connector(), &options(1));
    assert_eq!(swapped.load(std::sync::atomic::Ordering::SeqCst), 1, "the test's own trick");
    let (arrived, _) = destination.arrival().expect("a machine");
    let mut page = vec![0; PAGE_BYTES];
    arrived.memory().read(last_page, &mut page).unwrap();
    assert!(page.iter().all(|b| *b == DRAINED_BY_SAVE), "the old page won: {:#x}", page[0]);
    assert_completed(&sent);
    goes_on(&arrived, ARENA_PAGES);
}

/// The first round that has several frames.
const WIDE: u32 = 3;

/// A copy of its first frame comes again, `later`.
fn replayed(later: impl Fn(&Word<'_>, u32) -> bool + Send + Sync + 'static) {
    let maker = process(Tracker::UffdWriteProtect);
    let witness = Witness::new();
    let mut source = Watched::running(maker.busy_guest(), &witness);
    let host = WatchedHost { host: ProcessHost::default(), witness: witness.clone() };
    let destination = Destination::start(Link::Memory, host);
    let copy: Mutex<Option<Bytes>> = Mutex::default();
    let replays = std::sync::Arc::new(std::sync::atomic::AtomicU32::new(0));
    let relay = Relay::new(&destination.connector, destination.handle(), false, {
        let replays = replays.clone();
        move |word, bytes| {
            let Word::Frame(header) = word else { return Deal::Pass };
            let mut copy = copy.lock().unwrap();
            if header.round == WIDE && copy.is_none() {
                *copy = Some(bytes.clone());
                return Deal::Pass;
            }
            match copy.as_ref().filter(|_| later(&word, header.round)) {
                Some(old) if replays.fetch_add(1, std::sync::atomic::Ordering::SeqCst) == 0 => {
                    Deal::Instead(vec![bytes.clone(), old.clone()])
                }
                _ => Deal::Pass,
            }
        }
    });
    let sent = migrate(&mut source, &relay.connector(), &options(1));
    assert!(replays.load(std::sync::atomic::Ordering::SeqCst) >= 1, "the test's own trick");
    assert_eq!(sent.report.outcome, OutcomeKind::Failed);
    assert!(!sent.report.memory_differs);
    assert_goes_on_at_source(&sent, &source);
    assert_eq!(witness.running(), 1);
    destination.void();
    let clean = Relay::new(&destination.connector, destination.handle(), false, pass);
    assert_completed(&migrate(&mut source, &clean.connector(), &options(1)));
    goes_on(&destination.arrival().expect("a machine").0, ARENA_PAGES);
}

#[test]
fn a_frame_that_comes_a_second_time_in_a_later_round_ends_the_migration_not_the_machine() {
    replayed(|_, round| round == WIDE + 1);
}

#[test]
fn a_frame_that_comes_a_second_time_in_its_own_round_ends_the_migration_not_the_machine() {
    replayed(|_, round| round == WIDE);
}
