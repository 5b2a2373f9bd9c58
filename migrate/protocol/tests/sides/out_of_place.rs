//! Once the permit has left, no message of the destination makes the source forget what it owes, or run; and
//! a machine that owes pages and has not run is given back when something breaks.

use std::time::Duration;

use ferry_pages::PageSet;
use ferry_protocol::{
    Arrival, Built, Destination, DestinationAction, DestinationEvent, Fetched, Goals, Mode,
    Outcome, PackedPages, Progress, Recalled, Refusal, RunPermit, Source, SourceAction,
    SourceEvent, ToDestination, ToSource, Verdict,
};

use crate::{pages, spec};

const RUNNING: ToSource = ToSource::Running { pages_us: 0, load_us: 0, resume_us: 0 };

fn feed(source: &mut Source, at_ms: u64, event: SourceEvent) -> Vec<SourceAction> {
    source.handle(Duration::from_millis(at_ms), event);
    std::iter::from_fn(|| source.poll()).collect()
}

/// A source whose commit is on its way.
fn committed(mode: Mode) -> Source {
    let how = (Goals::default(), mode);
    let mut source = Source::new(spec(), None, 1, 1, how, Duration::from_secs(60));
    let accepted = ToSource::Accepted { version: 2, session: 7, codecs: 1, no_post_copy: None };
    let mut events = vec![
        SourceEvent::Connected,
        SourceEvent::Message(accepted),
        SourceEvent::LanesOpen,
        SourceEvent::Message(ToSource::Ready),
        SourceEvent::TrackingStarted(pages(0, 10)),
    ];
    if mode == Mode::PreCopy {
        events.push(SourceEvent::RoundSent { round: 1, batches: 1, bytes: 100, same: 0 });
        let done = ToSource::RoundDone { round: 1, lacking: PackedPages::default() };
        events.push(SourceEvent::Message(done));
    }
    events.extend([
        SourceEvent::Harvested(PageSet::new()),
        SourceEvent::Paused(RunPermit::for_new_machine(1)),
        SourceEvent::Harvested(PageSet::new()),
        SourceEvent::StateSaved(vec![1]),
        SourceEvent::Harvested(PageSet::new()),
    ]);
    for event in events {
        feed(&mut source, 1, event);
    }
    assert!(source.is_committed(), "{mode:?}");
    source
}

#[test]
fn a_commit_that_owes_pages_ends_the_rounds_of_which_batches_may_come_late() {
    let goals = Goals { max_downtime: Duration::from_millis(1), ..Goals::default() };
    let how = (goals, Mode::Hybrid);
    let mut source = Source::new(spec(), None, 1, 1, how, Duration::from_secs(60));
    let accepted = ToSource::Accepted { version: 2, session: 7, codecs: 1, no_post_copy: None };
    let go_on = ToSource::GoOn { held: PackedPages::default() };
    let lacking = PackedPages::default;
    let done = |round| SourceEvent::Message(ToSource::RoundDone { round, lacking: lacking() });
    let mut said = Vec::new();
    for (at_ms, event) in [
        (0, SourceEvent::Connected),
        (0, SourceEvent::Message(accepted)),
        (0, SourceEvent::Message(ToSource::Ready)),
        (0, SourceEvent::LanesOpen),
        (0, SourceEvent::TrackingStarted(pages(0, 10))),
        // Round 1 is on its way.
        (1, SourceEvent::LinkLost("cut".into())),
        (10_000, SourceEvent::Tick),
        (10_001, SourceEvent::Message(go_on)),
        (10_002, SourceEvent::LanesOpen),
        (10_003, SourceEvent::RoundSent { round: 2, batches: 1, bytes: 100, same: 0 }),
        (10_004, done(2)),
        (10_005, SourceEvent::Harvested(pages(3, 2))),
        (10_006, done(3)),
        (10_007, SourceEvent::Harvested(PageSet::new())),
        (10_502, SourceEvent::Paused(RunPermit::for_new_machine(1))),
        (10_503, SourceEvent::Harvested(PageSet::new())),
        (10_504, SourceEvent::StateSaved(vec![1])),
        (10_505, SourceEvent::Harvested(PageSet::new())),
    ] {
        said.extend(feed(&mut source, at_ms, event));
    }
    let sent = |a: &SourceAction| matches!(a, SourceAction::SendPages { round: 1, .. });
    assert!(said.iter().any(sent), "{said:?}");
    let [.., SourceAction::Send(ToDestination::Commit { rounds, .. }), serve, _] = &said[..] else {
        panic!("{said:?}")
    };
    assert_eq!(rounds[..], [(4, 0)]);
    let SourceAction::Serve { round: 5, owed, record } = serve else { panic!("{serve:?}") };
    assert_eq!(owed, &pages(3, 2));
    assert_eq!(record[..], [PageSet::new(), PageSet::new(), pages(3, 2)], "the latest first");
}

