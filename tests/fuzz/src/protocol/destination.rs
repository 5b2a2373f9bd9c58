//! A host that takes a machine in.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use arbitrary::{Result, Unstructured};
use ferry_pages::PageSet;
use ferry_protocol::{
    Arrival, Built, Destination, DestinationAction, DestinationEvent, Fetched, PackedPages,
    Refusal, RunPermit, ToDestination, ToSource, Verdict, wire,
};

use super::{CODECS, MACHINE, SESSION, packed, pages, spec};

/// What the engine has to do.
enum Task {
    Build,
    Page,
    Load,
    Resume(RunPermit),
    Digest,
}

/// The destination with its engine and, perhaps, the machine.
pub(super) struct DestinationHost {
    destination: Destination,
    pub(super) now: Duration,
    tasks: VecDeque<Task>,
    said: Vec<ToSource>,
    /// Batches that came, by round, since batches count.
    installed: BTreeMap<u32, u64>,
    /// Rounds of the commit that counts.
    commit: Option<Vec<(u32, u64)>>,
    owed: PageSet,
    permit: Option<RunPermit>,
    /// It said that the machine did not run and never will.
    void: bool,
    over: bool,
}

impl Default for DestinationHost {
    fn default() -> Self {
        Self {
            destination: Destination::new(SESSION, CODECS),
            now: Duration::ZERO,
            tasks: VecDeque::new(),
            said: Vec::new(),
            installed: BTreeMap::new(),
            commit: None,
            owed: PageSet::new(),
            permit: None,
            void: false,
            over: false,
        }
    }
}

impl DestinationHost {
    /// It runs, or is about to.
    pub(super) fn runs(&self) -> bool {
        self.permit.is_some() || self.tasks.iter().any(|task| matches!(task, Task::Resume(_)))
    }

    fn tell(&mut self, event: DestinationEvent) {
        self.destination.handle(self.now, event);
        let mut count = 0;
        while let Some(action) = self.destination.poll() {
            self.act(action);
            count += 1;
        }
        assert!(count <= 8, "{count} actions for one event");
        match self.destination.verdict() {
            Verdict::Ran => assert!(self.permit.is_some() && !self.void),
            Verdict::NeverRan => assert!(!self.runs() && self.over),
            Verdict::Unknown => {}
        }
    }

    fn act(&mut self, action: DestinationAction) {
        assert!(!self.over, "{action:?} after the end");
        match action {
            DestinationAction::Send(message) => {
                match &message {
                    ToSource::CommitRefused { .. } => self.void = true,
                    ToSource::GoOn { .. } => {
                        assert!(!self.runs());
                        self.commit = None;
                    }
                    _ => {}
                }
                self.said.push(message);
            }
            DestinationAction::Build { .. } => self.tasks.push_back(Task::Build),
            // Batches count from here on.
            DestinationAction::AcceptLanes { .. } => self.installed.clear(),
            DestinationAction::Clear(_) => assert!(!self.runs(), "its memory is the guest's"),
            DestinationAction::Hold => {
                self.installed.clear();
                self.commit = None;
            }
            DestinationAction::Page { owed, .. } => {
                self.assert_complete();
                self.owed = owed;
                self.tasks.push_back(Task::Page);
            }
            DestinationAction::Load(_) => {
                // More may come while it arms for what is owed.
                if self.owed.is_empty() {
                    self.assert_complete();
                }
                self.tasks.push_back(Task::Load);
            }
            DestinationAction::Resume(permit) => {
                assert!(!self.void && !self.runs() && self.commit.is_some());
                self.tasks.push_back(Task::Resume(permit));
            }
            DestinationAction::Digest => self.tasks.push_back(Task::Digest),
            DestinationAction::Finish(arrival) => {
                self.over = true;
                match arrival {
                    Arrival::Runs { .. } => assert!(self.permit.is_some()),
                    Arrival::Void(_) => {
                        self.void = true;
                        assert!(!self.runs());
                    }
                }
            }
        }
    }

    fn assert_complete(&self) {
        for (round, batches) in self.commit.as_ref().expect("loaded without a commit") {
            let there = self.installed.get(round).copied().unwrap_or(0);
            assert_eq!(there, *batches, "of round {round}");
        }
    }

    /// Carries out the next task; what is said to the source.
    pub(super) fn work(&mut self, u: &mut Unstructured<'_>) -> Result<Vec<ToSource>> {
        let well = u.ratio(15, 16)?;
        let result = || if well { Ok(()) } else { Err("no".to_owned()) };
        match self.tasks.pop_front() {
            None => {}
            Some(Task::Build) => {
                let built = if well {
                    Ok(Built { no_post_copy: u.ratio(1, 8)?.then(String::new), ..Built::default() })
                } else {
                    Err(vec![Refusal::new("memory", "none")])
                };
                self.tell(DestinationEvent::Built(built));
            }
            Some(Task::Page) => self.tell(DestinationEvent::Paging(result())),
            Some(Task::Load) => self.tell(DestinationEvent::Loaded(result())),
            Some(Task::Resume(permit)) => {
                if well {
                    assert!(self.permit.replace(permit).is_none(), "it runs twice");
                }
                self.tell(DestinationEvent::Resumed(result()));
            }
            Some(Task::Digest) => {
                let sum = u.ratio(3, 4)?.then_some(1);
                self.tell(DestinationEvent::Digest(sum));
            }
        }
        Ok(std::mem::take(&mut self.said))
    }

