//! Machines that run at their destination before their pages are there: each guest, each mode, and a
//! link that is cut again and again.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use ferry_migrate::{
    Arrival, Guest, Left, Mode, OutcomeKind, Progress, ReceiveEvent, SendEvent, SendHandle,
    SendOptions, Sent, Spool, Whereabouts, serve_spool,
};
use ferry_pages::Run;
use ferry_process_guest::{ProcessGuest, ProcessHost, Tracker};
use ferry_protocol::{ToDestination, ToSource};
use ferry_refvmm::DirtyLog;

use super::{ARENA_PAGES, BUSY, MIB, assert_completed, options};
use crate::stage::{
    Deal, Destination, Dice, Huge, HugePages, Kvm, Link, Maker, Process, Relay, SharedMemory,
    Subject, Watched, WatchedHost, Witness, Word, eventually, goes_on, has_kvm, migrate,
};

fn process() -> Process {
    let (tracker, memory_bytes) = (Tracker::UffdWriteProtect, 64 * MIB);
    Process { tracker, memory_bytes, workload: BUSY.into() }
}

fn kvm() -> Kvm {
    Kvm { dirty_log: DirtyLog::Auto, memory_bytes: 64 * MIB, workload: BUSY.into() }
}

fn by(mode: Mode) -> SendOptions {
    SendOptions { mode, rejoin_for: Duration::from_secs(30), ..options(2) }
}

/// Moves a busy guest `times` times in a row.
fn moves<M: Maker>(maker: &M, link: Link, mode: Mode, times: u32) {
    let witness = Witness::new();
    let mut source = Watched::running(maker.busy_guest(), &witness);
    let host = WatchedHost { host: maker.host(), witness: witness.clone() };
    let destination = Destination::start(link, host);
    let mut how = by(mode);
    if mode == Mode::Hybrid {
        // So that one round is not enough: a guest on a busy computer gets to run meanwhile.
        how.goals.max_downtime = Duration::from_micros(100);
        how.bandwidth_bytes_per_s = Some(80_000_000);
    }
    let mut waited = 0;
    for _ in 0..times {
        let sent = migrate(&mut source, &destination.connector, &how);
        assert_completed(&sent);
        let report = &sent.report;
        assert_eq!(report.mode, mode.name());
        let paging = report.paging.as_ref().expect("pages went after the hand-over");
        if mode == Mode::PostCopy {
            assert_eq!(report.rounds, 0, "no round before it");
            let unit = source.memory().regions()[0].unit;
            assert!((paging.pushed + paging.requested) * unit >= ARENA_PAGES, "{paging:?}");
            // Ten huge pages may all be there before anybody comes to them, or all pages of one move before the
            // guest has time on a processor.
            waited += if unit > 1 { 1 } else { paging.requested };
        }
        // It is told in steps of 10 ms. Who waits for a fifth of all time is slow some time.
        assert!(paging.full_speed_ms <= paging.took_ms + 10.0, "{paging:?}");
        let waited_ms: f64 = paging.waited_by_thread_ms.iter().sum();
        let slow = waited_ms > 0.2 * paging.took_ms * f64::from(source.spec().vcpus);
        assert!(!slow || paging.full_speed_ms > 0.0, "{paging:?}");
        let (arrived, arrival) = destination.arrival().expect("a machine");
        assert_eq!(arrival, Arrival::Runs { digest_verified: Some(true) });
        assert_eq!(witness.running(), 1);
        assert!(!source.runs() && arrived.runs());
        let resident = |guest: &Watched<M::Subject>| guest.memory().resident().unwrap().len();
        goes_on(&arrived, ARENA_PAGES);
        let (before, after) = (resident(&source), resident(&arrived));
        assert!(after <= before + before / 50 + 8, "{before} resident pages became {after}");
        source = arrived;
    }
    assert!(mode != Mode::PostCopy || waited > 0, "who comes to every page waits for some");
}

