//! Machines arrive whole: each way to find dirty pages, each link, each codec, sparse memory.

use std::time::Duration;

use ferry_codec::{Codec, CodecSet};
use ferry_migrate::{Arrival, Guest, OutcomeKind, ReceiveOptions, SendOptions};
use ferry_process_guest::Tracker;
use ferry_refvmm::DirtyLog;

use super::{ARENA_PAGES, BUSY, MIB, assert_completed, assert_goes_on_at_source, options};
use crate::stage::{
    Destination, Kind, Kvm, Link, Maker, Process, Subject, Watched, WatchedHost, Witness, goes_on,
    has_kvm, migrate,
};

fn process(tracker: Tracker, workload: &str) -> Process {
    Process { tracker, memory_bytes: 256 * MIB, workload: workload.into() }
}

fn kvm(dirty_log: DirtyLog) -> Kvm {
    Kvm { dirty_log, memory_bytes: 256 * MIB, workload: BUSY.into() }
}

/// Moves a busy guest and gives it back from its destination.
fn moves<M: Maker>(maker: &M, link: Link, lanes: u16) {
    let witness = Witness::new();
    let mut source = Watched::running(maker.busy_guest(), &witness);
    let host = WatchedHost { host: maker.host(), witness: witness.clone() };
    let destination = Destination::start(link, host);
    let before = source.memory().resident().unwrap().len();
    let written = source.written();
    // So slow that a guest gets to run meanwhile, however busy the computer is.
    let slow = SendOptions { bandwidth_bytes_per_s: Some(80_000_000), ..options(lanes) };
    let sent = migrate(&mut source, &destination.connector, &slow);
    assert_completed(&sent);
    let report = &sent.report;
    assert!(report.rounds >= 2, "a guest that writes without pause takes more than one round");
    assert!(report.downtime_ms > 0.0 && report.downtime_ms <= report.total_ms);
    let (arrived, arrival) = destination.arrival().expect("a machine");
    assert_eq!(arrival, Arrival::Runs { digest_verified: Some(true) });
    assert_eq!(witness.running(), 1);
    assert!(!source.runs() && arrived.runs());
    assert!(source.written() > written, "the guest was not under load");
    assert!(arrived.written() >= source.written(), "its counters moved along");
    goes_on(&arrived, ARENA_PAGES);

    // What the guest never touched came into being on neither side.
    let after = source.memory().resident().unwrap().len();
    let there = arrived.memory().resident().unwrap().len();
    assert!(before >= ARENA_PAGES && after <= before + before / 50, "{before} became {after}");
    assert!(there.abs_diff(after) <= after / 50, "{after} resident pages became {there}");
}

fn every_kind(link: Link, lanes: u16) {
    let with_kvm = has_kvm();
    for kind in Kind::ALL {
        println!("{kind:?} over {link:?}, {lanes} lanes");
        match kind {
            Kind::Process(tracker) => moves(&process(tracker, BUSY), link, lanes),
            Kind::Kvm(dirty_log) if with_kvm => moves(&kvm(dirty_log), link, lanes),
            Kind::Kvm(_) => {}
        }
    }
}

#[test]
fn every_backend_and_guest_moves_under_load_over_memory_and_one_lane() {
    every_kind(Link::Memory, 1);
}

#[test]
fn every_backend_and_guest_moves_under_load_over_quic_and_three_lanes() {
    every_kind(Link::Quic, 3);
}

#[test]
fn every_backend_and_guest_moves_under_load_over_tls_and_three_lanes() {
    every_kind(Link::Tls, 3);
}

/// Moves a guest that rewrites 1 MiB of its 16: the other pages travel once.
fn sends_no_more_than_was_written<M: Maker>(maker: &M) {
    let mut source = maker.busy_guest();
    let destination = Destination::start(Link::Memory, maker.host());
    let resident = source.memory().resident().unwrap().len();
    let sent = migrate(&mut source, &destination.connector, &options(1));
    assert_completed(&sent);
    let report = &sent.report;
    let pages = report.pages.raw + report.pages.lz4 + report.pages.zstd + report.pages.zero;
    // The working set, its table, a status page and the like.
    let each_round = MIB / 4096 + 64;
    let most = resident + each_round * u64::from(report.rounds);
    assert!(pages <= most, "{pages} pages sent in {} rounds, {resident} resident", report.rounds);
    drop(destination.arrival().expect("a machine"));
}

#[test]
fn pages_that_are_not_written_again_travel_once() {
    let workload = "pattern=working-set set=1M arena=16M fill=all";
    let with_kvm = has_kvm();
    for kind in Kind::ALL {
        println!("{kind:?}");
        match kind {
            Kind::Process(tracker) => sends_no_more_than_was_written(&process(tracker, workload)),
            Kind::Kvm(dirty_log) if with_kvm => {
                let workload = workload.into();
                sends_no_more_than_was_written(&Kvm { workload, ..kvm(dirty_log) });
            }
            Kind::Kvm(_) => {}
        }
    }
}

