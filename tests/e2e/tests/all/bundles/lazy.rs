//! Machines that run before their bundle is read: their memory is right at every moment, and whole at the
//! end; what is damaged is never seen.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use ferry_bundle::{Chain, Draft};
use ferry_e2e::{Hosts, kvm, path, wait_for};
use ferry_migrate::{Fetching, Guest, Host, LazyEvent, Paging, Restored, restore_lazily};
use ferry_pages::{PAGE_BYTES, Run};
use ferry_process_guest::Tracker;
use ferry_refvmm::DirtyLog;
use tempfile::TempDir;

use super::command::{PROCESS, restore};
use super::engine::{
    ARENA_PAGES, Check, MIB, digest, kvm_machine, process, saved, with_every_kind,
};
use crate::stage::{Dice, Huge, HugePages, Maker, Reader, Subject, eventually, goes_on, has_kvm};
use crate::town::{Lender, open_for};

const LONG: Duration = Duration::from_secs(60);

struct Lazily<G> {
    restored: Restored<G>,
    fetching: Fetching,
    events: Receiver<LazyEvent>,
}

impl<G: Guest> Lazily<G> {
    fn new<H: Host<Guest = G>>(host: &H, chain: Chain) -> Self {
        let (sender, events) = channel();
        let tell = move |event| drop(sender.send(event));
        let (restored, fetching) = restore_lazily(host, Arc::new(chain), "again", tell).unwrap();
        Self { restored, fetching, events }
    }

    #[track_caller]
    fn complete(&self) -> Paging {
        match self.events.recv_timeout(LONG).unwrap() {
            LazyEvent::Complete(paging) => paging,
            LazyEvent::Damaged(why) => panic!("{why}"),
        }
    }
}

/// Lets it go.
fn go<G: Guest>(lazily: Lazily<G>) -> (G, Fetching, Receiver<LazyEvent>) {
    let Lazily { restored, fetching, events } = lazily;
    let mut guest = restored.guest;
    guest.resume(restored.permit).unwrap();
    (guest, fetching, events)
}

#[derive(Default)]
struct Whole {
    waited: AtomicU64,
}

impl Check for Whole {
    fn check<M: Maker>(&self, maker: &M) {
        let dir = TempDir::new().unwrap();
        let (base, next) = (dir.path().join("base"), dir.path().join("next"));
        let mut guest = maker.busy_guest();
        saved(&mut guest, &base, None, false).unwrap();
        goes_on(&guest, 100);
        let report = saved(&mut guest, &next, Some(&base), false).unwrap();
        drop(guest);
        let open = || Chain::open(&next, &[]).unwrap();
        assert!(!open().record().is_empty(), "a busy guest writes while it is saved");

        // One that does not run is what was saved, when all is here.
        let still = Lazily::new(&maker.host(), open());
        let paging = still.complete();
        assert!(!still.restored.guest.runs());
        assert_eq!(still.fetching.missing(), 0);
        assert_eq!(digest(&still.restored.guest.memory()), report.memory_digest.0);
        let unit = still.restored.guest.memory().regions()[0].unit;
        // Huge pages are counted whole.
        assert!(unit > 1 || paging.pushed + paging.requested == still.restored.pages);
        let resident = still.restored.guest.memory().resident().unwrap().len();
        drop(still);

        // One that runs checks each page that it comes to.
        let running = Lazily::new(&maker.host(), open());
        let pages = running.restored.pages;
        let (mut guest, _, events) = go(running);
        goes_on(&guest, ARENA_PAGES);
        let Ok(LazyEvent::Complete(paging)) = events.recv_timeout(LONG) else {
            panic!("not all pages came")
        };
        assert!(unit > 1 || paging.pushed + paging.requested == pages);
        self.waited.fetch_add(paging.requested, Ordering::Relaxed);
        goes_on(&guest, ARENA_PAGES);
        let after = guest.memory().resident().unwrap().len();
        assert!(after <= resident + resident / 50 + 8, "{resident} resident pages became {after}");
        // Its memory is like any other's: it can be tracked.
        saved(&mut guest, &dir.path().join("again"), None, true).unwrap();
    }
}

#[test]
fn a_machine_restored_lazily_finds_its_memory_right_at_once_and_whole_in_the_end() {
    let check = Whole::default();
    with_every_kind(&check);
    if let Some(_host) = HugePages::reserve(3 * 128 * MIB) {
        check.check(&Huge(process(Tracker::UffdWriteProtect)));
        if has_kvm() {
            check.check(&Huge(kvm_machine(DirtyLog::Auto)));
        }
    }
    assert!(check.waited.into_inner() > 0, "no guest came upon a page that was not here");
}

