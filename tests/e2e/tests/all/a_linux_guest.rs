//! A Linux guest moves and goes on: its timers tick, its console speaks, its memory is what it was.
//!
//! Process 1 of this guest checks and rewrites its memory for ever, and panics at the first wrong word; a
//! kernel thread prints statistics every few seconds. Its own balloon driver gives memory back and takes it
//! again, here and there. `FERRY_LINUX_GUEST` names the folder with its
//! `vmlinux.xz` and `initrd.gz`; `../shared/linux-guest` beside the workspace is the default.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use ferry_bundle::Chain;
use ferry_e2e::{HANG, Host, Hosts, Running, kvm, path, wait_for};
use ferry_migrate::{Guest, SaveCanceller, SaveOptions, restore, save};
use ferry_pages::{PAGE_BYTES, PageSet, Run};
use ferry_refvmm::{DirtyLog, Machine, MachineConfig, RefHost, SerialSink};
use serde_json::Value;

const MOVES: usize = 10;
const MODES: [&str; 3] = ["auto", "post-copy", "hybrid"];
/// What this guest needs where ring 0 is emulated; harmless elsewhere.
const CMDLINE: &str = "console=ttyS0 noxsave mitigations=off random.trust_cpu=off \
    rcutorture.stat_interval=5 rcutorture.fwd_progress=0 rcutorture.nreaders=2 \
    clearcpuid=popcnt,cx16,fsgsbase,invpcid,pcid,rdrand,rdseed,clwb,clflushopt,movbe,umip,smap,smep,\
    rdtscp,rdpid,erms,fsrm";
const PROCESS_1: &str = "Run /init as init process";
const MIB: u64 = 1 << 20;
const MEMORY_BYTES: u64 = 256 * MIB;
/// Memory that the guest finds free when it starts, and that holds data of no use.
const USED_BEFORE: Run = Run::new(96 * MIB / 4096, 128 * MIB / 4096);
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

/// Saves a machine in front of its first instruction, whose free memory was used by somebody before.
fn write_bundle(dir: &Path, kernel: PathBuf, initrd: PathBuf) {
    let mut machine = Machine::boot(&MachineConfig {
        name: "linux".into(),
        memory_bytes: MEMORY_BYTES,
        huge_pages: false,
        cpus: 1,
        cpu: None,
        kernel,
        initrd: Some(initrd),
        cmdline: CMDLINE.into(),
        dirty_log: DirtyLog::Auto,
        serial: SerialSink::Discard,
    })
    .expect("Linux can be loaded");
    let memory = machine.memory();
    for gfn in USED_BEFORE.start..USED_BEFORE.end() {
        memory.write(gfn, &[0x5a; PAGE_BYTES]).expect("guest memory");
    }
    let options = SaveOptions { stop: true, ..SaveOptions::default() };
    save(&mut machine, dir, &options, &SaveCanceller::default(), &mut |_| {}).expect("a bundle");
}

/// What `ferry balloon linux` says, with `more` arguments.
fn balloon(host: &Host, more: &[&str]) -> Value {
    host.run(&[&["balloon", "linux", "--json"], more].concat()).succeeded().json()
}

#[track_caller]
fn number(balloon: &Value, name: &str) -> u64 {
    balloon[name].as_u64().unwrap_or_else(|| panic!("{name} in {balloon:#}"))
}

/// The guest has `mib` MiB of its memory, and said nothing that makes no sense.
#[track_caller]
fn has(balloon: &Value, mib: u64) {
    assert_eq!(balloon["reached"], true, "{balloon:#}");
    assert_eq!(number(balloon, "actual_bytes"), mib * MIB, "{balloon:#}");
    assert_eq!(number(balloon, "ballooned_bytes"), MEMORY_BYTES - mib * MIB, "{balloon:#}");
    assert_eq!(number(balloon, "troubles"), 0, "{balloon:#}");
}

/// Its reports of free pages gave back what somebody used before; statistics come; the balloon holds pages.
fn gives_memory_back(host: &Host, resident_before: u64) {
    wait_for("the guest reports its free memory", || {
        let resident = number(&balloon(host, &[]), "resident_bytes");
        // Less, although process 1 wrote to 64 MiB since.
        (resident + 32 * MIB < resident_before).then_some(())
    });
    has(&balloon(host, &["--target", "254M"]), 254);
    let shown = balloon(host, &[]);
    let statistics = &shown["statistics"];
    assert!(number(statistics, "total_bytes") < MEMORY_BYTES, "{shown:#}");
    assert!(number(statistics, "free_bytes") > 0, "{shown:#}");
    assert!(number(&shown, "statistics_count") > 1, "it was asked: {shown:#}");
    assert!(number(&shown, "reported_bytes") > 32 * MIB, "{shown:#}");
    let line = host.run(&["vm", "show", "linux"]).succeeded().stdout;
    assert!(line.contains("the guest has 254.00 MiB of 256.00 MiB, as it shall"), "{line}");
    let too_much = host.run(&["balloon", "linux", "--target", "257M"]);
    too_much.failed(&["269484032", "268435456"]);
}

