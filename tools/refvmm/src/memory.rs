//! Guest memory: where it lies in the guest, and its mapping here.
//!
//! Guest-physical 3 GiB to 4 GiB is a hole for the interrupt controllers; what does not fit below it
//! goes to 4 GiB and up. The mapping is private, anonymous and not reserved: a page exists only once
//! the guest wrote it.
#![expect(unsafe_code, reason = "memory slots are given to KVM by address")]

use ferry_dirtylog::Region;
use ferry_memory::GuestView;
use ferry_pages::{PAGE_BYTES, Run};
use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::VmFd;
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{
    GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap,
};

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

/// Maps memory for a guest; no page is touched.
pub(crate) fn map(memory_bytes: u64) -> Result<GuestRam, VmmError> {
    let fail = |bytes: u64, why: String| VmmError::Map { bytes, why };
    let mut regions = Vec::new();
    for (at, bytes) in stretches(memory_bytes) {
        let len = usize::try_from(bytes).map_err(|e| fail(bytes, e.to_string()))?;
        let mapping =
            MmapRegionBuilder::new_with_bitmap(len, DeviceBitmap::new(bytes / PAGE_BYTES as u64))
                .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
                .with_mmap_flags(libc::MAP_ANONYMOUS | libc::MAP_PRIVATE | libc::MAP_NORESERVE)
                .build()
                .map_err(|e| fail(bytes, e.to_string()))?;
        regions.push(
            GuestRegionMmap::new(mapping, GuestAddress(at))
                .ok_or_else(|| fail(bytes, format!("no guest addresses at {at:#x}")))?,
        );
    }
    GuestRam::from_regions(regions).map_err(|e| fail(memory_bytes, e.to_string()))
}

/// Where `ram` lies in this process, one KVM slot a stretch.
fn regions(ram: &GuestRam) -> Vec<Region> {
    let page = PAGE_BYTES as u64;
    (0..)
        .zip(ram.iter())
        .map(|(slot, r)| Region {
            run: Run::new(r.start_addr().0 / page, r.len() / page),
            host: r.as_ptr() as usize,
            slot,
            backing: None,
        })
        .collect()
}

/// The memory, for those who copy pages: a view may outlive the machine by a moment, and keeps it mapped.
pub(crate) fn view(ram: &GuestRam) -> Result<GuestView, VmmError> {
    // SAFETY: `regions` names mappings of `ram`, readable and writable, whole and disjoint, which the
    // view keeps by a clone of `ram`; nobody here holds references into them.
    let view = unsafe { GuestView::new(regions(ram)) };
    view.map(|v| v.keeping(ram.clone())).map_err(|e| VmmError::Map { bytes: 0, why: e.to_string() })
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
