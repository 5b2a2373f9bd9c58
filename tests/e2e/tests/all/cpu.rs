//! Hosts with unequal processors: what one shows a machine decides where it can go.

use std::path::PathBuf;

use ferry_e2e::{Hosts, kvm, path};
use serde_json::Value;

const KVM: &str = ":guest";
/// One of them is here, and any KVM can hide it.
const HIDDEN: [&str; 3] = ["3dnowprefetch", "lahf_lm", "kvm_steal_time"];

/// Two hosts, files with the processors of a (this host's) and b (the same without one feature), and that feature.
struct Fleet {
    hosts: Hosts,
    a: PathBuf,
    b: PathBuf,
    feature: &'static str,
}

fn features(cpu: &mut Value) -> &mut Vec<Value> {
    cpu["features"].as_array_mut().expect("a list of features")
}

fn fleet() -> Fleet {
    let hosts = Hosts::new();
    let mut cpu = hosts.source.run(&["cpu", "show"]).succeeded().json();
    let here = features(&mut cpu).clone();
    let feature = HIDDEN.into_iter().find(|f| here.contains(&Value::from(*f)));
    let feature = feature.expect("a feature that can be hidden");
    let (a, b) = (hosts.path("host-a.json"), hosts.path("host-b.json"));
    std::fs::write(&a, cpu.to_string()).expect("a file");
    features(&mut cpu).retain(|f| f != feature);
    std::fs::write(&b, cpu.to_string()).expect("a file");
    Fleet { hosts, a, b, feature }
}

#[test]
fn a_machine_that_is_shown_what_hosts_have_in_common_moves_between_them() {
    if !kvm() {
        return;
    }
    let Fleet { hosts, a, b, feature } = fleet();
    let made = hosts.source.run(&["cpu", "baseline", path(&a), path(&b)]).succeeded();
    let left_out = format!("left out, of {}: {feature}", path(&a));
    assert!(made.stderr.contains(&left_out) && !made.stderr.contains("host-b"), "{made:?}");
    let mut baseline = made.json();
    assert!(!features(&mut baseline).contains(&feature.into()), "{baseline:#}");
    let file = hosts.path("fleet.json");
    std::fs::write(&file, made.stdout).expect("a file");

    let runner = hosts.source.boot("m", KVM, &["--cpu", path(&file), "--cpus", "2"]);
    let mut shown = hosts.source.run(&["cpu", "show", "--of", "m"]).succeeded().json();
    assert_eq!(features(&mut shown), features(&mut baseline));
    let (receiver, to) = hosts.destination.receive(&["--once", "--cpu", path(&b)]);
    hosts.source.migrate("m", to, &[]).completed();
    hosts.destination.works("m");
    runner.end().succeeded();
    let (_back, to) = hosts.source.receive(&["--once"]);
    hosts.destination.migrate("m", to, &[]).completed();
    hosts.source.works("m");
    receiver.end().succeeded();
    let mut still = hosts.source.run(&["cpu", "show", "--of", "m"]).succeeded().json();
    assert_eq!(features(&mut still), features(&mut baseline));
}

#[test]
fn a_host_that_lacks_what_a_machine_was_shown_refuses_it_by_name() {
    if !kvm() {
        return;
    }
    let Fleet { hosts, b, feature, .. } = fleet();
    let _runner = hosts.source.boot("m", KVM, &[]);
    let (_receiver, to) = hosts.destination.receive(&["--once", "--cpu", path(&b)]);
    let moved = hosts.source.migrate("m", to, &[]);
    moved.stayed("refused", &["lacks what the guest was shown", feature]);
    assert_eq!(moved.report["bytes_sent"], 0, "{:#}", moved.report);
    hosts.source.works("m");
}

#[test]
fn a_processor_that_this_host_cannot_show_is_refused_by_name() {
    if !kvm() {
        return;
    }
    let Fleet { hosts, a, .. } = fleet();
    let text = std::fs::read_to_string(&a).expect("a file");
    let mut more: Value = serde_json::from_str(&text).expect("JSON");
    features(&mut more).extend(["avx9".into(), "sse2024".into()]);
    std::fs::write(&a, more.to_string()).expect("a file");
    let run = ["vm", "run", "m", "--kernel", KVM, "--cpu", path(&a)];
    hosts.source.run(&run).failed(&["lacks", "avx9, sse2024"]);
    let identity = path(&hosts.source.identity);
    let receive = ["receive", "--listen", "127.0.0.1:0", "--identity", identity, "--cpu", path(&a)];
    hosts.source.run(&receive).failed(&["host-a.json", "avx9, sse2024"]);
}

#[test]
fn a_file_that_is_no_processor_is_named_with_place_and_reason() {
    let hosts = Hosts::new();
    let file = hosts.path("damaged.json");
    let newer = "{\"ferry_cpu\": 7}";
    for (text, said) in [("{\n  \"vendor\": 7", "line 2"), ("", "line 1"), (newer, "version 7")] {
        std::fs::write(&file, text).expect("a file");
        for args in [
            vec!["cpu", "baseline", path(&file)],
            vec!["vm", "run", "m", "--kernel", KVM, "--cpu", path(&file)],
        ] {
            hosts.source.run(&args).failed(&["damaged.json", said]);
        }
    }
    hosts.source.run(&["cpu", "baseline", "/gone"]).failed(&["/gone", "cannot read it"]);
    let process = ["vm", "run", "m", "--kernel", ":process", "--cpu", path(&file)];
    hosts.source.run(&process).failed(&["--cpu is not for it"]);
}
