//! Much at once, and the same again and again: whole machines between two hosts, by the real command.
//!
//! `FERRY_TRIPS=n` for more trips than the few of the test command (`make load`).

use std::net::SocketAddr;
use std::time::Duration;

use ferry_e2e::{Host, Hosts, Running, kvm, wait_for};

/// A working set that takes a few rounds.
const SMALL: &str = "pattern=working-set set=2M arena=8M fill=all rate=2000 random=25";
/// What a process may hold more after many moves, of 8 MiB and more each.
const MOST_KIB: u64 = 48 << 10;
const MODES: [&str; 3] = ["pre-copy", "post-copy", "hybrid"];

fn trips() -> usize {
    std::env::var("FERRY_TRIPS").ok().and_then(|n| n.parse().ok()).unwrap_or(24)
}

fn boot(host: &Host, name: &str, kernel: &str) -> Running {
    host.boot(name, kernel, &["--memory", "32M", "--cmdline", SMALL])
}

#[test]
fn eight_machines_come_in_while_eight_others_go_out() {
    let hosts = Hosts::new();
    let (here, there) = (&hosts.source, &hosts.destination);
    let kernels = if kvm() { [":process", ":guest"] } else { [":process", ":process"] };
    let names = |side: &str| (0..8).map(|n| format!("{side}{n}")).collect::<Vec<_>>();
    let (leaving, coming) = (names("leaves"), names("comes"));
    let boots = |host: &Host, names: &[String]| -> Vec<Running> {
        names.iter().zip(kernels.iter().cycle()).map(|(name, k)| boot(host, name, k)).collect()
    };
    let _run = (boots(here, &leaving), boots(there, &coming));
    let (_in_here, to_here) = here.receive(&[]);
    let (_in_there, to_there) = there.receive(&[]);
    let moves = |host: &Host, names: &[String], to: SocketAddr| -> Vec<Running> {
        let mode = MODES.iter().cycle();
        // So many at once make round trips long.
        let start = |(name, mode): (&String, _)| {
            host.start_migrate(name, to, &["--json", "--mode", mode, "--max-downtime", "2s"])
        };
        names.iter().zip(mode.copied()).map(start).collect()
    };
    let mut under_way = moves(here, &leaving, to_there);
    under_way.extend(moves(there, &coming, to_here));
    for moving in under_way {
        ferry_e2e::Moved::from(moving.end()).completed();
    }
    for (host, names) in [(here, &coming), (there, &leaving)] {
        let mut listed = host.machines();
        listed.sort();
        assert_eq!(&listed, names);
        names.iter().for_each(|name| host.works(name));
    }
}

/// What a process holds.
#[derive(Clone, Copy, Debug)]
struct Held {
    descriptors: usize,
    threads: usize,
    memory_kib: u64,
}

impl Held {
    fn by(pid: u32) -> Self {
        let status = std::fs::read_to_string(format!("/proc/{pid}/status")).expect("it runs");
        let field = |name: &str| -> u64 {
            let line = status.lines().find_map(|l| l.strip_prefix(name)).expect("a field");
            line.split_whitespace().next().and_then(|n| n.parse().ok()).expect("a number")
        };
        Self {
            descriptors: std::fs::read_dir(format!("/proc/{pid}/fd")).expect("it runs").count(),
            threads: usize::try_from(field("Threads:")).expect("few"),
            memory_kib: field("RssAnon:") + field("RssShmem:"),
        }
    }

    /// The least of each for some time: what is let go is let go a little later.
    fn at_rest(pid: u32) -> Self {
        let mut least = Self::by(pid);
        for _ in 0..20 {
            std::thread::sleep(Duration::from_millis(50));
            let now = Self::by(pid);
            least.descriptors = least.descriptors.min(now.descriptors);
            least.threads = least.threads.min(now.threads);
            least.memory_kib = least.memory_kib.min(now.memory_kib);
        }
        least
    }
}

/// Moves a machine there and back `times` times; what each host holds while it is not there.
fn there_and_back(at: &Post<'_>, times: usize) -> [Held; 2] {
    let mut held = None;
    for n in 0..times {
        let mode = MODES[n % MODES.len()];
        at.left.0.migrate("m", at.right.1, &["--mode", mode]).completed();
        let left = (n + 1 == times).then(|| Held::at_rest(at.left.2));
        at.right.0.migrate("m", at.left.1, &["--mode", mode]).completed();
        held = left.map(|left| [left, Held::at_rest(at.right.2)]);
    }
    at.left.0.works("m");
    held.expect("at least one trip")
}

/// Two hosts that receive: each with its address and process.
struct Post<'a> {
    left: (&'a Host, SocketAddr, u32),
    right: (&'a Host, SocketAddr, u32),
}

fn goes_back_and_forth(kernel: &str) {
    let hosts = Hosts::new();
    let (a, to_a) = hosts.source.receive(&[]);
    let (b, to_b) = hosts.destination.receive(&[]);
    let start = Host { runtime: hosts.path("start"), ..hosts.source.clone() };
    let _run = boot(&start, "m", kernel);
    start.migrate("m", to_a, &[]).completed();
    let at =
        Post { left: (&hosts.source, to_a, a.id()), right: (&hosts.destination, to_b, b.id()) };
    // What a process takes once, it has taken after the first trips.
    let before = there_and_back(&at, 2 * MODES.len());
    let after = there_and_back(&at, trips() / 2);
    println!("{kernel}: {before:?} became {after:?} in {} moves", trips() / 2 * 2);
    for (before, after) in before.into_iter().zip(after) {
        assert!(after.descriptors <= before.descriptors, "{before:?} became {after:?}");
        assert!(after.threads <= before.threads, "{before:?} became {after:?}");
        // An allocator keeps some of what it was given back: less than what was moved in half of the trips.
        assert!(after.memory_kib < before.memory_kib + MOST_KIB, "{before:?} became {after:?}");
    }
}

#[test]
fn a_process_guest_that_goes_back_and_forth_leaves_nothing_behind() {
    goes_back_and_forth(":process");
}

#[test]
fn a_kvm_machine_that_goes_back_and_forth_leaves_nothing_behind() {
    if kvm() {
        goes_back_and_forth(":guest");
    }
}

#[test]
fn a_machine_of_16_gib_that_uses_little_of_it_moves_by_the_command() {
    let hosts = Hosts::new();
    let (receiver, to) = hosts.destination.receive(&["--once"]);
    let cmdline = "pattern=working-set set=16M arena=256M fill=all rate=2000 random=25";
    let _run = hosts.source.boot("m", ":process", &["--memory", "16G", "--cmdline", cmdline]);
    hosts.source.migrate("m", to, &[]).completed();
    hosts.destination.works("m");
    let there = Held::by(receiver.id()).memory_kib;
    assert!((256 << 10..384 << 10).contains(&there), "{there} KiB resident for 256 MiB of data");
    drop(receiver);
    wait_for("the machine is gone", || hosts.destination.machines().is_empty().then_some(()));
}
