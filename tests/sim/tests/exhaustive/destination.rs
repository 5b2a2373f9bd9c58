//! The real [`Destination`], as a table is filled with it.

use std::time::Duration;

use ferry_protocol::{
    Arrival, Built, Destination, DestinationAction, DestinationEvent, Fetched, Refusal, ToSource,
};

use super::table::{Facts, Machine, Mask, MessageId, Table, Wire, mask, pages, without_words};

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(crate) enum Event {
    Message(MessageId),
    LinkLost,
    Built(bool),
    Paging(bool),
    AllHere,
    PagingBroken,
    Rejoined { held: Mask, owed: Mask },
    Superseded,
    Tick,
    Installed { round: u8 },
    BadPages,
    Loaded(bool),
    Resumed(bool),
    Digest(u64),
}

/// [`DestinationAction`] in numbers.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Action {
    Send(MessageId),
    Build,
    AcceptLanes,
    Clear(Mask),
    Hold,
    Page { owed: Mask, after: u8 },
    Load(u8),
    Resume(u8),
    Digest,
    Finish(Ended),
}

/// [`Arrival`] without its words.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(crate) enum Ended {
    Runs(Option<bool>),
    Void,
}

pub(crate) struct RealDestination {
    machine: Destination,
    now: Duration,
}

fn real(event: Event, wire: &Wire) -> DestinationEvent {
    let words = String::new;
    let done = |ok: bool| if ok { Ok(()) } else { Err(words()) };
    match event {
        Event::Message(id) => DestinationEvent::Message(wire.get(id)),
        Event::LinkLost => DestinationEvent::LinkLost(words()),
        Event::Built(true) => DestinationEvent::Built(Ok(Built::default())),
        Event::Built(false) => DestinationEvent::Built(Err(vec![Refusal::new("memory", "")])),
        Event::Paging(ok) => DestinationEvent::Paging(done(ok)),
        Event::AllHere => DestinationEvent::AllHere(Fetched::default()),
        Event::PagingBroken => DestinationEvent::PagingBroken(words()),
        Event::Rejoined { held, owed } => {
            DestinationEvent::Rejoined { held: pages(held), owed: pages(owed) }
        }
        Event::Superseded => DestinationEvent::Superseded,
        Event::Tick => DestinationEvent::Tick,
        Event::Installed { round } => DestinationEvent::Installed { round: round.into() },
        Event::BadPages => DestinationEvent::BadPages(words()),
        Event::Loaded(ok) => DestinationEvent::Loaded(done(ok)),
        Event::Resumed(ok) => DestinationEvent::Resumed(done(ok)),
        Event::Digest(sum) => DestinationEvent::Digest(Some(sum)),
    }
}

/// The message without its words.
fn bare(message: ToSource) -> ToSource {
    let reason = String::new();
    match message {
        ToSource::Failed { .. } => ToSource::Failed { reason },
        ToSource::CommitRefused { .. } => ToSource::CommitRefused { reason },
        other => other,
    }
}

impl Machine for RealDestination {
    type Event = Event;
    type Action = Action;
    type Origin = ();

    fn begin((): (), _: &Table<Self>) -> Self {
        Self { machine: Destination::new(77, 1), now: Duration::ZERO }
    }

    fn feed(&mut self, event: Event, wire: &Wire) -> Vec<Action> {
        if matches!(event, Event::Tick) {
            self.now = self.machine.deadline().unwrap_or(self.now);
        }
        self.machine.handle(self.now, real(event, wire));
        let mut actions = Vec::new();
        while let Some(action) = self.machine.poll() {
            actions.push(match action {
                DestinationAction::Send(message) => Action::Send(wire.put(&bare(message))),
                DestinationAction::Build { .. } => Action::Build,
                DestinationAction::AcceptLanes { .. } => Action::AcceptLanes,
                DestinationAction::Clear(stale) => Action::Clear(mask(&stale)),
                DestinationAction::Hold => Action::Hold,
                DestinationAction::Page { owed, after } => {
                    Action::Page { owed: mask(&owed), after: after.try_into().expect("few rounds") }
                }
                DestinationAction::Load(state) => Action::Load(state[0]),
                DestinationAction::Resume(permit) => {
                    Action::Resume(permit.handovers().try_into().expect("few hand-overs"))
                }
                DestinationAction::Digest => Action::Digest,
                DestinationAction::Finish(Arrival::Void(_)) => Action::Finish(Ended::Void),
                DestinationAction::Finish(Arrival::Runs { digest_verified }) => {
                    Action::Finish(Ended::Runs(digest_verified))
                }
            });
        }
        actions
    }

    fn text(&self) -> String {
        without_words(&format!("{:?}", self.machine))
    }

    fn facts(&self) -> Facts {
        let text = self.text();
        let phase = text.split("phase: ").nth(1).unwrap_or("").split([' ', ',', '(']).next();
        const NAMES: [&str; 11] = [
            "Waiting",
            "Building",
            "Receiving",
            "Alone",
            "Committed",
            "Arming",
            "Loading",
            "Resuming",
            "Fetching",
            "Running",
            "Done",
        ];
        Facts {
            phase: NAMES.into_iter().find(|n| Some(*n) == phase).expect("a known phase"),
            has_permit: text.contains(" permit: Some(RunPermit"),
            has_stub: false,
            has_deadline: self.machine.deadline().is_some(),
            verdict: Some(self.machine.verdict()),
        }
    }
}
