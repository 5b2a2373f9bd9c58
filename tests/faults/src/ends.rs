//! How a move ends, and that it is so: which side runs the machine, that its memory is right, and when
//! each side knew.

use std::time::{Duration, Instant};

use ferry_e2e::{Done, Host, Running, wait_for};

use crate::stage::Stage;

/// How a move ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ends {
    /// It moves, and memory is compared.
    Moves,
    /// It moves; the link was lost at one side or both, perhaps before memory was compared.
    MovesUnheard,
    /// It runs at the source, and can be moved again.
    Stays,
    /// It runs at the destination; its source is dead.
    RunsThere,
    /// It is gone, with the process that ran it.
    Gone,
    /// The source has heard that it ran there; it is gone with the destination.
    GoneThere,
    /// It stays paused at the source; the destination never ran it.
    Doubt,
    /// The one or the other: whether the source misses its peer before it sends the permit.
    StaysOrDoubt,
    /// It stays paused at the source, and runs at the destination.
    DoubtButRuns,
    /// It stays paused at the source; the destination may run it when it is back.
    DoubtOpen,
    /// It runs at the destination, and lacks pages that are gone with the source.
    Lacks,
    /// What it was at the hand-over is at the source; what it did since is gone.
    Detached,
    /// It runs at the destination and waits for pages; the source has them.
    Waits,
}

/// When a fault ends, and how.
pub type Mend<'a> = (Instant, &'a (dyn Fn(&Stage) + Sync));

/// When each side knew, counted from the fault.
#[derive(Clone, Copy, Debug, Default)]
pub struct Knew {
    /// Who asked the source for the move.
    pub source: Option<Duration>,
    /// Who watches the destination.
    pub destination: Option<Duration>,
}

