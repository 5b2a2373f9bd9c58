//! One visit of a page: check every word, then write the next version.
//!
//! Words are read and written one by one through relaxed atomics: a migration reads the same memory
//! meanwhile.

#![expect(unsafe_code, reason = "guest memory is reached by address")]

use core::sync::atomic::{AtomicU32, AtomicU64, Ordering::Relaxed};

use super::{
    ANYTHING, Mismatch, NEVER_WRITTEN, Pace, Params, Part, Pattern, Stamp, WORDS, Walk,
    next_version,
};

/// Where the arena and the table of versions lie.
///
/// # Safety
/// For every index of the arena, `page` returns the address of 4096 bytes, aligned to
/// them, and `expected` that of an aligned `u32`; both can be read and written as long as the arena
/// lives, no two overlap, and nothing else writes them but as atomics.
pub unsafe trait Arena {
    /// The first word of page `index`.
    fn page(&self, index: u64) -> *mut u64;
    /// The version that page `index` should have.
    fn expected(&self, index: u64) -> *mut u32;
}

/// What a step did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Wrote this page (and its entry in the table).
    Wrote(u64),
    /// Only checked a page, or passed over one.
    Checked,
    /// Nothing is due.
    Wait,
}

/// One vCPU's work: all of its state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Worker {
    part: Part,
    /// The first pages of `part`: what it goes over.
    in_use: Part,
    /// Its place in the pattern.
    pub walk: Walk,
    /// Pages of its part that the fill wrote.
    pub filled: u64,
    /// Pages written, the fill's included.
    pub written: u64,
    /// Pages whose content was checked.
    pub checked: u64,
}

impl Worker {
    /// vCPU `cpu`, below `params.cpus`, at the beginning.
    pub fn new(params: &Params, cpu: u32, arena_pages: u64) -> Self {
        let part = Part::of(cpu, params.cpus, arena_pages);
        Self {
            part,
            in_use: part,
            walk: Walk::new(params.seed, cpu),
            filled: 0,
            written: 0,
            checked: 0,
        }
    }

    /// Whether the fill of its part is not done.
    pub fn filling(&self, params: &Params) -> bool {
        params.fill && self.filled < self.part.pages
    }

    /// The pages that it owns.
    pub fn part(&self) -> Part {
        self.part
    }

    /// How many of them, the first ones, it uses.
    pub fn pages_in_use(&self) -> u64 {
        self.in_use.pages
    }

    /// Goes towards using the first `allowed` pages of its part, and at least one. It takes all that are
    /// allowed at once, and stops using at most `most` in one call: these are returned, and it does not
    /// touch them any more. Say what they are [expected](expect) to hold when they are taken again.
    pub fn fit(&mut self, allowed: u64, most: u64) -> Option<Part> {
        let had = self.in_use.pages;
        self.in_use.pages = allowed.max(had.saturating_sub(most)).clamp(1, self.part.pages);
        let given = had.checked_sub(self.in_use.pages).filter(|pages| *pages > 0)?;
        Some(Part { first: self.in_use.first + self.in_use.pages, pages: given })
    }

