//! What answers the guest's port and memory-mapped accesses that KVM leaves to us.

use crate::console::{self, Console};

/// What an access asks of the machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Asks {
    /// Nothing more.
    Nothing,
    /// A reset, by the port named.
    Reset(&'static str),
}

const KEYBOARD_COMMAND: u16 = 0x64;
const PULSE_RESET: u8 = 0xfe;
const RESET_CONTROL: u16 = 0xcf9;
const RESET_CPU: u8 = 1 << 2;

fn console_register(port: u16) -> Option<u8> {
    port.checked_sub(console::PORT).and_then(|r| u8::try_from(r).ok()).filter(|r| *r < 8)
}

/// The guest reads `port` (a byte at a time for `rep insb`); what nobody answers reads as ones.
pub(crate) fn read_port(console: &Console, port: u16, data: &mut [u8]) {
    match console_register(port) {
        // A string read repeats one register. Wider single reads of the UART make no sense on hardware either.
        Some(register) => data.iter_mut().for_each(|b| *b = console.read(register)),
        // No keyboard: its controller has nothing to read and accepts all, so that drivers do not wait.
        None if port == KEYBOARD_COMMAND => data.fill(0),
        None => data.fill(0xff),
    }
}

/// The guest writes `port`.
pub(crate) fn write_port(console: &Console, port: u16, data: &[u8]) -> Asks {
    if let Some(register) = console_register(port) {
        data.iter().for_each(|b| console.write(register, *b));
        return Asks::Nothing;
    }
    match (port, data.last()) {
        (KEYBOARD_COMMAND, Some(&PULSE_RESET)) => Asks::Reset("keyboard controller, port 0x64"),
        (RESET_CONTROL, Some(v)) if v & RESET_CPU != 0 => Asks::Reset("reset control, port 0xcf9"),
        _ => Asks::Nothing,
    }
}
