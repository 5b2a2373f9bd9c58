//! What the command and a hosting process say to each other: a JSON object a line, over the machine's
//! control socket.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;

use ferry_migrate::{Report, SaveReport, Tuning};
use ferry_sharing::{Fingerprints, Tenant, Twins};
use serde::{Deserialize, Serialize, de::DeserializeOwned};

use crate::args::ModeArg;
use crate::route::Route;

/// No line is longer than this.
const MAX_LINE_BYTES: u64 = 1 << 24;

/// From the command.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub(crate) enum Request {
    Show,
    Cpu,
    Pause,
    Resume { destination_is_dead: bool },
    Stop,
    Cancel,
    Tune(Tuning),
    Migrate(MigrateRequest),
    Save(SaveRequest),
    Balloon(BalloonRequest),
    Limit(LimitRequest),
    Share(Box<ShareRequest>),
}

/// Look at a machine's pages once more, and share those that have equals.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct ShareRequest {
    /// Whose machine it is; none: whose it was.
    pub(crate) tenant: Option<Tenant>,
    /// Whether its pages may be one with those of other tenants; none: as it was.
    pub(crate) between_tenants: Option<bool>,
    /// Whose pages come first on this host; none: whoever comes first.
    pub(crate) first: Option<Tenant>,
    /// Which pages have equals in other processes; none: as it was.
    pub(crate) elsewhere: Option<Twins>,
    /// Have the kernel merge what is advised, of this machine and all others.
    pub(crate) merge: bool,
    /// Tell of its pages.
    pub(crate) fingerprints: bool,
}

/// How much of the host's memory a machine may use.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct LimitRequest {
    /// Bytes, its pool included; none: as much as it likes.
    pub(crate) bytes: Option<u64>,
    /// Where its cold pages go, if it has no swap yet.
    pub(crate) swap: Option<ferry_swap::Options>,
}

/// What of the balloon.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct BalloonRequest {
    /// Memory that the guest shall have from now on.
    pub(crate) target_bytes: Option<u64>,
    /// Wait a moment for what the guest says of its memory now.
    pub(crate) ask_guest: bool,
}

/// How to save.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct SaveRequest {
    /// Absolute, as is the base.
    pub(crate) dir: PathBuf,
    pub(crate) base: Option<PathBuf>,
    pub(crate) stop: bool,
    pub(crate) max_stop_ms: u64,
}

/// How to migrate.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct MigrateRequest {
    pub(crate) to: Route,
    /// Absolute.
    pub(crate) identity: PathBuf,
    /// Who has to be there, as on the command line.
    pub(crate) peer: Option<String>,
    /// Over what, as on the command line; none: as it is best.
    pub(crate) link: Option<String>,
    pub(crate) max_downtime_us: u64,
    pub(crate) max_total_us: u64,
    /// Percent.
    #[serde(default)]
    pub(crate) max_slowdown: u8,
    pub(crate) bandwidth_bytes_per_s: Option<u64>,
    pub(crate) mode: ModeArg,
    #[serde(default)]
    pub(crate) look_only: bool,
    /// Go on where a migration was left.
    pub(crate) resume: bool,
    pub(crate) rejoin_ms: u64,
    /// Absolute.
    pub(crate) spool: Option<PathBuf>,
}

/// From the hosting process; all but `Progress` end the conversation.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Reply {
    Machine(Box<MachineInfo>),
    Cpu(Box<ferry_refvmm::Cpu>),
    Done(String),
    Error(String),
    Progress(Progress),
    Report(Box<Report>),
    Saved(Box<SaveReport>),
    Balloon(Box<BalloonInfo>),
    Shared(Box<ShareReply>),
}

/// What a pass found and did.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct ShareReply {
    pub(crate) info: ShareInfo,
    /// Its pages that are one with others now, those of zeros included.
    pub(crate) merged_pages: u64,
    pub(crate) fingerprints: Option<Fingerprints>,
}

