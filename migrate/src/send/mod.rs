//! The source's engine: carries out what the protocol's [`Source`] asks for.
//!
//! One thread runs the state machine and touches the guest; one talks on the control channel; one for
//! each lane reads and sends pages. All report to the first by one channel, so that the order of events
//! is one order.

mod handle;
mod options;

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use ferry_codec::{CodecSet, is_zero, page_digest};
use ferry_memory::{GuestView, Touched};
use ferry_pages::{DirtyRate, PAGE_BYTES, PageSet};
use ferry_protocol::limits;
use ferry_protocol::{
    Hello, Mode, Outcome, PermitStub, Progress, Reattach, RunPermit, Source, SourceAction,
    SourceEvent, StateWriter, ToDestination,
};
use ferry_transport::{Connector, Pacer};
use tokio::sync::mpsc::{UnboundedSender, unbounded_channel};
use tokio::sync::watch;

use crate::control::{self, ControlEvent};
use crate::hints::Hints;
use crate::pinned::Pinned;
use crate::recall::Digests;
use crate::report::{self, PageCounts, Report};
use crate::round::{Round, Trackers};
use crate::send_lane::{self, LaneEvent, LaneRound, Shared, Work};
use crate::serve::{self, Serving};
use crate::spool::Spooling;
use crate::{Guest, GuestError, tracking, words};

pub use handle::SendHandle;
pub use options::{SendOptions, Tuning};

/// What whoever watches a migration is told.
#[derive(Clone, Debug)]
pub enum SendEvent {
    /// The protocol went on.
    Progress(Progress),
    /// Bytes put on the link so far; several times a second.
    Sent {
        /// Bytes.
        bytes: u64,
        /// Of the round under way, pages in it.
        round_pages: u64,
        /// Number of the round.
        round: u32,
    },
    /// All pages that were owed are in the spool: bytes; or why they are not.
    Spooled(Result<u64, String>),
}

/// What is left at the source after a migration.
#[derive(Debug)]
pub enum Left {
    /// The machine goes on here.
    Running,
    /// The machine was moved; this guest can be dropped.
    Nothing,
    /// The machine stands still here until it is known that the destination does not run it.
    InDoubt(PermitStub),
    /// The machine runs at the destination, which lacks pages that are here: keep the guest, paused as it
    /// is, and go on by [`reattach()`].
    Detached(Reattach),
    /// The machine may run here, but it could not be started.
    Stopped(RunPermit, GuestError),
}

/// A migration that is over.
#[derive(Debug)]
pub struct Sent {
    /// What it did.
    pub report: Report,
    /// What is left here.
    pub left: Left,
}

#[derive(Debug)]
pub(crate) enum Message {
    Event(SourceEvent),
    Tune(Tuning),
    Spooled(Result<u64, String>),
    /// From the connections of one link; those of a link that was given up count no more.
    Link {
        epoch: u64,
        event: LinkEvent,
    },
}

#[derive(Debug)]
pub(crate) enum LinkEvent {
    Control(ControlEvent),
    Lane(LaneEvent),
}

/// Moves `guest` to the destination that `connector` reaches. Blocks until it is over; `watch` is
/// called from this thread.
pub fn send(
    guest: &mut dyn Guest,
    connector: Arc<dyn Connector>,
    options: &SendOptions,
    handle: &SendHandle,
    watch: &mut dyn FnMut(SendEvent),
) -> Sent {
    let how = (options.goals, options.mode);
    let (codecs, lanes) = (options.codecs.bits(), options.lanes);
    let (spec, number) = (guest.spec(), guest.machine());
    let mut machine = Source::new(spec, number, codecs, lanes, how, options.rejoin_for);
    if options.look_only {
        machine.look_only();
    }
    let connector = Arc::new(Pinned::new(connector, None));
    let (mut engine, receiver) = Engine::new(guest, machine, connector, options, handle, watch);
    engine.connect(Hello::control());
    engine.run(&receiver)
}

