//! Moving a machine.
mod guest;
pub use guest::{Guest, GuestError, Host};
pub use ferry_protocol::{
    DeviceSpec, HostCapabilities, MachineSpec, Refusal, RunPermit, StateError, StateReader, StateWriter,
};
