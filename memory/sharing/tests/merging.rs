//! The kernel merges what it is advised, and its thread's settings are what they were.
//!
//! The settings are the host's: these tests run one at a time, in this process and beside others.

use std::fs::{self, File};
use std::path::Path;
use std::process::Command;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use ferry_dirtylog::{DirtySource, UffdWriteProtect};
use ferry_memory::{GuestView, Mapping};
use ferry_pages::{PAGE_BYTES, PageSet, Run};
use ferry_sharing::{Between, Ksm, MergeError, Merger, Options, Sharing, Tenant, Worth};

const PAGES: u64 = 1024;
const PATIENCE: Duration = Duration::from_secs(60);
const SYSFS: &str = "/sys/kernel/mm/ksm";
const SETTINGS: [&str; 6] =
    ["run", "pages_to_scan", "sleep_millisecs", "smart_scan", "use_zero_pages", "advisor_mode"];

static ALONE: Mutex<()> = Mutex::new(());

/// This test has the host's merging for itself.
struct Alone {
    ksm: Ksm,
    locks: tempfile::TempDir,
    before: Vec<Option<String>>,
    _here: MutexGuard<'static, ()>,
    _host: File,
}

fn settings() -> Vec<Option<String>> {
    SETTINGS.iter().map(|name| fs::read_to_string(Path::new(SYSFS).join(name)).ok()).collect()
}

impl Alone {
    /// `None`, and a line that says why, where the kernel's thread cannot be woken.
    fn new() -> Option<Self> {
        let here = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
        let host = File::create(std::env::temp_dir().join("ferry-test-ksm.lock")).unwrap();
        host.lock().unwrap();
        let locks = tempfile::tempdir().unwrap();
        let ksm = Ksm::at(SYSFS, locks.path());
        let before = settings();
        match ksm.burst(Duration::ZERO) {
            Ok(burst) => burst.end().unwrap(),
            Err(e) => {
                println!("SKIP: {e}");
                return None;
            }
        }
        Some(Self { ksm, locks, before, _here: here, _host: host })
    }

    fn check_settings(&self) {
        assert_eq!(settings(), self.before);
    }
}

/// Memory with `content` in each page, by its number.
fn filled(content: impl Fn(u64) -> u64) -> GuestView {
    let view = GuestView::of(vec![(0, Mapping::anonymous(PAGES).unwrap())]).unwrap();
    for gfn in 0..PAGES {
        view.write(gfn, &page(content(gfn))).unwrap();
    }
    view
}

/// A page of which every word is `content`.
fn page(content: u64) -> Vec<u8> {
    content.to_le_bytes().repeat(PAGE_BYTES / 8)
}

fn check(view: &GuestView, content: impl Fn(u64) -> u64) {
    let mut bytes = vec![0; PAGE_BYTES];
    for gfn in 0..PAGES {
        view.read(gfn, &mut bytes).unwrap();
        assert_eq!(bytes, page(content(gfn)), "page {gfn}");
    }
}

fn all() -> PageSet {
    [Run::new(0, PAGES)].into_iter().collect()
}

fn merger(alone: &Alone, view: &GuestView) -> Merger {
    Merger::new(view.clone(), alone.ksm.clone(), Tenant("test".into()), Between::OneTenant)
}

fn never() -> bool {
    false
}

#[test]
fn equal_pages_are_merged_and_a_write_makes_a_page_its_own_again() {
    let Some(alone) = Alone::new() else { return };
    let views = [filled(|gfn| gfn + 1), filled(|gfn| gfn + 1)];
    let mut mergers = views.each_ref().map(|view| merger(&alone, view));
    for merger in &mut mergers {
        merger.advise(&all()).unwrap();
    }
    let merged = mergers[0].merge(PATIENCE, &never).unwrap();
    alone.check_settings();
    assert!(merged.rest.at_rest, "{merged:?}");
    assert_eq!(merged.own.merging_pages, 2 * PAGES, "{merged:?}");
    assert!(merged.own.profit_bytes > 0, "{merged:?}");
    for view in &views {
        check(view, |gfn| gfn + 1);
    }
    for gfn in (0..PAGES).step_by(2) {
        views[0].write(gfn, &page(PAGES + gfn + 1)).unwrap();
    }
    let written = |gfn: u64| if gfn.is_multiple_of(2) { PAGES + gfn + 1 } else { gfn + 1 };
    check(&views[0], written);
    check(&views[1], |gfn| gfn + 1);
    let merged = mergers[0].merge(PATIENCE, &never).unwrap();
    assert!(merged.own.merging_pages <= PAGES + PAGES / 2, "{merged:?}");
    for merger in &mut mergers {
        merger.withdraw().unwrap();
        assert!(merger.advised().is_empty());
    }
    check(&views[0], written);
    check(&views[1], |gfn| gfn + 1);
    alone.check_settings();
}