#[test]
fn what_is_opened_is_paged_in_though_the_directory_is_saved_over_or_removed() {
    let dir = TempDir::new().unwrap();
    let here = dir.path().join("b");
    let maker = process(Tracker::UffdWriteProtect);
    let mut guest = maker.busy_guest();
    let report = saved(&mut guest, &here, None, false).unwrap();
    let chain = Chain::open(&here, &[]).unwrap();
    goes_on(&guest, ARENA_PAGES);
    let later = saved(&mut guest, &here, None, false).unwrap();
    assert_ne!(later.memory_digest, report.memory_digest);
    std::fs::remove_dir_all(&here).unwrap();
    let again = Lazily::new(&maker.host(), chain);
    again.complete();
    assert_eq!(digest(&again.restored.guest.memory()), report.memory_digest.0);
}

#[test]
fn the_record_comes_before_all_that_nobody_touches() {
    let dir = TempDir::new().unwrap();
    let (plain, recorded) = (dir.path().join("plain"), dir.path().join("recorded"));
    let maker = process(Tracker::UffdWriteProtect);
    saved(&mut maker.busy_guest(), &plain, None, true).unwrap();
    // The same machine, with a record of pages that would come last.
    let chain = Chain::open(&plain, &[]).unwrap();
    let last = chain.data_pages().last().unwrap();
    let mut draft = Draft::begin(&recorded, chain.spec().clone(), None).unwrap();
    let put = |run: Run, bytes: &[u8], _: &[u64]| {
        let pages = (run.start..).zip(bytes.chunks_exact(PAGE_BYTES));
        pages.into_iter().try_for_each(|(gfn, page)| draft.put(gfn, page))
    };
    chain.visit(put).unwrap();
    draft.record([[Run::new(last, 1)].into_iter().collect()].iter());
    draft.commit(chain.manifest().machine.0, &chain.state().unwrap()).unwrap();
    // Whoever looks may be too late, but not each time; without the record, none would be in time.
    let comes_first = |dir: &Path| {
        let lazily = Lazily::new(&maker.host(), Chain::open(dir, &[]).unwrap());
        while lazily.fetching.lacks(last) {
            std::thread::yield_now();
        }
        let missing = lazily.fetching.missing();
        lazily.complete();
        missing > ARENA_PAGES / 4
    };
    assert!((0..20).any(|_| comes_first(&recorded)));
    assert!(!comes_first(&plain));
}

/// Flips a bit of the memory file of the bundle at `dir`.
pub(crate) fn flip(dir: &Path, at: u64) -> PathBuf {
    let mut files = std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path());
    let is_memory = |path: &PathBuf| path.file_name().unwrap().to_str().unwrap().starts_with("mem");
    let path = files.find(is_memory).unwrap();
    let file = File::options().read(true).write(true).open(&path).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[byte[0] ^ 4], at).unwrap();
    path
}

/// A page of the arena, in the middle.
pub(crate) fn victim(chain: &Chain) -> u64 {
    let gfns: Vec<u64> = chain.data_pages().runs().flat_map(|run| run.start..run.end()).collect();
    gfns[gfns.len() / 2]
}

struct Damaged;

impl Check for Damaged {
    fn check<M: Maker>(&self, maker: &M) {
        let dir = TempDir::new().unwrap();
        let here = dir.path().join("b");
        saved(&mut maker.busy_guest(), &here, None, true).unwrap();
        let chain = Chain::open(&here, &[]).unwrap();
        let gfn = victim(&chain);
        let (at, frame) = (chain.place_of(gfn).unwrap().at, chain.frame_of(gfn));
        let lost: u64 = frame.map(|run| run.pages).sum();
        let file = flip(&here, at + 77);

        let (guest, fetching, events) = go(Lazily::new(&maker.host(), chain));
        let told = events.recv_timeout(LONG).unwrap();
        let LazyEvent::Damaged(why) = told else { panic!("{told:?}") };
        for words in [file.to_str().unwrap(), &format!("at byte {at}")] {
            assert!(why.contains(words), "`{words}` is not in: {why}");
        }
        // All else comes, and the guest goes on until it comes upon what is lost.
        eventually("all other pages are here", || fetching.missing() == lost);
        assert!(fetching.lacks(gfn));
        let mut before = guest.written();
        eventually("the guest waits", || {
            std::thread::sleep(Duration::from_millis(50));
            std::mem::replace(&mut before, guest.written()) == guest.written()
        });
        assert_eq!(guest.wrong(), None);
        assert_eq!(fetching.trouble(), Some(why));
        events.recv_timeout(Duration::from_millis(50)).expect_err("it is said once");
        fetching.abandon();
        drop(guest);
    }
}

