//! A processor as guests can be shown it: of a host, of several (their common denominator), or what a guest was shown.
//!
//! Pure: what is here knows CPUID as numbers, and no KVM. What is not compared, and why:
//!
//! - *Family, model, stepping, and the highest leaves*: KVM answers CPUID by itself, so any host can show any. A common
//!   denominator has the lowest, so that its machines are alike wherever they were booted.
//! - *Caches, topology and the brand string* come from where a machine boots, and stay with it.
//! - *The microcode's revision* is a constant of KVM, unless somebody sets it; nobody does.

use std::collections::{BTreeMap, BTreeSet};

use kvm_bindings::kvm_cpuid_entry2;
use serde::{Deserialize, Serialize};

use super::features::{self, ARCH_CAPABILITIES_LEAF, Eax, Ebx, Register};

/// What a processor shows to guests.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Cpu {
    /// Version of this description: [`VERSION`](Self::VERSION).
    pub ferry_cpu: u32,
    /// As `/proc/cpuinfo` has it, such as `GenuineIntel`.
    pub vendor: String,
    /// As `/proc/cpuinfo` has it.
    pub family: u32,
    /// As `/proc/cpuinfo` has it.
    pub model: u32,
    /// As `/proc/cpuinfo` has it.
    pub stepping: u32,
    /// Features by name.
    pub features: BTreeSet<String>,
    /// Numbers of which a guest may be shown less.
    pub limits: Limits,
    /// Extended states besides those of x87 and SSE, by the number of their bit in XCR0 and IA32_XSS.
    pub xsave: BTreeMap<u32, ExtendedState>,
    /// Rate of the time-stamp counter in kHz.
    pub tsc_khz: u32,
    /// Whether it can run a guest's time-stamp counter at another rate.
    pub tsc_scaling: bool,
}

/// Numbers that CPUID holds, by QEMU's names of them where it has one.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Limits {
    /// Highest leaf.
    pub level: u32,
    /// Highest subleaf of leaf 7.
    pub level_func7: u32,
    /// Highest leaf from 0x80000000 on.
    pub xlevel: u32,
    /// Bits of a physical address.
    pub phys_bits: u32,
    /// Bits of a virtual address.
    pub virtual_bits: u32,
    /// 0: no AVX10.
    pub avx10_version: u32,
}

/// Where a state lies in what XSAVE writes: the guest was told, and the processor does it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ExtendedState {
    /// Its size.
    pub bytes: u32,
    /// Its place in the standard format; 0 for states of the supervisor.
    pub offset: u32,
    /// ECX: of the supervisor (bit 0), aligned in the compacted format (1), can be switched off (2).
    pub flags: u32,
}

/// Why processors have no common denominator, or a description is none.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum CpuError {
    /// A guest sees one vendor's processor.
    #[error(
        "{0} is {1}, {2} is {3}: a guest is shown one vendor's processor. Make one baseline for each"
    )]
    Vendors(String, String, String, String),
    /// Rates too far apart.
    #[error(
        "the time-stamp counter of {0} runs at {1} kHz, that of {2} at {3} kHz, and neither host can scale it: no machine \
         can move between them. Make one baseline for each"
    )]
    TscRates(String, u32, String, u32),
    /// Of no processor.
    #[error("{0}")]
    Value(String),
}