#[test]
fn pages_of_zeros_become_the_kernels_and_are_no_data_any_more() {
    let Some(alone) = Alone::new() else { return };
    let view = filled(|gfn| if gfn < PAGES / 2 { 0 } else { gfn });
    let mut merger = merger(&alone, &view);
    merger.advise(&all()).unwrap();
    let merged = merger.merge(PATIENCE, &never).unwrap();
    if merged.own.zero_pages == 0 && alone.before[4].is_none() {
        return println!("SKIP: this kernel has no use_zero_pages");
    }
    assert_eq!(merged.own.zero_pages, PAGES / 2, "{merged:?}");
    assert_eq!(view.resident().unwrap().len(), PAGES / 2);
    check(&view, |gfn| if gfn < PAGES / 2 { 0 } else { gfn });
}

#[test]
fn a_write_to_a_merged_page_is_reported_by_write_protection() {
    let Some(alone) = Alone::new() else { return };
    let view = filled(|gfn| 1 + gfn / 2);
    let mut tracker = match UffdWriteProtect::new(view.regions().to_vec()) {
        Ok(tracker) => tracker,
        Err(e) => return println!("SKIP: {e}: {}", e.source),
    };
    tracker.start().unwrap();
    let mut merger = merger(&alone, &view);
    merger.advise(&all()).unwrap();
    // Written, and not collected when it is merged: a pair, so that one of the two stays in its place.
    let pair = [Run::new(10, 2)].into_iter().collect::<PageSet>();
    for gfn in 10..12 {
        view.write(gfn, &page(PAGES * 2)).unwrap();
    }
    let merged = merger.merge(PATIENCE, &never).unwrap();
    assert_eq!(merged.own.merging_pages, PAGES, "{merged:?}");
    let mut written = PageSet::new();
    tracker.collect(&mut written).unwrap();
    let mut missed = pair;
    missed.subtract(&written);
    assert!(missed.is_empty(), "{missed:?} was written before it was merged");
    let mut again = PageSet::new();
    tracker.collect(&mut again).unwrap();
    assert!(again.is_empty(), "merging counts as a write once: {again:?}");
    // Of each pair of pages, now one, the first, the second, or none is written.
    let mut wanted = PageSet::new();
    for gfn in (0..PAGES).filter(|gfn| [0, 3].contains(&(gfn % 6))) {
        view.write(gfn, &page(PAGES * 3 + gfn)).unwrap();
        wanted.insert(gfn);
    }
    tracker.collect(&mut again).unwrap();
    assert_eq!(again, wanted);
}

#[test]
fn settings_are_what_they_were_after_an_error_a_panic_and_a_process_that_was_killed() {
    let Some(alone) = Alone::new() else { return };
    let panicked = std::panic::catch_unwind(|| {
        let _burst = alone.ksm.burst(Duration::ZERO).unwrap();
        assert_ne!(settings(), alone.before);
        panic!("in a burst, on purpose");
    });
    assert!(panicked.is_err());
    alone.check_settings();
    // A process that was killed leaves its note, and nobody locks it.
    let note = alone.locks.path().join("ferry-ksm.lock");
    let burst = alone.ksm.burst(Duration::ZERO).unwrap();
    assert!(matches!(alone.ksm.burst(Duration::ZERO), Err(MergeError::Busy { .. })));
    let text = fs::read_to_string(&note).unwrap();
    burst.end().unwrap();
    assert_eq!(fs::read_to_string(&note).unwrap(), "");
    let killed = || {
        // Older kernels have no advisor.
        let _ = fs::write(Path::new(SYSFS).join("advisor_mode"), "none");
        for (name, value) in [("pages_to_scan", "8192"), ("sleep_millisecs", "0"), ("run", "1")] {
            fs::write(Path::new(SYSFS).join(name), value).unwrap();
        }
        fs::write(&note, &text).unwrap();
    };
    killed();
    assert!(alone.ksm.recover().unwrap());
    alone.check_settings();
    assert!(!alone.ksm.recover().unwrap());
    killed();
    alone.ksm.burst(Duration::ZERO).unwrap().end().unwrap();
    alone.check_settings();
}