#[test]
fn a_busy_process_guest_moves_ten_times_by_post_copy_and_by_hybrid() {
    for mode in [Mode::PostCopy, Mode::Hybrid] {
        moves(&process(), Link::Quic, mode, 5);
        moves(&process(), Link::Tls, mode, 5);
        moves(&process(), Link::Memory, mode, 2);
    }
}

#[test]
fn a_busy_kvm_machine_moves_ten_times_by_post_copy_and_by_hybrid() {
    if !has_kvm() {
        return;
    }
    for mode in [Mode::PostCopy, Mode::Hybrid] {
        moves(&kvm(), Link::Quic, mode, 5);
        moves(&kvm(), Link::Tls, mode, 5);
    }
}

/// By pre-copy, too, and to a host that has other pages.
fn moves_in_huge_pages<M: Maker, S: Maker<Subject = M::Subject, Host = M::Host>>(
    huge: &M,
    small: &S,
) {
    for mode in [Mode::PostCopy, Mode::Hybrid] {
        moves(huge, Link::Memory, mode, 2);
    }
    let host_of = |to_huge: bool| if to_huge { huge.host() } else { small.host() };
    for (mode, from_huge, to_huge) in [
        (Mode::PreCopy, true, true),
        (Mode::PreCopy, false, true),
        (Mode::PostCopy, false, true),
        (Mode::PostCopy, true, false),
    ] {
        println!("{mode:?}, huge pages: {from_huge} to {to_huge}");
        let mut source = if from_huge { huge.busy_guest() } else { small.busy_guest() };
        let destination = Destination::start(Link::Memory, host_of(to_huge));
        let sent = migrate(&mut source, &destination.connector, &by(mode));
        assert_completed(&sent);
        let (arrived, arrival) = destination.arrival().expect("a machine");
        assert_eq!(arrival, Arrival::Runs { digest_verified: Some(true) });
        assert_eq!(arrived.memory().regions()[0].unit > 1, to_huge);
        drop(source);
        goes_on(&arrived, ARENA_PAGES);
    }
}

#[test]
fn machines_in_huge_pages_move_in_every_mode_and_to_hosts_with_other_pages() {
    let Some(_host) = HugePages::reserve(4 * 64 * MIB) else { return };
    moves_in_huge_pages(&Huge(process()), &process());
    if has_kvm() {
        moves_in_huge_pages(&Huge(kvm()), &kvm());
        let by_write_protection = Kvm { dirty_log: DirtyLog::WriteProtect, ..kvm() };
        moves_in_huge_pages(&Huge(by_write_protection.clone()), &by_write_protection);
    }
}

#[test]
fn a_host_without_free_huge_pages_refuses_a_machine_and_says_what_to_do() {
    let mut source = Process { memory_bytes: 1 << 40, ..process() }.new_guest();
    let destination = Destination::start(Link::Memory, Huge(process()).host());
    let sent = migrate(&mut source, &destination.connector, &by(Mode::PostCopy));
    assert_eq!(sent.report.machine, Whereabouts::RunsAtSource);
    for word in ["huge pages of 2 MiB", "are free", "sysctl vm.nr_hugepages="] {
        assert!(sent.report.reason.contains(word), "{}", sent.report.reason);
    }
}

#[test]
fn auto_ends_by_post_copy_where_rounds_do_not_pay_and_says_why() {
    let mut source = process().busy_guest();
    let destination = Destination::start(Link::Memory, process().host());
    let mut hard = by(Mode::Auto);
    hard.goals.max_downtime = Duration::from_millis(3);
    hard.bandwidth_bytes_per_s = Some(40_000_000);
    let sent = migrate(&mut source, &destination.connector, &hard);
    assert_completed(&sent);
    assert_eq!(sent.report.mode, "hybrid", "{}", sent.report.reason);
    for word in ["pages/s", "after the hand-over"] {
        assert!(sent.report.reason.contains(word), "{}", sent.report.reason);
    }
    goes_on(&destination.arrival().expect("a machine").0, ARENA_PAGES);
}

