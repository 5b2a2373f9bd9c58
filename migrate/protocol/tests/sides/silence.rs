//! A source that stays connected and says nothing: what it brought is not held for ever, and a machine that runs is
//! never thrown away.

use std::time::Duration;

use ferry_pages::Run;
use ferry_protocol::limits::{HELLO_TIMEOUT, MAX_KEEP, SILENCE};

use crate::spec;
use ferry_protocol::{
    Arrival, Built, Destination, DestinationAction, DestinationEvent as Event, Fetched,
    PackedPages, RunPermit, ToDestination as Say, ToSource, Verdict,
};

const S: Duration = Duration::from_secs(1);

fn accepted() -> Destination {
    accepted_for(Duration::ZERO)
}

/// `keep`: what the source asks for.
fn accepted_for(keep: Duration) -> Destination {
    let mut machine = Destination::new(7, 1);
    let offer = Say::Offer { spec: spec(), codecs: 1, lanes: 1, keep, machine: None };
    machine.handle(S, Event::Message(offer));
    assert_eq!(machine.deadline(), None, "it is this host's turn");
    machine.handle(100 * S, Event::Built(Ok(Built::default())));
    machine
}

fn commit(rounds: Vec<(u32, u64)>, owed: &[Run]) -> Event {
    let owed = PackedPages::pack(&owed.iter().copied().collect());
    let permit = RunPermit::for_new_machine(1);
    Event::Message(Say::Commit { permit, state: vec![], rounds, owed })
}

/// What comes of it at its deadline, which is `after` this.
fn silent_from(
    machine: &mut Destination,
    now: Duration,
    after: Duration,
) -> Vec<DestinationAction> {
    while machine.poll().is_some() {}
    assert_eq!(machine.deadline(), Some(now + after));
    machine.handle(now + after - Duration::from_millis(1), Event::Tick);
    assert_eq!(machine.poll(), None, "too soon");
    machine.handle(now + after, Event::Tick);
    std::iter::from_fn(|| machine.poll()).collect()
}

/// The source is told, and the machine never runs here.
fn is_let_go(machine: &Destination, actions: &[DestinationAction], silent: Duration) {
    let [DestinationAction::Send(said), DestinationAction::Finish(Arrival::Void(why))] = actions
    else {
        panic!("{actions:?}");
    };
    let (ToSource::Failed { reason } | ToSource::CommitRefused { reason }) = said else {
        panic!("{said:?}");
    };
    assert_eq!(reason, why);
    assert!(why.contains(&format!("silent for {} s", silent.as_secs())), "{why}");
    assert_eq!(machine.verdict(), Verdict::NeverRan);
}

#[test]
fn a_source_that_offers_nothing_is_let_go() {
    let mut machine = Destination::new(7, 1);
    let actions = silent_from(&mut machine, Duration::ZERO, HELLO_TIMEOUT);
    is_let_go(&machine, &actions, HELLO_TIMEOUT);
}

#[test]
fn a_source_that_brings_no_more_pages_is_let_go_and_each_batch_counts() {
    let mut machine = accepted();
    for n in 1..10 {
        machine.handle(100 * S + n * (SILENCE - S), Event::Installed { round: 1 });
    }
    let actions = silent_from(&mut machine, 100 * S + 9 * (SILENCE - S), SILENCE);
    is_let_go(&machine, &actions, SILENCE);
}

#[test]
fn a_source_that_is_away_is_not_awaited_for_longer_than_an_hour_whatever_it_asked_for() {
    let mut machine = accepted_for(1000 * MAX_KEEP);
    machine.handle(200 * S, Event::LinkLost("cut".into()));
    let actions = silent_from(&mut machine, 200 * S, MAX_KEEP);
    let [DestinationAction::Finish(Arrival::Void(why))] = &actions[..] else {
        panic!("{actions:?}");
    };
    assert!(why.contains("did not come back"), "{why}");
}

#[test]
fn a_commit_whose_pages_do_not_come_never_runs() {
    let mut machine = accepted();
    machine.handle(200 * S, commit(vec![(1, 5)], &[]));
    let actions = silent_from(&mut machine, 200 * S, SILENCE);
    is_let_go(&machine, &actions, SILENCE);
    machine.handle(9000 * S, Event::Installed { round: 1 });
    assert_eq!(machine.poll(), None);
}

#[test]
fn a_machine_that_runs_and_lacks_pages_waits_for_its_source_for_ever() {
    let mut machine = accepted();
    machine.handle(200 * S, commit(vec![], &[Run::new(3, 2)]));
    machine.handle(201 * S, Event::Paging(Ok(())));
    machine.handle(202 * S, Event::Loaded(Ok(())));
    machine.handle(203 * S, Event::Resumed(Ok(())));
    while machine.poll().is_some() {}
    assert_eq!(machine.deadline(), None);
    machine.handle(1_000_000 * S, Event::Tick);
    assert_eq!(machine.poll(), None);
    machine.handle(1_000_001 * S, Event::AllHere(Fetched::default()));
    assert_eq!(machine.poll(), Some(DestinationAction::Digest));
    // A source that never says whether memory was the same ends as if its link were lost.
    machine.handle(1_000_002 * S, Event::Digest(Some(1)));
    let actions = silent_from(&mut machine, 1_000_002 * S, SILENCE);
    let runs = Arrival::Runs { digest_verified: None };
    assert_eq!(actions, [DestinationAction::Finish(runs)]);
    assert_eq!(machine.verdict(), Verdict::Ran);
}
