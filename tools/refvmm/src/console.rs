//! The serial console: a 16550 at port 0x3f8, interrupt 4.

use std::fs::OpenOptions;
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kvm_ioctls::VmFd;
use serde::{Deserialize, Serialize};
use vm_superio::serial::NoEvents;
use vm_superio::{Serial, SerialState, Trigger};

use crate::{SerialSink, VmmError};

/// First port.
pub(crate) const PORT: u16 = 0x3f8;
const IRQ: u32 = 4;

/// Raises the interrupt by an edge, before it returns: state that is saved next holds it.
/// (An irqfd would deliver it some time later, from a kernel worker.)
#[derive(Clone)]
struct Interrupt(Arc<VmFd>);

impl Trigger for Interrupt {
    type E = kvm_ioctls::Error;

    fn trigger(&self) -> Result<(), Self::E> {
        self.0.set_irq_line(IRQ, true)?;
        self.0.set_irq_line(IRQ, false)
    }
}

#[derive(Clone)]
struct Sink(Arc<Mutex<Box<dyn Write + Send>>>);

impl Write for Sink {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).flush()
    }
}

type Uart = Serial<Interrupt, NoEvents, Sink>;

/// The console device.
pub(crate) struct Console {
    uart: Mutex<Uart>,
    interrupt: Interrupt,
    sink: Sink,
}

/// The registers of the 16550, as saved.
#[derive(Serialize, Deserialize)]
pub(crate) struct ConsoleState {
    divisor: (u8, u8),
    interrupt_enable: u8,
    interrupt_identification: u8,
    line_control: u8,
    line_status: u8,
    modem_control: u8,
    modem_status: u8,
    scratch: u8,
    input: Vec<u8>,
}

impl Console {
    pub(crate) fn new(vm: &Arc<VmFd>, sink: &SerialSink) -> Result<Self, VmmError> {
        let out: Box<dyn Write + Send> = match sink {
            SerialSink::Discard => Box::new(io::sink()),
            SerialSink::Stdout => Box::new(io::stdout()),
            SerialSink::File(path) => {
                let file = OpenOptions::new().append(true).create(true).mode(0o600).open(path);
                Box::new(file.map_err(|source| VmmError::File {
                    action: "open",
                    what: "serial output",
                    path: path.clone(),
                    source,
                })?)
            }
        };
        let (interrupt, sink) = (Interrupt(Arc::clone(vm)), Sink(Arc::new(Mutex::new(out))));
        let uart = Mutex::new(Serial::new(interrupt.clone(), sink.clone()));
        Ok(Self { uart, interrupt, sink })
    }

    fn uart(&self) -> MutexGuard<'_, Uart> {
        self.uart.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The guest reads register `offset`.
    pub(crate) fn read(&self, offset: u8) -> u8 {
        self.uart().read(offset)
    }

    /// The guest writes register `offset`.
    pub(crate) fn write(&self, offset: u8, value: u8) {
        if let Err(e) = self.uart().write(offset, value) {
            // The guest must not stop because the host's disk is full.
            tracing::debug!("serial output lost: {e:?}");
        }
    }

    /// Puts what fits of `bytes` into the receive FIFO; returns how many.
    pub(crate) fn input(&self, bytes: &[u8]) -> usize {
        self.uart().enqueue_raw_bytes(bytes).unwrap_or(0)
    }

    pub(crate) fn save(&self) -> ConsoleState {
        let s = self.uart().state();
        ConsoleState {
            divisor: (s.baud_divisor_low, s.baud_divisor_high),
            interrupt_enable: s.interrupt_enable,
            interrupt_identification: s.interrupt_identification,
            line_control: s.line_control,
            line_status: s.line_status,
            modem_control: s.modem_control,
            modem_status: s.modem_status,
            scratch: s.scratch,
            input: s.in_buffer,
        }
    }

    /// Takes over saved registers. Load the interrupt controllers after this: they hold what is pending.
    pub(crate) fn load(&self, s: ConsoleState) -> Result<(), String> {
        let state = SerialState {
            baud_divisor_low: s.divisor.0,
            baud_divisor_high: s.divisor.1,
            interrupt_enable: s.interrupt_enable,
            interrupt_identification: s.interrupt_identification,
            line_control: s.line_control,
            line_status: s.line_status,
            modem_control: s.modem_control,
            modem_status: s.modem_status,
            scratch: s.scratch,
            in_buffer: s.input,
        };
        *self.uart() =
            Serial::from_state(&state, self.interrupt.clone(), NoEvents, self.sink.clone())
                .map_err(|e| format!("{e:?}"))?;
        Ok(())
    }
}
