//! The model: what can happen next in a state, and what comes of it.

use std::collections::HashSet;
use std::sync::{Arc, Mutex, PoisonError};

use stateright::{Model, Property};

use super::destination::RealDestination;
use super::rules::{self, Met};
use super::source::{EndKind, Moves, Origin, RealSource};
use super::state::{
    Carries, DestinationHost, Faults, Lanes, Link, Listens, Order, PAGES, Packet, Process,
    SourceHost, Stage, State, Task,
};
use super::table::{Facts, Table, Wire};
use super::{destination, source};

/// A fault of our own, planted to see that the checks find it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Plant {
    Nothing,
    /// The source lets the guest go on when it has waited long enough for word of its commit.
    ResumesOnTimeOut,
    /// The guest goes on while it is thought to stand still.
    DoesNotStop,
    /// The destination says `GoOn` although the commit was whole.
    GoesOnThoughWhole,
    /// A commit of an older link is taken after the source came back.
    TakesLateCommit,
    /// Batches count as installed while they are not.
    CountsTooEarly,
    SkipsHarvestAfterSave,
    /// The source is not told of a lost link.
    HearsOfNoLoss,
    /// A source that comes back serves what it had not sent, and not what is lacking.
    ServesOnlyUnsent,
    /// Another process answers for the destination, and says that the machine never ran.
    StrangerDenies,
    /// The operator says that the destination was switched off, and it was not.
    FenceLies,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(crate) enum Step {
    // What comes by itself.
    DestinationHears,
    DestinationHearsOld,
    SourceHears,
    LaneBrings,
    OldLaneBrings,
    UrgentBrings,
    LaneLost,
    SourceNotices,
    DestinationNotices,
    SourceAnswers,
    LanesOpen,
    LaneSends,
    Pushes(u8),
    ServesUrgent,
    DestinationAnswers,
    Tick,
    LateTick,
    DestinationTick,
    // What may happen, and need not.
    Write(u8),
    DestinationHearsLate,
    Straggler(u8),
    LoaderWants(u8),
    Superseded,
    Cut,
    Cancel,
    EarlyTick,
    SourceFails,
    DestinationRefuses,
    BadPages,
    PagingBreaks,
    SourceCrashes { spool: bool },
    DestinationCrashes,
    Restart,
    // What the operator does.
    Reattach,
    ServeSpool,
    Fence,
}

impl Step {
    /// Comes by itself: who waits for it does not wait for ever.
    pub(crate) fn comes(self) -> bool {
        matches!(
            self,
            Self::DestinationHears
                | Self::DestinationHearsOld
                | Self::SourceHears
                | Self::LaneBrings
                | Self::OldLaneBrings
                | Self::UrgentBrings
                | Self::LaneLost
                | Self::SourceNotices
                | Self::DestinationNotices
                | Self::SourceAnswers
                | Self::LanesOpen
                | Self::LaneSends
                | Self::Pushes(_)
                | Self::ServesUrgent
                | Self::DestinationAnswers
                | Self::Tick
                | Self::LateTick
                | Self::DestinationTick
        )
    }
}

pub(crate) struct World {
    pub(crate) moves: Moves,
    pub(crate) faults: Faults,
    pub(crate) plant: Plant,
    pub(crate) sources: Table<RealSource>,
    pub(crate) destinations: Table<RealDestination>,
    pub(crate) wire: Arc<Wire>,
    /// Which state leads to which, by what comes by itself and by an operator who takes up what was left.
    pub(crate) edges: Mutex<Vec<(u64, u64)>>,
    pub(crate) met: Mutex<Met>,
    pub(crate) reach: Vec<Property<World>>,
    /// States to which a way is wanted.
    pub(crate) wanted: HashSet<u64>,
}

impl World {
    pub(crate) fn new(moves: Moves, faults: Faults, plant: Plant) -> Self {
        let wire = Arc::new(Wire::default());
        Self {
            moves,
            faults,
            plant,
            sources: Table::new(wire.clone()),
            destinations: Table::new(wire.clone()),
            wire,
            edges: Mutex::default(),
            met: Mutex::default(),
            reach: Vec::new(),
            wanted: HashSet::new(),
        }
    }

    pub(crate) fn source(&self, s: &State) -> Facts {
        self.sources.facts(s.source.machine)
    }

    pub(crate) fn destination(&self, s: &State) -> Facts {
        self.destinations.facts(s.destination.machine)
    }

