//! A pace fills a link and leaves it free for urgent pages: a bottleneck with a queue, in virtual time.

use std::collections::VecDeque;
use std::time::Duration;

use ferry_postcopy::PushPace;

const BATCH: u64 = 64 * 1024;
const GBIT: f64 = 125e6;

/// A queue in front of a wire of some rate, and a path of some delay behind it.
struct Link {
    bytes_per_s: f64,
    /// There and back, in seconds.
    delay_s: f64,
    free_at: f64,
    /// When each acknowledgement comes, the batch's bytes, and when it was sent.
    acks: VecDeque<(f64, u64, f64)>,
    deaf: bool,
}

/// What one run of the simulation does beside pushing.
#[derive(Clone, Copy, Default)]
struct Load {
    /// A page of 4 KiB each so many seconds, sent without asking.
    urgent_every_s: Option<f64>,
    /// A sender that waits sleeps so much too long.
    oversleep_s: f64,
    /// Acknowledgements are seen up to so much late.
    jitter_s: f64,
    /// Whoever sees acknowledgements is away for up to so much of each 10 ms.
    away_s: f64,
    /// Whoever sees acknowledgements wakes so late, at least and at most, when the first comes, and sees all
    /// that came meanwhile.
    ack_wakes_s: [f64; 2],
    /// So late does a sender that waits, for an acknowledgement or the time to send.
    sender_wakes_s: [f64; 2],
}

#[derive(Debug)]
struct Seen {
    /// Background and urgent bytes against what the link could have carried.
    used: f64,
    /// What an urgent page would have found in front of it, on average and at worst, in seconds.
    mean_queue_s: f64,
    worst_queue_s: f64,
    pushed: u64,
}

struct Simulation {
    pace: PushPace,
    link: Link,
    now: f64,
    /// When whoever sees acknowledgements is awake.
    awake_at: f64,
    seed: u64,
}

impl Simulation {
    fn new(limit: Option<u64>, bytes_per_s: f64, delay_s: f64) -> Self {
        let link = Link { bytes_per_s, delay_s, free_at: 0.0, acks: VecDeque::new(), deaf: false };
        Self { pace: PushPace::new(limit), link, now: 0.0, awake_at: 0.0, seed: 7 }
    }

    fn random(&mut self) -> f64 {
        self.seed = self.seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (self.seed >> 40) as f64 / (1 << 24) as f64
    }

    fn between(&mut self, [least, most]: [f64; 2]) -> f64 {
        least + (most - least) * self.random()
    }

    /// Puts `bytes` on the link; when their acknowledgement comes.
    fn transmitted(&mut self, bytes: u64) -> f64 {
        self.link.free_at = self.link.free_at.max(self.now) + bytes as f64 / self.link.bytes_per_s;
        self.link.free_at + self.link.delay_s
    }

    /// When an acknowledgement that comes at `at` is seen: none overtakes another.
    fn seen_at(&mut self, at: f64, load: Load) -> f64 {
        let mut seen_at = at + load.jitter_s * self.random();
        if load.away_s > 0.0 {
            let turn = (seen_at / 0.01).floor();
            seen_at = seen_at.max(turn * 0.01 + load.away_s * (turn * 0.618).fract());
        }
        if seen_at > self.awake_at {
            self.awake_at = seen_at + self.between(load.ack_wakes_s);
        }
        seen_at = seen_at.max(self.awake_at);
        self.link.acks.back().map_or(seen_at, |last| seen_at.max(last.0))
    }

