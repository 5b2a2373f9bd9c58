//! How fast the background may push without building a queue in front of pages that a thread waits for.
//!
//! A sender that never exceeds the link leaves no queue; one that never reaches it wastes it. Between the
//! two there is only one signal that comes before loss: delay. For each acknowledged batch
//!
//! ```text
//!   round trip  =  base  +  bytes ÷ capacity  +  queue
//! ```
//!
//! `base` is what the smallest round trip of the last seconds leaves, `capacity` the rate at which
//! acknowledgements came (as BBR measures it: Cardwell et al., ACM Queue 14(5), 2016), and what remains
//! is the queue. Once a *window* (a round trip, at least [`SHORTEST_WINDOW_S`]) the rate becomes
//!
//! ```text
//!   rate  =  capacity × (1 + (target ÷ 2 − queue) ÷ (4 × window))
//! ```
//!
//! A queue grows by the share that the rate is above capacity, so this undoes a quarter of the error in
//! each window, and does not swing although an effect is seen a window late. While there is no queue at
//! all, the rate exceeds that by a share that doubles in each window, from 1/32 to 1: the fast start, and
//! the way to a link that became faster.
//!
//! # Late threads
//! An acknowledgement may be late because a thread was: its reader's at the destination, or the one that
//! calls this. On a host whose CPUs are busy that is milliseconds, again and again. One thing tells the two
//! apart: a link never delivers faster than it carries, while a thread that comes late finds all that came
//! meanwhile. So acknowledgements in a *bunch*, closer together than a quarter of what their bytes take on
//! the link, prove that somebody was late, by what they would have taken. While that is more than the target:
//!
//! - so much more may be in flight, or the next bunch would prove no more than is let onto the link;
//! - a window ends behind a bunch: the last one of it is in time, if any is;
//! - the queue is the middle one of five windows', the capacity the best of theirs: a window may be spoilt;
//! - a sender that was late makes up for half of that.
//!
//! What it cannot see: a thread that is late for every single acknowledgement. That looks like a queue.

use std::time::Duration;

/// Pace before anything was acknowledged, bytes per second.
const START: f64 = 8.0 * 1024.0 * 1024.0;
/// It always goes on at this pace, bytes per second.
const FLOOR: f64 = 1024.0 * 1024.0;
/// The queue is to stay below this, or below a quarter of the smallest round trip, in seconds.
const TARGET_S: f64 = 150e-6;
/// Acknowledgements come in bunches: over less than this, a rate is noise.
const SHORTEST_WINDOW_S: f64 = 5e-3;
/// A smallest round trip is remembered for one to two of these, in seconds. At the end of each, one
/// window at half the rate empties the queue, so that the next smallest is without it.
const PERIOD_S: f64 = 5.0;
/// Without an acknowledgement for this long (or for four round trips), those on the way are lost.
const SILENCE_S: f64 = 1.0;
/// How many windows a queue is judged by: by the middle one, since late threads spoil some of them.
const JUDGED_WINDOWS: usize = 5;
/// More is never let into flight for late threads than the link carries in this, in seconds; and a window
/// that is longer is not spoilt.
const LATEST_S: f64 = 10e-3;
/// That threads were late is forgotten in about this, in seconds.
const LATE_FORGOTTEN_S: f64 = 50e-3;
/// The background gives way to urgent pages for no longer than this after they were sent, in seconds.
const LONGEST_DEBT_S: f64 = 0.1;
/// The least wait for room on the link, in seconds.
const SHORTEST_WAIT_S: f64 = 50e-6;

