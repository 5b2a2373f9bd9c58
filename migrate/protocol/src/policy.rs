//! When to switch over: the operator states goals, this decides, and says why.
//!
//! After each round it is told what the round took and what is dirty now. It expects a downtime of
//!
//! ```text
//! overhead + round trip + dirty pages × bytes per page ÷ link rate
//! ```
//!
//! and switches over when that meets the goal and another round would not make it much smaller. Where rounds do not
//! pay, what is left goes after the hand-over; or, where it may not, vCPUs are held back as far as the goals allow.

use std::time::Duration;

/// What the operator asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Goals {
    /// The guest stands still no longer than this.
    pub max_downtime: Duration,
    /// The migration takes no longer than this.
    pub max_total: Duration,
    /// Percent of their time, at most 99, that vCPUs may be held back where rounds do not pay and pages cannot go
    /// after the hand-over.
    pub max_slowdown: u8,
}

impl Default for Goals {
    /// 50 ms, 5 minutes, and no vCPU is held back.
    fn default() -> Self {
        let (max_downtime, max_total) = (Duration::from_millis(50), Duration::from_secs(300));
        Self { max_downtime, max_total, max_slowdown: 0 }
    }
}

impl Goals {
    /// Which of them a move misses that takes `total`, and for which the guest stands still for `downtime`: in words.
    pub fn missed(self, downtime: Duration, total: Duration) -> Vec<String> {
        let over = |what, is: Duration, most: Duration, flag| {
            let [is_ms, most_ms] = [is, most].map(|d| d.as_secs_f64() * 1e3);
            (is > most)
                .then(|| format!("{is_ms:.1} ms {what}, {most_ms:.1} ms are allowed ({flag})"))
        };
        let missed = [
            over("of downtime", downtime, self.max_downtime, "--max-downtime"),
            over("in all", total, self.max_total, "--max-total"),
        ];
        missed.into_iter().flatten().collect()
    }
}

/// How a machine is moved.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Mode {
    /// Rounds while they pay; the rest of the pages after the hand-over where the goals cannot be met
    /// otherwise.
    #[default]
    Auto,
    /// All pages before the hand-over, or none.
    PreCopy,
    /// All pages after the hand-over.
    PostCopy,
    /// One round, then the hand-over, then what was dirtied meanwhile.
    Hybrid,
}

impl Mode {
    /// As it is written.
    pub fn name(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::PreCopy => "pre-copy",
            Self::PostCopy => "post-copy",
            Self::Hybrid => "hybrid",
        }
    }
}

/// What one round did, and what is left.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RoundFacts {
    /// Number, from 1.
    pub round: u32,
    /// From its first page read to its acknowledgement.
    pub took: Duration,
    /// Pages in it.
    pub pages: u64,
    /// Bytes that it put on the wire.
    pub bytes: u64,
    /// Pages that were only named, as the destination had them.
    pub same: u64,
    /// Pages that are dirty after it.
    pub dirty: u64,
    /// How many a round of those is expected to leave, if that was foretold.
    pub next_leaves: Option<u64>,
    /// From its last page on the link to its acknowledgement: no less than the round trip.
    pub acknowledged_in: Duration,
    /// Since the migration began.
    pub elapsed: Duration,
}

/// What to do next, with the reason in words.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Decision {
    /// Another round while the guest runs.
    Round(String),
    /// Another round, with vCPUs held back for this many percent of their time from now on.
    Slow(u8, String),
    /// Pause and send the rest.
    SwitchOver(String),
    /// Pause and hand over; the rest comes while the machine runs at the destination.
    PostCopy(String),
    /// The goals cannot be met.
    GiveUp(String),
}

impl Decision {
    /// What is done, in a word.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Round(_) => "round",
            Self::Slow(..) => "slow",
            Self::SwitchOver(_) => "switch-over",
            Self::PostCopy(_) => "post-copy",
            Self::GiveUp(_) => "give-up",
        }
    }

    /// Why, in words.
    pub fn why(&self) -> &str {
        let (Self::Round(why)
        | Self::Slow(_, why)
        | Self::SwitchOver(why)
        | Self::PostCopy(why)
        | Self::GiveUp(why)) = self;
        why
    }
}

/// The decision after each round. Pure: it holds numbers only.
#[derive(Clone, Debug)]
pub struct Policy {
    goals: Goals,
    mode: Mode,
    /// Why the destination cannot take pages after the hand-over.
    no_post_copy: Option<String>,
    /// Percent of their time that vCPUs are held back.
    slowed: u8,
    /// Why they cannot be.
    cannot_slow: Option<String>,
    rounds: u32,
    /// Bytes a second, from rounds large enough to tell.
    rate: f64,
    bytes_per_page: f64,
    /// The shortest acknowledgement.
    round_trip: Duration,
    dirty: Option<u64>,
    rounds_within_goal: u32,
    expected: Duration,
    dirty_pages_per_s: f64,
}