/// Goes on serving a destination that lost `guest`'s source: by [`Left::Detached`] of an earlier
/// migration, perhaps at another address. `guest` stands still as it did then.
pub fn reattach(
    guest: &mut dyn Guest,
    reattach: Reattach,
    connector: Arc<dyn Connector>,
    options: &SendOptions,
    handle: &SendHandle,
    watch: &mut dyn FnMut(SendEvent),
) -> Sent {
    let peer = reattach.peer().map(str::to_owned);
    let connector = Arc::new(Pinned::new(connector, peer));
    let machine = Source::reattach(reattach, options.goals, options.rejoin_for);
    go_on(guest, machine, None, connector, options, handle, watch)
}

/// Runs `machine`, which is a reattached one. `digest` is that of all memory, where `guest` has only a part.
pub(crate) fn go_on(
    guest: &mut dyn Guest,
    machine: Source,
    digest: Option<u64>,
    connector: Arc<Pinned>,
    options: &SendOptions,
    handle: &SendHandle,
    watch: &mut dyn FnMut(SendEvent),
) -> Sent {
    let (mut engine, receiver) = Engine::new(guest, machine, connector, options, handle, watch);
    engine.paused = true;
    engine.digest = digest;
    engine.run(&receiver)
}

struct Lane {
    works: UnboundedSender<Work>,
    thread: JoinHandle<()>,
}

struct SentRound {
    work: Arc<Round>,
    lanes_left: usize,
    total: LaneRound,
}

struct Engine<'a> {
    began: Instant,
    machine: Source,
    options: SendOptions,
    guest: &'a mut dyn Guest,
    memory: GuestView,
    connector: Arc<Pinned>,
    /// Counts links: one for each time that the control channel was opened.
    epoch: u64,
    /// What the destination knows the link by.
    link: u64,
    control: Option<control::Control>,
    sender: Sender<Message>,
    trackers: Trackers,
    /// No message of the destination is longer, bytes.
    max_answer: usize,
    hints: Hints,
    look: Option<Touched>,
    /// Pages that the guest touched while it was sampled.
    touched: PageSet,
    record_pages: u64,
    recalled: Arc<Digests>,
    lanes: Vec<Lane>,
    urgent: Option<JoinHandle<()>>,
    shared: Option<Arc<Shared>>,
    lanes_open: usize,
    rounds: Vec<SentRound>,
    /// With pages in them, but for what is served after the hand-over.
    rounds_begun: u32,
    round_pages: u64,
    state_bytes: u64,
    pages: PageCounts,
    /// Bytes that links before this one carried, and how many of them were lost.
    bytes_before: u64,
    links_lost: u32,
    dirty_rate: DirtyRate,
    /// What the last harvest found while the guest ran.
    written: PageSet,
    last_harvest: Duration,
    paused: bool,
    /// Of all memory, where it is known.
    digest: Option<u64>,
    decisions: report::Decisions,
    spooling: Option<Spooling>,
    failed_resume: Option<(RunPermit, GuestError)>,
    outcome: Option<Outcome>,
    watch: &'a mut dyn FnMut(SendEvent),
}

/// What may leave at once under a bandwidth limit.
const BURST_BYTES: u64 = 1 << 20;
/// How often whoever watches hears of bytes sent.
const TELL_EVERY: Duration = Duration::from_millis(100);

impl<'a> Engine<'a> {
    fn new(
        guest: &'a mut dyn Guest,
        machine: Source,
        connector: Arc<Pinned>,
        options: &SendOptions,
        handle: &SendHandle,
        watch: &'a mut dyn FnMut(SendEvent),
    ) -> (Self, Receiver<Message>) {
        let (sender, receiver) = channel();
        handle.attach(sender.clone());
        let layout = guest.spec().layout().unwrap_or_default();
        let guest_bytes = guest.spec().memory_bytes();
        let engine = Self {
            began: Instant::now(),
            machine,
            options: options.clone(),
            memory: guest.memory(),
            guest,
            connector,
            epoch: 0,
            link: 0,
            control: None,
            sender,
            trackers: Arc::default(),
            max_answer: limits::max_answer_bytes(guest_bytes),
            hints: Hints::default(),
            look: None,
            touched: PageSet::new(),
            record_pages: 0,
            recalled: Arc::default(),
            lanes: Vec::new(),
            urgent: None,
            shared: None,
            lanes_open: 0,
            rounds: Vec::new(),
            rounds_begun: 0,
            round_pages: 0,
            state_bytes: 0,
            pages: PageCounts::default(),
            bytes_before: 0,
            links_lost: 0,
            dirty_rate: DirtyRate::new(&layout),
            written: PageSet::new(),
            last_harvest: Duration::ZERO,
            paused: false,
            digest: None,
            decisions: report::Decisions::default(),
            spooling: None,
            failed_resume: None,
            outcome: None,
            watch,
        };
        (engine, receiver)
    }

