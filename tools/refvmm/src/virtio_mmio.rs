//! The balloon's place in the machine: virtio over memory-mapped registers (virtio 1.2, section 4.2), at a fixed
//! address in the hole below 4 GiB, interrupt 5.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use ferry_balloon::{Balloon, BalloonState, DEVICE_ID, Interrupt, Refused, Status, feature};
use ferry_memory::GuestView;
use ferry_pages::PageSet;
use kvm_ioctls::VmFd;
use serde::{Deserialize, Serialize};
use virtio_bindings::{virtio_config, virtio_mmio as register};
use virtio_queue::{Queue, QueueT};
use vm_memory::GuestAddress;

use crate::memory::GuestRam;

/// What tells a Linux guest of the device, in front of the rest of its command line.
pub(crate) const CMDLINE: &str = "virtio_mmio.device=4K@0xd0000000:5 ";
const ADDRESS: u64 = 0xd000_0000;
const BYTES: u64 = 4096;
const IRQ: u32 = 5;

const MAGIC: u32 = u32::from_le_bytes(*b"virt");
const VENDOR: u32 = u32::from_le_bytes(*b"FERY");
const VERSION: u32 = 2;
const CONFIG: u64 = register::VIRTIO_MMIO_CONFIG as u64;

/// The registers, and the device behind them.
struct Registers {
    balloon: Balloon,
    status: u32,
    /// Which half of the features is shown, and which is taken.
    device_half: u32,
    driver_half: u32,
    driver_features: u64,
    queue: u32,
    interrupts: u32,
}

/// The registers as saved.
#[derive(Serialize, Deserialize)]
pub(crate) struct DeviceState {
    status: u32,
    device_half: u32,
    driver_half: u32,
    driver_features: u64,
    queue: u32,
    interrupts: u32,
    balloon: BalloonState,
}

impl Registers {
    fn new(memory_bytes: u64) -> Self {
        Self {
            balloon: Balloon::new(memory_bytes),
            status: 0,
            device_half: 0,
            driver_half: 0,
            driver_features: 0,
            queue: 0,
            interrupts: 0,
        }
    }

