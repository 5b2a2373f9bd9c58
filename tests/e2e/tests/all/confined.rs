//! A process that receives machines has given up what it does not need, and all that operators do still works; and
//! nothing that ferry makes is for other users.

use std::fs::{self, Permissions};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use ferry_e2e::{Host, Hosts, Running, kvm, path};

const PROCESS: &str = ":process";
const KVM: &str = ":guest";

fn kernels() -> &'static [&'static str] {
    if kvm() { &[PROCESS, KVM] } else { &[PROCESS] }
}

/// Moves `m` from `from` to a process on `to` that ends when it is gone, by post-copy.
fn move_on(hosts: (&Host, &Host), more: &[&str]) -> Running {
    let (from, to) = hosts;
    let (receiver, addr) = to.receive(&[&["--once"], more].concat());
    from.migrate("m", addr, &["--mode", "post-copy"]).completed();
    to.works("m");
    receiver
}

/// `name` in `/proc/…/status` of each thread of the process that hosts `m`.
fn of_threads(host: &Host, name: &str) -> Vec<String> {
    let pid = host.show("m").expect("it is here")["pid"].as_u64().expect("a number");
    let threads = fs::read_dir(format!("/proc/{pid}/task")).expect("it runs");
    let status = |thread: PathBuf| fs::read_to_string(thread.join("status"));
    // A thread may end while it is looked at.
    let all = threads.flatten().filter_map(|thread| status(thread.path()).ok());
    let of = |status: String| {
        let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
        line.expect("a line").trim().to_owned()
    };
    all.map(of).collect()
}

#[test]
fn every_thread_of_a_process_that_received_a_machine_is_confined_and_it_says_so() {
    for kernel in kernels() {
        let hosts = Hosts::new();
        let _source = hosts.source.boot("m", kernel, &[]);
        let receiver = move_on((&hosts.source, &hosts.destination), &["--sandbox", "require"]);
        assert!(receiver.has_said("confined in files, capabilities and system calls"));
        let here = &hosts.destination;
        let seccomp = of_threads(here, "Seccomp");
        assert!(seccomp.len() > 2 && seccomp.iter().all(|mode| mode == "2"), "{seccomp:?}");
        assert!(of_threads(here, "NoNewPrivs").iter().all(|set| set == "1"));
        // CAP_SYS_ADMIN.
        let held = of_threads(here, "CapPrm");
        let number = |hex: &String| u64::from_str_radix(hex, 16).expect("a number");
        assert!(held.iter().all(|held| number(held) >> 21 & 1 == 0), "{held:?}");
    }
}

#[test]
fn without_its_sandbox_a_process_says_that_it_is_not_confined() {
    let hosts = Hosts::new();
    let (receiver, _) = hosts.destination.receive(&["--sandbox", "off"]);
    receiver.line("NOT CONFINED (--sandbox off)");
}

#[test]
fn all_that_is_done_with_a_machine_works_where_it_arrived() {
    for kernel in kernels() {
        let hosts = Hosts::new();
        let (home, away) = (&hosts.source, &hosts.destination);
        let (files, swap) = (hosts.path("files"), hosts.path("swap"));
        for dir in [&files, &swap] {
            fs::create_dir(dir).expect("made");
        }
        let source = home.boot("m", kernel, &[]);
        let swapped = ["--swap-pool", "8M", "--swap-dir", path(&swap), "--swap-size", "64M"];
        let with = [&["--files", path(&files)], &swapped[..]].concat();
        let receiver = move_on((home, away), &with);
        source.end().succeeded();

        away.run(&["memory", "limit", "m", "24M"]).succeeded();
        away.works("m");
        away.run(&["memory", "limit", "m", "none"]).succeeded();
        away.run(&["balloon", "m", "--target", "48M", "--no-wait"]).succeeded();
        away.run(&["vm", "pause", "m"]).succeeded();
        away.run(&["vm", "resume", "m"]).succeeded();
        away.run(&["memory", "report"]).succeeded();
        let (one, two) = (files.join("one"), files.join("two"));
        away.run(&["save", "m", path(&one), "--max-stop", "1m"]).succeeded();
        away.run(&["save", "m", path(&two), "--base", path(&one), "--max-stop", "1m"]).succeeded();
        for bundle in [&one, &two] {
            away.run(&["bundle", "verify", path(bundle)]).succeeded();
        }
        away.works("m");

        // Nothing is there of it, and what is to be done is said.
        let elsewhere = hosts.path("elsewhere");
        let refused = away.run(&["save", "m", path(&elsewhere)]);
        refused.failed(&[path(&elsewhere), path(&files), "--files"]);
        assert!(!elsewhere.exists());
        let refused = away.migrate("m", "127.0.0.1:9", &["--identity", path(&home.identity)]);
        assert!(refused.reason().contains(path(&away.identity)), "{}", refused.reason());
        away.works("m");

        // On, with a spool, to a process that has a bundle of it.
        let spool = files.join("spool");
        let bundles = ["--once", "--bundles", path(&files)];
        let (back, addr) = home.receive(&bundles);
        let by = ["--mode", "hybrid", "--spool", path(&spool)];
        away.migrate("m", addr, &by).completed();
        receiver.end().succeeded();
        home.works("m");
        assert!(back.has_said("are in"), "a bundle was of use");
        home.run(&["vm", "stop", "m"]).succeeded();
        back.end().succeeded();
    }
}

