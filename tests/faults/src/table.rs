//! The table: fault, phase, what happens to the machine, how long until everyone knows. Each row is run
//! as it stands here, and `docs/FAULTS.md` says the same.

use std::fmt::Write;
use std::time::{Duration, Instant};

use ferry_protocol::{DOUBT_TIMEOUT, QUESTION_TIMEOUT};
use ferry_transport::{HANDSHAKE_TIMEOUT, IDLE_TIMEOUT, Over};
use rustix::process::Signal;

use crate::cable::Harm;
use crate::ends::{Ends, Knew, kill};
use crate::host;
use crate::relay::Way;
use crate::stage::{Guest, Phase, Stage};

/// What fails.
#[derive(Clone, Copy, Debug)]
pub enum Fault {
    /// The cable does this to each way, for so many seconds or for good.
    Cable {
        /// For the table.
        words: &'static str,
        /// What it does to what goes to the destination, and to what comes back.
        harm: [Harm; 2],
        /// None: for good.
        lasts_s: Option<u64>,
    },
    /// `kill -9` of the process that hosts the machine, or takes it in, or both.
    Kill(Who),
    /// `kill -9` of the command that asked for the move.
    KillClient,
    /// SIGSTOP, and SIGCONT so many seconds later.
    Freeze(Who, u64),
}

/// Which process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Who {
    /// `ferry vm run`.
    Source,
    /// `ferry receive`.
    Destination,
    /// Both at once.
    Both,
}

impl Who {
    fn words(self) -> &'static str {
        match self {
            Self::Source => "source",
            Self::Destination => "destination",
            Self::Both => "both sides",
        }
    }
}

impl Fault {
    fn is_for_good(&self) -> bool {
        !matches!(self, Self::Cable { lasts_s: Some(_), .. } | Self::Freeze(..))
    }

    fn words(&self) -> String {
        match *self {
            Self::Cable { words, lasts_s: None, .. } => words.into(),
            Self::Cable { words, lasts_s: Some(s), .. } => format!("{words}, for {s} s"),
            Self::Kill(who) => format!("`kill -9`: {}", who.words()),
            Self::KillClient => "`kill -9`: `ferry migrate`".into(),
            Self::Freeze(who, s) => format!("SIGSTOP for {s} s: {}", who.words()),
        }
    }
}

/// How long it may take until a side knows: a sum of Ferry's own time-outs.
#[derive(Clone, Copy, Debug)]
pub struct Within {
    words: &'static str,
    time: Duration,
}

const fn within(words: &'static str, parts: &[Duration]) -> Within {
    let (mut n, mut time) = (0, Duration::ZERO);
    while n < parts.len() {
        time = time.saturating_add(parts[n]);
        n += 1;
    }
    Within { words, time }
}

/// What `--rejoin` is where nobody comes back, and where somebody does.
const BRIEF_S: u64 = 2;
const LONG_S: u64 = 30;
const BRIEF: Duration = Duration::from_secs(BRIEF_S);

const AT_ONCE: Within = within("at once", &[]);
const NEVER: Within = within("dead", &[]);
const BY_THE_MOVE: Within = within("no time-out", &[Duration::from_secs(30)]);
const IDLE: Within = within("idle", &[IDLE_TIMEOUT]);
const KEPT: Within = within("idle + rejoin", &[IDLE_TIMEOUT, BRIEF]);
const GIVEN_UP: Within =
    within("idle + rejoin + handshake", &[IDLE_TIMEOUT, BRIEF, HANDSHAKE_TIMEOUT]);
/// Where the source hears its destination until that gives up.
const HEARD: Within = within("2 × idle", &[IDLE_TIMEOUT, IDLE_TIMEOUT]);
const HEARD_GIVEN_UP: Within = within(
    "2 × idle + rejoin + handshake",
    &[IDLE_TIMEOUT, IDLE_TIMEOUT, BRIEF, HANDSHAKE_TIMEOUT],
);
const HEARD_DOUBT: Within = within(
    "2 × idle + doubt + question",
    &[IDLE_TIMEOUT, IDLE_TIMEOUT, DOUBT_TIMEOUT, QUESTION_TIMEOUT],
);
/// Where it hears its source until that gives up.
const LET_GO: Within = within(
    "source gives up + idle + rejoin",
    &[IDLE_TIMEOUT, BRIEF, HANDSHAKE_TIMEOUT, IDLE_TIMEOUT, BRIEF],
);
const DOUBT: Within =
    within("idle + doubt + question", &[IDLE_TIMEOUT, DOUBT_TIMEOUT, QUESTION_TIMEOUT]);
