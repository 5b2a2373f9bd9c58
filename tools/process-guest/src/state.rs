//! What is saved of a process guest besides its memory.

use ferry_guest::workload::{Kind, Mismatch, Worker};
use serde::{Deserialize, Serialize};

/// A wrong page that a worker found.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Corruption {
    /// The worker that found it.
    pub worker: u32,
    /// What it looks like, as [`Kind::name`] says it.
    pub kind: String,
    /// The page, counted in the arena.
    pub page: u32,
    /// The page's frame.
    pub gfn: u64,
    /// The version that it should have.
    pub version: u32,
    /// Number of the first wrong 64-bit word.
    pub word: u32,
    /// What that word should be.
    pub expected: u64,
    /// What it was.
    pub found: u64,
    /// Words 0 and 1 of the page: version << 32 | index, and tag.
    pub head: [u64; 2],
}

impl Corruption {
    pub(crate) fn new(worker: u32, gfn: u64, m: &Mismatch) -> Self {
        Self {
            worker,
            kind: Kind::name(m.kind).to_owned(),
            page: m.index,
            gfn,
            version: m.version,
            word: m.word,
            expected: m.expected,
            found: m.found,
            head: m.head,
        }
    }
}

impl std::fmt::Display for Corruption {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "CORRUPT worker={} page={} gfn={:#x} kind={} version={} word={} expected={:#018x} found={:#018x} \
             head={:#018x},{:#018x}",
            self.worker,
            self.page,
            self.gfn,
            self.kind,
            self.version,
            self.word,
            self.expected,
            self.found,
            self.head[0],
            self.head[1]
        )
    }
}

/// Section `machine`.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct MachineState {
    pub(crate) paused_by_operator: bool,
    pub(crate) corruption: Option<Corruption>,
}

/// Section `balloon`.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct BalloonState {
    /// Pages that the guest shall have.
    pub(crate) target: u64,
    /// Pages of its part that each worker uses.
    pub(crate) in_use: Vec<u64>,
}

/// Section `worker`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct WorkerState {
    position: u64,
    rng: u64,
    filled: u64,
    written: u64,
    checked: u64,
}

impl WorkerState {
    pub(crate) fn of(w: &Worker) -> Self {
        Self {
            position: w.walk.position,
            rng: w.walk.rng,
            filled: w.filled,
            written: w.written,
            checked: w.checked,
        }
    }

    /// Puts a worker where it was; false if no worker can have been there.
    pub(crate) fn apply(&self, w: &mut Worker) -> bool {
        w.walk.position = self.position;
        w.walk.rng = self.rng;
        w.filled = self.filled;
        w.written = self.written;
        w.checked = self.checked;
        // xorshift never leaves 0, and never comes to it.
        self.rng != 0
    }
}
