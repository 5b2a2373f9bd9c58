//! What is known of the pages of one machine, under one lock.

use std::collections::{HashMap, VecDeque};
use std::time::{Duration, Instant};

use ferry_codec::Packer;
use ferry_pages::{PAGE_BYTES, PageSet};
use hdrhistogram::Histogram;

use crate::Figures;
use crate::ages::Ages;
use crate::pool::Pool;
use crate::write_back::FILE;

pub(crate) struct State {
    pub(crate) pool: Pool,
    pub(crate) packer: Packer,
    /// Pages that are being moved out, and whether somebody waits for them.
    pub(crate) transit: HashMap<u64, bool>,
    pub(crate) ages: Ages,
    /// Pages to be moved out next.
    pub(crate) victims: VecDeque<u64>,
    /// Pages to be moved out before others.
    pub(crate) preferred: PageSet,
    /// Pages that may be of zeros: those that are, are dropped without need.
    pub(crate) zeros: PageSet,
    /// What a tracker has to report beside what it finds itself: pages that were moved out, and those that a look
    /// found written; see `track`.
    pub(crate) suspects: Option<PageSet>,
    /// What a tracker found written since the last look.
    pub(crate) seen: PageSet,
    pub(crate) limit_pages: Option<u64>,
    /// Pages in memory: counted now and then, and kept up in between.
    pub(crate) resident: u64,
    /// Pages that came into memory so far.
    pub(crate) came: u64,
    /// Cold pages that were moved out to see whether they come back.
    pub(crate) probes: Vec<u64>,
    pub(crate) figures: Figures,
    pub(crate) pool_waits: Histogram<u64>,
    pub(crate) file_waits: Histogram<u64>,
    /// The last page that came back, and how many after it are brought along.
    pub(crate) row: (u64, u64),
    /// Pages that came back just now: who waited for one must get to use it.
    pub(crate) recent: VecDeque<(u64, Instant)>,
    /// Nothing could be moved out then.
    pub(crate) stuck: Option<Instant>,
}

impl State {
    /// Of what is [`used`](Self::used), what is beyond the limit.
    pub(crate) fn excess(&self) -> u64 {
        self.limit_pages.map_or(0, |limit| self.used().saturating_sub(limit))
    }

    /// What is to be moved out before anybody must wait for it: a little below the limit, too.
    pub(crate) fn surplus(&self) -> u64 {
        self.limit_pages.map_or(0, |limit| self.used().saturating_sub(limit - limit / 64))
    }

    /// Pages of the host that the machine and its pool use.
    pub(crate) fn used(&self) -> u64 {
        self.resident + self.pool.holds().arena_bytes / PAGE_BYTES as u64
    }

    /// Whether some of the pool is to go to the file: its bound is near, or the limit is passed, of which it takes more
    /// than half.
    pub(crate) fn pool_is_too_large(&self) -> bool {
        let pool = self.pool.holds().arena_bytes / PAGE_BYTES as u64;
        let limit = self.limit_pages.unwrap_or(u64::MAX);
        self.pool.is_nearly_full() || self.excess() > 0 && pool > limit / 2
    }

    /// Whether the pool is full only until some of it is written to the file, if there is one.
    pub(crate) fn file_makes_room(&self, file: bool) -> bool {
        let fails = self.figures.trouble.as_ref().is_some_and(|why| why.starts_with(FILE));
        file && !fails && self.pool_is_too_large()
    }

    /// The operator is told.
    pub(crate) fn trouble(&mut self, why: String) {
        if self.figures.trouble.as_ref() != Some(&why) {
            tracing::warn!("swap: {why}");
            self.figures.trouble = Some(why);
        }
    }
}

/// How long a page that came back stays, and how many do.
const STAYS: Duration = Duration::from_millis(50);
const RECENT: usize = 256;

impl State {
    /// So many pages came into memory.
    pub(crate) fn have_come(&mut self, pages: u64) {
        self.resident += pages;
        self.came += pages;
    }

    /// Page `gfn` is back.
    pub(crate) fn is_back(&mut self, gfn: u64) {
        self.have_come(1);
        self.ages.returned(gfn);
        self.recent.push_back((gfn, Instant::now()));
        if self.recent.len() > RECENT {
            self.recent.pop_front();
        }
    }

    /// Whether page `gfn` came back just now.
    pub(crate) fn is_recent(&mut self, gfn: u64) -> bool {
        while self.recent.front().is_some_and(|(_, at)| at.elapsed() > STAYS) {
            self.recent.pop_front();
        }
        self.recent.iter().any(|(recent, _)| *recent == gfn)
    }

    /// The trouble that begins with `what` is over.
    pub(crate) fn over(&mut self, what: &str) {
        if self.figures.trouble.as_ref().is_some_and(|why| why.starts_with(what)) {
            self.figures.trouble = None;
        }
    }
}
