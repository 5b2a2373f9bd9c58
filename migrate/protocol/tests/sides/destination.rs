//! The destination, event by event: what it takes, what it refuses, and who has the machine after each.

use std::time::Duration;

use ferry_protocol::{
    Arrival, Built, Destination, DestinationAction as Action, DestinationEvent as Event, Fetched,
    PackedPages, Refusal, RunPermit, ToDestination, ToSource, Verdict,
};

use crate::{ms, pages, spec};

const CODECS: u8 = 0b0110;

fn packed(first: u64, number: u64) -> PackedPages {
    PackedPages::pack(&pages(first, number))
}

fn offer(codecs: u8, lanes: u16, keep: Duration) -> Event {
    Event::Message(ToDestination::Offer { spec: spec(), codecs, lanes, keep, machine: None })
}

fn commit(rounds: &[(u32, u64)], owed: PackedPages) -> Event {
    let permit = RunPermit::for_new_machine(1);
    Event::Message(ToDestination::Commit { permit, state: vec![1], rounds: rounds.to_vec(), owed })
}

fn round_end(round: u32, batches: u64) -> Event {
    Event::Message(ToDestination::RoundEnd { round, batches })
}

fn done(round: u32) -> Action {
    Action::Send(ToSource::RoundDone { round, lacking: PackedPages::default() })
}

fn ended(verified: Option<bool>) -> Action {
    Action::Finish(Arrival::Runs { digest_verified: verified })
}

struct Host(Destination);

impl Host {
    fn feed(&mut self, at_ms: u64, event: Event) -> Vec<Action> {
        self.0.handle(ms(at_ms), event);
        std::iter::from_fn(|| self.0.poll()).collect()
    }

    fn all(mut self, events: impl IntoIterator<Item = Event>) -> Self {
        for event in events {
            self.feed(0, event);
        }
        self
    }

    /// It waits for pages, and is kept for 5 s when the link is lost.
    fn receiving() -> Self {
        let built = Event::Built(Ok(Built::default()));
        Self(Destination::new(7, CODECS)).all([offer(2, 1, ms(5000)), built])
    }

    /// It owes pages 0 to 9, and makes them come on demand.
    fn arming() -> Self {
        Self::receiving().all([commit(&[], packed(0, 10))])
    }

    /// With a machine that owes pages or none.
    fn loading(owes: bool) -> Self {
        if owes {
            Self::arming().all([Event::Paging(Ok(()))])
        } else {
            Self::receiving().all([commit(&[], PackedPages::default())])
        }
    }

    fn resuming(owes: bool) -> Self {
        Self::loading(owes).all([Event::Loaded(Ok(()))])
    }

    fn fetching() -> Self {
        Self::resuming(true).all([Event::Resumed(Ok(()))])
    }
}

fn lost() -> Event {
    Event::LinkLost("cut".into())
}

fn rejoined() -> Event {
    Event::Rejoined { held: pages(3, 2), owed: pages(0, 4) }
}

fn lanes() -> Action {
    Action::AcceptLanes { codecs: 2, lanes: 1 }
}

/// Whether `actions` are the words of a refusal before or (with `committed`) after the commit, and the end.
fn given_back(actions: &[Action], committed: bool) -> bool {
    match actions {
        [Action::Send(ToSource::Failed { .. }), Action::Finish(Arrival::Void(_))] => !committed,
        [Action::Send(ToSource::CommitRefused { .. }), Action::Finish(Arrival::Void(_))] => {
            committed
        }
        _ => false,
    }
}

#[test]
fn an_offer_is_taken_with_the_codecs_that_both_have_and_a_bounded_number_of_lanes() {
    for (codecs, lanes, taken) in [
        (0b0010, 1, Some(0b0010)),
        (0b1111, 64, Some(0b0110)),
        (0b1001, 1, None),
        (0b0010, 0, None),
        (0b0010, 65, None),
    ] {
        let mut host = Host(Destination::new(7, CODECS));
        let said = host.feed(0, offer(codecs, lanes, ms(0)));
        if let Some(codecs) = taken {
            assert!(matches!(said[..], [Action::Build { .. }]), "{said:?}");
            let said = host.feed(0, Event::Built(Ok(Built::default())));
            assert_eq!(said[0], Action::AcceptLanes { codecs, lanes });
            let accepted =
                ToSource::Accepted { version: 2, session: 7, codecs, no_post_copy: None };
            assert_eq!(said[1..], [Action::Send(accepted)]);
        } else {
            let [Action::Send(ToSource::Refused { reasons }), Action::Finish(Arrival::Void(why))] =
                &said[..]
            else {
                panic!("{codecs:#x}, {lanes} lanes: {said:?}")
            };
            assert!(why.contains(&reasons[0].why) && why.contains("1 to 64 lanes"), "{why}");
        }
    }
    let mut host = Host(Destination::new(7, CODECS)).all([offer(2, 1, ms(0))]);
    let reasons = vec![Refusal::new("memory", "too little")];
    let said = host.feed(0, Event::Built(Err(reasons.clone())));
    assert_eq!(said[0], Action::Send(ToSource::Refused { reasons }));
    assert_eq!(host.0.verdict(), Verdict::NeverRan);
}

