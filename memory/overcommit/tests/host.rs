//! A host and its machines in virtual time: what the policy promises holds, whatever guests do.

mod model;

use std::collections::BTreeMap;

use ferry_overcommit::{Host, HostSeen, Level, Machine, Means, PAGE_BYTES, Step};
use model::{GIB, Guest, MIB, Model};
use proptest::prelude::*;

/// 6 GiB of which 384 MiB are kept free, and nothing beside memory.
fn host() -> Host {
    Host {
        headroom_bytes: 384 * MIB,
        overhead_bytes: 0,
        swap_bytes: 64 * GIB,
        ..Host::new(6 * GIB)
    }
}

fn three(change: impl Fn(usize, &mut Machine, &mut Guest)) -> Model {
    let mut model = Model::new(host());
    for (i, name) in ["a", "b", "c"].into_iter().enumerate() {
        let (mut machine, mut guest) = (Machine::new(name, 3 * GIB), Guest::new(3 * GIB));
        change(i, &mut machine, &mut guest);
        model.start(machine, guest);
    }
    model
}

/// How often a series turns from growing to shrinking or back, by more than `noise`.
fn turns(series: &[u64], noise: u64) -> usize {
    let (mut turns, mut extreme, mut rising) = (0, series[0], None);
    for at in series {
        let moved = at.abs_diff(extreme) > noise;
        let up = *at > extreme;
        if moved && rising == Some(!up) {
            turns += 1;
        }
        if moved || rising == Some(up) {
            extreme = *at;
            rising = Some(up);
        }
    }
    turns
}

#[test]
fn a_constant_load_comes_to_rest_without_swinging() {
    for (touched, balloons) in
        [GIB, 2 * GIB, 3 * GIB].into_iter().flat_map(|t| [(t, true), (t, false)])
    {
        let mut model = three(|i, machine, guest| {
            machine.can_balloon = balloons;
            guest.touches = touched;
            guest.works_on = [3 * GIB, GIB, 0][i].min(touched);
        });
        let mut series: [Vec<u64>; 6] = Default::default();
        for _ in 0..600 {
            let step = model.step();
            let figures = step.targets.iter().flat_map(|t| [t.guest_bytes, t.allocation_bytes]);
            for (line, figure) in series.iter_mut().zip(figures) {
                line.push(figure);
            }
        }
        for line in &series {
            assert!(turns(line, 64 * MIB) <= 3, "touched {touched}: {line:?}");
            let (min, max) =
                line[300..].iter().fold((u64::MAX, 0), |(a, b), v| (a.min(*v), b.max(*v)));
            assert!(
                max - min <= 64 * MIB,
                "still moves by {} MiB: {:?}",
                (max - min) / MIB,
                &line[300..]
            );
        }
        let back = model.swapped_in_last(100);
        assert_eq!(back[2], 0, "who does nothing waits for nothing");
    }
}

#[test]
fn a_load_that_swings_moves_less_memory_than_it_swings() {
    let mut model = three(|_, _, guest| guest.touches = 3 * GIB);
    model.guest("b").works_on = 2 * GIB;
    let mut guest_bytes = Vec::new();
    for second in 0..600 {
        model.guest("a").works_on = GIB + if second / 5 % 2 == 0 { 0 } else { 512 * MIB };
        guest_bytes.push(model.step().targets[0].guest_bytes);
    }
    let late = &guest_bytes[300..];
    let moved: u64 = late.windows(2).map(|pair| pair[0].abs_diff(pair[1])).sum();
    // It swings 60 times by 512 MiB.
    assert!(moved < 60 * 512 * MIB / 10, "{} MiB: {late:?}", moved / MIB);
}

#[test]
fn while_enough_is_free_nothing_is_taken() {
    let mut model = three(|_, _, guest| {
        guest.touches = GIB;
        guest.works_on = GIB / 2;
    });
    for _ in 0..100 {
        let step = model.step();
        assert_eq!(step.level, Level::High);
        for target in &step.targets {
            assert_eq!(
                (target.guest_bytes, target.means, target.share),
                (3 * GIB, Means::Nothing, false)
            );
        }
    }
    assert_eq!(model.swapped_out_ever(), 0);
}

