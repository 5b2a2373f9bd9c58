//! The protocol's real state machines under a model checker: every order in which what happens can happen,
//! within stated bounds.
//!
//! [`Source`](ferry_protocol::Source) and [`Destination`](ferry_protocol::Destination) are the shipped ones
//! (`table.rs`); what their engines, the links and people do is modelled (`world.rs`, `hosts.rs`). A machine has
//! one or two pages and one lane. Each thing that goes wrong may do so at any point, as often as a case says:
//! links are cut, messages and pages come arbitrarily late, also those of links that were given up, answers come
//! too late for whoever waits, either process ends. `--ignored` walks further, in
//! minutes.
//!
//! Assumed: a process that ended runs no machine; the operator's word that a destination is switched off is
//! true (`a_fence_that_lies_runs_the_machine_twice` shows what comes of it otherwise); one link keeps its
//! order; the ledger and the pager do what their own tests say.

mod destination;
mod hosts;
mod rules;
mod source;
mod state;
mod table;
mod world;

use std::collections::{BTreeSet, HashSet};
use std::time::Instant;

use stateright::{Checker, HasDiscoveries, Model, Path, Property};

use source::{EndKind, Kind, Moves};
use state::{Faults, Process, State};
use world::{Plant, Step, World};

type When = fn(&World, &State) -> bool;

/// What must occur, or a case would prove nothing of it.
const REACHED: [(&str, When); 18] = [
    ("moved", |_, s| ended(s, EndKind::Completed(Some(true)), "Verifying")),
    ("moved, the last word lost", |_, s| ended(s, EndKind::Completed(None), "Verifying")),
    ("moved, learned by asking", |_, s| ended(s, EndKind::Completed(None), "Doubting")),
    ("moved, all pages there when the source came back", |_, s| {
        ended(s, EndKind::Completed(None), "Rejoining")
    }),
    ("ran by a second commit", |_, s| s.destination.ran_by >= Some(2)),
    ("served again after a lost link", |w, s| {
        w.faults.cuts > s.left.cuts && w.source(s).phase == "Serving" && s.source.serving.is_some()
    }),
    ("reclaimed by the destination's word", |_, s| {
        ended(s, EndKind::Failed, "Doubting") && s.source.runs
    }),
    ("reclaimed from a refused commit", |_, s| {
        ended(s, EndKind::Failed, "Committed") && s.source.runs
    }),
    ("refused", |_, s| s.source.end.is_some_and(|end| end.kind == EndKind::Refused)),
    ("cancelled while it stood still", |_, s| {
        s.source.pauses > 0 && s.source.end.is_some_and(|end| end.kind == EndKind::Cancelled)
    }),
    ("in doubt", |_, s| s.source.end.is_some_and(|end| end.kind == EndKind::InDoubt)),
    ("detached, and runs there", |_, s| detached(s, false) && s.destination.runs),
    ("detached in doubt", |_, s| detached(s, true)),
    ("taken up again and moved", |w, s| {
        w.faults.reattaches > s.left.reattaches && moved_whole(s) && s.source.guest
    }),
    ("finished from a spool", |_, s| !s.source.guest && s.source.alive && moved_whole(s)),
    ("gone on by the operator's word", |_, s| {
        s.source.runs && s.source.end.is_some_and(|end| end.kind == EndKind::Fenced)
    }),
    ("both crashed", |_, s| !s.source.alive && s.destination.process != Process::Alive),
    ("asked a process that knows no session", |w, s| {
        s.destination.process == Process::Restarted && w.source(s).phase == "Doubting"
    }),
];

fn ended(s: &State, kind: EndKind, from: &str) -> bool {
    s.source.end.is_some_and(|end| end.kind == kind && end.from == from)
}

fn detached(s: &State, doubts: bool) -> bool {
    let kind = s.source.end.map(|end| end.kind);
    matches!(kind, Some(EndKind::Detached { in_doubt, .. }) if in_doubt == doubts)
}

fn moved_whole(s: &State) -> bool {
    let kind = s.source.end.map(|end| end.kind);
    s.destination.runs && s.missing() == 0 && matches!(kind, Some(EndKind::Completed(_)))
}

