//! What is decided after which rounds.

use super::*;

fn facts(round: u32, pages: u64, dirty: u64, elapsed_s: u64) -> RoundFacts {
    // 1 GB/s, 4 KiB a page.
    let bytes = pages * 4096;
    RoundFacts {
        round,
        took: Duration::from_secs_f64(bytes as f64 / 1e9),
        pages,
        bytes,
        same: 0,
        dirty,
        next_leaves: None,
        acknowledged_in: Duration::from_millis(1),
        elapsed: Duration::from_secs(elapsed_s),
    }
}

#[test]
fn it_goes_on_while_rounds_shrink_and_switches_when_the_goal_is_met() {
    let mut p = Policy::new(Goals::default(), Mode::PreCopy);
    assert!(matches!(p.after_round(facts(1, 100_000, 40_000, 1)), Decision::Round(_)));
    // 9,000 pages are 37 ms and 3 ms overhead: within the goal, but shrinking fast.
    assert!(matches!(p.after_round(facts(2, 40_000, 9_000, 1)), Decision::Round(_)));
    assert!(matches!(p.after_round(facts(3, 9_000, 8_900, 1)), Decision::SwitchOver(_)));
}

#[test]
fn a_guest_that_dirties_faster_than_the_link_ends_in_words_and_numbers() {
    let goals = Goals { max_total: Duration::from_secs(10), ..Goals::default() };
    let mut p = Policy::new(goals, Mode::PreCopy);
    assert!(matches!(p.after_round(facts(1, 100_000, 90_000, 5)), Decision::Round(_)));
    let Decision::GiveUp(why) = p.after_round(facts(2, 90_000, 90_000, 10)) else { panic!() };
    for word in ["--max-total", "pages/s", "MB/s", "--max-downtime"] {
        assert!(why.contains(word), "{why}");
    }
}

#[test]
fn a_long_round_trip_counts_against_the_goal() {
    let mut p = Policy::new(Goals::default(), Mode::PreCopy);
    let far = RoundFacts { acknowledged_in: Duration::from_millis(60), ..facts(1, 10_000, 0, 1) };
    assert!(matches!(p.after_round(far), Decision::Round(_)));
    assert!(p.expected_downtime() > Duration::from_millis(60));
}

#[test]
fn auto_hands_over_when_rounds_do_not_pay_and_says_why() {
    let mut p = Policy::new(Goals::default(), Mode::Auto);
    assert!(matches!(p.after_round(facts(1, 100_000, 40_000, 1)), Decision::Round(_)));
    let Decision::PostCopy(why) = p.after_round(facts(2, 40_000, 39_000, 2)) else { panic!() };
    for word in ["pages/s", "39000 dirty", "50 ms are allowed"] {
        assert!(why.contains(word), "{why}");
    }
}

#[test]
fn auto_leaves_no_page_behind_where_that_would_not_be_quicker() {
    let after_rounds_to = |dirty| {
        let mut p = Policy::new(Goals::default(), Mode::Auto);
        let far = |facts| RoundFacts { acknowledged_in: Duration::from_millis(60), ..facts };
        assert!(matches!(p.after_round(far(facts(1, 100_000, 4000, 1))), Decision::Round(_)));
        p.after_round(far(facts(2, 4000, dirty, 1)))
    };
    // 62 ms whatever is done; a quarter more is not worth telling: 3784 pages in 15.5 ms.
    let Decision::SwitchOver(why) = after_rounds_to(3784) else { panic!() };
    assert!(why.contains("all 3784 pages before the hand-over"), "{why}");
    assert!(matches!(after_rounds_to(3785), Decision::PostCopy(_)));
}

#[test]
fn auto_and_hybrid_never_give_up_and_a_goal_that_is_met_is_met_in_every_mode() {
    let late = facts(1, 100_000, 90_000, 1000);
    for mode in [Mode::Auto, Mode::Hybrid] {
        let mut p = Policy::new(Goals::default(), mode);
        assert!(matches!(p.after_round(late), Decision::PostCopy(_)), "{mode:?}");
        let mut p = Policy::new(Goals::default(), mode);
        assert!(matches!(p.after_round(facts(1, 9, 9, 1)), Decision::SwitchOver(_)));
    }
    let mut p = Policy::new(Goals::default(), Mode::Auto);
    assert_eq!(p.no_post_copy("no userfaultfd"), Ok(()));
    assert!(matches!(p.after_round(late), Decision::GiveUp(_)), "as pre-copy");
    let mut p = Policy::new(Goals::default(), Mode::Hybrid);
    assert!(p.no_post_copy("no userfaultfd").unwrap_err().contains("no userfaultfd"));
}

