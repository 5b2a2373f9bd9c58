//! How much of their time threads waited, as time went by: when they were nearly at full speed.

use std::time::Duration;

/// A machine is at 90 % of full speed if its threads wait for less than one part in ten of their time …
const SLOW_PART: u128 = 10;
/// … in every stretch of so many [buckets](WaitedTime): of 50 ms at first.
const WINDOW: usize = 5;
/// Buckets kept: 41 s of the finest. 32 KiB.
const MOST: usize = 4096;
const FINEST: Duration = Duration::from_millis(10);

/// Time that threads waited, in buckets of time: of 10 ms, and twice as wide whenever there would be too
/// many of them.
#[derive(Clone, Debug)]
pub struct WaitedTime {
    width: Duration,
    buckets: Vec<Duration>,
}

impl Default for WaitedTime {
    fn default() -> Self {
        Self { width: FINEST, buckets: Vec::new() }
    }
}

impl WaitedTime {
    /// A thread waited from `since` until `until`, by any clock that begins at 0.
    pub fn add(&mut self, since: Duration, until: Duration) {
        if since >= until {
            return;
        }
        while self.bucket(until) >= MOST {
            self.buckets = self.buckets.chunks(2).map(|pair| pair.iter().sum()).collect();
            self.width *= 2;
        }
        let (first, last) = (self.bucket(since), self.bucket(until));
        self.buckets.resize(self.buckets.len().max(last + 1), Duration::ZERO);
        let mut from = self.width.saturating_mul(u32::try_from(first).unwrap_or(u32::MAX));
        for bucket in &mut self.buckets[first..=last] {
            let to = from + self.width;
            *bucket += until.min(to).saturating_sub(since.max(from));
            from = to;
        }
    }

    /// The earliest time from which on `threads` threads waited for less than a tenth of their time, all
    /// taken together, in every stretch of 50 ms (after 41 s: of five buckets). Zero if they never waited
    /// more.
    pub fn full_speed_after(&self, threads: u32) -> Duration {
        let stretch = self.width.as_nanos() * WINDOW as u128;
        let least = stretch * u128::from(threads.max(1)) / SLOW_PART;
        let slow = |first: &usize| {
            let waited: Duration = self.buckets[*first..].iter().take(WINDOW).sum();
            waited.as_nanos() >= least
        };
        let last = (0..self.buckets.len()).rev().find(slow);
        last.map_or(Duration::ZERO, |last| {
            self.width.saturating_mul(u32::try_from(last + 1).unwrap_or(u32::MAX))
        })
    }

    /// Number of the bucket of `at`.
    fn bucket(&self, at: Duration) -> usize {
        usize::try_from(at.as_nanos() / self.width.as_nanos()).unwrap_or(usize::MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    #[test]
    fn full_speed_begins_after_the_last_stretch_in_which_threads_waited_a_tenth_of_their_time() {
        // Waits as from and until in ms, threads, from when on in ms.
        type Waits = &'static [(u64, u64)];
        let cases: [(Waits, u32, u64); 7] = [
            (&[], 1, 0),
            // 4 ms of 50 are less than a tenth; 5 are not, wherever in the stretch they are.
            (&[(100, 104)], 1, 0),
            (&[(100, 105)], 1, 110),
            (&[(100, 102), (143, 146)], 1, 110),
            // Two threads have twice the time.
            (&[(100, 105)], 2, 0),
            (&[(100, 105), (100, 105)], 2, 110),
            // A pause between waits is not the end of them; a short wait later is none.
            (&[(0, 300), (800, 1000), (2000, 2001)], 1, 1000),
        ];
        for (waits, threads, expected) in cases {
            let mut waited = WaitedTime::default();
            waits.iter().for_each(|(since, until)| waited.add(ms(*since), ms(*until)));
            assert_eq!(waited.full_speed_after(threads), ms(expected), "{waits:?}, {threads}");
        }
    }

    #[test]
    fn waits_of_days_are_kept_in_bounded_memory_and_none_is_lost() {
        let mut waited = WaitedTime::default();
        let (mut sum, mut at) = (Duration::ZERO, ms(3));
        for step in 1..200_u64 {
            let wait = ms(step * step * 7 % 90_001);
            waited.add(at, at + wait);
            sum += wait;
            at += wait + ms(step * 6_007);
        }
        assert_eq!(waited.buckets.iter().sum::<Duration>(), sum);
        assert!(waited.buckets.len() <= MOST && at > ms(86_400_000));
        waited.add(at, at + ms(3_600_000));
        at += ms(3_600_000);
        let after = waited.full_speed_after(1);
        assert!(after <= at + waited.width && after + 2 * waited.width >= at, "{after:?}");
        // A clock that goes back, and one at its end.
        waited.add(ms(5), ms(4));
        waited.add(Duration::ZERO, Duration::from_secs(1 << 40));
        assert!(waited.buckets.len() <= MOST);
    }
}