    fn source_steps(&self, s: &State, can: &mut Vec<Step>) {
        let (host, facts) = (&s.source, self.source(s));
        if !host.orders.is_empty() {
            can.push(Step::SourceAnswers);
            if s.left.failures > 0 && !matches!(host.orders[0], Order::Paused(_)) {
                can.push(Step::SourceFails);
            }
        }
        let saves = matches!(host.orders.first(), Some(Order::Saved(_)));
        if s.left.writes > 0 && host.tracking && (host.runs || saves) {
            can.extend((0..self.moves.pages).map(Step::Write));
        }
        if let Some(end) = host.end {
            if s.left.reattaches > 0 && matches!(end.kind, EndKind::Detached { .. }) {
                can.push(Step::Reattach);
            }
            if s.left.fences > 0 && host.detached.is_some() && host.guest && end.has_stub() {
                can.push(Step::Fence);
            }
            return;
        }
        if !s.link.to_source.is_empty() {
            can.push(Step::SourceHears);
        }
        let lost = match s.link.carries {
            Carries::Cut => true,
            Carries::ClosedByDestination => s.link.to_source.is_empty(),
            Carries::Yes | Carries::ClosedBySource => false,
        };
        if lost && !host.unlinked && self.plant != Plant::HearsOfNoLoss {
            can.push(Step::SourceNotices);
            if !host.lane_lost && s.link.carries == Carries::Cut && host.lanes != Lanes::Closed {
                can.push(Step::LaneLost);
            }
        }
        if host.lanes == Lanes::Opening && !host.unlinked && !host.lane_lost {
            can.push(Step::LanesOpen);
        }
        if host.lanes == Lanes::Open {
            if !host.rounds.is_empty() {
                can.push(Step::LaneSends);
            }
            if let Some(serving) = host.serving {
                if serving.push {
                    let unsent = (0..self.moves.pages).filter(|p| serving.unsent >> p & 1 == 1);
                    can.extend(unsent.map(Step::Pushes));
                }
                let asked = s.destination.wants & serving.owed & !serving.answered;
                let reached = s.destination.listens == Listens::Newest;
                if asked != 0 && reached && s.link.carries == Carries::Yes {
                    can.push(Step::ServesUrgent);
                }
            }
        }
        if facts.has_deadline {
            let away = matches!(facts.phase, "Rejoining" | "Doubting");
            if facts.phase == "Sampling" || away && !host.asking {
                can.push(Step::Tick);
            } else if s.left.early_ticks > 0 {
                can.push(Step::EarlyTick);
            }
            if away {
                can.push(Step::LateTick);
            }
        }
        if s.left.cancels > 0 {
            can.push(Step::Cancel);
        }
    }

    fn destination_steps(&self, s: &State, can: &mut Vec<Step>) {
        let host = &s.destination;
        let hears = match s.link.to_destination.first() {
            Some(Packet::Hello { .. }) => host.process != Process::Dead,
            Some(Packet::Message { .. }) => host.listens == Listens::Newest,
            None => false,
        };
        if hears {
            can.push(Step::DestinationHears);
        }
        if host.process != Process::Alive || host.end.is_some() {
            return;
        }
        let facts = self.destination(s);
        if host.listens == Listens::Newest {
            if !s.link.lane.is_empty() {
                can.push(Step::LaneBrings);
            }
            if s.left.bad_pages > 0 && (s.source.lanes == Lanes::Open || !s.link.lane.is_empty()) {
                can.push(Step::BadPages);
            }
            if !s.link.urgent.is_empty() {
                can.push(Step::UrgentBrings);
            }
        }
        if let Some(old) = &s.old {
            if !old.to_destination.is_empty() {
                can.push(Step::DestinationHearsOld);
            }
            if !old.lane.is_empty() {
                can.push(Step::OldLaneBrings);
            }
        }
        if s.late_hello.is_some() {
            can.push(Step::DestinationHearsLate);
        }
        for at in 0..s.stragglers.len() {
            can.push(Step::Straggler(u8::try_from(at).expect("a few")));
        }
        let lost = match (host.listens, s.link.carries) {
            (Listens::Newest, Carries::Cut) | (Listens::Older, _) => true,
            (Listens::Newest, Carries::ClosedBySource) => s.link.to_destination.is_empty(),
            _ => false,
        };
        if lost && !host.unlinked {
            can.push(Step::DestinationNotices);
        }
        if let Some(task) = host.orders.first() {
            let waits = matches!(task, Task::Load(_)) && host.wants & s.missing() != 0;
            if !waits {
                can.push(Step::DestinationAnswers);
            }
            if matches!(task, Task::Load(_)) && host.wants == 0 && s.missing() != 0 {
                let page = s.missing().trailing_zeros();
                can.push(Step::LoaderWants(u8::try_from(page).expect("few pages")));
            }
            if s.left.refusals > 0 && !matches!(task, Task::Digest | Task::AllHere) {
                can.push(Step::DestinationRefuses);
            }
        }
        if facts.has_deadline {
            can.push(Step::DestinationTick);
            if s.source.end.is_some() {
                can.push(Step::Superseded);
            }
        }
        let paging = matches!(host.stage, Stage::Paging { .. });
        if s.left.paging_breaks > 0 && paging && s.missing() != 0 && !host.paging_broken {
            can.push(Step::PagingBreaks);
        }
    }

