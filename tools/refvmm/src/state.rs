//! Saving and loading everything that KVM knows of a machine besides its memory.
//!
//! # The order
//! KVM's state is not a set of independent records; the order is that of Firecracker and QEMU, for these
//! reasons (`Documentation/virt/kvm/api.rst`, `arch/x86/kvm/`):
//!
//! | step | why there |
//! |---|---|
//! | *save* `mp_state` first | reading it makes the vCPU take pending INIT and SIPI, which changes all the rest |
//! | *save* `vcpu_events` after the registers | pending exceptions are settled by then |
//! | *load* `sregs` before `lapic` | they hold the APIC base: whether there is an APIC, and its mode |
//! | *load* `lapic` before the MSRs | the TSC deadline only arms a timer that the APIC has in deadline mode |
//! | *load* TSC deadline last of the MSRs | it is compared with the TSC, which is one of them |
//! | *load* `vcpu_events` after all | `sregs` and `mp_state` would drop what is pending |
//! | *load* interrupt controllers after every vCPU | the IOAPIC delivers what is pending as soon as it is loaded |
//! | *load* the clock last | it stands still meanwhile |
//!
//! CPUID, which decides what of this is possible, is set when the machine is built (see `host`).
#![expect(unsafe_code, reason = "XSAVE has a size that only the kernel knows")]

use ferry_protocol::{StateError, StateReader, StateWriter};
use kvm_bindings::{
    KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, Msrs, Xsave, kvm_clock_data,
    kvm_debugregs, kvm_irqchip, kvm_lapic_state, kvm_mp_state, kvm_msr_entry, kvm_pit_state2,
    kvm_regs, kvm_sregs, kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::{Cap, VcpuFd, VmFd};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::VmmError;
use crate::balloon::BalloonDevice;
use crate::console::{Console, ConsoleState};
use crate::error::Asked;
use crate::virtio_mmio::DeviceState;

pub(crate) const VERSION: u16 = 1;
const TSC_DEADLINE: u32 = 0x6e0;
const XSAVE_HEAD_BYTES: usize = size_of::<kvm_xsave>();
const IRQCHIPS: [(&str, u32); 3] = [
    ("pic-master", KVM_IRQCHIP_PIC_MASTER),
    ("pic-slave", KVM_IRQCHIP_PIC_SLAVE),
    ("ioapic", KVM_IRQCHIP_IOAPIC),
];

/// Every kind of section, in the order of loading.
const KINDS: &[&str] = &[
    "machine",
    "mp-state",
    "regs",
    "sregs",
    "xsave",
    "xcrs",
    "debugregs",
    "lapic",
    "msrs",
    "vcpu-events",
    "serial-16550",
    "virtio-balloon",
    "pit",
    "pic-master",
    "pic-slave",
    "ioapic",
    "clock",
];

/// The devices, as hosts compare them: kind and version of the state.
pub(crate) const DEVICES: &[(&str, u16)] = &[
    ("lapic", VERSION),
    ("serial-16550", VERSION),
    ("virtio-balloon", VERSION),
    ("pit", VERSION),
    ("pic-master", VERSION),
    ("pic-slave", VERSION),
    ("ioapic", VERSION),
    ("clock", VERSION),
];

/// What of the state depends on this host and machine.
pub(crate) struct Format {
    /// Bytes of `KVM_GET_XSAVE2`.
    xsave_bytes: usize,
    /// MSRs that can be read.
    msrs: Vec<u32>,
}

/// Names the machine in errors.
#[derive(Clone, Copy)]
pub(crate) struct Named<'a>(pub(crate) &'a str);

