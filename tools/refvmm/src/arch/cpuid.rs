//! The CPUID that a vCPU is shown: the host's, with the topology of this machine.
//!
//! Every vCPU is a core of its own, all in one package; APIC id = vCPU index. Leaf numbers and fields are
//! those of the Intel SDM (vol. 2A, CPUID) and the AMD APM (vol. 3, appendix E).

use kvm_bindings::{
    CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2,
};
use kvm_ioctls::{Cap, Kvm};

use super::features::ARCH_CAPABILITIES_LEAF;
use crate::VmmError;
use crate::error::Asked;

/// Tells guests which weaknesses the processor does not have.
pub(crate) const ARCH_CAPABILITIES: u32 = 0x10a;

/// Extended topology enumeration: the kernel lists them without content.
const TOPOLOGY_LEAVES: [u32; 2] = [0xb, 0x1f];

/// The paravirtual features that guests are shown (`Documentation/virt/kvm/x86/cpuid.rst`): clock, no I/O delay,
/// steal time, EOI. Those that work by hypercall are not: a KVM without hardware virtualization never gets past
/// the hypercall instruction. Nor are asynchronous page faults, whose outstanding ones would not move.
const KVM_FEATURES: u32 = 1 | 1 << 1 | 1 << 3 | 1 << 5 | 1 << 6 | 1 << 24;

/// What KVM can show to a guest on this host.
pub(crate) fn supported(kvm: &Kvm) -> Result<Vec<kvm_cpuid_entry2>, VmmError> {
    let found = kvm
        .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
        .asked(|| "list the CPUID that it supports".into())?;
    let mut entries = found.as_slice().to_vec();
    for e in &mut entries {
        match e.function {
            0x1 => {
                e.ecx |= 1 << 31; // hypervisor present
                e.ecx &= !(1 << 3); // MONITOR/MWAIT would leave to the host each time
                if kvm.check_extension(Cap::TscDeadlineTimer) {
                    e.ecx |= 1 << 24; // the in-kernel APIC has it, the list does not say so
                }
            }
            0x4000_0001 => e.eax &= KVM_FEATURES,
            _ => {}
        }
    }
    Ok(entries)
}

/// `base` for a machine that begins here: without nested machines, whose state is not saved. One that was shown them by an
/// earlier version is still taken in where there are some.
pub(crate) fn of_new_machine(base: &[kvm_cpuid_entry2]) -> Vec<kvm_cpuid_entry2> {
    let mut entries = base.to_vec();
    for e in &mut entries {
        match e.function {
            0x1 => e.ecx &= !(1 << 5),         // VMX
            0x8000_0001 => e.ecx &= !(1 << 2), // SVM
            0x8000_000a => (e.eax, e.ebx, e.ecx, e.edx) = (0, 0, 0, 0),
            _ => {}
        }
    }
    entries
}

/// `IA32_ARCH_CAPABILITIES` as a leaf, for a guest that is shown `value`.
pub(crate) fn arch_capabilities_leaf(value: u64) -> kvm_cpuid_entry2 {
    let [a, b, c, d, e, f, g, h] = value.to_le_bytes();
    kvm_cpuid_entry2 {
        function: ARCH_CAPABILITIES_LEAF,
        eax: u32::from_le_bytes([a, b, c, d]),
        edx: u32::from_le_bytes([e, f, g, h]),
        ..Default::default()
    }
}

/// `IA32_ARCH_CAPABILITIES` as a guest is shown it, if it is.
pub(crate) fn arch_capabilities(shown: &[kvm_cpuid_entry2]) -> Option<u64> {
    let leaf = shown.iter().find(|e| e.function == ARCH_CAPABILITIES_LEAF)?;
    Some(u64::from(leaf.eax) | u64::from(leaf.edx) << 32)
}