/// The pace of background pushes, from the acknowledgements of earlier ones.
///
/// Ask [`may_send`](Self::may_send) for each batch, wait that long *or until the next acknowledgement*,
/// and ask again; report what was sent and what was acknowledged. Urgent pages are sent without asking and
/// reported too. Time is any clock that does not go back.
#[derive(Clone, Debug)]
pub struct PushPace {
    /// Bytes per second; none: no limit.
    limit: Option<f64>,
    /// The link's capacity as far as it is known, bytes per second.
    capacity: f64,
    /// Whether it is more than a guess.
    measured: bool,
    /// Bytes per second.
    rate: f64,
    /// What the rate exceeds the capacity by while there is no queue.
    boost: f64,
    /// Bytes that may leave; below zero: that left too early.
    tokens: f64,
    /// When `tokens` was right, in seconds.
    settled_at: f64,
    last_sent_at: Option<f64>,
    in_flight: u64,
    /// When the last acknowledgement came, or the first of what is on its way was sent.
    heard_at: f64,
    /// Nothing came for so long that what is on its way says nothing.
    silent: bool,
    round_trip: f64,
    window: Window,
    /// The last ones' queues in seconds and rates in bytes per second, the latest first.
    judged: [(f64, f64); JUDGED_WINDOWS],
    bunch: Bunch,
    /// Twice as long as threads were seen to be late lately, in seconds.
    late: f64,
    /// The smallest round trips of this period and the one before.
    periods: [Smallest; 2],
    period_began: f64,
    drain: bool,
}

/// What was seen since the rate was last set.
#[derive(Clone, Copy, Debug)]
struct Window {
    /// When, by an acknowledgement, and when its batch was sent; none: before the first.
    began: Option<(f64, f64)>,
    /// The same of its last.
    ended: (f64, f64),
    bytes: f64,
    /// Least queue in its second half: the first half tells of the rate before.
    queue: f64,
}

const NEW_WINDOW: Window =
    Window { began: None, ended: (0.0, 0.0), bytes: 0.0, queue: f64::INFINITY };

/// Acknowledgements that came faster than the link carries.
#[derive(Clone, Copy, Debug, Default)]
struct Bunch {
    began: f64,
    /// All but the first one's.
    bytes: f64,
}

/// No queue, and no rate.
const NOTHING_JUDGED: (f64, f64) = (0.0, 0.0);

/// The smallest round trip of a period.
#[derive(Clone, Copy, Debug)]
struct Smallest {
    round_trip: f64,
    bytes: f64,
    /// The greatest capacity in the period: what the smallest round trip was made at.
    capacity: f64,
}

const NONE_YET: Smallest = Smallest { round_trip: f64::INFINITY, bytes: 0.0, capacity: FLOOR };

impl PushPace {
    /// Changes the operator's limit, as in [`new`](Self::new).
    pub fn set_limit(&mut self, limit: Option<u64>) {
        self.limit = usable(limit);
        self.rate = self.rate.min(self.limit.unwrap_or(f64::INFINITY));
    }

    /// A pace for a link of which nothing is known. `limit` is the operator's, in bytes per second, urgent
    /// pages included (none or 0: no limit).
    pub fn new(limit: Option<u64>) -> Self {
        let limit = usable(limit);
        Self {
            limit,
            capacity: START,
            measured: false,
            rate: limit.map_or(START, |limit| limit.min(START)),
            boost: 1.0,
            tokens: 0.0,
            settled_at: 0.0,
            last_sent_at: None,
            in_flight: 0,
            heard_at: 0.0,
            silent: false,
            round_trip: 0.0,
            window: NEW_WINDOW,
            judged: [NOTHING_JUDGED; JUDGED_WINDOWS],
            bunch: Bunch::default(),
            late: 0.0,
            periods: [NONE_YET; 2],
            period_began: 0.0,
            drain: false,
        }
    }

    /// How long to wait before `bytes` may be sent; zero: now. An acknowledgement may make it shorter.
    pub fn may_send(&mut self, now: Duration, bytes: u64) -> Duration {
        let now = self.settle(now);
        if self.in_flight > 0 && now - self.heard_at > SILENCE_S.max(4.0 * self.round_trip) {
            self.start_again(now);
        }
        // What the link needs, with a queue of twice the target: a bound on the queue of a link that
        // became slow.
        let needs_s = self.base() + (2.0 * self.target()).max(self.late);
        let room = self.rate.max(self.capacity) * needs_s + bytes as f64;
        let excess = self.in_flight as f64 - room;
        if self.in_flight > 0 && excess > 0.0 && !self.silent {
            return seconds((excess / self.capacity).clamp(SHORTEST_WAIT_S, SILENCE_S));
        }
        // Urgent pages may take all of the rate, but not the floor.
        let longest = self.last_sent_at.map_or(0.0, |at| at + bytes as f64 / self.floor() - now);
        seconds((-self.tokens / self.rate).min(longest))
    }

