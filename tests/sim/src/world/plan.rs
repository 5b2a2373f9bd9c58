//! What goes wrong in a run: drawn at its beginning, and done when its time comes.

use rand::RngExt;

use super::network::{Packet, Travels};
use super::{NEVER, World};
use crate::rules::Kept;

/// What happens to a migration from outside.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fate {
    /// The network breaks.
    Cut,
    /// Lanes do, seen by the source or by the destination first; all else on the link goes on.
    LaneBreaks {
        at_source: bool,
    },
    Cancel,
    SourceDies,
    DestinationDies,
    BothDie,
    PagingBreaks,
    /// The machine is thrown away at the destination.
    Abandoned,
    /// The operator takes a detached migration up again.
    Reattach,
    /// The operator serves the spool of a source that died.
    ServeSpool,
    /// The operator lets the machine go on at the source, since the destination is dead.
    Fence,
}

/// A misfortune bound to what travels: before or after the `after`th of its kind comes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Strike {
    of: Travels,
    after: u32,
    before: bool,
    fate: Fate,
}

/// What goes wrong in a run, beside what waits in the network from the start.
#[derive(Default)]
pub(crate) struct Plan {
    /// Whether anything may.
    pub(crate) troubled: bool,
    strikes: Vec<Strike>,
    /// Cuts to come after the one before was mended, or after the commit.
    pub(crate) more_cuts: u32,
    /// The network does not come back after a cut, or only after very long.
    stays_down: bool,
    long_outages: bool,
    cut_kills_destination: bool,
    /// The process that answers in place of the dead one knows no session; otherwise nobody answers.
    pub(crate) destination_restarts: bool,
    pub(crate) destination_dies_later: bool,
    pub(crate) source_dies: bool,
    pub(crate) spool: bool,
    pub(crate) cancels_rejoining: bool,
    pub(crate) operator_persists: bool,
    pub(crate) refuse_load: bool,
    pub(crate) refuse_paging: bool,
    pub(crate) no_post_copy: bool,
    pub(crate) paging_breaks: bool,
    pub(crate) abandons: bool,
    pub(crate) discards: bool,
    /// Pages of the old copy cannot be read.
    pub(crate) old_copy_damaged: bool,
    /// The operator changes the goals.
    pub(crate) tunes: bool,
    /// The way back is gone, too.
    pub(crate) round_trip: bool,
}

impl World {
    /// Draws what goes wrong.
    pub(crate) fn plan_trouble(&mut self) {
        let horizon = 60_000 + self.net.latency_us * 100;
        for (odds, fate) in [(0.35, Fate::Cut), (0.15, Fate::Cancel)] {
            if self.rng.random_bool(odds) {
                let at = self.rng.random_range(0..horizon);
                self.fate_at(at, fate);
            }
        }
        let rng = &mut self.rng;
        let strikes = if rng.random_bool(0.5) { rng.random_range(1..4) } else { 0 };
        let strikes = (0..strikes)
            .map(|_| {
                let of = if rng.random_bool(0.7) { Travels::Message } else { Travels::Pages };
                let fate = match rng.random_range(0..20) {
                    0..9 => Fate::Cut,
                    9..13 => Fate::LaneBreaks { at_source: rng.random_bool(0.5) },
                    13..15 => Fate::SourceDies,
                    15..17 => Fate::DestinationDies,
                    17 => Fate::BothDie,
                    _ => Fate::Cancel,
                };
                let most = if of == Travels::Message { 16 } else { 120 };
                Strike { of, after: rng.random_range(1..most), before: rng.random_bool(0.5), fate }
            })
            .collect();
        if rng.random_bool(0.05) {
            self.source.machine.look_only();
        }
        self.plan = Plan {
            tunes: rng.random_bool(0.2),
            troubled: true,
            strikes,
            more_cuts: if rng.random_bool(0.4) { rng.random_range(0..5) } else { 0 },
            stays_down: rng.random_bool(0.15),
            long_outages: rng.random_bool(0.3),
            cut_kills_destination: rng.random_bool(0.1),
            destination_restarts: rng.random_bool(0.5),
            destination_dies_later: rng.random_bool(0.05),
            source_dies: rng.random_bool(0.1),
            spool: rng.random_bool(0.7),
            cancels_rejoining: rng.random_bool(0.1),
            operator_persists: rng.random_bool(0.7),
            refuse_load: rng.random_bool(0.05),
            refuse_paging: rng.random_bool(0.03),
            no_post_copy: rng.random_bool(0.08),
            paging_breaks: rng.random_bool(0.04),
            abandons: rng.random_bool(0.04),
            discards: rng.random_bool(0.1),
            old_copy_damaged: rng.random_bool(0.2),
            round_trip: rng.random_bool(0.3),
        };
    }

