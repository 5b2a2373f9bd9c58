//! What a machine does for its operator: starts, pauses, ends, prints.

use std::time::Duration;

use ferry_migrate::Guest;
use ferry_refvmm::{DirtyLog, Machine, MachineStatus};

mod tiny;

#[test]
fn a_pvh_elf_runs_and_prints() {
    if !tiny::kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let machine = Machine::boot(&tiny::config(dir.path(), &tiny::elf(tiny::COUNTER, 0))).unwrap();
    assert_eq!(machine.status(), MachineStatus::Paused);
    std::thread::sleep(Duration::from_millis(20));
    assert!(tiny::printed(dir.path()).is_empty(), "it ran before it was told to");
    machine.resume_by_operator().unwrap();
    assert_eq!(machine.status(), MachineStatus::Running);
    tiny::eventually("a hundred characters", || tiny::printed(dir.path()).len() > 100);
    machine.stop();
    assert_eq!(machine.status(), MachineStatus::Stopped);
    let text = tiny::printed(dir.path());
    assert_eq!(text[0], b'b');
    tiny::assert_unbroken(&text);
}

#[test]
fn a_bzimage_runs_in_64_bit_mode_with_a_memory_map() {
    if !tiny::kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let machine = Machine::boot(&tiny::config(dir.path(), &tiny::bzimage())).unwrap();
    machine.resume_by_operator().unwrap();
    tiny::eventually("output", || tiny::printed(dir.path()).len() >= 3);
    assert_eq!(tiny::printed(dir.path()), b"642");
}

#[test]
fn a_paused_machine_does_not_execute_and_a_hundred_pauses_lose_nothing() {
    if !tiny::kvm() {
        return;
    }
    for dirty_log in [DirtyLog::Bitmap, DirtyLog::Ring] {
        let dir = tempfile::tempdir().unwrap();
        let config = ferry_refvmm::MachineConfig {
            dirty_log,
            ..tiny::config(dir.path(), &tiny::elf(tiny::COUNTER, 0))
        };
        let mut machine = Machine::boot(&config).unwrap();
        machine.resume_by_operator().unwrap();
        for _ in 0..100 {
            let permit = machine.pause().unwrap();
            assert_eq!(machine.status(), MachineStatus::HandingOver);
            let before = tiny::printed(dir.path()).len();
            std::thread::sleep(Duration::from_millis(1));
            assert_eq!(tiny::printed(dir.path()).len(), before);
            machine.resume(permit).unwrap();
            std::thread::sleep(Duration::from_millis(1));
        }
        let before = tiny::printed(dir.path()).len();
        tiny::eventually("more output", || tiny::printed(dir.path()).len() > before);
        tiny::assert_unbroken(&tiny::printed(dir.path()));
    }
}

#[test]
fn a_guest_that_resets_the_machine_has_halted_and_a_triple_fault_is_a_crash() {
    if !tiny::kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let mut machine = Machine::boot(&tiny::config(dir.path(), &tiny::elf(tiny::RESET, 0))).unwrap();
    machine.resume_by_operator().unwrap();
    let ended = machine.wait_ended(Duration::from_secs(10)).unwrap();
    assert!(
        matches!(&ended, MachineStatus::Halted { reason } if reason.contains("0x64")),
        "{ended}"
    );
    assert_eq!(machine.status(), ended);
    let e = machine.pause().unwrap_err().to_string();
    assert!(e.contains("tiny") && e.contains("halted"), "{e}");

    let machine =
        Machine::boot(&tiny::config(dir.path(), &tiny::elf(tiny::TRIPLE_FAULT, 0))).unwrap();
    machine.resume_by_operator().unwrap();
    let ended = machine.wait_ended(Duration::from_secs(10)).unwrap();
    assert!(
        matches!(&ended, MachineStatus::Crashed { reason } if reason.contains("vCPU 0")),
        "{ended}"
    );
    assert!(machine.resume_by_operator().is_err());
}

#[test]
fn unknown_ports_and_addresses_read_as_ones() {
    if !tiny::kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let machine = Machine::boot(&tiny::config(dir.path(), &tiny::elf(tiny::PROBE, 0))).unwrap();
    machine.resume_by_operator().unwrap();
    tiny::eventually("output", || tiny::printed(dir.path()).ends_with(b"."));
    assert_eq!(tiny::printed(dir.path()), [0xff, 0xff, 0, b'.']);
}

