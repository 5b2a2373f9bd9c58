//! The link is cut, loses or stalls, before and after the commit: one side runs the machine, never two.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use ferry_migrate::{
    Arrival, Left, OutcomeKind, Progress, ReceiveEvent, ReceiveOptions, SendEvent, SendHandle,
    SendOptions, Sent, Whereabouts,
};
use ferry_process_guest::{ProcessGuest, ProcessHost, Tracker};
use ferry_protocol::{ToDestination, ToSource};

use super::{ARENA_PAGES, BUSY, MIB, assert_completed, assert_goes_on_at_source, options};
use crate::stage::{
    Deal, Destination, Dice, Link, Maker, Process, Relay, Subject, Watched, WatchedHost, Witness,
    Word, eventually, goes_on, migrate, pass,
};

struct Stage {
    witness: Arc<Witness>,
    source: Watched<ProcessGuest>,
    destination: Destination<Watched<ProcessGuest>>,
}

fn stage(link: Link) -> Stage {
    stage_with(link, ReceiveOptions::default())
}

fn stage_with(link: Link, options: ReceiveOptions) -> Stage {
    let maker = Process {
        tracker: Tracker::UffdWriteProtect,
        memory_bytes: 64 * MIB,
        workload: BUSY.into(),
    };
    let witness = Witness::new();
    let source = Watched::running(maker.busy_guest(), &witness);
    let host = WatchedHost { host: ProcessHost::default(), witness: witness.clone() };
    Stage { witness, source, destination: Destination::start_with(link, host, options) }
}

