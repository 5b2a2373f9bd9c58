//! CPU features by name, so that hosts can be compared and an operator can read the difference.
//!
//! Names are those of Linux' `/proc/cpuinfo`, of bits of `IA32_ARCH_CAPABILITIES` those of QEMU; a bit without one is
//! `cpuid.LEAF.SUBLEAF.REGISTER.BIT` (leaf and subleaf in hex) or `msr.10a.BIT`. Bits that follow what the guest or the
//! machine does (OSXSAVE, OSPKE, HTT, APIC, hypervisor, CmpLegacy) are no features.

use std::collections::BTreeSet;

use kvm_bindings::kvm_cpuid_entry2;

/// `IA32_ARCH_CAPABILITIES`, EAX its low and EDX its high half, in a leaf of ours: so it is compared, masked and carried
/// as CPUID is, by earlier versions too. No guest looks there: no hypervisor's leaves begin within 0x100 of others.
pub(crate) const ARCH_CAPABILITIES_LEAF: u32 = 0x4000_00fe;
/// Its bits that tell of a weakness: a guest that was not told must not come to where they are set. So they are features
/// where they are not: `rsba-no`, `rrsba-no`.
const WEAKNESSES: u32 = 1 << 2 | 1 << 19;

#[derive(Clone, Copy)]
pub(crate) enum Register {
    Eax,
    Ebx,
    Ecx,
    Edx,
}
pub(crate) use Register::{Eax, Ebx, Ecx, Edx};

impl Register {
    pub(crate) fn of(self, e: &kvm_cpuid_entry2) -> u32 {
        match self {
            Eax => e.eax,
            Ebx => e.ebx,
            Ecx => e.ecx,
            Edx => e.edx,
        }
    }

    pub(crate) fn in_mut(self, e: &mut kvm_cpuid_entry2) -> &mut u32 {
        match self {
            Eax => &mut e.eax,
            Ebx => &mut e.ebx,
            Ecx => &mut e.ecx,
            Edx => &mut e.edx,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Eax => "eax",
            Ebx => "ebx",
            Ecx => "ecx",
            Edx => "edx",
        }
    }
}