/// What may go wrong beside nothing.
const NONE: Faults = Faults {
    writes: 0,
    cuts: 0,
    early_ticks: 0,
    cancels: 0,
    refusals: 0,
    failures: 0,
    bad_pages: 0,
    paging_breaks: 0,
    source_crashes: 0,
    destination_crashes: 0,
    restarts: 0,
    reattaches: 0,
    fences: 0,
};

/// Walks through all states; what is found is told with the way to it.
fn check(kind: Kind, pages: u8, faults: Faults) -> BTreeSet<&'static str> {
    let mut world = World::new(Moves { kind, pages }, faults, Plant::Nothing);
    world.reach = REACHED.iter().map(|(name, when)| Property::sometimes(name, *when)).collect();
    let began = Instant::now();
    let checker = world.checker().spawn_bfs().join();
    let world = checker.model();
    // Before the ways to what was found are walked again.
    let met = std::mem::take(&mut *world.met.lock().expect("nobody panicked"));
    for rule in rules::always() {
        if let Some(path) = checker.discovery(rule.name) {
            panic!("{kind:?}, {faults:?}: not so: {}\n{}", rule.name, told(world, path));
        }
    }
    assert_eq!(met.states.len(), checker.unique_state_count(), "each state was looked at");
    for (goals, what) in [(&met.over, "comes to an end"), (&met.decided, "can be decided")] {
        let stranded = rules::stranded(world, &met.states, goals);
        if !stranded.is_empty() {
            let (states, path) = (stranded.len(), way_to(stranded, kind, pages, faults));
            panic!("{kind:?}, {faults:?}: {states} states from which nothing {what}\n{path}");
        }
    }
    println!(
        "{kind:?}, {pages} pages, {faults:?}: {} states, {} steps, depth {}, {} states of the source and {} of \
         the destination, {:.1} s",
        checker.unique_state_count(),
        checker.state_count(),
        checker.max_depth(),
        world.sources.len(),
        world.destinations.len(),
        began.elapsed().as_secs_f64()
    );
    let found = checker.discoveries();
    REACHED.iter().map(|r| r.0).filter(|name| found.contains_key(name)).collect()
}

/// A shortest way to one of `wanted`.
fn way_to(wanted: HashSet<u64>, kind: Kind, pages: u8, faults: Faults) -> String {
    let mut world = World::new(Moves { kind, pages }, faults, Plant::Nothing);
    world.wanted = wanted;
    let is_wanted = |w: &World, s: &State| w.wanted.contains(&rules::fingerprint(s));
    world.reach = vec![Property::sometimes("wanted", is_wanted)];
    let only = HasDiscoveries::AnyOf(BTreeSet::from(["wanted"]));
    let checker = world.checker().finish_when(only).spawn_bfs().join();
    checker.discovery("wanted").map(|path| told(checker.model(), path)).unwrap_or_default()
}

/// The steps that lead to a state, and the state.
fn told(world: &World, path: Path<State, Step>) -> String {
    let mut out = String::new();
    for (state, step) in path.into_vec() {
        let phases = (world.source(&state).phase, world.destination(&state).phase);
        match step {
            Some(step) => out += &format!("  {:>16} {:<12} {step:?}\n", phases.0, phases.1),
            None => out += &format!("{state:#?}"),
        }
    }
    out
}

/// All cases together: `bounds` by `bounds`, and everything in [`REACHED`] was met.
fn check_all(cases: &[(Kind, u8, Faults)]) {
    let mut reached = BTreeSet::new();
    for (kind, pages, faults) in cases {
        reached.extend(check(*kind, *pages, *faults));
    }
    let missed: Vec<&str> = REACHED.iter().map(|r| r.0).filter(|n| !reached.contains(n)).collect();
    assert!(missed.is_empty(), "nothing was proved of what did not occur: {missed:?}");
}

const KINDS: [Kind; 3] = [Kind::PreCopy, Kind::Hybrid, Kind::PostCopy];

#[test]
fn no_order_of_events_runs_a_machine_twice_or_loses_it() {
    let links = Faults { cuts: 1, early_ticks: 1, cancels: 1, reattaches: 1, ..NONE };
    let refusals = Faults { cuts: 1, refusals: 1, failures: 1, bad_pages: 1, ..NONE };
    let writes = Faults { cuts: 1, writes: 1, paging_breaks: 1, ..NONE };
    let twice = Faults { cuts: 2, ..NONE };
    let crashes = Faults {
        cuts: 1,
        source_crashes: 1,
        destination_crashes: 1,
        restarts: 1,
        fences: 1,
        reattaches: 1,
        ..NONE
    };
    let mut cases = Vec::new();
    for kind in KINDS {
        cases.extend([links, refusals, twice, crashes].map(|faults| (kind, 1, faults)));
        cases.push((kind, 2, writes));
    }
    cases.push((Kind::Rounds, 1, Faults { cuts: 1, writes: 2, ..NONE }));
    check_all(&cases);
}

