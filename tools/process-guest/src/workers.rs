//! The threads: run, park, report.
//!
//! A worker looks at `halt` before each visit, so it parks with no page half written. It holds the lock
//! of its own state while it runs; whoever saves or loads takes that lock, which is free once it parked.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use ferry_dirtylog::SoftwareBitmap;
use ferry_guest::status::Counters;
use ferry_guest::workload::{Pace, Params, Step, Worker};

use crate::memory::{Memory, Plan};
use crate::{Config, Corruption, ProcessError};

/// A worker that has nothing to do looks again after this.
const NAP: Duration = Duration::from_millis(1);
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
    states: Vec<Mutex<Worker>>,
    published: Vec<Published>,
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
        let shared = Arc::new(Shared {
            params,
            plan,
            memory,
            marks,
            began: Instant::now(),
            control: Mutex::new(Control { quit: false, parked: 0 }),
            changed: Condvar::new(),
            halt: AtomicBool::new(true),
            states: (0..params.cpus)
                .map(|cpu| Mutex::new(Worker::new(&params, cpu, plan.arena.pages)))
                .collect(),
            published: (0..params.cpus).map(|_| Published::default()).collect(),
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
            self.shared.publish(published, new, self.shared.now());
        }
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
        while !self.halt.load(Ordering::Relaxed) {
            let now = self.now();
            match worker.step(params, &self.memory, &mut pace, now) {
                Ok(Step::Wrote(index)) => self.mark(index),
                Ok(Step::Checked) => {}
                Ok(Step::Wait) => self.nap(),
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

    fn nap(&self) {
        let control = lock(&self.control);
        if !self.halt.load(Ordering::Relaxed) {
            drop(self.changed.wait_timeout(control, NAP));
        }
    }
}
