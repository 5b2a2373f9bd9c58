//! What was given back to the host while somebody has to know.

use std::sync::{Mutex, MutexGuard, PoisonError};

use ferry_dirtylog::{DirtySource, TrackError};
use ferry_pages::{PageSet, Run};

use crate::GuestView;

/// Pages given back since they were last asked for; none while nobody asks.
#[derive(Debug, Default)]
pub(crate) struct Discards(Mutex<Option<PageSet>>);

impl Discards {
    fn pages(&self) -> MutexGuard<'_, Option<PageSet>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn note(&self, run: Run) {
        if let Some(pages) = self.pages().as_mut() {
            pages.insert_run(run);
        }
    }
}

/// Reports pages that were given back by [`GuestView::discard`] as changed: no log of writes sees that they read as
/// zeros now. One at a time for a machine.
#[derive(Debug)]
pub struct DiscardLog(GuestView);

impl DiscardLog {
    /// A log of what is given back of `view`, by it or its clones.
    pub fn new(view: GuestView) -> Self {
        Self(view)
    }
}

impl DirtySource for DiscardLog {
    fn name(&self) -> &'static str {
        "discards"
    }

    fn start(&mut self) -> Result<(), TrackError> {
        *self.0.discards().pages() = Some(PageSet::new());
        Ok(())
    }

    fn collect(&mut self, into: &mut PageSet) -> Result<(), TrackError> {
        if let Some(pages) = self.0.discards().pages().as_mut() {
            into.union_with(pages);
            pages.clear();
        }
        Ok(())
    }

    fn rearm(&mut self, _pages: &PageSet) -> Result<(), TrackError> {
        Ok(())
    }

    fn stop(&mut self) -> Result<(), TrackError> {
        *self.0.discards().pages() = None;
        Ok(())
    }
}

impl Drop for DiscardLog {
    fn drop(&mut self) {
        let _ = self.stop();
    }
}
