//! Which page comes next, and when.

use super::{PAGE_BYTES, Params, Pattern, stamp::mix};

/// The pages of the arena that one vCPU owns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Part {
    /// Index of the first.
    pub first: u64,
    /// How many.
    pub pages: u64,
}

impl Part {
    /// Part `cpu` of `cpus` of an arena of `arena_pages` (below 2^32).
    pub const fn of(cpu: u32, cpus: u32, arena_pages: u64) -> Self {
        let first = arena_pages * cpu as u64 / cpus as u64;
        Self { first, pages: arena_pages * (cpu as u64 + 1) / cpus as u64 - first }
    }
}

/// A vCPU's place in its pattern.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Walk {
    /// Visits so far, for the patterns that go on in order.
    pub position: u64,
    /// State of the random numbers; not 0.
    pub rng: u64,
}

impl Walk {
    /// The beginning, for vCPU `cpu`.
    pub const fn new(seed: u64, cpu: u32) -> Self {
        Self { position: 0, rng: mix(mix(seed) ^ cpu as u64) | 1 }
    }

    /// The next page of `part` (not empty); `None` when there is nothing to do.
    pub fn next(&mut self, params: &Params, part: Part) -> Option<u64> {
        match params.pattern {
            Pattern::Idle => None,
            Pattern::Sequential | Pattern::Read => {
                if self.position >= part.pages {
                    self.position = 0;
                }
                self.position += 1;
                Some(part.first + self.position - 1)
            }
            Pattern::Random | Pattern::RandomRead => Some(part.first + self.below(part.pages)),
            Pattern::WorkingSet => {
                let set = params.set_bytes / PAGE_BYTES / u64::from(params.cpus);
                Some(part.first + self.below(set.clamp(1, part.pages)))
            }
            Pattern::MovingSet => {
                let set = params.set_bytes / PAGE_BYTES / u64::from(params.cpus);
                self.position = self.position.wrapping_add(1);
                // It moves on by a page each `dwell` visits, and is past a page after `set` times that.
                let begin = self.position / params.dwell.max(1) % part.pages;
                Some(part.first + (begin + self.below(set.clamp(1, part.pages))) % part.pages)
            }
        }
    }

    /// A number below `bound` (Lemire 2019, without the rejection: bounds are far below 2^64).
    fn below(&mut self, bound: u64) -> u64 {
        // xorshift64 (Marsaglia 2003).
        self.rng ^= self.rng << 13;
        self.rng ^= self.rng >> 7;
        self.rng ^= self.rng << 17;
        ((u128::from(mix(self.rng)) * u128::from(bound)) >> 64) as u64
    }
}

/// Spreads visits over time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pace {
    interval: u64,
    slack: u64,
    due: u64,
}

impl Pace {
    /// One vCPU's share of the rate, from `now`, on a clock of `ticks_per_second`; no limit where
    /// either is 0.
    pub fn new(params: &Params, ticks_per_second: u64, now: u64) -> Self {
        let interval = (ticks_per_second.saturating_mul(u64::from(params.cpus)))
            .checked_div(params.rate)
            .unwrap_or(0);
        Self { interval, slack: (ticks_per_second / 50).max(interval), due: now }
    }

    /// Whether a visit is due; if so, counts it.
    ///
    /// Being late is made up for up to 20 ms: a guest that stood still does not race afterwards. A
    /// clock that was set back does not stop it.
    pub fn due(&mut self, now: u64) -> bool {
        if self.interval == 0 {
            return true;
        }
        if self.due > now.saturating_add(self.slack) || self.due.saturating_add(self.slack) < now {
            self.due = now;
        }
        let due = self.due <= now;
        if due {
            self.due += self.interval;
        }
        due
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn params(words: &str) -> Params {
        Params::parse(words).unwrap()
    }

    #[test]
    fn parts_are_disjoint_and_cover_the_arena() {
        for pages in [32, 33, 1000, (1 << 32) - 1] {
            for cpus in 1..=32 {
                let mut next = 0;
                for cpu in 0..cpus {
                    let part = Part::of(cpu, cpus, pages);
                    assert_eq!(part.first, next);
                    assert!(part.pages > 0);
                    next += part.pages;
                }
                assert_eq!(next, pages);
            }
        }
    }

    #[test]
    fn every_pattern_stays_in_its_part_and_reaches_all_of_it() {
        let part = Part { first: 100, pages: 50 };
        for (words, reach) in [
            ("pattern=sequential", 50),
            ("pattern=read", 50),
            ("pattern=random", 50),
            ("pattern=working-set set=40K cpus=2", 5),
            ("pattern=working-set set=1G", 50),
            ("pattern=working-set set=4K cpus=2", 1),
            ("pattern=moving-set set=40K cpus=2", 50),
            ("pattern=moving-set set=1G", 50),
        ] {
            let mut walk = Walk::new(3, 1);
            let seen: std::collections::BTreeSet<_> =
                (0..5000).filter_map(|_| walk.next(&params(words), part)).collect();
            assert_eq!(seen.len(), reach, "{words}");
            assert!(seen.iter().all(|i| (100..150).contains(i)), "{words}");
        }
        assert_eq!(Walk::new(3, 1).next(&params("pattern=idle"), part), None);
    }

    #[test]
    fn a_moving_set_leaves_pages_behind_after_so_many_visits_and_comes_round() {
        let (params, part) =
            (params("pattern=moving-set set=40K dwell=200"), Part { first: 100, pages: 50 });
        let mut walk = Walk::new(3, 0);
        let mut visits = |pages: u64| {
            let mut visits = [0; 50];
            for _ in 0..pages * 200 {
                let page = walk.next(&params, part).unwrap() - part.first;
                visits[usize::try_from(page).unwrap()] += 1;
            }
            visits
        };
        let early = visits(20);
        assert!(early[30..].iter().all(|n| *n == 0), "{early:?}");
        assert!(early[10..20].iter().all(|n| (100..400).contains(n)), "{early:?}");
        let later = visits(20);
        assert!(later[..20].iter().all(|n| *n == 0), "{later:?}");
        assert!(visits(20)[..10].iter().any(|n| *n > 0));
    }

    #[test]
    fn the_rate_is_kept_and_standing_still_is_not_made_up_for() {
        // 1000 pages/s on 2 vCPUs, clock of 1 MHz, asked every 1 ms.
        let mut pace = Pace::new(&params("cpus=2 rate=1000"), 1_000_000, 0);
        let mut count = |from: u64, to: u64| {
            (from..to)
                .step_by(1000)
                .map(|now| {
                    let mut n = 0;
                    while pace.due(now) {
                        n += 1;
                    }
                    n
                })
                .sum::<u64>()
        };
        assert!((495..=505).contains(&count(0, 1_000_000)));
        let after_a_stop = count(61_000_000, 62_000_000);
        assert!((495..=515).contains(&after_a_stop), "{after_a_stop}");
        let clock_set_back = count(0, 1_000_000);
        assert!((495..=515).contains(&clock_set_back), "{clock_set_back}");
        let mut unlimited = Pace::new(&params("rate=0"), 1_000_000, 0);
        assert!((0..1000).all(|_| unlimited.due(0)));
    }
}
