//! The kernel's dirty-log interface where kvm-ioctls has none: clearing a log, rings, slot flags.
//!
//! From the kernel's Documentation/virt/kvm/api.rst: `KVM_CLEAR_DIRTY_LOG`,
//! `KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2`, `KVM_CAP_DIRTY_LOG_RING` and `KVM_CAP_DIRTY_LOG_RING_ACQ_REL`.

#![expect(unsafe_code, reason = "ioctls that kvm-ioctls lacks, and memory shared with the kernel")]

use std::io;
use std::os::fd::{AsRawFd, RawFd};
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
/// Not from two threads at a time. A signal ends it early.
fn reset_dirty_rings(vm: &VmFd) -> io::Result<u64> {
    // SAFETY: the descriptor is a VM's and the call takes no argument.
    let ret = unsafe { ioctl(vm, KVM_RESET_DIRTY_RINGS()) };
    u64::try_from(ret).map_err(|_| io::Error::last_os_error())
}

/// The dirty ring of one vCPU, mapped.
///
/// The kernel writes at its `dirty_index` and re-arms from its `reset_index` on, for as long as entries are
/// marked as read (virt/kvm/dirty_ring.c). It tells neither; `next` is the second, counted along.
///
/// # When it overflows
/// A vCPU is stopped while the kernel counts more than a limit between the two indices, which leaves 64
/// entries and more in reserve. A KVM that emulates many writes before it looks writes over entries that
/// nobody has read: their pages are lost, and `dirty_index` is ahead of all that can be read by as many.
///
/// ```text
///   next = reset_index          first dirty entry      dirty_index
///   │ ······ gap: never filled ······ │ D D D D D D D D │
/// ```
///
/// Such a gap is seen as soon as the kernel writes behind it, and is then marked as read, all of it: the
/// kernel passes over it. Never more than is known to lie before `dirty_index` may be marked, or the
/// kernel's count would be negative, which it takes for full, for ever.
pub(crate) struct DirtyRing {
    entries: NonNull<kvm_dirty_gfn>,
    /// How many entries: a power of two.
    count: u32,
    /// The next to read and re-arm: the kernel's `reset_index`, which counts on and wraps.
    next: u32,
    /// There may be a gap: it has overflowed.
    gaps: bool,
    /// Where `next` was when the vCPU was last let go on after it had stopped at a full ring.
    full_at: Option<u32>,
    /// Whose ring it is.
    vcpu: RawFd,
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
        let vcpu = vcpu.as_raw_fd();
        Ok(Self { entries, count, next: 0, gaps: false, full_at: None, vcpu })
    }

    /// Whether it is the ring of `vcpu`.
    pub(crate) fn is_of(&self, vcpu: &VcpuFd) -> bool {
        self.vcpu == vcpu.as_raw_fd()
    }

    /// Reads what the kernel has put in and re-arms it; calls `page` with slot and page in slot. True if
    /// the ring has overflowed: pages are missing, and what was read may be torn.
    pub(crate) fn empty(&mut self, vm: &VmFd, page: impl FnMut(u32, u64)) -> io::Result<bool> {
        let first = self.next;
        let (marked, read) = self.mark(page);
        if marked == 0 {
            return Ok(false);
        }
        let all = self.reset(vm, marked)?;
        // Three signs that the kernel came round: no entry was free; one that was marked, but not re-armed
        // yet, is written over; the one before the first is in use again.
        let round = self.flags(first.wrapping_sub(1)).load(Ordering::Acquire) & ENTRY_DIRTY != 0;
        let overflowed = read == self.count || !all || round;
        self.gaps |= overflowed;
        Ok(overflowed)
    }

    /// Gets a vCPU going that stops at a full ring although the ring was just emptied: the kernel counts
    /// entries that it has written over. True if it was so.
    ///
    /// Called once for each time that the vCPU stopped, after `empty`.
    pub(crate) fn release(&mut self, vm: &VmFd) -> io::Result<bool> {
        // The vCPU was let go on, found the ring full, and nothing was re-armed meanwhile: the kernel
        // counts as many entries as its limit or more, and none can be read.
        let stuck = self.full_at == Some(self.next);
        if stuck {
            self.gaps = true;
            // The limit is the number of entries less 64, or 576 on CPUs with a page log (which take no
            // ring of less than 1024): a quarter is always below it.
            let marked = self.mark_gap(0, self.count / 4);
            self.reset(vm, marked)?;
        }
        self.full_at = Some(self.next);
        Ok(stuck)
    }

    /// Marks what can be read, and gaps before it, from `next` on: how many in all, and how many of them
    /// were read.
    fn mark(&self, mut page: impl FnMut(u32, u64)) -> (u32, u32) {
        let (mut marked, mut read) = (0, 0);
        // At most one turn: entries that the kernel adds behind are for the next time.
        while marked < self.count {
            let at = self.next.wrapping_add(marked);
            // Acquire: slot and offset are read only after the kernel has published them.
            let flags = self.flags(at).load(Ordering::Acquire);
            if flags & ENTRY_RESET != 0 {
                // Read before; the kernel had stopped short of it.
                marked += 1;
            } else if flags & ENTRY_DIRTY != 0 {
                // SAFETY: the entry lies in the mapping. The kernel leaves it alone from DIRTY until it was
                // RESET, or writes plain integers over it in a ring that overflows.
                let entry = unsafe { self.entry(at).read_volatile() };
                // Release: the kernel may reuse the entry as soon as it sees the flag.
                self.flags(at).store(ENTRY_RESET, Ordering::Release);
                marked += 1;
                read += 1;
                page(entry.slot, entry.offset);
            } else {
                let behind = (marked + 1..self.count).find(|i| {
                    self.gaps
                        && self.flags(self.next.wrapping_add(*i)).load(Ordering::Acquire)
                            & ENTRY_DIRTY
                            != 0
                });
                let Some(behind) = behind else { break };
                marked += self.mark_gap(marked, behind - marked);
            }
        }
        (marked, read)
    }

    /// Marks `length` empty entries as read, `from` entries after `next`, up to one that is not empty; how
    /// many. Slot and page are what the entry last held: at worst they are re-armed once more.
    fn mark_gap(&self, from: u32, length: u32) -> u32 {
        (0..length)
            .find(|i| {
                self.flags(self.next.wrapping_add(from + i))
                    .compare_exchange(0, ENTRY_RESET, Ordering::Release, Ordering::Relaxed)
                    .is_err()
            })
            .unwrap_or(length)
    }

    /// Has the kernel re-arm `marked` entries from `next` on and advances `next` as far as it came. False if
    /// it stopped at an entry that it had written over.
    fn reset(&mut self, vm: &VmFd, marked: u32) -> io::Result<bool> {
        let mut left = marked;
        // A signal ends the call early, at times before it has done anything.
        for _ in 0..10_000 {
            let done = match reset_dirty_rings(vm) {
                Ok(done) => u32::try_from(done).unwrap_or(u32::MAX).min(left),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => 0,
                Err(error) => return Err(error),
            };
            self.next = self.next.wrapping_add(done);
            left -= done;
            if left == 0 {
                return Ok(true);
            }
            if self.flags(self.next).load(Ordering::Acquire) & ENTRY_RESET == 0 {
                break;
            }
        }
        Ok(false)
    }

    /// The flags of an entry by its running number.
    fn flags(&self, index: u32) -> &AtomicU32 {
        // SAFETY: aligned and in the mapping, which lives as long as `self`; both sides access flags
        // atomically.
        unsafe { AtomicU32::from_ptr(&raw mut (*self.entry(index)).flags) }
    }

    /// An entry by its running number.
    fn entry(&self, index: u32) -> *mut kvm_dirty_gfn {
        // SAFETY: the remainder is below `count`, so that the entry lies in the mapping.
        unsafe { self.entries.add((index & (self.count - 1)) as usize) }.as_ptr()
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