#[test]
fn it_is_ready_when_it_is_asked_and_built() {
    let prepare = || Event::Message(ToDestination::Prepare);
    let ready = Action::Send(ToSource::Ready);
    assert_eq!(Host::receiving().feed(0, prepare()), std::slice::from_ref(&ready));
    let mut early = Host(Destination::new(7, CODECS)).all([offer(2, 1, ms(0)), prepare()]);
    assert_eq!(early.feed(0, Event::Built(Ok(Built::default()))).last(), Some(&ready));
}

#[test]
fn a_message_before_its_time_ends_the_session_and_is_named() {
    let verified = || Event::Message(ToDestination::Verified { matches: true });
    for (mut host, event, words) in [
        (Host(Destination::new(7, 2)), verified(), "Verified before it runs"),
        (Host(Destination::new(7, 2)), round_end(1, 1), "RoundEnd before"),
        (Host(Destination::new(7, 2)), Event::Message(ToDestination::Prepare), "Prepare before"),
        (Host(Destination::new(7, 2)), commit(&[], packed(0, 1)), "Commit before"),
        (Host::receiving(), offer(2, 1, ms(0)), "a second Offer"),
    ] {
        let said = host.feed(0, event);
        assert!(given_back(&said, false) && format!("{said:?}").contains(words), "{said:?}");
        assert_eq!(host.0.verdict(), Verdict::NeverRan);
    }
}

#[test]
fn a_round_is_done_when_all_its_batches_are_here_whichever_word_comes_last() {
    let one = || Event::Installed { round: 1 };
    let mut host = Host::receiving().all([one(), one()]);
    assert_eq!(host.feed(0, round_end(1, 2)), [done(1)]);
    assert_eq!(host.feed(0, round_end(2, 1)), []);
    assert_eq!(host.feed(0, Event::Installed { round: 3 }), [], "of the round after it");
    assert_eq!(host.feed(0, Event::Installed { round: 2 }), [done(2)]);
    assert_eq!(host.feed(0, round_end(3, 1)), [done(3)], "it was counted");
    assert_eq!(host.feed(0, round_end(4, 0)), [done(4)], "an empty round");
    assert_eq!(host.feed(0, Event::Installed { round: 1 << 20 }), []);
}

#[test]
fn rounds_out_of_order_and_batches_that_were_not_announced_end_the_session() {
    let first = || [Event::Installed { round: 1 }, round_end(1, 1)];
    let batch = |round| Event::Installed { round };
    for (said, events) in [
        ("ended twice", vec![round_end(1, 1)]),
        ("ended while another ends", vec![round_end(2, 1), round_end(3, 1)]),
        ("a batch of a round that is over", vec![batch(1)]),
        ("a batch of a round that cannot be", vec![batch((1 << 20) + 1)]),
        ("a batch too many", vec![batch(2), batch(2), round_end(2, 1)]),
        ("committed twice", vec![commit(&[(1, 1)], PackedPages::default())]),
        ("committed backwards", vec![commit(&[(3, 0), (2, 0)], PackedPages::default())]),
        ("committed the same twice", vec![commit(&[(2, 0), (2, 0)], PackedPages::default())]),
        (
            "committed while one ends",
            vec![round_end(2, 1), commit(&[(3, 1)], PackedPages::default())],
        ),
    ] {
        let mut host = Host::receiving().all(first());
        let last = events.into_iter().map(|event| host.feed(0, event)).last().unwrap();
        assert!(given_back(&last, false), "{said}: {last:?}");
        assert_eq!(host.0.verdict(), Verdict::NeverRan, "{said}");
    }
}

