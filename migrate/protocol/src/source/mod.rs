//! The source's side of a migration, as a pure state machine.
//!
//! ```text
//!             Accepted        RoundDone, policy says so      Commit sent
//! Negotiating ───▶ Starting ───▶ Round ⇄ Harvest ───▶ Final ───▶ Committed ───▶ Verifying ───▶ Done
//!      └───────────────┴────────────┴─────────┴────────┘            │  ▲
//!           cancel, refusal, error: the source runs on              ▼  │ link lost: come back, and ask
//!                                                                InDoubt ──▶ Done (paused, safe)
//! ```
//! A link that is lost before the commit is opened again (`Rejoining`, `Reopening`): the guest runs on
//! meanwhile, both sides keep what they have, and what is not known to be there is sent again.
//!
//! With post-copy, what is dirty at the commit is *owed*: it is served while the machine runs there.
//!
//! ```text
//! Committed ──Running──▶ Serving ──Digest──▶ Verifying ─▶ Done
//!                          │  ▲ Lacks: serve what is still owed
//!                link lost ▼  │
//!            Rejoining, Reopening ──too long, or the operator's word──▶ Done (Detached: can be taken up)
//! ```
//!
//! In doubt for too long, it is detached as well: if the machine does run there, its pages are only here.
//!
//! Call order: [`handle`](Source::handle) with each event and the time since the start, then
//! [`poll`](Source::poll) until it returns nothing, carrying out each action. The engine answers an
//! action with the event of the same name. [`deadline`](Source::deadline) says when to send a `Tick`.
//!
//! # The commit point
//! `Commit` takes the [`RunPermit`] with it. From then on this machine has only a stub, which turns
//! into a permit again by the destination's explicit word and by nothing else here: a time-out or a
//! lost link never resumes the guest.
//!
//! # The debt
//! Every harvested page is in `pending` or `in_flight` until the destination acknowledged its round.
//! When the migration ends before the commit, both go back by `ReturnDirty`.

mod after_commit;
mod clearing;
mod events;
mod handover;
mod probe;
mod reattach;
mod rejoin;
mod starting;

use std::collections::VecDeque;
use std::time::Duration;

use ferry_pages::{Layout, PageSet};

use crate::limits::MAX_LANES;
use crate::messages::{ToDestination, ToSource, VERSION_MAX, VERSION_MIN};
use crate::outcome::{Outcome, Progress, Switchover};
use crate::permit::PermitStub;
use crate::policy::{Decision, Goals, Mode, Policy, RoundFacts};
use crate::{Fetched, MachineSpec, RunPermit, Sampled};

use probe::{Look, Probe};

pub use events::{SourceAction, SourceEvent};
pub use reattach::{Reattach, Spooled};
pub use rejoin::{DOUBT_TIMEOUT, QUESTION_TIMEOUT};

/// How long to wait for an answer of a peer whose connection is alive.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(60);
/// Harvests that are remembered, the last ones: pages written lately are served first.
const MAX_RECORD: usize = 8;

#[derive(Debug)]
enum Phase {
    Connecting,
    Negotiating,
    Starting { lanes: bool },
    Sending { began: Duration, pages: u64 },
    Acknowledging { began: Duration, sent: Duration, pages: u64, bytes: u64, same: u64 },
    Harvesting { facts: RoundFacts },
    Sampling,
    Clearing { times: u8 },
    Cleared { times: u8 },
    WaitingReady,
    Pausing,
    LastHarvest,
    Saving,
    HarvestAfterSave,
    FinalSending,
    Committed,
    Doubting { since: Duration, why: String },
    Serving,
    Rejoining { since: Duration, wait: Duration, why: String },
    Reopening { since: Duration, wait: Duration },
    Verifying { ours: Option<u64>, theirs: Option<u64> },
    Done,
}

