//! Machines that are swapped out in part: they move as they are, and nothing is brought back for it.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use ferry_memory::{GuestView, resident};
use ferry_migrate::{
    Arrival, Goals, Guest, Host, MachineSpec, Mode, OutcomeKind, PageCounts, Refusal, SendOptions,
};
use ferry_process_guest::Tracker;
use ferry_refvmm::DirtyLog;
use ferry_swap::{Options, Swap};

use crate::stage::{
    Ballooned, Destination, Kind, Kvm, Link, Maker, Process, Subject, eventually, goes_on, has_kvm,
    migrate,
};

const MIB: u64 = 1 << 20;
/// 32 MiB, of which one is in use.
const MOSTLY_COLD: &str =
    "pattern=working-set set=1M arena=32M fill=all fill_random=60 random=60 rate=20000";
const SET_PAGES: u64 = MIB / 4096;

fn pool() -> Options {
    Options { pool_bytes: 64 * MIB, dir: None, file_bytes: 0 }
}

/// A host that can keep pages elsewhere than in memory; the last machine's swap.
struct Swapping<H>(H, Arc<Mutex<Option<Swap>>>);

impl<H: Host> Host for Swapping<H> {
    type Guest = H::Guest;

    fn prepare(&self, spec: &MachineSpec) -> Result<H::Guest, Vec<Refusal>> {
        let guest = self.0.prepare(spec)?;
        *self.1.lock().unwrap() = Some(Swap::new(&guest.memory(), &pool()).unwrap());
        Ok(guest)
    }
}

fn in_memory(view: &GuestView) -> u64 {
    resident(view.regions()).unwrap().len()
}

/// Keeps a guest and its pool within `limit`, until more than `least` bytes are swapped out and it is at rest.
fn swapped_out(guest: &impl Guest, limit: u64, least: u64) -> Swap {
    let swap = Swap::new(&guest.memory(), &pool()).unwrap();
    swap.set_limit(Some(limit)).unwrap();
    eventually("it is swapped out", || {
        let before = swap.figures();
        std::thread::sleep(Duration::from_millis(500));
        let after = swap.figures();
        println!("{after:?}");
        after.swapped_bytes > least && after.pages_in - before.pages_in < 16
    });
    swap
}

fn every_kind(each: impl Fn(Kind), of_kvm: impl Fn(Kvm)) {
    let with_kvm = has_kvm();
    for kind in Kind::ALL {
        println!("{kind:?}");
        match kind {
            Kind::Kvm(dirty_log) if with_kvm => {
                of_kvm(Kvm { dirty_log, memory_bytes: 64 * MIB, workload: MOSTLY_COLD.into() });
            }
            Kind::Kvm(_) => {}
            kind => each(kind),
        }
    }
}

fn process(tracker: Tracker) -> Process {
    Process { tracker, memory_bytes: 64 * MIB, workload: MOSTLY_COLD.into() }
}

fn of_process(kind: Kind, then: impl Fn(&Process)) {
    if let Kind::Process(tracker) = kind {
        then(&process(tracker));
    }
}

/// Moves a machine, for which nothing is brought back, and of which no more is in memory where it arrives.
fn moved_as_it_is<M: Maker>(
    maker: &M,
    source: &mut M::Subject,
    swap: &Swap,
) -> (PageCounts, M::Subject) {
    let destination = Destination::start(Link::Memory, Swapping(maker.host(), Arc::default()));
    let (before, here) = (swap.figures(), in_memory(&source.memory()));
    let goals = Goals {
        max_downtime: Duration::from_secs(2),
        max_total: Duration::from_secs(60),
        ..Goals::default()
    };
    let options = SendOptions { goals, mode: Mode::PreCopy, ..SendOptions::default() };
    let sent = migrate(source, &destination.connector, &options);
    let report = &sent.report;
    assert_eq!(report.outcome, OutcomeKind::Completed, "{}", report.reason);
    assert!(report.digest_verified && !report.memory_differs);
    // But for the guest's own touches, of a set that is in use and so in memory for the most part.
    let after = swap.figures();
    let swapped = before.swapped_bytes / 4096;
    // At rest, fewer than 16 are in each half second: see `swapped_out`.
    let touched = 32.0 * (1.0 + report.total_ms / 500.0);
    let brought_back = after.pages_in - before.pages_in;
    assert!((brought_back as f64) < touched, "in {} ms: {before:?} {after:?}", report.total_ms);
    assert!(report.pages.packed > swapped - swapped / 8, "{:?}", report.pages);
    let (arrived, arrival) = destination.arrival().expect("a machine");
    assert_eq!(arrival, Arrival::Runs { digest_verified: Some(true) });
    let there = in_memory(&arrived.memory());
    assert!(there <= here + here / 8, "{here} pages in memory became {there}");
    goes_on(&arrived, SET_PAGES);
    (report.pages, arrived)
}

