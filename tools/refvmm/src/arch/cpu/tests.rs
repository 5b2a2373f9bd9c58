//! Two invented hosts: a newer one, and an older one with fewer features, whose PKRU lies elsewhere in an XSAVE area.

use super::features::{Ecx, Edx};
use super::*;

const KHZ: u32 = 2_600_000;
const UNKNOWN_LEAF: u32 = 0x1b;
const RDCTL_NO: u32 = 1;
const RSBA: u32 = 1 << 2;

fn leaf(function: u32, index: u32, [eax, ebx, ecx, edx]: [u32; 4]) -> kvm_cpuid_entry2 {
    kvm_cpuid_entry2 { function, index, eax, ebx, ecx, edx, ..Default::default() }
}

fn newer() -> Vec<kvm_cpuid_entry2> {
    vec![
        leaf(0, 0, [0x24, 0x6874_7541, 0x444d_4163, 0x6974_6e65]),
        leaf(1, 0, [0x00a1_0f11, 0x0002_0800, 0x9481_2201 | 1 << 12 | 1 << 15, 0x178b_fbff]),
        leaf(7, 0, [2, 1 << 5 | 1 << 16 | 1 << 24, 1 << 3, 1 << 29]),
        leaf(7, 1, [1 << 5, 0, 0, 0]),
        leaf(7, 2, [0, 0, 0, 1 << 3]),
        leaf(0xa, 0, [0x0730_0403, 0, 0, 0x603]),
        leaf(XSAVE, 0, [0x2e7, 2440, 2440, 0]),
        leaf(XSAVE, 1, [0xf, 2440, 0, 0]),
        leaf(XSAVE, 2, [256, 576, 0, 0]),
        leaf(XSAVE, 5, [64, 832, 0, 0]),
        leaf(XSAVE, 6, [512, 896, 0, 0]),
        leaf(XSAVE, 7, [1024, 1408, 0, 0]),
        leaf(XSAVE, 9, [8, 2432, 0, 0]),
        leaf(UNKNOWN_LEAF, 0, [1, 2, 3, 4]),
        leaf(0x1f, 0, [0, 1, 0x100, 0]),
        leaf(0x24, 0, [0, 0x7_0002, 0, 0]),
        leaf(0x4000_0000, 0, [0x4000_0001, 1, 2, 3]),
        leaf(0x4000_0001, 0, [1 << 3 | 1 << 24, 0, 0, 1]),
        leaf(ARCH_CAPABILITIES_LEAF, 0, [RDCTL_NO | 1 << 5, 0, 0, 1 << 30]),
        leaf(0x8000_0000, 0, [0x8000_0022, 0x6874_7541, 0x444d_4163, 0x6974_6e65]),
        leaf(0x8000_0001, 0, [0x00a1_0f11, 0x4000_0000, 0x0040_0393 & !4, 0x23d3_fbff]),
        leaf(0x8000_0002, 0, [0x2044_4d41, 0, 0, 0]),
        leaf(0x8000_0008, 0, [0x3934, 1 << 12, 7, 9]),
        leaf(0x8000_0021, 0, [1 << 2 | 1 << 9, 0, 6, 0]),
    ]
}

fn older() -> Vec<kvm_cpuid_entry2> {
    let mut all = newer();
    all.retain(|e| !(e.function == XSAVE && matches!(e.index, 5..=7)) && e.function != 0x24);
    for (function, index, register, value) in [
        (0, 0, Eax, 0x10),
        (1, 0, Eax, 0x00a0_0f12),
        (7, 0, Eax, 1),
        (7, 0, Ebx, 1 << 5),
        (7, 1, Eax, 0),
        (XSAVE, 0, Eax, 0x207),
        (XSAVE, 0, Ecx, 840),
        (XSAVE, 9, Ebx, 832),
        (ARCH_CAPABILITIES_LEAF, 0, Eax, 1 << 5),
        (0x8000_0000, 0, Eax, 0x8000_0021),
        (0x8000_0001, 0, Eax, 0x00a0_0f12),
        (0x8000_0008, 0, Eax, 0x3030),
        (0x8000_0021, 0, Eax, 1 << 2),
    ] {
        let found = all.iter_mut().find(|e| (e.function, e.index) == (function, index));
        *register.in_mut(found.expect("a leaf of the newer host")) = value;
    }
    all
}

