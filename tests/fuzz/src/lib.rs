//! What comes from peers, files and guests, fuzzed.
//!
//! Each target is a function of bytes that panics where a rule is broken. `targets/` makes a program for
//! cargo-fuzz of each (`make fuzz`); the test of this crate replays every file of `corpus/TARGET`, so a
//! finding stays found without cargo-fuzz.
//!
//! | target | what it is fed | what must hold, beside no panic |
//! |---|---|---|
//! | [`frames`] | page frames, packed pages, pieces of a link | what is accepted is inside the layout, verified, and the same after it was encoded and read again; what is encoded comes back by every codec |
//! | [`messages`] | hellos, messages of both sides, lending | what is accepted is written as the same bytes; lists of pages stay within the layout |
//! | [`protocol`] | a peer that says anything at any time, an engine that does as it is told | no machine runs twice, none that was void; a source that committed runs only by the destination's word |
//! | [`state`] | sections of state | a section is read as it was written, or not at all; what a balloon goes on from, it saves again |
//! | [`balloon`] | registers, rings and descriptors of a guest | no page that is not the machine's, no balloon larger than it |
//! | [`bundle`] | manifests, memory and state of a chain | what is read is what the digests say, and the same after a merge |
//! | [`handover`] | Firecracker's regions | an address leads to its page and back |
//! | [`control`] | lines of the control socket | what is heard can be said, and is heard the same again |
//! | [`plan`] | plans, and figures of their machines | the budget is kept, no machine falls below its reservation |
//!
//! Checksums are made right by what the errors say of them (*healing*): a fuzzer guesses no 64 bits.

mod balloon;
mod bundle;
mod control;
mod frames;
mod handover;
mod messages;
mod pages;
mod plan;
mod protocol;
mod state;

pub use balloon::balloon;
pub use bundle::bundle;
pub use control::control;
pub use frames::frames;
pub use handover::handover;
pub use messages::messages;
pub use plan::plan;
pub use protocol::protocol;
pub use state::state;

/// A target by its name, which is that of its corpus and its program.
pub type Target = (&'static str, fn(&[u8]));

/// Every target.
pub const TARGETS: [Target; 9] = [
    ("frames", frames),
    ("messages", messages),
    ("protocol", protocol),
    ("state", state),
    ("balloon", balloon),
    ("bundle", bundle),
    ("handover", handover),
    ("control", control),
    ("plan", plan),
];
