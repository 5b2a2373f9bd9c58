//! Machines as files: saved while they run or for good, in chains, and started again.

mod balloon;
mod command;
mod engine;
mod lazy;
mod lent;
mod recall;
#[path = "../stage/mod.rs"]
mod stage;
#[path = "../../../../migrate/depot/tests/town/mod.rs"]
mod town;
mod trouble;
