//! The machine as the migration engine sees it.

use ferry_dirtylog::DirtySource;
use ferry_memory::GuestView;
use ferry_migrate::{FreePages, Guest, GuestError};
use ferry_pages::PageSet;
use ferry_protocol::{DeviceSpec, MachineSpec, RunPermit, StateReader, StateWriter, wire};
use kvm_bindings::kvm_cpuid_entry2;
use serde::{Deserialize, Serialize};

use crate::arch::features;
use crate::state::{self, DEVICES, Named};
use crate::{Machine, VmmError, memory};

/// This VMM's name in a [`MachineSpec`].
pub(crate) const VMM: &str = "refvmm";

/// What [`MachineSpec::config`] holds.
#[derive(Serialize, Deserialize)]
pub(crate) struct Carried {
    pub(crate) memory_bytes: u64,
    pub(crate) tsc_khz: u32,
    /// What each vCPU is shown.
    pub(crate) cpuid: Vec<Vec<kvm_cpuid_entry2>>,
}

/// The state that is the machine's own.
#[derive(Serialize, Deserialize)]
struct MachineState {
    operator_paused: bool,
}

fn refuse(e: impl std::fmt::Display) -> GuestError {
    GuestError::new(e.to_string())
}

/// Free pages, by the balloon's driver.
struct Hinting(Machine);

impl FreePages for Hinting {
    fn begin(&mut self) {
        if let Err(e) = self.0.begin_free_page_hints() {
            tracing::debug!("the guest does not say which pages are free: {e}");
        }
    }

    fn take(&mut self, into: &mut PageSet) {
        self.0.take_free_page_hints(into);
    }

    fn end(&mut self) {
        self.0.end_free_page_hints();
    }
}

impl Guest for Machine {
    fn spec(&self) -> MachineSpec {
        let inner = &self.0;
        let carried = Carried {
            memory_bytes: inner.shape.memory_bytes,
            tsc_khz: inner.board.tsc_khz,
            cpuid: inner.cpuid().to_vec(),
        };
        MachineSpec {
            name: inner.name.clone(),
            vmm: VMM.to_owned(),
            extents: memory::extents(inner.shape.memory_bytes)
                .iter()
                .map(|e| (e.start, e.pages))
                .collect(),
            vcpus: inner.shape.cpus,
            cpu_features: inner
                .cpuid()
                .first()
                .map(|c| features::names(c))
                .unwrap_or_default()
                .into_iter()
                .collect(),
            devices: DEVICES
                .iter()
                .map(|&(kind, version)| DeviceSpec { kind: kind.to_owned(), instance: 0, version })
                .collect(),
            // At most 240 vCPUs of 256 entries: far below the encoder's limit, its only error.
            config: wire::encode(&carried).unwrap_or_default(),
        }
    }

    fn machine(&self) -> Option<u128> {
        self.0.control().id
    }

    fn memory(&self) -> GuestView {
        self.0.board.view.clone()
    }

    fn dirty_sources(&mut self) -> Result<Vec<Box<dyn DirtySource>>, GuestError> {
        self.0.board.dirty_sources().map_err(refuse)
    }

    fn free_pages(&mut self) -> Option<Box<dyn FreePages>> {
        self.0.board.balloon.can_hint().then(|| Box::new(Hinting(self.clone())) as _)
    }

    fn throttle(&mut self, percent: u8) -> Result<(), GuestError> {
        let begun = self.0.board.vcpus.throttle(percent);
        begun.map_err(|e| GuestError::with("starting a thread that holds vCPUs back", e))
    }

    fn pause(&mut self) -> Result<RunPermit, GuestError> {
        let inner = &self.0;
        let mut control = inner.control();
        inner.check_here(&control).map_err(refuse)?;
        inner.park(&mut control).map_err(refuse)?;
        // It may have ended while it was being stopped.
        inner.check_alive(&control).map_err(refuse)?;
        control.permit.take().ok_or_else(|| refuse(inner.condition("it holds no run permit")))
    }

    fn resume(&mut self, permit: RunPermit) -> Result<(), (RunPermit, GuestError)> {
        let inner = &self.0;
        let mut control = inner.control();
        let objection = if let Err(e) = inner.check_alive(&control) {
            Some(e)
        } else if control.permit.is_some() {
            Some(inner.condition("it holds its run permit already"))
        } else if !control.loaded {
            Some(inner.condition("it has no state to run from"))
        } else if control.id.is_some_and(|id| id != permit.machine()) {
            Some(inner.condition("the run permit is another machine's"))
        } else {
            None
        };
        if let Some(e) = objection {
            return Err((permit, refuse(e)));
        }
        control.id = Some(permit.machine());
        control.permit = Some(permit);
        if !control.operator_paused {
            inner.run(&mut control);
        }
        Ok(())
    }

    fn save(&mut self, out: &mut StateWriter) -> Result<(), GuestError> {
        let inner = &self.0;
        let control = inner.control();
        if control.running {
            return Err(refuse(inner.condition("it runs: pause it to save its state")));
        }
        if !control.loaded {
            return Err(refuse(inner.condition("it has no state to save")));
        }
        let named = Named(&inner.name);
        let board = &inner.board;
        let save = |out: &mut StateWriter| -> Result<(), VmmError> {
            named.put_machine(out, &MachineState { operator_paused: control.operator_paused })?;
            for (index, number) in (0..board.vcpus.count()).zip(0u32..) {
                board.vcpus.with(index, |fd| board.format.save_vcpu(fd, number, out, named))?;
            }
            state::save_vm(&board.vm, &board.console, &board.balloon, out, named)
        };
        save(out).map_err(refuse)
    }

    fn load(&mut self, from: &StateReader) -> Result<(), GuestError> {
        let inner = &self.0;
        let mut control = inner.control();
        inner.check_alive(&control).map_err(refuse)?;
        if control.running || control.permit.is_some() {
            return Err(refuse(
                inner
                    .condition("it holds a machine already: load state into one that was prepared"),
            ));
        }
        control.loaded = false;
        let named = Named(&inner.name);
        let board = &inner.board;
        let load = || -> Result<MachineState, VmmError> {
            let machine = named.read_machine(from)?;
            for (index, number) in (0..board.vcpus.count()).zip(0u32..) {
                let refused = board
                    .vcpus
                    .with(index, |fd| board.format.load_vcpu(fd, number, from, named))?;
                if !refused.is_empty() {
                    tracing::warn!(machine = inner.name, vcpu = number, msrs = ?state::hex(&refused), "MSRs that this host does not take were left out");
                }
            }
            state::load_vm(&board.vm, &board.console, &board.balloon, from, named)?;
            Ok(machine)
        };
        let machine = load().map_err(refuse)?;
        control.operator_paused = machine.operator_paused;
        control.loaded = true;
        Ok(())
    }
}
