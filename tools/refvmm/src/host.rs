//! Taking machines in.

use std::collections::BTreeSet;

use ferry_migrate::Host;
use ferry_protocol::{HostCapabilities, MachineSpec, Refusal, wire};
use kvm_bindings::{KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2};
use kvm_ioctls::{Cap, Kvm};

use crate::arch::cpu::Cpu;
use crate::arch::{cpuid, features};
use crate::board::{self, Board, Plan};
use crate::config::Shape;
use crate::error::Asked;
use crate::guest::{Carried, VMM};
use crate::state::{self, DEVICES};
use crate::{Arrival, Machine, VmmError, memory};

/// This host, as a place for machines.
#[derive(Clone, Debug, Default)]
pub struct RefHost {
    /// How machines are set up here.
    pub arrival: Arrival,
}

impl RefHost {
    /// What this host offers to machines.
    ///
    /// # Errors
    /// No KVM, or one that lacks what machines need.
    pub fn capabilities() -> Result<HostCapabilities, VmmError> {
        let kvm = board::open_kvm()?;
        Ok(offered(&kvm, &Here::of(&kvm)?))
    }

    /// What this host can show of its processor.
    ///
    /// # Errors
    /// No KVM, or it does not tell.
    pub fn cpu() -> Result<Cpu, VmmError> {
        Ok(Here::of(&board::open_kvm()?)?.cpu())
    }

    /// Frequency of this host's time-stamp counter, which guests see, in kHz.
    ///
    /// # Errors
    /// No KVM, or it does not tell.
    pub fn tsc_khz() -> Result<u32, VmmError> {
        Ok(Here::of(&board::open_kvm()?)?.tsc_khz)
    }
}

/// What this host can show of its processor.
pub(crate) struct Here {
    /// CPUID, and `IA32_ARCH_CAPABILITIES` as a leaf.
    pub(crate) shows: Vec<kvm_cpuid_entry2>,
    tsc_khz: u32,
    tsc_scaling: bool,
}

impl Here {
    pub(crate) fn of(kvm: &Kvm) -> Result<Self, VmmError> {
        let mut shows = cpuid::supported(kvm)?;
        let vcpu = board::create_vm(kvm)?.create_vcpu(0).asked(|| "create a vCPU".into())?;
        board::set_cpuid(&vcpu, 0, &shows)?;
        // KVM's own list of such MSRs does not tell what a vCPU gets.
        let told = shows.iter().any(|e| (e.function, e.index) == (7, 0) && e.edx >> 29 & 1 == 1);
        let value = told.then(|| state::read_msr(&vcpu, cpuid::ARCH_CAPABILITIES)).flatten();
        shows.extend(value.map(cpuid::arch_capabilities_leaf));
        let tsc_khz = vcpu.get_tsc_khz().asked(|| "tell the TSC's rate".into())?;
        Ok(Self { shows, tsc_khz, tsc_scaling: kvm.check_extension(Cap::TscControl) })
    }

    /// The features that it could show, and `shows` does not.
    pub(crate) fn hidden_in(&self, shows: &[kvm_cpuid_entry2]) -> BTreeSet<String> {
        &features::all_names(&self.shows) - &features::all_names(shows)
    }

    pub(crate) fn cpu(&self) -> Cpu {
        Cpu::of(&self.shows, self.tsc_khz, self.tsc_scaling)
    }
}

fn offered(kvm: &Kvm, here: &Here) -> HostCapabilities {
    HostCapabilities {
        vmm: VMM.to_owned(),
        memory_bytes: ferry_memory::available_bytes(),
        max_vcpus: board::max_cpus(kvm),
        cpu_features: features::names(&here.shows).into_iter().collect(),
        devices: DEVICES.iter().map(|&(kind, version)| (kind.to_owned(), version)).collect(),
    }
}

