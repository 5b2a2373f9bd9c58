//! The source, step by step: what it asks for, and what becomes of the guest and of its dirty pages when the
//! migration ends at any of its steps.

use ferry_pages::PageSet;
use ferry_protocol::{
    Goals, Mode, Outcome, PackedPages, Progress, RunPermit, Source, SourceAction as Action,
    SourceEvent as Event, ToDestination, ToSource, Verdict,
};

use crate::{ms, pages, spec};

fn union<const N: usize>(sets: [PageSet; N]) -> PageSet {
    sets.iter().flat_map(PageSet::runs).collect()
}

fn new() -> Source {
    Source::new(spec(), None, 0b0110, 1, (Goals::default(), Mode::PreCopy), ms(60_000))
}

fn feed(source: &mut Source, at_ms: u64, event: Event) -> Vec<Action> {
    source.handle(ms(at_ms), event);
    std::iter::from_fn(|| source.poll()).collect()
}

fn accepted(version: u16, codecs: u8) -> Event {
    Event::Message(ToSource::Accepted { version, session: 7, codecs, no_post_copy: None })
}

fn sent(round: u32, batches: u64) -> Event {
    Event::RoundSent { round, batches, bytes: 1 << 20, same: 0 }
}

fn running() -> Event {
    Event::Message(ToSource::Running { pages_us: 1, load_us: 2, resume_us: 3 })
}

fn digest() -> Event {
    Event::Message(ToSource::Digest { sum: Some(5), fetched: None })
}

fn round_done(round: u32) -> Event {
    Event::Message(ToSource::RoundDone { round, lacking: PackedPages::default() })
}

/// A migration in one round of ten pages, of which two are dirty after it; then three more, one by one.
fn steps() -> Vec<Event> {
    vec![
        Event::Connected,
        accepted(2, 0b0111),
        Event::LanesOpen,
        Event::TrackingStarted(pages(0, 10)),
        sent(1, 2),
        round_done(1),
        Event::Harvested(pages(3, 2)),
        Event::Message(ToSource::Ready),
        Event::Paused(RunPermit::for_new_machine(1)),
        Event::Harvested(pages(5, 1)),
        Event::StateSaved(vec![1]),
        Event::Harvested(pages(20, 1)),
        sent(3, 4),
        sent(2, 1),
        running(),
        Event::MemoryDigest(5),
        digest(),
    ]
}

/// Steps after which the guest stands still, and after which the permit has left.
const PAUSED: std::ops::Range<usize> = 9..14;
const COMMITTED: usize = 14;

/// What is dirty at the source and not known to be at the destination after so many steps.
fn debt(steps: usize) -> PageSet {
    match steps {
        4 | 5 => pages(0, 10),
        7..=9 => pages(3, 2),
        10 | 11 => pages(3, 3),
        12.. => union([pages(3, 3), pages(20, 1)]),
        _ => PageSet::new(),
    }
}

fn after(number: usize) -> Source {
    let mut source = new();
    for (at, event) in (0..).zip(steps()).take(number) {
        feed(&mut source, at, event);
    }
    source
}

/// All that each step makes it do, without words for whoever watches.
fn done_by_steps() -> Vec<Vec<Action>> {
    let mut source = new();
    let quiet = |action: &Action| !matches!(action, Action::Tell(_));
    (0..)
        .zip(steps())
        .map(|(at, event)| feed(&mut source, at, event).into_iter().filter(quiet).collect())
        .collect()
}

fn returned(actions: &[Action]) -> PageSet {
    let dirty = actions.iter().find_map(|action| match action {
        Action::ReturnDirty(pages) => Some(pages.clone()),
        _ => None,
    });
    dirty.unwrap_or_default()
}

fn resumes(actions: &[Action]) -> bool {
    actions.iter().any(|action| matches!(action, Action::Resume(_)))
}

fn tells_the_destination(actions: &[Action]) -> bool {
    actions.iter().any(|action| matches!(action, Action::Send(ToDestination::Abort { .. })))
}