#[test]
fn pages_of_a_damaged_frame_are_waited_for_and_never_seen() {
    with_every_kind(&Damaged);
}

#[test]
fn a_flipped_byte_anywhere_in_memory_is_never_seen_by_a_guest_that_runs() {
    let dir = TempDir::new().unwrap();
    let here = dir.path().join("b");
    let maker = process(Tracker::UffdWriteProtect);
    saved(&mut maker.busy_guest(), &here, None, false).unwrap();
    let end = Chain::open(&here, &[]).unwrap().manifest().memory.index_at;
    let (mut dice, mut found) = (Dice(std::process::id().into()), 0);
    // Most frames of a busy machine may have been followed by newer ones.
    for tried in 0..200 {
        if tried >= 12 && found > 0 {
            break;
        }
        // Behind the head, whose bytes are looked at when it is opened.
        let at = 32 + dice.below(end - 32);
        flip(&here, at);
        // One of the record is found before anything runs.
        if let Ok(chain) = Chain::open(&here, &[]) {
            let (guest, fetching, events) = go(Lazily::new(&maker.host(), chain));
            if let LazyEvent::Damaged(why) = events.recv_timeout(LONG).unwrap() {
                found += 1;
                std::thread::sleep(Duration::from_millis(100));
                assert_eq!(guest.wrong(), None, "byte {at}: {why}");
                fetching.abandon();
            } else {
                // A frame of which no page counts.
                goes_on(&guest, ARENA_PAGES);
            }
        } else {
            found += 1;
        }
        flip(&here, at);
    }
    assert!(found > 0);
    let again = Lazily::new(&maker.host(), Chain::open(&here, &[]).unwrap());
    again.complete();
}

#[test]
fn a_host_that_is_away_for_longer_than_a_read_is_tried_is_no_damage() {
    let dir = TempDir::new().unwrap();
    let maker = process(Tracker::UffdWriteProtect);
    let report = saved(&mut maker.busy_guest(), &dir.path().join("b"), None, true).unwrap();
    let address = Arc::default();
    let open = || open_for(&address, "b", Duration::from_millis(200)).unwrap();
    // On a busy computer all pages may be here before the host is gone, but not each time.
    let gone_too_early = || {
        let lender = Lender::of(&address, dir.path());
        let (sender, events) = channel();
        let tell = move |event| drop(sender.send(event));
        let (restored, fetching) = restore_lazily(&maker.host(), open(), "again", tell).unwrap();
        drop(lender);
        std::thread::sleep(Duration::from_millis(100));
        (fetching.missing() > 0).then_some((restored, fetching, events))
    };
    let (restored, fetching, events) = (0..20).find_map(|_| gone_too_early()).unwrap();
    events.recv_timeout(Duration::from_secs(2)).expect_err("nothing is said of pages to come");
    assert!(fetching.missing() > 0);
    assert_eq!(fetching.trouble(), None);
    let lender = Lender::of(&address, dir.path());
    let Ok(LazyEvent::Complete(_)) = events.recv_timeout(LONG) else {
        panic!("not all pages came")
    };
    assert_eq!(digest(&restored.guest.memory()), report.memory_digest.0);

    // State is not loaded with pages that may never come.
    let chain = open();
    let gfn = victim(&chain);
    drop(lender);
    let refused = restore_lazily(&Reader(gfn), chain, "again", |event| panic!("{event:?}"));
    let why = refused.err().expect("no machine").to_string();
    assert!(why.contains("ferry://"), "{why}");
}

#[test]
fn a_page_that_state_needs_is_brought_while_it_is_loaded_and_a_damaged_one_makes_no_machine() {
    let dir = TempDir::new().unwrap();
    let here = dir.path().join("b");
    let mut guest = process(Tracker::UffdWriteProtect).busy_guest();
    saved(&mut guest, &here, None, true).unwrap();
    let open = || Chain::open(&here, &[]).unwrap();
    let gfn = victim(&open());
    let lazily = Lazily::new(&Reader(gfn), open());
    assert!(lazily.complete().requested > 0);

    let at = open().place_of(gfn).unwrap().at;
    flip(&here, at + 99);
    let refused = restore_lazily(&Reader(gfn), Arc::new(open()), "again", |event| {
        panic!("{event:?}, of a machine that is not")
    });
    let why = refused.err().expect("no machine").to_string();
    for words in ["state cannot be loaded", "memory-", &format!("at byte {at}")] {
        assert!(why.contains(words), "`{words}` is not in: {why}");
    }
}