/// A source that serves pages 0 to 9 to a machine that runs at the destination.
fn serving() -> Source {
    let mut source = committed(Mode::PostCopy);
    let last = feed(&mut source, 1, SourceEvent::Message(RUNNING));
    assert_eq!(last.last(), Some(&SourceAction::Push));
    assert!(source.is_post_copy() && source.fetched().is_none());
    source
}

fn out_of_place() -> Vec<ToSource> {
    vec![
        ToSource::Accepted { version: 2, session: 8, codecs: 1, no_post_copy: None },
        ToSource::Refused { reasons: vec![Refusal::new("memory", "none")] },
        ToSource::Ready,
        ToSource::RoundDone { round: 1, lacking: PackedPages::default() },
        ToSource::Recalls(old(pages(0, 10), 10)),
        ToSource::Failed { reason: "no userfaultfd".into() },
        RUNNING,
        ToSource::CommitRefused { reason: "changed its mind".into() },
        // More than is owed.
        ToSource::Lacks { owed: PackedPages::pack(&pages(0, 11)) },
        ToSource::GoOn { held: PackedPages::default() },
        ToSource::Verdict(Verdict::NeverRan),
        ToSource::Verdict(Verdict::Unknown),
    ]
}

fn old(pages: PageSet, digests: usize) -> Recalled {
    Recalled { pages: PackedPages::pack(&pages), digests: vec![5; digests] }
}

/// In `source` nothing is forgotten: it goes on, or has ended with all that it takes to go on.
fn still_owes(mut source: Source, actions: &[SourceAction], said: &str) {
    let runs =
        |a: &SourceAction| matches!(a, SourceAction::Resume(_) | SourceAction::ReturnDirty(_));
    assert!(!actions.iter().any(runs), "{said}: {actions:?}");
    let ended = actions.iter().find(|a| matches!(a, SourceAction::Finish(_)));
    assert_eq!(ended.is_some(), said.starts_with("Failed"), "{said}: {actions:?}");
    if let Some(end) = ended {
        let SourceAction::Finish(Outcome::Detached { reason, .. }) = end else {
            panic!("{said}: {end:?}")
        };
        assert!(reason.contains("10 of its pages"), "{said}: {reason}");
        return;
    }
    feed(&mut source, 10, SourceEvent::LinkLost("cut".into()));
    let again = feed(&mut source, 10_000, SourceEvent::Tick);
    assert_eq!(again, [SourceAction::Rejoin { session: 7, done: 2 }], "{said}");
    let owed = PackedPages::pack(&pages(0, 10));
    feed(&mut source, 10_002, SourceEvent::Message(ToSource::Lacks { owed }));
    let served = feed(&mut source, 10_003, SourceEvent::LanesOpen);
    let all = |a: &SourceAction| matches!(a, SourceAction::Serve { owed, .. } if owed.len() == 10);
    assert!(served.iter().any(all), "{said}: {served:?}");
}

#[test]
fn a_message_out_of_place_while_pages_are_owed_takes_nothing_back() {
    for message in out_of_place() {
        let said = format!("{message:?} while serving");
        let mut source = serving();
        let actions = feed(&mut source, 2, SourceEvent::Message(message));
        still_owes(source, &actions, &said);
    }
}

#[test]
fn what_the_destination_says_of_its_fetching_is_kept() {
    let mut source = serving();
    let fetched = Some(Fetched::default());
    let digest = ToSource::Digest { sum: Some(1), fetched: fetched.clone() };
    feed(&mut source, 2, SourceEvent::Message(digest));
    assert_eq!(source.fetched(), fetched.as_ref());
}

