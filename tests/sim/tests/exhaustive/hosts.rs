//! What the two engines do for their machines, and the links between them.

use ferry_protocol::{PackedPages, ToSource, Verdict};

use super::source::EndKind;
use super::state::{
    Batch, Broken, Carries, Faults, Lanes, Link, Listens, Order, Packet, Process, Round, Serving,
    Stage, State, Task,
};
use super::table::{Mask, MessageId};
use super::world::{Plant, World};
use super::{destination, source};

/// Batches of older lanes that may still be worked on at a time.
const MAX_STRAGGLERS: usize = 2;

impl World {
    pub(crate) fn feed_source(&self, s: &mut State, event: source::Event) {
        let step = self.sources.step(s.source.machine, event);
        s.source.machine = step.next;
        for action in &step.actions {
            self.act_source(s, *action);
        }
        if !matches!(self.source(s).phase, "Rejoining" | "Doubting" | "Reopening") {
            s.source.asking = false;
        }
    }

    fn act_source(&self, s: &mut State, action: source::Action) {
        use source::Action as A;
        let all = (1 << self.moves.pages) - 1;
        match action {
            A::Send { message: id, commits } => {
                if matches!(s.link.carries, Carries::Yes | Carries::Cut) {
                    s.link.to_destination.push(Packet::Message { id, commits });
                }
            }
            A::OpenLanes => s.source.lanes = Lanes::Opening,
            A::StartTracking => {
                s.source.tracking = true;
                s.source.orders.push(Order::Tracked(all));
            }
            A::Sample(pages) => s.source.dirty &= !pages,
            A::Harvest => {
                let mut pages = std::mem::take(&mut s.source.dirty);
                if self.plant == Plant::SkipsHarvestAfterSave
                    && self.source(s).phase == "HarvestAfterSave"
                {
                    pages = 0;
                }
                s.source.orders.push(Order::Harvested(pages));
            }
            A::SendPages { round, pages } => {
                let rearm = s.source.runs;
                s.source.rounds.push(Round { number: round, unsent: pages, batches: 0, rearm });
            }
            A::Pause => {
                s.source.runs = self.plant == Plant::DoesNotStop;
                s.source.pauses += 1;
                match s.source.permit.take() {
                    Some(permit) => s.source.orders.push(Order::Paused(permit)),
                    None => s.break_rule(Broken::PermitFromNowhere),
                }
            }
            A::SaveState => s.source.orders.push(Order::Saved(s.source.pauses)),
            A::Resume(permit) if s.source.guest => {
                if s.source.permit.replace(permit).is_some() {
                    s.break_rule(Broken::PermitFromNowhere);
                }
                s.source.runs = true;
                // Of a commit that is void.
                s.source.spool = None;
            }
            // What a spool holds cannot run.
            A::Resume(_) | A::ReturnDirty(_) => {}
            A::StopTracking => (s.source.tracking, s.source.dirty) = (false, 0),
            A::Serve { round, mut owed } => {
                if self.plant == Plant::ServesOnlyUnsent
                    && let Some(unsent) = s.source.unsent
                {
                    owed &= unsent;
                }
                let (unsent, answered) = (owed, 0);
                s.source.serving = Some(Serving { round, owed, unsent, answered, push: false });
                if self.faults.source_crashes > 0 && s.source.guest && s.source.spool.is_none() {
                    s.source.spool = Some(s.source.machine);
                }
            }
            A::Push => {
                if let Some(serving) = &mut s.source.serving {
                    serving.push = true;
                }
            }
            A::Rejoin { done } => self.rejoins(s, done),
            A::DigestMemory => {
                let pages = usize::from(self.moves.pages);
                let sum = State::digest(s.source.memory[..pages].iter().copied());
                s.source.orders.push(Order::Digested(sum));
            }
            A::Finish(end) => {
                if s.source.end.replace(end).is_some() {
                    s.break_rule(Broken::FinishedTwice);
                }
                if matches!(end.kind, EndKind::Completed(Some(false))) {
                    s.break_rule(Broken::Digests);
                }
                if matches!(end.kind, EndKind::InDoubt | EndKind::Detached { .. }) {
                    s.source.detached = Some(s.source.machine);
                }
                s.source.leaves_link();
                if s.link.carries == Carries::Yes {
                    s.link.carries = Carries::ClosedBySource;
                }
            }
        }
    }