#[test]
fn a_first_round_of_no_page_says_nothing_of_the_link() {
    // After a lost link, all of it was there already.
    let mut p = Policy::new(Goals::default(), Mode::PreCopy);
    let empty = RoundFacts { took: Duration::from_millis(1), ..facts(1, 0, 60, 1) };
    assert!(matches!(p.after_round(empty), Decision::Round(_)));
    let next = RoundFacts { took: Duration::from_millis(1), ..facts(2, 60, 60, 1) };
    assert!(matches!(p.after_round(next), Decision::SwitchOver(_)), "{p:?}");
}

#[test]
fn pages_that_were_there_do_not_make_the_others_look_cheap() {
    let mut p = Policy::new(Goals::default(), Mode::PreCopy);
    // 1,000 of 100,000 pages were sent, at 40 MB/s as it seems: 1,000 more are not within the goal.
    let took = Duration::from_millis(100);
    let facts = RoundFacts { bytes: 4_096_000, same: 99_000, took, ..facts(1, 100_000, 1000, 1) };
    assert!(matches!(p.after_round(facts), Decision::Round(_)), "{p:?}");
}

#[test]
fn auto_makes_no_round_of_pages_that_are_all_written_over_and_over() {
    let left = |dirty, next_leaves| {
        let mut p = Policy::new(Goals::default(), Mode::Auto);
        p.after_round(RoundFacts { next_leaves, ..facts(1, 100_000, dirty, 1) })
    };
    assert!(matches!(left(30_000, None), Decision::Round(_)));
    assert!(matches!(left(30_000, Some(15_000)), Decision::Round(_)));
    assert!(matches!(left(30_000, Some(15_001)), Decision::PostCopy(_)));
    assert!(matches!(left(60_000, Some(0)), Decision::PostCopy(_)));
    // 3000 pages are 12 ms: what is left meets the goal.
    assert!(matches!(left(3_000, Some(2_000)), Decision::SwitchOver(_)));
    assert!(matches!(left(3_000, Some(1_000)), Decision::Round(_)));
}

/// A round of 1000 pages of 8 KiB each in a second, all of them sent; `dirty` pages are left.
fn slow(dirty: u64) -> RoundFacts {
    let (took, bytes) = (Duration::from_secs(1), 8_192_000);
    let acknowledged_in = Duration::from_millis(10);
    RoundFacts { took, bytes, acknowledged_in, ..facts(1, 1000, dirty, 1) }
}

#[test]
fn the_expected_downtime_is_overhead_round_trip_and_what_is_dirty_at_the_rate_of_the_link() {
    let mut p = Policy::new(Goals::default(), Mode::PreCopy);
    assert_eq!(p.round_trip(), None);
    let mut after = |facts| {
        p.after_round(facts);
        assert_eq!(p.round_trip(), Some(Duration::from_millis(10)));
        (p.expected_downtime(), p.rate_bytes_per_s(), p.dirty_pages_per_s())
    };
    let ms = Duration::from_millis;
    assert_eq!(after(slow(500)), (ms(2 + 10 + 500), 8_192_000.0, 500.0));
    // The shortest round trip counts; of pages that were named only, nothing does.
    let late = ms(40);
    let half = RoundFacts { same: 500, acknowledged_in: late, ..slow(500) };
    assert_eq!(after(half), (ms(2 + 10 + 1000), 8_192_000.0, 500.0));
    let named = RoundFacts { same: 1000, bytes: 1 << 20, ..slow(64) };
    assert_eq!(after(named), (ms(2 + 10 + 1000), 1_048_576.0, 64.0), "as large as before");
    // A round of less than a MiB shows no more than what the link carries at least.
    let small = RoundFacts { same: 1000, bytes: (1 << 20) - 1, ..slow(64) };
    assert_eq!(after(small).1, 1_048_576.0);
    let small = RoundFacts { took: ms(500), bytes: 1_000_000, same: 1000, ..slow(64) };
    assert_eq!(after(small), (ms(2 + 10) + Duration::from_micros(524_288), 2e6, 128.0));
    // A page costs a run entry at least.
    let cheap = RoundFacts { bytes: 1 << 20, pages: 1 << 20, ..slow(65_536) };
    assert_eq!(after(cheap).0, ms(2 + 10 + 1000));
    assert_eq!(p.bytes_per_page(), 16.0);
}