#[test]
fn who_breaks_the_protocol_after_the_commit_is_asked_anew_and_a_late_ready_is_no_breach() {
    let unasked = || SourceEvent::Message(ToSource::GoOn { held: PackedPages::default() });
    for mut source in [committed(Mode::PreCopy), committed(Mode::PostCopy), serving()] {
        let before = source.deadline();
        assert_eq!(feed(&mut source, 2, SourceEvent::Message(ToSource::Ready)), []);
        assert_eq!(source.deadline(), before);
        feed(&mut source, 3, unasked());
        // Not only when it has been silent for long.
        let asks = feed(&mut source, 2000, SourceEvent::Tick);
        assert!(matches!(asks[..], [SourceAction::Rejoin { .. }]), "{asks:?}");
    }
}

#[test]
fn words_that_do_not_fit_a_source_that_comes_back_are_not_taken() {
    let lacks = || {
        let owed = PackedPages::pack(&pages(0, 10));
        SourceEvent::Message(ToSource::Lacks { owed })
    };
    // Twice, while lanes are opened.
    let mut source = serving();
    feed(&mut source, 2, SourceEvent::LinkLost("cut".into()));
    feed(&mut source, 2000, SourceEvent::Tick);
    let opens = feed(&mut source, 2001, lacks());
    assert!(opens.iter().any(|a| matches!(a, SourceAction::OpenLanes { .. })), "{opens:?}");
    feed(&mut source, 2002, lacks());
    assert_eq!(feed(&mut source, 2003, SourceEvent::LanesOpen), [], "it asks once more");
    // Of a machine that went with all its pages.
    let mut source = committed(Mode::PreCopy);
    feed(&mut source, 2, SourceEvent::LinkLost("cut".into()));
    feed(&mut source, 2000, SourceEvent::Tick);
    assert_eq!(feed(&mut source, 2001, lacks()), []);
}

#[test]
fn a_failure_here_while_pages_are_owed_takes_nothing_back() {
    let mut source = serving();
    let actions = feed(&mut source, 2, SourceEvent::Failed("a lane".into()));
    still_owes(source, &actions, "a lane failed");
}

#[test]
fn nor_does_one_while_the_source_comes_back() {
    for reopening in [false, true] {
        for message in out_of_place() {
            let said = format!("{message:?} while coming back, lanes asked for: {reopening}");
            let mut source = serving();
            feed(&mut source, 2, SourceEvent::LinkLost("cut".into()));
            feed(&mut source, 2, SourceEvent::Tick);
            if reopening {
                let owed = PackedPages::pack(&pages(0, 10));
                feed(&mut source, 4, SourceEvent::Message(ToSource::Lacks { owed }));
            }
            let actions = feed(&mut source, 5, SourceEvent::Message(message));
            still_owes(source, &actions, &said);
        }
    }
}

#[test]
fn a_round_that_is_acknowledged_behind_the_word_of_a_lost_link_ends_nothing() {
    let mode = (Goals::default(), Mode::PreCopy);
    let mut source = Source::new(spec(), None, 1, 1, mode, Duration::from_secs(60));
    let accepted = ToSource::Accepted { version: 2, session: 7, codecs: 1, no_post_copy: None };
    let (round, lacking) = (1, PackedPages::default());
    for event in [
        SourceEvent::Connected,
        SourceEvent::Message(accepted),
        SourceEvent::LanesOpen,
        SourceEvent::TrackingStarted(pages(0, 10)),
        SourceEvent::RoundSent { round, batches: 1, bytes: 40_960, same: 0 },
        SourceEvent::LinkLost("a lane broke".into()),
    ] {
        feed(&mut source, 1, event);
    }
    let late = SourceEvent::Message(ToSource::RoundDone { round, lacking });
    assert_eq!(feed(&mut source, 1, late), []);
    let back = feed(&mut source, 2, SourceEvent::Tick);
    assert_eq!(back, [SourceAction::Rejoin { session: 7, done: 0 }]);
    let held = PackedPages::pack(&pages(0, 10));
    let on = feed(&mut source, 2, SourceEvent::Message(ToSource::GoOn { held }));
    assert!(on.iter().any(|a| matches!(a, SourceAction::OpenLanes { .. })), "{on:?}");
}

