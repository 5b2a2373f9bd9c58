//! What the source is told, and what it asks of its engine.

use ferry_pages::PageSet;

use crate::RunPermit;
use crate::messages::{ToDestination, ToSource};
use crate::outcome::{Outcome, Progress};
use crate::policy::Goals;

/// What happened, told to the source.
#[derive(Debug)]
pub enum SourceEvent {
    /// The control channel is open.
    Connected,
    /// A message of the destination.
    Message(ToSource),
    /// The control channel or a lane broke, or could not be opened.
    LinkLost(String),
    /// Answer to `OpenLanes`.
    LanesOpen,
    /// Answer to `StartTracking`: the pages that hold data.
    TrackingStarted(PageSet),
    /// Answer to `Harvest`.
    Harvested(PageSet),
    /// Answer to `SendPages`: all of it is on the lanes.
    RoundSent {
        /// Which round.
        round: u32,
        /// Batches sent.
        batches: u64,
        /// Bytes sent.
        bytes: u64,
        /// Pages that were named only: the destination has them.
        same: u64,
    },
    /// Answer to `Pause`.
    Paused(RunPermit),
    /// Answer to `SaveState`.
    StateSaved(Vec<u8>),
    /// Answer to `DigestMemory`.
    MemoryDigest(u64),
    /// An action could not be carried out.
    Failed(String),
    /// The operator wants it to end.
    Cancel,
    /// The operator has other goals from now on.
    Tune(Goals),
    /// `Throttle` could not be carried out, and never can be.
    CannotThrottle(String),
    /// The deadline passed.
    Tick,
}

/// What the engine does next.
#[derive(Debug, PartialEq)]
pub enum SourceAction {
    /// Send on the control channel.
    Send(ToDestination),
    /// Open the lanes of `session`.
    OpenLanes {
        /// Token for their hello.
        session: u128,
        /// Codecs that may be used, a bit each.
        codecs: u8,
    },
    /// The destination has these pages in an old copy, with these digests in their order: in rounds while the
    /// guest runs, and after the hand-over, a page is named and not sent where its content has that digest.
    /// The page is re-armed before it is read for that, as for sending.
    Recall {
        /// The pages.
        pages: PageSet,
        /// As many as there are pages.
        digests: Vec<u64>,
    },
    /// The old copy cannot be read: name no more pages of it.
    Forget,
    /// Start the trackers, then find the pages that hold data.
    StartTracking,
    /// Re-arm these pages without sending them, so that the next harvest says which are written. Nothing was sent
    /// before.
    Sample(PageSet),
    /// Collect what was dirtied.
    Harvest,
    /// Re-arm and send these pages on the lanes.
    SendPages {
        /// Which round.
        round: u32,
        /// The pages.
        pages: PageSet,
    },
    /// Hold vCPUs back for this many percent of their time from now on; 0: not at all.
    Throttle(u8),
    /// Stop the vCPUs.
    Pause,
    /// Save vCPU and device state.
    SaveState,
    /// Let the guest run (on) here.
    Resume(RunPermit),
    /// These pages were harvested and not delivered: give them back.
    ReturnDirty(PageSet),
    /// Stop the trackers.
    StopTracking,
    /// From now on, send each page that the destination asks for, at once. Lanes push nothing yet.
    Serve {
        /// The number under which pages go.
        round: u32,
        /// The pages, which no longer change.
        owed: PageSet,
        /// Pages written lately, the latest first.
        record: Vec<PageSet>,
    },
    /// Push what `Serve` named on the lanes, too.
    Push,
    /// Drop every connection, and say hello to `session` again; the answer is a `Message` or
    /// `LinkLost`. Pages of rounds under way are re-armed no more once this returns, and
    /// nothing that an older connection still brings is an event.
    Rejoin {
        /// The session.
        session: u128,
        /// Rounds up to this one are done.
        done: u32,
    },
    /// Compute the digest of all memory (the guest stands still).
    DigestMemory,
    /// Tell whoever watches.
    Tell(Progress),
    /// The migration is over.
    Finish(Outcome),
}
