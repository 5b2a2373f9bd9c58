//! The destination's side of a migration, as a pure state machine.
//!
//! ```text
//!  Offer        host built it        Commit, all batches here       loaded, resumed
//! Waiting ─▶ Building ─▶ Receiving ───────────▶ Loading ─▶ Resuming ─────▶ Running ─▶ Done(Runs)
//!      │        │        ▲   │ link lost
//!      │        │  Rejoin│   ▼
//!      └────────┴────── Alone ── abort, bad page, too long ─▶ Done(Void): it can never run here
//! ```
//!
//! The machine runs here if and only if the `Commit` came *and* every batch of every round did. When the link
//! is lost before both are here, that commit is void for ever: its permit is dropped, and a source that comes
//! back is told so (`GoOn`) and goes on with rounds. Once both are here the link no longer matters.
//!
//! A commit that owes pages is the same, but for these: `Page` makes them come on demand before state is
//! loaded, and the session lasts until all are here. A link that is lost before the machine is resumed makes
//! the session void. One that is lost later is awaited again (`Rejoined`), however long it takes:
//! nobody else has the machine.
//!
//! A source that stays connected and is silent ends its session as well, as long as its machine has not run here:
//! what it brought takes memory. From then on nothing ends a session that owes pages but its own machine.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use crate::limits::{HELLO_TIMEOUT, MAX_KEEP, MAX_LANES, SILENCE};
use crate::messages::{Recalled, ToDestination, ToSource, VERSION_MAX, Verdict};
use crate::{Fetched, MachineSpec, PackedPages, Refusal, RunPermit};
use ferry_pages::{Layout, PageSet};

/// More rounds than this are not a migration.
const MAX_ROUNDS: u32 = 1 << 20;

/// Pages of the last rounds come in full: nobody could send them again.
const NAMED_LAST: &str = "the source named pages that the old copy here lacks, and committed";

/// What happened, told to the destination.
#[derive(Debug)]
pub enum DestinationEvent {
    /// A message of the source.
    Message(ToDestination),
    /// The control channel or a lane broke.
    LinkLost(String),
    /// Answer to `Build`.
    Built(Result<Built, Vec<Refusal>>),
    /// Answer to `Page`.
    Paging(Result<(), String>),
    /// The last owed page came.
    AllHere(Fetched),
    /// Missing pages cannot be supplied any more.
    PagingBroken(String),
    /// The machine is thrown away before its pages are here.
    Abandoned,
    /// The source is here again on a new control channel; what older ones still bring is no event, but for
    /// `AllHere`.
    Rejoined {
        /// Pages of rounds that the source does not know to be done.
        held: PageSet,
        /// The pages that are still owed.
        owed: PageSet,
    },
    /// Another session wants this machine's place: its source has given this one up.
    Superseded,
    /// The deadline passed.
    Tick,
    /// Pages that the source named cannot be had from the old copy after all; `Installed` follows for their
    /// batch.
    Lacking(PageSet),
    /// A batch of a round was verified and installed.
    Installed {
        /// Which round.
        round: u32,
    },
    /// A lane brought something that is not a batch of this machine's pages.
    BadPages(String),
    /// Answer to `Load`.
    Loaded(Result<(), String>),
    /// Answer to `Resume`.
    Resumed(Result<(), String>),
    /// Answer to `Digest`; none where it says nothing.
    Digest(Option<u64>),
}

/// A machine that was built, empty and paused.
#[derive(Debug, Default)]
pub struct Built {
    /// Why pages cannot come after the hand-over, if so.
    pub no_post_copy: Option<String>,
    /// What an old copy of it has.
    pub recalled: Vec<Recalled>,
}

/// What the engine does next.
#[derive(Debug, PartialEq, Eq)]
pub enum DestinationAction {
    /// Send on the control channel.
    Send(ToSource),
    /// Build the machine, empty and paused, and look for an old copy of it.
    Build {
        /// What it is.
        spec: MachineSpec,
        /// Its lasting number, if an old copy is wanted.
        machine: Option<u128>,
    },
    /// Let `lanes` lanes join the session.
    AcceptLanes {
        /// Codecs that both sides have.
        codecs: u8,
        /// How many.
        lanes: u16,
    },
    /// Give back what is here of these pages: newer copies come later.
    Clear(PageSet),
    /// The link is lost, and what came is kept: close its channels.
    Hold,
    /// From now on pages come on demand; older copies of them must not be seen.
    Page {
        /// These pages.
        owed: PageSet,
        /// In rounds after this one: what is late of others is not taken.
        after: u32,
    },
    /// Load vCPU and device state.
    Load(Vec<u8>),
    /// Run the machine.
    Resume(RunPermit),
    /// Compute the digest of the pages as they were installed.
    Digest,
    /// The session is over.
    Finish(Arrival),
}

