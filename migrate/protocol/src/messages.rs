//! What source and destination say to each other on the control channel.
//!
//! ```text
//!   source                                  destination
//!     Hello::Control ────────────────────────▶
//!     Offer{spec, codecs} ───────────────────▶  builds the machine, paused and empty
//!     ◀──────────────────────── Recalls{pages, digests}, if it has an old copy of it
//!     ◀──────────────── Accepted{session}  or  Refused{reasons}
//!     Hello::Lane{session} on each lane ─────▶
//!     Prepare ───────────────────────────────▶
//!     ◀──────────────────────────────── Ready
//!     (pages of round n on the lanes)
//!     RoundEnd{n, batches} ──────────────────▶  all batches of round n installed?
//!     ◀──────────────── RoundDone{n, lacking}
//!     … pause, last pages …
//!     Commit{permit, state, rounds} ─────────▶  the commit point: the permit has left the source
//!     ◀──────────────── Running  or  CommitRefused{reason}
//!     ◀──────────────────────────── Digest{sum}
//!     Verified{matches} ─────────────────────▶
//! ```
//! Either side may send `Abort`/`Failed` before the commit. After a lost link the source comes back:
//!
//! ```text
//!     Hello::Rejoin{session, done} ──────────▶  drops a commit that is not complete
//!     ◀───────── GoOn{held}  or  Running  or  Verdict
//!     Hello::Lane on each lane ──────────────▶  and on with the next round
//! ```
//!
//! Pages that the destination recalls are named on the lanes and not sent, where their content still has that
//! digest. The destination takes each out of its old copy as it is named, under its round's number: nothing of
//! an old copy is ever in memory that the source did not name. What it cannot read after all, it lacks.
//!
//! In post-copy the commit names the pages that are still *owed*; the machine runs without them. After rounds, older
//! copies of most of them are named before the pause (`Stale`), to be given back while the guest still runs; an empty
//! round tells when that is done. They are
//! pushed on the lanes, and sent on the urgent lane as the destination asks for them; `Digest` says that
//! all came. To a source that comes back meanwhile, `Lacks{owed}` says what is still owed.

use std::time::Duration;

use ferry_pages::PageSet;
use serde::{Deserialize, Serialize};

use crate::limits::{MAX_REASONS, MAX_WORDS};
use crate::{Fetched, MachineSpec, PackedPages, Refusal, RunPermit, wire};

/// Oldest protocol version that this build speaks.
pub const VERSION_MIN: u16 = 2;
/// Newest protocol version that this build speaks.
pub const VERSION_MAX: u16 = 2;
/// First bytes on every channel; a version that cannot be decoded is still recognised by them.
pub(crate) const MAGIC: [u8; 8] = *b"ferry\0\r\n";

/// What a channel is for: the first message on it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Hello {
    /// A new migration's control channel; versions that the source speaks.
    Control {
        /// Oldest.
        version_min: u16,
        /// Newest.
        version_max: u16,
    },
    /// A lane for pages, joining a session.
    Lane {
        /// The session's token, from [`ToSource::Accepted`].
        session: u128,
        /// The link that it belongs to.
        link: u64,
        /// Which lane, from 0.
        lane: u16,
    },
    /// The lane on which the destination asks for pages, and gets them at once.
    Urgent {
        /// The session's token.
        session: u128,
        /// The link that it belongs to.
        link: u64,
    },
    /// The source of a session whose link was lost is here again, with all that it holds. What older
    /// channels of the session still bring counts no more, but for pages.
    Rejoin {
        /// The session's token.
        session: u128,
        /// Rounds up to this one are known to be installed.
        done: u32,
        /// A random number by which the channels of this link are told from those of others; the first link's
        /// is 0.
        link: u64,
    },
    /// A reader of bundles: [`ToDepot`](crate::ToDepot) follows.
    Bundles {
        /// [`LENDING_VERSION`](crate::LENDING_VERSION) of the reader.
        version: u16,
    },
}

/// Bytes that do not begin a Ferry channel.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum NotFerry {
    /// Other magic.
    #[error("the peer does not speak Ferry: its first message does not begin with Ferry's magic")]
    Magic,
    /// Ferry's magic, and then no hello of this version.
    #[error(
        "the peer's first message is no hello of Ferry's protocol versions {VERSION_MIN} to {VERSION_MAX} \
         ({0}): update the older one"
    )]
    Hello(String),
}

impl Hello {
    /// The hello of this build for a new migration.
    pub fn control() -> Self {
        Self::Control { version_min: VERSION_MIN, version_max: VERSION_MAX }
    }

