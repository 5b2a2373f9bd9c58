//! Pages on demand: serves the faults of a machine whose memory is still elsewhere.
//!
//! A [`Pager`] watches the memory of a machine that runs already, and [`Faults`] reads who waits. A touch of a
//! page that is not there is asked for once, by a [`Notice`], wherever the pages are: at the source of a
//! migration, or in a file. Where memory is in huge pages, all of one is asked for.
//! Whoever brings pages calls [`Pager::install`], in any order and from any thread, asked for or not. What
//! to do about each fault and each page is decided by the pure ledger of `ferry-postcopy`; this crate
//! carries it out. It does not know where pages come from, or how they travel.
//!
//! ```text
//!   vCPU touches a missing page ──▶ userfaultfd ──▶ Faults::answer ──▶ Notice::Ask ──▶ source, file
//!   vCPU goes on ◀── woken by the kernel ◀── Pager::install, any thread ◀──────────────────┘
//! ```
//!
//! Who reads faults never touches guest memory: it would wait for itself.

mod ledger;
mod pager;
mod waits;

pub use pager::{Faults, Next, Notice, Pager, hurry};
pub use waits::Waits;
