//! When to switch over: the operator states goals, this decides, and says why.
//!
//! After each round it is told what the round took and what is dirty now. It expects a downtime of
//!
//! ```text
//! overhead + round trip + dirty pages × bytes per page ÷ link rate
//! ```
//!
//! and switches over when that meets the goal and another round would not make it much smaller.

use std::time::Duration;

/// What the operator asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Goals {
    /// The guest stands still no longer than this.
    pub max_downtime: Duration,
    /// The migration takes no longer than this.
    pub max_total: Duration,
}

impl Default for Goals {
    /// 50 ms and 5 minutes.
    fn default() -> Self {
        Self { max_downtime: Duration::from_millis(50), max_total: Duration::from_secs(300) }
    }
}

/// How a machine is moved.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Mode {
    /// Rounds while they pay; the rest of the pages after the hand-over where the goals cannot be met
    /// otherwise.
    #[default]
    Auto,
    /// All pages before the hand-over, or none.
    PreCopy,
    /// All pages after the hand-over.
    PostCopy,
    /// One round, then the hand-over, then what was dirtied meanwhile.
    Hybrid,
}

impl Mode {
    /// As it is written.
    pub fn name(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::PreCopy => "pre-copy",
            Self::PostCopy => "post-copy",
            Self::Hybrid => "hybrid",
        }
    }
}

/// What one round did, and what is left.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RoundFacts {
    /// Number, from 1.
    pub round: u32,
    /// From its first page read to its acknowledgement.
    pub took: Duration,
    /// Pages in it.
    pub pages: u64,
    /// Bytes that it put on the wire.
    pub bytes: u64,
    /// Pages that were only named, as the destination had them.
    pub same: u64,
    /// Pages that are dirty after it.
    pub dirty: u64,
    /// From its last page on the link to its acknowledgement: no less than the round trip.
    pub acknowledged_in: Duration,
    /// Since the migration began.
    pub elapsed: Duration,
}

/// What to do next, with the reason in words.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Decision {
    /// Another round while the guest runs.
    Round(String),
    /// Pause and send the rest.
    SwitchOver(String),
    /// Pause and hand over; the rest comes while the machine runs at the destination.
    PostCopy(String),
    /// The goals cannot be met.
    GiveUp(String),
}

/// The decision after each round. Pure: it holds numbers only.
#[derive(Clone, Debug)]
pub struct Policy {
    goals: Goals,
    mode: Mode,
    /// Rounds one after the other that left nearly as many dirty pages as they sent.
    idle_rounds: u32,
    /// Bytes a second, from rounds large enough to tell.
    rate: f64,
    bytes_per_page: f64,
    /// The shortest acknowledgement.
    round_trip: Duration,
    last_dirty: Option<u64>,
    rounds_within_goal: u32,
    expected: Duration,
    dirty_pages_per_s: f64,
}

/// Pausing, saving, loading and resuming, before anything was measured.
const OVERHEAD: Duration = Duration::from_millis(2);
/// Rounds smaller than this say more of the round trip than of the rate.
const TELLING_BYTES: u64 = 1 << 20;
/// At most so many more rounds once the goal is met, each only while it shrinks the rest.
const POLISHING_ROUNDS: u32 = 3;
/// After so many rounds that did not pay, `auto` stops making rounds.
const IDLE_ROUNDS: u32 = 2;
/// The fewest bytes a page can cost on the wire (a run entry).
const LEAST_BYTES_PER_PAGE: f64 = 16.0;

impl Policy {
    /// A policy for `goals` by `mode`.
    pub fn new(goals: Goals, mode: Mode) -> Self {
        Self {
            goals,
            mode,
            idle_rounds: 0,
            rate: 0.0,
            bytes_per_page: ferry_pages::PAGE_BYTES as f64,
            round_trip: Duration::MAX,
            last_dirty: None,
            rounds_within_goal: 0,
            expected: Duration::MAX,
            dirty_pages_per_s: 0.0,
        }
    }