    /// Visits the next page, if one is due. The fill is not held back by `pace`.
    ///
    /// # Errors
    /// The page's content is wrong; nothing was written.
    #[inline]
    pub fn step(
        &mut self,
        params: &Params,
        arena: &impl Arena,
        pace: &mut Pace,
        now: u64,
    ) -> Result<Step, Mismatch> {
        let fill = self.filling(params);
        let index = if fill {
            if self.filled >= self.in_use.pages {
                // The rest is not here to be filled.
                self.filled = self.part.pages;
                return Ok(Step::Checked);
            }
            self.filled += 1;
            self.part.first + self.filled - 1
        } else if params.pattern == Pattern::Idle || !pace.due(now) {
            return Ok(Step::Wait);
        } else {
            match self.walk.next(params, self.in_use) {
                Some(index) => index,
                None => return Ok(Step::Wait),
            }
        };
        #[expect(clippy::cast_possible_truncation, reason = "an arena has at most 2^32 pages")]
        let number = index as u32;
        let page = arena.page(index);
        // SAFETY: parts lie inside the arena, and the trait's contract covers every page of it.
        let table = unsafe { AtomicU32::from_ptr(arena.expected(index)) };
        let version = table.load(Relaxed);
        if version != NEVER_WRITTEN && version != ANYTHING {
            // SAFETY: as above.
            unsafe { check(params, page, number, version)? };
            self.checked += 1;
        }
        if params.pattern.only_checks() && !fill {
            return Ok(Step::Checked);
        }
        if fill && params.fill_zeros && version == NEVER_WRITTEN {
            // SAFETY: as above.
            unsafe { check_blank(params, page, number)? };
            self.written += 1;
            return Ok(Step::Wrote(index));
        }
        let next = next_version(version);
        // SAFETY: as above.
        unsafe {
            if version == NEVER_WRITTEN {
                check_blank(params, page, number)?;
            }
            write(params, page, number, next);
        }
        table.store(next, Relaxed);
        self.written += 1;
        Ok(Step::Wrote(index))
    }
}

/// Says that `pages`, which no worker uses, hold [zeros](NEVER_WRITTEN) or [`ANYTHING`].
pub fn expect(arena: &impl Arena, pages: Part, version: u32) {
    for index in pages.first..pages.first + pages.pages {
        // SAFETY: parts lie inside the arena, and the trait's contract covers every page of it.
        unsafe { AtomicU32::from_ptr(arena.expected(index)) }.store(version, Relaxed);
    }
}

/// The version that page `index`, below the arena's length, is expected to have.
pub fn expected(arena: &impl Arena, index: u64) -> u32 {
    // SAFETY: the trait's contract covers every page of the arena.
    unsafe { AtomicU32::from_ptr(arena.expected(index)) }.load(Relaxed)
}

/// # Safety
/// `page` points to the [`WORDS`] words of a page, and `i` is below that.
unsafe fn word<'a>(page: *mut u64, i: usize) -> &'a AtomicU64 {
    // SAFETY: the caller's promise; the reference is to an atomic, so that others may write it.
    unsafe { AtomicU64::from_ptr(page.add(i)) }
}

/// # Safety
/// `page` points to the [`WORDS`] words of a page.
unsafe fn check(params: &Params, page: *mut u64, index: u32, version: u32) -> Result<(), Mismatch> {
    let stamp = Stamp::of(params, index, version);
    // SAFETY: the caller's promise; `try_each` stays below `WORDS`.
    let load = |i| unsafe { word(page, i) }.load(Relaxed);
    match stamp.try_each(|i, wanted| load(i) == wanted) {
        None => Ok(()),
        Some(i) => Err(Mismatch::judge(params, index, version, i, load(i), [load(0), load(1)])),
    }
}

/// A page that was never written must be zero.
///
/// # Safety
/// `page` points to the [`WORDS`] words of a page.
unsafe fn check_blank(params: &Params, page: *mut u64, index: u32) -> Result<(), Mismatch> {
    // SAFETY: the caller's promise; the range stays below `WORDS`.
    let load = |i| unsafe { word(page, i) }.load(Relaxed);
    // A write first: a read would map the zero page and cost a second fault. Of `fetch_or(0)` the compiler makes a read.
    // SAFETY: the caller's promise.
    let _ = unsafe { word(page, 0) }.compare_exchange(0, 0, Relaxed, Relaxed);
    match (0..WORDS).find(|i| load(*i) != 0) {
        None => Ok(()),
        Some(i) => Err(Mismatch::judge(params, index, 0, i, load(i), [load(0), load(1)])),
    }
}

/// # Safety
/// `page` points to the [`WORDS`] words of a page.
unsafe fn write(params: &Params, page: *mut u64, index: u32, version: u32) {
    let stamp = Stamp::of(params, index, version);
    stamp.try_each(|i, wanted| {
        // SAFETY: the caller's promise; `try_each` stays below `WORDS`.
        unsafe { word(page, i) }.store(wanted, Relaxed);
        true
    });
}

