//! What a machine is made of, as its operator says it.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::{Cpu, VmmError, balloon, memory};

/// The longest kernel command line: Linux's `COMMAND_LINE_SIZE`, without its NUL and the words that tell of the
/// balloon.
pub const MAX_CMDLINE_BYTES: usize = 2047 - balloon::CMDLINE.len();

/// No machine has more vCPUs than this: the MP table's APIC ids have 8 bits.
pub const MAX_CPUS: u32 = 240;

/// How writes of the vCPUs are tracked while the machine moves.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DirtyLog {
    /// KVM's bitmap by slot.
    Bitmap,
    /// KVM's dirty ring by vCPU.
    Ring,
    /// userfaultfd write-protection of the mapping.
    WriteProtect,
    /// The bitmap where KVM offers manual protection, the ring where not.
    #[default]
    Auto,
}

/// Where the guest's serial console goes.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum SerialSink {
    /// Nowhere.
    #[default]
    Discard,
    /// This process's standard output.
    Stdout,
    /// The end of a file, which is created if missing.
    File(PathBuf),
}

/// A machine to boot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MachineConfig {
    /// The machine's name.
    pub name: String,
    /// Bytes of guest memory: whole pages.
    pub memory_bytes: u64,
    /// Memory is in huge pages of 2 MiB (hugetlb), of which it is a multiple.
    #[serde(default)]
    pub huge_pages: bool,
    /// vCPUs.
    pub cpus: u32,
    /// What the guest is shown of the processor; all that the host can show if `None`.
    #[serde(default)]
    pub cpu: Option<Cpu>,
    /// A PVH ELF (such as `vmlinux`) or a `bzImage`.
    pub kernel: PathBuf,
    /// The initial ramdisk.
    pub initrd: Option<PathBuf>,
    /// The kernel's command line.
    pub cmdline: String,
    /// How writes are tracked.
    pub dirty_log: DirtyLog,
    /// Where the console goes.
    pub serial: SerialSink,
}

/// What the host of an arriving machine decides about it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Arrival {
    /// The machine's name here; its own if `None`.
    pub name: Option<String>,
    /// Its memory here is in huge pages.
    #[serde(default)]
    pub huge_pages: bool,
    /// It is refused if it was shown more than this, which it would need wherever it moves on to.
    #[serde(default)]
    pub cpu: Option<Cpu>,
    /// How writes are tracked when it moves on.
    pub dirty_log: DirtyLog,
    /// Where the console goes.
    pub serial: SerialSink,
}

/// The sizes of a machine, checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Shape {
    pub(crate) memory_bytes: u64,
    pub(crate) cpus: u32,
}

impl Shape {
    pub(crate) fn new(memory_bytes: u64, cpus: u32, max_cpus: u32) -> Result<Self, VmmError> {
        if cpus == 0 || cpus > max_cpus {
            return Err(VmmError::Cpus { cpus, max: max_cpus });
        }
        let (min, max) = (memory::MIN_BYTES, memory::MAX_BYTES);
        if !(min..=max).contains(&memory_bytes) || !memory_bytes.is_multiple_of(4096) {
            return Err(VmmError::MemorySize { bytes: memory_bytes, min, max });
        }
        Ok(Self { memory_bytes, cpus })
    }
}
