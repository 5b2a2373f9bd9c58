//! A guest without KVM: plain memory and threads.
//!
//! [`ProcessGuest`] is a machine for [`ferry_migrate`]: its memory is a mapping of this process, its
//! vCPUs are threads that run the workload of [`ferry_guest`], with the same check of every page.
//! [`ProcessHost`] takes such machines in. It dirties memory far faster than a KVM guest whose writes
//! are logged, and runs where there is no KVM.
//!
//! ```text
//! frame 0      table of expected versions, a u32 for each page of the arena
//! after it     the arena
//! ```
//!
//! It gives memory back: [`ProcessGuest::set_balloon_target`] says how much it shall have, and its workers
//! discard the rest.
//!
//! This crate does not know how a machine travels.

mod balloon;
mod config;
mod guest;
mod host;
mod memory;
mod state;
mod workers;

pub use config::{Config, ProcessError, Tracker};
pub use guest::{ProcessGuest, Status};
pub use host::ProcessHost;
pub use state::Corruption;

/// The VMM family of process guests, as in [`ferry_migrate::MachineSpec`].
pub const VMM: &str = "process";
/// The device kind that stands for a worker's state.
const WORKER: &str = "worker";
/// The section that holds what is not a worker's.
const MACHINE: &str = "machine";
/// The section that says what is given back to the host. Only there if anything is.
const BALLOON: &str = "balloon";
/// Version of each section.
const STATE_VERSION: u16 = 1;