#[test]
fn a_source_that_hears_that_the_machine_runs_behind_the_word_of_a_lost_link_comes_back() {
    let mut source = committed(Mode::PostCopy);
    feed(&mut source, 2, SourceEvent::LinkLost("cut".into()));
    feed(&mut source, 2, SourceEvent::Message(RUNNING));
    let back = feed(&mut source, 3, SourceEvent::Tick);
    assert_eq!(back, [SourceAction::Rejoin { session: 7, done: 2 }]);
}

#[test]
fn the_last_page_may_be_installed_while_the_source_opens_its_lanes_again() {
    let mut source = serving();
    feed(&mut source, 2, SourceEvent::LinkLost("cut".into()));
    feed(&mut source, 2, SourceEvent::Tick);
    let owed = PackedPages::pack(&pages(4, 1));
    feed(&mut source, 4, SourceEvent::Message(ToSource::Lacks { owed }));
    let digest = ToSource::Digest { sum: Some(5), fetched: None };
    let actions = feed(&mut source, 5, SourceEvent::Message(digest));
    assert_eq!(actions, [SourceAction::DigestMemory]);
}

#[test]
fn old_channels_that_tell_of_their_end_one_by_one_put_no_attempt_off() {
    let mut source = serving();
    feed(&mut source, 2, SourceEvent::LinkLost("cut".into()));
    feed(&mut source, 2, SourceEvent::Tick);
    feed(&mut source, 3, SourceEvent::LinkLost("nobody answers".into()));
    let deadline = source.deadline();
    feed(&mut source, 4, SourceEvent::LinkLost("an old lane".into()));
    assert_eq!(source.deadline(), deadline);
}

#[test]
fn what_breaks_before_an_owing_machine_runs_gives_it_back() {
    let breakages: [fn(String) -> DestinationEvent; 3] =
        [DestinationEvent::BadPages, DestinationEvent::PagingBroken, DestinationEvent::LinkLost];
    for breakage in breakages {
        for loading in [false, true] {
            let said = format!("{:?}, loading: {loading}", breakage(String::new()));
            let mut destination = Destination::new(7, 1);
            let commit = ToDestination::Commit {
                permit: RunPermit::for_new_machine(1),
                state: vec![1],
                rounds: Vec::new(),
                owed: PackedPages::pack(&pages(0, 10)),
            };
            let offer = ToDestination::Offer {
                spec: spec(),
                codecs: 1,
                lanes: 1,
                keep: Duration::ZERO,
                machine: None,
            };
            let mut events = vec![
                DestinationEvent::Message(offer),
                DestinationEvent::Built(Ok(Built::default())),
                DestinationEvent::Message(commit),
            ];
            if loading {
                events.push(DestinationEvent::Paging(Ok(())));
            }
            for event in events {
                destination.handle(Duration::ZERO, event);
            }
            destination.handle(Duration::ZERO, breakage("broken".into()));
            // Loaded all the same, by a thread that did not know: too late.
            destination.handle(Duration::ZERO, DestinationEvent::Loaded(Ok(())));
            let actions: Vec<_> = std::iter::from_fn(|| destination.poll()).collect();
            let void =
                |a: &DestinationAction| matches!(a, DestinationAction::Finish(Arrival::Void(_)));
            assert!(actions.iter().any(void), "{said}: {actions:?}");
            let runs = |a: &DestinationAction| matches!(a, DestinationAction::Resume(_));
            assert!(!actions.iter().any(runs), "{said}: {actions:?}");
            assert_eq!(destination.verdict(), Verdict::NeverRan, "{said}");
        }
    }
}

