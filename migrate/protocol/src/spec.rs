//! What a destination must be able to host: sent in the offer, compared before any work.

use ferry_pages::{Layout, LayoutError, PAGE_BYTES, Run};
use serde::{Deserialize, Serialize};

use crate::Refusal;

/// A machine as its source describes it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MachineSpec {
    /// The machine's name at the source.
    pub name: String,
    /// The VMM family that can host it, such as `refvmm` or `process`.
    pub vmm: String,
    /// Memory extents as (first frame, pages).
    pub extents: Vec<(u64, u64)>,
    /// Number of vCPUs.
    pub vcpus: u32,
    /// CPU features that the guest was shown, by name (`avx2`, `cpuid.7.0.edx.5` where there is no name).
    pub cpu_features: Vec<String>,
    /// Devices, in the order in which they are restored.
    pub devices: Vec<DeviceSpec>,
    /// The VMM's own configuration, opaque to Ferry.
    pub config: Vec<u8>,
}

/// A device that the destination must have.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct DeviceSpec {
    /// Kind, such as `serial-16550`.
    pub kind: String,
    /// Which one of its kind.
    pub instance: u32,
    /// Version of its saved state.
    pub version: u16,
}

/// What a host offers to machines.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HostCapabilities {
    /// The VMM family, as in [`MachineSpec::vmm`].
    pub vmm: String,
    /// Bytes of guest memory that it can still take.
    pub memory_bytes: u64,
    /// Most vCPUs for one machine.
    pub max_vcpus: u32,
    /// CPU features that can be shown to a guest, by name.
    pub cpu_features: Vec<String>,
    /// Device kinds, each with the newest state version that it reads.
    pub devices: Vec<(String, u16)>,
}

impl MachineSpec {
    /// Longest name of a machine, in bytes.
    pub const MAX_NAME_BYTES: usize = 64;

    /// The memory layout.
    ///
    /// # Errors
    /// The extents are not a layout.
    pub fn layout(&self) -> Result<Layout, LayoutError> {
        Layout::new(self.extents.iter().map(|&(start, pages)| Run::new(start, pages)).collect())
    }

    /// Bytes of guest memory.
    pub fn memory_bytes(&self) -> u64 {
        let pages = self.extents.iter().fold(0u64, |sum, e| sum.saturating_add(e.1));
        pages.saturating_mul(PAGE_BYTES as u64)
    }
}

/// Whether `name` can name a machine: letters, digits, `.`, `_`, `-`, not beginning with `.` or `-`.
pub fn is_machine_name(name: &str) -> bool {
    let inner = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
    !name.is_empty()
        && name.len() <= MachineSpec::MAX_NAME_BYTES
        && name.chars().all(inner)
        && !name.starts_with(['.', '-'])
}