#[test]
fn each_step_asks_for_the_next_and_the_permit_leaves_once_all_was_sent() {
    let done = done_by_steps();
    let send = |round, pages| Action::SendPages { round, pages };
    assert!(matches!(done[0][..], [Action::Send(ToDestination::Offer { codecs: 6, .. })]));
    let open = Action::OpenLanes { session: 7, codecs: 6 };
    assert_eq!(done[1], [open, Action::StartTracking, Action::Send(ToDestination::Prepare)]);
    assert_eq!(done[2], []);
    assert_eq!(done[3], [Action::Sample(pages(0, 10)), send(1, pages(0, 10))]);
    let end = ToDestination::RoundEnd { round: 1, batches: 2 };
    assert_eq!(done[4], [Action::Send(end)]);
    assert_eq!(done[5], [Action::Harvest]);
    assert_eq!(done[6], [], "it waits for the destination to be ready");
    assert_eq!(done[7], [Action::Pause]);
    assert_eq!(done[8], [Action::Harvest]);
    assert_eq!(done[9], [send(2, pages(3, 3)), Action::SaveState]);
    assert_eq!(done[10], [Action::Harvest]);
    assert_eq!(done[11], [send(3, pages(20, 1))]);
    assert_eq!(done[12], [], "the other round is still being sent");
    let [Action::Send(ToDestination::Commit { permit, state, rounds, owed })] = &done[13][..]
    else {
        panic!("{:?}", done[13])
    };
    assert_eq!((permit.machine(), permit.handovers(), &state[..]), (1, 1, &[1][..]));
    assert_eq!((&rounds[..], owed.is_empty()), (&[(2, 1), (3, 4)][..], true));
    assert_eq!(done[14], [Action::DigestMemory]);
    assert_eq!(done[15], []);
    let [Action::Send(ToDestination::Verified { matches: true }), Action::StopTracking, end] =
        &done[16][..]
    else {
        panic!("{:?}", done[16])
    };
    let Action::Finish(Outcome::Completed { digest_verified: Some(true), reason }) = end else {
        panic!("{end:?}")
    };
    assert!(reason.contains("2 dirty pages"), "{reason}");
}

#[test]
fn when_it_happened_and_what_it_took_is_known_afterwards() {
    let source = after(17);
    let switchover = source.switchover();
    let at = [switchover.pause, switchover.paused, switchover.harvested, switchover.saved];
    assert_eq!(at, [7, 8, 9, 10].map(ms));
    assert_eq!((switchover.committed, switchover.running), (ms(13), ms(14)));
    let there = (switchover.destination_pages_us, switchover.destination_load_us);
    assert_eq!((there, switchover.destination_resume_us), ((1, 2), 3));
    assert_eq!((source.rounds(), source.is_committed(), source.is_post_copy()), (3, true, false));
    assert_eq!((source.policy().goals(), source.fetched()), (Goals::default(), None));
    assert!(!after(13).is_committed());
    let mut source = after(5);
    let facts = feed(&mut source, 6, round_done(1));
    assert_eq!(facts, [Action::Harvest]);
    let told = feed(&mut source, 7, Event::Harvested(pages(3, 2)));
    let [Action::Tell(Progress::Sampled), Action::Tell(Progress::RoundDone { facts, .. }), ..] =
        &told[..]
    else {
        panic!("{told:?}")
    };
    assert_eq!((facts.round, facts.pages, facts.bytes, facts.dirty), (1, 10, 1 << 20, 2));
    assert_eq!((facts.took, facts.acknowledged_in), (ms(3), ms(2)));
    assert_eq!(facts.elapsed, ms(7));
}

#[test]
fn cancelled_at_any_step_before_the_commit_the_guest_runs_on_and_nothing_dirty_is_lost() {
    for steps in 0..COMMITTED {
        let mut source = after(steps);
        let actions = feed(&mut source, 99_000, Event::Cancel);
        assert_eq!(actions.last(), Some(&Action::Finish(Outcome::Cancelled)), "{steps}");
        assert_eq!(resumes(&actions), PAUSED.contains(&steps), "{steps}: {actions:?}");
        assert_eq!(returned(&actions), debt(steps), "{steps}: {actions:?}");
        assert_eq!(actions.contains(&Action::StopTracking), steps >= 2, "{steps}");
        assert_eq!(tells_the_destination(&actions), steps >= 1, "{steps}: {actions:?}");
        assert!(!actions.contains(&Action::Throttle(0)), "nobody was held back");
        assert_eq!(source.deadline(), None);
        // What is answered later is still a debt, and the guest is let go.
        assert_eq!(
            returned(&feed(&mut source, 99_001, Event::Harvested(pages(9, 1)))),
            pages(9, 1)
        );
        let late = Event::Paused(RunPermit::for_new_machine(1));
        assert!(resumes(&feed(&mut source, 99_001, late)), "{steps}");
        assert_eq!(feed(&mut source, 99_001, Event::Harvested(PageSet::new())), [], "{steps}");
        feed(&mut source, 99_001, Event::TrackingStarted(pages(9, 1)));
        assert_eq!(source.debt(), [&PageSet::new(); 3], "{steps}: it is over");
        assert_eq!(feed(&mut source, 99_002, Event::Cancel), [], "{steps}");
    }
    for steps in COMMITTED..=17 {
        assert_eq!(feed(&mut after(steps), 99_000, Event::Cancel), [], "{steps}");
    }
}

