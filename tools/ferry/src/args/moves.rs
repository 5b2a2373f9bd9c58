//! What is asked of a move: where it goes, how, and its goals.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, ValueEnum};
use ferry_migrate::{Mode, Tuning};
use ferry_transport::{LinkChoice, PeerRule};
use serde::{Deserialize, Serialize};

use super::units::{parse_bandwidth, parse_rate};
use crate::route::{Route, address};

/// The host at the other end of a move, and who this one is to it.
#[derive(Clone, Debug, Args)]
pub(crate) struct Destination {
    /// Where `ferry receive` listens; several addresses of that host are used side by side.
    #[arg(long, value_name = "ADDR[,ADDR…]")]
    pub(crate) to: Route,
    /// This host's identity: a directory that `ferry pki init` made.
    #[arg(long, value_name = "DIR")]
    pub(crate) identity: PathBuf,
    #[command(flatten)]
    pub(crate) peer: PeerArg,
}

/// Where a machine goes, how, and what is asked of it.
#[derive(Clone, Debug, Args)]
pub(crate) struct Way {
    #[command(flatten)]
    pub(crate) there: Destination,
    /// How memory is moved.
    #[arg(long, value_enum, default_value_t = ModeArg::Auto)]
    pub(crate) mode: ModeArg,
    /// The guest should stand still no longer than this.
    #[arg(long, value_name = "TIME", default_value = "50ms", value_parser = humantime::parse_duration)]
    pub(crate) max_downtime: Duration,
    /// Make no more rounds after this long. With `--mode pre-copy` the move is then given up, and the
    /// machine goes on here; otherwise it is handed over, and the rest comes after.
    #[arg(long, value_name = "TIME", default_value = "5m", value_parser = humantime::parse_duration)]
    pub(crate) max_total: Duration,
    /// With `--mode pre-copy`, or to a host that can do nothing else: hold vCPUs back for up to this many percent of
    /// their time, if the guest writes faster than the link carries.
    #[arg(long, value_name = "PERCENT", default_value_t = 0, value_parser = clap::value_parser!(u8).range(0..100))]
    pub(crate) max_slowdown: u8,
    /// Most that page data may take of the link, such as 1Gbit or 100Mbit.
    #[arg(long, value_name = "RATE", value_parser = parse_rate)]
    pub(crate) bandwidth: Option<u64>,
}

#[derive(Clone, Debug, Args)]
pub(crate) struct Migrate {
    /// The machine.
    pub(crate) name: String,
    #[command(flatten)]
    pub(crate) way: Way,
    /// Go on where a move was left that lost its destination after the hand-over, perhaps at another
    /// address.
    #[arg(long)]
    pub(crate) resume: bool,
    /// When the link is lost, try for this long to come back.
    #[arg(long, value_name = "TIME", default_value = "2m", value_parser = humantime::parse_duration)]
    pub(crate) rejoin: Duration,
    /// After a hand-over that leaves pages here, write them to this directory as well, so that
    /// `ferry serve-spool` can finish the move if this host's process ends. Removed when all have arrived.
    #[arg(long, value_name = "DIR")]
    pub(crate) spool: Option<PathBuf>,
    /// Print one JSON object.
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Clone, Debug, Args)]
pub(crate) struct PreflightArgs {
    /// The machine.
    pub(crate) name: String,
    #[command(flatten)]
    pub(crate) way: Way,
    /// Print one JSON object.
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
#[group(skip)]
#[command(group(clap::ArgGroup::new("goals").required(true).multiple(true)))]
pub(crate) struct Tune {
    /// The machine, which is moving.
    pub(crate) name: String,
    /// The guest should stand still no longer than this.
    #[arg(long, value_name = "TIME", value_parser = humantime::parse_duration, group = "goals")]
    pub(crate) max_downtime: Option<Duration>,
    /// Make no more rounds after this long since the move began.
    #[arg(long, value_name = "TIME", value_parser = humantime::parse_duration, group = "goals")]
    pub(crate) max_total: Option<Duration>,
    /// Hold vCPUs back for up to this many percent of their time.
    #[arg(long, value_name = "PERCENT", value_parser = clap::value_parser!(u8).range(0..100), group = "goals")]
    pub(crate) max_slowdown: Option<u8>,
    /// Most that page data may take of the link, such as 1Gbit or 100Mbit; `none`: no limit.
    #[arg(long, value_name = "RATE", value_parser = parse_bandwidth, group = "goals")]
    pub(crate) bandwidth: Option<u64>,
}

impl Tune {
    pub(crate) fn tuning(&self) -> Tuning {
        Tuning {
            max_downtime: self.max_downtime,
            max_total: self.max_total,
            max_slowdown: self.max_slowdown,
            bandwidth_bytes_per_s: self.bandwidth,
        }
    }
}

/// Who has to be at the other end, and how it is reached.
#[derive(Clone, Debug, Args)]
pub(crate) struct PeerArg {
    /// The other host must be this one: its name, or `sha256:` and its certificate's fingerprint [default: any host with
    /// an identity of the same authority].
    #[arg(long, value_name = "HOST")]
    pub(crate) peer: Option<PeerRule>,
    /// Connect over `quic` (UDP), over `tls` (TCP), or over TLS where it is answered, as it costs less, and else QUIC.
    #[arg(long, value_name = "auto|quic|tls", default_value_t)]
    pub(crate) link: LinkChoice,
}

/// Where others come in.
#[derive(Clone, Debug, Args)]
pub(crate) struct ListenArg {
    /// Address to listen on, such as 0.0.0.0:7000: for QUIC its UDP port, for TLS its TCP port.
    #[arg(long = "listen", value_name = "ADDR", value_parser = address)]
    pub(crate) addr: SocketAddr,
    /// Take others in over `quic` only, over `tls` only, or both (`auto`).
    #[arg(long, value_name = "auto|quic|tls", default_value_t)]
    pub(crate) link: LinkChoice,
}

#[derive(Debug, Args)]
pub(crate) struct ServeSpool {
    /// What `ferry migrate --spool` wrote.
    pub(crate) dir: PathBuf,
    #[command(flatten)]
    pub(crate) there: Destination,
    /// Most that page data may take of the link, such as 1Gbit or 100Mbit.
    #[arg(long, value_name = "RATE", value_parser = parse_rate)]
    pub(crate) bandwidth: Option<u64>,
    /// When the link is lost, try for this long to come back.
    #[arg(long, value_name = "TIME", default_value = "2m", value_parser = humantime::parse_duration)]
    pub(crate) rejoin: Duration,
    /// Print one JSON object.
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum ModeArg {
    /// Rounds while they pay; where they do not, the rest after the hand-over: it always ends.
    Auto,
    /// Rounds of dirty pages while the guest runs, then a short stop: all pages or none.
    PreCopy,
    /// The hand-over first; pages as they are needed, and all others in the background.
    PostCopy,
    /// One round, then the hand-over, then what was dirtied meanwhile.
    Hybrid,
}

impl From<ModeArg> for Mode {
    fn from(arg: ModeArg) -> Self {
        match arg {
            ModeArg::Auto => Self::Auto,
            ModeArg::PreCopy => Self::PreCopy,
            ModeArg::PostCopy => Self::PostCopy,
            ModeArg::Hybrid => Self::Hybrid,
        }
    }
}
