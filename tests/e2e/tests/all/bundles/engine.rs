//! What is in a bundle is the machine as it stood, whichever way its writes are tracked.

use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use ferry_bundle::{Chain, merge};
use ferry_codec::{is_zero, page_digest};
use ferry_memory::GuestView;
use ferry_migrate::{
    Guest, GuestError, Restored, RunPermit, SaveCanceller, SaveError, SaveEvent, SaveOptions,
    SaveReport, restore, save,
};
use ferry_pages::{PAGE_BYTES, PageSet, Run};
use ferry_process_guest::Tracker;
use ferry_refvmm::DirtyLog;
use tempfile::TempDir;

use crate::stage::{
    DRAINED_BY_SAVE, Faults, Kind, Kvm, Maker, Process, SharedMemory, Subject, Watched, Witness,
    goes_on, has_kvm, pass_on,
};

pub(crate) const MIB: u64 = 1 << 20;
/// Two workers that come to any of 16 MiB again and again, as fast as they can.
const BUSY: &str = "pattern=random arena=16M fill=all fill_random=60 random=60";
/// A stop that is allowed to any guest on a busy computer.
const LONG: Duration = Duration::from_secs(60);
pub(crate) const ARENA_PAGES: u64 = 16 * MIB / 4096;

pub(crate) fn process(tracker: Tracker) -> Process {
    Process { tracker, memory_bytes: 128 * MIB, workload: BUSY.into() }
}

pub(crate) fn kvm_machine(dirty_log: DirtyLog) -> Kvm {
    Kvm { dirty_log, memory_bytes: 128 * MIB, workload: BUSY.into() }
}

/// Runs `check` with a guest of each kind that can run here.
pub(crate) fn with_every_kind(check: &impl Check) {
    let with_kvm = has_kvm();
    for kind in Kind::ALL {
        println!("{kind:?}");
        match kind {
            Kind::Process(tracker) => check.check(&process(tracker)),
            Kind::Kvm(dirty_log) if with_kvm => {
                check.check(&kvm_machine(dirty_log));
            }
            Kind::Kvm(_) => {}
        }
    }
}

/// A closure over every type of guest.
pub(crate) trait Check {
    fn check<M: Maker>(&self, maker: &M);
}

pub(crate) fn digest(view: &GuestView) -> u64 {
    let (mut sum, mut page) = (0u64, vec![0; PAGE_BYTES]);
    for gfn in view.resident().unwrap().runs().flat_map(|run| run.start..run.end()) {
        view.read(gfn, &mut page).unwrap();
        if !is_zero(&page) {
            sum = sum.wrapping_add(page_digest(gfn, &page));
        }
    }
    sum
}

/// A guest whose memory is summed up at the last moment of each stop.
struct Stops<G> {
    guest: Watched<G>,
    digest: Arc<Mutex<u64>>,
}

impl<G: Subject> Stops<G> {
    fn new(guest: G) -> Self {
        Self { guest: Watched::running(guest, &Witness::new()), digest: Arc::default() }
    }

    fn at_last_stop(&self) -> u64 {
        *self.digest.lock().unwrap()
    }
}

impl<G: Subject> Guest for Stops<G> {
    pass_on!(spec memory dirty_sources return_dirty pause save load);

    fn resume(&mut self, permit: RunPermit) -> Result<(), (RunPermit, GuestError)> {
        *self.digest.lock().unwrap() = digest(&self.memory());
        self.guest.resume(permit)
    }
}

/// How often what depends on the guest's writing is tried.
const TRIES: usize = 10;

pub(crate) fn saved(
    guest: &mut dyn Guest,
    dir: &Path,
    base: Option<&Path>,
    stop: bool,
) -> Result<SaveReport, SaveError> {
    let base = base.map(|base| Arc::new(Chain::open(base, &[]).unwrap()));
    let options = SaveOptions { base, stop, max_stop: LONG };
    save(guest, dir, &options, &SaveCanceller::default(), &mut |_| {})
}

/// The machine of the bundle at `dir`, not yet started; its memory has this digest.
#[track_caller]
fn restored<M: Maker>(maker: &M, dir: &Path, expected: u64) -> Restored<M::Subject> {
    let bundle = Chain::open(dir, &[]).unwrap();
    let restored = restore(&maker.host(), &bundle, "again", &mut |_| {}).unwrap();
    assert!(!restored.guest.runs(), "it has no permit yet");
    assert_eq!(digest(&restored.guest.memory()), expected, "memory is not what it was");
    assert_ne!(restored.permit.machine(), bundle.manifest().machine.0, "it is a new machine");
    restored
}

/// Starts it, and insists that it finds its memory right.
#[track_caller]
fn run_on<G: Subject>(restored: Restored<G>) -> G {
    let mut guest = restored.guest;
    guest.resume(restored.permit).unwrap();
    goes_on(&guest, ARENA_PAGES);
    guest
}

