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
    seed: u64,
}

impl Simulation {
    fn new(limit: Option<u64>, bytes_per_s: f64, delay_s: f64) -> Self {
        let link = Link { bytes_per_s, delay_s, free_at: 0.0, acks: VecDeque::new(), deaf: false };
        Self { pace: PushPace::new(limit), link, now: 0.0, seed: 7 }
    }

    fn random(&mut self) -> f64 {
        self.seed = self.seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (self.seed >> 40) as f64 / (1 << 24) as f64
    }

    fn transmit(&mut self, bytes: u64) -> f64 {
        self.link.free_at = self.link.free_at.max(self.now) + bytes as f64 / self.link.bytes_per_s;
        self.link.free_at + self.link.delay_s
    }

    /// Pushes for `seconds`.
    fn run(&mut self, seconds: f64, load: Load) -> Seen {
        let (began, end) = (self.now, self.now + seconds);
        let (mut ask_at, mut look_at) = (self.now, self.now);
        let mut urgent_at = load.urgent_every_s.map(|every| self.now + every);
        let (mut queue_sum, mut looks, mut worst) = (0.0, 0.0, 0.0_f64);
        let (mut pushed, mut urgent) = (0, 0);
        let backlog_before = (self.link.free_at - self.now).max(0.0);
        loop {
            let ack_at = self.link.acks.front().map_or(f64::INFINITY, |ack| ack.0);
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
                self.transmit(4096);
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
                    let acked_at = self.transmit(BATCH) + load.jitter_s * self.random();
                    let acked_at = if load.away_s > 0.0 { let k=(acked_at/0.01).floor(); let r=((k*0.618034)%1.0)*load.away_s; acked_at.max(k*0.01+r)} else {acked_at};
                    // Acknowledgements do not overtake each other.
                    let acked_at = self.link.acks.back().map_or(acked_at, |a| acked_at.max(a.0));
                    if !self.link.deaf {
                        self.link.acks.push_back((acked_at, BATCH, self.now));
                    }
                } else {
                    ask_at = self.now + wait.as_secs_f64() + load.oversleep_s;
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

#[test]
fn explore() {
    for (rate, delay) in [
        (1.0, 50e-6),
        (10.0, 50e-6),
        (1.0, 50e-3),
        (0.1, 1e-3),
        (1.0, 1e-3),
        (10.0, 10e-3),
        (0.01, 20e-3),
    ] {
        for load in [
            Load::default(),
            Load { jitter_s: 100e-6, ..Load::default() },
            Load { oversleep_s: 60e-6, jitter_s: 50e-6, urgent_every_s: Some(1e-3), ..Load::default() },
        ] {
            let mut sim = Simulation::new(None, rate * GBIT, delay);
            let start = sim.run(1.0, load);
            let steady = sim.run(20.0, load);
            println!(
                "{rate} Gbit {delay}: start {:.2} {:.2}ms worst {:.1} | steady {:.3} mean {:.3}ms worst {:.2}ms cap {:.3}",
                start.used,
                start.mean_queue_s * 1e3,
                start.worst_queue_s * 1e3,
                steady.used,
                steady.mean_queue_s * 1e3,
                steady.worst_queue_s * 1e3,
                sim.pace.capacity() as f64 / GBIT
            );
        }
    }
    for delay in [50e-6, 5e-3, 50e-3] {
        let mut sim = Simulation::new(None, GBIT, delay);
        sim.run(5.0, Load::default());
        for rate in [0.1, 1.0, 10.0, 1.0] {
            sim.link.bytes_per_s = rate * GBIT;
            for t in [0.1, 0.4, 1.0, 3.0, 10.0] {
                let s = sim.run(t, Load::default());
                println!(
                    "{delay}: to {rate}: +{t}: {:.3} mean {:.2}ms worst {:.2}ms cap {:.3}",
                    s.used,
                    s.mean_queue_s * 1e3,
                    s.worst_queue_s * 1e3,
                    sim.pace.capacity() as f64 / GBIT
                );
            }
        }
    }
}
#[test]
fn explore2() {
    for (rate, delay) in [(1.0, 50e-6), (10.0, 50e-6), (1.0, 50e-3)] {
        for load in [
            Load { jitter_s: 500e-6, ..Load::default() },
            Load { jitter_s: 1e-3, ..Load::default() },
            Load { jitter_s: 3e-3, ..Load::default() },
            Load { oversleep_s: 1e-3, ..Load::default() },
            Load { away_s: 1e-3, ..Load::default() },
            Load { away_s: 4e-3, ..Load::default() },
            Load { away_s: 8e-3, ..Load::default() },
            Load { away_s: 4e-3,  oversleep_s: 100e-6, jitter_s: 100e-6, urgent_every_s: Some(1e-3)},
            Load { oversleep_s: 1e-3, jitter_s: 1e-3, ..Load::default() },
        ] {
            let mut sim = Simulation::new(None, rate * GBIT, delay);
            let start = sim.run(1.0, load);
            let steady = sim.run(20.0, load);
            println!(
                "X {rate} Gbit {delay} a{} j{} o{}: start {:.2} {:.2}ms worst {:.1} | steady {:.3} mean {:.3}ms worst {:.2}ms cap {:.3}",
                load.away_s, load.jitter_s,
                load.oversleep_s,
                start.used,
                start.mean_queue_s * 1e3,
                start.worst_queue_s * 1e3,
                steady.used,
                steady.mean_queue_s * 1e3,
                steady.worst_queue_s * 1e3,
                sim.pace.capacity() as f64 / GBIT
            );
        }
    }
}
