//! The command as people and scripts use it: machines run, are looked at, and move.

use std::net::SocketAddr;
use std::time::Duration;

use ferry_e2e::{Hosts, Moved, Running, kvm, path, wait_for};
use serde_json::Value;

use crate::stage::HugePages;

const PROCESS: &str = ":process";
const KVM: &str = ":guest";
/// Page bytes leave so slowly that a migration of a busy guest lasts as long as a test needs.
const SLOW: [&str; 2] = ["--bandwidth", "20Mbit"];
/// More than `SLOW` carries in a while, and than may leave at once.
const LARGE: &str = "pattern=working-set set=24M rate=4000 random=100 fill=all";

/// A busy machine `m` at the source, and a destination that takes one machine.
fn set_out(kernel: &str, more: &[&str]) -> (Hosts, Running, Running, SocketAddr) {
    let hosts = Hosts::new();
    let (receiver, to) = hosts.destination.receive(&["--once"]);
    let runner = hosts.source.boot("m", kernel, more);
    (hosts, runner, receiver, to)
}

#[track_caller]
fn is_number(report: &Value, name: &str) {
    let number = report[name].as_f64().unwrap_or_else(|| panic!("{name} in {report:#}"));
    assert!(number >= 0.0, "{name} in {report:#}");
}

/// Every field that scripts are promised, with its type.
#[track_caller]
fn is_complete(moved: &Moved) {
    let report = &moved.report;
    for name in ["outcome", "reason", "mode"] {
        assert!(report[name].as_str().is_some_and(|s| !s.is_empty()), "{name} in {report:#}");
    }
    assert_eq!(report["mode"], "pre-copy");
    is_number(report, "total_ms");
    is_number(report, "downtime_ms");
    assert!(report["bytes_sent"].is_u64() && report["rounds"].is_u64(), "{report:#}");
    assert!(report["digest_verified"].is_boolean(), "{report:#}");
    for part in report["downtime_parts_ms"].as_object().expect("parts").keys() {
        is_number(&report["downtime_parts_ms"], part);
    }
    for codec in report["pages"].as_object().expect("codecs").keys() {
        assert!(report["pages"][codec].is_u64(), "{report:#}");
    }
}

/// What a machine that moves leaves behind and finds: nothing, and itself.
fn moves_and_runs_on(kernel: &str, more: &[&str]) {
    let (hosts, runner, receiver, to) = set_out(kernel, more);
    let moved = hosts.source.migrate("m", to, &[]);
    is_complete(moved.completed());
    let report = &moved.report;
    let part = |name: &str| report["downtime_parts_ms"][name].as_f64().expect("a part");
    let parts = ["pause", "last_harvest", "last_pages", "state", "flight", "resume"].map(part);
    let downtime = report["downtime_ms"].as_f64().expect("a number");
    assert!((parts.iter().sum::<f64>() - downtime).abs() < 0.01, "{report:#}");
    assert!(
        downtime > 0.0 && downtime < report["total_ms"].as_f64().expect("a number"),
        "{report:#}"
    );
    let pages: u64 =
        report["pages"].as_object().expect("codecs").values().filter_map(Value::as_u64).sum();
    assert!(pages > 0 && report["bytes_sent"].as_u64() > Some(0), "{report:#}");
    assert_eq!(report["machine"], "runs_at_destination");

    hosts.destination.works("m");
    let left = runner.end().succeeded();
    assert!(left.stderr.contains(&format!("moved to {to}")), "{left:?}");
    assert!(hosts.source.machines().is_empty());
    let listed = hosts.source.run(&["vm", "list"]).succeeded();
    assert!(listed.stdout.contains("no machine runs here"), "{listed:?}");
    receiver.line("its memory is the same as at the source");
    hosts.destination.run(&["vm", "stop", "m"]).succeeded();
    receiver.end().succeeded();
}

#[test]
fn a_process_guest_moves_and_runs_on() {
    moves_and_runs_on(PROCESS, &["--cpus", "2"]);
}

#[test]
fn a_kvm_machine_moves_and_runs_on() {
    if kvm() {
        moves_and_runs_on(KVM, &["--cpus", "2", "--memory", "256M"]);
    }
}