#[test]
fn a_commit_runs_the_machine_when_all_batches_of_all_its_rounds_are_here() {
    let batch = |round| Event::Installed { round };
    let empty = PackedPages::default;
    let mut host = Host::receiving().all([batch(1), round_end(1, 1), batch(3)]);
    assert_eq!(host.feed(10, commit(&[(2, 2), (3, 1)], empty())), []);
    assert_eq!(host.feed(20, batch(2)), []);
    assert_eq!(host.feed(30, batch(2)), [Action::Load(vec![1])]);
    assert_eq!(host.feed(40, batch(2)), [], "it is too late for more");
    assert_eq!(host.0.verdict(), Verdict::Unknown);
    let said = host.feed(70, Event::Loaded(Ok(())));
    assert_eq!(said, [Action::Resume(RunPermit::for_new_machine(1))]);
    let running = ToSource::Running { pages_us: 20_000, load_us: 40_000, resume_us: 80_000 };
    assert_eq!(host.feed(150, Event::Resumed(Ok(()))), [Action::Send(running), Action::Digest]);
    assert_eq!(host.0.verdict(), Verdict::Ran);
    let digest = ToSource::Digest { sum: Some(5), fetched: None };
    assert_eq!(host.feed(160, Event::Digest(Some(5))), [Action::Send(digest)]);
    let verified = ToDestination::Verified { matches: true };
    assert_eq!(host.feed(170, Event::Message(verified)), [ended(Some(true))]);
    assert_eq!(host.0.verdict(), Verdict::Ran);
    // More batches than were announced, before and after the commit.
    let two = || [batch(1), batch(1)];
    let mut host = Host::receiving().all(two());
    assert!(given_back(&host.feed(0, commit(&[(1, 1)], empty())), true));
    let mut host = Host::receiving().all([commit(&[(1, 1), (2, 1)], empty()), batch(1)]);
    assert!(given_back(&host.feed(0, batch(1)), true));
}

#[test]
fn what_fails_before_the_machine_runs_gives_it_back() {
    let no = || Err("no".to_owned());
    for (mut host, event) in [
        (Host::arming(), Event::Paging(no())),
        (Host::loading(false), Event::Loaded(no())),
        (Host::loading(true), Event::Loaded(no())),
        (Host::resuming(false), Event::Resumed(no())),
        (Host::receiving().all([commit(&[(1, 1)], packed(0, 1))]), Event::BadPages("x".into())),
        (Host::receiving(), commit(&[], packed(60, 5))),
    ] {
        let said = host.feed(0, event);
        assert!(given_back(&said, true), "{said:?}");
        assert_eq!(host.0.verdict(), Verdict::NeverRan);
    }
}

#[test]
fn pages_are_kept_for_as_long_as_was_asked_for_and_no_longer_than_an_hour() {
    for (keep, kept) in [(ms(5000), ms(5000)), (ms(1 << 40), ms(3_600_000))] {
        let mut host = Host(Destination::new(7, CODECS))
            .all([offer(2, 1, keep), Event::Built(Ok(Built::default()))]);
        assert_eq!(host.feed(100, lost()), [Action::Hold]);
        let until = ms(100) + kept;
        assert_eq!(host.0.deadline(), Some(until));
        let at = u64::try_from(until.as_millis()).unwrap();
        assert_eq!(host.feed(at - 1, Event::Tick), []);
        assert_eq!(host.0.verdict(), Verdict::Unknown);
        let said = host.feed(at, Event::Tick);
        let [Action::Finish(Arrival::Void(why))] = &said[..] else { panic!("{said:?}") };
        assert!(why.contains(&format!("for {} s", kept.as_secs())), "{why}");
        assert_eq!(host.0.verdict(), Verdict::NeverRan);
    }
    let mut host = Host::receiving().all([lost()]);
    let said = host.feed(1, Event::Superseded);
    assert!(matches!(said[..], [Action::Finish(Arrival::Void(_))]), "{said:?}");
}

#[test]
fn what_is_counted_of_a_round_goes_when_it_is_done_and_whether_it_is_alone_can_be_asked() {
    let mut host = Host::receiving();
    assert_eq!((host.0.open_rounds(), host.0.is_alone()), (0, false));
    for round in [1, 2, 2] {
        host.feed(0, Event::Installed { round });
    }
    assert_eq!(host.0.open_rounds(), 2);
    assert_eq!(host.feed(1, round_end(1, 1)), [done(1)]);
    assert_eq!(host.0.open_rounds(), 1);
    assert_eq!(host.feed(1, round_end(2, 2)), [done(2)]);
    assert_eq!(host.0.open_rounds(), 0);
    host.feed(2, lost());
    assert!(host.0.is_alone());
    host.feed(3, rejoined());
    assert!(!host.0.is_alone());
}