/// Leaf, subleaf, register, bits that are no features, and names from bit 0 on (`-`: none).
type Word = (u32, u32, Register, u32, &'static str);

/// What an offer names. It is fixed: a host of an earlier version refuses names that it does not know.
const WORDS: &[Word] = &[
    (
        0x1,
        0,
        Edx,
        1 << 9 | 1 << 28,
        "fpu vme de pse tsc msr pae mce cx8 apic - sep mtrr pge mca cmov pat pse36 pn clflush - dts acpi mmx \
      fxsr sse sse2 ss ht tm ia64 pbe",
    ),
    (
        0x1,
        0,
        Ecx,
        1 << 27 | 1 << 31,
        "pni pclmulqdq dtes64 monitor ds_cpl vmx smx est tm2 ssse3 cid sdbg fma cx16 xtpr pdcm - pcid dca sse4_1 \
      sse4_2 x2apic movbe popcnt tsc_deadline_timer aes xsave osxsave avx f16c rdrand hypervisor",
    ),
    (
        0x7,
        0,
        Ebx,
        0,
        "fsgsbase tsc_adjust sgx bmi1 hle avx2 fdp_excptn_only smep bmi2 erms invpcid rtm cqm zero_fcs_fds mpx rdt_a \
      avx512f avx512dq rdseed adx smap avx512ifma - clflushopt clwb intel_pt avx512pf avx512er avx512cd sha_ni \
      avx512bw avx512vl",
    ),
    (
        0x7,
        0,
        Ecx,
        1 << 4,
        "prefetchwt1 avx512vbmi umip pku ospke waitpkg avx512_vbmi2 shstk gfni vaes vpclmulqdq avx512_vnni \
      avx512_bitalg tme avx512_vpopcntdq - la57 - - - - - rdpid - bus_lock_detect cldemote - movdiri movdir64b \
      enqcmd sgx_lc pks",
    ),
    (
        0x7,
        0,
        Edx,
        0,
        "- - avx512_4vnniw avx512_4fmaps fsrm - - - avx512_vp2intersect srbds_ctrl md_clear rtm_always_abort - \
      tsx_force_abort serialize hybrid_cpu tsxldtrk - pconfig arch_lbr ibt - amx_bf16 avx512_fp16 amx_tile amx_int8 \
      spec_ctrl intel_stibp flush_l1d arch_capabilities core_capabilities spec_ctrl_ssbd",
    ),
    (
        0x7,
        1,
        Eax,
        0,
        "sha512 sm3 sm4 - avx_vnni avx512_bf16 lass cmpccxadd arch_perfmon_ext - fzrm fsrs fsrc - - - - fred lkgs \
      wrmsrns - amx_fp16 - avx_ifma - - lam",
    ),
    (0x7, 1, Edx, 0, ""),
    (0x7, 2, Edx, 0, ""),
    (0xd, 0, Eax, 0, ""),
    (0xd, 1, Eax, 0, "xsaveopt xsavec xgetbv1 xsaves xfd"),
    (
        0x8000_0001,
        0,
        Edx,
        0x0183_f3ff,
        "- - - - - - - - - - - syscall - - - - - - - mp nx - mmxext - - fxsr_opt pdpe1gb rdtscp - lm 3dnowext 3dnow",
    ),
    (
        0x8000_0001,
        0,
        Ecx,
        1 << 1,
        "lahf_lm cmp_legacy svm extapic cr8_legacy abm sse4a misalignsse 3dnowprefetch osvw ibs xop skinit wdt - lwp fma4 \
      tce - nodeid_msr - tbm topoext perfctr_core perfctr_nb - bpext ptsc perfctr_llc mwaitx",
    ),
    (0x8000_0007, 0, Edx, 0, "- - - - - - - - nonstop_tsc"),
    (
        0x8000_0008,
        0,
        Ebx,
        0,
        "clzero irperf xsaveerptr - rdpru - - - - wbnoinvd - - amd_ibpb - amd_ibrs amd_stibp - amd_stibp_always_on - - - - \
      - amd_ppin amd_ssbd virt_ssbd amd_ssb_no - amd_psfd btc_no amd_ibpb_ret brs",
    ),
    (0x8000_0021, 0, Eax, 0, ""),
    (
        0x4000_0001,
        0,
        Eax,
        0,
        "kvm_clock_old kvm_nopiodelay kvm_mmu_op kvm_clock kvm_asyncpf kvm_steal_time kvm_pv_eoi kvm_pv_unhalt - \
      kvm_pv_tlb_flush kvm_asyncpf_vmexit kvm_pv_send_ipi kvm_poll_control kvm_pv_sched_yield kvm_asyncpf_int \
      kvm_msi_ext_dest_id kvm_hc_map_gpa_range kvm_migration_control - - - - - - kvm_clock_stable",
    ),
];

/// What is compared besides, by hosts of this version, as they read it in the CPUID that comes with the offer.
const MORE_WORDS: &[Word] = &[
    (0x6, 0, Eax, 0, "- - arat"),
    (0x7, 1, Ebx, 0, ""),
    (0x7, 1, Ecx, 0, ""),
    (0xd, 0, Edx, 0, ""),
    (0xd, 1, Ecx, 0, ""),
    (0xd, 1, Edx, 0, ""),
    (0x24, 0, Ebx, 0xff, ""), // below: a number
    (0x8000_0021, 0, Ecx, 0, ""),
    (0xc000_0001, 0, Edx, 0, ""),
    (
        ARCH_CAPABILITIES_LEAF,
        0,
        Eax,
        0,
        "rdctl-no ibrs-all rsba-no skip-l1dfl-vmentry ssb-no mds-no pschange-mc-no tsx-ctrl taa-no - - - - sbdr-ssdp-no \
      fbsdp-no psdp-no - fb-clear - rrsba-no bhi-no - - - pbrsb-no - gds-no rfds-no rfds-clear",
    ),
    (
        ARCH_CAPABILITIES_LEAF,
        0,
        Edx,
        0,
        "- - - - - - - - - - - - - - - - - - - - - - - - - - - - - - its-no",
    ),
];

/// The features that `entries` show, by the names that an offer has.
pub(crate) fn names(entries: &[kvm_cpuid_entry2]) -> BTreeSet<String> {
    entries.iter().flat_map(|e| features(e, WORDS)).map(|(_, _, name)| name).collect()
}

/// All features that `entries` show, by name.
pub(crate) fn all_names(entries: &[kvm_cpuid_entry2]) -> BTreeSet<String> {
    entries.iter().flat_map(all).map(|(_, _, name)| name).collect()
}

/// `e` without the features that `keep` denies. What is neither a feature nor in a register with features is 0.
pub(crate) fn only(e: &kvm_cpuid_entry2, keep: impl Fn(&str) -> bool) -> kvm_cpuid_entry2 {
    let blank = kvm_cpuid_entry2 { eax: 0, ebx: 0, ecx: 0, edx: 0, ..*e };
    let mut kept = words_of(e, WORDS).chain(words_of(e, MORE_WORDS)).fold(
        blank,
        |mut kept, &(leaf, _, register, none, _)| {
            *register.in_mut(&mut kept) = register.of(e) & none | weaknesses(leaf, register);
            kept
        },
    );
    for (register, bit, _) in all(e).filter(|(_, _, name)| keep(name)) {
        *register.in_mut(&mut kept) ^= 1 << bit;
    }
    kept
}

/// The bits of a register that are features where they are 0.
fn weaknesses(leaf: u32, register: Register) -> u32 {
    if leaf == ARCH_CAPABILITIES_LEAF && matches!(register, Eax) { WEAKNESSES } else { 0 }
}

fn words_of<'a>(
    e: &kvm_cpuid_entry2,
    words: &'a [Word],
) -> impl Iterator<Item = &'a Word> + use<'a> {
    let (leaf, subleaf) = (e.function, e.index);
    words.iter().filter(move |w| (w.0, w.1) == (leaf, subleaf))
}

