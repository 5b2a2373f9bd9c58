//! A page set behaves as the plain set of numbers that it stands for.

use std::collections::BTreeSet;

use ferry_pages::{PageSet, Run};
use proptest::prelude::*;

/// Three chunks of frames, so that every operation meets chunk borders.
const CHUNK: u64 = 32768;
const SPACE: u64 = 3 * CHUNK;

#[derive(Clone, Debug)]
enum Step {
    Insert(Run),
    Remove(Run),
    Union(Vec<Run>),
    Subtract(Vec<Run>),
    Intersect(Vec<Run>),
    Bitmap(u64, Vec<u64>, u64),
    Take(u64),
}

fn run() -> impl Strategy<Value = Run> {
    let start = prop_oneof![0..SPACE, (1..4u64, 0..70u64).prop_map(|(c, d)| c * CHUNK - d)];
    let pages = prop_oneof![Just(1), 0..70u64, 0..2000u64, Just(CHUNK), 0..2 * CHUNK];
    (start, pages).prop_map(|(start, pages)| Run::new(start, pages))
}

fn runs() -> impl Strategy<Value = Vec<Run>> {
    prop::collection::vec(run(), 0..6)
}

fn step() -> impl Strategy<Value = Step> {
    let word = prop_oneof![Just(0), Just(u64::MAX), any::<u64>()];
    prop_oneof![
        3 => run().prop_map(Step::Insert),
        3 => run().prop_map(Step::Remove),
        1 => runs().prop_map(Step::Union),
        1 => runs().prop_map(Step::Subtract),
        1 => runs().prop_map(Step::Intersect),
        2 => (0..SPACE, prop::collection::vec(word, 0..700), 0..50_000u64)
            .prop_map(|(start, words, pages)| Step::Bitmap(start, words, pages)),
        1 => (0..SPACE).prop_map(Step::Take),
    ]
}

fn model_of(runs: &[Run]) -> BTreeSet<u64> {
    runs.iter().flat_map(|r| r.start..r.end()).collect()
}

fn set_of(model: &BTreeSet<u64>) -> PageSet {
    let mut set = PageSet::new();
    for gfn in model {
        assert!(set.insert(*gfn));
    }
    set
}

/// The maximal runs of a plain set.
fn runs_of(model: impl Iterator<Item = u64>) -> Vec<Run> {
    let mut runs: Vec<Run> = Vec::new();
    for gfn in model {
        match runs.last_mut() {
            Some(run) if run.end() == gfn => run.pages += 1,
            _ => runs.push(Run::new(gfn, 1)),
        }
    }
    runs
}

fn apply(step: &Step, set: &mut PageSet, model: &mut BTreeSet<u64>) {
    let before = model.len();
    match step {
        Step::Insert(run) => {
            let changed = set.insert_run(*run);
            model.extend(run.start..run.end());
            assert_eq!(changed, model.len() != before);
        }
        Step::Remove(run) => {
            let changed = set.remove_run(*run);
            model.retain(|gfn| !(run.start..run.end()).contains(gfn));
            assert_eq!(changed, model.len() != before);
        }
        Step::Union(runs) => {
            set.union_with(&runs.iter().copied().collect());
            model.extend(model_of(runs));
        }
        Step::Subtract(runs) => {
            set.subtract(&runs.iter().copied().collect());
            let other = model_of(runs);
            model.retain(|gfn| !other.contains(gfn));
        }
        Step::Intersect(runs) => {
            set.intersect_with(&runs.iter().copied().collect());
            let other = model_of(runs);
            model.retain(|gfn| other.contains(gfn));
        }
        Step::Bitmap(start, words, pages) => {
            set.insert_bitmap(*start, words, *pages);
            let bits = (0..*pages).filter(|i| {
                let word = usize::try_from(i / 64).unwrap();
                words.get(word).is_some_and(|w| w >> (i % 64) & 1 == 1)
            });
            model.extend(bits.map(|i| start + i));
        }
        Step::Take(pages) => {
            let taken = set.take_first(*pages);
            let expected: BTreeSet<u64> =
                model.iter().copied().take(usize::try_from(*pages).unwrap()).collect();
            assert_eq!(taken, set_of(&expected));
            model.retain(|gfn| !expected.contains(gfn));
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, ..ProptestConfig::default() })]

    #[test]
    fn every_operation_does_what_it_does_to_a_plain_set(
        steps in prop::collection::vec(step(), 1..10),
        window in run(),
        probes in prop::collection::vec(0..SPACE, 50),
    ) {
        let (mut set, mut model) = (PageSet::new(), BTreeSet::new());
        for step in &steps {
            apply(step, &mut set, &mut model);
            prop_assert_eq!(set.len(), model.len() as u64);
        }
        prop_assert_eq!(set.is_empty(), model.is_empty());
        prop_assert_eq!(set.first(), model.first().copied());
        prop_assert_eq!(set.last(), model.last().copied());
        prop_assert_eq!(set.runs().collect::<Vec<_>>(), runs_of(model.iter().copied()));
        let inside = || model.iter().copied().filter(|g| (window.start..window.end()).contains(g));
        prop_assert_eq!(set.runs_in(window).collect::<Vec<_>>(), runs_of(inside()));
        prop_assert_eq!(set.count_in(window), inside().count() as u64);
        for gfn in probes {
            prop_assert_eq!(set.contains(gfn), model.contains(&gfn));
        }
        // The same members by another way are the same set.
        prop_assert_eq!(&set, &set_of(&model));
    }
}

#[test]
fn a_run_is_not_cut_where_chunks_meet() {
    let set: PageSet = [Run::new(5, 4 * CHUNK)].into_iter().collect();
    assert_eq!(set.runs().collect::<Vec<_>>(), [Run::new(5, 4 * CHUNK)]);
    assert_eq!(set.len(), 4 * CHUNK);
}

