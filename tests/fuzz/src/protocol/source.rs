//! A host that sends a machine away.

use std::collections::VecDeque;
use std::time::Duration;

use arbitrary::{Result, Unstructured};
use ferry_pages::PageSet;
use ferry_protocol::{
    Fetched, Goals, Mode, Outcome, Recalled, Refusal, RunPermit, Source, SourceAction, SourceEvent,
    ToDestination, ToSource, Verdict,
};

use super::{CODECS, MACHINE, SESSION, packed, pages, spec};

/// What the engine has to do.
enum Task {
    Connect,
    OpenLanes,
    Track,
    Harvest,
    Send(u32),
    Pause,
    Save,
    Digest,
    Rejoin(u32),
}

/// What came of a task.
#[derive(Default)]
pub(super) struct Did {
    pub(super) said: Vec<ToDestination>,
    /// Rounds of batches that were sent.
    pub(super) batches: Vec<u32>,
    /// The source comes back with so many rounds done.
    pub(super) rejoins: Option<u32>,
}

/// The source with its engine and its machine.
pub(super) struct SourceHost {
    source: Source,
    pub(super) now: Duration,
    /// The last round that was sent.
    pub(super) round: u32,
    tasks: VecDeque<Task>,
    said: Vec<ToDestination>,
    /// Here where the machine runs.
    permit: Option<RunPermit>,
    handovers: u64,
    committed: bool,
    /// The destination has said, since the commit, that it does not run the machine.
    released: bool,
    outcome: Option<Outcome>,
}

impl SourceHost {
    pub(super) fn new(u: &mut Unstructured<'_>) -> Result<Self> {
        let mode = *u.choose(&[Mode::Auto, Mode::PreCopy, Mode::PostCopy, Mode::Hybrid])?;
        let goals = match u.int_in_range(0..=3)? {
            0 => Goals {
                max_downtime: Duration::from_millis(u.arbitrary()?),
                max_total: Duration::from_millis(u.arbitrary()?),
                max_slowdown: u.arbitrary()?,
            },
            _ => Goals::default(),
        };
        let rejoin_for = match u.ratio(1, 8)? {
            true => Duration::from_millis(u.arbitrary()?),
            false => Duration::from_secs(u.int_in_range(0..=100)?),
        };
        let source = Source::new(spec(), Some(MACHINE), CODECS, 1, (goals, mode), rejoin_for);
        Ok(Self {
            source,
            now: Duration::ZERO,
            round: 0,
            tasks: VecDeque::from([Task::Connect]),
            said: Vec::new(),
            permit: Some(RunPermit::for_new_machine(MACHINE)),
            handovers: 0,
            committed: false,
            released: false,
            outcome: None,
        })
    }

    pub(super) fn runs(&self) -> bool {
        self.permit.is_some()
    }

    fn tell(&mut self, event: SourceEvent) {
        self.source.handle(self.now, event);
        let mut count = 0;
        while let Some(action) = self.source.poll() {
            self.act(action);
            count += 1;
        }
        assert!(count <= 16, "{count} actions for one event");
    }

    fn act(&mut self, action: SourceAction) {
        match action {
            SourceAction::Send(message) => {
                if let ToDestination::Commit { permit, .. } = &message {
                    assert!(self.permit.is_none(), "committed while it runs");
                    assert_eq!(permit.machine(), MACHINE);
                    assert!(permit.handovers() > self.handovers, "a permit is used again");
                    self.handovers = permit.handovers();
                    (self.committed, self.released) = (true, false);
                }
                self.said.push(message);
            }
            SourceAction::OpenLanes { .. } => self.tasks.push_back(Task::OpenLanes),
            SourceAction::StartTracking => self.tasks.push_back(Task::Track),
            SourceAction::Harvest => self.tasks.push_back(Task::Harvest),
            SourceAction::SendPages { round, .. } => {
                self.round = round;
                self.tasks.push_back(Task::Send(round));
            }
            SourceAction::Pause => self.tasks.push_back(Task::Pause),
            SourceAction::SaveState => self.tasks.push_back(Task::Save),
            SourceAction::DigestMemory => self.tasks.push_back(Task::Digest),
            SourceAction::Rejoin { done, .. } => {
                self.tasks.retain(|task| !matches!(task, Task::OpenLanes | Task::Send(_)));
                self.tasks.push_back(Task::Rejoin(done));
            }
            SourceAction::Resume(permit) => {
                assert!(self.permit.is_none(), "it runs already");
                assert!(!self.committed || self.released, "resumed though the permit has left");
                assert!(permit.handovers() >= self.handovers);
                self.committed = false;
                self.permit = Some(permit);
            }
            SourceAction::Finish(outcome) => {
                assert!(self.outcome.is_none(), "it ends twice");
                self.outcome = Some(outcome);
            }
            SourceAction::Recall { pages, digests } => {
                assert_eq!(pages.len(), digests.len() as u64);
            }
            SourceAction::Forget
            | SourceAction::Throttle(_)
            | SourceAction::Sample(_)
            | SourceAction::ReturnDirty(_)
            | SourceAction::StopTracking
            | SourceAction::Serve { .. }
            | SourceAction::Push
            | SourceAction::Tell(_) => {}
        }
    }

