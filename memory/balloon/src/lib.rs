//! A virtio balloon: the device by which a guest gives memory back (virtio 1.2, section 5.5).
//!
//! A [`Balloon`] is the device without its transport: whoever shows its registers to the guest calls
//! [`Balloon::notify`] when a queue has something, and raises the [`Interrupt`] that is due. Four ways lead to
//! memory given back, all of them by [`GuestView::discard`](ferry_memory::GuestView::discard):
//!
//! | queue | the guest says | what is done |
//! |---|---|---|
//! | inflate, deflate | these pages are in the balloon, or out of it | given back; remembered in [`Balloon::ballooned`] |
//! | statistics | this is how my memory is used | [`Status::statistics`] |
//! | free page hints | these pages were free when you asked | collected for a migration, which checks the claim |
//! | free page reports | these pages are free until I have this buffer back | given back |
//!
//! Where memory is in huge pages, one is given back when all of its pages are in the balloon, or in one report.
//!
//! The guest is not believed: what it puts into a queue can neither end the process, nor keep a thread for
//! longer than the machine's size explains, nor reach what is not its memory. What makes no sense is left out
//! and counted, with the last such thing in words ([`Status::last_trouble`]), and the queue goes on.
//!
//! This crate does not know how the guest reaches the device, nor who decides how large the balloon shall be.

mod balloon;
mod chains;
mod hints;
mod pages;
mod state;
mod statistics;
mod status;

pub use balloon::{
    Balloon, DEFLATE, DEVICE_ID, HINTS, INFLATE, Interrupt, QUEUE_SIZE, QUEUES, REPORTS, Refused,
    STATISTICS, feature,
};
pub use state::{BadState, BalloonState, QueueRegisters};
pub use statistics::Statistics;
pub use status::Status;
