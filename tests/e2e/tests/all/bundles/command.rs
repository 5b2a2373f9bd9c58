//! `ferry save`, `restore` and `bundle`, as people and scripts use them.

use std::path::Path;

use ferry_e2e::{Host, Hosts, Running, kvm, path, wait_for};

pub(crate) const PROCESS: &str = ":process";
const KVM: &str = ":guest";

/// `ferry restore`; back when the machine is there.
pub(crate) fn restore(host: &Host, dir: &Path, name: &str, more: &[&str]) -> Running {
    let running = host.start(&[&["restore", path(dir), name], more].concat());
    running.line("restored from");
    running
}

fn saves_and_restores(kernel: &str) {
    let hosts = Hosts::new();
    let (one, two) = (hosts.path("one"), hosts.path("two"));
    let _runner = hosts.source.boot("m", kernel, &["--cpus", "2"]);
    let done = hosts.source.run(&["save", "m", path(&one)]).succeeded();
    for words in ["machine `m` saved to", "it stood still for", " ms", "bundle", "size"] {
        assert!(done.stdout.contains(words), "`{words}` in {done:?}");
    }
    assert!(done.stderr.starts_with("round 1: "), "{done:?}");
    hosts.source.works("m");

    let report = hosts.source.run(&["save", "m", path(&two), "--base", path(&one), "--json"]);
    let report = report.succeeded().json();
    assert!(report["stop_ms"].as_f64() < report["total_ms"].as_f64(), "{report:#}");
    assert_eq!(report["runs_on"], true);
    hosts.source.works("m");

    // A clone, under another name, on another host.
    let _clone = restore(&hosts.destination, &two, "clone", &[]);
    hosts.destination.works("clone");
    hosts.source.works("m");
    assert_eq!(hosts.destination.machines(), ["clone"]);

    // It moves as any machine does.
    let (_receiver, to) = hosts.source.receive(&["--once"]);
    hosts.destination.migrate("clone", to, &[]).completed();
    hosts.source.works("clone");
}

#[test]
fn a_process_guest_is_saved_while_it_runs_and_a_clone_starts_elsewhere() {
    saves_and_restores(PROCESS);
}

#[test]
fn a_kvm_machine_is_saved_while_it_runs_and_a_clone_starts_elsewhere() {
    if kvm() {
        saves_and_restores(KVM);
    }
}

fn is_saved_for_good(kernel: &str) {
    let hosts = Hosts::new();
    let dir = hosts.path("b");
    let runner = hosts.source.boot("m", kernel, &[]);
    let checked = hosts.source.checked("m");
    let done = hosts.source.run(&["save", "m", path(&dir), "--stop"]).succeeded();
    assert!(done.stdout.contains("and ended"), "{done:?}");
    let left = runner.end().succeeded();
    assert!(left.stderr.contains("machine `m` was saved to"), "{left:?}");
    assert!(hosts.source.machines().is_empty());

    let _again = restore(&hosts.destination, &dir, "m", &[]);
    assert!(hosts.destination.checked("m") >= checked, "its counters came along");
    hosts.destination.works("m");
}

#[test]
fn a_process_guest_that_is_saved_with_stop_ends_and_goes_on_where_it_is_restored() {
    is_saved_for_good(PROCESS);
}

#[test]
fn a_kvm_machine_that_is_saved_with_stop_ends_and_goes_on_where_it_is_restored() {
    if kvm() {
        is_saved_for_good(KVM);
    }
}

