//! The network in memory: it delays, reorders across channels, duplicates, cuts and loses.
//!
//! What travels belongs to a *link*: the control channel, the lanes and the urgent channel that one
//! connection attempt opened. A cut takes what is on the link with it, but for what had reached the other host
//! already: the first messages of each direction, in order, and any of the pages. Whoever comes back opens the
//! next link. What happens on a host is kept in the same order of events, and belongs to no link.

use std::collections::BTreeMap;

use ferry_protocol::{DestinationEvent, SourceEvent, ToDestination, ToSource, wire};
use rand::RngExt;
use rand::rngs::SmallRng;

use super::memory::{Mask, Stamp};
use super::plan::Fate;
use crate::rules::{Kept, Rule};

pub(crate) const CONTROL: usize = 0;
pub(crate) const LANES: usize = 3;
pub(crate) const URGENT: usize = LANES + 1;
/// What the destination says on the lanes.
pub(crate) const ACKS: usize = URGENT + 1;
const CHANNELS: usize = ACKS + 1;

/// Of a machine of 64 pages. The longest message has a digest of each page.
const LONGEST_MESSAGE_BYTES: usize = 1024;
/// In one direction: nobody says more without an answer.
const MOST_MESSAGES: usize = 8;
/// On one link: the last rounds, or what is owed, both as pushes and as answers, and some twice.
const MOST_BATCHES: usize = 256;

/// Pages by number, with what they hold; nothing where the destination's old copy has it.
pub(crate) type Pages = Vec<(u64, Option<Stamp>)>;

/// Why a batch travels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// It is counted in its round.
    Lane,
    /// A second copy, which is not.
    Echo,
    /// Unasked, after the hand-over; acknowledged to whom served under that number.
    Push { turn: u32, bytes: u64, sent_at: u64 },
    /// Asked for.
    Urgent,
}

#[derive(Clone, Debug)]
pub(crate) struct Batch {
    pub(crate) link: u32,
    pub(crate) round: u32,
    /// The order in which batches were read from memory.
    pub(crate) serial: u32,
    pub(crate) kind: Kind,
    pub(crate) pages: Pages,
}

#[derive(Debug)]
pub(crate) enum Packet {
    /// A control message as it travels, and on which link.
    ToDestination(u32, Vec<u8>),
    ToSource(u32, Vec<u8>),
    Batch(Batch),
    /// So many bytes of pushed pages were taken in.
    Ack {
        turn: u32,
        bytes: u64,
        sent_at: u64,
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
    /// Only a lane of it.
    DestinationLaneLost(u32),
    /// For the process of that number.
    Event(u32, SourceEvent),
    DestinationEvent(DestinationEvent),
    /// The next batch of a round is read and sent, if nobody ended that since.
    RoundTurn(u32),
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
        content: Stamp,
    },
    /// A batch is installed, after it was acknowledged: a fault of our own.
    InstallLate(Batch),
    /// The destination's guest gives memory up.
    Discard,
    Fate(Fate),
}

impl Packet {
    fn is_message(&self) -> bool {
        matches!(self, Self::ToDestination(..) | Self::ToSource(..) | Self::Hello { .. })
    }

    /// Whether it travels: a message, or pages.
    pub(crate) fn travels(&self) -> Option<Travels> {
        match self {
            Self::Batch(_) | Self::Request(_) | Self::Ack { .. } => Some(Travels::Pages),
            _ => self.is_message().then_some(Travels::Message),
        }
    }
}

/// What a misfortune may be bound to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Travels {
    Message,
    Pages,
}

pub(crate) struct Network {
    /// By time, and by a number that keeps each channel's order.
    in_flight: BTreeMap<(u64, u64), (Option<u32>, Packet)>,
    serial: u64,
    /// Pages that had reached the destination's host when their link was lost, and are worked on when the
    /// next one opens.
    held: Vec<Packet>,
    /// A commit that was lost with its link.
    pub(crate) late_commit: Option<Vec<u8>>,
    channel_free_at: [u64; CHANNELS],
    /// Nothing that is put on these comes.
    broken: [bool; CHANNELS],
    /// The present link has more than the control channel.
    pub(crate) lanes_open: bool,
    pub(crate) latency_us: u64,
    /// The link that the source opened last, and whether it carries.
    pub(crate) link: u32,
    pub(crate) up: bool,
    /// No link can be opened before.
    pub(crate) down_until: u64,
    /// On the way on the present link: to the destination, to the source, pages.
    outstanding: [usize; 3],
}

fn direction(packet: &Packet) -> Option<usize> {
    match packet {
        Packet::ToDestination(..) | Packet::Hello { .. } => Some(0),
        Packet::ToSource(..) => Some(1),
        Packet::Batch(_) => Some(2),
        _ => None,
    }
}

impl Network {
    pub(crate) fn new(latency_us: u64) -> Self {
        Self {
            in_flight: BTreeMap::new(),
            serial: 0,
            held: Vec::new(),
            late_commit: None,
            channel_free_at: [0; CHANNELS],
            broken: [false; CHANNELS],
            lanes_open: false,
            latency_us,
            link: 0,
            up: true,
            down_until: 0,
            outstanding: [0; 3],
        }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.in_flight.is_empty()
    }

    pub(crate) fn next_at(&self) -> Option<u64> {
        self.in_flight.first_key_value().map(|(k, _)| k.0)
    }

