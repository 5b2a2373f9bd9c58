//! Which pages were written, of memory that is watched for swap.

use std::sync::{Arc, PoisonError};

use ferry_dirtylog::{DirtySource, TrackError, UffdWriteProtect};
use ferry_pages::PageSet;

use crate::swap::Inner;

/// Write-protection by the swap's own userfaultfd. A page that is moved out counts as written: its mark goes with it.
/// The swap itself looks at the same marks: each tells the other what it found.
pub(crate) struct SwapTracker {
    swap: Arc<Inner>,
    writes: UffdWriteProtect,
    started: bool,
}

impl SwapTracker {
    pub(crate) fn new(swap: Arc<Inner>) -> Option<Self> {
        let writes = UffdWriteProtect::registered(swap.memory.regions().to_vec()).ok()?;
        Some(Self { swap, writes, started: false })
    }
}

impl DirtySource for SwapTracker {
    fn name(&self) -> &'static str {
        "swap-wp"
    }

    fn start(&mut self) -> Result<(), TrackError> {
        let _alone = self.swap.marks.lock().unwrap_or_else(PoisonError::into_inner);
        // First: nothing that is moved out after a page was protected may be missed.
        self.swap.state().suspects = Some(PageSet::new());
        self.started = true;
        let mut written = PageSet::new();
        let protected = self.writes.collect(&mut written);
        self.swap.state().seen.union_with(&written);
        protected
    }

    fn collect(&mut self, into: &mut PageSet) -> Result<(), TrackError> {
        let _alone = self.swap.marks.lock().unwrap_or_else(PoisonError::into_inner);
        let mut written = PageSet::new();
        let collected = self.writes.collect(&mut written);
        // After the look: a page that is moved out before it is looked at is named here.
        let mut state = self.swap.state();
        if let Some(suspects) = &mut state.suspects {
            into.union_with(suspects);
            suspects.clear();
        }
        state.seen.union_with(&written);
        into.union_with(&written);
        collected
    }

    fn rearm(&mut self, _pages: &PageSet) -> Result<(), TrackError> {
        Ok(())
    }

    fn stop(&mut self) -> Result<(), TrackError> {
        self.started = false;
        self.swap.state().suspects = None;
        self.writes.stop()
    }
}

impl Drop for SwapTracker {
    fn drop(&mut self) {
        if self.started {
            self.swap.state().suspects = None;
        }
    }
}
