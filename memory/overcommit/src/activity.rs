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
    looked_at: Option<Duration>,
}

impl Activity {
    /// A look at time `at` found so many active bytes.
    pub(crate) fn look(&mut self, at: Duration, active_bytes: u64) {
        self.now = active_bytes;
        let Some(before) = self.looked_at.replace(at) else {
            (self.fast, self.slow) = (active_bytes, active_bytes);
            return;
        };
        let passed = at.saturating_sub(before);
        for (average, over) in [(&mut self.fast, FAST), (&mut self.slow, SLOW)] {
            let (old, new) = (over.as_millis(), passed.as_millis());
            let sum = u128::from(*average) * old + u128::from(active_bytes) * new;
            *average = u64::try_from(sum / (old + new)).unwrap_or(u64::MAX);
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
                activity.look(at, bytes);
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
}
