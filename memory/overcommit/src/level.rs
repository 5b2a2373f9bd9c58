//! How short memory is, with hysteresis.
//!
//! As in ESX: reclaiming begins at one mark and ends at the next higher one, so that it does not begin and end
//! by turns. The marks of free memory are 6, 4, 2 and 1 sixths of the headroom (with the usual headroom:
//! percents of the budget). Waiting tasks (PSI) count as well: memory may be free and yet in the wrong place.
//!
//! ```text
//!   free ≥   6/6      4/6       2/6       1/6
//!        high │  soft  │  hard   │   low        coming from above: soft below 4/6, hard below 2/6, low below 1/6
//!             └────────┴─────────┴────────      coming from below: high from 6/6, soft from 4/6, hard from 2/6
//! ```

use serde::Serialize;

use crate::machine::Pressure;

/// How short memory is, and so what is done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Level {
    /// Enough is free: nothing is taken.
    #[default]
    High,
    /// Balloons are inflated; where they do not deliver, pages are merged, then swapped.
    Soft,
    /// Pages are swapped in any case, beside the balloons.
    Hard,
    /// All that is too much is swapped at once.
    Low,
}

/// Percent of the time in which tasks waited: from where it counts, and below where no more.
const WAITED: (f64, f64) = (10.0, 5.0);

impl Level {
    /// The next level, from this one.
    pub(crate) fn next(self, free_bytes: u64, headroom_bytes: u64, pressure: Pressure) -> Self {
        let below = |sixths: u64| {
            u128::from(free_bytes) * 6 < u128::from(headroom_bytes) * u128::from(sixths)
        };
        let of = |soft, hard, low| match (below(soft), below(hard), below(low)) {
            (.., true) => Self::Low,
            (_, true, _) => Self::Hard,
            (true, ..) => Self::Soft,
            _ => Self::High,
        };
        let waited = |percent| match pressure {
            Pressure { full, .. } if full >= percent => Self::Hard,
            Pressure { some, .. } if some >= percent => Self::Soft,
            _ => Self::High,
        };
        let at_least = of(4, 2, 1).max(waited(WAITED.0));
        let at_most = of(6, 4, 2).max(waited(WAITED.1));
        self.clamp(at_least, at_most)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_level_is_left_at_a_higher_mark_than_it_is_entered_at() {
        let mut level = Level::High;
        for (free, expected) in [
            (70, Level::High),
            (40, Level::High),
            (39, Level::Soft),
            (59, Level::Soft),
            (60, Level::High),
            (19, Level::Hard),
            (39, Level::Hard),
            (40, Level::Soft),
            (9, Level::Low),
            (19, Level::Low),
            (20, Level::Hard),
            (60, Level::High),
            (0, Level::Low),
        ] {
            level = level.next(free, 60, Pressure::default());
            assert_eq!(level, expected, "free {free}");
        }
    }

    #[test]
    fn waiting_tasks_count_until_they_wait_half_as_long() {
        let mut level = Level::High;
        for (some, full, expected) in [
            (9.0, 0.0, Level::High),
            (10.0, 0.0, Level::Soft),
            (5.0, 0.0, Level::Soft),
            (4.0, 0.0, Level::High),
            (90.0, 10.0, Level::Hard),
            (90.0, 4.0, Level::Soft),
            (0.0, 0.0, Level::High),
        ] {
            level = level.next(100, 60, Pressure { some, full });
            assert_eq!(level, expected, "some {some} full {full}");
        }
    }
}
