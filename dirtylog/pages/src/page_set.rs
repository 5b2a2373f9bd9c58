//! A set of guest frames that is small when sparse, when dense and when full.
//!
//! The frame space is cut into chunks of 32768 frames (128 MiB). A chunk that holds nothing is absent, one that
//! holds everything is a mark, and any other is a bitmap of 4 KiB. The representation is canonical, so
//! that equal sets compare equal, and set algebra costs a word operation for 64 pages.

use std::collections::BTreeMap;
use std::collections::btree_map::{self, Entry};

use crate::Run;
use crate::chunk::{
    Bits, CHUNK_FRAMES, CHUNK_FRAMES_U32, CHUNK_SHIFT, Chunk, Piece, chunk_range, offset, pieces,
};

/// A set of guest frames.
///
/// Frames are below `u64::MAX`; that one frame number (which no [`Run`] can end behind) is never a member.
/// A set does not know which frames a machine has: a frame or run from a peer is checked against
/// [`Layout`](crate::Layout) before it is inserted, since a huge run costs memory for each of its chunks.
#[derive(Clone, PartialEq, Eq, Default)]
pub struct PageSet {
    chunks: BTreeMap<u64, Chunk>,
    len: u64,
}

impl PageSet {
    /// The empty set.
    pub fn new() -> Self {
        Self::default()
    }

    /// How many pages.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether it holds no page.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Removes every page.
    pub fn clear(&mut self) {
        self.chunks.clear();
        self.len = 0;
    }

    /// Whether `gfn` is a member.
    pub fn contains(&self, gfn: u64) -> bool {
        self.chunks.get(&(gfn >> CHUNK_SHIFT)).is_some_and(|c| c.contains(offset(gfn)))
    }

    /// How many pages of `run` are members.
    pub fn count_in(&self, run: Run) -> u64 {
        self.overlapping(run).map(|(chunk, piece)| u64::from(chunk.count_in(piece))).sum()
    }

    /// Adds `gfn`; whether it was new.
    pub fn insert(&mut self, gfn: u64) -> bool {
        // The short way where the chunk is a bitmap and stays one: rings and faults name single pages.
        if gfn != u64::MAX
            && let Some(Chunk::Bits(bits)) = self.chunks.get_mut(&(gfn >> CHUNK_SHIFT))
            && bits.count < CHUNK_FRAMES_U32 - 1
        {
            let (before, at) = (bits.count, offset(gfn));
            bits.or((at / 64) as usize, 1 << (at % 64));
            let added = bits.count > before;
            self.len += u64::from(added);
            return added;
        }
        self.insert_run(Run::new(gfn, 1))
    }

    /// Adds the pages of `run`; whether any was new.
    pub fn insert_run(&mut self, run: Run) -> bool {
        let before = self.len;
        for piece in pieces(run) {
            if piece.is_whole() {
                let old = self.chunks.insert(piece.chunk, Chunk::Full);
                self.len += CHUNK_FRAMES - old.map_or(0, |c| u64::from(c.count()));
            } else if !self.is_full(piece.chunk) {
                self.edit(piece.chunk, |bits| piece.words().for_each(|(w, mask)| bits.or(w, mask)));
            }
        }
        self.len > before
    }

    /// Removes `gfn`; whether it was there.
    pub fn remove(&mut self, gfn: u64) -> bool {
        self.remove_run(Run::new(gfn, 1))
    }

    /// Removes the pages of `run`; whether any was there.
    pub fn remove_run(&mut self, run: Run) -> bool {
        let before = self.len;
        let touched: Vec<Piece> = self.overlapping(run).map(|(_, piece)| piece).collect();
        for piece in touched {
            if piece.is_whole() {
                let old = self.chunks.remove(&piece.chunk);
                self.len -= old.map_or(0, |c| u64::from(c.count()));
            } else {
                self.edit(piece.chunk, |bits| {
                    piece.words().for_each(|(w, mask)| bits.clear(w, mask))
                });
            }
        }
        self.len < before
    }

    /// Adds the members of `other`.
    pub fn union_with(&mut self, other: &Self) {
        for (no, theirs) in &other.chunks {
            match (self.chunks.get(no), theirs) {
                (None, _) | (_, Chunk::Full) => {
                    let old = self.chunks.insert(*no, theirs.clone());
                    self.len += u64::from(theirs.count()) - old.map_or(0, |c| u64::from(c.count()));
                }
                (Some(Chunk::Full), _) => {}
                (Some(Chunk::Bits(_)), Chunk::Bits(theirs)) => {
                    self.edit(*no, |ours| {
                        theirs.words.iter().enumerate().for_each(|(w, bits)| ours.or(w, *bits));
                    });
                }
            }
        }
    }