/// Everything beneath `dir` that others than its owner could reach.
fn exposed(dir: &Path) -> Vec<String> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).expect("a directory").map(|entry| entry.expect("an entry")) {
        let about = entry.metadata().expect("it is there");
        if about.mode() & 0o077 != 0 {
            found.push(format!("{} {:o}", entry.path().display(), about.mode()));
        }
        if about.is_dir() {
            found.extend(exposed(&entry.path()));
        }
    }
    found
}

#[test]
fn nothing_that_is_made_is_for_other_users_whatever_the_umask() {
    let mut hosts = Hosts::new();
    for host in [&mut hosts.source, &mut hosts.destination] {
        host.before = ["sh", "-c", "umask 0; exec \"$0\" \"$@\""].map(str::to_owned).into();
    }
    let pki = hosts.path("pki2");
    hosts.source.run(&["pki", "init", path(&pki), "--host", "a"]).succeeded();
    let (home, away) = (&hosts.source, &hosts.destination);
    let (serial, bundle) = (hosts.path("serial"), hosts.path("bundle"));
    let kernel = kernels().last().expect("one at least");
    let _source = home.boot("m", kernel, &["--serial", path(&serial)]);
    home.run(&["save", "m", path(&bundle)]).succeeded();
    let (there, spool) = (hosts.path("there"), hosts.path("spool"));
    let (_receiver, addr) = away.receive(&["--serial", path(&there)]);
    let moved = home.migrate("m", addr, &["--mode", "post-copy", "--spool", path(&spool)]);
    moved.completed();
    away.works("m");
    let all: Vec<PathBuf> = [serial, there, bundle].into();
    assert!(all.iter().all(|made| made.exists() || *kernel == PROCESS), "{all:?}");
    assert!(away.runtime.join("m.sock").exists());
    assert_eq!(exposed(hosts.path("x").parent().expect("the hosts' directory")), [""; 0]);
}

#[test]
fn what_others_could_change_is_not_trusted() {
    let hosts = Hosts::new();
    let host = &hosts.source;
    let _machine = host.boot("m", PROCESS, &[]);
    let everybody = hosts.path("everybody");
    fs::create_dir(&everybody).expect("made");
    fs::set_permissions(&everybody, Permissions::from_mode(0o777)).expect("set");
    host.run(&["save", "m", path(&everybody)]).failed(&["chmod o-w", path(&everybody)]);
    fs::set_permissions(&host.runtime, Permissions::from_mode(0o755)).expect("set");
    host.run(&["vm", "list"]).failed(&["chmod 700", path(&host.runtime)]);
    fs::set_permissions(&host.runtime, Permissions::from_mode(0o700)).expect("set");
    let key = hosts.destination.identity.join("key.pem");
    fs::set_permissions(&key, Permissions::from_mode(0o644)).expect("set");
    let identity = path(&hosts.destination.identity);
    let args = ["receive", "--listen", "127.0.0.1:0", "--identity", identity];
    hosts.destination.run(&args).failed(&["chmod 600", path(&key)]);
    host.works("m");
}
