//! A machine of plain memory and threads.

#![expect(unsafe_code, reason = "threads that write to memory which is copied meanwhile")]

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use ferry_dirtylog::{DirtySource, Region, RegionBitmap, SoftwareBitmap, UffdWriteProtect};
use ferry_memory::{GuestView, Mapping};
use ferry_pages::{PAGE_BYTES, Run};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

use crate::huge_pages::HugePages;
use crate::suite::{EXTENTS, Kind, Machine};

const WRITERS: u64 = 2;

/// How a write reaches memory, and how it is found.
#[derive(Clone)]
enum Writes {
    /// Through the mapping; the kernel notes it.
    Noted,
    /// Through the mapping, then marked.
    Marked(Arc<SoftwareBitmap>),
    /// Through vm-memory, which marks.
    VmMemory(Arc<GuestMemoryMmap<RegionBitmap>>),
}

pub(crate) struct PlainMachine {
    view: GuestView,
    writes: Writes,
    _mappings: Vec<Mapping>,
    _host: Option<HugePages>,
}

impl PlainMachine {
    pub(crate) fn write_protected(kind: Kind) -> Option<Self> {
        if let Err(error) = UffdWriteProtect::new(Vec::new()) {
            println!("SKIP: {error}: {}", error.source);
            return None;
        }
        Self::mapped(kind, Writes::Noted)
    }

    pub(crate) fn marked() -> Option<Self> {
        Self::mapped(Kind::Private, Writes::Marked(Arc::new(SoftwareBitmap::new(EXTENTS))))
    }

    pub(crate) fn vm_memory() -> Option<Self> {
        let ranges = EXTENTS.map(|e| {
            let bytes = usize::try_from(e.pages).unwrap() * PAGE_BYTES;
            (GuestAddress(e.start * PAGE_BYTES as u64), bytes)
        });
        let memory = GuestMemoryMmap::<RegionBitmap>::from_ranges(&ranges).unwrap();
        let regions = memory.iter().zip(EXTENTS).map(|(region, run)| Region {
            run,
            host: region.get_host_address(vm_memory::MemoryRegionAddress(0)).unwrap() as usize,
            slot: 0,
            backing: None,
            unit: 1,
        });
        // SAFETY: the machine keeps the memory as long as the view.
        let view = unsafe { GuestView::new(regions.collect()) }.unwrap();
        let writes = Writes::VmMemory(Arc::new(memory));
        Some(Self { view, writes, _mappings: Vec::new(), _host: None })
    }

    fn mapped(kind: Kind, writes: Writes) -> Option<Self> {
        let (mappings, host) = kind.map()?;
        let regions = mappings.iter().zip(EXTENTS).map(|(m, e)| m.region(e.start, 0)).collect();
        // SAFETY: the machine keeps the mappings as long as the view, and writes by atomics only.
        let view = unsafe { GuestView::new(regions) }.unwrap();
        Some(Self { view, writes, _mappings: mappings, _host: host })
    }
}

/// Counts the writer's word of the page up.
fn touch(regions: &[Region], writes: &Writes, gfn: u64, writer: u64) {
    if let Writes::VmMemory(memory) = writes {
        let address = GuestAddress(gfn * PAGE_BYTES as u64 + writer * 8);
        let count: u64 = memory.load(address, Ordering::Relaxed).unwrap();
        memory.store(count + 1, address, Ordering::Relaxed).unwrap();
        return;
    }
    let region = regions.iter().find(|r| r.overlap(Run::new(gfn, 1)).is_some()).unwrap();
    let offset = usize::try_from(gfn - region.run.start).unwrap() * PAGE_BYTES;
    let word = region.host + offset + usize::try_from(writer).unwrap() * 8;
    // SAFETY: an aligned word in a mapping that the machine keeps; all its writers use atomics.
    let word = unsafe { AtomicU64::from_ptr(std::ptr::with_exposed_provenance_mut(word)) };
    word.fetch_add(1, Ordering::Relaxed);
    if let Writes::Marked(bitmap) = writes {
        bitmap.mark(gfn);
    }
}

impl Machine for PlainMachine {
    fn regions(&self) -> Vec<Region> {
        self.view.regions().to_vec()
    }

    fn view(&self) -> &GuestView {
        &self.view
    }

    fn source(&mut self) -> Box<dyn DirtySource> {
        match &self.writes {
            Writes::Noted => Box::new(UffdWriteProtect::new(self.regions()).unwrap()),
            Writes::Marked(bitmap) => Box::new(Arc::clone(bitmap)),
            Writes::VmMemory(memory) => {
                Box::new(Arc::new(SoftwareBitmap::of_memory(memory.as_ref())))
            }
        }
    }

    fn write(&mut self, runs: &[Run]) {
        for gfn in runs.iter().flat_map(|r| r.start..r.end()) {
            touch(self.view.regions(), &self.writes, gfn, gfn % WRITERS);
        }
    }

    fn write_during(&mut self, runs: &[Run], observe: &mut dyn FnMut()) {
        std::thread::scope(|scope| {
            let writers: Vec<_> = (0..WRITERS)
                .map(|writer| {
                    let (view, writes) = (&self.view, &self.writes);
                    scope.spawn(move || {
                        for gfn in runs.iter().flat_map(|r| r.start..r.end()) {
                            touch(view.regions(), writes, gfn, writer);
                            // A pass must last for many harvests.
                            (0..50).for_each(|_| std::hint::spin_loop());
                        }
                    })
                })
                .collect();
            while !writers.iter().all(|w| w.is_finished()) {
                observe();
            }
        });
    }
}
