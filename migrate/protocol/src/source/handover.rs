//! From the decision to hand over to the commit: the guest is stopped, its last pages and its state are collected, and
//! the permit leaves.

use std::time::Duration;

use super::{Phase, Source, SourceAction};
use crate::outcome::Progress;
use crate::{PackedPages, RunPermit, ToDestination};

/// The guest stands still no longer than this (or twice its downtime goal, if that is more) before the
/// commit: a peer that takes no more pages must not freeze it.
const STANDSTILL_TIMEOUT: Duration = Duration::from_secs(10);

impl Source {
    pub(super) fn hand_over_when_ready(&mut self, now: Duration) {
        if self.ready {
            self.pause(now);
        } else {
            self.phase = Phase::WaitingReady;
            self.expect_answer(now);
        }
    }

    pub(super) fn pause(&mut self, now: Duration) {
        self.switchover.pause = now;
        self.phase = Phase::Pausing;
        self.deadline = Some(now.saturating_add(self.longest_standstill()));
        self.ask(SourceAction::Pause);
    }

    pub(super) fn longest_standstill(&self) -> Duration {
        STANDSTILL_TIMEOUT.max(self.policy.goals().max_downtime.saturating_mul(2))
    }

    pub(super) fn paused(&mut self, now: Duration, permit: RunPermit) {
        if !matches!(self.phase, Phase::Pausing) {
            // Cancelled, or the link lost, while the vCPUs were being stopped: let them go on.
            self.actions.push_back(SourceAction::Resume(permit));
            return self.begin_if_started(now);
        }
        self.permit = Some(permit);
        self.switchover.paused = now;
        self.tell(Progress::Paused);
        self.phase = Phase::LastHarvest;
        self.ask(SourceAction::Harvest);
    }

    pub(super) fn send_final(&mut self) {
        if self.pending.is_empty() || self.post_copy {
            return;
        }
        self.round += 1;
        let pages = std::mem::take(&mut self.pending);
        self.in_flight.union_with(&pages);
        self.final_rounds.push((self.round, None));
        self.actions.push_back(SourceAction::SendPages { round: self.round, pages });
    }

    pub(super) fn commit_if_sent(&mut self, now: Duration) {
        if !matches!(self.phase, Phase::FinalSending) {
            return;
        }
        let sent: Option<Vec<(u32, u64)>> =
            self.final_rounds.iter().map(|&(round, batches)| Some((round, batches?))).collect();
        let Some(mut rounds) = sent else { return };
        let Some(permit) = self.permit.take() else { return };
        let (permit, stub) = permit.hand_over();
        self.stub = Some(stub);
        self.committed = true;
        let state = std::mem::take(&mut self.state);
        self.switchover.committed = now;
        self.phase = Phase::Committed;
        if self.post_copy {
            // Batches of earlier rounds may still come on the lanes of a lost link.
            rounds.push((self.round + 1, 0));
            self.round += 2;
            self.owed = std::mem::take(&mut self.pending);
        }
        let owed = PackedPages::pack(&self.owed);
        self.send(ToDestination::Commit { permit, state, rounds, owed });
        if self.post_copy {
            self.serve();
        }
        self.tell(Progress::Committed);
        self.expect_answer(now);
    }
}
