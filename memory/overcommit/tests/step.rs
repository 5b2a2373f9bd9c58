//! Single steps: by which means, how fast, and in which order memory is taken.
#![allow(clippy::cast_precision_loss, reason = "a hundredth is exact enough")]

use std::collections::BTreeMap;
use std::time::Duration;

use ferry_overcommit::{
    BALLOON_PATIENCE, Host, HostSeen, Level, Machine, Manager, Means, Observed, PAGE_BYTES,
    Pressure, SHARE_PATIENCE, Step, Target,
};

const GIB: u64 = 1 << 30;
const MIB: u64 = 1 << 20;
const NO_PRESSURE: Pressure = Pressure { some: 0.0, full: 0.0 };

/// Two machines of 4 GiB on a host of 4 GiB, 600 MiB of which are kept free: high from 600 MiB, soft below 400, hard
/// below 200, low below 100.
struct Two {
    manager: Manager,
    now: u64,
    a: Observed,
    b: Observed,
    pressure: Pressure,
}

impl Two {
    fn new(change: impl Fn(&mut Machine)) -> Self {
        let budget = 4 * GIB;
        let mut manager = Manager::new(Host {
            headroom_bytes: 600 * MIB,
            overhead_bytes: 0,
            swap_bytes: 8 * GIB,
            ..Host::new(budget)
        });
        for name in ["a", "b"] {
            let mut machine = Machine::new(name, 4 * GIB);
            change(&mut machine);
            manager.admit(machine).expect("the host holds it");
        }
        let seen = Observed { balloon_answers: true, active_bytes: Some(0), ..Observed::default() };
        Self { manager, now: 0, a: seen, b: seen, pressure: NO_PRESSURE }
    }

    /// So many MiB are free: `a` is idle and holds 3000 of them, `b` is busy with 3 GiB more than the rest that it holds.
    fn with_free(change: impl Fn(&mut Machine), free_mib: u64) -> Self {
        let mut two = Self::new(change);
        two.a.resident_bytes = 3000 * MIB;
        two.b.resident_bytes = (4096 - 3000 - free_mib) * MIB;
        // It wants back what is swapped of it.
        (two.b.swapped_bytes, two.b.swap_in_bytes_per_s) = (3 * GIB, 300 * MIB);
        two.b.active_bytes = Some(two.b.resident_bytes);
        two
    }

    fn step(&mut self) -> Step {
        self.after(1)
    }

    fn after(&mut self, seconds: u64) -> Step {
        self.now += seconds;
        let host = HostSeen {
            used_bytes: self.a.held_bytes() + self.b.held_bytes(),
            pressure: self.pressure,
        };
        let seen = BTreeMap::from([("a".to_owned(), self.a), ("b".to_owned(), self.b)]);
        self.manager.step(Duration::from_secs(self.now), &host, &seen)
    }

    fn a(&mut self) -> Target {
        self.step().targets.swap_remove(0)
    }
}

#[test]
fn each_level_takes_by_its_own_means() {
    for (free, level, means) in [
        (600, Level::High, Means::Nothing),
        (400, Level::High, Means::Nothing),
        (399, Level::Soft, Means::Balloon),
        (200, Level::Soft, Means::Balloon),
        (199, Level::Hard, Means::Swap),
        (100, Level::Hard, Means::Swap),
        (99, Level::Low, Means::Swap),
    ] {
        let mut two = Two::with_free(|_| (), free);
        let step = two.step();
        let a = &step.targets[0];
        assert_eq!((step.level, a.means), (level, means), "{free} MiB free");
        assert_eq!(step.targets[1].means, Means::Nothing, "it holds less than its allocation");
        let expected = match level {
            Level::High => a.at_most_bytes..=4 * GIB,
            Level::Soft => a.held_bytes..=a.held_bytes,
            // No more than an eighth of its size in a step.
            Level::Hard => a.held_bytes - GIB / 2..=a.held_bytes - GIB / 2,
            Level::Low => a.allocation_bytes..=a.allocation_bytes,
        };
        assert!(expected.contains(&a.at_most_bytes), "{free} MiB free: {a:?}");
        // A balloon takes no more than a quarter of the size of what is in use.
        let guest = if level == Level::High { 4 * GIB } else { a.held_bytes - GIB };
        assert_eq!(a.guest_bytes, guest, "{free} MiB free");
    }
}