#[test]
fn filling_a_chunk_page_by_page_equals_filling_it_at_once() {
    let (mut by_page, mut at_once) = (PageSet::new(), PageSet::new());
    (CHUNK..2 * CHUNK).for_each(|gfn| assert!(by_page.insert(gfn)));
    at_once.insert_run(Run::new(CHUNK, CHUNK));
    assert_eq!(by_page, at_once);
    assert!(at_once.remove(CHUNK + 7));
    by_page.remove_run(Run::new(CHUNK + 7, 1));
    assert_eq!(by_page, at_once);
    at_once.clear();
    assert_eq!(at_once, PageSet::default());
}

#[test]
fn the_highest_frames_do_not_overflow() {
    let mut set = PageSet::new();
    assert!(set.insert_run(Run::new(u64::MAX - 3, 100)));
    assert_eq!(set.len(), 3);
    assert_eq!(set.last(), Some(u64::MAX - 1));
    assert!(!set.insert(u64::MAX), "no run can end behind this frame");
    set.insert_bitmap(u64::MAX - 2, &[u64::MAX], 64);
    assert_eq!(set.runs().collect::<Vec<_>>(), [Run::new(u64::MAX - 3, 3)]);
    assert!(set.remove_run(Run::new(0, u64::MAX)));
    assert!(set.is_empty());
}

#[test]
fn a_set_of_runs_prints_short() {
    let set: PageSet = (0..100).map(|i| Run::new(i * 2, 1)).collect();
    let text = format!("{set:?}");
    assert!(text.starts_with("PageSet(100 pages: 0x0+1 0x2+1") && text.ends_with("…)"), "{text}");
}

#[test]
fn sets_that_hold_the_same_are_equal_whatever_they_held_before() {
    let whole = Run::new(0, CHUNK);
    let full: PageSet = [whole].into_iter().collect();
    for gfn in [0, 63, 64, CHUNK - 1] {
        let mut set = PageSet::new();
        set.insert(gfn);
        set.remove(gfn);
        assert_eq!(set, PageSet::new(), "{gfn}");

        set.insert_run(whole);
        set.remove(gfn);
        assert_eq!(set.len(), CHUNK - 1);
        assert_ne!(set, full);
        assert!(set.insert(gfn), "the last one that was missing");
        assert_eq!(set, full, "{gfn}");
        assert!(!set.insert(gfn));
    }
    // Page by page, the last one by the short way.
    assert_eq!(set_of(&(0..CHUNK).collect()), full);
}

#[test]
fn the_last_page_is_the_highest_also_of_a_full_chunk() {
    let set: PageSet = [Run::new(CHUNK, CHUNK)].into_iter().collect();
    assert_eq!((set.first(), set.last()), (Some(CHUNK), Some(2 * CHUNK - 1)));
    assert_eq!(PageSet::new().last(), None);
}

#[test]
fn a_page_is_new_once() {
    let mut set = PageSet::new();
    let mut model = BTreeSet::new();
    for gfn in [5, 6, 5, 6, CHUNK + 5, CHUNK + 5] {
        assert_eq!(set.insert(gfn), model.insert(gfn), "{gfn}");
        assert_eq!(set.len(), model.len() as u64);
    }
}

#[test]
fn a_page_goes_to_its_own_chunk_however_far_apart_they_are() {
    // Frame `n` and the chunk that has number `n << 15`.
    for n in [1, 2, 77] {
        let mut set = PageSet::new();
        let far = n * CHUNK * CHUNK;
        for gfn in [far, n, n + 1, far + 1] {
            assert!(set.insert(gfn));
        }
        let runs: Vec<_> = set.runs().collect();
        assert_eq!(runs, [Run::new(n, 2), Run::new(far, 2)]);
    }
}

#[test]
fn a_window_shows_nothing_of_the_page_behind_it() {
    let full: PageSet = [Run::new(0, CHUNK)].into_iter().collect();
    let sparse: PageSet = [10, 64, CHUNK].map(|gfn| Run::new(gfn, 1)).into_iter().collect();
    for (within, expected) in [
        (Run::new(0, 10), vec![]),
        (Run::new(0, 11), vec![Run::new(10, 1)]),
        (Run::new(11, 53), vec![]),
        (Run::new(11, 54), vec![Run::new(64, 1)]),
        (Run::new(65, CHUNK - 65), vec![]),
        (Run::new(5, 0), vec![]),
    ] {
        assert_eq!(sparse.runs_in(within).collect::<Vec<_>>(), expected, "{within:?}");
    }
    assert_eq!(full.runs_in(Run::new(CHUNK, 5)).count(), 0);
    assert_eq!(full.runs_in(Run::new(CHUNK - 1, 5)).collect::<Vec<_>>(), [Run::new(CHUNK - 1, 1)]);
}

#[test]
fn a_bitmap_counts_from_its_first_frame_up_to_the_last_there_is() {
    let chunk = vec![u64::MAX; 512];
    for (start, words, pages, expected) in [
        (0, &[0b101][..], 64, vec![Run::new(0, 1), Run::new(2, 1)]),
        (0, &chunk, CHUNK, vec![Run::new(0, CHUNK)]),
        (64, &chunk, 1 << 40, vec![Run::new(64, CHUNK)]),
        (u64::MAX - 2, &[u64::MAX], 64, vec![Run::new(u64::MAX - 2, 2)]),
        (u64::MAX, &[u64::MAX], 64, vec![]),
    ] {
        let mut set = PageSet::new();
        set.insert_bitmap(start, words, pages);
        assert_eq!(set.runs().collect::<Vec<_>>(), expected, "from {start}");
        assert_eq!(set, expected.into_iter().collect(), "from {start}");
    }
}