struct WhileItRuns;

impl Check for WhileItRuns {
    fn check<M: Maker>(&self, maker: &M) {
        let dir = TempDir::new().unwrap();
        let here = dir.path().join("b");
        let mut guest = Stops::new(maker.busy_guest());
        let written = guest.guest.written();
        let report = saved(&mut guest, &here, None, false).unwrap();
        assert!(report.rounds >= 2 && report.pages_read > report.data_pages, "{report:?}");
        assert!(report.runs_on && report.stop_ms < report.total_ms, "{report:?}");
        assert!(guest.guest.runs() && guest.guest.written() > written, "it was not under load");
        assert_eq!(report.memory_digest.0, guest.at_last_stop(), "not the machine as it stood");
        let (owed, returned) = guest.guest.debts.lock().unwrap().settle();
        assert_eq!(returned, owed, "a machine that goes on gets back what was collected");

        let again = restored(maker, &here, report.memory_digest.0);
        let resident = again.guest.memory().resident().unwrap().len();
        assert!(resident <= report.data_pages + 64, "{resident} pages came into being");
        let again = run_on(again);
        goes_on(&guest.guest, ARENA_PAGES);
        drop((guest, again));
    }
}

#[test]
fn a_machine_that_is_saved_while_it_runs_is_saved_as_it_stood_and_goes_on() {
    with_every_kind(&WhileItRuns);
}

struct Chained;

impl Check for Chained {
    fn check<M: Maker>(&self, maker: &M) {
        let dir = TempDir::new().unwrap();
        let at = |name: &str| dir.path().join(name);
        let mut guest = Stops::new(maker.busy_guest());
        // What nobody uses, and gives back later: it must not come back out of the base.
        let gone = Run::new(guest.guest.last_page(), 1);
        guest.memory().write(gone.start, &[7; PAGE_BYTES]).unwrap();
        let full = saved(&mut guest, &at("0"), None, false).unwrap();
        guest.memory().discard(gone).unwrap();
        let mut last = full.clone();
        for n in 1..4 {
            let (base, here) = (at(&format!("{}", n - 1)), at(&format!("{n}")));
            goes_on(&guest.guest, 100);
            last = saved(&mut guest, &here, Some(&base), false).unwrap();
            assert_eq!(last.memory_digest.0, guest.at_last_stop(), "not the machine as it stood");
            assert_eq!(last.zero_pages, u64::from(n == 1), "{last:?}");
        }
        let chain = Chain::open(&at("3"), &[]).unwrap();
        assert_eq!(chain.layers().len(), 4);
        assert_eq!(chain.digest_of(gone.start), 0);
        run_on(restored(maker, &at("3"), last.memory_digest.0));
        // An older one is still what it was.
        run_on(restored(maker, &at("0"), full.memory_digest.0));

        merge(&chain, &at("merged")).unwrap();
        for n in 0..4 {
            std::fs::remove_dir_all(at(&format!("{n}"))).unwrap();
        }
        run_on(restored(maker, &at("merged"), last.memory_digest.0));
    }
}

#[test]
fn a_chain_of_saves_and_what_it_is_merged_to_are_the_machine_as_it_stood() {
    with_every_kind(&Chained);
}

struct ForGood;

impl Check for ForGood {
    fn check<M: Maker>(&self, maker: &M) {
        let dir = TempDir::new().unwrap();
        let here = dir.path().join("b");
        let mut guest = maker.busy_guest();
        // Where no bundle can be, it is not ended.
        std::fs::write(dir.path().join("file"), "").unwrap();
        saved(&mut guest, &dir.path().join("file"), None, true).unwrap_err();
        assert!(guest.runs());
        goes_on(&guest, 100);

        let report = saved(&mut guest, &here, None, true).unwrap();
        assert!(!report.runs_on && !guest.runs());
        assert_eq!(digest(&guest.memory()), report.memory_digest.0);
        guest.pause().expect_err("its permit ended with it");
        let record: u64 =
            Chain::open(&here, &[]).unwrap().record().iter().map(|run| run.pages).sum();
        assert_eq!(record, report.record_pages);
        assert!(record > 0, "a busy guest writes while it is watched");
        run_on(restored(maker, &here, report.memory_digest.0));
    }
}

#[test]
fn a_machine_that_is_saved_for_good_ends_when_it_is_saved_and_not_before() {
    with_every_kind(&ForGood);
}

