//! The record of a working set: the pages that the guest touched last. They are what it touches first
//! when it goes on.
//!
//! ```text
//!  runs × { first frame u64, pages u64 }   disjoint, the latest touched first
//! ```
//! All little endian.

use ferry_pages::{Layout, PageSet, Run};
use serde::{Deserialize, Serialize};
use xxhash_rust::xxh3::xxh3_64;

use crate::Sum;

/// Most pages of a record: 256 MiB of memory, and 1 MiB of record.
pub const RECORD_PAGES: u64 = 1 << 16;
const RUN_BYTES: u64 = 16;

/// Where the record is in the file of memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RecordPart {
    /// Where it begins. It ends where the index begins.
    pub at: u64,
    /// Runs of pages in it.
    pub runs: u64,
    /// xxh3 of it.
    pub checksum: Sum,
}

/// The pages of `harvests`, of which the last is the latest: each once, as many as a record may have.
pub(crate) fn latest_first<'a>(harvests: impl DoubleEndedIterator<Item = &'a PageSet>) -> Vec<Run> {
    let (mut record, mut named, mut room) = (Vec::new(), PageSet::new(), RECORD_PAGES);
    for harvest in harvests.rev() {
        let mut fresh = harvest.clone();
        fresh.subtract(&named);
        for run in fresh.runs() {
            if room == 0 {
                return record;
            }
            let taken = Run::new(run.start, run.pages.min(room));
            room -= taken.pages;
            record.push(taken);
        }
        named.union_with(&fresh);
    }
    record
}

/// As bytes, and what the manifest says of them when they begin at `at`; none of an empty record.
pub(crate) fn encode(record: &[Run], at: u64) -> Option<(Vec<u8>, RecordPart)> {
    let words = record.iter().flat_map(|run| [run.start, run.pages]);
    let bytes: Vec<u8> = words.flat_map(u64::to_le_bytes).collect();
    let part = RecordPart { at, runs: record.len() as u64, checksum: Sum(xxh3_64(&bytes)) };
    (!record.is_empty()).then_some((bytes, part))
}

impl RecordPart {
    /// Its length, if it can be one that ends at `end`.
    ///
    /// # Errors
    /// In words, what is wrong with it.
    pub(crate) fn bytes(&self, end: u64) -> Result<usize, String> {
        let bytes = self.runs.checked_mul(RUN_BYTES).filter(|_| self.runs <= RECORD_PAGES);
        bytes
            .filter(|bytes| self.at.checked_add(*bytes) == Some(end))
            .and_then(|bytes| usize::try_from(bytes).ok())
            .ok_or_else(|| {
                format!(
                    "its record has {} runs at byte {}, its index is at byte {end}",
                    self.runs, self.at
                )
            })
    }

    /// Reads the record of a machine with memory `layout`.
    ///
    /// # Errors
    /// In words, what is wrong with it.
    pub(crate) fn decode(&self, bytes: &[u8], layout: &Layout) -> Result<Vec<Run>, String> {
        let found = Sum(xxh3_64(bytes));
        if found != self.checksum {
            return Err(format!(
                "its record has checksum {found}, the manifest says {}",
                self.checksum
            ));
        }
        let (words, _) = bytes.as_chunks::<8>();
        let words = words.as_chunks::<2>().0.iter();
        let record: Vec<Run> = words
            .map(|pair| pair.map(u64::from_le_bytes))
            .map(|[start, pages]| Run::new(start, pages))
            .collect();
        let mut room = RECORD_PAGES;
        for run in &record {
            room = room.checked_sub(run.pages).ok_or("its record has too many pages")?;
            if !layout.contains(*run) {
                return Err(format!(
                    "its record names frame {:#x}, {} pages, outside the machine's memory",
                    run.start, run.pages
                ));
            }
        }
        Ok(record)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(runs: &[(u64, u64)]) -> PageSet {
        runs.iter().map(|&(start, pages)| Run::new(start, pages)).collect()
    }

    #[test]
    fn the_latest_pages_come_first_each_once_and_no_more_than_are_allowed() {
        let harvests = [set(&[(0, 9), (100, 2)]), set(&[]), set(&[(3, 2), (50, 1)])];
        let record = latest_first(harvests.iter());
        let expected = [(3, 2), (50, 1), (0, 3), (5, 4), (100, 2)];
        assert_eq!(record, expected.map(|(start, pages)| Run::new(start, pages)));

        let many = [set(&[(0, RECORD_PAGES)]), set(&[(1 << 30, RECORD_PAGES - 1)])];
        let record = latest_first(many.iter());
        assert_eq!(record, [Run::new(1 << 30, RECORD_PAGES - 1), Run::new(0, 1)]);
        assert!(encode(&latest_first([].iter()), 32).is_none());
    }

    #[test]
    fn a_record_that_no_writer_makes_is_refused() {
        let layout = Layout::new(vec![Run::new(0, 1 << 20), Run::new(1 << 30, 16)]).unwrap();
        let read = |record: &[(u64, u64)]| {
            let record: Vec<_> =
                record.iter().map(|&(start, pages)| Run::new(start, pages)).collect();
            let (bytes, part) = encode(&record, 32).unwrap();
            assert_eq!(part.bytes(32 + bytes.len() as u64), Ok(bytes.len()));
            part.bytes(33 + bytes.len() as u64).unwrap_err();
            RecordPart { runs: u64::MAX / 16, ..part }.bytes(48).unwrap_err();
            for (at, bit) in (0..bytes.len()).zip([1, 2, 4, 8, 16, 32, 64, 128].into_iter().cycle())
            {
                let mut bad = bytes.clone();
                bad[at] ^= bit;
                assert!(part.decode(&bad, &layout).unwrap_err().contains("checksum"));
            }
            part.decode(&bytes, &layout).map(|found| assert_eq!(found, record))
        };
        read(&[(1 << 30, 16), (7, 1)]).unwrap();
        for (words, record) in [
            ("outside", &[(7, 1), (1 << 30, 17)][..]),
            ("outside", &[(7, 0)]),
            ("outside", &[(u64::MAX, 2)]),
            ("too many", &[(0, RECORD_PAGES), (1 << 30, 1)]),
            ("too many", &[(0, u64::MAX)]),
        ] {
            let why = read(record).unwrap_err();
            assert!(why.contains(words), "{record:?}: {why}");
        }
    }
}
