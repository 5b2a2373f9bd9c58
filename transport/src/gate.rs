//! Which connection attempts get a handshake, which costs about a millisecond of a core: pure.
//!
//! Whoever claims an address may lie. So an attempt whose address is not proven counts for nobody: some are let
//! in, since that saves them a round trip, and above that each has to prove its address first. From then on
//! attempts count for their address, which gets so many a second, and no more of the places that are free than
//! leaves some to others. What comes too often is left unanswered: an honest peer asks again within a second.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv6Addr};
use std::time::Duration;

/// Handshakes that run at the same time, with those that wait to be accepted; others are refused.
pub(crate) const MAX_HANDSHAKES: usize = 64;
/// From this many on, a peer must prove that it is at the address that it claims.
const UNPROVEN_HANDSHAKES: usize = MAX_HANDSHAKES / 2;
/// Handshakes with unproven addresses: so many at once, and a second.
const UNPROVEN: Rate = Rate { burst: 64, per_s: 32 };
/// Handshakes with one address (of IPv6, one network of 64 bits): so many at once, and a second.
const PER_ADDRESS: Rate = Rate { burst: 256, per_s: PER_S };
const PER_S: u32 = 32;
/// Addresses that are known at once.
const MAX_ADDRESSES: usize = 1024;

/// What becomes of an attempt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Pass {
    /// It gets its handshake; [`Gate::done`] follows.
    Accept,
    /// It has to prove its address, and come again.
    Prove,
    /// It is left unanswered.
    Later {
        /// The first in a row from this address.
        first: bool,
    },
    /// It is refused.
    Busy,
}

#[derive(Clone, Copy)]
struct Rate {
    burst: u32,
    per_s: u32,
}

/// A token bucket.
struct Bucket {
    rate: Rate,
    tokens: f64,
    at: Duration,
}

impl Bucket {
    fn new(rate: Rate, now: Duration) -> Self {
        Self { rate, tokens: rate.burst.into(), at: now }
    }

    fn refill(&mut self, now: Duration) {
        let gained = now.saturating_sub(self.at).as_secs_f64() * f64::from(self.rate.per_s);
        self.tokens = (self.tokens + gained).min(self.rate.burst.into());
        self.at = now;
    }

    fn take(&mut self, now: Duration) -> bool {
        self.refill(now);
        let taken = self.tokens >= 1.0;
        if taken {
            self.tokens -= 1.0;
        }
        taken
    }

    fn is_full(&mut self, now: Duration) -> bool {
        self.refill(now);
        self.tokens >= self.rate.burst.into()
    }
}

struct Address {
    bucket: Bucket,
    running: usize,
    /// The last attempt came too often.
    held: bool,
}

pub(crate) struct Gate {
    unproven: Bucket,
    addresses: HashMap<IpAddr, Address>,
    running: usize,
}

impl Gate {
    /// Handshakes with one address in a second.
    pub(crate) const PER_ADDRESS_PER_S: u32 = PER_S;

    pub(crate) fn new() -> Self {
        let unproven = Bucket::new(UNPROVEN, Duration::ZERO);
        Self { unproven, addresses: HashMap::new(), running: 0 }
    }

    /// An attempt from `from`, at `now` since the start.
    pub(crate) fn ask(&mut self, now: Duration, from: IpAddr, proven: bool) -> Pass {
        if self.running >= MAX_HANDSHAKES {
            return Pass::Busy;
        }
        if !proven {
            if self.running >= UNPROVEN_HANDSHAKES || !self.unproven.take(now) {
                return Pass::Prove;
            }
            self.running += 1;
            return Pass::Accept;
        }
        let from = network(from);
        if self.addresses.len() >= MAX_ADDRESSES && !self.addresses.contains_key(&from) {
            self.addresses.retain(|_, a| a.running > 0 || !a.bucket.is_full(now));
            if self.addresses.len() >= MAX_ADDRESSES {
                return Pass::Busy;
            }
        }
        let fresh = || Address { bucket: Bucket::new(PER_ADDRESS, now), running: 0, held: false };
        let address = self.addresses.entry(from).or_insert_with(fresh);
        let free = MAX_HANDSHAKES - self.running;
        if address.running > free / 2 || !address.bucket.take(now) {
            let first = !std::mem::replace(&mut address.held, true);
            return Pass::Later { first };
        }
        address.held = false;
        address.running += 1;
        self.running += 1;
        Pass::Accept
    }