    /// The goals.
    pub fn goals(&self) -> Goals {
        self.goals
    }

    /// The mode; after [`no_post_copy`](Self::no_post_copy) perhaps not the one that was asked for.
    pub fn mode(&self) -> Mode {
        self.mode
    }

    /// The destination cannot take pages after the hand-over.
    ///
    /// # Errors
    /// Then this mode is not possible, in words.
    pub fn no_post_copy(&mut self, why: &str) -> Result<(), String> {
        match self.mode {
            Mode::Auto | Mode::PreCopy => {
                self.mode = Mode::PreCopy;
                Ok(())
            }
            Mode::PostCopy | Mode::Hybrid => Err(format!(
                "the destination cannot run a machine before all its pages are there ({why}): use --mode \
                 pre-copy"
            )),
        }
    }

    /// Downtime that a switchover after the last round was expected to have.
    pub fn expected_downtime(&self) -> Duration {
        self.expected
    }

    /// Link rate in bytes a second, as last seen.
    pub fn rate_bytes_per_s(&self) -> f64 {
        self.rate
    }

    /// Fresh dirty pages a second, as last seen.
    pub fn dirty_pages_per_s(&self) -> f64 {
        self.dirty_pages_per_s
    }

    /// Whether the migration has run out of time, in words.
    pub fn out_of_time(&self, elapsed: Duration) -> Option<String> {
        (elapsed >= self.goals.max_total).then(|| {
            let mut why = format!(
                "not finished within {:.1} s (--max-total)",
                self.goals.max_total.as_secs_f64()
            );
            if self.rate > 0.0 {
                let dirty = self.dirty_pages_per_s * ferry_pages::PAGE_BYTES as f64 / 1e6;
                why += &format!(
                    ": the guest dirties {:.0} pages/s ({dirty:.0} MB/s), the link carried {:.0} MB/s; \
                     a switchover now would take {:.0} ms, {} ms are allowed (--max-downtime)",
                    self.dirty_pages_per_s,
                    self.rate / 1e6,
                    self.expected.as_secs_f64() * 1e3,
                    self.goals.max_downtime.as_millis(),
                );
            }
            why
        })
    }

    /// Takes a round's facts and decides.
    pub fn after_round(&mut self, facts: RoundFacts) -> Decision {
        self.learn(&facts);
        let ms = |d: Duration| format!("{:.1} ms", d.as_secs_f64() * 1e3);
        let (expected, allowed) = (self.expected, self.goals.max_downtime);
        let shrinks = self.last_dirty.is_none_or(|last| facts.dirty * 4 < last * 3);
        self.last_dirty = Some(facts.dirty);
        if expected <= allowed {
            self.rounds_within_goal += 1;
            let tiny = expected <= allowed / 8;
            if tiny || !shrinks || self.rounds_within_goal > POLISHING_ROUNDS {
                return Decision::SwitchOver(format!(
                    "{} dirty pages: expected downtime {} of {} allowed",
                    facts.dirty,
                    ms(expected),
                    ms(allowed)
                ));
            }
        }
        if let Some(why) = self.rounds_are_over(&facts) {
            return match self.mode {
                Mode::PreCopy => Decision::GiveUp(why),
                Mode::Auto | Mode::PostCopy | Mode::Hybrid => {
                    Decision::PostCopy(format!("{why}: {} pages after the hand-over", facts.dirty))
                }
            };
        }
        Decision::Round(format!(
            "{} dirty pages: expected downtime {}, {} allowed",
            facts.dirty,
            ms(expected),
            ms(allowed)
        ))
    }