    fn steps(&self, s: &State, can: &mut Vec<Step>) {
        if s.source.alive {
            self.source_steps(s, can);
            if s.left.source_crashes > 0 {
                can.push(Step::SourceCrashes { spool: false });
                if s.source.spool.is_some() && s.destination.end.is_none() {
                    can.push(Step::SourceCrashes { spool: true });
                }
            }
        } else if s.source.spool.is_some() {
            can.push(Step::ServeSpool);
        }
        self.destination_steps(s, can);
        match s.destination.process {
            Process::Alive if s.left.destination_crashes > 0 => can.push(Step::DestinationCrashes),
            Process::Dead if s.left.restarts > 0 => can.push(Step::Restart),
            _ => {}
        }
        // Time passes where nothing else does.
        if s.source.alive && self.source(s).has_deadline && !can.iter().any(|step| step.comes()) {
            can.push(Step::Tick);
        }
        let joined = s.source.alive && s.source.end.is_none();
        if s.left.cuts > 0 && joined && s.link.carries == Carries::Yes {
            can.push(Step::Cut);
        }
    }

    /// Nothing comes by itself any more.
    pub(crate) fn is_quiet(&self, s: &State) -> bool {
        let mut can = Vec::new();
        self.steps(s, &mut can);
        !can.into_iter().any(Step::comes)
    }
}

impl Model for World {
    type State = State;
    type Action = Step;

    fn init_states(&self) -> Vec<State> {
        let source = SourceHost {
            machine: self.sources.begin(Origin::New(self.moves)),
            alive: true,
            runs: true,
            permit: Some(0),
            guest: true,
            memory: [1; PAGES],
            tracking: false,
            dirty: 0,
            pauses: 0,
            orders: Vec::new(),
            rounds: Vec::new(),
            lanes: Lanes::Closed,
            serving: None,
            unsent: None,
            lane_lost: false,
            unlinked: false,
            asking: false,
            end: None,
            detached: None,
            spool: None,
        };
        let destination = DestinationHost {
            machine: self.destinations.begin(()),
            process: Process::Alive,
            runs: false,
            ran_by: None,
            pages: [(0, 0); PAGES],
            stage: Stage::Filling,
            orders: Vec::new(),
            wants: 0,
            listens: Listens::Newest,
            unlinked: false,
            state: 0,
            paging_broken: false,
            end: None,
        };
        let mut state = State {
            source,
            destination,
            link: Link::new(Carries::Yes),
            old: None,
            late_hello: None,
            stragglers: Vec::new(),
            left: self.faults,
            broken: None,
            lost: false,
        };
        self.feed_source(&mut state, source::Event::Connected);
        vec![state]
    }

    fn actions(&self, state: &State, can: &mut Vec<Step>) {
        // The checker asks once for each state.
        self.met.lock().unwrap_or_else(PoisonError::into_inner).note(self, state);
        if state.broken.is_none() {
            self.steps(state, can);
        }
    }

    fn next_state(&self, last: &State, step: Step) -> Option<State> {
        let mut state = last.clone();
        self.carry_out(&mut state, step);
        state.tidy();
        if step.comes() || matches!(step, Step::Reattach | Step::ServeSpool) {
            let edge = (rules::fingerprint(last), rules::fingerprint(&state));
            self.edges.lock().unwrap_or_else(PoisonError::into_inner).push(edge);
        }
        Some(state)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        let mut all = rules::always();
        all.extend(self.reach.iter().cloned());
        all
    }
}

