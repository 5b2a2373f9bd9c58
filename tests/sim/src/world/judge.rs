//! What must be true when all is over.

use ferry_protocol::{Arrival, Outcome, Verdict};

use super::{End, PAGES, World};

impl World {
    /// Why nothing will ever happen again, though the migration is not over.
    pub(super) fn stuck(&self) -> String {
        format!(
            "nothing will ever happen again; missing: {:?}; a thread waits: {}",
            self.destination.missing(),
            self.destination.waits()
        )
    }

    pub(super) fn judge(self) -> Result<End, String> {
        self.judge_memory()?;
        self.judge_session()?;
        if self.source.dead {
            return Ok(End::SourceDied);
        }
        let outcome = self.source.outcome.as_ref().ok_or("the source never finished")?;
        if format!("{outcome:?}").contains("broke the protocol") {
            return Err(format!("nobody broke the protocol: {outcome:?}"));
        }
        match outcome {
            Outcome::Completed { digest_verified, .. } => self.judge_completed(*digest_verified),
            Outcome::InDoubt { .. } | Outcome::Detached { .. } => self.judge_undecided(outcome),
            Outcome::Cancelled | Outcome::Refused(_) | Outcome::Failed(_) => {
                self.judge_not_moved(outcome)
            }
        }
    }

    /// What the guest has not looked at is right, too.
    fn judge_memory(&self) -> Result<(), String> {
        let d = &self.destination;
        if !d.runs {
            return Ok(());
        }
        let expected = d.expected.as_ref().ok_or("runs without ever being paused")?;
        let missing = d.missing();
        for page in (0..PAGES).filter(|p| !missing.contains(*p)) {
            let found = if d.absent.contains(page) { 0 } else { d.copy[page as usize] };
            if found != expected[page as usize] {
                return Err("the machine runs on memory that is not the guest's".into());
            }
        }
        Ok(())
    }

    /// The destination's session is over when nothing can come any more, unless it waits for pages.
    fn judge_session(&self) -> Result<(), String> {
        let d = &self.destination;
        if d.dead || d.abandoned && d.arrival.is_some() {
            return Ok(());
        }
        match &d.arrival {
            Some(Arrival::Runs { digest_verified: Some(false) }) => Err("digests differ".into()),
            Some(Arrival::Runs { .. }) if d.runs && d.missing().is_empty() && !d.waits() => Ok(()),
            Some(Arrival::Runs { .. }) => Err("the session ended before all pages came".into()),
            Some(Arrival::Void(_)) if d.ever_ran => Err("void, and it ran".into()),
            Some(Arrival::Void(_)) => Ok(()),
            None if d.runs && !d.missing().is_empty() => Ok(()),
            None => Err(format!("the destination's session never ends: {:?}", d.machine)),
        }
    }

    fn judge_completed(&self, digest_verified: Option<bool>) -> Result<End, String> {
        let d = &self.destination;
        if self.source.runs || !d.ever_ran || !(d.runs || d.dead) {
            return Err("completed, and does not run there".into());
        }
        if !d.dead && !d.missing().is_empty() {
            return Err("completed, and pages are missing".into());
        }
        let discarded = d.demand.as_ref().is_some_and(|d| d.counts().discarded > 0);
        match digest_verified {
            Some(true) => {}
            Some(false) => return Err("digests differ".into()),
            None if self.cut || discarded => {}
            None => return Err("digests were not compared".into()),
        }
        Ok(if self.source.reattached {
            End::ReattachedAndMoved
        } else if self.source.serves > 1 {
            End::MovedAfterRejoin
        } else if self.source.asked {
            End::MovedAfterInquiry
        } else if self.source.cut_early {
            End::MovedAfterCut
        } else if d.demand.is_some() {
            End::MovedByPostCopy
        } else {
            End::Moved
        })
    }

    fn judge_undecided(&self, outcome: &Outcome) -> Result<End, String> {
        let d = &self.destination;
        if self.source.runs {
            return Err(format!("{outcome:?}, and runs here"));
        }
        let detached = matches!(outcome, Outcome::Detached { .. });
        if !detached && !d.dead && !d.missing().is_empty() {
            return Err(
                "who waits for a page there waits for ever: nothing to take up again".into()
            );
        }
        if !detached {
            return Ok(End::PausedInDoubt);
        }
        let hopeless = self.destination_is_gone() || self.net.down_until == super::NEVER;
        if self.plan.operator_persists && !hopeless {
            return Err("detached for good, and nothing stood in the way".into());
        }
        Ok(End::Detached)
    }

    fn judge_not_moved(&self, outcome: &Outcome) -> Result<End, String> {
        let d = &self.destination;
        if !self.source.runs || d.ever_ran || self.source.tracking {
            return Err(format!("{outcome:?}, and the source does not simply run on"));
        }
        if d.machine.verdict() == Verdict::Ran {
            return Err("the destination believes that it ran".into());
        }
        let mut unpaid = self.source.debt.clone();
        unpaid.subtract(&self.source.returned);
        if !unpaid.is_empty() {
            return Err(format!("dirty bits lost: {unpaid:?}"));
        }
        Ok(match (self.source.reattached, self.source.asked) {
            (true, _) => End::ReattachedAndReclaimed,
            (_, true) => End::ReclaimedAfterInquiry,
            _ => End::StayedAndRuns,
        })
    }
}
