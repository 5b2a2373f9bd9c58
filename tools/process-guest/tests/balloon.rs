//! A process guest gives memory back, takes it again, and every page is right all the time.

#[path = "../../../memory/tests/host/huge_pages.rs"]
mod huge_pages;

use std::time::{Duration, Instant};

use ferry_migrate::{Guest, Host, StateReader, StateWriter};
use ferry_pages::{PAGE_BYTES, PageSet};
use ferry_process_guest::{Config, ProcessGuest, ProcessHost, Tracker};
use huge_pages::HugePages;

const MIB: u64 = 1 << 20;
const MEMORY: u64 = 64 * MIB;
const PAGE: u64 = PAGE_BYTES as u64;

fn config(workload: &str, huge_pages: bool) -> Config {
    Config {
        name: "p1".into(),
        memory_bytes: MEMORY,
        huge_pages,
        workers: 2,
        workload: workload.into(),
        tracker: Tracker::UffdWriteProtect,
    }
}

fn running(workload: &str, huge_pages: bool) -> ProcessGuest {
    let mut guest = ProcessGuest::new(config(workload, huge_pages)).unwrap();
    guest.run().unwrap();
    guest
}

fn wait_until(what: &str, mut done: impl FnMut() -> bool) {
    let begin = Instant::now();
    while !done() {
        assert!(begin.elapsed() < Duration::from_secs(20), "waited too long until {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Waits until each worker has visited as many pages as `times` the arena has; none may be wrong.
fn goes_on(guest: &ProcessGuest, times: u64) {
    let visits = || guest.counters().iter().map(|c| c.written + c.checked).collect::<Vec<_>>();
    let (before, more) = (visits(), times * guest.arena().pages);
    wait_until("it has gone on", || {
        visits().iter().zip(&before).all(|(now, b)| now - b >= more) || guest.corrupt().is_some()
    });
    assert_eq!(guest.corrupt(), None);
}

fn resident_bytes(guest: &ProcessGuest) -> u64 {
    guest.memory().resident().unwrap().len() * PAGE
}

fn reaches(guest: &ProcessGuest, target: u64) {
    guest.set_balloon_target(target).unwrap();
    let will_have = guest.balloon_target();
    assert!(will_have <= target && target - will_have <= 4 * MIB, "{will_have} for {target}");
    wait_until("the target is reached", || MEMORY - guest.balloon_bytes() == will_have);
    assert_eq!(guest.balloon_trouble(), None);
}

fn carry(from: &ProcessGuest, to: &ProcessGuest, pages: &PageSet) {
    let mut page = vec![0; PAGE_BYTES];
    for gfn in pages.runs().flat_map(|run| run.start..run.end()) {
        from.memory().read(gfn, &mut page).unwrap();
        to.memory().write(gfn, &page).unwrap();
    }
}

fn save(guest: &mut ProcessGuest) -> StateReader {
    let mut out = StateWriter::new();
    guest.save(&mut out).unwrap();
    StateReader::parse(&out.finish().unwrap()).unwrap()
}

fn gives_back_and_takes(huge_pages: bool) {
    for workload in ["", "pattern=random", "pattern=read fill=all", "pattern=moving-set set=4M"] {
        let guest = running(workload, huge_pages);
        goes_on(&guest, 1);
        for target in [48 * MIB, 20 * MIB, 21 * MIB] {
            reaches(&guest, target);
            goes_on(&guest, 1);
            let resident = resident_bytes(&guest);
            assert!(resident <= target, "{workload}: {resident} bytes for a target of {target}");
        }
        guest.set_balloon_target(MEMORY).unwrap();
        wait_until("all is taken back", || guest.balloon_bytes() == 0);
        goes_on(&guest, 2);
        if workload == "pattern=random" {
            assert!(resident_bytes(&guest) > 40 * MIB, "{workload}");
        }
    }
}

#[test]
fn a_guest_under_load_gives_back_what_is_above_its_target_and_takes_it_again() {
    gives_back_and_takes(false);
}

#[test]
fn in_huge_pages_whole_ones_are_given_back() {
    let Some(_host) = HugePages::reserve(2 * MEMORY) else { return };
    gives_back_and_takes(true);
    moves_half_empty(true, true);
    moves_half_empty(false, true);
    moves_half_empty(true, false);
}

#[test]
fn a_target_that_goes_up_and_down_fast_makes_no_page_wrong() {
    for workload in ["", "pattern=random random=0"] {
        let guest = running(workload, false);
        let begin = Instant::now();
        let mut step = 1_u64;
        while begin.elapsed() < Duration::from_millis(700) && guest.corrupt().is_none() {
            step = step.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            let target = 8 * MIB + (step >> 33) % (56 * MIB);
            guest.set_balloon_target(target).unwrap();
            std::thread::sleep(Duration::from_micros(step >> 53));
        }
        goes_on(&guest, 1);
        reaches(&guest, 8 * MIB);
        goes_on(&guest, 1);
    }
}

#[test]
fn a_target_that_is_set_while_parked_is_reached_when_the_guest_runs() {
    let mut guest = running("", false);
    goes_on(&guest, 1);
    guest.pause_by_operator().unwrap();
    guest.set_balloon_target(10 * MIB).unwrap();
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!(guest.balloon_bytes(), 0, "it stands still");
    guest.resume_by_operator().unwrap();
    reaches(&guest, 10 * MIB);
    guest.stop();
}

/// What a migration does, by hand: rounds while it runs, the rest while it stands still. The balloon is
/// blown up after all pages were sent, so that the destination has pages that the source gave back.
fn moves_half_empty(from_huge: bool, to_huge: bool) {
    for (workload, then) in [("", MEMORY), ("pattern=random", 12 * MIB), ("fill=all", 40 * MIB)] {
        let mut source = running(workload, from_huge);
        goes_on(&source, 1);
        let host = ProcessHost { huge_pages: to_huge, ..ProcessHost::default() };
        let mut destination = host.prepare(&source.spec()).unwrap();
        let mut trackers = source.dirty_sources().unwrap();
        trackers[0].start().unwrap();
        carry(&source, &destination, &source.memory().resident().unwrap());
        reaches(&source, 30 * MIB);
        let mut dirty = PageSet::new();
        trackers[0].collect(&mut dirty).unwrap();
        dirty.intersect_with(&source.memory().resident().unwrap());
        carry(&source, &destination, &dirty);
        let permit = source.pause().unwrap();
        let state = save(&mut source);
        trackers[0].collect(&mut dirty).unwrap();
        dirty.intersect_with(&source.memory().resident().unwrap());
        carry(&source, &destination, &dirty);
        assert!(resident_bytes(&destination) > 30 * MIB, "the test has something to show");
        destination.load(&state).unwrap();
        let given = destination.balloon_bytes();
        assert!(MEMORY - given <= 30 * MIB + if to_huge { 4 * MIB } else { 0 }, "{given}");
        assert!(resident_bytes(&destination) <= MEMORY - given);
        assert!(destination.balloon_target() <= 30 * MIB);
        assert!(from_huge != to_huge || destination.balloon_target() == source.balloon_target());
        destination.resume(permit).unwrap();
        drop(trackers);
        drop(source);
        goes_on(&destination, 1);
        destination.set_balloon_target(then).unwrap();
        goes_on(&destination, 2);
        wait_until("it has what it may have", || MEMORY - destination.balloon_bytes() <= then);
    }
}

#[test]
fn a_guest_moves_with_its_balloon_and_what_it_gave_back_is_not_resident_where_it_arrives() {
    moves_half_empty(false, false);
}

#[test]
fn a_guest_without_a_balloon_goes_to_hosts_that_know_none() {
    let mut guest = ProcessGuest::new(config("", false)).unwrap();
    assert!(save(&mut guest).require_known(&["machine", "worker"]).is_ok());
    guest.set_balloon_target(MEMORY / 2).unwrap();
    assert!(save(&mut guest).require_known(&["machine", "worker"]).is_err());
}

#[test]
fn a_target_that_cannot_be_and_a_balloon_of_another_machine_are_refused_in_words() {
    let mut guest = ProcessGuest::new(config("", false)).unwrap();
    for bytes in [0, 16 << 10, MEMORY + 1] {
        let why = guest.set_balloon_target(bytes).unwrap_err().to_string();
        assert!(why.contains(&bytes.to_string()) && why.contains(&MEMORY.to_string()), "{why}");
    }
    // A page for each worker, and the table.
    let least = 2 * PAGE + guest.arena().start * PAGE;
    let spare = MEMORY / PAGE - guest.arena().end();
    guest.set_balloon_target(least).unwrap();
    assert!(spare < 2 && guest.set_balloon_target(least - 1).is_err());
    let mut other = ProcessGuest::new(Config { memory_bytes: MIB, ..config("", false) }).unwrap();
    guest.run().unwrap();
    wait_until("it is small", || MEMORY - guest.balloon_bytes() == least);
    let _permit = guest.pause().unwrap();
    guest.set_balloon_target(MEMORY).unwrap();
    let why = other.load(&save(&mut guest)).unwrap_err().to_string();
    assert!(why.contains("balloon[0]"), "{why}");
}

#[test]
fn memory_that_the_workload_never_uses_is_given_first() {
    let guest = running("arena=16M", false);
    goes_on(&guest, 1);
    reaches(&guest, 32 * MIB);
    assert!(resident_bytes(&guest) > 16 * MIB, "the arena is whole");
    reaches(&guest, 4 * MIB);
    goes_on(&guest, 1);
    assert!(resident_bytes(&guest) <= 4 * MIB);
}
