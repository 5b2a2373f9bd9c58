//! What a migration did, in numbers and words.

use ferry_codec::Codec;
use std::time::Duration;

use ferry_protocol::{Fetched, Goals, Mode, Outcome, Progress, Sampled, Switchover};
use serde::{Deserialize, Serialize};

/// How a migration ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OutcomeKind {
    /// The machine runs at the destination.
    Completed,
    /// The operator cancelled; it runs at the source.
    Cancelled,
    /// The destination refused it; it runs at the source.
    Refused,
    /// It failed: `machine` says where the machine is.
    Failed,
}

/// Where the machine is after a migration.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Whereabouts {
    /// It runs at the destination.
    RunsAtDestination,
    /// It goes on at the source.
    RunsAtSource,
    /// It stands still at the source, its state safe, and does not go on by itself.
    PausedAtSource,
    /// It runs at the destination and lacks pages that are only at the source: who touches one waits.
    LacksPages,
    /// Nothing was learned of it: there is no such machine, or the process that runs it did not answer.
    Unknown,
}

/// Pages sent, by codec.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PageCounts {
    /// Zero pages, sent as a number only.
    pub zero: u64,
    /// Uncompressed.
    pub raw: u64,
    /// By lz4.
    pub lz4: u64,
    /// By zstd.
    pub zstd: u64,
    /// Not sent: the destination had them in an old bundle of the machine.
    pub same: u64,
    /// Each for itself, as the source's swap kept them.
    #[serde(default)]
    pub packed: u64,
    /// Not sent: the guest said that they were free, and did not write to them since.
    #[serde(default)]
    pub free: u64,
}

impl PageCounts {
    /// Counts `pages` sent by `codec`.
    pub(crate) fn add(&mut self, codec: Codec, pages: u64) {
        *match codec {
            Codec::Zero => &mut self.zero,
            Codec::Raw => &mut self.raw,
            Codec::Lz4 => &mut self.lz4,
            Codec::Zstd => &mut self.zstd,
            Codec::Same => &mut self.same,
            Codec::Packed => &mut self.packed,
        } += pages;
    }

    /// Adds `other`.
    pub(crate) fn merge(&mut self, other: Self) {
        self.zero += other.zero;
        self.raw += other.raw;
        self.lz4 += other.lz4;
        self.zstd += other.zstd;
        self.same += other.same;
        self.packed += other.packed;
        self.free += other.free;
    }
}

/// The parts of the downtime, in milliseconds; they add up to it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct DowntimeParts {
    /// Until every vCPU stood still.
    pub pause: f64,
    /// The harvest after the pause.
    pub last_harvest: f64,
    /// Saving state at the source and loading it at the destination.
    pub state: f64,
    /// Harvest after saving, sending the last pages, and waiting for them at the destination.
    pub last_pages: f64,
    /// On the wire, both ways.
    pub flight: f64,
    /// Starting the vCPUs at the destination.
    pub resume: f64,
}

/// How the destination fetched pages while the machine ran there.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Paging {
    /// From the hand-over until the last page came, ms.
    pub took_ms: f64,
    /// From the machine's start until its vCPUs waited for pages for less than a tenth of their time, all
    /// taken together, in any 50 ms that followed, ms: until 90 % of full speed, as far as pages go.
    pub full_speed_ms: f64,
    /// Touches of pages that were not there.
    pub faults: u64,
    /// Pages that were waited for.
    pub requested: u64,
    /// Pages that were pushed in time: there before anyone touched them.
    pub pushed: u64,
    /// Copies that were pushed or asked for in vain: of pages that were there already.
    pub late: u64,
    /// Touches of pages that the source never had.
    pub zeros: u64,
    /// From reading a fault until its page was placed, ms.
    pub wait_ms: WaitMs,
    /// All waits of each thread together, ms.
    pub waited_by_thread_ms: Vec<f64>,
}

/// Percentiles of waits, ms.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct WaitMs {
    /// Mean.
    pub mean: f64,
    /// Median.
    pub p50: f64,
    /// 90th percentile.
    pub p90: f64,
    /// 99th percentile.
    pub p99: f64,
    /// Longest.
    pub max: f64,
}

