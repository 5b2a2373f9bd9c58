//! The vCPU: interrupt table, local APIC, time, other vCPUs, and the gates to ring 0.

use core::arch::{asm, x86_64::__cpuid, x86_64::_rdtsc};
use core::cell::UnsafeCell;
use core::sync::atomic::{AtomicBool, Ordering::SeqCst};

const LAPIC: usize = 0xfee0_0000;
const SPURIOUS: usize = 0xf0;
const COMMAND: usize = 0x300;
const COMMAND_TARGET: usize = 0x310;
const TIMER: usize = 0x320;
const TIMER_DIVIDE: usize = 0x3e0;
/// Where secondary vCPUs begin; `boot.s` expects it.
const TRAMPOLINE: usize = 0x9_0000;
const TIMER_VECTOR: u32 = 0x40;
const SPURIOUS_VECTOR: u32 = 0xff;

unsafe extern "C" {
    static exception_gates: u8;
    static gate_invalid_opcode: u8;
    static gate_timer: u8;
    static gate_spurious: u8;
    static trampoline: u8;
    static trampoline_end: u8;
    static mut idt: [[u64; 2]; 256];
    static mut boot_cpu: u64;
}

/// A value that vCPU 0 sets once, before any other vCPU reads it.
pub(crate) struct Once<T> {
    set: AtomicBool,
    value: UnsafeCell<Option<T>>,
}

// SAFETY: `set` is called once, by vCPU 0, and `get` gives nothing out before that is over.
unsafe impl<T: Sync> Sync for Once<T> {}

impl<T> Once<T> {
    pub(crate) const fn new() -> Self {
        Self { set: AtomicBool::new(false), value: UnsafeCell::new(None) }
    }

    pub(crate) fn set(&self, value: T) -> &T {
        assert!(!self.set.load(SeqCst), "set twice");
        // SAFETY: nobody reads before `set` is true.
        let value = unsafe { (*self.value.get()).insert(value) };
        self.set.store(true, SeqCst);
        value
    }

    pub(crate) fn get(&self) -> Option<&T> {
        // SAFETY: it was written before `set` became true, and never since.
        if self.set.load(SeqCst) { unsafe { (*self.value.get()).as_ref() } } else { None }
    }
}

/// What vCPU 0 does for all: gates, trampoline, and no interrupts from the old controllers.
pub(crate) fn set_up() {
    // SAFETY: the symbols are this program's own; nobody else runs yet.
    unsafe {
        for vector in 0..32 {
            gate(vector, (&raw const exception_gates as usize) + 16 * vector);
        }
        gate(TIMER_VECTOR as usize, &raw const gate_timer as usize);
        gate(SPURIOUS_VECTOR as usize, &raw const gate_spurious as usize);
        gate(6, &raw const gate_invalid_opcode as usize);
        let from = &raw const trampoline;
        let bytes = (&raw const trampoline_end as usize) - from as usize;
        core::ptr::copy_nonoverlapping(from, TRAMPOLINE as *mut u8, bytes);
    }
    crate::console::write(0x21, 0xff);
    crate::console::write(0xa1, 0xff);
    set_up_timer();
}

/// # Safety
/// Only while no other vCPU runs; `handler` is the address of a gate.
unsafe fn gate(vector: usize, handler: usize) {
    const INTERRUPT_GATE: u64 = 0x8e;
    let at = handler as u64;
    let low = at & 0xffff | 0x08 << 16 | INTERRUPT_GATE << 40 | (at >> 16 & 0xffff) << 48;
    // SAFETY: the caller's promise.
    unsafe { idt[vector] = [low, at >> 32] }
}

/// Switches this vCPU's local APIC on; its timer counts ticks of 16 ns once when told to.
pub(crate) fn set_up_timer() {
    lapic(SPURIOUS, 0x100 | SPURIOUS_VECTOR);
    lapic(TIMER_DIVIDE, 3);
    lapic(TIMER, TIMER_VECTOR);
}

fn lapic(register: usize, value: u32) {
    // SAFETY: the local APIC's registers lie there, and overlap nothing.
    unsafe { ((LAPIC + register) as *mut u32).write_volatile(value) }
}

/// Sends INIT and SIPI to vCPU `cpu`, which has that APIC id. One at a time.
pub(crate) fn start_cpu(cpu: u32) {
    // SAFETY: only vCPUs that start read it, and the last one to start has said so.
    unsafe { (&raw mut boot_cpu).write_volatile(cpu.into()) }
    lapic(COMMAND_TARGET, cpu << 24);
    lapic(COMMAND, 0xc500);
    sleep_ms(10);
    for _ in 0..2 {
        lapic(COMMAND_TARGET, cpu << 24);
        #[expect(clippy::cast_possible_truncation, reason = "below 1 MiB")]
        lapic(COMMAND, 0x4600 | (TRAMPOLINE >> 12) as u32);
        sleep_ms(1);
    }
}

/// Halts for about `ms` milliseconds.
pub(crate) fn sleep_ms(ms: u32) {
    // SAFETY: it comes back with all registers but rcx as they were.
    unsafe { asm!("call halt", in("eax") ms * 62_500, out("rcx") _) }
}

/// Halts for good.
pub(crate) fn stop() -> ! {
    // SAFETY: it does not come back.
    unsafe { asm!("call halt", in("eax") 0, options(noreturn)) }
}

/// The time-stamp counter.
pub(crate) fn tsc() -> u64 {
    // SAFETY: every x86-64 has it, and nothing forbids it to ring 3.
    unsafe { _rdtsc() }
}

/// Frequency of the time-stamp counter in kHz, as CPUID tells it; 0 if it does not.
pub(crate) fn tsc_khz() -> u64 {
    const HYPERVISOR: u32 = 0x4000_0000;
    let hypervisor_last = __cpuid(HYPERVISOR).eax;
    if (HYPERVISOR + 0x10..HYPERVISOR + 0x1_0000).contains(&hypervisor_last) {
        let khz = __cpuid(HYPERVISOR + 0x10).eax;
        if khz > 0 {
            return khz.into();
        }
    }
    if __cpuid(0).eax < 0x15 {
        return 0;
    }
    let ratio = __cpuid(0x15);
    (u64::from(ratio.ecx) * u64::from(ratio.ebx)).checked_div(u64::from(ratio.eax)).unwrap_or(0)
        / 1000
}
