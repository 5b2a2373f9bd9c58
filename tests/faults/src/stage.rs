//! Two hosts in two network namespaces, a relay for their only cable, a machine that moves, and the
//! moment at which a fault strikes.
//!
//! No hook is in the product: a phase is long because the guest's memory, the limit on the link or the
//! cable's delay make it long, and it is known by what the processes say.

use std::net::SocketAddr;
use std::time::Duration;

use ferry_e2e::network::{ADDRESSES, Network};
use ferry_e2e::{Hosts, Running};
use ferry_transport::{LinkChoice, Over};

use crate::cable::Harm;
use crate::relay::Relay;

/// What is moved.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Guest {
    /// Memory and threads.
    Process,
    /// A KVM machine.
    Kvm,
}

impl Guest {
    /// What `--kernel` is.
    pub fn kernel(self) -> &'static str {
        match self {
            Self::Process => ":process",
            Self::Kvm => ":guest",
        }
    }
}

/// When a fault strikes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// All of a move by pre-copy.
    PreCopy,
    /// All of a move by post-copy.
    PostCopy,
    /// The offer has arrived, its answer has not.
    Negotiation,
    /// In round 1.
    FirstRound,
    /// In round 2.
    LaterRound,
    /// The guest stands still, and its last pages are sent.
    LastPages,
    /// The run permit was sent, and has not arrived.
    Commit,
    /// The machine runs at the destination, which its source has not heard.
    Switch,
    /// The source has heard it, and compares memory.
    Verification,
    /// After a hand-over by post-copy, while pages are owed.
    Fetching,
}

/// Four MiB that take two seconds, what is dirty then less than half as long, and so on.
const ROUNDS: &str =
    "pattern=working-set set=4M rate=200 random=100 arena=4M fill=all fill_random=100";
const AT_16_MBIT: [&str; 4] = ["--mode", "pre-copy", "--bandwidth", "16Mbit"];
/// Four MiB that are always dirty: the guest stands still for eight seconds. With less than the idle
/// time-out, a link that fails meanwhile is missed only after the permit was sent.
const STANDS: &str =
    "pattern=working-set set=4M rate=2000 random=100 arena=4M fill=all fill_random=100";
const LONG_STOP: [&str; 6] =
    ["--mode", "pre-copy", "--bandwidth", "4Mbit", "--max-downtime", "12s"];
/// So little that the last pages and the permit leave together, in one burst that nobody paces, QUIC or TCP.
const FEW: &str =
    "pattern=working-set set=8K rate=200 random=5 arena=512K fill=all fill_random=100";
/// All memory is written without end, and fetched for five seconds.
const ALL: &str = "pattern=random arena=16M fill=all fill_random=60 random=60 rate=2000";
const FETCHED: [&str; 4] = ["--mode", "post-copy", "--bandwidth", "16Mbit"];
/// A word on its way is on its way for so long.
const LATE: Harm = Harm { delay_ms: 400, ..Harm::NONE };

impl Phase {
    /// For the table.
    pub fn words(self) -> &'static str {
        match self {
            Self::PreCopy => "all of a pre-copy move",
            Self::PostCopy => "all of a post-copy move",
            Self::Negotiation => "negotiation",
            Self::FirstRound => "first round",
            Self::LaterRound => "later round",
            Self::LastPages => "guest paused, last pages",
            Self::Commit => "commit on its way",
            Self::Switch => "runs there, word on its way",
            Self::Verification => "verification",
            Self::Fetching => "fetching after post-copy",
        }
    }

    fn workload(self) -> &'static str {
        match self {
            Self::LastPages => STANDS,
            Self::Commit | Self::Switch | Self::Verification => FEW,
            Self::Fetching | Self::PostCopy => ALL,
            _ => ROUNDS,
        }
    }

    fn args(self) -> &'static [&'static str] {
        match self {
            // Not below the round trip of a slow cable.
            Self::PreCopy => &["--mode", "pre-copy", "--max-downtime", "500ms"],
            Self::PostCopy => &FETCHED[..2],
            Self::LastPages => &LONG_STOP,
            // Not below the round trip of a late cable.
            Self::Commit | Self::Switch | Self::Verification => {
                &["--mode", "pre-copy", "--max-downtime", "5s"]
            }
            Self::Fetching => &FETCHED,
            _ => &AT_16_MBIT,
        }
    }
}

/// A machine `m` that moves from the first host to the second. What is dropped first ends first.
pub struct Stage {
    /// `ferry vm run`, until it is killed.
    pub runner: Option<Running>,
    /// `ferry receive`, until it is killed.
    pub receiver: Option<Running>,
    /// `ferry migrate`, until it has ended.
    pub moving: Option<Running>,
    /// The cable.
    pub relay: Relay,
    /// The hosts.
    pub hosts: Hosts,
    /// Where the destination listens.
    pub listens: SocketAddr,
    /// What the move goes over.
    link: Over,
    _network: Network,
}

impl Stage {
    /// Boots the machine. None, with a word on standard output, where there can be no namespaces.
    pub fn new(guest: Guest, link: Over, phase: Phase, seed: u64) -> Option<Self> {
        let network = Network::apart(1500)?;
        let mut hosts = Hosts::new();
        hosts.source.before = network.at(0);
        hosts.destination.before = network.at(1);
        let relay = Relay::new(&network, seed);
        let listen = format!("{}:0", ADDRESSES[1]);
        let (receiver, listens) = hosts.destination.receive_on(&listen, &[]);
        let runner = hosts.source.boot("m", guest.kernel(), &["--cmdline", phase.workload()]);
        let (runner, receiver) = (Some(runner), Some(receiver));
        let moving = None;
        Some(Self { runner, receiver, moving, relay, hosts, listens, link, _network: network })
    }

    /// Begins the move; back when `phase` is reached.
    pub fn reach(&mut self, phase: Phase, rejoin_s: u64) {
        if [Phase::Negotiation, Phase::Commit, Phase::Switch, Phase::Verification].contains(&phase)
        {
            self.relay.set(LATE, LATE);
        }
        let rejoin = format!("{rejoin_s}s");
        let link = LinkChoice::Only(self.link).to_string();
        let args = [phase.args(), &["--rejoin", &rejoin, "--link", &link]].concat();
        let moving = self.hosts.source.start_migrate("m", self.listens, &args);
        let receiver = self.receiver.as_ref().expect("it lives so far");
        match phase {
            Phase::PreCopy | Phase::PostCopy => {}
            Phase::Negotiation => drop(receiver.line("is coming from")),
            Phase::FirstRound => drop(moving.line("round 1: ")),
            Phase::LaterRound => drop(moving.line("round 2: ")),
            Phase::LastPages => drop(moving.line("the guest stands still")),
            Phase::Commit => {
                moving.line("the run permit is on its way");
                // It is said before it leaves, and arrives long after this.
                std::thread::sleep(Duration::from_millis(LATE.delay_ms / 4));
            }
            Phase::Switch => drop(receiver.line("`m` runs here")),
            Phase::Verification => drop(moving.line("the machine runs at the destination")),
            Phase::Fetching => drop(moving.line("it fetches ")),
        }
        self.moving = Some(moving);
    }

    /// Starts the destination anew, if it was killed, and joins the cable.
    pub fn mend(&mut self) {
        self.relay.set(Harm::NONE, Harm::NONE);
        if self.receiver.is_none() {
            let listens = self.listens.to_string();
            self.receiver = Some(self.hosts.destination.receive_on(&listens, &[]).0);
        }
    }
}
