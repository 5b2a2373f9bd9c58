//! A balloon as saved, so that it goes on elsewhere.

use ferry_memory::GuestView;
use ferry_pages::{PageSet, Run};
use serde::{Deserialize, Serialize};
use virtio_queue::{Queue, QueueState, QueueT};

use crate::balloon::{Balloon, Interrupt, QUEUE_SIZE, QUEUES, STATISTICS, feature};
use crate::hints::Hints;
use crate::{Statistics, status::Troubles};

/// No more runs of pages than this are saved (8 MiB): those of 8 GiB of which every second page is in the balloon.
const MAX_RUNS: usize = 1 << 20;

/// All of a balloon.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct BalloonState {
    features: u64,
    started: bool,
    queues: Vec<QueueRegisters>,
    wanted_pages: u32,
    actual_pages: u32,
    poison: u32,
    generation: u32,
    /// First page and number of pages of each run, ascending.
    ballooned: Vec<(u32, u32)>,
    reported_pages: u64,
    hint_id: u32,
    hint_command: u32,
    held: Option<u16>,
    statistics: Option<Statistics>,
    statistics_count: u64,
    troubles: u64,
    last_trouble: Option<String>,
}

/// A queue as saved.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct QueueRegisters {
    next_avail: u16,
    next_used: u16,
    size: u16,
    ready: bool,
    desc_table: u64,
    avail_ring: u64,
    used_ring: u64,
}

impl QueueRegisters {
    fn of(queue: &Queue) -> Self {
        let q = queue.state();
        Self {
            next_avail: q.next_avail,
            next_used: q.next_used,
            size: q.size,
            ready: q.ready,
            desc_table: q.desc_table,
            avail_ring: q.avail_ring,
            used_ring: q.used_ring,
        }
    }

    fn restore(self) -> Result<Queue, virtio_queue::Error> {
        Queue::try_from(QueueState {
            max_size: QUEUE_SIZE,
            next_avail: self.next_avail,
            next_used: self.next_used,
            event_idx_enabled: false,
            size: self.size,
            ready: self.ready,
            desc_table: self.desc_table,
            avail_ring: self.avail_ring,
            used_ring: self.used_ring,
        })
    }
}

/// State that no balloon of this machine can be in.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not the state of this machine's balloon: {0}")]
pub struct BadState(String);

impl Balloon {
    /// Its state. Of a balloon in more than a million pieces the last are not in it: at the destination those
    /// pages count as the guest's.
    pub fn save(&self) -> BalloonState {
        let number = |n: u64| u32::try_from(n).unwrap_or(u32::MAX);
        BalloonState {
            features: self.features,
            started: self.started,
            queues: self.queues.iter().map(QueueRegisters::of).collect(),
            wanted_pages: self.wanted_pages,
            actual_pages: self.actual_pages,
            poison: self.poison,
            generation: self.generation,
            ballooned: self
                .ballooned
                .runs()
                .take(MAX_RUNS)
                .map(|run| (number(run.start), number(run.pages)))
                .collect(),
            reported_pages: self.reported_pages,
            hint_id: self.hints.id(),
            hint_command: self.hints.command(),
            held: self.held,
            statistics: self.statistics,
            statistics_count: self.statistics_count,
            troubles: self.troubles.count,
            last_trouble: self.troubles.last.clone(),
        }
    }

    /// A balloon that goes on from `state`, in a machine with the memory of `view`. Memory is left alone. Hints
    /// that were asked for are over, which the guest learns by the interrupt.
    ///
    /// # Errors
    /// No balloon of this machine can be in that state.
    pub fn restore(
        state: BalloonState,
        view: &GuestView,
    ) -> Result<(Self, Option<Interrupt>), BadState> {
        let pages = view.regions().iter().map(|r| r.run.pages).sum::<u64>();
        let mut balloon = Self::new(0);
        balloon.memory_pages = pages;
        if state.features & !feature::OFFERED != 0 {
            return Err(BadState(format!("features {:#x}", state.features)));
        }
        if state.queues.len() != usize::from(QUEUES) {
            return Err(BadState(format!("{} queues, not {QUEUES}", state.queues.len())));
        }
        for (queue, saved) in balloon.queues.iter_mut().zip(&state.queues) {
            *queue = saved.restore().map_err(|e| BadState(format!("a queue: {e}")))?;
        }
        if u64::from(state.wanted_pages) > pages {
            return Err(BadState(format!("{} pages of {pages} wanted", state.wanted_pages)));
        }
        balloon.ballooned = unpack(&state.ballooned, view)?;
        balloon.features = state.features;
        balloon.started = state.started;
        balloon.wanted_pages = state.wanted_pages;
        balloon.actual_pages = state.actual_pages;
        balloon.poison = state.poison;
        balloon.reported_pages = state.reported_pages;
        balloon.hints = Hints::restored(state.hint_id, state.hint_command);
        // A guest may make the queue smaller meanwhile, and shall not keep its machine from moving by that.
        let size = balloon.queues[usize::from(STATISTICS)].size();
        balloon.held = state.held.filter(|head| *head < size);
        balloon.statistics = state.statistics;
        balloon.statistics_count = state.statistics_count;
        balloon.troubles = Troubles { count: state.troubles, last: state.last_trouble };
        let changed = balloon.hints.command() != state.hint_command;
        balloon.generation = state.generation.wrapping_add(changed.into());
        Ok((balloon, changed.then_some(Interrupt::Configuration)))
    }
}

fn unpack(runs: &[(u32, u32)], view: &GuestView) -> Result<PageSet, BadState> {
    let (mut pages, mut end) = (PageSet::new(), 0);
    for &(start, count) in runs {
        let run = Run::new(start.into(), count.into());
        let inside: u64 =
            view.regions().iter().filter_map(|r| r.overlap(run)).map(|part| part.pages).sum();
        if run.start < end || count == 0 || inside != run.pages {
            return Err(BadState(format!("{count} pages from frame {start:#x} in the balloon")));
        }
        pages.insert_run(run);
        end = run.end();
    }
    Ok(pages)
}
