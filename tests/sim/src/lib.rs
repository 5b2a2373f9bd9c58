//! The migration protocol's state machines, in virtual time: a source and a destination step against each
//! other over a network in memory, while a guest writes and things go wrong.

mod world;

pub use world::{End, Plant, World};
