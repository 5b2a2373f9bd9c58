//! A guest's driver that does anything: registers, rings, descriptors.

use arbitrary::{Result, Unstructured};
use ferry_balloon::{QUEUES, feature};
use ferry_pages::{PAGE_BYTES, PageSet, Run};
use ferry_refvmm::fuzzing::Device;

const MEMORY_BYTES: u64 = 4 << 20;
const PAGE: u64 = PAGE_BYTES as u64;
const SIZE: u16 = 16;

/// A guest that has started its balloon, and then does as the bytes say.
pub fn balloon(data: &[u8]) {
    let mut guest = Guest::new();
    let mut u = Unstructured::new(data);
    // An error is the end of the bytes.
    for _ in 0..200 {
        if u.is_empty() || guest.act(&mut u).is_err() {
            break;
        }
        guest.check();
    }
}

struct Guest {
    device: Device,
    /// Chains offered, by queue.
    offered: [u16; QUEUES as usize],
}

/// The parts of a queue: table, ring of what is offered, ring of what came back.
fn parts(queue: u16) -> [u64; 3] {
    [0, 1, 2].map(|part| (1 + u64::from(queue) * 3 + part) * PAGE)
}

impl Guest {
    fn new() -> Self {
        let device = Device::new(MEMORY_BYTES).expect("memory");
        let mut guest = Self { device, offered: [0; QUEUES as usize] };
        guest.start(feature::OFFERED & !feature::PAGE_POISON);
        guest
    }

    fn set(&mut self, register: u64, value: u64) {
        let value = u32::try_from(value & u64::from(u32::MAX)).unwrap_or(0);
        self.device.write(register, &value.to_le_bytes());
    }

    /// As a driver does it (virtio 1.2, section 3.1.1).
    fn start(&mut self, features: u64) {
        for status in [0, 1, 3] {
            self.set(0x70, status);
        }
        for half in [0, 1] {
            self.set(0x24, half);
            self.set(0x20, features >> (32 * half));
        }
        self.set(0x70, 11);
        for queue in 0..QUEUES {
            self.set(0x30, queue.into());
            self.set(0x38, SIZE.into());
            for (register, at) in [0x80, 0x90, 0xa0].into_iter().zip(parts(queue)) {
                self.set(register, at);
                self.set(register + 4, at >> 32);
            }
            self.set(0x44, 1);
        }
        self.set(0x70, 15);
        self.offered = [0; QUEUES as usize];
    }

    fn act(&mut self, u: &mut Unstructured<'_>) -> Result<()> {
        let queue = u.int_in_range(0..=QUEUES - 1)?;
        match u.int_in_range(0..=13)? {
            0..=2 => {
                let entry = u.int_in_range(0..=u64::from(SIZE))?;
                let (at, bytes) = (address(u)?, length(u)?);
                let (flags, next) = (u.int_in_range(0..=7u16)?, u.int_in_range(0..=SIZE)?);
                let mut descriptor = at.to_le_bytes().to_vec();
                descriptor.extend(bytes.to_le_bytes());
                descriptor.extend(flags.to_le_bytes());
                descriptor.extend(next.to_le_bytes());
                self.device.poke(parts(queue)[0] + entry * 16, &descriptor);
            }
            3..=5 => {
                let head = u.int_in_range(0..=SIZE)?;
                let offered = &mut self.offered[usize::from(queue)];
                let (place, ring) = (u64::from(*offered % SIZE), parts(queue)[1]);
                *offered = offered.wrapping_add(1);
                self.device.poke(ring + 4 + place * 2, &head.to_le_bytes());
                self.device.poke(ring + 2, &offered.to_le_bytes());
                self.set(0x50, queue.into());
            }
            6 => {
                // A list of pages, or anything else.
                let (at, count) = (address(u)?, u.int_in_range(0..=24)?);
                let all: Vec<u8> = (0..count)
                    .map(|_| {
                        Ok(if u.ratio(1, 8)? { u.arbitrary()? } else { u.int_in_range(0..=1100)? })
                    })
                    .collect::<Result<Vec<u32>>>()?
                    .into_iter()
                    .flat_map(u32::to_le_bytes)
                    .collect();
                self.device.poke(at, &all);
            }
            7 => {
                let bytes = u.int_in_range(0..=8)?;
                self.device.write(u.int_in_range(0..=0x120)?, u.bytes(bytes)?);
            }
            8 => {
                let mut data = vec![0xee; u.int_in_range(0..=9)?];
                self.device.read(u.arbitrary()?, &mut data);
            }
            9 => self.start(if u.ratio(1, 2)? { u.arbitrary()? } else { feature::OFFERED }),
            10 => drop(self.device.balloon().set_target(u.int_in_range(0..=MEMORY_BYTES + PAGE)?)),
            11 => drop(self.device.balloon().hint_begin()),
            12 => drop(self.device.balloon().hint_end()),
            _ => {
                self.device.ask_statistics();
                let before = self.device.balloon().ballooned().clone();
                let saved = self.device.save().expect("it is small");
                self.device.restore(&saved).expect("our own");
                assert_eq!(*self.device.balloon().ballooned(), before);
            }
        }
        Ok(())
    }

    fn check(&mut self) {
        let all: PageSet = [Run::new(0, MEMORY_BYTES / PAGE)].into_iter().collect();
        let balloon = self.device.balloon();
        let mut outside = balloon.ballooned().clone();
        balloon.take_hints(&mut outside);
        outside.subtract(&all);
        assert!(outside.is_empty(), "{outside:?}");
        let status = balloon.status();
        assert!(status.ballooned_bytes <= status.memory_bytes, "{status:?}");
        assert_eq!(
            (status.troubles == 0, status.memory_bytes),
            (status.last_trouble.is_none(), MEMORY_BYTES)
        );
    }
}

/// An address that is often near something.
fn address(u: &mut Unstructured<'_>) -> Result<u64> {
    Ok(match u.int_in_range(0..=4)? {
        0..=1 => u.int_in_range(0..=24u64)? * PAGE + u.int_in_range(0..=63u64)? * 8,
        2 => u.int_in_range(0..=MEMORY_BYTES / PAGE + 8)? * PAGE,
        3 => MEMORY_BYTES - 32 + u.int_in_range(0..=63u64)?,
        _ => u.arbitrary()?,
    })
}

fn length(u: &mut Unstructured<'_>) -> Result<u32> {
    Ok(match u.int_in_range(0..=4)? {
        0..=1 => u.int_in_range(0..=24u32)? * 4,
        2 => u.int_in_range(0..=16u32)? * 4096,
        3 => u.int_in_range(0..=64u32)?,
        _ => u.arbitrary()?,
    })
}