/// How a session ended, seen from the destination.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Arrival {
    /// The machine runs here; whether the source found the digests equal, if it said so.
    Runs {
        /// `None` when the link was lost before the source's word came.
        digest_verified: Option<bool>,
    },
    /// The machine does not run here and never will.
    Void(String),
}

#[derive(Debug)]
enum Phase {
    Waiting,
    Building,
    Receiving,
    /// As `Receiving`, without a link.
    Alone {
        until: Duration,
        why: String,
    },
    Committed {
        state: Vec<u8>,
        rounds: Vec<(u32, u64)>,
        owed: PageSet,
        since: Duration,
    },
    Arming {
        state: Vec<u8>,
        since: Duration,
    },
    Loading {
        since: Duration,
        complete: Duration,
    },
    Resuming {
        since: Duration,
        complete: Duration,
        loaded: Duration,
    },
    /// It runs, and pages are owed.
    Fetching,
    Running,
    Done(Verdict),
}

/// The destination of one migration.
#[derive(Debug)]
pub struct Destination {
    phase: Phase,
    session: u128,
    codecs: u8,
    lanes: u16,
    /// How long to keep what came when the link is lost.
    keep: Duration,
    /// When the source said or brought something last, or it became its turn.
    heard: Duration,
    layout: Option<Layout>,
    /// Pages were owed at the commit, and not all are here.
    owes: bool,
    fetched: Option<Fetched>,
    /// Why missing pages cannot be supplied any more.
    paging_broken: Option<String>,
    /// The source can be told, as far as is known.
    linked: bool,
    prepare_asked: bool,
    /// Of rounds that are not done: named, and not to be had.
    lacking: PageSet,
    /// Batches installed, by round, of rounds that are not done.
    installed: BTreeMap<u32, u64>,
    /// The round whose end was announced and is not complete.
    ending: Option<(u32, u64)>,
    /// Rounds up to this one are complete.
    done_through: u32,
    permit: Option<RunPermit>,
    actions: VecDeque<DestinationAction>,
}

impl Destination {
    /// A session that will be known by the random token `session`, on a host with `codecs`.
    pub fn new(session: u128, codecs: u8) -> Self {
        Self {
            phase: Phase::Waiting,
            session,
            codecs,
            lanes: 0,
            keep: Duration::ZERO,
            heard: Duration::ZERO,
            layout: None,
            owes: false,
            fetched: None,
            paging_broken: None,
            linked: true,
            prepare_asked: false,
            lacking: PageSet::new(),
            installed: BTreeMap::new(),
            ending: None,
            done_through: 0,
            permit: None,
            actions: VecDeque::new(),
        }
    }

    /// The next thing to do.
    pub fn poll(&mut self) -> Option<DestinationAction> {
        self.actions.pop_front()
    }

    /// What a source that comes back is told once the session is over.
    pub fn verdict(&self) -> Verdict {
        match self.phase {
            Phase::Running | Phase::Fetching => Verdict::Ran,
            Phase::Done(verdict) => verdict,
            _ => Verdict::Unknown,
        }
    }

    /// When to send `Tick`, as time since the start.
    pub fn deadline(&self) -> Option<Duration> {
        match self.phase {
            Phase::Alone { until, .. } => Some(until),
            Phase::Waiting => Some(self.heard.saturating_add(HELLO_TIMEOUT)),
            Phase::Receiving | Phase::Committed { .. } | Phase::Running => {
                Some(self.heard.saturating_add(SILENCE))
            }
            _ => None,
        }
    }

    /// Whether it has not run, has lost its source, and waits for it.
    pub fn is_alone(&self) -> bool {
        matches!(self.phase, Phase::Alone { .. })
    }

