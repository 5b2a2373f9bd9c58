//! `ferry memory run`: keeps the machines of a plan within its budget. The policy decides, this asks and tells.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use ferry_overcommit::{
    HostSeen, Level, Manager, Means, Observed, Plan, Pressure, Refusal, Step, Target,
};
use indicatif::HumanBytes;
use serde::Serialize;

use crate::Failure;
use crate::cgroup::{Cgroup, pressure};
use crate::machine::PAGE_BYTES;
use crate::memory::plan;
use crate::memory::sharing::Sharers;
use crate::protocol::{BalloonRequest, LimitRequest, MachineInfo, Reply, Request};
use crate::runtime_dir::RuntimeDir;
use crate::vm::{exchange, info};

const EVERY: Duration = Duration::from_secs(1);

/// The loop's memory.
pub(crate) struct Keeper<'a> {
    runtime: &'a RuntimeDir,
    plan: Plan,
    manager: Manager,
    began: Instant,
    known: HashMap<String, Known>,
    sharers: Sharers,
}

/// What was last seen of a machine, and told it.
#[derive(Clone, Copy, Debug)]
struct Known {
    at: Instant,
    pages_in: u64,
    limit: Option<u64>,
    guest: Option<u64>,
    means: Option<Means>,
}

/// What one step saw and did.
#[derive(Debug, Serialize)]
pub(crate) struct Kept {
    used_bytes: u64,
    #[serde(flatten)]
    step: Step,
    /// What was seen of each machine that runs.
    pub(crate) observed: BTreeMap<String, Observed>,
    /// What could not be done, in words.
    troubles: Vec<String>,
    /// What is new, in words.
    #[serde(skip)]
    pub(crate) news: Vec<String>,
}

impl<'a> Keeper<'a> {
    /// Refuses a plan that cannot be held.
    pub(crate) fn new(runtime: &'a RuntimeDir, plan: Plan) -> Result<Self, Refusal> {
        let mut manager = Manager::new(plan.host.clone());
        for machine in &plan.machines {
            manager.admit(machine.clone())?;
        }
        let (began, known) = (Instant::now(), HashMap::new());
        let sharers = Sharers::new(runtime, &plan);
        Ok(Self { runtime, plan, manager, began, known, sharers })
    }

    /// Looks, decides, and tells the machines. In `group`, if they run in one, their use of memory is measured as a
    /// whole.
    pub(crate) fn step(&mut self, group: Option<&Cgroup>) -> Kept {
        let (mut observed, mut used, mut troubles) = (BTreeMap::new(), 0, Vec::new());
        let mut limits = HashMap::new();
        let names: Vec<String> = self.plan.machines.iter().map(|m| m.name.clone()).collect();
        for name in names {
            // One that does not run now is left out.
            let Ok(info) = info(self.runtime, &name) else { continue };
            let seen = self.observe(&info);
            used += seen.held_bytes() + overhead(&info);
            observed.insert(info.name.clone(), seen);
            let limit = info.swap.as_ref().and_then(|swap| swap.limit_bytes);
            let may_hold = limit.map_or(info.memory_bytes, |l| l.saturating_sub(seen.saved_bytes));
            limits.insert(info.name.clone(), may_hold);
            if let Some(why) = info.swap.and_then(|swap| swap.trouble) {
                troubles.push(format!("machine `{}`: {why}", info.name));
            }
        }
        let mut stalled = pressure().unwrap_or_default();
        if let Some(group) = group {
            match group.usage() {
                Ok(usage) => used = usage.bytes,
                Err(e) => troubles.push(e.to_string()),
            }
            stalled = group.pressure().unwrap_or(Pressure::default());
        }
        let host = HostSeen { used_bytes: used, pressure: stalled };
        let mut step = self.manager.step(self.began.elapsed(), &host, &observed);
        let headroom = self.plan.host.headroom_bytes;
        raise_in_turn(step.usable_bytes + headroom - headroom / 3, &mut step.targets, &limits);
        let mut news = Vec::new();
        for target in step.targets.iter().filter(|t| observed.contains_key(&t.name)) {
            match self.tell(target, observed[&target.name], step.level) {
                Ok(said) => news.extend(said),
                Err(e) => troubles.push(format!("machine `{}`: {e}", target.name)),
            }
        }
        let share = step.targets.iter().filter(|t| t.share && observed.contains_key(&t.name));
        let share: BTreeSet<&str> = share.map(|t| t.name.as_str()).collect();
        news.extend(self.sharers.want(&share));
        Kept { used_bytes: used, step, observed, troubles, news }
    }