struct Stage {
    witness: Arc<Witness>,
    source: Watched<ProcessGuest>,
    destination: Destination<Watched<ProcessGuest>>,
}

fn stage(link: Link) -> Stage {
    let witness = Witness::new();
    let source = Watched::running(process().busy_guest(), &witness);
    let host = WatchedHost { host: ProcessHost::default(), witness: witness.clone() };
    Stage { witness, source, destination: Destination::start(link, host) }
}

/// Calls `fate` for each frame that passes once the source was `told` that the machine runs: a link that is cut before is
/// lost with that word.
fn after_the_hand_over(
    at: &Stage,
    told: &Arc<AtomicBool>,
    fate: impl Fn() -> Deal + Send + Sync + 'static,
) -> Relay {
    let told = told.clone();
    let tamper = move |word: Word<'_>, _: &Bytes| match word {
        Word::Frame(_) if told.load(Ordering::SeqCst) => fate(),
        _ => Deal::Pass,
    };
    Relay::new(&at.destination.connector, at.destination.handle(), false, tamper)
}

/// Post-copy of pages that come so slowly that some are missing when the source is told that the machine runs.
fn slowly() -> SendOptions {
    SendOptions { bandwidth_bytes_per_s: Some(40_000_000), ..by(Mode::PostCopy) }
}

/// Before the hand-over, and after it.
const CUTS: [u64; 2] = [6, 44];

#[test]
fn a_link_cut_fifty_times_in_rounds_and_after_the_hand_over_is_taken_up_again_each_time() {
    for (link, seed) in [(Link::Memory, 5), (Link::Quic, 6), (Link::Tls, 7)] {
        let mut at = stage(link);
        let dice = Mutex::new(Dice(seed));
        let (runs, cuts) =
            (AtomicBool::new(false), Arc::new([AtomicU64::new(0), AtomicU64::new(0)]));
        let counted = cuts.clone();
        let tamper = move |word: Word<'_>, _: &Bytes| match word {
            Word::ToSource(ToSource::Running { .. } | ToSource::Lacks { .. }) => {
                runs.store(true, Ordering::SeqCst);
                Deal::Pass
            }
            Word::Frame(_) => {
                let part = usize::from(runs.load(Ordering::SeqCst));
                let cut = dice.lock().unwrap().below(3) == 0
                    && counted[part].load(Ordering::SeqCst) < CUTS[part];
                if cut {
                    counted[part].fetch_add(1, Ordering::SeqCst);
                }
                if cut { Deal::Cut } else { Deal::Pass }
            }
            _ => Deal::Pass,
        };
        let relay = Relay::new(&at.destination.connector, at.destination.handle(), true, tamper);
        let mut how = by(Mode::Hybrid);
        how.goals.max_downtime = Duration::from_micros(100);
        let sent = migrate(&mut at.source, &relay.connector(), &how);
        assert_completed(&sent);
        let cuts = [&cuts[0], &cuts[1]].map(|n| n.load(Ordering::SeqCst));
        assert_eq!(cuts, CUTS);
        assert!(sent.report.links_lost > 10, "{}", sent.report.links_lost);
        // Not from the beginning each time.
        let memory = (ARENA_PAGES * 4096) as f64;
        let times = sent.report.bytes_sent as f64 / memory;
        assert!(times < 4.0, "{times:.1} times its memory was sent");
        let arrived = at.destination.arrival().expect("a machine").0;
        goes_on(&arrived, ARENA_PAGES);
        assert_eq!(at.witness.running(), 1);
    }
}