    /// Opens a control channel that begins with `hello`; events of all links before it count no more.
    fn connect(&mut self, hello: Hello) {
        self.epoch += 1;
        let (sender, epoch) = (self.sender.clone(), self.epoch);
        let control =
            control::start(self.connector.clone(), hello, self.max_answer, move |event| {
                let event = LinkEvent::Control(event);
                let _ = sender.send(Message::Link { epoch, event });
            });
        self.control = Some(control);
    }

    /// Leaves the link as it is: its threads end by themselves, and re-arm no page from now on.
    fn give_up_link(&mut self) {
        for round in self.rounds.drain(..) {
            round.work.end();
        }
        if let Some(shared) = self.shared.take() {
            shared.stop.send_replace(true);
            self.bytes_before += shared.bytes.load(Ordering::Relaxed);
            if let Some(serving) = shared.serving.borrow().as_ref() {
                self.pages.merge(serving.pages());
            }
        }
        self.lanes.clear();
        self.urgent = None;
        self.lanes_open = 0;
        if let Some(control) = self.control.take() {
            control.abandon();
        }
    }

    fn run(mut self, receiver: &Receiver<Message>) -> Sent {
        while self.outcome.is_none() {
            let now = self.began.elapsed();
            let until = self.machine.deadline().map_or(TELL_EVERY, |d| d.saturating_sub(now));
            match receiver.recv_timeout(until.min(TELL_EVERY)) {
                Ok(Message::Event(event)) => self.handle(event),
                Ok(Message::Link { epoch, event }) if epoch == self.epoch => match event {
                    LinkEvent::Control(event) => self.control_event(event),
                    LinkEvent::Lane(event) => self.lane_event(event),
                },
                Ok(Message::Link { .. }) => {}
                Ok(Message::Tune(tuning)) => self.tune(tuning),
                Ok(Message::Spooled(written)) => (self.watch)(SendEvent::Spooled(written)),
                Err(RecvTimeoutError::Timeout) => {
                    if self.machine.deadline().is_some_and(|d| self.began.elapsed() >= d) {
                        self.handle(SourceEvent::Tick);
                    }
                    self.tell_bytes();
                }
                // This engine holds a sender: the channel cannot close.
                Err(RecvTimeoutError::Disconnected) => break,
            }
        }
        let total = self.began.elapsed();
        self.finish(total)
    }

    fn control_event(&mut self, event: ControlEvent) {
        self.handle(match event {
            ControlEvent::Connected => SourceEvent::Connected,
            ControlEvent::Message(m) => SourceEvent::Message(m),
            ControlEvent::Lost(why) => SourceEvent::LinkLost(why),
        });
    }

    fn handle(&mut self, event: SourceEvent) {
        let mut events = VecDeque::from([event]);
        while let Some(event) = events.pop_front() {
            self.machine.handle(self.began.elapsed(), event);
            while let Some(action) = self.machine.poll() {
                events.extend(self.act(action));
            }
        }
    }

