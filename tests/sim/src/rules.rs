//! What must be true at every moment of a run, by name.

use std::fmt;

/// A rule of the protocol, as the simulator checks it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Rule {
    /// Never two running.
    OneRuns,
    /// What the guest has in its memory is what it wrote there last.
    LastVersion,
    /// No older copy lands on a newer one, nor on what the guest wrote meanwhile.
    NoLateOverwrite,
    /// A page that differs on the two sides is owed by somebody: its bit is set, or it is in a round, or
    /// it is served after the hand-over.
    NoLostBit,
    /// Nothing is acknowledged that is not installed.
    AckAfterInstall,
    /// Once the network has healed, it comes to an end, and to the best one that is left.
    Progress,
    /// Messages, queues and the machines' own sets are as small as the guest's memory lets them be.
    Bounded,
    /// How a side says that it ended is how it ended.
    TrueEnd,
    /// Nobody accuses the other of breaking a protocol that both keep.
    Peace,
    /// Nothing panics.
    NoPanic,
}

impl Rule {
    /// The rule in a few words.
    pub fn words(self) -> &'static str {
        match self {
            Self::OneRuns => "never two running",
            Self::LastVersion => "every page installed is the last version",
            Self::NoLateOverwrite => "no late overwrite",
            Self::NoLostBit => "no dirty bit lost",
            Self::AckAfterInstall => "no acknowledgement before what it acknowledges",
            Self::Progress => "progress when the network heals",
            Self::Bounded => "resources bounded",
            Self::TrueEnd => "each side ends as it says",
            Self::Peace => "nobody is accused who keeps to the protocol",
            Self::NoPanic => "no panic",
        }
    }

    /// Broken, as `what` says.
    pub(crate) fn broken(self, what: impl Into<String>) -> Broken {
        Broken { rule: self, what: what.into() }
    }
}

/// A rule that was broken, and how.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Broken {
    /// Which.
    pub rule: Rule,
    /// What was seen.
    pub what: String,
}

impl fmt::Display for Broken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.rule.words(), self.what)
    }
}

/// `Ok` where every rule was kept.
pub(crate) type Kept<T = ()> = Result<T, Broken>;
