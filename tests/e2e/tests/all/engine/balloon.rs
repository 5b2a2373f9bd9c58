//! Guests give memory back by their balloons, under load, up and down, and while they are moved: they
//! check every page all the time.

use std::time::Duration;

use ferry_migrate::{Arrival, Guest, Mode, OutcomeKind, SendOptions};
use ferry_process_guest::Tracker;
use ferry_refvmm::DirtyLog;

use super::{MIB, assert_completed, options};
use crate::stage::{
    Ballooned, Destination, Dice, Huge, HugePages, Kvm, Link, Maker, Process, Subject, eventually,
    goes_on, has_kvm, migrate,
};

const MEMORY: u64 = 64 * MIB;
/// All of memory, by two workers.
const WHOLE: &str = "pattern=random fill=all random=20";

fn process(tracker: Tracker) -> Process {
    Process { tracker, memory_bytes: MEMORY, workload: WHOLE.into() }
}

fn kvm(dirty_log: DirtyLog) -> Kvm {
    Kvm { dirty_log, memory_bytes: MEMORY, workload: WHOLE.into() }
}

fn resident_bytes(guest: &impl Guest) -> u64 {
    guest.memory().resident().unwrap().len() * 4096
}

/// As exactly as pages go: huge ones are only given back when a worker gave up all of one.
fn slack(guest: &impl Guest) -> u64 {
    guest.memory().regions().iter().map(|r| if r.unit > 1 { 8 * MIB } else { 0 }).max().unwrap()
}

fn reaches(guest: &impl Ballooned, target: u64) {
    guest.shall_have(target);
    arrives_at(guest, target);
}

fn arrives_at(guest: &impl Ballooned, target: u64) {
    eventually("the target is reached", || {
        let given = MEMORY - target..=MEMORY - target + slack(guest);
        given.contains(&guest.given()) && given.contains(&guest.says_given())
            || guest.wrong().is_some()
    });
    assert_eq!((guest.wrong(), guest.trouble()), (None, None));
}

fn gives_back_and_takes(guest: &impl Ballooned) {
    for target in [40 * MIB, 16 * MIB, 16 * MIB + 4096, 50 * MIB] {
        let before = guest.given();
        reaches(guest, target);
        goes_on(guest, 4000);
        let resident = resident_bytes(guest);
        assert!(resident <= target + slack(guest), "{resident} bytes, and {before} were given");
    }
    reaches(guest, MEMORY);
    goes_on(guest, 4000);
    eventually("memory is used again", || {
        resident_bytes(guest) > 50 * MIB || guest.wrong().is_some()
    });
    assert_eq!(guest.wrong(), None);
}

#[test]
fn a_guest_under_load_gives_memory_back_and_takes_it_again() {
    gives_back_and_takes(&process(Tracker::Software).busy_guest());
    if has_kvm() {
        gives_back_and_takes(&kvm(DirtyLog::Auto).busy_guest());
        if let Some(_host) = HugePages::reserve(2 * MEMORY) {
            gives_back_and_takes(&Huge(kvm(DirtyLog::Auto)).busy_guest());
        }
    }
}

#[test]
fn a_target_that_does_not_stay_makes_no_page_wrong() {
    if !has_kvm() {
        return;
    }
    for workload in [WHOLE, "", "pattern=idle fill=all", "pattern=moving-set set=8M arena=40M"] {
        let guest = Kvm { workload: workload.into(), ..kvm(DirtyLog::Auto) }.new_guest();
        eventually("the balloon has a driver", || {
            guest.balloon().driver || guest.wrong().is_some()
        });
        let mut dice = Dice(7);
        for _ in 0..15 {
            guest.shall_have(8 * MIB + dice.below(56 * MIB / 4096) * 4096);
            std::thread::sleep(Duration::from_millis(dice.below(120)));
        }
        reaches(&guest, 12 * MIB);
        assert!(resident_bytes(&guest) <= 12 * MIB, "{workload}");
        reaches(&guest, MEMORY);
        if !workload.contains("idle") {
            goes_on(&guest, 4000);
        }
    }
}

