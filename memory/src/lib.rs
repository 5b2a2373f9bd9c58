//! Guest memory of this host: mapping, reading and writing pages, residency, discard.
//!
//! A [`Mapping`] owns memory; a [`GuestView`] copies pages of a machine in and out, whoever owns them;
//! [`Filler`] fills untouched memory fast; [`MissingPages`] supplies pages when they are touched, by
//! [`Userfault`]; [`resident`] tells which pages hold data, [`Touched`] which of shared memory are
//! touched. Memory is private, shared (memfd), or in huge pages (hugetlb). Nothing here forms a reference
//! into guest memory, which the guest may change at any moment, and nothing but a read or a write of a
//! page brings it into being.
//! This crate does not know why a page is read, nor when that is allowed.

mod aside;
mod available;
mod away;
mod discards;
mod error;
mod fill;
mod mapping;
mod missing;
mod resident;
mod touched;
mod userfault;
mod view;

pub use aside::{Aside, Moved};
pub use available::available_bytes;
pub use away::{Away, Stay};
pub use discards::DiscardLog;
pub use error::MemoryError;
pub use fill::Filler;
pub use mapping::{HUGE_PAGES, Mapping};
pub use missing::{MissingPages, Placed, Touch, Waiters};
pub use resident::resident;
pub use touched::Touched;
pub use userfault::{Happened, Userfault};
pub use view::GuestView;