#[test]
fn it_switches_over_once_the_goal_is_met_and_another_round_would_change_little() {
    // Milliseconds to an acknowledgement, dirty pages of each round, and which one is the last.
    let cases: [(u64, &[u64], Option<usize>); 8] = [
        // An eighth of what is allowed: 2 ms, and what the link takes.
        (4250, &[0], Some(0)),
        (4260, &[0], None),
        // A quarter less is worth a round.
        (20_000, &[400, 300], Some(1)),
        (20_000, &[400, 299], None),
        (20_000, &[10_000, 5000, 2500, 1200], Some(3)),
        (20_000, &[10_000, 5000, 2500], None),
        // Exactly what is allowed, and a bit more.
        (48_000, &[0, 0], Some(1)),
        (48_001, &[0, 0], None),
    ];
    for (us, dirty, last) in cases {
        let mut p = Policy::new(Goals::default(), Mode::PreCopy);
        let switched = dirty.iter().position(|dirty| {
            let acknowledged_in = Duration::from_micros(us);
            // 100 GB/s: what is sent takes no time to speak of.
            let took = Duration::from_millis(40);
            let facts = facts(1, 1_000_000, *dirty, 1);
            let facts = RoundFacts { acknowledged_in, took, ..facts };
            matches!(p.after_round(facts), Decision::SwitchOver(_))
        });
        assert_eq!(switched, last, "{us} µs, {dirty:?}");
    }
}

#[test]
fn a_round_that_leaves_half_is_enough_for_auto() {
    for (dirty, hands_over) in [(&[500][..], true), (&[499, 499], false), (&[499, 500], true)] {
        let mut p = Policy::new(Goals::default(), Mode::Auto);
        let last = dirty.iter().map(|dirty| p.after_round(slow(*dirty))).last().unwrap();
        assert_eq!(matches!(last, Decision::PostCopy(_)), hands_over, "{dirty:?}: {last:?}");
    }
}

#[test]
fn out_of_time_is_said_with_what_the_guest_and_the_link_do() {
    let mut p = Policy::new(Goals::default(), Mode::PreCopy);
    let seconds = Duration::from_secs;
    assert_eq!(p.out_of_time(seconds(299)), None);
    let why = p.out_of_time(seconds(300)).unwrap();
    assert_eq!(why, "not finished within 300.0 s (--max-total)", "nothing was measured");
    p.after_round(slow(500));
    let why = p.out_of_time(seconds(300)).unwrap();
    for words in ["dirties 500 pages/s (2 MB/s)", "carried 8 MB/s", "take 512 ms, 50 ms are"] {
        assert!(why.contains(words), "{why}");
    }
    let late = RoundFacts { elapsed: seconds(300), ..slow(500) };
    assert!(matches!(p.after_round(late), Decision::GiveUp(_)));
}

#[test]
fn decisions_have_a_name_and_a_reason() {
    use Decision::{GiveUp, PostCopy, Round, Slow, SwitchOver};
    let why = || "because".to_owned();
    let all = [Round(why()), Slow(5, why()), SwitchOver(why()), PostCopy(why()), GiveUp(why())];
    let names = ["round", "slow", "switch-over", "post-copy", "give-up"];
    assert_eq!(all.each_ref().map(Decision::name), names);
    assert_eq!(all.each_ref().map(Decision::why), ["because"; 5]);
}

#[test]
fn goals_that_were_missed_are_said_in_milliseconds() {
    let (ms, goals) = (Duration::from_millis, Goals::default());
    assert_eq!(goals.missed(ms(50), ms(300_000)), [""; 0], "exactly what is allowed");
    assert_eq!(
        goals.missed(ms(51), ms(300_001)),
        [
            "51.0 ms of downtime, 50.0 ms are allowed (--max-downtime)",
            "300001.0 ms in all, 300000.0 ms are allowed (--max-total)"
        ]
    );
}

