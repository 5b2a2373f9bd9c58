//! The threads: run, park, report.
//!
//! A worker looks at `halt` before each visit, so it parks with no page half written. It holds the lock
//! of its own state while it runs; whoever saves or loads takes that lock, which is free once it parked.
//!
//! A worker looks at its limit before each visit, too, and gives its own pages above it back to the host:
//! nobody else touches them, so nobody needs to be asked.

use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use ferry_dirtylog::SoftwareBitmap;
use ferry_guest::status::Counters;
use ferry_guest::workload::{ANYTHING, NEVER_WRITTEN, Pace, Params, Part, Step, Worker, expect};
use ferry_memory::MemoryError;

use crate::balloon::Shares;
use crate::memory::{Memory, Plan};
use crate::{Config, Corruption, ProcessError};

/// A worker that has nothing to do looks again after this.
const NAP: Duration = Duration::from_millis(1);
/// A worker that is held back runs for so long, and then waits in proportion: ns.
const TURN_NS: u64 = 100_000;
/// Pages that a worker gives back before it looks whether it is to park: 16 MiB, less than a millisecond.
const GIVE_PAGES: u64 = 4096;
const TICKS_PER_SECOND: u64 = 1_000_000_000;

#[derive(Debug)]
struct Control {
    quit: bool,
    parked: usize,
}

#[derive(Debug, Default)]
struct Published {
    written: AtomicU64,
    checked: AtomicU64,
    tsc: AtomicU64,
    filled: AtomicU64,
    in_use: AtomicU64,
}

/// What is given back: pages that the guest shall have, pages of its part that each worker may use.
#[derive(Debug)]
struct Balloon {
    target: AtomicU64,
    limits: Vec<AtomicU64>,
    trouble: Mutex<Option<String>>,
}

#[derive(Debug)]
struct Shared {
    params: Params,
    plan: Plan,
    memory: Memory,
    marks: Option<Arc<SoftwareBitmap>>,
    began: Instant,
    control: Mutex<Control>,
    changed: Condvar,
    /// Looked at before each visit; changed only under the lock of `control`.
    halt: AtomicBool,
    /// Percent of their time that workers are held back.
    throttle: AtomicU8,
    states: Vec<Mutex<Worker>>,
    published: Vec<Published>,
    shares: Shares,
    balloon: Balloon,
    corruption: Mutex<Option<Corruption>>,
}

/// The workers of one guest, parked at first. Ends them when dropped.
#[derive(Debug)]
pub(crate) struct Workers {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Nothing that a panic could leave half done is guarded by these locks.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Workers {
    pub(crate) fn spawn(
        config: &Config,
        params: Params,
        plan: Plan,
        memory: Memory,
        marks: Option<Arc<SoftwareBitmap>>,
    ) -> Result<Self, ProcessError> {
        let states: Vec<_> =
            (0..params.cpus).map(|cpu| Worker::new(&params, cpu, plan.arena.pages)).collect();
        let all = || states.iter().map(|w| AtomicU64::new(w.pages_in_use()));
        let shared = Arc::new(Shared {
            shares: Shares::new(plan, params.cpus, memory.unit()),
            balloon: Balloon {
                target: AtomicU64::new(plan.memory_pages),
                limits: all().collect(),
                trouble: Mutex::new(None),
            },
            published: all().map(|in_use| Published { in_use, ..Published::default() }).collect(),
            params,
            plan,
            memory,
            marks,
            began: Instant::now(),
            control: Mutex::new(Control { quit: false, parked: 0 }),
            changed: Condvar::new(),
            halt: AtomicBool::new(true),
            throttle: AtomicU8::new(0),
            states: states.into_iter().map(Mutex::new).collect(),
            corruption: Mutex::new(None),
        });
        let mut workers = Self { shared, threads: Vec::new() };
        for cpu in 0..params.cpus {
            let shared = Arc::clone(&workers.shared);
            let thread = std::thread::Builder::new()
                .name(format!("worker-{cpu}"))
                .spawn(move || shared.run(cpu))
                .map_err(|source| ProcessError::Host {
                    name: config.name.clone(),
                    what: "starting a worker thread",
                    source,
                })?;
            workers.threads.push(thread);
        }
        workers.park();
        Ok(workers)
    }