#[test]
fn attempts_that_fail_at_their_last_step_end_in_time_too() {
    let mut source = serving();
    let mut at = 1;
    feed(&mut source, at, SourceEvent::LinkLost("cut".into()));
    for _ in 0..1000 {
        let deadline = source.deadline().expect("it tries again or ends");
        at = at.max(u64::try_from(deadline.as_millis()).unwrap());
        let mut actions = feed(&mut source, at, SourceEvent::Tick);
        if let Some(SourceAction::Finish(outcome)) = actions.pop() {
            assert!(matches!(outcome, Outcome::Detached { .. }), "{outcome:?}");
            // It was told 60 s, and attempts are at most 5 s apart.
            assert!((60_000..=65_001).contains(&at), "{at} ms");
            return;
        }
        let owed = PackedPages::pack(&pages(0, 10));
        feed(&mut source, at, SourceEvent::Message(ToSource::Lacks { owed }));
        // Several channels tell of it, one after the other.
        for _ in 0..10 {
            feed(&mut source, at, SourceEvent::LinkLost("cut again".into()));
            at += 90;
        }
    }
    panic!("it tries for ever");
}

#[test]
fn an_operator_ends_the_attempts_to_come_back_at_any_point_and_can_go_on() {
    for steps in 0..3 {
        let mut source = serving();
        feed(&mut source, 2, SourceEvent::LinkLost("cut".into()));
        let owed = PackedPages::pack(&pages(0, 10));
        let events = [SourceEvent::Tick, SourceEvent::Message(ToSource::Lacks { owed })];
        for event in events.into_iter().take(steps) {
            feed(&mut source, 3, event);
        }
        let mut actions = feed(&mut source, 4, SourceEvent::Cancel);
        let Some(SourceAction::Finish(Outcome::Detached { reattach, .. })) = actions.pop() else {
            panic!("after {steps} steps: {actions:?}");
        };
        assert_eq!(reattach.peer(), None);
        let reattach = reattach.of_peer(Some("host2".into()));
        assert_eq!(reattach.peer(), Some("host2"));
        let mut source = Source::reattach(reattach, Goals::default(), Duration::from_secs(1));
        let again = feed(&mut source, 0, SourceEvent::Tick);
        assert_eq!(again, [SourceAction::Rejoin { session: 7, done: 2 }]);
    }
}

#[test]
fn an_old_copy_that_cannot_be_this_machines_ends_the_migration_before_it_began() {
    for (offers, fits) in [
        (vec![old(pages(0, 64), 64)], true),
        (vec![old(pages(0, 10), 10), old(pages(10, 54), 54)], true),
        (vec![old(pages(60, 5), 5)], false),
        (vec![old(pages(0, 10), 9)], false),
        (vec![old(pages(0, 10), 11)], false),
        (vec![old(pages(0, 10), 10), old(pages(9, 2), 2)], false),
        (vec![old(PageSet::new(), 0)], false),
    ] {
        let how = (Goals::default(), Mode::PreCopy);
        let mut source = Source::new(spec(), Some(1), 1, 1, how, Duration::from_secs(60));
        let mut last = feed(&mut source, 1, SourceEvent::Connected);
        for offer in &offers {
            last = feed(&mut source, 1, SourceEvent::Message(ToSource::Recalls(offer.clone())));
        }
        let ended = |a: &SourceAction| match a {
            SourceAction::Finish(Outcome::Failed(why)) => why.contains("old copy"),
            _ => false,
        };
        assert_eq!(last.iter().any(ended), !fits, "{offers:?}: {last:?}");
        let recalled = last.iter().any(|a| matches!(a, SourceAction::Recall { .. }));
        assert_eq!(recalled, fits, "{offers:?}: {last:?}");
    }
}

/// A source that was told that pages 0 to 9 are there, named them in round 1, and hears `lacking`.
fn named_and_lacks(lacking: &PageSet) -> Vec<SourceAction> {
    let how = (Goals::default(), Mode::PreCopy);
    let mut source = Source::new(spec(), Some(1), 1, 1, how, Duration::from_secs(60));
    let lacking = PackedPages::pack(lacking);
    let mut all = Vec::new();
    for event in [
        SourceEvent::Connected,
        SourceEvent::Message(ToSource::Recalls(old(pages(0, 10), 10))),
        SourceEvent::Message(ToSource::Accepted {
            version: 2,
            session: 7,
            codecs: 1,
            no_post_copy: None,
        }),
        SourceEvent::LanesOpen,
        SourceEvent::TrackingStarted(pages(0, 10)),
        SourceEvent::RoundSent { round: 1, batches: 1, bytes: 100, same: 10 },
        SourceEvent::Message(ToSource::RoundDone { round: 1, lacking }),
        SourceEvent::Harvested(PageSet::new()),
        SourceEvent::Message(ToSource::Ready),
        SourceEvent::Paused(RunPermit::for_new_machine(1)),
        SourceEvent::Harvested(PageSet::new()),
    ] {
        all.extend(feed(&mut source, 1, event));
    }
    all
}