    /// Rounds of which batches came and that are not done: one, and two more while the guest stands still.
    pub fn open_rounds(&self) -> usize {
        self.installed.len()
    }

    /// Takes one event at time `now` since the start.
    pub fn handle(&mut self, now: Duration, event: DestinationEvent) {
        use DestinationEvent::{AllHere, Built, Digest, Installed, Message, Rejoined, Resumed};
        let of_source = matches!(&event, Message(_) | Installed { .. } | Rejoined { .. });
        let of_this_host = matches!(&event, Built(_) | Resumed(_) | AllHere(_) | Digest(_));
        if of_source || of_this_host {
            self.heard = now;
        }
        match event {
            DestinationEvent::Message(message) => self.message(now, message),
            DestinationEvent::LinkLost(why) => self.link_lost(now, why),
            DestinationEvent::BadPages(why) => self.give_up(why),
            DestinationEvent::Built(result) => self.built(result),
            DestinationEvent::Lacking(pages) => self.lacks(&pages),
            DestinationEvent::Installed { round } => self.installed(now, round),
            DestinationEvent::Paging(result) => self.paging(now, result),
            DestinationEvent::AllHere(fetched) => {
                self.fetched = Some(fetched);
                self.all_here();
            }
            DestinationEvent::PagingBroken(why) => self.paging_failed(why),
            DestinationEvent::Abandoned => {
                if matches!(self.phase, Phase::Fetching) {
                    let reason = "the machine was stopped there".to_owned();
                    self.send(ToSource::Failed { reason });
                    // Not `Ran`: a source that did not hear of it would take its pages as delivered.
                    self.finish(Verdict::Unknown, Arrival::Runs { digest_verified: None });
                }
            }
            DestinationEvent::Rejoined { held, owed } => self.rejoined(&held, &owed),
            DestinationEvent::Superseded => {
                if matches!(self.phase, Phase::Alone { .. }) {
                    self.void("the machine's source began anew".into());
                }
            }
            DestinationEvent::Tick if self.deadline().is_some_and(|at| now >= at) => {
                self.too_late();
            }
            DestinationEvent::Tick => {}
            DestinationEvent::Loaded(result) => self.loaded(now, result),
            DestinationEvent::Resumed(result) => self.resumed(now, result),
            DestinationEvent::Digest(sum) => {
                if matches!(self.phase, Phase::Running) {
                    let fetched = self.fetched.clone();
                    self.send(ToSource::Digest { sum, fetched });
                }
            }
        }
    }

    fn message(&mut self, now: Duration, message: ToDestination) {
        match (&mut self.phase, message) {
            (Phase::Done(_), _) => {}
            (Phase::Waiting, ToDestination::Offer { spec, codecs, lanes, keep, machine }) => {
                let common = codecs & self.codecs;
                if common == 0 || lanes == 0 || lanes > MAX_LANES {
                    let why = format!(
                        "the source offers codecs {codecs:#x} and {lanes} lanes; this host has codecs \
                         {:#x} and allows 1 to {MAX_LANES} lanes",
                        self.codecs
                    );
                    return self.refuse(vec![Refusal::new("version", why)]);
                }
                self.codecs = common;
                self.lanes = lanes;
                self.keep = keep.min(MAX_KEEP);
                self.layout = spec.layout().ok();
                self.phase = Phase::Building;
                self.actions.push_back(DestinationAction::Build { spec, machine });
            }
            (Phase::Building, ToDestination::Prepare) => self.prepare_asked = true,
            (Phase::Receiving, ToDestination::Prepare) => self.send(ToSource::Ready),
            (Phase::Receiving, ToDestination::RoundEnd { round, batches }) => {
                if round <= self.done_through || self.ending.is_some() {
                    return self.give_up(format!(
                        "the source ended round {round} out of order (done: {})",
                        self.done_through
                    ));
                }
                self.ending = Some((round, batches));
                self.end_round_if_complete();
            }
            (Phase::Receiving, ToDestination::Stale { pages }) => match self.unpack(&pages) {
                Ok(pages) => self.actions.push_back(DestinationAction::Clear(pages)),
                Err(why) => self.give_up(format!("the source broke the protocol: {why}")),
            },
            (Phase::Receiving, ToDestination::Commit { permit, state, rounds, owed }) => {
                let ascending = rounds.windows(2).all(|w| w[0].0 < w[1].0);
                let fresh = rounds.first().is_none_or(|r| r.0 > self.done_through);
                if !ascending || !fresh || self.ending.is_some() {
                    return self.give_up("the source committed rounds out of order".into());
                }
                if !self.lacking.is_empty() {
                    return self.refuse_commit(NAMED_LAST.into());
                }
                let owed = match self.unpack(&owed) {
                    Ok(owed) => owed,
                    Err(why) => return self.refuse_commit(why),
                };
                self.permit = Some(permit);
                self.phase = Phase::Committed { state, rounds, owed, since: now };
                self.load_if_complete(now);
            }
            (Phase::Running, ToDestination::Verified { matches }) => {
                self.finish(Verdict::Ran, Arrival::Runs { digest_verified: Some(matches) });
            }
            (Phase::Running, _) => {
                self.finish(Verdict::Ran, Arrival::Runs { digest_verified: None });
            }
            (
                Phase::Waiting | Phase::Building | Phase::Receiving | Phase::Alone { .. },
                ToDestination::Abort { reason },
            ) => self.void(format!("the source ended the migration: {reason}")),
            // The permit is here: nothing the source says takes it back.
            (
                Phase::Committed { .. }
                | Phase::Arming { .. }
                | Phase::Loading { .. }
                | Phase::Resuming { .. }
                | Phase::Fetching,
                _,
            ) => {}
            (_, other) => self.give_up(format!("the source broke the protocol: {}", name(&other))),
        }
    }

