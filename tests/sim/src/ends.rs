//! How a run ended.

/// How a run ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum End {
    /// All pages first, and nothing in between.
    Moved,
    /// The link was lost after the commit, and the source asked.
    MovedAfterInquiry,
    /// Pages came while it ran there.
    MovedByPostCopy,
    /// The link was lost before the commit, and the source came back.
    MovedAfterCut,
    /// The link was lost while pages were owed, and the source came back.
    MovedAfterRejoin,
    /// A source that had given up was taken up again.
    ReattachedAndMoved,
    /// The source died, and its spool brought what was owed.
    MovedBySpool,
    /// And with what the first source kept of it as the old copy, back.
    MovedThereAndBack,
    /// Cancelled, refused or failed before the commit.
    StayedAndRuns,
    /// Asked after the commit, the destination said that it never ran the machine.
    ReclaimedAfterInquiry,
    /// Taken up again, the source learned that the destination never ran the machine.
    ReattachedAndReclaimed,
    /// Nobody can say whether it runs at the destination.
    PausedInDoubt,
    /// It runs at the destination, which cannot be reached, and pages of it are only here.
    Detached,
    /// The destination died, and on the operator's word it runs on at the source.
    Fenced,
    /// The source died: with the machine, or after it had gone, or with pages that nobody else has.
    SourceDied,
    /// Both died.
    BothDied,
    /// The source died, and from its spool it was learned that the destination never ran the machine.
    LostWithItsSource,
}

impl End {
    /// Every end there is: a network that is bad enough shows them all.
    pub const ALL: [Self; 17] = [
        Self::Moved,
        Self::MovedAfterInquiry,
        Self::MovedByPostCopy,
        Self::MovedAfterCut,
        Self::MovedAfterRejoin,
        Self::ReattachedAndMoved,
        Self::MovedBySpool,
        Self::MovedThereAndBack,
        Self::StayedAndRuns,
        Self::ReclaimedAfterInquiry,
        Self::ReattachedAndReclaimed,
        Self::PausedInDoubt,
        Self::Detached,
        Self::Fenced,
        Self::SourceDied,
        Self::BothDied,
        Self::LostWithItsSource,
    ];

    /// Whether the machine runs where it was to go, with all its pages.
    pub fn moved(self) -> bool {
        matches!(
            self,
            Self::Moved
                | Self::MovedAfterInquiry
                | Self::MovedByPostCopy
                | Self::MovedAfterCut
                | Self::MovedAfterRejoin
                | Self::ReattachedAndMoved
                | Self::MovedBySpool
                | Self::MovedThereAndBack
        )
    }
}