    /// The source drops every connection and opens another one.
    fn rejoins(&self, s: &mut State, done: u8) {
        if self.plant == Plant::ServesOnlyUnsent
            && let Some(serving) = s.source.serving
        {
            s.source.unsent = Some(serving.unsent);
        }
        s.source_drops_link();
        (s.source.lane_lost, s.source.unlinked, s.source.asking) = (false, false, true);
        if s.destination.process != Process::Dead {
            s.link.carries = Carries::Yes;
            s.link.to_destination.push(Packet::Hello { done });
        }
    }

    pub(crate) fn source_answers(&self, s: &mut State) {
        use source::Event as E;
        let event = match s.source.orders.remove(0) {
            Order::Tracked(pages) => E::TrackingStarted(pages),
            Order::Harvested(pages) => E::Harvested(pages),
            Order::Paused(permit) => E::Paused(permit),
            Order::Saved(pause) => E::StateSaved(pause),
            Order::Digested(sum) => E::MemoryDigest(sum),
        };
        self.feed_source(s, event);
    }

    /// The next page of the first round, or word that all are on the lane.
    pub(crate) fn lane_sends(&self, s: &mut State) {
        let round = s.source.rounds[0];
        if round.unsent == 0 {
            s.source.rounds.remove(0);
            let (round, batches) = (round.number, round.batches);
            return self.feed_source(s, source::Event::RoundSent { round, batches });
        }
        let page = round.unsent.trailing_zeros();
        if round.rearm {
            s.source.dirty &= !(1 << page);
        }
        s.source.rounds[0].unsent &= !(1 << page);
        s.source.rounds[0].batches += 1;
        let page = u8::try_from(page).expect("few pages");
        let content = s.source.memory[usize::from(page)];
        if s.link.carries == Carries::Yes {
            s.link.lane.push(Batch { round: round.number, page, content });
        }
    }

    /// Sends an owed page, which does not change any more.
    pub(crate) fn serves(&self, s: &mut State, page: u8, urgent: bool) {
        let Some(serving) = &mut s.source.serving else { return };
        let content = s.source.memory[usize::from(page)];
        let batch = Batch { round: serving.round, page, content };
        if urgent {
            serving.answered |= 1 << page;
            s.link.urgent.push(batch);
        } else {
            serving.unsent &= !(1 << page);
            if s.link.carries == Carries::Yes {
                s.link.lane.push(batch);
            }
        }
    }

    pub(crate) fn feed_destination(&self, s: &mut State, event: destination::Event) {
        let step = self.destinations.step(s.destination.machine, event);
        s.destination.machine = step.next;
        for action in &step.actions {
            self.act_destination(s, *action);
        }
    }

    fn act_destination(&self, s: &mut State, action: destination::Action) {
        use destination::Action as A;
        match action {
            A::Send(id) => s.answer(id),
            A::Build => s.destination.orders.push(Task::Build),
            A::AcceptLanes => {}
            A::Clear(stale) => {
                let came = s.destination.pages.iter_mut().enumerate();
                came.filter(|(page, _)| stale >> page & 1 == 1).for_each(|(_, came)| came.1 = 0);
            }
            A::Hold => s.stop_listening(),
            A::Page { owed, after } => s.destination.orders.push(Task::Page { owed, after }),
            A::Load(state) => {
                s.destination.state = state;
                if s.destination.stage == Stage::Filling {
                    s.destination.stage = Stage::Closed;
                }
                s.destination.orders.push(Task::Load(state));
            }
            A::Resume(permit) => s.destination.orders.push(Task::Resume(permit)),
            A::Digest => {
                if let Stage::Paging { .. } = s.destination.stage {
                    s.destination.stage = Stage::Drained;
                }
                s.destination.orders.push(Task::Digest);
            }
            A::Finish(end) => {
                if s.destination.end.replace(end).is_some() {
                    s.break_rule(Broken::FinishedTwice);
                }
                let void = end == destination::Ended::Void;
                if void && s.destination.runs || end == destination::Ended::Runs(Some(false)) {
                    s.break_rule(Broken::Digests);
                }
                if void {
                    s.destination.stage = Stage::Closed;
                }
                s.stop_listening();
            }
        }
    }