    /// Removes the members of `other`.
    pub fn subtract(&mut self, other: &Self) {
        // Walk whichever has fewer chunks: a small set is often taken from a large one, and the reverse.
        let shared: Vec<u64> = if self.chunks.len() < other.chunks.len() {
            self.chunks.keys().filter(|no| other.chunks.contains_key(no)).copied().collect()
        } else {
            other.chunks.keys().filter(|no| self.chunks.contains_key(no)).copied().collect()
        };
        for no in shared {
            match &other.chunks[&no] {
                Chunk::Full => {
                    let old = self.chunks.remove(&no);
                    self.len -= old.map_or(0, |c| u64::from(c.count()));
                }
                Chunk::Bits(theirs) => self.edit(no, |ours| {
                    theirs.words.iter().enumerate().for_each(|(w, bits)| ours.clear(w, *bits));
                }),
            }
        }
    }

    /// Keeps only the members of `other`.
    pub fn intersect_with(&mut self, other: &Self) {
        let numbers: Vec<u64> = self.chunks.keys().copied().collect();
        for no in numbers {
            match other.chunks.get(&no) {
                Some(Chunk::Full) => {}
                None => {
                    let old = self.chunks.remove(&no);
                    self.len -= old.map_or(0, |c| u64::from(c.count()));
                }
                Some(Chunk::Bits(theirs)) => self.edit(no, |ours| {
                    theirs.words.iter().enumerate().for_each(|(w, bits)| ours.clear(w, !*bits));
                }),
            }
        }
    }

    /// Adds `start + i` for each set bit `i` below `pages` of `words` (least significant bit first, as KVM
    /// gives a dirty log). Words that are missing count as zero.
    pub fn insert_bitmap(&mut self, start: u64, words: &[u64], pages: u64) {
        // Word `k` of the set's own alignment, put together from two of the caller's words.
        let words_hold = u64::try_from(words.len()).unwrap_or(u64::MAX).saturating_mul(64);
        let given = pages.min(words_hold).min(u64::MAX - start);
        let shift = start % 64;
        let word = |k: u64| -> u64 {
            let of = |i: u64| -> u64 {
                let kept = given.saturating_sub(i.saturating_mul(64)).min(64);
                let mask = if kept == 0 { 0 } else { u64::MAX >> (64 - kept) };
                usize::try_from(i).ok().and_then(|i| words.get(i)).map_or(0, |w| w & mask)
            };
            let low = of(k) << shift;
            if shift == 0 || k == 0 { low } else { low | of(k - 1) >> (64 - shift) }
        };
        for piece in pieces(Run::new(start, given)) {
            let chunk_words = piece.lo / 64..piece.hi.div_ceil(64);
            let at = |w: u32| {
                word(((piece.chunk << CHUNK_SHIFT) + u64::from(w) * 64 - (start - shift)) / 64)
            };
            let Some(first) = chunk_words.clone().find(|w| at(*w) != 0) else {
                continue;
            };
            if self.is_full(piece.chunk) {
                continue;
            }
            self.edit(piece.chunk, |bits| {
                for w in first..chunk_words.end {
                    bits.or(w as usize, at(w));
                }
            });
        }
    }

