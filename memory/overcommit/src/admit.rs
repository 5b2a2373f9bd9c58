//! What can be held, and with which numbers it is refused.

use crate::Size;
use crate::machine::{BadMachine, Host, LARGEST_BYTES, Machine};

/// Why machines cannot run on a host together.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// figures that make no sense by themselves
    #[error(transparent)]
    Bad(#[from] BadMachine),
    /// two machines of one name
    #[error("two machines are called `{0}`: rename one")]
    Twice(String),
    /// a host that has nothing to give
    #[error(
        "a budget of {budget} with {headroom} headroom cannot be: the headroom must be less than the budget, and the \
         budget at most {}",
        Size(LARGEST_BYTES)
    )]
    Host {
        /// The host's memory.
        budget: Size,
        /// What of it is kept free.
        headroom: Size,
    },
    /// more is promised than there is
    #[error(
        "{who} cannot be held: reservations of {reserved} are promised, but only {usable} can be (budget {budget}, less \
         {headroom} headroom and {overhead} for what runs {machines} machines). {short} are missing: raise the budget, or \
         lower reservations; a machine without swap has all of its size reserved"
    )]
    Reserved {
        /// The new machine, or all.
        who: String,
        /// Sum of what is promised.
        reserved: Size,
        /// What can be given to machines.
        usable: Size,
        /// The host's memory.
        budget: Size,
        /// What of it is kept free.
        headroom: Size,
        /// What the machines take beside their memory.
        overhead: Size,
        /// How many machines.
        machines: u64,
        /// What is missing.
        short: Size,
    },
    /// pages that would be nowhere
    #[error(
        "{who} cannot be held: if all guests touch all of their {sizes}, {usable} are in memory and {needed} must be in the \
         swap file, which has {swap} (the compressed pool does not count: not everything can be compressed). Give the swap \
         file {short} more, raise the budget, or start less"
    )]
    Swap {
        /// The new machine, or all.
        who: String,
        /// Sum of sizes.
        sizes: Size,
        /// What of it is in memory then.
        usable: Size,
        /// What the swap file must hold.
        needed: Size,
        /// What it can hold.
        swap: Size,
        /// What is missing.
        short: Size,
    },
}

/// What a host's machines need if their guests touch all that they have, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Held {
    /// Sum of what is promised.
    pub reserved_bytes: u64,
    /// Sum of sizes.
    pub sizes_bytes: u64,
    /// What can be given to the machines.
    pub usable_bytes: u64,
    /// What the swap file must be able to hold.
    pub swap_needed_bytes: u64,
}

/// What it takes to hold `machines`, whether or not the host has it.
#[must_use]
pub fn needs(host: &Host, machines: &[Machine]) -> Held {
    let sum = |of: fn(&Machine) -> u64| machines.iter().map(of).fold(0, u64::saturating_add);
    let usable_bytes = host.usable_bytes(count(machines));
    let sizes_bytes = sum(|m| m.size_bytes);
    Held {
        reserved_bytes: sum(Machine::floor_bytes),
        sizes_bytes,
        usable_bytes,
        swap_needed_bytes: sizes_bytes.saturating_sub(usable_bytes.min(sum(|m| m.limit_bytes))),
    }
}

/// Whether `host` can hold `machines` whatever their guests do.
///
/// # Errors
/// Why not, with the numbers.
pub fn hold(host: &Host, machines: &[Machine]) -> Result<Held, Refusal> {
    check(host, machines, || "the plan".into())
}

/// Whether `host`, which holds `machines`, can hold `new` as well.
///
/// # Errors
/// Why not, with the numbers.
pub fn admit(host: &Host, machines: &[Machine], new: &Machine) -> Result<Held, Refusal> {
    let mut all = machines.to_vec();
    all.push(new.clone());
    check(host, &all, || format!("machine `{}`", new.name))
}