/// Pausing, saving, loading and resuming, before anything was measured.
pub(crate) const OVERHEAD: Duration = Duration::from_millis(2);
/// Rounds smaller than this say more of the round trip than of the rate.
const TELLING_BYTES: u64 = 1 << 20;
/// At most so many more rounds once the goal is met, each only while it shrinks the rest.
const POLISHING_ROUNDS: u32 = 3;
/// After so many rounds, the shortest acknowledgement is that of the link, not of pages that were still installed, or of
/// a busy host.
const ROUNDS_TO_KNOW_THE_LINK: u32 = 20;
/// A round pays if it leaves less than this part of what it sent.
const PAYS: f64 = 0.75;
/// The same where pages can go after the hand-over, which sends each of them once more and no oftener.
const PAYS_AUTO: f64 = 0.5;
/// vCPUs that are held back shall leave this part.
const SHRINKS_TO: f64 = 1.0 / 3.0;
/// No vCPU is held back more: percent.
const MOST_SLOWED: u8 = 99;
/// The fewest bytes a page can cost on the wire (a run entry).
const LEAST_BYTES_PER_PAGE: f64 = 16.0;

impl Policy {
    /// A policy for `goals` by `mode`.
    pub fn new(goals: Goals, mode: Mode) -> Self {
        Self {
            goals,
            mode,
            no_post_copy: None,
            slowed: 0,
            cannot_slow: None,
            rounds: 0,
            rate: 0.0,
            bytes_per_page: ferry_pages::PAGE_BYTES as f64,
            round_trip: Duration::MAX,
            dirty: None,
            rounds_within_goal: 0,
            expected: Duration::MAX,
            dirty_pages_per_s: 0.0,
        }
    }

    /// Goes for these goals from now on. Returns how far vCPUs may be held back, if that is less than they are.
    pub fn set_goals(&mut self, goals: Goals) -> Option<u8> {
        self.goals = goals;
        let less = self.slowed > self.most_slowed();
        self.slowed = self.slowed.min(self.most_slowed());
        less.then_some(self.slowed)
    }

    /// vCPUs cannot be held back.
    pub fn cannot_slow(&mut self, why: String) {
        (self.slowed, self.cannot_slow) = (0, Some(why));
    }

    /// Percent of their time that vCPUs are held back.
    pub fn slowed(&self) -> u8 {
        self.slowed
    }

    /// vCPUs are not held back any more.
    pub fn let_go(&mut self) {
        self.slowed = 0;
    }

    fn most_slowed(&self) -> u8 {
        match &self.cannot_slow {
            Some(_) => 0,
            None => self.goals.max_slowdown.min(MOST_SLOWED),
        }
    }

    /// The goals.
    pub fn goals(&self) -> Goals {
        self.goals
    }

    /// The mode; after [`no_post_copy`](Self::no_post_copy) perhaps not the one that was asked for.
    pub fn mode(&self) -> Mode {
        self.mode
    }

    /// The destination cannot take pages after the hand-over.
    ///
    /// # Errors
    /// Then this mode is not possible, in words.
    pub fn no_post_copy(&mut self, why: &str) -> Result<(), String> {
        match self.mode {
            Mode::Auto | Mode::PreCopy => {
                self.mode = Mode::PreCopy;
                self.no_post_copy = Some(why.to_owned());
                Ok(())
            }
            Mode::PostCopy | Mode::Hybrid => Err(format!(
                "the destination cannot run a machine before all its pages are there ({why}): use --mode \
                 pre-copy"
            )),
        }
    }

    /// Why the destination cannot take pages after the hand-over, if so.
    pub fn why_no_post_copy(&self) -> Option<&str> {
        self.no_post_copy.as_deref()
    }

    /// Downtime that a switchover after the last round was expected to have.
    pub fn expected_downtime(&self) -> Duration {
        self.expected
    }

    /// Link rate in bytes a second, as last seen.
    pub fn rate_bytes_per_s(&self) -> f64 {
        self.rate
    }

    /// Fresh dirty pages a second, as last seen.
    pub fn dirty_pages_per_s(&self) -> f64 {
        self.dirty_pages_per_s
    }

    /// Bytes that a page takes on the link, as last seen.
    pub fn bytes_per_page(&self) -> f64 {
        self.bytes_per_page
    }

    /// The shortest acknowledgement so far.
    pub fn round_trip(&self) -> Option<Duration> {
        (self.rounds > 0).then_some(self.round_trip)
    }