/// How the sharing of a machine's pages stands.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct ShareInfo {
    pub(crate) tenant: Tenant,
    /// Read in the last pass.
    pub(crate) scanned_pages: u64,
    /// Left alone: they were written in one of the last passes.
    pub(crate) changing_pages: u64,
    /// Pages that were not, and of them those of zeros, and those that have an equal before them here.
    pub(crate) lasting_pages: u64,
    pub(crate) zero_pages: u64,
    pub(crate) equal_pages: u64,
    /// Ranges of 2 MiB that the kernel is advised of, and pages in them that have an equal.
    pub(crate) advised_ranges: u64,
    pub(crate) advised_equal_pages: u64,
    /// As read back after the last merging that was asked for here.
    pub(crate) merged_pages: u64,
    pub(crate) profit_bytes: i64,
    /// Whether that came to rest.
    pub(crate) at_rest: bool,
    /// Why the kernel does not merge; and whether only for now.
    pub(crate) why_not: Option<String>,
    pub(crate) for_now: bool,
    /// Whether what is not merged can be swapped out.
    pub(crate) can_swap: bool,
}

/// What `vm show` shows.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct MachineInfo {
    pub(crate) name: String,
    /// `kvm` or `process`.
    pub(crate) kind: String,
    pub(crate) state: String,
    pub(crate) memory_bytes: u64,
    pub(crate) resident_bytes: u64,
    pub(crate) cpus: u32,
    pub(crate) dirty_log: String,
    pub(crate) pid: u32,
    /// Where it is moving to.
    pub(crate) migrating_to: Option<Route>,
    /// Where it is being saved to.
    pub(crate) saving_to: Option<PathBuf>,
    /// For the test guests: pages written and checked.
    pub(crate) pages_written: Option<u64>,
    pub(crate) pages_checked: Option<u64>,
    /// Where there is one, unless pages are still fetched.
    pub(crate) balloon: Option<ferry_balloon::Status>,
    /// Bytes of its pages that are one with others (KSM), and the part of them that this saves.
    pub(crate) merged_bytes: u64,
    pub(crate) merged_saves_bytes: u64,
    /// Bytes of its pages of zeros that are the kernel's one, and take no memory.
    pub(crate) merged_zero_bytes: u64,
    /// Where it was looked for equal pages.
    pub(crate) sharing: Option<ShareInfo>,
    /// Where there is one.
    pub(crate) swap: Option<ferry_swap::Figures>,
}

/// How a machine's balloon stands.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct BalloonInfo {
    pub(crate) resident_bytes: u64,
    #[serde(flatten)]
    pub(crate) balloon: ferry_balloon::Status,
}

/// How a migration goes on.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Progress {
    pub(crate) round: u32,
    pub(crate) round_pages: u64,
    pub(crate) sent_bytes: u64,
    pub(crate) rate_bytes_per_s: f64,
    pub(crate) dirty_pages_per_s: f64,
    pub(crate) expected_downtime_ms: Option<f64>,
    /// Something new, in words.
    pub(crate) words: Option<String>,
}

/// One end of a conversation.
pub(crate) struct Conversation(BufReader<UnixStream>);

impl Conversation {
    pub(crate) fn new(stream: UnixStream) -> Self {
        Self(BufReader::new(stream))
    }

    pub(crate) fn say<T: Serialize>(&mut self, value: &T) -> io::Result<()> {
        let mut line = serde_json::to_vec(value)?;
        line.push(b'\n');
        self.0.get_mut().write_all(&line)
    }

    /// The next line; none when the other end is done.
    pub(crate) fn hear<T: DeserializeOwned>(&mut self) -> io::Result<Option<T>> {
        let mut line = Vec::new();
        (&mut self.0).take(MAX_LINE_BYTES).read_until(b'\n', &mut line)?;
        if line.is_empty() {
            return Ok(None);
        }
        serde_json::from_slice(&line).map(Some).map_err(Into::into)
    }
}
