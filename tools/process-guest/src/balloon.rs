//! Which pages the workers give back to the host, so that the guest has no more than it shall have.
//!
//! ```text
//! frames       table │ part of worker 0          │ part of worker 1          │ spare
//!                    │ in use ....│ given back   │ in use ....│ given back   │ never used: given first
//! ```
//!
//! Only whole units of memory (huge pages, or plain ones) are given back. A unit that is partly somebody
//! else's stays, and its pages that are out of use may hold anything when they are used again.

use ferry_guest::workload::Part;
use ferry_pages::Run;

use crate::memory::Plan;

/// How the arena is divided, and what of it can be given back.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Shares {
    plan: Plan,
    cpus: u32,
    /// Pages that are given back together.
    unit: u64,
}

impl Shares {
    pub(crate) fn new(plan: Plan, cpus: u32, unit: u64) -> Self {
        Self { plan, cpus, unit }
    }

    fn parts(&self) -> impl Iterator<Item = Part> {
        (0..self.cpus).map(|cpu| Part::of(cpu, self.cpus, self.plan.arena.pages))
    }

    /// The pages behind the arena.
    fn spare(&self) -> u64 {
        self.plan.memory_pages.saturating_sub(self.plan.arena.end().next_multiple_of(self.unit))
    }

    /// The frames that become free when the owner of `part` goes from using its first `had` pages to
    /// using `has`.
    pub(crate) fn freed(&self, part: Part, had: u64, has: u64) -> Run {
        let first = self.plan.arena.start + part.first;
        let end = ((first + part.pages) / self.unit * self.unit)
            .min((first + had).next_multiple_of(self.unit));
        let start = (first + has).next_multiple_of(self.unit);
        Run::new(start, end.saturating_sub(start))
    }

    /// How many pages of `part` are given back while the first `in_use` are used.
    fn given(&self, part: Part, in_use: u64) -> u64 {
        self.freed(part, part.pages, in_use).pages
    }

    /// How many pages of `part` may be used so that `give` or more are given back, as far as can be.
    fn allowed(&self, part: Part, give: u64) -> u64 {
        if give == 0 {
            return part.pages;
        }
        let (first, unit) = (self.plan.arena.start + part.first, self.unit);
        let end = (first + part.pages) / unit * unit;
        let start = end.saturating_sub(give) / unit * unit;
        // A worker keeps a page.
        start.max((first + 1).next_multiple_of(unit)).min(first + part.pages) - first
    }

    /// Pages that the guest cannot do without.
    pub(crate) fn least(&self) -> u64 {
        let most = self.parts().map(|p| self.given(p, self.allowed(p, u64::MAX))).sum::<u64>();
        self.plan.memory_pages - self.spare() - most
    }

    /// How many pages each worker may use so that the guest has `target` or fewer, but not below
    /// [`least`](Self::least).
    pub(crate) fn limits(&self, target: u64) -> Vec<u64> {
        let mut give = self.plan.memory_pages.saturating_sub(target).saturating_sub(self.spare());
        let limit = |(part, workers_left): (Part, u64)| {
            let allowed = self.allowed(part, give.div_ceil(workers_left));
            give = give.saturating_sub(self.given(part, allowed));
            allowed
        };
        self.parts().zip((1..=u64::from(self.cpus)).rev()).map(limit).collect()
    }

    /// Pages that are given back, with so many `in_use` by each worker, and `target` pages wanted.
    pub(crate) fn given_back(&self, target: u64, in_use: impl Iterator<Item = u64>) -> u64 {
        let spare = self.plan.memory_pages.saturating_sub(target).min(self.spare());
        spare + self.parts().zip(in_use).map(|(part, in_use)| self.given(part, in_use)).sum::<u64>()
    }

    /// The pages of the arena at `run`, as far as they lie in `part`.
    pub(crate) fn pages_at(&self, run: Run, part: Part) -> Part {
        let first = (run.start - self.plan.arena.start).clamp(part.first, part.first + part.pages);
        let end = (run.end() - self.plan.arena.start).clamp(first, part.first + part.pages);
        Part { first, pages: end - first }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shares(memory_pages: u64, arena: Run, cpus: u32, unit: u64) -> Shares {
        Shares::new(Plan { memory_pages, arena }, cpus, unit)
    }

    #[test]
    fn a_guest_has_no_more_than_its_target_and_no_more_is_taken_than_whole_units_need() {
        for unit in [1, 512] {
            for cpus in [1, 2, 3, 7] {
                for arena in [Run::new(40, 39_960), Run::new(20, 20_011)] {
                    let s = shares(40_000 / unit * unit, arena, cpus, unit);
                    let pages = s.plan.memory_pages;
                    for target in (s.least()..=pages).step_by(97).chain([s.least(), pages]) {
                        let limits = s.limits(target);
                        let given = s.given_back(target, limits.into_iter());
                        let why = format!("{s:?} target {target} given {given}");
                        assert!(pages - given <= target, "{why}");
                        assert!(given < pages - target + unit * u64::from(cpus), "{why}");
                        let again =
                            s.given_back(pages - given, s.limits(pages - given).into_iter());
                        assert_eq!(again, given, "what is reached is a target of its own: {why}");
                    }
                    assert_eq!(s.limits(pages), s.parts().map(|p| p.pages).collect::<Vec<_>>());
                    assert!(s.limits(0).iter().all(|l| (1..=u64::max(unit, 1)).contains(l)));
                }
            }
        }
    }

    #[test]
    fn whatever_the_steps_each_whole_unit_is_freed_once_and_no_other_page() {
        for unit in [1, 8, 512] {
            let s = shares(8192, Run::new(9, 8003), 2, unit);
            for part in s.parts() {
                for step in [1, 100, 700, 5000] {
                    let (mut has, mut freed) = (part.pages, ferry_pages::PageSet::new());
                    while has > 1 {
                        let had = has;
                        has = has.saturating_sub(step).max(1);
                        let run = s.freed(part, had, has);
                        assert_eq!(freed.count_in(run), 0);
                        freed.insert_run(run);
                        assert_eq!(freed.len(), s.given(part, has));
                    }
                    let (first, end) = (9 + part.first, 9 + part.first + part.pages);
                    for unit_at in (0..8192).step_by(usize::try_from(unit).unwrap()) {
                        let inside = unit_at > first && unit_at + unit <= end;
                        let want = if inside { unit } else { 0 };
                        assert_eq!(
                            freed.count_in(Run::new(unit_at, unit)),
                            want,
                            "{unit} {step} {unit_at}"
                        );
                    }
                }
            }
        }
    }
}
