//! What a move will take, before it begins: a sample of the link and of the guest's writes, and the real policy run
//! over what they foretell.
//!
//! The guest is taken to write as it did while it was sampled, to pages that are all alike: within a time `t` it writes
//! to `set × (1 − e^(−t ÷ turn))` different pages. Two looks tell both numbers.

use std::time::Duration;

use crate::policy::{Decision, Goals, Mode, OVERHEAD, Policy, RoundFacts};

/// Looks that differ by less than this from steady growth say nothing of how large the set is that is written.
const STEADY: f64 = 0.97;
/// A forecast makes no more rounds than this.
const MAX_ROUNDS: u32 = 10_000;

/// What was measured of a machine, its guest and the link.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Sampled {
    /// Pages that hold data.
    pub pages: u64,
    /// What the link carries, bytes/s.
    pub rate_bytes_per_s: f64,
    /// Bytes that a page takes on it.
    pub bytes_per_page: f64,
    /// From the last page to its acknowledgement.
    pub round_trip: Duration,
    /// Pages that were written to at least once within each of these times, the longest last.
    pub written: Vec<(Duration, u64)>,
    /// Pages around those, which are taken to be written to alike.
    pub around: u64,
}

/// What a move is expected to come to.
#[derive(Clone, Debug, PartialEq)]
pub struct Forecast {
    /// How it would be moved: never `auto`.
    pub mode: Mode,
    /// Until the machine runs at the destination.
    pub total: Duration,
    /// How long it stands still.
    pub downtime: Duration,
    /// From then on, until the last page is there.
    pub fetching: Duration,
    /// Rounds while the guest runs.
    pub rounds: u32,
    /// Bytes on the link.
    pub bytes: u64,
    /// Percent of their time that vCPUs are held back at the end.
    pub slowed: u8,
    /// Which goals would be missed, and what would meet them, in words; none, and all are met.
    pub misses: Option<String>,
}

impl Sampled {
    /// Different pages that are expected to be written within `time`.
    pub fn written_within(&self, time: Duration) -> f64 {
        let Some(&(late, most)) = self.written.last() else { return 0.0 };
        let (late_s, most) = (late.as_secs_f64().max(1e-9), most as f64);
        let half = |at: &&(Duration, u64)| (at.0.as_secs_f64() - late_s / 2.0).abs();
        let early = self.written[..self.written.len() - 1]
            .iter()
            .min_by(|a, b| half(a).total_cmp(&half(b)));
        let time = time.as_secs_f64();
        let grown = match early {
            Some(&(early, pages)) => {
                let early_s = early.as_secs_f64().max(1e-9);
                let growth = most / pages as f64;
                match growth < STEADY * late_s / early_s {
                    true => {
                        let turn = turn(early_s, late_s, growth);
                        let set = most / (1.0 - (-late_s / turn).exp());
                        set * (1.0 - (-time / turn).exp())
                    }
                    false => most * time / late_s,
                }
            }
            None => most * time / late_s,
        };
        grown.min(self.pages as f64)
    }

    /// How many pages are expected to be dirty after a round of `pages`, if vCPUs are held back for `slowed` percent of
    /// their time. What is written goes last: each of these pages only counts if it is written after it was sent,
    /// and all others that are written count.
    pub fn left_by(&self, pages: u64, slowed: u8) -> u64 {
        let set = self.written_within(Duration::MAX);
        let last = (pages as f64).min(set);
        if last < 1.0 {
            return 0;
        }
        let (_, took) = self.sent(last);
        let speed = 1.0 - f64::from(slowed) / 100.0;
        let within = |part: f64| self.written_within(seconds(took.as_secs_f64() * speed * part));
        // Sent evenly over that time (Simpson's rule).
        let (half, all) = (within(0.5), within(1.0));
        let again = (4.0 * half + all) / 6.0;
        let share = last / set;
        whole(share * again + (1.0 - share) * all)
    }

    /// How many pages `policy` leaves out of the first round, all of them around what is written.
    pub(crate) fn left_out(&self, policy: &Policy) -> u64 {
        let next = self.left_by(self.around, policy.slowed());
        match self.around < self.pages && policy.leaves_out(self.around, next) {
            true => self.around,
            false => 0,
        }
    }

