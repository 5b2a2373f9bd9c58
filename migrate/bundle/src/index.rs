//! Where each page of a memory file is: collected while it is written, searched when it is read.
//!
//! ```text
//!  entries u64
//!  entries × { first frame u64, pages u64, at u64, first u64 }   ascending and disjoint
//!  digests u64, one for each page of the entries that have data
//! ```
//! All little endian. `at` is where the codec's frame begins in the file, and 0 where the pages are zero
//! in spite of the base; `first` counts the pages in front of them in that frame.

use std::collections::BTreeMap;
use std::io::{self, Read};

use ferry_codec::MAX_BATCH_PAGES;
use ferry_pages::{Layout, PageSet, Run};
use xxhash_rust::xxh3::Xxh3Default;

use crate::Sum;

const ENTRY_BYTES: usize = 32;
/// Pages of a chunk of the map.
const CHUNK: usize = 512;

/// A run of pages in one frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Entry {
    pub(crate) run: Run,
    /// Where the frame begins; 0 for zero pages.
    pub(crate) at: u64,
    /// Pages of the frame in front of the run.
    pub(crate) first: u64,
    /// Place of the first page's digest among all.
    pub(crate) digest: usize,
}

impl Entry {
    pub(crate) fn is_zero(&self) -> bool {
        self.at == 0
    }
}

/// One page of a map: its digest, and `at` and `first` of its entry in one number.
#[derive(Clone, Copy, Default)]
struct Slot {
    digest: u64,
    place: u64,
}

const NOTHING: u64 = 0;
const ZERO: u64 = 1;
/// A frame begins behind the file's head, so that no place is below this.
const FIRST_BITS: u32 = 8;
const _: () = assert!(MAX_BATCH_PAGES <= 1 << FIRST_BITS);

/// The chunk of a page, and its place in it.
fn split(gfn: u64) -> (u64, usize) {
    let chunk = CHUNK as u64;
    // The remainder is small.
    (gfn / chunk, usize::try_from(gfn % chunk).unwrap_or(0))
}

/// The pages of a file that is being written: 16 bytes for each, in chunks of 2 MiB of memory.
#[derive(Default)]
pub(crate) struct PageMap(BTreeMap<u64, Box<[Slot; CHUNK]>>);

impl PageMap {
    fn slot(&mut self, gfn: u64) -> &mut Slot {
        let (chunk, page) = split(gfn);
        let chunk = self.0.entry(chunk).or_insert_with(|| Box::new([Slot::default(); CHUNK]));
        &mut chunk[page]
    }

    /// The page is number `first` of the frame at `at`.
    pub(crate) fn set(&mut self, gfn: u64, at: u64, first: usize, digest: u64) {
        *self.slot(gfn) = Slot { digest, place: at << FIRST_BITS | first as u64 };
    }

    /// The page is zero, and the base has data.
    pub(crate) fn set_zero(&mut self, gfn: u64) {
        *self.slot(gfn) = Slot { digest: 0, place: ZERO };
    }

    /// The page is as in the base, or zero where there is none.
    pub(crate) fn forget(&mut self, gfn: u64) {
        if self.0.contains_key(&split(gfn).0) {
            *self.slot(gfn) = Slot::default();
        }
    }

    /// The entries, and the digests of their data.
    pub(crate) fn finish(&self) -> Index {
        let mut index = Index::default();
        for (chunk, slots) in &self.0 {
            for (gfn, slot) in (chunk * CHUNK as u64..).zip(slots.iter()) {
                let (at, first) = match slot.place {
                    NOTHING => continue,
                    ZERO => (0, 0),
                    place => (place >> FIRST_BITS, place & ((1 << FIRST_BITS) - 1)),
                };
                match index.entries.last_mut() {
                    Some(e)
                        if e.run.end() == gfn
                            && e.at == at
                            && (at == 0 || e.first + e.run.pages == first) =>
                    {
                        e.run.pages += 1;
                    }
                    _ => {
                        let digest = index.digests.len();
                        index.entries.push(Entry { run: Run::new(gfn, 1), at, first, digest });
                    }
                }
                if at != 0 {
                    index.digests.push(slot.digest);
                }
            }
        }
        index
    }
}

