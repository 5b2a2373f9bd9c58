//! What the command and a hosting process say to each other: a JSON object a line, over the machine's
//! control socket.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::SocketAddr;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;

use ferry_migrate::{Report, SaveReport};
use serde::{Deserialize, Serialize, de::DeserializeOwned};

use crate::args::ModeArg;

/// No line is longer than this.
const MAX_LINE_BYTES: u64 = 1 << 20;

/// From the command.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub(crate) enum Request {
    Show,
    Pause,
    Resume { destination_is_dead: bool },
    Stop,
    Cancel,
    Migrate(MigrateRequest),
    Save(SaveRequest),
    Balloon(BalloonRequest),
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
    pub(crate) to: SocketAddr,
    /// Absolute.
    pub(crate) identity: PathBuf,
    pub(crate) max_downtime_ms: u64,
    pub(crate) max_total_ms: u64,
    pub(crate) bandwidth_bytes_per_s: Option<u64>,
    pub(crate) mode: ModeArg,
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
    Done(String),
    Error(String),
    Progress(Progress),
    Report(Box<Report>),
    Saved(Box<SaveReport>),
    Balloon(Box<BalloonInfo>),
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
    pub(crate) migrating_to: Option<SocketAddr>,
    /// Where it is being saved to.
    pub(crate) saving_to: Option<PathBuf>,
    /// For the test guests: pages written and checked.
    pub(crate) pages_written: Option<u64>,
    pub(crate) pages_checked: Option<u64>,
    /// Where there is one, unless pages are still fetched.
    pub(crate) balloon: Option<ferry_balloon::Status>,
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