#[test]
fn modes_are_called_as_they_are_written() {
    let modes = [Mode::Auto, Mode::PreCopy, Mode::PostCopy, Mode::Hybrid];
    assert_eq!(modes.map(Mode::name), ["auto", "pre-copy", "post-copy", "hybrid"]);
    let mut p = Policy::new(Goals::default(), Mode::PreCopy);
    assert_eq!((p.goals(), p.mode()), (Goals::default(), Mode::PreCopy));
    assert_eq!(p.why_no_post_copy(), None);
    assert_eq!(p.no_post_copy("x"), Ok(()));
    assert_eq!(p.why_no_post_copy(), Some("x"));
    let mut p = Policy::new(Goals::default(), Mode::PostCopy);
    assert!(p.no_post_copy("no userfaultfd").is_err());
}

#[test]
fn polishing_ends() {
    let mut p = Policy::new(Goals::default(), Mode::PreCopy);
    let mut dirty = 9_000;
    for round in 1..20 {
        dirty = dirty * 7 / 10;
        if let Decision::SwitchOver(_) = p.after_round(facts(round, 10_000, dirty, 1)) {
            assert!(round <= POLISHING_ROUNDS + 1);
            return;
        }
    }
    panic!("never switched over");
}

#[test]
fn vcpus_are_held_back_only_as_far_as_the_goals_allow_and_only_where_pages_cannot_follow() {
    let goals = Goals { max_slowdown: 80, ..Goals::default() };
    let slowed = |mode: Mode, goals: Goals, rounds: &[RoundFacts]| -> Vec<u8> {
        let mut p = Policy::new(goals, mode);
        let decide = |facts: &RoundFacts| match p.after_round(*facts) {
            Decision::Slow(percent, why) => {
                assert!(why.contains(&format!("{percent} % of their time")), "{why}");
                Some(percent)
            }
            _ => None,
        };
        rounds.iter().filter_map(decide).collect()
    };
    // 1000 pages a second, and 750 of them written again: a third of what the link carries, and then as far as allowed.
    let busy = slow(750);
    assert_eq!(slowed(Mode::PreCopy, goals, &[busy, busy, busy, busy]), [56, 80]);
    // A few pages, written more slowly: half of the speed that is left, at least.
    let few = RoundFacts { pages: 100, bytes: 819_200, ..slow(90) };
    let hard = Goals { max_slowdown: 99, ..goals };
    assert_eq!(slowed(Mode::PreCopy, hard, &[busy, few]), [56, 78]);
    // Twice as fast as the link: a third of what it carries is a sixth of its speed.
    assert_eq!(slowed(Mode::PreCopy, Goals { max_slowdown: 99, ..goals }, &[slow(2000)]), [84]);
    assert_eq!(slowed(Mode::PreCopy, goals, &[slow(749), slow(749)]), [0; 0], "rounds pay");
    assert_eq!(slowed(Mode::PreCopy, Goals::default(), &[busy, busy]), [0; 0], "not allowed");
    assert_eq!(slowed(Mode::Auto, goals, &[busy, busy]), [0; 0], "by post-copy");
    assert_eq!(
        slowed(Mode::PreCopy, Goals { max_slowdown: 200, ..goals }, &[busy; 9]).last(),
        Some(&99)
    );

    let mut p = Policy::new(goals, Mode::Auto);
    assert_eq!(p.no_post_copy("no userfaultfd"), Ok(()));
    assert!(matches!(p.after_round(busy), Decision::Slow(56, _)), "{p:?}");
    assert_eq!(p.set_goals(Goals { max_slowdown: 60, ..goals }), None, "it is held back less");
    assert_eq!(p.set_goals(Goals { max_slowdown: 20, ..goals }), Some(20));
    assert_eq!(p.slowed(), 20);
    p.cannot_slow("no way to".into());
    assert_eq!((p.slowed(), p.set_goals(goals)), (0, None));
    assert!(matches!(p.after_round(busy), Decision::Round(_)), "{p:?}");
}

