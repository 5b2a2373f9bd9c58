//! Firecracker's side, played from its documentation by a process of its own: it maps memory, registers it,
//! hands it over, and touches it or gives it back. What it reads is compared with what the snapshot held.

#![allow(unsafe_code, reason = "maps memory and touches it by address, as a machine does")]

mod machine;
mod snapshot;

use std::os::fd::AsFd;
use std::os::unix::process::ExitStatusExt;

use ferry_firecracker::{Ended, PagerError};
use machine::Session;
use snapshot::{PAGES, Snapshot};

/// Not a test: the process that plays Firecracker in the others, which start it.
#[test]
#[ignore = "started by the other tests"]
fn plays_firecracker() {
    machine::main();
}

#[test]
fn every_page_is_the_snapshots_whoever_touches_it_first() {
    for snapshot in Snapshot::all() {
        for ahead in [false, true] {
            let mut session = Session::start(&snapshot, "touch", ahead);
            session.machine_ends_well();
            let report = session.pager().unwrap().unwrap();
            // Memory was touched to its last page: the pager was done first, or saw the end.
            assert_eq!((report.left, report.page_bytes), (0, 4096), "{report:?}");
            assert!(report.ahead == 0 || ahead, "{report:?}");
            if !ahead {
                let data = snapshot::data_pages();
                // Zeros touched after the last page of data was placed are no fault any more.
                assert!(report.faults >= data && report.zeros <= PAGES - data, "{report:?}");
                assert_eq!(report.waits.count, data, "{report:?}");
            }
        }
    }
}

#[test]
fn memory_that_was_given_back_reads_as_zeros_and_never_as_the_snapshot() {
    for snapshot in Snapshot::all() {
        for ahead in [false, true] {
            let mut session = Session::start(&snapshot, "balloon", ahead);
            session.machine_ends_well();
            let report = session.pager().unwrap().unwrap();
            assert!(report.given_back > 0 || ahead, "{report:?}");
        }
    }
}

#[test]
fn a_machine_whose_memory_is_whole_goes_on_without_its_pager() {
    for snapshot in Snapshot::all() {
        let mut session = Session::start(&snapshot, "alone", true);
        let report = session.pager().unwrap().unwrap();
        assert_eq!((report.ended, report.left), (Ended::Whole, 0));
        assert!(report.ahead > 0);
        session.go_on();
        session.machine_ends_well();
    }
}

#[test]
fn a_pager_that_is_asked_to_stop_loads_the_rest_first() {
    let snapshot = Snapshot::file();
    let mut session = Session::start(&snapshot, "alone", false);
    session.wait_for("ready");
    assert!(session.pager_runs());
    session.stop(1);
    assert_eq!(session.pager().unwrap().unwrap().ended, Ended::Whole);
    session.go_on();
    session.machine_ends_well();
}

#[test]
fn a_pager_that_is_asked_twice_ends_the_machine() {
    let snapshot = Snapshot::file();
    let mut session = Session::start(&snapshot, "alone", false);
    session.wait_for("ready");
    session.stop(2);
    let words = session.pager().unwrap_err().to_string();
    assert!(
        words.contains("asked twice to stop") && words.contains("ended the machine"),
        "{words}"
    );
    assert_eq!(session.machine().signal(), Some(libc::SIGKILL));
}

#[test]
fn a_machine_that_is_killed_ends_its_pager() {
    let snapshot = Snapshot::file();
    let mut session = Session::start(&snapshot, "alone", false);
    session.wait_for("ready");
    session.kill_machine();
    let report = session.pager().unwrap().unwrap();
    assert_eq!(report.ended, Ended::Machine);
    assert!(report.left > 0);
}

#[test]
fn a_memory_file_that_is_not_the_machines_is_refused_and_the_machine_told() {
    for pages in [PAGES - 1, PAGES + 1] {
        let snapshot = Snapshot::file();
        snapshot.resize(pages);
        let mut session = Session::start(&snapshot, "alone", true);
        let words = session.pager().unwrap_err().to_string();
        assert!(words.contains(&format!("holds {}", pages * 4096)), "{words}");
        assert_eq!(session.machine().signal(), Some(libc::SIGKILL));
    }
}

