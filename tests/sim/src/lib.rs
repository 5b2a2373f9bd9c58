//! The migration protocol's state machines, in virtual time: a source and a destination step against each
//! other over a network in memory, while a guest writes and things go wrong.
//!
//! What runs is what ships: `Source` and `Destination` with their policy, `ChunkLedger`, `Demand`, `PushQueue`
//! and `PushPace`, and the control messages as they are encoded. What surrounds them is simulated: guest memory
//! (a stamp of place and version for each page), dirty log, lanes, spool, processes that die and operators. A
//! seed decides all that happens. After every step the [`Rule`]s are checked, and [`Plant`] names faults of our
//! own that must be found. It does not know threads, sockets, or what a page's bytes are.

mod ends;
mod faults;
mod rules;
mod runs;
mod world;

pub use ends::End;
pub use faults::Plant;
pub use rules::{Broken, Rule};
pub use runs::{Failure, Runs, Tally};
pub use world::{Listener, World};