    /// Pushes for `seconds`.
    fn run(&mut self, seconds: f64, load: Load) -> Seen {
        let (began, end) = (self.now, self.now + seconds);
        let (mut ask_at, mut look_at) = (self.now, self.now);
        let mut urgent_at = load.urgent_every_s.map(|every| self.now + every);
        let mut asleep_until = self.now;
        let (mut queue_sum, mut looks, mut worst) = (0.0, 0.0, 0.0_f64);
        let (mut pushed, mut urgent) = (0, 0);
        let backlog_before = (self.link.free_at - self.now).max(0.0);
        loop {
            let ack_at =
                self.link.acks.front().map_or(f64::INFINITY, |ack| ack.0.max(asleep_until));
            let next = ack_at.min(ask_at).min(look_at).min(urgent_at.unwrap_or(f64::INFINITY));
            if next >= end {
                break;
            }
            self.now = self.now.max(next);
            let now = Duration::from_secs_f64(self.now);
            if look_at <= self.now {
                let queue = (self.link.free_at - self.now).max(0.0);
                (queue_sum, looks, worst) = (queue_sum + queue, looks + 1.0, worst.max(queue));
                // Not in step with the batches.
                look_at += 1e-4 * (0.5 + self.random());
            }
            if let Some(at) = urgent_at.filter(|at| *at <= self.now) {
                self.transmitted(4096);
                self.pace.urgent(now, 4096);
                urgent += 4096;
                urgent_at = load.urgent_every_s.map(|every| at + every);
            }
            if ack_at <= self.now
                && let Some((_, bytes, sent_at)) = self.link.acks.pop_front()
            {
                self.pace.acked(now, bytes, Duration::from_secs_f64(self.now - sent_at));
                ask_at = ask_at.min(self.now);
            }
            if ask_at <= self.now {
                let wait = self.pace.may_send(now, BATCH);
                if wait.is_zero() {
                    self.pace.sent(now, BATCH);
                    pushed += BATCH;
                    let acked_at = self.transmitted(BATCH);
                    let acked_at = self.seen_at(acked_at, load);
                    if !self.link.deaf {
                        self.link.acks.push_back((acked_at, BATCH, self.now));
                    }
                } else {
                    ask_at = self.now + wait.as_secs_f64() + load.oversleep_s;
                    if load.sender_wakes_s != [0.0; 2] {
                        let woken_at =
                            self.link.acks.front().map_or(ask_at, |ack| ack.0.min(ask_at));
                        ask_at = woken_at.max(self.now) + self.between(load.sender_wakes_s);
                        asleep_until = ask_at;
                    }
                }
            }
        }
        self.now = end;
        let backlog = (self.link.free_at - self.now).max(0.0);
        let carried = (pushed + urgent) as f64 / self.link.bytes_per_s + backlog_before - backlog;
        Seen {
            used: carried / (end - began),
            mean_queue_s: queue_sum / looks,
            worst_queue_s: worst,
            pushed,
        }
    }
}

/// Name, Gbit/s, delay in seconds, the greatest mean queue in seconds.
const LINKS: [(&str, f64, f64, f64); 5] = [
    ("near", 1.0, 50e-6, 1e-3),
    ("near and fast", 10.0, 50e-6, 0.5e-3),
    ("far", 1.0, 50e-3, 50e-3 / 4.0),
    ("far and fast", 10.0, 10e-3, 10e-3 / 4.0),
    // A batch takes 5 ms.
    ("slow", 0.1, 1e-3, 6e-3),
];

#[test]
fn a_link_is_filled_and_an_urgent_page_finds_a_short_queue() {
    let loads = [
        ("alone", Load::default()),
        ("urgent pages", Load { urgent_every_s: Some(1e-3), ..Load::default() }),
        ("a sender that oversleeps", Load { oversleep_s: 100e-6, ..Load::default() }),
        ("late acknowledgements", Load { jitter_s: 200e-6, ..Load::default() }),
        ("acknowledgements in bunches", Load { away_s: 3e-3, ..Load::default() }),
    ];
    for (link, gbit, delay_s, mean_s) in LINKS {
        for (name, load) in loads {
            let mut simulation = Simulation::new(None, gbit * GBIT, delay_s);
            simulation.run(2.0, load);
            let seen = simulation.run(20.0, load);
            assert!(seen.used > 0.8, "{link} link, {name}: {seen:?}");
            // A window in which all acknowledgements are late tells nothing of the queue.
            let most_s = mean_s + load.away_s / 2.0;
            assert!(seen.mean_queue_s < most_s, "{link} link, {name}: {seen:?}");
        }
    }
}

