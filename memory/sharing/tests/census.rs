//! The census counts what a plain count of all pages would, and proposes what is worth it.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use ferry_pages::{Layout, PageSet, Run};
use ferry_sharing::{
    Between, Census, Content, Fingerprints, MachineNo, RANGE_PAGES, Tenant, Twins, Worth,
    best_tenant, estimate,
};
use proptest::prelude::*;

const FEW: u64 = 12;

fn tenant(name: &str) -> Tenant {
    Tenant(name.into())
}

fn layout(runs: &[(u64, u64)]) -> Layout {
    Layout::new(runs.iter().map(|(start, pages)| Run::new(*start, *pages)).collect()).unwrap()
}

fn set(run: Run) -> PageSet {
    [run].into_iter().collect()
}

fn hold_all(census: &mut Census, machine: MachineNo, run: Run, hash: impl Fn(u64) -> u64) {
    for gfn in run.start..run.end() {
        census.hold(machine, gfn, Content::Hash(hash(gfn)), |_, _| true);
    }
}

/// A worth under which every range with an equal page counts, at once.
const ALL: Worth = Worth {
    advise_from_pages: 1,
    withdraw_below_pages: 1,
    patience: 1,
    most_ranges: usize::MAX,
    change_tenant_percent: 100,
};

#[derive(Clone, Debug)]
enum Step {
    Hold { machine: usize, page: u64, content: u64 },
    Drop { machine: usize, first: u64, pages: u64 },
    Elsewhere { machine: usize, contents: Vec<u64> },
    Replace { machine: usize },
}

fn step() -> impl Strategy<Value = Step> {
    let machine = 0..3usize;
    // Few contents, so that most pages have equals; few places, so that pages are held again.
    let page = (0..2u64, 0..FEW).prop_map(|(range, at)| range * RANGE_PAGES + at);
    prop_oneof![
        12 => (machine.clone(), page.clone(), 0..8u64)
            .prop_map(|(machine, page, content)| Step::Hold { machine, page, content }),
        4 => (machine.clone(), page, 1..4u64)
            .prop_map(|(machine, first, pages)| Step::Drop { machine, first, pages }),
        1 => (machine.clone(), prop::collection::vec(1..8u64, 0..3))
            .prop_map(|(machine, contents)| Step::Elsewhere { machine, contents }),
        1 => machine.prop_map(|machine| Step::Replace { machine }),
    ]
}

/// Contents 6 and 7 differ, but have one hash.
fn hash(content: u64) -> u64 {
    let same_hash = content.min(6);
    // Spread as a hash is, and never in a sample by the upper bits.
    same_hash.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1 << 63
}

/// What a machine's pages hold, in all that the census knows.
#[derive(Default)]
struct Model {
    pages: [BTreeMap<u64, u64>; 3],
    elsewhere: [BTreeSet<u64>; 3],
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn the_census_counts_what_a_plain_count_would(
        together in any::<bool>(),
        steps in prop::collection::vec(step(), 1..120),
    ) {
        let between = if together { Between::AllTenants } else { Between::OneTenant };
        // Machines 0 and 1 are one tenant's; all have a hole and a range that is not whole.
        let tenants = ["a", "a", "b"].map(tenant);
        let shape = layout(&[(0, RANGE_PAGES), (RANGE_PAGES, 100)]);
        let mut census = Census::new(between);
        let mut machines =
            tenants.clone().map(|tenant| census.add(&shape, tenant).unwrap());
        let mut model = Model::default();
        for step in steps {
            match step {
                Step::Hold { machine, page, content } => {
                    if content == 0 {
                        census.hold(machines[machine], page, Content::Zero, |_, _| unreachable!());
                    } else {
                        // A page is compared with one that is held now, not with itself as it was.
                        model.pages[machine].remove(&page);
                        let content_at = |no, gfn: u64| {
                            let at = machines.iter().position(|m| *m == no).unwrap();
                            model.pages[at][&gfn]
                        };
                        census.hold(machines[machine], page, Content::Hash(hash(content)), |no, gfn| {
                            content_at(no, gfn) == content
                        });
                    }
                    model.pages[machine].insert(page, content);
                }
                Step::Drop { machine, first, pages } => {
                    census.drop_pages(machines[machine], &set(Run::new(first, pages)));
                    model.pages[machine].retain(|at, _| *at < first || *at >= first + pages);
                }
                Step::Elsewhere { machine, contents } => {
                    let hashes: Vec<u64> = contents.iter().rev().map(|c| hash(*c)).collect();
                    model.elsewhere[machine] = hashes.iter().copied().collect();
                    census.set_elsewhere(machines[machine], Twins::from((0, hashes)));
                }
                Step::Replace { machine } => {
                    census.remove(machines[machine]);
                    machines[machine] = census.add(&shape, tenants[machine].clone()).unwrap();
                    model.pages[machine].clear();
                    model.elsewhere[machine].clear();
                }
            }
        }
        check(&mut census, &machines, &tenants, &model, together)?;
    }
}

