//! The rules of [`DirtySource`], for any machine.

use std::time::{Duration, Instant};

use ferry_dirtylog::{DirtySource, Region};
use ferry_memory::{GuestView, HUGE_PAGES, Mapping};
use ferry_pages::{PAGE_BYTES, PageSet, Run};

use crate::huge_pages::HugePages;

/// Memory of the machine: two stretches with a hole between them; the second begins and ends at no
/// multiple of 64.
pub(crate) const EXTENTS: [Run; 2] = [Run::new(1024, 1024), Run::new(3000, 3000)];

/// What a machine's memory is made of.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Private,
    Shared,
    Huge,
}

impl Kind {
    /// A mapping for each extent; that of huge pages may go on behind it.
    pub(crate) fn map(self) -> Option<(Vec<Mapping>, Option<HugePages>)> {
        let whole = |pages: u64| pages.next_multiple_of(HUGE_PAGES);
        let host = if self == Self::Huge {
            let pages: u64 = EXTENTS.iter().map(|e| whole(e.pages)).sum();
            Some(HugePages::reserve(pages * PAGE_BYTES as u64)?)
        } else {
            None
        };
        let map = |pages| match self {
            Self::Private => Mapping::anonymous(pages),
            Self::Shared => Mapping::memfd("conformance", pages),
            Self::Huge => Mapping::huge(whole(pages)),
        };
        Some((EXTENTS.iter().map(|e| map(e.pages).unwrap()).collect(), host))
    }
}

/// A machine whose memory is watched. It writes nothing unless told.
pub(crate) trait Machine {
    /// Where its memory lies.
    fn regions(&self) -> Vec<Region>;
    /// Its memory.
    fn view(&self) -> &GuestView;
    /// The tracker under test.
    fn source(&mut self) -> Box<dyn DirtySource>;
    /// Writes each page of `runs`, by turns from each of its processors; returns when that is done.
    fn write(&mut self, runs: &[Run]);
    /// Has all processors write each page of `runs` once, in the same order, and calls `observe` until
    /// they are done; returns when all have stopped.
    fn write_during(&mut self, runs: &[Run], observe: &mut dyn FnMut());
}

pub(crate) fn collect(source: &mut dyn DirtySource) -> PageSet {
    let mut pages = PageSet::new();
    source.collect(&mut pages).unwrap();
    pages
}

pub(crate) fn all() -> PageSet {
    EXTENTS.into_iter().collect()
}

/// Pages that the host has spent memory on.
pub(crate) fn populated(machine: &impl Machine) -> PageSet {
    ferry_memory::resident(&machine.regions()).unwrap()
}

/// Starts, and takes what a backend reports that cannot begin from clean.
fn started(machine: &mut impl Machine) -> Box<dyn DirtySource> {
    let mut source = machine.source();
    source.start().unwrap();
    settle(source.as_mut());
    source
}

fn settle(source: &mut dyn DirtySource) {
    collect(source);
    source.rearm(&all()).unwrap();
    let rest = collect(source);
    assert!(rest.is_empty(), "nobody writes, and yet: {rest:?}");
}

/// Nothing is logged, and the guest pays for nothing. (Marks of devices are kept at any time.)
fn assert_not_tracking(machine: &mut impl Machine, source: &mut dyn DirtySource) {
    machine.write(&[Run::new(EXTENTS[1].start, 20)]);
    let mut seen = PageSet::new();
    let logs = match source.collect(&mut seen) {
        Ok(()) => !seen.is_empty(),
        // A ring that is filled for nobody; any other refusal says that there is no log.
        Err(error) => error.source.kind() == std::io::ErrorKind::InvalidData,
    };
    assert!(!logs || source.name() == "software", "still logged: {seen:?}");
}

/// Scattered pages: word and window borders, neighbours, ends of regions.
fn sparse() -> Vec<Run> {
    let [low, high] = EXTENTS;
    let mut runs =
        vec![Run::new(low.start, 1), Run::new(low.start + 63, 3), Run::new(low.end() - 1, 1)];
    runs.extend((low.start + 100..low.end() - 10).step_by(97).map(|gfn| Run::new(gfn, 1)));
    runs.extend([
        Run::new(high.start, 2),
        Run::new(high.start + 64, 64),
        Run::new(high.end() - 1, 1),
    ]);
    runs.extend((high.start + 200..high.end() - 50).step_by(331).map(|gfn| Run::new(gfn, 33)));
    runs
}

pub(crate) fn every_page_written_is_reported_and_no_other(machine: &mut impl Machine) {
    machine.write(&[Run::new(EXTENTS[0].start, 300), Run::new(EXTENTS[1].start, 300)]);
    let mut source = started(machine);
    // Pages that were there before, and pages that come into being.
    machine.write(&sparse());
    assert_eq!(collect(source.as_mut()), sparse().into_iter().collect());
}