    /// What comes of `goals` by `mode`, to a destination that takes pages after the hand-over unless it has a reason not
    /// to.
    pub fn forecast(&self, goals: Goals, mode: Mode, no_post_copy: Option<&str>) -> Forecast {
        let mut policy = Policy::new(goals, mode);
        let misses = no_post_copy.and_then(|why| policy.no_post_copy(why).err());
        let mut told = Forecast {
            mode: policy.mode(),
            total: Duration::ZERO,
            downtime: Duration::ZERO,
            fetching: Duration::ZERO,
            rounds: 0,
            bytes: 0,
            slowed: 0,
            misses: None,
        };
        if misses.is_some() {
            return Forecast { misses, ..told };
        }
        let least = OVERHEAD.saturating_add(self.round_trip);
        let mut pages = self.pages as f64;
        let mut left_out = self.left_out(&policy);
        if policy.mode() == Mode::PostCopy {
            (told.total, told.downtime) = (least, least);
            return self.fetched(told, goals, pages);
        }
        loop {
            pages -= left_out as f64;
            let (bytes, took) = self.sent(pages);
            let dirty = match std::mem::take(&mut left_out) {
                0 => self.left_by(whole(pages), policy.slowed()),
                left_out => left_out,
            };
            told.total = told.total.saturating_add(took);
            told.bytes = told.bytes.saturating_add(whole(bytes));
            told.rounds += 1;
            let decision = policy.after_round(RoundFacts {
                round: told.rounds,
                took,
                pages: whole(pages),
                bytes: whole(bytes),
                same: 0,
                dirty,
                next_leaves: Some(self.left_by(dirty, policy.slowed())),
                acknowledged_in: self.round_trip,
                elapsed: told.total,
            });
            told.slowed = policy.slowed();
            pages = dirty as f64;
            match decision {
                Decision::Round(_) | Decision::Slow(..) if told.rounds < MAX_ROUNDS => {}
                Decision::SwitchOver(_) => {
                    told.mode = Mode::PreCopy;
                    told.downtime = policy.expected_downtime();
                    told.total = told.total.saturating_add(told.downtime);
                    told.bytes = told.bytes.saturating_add(whole(pages * self.bytes_per_page));
                    return told.judged(goals);
                }
                Decision::PostCopy(_) => {
                    told.mode = Mode::Hybrid;
                    told.downtime = least;
                    told.total = told.total.saturating_add(least);
                    return self.fetched(told, goals, pages);
                }
                Decision::Round(why) | Decision::Slow(_, why) | Decision::GiveUp(why) => {
                    return Forecast { misses: Some(why), ..told };
                }
            }
        }
    }

    /// Bytes of `pages`, and until they are there.
    fn sent(&self, pages: f64) -> (f64, Duration) {
        let bytes = pages * self.bytes_per_page;
        // What is there already takes nothing, whatever the link carries.
        let took =
            if bytes > 0.0 { seconds(bytes / self.rate_bytes_per_s) } else { Duration::ZERO };
        (bytes, took.saturating_add(self.round_trip))
    }

    /// The rest comes after the hand-over.
    fn fetched(&self, told: Forecast, goals: Goals, pages: f64) -> Forecast {
        let (bytes, fetching) = self.sent(pages);
        Forecast { fetching, bytes: told.bytes.saturating_add(whole(bytes)), ..told }.judged(goals)
    }
}

impl Forecast {
    fn judged(self, goals: Goals) -> Self {
        let missed = goals.missed(self.downtime, self.total);
        let misses = (!missed.is_empty()).then(|| missed.join("; "));
        Self { misses, ..self }
    }
}

/// The time constant by which `late` seconds show `growth` times the pages of `early` seconds.
fn turn(early: f64, late: f64, growth: f64) -> f64 {
    // Less and less grows as the constant falls; far below `early`, nothing does.
    let (mut short, mut long) = (early / 50.0, late * 1e4);
    for _ in 0..100 {
        let middle = f64::midpoint(short, long);
        let grown = (1.0 - (-late / middle).exp()) / (1.0 - (-early / middle).exp());
        if grown < growth { short = middle } else { long = middle }
    }
    f64::midpoint(short, long)
}

fn seconds(s: f64) -> Duration {
    Duration::try_from_secs_f64(s).unwrap_or(Duration::MAX)
}

