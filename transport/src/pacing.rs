//! How fast bytes may leave (pure): a token bucket whose rate can change at any time.

use std::time::Duration;

/// Holds a sender to a rate.
///
/// A sender asks for the delay of each piece before it sends it, and waits that long. Several senders
/// may share one: each piece waits until the ones before it are paid for. Time is any clock that does
/// not go back.
#[derive(Clone, Debug)]
pub struct Pacer {
    /// Bytes per second; None: no limit.
    rate: Option<f64>,
    burst_bytes: f64,
    /// Bytes that may leave now; below zero: bytes that are owed.
    tokens: f64,
    /// When `tokens` was right.
    at: Duration,
}

impl Pacer {
    /// A pacer at `rate` bytes per second (None or 0: no limit), which lets `burst_bytes` pass at once
    /// after a silence.
    pub fn new(rate: Option<u64>, burst_bytes: u64) -> Self {
        let burst_bytes = burst_bytes as f64;
        Self { rate: limit(rate), burst_bytes, tokens: burst_bytes, at: Duration::ZERO }
    }

    /// Changes the rate from `now` on. What is owed stays owed, at the new rate.
    pub fn set_rate(&mut self, now: Duration, rate: Option<u64>) {
        self.settle(now);
        self.rate = limit(rate);
    }

    /// Takes `bytes` from the bucket at time `now`; returns how long to wait before sending them.
    pub fn delay(&mut self, now: Duration, bytes: u64) -> Duration {
        self.settle(now);
        let Some(rate) = self.rate else { return Duration::ZERO };
        // Waiting for what is owed already, not for these bytes: a piece larger than the burst passes.
        let owed = -self.tokens;
        self.tokens -= bytes as f64;
        Duration::try_from_secs_f64((owed.max(0.0)) / rate).unwrap_or(Duration::MAX)
    }

    fn settle(&mut self, now: Duration) {
        let passed = now.saturating_sub(self.at).as_secs_f64();
        self.at = self.at.max(now);
        self.tokens = match self.rate {
            Some(rate) => (self.tokens + passed * rate).min(self.burst_bytes),
            None => self.burst_bytes,
        };
    }
}

fn limit(rate: Option<u64>) -> Option<f64> {
    rate.filter(|rate| *rate > 0).map(|rate| rate as f64)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Sends `pieces` of `bytes` as told; returns when the last one left.
    fn send(pacer: &mut Pacer, mut now: Duration, pieces: u32, bytes: u64) -> Duration {
        for _ in 0..pieces {
            now += pacer.delay(now, bytes);
        }
        now
    }

    #[test]
    fn bytes_leave_at_the_rate() {
        let mut pacer = Pacer::new(Some(1_000_000), 0);
        let end = send(&mut pacer, Duration::ZERO, 101, 10_000);
        assert!((end.as_secs_f64() - 1.0).abs() < 1e-6, "{end:?}");
    }

    #[test]
    fn a_silence_saves_up_no_more_than_the_burst() {
        let mut pacer = Pacer::new(Some(1_000_000), 50_000);
        let start = Duration::from_secs(3600);
        let end = send(&mut pacer, start, 11, 10_000);
        assert!((end - start).as_secs_f64() < 0.051, "{end:?}");
        let end = send(&mut pacer, end, 100, 10_000) - end;
        assert!((end.as_secs_f64() - 1.0).abs() < 0.06, "{end:?}");
    }

    #[test]
    fn a_changed_rate_holds_from_then_on() {
        let mut pacer = Pacer::new(Some(1_000_000), 0);
        let mut now = send(&mut pacer, Duration::ZERO, 11, 10_000);
        pacer.set_rate(now, Some(10_000_000));
        let before = now;
        now = send(&mut pacer, now, 100, 100_000);
        let took = (now - before).as_secs_f64();
        assert!((0.98..1.0).contains(&took), "{took}");
        pacer.set_rate(now, None);
        assert_eq!(pacer.delay(now, u64::MAX), Duration::ZERO);
    }

    #[test]
    fn senders_that_share_it_share_the_rate() {
        let mut pacer = Pacer::new(Some(1_000_000), 0);
        let mut clocks = [Duration::ZERO; 4];
        for _ in 0..100 {
            // The one that is free first asks next.
            clocks.sort();
            let now = clocks[0];
            clocks[0] = now + pacer.delay(now, 10_000);
        }
        let end = clocks.iter().max().unwrap().as_secs_f64();
        assert!((0.9..=1.0).contains(&end), "{end}");
    }
}
