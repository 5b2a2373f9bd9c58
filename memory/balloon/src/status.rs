//! What there is to say of a balloon.

use serde::{Deserialize, Serialize};

use crate::Statistics;

/// How a balloon stands.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// A driver in the guest runs it.
    pub driver: bool,
    /// Bytes of memory that the machine has with an empty balloon.
    pub memory_bytes: u64,
    /// Bytes of memory that the guest shall have.
    pub target_bytes: u64,
    /// Bytes of memory that the guest says it has.
    pub actual_bytes: u64,
    /// Bytes that are in the balloon. In huge pages, not all of these need have been given back.
    pub ballooned_bytes: u64,
    /// Bytes given back by free page reports so far, those among them that the guest took again.
    pub reported_bytes: u64,
    /// Bytes that were hinted as free since hints were last asked for.
    pub hinted_bytes: u64,
    /// What the guest last said of its memory.
    pub statistics: Option<Statistics>,
    /// How often it said so.
    pub statistics_count: u64,
    /// Requests, or parts of them, that made no sense.
    pub troubles: u64,
    /// The last one, in words.
    pub last_trouble: Option<String>,
}

/// What went wrong so far.
#[derive(Debug, Default)]
pub(crate) struct Troubles {
    pub(crate) count: u64,
    pub(crate) last: Option<String>,
}

impl Troubles {
    pub(crate) fn note(&mut self, words: impl Into<String>) {
        self.count = self.count.saturating_add(1);
        self.last = Some(words.into());
    }

    /// Notes what `result` failed for.
    pub(crate) fn of(&mut self, result: Result<(), String>) {
        if let Err(words) = result {
            self.note(words);
        }
    }
}