/// What the destination measured, for the report.
pub(crate) fn paging(fetched: &Fetched) -> Paging {
    let ms = |ns: u64| ns as f64 / 1e6;
    Paging {
        took_ms: ms(fetched.took_ns),
        full_speed_ms: ms(fetched.full_speed_ns),
        faults: fetched.faults,
        requested: fetched.requested,
        pushed: fetched.pushed,
        late: fetched.late,
        zeros: fetched.zeros,
        wait_ms: WaitMs {
            mean: ms(fetched.wait_mean_ns),
            p50: ms(fetched.wait_p50_ns),
            p90: ms(fetched.wait_p90_ns),
            p99: ms(fetched.wait_p99_ns),
            max: ms(fetched.wait_max_ns),
        },
        waited_by_thread_ms: fetched.waited_by_thread_ns.iter().copied().map(ms).collect(),
    }
}

/// What was decided after a round, and from which numbers.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DecisionReport {
    /// Since the migration began, ms.
    pub at_ms: f64,
    /// The round.
    pub round: u32,
    /// Pages in it.
    pub pages: u64,
    /// Bytes that it put on the link.
    pub bytes: u64,
    /// From its first page to its acknowledgement, ms.
    pub took_ms: f64,
    /// Pages that were dirty after it.
    pub dirty_pages: u64,
    /// Link rate, bytes/s.
    pub link_bytes_per_s: f64,
    /// Bytes that a page takes on the link.
    pub bytes_per_page: f64,
    /// The shortest acknowledgement so far, ms.
    pub round_trip_ms: f64,
    /// Downtime of a switchover at that moment, ms.
    pub expected_downtime_ms: f64,
    /// Percent of their time that vCPUs were held back in it.
    pub slowed_percent: u8,
    /// `round`, `slow`, `switch-over`, `post-copy` or `give-up`.
    pub decision: String,
    /// Why, in words.
    pub why: String,
}

/// What was expected of a move before it began.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Foreseen {
    /// Pages that hold data.
    pub pages: u64,
    /// What the link carried, bytes/s.
    pub link_bytes_per_s: f64,
    /// Bytes that a page took on it.
    pub bytes_per_page: f64,
    /// From the last page of a sample to its acknowledgement, ms.
    pub round_trip_ms: f64,
    /// Different pages written a second while it was looked at.
    pub dirty_pages_per_s: f64,
    /// Why the destination cannot take pages after the hand-over.
    pub no_post_copy: Option<String>,
    /// The way that was asked for first, then all others.
    pub ways: Vec<Foretold>,
}

/// What one way to move the machine was expected to come to.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Foretold {
    /// The mode that is asked for.
    pub asked: String,
    /// What it comes to: never `auto`.
    pub mode: String,
    /// Until the machine runs at the destination, ms.
    pub total_ms: f64,
    /// Standstill, ms.
    pub downtime_ms: f64,
    /// From then on until the last page is there, ms.
    pub fetching_ms: f64,
    /// Rounds while the guest runs.
    pub rounds: u32,
    /// Bytes on the link.
    pub bytes: u64,
    /// Percent of their time that vCPUs are held back at the end.
    pub slowed_percent: u8,
    /// Which goals it misses, and what would meet them; none, and all are met.
    pub misses: Option<String>,
}

/// What is foretold for `goals` by `mode` and by all others.
pub(crate) fn foreseen(
    s: &Sampled,
    goals: Goals,
    mode: Mode,
    no_post_copy: Option<&str>,
) -> Foreseen {
    let others = [Mode::Auto, Mode::PreCopy, Mode::PostCopy, Mode::Hybrid];
    let modes = std::iter::once(mode).chain(others.into_iter().filter(|other| *other != mode));
    let way = |asked: Mode| {
        let told = s.forecast(goals, asked, no_post_copy);
        Foretold {
            asked: asked.name().into(),
            mode: told.mode.name().into(),
            total_ms: ms(told.total),
            downtime_ms: ms(told.downtime),
            fetching_ms: ms(told.fetching),
            rounds: told.rounds,
            bytes: told.bytes,
            slowed_percent: told.slowed,
            misses: told.misses,
        }
    };
    Foreseen {
        pages: s.pages,
        link_bytes_per_s: s.rate_bytes_per_s,
        bytes_per_page: s.bytes_per_page,
        round_trip_ms: ms(s.round_trip),
        dirty_pages_per_s: s.written_within(Duration::from_secs(1)),
        no_post_copy: no_post_copy.map(str::to_owned),
        ways: modes.map(way).collect(),
    }
}

/// Decisions that are remembered. The oldest that was only another round makes way, so that what changed something
/// stays.
const MAX_DECISIONS: usize = 64;

/// What was decided so far.
#[derive(Debug, Default)]
pub(crate) struct Decisions(Vec<DecisionReport>);