    /// Whether the migration has run out of time, in words.
    pub fn out_of_time(&self, elapsed: Duration) -> Option<String> {
        (elapsed >= self.goals.max_total).then(|| {
            let mut why = format!(
                "not finished within {:.1} s (--max-total)",
                self.goals.max_total.as_secs_f64()
            );
            if self.rate > 0.0 {
                let dirty = self.dirty_pages_per_s * ferry_pages::PAGE_BYTES as f64 / 1e6;
                why += &format!(
                    ": the guest dirties {:.0} pages/s ({dirty:.0} MB/s), the link carried {:.0} MB/s; \
                     a switchover now would take {:.0} ms, {} ms are allowed (--max-downtime)",
                    self.dirty_pages_per_s,
                    self.rate / 1e6,
                    self.expected.as_secs_f64() * 1e3,
                    self.goals.max_downtime.as_millis(),
                );
            }
            self.and_needs(why)
        })
    }

    fn and_needs(&self, why: String) -> String {
        match self.needs() {
            Some(needs) => format!("{why}; {needs}"),
            None => why,
        }
    }

    /// What would have met the goals, in words; none, as far as anything was measured.
    pub fn needs(&self) -> Option<String> {
        let dirty = self.dirty? as f64 * self.bytes_per_page;
        let mut needs = Vec::new();
        let room = self.goals.max_downtime.saturating_sub(self.least_downtime()).as_secs_f64();
        // What is dirty now fits into the downtime; or rounds pay.
        let fits = if room > 0.0 { dirty / room } else { f64::INFINITY };
        let pays = self.dirty_pages_per_s * self.bytes_per_page / PAYS;
        let rate = fits.min(if room > 0.0 { pays } else { f64::INFINITY });
        if rate > self.rate && rate.is_finite() {
            needs.push(format!("a link of {}", bits(rate)));
        }
        if self.expected > self.goals.max_downtime && self.expected < Duration::MAX {
            // Rounded up.
            let ms = self.expected.as_secs_f64() * 1e3;
            needs.push(format!("--max-downtime {:.0}ms", (ms + 0.5).ceil()));
        }
        if self.mode == Mode::PreCopy && room > 0.0 {
            let percent = self.slow_to(PAYS).max(self.slowed.saturating_add(1));
            if self.cannot_slow.is_none()
                && percent > self.goals.max_slowdown
                && percent <= MOST_SLOWED
            {
                needs.push(format!("--max-slowdown {percent}"));
            }
            if self.no_post_copy.is_none() {
                needs.push("post-copy (--mode auto)".into());
            }
        }
        (!needs.is_empty()).then(|| format!("needs {}", needs.join(", or ")))
    }

    /// The least that a switchover over this link takes.
    fn least_downtime(&self) -> Duration {
        OVERHEAD.saturating_add(self.round_trip)
    }

