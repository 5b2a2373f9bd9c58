//! A machine that runs before its pages are here, as its host sees it.

use std::sync::Arc;

use ferry_pages::PageSet;

/// Whoever brings a machine's pages.
pub(crate) trait Bringer: Send + Sync {
    /// Pages that are not here.
    fn missing(&self) -> PageSet;
    /// Brings no more; see [`Fetching::abandon`].
    fn abandon(&self);
    /// Why some of them never come, if that is so.
    fn trouble(&self) -> Option<String>;
}

/// A machine that runs here before its pages are here.
#[derive(Clone)]
pub struct Fetching(Arc<dyn Bringer>);

impl Fetching {
    pub(crate) fn new(bringer: Arc<dyn Bringer>) -> Self {
        Self(bringer)
    }

    /// Pages that are still to come.
    pub fn missing(&self) -> u64 {
        self.0.missing().len()
    }

    /// Whether whoever touches the page at frame `gfn` would wait for it.
    pub fn lacks(&self, gfn: u64) -> bool {
        self.0.missing().contains(gfn)
    }

    /// Why some pages never come, in words, if that is so: whoever touches one of them waits for ever. All
    /// others still come.
    pub fn trouble(&self) -> Option<String> {
        self.0.trouble()
    }

    /// Ends it: pages that are not here never come, and read as zeros.
    ///
    /// Only for a machine that is being thrown away, whose vCPUs have been told to stop: those that wait
    /// for a page wake, and can end.
    pub fn abandon(&self) {
        self.0.abandon();
    }
}

impl std::fmt::Debug for Fetching {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Fetching").field("missing", &self.missing()).finish_non_exhaustive()
    }
}