#[test]
fn waiting_tasks_count_though_memory_is_free() {
    let mut two = Two::with_free(|_| (), 599);
    two.pressure = Pressure { some: 20.0, full: 0.0 };
    assert_eq!(two.a().means, Means::Balloon);
    two.pressure = Pressure { some: 20.0, full: 20.0 };
    assert_eq!(two.a().means, Means::Swap);
}

#[test]
fn a_balloon_is_waited_for_while_it_delivers_and_merging_after_it() {
    let both = (BALLOON_PATIENCE + SHARE_PATIENCE).as_secs();
    let mut two = Two::with_free(|_| (), 300);
    for _ in 0..20 {
        // An eighth of what is due in each patience is enough.
        two.a.ballooned_bytes += 100 * MIB;
        assert_eq!(two.a().means, Means::Balloon);
    }
    two.a.ballooned_bytes = 2500 * MIB;
    assert!(!two.a().share);
    for second in 1..=both + 3 {
        let a = two.a();
        let means = match second {
            s if s < BALLOON_PATIENCE.as_secs() => Means::Balloon,
            s if s < both => Means::Share,
            _ => Means::Swap,
        };
        assert_eq!(a.means, means, "{second} s");
        assert_eq!(a.share, means != Means::Balloon, "{second} s");
    }
    // Merging that delivers is a reason to wait again.
    two.a.saved_bytes += 500 * MIB;
    two.a.resident_bytes += 500 * MIB;
    assert_eq!(two.a().means, Means::Balloon);
}

#[test]
fn what_cannot_be_done_is_not_waited_for() {
    type Change = fn(&mut Machine);
    let both: Change = |_| ();
    let no_balloon: Change = |m| m.can_balloon = false;
    let no_share: Change = |m| m.can_share = false;
    let neither: Change = |m| (m.can_balloon, m.can_share) = (false, false);
    for (change, answers, means) in [
        (both, true, Means::Balloon),
        (both, false, Means::Share),
        (no_balloon, true, Means::Share),
        (no_share, true, Means::Balloon),
        (no_share, false, Means::Swap),
        (neither, true, Means::Swap),
    ] {
        let mut two = Two::with_free(change, 300);
        two.a.balloon_answers = answers;
        assert_eq!(two.a().means, means);
    }
    // A balloon that took all that it may.
    let mut two = Two::with_free(|_| (), 300);
    two.a.ballooned_bytes = 4 * GIB / 100 * 65;
    let a = two.a();
    assert_eq!(a.means, Means::Share);
    assert!(a.guest_bytes.abs_diff(4 * GIB / 100 * 35) < MIB, "a guest keeps a third: {a:?}");
}

#[test]
fn equal_pages_are_looked_for_until_memory_was_enough_for_a_minute() {
    let mut two = Two::with_free(|_| (), 150);
    assert!(two.a().share, "memory is hard to get");
    two.a.resident_bytes = GIB;
    for _ in 0..60 {
        assert!(two.a().share);
    }
    assert!(!two.a().share);
}

#[test]
fn merged_memory_costs_nothing_and_the_guest_has_it_beside() {
    let mut two = Two::with_free(|_| (), 300);
    let before = two.step();
    two.a.saved_bytes = GIB;
    two.a.resident_bytes += GIB;
    let mut after = two.step();
    assert_eq!(after.targets[0].held_bytes, before.targets[0].held_bytes);
    for _ in 0..10 {
        after = two.step();
    }
    let a = &after.targets[0];
    let beside = a.guest_bytes - a.allocation_bytes;
    assert!(beside.abs_diff(GIB) < 64 * MIB, "{a:?}");
}