/// `base` as vCPU `index` of `cpus` sees it.
pub(crate) fn of_vcpu(base: &[kvm_cpuid_entry2], index: u32, cpus: u32) -> Vec<kvm_cpuid_entry2> {
    let id_bits = u32::BITS - (cpus - 1).leading_zeros();
    let mut entries: Vec<_> =
        base.iter().filter(|e| !TOPOLOGY_LEAVES.contains(&e.function)).copied().collect();
    for leaf in TOPOLOGY_LEAVES {
        if base.iter().any(|e| e.function == leaf) {
            let level = |number, eax, ebx, ecx| kvm_cpuid_entry2 {
                function: leaf,
                index: number,
                flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
                eax,
                ebx,
                ecx,
                edx: index,
                padding: [0; 3],
            };
            entries.push(level(0, 0, 1, 1 << 8)); // one thread a core
            entries.push(level(1, id_bits, cpus, 1 | 2 << 8)); // `cpus` cores a package
        }
    }
    for e in &mut entries {
        match (e.function, e.index) {
            (0x1, _) => {
                let clflush_and_brand = e.ebx & 0xffff;
                e.ebx = clflush_and_brand | (cpus.min(255) << 16) | (index << 24);
                set_bit(&mut e.edx, 28, cpus > 1); // HTT: the count in EBX means something
            }
            (0x4, _) | (0x8000_001d, _) => {
                // Caches are private to a core; cores in the package.
                e.eax &= 0x3fff;
                if e.function == 0x4 && e.eax != 0 {
                    e.eax |= (cpus - 1).min(63) << 26;
                }
            }
            (0x8000_0001, _) => set_bit(&mut e.ecx, 1, cpus > 1), // CmpLegacy
            (0x8000_0008, _) => e.ecx = (e.ecx & !0xf0ff) | (cpus - 1).min(255) | (id_bits << 12),
            (0x8000_001e, _) => (e.eax, e.ebx, e.ecx) = (index, index & 0xff, 0),
            _ => {}
        }
    }
    entries
}

/// `entries` as the kernel takes them.
pub(crate) fn to_kvm(entries: &[kvm_cpuid_entry2]) -> Option<CpuId> {
    let leaves: Vec<_> =
        entries.iter().filter(|e| e.function != ARCH_CAPABILITIES_LEAF).copied().collect();
    CpuId::from_entries(&leaves).ok()
}

fn set_bit(register: &mut u32, bit: u32, on: bool) {
    *register = *register & !(1 << bit) | u32::from(on) << bit;
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(function: u32, index: u32) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 { function, index, ..Default::default() }
    }

    #[test]
    fn a_new_machine_is_not_shown_nested_machines_whose_state_would_not_move() {
        let vmx = kvm_cpuid_entry2 { ecx: 1 << 5 | 1 << 28, ..entry(1, 0) };
        let svm = kvm_cpuid_entry2 { ecx: 1 << 2 | 1, ..entry(0x8000_0001, 0) };
        let revision = kvm_cpuid_entry2 { eax: 1, ebx: 8, edx: 0xff, ..entry(0x8000_000a, 0) };
        let shown = of_new_machine(&[vmx, svm, revision]);
        assert_eq!([shown[0].ecx, shown[1].ecx], [1 << 28, 1]);
        assert_eq!(shown[2], entry(0x8000_000a, 0));
    }

    #[test]
    fn each_vcpu_sees_its_own_apic_id() {
        let base = [entry(1, 0), entry(0xb, 0)];
        for index in 0..3 {
            let seen = of_vcpu(&base, index, 3);
            assert_eq!(seen[0].ebx >> 24, index);
            assert_eq!((seen[0].ebx >> 16) & 0xff, 3);
            assert_eq!(seen[0].edx >> 28 & 1, 1);
            let levels: Vec<_> = seen[1..].iter().map(|e| (e.index, e.eax, e.ebx, e.edx)).collect();
            assert_eq!(levels, [(0, 0, 1, index), (1, 2, 3, index)]);
        }
        let alone = of_vcpu(&base, 0, 1);
        assert_eq!(alone[0].edx >> 28 & 1, 0);
        assert_eq!(alone[2].eax, 0);
    }
}
