//! The bare-metal test guest and its workloads.
//!
//! [`ELF`] is a PVH kernel that dirties its memory on several vCPUs and checks every page that it comes
//! to: a stale, torn, lost or misplaced page is reported in the [status page](status) and on the
//! serial console. [`workload`] is what the guest runs, shared with the process guest, and free of
//! `std`. This crate does not know who boots the guest or moves it.
//!
//! ```text
//!  0x0009_0000  trampoline of the secondary vCPUs          0x0020_0000  program, stacks, page tables
//!  0x0010_0000  status page                                after it     expected versions, then arena
//! ```

pub mod status;
pub mod workload;

/// The guest as a PVH ELF64 for x86-64.
pub const ELF: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/ferry-guest.elf"));