#[test]
fn every_dirty_log_carries_a_busy_kvm_machine() {
    if !kvm() {
        return;
    }
    for (log, shown) in [("bitmap", "bitmap"), ("ring", "ring"), ("write-protect", "write")] {
        let (hosts, _runner, _receiver, to) = set_out(KVM, &["--dirty-log", log, "--cpus", "2"]);
        let machine = hosts.source.show("m").expect("it runs");
        let words = machine["dirty_log"].as_str().expect("text").to_lowercase();
        assert!(words.contains(shown), "{log}: {machine:#}");
        let moved = hosts.source.migrate("m", to, &[]);
        moved.completed();
        // It was busy: pages came dirty while round 1 was sent.
        assert!(moved.report["rounds"].as_u64() > Some(1), "{log}: {:#}", moved.report);
        hosts.destination.works("m");
    }
}

#[test]
fn a_process_guest_goes_there_and_back_four_times() {
    Hosts::new().to_and_fro(PROCESS, 8);
}

#[test]
fn a_kvm_machine_goes_there_and_back_four_times() {
    if kvm() {
        Hosts::new().to_and_fro(KVM, 8);
    }
}

fn can_be_controlled(kernel: &str, kind: &str) {
    let host = Hosts::new().source;
    let runner = host.boot("m", kernel, &["--cpus", "2"]);
    let listed = host.run(&["vm", "list"]).succeeded().stdout;
    let row = listed.lines().find(|l| l.starts_with("m ")).expect("a row");
    assert!(row.contains(kind) && row.contains("64 MiB") && row.ends_with("running"), "{listed}");
    let shown = host.run(&["vm", "show", "m"]).succeeded().stdout;
    assert!(shown.contains(&format!("{kind}, 2 vCPUs")) && shown.contains("running"), "{shown}");

    host.run(&["vm", "pause", "m"]).succeeded();
    assert_eq!(host.state("m"), "paused");
    let checked = host.checked("m");
    std::thread::sleep(Duration::from_millis(300));
    assert_eq!(host.checked("m"), checked, "a paused machine does not work");
    host.run(&["vm", "pause", "m"]).succeeded();
    host.run(&["vm", "resume", "m"]).succeeded();
    host.works("m");
    host.run(&["cancel", "m"]).failed(&["m", "is not moving"]);
    host.run(&["tune", "m", "--max-total", "1m"]).failed(&["m", "is not moving"]);

    let stopped = host.run(&["vm", "stop", "m"]).succeeded();
    assert!(stopped.stdout.contains("stopped"), "{stopped:?}");
    runner.end().succeeded();
    assert!(host.machines().is_empty());
    host.run(&["vm", "show", "m"]).failed(&["no machine `m`"]);
}

#[test]
fn a_process_guest_can_be_listed_shown_paused_resumed_and_stopped() {
    can_be_controlled(PROCESS, "process");
}

#[test]
fn a_kvm_machine_can_be_listed_shown_paused_resumed_and_stopped() {
    if kvm() {
        can_be_controlled(KVM, "kvm");
    }
}

#[test]
fn a_guest_has_as_much_memory_as_it_is_told_to_have() {
    let host = Hosts::new().source;
    let mut kinds = vec![("m", PROCESS)];
    if kvm() {
        kinds.push(("k", KVM));
    }
    for (name, kernel) in kinds {
        let _runner = host.boot(name, kernel, &[]);
        host.works(name);
        for (target, bytes) in [("32M", 32 << 20), ("64M", 64 << 20)] {
            host.run(&["balloon", name, "--target", target]).succeeded();
            let shown = host.run(&["balloon", name, "--json"]).json();
            assert_eq!(
                (&shown["reached"], &shown["actual_bytes"]),
                (&true.into(), &u64::into(bytes)),
                "{shown}"
            );
            host.works(name);
        }
        host.run(&["balloon", name, "--target", "1T"]).failed(&["67108864"]);
    }
    host.run(&["balloon", "n", "--target", "32M"]).failed(&["no machine `n`"]);
}