const STOOD: Within = within("standstill", &[Duration::from_secs(24)]);
/// A fault of 8 s, and the longest pause between two attempts to come back.
const RETURN: Within = within(
    "fault + handshake + pause 5 s",
    &[Duration::from_secs(8), HANDSHAKE_TIMEOUT, Duration::from_secs(5)],
);
const FROZEN: Within =
    within("fault + idle + rejoin", &[Duration::from_secs(16), IDLE_TIMEOUT, BRIEF]);
const LAST: Within =
    within("fault + idle + rejoin", &[Duration::from_secs(60), IDLE_TIMEOUT, BRIEF]);
/// A machine may be busy, and what is left of a move takes its time as well.
const SLACK: Duration = Duration::from_secs(30);

/// A fault in a move.
#[derive(Clone, Copy, Debug)]
pub struct Row {
    /// What fails.
    pub fault: Fault,
    /// When.
    pub phases: &'static [Phase],
    /// What becomes of the machine.
    pub ends: Ends,
    /// When whoever asked for the move knows, and whoever watches the destination.
    pub knows: [Within; 2],
    /// `--rejoin`.
    pub rejoin_s: u64,
    /// Run by default: with which guest, in which of the phases.
    pub chosen: &'static [(Guest, Phase)],
}

/// A fault of one host.
#[derive(Clone, Copy, Debug)]
pub struct Own {
    /// What fails.
    pub fault: &'static str,
    /// When.
    pub phase: &'static str,
    /// What becomes of the machine.
    pub ends: &'static str,
    /// How long until everyone knows.
    pub knows: &'static str,
    /// Makes it happen, and sees that it is so.
    pub run: fn(Guest) -> Option<Knew>,
    /// The guests that it is for; the first one is run by default.
    pub guests: &'static [Guest],
}

use Guest::{Kvm, Process};
use Phase::{
    Commit, Fetching, FirstRound, LastPages, LaterRound, Negotiation, PostCopy, PreCopy, Switch,
    Verification,
};

const HOLE: Harm = Harm { hole: true, ..Harm::NONE };
const WHOLE: &[Phase] = &[PreCopy, PostCopy];
const BEFORE_COMMIT: &[Phase] = &[Negotiation, FirstRound, LaterRound, LastPages];
const ROUNDS: &[Phase] = &[FirstRound, LaterRound, LastPages];
const ALL: &[Phase] =
    &[Negotiation, FirstRound, LaterRound, LastPages, Commit, Switch, Verification, Fetching];

const fn bad(words: &'static str, harm: Harm, chosen: &'static [(Guest, Phase)]) -> Row {
    let fault = Fault::Cable { words, harm: [harm; 2], lasts_s: None };
    let knows = [BY_THE_MOVE; 2];
    Row { fault, phases: WHOLE, ends: Ends::Moves, knows, rejoin_s: LONG_S, chosen }
}

const fn hole(way: Way, lasts_s: Option<u64>) -> Fault {
    let (words, harm) = match way {
        Way::ToDestination => ("black hole towards the destination", [HOLE, Harm::NONE]),
        Way::ToSource => ("black hole towards the source", [Harm::NONE, HOLE]),
    };
    Fault::Cable { words, harm, lasts_s }
}

const fn row(
    fault: Fault,
    phases: &'static [Phase],
    ends: Ends,
    knows: [Within; 2],
    rejoin_s: u64,
    chosen: &'static [(Guest, Phase)],
) -> Row {
    Row { fault, phases, ends, knows, rejoin_s, chosen }
}

use Ends::{
    Detached, Doubt, DoubtButRuns, DoubtOpen, Gone, GoneThere, Lacks, Moves, MovesUnheard,
    RunsThere, Stays, StaysOrDoubt, Waits,
};
use Way::{ToDestination, ToSource};
use Who::{Both, Destination, Source};