pub(crate) fn earlier_writes_are_not_reported(machine: &mut impl Machine) {
    let mut source = machine.source();
    machine.write(&sparse());
    source.start().unwrap();
    let reported = collect(source.as_mut());
    // KVM's bitmap may begin with every populated page.
    assert!(reported.is_empty() || source.name() == "kvm-bitmap", "{reported:?}");
}

pub(crate) fn a_page_is_reported_again_only_when_written_again(machine: &mut impl Machine) {
    let mut source = started(machine);
    for round in 0..4 {
        let runs: Vec<Run> = sparse().into_iter().skip(round).step_by(2).collect();
        machine.write(&runs);
        let reported = collect(source.as_mut());
        assert_eq!(reported, runs.into_iter().collect(), "round {round}");
        source.rearm(&reported).unwrap();
        assert!(collect(source.as_mut()).is_empty(), "round {round}");
    }
}

pub(crate) fn dense_writes_are_reported_to_the_last_page(machine: &mut impl Machine) {
    let mut source = started(machine);
    for _ in 0..2 {
        machine.write(&EXTENTS);
        assert_eq!(collect(source.as_mut()), all());
        source.rearm(&all()).unwrap();
    }
}

/// What a migration does: collect, re-arm, copy, while pages change. A write that is not reported leaves an
/// old page in the copy.
///
/// In one pass each processor writes each page once, all at about the same place: a write comes soon after
/// another that is just being collected, re-armed or copied, and no later write hides that it was lost.
pub(crate) fn no_write_of_a_running_machine_is_lost(machine: &mut impl Machine) {
    nothing_is_lost(machine, &mut || {});
}

/// The same with something between the harvests.
pub(crate) fn nothing_is_lost(machine: &mut impl Machine, between: &mut dyn FnMut()) {
    machine.write(&sparse());
    let mut copy = Copy { view: machine.view().clone(), bytes: vec![0; total_bytes()] };
    let mut source = machine.source();
    source.start().unwrap();
    // First all that holds data, listed after the start.
    copy.update(source.as_mut(), &populated(machine));
    let begin = Instant::now();
    let (mut passes, mut rounds) = (0, 0);
    while passes < 3 || begin.elapsed() < Duration::from_millis(600) {
        machine.write_during(&EXTENTS, &mut || {
            let reported = collect(source.as_mut());
            copy.update(source.as_mut(), &reported);
            between();
            rounds += 1;
        });
        // The machine is paused: one harvest more, and the copy is the machine.
        let last = collect(source.as_mut());
        copy.update(source.as_mut(), &last);
        let stale = copy.differing();
        assert!(stale.is_empty(), "pass {passes}: lost writes to {stale:?}");
        passes += 1;
    }
    println!("{}: {passes} passes, {rounds} rounds", source.name());
}

/// The order that the debt rule asks for, a step at a time: a write between harvest and re-arm needs no
/// report (the copy is later), one after the re-arm does.
pub(crate) fn a_write_after_rearm_is_reported_again(machine: &mut impl Machine) {
    let mut source = started(machine);
    let runs = sparse();
    machine.write(&runs);
    let reported = collect(source.as_mut());
    machine.write(&runs);
    // Half now, half later: only what was asked for is re-armed.
    let early: PageSet = runs.iter().copied().step_by(2).collect();
    let mut late = reported;
    late.subtract(&early);
    source.rearm(&early).unwrap();
    machine.write(&[runs[0], runs[2]]);
    source.rearm(&late).unwrap();
    let again = collect(source.as_mut());
    for run in [runs[0], runs[2]] {
        assert_eq!(again.count_in(run), run.pages, "{run:?} of {again:?}");
    }
    source.rearm(&again).unwrap();
    machine.write(&[runs[1]]);
    let again = collect(source.as_mut());
    assert_eq!(again.count_in(runs[1]), runs[1].pages);
}

/// Where the host holds memory in huge pages, they are written and reported as a whole.
pub(crate) fn huge_pages_written_are_reported_as_a_whole_and_no_other(machine: &mut impl Machine) {
    let regions = machine.regions();
    let whole = |runs: &[Run]| -> PageSet {
        let gfns = runs.iter().flat_map(|r| r.start..r.end());
        let unit = |gfn| {
            let region = regions.iter().find(|r| r.overlap(Run::new(gfn, 1)).is_some()).unwrap();
            region.unit_of(gfn)
        };
        gfns.map(unit).collect()
    };
    let [low, high] = EXTENTS;
    let early = [Run::new(low.start, 1), Run::new(high.start + 600, 2)];
    machine.write(&early);
    assert_eq!(populated(machine), whole(&early));
    let mut source = started(machine);
    assert_eq!(populated(machine), whole(&early), "tracking populates");
    for runs in [
        // There before, and new.
        vec![Run::new(low.start + 7, 1), Run::new(high.end() - 1, 1)],
        vec![Run::new(low.start + 511, 2)],
        vec![Run::new(high.start + 600, 1)],
    ] {
        machine.write(&runs);
        assert_eq!(collect(source.as_mut()), whole(&runs));
        assert!(collect(source.as_mut()).is_empty());
    }
    // A page that is merely read is nobody's debt for ever.
    machine.view().read(high.start + 1100, &mut [0]).unwrap();
    collect(source.as_mut());
    machine.view().read(high.start + 1100, &mut [0]).unwrap();
    assert!(collect(source.as_mut()).is_empty());
}

