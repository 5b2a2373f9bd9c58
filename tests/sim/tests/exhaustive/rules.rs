//! What must be true in every state, what must be reachable from every state, and what must occur.

use std::collections::{HashMap, HashSet};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::PoisonError;

use stateright::Property;

use super::destination::Ended;
use super::source::EndKind;
use super::state::{Order, Packet, Process, State, Task};
use super::world::World;

pub(crate) fn fingerprint(state: &State) -> u64 {
    let mut hasher = DefaultHasher::new();
    state.hash(&mut hasher);
    hasher.finish()
}

pub(crate) const NEVER_TWO: &str = "never two running";
pub(crate) const ONE_PERMIT: &str = "at most one can be used to run the machine";
pub(crate) const WHOLE: &str = "what runs has all that the guest had";
pub(crate) const NOBODY_BLAMED: &str = "nobody is taken to have broken the protocol";
pub(crate) const NOT_LOST: &str = "the right to run is never lost but with who held it";
pub(crate) const STAYS: &str = "what is said to have become of the machine is so";
pub(crate) const SETTLED: &str = "nobody waits for what cannot come";

pub(crate) fn always() -> Vec<Property<World>> {
    vec![
        Property::always(NEVER_TWO, |_, s: &State| !(s.source.runs && s.destination.runs)),
        Property::always(ONE_PERMIT, |w: &World, s: &State| permits(w, s) <= 1),
        Property::always(WHOLE, |_, s: &State| s.broken.is_none()),
        Property::always(NOBODY_BLAMED, |_, s: &State| !s.source.end.is_some_and(|end| end.blames)),
        Property::always(NOT_LOST, |w: &World, s: &State| {
            s.lost || permits(w, s) + stubs(w, s) > 0
        }),
        Property::always(STAYS, |_, s: &State| stays(s)),
        Property::always(SETTLED, |w: &World, s: &State| !w.is_quiet(s) || settled(s)),
    ]
}

/// Rights to run that are in use, held, or on a way on which they can still arrive.
fn permits(world: &World, s: &State) -> usize {
    let commits = |p: &&Packet| matches!(p, Packet::Message { commits: true, .. });
    let on_the_way =
        s.link.to_destination.iter().chain(s.old.iter().flat_map(|l| &l.to_destination));
    let (source, destination) = (&s.source, &s.destination);
    let alive = destination.process == Process::Alive;
    usize::from(source.permit.is_some())
        + source.orders.iter().filter(|o| matches!(o, Order::Paused(_))).count()
        + usize::from(source.alive && world.source(s).has_permit)
        + on_the_way.filter(commits).count()
        + usize::from(alive && world.destination(s).has_permit)
        + destination.orders.iter().filter(|t| matches!(t, Task::Resume(_))).count()
        + usize::from(destination.runs)
}

fn stubs(world: &World, s: &State) -> usize {
    let left = s.source.end.is_some_and(|end| end.has_stub());
    usize::from(s.source.alive && (left || world.source(s).has_stub))
}

fn stays(s: &State) -> bool {
    let Some(end) = s.source.end else { return true };
    let stopping = s.source.orders.iter().any(|o| matches!(o, Order::Paused(_)));
    match end.kind {
        EndKind::Cancelled | EndKind::Refused | EndKind::Failed => {
            (s.source.runs || stopping || !s.source.guest || !s.source.alive)
                && s.destination.ran_by.is_none()
        }
        EndKind::Completed(_) => {
            !s.source.runs && s.destination.ran_by.is_some() && s.missing() == 0
        }
        EndKind::Detached { in_doubt: false, .. } => {
            !s.source.runs && s.destination.ran_by.is_some()
        }
        EndKind::InDoubt | EndKind::Detached { .. } => !s.source.runs,
        EndKind::Fenced => true,
    }
}

/// Both sides are through with it, or wait for what somebody else must do.
fn settled(s: &State) -> bool {
    let arrived = match s.destination.end {
        Some(Ended::Void) => !s.destination.runs,
        Some(Ended::Runs(_)) => s.missing() == 0,
        // Pages are elsewhere: until the operator takes it up, or for ever, if they were lost.
        None => {
            let left = s.source.end.map(|end| end.kind);
            let elsewhere = !s.source.alive || matches!(left, Some(EndKind::Detached { .. }));
            s.destination.runs && s.missing() != 0 && elsewhere
        }
    };
    let ends = !s.source.alive || s.source.end.is_some();
    ends && s.source.orders.is_empty() && (arrived || s.destination.process != Process::Alive)
}

/// Nothing is open: one side runs the machine, with all of its pages.
fn decided(world: &World, s: &State) -> bool {
    let one = s.source.runs != s.destination.runs;
    world.is_quiet(s) && settled(s) && one && s.missing() == 0
}

/// What only an operator can decide, and what is gone.
fn beyond_repair(s: &State) -> bool {
    let left = match s.source.end.map(|end| end.kind) {
        Some(EndKind::InDoubt) => true,
        Some(EndKind::Detached { .. }) => s.left.reattaches == 0,
        _ => false,
    };
    left || s.lost || s.destination.paging_broken || s.destination.process != Process::Alive
}

/// Every state that was met, and which of them are goals.
#[derive(Default)]
pub(crate) struct Met {
    pub(crate) states: Vec<u64>,
    /// Nothing comes any more, and nobody waits.
    pub(crate) over: Vec<bool>,
    /// The same, and it is known who runs the machine; or nobody can know but an operator.
    pub(crate) decided: Vec<bool>,
}

impl Met {
    pub(crate) fn note(&mut self, world: &World, s: &State) {
        let broken = s.broken.is_some();
        self.states.push(fingerprint(s));
        self.over.push(broken || world.is_quiet(s) && settled(s));
        self.decided.push(broken || decided(world, s) || beyond_repair(s));
    }
}

/// The states out of which none of `goals` can be reached, along what the world noted.
pub(crate) fn stranded(world: &World, states: &[u64], goals: &[bool]) -> HashSet<u64> {
    let index: HashMap<u64, usize> = states.iter().copied().zip(0..).collect();
    let edges = world.edges.lock().unwrap_or_else(PoisonError::into_inner);
    let mut before: Vec<Vec<u32>> = vec![Vec::new(); states.len()];
    for (from, to) in edges.iter() {
        if let (Some(from), Some(to)) = (index.get(from), index.get(to)) {
            before[*to].push(u32::try_from(*from).expect("fewer than 4 thousand million"));
        }
    }
    let mut reaches = goals.to_vec();
    let mut open: Vec<usize> = (0..states.len()).filter(|at| goals[*at]).collect();
    while let Some(at) = open.pop() {
        for from in &before[at] {
            let from = usize::try_from(*from).expect("an index");
            if !std::mem::replace(&mut reaches[from], true) {
                open.push(from);
            }
        }
    }
    (0..states.len()).filter(|at| !reaches[*at]).map(|at| states[at]).collect()
}
