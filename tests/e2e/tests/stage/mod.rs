//! What the tests of whole migrations stand on: guests, hosts, links that can be tampered with, and a
//! witness that no machine ever runs twice.

#![allow(dead_code, unreachable_pub, unused_imports, reason = "each test file uses its part")]

mod balloon;
mod field;
mod guests;
#[path = "../../../../memory/tests/host/huge_pages.rs"]
mod huge_pages;
mod passed;
mod reads;
mod relay;
mod shared;
mod watched;

pub use balloon::Ballooned;
pub use field::{Destination, Link, Links, migrate};
pub use guests::{Huge, Kind, Kvm, Maker, Process, Subject, has_kvm};
pub(crate) use huge_pages::HugePages;
pub(crate) use passed::pass_on;
pub use reads::Reader;
pub use relay::{Deal, Relay, Word, pass};
pub use shared::SharedMemory;
pub use watched::{DRAINED_BY_SAVE, Debts, Faults, Watched, WatchedHost, Witness};

use std::time::{Duration, Instant};

/// Waits until `done`, at most 30 s.
#[track_caller]
pub fn eventually(what: &str, mut done: impl FnMut() -> bool) {
    let began = Instant::now();
    while !done() {
        assert!(began.elapsed() < Duration::from_secs(30), "waited 30 s until {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Waits until every page of a guest whose arena has `pages` pages was come to again, more or less, and
/// none was wrong.
#[track_caller]
pub fn goes_on(guest: &impl Subject, pages: u64) {
    let before = guest.written();
    eventually("the guest has gone on", || {
        guest.written() >= before + 2 * pages || guest.wrong().is_some()
    });
    assert_eq!(guest.wrong(), None, "the guest found a wrong page");
}

/// Numbers that look random and are the same in every run (SplitMix64).
pub struct Dice(pub u64);

impl Dice {
    pub fn roll(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Below `n`.
    pub fn below(&mut self, n: u64) -> u64 {
        self.roll() % n
    }
}
