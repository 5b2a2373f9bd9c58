//! The kernel's dirty-log interface where kvm-ioctls has none: clearing a log, rings, slot flags.
//!
//! From the kernel's Documentation/virt/kvm/api.rst: `KVM_CLEAR_DIRTY_LOG`,
//! `KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2`, `KVM_CAP_DIRTY_LOG_RING` and `KVM_CAP_DIRTY_LOG_RING_ACQ_REL`.

#![expect(unsafe_code, reason = "ioctls that kvm-ioctls lacks, and memory shared with the kernel")]

mod ring;

use std::io;

use ferry_pages::PAGE_BYTES;
use kvm_bindings::{
    KVM_MEM_LOG_DIRTY_PAGES, KVMIO, kvm_clear_dirty_log, kvm_clear_dirty_log__bindgen_ty_1,
    kvm_enable_cap, kvm_userspace_memory_region,
};
use kvm_ioctls::VmFd;
use vmm_sys_util::ioctl::{ioctl, ioctl_with_ref};
use vmm_sys_util::{ioctl_io_nr, ioctl_iowr_nr};

use crate::Region;

pub(crate) use ring::DirtyRing;

ioctl_iowr_nr!(KVM_CLEAR_DIRTY_LOG, KVMIO, 0xc0, kvm_clear_dirty_log);
ioctl_io_nr!(KVM_RESET_DIRTY_RINGS, KVMIO, 0xc7);

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
/// Not from two threads at a time. A signal ends it early.
pub(crate) fn reset_dirty_rings(vm: &VmFd) -> io::Result<u64> {
    // SAFETY: the descriptor is a VM's and the call takes no argument.
    let ret = unsafe { ioctl(vm, KVM_RESET_DIRTY_RINGS()) };
    u64::try_from(ret).map_err(|_| io::Error::last_os_error())
}

fn os_error(error: kvm_ioctls::Error) -> io::Error {
    io::Error::from_raw_os_error(error.errno())
}