    fn too_late(&mut self) {
        let silent = |limit: Duration| {
            format!("the source was connected and silent for {} s; begin anew", limit.as_secs())
        };
        match &self.phase {
            Phase::Alone { why, .. } => {
                let s = self.keep.as_secs_f64();
                self.void(format!("{why}; its source did not come back for {s:.0} s"));
            }
            Phase::Waiting => self.give_up(silent(HELLO_TIMEOUT)),
            Phase::Running => {
                self.finish(Verdict::Ran, Arrival::Runs { digest_verified: None });
            }
            _ => self.give_up(silent(SILENCE)),
        }
    }

    fn unpack(&self, pages: &PackedPages) -> Result<PageSet, String> {
        let layout = self.layout.as_ref().ok_or("the machine has no memory layout")?;
        pages.unpack(layout).map_err(|why| format!("pages owed: {why}"))
    }

    fn built(&mut self, result: Result<Built, Vec<Refusal>>) {
        if !matches!(self.phase, Phase::Building) {
            return;
        }
        let Built { no_post_copy, recalled } = match result {
            Ok(built) => built,
            Err(reasons) => return self.refuse(reasons),
        };
        self.phase = Phase::Receiving;
        self.accept_lanes();
        for old in recalled {
            self.send(ToSource::Recalls(old));
        }
        let (version, session, codecs) = (VERSION_MAX, self.session, self.codecs);
        self.send(ToSource::Accepted { version, session, codecs, no_post_copy });
        if self.prepare_asked {
            self.send(ToSource::Ready);
        }
    }

    fn lacks(&mut self, pages: &PageSet) {
        match self.phase {
            Phase::Receiving => self.lacking.union_with(pages),
            Phase::Committed { .. } => self.refuse_commit(NAMED_LAST.into()),
            _ => {}
        }
    }

    fn installed(&mut self, now: Duration, round: u32) {
        if !matches!(self.phase, Phase::Receiving | Phase::Committed { .. }) {
            return;
        }
        if round <= self.done_through || round > MAX_ROUNDS {
            return self.give_up(format!("a batch came for round {round}, which is over"));
        }
        *self.installed.entry(round).or_default() += 1;
        self.end_round_if_complete();
        self.load_if_complete(now);
    }

    fn end_round_if_complete(&mut self) {
        let Some((round, batches)) = self.ending else { return };
        let have = self.installed.get(&round).copied().unwrap_or(0);
        if have > batches {
            return self
                .give_up(format!("round {round} has {have} batches, {batches} were announced"));
        }
        if have == batches {
            self.ending = None;
            self.done_through = round;
            self.installed = self.installed.split_off(&(round + 1));
            let lacking = PackedPages::pack(&std::mem::take(&mut self.lacking));
            self.send(ToSource::RoundDone { round, lacking });
        }
    }

