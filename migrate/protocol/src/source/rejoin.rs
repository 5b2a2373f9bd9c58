//! The source without its link: it comes back, asks what is there, and goes on.

use std::time::Duration;

use super::{Phase, Source, SourceAction, name};
use crate::PackedPages;
use crate::messages::{ToDestination, ToSource, Verdict};
use crate::outcome::{Outcome, Progress};

/// First and longest pause between two attempts to come back.
const FIRST: Duration = Duration::from_millis(100);
const LONGEST: Duration = Duration::from_secs(5);
/// How long to ask what became of a committed machine before the operator is told.
pub const DOUBT_TIMEOUT: Duration = Duration::from_secs(30);
/// Between two questions.
const ASK_AGAIN: Duration = Duration::from_millis(500);
/// How long one question may take.
pub const QUESTION_TIMEOUT: Duration = Duration::from_secs(5);

impl Phase {
    /// Comes back since `since`, for `why` it left.
    pub(super) fn rejoining(since: Duration, why: String) -> Self {
        Self::Rejoining { since, wait: FIRST, why }
    }
}

impl Source {
    /// The link was lost; whether before the commit or while pages are owed says `committed`.
    pub(super) fn come_back(&mut self, now: Duration, why: String) {
        self.tell(Progress::LinkLost(why.clone()));
        self.phase = Phase::rejoining(now, why);
        self.deadline = Some(now);
    }

    /// Nobody has said whether the committed machine runs.
    pub(super) fn doubt(&mut self, now: Duration, why: String) {
        if matches!(self.phase, Phase::Doubting { .. }) {
            return self.lost_on_return(now, why);
        }
        self.tell(Progress::InDoubt(why.clone()));
        self.phase = Phase::Doubting { since: now, why };
        self.deadline = Some(now);
    }

    pub(super) fn tick_on_return(&mut self, now: Duration) {
        let again = |wait| now.saturating_add(wait);
        match &mut self.phase {
            Phase::Rejoining { since, why, .. } if now >= since.saturating_add(self.rejoin_for) => {
                let why = format!(
                    "{why}; the destination could not be reached for {:.0} s",
                    self.rejoin_for.as_secs_f64()
                );
                if self.is_committed() {
                    self.detach(why);
                } else {
                    self.fail_before_commit(why);
                }
                return;
            }
            Phase::Doubting { since, .. } if now >= *since + DOUBT_TIMEOUT => {
                return self.give_up_asking();
            }
            Phase::Rejoining { since, wait, .. } => {
                *wait = (*wait * 2).min(LONGEST);
                let last = since.saturating_add(self.rejoin_for);
                self.deadline = Some(last.min(again(super::ANSWER_TIMEOUT)));
            }
            Phase::Doubting { .. } => self.deadline = Some(again(QUESTION_TIMEOUT)),
            _ => return self.lost_on_return(now, "no answer when lanes were opened again".into()),
        }
        // Of rounds sent while the guest stands still, none is credited: a page may be in two of them.
        let done = self.round - u32::from(!self.in_flight.is_empty());
        self.actions.push_back(SourceAction::Rejoin { session: self.session, done });
    }

    pub(super) fn lost_on_return(&mut self, now: Duration, why: String) {
        let later = match &mut self.phase {
            Phase::Reopening { since, wait } => {
                let (since, wait) = (*since, *wait);
                self.phase = Phase::Rejoining { since, wait, why };
                self.deadline = None;
                wait
            }
            Phase::Rejoining { wait, .. } => *wait,
            _ => ASK_AGAIN,
        };
        // Old channels tell of their end one by one: that puts no attempt off.
        let later = now.saturating_add(later);
        self.deadline = Some(self.deadline.map_or(later, |soon| soon.min(later)));
    }

    /// Undoes what was done since the last round for a switchover that did not come: the guest runs on.
    pub(super) fn roll_back(&mut self) {
        self.resume_here();
        // Of a round under way, the destination says what it has. Of the last ones it cannot: a page may be
        // in two of them.
        if !matches!(self.phase, Phase::Sending { .. } | Phase::Acknowledging { .. }) {
            self.pending.union_with(&std::mem::take(&mut self.in_flight));
        }
        self.pending.union_with(&std::mem::take(&mut self.owed));
        self.final_rounds.clear();
        self.state.clear();
        self.post_copy = false;
    }