    /// The maximal runs, ascending.
    pub fn runs(&self) -> Runs<'_> {
        self.runs_in(Run::new(0, u64::MAX))
    }

    /// The maximal runs inside `within`, ascending, cut at its borders.
    pub fn runs_in(&self, within: Run) -> Runs<'_> {
        Runs {
            chunks: self.chunks.range(chunk_range(within)),
            current: None,
            at: within.start,
            end: within.end(),
            found: None,
        }
    }

    /// The lowest member.
    pub fn first(&self) -> Option<u64> {
        self.runs().next().map(|run| run.start)
    }

    /// The highest member.
    pub fn last(&self) -> Option<u64> {
        let (no, chunk) = self.chunks.last_key_value()?;
        let at = match chunk {
            Chunk::Full => CHUNK_FRAMES_U32 - 1,
            Chunk::Bits(bits) => {
                let w = (0..CHUNK_FRAMES_U32 / 64).rfind(|w| bits.words[*w as usize] != 0)?;
                w * 64 + 63 - bits.words[w as usize].leading_zeros()
            }
        };
        Some((no << CHUNK_SHIFT) + u64::from(at))
    }

    /// Takes the lowest `max_pages` members out (all, if there are fewer).
    pub fn take_first(&mut self, max_pages: u64) -> Self {
        if max_pages >= self.len {
            return std::mem::take(self);
        }
        let mut taken = Self::new();
        let mut cut = 0;
        for run in self.runs() {
            let pages = run.pages.min(max_pages - taken.len);
            if pages == 0 {
                break;
            }
            taken.insert_run(Run::new(run.start, pages));
            cut = run.start + pages;
        }
        self.remove_run(Run::new(0, cut));
        taken
    }

    fn is_full(&self, no: u64) -> bool {
        matches!(self.chunks.get(&no), Some(Chunk::Full))
    }

    /// Changes a chunk as a bitmap and makes it canonical again.
    fn edit(&mut self, no: u64, change: impl FnOnce(&mut Bits)) {
        match self.chunks.entry(no) {
            Entry::Vacant(slot) => {
                let mut bits = Bits::empty();
                change(&mut bits);
                self.len += u64::from(bits.count);
                if let Some(chunk) = Chunk::canonical(bits) {
                    slot.insert(chunk);
                }
            }
            Entry::Occupied(mut slot) => {
                let before = u64::from(slot.get().count());
                if let Chunk::Bits(bits) = slot.get_mut() {
                    change(bits);
                    self.len = self.len - before + u64::from(bits.count);
                    if bits.count == 0 {
                        slot.remove();
                    } else if bits.count == CHUNK_FRAMES_U32 {
                        slot.insert(Chunk::Full);
                    }
                } else {
                    let mut bits = slot.remove().into_bits();
                    change(&mut bits);
                    self.len = self.len - before + u64::from(bits.count);
                    if let Some(chunk) = Chunk::canonical(bits) {
                        self.chunks.insert(no, chunk);
                    }
                }
            }
        }
    }

    /// The chunks that hold something, with the part of each that lies in `run`.
    fn overlapping(&self, run: Run) -> impl Iterator<Item = (&Chunk, Piece)> {
        self.chunks.range(chunk_range(run)).map(move |(no, chunk)| {
            let (first, last) = (run.start >> CHUNK_SHIFT, run.end() >> CHUNK_SHIFT);
            let lo = if *no == first { offset(run.start) } else { 0 };
            let hi = if *no == last { offset(run.end()) } else { CHUNK_FRAMES_U32 };
            (chunk, Piece { chunk: *no, lo, hi })
        })
    }
}

/// Iterator over the maximal runs of a [`PageSet`], ascending.
#[derive(Clone)]
pub struct Runs<'a> {
    chunks: btree_map::Range<'a, u64, Chunk>,
    current: Option<(u64, &'a Chunk)>,
    at: u64,
    end: u64,
    found: Option<Run>,
}

impl Runs<'_> {
    /// The next run, cut at the end of its chunk.
    fn fragment(&mut self) -> Option<Run> {
        loop {
            let (no, chunk) = match self.current {
                Some(current) => current,
                None => {
                    let (no, chunk) = self.chunks.next()?;
                    *self.current.insert((*no, chunk))
                }
            };
            let base = no << CHUNK_SHIFT;
            let limit = (self.end - base).min(CHUNK_FRAMES);
            let from = self.at.saturating_sub(base).min(limit);
            let (from, limit) = (u32::try_from(from).ok()?, u32::try_from(limit).ok()?);
            let found = match chunk {
                Chunk::Full => Some((from, limit)),
                Chunk::Bits(bits) => bits
                    .find(from, limit, 0)
                    .map(|lo| (lo, bits.find(lo, limit, u64::MAX).unwrap_or(limit))),
            };
            let Some((lo, hi)) = found else {
                self.current = None;
                continue;
            };
            if hi == limit {
                self.current = None;
            }
            let run = Run::new(base + u64::from(lo), u64::from(hi - lo));
            self.at = run.end();
            return Some(run);
        }
    }
}

impl Iterator for Runs<'_> {
    type Item = Run;

    fn next(&mut self) -> Option<Run> {
        let mut run = match self.found.take() {
            Some(run) => run,
            None => self.fragment()?,
        };
        while let Some(next) = self.fragment() {
            if next.start != run.end() {
                self.found = Some(next);
                break;
            }
            run.pages += next.pages;
        }
        Some(run)
    }
}

impl Extend<Run> for PageSet {
    fn extend<I: IntoIterator<Item = Run>>(&mut self, runs: I) {
        for run in runs {
            self.insert_run(run);
        }
    }
}

impl FromIterator<Run> for PageSet {
    fn from_iter<I: IntoIterator<Item = Run>>(runs: I) -> Self {
        let mut set = Self::new();
        set.extend(runs);
        set
    }
}

/// The number of pages and the first runs: a set may be large.
impl std::fmt::Debug for PageSet {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        const SHOWN: usize = 16;
        write!(f, "PageSet({} pages:", self.len)?;
        for run in self.runs().take(SHOWN) {
            write!(f, " {:#x}+{}", run.start, run.pages)?;
        }
        if self.runs().nth(SHOWN).is_some() {
            write!(f, " …")?;
        }
        write!(f, ")")
    }
}
