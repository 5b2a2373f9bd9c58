//! A machine's memory with a balloon, and a driver that puts whatever it likes into the queues.
#![allow(dead_code, reason = "each test file uses its part")]

use ferry_balloon::{Balloon, Interrupt, QUEUES, feature};
use ferry_memory::{GuestView, Mapping};
use ferry_pages::{PAGE_BYTES, PageSet, Run};
use virtio_queue::QueueT;
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap, GuestRegionMmap};

pub(crate) const PAGE: u64 = PAGE_BYTES as u64;
/// Where memory is, with a hole.
pub(crate) const LOW: Run = Run::new(0, 4096);
pub(crate) const HIGH: Run = Run::new(0x8000, 1024);
/// Pages that tests give away; below them are queues and buffers.
pub(crate) const FIRST_FREE: u64 = 512;
/// Entries of each queue.
pub(crate) const SIZE: u16 = 16;

/// Buffers go here, one behind the other, and again from the beginning.
const BUFFERS: u64 = 64 * PAGE;
const BUFFERS_END: u64 = FIRST_FREE * PAGE;

pub(crate) const NEXT: u16 = 1;
pub(crate) const WRITE: u16 = 2;
pub(crate) const INDIRECT: u16 = 4;

/// A descriptor, as it lies in memory.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Desc {
    pub(crate) at: u64,
    pub(crate) bytes: u32,
    pub(crate) flags: u16,
    pub(crate) next: u16,
}

impl Desc {
    pub(crate) fn bytes(self) -> [u8; 16] {
        let mut out = [0; 16];
        out[..8].copy_from_slice(&self.at.to_le_bytes());
        out[8..12].copy_from_slice(&self.bytes.to_le_bytes());
        out[12..14].copy_from_slice(&self.flags.to_le_bytes());
        out[14..].copy_from_slice(&self.next.to_le_bytes());
        out
    }
}

pub(crate) struct Guest {
    pub(crate) balloon: Balloon,
    pub(crate) ram: GuestMemoryMmap,
    pub(crate) view: GuestView,
    available: [u16; QUEUES as usize],
    buffers: u64,
}

impl Guest {
    /// A machine whose driver accepted all that is offered but poison.
    pub(crate) fn new() -> Self {
        let mut guest = Self::unstarted(false);
        guest.start(feature::OFFERED & !feature::PAGE_POISON);
        guest
    }

    pub(crate) fn unstarted(huge_pages: bool) -> Self {
        let (mut ram, mut regions, mut mappings) = (vec![], vec![], vec![]);
        for run in [LOW, HIGH] {
            let mapping = Mapping::for_machine(run.pages, huge_pages).unwrap();
            let region = mapping.region(run.start, 0);
            let (host, bytes) = region.host_span();
            // SAFETY: the mapping, whole, which lives as long as the view beside it.
            let mapped = unsafe {
                MmapRegionBuilder::new(bytes)
                    .with_mmap_prot(3)
                    .with_mmap_flags(if huge_pages { 1 } else { 2 })
                    .with_raw_mmap_pointer(host.cast())
            };
            let at = GuestAddress(run.start * PAGE);
            ram.push(GuestRegionMmap::new(mapped.build().unwrap(), at).unwrap());
            regions.push(region);
            mappings.push(mapping);
        }
        // SAFETY: whole mappings that the view keeps; nobody holds references into them.
        let view = unsafe { GuestView::new(regions) }.unwrap().keeping(mappings);
        let bytes = (LOW.pages + HIGH.pages) * PAGE;
        let ram = GuestMemoryMmap::from_regions(ram).unwrap();
        let available = [0; QUEUES as usize];
        Self { balloon: Balloon::new(bytes), ram, view, available, buffers: BUFFERS }
    }

    pub(crate) fn start(&mut self, features: u64) -> Option<Interrupt> {
        self.set_up(features);
        self.balloon.start(&self.ram, &self.view)
    }

    /// All that comes before the driver is ready.
    pub(crate) fn set_up(&mut self, features: u64) {
        assert!(self.balloon.accept(features));
        for index in 0..QUEUES {
            let queue = self.balloon.queue(index.into()).unwrap();
            queue.try_set_size(SIZE).unwrap();
            queue.try_set_desc_table_address(GuestAddress(table(index))).unwrap();
            queue.try_set_avail_ring_address(GuestAddress(ring(index))).unwrap();
            queue.try_set_used_ring_address(GuestAddress(used_ring(index))).unwrap();
            queue.set_ready(true);
        }
    }