#[test]
fn what_the_destination_cannot_read_after_all_is_sent_and_no_more_is_named() {
    let all = named_and_lacks(&pages(3, 2));
    let forgets = all.iter().position(|a| *a == SourceAction::Forget).unwrap();
    let sends = |a: &SourceAction| match a {
        SourceAction::SendPages { pages: sent, .. } => *sent == pages(3, 2),
        _ => false,
    };
    assert!(all[forgets..].iter().any(sends), "{all:?}");
    assert!(!named_and_lacks(&PageSet::new()).contains(&SourceAction::Forget));
    let failed = |a: &SourceAction| matches!(a, SourceAction::Finish(Outcome::Failed(_)));
    assert!(named_and_lacks(&pages(9, 2)).iter().any(failed), "pages that were not sent");
}

#[test]
fn a_commit_that_names_pages_which_cannot_be_had_is_refused() {
    for late in [false, true] {
        let mut destination = Destination::new(7, 1);
        let commit = ToDestination::Commit {
            permit: RunPermit::for_new_machine(1),
            state: vec![1],
            rounds: vec![(1, 1)],
            owed: PackedPages::default(),
        };
        let offer = ToDestination::Offer {
            spec: spec(),
            codecs: 1,
            lanes: 1,
            keep: Duration::ZERO,
            machine: Some(1),
        };
        let mut events =
            vec![DestinationEvent::Lacking(pages(0, 1)), DestinationEvent::Installed { round: 1 }];
        events.insert(if late { 0 } else { 2 }, DestinationEvent::Message(commit));
        events.insert(0, DestinationEvent::Built(Ok(Built::default())));
        events.insert(0, DestinationEvent::Message(offer));
        for event in events {
            destination.handle(Duration::ZERO, event);
        }
        let actions: Vec<_> = std::iter::from_fn(|| destination.poll()).collect();
        let refused = |a: &DestinationAction| {
            matches!(a, DestinationAction::Send(ToSource::CommitRefused { .. }))
        };
        assert!(actions.iter().any(refused), "late: {late}: {actions:?}");
        assert!(!actions.iter().any(|a| matches!(a, DestinationAction::Load(_))), "{actions:?}");
    }
}

#[test]
fn a_destination_that_gave_up_while_the_commit_was_on_its_way_is_asked_and_gives_the_machine_back()
{
    for mode in [Mode::PreCopy, Mode::PostCopy] {
        for lane_lost in [false, true] {
            let said = format!("{mode:?}, a lane was lost first: {lane_lost}");
            let mut source = committed(mode);
            if lane_lost {
                feed(&mut source, 2, SourceEvent::LinkLost("a lane is lost".into()));
            }
            let failed = ToSource::Failed { reason: "a page is damaged".into() };
            let on = feed(&mut source, 2, SourceEvent::Message(failed));
            let told = |a: &SourceAction| {
                matches!(a, SourceAction::Tell(Progress::Running) | SourceAction::Finish(_))
            };
            assert!(!on.iter().any(told), "{said}: {on:?}");
            let asks = feed(&mut source, 1000, SourceEvent::Tick);
            assert!(matches!(asks[..], [SourceAction::Rejoin { .. }]), "{said}: {asks:?}");
            let never = ToSource::Verdict(Verdict::NeverRan);
            let back = feed(&mut source, 1001, SourceEvent::Message(never));
            assert!(back.iter().any(|a| matches!(a, SourceAction::Resume(_))), "{said}: {back:?}");
            let why = format!("{back:?}");
            assert!(why.contains("a page is damaged"), "{said}: {why}");
            assert!(!why.contains("broke the protocol"), "{said}: {why}");
        }
    }
}