/// The source of one migration.
#[derive(Debug)]
pub struct Source {
    phase: Phase,
    policy: Policy,
    offer: Option<ToDestination>,
    layout: Layout,
    /// What the destination has in an old copy.
    recalled: PageSet,
    session: u128,
    codecs: u8,
    ready: bool,
    round: u32,
    /// Dirty, not sent.
    pending: PageSet,
    /// Sent, not acknowledged.
    in_flight: PageSet,
    /// Rounds sent while the guest stood still: number and batches, when known.
    final_rounds: Vec<(u32, Option<u64>)>,
    state: Vec<u8>,
    /// The rest goes after the hand-over.
    post_copy: bool,
    /// Served after the hand-over.
    owed: PageSet,
    /// The last harvests, the latest first.
    record: VecDeque<PageSet>,
    fetched: Option<Fetched>,
    look: Look,
    probe: Option<Probe>,
    sampled: Option<Sampled>,
    /// How long to try to come back over a lost link.
    rejoin_for: Duration,
    permit: Option<RunPermit>,
    /// The permit has left, and has not come back.
    committed: bool,
    stub: Option<PermitStub>,
    tracking: bool,
    /// Actions of which the engine's answer is still to come.
    answers_due: u32,
    why_now: String,
    switchover: Switchover,
    deadline: Option<Duration>,
    actions: VecDeque<SourceAction>,
}

impl Source {
    /// A migration of the machine `spec`, whose lasting number is `machine` where it is known, over `lanes`
    /// lanes with `codecs` (a bit each), by `mode` to reach `goals`. When the link is lost, it tries for
    /// `rejoin_for` to come back.
    pub fn new(
        spec: MachineSpec,
        machine: Option<u128>,
        codecs: u8,
        lanes: u16,
        (goals, mode): (Goals, Mode),
        rejoin_for: Duration,
    ) -> Self {
        let lanes = lanes.clamp(1, MAX_LANES);
        Self {
            phase: Phase::Connecting,
            policy: Policy::new(goals, mode),
            layout: spec.layout().unwrap_or_default(),
            recalled: PageSet::new(),
            offer: Some(ToDestination::Offer { spec, codecs, lanes, keep: rejoin_for, machine }),
            session: 0,
            codecs,
            ready: false,
            round: 0,
            pending: PageSet::new(),
            in_flight: PageSet::new(),
            final_rounds: Vec::new(),
            state: Vec::new(),
            post_copy: false,
            owed: PageSet::new(),
            record: VecDeque::new(),
            fetched: None,
            look: Look::First,
            probe: None,
            sampled: None,
            rejoin_for,
            permit: None,
            committed: false,
            stub: None,
            tracking: false,
            answers_due: 0,
            why_now: String::new(),
            switchover: Switchover::default(),
            deadline: None,
            actions: VecDeque::new(),
        }
    }

    /// The next thing to do.
    pub fn poll(&mut self) -> Option<SourceAction> {
        self.actions.pop_front()
    }

    /// When to send `Tick`, as time since the start.
    pub fn deadline(&self) -> Option<Duration> {
        self.deadline
    }

    /// The policy, with what it measured.
    pub fn policy(&self) -> &Policy {
        &self.policy
    }

    /// When the parts of the switchover happened.
    pub fn switchover(&self) -> Switchover {
        self.switchover
    }

    /// Rounds begun.
    pub fn rounds(&self) -> u32 {
        self.round
    }

    /// How the destination fetched pages, once it said so.
    pub fn fetched(&self) -> Option<&Fetched> {
        self.fetched.as_ref()
    }

    /// Whether pages went after the hand-over.
    pub fn is_post_copy(&self) -> bool {
        self.post_copy
    }

    /// Whether the permit has left.
    pub fn is_committed(&self) -> bool {
        self.committed
    }

    /// The pages that this source has still to bring, or to give back: those not sent, those sent and not
    /// acknowledged, and those owed after the hand-over. A page in none of them, and not in the trackers, is at
    /// the destination as it is here.
    pub fn debt(&self) -> [&PageSet; 3] {
        [&self.pending, &self.in_flight, &self.owed]
    }

    /// Takes one event at time `now` since the start.
    pub fn handle(&mut self, now: Duration, event: SourceEvent) {
        match event {
            SourceEvent::Tick => self.tick(now),
            SourceEvent::Cancel => self.cancel(),
            SourceEvent::Tune(goals) => self.tune(now, goals),
            SourceEvent::CannotThrottle(why) => self.policy.cannot_slow(why),
            SourceEvent::LinkLost(why) => self.link_lost(now, why),
            SourceEvent::Failed(why) => self.failed(now, why),
            SourceEvent::Message(message) => self.message(now, message),
            SourceEvent::Paused(permit) => {
                self.answers_due = self.answers_due.saturating_sub(1);
                self.paused(now, permit);
            }
            other => self.progress(now, other),
        }
    }