    /// How far vCPUs had to be held back for rounds to leave `part` of what they send: percent.
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "from 0 to 100")]
    fn slow_to(&self, part: f64) -> u8 {
        // As if they were not held back at all.
        let dirties = self.dirty_pages_per_s / (1.0 - f64::from(self.slowed) / 100.0);
        let carries = self.rate / self.bytes_per_page;
        if dirties <= 0.0 {
            return 0;
        }
        ((1.0 - part * carries / dirties) * 100.0).ceil().clamp(0.0, 100.0) as u8
    }

    /// Whether `pages` that the guest writes to are left out of the first round: one of them would leave so many of them
    /// that it would not pay, and they can go after the hand-over, once.
    pub(crate) fn leaves_out(&self, pages: u64, next_leaves: u64) -> bool {
        matches!(self.mode, Mode::Auto | Mode::Hybrid)
            && next_leaves as f64 > PAYS_AUTO * pages as f64
    }

    /// Takes a round's facts and decides.
    pub fn after_round(&mut self, facts: RoundFacts) -> Decision {
        let last = self.dirty;
        self.learn(&facts);
        let ms = |d: Duration| format!("{:.1} ms", d.as_secs_f64() * 1e3);
        let (expected, goal) = (self.expected, self.goals.max_downtime);
        let shrinks = last.is_none_or(|last| facts.dirty * 4 < last * 3);
        // No mode is quicker than the link.
        let least = self.least_downtime();
        let unreachable = least > goal && self.rounds >= ROUNDS_TO_KNOW_THE_LINK;
        if unreachable && self.mode == Mode::PreCopy {
            return Decision::GiveUp(format!(
                "no switchover over this link takes less than {}: its round trip is {}; needs --max-downtime \
                 {:.0}ms",
                ms(least),
                ms(self.round_trip),
                (near(least).as_secs_f64() * 1e3).ceil()
            ));
        }
        let allowed = if unreachable { near(least) } else { goal };
        let leaves_less_than = |part| (facts.dirty as f64) < part * facts.pages as f64;
        // A round of all pages says little of one of pages that are all written over and over.
        let next = facts.next_leaves.map_or(0.0, |pages| pages as f64);
        let pays = leaves_less_than(PAYS_AUTO) && next <= PAYS_AUTO * facts.dirty as f64;
        if expected <= allowed {
            self.rounds_within_goal += 1;
            let tiny = expected <= allowed / 8;
            let over = tiny || !shrinks || self.mode == Mode::Auto && !pays;
            if over || self.rounds_within_goal > POLISHING_ROUNDS {
                let what =
                    format!("{} dirty pages: expected downtime {}", facts.dirty, ms(expected));
                return Decision::SwitchOver(match unreachable {
                    true => format!(
                        "{what}; {} are allowed, but the link's round trip is {}",
                        ms(goal),
                        ms(self.round_trip)
                    ),
                    false => format!("{what} of {} allowed", ms(goal)),
                });
            }
        }
        if let Some(why) = self.rounds_are_over(&facts, pays) {
            return match self.mode {
                Mode::PreCopy => Decision::GiveUp(why),
                Mode::Auto if expected <= near(least) => Decision::SwitchOver(format!(
                    "{why}: all {} pages before the hand-over, as it would take no less time without them",
                    facts.dirty
                )),
                Mode::Auto | Mode::PostCopy | Mode::Hybrid => {
                    Decision::PostCopy(format!("{why}: {} pages after the hand-over", facts.dirty))
                }
            };
        }
        let left = format!(
            "{} dirty pages: expected downtime {}, {} allowed",
            facts.dirty,
            ms(expected),
            ms(goal)
        );
        if self.mode == Mode::PreCopy && !leaves_less_than(PAYS) && self.slowed < self.most_slowed()
        {
            // At least half of the speed that is left: a set that is written over and over looks slower than it is.
            let half = self.slowed + (100 - self.slowed).div_ceil(2);
            self.slowed = self.slow_to(SHRINKS_TO).max(half).min(self.most_slowed());
            let (slowed, most) = (self.slowed, self.goals.max_slowdown);
            return Decision::Slow(
                slowed,
                format!(
                    "{left}; vCPUs are held back for {slowed} % of their time, {most} % allowed"
                ),
            );
        }
        Decision::Round(left)
    }

    /// Why no other round is made, if so.
    fn rounds_are_over(&self, facts: &RoundFacts, pays: bool) -> Option<String> {
        match self.mode {
            Mode::PostCopy | Mode::Hybrid => Some("one round was asked for (--mode hybrid)".into()),
            Mode::Auto if !pays => Some(self.and_needs(format!(
                "the guest dirties {:.0} pages/s, too many for rounds to pay: round {} sent {} pages \
                 and left {} dirty, {:.0} ms of downtime where {} ms are allowed",
                self.dirty_pages_per_s,
                facts.round,
                facts.pages,
                facts.dirty,
                self.expected.as_secs_f64() * 1e3,
                self.goals.max_downtime.as_millis(),
            ))),
            Mode::Auto | Mode::PreCopy => self.out_of_time(facts.elapsed),
        }
    }

    fn learn(&mut self, facts: &RoundFacts) {
        self.rounds = self.rounds.saturating_add(1);
        self.dirty = Some(facts.dirty);
        let took = facts.took.as_secs_f64().max(1e-6);
        let rate = facts.bytes.max(1) as f64 / took;
        // A small round is mostly waiting: the link carries that much at least.
        self.rate = if facts.bytes >= TELLING_BYTES { rate } else { self.rate.max(rate) };
        let sent = facts.pages.saturating_sub(facts.same);
        if sent > 0 {
            self.bytes_per_page = (facts.bytes as f64 / sent as f64).max(LEAST_BYTES_PER_PAGE);
        }
        self.round_trip = self.round_trip.min(facts.acknowledged_in);
        self.dirty_pages_per_s = facts.dirty as f64 / took;
        let send = facts.dirty as f64 * self.bytes_per_page / self.rate;
        let send = Duration::try_from_secs_f64(send).unwrap_or(Duration::MAX);
        self.expected = OVERHEAD.saturating_add(self.round_trip).saturating_add(send);
    }
}

/// What is not worth telling from `time`.
fn near(time: Duration) -> Duration {
    time.saturating_add(time / 4)
}

/// A rate in bytes a second, as operators of links say it.
fn bits(bytes_per_s: f64) -> String {
    let bits = bytes_per_s * 8.0;
    match bits >= 1e9 {
        true => format!("{:.1} Gbit/s", bits / 1e9),
        false => format!("{:.0} Mbit/s", (bits / 1e6).ceil()),
    }
}

#[cfg(test)]
mod tests;
