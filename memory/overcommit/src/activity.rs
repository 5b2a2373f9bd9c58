//! How much of its memory a machine uses, from looks that differ: soon believed if it is more, late if it is less.
//!
//! As in Waldspurger's paper (section 5.3): a slow and a fast moving average and the look itself; the largest
//! counts. So a machine that becomes busy is seen at once, and one that pauses keeps its memory for a while.

use std::time::Duration;

/// Time constants of the averages.
const FAST: Duration = Duration::from_secs(10);
const SLOW: Duration = Duration::from_secs(60);

/// Active memory of one machine, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Activity {
    now: u64,
    fast: u64,
    slow: u64,
    /// Pages that come back from swap, in bytes a second: a fast average.
    back: u64,
    looked_at: Option<Duration>,
}

impl Activity {
    /// A look at time `at`: so many bytes are active of those in memory, so many are swapped, and so many of them come
    /// back in a second. What came back lately tells how many more will.
    pub(crate) fn look(&mut self, at: Duration, active: u64, swapped: u64, back_per_s: u64) {
        let passed = self.looked_at.replace(at).map(|before| at.saturating_sub(before));
        let first = passed.is_none();
        let average = |before: u64, new: u64, over: Duration| {
            let (old, passed) = (over.as_millis(), passed.unwrap_or_default().as_millis());
            let sum = u128::from(before) * old + u128::from(new) * passed;
            u64::try_from(sum / (old + passed)).unwrap_or(u64::MAX)
        };
        self.back = average(self.back, back_per_s, FAST);
        let coming = self.back.saturating_mul(FAST.as_secs()).min(swapped);
        self.now = active.saturating_add(coming);
        for (known, over) in [(&mut self.fast, FAST), (&mut self.slow, SLOW)] {
            *known = if first { self.now } else { average(*known, self.now, over) };
        }
    }

    pub(crate) fn bytes(&self) -> u64 {
        self.now.max(self.fast).max(self.slow)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn more_is_believed_at_once_and_less_over_a_minute() {
        let mut activity = Activity::default();
        let mut at = Duration::ZERO;
        let mut look = |bytes, times| {
            for _ in 0..times {
                at += Duration::from_secs(1);
                activity.look(at, bytes, 0, 0);
            }
            activity.bytes()
        };
        assert_eq!(look(100, 1), 100);
        assert_eq!(look(1000, 1), 1000);
        let after_one_more = look(0, 1);
        assert!(
            (150..200).contains(&after_one_more),
            "a single look is not yet a habit: {after_one_more}"
        );
        assert_eq!(look(1000, 300), 1000);
        let (soon, late) = (look(0, 10), look(0, 290));
        assert!(soon > 700, "{soon}");
        assert!(late < 20, "{late}");
    }

    #[test]
    fn what_comes_back_from_swap_counts_by_what_came_in_the_last_seconds_and_no_more_than_is_swapped()
     {
        let mut activity = Activity::default();
        let mut bytes = |second, swapped, back| {
            activity.look(Duration::from_secs(second), 100, swapped, back);
            activity.bytes()
        };
        assert_eq!(bytes(0, 5000, 0), 100);
        let once = bytes(1, 5000, 330);
        assert_eq!(once, 100 + 300, "of a second, not of ten");
        let all = (2..100).map(|second| bytes(second, 5000, 330)).max();
        assert!(all.is_some_and(|all| (3300..=3400).contains(&all)), "{all:?}");
        assert!(bytes(100, 700, 330) < 3400);
        assert_eq!((101..1000).map(|second| bytes(second, 700, 330)).last(), Some(800));
    }
}
