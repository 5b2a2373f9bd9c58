//! The real [`Source`], as a table is filled with it.

use std::time::Duration;

use ferry_protocol::{
    Goals, MachineSpec, Mode, Outcome, PermitStub, Reattach, Source, SourceAction, SourceEvent,
    Spooled, ToDestination, wire,
};

use super::table::{
    Facts, Id, MACHINE, Machine, Mask, MessageId, Table, Wire, duration, field, mask, pages,
    permit, without_words,
};

/// Longer than any answer is waited for: a tick that late ends all attempts to come back.
const VERY_LATE: Duration = Duration::from_secs(1 << 40);
/// How long the source tries to come back, and the destination keeps what came.
const REJOIN_FOR: Duration = Duration::from_secs(1 << 30);
const MAX_TOTAL: Duration = Duration::from_secs(1 << 20);
const DOUBT_TIMEOUT: Duration = Duration::from_secs(30);

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(crate) enum Event {
    Connected,
    Message(MessageId),
    LinkLost,
    LanesOpen,
    TrackingStarted(Mask),
    Harvested(Mask),
    RoundSent {
        round: u8,
        batches: u8,
    },
    Paused(u8),
    StateSaved(u8),
    MemoryDigest(u64),
    Failed,
    Cancel,
    Tick,
    /// After all attempts to come back are over.
    LateTick,
}

/// [`SourceAction`] in numbers.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Action {
    Send { message: MessageId, commits: bool },
    OpenLanes,
    StartTracking,
    Sample(Mask),
    Harvest,
    SendPages { round: u8, pages: Mask },
    Pause,
    SaveState,
    Resume(u8),
    ReturnDirty(Mask),
    StopTracking,
    Serve { round: u8, owed: Mask },
    Push,
    Rejoin { done: u8 },
    DigestMemory,
    Finish(End),
}

/// [`Outcome`] without its words.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(crate) struct End {
    pub(crate) kind: EndKind,
    /// In which phase it ended.
    pub(crate) from: &'static str,
    /// The reason says that the destination broke the protocol.
    pub(crate) blames: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(crate) enum EndKind {
    Completed(Option<bool>),
    Cancelled,
    Refused,
    Failed,
    InDoubt,
    Detached {
        in_doubt: bool,
        has_stub: bool,
    },
    /// Not an outcome: the operator let it go on here.
    Fenced,
}

impl End {
    pub(crate) fn has_stub(self) -> bool {
        matches!(self.kind, EndKind::InDoubt | EndKind::Detached { has_stub: true, .. })
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(crate) enum Origin {
    New(Moves),
    /// By what this state left when it ended as detached.
    Reattached(Id),
    /// By the spool that was begun in this state.
    Spool(Id),
}

/// How a machine moves.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(crate) struct Moves {
    pub(crate) kind: Kind,
    pub(crate) pages: u8,
}

/// What the policy is brought to do by goals.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(crate) enum Kind {
    /// One round, then the switchover.
    PreCopy,
    /// Rounds while they shrink what is dirty, at most four.
    Rounds,
    /// One round, then the hand-over.
    Hybrid,
    /// The hand-over at once.
    PostCopy,
}

impl Kind {
    fn goals(self) -> (Goals, Mode) {
        let (mode, downtime) = match self {
            Self::PreCopy => (Mode::PreCopy, Duration::from_secs(1 << 20)),
            Self::Rounds => (Mode::PreCopy, Duration::from_millis(3)),
            Self::Hybrid => (Mode::Hybrid, Duration::ZERO),
            Self::PostCopy => (Mode::PostCopy, Duration::ZERO),
        };
        (Goals { max_downtime: downtime, max_total: MAX_TOTAL, max_slowdown: 0 }, mode)
    }
}

pub(crate) struct RealSource {
    machine: Source,
    now: Duration,
    /// What the last event left, if it ended the migration so.
    left: Option<Reattach>,
    stub: Option<PermitStub>,
}

impl RealSource {
    fn of(machine: Source) -> Self {
        Self { machine, now: Duration::ZERO, left: None, stub: None }
    }