/// Faults in moves.
#[rustfmt::skip]
pub const MOVES: &[Row] = &[
    bad("50 ms of delay each way", Harm { delay_ms: 50, ..Harm::NONE }, &[(Kvm, PostCopy)]),
    bad("1 % of packets lost", Harm { drop_percent: 1, ..Harm::NONE }, &[(Process, PostCopy)]),
    bad("10 % of packets lost", Harm { drop_percent: 10, ..Harm::NONE }, &[(Process, PreCopy)]),
    bad("10 % of packets overtaken by those of 5 ms", Harm { reorder_percent: 10, ..Harm::NONE }, &[(Process, PostCopy)]),
    bad("1 % of packets corrupted", Harm { corrupt_percent: 1, ..Harm::NONE }, &[(Process, PreCopy), (Kvm, PostCopy)]),
    bad("10 % of packets twice", Harm { duplicate_percent: 10, ..Harm::NONE }, &[(Kvm, PreCopy)]),
    bad("10 Mbit/s", Harm { bits_per_s: 10_000_000, ..Harm::NONE }, &[(Process, PostCopy)]),
    row(Fault::Cable { words: "20 kbit/s towards the destination", harm: [Harm { bits_per_s: 20_000, ..Harm::NONE }, Harm::NONE], lasts_s: None },
        &[LastPages], Stays, [STOOD, KEPT], BRIEF_S, &[(Process, LastPages)]),

    row(hole(ToDestination, Some(2)), ALL, Moves, [BY_THE_MOVE; 2], LONG_S, &[(Process, Commit)]),
    row(hole(ToSource, Some(2)), ALL, Moves, [BY_THE_MOVE; 2], LONG_S, &[(Kvm, Switch)]),
    row(hole(ToDestination, Some(8)), &[FirstRound, LaterRound, LastPages, Commit, Fetching], Moves, [RETURN; 2], LONG_S, &[(Process, LaterRound), (Kvm, Commit)]),
    row(hole(ToSource, Some(8)), &[FirstRound, LaterRound, LastPages, Fetching], Moves, [RETURN; 2], LONG_S, &[(Process, LastPages), (Kvm, Fetching)]),
    row(hole(ToSource, Some(8)), &[Commit, Switch], MovesUnheard, [RETURN; 2], LONG_S, &[(Process, Commit)]),
    row(hole(ToDestination, None), &[Negotiation, FirstRound, LaterRound], Stays, [HEARD_GIVEN_UP, KEPT], BRIEF_S, &[(Process, FirstRound)]),
    row(hole(ToSource, None), BEFORE_COMMIT, Stays, [GIVEN_UP, LET_GO], BRIEF_S, &[(Kvm, LastPages)]),
    row(hole(ToDestination, None), &[LastPages], StaysOrDoubt, [HEARD_DOUBT, KEPT], BRIEF_S, &[]),
    row(hole(ToDestination, None), &[Commit], Doubt, [HEARD_DOUBT, KEPT], BRIEF_S, &[(Process, Commit)]),
    row(hole(ToSource, None), &[Commit, Switch], DoubtButRuns, [DOUBT, LET_GO], BRIEF_S, &[(Process, Switch)]),
    row(hole(ToDestination, None), &[Switch], MovesUnheard, [HEARD, IDLE], BRIEF_S, &[]),
    row(hole(ToDestination, None), &[Fetching], Waits, [HEARD_GIVEN_UP, IDLE], BRIEF_S, &[]),
    row(hole(ToSource, None), &[Fetching], Waits, [GIVEN_UP, LET_GO], BRIEF_S, &[(Process, Fetching)]),

    row(Fault::Kill(Source), BEFORE_COMMIT, Gone, [AT_ONCE, KEPT], BRIEF_S, &[(Process, FirstRound), (Kvm, LastPages)]),
    row(Fault::Kill(Source), &[Commit, Switch, Verification], RunsThere, [AT_ONCE, IDLE], BRIEF_S, &[(Process, Commit)]),
    row(Fault::Kill(Source), &[Fetching], Lacks, [AT_ONCE, IDLE], BRIEF_S, &[(Kvm, Fetching)]),
    row(Fault::Kill(Destination), BEFORE_COMMIT, Stays, [GIVEN_UP, NEVER], BRIEF_S, &[(Process, Negotiation), (Process, LaterRound)]),
    row(Fault::Kill(Destination), &[Commit], Doubt, [DOUBT, NEVER], BRIEF_S, &[(Kvm, Commit)]),
    row(Fault::Kill(Destination), &[Switch, Verification], GoneThere, [IDLE, NEVER], BRIEF_S, &[]),
    row(Fault::Kill(Destination), &[Fetching], Detached, [GIVEN_UP, NEVER], BRIEF_S, &[(Process, Fetching)]),
    row(Fault::Kill(Both), ALL, Gone, [AT_ONCE, NEVER], BRIEF_S, &[(Process, Commit)]),
    row(Fault::KillClient, &[FirstRound, Commit, Fetching], Moves, [NEVER, BY_THE_MOVE], LONG_S, &[(Process, FirstRound)]),

    row(Fault::Freeze(Source, 2), ALL, Moves, [BY_THE_MOVE; 2], LONG_S, &[(Kvm, LastPages)]),
    row(Fault::Freeze(Destination, 2), ALL, Moves, [BY_THE_MOVE; 2], LONG_S, &[(Process, Switch)]),
    row(Fault::Freeze(Source, 8), &[Negotiation], Stays, [RETURN; 2], BRIEF_S, &[]),
    row(Fault::Freeze(Source, 8), &[FirstRound, LaterRound, LastPages, Fetching], Moves, [RETURN; 2], LONG_S, &[(Process, LaterRound)]),
    row(Fault::Freeze(Source, 8), &[Commit, Switch, Verification], MovesUnheard, [RETURN; 2], LONG_S, &[(Kvm, Commit)]),
    row(Fault::Freeze(Destination, 8), &[Negotiation], Stays, [RETURN; 2], BRIEF_S, &[]),
    row(Fault::Freeze(Destination, 8), &[FirstRound, LaterRound, LastPages, Fetching], Moves, [RETURN; 2], LONG_S, &[(Process, Fetching)]),
    row(Fault::Freeze(Destination, 8), &[Commit, Switch, Verification], MovesUnheard, [RETURN; 2], LONG_S, &[(Process, Commit)]),
    row(Fault::Freeze(Source, 16), ROUNDS, Stays, [FROZEN; 2], BRIEF_S, &[]),
    row(Fault::Freeze(Destination, 16), ROUNDS, Stays, [GIVEN_UP, FROZEN], BRIEF_S, &[(Process, FirstRound)]),
    row(Fault::Freeze(Destination, 16), &[Fetching], Waits, [GIVEN_UP, FROZEN], BRIEF_S, &[]),
    row(Fault::Freeze(Destination, 60), &[Commit], DoubtOpen, [DOUBT, LAST], BRIEF_S, &[]),
];