#[cfg(test)]
mod tests {
    use super::super::Kind;
    use super::*;

    #[repr(align(4096))]
    struct Page([AtomicU64; WORDS]);

    /// Four pages; one worker that goes round.
    struct Ram {
        pages: Vec<Page>,
        table: Vec<AtomicU32>,
    }

    // SAFETY: both vectors keep their length, and indices below it are all that is asked for.
    unsafe impl Arena for Ram {
        fn page(&self, index: u64) -> *mut u64 {
            self.pages[usize::try_from(index).unwrap()].0.as_ptr() as *mut u64
        }
        fn expected(&self, index: u64) -> *mut u32 {
            self.table[usize::try_from(index).unwrap()].as_ptr()
        }
    }

    impl Ram {
        const PAGES: u32 = 4;

        fn new() -> Self {
            let page = |_| Page([const { AtomicU64::new(0) }; WORDS]);
            let table = |_| AtomicU32::new(0);
            Self { pages: (0..4).map(page).collect(), table: (0..4).map(table).collect() }
        }

        fn copy(&self, page: usize) -> Vec<u64> {
            self.pages[page].0.iter().map(|w| w.load(Relaxed)).collect()
        }

        fn put(&self, page: usize, words: &[u64]) {
            self.pages[page].0.iter().zip(words).for_each(|(w, v)| w.store(*v, Relaxed));
        }

        fn pass(&self, params: &Params, worker: &mut Worker) -> Result<(), Mismatch> {
            let mut pace = Pace::new(params, 0, 0);
            (0..Self::PAGES).try_for_each(|_| worker.step(params, self, &mut pace, 0).map(|_| ()))
        }
    }

    fn after_passes(words: &str, passes: u32) -> (Ram, Params, Worker) {
        let params = Params::parse(words).unwrap();
        let (ram, mut worker) = (Ram::new(), Worker::new(&params, 0, Ram::PAGES.into()));
        for _ in 0..passes {
            ram.pass(&params, &mut worker).unwrap();
        }
        (ram, params, worker)
    }

    #[test]
    fn one_wrong_bit_in_any_word_is_found_at_that_word() {
        for percent in [0, 50, 100] {
            for word in 0..WORDS {
                let (ram, params, mut worker) = after_passes(&format!("random={percent}"), 2);
                ram.pages[2].0[word].fetch_xor(1 << (word % 64), Relaxed);
                let found = ram.pass(&params, &mut worker).unwrap_err();
                assert_eq!((found.index, found.word as usize), (2, word));
                assert_eq!(found.expected ^ found.found, 1 << (word % 64));
            }
        }
    }

    #[test]
    fn an_old_a_foreign_a_half_and_a_lost_page_are_told_apart() {
        let (ram, params, mut worker) = after_passes("", 3);
        let old = ram.copy(1);
        ram.pass(&params, &mut worker).unwrap();
        let (now, other) = (ram.copy(1), ram.copy(3));
        let half = [&now[..WORDS / 2], &old[WORDS / 2..]].concat();
        for (words, kind) in [
            (old, Kind::Stale),
            (other, Kind::OtherPage),
            (half, Kind::Torn),
            (vec![0; WORDS], Kind::Zero),
            (vec![7; WORDS], Kind::Garbage),
        ] {
            ram.put(1, &words);
            let found = ram.pass(&params, &mut { worker }).unwrap_err();
            assert_eq!((found.kind, found.index), (kind, 1));
            // What stood before it in the pass was visited: make all as it was.
            (ram.pages[0].0.iter().zip(0..)).for_each(|(w, i)| {
                w.store(Stamp::new(1, 0, 4, 50).word(i), Relaxed);
            });
            ram.table[0].store(4, Relaxed);
        }
        ram.put(1, &now);
        ram.table[1].store(2, Relaxed);
        assert_eq!(ram.pass(&params, &mut worker).unwrap_err().kind, Kind::Newer);
    }