    /// Carries out the next task.
    pub(super) fn work(&mut self, u: &mut Unstructured<'_>) -> Result<Did> {
        let mut did = Did::default();
        let event = match self.tasks.pop_front() {
            None => {
                did.said = std::mem::take(&mut self.said);
                return Ok(did);
            }
            Some(Task::Connect) => SourceEvent::Connected,
            Some(Task::OpenLanes) => SourceEvent::LanesOpen,
            Some(Task::Track) => SourceEvent::TrackingStarted(pages(u)?),
            // A machine that stands still writes nothing.
            Some(Task::Harvest) if !self.runs() => SourceEvent::Harvested(PageSet::new()),
            Some(Task::Harvest) => SourceEvent::Harvested(pages(u)?),
            Some(Task::Send(round)) => {
                let batches = u.int_in_range(1..=2)?;
                did.batches = vec![round; usize::try_from(batches).unwrap_or(1)];
                SourceEvent::RoundSent { round, batches, bytes: u.arbitrary()?, same: 0 }
            }
            Some(Task::Pause) => match self.permit.take() {
                Some(permit) => SourceEvent::Paused(permit),
                None => panic!("asked to pause a machine that does not run"),
            },
            Some(Task::Save) => SourceEvent::StateSaved(vec![1]),
            Some(Task::Digest) => {
                assert!(!self.runs(), "memory that changes is summed up");
                SourceEvent::MemoryDigest(u.int_in_range(0..=1)?)
            }
            Some(Task::Rejoin(done)) => {
                self.said.clear();
                did.rejoins = Some(done);
                return Ok(did);
            }
        };
        self.tell(event);
        did.said = std::mem::take(&mut self.said);
        Ok(did)
    }

    /// Between the wish to come back and the new link, an older one brings nothing any more.
    pub(super) fn hears(&mut self, message: ToSource) {
        if self.tasks.iter().any(|task| matches!(task, Task::Rejoin(_))) {
            return;
        }
        let never_ran = matches!(
            message,
            ToSource::CommitRefused { .. }
                | ToSource::GoOn { .. }
                | ToSource::Verdict(Verdict::NeverRan)
        );
        self.released |= never_ran && self.committed;
        self.tell(SourceEvent::Message(message));
    }

    pub(super) fn loses_the_link(&mut self) {
        self.tasks.retain(|task| !matches!(task, Task::OpenLanes | Task::Send(_)));
        self.said.clear();
        self.tell(SourceEvent::LinkLost("cut".into()));
    }

    pub(super) fn ticks(&mut self) {
        if let Some(deadline) = self.source.deadline() {
            self.now = self.now.max(deadline);
            self.tell(SourceEvent::Tick);
        }
    }

    pub(super) fn misfortune(&mut self, u: &mut Unstructured<'_>) -> Result<()> {
        match u.int_in_range(0..=5)? {
            0..=2 => self.ticks(),
            3 => self.loses_the_link(),
            4 => self.tell(SourceEvent::Failed("the disk is full".into())),
            _ => self.tell(SourceEvent::Cancel),
        }
        Ok(())
    }

    /// Carries out what is left, and insists that the machine is where the outcome says.
    pub(super) fn ends(mut self) -> Result<()> {
        if self.outcome.is_none() {
            return Ok(());
        }
        while !self.tasks.is_empty() {
            self.work(&mut Unstructured::new(&[0; 256]))?;
        }
        let here = match self.outcome.take() {
            Some(Outcome::Cancelled | Outcome::Refused(_) | Outcome::Failed(_)) => true,
            Some(Outcome::Detached { reattach, .. }) => {
                self.source = Source::reattach(reattach, Goals::default(), Duration::from_secs(9));
                self.now = Duration::ZERO;
                self.ticks();
                false
            }
            _ => false,
        };
        assert_eq!(self.runs(), here, "committed: {}", self.committed);
        Ok(())
    }
}

/// Any message of a destination; often one that fits.
pub(super) fn anything(u: &mut Unstructured<'_>, round: u32) -> Result<ToSource> {
    let why = || "because".to_owned();
    Ok(match u.int_in_range(0..=13)? {
        0..=1 => ToSource::Accepted {
            version: *u.choose(&[2, 2, 2, 0, 1, 3])?,
            session: SESSION,
            codecs: *u.choose(&[CODECS, CODECS, 0, 0xf0])?,
            no_post_copy: u.ratio(1, 4)?.then(why),
        },
        2 => {
            let pages = packed(u)?;
            let digests = vec![5; u.int_in_range(0..=4)?];
            ToSource::Recalls(Recalled { pages, digests })
        }
        3 => ToSource::Refused { reasons: vec![Refusal::new("memory", "none")] },
        4 => ToSource::Ready,
        5..=6 => ToSource::RoundDone {
            round: round.saturating_sub(u32::from(u.ratio(1, 8)?)),
            lacking: packed(u)?,
        },
        7 => ToSource::Failed { reason: why() },
        8 => ToSource::Running { pages_us: u.arbitrary()?, load_us: 0, resume_us: u64::MAX },
        9 => ToSource::CommitRefused { reason: why() },
        10 => {
            let sum = u.ratio(3, 4)?.then_some(1);
            ToSource::Digest { sum, fetched: u.arbitrary::<bool>()?.then(Fetched::default) }
        }
        11 => ToSource::GoOn { held: packed(u)? },
        12 => ToSource::Lacks { owed: packed(u)? },
        _ => ToSource::Verdict(*u.choose(&[Verdict::Ran, Verdict::NeverRan, Verdict::Unknown])?),
    })
}
