//! What is known of each page of the machine, and the order in which they are loaded. Pure: see `Demand` and
//! `PushQueue`.

use std::time::Duration;

use ferry_memory::Happened;
use ferry_pages::{PAGE_BYTES, PageSet, Run};
use ferry_postcopy::{Demand, Fault, PushQueue};

use crate::Handover;

/// The ledger of one machine. Its lock is held as `Demand` demands.
pub(crate) struct Ledger {
    pub(crate) demand: Demand,
    pub(crate) queue: PushQueue,
}

/// What must be done about touches, in this order.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Todo {
    /// Pages to place as zeros.
    pub(crate) zeros: Vec<u64>,
    /// Pages to read and place.
    pub(crate) wanted: Vec<u64>,
}

impl Ledger {
    /// A ledger of a machine whose pages of data are `owed`.
    pub(crate) fn new(owed: PageSet) -> Self {
        Self { demand: Demand::new(owed.clone()), queue: PushQueue::new(owed, Vec::new()) }
    }

    /// Takes in what happened at `now`.
    ///
    /// # Errors
    /// A thread waits at this address, which was not handed over.
    pub(crate) fn take_in(
        &mut self,
        touches: &[Happened],
        handover: &Handover,
        now: Duration,
    ) -> Result<Todo, u64> {
        let mut todo = Todo::default();
        for touch in touches {
            match *touch {
                Happened::Fault { address, .. } => {
                    let page = handover.page_at(address).ok_or(address)?;
                    // Firecracker's userfaultfd does not say whose fault it is.
                    match self.demand.fault(page, now, 0) {
                        Fault::Ask => {
                            self.queue.fault(page);
                            todo.wanted.push(page);
                        }
                        Fault::Asked => {}
                        // One that is here is left as it is, and who waits is woken.
                        Fault::Zero | Fault::Here => todo.zeros.push(page),
                    }
                }
                Happened::Removed(start, end) => {
                    // Part of a page cannot be given back.
                    if let Some(run) = handover.pages_between(start, end) {
                        todo.zeros.extend(self.demand.discarded(run));
                    }
                }
            }
        }
        Ok(todo)
    }
}

/// Pages of `page_bytes` that have a page of 4096 bytes in `data`.
pub(crate) fn larger(data: &PageSet, page_bytes: u64) -> PageSet {
    let ratio = page_bytes / PAGE_BYTES as u64;
    let page = |run: Run| {
        let first = run.start / ratio;
        Run::new(first, run.end().div_ceil(ratio) - first)
    };
    data.runs().map(page).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const BASE: u64 = 1 << 30;
    const NOW: Duration = Duration::ZERO;

    fn handover(pages: u64) -> Handover {
        let size = pages * 4096;
        let text = format!(r#"[{{"base_host_virt_addr":{BASE},"size":{size},"offset":0}}]"#);
        Handover::parse(text.as_bytes()).unwrap().unwrap()
    }

    fn fault(page: u64) -> Happened {
        Happened::Fault { address: BASE + page * 4096, thread: 0, write: false }
    }

    fn ledger(owed: Run) -> Ledger {
        Ledger::new([owed].into_iter().collect())
    }

    #[test]
    fn a_page_given_back_while_it_is_wanted_reads_as_zeros() {
        let (handover, mut ledger) = (handover(10), ledger(Run::new(0, 10)));
        // The kernel tells of faults before removals, whichever came first.
        let touches = [fault(3), fault(5), Happened::Removed(BASE + 3 * 4096, BASE + 5 * 4096)];
        let todo = ledger.take_in(&touches, &handover, NOW).unwrap();
        assert_eq!(todo, Todo { zeros: vec![3], wanted: vec![3, 5] });
        let mut placed = Vec::new();
        for page in todo.wanted {
            let put = |run: Run| {
                placed.push(run);
                Ok::<_, ()>(run.pages)
            };
            assert_eq!(ledger.demand.place(Run::new(page, 1), || NOW, put, |_| {}), Ok(1));
        }
        assert_eq!(placed, [Run::new(5, 1)]);
        assert_eq!(ledger.take_in(&[fault(4)], &handover, NOW).unwrap().zeros, [4]);
    }

    #[test]
    fn a_page_that_was_not_placed_is_wanted_still_and_nothing_is_placed_twice() {
        let (handover, mut ledger) = (handover(10), ledger(Run::new(2, 6)));
        assert_eq!(ledger.take_in(&[fault(4)], &handover, NOW).unwrap().wanted, [4]);
        // Memory is being given back: two pages come, and no more.
        let mut offered = Vec::new();
        let mut some = |run: Run| {
            offered.push(run);
            Ok::<_, ()>(run.pages.min(2))
        };
        assert_eq!(ledger.demand.place(Run::new(0, 10), || NOW, &mut some, |_| {}), Ok(4));
        assert_eq!(ledger.demand.place(Run::new(4, 2), || NOW, &mut some, |_| {}), Ok(2));
        assert_eq!(ledger.demand.place(Run::new(0, 10), || NOW, &mut some, |_| {}), Ok(10));
        assert_eq!(offered, [Run::new(2, 6), Run::new(4, 2), Run::new(6, 2)]);
        assert!(ledger.demand.is_complete());
        assert_eq!((ledger.demand.wait_nanos().len(), ledger.demand.counts().pushed), (1, 5));
    }

    #[test]
    fn a_fault_outside_of_what_was_handed_over_is_named() {
        let touches = [fault(1), fault(10)];
        let outside = ledger(Run::new(0, 10)).take_in(&touches, &handover(10), NOW);
        assert_eq!(outside, Err(BASE + 10 * 4096));
    }

    #[test]
    fn a_larger_page_has_data_if_a_part_of_it_has() {
        let data = [Run::new(0, 1), Run::new(511, 2), Run::new(2048, 512)].into_iter().collect();
        let larger = larger(&data, 2 << 20);
        assert_eq!(larger.runs().collect::<Vec<_>>(), [Run::new(0, 2), Run::new(4, 1)]);
    }
}
