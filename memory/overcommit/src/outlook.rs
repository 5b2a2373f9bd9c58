//! What becomes of a plan: who gets what when all guests want all that they have.

use serde::Serialize;

use crate::Plan;
use crate::admit::{Held, needs};
use crate::divide::{Claim, divide};

/// A plan's figures, in bytes. They are right whether or not the plan can be held.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Outlook {
    /// Physical memory for machines and what runs them.
    pub budget_bytes: u64,
    /// What of it is kept free.
    pub headroom_bytes: u64,
    /// What of it the machines' processes take beside memory.
    pub overhead_bytes: u64,
    /// What of it the machines can be given.
    pub usable_bytes: u64,
    /// Sum of what is promised.
    pub reserved_bytes: u64,
    /// Sum of what the guests see.
    pub sizes_bytes: u64,
    /// What the swap file must hold if all guests touch all that they have.
    pub swap_needed_bytes: u64,
    /// What it can hold.
    pub swap_bytes: u64,
    /// Each machine.
    pub machines: Vec<Prospect>,
}

/// What one machine can expect, in bytes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Prospect {
    /// Which.
    pub name: String,
    /// What its guest sees.
    pub size_bytes: u64,
    /// What it always may hold; its size if it cannot be swapped.
    pub reservation_bytes: u64,
    /// What it never exceeds.
    pub limit_bytes: u64,
    /// Its weight.
    pub shares: u32,
    /// Whose it is.
    pub tenant: Option<String>,
    /// What it gets when all guests use all of their memory all the time.
    pub all_busy_bytes: u64,
    /// What it gets when it does, and all others are idle.
    pub alone_busy_bytes: u64,
    /// What it is left with when it is idle, and all others do: the least that it ever comes to.
    pub alone_idle_bytes: u64,
}

impl Outlook {
    /// The outlook of `plan`.
    #[must_use]
    pub fn of(plan: &Plan) -> Self {
        let Plan { host, machines, .. } = plan;
        let Held { reserved_bytes, sizes_bytes, usable_bytes, swap_needed_bytes } =
            needs(host, machines);
        let gets = |busy: &dyn Fn(usize) -> bool| {
            let claims: Vec<Claim> = (machines.iter().enumerate())
                .map(|(i, machine)| Claim {
                    floor_bytes: machine.floor_bytes(),
                    wanted_bytes: machine.size_bytes,
                    limit_bytes: machine.limit_bytes,
                    shares: machine.shares,
                    active_bytes: if busy(i) { machine.size_bytes } else { 0 },
                })
                .collect();
            divide(usable_bytes, host.tax, &claims)
        };
        let all_busy = gets(&|_| true);
        let prospect = |(i, machine): (usize, &crate::Machine)| Prospect {
            name: machine.name.clone(),
            size_bytes: machine.size_bytes,
            reservation_bytes: machine.floor_bytes(),
            limit_bytes: machine.limit_bytes,
            shares: machine.shares,
            tenant: machine.tenant.clone(),
            all_busy_bytes: all_busy[i],
            alone_busy_bytes: gets(&|other| other == i)[i],
            alone_idle_bytes: gets(&|other| other != i)[i],
        };
        let count = u64::try_from(machines.len()).unwrap_or(u64::MAX);
        Self {
            budget_bytes: host.budget_bytes,
            headroom_bytes: host.headroom_bytes,
            overhead_bytes: host.overhead_bytes.saturating_mul(count),
            usable_bytes,
            reserved_bytes,
            sizes_bytes,
            swap_needed_bytes,
            swap_bytes: host.swap_bytes,
            machines: machines.iter().enumerate().map(prospect).collect(),
        }
    }
}
