//! Many seeds on all cores.

use std::collections::BTreeMap;
use std::panic::catch_unwind;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use crate::{Broken, End, Plant, Rule, World};

/// Seeds that a thread takes at once.
const BLOCK: u64 = 64;

/// How often runs ended in which way.
pub type Tally = BTreeMap<End, u64>;

/// A seed that broke a rule.
#[derive(Clone, Debug)]
pub struct Failure {
    /// Which.
    pub seed: u64,
    /// The rule, and how.
    pub broken: Broken,
}

/// Runs of a range of seeds.
#[derive(Debug)]
pub struct Runs {
    from: u64,
    end: u64,
    plant: Plant,
    next: AtomicU64,
    failure: Mutex<Option<Failure>>,
}

impl Runs {
    /// `count` seeds from `from` on, each with the same fault of our own.
    pub fn new(from: u64, count: u64, plant: Plant) -> Self {
        let end = from.saturating_add(count);
        Self { from, end, plant, next: AtomicU64::new(from), failure: Mutex::new(None) }
    }

    /// Seeds begun so far, for whoever watches.
    pub fn begun(&self) -> u64 {
        self.next.load(Ordering::Relaxed).min(self.end) - self.from
    }

    /// Runs them all on all cores; stops at the first that fails.
    ///
    /// # Errors
    /// A seed that broke a rule: the lowest one of those that were found.
    pub fn run(&self) -> Result<Tally, Failure> {
        let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        let tallies: Vec<Tally> = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..cores).map(|_| scope.spawn(|| self.work())).collect();
            threads.into_iter().map(|thread| thread.join().unwrap_or_default()).collect()
        });
        if let Some(failure) = self.found().clone() {
            return Err(failure);
        }
        let mut all = Tally::new();
        for (end, count) in tallies.into_iter().flatten() {
            *all.entry(end).or_default() += count;
        }
        Ok(all)
    }

    fn found(&self) -> std::sync::MutexGuard<'_, Option<Failure>> {
        self.failure.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn work(&self) -> Tally {
        let mut tally = Tally::new();
        loop {
            let first = self.next.fetch_add(BLOCK, Ordering::Relaxed);
            if first >= self.end {
                return tally;
            }
            for seed in first..self.end.min(first.saturating_add(BLOCK)) {
                match self.one(seed) {
                    Ok(end) => *tally.entry(end).or_default() += 1,
                    Err(broken) => {
                        self.next.store(self.end, Ordering::Relaxed);
                        let mut failure = self.found();
                        if failure.as_ref().is_none_or(|f| seed < f.seed) {
                            *failure = Some(Failure { seed, broken });
                        }
                        return tally;
                    }
                }
            }
        }
    }

    fn one(&self, seed: u64) -> Result<End, Broken> {
        let plant = self.plant;
        catch_unwind(|| World::new(seed, plant).run()).unwrap_or_else(|_| {
            Err(Broken { rule: Rule::NoPanic, what: "a panic, which is printed above".into() })
        })
    }
}