    /// The source is here again, on the link that it opened last.
    pub(crate) fn hello(&self, s: &mut State, done: u8) {
        let facts = self.destination(s);
        let stranger = self.plant == Plant::StrangerDenies && s.destination.runs;
        let over = s.destination.end.is_some() || s.destination.process == Process::Restarted;
        if over || stranger {
            let verdict = match s.destination.process {
                Process::Restarted => Verdict::Unknown,
                _ if stranger => Verdict::NeverRan,
                _ => facts.verdict.unwrap_or(Verdict::Unknown),
            };
            s.link.to_source.push(self.wire.put(&ToSource::Verdict(verdict)));
            if s.link.carries == Carries::Yes {
                s.link.carries = Carries::ClosedByDestination;
            }
            return;
        }
        let before = s.old.take();
        s.destination.listens = Listens::Newest;
        s.destination.unlinked = false;
        if self.plant == Plant::GoesOnThoughWhole
            && matches!(facts.phase, "Loading" | "Resuming" | "Fetching")
        {
            let held = PackedPages::default();
            return s.answer(self.wire.put(&ToSource::GoOn { held }));
        }
        self.rejoined(s, done);
        if let Some(link) = before {
            s.stragglers.extend(link.lane);
            if self.plant == Plant::TakesLateCommit {
                let commit = link.to_destination.into_iter();
                let commit = commit.filter(|p| matches!(p, Packet::Message { commits: true, .. }));
                s.link.to_destination.splice(0..0, commit);
            }
        }
    }

    /// The hello of a link that the source has given up comes after all: the destination listens to nothing
    /// else until it learns of that.
    pub(crate) fn hello_of_a_dead_link(&self, s: &mut State, done: u8) {
        s.stop_listening();
        s.destination.listens = Listens::Older;
        s.destination.unlinked = false;
        s.old = Some(Link::new(Carries::Cut));
        self.rejoined(s, done);
    }

    fn rejoined(&self, s: &mut State, done: u8) {
        let owed = s.missing();
        let paging = matches!(s.destination.stage, Stage::Paging { .. });
        let came = s.destination.pages.iter().enumerate();
        let came = came.filter(|(_, (round, _))| *round > done).fold(0, |m, (p, _)| m | 1 << p);
        let held: Mask = if paging { 0 } else { came };
        self.feed_destination(s, destination::Event::Rejoined { held, owed });
    }

    /// A batch that a lane brought; `announced` where the lane is one of the present link.
    pub(crate) fn installs(&self, s: &mut State, batch: Batch, announced: bool) {
        use destination::Event as E;
        let Batch { round, page, content } = batch;
        let place = usize::from(page);
        let host = &mut s.destination;
        match &mut host.stage {
            Stage::Filling => {
                if announced && self.plant == Plant::CountsTooEarly {
                    s.stragglers.push(batch);
                } else if round >= host.pages[place].0 {
                    host.pages[place] = (round, content);
                }
                if announced {
                    self.feed_destination(s, E::Installed { round });
                }
            }
            Stage::Paging { missing, after } => {
                if round > *after && *missing >> page & 1 == 1 && !host.paging_broken {
                    *missing &= !(1 << page);
                    host.wants &= *missing;
                    host.pages[place] = (round, content);
                    if *missing == 0 {
                        host.orders.push(Task::AllHere);
                    }
                    // The guest reads it.
                    if content != s.source.memory[place] {
                        s.break_rule(Broken::Memory);
                    }
                }
            }
            Stage::Closed if announced => self.feed_destination(s, E::BadPages),
            Stage::Closed | Stage::Drained => {}
        }
    }

    /// The destination's engine has done what it was asked for, or could not.
    pub(crate) fn destination_answers(&self, s: &mut State, ok: bool) {
        use destination::Event as E;
        let pages = usize::from(self.moves.pages);
        let host = &mut s.destination;
        let event = match host.orders.remove(0) {
            Task::Build => E::Built(ok),
            Task::Page { owed, after } => {
                if ok {
                    host.stage = Stage::Paging { missing: owed, after };
                    for (page, came) in host.pages.iter_mut().enumerate() {
                        if owed >> page & 1 == 1 {
                            *came = (0, 0);
                        }
                    }
                }
                E::Paging(ok)
            }
            Task::Load(_) => {
                host.wants = 0;
                E::Loaded(ok)
            }
            Task::Resume(permit) => {
                if ok {
                    (host.runs, host.ran_by) = (true, Some(permit));
                    s.judge_what_runs(pages);
                }
                E::Resumed(ok)
            }
            Task::Digest => E::Digest(State::digest(host.pages[..pages].iter().map(|p| p.1))),
            Task::AllHere => E::AllHere,
        };
        self.feed_destination(s, event);
    }
}

impl State {
    /// On the control channel, to the source, if the destination listens to the link that it opened last.
    fn answer(&mut self, id: MessageId) {
        let carries = matches!(self.link.carries, Carries::Yes | Carries::Cut);
        if self.destination.listens == Listens::Newest && carries && !self.source.unlinked {
            self.link.to_source.push(id);
        }
    }