/// The guest says which pages are free, when it is asked, and has them back.
fn hints_at_free_pages(bundle: &Path) {
    let chain = Chain::open(bundle, &[]).expect("a bundle");
    let restored = restore(&RefHost::default(), &chain, "linux", &mut |_| {}).expect("a machine");
    let mut machine = restored.guest;
    machine.resume(restored.permit).expect("it runs");
    machine.begin_free_page_hints().expect("its driver gives hints");
    let mut hints = PageSet::new();
    wait_for("all hints", || machine.take_free_page_hints(&mut hints).then_some(()));
    machine.end_free_page_hints();
    let (free, all) = (hints.len(), hints.count_in(Run::new(0, MEMORY_BYTES / 4096)));
    assert!(free > 32 * MIB / 4096 && free == all, "{hints:?}");
    let free_bytes = |machine: &Machine| {
        machine.ask_balloon_statistics();
        machine.balloon().statistics.and_then(|s| s.free_bytes).unwrap_or(0)
    };
    wait_for("the guest has them back", || (free_bytes(&machine) > 32 * MIB).then_some(()));
    assert_eq!(machine.balloon().troubles, 0, "{:?}", machine.balloon());
    machine.stop();
}

#[test]
fn linux_goes_on_after_ten_moves_in_a_row_and_gives_memory_back_by_its_balloon() {
    let dir = match guest() {
        Ok(dir) if kvm() => dir,
        Ok(_) => return,
        Err(why) => return println!("SKIP: {why}"),
    };
    // Of this thread and all that it starts: where the guest's kernel is emulated and gets half a core, it comes to
    // nothing but timer ticks.
    let _ = rustix::process::setpriority_process(None, -5);
    let hosts = Hosts::new();
    let kernel = hosts.path("vmlinux");
    if let Err(why) = unpack(&dir.join("vmlinux.xz"), &kernel) {
        return println!("SKIP: {why}");
    }
    // A console file on each host: what is said after a move is in the destination's.
    let sides: [(&Host, PathBuf); 2] =
        [(&hosts.source, hosts.path("console-a")), (&hosts.destination, hosts.path("console-b"))];
    let (bundle, files) = (hosts.path("before"), hosts.path("files"));
    std::fs::create_dir(&files).expect("a directory");
    let left = files.join("left");
    write_bundle(&bundle, kernel, dir.join("initrd.gz"));
    let serial = ["--serial", path(&sides[0].1)];
    let mut process =
        hosts.source.start(&[&["restore", path(&bundle), "linux"], &serial[..]].concat());
    process.line("restored from");
    hosts.source.run(&["balloon", "linux", "--target", "128M"]).failed(&["no driver"]);
    let resident = number(&balloon(&hosts.source, &[]), "resident_bytes");
    assert!(resident > USED_BEFORE.pages * PAGE_BYTES as u64);
    hosts.source.run(&["vm", "resume", "linux"]).succeeded();
    wait_for_words(&sides[0].1, PROCESS_1, 0, &mut process);
    gives_memory_back(&hosts.source, resident);
    // The guest is about to do this when it moves.
    balloon(&hosts.source, &["--target", "252M", "--no-wait"]);

    for n in 0..MOVES {
        let ((here, _), (there, console)) = (&sides[n % 2], &sides[(n + 1) % 2]);
        let (receiver, to) =
            there.receive(&["--once", "--serial", path(console), "--files", path(&files)]);
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
        if n == 0 {
            wait_for("all pages", || there.show("linux")?["balloon"].is_object().then_some(()));
            has(&balloon(there, &["--target", "252M"]), 252);
        }
    }
    let (here, _) = &sides[MOVES % 2];
    wait_for("all pages", || here.show("linux")?["balloon"].is_object().then_some(()));
    has(&balloon(here, &["--target", "256M"]), 256);
    here.run(&["save", "linux", path(&left), "--stop"]).succeeded();
    process.end().succeeded();
    hints_at_free_pages(&left);
    for (_, console) in &sides {
        assert!(!read(console).contains("Kernel panic"));
    }
}