/// The same, further: some minutes.
#[test]
#[ignore = "walks for minutes"]
fn no_order_of_events_runs_a_machine_twice_or_loses_it_within_wider_bounds() {
    let links = Faults { cuts: 2, early_ticks: 1, writes: 1, cancels: 1, reattaches: 1, ..NONE };
    let crashes = Faults {
        cuts: 1,
        early_ticks: 1,
        cancels: 1,
        refusals: 1,
        source_crashes: 1,
        destination_crashes: 1,
        restarts: 1,
        fences: 1,
        reattaches: 1,
        ..NONE
    };
    check_all(&KINDS.map(|kind| [(kind, 1, links), (kind, 1, crashes)]).concat());
}

/// The checks must be able to fail: with this fault planted they find a way to break `rule`.
fn assert_found(plant: Plant, kind: Kind, faults: Faults, rule: &'static str) {
    let checker = World::new(Moves { kind, pages: 1 }, faults, plant).checker();
    let only = HasDiscoveries::AnyOf(BTreeSet::from([rule]));
    let checker = checker.finish_when(only).spawn_bfs().join();
    let found = checker.discovery(rule).map(|path| told(checker.model(), path));
    assert!(found.is_some(), "{plant:?} was not found to break: {rule}");
    println!("{plant:?}:\n{}", found.unwrap_or_default());
}

const CUT: Faults = Faults { cuts: 1, ..NONE };

#[test]
fn a_source_that_resumes_on_a_time_out_after_its_commit_is_found() {
    let late = Faults { early_ticks: 1, ..NONE };
    assert_found(Plant::ResumesOnTimeOut, Kind::PreCopy, late, rules::NEVER_TWO);
}

#[test]
fn a_guest_that_goes_on_when_it_should_stand_still_is_found() {
    assert_found(Plant::DoesNotStop, Kind::PreCopy, NONE, rules::NEVER_TWO);
}

#[test]
fn a_destination_that_says_go_on_although_the_commit_was_whole_is_found() {
    assert_found(Plant::GoesOnThoughWhole, Kind::PreCopy, CUT, rules::ONE_PERMIT);
    assert_found(Plant::GoesOnThoughWhole, Kind::Hybrid, CUT, rules::NEVER_TWO);
}

#[test]
fn a_permit_that_is_delivered_once_more_after_the_source_came_back_is_found() {
    assert_found(Plant::TakesLateCommit, Kind::PreCopy, CUT, rules::ONE_PERMIT);
}

#[test]
fn batches_that_count_before_they_are_installed_are_found() {
    assert_found(Plant::CountsTooEarly, Kind::PreCopy, NONE, rules::WHOLE);
}

#[test]
fn a_harvest_left_out_after_save_is_found() {
    let writes = Faults { writes: 1, ..NONE };
    assert_found(Plant::SkipsHarvestAfterSave, Kind::PreCopy, writes, rules::WHOLE);
}

#[test]
fn a_source_that_does_not_hear_of_a_lost_link_is_found() {
    assert_found(Plant::HearsOfNoLoss, Kind::PostCopy, CUT, rules::SETTLED);
}

#[test]
fn a_source_that_comes_back_and_forgets_what_was_lost_on_the_way_is_found() {
    assert_found(Plant::ServesOnlyUnsent, Kind::PostCopy, CUT, rules::SETTLED);
}

#[test]
fn a_stranger_who_denies_that_the_machine_runs_is_found() {
    assert_found(Plant::StrangerDenies, Kind::PostCopy, CUT, rules::NEVER_TWO);
}

/// What is assumed: if the operator is wrong, nothing here helps.
#[test]
fn a_fence_that_lies_runs_the_machine_twice() {
    let fenced = Faults { fences: 1, ..CUT };
    for kind in KINDS {
        assert_found(Plant::FenceLies, kind, fenced, rules::NEVER_TWO);
    }
}
