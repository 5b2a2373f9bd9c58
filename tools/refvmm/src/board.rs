//! Building a machine from KVM's parts: VM, interrupt controllers, timer, memory, vCPUs.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{self, Read};
use std::sync::Arc;
use std::thread::JoinHandle;

use ferry_dirtylog::{DirtySource, Region};
use ferry_dirtylog::{KvmBitmap, KvmRings, SoftwareBitmap, TrackError, UffdWriteProtect};
use ferry_memory::GuestView;
use kvm_bindings::{
    KVM_CAP_DIRTY_LOG_RING, KVM_CAP_DIRTY_LOG_RING_ACQ_REL, KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2,
    KVM_MAX_CPUID_ENTRIES, KVM_PIT_SPEAKER_DUMMY, kvm_cpuid_entry2, kvm_msr_entry, kvm_pit_config,
};
use kvm_ioctls::{Cap, Kvm, VcpuFd, VmFd};

use crate::arch::cpu::same_rate;
use crate::arch::registers::Entry;
use crate::arch::{cpuid, features};
use crate::balloon::BalloonDevice;
use crate::config::{MAX_CPUS, Shape};
use crate::console::Console;
use crate::error::Asked;
use crate::memory::{self, GuestRam};
use crate::state::{self, Format};
use crate::vcpu::{Devices, Vcpus};
use crate::{DirtyLog, SerialSink, VmmError};

/// Three pages that Intel CPUs need for real mode, in the hole below 4 GiB.
const TSS: usize = 0xfffb_d000;
const IDENTITY_MAP: u64 = 0xfffb_c000;
const RING_ENTRIES: u32 = 16384;

/// What every machine needs of KVM.
const NEEDED: &[(Cap, &str)] = &[
    (Cap::Irqchip, "KVM_CAP_IRQCHIP"),
    (Cap::UserMemory, "KVM_CAP_USER_MEMORY"),
    (Cap::SetTssAddr, "KVM_CAP_SET_TSS_ADDR"),
    (Cap::ExtCpuid, "KVM_CAP_EXT_CPUID"),
    (Cap::MpState, "KVM_CAP_MP_STATE"),
    (Cap::Pit2, "KVM_CAP_PIT2"),
    (Cap::PitState2, "KVM_CAP_PIT_STATE2"),
    (Cap::AdjustClock, "KVM_CAP_ADJUST_CLOCK"),
    (Cap::VcpuEvents, "KVM_CAP_VCPU_EVENTS"),
    (Cap::Debugregs, "KVM_CAP_DEBUGREGS"),
    (Cap::Xsave, "KVM_CAP_XSAVE"),
    (Cap::Xcrs, "KVM_CAP_XCRS"),
    (Cap::GetTscKhz, "KVM_CAP_GET_TSC_KHZ"),
    (Cap::ImmediateExit, "KVM_CAP_IMMEDIATE_EXIT"),
];

/// Opens KVM and makes sure that it has what machines need.
pub(crate) fn open_kvm() -> Result<Kvm, VmmError> {
    let kvm = Kvm::new().map_err(|e| {
        let source = io::Error::from_raw_os_error(e.errno());
        let advice = match source.kind() {
            io::ErrorKind::NotFound => {
                "Load kvm_intel or kvm_amd, switch virtualization on in the firmware, or pass /dev/kvm into this container"
            }
            io::ErrorKind::PermissionDenied => "Give this user access: add it to the group of /dev/kvm (mostly `kvm`)",
            _ => "See the kernel's log",
        };
        VmmError::Kvm { advice, source }
    })?;
    if kvm.get_api_version() != 12 {
        return Err(VmmError::Capability("KVM API version 12"));
    }
    match NEEDED.iter().find(|(cap, _)| !kvm.check_extension(*cap)) {
        Some((_, name)) => Err(VmmError::Capability(name)),
        None => Ok(kvm),
    }
}

/// The most vCPUs for one machine.
pub(crate) fn max_cpus(kvm: &Kvm) -> u32 {
    u32::try_from(kvm.get_max_vcpus()).unwrap_or(MAX_CPUS).min(MAX_CPUS)
}