/// Moves by a link that does not come back after some pages, and gives up soon.
fn detached(at: &mut Stage) -> Sent {
    let frames = AtomicU64::new(0);
    let told = Arc::default();
    let relay = after_the_hand_over(at, &told, move || {
        if frames.fetch_add(1, Ordering::SeqCst) == 20 { Deal::Cut } else { Deal::Pass }
    });
    let soon = SendOptions { rejoin_for: Duration::from_secs(1), ..slowly() };
    let handle = SendHandle::default();
    let sent =
        ferry_migrate::send(&mut at.source, relay.connector(), &soon, &handle, &mut |event| {
            if let SendEvent::Progress(Progress::Running) = event {
                told.store(true, Ordering::SeqCst);
            }
        });
    assert_eq!(sent.report.outcome, OutcomeKind::Failed);
    assert_eq!(sent.report.machine, Whereabouts::LacksPages);
    for word in ["runs at the destination", "pages are only here", "--resume"] {
        assert!(sent.report.reason.contains(word), "{}", sent.report.reason);
    }
    assert!(!at.source.runs());
    sent
}

#[test]
fn a_destination_that_cannot_be_reached_waits_and_is_served_later() {
    let mut at = stage(Link::Memory);
    let sent = detached(&mut at);
    let Left::Detached(left) = sent.left else { panic!("{:?}", sent.left) };
    let mut arrived = None;
    let missing = loop {
        match at.destination.event(Duration::from_secs(10)).expect("an event") {
            ReceiveEvent::Arrived { guest, fetching, .. } => {
                assert!(fetching.is_some());
                arrived = Some(guest);
            }
            ReceiveEvent::Waiting { missing, .. } => break missing.expect("it runs"),
            _ => {}
        }
    };
    assert!(missing > 0 && missing <= ARENA_PAGES + 64);
    let arrived = arrived.expect("it runs already");
    assert!(arrived.runs());
    assert_eq!(at.witness.running(), 1);
    // Both workers come upon a page that is not there, and neither sees anything else instead.
    let mut before = arrived.written();
    eventually("the guest waits", || {
        std::thread::sleep(Duration::from_millis(50));
        std::mem::replace(&mut before, arrived.written()) == arrived.written()
    });
    assert_eq!(arrived.wrong(), None);

    let connector = at.destination.connector.clone();
    let again = by(Mode::PostCopy);
    let sent = ferry_migrate::reattach(
        &mut at.source,
        left,
        connector,
        &again,
        &SendHandle::default(),
        &mut |_| {},
    );
    assert_completed(&sent);
    goes_on(&arrived, ARENA_PAGES);
    assert_eq!(at.witness.running(), 1);
    assert_eq!(at.witness.times_started(), 2, "once at each side");
}

/// Moves `source` until the link is lost, which has to happen; then its operator cancels.
#[track_caller]
fn given_up_when_the_link_is_lost(
    source: &mut dyn Guest,
    relay: &Relay,
    told: &AtomicBool,
    options: &SendOptions,
) -> Sent {
    let handle = SendHandle::default();
    let (mut lost, connector) = (false, relay.connector());
    let sent = ferry_migrate::send(source, connector, options, &handle, &mut |event| match event {
        SendEvent::Progress(Progress::Running) => told.store(true, Ordering::SeqCst),
        SendEvent::Progress(Progress::LinkLost(_)) => {
            lost = true;
            handle.cancel();
        }
        _ => {}
    });
    assert!(lost);
    sent
}

#[test]
fn an_operator_ends_the_attempts_to_come_back() {
    let mut at = stage(Link::Memory);
    let told = Arc::default();
    let relay = after_the_hand_over(&at, &told, || Deal::Cut);
    let options = SendOptions { rejoin_for: Duration::from_secs(1000), ..slowly() };
    let sent = given_up_when_the_link_is_lost(&mut at.source, &relay, &told, &options);
    assert_eq!(sent.report.machine, Whereabouts::LacksPages, "{}", sent.report.reason);
    assert!(matches!(sent.left, Left::Detached(_)));
    assert_eq!(at.witness.running(), 1);
    // Thrown away, it does not wait for pages that never come.
    loop {
        let event = at.destination.event(Duration::from_secs(10)).expect("an event");
        if let ReceiveEvent::Arrived { guest, fetching, .. } = event {
            let fetching = fetching.expect("pages are missing");
            assert!(fetching.missing() > 0);
            fetching.abandon();
            break drop(guest);
        }
    }
}