impl Named<'_> {
    fn state(self, source: StateError) -> VmmError {
        VmmError::State { name: self.0.to_owned(), source }
    }

    fn content(self, section: &str, index: u32, why: impl Into<String>) -> VmmError {
        VmmError::StateContent {
            name: self.0.to_owned(),
            section: format!("section {section}[{index}]"),
            why: why.into(),
        }
    }

    fn put<T: Serialize>(
        self,
        out: &mut StateWriter,
        kind: &str,
        index: u32,
        value: &T,
    ) -> Result<(), VmmError> {
        out.put(kind, index, VERSION, VERSION, value).map_err(|e| self.state(e))
    }

    fn read<T: DeserializeOwned>(
        self,
        from: &StateReader,
        kind: &str,
        index: u32,
    ) -> Result<T, VmmError> {
        from.read(kind, index, VERSION).map_err(|e| self.state(e))
    }

    pub(crate) fn put_machine<T: Serialize>(
        self,
        out: &mut StateWriter,
        value: &T,
    ) -> Result<(), VmmError> {
        self.put(out, "machine", 0, value)
    }

    pub(crate) fn read_machine<T: DeserializeOwned>(
        self,
        from: &StateReader,
    ) -> Result<T, VmmError> {
        from.require_known(KINDS).map_err(|e| self.state(e))?;
        self.read(from, "machine", 0)
    }
}

impl Format {
    /// Finds out, with a vCPU whose CPUID is set, what there is to save.
    pub(crate) fn of(vm: &VmFd, vcpu: &VcpuFd, candidates: &[u32]) -> Result<Self, VmmError> {
        let xsave2 = usize::try_from(vm.check_extension_int(Cap::Xsave2)).unwrap_or(0);
        let mut msrs: Vec<u32> = candidates.to_vec();
        let unreadable = read_msrs(vcpu, &mut msrs)?.1;
        tracing::debug!(readable = msrs.len(), unreadable = ?hex(&unreadable), "MSRs");
        Ok(Self { xsave_bytes: xsave2.max(XSAVE_HEAD_BYTES), msrs })
    }

    pub(crate) fn save_vcpu(
        &self,
        vcpu: &VcpuFd,
        index: u32,
        out: &mut StateWriter,
        named: Named<'_>,
    ) -> Result<(), VmmError> {
        let what = |what| move || format!("read {what} of vCPU {index}");
        named.put(out, "mp-state", index, &vcpu.get_mp_state().asked(what("mp_state"))?)?;
        named.put(out, "regs", index, &vcpu.get_regs().asked(what("regs"))?)?;
        named.put(out, "sregs", index, &vcpu.get_sregs().asked(what("sregs"))?)?;
        named.put(out, "xsave", index, &self.xsave(vcpu).asked(what("xsave"))?)?;
        named.put(out, "xcrs", index, &vcpu.get_xcrs().asked(what("xcrs"))?)?;
        named.put(out, "debugregs", index, &vcpu.get_debug_regs().asked(what("debugregs"))?)?;
        named.put(out, "lapic", index, &vcpu.get_lapic().asked(what("lapic"))?)?;
        let mut list = self.msrs.clone();
        let (entries, unreadable) = read_msrs(vcpu, &mut list)?;
        if !unreadable.is_empty() {
            tracing::warn!(vcpu = index, msrs = ?hex(&unreadable), "MSRs became unreadable and were not saved");
        }
        named.put(out, "msrs", index, &entries)?;
        named.put(out, "vcpu-events", index, &vcpu.get_vcpu_events().asked(what("vcpu_events"))?)
    }

    /// Returns the MSRs that this host did not take.
    pub(crate) fn load_vcpu(
        &self,
        vcpu: &VcpuFd,
        index: u32,
        from: &StateReader,
        named: Named<'_>,
    ) -> Result<Vec<u32>, VmmError> {
        let what = |what| move || format!("load {what} of vCPU {index}");
        vcpu.set_mp_state(named.read::<kvm_mp_state>(from, "mp-state", index)?)
            .asked(what("mp_state"))?;
        vcpu.set_regs(&named.read::<kvm_regs>(from, "regs", index)?).asked(what("regs"))?;
        vcpu.set_sregs(&named.read::<kvm_sregs>(from, "sregs", index)?).asked(what("sregs"))?;
        let xsave = named.read::<Vec<u32>>(from, "xsave", index)?;
        self.set_xsave(vcpu, &xsave)
            .map_err(|why| named.content("xsave", index, why))?
            .asked(what("xsave"))?;
        vcpu.set_xcrs(&named.read::<kvm_xcrs>(from, "xcrs", index)?).asked(what("xcrs"))?;
        vcpu.set_debug_regs(&named.read::<kvm_debugregs>(from, "debugregs", index)?)
            .asked(what("debugregs"))?;
        vcpu.set_lapic(&named.read::<kvm_lapic_state>(from, "lapic", index)?)
            .asked(what("lapic"))?;
        let mut msrs = named.read::<Vec<kvm_msr_entry>>(from, "msrs", index)?;
        let deadline: Vec<_> = msrs.extract_if(.., |m| m.index == TSC_DEADLINE).collect();
        let mut refused = write_msrs(vcpu, &msrs)?;
        refused.extend(write_msrs(vcpu, &deadline)?);
        vcpu.set_vcpu_events(&named.read::<kvm_vcpu_events>(from, "vcpu-events", index)?)
            .asked(what("vcpu_events"))?;
        Ok(refused)
    }