/// How writes of vCPUs are tracked.
pub(crate) enum Tracking {
    Bitmap,
    Ring(Arc<KvmRings>),
    WriteProtect,
}

impl Tracking {
    fn set_up(vm: &Arc<VmFd>, asked: DirtyLog, regions: Vec<Region>) -> Result<Self, VmmError> {
        let has = |cap: u32| vm.check_extension_raw(cap.into()) > 0;
        let kind = match asked {
            DirtyLog::Auto if has(KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2) => DirtyLog::Bitmap,
            DirtyLog::Auto
                if has(KVM_CAP_DIRTY_LOG_RING_ACQ_REL) || has(KVM_CAP_DIRTY_LOG_RING) =>
            {
                DirtyLog::Ring
            }
            DirtyLog::Auto => DirtyLog::Bitmap,
            asked => asked,
        };
        let fail = |asked| move |source| VmmError::DirtyLog { asked, source };
        match kind {
            DirtyLog::Bitmap | DirtyLog::Auto => Ok(Self::Bitmap),
            DirtyLog::Ring => {
                let rings = KvmRings::enable(vm, RING_ENTRIES).map_err(fail("ring"))?;
                Ok(Self::Ring(Arc::new(rings)))
            }
            DirtyLog::WriteProtect => {
                // Tried now, so that the operator hears of it before the machine runs.
                drop(UffdWriteProtect::new(regions).map_err(fail("write-protect"))?);
                Ok(Self::WriteProtect)
            }
        }
    }

    /// The kind, as an operator names it.
    pub(crate) fn name(&self) -> &'static str {
        match self {
            Self::Bitmap => "bitmap",
            Self::Ring(_) => "ring",
            Self::WriteProtect => "write-protect",
        }
    }
}

/// A machine's parts. Its memory outlives it.
pub(crate) struct Board {
    pub(crate) vcpus: Arc<Vcpus>,
    pub(crate) console: Arc<Console>,
    pub(crate) balloon: Arc<BalloonDevice>,
    pub(crate) vm: Arc<VmFd>,
    pub(crate) tracking: Tracking,
    pub(crate) format: Format,
    pub(crate) cpuid: Vec<Vec<kvm_cpuid_entry2>>,
    pub(crate) tsc_khz: u32,
    /// Not used any more when `view` is gone.
    pub(crate) ram: GuestRam,
    pub(crate) view: GuestView,
}

/// What to build.
pub(crate) struct Plan<'a> {
    pub(crate) name: &'a str,
    pub(crate) shape: Shape,
    pub(crate) huge_pages: bool,
    pub(crate) dirty_log: DirtyLog,
    pub(crate) serial: &'a SerialSink,
    /// What each vCPU is shown.
    pub(crate) cpuid: Vec<Vec<kvm_cpuid_entry2>>,
    /// Features that it must not be shown.
    pub(crate) hidden: BTreeSet<String>,
    /// The TSC's rate in kHz; this host's if `None`.
    pub(crate) tsc_khz: Option<u32>,
}

impl Board {
    /// Builds a machine; `fill` writes to its memory and says how the boot processor starts, or not.
    pub(crate) fn build(
        kvm: &Kvm,
        plan: Plan<'_>,
        fill: impl FnOnce(&GuestRam) -> Result<Option<Entry>, VmmError>,
    ) -> Result<(Self, Vec<JoinHandle<()>>), VmmError> {
        let (ram, view) = memory::map(plan.shape.memory_bytes, plan.huge_pages)?;
        let entry = fill(&ram)?;
        Self::wire(kvm, plan, ram, &view, entry)
    }

