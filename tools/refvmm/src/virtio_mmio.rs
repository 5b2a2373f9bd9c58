//! Virtio over memory-mapped registers (virtio 1.2, section 4.2), with a balloon behind them.

use ferry_balloon::{Balloon, BalloonState, DEVICE_ID, Interrupt, feature};
use ferry_memory::GuestView;
use serde::{Deserialize, Serialize};
use virtio_bindings::{virtio_config, virtio_mmio as register};
use virtio_queue::{Queue, QueueT};
use vm_memory::GuestAddress;

use crate::memory::GuestRam;

const MAGIC: u32 = u32::from_le_bytes(*b"virt");
const VENDOR: u32 = u32::from_le_bytes(*b"FERY");
const VERSION: u32 = 2;
const CONFIG: u64 = register::VIRTIO_MMIO_CONFIG as u64;

/// The registers, and the device behind them.
pub(crate) struct Registers {
    pub(crate) balloon: Balloon,
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
    pub(crate) fn new(memory_bytes: u64) -> Self {
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
    pub(crate) fn read(&mut self, offset: u64, data: &mut [u8]) {
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
    pub(crate) fn write(
        &mut self,
        offset: u64,
        data: &[u8],
        ram: &GuestRam,
        view: &GuestView,
    ) -> bool {
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

    pub(crate) fn raise(&mut self, due: Option<Interrupt>) -> bool {
        self.interrupts |= due.map_or(0, Interrupt::bit);
        due.is_some()
    }

    pub(crate) fn save(&self) -> DeviceState {
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

    pub(crate) fn restore(state: DeviceState, view: &GuestView) -> Result<(Self, bool), String> {
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

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use ferry_balloon::{INFLATE, QUEUE_SIZE};
    use ferry_dirtylog::{DirtySource, SoftwareBitmap};
    use ferry_pages::{PageSet, Run};
    use vm_memory::Bytes;

    use super::*;
    use crate::memory;

    const MACHINE_BYTES: u64 = 8 << 20;
    /// Frames of the inflate queue's parts, of a list of pages, and of the page in it.
    const TABLE: u64 = 16;
    const AVAIL: u64 = 17;
    const USED: u64 = 18;
    const LIST: u64 = 19;
    const GIVEN: u64 = 64;

    struct Machine {
        registers: Registers,
        ram: GuestRam,
        view: GuestView,
    }

    impl Machine {
        fn new() -> Self {
            let (ram, view) = memory::map(MACHINE_BYTES, false).unwrap();
            Self { registers: Registers::new(MACHINE_BYTES), ram, view }
        }

        fn set(&mut self, offset: u64, value: u32) -> bool {
            self.registers.write(offset, &value.to_le_bytes(), &self.ram, &self.view)
        }

        fn register(&mut self, offset: u64) -> u32 {
            let mut bytes = [0xee; 4];
            self.registers.read(offset, &mut bytes);
            u32::from_le_bytes(bytes)
        }

        /// As a driver does it (virtio 1.2, section 3.1.1), with all features.
        fn start(&mut self) {
            for status in [0, 1, 3] {
                self.set(0x70, status);
            }
            for half in [0, 1] {
                self.set(0x14, half);
                let offered = self.register(0x10);
                self.set(0x24, half);
                self.set(0x20, offered);
            }
            self.set(0x70, 11);
            assert_eq!(self.register(0x70), 11, "features are accepted");
            self.set(0x30, INFLATE.into());
            assert_eq!(self.register(0x34), u32::from(QUEUE_SIZE));
            for (offset, value) in [(0x38, 16), (0x80, TABLE), (0x90, AVAIL), (0xa0, USED)] {
                let value = if offset == 0x38 { value } else { value * 4096 };
                self.set(offset, u32::try_from(value).unwrap());
            }
            self.set(0x44, 1);
            assert_eq!(self.register(0x44), 1);
            self.set(0x70, 15);
        }

        /// Puts page `GIVEN` into the balloon as request number `n`; whether there is an interrupt.
        fn inflate(&mut self, n: u16) -> bool {
            let at = |frame: u64| GuestAddress(frame * 4096);
            let given = u32::try_from(GIVEN).unwrap();
            self.ram.write_obj(given, at(LIST)).unwrap();
            self.ram.write_obj(LIST * 4096, at(TABLE)).unwrap();
            self.ram.write_obj(4u32, GuestAddress(TABLE * 4096 + 8)).unwrap();
            self.ram.write_obj(n, GuestAddress(AVAIL * 4096 + 2)).unwrap();
            self.set(0x50, INFLATE.into())
        }

        fn used(&self) -> u16 {
            self.ram.read_obj(GuestAddress(USED * 4096 + 2)).unwrap()
        }
    }

    #[test]
    fn a_driver_finds_a_balloon_and_gives_a_page_back() {
        let mut m = Machine::new();
        let found = [0, 4, 8].map(|offset| m.register(offset));
        assert_eq!(found, [0x7472_6976, 2, 5]);
        m.start();
        m.view.write(GIVEN, &[1]).unwrap();
        assert!(m.inflate(1), "an interrupt");
        assert!(!m.view.resident().unwrap().contains(GIVEN));
        assert_eq!((m.used(), m.register(0x60)), (1, 1));
        m.set(0x64, 1);
        assert_eq!(m.register(0x60), 0);

        let due = m.registers.balloon.set_target(MACHINE_BYTES - (5 << 12)).unwrap();
        assert!(m.registers.raise(Some(due)));
        assert_eq!((m.register(0x60), m.register(0x100)), (2, 5));

        m.set(0x70, 0);
        assert_eq!((m.register(0x70), m.register(0x60), m.register(0x44)), (0, 0, 0));
        assert!(m.registers.balloon.ballooned().is_empty());
        assert!(!m.inflate(2), "there is no driver now");
    }

    #[test]
    fn what_no_driver_does_changes_nothing() {
        let mut m = Machine::new();
        // Features that are not offered are not accepted, and there is no driver without features.
        m.set(0x24, 0);
        m.set(0x20, u32::MAX);
        m.set(0x70, 8);
        assert_eq!(m.register(0x70) & 8, 0);
        m.set(0x70, 4);
        assert!(!m.registers.balloon.status().driver);

        m.start();
        let before = serde_json::to_string(&m.registers.save()).unwrap();
        // The features are settled; sizes, queues and addresses that cannot be; registers that are not whole.
        for (offset, value) in
            [(0x20, 0), (0x38, 17), (0x38, 0), (0x80, 8), (0x90, 1), (0xa0, 2), (0xf8, 1)]
        {
            assert!(!m.set(offset, value));
        }
        for bytes in [&[][..], &[1], &[0; 8]] {
            let (ram, view) = (m.ram.clone(), m.view.clone());
            assert!(!m.registers.write(0x70, bytes, &ram, &view));
        }
        let after = serde_json::to_string(&m.registers.save()).unwrap();
        assert_eq!(before, after);
        let mut half = [0xee; 2];
        m.registers.read(0, &mut half);
        assert_eq!(half, [0, 0]);
        for queue in [5, u32::MAX] {
            m.set(0x30, queue);
            assert_eq!((m.register(0x34), m.register(0x44)), (0, 0));
            assert!(!m.set(0x50, queue));
        }
    }

    #[test]
    fn what_the_device_writes_is_found_by_the_dirty_log() {
        let mut m = Machine::new();
        m.start();
        let mut devices = Arc::new(SoftwareBitmap::of_memory(&m.ram));
        devices.start().unwrap();
        // Written as a vCPU would: not through the device's view of memory.
        for (frame, bytes) in [
            (LIST, u32::try_from(GIVEN).unwrap().to_le_bytes().to_vec()),
            (TABLE, [(LIST * 4096).to_le_bytes().to_vec(), vec![4, 0, 0, 0]].concat()),
            (AVAIL, vec![0, 0, 1, 0]),
        ] {
            m.view.write(frame, &bytes).unwrap();
        }
        let mut found = PageSet::new();
        devices.collect(&mut found).unwrap();
        assert!(found.is_empty());
        assert!(m.set(0x50, INFLATE.into()));
        assert_eq!(m.used(), 1);
        devices.collect(&mut found).unwrap();
        assert_eq!(found, [Run::new(USED, 1)].into_iter().collect());
    }

    #[test]
    fn registers_and_queues_go_on_where_they_were_saved() {
        let mut m = Machine::new();
        m.start();
        assert!(m.inflate(1));
        let saved = serde_json::to_string(&m.registers.save()).unwrap();
        let state = serde_json::from_str(&saved).unwrap();
        let (registers, raise) = Registers::restore(state, &m.view).unwrap();
        assert!(!raise, "nothing new to tell");
        m.registers = registers;
        assert_eq!((m.register(0x70), m.register(0x60), m.used()), (15, 1, 1));
        assert!(m.inflate(2));
        assert_eq!(m.used(), 2);
    }
}