#[test]
fn what_is_swapped_makes_the_pool_grow_and_more_is_swapped_for_that() {
    for (swapped, pool, per_mib_won) in
        [(0, 0, 2.0), (900, 300, 1.5), (900, 0, 1.0), (900, 890, 10.0)]
    {
        let mut two = Two::with_free(|_| (), 50);
        two.a.swapped_bytes = swapped * MIB;
        two.a.pool_bytes = pool * MIB;
        two.a.resident_bytes -= pool * MIB;
        let a = two.a();
        let won = (a.held_bytes - a.at_most_bytes) as f64;
        let out = (two.a.resident_bytes - a.resident_limit_bytes) as f64;
        let expected = (won * per_mib_won).min(two.a.resident_bytes as f64);
        assert!((out / expected - 1.0).abs() < 0.01, "{swapped} {pool}: {out} for {won}");
    }
    // Who may grow may have that resident.
    let mut two = Two::with_free(|_| (), 1000);
    let a = two.a();
    assert_eq!(a.resident_limit_bytes, a.at_most_bytes / PAGE_BYTES * PAGE_BYTES);
}

#[test]
fn pages_that_come_back_from_swap_are_in_use() {
    let mut two = Two::with_free(|_| (), 300);
    two.a.swapped_bytes = GIB;
    assert_eq!(two.a().active_bytes, 0);
    two.a.swap_in_bytes_per_s = 11 * MIB;
    assert_eq!(two.a().active_bytes, 10 * MIB);
}

#[test]
fn a_machine_of_which_nobody_knows_what_it_uses_counts_as_busy() {
    let mut two = Two::with_free(|_| (), 300);
    two.a.active_bytes = None;
    assert_eq!(two.a().active_bytes, 3000 * MIB);
}

#[test]
fn a_machine_that_ended_leaves_its_memory_to_others() {
    let mut two = Two::with_free(|_| (), 300);
    let before = two.step().targets[1].allocation_bytes;
    assert!(two.manager.remove("a") && !two.manager.remove("a"));
    two.a = Observed::default();
    let step = two.step();
    assert_eq!((step.targets.len(), step.targets[0].name.as_str()), (1, "b"));
    assert!(step.targets[0].allocation_bytes > before);
    assert_eq!(step.level, Level::High);
}

#[test]
fn a_limit_holds_even_while_enough_is_free() {
    let mut two = Two::new(|m| m.limit_bytes = GIB);
    two.a.resident_bytes = 2 * GIB;
    let a = two.a();
    assert_eq!((a.at_most_bytes, a.means), (GIB, Means::Swap));
    for _ in 0..20 {
        two.a();
    }
    let a = two.a();
    assert_eq!((a.at_most_bytes, a.allocation_bytes), (GIB, GIB));
    assert!(a.guest_bytes < 3 * GIB / 2, "its balloon helps to keep it: {a:?}");
}

#[test]
fn a_reservation_that_is_new_is_taken_from_the_others_at_once() {
    let mut two = Two::with_free(|_| (), 500);
    assert_eq!(two.a().means, Means::Nothing);
    let new = Machine { reservation_bytes: GIB, ..Machine::new("c", GIB) };
    two.manager.admit(new).expect("the host holds it");
    let step = two.step();
    assert_eq!((step.level, step.targets[0].means), (Level::High, Means::Swap));
    assert_eq!(step.targets[2].at_most_bytes, GIB);
    let sum: u64 = step.targets.iter().map(|t| t.at_most_bytes).sum();
    assert!(sum <= 4 * GIB - 200 * MIB, "{step:?}");
}

#[test]
fn balloons_that_did_not_deliver_are_remembered_for_a_minute() {
    for (rest, means) in [(10, Means::Swap), (70, Means::Balloon)] {
        let mut two = Two::with_free(|_| (), 300);
        while two.a().means != Means::Swap {}
        let busy = two.a.resident_bytes;
        // Memory is enough for a while, since the other one ended what it did.
        let other = std::mem::take(&mut two.b.resident_bytes);
        for _ in 0..rest {
            assert_eq!(two.a().means, Means::Nothing);
        }
        (two.a.resident_bytes, two.b.resident_bytes) = (busy, other);
        assert_eq!(two.a().means, means, "after {rest} s");
    }
}