#[test]
fn what_is_typed_reaches_the_guest() {
    if !tiny::kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let machine = Machine::boot(&tiny::config(dir.path(), &tiny::elf(tiny::ECHO, 0))).unwrap();
    machine.resume_by_operator().unwrap();
    assert_eq!(machine.console_input(b"HAL"), 3);
    tiny::eventually("the echo", || tiny::printed(dir.path()) == b"IBM");
}

#[test]
fn every_dirty_log_reports_the_page_that_the_guest_writes() {
    if !tiny::kvm() {
        return;
    }
    for dirty_log in [DirtyLog::Bitmap, DirtyLog::Ring, DirtyLog::WriteProtect] {
        let dir = tempfile::tempdir().unwrap();
        let config = ferry_refvmm::MachineConfig {
            dirty_log,
            ..tiny::config(dir.path(), &tiny::elf(tiny::COUNTER, 0))
        };
        let mut machine = Machine::boot(&config).unwrap();
        machine.resume_by_operator().unwrap();
        let mut sources = machine.dirty_sources().unwrap();
        sources.iter_mut().for_each(|s| s.start().unwrap());
        for round in 0..3 {
            let before = tiny::printed(dir.path()).len();
            tiny::eventually("output", || tiny::printed(dir.path()).len() > before + 10);
            let permit = machine.pause().unwrap();
            let mut dirty = ferry_pages::PageSet::new();
            for s in &mut sources {
                s.collect(&mut dirty).unwrap();
                s.rearm(&dirty).unwrap();
            }
            assert!(dirty.contains(tiny::COUNTER_FRAME), "{dirty_log:?}, round {round}");
            assert!(!dirty.contains(tiny::COUNTER_FRAME + 1), "{dirty_log:?}, round {round}");
            machine.resume(permit).unwrap();
        }
        sources.iter_mut().for_each(|s| s.stop().unwrap());
    }
}

#[test]
fn more_writes_than_a_dirty_ring_holds_are_all_reported() {
    if !tiny::kvm() {
        return;
    }
    for dirty_log in [DirtyLog::Bitmap, DirtyLog::Ring, DirtyLog::WriteProtect] {
        let dir = tempfile::tempdir().unwrap();
        let config = ferry_refvmm::MachineConfig {
            dirty_log,
            memory_bytes: 128 << 20,
            ..tiny::config(dir.path(), &tiny::elf(tiny::SWEEP, 0))
        };
        let mut machine = Machine::boot(&config).unwrap();
        let mut sources = machine.dirty_sources().unwrap();
        sources.iter_mut().for_each(|s| s.start().unwrap());
        machine.resume_by_operator().unwrap();
        tiny::eventually("the sweep", || tiny::printed(dir.path()) == b".");
        let _permit = machine.pause().unwrap();
        let mut dirty = ferry_pages::PageSet::new();
        sources.iter_mut().for_each(|s| s.collect(&mut dirty).unwrap());
        assert_eq!(dirty.count_in(tiny::SWEPT), tiny::SWEPT.pages, "{dirty_log:?}");
    }
}

#[test]
fn every_machine_has_a_balloon_and_without_a_driver_it_says_so() {
    if !tiny::kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let machine = Machine::boot(&tiny::config(dir.path(), &tiny::elf(tiny::MAGIC, 0))).unwrap();
    machine.resume_by_operator().unwrap();
    tiny::eventually("output", || tiny::printed(dir.path()).len() >= 4);
    assert_eq!(tiny::printed(dir.path()), b"virt");
    let status = machine.balloon();
    assert!(!status.driver && status.troubles == 0);
    assert_eq!((status.target_bytes, status.actual_bytes), (8 << 20, 8 << 20));
    machine.ask_balloon_statistics();
    machine.end_free_page_hints();
    for refused in [machine.set_balloon_target(4 << 20), machine.begin_free_page_hints()] {
        let said = refused.unwrap_err().to_string();
        assert!(said.contains("tiny") && said.contains("no driver"), "{said}");
    }
}