#[test]
fn what_would_have_met_the_goals_is_said_in_numbers() {
    let ms = Duration::from_millis;
    let goals =
        Goals { max_downtime: ms(112), max_total: Duration::from_secs(10), max_slowdown: 10 };
    let mut p = Policy::new(goals, Mode::PreCopy);
    assert_eq!(p.needs(), None, "nothing was measured");
    p.after_round(slow(1000));
    // 1000 dirty pages of 8 KiB a second: rounds pay from four thirds of that on; in 100 ms it would be ten times.
    assert_eq!(
        p.needs().unwrap(),
        "needs a link of 88 Mbit/s, or --max-downtime 1013ms, or --max-slowdown 33, or post-copy (--mode auto)"
    );
    let late = RoundFacts { elapsed: Duration::from_secs(10), ..slow(1000) };
    let Decision::GiveUp(why) = p.after_round(late) else { panic!("{p:?}") };
    assert!(why.contains("--max-total") && why.contains("needs a link of 88 Mbit/s"), "{why}");
    // Nor is anybody told to ask for what there is.
    let needs = |goals: Goals, dirty| {
        let mut p = Policy::new(Goals { max_slowdown: 10, ..goals }, Mode::PreCopy);
        p.after_round(slow(dirty));
        p.set_goals(goals);
        p.needs().unwrap_or_default()
    };
    let enough = needs(Goals { max_slowdown: 33, max_downtime: ms(1012), ..goals }, 1000);
    assert_eq!(enough, "needs post-copy (--mode auto)");
    let too_far = needs(Goals { max_downtime: ms(12), ..goals }, 1000);
    assert_eq!(too_far, "needs --max-downtime 1013ms");
    // Held back for more than 99 % of its time, it does not run.
    assert!(needs(goals, 60_000).contains("--max-slowdown 99"), "{}", needs(goals, 60_000));
    assert!(!needs(goals, 100_000).contains("--max-slowdown"));
    // Nobody is told to do what cannot be done.
    assert_eq!(p.no_post_copy("no userfaultfd"), Ok(()));
    p.cannot_slow("no way to".into());
    let needs = p.needs().unwrap();
    assert!(!needs.contains("post-copy") && !needs.contains("slowdown"), "{needs}");
    let mut p = Policy::new(Goals { max_downtime: ms(17), ..goals }, Mode::Auto);
    p.after_round(RoundFacts { took: ms(1), ..slow(10_000) });
    assert_eq!(p.needs().unwrap(), "needs a link of 131.1 Gbit/s, or --max-downtime 23ms");
}

#[test]
fn a_goal_that_the_link_alone_misses_is_not_waited_for() {
    let far = RoundFacts { acknowledged_in: Duration::from_millis(60), ..facts(1, 10_000, 0, 1) };
    let after = |mode| {
        let mut p = Policy::new(Goals::default(), mode);
        // An acknowledgement may be late because pages were still installed.
        for _ in 1..ROUNDS_TO_KNOW_THE_LINK {
            assert!(matches!(p.after_round(far), Decision::Round(_)), "{p:?}");
        }
        p.after_round(far)
    };
    let Decision::GiveUp(why) = after(Mode::PreCopy) else { panic!() };
    assert!(why.contains("its round trip is 60.0 ms; needs --max-downtime 78ms"), "{why}");
    // No other mode would be quicker: it goes now.
    let Decision::SwitchOver(why) = after(Mode::Auto) else { panic!() };
    // But not with much more to send than that.
    let mut p = Policy::new(Goals::default(), Mode::Auto);
    for _ in 1..ROUNDS_TO_KNOW_THE_LINK {
        p.after_round(far);
    }
    let acknowledged_in = far.acknowledged_in;
    let more = RoundFacts { acknowledged_in, ..facts(20, 100_000, 15_000, 1) };
    assert!(matches!(p.after_round(more), Decision::Round(_)), "{p:?}");
    // What the link needs is exactly what is allowed.
    let mut p = Policy::new(Goals::default(), Mode::PreCopy);
    for dirty in (0..ROUNDS_TO_KNOW_THE_LINK).map(|round| 10_000 - 400 * u64::from(round)) {
        let near = RoundFacts { acknowledged_in: Duration::from_millis(48), dirty, ..far };
        assert!(matches!(p.after_round(near), Decision::Round(_)), "{p:?}");
    }
    let near = RoundFacts { acknowledged_in: Duration::from_millis(48), ..far };
    assert!(matches!(p.after_round(near), Decision::Round(_)), "polishing: {p:?}");
    assert!(matches!(p.after_round(near), Decision::SwitchOver(_)), "{p:?}");
    assert!(why.contains("50.0 ms are allowed, but the link's round trip is 60.0 ms"), "{why}");
}
