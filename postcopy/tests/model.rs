//! The ledger of faults and the queue of pushes behave as the plain tables that they stand for.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use ferry_pages::Run;
use ferry_postcopy::{Admit, Demand, Fault, PushQueue};
use proptest::prelude::*;

/// Around a chunk border of `PageSet`.
const FIRST: u64 = 32768 - 60;
const PAGES: u64 = 120;

fn run() -> impl Strategy<Value = Run> {
    (FIRST..FIRST + PAGES, prop_oneof![Just(1), 0..40_u64])
        .prop_map(|(start, pages)| Run::new(start, pages.min(FIRST + PAGES - start)))
}

fn runs() -> impl Strategy<Value = Vec<Run>> {
    prop::collection::vec(run(), 0..6)
}

fn numbers<'a>(runs: impl IntoIterator<Item = &'a Run>) -> BTreeSet<u64> {
    runs.into_iter().flat_map(|run| run.start..run.end()).collect()
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Page {
    Owed,
    Installing,
    Here,
    /// Zero was given for it.
    Zero,
    Gone,
}

#[derive(Clone, Debug)]
enum Event {
    Fault(u64, u32),
    Admit(u64),
    Installed(u64),
    NotInstalled(u64),
    Discarded(Run),
}

fn event() -> impl Strategy<Value = Event> {
    // Few pages, so that events meet.
    let gfn = FIRST + 50..FIRST + 70;
    prop_oneof![
        4 => (gfn.clone(), 0..4_u32).prop_map(|(gfn, waiter)| Event::Fault(gfn, waiter)),
        3 => gfn.clone().prop_map(Event::Admit),
        3 => gfn.clone().prop_map(Event::Installed),
        1 => gfn.prop_map(Event::NotInstalled),
        1 => run().prop_map(|run| Event::Discarded(Run::new(run.start, run.pages.min(5)))),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    /// No page is installed twice, none after it was discarded or given as zero, and a page is asked for
    /// once however many threads wait.
    #[test]
    fn a_page_is_asked_for_once_installed_once_and_never_after_a_discard(
        owed in runs(),
        events in prop::collection::vec(event(), 0..200),
    ) {
        let mut model: BTreeMap<u64, Page> =
            numbers(&owed).into_iter().map(|gfn| (gfn, Page::Owed)).collect();
        // By page: the threads that wait, with the time since, first come first.
        let mut waiting: Vec<(u64, Vec<(u32, Duration)>)> = Vec::new();
        let mut waits: BTreeMap<u32, Duration> = BTreeMap::new();
        let mut demand = Demand::new(owed.into_iter().collect());
        let (mut requested, mut pushed, mut late, mut zeros) = (0, 0, 0, 0);

        for (step, event) in (0..).zip(events) {
            let now = Duration::from_micros(step * step);
            match event {
                Event::Fault(gfn, waiter) => {
                    let state = model.get(&gfn).copied();
                    let asked = waiting.iter_mut().find(|w| w.0 == gfn);
                    let expected = match state {
                        Some(Page::Owed) if asked.is_none() => Fault::Ask,
                        Some(Page::Owed | Page::Installing) => Fault::Asked,
                        Some(Page::Here | Page::Zero) => Fault::Here,
                        Some(Page::Gone) | None => Fault::Zero,
                    };
                    prop_assert_eq!(demand.fault(gfn, now, waiter), expected);
                    requested += u64::from(expected == Fault::Ask);
                    zeros += u64::from(expected == Fault::Zero);
                    if state.is_none() {
                        model.insert(gfn, Page::Zero);
                    }
                    if matches!(expected, Fault::Ask | Fault::Asked) {
                        match asked {
                            Some((_, threads)) if threads.iter().any(|t| t.0 == waiter) => {}
                            Some((_, threads)) => threads.push((waiter, now)),
                            None => waiting.push((gfn, vec![(waiter, now)])),
                        }
                    }
                }
                Event::Admit(gfn) => {
                    let wanted = model.get(&gfn) == Some(&Page::Owed);
                    prop_assert_eq!(demand.admit(gfn) == Admit::Install, wanted);
                    late += u64::from(!wanted);
                    if wanted {
                        model.insert(gfn, Page::Installing);
                    }
                }
                Event::Installed(gfn) => {
                    let waited = demand.installed(gfn, now);
                    let mut expected = None;
                    if model.get(&gfn) == Some(&Page::Installing) {
                        model.insert(gfn, Page::Here);
                        expected = waiting.iter().position(|w| w.0 == gfn).map(|at| waiting.remove(at).1);
                        pushed += u64::from(expected.is_none());
                    }
                    for (waiter, since) in expected.iter().flatten() {
                        *waits.entry(*waiter).or_default() += now - *since;
                    }
                    prop_assert_eq!(
                        waited.map(|w| (w.waiter, w.wait, w.waiters)),
                        expected.map(|threads| (threads[0].0, now - threads[0].1, threads.len()))
                    );
                }
                Event::NotInstalled(gfn) => {
                    let was_installing = model.get(&gfn) == Some(&Page::Installing);
                    if was_installing {
                        model.insert(gfn, Page::Owed);
                    }
                    let ask_again = was_installing && waiting.iter().any(|w| w.0 == gfn);
                    prop_assert_eq!(demand.not_installed(gfn), ask_again);
                }
                Event::Discarded(run) => {
                    let mut freed = Vec::new();
                    for gfn in run.start..run.end() {
                        model.insert(gfn, Page::Gone);
                        if let Some(at) = waiting.iter().position(|w| w.0 == gfn) {
                            waiting.remove(at);
                            freed.push(gfn);
                        }
                    }
                    prop_assert_eq!(demand.discarded(run), freed);
                }
            }
            let missing: BTreeSet<u64> = model
                .iter()
                .filter(|(_, page)| matches!(page, Page::Owed | Page::Installing))
                .map(|(gfn, _)| *gfn)
                .collect();
            let runs: Vec<Run> = demand.missing().runs().collect();
            prop_assert_eq!(numbers(&runs), missing);
            prop_assert_eq!(demand.is_complete(), demand.missing().is_empty());
            let order: Vec<u64> = waiting.iter().map(|w| w.0).collect();
            prop_assert_eq!(demand.outstanding().collect::<Vec<_>>(), order);
        }
        let counts = demand.counts();
        prop_assert_eq!(
            (counts.requested, counts.pushed, counts.late, counts.zeros),
            (requested, pushed, late, zeros)
        );
        prop_assert_eq!(demand.waits().collect::<BTreeMap<_, _>>(), waits);
    }
}

#[derive(Clone, Debug)]
enum Turn {
    Fault(u64),
    Next(u64),
    /// These came along with others.
    Remove(Run),
}

fn turn() -> impl Strategy<Value = Turn> {
    prop_oneof![
        4 => (FIRST..FIRST + PAGES).prop_map(Turn::Fault),
        4 => (0..30_u64).prop_map(Turn::Next),
        1 => run().prop_map(Turn::Remove),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    /// Each owed page is given out once, by a fault or by the background, and no other page ever is.
    #[test]
    fn every_owed_page_is_given_out_once(
        owed in runs(),
        record in prop::collection::vec(run(), 0..10),
        turns in prop::collection::vec(turn(), 0..60),
    ) {
        let mut left = numbers(&owed);
        let mut queue = PushQueue::new(owed.into_iter().collect(), record);
        for turn in turns {
            match turn {
                Turn::Fault(gfn) => prop_assert_eq!(queue.fault(gfn), left.remove(&gfn)),
                Turn::Next(most) => {
                    let last = queue.next(most);
                    let pages: u64 = last.iter().map(|run| run.pages).sum();
                    prop_assert!(pages == most.min(left.len() as u64), "{last:?}");
                    prop_assert!(last.iter().all(|run| run.pages > 0), "{last:?}");
                    // Not even touching: such runs are one.
                    prop_assert!(last.windows(2).all(|w| w[0].end() < w[1].start), "{last:?}");
                    for gfn in numbers(&last) {
                        prop_assert!(left.remove(&gfn), "{gfn} was not in the queue");
                    }
                }
                Turn::Remove(run) => {
                    queue.remove(run);
                    left.retain(|gfn| !numbers(&[run]).contains(gfn));
                }
            }
            prop_assert_eq!(queue.len(), left.len() as u64);
            prop_assert_eq!(queue.is_empty(), left.is_empty());
        }
        let rest = queue.next(u64::MAX);
        prop_assert_eq!(numbers(&rest), left);
        prop_assert!(queue.is_empty());
    }
}

/// What `place` offered of `run`, told of, and returned, with a `put` that places as many as it is told each time.
fn placed(
    demand: &mut Demand,
    run: Run,
    puts: &[Result<u64, &'static str>],
) -> (Vec<Run>, Vec<u64>, Result<u64, &'static str>) {
    let (mut offered, mut taken) = (Vec::new(), Vec::new());
    let mut puts = puts.iter();
    let put = |stretch: Run| {
        offered.push(stretch);
        puts.next().map_or(Ok(stretch.pages), |put| *put)
    };
    let result = demand.place(run, || Duration::from_millis(5), put, |gfn| taken.push(gfn));
    (offered, taken, result)
}

#[test]
fn what_is_owed_of_a_run_is_placed_and_what_is_not_placed_is_owed_as_before() {
    type Case = (&'static [u64], &'static [Result<u64, &'static str>], &'static [(u64, u64)]);
    // Here already, what each try places, what is offered; from page 100 on, ten pages.
    let cases: [(Case, Result<u64, &str>); 8] = [
        ((&[], &[], &[(100, 10)]), Ok(10)),
        ((&[103], &[], &[(100, 3), (104, 6)]), Ok(10)),
        ((&[100, 109], &[], &[(101, 8)]), Ok(10)),
        ((&[], &[Ok(2)], &[(100, 10)]), Ok(2)),
        ((&[], &[Ok(0)], &[(100, 10)]), Ok(0)),
        ((&[103], &[Ok(3), Ok(1)], &[(100, 3), (104, 6)]), Ok(5)),
        ((&[], &[Err("no room")], &[(100, 10)]), Err("no room")),
        ((&[103], &[Ok(3), Err("no room")], &[(100, 3), (104, 6)]), Err("no room")),
    ];
    for ((here, puts, offers), expected) in cases {
        let run = Run::new(100, 10);
        let mut demand = Demand::new([run, Run::new(110, 1)].into_iter().collect());
        for gfn in here {
            assert_eq!(demand.admit(*gfn), Admit::Install);
            demand.installed(*gfn, Duration::ZERO);
        }
        let (offered, taken, result) = placed(&mut demand, run, puts);
        assert_eq!(result, expected, "{here:?}, {puts:?}");
        let offers: Vec<Run> = offers.iter().map(|(at, pages)| Run::new(*at, *pages)).collect();
        assert_eq!(offered, offers, "{here:?}, {puts:?}");
        let tries = (0..).zip(&offers).flat_map(|(i, offer)| {
            let there = puts.get(i).map_or(offer.pages, |put| put.unwrap_or(0));
            offer.start..offer.start + there
        });
        let expected: Vec<u64> = tries.collect();
        assert_eq!(taken, expected, "{here:?}, {puts:?}");
        // Each page of the run that is not here may be placed by the next try, and the one behind it.
        for gfn in 100..111 {
            let owed = !here.contains(&gfn) && !taken.contains(&gfn);
            assert_eq!(demand.missing().contains(gfn), owed, "{gfn}: {here:?}, {puts:?}");
            assert_eq!(demand.admit(gfn) == Admit::Install, owed, "{gfn}: {here:?}, {puts:?}");
        }
    }
}

#[test]
fn whoever_waits_for_a_page_of_a_run_has_waited_until_it_is_placed() {
    let mut demand = Demand::new(std::iter::once(Run::new(0, 4)).collect());
    demand.fault(1, Duration::from_millis(1), 7);
    demand.fault(9, Duration::from_millis(1), 8);
    assert_eq!(placed(&mut demand, Run::new(0, 4), &[Ok(1)]).2, Ok(1));
    assert_eq!(demand.waits().count(), 0, "its page was not placed");
    assert_eq!(placed(&mut demand, Run::new(1, 3), &[]).2, Ok(3));
    assert!(demand.waits().eq([(7, Duration::from_millis(4))]));
    assert_eq!(demand.wait_nanos().len(), 1);
    assert_eq!(demand.counts().faults, 2);
    // A thread that waits for all of a second is not at full speed.
    let mut demand = Demand::new(std::iter::once(Run::new(0, 4)).collect());
    demand.fault(0, Duration::ZERO, 7);
    assert_eq!(demand.admit(0), Admit::Install);
    demand.installed(0, Duration::from_secs(1));
    assert_eq!(demand.waited().full_speed_after(1), Duration::from_secs(1));
    // Of what the guest gives up, the pages that were owed are counted.
    assert_eq!(demand.discarded(Run::new(0, 3)), []);
    assert_eq!(demand.counts().discarded, 2);
    assert_eq!(demand.discarded(Run::new(0, 9)), []);
    assert_eq!(demand.counts().discarded, 3);
}
