//! Bundles of another host, by the command: shown, verified, merged, restored and paged, through lost links.

use std::path::{Path, PathBuf};

use ferry_e2e::network::{ADDRESSES, Network};
use ferry_e2e::{Host, Hosts, Running, path};

use super::command::{PROCESS, restore};

/// 256 MiB that cannot be compressed: they take a while.
const LARGE: [&str; 4] = [
    "--memory",
    "256M",
    "--cmdline",
    "pattern=random rate=20000 fill=all fill_random=100 random=100",
];

/// `ferry bundle serve`; back when it listens, with its address.
fn lend(host: &Host, dir: &Path, listen: &str) -> (Running, String) {
    let identity = path(&host.identity);
    let mut args = vec!["bundle", "serve", path(dir), "--listen", listen, "--identity", identity];
    // What it gave up by mistake ends it, and its test fails.
    args.extend(["--sandbox", "strict"]);
    let running = host.start(&args);
    let line = running.line("lending the bundles");
    let addr = line.split_whitespace().find(|word| word.contains(':') && word.contains('.'));
    (running, addr.unwrap_or_else(|| panic!("no address in: {line}")).to_owned())
}

/// Saves a machine as bundle `b` in a directory of bundles, and ends it.
fn saved(hosts: &Hosts) -> PathBuf {
    let dir = hosts.path("bundles");
    std::fs::create_dir(&dir).expect("a directory");
    let runner = hosts.source.boot("m", PROCESS, &LARGE);
    hosts.source.run(&["save", "m", path(&dir.join("b")), "--max-stop", "1m"]).succeeded();
    runner.kill();
    dir
}

#[test]
fn a_chain_of_another_host_is_shown_verified_merged_and_restored() {
    let hosts = Hosts::new();
    let [dir, full, secret] = ["bundles", "full", "secret"].map(|name| hosts.path(name));
    std::fs::create_dir(&dir).expect("a directory");
    let (one, two) = (dir.join("one"), dir.join("two"));
    let _runner = hosts.source.boot("m", PROCESS, &[]);
    hosts.source.run(&["save", "m", path(&one)]).succeeded();
    hosts.source.works("m");
    hosts.source.run(&["save", "m", path(&two), "--base", path(&one)]).succeeded();
    hosts.source.run(&["save", "m", path(&secret)]).succeeded();

    let (lender, addr) = lend(&hosts.source, &dir, "127.0.0.1:0");
    let there = format!("ferry://{addr}/two");
    let reader = &hosts.destination;
    let with = ["--identity", path(&reader.identity)];
    let on = |command: &str, bundle: &str, more: &[&str]| {
        reader.run(&[&["bundle", command, bundle], more, &with[..]].concat())
    };
    let shown = on("info", &there, &["--json"]).succeeded().json();
    let here = reader.run(&["bundle", "info", path(&two), "--json"]).succeeded().json();
    for same in ["id", "memory_digest", "data_pages", "state_bytes", "machine"] {
        assert_eq!(shown[same], here[same], "{same}");
    }
    assert_eq!(shown["dir"], there);
    assert_eq!(shown["chain"].as_array().map(Vec::len), Some(2));
    on("verify", &there, &[]).succeeded();
    on("merge", &there, &["--into", path(&full)]).succeeded();
    reader.run(&["bundle", "verify", path(&full)]).succeeded();
    lender.line(&format!("reads {}", path(&two)));

    let mut machines = Vec::new();
    for (name, how) in [("eager", &[][..]), ("lazy", &["--lazy"])] {
        let restored = restore(reader, Path::new(&there), name, &[how, &with[..]].concat());
        if !how.is_empty() {
            restored.line("all pages are here");
        }
        reader.works(name);
        machines.push(restored);
    }
    let socket = hosts.path("socket");
    let args = ["pager", "--socket", path(&socket), "--bundle", &there];
    let pager = reader.start(&[&args[..], &with[..]].concat());
    pager.line(&format!("with the bundle {there}"));

    // What is not lent, or not to this reader.
    on("info", &format!("ferry://{addr}/three"), &[]).failed(&["/three is not a bundle"]);
    on("info", &format!("ferry://{addr}/../secret"), &[]).failed(&["outside of the directory"]);
    on("merge", &there, &[]).failed(&["--into"]);
    on("info", "ferry://nowhere", &[]).failed(&["ferry://HOST:PORT/NAME"]);
    reader.run(&["bundle", "info", &there]).failed(&[&there, "--identity"]);
    let strangers = Hosts::new();
    let stranger = ["--identity", path(&strangers.source.identity)];
    reader
        .run(&[&["bundle", "info", &there], &stranger[..]].concat())
        .failed(&["another authority", "ferry pki init"]);
    // Whoever takes in machines lends no bundles, and the other way round.
    let (_receiver, to) = hosts.source.receive(&[]);
    on("info", &format!("ferry://{to}/two"), &[]).failed(&["takes in machines", "bundle serve"]);
    reader.migrate("eager", addr, &[]).stayed("failed", &["takes in no machines"]);
}