#[test]
fn a_failure_at_any_step_ends_it_as_a_cancel_does_and_none_takes_a_commit_back() {
    type Break = fn() -> Event;
    let engine: Break = || Event::Failed("no".into());
    let peer: Break = || Event::Message(ToSource::Failed { reason: "no".into() });
    let nonsense: Break = running;
    for (what, from) in [(engine, 0), (peer, 1), (nonsense, 1)] {
        for steps in from..COMMITTED {
            let mut source = after(steps);
            let actions = feed(&mut source, 99_000, what());
            let failed = matches!(actions.last(), Some(Action::Finish(Outcome::Failed(_))));
            assert!(failed, "{steps}: {actions:?}");
            assert_eq!(resumes(&actions), PAUSED.contains(&steps), "{steps}: {actions:?}");
            assert_eq!(returned(&actions), debt(steps), "{steps}: {actions:?}");
        }
    }
    let actions = feed(&mut after(4), 99_000, nonsense());
    let Some(Action::Finish(Outcome::Failed(why))) = actions.last() else { panic!("{actions:?}") };
    assert_eq!(why, "the destination broke the protocol: Running was not expected now");
    assert_eq!(feed(&mut after(COMMITTED), 99_000, engine()), []);
    for steps in [15, 16] {
        let actions = feed(&mut after(steps), 99_000, engine());
        let unknown = Outcome::Completed { digest_verified: None, reason: String::new() };
        let Some(Action::Finish(Outcome::Completed { digest_verified: None, reason })) =
            actions.last()
        else {
            panic!("{actions:?} is not like {unknown:?}")
        };
        assert!(reason.contains("digest"), "{reason}");
        assert!(!resumes(&actions));
    }
}

#[test]
fn a_destination_that_takes_it_by_what_was_not_offered_is_not_used() {
    for (version, codecs) in [(1, 0b0110), (3, 0b0110), (2, 0b1001), (2, 0)] {
        let actions = feed(&mut after(1), 5, accepted(version, codecs));
        let Some(Action::Finish(Outcome::Failed(why))) = actions.last() else {
            panic!("{actions:?}")
        };
        assert!(why.contains("not offered"), "{why}");
    }
    let reasons = vec![ferry_protocol::Refusal::new("memory", "none")];
    let refused = || Event::Message(ToSource::Refused { reasons: reasons.clone() });
    let end = Action::Finish(Outcome::Refused(reasons.clone()));
    assert_eq!(feed(&mut after(1), 5, refused()), [end]);
    let late = feed(&mut after(4), 5, refused());
    assert_eq!(returned(&late), debt(4));
    assert!(matches!(late.last(), Some(Action::Finish(Outcome::Refused(_)))));
}

