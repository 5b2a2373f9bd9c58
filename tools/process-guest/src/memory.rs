//! The guest's memory: a table of versions, then the arena.

use ferry_guest::workload::{Arena, Params};
use ferry_memory::{GuestView, Mapping};
use ferry_pages::{PAGE_BYTES, Run};

use crate::{Config, ProcessError};

/// Bytes of a page.
pub(crate) const PAGE: u64 = PAGE_BYTES as u64;
const ENTRY_BYTES: u64 = 4;

/// Which frames hold what. Frame 0 is the table's first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Plan {
    pub(crate) memory_pages: u64,
    pub(crate) arena: Run,
}

impl Plan {
    pub(crate) fn new(config: &Config, params: &Params) -> Result<Self, ProcessError> {
        let memory_bytes = config.memory_bytes;
        let bad = |why: String| ProcessError::Memory { memory_bytes, why };
        if !memory_bytes.is_multiple_of(PAGE) || memory_bytes > Params::MAX_ARENA_BYTES {
            let most = Params::MAX_ARENA_BYTES >> 40;
            return Err(bad(format!("must be whole pages of {PAGE} bytes, {most} TiB at most")));
        }
        let memory_pages = memory_bytes / PAGE;
        let table = |arena: u64| (arena * ENTRY_BYTES).div_ceil(PAGE);
        let largest = memory_pages - table(memory_pages);
        let pages = if params.arena_bytes == 0 { largest } else { params.arena_bytes / PAGE };
        if pages < u64::from(params.cpus) {
            return Err(bad(format!("an arena of {pages} pages for {} workers", params.cpus)));
        }
        if pages > largest {
            return Err(bad(format!("arena={} does not fit, with its table", pages * PAGE)));
        }
        Ok(Self { memory_pages, arena: Run::new(table(pages), pages) })
    }

    /// The frame with the table's entry for page `index` of the arena.
    pub(crate) fn table_frame(index: u64) -> u64 {
        index * ENTRY_BYTES / PAGE
    }
}

/// The memory itself.
#[derive(Debug)]
pub(crate) struct Memory {
    view: GuestView,
    table: usize,
    arena: usize,
}

impl Memory {
    #[expect(unsafe_code, reason = "a view is of memory that is promised to stay")]
    pub(crate) fn map(config: &Config, plan: &Plan) -> Result<Self, ProcessError> {
        let fail = |e| ProcessError::Map { name: config.name.clone(), source: Box::new(e) };
        let mapping = Mapping::for_machine(plan.memory_pages, config.huge_pages).map_err(fail)?;
        let (region, table) = (mapping.region(0, 0), mapping.host());
        // SAFETY: the view keeps the mapping, which is used by address and as atomics only.
        let view = unsafe { GuestView::new(vec![region]) }.map_err(fail)?.keeping(mapping);
        // Inside the mapping, which fits into the address space.
        let before = usize::try_from(plan.arena.start).unwrap_or(0) * PAGE_BYTES;
        Ok(Self { view, table, arena: table + before })
    }

    /// Pages that are given back together: those of a huge page, or 1.
    pub(crate) fn unit(&self) -> u64 {
        self.view.regions().iter().map(|r| r.unit).max().unwrap_or(1)
    }

    pub(crate) fn view(&self) -> GuestView {
        self.view.clone()
    }
}

#[expect(
    clippy::cast_possible_truncation,
    reason = "offsets into a mapping fit into the address space"
)]
fn at<T>(base: usize, offset: u64) -> *mut T {
    std::ptr::with_exposed_provenance_mut(base + offset as usize)
}

#[expect(unsafe_code, reason = "the workload reaches memory by address")]
// SAFETY: `Plan` keeps table and arena inside the mapping and apart, for as many pages as it says; the
// mapping is readable and writable as long as this lives. Others copy from it and, while no worker runs,
// to it, without references.
unsafe impl Arena for Memory {
    #[inline]
    fn page(&self, index: u64) -> *mut u64 {
        at(self.arena, index * PAGE)
    }

    #[inline]
    fn expected(&self, index: u64) -> *mut u32 {
        at(self.table, index * ENTRY_BYTES)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan(memory_bytes: u64, workload: &str) -> Result<Plan, ProcessError> {
        let config = Config {
            name: "p".into(),
            memory_bytes,
            huge_pages: false,
            workers: 2,
            workload: workload.into(),
            tracker: crate::Tracker::Software,
        };
        Plan::new(&config, &config.params()?)
    }

    #[test]
    fn table_and_arena_fit_and_do_not_overlap() {
        for pages in [3, 4, 1024, 1025, 1_000_000] {
            let p = plan(pages * PAGE, "").unwrap();
            assert!(p.arena.end() <= pages);
            assert!(Plan::table_frame(p.arena.pages - 1) < p.arena.start);
            assert!(pages - p.arena.end() <= 1, "{p:?}");
        }
        let p = plan(1 << 20, "arena=512K").unwrap();
        assert_eq!(p.arena, Run::new(1, 128));
    }

    #[test]
    fn what_does_not_fit_is_refused_with_its_size() {
        for (bytes, workload, word) in [
            (5000, "", "whole pages"),
            (0, "", "0 pages"),
            (8192, "", "1 pages for 2 workers"),
            (1 << 20, "arena=1M", "arena=1048576"),
            (u64::MAX / PAGE * PAGE, "", "at most"),
            (1 << 20, "arena=x", "arena=x"),
        ] {
            let e = plan(bytes, workload).unwrap_err().to_string();
            assert!(e.contains(word), "{e}");
        }
    }
}