    /// As bytes: magic, then the message.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = MAGIC.to_vec();
        // A hello has no sequence in it: it always fits.
        out.extend(wire::encode(self).unwrap_or_default());
        out
    }

    /// Takes bytes from a peer apart.
    ///
    /// # Errors
    /// Other magic, or not a hello.
    pub fn decode(bytes: &[u8]) -> Result<Self, NotFerry> {
        let rest = bytes.strip_prefix(&MAGIC[..]).ok_or(NotFerry::Magic)?;
        wire::decode(rest).map_err(|e| NotFerry::Hello(e.to_string()))
    }
}

/// Pages of an old copy of a machine, each with its digest.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Recalled {
    /// The pages.
    pub pages: PackedPages,
    /// The digest of each, in their order.
    pub digests: Vec<u64>,
}

impl Recalled {
    /// No message has more pages.
    const MAX_PAGES: usize = 1 << 18;

    /// `pages`, ascending, with their digests, in as many messages as they need.
    pub fn pack(pages: impl IntoIterator<Item = (u64, u64)>) -> Vec<Self> {
        let mut pages = pages.into_iter().peekable();
        let mut all = Vec::new();
        while pages.peek().is_some() {
            let (mut set, mut digests) = (PageSet::new(), Vec::new());
            for (gfn, digest) in pages.by_ref().take(Self::MAX_PAGES) {
                set.insert(gfn);
                digests.push(digest);
            }
            all.push(Self { pages: PackedPages::pack(&set), digests });
        }
        all
    }
}

/// From source to destination.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ToDestination {
    /// The machine, and how its pages can be encoded.
    Offer {
        /// What the destination must host.
        spec: MachineSpec,
        /// Codecs of the source, a bit each.
        codecs: u8,
        /// Lanes that will join.
        lanes: u16,
        /// How long to keep what came when the link is lost.
        keep: Duration,
        /// The machine's lasting number: by it, and by nothing less, an old copy of its memory is found. None
        /// where the source does not want one to be looked for.
        machine: Option<u128>,
    },
    /// Be ready to run at once.
    Prepare,
    /// All pages of a round were sent.
    RoundEnd {
        /// Which round.
        round: u32,
        /// How many batches it had.
        batches: u64,
    },
    /// The commit point: run the machine as soon as all `rounds` are installed.
    Commit {
        /// The right to run it.
        permit: RunPermit,
        /// State sections.
        state: Vec<u8>,
        /// The last rounds, each with its number of batches. Of pages that are owed, nothing is taken that comes in
        /// a round up to the last of them; it may be empty.
        rounds: Vec<(u32, u64)>,
        /// Pages that come while the machine runs: older copies of them must not be seen.
        owed: PackedPages,
    },
    /// The migration ends here; the machine stays at the source.
    Abort {
        /// Why.
        reason: String,
    },
    /// Whether both digests of memory are the same.
    Verified {
        /// They are.
        matches: bool,
    },
    /// The guest has newer copies of these pages, which come later: what is here of them is of no use.
    Stale {
        /// The pages.
        pages: PackedPages,
    },
}

/// From destination to source.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ToSource {
    /// The machine fits.
    Accepted {
        /// Version chosen.
        version: u16,
        /// Token with which lanes join, and by which the session is asked for.
        session: u128,
        /// Codecs that both sides have.
        codecs: u8,
        /// Why the machine cannot run here before all its pages are here; none if it can.
        no_post_copy: Option<String>,
    },
    /// Before `Accepted`: pages that the destination has in an old copy of the machine.
    Recalls(Recalled),
    /// The machine does not fit.
    Refused {
        /// Every reason.
        reasons: Vec<Refusal>,
    },
    /// Everything that can be built before the switchover is built.
    Ready,
    /// A round is installed.
    RoundDone {
        /// Which.
        round: u32,
        /// Pages of it that were named only, and could not be had from the old copy after all.
        lacking: PackedPages,
    },
    /// The destination cannot go on, and has not run the machine.
    Failed {
        /// Why.
        reason: String,
    },
    /// The machine runs here.
    Running {
        /// From the commit's arrival until all pages were installed, µs.
        pages_us: u64,
        /// Loading state, µs.
        load_us: u64,
        /// Starting the vCPUs, µs.
        resume_us: u64,
    },
    /// The machine does not run here and never will: the source may.
    CommitRefused {
        /// Why.
        reason: String,
    },
    /// All pages are here.
    Digest {
        /// Order-free digest of all pages as they were installed: wrapping sum over those that are not
        /// zero. None where it says nothing: the guest gave up owed pages before they came.
        sum: Option<u64>,
        /// How pages were fetched, if any were.
        fetched: Option<Fetched>,
    },
    /// Answer to [`Hello::Rejoin`]: the machine has not run here, and will not by any commit so far.
    GoOn {
        /// Pages that are here from rounds after those that the source knows to be done.
        held: PackedPages,
    },
    /// Answer to [`Hello::Rejoin`]: the machine runs here, and these pages are still owed.
    Lacks {
        /// The pages.
        owed: PackedPages,
    },
    /// Answer to [`Hello::Rejoin`] of a session that is over.
    Verdict(Verdict),
}

