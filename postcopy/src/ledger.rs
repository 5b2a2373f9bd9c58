//! The round and the digest of each page that was installed, 2 MiB of guest memory at a time.

use ferry_pages::Run;

/// Pages in one chunk. A chunk is the unit of locking and of allocation: memory that never arrives
/// has no ledger.
pub const CHUNK_PAGES: usize = 512;

/// The ledger of one chunk: 12 bytes a page.
///
/// Hold its lock from [`admit`](Self::admit) until the page is copied, or an older copy can land after
/// a newer one.
#[derive(Clone, Debug)]
pub struct ChunkLedger {
    /// Round in which each page was installed; 0 is absent.
    rounds: [u32; CHUNK_PAGES],
    /// Digest of each page as installed; 0 for a zero page and for an absent one.
    digests: [u64; CHUNK_PAGES],
}

/// Whether and how a page may be installed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Admission {
    /// A newer copy is here: drop this one.
    Late,
    /// Nothing but zeros was installed here: the page reads as zero.
    OverZeros,
    /// It replaces an older copy that is not zero.
    OverData,
}

impl Default for ChunkLedger {
    fn default() -> Self {
        Self { rounds: [0; CHUNK_PAGES], digests: [0; CHUNK_PAGES] }
    }
}

impl ChunkLedger {
    /// Asks to install page `page` (place in the chunk, below [`CHUNK_PAGES`]) of `round` (from 1)
    /// with this digest, and notes it unless it is late.
    ///
    /// Two copies of one round are equally new: a protocol that sends a page once a round never
    /// makes them.
    pub fn admit(&mut self, page: usize, round: u32, digest: u64) -> Admission {
        if self.rounds[page] > round {
            return Admission::Late;
        }
        self.rounds[page] = round;
        match std::mem::replace(&mut self.digests[page], digest) {
            0 => Admission::OverZeros,
            _ => Admission::OverData,
        }
    }

    /// Places of the pages that were installed in a round after `round`.
    pub fn newer_than(&self, round: u32) -> impl Iterator<Item = usize> + '_ {
        self.rounds.iter().enumerate().filter(move |(_, r)| **r > round).map(|(page, _)| page)
    }

    /// Wrapping sum of the digests of all pages.
    pub fn digest_sum(&self) -> u64 {
        self.digests.iter().fold(0, |sum, d| sum.wrapping_add(*d))
    }
}

/// The parts of `run` that lie in one chunk each: (chunk number, first page in it, run).
pub fn by_chunk(run: Run) -> impl Iterator<Item = (u64, usize, Run)> {
    let chunk_pages = CHUNK_PAGES as u64;
    let mut at = run.start;
    std::iter::from_fn(move || {
        if at >= run.end() {
            return None;
        }
        let (chunk, first) = (at / chunk_pages, at % chunk_pages);
        let pages = (chunk_pages - first).min(run.end() - at);
        let part = Run::new(at, pages);
        at += pages;
        // `first` is below CHUNK_PAGES.
        Some((chunk, usize::try_from(first).unwrap_or(0), part))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_late_page_is_not_admitted_and_changes_nothing() {
        let mut ledger = ChunkLedger::default();
        assert_eq!(ledger.admit(7, 2, 20), Admission::OverZeros);
        assert_eq!(ledger.admit(7, 1, 10), Admission::Late);
        assert_eq!(ledger.digest_sum(), 20);
        assert_eq!(ledger.admit(7, 3, 30), Admission::OverData);
        assert_eq!(ledger.digest_sum(), 30);
        assert_eq!(ledger.newer_than(2).collect::<Vec<_>>(), [7]);
        assert_eq!(ledger.newer_than(3).count(), 0);
    }

    #[test]
    fn of_two_copies_of_one_round_the_later_one_stays() {
        let mut ledger = ChunkLedger::default();
        ledger.admit(7, 2, 20);
        assert_eq!(ledger.admit(7, 2, 21), Admission::OverData);
        assert_eq!(ledger.digest_sum(), 21);
    }

    #[test]
    fn the_digest_does_not_depend_on_the_order_of_arrival() {
        let arrivals = [(0, 1, 5), (1, 1, 6), (0, 2, 7), (511, 3, u64::MAX)];
        let sum = |order: &[usize]| {
            let mut ledger = ChunkLedger::default();
            for &i in order {
                let (page, round, digest) = arrivals[i];
                ledger.admit(page, round, digest);
            }
            ledger.digest_sum()
        };
        assert_eq!(sum(&[0, 1, 2, 3]), sum(&[3, 2, 1, 0]));
        assert_eq!(sum(&[0, 1, 2, 3]), 6 + 7 - 1);
    }

    #[test]
    fn a_run_falls_into_chunks_without_gap_or_overlap() {
        let parts: Vec<_> = by_chunk(Run::new(500, 600)).collect();
        assert_eq!(
            parts,
            [(0, 500, Run::new(500, 12)), (1, 0, Run::new(512, 512)), (2, 0, Run::new(1024, 76)),]
        );
        assert_eq!(by_chunk(Run::new(9, 0)).count(), 0);
    }
}