/// Compares counts, pages of zeros and, where no two contents share a hash, what is proposed.
fn check(
    census: &mut Census,
    machines: &[MachineNo; 3],
    tenants: &[Tenant; 3],
    model: &Model,
    together: bool,
) -> Result<(), TestCaseError> {
    let color = |machine: usize| if together { &tenants[0] } else { &tenants[machine] };
    let all = || {
        (0..3).flat_map(|m| model.pages[m].iter().map(move |(page, content)| (m, *page, *content)))
    };
    let mut groups: HashMap<(&Tenant, u64), Vec<(usize, u64)>> = HashMap::new();
    for (m, page, content) in all().filter(|(_, _, content)| *content != 0) {
        groups.entry((color(m), content)).or_default().push((m, page));
    }
    let counts = census.counts();
    prop_assert_eq!(counts.held, all().count() as u64);
    prop_assert_eq!(counts.zero, all().filter(|(_, _, content)| *content == 0).count() as u64);
    for (m, machine) in machines.iter().enumerate() {
        let zeros = model.pages[m].iter().filter(|(_, content)| **content == 0);
        let zeros: PageSet = zeros.map(|(page, _)| Run::new(*page, 1)).collect();
        prop_assert_eq!(census.zeros(*machine), zeros);
    }
    let equal = groups.values().map(|pages| pages.len() as u64 - 1).sum::<u64>();
    if all().any(|(_, _, content)| content >= 6) {
        // Of two contents with one hash, the later one is set aside, or both are equal to nothing else.
        prop_assert!(counts.equal <= equal, "{counts:?}, {equal}");
        return Ok(());
    }
    prop_assert_eq!((counts.equal, counts.odd), (equal, 0));
    let mut twins: BTreeMap<(usize, u64), u64> = BTreeMap::new();
    for (m, page, content) in all() {
        let here = content == 0 || groups[&(color(m), content)].len() > 1;
        if here || model.elsewhere[m].contains(&hash(content)) {
            *twins.entry((m, page / RANGE_PAGES)).or_default() += 1;
        }
    }
    let gain = |tenant: &Tenant| {
        twins.iter().filter(|((m, _), _)| tenants[*m] == *tenant).map(|(_, n)| n).sum::<u64>()
    };
    let chosen = if gain(&tenants[0]) >= gain(&tenants[2]) { &tenants[0] } else { &tenants[2] };
    twins.retain(|(m, _), _| together || tenants[*m] == *chosen);
    let proposal = census.propose(&ALL);
    prop_assert_eq!(proposal.ranges, twins.len());
    prop_assert_eq!(proposal.equal_pages, twins.values().sum::<u64>());
    for ((m, range), _) in twins {
        let pages = if range == 0 { RANGE_PAGES } else { 100 };
        let run = Run::new(range * RANGE_PAGES, pages);
        prop_assert_eq!(proposal.pages[&machines[m]].count_in(run), pages);
    }
    Ok(())
}

#[test]
fn pages_with_one_hash_that_differ_are_never_counted_as_equal() {
    let mut census = Census::new(Between::OneTenant);
    let machine = census.add(&layout(&[(0, 512)]), Tenant::default()).unwrap();
    for gfn in 0..3 {
        census.hold(machine, gfn, Content::Hash(7), |_, _| false);
    }
    let counts = census.counts();
    assert_eq!((counts.held, counts.equal, counts.odd), (3, 0, 2));
    assert_eq!(census.propose(&ALL).ranges, 0);
}

#[test]
fn a_page_that_the_machine_does_not_have_is_not_held() {
    let mut census = Census::new(Between::OneTenant);
    let machine = census.add(&layout(&[(0, 16), (1024, 16)]), Tenant::default()).unwrap();
    for gfn in [16, 512, 1023, 1040, u64::MAX] {
        census.hold(machine, gfn, Content::Zero, |_, _| true);
    }
    assert_eq!(census.counts().held, 0);
    census.hold(machine, 1039, Content::Zero, |_, _| true);
    assert_eq!(census.counts().held, 1);
    census.remove(machine);
    census.hold(machine, 0, Content::Zero, |_, _| true);
    assert_eq!(census.counts().held, 0);
}