    pub(crate) fn fate_at(&mut self, at: u64, fate: Fate) {
        self.net.at(at, Packet::Fate(fate));
    }

    /// Soon, as the network's delays go.
    pub(crate) fn soon(&mut self) -> u64 {
        self.now + self.rng.random_range(0..self.net.latency_us * 30)
    }

    /// What befalls before or after something that travels comes; whether anything did.
    pub(crate) fn strike(&mut self, travels: Travels, before: bool) -> Kept<bool> {
        let mut struck = false;
        for at in 0..self.plan.strikes.len() {
            let strike = &mut self.plan.strikes[at];
            if strike.of != travels || strike.before != before || strike.after == 0 {
                continue;
            }
            strike.after -= 1;
            if strike.after == 0 {
                let fate = strike.fate;
                self.befall(fate)?;
                struck |= fate != Fate::Cancel;
            }
        }
        Ok(struck)
    }

    pub(crate) fn befall(&mut self, fate: Fate) -> Kept {
        self.tell("fate", || super::words::fate(fate).to_owned());
        self.trouble();
        match fate {
            Fate::Cut => {
                if self.plan.cut_kills_destination && !self.destination.ever_ran {
                    self.destination.die();
                }
                self.cut_link();
            }
            Fate::LaneBreaks { .. } if !self.net.up => {}
            Fate::LaneBreaks { at_source } => {
                self.cut = true;
                if !self.net.break_lanes(&mut self.rng) {
                    return Ok(());
                }
                let (link, later) = (self.net.link, self.now + self.notice());
                let (here, there) = if at_source { (self.now, later) } else { (later, self.now) };
                self.net.at(here, Packet::SourceLost(link));
                self.net.at(there, Packet::DestinationLaneLost(link));
            }
            Fate::Cancel => self.feed_source(ferry_protocol::SourceEvent::Cancel)?,
            Fate::SourceDies => self.source_dies(),
            Fate::DestinationDies => {
                self.destination.die();
                self.cut_link();
            }
            Fate::BothDie => {
                self.destination.die();
                self.source_dies();
            }
            Fate::PagingBreaks => self.paging_breaks()?,
            Fate::Abandoned => self.abandon()?,
            Fate::Reattach => self.reattach()?,
            Fate::ServeSpool => self.serve_spool()?,
            Fate::Fence => self.fence(),
        }
        Ok(())
    }

    /// Something happened from outside: time to come to an end counts from now.
    pub(crate) fn trouble(&mut self) {
        self.calm_since = self.calm_since.max(self.now);
    }

    /// The network breaks: what is on the link is lost, and both ends learn of it in their own time.
    pub(crate) fn cut_link(&mut self) {
        if self.source.outcome.is_none() {
            self.cut = true;
        }
        let outage = match (self.plan.stays_down, self.plan.long_outages) {
            (true, _) if self.rng.random_bool(0.5) => NEVER,
            (_, true) => self.rng.random_range(0..90_000_000),
            _ => self.rng.random_range(0..2_000_000),
        };
        self.net.down_until = self.net.down_until.max(self.now.saturating_add(outage));
        if self.net.down_until != NEVER {
            self.calm_since = self.calm_since.max(self.net.down_until);
        }
        self.drop_link();
        let link = self.net.link;
        // Each channel says so, the control channel behind the last that it brought.
        let last = self.net.last_word_at(self.now);
        for after in [self.now, last] {
            if after == last || self.rng.random_bool(0.5) {
                let at = after + self.notice();
                self.net.at(at, Packet::SourceLost(link));
            }
        }
    }

    /// Nothing more comes or goes on the link; the destination learns of it later.
    pub(crate) fn drop_link(&mut self) {
        if self.net.lose_link(&mut self.rng) {
            let at = self.now + self.notice();
            self.net.at(at, Packet::DestinationLost(self.net.link));
        }
    }

    /// How long until a host notices.
    fn notice(&mut self) -> u64 {
        let most = if self.rng.random_bool(0.5) { 20_000 } else { 5_000_000 };
        self.rng.random_range(0..most)
    }

    /// The commit is out, or the source is back: time for the next cut.
    pub(crate) fn tempt_fate(&mut self) {
        if self.plan.more_cuts > 0 {
            self.plan.more_cuts -= 1;
            let soon = self.soon();
            self.fate_at(soon, Fate::Cut);
        }
    }

    pub(crate) fn reachable(&mut self) -> bool {
        let answers = !self.destination.dead || self.plan.destination_restarts;
        self.now >= self.net.down_until && answers && self.rng.random_bool(0.8)
    }

    /// Whether nobody at the destination will ever want a page again, or can be reached.
    pub(crate) fn hopeless(&self) -> bool {
        self.destination_is_gone() || self.net.down_until == NEVER
    }
}
