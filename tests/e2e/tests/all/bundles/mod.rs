//! Machines as files: saved while they run or for good, in chains, and started again.

mod balloon;
mod command;
mod engine;
mod lazy;
mod lent;
mod recall;
mod trouble;