#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "it saturates")]
fn whole(number: f64) -> u64 {
    number as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: fn(u64) -> Duration = Duration::from_millis;

    /// A GiB of pages of 2 KiB each over 1 Gbit/s and a millisecond, with these looks.
    fn sampled(written: &[(u64, u64)]) -> Sampled {
        Sampled {
            pages: 1 << 18,
            rate_bytes_per_s: 125e6,
            bytes_per_page: 2048.0,
            round_trip: MS(1),
            written: written.iter().map(|&(ms, pages)| (MS(ms), pages)).collect(),
            around: 0,
        }
    }

    #[test]
    fn what_is_written_grows_steadily_until_a_look_says_otherwise() {
        let s = sampled(&[(100, 1000), (200, 2000)]);
        assert_eq!(s.written_within(MS(1000)), 10_000.0);
        assert_eq!(s.written_within(MS(1_000_000)), f64::from(1 << 18), "no more than there are");
        // 5000 pages, all of them within some 100 ms.
        let known = |ms: u64| 5000.0 * (1.0 - (-(ms as f64) / 50.0).exp());
        let (half, all) = ((100, whole(known(100))), (200, whole(known(200))));
        let s = sampled(&[half, all]);
        for ms in [10, 50, 100, 1000, 100_000] {
            let (is, told) = (known(ms), s.written_within(MS(ms)));
            assert!((is - told).abs() < 10.0, "{ms} ms: {is} pages, {told} foretold");
        }
        // Of several looks, the last one and that at half its time tell.
        let more = sampled(&[(10, 7), half, (190, 11), all]);
        assert_eq!(more.written_within(MS(77)), s.written_within(MS(77)));
        assert_eq!(sampled(&[]).written_within(MS(9)), 0.0);
        assert_eq!(sampled(&[(50, 0), (100, 0)]).written_within(MS(9)), 0.0);
        assert_eq!(sampled(&[(100, 50)]).written_within(MS(200)), 100.0, "one look is a rate");
        // No more in the second half: all of it was written in the first.
        assert!(
            (sampled(&[(100, 700), (200, 700)]).written_within(MS(50_000)) - 700.0).abs() < 1.0
        );
    }

    #[test]
    fn a_quiet_guest_takes_what_its_pages_take_on_the_link() {
        let told = sampled(&[(100, 0), (200, 0)]).forecast(Goals::default(), Mode::Auto, None);
        // 512 MiB at 125 MB/s.
        assert!((told.total.as_secs_f64() - 4.295).abs() < 0.01, "{told:?}");
        assert_eq!((told.mode, told.rounds, told.misses), (Mode::PreCopy, 1, None));
        assert!(
            told.downtime <= MS(4) && told.bytes == 1 << 29,
            "{:?} {}",
            told.downtime,
            told.bytes
        );
    }

    #[test]
    fn what_is_dirty_at_the_end_goes_while_the_guest_stands_still() {
        let told = sampled(&[(100, 2), (200, 4)]).forecast(Goals::default(), Mode::Auto, None);
        assert_eq!((told.mode, told.rounds), (Mode::PreCopy, 1));
        // 20 pages a second, for 4.3 seconds: half of them before they were sent.
        let last = told.bytes - (1 << 29);
        assert!((42 * 2048..44 * 2048).contains(&last), "{last} bytes");
    }

    #[test]
    fn each_mode_is_told_for_itself() {
        // 100,000 pages a second: more than the link carries.
        let s = sampled(&[(100, 10_000), (200, 20_000)]);
        let goals = Goals { max_total: Duration::from_secs(20), ..Goals::default() };
        let auto = s.forecast(goals, Mode::Auto, None);
        assert_eq!((auto.mode, auto.misses.as_deref()), (Mode::Hybrid, None));
        assert!(auto.fetching > Duration::from_secs(1) && auto.rounds == 1, "{auto:?}");
        let post = s.forecast(goals, Mode::PostCopy, None);
        // All pages, at 125 MB/s.
        let fetching = post.fetching.as_secs_f64() - 0.001;
        assert!(
            post.total < MS(10) && (fetching - (1 << 29) as f64 / 125e6).abs() < 1e-3,
            "{post:?}"
        );
        assert_eq!(post.bytes, 1 << 29);
        let rounds = s.forecast(goals, Mode::PreCopy, None);
        let why = rounds.misses.expect("it never ends");
        assert!(why.contains("--max-total") && why.contains("needs a link of"), "{why}");
        // Held back, it does.
        let slow = Goals { max_slowdown: 90, ..goals };
        let slow = s.forecast(slow, Mode::PreCopy, None);
        assert!(slow.misses.is_none() && slow.slowed > 50, "{slow:?}");
        assert!(s.forecast(goals, Mode::Hybrid, Some("no userfaultfd")).misses.is_some());
        let none = s.forecast(goals, Mode::Auto, Some("no userfaultfd"));
        assert!(none.mode == Mode::PreCopy && none.misses.is_some(), "{none:?}");
    }

    #[test]
    fn what_a_round_would_send_in_vain_is_sent_once() {
        // 5000 pages, all of them written every 10 ms, in 8192 around them.
        let s = sampled(&[(100, 5000), (200, 5000)]);
        let around = Sampled { around: 8192, ..s.clone() };
        let bytes = |s: &Sampled, mode| s.forecast(Goals::default(), mode, None).bytes;
        for mode in [Mode::Auto, Mode::Hybrid] {
            assert_eq!(bytes(&around, mode), around.pages * 2048, "{mode:?}");
            assert!(bytes(&s, mode) > s.pages * 2048, "{mode:?}");
        }
        // Nor left out where nothing can be sent later, or where nothing else is to be sent, or where a round pays.
        let policy = |mode| Policy::new(Goals::default(), mode);
        assert_eq!(around.left_out(&policy(Mode::PreCopy)), 0);
        let all = Sampled { around: s.pages, ..s };
        assert_eq!(all.left_out(&policy(Mode::Auto)), 0);
        let calm = Sampled { around: 8192, ..sampled(&[(100, 100), (200, 200)]) };
        assert_eq!(calm.left_out(&policy(Mode::Auto)), 0);
    }

    #[test]
    fn rounds_that_are_made_and_their_last_pages_are_counted() {
        // 10,000 pages a second, of 61,000 that the link carries.
        let s = sampled(&[(100, 1000), (200, 2000)]);
        let told = s.forecast(Goals::default(), Mode::PreCopy, None);
        assert!(told.misses.is_none() && told.rounds > 2, "{told:?}");
        // The sum of what is left of each round, at that ratio, of which the first one sent half again.
        let ratio = 10_000.0 * 2048.0 / 125e6;
        let bytes = (1u64 << 29) as f64 * (1.0 + ratio / 2.0 / (1.0 - ratio));
        let off = told.bytes as f64 / bytes - 1.0;
        assert!(off.abs() < 0.01, "{} bytes, and {bytes:.0} are right", told.bytes);
        let took = told.total.as_secs_f64() / (bytes / 125e6) - 1.0;
        assert!((0.0..0.01).contains(&took), "{told:?}");
    }

    #[test]
    fn a_round_of_a_set_that_is_written_over_and_over_leaves_most_of_it() {
        // 5000 pages, each written about each 50 ms; a thousand pages take 16 ms.
        let known = |ms: f64| 5000.0 * (1.0 - (-ms / 50.0).exp());
        let s = sampled(&[(100, whole(known(100.0))), (200, whole(known(200.0)))]);
        let near =
            |told: u64, is: f64| assert!((told as f64 - is).abs() < 0.02 * is, "{told}, {is}");
        // All memory: the set goes last, and takes 83 ms.
        let took = 5000.0 * 2048.0 / 125e3 + 1.0;
        let again = 5000.0 - known(took) * 50.0 / took;
        near(s.left_by(s.pages, 0), again);
        near(s.left_by(5000, 0), again);
        // Half of it takes half the time, and the other half is written meanwhile.
        let took = 2500.0 * 2048.0 / 125e3 + 1.0;
        let again = 5000.0 - known(took) * 50.0 / took;
        near(s.left_by(2500, 0), f64::midpoint(again, known(took)));
        // Held back, the guest writes as much in twice the time.
        assert!(s.left_by(2500, 50) < s.left_by(2500, 0) * 2 / 3);
        assert_eq!((s.left_by(0, 0), sampled(&[]).left_by(7, 0)), (0, 0));
    }

    #[test]
    fn a_forecast_of_rounds_without_end_ends() {
        let years = Duration::from_secs(1 << 30);
        let goals = Goals { max_total: years, ..Goals::default() };
        let told = sampled(&[(100, 10_000), (200, 20_000)]).forecast(goals, Mode::PreCopy, None);
        assert!(told.rounds == MAX_ROUNDS && told.misses.is_some(), "{told:?}");
    }

    #[test]
    fn goals_that_no_mode_meets_are_named() {
        let far = Sampled { round_trip: MS(100), ..sampled(&[(100, 0), (200, 0)]) };
        let goals = Goals { max_total: Duration::from_secs(2), ..Goals::default() };
        let told = far.forecast(goals, Mode::Auto, None);
        let why = told.misses.expect("too far");
        assert!(why.contains("--max-downtime") && why.contains("--max-total"), "{why}");
    }

    #[test]
    fn pages_that_are_there_already_take_a_round_trip() {
        let there = Sampled {
            rate_bytes_per_s: 0.0,
            bytes_per_page: 0.0,
            ..sampled(&[(100, 0), (200, 0)])
        };
        for mode in [Mode::Auto, Mode::PreCopy, Mode::PostCopy, Mode::Hybrid] {
            let told = there.forecast(Goals::default(), mode, None);
            assert!(told.misses.is_none() && told.total < MS(10), "{told:?}");
            assert!(told.fetching <= MS(1), "{told:?}");
        }
    }

    #[test]
    fn a_link_that_carries_nothing_is_told_to_take_for_ever() {
        let dead = Sampled { rate_bytes_per_s: 0.0, ..sampled(&[(100, 10), (200, 20)]) };
        for mode in [Mode::Auto, Mode::PreCopy, Mode::PostCopy, Mode::Hybrid] {
            dead.forecast(Goals::default(), mode, None);
        }
    }
}
