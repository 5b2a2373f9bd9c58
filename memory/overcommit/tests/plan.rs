//! Plans: what is read, what is refused and with which words, and what becomes of the example.

use ferry_overcommit::{Host, Machine, Outlook, Plan, Swap, Tax, hold};

const GIB: u64 = 1 << 30;
const MIB: u64 = 1 << 20;

fn example() -> Plan {
    Plan::parse(include_str!("../example.toml")).expect("the example is a plan")
}

#[test]
fn the_example_says_what_its_comments_say_and_can_be_held() {
    let plan = example();
    let usual = Machine { tenant: Some("acme".into()), ..Machine::new("web", 3 * GIB) };
    let db = Machine { name: "db".into(), reservation_bytes: GIB, shares: 2000, ..usual.clone() };
    let batch = Machine { name: "batch".into(), shares: 500, tenant: None, ..usual.clone() };
    let host = Host {
        budget_bytes: 6 * GIB,
        headroom_bytes: 384 * MIB,
        overhead_bytes: 48 * MIB,
        swap_bytes: 4 * GIB,
        tax: Tax::default(),
    };
    let swap = Swap { dir: "/var/tmp/ferry-swap".into(), size_bytes: 4 * GIB, pool_bytes: GIB };
    let machines = vec![db, usual, batch];
    assert_eq!(plan, Plan { host, swap: Some(swap), share_between_tenants: false, machines });
    assert!(hold(&plan.host, &plan.machines).is_ok());
}

#[test]
fn what_is_left_out_is_what_the_comments_say() {
    let text = "[host]\nbudget = \"10G\"\n[[machine]]\nname = \"a\"\nsize = \"1G\"";
    let plan = Plan::parse(text).expect("no more is needed");
    assert_eq!(plan.host, Host::new(10 * GIB));
    assert_eq!(plan.host.headroom_bytes, 10 * GIB / 100 * 6);
    // Without swap, all of it is promised.
    assert_eq!(plan.machines, [Machine { can_swap: false, ..Machine::new("a", GIB) }]);
    let plan = Plan::parse(&format!("{text}\n[swap]\ndir = \"x\"\nsize = \"1G\"")).expect("a plan");
    assert_eq!(plan.swap.expect("one").pool_bytes, 10 * GIB / 8);
    assert!(plan.machines[0].can_swap);
}

#[test]
fn figures_at_the_edge_of_what_can_be_are_read_as_they_are_written() {
    let machine = "[[machine]]\nname = \"a\"\nsize = \"1G\"\n";
    for (tax, permille) in
        [("0.0", Some(0)), ("0.5", Some(500)), ("0.99", Some(990)), ("0.991", None), ("-0.1", None)]
    {
        let plan = Plan::parse(&format!("[host]\nbudget = \"6G\"\ntax = {tax}\n{machine}"));
        let read = plan.ok().map(|plan| plan.host.tax);
        assert_eq!(read, permille.and_then(Tax::permille), "{tax}");
    }
    // All that the headroom leaves, and a bit less.
    for (pool_mib, fits) in [(5 * 1024, false), (5 * 1024 - 1, true)] {
        let swap = format!("[swap]\ndir = \"x\"\nsize = \"1G\"\npool = \"{pool_mib}M\"\n");
        let host = "[host]\nbudget = \"6G\"\nheadroom = \"1G\"\n";
        let plan = Plan::parse(&format!("{host}{swap}{machine}"));
        assert_eq!(plan.is_ok(), fits, "{pool_mib} MiB: {plan:?}");
    }
}

#[test]
fn what_is_wrong_is_said_with_its_line_its_key_and_what_to_do() {
    let host = "[host]\nbudget = \"6G\"\n";
    let machine = "[[machine]]\nname = \"a\"\nsize = \"3G\"\n";
    for (text, words) in [
        ("", &["missing field `host`"][..]),
        ("[host\n", &["line 1"]),
        ("[host]\nbudget = 6\n", &["line 2", "budget = 6", "string"]),
        ("[host]\nbudget = \"6X\"\n", &["line 2", "`6X` is not a size", "512M"]),
        (&format!("{host}bugdet = \"1G\"\n"), &["line 3", "unknown field `bugdet`", "`budget`"]),
        (&format!("{host}tax = 1.0\n{machine}"), &["line 1", "`tax` is 1", "0 to 0.99"]),
        (&format!("{host}tax = nan\n{machine}"), &["line 1", "`tax`"]),
        (
            &format!("{host}headroom = \"6G\"\n{machine}"),
            &["line 1", "6 GiB headroom", "less than"],
        ),
        (&format!("{host}\n\n{machine}shares = 0\n"), &["line 5", "machine `a`", "`shares` is 0"]),
        (
            &format!("{host}{machine}limit = \"4G\"\n"),
            &["line 3", "`limit` (4 GiB)", "`size` (3 GiB)"],
        ),
        (
            &format!("{host}{machine}{machine}"),
            &["line 6", "two machines are called `a`", "rename"],
        ),
        (
            &format!("{host}{machine}\n[swap]\ndir = \"x\"\nsize = \"1G\"\npool = \"6G\""),
            &["line 7", "`pool` (6 GiB)"],
        ),
        (&format!("{host}{machine}color = 1\n"), &["line 6", "unknown field `color`"]),
        (&format!("machine = []\n{host}"), &["no machine", "[[machine]]"]),
    ] {
        let said = Plan::parse(text).expect_err(text).to_string();
        for word in words {
            assert!(said.contains(word), "`{word}` is missing: {said}\nin {text}");
        }
    }
}

#[test]
fn an_outlook_says_the_most_and_the_least_that_each_comes_to() {
    let outlook = Outlook::of(&example());
    assert_eq!(outlook.usable_bytes, 6 * GIB - 384 * MIB - 3 * 48 * MIB);
    assert_eq!(outlook.swap_needed_bytes, 9 * GIB - outlook.usable_bytes);
    assert_eq!(outlook.reserved_bytes, GIB);
    let sum: u64 = outlook.machines.iter().map(|m| m.all_busy_bytes).sum();
    assert!(outlook.usable_bytes - sum < 3 * 4096, "{sum}");
    for machine in &outlook.machines {
        assert!(machine.alone_idle_bytes < machine.all_busy_bytes, "{machine:?}");
        assert!(
            machine.all_busy_bytes < machine.alone_busy_bytes || machine.name == "db",
            "{machine:?}"
        );
        assert!(machine.reservation_bytes <= machine.alone_idle_bytes, "{machine:?}");
    }
    let [db, web, batch] = &outlook.machines[..] else { panic!("three") };
    assert_eq!(db.all_busy_bytes, 3 * GIB, "it has more shares than it can use");
    assert!((web.all_busy_bytes / 2).abs_diff(batch.all_busy_bytes) <= 4096, "{web:?} {batch:?}");
}