    #[test]
    fn a_page_never_written_must_be_zero_and_is_left_alone_by_readers() {
        let (ram, params, mut worker) = after_passes("pattern=read", 2);
        assert_eq!((worker.checked, worker.written), (0, 0));
        ram.pages[3].0[100].store(1, Relaxed);
        ram.pass(&params, &mut worker).unwrap();
        let params = Params::parse("").unwrap();
        let found = ram.pass(&params, &mut worker).unwrap_err();
        assert_eq!((found.kind, found.index, found.word), (Kind::NotBlank, 3, 100));
    }

    #[test]
    fn a_lost_write_of_the_fill_is_found_by_a_reader() {
        let (ram, params, mut worker) =
            after_passes("pattern=read fill=all random=3 fill_random=90", 3);
        assert_eq!((worker.written, worker.checked), (4, 8));
        ram.put(2, &[0; WORDS]);
        assert_eq!(ram.pass(&params, &mut worker).unwrap_err().kind, Kind::Zero);
    }

    #[test]
    fn a_fill_of_zeros_leaves_every_page_unwritten_and_zero() {
        let (ram, params, mut worker) = after_passes("pattern=random-read fill=zeros", 2);
        assert_eq!((worker.written, worker.checked), (4, 0));
        assert_eq!(visited(&ram), [false; 4]);
        let writes = Params::parse("fill=zeros").unwrap();
        ram.pass(&writes, &mut worker).unwrap();
        ram.pass(&params, &mut worker).unwrap();
        assert_eq!(visited(&ram), [true; 4]);
        assert_eq!(worker.written, 8);
        ram.pages[1].0[511].fetch_xor(1, Relaxed);
        let mut found = (0..20).filter_map(|_| ram.pass(&params, &mut worker).err());
        assert_eq!(found.next().unwrap().index, 1);
    }

    fn visited(ram: &Ram) -> Vec<bool> {
        ram.table.iter().map(|v| ![NEVER_WRITTEN, ANYTHING].contains(&v.load(Relaxed))).collect()
    }

    #[test]
    fn pages_out_of_use_are_touched_by_no_pattern_and_not_by_the_fill() {
        for words in ["", "pattern=random", "pattern=read", "pattern=moving-set set=8K", "fill=all"]
        {
            let params = Params::parse(words).unwrap();
            let (ram, mut worker) = (Ram::new(), Worker::new(&params, 0, Ram::PAGES.into()));
            assert_eq!(worker.fit(2, 1), Some(Part { first: 3, pages: 1 }));
            assert_eq!(worker.fit(2, 1), Some(Part { first: 2, pages: 1 }));
            assert_eq!(worker.fit(2, 1), None);
            for page in [2, 3] {
                // Whoever reads it finds it wrong.
                ram.put(page, &[9; WORDS]);
            }
            for _ in 0..20 {
                ram.pass(&params, &mut worker).unwrap();
            }
            assert!(!worker.filling(&params));
            assert_eq!(&visited(&ram)[2..], [false, false], "{words}");
            assert_eq!(
                worker.fit(0, 9),
                Some(Part { first: 1, pages: 1 }),
                "one page always stays"
            );
        }
    }

    #[test]
    fn a_page_back_in_use_is_zero_or_anything_as_was_said_and_checked_from_then_on() {
        let (ram, params, mut worker) = after_passes("fill=all", 3);
        let given = worker.fit(2, 9).unwrap();
        expect(&ram, given, ANYTHING);
        ram.put(3, &[9; WORDS]);
        assert_eq!(worker.fit(9, 1), None);
        assert_eq!(worker.pages_in_use(), 4, "what is allowed is taken at once");
        ram.pass(&params, &mut worker).unwrap();
        assert_eq!(visited(&ram), [true; 4]);
        let given = worker.fit(3, 9).unwrap();
        expect(&ram, given, NEVER_WRITTEN);
        worker.fit(4, 0);
        let found = ram.pass(&params, &mut worker).unwrap_err();
        assert_eq!((found.kind, found.index), (Kind::NotBlank, 3));
    }
}
