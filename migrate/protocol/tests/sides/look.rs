//! A look before the move: what is sent and measured in it, and how it goes on.

use ferry_pages::PageSet;
use ferry_protocol::{
    Goals, Mode, Outcome, PackedPages, Progress, Source, SourceAction as Action,
    SourceEvent as Event, ToDestination, ToSource,
};

use crate::{ms, pages, spec};

const DATA: u64 = 20_000;

fn feed(source: &mut Source, at_ms: u64, event: Event) -> Vec<Action> {
    source.handle(ms(at_ms), event);
    std::iter::from_fn(|| source.poll()).filter(|a| !matches!(a, Action::Tell(_))).collect()
}

/// Whether the machine moves after the look.
#[derive(Clone, Copy, PartialEq)]
enum Then {
    Moves(Mode),
    Stays,
}

fn begun(then: Then, data: &PageSet) -> (Source, Vec<Action>) {
    let mode = if let Then::Moves(mode) = then { mode } else { Mode::PreCopy };
    let how = (Goals::default(), mode);
    let mut source = Source::new(spec(), None, 1, 1, how, ms(60_000));
    if then == Then::Stays {
        source.look_only();
    }
    let accepted = ToSource::Accepted { version: 2, session: 7, codecs: 1, no_post_copy: None };
    feed(&mut source, 0, Event::Connected);
    feed(&mut source, 0, Event::Message(accepted));
    feed(&mut source, 0, Event::LanesOpen);
    let actions = feed(&mut source, 0, Event::TrackingStarted(data.clone()));
    (source, actions)
}

/// The pages of `round`, if that is what it sends, and nothing else.
fn sends(actions: &[Action], round: u32) -> PageSet {
    match actions {
        [Action::SendPages { round: r, pages }] if *r == round => pages.clone(),
        other => panic!("{other:?}"),
    }
}

/// The round that is under way is sent, acknowledged, and what was written meanwhile harvested, at these times.
fn round(
    source: &mut Source,
    (sent, done, harvested): (u64, u64, u64),
    bytes: u64,
    written: PageSet,
) -> Vec<Action> {
    let round = source.rounds();
    feed(source, sent, Event::RoundSent { round, batches: 1, bytes, same: 0 });
    let word = ToSource::RoundDone { round, lacking: PackedPages::default() };
    assert_eq!(feed(source, done, Event::Message(word)), [Action::Harvest]);
    feed(source, harvested, Event::Harvested(written))
}

/// A look of three samples, as the last of them took long enough to tell; what was not sent in it.
fn looked(then: Then) -> (Source, PageSet, Vec<Action>) {
    let all = pages(0, DATA);
    let (mut source, first) = begun(then, &all);
    let (Action::Sample(armed), rest) = (&first[0], &first[1..]) else { panic!("{first:?}") };
    assert_eq!(armed, &all, "what is written from here on is seen");
    let mut left = all;
    let sample = sends(rest, 1);
    assert_eq!(sample, pages(0, 16));
    left.subtract(&sample);

    let next = round(&mut source, (1, 3, 4), 16 * 4096, pages(0, 10));
    left.union_with(&pages(0, 10));
    // Every nineteenth group of sixteen pages.
    let sample = sends(&next, 2);
    assert!(sample.len() == 66 * 16 && sample.runs().count() > 60, "{sample:?}");
    left.subtract(&sample);

    let next = round(&mut source, (14, 15, 16), sample.len() * 2000, pages(5, 15));
    left.union_with(&pages(5, 15));
    let sample = sends(&next, 3);
    assert!(sample.len() > 4096 && sample.len() < 5500, "{}", sample.len());
    left.subtract(&sample);

    // A tenth of a second on the link says enough.
    assert_eq!((source.sampled(), source.is_sampling()), (None, true));
    let end = round(&mut source, (136, 138, 140), sample.len() * 1000, PageSet::new());
    (source, left, end)
}