    /// `bytes` were handed to the link.
    pub fn sent(&mut self, now: Duration, bytes: u64) {
        let now = self.settle(now);
        if self.in_flight == 0 {
            self.heard_at = now;
        }
        self.in_flight = self.in_flight.saturating_add(bytes);
        self.tokens -= bytes as f64;
        self.last_sent_at = Some(now);
    }

    /// `bytes` of urgent pages were handed to the link: the background gives way for as long as they take.
    pub fn urgent(&mut self, now: Duration, bytes: u64) {
        self.settle(now);
        let most = self.tokens.min(-self.rate * LONGEST_DEBT_S);
        self.tokens = (self.tokens - bytes as f64).max(most);
        self.window.bytes += bytes as f64;
    }

    /// The destination has acknowledged a batch of `bytes`, `round_trip` after it was handed to the link.
    pub fn acked(&mut self, now: Duration, bytes: u64, round_trip: Duration) {
        let now = self.settle(now);
        let round_trip = round_trip.as_secs_f64().max(1e-6);
        let (heard_at, sent_at) = (self.heard_at, now - round_trip);
        self.in_flight = self.in_flight.saturating_sub(bytes);
        self.heard_at = now;
        self.silent = false;
        self.round_trip = round_trip;
        let bytes = bytes as f64;
        // It went through in that time, so the link is no slower; and at first nothing else is known.
        let proven = bytes / round_trip;
        self.capacity = if self.measured { self.capacity.max(proven) } else { proven };
        self.measured = true;
        self.note_round_trip(now, bytes, round_trip);
        let takes = bytes / self.capacity;
        let bunched = now - heard_at < (takes / 4.0).min(TARGET_S);
        self.note_bunch(now, bytes, bunched);

        // A round trip; of a long queue, enough to see that it is long.
        let enough = self.base() + takes + 4.0 * self.target();
        let least = SHORTEST_WINDOW_S.max(round_trip.min(enough));
        let Some((mut began, _)) = self.window.began else {
            self.window = Window { began: Some((now, sent_at)), ..NEW_WINDOW };
            return;
        };
        // Only the last of a bunch may be in time, and which is the last shows by the next.
        let late = self.late > self.target();
        if late && !bunched && self.window.ended.0 - began >= least {
            began = self.window.ended.0;
            self.end_window();
        }
        self.window.bytes += bytes;
        self.window.ended = (now, sent_at);
        if now - began >= least / 2.0 {
            let queue = round_trip - takes - self.base();
            self.window.queue = self.window.queue.min(queue.max(0.0));
        }
        if !late && now - began >= least {
            self.end_window();
        }
    }

    /// The pace, in bytes per second.
    pub fn rate(&self) -> u64 {
        whole(self.rate)
    }

    /// The link's capacity as far as it is known, in bytes per second.
    pub fn capacity(&self) -> u64 {
        whole(self.capacity)
    }

    /// Ends a window, sets the rate by what it tells, and begins the next.
    fn end_window(&mut self) {
        let Window { began, ended, bytes, queue } = self.window;
        self.window = Window { began: Some(ended), ..NEW_WINDOW };
        let began = began.unwrap_or(ended);
        let elapsed = ended.0 - began.0;
        // What waited for a late thread had come earlier, but no sooner than it was sent.
        let late = (ended.1 - began.1 - elapsed).clamp(0.0, self.late);
        let measured = bytes / (elapsed + late);
        if self.late < self.target() || elapsed > LATEST_S {
            // Nobody was late, or not for all of a window so long.
            self.judged = [(queue, measured); JUDGED_WINDOWS];
        }
        self.judged.rotate_right(1);
        self.judged[0] = (queue, measured);
        let target = self.target();
        let mut queues = self.judged.map(|(queue, _)| queue);
        queues.sort_unstable_by(f64::total_cmp);
        let queue = queues[JUDGED_WINDOWS / 2];
        if measured > self.capacity {
            self.capacity = measured;
        } else if queue > target {
            // The link was busy, so this is all that it carries. Without a queue it may be the sender
            // that was slow.
            let most = self.judged.iter().map(|(_, rate)| *rate).fold(measured, f64::max);
            self.capacity = most.min(self.capacity).max(self.capacity / 2.0).max(self.floor());
        }
        self.boost =
            if queue < target / 8.0 { (self.boost * 2.0).clamp(1.0 / 32.0, 1.0) } else { 0.0 };
        let correction = (target / 2.0 - queue) / (4.0 * elapsed);
        let steered = (1.0 + self.boost + correction).clamp(0.5, 2.0);
        let gain = if std::mem::take(&mut self.drain) { 0.5 } else { steered };
        self.rate = (self.capacity * gain).max(FLOOR).min(self.limit.unwrap_or(f64::INFINITY));
    }

