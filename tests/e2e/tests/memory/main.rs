//! Machines whose memory is not all in memory: swapped, and moved as they are.

#[path = "../stage/mod.rs"]
mod stage;
mod swapped;
