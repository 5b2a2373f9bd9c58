//! Machines whose memory is not all in memory, or not all of use.

mod hints;
#[path = "../stage/mod.rs"]
mod stage;
mod swapped;