    /// Carries out one action; returns its answer if there is one at once.
    fn act(&mut self, action: SourceAction) -> Option<SourceEvent> {
        match action {
            SourceAction::Send(message) => {
                if let Some(control) = &self.control {
                    control.send(&message);
                    match message {
                        ToDestination::Abort { .. } => control.part(),
                        ToDestination::Verified { .. } => control.finish(),
                        _ => {}
                    }
                }
                None
            }
            SourceAction::OpenLanes { session, codecs } => {
                self.open_lanes(session, codecs).err().map(SourceEvent::Failed)
            }
            SourceAction::Recall { pages, digests } => {
                // Nobody else has it before lanes are opened.
                if let Some(recalled) = Arc::get_mut(&mut self.recalled) {
                    recalled.add(&pages, &digests);
                }
                None
            }
            SourceAction::Forget => {
                self.recalled.forget();
                None
            }
            SourceAction::StartTracking => Some(self.start_tracking()),
            SourceAction::Harvest => Some(self.harvest()),
            SourceAction::SendPages { round, pages } => {
                self.send_pages(round, pages);
                None
            }
            SourceAction::Throttle(percent) => {
                self.guest.throttle(percent).err().map(|e| SourceEvent::CannotThrottle(words(&e)))
            }
            SourceAction::Pause => Some(match self.guest.pause() {
                Ok(permit) => {
                    self.paused = true;
                    SourceEvent::Paused(permit)
                }
                Err(e) => SourceEvent::Failed(words(&e)),
            }),
            SourceAction::SaveState => Some(self.save()),
            SourceAction::Resume(permit) => {
                self.paused = false;
                self.failed_resume = self.guest.resume(permit).err();
                // Of a commit that came to nothing: the next one owes other pages, with other content.
                if let Some(spooling) = self.spooling.take() {
                    spooling.end(false);
                }
                None
            }
            SourceAction::ReturnDirty(pages) => {
                self.guest.return_dirty(&pages);
                None
            }
            SourceAction::StopTracking => {
                tracking::stop(&self.trackers);
                None
            }
            SourceAction::Sample(pages) => {
                self.look = tracking::look(&self.memory);
                self.sample(&pages).err().map(SourceEvent::Failed)
            }
            SourceAction::Serve { round, owed, mut record } => {
                record.push(std::mem::take(&mut self.touched));
                let limit = self.options.bandwidth_bytes_per_s;
                let serving = Arc::new(Serving::new(round, owed, &record, limit));
                self.record_pages = self.record_pages.max(serving.record_pages());
                if let Some(shared) = &self.shared {
                    shared.serving.send_replace(Some(serving.clone()));
                }
                // Behind it: the machine may wait for a page already.
                self.spool(serving.owed());
                None
            }
            SourceAction::Push => {
                for lane in &self.lanes {
                    // A lane that has ended has said why.
                    let _ = lane.works.send(Work::Push);
                }
                None
            }
            SourceAction::Rejoin { session, done } => {
                self.give_up_link();
                // What was re-armed for the round that is given up is sent again.
                self.hints.end();
                self.link = rand::random();
                self.connect(Hello::Rejoin { session, done, link: self.link });
                None
            }
            SourceAction::DigestMemory => {
                self.pages.free += self.hints.discard(&self.memory);
                Some(match self.digest.map_or_else(|| digest(&self.memory), Ok) {
                    Ok(sum) => SourceEvent::MemoryDigest(sum),
                    Err(why) => SourceEvent::Failed(why),
                })
            }
            SourceAction::Tell(progress) => {
                self.decisions.follow(self.began.elapsed(), &progress);
                match progress {
                    Progress::RoundStarted { pages, .. } => self.round_pages = pages,
                    Progress::LinkLost(_) | Progress::InDoubt(_) => self.links_lost += 1,
                    _ => {}
                }
                (self.watch)(SendEvent::Progress(progress));
                None
            }
            SourceAction::Finish(outcome) => {
                self.outcome = Some(outcome);
                None
            }
        }
    }

