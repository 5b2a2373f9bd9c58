//! CPU features by name, so that hosts can be compared and an operator can read the difference.
//!
//! Names are those of Linux' `/proc/cpuinfo`; a bit without one is `cpuid.LEAF.SUBLEAF.REGISTER.BIT`
//! (leaf and subleaf in hex). Bits that follow what the guest or the machine does (OSXSAVE, OSPKE, HTT, APIC,
//! hypervisor, CmpLegacy) are no features.

use std::collections::BTreeSet;

use kvm_bindings::kvm_cpuid_entry2;

#[derive(Clone, Copy)]
enum Register {
    Eax,
    Ebx,
    Ecx,
    Edx,
}
use Register::{Eax, Ebx, Ecx, Edx};

impl Register {
    fn of(self, e: &kvm_cpuid_entry2) -> u32 {
        match self {
            Eax => e.eax,
            Ebx => e.ebx,
            Ecx => e.ecx,
            Edx => e.edx,
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

/// The features that `entries` show, by name, sorted.
pub(crate) fn names(entries: &[kvm_cpuid_entry2]) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    for &(leaf, subleaf, register, none, words) in WORDS {
        let Some(e) = entries.iter().find(|e| e.function == leaf && e.index == subleaf) else {
            continue;
        };
        let bits = register.of(e) & !none;
        for bit in (0..32u16).filter(|b| bits >> b & 1 == 1) {
            found.insert(match words.split_whitespace().nth(bit.into()) {
                Some(name) if name != "-" => name.to_owned(),
                _ => format!("cpuid.{leaf:x}.{subleaf:x}.{}.{bit}", register.name()),
            });
        }
    }
    found
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
        for (leaf, _, register, _, words) in WORDS {
            assert!(words.split_whitespace().count() <= 32, "{leaf:x} {}", register.name());
        }
    }

    #[test]
    fn what_the_guest_switches_on_is_no_feature() {
        assert!(names(&[shown(1, 0, 0, 1 << 27 | 1 << 31, 1 << 28 | 1 << 9)]).is_empty());
    }
}
