//! One round's pages, handed out to the lanes a batch at a time.
//!
//! Lanes take from one cursor, so that a slow lane never holds up a fast one. Pages are re-armed a
//! window of memory at a time, just before the first lane copies from that window: late enough that
//! the guest is not stopped by a burst of write faults, early enough that no write is missed.
//!
//! Memory that the guest was seen to write to goes last: the later a page is copied, the less likely it is written
//! again before the round is over.

use std::sync::{Arc, Mutex, PoisonError};

use ferry_codec::MAX_BATCH_PAGES;
use ferry_dirtylog::{DirtySource, TrackError};
use ferry_pages::{PageSet, Run};

use crate::hints::Hints;

/// Frames in a window: 64 MiB.
const WINDOW_PAGES: u64 = 16384;

/// Frames that are taken to be written to alike: 2 MiB.
const ALIKE_PAGES: u64 = 512;

/// The trackers of one machine; several lanes re-arm through them.
pub(crate) type Trackers = Arc<Mutex<Vec<Box<dyn DirtySource>>>>;

/// The pages of one round.
pub(crate) struct Round {
    pub(crate) number: u32,
    cursor: Mutex<Cursor>,
    trackers: Option<Trackers>,
    hints: Option<Hints>,
}

struct Cursor {
    pages: PageSet,
    /// These come after them, as nothing of them was handed out or re-armed yet.
    last: PageSet,
    /// Next frame to hand out.
    next: u64,
    /// Pages below this frame are re-armed.
    armed_to: u64,
}

impl Round {
    /// `pages` of round `number`; `trackers` are re-armed before pages are handed out, unless the
    /// guest stands still.
    pub(crate) fn new(number: u32, pages: PageSet, trackers: Option<Trackers>) -> Self {
        let next = pages.first().unwrap_or(0);
        Self {
            number,
            cursor: Mutex::new(Cursor { pages, last: PageSet::new(), next, armed_to: next }),
            trackers,
            hints: None,
        }
    }

    /// The same, without pages that the guest calls free.
    pub(crate) fn without(self, hints: Hints) -> Self {
        Self { hints: Some(hints), ..self }
    }

    /// The same, and memory around `written` comes last.
    pub(crate) fn last_around(self, written: &PageSet) -> Self {
        {
            let mut cursor = self.cursor.lock().unwrap_or_else(PoisonError::into_inner);
            let cursor = &mut *cursor;
            for run in written.runs() {
                let from = run.start - run.start % ALIKE_PAGES;
                let around = Run::new(from, run.end().next_multiple_of(ALIKE_PAGES) - from);
                cursor.last.insert_run(around);
            }
            cursor.last.intersect_with(&cursor.pages);
            cursor.pages.subtract(&cursor.last);
            cursor.restart();
        }
        self
    }

    /// Whether pages of it may be named instead of sent: what the destination lacks of them it says when it
    /// acknowledges the round, and after the last ones it has no time to.
    pub(crate) fn may_name(&self) -> bool {
        self.trackers.is_some()
    }

    /// Nothing more is handed out, and nothing is re-armed for this round once this returns: it was given up,
    /// and its pages are in later ones.
    pub(crate) fn end(&self) {
        let mut cursor = self.cursor.lock().unwrap_or_else(PoisonError::into_inner);
        cursor.pages.clear();
        cursor.last.clear();
    }

    /// The next pages to copy, at most [`MAX_BATCH_PAGES`], ascending; empty when the round is over.
    pub(crate) fn next_batch(&self) -> Result<Vec<Run>, TrackError> {
        let mut cursor = self.cursor.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(hints) = &self.hints {
            // Not of what is re-armed: a write before that would be found by nobody.
            let armed_to = cursor.armed_to;
            hints.leave_out(&mut cursor.pages, armed_to);
        }
        let mut batch = cursor.batch();
        if batch.is_empty() && !cursor.last.is_empty() {
            cursor.pages = std::mem::take(&mut cursor.last);
            cursor.restart();
            if let Some(hints) = &self.hints {
                hints.leave_out(&mut cursor.pages, 0);
            }
            batch = cursor.batch();
        }
        if let Some(last) = batch.last() {
            let end = last.end();
            cursor.next = end;
            if cursor.armed_to < end
                && let Some(trackers) = &self.trackers
            {
                let from = cursor.armed_to;
                let to = end.max(from + WINDOW_PAGES).next_multiple_of(64);
                let window: PageSet = cursor.pages.runs_in(Run::new(from, to - from)).collect();
                let mut trackers = trackers.lock().unwrap_or_else(PoisonError::into_inner);
                for tracker in trackers.iter_mut() {
                    tracker.rearm(&window)?;
                }
                cursor.armed_to = to;
            }
        }
        Ok(batch)
    }
}