fn all(e: &kvm_cpuid_entry2) -> impl Iterator<Item = (Register, u16, String)> {
    features(e, WORDS).chain(features(e, MORE_WORDS))
}

/// Register, bit and name of each feature that `e` shows.
fn features(
    e: &kvm_cpuid_entry2,
    words: &'static [Word],
) -> impl Iterator<Item = (Register, u16, String)> + use<> {
    let e = *e;
    words_of(&e, words).flat_map(move |&(leaf, subleaf, register, none, names)| {
        let bits = (register.of(&e) ^ weaknesses(leaf, register)) & !none;
        let name = move |bit: u16| match names.split_whitespace().nth(bit.into()) {
            Some(name) if name != "-" => name.to_owned(),
            _ if leaf == ARCH_CAPABILITIES_LEAF => {
                format!("msr.10a.{}", if matches!(register, Eax) { bit } else { 32 + bit })
            }
            _ => format!("cpuid.{leaf:x}.{subleaf:x}.{}.{bit}", register.name()),
        };
        (0..32).filter(move |bit| bits >> bit & 1 == 1).map(move |bit| (register, bit, name(bit)))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shown(function: u32, index: u32, ebx: u32, ecx: u32, edx: u32) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 { function, index, ebx, ecx, edx, ..Default::default() }
    }

    #[test]
    fn names_are_those_of_proc_cpuinfo() {
        let known = [
            (shown(1, 0, 0, 0, 1 << 26), "sse2"),
            (shown(1, 0, 0, 1 << 28, 0), "avx"),
            (shown(7, 0, 1 << 5, 0, 0), "avx2"),
            (shown(7, 0, 1 << 31, 0, 0), "avx512vl"),
            (shown(7, 0, 0, 1 << 22, 0), "rdpid"),
            (shown(7, 0, 0, 0, 1 << 31), "spec_ctrl_ssbd"),
            (shown(7, 0, 0, 0, 1 << 4), "fsrm"),
            (shown(0x8000_0001, 0, 0, 1 << 22, 0), "topoext"),
            (shown(0x8000_0001, 0, 0, 0, 1 << 29), "lm"),
            (shown(0x8000_0008, 0, 1 << 29, 0, 0), "btc_no"),
            (shown(7, 0, 0, 0, 1 << 5), "cpuid.7.0.edx.5"),
        ];
        for (entry, name) in known {
            assert_eq!(names(&[entry]).into_iter().collect::<Vec<_>>(), [name]);
        }
    }

    #[test]
    fn no_word_has_more_names_than_bits() {
        for (leaf, _, register, _, words) in WORDS.iter().chain(MORE_WORDS) {
            assert!(words.split_whitespace().count() <= 32, "{leaf:x} {}", register.name());
        }
    }

    #[test]
    fn what_the_guest_switches_on_is_no_feature() {
        assert!(names(&[shown(1, 0, 0, 1 << 27 | 1 << 31, 1 << 28 | 1 << 9)]).is_empty());
    }
}
