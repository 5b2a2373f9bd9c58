//! Machines in several processes whose equal pages the kernel merges, by the real command: they are found, told of
//! once, go on right when they are written, and move.
//!
//! The kernel's merging is the host's, so these tests run one after the other; where it is not to be had, they say
//! so and are skipped.

use std::fs::{File, OpenOptions};
use std::process::Child;
use std::sync::{Mutex, MutexGuard, PoisonError};

use ferry_e2e::{Host, Hosts, Running, kvm, path, wait_for};
use serde_json::Value;

const PROCESS: &str = ":process";
const KVM: &str = ":guest";
const ARENA: u64 = 32 << 20;
/// Filled with pages that differ from each other, and are the same in each machine of one seed; then one after the
/// other is checked and written, in no order and in no hurry.
const QUIET: &str = "pattern=random rate=400 arena=32M fill=all fill_random=60";

static ALONE: Mutex<()> = Mutex::new(());

/// The host's merging for one test; none, and a line that says why, where it is not to be had.
fn merging() -> Option<(MutexGuard<'static, ()>, File)> {
    const RUN: &str = "/sys/kernel/mm/ksm/run";
    let here = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    if let Err(e) = OpenOptions::new().write(true).open(RUN) {
        println!("SKIP: {RUN} cannot be opened: {e}");
        return None;
    }
    if std::fs::read_to_string(RUN).is_ok_and(|run| run.trim() == "2") {
        println!("SKIP: {RUN} says that merging is turned off");
        return None;
    }
    // As other tests of it do.
    let host = File::create(std::env::temp_dir().join("ferry-test-ksm.lock")).expect("a file");
    host.lock().expect("a lock");
    Some((here, host))
}

fn kernels() -> Vec<&'static str> {
    if kvm() { vec![PROCESS, KVM] } else { vec![PROCESS] }
}

fn boot(host: &Host, name: &str, kernel: &str, seed: u32) -> Running {
    host.boot(name, kernel, &["--cmdline", &format!("{QUIET} seed={seed}")])
}

/// `ferry memory share`, as soon as no other tenant's pages are merged on the host.
fn share(host: &Host, names: &[&str], more: &[&str]) -> Value {
    wait_for("pages are shared", || {
        let done = host.run(&[&["memory", "share", "--json"], names, more].concat());
        let others = done.stderr.contains("are merged on this host now")
            || done.stderr.contains("another process has the kernel merge");
        (!others).then(|| done.succeeded().json())
    })
}

/// A process that is killed when this is dropped.
struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        // It may have ended.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn bytes(value: &Value, key: &str) -> u64 {
    value[key].as_u64().unwrap_or_else(|| panic!("no {key} in {value:#}"))
}

fn merged(host: &Host, name: &str) -> u64 {
    bytes(&host.show(name).expect("it runs"), "merged_bytes")
}

#[test]
fn equal_pages_of_two_processes_are_merged_and_what_that_saves_is_told_once() {
    let Some(_alone) = merging() else { return };
    for kernel in kernels() {
        let host = Hosts::new().source;
        let _machines = [boot(&host, "a", kernel, 7101), boot(&host, "b", kernel, 7101)];
        let shared = share(&host, &["a", "b"], &[]);
        let (all, saves) = (bytes(&shared, "merged_bytes"), bytes(&shared, "saves_bytes"));
        // Of the 32 MiB of each, some changed.
        assert!(all > ARENA && all <= 2 * (64 << 20), "{shared:#}");
        assert!(saves > ARENA / 2, "{shared:#}");
        let report = host.run(&["memory", "report", "--json"]).succeeded().json();
        let (a, b) = (&report["machines"][0], &report["machines"][1]);
        for (key, of_a, of_b) in [("shared", a, b), ("saved", a, b), ("held", a, b)] {
            let sum = bytes(of_a, key) + bytes(of_b, key);
            assert_eq!(bytes(&report["total"], key), sum, "{key}: {report:#}");
        }
        let (a, b) = (host.show("a").expect("it runs"), host.show("b").expect("it runs"));
        let pairs = bytes(&a, "merged_bytes") + bytes(&b, "merged_bytes");
        let saved = bytes(&a, "merged_saves_bytes") + bytes(&b, "merged_saves_bytes");
        // Two pages become one: half of them is saved, and not each.
        assert!(saved.abs_diff(pairs / 2) <= pairs / 16, "{saved} of {pairs}: {report:#}");
        let shown = host.run(&["vm", "show", "a"]).succeeded().stdout;
        assert!(shown.contains("sharing  ") && shown.contains("merged  "), "{shown}");
    }
}

