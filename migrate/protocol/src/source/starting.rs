//! From the destination's word that it takes the machine to the first round: what it has of an old copy, and when
//! lanes and tracking are there.

use std::time::Duration;

use super::{Look, Phase, Source, SourceAction};
use crate::messages::Recalled;
use crate::policy::Mode;

/// How long to look which pages the guest writes, before a hand-over that copies none before.
const SAMPLE: Duration = Duration::from_millis(100);

impl Source {
    /// The destination has pages of an old copy: at most all, each once.
    pub(super) fn recalls(&mut self, now: Duration, old: Recalled) {
        let Recalled { pages, digests } = old;
        let before = self.recalled.len();
        let pages = pages.unpack(&self.layout).and_then(|pages| {
            self.recalled.union_with(&pages);
            let fresh = self.recalled.len() - before;
            if fresh == pages.len() && fresh == digests.len() as u64 && fresh > 0 {
                Ok(pages)
            } else {
                Err(format!(
                    "{} digests of {} pages, {fresh} of them new",
                    digests.len(),
                    pages.len()
                ))
            }
        });
        match pages {
            Ok(pages) => {
                self.actions.push_back(SourceAction::Recall { pages, digests });
                self.expect_answer(now);
            }
            Err(why) => self.fail_before_commit(format!(
                "the destination broke the protocol: it offers an old copy of {why}"
            )),
        }
    }

    pub(super) fn begin_if_started(&mut self, now: Duration) {
        if !matches!(self.phase, Phase::Starting { lanes: true }) || self.answers_due > 0 {
            return;
        }
        match (self.look, self.policy.mode()) {
            (Look::Over, _) | (Look::First, Mode::PostCopy) => self.begin_move(now),
            (Look::First | Look::Only, _) => self.begin_look(now),
        }
    }

    pub(super) fn begin_move(&mut self, now: Duration) {
        if self.policy.mode() == Mode::PostCopy {
            self.why_now =
                "all pages after the hand-over, as was asked for (--mode post-copy)".into();
            self.post_copy = true;
            self.phase = Phase::Sampling;
            self.deadline = Some(now + SAMPLE);
            self.actions.push_back(SourceAction::Sample(self.pending.clone()));
        } else {
            self.begin_round(now);
        }
    }
}
