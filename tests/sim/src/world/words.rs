//! What happens, in words that a person can follow.

use ferry_pages::{Layout, PageSet, Run};
use ferry_protocol::{
    DestinationAction, DestinationEvent, Outcome, PackedPages, Progress, SourceAction, SourceEvent,
    ToDestination, ToSource,
};

use super::memory::{Mask, PAGES, set};
use super::plan::Fate;

/// `5 pages (3-6, 9)`.
fn pages(set: &PageSet) -> String {
    const SHOWN: usize = 6;
    let run = |r: Run| match r.pages {
        1 => r.start.to_string(),
        _ => format!("{}-{}", r.start, r.end() - 1),
    };
    let mut shown: Vec<String> = set.runs().take(SHOWN).map(run).collect();
    if set.runs().nth(SHOWN).is_some() {
        shown.push("…".into());
    }
    match set.len() {
        0 => "no pages".into(),
        1 => format!("page {}", shown.join("")),
        n => format!("{n} pages ({})", shown.join(", ")),
    }
}

pub(super) fn mask(mask: Mask) -> String {
    pages(&set(mask))
}

fn packed(packed: &PackedPages) -> String {
    let layout = Layout::new(vec![Run::new(0, PAGES)]).unwrap_or_default();
    packed.unpack(&layout).map_or_else(|why| why, |set| pages(&set))
}

pub(super) fn fate(fate: Fate) -> &'static str {
    match fate {
        Fate::Cut => "the network is cut",
        Fate::LaneBreaks { at_source: true } => "lanes break, and the source sees it",
        Fate::LaneBreaks { at_source: false } => "lanes break, and the destination sees it",
        Fate::Cancel => "the operator cancels",
        Fate::SourceDies => "the source's process dies",
        Fate::DestinationDies => "the destination's process dies",
        Fate::BothDie => "both processes die",
        Fate::PagingBreaks => "the destination cannot place pages any more",
        Fate::Abandoned => "the machine is stopped at the destination",
        Fate::Reattach => "the operator takes the migration up again",
        Fate::ServeSpool => "the operator serves the spool",
        Fate::Fence => "the operator says that the destination is dead",
    }
}

fn to_destination(message: &ToDestination) -> String {
    match message {
        ToDestination::Offer { keep, .. } => format!("Offer (keep what comes for {keep:?})"),
        ToDestination::Prepare => "Prepare".into(),
        ToDestination::RoundEnd { round, batches } => {
            format!("RoundEnd of round {round}, {batches} batches")
        }
        ToDestination::Commit { rounds, owed, .. } => {
            format!("Commit with the permit; rounds {rounds:?}, owed: {}", packed(owed))
        }
        ToDestination::Abort { reason } => format!("Abort: {reason}"),
        ToDestination::Verified { matches } => format!("Verified: {matches}"),
        ToDestination::Stale { pages } => format!("Stale: {}", packed(pages)),
    }
}

fn to_source(message: &ToSource) -> String {
    match message {
        ToSource::Accepted { no_post_copy, .. } => {
            let why = no_post_copy.as_ref().map_or_else(String::new, |w| format!(" ({w})"));
            format!("Accepted{why}")
        }
        ToSource::Recalls(old) => format!("Recalls an old copy: {}", packed(&old.pages)),
        ToSource::Refused { reasons } => format!("Refused: {reasons:?}"),
        ToSource::Ready => "Ready".into(),
        ToSource::RoundDone { round, lacking } if lacking.is_empty() => {
            format!("RoundDone of round {round}")
        }
        ToSource::RoundDone { round, lacking } => {
            format!("RoundDone of round {round}, lacking {}", packed(lacking))
        }
        ToSource::Failed { reason } => format!("Failed: {reason}"),
        ToSource::Running { .. } => "Running".into(),
        ToSource::CommitRefused { reason } => format!("CommitRefused: {reason}"),
        ToSource::Digest { sum, .. } => {
            format!("Digest{}", if sum.is_some() { "" } else { " that says nothing" })
        }
        ToSource::GoOn { held } => format!("GoOn, holding {}", packed(held)),
        ToSource::Lacks { owed } => format!("Lacks {}", packed(owed)),
        ToSource::Verdict(verdict) => format!("Verdict: {verdict:?}"),
    }
}

pub(super) fn source_event(event: &SourceEvent) -> String {
    match event {
        SourceEvent::Connected => "connected".into(),
        SourceEvent::Message(message) => format!("hears {}", to_source(message)),
        SourceEvent::LinkLost(why) => format!("the link is lost: {why}"),
        SourceEvent::LanesOpen => "lanes are open".into(),
        SourceEvent::TrackingStarted(set) => format!("tracking started; {} hold data", pages(set)),
        SourceEvent::Harvested(set) => format!("harvested {}", pages(set)),
        SourceEvent::RoundSent { round, batches, same, .. } => {
            format!("round {round} is sent: {batches} batches, {same} pages only named")
        }
        SourceEvent::Paused(_) => "the guest stands still".into(),
        SourceEvent::StateSaved(_) => "state is saved".into(),
        SourceEvent::MemoryDigest(_) => "memory is digested".into(),
        SourceEvent::Failed(why) => format!("failed: {why}"),
        SourceEvent::Cancel => "cancel".into(),
        SourceEvent::Tune(goals) => format!("the operator wants {goals:?}"),
        SourceEvent::CannotThrottle(why) => format!("cannot hold vCPUs back: {why}"),
        SourceEvent::Tick => "it is time".into(),
    }
}

