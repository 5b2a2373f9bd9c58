//! How to migrate, and what of it can be changed on the way.

use std::path::PathBuf;
use std::time::Duration;

use ferry_codec::CodecSet;
use ferry_protocol::{Goals, Mode};
use serde::{Deserialize, Serialize};

/// How to migrate.
#[derive(Clone, Debug)]
pub struct SendOptions {
    /// What the operator asks for.
    pub goals: Goals,
    /// How to reach it.
    pub mode: Mode,
    /// Only look at link and guest, as each move does when it begins: the machine stays here.
    pub look_only: bool,
    /// How long to try to come back when the link is lost.
    pub rejoin_for: Duration,
    /// After a hand-over that owes pages, write those to a spool at this directory, too: see
    /// [`serve_spool`](crate::serve_spool).
    pub spool: Option<PathBuf>,
    /// No more page bytes a second than this.
    pub bandwidth_bytes_per_s: Option<u64>,
    /// Connections for pages.
    pub lanes: u16,
    /// Codecs that may be used.
    pub codecs: CodecSet,
}

impl Default for SendOptions {
    /// Default goals by [`Mode::Auto`], two minutes to come back, no limit, every codec, and a lane for each
    /// two cores, at least two and at most four: a lane keeps a core busy here and another one at the
    /// destination, and while one encodes, its own connection stands still.
    fn default() -> Self {
        let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        let lanes = u16::try_from(cores / 2).unwrap_or(4).clamp(2, 4);
        Self {
            goals: Goals::default(),
            mode: Mode::default(),
            look_only: false,
            rejoin_for: Duration::from_secs(120),
            spool: None,
            bandwidth_bytes_per_s: None,
            lanes,
            codecs: CodecSet::ALL,
        }
    }
}

/// What is to be different in a migration under way; what is not named stays.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Tuning {
    /// See [`Goals`].
    pub max_downtime: Option<Duration>,
    /// See [`Goals`]; since the migration began.
    pub max_total: Option<Duration>,
    /// See [`Goals`].
    pub max_slowdown: Option<u8>,
    /// No more page bytes a second than this; 0: no limit.
    pub bandwidth_bytes_per_s: Option<u64>,
}
