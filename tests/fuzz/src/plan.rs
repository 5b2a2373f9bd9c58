//! A plan for a host, and what its manager makes of the figures that come.

use std::collections::BTreeMap;
use std::time::Duration;

use arbitrary::{Result, Unstructured};
use ferry_overcommit::{
    BadPlan, HostSeen, Manager, Observed, Outlook, Plan, Pressure, Size, Step, hold,
};

/// A plan up to the first zero byte; behind it, figures.
pub fn plan(data: &[u8]) {
    let end = data.iter().position(|byte| *byte == 0).unwrap_or(data.len());
    let Ok(text) = std::str::from_utf8(&data[..end]) else { return };
    let plan = match Plan::parse(text) {
        Ok(plan) => plan,
        Err(BadPlan::Figure { line, what }) => {
            let last = text.lines().count().max(1);
            return assert!((1..=last).contains(&line) && !what.is_empty(), "line {line}: {what}");
        }
        Err(BadPlan::Toml(_)) => return,
    };
    outlook(&plan);
    let _ = manage(&plan, &mut Unstructured::new(data.get(end + 1..).unwrap_or_default()));
}

fn outlook(plan: &Plan) {
    for machine in &plan.machines {
        assert_eq!(machine.check(), Ok(()));
        let said = Size(machine.size_bytes).to_string();
        assert!(said.parse() != Ok(Size(0)), "{said}");
    }
    let outlook = Outlook::of(plan);
    let held = match hold(&plan.host, &plan.machines) {
        Ok(held) => held,
        Err(e) => return assert!(!e.to_string().is_empty()),
    };
    assert!(held.reserved_bytes <= held.usable_bytes);
    assert!(held.swap_needed_bytes <= plan.host.swap_bytes);
    let mut busy = 0;
    for prospect in &outlook.machines {
        busy += prospect.all_busy_bytes;
        for bytes in [prospect.all_busy_bytes, prospect.alone_busy_bytes, prospect.alone_idle_bytes]
        {
            assert!(
                prospect.reservation_bytes <= bytes && bytes <= prospect.limit_bytes,
                "{prospect:?}"
            );
        }
    }
    assert!(busy <= outlook.usable_bytes, "{outlook:?}");
}

fn manage(plan: &Plan, u: &mut Unstructured<'_>) -> Result<()> {
    let mut manager = Manager::new(plan.host.clone());
    let mut floors = BTreeMap::new();
    for machine in &plan.machines {
        if manager.admit(machine.clone()).is_ok() {
            floors.insert(machine.name.clone(), (machine.floor_bytes(), machine.limit_bytes));
        }
    }
    let mut now = Duration::ZERO;
    for _ in 0..30 {
        if u.is_empty() {
            break;
        }
        now += Duration::from_secs(u.int_in_range(0..=70)?);
        let pressure = Pressure { some: u.arbitrary()?, full: u.arbitrary()? };
        let seen = HostSeen { used_bytes: bytes(u)?, pressure };
        let mut observed = BTreeMap::new();
        for name in floors.keys() {
            if u.ratio(7, 8)? {
                observed.insert(name.clone(), look(u)?);
            }
        }
        check(&manager.step(now, &seen, &observed), plan, &floors);
    }
    Ok(())
}

/// Something that there can be, or anything.
fn bytes(u: &mut Unstructured<'_>) -> Result<u64> {
    if u.ratio(1, 10)? { u.arbitrary() } else { Ok(u64::from(u.arbitrary::<u16>()?) << 20) }
}

fn look(u: &mut Unstructured<'_>) -> Result<Observed> {
    Ok(Observed {
        resident_bytes: bytes(u)?,
        ballooned_bytes: bytes(u)?,
        swapped_bytes: bytes(u)?,
        pool_bytes: bytes(u)?,
        saved_bytes: bytes(u)?,
        active_bytes: if u.arbitrary()? { Some(bytes(u)?) } else { None },
        swap_in_bytes_per_s: bytes(u)?,
        balloon_answers: u.arbitrary()?,
    })
}

fn check(step: &Step, plan: &Plan, machines: &BTreeMap<String, (u64, u64)>) {
    assert_eq!(step.targets.len(), machines.len());
    for target in &step.targets {
        let (floor, limit) = machines[&target.name];
        for bytes in [target.allocation_bytes, target.at_most_bytes] {
            assert!(floor <= bytes && bytes <= limit, "{target:?} of {floor} to {limit}");
        }
    }
    let sum = |of: fn(&ferry_overcommit::Target) -> u64| step.targets.iter().map(of).sum::<u64>();
    let floors: u64 = machines.values().map(|(floor, _)| floor).sum();
    assert_eq!(step.short_bytes, floors.saturating_sub(step.usable_bytes));
    let headroom = plan.host.headroom_bytes;
    assert!(sum(|t| t.allocation_bytes) <= step.usable_bytes.max(floors), "{step:?}");
    let bound = step.usable_bytes + headroom - headroom / 3;
    assert!(sum(|t| t.at_most_bytes) <= bound.max(floors), "{step:?}");
}
