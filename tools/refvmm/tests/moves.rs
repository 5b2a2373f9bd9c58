//! A machine's state goes from one machine to another, which goes on where it stood.

use std::path::Path;
use std::time::Duration;

use ferry_migrate::Guest;
use ferry_protocol::{StateReader, StateWriter};
use ferry_refvmm::{Arrival, DirtyLog, Machine, MachineStatus, SerialSink};

mod carry;
mod tiny;

/// Moves `source` within this process.
fn moved(mut source: Machine, arrival: &Arrival) -> Machine {
    let mut destination = Machine::arrive(&source.spec(), arrival).unwrap();
    assert_eq!(destination.status(), MachineStatus::Arriving);
    let permit = source.pause().unwrap();
    let mut out = StateWriter::new();
    source.save(&mut out).unwrap();
    carry::memory(&source.memory(), &destination.memory());
    destination.load(&StateReader::parse(&out.finish().unwrap()).unwrap()).unwrap();
    destination.resume(permit).unwrap();
    source.set_moved();
    assert_eq!(source.status(), MachineStatus::Moved);
    destination
}

fn arrival(dir: &Path) -> Arrival {
    Arrival { serial: SerialSink::File(tiny::serial(dir)), ..Arrival::default() }
}

#[test]
fn a_machine_that_moves_goes_on_without_missing_or_repeating_a_step() {
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
        for _ in 0..10 {
            let before = tiny::printed(dir.path()).len();
            tiny::eventually("output", || tiny::printed(dir.path()).len() > before + 20);
            machine = moved(machine, &Arrival { dirty_log, ..arrival(dir.path()) });
            assert_eq!(machine.status(), MachineStatus::Running);
        }
        machine.stop();
        tiny::assert_unbroken(&tiny::printed(dir.path()));
    }
}

#[test]
fn a_machine_that_its_operator_paused_stays_paused_where_it_arrives() {
    if !tiny::kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let machine = Machine::boot(&tiny::config(dir.path(), &tiny::elf(tiny::COUNTER, 0))).unwrap();
    let machine = moved(machine, &arrival(dir.path()));
    assert_eq!(machine.status(), MachineStatus::Paused);
    std::thread::sleep(Duration::from_millis(20));
    assert!(tiny::printed(dir.path()).is_empty());
    machine.resume_by_operator().unwrap();
    tiny::eventually("output", || !tiny::printed(dir.path()).is_empty());
}

#[test]
fn what_was_typed_and_not_read_moves_along() {
    if !tiny::kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let machine = Machine::boot(&tiny::config(dir.path(), &tiny::elf(tiny::ECHO, 0))).unwrap();
    assert_eq!(machine.console_input(b"HAL"), 3);
    let machine = moved(machine, &arrival(dir.path()));
    machine.resume_by_operator().unwrap();
    tiny::eventually("the echo", || tiny::printed(dir.path()) == b"IBM");
}

#[test]
fn building_an_arriving_machine_touches_no_memory() {
    if !tiny::kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let source = Machine::boot(&tiny::config(dir.path(), &tiny::elf(tiny::COUNTER, 0))).unwrap();
    let destination = Machine::arrive(&source.spec(), &Arrival::default()).unwrap();
    assert_eq!(destination.memory().resident().unwrap().len(), 0);
    assert!(source.memory().resident().unwrap().len() < 16);
}
