//! A machine of two vCPUs that run one loop: add 1 to a word of each page of a run.
//!
//! There is no kernel in it. Each vCPU is put straight into 64-bit ring 3, or ring 0 (which some KVMs emulate,
//! and then look for a full dirty ring only when the loop has ended), with memory mapped one to one;
//! the host sets its registers for a run and enters it, the loop ends with an `out`, which leaves.
//! Code and page tables lie in a memory slot of their own that is never tracked.

#![expect(unsafe_code, reason = "memory slots of a KVM machine")]

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use ferry_dirtylog::{DirtySource, KvmBitmap, KvmRings, Region, UffdWriteProtect};
use ferry_memory::{GuestView, Mapping};
use ferry_pages::{PAGE_BYTES, Run};
use kvm_bindings::{KVM_EXIT_DIRTY_RING_FULL, kvm_regs, kvm_segment, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};

use crate::huge_pages::HugePages;
use crate::suite::{EXTENTS, Kind, Machine};

/// `l: add qword [rdi], 1 · add rdi, 4096 · dec rcx · jnz l · out 0x10, al · jmp $`
const CODE: [u8; 20] = [
    0x48, 0x83, 0x07, 0x01, 0x48, 0x81, 0xc7, 0x00, 0x10, 0x00, 0x00, 0x48, 0xff, 0xc9, 0x75, 0xf0,
    0xe6, 0x10, 0xeb, 0xfe,
];
/// Frames of the code and of the page tables: root, directory pointers, directory.
const CODE_GFN: u64 = 1;
const TABLES: [u64; 3] = [2, 3, 4];
const PAGE: u64 = PAGE_BYTES as u64;

/// Whether the machine has dirty rings.
#[derive(Clone, Copy)]
pub(crate) enum Rings {
    None,
    Of(u32),
}

pub(crate) struct KvmMachine {
    vcpus: Vec<VcpuFd>,
    vm: Arc<VmFd>,
    rings: Option<Arc<KvmRings>>,
    full: AtomicUsize,
    view: GuestView,
    make: fn(&Self) -> Box<dyn DirtySource>,
    _mappings: Vec<Mapping>,
    _host: Option<HugePages>,
}

impl KvmMachine {
    pub(crate) fn new(
        rings: Rings,
        kind: Kind,
        make: fn(&Self) -> Box<dyn DirtySource>,
    ) -> Option<Self> {
        let kvm = match Kvm::new() {
            Ok(kvm) => kvm,
            Err(error) => {
                println!("SKIP: /dev/kvm cannot be opened: {error}");
                return None;
            }
        };
        let vm = Arc::new(kvm.create_vm().unwrap());
        let rings = match rings {
            Rings::None => None,
            Rings::Of(entries) => match KvmRings::enable(&vm, entries) {
                Ok(rings) => Some(Arc::new(rings)),
                Err(error) if error.source.kind() == std::io::ErrorKind::Unsupported => {
                    println!("SKIP: {error}");
                    return None;
                }
                Err(error) => panic!("{error}: {}", error.source),
            },
        };
        let boot = Mapping::anonymous(16).unwrap();
        let (mut mappings, host) = kind.map()?;
        let regions: Vec<Region> = (1..)
            .zip(mappings.iter().zip(EXTENTS))
            .map(|(slot, (m, e))| Region { run: e, ..m.region(e.start, slot) })
            .collect();
        let boot_region = boot.region(0, 0);
        for region in regions.iter().chain([&boot_region]) {
            let slot = kvm_userspace_memory_region {
                slot: region.slot,
                flags: 0,
                guest_phys_addr: region.run.start * PAGE,
                memory_size: region.run.pages * PAGE,
                userspace_addr: region.host as u64,
            };
            // SAFETY: the machine keeps the mapping longer than the VM (fields drop in order).
            unsafe { vm.set_user_memory_region(slot) }.unwrap();
        }
        // SAFETY: the machine keeps the mappings as long as the views.
        let (view, boot_view) = unsafe {
            (GuestView::new(regions).unwrap(), GuestView::new(vec![boot_region]).unwrap())
        };
        mappings.push(boot);
        fill_boot(&boot_view);
        let vcpus = (0..2).map(|id| vcpu(&vm, id, rings.as_deref())).collect();
        let full = AtomicUsize::new(0);
        Some(Self { vcpus, vm, rings, full, view, make, _mappings: mappings, _host: host })
    }

