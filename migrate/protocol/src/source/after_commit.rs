//! The source once the permit has left: serving what is owed, comparing memory.

use std::time::Duration;

use super::{Phase, Source, SourceAction, name};
use crate::Fetched;
use crate::messages::{ToDestination, ToSource};
use crate::outcome::{Outcome, Progress};
use crate::permit::PermitStub;

impl Source {
    pub(super) fn message_after_commit(&mut self, now: Duration, message: ToSource) {
        match (&mut self.phase, message) {
            // Late: it was not waited for.
            (_, ToSource::Ready) => {}
            (
                Phase::Committed | Phase::Doubting { .. },
                ToSource::Running { pages_us, load_us, resume_us },
            ) => {
                self.switchover.destination_pages_us = pages_us;
                self.switchover.destination_load_us = load_us;
                self.switchover.destination_resume_us = resume_us;
                self.ran(now);
            }
            (Phase::Committed | Phase::Doubting { .. }, ToSource::CommitRefused { reason }) => {
                self.never_ran(reason);
            }
            (
                Phase::Serving | Phase::Rejoining { .. } | Phase::Reopening { .. },
                ToSource::Digest { sum, fetched },
            ) => self.all_there(now, sum, fetched),
            (
                Phase::Serving | Phase::Rejoining { .. } | Phase::Reopening { .. },
                ToSource::Failed { reason },
            ) => {
                let reason = format!("the destination cannot go on fetching pages: {reason}");
                self.detach(reason);
            }
            // The machine is there and its pages are here: begin anew, whatever the destination says.
            (Phase::Serving, other) => {
                let why = format!("the destination broke the protocol: {}", name(&other));
                self.link_lost(now, why);
            }
            (Phase::Verifying { theirs, .. }, ToSource::Digest { sum: Some(sum), .. }) => {
                *theirs = Some(sum);
                self.verify();
            }
            (Phase::Verifying { .. }, other) => {
                self.finish(Outcome::Completed {
                    digest_verified: None,
                    reason: format!(
                        "the destination broke the protocol after switchover: {}",
                        name(&other)
                    ),
                });
            }
            // It gave up while the commit was on its way: asked, it will say that it never ran the machine.
            (Phase::Committed, ToSource::Failed { reason }) => {
                self.doubt(now, format!("the destination cannot go on: {reason}"));
            }
            (Phase::Committed | Phase::Doubting { .. }, other) => {
                let why = format!("the destination broke the protocol: {}", name(&other));
                self.doubt(now, why);
            }
            // Before the commit.
            _ => {}
        }
    }

    pub(super) fn serve(&mut self) {
        let record = self.record.iter().cloned().collect();
        let (round, owed) = (self.round, self.owed.clone());
        self.actions.push_back(SourceAction::Serve { round, owed, record });
    }

    pub(super) fn told_of_running(&mut self, now: Duration) {
        self.switchover.running = now;
        self.tell(Progress::Running);
    }

    fn ran(&mut self, now: Duration) {
        self.told_of_running(now);
        if self.post_copy
            && let Phase::Doubting { why, .. } = &self.phase
        {
            // It was behind the word that the link is lost, and nobody will say that again.
            let why = why.clone();
            return self.come_back(now, why);
        }
        if self.post_copy {
            self.tell(Progress::Fetching { pages: self.owed.len() });
            self.phase = Phase::Serving;
            self.deadline = None;
            self.actions.push_back(SourceAction::Push);
            return;
        }
        self.stub = None;
        self.phase = Phase::Verifying { ours: None, theirs: None };
        self.expect_answer(now);
        self.actions.push_back(SourceAction::DigestMemory);
    }

    /// All pages are there.
    pub(super) fn all_there(&mut self, now: Duration, sum: Option<u64>, fetched: Option<Fetched>) {
        self.fetched = fetched;
        self.stub = None;
        if sum.is_some() {
            self.phase = Phase::Verifying { ours: None, theirs: sum };
            self.expect_answer(now);
            self.actions.push_back(SourceAction::DigestMemory);
        } else {
            let reason = format!(
                "{}; the guest gave memory up before it came: digests cannot be compared",
                self.why_now
            );
            self.finish(Outcome::Completed { digest_verified: None, reason });
        }
    }

    pub(super) fn never_ran(&mut self, reason: String) {
        self.pending.union_with(&std::mem::take(&mut self.owed));
        self.take_back();
        self.abort(&reason);
        self.finish(Outcome::Failed(format!(
            "the destination refused to run the machine: {reason}"
        )));
    }

    /// The destination has not used its permit and never will: an explicit word.
    pub(super) fn take_back(&mut self) {
        self.committed = false;
        self.permit = self.stub.take().map(PermitStub::refused_by_destination);
    }

    pub(super) fn verify(&mut self) {
        let Phase::Verifying { ours: Some(ours), theirs: Some(theirs) } = self.phase else {
            return;
        };
        let matches = ours == theirs;
        self.send(ToDestination::Verified { matches });
        let reason = if matches {
            std::mem::take(&mut self.why_now)
        } else {
            format!(
                "memory at the destination is not what it was here (digest {theirs:#018x}, here \
                 {ours:#018x}): the machine runs there on damaged memory; stop it there"
            )
        };
        self.finish(Outcome::Completed { digest_verified: Some(matches), reason });
    }
}