    fn wire(
        kvm: &Kvm,
        plan: Plan<'_>,
        ram: GuestRam,
        view: &GuestView,
        entry: Option<Entry>,
    ) -> Result<(Self, Vec<JoinHandle<()>>), VmmError> {
        let vm = Arc::new(create_vm(kvm)?);
        vm.set_tss_address(TSS).asked(|| "set the TSS address".into())?;
        vm.set_identity_map_address(IDENTITY_MAP)
            .asked(|| "set the identity map address".into())?;
        vm.create_irq_chip().asked(|| "create the interrupt controllers".into())?;
        let pit = kvm_pit_config { flags: KVM_PIT_SPEAKER_DUMMY, ..Default::default() };
        vm.create_pit2(pit).asked(|| "create the timer (PIT)".into())?;
        memory::give_to(&vm, view)?;
        let tracking = Tracking::set_up(&vm, plan.dirty_log, view.regions().to_vec())?;
        let console = Arc::new(Console::new(&vm, plan.serial)?);
        let balloon = Arc::new(BalloonDevice::new(&vm, &ram, view, plan.shape.memory_bytes));

        let mut fds = Vec::new();
        for (index, shown) in (0u32..).zip(&plan.cpuid) {
            let mut fd = vm.create_vcpu(index.into()).asked(|| format!("create vCPU {index}"))?;
            set_cpuid(&fd, index, shown)?;
            check_hidden(&fd, index, &plan.hidden)?;
            set_tsc_khz(&vm, &fd, index, plan.tsc_khz)?;
            if let Tracking::Ring(rings) = &tracking {
                rings
                    .add_vcpu(&fd)
                    .map_err(|source| VmmError::DirtyLog { asked: "ring", source })?;
            }
            if let Some(entry) = entry {
                set_boot_state(&mut fd, index, entry)?;
                set_arch_capabilities(&fd, index, cpuid::arch_capabilities(shown))?;
            }
            fds.push(fd);
        }
        let first = fds.first().ok_or(VmmError::Cpus { cpus: 0, max: max_cpus(kvm) })?;
        let listed = kvm.get_msr_index_list().asked(|| "list its MSRs".into())?;
        let format = Format::of(&vm, first, &state::msr_candidates(listed.as_slice()))?;
        let tsc_khz = first.get_tsc_khz().asked(|| "tell the TSC's rate".into())?;
        let rings = match &tracking {
            Tracking::Ring(rings) => Some(Arc::clone(rings)),
            _ => None,
        };
        let (vcpus, threads) = Vcpus::start(
            fds,
            Devices { console: Arc::clone(&console), balloon: Arc::clone(&balloon) },
            rings,
            plan.name,
        )?;
        let cpuid = plan.cpuid;
        Ok((
            Self {
                vcpus,
                console,
                balloon,
                vm,
                tracking,
                format,
                cpuid,
                tsc_khz,
                view: view.clone(),
                ram,
            },
            threads,
        ))
    }

    /// Fresh trackers of all writes to the machine's memory.
    pub(crate) fn dirty_sources(&self) -> Result<Vec<Box<dyn DirtySource>>, TrackError> {
        let devices = || Box::new(Arc::new(SoftwareBitmap::of_memory(&self.ram)));
        let regions = self.view.regions().to_vec();
        Ok(match &self.tracking {
            Tracking::Bitmap => {
                vec![Box::new(KvmBitmap::new(Arc::clone(&self.vm), regions)?), devices()]
            }
            Tracking::Ring(rings) => vec![Box::new(rings.source(regions)), devices()],
            // It sees every writer of this process.
            Tracking::WriteProtect
                if let Some(tracker) = self.view.away().and_then(|away| away.tracker()) =>
            {
                vec![tracker]
            }
            Tracking::WriteProtect => vec![Box::new(UffdWriteProtect::new(regions)?)],
        })
    }
}

pub(crate) fn create_vm(kvm: &Kvm) -> Result<VmFd, VmmError> {
    loop {
        match kvm.create_vm() {
            Err(e) if e.errno() == libc::EINTR => {}
            other => return other.asked(|| "create a VM".into()),
        }
    }
}

pub(crate) fn set_cpuid(
    fd: &VcpuFd,
    index: u32,
    shown: &[kvm_cpuid_entry2],
) -> Result<(), VmmError> {
    let what = || format!("show {} CPUID entries to vCPU {index}", shown.len());
    let list = cpuid::to_kvm(shown).ok_or_else(|| VmmError::Ioctl {
        what: what(),
        source: io::Error::from(io::ErrorKind::InvalidInput),
    })?;
    fd.set_cpuid2(&list).asked(what)
}