fn by_command(kernel: &str) {
    let hosts = Hosts::new();
    let host = &hosts.source;
    let [base, dir, again] = ["base", "b", "again"].map(|name| hosts.path(name));
    let runner = host.boot("m", kernel, &["--cpus", "2"]);
    host.run(&["save", "m", path(&base)]).succeeded();
    host.run(&["save", "m", path(&dir), "--base", path(&base)]).succeeded();
    runner.kill();
    let lazy = restore(host, &dir, "m", &["--lazy"]);
    let line = lazy.line("restored from");
    assert!(line.contains(" ms; it fetches ") && line.contains("running"), "{line}");
    let line = lazy.line("all pages are here");
    for words in ["came before they were touched", "waited for", "median", "p99", "longest"] {
        assert!(line.contains(words), "`{words}` is not in: {line}");
    }
    host.works("m");
    // It is a machine like any other.
    host.run(&["save", "m", path(&again)]).succeeded();
    let (_receiver, to) = hosts.destination.receive(&["--once"]);
    host.migrate("m", to, &[]).completed();
    hosts.destination.works("m");
}

#[test]
fn a_process_guest_restored_lazily_says_when_it_runs_and_when_all_is_here() {
    by_command(PROCESS);
}

#[test]
fn a_kvm_machine_restored_lazily_says_when_it_runs_and_when_all_is_here() {
    if kvm() {
        by_command(":guest");
    }
}

fn lacks_pages(kernel: &str) {
    let hosts = Hosts::new();
    let host = &hosts.source;
    let dir = hosts.path("b");
    let runner = host.boot("m", kernel, &[]);
    host.run(&["save", "m", path(&dir)]).succeeded();
    runner.kill();
    let chain = Chain::open(&dir, &[]).expect("a bundle");
    let at = chain.place_of(victim(&chain)).expect("data").at;
    flip(&dir, at + 77);
    let lazy = restore(host, &dir, "m", &["--lazy"]);
    let line = lazy.line("cannot be had");
    let byte = format!("at byte {at}");
    for words in ["memory-", &byte, "another copy", "ferry vm stop m"] {
        assert!(line.contains(words), "`{words}` is not in: {line}");
    }
    wait_for("it says what it lacks", || {
        let state = host.state("m");
        (state.contains("lacks") && state.contains(&byte)).then_some(())
    });
    host.run(&["save", "m", path(&hosts.path("c"))]).failed(&["only be stopped", &byte]);
    let identity = path(&host.identity);
    let to = ["--to", "127.0.0.1:9", "--identity", identity];
    host.run(&[&["migrate", "m"], &to[..]].concat()).failed(&["only be stopped", &byte]);
    host.run(&["vm", "stop", "m"]).succeeded();
    let ended = lazy.end().succeeded();
    assert!(ended.stderr.contains("machine `m` was stopped"), "{ended:?}");
    assert!(host.machines().is_empty());
}

#[test]
fn a_process_guest_that_lacks_damaged_pages_says_so_and_can_be_stopped() {
    lacks_pages(PROCESS);
}

#[test]
fn a_kvm_machine_that_lacks_damaged_pages_says_so_and_can_be_stopped() {
    if kvm() {
        lacks_pages(":guest");
    }
}

/// 512 MiB that cannot be compressed: they take a while.
const LARGE: [&str; 4] = [
    "--memory",
    "512M",
    "--cmdline",
    "pattern=random rate=20000 fill=all fill_random=100 random=100",
];

#[test]
fn a_machine_that_fetches_is_not_saved_is_stopped_at_once_and_its_bundle_survives_a_kill() {
    let hosts = Hosts::new();
    let host = &hosts.source;
    let dir = hosts.path("b");
    let runner = host.boot("m", PROCESS, &LARGE);
    host.run(&["save", "m", path(&dir), "--max-stop", "1m"]).succeeded();
    runner.kill();
    let lazy = restore(host, &dir, "m", &["--lazy"]);
    let refused = host.run(&["save", "m", path(&hosts.path("c"))]);
    if !lazy.has_said("all pages are here") {
        refused.failed(&["`m`", "still fetching pages"]);
    }
    host.run(&["vm", "stop", "m"]).succeeded();
    let ended = lazy.end().succeeded();
    assert!(ended.stderr.contains("machine `m` was stopped"), "{ended:?}");

    let mut dice = Dice(std::process::id().into());
    for _ in 0..3 {
        let lazy = restore(host, &dir, "m", &["--lazy"]);
        std::thread::sleep(Duration::from_millis(dice.below(200)));
        lazy.kill();
    }
    host.run(&["bundle", "verify", path(&dir)]).succeeded();
    let lazy = restore(host, &dir, "m", &["--lazy"]);
    lazy.line("all pages are here");
    host.works("m");
}