#[test]
fn what_devices_write_when_they_are_drained_is_saved() {
    let dir = TempDir::new().unwrap();
    let maker = process(Tracker::UffdWriteProtect);
    let faults = Faults { drained_devices_write: true, ..Faults::default() };
    for stop in [false, true] {
        let here = dir.path().join(format!("{stop}"));
        let mut guest = Watched::running(maker.busy_guest(), &Witness::new()).with_faults(faults);
        let report = saved(&mut guest, &here, None, stop).unwrap();
        let again = restored(&maker, &here, report.memory_digest.0);
        let mut page = vec![0; PAGE_BYTES];
        again.guest.memory().read(guest.last_page(), &mut page).unwrap();
        assert!(page == [DRAINED_BY_SAVE; PAGE_BYTES], "stop: {stop}");
    }
}

#[test]
fn a_lost_harvest_is_found() {
    let dir = TempDir::new().unwrap();
    let planted = [
        Faults { drop_one_harvested: true, ..Faults::default() },
        Faults { drained_devices_write: true, skip_harvest_after_save: true, ..Faults::default() },
    ];
    for (n, faults) in planted.into_iter().enumerate() {
        // A guest that had no time on a processor meanwhile wrote nothing that could be lost.
        let found = (0..TRIES).any(|again| {
            let mut guest = Stops::new(process(Tracker::UffdWriteProtect).busy_guest());
            guest.guest =
                Watched::running(process(Tracker::UffdWriteProtect).busy_guest(), &Witness::new())
                    .with_faults(faults);
            let here = dir.path().join(format!("{n} {again}"));
            let report = saved(&mut guest, &here, None, false).unwrap();
            report.memory_digest.0 != guest.at_last_stop()
        });
        assert!(found, "{faults:?} was not found");
    }
}

#[test]
fn a_save_that_is_cancelled_or_fails_leaves_the_machine_running_and_nothing_else() {
    let dir = TempDir::new().unwrap();
    let here = dir.path().join("b");
    let mut guest = process(Tracker::UffdWriteProtect).busy_guest();
    for stop in [false, true] {
        let canceller = SaveCanceller::default();
        let mut cancel = |event| {
            if matches!(event, SaveEvent::Round { .. }) {
                canceller.cancel();
            }
        };
        let options = SaveOptions { stop, ..SaveOptions::default() };
        let cancelled = save(&mut guest, &here, &options, &canceller, &mut cancel);
        assert!(matches!(cancelled, Err(SaveError::Cancelled)), "{cancelled:?}");
        assert!(!here.exists());
        goes_on(&guest, 100);
    }

    // A base of another machine is found before anything is written.
    let mut other = process(Tracker::UffdWriteProtect).busy_guest();
    saved(&mut other, &dir.path().join("other"), None, false).unwrap();
    let wrong = saved(&mut guest, &here, Some(&dir.path().join("other")), false).unwrap_err();
    assert!(wrong.to_string().contains("cannot be the base"), "{wrong}");
    assert!(!here.exists());
    goes_on(&guest, 100);
    saved(&mut guest, &here, None, false).unwrap();
}

#[test]
fn a_guest_that_would_stand_still_for_too_long_is_not_saved_and_runs_on() {
    let dir = TempDir::new().unwrap();
    let here = dir.path().join("b");
    let mut guest = process(Tracker::UffdWriteProtect).busy_guest();
    let options = SaveOptions { max_stop: Duration::ZERO, ..SaveOptions::default() };
    // A guest that had no time on a processor meanwhile left nothing to stand still for.
    let refused = (0..TRIES).find_map(|_| {
        let done = save(&mut guest, &here, &options, &SaveCanceller::default(), &mut |_| {});
        if done.is_ok() {
            std::fs::remove_dir_all(&here).unwrap();
        }
        done.err()
    });
    let refused = refused.expect("a save that is refused");
    assert!(matches!(refused, SaveError::TooBusy { .. }), "{refused}");
    assert!(refused.to_string().contains("--max-stop"), "{refused}");
    assert!(!here.exists());
    goes_on(&guest, 100);
    // Allowed what it needs, it is saved; for good, nobody asks.
    saved(&mut guest, &here, None, false).unwrap();
    let options = SaveOptions { stop: true, ..options };
    save(&mut guest, &here, &options, &SaveCanceller::default(), &mut |_| {}).unwrap();
}

#[test]
fn pages_that_are_only_read_are_in_the_record_of_a_machine_with_shared_memory() {
    let dir = TempDir::new().unwrap();
    let read = Run::new(3000, 200);
    for stop in [false, true] {
        let here = dir.path().join(format!("{stop}"));
        let guest = process(Tracker::UffdWriteProtect).busy_guest();
        let mut guest = SharedMemory::new(guest, read);
        let report = saved(&mut guest, &here, None, stop).unwrap();
        let record: PageSet = Chain::open(&here, &[]).unwrap().record().iter().copied().collect();
        assert_eq!(record.count_in(read), read.pages, "stop: {stop}");
        // The kernel may map some pages around those that are read.
        assert!(report.record_pages < read.pages + 64, "stop: {stop}: {}", report.record_pages);
    }
}
