//! Peers that lie: a hostile source against a host that takes machines in, and a hostile destination
//! against a running machine. Nobody panics, each is told off in clear words, memory stays bounded, and
//! the next honest migration succeeds.

mod destination;
mod frames;
mod guard;
mod source;
#[path = "../stage/mod.rs"]
mod stage;

use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use ferry_migrate::{Goals, Guest, MachineSpec, SendOptions};
use ferry_process_guest::{Config, ProcessGuest, Tracker};
use stage::{Destination, Maker, Process, goes_on, migrate};

const MIB: u64 = 1 << 20;
const PAGES: u64 = 16 * MIB / 4096;

fn maker() -> Process {
    Process {
        tracker: Tracker::UffdWriteProtect,
        memory_bytes: 16 * MIB,
        workload: "pattern=random arena=4M fill=all".into(),
    }
}

fn config() -> Config {
    let Process { tracker, memory_bytes, workload } = maker();
    let (name, huge_pages) = ("p1".into(), false);
    Config { name, memory_bytes, huge_pages, workers: 2, workload, tracker }
}

/// Goals that a busy guest on a busy computer meets.
fn options() -> SendOptions {
    let goals = Goals {
        max_downtime: Duration::from_secs(1),
        max_total: Duration::from_secs(20),
        ..Goals::default()
    };
    SendOptions { goals, rejoin_for: Duration::from_millis(100), ..SendOptions::default() }
}

fn spec() -> MachineSpec {
    ProcessGuest::new(config()).unwrap().spec()
}

/// Counts the panics of threads that are the engine's.
fn panics() -> &'static AtomicU32 {
    static PANICS: AtomicU32 = AtomicU32::new(0);
    static ONCE: std::sync::Once = std::sync::Once::new();
    ONCE.call_once(|| {
        let before = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            let name = std::thread::current().name().unwrap_or("").to_owned();
            if name.starts_with("ferry-") || name.starts_with("tokio") {
                PANICS.fetch_add(1, Ordering::SeqCst);
            }
            before(info);
        }));
    });
    &PANICS
}

/// Most memory that this process ever had, bytes.
fn peak_bytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|l| l.strip_prefix("VmHWM:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() * 1024
}

/// A busy machine still moves to `host`.
fn assert_unharmed(host: &Destination<ProcessGuest>) {
    let mut source = maker().busy_guest();
    let sent = migrate(&mut source, &host.connector, &options());
    assert!(sent.report.digest_verified, "{}", sent.report.reason);
    goes_on(&host.arrival().expect("a machine").0, 1024);
    assert_eq!(panics().load(Ordering::SeqCst), 0);
}

fn message(bytes: &[u8]) -> Vec<u8> {
    let length = u32::try_from(bytes.len()).unwrap().to_le_bytes();
    [&length[..], bytes].concat()
}
