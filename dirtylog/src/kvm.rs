//! The kernel's dirty-log interface where kvm-ioctls has none: clearing a log, rings, slot flags.
//!
//! From the kernel's Documentation/virt/kvm/api.rst: `KVM_CLEAR_DIRTY_LOG`,
//! `KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2`, `KVM_CAP_DIRTY_LOG_RING` and `KVM_CAP_DIRTY_LOG_RING_ACQ_REL`.

#![expect(unsafe_code, reason = "ioctls that kvm-ioctls lacks, and memory shared with the kernel")]

use std::io;
use std::os::fd::AsRawFd;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, Ordering};

use ferry_pages::PAGE_BYTES;
use kvm_bindings::{
    KVM_DIRTY_LOG_PAGE_OFFSET, KVM_MEM_LOG_DIRTY_PAGES, KVMIO, kvm_clear_dirty_log,
    kvm_clear_dirty_log__bindgen_ty_1, kvm_dirty_gfn, kvm_enable_cap, kvm_userspace_memory_region,
};
use kvm_ioctls::{VcpuFd, VmFd};
use vmm_sys_util::ioctl::{ioctl, ioctl_with_ref};
use vmm_sys_util::{ioctl_io_nr, ioctl_iowr_nr};

use crate::Region;

ioctl_iowr_nr!(KVM_CLEAR_DIRTY_LOG, KVMIO, 0xc0, kvm_clear_dirty_log);
ioctl_io_nr!(KVM_RESET_DIRTY_RINGS, KVMIO, 0xc7);

/// `kvm_dirty_gfn.flags`: the kernel has filled the entry in.
const ENTRY_DIRTY: u32 = 1;
/// `kvm_dirty_gfn.flags`: the entry was read and its page may be re-armed.
const ENTRY_RESET: u32 = 2;

/// What the kernel says to a capability: 0 if it has none.
pub(crate) fn extension(vm: &VmFd, capability: u32) -> u64 {
    u64::try_from(vm.check_extension_raw(capability.into())).unwrap_or(0)
}

/// Turns a capability of the VM on.
pub(crate) fn enable(vm: &VmFd, capability: u32, argument: u64) -> io::Result<()> {
    let cap = kvm_enable_cap { cap: capability, args: [argument, 0, 0, 0], ..Default::default() };
    vm.enable_cap(&cap).map_err(os_error)
}

/// Turns dirty logging of a memory slot on or off; its place and length stay.
pub(crate) fn log_dirty_pages(vm: &VmFd, region: &Region, on: bool) -> io::Result<()> {
    let slot = kvm_userspace_memory_region {
        slot: region.slot,
        flags: if on { KVM_MEM_LOG_DIRTY_PAGES } else { 0 },
        guest_phys_addr: region.run.start * PAGE_BYTES as u64,
        memory_size: region.run.pages * PAGE_BYTES as u64,
        userspace_addr: region.host as u64,
    };
    // SAFETY: a `Region` of a running machine names memory that its owner mapped and gave to this very
    // slot. With place and length as they are, the kernel changes the flags or refuses (EINVAL).
    unsafe { vm.set_user_memory_region(slot) }.map_err(os_error)
}

/// The dirty log of a region: a bit for each page, least significant first.
pub(crate) fn dirty_log(vm: &VmFd, region: &Region) -> io::Result<Vec<u64>> {
    let bytes = usize::try_from(region.run.pages).unwrap_or(usize::MAX).saturating_mul(PAGE_BYTES);
    vm.get_dirty_log(region.slot, bytes).map_err(os_error)
}