impl Stage {
    fn relay(
        &self,
        mends: bool,
        tamper: impl Fn(Word<'_>, &Bytes) -> Deal + Send + Sync + 'static,
    ) -> Relay {
        Relay::new(&self.destination.connector, self.destination.handle(), mends, tamper)
    }

    fn migrate_by(&mut self, relay: &Relay) -> Sent {
        migrate(&mut self.source, &relay.connector(), &options(2))
    }

    /// The machine is at its source, and moves once nobody tampers.
    fn then_moves(mut self) {
        assert_eq!(self.witness.running(), 1);
        let clean = self.relay(false, pass);
        let sent = self.migrate_by(&clean);
        assert_completed(&sent);
        let (arrived, _) = self.destination.arrival().expect("a machine");
        goes_on(&arrived, ARENA_PAGES);
        assert_eq!(self.witness.running(), 1);
    }
}

/// Bytes of a whole migration, about: the link is cut anywhere in them.
const ALL_BYTES: u64 = 40 << 20;

fn cut_anywhere(link: Link, seed: u64, times: u32) {
    let mut at = stage(link);
    let mut dice = Dice(seed);
    let (mut kept, mut came_back) = (0, 0);
    for n in 0..times {
        // The first ones fall into the negotiation.
        let bytes = if n < 4 { dice.below(1200) } else { dice.below(ALL_BYTES) };
        let relay = at.relay(true, pass).cut_after(bytes);
        let sent = at.migrate_by(&relay);
        match sent.report.machine {
            Whereabouts::RunsAtSource => {
                assert_eq!(sent.report.outcome, OutcomeKind::Failed, "cut after {bytes} bytes");
                assert!(!sent.report.reason.is_empty());
                assert_goes_on_at_source(&sent, &at.source);
                kept += 1;
            }
            Whereabouts::RunsAtDestination => {
                assert!(!sent.report.memory_differs, "{}", sent.report.reason);
                at.source = at.destination.arrival().expect("a machine").0;
                goes_on(&at.source, ARENA_PAGES);
                came_back += u32::from(sent.report.links_lost > 0);
            }
            Whereabouts::PausedAtSource => panic!("the destination could be asked: {sent:?}"),
            Whereabouts::Unknown | Whereabouts::LacksPages => {
                panic!("nothing was moved after the hand-over: {sent:?}")
            }
        }
        assert_eq!(at.witness.running(), 1, "cut after {bytes} bytes");
    }
    println!("cut {times} times: {kept} times it stayed, {came_back} times the source came back");
    // Before a session is agreed on there is none to come back to.
    assert!(came_back > 0);
    at.then_moves();
}

#[test]
fn a_link_cut_after_any_byte_leaves_one_machine_that_runs() {
    cut_anywhere(Link::Memory, 11, 30);
}

#[test]
fn a_quic_link_cut_after_any_byte_leaves_one_machine_that_runs() {
    cut_anywhere(Link::Quic, 12, 8);
}

#[test]
fn a_tls_link_cut_after_any_byte_leaves_one_machine_that_runs() {
    cut_anywhere(Link::Tls, 13, 8);
}

#[test]
fn a_destination_that_ran_says_so_when_its_word_was_lost() {
    let mut at = stage(Link::Memory);
    let relay = at.relay(true, |word, _| match word {
        Word::ToSource(ToSource::Running { .. }) => Deal::Cut,
        _ => Deal::Pass,
    });
    let sent = at.migrate_by(&relay);
    assert_eq!(sent.report.outcome, OutcomeKind::Completed, "{}", sent.report.reason);
    assert!(!sent.report.digest_verified && !sent.report.memory_differs);
    assert!(sent.report.reason.contains("asked"), "{}", sent.report.reason);
    assert!(matches!(sent.left, Left::Nothing));
    let (arrived, arrival) = at.destination.arrival().expect("a machine");
    assert_eq!(arrival, Arrival::Runs { digest_verified: None });
    goes_on(&arrived, ARENA_PAGES);
    assert!(!at.source.runs());
    assert_eq!(at.witness.running(), 1);
}

/// A tamper that does to the first word that it is for what it does to all.
fn once(
    deal: impl Fn(&Word<'_>) -> Option<Deal> + Send + Sync + 'static,
) -> impl Fn(Word<'_>, &Bytes) -> Deal + Send + Sync + 'static {
    let done = AtomicBool::new(false);
    move |word, _| match deal(&word) {
        Some(deal) if !done.swap(true, Ordering::SeqCst) => deal,
        _ => Deal::Pass,
    }
}

#[test]
fn a_machine_whose_commit_was_lost_goes_on_at_its_source_and_is_handed_over_again() {
    let mut at = stage(Link::Memory);
    let relay = at.relay(
        true,
        once(|word| match word {
            Word::ToDestination(ToDestination::Commit { .. }) => Some(Deal::Cut),
            _ => None,
        }),
    );
    arrives_after_all(&mut at, &relay, &options(2));
}

#[test]
fn a_machine_whose_last_pages_were_lost_goes_on_at_its_source_and_is_handed_over_again() {
    let mut at = stage(Link::Memory);
    // The frames of the last rounds vanish; the commit arrives, and then the line is cut.
    let committed = AtomicBool::new(false);
    let witness = at.witness.clone();
    let relay = at.relay(true, move |word, _| match word {
        Word::Frame(_) if witness.running() == 0 && !committed.load(Ordering::SeqCst) => Deal::Lose,
        Word::ToDestination(ToDestination::Commit { .. })
            if !committed.swap(true, Ordering::SeqCst) =>
        {
            Deal::PassAndCut
        }
        _ => Deal::Pass,
    });
    // One round, and then the switchover: a round without its frames would never be acknowledged.
    let mut at_once = options(2);
    at_once.goals.max_downtime = Duration::from_secs(100);
    arrives_after_all(&mut at, &relay, &at_once);
}

fn arrives_after_all(at: &mut Stage, relay: &Relay, how: &SendOptions) {
    let sent = migrate(&mut at.source, &relay.connector(), how);
    assert_completed(&sent);
    assert_eq!(sent.report.links_lost, 1);
    let (arrived, _) = at.destination.arrival().expect("a machine");
    goes_on(&arrived, ARENA_PAGES);
    assert_eq!(at.witness.running(), 1);
    assert_eq!(at.witness.times_started(), 3, "at the source, there again, at the destination");
}

/// Cuts the line for good in the first round, and says what the source was told.
fn cut_for_good(at: &mut Stage, rejoin_for: Duration) -> Sent {
    let relay = at.relay(false, |word, _| match word {
        Word::Frame(_) => Deal::Cut,
        _ => Deal::Pass,
    });
    let how = SendOptions { rejoin_for, ..options(2) };
    migrate(&mut at.source, &relay.connector(), &how)
}

#[test]
fn a_destination_that_cannot_be_reached_before_the_commit_is_given_up_and_gives_up_in_time() {
    let mut at = stage(Link::Memory);
    let sent = cut_for_good(&mut at, Duration::from_millis(300));
    assert_eq!(sent.report.outcome, OutcomeKind::Failed);
    assert!(sent.report.reason.contains("could not be reached"), "{}", sent.report.reason);
    assert_goes_on_at_source(&sent, &at.source);
    assert!(at.destination.void().contains("did not come back"));
    at.then_moves();
}

#[test]
fn a_move_that_begins_anew_takes_the_place_of_one_that_waits_for_its_source() {
    let mut at =
        stage_with(Link::Memory, ReceiveOptions { once: true, ..ReceiveOptions::default() });
    let handle = SendHandle::default();
    let operator = handle.clone();
    let relay = at.relay(false, |word, _| match word {
        Word::Frame(_) => Deal::Cut,
        _ => Deal::Pass,
    });
    let sent = ferry_migrate::send(
        &mut at.source,
        relay.connector(),
        &options(2),
        &handle,
        &mut |event| {
            if let SendEvent::Progress(Progress::LinkLost(_)) = event {
                operator.cancel();
            }
        },
    );
    assert_eq!(sent.report.outcome, OutcomeKind::Cancelled, "{}", sent.report.reason);
    assert_goes_on_at_source(&sent, &at.source);
    loop {
        let event = at.destination.event(Duration::from_secs(10)).expect("an event");
        if let ReceiveEvent::Waiting { missing: None, .. } = event {
            break;
        }
    }
    let clean = at.relay(false, pass);
    let sent = at.migrate_by(&clean);
    assert_completed(&sent);
    assert!(at.destination.void().contains("began anew"));
    let (arrived, _) = at.destination.arrival().expect("a machine");
    goes_on(&arrived, ARENA_PAGES);
    assert_eq!(at.witness.running(), 1);
}

#[test]
fn a_machine_stays_paused_when_nobody_can_say_whether_it_runs_elsewhere() {
    let mut at = stage(Link::Memory);
    let relay = at.relay(false, |word, _| match word {
        Word::ToSource(ToSource::Running { .. }) => Deal::Cut,
        _ => Deal::Pass,
    });
    // While it is in doubt, and after: the machine runs at the destination, and only there.
    let sent = at.migrate_by(&relay);
    let (arrived, arrival) = at.destination.arrival().expect("a machine");
    assert_eq!(arrival, Arrival::Runs { digest_verified: None });
    goes_on(&arrived, ARENA_PAGES);
    assert_eq!(sent.report.outcome, OutcomeKind::Failed);
    assert_eq!(sent.report.machine, Whereabouts::PausedAtSource);
    assert!(sent.report.reason.contains("stays paused"), "{}", sent.report.reason);
    assert!(matches!(sent.left, Left::InDoubt(_)), "{:?}", sent.left);
    let stood = at.source.written();
    std::thread::sleep(Duration::from_millis(50));
    assert!(!at.source.runs());
    assert_eq!(at.source.written(), stood, "a paused machine writes nothing");
    assert_eq!(at.witness.running(), 1);
    assert_eq!(at.witness.times_started(), 2, "once at each side");
}

#[test]
fn a_guest_is_not_frozen_by_a_peer_that_takes_no_last_pages() {
    let mut at = stage(Link::Memory);
    let witness = at.witness.clone();
    let relay = at.relay(false, move |word, _| match word {
        Word::Frame(_) if witness.running() == 0 => Deal::Stall,
        _ => Deal::Pass,
    });
    let mut at_once = options(1);
    at_once.goals.max_downtime = Duration::from_secs(4);
    let began = Instant::now();
    let sent = migrate(&mut at.source, &relay.connector(), &at_once);
    assert_eq!(sent.report.outcome, OutcomeKind::Failed, "{}", sent.report.reason);
    assert!(sent.report.reason.contains("last pages"), "{}", sent.report.reason);
    assert!(began.elapsed() < Duration::from_secs(20), "{:?}", began.elapsed());
    assert_goes_on_at_source(&sent, &at.source);
    at.destination.void();
    at.then_moves();
}

/// A peer whose computer lives and who reads nothing must not hold the operator.
fn cancelled_while_stalled(link: Link, stalls: fn(&Word<'_>) -> bool) {
    let mut at = stage(link);
    let stalled = Arc::new(AtomicBool::new(false));
    let relay = at.relay(false, {
        let stalled = stalled.clone();
        move |word, _| {
            if stalls(&word) {
                stalled.store(true, Ordering::SeqCst);
                Deal::Stall
            } else {
                Deal::Pass
            }
        }
    });
    let handle = SendHandle::default();
    let cancelled_at = std::thread::spawn({
        let handle = handle.clone();
        move || {
            eventually("it stalls", || stalled.load(Ordering::SeqCst));
            std::thread::sleep(Duration::from_millis(300));
            handle.cancel();
            Instant::now()
        }
    });
    let connector = relay.connector();
    let sent = ferry_migrate::send(&mut at.source, connector, &options(2), &handle, &mut |_| {});
    let took = cancelled_at.join().unwrap().elapsed();
    assert_eq!(sent.report.outcome, OutcomeKind::Cancelled, "{}", sent.report.reason);
    assert!(took < Duration::from_secs(8), "the operator waited {took:?}");
    assert_goes_on_at_source(&sent, &at.source);
    assert_eq!(at.witness.running(), 1);
}

#[test]
fn a_migration_to_a_peer_that_takes_no_more_pages_can_be_cancelled() {
    cancelled_while_stalled(Link::Memory, |word| matches!(word, Word::Frame(_)));
}

#[test]
fn a_migration_to_a_peer_that_does_not_answer_can_be_cancelled() {
    cancelled_while_stalled(Link::Memory, |word| {
        matches!(word, Word::ToDestination(ToDestination::RoundEnd { .. }))
    });
}