/// A machine `m` that is restored lazily from a lent bundle, whose host is killed meanwhile.
struct Orphan {
    hosts: Hosts,
    /// With the bundle `b`, which was lent at `addr`.
    dir: PathBuf,
    addr: String,
    there: String,
    lazy: Running,
}

fn orphan() -> Orphan {
    let hosts = Hosts::new();
    let dir = saved(&hosts);
    let (lender, addr) = lend(&hosts.source, &dir, "127.0.0.1:0");
    let with = ["--lazy", "--identity", path(&hosts.destination.identity)];
    let there = format!("ferry://{addr}/b");
    let lazy = restore(&hosts.destination, Path::new(&there), "m", &with);
    lender.kill();
    Orphan { hosts, dir, addr, there, lazy }
}

#[test]
fn a_machine_that_is_restored_lazily_waits_for_a_host_that_was_killed_and_goes_on() {
    let Orphan { hosts, dir, addr, lazy, .. } = orphan();
    let was_in_the_middle = !lazy.has_said("all pages are here");
    if was_in_the_middle {
        lazy.line("trying again for 120 s");
        let state = hosts.destination.state("m");
        assert!(!lazy.has_said("all pages are here"), "{state}");
    }
    let (_lender, _) = lend(&hosts.source, &dir, &addr);
    lazy.line("all pages are here");
    assert!(!lazy.has_said("cannot be had"));
    hosts.destination.works("m");
    assert!(was_in_the_middle, "all pages came before the host was killed");
}

#[test]
fn pages_of_a_bundle_that_was_replaced_while_its_host_was_away_are_never_seen() {
    let Orphan { hosts, dir, addr, there, lazy } = orphan();
    assert!(!lazy.has_said("all pages are here"), "all pages came before the host was killed");
    let _other = hosts.source.boot("other", PROCESS, &LARGE);
    hosts.source.run(&["save", "other", path(&dir.join("b")), "--max-stop", "1m"]).succeeded();
    let (_lender, _) = lend(&hosts.source, &dir, &addr);
    let line = lazy.line("cannot be had");
    for words in [&there, "was replaced or removed", "ferry vm stop m"] {
        assert!(line.contains(words), "`{words}` is not in: {line}");
    }
    hosts.destination.run(&["vm", "stop", "m"]).succeeded();
    // It would have ended with status 1 if the guest had found a wrong page.
    lazy.end().succeeded();
}

#[test]
fn a_machine_is_restored_lazily_over_a_link_that_is_cut_meanwhile() {
    let Some(network) = Network::new() else { return };
    if let Some(why) = network.shape("1gbit") {
        println!("SKIP: the link cannot be shaped: {why}");
        return;
    }
    let mut hosts = Hosts::new();
    let dir = saved(&hosts);
    hosts.source.before = network.at(0);
    hosts.destination.before = network.at(1);
    let (_lender, addr) = lend(&hosts.source, &dir, &format!("{}:7001", ADDRESSES[0]));
    let with = ["--lazy", "--identity", path(&hosts.destination.identity)];
    let there = format!("ferry://{addr}/b");
    let lazy = restore(&hosts.destination, Path::new(&there), "m", &with);
    network.set_link("down");
    lazy.line("trying again for 120 s");
    assert!(!lazy.has_said("all pages are here"));
    network.set_link("up");
    lazy.line("all pages are here");
    hosts.destination.works("m");
}
