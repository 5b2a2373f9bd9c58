//! One state of the whole world: two hosts, the links between them, and what may still go wrong.

use super::destination::Ended;
use super::source::End;
use super::table::{Id, Mask, MessageId};

/// No machine here has more pages.
pub(crate) const PAGES: usize = 2;

/// A page's content is how often it was written.
pub(crate) type Content = u8;

#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub(crate) struct State {
    pub(crate) source: SourceHost,
    pub(crate) destination: DestinationHost,
    /// The link that the source opened last.
    pub(crate) link: Link,
    /// One before it, while the destination listens to it.
    pub(crate) old: Option<Link>,
    /// The rejoining hello of an older link that is still on its way.
    pub(crate) late_hello: Option<u8>,
    /// Batches of older lanes that are still worked on at the destination.
    pub(crate) stragglers: Vec<Batch>,
    pub(crate) left: Faults,
    /// A rule was broken on the way here.
    pub(crate) broken: Option<Broken>,
    /// Who crashed had the machine, or pages of it that nobody else had.
    pub(crate) lost: bool,
}

/// How often each thing may still go wrong.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub(crate) struct Faults {
    /// Pages written by the guest.
    pub(crate) writes: u8,
    pub(crate) cuts: u8,
    /// Time-outs of answers that would have come.
    pub(crate) early_ticks: u8,
    pub(crate) cancels: u8,
    /// The destination cannot do what it should: build, place pages, load, resume.
    pub(crate) refusals: u8,
    /// The source cannot do what it should.
    pub(crate) failures: u8,
    /// A lane brings damaged pages.
    pub(crate) bad_pages: u8,
    /// The destination cannot place pages any more.
    pub(crate) paging_breaks: u8,
    pub(crate) source_crashes: u8,
    pub(crate) destination_crashes: u8,
    /// In place of a destination that crashed, another process answers.
    pub(crate) restarts: u8,
    /// The operator takes up what was detached.
    pub(crate) reattaches: u8,
    /// The operator lets the machine go on at its source.
    pub(crate) fences: u8,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(crate) enum Broken {
    /// The destination runs on memory that is not what the guest had.
    Memory,
    /// On state that was saved at another pause.
    DeviceState,
    Digests,
    FinishedTwice,
    PermitFromNowhere,
}

#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub(crate) struct SourceHost {
    pub(crate) machine: Id,
    pub(crate) alive: bool,
    pub(crate) runs: bool,
    /// The guest's permit, by its hand-overs.
    pub(crate) permit: Option<u8>,
    /// There is a guest, and not only a spool.
    pub(crate) guest: bool,
    pub(crate) memory: [Content; PAGES],
    pub(crate) tracking: bool,
    pub(crate) dirty: Mask,
    pub(crate) pauses: u8,
    /// What the engine was asked for, in order.
    pub(crate) orders: Vec<Order>,
    pub(crate) rounds: Vec<Round>,
    pub(crate) lanes: Lanes,
    pub(crate) serving: Option<Serving>,
    /// What the last link had not been sent; only where a fault is planted.
    pub(crate) unsent: Option<Mask>,
    /// A lane of the present link was found lost.
    pub(crate) lane_lost: bool,
    /// The end of its control channel was noticed.
    pub(crate) unlinked: bool,
    /// It waits for the answer to an attempt to come back.
    pub(crate) asking: bool,
    pub(crate) end: Option<End>,
    /// The state in which it ended with a stub, or with pages that are only here.
    pub(crate) detached: Option<Id>,
    /// The state in which the spool was begun.
    pub(crate) spool: Option<Id>,
}

/// What the source's engine carries out and answers.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(crate) enum Order {
    /// Done; the answer is on its way.
    Tracked(Mask),
    Harvested(Mask),
    Paused(u8),
    Saved(u8),
    Digested(u64),
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(crate) struct Round {
    pub(crate) number: u8,
    pub(crate) unsent: Mask,
    pub(crate) batches: u8,
    /// The guest runs: pages are re-armed before they are read.
    pub(crate) rearm: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(crate) enum Lanes {
    Closed,
    Opening,
    Open,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(crate) struct Serving {
    pub(crate) round: u8,
    pub(crate) owed: Mask,
    pub(crate) unsent: Mask,
    pub(crate) answered: Mask,
    pub(crate) push: bool,
}

#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub(crate) struct DestinationHost {
    pub(crate) machine: Id,
    pub(crate) process: Process,
    pub(crate) runs: bool,
    /// The hand-overs of the permit by which it ran.
    pub(crate) ran_by: Option<u8>,
    /// Round and content of each page that came.
    pub(crate) pages: [(u8, Content); PAGES],
    pub(crate) stage: Stage,
    pub(crate) orders: Vec<Task>,
    /// A page that the loader waits for.
    pub(crate) wants: Mask,
    pub(crate) listens: Listens,
    /// The link that it listens to was found lost.
    pub(crate) unlinked: bool,
    /// Of the state that was loaded: at which pause it was saved.
    pub(crate) state: u8,
    pub(crate) paging_broken: bool,
    pub(crate) end: Option<Ended>,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(crate) enum Process {
    Alive,
    Dead,
    /// Another one, at the same address, which knows no session.
    Restarted,
}

/// What becomes of pages that come.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(crate) enum Stage {
    Filling,
    Closed,
    Paging { missing: Mask, after: u8 },
    Drained,
}

/// What the destination's engine carries out and answers.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(crate) enum Task {
    Build,
    Page { owed: Mask, after: u8 },
    Load(u8),
    Resume(u8),
    Digest,
    AllHere,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(crate) enum Listens {
    /// To the link that the source opened last.
    Newest,
    Older,
    Nowhere,
}

/// One connection attempt of the source: a control channel, a lane, and an urgent lane, each in its own order.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub(crate) struct Link {
    pub(crate) carries: Carries,
    pub(crate) to_destination: Vec<Packet>,
    pub(crate) to_source: Vec<MessageId>,
    pub(crate) lane: Vec<Batch>,
    pub(crate) urgent: Vec<Batch>,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(crate) enum Carries {
    Yes,
    /// Each side goes on until it notices, and what is on the way may come or not. Lanes carry nothing more.
    Cut,
    /// All that was said still comes; then its end is noticed.
    ClosedBySource,
    ClosedByDestination,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(crate) enum Packet {
    /// The source is here again, and knows these rounds to be done.
    Hello {
        done: u8,
    },
    Message {
        id: MessageId,
        commits: bool,
    },
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(crate) struct Batch {
    pub(crate) round: u8,
    pub(crate) page: u8,
    pub(crate) content: Content,
}

impl Link {
    pub(crate) fn new(carries: Carries) -> Self {
        Self {
            carries,
            to_destination: Vec::new(),
            to_source: Vec::new(),
            lane: Vec::new(),
            urgent: Vec::new(),
        }
    }
}

impl State {
    pub(crate) fn break_rule(&mut self, rule: Broken) {
        self.broken.get_or_insert(rule);
    }

    /// The order-free digest of a memory.
    pub(crate) fn digest(memory: impl Iterator<Item = Content>) -> u64 {
        memory.enumerate().map(|(page, content)| u64::from(content) << (8 * page)).sum()
    }

    pub(crate) fn missing(&self) -> Mask {
        match self.destination.stage {
            Stage::Paging { missing, .. } => missing,
            _ => 0,
        }
    }
}