    fn progress(&mut self, now: Duration, event: SourceEvent) {
        if let SourceEvent::TrackingStarted(_)
        | SourceEvent::Harvested(_)
        | SourceEvent::StateSaved(_) = &event
        {
            self.answers_due = self.answers_due.saturating_sub(1);
        }
        match (&mut self.phase, event) {
            (Phase::Connecting, SourceEvent::Connected) => {
                self.phase = Phase::Negotiating;
                self.actions.extend(self.offer.take().map(SourceAction::Send));
                self.expect_answer(now);
            }
            (Phase::Starting { lanes }, SourceEvent::LanesOpen) => {
                *lanes = true;
                self.begin_if_started(now);
            }
            (
                Phase::Sending { began, pages },
                SourceEvent::RoundSent { round, batches, bytes, same },
            ) if round == self.round => {
                self.phase =
                    Phase::Acknowledging { began: *began, sent: now, pages: *pages, bytes, same };
                self.send(ToDestination::RoundEnd { round, batches });
                self.expect_answer(now);
            }
            (Phase::Sampling, SourceEvent::Harvested(pages)) => {
                self.remember(&pages);
                self.pending.union_with(&pages);
                match self.probe.is_some() {
                    true => self.probed(now, None, &pages),
                    false => self.hand_over_when_ready(now),
                }
            }
            (&mut Phase::Cleared { times }, SourceEvent::Harvested(pages)) => {
                self.remember(&pages);
                self.cleared(now, &pages, times);
            }
            (Phase::Harvesting { facts }, SourceEvent::Harvested(pages)) => {
                let facts = *facts;
                self.remember(&pages);
                self.pending.union_with(&pages);
                if self.probe.is_some() {
                    return self.probed(now, Some(facts), &pages);
                }
                self.decide(now, facts);
            }
            (Phase::LastHarvest, SourceEvent::Harvested(pages)) => {
                self.switchover.harvested = now;
                self.remember(&pages);
                self.pending.union_with(&pages);
                self.send_final();
                self.phase = Phase::Saving;
                self.ask(SourceAction::SaveState);
            }
            (Phase::Saving, SourceEvent::StateSaved(state)) => {
                self.switchover.saved = now;
                self.state = state;
                self.phase = Phase::HarvestAfterSave;
                self.ask(SourceAction::Harvest);
            }
            (Phase::HarvestAfterSave, SourceEvent::Harvested(pages)) => {
                self.pending.union_with(&pages);
                self.send_final();
                self.phase = Phase::FinalSending;
                self.commit_if_sent(now);
            }
            (
                Phase::Saving | Phase::HarvestAfterSave | Phase::FinalSending,
                SourceEvent::RoundSent { round, batches, .. },
            ) => {
                for r in self.final_rounds.iter_mut().filter(|r| r.0 == round) {
                    r.1 = Some(batches);
                }
                self.commit_if_sent(now);
            }
            (Phase::Reopening { .. }, SourceEvent::LanesOpen) => self.reopened(now),
            (Phase::Verifying { ours, .. }, SourceEvent::MemoryDigest(sum)) => {
                *ours = Some(sum);
                self.verify();
            }
            // Collected for a migration that ended meanwhile: still a debt.
            (Phase::Done, SourceEvent::Harvested(pages)) if !pages.is_empty() => {
                self.actions.push_back(SourceAction::ReturnDirty(pages));
            }
            (Phase::Done, _) => {}
            // The link was lost meanwhile: still a debt, and a page that holds data.
            (_, SourceEvent::Harvested(pages) | SourceEvent::TrackingStarted(pages)) => {
                self.pending.union_with(&pages);
                self.begin_if_started(now);
            }
            // Answers that come after the migration took another turn.
            (_, SourceEvent::StateSaved(_)) => self.begin_if_started(now),
            _ => {}
        }
    }