    /// Why no other round is made, if so.
    fn rounds_are_over(&mut self, facts: &RoundFacts) -> Option<String> {
        let pays = facts.dirty * 4 < facts.pages * 3;
        self.idle_rounds = if pays { 0 } else { self.idle_rounds + 1 };
        match self.mode {
            Mode::PostCopy | Mode::Hybrid => Some("one round was asked for (--mode hybrid)".into()),
            Mode::Auto if self.idle_rounds >= IDLE_ROUNDS => Some(format!(
                "the guest dirties {:.0} pages/s, as fast as the link carries them: round {} sent {} pages \
                 and left {} dirty, {:.0} ms of downtime where {} ms are allowed",
                self.dirty_pages_per_s,
                facts.round,
                facts.pages,
                facts.dirty,
                self.expected.as_secs_f64() * 1e3,
                self.goals.max_downtime.as_millis(),
            )),
            Mode::Auto | Mode::PreCopy => self.out_of_time(facts.elapsed),
        }
    }

    fn learn(&mut self, facts: &RoundFacts) {
        let took = facts.took.as_secs_f64().max(1e-6);
        let rate = facts.bytes.max(1) as f64 / took;
        // A small round is mostly waiting: the link carries that much at least.
        self.rate = if facts.bytes >= TELLING_BYTES { rate } else { self.rate.max(rate) };
        let sent = facts.pages.saturating_sub(facts.same);
        if sent > 0 {
            self.bytes_per_page = (facts.bytes as f64 / sent as f64).max(LEAST_BYTES_PER_PAGE);
        }
        self.round_trip = self.round_trip.min(facts.acknowledged_in);
        self.dirty_pages_per_s = facts.dirty as f64 / took;
        let send = facts.dirty as f64 * self.bytes_per_page / self.rate;
        let send = Duration::try_from_secs_f64(send).unwrap_or(Duration::MAX);
        self.expected = OVERHEAD.saturating_add(self.round_trip).saturating_add(send);
    }
}

#[cfg(test)]
mod tests {
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
        let far =
            RoundFacts { acknowledged_in: Duration::from_millis(60), ..facts(1, 10_000, 0, 1) };
        assert!(matches!(p.after_round(far), Decision::Round(_)));
        assert!(p.expected_downtime() > Duration::from_millis(60));
    }

    #[test]
    fn auto_hands_over_when_rounds_do_not_pay_and_says_why() {
        let mut p = Policy::new(Goals::default(), Mode::Auto);
        assert!(matches!(p.after_round(facts(1, 100_000, 90_000, 1)), Decision::Round(_)));
        let Decision::PostCopy(why) = p.after_round(facts(2, 90_000, 89_000, 2)) else { panic!() };
        for word in ["pages/s", "89000 dirty", "50 ms are allowed"] {
            assert!(why.contains(word), "{why}");
        }
        // A guest that slows down is spared it.
        let mut p = Policy::new(Goals::default(), Mode::Auto);
        assert!(matches!(p.after_round(facts(1, 100_000, 90_000, 1)), Decision::Round(_)));
        assert!(matches!(p.after_round(facts(2, 90_000, 30_000, 1)), Decision::Round(_)));
        assert!(matches!(p.after_round(facts(3, 30_000, 29_000, 1)), Decision::Round(_)));
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
        let facts =
            RoundFacts { bytes: 4_096_000, same: 99_000, took, ..facts(1, 100_000, 1000, 1) };
        assert!(matches!(p.after_round(facts), Decision::Round(_)), "{p:?}");
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
        let mut after = |facts| {
            p.after_round(facts);
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
    fn two_rounds_in_a_row_that_leave_three_quarters_are_enough_for_auto() {
        for (dirty, hands_over) in [
            (&[750, 750][..], true),
            (&[750, 749], false),
            (&[749, 750], false),
            (&[750, 749, 750], false),
            (&[750, 749, 750, 750], true),
        ] {
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
    fn modes_are_called_as_they_are_written() {
        let modes = [Mode::Auto, Mode::PreCopy, Mode::PostCopy, Mode::Hybrid];
        assert_eq!(modes.map(Mode::name), ["auto", "pre-copy", "post-copy", "hybrid"]);
        let mut p = Policy::new(Goals::default(), Mode::PreCopy);
        assert_eq!((p.goals(), p.mode()), (Goals::default(), Mode::PreCopy));
        assert_eq!(p.no_post_copy("x"), Ok(()));
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
}
