//! A machine's state goes from one machine to another, which goes on where it stood.

use std::path::Path;
use std::time::{Duration, Instant};

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

/// Linux, two vCPUs, ten moves once process 1 runs. Process 1 checks its memory and Linux panics if it is wrong.
#[test]
#[ignore = "Linux needs a minute or more to boot here"]
fn linux_moves_ten_times_and_goes_on() {
    const CMDLINE: &str = "console=ttyS0 noxsave mitigations=off random.trust_cpu=off rcutorture.stat_interval=5 \
        rcutorture.fwd_progress=0 rcutorture.nreaders=2 clearcpuid=popcnt,cx16,fsgsbase,invpcid,pcid,rdrand,rdseed,\
        clwb,clflushopt,movbe,umip,smap,smep,rdtscp,rdpid,erms,fsrm";
    if !tiny::kvm() {
        return;
    }
    let beside = concat!(env!("CARGO_MANIFEST_DIR"), "/../../../shared/linux-guest");
    let guest = std::env::var_os("FERRY_LINUX_GUEST").unwrap_or_else(|| beside.into());
    let packed = Path::new(&guest).join("vmlinux.xz");
    let Ok(unpacked) = std::process::Command::new("xz").arg("-dc").arg(&packed).output() else {
        return eprintln!("SKIP: no xz command");
    };
    if !unpacked.status.success() {
        return eprintln!("SKIP: no Linux guest at {}; set FERRY_LINUX_GUEST", packed.display());
    }
    let dir = tempfile::tempdir().unwrap();
    let config = ferry_refvmm::MachineConfig {
        memory_bytes: 256 << 20,
        cpus: 2,
        initrd: Some(Path::new(&guest).join("initrd.gz")),
        cmdline: CMDLINE.into(),
        ..tiny::config(dir.path(), &unpacked.stdout)
    };
    let mut machine = Machine::boot(&config).unwrap();
    machine.resume_by_operator().unwrap();
    let text = || String::from_utf8_lossy(&tiny::printed(dir.path())).into_owned();
    let goes_on = |machine: &Machine, until: &dyn Fn() -> bool| {
        let begun = Instant::now();
        while !until() {
            assert_eq!(machine.wait_ended(Duration::from_millis(100)), None, "{}", text());
            assert!(begun.elapsed().as_secs() < 600, "{}", text());
        }
    };
    goes_on(&machine, &|| text().contains("init as init"));
    let booted = text().len();
    for _ in 0..10 {
        machine = moved(machine, &arrival(dir.path()));
        let before = text().len();
        goes_on(&machine, &|| text().len() > before + 100);
    }
    let since = text().split_off(booted);
    assert!(!since.contains("panic") && !since.contains("BUG"), "{since}");
}