#[test]
fn a_page_that_cannot_be_had_ends_the_machine_only_when_it_is_wanted() {
    for (snapshot, names) in [
        (Snapshot::bundle(), "is damaged"),
        (Snapshot::lent(), "is damaged"),
        (Snapshot::file(), "cannot read"),
    ] {
        for (scenario, survives) in [("touch", false), ("first", true)] {
            for ahead in [true, false] {
                let damage = || snapshot.damage();
                let mut session = Session::start_after(&snapshot, scenario, ahead, damage);
                if survives {
                    session.machine_ends_well();
                    assert_eq!(session.pager().unwrap().unwrap().ended, Ended::Machine);
                    snapshot.repair();
                    continue;
                }
                let error = session.pager().unwrap_err();
                assert!(matches!(error, PagerError::Killed { .. }), "{error}");
                assert!(error.to_string().contains(names), "{error}");
                assert_eq!(session.machine().signal(), Some(libc::SIGKILL));
                snapshot.repair();
            }
        }
    }
}

#[test]
fn a_machine_waits_for_a_host_that_is_away_and_goes_on_when_it_is_back() {
    for ahead in [false, true] {
        let snapshot = Snapshot::lent();
        let away = || snapshot.stop_lender();
        let mut session = Session::start_after(&snapshot, "touch", ahead, away);
        std::thread::sleep(std::time::Duration::from_millis(500));
        assert!(session.pager_runs());
        snapshot.start_lender();
        session.machine_ends_well();
        assert_eq!(session.pager().unwrap().unwrap().left, 0);
    }
}

#[test]
fn a_bundle_that_is_replaced_while_its_host_is_away_ends_the_machine_that_needs_it() {
    let snapshot = Snapshot::lent();
    let mut session = Session::start_after(&snapshot, "touch", true, || {
        snapshot.stop_lender();
        snapshot.replace();
        snapshot.start_lender();
    });
    let error = session.pager().unwrap_err();
    assert!(matches!(error, PagerError::Killed { .. }), "{error}");
    for words in ["ferry://127.0.0.1:", "was replaced or removed"] {
        assert!(error.to_string().contains(words), "{error}");
    }
    assert_eq!(session.machine().signal(), Some(libc::SIGKILL));
}

#[test]
fn huge_pages_are_placed_whole() {
    let free = std::fs::read_to_string("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages");
    if free.ok().and_then(|n| n.trim().parse().ok()).is_none_or(|n: u64| n < PAGES / 512) {
        eprintln!("skipped: needs {} free huge pages of 2 MiB", PAGES / 512);
        return;
    }
    for snapshot in Snapshot::all() {
        for ahead in [false, true] {
            let mut session = Session::start(&snapshot, "huge", ahead);
            session.machine_ends_well();
            assert_eq!(session.pager().unwrap().unwrap().page_bytes, 2 << 20);
        }
    }
}

#[test]
fn a_hand_over_that_is_none_is_refused_and_nobody_is_harmed() {
    let region = r#"[{"base_host_virt_addr":1048576,"size":4096,"offset":0}]"#;
    let long = " ".repeat(100 << 10);
    let file = tempfile::tempfile().unwrap();
    let one = [file.as_fd()];
    let two = [file.as_fd(), file.as_fd()];
    for (text, fds, why) in [
        ("", &[][..], "ended after 0 bytes"),
        (&region[..20], &one, "ended after 20 bytes"),
        (region, &[], "holds"),
        ("hello", &one, "not Firecracker's list"),
        (&long, &one, "longer than"),
        (&snapshot::one_region(), &[], "came with 0 descriptors"),
        (&snapshot::one_region(), &two, "came with 2 descriptors"),
        (&snapshot::one_region(), &one, "is not a userfaultfd"),
    ] {
        // This process connects: it would be the one to be ended.
        let error = machine::hand_over_to_pager(&Snapshot::file(), text, fds);
        assert!(matches!(error, PagerError::Handover(_)), "{error}");
        assert!(error.to_string().contains(why), "{text:.40}: {error}");
    }
}

#[test]
fn a_socket_that_a_killed_pager_left_is_replaced_and_no_other() {
    use ferry_firecracker::Door;
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("socket");
    // Dropped without being removed, as by a process that was killed.
    drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
    let door = Door::open(&path).unwrap();
    assert!(Door::open(&path).unwrap_err().to_string().contains("cannot listen at"));
    drop(door);
    assert!(!path.exists());
    std::fs::write(&path, "a file").unwrap();
    assert!(Door::open(&path).is_err());
    assert_eq!(std::fs::read_to_string(&path).unwrap(), "a file");
}