fn measured(source: &Source, written: &[(u64, u64)]) {
    let sampled = source.sampled().expect("it was measured");
    assert!(!source.is_sampling());
    assert_eq!((sampled.pages, sampled.round_trip), (DATA, ms(1)));
    let written: Vec<_> = written.iter().map(|&(at, n)| (ms(at), n)).collect();
    assert_eq!(sampled.written, written);
    assert_eq!(sampled.bytes_per_page, 1000.0);
    let carried = sampled.rate_bytes_per_s * 0.121;
    assert!((4.096e6..5.5e6).contains(&carried), "{sampled:?}");
}

#[test]
fn a_move_begins_with_a_look_and_what_was_sent_in_it_is_not_sent_again() {
    for mode in [Mode::Auto, Mode::PreCopy, Mode::Hybrid] {
        let (source, left, end) = looked(Then::Moves(mode));
        assert_eq!(sends(&end, 4), left);
        assert_eq!(source.rounds(), 4);
        measured(&source, &[(4, 10), (16, 20), (140, 20)]);
    }
}

#[test]
fn a_look_alone_goes_on_for_a_while_and_ends_with_the_guest_here_and_all_that_was_written() {
    let (mut source, mut left, end) = looked(Then::Stays);
    assert_eq!(end, []);
    assert_eq!(source.deadline(), Some(ms(190)), "a quarter of the look");
    assert_eq!(feed(&mut source, 190, Event::Tick), [Action::Harvest]);
    assert_eq!(feed(&mut source, 191, Event::Harvested(pages(100, 5))), []);
    left.union_with(&pages(100, 5));
    assert_eq!(source.deadline(), Some(ms(200)), "its end");
    assert_eq!(feed(&mut source, 200, Event::Tick), [Action::Harvest]);
    assert_eq!(source.sampled(), None);
    let end = feed(&mut source, 200, Event::Harvested(PageSet::new()));
    measured(&source, &[(4, 10), (16, 20), (140, 20), (191, 25), (200, 25)]);
    let [Action::ReturnDirty(dirty), Action::Send(ToDestination::Abort { reason }), rest @ ..] =
        &end[..]
    else {
        panic!("{end:?}")
    };
    assert_eq!(dirty, &left);
    assert!(reason.contains("ferry preflight"), "{reason}");
    assert_eq!(rest, [Action::StopTracking, Action::Finish(Outcome::Cancelled)]);
}

#[test]
fn a_move_of_all_pages_after_the_hand_over_sends_no_sample() {
    let (source, first) = begun(Then::Moves(Mode::PostCopy), &pages(0, 10));
    assert_eq!(first, [Action::Sample(pages(0, 10))]);
    assert_eq!(source.deadline(), Some(ms(100)));
}

#[test]
fn a_look_at_a_small_machine_was_its_first_round_and_at_a_wide_link_it_takes_four_samples() {
    let (mut source, first) = begun(Then::Moves(Mode::PreCopy), &pages(0, 10));
    assert_eq!(sends(&first[1..], 1), pages(0, 10));
    feed(&mut source, 0, Event::Message(ToSource::Ready));
    let end = round(&mut source, (1, 2, 3), 10_000, pages(3, 2));
    assert!(end.contains(&Action::Pause), "{end:?}");

    let (mut source, _) = begun(Then::Moves(Mode::PreCopy), &pages(0, 1 << 20));
    for at in [10, 20, 30, 40] {
        assert!(source.is_sampling());
        let next = round(&mut source, (at, at + 1, at + 2), 1 << 20, PageSet::new());
        assert!(matches!(next[..], [Action::SendPages { .. }]), "{next:?}");
    }
    assert_eq!((source.rounds(), source.is_sampling()), (5, false));
}

