//! A process guest is paused, saved, carried by hand, and goes on; and it notices what is wrong.

use std::time::{Duration, Instant};

use ferry_guest::status::Counters;
use ferry_migrate::{Guest, Host, MachineSpec, RunPermit, StateReader, StateWriter};
use ferry_pages::{PAGE_BYTES, PageSet, Run};
use ferry_process_guest::{Config, ProcessGuest, ProcessHost, Tracker};

const TRACKERS: [Tracker; 2] = [Tracker::Software, Tracker::UffdWriteProtect];

fn config(workload: &str, tracker: Tracker) -> Config {
    Config {
        name: "p1".into(),
        memory_bytes: 16 << 20,
        huge_pages: false,
        workers: 2,
        workload: workload.into(),
        tracker,
    }
}

fn running(workload: &str, tracker: Tracker) -> ProcessGuest {
    let mut guest = ProcessGuest::new(config(workload, tracker)).unwrap();
    guest.run().unwrap();
    guest
}

fn written(guest: &ProcessGuest) -> u64 {
    guest.counters().iter().map(|c| c.written).sum()
}

fn wait_until(what: &str, mut done: impl FnMut() -> bool) {
    let begin = Instant::now();
    while !done() {
        assert!(begin.elapsed() < Duration::from_secs(20), "waited too long until {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Whether every worker has gone over its part `times` times since it had `before`.
fn went_over(guest: &ProcessGuest, before: &[Counters], times: u64) -> bool {
    let part = guest.arena().pages / 2 + 1;
    guest.counters().iter().zip(before).all(|(c, b)| c.written >= b.written + times * part)
}

fn visits_every_page(guest: &ProcessGuest) {
    wait_until("every page was visited", || went_over(guest, &[Counters::default(); 2], 2));
}

fn goes_on_unharmed(guest: &ProcessGuest) {
    let before = guest.counters();
    wait_until("the guest has gone on", || {
        went_over(guest, &before, 3) || guest.corrupt().is_some()
    });
    assert_eq!(guest.corrupt(), None);
}

fn page(guest: &ProcessGuest, gfn: u64) -> Vec<u8> {
    let mut page = vec![0; PAGE_BYTES];
    guest.memory().read(gfn, &mut page).unwrap();
    page
}

fn carry(from: &ProcessGuest, to: &ProcessGuest, pages: &PageSet) {
    for gfn in pages.runs().flat_map(|run| run.start..run.end()) {
        to.memory().write(gfn, &page(from, gfn)).unwrap();
    }
}

fn save(guest: &mut ProcessGuest) -> StateReader {
    let mut out = StateWriter::new();
    guest.save(&mut out).unwrap();
    StateReader::parse(&out.finish().unwrap()).unwrap()
}

#[test]
fn nothing_is_written_while_paused_and_a_permit_is_needed_to_go_on() {
    let mut guest = running("", Tracker::Software);
    wait_until("it writes", || written(&guest) > 1000);
    let permit = guest.pause().unwrap();
    assert!(guest.pause().is_err(), "there is only one permit");
    let (count, first) = (written(&guest), page(&guest, guest.arena().start));
    std::thread::sleep(Duration::from_millis(30));
    assert_eq!((count, first), (written(&guest), page(&guest, guest.arena().start)));
    guest.resume(permit).unwrap();
    let (_second, why) = guest.resume(RunPermit::for_new_machine(7)).unwrap_err();
    assert!(why.to_string().contains("p1 runs already"), "{why}");
    goes_on_unharmed(&guest);
    guest.stop();
    assert!(guest.pause().unwrap_err().to_string().contains("was stopped"));
}

#[test]
fn a_guest_that_the_operator_paused_arrives_paused() {
    let mut source = running("", Tracker::Software);
    wait_until("it writes", || written(&source) > 1000);
    source.pause_by_operator().unwrap();
    let count = written(&source);
    let permit = source.pause().unwrap();
    let mut destination = ProcessHost::default().prepare(&source.spec()).unwrap();
    carry(&source, &destination, &source.memory().resident().unwrap());
    destination.load(&save(&mut source)).unwrap();
    destination.resume(permit).unwrap();
    assert!(destination.status().paused_by_operator && !destination.status().runs);
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!(written(&destination), count);
    destination.resume_by_operator().unwrap();
    goes_on_unharmed(&destination);
    assert!(source.resume_by_operator().is_err(), "the source has no permit any more");
}

/// What a migration does, by hand: rounds while it runs, the rest while it stands still.
#[test]
fn a_guest_moved_under_load_goes_on_and_every_page_is_right() {
    for tracker in TRACKERS {
        for workload in
            ["", "pattern=random random=100", "pattern=working-set set=1M", "fill=all rate=2000"]
        {
            let mut source = running(workload, tracker);
            wait_until("it writes", || written(&source) > 500);
            let mut destination = ProcessHost::default().prepare(&source.spec()).unwrap();
            let mut trackers = source.dirty_sources().unwrap();
            trackers[0].start().unwrap();
            let mut dirty = source.memory().resident().unwrap();
            for _ in 0..5 {
                carry(&source, &destination, &dirty);
                dirty.clear();
                trackers[0].collect(&mut dirty).unwrap();
            }
            let permit = source.pause().unwrap();
            let state = save(&mut source);
            trackers[0].collect(&mut dirty).unwrap();
            carry(&source, &destination, &dirty);
            destination.load(&state).unwrap();
            let count = written(&source);
            assert_eq!(written(&destination), count);
            for gfn in 0..source.arena().end() {
                assert_eq!(
                    page(&source, gfn),
                    page(&destination, gfn),
                    "{tracker:?} {workload} {gfn:#x}"
                );
            }
            destination.resume(permit).unwrap();
            wait_until("it goes on", || written(&destination) > count + 200);
            assert_eq!(destination.corrupt(), None, "{tracker:?} {workload}");
        }
    }
}

#[test]
fn a_page_that_is_wrong_in_any_way_is_found_within_a_pass() {
    type Wrong = fn(&ProcessGuest, Run);
    let cases: [(&str, &str, Wrong); 6] = [
        ("torn", "", |guest, arena| {
            let mut bytes = page(guest, arena.start + 100);
            bytes[2999] ^= 1;
            guest.memory().write(arena.start + 100, &bytes).unwrap();
        }),
        ("torn", "pattern=read fill=all random=0", |guest, arena| {
            let mut bytes = page(guest, arena.end() - 1);
            bytes[PAGE_BYTES - 1] ^= 0x80;
            guest.memory().write(arena.end() - 1, &bytes).unwrap();
        }),
        ("other-page", "random=100", |guest, arena| {
            let other = page(guest, arena.start + 8);
            guest.memory().write(arena.start + 7, &other).unwrap();
        }),
        ("zero", "pattern=random", |guest, arena| {
            let visited =
                (arena.start..arena.end()).find(|g| page(guest, *g) != [0; PAGE_BYTES]).unwrap();
            guest.memory().write(visited, &[0; PAGE_BYTES]).unwrap();
        }),
        ("garbage", "", |guest, arena| {
            guest.memory().write(arena.start + 3, &[0xa5; PAGE_BYTES]).unwrap();
        }),
        ("newer", "", |guest, _| {
            let mut table = page(guest, 0);
            table[0..4].copy_from_slice(&1u32.to_le_bytes());
            guest.memory().write(0, &table).unwrap();
        }),
    ];
    for (kind, workload, wrong) in cases {
        let mut guest = running(workload, Tracker::Software);
        wait_until("every page was visited", || {
            guest.counters().iter().all(|c| c.checked > 2 * guest.arena().pages)
        });
        let permit = guest.pause().unwrap();
        wrong(&guest, guest.arena());
        guest.resume(permit).unwrap();
        wait_until("it is found", || guest.corrupt().is_some());
        let found = guest.corrupt().unwrap();
        assert_eq!(found.kind, kind, "{found}");
        assert!(!guest.status().runs);
        // The others stopped too.
        let permit = guest.pause().unwrap();
        let count = written(&guest);
        guest.resume(permit).unwrap();
        std::thread::sleep(Duration::from_millis(5));
        assert_eq!(count, written(&guest));
    }
}

#[test]
fn a_page_rolled_back_to_an_older_version_is_found() {
    let mut guest = running("", Tracker::Software);
    visits_every_page(&guest);
    let permit = guest.pause().unwrap();
    let gfn = guest.arena().start + 11;
    let old = page(&guest, gfn);
    guest.resume(permit).unwrap();
    goes_on_unharmed(&guest);
    let permit = guest.pause().unwrap();
    guest.memory().write(gfn, &old).unwrap();
    guest.resume(permit).unwrap();
    wait_until("it is found", || guest.corrupt().is_some());
    let found = guest.corrupt().unwrap();
    assert_eq!((found.kind.as_str(), found.gfn, found.page), ("stale", gfn, 11));
}

#[test]
fn a_harvest_that_is_dropped_is_found_at_the_destination() {
    let mut source = running("", Tracker::Software);
    visits_every_page(&source);
    let mut destination = ProcessHost::default().prepare(&source.spec()).unwrap();
    let mut trackers = source.dirty_sources().unwrap();
    trackers[0].start().unwrap();
    carry(&source, &destination, &source.memory().resident().unwrap());
    wait_until("it dirtied all again", || {
        let mut dirty = PageSet::new();
        trackers[0].collect(&mut dirty).unwrap();
        !dirty.is_empty()
    });
    let permit = source.pause().unwrap();
    // The table alone: the versions are new, the pages are not.
    carry(&source, &destination, &[Run::new(0, source.arena().start)].into_iter().collect());
    destination.load(&save(&mut source)).unwrap();
    destination.resume(permit).unwrap();
    wait_until("it is found", || destination.corrupt().is_some());
    assert_eq!(destination.corrupt().unwrap().kind, "stale");
}

#[test]
fn pages_never_visited_stay_untouched() {
    let mut guest = running("pattern=working-set set=64K", Tracker::Software);
    wait_until("it writes", || written(&guest) > 10_000);
    let _permit = guest.pause().unwrap();
    // 16 pages, and those of the table that speak of them: one for the first part, two for the second.
    let resident = guest.memory().resident().unwrap();
    assert!(resident.len() <= 16 + 3, "{:?}", resident.runs().collect::<Vec<_>>());
}

#[test]
fn a_host_refuses_what_it_cannot_take_and_says_why() {
    let guest = ProcessGuest::new(config("", Tracker::Software)).unwrap();
    let host = ProcessHost { memory_limit_bytes: Some(8 << 20), ..ProcessHost::default() };
    let reasons = host.prepare(&guest.spec()).unwrap_err();
    assert_eq!(reasons[0].what, "memory");
    assert!(reasons[0].why.contains("16 MiB") && reasons[0].why.contains("8 MiB"), "{reasons:?}");
    type Change = fn(&mut MachineSpec);
    let cases: [(&str, Change); 8] = [
        ("vmm", |s| s.vmm = "refvmm".into()),
        ("vmm", |s| s.config = b"{}".to_vec()),
        ("vmm", |s| s.config = vec![b' '; 1 << 20]),
        ("vmm", |s| {
            s.config = String::from_utf8_lossy(&s.config).replace("\"\"", "\"x=1\"").into_bytes()
        }),
        ("vcpus", |s| s.vcpus = 3),
        ("vcpus", |s| s.vcpus = 99),
        ("memory", |s| s.extents = vec![(0, 100)]),
        ("device", |s| s.devices.truncate(1)),
    ];
    for (what, change) in cases {
        let mut spec = guest.spec();
        change(&mut spec);
        let reasons = ProcessHost::default().prepare(&spec).unwrap_err();
        assert_eq!(reasons[0].what, what, "{reasons:?}");
    }
    assert!(ProcessHost::default().prepare(&guest.spec()).is_ok());
}

#[test]
fn state_that_is_not_of_this_machine_is_refused() {
    let mut three =
        ProcessGuest::new(Config { workers: 3, ..config("", Tracker::Software) }).unwrap();
    let mut two = ProcessGuest::new(config("", Tracker::Software)).unwrap();
    let why = three.load(&save(&mut two)).unwrap_err();
    assert!(std::error::Error::source(&why).unwrap().to_string().contains("worker[2]"), "{why}");
    two.run().unwrap();
    assert!(two.save(&mut StateWriter::new()).is_err(), "a machine that runs has no state to save");
}
