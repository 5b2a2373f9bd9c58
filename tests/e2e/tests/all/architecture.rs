//! The dependency law of ARCHITECTURE.md: what is pure has nothing below it to break the rule with.

use std::process::Command;

/// Below a pure crate there is no runtime, socket, kernel interface or random source.
const IMPURE: [&str; 9] =
    ["tokio", "quinn", "mio", "socket2", "libc", "kvm-ioctls", "userfaultfd", "vm-memory", "rand"];

fn below(package: &str) -> Vec<String> {
    let out = Command::new(env!("CARGO"))
        .args(["tree", "--offline", "--locked", "-p", package, "-e", "normal", "--prefix", "none"])
        .current_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/../.."))
        .output()
        .expect("cargo runs");
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    let text = String::from_utf8_lossy(&out.stdout);
    text.lines().filter_map(|l| l.split_whitespace().next()).map(str::to_owned).collect()
}

#[test]
fn pure_crates_depend_on_nothing_impure() {
    for package in
        ["ferry-pages", "ferry-postcopy", "ferry-codec", "ferry-protocol", "ferry-overcommit"]
    {
        let below = below(package);
        assert!(below.iter().any(|name| name == package), "{package}: {below:?}");
        for impure in IMPURE {
            assert!(!below.iter().any(|name| name == impure), "{package} depends on {impure}");
        }
    }
    // The list above is of names that exist: the engine has them.
    assert!(below("ferry-migrate").iter().any(|name| name == "tokio"));
}

#[test]
fn no_library_knows_the_tools_or_a_vmm() {
    for package in [
        "ferry-migrate",
        "ferry-bundle",
        "ferry-depot",
        "ferry-transport",
        "ferry-memory",
        "ferry-balloon",
        "ferry-sharing",
        "ferry-swap",
        "ferry-overcommit",
        "ferry-dirtylog",
        "ferry-firecracker",
    ] {
        for tool in ["ferry", "ferry-refvmm", "ferry-process-guest", "ferry-guest"] {
            assert!(!below(package).iter().any(|name| name == tool), "{package} depends on {tool}");
        }
    }
}

#[test]
fn what_reads_bundles_knows_no_network_and_what_lends_them_no_engine() {
    for package in ["ferry-bundle", "ferry-firecracker"] {
        let below = below(package);
        for network in ["tokio", "quinn", "ferry-transport", "ferry-depot", "ferry-migrate"] {
            assert!(!below.iter().any(|name| name == network), "{package} depends on {network}");
        }
    }
    let below = below("ferry-depot");
    assert!(below.iter().any(|name| name == "ferry-transport"));
    assert!(!below.iter().any(|name| name == "ferry-migrate"));
}
