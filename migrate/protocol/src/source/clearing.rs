//! Before a hand-over that owes pages: the destination gives its older copies of them back while the guest still runs,
//! not in the blackout.

use std::time::Duration;

use ferry_pages::PageSet;

use super::{Phase, Source};
use crate::{PackedPages, ToDestination};

/// So few stale pages are given back in the blackout: in less than a millisecond.
const FEW_STALE: u64 = 256;
/// How often stale pages are given back before it.
const MAX_CLEARED: u8 = 4;

impl Source {
    /// Has the older copies of `stale`, which will be owed, given back, as the `times`th time: an empty round tells that it is
    /// done, and then what was written meanwhile is collected.
    pub(super) fn clear(&mut self, now: Duration, stale: &PageSet, times: u8) {
        for pages in PackedPages::parts(stale) {
            self.send(ToDestination::Stale { pages });
        }
        self.round += 1;
        self.send(ToDestination::RoundEnd { round: self.round, batches: 0 });
        self.phase = Phase::Clearing { times };
        self.expect_answer(now);
    }

    /// What was written while pages were given back is given back, too, as long as that is much: it takes less and less
    /// time.
    pub(super) fn cleared(&mut self, now: Duration, written: &PageSet, times: u8) {
        let mut fresh = written.clone();
        fresh.subtract(&self.pending);
        self.pending.union_with(written);
        match fresh.len() > FEW_STALE && times < MAX_CLEARED {
            true => self.clear(now, &fresh, times + 1),
            false => self.hand_over_when_ready(now),
        }
    }
}
