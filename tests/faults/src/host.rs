//! Faults of one host: its disk, its memory, its clock.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use ferry_e2e::group::Group;
use ferry_e2e::network::why_not;
use ferry_e2e::{Host, Hosts, path, wait_for};
use rustix::process::Signal;

use crate::ends::Knew;
use crate::stage::Guest::{self, Kvm, Process};
use crate::table::Own;

const BOTH: &[Guest] = &[Process, Kvm];

/// Them all.
pub const OWN: &[Own] = &[
    Own {
        fault: "disk full",
        phase: "save",
        ends: "runs on; the bundle that was there is whole",
        knows: "with the write that fails | –",
        run: disk_full_while_saving,
        guests: BOTH,
    },
    Own {
        fault: "disk full",
        phase: "spool of a post-copy move",
        ends: "moves without a spool, which is said",
        knows: "with the write that fails | –",
        run: disk_full_of_a_spool,
        guests: BOTH,
    },
    Own {
        fault: "disk full",
        phase: "swap file of a limited machine",
        ends: "runs on above its limit: what the disk cannot take stays in memory, which is said",
        knows: "with the write that fails | –",
        run: disk_full_of_a_swap_file,
        guests: BOTH,
    },
    Own {
        fault: "memory limit of the destination's control group",
        phase: "negotiation: less than the machine has",
        ends: "runs at the source: refused with both sizes",
        knows: "with the answer | with the offer",
        run: refused_by_its_group,
        guests: BOTH,
    },
    Own {
        fault: "memory limit of the destination's control group",
        phase: "first round: the kernel kills the destination",
        ends: "runs at the source, and can be moved again",
        knows: "idle + rejoin + handshake: 12 s | dead",
        run: killed_by_its_group,
        guests: BOTH,
    },
    Own {
        fault: "address space of the destination (RLIMIT_AS)",
        phase: "negotiation",
        ends: "runs at the source: refused with the system's word",
        knows: "with the answer | with the offer",
        run: refused_by_the_system,
        guests: BOTH,
    },
    Own {
        fault: "clock set back by 10 days: destination",
        phase: "before the move",
        ends: "runs at the source; certificates are not valid yet, which is said",
        knows: "with the handshake | at the start",
        run: clock_behind_at_the_destination,
        guests: &[Process],
    },
    Own {
        fault: "clock set back by 10 days: source",
        phase: "before the move",
        ends: "runs at the source; certificates are not valid yet, which is said",
        knows: "at once | –",
        run: clock_behind_at_the_source,
        guests: &[Process],
    },
    Own {
        fault: "both clocks set back by 10 days, then on by 3 years",
        phase: "first round, then while fetching",
        ends: "moves; memory is compared: only monotonic time counts",
        knows: "– | –",
        run: clocks_that_jump,
        guests: BOTH,
    },
];

/// 64 MiB of which half cannot be compressed.
const FULL: &str = "pattern=working-set set=8M rate=2000 fill=all fill_random=60 random=60";
const LITTLE: &str = "pattern=working-set set=4M rate=200 random=100 arena=8M";

/// A small file system, while this lives.
struct Disk(PathBuf);

impl Disk {
    fn new(hosts: &Hosts, megabytes: u32) -> Option<Self> {
        let dir = hosts.path("disk");
        std::fs::create_dir(&dir).expect("a directory");
        let size = format!("size={megabytes}m");
        let tried =
            Command::new("mount").args(["-t", "tmpfs", "-o", &size, "tmpfs"]).arg(&dir).output();
        if let Some(why) = why_not(tried) {
            println!("SKIP: no small disk can be mounted: {why}");
            return None;
        }
        Some(Self(dir))
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        // What is left of it goes with the last file that is open.
        let _ = Command::new("umount").arg("--lazy").arg(&self.0).status();
    }
}

fn knew(began: Instant) -> Option<Knew> {
    Some(Knew { source: Some(began.elapsed()), destination: None })
}

fn id(host: &Host, dir: &Path) -> String {
    let verified = host.run(&["bundle", "verify", path(dir), "--json"]).succeeded().json();
    verified["id"].as_str().expect("an id").to_owned()
}

fn disk_full_while_saving(guest: Guest) -> Option<Knew> {
    let hosts = Hosts::new();
    let host = &hosts.source;
    let disk = Disk::new(&hosts, 24)?;
    let dir = disk.0.join("b");
    let small = host.boot("small", guest.kernel(), &["--cmdline", LITTLE]);
    host.run(&["save", "small", path(&dir)]).succeeded();
    let before = id(host, &dir);
    drop(small);
    let _runner = host.boot("m", guest.kernel(), &["--cmdline", FULL]);
    let mut began = Instant::now();
    for more in [&[][..], &["--stop"]] {
        began = Instant::now();
        let failed = host.run(&[&["save", "m", path(&dir)], more].concat());
        let last = failed.stderr.lines().last().unwrap_or_default();
        let said = last.contains("No space left") && last.contains("goes on");
        assert!(failed.status == Some(1) && said, "{failed:?}");
        host.works("m");
    }
    let knew = knew(began);
    assert_eq!(id(host, &dir), before);
    knew
}