#[test]
fn each_step_has_its_time_and_what_ends_then_says_why() {
    for (steps, deadline, words) in [
        (1, 60_000, "no answer from the destination for 60 s"),
        (2, 60_001, "no answer"),
        (4, 300_000, "--max-total"),
        (5, 60_004, "no answer"),
        (7, 60_006, "no answer"),
        // Ten seconds from the pause on, whatever happens in between.
        (8, 10_007, "10 s after the guest was stopped"),
        (9, 10_007, "guest was stopped"),
        (10, 10_007, "guest was stopped"),
        (11, 10_007, "guest was stopped"),
        (12, 10_007, "guest was stopped"),
        (15, 60_014, "did not send its digest"),
    ] {
        let mut source = after(steps);
        assert_eq!(source.deadline(), Some(ms(deadline)), "{steps}");
        assert_eq!(feed(&mut source, deadline - 1, Event::Tick), [], "{steps}");
        let actions = feed(&mut source, deadline, Event::Tick);
        let Some(Action::Finish(Outcome::Failed(why) | Outcome::Completed { reason: why, .. })) =
            actions.last()
        else {
            panic!("{steps}: {actions:?}")
        };
        assert!(why.contains(words), "{steps}: {why}");
        let debt = if steps < COMMITTED { debt(steps) } else { PageSet::new() };
        assert_eq!(returned(&actions), debt, "{steps}");
    }
    // A goal that lets the guest stand still for longer is believed.
    let goals = Goals { max_downtime: ms(20_000), ..Goals::default() };
    let mut source = Source::new(spec(), None, 0b0110, 1, (goals, Mode::PreCopy), ms(0));
    for event in steps().into_iter().take(8) {
        feed(&mut source, 0, event);
    }
    assert_eq!(source.deadline(), Some(ms(40_000)));
}

/// Loses the link after `steps` and comes back to a destination that holds `held` of the round under way.
fn comes_back(steps: usize, held: &PageSet) -> (Source, Vec<Action>, Action) {
    let mut source = after(steps);
    let lost = feed(&mut source, 20_000, Event::LinkLost("cut".into()));
    assert_eq!(source.deadline(), Some(ms(20_000)), "{steps}");
    let rejoin = feed(&mut source, 20_000, Event::Tick).pop().unwrap();
    let go_on = ToSource::GoOn { held: PackedPages::pack(held) };
    let open = feed(&mut source, 20_001, Event::Message(go_on));
    let lanes = Action::OpenLanes { session: 7, codecs: 6 };
    assert_eq!(open.last(), Some(&lanes), "{steps}: {open:?}");
    let prepares = open.contains(&Action::Send(ToDestination::Prepare));
    assert_eq!(prepares, steps < 8, "{steps}: it was not ready yet");
    (source, lost, rejoin)
}

#[test]
fn a_link_lost_at_any_step_before_the_commit_is_opened_again_and_what_is_not_there_is_sent() {
    for steps in 3..COMMITTED {
        let round_under_way = matches!(steps, 4 | 5);
        let held = if round_under_way { pages(0, 4) } else { PageSet::new() };
        let (mut source, lost, rejoin) = comes_back(steps, &held);
        assert_eq!(resumes(&lost), PAUSED.contains(&steps), "{steps}: {lost:?}");
        let rounds = source.rounds();
        let done = if round_under_way { rounds - 1 } else { rounds };
        assert_eq!(rejoin, Action::Rejoin { session: 7, done }, "{steps}");
        // Answers of before may come first or last.
        let mut actions = feed(&mut source, 20_002, Event::LanesOpen);
        let owed = match steps {
            3 => Some(Event::TrackingStarted(pages(0, 10))),
            6 => Some(Event::Harvested(pages(3, 2))),
            8 => Some(Event::Paused(RunPermit::for_new_machine(1))),
            9 => Some(Event::Harvested(pages(5, 1))),
            10 => Some(Event::StateSaved(vec![1])),
            11 => Some(Event::Harvested(pages(20, 1))),
            _ => None,
        };
        if let Some(answer) = owed {
            let sends = |action: &Action| matches!(action, Action::SendPages { .. });
            assert!(!actions.iter().any(sends), "{steps}: an answer is due: {actions:?}");
            actions = feed(&mut source, 20_003, answer);
            assert_eq!(resumes(&actions), steps == 8, "{steps}: {actions:?}");
        }
        let mut expected = match steps {
            3 => pages(0, 10),
            6 => pages(3, 2),
            9 => pages(3, 3),
            11 => debt(12),
            steps => debt(steps),
        };
        expected.subtract(&held);
        let next = Action::SendPages { round: rounds + 1, pages: expected };
        assert_eq!(actions.last(), Some(&next), "{steps}");
    }
}

#[test]
fn a_link_lost_before_there_is_a_session_ends_it() {
    for steps in [0, 1] {
        let actions = feed(&mut after(steps), 5, Event::LinkLost("cut".into()));
        let Some(Action::Finish(Outcome::Failed(why))) = actions.last() else {
            panic!("{actions:?}")
        };
        assert_eq!((why.as_str(), tells_the_destination(&actions)), ("cut", steps == 1));
    }
}

