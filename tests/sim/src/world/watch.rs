//! What must be true after every step.

use super::memory::{Mask, pages};
use super::{LONGEST_CALM_US, MOST_STEPS, World};
use crate::rules::{Broken, Kept, Rule};

/// The round under way, and two while the guest stands still.
const MOST_OPEN_ROUNDS: usize = 3;

impl World {
    pub(super) fn watch(&self) -> Kept {
        self.watch_who_runs()?;
        self.watch_memory_there()?;
        self.watch_dirty_bits()?;
        self.watch_bounds()?;
        if self.now > self.calm_since.saturating_add(LONGEST_CALM_US) {
            let s = (self.now - self.calm_since) / 1_000_000;
            return Err(Rule::Progress.broken(format!(
                "nothing has gone wrong for {s} s, and it is not over (source: {})",
                if self.source.outcome.is_some() { "done" } else { "at work" }
            )));
        }
        Ok(())
    }

    fn watch_who_runs(&self) -> Kept {
        let d = &self.destination;
        // Of a machine that died there, the operator may know.
        let there = d.runs || d.ever_ran && !self.source.fenced;
        if self.source.runs && self.source.by_spool {
            return Err(Rule::OneRuns.broken("a spool runs its machine, and has no right to"));
        }
        if self.source.runs && there {
            return Err(Rule::OneRuns.broken("it runs at the source, and ran at the destination"));
        }
        Ok(())
    }

    /// What is there is what the guest has, and what is not there is kept for it.
    fn watch_memory_there(&self) -> Kept {
        let d = &self.destination;
        let Some(truth) = self.truth.as_ref().filter(|_| d.runs) else { return Ok(()) };
        let wrong = d.seen().differing(truth) & !d.missing;
        if let Some(page) = pages(wrong).next() {
            return Err(Rule::LastVersion.broken(format!(
                "page {page} has {:?} in memory that the guest runs on, {:?} is right",
                d.seen()[page],
                truth[page]
            )));
        }
        if d.missing == 0 || self.destination_is_gone() {
            return Ok(());
        }
        let lost = match (self.source.dead, self.spool()) {
            // It was whole when its source died.
            (true, None) if self.source.spool_due_at.is_some() => d.missing,
            (true, None) => return Ok(()),
            (true, Some(spool)) => d.missing & (!spool.owed | spool.memory.differing(truth)),
            (false, _) => d.missing & (!self.source.debt | self.source.memory.differing(truth)),
        };
        self.nothing_lost(lost, "is owed to a machine that runs, and nobody has it any more")
    }

    /// While the source's guest is tracked, a page that is not at the destination as it is here is known to be.
    fn watch_dirty_bits(&self) -> Kept {
        let (s, d) = (&self.source, &self.destination);
        if !s.tracking || s.outcome.is_some() || s.dead || d.dead || d.ever_ran {
            return Ok(());
        }
        let known = s.handed.iter().fold(s.dirty | s.debt, |known, pages| known | pages);
        let lost = d.copy.differing(&s.memory) & !known;
        self.nothing_lost(lost, "differs on the two sides, and nobody knows")
    }

    fn nothing_lost(&self, lost: Mask, why: &str) -> Kept {
        match pages(lost).next() {
            None => Ok(()),
            Some(page) => Err(Rule::NoLostBit.broken(format!("page {page} {why}"))),
        }
    }

    fn watch_bounds(&self) -> Kept {
        self.net.watch()?;
        if self.steps > MOST_STEPS {
            return Err(Rule::Progress.broken(format!("{MOST_STEPS} events, and no end")));
        }
        let rounds = self.destination.machine.open_rounds();
        if rounds > MOST_OPEN_ROUNDS {
            return Err(Rule::Bounded.broken(format!("{rounds} rounds are counted at once")));
        }
        Ok(())
    }

    /// The destination is about to acknowledge a round.
    pub(super) fn watch_round_done(&self, round: u32, lacking: Mask) -> Kept {
        let sent = self.source.rounds_sent.iter().find(|(r, _)| *r == round).map_or(0, |r| r.1);
        let not_here = pages(sent & !lacking).find(|p| self.destination.round_of(*p) < round);
        match not_here {
            None => Ok(()),
            Some(page) => Err(Rule::AckAfterInstall.broken(format!(
                "round {round} is acknowledged, and page {page} of it is not installed"
            ))),
        }
    }

    /// Why nothing will ever happen again, though the migration is not over.
    pub(super) fn stuck(&self) -> Broken {
        Rule::Progress.broken(format!(
            "nothing will ever happen again; missing: {}; a thread waits: {}",
            super::words::mask(self.destination.missing),
            self.destination.waits()
        ))
    }
}
