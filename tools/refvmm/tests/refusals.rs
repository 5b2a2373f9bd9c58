//! Bad input is refused, each with a sentence that names it.

use ferry_migrate::{Guest, Host};
use ferry_protocol::{DeviceSpec, MachineSpec, RunPermit, StateReader, StateWriter};
use ferry_refvmm::{Machine, MachineConfig, RefHost};

mod tiny;

fn refused(config: &MachineConfig) -> String {
    Machine::boot(config).expect_err("it was accepted").to_string()
}

#[test]
fn a_kernel_file_that_is_none_is_named_with_what_it_is() {
    if !tiny::kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let good = tiny::elf(tiny::COUNTER, 0);
    let mut big_endian = good.clone();
    big_endian[5] = 2;
    let mut no_note = good.clone();
    no_note[64 + 3 * 56 + 8] = 17;
    let mut low = good.clone();
    low[64 + 2 * 56 + 24..][..8].copy_from_slice(&0x1000u64.to_le_bytes());
    let mut elsewhere = good.clone();
    elsewhere[64 + 3 * 56 + 16..][..4].copy_from_slice(&0x70_0000u32.to_le_bytes());
    let cases: Vec<(Vec<u8>, &str)> = vec![
        (b"#!/bin/sh\n".to_vec(), "begins with 23 21 2f"),
        (Vec::new(), "empty"),
        (vec![0x1f, 0x8b, 8, 0], "gzip"),
        (good[..40].to_vec(), "only 40 bytes"),
        (good[..300].to_vec(), "truncated"),
        (big_endian, "byte order 2"),
        (no_note, "without a PVH entry"),
        (elsewhere, "none of its segments"),
        (low, "0x1000"),
    ];
    for (file, says) in cases {
        let e = refused(&tiny::config(dir.path(), &file));
        assert!(e.contains(says) && e.contains("kernel"), "{says}: {e}");
    }
    let mut bzimage = tiny::bzimage();
    bzimage[0x236] = 0;
    assert!(refused(&tiny::config(dir.path(), &bzimage)).contains("without a 64-bit entry"));
}

#[test]
fn damaged_kernel_files_never_panic() {
    if !tiny::kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    for good in [tiny::elf(tiny::COUNTER, 0), tiny::bzimage()] {
        for at in (0..good.len().min(0x270)).step_by(7) {
            let mut bad = good.clone();
            bad[at] ^= 0xff;
            // Refused or built; it is not run.
            drop(Machine::boot(&tiny::config(dir.path(), &bad)));
        }
    }
}

#[test]
fn what_does_not_fit_says_how_much_it_needs() {
    if !tiny::kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let e = refused(&tiny::config(dir.path(), &tiny::elf(tiny::COUNTER, 64 << 20)));
    assert!(
        e.contains(&((64 << 20) + tiny::LOAD).to_string()) && e.contains(&(8 << 20).to_string()),
        "{e}"
    );

    let initrd = dir.path().join("initrd");
    std::fs::write(&initrd, vec![1; 9 << 20]).unwrap();
    let fits = tiny::config(dir.path(), &tiny::elf(tiny::COUNTER, 0));
    let e = refused(&MachineConfig { initrd: Some(initrd), ..fits.clone() });
    assert!(e.contains("initrd") && e.contains(&(9 << 20).to_string()), "{e}");

    let cases = [
        (MachineConfig { cpus: 0, ..fits.clone() }, "not 0"),
        (MachineConfig { cpus: 100_000, ..fits.clone() }, "not 100000"),
        (MachineConfig { memory_bytes: 4096, ..fits.clone() }, "4096"),
        (MachineConfig { memory_bytes: (8 << 20) + 1, ..fits.clone() }, "8388609"),
        (MachineConfig { memory_bytes: u64::MAX, ..fits.clone() }, "18446744073709551615"),
        (MachineConfig { cmdline: "x".repeat(5000), ..fits.clone() }, "5000 bytes"),
        (MachineConfig { cmdline: "a\0b".into(), ..fits.clone() }, "NUL"),
        (MachineConfig { kernel: dir.path().join("gone"), ..fits.clone() }, "gone"),
        (MachineConfig { kernel: dir.path().into(), ..fits.clone() }, "directory"),
        (
            MachineConfig { initrd: Some(dir.path().join("gone")), ..fits.clone() },
            "cannot open initrd",
        ),
        (
            MachineConfig { serial: ferry_refvmm::SerialSink::File(dir.path().into()), ..fits },
            "serial output",
        ),
    ];
    for (config, says) in cases {
        let e = refused(&config);
        assert!(e.contains(says), "{says}: {e}");
    }
}

