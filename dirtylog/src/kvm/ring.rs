//! One vCPU's dirty ring: reading it, and getting it back in step when it overflows.

#![expect(unsafe_code, reason = "memory shared with the kernel")]

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, Ordering};

use ferry_pages::PAGE_BYTES;
use kvm_bindings::{KVM_DIRTY_LOG_PAGE_OFFSET, kvm_dirty_gfn};
use kvm_ioctls::VcpuFd;

/// `kvm_dirty_gfn.flags`: the kernel has filled the entry in.
const ENTRY_DIRTY: u32 = 1;
/// `kvm_dirty_gfn.flags`: the entry was read and its page may be re-armed.
const ENTRY_RESET: u32 = 2;

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

    /// Reads what the kernel has put in and has `rearm` re-arm it (`KVM_RESET_DIRTY_RINGS`, which says how
    /// many); calls `page` with slot and page in slot. True if the ring has overflowed: pages are missing,
    /// and what was read may be torn.
    pub(crate) fn empty(
        &mut self,
        rearm: impl FnMut() -> io::Result<u64>,
        page: impl FnMut(u32, u64),
    ) -> io::Result<bool> {
        let first = self.next;
        let (marked, read) = self.mark(page);
        if marked == 0 {
            return Ok(false);
        }
        let all = self.reset(rearm, marked)?;
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
    pub(crate) fn release(&mut self, rearm: impl FnMut() -> io::Result<u64>) -> io::Result<bool> {
        // The vCPU was let go on, found the ring full, and nothing was re-armed meanwhile: the kernel
        // counts as many entries as its limit or more, and none can be read.
        let stuck = self.full_at == Some(self.next);
        if stuck {
            self.gaps = true;
            // The limit is the number of entries less 64, or 576 on CPUs with a page log (which take no
            // ring of less than 1024): a quarter is always below it.
            let marked = self.mark_gap(0, self.count / 4);
            self.reset(rearm, marked)?;
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
                if !self.gaps {
                    break;
                }
                let behind = (marked + 1..self.count).find(|i| {
                    let flags = self.flags(self.next.wrapping_add(*i));
                    flags.load(Ordering::Acquire) & ENTRY_DIRTY != 0
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
    fn reset(
        &mut self,
        mut rearm: impl FnMut() -> io::Result<u64>,
        marked: u32,
    ) -> io::Result<bool> {
        let mut left = marked;
        // A signal ends the call early, at times before it has done anything.
        for _ in 0..10_000 {
            let done = match rearm() {
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

#[cfg(test)]
mod tests {
    use std::cell::RefCell;
    use std::collections::BTreeSet;

    use super::*;

    const COUNT: u32 = 256;
    const LIMIT: u32 = COUNT - 64;

    /// The kernel's side, as virt/kvm/dirty_ring.c has it. Each entry bears the running number of its page.
    struct Kernel {
        entries: *mut kvm_dirty_gfn,
        dirty: u32,
        reset: u32,
        /// Written by the vCPU.
        written: u64,
        rearmed: BTreeSet<u64>,
        seed: u64,
    }

    impl Kernel {
        fn random(&mut self, below: u64) -> u64 {
            self.seed = self.seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (self.seed >> 33) % below
        }

        fn entry(&mut self, index: u32) -> &mut kvm_dirty_gfn {
            // SAFETY: one of the `COUNT` entries of a mapping that outlives the test; one thread.
            unsafe { &mut *self.entries.add((index % COUNT) as usize) }
        }

        fn push(&mut self, pages: u64) {
            for _ in 0..pages {
                let (at, offset) = (self.dirty, self.written);
                *self.entry(at) = kvm_dirty_gfn { flags: ENTRY_DIRTY, slot: 0, offset };
                self.dirty = self.dirty.wrapping_add(1);
                self.written += 1;
            }
        }

        /// Re-arms, with a signal now and then, while an emulator may write.
        fn reset(&mut self, burst: u64) -> u64 {
            let mut done = 0;
            if burst > 0 && self.random(4) == 0 {
                // Close to where it comes round to what is being re-armed.
                let pages = u64::from((COUNT + 1).saturating_sub(self.used()));
                let short = self.random(4).min(pages);
                self.push(pages - short);
            }
            while self.random(100) > 0 && self.entry(self.reset).flags & ENTRY_RESET != 0 {
                let offset = self.entry(self.reset).offset;
                self.rearmed.insert(offset);
                if self.random(if burst > 8 { 100 } else { 10 }) == 0 {
                    let pages = self.random(burst + 1);
                    self.push(pages);
                }
                let at = self.reset;
                self.entry(at).flags = 0;
                self.reset = at.wrapping_add(1);
                done += 1;
            }
            done
        }

        fn used(&self) -> u32 {
            self.dirty.wrapping_sub(self.reset)
        }
    }

    fn ring(first: u32) -> DirtyRing {
        // SAFETY: a new mapping, which nothing else refers to.
        let map = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                COUNT as usize * DirtyRing::ENTRY_BYTES,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        let entries = NonNull::new(map.cast()).unwrap();
        DirtyRing { entries, count: COUNT, next: first, gaps: false, full_at: None, vcpu: -1 }
    }

    /// Writes come at any moment of a harvest, up to several times what the ring holds. Whatever is lost is
    /// noted, the ring is never believed to be further than it is, and it always gets back in step.
    #[test]
    fn an_overflow_at_any_moment_is_noted_and_mended() {
        for trial in 0..3000 {
            let first = u32::MAX - 700;
            let mut ring = ring(first);
            let kernel = RefCell::new(Kernel {
                entries: ring.entries.as_ptr(),
                dirty: first,
                reset: first,
                written: 0,
                rearmed: BTreeSet::new(),
                seed: trial,
            });
            // From bursts that fit to such as go round several times.
            let burst = [0, 8, 60, 300, 1000][usize::try_from(trial % 5).unwrap()];
            let read = RefCell::new(BTreeSet::new());
            let drain = |ring: &mut DirtyRing, burst: u64| {
                let page = |_, offset| {
                    read.borrow_mut().insert(offset);
                    let mut kernel = kernel.borrow_mut();
                    if kernel.random(if burst > 8 { 100 } else { 10 }) == 0 {
                        let pages = kernel.random(burst + 1);
                        kernel.push(pages);
                    }
                };
                let overflowed = ring.empty(|| Ok(kernel.borrow_mut().reset(burst)), page).unwrap();
                let kernel = kernel.borrow();
                assert_eq!(ring.next, kernel.reset, "trial {trial}");
                assert!(kernel.used() < 1 << 31, "trial {trial}: passed what was written");
                overflowed
            };
            let mut noted = false;
            // One harvest alone, at times: its overflow must be noted by itself.
            for _ in 0..=(trial / 5) % 4 * 2 {
                let pages = {
                    let mut kernel = kernel.borrow_mut();
                    let room = u64::from(LIMIT.saturating_sub(kernel.used()));
                    kernel.random(room + burst * 2 + 1)
                };
                kernel.borrow_mut().push(pages);
                noted |= drain(&mut ring, burst);
            }
            // The vCPU is stopped at a full ring until the ring is so no more.
            let mut stops = 0;
            while kernel.borrow().used() >= LIMIT {
                noted |= drain(&mut ring, 0);
                noted |= ring.release(|| Ok(kernel.borrow_mut().reset(0))).unwrap();
                assert!(kernel.borrow().used() < 1 << 31, "trial {trial}: passed what was written");
                stops += 1;
                assert!(stops < 1000, "trial {trial}: stopped for ever");
            }
            // And is in step after the next writes.
            for _ in 0..3 {
                kernel.borrow_mut().push(5);
                noted |= drain(&mut ring, 0);
            }
            assert_eq!(kernel.borrow().used(), 0, "trial {trial}: phantoms are left");
            let all = 0..kernel.borrow().written;
            let kept =
                |page: &u64| read.borrow().contains(page) && kernel.borrow().rearmed.contains(page);
            assert!(noted || all.clone().all(|p| kept(&p)), "trial {trial}: lost and not noted");
            assert!(all.rev().take(10).all(|p| kept(&p)), "trial {trial}: not mended");
            assert!(burst > 0 || !noted, "trial {trial}: nothing was lost, and yet it is noted");
        }
    }
}