#[test]
fn machines_go_on_right_while_they_are_merged_and_when_they_write_what_was() {
    let Some(_alone) = merging() else { return };
    for kernel in kernels() {
        let host = Hosts::new().source;
        let busy = QUIET.replace("rate=400", "rate=1500") + " seed=7102";
        let machine = |name| host.boot(name, kernel, &["--cmdline", &busy]);
        let _machines = [machine("a"), machine("b")];
        share(&host, &["a", "b"], &[]);
        let before = merged(&host, "a");
        assert!(before > 0);
        let checked = host.checked("a");
        wait_for("most pages are checked and written", || {
            (host.checked("a") > checked + ARENA / 4096).then_some(())
        });
        // No thread of the kernel came by: that they are their own again is seen at once.
        let after = merged(&host, "a");
        assert!(after < before / 2, "{after} of {before}");
        share(&host, &["a", "b"], &[]);
        host.works("a");
        host.works("b");
    }
}

#[test]
fn pages_of_different_tenants_are_not_merged_with_each_other() {
    let Some(_alone) = merging() else { return };
    let host = Hosts::new().source;
    let _machines = ["a", "b", "c"].map(|name| boot(&host, name, PROCESS, 7103));
    for (name, tenant) in [("a", "one"), ("b", "one"), ("c", "two")] {
        share(&host, &[name], &["--tenant", tenant]);
        assert_eq!(merged(&host, name), 0, "nothing in it is equal to anything in it");
    }
    share(&host, &["a", "c"], &[]);
    assert_eq!(merged(&host, "a") + merged(&host, "c"), 0);
    share(&host, &["a", "b", "c"], &[]);
    assert!(merged(&host, "a") > ARENA / 2 && merged(&host, "b") > ARENA / 2);
    assert_eq!(merged(&host, "c"), 0);
    // What is merged for one is no other's.
    let moved = host.run(&["memory", "share", "a", "c", "--tenant", "two"]);
    moved.failed(&["pages of tenant \"one\" are merged on this host now", "it has no swap"]);
    assert_eq!(merged(&host, "a") + merged(&host, "c"), 0);
    ["a", "b", "c"].iter().for_each(|name| host.works(name));
}

#[test]
fn a_manager_that_is_short_of_memory_merges_and_says_so() {
    let Some(_alone) = merging() else { return };
    let hosts = Hosts::new();
    let (host, plan) = (&hosts.source, hosts.path("plan.toml"));
    let swap = hosts.path("swap");
    std::fs::create_dir(&swap).expect("a directory");
    // They use more than there is, and trust each other.
    let machine = |name, tenant| {
        format!(
            "[[machine]]\nname = \"{name}\"\nsize = \"64M\"\ntenant = \"{tenant}\"\nballoon = false\n"
        )
    };
    let text = format!(
        "[host]\nbudget = \"80M\"\nheadroom = \"4M\"\noverhead = \"4M\"\nshare_between_tenants = true\n\
         [swap]\ndir = {swap:?}\nsize = \"256M\"\npool = \"16M\"\n{}{}",
        machine("a", "one"),
        machine("b", "two"),
    );
    std::fs::write(&plan, text).expect("a file");
    let machines = [boot(host, "a", PROCESS, 7104), boot(host, "b", PROCESS, 7104)];
    let said = hosts.path("said");
    let mut manager = Killed(
        host.command(&["memory", "run", path(&plan)])
            .stdout(File::create(&said).expect("a file"))
            .spawn()
            .expect("it starts"),
    );
    wait_for("both are merged, and that is told", || {
        let said = std::fs::read_to_string(&said).expect("a file");
        let told = said
            .lines()
            .any(|l| l.starts_with("sharing: ") && l.contains(" merged of a, b; saves "));
        (told && merged(host, "a") > 4 << 20 && merged(host, "b") > 4 << 20).then_some(())
    });
    assert!(manager.0.try_wait().expect("its state").is_none(), "it goes on");
    drop(manager);
    host.works("a");
    host.works("b");
    assert_eq!(host.show("a").expect("it runs")["sharing"]["why_not"], Value::Null);
    drop(machines);
}

