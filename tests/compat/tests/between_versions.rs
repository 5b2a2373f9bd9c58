//! Machines that go from one version's hosts to another's, and back, and on again.
//!
//! `FERRY_BASE` names the older version's `ferry`. Without it there is nothing to compare with.

use std::path::PathBuf;

use ferry_e2e::{Hosts, kvm, path};

/// Two hosts, of which the source is the older version's.
fn hosts() -> Option<Hosts> {
    let Some(base) = std::env::var_os("FERRY_BASE") else {
        println!("SKIP: FERRY_BASE does not name an older version's ferry");
        return None;
    };
    let mut hosts = Hosts::new();
    hosts.source.binary = Some(PathBuf::from(base));
    Some(hosts)
}

/// From the older version to this one, back, and here again.
fn goes_to_and_fro(kernel: &str) {
    if let Some(hosts) = hosts() {
        hosts.to_and_fro(kernel, 3);
    }
}

#[test]
fn a_process_guest_goes_from_base_to_head_to_base_to_head() {
    goes_to_and_fro(":process");
}

#[test]
fn a_kvm_machine_goes_from_base_to_head_to_base_to_head() {
    if kvm() {
        goes_to_and_fro(":guest");
    }
}

#[test]
fn a_bundle_that_the_older_version_saved_is_verified_and_restored_here() {
    let Some(hosts) = hosts() else { return };
    let bundle = hosts.path("bundle");
    let running = hosts.source.boot("m", ":process", &[]);
    hosts.source.run(&["save", "m", path(&bundle), "--stop"]).succeeded();
    running.end().succeeded();
    hosts.destination.run(&["bundle", "verify", path(&bundle)]).succeeded();
    let restored = hosts.destination.start(&["restore", path(&bundle), "m"]);
    restored.line("restored from");
    hosts.destination.works("m");
    hosts.destination.run(&["vm", "stop", "m"]).succeeded();
    restored.end().succeeded();
}