    /// A handshake with `from` is over.
    pub(crate) fn done(&mut self, from: IpAddr, proven: bool) {
        self.running = self.running.saturating_sub(1);
        if proven && let Some(address) = self.addresses.get_mut(&network(from)) {
            address.running = address.running.saturating_sub(1);
        }
    }
}

/// What one owner has for the asking: an address, or of IPv6 a network of 64 bits.
fn network(addr: IpAddr) -> IpAddr {
    match addr.to_canonical() {
        IpAddr::V6(v6) => Ipv6Addr::from_bits(v6.to_bits() >> 64 << 64).into(),
        v4 => v4,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn addr(n: u32) -> IpAddr {
        std::net::Ipv4Addr::from_bits(n).into()
    }

    fn at(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    /// Attempts of a second that got a handshake, which takes no time.
    fn served(gate: &mut Gate, from: IpAddr, from_ms: u64, attempts: u64) -> u64 {
        (0..attempts)
            .filter(|n| {
                let accepted =
                    gate.ask(at(from_ms + n * 1000 / attempts), from, true) == Pass::Accept;
                if accepted {
                    gate.done(from, true);
                }
                accepted
            })
            .count() as u64
    }

    #[test]
    fn who_connects_in_a_loop_is_slowed_down_and_others_are_not() {
        let mut gate = Gate::new();
        assert!(served(&mut gate, addr(1), 0, 10_000) <= 256 + 32);
        for second in 1..10 {
            let looping = served(&mut gate, addr(1), second * 1000, 10_000);
            assert!((31..=33).contains(&looping), "{looping}");
            assert_eq!(served(&mut gate, addr(2), second * 1000, 20), 20);
        }
        assert_eq!(served(&mut gate, addr(1), 60_000, 200), 200, "it may come back");
    }

    #[test]
    fn one_address_in_ever_new_handshakes_leaves_places_to_others() {
        let mut gate = Gate::new();
        for n in 1..=8 {
            let mut mine = 0;
            while gate.ask(at(0), addr(n), true) == Pass::Accept {
                mine += 1;
            }
            assert!(mine >= 1, "address {n} got none");
        }
        assert!(gate.running < MAX_HANDSHAKES);
    }

    #[test]
    fn addresses_that_are_not_proven_use_up_nothing_of_their_owners() {
        let mut gate = Gate::new();
        let victim = addr(7);
        for n in 0..10_000 {
            if gate.ask(at(n / 10), victim, false) == Pass::Accept {
                gate.done(victim, false);
            }
        }
        assert_eq!(gate.ask(at(1000), victim, true), Pass::Accept);
        assert!(gate.addresses[&victim].bucket.tokens > 200.0);
    }

    #[test]
    fn half_of_the_places_are_for_proven_addresses() {
        let mut gate = Gate::new();
        let let_in = (0..100).filter(|n| gate.ask(at(0), addr(*n), false) == Pass::Accept).count();
        assert_eq!(let_in, UNPROVEN_HANDSHAKES);
        assert_eq!(gate.ask(at(0), addr(1), false), Pass::Prove);
        assert_eq!(gate.ask(at(0), addr(1), true), Pass::Accept);
        while gate.running < MAX_HANDSHAKES {
            gate.running += 1;
        }
        assert_eq!(gate.ask(at(0), addr(1), true), Pass::Busy);
    }

    #[test]
    fn it_is_told_once_that_an_address_comes_too_often() {
        let mut gate = Gate::new();
        served(&mut gate, addr(1), 0, 256);
        let told: Vec<Pass> = (0..500).map(|_| gate.ask(at(1000), addr(1), true)).collect();
        assert_eq!(told.iter().filter(|p| **p == Pass::Later { first: true }).count(), 1);
    }

    #[test]
    fn what_is_known_of_addresses_is_bounded_and_forgotten() {
        let mut gate = Gate::new();
        for n in 0..100_000 {
            let from = addr(n);
            if gate.ask(at(u64::from(n)), from, true) == Pass::Accept {
                gate.done(from, true);
            }
            assert!(gate.addresses.len() <= MAX_ADDRESSES);
        }
        assert_eq!(gate.ask(at(200_000), addr(5), true), Pass::Accept);
    }

    #[test]
    fn a_network_of_ipv6_is_one_address() {
        let one = network("2001:db8:1:2:3::4".parse().unwrap());
        assert_eq!(one, network("2001:db8:1:2:ffff::1".parse().unwrap()));
        assert_ne!(one, network("2001:db8:1:3::".parse().unwrap()));
        assert_eq!(
            network("::ffff:10.0.0.1".parse().unwrap()),
            network("10.0.0.1".parse().unwrap())
        );
    }
}
