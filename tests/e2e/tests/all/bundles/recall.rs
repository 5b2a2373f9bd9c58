//! A machine comes to a host that has an old bundle of it: only what differs is sent.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use ferry_bundle::{Chain, MANIFEST};
use ferry_codec::Codec;
use ferry_e2e::{Hosts, path};
use ferry_migrate::{
    Arrival, Goals, Guest, Mode, OutcomeKind, ReceiveEvent, ReceiveOptions, SendOptions, Sent,
};
use ferry_process_guest::Tracker;
use tempfile::TempDir;

use super::command::PROCESS;
use super::engine::{ARENA_PAGES, MIB, saved};
use super::lazy::{flip, victim};
use crate::stage::{
    Deal, Destination, Kind, Kvm, Link, Maker, Process, Relay, Subject, Watched, WatchedHost,
    Witness, Word, goes_on, has_kvm, migrate,
};

/// Of 16 MiB that are all filled, one is written again and again.
const LITTLE: &str = "pattern=working-set set=1M arena=16M fill=all fill_random=60 random=60";
/// Any of the 16 MiB, so slowly that some of it stays as it was.
const PACED: &str = "pattern=random arena=16M fill=all fill_random=60 random=60 rate=4000";

fn process(workload: &str) -> Process {
    let tracker = Tracker::UffdWriteProtect;
    Process { tracker, memory_bytes: 64 * MIB, workload: workload.into() }
}

fn by(mode: Mode) -> SendOptions {
    let goals = Goals {
        max_downtime: Duration::from_secs(2),
        max_total: Duration::from_secs(60),
        ..Goals::default()
    };
    SendOptions { goals, mode, lanes: 2, ..SendOptions::default() }
}

fn host<M: Maker>(maker: &M, bundles: &Path) -> Destination<M::Subject> {
    let bundles = vec![bundles.to_owned()];
    let options = ReceiveOptions { bundles, ..ReceiveOptions::default() };
    Destination::start_with(Link::Memory, maker.host(), options)
}

#[track_caller]
fn arrives<G: Subject>(destination: &Destination<G>, sent: &Sent) -> G {
    let report = &sent.report;
    assert_eq!(report.outcome, OutcomeKind::Completed, "{}", report.reason);
    assert!(report.digest_verified && !report.memory_differs, "{}", report.reason);
    let (arrived, arrival) = destination.arrival().expect("a machine");
    assert_eq!(arrival, Arrival::Runs { digest_verified: Some(true) });
    goes_on(&arrived, ARENA_PAGES);
    arrived
}

/// A machine is saved, goes on, and moves to where the bundle is.
fn sends_what_differs<M: Maker>(maker: &M, mode: Mode) {
    let dir = TempDir::new().unwrap();
    let mut source = maker.busy_guest();
    saved(&mut source, &dir.path().join("old"), None, false).unwrap();
    goes_on(&source, 256);
    let destination = host(maker, dir.path());
    let sent = migrate(&mut source, &destination.connector, &by(mode));
    drop(arrives(&destination, &sent));
    let report = &sent.report;
    assert!(report.pages.same >= ARENA_PAGES * 4 / 5, "{report:?}");
    // The working set again in each round, and what the whole machine has beside it.
    let rounds = u64::from(report.rounds) + 1;
    assert!(report.bytes_sent < 2 * MIB * rounds, "{report:?}");
    assert!(report.bytes_sent < ARENA_PAGES * 4096 || report.rounds > 6, "{report:?}");
}

#[test]
fn only_what_differs_from_an_old_bundle_is_sent() {
    let with_kvm = has_kvm();
    for kind in Kind::ALL {
        println!("{kind:?}");
        match kind {
            Kind::Process(tracker) => {
                sends_what_differs(&Process { tracker, ..process(LITTLE) }, Mode::PreCopy);
            }
            Kind::Kvm(dirty_log) if with_kvm => {
                let (workload, memory_bytes) = (LITTLE.into(), 64 * MIB);
                sends_what_differs(&Kvm { dirty_log, memory_bytes, workload }, Mode::PreCopy);
            }
            Kind::Kvm(_) => {}
        }
    }
    for mode in [Mode::PostCopy, Mode::Hybrid] {
        println!("{mode:?}");
        sends_what_differs(&process(LITTLE), mode);
    }
}