    /// Puts `bytes` into memory.
    pub(crate) fn buffer(&mut self, bytes: &[u8]) -> u64 {
        let length = (bytes.len() as u64).next_multiple_of(8);
        if self.buffers + length > BUFFERS_END {
            self.buffers = BUFFERS;
        }
        let at = self.buffers;
        self.buffers += length;
        self.ram.write_slice(bytes, GuestAddress(at)).unwrap();
        at
    }

    /// A buffer with the numbers of pages.
    pub(crate) fn list(&mut self, pages: impl IntoIterator<Item = u64>) -> Desc {
        let bytes: Vec<u8> =
            pages.into_iter().flat_map(|gfn| u32::try_from(gfn).unwrap().to_le_bytes()).collect();
        let at = self.buffer(&bytes);
        Desc { at, bytes: u32::try_from(bytes.len()).unwrap(), flags: 0, next: 0 }
    }

    /// Writes descriptors as they are, from entry `first` on.
    pub(crate) fn describe(&mut self, queue: u16, first: u16, descriptors: &[Desc]) {
        for (n, descriptor) in (u64::from(first)..).zip(descriptors) {
            self.ram.write_slice(&descriptor.bytes(), GuestAddress(table(queue) + n * 16)).unwrap();
        }
    }

    /// Makes the chain that begins at `head` available.
    pub(crate) fn offer(&mut self, queue: u16, head: u16) {
        let next = &mut self.available[usize::from(queue)];
        let at = ring(queue) + 4 + u64::from(*next % SIZE) * 2;
        self.ram.write_obj(head, GuestAddress(at)).unwrap();
        *next = next.wrapping_add(1);
        self.ram.write_obj(*next, GuestAddress(ring(queue) + 2)).unwrap();
    }

    /// Makes `buffers` available as one chain, and notifies.
    pub(crate) fn send(&mut self, queue: u16, buffers: &[Desc]) -> Option<Interrupt> {
        let last = buffers.len() - 1;
        let chained: Vec<Desc> = (0u16..)
            .zip(buffers)
            .map(|(n, d)| match usize::from(n) < last {
                true => Desc { flags: d.flags | NEXT, next: n + 1, ..*d },
                false => *d,
            })
            .collect();
        self.describe(queue, 0, &chained);
        self.offer(queue, 0);
        self.notify(queue)
    }

    pub(crate) fn notify(&mut self, queue: u16) -> Option<Interrupt> {
        self.balloon.notify(queue, &self.ram, &self.view)
    }

    /// How many chains came back.
    pub(crate) fn used(&self, queue: u16) -> u16 {
        self.ram.read_obj(GuestAddress(used_ring(queue) + 2)).unwrap()
    }

    /// Writes to every page of `run`.
    pub(crate) fn touch(&self, run: Run) {
        for gfn in run.start..run.end() {
            self.view.write(gfn, &gfn.to_le_bytes()).unwrap();
        }
    }

    /// Pages of `run` that hold data.
    pub(crate) fn resident(&self, run: Run) -> u64 {
        self.view.resident().unwrap().count_in(run)
    }

    pub(crate) fn ballooned(&self) -> &PageSet {
        self.balloon.ballooned()
    }

    pub(crate) fn last_trouble(&self) -> String {
        self.balloon.status().last_trouble.unwrap_or_default()
    }
}

/// A buffer that the device may write: free memory.
pub(crate) fn free(at: u64, bytes: u32) -> Desc {
    Desc { at, bytes, flags: WRITE, next: 0 }
}

pub(crate) fn table(queue: u16) -> u64 {
    (1 + u64::from(queue) * 3) * PAGE
}

pub(crate) fn ring(queue: u16) -> u64 {
    table(queue) + PAGE
}

pub(crate) fn used_ring(queue: u16) -> u64 {
    table(queue) + 2 * PAGE
}

pub(crate) fn set(runs: &[Run]) -> PageSet {
    runs.iter().copied().collect()
}