    /// A link does not deliver faster than it carries: of a bunch, the first was here for as long as the
    /// others took, and somebody was late to see it.
    fn note_bunch(&mut self, now: f64, bytes: f64, bunched: bool) {
        if bunched {
            self.bunch.bytes += bytes;
            let late = self.bunch.bytes / self.capacity - (now - self.bunch.began);
            // A bunch is no longer than what was let onto the link: the next may show more.
            self.late = self.late.max((2.0 * late).min(LATEST_S));
        } else {
            self.late *= (-(now - self.bunch.began) / LATE_FORGOTTEN_S).exp();
            self.bunch = Bunch { began: now, bytes: 0.0 };
        }
    }

    fn note_round_trip(&mut self, now: f64, bytes: f64, round_trip: f64) {
        if now - self.period_began > PERIOD_S {
            self.periods = [NONE_YET, self.periods[0]];
            self.period_began = now;
            self.drain = true;
        }
        let period = &mut self.periods[0];
        period.capacity = period.capacity.max(self.capacity);
        if round_trip < period.round_trip {
            (period.round_trip, period.bytes) = (round_trip, bytes);
        }
    }

    /// Nothing was heard for long: everything that is known of the link may be wrong.
    fn start_again(&mut self, now: f64) {
        self.silent = true;
        self.in_flight = 0;
        self.capacity = self.floor();
        self.rate = self.floor();
        self.boost = 1.0;
        self.window = NEW_WINDOW;
        self.judged = [NOTHING_JUDGED; JUDGED_WINDOWS];
        self.late = 0.0;
        self.periods = [NONE_YET; 2];
        self.period_began = now;
    }

    /// Delay of the empty link for a batch of no bytes, in seconds.
    fn base(&self) -> f64 {
        let capacity = self.periods[0].capacity.max(self.periods[1].capacity);
        let of = |smallest: &Smallest| smallest.round_trip - smallest.bytes / capacity;
        let least = of(&self.periods[0]).min(of(&self.periods[1]));
        if least.is_finite() { least.max(0.0) } else { 0.0 }
    }

    /// What the queue is to stay below, in seconds.
    fn target(&self) -> f64 {
        let least = self.periods[0].round_trip.min(self.periods[1].round_trip);
        if least.is_finite() { TARGET_S.max(least / 4.0) } else { TARGET_S }
    }

    fn floor(&self) -> f64 {
        self.limit.map_or(FLOOR, |limit| limit.min(FLOOR))
    }

    /// Brings the tokens up to `now`, which it returns in seconds.
    fn settle(&mut self, now: Duration) -> f64 {
        let now = now.as_secs_f64().max(self.settled_at);
        // A burst after a silence adds no more than the target to the queue. Where threads are late, the
        // sender is as well, and makes up for it.
        let most = self.rate * self.target().max(self.late / 2.0);
        self.tokens = (self.tokens + (now - self.settled_at) * self.rate).min(most);
        self.settled_at = now;
        now
    }
}

/// Rounded up, so that whoever waits finds the time passed.
fn seconds(seconds: f64) -> Duration {
    if seconds <= 0.0 {
        return Duration::ZERO;
    }
    Duration::try_from_secs_f64(seconds)
        .unwrap_or(Duration::MAX)
        .saturating_add(Duration::from_nanos(1))
}

#[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)] // Saturates, and is not negative.
fn whole(rate: f64) -> u64 {
    rate as u64
}

/// A limit as the operator says it.
fn usable(limit: Option<u64>) -> Option<f64> {
    limit.filter(|limit| *limit > 0).map(|limit| limit as f64)
}
