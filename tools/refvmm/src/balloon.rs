//! The balloon's place in the machine: an address in the hole below 4 GiB, interrupt 5.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use ferry_balloon::{Balloon, Interrupt, Refused, Status};
use ferry_memory::GuestView;
use ferry_pages::PageSet;
use kvm_ioctls::VmFd;

use crate::memory::GuestRam;
use crate::virtio_mmio::{DeviceState, Registers};

/// What tells a Linux guest of the device, in front of the rest of its command line.
pub(crate) const CMDLINE: &str = "virtio_mmio.device=4K@0xd0000000:5 ";
const ADDRESS: u64 = 0xd000_0000;
const BYTES: u64 = 4096;
const IRQ: u32 = 5;

/// The device in a machine. Calls that touch guest memory are for a machine that runs.
pub(crate) struct BalloonDevice {
    registers: Mutex<Registers>,
    vm: Arc<VmFd>,
    /// Not used any more when `view` is gone.
    ram: GuestRam,
    view: GuestView,
}

impl BalloonDevice {
    pub(crate) fn new(vm: &Arc<VmFd>, ram: &GuestRam, view: &GuestView, memory_bytes: u64) -> Self {
        let registers = Mutex::new(Registers::new(memory_bytes));
        Self { registers, vm: Arc::clone(vm), ram: ram.clone(), view: view.clone() }
    }

    fn registers(&self) -> MutexGuard<'_, Registers> {
        self.registers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The guest reads memory that is none; whether this device answers.
    pub(crate) fn read(&self, address: u64, data: &mut [u8]) -> bool {
        let Some(offset) = offset(address) else { return false };
        self.registers().read(offset, data);
        true
    }

    /// The guest writes memory that is none.
    pub(crate) fn write(&self, address: u64, data: &[u8]) {
        let Some(offset) = offset(address) else { return };
        let raise = self.registers().write(offset, data, &self.ram, &self.view);
        self.interrupt(raise);
    }

    /// An edge, delivered when this returns: state that is saved next holds it.
    fn interrupt(&self, raise: bool) {
        if raise {
            let edge = self.vm.set_irq_line(IRQ, true).and(self.vm.set_irq_line(IRQ, false));
            if let Err(e) = edge {
                tracing::warn!("interrupt {IRQ} of the balloon is lost: {e}");
            }
        }
    }

    fn act(&self, act: impl FnOnce(&mut Balloon) -> Option<Interrupt>) {
        let mut registers = self.registers();
        let due = act(&mut registers.balloon);
        let raise = registers.raise(due);
        drop(registers);
        self.interrupt(raise);
    }

    fn try_act(
        &self,
        act: impl FnOnce(&mut Balloon) -> Result<Interrupt, Refused>,
    ) -> Result<(), Refused> {
        let mut result = Ok(());
        self.act(|balloon| act(balloon).map_err(|e| result = Err(e)).ok());
        result
    }

    pub(crate) fn set_target(&self, bytes: u64) -> Result<(), Refused> {
        self.try_act(|balloon| balloon.set_target(bytes))
    }

    pub(crate) fn hint_begin(&self) -> Result<(), Refused> {
        self.try_act(Balloon::hint_begin)
    }

    pub(crate) fn take_hints(&self, into: &mut PageSet) -> bool {
        self.registers().balloon.take_hints(into)
    }

    pub(crate) fn hint_end(&self) {
        self.act(Balloon::hint_end);
    }

    pub(crate) fn ask_statistics(&self) {
        self.act(|balloon| balloon.ask_statistics(&self.ram));
    }

    pub(crate) fn status(&self) -> Status {
        self.registers().balloon.status()
    }

    pub(crate) fn save(&self) -> DeviceState {
        self.registers().save()
    }

    /// Takes over saved registers; whether [`announce`](Self::announce) is needed.
    pub(crate) fn load(&self, state: DeviceState) -> Result<bool, String> {
        let (registers, raise) = Registers::restore(state, &self.view)?;
        *self.registers() = registers;
        Ok(raise)
    }

    /// Raises the interrupt that loading made due, once the interrupt controllers are loaded.
    pub(crate) fn announce(&self) {
        self.interrupt(true);
    }
}

fn offset(address: u64) -> Option<u64> {
    address.checked_sub(ADDRESS).filter(|offset| *offset < BYTES)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory;

    #[test]
    fn the_device_lies_where_there_is_never_memory() {
        let end = ADDRESS + BYTES;
        assert!(ADDRESS >= memory::HOLE_START && end <= memory::HOLE_END);
        assert!(CMDLINE.contains(&format!("4K@{ADDRESS:#x}:{IRQ} ")));
    }
}
