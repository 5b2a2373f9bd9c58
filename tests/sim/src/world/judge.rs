//! What must be true when all is over.

use ferry_protocol::{Arrival, Outcome, Verdict};

use super::memory::pages;
use super::{NEVER, World};
use crate::End;
use crate::rules::{Kept, Rule};

impl World {
    pub(super) fn judge(&mut self) -> Kept<End> {
        self.judge_session()?;
        let (s, d) = (&self.source, &self.destination);
        if s.fenced {
            let alone = s.runs && d.dead;
            return match alone {
                true => Ok(End::Fenced),
                false => Err(Rule::TrueEnd.broken("fenced, and it does not run on here alone")),
            };
        }
        if s.dead {
            return Ok(if d.dead { End::BothDied } else { End::SourceDied });
        }
        let Some(outcome) = &s.outcome else {
            return Err(Rule::Progress.broken("the source never finished"));
        };
        match outcome {
            Outcome::Completed { digest_verified, .. } => self.judge_completed(*digest_verified),
            Outcome::InDoubt { .. } | Outcome::Detached { .. } => self.judge_undecided(outcome),
            Outcome::Cancelled | Outcome::Refused(_) | Outcome::Failed(_) if s.by_spool => {
                // The destination never ran the machine, and its source is gone.
                self.judge_lost()
            }
            Outcome::Cancelled | Outcome::Refused(_) | Outcome::Failed(_) => {
                self.judge_not_moved(outcome)
            }
        }
    }

    /// The destination's session is over when nothing can come any more, unless it waits for pages.
    fn judge_session(&self) -> Kept {
        let d = &self.destination;
        if d.dead || d.abandoned && d.arrival.is_some() {
            return Ok(());
        }
        let why = match &d.arrival {
            Some(Arrival::Runs { digest_verified: Some(false) }) => {
                return Err(Rule::LastVersion.broken("digests differ"));
            }
            Some(Arrival::Runs { .. }) if d.runs && d.missing == 0 && !d.waits() => return Ok(()),
            Some(Arrival::Runs { .. }) => "the session ended before all pages came".into(),
            Some(Arrival::Void(_)) if d.ever_ran => "void, and it ran".into(),
            Some(Arrival::Void(_)) => return Ok(()),
            None if d.runs && d.missing != 0 => return Ok(()),
            None => format!("the destination's session never ends: {:?}", d.machine),
        };
        Err(Rule::TrueEnd.broken(why))
    }

    fn judge_completed(&self, digest_verified: Option<bool>) -> Kept<End> {
        let (s, d) = (&self.source, &self.destination);
        if s.runs || !d.ever_ran || !(d.runs || d.dead) {
            return Err(Rule::TrueEnd.broken("completed, and does not run there"));
        }
        if !d.dead && d.missing != 0 {
            return Err(Rule::NoLostBit.broken("completed, and pages are missing"));
        }
        match digest_verified {
            Some(true) => {}
            Some(false) => return Err(Rule::LastVersion.broken("digests differ")),
            None if self.cut || self.discarded() => {}
            None => return Err(Rule::TrueEnd.broken("digests were not compared")),
        }
        Ok(if s.by_spool {
            End::MovedBySpool
        } else if s.reattached {
            End::ReattachedAndMoved
        } else if s.serves > 1 {
            End::MovedAfterRejoin
        } else if s.asked {
            End::MovedAfterInquiry
        } else if s.cut_early {
            End::MovedAfterCut
        } else if d.demand.is_some() {
            End::MovedByPostCopy
        } else {
            End::Moved
        })
    }

    fn judge_undecided(&self, outcome: &Outcome) -> Kept<End> {
        let (s, d) = (&self.source, &self.destination);
        if s.runs {
            return Err(Rule::OneRuns.broken("undecided, and runs here"));
        }
        let detached = matches!(outcome, Outcome::Detached { .. });
        if !detached && !d.dead && d.missing != 0 {
            let why = "who waits for a page there waits for ever: nothing to take up again";
            return Err(Rule::Progress.broken(why));
        }
        if !detached {
            // It was asked for half a minute, twice a second.
            if !d.dead && s.in_vain_us > 15_000_000 {
                let why = "in doubt, and the destination was there to be asked";
                return Err(Rule::Progress.broken(why));
            }
            return Ok(End::PausedInDoubt);
        }
        if self.plan.operator_persists && !self.hopeless() {
            return Err(Rule::Progress.broken("detached for good, and nothing stood in the way"));
        }
        Ok(End::Detached)
    }

    fn judge_lost(&self) -> Kept<End> {
        if self.source.runs || self.destination.ever_ran && !self.destination.dead {
            return Err(Rule::TrueEnd.broken("given up by its spool, and it runs"));
        }
        Ok(End::LostWithItsSource)
    }

    fn judge_not_moved(&self, outcome: &Outcome) -> Kept<End> {
        let (s, d) = (&self.source, &self.destination);
        if !s.runs || d.ever_ran || s.tracking {
            let why = format!("{outcome:?}, and the source does not simply run on");
            return Err(Rule::TrueEnd.broken(why));
        }
        if s.throttled > 0 {
            return Err(
                Rule::TrueEnd.broken("the source runs on, and its vCPUs are held back for ever")
            );
        }
        if d.machine.verdict() == Verdict::Ran {
            return Err(Rule::TrueEnd.broken("the destination believes that it ran"));
        }
        if let Outcome::Failed(why) = outcome {
            if why.contains("broke the protocol") {
                return Err(Rule::Peace.broken(why));
            }
            let expected = self.cut || d.dead || self.net.down_until == NEVER;
            let p = &self.plan;
            let refused =
                s.tuned || p.refuse_load || p.refuse_paging || p.no_post_copy || d.paging_broken;
            if !expected && !refused {
                return Err(
                    Rule::Progress.broken(format!("it failed, and nothing was wrong: {why}"))
                );
            }
        }
        if let Some(page) = pages(s.unpaid & !s.returned).next() {
            let why = format!("page {page} was harvested, and is neither there nor given back");
            return Err(Rule::NoLostBit.broken(why));
        }
        Ok(match (s.reattached, s.asked) {
            (true, _) => End::ReattachedAndReclaimed,
            (_, true) => End::ReclaimedAfterInquiry,
            _ => End::StayedAndRuns,
        })
    }
}