#[test]
fn no_write_is_lost_while_pages_are_compared_with_an_old_bundle() {
    let maker = process(PACED);
    let dir = TempDir::new().unwrap();
    let witness = Witness::new();
    let mut source = Watched::running(maker.busy_guest(), &witness);
    saved(&mut source, &dir.path().join("old"), None, false).unwrap();
    let host = WatchedHost { host: maker.host(), witness: witness.clone() };
    let bundles = vec![dir.path().to_owned()];
    let options = ReceiveOptions { bundles, ..ReceiveOptions::default() };
    let destination = Destination::start_with(Link::Memory, host, options);
    // Round after round, some pages as they were and some not.
    let how = SendOptions { bandwidth_bytes_per_s: Some(20_000_000), ..by(Mode::PreCopy) };
    let sent = migrate(&mut source, &destination.connector, &how);
    let _arrived = arrives(&destination, &sent);
    let pages = sent.report.pages;
    assert!(pages.same > 0 && pages.raw + pages.lz4 + pages.zstd > 0, "{pages:?}");
    assert_eq!(witness.running(), 1);
}

#[test]
fn a_machine_that_comes_back_finds_its_own_number_in_a_chain_of_bundles() {
    let maker = process(LITTLE);
    let dir = TempDir::new().unwrap();
    let mut source = maker.busy_guest();
    saved(&mut source, &dir.path().join("0"), None, false).unwrap();
    goes_on(&source, 256);
    let (base, newest) = (dir.path().join("0"), dir.path().join("1"));
    saved(&mut source, &newest, Some(&base), false).unwrap();
    // Newer, with memory at the same place, and somebody else's.
    let mut another = maker.busy_guest();
    saved(&mut another, &dir.path().join("2"), None, true).unwrap();

    let away = Destination::start(Link::Memory, maker.host());
    let sent = migrate(&mut source, &away.connector, &by(Mode::PreCopy));
    assert_eq!(sent.report.pages.same, 0);
    let mut there = arrives(&away, &sent);
    let back = host(&maker, dir.path());
    let sent = migrate(&mut there, &back.connector, &by(Mode::PreCopy));
    let said = std::iter::from_fn(|| back.event(Duration::from_secs(5)));
    let said: Vec<_> = said.take(3).collect();
    let found = said.iter().find_map(|event| match event {
        ReceiveEvent::Recalled { bundle, pages: Ok(pages), .. } => Some((bundle.clone(), *pages)),
        _ => None,
    });
    let pages = Chain::open(&newest, &[]).unwrap().data_pages().len();
    assert_eq!(found, Some((newest, pages)), "{said:?}");
    assert!(sent.report.digest_verified, "{}", sent.report.reason);
    assert!(sent.report.pages.same >= ARENA_PAGES * 4 / 5, "{:?}", sent.report);
}

#[test]
fn a_bundle_of_another_machine_of_the_same_layout_is_not_looked_at() {
    let maker = process(LITTLE);
    let dir = TempDir::new().unwrap();
    let mut another = maker.busy_guest();
    saved(&mut another, &dir.path().join("b"), None, false).unwrap();
    let destination = host(&maker, dir.path());
    let mut source = maker.busy_guest();
    let sent = migrate(&mut source, &destination.connector, &by(Mode::PreCopy));
    drop(arrives(&destination, &sent));
    assert_eq!(sent.report.pages.same, 0);
}

/// What the host said of bundles that are of no use.
fn useless<G: Guest + 'static>(destination: &Destination<G>) -> Vec<(PathBuf, String)> {
    let mut said = Vec::new();
    loop {
        match destination.event(Duration::from_secs(10)).expect("an event") {
            ReceiveEvent::Recalled { bundle, pages: Err(why), .. } => said.push((bundle, why)),
            ReceiveEvent::Ended { arrival, .. } => {
                assert_eq!(arrival, Arrival::Runs { digest_verified: Some(true) });
                return said;
            }
            _ => {}
        }
    }
}

