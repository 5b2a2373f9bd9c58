//! Which link a machine goes over: what was asked for, or what answers; and that it is said.

use ferry_e2e::{Hosts, Moved, Running, network};

const PROCESS: &str = ":process";

fn went(moved: &Moved) -> String {
    moved.report["link"].as_str().expect("words").to_owned()
}

#[test]
fn a_machine_goes_over_the_link_that_was_asked_for_or_that_answers_and_it_is_said() {
    let hosts = Hosts::new();
    let _source = hosts.source.boot("m", PROCESS, &[]);
    let mut here = &hosts.source;
    let mut there = &hosts.destination;
    let mut receivers = Vec::new();
    // What listens, what is asked for, over what it goes, why. Who has received is outside of its sandbox, so that it
    // connects over TCP, too.
    for (listens, asked, over, why) in [
        ("auto", "auto", "TLS to", "it costs less"),
        ("auto", "quic", "QUIC to", "as asked for"),
        ("auto", "tls", "TLS to", "as asked for"),
        ("tls", "auto", "TLS to", "it costs less"),
        ("quic", "auto", "QUIC to", "TCP is not answered"),
    ] {
        let open = ["--once", "--sandbox", "off", "--link", listens];
        let (receiver, to) = there.receive(&open);
        receivers.push(receiver);
        let moved = here.migrate("m", to, &["--mode", "post-copy", "--link", asked]);
        let went = went(moved.completed());
        assert!(went.starts_with(over), "{listens} {asked}: {went}");
        assert!(went.contains(&to.to_string()) && went.contains(why), "{went}");
        there.works("m");
        (here, there) = (there, here);
    }
    // What is not there is not taken for it.
    let (_receiver, to) = there.receive(&["--link", "quic"]);
    let moved = here.migrate("m", to, &["--link", "tls"]);
    moved.stayed("failed", &["refuses connections"]);
    here.works("m");
}

#[test]
fn a_process_in_its_sandbox_takes_machines_in_over_both_links_and_sends_them_on_over_quic() {
    for link in ["quic", "tls"] {
        let hosts = Hosts::new();
        let (home, away) = (&hosts.source, &hosts.destination);
        let _source = home.boot("m", PROCESS, &[]);
        let (_receiver, to) = away.receive(&["--once"]);
        home.migrate("m", to, &["--link", link]).completed();
        away.works("m");
        let (_back, to) = home.receive(&["--once"]);
        let refused = away.migrate("m", to, &["--link", "tls"]);
        refused.stayed("failed", &["was confined", "--link quic", "--sandbox off"]);
        let moved = away.migrate("m", to, &[]);
        let went = went(moved.completed());
        assert!(went.starts_with("QUIC to"), "{went}");
        home.works("m");
    }
}

/// A machine between two hosts with two cables, which goes by both.
struct Bonded {
    network: network::Network,
    hosts: Hosts,
    _receiver: Running,
    _source: Running,
    to: [String; 2],
}

fn bonded(workload: &str) -> Option<Bonded> {
    let network = network::Network::of_two_cables()?;
    let mut hosts = Hosts::new();
    (hosts.source.before, hosts.destination.before) = (network.at(0), network.at(1));
    let (receiver, listens) = hosts.destination.receive_on("0.0.0.0:0", &[]);
    let to = [network::ADDRESSES[1], network::SECOND[1]].map(|a| format!("{a}:{}", listens.port()));
    let source = hosts.source.boot("m", PROCESS, &["--cmdline", workload]);
    Some(Bonded { network, hosts, _receiver: receiver, _source: source, to })
}

const NOISE: &str =
    "pattern=working-set set=1M rate=500 arena=32M fill=all fill_random=100 random=100";

#[test]
fn several_addresses_of_a_host_carry_a_machine_together() {
    let Some(Bonded { network, hosts, to, .. }) = &bonded(NOISE) else { return };
    let before = ["cable", "cable2"].map(|cable| network.carried(cable));
    let moved = hosts.source.migrate("m", to.join(","), &["--mode", "pre-copy"]);
    let went = went(moved.completed());
    assert!(to.iter().all(|to| went.contains(to)), "{went}");
    hosts.destination.works("m");
    for (cable, before) in ["cable", "cable2"].into_iter().zip(before) {
        let carried = network.carried(cable) - before;
        assert!(carried > 4 << 20, "{cable} carried {carried} bytes of 32 MiB");
    }
}

#[test]
fn a_cable_that_is_cut_is_no_loss_where_there_is_another() {
    let Some(Bonded { network, hosts, to, .. }) = &bonded(NOISE) else { return };
    let how = ["--mode", "pre-copy", "--bandwidth", "100Mbit", "--rejoin", "30s"];
    let moving = hosts.source.start_migrate("m", to.join(","), &how);
    moving.line("round 1");
    network.set_link("down");
    let done = moving.end().succeeded();
    println!("{}", done.stdout);
    assert!(done.stdout.contains("the same on both sides"), "{done:?}");
    hosts.destination.works("m");
}

#[test]
fn an_address_that_does_not_answer_costs_time_only() {
    let Some(Bonded { hosts, to: [to, _], .. }) = &bonded(NOISE) else { return };
    // Nobody is there.
    let dead = "10.78.78.99:7000";
    let moved = hosts.source.migrate("m", format!("{to},{dead}"), &[]);
    let went = went(moved.completed());
    assert!(went.contains(dead) && went.contains(to), "{went}");
    hosts.destination.works("m");
}
