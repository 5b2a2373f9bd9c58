//! Takes process guests in.

use ferry_guest::workload::Params;
use ferry_memory::available_bytes;
use ferry_migrate::{Guest, Host, HostCapabilities, MachineSpec, Refusal, words};

use crate::{Config, ProcessError, ProcessGuest, STATE_VERSION, VMM, WORKER};

/// A place for process guests: this process.
#[derive(Clone, Copy, Debug, Default)]
pub struct ProcessHost {
    /// Takes no machine with more memory than this. Without it, the kernel's `MemAvailable` counts.
    pub memory_limit_bytes: Option<u64>,
    /// Machines have their memory in huge pages here.
    pub huge_pages: bool,
}

impl ProcessHost {
    /// What it can take at the moment.
    pub fn capabilities(&self) -> HostCapabilities {
        // Huge pages are counted when they are mapped.
        let available = if self.huge_pages { u64::MAX } else { available_bytes() };
        HostCapabilities {
            vmm: VMM.into(),
            memory_bytes: self.memory_limit_bytes.map_or(available, |limit| limit.min(available)),
            max_vcpus: Params::MAX_CPUS,
            cpu_features: Vec::new(),
            devices: vec![(WORKER.into(), STATE_VERSION)],
        }
    }
}

impl ProcessGuest {
    /// An empty machine as `spec` says, parked, waiting for its memory and state.
    ///
    /// # Errors
    /// The specification is not one of a process guest, or this host has not enough for it.
    pub(crate) fn arrive(spec: &MachineSpec, huge_pages: bool) -> Result<Self, Vec<Refusal>> {
        let one = |what: &str, why: String| vec![Refusal::new(what, why)];
        if spec.config.len() > Config::MAX_BYTES {
            let (has, most) = (spec.config.len(), Config::MAX_BYTES);
            return Err(one(
                "vmm",
                format!("its configuration has {has} bytes; this host reads {most}"),
            ));
        }
        let mut config: Config = serde_json::from_slice(&spec.config)
            .map_err(|e| one("vmm", format!("its configuration cannot be read: {e}")))?;
        // The destination may call it otherwise.
        config.name.clone_from(&spec.name);
        config.huge_pages = huge_pages;
        // Before any thread or mapping is made: a peer that contradicts itself gets nothing.
        let (wants, says) = (config.memory_bytes, spec.memory_bytes());
        if wants != says {
            let why = format!("its configuration has {wants} bytes of memory, its layout {says}");
            return Err(one("memory", why));
        }
        if config.workers != spec.vcpus {
            let (wants, says) = (config.workers, spec.vcpus);
            return Err(one(
                "vcpus",
                format!("its configuration has {wants} workers, the machine {says}"),
            ));
        }
        let guest = Self::new(config).map_err(|e| {
            let what = match &e {
                ProcessError::Memory { .. }
                | ProcessError::Map { .. }
                | ProcessError::Balloon { .. } => "memory",
                ProcessError::Workers(_) => "vcpus",
                ProcessError::Workload(_) => "vmm",
                ProcessError::Host { .. } => "host",
            };
            one(what, words(&e))
        })?;
        let made = guest.spec();
        if (&made.extents, &made.devices) != (&spec.extents, &spec.devices) {
            return Err(one(
                "device",
                "its layout or devices are not those of its configuration".into(),
            ));
        }
        Ok(guest)
    }
}

impl Host for ProcessHost {
    type Guest = ProcessGuest;

    fn prepare(&self, spec: &MachineSpec) -> Result<ProcessGuest, Vec<Refusal>> {
        let refusals = self.capabilities().refusals(spec);
        if refusals.is_empty() {
            ProcessGuest::arrive(spec, self.huge_pages)
        } else {
            Err(refusals)
        }
    }

    fn available_bytes(&self) -> u64 {
        if self.huge_pages { u64::MAX } else { ferry_memory::available_bytes() }
    }
}