impl Machine {
    /// Builds an empty, paused machine for one that is to come: memory mapped and untouched, vCPUs with
    /// the CPUID that the guest was shown and their threads parked, devices made.
    ///
    /// # Errors
    /// Every reason why this host cannot take it.
    pub fn arrive(spec: &MachineSpec, arrival: &Arrival) -> Result<Self, Vec<Refusal>> {
        let here = |e: VmmError| vec![Refusal::new("host", e.to_string())];
        let kvm = board::open_kvm().map_err(here)?;
        let mut shown = Here::of(&kvm).map_err(here)?;
        if let Some(cpu) = &arrival.cpu {
            shown.shows = cpu.only(&shown.shows);
        }
        let mut offered = offered(&kvm, &shown);
        if arrival.huge_pages {
            // Those are counted when they are mapped.
            offered.memory_bytes = u64::MAX;
        }
        let mut refusals = offered.refusals(spec);
        let carried = carried(spec, &kvm);
        let (carried, shape) = match carried {
            Ok((carried, shape)) => {
                refusals.extend(unnamed(&shown.cpu(), &carried, &spec.cpu_features));
                (carried, shape)
            }
            Err(r) => {
                refusals.push(r);
                return Err(refusals);
            }
        };
        if !refusals.is_empty() {
            return Err(refusals);
        }
        let name = arrival.name.as_deref().unwrap_or(&spec.name);
        let plan = Plan {
            name,
            shape,
            huge_pages: arrival.huge_pages,
            dirty_log: arrival.dirty_log,
            serial: &arrival.serial,
            cpuid: carried.cpuid,
            hidden: BTreeSet::new(),
            tsc_khz: Some(carried.tsc_khz),
        };
        let parts = Board::build(&kvm, plan, |_| Ok(None)).map_err(|e| match e {
            VmmError::TscRate { .. } => vec![Refusal::new("cpu", e.to_string())],
            VmmError::Map { .. } => vec![Refusal::new("memory", e.to_string())],
            e => here(e),
        })?;
        Ok(Self::new(name, shape, parts, None))
    }
}

/// What `spec` carries for this VMM, checked against what it says of itself.
fn carried(spec: &MachineSpec, kvm: &Kvm) -> Result<(Carried, Shape), Refusal> {
    let config = |why: String| {
        Refusal::new("version", format!("refvmm's description of the machine: {why}"))
    };
    let carried: Carried =
        wire::decode(&spec.config).map_err(|e| config(format!("{e}; update this host")))?;
    let shape = Shape::new(carried.memory_bytes, spec.vcpus, board::max_cpus(kvm))
        .map_err(|e| Refusal::new("memory", e.to_string()))?;
    let expected: Vec<_> =
        memory::extents(shape.memory_bytes).iter().map(|e| (e.start, e.pages)).collect();
    if expected != spec.extents {
        let why = format!(
            "the machine's memory lies at (frame, pages) {:?}; refvmm puts {} bytes at {expected:?}",
            spec.extents, shape.memory_bytes
        );
        return Err(Refusal::new("memory", why));
    }
    let lists = carried.cpuid.len();
    if lists as u64 != u64::from(spec.vcpus) {
        return Err(config(format!("CPUID for {lists} vCPUs, but the machine has {}", spec.vcpus)));
    }
    if let Some(list) = carried.cpuid.iter().find(|l| l.len() > KVM_MAX_CPUID_ENTRIES) {
        return Err(config(format!(
            "{} CPUID entries; at most {KVM_MAX_CPUID_ENTRIES}",
            list.len()
        )));
    }
    Ok((carried, shape))
}

/// What the guest was shown and `here` lacks, besides features that are `named` and were compared.
fn unnamed(here: &Cpu, carried: &Carried, named: &[String]) -> Option<Refusal> {
    let shown = carried.cpuid.iter().map(|list| Cpu::of(list, carried.tsc_khz, false));
    let mut lacks: BTreeSet<_> = shown.flat_map(|shown| here.lacks(&shown)).collect();
    lacks.retain(|what| !named.contains(what));
    let lacks = Vec::from_iter(lacks).join(", ");
    (!lacks.is_empty()).then(|| {
        Refusal::new("cpu", format!("this host's CPU lacks what the guest was shown: {lacks}"))
    })
}

impl Host for RefHost {
    type Guest = Machine;

    fn prepare(&self, spec: &MachineSpec) -> Result<Machine, Vec<Refusal>> {
        Machine::arrive(spec, &self.arrival)
    }

    fn available_bytes(&self) -> u64 {
        if self.arrival.huge_pages { u64::MAX } else { ferry_memory::available_bytes() }
    }
}
