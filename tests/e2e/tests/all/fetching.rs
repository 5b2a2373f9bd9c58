//! Machines that fetch their pages after the hand-over, between two processes: a spool, another
//! address, and back again. What a killed process or a bad cable does to them is in tests/faults.

use std::net::SocketAddr;

use ferry_e2e::{Hosts, Running, kvm, network, path, wait_for};

const PROCESS: &str = ":process";
/// All memory is written without end.
const ALL: &str = "pattern=random arena=40M fill=all fill_random=60 random=60";
/// Pages come so slowly that there is time to do harm: minutes.
const SLOWLY: [&str; 4] = ["--mode", "post-copy", "--bandwidth", "1Mbit"];

/// A machine `m` that runs at its destination and fetches pages.
struct Fetching {
    hosts: Hosts,
    runner: Running,
    receiver: Running,
    moving: Running,
    to: SocketAddr,
}

fn fetching(hosts: Hosts, more: &[&str]) -> Fetching {
    let (receiver, to) = hosts.destination.receive(&[]);
    let runner = hosts.source.boot("m", PROCESS, &["--cmdline", ALL]);
    let moving = hosts.source.start_migrate("m", to, &[&SLOWLY[..], more].concat());
    moving.line("it fetches ");
    receiver.line("`m` runs here");
    assert!(hosts.destination.state("m").contains("fetching"));
    Fetching { hosts, runner, receiver, moving, to }
}

/// Waits until all pages are there, and sees that the machine goes on.
fn arrives(hosts: &Hosts) {
    wait_for("all pages are there", || (hosts.destination.state("m") == "running").then_some(()));
    hosts.destination.works("m");
}

#[test]
fn while_it_fetches_pages_a_machine_is_not_moved_on_and_can_be_stopped() {
    let at = fetching(Hosts::new(), &[]);
    let refused = at.hosts.destination.migrate("m", at.to, &[]);
    assert!(refused.reason().contains("still fetching pages"), "{:#}", refused.report);
    at.hosts.destination.run(&["vm", "stop", "m"]).succeeded();
    at.receiver.line("`m` was stopped");
    let done = at.moving.end();
    assert_eq!(done.status, Some(1), "{done:?}");
    assert!(done.stdout.contains("the machine was stopped there"), "{done:?}");
    wait_for("it is gone", || at.hosts.destination.machines().is_empty().then_some(()));
}

#[test]
fn a_spool_finishes_the_move_of_a_source_that_was_killed() {
    let hosts = Hosts::new();
    let dir = hosts.path("spool");
    let spool = path(&dir).to_owned();
    let at = fetching(hosts, &["--spool", &spool]);
    at.moving.line("is in the spool, too");
    at.runner.kill();
    at.moving.end();
    at.receiver.line("lacks");
    let (hosts, to) = (&at.hosts, at.to.to_string());
    let identity = path(&hosts.source.identity);
    let serve = |to: &str, more: &[&str]| {
        let args = ["serve-spool", &spool, "--to", to, "--identity", identity];
        hosts.source.run(&[&args[..], more].concat())
    };
    // To nobody it is served in vain, and can be served again.
    let done = serve("127.0.0.1:9", &["--rejoin", "1s"]);
    assert_eq!(done.status, Some(1), "{done:?}");
    assert!(done.stdout.contains("can be served again"), "{done:?}");
    hosts.source.run(&["restore", &spool, "m"]).failed(&["ferry-spool"]);
    let done = serve(&to, &[]).succeeded();
    assert!(done.stdout.contains("the same on both sides"), "{done:?}");
    arrives(hosts);
    assert!(!dir.exists(), "it is needed no more");
    serve(&to, &[]).failed(&["no spool can be served", &spool]);
}

#[test]
fn a_spool_is_written_over_no_bundle_and_goes_when_all_pages_have_come() {
    let hosts = Hosts::new();
    let (_receiver, to) = hosts.destination.receive(&[]);
    let _runner = hosts.source.boot("m", PROCESS, &["--cmdline", ALL]);
    let (bundle, spool) = (hosts.path("bundle"), hosts.path("spool"));
    hosts.source.run(&["save", "m", path(&bundle)]).succeeded();
    let by = |dir| ["--mode", "post-copy", "--spool", dir];
    let refused = hosts.source.migrate("m", to, &by(path(&bundle)));
    assert!(refused.reason().contains("holds a bundle of machine `m`"), "{refused:?}");
    hosts.source.run(&["bundle", "verify", path(&bundle)]).succeeded();
    // One that cannot be written is told, and the move goes on.
    hosts.source.migrate("m", to, &by(path(&spool))).completed();
    assert!(!spool.exists());
    hosts.destination.works("m");
}

fn in_namespaces() -> Option<(network::Network, Hosts)> {
    let network = network::Network::new()?;
    let mut hosts = Hosts::new();
    hosts.source.before = network.at(0);
    hosts.destination.before = network.at(1);
    Some((network, hosts))
}

#[test]
fn a_destination_at_a_new_address_is_found_by_resume() {
    let Some((network, hosts)) = in_namespaces() else { return };
    let (receiver, listens) = hosts.destination.receive_on("0.0.0.0:0", &[]);
    let to = format!("{}:{}", network::ADDRESSES[1], listens.port());
    let _runner = hosts.source.boot("m", PROCESS, &["--cmdline", ALL]);
    let more = [&SLOWLY[..], &["--rejoin", "1s"]].concat();
    let moving = hosts.source.start_migrate("m", to, &more);
    moving.line("it fetches ");
    let new = network.renumber(1);
    let done = moving.end();
    assert!(done.stdout.contains("--resume"), "{done:?}");
    receiver.line("lacks");
    let to = format!("{new}:{}", listens.port());
    hosts.source.migrate("m", to, &["--resume"]).completed();
    arrives(&hosts);
    hosts.source.run(&["vm", "show", "m"]).failed(&["no machine"]);
}

/// Each guest under write load of all its memory, over 1 Gbit/s.
#[test]
fn over_a_gigabit_link_machines_move_by_post_copy_and_hybrid_there_and_back() {
    let Some((network, mut hosts)) = in_namespaces() else { return };
    if let Some(why) = network.shape("1gbit") {
        return println!("SKIP: no link of 1 Gbit/s can be made: {why}");
    }
    let guests: &[&str] = if kvm() { &[PROCESS, ":guest"] } else { &[PROCESS] };
    for guest in guests {
        let mut process = hosts.source.boot("m", guest, &["--cmdline", ALL]);
        for n in 0..10 {
            let mode = ["post-copy", "hybrid"][n % 2];
            let listen = format!("{}:0", network::ADDRESSES[(n + 1) % 2]);
            let (receiver, to) = hosts.destination.receive_on(&listen, &["--once"]);
            let goal = ["--mode", mode, "--max-downtime", "1ms"];
            let moved = hosts.source.migrate("m", to, &goal);
            moved.completed();
            assert_eq!(moved.report["mode"], mode, "{:#}", moved.report);
            process.end().succeeded();
            process = receiver;
            std::mem::swap(&mut hosts.source, &mut hosts.destination);
            hosts.source.works("m");
        }
        hosts.source.run(&["vm", "stop", "m"]).succeeded();
        process.end().succeeded();
    }
}
