//! Serves the page faults of a Firecracker machine that is restored lazily.
//!
//! Firecracker is unpatched: this is the page fault handler that its snapshot loading asks for
//! (`mem_backend` of type `Uffd`). It maps empty memory, registers it with a userfaultfd, connects to our
//! socket and sends one message: where its memory lies, with the descriptor attached. From then on whoever
//! touches a page that is not there waits until it is placed here, from a [`Memory`]: Firecracker's own
//! memory file, or a bundle.
//!
//! ```text
//!   Firecracker                              pager
//!     mmap, UFFDIO_REGISTER
//!     connect ─────────────────────────────▶ [`Door`]: whose process is it (SO_PEERCRED, pidfd)
//!     [{base_host_virt_addr, …}], fd ──────▶ [`Handover`], checked against the memory
//!     vCPU touches a page ── userfaultfd ──▶ read the page, UFFDIO_COPY
//!     balloon: MADV_DONTNEED ──────────────▶ those pages read as zeros from now on
//!                                            meanwhile, and in the order of `PushQueue`: all other pages
//!     goes on alone ◀── UFFDIO_UNREGISTER ── the last page is placed
//! ```
//!
//! **A machine without its pager hangs** at the next page that is not there: Firecracker holds a copy of
//! the descriptor, so the kernel waits for an answer that never comes. Hence:
//!
//! - When every page is placed, memory is unregistered, and the machine needs no pager any more. What is
//!   missing then reads as zeros, which is what it is.
//! - A page that is wanted and cannot be had ends the machine (SIGKILL), as Firecracker's documentation
//!   advises: it must not run on with wrong memory, nor hang unnoticed.
//! - Who is asked to stop loads the rest first; asked again, it ends the machine.
//!
//! What becomes of each fault and page is decided by the pure ledger of `ferry-postcopy`. This crate does
//! not know the machine's state, or how Firecracker is started.

mod door;
mod handover;
mod ledger;
mod memory;
mod peer;
mod serve;

pub use door::{Door, PagerError};
pub use handover::{Handover, HandoverError};
pub use memory::{Memory, ReadError};
pub use serve::{Cause, Ended, Report, Waits};