    fn observe(&mut self, m: &MachineInfo) -> Observed {
        let swap = m.swap.clone().unwrap_or_default();
        let now = Instant::now();
        let known = self.known.entry(m.name.clone()).or_insert(Known {
            at: now,
            pages_in: swap.pages_in,
            limit: None,
            guest: None,
            means: None,
        });
        let seconds = now.duration_since(known.at).as_secs_f64();
        let came = swap.pages_in.saturating_sub(known.pages_in) * PAGE_BYTES;
        let rate = if seconds > 0.0 { came as f64 / seconds } else { 0.0 };
        (known.at, known.pages_in) = (now, swap.pages_in);
        let all = m.resident_bytes + swap.swapped_bytes;
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "bytes of a machine"
        )]
        let (active, rate) = ((swap.active * all as f64) as u64, rate as u64);
        Observed {
            resident_bytes: m.resident_bytes,
            ballooned_bytes: m.balloon.as_ref().map_or(0, |b| b.ballooned_bytes),
            swapped_bytes: swap.swapped_bytes,
            pool_bytes: swap.pool_bytes,
            saved_bytes: m.merged_saves_bytes,
            active_bytes: m.swap.as_ref().map(|_| active.min(m.resident_bytes)),
            swap_in_bytes_per_s: rate,
            balloon_answers: m.balloon.as_ref().is_some_and(|b| b.driver),
        }
    }

    /// Tells a machine what it shall have, where that is new.
    fn tell(
        &mut self,
        target: &Target,
        seen: Observed,
        level: Level,
    ) -> Result<Option<String>, Failure> {
        let Some(mut known) = self.known.get(&target.name).copied() else { return Ok(None) };
        let mut said = None;
        if seen.balloon_answers && known.guest != Some(target.guest_bytes) {
            let request =
                BalloonRequest { target_bytes: Some(target.guest_bytes), ask_guest: false };
            self.ask(&target.name, &Request::Balloon(request))?;
            known.guest = Some(target.guest_bytes);
        }
        if let Some(swap) = &self.plan.swap {
            let limit = target.at_most_bytes + seen.saved_bytes;
            if known.limit != Some(limit) {
                let machines = self.plan.machines.len().max(1) as u64;
                let swap = ferry_swap::Options {
                    pool_bytes: swap.pool_bytes / machines,
                    dir: Some(swap.dir.clone()),
                    file_bytes: swap.size_bytes / machines,
                };
                let request = LimitRequest { bytes: Some(limit), swap: Some(swap) };
                self.ask(&target.name, &Request::Limit(request))?;
                known.limit = Some(limit);
            }
        }
        if known.means != Some(target.means) {
            known.means = Some(target.means);
            said = Some(format!(
                "{}: memory is {}, holds {}, may hold {}: {}",
                target.name,
                words(level),
                HumanBytes(target.held_bytes),
                HumanBytes(target.at_most_bytes),
                target.means,
            ));
        }
        self.known.insert(target.name.clone(), known);
        Ok(said)
    }

    fn ask(&self, name: &str, request: &Request) -> Result<(), Failure> {
        match exchange(self.runtime, name, request)? {
            Reply::Done(_) | Reply::Balloon(_) => Ok(()),
            other => Err(crate::vm::unexpected(&other)),
        }
    }
}