#[test]
fn memory_comes_by_balloons_alone_where_they_work() {
    let mut model = three(|i, _, guest| {
        guest.touches = 3 * GIB;
        guest.works_on = [3 * GIB, GIB / 2, GIB / 2][i];
        guest.grows_per_step = 32 * MIB;
    });
    for _ in 0..200 {
        let step = model.step();
        assert!(step.targets.iter().all(|t| matches!(t.means, Means::Nothing | Means::Balloon)));
    }
    // Guests that grow while balloons are on their way are held by swap, at their own cost; it ends.
    let (swapped, ballooned) = (model.swapped_out_ever(), model.ballooned_in_all());
    assert!(swapped < ballooned / 4, "{} of {} MiB", swapped / MIB, ballooned / MIB);
    assert_eq!(model.swapped_in_last(100), [0, 0, 0]);
    let held = model.held("a");
    assert!(held > 2 * GIB, "the busy machine holds {} MiB", held / MIB);
}

#[test]
fn idle_machines_pay_first() {
    let mut model = three(|i, _, guest| {
        guest.touches = 3 * GIB;
        guest.works_on = if i == 0 { 3 * GIB } else { 0 };
    });
    let mut step = model.step();
    for _ in 0..300 {
        step = model.step();
    }
    let allocations: Vec<u64> = step.targets.iter().map(|t| t.allocation_bytes).collect();
    assert!(allocations[0] > 2900 * MIB, "{allocations:?}");
    assert!(allocations[1].abs_diff(allocations[2]) < 64 * MIB, "{allocations:?}");
}

#[test]
fn a_machine_that_becomes_busy_gets_its_memory_back_soon() {
    let mut model = three(|i, _, guest| {
        guest.touches = 3 * GIB;
        guest.works_on = if i == 0 { 128 * MIB } else { 3 * GIB };
    });
    for _ in 0..300 {
        model.step();
    }
    let idle = model.held("a");
    assert!(idle < 1200 * MIB, "it was idle and holds {} MiB", idle / MIB);
    model.guest("a").works_on = 3 * GIB;
    let third = (6 * GIB - 384 * MIB) / 3;
    let steps = (1..).take(60).find(|_| {
        model.step();
        model.held("a") > third / 10 * 9
    });
    assert!(
        steps.is_some_and(|steps| steps <= 30),
        "after {steps:?} steps: {} MiB",
        model.held("a") / MIB
    );
}

#[test]
fn a_guest_that_never_gives_is_swapped_to_its_allocation_and_no_sooner_than_its_balloon_had_time() {
    for answers in [true, false] {
        let mut model = three(|i, machine, guest| {
            guest.touches = 3 * GIB;
            guest.works_on = if i == 0 { 0 } else { 3 * GIB };
            guest.grows_per_step = 64 * MIB;
            if i == 0 {
                guest.balloon_per_step = 0;
                guest.balloon_answers = answers;
                machine.reservation_bytes = GIB / 2;
            } else {
                machine.reservation_bytes = GIB;
            }
        });
        let mut means = Vec::new();
        for _ in 0..300 {
            let step = model.step();
            if step.level == Level::Soft {
                means.push(step.targets[0].means);
            }
            if step.level >= Level::Hard {
                assert_ne!(step.targets[0].means, Means::Balloon, "there is no time for it");
            }
        }
        let first = |wanted| means.iter().position(|m| *m == wanted);
        let (balloon, share, swap) =
            (first(Means::Balloon), first(Means::Share), first(Means::Swap));
        assert_eq!(balloon.is_some(), answers, "{means:?}");
        assert!(
            share.is_some() && balloon <= share && share < swap,
            "{balloon:?} {share:?} {swap:?}"
        );
        let target = model.last.targets[0].clone();
        let slack = 16 * MIB;
        assert!(target.held_bytes <= target.allocation_bytes + slack, "{target:?}");
        assert!(model.held("b") >= GIB && model.held("c") >= GIB);
    }
}