#[test]
fn pages_travel_only_by_codecs_that_both_sides_have() {
    let lz4 = CodecSet::from_iter([Codec::Lz4]);
    let zstd = CodecSet::from_iter([Codec::Zstd]);
    let cases = [
        (CodecSet::BASE, CodecSet::ALL),
        (lz4, CodecSet::ALL),
        (zstd, CodecSet::ALL),
        (CodecSet::ALL, CodecSet::ALL),
        (CodecSet::ALL, CodecSet::BASE),
        (CodecSet::ALL, zstd),
        (lz4, zstd),
    ];
    // Soft pages and a slow link: compression pays.
    let maker = process(Tracker::Software, "pattern=idle arena=40M fill=all fill_random=20");
    for (ours, theirs) in cases {
        let mut source = maker.busy_guest();
        let receive = ReceiveOptions { codecs: theirs, ..ReceiveOptions::default() };
        let destination = Destination::start_with(Link::Memory, maker.host(), receive);
        let slow =
            SendOptions { codecs: ours, bandwidth_bytes_per_s: Some(60_000_000), ..options(1) };
        let sent = migrate(&mut source, &destination.connector, &slow);
        assert_completed(&sent);
        let pages = sent.report.pages;
        let common = ours.common(theirs);
        let may = |codec, pages| assert!(common.contains(codec) || pages == 0, "{codec}: {pages}");
        may(Codec::Lz4, pages.lz4);
        may(Codec::Zstd, pages.zstd);
        if common != CodecSet::BASE {
            assert!(pages.lz4 + pages.zstd >= 4096, "{common} was not used: {pages:?}");
        }
        assert!(pages.raw + pages.lz4 + pages.zstd >= 40 * MIB / 4096, "{pages:?}");
        drop(destination.arrival().expect("a machine"));
    }
}

#[test]
fn a_machine_far_larger_than_its_contents_moves_without_touching_the_rest() {
    let maker = Process {
        tracker: Tracker::UffdWriteProtect,
        memory_bytes: 16 << 30,
        workload: "pattern=working-set set=4M arena=12M fill=all".into(),
    };
    let mut source = maker.busy_guest();
    let destination = Destination::start(Link::Memory, maker.host());
    let before = source.memory().resident().unwrap().len();
    let sent = migrate(&mut source, &destination.connector, &options(2));
    assert_completed(&sent);
    let (arrived, _) = destination.arrival().expect("a machine");
    goes_on(&arrived, 1000);
    let after = source.memory().resident().unwrap().len();
    let there = arrived.memory().resident().unwrap().len();
    assert!(after.abs_diff(before) <= before / 50, "{before} became {after}");
    assert!(there.abs_diff(before) <= before / 50, "{before} became {there} at the destination");
}

#[test]
fn pages_that_were_read_as_zeros_stay_untouched_at_the_destination() {
    // The reader passes over pages that were never written; a discarded page is zero again.
    let maker = process(Tracker::Software, "pattern=idle arena=32M fill=all");
    let mut source = maker.busy_guest();
    let (memory, arena) = (source.memory(), source.arena());
    for gfn in arena.start..arena.start + 2048 {
        memory.write(gfn, &[0; 4096]).unwrap();
    }
    let destination = Destination::start(Link::Memory, maker.host());
    let sent = migrate(&mut source, &destination.connector, &options(1));
    assert_completed(&sent);
    assert_eq!(sent.report.pages.zero, 2048);
    let (arrived, _) = destination.arrival().expect("a machine");
    let there = arrived.memory().resident().unwrap();
    let first = ferry_pages::Run::new(arena.start, 2048);
    assert_eq!(there.count_in(first), 0, "zeros over untouched memory stay untouched");
}

#[test]
fn goals_that_cannot_be_met_end_in_words_and_the_machine_goes_on_at_its_source() {
    let maker = process(Tracker::UffdWriteProtect, BUSY);
    let mut source = maker.busy_guest();
    let destination = Destination::start(Link::Memory, maker.host());
    let mut hard = options(1);
    hard.goals.max_downtime = Duration::from_micros(500);
    hard.goals.max_total = Duration::from_millis(700);
    let sent = migrate(&mut source, &destination.connector, &hard);
    assert_eq!(sent.report.outcome, OutcomeKind::Failed);
    // On a busy computer the round trip alone takes longer, and that is said before any page is sent.
    let by_the_link: &[&str] = &["its round trip is", "--max-downtime"];
    let by_the_guest: &[&str] = &["--max-total", "--max-downtime", "pages/s", "MB/s"];
    let says = |words: &[&str]| words.iter().all(|word| sent.report.reason.contains(word));
    assert!(says(by_the_link) || says(by_the_guest), "{}", sent.report.reason);
    assert!(sent.report.total_ms < 20_000.0, "{} ms", sent.report.total_ms);
    assert_goes_on_at_source(&sent, &source);
    destination.void();
    let sent = migrate(&mut source, &destination.connector, &options(1));
    assert_completed(&sent);
    goes_on(&destination.arrival().expect("a machine").0, ARENA_PAGES);
}

#[test]
fn a_machine_moves_on_from_where_it_arrived_again_and_again() {
    let maker = process(Tracker::UffdWriteProtect, BUSY);
    let destination = Destination::start(Link::Tls, maker.host());
    let mut guest = maker.busy_guest();
    for _ in 0..5 {
        let sent = migrate(&mut guest, &destination.connector, &options(2));
        assert_completed(&sent);
        guest = destination.arrival().expect("a machine").0;
    }
    goes_on(&guest, ARENA_PAGES);
}