impl World {
    fn carry_out(&self, s: &mut State, step: Step) {
        use destination::Event as D;
        use source::Event as S;
        match step {
            Step::DestinationHears => match s.link.to_destination.remove(0) {
                Packet::Hello { done } => self.hello(s, done),
                Packet::Message { id, .. } => self.feed_destination(s, D::Message(id)),
            },
            Step::DestinationHearsOld => {
                let old = s.old.as_mut().expect("it listens to it");
                if let Packet::Message { id, .. } = old.to_destination.remove(0) {
                    self.feed_destination(s, D::Message(id));
                }
            }
            Step::DestinationHearsLate => {
                let done = s.late_hello.take().expect("it is on its way");
                self.hello_of_a_dead_link(s, done);
            }
            Step::SourceHears => {
                let id = s.link.to_source.remove(0);
                s.source.asking = false;
                self.feed_source(s, S::Message(id));
            }
            Step::LaneBrings => {
                let batch = s.link.lane.remove(0);
                self.installs(s, batch, true);
            }
            Step::OldLaneBrings => {
                let batch = s.old.as_mut().expect("it listens to it").lane.remove(0);
                self.installs(s, batch, true);
            }
            Step::UrgentBrings => {
                let batch = s.link.urgent.remove(0);
                self.installs(s, batch, true);
            }
            Step::Straggler(at) => {
                let batch = s.stragglers.remove(at.into());
                self.installs(s, batch, false);
            }
            Step::LaneLost => {
                s.source.lane_lost = true;
                self.feed_source(s, S::LinkLost);
            }
            Step::SourceNotices => {
                s.source.unlinked = true;
                s.source.asking = false;
                s.link.to_source.clear();
                self.feed_source(s, S::LinkLost);
            }
            Step::DestinationNotices => {
                s.destination.unlinked = true;
                self.feed_destination(s, D::LinkLost);
            }
            Step::SourceAnswers => self.source_answers(s),
            Step::SourceFails => {
                s.left.failures -= 1;
                s.source.orders.remove(0);
                self.feed_source(s, S::Failed);
            }
            Step::LanesOpen => {
                s.source.lanes = Lanes::Open;
                self.feed_source(s, S::LanesOpen);
            }
            Step::LaneSends => self.lane_sends(s),
            Step::Pushes(page) => self.serves(s, page, false),
            Step::ServesUrgent => {
                let page = s.destination.wants.trailing_zeros();
                self.serves(s, u8::try_from(page).expect("few pages"), true);
            }
            Step::DestinationAnswers => self.destination_answers(s, true),
            Step::DestinationRefuses => {
                s.left.refusals -= 1;
                self.destination_answers(s, false);
            }
            Step::LoaderWants(page) => s.destination.wants = 1 << page,
            Step::Tick => self.tick(s, S::Tick),
            Step::LateTick => self.tick(s, S::LateTick),
            Step::EarlyTick => {
                s.left.early_ticks -= 1;
                self.tick(s, S::Tick);
            }
            Step::DestinationTick => self.feed_destination(s, D::Tick),
            Step::Superseded => self.feed_destination(s, D::Superseded),
            Step::Write(page) => {
                s.left.writes -= 1;
                s.source.memory[usize::from(page)] += 1;
                s.source.dirty |= 1 << page;
            }
            Step::Cut => {
                s.left.cuts -= 1;
                s.link.carries = Carries::Cut;
            }
            Step::Cancel => {
                s.left.cancels -= 1;
                self.feed_source(s, S::Cancel);
            }
            Step::BadPages => {
                s.left.bad_pages -= 1;
                s.link.lane.clear();
                // The lane is closed, and the source sees that.
                s.link.carries = Carries::Cut;
                self.feed_destination(s, D::BadPages);
            }
            Step::PagingBreaks => {
                s.left.paging_breaks -= 1;
                s.destination.paging_broken = true;
                self.feed_destination(s, D::PagingBroken);
            }
            Step::SourceCrashes { spool } => s.source_crashes(spool),
            Step::DestinationCrashes => s.destination_crashes(),
            Step::Restart => {
                s.left.restarts -= 1;
                s.destination.process = Process::Restarted;
            }
            Step::Reattach => {
                s.left.reattaches -= 1;
                let id = s.source.detached.take().expect("it was detached");
                s.source.machine = self.sources.begin(Origin::Reattached(id));
                s.source.end = None;
                s.source_drops_link();
            }
            Step::ServeSpool => {
                let id = s.source.spool.take().expect("there is one");
                s.source.machine = self.sources.begin(Origin::Spool(id));
                s.source.alive = true;
                s.source.guest = false;
                s.source.end = None;
                s.source_drops_link();
            }
            Step::Fence => self.fence(s),
        }
    }

    fn tick(&self, s: &mut State, event: source::Event) {
        let phase = self.source(s).phase;
        self.feed_source(s, event);
        if self.plant == Plant::ResumesOnTimeOut && matches!(phase, "Committed" | "Doubting") {
            s.source.runs = true;
        }
    }

    /// The operator lets the machine go on at its source, having switched the destination off.
    fn fence(&self, s: &mut State) {
        s.left.fences -= 1;
        if self.plant != Plant::FenceLies {
            s.destination.process = Process::Dead;
            s.destination.runs = false;
            s.destination.orders.clear();
        }
        let id = s.source.detached.take().expect("it ended in doubt or detached");
        s.source.permit = self.sources.replay(id).0.fenced();
        s.source.runs = s.source.permit.is_some();
        if let Some(end) = &mut s.source.end {
            end.kind = EndKind::Fenced;
        }
    }
}