    /// Nothing that the source's link still brings is an event there; the destination does not know yet.
    pub(crate) fn source_drops_link(&mut self) {
        self.source.leaves_link();
        (self.source.lane_lost, self.source.unlinked, self.source.asking) = (true, true, false);
        let before = std::mem::replace(&mut self.link, Link::new(Carries::Cut));
        if let Some(Packet::Hello { done }) = before.to_destination.first() {
            self.late_hello = Some(*done);
        }
        if self.destination.listens == Listens::Newest {
            self.destination.listens = Listens::Older;
            self.old = Some(before);
        }
    }

    /// The destination's side of its link is closed.
    fn stop_listening(&mut self) {
        let listened = std::mem::replace(&mut self.destination.listens, Listens::Nowhere);
        if listened == Listens::Newest {
            if self.link.carries == Carries::Yes {
                self.link.carries = Carries::ClosedByDestination;
            }
            self.stragglers.append(&mut self.link.lane);
        }
        if let Some(old) = self.old.take() {
            self.stragglers.extend(old.lane);
        }
    }

    /// The destination's guest runs from now on: on all that the guest had when it was paused?
    fn judge_what_runs(&mut self, pages: usize) {
        let missing = self.missing();
        let here = (0..pages).filter(|page| missing >> page & 1 == 0);
        let same = |page: usize| self.destination.pages[page].1 == self.source.memory[page];
        if !{ here }.all(same) {
            self.break_rule(Broken::Memory);
        }
        if self.destination.state != self.source.pauses {
            self.break_rule(Broken::DeviceState);
        }
    }

    /// The source's process ends, and with it the guest.
    pub(crate) fn source_crashes(&mut self, spool: bool) {
        self.left.source_crashes -= 1;
        let runs_there = self.destination.runs;
        self.lost |= !runs_there || self.missing() != 0 && !spool;
        let host = &mut self.source;
        (host.alive, host.runs, host.permit, host.detached) = (false, false, None, None);
        host.orders.clear();
        host.leaves_link();
        if !spool {
            host.spool = None;
        }
        self.link.carries = Carries::Cut;
    }

    /// The destination's process ends, and with it the guest.
    pub(crate) fn destination_crashes(&mut self) {
        self.left.destination_crashes -= 1;
        let host = &mut self.destination;
        // Before it runs, its source can have the machine again.
        self.lost |= host.runs;
        (host.process, host.runs, host.listens) = (Process::Dead, false, Listens::Nowhere);
        host.stage = Stage::Closed;
        host.orders.clear();
        self.link.carries = Carries::Cut;
    }

    /// Takes away what makes no difference any more, so that like states are one.
    pub(crate) fn tidy(&mut self) {
        let responds = self.destination.process != Process::Dead;
        let arrives = self.destination.process == Process::Alive && self.destination.end.is_none();
        let moves = self.source.alive && self.source.end.is_none();
        if !moves {
            self.link.to_source.clear();
            self.left.cuts = 0;
            if !arrives {
                self.left = Faults {
                    fences: self.left.fences,
                    reattaches: self.left.reattaches,
                    ..Faults::default()
                };
            }
        }
        let listens = arrives && self.destination.listens == Listens::Newest;
        let greets = matches!(self.link.to_destination.first(), Some(Packet::Hello { .. }));
        if !(listens || greets && responds && moves) {
            self.link.to_destination.clear();
        }
        if !listens {
            self.link.lane.clear();
            self.link.urgent.clear();
        }
        if !arrives {
            self.late_hello = None;
            self.stragglers.clear();
            let host = &mut self.destination;
            (host.wants, host.pages) = (0, Default::default());
            (host.listens, host.unlinked) = (Listens::Nowhere, false);
        }
        if !arrives || self.destination.listens != Listens::Older {
            self.old = None;
        }
        let (stage, pages) = (self.destination.stage, self.destination.pages);
        self.stragglers.retain(|batch| match stage {
            Stage::Filling => batch.round >= pages[usize::from(batch.page)].0,
            Stage::Paging { missing, after } => {
                batch.round > after && missing >> batch.page & 1 == 1
            }
            Stage::Closed | Stage::Drained => false,
        });
        self.stragglers.sort_unstable_by_key(|b| (b.round, b.page, b.content));
        self.stragglers.dedup();
        // Of more than can be followed, the newest are: a bound.
        let excess = self.stragglers.len().saturating_sub(MAX_STRAGGLERS);
        self.stragglers.drain(..excess);
        if !moves && !arrives {
            self.link = Link::new(Carries::Cut);
        }
    }
}

impl super::state::SourceHost {
    fn leaves_link(&mut self) {
        self.rounds.clear();
        self.lanes = Lanes::Closed;
        self.serving = None;
    }
}