#[test]
fn threads_that_wake_late_are_not_taken_for_a_queue() {
    let late = |ack_wakes_s| Load { ack_wakes_s, ..Load::default() };
    for (link, gbit, delay_s, mean_s) in LINKS {
        for (name, load) in [("late", late([1e-3, 10e-3])), ("a bit late", late([0.0, 5e-3]))] {
            let mut simulation = Simulation::new(None, gbit * GBIT, delay_s);
            simulation.run(2.0, load);
            let seen = simulation.run(20.0, load);
            assert!(seen.used > 0.7, "{link} link, {name}: {seen:?}");
            // A tenth of what threads are late by, at most.
            assert!(seen.mean_queue_s < mean_s + 0.5e-3, "{link} link, {name}: {seen:?}");
        }
    }
}

#[test]
fn a_link_that_becomes_slower_is_followed_while_threads_wake_late() {
    let load = Load { ack_wakes_s: [1e-3, 10e-3], ..Load::default() };
    for (link, gbit, delay_s, mean_s) in LINKS {
        let mut simulation = Simulation::new(None, gbit * GBIT, delay_s);
        simulation.run(3.0, load);
        simulation.link.bytes_per_s = 0.1 * gbit * GBIT;
        simulation.run(2.0, load);
        let seen = simulation.run(2.0, load);
        assert!(seen.used > 0.3, "{link} link: {seen:?}");
        let batch_s = BATCH as f64 / simulation.link.bytes_per_s;
        assert!(seen.mean_queue_s < mean_s + batch_s, "{link} link: {seen:?}");
    }
}

#[test]
fn a_sender_that_wakes_late_makes_up_for_some_of_it() {
    let load = Load { ack_wakes_s: [0.0, 5e-3], sender_wakes_s: [0.0, 3e-3], ..Load::default() };
    let mut simulation = Simulation::new(None, GBIT, 50e-6);
    simulation.run(2.0, load);
    let seen = simulation.run(20.0, load);
    assert!(seen.used > 0.2, "{seen:?}");
    assert!(seen.mean_queue_s < 1e-3, "{seen:?}");
}

#[test]
fn a_fast_start_fills_a_far_link_within_a_second() {
    let mut simulation = Simulation::new(None, GBIT, 50e-3);
    let start = simulation.run(1.0, Load::default());
    assert!(start.used > 0.4, "{start:?}");
    let after = simulation.run(1.0, Load::default());
    assert!(after.used > 0.9, "{after:?}");
}

#[test]
fn a_link_that_becomes_slower_or_faster_is_followed() {
    for (link, gbit, delay_s, mean_s) in LINKS {
        let mut simulation = Simulation::new(None, gbit * GBIT, delay_s);
        simulation.run(3.0, Load::default());
        for factor in [0.1, 1.0, 10.0, 1.0] {
            simulation.link.bytes_per_s = factor * gbit * GBIT;
            simulation.run(2.0, Load::default());
            let seen = simulation.run(2.0, Load::default());
            assert!(seen.used > 0.8, "{link} link, {factor} times its rate: {seen:?}");
            // A batch takes longer on a slower link.
            let batch_s = BATCH as f64 / simulation.link.bytes_per_s;
            assert!(seen.mean_queue_s < mean_s + batch_s, "{link} link, {factor}: {seen:?}");
        }
    }
}

#[test]
fn a_standing_queue_does_not_become_the_measure_of_an_empty_link() {
    let mut simulation = Simulation::new(None, GBIT, 50e-6);
    simulation.run(60.0, Load::default());
    let seen = simulation.run(20.0, Load::default());
    assert!(seen.mean_queue_s < 0.6e-3 && seen.worst_queue_s < 2e-3, "{seen:?}");
}

#[test]
fn the_operators_limit_holds_for_urgent_pages_too() {
    let load = Load { urgent_every_s: Some(1e-3), ..Load::default() };
    let limit = 20_000_000;
    let mut simulation = Simulation::new(Some(limit), GBIT, 50e-6);
    simulation.run(1.0, load);
    let seen = simulation.run(10.0, load);
    let rate = seen.used * GBIT / limit as f64;
    assert!((0.9..1.01).contains(&rate), "{rate} of the limit: {seen:?}");
    // Below the floor as well: the operator's word counts.
    let mut simulation = Simulation::new(Some(100_000), GBIT, 50e-6);
    simulation.run(2.0, Load::default());
    let seen = simulation.run(20.0, Load::default());
    assert!((1_800_000..2_100_000).contains(&seen.pushed), "{seen:?}");
}