impl Cursor {
    /// Goes to the first of its pages.
    fn restart(&mut self) {
        self.next = self.pages.first().unwrap_or(0);
        self.armed_to = self.next;
    }

    /// The next of its pages, as many as a batch takes.
    fn batch(&self) -> Vec<Run> {
        let mut batch = Vec::new();
        let mut room = MAX_BATCH_PAGES as u64;
        for run in self.pages.runs_in(Run::new(self.next, u64::MAX - self.next)) {
            let taken = Run::new(run.start, run.pages.min(room));
            room -= taken.pages;
            batch.push(taken);
            if room == 0 {
                break;
            }
        }
        batch
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Recorder(Arc<Mutex<PageSet>>);

    impl DirtySource for Recorder {
        fn name(&self) -> &'static str {
            "recorder"
        }
        fn start(&mut self) -> Result<(), TrackError> {
            Ok(())
        }
        fn collect(&mut self, _: &mut PageSet) -> Result<(), TrackError> {
            Ok(())
        }
        fn rearm(&mut self, pages: &PageSet) -> Result<(), TrackError> {
            let mut seen = self.0.lock().unwrap();
            for run in pages.runs() {
                for gfn in run.start..run.end() {
                    assert!(seen.insert(gfn), "page {gfn} was re-armed twice: a write may be lost");
                }
            }
            Ok(())
        }
        fn stop(&mut self) -> Result<(), TrackError> {
            Ok(())
        }
    }

    #[test]
    fn every_page_is_rearmed_once_before_it_is_handed_out_and_no_other_page_is() {
        let armed = Arc::new(Mutex::new(PageSet::new()));
        let trackers: Trackers = Arc::new(Mutex::new(vec![Box::new(Recorder(armed.clone()))]));
        let pages: PageSet = (0..4000)
            .map(|i| Run::new(i * 37, 1 + i % 20))
            .chain([Run::new(1 << 30, 5000)])
            .collect();
        let round = Round::new(1, pages.clone(), Some(trackers));
        let mut given = PageSet::new();
        loop {
            let batch = round.next_batch().unwrap();
            if batch.is_empty() {
                break;
            }
            assert!(batch.iter().map(|r| r.pages).sum::<u64>() <= MAX_BATCH_PAGES as u64);
            for run in batch {
                for gfn in run.start..run.end() {
                    assert!(given.insert(gfn), "page {gfn} was handed out twice");
                    assert!(armed.lock().unwrap().contains(gfn), "page {gfn} was not re-armed");
                }
            }
        }
        assert_eq!(given, pages);
        assert_eq!(*armed.lock().unwrap(), pages);
    }

    #[test]
    fn memory_that_was_written_to_comes_last_and_is_rearmed_only_then() {
        let armed = Arc::new(Mutex::new(PageSet::new()));
        let trackers: Trackers = Arc::new(Mutex::new(vec![Box::new(Recorder(armed.clone()))]));
        let pages: PageSet = [Run::new(3, 2000), Run::new(40_000, 600)].into_iter().collect();
        let written: PageSet = [Run::new(700, 2), Run::new(40_100, 1)].into_iter().collect();
        let round = Round::new(1, pages.clone(), Some(trackers)).last_around(&written);
        // 2 MiB around each: 512 to 1023, and of 39,936 to 40,447 what is in the round.
        let last: PageSet = [Run::new(512, 512), Run::new(40_000, 448)].into_iter().collect();
        let mut given = PageSet::new();
        loop {
            let batch: PageSet = round.next_batch().unwrap().into_iter().collect();
            if batch.is_empty() {
                break;
            }
            let mut early = last.clone();
            early.intersect_with(&batch);
            let before = given.len() < pages.len() - last.len();
            assert_eq!(before, early.is_empty(), "{batch:?} after {} pages", given.len());
            early = armed.lock().unwrap().clone();
            early.intersect_with(&last);
            assert!(!before || early.is_empty(), "what comes last is re-armed last");
            given.union_with(&batch);
        }
        assert_eq!(given, pages);
        assert_eq!(*armed.lock().unwrap(), pages);
    }

    #[test]
    fn a_round_that_was_given_up_rearms_nothing_and_hands_nothing_out() {
        let armed = Arc::new(Mutex::new(PageSet::new()));
        let trackers: Trackers = Arc::new(Mutex::new(vec![Box::new(Recorder(armed.clone()))]));
        let pages: PageSet = std::iter::once(Run::new(0, 100_000)).collect();
        let written = std::iter::once(Run::new(90_000, 1)).collect();
        let round = Round::new(1, pages, Some(trackers)).last_around(&written);
        round.next_batch().unwrap();
        let before = armed.lock().unwrap().len();
        assert!(before > 0);
        round.end();
        assert!(round.next_batch().unwrap().is_empty());
        assert_eq!(armed.lock().unwrap().len(), before);
    }
}
