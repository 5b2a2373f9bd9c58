//! Which pages were written, of memory that is watched for swap.

use std::sync::Arc;

use ferry_dirtylog::{DirtySource, TrackError, UffdWriteProtect};
use ferry_pages::PageSet;

use crate::swap::Inner;

/// Write-protection by the swap's own userfaultfd. A page that is moved out counts as written: its mark goes with it.
pub(crate) struct SwapTracker {
    swap: Arc<Inner>,
    writes: UffdWriteProtect,
}

impl SwapTracker {
    pub(crate) fn new(swap: Arc<Inner>) -> Option<Self> {
        let writes = UffdWriteProtect::registered(swap.memory.regions().to_vec()).ok()?;
        Some(Self { swap, writes })
    }
}

impl DirtySource for SwapTracker {
    fn name(&self) -> &'static str {
        "swap-wp"
    }

    fn start(&mut self) -> Result<(), TrackError> {
        // First: nothing that is moved out after a page was protected may be missed.
        self.swap.state().suspects = Some(PageSet::new());
        self.writes.start()
    }

    fn collect(&mut self, into: &mut PageSet) -> Result<(), TrackError> {
        let mut written = PageSet::new();
        self.writes.collect(&mut written)?;
        // After the look: a page that is moved out before it is looked at is named here.
        let mut state = self.swap.state();
        if let Some(suspects) = &mut state.suspects {
            into.union_with(suspects);
            suspects.clear();
        }
        state.ages.look(&written);
        into.union_with(&written);
        Ok(())
    }

    fn rearm(&mut self, _pages: &PageSet) -> Result<(), TrackError> {
        Ok(())
    }

    fn stop(&mut self) -> Result<(), TrackError> {
        self.swap.state().suspects = None;
        self.writes.stop()
    }
}

impl Drop for SwapTracker {
    fn drop(&mut self) {
        self.swap.state().suspects = None;
    }
}