#[test]
fn a_spool_is_of_the_commit_by_which_the_machine_runs_and_of_none_before() {
    let mut at = stage(Link::Memory);
    let (commits, told) = (AtomicU64::new(0), Arc::new(AtomicBool::new(false)));
    let runs = told.clone();
    let tamper = move |word: Word<'_>, _: &Bytes| match word {
        // The first one is lost: the guest goes on here, and writes.
        Word::ToDestination(ToDestination::Commit { .. }) => {
            if commits.fetch_add(1, Ordering::SeqCst) == 0 { Deal::Cut } else { Deal::Pass }
        }
        Word::Frame(_) if runs.load(Ordering::SeqCst) => Deal::Cut,
        _ => Deal::Pass,
    };
    let relay = Relay::new(&at.destination.connector, at.destination.handle(), true, tamper);
    let dir = tempfile::tempdir().expect("a directory");
    let options = SendOptions { spool: Some(dir.path().to_owned()), ..slowly() };
    let sent = given_up_when_the_link_is_lost(&mut at.source, &relay, &told, &options);
    assert_eq!(sent.report.machine, Whereabouts::LacksPages, "{}", sent.report.reason);
    assert!(sent.report.links_lost >= 2, "{}", sent.report.links_lost);
    // Its process is gone; only the spool is left.
    let spool = Spool::open(dir.path()).expect("a spool");
    let connector = at.destination.connector.clone();
    let options = by(Mode::PostCopy);
    let report = serve_spool(spool, connector, &options, &SendHandle::default(), &mut |_| {});
    assert!(report.digest_verified, "{}", report.reason);
    let arrived = at.destination.arrival().expect("a machine").0;
    goes_on(&arrived, ARENA_PAGES);
    assert_eq!(at.witness.running(), 1);
}

#[test]
fn a_destination_that_refuses_a_post_copy_commit_leaves_the_machine_at_its_source() {
    let mut at = stage(Link::Memory);
    let relay =
        Relay::new(&at.destination.connector, at.destination.handle(), true, |word, bytes| {
            match word {
                Word::ToDestination(ToDestination::Commit { .. }) => {
                    // Half of it: no message of this protocol.
                    let mut half = bytes.to_vec();
                    let end = half.len() - 1;
                    half[end] ^= 0xff;
                    Deal::Instead(vec![half.into()])
                }
                _ => Deal::Pass,
            }
        });
    let sent = migrate(&mut at.source, &relay.connector(), &by(Mode::PostCopy));
    assert_eq!(sent.report.machine, Whereabouts::RunsAtSource, "{}", sent.report.reason);
    assert!(matches!(sent.left, Left::Running), "{:?}", sent.left);
    goes_on(&at.source, 100);
    at.destination.void();
    assert_eq!(at.witness.running(), 1);
    let sent = migrate(&mut at.source, &at.destination.connector, &by(Mode::PostCopy));
    assert_completed(&sent);
    goes_on(&at.destination.arrival().expect("a machine").0, ARENA_PAGES);
}

#[test]
fn pages_that_are_only_read_go_first_after_the_hand_over_of_shared_memory() {
    let read = Run::new(500, 200);
    let mut source = SharedMemory::new(process().busy_guest(), read);
    let host = WatchedHost { host: process().host(), witness: Witness::new() };
    let destination = Destination::start(Link::Memory, host);
    let sent = migrate(&mut source, &destination.connector, &by(Mode::PostCopy));
    assert_completed(&sent);
    let first = sent.report.record_pages;
    assert!((read.pages..read.pages + 64).contains(&first), "{first}");
}
