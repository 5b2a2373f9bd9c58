//! A Linux guest moves and goes on: its timers tick, its console speaks, its memory is what it was.
//!
//! Process 1 of this guest checks and rewrites its memory for ever, and panics at the first wrong word; a
//! kernel thread prints statistics every few seconds. `FERRY_LINUX_GUEST` names the folder with its
//! `vmlinux.xz` and `initrd.gz`; `../shared/linux-guest` beside the workspace is the default.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use ferry_e2e::{HANG, Host, Hosts, Running, kvm, path};

const MOVES: usize = 10;
const MODES: [&str; 3] = ["auto", "post-copy", "hybrid"];
/// What this guest needs where ring 0 is emulated; harmless elsewhere.
const CMDLINE: &str = "console=ttyS0 noxsave mitigations=off random.trust_cpu=off \
    rcutorture.stat_interval=5 rcutorture.fwd_progress=0 rcutorture.nreaders=2 \
    clearcpuid=popcnt,cx16,fsgsbase,invpcid,pcid,rdrand,rdseed,clwb,clflushopt,movbe,umip,smap,smep,\
    rdtscp,rdpid,erms,fsrm";
const PROCESS_1: &str = "Run /init as init process";
/// How a line of the statistics begins.
const STATISTICS: &str = "rcu-torture: rtc:";

/// The guest's folder, or why there is none.
fn guest() -> Result<PathBuf, String> {
    let chosen = std::env::var_os("FERRY_LINUX_GUEST").map(PathBuf::from);
    let beside = concat!(env!("CARGO_MANIFEST_DIR"), "/../../../shared/linux-guest");
    let dir = chosen.unwrap_or_else(|| beside.into());
    if dir.join("vmlinux.xz").is_file() {
        return Ok(dir);
    }
    Err(format!("no Linux guest at {}; FERRY_LINUX_GUEST names another folder", dir.display()))
}

/// Unpacks `from` to `to`.
fn unpack(from: &Path, to: &Path) -> Result<(), String> {
    let file = File::create(to).map_err(|e| e.to_string())?;
    let unpacked = Command::new("xz").arg("-dc").arg(from).stdout(file).status();
    match unpacked {
        Ok(status) if status.success() => Ok(()),
        Ok(status) => panic!("xz -dc {}: {status}", from.display()),
        Err(e) => Err(format!("the Linux guest cannot be unpacked: xz: {e}")),
    }
}

fn read(console: &Path) -> String {
    String::from_utf8_lossy(&std::fs::read(console).unwrap_or_default()).into_owned()
}

/// Waits until `console` has `words` more often than `before` times. The guest may take its time (its
/// kernel may be emulated), but not be silent.
fn wait_for_words(console: &Path, words: &str, before: usize, process: &mut Running) {
    let (mut seen, mut since) = (0, Instant::now());
    loop {
        let text = read(console);
        assert!(!text.contains("Kernel panic"), "the guest panicked: {text}");
        if text.matches(words).count() > before {
            return;
        }
        if text.len() > seen {
            (seen, since) = (text.len(), Instant::now());
        }
        assert!(since.elapsed() < HANG, "the console is silent, without `{words}`: {text}");
        assert!(process.is_alive(), "the machine's process ended: {text}");
        std::thread::sleep(Duration::from_millis(200));
    }
}

#[test]
fn linux_goes_on_after_ten_moves_in_a_row() {
    let dir = match guest() {
        Ok(dir) if kvm() => dir,
        Ok(_) => return,
        Err(why) => return println!("SKIP: {why}"),
    };
    let hosts = Hosts::new();
    let kernel = hosts.path("vmlinux");
    if let Err(why) = unpack(&dir.join("vmlinux.xz"), &kernel) {
        return println!("SKIP: {why}");
    }
    // A console file on each host: what is said after a move is in the destination's.
    let sides: [(&Host, PathBuf); 2] =
        [(&hosts.source, hosts.path("console-a")), (&hosts.destination, hosts.path("console-b"))];
    let initrd = dir.join("initrd.gz");
    let boot = [
        "--initrd",
        path(&initrd),
        "--cmdline",
        CMDLINE,
        "--memory",
        "256M",
        "--serial",
        path(&sides[0].1),
    ];
    let mut process = hosts.source.boot("linux", path(&kernel), &boot);
    wait_for_words(&sides[0].1, PROCESS_1, 0, &mut process);

    for n in 0..MOVES {
        let ((here, _), (there, console)) = (&sides[n % 2], &sides[(n + 1) % 2]);
        let (receiver, to) = there.receive(&["--once", "--serial", path(console)]);
        let before = read(console).matches(STATISTICS).count();
        let mode = MODES[n % MODES.len()];
        // So that hybrid is not done after its one round.
        let moved = here.migrate("linux", to, &["--mode", mode, "--max-downtime", "5ms"]);
        moved.completed();
        let (downtime, how) = (&moved.report["downtime_ms"], &moved.report["mode"]);
        println!("move {}: {how}, {downtime} ms downtime", n + 1);
        process.end().succeeded();
        process = receiver;
        wait_for_words(console, STATISTICS, before, &mut process);
        assert_eq!(there.state("linux"), "running");
    }
    let (here, _) = &sides[MOVES % 2];
    here.run(&["vm", "stop", "linux"]).succeeded();
    process.end().succeeded();
    for (_, console) in &sides {
        assert!(!read(console).contains("Kernel panic"));
    }
}
