//! How long ago each page was last seen in use, and which are coldest. Pure.
//!
//! A page that was written since the last look, or brought back, is young; each look that finds it untouched makes
//! it older. One that was brought back soon after it had been taken away is of the kind that is only read: it needs
//! more looks to count as cold, the more often that happened.

use ferry_pages::{PageSet, Run};

/// Looks after which nothing gets colder.
const OLDEST: u8 = 15;
/// What each return costs, in looks.
const RETURN: u8 = 3;

/// The ages of the pages of one machine.
#[derive(Debug)]
pub(crate) struct Ages {
    /// Where each extent's ages begin.
    extents: Vec<(Run, usize)>,
    /// Low half: looks since it was in use. High half: returns.
    ages: Vec<u8>,
    /// Where the next search begins.
    hand: usize,
    looks: u64,
}

impl Ages {
    pub(crate) fn new(extents: impl Iterator<Item = Run>) -> Self {
        let mut count = 0;
        let extents = extents
            .map(|run| {
                let first = count;
                // Guest memory is mapped: it fits into the address space.
                count += usize::try_from(run.pages).unwrap_or(0);
                (run, first)
            })
            .collect();
        Self { extents, ages: vec![0; count], hand: 0, looks: 0 }
    }

    fn index(&self, gfn: u64) -> Option<usize> {
        let (run, first) = self.extents.iter().find(|(r, _)| r.start <= gfn && gfn < r.end())?;
        Some(first + usize::try_from(gfn - run.start).ok()?)
    }

    fn gfn(&self, index: usize) -> u64 {
        let after = self.extents.partition_point(|(_, first)| *first <= index);
        let (run, first) = self.extents[after - 1];
        run.start + (index - first) as u64
    }

    /// A look: `written` were, all others were not.
    pub(crate) fn look(&mut self, written: &PageSet) {
        self.looks += 1;
        let forgive = self.looks.is_multiple_of(16);
        for age in &mut self.ages {
            let (looks, mut returns) = (*age & 15, *age >> 4);
            returns -= u8::from(forgive && returns > 0);
            *age = (looks + 1).min(OLDEST) | returns << 4;
        }
        for gfn in written.runs().flat_map(|run| run.start..run.end()) {
            if let Some(index) = self.index(gfn) {
                self.ages[index] &= !15;
            }
        }
    }

    /// `gfn` was brought back, or cannot be taken away.
    pub(crate) fn returned(&mut self, gfn: u64) {
        if let Some(index) = self.index(gfn) {
            let returns = ((self.ages[index] >> 4) + 1).min(15);
            self.ages[index] = returns << 4;
        }
    }

    fn coldness(age: u8) -> u8 {
        (age & 15).saturating_sub((age >> 4).saturating_mul(RETURN))
    }

    /// Whether `gfn` was not in use for a while.
    pub(crate) fn is_cold(&self, gfn: u64) -> bool {
        self.index(gfn).is_some_and(|i| Self::coldness(self.ages[i]) > 0)
    }

    /// How many of `pages` were in use at the last look.
    pub(crate) fn young(&self, pages: &PageSet) -> u64 {
        let all = pages.runs().flat_map(|run| run.start..run.end());
        all.filter(|gfn| self.index(*gfn).is_some_and(|i| self.ages[i] & 15 == 0)).count() as u64
    }

    /// At most `count` of `pages`, the coldest that there are, going round; if `warm`, any at all.
    pub(crate) fn coldest(&mut self, pages: &PageSet, count: usize, warm: bool) -> Vec<u64> {
        let mut by_coldness = [0usize; 1 + OLDEST as usize];
        let indices: Vec<usize> = pages
            .runs()
            .flat_map(|run| run.start..run.end())
            .filter_map(|gfn| self.index(gfn))
            .collect();
        for index in &indices {
            by_coldness[usize::from(Self::coldness(self.ages[*index]))] += 1;
        }
        let (mut least, mut found) = (OLDEST, by_coldness[usize::from(OLDEST)]);
        let lowest = u8::from(!warm);
        while found < count && least > lowest {
            least -= 1;
            found += by_coldness[usize::from(least)];
        }
        let begin = indices.partition_point(|index| *index < self.hand);
        let around = indices[begin..].iter().chain(&indices[..begin]);
        let chosen: Vec<usize> = around
            .filter(|index| Self::coldness(self.ages[**index]) >= least)
            .take(count)
            .copied()
            .collect();
        self.hand = chosen.last().map_or(self.hand, |last| last + 1);
        chosen.into_iter().map(|index| self.gfn(index)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(pages: impl IntoIterator<Item = u64>) -> PageSet {
        pages.into_iter().map(|gfn| Run::new(gfn, 1)).collect()
    }

    #[test]
    fn what_was_not_written_longest_goes_first_and_what_came_back_stays() {
        let mut ages = Ages::new([Run::new(0, 4), Run::new(100, 4)].into_iter());
        let all = set((0..4).chain(100..104));
        assert!(ages.coldest(&all, 8, false).is_empty());
        assert_eq!(ages.coldest(&all, 8, true).len(), 8);
        for _ in 0..3 {
            ages.look(&set([0, 100]));
        }
        ages.look(&set([0, 100, 101]));
        assert_eq!(ages.young(&all), 3);
        let mut coldest = ages.coldest(&all, 5, false);
        coldest.sort_unstable();
        assert_eq!(coldest, [1, 2, 3, 102, 103]);
        ages.returned(102);
        ages.look(&set([0]));
        ages.look(&set([0]));
        // It was not written, and yet it is not cold.
        let cold = ages.coldest(&all, 8, false);
        assert!(cold.contains(&103) && !cold.contains(&102) && !cold.contains(&0), "{cold:?}");
        for _ in 0..20 {
            ages.look(&set([0]));
        }
        assert!(ages.coldest(&all, 8, false).contains(&102));
    }

    #[test]
    fn the_search_goes_round() {
        let mut ages = Ages::new([Run::new(0, 10)].into_iter());
        let all = set(0..10);
        ages.look(&PageSet::new());
        assert_eq!(ages.coldest(&all, 4, false), [0, 1, 2, 3]);
        assert_eq!(ages.coldest(&all, 4, false), [4, 5, 6, 7]);
        assert_eq!(ages.coldest(&all, 4, false), [8, 9, 0, 1]);
    }
}