fn disk_full_of_a_spool(guest: Guest) -> Option<Knew> {
    let hosts = Hosts::new();
    let disk = Disk::new(&hosts, 4)?;
    let (_receiver, to) = hosts.destination.receive(&[]);
    let runner = hosts.source.boot("m", guest.kernel(), &["--cmdline", FULL]);
    let spool = disk.0.join("spool");
    let how = ["--mode", "post-copy", "--bandwidth", "100Mbit", "--spool", path(&spool)];
    let moving = hosts.source.start_migrate("m", to, &how);
    moving.line("the machine runs at the destination");
    let began = Instant::now();
    let said = moving.line("NO SPOOL was written");
    let knew = knew(began);
    assert!(said.contains("No space left") && said.contains("goes on without"), "{said}");
    let done = moving.end().succeeded();
    assert!(done.stdout.contains("the same on both sides"), "{done:?}");
    hosts.destination.works("m");
    runner.end().succeeded();
    let left: Vec<_> = std::fs::read_dir(&disk.0).expect("a directory").collect();
    assert!(left.is_empty(), "left on the disk: {left:?}");
    knew
}

fn disk_full_of_a_swap_file(guest: Guest) -> Option<Knew> {
    let hosts = Hosts::new();
    let disk = Disk::new(&hosts, 4)?;
    let host = &hosts.source;
    let runner = host.boot("m", guest.kernel(), &["--cmdline", FULL]);
    let began = Instant::now();
    let mut limit = vec!["memory", "limit", "m", "24M", "--swap-pool", "4M"];
    limit.extend(["--swap-dir", path(&disk.0), "--swap-size", "256M"]);
    host.run(&limit).succeeded();
    let trouble = wait_for("it is told", || {
        let shown = host.show("m").expect("it is there");
        shown["swap"]["trouble"].as_str().map(str::to_owned)
    });
    let knew = knew(began);
    assert!(trouble.contains("No space left"), "{trouble}");
    host.works("m");
    let (_receiver, to) = hosts.destination.receive(&[]);
    host.migrate("m", to, &[]).completed();
    hosts.destination.works("m");
    runner.end().succeeded();
    knew
}

/// Moves again, to a destination without a limit.
fn moves(hosts: &Hosts) {
    let (_receiver, to) = hosts.destination.receive(&[]);
    hosts.source.migrate("m", to, &[]).completed();
    hosts.destination.works("m");
}

fn refused_by_its_group(guest: Guest) -> Option<Knew> {
    let hosts = Hosts::new();
    let group = Group::make(&format!("refuses{}", guest.kernel().len()), 48 << 20)?;
    let (receiver, to) = group.around(&hosts.destination).receive(&[]);
    let _runner = hosts.source.boot("m", guest.kernel(), &["--cmdline", LITTLE]);
    let began = Instant::now();
    let moved = hosts.source.migrate("m", to, &[]);
    let knew = knew(began);
    moved.stayed("refused", &["the machine has 64 MiB", "this host can take"]);
    receiver.line("did not come");
    hosts.source.works("m");
    assert_eq!(group.oom_kills(), 0);
    drop(receiver);
    moves(&hosts);
    knew
}

fn killed_by_its_group(guest: Guest) -> Option<Knew> {
    let hosts = Hosts::new();
    let group = Group::make(&format!("kills{}", guest.kernel().len()), 512 << 20)?;
    let (mut receiver, to) = group.around(&hosts.destination).receive(&[]);
    let _runner = hosts.source.boot("m", guest.kernel(), &["--cmdline", FULL]);
    let how = ["--bandwidth", "16Mbit", "--rejoin", "2s"];
    let moving = hosts.source.start_migrate("m", to, &how);
    moving.line("round 1: ");
    // Somebody else on that host takes what it had.
    group
        .limit((group.used() + (2 << 20)).next_multiple_of(4096))
        .expect("a limit above what is used");
    let began = Instant::now();
    wait_for("the kernel kills it", || (!receiver.is_alive()).then_some(()));
    let done = moving.end();
    let knew = knew(began);
    assert!(done.stdout.contains("`m` goes on here: the move failed"), "{done:?}");
    assert_eq!(group.oom_kills(), 1);
    hosts.source.works("m");
    moves(&hosts);
    knew
}

