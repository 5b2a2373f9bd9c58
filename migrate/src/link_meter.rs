//! What the link of a lane carries, seen from the end that sends.
//!
//! Buffers take the first MiBs of a round at once, whatever the link is, and it goes on to empty them while the lane
//! encodes. So what counts is what went between two waits for the link, over all the time between them. Where
//! waiting is a small part of that time, the lane holds the link back, and not the other way round: it carries
//! more than is seen.

use std::time::Duration;

/// A shorter wait is the host's, not the link's.
const WAIT: Duration = Duration::from_millis(1);
/// A lane that waits for less than this part of its time is not held back.
const HELD_BACK: u32 = 8;
/// What has to go for a rate to be told, besides what the channel may hold back.
const ENOUGH_BYTES: u64 = 2 << 20;
/// How much faster a link may be that was not waited for.
const FASTER: f64 = 4.0;

/// Sees how long each piece took and tells rates in bytes/s. All times are the caller's.
#[derive(Debug)]
pub(crate) struct LinkMeter {
    bytes_per_s: f64,
    /// What goes unhindered says nothing of the link.
    holds_bytes: u64,
    since: Duration,
    /// The link was waited for then: buffers were full.
    full: bool,
    bytes: u64,
    waited: Duration,
}

impl LinkMeter {
    /// A link that is taken for one of `bytes_per_s`, and of which a channel may hold `holds_bytes` back.
    pub(crate) fn new(bytes_per_s: f64, holds_bytes: u64) -> Self {
        let none = Duration::ZERO;
        Self { bytes_per_s, holds_bytes, since: none, full: false, bytes: 0, waited: none }
    }

    /// What the link carries, as far as is known, in bytes/s.
    pub(crate) fn bytes_per_s(&self) -> f64 {
        self.bytes_per_s
    }

    /// Nothing was sent for a while: the buffers may be empty.
    pub(crate) fn begin(&mut self, now: Duration) {
        self.restart(now, false);
    }

    /// The link had taken a piece of so many `bytes` at `now`, after waiting so long for it.
    pub(crate) fn sent(&mut self, now: Duration, waited: Duration, bytes: u64) {
        self.bytes += bytes;
        self.waited += waited;
        let took = now.saturating_sub(self.since);
        let seen = self.bytes as f64 / took.as_secs_f64().max(1e-9);
        let full = waited >= WAIT;
        if full && self.full && self.bytes >= ENOUGH_BYTES && self.waited >= took / HELD_BACK {
            self.bytes_per_s = seen;
        } else if self.bytes >= self.holds_bytes + ENOUGH_BYTES {
            self.bytes_per_s = seen.max(self.bytes_per_s) * FASTER;
        } else if self.full || !full {
            return;
        }
        self.restart(now, full);
    }

    fn restart(&mut self, now: Duration, full: bool) {
        (self.since, self.full, self.bytes, self.waited) = (now, full, 0, Duration::ZERO);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;
    const FIRST: f64 = 125e6;

    /// A link of `rate` bytes/s behind a buffer, and a lane that makes pieces of 256 KiB, each in `busy`.
    struct Sending {
        meter: LinkMeter,
        now: Duration,
        rate: f64,
        buffered: f64,
    }

    impl Sending {
        const BUFFER: f64 = 4.0 * MIB as f64;
        const PIECE: u64 = MIB / 4;
        const HELD: u64 = 4 * MIB;

        fn over(rate: f64) -> Self {
            Self {
                meter: LinkMeter::new(FIRST, Sending::HELD),
                now: Duration::ZERO,
                rate,
                buffered: 0.0,
            }
        }

        /// After a pause in which the buffer emptied.
        fn begin(&mut self) {
            self.now += Duration::from_secs(1);
            self.buffered = 0.0;
            self.meter.begin(self.now);
        }

        fn send(&mut self, bytes: u64, busy: Duration) -> f64 {
            for _ in 0..bytes / Self::PIECE {
                self.pass(busy);
                // The buffer asks for more when a third of it is free.
                let over = self.buffered + Self::PIECE as f64 - Self::BUFFER;
                let wait = if over > 0.0 { (over + Self::BUFFER / 3.0) / self.rate } else { 0.0 };
                let wait = Duration::from_secs_f64(wait);
                self.pass(wait);
                self.buffered += Self::PIECE as f64;
                self.meter.sent(self.now, wait, Self::PIECE);
            }
            self.meter.bytes_per_s()
        }

        fn pass(&mut self, time: Duration) {
            self.now += time;
            self.buffered = (self.buffered - self.rate * time.as_secs_f64()).max(0.0);
        }
    }

    const QUICK: Duration = Duration::from_micros(200);

    #[test]
    fn what_buffers_take_does_not_count() {
        let mut sending = Sending::over(50e6);
        sending.begin();
        assert_eq!(sending.send(4 * MIB, QUICK), FIRST, "it was not made to wait yet");
        for _ in 0..10 {
            let seen = sending.send(16 * MIB, QUICK);
            assert!((48e6..52e6).contains(&seen), "{seen}");
            sending.begin();
            // Nor after each pause.
            let seen = sending.send(7 * MIB, QUICK);
            assert!((48e6..52e6).contains(&seen), "{seen}");
        }
    }

    #[test]
    fn a_link_is_as_fast_while_the_lane_encodes() {
        // A piece each 2 ms would be 131 MB/s; the link carries 100.
        let mut sending = Sending::over(100e6);
        sending.begin();
        let seen = sending.send(64 * MIB, Duration::from_millis(2));
        assert!((96e6..104e6).contains(&seen), "{seen}");
    }

    #[test]
    fn a_link_that_is_not_waited_for_carries_more_than_it_is_given() {
        let mut sending = Sending::over(10e9);
        sending.begin();
        // 26 MB/s are given: nothing says that it is slower than it was thought to be.
        let seen = sending.send(8 * MIB, Duration::from_millis(10));
        assert_eq!(seen, FIRST * FASTER);
        let given = 262_144.0 / QUICK.as_secs_f64();
        let seen = sending.send(16 * MIB, QUICK);
        assert!(seen > given, "{seen}");
        // Waits that are a small part of the time say no more.
        let mut meter = LinkMeter::new(FIRST, Sending::HELD);
        meter.sent(Duration::from_millis(10), WAIT, MIB);
        meter.sent(Duration::from_millis(510), WAIT, 5 * MIB);
        assert_eq!(meter.bytes_per_s(), FIRST);
        meter.sent(Duration::from_millis(610), WAIT, 3 * MIB);
        assert_eq!(meter.bytes_per_s(), FIRST * FASTER);
    }

    #[test]
    fn a_change_is_seen() {
        let mut sending = Sending::over(400e6);
        sending.begin();
        let seen = sending.send(32 * MIB, QUICK);
        assert!((390e6..410e6).contains(&seen), "{seen}");
        sending.rate = 40e6;
        let seen = sending.send(16 * MIB, QUICK);
        assert!((39e6..41e6).contains(&seen), "{seen}");
    }
}