fn stays_paused(kernel: &str) {
    let (hosts, runner, _receiver, to) = set_out(kernel, &[]);
    hosts.source.run(&["vm", "pause", "m"]).succeeded();
    let checked = hosts.source.checked("m");
    hosts.source.migrate("m", to, &[]).completed();
    runner.end().succeeded();
    wait_for("the machine is hosted", || hosts.destination.show("m"));
    assert_eq!(hosts.destination.state("m"), "paused");
    std::thread::sleep(Duration::from_millis(300));
    assert_eq!(hosts.destination.checked("m"), checked, "a paused machine does not work");
    hosts.destination.run(&["vm", "resume", "m"]).succeeded();
    hosts.destination.works("m");
}

#[test]
fn a_paused_process_guest_arrives_paused() {
    stays_paused(PROCESS);
}

#[test]
fn a_paused_kvm_machine_arrives_paused() {
    if kvm() {
        stays_paused(KVM);
    }
}

fn can_be_cancelled(kernel: &str) {
    let (hosts, _runner, receiver, to) = set_out(kernel, &["--cmdline", LARGE]);
    let set_off = || {
        let moving = hosts.source.start_migrate("m", to, &[&SLOW[..], &["--json"]].concat());
        wait_for("it moves", || {
            let shown = hosts.source.show("m")?;
            (shown["migrating_to"] == to.to_string()).then_some(())
        });
        moving
    };
    let moving = set_off();
    receiver.line("is coming from");
    // What would disturb it is refused, and says what to do.
    for command in ["pause", "resume", "stop"] {
        hosts.source.run(&["vm", command, "m"]).failed(&["is moving to", "ferry cancel m"]);
    }
    let again = hosts.source.migrate("m", to, &[]);
    again.stayed("failed", &["is moving to", "ferry cancel m"]);
    hosts.source.works("m");

    hosts.source.run(&["cancel", "m"]).succeeded();
    let cancelled = Moved::from(moving.end());
    cancelled.stayed("cancelled", &["cancelled"]);
    is_complete(&cancelled);
    receiver.line("did not come");
    hosts.source.works("m");
    assert!(hosts.destination.machines().is_empty());
    // A destination that takes one machine still waits for it; the link may be used in full after all.
    let moving = set_off();
    hosts.source.run(&["tune", "m", "--bandwidth", "none", "--max-downtime", "1s"]).succeeded();
    Moved::from(moving.end()).completed();
    hosts.destination.works("m");
}

#[test]
fn a_cancelled_process_guest_runs_on_and_can_be_moved_afterwards() {
    can_be_cancelled(PROCESS);
}

#[test]
fn a_cancelled_kvm_machine_runs_on_and_can_be_moved_afterwards() {
    if kvm() {
        can_be_cancelled(KVM);
    }
}

#[test]
fn a_migration_that_takes_too_long_fails_in_words_and_the_machine_runs_on() {
    let (hosts, _runner, _receiver, to) = set_out(PROCESS, &["--cmdline", LARGE]);
    let moved = hosts.source.migrate(
        "m",
        to,
        &[&SLOW[..], &["--mode", "pre-copy", "--max-total", "1s"]].concat(),
    );
    moved.stayed("failed", &["--max-total", "1.0 s"]);
    hosts.source.works("m");
    hosts.source.migrate("m", to, &[]).completed();
    hosts.destination.works("m");
}

#[test]
fn a_destination_takes_one_machine_after_the_other() {
    let hosts = Hosts::new();
    let (mut receiver, to) = hosts.destination.receive(&[]);
    for name in ["one", "two"] {
        let _runner = hosts.source.boot(name, PROCESS, &[]);
        hosts.source.migrate(name, to, &[]).completed();
        hosts.destination.works(name);
    }
    assert_eq!(hosts.destination.machines(), ["one", "two"]);
    for name in ["one", "two"] {
        hosts.destination.run(&["vm", "stop", name]).succeeded();
        receiver.line(&format!("`{name}` was stopped"));
    }
    assert!(receiver.is_alive(), "without --once it waits for more");
}

#[test]
fn a_destination_that_has_its_one_machine_refuses_the_second() {
    let (hosts, _runner, _receiver, to) = set_out(PROCESS, &[]);
    hosts.source.migrate("m", to, &[]).completed();
    let _second = hosts.source.boot("second", PROCESS, &[]);
    hosts.source.migrate("second", to, &[]).stayed("refused", &["one machine", "--once"]);
    hosts.source.works("second");
    hosts.destination.works("m");
}

