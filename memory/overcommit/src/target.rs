//! What a step decides.

use std::fmt;

use serde::Serialize;

use crate::level::Level;

/// How memory is taken back from a machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Means {
    /// Not at all.
    Nothing,
    /// Its guest gives it back.
    Balloon,
    /// Equal pages are merged: the balloon is not there or does not deliver.
    Share,
    /// Pages are swapped: nothing gentler does, or there is no time for it.
    Swap,
}

impl fmt::Display for Means {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Nothing => "nothing is taken from it",
            Self::Balloon => "its balloon gives back",
            Self::Share => "its balloon does not give: equal pages are merged",
            Self::Swap => "nothing gentler does: its pages are swapped",
        })
    }
}

/// What one machine shall have, in bytes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Target {
    /// Which.
    pub name: String,
    /// Physical memory that it holds.
    pub held_bytes: u64,
    /// What it uses all the time, smoothed.
    pub active_bytes: u64,
    /// Physical memory that it is to arrive at.
    pub allocation_bytes: u64,
    /// Physical memory (resident, less merged, and the compressed pool) that it may hold until the next step.
    pub at_most_bytes: u64,
    /// Memory that its guest shall have: the balloon takes the rest of its size.
    pub guest_bytes: u64,
    /// How many bytes may be resident, so that it holds no more than `at_most_bytes`: others are swapped.
    pub resident_limit_bytes: u64,
    /// Whether its equal pages are looked for and merged.
    pub share: bool,
    /// How memory is taken back from it.
    pub means: Means,
}

/// What a step decides for all.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Step {
    /// How short memory is.
    pub level: Level,
    /// What of the budget nobody holds, in bytes.
    pub free_bytes: u64,
    /// What the machines may be given in all, in bytes.
    pub usable_bytes: u64,
    /// What is missing to keep all reservations, in bytes: something else takes of the budget. They are promised,
    /// so they are given, and the headroom is smaller by this.
    pub short_bytes: u64,
    /// One for each machine, as they were admitted.
    pub targets: Vec<Target>,
}