fn cpu(entries: &[kvm_cpuid_entry2]) -> Cpu {
    Cpu::of(entries, KHZ, false)
}

fn fleet(hosts: &[Cpu]) -> Result<Cpu, CpuError> {
    let names = ["a", "b", "c"].map(str::to_owned);
    Cpu::baseline(&names.into_iter().zip(hosts.iter().cloned()).collect::<Vec<_>>())
}

fn at(entries: &[kvm_cpuid_entry2], function: u32, index: u32) -> kvm_cpuid_entry2 {
    entry(entries, function, index).unwrap_or_else(|| panic!("no leaf {function:x}.{index}"))
}

#[test]
fn family_model_and_stepping_are_those_of_proc_cpuinfo() {
    for (eax, signature) in [
        (0x00a1_0f11, (25, 17, 1)),
        (0x0008_06f8, (6, 143, 8)),
        (0x0000_0633, (6, 3, 3)),
        (0x0010_0f43, (16, 4, 3)),
        (0x0000_0543, (5, 4, 3)),
    ] {
        let cpu = cpu(&[leaf(1, 0, [eax, 0, 0, 0])]);
        assert_eq!(cpu.signature(), signature, "{eax:x}");
        assert_eq!(cpu.leaf_1_eax(), eax);
    }
}

#[test]
fn a_baseline_has_what_all_hosts_have_and_the_least_of_each_number() {
    let (new, old) = (cpu(&newer()), cpu(&older()));
    for hosts in [[new.clone(), old.clone()], [old.clone(), new.clone()]] {
        let both = fleet(&hosts).unwrap();
        assert_eq!(both.signature(), (25, 1, 2));
        assert_eq!((both.vendor.as_str(), both.ferry_cpu), ("AuthenticAMD", Cpu::VERSION));
        let limits = Limits {
            level: 0x10,
            level_func7: 1,
            xlevel: 0x8000_0021,
            phys_bits: 48,
            virtual_bits: 48,
            avx10_version: 0,
        };
        assert_eq!(both.limits, limits);
        for (name, there) in [
            ("avx2", true),
            ("avx", true),
            ("nx", true),
            ("kvm_clock", true),
            ("mds-no", true),
            ("its-no", true),
            ("rsba-no", true),
            ("cpuid.80000021.0.eax.2", true),
            ("cpuid.80000021.0.eax.9", false),
            ("avx512f", false),
            ("avx512_bf16", false),
            ("clwb", false),
            ("rdctl-no", false),
            ("pdcm", false),
        ] {
            assert_eq!(both.features.contains(name), there, "{name}");
        }
        assert!(!new.features.contains("pdcm") && new.features.contains("avx512f"));
        assert!(both.features.is_subset(&new.features) && both.features.is_subset(&old.features));
        for host in [&new, &old] {
            assert_eq!(host.lacks(&both), [""; 0]);
        }
    }
    assert_eq!(fleet(std::slice::from_ref(&new)).unwrap(), new, "a host is its own baseline");
    assert!(fleet(&[]).is_err());
}

#[test]
fn an_extended_state_that_lies_elsewhere_is_taken_away_with_all_that_needs_it() {
    let (new, old) = (cpu(&newer()), cpu(&older()));
    assert!(new.features.contains("pku") && old.features.contains("pku"));
    let both = fleet(&[new, old]).unwrap();
    assert_eq!(both.xsave.keys().copied().collect::<Vec<_>>(), [2]);
    assert!(!both.features.contains("pku") && !both.features.contains("cpuid.d.0.eax.9"));
    assert!(both.features.contains("cpuid.d.0.eax.2"));
}

