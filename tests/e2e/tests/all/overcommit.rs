//! Machines that have more memory than their host gives them: the real command, in a control group that the kernel holds
//! to its limit.

use std::fs;
use std::path::PathBuf;

use ferry_e2e::group::Group;
use ferry_e2e::{Hosts, Running, kvm, path, wait_for};
use rustix::process::Signal;
use serde_json::Value;

const PROCESS: &str = ":process";
const MIB: u64 = 1 << 20;

/// Whether a control group can be made here.
fn memory_can_be_limited() -> bool {
    Group::make("try", 64 * MIB).is_some()
}

/// A plan of machines, each of `size`, that give nothing back.
fn write_plan(hosts: &Hosts, host: &str, size: u64, names: &[String]) -> PathBuf {
    let swap = hosts.path("swap");
    fs::create_dir_all(&swap).expect("a directory");
    let all = size * names.len() as u64;
    let mut text = format!("[host]\n{host}\n[swap]\ndir = {swap:?}\nsize = \"{all}\"\n");
    for name in names {
        text += &format!("[[machine]]\nname = \"{name}\"\nsize = \"{size}\"\nballoon = false\n");
    }
    let plan = hosts.path("plan.toml");
    fs::write(&plan, text).expect("a file");
    plan
}

fn swap(machine: &Value, figure: &str) -> u64 {
    machine["swap"][figure].as_u64().unwrap_or(0)
}

fn demo(more: &[&str]) {
    let hosts = Hosts::new();
    let done = hosts.source.run(&[&["memory", "demo", "--json"], more].concat()).succeeded();
    let report = done.json();
    let number = |name: &str| report[name].as_u64().unwrap_or_else(|| panic!("{name}: {report:#}"));
    assert_eq!(number("machines_bytes") * 2, number("budget_bytes") * 3, "{report:#}");
    assert!(number("peak_bytes") <= number("budget_bytes"), "{report:#}");
    // More than a limit that is far away would leave it at.
    assert!(number("used_bytes") > number("budget_bytes") / 2, "{report:#}");
    assert_eq!(number("oom_kills") + number("limit_hits"), 0, "{report:#}");
    assert_eq!(report["wrong"], Value::Array(Vec::new()), "{report:#}");
    let machines = report["machines"].as_array().expect("machines");
    assert_eq!(machines.len(), 3);
    for machine in machines {
        let number = |name: &str| machine[name].as_u64().unwrap_or_default();
        let (size, away) = (number("size_bytes"), number("swapped_bytes"));
        // It filled all that it has, and nearly all of it is somewhere.
        assert!(number("resident_bytes") + away > size / 10 * 9, "{report:#}");
        assert!(away > size / 10 && number("pages_in") > 0, "{report:#}");
        assert!(number("pages_checked") > 0, "{report:#}");
        for speed in machine["checked_per_s"].as_array().expect("three of them") {
            assert!(
                speed.as_f64() > Some(0.0),
                "it goes on, with a manager and without: {report:#}"
            );
        }
    }
    for figure in ["slow_down", "slow_down_cpu"] {
        for value in report[figure].as_array().expect("two of them") {
            assert!(value.as_f64() > Some(0.0), "{report:#}");
        }
    }
}

#[test]
fn three_process_guests_of_3_run_in_6_and_go_on_when_their_manager_is_killed() {
    if memory_can_be_limited() {
        demo(&["--process", "--unit", "32M"]);
    }
}

#[test]
fn three_kvm_machines_of_3_run_in_6_and_go_on_when_their_manager_is_killed() {
    if memory_can_be_limited() && kvm() {
        demo(&["--unit", "32M"]);
    }
}

/// Eight machines of 64 MiB in `budget`, until each guest has found every page that it wrote right.
fn eight_hold(name: &str, budget: u64, workload: impl Fn(usize) -> String) {
    const SIZE: u64 = 64 * MIB;
    let Some(group) = Group::make(name, budget) else { return };
    let hosts = Hosts::new();
    let names: Vec<String> = (0..8).map(|i| format!("m{i}")).collect();
    let host = format!("budget = \"{budget}\"\noverhead = \"8M\"");
    let plan = write_plan(&hosts, &host, SIZE, &names);
    let host = &hosts.source;
    let planned = host.run(&["memory", "plan", path(&plan), "--json"]).succeeded().json();
    let gets = planned["machines"][0]["all_busy_bytes"].as_u64().expect("a figure").to_string();
    let (pool, size) = ((budget / 8 / 8).to_string(), SIZE.to_string());
    let swap_dir = hosts.path("swap");
    let _running: Vec<Running> = (names.iter().enumerate())
        .map(|(i, name)| {
            let workload = workload(i);
            let run = ["vm", "run", name, "--kernel", PROCESS, "--cmdline", &workload];
            let memory = ["--memory", &size, "--memory-limit", &gets, "--swap-pool", &pool];
            let swap = ["--swap-dir", path(&swap_dir), "--swap-size", &size];
            group.around(host).start(&[&run[..], &memory, &swap].concat())
        })
        .collect();
    let mut manager = host.start(&["memory", "run", path(&plan)]);
    // A little of the memory is the table of what each page should be.
    let pages = (SIZE - MIB) / 4096;
    for name in &names {
        let all = wait_for(&format!("{name} has checked all that it has"), || {
            assert_eq!(group.oom_kills(), 0);
            let shown = host.show(name)?;
            assert!(!shown["state"].as_str()?.starts_with("crashed"), "{shown:#}");
            (shown["pages_checked"].as_u64()? >= pages).then_some(shown)
        });
        assert!(all["resident_bytes"].as_u64() < Some(SIZE / 2), "{all:#}");
    }
    assert!(manager.is_alive());
    assert!(group.used() <= budget);
    assert_eq!(group.oom_kills(), 0);
    let kept: u64 =
        names.iter().filter_map(|name| host.show(name)).map(|m| swap(&m, "swapped_bytes")).sum();
    assert!(kept > SIZE * 8 - budget, "what is not in memory is kept: {kept}");
}

