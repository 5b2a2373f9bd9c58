//! What a migration costs in memory beyond the guest's own, in two real `ferry` processes.

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use ferry_e2e::{Hosts, path, wait_for};

const KIB: u64 = 1024;
const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;
/// What each side may need, beyond the guest's memory, for a guest of 4 GiB.
const MOST_BYTES: u64 = 128 * MIB;

/// A process's resident memory: the guest's, and the rest.
#[derive(Clone, Copy, Debug, Default)]
struct Resident {
    guest: u64,
    rest: u64,
}

/// Reads `smaps`: the guest's memory is the mappings of a GiB and more.
fn resident(pid: u32) -> Option<Resident> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/smaps")).ok()?;
    let kib = |line: &str| line.trim().trim_end_matches("kB").trim().parse::<u64>().ok();
    let mut found = Resident::default();
    let mut size = 0;
    for line in text.lines() {
        if let Some(rest) = line.strip_prefix("Size:") {
            size = kib(rest)? * KIB;
        } else if let Some(rest) = line.strip_prefix("Rss:") {
            *(if size >= GIB { &mut found.guest } else { &mut found.rest }) += kib(rest)? * KIB;
        }
    }
    Some(found)
}

/// The process whose command line has both words.
fn process_of(runtime: &Path, word: &str) -> u32 {
    let words = |pid: u32| {
        let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let line = String::from_utf8_lossy(&line).into_owned();
        line.contains(path(runtime)) && line.split('\0').any(|w| w == word)
    };
    wait_for(&format!("the process of `{word}`"), || {
        std::fs::read_dir("/proc")
            .unwrap()
            .filter_map(|e| e.ok()?.file_name().to_str()?.parse().ok())
            .find(|pid| words(*pid))
    })
}

/// The most that each of `pids` had beyond a guest of `guest` bytes, sampled until told to stop.
///
/// Small mappings beside the guest's may have become one with it: all that is more than the guest counts.
fn watch(pids: [u32; 2], guest: u64, stop: Arc<AtomicBool>, most: Arc<Mutex<[u64; 2]>>) {
    while !stop.load(Ordering::SeqCst) {
        for (n, pid) in pids.into_iter().enumerate() {
            // A mapping that grows while it is listed can be listed twice: the smaller of two looks is true.
            let looks = [resident(pid), resident(pid)];
            if let Some(now) = looks.into_iter().flatten().min_by_key(|r| r.guest + r.rest) {
                let mut most = most.lock().unwrap();
                most[n] = most[n].max(now.rest).max((now.guest + now.rest).saturating_sub(guest));
            }
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// Moves a guest of 4 GiB which has written `arena_mib` MiB of it, and rewrites 16 MiB without pause.
fn moves_within_bounds(arena_mib: u64, lanes_see: &str) {
    let hosts = Hosts::new();
    let (_receiver, to) = hosts.destination.receive(&["--once"]);
    let workload = format!("pattern=working-set set=16M arena={arena_mib}M fill=all random=100");
    let memory = ["--memory", "4G", "--cpus", "2", "--cmdline", &workload];
    let _runner = hosts.source.boot("m", ":process", &memory);
    let pids = [
        process_of(&hosts.source.runtime, "run"),
        process_of(&hosts.destination.runtime, "receive"),
    ];
    wait_for("the guest has filled its arena", || {
        (resident(pids[0])?.guest >= arena_mib * MIB).then_some(())
    });
    let before = pids.map(|pid| resident(pid).unwrap());
    let guest_bytes =
        |host: &ferry_e2e::Host| host.show("m").unwrap()["resident_bytes"].as_u64().unwrap();
    let left = guest_bytes(&hosts.source);
    let stop = Arc::new(AtomicBool::new(false));
    let most = Arc::new(Mutex::new([0; 2]));
    let watcher = std::thread::spawn({
        let (stop, most) = (stop.clone(), most.clone());
        move || watch(pids, left, stop, most)
    });
    let moved = hosts.source.migrate("m", to, &["--max-downtime", "2s"]);
    moved.completed();
    let arrived = guest_bytes(&hosts.destination);
    stop.store(true, Ordering::SeqCst);
    watcher.join().unwrap();
    let [source, destination] = *most.lock().unwrap();
    println!(
        "{lanes_see}: guest {} MiB here, {} MiB there; beyond it at most {} MiB at the source (idle {}), {} MiB at the \
         destination (idle {})",
        left / MIB,
        arrived / MIB,
        source / MIB,
        before[0].rest / MIB,
        destination / MIB,
        before[1].rest / MIB
    );
    assert!(left >= arena_mib * MIB && left < (arena_mib + 64) * MIB, "{left}");
    assert!(arrived.abs_diff(left) <= left / 50, "{left} resident bytes became {arrived}");
    assert!(source > 0 && source < MOST_BYTES, "the source needed {} MiB", source / MIB);
    assert!(
        destination > 0 && destination < MOST_BYTES,
        "the destination needed {} MiB",
        destination / MIB
    );
    hosts.destination.works("m");
}

#[test]
fn a_sparse_guest_of_4_gib_costs_each_side_less_than_128_mib() {
    moves_within_bounds(1024, "1 of 4 GiB in use");
}

#[test]
#[ignore = "fills and moves 4 GiB: a minute on two cores"]
fn a_full_guest_of_4_gib_costs_each_side_less_than_128_mib() {
    moves_within_bounds(4000, "4 GiB in use");
}