impl Decisions {
    /// Takes down what `progress`, told at time `at`, says of a decision.
    pub(crate) fn follow(&mut self, at: Duration, progress: &Progress) {
        let Progress::RoundDone {
            facts,
            rate_bytes_per_s,
            bytes_per_page,
            round_trip,
            expected_downtime,
            slowed,
            decision,
        } = progress
        else {
            return;
        };
        if self.0.len() == MAX_DECISIONS {
            self.0.remove(self.0.iter().position(|d| d.decision == "round").unwrap_or(0));
        }
        self.0.push(DecisionReport {
            at_ms: ms(at),
            round: facts.round,
            pages: facts.pages,
            bytes: facts.bytes,
            took_ms: ms(facts.took),
            dirty_pages: facts.dirty,
            link_bytes_per_s: *rate_bytes_per_s,
            bytes_per_page: *bytes_per_page,
            round_trip_ms: ms(*round_trip),
            expected_downtime_ms: ms(*expected_downtime),
            slowed_percent: *slowed,
            decision: decision.name().into(),
            why: decision.why().into(),
        });
    }

    pub(crate) fn into_reports(self) -> Vec<DecisionReport> {
        self.0
    }
}

/// One migration, seen from its source.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// How it ended.
    pub outcome: OutcomeKind,
    /// Why, in words.
    pub reason: String,
    /// Goals that were missed by a machine that arrived, in words.
    #[serde(default)]
    pub missed: Vec<String>,
    /// The last decisions, in their order; of many, those that were only another round are left out first.
    #[serde(default)]
    pub decisions: Vec<DecisionReport>,
    /// What was expected before the move began, if it was looked at.
    #[serde(default)]
    pub foreseen: Option<Foreseen>,
    /// Where the machine is now.
    pub machine: Whereabouts,
    /// What was done: `pre-copy`, `post-copy` or `hybrid`; `auto` if it did not come to that.
    pub mode: String,
    /// From the command until the machine ran at the destination (or the end), ms.
    pub total_ms: f64,
    /// From asking the vCPUs to stop until the destination's word that they run, ms; 0 if the guest
    /// was never stopped.
    pub downtime_ms: f64,
    /// Its parts.
    pub downtime_parts_ms: DowntimeParts,
    /// Comparing digests after the switchover, ms: not part of `total_ms`.
    pub verify_ms: f64,
    /// Bytes of page frames handed to the link.
    pub bytes_sent: u64,
    /// What the link went over, where to, and why over that.
    #[serde(default)]
    pub link: String,
    /// Times that the link was lost and the source came back, or tried to.
    pub links_lost: u32,
    /// Bytes of vCPU and device state.
    pub state_bytes: u64,
    /// Rounds of pages, the last ones with the guest paused included.
    pub rounds: u32,
    /// Pages by codec.
    pub pages: PageCounts,
    /// Pages in the record of the working set: of those that went after the hand-over, the first.
    pub record_pages: u64,
    /// How pages were fetched after the hand-over, if any were.
    pub paging: Option<Paging>,
    /// Link rate, bytes/s, as last seen.
    pub link_bytes_per_s: f64,
    /// Fresh dirty pages a second, as last seen.
    pub dirty_pages_per_s: f64,
    /// Of each stretch of guest memory, dirty pages a second.
    pub dirty_pages_per_s_by_extent: Vec<f64>,
    /// The digest of all memory was compared, and is the same on both sides.
    pub digest_verified: bool,
    /// The digest was compared and is not the same: the machine runs at the destination on damaged
    /// memory.
    pub memory_differs: bool,
}

impl Report {
    /// The report of a migration that could not even begin.
    pub fn not_begun(reason: impl Into<String>, machine: Whereabouts) -> Self {
        Self {
            outcome: OutcomeKind::Failed,
            reason: reason.into(),
            missed: Vec::new(),
            decisions: Vec::new(),
            foreseen: None,
            machine,
            mode: ferry_protocol::Mode::Auto.name().into(),
            total_ms: 0.0,
            downtime_ms: 0.0,
            downtime_parts_ms: DowntimeParts::default(),
            verify_ms: 0.0,
            bytes_sent: 0,
            link: String::new(),
            links_lost: 0,
            state_bytes: 0,
            rounds: 0,
            pages: PageCounts::default(),
            record_pages: 0,
            paging: None,
            link_bytes_per_s: 0.0,
            dirty_pages_per_s: 0.0,
            dirty_pages_per_s_by_extent: Vec::new(),
            digest_verified: false,
            memory_differs: false,
        }
    }
}