#[test]
fn urgent_pages_that_take_nearly_all_of_the_link_leave_the_floor() {
    let load = Load { urgent_every_s: Some(35e-6), ..Load::default() };
    let mut simulation = Simulation::new(None, GBIT, 50e-6);
    simulation.run(1.0, Load::default());
    let seen = simulation.run(10.0, load);
    assert!(seen.pushed >= 10 << 20 && seen.mean_queue_s < 5e-3, "{seen:?}");
}

#[test]
fn urgent_pages_beyond_the_operators_limit_leave_the_floor() {
    let load = Load { urgent_every_s: Some(40e-6), ..Load::default() };
    let mut simulation = Simulation::new(Some(50_000_000), GBIT, 50e-6);
    simulation.run(1.0, load);
    let seen = simulation.run(10.0, load);
    assert!((9 << 20..11 << 20).contains(&seen.pushed), "{seen:?}");
}

#[test]
fn urgent_pages_put_the_background_off_for_a_tenth_of_a_second_at_most() {
    let mut pace = PushPace::new(None);
    pace.sent(Duration::ZERO, 1);
    for urgent in [1 << 20, 1 << 30, 1 << 40] {
        pace.urgent(Duration::ZERO, urgent);
        let wait = pace.may_send(Duration::ZERO, 1 << 20).as_secs_f64();
        assert!((0.099..0.101).contains(&wait), "{wait} s after {urgent} bytes");
    }
}

#[test]
fn what_the_link_carries_is_known_after_a_while_and_the_pace_is_no_more_than_twice_that() {
    let mut simulation = Simulation::new(None, GBIT, 1e-3);
    simulation.run(3.0, Load::default());
    let [rate, capacity] = [simulation.pace.rate(), simulation.pace.capacity()];
    let carried = |bytes_per_s: u64| bytes_per_s as f64 / GBIT;
    assert!((0.9..1.2).contains(&carried(capacity)), "{capacity}");
    assert!((0.5..2.4).contains(&carried(rate)), "{rate}");
    assert_eq!(PushPace::new(Some(100_000)).rate(), 100_000, "the operator's word from the start");
}

#[test]
fn lost_acknowledgements_slow_the_background_to_the_floor_and_never_stop_it() {
    let mut simulation = Simulation::new(None, GBIT, 1e-3);
    simulation.run(1.0, Load::default());
    simulation.link.deaf = true;
    simulation.run(3.0, Load::default());
    let seen = simulation.run(10.0, Load::default());
    assert!((9 << 20..11 << 20).contains(&seen.pushed), "{seen:?}");
    simulation.link.deaf = false;
    simulation.run(2.0, Load::default());
    let seen = simulation.run(2.0, Load::default());
    assert!(seen.used > 0.8, "{seen:?}");
}

#[test]
fn any_reports_give_a_wait_that_ends() {
    // Nothing that a caller or a peer can report makes it wait for ever: lies, repetition, time that
    // stands still.
    let mut pace = PushPace::new(None);
    let mut now = Duration::ZERO;
    let mut seed = 1_u64;
    for step in 0..20_000 {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        let bytes = seed >> (16 + step % 48);
        match (seed >> 8) % 5 {
            0 => pace.sent(now, bytes),
            1 => pace.acked(now, bytes, Duration::from_nanos(seed.rotate_left(17) >> (step % 64))),
            2 => pace.urgent(now, bytes),
            3 => now += Duration::from_nanos(seed >> 40),
            _ => drop(pace.may_send(now, bytes)),
        }
    }
    let mut waits = 0;
    loop {
        let wait = pace.may_send(now, BATCH);
        if wait.is_zero() {
            break;
        }
        now += wait;
        waits += 1;
        assert!(waits < 1_000_000 && now < Duration::from_secs(1 << 40), "{pace:?}");
    }
}
