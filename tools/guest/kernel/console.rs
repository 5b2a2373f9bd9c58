//! Lines on the first serial port.

use core::arch::asm;
use core::fmt::{self, Write};
use core::sync::atomic::{AtomicBool, Ordering::SeqCst};

const PORT: u16 = 0x3f8;

/// Prints a line after `FERRY-GUEST `.
macro_rules! say {
    ($($words:tt)*) => { $crate::console::line(format_args!($($words)*)) };
}
pub(crate) use say;

static BUSY: AtomicBool = AtomicBool::new(false);

/// Prints `FERRY-GUEST words`.
pub(crate) fn line(words: fmt::Arguments<'_>) {
    // A vCPU that faults while another prints waits for at most this long.
    for _ in 0..100_000_000 {
        if BUSY.compare_exchange(false, true, SeqCst, SeqCst).is_ok() {
            break;
        }
        core::hint::spin_loop();
    }
    let _ = writeln!(Port, "FERRY-GUEST {words}\r");
    BUSY.store(false, SeqCst);
}

struct Port;

impl Write for Port {
    fn write_str(&mut self, s: &str) -> fmt::Result {
        for byte in s.bytes() {
            // Some ports drop what comes while they are busy; none is busy for ever.
            for _ in 0..1000 {
                if read(PORT + 5) & 0x20 != 0 {
                    break;
                }
            }
            write(PORT, byte);
        }
        Ok(())
    }
}

/// Writes an I/O port below 0x400.
pub(crate) fn write(port: u16, value: u8) {
    // SAFETY: ports have no hold on this program's memory; the TSS opens these to ring 3.
    unsafe {
        asm!("out dx, al", in("dx") port, in("al") value, options(nomem, nostack, preserves_flags))
    }
}

fn read(port: u16) -> u8 {
    let value: u8;
    // SAFETY: as in `write`.
    unsafe {
        asm!("in al, dx", in("dx") port, out("al") value, options(nomem, nostack, preserves_flags))
    }
    value
}
