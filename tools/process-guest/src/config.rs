//! What a process guest is made from.

use ferry_guest::workload::Params;
use ferry_memory::MemoryError;
use ferry_migrate::GuestError;
use serde::{Deserialize, Serialize};

/// How the writes of a process guest are found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Tracker {
    /// By the kernel: userfaultfd write-protection.
    #[default]
    UffdWriteProtect,
    /// Each worker marks what it wrote.
    Software,
}

/// A process guest. Travels with the machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// The machine's name.
    pub name: String,
    /// Bytes of memory, in whole pages.
    pub memory_bytes: u64,
    /// Memory is in huge pages of 2 MiB (hugetlb), of which it is a multiple. Each host decides for itself.
    #[serde(skip)]
    pub huge_pages: bool,
    /// Worker threads: its vCPUs, 1 to [`Params::MAX_CPUS`].
    pub workers: u32,
    /// What they do, as [`Params::parse`] reads it; `cpus` is `workers`, whatever it says.
    #[serde(default)]
    pub workload: String,
    /// How writes are found.
    #[serde(default)]
    pub tracker: Tracker,
}

impl Config {
    /// No encoded configuration is larger than this.
    pub(crate) const MAX_BYTES: usize = 64 << 10;

    /// The workload, for as many workers as there are.
    pub(crate) fn params(&self) -> Result<Params, ProcessError> {
        if !(1..=Params::MAX_CPUS).contains(&self.workers) {
            return Err(ProcessError::Workers(self.workers));
        }
        let params =
            Params::parse(&self.workload).map_err(|e| ProcessError::Workload(e.to_string()))?;
        Ok(Params { cpus: self.workers, ..params })
    }
}

/// Why a process guest cannot be made or used.
#[derive(Debug, thiserror::Error)]
pub enum ProcessError {
    /// The workload's words are wrong.
    #[error("{0}")]
    Workload(String),
    /// Too many workers, or none.
    #[error("a process guest has 1 to {most} workers, not {0}", most = Params::MAX_CPUS)]
    Workers(u32),
    /// The memory is not in whole pages, or no arena fits into it.
    #[error("memory of {memory_bytes} bytes: {why}")]
    Memory {
        /// What was asked for.
        memory_bytes: u64,
        /// What is wrong with it.
        why: String,
    },
    /// The guest can neither do with so little memory nor have so much.
    #[error(
        "machine {name}: a balloon target of {bytes} bytes: must be {least} to {most} bytes, which is \
         what the guest shall have"
    )]
    Balloon {
        /// The machine.
        name: String,
        /// What was asked for.
        bytes: u64,
        /// What it cannot do without.
        least: u64,
        /// All of its memory.
        most: u64,
    },
    /// The host gave no memory.
    #[error("machine {name}: its memory cannot be mapped")]
    Map {
        /// The machine.
        name: String,
        /// The reason.
        #[source]
        source: Box<MemoryError>,
    },
    /// The host gave no thread, or no random number.
    #[error("machine {name}: {what}")]
    Host {
        /// The machine.
        name: String,
        /// What was tried.
        what: &'static str,
        /// The reason.
        #[source]
        source: std::io::Error,
    },
}

impl From<ProcessError> for GuestError {
    fn from(e: ProcessError) -> Self {
        Self::with(e.to_string(), e)
    }
}
