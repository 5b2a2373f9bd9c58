//! The network in memory: it delays, reorders across channels, cuts and loses.
//!
//! What travels belongs to a *link*: the control channel, the lanes and the urgent channel that one
//! connection attempt opened. A cut takes what is on the link with it, and whoever comes back opens the next
//! link. What happens on a host is kept in the same order of events, and belongs to no link.

use std::collections::BTreeMap;

use ferry_protocol::{DestinationEvent, SourceEvent, ToDestination, ToSource};
use rand::RngExt;
use rand::rngs::SmallRng;

pub(crate) const CONTROL: usize = 0;
pub(crate) const LANES: usize = 3;
pub(crate) const URGENT: usize = LANES + 1;

/// Pages by number, with what they hold.
pub(crate) type Pages = Vec<(u64, u64)>;

#[derive(Debug)]
pub(crate) enum Packet {
    ToDestination(ToDestination),
    ToSource(ToSource),
    Batch {
        link: u32,
        round: u32,
        pages: Pages,
    },
    /// A second copy of a batch, which only a faulty lane makes.
    Echo {
        round: u32,
        pages: Pages,
    },
    /// The urgent channel joins the session.
    UrgentOpen,
    /// The destination asks for a page.
    Request(u64),
    /// The source is here again.
    Hello {
        done: u32,
    },
    /// The source closed its side.
    Closed,

    /// The link of that number is known to be lost.
    SourceLost(u32),
    DestinationLost(u32),
    Event(SourceEvent),
    DestinationEvent(DestinationEvent),
    /// The source pushes its next batch, if it still serves under that number.
    PushTurn(u32),
    /// The kernel's word of a touch of an absent page reaches whoever serves it.
    Fault {
        vcpu: usize,
        page: u64,
    },
    /// An admitted page is copied.
    Installed {
        round: u32,
        page: u64,
        content: u64,
    },
    /// The destination's guest gives memory up.
    Discard,
    Fate(Fate),
}

/// What happens to a migration from outside.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fate {
    Cut,
    Cancel,
    SourceDies,
    DestinationDies,
    PagingBreaks,
    /// The machine is thrown away at the destination.
    Abandoned,
    /// The operator takes a detached migration up again.
    Reattach,
}

pub(crate) struct Network {
    /// By time, and by a number that keeps each channel's order.
    in_flight: BTreeMap<(u64, u64), (Option<u32>, Packet)>,
    serial: u64,
    /// Pages that had reached the destination's host when their link was lost, and are worked on when the
    /// next one opens.
    held: Vec<Packet>,
    /// A commit that was lost with its link.
    pub(crate) late_commit: Option<ToDestination>,
    channel_free_at: [u64; URGENT + 1],
    pub(crate) latency_us: u64,
    /// The link that the source opened last, and whether it carries.
    pub(crate) link: u32,
    pub(crate) up: bool,
    /// No link can be opened before.
    pub(crate) down_until: u64,
}

impl Network {
    pub(crate) fn new(latency_us: u64) -> Self {
        Self {
            in_flight: BTreeMap::new(),
            serial: 0,
            held: Vec::new(),
            late_commit: None,
            channel_free_at: [0; URGENT + 1],
            latency_us,
            link: 0,
            up: true,
            down_until: 0,
        }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.in_flight.is_empty()
    }

    pub(crate) fn next_at(&self) -> Option<u64> {
        self.in_flight.keys().next().map(|k| k.0)
    }

    pub(crate) fn pop(&mut self) -> Option<Packet> {
        self.in_flight.pop_first().map(|(_, (_, packet))| packet)
    }

    fn insert(&mut self, at: u64, link: Option<u32>, packet: Packet) {
        self.serial += 1;
        self.in_flight.insert((at, self.serial), (link, packet));
    }

    /// Something that happens on a host at `at`, whatever becomes of the link.
    pub(crate) fn at(&mut self, at: u64, packet: Packet) {
        self.insert(at, None, packet);
    }

    /// Something that happens on a host at `at`, if the link lives until then.
    pub(crate) fn at_on_link(&mut self, at: u64, packet: Packet) {
        if self.up {
            self.insert(at, Some(self.link), packet);
        }
    }

    /// Puts a packet on a channel: delayed, never reordered within it; lost if the link is.
    pub(crate) fn send(&mut self, now: u64, rng: &mut SmallRng, channel: usize, packet: Packet) {
        let delay = self.latency_us + rng.random_range(0..self.latency_us * 2);
        let at = (now + delay).max(self.channel_free_at[channel]);
        self.channel_free_at[channel] = at;
        self.at_on_link(at, packet);
    }

    /// The link ends, and with it what is on it; whether it was up. Some pages had reached the
    /// destination's host, and are worked on much later.
    pub(crate) fn lose_link(&mut self, rng: &mut SmallRng) -> bool {
        let survive = if rng.random_bool(0.5) { 0.9 } else { 0.1 };
        for ((at, serial), (link, packet)) in std::mem::take(&mut self.in_flight) {
            let pages = matches!(packet, Packet::Batch { .. } | Packet::Echo { .. });
            if link.is_none() {
                self.in_flight.insert((at, serial), (None, packet));
            } else if let Packet::ToDestination(commit @ ToDestination::Commit { .. }) = packet {
                self.late_commit = Some(commit);
            } else if pages && rng.random_bool(survive) {
                match rng.random_range(0..3) {
                    0 => self.held.push(packet),
                    1 => self.at(at + rng.random_range(0..20_000), packet),
                    _ => self.at(at + rng.random_range(0..6_000_000), packet),
                }
            }
        }
        std::mem::replace(&mut self.up, false)
    }

    /// The next link is up.
    pub(crate) fn open_link(&mut self, now: u64, rng: &mut SmallRng) {
        self.link += 1;
        self.up = true;
        self.channel_free_at = [0; URGENT + 1];
        for packet in std::mem::take(&mut self.held) {
            self.at(now + rng.random_range(0..self.latency_us * 8), packet);
        }
    }
}
