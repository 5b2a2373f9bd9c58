//! Real faults: two real processes in two network namespaces, and what happens to the machine between
//! them when the cable, a process, a disk, the memory or the clock fails.
//!
//! [`table`] says it for each fault and phase, in the words of `docs/FAULTS.md`; each of its rows is a
//! [`Trial`](table::Trial) that is run. [`stage`] brings a move to the phase, [`cable`] and [`relay`] are
//! the link between the namespaces, [`ends`] sees where the machine is. What can be done on one host
//! alone is in [`host`]. Nothing here knows how Ferry works inside.

pub mod cable;
pub mod ends;
pub mod host;
pub mod relay;
pub mod stage;
pub mod table;
mod tun;