/// One row, one phase, one guest, one link.
#[derive(Clone, Copy, Debug)]
pub struct Trial {
    what: What,
    guest: Guest,
    /// What the move goes over: of each line, one guest's over TLS, the other's over QUIC.
    link: Over,
    /// Whether it is run by default.
    pub chosen: bool,
    /// The line of the table that it is, from 0.
    pub line: usize,
    /// Whether it is the first guest of its line.
    pub is_first: bool,
    seed: u64,
}

#[derive(Clone, Copy, Debug)]
enum What {
    Move(&'static Row, Phase),
    Own(&'static Own),
}

/// All that can be run, chosen or not.
pub fn trials() -> Vec<Trial> {
    let mut all = Vec::new();
    let mut line = 0;
    for row in MOVES {
        for phase in row.phases {
            for guest in [Process, Kvm] {
                let (chosen, seed) = (row.chosen.contains(&(guest, *phase)), all.len() as u64);
                let (what, is_first) = (What::Move(row, *phase), guest == Process);
                let link = if is_first == (line % 2 == 0) { Over::Tls } else { Over::Quic };
                all.push(Trial { what, guest, link, chosen, line, is_first, seed });
            }
            line += 1;
        }
    }
    for own in host::OWN {
        for guest in own.guests {
            let (what, seed) = (What::Own(own), all.len() as u64);
            let is_first = *guest == own.guests[0];
            let (guest, link, chosen) = (*guest, Over::Tls, is_first);
            all.push(Trial { what, guest, link, chosen, line, is_first, seed });
        }
        line += 1;
    }
    all
}

impl Trial {
    /// How long it may wait for time-outs: those that wait longest are best begun first.
    pub fn waits(&self) -> Duration {
        match self.what {
            What::Move(row, _) if row.ends == Moves && row.fault.is_for_good() => Duration::ZERO,
            What::Move(row, _) => row.knows[0].time.max(row.knows[1].time),
            What::Own(_) => Duration::from_secs(10),
        }
    }

    /// Its fault, phase, guest and link.
    pub fn name(&self) -> String {
        let guest = self.guest.kernel();
        match self.what {
            What::Move(row, phase) => {
                format!("{} | {} | {guest}, {}", row.fault.words(), phase.words(), self.link)
            }
            What::Own(own) => format!("{} | {} | {guest}", own.fault, own.phase),
        }
    }

    /// Makes it happen, and insists that it is as the table says; none if it cannot be done here.
    pub fn run(&self) -> Option<Knew> {
        if self.guest == Kvm && !ferry_e2e::kvm() {
            return None;
        }
        let (row, phase) = match self.what {
            What::Own(own) => return (own.run)(self.guest),
            What::Move(row, phase) => (row, phase),
        };
        let mut stage = Stage::new(self.guest, self.link, phase, self.seed)?;
        if let (Phase::PreCopy | Phase::PostCopy, Fault::Cable { harm: [there, back], .. }) =
            (phase, row.fault)
        {
            stage.relay.set(there, back);
        }
        stage.reach(phase, row.rejoin_s);
        let knew = strike(row, &mut stage);
        if let Fault::Cable { harm: [harm, _], lasts_s: None, .. } = row.fault {
            let did = stage.relay.harmed(Way::ToDestination);
            let did = [did.lost, did.overtaken, did.corrupted, did.doubled];
            let percent = [
                harm.drop_percent,
                harm.reorder_percent,
                harm.corrupt_percent,
                harm.duplicate_percent,
            ];
            let done = percent.iter().zip(did).all(|(percent, did)| *percent == 0 || did > 0);
            assert!(done, "the test's own trick: {percent:?} % harmed {did:?}");
        }
        for (knew, within) in [knew.source, knew.destination].into_iter().zip(row.knows) {
            let in_time = knew.is_none_or(|knew| knew < within.time + SLACK);
            assert!(in_time, "known after {knew:?}, promised: {within:?}");
        }
        Some(knew)
    }
}

/// Lets the fault happen, and what follows.
fn strike(row: &Row, stage: &mut Stage) -> Knew {
    let began = Instant::now();
    let signal = |stage: &Stage, who, signal| {
        let process = if who == Source { &stage.runner } else { &stage.receiver };
        process.as_ref().expect("it lives").signal(signal);
    };
    if matches!(row.fault, Fault::Freeze(..) | Fault::KillClient) {
        // What is late stays so. Of a process that is killed, the last word must not overtake what it said before.
        stage.relay.set(Harm::NONE, Harm::NONE);
    }
    let lasts_s = match row.fault {
        Fault::Cable { harm: [there, back], lasts_s, .. } => {
            stage.relay.set(there, back);
            lasts_s
        }
        Fault::Kill(who) => {
            if who != Destination {
                kill(&mut stage.runner);
            }
            if who != Source {
                kill(&mut stage.receiver);
            }
            None
        }
        Fault::KillClient => {
            kill(&mut stage.moving);
            None
        }
        Fault::Freeze(who, s) => {
            signal(stage, who, Signal::STOP);
            Some(s)
        }
    };
    let mend = |stage: &Stage| match row.fault {
        Fault::Cable { .. } => stage.relay.set(Harm::NONE, Harm::NONE),
        Fault::Freeze(who, _) => signal(stage, who, Signal::CONT),
        Fault::Kill(_) | Fault::KillClient => {}
    };
    let until = lasts_s.map(|s| began + Duration::from_secs(s));
    row.ends.come_true(stage, began, until.map(|at| (at, &mend as _)))
}

/// The table as `docs/FAULTS.md` has it; `measured` says what stands in the last column of a line.
pub fn markdown(measured: impl Fn(usize) -> String) -> String {
    let mut out = String::from(
        "| fault | phase | the machine | source knows | destination knows | measured |\n|---|---|---|---|---|---|\n",
    );
    let mut line = 0;
    let mut add = |fault: &str, phase: &str, ends: &str, knows: &str| {
        // Writing to a string cannot fail.
        let _ = writeln!(out, "| {fault} | {phase} | {ends} | {knows} | {} |", measured(line));
        line += 1;
    };
    for row in MOVES {
        let knows = row.knows.map(|within| match within.time.as_secs() {
            0 => within.words.into(),
            _ if within.words == BY_THE_MOVE.words => within.words.into(),
            s => format!("{}: {s} s", within.words),
        });
        for phase in row.phases {
            add(&row.fault.words(), phase.words(), row.ends.words(), &knows.join(" | "));
        }
    }
    for own in host::OWN {
        add(own.fault, own.phase, own.ends, &format!("{} |", own.knows));
    }
    out
}