#[test]
fn a_machine_that_cannot_be_seen_may_have_all_that_it_was_allowed_and_the_budget_is_kept() {
    let mut model = three(|i, _, guest| {
        guest.touches = if i == 1 { 256 * MIB } else { GIB };
        guest.works_on = 3 * GIB;
    });
    for _ in 0..20 {
        model.step();
    }
    let allowed = model.last.targets[1].at_most_bytes;
    assert!(allowed > GIB, "it is allowed more than it has: {allowed}");
    model.hide = Some("b".into());
    model.guest("a").touches = 3 * GIB;
    model.guest("c").touches = 3 * GIB;
    for second in 0..60 {
        if second == 30 {
            model.guest("b").touches = 3 * GIB;
        }
        model.step();
        assert!(model.held_in_all() <= 6 * GIB, "{} MiB are held", model.held_in_all() / MIB);
    }
    assert!(model.held("b") > GIB, "it took what it was allowed");
}

#[test]
fn a_reservation_is_there_at_once_even_for_a_machine_that_never_used_it() {
    let mut model = three(|i, machine, guest| {
        guest.works_on = 3 * GIB;
        guest.touches = 3 * GIB;
        if i == 0 {
            machine.reservation_bytes = 2 * GIB;
            (guest.works_on, guest.touches) = (MIB, MIB);
        }
    });
    for _ in 0..100 {
        model.step();
    }
    let guest = model.guest("a");
    (guest.works_on, guest.touches, guest.grows_per_step) = (2 * GIB, 2 * GIB, 4 * GIB);
    model.step();
    assert!(model.held("a") >= 2 * GIB, "{} MiB", model.held("a") / MIB);
    assert_eq!(model.swapped_in_last(1)[0], 0);
}

#[test]
fn what_others_take_of_the_budget_is_missed_and_reservations_are_kept_nevertheless() {
    let mut model = three(|_, machine, guest| {
        machine.reservation_bytes = GIB;
        guest.touches = GIB;
        guest.works_on = GIB;
    });
    for _ in 0..20 {
        model.step();
    }
    assert_eq!(model.last.short_bytes, 0);
    model.others = 4 * GIB;
    let step = model.step();
    assert_eq!((step.short_bytes, step.level), (GIB + 384 * MIB, Level::Low));
    assert!(
        step.targets.iter().all(|t| t.at_most_bytes == GIB && t.allocation_bytes == GIB),
        "{step:?}"
    );
}

/// What must hold in every step.
fn check(step: &Step, model: &Model) -> Result<(), TestCaseError> {
    let sum = |of: fn(&ferry_overcommit::Target) -> u64| step.targets.iter().map(of).sum::<u64>();
    let host = host();
    prop_assert!(sum(|t| t.allocation_bytes) <= host.budget_bytes - host.headroom_bytes);
    prop_assert!(sum(|t| t.at_most_bytes) <= host.budget_bytes - host.headroom_bytes / 3);
    prop_assert!(
        model.held_in_all() <= host.budget_bytes,
        "{} MiB are held",
        model.held_in_all() / MIB
    );
    for target in &step.targets {
        let machine = model.machine(&target.name);
        for bytes in [target.allocation_bytes, target.at_most_bytes] {
            let (floor, limit) = (machine.floor_bytes(), machine.limit_bytes);
            prop_assert!(floor <= bytes && bytes <= limit, "{target:?} of {machine:?}");
        }
        prop_assert!(target.guest_bytes <= machine.size_bytes);
        prop_assert!(target.guest_bytes >= machine.reservation_bytes);
        prop_assert!(target.guest_bytes.is_multiple_of(PAGE_BYTES));
    }
    Ok(())
}

fn load() -> impl Strategy<Value = (u64, u64)> {
    (0..3072_u64, 0..3072_u64).prop_map(|(a, b)| (a.max(b) * MIB, a.min(b) * MIB))
}