#[test]
fn a_link_that_is_opening_its_window_is_not_known_by_a_slow_sample() {
    // Of a round trip of 50 ms: 4 MB in 350 ms, and then 16 MB in 150.
    let (mut source, _) = begun(Then::Moves(Mode::PreCopy), &pages(0, 1 << 20));
    round(&mut source, (1, 51, 51), 16 * 4096, PageSet::new());
    round(&mut source, (401, 451, 451), 1024 * 4096, PageSet::new());
    assert!(source.is_sampling());
    round(&mut source, (601, 651, 651), 4096 * 4096, PageSet::new());
    assert!(source.is_sampling());
    round(&mut source, (1201, 1251, 1251), 16_384 * 4096, PageSet::new());
    let rate = source.sampled().expect("four samples").rate_bytes_per_s;
    assert!((rate / 122e6 - 1.0).abs() < 0.01, "{rate}");

    // The same at a round trip of 1 ms is a slow link.
    let (mut source, _) = begun(Then::Moves(Mode::PreCopy), &pages(0, 1 << 20));
    round(&mut source, (1, 2, 2), 16 * 4096, PageSet::new());
    round(&mut source, (401, 402, 402), 1024 * 4096, PageSet::new());
    assert!(!source.is_sampling());
}

#[test]
fn a_link_that_is_lost_in_a_look_leaves_the_move_without_one_and_ends_a_look_alone() {
    for (then, ends) in [(Then::Moves(Mode::PreCopy), false), (Then::Stays, true)] {
        let (mut source, _) = begun(then, &pages(0, DATA));
        let lost = feed(&mut source, 5, Event::LinkLost("cut".into()));
        let failed = |a: &Action| matches!(a, Action::Finish(Outcome::Failed(_)));
        assert_eq!(lost.iter().any(failed), ends, "{lost:?}");
        if !ends {
            feed(&mut source, 10_000, Event::Tick);
            let go_on = ToSource::GoOn { held: PackedPages::pack(&pages(0, 8)) };
            feed(&mut source, 10_001, Event::Message(go_on));
            let on = feed(&mut source, 10_002, Event::LanesOpen);
            assert_eq!(sends(&on, 2), pages(8, DATA - 8));
        }
    }
}

#[test]
fn a_look_at_a_machine_that_is_there_already_says_nothing_of_the_link() {
    let (mut source, _) = begun(Then::Stays, &pages(0, 10));
    assert_eq!(source.no_post_copy(), None);
    feed(&mut source, 1, Event::RoundSent { round: 1, batches: 1, bytes: 160, same: 10 });
    let word = ToSource::RoundDone { round: 1, lacking: PackedPages::default() };
    feed(&mut source, 2, Event::Message(word));
    feed(&mut source, 3, Event::Harvested(PageSet::new()));
    feed(&mut source, 300, Event::Tick);
    feed(&mut source, 300, Event::Harvested(PageSet::new()));
    let sampled = source.sampled().expect("it was measured");
    assert_eq!((sampled.rate_bytes_per_s, sampled.bytes_per_page), (0.0, 0.0));
}

#[test]
fn why_pages_cannot_follow_is_known_after_a_look() {
    let how = (Goals::default(), Mode::PreCopy);
    let mut source = Source::new(spec(), None, 1, 1, how, ms(60_000));
    let no_post_copy = Some("no userfaultfd".to_owned());
    let accepted = ToSource::Accepted { version: 2, session: 7, codecs: 1, no_post_copy };
    feed(&mut source, 0, Event::Connected);
    feed(&mut source, 0, Event::Message(accepted));
    assert_eq!(source.no_post_copy(), Some("no userfaultfd"));
}

#[test]
fn the_end_of_a_look_is_told() {
    let (mut source, _) = begun(Then::Moves(Mode::PreCopy), &pages(0, 10));
    feed(&mut source, 1, Event::RoundSent { round: 1, batches: 1, bytes: 10_000, same: 0 });
    let word = ToSource::RoundDone { round: 1, lacking: PackedPages::default() };
    feed(&mut source, 2, Event::Message(word));
    source.handle(ms(3), Event::Harvested(PageSet::new()));
    let told: Vec<Action> = std::iter::from_fn(|| source.poll()).collect();
    assert!(told.contains(&Action::Tell(Progress::Sampled)), "{told:?}");
}