fn check(host: &Host, machines: &[Machine], who: impl Fn() -> String) -> Result<Held, Refusal> {
    let (budget, headroom) = (Size(host.budget_bytes), Size(host.headroom_bytes));
    if headroom >= budget || budget > Size(LARGEST_BYTES) {
        return Err(Refusal::Host { budget, headroom });
    }
    for (i, machine) in machines.iter().enumerate() {
        machine.check()?;
        if machines[..i].iter().any(|other| other.name == machine.name) {
            return Err(Refusal::Twice(machine.name.clone()));
        }
    }
    let held = needs(host, machines);
    let usable = Size(held.usable_bytes);
    if let Some(short) = missing(held.reserved_bytes, held.usable_bytes) {
        let count = count(machines);
        return Err(Refusal::Reserved {
            who: who(),
            reserved: Size(held.reserved_bytes),
            usable,
            budget,
            headroom,
            overhead: Size(host.overhead_bytes.saturating_mul(count)),
            machines: count,
            short,
        });
    }
    if let Some(short) = missing(held.swap_needed_bytes, host.swap_bytes) {
        return Err(Refusal::Swap {
            who: who(),
            sizes: Size(held.sizes_bytes),
            usable: Size(held.sizes_bytes - held.swap_needed_bytes),
            needed: Size(held.swap_needed_bytes),
            swap: Size(host.swap_bytes),
            short,
        });
    }
    Ok(held)
}

fn count(machines: &[Machine]) -> u64 {
    u64::try_from(machines.len()).unwrap_or(u64::MAX)
}

/// What is missing, in whole MiB: so much more is enough.
fn missing(needed: u64, there: u64) -> Option<Size> {
    let short = needed.checked_sub(there).filter(|short| *short > 0)?;
    Some(Size(short.next_multiple_of(1 << 20)))
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;

    /// 6 GiB, of which 5 GiB can be given to two machines.
    fn host() -> Host {
        Host { headroom_bytes: GIB / 2, overhead_bytes: GIB / 4, ..Host::new(6 * GIB) }
    }

    #[test]
    fn reservations_that_do_not_fit_are_refused_with_the_numbers() {
        let host = Host { swap_bytes: 100 * GIB, ..host() };
        let with =
            |gib: u64| Machine { reservation_bytes: gib * GIB, ..Machine::new("a", 8 * GIB) };
        let b = Machine { name: "b".into(), ..with(2) };
        assert!(admit(&host, &[with(3)], &b).is_ok(), "exactly what there is");
        let said = admit(&host, &[with(4)], &b).expect_err("6 in 5").to_string();
        for words in [
            "`b`",
            "reservations of 6 GiB",
            "only 5 GiB",
            "512 MiB for",
            "2 machines",
            "1 GiB are missing",
        ] {
            assert!(said.contains(words), "{words}: {said}");
        }
        let unswappable = Machine { can_swap: false, ..Machine::new("b", 3 * GIB) };
        assert!(matches!(admit(&host, &[with(3)], &unswappable), Err(Refusal::Reserved { .. })));
    }

    #[test]
    fn memory_that_would_be_nowhere_is_refused_with_the_numbers() {
        let machines = [Machine::new("a", 3 * GIB), Machine::new("b", 3 * GIB)];
        assert_eq!(needs(&host(), &machines).swap_needed_bytes, GIB);
        assert!(
            hold(&Host { swap_bytes: GIB, ..host() }, &machines).is_ok(),
            "exactly what it takes"
        );
        let said = hold(&Host { swap_bytes: GIB / 2, ..host() }, &machines)
            .expect_err("short")
            .to_string();
        for words in [
            "all of their 6 GiB",
            "5 GiB are in memory",
            "1 GiB must be",
            "which has 512 MiB",
            "512 MiB more",
        ] {
            assert!(said.contains(words), "{words}: {said}");
        }
        let limited = machines.map(|m| Machine { limit_bytes: GIB, ..m });
        assert_eq!(
            needs(&host(), &limited).swap_needed_bytes,
            4 * GIB,
            "beyond limits, all is swapped"
        );
    }

    #[test]
    fn names_are_one_of_a_kind_and_a_host_has_something_to_give() {
        let a = Machine::new("a", GIB);
        assert_eq!(admit(&host(), std::slice::from_ref(&a), &a), Err(Refusal::Twice("a".into())));
        for bad in [Host::new(0), Host { headroom_bytes: 6 * GIB, ..host() }, Host::new(u64::MAX)] {
            assert!(matches!(hold(&bad, &[]), Err(Refusal::Host { .. })), "{bad:?}");
        }
        assert!(hold(&Host::new(LARGEST_BYTES), &[]).is_ok());
        let nearly_all = Host { headroom_bytes: 6 * GIB - 1, ..host() };
        assert!(hold(&nearly_all, &[]).is_ok());
    }
}