fn takes_another_name(kernel: &str) {
    let hosts = Hosts::new();
    let (_receiver, to) = hosts.destination.receive(&["--once", "--name", "renamed"]);
    let _runner = hosts.source.boot("m", kernel, &[]);
    hosts.source.migrate("m", to, &[]).completed();
    hosts.destination.works("renamed");
    assert_eq!(hosts.destination.machines(), ["renamed"]);
    // The name is its own from here on.
    let (_receiver, back) = hosts.source.receive(&["--once"]);
    hosts.destination.migrate("renamed", back, &[]).completed();
    hosts.source.works("renamed");
}

#[test]
fn a_process_guest_can_have_another_name_at_the_destination() {
    takes_another_name(PROCESS);
}

#[test]
fn a_kvm_machine_can_have_another_name_at_the_destination() {
    if kvm() {
        takes_another_name(KVM);
    }
}

#[test]
fn without_a_terminal_progress_is_plain_lines() {
    let (hosts, _runner, _receiver, to) = set_out(PROCESS, &[]);
    let done = hosts.source.start_migrate("m", to, &[]).end().succeeded();
    for words in ["the destination takes the machine", "round 1: ", "the guest stands still"] {
        assert!(done.stderr.lines().any(|l| l.starts_with(words)), "`{words}` in {}", done.stderr);
    }
    for words in ["machine `m` moved to", "downtime", "pages", "the same on both sides"] {
        assert!(done.stdout.contains(words), "`{words}` in {}", done.stdout);
    }
    let both = done.stdout + &done.stderr;
    assert!(!both.contains(['\r', '\u{1b}']), "{both:?}");
}

#[test]
fn a_console_file_is_appended_to() {
    if !kvm() {
        return;
    }
    let hosts = Hosts::new();
    let console = hosts.path("console");
    std::fs::write(&console, "what was there\n").expect("a file");
    let (_receiver, to) = hosts.destination.receive(&["--once", "--serial", path(&console)]);
    let _runner = hosts.source.boot("m", KVM, &["--serial", path(&console)]);
    let text = || std::fs::read_to_string(&console).expect("a file");
    let booted = text();
    assert!(booted.starts_with("what was there\n") && booted.lines().count() > 1, "{booted}");
    hosts.source.migrate("m", to, &[]).completed();
    hosts.destination.works("m");
    assert!(text().starts_with(&booted), "what the source wrote is kept");
}

#[test]
fn machines_in_huge_pages_move_to_hosts_with_and_without_and_are_restored_lazily() {
    const MEMORY: u64 = 64 << 20;
    let Some(_reserved) = HugePages::reserve(3 * MEMORY) else { return };
    let kernels: &[&str] = if kvm() { &[PROCESS, KVM] } else { &[PROCESS] };
    for kernel in kernels {
        let mut hosts = Hosts::new();
        let huge = ["--memory", "64M", "--huge-pages", "--cmdline", ferry_e2e::BUSY];
        let mut process = hosts.source.boot("m", kernel, &huge);
        let bundle = hosts.path("bundle");
        std::fs::create_dir(&bundle).expect("made");
        for (mode, here) in [("post-copy", true), ("pre-copy", false), ("hybrid", true)] {
            // Where it is saved, at the end of this life.
            let files = ["--once", "--files", path(&bundle), "--huge-pages"];
            let (receiver, to) = hosts.destination.receive(&files[..if here { 4 } else { 3 }]);
            hosts.source.migrate("m", to, &["--mode", mode]).completed();
            hosts.destination.works("m");
            process.end().succeeded();
            process = receiver;
            std::mem::swap(&mut hosts.source, &mut hosts.destination);
        }
        hosts.source.run(&["save", "m", path(&bundle), "--stop"]).succeeded();
        process.end();
        let args = ["restore", path(&bundle), "m", "--lazy", "--huge-pages"];
        let restored = hosts.source.start(&args);
        restored.line("all pages are here");
        hosts.source.works("m");
        hosts.source.run(&["vm", "stop", "m"]).succeeded();
        restored.end().succeeded();
    }
    let hosts = Hosts::new();
    let args = ["vm", "run", "m", "--kernel", PROCESS, "--memory", "1T", "--huge-pages"];
    hosts.source.run(&args).failed(&["vm.nr_hugepages="]);
}