/// The pages of a file that is read.
#[derive(Debug, Default)]
pub(crate) struct Index {
    pub(crate) entries: Vec<Entry>,
    pub(crate) digests: Vec<u64>,
}

impl Index {
    /// The entry that has the page.
    pub(crate) fn find(&self, gfn: u64) -> Option<&Entry> {
        let after = self.entries.partition_point(|e| e.run.start <= gfn);
        self.entries[..after].last().filter(|e| gfn < e.run.end())
    }

    /// The digest of a page of `entry`; 0 for a zero page.
    pub(crate) fn digest(&self, entry: &Entry, gfn: u64) -> u64 {
        if entry.is_zero() {
            return 0;
        }
        let within = usize::try_from(gfn - entry.run.start).unwrap_or(usize::MAX);
        self.digests.get(entry.digest.saturating_add(within)).copied().unwrap_or(0)
    }

    /// All pages that it has, zero pages included.
    pub(crate) fn pages(&self) -> PageSet {
        self.entries.iter().map(|e| e.run).collect()
    }

    pub(crate) fn zero_pages(&self) -> u64 {
        self.entries.iter().filter(|e| e.is_zero()).map(|e| e.run.pages).sum()
    }

    /// As bytes, a piece at a time.
    pub(crate) fn encode(&self, mut write: impl FnMut(&[u8]) -> io::Result<()>) -> io::Result<Sum> {
        let mut hash = Xxh3Default::new();
        let mut put = |bytes: &[u8]| {
            hash.update(bytes);
            write(bytes)
        };
        put(&(self.entries.len() as u64).to_le_bytes())?;
        for e in &self.entries {
            let words = [e.run.start, e.run.pages, e.at, e.first];
            put(words.map(u64::to_le_bytes).as_flattened())?;
        }
        for digest in &self.digests {
            put(&digest.to_le_bytes())?;
        }
        Ok(Sum(hash.digest()))
    }