#[test]
fn what_fails_here_while_the_source_comes_back_ends_it() {
    let mut source = after(4);
    feed(&mut source, 20_000, Event::LinkLost("cut".into()));
    let actions = feed(&mut source, 20_000, Event::Failed("no descriptors".into()));
    assert_eq!(actions.last(), Some(&Action::Finish(Outcome::Failed("no descriptors".into()))));
    assert_eq!(returned(&actions), debt(4));
}

#[test]
fn what_a_destination_holds_of_rounds_before_is_no_reason_to_end_and_a_second_word_is() {
    let held = || Event::Message(ToSource::GoOn { held: PackedPages::pack(&pages(0, 10)) });
    for (second, words) in [(held(), "GoOn was not expected"), (round_done(1), "RoundDone was")] {
        // Its round is done: nothing is under way.
        let mut source = after(7);
        feed(&mut source, 20_000, Event::LinkLost("cut".into()));
        feed(&mut source, 20_000, Event::Tick);
        let opens = feed(&mut source, 20_001, held());
        assert!(matches!(opens.last(), Some(Action::OpenLanes { .. })), "{opens:?}");
        let actions = feed(&mut source, 20_002, second);
        let Some(Action::Finish(Outcome::Failed(why))) = actions.last() else {
            panic!("{actions:?}")
        };
        assert!(why.contains(words), "{why}");
        assert_eq!(returned(&actions), pages(3, 2));
    }
}

#[test]
fn whoever_cannot_go_on_when_it_is_asked_again_ends_it() {
    let held = |first, number| ToSource::GoOn { held: PackedPages::pack(&pages(first, number)) };
    for (answer, words) in [
        (ToSource::Failed { reason: "full".into() }, "gave up: full"),
        (ToSource::Verdict(Verdict::NeverRan), "given the machine up"),
        (ToSource::Verdict(Verdict::Unknown), "restarted"),
        (ToSource::Verdict(Verdict::Ran), "broke the protocol"),
        (held(9, 2), "were not sent"),
    ] {
        let mut source = after(4);
        feed(&mut source, 20_000, Event::LinkLost("cut".into()));
        feed(&mut source, 20_000, Event::Tick);
        let actions = feed(&mut source, 20_001, Event::Message(answer));
        let Some(Action::Finish(Outcome::Failed(why))) = actions.last() else {
            panic!("{actions:?}")
        };
        assert!(why.contains(words), "{why}");
        assert_eq!(returned(&actions), debt(4));
    }
}

#[test]
fn attempts_to_come_back_are_further_and_further_apart_and_end_in_time() {
    let mut source = after(4);
    feed(&mut source, 10_000, Event::LinkLost("cut".into()));
    let mut at = 10_000;
    let mut pauses = Vec::new();
    let actions = loop {
        let actions = feed(&mut source, at, Event::Tick);
        if !matches!(actions[..], [Action::Rejoin { .. }]) {
            break actions;
        }
        feed(&mut source, at, Event::LinkLost("nobody".into()));
        let next = u64::try_from(source.deadline().unwrap().as_millis()).unwrap();
        pauses.push(next - at);
        at = next;
    };
    assert_eq!(pauses[..7], [200, 400, 800, 1600, 3200, 5000, 5000]);
    assert!((70_000..75_001).contains(&at), "{at} ms");
    let Some(Action::Finish(Outcome::Failed(why))) = actions.last() else { panic!("{actions:?}") };
    assert!(why.contains("cut; the destination could not be reached for 60 s"), "{why}");
    assert_eq!(returned(&actions), debt(4));
}

/// A source that asks at 20 s what became of the machine, which it committed before.
fn doubting() -> Source {
    let mut source = after(COMMITTED);
    let told = feed(&mut source, 20_000, Event::LinkLost("cut".into()));
    assert_eq!(told, [Action::Tell(Progress::InDoubt("cut".into()))]);
    let asked = feed(&mut source, 20_000, Event::Tick);
    // Both last rounds: a page may be in two of them.
    let question = |action: &Action| matches!(action, Action::Rejoin { session: 7, done: 1..=3 });
    assert!(matches!(&asked[..], [action] if question(action)), "{asked:?}");
    source
}