#[test]
fn a_source_that_comes_back_goes_on_and_nothing_of_the_old_link_counts() {
    let batch = || Event::Installed { round: 1 };
    let go_on = || Action::Send(ToSource::GoOn { held: packed(3, 2) });
    // What was announced, committed or lacking before is void.
    for before in [
        vec![batch()],
        vec![round_end(1, 2), batch()],
        vec![Event::Lacking(pages(0, 1)), batch()],
        vec![batch(), commit(&[(1, 2)], PackedPages::default())],
    ] {
        let mut host = Host::receiving().all(before).all([lost()]);
        assert_eq!(host.feed(1, rejoined()), [lanes(), go_on()]);
        assert_eq!(host.0.deadline(), Some(ms(300_001)), "as long as any source");
        assert_eq!(host.feed(2, round_end(1, 1)), []);
        assert_eq!(host.feed(2, batch()), [done(1)]);
    }
    // It may come back before the loss is noticed.
    assert_eq!(Host::receiving().feed(1, rejoined()), [lanes(), go_on()]);
    let mut early = Host(Destination::new(7, CODECS)).all([offer(2, 1, ms(0))]);
    assert!(given_back(&early.feed(0, rejoined()), false));
    for mut early in
        [Host(Destination::new(7, 2)), Host(Destination::new(7, 2)).all([offer(2, 1, ms(0))])]
    {
        assert_eq!(early.feed(0, lost()), [Action::Finish(Arrival::Void("cut".into()))]);
    }
}

#[test]
fn what_comes_late_of_the_rounds_before_a_commit_is_not_owed() {
    let committed = |rounds: &[(u32, u64)]| {
        let mut host = Host::receiving().all([round_end(3, 0)]);
        let owed = pages(0, 10);
        host.feed(1, commit(rounds, packed(0, 10))) == [Action::Page { owed, after: 5 }]
    };
    assert!(committed(&[(5, 0)]) && committed(&[(4, 0), (5, 0)]));
    let mut host = Host::receiving().all([round_end(3, 0)]);
    let none = host.feed(1, commit(&[], packed(0, 10)));
    assert_eq!(none, [Action::Page { owed: pages(0, 10), after: 3 }]);
}

#[test]
fn a_machine_that_owes_pages_fetches_them_and_is_compared_when_all_are_here() {
    let mut host = Host::receiving();
    let said = host.feed(0, commit(&[(1, 0)], packed(0, 10)));
    assert_eq!(said, [Action::Page { owed: pages(0, 10), after: 1 }]);
    assert_eq!(host.feed(5, Event::Paging(Ok(()))), [Action::Load(vec![1])]);
    assert!(matches!(host.feed(9, Event::Loaded(Ok(())))[..], [Action::Resume(_)]));
    let running = ToSource::Running { pages_us: 5000, load_us: 4000, resume_us: 2000 };
    assert_eq!(host.feed(11, Event::Resumed(Ok(()))), [Action::Send(running)]);
    assert_eq!(host.0.verdict(), Verdict::Ran);
    assert_eq!(host.feed(12, Event::Digest(Some(1))), [], "not all are here");
    assert_eq!(host.feed(12, Event::AllHere(Fetched::default())), [Action::Digest]);
    let digest = ToSource::Digest { sum: None, fetched: Some(Fetched::default()) };
    assert_eq!(host.feed(13, Event::Digest(None)), [Action::Send(digest)]);
    // All may come before it runs.
    let mut host = Host::resuming(true).all([Event::AllHere(Fetched::default())]);
    let said = host.feed(0, Event::Resumed(Ok(())));
    assert!(matches!(said[..], [Action::Send(ToSource::Running { .. }), Action::Digest]));
}

