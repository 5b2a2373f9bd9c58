//! A virtio device behind memory-mapped registers (virtio 1.2, section 4.2.2), and its queues: one buffer in
//! each at a time, and no interrupts. Each access to a register leaves the guest, which costs some 50 µs.

use core::cell::UnsafeCell;
use core::sync::atomic::{Ordering::SeqCst, fence};

/// Where the device is, if there is one.
pub(crate) const ADDRESS: u64 = 0xd000_0000;
const PAGE_BYTES: usize = 4096;

const MAGIC: u64 = 0x00;
const VERSION: u64 = 0x04;
const DEVICE_ID: u64 = 0x08;
const DEVICE_FEATURES: u64 = 0x10;
const DEVICE_FEATURES_SELECT: u64 = 0x14;
const DRIVER_FEATURES: u64 = 0x20;
const DRIVER_FEATURES_SELECT: u64 = 0x24;
const QUEUE_SELECT: u64 = 0x30;
const QUEUE_SIZE_MOST: u64 = 0x34;
const QUEUE_SIZE: u64 = 0x38;
const QUEUE_READY: u64 = 0x44;
const QUEUE_NOTIFY: u64 = 0x50;
const STATUS: u64 = 0x70;
/// Addresses of descriptors, available ring and used ring.
const QUEUE_PARTS: [u64; 3] = [0x80, 0x90, 0xa0];
const CONFIG: u64 = 0x100;

const ACKNOWLEDGE: u32 = 1;
const DRIVER: u32 = 2;
const DRIVER_OK: u32 = 4;
const FEATURES_OK: u32 = 8;
const FAILED: u32 = 128;
const VERSION_1: u64 = 1 << 32;
const NO_INTERRUPT: u16 = 1;

/// Entries of a queue. Only the first descriptor is used.
const ENTRIES: u16 = 2;
/// Where the parts of a queue lie in its page, in bytes.
const DESCRIPTORS: usize = 0;
const AVAILABLE: usize = 64;
const USED: usize = 128;

/// A page that is shared with the device.
#[repr(C, align(4096))]
pub(crate) struct Page(UnsafeCell<[u8; PAGE_BYTES]>);

// SAFETY: it is reached by raw pointers, volatile, and by vCPU 0 only.
unsafe impl Sync for Page {}

impl Page {
    pub(crate) const fn new() -> Self {
        Self(UnsafeCell::new([0; PAGE_BYTES]))
    }

    /// Its guest-physical address, which is its address.
    fn address(&self) -> u64 {
        self.0.get() as u64
    }

    fn at<T>(&self, index: usize) -> *mut T {
        self.0.get().cast::<T>().wrapping_add(index % (PAGE_BYTES / size_of::<T>()))
    }

    /// Makes `value` the page's number `index`, counted in values of its size.
    pub(crate) fn put<T>(&self, index: usize, value: T) {
        // SAFETY: inside the page, and aligned as the page is.
        unsafe { self.at::<T>(index).write_volatile(value) }
    }

    fn take<T: Copy>(&self, index: usize) -> T {
        // SAFETY: as in `put`; only integers are asked for, and every value of these is good.
        unsafe { self.at::<T>(index).read_volatile() }
    }
}

fn read(register: u64) -> u32 {
    // SAFETY: the first 4 GiB are mapped, and no memory of this program lies there: a register, or nothing.
    unsafe { ((ADDRESS + register) as *const u32).read_volatile() }
}

fn write(register: u64, value: u32) {
    // SAFETY: as in `read`.
    unsafe { ((ADDRESS + register) as *mut u32).write_volatile(value) }
}

/// The device, found and agreed with.
pub(crate) struct Device {
    features: u64,
}

impl Device {
    /// Looks for a device of kind `id`, and takes those of its features that are in `wanted`.
    pub(crate) fn probe(id: u32, wanted: u64) -> Option<Self> {
        if [read(MAGIC), read(VERSION), read(DEVICE_ID)] != [u32::from_le_bytes(*b"virt"), 2, id] {
            return None;
        }
        write(STATUS, 0);
        write(STATUS, ACKNOWLEDGE);
        write(STATUS, ACKNOWLEDGE | DRIVER);
        let half = |select| {
            write(DEVICE_FEATURES_SELECT, select);
            u64::from(read(DEVICE_FEATURES))
        };
        let features = (half(0) | half(1) << 32) & (wanted | VERSION_1);
        for (select, half) in [(0, features), (1, features >> 32)] {
            write(DRIVER_FEATURES_SELECT, select);
            #[expect(clippy::cast_possible_truncation, reason = "one half at a time")]
            write(DRIVER_FEATURES, half as u32);
        }
        write(STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK);
        if features & VERSION_1 == 0 || read(STATUS) & FEATURES_OK == 0 {
            write(STATUS, FAILED);
            return None;
        }
        Some(Self { features })
    }

    /// Whether all of `features` were taken.
    pub(crate) fn has(&self, features: u64) -> bool {
        self.features & features == features
    }

    /// Sets queue `index` up in `page`, which is zero; none if the device has not got it.
    pub(crate) fn queue(&self, index: u32, page: &'static Page) -> Option<Queue> {
        write(QUEUE_SELECT, index);
        if read(QUEUE_SIZE_MOST) < ENTRIES.into() {
            write(STATUS, FAILED);
            return None;
        }
        page.put(AVAILABLE / 2, NO_INTERRUPT);
        write(QUEUE_SIZE, ENTRIES.into());
        for (register, part) in QUEUE_PARTS.into_iter().zip([DESCRIPTORS, AVAILABLE, USED]) {
            let address = page.address() + part as u64;
            #[expect(clippy::cast_possible_truncation, reason = "one half at a time")]
            write(register, address as u32);
            write(register + 4, (address >> 32) as u32);
        }
        write(QUEUE_READY, 1);
        Some(Queue { index, page, sent: 0 })
    }

    /// All queues are set up: the device may begin.
    pub(crate) fn begin(&self) {
        write(STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK);
    }

    /// Word `index` of the device's configuration.
    pub(crate) fn config(&self, index: u64) -> u32 {
        read(CONFIG + 4 * index)
    }

    /// Writes word `index` of the device's configuration.
    pub(crate) fn set_config(&self, index: u64, value: u32) {
        write(CONFIG + 4 * index, value);
    }
}

/// A queue with one buffer at a time.
pub(crate) struct Queue {
    index: u32,
    page: &'static Page,
    sent: u16,
}

impl Queue {
    /// Gives the device the first `bytes` bytes of `buffer` to read. Only when it is [done](Self::done)
    /// with the last.
    pub(crate) fn send(&mut self, buffer: &'static Page, bytes: usize) {
        let page = self.page;
        page.put(DESCRIPTORS / 8, buffer.address());
        page.put(DESCRIPTORS / 8 + 1, bytes as u64);
        page.put(AVAILABLE / 2 + 2 + usize::from(self.sent % ENTRIES), 0_u16);
        fence(SeqCst);
        self.sent = self.sent.wrapping_add(1);
        page.put(AVAILABLE / 2 + 1, self.sent);
        fence(SeqCst);
        write(QUEUE_NOTIFY, self.index);
    }

    /// Whether the device is done with all that it was given.
    pub(crate) fn done(&self) -> bool {
        let done = self.page.take::<u16>(USED / 2 + 1) == self.sent;
        fence(SeqCst);
        done
    }
}
