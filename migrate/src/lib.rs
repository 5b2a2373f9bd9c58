//! Moving a machine.
//!
//! [`send()`] moves a [`Guest`] away; [`receive()`] takes machines in for a [`Host`]. Both carry out what
//! the pure state machines of `ferry-protocol` ask for, over any link of `ferry-transport`. [`save()`]
//! writes a guest to a bundle of `ferry-bundle`, [`restore()`] starts one from it when it is read, and
//! [`restore_lazily()`] before. This crate knows no VMM: it sees memory, trackers, and state as opaque sections.

mod arriving;
mod control;
mod fetch;
mod fetching;
mod guest;
mod hints;
mod install;
mod kept;
mod lazy;
mod link_meter;
mod pinned;
mod recall;
mod receive;
mod receive_lane;
mod report;
mod restore;
mod round;
mod save;
mod send;
mod send_lane;
mod serve;
mod spool;
mod tracking;

pub use ferry_memory::GuestView;
pub use ferry_pages::PageSet;
pub use ferry_protocol::{
    Arrival, DeviceSpec, Goals, HostCapabilities, MachineSpec, Mode, PermitStub, Progress,
    Reattach, Refusal, RunPermit, StateError, StateReader, StateWriter, is_machine_name,
};
pub use ferry_transport::{Admission, AllowList};
pub use fetching::Fetching;
pub use guest::{Guest, GuestError, Host};
pub use hints::FreePages;
pub use lazy::{LazyEvent, restore_lazily};
pub use receive::{ReceiveEvent, ReceiveOptions, receive};
pub use report::{
    DecisionReport, DowntimeParts, Foreseen, Foretold, OutcomeKind, PageCounts, Paging, Report,
    WaitMs, Whereabouts,
};
pub use restore::{RestoreError, Restored, restore};
pub use save::{SaveCanceller, SaveError, SaveEvent, SaveOptions, SaveReport, save};
pub use send::{Left, SendEvent, SendHandle, SendOptions, Sent, Tuning, reattach, send};
pub use spool::{Spool, SpoolError, check_spool, serve_spool};

/// An error with its causes, as one line: `what: why: why that`.
pub fn words(e: &dyn std::error::Error) -> String {
    let mut out = e.to_string();
    let mut cause = e.source();
    while let Some(c) = cause {
        let c_words = c.to_string();
        if !out.contains(&c_words) {
            out += ": ";
            out += &c_words;
        }
        cause = c.source();
    }
    out
}