pub(super) fn source_action(action: &SourceAction) -> String {
    match action {
        SourceAction::Send(message) => format!("says {}", to_destination(message)),
        SourceAction::OpenLanes { .. } => "opens lanes".into(),
        SourceAction::Recall { pages: old, .. } => format!("may name {}", pages(old)),
        SourceAction::Forget => "names no more pages".into(),
        SourceAction::StartTracking => "starts tracking".into(),
        SourceAction::Throttle(percent) => format!("holds vCPUs back for {percent} %"),
        SourceAction::Sample(set) => format!("samples {}", pages(set)),
        SourceAction::Harvest => "harvests".into(),
        SourceAction::SendPages { round, pages: set } => {
            format!("sends round {round}: {}", pages(set))
        }
        SourceAction::Pause => "pauses the guest".into(),
        SourceAction::SaveState => "saves state".into(),
        SourceAction::Resume(_) => "lets the guest go on".into(),
        SourceAction::ReturnDirty(set) => format!("gives {} back to the dirty log", pages(set)),
        SourceAction::StopTracking => "stops tracking".into(),
        SourceAction::Serve { round, owed, .. } => {
            format!("serves {} as round {round}", pages(owed))
        }
        SourceAction::Push => "pushes".into(),
        SourceAction::Rejoin { done, .. } => format!("comes back; rounds up to {done} are done"),
        SourceAction::DigestMemory => "digests memory".into(),
        SourceAction::Tell(progress) => format!("tells: {}", told(progress)),
        SourceAction::Finish(outcome) => format!("ends: {}", ended(outcome)),
    }
}

fn told(progress: &Progress) -> String {
    match progress {
        Progress::Accepted => "accepted".into(),
        Progress::Sampled => "it was looked at".into(),
        Progress::RoundStarted { round, pages } => format!("round {round} of {pages} pages"),
        Progress::RoundDone { decision, .. } => decision.why().to_owned(),
        Progress::Paused => "paused".into(),
        Progress::Committed => "committed".into(),
        Progress::Running => "it runs there".into(),
        Progress::InDoubt(why) => format!("in doubt: {why}"),
        Progress::Fetching { pages } => format!("{pages} pages are fetched"),
        Progress::LinkLost(why) => format!("the link is lost: {why}"),
    }
}

fn ended(outcome: &Outcome) -> String {
    match outcome {
        Outcome::Completed { digest_verified, reason } => {
            format!("completed, digests equal: {digest_verified:?}; {reason}")
        }
        Outcome::Cancelled => "cancelled".into(),
        Outcome::Refused(reasons) => format!("refused: {reasons:?}"),
        Outcome::Failed(why) => format!("failed: {why}"),
        Outcome::InDoubt { reason, .. } => format!("in doubt: {reason}"),
        Outcome::Detached { reason, .. } => format!("detached: {reason}"),
    }
}

pub(super) fn destination_event(event: &DestinationEvent) -> String {
    match event {
        DestinationEvent::Message(message) => format!("hears {}", to_destination(message)),
        DestinationEvent::LinkLost(why) => format!("the link is lost: {why}"),
        DestinationEvent::Built(Ok(_)) => "the machine is built".into(),
        DestinationEvent::Built(Err(why)) => format!("the machine is not built: {why:?}"),
        DestinationEvent::Paging(Ok(())) => "missing pages come on demand".into(),
        DestinationEvent::Paging(Err(why)) => format!("pages cannot come on demand: {why}"),
        DestinationEvent::AllHere(_) => "all pages are here".into(),
        DestinationEvent::PagingBroken(why) => format!("pages cannot be placed any more: {why}"),
        DestinationEvent::Abandoned => "the machine is thrown away".into(),
        DestinationEvent::Rejoined { held, owed } => {
            format!("the source is back; held: {}; owed: {}", pages(held), pages(owed))
        }
        DestinationEvent::Superseded => "another session wants its place".into(),
        DestinationEvent::Tick => "it is time".into(),
        DestinationEvent::Lacking(set) => format!("the old copy lacks {}", pages(set)),
        DestinationEvent::Installed { round } => format!("a batch of round {round} is installed"),
        DestinationEvent::BadPages(why) => format!("bad pages: {why}"),
        DestinationEvent::Loaded(Ok(())) => "state is loaded".into(),
        DestinationEvent::Loaded(Err(why)) => format!("state is not loaded: {why}"),
        DestinationEvent::Resumed(Ok(())) => "the guest runs".into(),
        DestinationEvent::Resumed(Err(why)) => format!("the guest cannot run: {why}"),
        DestinationEvent::Digest(_) => "what was installed is digested".into(),
    }
}

pub(super) fn destination_action(action: &DestinationAction) -> String {
    match action {
        DestinationAction::Send(message) => format!("says {}", to_source(message)),
        DestinationAction::Build { .. } => "builds the machine".into(),
        DestinationAction::AcceptLanes { lanes, .. } => format!("lets {lanes} lanes join"),
        DestinationAction::Clear(set) => format!("gives back {}", pages(set)),
        DestinationAction::Hold => "closes the link and keeps what came".into(),
        DestinationAction::Page { owed, after } => {
            format!("waits for {}, in rounds after {after}", pages(owed))
        }
        DestinationAction::Load(_) => "loads state".into(),
        DestinationAction::Resume(_) => "lets the guest run".into(),
        DestinationAction::Digest => "digests what was installed".into(),
        DestinationAction::Finish(arrival) => format!("ends: {arrival:?}"),
    }
}
