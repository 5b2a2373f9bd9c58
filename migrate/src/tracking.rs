//! Trackers: started so that no write is lost; harvested and stopped, for a machine that stays.

use std::sync::{Arc, MutexGuard, PoisonError};

use ferry_dirtylog::DirtySource;
use ferry_memory::{DiscardLog, GuestView, Touched};
use ferry_pages::PageSet;

use crate::round::Trackers;
use crate::{Guest, words};

/// Trackers at work; they stop when this is dropped.
pub(crate) struct Tracking {
    trackers: Trackers,
    /// All that was collected: a machine that goes on owes it to other readers of its log.
    harvested: PageSet,
}

/// Starts the trackers of `guest`, puts them into `trackers`, and lists the pages that hold data, so that no
/// write falls in between.
///
/// Pages that hold nothing are re-armed at once (they are not mapped: it costs nothing), and then
/// looked for again: a page touched before the re-arming shows in the second look, one touched
/// after it shows in the next harvest.
pub(crate) fn start(
    trackers: &Trackers,
    guest: &mut dyn Guest,
    view: &GuestView,
) -> Result<PageSet, String> {
    let mut sources = guest.dirty_sources().map_err(|e| words(&e))?;
    sources.push(Box::new(DiscardLog::new(view.clone())));
    let mut trackers = lock(trackers);
    *trackers = sources;
    let mut scratch = PageSet::new();
    for tracker in trackers.iter_mut() {
        tracker.start().map_err(|e| words(&e))?;
        tracker.collect(&mut scratch).map_err(|e| words(&e))?;
    }
    let mut resident = view.resident().map_err(|e| words(&e))?;
    let mut untouched: PageSet = view.regions().iter().map(|r| r.run).collect();
    untouched.subtract(&resident);
    for tracker in trackers.iter_mut() {
        tracker.rearm(&untouched).map_err(|e| words(&e))?;
    }
    resident.union_with(&view.resident().map_err(|e| words(&e))?);
    Ok(resident)
}

fn lock(trackers: &Trackers) -> MutexGuard<'_, Vec<Box<dyn DirtySource>>> {
    trackers.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Adds the pages that were written since they were last re-armed to `pages`. What was collected before an
/// error is owed all the same.
pub(crate) fn harvest(trackers: &Trackers, pages: &mut PageSet) -> Result<(), String> {
    lock(trackers).iter_mut().try_for_each(|tracker| tracker.collect(pages)).map_err(|e| words(&e))
}

/// Re-arms `pages`: from here on, only what is written again is harvested again.
pub(crate) fn rearm(trackers: &Trackers, pages: &PageSet) -> Result<(), String> {
    lock(trackers).iter_mut().try_for_each(|tracker| tracker.rearm(pages)).map_err(|e| words(&e))
}

/// Stops the trackers and drops them.
pub(crate) fn stop(trackers: &Trackers) {
    for mut tracker in std::mem::take(&mut *lock(trackers)) {
        if let Err(e) = tracker.stop() {
            tracing::warn!("{}", words(&e));
        }
    }
}

/// Begins to look at what the guest touches, be it only to read, if its memory allows that. It is but a hint
/// for what to send or to restore first: without it, all goes on.
pub(crate) fn look(view: &GuestView) -> Option<Touched> {
    Touched::begin(view).unwrap_or_else(|e| {
        tracing::warn!("the working set is without pages that are only read: {}", words(&e));
        None
    })
}

/// What was touched since `look`; nothing where there was none.
pub(crate) fn touched(look: Option<Touched>) -> PageSet {
    let pages = look.map_or_else(|| Ok(PageSet::new()), |look| look.pages());
    pages.unwrap_or_else(|e| {
        tracing::warn!("the working set is without pages that are only read: {}", words(&e));
        PageSet::new()
    })
}

impl Tracking {
    /// [`start`]s the trackers.
    pub(crate) fn start(
        guest: &mut dyn Guest,
        view: &GuestView,
    ) -> Result<(Self, PageSet), String> {
        let tracking = Self { trackers: Arc::default(), harvested: PageSet::new() };
        let resident = start(&tracking.trackers, guest, view)?;
        Ok((tracking, resident))
    }

    /// For a round, which re-arms.
    pub(crate) fn trackers(&self) -> Trackers {
        self.trackers.clone()
    }

    /// The pages that were written since they were last re-armed.
    pub(crate) fn harvest(&mut self) -> Result<PageSet, String> {
        let mut pages = PageSet::new();
        let collected = harvest(&self.trackers, &mut pages);
        self.harvested.union_with(&pages);
        collected.map(|()| pages)
    }

    /// [`rearm`]s `pages`.
    pub(crate) fn rearm(&self, pages: &PageSet) -> Result<(), String> {
        rearm(&self.trackers, pages)
    }

    /// Ends tracking; gives the guest back all that was collected.
    pub(crate) fn stop(mut self, guest: &mut dyn Guest) {
        stop(&self.trackers);
        guest.return_dirty(&std::mem::take(&mut self.harvested));
    }
}

impl Drop for Tracking {
    fn drop(&mut self) {
        stop(&self.trackers);
    }
}
