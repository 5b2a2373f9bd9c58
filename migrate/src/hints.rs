//! Pages that the guest says are free while it moves: they are left out of the first round and of the samples before it.
//!
//! A hint is a claim about a moment that is over when it is read: the guest may have taken the page back since, and
//! written to it. So a page is left out, and not forgotten: it was re-armed before the guest was asked, nothing
//! re-arms it again before the next harvest, and a write since is found by that one, as for any other page. A page
//! that a harvest or a copy came upon is left out no more.
//!
//! ```text
//!   re-arm all ── ask ── hint ──── leave out ─────── harvest: written since the re-arming? then it is owed
//!                          └─ written? ─▲
//! ```

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use ferry_memory::GuestView;
use ferry_pages::{PageSet, Run};

/// A guest that knows which of its pages are free.
pub trait FreePages: Send {
    /// Asks it: what it says from now on, it says about moments after this call.
    fn begin(&mut self);
    /// Adds the pages that it called free since the last call.
    fn take(&mut self, into: &mut PageSet);
    /// It need say no more, and may use all of them.
    fn end(&mut self);
}

/// What a guest said during one move; all lanes of a round take from it.
#[derive(Clone, Default)]
pub(crate) struct Hints(Arc<Mutex<Said>>);

#[derive(Default)]
struct Said {
    guest: Option<Box<dyn FreePages>>,
    /// Called free since they were re-armed.
    free: PageSet,
    /// Found to be written since it was asked.
    written: PageSet,
    left_out: PageSet,
}

impl Hints {
    fn said(&self) -> MutexGuard<'_, Said> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Asks `guest`, all of whose pages were re-armed.
    pub(crate) fn begin(&self, mut guest: Box<dyn FreePages>) {
        guest.begin();
        self.said().guest = Some(guest);
    }

    /// Takes out of `pages` what the guest called free. Those before frame `armed_to` are re-armed, and what it said
    /// of them is not believed.
    pub(crate) fn leave_out(&self, pages: &mut PageSet, armed_to: u64) {
        let mut said = self.said();
        let said = &mut *said;
        let Some(guest) = &mut said.guest else { return };
        guest.take(&mut said.free);
        for run in pages.runs_in(Run::new(0, armed_to)) {
            said.free.remove_run(run);
        }
        let mut free = said.free.clone();
        free.intersect_with(pages);
        free.subtract(&said.written);
        pages.subtract(&free);
        said.left_out.union_with(&free);
    }

    /// A harvest found these pages: they are owed, whatever the guest says or said of them.
    pub(crate) fn harvested(&self, pages: &PageSet) {
        let mut said = self.said();
        said.left_out.subtract(pages);
        if said.guest.is_some() {
            said.written.union_with(pages);
        }
    }

    /// These pages are sent after all.
    pub(crate) fn sent(&self, pages: &PageSet) {
        self.said().left_out.subtract(pages);
    }

    /// Pages that are left out.
    pub(crate) fn left_out(&self) -> u64 {
        self.said().left_out.len()
    }

    /// The first round is over: the guest may use its pages again.
    pub(crate) fn end(&self) {
        if let Some(mut guest) = self.said().guest.take() {
            guest.end();
        }
    }

    /// Gives what was left out back to the host: the guest stands still for good here, and nothing in it is of use.
    /// How many pages that were.
    pub(crate) fn discard(&self, memory: &GuestView) -> u64 {
        let left_out = std::mem::take(&mut self.said().left_out);
        for run in left_out.runs() {
            if let Err(e) = memory.discard(run) {
                tracing::warn!("pages that the guest called free stay in memory: {e}");
            }
        }
        left_out.len()
    }
}

impl Drop for Said {
    fn drop(&mut self) {
        if let Some(guest) = &mut self.guest {
            guest.end();
        }
    }
}