#[test]
fn in_doubt_only_an_explicit_word_lets_the_guest_run_here() {
    let refused = || ToSource::CommitRefused { reason: "bad".into() };
    for never_ran in [ToSource::Verdict(Verdict::NeverRan), refused()] {
        let actions = feed(&mut doubting(), 20_001, Event::Message(never_ran));
        assert!(matches!(actions.last(), Some(Action::Finish(Outcome::Failed(_)))));
        assert_eq!((resumes(&actions), returned(&actions)), (true, debt(14)), "{actions:?}");
    }
    let actions = feed(&mut after(COMMITTED), 20_001, Event::Message(refused()));
    assert_eq!((resumes(&actions), returned(&actions)), (true, debt(14)), "{actions:?}");

    let ran = ToSource::Verdict(Verdict::Ran);
    let actions = feed(&mut doubting(), 20_001, Event::Message(ran));
    let Some(Action::Finish(Outcome::Completed { digest_verified: None, reason })) = actions.last()
    else {
        panic!("{actions:?}")
    };
    assert!(reason.contains("runs the machine") && !resumes(&actions), "{reason}");

    let mut source = doubting();
    let actions = feed(&mut source, 20_001, running());
    assert_eq!(actions.last(), Some(&Action::DigestMemory));

    let mut source = doubting();
    let go_on = ToSource::GoOn { held: PackedPages::default() };
    let actions = feed(&mut source, 20_001, Event::Message(go_on));
    assert!(resumes(&actions) && !source.is_committed(), "{actions:?}");
    let next = Action::SendPages { round: 4, pages: debt(14) };
    assert_eq!(feed(&mut source, 20_002, Event::LanesOpen).last(), Some(&next));
}

#[test]
fn who_cannot_be_asked_is_asked_again_and_then_the_operator_is_told() {
    let mut source = doubting();
    let unknown = || Event::Message(ToSource::Verdict(Verdict::Unknown));
    assert_eq!(source.deadline(), Some(ms(25_000)), "a question may take so long");
    assert_eq!(feed(&mut source, 20_100, unknown()), []);
    assert_eq!(source.deadline(), Some(ms(20_600)));
    let mut at = 20_600;
    let actions = loop {
        let actions = feed(&mut source, at, Event::Tick);
        if !matches!(actions[..], [Action::Rejoin { .. }]) {
            break actions;
        }
        assert_eq!(feed(&mut source, at, unknown()), []);
        at = u64::try_from(source.deadline().unwrap().as_millis()).unwrap();
    };
    assert!((50_000..50_501).contains(&at), "{at} ms");
    let Some(Action::Finish(Outcome::InDoubt { reason, .. })) = actions.last() else {
        panic!("{actions:?}")
    };
    assert!(reason.contains("stays paused here") && !resumes(&actions), "{reason}");
    // Without a lost link it is the time that passes.
    let mut source = after(COMMITTED);
    assert_eq!(source.deadline(), Some(ms(60_013)));
    let told = feed(&mut source, 60_013, Event::Tick);
    assert!(matches!(&told[..], [Action::Tell(Progress::InDoubt(why))] if why.contains("60 s")));
}

#[test]
fn words_of_another_round_are_not_taken_for_those_of_this_one() {
    let mut source = after(4);
    assert_eq!(feed(&mut source, 10, sent(2, 2)), []);
    assert!(!feed(&mut source, 11, sent(1, 2)).is_empty());
    let done = feed(&mut source, 12, round_done(2));
    let Some(Action::Finish(Outcome::Failed(why))) = done.last() else { panic!("{done:?}") };
    assert!(why.contains("broke the protocol"), "{why}");
}