    /// The permit that the operator's word makes of what is left, by its hand-overs.
    pub(crate) fn fenced(self) -> Option<u8> {
        let of_stub = self.stub.map(PermitStub::fenced_by_operator);
        let permit = of_stub.or(self.left.and_then(Reattach::fenced_by_operator))?;
        Some(small(permit.handovers()))
    }

    fn phase(&self) -> &'static str {
        const NAMES: [&str; 22] = [
            "Connecting",
            "Negotiating",
            "Starting",
            "Sending",
            "Acknowledging",
            "Harvesting",
            "Sampling",
            "Clearing",
            "Cleared",
            "WaitingReady",
            "Pausing",
            "LastHarvest",
            "Saving",
            "HarvestAfterSave",
            "FinalSending",
            "Committed",
            "Doubting",
            "Serving",
            "Rejoining",
            "Reopening",
            "Verifying",
            "Done",
        ];
        let text = format!("{:?}", self.machine);
        let value = field(&text, "phase").expect("a phase").0;
        NAMES.into_iter().find(|name| value.split(' ').next() == Some(name)).expect("a known phase")
    }
}

fn real(event: Event, wire: &Wire) -> SourceEvent {
    let words = String::new;
    match event {
        Event::Connected => SourceEvent::Connected,
        Event::Message(id) => SourceEvent::Message(wire.get(id)),
        Event::LinkLost => SourceEvent::LinkLost(words()),
        Event::LanesOpen => SourceEvent::LanesOpen,
        Event::TrackingStarted(m) => SourceEvent::TrackingStarted(pages(m)),
        Event::Harvested(m) => SourceEvent::Harvested(pages(m)),
        Event::RoundSent { round, batches } => {
            let batches = u64::from(batches);
            SourceEvent::RoundSent { round: round.into(), batches, bytes: batches << 12, same: 0 }
        }
        Event::Paused(handovers) => SourceEvent::Paused(permit(handovers)),
        Event::StateSaved(pause) => SourceEvent::StateSaved(vec![pause]),
        Event::MemoryDigest(sum) => SourceEvent::MemoryDigest(sum),
        Event::Failed => SourceEvent::Failed(words()),
        Event::Cancel => SourceEvent::Cancel,
        Event::Tick | Event::LateTick => SourceEvent::Tick,
    }
}

/// A number of rounds or hand-overs: bounds keep them small.
fn small(number: impl TryInto<u8>) -> u8 {
    number.try_into().ok().expect("bounds keep it small")
}

impl Machine for RealSource {
    type Event = Event;
    type Action = Action;
    type Origin = Origin;

    fn begin(origin: Origin, table: &Table<Self>) -> Self {
        let again = |left| Self::of(Source::reattach(left, Goals::default(), REJOIN_FOR));
        match origin {
            Origin::New(Moves { kind, pages }) => {
                let spec = MachineSpec {
                    name: "m".into(),
                    vmm: "model".into(),
                    extents: vec![(0, pages.into())],
                    vcpus: 1,
                    cpu_features: Vec::new(),
                    devices: Vec::new(),
                    config: Vec::new(),
                };
                Self::of(Source::new(spec, Some(MACHINE), 1, 1, kind.goals(), REJOIN_FOR))
            }
            Origin::Reattached(id) => again(table.replay(id).0.left.expect("it was detached")),
            Origin::Spool(id) => {
                // Through its bytes, as from a disk.
                let bytes = wire::encode(&table.replay(id).0.machine.spooled()).expect("it fits");
                let spooled: Spooled = wire::decode(&bytes).expect("it is whole");
                let layout = ferry_pages::Layout::new(vec![ferry_pages::Run::new(0, 8)]);
                again(spooled.reattach(&layout.expect("a layout")).expect("pages of the machine"))
            }
        }
    }