fn moves_as_it_is<M: Maker>(maker: &M) {
    let mut source = maker.busy_guest();
    let swap = swapped_out(&source, 24 * MIB, 14 * MIB);
    let (_, arrived) = moved_as_it_is(maker, &mut source, &swap);
    // And every page is right: those that are away, too.
    let pages = arrived.memory().resident().unwrap();
    let mut page = vec![0; 4096];
    for gfn in pages.runs().flat_map(|run| run.start..run.end()) {
        arrived.memory().read(gfn, &mut page).unwrap();
    }
    assert_eq!(arrived.wrong(), None);
}

#[test]
fn a_machine_that_is_half_swapped_moves_as_it_is() {
    every_kind(|kind| of_process(kind, moves_as_it_is), |kvm| moves_as_it_is(&kvm));
}

/// Moves a guest by post-copy, whose pages are elsewhere than in memory at one side or both.
fn comes_whole<M: Maker>(maker: &M, mode: Mode) {
    let mut source = maker.busy_guest();
    let swap = swapped_out(&source, 24 * MIB, 14 * MIB);
    let there = Arc::new(Mutex::new(None));
    let host = Swapping(maker.host(), there.clone());
    let destination = Destination::start(Link::Memory, host);
    let mut options = SendOptions { mode, ..SendOptions::default() };
    options.goals.max_total = Duration::from_secs(60);
    if mode == Mode::Hybrid {
        // So that rounds are not enough: what they brought is kept at the destination when it begins to run.
        options.goals.max_downtime = Duration::from_micros(100);
        options.bandwidth_bytes_per_s = Some(40_000_000);
    }
    let sent = migrate(&mut source, &destination.connector, &options);
    let report = &sent.report;
    assert_eq!(report.outcome, OutcomeKind::Completed, "{}", report.reason);
    assert_eq!(report.mode, mode.name());
    assert!(report.paging.is_some() && !report.memory_differs, "{}", report.reason);
    assert!(report.pages.packed * 4096 > swap.figures().swapped_bytes / 2, "{:?}", report.pages);
    let (arrived, _) = destination.arrival().expect("a machine");
    goes_on(&arrived, SET_PAGES);
    eventually("all pages are here", || in_memory(&arrived.memory()) >= 32 * MIB / 4096);
    // It can be swapped out there, too, and be brought back: all is right.
    let swap: Swap = there.lock().unwrap().take().unwrap();
    swap.set_limit(Some(24 * MIB)).unwrap();
    eventually("it is swapped out", || swap.figures().swapped_bytes > 8 * MIB);
    goes_on(&arrived, SET_PAGES);
}

#[test]
fn a_machine_that_is_half_swapped_comes_whole_by_post_copy() {
    for mode in [Mode::PostCopy, Mode::Hybrid] {
        println!("{mode:?}");
        comes_whole(&process(Tracker::UffdWriteProtect), mode);
        if has_kvm() {
            let workload = MOSTLY_COLD.into();
            comes_whole(&Kvm { dirty_log: DirtyLog::Auto, memory_bytes: 64 * MIB, workload }, mode);
        }
    }
}

/// A quarter of the machine is in its balloon, half of it is swapped out.
fn a_quarter_is_in_memory<M: Maker>(maker: &M)
where
    M::Subject: Ballooned,
{
    let mut source = maker.busy_guest();
    source.shall_have(48 * MIB);
    eventually("the balloon is inflated", || source.given() >= 16 * MIB);
    // A quarter in memory, and what the pool takes for half.
    let swap = swapped_out(&source, 34 * MIB, 24 * MIB);
    let (pages, arrived) = moved_as_it_is(maker, &mut source, &swap);
    let sent_pages = pages.raw + pages.lz4 + pages.zstd + pages.packed;
    assert!(sent_pages < 50 * MIB / 4096, "what is in the balloon is not sent: {pages:?}");
    assert_eq!(arrived.given(), source.given());
    // It takes its memory again there.
    arrived.shall_have(64 * MIB);
    eventually("the balloon is empty", || arrived.given() == 0);
    goes_on(&arrived, SET_PAGES);
}

#[test]
fn a_machine_that_is_half_swapped_and_a_quarter_ballooned_moves_as_it_is() {
    let workload = "pattern=working-set set=1M fill=all fill_random=60 random=60 rate=20000";
    a_quarter_is_in_memory(&Process {
        workload: workload.into(),
        ..process(Tracker::UffdWriteProtect)
    });
    if has_kvm() {
        a_quarter_is_in_memory(&Kvm {
            dirty_log: DirtyLog::Auto,
            memory_bytes: 64 * MIB,
            workload: workload.into(),
        });
    }
}