    fn message(&mut self, now: Duration, message: ToSource) {
        match (&mut self.phase, message) {
            (Phase::Done, _) => {}
            (
                Phase::Doubting { .. } | Phase::Rejoining { .. } | Phase::Reopening { .. },
                message,
            ) => self.message_on_return(now, message),
            (Phase::Committed | Phase::Serving | Phase::Verifying { .. }, message) => {
                self.message_after_commit(now, message);
            }
            (Phase::Negotiating, ToSource::Accepted { version, session, codecs, no_post_copy }) => {
                let codecs = codecs & self.codecs;
                if !(VERSION_MIN..=VERSION_MAX).contains(&version) || codecs == 0 {
                    self.fail_before_commit(format!(
                        "the destination chose protocol version {version} and codecs {codecs:#x}, \
                         which were not offered"
                    ));
                    return;
                }
                if let Some(Err(why)) = no_post_copy.map(|why| self.policy.no_post_copy(&why)) {
                    return self.fail_before_commit(why);
                }
                self.session = session;
                self.codecs = codecs;
                self.tell(Progress::Accepted);
                self.phase = Phase::Starting { lanes: false };
                self.tracking = true;
                self.actions.push_back(SourceAction::OpenLanes { session, codecs });
                self.ask(SourceAction::StartTracking);
                self.send(ToDestination::Prepare);
                self.expect_answer(now);
            }
            (Phase::Negotiating, ToSource::Recalls(old)) => self.recalls(now, old),
            (Phase::Negotiating, ToSource::Refused { reasons }) => {
                self.phase = Phase::Done;
                self.actions.push_back(SourceAction::Finish(Outcome::Refused(reasons)));
            }
            (_, ToSource::Ready) => {
                self.ready = true;
                if matches!(self.phase, Phase::WaitingReady) {
                    self.pause(now);
                }
            }
            (
                Phase::Acknowledging { began, sent, pages, bytes, same },
                ToSource::RoundDone { round, lacking },
            ) if round == self.round => {
                let lacking = match lacking.unpack_within(&self.in_flight) {
                    Ok(lacking) => lacking,
                    Err(why) => {
                        let why = format!("the destination lacks pages that were not sent: {why}");
                        return self.fail_before_commit(why);
                    }
                };
                let facts = RoundFacts {
                    round,
                    took: now.saturating_sub(*began),
                    pages: *pages,
                    bytes: *bytes,
                    same: *same,
                    dirty: 0,
                    next_leaves: None,
                    acknowledged_in: now.saturating_sub(*sent),
                    elapsed: now,
                };
                self.in_flight.clear();
                if !lacking.is_empty() {
                    self.pending.union_with(&lacking);
                    self.actions.push_back(SourceAction::Forget);
                }
                self.phase = Phase::Harvesting { facts };
                self.ask(SourceAction::Harvest);
            }
            (&mut Phase::Clearing { times }, ToSource::RoundDone { round, lacking })
                if round == self.round && lacking.is_empty() =>
            {
                self.phase = Phase::Cleared { times };
                self.ask(SourceAction::Harvest);
            }
            (_, ToSource::Failed { reason }) => {
                self.fail_before_commit(format!("the destination gave up: {reason}"));
            }
            (_, ToSource::Refused { reasons }) => {
                self.abort("refused");
                self.finish(Outcome::Refused(reasons));
            }
            (_, other) => self.fail_before_commit(format!(
                "the destination broke the protocol: {} was not expected now",
                name(&other)
            )),
        }
    }

    fn remember(&mut self, pages: &PageSet) {
        self.record.push_front(pages.clone());
        self.record.truncate(MAX_RECORD);
    }

    fn begin_round(&mut self, now: Duration) {
        let pages = std::mem::take(&mut self.pending);
        self.begin_round_of(now, pages);
    }

    fn begin_round_of(&mut self, now: Duration, pages: PageSet) {
        self.round += 1;
        self.in_flight = pages.clone();
        self.tell(Progress::RoundStarted { round: self.round, pages: pages.len() });
        self.phase = Phase::Sending { began: now, pages: pages.len() };
        // Progress is the lanes' business; a dead peer is found by the link.
        self.deadline = Some(self.policy.goals().max_total.max(now));
        self.actions.push_back(SourceAction::SendPages { round: self.round, pages });
    }