    fn xsave(&self, vcpu: &VcpuFd) -> Result<Vec<u32>, kvm_ioctls::Error> {
        if self.xsave_bytes <= XSAVE_HEAD_BYTES {
            return Ok(vcpu.get_xsave()?.region.to_vec());
        }
        let mut area = self.area().map_err(|_| kvm_ioctls::Error::new(libc::ENOMEM))?;
        // SAFETY: `area` has the size that KVM_CAP_XSAVE2 names for this VM, and this process asks
        // for no further XSTATE components (arch_prctl) after the VM was made.
        unsafe { vcpu.get_xsave2(&mut area)? };
        let head = area.as_fam_struct_ref().xsave.region;
        Ok(head.iter().chain(area.as_slice()).copied().collect())
    }

    /// The outer error: what came is no XSAVE area of this host.
    fn set_xsave(
        &self,
        vcpu: &VcpuFd,
        words: &[u32],
    ) -> Result<Result<(), kvm_ioctls::Error>, String> {
        const HEAD: usize = XSAVE_HEAD_BYTES / 4;
        let Some((head, extra)) = words.split_first_chunk::<HEAD>() else {
            return Err(format!(
                "{} bytes; at least {XSAVE_HEAD_BYTES} are needed",
                words.len() * 4
            ));
        };
        let mut area = self.area()?;
        // SAFETY: the length of the flexible part is left alone.
        unsafe { area.as_mut_fam_struct() }.xsave.region = *head;
        let room = area.as_mut_slice();
        match room.get_mut(..extra.len()) {
            Some(place) => place.copy_from_slice(extra),
            None => {
                return Err(format!(
                    "{} bytes; this host's XSAVE area has {}: its CPU has fewer extended states",
                    words.len() * 4,
                    self.xsave_bytes
                ));
            }
        }
        // SAFETY: `area` has the size that KVM_CAP_XSAVE2 names for this VM, as in `xsave`.
        Ok(unsafe { vcpu.set_xsave2(&area) })
    }

    fn area(&self) -> Result<Xsave, String> {
        Xsave::new((self.xsave_bytes - XSAVE_HEAD_BYTES).div_ceil(4)).map_err(|e| format!("{e:?}"))
    }
}

pub(crate) fn save_vm(
    vm: &VmFd,
    console: &Console,
    balloon: &BalloonDevice,
    out: &mut StateWriter,
    named: Named<'_>,
) -> Result<(), VmmError> {
    let what = |what: &'static str| move || format!("read the {what}");
    named.put(out, "serial-16550", 0, &console.save())?;
    named.put(out, "virtio-balloon", 0, &balloon.save())?;
    named.put(out, "pit", 0, &vm.get_pit2().asked(what("PIT"))?)?;
    for (kind, chip_id) in IRQCHIPS {
        let mut chip = kvm_irqchip { chip_id, ..Default::default() };
        vm.get_irqchip(&mut chip).asked(what(kind))?;
        named.put(out, kind, 0, &chip)?;
    }
    named.put(out, "clock", 0, &vm.get_clock().asked(what("clock"))?.clock)
}

pub(crate) fn load_vm(
    vm: &VmFd,
    console: &Console,
    balloon: &BalloonDevice,
    from: &StateReader,
    named: Named<'_>,
) -> Result<(), VmmError> {
    let what = |what: &'static str| move || format!("load the {what}");
    console
        .load(named.read::<ConsoleState>(from, "serial-16550", 0)?)
        .map_err(|why| named.content("serial-16550", 0, why))?;
    let announce = balloon
        .load(named.read::<DeviceState>(from, "virtio-balloon", 0)?)
        .map_err(|why| named.content("virtio-balloon", 0, why))?;
    vm.set_pit2(&named.read::<kvm_pit_state2>(from, "pit", 0)?).asked(what("PIT"))?;
    for (kind, chip_id) in IRQCHIPS {
        let chip = kvm_irqchip { chip_id, ..named.read::<kvm_irqchip>(from, kind, 0)? };
        vm.set_irqchip(&chip).asked(what(kind))?;
    }
    if announce {
        balloon.announce();
    }
    // Without flags: the guest's clock goes on where it stood, as its TSC does.
    let clock = kvm_clock_data { clock: named.read(from, "clock", 0)?, ..Default::default() };
    vm.set_clock(&clock).asked(what("clock"))
}