#[test]
fn eight_like_machines_run_in_a_quarter_of_their_memory() {
    eight_hold("like", 8 * 64 * MIB / 4, |_| "pattern=read fill=all random=10 seed=7".to_owned());
}

#[test]
fn eight_unlike_machines_run_in_half_of_their_memory() {
    eight_hold("unlike", 8 * 64 * MIB / 2, |i| {
        format!("pattern=read fill=all random=50 seed={}", i + 1)
    });
}

#[test]
fn machines_keep_what_they_may_use_when_their_manager_is_killed_and_the_next_one_goes_on() {
    let hosts = Hosts::new();
    let host = &hosts.source;
    let names = ["a", "b"].map(str::to_owned);
    let plan = write_plan(&hosts, "budget = \"80M\"\noverhead = \"4M\"", 64 * MIB, &names);
    let workload = ["--cmdline", "pattern=moving-set set=4M rate=4000 fill=all random=20"];
    let _running: Vec<Running> =
        names.iter().map(|name| host.boot(name, PROCESS, &workload)).collect();
    let manager = host.start(&["memory", "run", path(&plan)]);
    let held = |name: &str| {
        let shown = host.show(name)?;
        let limit = shown["swap"]["limit_bytes"].as_u64()?;
        let held = shown["resident_bytes"].as_u64()? + swap(&shown, "pool_bytes");
        (held <= limit && limit < 48 * MIB).then_some(limit)
    };
    for name in &names {
        wait_for("it keeps within its limit", || held(name));
    }
    manager.kill();
    let limits = names
        .each_ref()
        .map(|name| host.show(name).expect("it runs")["swap"]["limit_bytes"].clone());
    for (name, limit) in names.iter().zip(&limits) {
        host.works(name);
        wait_for("it keeps within its limit", || held(name));
        assert_eq!(&host.show(name).expect("it runs")["swap"]["limit_bytes"], limit);
    }
    let step = host.run(&["memory", "run", path(&plan), "--once", "--json"]).succeeded().json();
    for name in &names {
        assert!(step["observed"][name]["swapped_bytes"].as_u64() > Some(0), "{step:#}");
        host.works(name);
    }
}

#[test]
fn a_plan_that_cannot_be_held_is_refused_with_its_numbers() {
    let hosts = Hosts::new();
    let plan = write_plan(&hosts, "budget = \"256M\"", 128 * MIB, &["a".into(), "b".into()]);
    let text = fs::read_to_string(&plan).expect("the plan");
    fs::write(&plan, text.replace("balloon = false", "reservation = \"128M\"")).expect("written");
    let words = ["plan.toml", "cannot be held", "256 MiB", "budget", "missing"];
    hosts.source.run(&["memory", "run", path(&plan)]).failed(&words);
    hosts.source.run(&["memory", "run", path(&plan), "--once", "--json"]).failed(&words);
}

#[test]
fn machines_that_do_not_run_yet_are_waited_for_and_one_that_ends_is_no_trouble() {
    let hosts = Hosts::new();
    let host = &hosts.source;
    let names = ["early", "late"].map(str::to_owned);
    let plan = write_plan(&hosts, "budget = \"128M\"\noverhead = \"4M\"", 64 * MIB, &names);
    let mut manager = host.start(&["memory", "run", path(&plan)]);
    let limited = |name: &str| {
        wait_for(&format!("{name} is told what it may use"), || {
            host.show(name)?["swap"]["limit_bytes"].as_u64()
        })
    };
    let early = host.boot("early", PROCESS, &[]);
    limited("early");
    let _late = host.boot("late", PROCESS, &[]);
    limited("late");
    host.run(&["vm", "stop", "early"]).succeeded();
    early.end().succeeded();
    // It comes again, and is told again.
    let _again = host.boot("early", PROCESS, &[]);
    limited("early");
    host.works("late");
    assert!(manager.is_alive() && !manager.has_said("ferry:"));
    manager.signal(Signal::TERM);
    manager.end();
    host.works("early");
}