    fn decide(&mut self, now: Duration, facts: RoundFacts) {
        let slowed = self.policy.slowed();
        let dirty = self.pending.len();
        let next_leaves = self.sampled.as_ref().map(|sampled| sampled.left_by(dirty, slowed));
        let facts = RoundFacts { dirty, next_leaves, elapsed: now, ..facts };
        let decision = self.policy.after_round(facts);
        self.tell(Progress::RoundDone {
            facts,
            rate_bytes_per_s: self.policy.rate_bytes_per_s(),
            bytes_per_page: self.policy.bytes_per_page(),
            round_trip: self.policy.round_trip().unwrap_or_default(),
            expected_downtime: self.policy.expected_downtime(),
            slowed,
            decision: decision.clone(),
        });
        match decision {
            Decision::Round(_) => self.begin_round(now),
            Decision::Slow(percent, _) => {
                self.actions.push_back(SourceAction::Throttle(percent));
                self.begin_round(now);
            }
            Decision::GiveUp(why) => self.fail_before_commit(why),
            Decision::SwitchOver(why) => {
                self.why_now = why;
                self.hand_over_when_ready(now);
            }
            Decision::PostCopy(why) => {
                self.why_now = why;
                self.post_copy = true;
                self.clear(now, &self.pending.clone(), 1);
            }
        }
    }

    /// Goes for these goals from now on; after the commit they change nothing.
    fn tune(&mut self, now: Duration, goals: Goals) {
        if let Some(percent) = self.policy.set_goals(goals) {
            self.actions.push_back(SourceAction::Throttle(percent));
        }
        if matches!(self.phase, Phase::Sending { .. }) {
            self.deadline = Some(goals.max_total.max(now));
        }
    }

    /// vCPUs run as fast as they can, where they go on here.
    fn let_go(&mut self) {
        if self.policy.slowed() > 0 {
            self.policy.let_go();
            self.actions.push_back(SourceAction::Throttle(0));
        }
    }

    fn tick(&mut self, now: Duration) {
        if self.deadline.is_none_or(|d| now < d) {
            return;
        }
        self.deadline = None;
        match &mut self.phase {
            Phase::Done | Phase::Connecting | Phase::Serving => {}
            Phase::Sampling => self.ask(SourceAction::Harvest),
            Phase::Rejoining { .. } | Phase::Reopening { .. } | Phase::Doubting { .. } => {
                self.tick_on_return(now);
            }
            Phase::Committed => {
                self.doubt(
                    now,
                    format!(
                        "no word from the destination for {} s after the commit",
                        ANSWER_TIMEOUT.as_secs()
                    ),
                );
            }
            Phase::Verifying { .. } => self.finish(Outcome::Completed {
                digest_verified: None,
                reason: "the destination did not send its digest of memory".into(),
            }),
            Phase::Sending { .. } => {
                // In all other modes the rest goes after the hand-over, once this round is over.
                if self.policy.mode() == Mode::PreCopy
                    && let Some(why) = self.policy.out_of_time(now)
                {
                    self.fail_before_commit(why);
                }
            }
            Phase::Pausing
            | Phase::LastHarvest
            | Phase::Saving
            | Phase::HarvestAfterSave
            | Phase::FinalSending => self.fail_before_commit(format!(
                "the last pages were not sent {} s after the guest was stopped: the destination takes no \
                 more, or the link is far slower than it was",
                self.longest_standstill().as_secs()
            )),
            _ => self.fail_before_commit(format!(
                "no answer from the destination for {} s",
                ANSWER_TIMEOUT.as_secs()
            )),
        }
    }

    fn cancel(&mut self) {
        if self.is_committed() {
            if matches!(self.phase, Phase::Rejoining { .. } | Phase::Reopening { .. }) {
                self.detach("the operator ended the attempts to come back".into());
            }
            return;
        }
        if matches!(self.phase, Phase::Done) {
            return;
        }
        self.abort("cancelled by the operator");
        self.finish(Outcome::Cancelled);
    }