/// The MSRs to try: KVM's list, and the MTRRs, which it leaves out.
pub(crate) fn msr_candidates(listed: &[u32]) -> Vec<u32> {
    const MTRRS: [std::ops::RangeInclusive<u32>; 5] =
        [0x200..=0x20f, 0x250..=0x250, 0x258..=0x259, 0x268..=0x26f, 0x2ff..=0x2ff];
    // Hyper-V's and Xen's are for guests that are shown those hypervisors; ours never are.
    let foreign = 0x4000_0000..=0x4000_0fff;
    let mut all: Vec<u32> = listed.iter().copied().filter(|m| !foreign.contains(m)).collect();
    all.extend(MTRRS.into_iter().flatten());
    all.sort_unstable();
    all.dedup();
    all
}

/// Reads the MSRs in `list`; those that cannot be read are taken out of it and returned as second.
fn read_msrs(
    vcpu: &VcpuFd,
    list: &mut Vec<u32>,
) -> Result<(Vec<kvm_msr_entry>, Vec<u32>), VmmError> {
    let (mut entries, mut unreadable) = (Vec::new(), Vec::new());
    let mut done = 0;
    while done < list.len() {
        let end = list.len().min(done + kvm_bindings::KVM_MAX_MSR_ENTRIES);
        let wanted: Vec<_> = list[done..end]
            .iter()
            .map(|&index| kvm_msr_entry { index, ..Default::default() })
            .collect();
        let mut msrs = chunk(&wanted)?;
        let count = vcpu.get_msrs(&mut msrs).asked(|| "read MSRs".into())?.min(wanted.len());
        entries.extend_from_slice(&msrs.as_slice()[..count]);
        done += count;
        if count < wanted.len() {
            unreadable.push(list.remove(done));
        }
    }
    Ok((entries, unreadable))
}

/// An MSR, if it can be read.
pub(crate) fn read_msr(vcpu: &VcpuFd, index: u32) -> Option<u64> {
    Some(read_msrs(vcpu, &mut vec![index]).ok()?.0.first()?.data)
}

/// Writes MSRs; returns those that KVM refused.
pub(crate) fn write_msrs(vcpu: &VcpuFd, entries: &[kvm_msr_entry]) -> Result<Vec<u32>, VmmError> {
    let mut refused = Vec::new();
    let mut rest = entries;
    while !rest.is_empty() {
        let now = &rest[..rest.len().min(kvm_bindings::KVM_MAX_MSR_ENTRIES)];
        let count = vcpu.set_msrs(&chunk(now)?).asked(|| "write MSRs".into())?.min(now.len());
        rest = &rest[count..];
        if count < now.len() {
            refused.push(rest[0].index);
            rest = &rest[1..];
        }
    }
    Ok(refused)
}

fn chunk(entries: &[kvm_msr_entry]) -> Result<Msrs, VmmError> {
    Msrs::from_entries(entries).map_err(|e| VmmError::Ioctl {
        what: format!("take {} MSRs", entries.len()),
        source: std::io::Error::other(format!("{e:?}")),
    })
}

/// MSR numbers as people write them.
pub(crate) fn hex(msrs: &[u32]) -> Vec<String> {
    msrs.iter().map(|m| format!("{m:#x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn msrs_of_other_hypervisors_are_left_out_and_mtrrs_are_in() {
        let all = msr_candidates(&[0x10, 0x4000_0000, 0x4b56_4d00, 0x10]);
        assert_eq!(all.iter().filter(|m| **m == 0x10).count(), 1);
        assert!(all.contains(&0x2ff) && all.contains(&0x4b56_4d00) && !all.contains(&0x4000_0000));
    }
}