impl Ends {
    /// For the table.
    pub fn words(self) -> &'static str {
        match self {
            Self::Moves => "moves; memory is compared",
            Self::MovesUnheard => {
                "moves; a side that lost the link before memory was compared says so"
            }
            Self::Stays => "runs at the source, and can be moved again",
            Self::RunsThere => "runs at the destination, which says whether memory was compared",
            Self::Gone => "is gone with the process that ran it",
            Self::GoneThere => {
                "is gone with the destination, where the source has heard that it ran"
            }
            Self::Doubt => {
                "paused in doubt at the source; never ran at the destination; goes on by `vm resume --destination-is-dead`"
            }
            Self::StaysOrDoubt => {
                "runs at the source, or is paused in doubt there if the permit was sent before the peer was missed; never ran at the destination"
            }
            Self::DoubtButRuns => {
                "runs at the destination; paused in doubt at the source, where the operator ends it by `vm stop`"
            }
            Self::DoubtOpen => {
                "paused in doubt at the source; a destination that comes back runs it, or never will"
            }
            Self::Lacks => {
                "runs at the destination until it touches a page that is lost with the source; without a spool it can only be stopped"
            }
            Self::Detached => {
                "what it did since the hand-over is gone; the source has it as it was, for `vm resume --destination-is-dead`"
            }
            Self::Waits => {
                "runs at the destination, waits where it touches a missing page; all come with `migrate --resume`"
            }
        }
    }

    /// What the destination says when it knows, in one of these ways; none: it is dead, or says nothing.
    fn destination_says(self) -> &'static [&'static str] {
        match self {
            Self::Moves => &["its memory is the same"],
            Self::MovesUnheard | Self::RunsThere => {
                &["before memory was compared", "its memory is the same"]
            }
            Self::DoubtButRuns => &["before memory was compared"],
            Self::Stays | Self::Gone | Self::Doubt | Self::StaysOrDoubt => &["`m` did not come"],
            Self::DoubtOpen => &["before memory was compared", "`m` did not come"],
            Self::Lacks | Self::Waits => &["`m` runs here and lacks"],
            Self::GoneThere | Self::Detached => &[],
        }
    }

    /// Waits until both sides know, and sees that it is as it should be; `mend` ends the fault, if it ends.
    pub fn come_true(self, stage: &mut Stage, began: Instant, mend: Option<Mend<'_>>) -> Knew {
        let moving = stage.moving.take();
        let (mut knew, mut done) = (Knew::default(), None);
        std::thread::scope(|scope| {
            let stage = &*stage;
            let hears = scope.spawn(move || {
                let (receiver, ways) = (stage.receiver.as_ref()?, self.destination_says());
                ways.first()?;
                wait_for(&format!("the destination says one of {ways:?}"), || {
                    ways.iter().any(|words| receiver.has_said(words)).then_some(())
                });
                Some(began.elapsed())
            });
            let mends = scope.spawn(move || {
                let Some((at, mend)) = mend else { return };
                std::thread::sleep(at.saturating_duration_since(Instant::now()));
                mend(stage);
            });
            if let Some(moving) = moving {
                done = Some(moving.end());
                knew.source = Some(began.elapsed());
            }
            knew.destination = hears.join().unwrap_or_else(|e| std::panic::resume_unwind(e));
            mends.join().unwrap_or_else(|e| std::panic::resume_unwind(e));
        });
        self.check(stage, done.as_ref());
        knew
    }

    fn check(self, stage: &mut Stage, done: Option<&Done>) {
        let says = |status, words: &str| {
            let Some(done) = done else { return };
            let said = if status == Some(1) && stage.runner.is_none() {
                &done.stderr
            } else {
                &done.stdout
            };
            assert!(done.status == status && said.contains(words), "`{words}` is not in {done:?}");
        };
        let (source, destination) = (&stage.hosts.source, &stage.hosts.destination);
        match self {
            Self::Moves | Self::MovesUnheard => {
                says(
                    Some(0),
                    if self == Self::Moves { "the same on both sides" } else { "`m` moved to" },
                );
                gone(source);
                destination.works("m");
            }
            Self::Stays => {
                says(Some(1), "`m` goes on here: the move failed");
                source.works("m");
                stage.mend();
                gone(&stage.hosts.destination);
                moves(stage, &[]);
            }
            Self::RunsThere => {
                says(Some(1), "look at both hosts");
                gone(source);
                destination.works("m");
            }
            Self::Gone => {
                says(Some(1), "look at both hosts");
                gone(source);
                gone(destination);
            }
            Self::GoneThere => {
                says(Some(0), "`m` moved to");
                gone(source);
                gone(destination);
            }
            Self::Doubt => {
                says(Some(1), "DID NOT ARRIVE and stays paused here");
                gone(destination);
                in_doubt(stage);
                let resume = ["vm", "resume", "m", "--destination-is-dead"];
                stage.hosts.source.run(&resume).succeeded();
                stage.hosts.source.works("m");
                stage.mend();
                moves(stage, &[]);
            }
            Self::StaysOrDoubt => {
                let doubt = done.is_some_and(|done| done.stdout.contains("DID NOT ARRIVE"));
                if doubt { Self::Doubt } else { Self::Stays }.check(stage, done);
            }
            Self::DoubtButRuns => {
                says(Some(1), "DID NOT ARRIVE and stays paused here");
                destination.works("m");
                in_doubt(stage);
                stage.hosts.source.run(&["vm", "stop", "m"]).succeeded();
                stage.hosts.destination.works("m");
            }
            Self::DoubtOpen => {
                says(Some(1), "DID NOT ARRIVE and stays paused here");
                in_doubt(stage);
            }
            Self::Lacks => {
                says(Some(1), "look at both hosts");
                gone(source);
                let said =
                    stage.receiver.as_ref().expect("it lives").line("`m` runs here and lacks");
                assert!(said.contains("if its process has ended"), "{said}");
                assert!(destination.state("m").contains("fetching"));
                // Its vCPUs wait for ever; it can be shown and stopped all the same.
                destination.run(&["vm", "stop", "m"]).succeeded();
            }
            Self::Detached => {
                says(Some(1), "BUT SOME OF ITS PAGES ARE STILL ONLY HERE");
                says(Some(1), "--resume");
                assert_eq!(source.state("m"), "moved, its pages still here");
                source
                    .run(&["vm", "resume", "m"])
                    .failed(&["runs elsewhere", "--destination-is-dead"]);
                let again = source.migrate("m", stage.listens, &[]);
                assert_eq!(again.report["machine"], "lacks_pages", "{again:?}");
                source.run(&["vm", "resume", "m", "--destination-is-dead"]).succeeded();
                source.works("m");
            }
            Self::Waits => {
                says(Some(1), "BUT SOME OF ITS PAGES ARE STILL ONLY HERE");
                says(Some(1), "--resume");
                assert_eq!(source.state("m"), "moved, its pages still here");
                assert!(destination.state("m").contains("fetching"));
                stage.mend();
                moves(stage, &["--resume"]);
            }
        }
    }
}

fn gone(host: &Host) {
    // The name is given up a moment after the last word.
    wait_for("no machine is there", || host.machines().is_empty().then_some(()));
}

fn moves(stage: &Stage, more: &[&str]) {
    stage.hosts.source.migrate("m", stage.listens, more).completed();
    wait_for("all pages are there", || {
        (stage.hosts.destination.state("m") == "running").then_some(())
    });
    stage.hosts.destination.works("m");
}

/// The machine stands still at the source, and nobody but the operator can say that it may go on.
fn in_doubt(stage: &Stage) {
    let source = &stage.hosts.source;
    assert_eq!(source.state("m"), "paused in doubt");
    let checked = source.checked("m");
    for what in ["resume", "pause"] {
        source.run(&["vm", what, "m"]).failed(&["--destination-is-dead", "ferry vm stop m"]);
    }
    let again = source.migrate("m", stage.listens, &[]);
    assert_eq!(again.report["machine"], "paused_at_source", "{again:?}");
    assert_eq!(source.checked("m"), checked, "it stands still");
}

/// Kills a process, if it is still there.
pub fn kill(process: &mut Option<Running>) {
    if let Some(process) = process.take() {
        process.kill();
    }
}
