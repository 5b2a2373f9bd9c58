//! A way in for `tests/fuzz`: the balloon's registers over memory, and state as it is read, without KVM.

use ferry_balloon::Balloon;
use ferry_memory::GuestView;
use ferry_protocol::{StateError, StateReader, wire};
use kvm_bindings::{
    kvm_debugregs, kvm_irqchip, kvm_lapic_state, kvm_mp_state, kvm_msr_entry, kvm_pit_state2,
    kvm_regs, kvm_sregs, kvm_vcpu_events, kvm_xcrs,
};
use vm_memory::{Bytes, GuestAddress};

use crate::VmmError;
use crate::console::ConsoleState;
use crate::memory::{self, GuestRam};
use crate::state::VERSION;
use crate::virtio_mmio::{DeviceState, Registers};

/// The balloon of a machine, its registers, and the machine's memory.
pub struct Device {
    registers: Registers,
    ram: GuestRam,
    view: GuestView,
}

impl Device {
    /// The balloon of a machine with so much memory.
    ///
    /// # Errors
    /// The memory cannot be mapped.
    pub fn new(memory_bytes: u64) -> Result<Self, VmmError> {
        let (ram, view) = memory::map(memory_bytes, false)?;
        Ok(Self { registers: Registers::new(memory_bytes), ram, view })
    }

    /// A vCPU reads from the registers.
    pub fn read(&mut self, offset: u64, data: &mut [u8]) {
        self.registers.read(offset, data);
    }

    /// A vCPU writes to them; whether an interrupt is due.
    pub fn write(&mut self, offset: u64, data: &[u8]) -> bool {
        self.registers.write(offset, data, &self.ram, &self.view)
    }

    /// A vCPU writes to memory, as far as there is some.
    pub fn poke(&self, at: u64, bytes: &[u8]) {
        let _ = self.ram.write(bytes, GuestAddress(at));
    }

    /// What is behind the registers.
    pub fn balloon(&mut self) -> &mut Balloon {
        &mut self.registers.balloon
    }

    /// Asks the guest what it has.
    pub fn ask_statistics(&mut self) -> bool {
        let due = self.registers.balloon.ask_statistics(&self.ram);
        self.registers.raise(due)
    }

    /// Registers and balloon as they are saved.
    ///
    /// # Errors
    /// They cannot be encoded.
    pub fn save(&self) -> Result<Vec<u8>, wire::WireError> {
        wire::encode(&self.registers.save())
    }

    /// Goes on from what was saved; as it was if that cannot be.
    ///
    /// # Errors
    /// Why not.
    pub fn restore(&mut self, bytes: &[u8]) -> Result<(), String> {
        let state = wire::decode::<DeviceState>(bytes).map_err(|e| e.to_string())?;
        self.registers = Registers::restore(state, &self.view)?.0;
        Ok(())
    }
}

/// Reads every section of a machine's state as loading does: what was found, of each kind.
pub fn read_state(from: &StateReader) -> Vec<Result<(), StateError>> {
    macro_rules! read {
        ($($kind:literal: $of:ty),* $(,)?) => {
            vec![$(from.read::<$of>($kind, 0, VERSION).map(drop)),*]
        };
    }
    read! {
        "mp-state": kvm_mp_state,
        "regs": kvm_regs,
        "sregs": kvm_sregs,
        "xsave": Vec<u32>,
        "xcrs": kvm_xcrs,
        "debugregs": kvm_debugregs,
        "lapic": kvm_lapic_state,
        "msrs": Vec<kvm_msr_entry>,
        "vcpu-events": kvm_vcpu_events,
        "serial-16550": ConsoleState,
        "virtio-balloon": DeviceState,
        "pit": kvm_pit_state2,
        "pic-master": kvm_irqchip,
        "clock": u64,
    }
}