#[test]
fn the_guest_tells_how_much_memory_it_has_and_uses() {
    if !has_kvm() {
        return;
    }
    let guest =
        Kvm { workload: "pattern=working-set set=8M".into(), ..kvm(DirtyLog::Auto) }.busy_guest();
    let ask = || {
        let before = guest.balloon().statistics_count;
        guest.ask_balloon_statistics();
        eventually("it answers", || guest.balloon().statistics_count > before);
        let figures = guest.balloon().statistics.unwrap();
        (figures.total_bytes.unwrap(), figures.free_bytes.unwrap())
    };
    let uses = |bytes: u64| {
        eventually("its set is all that it uses", || {
            let (total, free) = ask();
            assert_eq!(total, bytes);
            total - free == 8 * MIB
        });
    };
    let (total, _) = ask();
    assert!((60 * MIB..MEMORY).contains(&total), "{total}");
    uses(total);
    reaches(&guest, 32 * MIB);
    uses(total - 32 * MIB);
}

/// Moves a guest with half its memory in the balloon, there and back, and goes on with it.
fn moves_half_empty<M: Maker>(maker: &M, mode: Mode)
where
    M::Subject: Ballooned,
{
    let mut guest = maker.busy_guest();
    reaches(&guest, MEMORY / 2);
    for target in [MEMORY / 4, MEMORY / 2 + 4 * MIB, MEMORY] {
        let there = MEMORY - guest.given();
        let destination = Destination::start(Link::Memory, maker.host());
        let how = SendOptions { mode, rejoin_for: Duration::from_secs(30), ..options(2) };
        assert_completed(&migrate(&mut guest, &destination.connector, &how));
        let (arrived, arrival) = destination.arrival().expect("a machine");
        assert_eq!(arrival, Arrival::Runs { digest_verified: Some(true) });
        arrives_at(&arrived, there);
        assert!(resident_bytes(&arrived) <= there + slack(&arrived));
        goes_on(&arrived, 4000);
        reaches(&arrived, target);
        goes_on(&arrived, 4000);
        guest = arrived;
    }
}

#[test]
fn a_machine_moves_with_its_balloon_in_every_mode_and_goes_on_with_it() {
    for mode in [Mode::PreCopy, Mode::PostCopy, Mode::Hybrid] {
        println!("{mode:?}");
        moves_half_empty(&process(Tracker::UffdWriteProtect), mode);
        if mode == Mode::PreCopy {
            moves_half_empty(&process(Tracker::Software), mode);
        }
        if has_kvm() {
            moves_half_empty(&kvm(DirtyLog::Auto), mode);
        }
    }
}

/// The target changes while the pages travel: what was sent is given back, and taken again, on the way.
fn moves_while_its_balloon_changes<M: Maker>(maker: &M, mode: Mode)
where
    M::Subject: Ballooned + Clone + Send,
{
    let mut guest = maker.busy_guest();
    for target in [MEMORY / 4, MEMORY, MEMORY / 2] {
        let destination = Destination::start(Link::Memory, maker.host());
        let slow = Some(80_000_000);
        let how = SendOptions { mode, bandwidth_bytes_per_s: slow, ..options(2) };
        let handle = guest.clone();
        let changes = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(150));
            handle.may_have(target);
        });
        let sent = migrate(&mut guest, &destination.connector, &how);
        changes.join().unwrap();
        let report = &sent.report;
        assert_eq!(report.outcome, OutcomeKind::Completed, "{}", report.reason);
        assert!(!report.memory_differs, "{}", report.reason);
        let (arrived, _) = destination.arrival().expect("a machine");
        if mode == Mode::PreCopy {
            assert!(report.digest_verified);
        }
        // What was given back after it was sent is given back there, too. A guest that had not reached its target goes on
        // to it there.
        let (here, there) = (resident_bytes(&guest), resident_bytes(&arrived));
        if mode == Mode::PreCopy && here <= target {
            assert!(there <= here + here / 16 + slack(&arrived), "{here} bytes became {there}");
        }
        reaches(&arrived, target);
        let there = resident_bytes(&arrived);
        assert!(there <= target + slack(&arrived), "{there} bytes with a target of {target}");
        goes_on(&arrived, 2_000);
        guest = arrived;
    }
}

/// Without a log of what is given back, the destination keeps what the source has no more.
#[test]
fn a_machine_that_moves_while_its_balloon_changes_arrives_as_it_is() {
    if !has_kvm() {
        return;
    }
    let little = "fill=all pattern=working-set set=1M rate=4000";
    for (mode, workload) in
        [(Mode::PreCopy, WHOLE), (Mode::PreCopy, little), (Mode::Hybrid, "fill=all rate=20000")]
    {
        println!("{mode:?} {workload}");
        let maker = Kvm { workload: workload.into(), ..kvm(DirtyLog::Auto) };
        moves_while_its_balloon_changes(&maker, mode);
    }
}