    /// Registers are read and written whole; the configuration in any way.
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        if offset >= CONFIG {
            return self.balloon.read_config(offset - CONFIG, data);
        }
        let value = match u32::try_from(offset) {
            Ok(offset) if data.len() == 4 => self.register(offset),
            _ => 0,
        };
        for (place, byte) in data.iter_mut().zip(value.to_le_bytes()) {
            *place = byte;
        }
    }

    fn register(&mut self, offset: u32) -> u32 {
        let queue = self.balloon.queue(self.queue);
        match offset {
            register::VIRTIO_MMIO_MAGIC_VALUE => MAGIC,
            register::VIRTIO_MMIO_VERSION => VERSION,
            register::VIRTIO_MMIO_DEVICE_ID => DEVICE_ID,
            register::VIRTIO_MMIO_VENDOR_ID => VENDOR,
            register::VIRTIO_MMIO_DEVICE_FEATURES => half(feature::OFFERED, self.device_half),
            register::VIRTIO_MMIO_QUEUE_NUM_MAX => queue.map_or(0, |q| q.max_size().into()),
            register::VIRTIO_MMIO_QUEUE_READY => queue.map_or(0, |q| q.ready().into()),
            register::VIRTIO_MMIO_INTERRUPT_STATUS => self.interrupts,
            register::VIRTIO_MMIO_STATUS => self.status,
            register::VIRTIO_MMIO_CONFIG_GENERATION => self.balloon.config_generation(),
            // There is no shared memory.
            register::VIRTIO_MMIO_SHM_LEN_LOW | register::VIRTIO_MMIO_SHM_LEN_HIGH => u32::MAX,
            _ => 0,
        }
    }

    /// Whether an interrupt is to be raised.
    fn write(&mut self, offset: u64, data: &[u8], ram: &GuestRam, view: &GuestView) -> bool {
        if offset >= CONFIG {
            self.balloon.write_config(offset - CONFIG, data);
            return false;
        }
        let (Ok(offset), Ok(value)) = (u32::try_from(offset), data.try_into()) else {
            return false;
        };
        let value = u32::from_le_bytes(value);
        let due = match offset {
            register::VIRTIO_MMIO_STATUS => self.set_status(value, ram, view),
            register::VIRTIO_MMIO_QUEUE_NOTIFY => {
                u16::try_from(value).ok().and_then(|queue| self.balloon.notify(queue, ram, view))
            }
            register::VIRTIO_MMIO_INTERRUPT_ACK => {
                self.interrupts &= !value;
                None
            }
            _ => {
                self.set(offset, value);
                None
            }
        };
        self.raise(due)
    }

    fn set(&mut self, offset: u32, value: u32) {
        match offset {
            register::VIRTIO_MMIO_DEVICE_FEATURES_SEL => self.device_half = value,
            register::VIRTIO_MMIO_DRIVER_FEATURES_SEL => self.driver_half = value,
            register::VIRTIO_MMIO_DRIVER_FEATURES
                if self.status & virtio_config::VIRTIO_CONFIG_S_FEATURES_OK == 0 =>
            {
                let shift = match self.driver_half {
                    0 => 0,
                    1 => 32,
                    _ => return,
                };
                let others = self.driver_features & !(u64::from(u32::MAX) << shift);
                self.driver_features = others | u64::from(value) << shift;
            }
            register::VIRTIO_MMIO_QUEUE_SEL => self.queue = value,
            _ => {
                if let Some(queue) = self.balloon.queue(self.queue) {
                    set_up(queue, offset, value);
                }
            }
        }
    }

    fn set_status(&mut self, status: u32, ram: &GuestRam, view: &GuestView) -> Option<Interrupt> {
        if status == 0 {
            self.balloon.reset();
            let balloon = std::mem::replace(&mut self.balloon, Balloon::new(0));
            *self = Self { balloon, ..Self::new(0) };
            return None;
        }
        let new = status & !self.status;
        self.status = status;
        if new & virtio_config::VIRTIO_CONFIG_S_FEATURES_OK != 0
            && !self.balloon.accept(self.driver_features)
        {
            self.status &= !virtio_config::VIRTIO_CONFIG_S_FEATURES_OK;
        }
        let ready =
            virtio_config::VIRTIO_CONFIG_S_FEATURES_OK | virtio_config::VIRTIO_CONFIG_S_DRIVER_OK;
        if new & virtio_config::VIRTIO_CONFIG_S_DRIVER_OK != 0 && self.status & ready == ready {
            return self.balloon.start(ram, view);
        }
        None
    }

    fn raise(&mut self, due: Option<Interrupt>) -> bool {
        self.interrupts |= due.map_or(0, Interrupt::bit);
        due.is_some()
    }

    fn save(&self) -> DeviceState {
        DeviceState {
            status: self.status,
            device_half: self.device_half,
            driver_half: self.driver_half,
            driver_features: self.driver_features,
            queue: self.queue,
            interrupts: self.interrupts,
            balloon: self.balloon.save(),
        }
    }

    fn restore(state: DeviceState, view: &GuestView) -> Result<(Self, bool), String> {
        let (balloon, due) = Balloon::restore(state.balloon, view).map_err(|e| e.to_string())?;
        let mut registers = Self {
            balloon,
            status: state.status,
            device_half: state.device_half,
            driver_half: state.driver_half,
            driver_features: state.driver_features,
            queue: state.queue,
            interrupts: state.interrupts,
        };
        let raise = registers.raise(due);
        Ok((registers, raise))
    }
}

/// A queue's size, addresses and readiness. What cannot be is left as it was; the queue is checked when used.
fn set_up(queue: &mut Queue, offset: u32, value: u32) {
    let low = |old: u64| GuestAddress(old >> 32 << 32 | u64::from(value));
    let high = |old: u64| GuestAddress(u64::from(value) << 32 | old & u64::from(u32::MAX));
    let (table, avail, used) = (queue.desc_table(), queue.avail_ring(), queue.used_ring());
    let _ = match offset {
        register::VIRTIO_MMIO_QUEUE_NUM => {
            u16::try_from(value).map_or(Ok(()), |size| queue.try_set_size(size))
        }
        register::VIRTIO_MMIO_QUEUE_READY => {
            queue.set_ready(value & 1 == 1);
            Ok(())
        }
        register::VIRTIO_MMIO_QUEUE_DESC_LOW => queue.try_set_desc_table_address(low(table)),
        register::VIRTIO_MMIO_QUEUE_DESC_HIGH => queue.try_set_desc_table_address(high(table)),
        register::VIRTIO_MMIO_QUEUE_AVAIL_LOW => queue.try_set_avail_ring_address(low(avail)),
        register::VIRTIO_MMIO_QUEUE_AVAIL_HIGH => queue.try_set_avail_ring_address(high(avail)),
        register::VIRTIO_MMIO_QUEUE_USED_LOW => queue.try_set_used_ring_address(low(used)),
        register::VIRTIO_MMIO_QUEUE_USED_HIGH => queue.try_set_used_ring_address(high(used)),
        _ => Ok(()),
    };
}

/// The half of `features` that is selected.
fn half(features: u64, which: u32) -> u32 {
    let bits = match which {
        0 => features & u64::from(u32::MAX),
        1 => features >> 32,
        _ => 0,
    };
    u32::try_from(bits).unwrap_or(0)
}

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
