//! Ending without the destination, and going on later: what is left then, and what a spool keeps of it.

use std::time::Duration;

use ferry_pages::{Layout, PageSet};
use serde::{Deserialize, Serialize};

use super::{Phase, Source};
use crate::outcome::Outcome;
use crate::permit::PermitStub;
use crate::policy::{Goals, Mode};
use crate::{MachineSpec, PackedPages, RunPermit};

/// With what a source goes on that lost its destination while it owed pages.
#[derive(Debug, PartialEq, Eq)]
pub struct Reattach {
    session: u128,
    codecs: u8,
    round: u32,
    owed: PageSet,
    /// None with a source that has only a spool.
    permit: Option<PermitStub>,
    /// Nobody has said that the machine runs at the destination.
    in_doubt: bool,
    /// Whose it is now; none where nobody noted that.
    peer: Option<String>,
}

impl Reattach {
    /// The same, of a machine that went to host `peer`.
    #[must_use]
    pub fn of_peer(self, peer: Option<String>) -> Self {
        Self { peer, ..self }
    }

    /// The name of the host that the machine went to, if it was noted.
    pub fn peer(&self) -> Option<&str> {
        self.peer.as_deref()
    }

    /// Whether it is unknown that the machine runs at the destination: taken up again, the source asks first.
    pub fn is_in_doubt(&self) -> bool {
        self.in_doubt
    }

    /// The right to run the machine here after all, as it was at the hand-over: what the guest did since is
    /// lost. See [`PermitStub::fenced_by_operator`]. None if only a spool is left of it here.
    pub fn fenced_by_operator(self) -> Option<RunPermit> {
        self.permit.map(PermitStub::fenced_by_operator)
    }
}

/// What a spool says beside the pages that it holds: with it, a source that was restarted goes on serving.
/// There is no right to run in it, and no way back to one.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Spooled {
    session: u128,
    codecs: u8,
    round: u32,
    owed: PackedPages,
}

impl Spooled {
    /// As a migration to be taken up again, of a machine with this memory.
    ///
    /// # Errors
    /// Pages are owed that the machine has not, in words.
    pub fn reattach(self, layout: &Layout) -> Result<Reattach, String> {
        let Self { session, codecs, round, owed } = self;
        let owed = owed.unpack(layout)?;
        Ok(Reattach { session, codecs, round, owed, permit: None, in_doubt: true, peer: None })
    }
}

impl Source {
    /// Goes on where a migration was detached; the first event is a `Tick`.
    pub fn reattach(reattach: Reattach, goals: Goals, rejoin_for: Duration) -> Self {
        let Reattach { session, codecs, round, owed, permit, in_doubt, peer: _ } = reattach;
        let nobody = MachineSpec {
            name: String::new(),
            vmm: String::new(),
            extents: Vec::new(),
            vcpus: 0,
            cpu_features: Vec::new(),
            devices: Vec::new(),
            config: Vec::new(),
        };
        let mut source = Self::new(nobody, None, codecs, 1, (goals, Mode::PostCopy), rejoin_for);
        source.offer = None;
        source.session = session;
        source.round = round;
        source.post_copy = true;
        source.owed = owed;
        source.committed = true;
        source.stub = permit;
        let (since, why) = (Duration::ZERO, "taken up again".to_owned());
        source.why_now.clone_from(&why);
        source.phase =
            if in_doubt { Phase::Doubting { since, why } } else { Phase::rejoining(since, why) };
        source.deadline = Some(Duration::ZERO);
        source
    }

    /// What a spool of the pages that are owed now must say.
    pub fn spooled(&self) -> Spooled {
        let Self { session, codecs, round, .. } = *self;
        Spooled { session, codecs, round, owed: PackedPages::pack(&self.owed) }
    }

    /// With what to go on later; nothing of it stays here.
    fn leave(&mut self, in_doubt: bool) -> Reattach {
        let (session, codecs, round) = (self.session, self.codecs, self.round);
        let (owed, permit) = (std::mem::take(&mut self.owed), self.stub.take());
        Reattach { session, codecs, round, owed, permit, in_doubt, peer: None }
    }

    /// Ends without the destination: what is owed stays here.
    pub(super) fn detach(&mut self, why: String) {
        let pages = self.owed.len();
        let reason = format!(
            "{why}. The machine runs at the destination; up to {pages} of its pages are only here, and who \
             touches one there waits. This host keeps them: go on by `ferry migrate --resume`"
        );
        let reattach = self.leave(false);
        self.finish(Outcome::Detached { reason, reattach });
    }

    pub(super) fn give_up_asking(&mut self) {
        let Phase::Doubting { why, .. } = &self.phase else { return };
        let reason = format!(
            "{why}, after the run permit was sent; the destination cannot be asked whether it runs the \
             machine, so the machine stays paused here"
        );
        if self.post_copy {
            // If it does run there, pages of it are only here.
            let reason = format!("{reason}. Go on by `ferry migrate --resume`");
            let reattach = self.leave(true);
            self.finish(Outcome::Detached { reason, reattach });
        } else if let Some(permit) = self.stub.take() {
            // There is no spool without post-copy: the stub is here.
            self.finish(Outcome::InDoubt { reason, permit });
        }
    }
}