#[test]
fn ranges_are_advised_from_enough_equal_pages_on_and_kept_until_few_are_left_for_long() {
    let worth = Worth::default();
    let mut census = Census::new(Between::OneTenant);
    let machine = census.add(&layout(&[(0, 2 * RANGE_PAGES)]), Tenant::default()).unwrap();
    // Equal pages in the first range; how many are held then; what is proposed, how often in a row.
    let (from, below) = (worth.advise_from_pages, worth.withdraw_below_pages);
    let patience = u32::from(worth.patience);
    for (equal, proposals, advised) in [
        (from - 1, 3, 0),
        (from, 1, 1),
        (from - 1, 2 * patience, 1),
        (below, 2 * patience, 1),
        (below - 1, patience - 1, 1),
        (below, 1, 1),
        (below - 1, patience - 1, 1),
        (below - 1, 1, 0),
        (from - 1, 1, 0),
    ] {
        census.drop_pages(machine, &set(Run::new(0, RANGE_PAGES)));
        hold_all(&mut census, machine, Run::new(0, equal), |_| 1);
        for turn in 0..proposals {
            let proposal = census.propose(&worth);
            assert_eq!(proposal.ranges, advised, "{equal} equal pages, proposal {turn}");
            assert_eq!(proposal.pages.get(&machine).map_or(0, PageSet::len), advised as u64 * 512);
        }
    }
}

#[test]
fn of_too_many_ranges_the_best_are_advised_and_stay_so() {
    let worth = Worth { most_ranges: 2, ..Worth::default() };
    let mut census = Census::new(Between::OneTenant);
    let machine = census.add(&layout(&[(0, 4 * RANGE_PAGES)]), Tenant::default()).unwrap();
    for (range, equal) in [(0, 100), (1, 300), (2, 200)] {
        hold_all(&mut census, machine, Run::new(range * RANGE_PAGES, equal), |_| 1);
    }
    let best: PageSet = set(Run::new(RANGE_PAGES, 2 * RANGE_PAGES));
    assert_eq!(census.propose(&worth).pages[&machine], best);
    hold_all(&mut census, machine, Run::new(3 * RANGE_PAGES, 512), |_| 1);
    assert_eq!(census.propose(&worth).pages[&machine], best);
}

#[test]
fn pages_of_other_tenants_are_neither_equal_nor_advised_at_the_same_time() {
    for (between, equal, machines_advised) in
        [(Between::OneTenant, 100 + 200, 1), (Between::AllTenants, 100 + 200 + 1, 2)]
    {
        let mut census = Census::new(between);
        let one = census.add(&layout(&[(0, 512)]), tenant("one")).unwrap();
        let two = census.add(&layout(&[(0, 512)]), tenant("two")).unwrap();
        hold_all(&mut census, one, Run::new(0, 101), |_| 1);
        hold_all(&mut census, two, Run::new(0, 201), |_| 1);
        assert_eq!(census.counts().equal, equal, "{between:?}");
        let proposal = census.propose(&Worth::default());
        assert_eq!(proposal.pages.len(), machines_advised, "{between:?}");
        assert!(proposal.pages.contains_key(&two));
    }
}

#[test]
fn another_tenant_takes_the_place_only_if_it_gains_much_more() {
    let mut census = Census::new(Between::OneTenant);
    let one = census.add(&layout(&[(0, 512)]), tenant("one")).unwrap();
    let two = census.add(&layout(&[(0, 512)]), tenant("two")).unwrap();
    hold_all(&mut census, one, Run::new(0, 100), |_| 1);
    for (pages, advised) in [(90, "one"), (200, "one"), (201, "two"), (110, "two")] {
        census.drop_pages(two, &set(Run::new(0, 512)));
        hold_all(&mut census, two, Run::new(0, pages), |_| 2);
        let proposal = census.propose(&Worth::default());
        assert_eq!(proposal.tenant, Some(tenant(advised)), "{pages} pages");
        assert_eq!(proposal.pages.len(), 1);
    }
    let chosen = census.propose_for(&Worth::default(), Some(&tenant("one")));
    assert_eq!(chosen.pages.keys().collect::<Vec<_>>(), [&one]);
}