#[test]
fn a_setting_that_somebody_else_changed_in_a_burst_stays_as_it_is() {
    let Some(alone) = Alone::new() else { return };
    let file = Path::new(SYSFS).join("sleep_millisecs");
    let burst = alone.ksm.burst(Duration::ZERO).unwrap();
    fs::write(&file, "1234").unwrap();
    burst.end().unwrap();
    assert_eq!(fs::read_to_string(&file).unwrap().trim(), "1234");
    fs::write(&file, alone.before[2].as_ref().unwrap().trim()).unwrap();
    alone.check_settings();
}

#[test]
fn nothing_but_a_setting_is_ever_set_by_a_note() {
    let sysfs = tempfile::tempdir().unwrap();
    let locks = tempfile::tempdir().unwrap();
    for (name, value) in [("run", "1"), ("pages_to_scan", "8192"), ("sleep_millisecs", "0")] {
        fs::write(sysfs.path().join(name), value).unwrap();
    }
    let note = "run ../../1\npages_to_scan 77\nsleep_millisecs 1 2\nshadow 7\n../run 0\n\0";
    fs::write(locks.path().join("ferry-ksm.lock"), note).unwrap();
    assert!(Ksm::at(sysfs.path(), locks.path()).recover().unwrap());
    let setting = |name: &str| fs::read_to_string(sysfs.path().join(name)).unwrap();
    assert_eq!((setting("run"), setting("sleep_millisecs")), ("1".into(), "0".into()));
    assert_eq!(setting("pages_to_scan"), "77");
    assert_eq!(fs::read_dir(sysfs.path()).unwrap().count(), 3);
}

#[test]
fn who_cannot_merge_says_why() {
    let locks = tempfile::tempdir().unwrap();
    let sysfs = tempfile::tempdir().unwrap();
    let ksm = Ksm::at(sysfs.path(), locks.path());
    let why = ksm.burst(Duration::ZERO).unwrap_err();
    assert!(matches!(why, MergeError::NoKsm { .. }), "{why}");
    let set = |name: &str, value: &str| fs::write(sysfs.path().join(name), value).unwrap();
    set("run", "2");
    let why = ksm.burst(Duration::ZERO).unwrap_err();
    assert!(matches!(why, MergeError::TurnedOff { .. }), "{why}");
    set("run", "0");
    let why = ksm.burst(Duration::ZERO).unwrap_err();
    assert!(matches!(why, MergeError::NoKsm { .. }), "{why}");
    assert_eq!(fs::read_to_string(sysfs.path().join("run")).unwrap(), "0");

    let shared = GuestView::of(vec![(0, Mapping::memfd("sharing", PAGES).unwrap())]).unwrap();
    let mut merger = Merger::new(shared, ksm, Tenant::default(), Between::OneTenant);
    let why = merger.advise(&all()).unwrap_err();
    assert!(matches!(why, MergeError::SharedMemory { .. }), "{why}");
    assert!(merger.advised().is_empty());
}

#[test]
fn who_may_not_is_told_so() {
    const AS: &str = "FERRY_TEST_NOBODY";
    if std::env::var_os(AS).is_some() {
        let why = Ksm::default().burst(Duration::ZERO).unwrap_err();
        assert!(matches!(why, MergeError::NoPermission { .. }), "{why}");
        return;
    }
    if !Path::new(SYSFS).exists() {
        return println!("SKIP: this kernel has no KSM");
    }
    // The test itself, by a user who is nobody.
    let this = std::env::current_exe().unwrap();
    let copy = tempfile::tempdir().unwrap();
    fs::set_permissions(copy.path(), std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let program = copy.path().join("merging");
    fs::copy(this, &program).unwrap();
    let mut command = Command::new(&program);
    command.env(AS, "1").args(["--exact", "who_may_not_is_told_so"]).current_dir("/");
    match std::os::unix::process::CommandExt::uid(&mut command, 65534).output() {
        Ok(out) => assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stdout)),
        Err(e) => println!("SKIP: nothing can be run as another user: {e}"),
    }
}