    pub(crate) fn pop(&mut self) -> Option<Packet> {
        let (_, (link, packet)) = self.in_flight.pop_first()?;
        if link.is_some()
            && let Some(direction) = direction(&packet)
        {
            self.outstanding[direction] -= 1;
        }
        Some(packet)
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
            if let Some(direction) = direction(&packet) {
                self.outstanding[direction] += 1;
            }
            self.insert(at, Some(self.link), packet);
        }
    }

    /// Puts a packet on a channel: delayed, never reordered within it; lost if the link is.
    pub(crate) fn send(&mut self, now: u64, rng: &mut SmallRng, channel: usize, packet: Packet) {
        let delay = self.latency_us + rng.random_range(0..self.latency_us * 2);
        if self.broken[channel] {
            return;
        }
        let at = (now + delay).max(self.channel_free_at[channel]);
        self.channel_free_at[channel] = at;
        self.at_on_link(at, packet);
    }

    pub(crate) fn say_to_destination(
        &mut self,
        now: u64,
        rng: &mut SmallRng,
        message: &ToDestination,
    ) -> Kept {
        let packet = Packet::ToDestination(self.link, encoded(message)?);
        self.send(now, rng, CONTROL, packet);
        Ok(())
    }

    pub(crate) fn say_to_source(
        &mut self,
        now: u64,
        rng: &mut SmallRng,
        message: &ToSource,
    ) -> Kept {
        let packet = Packet::ToSource(self.link, encoded(message)?);
        self.send(now, rng, CONTROL, packet);
        Ok(())
    }

    /// No more is on the way than there can be of a machine of this size.
    pub(crate) fn watch(&self) -> Kept {
        let [there, here, batches] = self.outstanding;
        if there > MOST_MESSAGES || here > MOST_MESSAGES || batches > MOST_BATCHES {
            return Err(Rule::Bounded.broken(format!(
                "{there} messages to the destination, {here} to the source and {batches} batches are on \
                 the way"
            )));
        }
        Ok(())
    }

    /// The link ends, and with it what is on it; whether it was up. Some of it had reached the other host:
    /// of each direction the first messages, which come before the loss is known or after, and pages, which
    /// may be worked on much later.
    pub(crate) fn lose_link(&mut self, rng: &mut SmallRng) -> bool {
        let survive = if rng.random_bool(0.5) { 0.9 } else { 0.1 };
        let mut messages = [0, 1].map(|_| if rng.random_bool(0.6) { 0 } else { 3 });
        let slow = [0, 1].map(|_| {
            let most = if rng.random_bool(0.5) { 5_000 } else { 4_000_000 };
            rng.random_range(0..most)
        });
        for ((at, serial), (link, packet)) in std::mem::take(&mut self.in_flight) {
            if link.is_none() {
                self.in_flight.insert((at, serial), (None, packet));
                continue;
            }
            match (&packet, direction(&packet)) {
                (Packet::Batch(_), _) if rng.random_bool(survive) => match rng.random_range(0..3) {
                    0 => self.held.push(packet),
                    1 => self.at(at + rng.random_range(0..20_000), packet),
                    _ => self.at(at + rng.random_range(0..6_000_000), packet),
                },
                (Packet::ToDestination(..) | Packet::ToSource(..), Some(way)) => {
                    if messages[way] > 0 && rng.random_bool(0.8) {
                        messages[way] -= 1;
                        self.at(at + slow[way], packet);
                    } else {
                        messages[way] = 0;
                        self.note_commit(packet);
                    }
                }
                _ => {}
            }
        }
        self.outstanding = [0; 3];
        std::mem::replace(&mut self.up, false)
    }

    /// One lane breaks, or all do, or the urgent one; whether there are any.
    pub(crate) fn break_lanes(&mut self, rng: &mut SmallRng) -> bool {
        if !self.lanes_open {
            return false;
        }
        let lanes = match rng.random_range(0..3) {
            0 => 1..=1,
            1 => 1..=LANES,
            _ => URGENT..=URGENT,
        };
        self.broken[lanes].fill(true);
        true
    }

    /// When the source has all messages that are still on the way to it, at `now` or later.
    pub(crate) fn last_word_at(&self, now: u64) -> u64 {
        let to_source = |p: &Packet| matches!(p, Packet::ToSource(..));
        let last = self.in_flight.iter().rev().find(|(_, (_, packet))| to_source(packet));
        last.map_or(now, |((at, _), _)| *at)
    }

    fn note_commit(&mut self, packet: Packet) {
        if let Packet::ToDestination(_, bytes) = packet
            && let Ok(ToDestination::Commit { .. }) = wire::decode(&bytes)
        {
            self.late_commit = Some(bytes);
        }
    }

    /// The next link is up.
    pub(crate) fn open_link(&mut self, now: u64, rng: &mut SmallRng) {
        self.link += 1;
        self.up = true;
        self.channel_free_at = [0; CHANNELS];
        self.broken = [false; CHANNELS];
        self.lanes_open = false;
        for packet in std::mem::take(&mut self.held) {
            self.at(now + rng.random_range(0..self.latency_us * 8), packet);
        }
    }
}

fn encoded<T: serde::Serialize>(message: &T) -> Kept<Vec<u8>> {
    let bytes = wire::encode(message).map_err(|e| Rule::Bounded.broken(e.to_string()))?;
    if bytes.len() > LONGEST_MESSAGE_BYTES {
        return Err(Rule::Bounded.broken(format!("a message of {} bytes", bytes.len())));
    }
    Ok(bytes)
}

/// The pages of `pages` that are only named.
pub(crate) fn named(pages: &Pages) -> Mask {
    pages.iter().filter(|(_, c)| c.is_none()).fold(0, |m, (p, _)| m | super::memory::bit(*p))
}