    /// Reads an index of `bytes` bytes, for a file whose frames lie in `frames` and whose machine has
    /// memory `layout`. Every entry is checked before the next one is read, so that no more is kept than
    /// a machine of that layout needs.
    ///
    /// # Errors
    /// In words, what is wrong with it.
    pub(crate) fn decode(
        from: &mut impl Read,
        bytes: u64,
        frames: std::ops::Range<u64>,
        layout: &Layout,
        checksum: Sum,
    ) -> Result<Self, String> {
        let mut hash = Xxh3Default::new();
        let mut take = |out: &mut [u8]| -> Result<(), String> {
            from.read_exact(out).map_err(|e| format!("its index cannot be read: {e}"))?;
            hash.update(out);
            Ok(())
        };
        let mut word = [0; 8];
        take(&mut word)?;
        let count = u64::from_le_bytes(word);
        let (mut index, mut end, mut data) = (Self::default(), 0, 0u64);
        for number in 0..count {
            let mut entry = [0; ENTRY_BYTES];
            take(&mut entry)?;
            let [start, pages, at, first] = [0, 8, 16, 24]
                .map(|i| u64::from_le_bytes(std::array::from_fn(|byte| entry[i + byte])));
            let run = Run::new(start, pages);
            let bad = |why: &str| {
                format!("entry {number} of its index (frame {start:#x}, {pages} pages) {why}")
            };
            if !layout.contains(run) {
                return Err(bad("is outside the machine's memory"));
            }
            if start < end {
                return Err(bad("overlaps the one before it"));
            }
            let most = MAX_BATCH_PAGES as u64;
            if at != 0 && (!frames.contains(&at) || first > most || pages > most - first) {
                return Err(bad("points at no frame"));
            }
            let digest = usize::try_from(data).map_err(|_| bad("is too far"))?;
            index.entries.push(Entry { run, at, first, digest });
            if at != 0 {
                data += pages;
            }
            end = run.end();
        }
        let expected = 8u64
            .saturating_add(count.saturating_mul(ENTRY_BYTES as u64))
            .saturating_add(data.saturating_mul(8));
        if expected != bytes {
            return Err(format!("its index has {bytes} bytes where {expected} belong"));
        }
        for _ in 0..data {
            take(&mut word)?;
            index.digests.push(u64::from_le_bytes(word));
        }
        let found = Sum(hash.digest());
        if found != checksum {
            return Err(format!("its index has checksum {found}, the manifest says {checksum}"));
        }
        Ok(index)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FRAMES: std::ops::Range<u64> = 32..1 << 20;

    fn layout() -> Layout {
        Layout::new(vec![Run::new(0, 4096), Run::new(8192, 4096)]).unwrap()
    }

    fn bytes_of(index: &Index) -> (Vec<u8>, Sum) {
        let mut bytes = Vec::new();
        let sum = index
            .encode(|piece| {
                bytes.extend_from_slice(piece);
                Ok(())
            })
            .unwrap();
        (bytes, sum)
    }

    fn decode(bytes: &[u8], sum: Sum) -> Result<Index, String> {
        Index::decode(&mut &bytes[..], bytes.len() as u64, FRAMES, &layout(), sum)
    }

    #[test]
    fn the_newest_place_of_each_page_comes_back() {
        let mut map = PageMap::default();
        for (first, gfn) in (500..600).enumerate() {
            map.set(gfn, 32, first, gfn);
        }
        map.set(510, 5000, 0, 7);
        map.set_zero(8192);
        map.set_zero(8193);
        map.set(9000, 5000, 1, 9);
        map.forget(9000);
        map.forget(11_000);
        let (bytes, sum) = bytes_of(&map.finish());
        let index = decode(&bytes, sum).unwrap();
        assert_eq!(index.pages().len(), 102);
        assert_eq!(index.zero_pages(), 2);
        let found = |gfn| {
            index.find(gfn).map(|e| (e.at, e.first + gfn - e.run.start, index.digest(e, gfn)))
        };
        assert_eq!(found(500), Some((32, 0, 500)));
        assert_eq!(found(599), Some((32, 99, 599)));
        assert_eq!(found(510), Some((5000, 0, 7)));
        assert_eq!(found(511), Some((32, 11, 511)));
        assert_eq!(found(8193).map(|f| (f.0, f.2)), Some((0, 0)));
        assert_eq!([499, 600, 8194, 9000].map(found), [None; 4]);
    }

    #[test]
    fn entries_that_no_writer_makes_are_refused() {
        let cases: [(&str, [[u64; 4]; 2]); 6] = [
            ("outside", [[0, 1, 32, 0], [4095, 2, 32, 0]]),
            ("outside", [[0, 0, 32, 0], [4, 1, 32, 0]]),
            ("overlaps", [[4, 4, 32, 0], [7, 1, 32, 0]]),
            ("no frame", [[4, 1, 31, 0], [7, 1, 32, 0]]),
            ("no frame", [[4, 1, 1 << 20, 0], [7, 1, 32, 0]]),
            ("no frame", [[4, 2, 32, 255], [7, 1, 32, 0]]),
        ];
        for (words, entries) in cases {
            let mut bytes = 2u64.to_le_bytes().to_vec();
            bytes.extend(entries.as_flattened().iter().flat_map(|word| word.to_le_bytes()));
            let why = decode(&bytes, Sum(0)).unwrap_err();
            assert!(why.contains(words), "{words}: {why}");
        }
    }

    #[test]
    fn any_flipped_or_missing_byte_is_an_error_and_never_a_panic() {
        let mut map = PageMap::default();
        map.set(5, 32, 0, 1);
        map.set(6, 32, 1, 2);
        map.set_zero(9);
        let (good, sum) = bytes_of(&map.finish());
        decode(&good, sum).unwrap();
        for i in 0..good.len() {
            for flip in [1, 0x80] {
                let mut bad = good.clone();
                bad[i] ^= flip;
                assert!(decode(&bad, sum).is_err(), "byte {i}");
            }
            assert!(decode(&good[..i], sum).is_err(), "{i} bytes");
        }
    }
}
