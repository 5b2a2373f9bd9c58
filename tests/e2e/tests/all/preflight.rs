//! `ferry preflight`: what a move would come to, and the machine stays where it is.

use ferry_e2e::{Done, Hosts, path};

const PROCESS: &str = ":process";
/// 4 MiB that are always dirty, and no codec makes them smaller.
const BUSY: &str =
    "pattern=working-set set=4M rate=4000 arena=8M fill=all fill_random=100 random=100";

#[test]
fn what_a_move_would_come_to_is_told_and_nothing_is_moved() {
    let hosts = Hosts::new();
    let (source, identity) = (&hosts.source, path(&hosts.source.identity));
    let _runner = source.boot("m", PROCESS, &["--cmdline", BUSY]);
    let (receiver, to) = hosts.destination.receive(&[]);
    let to = to.to_string();
    let ask = |more: &[&str]| -> Done {
        let args = ["preflight", "m", "--to", &to, "--identity", identity];
        source.run(&[&args[..], more].concat())
    };

    let told = ask(&[]);
    assert_eq!(told.status, Some(0), "{told:?}");
    for words in ["`m` would move to", "  auto ", "  pre-copy ", "  post-copy ", "Gbit/s over "] {
        assert!(told.stdout.contains(words), "{words}: {told:?}");
    }
    source.works("m");
    assert!(hosts.destination.machines().is_empty());

    // What cannot be is told in numbers, with what would do.
    let never = ["--mode", "pre-copy", "--bandwidth", "8Mbit", "--max-downtime", "5ms"];
    let told = ask(&[&never[..], &["--json"]].concat());
    assert_eq!(told.status, Some(1), "{told:?}");
    let report = told.json();
    let way = &report["foreseen"]["ways"][0];
    let misses = way["misses"].as_str().expect("words");
    assert!(way["asked"] == "pre-copy" && misses.contains("needs a link of"), "{report:#}");
    assert_eq!(report["machine"], "runs_at_source");

    // The move itself is as it was told to be.
    hosts.source.migrate("m", &to, &[]).completed();
    hosts.destination.works("m");
    drop(receiver);
    let gone = source.run(&["preflight", "m", "--to", &to, "--identity", identity]);
    assert!(gone.status == Some(1) && gone.stderr.contains("no machine"), "{gone:?}");
}

#[test]
fn a_destination_that_refuses_the_machine_says_why_before_anything_is_done() {
    let hosts = Hosts::new();
    let (source, identity) = (&hosts.source, path(&hosts.source.identity));
    let _runner = source.boot("m", PROCESS, &[]);
    let ask = |to: &str| source.run(&["preflight", "m", "--to", to, "--identity", identity]);
    let none = ask("127.0.0.1:9");
    assert!(none.status == Some(1) && none.stdout.contains("would not move"), "{none:?}");
    let (_receiver, to) = hosts.destination.receive(&[]);
    let _taken = hosts.destination.boot("m", PROCESS, &[]);
    let refused = ask(&to.to_string());
    assert_eq!(refused.status, Some(1), "{refused:?}");
    let said = refused.stdout.contains("`m` would not move to") && refused.stdout.contains("name");
    assert!(said, "{refused:?}");
    source.works("m");
}