    /// Returns when no worker touches memory.
    pub(crate) fn park(&self) {
        let mut control = lock(&self.shared.control);
        self.shared.halt.store(true, Ordering::Relaxed);
        self.shared.changed.notify_all();
        while control.parked < self.threads.len() {
            control = self.shared.changed.wait(control).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Lets them run, unless a wrong page was found.
    pub(crate) fn unpark(&self) {
        let corrupt = lock(&self.shared.corruption).is_some();
        let _control = lock(&self.shared.control);
        self.shared.halt.store(corrupt, Ordering::Relaxed);
        self.shared.changed.notify_all();
    }

    /// Holds each worker back for `percent` of its time.
    pub(crate) fn throttle(&self, percent: u8) {
        self.shared.throttle.store(percent.min(99), Ordering::Relaxed);
    }

    pub(crate) fn memory(&self) -> &Memory {
        &self.shared.memory
    }

    pub(crate) fn plan(&self) -> Plan {
        self.shared.plan
    }

    pub(crate) fn corruption(&self) -> Option<Corruption> {
        lock(&self.shared.corruption).clone()
    }

    pub(crate) fn set_corruption(&self, corruption: Option<Corruption>) {
        *lock(&self.shared.corruption) = corruption;
    }

    /// The state of each worker. Only while parked, or this waits until then.
    pub(crate) fn states(&self) -> Vec<Worker> {
        self.shared.states.iter().map(|s| *lock(s)).collect()
    }

    /// Puts each worker where another was. Only while parked, or this waits until then.
    pub(crate) fn set_states(&self, states: &[Worker]) {
        for ((mine, published), new) in
            self.shared.states.iter().zip(&self.shared.published).zip(states)
        {
            *lock(mine) = *new;
            published.in_use.store(new.pages_in_use(), Ordering::Relaxed);
            self.shared.publish(published, new, self.shared.now());
        }
    }

    pub(crate) fn shares(&self) -> Shares {
        self.shared.shares
    }

    /// The guest shall have `target` pages, or as many fewer as whole units need; the workers see to it as
    /// soon as they run.
    pub(crate) fn set_balloon_target(&self, target: u64) {
        let Shared { balloon, shares, plan, .. } = &*self.shared;
        let limits = shares.limits(target);
        let will_have = plan.memory_pages - shares.given_back(target, limits.iter().copied());
        *lock(&balloon.trouble) = None;
        balloon.target.store(will_have, Ordering::Relaxed);
        for (limit, pages) in balloon.limits.iter().zip(limits) {
            limit.store(pages, Ordering::Relaxed);
        }
    }

    /// Pages that the guest shall have, and will.
    pub(crate) fn balloon_target(&self) -> u64 {
        self.shared.balloon.target.load(Ordering::Relaxed)
    }

    /// Pages that are given back.
    pub(crate) fn given_back(&self) -> u64 {
        let in_use = self.shared.published.iter().map(|p| p.in_use.load(Ordering::Relaxed));
        self.shared.shares.given_back(self.balloon_target(), in_use)
    }

    /// Why pages could not be given back.
    pub(crate) fn balloon_trouble(&self) -> Option<String> {
        lock(&self.shared.balloon.trouble).clone()
    }

    /// The pages that no worker uses do not come from another host: what there is of them here is given
    /// back, and the rest may hold anything. Only while parked.
    pub(crate) fn forget_unused(&self) -> Result<(), MemoryError> {
        for worker in self.states() {
            let part = worker.part();
            if worker.pages_in_use() < part.pages {
                self.shared.give_back(part, part.pages, worker.pages_in_use())?;
            }
        }
        Ok(())
    }

    pub(crate) fn counters(&self) -> Vec<Counters> {
        let read = |p: &Published| Counters {
            written: p.written.load(Ordering::Relaxed),
            checked: p.checked.load(Ordering::Relaxed),
            tsc: p.tsc.load(Ordering::Relaxed),
            filled: p.filled.load(Ordering::Relaxed),
        };
        self.shared.published.iter().map(read).collect()
    }
}

impl Drop for Workers {
    fn drop(&mut self) {
        {
            let mut control = lock(&self.shared.control);
            control.quit = true;
            self.shared.halt.store(true, Ordering::Relaxed);
            self.shared.changed.notify_all();
        }
        for thread in self.threads.drain(..) {
            // One that panicked said so on standard error.
            let _ = thread.join();
        }
    }
}

/// Counts a worker as parked for good when it ends, however it ends: `park` must not wait for it.
struct Parked<'a>(&'a Shared);

impl Drop for Parked<'_> {
    fn drop(&mut self) {
        lock(&self.0.control).parked += 1;
        self.0.changed.notify_all();
    }
}

impl Shared {
    fn now(&self) -> u64 {
        u64::try_from(self.began.elapsed().as_nanos()).unwrap_or(u64::MAX)
    }

    fn run(&self, cpu: u32) {
        let _ended = Parked(self);
        let number = cpu as usize;
        while self.wait_to_run() {
            let mut worker = lock(&self.states[number]);
            self.work(cpu, &mut worker, &self.published[number]);
        }
    }