    fn load_if_complete(&mut self, now: Duration) {
        let Phase::Committed { state, rounds, owed, since } = &mut self.phase else { return };
        let have = |round: &u32| self.installed.get(round).copied().unwrap_or(0);
        if let Some((round, batches)) = rounds.iter().find(|(round, n)| have(round) > *n) {
            let why = format!("round {round} has more than the {batches} batches announced");
            return self.refuse_commit(why);
        }
        if rounds.iter().all(|(round, batches)| have(round) == *batches) {
            let after = rounds.last().map_or(self.done_through, |(round, _)| *round);
            let (state, owed, since) = (std::mem::take(state), std::mem::take(owed), *since);
            if owed.is_empty() {
                return self.load(since, now, state);
            }
            self.owes = true;
            self.phase = Phase::Arming { state, since };
            self.actions.push_back(DestinationAction::Page { owed, after });
        }
    }

    fn load(&mut self, since: Duration, complete: Duration, state: Vec<u8>) {
        self.phase = Phase::Loading { since, complete };
        self.actions.push_back(DestinationAction::Load(state));
    }

    fn paging(&mut self, now: Duration, result: Result<(), String>) {
        let Phase::Arming { state, since } = &mut self.phase else { return };
        let (state, since) = (std::mem::take(state), *since);
        match result {
            Ok(()) => self.load(since, now, state),
            Err(why) => self.refuse_commit(why),
        }
    }

    fn all_here(&mut self) {
        self.owes = false;
        if !matches!(self.phase, Phase::Fetching) {
            return;
        }
        if !self.linked {
            // Nobody who could compare digests; whoever asks is told that it ran.
            return self.finish(Verdict::Ran, Arrival::Runs { digest_verified: None });
        }
        self.phase = Phase::Running;
        self.actions.push_back(DestinationAction::Digest);
    }

    fn paging_failed(&mut self, why: String) {
        match self.phase {
            Phase::Arming { .. } | Phase::Loading { .. } if self.owes => self.refuse_commit(why),
            Phase::Resuming { .. } => self.paging_broken = Some(why),
            Phase::Fetching => {
                self.send(ToSource::Failed { reason: why.clone() });
                self.paging_broken = Some(why);
            }
            _ => {}
        }
    }

    fn rejoined(&mut self, held: &PageSet, owed: &PageSet) {
        self.linked = true;
        match self.phase {
            Phase::Waiting | Phase::Building => {
                self.give_up("the source came back to a machine that is not accepted yet".into());
            }
            Phase::Receiving | Phase::Alone { .. } | Phase::Committed { .. } => {
                self.forget_commit();
                self.phase = Phase::Receiving;
                self.accept_lanes();
                self.send(ToSource::GoOn { held: PackedPages::pack(held) });
            }
            Phase::Arming { .. } | Phase::Loading { .. } if self.owes => self.refuse_commit(
                "the link was lost while state was loaded, which may need pages".into(),
            ),
            // It is told by `Running`. What it owes it can only serve when it asks once more.
            Phase::Arming { .. } | Phase::Loading { .. } | Phase::Resuming { .. } => {
                self.linked = !self.owes;
            }
            Phase::Fetching => {
                if let Some(reason) = self.paging_broken.clone() {
                    return self.send(ToSource::Failed { reason });
                }
                self.accept_lanes();
                self.send(ToSource::Lacks { owed: PackedPages::pack(owed) });
            }
            // All came, and perhaps the word of it was lost.
            Phase::Running => self.actions.push_back(DestinationAction::Digest),
            Phase::Done(_) => {}
        }
    }

    fn accept_lanes(&mut self) {
        let (codecs, lanes) = (self.codecs, self.lanes);
        self.actions.push_back(DestinationAction::AcceptLanes { codecs, lanes });
    }

    /// No commit so far runs the machine, and no count of batches on an older link is of use.
    fn forget_commit(&mut self) {
        self.permit = None;
        self.ending = None;
        self.lacking.clear();
        self.installed.clear();
    }

