//! A machine's memory in the simulation: for each page a stamp of its place and version.

use std::fmt;

use ferry_pages::{PageSet, Run};

/// Pages of the machine: as many as a word has bits.
pub(crate) const PAGES: u64 = 64;

/// A set of the machine's pages, a bit each.
pub(crate) type Mask = u64;

pub(crate) fn bit(page: u64) -> Mask {
    1 << page
}

/// The pages of `mask`, ascending.
pub(crate) fn pages(mut mask: Mask) -> impl Iterator<Item = u64> {
    std::iter::from_fn(move || {
        let page = u64::from(mask.trailing_zeros());
        mask &= mask.wrapping_sub(1);
        (page < PAGES).then_some(page)
    })
}

pub(crate) fn mask(set: &PageSet) -> Mask {
    if set.is_empty() { 0 } else { set.runs_in(Run::new(0, PAGES)).fold(0, |m, r| m | of_run(r)) }
}

pub(crate) fn of_run(run: Run) -> Mask {
    (Mask::MAX >> (PAGES - run.pages)) << run.start
}

pub(crate) fn set(mask: Mask) -> PageSet {
    pages(mask).map(|page| Run::new(page, 1)).collect()
}

/// What a page holds: whose content it is, and which version; or zeros.
#[derive(Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Stamp(u32);

const VERSION_BITS: u32 = 24;

impl Stamp {
    pub(crate) const ZERO: Self = Self(0);

    /// Version `version`, from 1, of `page`.
    pub(crate) fn new(page: u64, version: u32) -> Self {
        Self((page as u32) << VERSION_BITS | version)
    }

    pub(crate) fn is_zero(self) -> bool {
        self == Self::ZERO
    }

    /// Of this content at `page`; nothing for a zero page.
    pub(crate) fn digest(self, page: u64) -> u64 {
        match self {
            Self::ZERO => 0,
            Self(stamp) => (u64::from(stamp) << 8 | page).wrapping_mul(0x9e37_79b9_7f4a_7c15),
        }
    }
}

impl fmt::Debug for Stamp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.is_zero() {
            return write!(f, "zeros");
        }
        let (page, version) = (self.0 >> VERSION_BITS, self.0 & ((1 << VERSION_BITS) - 1));
        write!(f, "version {version} of page {page}")
    }
}

/// All pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Memory([Stamp; PAGES as usize]);

impl Memory {
    pub(crate) const ZERO: Self = Self([Stamp::ZERO; PAGES as usize]);

    /// The first version of the pages of `mask`.
    pub(crate) fn first_versions(mask: Mask) -> Self {
        let mut memory = Self::ZERO;
        pages(mask).for_each(|page| memory[page] = Stamp::new(page, 1));
        memory
    }

    /// Pages that do not hold the same in both.
    pub(crate) fn differing(&self, other: &Self) -> Mask {
        let pairs = self.0.iter().zip(&other.0).rev();
        pairs.fold(0, |mask, (a, b)| mask << 1 | Mask::from(a != b))
    }

    /// Order-free digest of all of it.
    pub(crate) fn digest(&self) -> u64 {
        (0..).zip(&self.0).fold(0, |sum, (page, stamp)| sum.wrapping_add(stamp.digest(page)))
    }
}

impl std::ops::Index<u64> for Memory {
    type Output = Stamp;
    fn index(&self, page: u64) -> &Stamp {
        &self.0[page as usize]
    }
}

impl std::ops::IndexMut<u64> for Memory {
    fn index_mut(&mut self, page: u64) -> &mut Stamp {
        &mut self.0[page as usize]
    }
}