#[test]
fn memory_that_differs_is_said_with_both_digests() {
    for (ours, matches) in [(5, true), (6, false)] {
        // Whichever comes first.
        for swapped in [false, true] {
            let mut events = [Event::MemoryDigest(ours), digest()];
            if swapped {
                events.reverse();
            }
            let mut source = after(15);
            let actions: Vec<_> =
                events.into_iter().flat_map(|event| feed(&mut source, 16_000, event)).collect();
            assert!(actions.contains(&Action::Send(ToDestination::Verified { matches })));
            let Some(Action::Finish(Outcome::Completed { digest_verified, reason })) =
                actions.last()
            else {
                panic!("{actions:?}")
            };
            assert_eq!(*digest_verified, Some(matches));
            assert_eq!(reason.contains("0x0000000000000006"), !matches, "{reason}");
        }
    }
    for (event, words) in [
        (Event::LinkLost("cut".into()), "then the link was lost: cut"),
        (Event::Message(ToSource::Verdict(Verdict::Ran)), "broke the protocol after switchover"),
    ] {
        let actions = feed(&mut after(15), 16_000, event);
        let Some(Action::Finish(Outcome::Completed { digest_verified: None, reason })) =
            actions.last()
        else {
            panic!("{actions:?}")
        };
        assert!(reason.contains(words), "{reason}");
    }
}

/// A hybrid move of ten pages that the guest writes all the time, up to the word that they are stale: what was said,
/// and the round that tells when they are given back.
fn clearing() -> (Source, PackedPages, u32) {
    let goals = Goals { max_downtime: ms(0), ..Goals::default() };
    let mut source = Source::new(spec(), None, 0b0110, 1, (goals, Mode::Hybrid), ms(60_000));
    let steps = [
        Event::Connected,
        accepted(2, 0b0111),
        Event::LanesOpen,
        Event::TrackingStarted(pages(0, 10)),
        Event::Message(ToSource::Ready),
    ];
    for (at, event) in (0..).zip(steps) {
        feed(&mut source, at, event);
    }
    for round in 1..40 {
        let at = 10 * u64::from(round);
        feed(&mut source, at, sent(round, 2));
        feed(&mut source, at + 1, round_done(round));
        let mut done = feed(&mut source, at + 2, Event::Harvested(pages(0, 10)));
        assert!(!done.contains(&Action::Pause), "not yet: {done:?}");
        let end = done.pop();
        if let Some(Action::Send(ToDestination::Stale { pages })) = done.pop() {
            let Some(Action::Send(ToDestination::RoundEnd { round, batches: 0 })) = end else {
                panic!("{end:?}")
            };
            return (source, pages, round);
        }
    }
    panic!("it gives rounds up some time")
}

/// To give them back in the blackout takes the guest's time.
#[test]
fn older_copies_of_what_will_be_owed_are_given_back_before_the_guest_is_stopped() {
    let (mut source, stale, round) = clearing();
    assert_eq!(stale, PackedPages::pack(&pages(0, 10)));
    assert_eq!(source.debt()[0], &pages(0, 10), "they are owed until they are sent");
    assert_eq!(feed(&mut source, 1000, round_done(round)), [Action::Harvest]);
    // Few were written meanwhile.
    assert_eq!(feed(&mut source, 1001, Event::Harvested(pages(0, 12))), [Action::Pause]);
    assert_eq!(source.debt()[0], &pages(0, 12));
    // Many were: these as well, but not for ever.
    let (mut source, _, mut round) = clearing();
    for times in 1..4 {
        feed(&mut source, 1000, round_done(round));
        round += 1;
        let done = feed(&mut source, 1000, Event::Harvested(pages(1000 * times, 300)));
        let stale = ToDestination::Stale { pages: PackedPages::pack(&pages(1000 * times, 300)) };
        let end = ToDestination::RoundEnd { round, batches: 0 };
        assert_eq!(done, [Action::Send(stale), Action::Send(end)]);
    }
    feed(&mut source, 1000, round_done(round));
    assert_eq!(feed(&mut source, 1000, Event::Harvested(pages(5000, 300))), [Action::Pause]);
    let (mut source, ..) = clearing();
    feed(&mut source, 1000, Event::LinkLost("cut".into()));
    assert_eq!(source.debt()[0], &pages(0, 10));
    // Another round, or one of which something lacks, is not what was asked.
    for (other, lacking) in [(1, PackedPages::default()), (0, stale)] {
        let (mut source, _, round) = clearing();
        let word = ToSource::RoundDone { round: round - other, lacking };
        let done = feed(&mut source, 1000, Event::Message(word));
        let Some(Action::Finish(Outcome::Failed(why))) = done.last() else { panic!("{done:?}") };
        assert!(why.contains("broke the protocol"), "{why}");
    }
}
