//! What a machine is shown of the processor decides where it can go.

use std::path::Path;

use ferry_migrate::{Guest, Host};
use ferry_protocol::{Refusal, StateReader, StateWriter};
use ferry_refvmm::{Arrival, Cpu, Machine, MachineConfig, RefHost, SerialSink};

mod carry;
mod tiny;

/// Features that leaf 0x80000001 shows in ECX, by bit: any KVM can keep guests from seeing them.
const HIDDEN: [(&str, u8); 3] = [("3dnowprefetch", 8), ("lahf_lm", 0), ("abm", 5)];

/// This host's processor, what is left without one feature, and that feature with its bit.
fn without_one() -> (Cpu, Cpu, &'static str, u8) {
    let all = RefHost::cpu().unwrap();
    let (feature, bit) = HIDDEN
        .into_iter()
        .find(|(name, _)| all.features.contains(*name))
        .expect("a feature to take away");
    let mut less = all.clone();
    less.features.remove(feature);
    (all, less, feature, bit)
}

fn boot(dir: &Path, cpu: Option<Cpu>) -> Machine {
    let config = tiny::config(dir, &tiny::elf(tiny::FEATURES, 0));
    Machine::boot(&MachineConfig { cpu, ..config }).unwrap()
}

/// A host that lacks what is not in `cpu`.
fn host(dir: &Path, cpu: &Cpu) -> RefHost {
    let serial = SerialSink::File(tiny::serial(dir));
    RefHost { arrival: Arrival { serial, cpu: Some(cpu.clone()), ..Arrival::default() } }
}

#[test]
fn a_guest_of_a_baseline_sees_what_is_in_it_and_no_more() {
    if !tiny::kvm() {
        return;
    }
    let (all, less, _, bit) = without_one();
    for (cpu, there) in [(None, true), (Some(all), true), (Some(less), false)] {
        let dir = tempfile::tempdir().unwrap();
        let machine = boot(dir.path(), cpu);
        machine.resume_by_operator().unwrap();
        tiny::eventually("output", || tiny::printed(dir.path()).len() > 4);
        let ecx = *tiny::printed(dir.path()).first_chunk().unwrap();
        assert_eq!(u32::from_le_bytes(ecx) >> bit & 1 == 1, there);
    }
}

#[test]
fn a_machine_of_a_baseline_moves_to_a_host_that_lacks_exactly_what_was_taken_away() {
    if !tiny::kvm() {
        return;
    }
    let (_, less, ..) = without_one();
    let dir = tempfile::tempdir().unwrap();
    let mut source = boot(dir.path(), Some(less.clone()));
    assert_eq!(source.cpu(), Cpu { tsc_khz: source.cpu().tsc_khz, ..less.clone() });
    source.resume_by_operator().unwrap();
    let mut destination = host(dir.path(), &less).prepare(&source.spec()).unwrap();
    assert_eq!(destination.cpu(), source.cpu());
    let permit = source.pause().unwrap();
    let mut out = StateWriter::new();
    source.save(&mut out).unwrap();
    carry::memory(&source.memory(), &destination.memory());
    destination.load(&StateReader::parse(&out.finish().unwrap()).unwrap()).unwrap();
    destination.resume(permit).unwrap();
    source.set_moved();
    let before = tiny::printed(dir.path()).len();
    tiny::eventually("more output", || tiny::printed(dir.path()).len() > before + 10);
    // And on, to one that has more.
    assert!(RefHost::default().prepare(&destination.spec()).is_ok());
}

#[test]
fn a_host_that_lacks_what_the_guest_was_shown_says_so_by_name_before_it_takes_memory() {
    if !tiny::kvm() {
        return;
    }
    let (all, less, feature, _) = without_one();
    let dir = tempfile::tempdir().unwrap();
    let machine = boot(dir.path(), None);
    type Change<'a> = &'a dyn Fn(&mut Cpu);
    let cases: [(Change<'_>, String); 3] = [
        (&|c| *c = less.clone(), feature.to_owned()),
        (&|c| c.limits.phys_bits -= 1, {
            let bits = all.limits.phys_bits;
            format!("phys-bits {bits} (here {})", bits - 1)
        }),
        (&|c| _ = c.features.remove("arch_capabilities"), "arch_capabilities".into()),
    ];
    for (change, said) in cases {
        let mut cpu = all.clone();
        change(&mut cpu);
        if cpu == all {
            continue;
        }
        let mut host = host(dir.path(), &cpu);
        // If it came to memory, that would be a reason, too, unless huge pages are reserved.
        host.arrival.huge_pages = true;
        let refusals = host.prepare(&machine.spec()).expect_err("it was taken");
        assert!(refusals.iter().all(|r| r.what == "cpu"), "{refusals:?}");
        let words = refusals.iter().map(|r| r.why.as_str()).collect::<Vec<_>>().join("; ");
        assert!(words.contains(&said), "{said}: {words}");
    }
}

#[test]
fn what_the_offer_does_not_name_is_compared_as_well() {
    if !tiny::kvm() {
        return;
    }
    let (_, less, feature, _) = without_one();
    let dir = tempfile::tempdir().unwrap();
    let mut spec = boot(dir.path(), None).spec();
    spec.cpu_features.clear();
    assert!(RefHost::default().prepare(&spec).is_ok());
    let refusals = host(dir.path(), &less).prepare(&spec).expect_err("it was taken");
    let why = format!("this host's CPU lacks what the guest was shown: {feature}");
    assert_eq!(refusals, [Refusal::new("cpu", why)]);
}

#[test]
fn a_machine_is_not_booted_where_its_processor_cannot_be_shown() {
    if !tiny::kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let mut more = RefHost::cpu().unwrap();
    more.features.extend(["avx9".to_owned(), "sse2024".to_owned()]);
    more.limits.phys_bits = 52;
    more.tsc_khz *= 2;
    let config = tiny::config(dir.path(), &tiny::elf(tiny::FEATURES, 0));
    let e = Machine::boot(&MachineConfig { cpu: Some(more.clone()), ..config }).unwrap_err();
    let here = RefHost::cpu().unwrap();
    let said = e.to_string();
    assert!(said.starts_with("this host's CPU lacks"), "{said}");
    assert!(said.contains("avx9, sse2024"), "{said}");
    assert_eq!(said.contains("phys-bits 52"), here.limits.phys_bits < 52, "{said}");
    assert_eq!(said.contains("tsc-khz"), !here.tsc_scaling, "{said}");
}