#[test]
fn a_chain_is_shown_verified_and_merged_to_the_same_machine() {
    let hosts = Hosts::new();
    let host = &hosts.source;
    let dirs = ["0", "1", "2"].map(|n| hosts.path(n));
    let cmdline = "pattern=working-set set=1M rate=2000 arena=16M fill=all random=60";
    let _runner = host.boot("m", PROCESS, &["--cmdline", cmdline]);
    // All of its arena is filled before it begins.
    host.works("m");
    host.run(&["save", "m", path(&dirs[0])]).succeeded();
    for pair in dirs.windows(2) {
        host.works("m");
        host.run(&["save", "m", path(&pair[1]), "--base", path(&pair[0])]).succeeded();
    }
    let info = |dir: &Path| host.run(&["bundle", "info", path(dir), "--json"]).succeeded().json();
    let before = info(&dirs[2]);
    let chain = before["chain"].as_array().expect("a chain");
    assert_eq!(chain.len(), 3);
    assert!(chain[2]["bytes"].as_u64() > chain[0]["bytes"].as_u64(), "{before:#}");
    let shown = host.run(&["bundle", "info", path(&dirs[2])]).succeeded().stdout;
    assert!(shown.contains("`m`") && shown.matches("\nbase ").count() == 2, "{shown}");

    let full = hosts.path("full");
    host.run(&["bundle", "merge", path(&dirs[2]), "--into", path(&full)]).succeeded();
    host.run(&["bundle", "merge", path(&dirs[2])]).succeeded();
    for dir in [&full, &dirs[2]] {
        let after = info(dir);
        assert_eq!(after["chain"].as_array().map(Vec::len), Some(1), "{after:#}");
        for same in ["id", "memory_digest", "data_pages", "state_bytes", "machine"] {
            assert_eq!(after[same], before[same], "{same}");
        }
    }
    std::fs::remove_dir_all(&dirs[0]).expect("a directory");
    host.run(&["bundle", "verify", path(&dirs[1])]).failed(&["needs its base", "--base"]);
    let verified = host.run(&["bundle", "verify", path(&dirs[2]), "--json"]).succeeded().json();
    assert_eq!(verified["pages"], before["data_pages"]);
    let _again = restore(host, &dirs[2], "again", &[]);
    host.works("again");
}

#[test]
fn a_machine_that_the_operator_paused_is_restored_paused() {
    let hosts = Hosts::new();
    let dir = hosts.path("b");
    let _runner = hosts.source.boot("m", PROCESS, &[]);
    hosts.source.run(&["vm", "pause", "m"]).succeeded();
    let checked = hosts.source.checked("m");
    hosts.source.run(&["save", "m", path(&dir)]).succeeded();
    assert_eq!(hosts.source.state("m"), "paused");
    let _again = restore(&hosts.destination, &dir, "m", &[]);
    assert_eq!(hosts.destination.state("m"), "paused");
    assert_eq!(hosts.destination.checked("m"), checked);
    hosts.destination.run(&["vm", "resume", "m"]).succeeded();
    hosts.destination.works("m");
}

#[test]
fn a_restored_console_goes_on_in_its_file() {
    if !kvm() {
        return;
    }
    let hosts = Hosts::new();
    let (dir, console) = (hosts.path("b"), hosts.path("console"));
    std::fs::write(&console, "what was there\n").expect("a file");
    let _runner = hosts.source.boot("m", KVM, &[]);
    hosts.source.run(&["save", "m", path(&dir)]).succeeded();
    let more = ["--serial", path(&console), "--dirty-log", "ring"];
    let _again = restore(&hosts.destination, &dir, "m", &more);
    hosts.destination.works("m");
    let shown = hosts.destination.show("m").expect("it runs");
    assert!(shown["dirty_log"].as_str().is_some_and(|log| log.contains("ring")), "{shown:#}");
    assert!(std::fs::read_to_string(&console).expect("a file").starts_with("what was there\n"));
}

#[test]
fn a_machine_that_is_being_saved_is_left_alone_and_the_save_can_be_cancelled() {
    let hosts = Hosts::new();
    let host = &hosts.source;
    let dir = hosts.path("b");
    let large = [
        "--memory",
        "1G",
        "--cpus",
        "2",
        "--cmdline",
        "pattern=working-set set=4M rate=1000 fill=all fill_random=100 random=100",
    ];
    let _runner = host.boot("m", PROCESS, &large);
    let saving = host.start(&["save", "m", path(&dir)]);
    wait_for("it is being saved", || (host.show("m")?["saving_to"] == path(&dir)).then_some(()));
    for command in ["pause", "stop"] {
        host.run(&["vm", command, "m"]).failed(&["is being saved to", "ferry cancel m"]);
    }
    host.run(&["save", "m", path(&hosts.path("c"))]).failed(&["is being saved to"]);
    host.run(&["cancel", "m"]).succeeded();
    let cancelled = saving.end();
    assert_eq!(cancelled.status, Some(1), "{cancelled:?}");
    assert!(
        cancelled.stderr.contains("cancelled") && cancelled.stderr.contains("goes on"),
        "{cancelled:?}"
    );
    assert!(!dir.exists() && !hosts.path("c").exists());
    host.works("m");
}
