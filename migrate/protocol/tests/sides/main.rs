//! The two sides from outside, by events: what they ask for, take and refuse, and who has the machine after each.

mod destination;
mod look;
mod out_of_place;
mod silence;
mod source;

use std::time::Duration;

use ferry_pages::{PageSet, Run};
use ferry_protocol::MachineSpec;

fn ms(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

fn pages(first: u64, pages: u64) -> PageSet {
    std::iter::once(Run::new(first, pages)).collect()
}

/// A machine `m` of 64 pages.
fn spec() -> MachineSpec {
    MachineSpec {
        name: "m".into(),
        vmm: "test".into(),
        extents: vec![(0, 64)],
        vcpus: 1,
        cpu_features: Vec::new(),
        devices: Vec::new(),
        config: Vec::new(),
    }
}