pub(crate) fn untouched_pages_stay_untouched(machine: &mut impl Machine) {
    machine.write(&sparse());
    let before = populated(machine);
    assert_eq!(before, sparse().into_iter().collect());
    let mut source = machine.source();
    source.start().unwrap();
    let mut reported = collect(source.as_mut());
    source.rearm(&all()).unwrap();
    assert_eq!(populated(machine), before, "tracking populates");
    machine.write(&[Run::new(EXTENTS[0].start + 200, 2)]);
    reported.union_with(&collect(source.as_mut()));
    source.rearm(&reported).unwrap();
    source.stop().unwrap();
    let mut expected = before;
    expected.insert_run(Run::new(EXTENTS[0].start + 200, 2));
    assert_eq!(populated(machine), expected, "tracking populates");
    reported.subtract(&expected);
    assert!(reported.is_empty(), "untouched pages were reported: {reported:?}");
}

pub(crate) fn tracking_starts_again_after_it_stopped(machine: &mut impl Machine) {
    let mut source = started(machine);
    for _ in 0..3 {
        machine.write(&[Run::new(EXTENTS[0].start, 10)]);
        source.stop().unwrap();
        assert_not_tracking(machine, source.as_mut());
        source.start().unwrap();
        settle(source.as_mut());
        machine.write(&[Run::new(EXTENTS[0].start + 500, 30)]);
        let reported = collect(source.as_mut());
        assert_eq!(reported, [Run::new(EXTENTS[0].start + 500, 30)].into_iter().collect());
    }
}

pub(crate) fn tracking_ends_when_the_tracker_is_dropped(machine: &mut impl Machine) {
    drop(started(machine));
    let mut next = machine.source();
    assert_not_tracking(machine, next.as_mut());
    next.start().unwrap();
    settle(next.as_mut());
    machine.write(&[Run::new(EXTENTS[1].start + 9, 1)]);
    let reported = collect(next.as_mut());
    assert_eq!(reported, [Run::new(EXTENTS[1].start + 9, 1)].into_iter().collect());
}

/// A copy of the machine's memory, made as a migration makes it.
struct Copy {
    view: GuestView,
    bytes: Vec<u8>,
}

impl Copy {
    fn update(&mut self, source: &mut dyn DirtySource, pages: &PageSet) {
        let mut rest = pages.clone();
        // Huge pages may go on behind the memory.
        rest.intersect_with(&all());
        while !rest.is_empty() {
            let window = rest.take_first(128);
            source.rearm(&window).unwrap();
            for run in window.runs() {
                let at = offset(run.start);
                let len = usize::try_from(run.pages).unwrap() * PAGE_BYTES;
                self.view.read(run.start, &mut self.bytes[at..at + len]).unwrap();
            }
        }
    }

    fn differing(&self) -> PageSet {
        let mut page = vec![0; PAGE_BYTES];
        let mut differing = PageSet::new();
        for gfn in EXTENTS.iter().flat_map(|e| e.start..e.end()) {
            self.view.read(gfn, &mut page).unwrap();
            if page != self.bytes[offset(gfn)..][..PAGE_BYTES] {
                differing.insert(gfn);
            }
        }
        differing
    }
}

fn offset(gfn: u64) -> usize {
    let [low, high] = EXTENTS;
    let index = if gfn < low.end() { gfn - low.start } else { gfn - high.start + low.pages };
    usize::try_from(index).unwrap() * PAGE_BYTES
}

fn total_bytes() -> usize {
    usize::try_from(all().len()).unwrap() * PAGE_BYTES
}

pub(crate) fn a_look_at_what_is_touched_hides_no_write(machine: &mut impl Machine) {
    machine.write(&EXTENTS);
    let mut source = started(machine);
    machine.write(&sparse());
    // Private memory cannot be looked at.
    let Some(look) = ferry_memory::Touched::begin(machine.view()).unwrap() else { return };
    let touched = Run::new(EXTENTS[0].start + 5, 100);
    machine.write(&[touched]);
    assert_eq!(look.pages().unwrap(), [touched].into_iter().collect());
    let reported = collect(source.as_mut());
    assert_eq!(reported, sparse().into_iter().chain([touched]).collect());
    source.rearm(&reported).unwrap();
    // Nor does it make writes of what nobody wrote, or later.
    assert!(collect(source.as_mut()).is_empty());
    machine.write(&EXTENTS);
    assert_eq!(collect(source.as_mut()), all());
}
