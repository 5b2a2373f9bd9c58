//! A look before the move: what is sent and measured in it, and how it goes on.

use ferry_pages::PageSet;
use ferry_protocol::{
    Goals, Mode, Outcome, PackedPages, Preflight, Progress, Source, SourceAction as Action,
    SourceEvent as Event, ToDestination, ToSource,
};

use crate::{ms, pages, spec};

const DATA: u64 = 20_000;

fn feed(source: &mut Source, at_ms: u64, event: Event) -> Vec<Action> {
    source.handle(ms(at_ms), event);
    std::iter::from_fn(|| source.poll()).filter(|a| !matches!(a, Action::Tell(_))).collect()
}

fn begun(preflight: Preflight, data: &PageSet) -> (Source, Vec<Action>) {
    let how = (Goals::default(), Mode::PreCopy);
    let mut source = Source::new(spec(), None, 1, 1, how, ms(60_000));
    source.set_preflight(preflight);
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
fn looked(preflight: Preflight) -> (Source, PageSet, Vec<Action>) {
    let all = pages(0, DATA);
    let (mut source, first) = begun(preflight, &all);
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
    let bytes = sample.len() * 1000;
    assert_eq!(round(&mut source, (136, 138, 140), bytes, PageSet::new()), []);
    assert_eq!(source.deadline(), Some(ms(190)), "a quarter of the look");
    assert_eq!(feed(&mut source, 190, Event::Tick), [Action::Harvest]);
    assert_eq!(feed(&mut source, 191, Event::Harvested(pages(100, 5))), []);
    left.union_with(&pages(100, 5));
    assert_eq!(source.deadline(), Some(ms(200)), "its end");
    assert_eq!(feed(&mut source, 200, Event::Tick), [Action::Harvest]);
    assert_eq!(source.sampled(), None);
    let end = feed(&mut source, 200, Event::Harvested(PageSet::new()));

    let sampled = source.sampled().expect("it was measured");
    assert_eq!((sampled.pages, sampled.round_trip), (DATA, ms(1)));
    let written: Vec<_> =
        [(4, 10), (16, 20), (140, 20), (191, 25), (200, 25)].map(|(at, n)| (ms(at), n)).into();
    assert_eq!(sampled.written, written);
    assert_eq!(sampled.bytes_per_page, 1000.0);
    let rate = bytes as f64 / 0.121;
    assert!((sampled.rate_bytes_per_s / rate - 1.0).abs() < 1e-9, "{sampled:?}");
    (source, left, end)
}

#[test]
fn a_look_measures_link_and_guest_and_what_was_sent_is_not_sent_again() {
    let (source, left, end) = looked(Preflight::First);
    assert_eq!(sends(&end, 4), left);
    assert_eq!(source.rounds(), 4);
}

#[test]
fn a_look_alone_ends_with_the_guest_here_and_all_that_was_written() {
    let (_, left, end) = looked(Preflight::Only);
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
fn a_look_at_a_small_machine_takes_one_sample_and_at_a_wide_link_four() {
    let (mut source, first) = begun(Preflight::First, &pages(0, 10));
    assert_eq!(sends(&first[1..], 1), pages(0, 10));
    assert_eq!(round(&mut source, (1, 2, 3), 10_000, PageSet::new()), [], "it is looked at on");
    assert_eq!(source.deadline(), Some(ms(53)));

    let (mut source, _) = begun(Preflight::First, &pages(0, 1 << 20));
    for at in [10, 20, 30] {
        let next = round(&mut source, (at, at + 1, at + 2), 1 << 20, PageSet::new());
        assert!(matches!(next[..], [Action::SendPages { .. }]), "{next:?}");
    }
    assert_eq!(round(&mut source, (40, 41, 42), 1 << 20, PageSet::new()), []);
    assert_eq!((source.rounds(), source.deadline()), (4, Some(ms(92))));
}

#[test]
fn a_link_that_is_lost_in_a_look_leaves_the_move_without_one_and_ends_a_look_alone() {
    for (preflight, ends) in [(Preflight::First, false), (Preflight::Only, true)] {
        let (mut source, _) = begun(preflight, &pages(0, DATA));
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
    let (mut source, _) = begun(Preflight::First, &pages(0, 10));
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
    let (mut source, _) = begun(Preflight::First, &pages(0, 10));
    round(&mut source, (1, 2, 3), 10_000, PageSet::new());
    feed(&mut source, 300, Event::Tick);
    source.handle(ms(300), Event::Harvested(PageSet::new()));
    let told: Vec<Action> = std::iter::from_fn(|| source.poll()).collect();
    assert!(told.contains(&Action::Tell(Progress::Sampled)), "{told:?}");
}