/// Clears and re-arms the pages of `slot` whose bits are set in `bits`, of which the first stands for
/// page `first_page` of the slot.
///
/// `first_page` is a multiple of 64, and so is `pages` unless it reaches the end of the slot.
pub(crate) fn clear_dirty_log(
    vm: &VmFd,
    slot: u32,
    first_page: u64,
    pages: u32,
    bits: &mut [u64],
) -> io::Result<()> {
    if bits.len() * 64 < pages as usize {
        return Err(io::Error::from_raw_os_error(libc::EINVAL));
    }
    let clear = kvm_clear_dirty_log {
        slot,
        num_pages: pages,
        first_page,
        __bindgen_anon_1: kvm_clear_dirty_log__bindgen_ty_1 {
            dirty_bitmap: bits.as_mut_ptr().cast(),
        },
    };
    // SAFETY: the descriptor is a VM's; the bitmap is as long as the call says (checked above) and
    // outlives it.
    let ret = unsafe { ioctl_with_ref(vm, KVM_CLEAR_DIRTY_LOG(), &clear) };
    if ret == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Re-arms every page whose ring entry was marked as read, in all rings; how many.
///
/// Not from two threads at a time.
pub(crate) fn reset_dirty_rings(vm: &VmFd) -> io::Result<u64> {
    // SAFETY: the descriptor is a VM's and the call takes no argument.
    let ret = unsafe { ioctl(vm, KVM_RESET_DIRTY_RINGS()) };
    u64::try_from(ret).map_err(|_| io::Error::last_os_error())
}

/// The dirty ring of one vCPU, mapped.
pub(crate) struct DirtyRing {
    entries: NonNull<kvm_dirty_gfn>,
    /// How many entries: a power of two.
    count: u32,
    /// The next to read; counts on and wraps.
    next: u32,
}

// SAFETY: the mapping belongs to the value alone and is not tied to a thread; all access is by `&mut`.
unsafe impl Send for DirtyRing {}

impl DirtyRing {
    /// Bytes of one entry.
    pub(crate) const ENTRY_BYTES: usize = size_of::<kvm_dirty_gfn>();

    /// Maps the ring of a vCPU, of `count` entries (a power of two, as the capability was enabled with).
    pub(crate) fn map(vcpu: &VcpuFd, count: u32) -> io::Result<Self> {
        let offset = i64::from(KVM_DIRTY_LOG_PAGE_OFFSET) << PAGE_BYTES.trailing_zeros();
        // SAFETY: a new shared mapping where the kernel likes, of a descriptor that is open; nothing
        // that exists is replaced.
        let map = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                count as usize * Self::ENTRY_BYTES,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                vcpu.as_raw_fd(),
                offset,
            )
        };
        if map == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let entries =
            NonNull::new(map.cast()).ok_or_else(|| io::Error::from_raw_os_error(libc::ENOMEM))?;
        Ok(Self { entries, count, next: 0 })
    }

    /// Reads what the kernel has put in and marks it as read; calls `page` with slot and page in slot.
    ///
    /// Re-armed are the pages by [`reset_dirty_rings`] only.
    pub(crate) fn harvest(&mut self, mut page: impl FnMut(u32, u64)) {
        // At most one turn: entries that the kernel adds behind are for the next time.
        for _ in 0..self.count {
            let at = (self.next & (self.count - 1)) as usize;
            // SAFETY: `at` is below `count`, so that the entry lies in the mapping.
            let entry = unsafe { self.entries.add(at) };
            // SAFETY: `flags` is aligned, in the mapping, and both sides access it atomically.
            let flags = unsafe { AtomicU32::from_ptr(&raw mut (*entry.as_ptr()).flags) };
            // Acquire: slot and offset are read only after the kernel has published them.
            if flags.load(Ordering::Acquire) & (ENTRY_DIRTY | ENTRY_RESET) != ENTRY_DIRTY {
                break;
            }
            // SAFETY: the kernel leaves an entry alone from DIRTY until it was RESET.
            let read = unsafe { entry.read_volatile() };
            // Release: the kernel may reuse the entry as soon as it sees the flag.
            flags.store(ENTRY_RESET, Ordering::Release);
            self.next = self.next.wrapping_add(1);
            page(read.slot, read.offset);
        }
    }
}

impl Drop for DirtyRing {
    fn drop(&mut self) {
        // SAFETY: this is the mapping that `map` made, whole, and nothing refers to it any more.
        unsafe {
            libc::munmap(self.entries.as_ptr().cast(), self.count as usize * Self::ENTRY_BYTES)
        };
    }
}

fn os_error(error: kvm_ioctls::Error) -> io::Error {
    io::Error::from_raw_os_error(error.errno())
}