/// Some KVMs show guests what they cannot keep them from using: those without hardware virtualization.
fn check_hidden(fd: &VcpuFd, index: u32, hidden: &BTreeSet<String>) -> Result<(), VmmError> {
    if hidden.is_empty() {
        return Ok(());
    }
    let told = fd.get_cpuid2(KVM_MAX_CPUID_ENTRIES);
    let told = told.asked(|| format!("tell the CPUID of vCPU {index}"))?;
    let shown = features::all_names(told.as_slice());
    let shown: Vec<_> = shown.intersection(hidden).cloned().collect();
    if shown.is_empty() { Ok(()) } else { Err(VmmError::NotHidden(shown)) }
}

/// Shows `value` where the guest can read it.
fn set_arch_capabilities(fd: &VcpuFd, index: u32, value: Option<u64>) -> Result<(), VmmError> {
    let msr = cpuid::ARCH_CAPABILITIES;
    let Some(data) = value.filter(|v| state::read_msr(fd, msr) != Some(*v)) else { return Ok(()) };
    let msr = kvm_msr_entry { index: msr, data, ..Default::default() };
    if state::write_msrs(fd, &[msr])?.is_empty() {
        return Ok(());
    }
    Err(VmmError::Ioctl {
        what: format!("show IA32_ARCH_CAPABILITIES {data:#x} to vCPU {index}"),
        source: io::Error::from(io::ErrorKind::InvalidInput),
    })
}

/// Sets the TSC's rate where it differs from the host's by more than its accuracy.
fn set_tsc_khz(vm: &VmFd, fd: &VcpuFd, index: u32, wanted: Option<u32>) -> Result<(), VmmError> {
    let Some(machine_khz) = wanted else { return Ok(()) };
    let host_khz = fd.get_tsc_khz().asked(|| "tell the TSC's rate".into())?;
    if same_rate(machine_khz, host_khz) {
        return Ok(());
    }
    // Without the capability KVM accepts a faster rate nevertheless, and then falls behind in leaps.
    if !vm.check_extension(Cap::TscControl) {
        return Err(VmmError::TscRate { machine_khz, host_khz });
    }
    fd.set_tsc_khz(machine_khz)
        .asked(|| format!("run the TSC of vCPU {index} at {machine_khz} kHz"))
}

fn set_boot_state(fd: &mut VcpuFd, index: u32, entry: Entry) -> Result<(), VmmError> {
    const MISC_ENABLE: u32 = 0x1a0;
    const MTRR_DEFAULT_TYPE: u32 = 0x2ff;
    let msrs = [(MISC_ENABLE, 1), (MTRR_DEFAULT_TYPE, 1 << 11 | 6)] // fast strings; MTRRs on, write-back
        .map(|(index, data)| kvm_msr_entry { index, data, ..Default::default() });
    let refused = state::write_msrs(fd, &msrs)?;
    if !refused.is_empty() {
        tracing::debug!(vcpu = index, msrs = ?state::hex(&refused), "MSRs cannot be preset");
    }
    if index > 0 {
        return Ok(()); // waits for INIT and SIPI, as KVM makes it
    }
    let what = |what| move || format!("set the {what} of vCPU {index}");
    let mut sregs = fd.get_sregs().asked(what("sregs"))?;
    entry.set_sregs(&mut sregs);
    fd.set_sregs(&sregs).asked(what("sregs"))?;
    fd.set_regs(&entry.regs()).asked(what("regs"))?;
    // As firmware leaves it: LINT0 takes the PIC's interrupts, LINT1 NMIs.
    let mut lapic = fd.get_lapic().asked(what("lapic"))?;
    for (offset, mode) in [(0x350, 7), (0x360, 4)] {
        lapic.regs[offset] = 0;
        lapic.regs[offset + 1] = mode;
        lapic.regs[offset + 2] = 0; // unmasked
    }
    fd.set_lapic(&lapic).asked(what("lapic"))
}

