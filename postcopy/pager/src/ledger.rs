//! What is owed, where the host holds some pages only 512 together. Pure: see `Demand`.
//!
//! `Demand` counts *units*: what the host holds or lacks as a whole, by the first of its frames. Pages come
//! one by one; a huge page is here when its last owed page came.

use std::time::Duration;

use ferry_pages::{PageSet, Run};
use ferry_postcopy::{Demand, Fault};

/// Memory of huge pages, and how many pages each has.
pub(crate) type Huge = Vec<(Run, u64)>;

/// The ledger of one machine. Its lock is held as [`Demand`] demands.
pub(crate) struct Ledger {
    pub(crate) demand: Demand,
    /// Pages in huge pages that are owed and have not come.
    parts: PageSet,
    huge: Huge,
    complete: bool,
}

/// What must be done about touches.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Todo {
    /// Pages to ask for.
    pub(crate) ask: Vec<u64>,
    /// Units that read as zeros, or are whole: to be placed as they are.
    pub(crate) place: Vec<Run>,
}

impl Ledger {
    pub(crate) fn new(owed: PageSet, huge: Huge) -> Self {
        let (mut units, mut parts) = (owed, PageSet::new());
        for &(memory, unit) in &huge {
            let owed: Vec<Run> = units.runs_in(memory).collect();
            units.remove_run(memory);
            for run in owed {
                parts.insert_run(run);
                let first = (run.start - memory.start) / unit;
                let end = (run.end() - memory.start).div_ceil(unit);
                units.extend((first..end).map(|n| Run::new(memory.start + n * unit, 1)));
            }
        }
        Self { complete: units.is_empty(), demand: Demand::new(units), parts, huge }
    }

    /// The unit of page `gfn`.
    pub(crate) fn unit_of(&self, gfn: u64) -> Run {
        let huge = self.huge.iter().find(|(memory, _)| memory.start <= gfn && gfn < memory.end());
        huge.map_or(Run::new(gfn, 1), |(memory, unit)| {
            Run::new(gfn - (gfn - memory.start) % unit, *unit)
        })
    }

    /// What `run` begins with: pages that are units, or a part of one huge page.
    pub(crate) fn stretch(&self, run: Run) -> Run {
        let unit = self.unit_of(run.start);
        let end = if unit.pages > 1 {
            unit.end()
        } else {
            let later = self.huge.iter().map(|(memory, _)| memory.start);
            later.filter(|start| *start > run.start).min().unwrap_or(u64::MAX)
        };
        Run::new(run.start, run.end().min(end) - run.start)
    }

    /// Thread `waiter` touched `gfn`.
    pub(crate) fn fault(&mut self, gfn: u64, now: Duration, waiter: u32, todo: &mut Todo) {
        let unit = self.unit_of(gfn);
        match self.demand.fault(unit.start, now, waiter) {
            Fault::Ask => todo.ask.extend(self.owed_of(unit)),
            Fault::Asked => {}
            // One that is here is left as it is, and who waits is woken. Where it is gone again (its file was
            // cut), it reads as zero.
            Fault::Zero | Fault::Here => todo.place.push(unit),
        }
    }

    /// The guest gave the pages of `run` back.
    pub(crate) fn discarded(&mut self, run: Run, now: Duration, todo: &mut Todo) {
        let mut rest = run;
        while rest.pages > 0 {
            let stretch = self.stretch(rest);
            rest = Run::new(stretch.end(), rest.end() - stretch.end());
            let unit = self.unit_of(stretch.start);
            if unit.pages == 1 {
                let freed = self.demand.discarded(stretch);
                todo.place.extend(freed.into_iter().map(|gfn| Run::new(gfn, 1)));
                continue;
            }
            self.parts.remove_run(stretch);
            if stretch == unit {
                let freed = self.demand.discarded(Run::new(unit.start, 1));
                todo.place.extend(freed.iter().map(|_| unit));
            } else if self.is_whole(unit) && self.demand.missing().contains(unit.start) {
                // What is left of it came before.
                let here = |_| Ok::<_, std::convert::Infallible>(1);
                let _ = self.demand.place(Run::new(unit.start, 1), || now, here, |_| {});
                todo.place.push(unit);
            }
        }
    }

    /// The pages of `run`, a part of a huge page, that are owed.
    pub(crate) fn parts_in(&self, run: Run) -> Vec<Run> {
        self.parts.runs_in(run).collect()
    }