    /// Has the loop run in ring 0 or ring 3 from here on.
    pub(crate) fn set_ring(&self, ring: u8) {
        for vcpu in &self.vcpus {
            let mut sregs = vcpu.get_sregs().unwrap();
            let selector = |entry: u16| entry << 3 | u16::from(ring);
            let data = kvm_segment { selector: selector(3), dpl: ring, ..sregs.ds };
            sregs.cs = kvm_segment { selector: selector(4), dpl: ring, ..sregs.cs };
            (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
            vcpu.set_sregs(&sregs).unwrap();
        }
    }

    pub(crate) fn bitmap(&self) -> Box<dyn DirtySource> {
        Box::new(KvmBitmap::new(Arc::clone(&self.vm), self.regions()).unwrap())
    }

    pub(crate) fn plain_bitmap(&self) -> Box<dyn DirtySource> {
        Box::new(KvmBitmap::without_manual_protect(Arc::clone(&self.vm), self.regions()).unwrap())
    }

    pub(crate) fn ring(&self) -> Box<dyn DirtySource> {
        Box::new(self.rings.as_ref().unwrap().source(self.regions()))
    }

    pub(crate) fn write_protected(&self) -> Box<dyn DirtySource> {
        Box::new(UffdWriteProtect::new(self.regions()).unwrap())
    }

    /// How often a vCPU stopped because a ring was full.
    pub(crate) fn rings_were_full(&self) -> usize {
        self.full.load(Ordering::Relaxed)
    }
}

/// Puts in the loop and the tables that map 1 GiB one to one, for ring 3, accessed and dirty already.
fn fill_boot(boot: &GuestView) {
    let entry = |address: u64, flags: u64| (address | flags | 0x67).to_le_bytes();
    boot.write(CODE_GFN, &CODE).unwrap();
    boot.write(TABLES[0], &entry(TABLES[1] * PAGE, 0)).unwrap();
    boot.write(TABLES[1], &entry(TABLES[2] * PAGE, 0)).unwrap();
    let large: Vec<u8> = (0..512).flat_map(|i| entry(i << 21, 0x80)).collect();
    boot.write(TABLES[2], &large).unwrap();
}

fn vcpu(vm: &VmFd, id: u64, rings: Option<&KvmRings>) -> VcpuFd {
    let vcpu = vm.create_vcpu(id).unwrap();
    if let Some(rings) = rings {
        rings.add_vcpu(&vcpu).unwrap();
    }
    let mut sregs = vcpu.get_sregs().unwrap();
    let data = kvm_segment {
        base: 0,
        limit: 0xffff_ffff,
        selector: 0x1b,
        type_: 3,
        present: 1,
        dpl: 3,
        db: 1,
        s: 1,
        l: 0,
        g: 1,
        ..Default::default()
    };
    sregs.cs = kvm_segment { selector: 0x23, type_: 11, db: 0, l: 1, ..data };
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    sregs.cr3 = TABLES[0] * PAGE;
    sregs.cr4 |= 1 << 5; // physical address extension
    sregs.cr0 |= 1 << 31 | 1; // paging, protection
    sregs.efer |= 1 << 10 | 1 << 8; // long mode, active and enabled
    vcpu.set_sregs(&sregs).unwrap();
    vcpu
}

/// Has `vcpu` add 1 to a word of each page of `run`.
fn touch(vcpu: &mut VcpuFd, run: Run, word: u64, rings: Option<&KvmRings>, full: &AtomicUsize) {
    let regs = kvm_regs {
        rip: CODE_GFN * PAGE,
        rdi: run.start * PAGE + word * 8,
        rcx: run.pages,
        rflags: 0x3002, // ring 3 may do I/O
        ..Default::default()
    };
    vcpu.set_regs(&regs).unwrap();
    // A ring that stays full whatever is done about it must fail the test, not hang it.
    for _ in 0..100_000 {
        match vcpu.run() {
            Ok(VcpuExit::IoOut(0x10, _)) => return,
            Ok(VcpuExit::Unsupported(KVM_EXIT_DIRTY_RING_FULL)) => {
                full.fetch_add(1, Ordering::Relaxed);
                rings.unwrap().on_full(vcpu).unwrap();
            }
            Ok(exit) => panic!("vCPU left with {exit:?}"),
            Err(error) if error.errno() == libc::EINTR || error.errno() == libc::EAGAIN => {}
            Err(error) => panic!("vCPU: {error}"),
        }
    }
    panic!("the vCPU does not get through {run:?}");
}

impl Machine for KvmMachine {
    fn regions(&self) -> Vec<Region> {
        self.view.regions().to_vec()
    }

    fn view(&self) -> &GuestView {
        &self.view
    }

    fn source(&mut self) -> Box<dyn DirtySource> {
        (self.make)(self)
    }

    fn write(&mut self, runs: &[Run]) {
        let Self { vcpus, rings, full, .. } = self;
        for (i, run) in runs.iter().enumerate() {
            let which = i % vcpus.len();
            touch(&mut vcpus[which], *run, which as u64, rings.as_deref(), full);
        }
    }

    fn write_during(&mut self, runs: &[Run], observe: &mut dyn FnMut()) {
        let Self { vcpus, rings, full, .. } = self;
        std::thread::scope(|scope| {
            let writers: Vec<_> = (0..)
                .zip(vcpus)
                .map(|(word, vcpu)| {
                    let (rings, full) = (rings.as_deref(), &*full);
                    scope.spawn(move || {
                        runs.iter().for_each(|run| touch(vcpu, *run, word, rings, full))
                    })
                })
                .collect();
            while !writers.iter().all(|w| w.is_finished()) {
                observe();
            }
        });
    }
}
