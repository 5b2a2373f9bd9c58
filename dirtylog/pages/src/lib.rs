//! Sets of guest pages and the layout of guest memory.
//!
//! [`PageSet`] says *which* pages; [`Layout`] says which pages a machine has. Both are pure: no clock,
//! thread, socket or `unsafe`. A page is named by its guest frame number (gfn: guest-physical address
//! ÷ [`PAGE_BYTES`]). This crate does not know where a page lives on the host or how it travels.

mod chunk;
mod layout;
mod page_set;
mod rate;

pub use layout::{Extent, Layout, LayoutError};
pub use page_set::{PageSet, Runs};
pub use rate::DirtyRate;

/// Bytes in a guest page. Larger host pages (THP, hugetlb) are runs of these.
pub const PAGE_BYTES: usize = 4096;

/// A run of consecutive guest pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Run {
    /// The first page's guest frame number.
    pub start: u64,
    /// How many pages.
    pub pages: u64,
}

impl Run {
    /// `pages` pages from frame `start`.
    pub const fn new(start: u64, pages: u64) -> Self {
        Self { start, pages }
    }

    /// The first frame after the run (saturating).
    pub const fn end(&self) -> u64 {
        self.start.saturating_add(self.pages)
    }
}