#[test]
fn what_a_guest_of_a_baseline_is_shown_is_the_same_on_every_host() {
    let both = fleet(&[cpu(&newer()), cpu(&older())]).unwrap();
    for host in [newer(), older()] {
        let shown = both.only(&host);
        assert_eq!(cpu(&shown), both);
        assert_eq!(at(&shown, 1, 0).eax, 0x00a0_0f12);
        assert_eq!(at(&shown, 0x8000_0001, 0).eax, 0x00a0_0f12);
        let xsave = at(&shown, XSAVE, 0);
        assert_eq!((xsave.eax, xsave.ebx, xsave.ecx), (7, 832, 832));
        assert!(entry(&shown, XSAVE, 9).is_none() && entry(&shown, XSAVE, 5).is_none());
        assert!(entry(&shown, 0x1f, 0).is_none(), "above the highest leaf");
        // What decides nothing is the host's; what nobody knows is not shown.
        assert_eq!(at(&shown, 0x8000_0002, 0), at(&host, 0x8000_0002, 0));
        assert_eq!(at(&shown, 0x8000_0008, 0).ecx, 7);
        assert_eq!(at(&shown, 0x8000_0008, 0).edx, 0);
        assert_eq!(at(&shown, 0xa, 0), leaf(0xa, 0, [0; 4]));
        assert_eq!(at(&shown, 0x4000_0000, 0), at(&host, 0x4000_0000, 0));
    }
    let own = cpu(&newer()).only(&newer());
    assert_eq!(cpu(&own), cpu(&newer()));
    assert!(entry(&own, UNKNOWN_LEAF, 0).is_some_and(|e| e == leaf(UNKNOWN_LEAF, 0, [0; 4])));
    assert_eq!(at(&own, XSAVE, 0).ecx, 2440);
    assert_eq!(at(&own, 0x24, 0).ebx, 0x7_0002);
}

#[test]
fn a_feature_that_is_taken_away_is_gone_wherever_it_is_shown() {
    let host = newer();
    let mut less = cpu(&host);
    for (feature, function, register, bit) in [
        ("avx2", 7, Ebx, 5),
        ("mmx", 1, Edx, 23),
        ("mmx", 0x8000_0001, Edx, 23), // AMD shows it twice
        ("rdctl-no", ARCH_CAPABILITIES_LEAF, Eax, 0),
        ("its-no", ARCH_CAPABILITIES_LEAF, Edx, 30),
        ("kvm_clock", 0x4000_0001, Eax, 3),
        ("cpuid.d.0.eax.7", XSAVE, Eax, 7),
    ] {
        less.features.remove(feature);
        let (before, after) = (at(&host, function, 0), at(&less.only(&host), function, 0));
        assert_eq!(register.of(&before) >> bit & 1, 1, "{feature}");
        assert_eq!(register.of(&after) >> bit & 1, 0, "{feature}");
    }
    assert_eq!(at(&less.only(&host), XSAVE, 0).ecx, 2440, "PKRU still lies behind");
    less.features.remove("cpuid.d.0.eax.9");
    assert_eq!(at(&less.only(&host), XSAVE, 0).ecx, 1408);
    less.features.remove("arch_capabilities");
    assert!(entry(&less.only(&host), ARCH_CAPABILITIES_LEAF, 0).is_none());
    // APIC and "a hypervisor is there" are no features: they stay.
    let nothing = Cpu { features: BTreeSet::new(), ..less }.only(&host);
    assert_eq!(at(&nothing, 1, 0).edx, 1 << 9 | 1 << 28);
    assert_eq!(at(&nothing, 1, 0).ecx, 1 << 31);
}

#[test]
fn a_guest_is_told_of_a_weakness_that_any_host_has() {
    let mut weak = newer();
    let e = weak.iter_mut().find(|e| e.function == ARCH_CAPABILITIES_LEAF).unwrap();
    e.eax |= RSBA;
    assert_eq!(cpu(&weak).lacks(&cpu(&newer())), ["rsba-no"]);
    assert_eq!(cpu(&newer()).lacks(&cpu(&weak)), [""; 0]);
    let both = fleet(&[cpu(&newer()), cpu(&weak)]).unwrap();
    for host in [newer(), weak] {
        let shown = at(&both.only(&host), ARCH_CAPABILITIES_LEAF, 0);
        assert_eq!(shown.eax, RDCTL_NO | RSBA | 1 << 5);
    }
}

