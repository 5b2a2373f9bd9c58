//! From what is seen of a host and its machines to what each may hold: one step, again and again.
//!
//! Each step divides what can be given away ([`divide`](crate::divide)): that is each machine's *allocation*,
//! where it is to arrive. Memory can be given to one only after another gave it back, so there is a second
//! figure: what it may hold *at most* until the next step.
//!
//! ```text
//!   holds more than its allocation:   at most what it holds, while it gives back by the gentler means;
//!                                     less in each step, once it must be swapped
//!   holds less:                       what it holds, its reservation at least, and of what nobody holds
//!                                     as much as brings it to its allocation
//! ```
//!
//! While enough is free, all may grow, by an eighth of their size in a step as far as there is memory.
//!
//! Two sums never exceed what there is: that of the allocations leaves the headroom free, that of what all may
//! hold at most a third of it. So the budget is kept whatever guests do between two steps, if pages are swapped
//! at that bound. The rest of the headroom is where memory is taken back without swapping.
//!
//! Gentler means come first: the balloon while it delivers, then equal pages, then swap. A balloon delivers if
//! it gives an eighth of what is due in [`BALLOON_PATIENCE`]; one that does not is not waited for.

use std::collections::BTreeMap;
use std::time::Duration;

use crate::activity::Activity;
use crate::admit::{Held, Refusal, admit};
use crate::divide::{Claim, divide};
use crate::level::Level;
use crate::machine::{Host, Machine, Observed, PAGE_BYTES, Pressure};
use crate::target::{Means, Step, Target};

/// How long a balloon may deliver nothing to speak of.
pub const BALLOON_PATIENCE: Duration = Duration::from_secs(5);
/// How long merging equal pages may.
pub const SHARE_PATIENCE: Duration = Duration::from_secs(5);
/// Equal pages are looked for, and balloons that did not deliver are remembered, until memory was not short for so long.
const REST: Duration = Duration::from_secs(60);
/// Percent of its memory that a guest keeps, whatever is asked for: balloons take 65 % at most, as in ESX.
const GUEST_KEEPS: u64 = 35;

/// The policy of one host. It has no clock: who calls it says the time.
#[derive(Clone, Debug)]
pub struct Manager {
    host: Host,
    machines: Vec<Tracked>,
    level: Level,
    sharing: bool,
    /// Since when memory is not short.
    high_since: Option<Duration>,
}

/// What is seen of the host.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct HostSeen {
    /// Physical memory of the budget that is in use, in bytes; not page cache that the kernel can drop at any time.
    pub used_bytes: u64,
    /// How long tasks waited for memory.
    pub pressure: Pressure,
}

/// A machine, and what is remembered of it.
#[derive(Clone, Debug)]
struct Tracked {
    machine: Machine,
    activity: Activity,
    last: Observed,
    /// What it holds, as far as is known, in bytes.
    held: u64,
    at_most: u64,
    /// Memory that it touched for the first time, or that came back, since the step before, in bytes.
    grew: u64,
    /// Memory that its guest shall have, in bytes; none before it was seen.
    guest: Option<u64>,
    late: Option<Late>,
}

/// Memory that is due and does not come.
#[derive(Clone, Copy, Debug)]
struct Late {
    since: Duration,
    /// What balloon and merging had brought by then, in bytes.
    given: u64,
}

impl Manager {
    /// A manager of `host`, without machines.
    #[must_use]
    pub fn new(host: Host) -> Self {
        Self { host, machines: Vec::new(), level: Level::High, sharing: false, high_since: None }
    }

    /// Takes `machine` in, if all can be held then whatever their guests do.
    ///
    /// # Errors
    /// Why not, with the numbers; nothing has changed.
    pub fn admit(&mut self, machine: Machine) -> Result<Held, Refusal> {
        let present: Vec<Machine> = self.machines.iter().map(|t| t.machine.clone()).collect();
        let held = admit(&self.host, &present, &machine)?;
        self.machines.push(Tracked {
            machine,
            activity: Activity::default(),
            last: Observed::default(),
            held: 0,
            at_most: 0,
            grew: 0,
            guest: None,
            late: None,
        });
        Ok(held)
    }

