//! One direction of a bad cable, as a pure state machine: datagrams and the time go in, and what is left
//! of them comes out when it is due. The same seed and the same times do the same harm.

use std::collections::BTreeMap;
use std::time::Duration;

/// A datagram that waits longer than this for a slow cable is dropped, as by a router's queue.
const QUEUE: Duration = Duration::from_millis(100);
/// How much later a datagram comes that is overtaken by those behind it.
const OVERTAKEN_BY: Duration = Duration::from_millis(5);

/// What a cable does to datagrams.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Harm {
    /// Each comes later by so many milliseconds.
    pub delay_ms: u64,
    /// So many of a hundred are lost.
    pub drop_percent: u64,
    /// So many of a hundred are overtaken by those behind them.
    pub reorder_percent: u64,
    /// So many of a hundred have one bit of one byte changed.
    pub corrupt_percent: u64,
    /// So many of a hundred come twice.
    pub duplicate_percent: u64,
    /// No more than so many bits pass in a second; 0 for as many as come.
    pub bits_per_s: u64,
    /// Nothing comes out, not even what is on its way.
    pub hole: bool,
}

impl Harm {
    /// A good cable.
    pub const NONE: Self = Self {
        delay_ms: 0,
        drop_percent: 0,
        reorder_percent: 0,
        corrupt_percent: 0,
        duplicate_percent: 0,
        bits_per_s: 0,
        hole: false,
    };
}

/// How many datagrams a cable harmed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Harmed {
    /// Lost, by chance, in a full queue or in a hole.
    pub lost: u64,
    /// Overtaken by others.
    pub overtaken: u64,
    /// Changed.
    pub corrupted: u64,
    /// That came twice.
    pub doubled: u64,
}

/// One direction of a cable that carries datagrams of `T`, whoever that is.
#[derive(Debug)]
pub struct Cable<T> {
    harm: Harm,
    harmed: Harmed,
    dice: u64,
    /// By when they are due, then in the order in which they came.
    under_way: BTreeMap<(Duration, u64), (T, Vec<u8>)>,
    came: u64,
    busy_until: Duration,
}

impl<T: Copy> Cable<T> {
    /// A good cable, whose bad luck comes from `seed`.
    pub fn new(seed: u64) -> Self {
        let harm = Harm::NONE;
        let (under_way, busy_until) = (BTreeMap::new(), Duration::ZERO);
        Self { harm, harmed: Harmed::default(), dice: seed, under_way, came: 0, busy_until }
    }

    /// Does this from now on; what is on its way keeps its time.
    pub fn set(&mut self, harm: Harm) {
        self.harm = harm;
        if harm.bits_per_s == 0 {
            self.busy_until = Duration::ZERO;
        }
    }

    /// What it did so far.
    pub fn harmed(&self) -> Harmed {
        self.harmed
    }

    /// splitmix64.
    fn throw(&mut self) -> u64 {
        self.dice = self.dice.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.dice ^ (self.dice >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn chance(&mut self, percent: u64) -> bool {
        percent > 0 && self.throw() % 100 < percent
    }

    /// A datagram goes in.
    pub fn put(&mut self, now: Duration, who: T, mut bytes: Vec<u8>) {
        let harm = self.harm;
        if self.chance(harm.drop_percent) {
            self.harmed.lost += 1;
            return;
        }
        let mut due = now;
        let bit_nanos = bytes.len() as u64 * 8 * 1_000_000_000;
        if let Some(nanos) = bit_nanos.checked_div(harm.bits_per_s) {
            let begins = self.busy_until.max(now);
            if begins - now > QUEUE {
                self.harmed.lost += 1;
                return;
            }
            self.busy_until = begins + Duration::from_nanos(nanos);
            due = self.busy_until;
        }
        due += Duration::from_millis(harm.delay_ms);
        if self.chance(harm.reorder_percent) {
            self.harmed.overtaken += 1;
            due += OVERTAKEN_BY;
        }
        if !bytes.is_empty() && self.chance(harm.corrupt_percent) {
            self.harmed.corrupted += 1;
            let at = usize::try_from(self.throw() % bytes.len() as u64).unwrap_or(0);
            bytes[at] ^= 1 << (self.throw() % 8);
        }
        if self.chance(harm.duplicate_percent) {
            self.harmed.doubled += 1;
            self.lay(due, who, bytes.clone());
        }
        self.lay(due, who, bytes);
    }

    fn lay(&mut self, due: Duration, who: T, bytes: Vec<u8>) {
        self.came += 1;
        self.under_way.insert((due, self.came), (who, bytes));
    }

    /// A datagram that is due by now comes out.
    pub fn take(&mut self, now: Duration) -> Option<(T, Vec<u8>)> {
        while let Some(first) = self.under_way.first_entry()
            && first.key().0 <= now
        {
            let datagram = first.remove();
            if !self.harm.hole {
                return Some(datagram);
            }
            self.harmed.lost += 1;
        }
        None
    }

    /// When the next one is due.
    pub fn next(&self) -> Option<Duration> {
        self.under_way.first_key_value().map(|((due, _), _)| *due)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    /// What comes out of a thousand numbered datagrams, one each millisecond, and when.
    fn thousand(harm: Harm) -> (Vec<(Duration, Vec<u8>)>, Harmed) {
        let mut cable = Cable::new(7);
        cable.set(harm);
        let mut out = Vec::new();
        for ms in 0..3000u32 {
            let now = MS * ms;
            if ms < 1000 {
                cable.put(now, (), [&ms.to_le_bytes()[..], &[0; 996]].concat());
            }
            while let Some(((), bytes)) = cable.take(now) {
                out.push((now, bytes));
            }
        }
        assert_eq!(cable.next(), None);
        (out, cable.harmed())
    }

    fn number(bytes: &[u8]) -> u32 {
        u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]])
    }