fn refused_by_the_system(guest: Guest) -> Option<Knew> {
    let hosts = Hosts::new();
    // What the process itself needs varies; no machine of this size fits.
    let before = ["prlimit", "--as=4294967296"].map(str::to_owned).into();
    let limited = Host { before, ..hosts.destination.clone() };
    let (receiver, to) = limited.receive(&[]);
    let more = ["--cmdline", LITTLE, "--memory", "6G"];
    let _runner = hosts.source.boot("m", guest.kernel(), &more);
    let began = Instant::now();
    let moved = hosts.source.migrate("m", to, &[]);
    let knew = knew(began);
    moved.stayed("refused", &["Cannot allocate memory"]);
    receiver.line("did not come");
    hosts.source.works("m");
    drop(receiver);
    moves(&hosts);
    knew
}

/// Where libfaketime may be: Debian's, Fedora's.
const FAKETIME: [&str; 2] = [
    "/usr/lib/x86_64-linux-gnu/faketime/libfaketimeMT.so.1",
    "/usr/lib64/faketime/libfaketimeMT.so.1",
];

/// A host whose wall clock is off by what `file` says, at any moment; the other clocks are right.
fn with_clock(host: &Host, file: &Path) -> Option<Host> {
    let Some(library) = FAKETIME.iter().find(|library| Path::new(library).exists()) else {
        println!("SKIP: no clock can be set for one process alone: libfaketime is not installed");
        return None;
    };
    let before = vec![
        "env".into(),
        format!("LD_PRELOAD={library}"),
        format!("FAKETIME_TIMESTAMP_FILE={}", path(file)),
        "FAKETIME_NO_CACHE=1".into(),
        "FAKETIME_DONT_FAKE_MONOTONIC=1".into(),
    ];
    Some(Host { before, ..host.clone() })
}

/// Sets the clocks that go by `file`, all at once.
fn set_clock(file: &Path, off_by: &str) {
    let new = file.with_extension("new");
    std::fs::write(&new, off_by).expect("a file");
    std::fs::rename(new, file).expect("a file");
}

const NOT_YET: [&str; 2] = ["not valid before", "clock"];

fn clock_behind_at_the_destination(guest: Guest) -> Option<Knew> {
    let hosts = Hosts::new();
    let clock = hosts.path("clock");
    let destination = with_clock(&hosts.destination, &clock)?;
    set_clock(&clock, "-10d");
    let identity = path(&destination.identity);
    let listen = ["receive", "--listen", "127.0.0.1:0", "--identity", identity];
    destination.run(&listen).failed(&NOT_YET);
    // It went wrong after the start.
    set_clock(&clock, "+0d");
    // Confined, it could not read what time it is to take it for.
    let (receiver, to) = destination.receive(&["--sandbox", "off"]);
    set_clock(&clock, "-10d");
    let _runner = hosts.source.boot("m", guest.kernel(), &["--cmdline", LITTLE]);
    let began = Instant::now();
    let moved = hosts.source.migrate("m", to, &[]);
    let knew = knew(began);
    moved.stayed("failed", &["not valid yet", "set the clocks right"]);
    hosts.source.works("m");
    set_clock(&clock, "+0d");
    hosts.source.migrate("m", to, &[]).completed();
    destination.works("m");
    drop(receiver);
    knew
}

fn clock_behind_at_the_source(guest: Guest) -> Option<Knew> {
    let hosts = Hosts::new();
    let clock = hosts.path("clock");
    let source = with_clock(&hosts.source, &clock)?;
    set_clock(&clock, "-10d");
    let (_receiver, to) = hosts.destination.receive(&[]);
    let _runner = source.boot("m", guest.kernel(), &["--cmdline", LITTLE]);
    let began = Instant::now();
    let moved = source.migrate("m", to, &[]);
    let knew = knew(began);
    moved.stayed("failed", &NOT_YET);
    source.works("m");
    set_clock(&clock, "+0d");
    source.migrate("m", to, &[]).completed();
    hosts.destination.works("m");
    knew
}

fn clocks_that_jump(guest: Guest) -> Option<Knew> {
    let hosts = Hosts::new();
    let clock = hosts.path("clock");
    set_clock(&clock, "+0d");
    let source = with_clock(&hosts.source, &clock)?;
    let destination = with_clock(&hosts.destination, &clock)?;
    let (receiver, to) = destination.receive(&[]);
    let workload = "pattern=working-set set=4M rate=2000 random=100 arena=4M";
    let runner = source.boot("m", guest.kernel(), &["--cmdline", workload]);
    let how = ["--mode", "hybrid", "--bandwidth", "16Mbit", "--max-downtime", "1ms"];
    let moving = source.start_migrate("m", to, &how);
    moving.line("round 1: ");
    let began = Instant::now();
    set_clock(&clock, "-10d");
    moving.line("it fetches ");
    set_clock(&clock, "+1000d");
    let done = moving.end().succeeded();
    let knew = knew(began);
    assert!(done.stdout.contains("the same on both sides"), "{done:?}");
    assert!(!done.stdout.contains("lost"), "{done:?}");
    receiver.line("its memory is the same");
    destination.works("m");
    runner.end().succeeded();
    receiver.signal(Signal::TERM);
    knew
}