/// Each number: its name, its leaf and subleaf, its first bit and width, whether a guest that was shown more than a host
/// has cannot run there, and where it is in [`Limits`].
type Limit = (&'static str, u32, u32, Register, u32, u32, bool, fn(&mut Limits) -> &mut u32);
const LIMITS: [Limit; 6] = [
    ("level", 0x0, 0, Eax, 0, 32, false, |l| &mut l.level),
    ("level-func7", 0x7, 0, Eax, 0, 32, false, |l| &mut l.level_func7),
    ("xlevel", 0x8000_0000, 0, Eax, 0, 32, false, |l| &mut l.xlevel),
    ("phys-bits", 0x8000_0008, 0, Eax, 0, 8, true, |l| &mut l.phys_bits),
    ("virtual-bits", 0x8000_0008, 0, Eax, 8, 8, true, |l| &mut l.virtual_bits),
    ("avx10-version", 0x24, 0, Ebx, 0, 8, true, |l| &mut l.avx10_version),
];

/// Not part of it, since they need more than bits: leaves that are not compared, or state that does not move. Nested
/// machines, performance counters, traces, enclaves.
const LEFT_OUT: &str = "vmx svm pdcm arch_perfmon_ext arch_lbr perfctr_core perfctr_nb perfctr_llc intel_pt sgx sgx_lc \
                        enqcmd pconfig hybrid_cpu";

/// Which state (its bit in XCR0 and IA32_XSS) the features need whose names begin so (Intel SDM vol. 1, 13.1).
const NEEDS: &[(u32, &str)] = &[
    (2, "avx"),
    (2, "fma"),
    (2, "f16c"),
    (2, "xop"),
    (2, "vaes"),
    (2, "vpclmulqdq"),
    (3, "mpx"),
    (4, "mpx"),
    (5, "avx512"),
    (6, "avx512"),
    (7, "avx512"),
    (9, "pku"),
    (11, "shstk"),
    (11, "ibt"),
    (12, "shstk"),
    (12, "ibt"),
    (17, "amx_"),
    (18, "amx_"),
];

/// Caches, topology and the brand string: as the host has them.
const HOSTS_OWN: [u32; 12] = [
    0x2,
    0x4,
    0xb,
    0x1f,
    0x8000_0002,
    0x8000_0003,
    0x8000_0004,
    0x8000_0005,
    0x8000_0006,
    0x8000_0019,
    0x8000_001d,
    0x8000_001e,
];
const XSAVE: u32 = 0xd;
/// Bytes of the XSAVE area without extended states.
const XSAVE_LEGACY: u32 = 576;
/// Bits of leaf 0x80000001's EDX that AMD repeats from leaf 1.
const REPEATED: u32 = 0x0183_f3ff;

impl Cpu {
    /// The version of descriptions that this crate makes.
    pub const VERSION: u32 = 1;

    /// What `entries` show.
    pub(crate) fn of(entries: &[kvm_cpuid_entry2], tsc_khz: u32, tsc_scaling: bool) -> Self {
        let mut limits = Limits::default();
        for (_, leaf, subleaf, register, shift, width, _, place) in LIMITS {
            *place(&mut limits) = entry(entries, leaf, subleaf)
                .map_or(0, |e| register.of(&e) >> shift & (u32::MAX >> (32 - width)));
        }
        let signature = entry(entries, 1, 0).map_or(0, |e| e.eax);
        let (base, extended) = (signature >> 8 & 0xf, signature >> 20 & 0xff);
        let high_model = if matches!(base, 6 | 15) { signature >> 12 & 0xf0 } else { 0 };
        let states = states(entries);
        let xsave = entries
            .iter()
            .filter(|e| e.function == XSAVE && e.index < 64 && states >> e.index & 1 == 1)
            .filter(|e| e.index > 1 && e.eax != 0)
            .map(|e| (e.index, state_of(e)))
            .collect();
        let mut features = features::all_names(entries);
        features.retain(|f| !LEFT_OUT.split(' ').any(|left_out| left_out == f));
        Self {
            ferry_cpu: Self::VERSION,
            vendor: entry(entries, 0, 0).map_or_else(String::new, |e| vendor(&e)),
            family: if base == 15 { base + extended } else { base },
            model: high_model | signature >> 4 & 0xf,
            stepping: signature & 0xf,
            features,
            limits,
            xsave,
            tsc_khz,
            tsc_scaling,
        }
    }

    /// What all `hosts`, each with a name for errors, can show: features and extended states that all have, the least of
    /// each number, the lowest model.
    ///
    /// # Errors
    /// There are none; their vendors differ, or the rates of their time-stamp counters by more than
    /// [`TSC_TOLERANCE_PPM`](Self::TSC_TOLERANCE_PPM), and no more than one can be scaled.
    pub fn baseline(hosts: &[(String, Self)]) -> Result<Self, CpuError> {
        let Some(((first_name, first), others)) = hosts.split_first() else {
            return Err(CpuError::Value("no processor to make a baseline of".into()));
        };
        let mut least = first.clone();
        for (name, host) in others {
            if host.vendor != first.vendor {
                let vendors = (first.vendor.clone(), host.vendor.clone());
                return Err(CpuError::Vendors(
                    first_name.clone(),
                    vendors.0,
                    name.clone(),
                    vendors.1,
                ));
            }
            let lower = least.signature().min(host.signature());
            (least.family, least.model, least.stepping) = lower;
            least.features.retain(|f| host.features.contains(f));
            least.xsave.retain(|number, state| host.xsave.get(number) == Some(state));
            let mut limits = host.limits.clone();
            for (.., place) in LIMITS {
                let least = place(&mut least.limits);
                *least = (*least).min(*place(&mut limits));
            }
            least.tsc_khz = least.tsc_khz.min(host.tsc_khz);
            least.tsc_scaling &= host.tsc_scaling;
        }
        let mut fixed: Vec<_> = hosts.iter().filter(|(_, h)| !h.tsc_scaling).collect();
        fixed.sort_by_key(|(_, host)| host.tsc_khz);
        if let [(slow_name, slow), .., (fast_name, fast)] = fixed[..]
            && !same_rate(slow.tsc_khz, fast.tsc_khz)
        {
            let (slow_name, fast_name) = (slow_name.clone(), fast_name.clone());
            return Err(CpuError::TscRates(slow_name, slow.tsc_khz, fast_name, fast.tsc_khz));
        }
        if let Some((_, slow)) = fixed.first() {
            least.tsc_khz = slow.tsc_khz;
        }
        Ok(least.without_orphans())
    }

    /// Rates of time-stamp counters that differ by no more than this are the same (QEMU's tolerance).
    pub const TSC_TOLERANCE_PPM: u64 = 250;

    /// What a guest that is shown `shown` misses here, each by name and with both values; nothing if it runs here.
    pub fn lacks(&self, shown: &Self) -> Vec<String> {
        let mut lacks = Vec::new();
        if shown.vendor != self.vendor {
            let theirs = shown.vendor.escape_debug();
            lacks.push(format!("vendor {theirs} (here {})", self.vendor));
        }
        lacks.extend(shown.features.difference(&self.features).cloned());
        let (mut theirs, mut ours) = (shown.limits.clone(), self.limits.clone());
        for (name, .., decides, place) in LIMITS {
            let (theirs, ours) = (*place(&mut theirs), *place(&mut ours));
            if decides && theirs > ours {
                lacks.push(format!("{name} {theirs} (here {ours})"));
            }
        }
        for (number, state) in &shown.xsave {
            match self.xsave.get(number) {
                // Its feature is missing, and named.
                None => {}
                Some(here) if here == state => {}
                Some(here) => lacks.push(format!(
                    "xsave state {number} of {} bytes at {} (here {} at {})",
                    state.bytes, state.offset, here.bytes, here.offset
                )),
            }
        }
        if !self.tsc_scaling && !same_rate(shown.tsc_khz, self.tsc_khz) {
            lacks.push(format!(
                "tsc-khz {} (here {}, which cannot be scaled)",
                shown.tsc_khz, self.tsc_khz
            ));
        }
        lacks
    }

    /// `host`, what a host can show, without all that is not in this. What no table knows is not shown.
    pub(crate) fn only(&self, host: &[kvm_cpuid_entry2]) -> Vec<kvm_cpuid_entry2> {
        let has = |name: &str| self.features.contains(name);
        let here = |e: &kvm_cpuid_entry2| self.xsave.get(&e.index) == Some(&state_of(e));
        let mut states = 0b11;
        for e in host.iter().filter(|e| e.function == XSAVE && (2..64).contains(&e.index)) {
            states |= u64::from(here(e)) << e.index;
        }
        let (low, high) = halves(states);
        let mut kept: Vec<_> = host.iter().filter_map(|e| self.only_of(e, has)).collect();
        let repeated = entry(&kept, 1, 0).map_or(0, |e| e.edx);
        for e in &mut kept {
            match (e.function, e.index) {
                (0x8000_0001, _) => e.edx &= repeated | !REPEATED,
                (XSAVE, 0) => (e.eax, e.edx) = (e.eax & low, e.edx & high),
                (XSAVE, 1) => (e.ecx, e.edx) = (e.ecx & low, e.edx & high),
                _ => {}
            }
        }
        let shown = self::states(&kept);
        kept.retain(|e| match e.function {
            XSAVE => e.index < 2 || e.index < 64 && shown >> e.index & 1 == 1,
            ..0x4000_0000 => e.function <= self.limits.level,
            0x8000_0000..0xc000_0000 => e.function <= self.limits.xlevel,
            _ => true,
        });
        let standard = kept.iter().filter(|e| e.function == XSAVE && e.index > 1 && e.ecx & 1 == 0);
        let bytes = standard.fold(XSAVE_LEGACY, |most, e| most.max(e.ebx.saturating_add(e.eax)));
        if let Some(e) = kept.iter_mut().find(|e| (e.function, e.index) == (XSAVE, 0)) {
            (e.ebx, e.ecx) = (bytes, bytes); // KVM makes EBX follow XCR0
        }
        kept
    }

    fn only_of(
        &self,
        host: &kvm_cpuid_entry2,
        has: impl Fn(&str) -> bool,
    ) -> Option<kvm_cpuid_entry2> {
        if HOSTS_OWN.contains(&host.function) || host.function == XSAVE && host.index > 1 {
            return Some(*host);
        }
        if host.function == ARCH_CAPABILITIES_LEAF && !has("arch_capabilities") {
            return None;
        }
        let mut e = features::only(host, has);
        let mut limits = self.limits.clone();
        for (_, leaf, subleaf, register, shift, width, _, place) in LIMITS {
            if (leaf, subleaf) == (host.function, host.index) {
                let mask = u32::MAX >> (32 - width);
                let least = (register.of(host) >> shift & mask).min(*place(&mut limits));
                let register = register.in_mut(&mut e);
                *register = *register & !(mask << shift) | least << shift;
            }
        }
        match host.function {
            0x0 | 0x8000_0000 | 0x4000_0000 => {
                (e.ebx, e.ecx, e.edx) = (host.ebx, host.ecx, host.edx); // vendor, "KVMKVMKVM"
                e.eax |= if host.function == 0x4000_0000 { host.eax } else { 0 };
            }
            0x1 => (e.eax, e.ebx) = (self.leaf_1_eax(), host.ebx),
            // AMD repeats the signature here; Intel has 0.
            0x8000_0001 if host.eax != 0 => (e.eax, e.ebx) = (self.leaf_1_eax(), host.ebx),
            0x8000_0008 => e.ecx = host.ecx, // topology
            _ => {}
        }
        Some(e)
    }

    fn signature(&self) -> (u32, u32, u32) {
        (self.family, self.model, self.stepping)
    }

    fn leaf_1_eax(&self) -> u32 {
        let (family, model) = (self.family & 0x1ff, self.model & 0xff);
        family.saturating_sub(15) << 20
            | (model >> 4) << 16
            | family.min(15) << 8
            | (model & 0xf) << 4
            | self.stepping & 0xf
    }

    /// Without the features whose extended states are not there.
    pub(crate) fn without_orphans(mut self) -> Self {
        let gone = |state: u32| state > 1 && !self.xsave.contains_key(&state);
        let bit = |f: &str, word: &str, base: u32| {
            Some(base + u32::from(f.strip_prefix(word)?.parse::<u8>().ok()?))
        };
        self.features.retain(|f| {
            let switch = bit(f, "cpuid.d.0.eax.", 0)
                .or_else(|| bit(f, "cpuid.d.1.ecx.", 0))
                .or_else(|| bit(f, "cpuid.d.0.edx.", 32))
                .or_else(|| bit(f, "cpuid.d.1.edx.", 32));
            !switch.is_some_and(gone)
                && !NEEDS.iter().any(|&(state, begin)| f.starts_with(begin) && gone(state))
        });
        self
    }

    /// Whether these are values of a processor.
    ///
    /// # Errors
    /// The first that is not.
    pub fn check(&self) -> Result<(), CpuError> {
        let within = [
            ("family", self.family, 15 + 0xff),
            ("model", self.model, 0xff),
            ("stepping", self.stepping, 0xf),
            ("limits.phys-bits", self.limits.phys_bits, 52),
            ("limits.virtual-bits", self.limits.virtual_bits, 57),
            ("limits.avx10-version", self.limits.avx10_version, 0xff),
            ("the last number in xsave", self.xsave.last_key_value().map_or(0, |(k, _)| *k), 62),
        ];
        if let Some((name, value, most)) = within.into_iter().find(|(_, value, most)| value > most)
        {
            return Err(CpuError::Value(format!("{name} is {value}; at most {most} is possible")));
        }
        if self.tsc_khz == 0 {
            return Err(CpuError::Value("tsc_khz is 0".into()));
        }
        if self.vendor.len() != 12 || !self.vendor.is_ascii() {
            let said = format!("vendor is `{:.64}`, not 12 letters", self.vendor.escape_debug());
            return Err(CpuError::Value(said));
        }
        Ok(())
    }
}

/// Whether a guest does not notice the difference.
pub(crate) fn same_rate(a_khz: u32, b_khz: u32) -> bool {
    u64::from(a_khz.abs_diff(b_khz)) * 1_000_000
        <= u64::from(a_khz.min(b_khz)) * Cpu::TSC_TOLERANCE_PPM
}

fn entry(entries: &[kvm_cpuid_entry2], leaf: u32, subleaf: u32) -> Option<kvm_cpuid_entry2> {
    entries.iter().find(|e| (e.function, e.index) == (leaf, subleaf)).copied()
}

fn vendor(leaf_0: &kvm_cpuid_entry2) -> String {
    let bytes = [leaf_0.ebx, leaf_0.edx, leaf_0.ecx].map(u32::to_le_bytes).concat();
    String::from_utf8_lossy(&bytes).into_owned()
}

fn state_of(e: &kvm_cpuid_entry2) -> ExtendedState {
    ExtendedState { bytes: e.eax, offset: e.ebx, flags: e.ecx }
}

/// The extended states that can be switched on: those of XCR0 and IA32_XSS.
fn states(entries: &[kvm_cpuid_entry2]) -> u64 {
    let user = entry(entries, XSAVE, 0).unwrap_or_default();
    let supervisor = entry(entries, XSAVE, 1).unwrap_or_default();
    u64::from(user.eax | supervisor.ecx) | u64::from(user.edx | supervisor.edx) << 32
}

/// Low and high 32 bits.
fn halves(bits: u64) -> (u32, u32) {
    let [a, b, c, d, e, f, g, h] = bits.to_le_bytes();
    (u32::from_le_bytes([a, b, c, d]), u32::from_le_bytes([e, f, g, h]))
}

#[cfg(test)]
mod tests;