    /// Parks until there is something to do; false at the end.
    fn wait_to_run(&self) -> bool {
        let mut control = lock(&self.control);
        control.parked += 1;
        self.changed.notify_all();
        while !control.quit && self.halt.load(Ordering::Relaxed) {
            control = self.changed.wait(control).unwrap_or_else(PoisonError::into_inner);
        }
        control.parked -= 1;
        !control.quit
    }

    fn work(&self, cpu: u32, worker: &mut Worker, published: &Published) {
        let params = &self.params;
        let mut pace = Pace::new(params, TICKS_PER_SECOND, self.now());
        let limit = &self.balloon.limits[cpu as usize];
        let mut turn = self.now();
        while !self.halt.load(Ordering::Relaxed) {
            let allowed = limit.load(Ordering::Relaxed);
            if worker.pages_in_use() != allowed {
                self.fit(limit, allowed, worker);
                published.in_use.store(worker.pages_in_use(), Ordering::Relaxed);
                continue;
            }
            let now = self.now();
            match worker.step(params, &self.memory, &mut pace, now) {
                Ok(Step::Wrote(index)) => self.mark(index),
                Ok(Step::Checked) => {}
                Ok(Step::Wait) => self.nap(NAP),
                Err(mismatch) => {
                    let gfn = self.plan.arena.start + u64::from(mismatch.index);
                    let found = Corruption::new(cpu, gfn, &mismatch);
                    lock(&self.corruption).get_or_insert(found);
                    let _control = lock(&self.control);
                    self.halt.store(true, Ordering::Relaxed);
                    self.changed.notify_all();
                }
            }
            self.publish(published, worker, now);
            let percent = u64::from(self.throttle.load(Ordering::Relaxed));
            let ran = now.saturating_sub(turn);
            if percent > 0 && ran >= TURN_NS {
                self.nap(Duration::from_nanos(TURN_NS * percent / (100 - percent)));
                turn = self.now();
            }
        }
    }

    /// Goes towards using what is allowed. Pages that the host does not take are used again.
    fn fit(&self, limit: &AtomicU64, allowed: u64, worker: &mut Worker) {
        let had = worker.pages_in_use();
        let Some(given) = worker.fit(allowed, GIVE_PAGES) else { return };
        match self.give_back(worker.part(), had, worker.pages_in_use()) {
            Ok(zeros) => {
                expect(&self.memory, zeros, NEVER_WRITTEN);
                self.mark_table(zeros);
            }
            Err(e) => {
                expect(&self.memory, given, ANYTHING);
                worker.fit(had, 0);
                // Unless another target was set meanwhile.
                let _ = limit.compare_exchange(allowed, had, Ordering::Relaxed, Ordering::Relaxed);
                *lock(&self.balloon.trouble) = Some(e.to_string());
            }
        }
        self.mark_table(given);
    }

    /// Gives back what becomes free of `part` when its owner, which does not touch it any more, uses its
    /// first `has` pages and no longer `had`. These are returned; the others may hold anything.
    fn give_back(&self, part: Part, had: u64, has: u64) -> Result<Part, MemoryError> {
        let run = self.shares.freed(part, had, has);
        let (first, end) = (part.first + has, part.first + had);
        let zeros = self.shares.pages_at(run, part);
        for (first, end) in [(first, zeros.first.min(end)), (zeros.first + zeros.pages, end)] {
            expect(&self.memory, Part { first, pages: end.saturating_sub(first) }, ANYTHING);
        }
        if zeros.pages > 0 {
            self.memory.view().discard(run)?;
        }
        Ok(zeros)
    }

    fn mark_table(&self, pages: Part) {
        if let Some(marks) = &self.marks
            && pages.pages > 0
        {
            let last = pages.first + pages.pages - 1;
            (Plan::table_frame(pages.first)..=Plan::table_frame(last)).for_each(|f| marks.mark(f));
        }
    }

    /// Tells the tracker what was written, after it was: a mark that were taken before the write has
    /// landed would be lost, and the write with it.
    fn mark(&self, index: u64) {
        if let Some(marks) = &self.marks {
            marks.mark(self.plan.arena.start + index);
            marks.mark(Plan::table_frame(index));
        }
    }

    fn publish(&self, published: &Published, worker: &Worker, now: u64) {
        published.written.store(worker.written, Ordering::Relaxed);
        published.checked.store(worker.checked, Ordering::Relaxed);
        published.filled.store(u64::from(!worker.filling(&self.params)), Ordering::Relaxed);
        published.tsc.store(now, Ordering::Relaxed);
    }

    /// Waits for so long, or until there is something else to do.
    fn nap(&self, time: Duration) {
        let control = lock(&self.control);
        if !self.halt.load(Ordering::Relaxed) {
            drop(self.changed.wait_timeout(control, time));
        }
    }
}