    fn feed(&mut self, event: Event, wire: &Wire) -> Vec<Action> {
        match event {
            Event::Tick => self.now = self.machine.deadline().unwrap_or(self.now).max(self.now),
            Event::LateTick => self.now += VERY_LATE,
            _ => {}
        }
        let from = self.phase();
        (self.left, self.stub) = (None, None);
        self.machine.handle(self.now, real(event, wire));
        let mut actions = Vec::new();
        while let Some(action) = self.machine.poll() {
            actions.push(match action {
                SourceAction::Send(ToDestination::Abort { .. }) => {
                    let message = wire.put(&ToDestination::Abort { reason: String::new() });
                    Action::Send { message, commits: false }
                }
                SourceAction::Send(message) => {
                    let commits = matches!(message, ToDestination::Commit { .. });
                    Action::Send { message: wire.put(&message), commits }
                }
                SourceAction::OpenLanes { .. } => Action::OpenLanes,
                SourceAction::StartTracking => Action::StartTracking,
                SourceAction::Sample(pages) => Action::Sample(mask(&pages)),
                SourceAction::Harvest => Action::Harvest,
                SourceAction::SendPages { round, pages } => {
                    Action::SendPages { round: small(round), pages: mask(&pages) }
                }
                SourceAction::Pause => Action::Pause,
                SourceAction::SaveState => Action::SaveState,
                SourceAction::Resume(permit) => Action::Resume(small(permit.handovers())),
                SourceAction::ReturnDirty(pages) => Action::ReturnDirty(mask(&pages)),
                SourceAction::StopTracking => Action::StopTracking,
                SourceAction::Serve { round, owed, .. } => {
                    Action::Serve { round: small(round), owed: mask(&owed) }
                }
                SourceAction::Push => Action::Push,
                SourceAction::Rejoin { done, .. } => Action::Rejoin { done: small(done) },
                SourceAction::DigestMemory => Action::DigestMemory,
                SourceAction::Finish(outcome) => self.end(from, outcome),
                // What whoever watches is told, what becomes of an old copy, which there is none of, and how fast
                // the guest runs.
                SourceAction::Tell(_)
                | SourceAction::Recall { .. }
                | SourceAction::Forget
                | SourceAction::Throttle(_) => continue,
            });
        }
        actions
    }

    /// Instants are left out where only a deadline comes of them, since a tick may come at any moment: what
    /// remains of them is whether the next tick is the last.
    fn text(&self) -> String {
        let told = format!("{:?}", self.machine);
        let (mut text, blames) = (without_words(&told), told.contains("broke the protocol"));
        let deadline = self.machine.deadline();
        let phase = self.phase();
        if phase == "Done" {
            return format!("Done {:?} {:?}", self.left, self.stub);
        }
        let limit = if phase == "Doubting" { DOUBT_TIMEOUT } else { REJOIN_FOR };
        let since = field(&text, "since").and_then(|f| duration(f.0));
        let last = since.zip(deadline).map(|(since, deadline)| deadline >= since + limit);
        for name in ["switchover", "record", "deadline", "wait", "since", "elapsed"] {
            if let Some((_, range)) = field(&text, name) {
                text.replace_range(range, "");
            }
        }
        for name in ["began", "sent"] {
            if let Some((value, range)) = field(&text, name)
                && let Some(at) = duration(value)
            {
                text.replace_range(range, &format!("{:?} ago", self.now.saturating_sub(at)));
            }
        }
        let late = self.now >= MAX_TOTAL;
        format!("{text} {:?} {last:?} {late} {blames}", deadline.is_some())
    }

    fn facts(&self) -> Facts {
        let text = format!("{:?}", self.machine);
        Facts {
            phase: self.phase(),
            has_permit: text.contains(" permit: Some(RunPermit"),
            has_stub: text.contains(" stub: Some(PermitStub"),
            has_deadline: self.machine.deadline().is_some(),
            verdict: None,
        }
    }
}

impl RealSource {
    fn end(&mut self, from: &'static str, outcome: Outcome) -> Action {
        let blames = format!("{outcome:?}").contains("broke the protocol");
        let kind = match outcome {
            Outcome::Completed { digest_verified, .. } => EndKind::Completed(digest_verified),
            Outcome::Cancelled => EndKind::Cancelled,
            Outcome::Refused(_) => EndKind::Refused,
            Outcome::Failed(_) => EndKind::Failed,
            Outcome::InDoubt { permit, .. } => {
                self.stub = Some(permit);
                EndKind::InDoubt
            }
            Outcome::Detached { reattach, .. } => {
                let in_doubt = reattach.is_in_doubt();
                let has_stub = format!("{reattach:?}").contains("permit: Some");
                self.left = Some(reattach);
                EndKind::Detached { in_doubt, has_stub }
            }
        };
        Action::Finish(End { kind, from, blames })
    }
}
