//! Who may do what, as operators say it: allow lists, wanted hosts, renewed identities.

use std::fs;

use ferry_e2e::{Hosts, path};

const PROCESS: &str = ":process";

#[test]
fn an_allow_list_names_hosts_and_their_machines_and_can_be_changed_at_any_time() {
    let hosts = Hosts::new();
    let allow = hosts.path("allow");
    fs::write(&allow, "a m\nsha256:nonsense *\n").unwrap();
    let identity = path(&hosts.destination.identity);
    let args = ["receive", "--listen", "127.0.0.1:0", "--identity", identity];
    let done = hosts.destination.run(&[&args[..], &["--allow", path(&allow)]].concat());
    done.failed(&["allow list", "line 2", "sha256:nonsense"]);

    fs::write(&allow, "a other   # not `m`\n").unwrap();
    let (receiver, to) = hosts.destination.receive(&["--once", "--allow", path(&allow)]);
    let _runner = hosts.source.boot("m", PROCESS, &[]);
    let refused = hosts.source.migrate("m", to, &[]);
    assert_eq!(refused.report["outcome"], "refused", "{:#}", refused.report);
    let why = refused.report["reason"].as_str().unwrap();
    for words in ["host `a` (sha256:", "may not send machine `m`", "the line `a m` would"] {
        assert!(why.contains(words), "{words}: {why}");
    }
    receiver.line("may not send machine `m`");

    // As editors do it.
    fs::write(hosts.path("allow.new"), "a other m\n").unwrap();
    fs::rename(hosts.path("allow.new"), &allow).unwrap();
    hosts.source.migrate("m", to, &[]).completed();
    receiver.line("machine `m` runs here");
}

#[test]
fn a_machine_goes_to_no_other_host_than_the_one_that_was_named() {
    let hosts = Hosts::new();
    let pki = hosts.path("pki");
    hosts.source.run(&["pki", "renew", path(&pki), "--host", "b", "--days", "5"]).succeeded();
    let (receiver, to) = hosts.destination.receive(&["--once"]);
    receiver.line("the certificate of `b`");
    let _runner = hosts.source.boot("m", PROCESS, &[]);
    let moved = hosts.source.migrate("m", to, &["--peer", "c"]);
    assert_eq!(moved.report["outcome"], "failed", "{:#}", moved.report);
    let why = moved.report["reason"].as_str().unwrap();
    assert!(why.contains("is host `b` (sha256:") && why.contains("has to be `c`"), "{why}");
    assert!(!receiver.has_said("machine `m`"), "it learned which machine it is");
    let fingerprint = why.split(['(', ')']).nth(1).unwrap().to_owned();

    // Renewed while the destination runs: another certificate, the same host.
    hosts.source.run(&["pki", "renew", path(&pki), "--host", "b"]).succeeded();
    // Files are looked at once a second.
    std::thread::sleep(std::time::Duration::from_millis(1200));
    let moved = hosts.source.migrate("m", to, &["--peer", &fingerprint]);
    let why = moved.report["reason"].as_str().unwrap();
    assert!(why.contains("has to be"), "{why}");
    hosts.source.migrate("m", to, &["--peer", "b"]).completed();
    receiver.line("machine `m` runs here");
}

#[test]
fn bundles_are_lent_to_those_who_may_read_them() {
    let hosts = Hosts::new();
    let runner = hosts.source.boot("m", PROCESS, &[]);
    fs::create_dir(hosts.path("backup")).unwrap();
    for name in ["one", "two"] {
        let bundle = hosts.path("backup").join(name);
        hosts.source.run(&["save", "m", path(&bundle)]).succeeded();
    }
    drop(runner);
    let allow = hosts.path("allow");
    fs::write(&allow, "b one\n").unwrap();
    let (backup, identity) = (hosts.path("backup"), path(&hosts.source.identity));
    let serving = hosts.source.start(&[
        "bundle",
        "serve",
        path(&backup),
        "--listen",
        "127.0.0.1:0",
        "--identity",
        identity,
        "--allow",
        path(&allow),
    ]);
    let line = serving.line("lending the bundles");
    let address = line.split(" on ").nth(1).unwrap().split(' ').next().unwrap();
    let verify = |name: &str, more: &[&str]| {
        let url = format!("ferry://{address}/{name}");
        let identity = path(&hosts.destination.identity);
        let args = ["bundle", "verify", &url, "--identity", identity];
        hosts.destination.run(&[&args[..], more].concat())
    };
    verify("one", &["--peer", "a"]).succeeded();
    verify("two", &[]).failed(&["host `b`", "may not read bundle `two`", "the line `b two`"]);
    verify("one", &["--peer", "b"]).failed(&["is host `a`", "has to be `b`"]);
}
