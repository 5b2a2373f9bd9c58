//! Faults of our own, planted to see that the checks find them.

use clap::ValueEnum;

/// A fault in what surrounds the state machines, or in what they are told.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Plant {
    /// None.
    #[default]
    Nothing,
    /// The source keeps a right to run when it gives one away, and uses it when it hears nothing.
    DoublePermit,
    /// The source's guest goes on once the commit is sent.
    ResumeAfterCommit,
    /// The source's guest goes on when the migration is detached.
    ResumeAfterDetach,
    /// A spool gives its machine back the right to run.
    SpoolRuns,
    /// The spool is written from memory as it was when the guest was stopped, before its devices were.
    SpoolBeforeSave,
    /// A spool that is not whole counts.
    SpoolHalfWritten,
    /// The spool of a commit that came to nothing stays, and no other one is begun.
    SpoolOfOldCommit,
    /// The spool is removed when the link is lost.
    SpoolRemovedEarly,
    /// The first page of each harvest is lost.
    DropHarvestedBit,
    /// What the devices wrote while state was saved is not harvested.
    SkipHarvestAfterSave,
    /// A page is copied, and re-armed after it.
    CopyBeforeRearm,
    /// Lanes of a link that was given up go on re-arming pages.
    StragglerRearms,
    /// After a lost link, what was sent once is not sent again.
    DroppedDebt,
    /// What is given back when a migration ends is not taken.
    DropReturned,
    /// vCPUs that were held back stay so.
    HeldBack,
    /// The destination says that a batch is installed when it comes.
    AckBeforeInstall,
    /// A batch that comes twice counts twice.
    CountDuplicates,
    /// The source counts a batch of the last rounds that it has not sent yet, and commits without it.
    CommitWithoutLastBatch,
    /// Events of a link count after the source came back by another.
    OldLinksCount,
    /// The destination takes a commit that an old link brings after the source came back.
    TakeLateCommit,
    /// The destination gives its word that the machine never ran while it still may.
    VerdictTooEarly,
    /// The destination forgets how a session ended.
    VerdictForgotten,
    /// To a source that comes back, the destination says that it has every page that ever came.
    ClaimOldPages,
    /// The destination installs without asking the ledger.
    NoLedger,
    /// The destination gives a page back that the source did not name as stale.
    ClearMore,
    /// Copies of owed pages that came before the hand-over stay where the guest sees them.
    KeepStaleCopies,
    /// After the hand-over, the destination takes what comes late of the rounds before.
    TakeLateRounds,
    /// Pages that come after the hand-over are installed without asking `Demand`.
    NoDemand,
    /// After a lost link, the source serves what it had not sent.
    ServeOnlyUnsent,
    /// The source forgets pages as soon as they are sent after the hand-over.
    ForgetWhenSent,
    /// The destination's old copy is not the one that it told the digests of.
    StaleBase,
    /// The source compares pages with the old copy as they were before they were re-armed.
    CompareBeforeRearm,
    /// The destination does not say that it lacks pages of its old copy.
    SilentlyLacking,
}