/// A machine of 8192 pages whose contents are numbers from `first` on.
fn numbered(first: u64) -> (Census, MachineNo) {
    let mut census = Census::new(Between::OneTenant);
    let machine = census.add(&layout(&[(0, 8192)]), Tenant::default()).unwrap();
    hold_all(&mut census, machine, Run::new(0, 8192), |gfn| {
        ferry_sharing::page_hash(&(first + gfn).to_le_bytes())
    });
    (census, machine)
}

#[test]
fn a_sample_of_hashes_finds_how_many_pages_are_equal_across_processes_and_where() {
    // Half of each machine's pages are in the other one, too.
    let (mut one, a) = numbered(0);
    let (two, b) = numbered(4096);
    for (bits, near) in [(0, 0), (ferry_sharing::SAMPLE_BITS, 1024)] {
        let prints = [Fingerprints::of(&one, a, bits), Fingerprints::of(&two, b, bits)];
        let found = estimate(&prints, Between::OneTenant)[&Tenant::default()];
        assert!(found.abs_diff(4096) <= near, "{bits} bits: {found}");
        one.set_elsewhere(a, Twins::of(&prints, 0, Between::OneTenant));
        let proposal = one.propose(&Worth { patience: 1, ..Worth::default() });
        // The upper half: 8 ranges.
        assert_eq!(proposal.pages[&a], set(Run::new(4096, 4096)), "{bits} bits");
        assert!(proposal.equal_pages.abs_diff(4096) <= near, "{bits} bits: {proposal:?}");
    }
}

#[test]
fn samples_of_different_size_are_compared_by_the_smaller_one() {
    let (one, a) = numbered(0);
    let (two, b) = numbered(0);
    let all = [Fingerprints::of(&one, a, 0), Fingerprints::of(&two, b, 4)];
    assert_eq!(Twins::of(&all, 0, Between::OneTenant), Twins::of(&all, 1, Between::OneTenant));
    let more = [all[0].clone(), all[1].clone(), Fingerprints::of(&two, b, 0)];
    assert_eq!(Twins::of(&more, 0, Between::OneTenant), Twins::of(&all, 0, Between::OneTenant));
    let found = estimate(&all, Between::OneTenant)[&Tenant::default()];
    assert!(found.abs_diff(8192) < 2048, "{found}");
}

#[test]
fn hashes_of_other_tenants_are_no_twins_unless_that_is_allowed() {
    let prints = |name: &str| Fingerprints {
        tenant: tenant(name),
        sample_bits: 0,
        hashes: vec![(1, 1), (2, 3)],
    };
    let all = [prints("one"), prints("two"), prints("two")];
    assert!(Twins::of(&all, 0, Between::OneTenant).is_empty());
    assert_eq!(Twins::of(&all, 0, Between::AllTenants).len(), 2);
    assert_eq!(Twins::of(&all, 1, Between::OneTenant).len(), 2);
    assert!(Twins::of(&all, 9, Between::AllTenants).is_empty());
    let apart = estimate(&all, Between::OneTenant);
    assert_eq!((apart[&tenant("one")], apart[&tenant("two")]), (2, 6));
    assert_eq!(best_tenant(&apart, None, 100), Some(tenant("two")));
    assert_eq!(estimate(&all, Between::AllTenants)[&Tenant::default()], 10);
}

#[test]
fn what_another_process_says_is_taken_as_it_may_come() {
    let mut census = Census::new(Between::OneTenant);
    let machine = census.add(&layout(&[(0, 512)]), Tenant::default()).unwrap();
    hold_all(&mut census, machine, Run::new(0, 512), |gfn| gfn);
    // Not in order, twice the same, a sample thinner than there is.
    census.set_elsewhere(machine, Twins::from((255, vec![9, 3, 9, u64::MAX])));
    assert_eq!(census.propose(&ALL).equal_pages, 512);
    let wild = Fingerprints {
        sample_bits: 255,
        hashes: vec![(9, u32::MAX), (1, 0)],
        ..Default::default()
    };
    assert!(estimate(&[wild.clone(), wild], Between::OneTenant)[&Tenant::default()] > 0);
}

#[test]
fn the_census_needs_less_than_a_hundredth_of_the_memory_that_it_counts() {
    let pages = 1 << 18;
    let mut census = Census::new(Between::OneTenant);
    let machine = census.add(&layout(&[(0, pages)]), Tenant::default()).unwrap();
    census.reserve(pages);
    hold_all(&mut census, machine, Run::new(0, pages), |gfn| {
        ferry_sharing::page_hash(&gfn.to_le_bytes())
    });
    let per_page = census.bytes() as f64 / pages as f64;
    assert!(per_page < 28.0, "{per_page} bytes for each page of 4096");
}
