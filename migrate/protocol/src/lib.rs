//! The migration protocol as pure state machines.
//!
//! [`Source`] and [`Destination`] take events and the time, and return actions; [`Policy`] decides when
//! to switch over; [`MachineSpec`] and [`HostCapabilities`] are compared before any work. No clock,
//! thread, socket or `unsafe`, and no page bytes: the engine streams those. That is why a whole
//! migration can be stepped in virtual time, a million times (`tests/sim`).

mod destination;
mod forecast;
mod lending;
pub mod limits;
mod messages;
mod outcome;
mod packed;
mod permit;
mod policy;
mod source;
mod spec;
mod state;
pub mod wire;

pub use destination::{Arrival, Built, Destination, DestinationAction, DestinationEvent};
pub use forecast::{Forecast, Sampled};
pub use lending::{
    LENDING_VERSION, MAX_OPEN_FILES, MAX_PATH_BYTES, MAX_READ_BYTES, MAX_TO_DEPOT_BYTES,
    MAX_TO_READER_BYTES, ToDepot, ToReader,
};
pub use limits::{MAX_HELLO_BYTES, MAX_LANES};
pub use messages::{
    Hello, NotFerry, Recalled, ToDestination, ToSource, VERSION_MAX, VERSION_MIN, Verdict,
};
pub use outcome::{Fetched, Outcome, Progress, Switchover};
pub use packed::PackedPages;
pub use permit::{PermitStub, RunPermit};
pub use policy::{Decision, Goals, Mode, Policy, RoundFacts};
pub use source::{
    DOUBT_TIMEOUT, QUESTION_TIMEOUT, Reattach, Source, SourceAction, SourceEvent, Spooled,
};
pub use spec::{DeviceSpec, HostCapabilities, MachineSpec, is_machine_name};
pub use state::{MAX_SECTION_BYTES, StateError, StateReader, StateWriter};

/// One reason why a destination does not take a machine.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Refusal {
    /// What is the matter: `memory`, `cpu`, `device`, `name`, `version`, `vmm`, `vcpus`, `host`, `identity`.
    pub what: String,
    /// The sentence for the operator, with the value on each side.
    pub why: String,
}

impl Refusal {
    /// A reason about `what`.
    pub fn new(what: impl Into<String>, why: impl Into<String>) -> Self {
        Self { what: what.into(), why: why.into() }
    }
}