impl HostCapabilities {
    /// Every reason why this host cannot take `spec`; none if it can.
    pub fn refusals(&self, spec: &MachineSpec) -> Vec<Refusal> {
        let mut out = Vec::new();
        let mut no = |what: &str, why: String| out.push(Refusal::new(what, why));
        if spec.vmm != self.vmm {
            no(
                "vmm",
                format!("the machine needs VMM `{}`; this host runs `{}`", spec.vmm, self.vmm),
            );
        }
        if let Err(e) = spec.layout() {
            no("memory", e.to_string());
        }
        if spec.memory_bytes() > self.memory_bytes {
            let mib = |bytes: u64| bytes >> 20;
            let (needs, has) = (mib(spec.memory_bytes()), mib(self.memory_bytes));
            no("memory", format!("the machine has {needs} MiB; this host can take {has} MiB"));
        }
        if spec.vcpus == 0 || spec.vcpus > self.max_vcpus {
            let (needs, has) = (spec.vcpus, self.max_vcpus);
            no("vcpus", format!("the machine has {needs} vCPUs; this host allows 1 to {has}"));
        }
        let missing: Vec<&str> = spec
            .cpu_features
            .iter()
            .filter(|f| !self.cpu_features.contains(f))
            .map(String::as_str)
            .collect();
        if !missing.is_empty() {
            no(
                "cpu",
                format!("this host's CPU lacks what the guest was shown: {}", missing.join(", ")),
            );
        }
        for d in &spec.devices {
            match self.devices.iter().find(|(kind, _)| *kind == d.kind) {
                None => no(
                    "device",
                    format!("this host has no device `{}` (instance {})", d.kind, d.instance),
                ),
                Some((_, reads)) if *reads < d.version => no(
                    "device",
                    format!(
                        "device `{}` (instance {}) has state version {}; this host reads up to {reads}: update it",
                        d.kind, d.instance, d.version
                    ),
                ),
                Some(_) => {}
            }
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec() -> MachineSpec {
        MachineSpec {
            name: "web1".into(),
            vmm: "refvmm".into(),
            extents: vec![(0, 1024)],
            vcpus: 2,
            cpu_features: vec!["avx2".into(), "sse4_2".into()],
            devices: vec![DeviceSpec { kind: "serial".into(), instance: 0, version: 2 }],
            config: Vec::new(),
        }
    }

    fn host() -> HostCapabilities {
        HostCapabilities {
            vmm: "refvmm".into(),
            memory_bytes: 1 << 30,
            max_vcpus: 4,
            cpu_features: vec!["sse4_2".into(), "avx2".into(), "avx512f".into()],
            devices: vec![("serial".into(), 2)],
        }
    }

    #[test]
    fn a_host_that_has_everything_has_no_reason_to_refuse() {
        assert_eq!(host().refusals(&spec()), []);
    }

    #[test]
    fn a_machine_that_just_fits_is_taken() {
        type Change = fn(&mut MachineSpec, &mut HostCapabilities);
        let cases: [(usize, Change); 6] = [
            (0, |_, h| h.memory_bytes = 4 << 20),
            (1, |_, h| h.memory_bytes = (4 << 20) - 1),
            (0, |s, _| s.vcpus = 4),
            (1, |s, _| s.vcpus = 5),
            (1, |s, _| s.vcpus = 0),
            (0, |_, h| h.devices[0].1 = 3),
        ];
        for (i, (refused, change)) in (0..).zip(cases) {
            let (mut s, mut h) = (spec(), host());
            change(&mut s, &mut h);
            assert_eq!(h.refusals(&s).len(), refused, "case {i}");
        }
        let two = MachineSpec { extents: vec![(0, 16), (64, 32)], ..spec() };
        assert_eq!(two.memory_bytes(), 48 * 4096);
    }

    #[test]
    fn each_thing_that_is_missing_is_named_with_both_values() {
        type Change = fn(&mut MachineSpec, &mut HostCapabilities);
        let cases: [(&str, &[&str], Change); 7] = [
            ("cpu", &["avx2"], |_, h| h.cpu_features.retain(|f| f != "avx2")),
            ("memory", &["4 MiB", "1 MiB"], |_, h| h.memory_bytes = 1 << 20),
            ("vcpus", &["2 vCPUs", "1 to 1"], |_, h| h.max_vcpus = 1),
            ("vmm", &["`refvmm`", "`process`"], |_, h| h.vmm = "process".into()),
            ("device", &["`serial`"], |_, h| h.devices.clear()),
            ("device", &["version 2", "up to 1"], |_, h| h.devices[0].1 = 1),
            ("memory", &["extent 0"], |s, _| s.extents = vec![(0, 0)]),
        ];
        for (what, words, change) in cases {
            let (mut s, mut h) = (spec(), host());
            change(&mut s, &mut h);
            let refusals = h.refusals(&s);
            assert_eq!(refusals.len(), 1, "{what}: {refusals:?}");
            assert_eq!(refusals[0].what, what);
            for w in words {
                assert!(refusals[0].why.contains(w), "{:?} lacks {w}", refusals[0]);
            }
        }
    }

    #[test]
    fn names_that_could_be_paths_are_not_names() {
        for bad in ["", "..", "a/b", "-x", ".hidden", "a b", &"x".repeat(65)] {
            assert!(!is_machine_name(bad), "{bad}");
        }
        assert!(is_machine_name("web-1.a_B") && is_machine_name(&"x".repeat(64)));
    }
}