#[test]
fn a_host_refuses_a_machine_with_every_reason() {
    if !tiny::kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let machine = Machine::boot(&tiny::config(dir.path(), &tiny::elf(tiny::COUNTER, 0))).unwrap();
    let host = RefHost::default();
    let good = machine.spec();
    assert!(host.prepare(&good).is_ok());
    let with = |change: &dyn Fn(&mut MachineSpec)| {
        let mut spec = good.clone();
        change(&mut spec);
        let refusals = host.prepare(&spec).err().unwrap_or_default();
        refusals.iter().map(|r| format!("{}: {}", r.what, r.why)).collect::<Vec<_>>().join("\n")
    };
    type Case<'a> = (&'a dyn Fn(&mut MachineSpec), &'a [&'a str]);
    let cases: [Case<'_>; 7] = [
        (&|s| s.vmm = "qemu".into(), &["vmm", "qemu"]),
        (&|s| s.cpu_features.push("amx_tile_of_tomorrow".into()), &["cpu", "amx_tile_of_tomorrow"]),
        (
            &|s| {
                s.cpu_features.push("nonsense".into());
                s.devices.push(DeviceSpec { kind: "gpu".into(), instance: 0, version: 1 });
                s.vcpus = 9999;
            },
            &["nonsense", "gpu", "9999"],
        ),
        (&|s| s.devices[0].version += 1, &["device", "version 2"]),
        (&|s| s.extents = vec![(0, 1 << 38)], &["memory"]),
        (&|s| s.extents = vec![(0, 100)], &["memory", "[(0, 100)]"]),
        (&|s| s.vcpus = 2, &["CPUID for 1 vCPUs"]),
    ];
    for (change, says) in cases {
        let said = with(change);
        assert!(says.iter().all(|s| said.contains(s)), "{says:?}: {said}");
    }
    for cut in [0, 1, 8, good.config.len() - 1] {
        assert!(with(&|s| s.config.truncate(cut)).contains("description"), "cut to {cut}");
    }
}

#[test]
fn a_machine_without_loaded_state_or_its_own_permit_does_not_run() {
    if !tiny::kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let mut source =
        Machine::boot(&tiny::config(dir.path(), &tiny::elf(tiny::COUNTER, 0))).unwrap();
    let mut destination = RefHost::default().prepare(&source.spec()).unwrap();
    assert!(destination.pause().is_err());
    assert!(destination.resume_by_operator().is_err());
    assert!(destination.save(&mut StateWriter::new()).is_err());

    let permit = source.pause().unwrap();
    assert!(source.resume_by_operator().unwrap_err().to_string().contains("handed over"));
    assert!(source.pause().is_err(), "a second permit");
    let (permit, e) = destination.resume(permit).unwrap_err();
    assert!(e.to_string().contains("no state"), "{e}");

    let mut state = StateWriter::new();
    source.save(&mut state).unwrap();
    let bytes = state.finish().unwrap();
    assert!(
        source.load(&StateReader::parse(&bytes).unwrap()).is_ok(),
        "its own state, while the permit is out"
    );
    let (_, e) = source.resume(RunPermit::for_new_machine(1)).unwrap_err();
    assert!(e.to_string().contains("another machine"), "{e}");
    source.resume(permit).unwrap();
    assert!(source.load(&StateReader::parse(&bytes).unwrap()).is_err(), "it holds its permit");
}

#[test]
fn state_with_a_section_missing_or_unknown_is_refused_by_name() {
    if !tiny::kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let source = Machine::boot(&tiny::config(dir.path(), &tiny::elf(tiny::COUNTER, 0))).unwrap();
    let mut destination = RefHost::default().prepare(&source.spec()).unwrap();
    let load = |destination: &mut Machine, kind: &str| {
        let mut out = StateWriter::new();
        out.put("machine", 0, 1, 1, &false).unwrap();
        out.put(kind, 0, 1, 1, &0u32).unwrap();
        let bytes = out.finish().unwrap();
        destination.load(&StateReader::parse(&bytes).unwrap()).unwrap_err().to_string()
    };
    assert!(load(&mut destination, "gpu").contains("gpu[0]"));
    assert!(load(&mut destination, "regs").contains("mp-state[0]"));
    let (_, e) = destination.resume(RunPermit::for_new_machine(1)).unwrap_err();
    assert!(e.to_string().contains("no state"), "{e}");
}