    pub(super) fn hears(&mut self, message: ToDestination) {
        // What it would send is what it got: the permit is read from bytes, as in an engine.
        let bytes = wire::encode(&message).expect("it is small");
        if let ToDestination::Commit { rounds, .. } = &message
            && self.commit.is_none()
        {
            self.commit = Some(rounds.clone());
        }
        self.tell(DestinationEvent::Message(wire::decode(&bytes).expect("our own")));
    }

    pub(super) fn installs(&mut self, round: u32) {
        *self.installed.entry(round).or_default() += 1;
        self.tell(DestinationEvent::Installed { round });
    }

    pub(super) fn loses_the_link(&mut self) {
        self.said.clear();
        self.tell(DestinationEvent::LinkLost("cut".into()));
    }

    /// All that was owed came.
    pub(super) fn has_all(&mut self) {
        let fetching = self.permit.is_some() && !self.owed.is_empty();
        if fetching {
            self.owed.clear();
            self.tell(DestinationEvent::AllHere(Fetched::default()));
        }
    }

    /// The source is here again; the answer of a session that is over.
    pub(super) fn rejoined(&mut self, _done: u32) -> Option<ToSource> {
        self.said.clear();
        if self.over {
            return Some(ToSource::Verdict(self.destination.verdict()));
        }
        self.installed.clear();
        // It holds back what it has: then all is sent again.
        let (held, owed) = (PageSet::new(), self.owed.clone());
        self.tell(DestinationEvent::Rejoined { held, owed });
        None
    }

    pub(super) fn ticks(&mut self) {
        if let Some(deadline) = self.destination.deadline().filter(|deadline| *deadline <= self.now)
        {
            assert!(deadline <= self.now);
            self.tell(DestinationEvent::Tick);
        }
    }

    pub(super) fn misfortune(&mut self, u: &mut Unstructured<'_>) -> Result<()> {
        match u.int_in_range(0..=9)? {
            0..=3 => {
                let round = u.int_in_range(1..=3)?;
                self.installs(round);
            }
            4 => self.loses_the_link(),
            5 => {
                if let Some(answer) = self.rejoined(0) {
                    assert!(self.over, "{answer:?}");
                }
            }
            6 => self.has_all(),
            7 => {
                let pages = pages(u)?;
                self.tell(DestinationEvent::Lacking(pages));
            }
            8 => {
                let why = "because".to_owned();
                let event = match u.int_in_range(0..=3)? {
                    0 => DestinationEvent::BadPages(why),
                    1 => DestinationEvent::PagingBroken(why),
                    2 => DestinationEvent::Superseded,
                    _ => DestinationEvent::Abandoned,
                };
                self.tell(event);
            }
            _ => {
                if let Some(deadline) = self.destination.deadline() {
                    self.now = self.now.max(deadline);
                }
                self.ticks();
            }
        }
        Ok(())
    }
}

/// Any message of a source; often one that fits.
pub(super) fn anything(u: &mut Unstructured<'_>) -> Result<ToDestination> {
    let round = |u: &mut Unstructured<'_>| u.int_in_range(0..=4u32);
    Ok(match u.int_in_range(0..=7)? {
        0 => ToDestination::Offer {
            spec: spec(),
            codecs: *u.choose(&[CODECS, CODECS, 0])?,
            lanes: *u.choose(&[1, 2, 0, 65])?,
            keep: std::time::Duration::from_secs(u.arbitrary()?),
            machine: u.arbitrary::<bool>()?.then_some(MACHINE),
        },
        1 => ToDestination::Prepare,
        2 => ToDestination::RoundEnd { round: round(u)?, batches: u.int_in_range(0..=2)? },
        3..=4 => {
            let mut rounds = Vec::new();
            for _ in 0..u.int_in_range(0..=2)? {
                rounds.push((round(u)?, u.int_in_range(0..=2)?));
            }
            let owed = if u.ratio(1, 2)? { PackedPages::default() } else { packed(u)? };
            let permit = RunPermit::for_new_machine(MACHINE);
            ToDestination::Commit { permit, state: vec![1], rounds, owed }
        }
        5 => ToDestination::Abort { reason: "because".into() },
        6 => ToDestination::Verified { matches: u.arbitrary()? },
        _ => ToDestination::Stale { pages: packed(u)? },
    })
}