    fn open_lanes(&mut self, session: u128, codecs: u8) -> Result<(), String> {
        let pacer = Mutex::new(Pacer::new(self.options.bandwidth_bytes_per_s, BURST_BYTES));
        let lanes = self.options.lanes.max(1);
        let shared = Arc::new(Shared {
            connector: self.connector.clone(),
            view: self.memory.clone(),
            codecs: CodecSet::from_bits(codecs),
            lanes,
            session,
            link: self.link,
            pacer,
            bytes: AtomicU64::new(0),
            stop: watch::Sender::new(false),
            began: self.began,
            recalled: self.recalled.clone(),
            serving: watch::Sender::new(None),
        });
        self.shared = Some(shared.clone());
        for lane in 0..lanes {
            let (works, receiver) = unbounded_channel();
            let (shared, tell) = (shared.clone(), self.teller());
            let thread = std::thread::Builder::new()
                .name(format!("ferry-lane-{lane}"))
                .spawn(move || send_lane::run(&shared, lane, receiver, &tell))
                .map_err(|e| format!("cannot start a thread for lane {lane}: {e}"))?;
            self.lanes.push(Lane { works, thread });
        }
        if self.machine.policy().mode() != Mode::PreCopy {
            let tell = self.teller();
            let thread = std::thread::Builder::new()
                .name("ferry-urgent".into())
                .spawn(move || serve::run_urgent(&shared, &tell))
                .map_err(|e| format!("cannot start a thread for the urgent lane: {e}"))?;
            self.urgent = Some(thread);
        }
        Ok(())
    }