    /// Forgets a machine that ended; whether it was there.
    pub fn remove(&mut self, name: &str) -> bool {
        let before = self.machines.len();
        self.machines.retain(|t| t.machine.name != name);
        self.machines.len() < before
    }

    /// What to do at time `now`. A machine that `observed` does not name may hold all that it was allowed.
    /// `now` is any clock that does not go back; once a second is often enough.
    pub fn step(
        &mut self,
        now: Duration,
        host: &HostSeen,
        observed: &BTreeMap<String, Observed>,
    ) -> Step {
        for tracked in &mut self.machines {
            tracked.see(now, observed.get(&tracked.machine.name));
        }
        let count = u64::try_from(self.machines.len()).unwrap_or(u64::MAX);
        let held = sum(&self.machines, |t| t.held);
        let planned = self.host.overhead_bytes.saturating_mul(count);
        let others = host.used_bytes.saturating_sub(held).max(planned);
        let there = self.host.budget_bytes.saturating_sub(others);
        let usable = there.saturating_sub(self.host.headroom_bytes);
        let bound = there.saturating_sub(self.host.headroom_bytes / 3);
        let free = there.saturating_sub(held);
        self.level = self.level.next(free, self.host.headroom_bytes, host.pressure);

        let claims: Vec<Claim> = self.machines.iter().map(Tracked::claim).collect();
        let allocations = divide(usable, self.host.tax, &claims);
        // Less than this is not worth to be moved; all together it is an eighth of the headroom.
        let slack = self.host.headroom_bytes / 8 / count.max(1);
        let mut due: Vec<Due> = Vec::with_capacity(allocations.len());
        for (tracked, allocation) in self.machines.iter_mut().zip(allocations) {
            due.push(tracked.due(now, self.level, allocation, slack));
        }
        finance(bound, &mut due);

        let merging = due.iter().any(|d| matches!(d.means, Means::Share | Means::Swap));
        self.share(now, merging);
        let floors = sum(&self.machines, |t| t.machine.floor_bytes());
        let mut targets = Vec::with_capacity(due.len());
        for (tracked, due) in self.machines.iter_mut().zip(due) {
            targets.push(tracked.target(&due, self.level, slack, self.sharing));
        }
        Step {
            level: self.level,
            free_bytes: free,
            usable_bytes: usable,
            short_bytes: floors.saturating_sub(usable),
            targets,
        }
    }

    fn share(&mut self, now: Duration, merging: bool) {
        if self.level != Level::High {
            self.high_since = None;
        } else if now.saturating_sub(*self.high_since.get_or_insert(now)) >= REST {
            self.sharing = false;
            self.machines.iter_mut().for_each(|t| t.late = None);
        }
        self.sharing |= merging || self.level >= Level::Hard;
    }
}

/// What is to become of a machine's memory in this step.
#[derive(Clone, Copy, Debug)]
struct Due {
    held: u64,
    allocation: u64,
    at_most: u64,
    /// How much more it may hold, and is likely to take until the next step.
    soon: u64,
    /// How much more it may hold than that.
    later: u64,
    means: Means,
}

/// Gives what nobody holds to those who may hold more, and has no sum of promises above `bound`.
fn finance(bound: u64, all: &mut [Due]) {
    let promised = sum(all, |d| d.at_most);
    if promised > bound {
        let above = |d: &Due| d.at_most.saturating_sub(d.allocation);
        let can_fall = sum(all, above);
        let stays = can_fall.saturating_sub(promised - bound);
        for due in all {
            due.at_most -= above(due) - part(stays, above(due), can_fall);
            if due.at_most < due.held {
                due.means = Means::Swap;
            }
        }
        return;
    }
    // What is to be given back is there only when it was given back.
    let mut left = bound.saturating_sub(sum(all, |d| d.at_most.max(d.held)));
    // First as much as each is likely to take, then as much as it may have.
    for wish in [|d: &Due| d.soon, |d: &Due| d.later] {
        let wishes = sum(all, wish);
        let given = left.min(wishes);
        for due in &mut *all {
            due.at_most += part(given, wish(due), wishes);
        }
        left -= given;
    }
}

/// `amount` × `mine` ÷ `all`, rounded down.
fn part(amount: u64, mine: u64, all: u64) -> u64 {
    let share = u128::from(amount) * u128::from(mine) / u128::from(all.max(1));
    u64::try_from(share).unwrap_or(u64::MAX)
}

