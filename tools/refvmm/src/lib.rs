//! The reference VMM: a small KVM virtual machine monitor.
//!
//! A [`Machine`] boots a PVH ELF or a Linux kernel, with in-kernel interrupt controllers and timer, 1 to
//! [`MAX_CPUS`] vCPUs, a serial console and a balloon. It implements [`ferry_migrate::Guest`], and [`RefHost`] takes
//! machines in. It is a library: the process that hosts the machine, and how an operator reaches it, are not
//! its business; nor is how a machine's memory and state travel.

mod arch;
mod balloon;
mod board;
mod boot;
mod config;
mod console;
mod error;
pub mod fuzzing;
mod guest;
mod host;
mod kernel;
mod machine;
mod memory;
mod ports;
mod state;
mod vcpu;
mod virtio_mmio;

pub use arch::cpu::{Cpu, CpuError, ExtendedState, Limits};
pub use config::{Arrival, DirtyLog, MAX_CMDLINE_BYTES, MAX_CPUS, MachineConfig, SerialSink};
pub use error::VmmError;
pub use host::RefHost;
pub use machine::{Machine, MachineStatus};
