//! One visit of a page: check every word, then write the next version.
//!
//! Words are read and written one by one through relaxed atomics: a migration reads the same memory
//! meanwhile.

#![expect(unsafe_code, reason = "guest memory is reached by address")]

use core::sync::atomic::{AtomicU32, AtomicU64, Ordering::Relaxed};

use super::{Mismatch, Pace, Params, Part, Pattern, Stamp, WORDS, Walk, next_version};

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
        Self {
            part: Part::of(cpu, params.cpus, arena_pages),
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
            self.filled += 1;
            self.part.first + self.filled - 1
        } else if params.pattern == Pattern::Idle || !pace.due(now) {
            return Ok(Step::Wait);
        } else {
            match self.walk.next(params, self.part) {
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
        if version != 0 {
            // SAFETY: as above.
            unsafe { check(params, page, number, version)? };
            self.checked += 1;
        }
        if params.pattern == Pattern::Read && !fill {
            return Ok(Step::Checked);
        }
        let next = next_version(version);
        // SAFETY: as above.
        unsafe {
            if version == 0 {
                check_blank(params, page, number)?;
            }
            write(params, page, number, next);
        }
        table.store(next, Relaxed);
        self.written += 1;
        Ok(Step::Wrote(index))
    }
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
    let stamp = Stamp::new(params.seed, index, version, params.percent_at(version));
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
    // A write first: a read would map the zero page and cost a second fault.
    // SAFETY: the caller's promise.
    unsafe { word(page, 0) }.fetch_or(0, Relaxed);
    match (0..WORDS).find(|i| load(*i) != 0) {
        None => Ok(()),
        Some(i) => Err(Mismatch::judge(params, index, 0, i, load(i), [load(0), load(1)])),
    }
}

/// # Safety
/// `page` points to the [`WORDS`] words of a page.
unsafe fn write(params: &Params, page: *mut u64, index: u32, version: u32) {
    let stamp = Stamp::new(params.seed, index, version, params.percent_at(version));
    stamp.try_each(|i, wanted| {
        // SAFETY: the caller's promise; `try_each` stays below `WORDS`.
        unsafe { word(page, i) }.store(wanted, Relaxed);
        true
    });
}