    fn teller(&self) -> impl Fn(LaneEvent) + Send + 'static {
        let (sender, epoch) = (self.sender.clone(), self.epoch);
        move |event| {
            let _ = sender.send(Message::Link { epoch, event: LinkEvent::Lane(event) });
        }
    }

    fn lane_event(&mut self, event: LaneEvent) {
        match event {
            LaneEvent::Open => {
                self.lanes_open += 1;
                if self.lanes_open == self.lanes.len() + usize::from(self.urgent.is_some()) {
                    self.handle(SourceEvent::LanesOpen);
                }
            }
            LaneEvent::RoundSent { round, done } => {
                let Some(sent) = self.rounds.iter_mut().find(|r| r.work.number == round) else {
                    return;
                };
                sent.lanes_left -= 1;
                sent.total.batches += done.batches;
                sent.total.bytes += done.bytes;
                sent.total.pages.merge(done.pages);
                self.pages.merge(done.pages);
                if sent.lanes_left == 0 {
                    let total = sent.total;
                    self.rounds.retain(|r| r.work.number != round);
                    if !self.machine.is_sampling() {
                        // The pages of later rounds were written since they were re-armed.
                        self.hints.end();
                    }
                    self.handle(SourceEvent::RoundSent {
                        round,
                        batches: total.batches,
                        bytes: total.bytes,
                        same: total.pages.same,
                    });
                }
            }
            LaneEvent::LinkLost(e) => self.handle(SourceEvent::LinkLost(e.to_string())),
            LaneEvent::Failed(why) => self.handle(SourceEvent::Failed(why)),
        }
    }

    fn start_tracking(&mut self) -> SourceEvent {
        let started = tracking::start(&self.trackers, self.guest, &self.memory);
        self.last_harvest = self.began.elapsed();
        match started {
            Ok(resident) => SourceEvent::TrackingStarted(resident),
            Err(why) => SourceEvent::Failed(why),
        }
    }

    /// Re-arms all pages, and then asks the guest which of them are free.
    fn sample(&mut self, pages: &PageSet) -> Result<(), String> {
        tracking::rearm(&self.trackers, pages)?;
        let huge = self.memory.regions().iter().any(|region| region.unit > 1);
        if let Some(free) = self.guest.free_pages().filter(|_| !huge) {
            self.hints.begin(free);
        }
        Ok(())
    }

    fn harvest(&mut self) -> SourceEvent {
        // Before anything is copied, which touches it.
        self.touched.union_with(&tracking::touched(self.look.take()));
        let mut pages = PageSet::new();
        if let Err(why) = tracking::harvest(&self.trackers, &mut pages) {
            // The migration ends.
            self.guest.return_dirty(&pages);
            return SourceEvent::Failed(why);
        }
        self.hints.harvested(&pages);
        if !self.paused {
            let now = self.began.elapsed();
            self.dirty_rate.observe(now.saturating_sub(self.last_harvest), &pages);
            self.last_harvest = now;
            self.written.clone_from(&pages);
        }
        SourceEvent::Harvested(pages)
    }

    fn send_pages(&mut self, round: u32, pages: PageSet) {
        // A guest that stands still writes nothing: its pages need not be re-armed.
        let trackers = (!self.paused).then(|| self.trackers.clone());
        self.hints.sent(&pages);
        let work = Round::new(round, pages, trackers);
        let work = match self.paused {
            false => work.without(self.hints.clone()).last_around(&self.written),
            true => work,
        };
        let work = Arc::new(work);
        self.rounds_begun += 1;
        self.rounds.push(SentRound {
            work: work.clone(),
            lanes_left: self.lanes.len(),
            total: LaneRound::default(),
        });
        for lane in &self.lanes {
            // A lane that has ended has said why.
            let _ = lane.works.send(Work::Round(work.clone()));
        }
    }

    fn save(&mut self) -> SourceEvent {
        match state_of(self.guest).map_err(|e| words(&e)) {
            Ok(state) => {
                self.state_bytes = state.len() as u64;
                SourceEvent::StateSaved(state)
            }
            Err(why) => SourceEvent::Failed(format!("state could not be saved: {why}")),
        }
    }

    /// Begins to write `owed` to the spool, if there is to be one and it is not begun.
    fn spool(&mut self, owed: &PageSet) {
        let (Some(dir), None) = (&self.options.spool, &self.spooling) else { return };
        self.pages.free += self.hints.discard(&self.memory);
        let sender = self.sender.clone();
        let tell = move |written| drop(sender.send(Message::Spooled(written)));
        let (spec, spooled) = (self.guest.spec(), self.machine.spooled());
        let view = self.memory.clone();
        self.spooling = Some(Spooling::start(dir, spec, view, owed.clone(), spooled, tell));
    }

    fn tune(&mut self, tuning: Tuning) {
        let mut goals = self.machine.policy().goals();
        goals.max_downtime = tuning.max_downtime.unwrap_or(goals.max_downtime);
        goals.max_total = tuning.max_total.unwrap_or(goals.max_total);
        goals.max_slowdown = tuning.max_slowdown.unwrap_or(goals.max_slowdown);
        self.handle(SourceEvent::Tune(goals));
        let Some(rate) = tuning.bandwidth_bytes_per_s else { return };
        let limit = Some(rate).filter(|rate| *rate > 0);
        self.options.bandwidth_bytes_per_s = limit;
        if let Some(shared) = &self.shared {
            let now = self.began.elapsed();
            shared.pacer.lock().unwrap_or_else(PoisonError::into_inner).set_rate(now, limit);
            if let Some(serving) = shared.serving.borrow().as_ref() {
                serving.set_limit(limit);
            }
        }
    }

    fn tell_bytes(&mut self) {
        if let Some(shared) = &self.shared {
            let bytes = self.bytes_before + shared.bytes.load(Ordering::Relaxed);
            let (round, round_pages) = (self.machine.rounds(), self.round_pages);
            (self.watch)(SendEvent::Sent { bytes, round_pages, round });
        }
    }

    /// The link's rate as last seen, bytes/s.
    fn link_rate(&self) -> f64 {
        let pushed =
            self.shared.as_ref().and_then(|s| s.serving.borrow().as_ref().map(|s| s.rate()));
        pushed.map_or(self.machine.policy().rate_bytes_per_s(), |rate| rate as f64)
    }

    /// What was done: not `auto`, but what it came to.
    fn mode_in_words(&self) -> String {
        let policy = self.machine.policy();
        match (policy.mode(), self.machine.is_post_copy()) {
            (Mode::Auto, false) => Mode::PreCopy.name(),
            (Mode::Auto, true) => Mode::Hybrid.name(),
            (mode, _) => mode.name(),
        }
        .into()
    }

    fn finish(mut self, total: Duration) -> Sent {
        if let (Some(shared), false) =
            (&self.shared, matches!(self.outcome, Some(Outcome::Completed { .. })))
        {
            shared.stop.send_replace(true);
        }
        for lane in std::mem::take(&mut self.lanes) {
            drop(lane.works);
            // A lane that panicked has nothing more to say.
            let _ = lane.thread.join();
        }
        if let Some(mut control) = self.control.take() {
            control.join();
        }
        let link_rate = self.link_rate();
        self.give_up_link();
        self.hints.end();
        self.pages.free += match self.paused {
            true => self.hints.discard(&self.memory),
            false => self.hints.left_out(),
        };
        if let Some(spooling) = self.spooling.take() {
            spooling.end(matches!(self.outcome, Some(Outcome::Detached { .. })));
        }
        let outcome =
            self.outcome.take().unwrap_or_else(|| Outcome::Failed("the engine stopped".into()));
        let switchover = self.machine.switchover();
        let (downtime_ms, downtime_parts_ms) = report::downtime(&switchover);
        let (kind, mut reason, mut machine, digests) = report::outcome(&outcome);
        let ran_at = (!switchover.running.is_zero()).then_some(switchover.running);
        let left = match (outcome, self.failed_resume.take()) {
            (Outcome::Completed { .. }, _) => Left::Nothing,
            (Outcome::InDoubt { permit, .. }, _) => Left::InDoubt(permit),
            (Outcome::Detached { reattach, .. }, _) => {
                Left::Detached(reattach.of_peer(self.connector.peer()))
            }
            (_, None) => Left::Running,
            (_, Some((permit, error))) => {
                machine = report::Whereabouts::PausedAtSource;
                reason += &format!("; and the guest could not be resumed: {}", words(&error));
                Left::Stopped(permit, error)
            }
        };
        let fetching = self.machine.fetched().map_or(0, |fetched| fetched.took_ns);
        let fetching = Duration::from_nanos(fetching);
        let completed = kind == report::OutcomeKind::Completed;
        let goals = self.machine.policy().goals();
        let downtime = Duration::try_from_secs_f64(downtime_ms / 1e3).unwrap_or(Duration::MAX);
        let missed = goals.missed(downtime, ran_at.unwrap_or(total));
        let (mode, no_post_copy) = (self.options.mode, self.machine.no_post_copy());
        let foreseen =
            self.machine.sampled().map(|s| report::foreseen(s, goals, mode, no_post_copy));
        let report = Report {
            outcome: kind,
            reason,
            missed: if completed { missed } else { Vec::new() },
            decisions: std::mem::take(&mut self.decisions).into_reports(),
            foreseen,
            machine,
            mode: self.mode_in_words(),
            total_ms: report::ms(ran_at.unwrap_or(total)),
            downtime_ms,
            downtime_parts_ms,
            verify_ms: ran_at.map_or(0.0, |at| report::ms(total.saturating_sub(at + fetching))),
            bytes_sent: self.bytes_before,
            link: self.connector.describe(),
            links_lost: self.links_lost,
            state_bytes: self.state_bytes,
            rounds: self.rounds_begun,
            pages: self.pages,
            record_pages: self.record_pages,
            paging: self.machine.fetched().map(report::paging),
            link_bytes_per_s: link_rate,
            dirty_pages_per_s: self.dirty_rate.pages_per_s(),
            dirty_pages_per_s_by_extent: self.dirty_rate.by_extent().to_vec(),
            digest_verified: digests == Some(true),
            memory_differs: digests == Some(false),
        };
        Sent { report, left }
    }
}

/// The state of `guest`, which stands still.
pub(crate) fn state_of(guest: &mut dyn Guest) -> Result<Vec<u8>, GuestError> {
    let mut writer = StateWriter::new();
    guest.save(&mut writer)?;
    writer.finish().map_err(|e| GuestError::new(e.to_string()))
}

/// Order-free digest of all memory: the wrapping sum of the digests of pages that are not zero.
pub(crate) fn digest(view: &GuestView) -> Result<u64, String> {
    const BLOCK_PAGES: u64 = 64;
    let resident = view.resident().map_err(|e| words(&e))?;
    let mut block = vec![0; PAGE_BYTES * 64];
    let mut sum = 0u64;
    for run in resident.runs() {
        let mut at = run.start;
        while at < run.end() {
            let pages = BLOCK_PAGES.min(run.end() - at);
            let bytes = &mut block[..usize::try_from(pages).unwrap_or(0) * PAGE_BYTES];
            view.read(at, bytes).map_err(|e| words(&e))?;
            for (gfn, page) in (at..).zip(bytes.chunks_exact(PAGE_BYTES)) {
                if !is_zero(page) {
                    sum = sum.wrapping_add(page_digest(gfn, page));
                }
            }
            at += pages;
        }
    }
    Ok(sum)
}