    pub(super) fn message_on_return(&mut self, now: Duration, message: ToSource) {
        if matches!(message, ToSource::Ready) {
            self.ready = true;
            return;
        }
        let reopening = matches!(self.phase, Phase::Reopening { .. });
        match (&self.phase, message) {
            (Phase::Doubting { .. }, message) => self.message_in_doubt(now, message),
            (_, message) if !self.is_committed() => match message {
                // It was behind the word that the link is lost, before the source went to come back: the
                // destination says again what it holds.
                ToSource::RoundDone { .. } if !reopening => {}
                ToSource::GoOn { held } if !reopening => self.go_on(now, &held),
                ToSource::Failed { reason } => {
                    self.fail_before_commit(format!("the destination gave up: {reason}"));
                }
                ToSource::Verdict(Verdict::NeverRan) => self.fail_before_commit(
                    "the link was lost, and the destination has given the machine up".into(),
                ),
                ToSource::Verdict(Verdict::Unknown) => self.fail_before_commit(
                    "the link was lost, and the process at that address knows nothing of the machine: it \
                     was restarted"
                        .into(),
                ),
                other => self.fail_before_commit(format!(
                    "the destination broke the protocol: {} was not expected now",
                    name(&other)
                )),
            },
            (_, ToSource::Lacks { owed }) if !reopening => self.serve_again(now, &owed),
            // It has no more use for this source: everything came, and then the link was lost.
            (Phase::Rejoining { why, .. }, ToSource::Verdict(Verdict::Ran)) => {
                let reason = format!("{why}; the destination has all pages");
                self.finish(Outcome::Completed { digest_verified: None, reason });
            }
            (Phase::Rejoining { .. }, ToSource::Verdict(verdict)) => {
                let why = format!(
                    "the process at that address does not run this machine ({verdict:?}): if it was \
                     restarted, the machine is lost there"
                );
                self.lost_on_return(now, why);
            }
            // In `Reopening`: what was lacking was just being installed.
            (_, message @ (ToSource::Digest { .. } | ToSource::Failed { .. })) => {
                self.message_after_commit(now, message);
            }
            // The machine is there and its pages are here: begin anew, whatever the destination says.
            (_, other) => {
                let why = format!("the destination broke the protocol: {}", name(&other));
                self.lost_on_return(now, why);
            }
        }
    }

    fn message_in_doubt(&mut self, now: Duration, message: ToSource) {
        let Phase::Doubting { why, .. } = &self.phase else { return };
        let why = why.clone();
        match message {
            // Taken up again later: nobody looked which pages were written since.
            ToSource::GoOn { .. } if !self.tracking => {
                self.never_ran(format!("{why}; the destination never ran the machine"));
            }
            ToSource::GoOn { held } => {
                // An explicit word: whatever this source sent, nobody runs the machine there.
                self.take_back();
                self.roll_back();
                self.phase = Phase::rejoining(now, why);
                self.go_on(now, &held);
            }
            ToSource::Lacks { owed } if self.post_copy => {
                self.told_of_running(now);
                self.phase = Phase::rejoining(now, why);
                self.serve_again(now, &owed);
            }
            // It gave up before the commit came, or cannot fetch pages any more: the word alone does not say
            // which.
            ToSource::Failed { reason } => {
                let Phase::Doubting { why, .. } = &mut self.phase else { return };
                *why = format!("the destination cannot go on: {reason}");
                let why = why.clone();
                self.lost_on_return(now, why);
            }
            ToSource::Digest { sum, fetched } => {
                self.told_of_running(now);
                self.all_there(now, sum, fetched);
            }
            ToSource::Verdict(Verdict::Ran) => {
                self.told_of_running(now);
                self.stub = None;
                self.finish(Outcome::Completed {
                    digest_verified: None,
                    reason: format!("{why}; asked again, the destination runs the machine"),
                });
            }
            ToSource::Verdict(Verdict::NeverRan) => {
                self.never_ran(format!("{why}; the destination never ran the machine"));
            }
            ToSource::Verdict(Verdict::Unknown) => self.lost_on_return(now, why),
            message => self.message_after_commit(now, message),
        }
    }

    /// The destination is there, and waits for the next round; `held` came of the one under way.
    fn go_on(&mut self, now: Duration, held: &PackedPages) {
        match held.unpack_within(&self.in_flight) {
            Ok(held) => self.in_flight.subtract(&held),
            // None of it: what came is in `pending` already.
            Err(_) if self.in_flight.is_empty() => {}
            Err(why) => {
                let why = format!("the destination holds pages that were not sent: {why}");
                return self.fail_before_commit(why);
            }
        }
        self.pending.union_with(&std::mem::take(&mut self.in_flight));
        if !self.ready {
            self.send(ToDestination::Prepare);
        }
        self.reopen(now);
    }

    fn serve_again(&mut self, now: Duration, owed: &PackedPages) {
        match owed.unpack_within(&self.owed) {
            Ok(owed) => {
                self.tell(Progress::Fetching { pages: owed.len() });
                self.owed = owed;
                self.reopen(now);
            }
            Err(why) => self.lost_on_return(now, why),
        }
    }

    fn reopen(&mut self, now: Duration) {
        let Phase::Rejoining { since, wait, .. } = self.phase else { return };
        self.phase = Phase::Reopening { since, wait };
        let (session, codecs) = (self.session, self.codecs);
        self.actions.push_back(SourceAction::OpenLanes { session, codecs });
        let last = since.saturating_add(self.rejoin_for).max(now + QUESTION_TIMEOUT);
        self.deadline = Some(last.min(now + super::ANSWER_TIMEOUT));
    }

    /// The lanes are open again.
    pub(super) fn reopened(&mut self, now: Duration) {
        if self.is_committed() {
            self.phase = Phase::Serving;
            self.deadline = None;
            self.serve();
            self.actions.push_back(SourceAction::Push);
        } else {
            self.phase = Phase::Starting { lanes: true };
            self.begin_if_started(now);
        }
    }
}