#[test]
fn trifles_are_not_moved() {
    let mut two = Two::with_free(|m| m.shares = if m.name == "a" { 3000 } else { 1000 }, 300);
    two.pressure.some = 20.0;
    two.a.active_bytes = Some(20 * MIB);
    for _ in 0..20 {
        let a = two.a();
        two.a.resident_bytes = a.allocation_bytes.next_multiple_of(PAGE_BYTES);
    }
    let before = two.a();
    for i in 0..20 {
        two.a.resident_bytes = before.allocation_bytes + 20 * MIB;
        two.b.swap_in_bytes_per_s = if i % 2 == 0 { 299 * MIB } else { 301 * MIB };
        two.a.active_bytes = Some(i % 2 * 10 * MIB);
        let a = two.a();
        assert_eq!(
            (a.guest_bytes, a.means),
            (before.guest_bytes, Means::Nothing),
            "{i}: {before:?}"
        );
    }
}

#[test]
fn what_was_never_touched_is_not_claimed_and_neither_is_what_is_merged() {
    let mut two = Two::new(|m| m.shares = if m.name == "a" { 10_000 } else { 1 });
    two.b.resident_bytes = 3 * GIB;
    two.a.resident_bytes = GIB / 2;
    let allocation = two.a().allocation_bytes;
    assert_eq!(allocation, GIB, "what it touched, and an eighth of its size");
    two.a.saved_bytes = GIB / 4;
    two.a.resident_bytes += GIB / 4;
    assert_eq!(two.a().allocation_bytes, allocation);
}

#[test]
fn who_grows_fast_may_grow_faster_than_others() {
    for (back, ratio) in [(0, 1), (300 * MIB, 5)] {
        let mut two = Two::with_free(|_| (), 420);
        two.step();
        two.b.swap_in_bytes_per_s = back;
        let step = two.step();
        let [a, b] = [0, 1].map(|i| step.targets[i].at_most_bytes - step.targets[i].held_bytes);
        assert_eq!(step.level, Level::High);
        assert!(a > 10 * MIB && b / a >= ratio && b / a < 2 * ratio, "{a} {b}");
    }
}

#[test]
fn what_runs_machines_is_counted_before_it_is_seen() {
    let host = Host { overhead_bytes: 100 * MIB, swap_bytes: 8 * GIB, ..Host::new(4 * GIB) };
    let headroom = host.headroom_bytes;
    let mut manager = Manager::new(host);
    for name in ["a", "b"] {
        manager.admit(Machine::new(name, 4 * GIB)).expect("the host holds it");
    }
    for (used, others) in [(0, 200), (150, 200), (300, 300)] {
        let seen = HostSeen { used_bytes: used * MIB, pressure: NO_PRESSURE };
        let all = ["a", "b"].map(|name| (name.to_owned(), Observed::default()));
        let step = manager.step(Duration::from_secs(used), &seen, &BTreeMap::from(all));
        assert_eq!(step.usable_bytes, 4 * GIB - headroom - others * MIB);
    }
}

#[test]
fn waiting_tasks_are_a_reason_to_look_for_equal_pages_though_all_hold_what_they_may() {
    let mut two = Two::new(|_| ());
    two.pressure = Pressure { some: 50.0, full: 50.0 };
    let a = two.a();
    assert!(a.share && a.means == Means::Nothing, "{a:?}");
}

#[test]
fn a_guest_gets_all_of_its_memory_back_where_there_is_enough() {
    for (ballooned_mib, guest_mib) in [(3 * 1024, [2048, 3072, 4096, 4096]), (10, [4096; 4])] {
        let mut manager = Manager::new(Host::new(10 * GIB));
        manager.admit(Machine::new("a", 4 * GIB)).expect("the host holds it");
        let seen = Observed { ballooned_bytes: ballooned_mib * MIB, ..Observed::default() };
        let all = BTreeMap::from([("a".to_owned(), seen)]);
        // A quarter of its size in a step, and the last bit, too.
        for (second, mib) in (0..).zip(guest_mib) {
            let step = manager.step(Duration::from_secs(second), &HostSeen::default(), &all);
            assert_eq!(step.targets[0].guest_bytes, mib * MIB);
        }
    }
}