#[test]
fn what_a_host_lacks_is_named_with_both_values() {
    type Change = fn(&mut Cpu);
    let cases: [(Change, &str); 9] = [
        (|h| h.vendor = "GenuineIntel".into(), "vendor AuthenticAMD (here GenuineIntel)"),
        (|h| _ = h.features.remove("avx2"), "avx2"),
        (|h| _ = h.features.remove("rdctl-no"), "rdctl-no"),
        (|h| _ = h.features.remove("kvm_clock"), "kvm_clock"),
        (|h| h.limits.phys_bits = 46, "phys-bits 52 (here 46)"),
        (|h| h.limits.virtual_bits = 48, "virtual-bits 57 (here 48)"),
        (|h| h.limits.avx10_version = 1, "avx10-version 2 (here 1)"),
        (
            |h| h.xsave.get_mut(&9).unwrap().offset = 832,
            "xsave state 9 of 8 bytes at 2432 (here 8 at 832)",
        ),
        (|h| h.tsc_khz = KHZ + 1000, "tsc-khz 2600000 (here 2601000, which cannot be scaled)"),
    ];
    let shown = cpu(&newer());
    for (change, said) in cases {
        let mut host = shown.clone();
        change(&mut host);
        assert_eq!(host.lacks(&shown), [said]);
    }
    let no_matter: [Change; 7] = [
        |h| h.limits.phys_bits = 57,
        |h| h.limits.level = 1,
        |h| h.limits.xlevel = 0x8000_0008,
        |h| h.model = 1,
        |h| _ = h.features.insert("feature_of_tomorrow".into()),
        |h| h.tsc_khz = KHZ + 600,
        |h| (h.tsc_khz, h.tsc_scaling) = (2 * KHZ, true),
    ];
    for (case, change) in no_matter.into_iter().enumerate() {
        let mut host = shown.clone();
        change(&mut host);
        assert_eq!(host.lacks(&shown), [""; 0], "case {case}");
    }
}

#[test]
fn hosts_between_which_nothing_can_move_have_no_baseline() {
    let host = |tsc_khz, tsc_scaling| Cpu { tsc_khz, tsc_scaling, ..cpu(&newer()) };
    let intel = Cpu { vendor: "GenuineIntel".into(), ..host(KHZ, false) };
    let said = fleet(&[host(KHZ, false), host(KHZ, false), intel]).unwrap_err().to_string();
    assert!(said.starts_with("a is AuthenticAMD, c is GenuineIntel"), "{said}");

    // Neighbours are near enough, the first and the last are not.
    let rates = [host(KHZ, false), host(KHZ + 600, false), host(KHZ - 600, false)];
    assert_eq!(fleet(&rates[..2]).unwrap().tsc_khz, KHZ);
    let said = fleet(&rates).unwrap_err().to_string();
    assert!(said.contains("of c at 2599400") || said.contains("of c runs at 2599400"), "{said}");
    assert!(said.contains("b at 2600600"), "{said}");

    let scaled = fleet(&[host(3 * KHZ, true), host(2 * KHZ, true)]).unwrap();
    assert_eq!((scaled.tsc_khz, scaled.tsc_scaling), (2 * KHZ, true));
    let mixed = fleet(&[host(2 * KHZ, true), host(3 * KHZ, false)]).unwrap();
    assert_eq!((mixed.tsc_khz, mixed.tsc_scaling), (3 * KHZ, false), "one host has no choice");
}

#[test]
fn values_of_no_processor_are_named() {
    type Change = fn(&mut Cpu);
    let cases: [(Change, &str); 10] = [
        (
            |c| {
                c.features.insert("cpuid.d.0.edx.4294967295".into());
                c.stepping = u32::MAX;
            },
            "stepping is 4294967295",
        ),
        (|c| c.family = 999, "family is 999"),
        (|c| c.model = 256, "model is 256"),
        (|c| c.stepping = 16, "stepping is 16"),
        (|c| c.limits.phys_bits = 53, "phys-bits is 53"),
        (|c| c.limits.virtual_bits = u32::MAX, "virtual-bits is 4294967295"),
        (|c| c.limits.avx10_version = 256, "avx10-version is 256"),
        (|c| _ = c.xsave.insert(63, c.xsave[&2]), "xsave is 63"),
        (|c| c.vendor = "Änderung\n".into(), "Änderung\\n"),
        (|c| c.tsc_khz = 0, "tsc_khz is 0"),
    ];
    assert_eq!(cpu(&newer()).check(), Ok(()));
    for (change, said) in cases {
        let mut damaged = cpu(&newer());
        change(&mut damaged);
        let e = damaged.check().unwrap_err().to_string();
        assert!(e.contains(said), "{said}: {e}");
        // Whoever does not check it is shown nonsense, and nothing worse.
        let _ = (damaged.only(&newer()), damaged.lacks(&cpu(&older())), fleet(&[damaged]));
    }
}