#[test]
fn a_damaged_bundle_is_said_and_what_it_lacks_is_sent() {
    let maker = process(LITTLE);
    for mode in [Mode::PreCopy, Mode::PostCopy, Mode::Hybrid] {
        for manifest in [false, true] {
            println!("{mode:?}, manifest: {manifest}");
            let dir = TempDir::new().unwrap();
            let here = dir.path().join("old");
            let mut source = maker.busy_guest();
            saved(&mut source, &here, None, false).unwrap();
            if manifest {
                let text = std::fs::read_to_string(here.join(MANIFEST)).unwrap();
                std::fs::write(here.join(MANIFEST), text.replace("\"p1\"", "\"p2\"")).unwrap();
            } else {
                let chain = Chain::open(&here, &[]).unwrap();
                // Every fourth frame of pages.
                let mut at: Vec<u64> = chain
                    .data_pages()
                    .runs()
                    .flat_map(|run| run.start..run.end())
                    .map(|gfn| chain.place_of(gfn).unwrap().at)
                    .collect();
                at.sort_unstable();
                at.dedup();
                at.iter().step_by(4).for_each(|at| drop(flip(&here, at + 77)));
                assert!(chain.place_of(victim(&chain)).is_some());
            }
            let destination = host(&maker, dir.path());
            let sent = migrate(&mut source, &destination.connector, &by(mode));
            let report = &sent.report;
            assert!(report.digest_verified, "{}", report.reason);
            let said = useless(&destination);
            assert_eq!(said.len(), 1, "{said:?}");
            assert!(said[0].0 == here && said[0].1.contains("damaged"), "{said:?}");
            assert_eq!(report.pages.same == 0, manifest, "{report:?}");
            assert!(report.bytes_sent > MIB, "{report:?}");
        }
    }
}

#[test]
fn a_link_that_is_lost_again_and_again_does_not_mix_old_and_new() {
    let maker = process(LITTLE);
    for mode in [Mode::PreCopy, Mode::PostCopy] {
        println!("{mode:?}");
        let dir = TempDir::new().unwrap();
        let mut source = maker.busy_guest();
        saved(&mut source, &dir.path().join("old"), None, false).unwrap();
        goes_on(&source, 256);
        let destination = host(&maker, dir.path());
        let named = Arc::new(AtomicU32::new(0));
        let seen = named.clone();
        let relay = Relay::new(
            &destination.connector,
            destination.handle(),
            true,
            move |word, _| match word {
                Word::Frame(header) if header.codec == Codec::Same => {
                    match seen.fetch_add(1, Ordering::SeqCst) {
                        3 | 30 => Deal::PassAndCut,
                        11 | 40 => Deal::Cut,
                        _ => Deal::Pass,
                    }
                }
                _ => Deal::Pass,
            },
        );
        let how = SendOptions { rejoin_for: Duration::from_secs(30), ..by(mode) };
        let sent = migrate(&mut source, &relay.connector(), &how);
        drop(arrives(&destination, &sent));
        assert!(sent.report.links_lost >= 1, "{:?}", sent.report);
        assert!(sent.report.bytes_sent < 12 * MIB, "{:?}", sent.report);
    }
}

#[test]
fn a_machine_that_was_saved_goes_away_and_comes_back_by_the_command() {
    let hosts = Hosts::new();
    let bundles = hosts.path("bundles");
    std::fs::create_dir(&bundles).unwrap();
    let (home, away) = (&hosts.source, &hosts.destination);
    let runner = home.boot("m", PROCESS, &["--cmdline", LITTLE]);
    home.run(&["save", "m", path(&bundles.join("m"))]).succeeded();
    let (_receiver, to) = away.receive(&["--once"]);
    home.migrate("m", to, &[]).completed();
    runner.end().succeeded();
    away.works("m");
    let (receiver, to) = home.receive(&["--once", "--bundles", path(&bundles)]);
    let back = away.migrate("m", to, &[]);
    back.completed();
    receiver.line("only what differs is sent");
    assert!(back.report["pages"]["same"].as_u64() > Some(0), "{:#}", back.report);
    home.works("m");

    let nowhere = hosts.path("nowhere");
    let args =
        ["receive", "--listen", "127.0.0.1:0", "--identity", "x", "--bundles", path(&nowhere)];
    home.run(&args).failed(&[]);
}