#[test]
fn pages_of_one_tenant_are_advised_on_a_host_at_a_time() {
    if !Path::new(SYSFS).exists() {
        return println!("SKIP: this kernel has no KSM");
    }
    // What is advised would be merged with what another test looks at.
    let _here = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let locks = tempfile::tempdir().unwrap();
    let ksm = Ksm::at(SYSFS, locks.path());
    let merger = |tenant: &str, between| {
        Merger::new(filled(|gfn| gfn), ksm.clone(), Tenant(tenant.into()), between)
    };
    let some = [Run::new(0, 512)].into_iter().collect::<PageSet>();
    let apart = Between::OneTenant;
    let (mut one, mut other) = (merger("one", apart), merger("one", apart));
    let mut two = merger("two", apart);
    one.advise(&some).unwrap();
    other.advise(&some).unwrap();
    let why = two.advise(&some).unwrap_err();
    let MergeError::OtherTenant { theirs, ours } = &why else { panic!("{why}") };
    assert_eq!((theirs.0.as_str(), ours.0.as_str()), ("one", "two"));
    assert!(two.advised().is_empty());
    assert!(merger("one", Between::AllTenants).advise(&some).is_err());
    one.withdraw().unwrap();
    assert!(two.advise(&some).is_err(), "one machine of the first tenant is left");
    drop(other);
    two.advise(&some).unwrap();
    assert!(one.advise(&some).is_err());
    drop(two);
    let mut all = [merger("one", Between::AllTenants), merger("two", Between::AllTenants)];
    for merger in &mut all {
        merger.advise(&some).unwrap();
    }
}

#[test]
fn pages_of_a_tenant_that_does_not_come_first_are_proposed_for_swap() {
    if !Path::new(SYSFS).exists() {
        return println!("SKIP: this kernel has no KSM");
    }
    let _here = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let locks = tempfile::tempdir().unwrap();
    let view = filled(|gfn| gfn / 2);
    let options = Options {
        tenant: Tenant("one".into()),
        ksm: Ksm::at(SYSFS, locks.path()),
        ..Options::default()
    };
    let mut sharing = Sharing::new(view, options).unwrap();
    for (first, ranges) in [(Some("two"), 0), (Some("one"), 2), (Some("two"), 0), (None, 2)] {
        sharing.set_first(first.map(|name| Tenant(name.into())));
        for _ in 0..3 {
            sharing.pass(&PageSet::new()).unwrap();
        }
        let report = sharing.report();
        assert_eq!(report.ranges, ranges, "{first:?}: {report}");
        assert_eq!(report.why_not().is_none(), ranges > 0, "{first:?}: {report}");
        let (zeros, unwritten) = sharing.to_swap();
        let pages = if ranges > 0 { 0 } else { PAGES };
        assert_eq!(zeros.len() + unwritten.len(), pages, "{first:?}");
    }
    let words = sharing.report().to_string();
    assert!(words.contains("advised 2 ranges"), "{words}");
}

/// Merging reads as writing: without patience, whatever was merged would be taken apart at once.
#[test]
fn what_is_advised_stays_for_a_while_when_all_of_it_was_written() {
    if !Path::new(SYSFS).exists() {
        return println!("SKIP: this kernel has no KSM");
    }
    let _here = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let locks = tempfile::tempdir().unwrap();
    let options = Options { ksm: Ksm::at(SYSFS, locks.path()), ..Options::default() };
    let mut sharing = Sharing::new(filled(|gfn| 1 + gfn / 2), options).unwrap();
    for _ in 0..3 {
        sharing.pass(&PageSet::new()).unwrap();
    }
    assert_eq!(sharing.report().ranges, 2);
    for pass in 1..=Worth::default().patience {
        let stays = pass < Worth::default().patience;
        let report = sharing.pass(&all()).unwrap();
        assert_eq!((report.counts.held, report.ranges), (0, 2 * usize::from(stays)), "{pass}");
    }
}