/// 128 random bits.
pub(crate) fn random_id() -> Result<u128, VmmError> {
    let path = "/dev/urandom";
    let mut bytes = [0; 16];
    File::open(path).and_then(|mut f| f.read_exact(&mut bytes)).map_err(|source| {
        VmmError::File { action: "read", what: "random numbers", path: path.into(), source }
    })?;
    Ok(u128::from_le_bytes(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::arch::cpu::Cpu;
    use crate::host::Here;

    /// What the second vCPU of a machine of `cpu` is shown, as KVM has it.
    fn shown(kvm: &Kvm, here: &Here, cpu: &Cpu) -> Result<Vec<kvm_cpuid_entry2>, VmmError> {
        let base = cpu.only(&here.shows);
        let plan = Plan {
            name: "shown",
            shape: Shape { memory_bytes: 8 << 20, cpus: 2 },
            huge_pages: false,
            dirty_log: DirtyLog::Auto,
            serial: &SerialSink::Discard,
            cpuid: (0..2).map(|i| cpuid::of_vcpu(&base, i, 2)).collect(),
            hidden: here.hidden_in(&base),
            tsc_khz: None,
        };
        let entry = Entry::Pvh { rip: 0x10_0000, start_info: 0x6000 };
        let (board, threads) = Board::build(kvm, plan, |_| Ok(Some(entry)))?;
        let (mut found, msr) = board.vcpus.with(1, |fd| {
            let found = fd.get_cpuid2(KVM_MAX_CPUID_ENTRIES).unwrap().as_slice().to_vec();
            (found, state::read_msr(fd, cpuid::ARCH_CAPABILITIES))
        });
        board.vcpus.exit();
        threads.into_iter().for_each(|t| t.join().unwrap());
        found.push(cpuid::arch_capabilities_leaf(msr.unwrap_or(0)));
        Ok(found)
    }

    #[test]
    fn a_feature_that_is_taken_away_is_not_shown_by_kvm_or_the_machine_is_not_made() {
        let Ok(kvm) = open_kvm() else { return eprintln!("SKIP: no KVM") };
        let here = Here::of(&kvm).unwrap();
        let all = here.cpu();
        let (mut hidden, mut forced) = (Vec::new(), Vec::new());
        for name in &all.features {
            let mut less = all.clone();
            less.features.remove(name);
            match shown(&kvm, &here, &less) {
                Ok(shown) => {
                    let shown = Cpu::of(&shown, 1, false).features;
                    assert!(!shown.contains(name), "{name}: {shown:?}");
                    hidden.push(name);
                }
                Err(VmmError::NotHidden(names)) => {
                    assert!(names.contains(name), "{name}: {names:?}");
                    forced.push(name);
                }
                Err(e) => assert!(e.to_string().contains("ARCH_CAPABILITIES"), "{name}: {e}"),
            }
        }
        println!("can be hidden: {hidden:?}\ncannot: {forced:?}");
        assert!(hidden.len() > 10, "{hidden:?}");
    }

    #[test]
    fn what_is_not_taken_away_is_shown_as_before() {
        let Ok(kvm) = open_kvm() else { return eprintln!("SKIP: no KVM") };
        let here = Here::of(&kvm).unwrap();
        let all = here.cpu();
        let plain = Cpu::of(&shown(&kvm, &here, &all).unwrap(), 1, false);
        assert_eq!(plain.limits, all.limits);
        assert_eq!(
            (plain.family, plain.model, &plain.vendor),
            (all.family, all.model, &all.vendor)
        );
        let mut less = all.clone();
        less.limits.phys_bits -= 1;
        less.model = 1;
        less.features.remove("kvm_steal_time");
        let masked = Cpu::of(&shown(&kvm, &here, &less).unwrap(), 1, false);
        let mut expected = Cpu { limits: less.limits, model: 1, ..plain };
        expected.features.remove("kvm_steal_time");
        assert_eq!(masked, expected);
    }
}