#[test]
fn a_machine_that_was_merged_moves_and_is_saved_as_any_other() {
    let Some(_alone) = merging() else { return };
    for kernel in kernels() {
        for mode in ["pre-copy", "post-copy"] {
            let hosts = Hosts::new();
            let _machines =
                [boot(&hosts.source, "a", kernel, 7105), boot(&hosts.source, "b", kernel, 7105)];
            share(&hosts.source, &["a", "b"], &[]);
            assert!(merged(&hosts.source, "a") > 0);
            let bundle = hosts.path("bundle");
            hosts.source.run(&["save", "a", path(&bundle)]).succeeded();
            let (_receiver, to) = hosts.destination.receive(&["--once"]);
            hosts.source.migrate("a", to, &["--mode", mode]).completed();
            hosts.destination.works("a");
            hosts.source.works("b");
            // There it is looked at from the beginning.
            wait_for("all pages are there", || {
                (hosts.destination.state("a") == "running").then_some(())
            });
            assert_eq!(hosts.destination.show("a").expect("it runs")["sharing"], Value::Null);
            share(&hosts.destination, &["a"], &[]);
            hosts.destination.works("a");
        }
    }
}

#[test]
fn a_move_ends_looking_for_equal_pages_and_has_its_trackers_for_itself() {
    let Some(_alone) = merging() else { return };
    for kernel in kernels() {
        let hosts = Hosts::new();
        let host = &hosts.source;
        let _machines = [boot(host, "a", kernel, 7106), boot(host, "b", kernel, 7106)];
        share(host, &["a", "b"], &[]);
        let (_receiver, to) = hosts.destination.receive(&["--once"]);
        // Passes and a burst are under way when it begins.
        let sharing = host.start(&["memory", "share", "a", "b"]);
        let moving = host.start_migrate("a", to, &["--bandwidth", "100Mbit", "--json"]);
        wait_for("it moves", || (!host.show("a")?["migrating_to"].is_null()).then_some(()));
        host.run(&["memory", "share", "a"]).failed(&["machine `a`", "is moving to"]);
        host.works("b");
        ferry_e2e::Moved::from(moving.end()).completed();
        hosts.destination.works("a");
        // What became of `a` meanwhile is told, whatever it was.
        sharing.end();
        share(host, &["b"], &[]);
        host.works("b");
    }
}

#[test]
fn a_machine_that_still_fetches_pages_is_not_looked_at() {
    let Some(_alone) = merging() else { return };
    let hosts = Hosts::new();
    let (_receiver, to) = hosts.destination.receive(&["--once"]);
    let _runner = boot(&hosts.source, "a", PROCESS, 7107);
    let args = ["--mode", "post-copy", "--bandwidth", "32Mbit"];
    let moving = hosts.source.start_migrate("a", to, &args);
    moving.line("it fetches ");
    wait_for("it runs there", || hosts.destination.show("a"));
    let refused = hosts.destination.run(&["memory", "share", "a"]);
    refused.failed(&["machine `a` runs here and is still fetching pages"]);
    moving.end().succeeded();
    wait_for("all are there", || (hosts.destination.state("a") == "running").then_some(()));
    share(&hosts.destination, &["a"], &[]);
    hosts.destination.works("a");
    hosts.destination.run(&["memory", "share", "nobody"]).failed(&["no machine `nobody`"]);
}