fn sum<T>(all: &[T], of: impl Fn(&T) -> u64) -> u64 {
    all.iter().map(of).fold(0, u64::saturating_add)
}

impl Tracked {
    fn see(&mut self, now: Duration, seen: Option<&Observed>) {
        let Some(seen) = seen else {
            self.held = self.held.max(self.at_most);
            return;
        };
        let active = seen.active_bytes.unwrap_or(seen.resident_bytes).min(seen.resident_bytes);
        self.activity.look(now, active, seen.swapped_bytes, seen.swap_in_bytes_per_s);
        let grew = seen.touched_bytes().saturating_sub(self.last.touched_bytes());
        self.grew = grew.max(seen.swap_in_bytes_per_s);
        self.last = *seen;
        self.held = seen.held_bytes();
        let size = self.machine.size_bytes;
        self.guest.get_or_insert(size.saturating_sub(seen.ballooned_bytes));
    }

    fn claim(&self) -> Claim {
        let Machine { size_bytes, limit_bytes, shares, .. } = self.machine;
        // All that it ever touched, and room to touch more until the next step.
        let wanted = self.last.touched_bytes().saturating_add(size_bytes / 8);
        Claim {
            floor_bytes: self.machine.floor_bytes(),
            wanted_bytes: wanted,
            limit_bytes,
            shares,
            active_bytes: self.activity.bytes(),
        }
    }

    /// What the guest keeps at least, in bytes.
    fn guest_keeps(&self) -> u64 {
        let size = self.machine.size_bytes;
        (size / 100 * GUEST_KEEPS).max(self.machine.floor_bytes())
    }

    fn due(&mut self, now: Duration, level: Level, allocation: u64, slack: u64) -> Due {
        let Machine { size_bytes, limit_bytes, can_balloon, can_share, .. } = self.machine;
        let held = self.held;
        let step = size_bytes / 8;
        if held <= allocation.saturating_add(slack) {
            self.late = None;
        }
        let means = if held <= allocation.saturating_add(slack) || level == Level::High {
            Means::Nothing
        } else {
            let has = size_bytes.saturating_sub(self.last.ballooned_bytes);
            let answers = can_balloon && self.last.balloon_answers;
            let balloon = answers && has > self.guest_keeps().saturating_add(slack);
            let late = self.late_for(now, held - allocation);
            let for_balloon = if balloon { BALLOON_PATIENCE } else { Duration::ZERO };
            let for_merging = if can_share { SHARE_PATIENCE } else { Duration::ZERO };
            match level {
                Level::Hard | Level::Low => Means::Swap,
                _ if late < for_balloon => Means::Balloon,
                _ if late < for_balloon + for_merging => Means::Share,
                _ => Means::Swap,
            }
        };
        let at_most = match (means, level) {
            (Means::Swap, Level::Low) => allocation,
            (Means::Swap, _) => allocation.max(held.saturating_sub(step)),
            _ => held,
        };
        // A machine without swap cannot be held to anything: it has all of its size as a floor.
        let at_most = at_most.clamp(self.machine.floor_bytes(), limit_bytes);
        let means = if at_most < held { Means::Swap } else { means };
        let may_hold = match level {
            Level::High => allocation.max(held.saturating_add(step)).min(limit_bytes),
            _ => allocation,
        };
        let more = may_hold.saturating_sub(held.max(at_most));
        // It may grow twice as fast as it did, and begin at some pace.
        let soon = more.min(self.grew.saturating_mul(2).max(size_bytes / 64));
        Due { held, allocation, at_most, soon, later: more - soon, means }
    }

    /// For how long balloon and merging have not brought an eighth of what is due.
    fn late_for(&mut self, now: Duration, debt: u64) -> Duration {
        let given = self.last.ballooned_bytes.saturating_add(self.last.saved_bytes);
        match self.late {
            Some(late) if given < late.given.saturating_add(debt.div_ceil(8)) => {
                now.saturating_sub(late.since)
            }
            _ => {
                self.late = Some(Late { since: now, given });
                Duration::ZERO
            }
        }
    }

