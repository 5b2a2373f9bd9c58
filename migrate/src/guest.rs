//! What a VMM implements so that its machines can move.

use ferry_dirtylog::DirtySource;
use ferry_memory::GuestView;
use ferry_pages::PageSet;
use ferry_protocol::{MachineSpec, Refusal, RunPermit, StateReader, StateWriter};

use crate::FreePages;

/// Why a guest could not do what was asked: what, where, and what to do, in words.
#[derive(Debug, thiserror::Error)]
#[error("{what}")]
pub struct GuestError {
    /// The sentence for the operator.
    pub what: String,
    /// The cause.
    #[source]
    pub source: Option<Box<dyn std::error::Error + Send + Sync>>,
}

impl GuestError {
    /// An error without a cause below it.
    pub fn new(what: impl Into<String>) -> Self {
        Self { what: what.into(), source: None }
    }

    /// An error with its cause.
    pub fn with(
        what: impl Into<String>,
        source: impl Into<Box<dyn std::error::Error + Send + Sync>>,
    ) -> Self {
        Self { what: what.into(), source: Some(source.into()) }
    }
}

/// A machine, at its source or its destination.
///
/// The VMM keeps memory, vCPU threads and devices; Ferry creates none of them.
///
/// A machine runs on a [`RunPermit`]: `pause` takes it out, `resume` consumes it. A permit that was
/// sent away is gone, so a source cannot resume by mistake.
pub trait Guest: Send {
    /// What the destination must be able to host.
    fn spec(&self) -> MachineSpec;
    /// Its lasting number, that of its permit. It finds an old bundle of the machine at its destination,
    /// whose pages need not be sent; none, and all are.
    fn machine(&self) -> Option<u128> {
        None
    }
    /// Its memory. Where it lies is constant for the life of the machine, and the view keeps the
    /// mapping alive: lanes may hold it a moment longer than the guest lives.
    fn memory(&self) -> GuestView;
    /// The trackers of its memory, not started.
    ///
    /// # Errors
    /// Tracking cannot be set up.
    fn dirty_sources(&mut self) -> Result<Vec<Box<dyn DirtySource>>, GuestError>;
    /// The guest itself, if it can say which of its pages are free: they are not sent. Not for machines in huge
    /// pages.
    fn free_pages(&mut self) -> Option<Box<dyn FreePages>> {
        None
    }
    /// Takes back pages that were collected from its trackers and not delivered: the migration ended
    /// before the commit. For a VMM whose dirty log has other readers; the default forgets them, since
    /// the next migration begins with all pages.
    fn return_dirty(&mut self, pages: &PageSet) {
        let _ = pages;
    }
    /// Holds every vCPU back for `percent` of its time from now on, in short turns; 0: not at all. Asked for only where
    /// the operator allows it.
    ///
    /// # Errors
    /// This VMM cannot do that.
    fn throttle(&mut self, percent: u8) -> Result<(), GuestError> {
        let _ = percent;
        Err(GuestError::new("this VMM cannot hold its vCPUs back"))
    }
    /// Stops every vCPU; returns when none executes guest code. A machine that the operator had
    /// paused is paused already, and remembers it in its state.
    ///
    /// # Errors
    /// A vCPU could not be stopped, or the machine holds no permit (it was moved away).
    fn pause(&mut self) -> Result<RunPermit, GuestError>;
    /// Goes on (or stays paused, if the operator had paused it), consuming the permit.
    ///
    /// # Errors
    /// The permit comes back with the reason, and no vCPU runs.
    fn resume(&mut self, permit: RunPermit) -> Result<(), (RunPermit, GuestError)>;
    /// Writes all vCPU and device state. Called while paused. May dirty guest memory.
    ///
    /// # Errors
    /// State that cannot be read.
    fn save(&mut self, out: &mut StateWriter) -> Result<(), GuestError>;
    /// Loads all vCPU and device state. Called while paused, after all memory arrived.
    ///
    /// # Errors
    /// A section missing, damaged or not understood, or the kernel refused it.
    fn load(&mut self, state: &StateReader) -> Result<(), GuestError>;
}

/// A place that can take machines in.
pub trait Host: Send + Sync {
    /// The guest that this host makes.
    type Guest: Guest + 'static;
    /// Builds an empty, paused machine as `spec` says: all memory mapped (untouched), all vCPUs and
    /// devices constructed, so that the switchover has only to load state.
    ///
    /// # Errors
    /// Every reason why it cannot, each naming the value on both sides.
    fn prepare(&self, spec: &MachineSpec) -> Result<Self::Guest, Vec<Refusal>>;

    /// Bytes that machines on their way in may have in all; asked when none is. A host whose memory for them is
    /// counted elsewhere, such as huge pages, says `u64::MAX`.
    fn available_bytes(&self) -> u64 {
        ferry_memory::available_bytes()
    }
}