    #[test]
    fn a_good_cable_does_no_harm() {
        let (out, harmed) = thousand(Harm::NONE);
        assert_eq!(harmed, Harmed::default());
        assert!(out.iter().zip(0..).all(|((at, b), n)| number(b) == n && *at == MS * n));
        assert_eq!(out.len(), 1000);
    }

    #[test]
    fn each_harm_is_done_and_no_other() {
        let (out, harmed) = thousand(Harm { delay_ms: 50, ..Harm::NONE });
        assert!(out.iter().all(|(at, b)| *at == MS * (number(b) + 50)) && out.len() == 1000);
        assert_eq!(harmed, Harmed::default());

        let (out, harmed) = thousand(Harm { drop_percent: 10, ..Harm::NONE });
        assert!((50..200).contains(&harmed.lost), "{harmed:?}");
        assert_eq!(out.len() as u64, 1000 - harmed.lost);

        let (out, harmed) = thousand(Harm { reorder_percent: 10, ..Harm::NONE });
        assert!(out.len() == 1000 && (50..200).contains(&harmed.overtaken), "{harmed:?}");
        assert!(!out.is_sorted_by_key(|(_, b)| number(b)));

        let (out, harmed) = thousand(Harm { corrupt_percent: 10, ..Harm::NONE });
        let good = |(b, n): (&Vec<u8>, u32)| number(b) == n && b[4..].iter().all(|b| *b == 0);
        let bad = out.iter().map(|(_, b)| b).zip(0..).filter(|p| !good((p.0, p.1))).count();
        assert!(out.len() == 1000 && bad as u64 == harmed.corrupted && bad > 50, "{harmed:?}");

        let (out, harmed) = thousand(Harm { duplicate_percent: 10, ..Harm::NONE });
        assert!(out.len() as u64 == 1000 + harmed.doubled && harmed.doubled > 50, "{harmed:?}");

        // Half of what comes: 8 kbit each millisecond.
        let (out, harmed) = thousand(Harm { bits_per_s: 4_000_000, ..Harm::NONE });
        assert!((540..570).contains(&out.len()), "{}", out.len());
        assert_eq!(out.len() as u64, 1000 - harmed.lost);

        let (out, harmed) = thousand(Harm { hole: true, ..Harm::NONE });
        assert!(out.is_empty() && harmed.lost == 1000);
    }

    #[test]
    fn a_hole_swallows_what_is_on_its_way_and_nothing_after_it_was_closed() {
        let mut cable = Cable::new(1);
        cable.set(Harm { delay_ms: 10, ..Harm::NONE });
        cable.put(Duration::ZERO, 1, vec![1]);
        cable.set(Harm { hole: true, ..Harm::NONE });
        assert_eq!(cable.take(MS * 10), None);
        cable.set(Harm::NONE);
        cable.put(MS * 11, 2, vec![2]);
        assert_eq!(cable.take(MS * 11), Some((2, vec![2])));
    }
}