/// Raises what machines may hold no further than what is free in `bound` as long as all hold what they may until now,
/// `limits`: what another one is to give back is there only when it did, and so at the next step.
fn raise_in_turn(bound: u64, targets: &mut [Target], limits: &HashMap<String, u64>) {
    let before = |t: &Target| limits.get(&t.name).copied().unwrap_or(t.at_most_bytes);
    let rise = |t: &Target| t.at_most_bytes.saturating_sub(before(t));
    let free = bound.saturating_sub(targets.iter().map(before).sum());
    let rises: u64 = targets.iter().map(rise).sum();
    for target in targets.iter_mut().filter(|t| rise(t) > 0 && rises > free) {
        let part = u128::from(rise(target)) * u128::from(free) / u128::from(rises);
        target.at_most_bytes = before(target) + u64::try_from(part).unwrap_or(0);
    }
}

fn words(level: Level) -> &'static str {
    match level {
        Level::High => "not short",
        Level::Soft => "a little short",
        Level::Hard => "short",
        Level::Low => "very short",
    }
}

/// Memory that a hosting process takes beside its guest's and the pool.
fn overhead(m: &MachineInfo) -> u64 {
    let statm = std::fs::read_to_string(format!("/proc/{}/statm", m.pid)).unwrap_or_default();
    let resident = statm.split(' ').nth(1).and_then(|pages| pages.parse::<u64>().ok());
    let guest = m.resident_bytes + m.swap.as_ref().map_or(0, |swap| swap.pool_bytes);
    (resident.unwrap_or(0) * PAGE_BYTES).saturating_sub(guest)
}

pub(crate) fn main(
    runtime: &RuntimeDir,
    file: &Path,
    once: bool,
    json: bool,
) -> Result<ExitCode, Failure> {
    let plan = plan::read(file)?;
    let mut keeper = match Keeper::new(runtime, plan) {
        Ok(keeper) => keeper,
        Err(e) => return Err(Failure::words(format!("{}: {e}", file.display()))),
    };
    if once {
        keeper.sharers.none();
    }
    // Of merging that was killed; if it cannot be done, the next merging says why.
    let _ = ferry_sharing::Ksm::default().recover();
    let mut told = Vec::new();
    loop {
        let kept = keeper.step(None);
        if json {
            println!("{}", serde_json::to_string(&kept)?);
        } else {
            kept.news.iter().for_each(|news| println!("{news}"));
            for trouble in kept.troubles.iter().filter(|trouble| !told.contains(*trouble)) {
                eprintln!("ferry: {trouble}");
            }
            told = kept.troubles;
        }
        if once {
            return Ok(ExitCode::SUCCESS);
        }
        std::thread::sleep(EVERY);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ferry_overcommit::Means;

    #[test]
    fn nobody_is_given_what_another_one_may_still_hold() {
        let target = |name: &str, at_most_bytes| Target {
            name: name.into(),
            held_bytes: 0,
            active_bytes: 0,
            allocation_bytes: 0,
            at_most_bytes,
            guest_bytes: 0,
            resident_limit_bytes: 0,
            share: false,
            means: Means::Nothing,
        };
        // What each may hold, and is to hold, of 100; what it is told.
        for (machines, told) in [
            // All at once is too much by what `b` still holds.
            ([("a", 30, 60), ("b", 40, 10), ("c", 20, 30)], [37, 10, 22]),
            ([("a", 37, 60), ("b", 10, 10), ("c", 22, 30)], [60, 10, 30]),
            // Nothing is free.
            ([("a", 90, 95), ("b", 90, 5), ("c", 0, 0)], [90, 5, 0]),
        ] {
            let mut targets = machines.map(|(name, _, to)| target(name, to));
            let limits = machines.map(|(name, from, _)| (name.to_owned(), from)).into();
            raise_in_turn(100, &mut targets, &limits);
            assert_eq!(targets.map(|t| t.at_most_bytes), told, "{machines:?}");
        }
        // One that does not run has what it is promised.
        let mut targets = [target("a", 60), target("away", 40)];
        raise_in_turn(100, &mut targets, &[("a".to_owned(), 20)].into());
        assert_eq!(targets.map(|t| t.at_most_bytes), [60, 40]);
    }
}