    /// The pages of `part` have come.
    pub(crate) fn came(&mut self, part: Run) {
        self.parts.remove_run(part);
    }

    /// Whether every owed page of `unit`, a huge page, has come.
    pub(crate) fn is_whole(&self, unit: Run) -> bool {
        self.parts.count_in(unit) == 0
    }

    fn owed_of(&self, unit: Run) -> Vec<u64> {
        if unit.pages == 1 {
            return vec![unit.start];
        }
        self.parts.runs_in(unit).flat_map(|run| run.start..run.end()).collect()
    }

    /// The pages that have not come.
    pub(crate) fn missing(&self) -> PageSet {
        let mut missing = self.demand.missing().clone();
        for (memory, _) in &self.huge {
            missing.remove_run(*memory);
        }
        missing.union_with(&self.parts);
        missing
    }

    /// The pages that threads wait for, in the order in which they were wanted.
    pub(crate) fn outstanding(&self) -> Vec<u64> {
        self.demand.outstanding().flat_map(|gfn| self.owed_of(self.unit_of(gfn))).collect()
    }

    /// Whether the last page came; true once.
    pub(crate) fn ends(&mut self) -> bool {
        let ends = !self.complete && self.demand.is_complete();
        self.complete |= ends;
        ends
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: Duration = Duration::ZERO;

    /// Pages 0 to 99, and four huge pages of 8 from 104 on.
    fn ledger(owed: &[Run]) -> Ledger {
        Ledger::new(owed.iter().copied().collect(), vec![(Run::new(104, 32), 8)])
    }

    fn fault(ledger: &mut Ledger, gfn: u64) -> Todo {
        let mut todo = Todo::default();
        ledger.fault(gfn, NOW, 1, &mut todo);
        todo
    }

    fn discard(ledger: &mut Ledger, run: Run) -> Todo {
        let mut todo = Todo::default();
        ledger.discarded(run, NOW, &mut todo);
        todo
    }

    #[test]
    fn a_huge_page_is_asked_for_as_a_whole_and_once() {
        let mut ledger = ledger(&[Run::new(90, 20), Run::new(114, 2)]);
        assert_eq!(ledger.missing().len(), 22);
        assert_eq!(fault(&mut ledger, 92).ask, [92]);
        assert_eq!(fault(&mut ledger, 111).ask, [104, 105, 106, 107, 108, 109]);
        assert!(fault(&mut ledger, 104).ask.is_empty());
        assert_eq!(ledger.outstanding(), [92, 104, 105, 106, 107, 108, 109]);
        // What has come is not asked for again; a unit that was never owed reads as zeros.
        ledger.came(Run::new(104, 4));
        assert_eq!(ledger.outstanding(), [92, 108, 109]);
        assert_eq!(ledger.missing().len(), 18);
        assert_eq!(fault(&mut ledger, 130).place, [Run::new(128, 8)]);
    }

    #[test]
    fn stretches_end_where_the_size_of_pages_changes() {
        let ledger = ledger(&[]);
        for (run, stretch) in [
            (Run::new(90, 5), Run::new(90, 5)),
            (Run::new(90, 40), Run::new(90, 14)),
            (Run::new(106, 40), Run::new(106, 6)),
            (Run::new(112, 3), Run::new(112, 3)),
            (Run::new(136, 50), Run::new(136, 50)),
        ] {
            assert_eq!(ledger.stretch(run), stretch, "{run:?}");
        }
    }

    #[test]
    fn a_huge_page_whose_last_owed_pages_are_given_back_is_here() {
        let mut ledger = ledger(&[Run::new(104, 16)]);
        assert_eq!(fault(&mut ledger, 104).ask.len(), 8);
        ledger.came(Run::new(104, 6));
        assert_eq!(discard(&mut ledger, Run::new(110, 1)), Todo::default());
        assert_eq!(discard(&mut ledger, Run::new(109, 3)).place, [Run::new(104, 8)]);
        assert!(ledger.outstanding().is_empty());
        assert!(!ledger.ends());
        // All of one: gone for good, and zeros to who waits.
        assert_eq!(fault(&mut ledger, 112).ask.len(), 8);
        assert_eq!(discard(&mut ledger, Run::new(104, 16)).place, [Run::new(112, 8)]);
        assert!(ledger.missing().is_empty());
        assert!(ledger.ends() && !ledger.ends());
        assert_eq!(fault(&mut ledger, 113).place, [Run::new(112, 8)]);
    }
}
