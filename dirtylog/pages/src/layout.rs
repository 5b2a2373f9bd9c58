//! Which frames a machine's memory has.

use crate::{PageSet, Run};

/// One stretch of guest-physical memory.
pub type Extent = Run;

/// The stretches of guest memory of one machine: ascending, disjoint, not empty.
///
/// Everything that names a page (a frame from a peer, a bundle, an operator) is checked against it.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct Layout(Vec<Extent>);

/// Why a list of extents is not a layout.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LayoutError {
    /// Extent number `0` is empty, or ends beyond [`Layout::MAX_FRAME`].
    BadExtent(usize, Extent),
    /// Extent number `0` begins before the one in front of it ends.
    OutOfOrder(usize),
    /// More extents than [`Layout::MAX_EXTENTS`].
    TooMany(usize),
    /// More pages than [`Layout::MAX_PAGES`], up to the extent with this number.
    TooLarge(usize),
}

impl std::fmt::Display for LayoutError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::BadExtent(i, e) => write!(
                f,
                "memory extent {i} (frame {:#x}, {} pages) is empty or beyond frame {:#x}",
                e.start,
                e.pages,
                Layout::MAX_FRAME
            ),
            Self::OutOfOrder(i) => {
                write!(f, "memory extent {i} overlaps or precedes extent {}", i - 1)
            }
            Self::TooMany(n) => {
                write!(f, "{n} memory extents; at most {} are allowed", Layout::MAX_EXTENTS)
            }
            Self::TooLarge(i) => write!(
                f,
                "memory up to extent {i} is more than {} pages, the most that a machine may have",
                Layout::MAX_PAGES
            ),
        }
    }
}

impl std::error::Error for LayoutError {}

impl Layout {
    /// No more extents than this in one machine.
    pub const MAX_EXTENTS: usize = 1024;
    /// Frames end below this: x86-64 has at most 52 physical address bits.
    pub const MAX_FRAME: u64 = 1 << 40;
    /// No machine has more pages: 16 TiB. A [`PageSet`] of all of them takes some MiB, so that a peer or a file
    /// that names a huge machine in a few bytes costs no more than that.
    pub const MAX_PAGES: u64 = 1 << 32;

    /// Checks and takes `extents`.
    ///
    /// # Errors
    /// An extent that is empty, too high, or out of order; too many extents or pages.
    pub fn new(extents: Vec<Extent>) -> Result<Self, LayoutError> {
        if extents.len() > Self::MAX_EXTENTS {
            return Err(LayoutError::TooMany(extents.len()));
        }
        let (mut end, mut pages) = (0, 0u64);
        for (i, e) in extents.iter().enumerate() {
            let fits = e.start.checked_add(e.pages).is_some_and(|end| end <= Self::MAX_FRAME);
            if e.pages == 0 || !fits {
                return Err(LayoutError::BadExtent(i, *e));
            }
            if e.start < end {
                return Err(LayoutError::OutOfOrder(i));
            }
            end = e.end();
            // Both are at most MAX_FRAME.
            pages += e.pages;
            if pages > Self::MAX_PAGES {
                return Err(LayoutError::TooLarge(i));
            }
        }
        Ok(Self(extents))
    }

    /// The extents, ascending.
    pub fn extents(&self) -> &[Extent] {
        &self.0
    }

    /// Pages in all extents.
    pub fn pages(&self) -> u64 {
        self.0.iter().map(|e| e.pages).sum()
    }

    /// Whether all of `run` lies inside one extent.
    pub fn contains(&self, run: Run) -> bool {
        let after = self.0.partition_point(|e| e.start <= run.start);
        run.pages > 0 && self.0[..after].last().is_some_and(|e| run.end() <= e.end())
    }

    /// A page's place among all pages of the machine, counted from 0 without holes.
    pub fn index_of(&self, gfn: u64) -> Option<u64> {
        let mut before = 0;
        for e in &self.0 {
            if gfn < e.start {
                return None;
            }
            if gfn < e.end() {
                return Some(before + gfn - e.start);
            }
            before += e.pages;
        }
        None
    }

    /// Every page of the machine.
    pub fn all(&self) -> PageSet {
        self.0.iter().copied().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_across_a_hole_is_outside_the_layout() {
        let layout = Layout::new(vec![Run::new(0, 16), Run::new(32, 16)]).unwrap();
        assert!(layout.contains(Run::new(0, 16)));
        assert!(!layout.contains(Run::new(15, 2)));
        assert!(!layout.contains(Run::new(20, 1)));
        assert!(!layout.contains(Run::new(47, u64::MAX)));
        assert_eq!(layout.index_of(32), Some(16));
        assert_eq!(layout.index_of(31), None);
        assert_eq!(layout.all().len(), 32);
    }

    #[test]
    fn a_machine_of_more_pages_than_a_set_of_them_may_take_is_refused() {
        let most = Run::new(1 << 33, Layout::MAX_PAGES - 5);
        assert_eq!(Layout::new(vec![Run::new(0, 5), most]).map(|l| l.pages()), Ok(1 << 32));
        assert_eq!(Layout::new(vec![Run::new(0, 6), most]), Err(LayoutError::TooLarge(1)));
        let all = Layout::new(vec![Run::new(0, Layout::MAX_FRAME)]).unwrap_err();
        assert!(all.to_string().contains("more than 4294967296 pages"), "{all}");
    }

    #[test]
    fn pages_are_counted_without_holes() {
        let layout = Layout::new(vec![Run::new(8, 4), Run::new(16, 4)]).unwrap();
        assert_eq!(layout.pages(), 8);
        let index = |gfn| layout.index_of(gfn);
        assert_eq!([7, 8, 11, 12, 15, 16, 19, 20].map(index), {
            [None, Some(0), Some(3), None, None, Some(4), Some(7), None]
        });
        for gfn in [7, 12, 15, 20] {
            assert!(!layout.contains(Run::new(gfn, 1)), "{gfn}");
        }
        assert!(!layout.contains(Run::new(8, 0)));
    }

    #[test]
    fn what_is_wrong_with_extents_is_said_with_numbers() {
        let said = |extents: Vec<Run>| Layout::new(extents).unwrap_err().to_string();
        assert!(said(vec![Run::new(16, 0)]).contains("extent 0 (frame 0x10, 0 pages) is empty"));
        assert!(
            said(vec![Run::new(4, 4), Run::new(6, 1)])
                .contains("extent 1 overlaps or precedes extent 0")
        );
        let most = (0..=Layout::MAX_EXTENTS as u64).map(|n| Run::new(2 * n, 1));
        assert!(said(most.clone().collect()).contains("1025 memory extents; at most 1024"));
        assert!(Layout::new(most.take(Layout::MAX_EXTENTS).collect()).is_ok());
    }

    #[test]
    fn bad_extents_are_named() {
        assert_eq!(
            Layout::new(vec![Run::new(4, 4), Run::new(6, 1)]),
            Err(LayoutError::OutOfOrder(1))
        );
        assert!(matches!(Layout::new(vec![Run::new(4, 0)]), Err(LayoutError::BadExtent(0, _))));
        assert!(matches!(
            Layout::new(vec![Run::new(1, u64::MAX)]),
            Err(LayoutError::BadExtent(0, _))
        ));
    }
}