pub(crate) fn ms(d: Duration) -> f64 {
    d.as_secs_f64() * 1e3
}

/// The downtime and its parts.
pub(crate) fn downtime(s: &Switchover) -> (f64, DowntimeParts) {
    if s.running.is_zero() {
        return (0.0, DowntimeParts::default());
    }
    let between = |from: Duration, to: Duration| ms(to.saturating_sub(from));
    let us = |us: u64| us as f64 / 1e3;
    let destination =
        us(s.destination_pages_us) + us(s.destination_load_us) + us(s.destination_resume_us);
    let parts = DowntimeParts {
        pause: between(s.pause, s.paused),
        last_harvest: between(s.paused, s.harvested),
        state: between(s.harvested, s.saved) + us(s.destination_load_us),
        last_pages: between(s.saved, s.committed) + us(s.destination_pages_us),
        flight: (between(s.committed, s.running) - destination).max(0.0),
        resume: us(s.destination_resume_us),
    };
    (between(s.pause, s.running), parts)
}

/// Outcome, reason, whereabouts, and whether the digests are the same, for a report.
pub(crate) fn outcome(outcome: &Outcome) -> (OutcomeKind, String, Whereabouts, Option<bool>) {
    use OutcomeKind as K;
    use Whereabouts as W;
    match outcome {
        Outcome::Completed { digest_verified, reason } => {
            (K::Completed, reason.clone(), W::RunsAtDestination, *digest_verified)
        }
        Outcome::Cancelled => {
            (K::Cancelled, "cancelled by the operator".into(), W::RunsAtSource, None)
        }
        Outcome::Refused(reasons) => {
            let words: Vec<&str> = reasons.iter().map(|r| r.why.as_str()).collect();
            (K::Refused, words.join("; "), W::RunsAtSource, None)
        }
        Outcome::Failed(why) => (K::Failed, why.clone(), W::RunsAtSource, None),
        Outcome::Detached { reason, reattach } if reattach.is_in_doubt() => {
            (K::Failed, reason.clone(), W::PausedAtSource, None)
        }
        Outcome::Detached { reason, .. } => (K::Failed, reason.clone(), W::LacksPages, None),
        Outcome::InDoubt { reason, .. } => (K::Failed, reason.clone(), W::PausedAtSource, None),
    }
}

#[cfg(test)]
mod tests {
    use ferry_protocol::{Decision, RoundFacts};

    use super::*;

    #[test]
    fn the_parts_add_up_to_the_downtime() {
        let ms = Duration::from_millis;
        let s = Switchover {
            pause: ms(100),
            paused: ms(101),
            harvested: ms(103),
            saved: ms(106),
            committed: ms(110),
            running: ms(120),
            destination_pages_us: 1000,
            destination_load_us: 2000,
            destination_resume_us: 500,
        };
        let (downtime, p) = downtime(&s);
        let sum = p.pause + p.last_harvest + p.state + p.last_pages + p.flight + p.resume;
        assert!((downtime - 20.0).abs() < 1e-9, "{downtime}");
        assert!((sum - downtime).abs() < 1e-9, "{sum}");
        assert!((p.flight - 6.5).abs() < 1e-9);
    }

    #[test]
    fn of_many_decisions_those_that_changed_something_stay() {
        let round = |round| Decision::Round(format!("{round}"));
        let mut decisions = Decisions::default();
        let mut told = |number, decision| {
            let facts = RoundFacts {
                round: number,
                took: Duration::from_millis(1),
                pages: 1,
                bytes: 1,
                same: 0,
                dirty: 1,
                next_leaves: None,
                acknowledged_in: Duration::ZERO,
                elapsed: Duration::ZERO,
            };
            let progress = Progress::RoundDone {
                facts,
                rate_bytes_per_s: 1.0,
                bytes_per_page: 1.0,
                round_trip: Duration::ZERO,
                expected_downtime: Duration::ZERO,
                slowed: 0,
                decision,
            };
            decisions.follow(Duration::ZERO, &progress);
        };
        told(1, round(1));
        told(2, Decision::Slow(50, "it does not shrink".into()));
        (3..100).for_each(|number| told(number, round(number)));
        let kept: Vec<_> = decisions.into_reports().iter().map(|d| d.round).collect();
        assert_eq!(kept.len(), MAX_DECISIONS);
        assert!(kept[..2] == [2, 37] && kept.is_sorted() && kept.last() == Some(&99), "{kept:?}");
    }
}
