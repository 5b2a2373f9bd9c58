//! Cold pages of a machine that runs: compressed in memory, then in a file, and back when they are touched.
//!
//! [`Swap`] keeps the resident memory of one machine below a limit. Pages that were not in use for longest are
//! moved out of its memory in one step ([`ferry_memory::Aside`]), so that no write can be lost; zero pages are
//! dropped, equal ones kept once, all others compressed by lz4 or zstd into a *pool* in memory. When the pool
//! reaches its bound, the oldest go to a file in batches, by direct I/O. Who touches such a page waits until it is
//! back; a userfaultfd tells of it.
//!
//! ```text
//!               cold, over the limit              pool at its bound
//!   in memory ─────────────────────────▶ pool ─────────────────────▶ file
//!       ▲                                  │                           │
//!       └────────── touched, or the next in a row of touches ──────────┘
//! ```
//!
//! Who reads the machine's memory by its [`GuestView`](ferry_memory::GuestView) reads such pages from where they
//! are, and nothing comes back by that: so a machine is saved and moved as it is.
//!
//! # Who may touch memory
//! Anybody, at any time: threads of the process, KVM, system calls. Memory must be given back by
//! [`GuestView::discard`](ferry_memory::GuestView::discard) only; whoever gives it back otherwise may find the old
//! content in it later. Memory may be private or shared (memfd); shared memory must be touched by the mapping that
//! the view knows, and no other. The kernel must hold none of its pages for
//! devices (direct I/O, VFIO). Huge pages cannot be swapped.
//!
//! # What goes wrong
//! A page is in the pool until it is written to the file; if that fails it stays there, and when the pool is full,
//! pages stay in memory. A page that cannot be read from the file, or is not what was written, is never seen by
//! the guest: who touches it waits, the file is tried again every second, and [`Figures::trouble`] says why.

mod ages;
mod arena;
mod evict;
mod file;
mod pool;
mod segments;
mod serve;
mod state;
mod swap;
mod track;
mod write_back;

pub use swap::{Figures, Options, Swap, SwapError};