impl ToDestination {
    /// The same, with what is for people to read as one plain line of bounded length.
    #[must_use]
    pub fn plain(mut self) -> Self {
        if let Self::Abort { reason } = &mut self {
            make_plain(reason);
        }
        self
    }
}

impl ToSource {
    /// As [`ToDestination::plain`].
    #[must_use]
    pub fn plain(mut self) -> Self {
        match &mut self {
            Self::Failed { reason } | Self::CommitRefused { reason } => make_plain(reason),
            Self::Accepted { no_post_copy: Some(why), .. } => make_plain(why),
            Self::Refused { reasons } => {
                reasons.truncate(MAX_REASONS);
                for reason in reasons {
                    make_plain(&mut reason.what);
                    make_plain(&mut reason.why);
                }
            }
            _ => {}
        }
        self
    }
}

/// A peer's words go to the operator's terminal.
fn make_plain(words: &mut String) {
    let plain = words.chars().map(|c| if c.is_control() { ' ' } else { c });
    *words = plain.take(MAX_WORDS).collect();
}

/// What became of a session.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Verdict {
    /// The machine ran here.
    Ran,
    /// It did not run here and never will.
    NeverRan,
    /// This process knows no such session, or not how it ends: it proves nothing.
    Unknown,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{MAX_HELLO_BYTES, MAX_LANES};
    use ferry_pages::{Layout, Run};

    #[test]
    fn a_hello_comes_back_as_it_was_said_and_fits() {
        for hello in [
            Hello::control(),
            Hello::Lane { session: u128::MAX, link: u64::MAX, lane: MAX_LANES },
            Hello::Urgent { session: 1, link: 2 },
            Hello::Rejoin { session: u128::MAX, done: u32::MAX, link: u64::MAX },
            Hello::Bundles { version: 1 },
        ] {
            let bytes = hello.encode();
            assert!(bytes.starts_with(&MAGIC) && bytes.len() <= MAX_HELLO_BYTES);
            assert_eq!(Hello::decode(&bytes), Ok(hello));
            assert_eq!(Hello::decode(&bytes[1..]), Err(NotFerry::Magic));
            let cut = Hello::decode(&bytes[..bytes.len() - 1]);
            assert!(matches!(cut, Err(NotFerry::Hello(_))), "{cut:?}");
        }
    }

    #[test]
    fn an_old_copy_is_offered_in_as_many_messages_as_it_takes() {
        let layout = Layout::new(vec![Run::new(0, 1 << 20)]).unwrap();
        let most = Recalled::MAX_PAGES as u64;
        for (pages, messages) in [(0, 0), (1, 1), (most, 1), (most + 1, 2)] {
            let packed = Recalled::pack((0..pages).map(|gfn| (gfn, gfn + 7)));
            assert_eq!(packed.len(), messages, "{pages} pages");
            let mut all = Vec::new();
            for part in &packed {
                assert!(wire::encode(part).unwrap().len() < wire::MAX_MESSAGE_BYTES / 16);
                let runs: Vec<Run> = part.pages.unpack(&layout).unwrap().runs().collect();
                let gfns = runs.iter().flat_map(|run| run.start..run.end());
                all.extend(gfns.zip(part.digests.iter().copied()));
            }
            assert!(all.into_iter().eq((0..pages).map(|gfn| (gfn, gfn + 7))));
        }
    }

    #[test]
    fn words_of_a_peer_are_one_plain_line_of_bounded_length() {
        let words = "\u{1b}[2Jall is well\n\u{9b}31m".repeat(1000);
        let refusal = Refusal::new(words.clone(), words.clone());
        for message in [
            ToSource::Failed { reason: words.clone() },
            ToSource::CommitRefused { reason: words.clone() },
            ToSource::Accepted {
                version: 2,
                session: 1,
                codecs: 1,
                no_post_copy: Some(words.clone()),
            },
            ToSource::Refused { reasons: vec![refusal; 1000] },
        ] {
            let shown = match message.plain() {
                ToSource::Failed { reason } | ToSource::CommitRefused { reason } => reason,
                ToSource::Accepted { no_post_copy: Some(why), .. } => why,
                ToSource::Refused { reasons } => {
                    reasons.iter().map(|r| r.what.clone() + &r.why).collect()
                }
                other => panic!("{other:?}"),
            };
            assert!(shown.contains("all is well") && !shown.contains(char::is_control));
            assert!(shown.chars().count() <= 2 * MAX_WORDS * MAX_REASONS);
        }
        let ToDestination::Abort { reason } = (ToDestination::Abort { reason: words }).plain()
        else {
            panic!()
        };
        assert!(!reason.contains(char::is_control) && reason.chars().count() <= MAX_WORDS);
    }
}
