//! Why a machine could not be built, started, saved or loaded.

use std::path::PathBuf;

/// What went wrong with a machine.
#[derive(Debug, thiserror::Error)]
pub enum VmmError {
    /// There is no KVM to use.
    #[error("cannot open /dev/kvm: {source}. {advice}")]
    Kvm {
        /// What to do.
        advice: &'static str,
        /// The system's word.
        source: std::io::Error,
    },
    /// This host's KVM lacks something that every machine needs.
    #[error("this host's KVM lacks {0}, which refvmm needs: use a newer kernel or another host")]
    Capability(&'static str),
    /// A call into KVM failed.
    #[error("KVM refused to {what}: {source}")]
    Ioctl {
        /// What it was asked to do.
        what: String,
        /// The system's word.
        source: std::io::Error,
    },
    /// A number of vCPUs that cannot be.
    #[error("a machine has 1 to {max} vCPUs here, not {cpus}")]
    Cpus {
        /// Asked for.
        cpus: u32,
        /// Most that are possible.
        max: u32,
    },
    /// A memory size that cannot be.
    #[error("memory of {bytes} bytes: must be whole 4 KiB pages, {min} to {max} bytes")]
    MemorySize {
        /// Asked for.
        bytes: u64,
        /// Least.
        min: u64,
        /// Most.
        max: u64,
    },
    /// Guest memory could not be mapped.
    #[error("cannot map {bytes} bytes of guest memory: {why}")]
    Map {
        /// How much.
        bytes: u64,
        /// The system's word.
        why: String,
    },
    /// A file could not be used.
    #[error("cannot {action} {what} {}: {source}", path.display())]
    File {
        /// `open`, `read`, `write`.
        action: &'static str,
        /// `kernel`, `initrd`, `serial output`.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// The system's word.
        source: std::io::Error,
    },
    /// The kernel file is none.
    #[error(
        "{} is not a kernel that refvmm can start: {why}. It takes an x86-64 ELF with a PVH entry note \
         (a Linux vmlinux built with CONFIG_PVH, or a bare-metal guest) or a Linux bzImage with a 64-bit entry",
        path.display()
    )]
    NotAKernel {
        /// The file.
        path: PathBuf,
        /// What was found in it.
        why: String,
    },
    /// The machine is too small for what it should start.
    #[error("{what} needs {needs} bytes of memory, the machine has {has}: give it more memory")]
    TooSmall {
        /// What does not fit.
        what: String,
        /// Bytes of memory that it takes.
        needs: u64,
        /// Bytes that the machine has.
        has: u64,
    },
    /// The kernel would lie where there is no memory.
    #[error("{} wants to be loaded at {start:#x}..{end:#x}, which is not free memory of the machine", path.display())]
    Placement {
        /// The file.
        path: PathBuf,
        /// First address.
        start: u64,
        /// Address behind the last.
        end: u64,
    },
    /// The kernel command line is too long, or holds a NUL.
    #[error("the kernel command line is {bytes} bytes{}; at most {max} without NUL are possible", if *nul { " and holds a NUL byte" } else { "" })]
    Cmdline {
        /// Its length.
        bytes: usize,
        /// The longest possible.
        max: usize,
        /// Whether it holds a NUL byte.
        nul: bool,
    },
    /// Something was written outside guest memory: a defect of refvmm.
    #[error("cannot write {what} to guest memory: {why}")]
    GuestMemory {
        /// What.
        what: &'static str,
        /// Where and why.
        why: String,
    },
    /// A dirty log that this host cannot keep.
    #[error("dirty log {asked}: {source}")]
    DirtyLog {
        /// The kind that was asked for.
        asked: &'static str,
        /// The tracker's word.
        source: ferry_dirtylog::TrackError,
    },
    /// The guest's time-stamp counter cannot be kept going at its rate.
    #[error(
        "the machine's TSC runs at {machine_khz} kHz; this host's at {host_khz} kHz, and it cannot scale it"
    )]
    TscRate {
        /// The machine's rate in kHz.
        machine_khz: u32,
        /// The host's rate in kHz.
        host_khz: u32,
    },
    /// This host cannot show what it was told to show.
    #[error("this host's CPU lacks what the machine shall be shown: {}", .0.join(", "))]
    Cpu(Vec<String>),
    /// This host cannot keep a guest from seeing what it shall not see.
    #[error(
        "this host's KVM shows every guest {}, whatever it is told: use another host for this machine, or a baseline with it",
        .0.join(", ")
    )]
    NotHidden(Vec<String>),
    /// A thread could not be started.
    #[error("cannot start the thread of vCPU {index}: {source}")]
    Thread {
        /// The vCPU.
        index: u32,
        /// The system's word.
        source: std::io::Error,
    },
    /// A vCPU that does not stop.
    #[error(
        "machine {name}: {running} vCPU(s) did not stop within {waited_ms} ms (blocked in the kernel, on a page fault?)"
    )]
    DoesNotStop {
        /// The machine.
        name: String,
        /// vCPUs still in guest code.
        running: usize,
        /// How long it was tried.
        waited_ms: u64,
    },
    /// What was asked does not fit the machine's condition.
    #[error("machine {name}: {why}")]
    Condition {
        /// The machine.
        name: String,
        /// Why not.
        why: String,
    },
    /// State could not be written or read.
    #[error("state of machine {name}: {source}")]
    State {
        /// The machine.
        name: String,
        /// Which section, and why.
        source: ferry_protocol::StateError,
    },
    /// State that came does not fit this host.
    #[error("state of machine {name}, {section}: {why}")]
    StateContent {
        /// The machine.
        name: String,
        /// The section.
        section: String,
        /// Why it cannot be used.
        why: String,
    },
}

/// Names a failed call into KVM.
pub(crate) trait Asked<T> {
    /// `what` completes the sentence "KVM refused to …".
    fn asked(self, what: impl FnOnce() -> String) -> Result<T, VmmError>;
}

impl<T> Asked<T> for Result<T, kvm_ioctls::Error> {
    fn asked(self, what: impl FnOnce() -> String) -> Result<T, VmmError> {
        self.map_err(|e| VmmError::Ioctl {
            what: what(),
            source: std::io::Error::from_raw_os_error(e.errno()),
        })
    }
}