    fn failed(&mut self, now: Duration, why: String) {
        match self.phase {
            Phase::Done => {}
            Phase::Verifying { .. } => self.finish(Outcome::Completed {
                digest_verified: None,
                reason: format!("memory here could not be digested: {why}"),
            }),
            // Nothing that fails here can change what the destination does with its permit.
            Phase::Committed | Phase::Doubting { .. } => {}
            // Pages can be served again on new lanes.
            Phase::Serving | Phase::Rejoining { .. } | Phase::Reopening { .. }
                if self.is_committed() =>
            {
                self.link_lost(now, why);
            }
            _ => self.fail_before_commit(why),
        }
    }

    fn link_lost(&mut self, now: Duration, why: String) {
        match self.phase {
            Phase::Done => {}
            Phase::Committed => self.doubt(now, why),
            Phase::Serving => self.come_back(now, why),
            Phase::Doubting { .. } | Phase::Rejoining { .. } | Phase::Reopening { .. } => {
                self.lost_on_return(now, why);
            }
            Phase::Verifying { .. } => self.finish(Outcome::Completed {
                digest_verified: None,
                reason: format!(
                    "the machine runs at the destination; then the link was lost: {why}"
                ),
            }),
            Phase::Connecting => {
                self.phase = Phase::Done;
                self.actions.push_back(SourceAction::Finish(Outcome::Failed(why)));
            }
            // The destination knows of no session yet.
            Phase::Negotiating => self.fail_before_commit(why),
            _ if self.look == Look::Only => self.fail_before_commit(why),
            _ => {
                // What it lacks is not worth another look.
                (self.look, self.probe) = (Look::Over, None);
                self.roll_back();
                self.come_back(now, why);
            }
        }
    }

    fn fail_before_commit(&mut self, why: String) {
        self.abort(&why);
        self.finish(Outcome::Failed(why));
    }

    /// Undoes everything: the guest runs, and what it owes is given back.
    fn abort(&mut self, why: &str) {
        self.resume_here();
        let mut owed = std::mem::take(&mut self.pending);
        owed.union_with(&std::mem::take(&mut self.in_flight));
        if !owed.is_empty() {
            self.actions.push_back(SourceAction::ReturnDirty(owed));
        }
        if !matches!(self.phase, Phase::Connecting | Phase::Done) {
            self.send(ToDestination::Abort { reason: why.to_owned() });
        }
    }

    fn resume_here(&mut self) {
        self.let_go();
        if let Some(permit) = self.permit.take() {
            self.actions.push_back(SourceAction::Resume(permit));
        }
    }

    fn finish(&mut self, outcome: Outcome) {
        self.stop_tracking();
        self.phase = Phase::Done;
        self.deadline = None;
        self.actions.push_back(SourceAction::Finish(outcome));
    }

    fn stop_tracking(&mut self) {
        if std::mem::take(&mut self.tracking) {
            self.actions.push_back(SourceAction::StopTracking);
        }
    }

    fn expect_answer(&mut self, now: Duration) {
        self.deadline = Some(now + ANSWER_TIMEOUT);
    }

    /// Asks the engine for something that it answers.
    fn ask(&mut self, action: SourceAction) {
        self.answers_due += 1;
        self.actions.push_back(action);
    }

    fn send(&mut self, message: ToDestination) {
        self.actions.push_back(SourceAction::Send(message));
    }

    fn tell(&mut self, progress: Progress) {
        self.actions.push_back(SourceAction::Tell(progress));
    }
}

fn name(message: &ToSource) -> &'static str {
    match message {
        ToSource::Accepted { .. } => "Accepted",
        ToSource::Recalls(_) => "Recalls",
        ToSource::Refused { .. } => "Refused",
        ToSource::Ready => "Ready",
        ToSource::RoundDone { .. } => "RoundDone",
        ToSource::Failed { .. } => "Failed",
        ToSource::Running { .. } => "Running",
        ToSource::CommitRefused { .. } => "CommitRefused",
        ToSource::Digest { .. } => "Digest",
        ToSource::GoOn { .. } => "GoOn",
        ToSource::Lacks { .. } => "Lacks",
        ToSource::Verdict(_) => "Verdict",
    }
}