    fn target(&mut self, due: &Due, level: Level, slack: u64, sharing: bool) -> Target {
        self.at_most = due.at_most;
        Target {
            name: self.machine.name.clone(),
            held_bytes: due.held,
            active_bytes: self.activity.bytes(),
            allocation_bytes: due.allocation,
            at_most_bytes: due.at_most,
            guest_bytes: self.guest_bytes(due.allocation, level, slack),
            resident_limit_bytes: resident_limit(&self.last, due.at_most),
            share: sharing && self.machine.can_share,
            means: due.means,
        }
    }

    /// Memory that the guest shall have. It is raised whenever the allocation allows, but lowered only while memory
    /// is short, and no more than a quarter of the machine is moved that the guest uses.
    fn guest_bytes(&mut self, allocation: u64, level: Level, slack: u64) -> u64 {
        let Machine { size_bytes, limit_bytes, can_balloon, .. } = self.machine;
        if !can_balloon {
            return size_bytes;
        }
        // What is merged costs nothing, so the guest may have it beside.
        let wanted = allocation.saturating_add(self.last.saved_bytes) / PAGE_BYTES * PAGE_BYTES;
        let keeps = self.guest_keeps();
        let wanted = wanted.max(keeps).min(size_bytes);
        let least = if level == Level::High { wanted.max(limit_bytes) } else { wanted };
        let step = size_bytes / 4;
        let guest = self.guest.get_or_insert(size_bytes);
        if *guest > least.saturating_add(slack) {
            // It does not miss what it never touched.
            let uses = self.last.resident_bytes.saturating_add(self.last.swapped_bytes).min(*guest);
            *guest = least.max(uses.saturating_sub(step));
        } else if wanted > guest.saturating_add(slack) || wanted == size_bytes {
            *guest = wanted.min(guest.saturating_add(step)).max(*guest);
        }
        *guest = (*guest).max(keeps).next_multiple_of(PAGE_BYTES);
        *guest
    }
}

/// How much may stay resident so that a machine holds `at_most`: what is evicted is not all won, since the
/// compressed pool grows by it.
fn resident_limit(seen: &Observed, at_most: u64) -> u64 {
    let held = seen.held_bytes();
    let limit = match held.checked_sub(at_most) {
        None | Some(0) => seen.resident_bytes.saturating_add(at_most - held),
        Some(over) => {
            // Half, before anything is known; never more than nine tenths, or nothing would ever do.
            let kept = match seen.swapped_bytes {
                0 => 500,
                swapped => part(1000, seen.pool_bytes, swapped).min(900),
            };
            seen.resident_bytes.saturating_sub(over.saturating_mul(1000) / (1000 - kept))
        }
    };
    limit / PAGE_BYTES * PAGE_BYTES
}

#[cfg(test)]
mod tests {
    use super::*;

    fn due(held: u64, allocation: u64, at_most: u64, soon: u64, later: u64) -> Due {
        Due { held, allocation, at_most, soon, later, means: Means::Nothing }
    }

    #[test]
    fn what_is_promised_too_much_is_taken_back_from_those_above_their_share_and_no_more() {
        let mut all = [due(40, 30, 60, 0, 0), due(56, 50, 60, 0, 0), due(5, 10, 10, 0, 0)];
        finance(110, &mut all);
        assert_eq!(all.map(|d| d.at_most), [45, 55, 10]);
        // Who holds more than it may from now on is swapped at once.
        assert_eq!(all.map(|d| d.means), [Means::Nothing, Means::Swap, Means::Nothing]);
        let mut exact = [due(0, 0, 60, 9, 9), due(0, 0, 50, 9, 9)];
        finance(110, &mut exact);
        assert_eq!(exact.map(|d| d.at_most), [60, 50], "all is promised: there is no more to give");
    }

    #[test]
    fn what_is_left_goes_where_it_is_wanted_soon_and_then_where_it_is_wanted_later() {
        let mut all = [due(10, 0, 10, 20, 100), due(10, 0, 10, 10, 0)];
        finance(110, &mut all);
        assert_eq!(all.map(|d| d.at_most), [90, 20]);
        // What somebody still holds is not there.
        let mut all = [due(80, 0, 10, 40, 0), due(10, 0, 10, 20, 0)];
        finance(120, &mut all);
        assert_eq!(all.map(|d| d.at_most), [30, 20]);
    }
}