fn machine() -> impl Strategy<Value = (Machine, Guest)> {
    let figures = (
        0..8_u64,
        1..4000_u32,
        any::<bool>(),
        0..400_u64,
        any::<bool>(),
        prop_oneof![Just(0), 2..5_u64],
        0..2000_u64,
        1..1000_u64,
    );
    figures.prop_map(|(reserved, shares, can_balloon, rate, answers, ratio, grows, swaps)| {
        let mut machine = Machine::new("", 3 * GIB);
        machine.reservation_bytes = reserved * 256 * MIB;
        machine.limit_bytes = if shares % 3 == 0 { 2 * GIB } else { 3 * GIB };
        (machine.shares, machine.can_balloon) = (shares, can_balloon);
        let mut guest = Guest::new(3 * GIB);
        guest.balloon_per_step = rate * MIB;
        guest.balloon_answers = answers;
        guest.compresses = ratio;
        (guest.grows_per_step, guest.swap_per_step) = (grows * MIB, swaps * MIB);
        (machine, guest)
    })
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, cases: 128, ..ProptestConfig::default() })]

    #[test]
    fn no_guest_brings_the_host_over_its_budget_or_another_below_its_reservation(
        machines in prop::collection::vec(machine(), 1..6),
        loads in prop::collection::vec((any::<prop::sample::Index>(), load(), 1..30_usize), 1..20),
    ) {
        let mut model = Model::new(host());
        for (i, (mut machine, guest)) in machines.into_iter().enumerate() {
            machine.name = i.to_string();
            // Too much for the host is refused, and the others run.
            if !model.try_start(machine, guest) {
                break;
            }
        }
        for (who, (touches, works_on), steps) in loads {
            let name = who.index(model.count()).to_string();
            let guest = model.guest(&name);
            (guest.touches, guest.works_on) = (touches, works_on);
            for _ in 0..steps {
                let step = model.step();
                check(&step, &model)?;
            }
        }
    }

    #[test]
    fn any_constant_load_ends_within_a_sixteenth_of_a_machine(
        machines in prop::collection::vec((machine(), load()), 1..6),
    ) {
        let mut model = Model::new(host());
        for (i, ((mut machine, mut guest), (touches, works_on))) in machines.into_iter().enumerate() {
            machine.name = i.to_string();
            (guest.touches, guest.works_on) = (touches, works_on);
            guest.grows_per_step = guest.grows_per_step.max(16 * MIB);
            if !model.try_start(machine, guest) {
                break;
            }
        }
        let mut series = vec![Vec::new(); 2 * model.count()];
        for _ in 0..900 {
            let step = model.step();
            let figures = step.targets.iter().flat_map(|t| [t.guest_bytes, t.allocation_bytes]);
            series.iter_mut().zip(figures).for_each(|(line, figure)| line.push(figure));
        }
        for line in &series {
            let late = &line[700..];
            let (min, max) = late.iter().fold((u64::MAX, 0), |(a, b), v| (a.min(*v), b.max(*v)));
            prop_assert!(max - min <= 192 * MIB, "still moves by {} MiB: {:?}", (max - min) / MIB, late);
        }
    }

    #[test]
    fn figures_that_cannot_be_are_no_reason_to_panic(
        raw in prop::collection::vec(any::<[u64; 6]>(), 1..20), used in any::<u64>(), some in any::<f64>()
    ) {
        let mut manager = ferry_overcommit::Manager::new(host());
        let machine = Machine { reservation_bytes: GIB, ..Machine::new("a", 3 * GIB) };
        manager.admit(machine).expect("it fits");
        for (i, [a, b, c, d, e, f]) in raw.into_iter().enumerate() {
            let seen = ferry_overcommit::Observed {
                resident_bytes: a, ballooned_bytes: b, swapped_bytes: c, pool_bytes: d, saved_bytes: e,
                active_bytes: Some(f), swap_in_bytes_per_s: a ^ b, balloon_answers: a & 1 == 0,
            };
            let host = HostSeen { used_bytes: used, pressure: ferry_overcommit::Pressure { some, full: -some } };
            let step = manager.step(std::time::Duration::from_secs(i as u64), &host, &BTreeMap::from([("a".into(), seen)]));
            let target = &step.targets[0];
            prop_assert!((GIB..=3 * GIB).contains(&target.at_most_bytes));
            prop_assert!((GIB..=3 * GIB).contains(&target.guest_bytes), "{target:?}");
        }
    }
}