    fn loaded(&mut self, now: Duration, result: Result<(), String>) {
        let Phase::Loading { since, complete } = self.phase else { return };
        match (result, self.permit.take()) {
            (Ok(()), Some(permit)) => {
                self.phase = Phase::Resuming { since, complete, loaded: now };
                self.actions.push_back(DestinationAction::Resume(permit));
            }
            (Err(why), _) => self.refuse_commit(why),
            (Ok(()), None) => self.refuse_commit("no permit".into()),
        }
    }

    fn resumed(&mut self, now: Duration, result: Result<(), String>) {
        let Phase::Resuming { since, complete, loaded } = self.phase else { return };
        if let Err(why) = result {
            return self.refuse_commit(why);
        }
        let us = |from: Duration, to: Duration| {
            u64::try_from(to.saturating_sub(from).as_micros()).unwrap_or(u64::MAX)
        };
        self.phase = Phase::Fetching;
        if self.linked || !self.owes {
            self.send(ToSource::Running {
                pages_us: us(since, complete),
                load_us: us(complete, loaded),
                resume_us: us(loaded, now),
            });
        }
        if !self.owes {
            self.all_here();
        } else if let Some(why) = self.paging_broken.take() {
            self.paging_failed(why);
        }
    }

    fn link_lost(&mut self, now: Duration, why: String) {
        self.linked = false;
        match self.phase {
            Phase::Done(_) => {}
            // Loading may touch a page that is owed, and nobody serves a machine that has not run: it must
            // not wait for a source that waits for it. The permit is unused.
            Phase::Arming { .. } | Phase::Loading { .. } if self.owes => self.void(why),
            Phase::Running => self.finish(Verdict::Ran, Arrival::Runs { digest_verified: None }),
            // Everything is here, or the source comes back: go on without the link.
            Phase::Arming { .. }
            | Phase::Loading { .. }
            | Phase::Resuming { .. }
            | Phase::Fetching
            | Phase::Alone { .. } => {}
            Phase::Receiving | Phase::Committed { .. } => {
                self.forget_commit();
                self.phase = Phase::Alone { until: now.saturating_add(self.keep), why };
                self.actions.push_back(DestinationAction::Hold);
            }
            Phase::Waiting | Phase::Building => self.void(why),
        }
    }

    /// Ends the session from this side, and says so if the source can still take the machine back.
    fn give_up(&mut self, why: String) {
        match self.phase {
            Phase::Arming { .. } | Phase::Loading { .. } if self.owes => self.refuse_commit(why),
            Phase::Done(_)
            | Phase::Running
            | Phase::Fetching
            | Phase::Arming { .. }
            | Phase::Loading { .. }
            | Phase::Resuming { .. } => {}
            Phase::Committed { .. } => self.refuse_commit(why),
            _ => {
                self.send(ToSource::Failed { reason: why.clone() });
                self.void(why);
            }
        }
    }

    fn refuse(&mut self, reasons: Vec<Refusal>) {
        let words: Vec<&str> = reasons.iter().map(|r| r.why.as_str()).collect();
        let why = format!("refused: {}", words.join("; "));
        self.send(ToSource::Refused { reasons });
        self.void(why);
    }

    fn refuse_commit(&mut self, why: String) {
        self.permit = None;
        self.send(ToSource::CommitRefused { reason: why.clone() });
        self.void(why);
    }

    fn void(&mut self, why: String) {
        self.permit = None;
        self.finish(Verdict::NeverRan, Arrival::Void(why));
    }

    fn finish(&mut self, verdict: Verdict, arrival: Arrival) {
        self.phase = Phase::Done(verdict);
        self.actions.push_back(DestinationAction::Finish(arrival));
    }

    fn send(&mut self, message: ToSource) {
        self.actions.push_back(DestinationAction::Send(message));
    }
}

fn name(message: &ToDestination) -> &'static str {
    match message {
        ToDestination::Offer { .. } => "a second Offer",
        ToDestination::Prepare => "Prepare before the offer",
        ToDestination::RoundEnd { .. } => "RoundEnd before the offer was accepted",
        ToDestination::Commit { .. } => "Commit before the offer was accepted",
        ToDestination::Abort { .. } => "Abort",
        ToDestination::Verified { .. } => "Verified before it runs",
        ToDestination::Stale { .. } => "Stale before the offer was accepted",
    }
}