#[test]
fn a_machine_with_equal_pages_is_merged_and_the_report_says_so() {
    let Some(alone) = Alone::new() else { return };
    // Two ranges: one in which every page has an equal in it, one in which none has.
    let content = |gfn: u64| if gfn < 512 { 1 + gfn / 2 } else { gfn + 1 };
    let view = filled(content);
    let options = Options { ksm: alone.ksm.clone(), ..Options::default() };
    let mut sharing = Sharing::new(view.clone(), options).unwrap();
    let none = PageSet::new();
    for _ in 0..3 {
        sharing.pass(&none).unwrap();
    }
    // Another process is at it: no reason to swap what is advised.
    let other = alone.ksm.burst(Duration::ZERO).unwrap();
    let report = sharing.merge(Duration::ZERO, &never);
    assert!(matches!(report.why_not(), Some(MergeError::Busy { .. })), "{report}");
    assert_eq!(sharing.to_swap().1.count_in(Run::new(0, 512)), 0);
    other.end().unwrap();
    let report = sharing.merge(PATIENCE, &never);
    assert_eq!((report.ranges, report.proposed_pages, report.counts.equal), (1, 512, 256));
    assert_eq!(report.read_back.merging_pages, 512, "{report}");
    assert!(report.to_string().contains("merged by the kernel: 512 pages"), "{report}");
    let (zeros, unwritten) = sharing.to_swap();
    assert!(zeros.is_empty());
    assert_eq!(unwritten, [Run::new(512, 512)].into_iter().collect::<PageSet>());
    check(&view, content);
    alone.check_settings();
}

#[test]
fn what_was_merged_stays_advised_though_merging_looks_like_writing() {
    let Some(alone) = Alone::new() else { return };
    // A range of zeros, and one of pairs.
    let view = filled(|gfn| if gfn < 512 { 0 } else { gfn / 2 });
    let mut tracker = match UffdWriteProtect::new(view.regions().to_vec()) {
        Ok(tracker) => tracker,
        Err(e) => return println!("SKIP: {e}: {}", e.source),
    };
    tracker.start().unwrap();
    let mut written = PageSet::new();
    let options = Options { ksm: alone.ksm.clone(), ..Options::default() };
    let mut sharing = Sharing::new(view.clone(), options).unwrap();
    for _ in 0..3 {
        sharing.pass(&written).unwrap();
    }
    assert_eq!(sharing.merge(PATIENCE, &never).ranges, 2);
    let merged = Ksm::own_figures();
    for pass in 0..3 * u32::from(Worth::default().patience) {
        written.clear();
        tracker.collect(&mut written).unwrap();
        let report = sharing.pass(&written).unwrap();
        assert_eq!(report.ranges, 2, "pass {pass}: {report}");
    }
    assert!(written.is_empty());
    let counts = sharing.report().counts;
    assert_eq!((counts.held, counts.zero, counts.equal), (PAGES, 512, 256));
    assert_eq!(Ksm::own_figures(), merged);
    // A page of zeros that is written is a page of data again, and the other way round.
    view.write(3, &page(PAGES)).unwrap();
    view.write(700, &page(0)).unwrap();
    sharing.merge(PATIENCE, &never);
    for _ in 0..3 {
        written.clear();
        tracker.collect(&mut written).unwrap();
        sharing.pass(&written).unwrap();
    }
    let counts = sharing.report().counts;
    assert_eq!((counts.held, counts.zero, counts.equal), (PAGES, 512, 255));
    alone.check_settings();
}

#[test]
fn where_the_kernel_cannot_merge_zero_pages_and_unwritten_pages_are_proposed_for_swap() {
    let mapping = Mapping::memfd("sharing", PAGES).unwrap();
    let view = GuestView::of(vec![(0, mapping)]).unwrap();
    for gfn in 0..PAGES {
        view.write(gfn, &page(gfn / 256)).unwrap();
    }
    let worth = Worth::default();
    let mut sharing = Sharing::new(view, Options { worth, ..Options::default() }).unwrap();
    for _ in 0..3 {
        sharing.pass(&PageSet::new()).unwrap();
    }
    let report = sharing.report();
    assert!(matches!(report.why_not(), Some(MergeError::SharedMemory { .. })), "{report}");
    assert_eq!((report.ranges, report.counts.zero), (0, 256));
    assert!(report.to_string().contains("shared memory or huge pages"), "{report}");
    let (zeros, unwritten) = sharing.to_swap();
    assert_eq!(zeros, [Run::new(0, 256)].into_iter().collect::<PageSet>());
    assert_eq!(unwritten, [Run::new(256, 768)].into_iter().collect::<PageSet>());
}
