//! Machines that move, are saved and share a host: by the engine in this process, and by the real command.
//!
//! All in one program, so that a test that waits (for Linux to boot, for a time-out) leaves its core to another one,
//! and all of it is linked once. They begin in the order of their names: the longest first. What is counted for the
//! whole process is in `hostile`.

mod a_linux_guest;
mod admission;
mod architecture;
mod bundles;
mod cli;
mod confined;
mod cpu;
mod engine;
mod failures;
mod fetching;
mod footprint;
mod links;
mod load;
mod memory;
mod overcommit;
mod preflight;
mod sharing;
#[path = "../stage/mod.rs"]
mod stage;
#[path = "../../../../migrate/depot/tests/town/mod.rs"]
mod town;