#[test]
fn a_lost_link_leaves_a_machine_that_runs_where_it_is_and_its_source_may_come_back() {
    let mut host = Host::fetching();
    assert_eq!(host.feed(1, lost()), []);
    assert_eq!(host.0.verdict(), Verdict::Ran);
    let lacks = Action::Send(ToSource::Lacks { owed: packed(0, 4) });
    assert_eq!(host.feed(2, rejoined()), [lanes(), lacks]);
    assert_eq!(host.feed(3, Event::AllHere(Fetched::default())), [Action::Digest]);
    assert_eq!(host.feed(4, rejoined()), [Action::Digest], "its word may have been lost");
    assert_eq!(host.feed(5, lost()), [ended(None)]);
    // Nobody is there who could compare.
    let mut host = Host::fetching().all([lost()]);
    assert_eq!(host.feed(2, Event::AllHere(Fetched::default())), [ended(None)]);
    assert_eq!(host.0.verdict(), Verdict::Ran);
    let mut host = Host::resuming(false).all([lost()]);
    let said = host.feed(2, Event::Resumed(Ok(())));
    assert_eq!(said.last(), Some(&ended(None)), "{said:?}");
}

#[test]
fn a_source_that_comes_back_while_the_machine_is_started_hears_of_it_once_it_runs() {
    for (mut host, running, then) in [
        (Host::loading(false), true, vec![Action::Digest]),
        (Host::resuming(false), true, vec![Action::Digest]),
        // What it owes it can only serve when it asks once more.
        (Host::resuming(true), false, vec![]),
    ] {
        assert_eq!(host.feed(1, lost()), []);
        assert_eq!(host.feed(2, rejoined()), []);
        host.feed(3, Event::Loaded(Ok(())));
        let mut said = host.feed(4, Event::Resumed(Ok(())));
        let told = matches!(said.first(), Some(Action::Send(ToSource::Running { .. })));
        assert_eq!(told, running, "{said:?}");
        assert_eq!(said.split_off(usize::from(running)), then);
    }
    for mut host in [Host::arming(), Host::loading(true)] {
        assert!(given_back(&host.feed(1, rejoined()), true), "state may need pages");
    }
}

#[test]
fn pages_that_cannot_come_any_more_are_told_of_while_the_machine_runs() {
    let broken = || Event::PagingBroken("gone".into());
    let failed = || Action::Send(ToSource::Failed { reason: "gone".into() });
    let mut host = Host::fetching();
    assert_eq!(host.feed(1, broken()), [failed()]);
    assert_eq!(host.feed(2, rejoined()), [failed()], "whoever comes back is told as well");
    let mut host = Host::resuming(true);
    assert_eq!(host.feed(1, broken()), []);
    let said = host.feed(2, Event::Resumed(Ok(())));
    assert!(matches!(said[..], [Action::Send(ToSource::Running { .. }), Action::Send(_)]));
    assert_eq!(said[1], failed());
    // A machine that owes nothing does not mind.
    for mut host in [Host::loading(false), Host::receiving()] {
        assert_eq!(host.feed(1, broken()), []);
    }
    let mut host = Host::fetching();
    let said = host.feed(1, Event::Abandoned);
    assert!(matches!(said[..], [Action::Send(ToSource::Failed { .. }), Action::Finish(_)]));
    assert_eq!(host.0.verdict(), Verdict::Unknown, "its pages are not delivered");
    assert_eq!(Host::loading(true).feed(1, Event::Abandoned), []);
}

#[test]
fn bad_pages_harm_no_machine_that_has_all_it_needs() {
    let bad = || Event::BadPages("x".into());
    assert!(given_back(&Host::receiving().feed(1, bad()), false));
    for (mut host, verdict) in [
        (Host::loading(false), Verdict::Unknown),
        (Host::resuming(false), Verdict::Unknown),
        (Host::resuming(true), Verdict::Unknown),
        (Host::fetching(), Verdict::Ran),
        (Host::fetching().all([Event::AllHere(Fetched::default())]), Verdict::Ran),
    ] {
        assert_eq!(host.feed(1, bad()), []);
        assert_eq!(host.0.verdict(), verdict);
    }
}

#[test]
fn a_source_that_ends_the_migration_is_obeyed_until_it_has_committed() {
    let abort = || Event::Message(ToDestination::Abort { reason: "enough".into() });
    for mut host in [
        Host(Destination::new(7, 2)),
        Host(Destination::new(7, 2)).all([offer(2, 1, ms(0))]),
        Host::receiving(),
        Host::receiving().all([lost()]),
    ] {
        let said = host.feed(1, abort());
        assert!(
            matches!(&said[..], [Action::Finish(Arrival::Void(why))] if why.contains("enough"))
        );
        assert_eq!(host.feed(2, abort()), [], "once");
    }
    for mut host in [Host::arming(), Host::loading(false), Host::resuming(true), Host::fetching()] {
        assert_eq!(host.feed(1, abort()), []);
    }
}
