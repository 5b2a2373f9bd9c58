//! What a test guest does with its memory: the same code in the bare-metal and in the process guest.
//!
//! The guest has an *arena* of pages, counted from 0, and a table of the version that each page should
//! have ([`Arena`]). Each vCPU owns a [`Part`] of it. A visit checks all 512 words of a page against
//! the [`Stamp`] of its expected version, then writes the next one. What a vCPU does not use of its part
//! ([`Worker::fit`]) may be given back to the host.
//! No clock, thread or I/O is here, and no `std`.

mod params;
mod stamp;
mod visit;
mod walk;

pub use params::{BadParam, Params, Pattern};
pub use stamp::{ANYTHING, Kind, Mismatch, NEVER_WRITTEN, Stamp, WORDS, next_version};
pub use visit::{Arena, Step, Worker, expect, expected};
pub use walk::{Pace, Part, Walk};

/// Bytes in a page of the arena.
pub const PAGE_BYTES: u64 = 4096;
