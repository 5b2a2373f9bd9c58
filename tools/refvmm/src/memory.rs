//! Guest memory: where it lies in the guest, and its mapping here.
//!
//! Guest-physical 3 GiB to 4 GiB is a hole for the interrupt controllers; what does not fit below it
//! goes to 4 GiB and up. The mapping is private and not reserved, or of huge pages: a page exists only
//! once the guest wrote it.
#![expect(unsafe_code, reason = "memory is given to vm-memory and KVM by address")]

use ferry_memory::{GuestView, Mapping, MemoryError};
use ferry_pages::{PAGE_BYTES, Run};
use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::VmFd;
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{GuestAddress, GuestMemoryMmap, GuestRegionMmap};

use crate::VmmError;
use crate::error::Asked;

/// The hole below 4 GiB begins here.
pub(crate) const HOLE_START: u64 = 3 << 30;
/// Memory goes on here.
pub(crate) const HOLE_END: u64 = 4 << 30;
/// The smallest machine: boot tables below 1 MiB, and something above.
pub(crate) const MIN_BYTES: u64 = 2 << 20;
/// The largest: 1 TiB.
pub(crate) const MAX_BYTES: u64 = 1 << 40;

/// Marks what refvmm itself writes.
pub(crate) type DeviceBitmap = ferry_dirtylog::RegionBitmap;
/// All memory of one guest.
pub(crate) type GuestRam = GuestMemoryMmap<DeviceBitmap>;

/// Address and length of every stretch of memory of a machine with `memory_bytes`.
pub(crate) fn stretches(memory_bytes: u64) -> Vec<(u64, u64)> {
    let low = memory_bytes.min(HOLE_START);
    let mut all = vec![(0, low)];
    if memory_bytes > low {
        all.push((HOLE_END, memory_bytes - low));
    }
    all
}

/// The frames of every stretch.
pub(crate) fn extents(memory_bytes: u64) -> Vec<Run> {
    let page = PAGE_BYTES as u64;
    stretches(memory_bytes)
        .into_iter()
        .map(|(at, bytes)| Run::new(at / page, bytes / page))
        .collect()
}

/// Memory for a guest as vm-memory has it, and for those who copy pages: the view keeps it mapped, one KVM slot
/// a stretch. No page is touched.
pub(crate) fn map(memory_bytes: u64, huge_pages: bool) -> Result<(GuestRam, GuestView), VmmError> {
    let fail = |why: String| VmmError::Map { bytes: memory_bytes, why };
    let fail_to_map = |e: MemoryError| fail(ferry_migrate::words(&e));
    let (mut ram, mut regions, mut mappings) = (Vec::new(), Vec::new(), Vec::new());
    for (slot, run) in (0..).zip(extents(memory_bytes)) {
        let mapping = Mapping::for_machine(run.pages, huge_pages).map_err(fail_to_map)?;
        let region = mapping.region(run.start, slot);
        let (host, bytes) = region.host_span();
        let (at, bitmap) = (run.start * PAGE_BYTES as u64, DeviceBitmap::new(run.pages));
        let builder = MmapRegionBuilder::new_with_bitmap(bytes, bitmap)
            .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
            .with_mmap_flags(if huge_pages { libc::MAP_SHARED } else { libc::MAP_PRIVATE });
        // SAFETY: it is the mapping, whole, which lives as long as the view, and the view as long as the machine.
        let mapped = unsafe { builder.with_raw_mmap_pointer(host.cast()) }.build();
        let mapped = mapped.map_err(|e| fail(e.to_string()))?;
        ram.push(
            GuestRegionMmap::new(mapped, GuestAddress(at))
                .ok_or_else(|| fail(format!("no guest addresses at {at:#x}")))?,
        );
        regions.push(region);
        mappings.push(mapping);
    }
    // SAFETY: the regions are those of the mappings, readable and writable, whole and disjoint, which the view
    // keeps; nobody here holds references into them.
    let view = unsafe { GuestView::new(regions) }.map_err(fail_to_map)?.keeping(mappings);
    Ok((GuestRam::from_regions(ram).map_err(|e| fail(e.to_string()))?, view))
}

/// Gives memory to the VM as its slots.
pub(crate) fn give_to(vm: &VmFd, view: &GuestView) -> Result<(), VmmError> {
    let page = PAGE_BYTES as u64;
    for r in view.regions() {
        let slot = kvm_userspace_memory_region {
            slot: r.slot,
            flags: 0,
            guest_phys_addr: r.run.start * page,
            memory_size: r.run.pages * page,
            userspace_addr: r.host as u64,
        };
        // SAFETY: the regions of a `view` are whole mappings, disjoint, and never unmapped.
        unsafe { vm.set_user_memory_region(slot) }
            .asked(|| format!("take memory slot {} at {:#x}", r.slot, slot.guest_phys_addr))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_leaves_the_hole_below_4_gib_free() {
        assert_eq!(stretches(1 << 30), vec![(0, 1 << 30)]);
        assert_eq!(stretches(3 << 30), vec![(0, 3 << 30)]);
        assert_eq!(stretches(5 << 30), vec![(0, 3 << 30), (4 << 30, 2 << 30)]);
    }
}
