//! `ferry migrate`: asks the hosting process, shows progress, prints the report.

use std::io::IsTerminal;
use std::process::ExitCode;
use std::time::Duration;

use ferry_migrate::{OutcomeKind, Report, SendHandle, SendOptions, Spool, Whereabouts};
use indicatif::{HumanBytes, HumanCount, ProgressBar, ProgressStyle};

use crate::Failure;
use crate::args::{Migrate, PreflightArgs, ServeSpool, Way};
use crate::machine::PAGE_BYTES;
use crate::protocol::{Conversation, MigrateRequest, Progress, Reply, Request};
use crate::runtime_dir::RuntimeDir;

pub(crate) fn main(runtime: &RuntimeDir, args: &Migrate) -> Result<ExitCode, Failure> {
    let report = match migrate(runtime, args) {
        Ok(report) => report,
        Err(e) if args.json => Report::not_begun(e.to_string(), Whereabouts::Unknown),
        Err(e) => return Err(e),
    };
    if args.json {
        println!("{}", serde_json::to_string_pretty(&report)?);
    } else {
        print!("{}", words(&report, &args.name, &args.way.there.to.to_string()));
    }
    Ok(exit_code(&report))
}

/// 0 only when the machine runs at the destination.
pub(crate) fn exit_code(report: &Report) -> ExitCode {
    match report.outcome {
        OutcomeKind::Completed if report.memory_differs => ExitCode::from(3),
        OutcomeKind::Completed => ExitCode::SUCCESS,
        _ => ExitCode::FAILURE,
    }
}

/// Moves the machine, showing progress unless `args.json`.
pub(crate) fn migrate(runtime: &RuntimeDir, args: &Migrate) -> Result<Report, Failure> {
    let request = MigrateRequest {
        resume: args.resume,
        rejoin_ms: u64::try_from(args.rejoin.as_millis()).unwrap_or(u64::MAX),
        spool: args.spool.as_ref().map(std::path::absolute).transpose()?,
        ..request(&args.way)?
    };
    asks(runtime, &args.name, request, args.json)
}

/// Looks at what a move would come to, showing progress unless `json`.
pub(crate) fn look(runtime: &RuntimeDir, args: &PreflightArgs) -> Result<Report, Failure> {
    let request = MigrateRequest { look_only: true, ..request(&args.way)? };
    asks(runtime, &args.name, request, args.json)
}

fn request(way: &Way) -> Result<MigrateRequest, Failure> {
    let micros = |d: Duration| u64::try_from(d.as_micros()).unwrap_or(u64::MAX);
    Ok(MigrateRequest {
        to: way.there.to.clone(),
        identity: std::path::absolute(&way.there.identity)?,
        peer: way.there.peer.peer.as_ref().map(ToString::to_string),
        link: Some(way.there.peer.link.to_string()),
        max_downtime_us: micros(way.max_downtime),
        max_total_us: micros(way.max_total),
        max_slowdown: way.max_slowdown,
        bandwidth_bytes_per_s: way.bandwidth,
        mode: way.mode,
        look_only: false,
        resume: false,
        rejoin_ms: 0,
        spool: None,
    })
}

fn asks(
    runtime: &RuntimeDir,
    name: &str,
    request: MigrateRequest,
    json: bool,
) -> Result<Report, Failure> {
    let mut host = Conversation::new(runtime.connect(name)?);
    host.say(&Request::Migrate(request))?;
    let mut show = Show::new(json);
    loop {
        match host.hear()? {
            Some(Reply::Progress(progress)) => show.progress(&progress),
            Some(Reply::Report(report)) => {
                show.end();
                return Ok(*report);
            }
            // The hosting process has the machine, and did not begin.
            Some(Reply::Error(why)) if json => {
                return Ok(Report::not_begun(why, Whereabouts::RunsAtSource));
            }
            Some(Reply::Error(why)) => return Err(Failure::words(why)),
            Some(other) => return Err(crate::vm::unexpected(&other)),
            None => {
                return Err(Failure::words(format!(
                    "the process that hosts `{name}` ended during the migration: look at both hosts before \
                     starting the machine anywhere"
                )));
            }
        }
    }
}

/// Serves the pages of a spool, showing progress unless `args.json`.
pub(crate) fn serve_spool(args: &ServeSpool) -> Result<ExitCode, Failure> {
    let there = &args.there;
    let identity = crate::load_identity(&there.identity)?;
    let connector = there.to.connector(&identity, there.peer.link, there.peer.peer.as_ref())?;
    let spool = Spool::open(&args.dir)?;
    let name = spool.machine().to_owned();
    let mut show = Show::new(args.json);
    if !args.json {
        eprintln!("ferry: the spool has {} pages of `{name}`", HumanCount(spool.pages()));
    }
    let mut progress = Progress::default();
    let mut watch = |event| {
        crate::hosted::follow(&mut progress, event);
        show.progress(&progress);
        progress.words = None;
    };
    let options = SendOptions {
        rejoin_for: args.rejoin,
        bandwidth_bytes_per_s: args.bandwidth,
        ..SendOptions::default()
    };
    let handle = SendHandle::default();
    let report = ferry_migrate::serve_spool(spool, connector, &options, &handle, &mut watch);
    show.end();
    if args.json {
        println!("{}", serde_json::to_string_pretty(&report)?);
    } else {
        print!("{}", words(&report, &name, &there.to.to_string()));
    }
    Ok(exit_code(&report))
}

/// A bar on a terminal, plain lines elsewhere, nothing with `--json`.
struct Show {
    bar: Option<ProgressBar>,
    lines: bool,
}

impl Show {
    fn new(json: bool) -> Self {
        let terminal = std::io::stderr().is_terminal();
        let bar = (terminal && !json).then(|| {
            let bar = ProgressBar::new_spinner();
            // The template is a constant that is known to be right; without it the bar is plain.
            if let Ok(style) = ProgressStyle::with_template("{spinner} {elapsed:>4} {msg}") {
                bar.set_style(style);
            }
            bar.enable_steady_tick(Duration::from_millis(100));
            bar
        });
        Self { bar, lines: !terminal && !json }
    }

    fn progress(&mut self, p: &Progress) {
        if let Some(bar) = &self.bar {
            let downtime =
                p.expected_downtime_ms.map_or_else(|| "?".into(), |ms| format!("{ms:.1} ms"));
            bar.set_message(format!(
                "round {} · {} sent · {}/s · guest dirties {} pages/s · expected downtime {downtime}",
                p.round,
                HumanBytes(p.sent_bytes),
                HumanBytes(whole(p.rate_bytes_per_s)),
                HumanCount(whole(p.dirty_pages_per_s)),
            ));
        }
        if let (true, Some(words)) = (self.lines, &p.words) {
            eprintln!("{words}");
        }
    }

    fn end(&mut self) {
        if let Some(bar) = self.bar.take() {
            bar.finish_and_clear();
        }
    }
}

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "a rate for display; the cast saturates"
)]
pub(crate) fn whole(number: f64) -> u64 {
    number as u64
}

/// The report for a person.
pub(crate) fn words(r: &Report, name: &str, to: &str) -> String {
    use std::fmt::Write;
    let mut out = String::new();
    let head = match (r.outcome, r.machine) {
        (OutcomeKind::Completed, _) => format!(
            "machine `{name}` moved to {to} in {:.2} s; it stood still for {:.1} ms",
            r.total_ms / 1e3,
            r.downtime_ms
        ),
        (_, Whereabouts::PausedAtSource) => {
            format!("machine `{name}` DID NOT ARRIVE and stays paused here, its state safe")
        }
        (_, Whereabouts::Unknown) if r.rounds == 0 => {
            format!("machine `{name}` is not at {to}")
        }
        (_, Whereabouts::LacksPages) => {
            format!("machine `{name}` runs at {to}, BUT SOME OF ITS PAGES ARE STILL ONLY HERE")
        }
        (OutcomeKind::Cancelled, _) => {
            format!("machine `{name}` goes on here: the move was cancelled")
        }
        (OutcomeKind::Refused, _) => format!("machine `{name}` goes on here: {to} refused it"),
        _ => format!("machine `{name}` goes on here: the move failed"),
    };
    // Writing to a string cannot fail.
    let _ = writeln!(out, "{head}");
    let _ = writeln!(out, "  why       {}", r.reason);
    if let Some(told) = r.foreseen.as_ref().and_then(|f| f.ways.first()) {
        let _ = writeln!(
            out,
            "  foretold  {:.2} s, and {:.1} ms of downtime, by {}",
            told.total_ms / 1e3,
            told.downtime_ms,
            told.mode
        );
    }
    for missed in &r.missed {
        let _ = writeln!(out, "  missed    {missed}");
    }
    if r.rounds == 0 && r.paging.is_none() {
        return out;
    }
    if r.outcome == OutcomeKind::Completed {
        let p = &r.downtime_parts_ms;
        let _ = writeln!(
            out,
            "  downtime  pause {:.1} + last harvest {:.1} + state {:.1} + last pages {:.1} + flight {:.1} + resume {:.1} ms",
            p.pause, p.last_harvest, p.state, p.last_pages, p.flight, p.resume
        );
    }
    if let Some(p) = &r.paging {
        let _ = writeln!(
            out,
            "  fetching  {} pages waited for: {:.2} ms mean, {:.2} median, {:.2} p90, {:.2} p99, {:.2} longest",
            HumanCount(p.requested),
            p.wait_ms.mean,
            p.wait_ms.p50,
            p.wait_ms.p90,
            p.wait_ms.p99,
            p.wait_ms.max
        );
        let _ = writeln!(
            out,
            "            {} pages were there before they were touched ({} of the working set went first); all were after {:.2} s ({} came twice)",
            HumanCount(p.pushed),
            HumanCount(r.record_pages),
            p.took_ms / 1e3,
            HumanCount(p.late)
        );
        let waited: Vec<String> =
            p.waited_by_thread_ms.iter().map(|ms| format!("{:.2}", ms / 1e3)).collect();
        let _ = writeln!(
            out,
            "            vCPUs waited for {} s; at 90 % of full speed after {:.2} s",
            if waited.is_empty() { "0".into() } else { waited.join(", ") },
            p.full_speed_ms / 1e3
        );
    }
    let _ = writeln!(
        out,
        "  sent      {} in {} rounds at {:.2} Gbit/s; state {}",
        HumanBytes(r.bytes_sent),
        r.rounds,
        r.link_bytes_per_s * 8.0 / 1e9,
        HumanBytes(r.state_bytes)
    );
    let _ = writeln!(
        out,
        "  guest     dirtied {} pages/s meanwhile",
        HumanCount(whole(r.dirty_pages_per_s))
    );
    let lost = match r.links_lost {
        0 => String::new(),
        times => format!("; lost {times} times on the way"),
    };
    let _ = writeln!(out, "  link      {}{lost}", r.link);
    let n = |count| HumanCount(count).to_string();
    if r.pages.same > 0 {
        let _ = writeln!(
            out,
            "  recalled  {} pages ({}) were in a bundle at the destination, and not sent",
            n(r.pages.same),
            HumanBytes(r.pages.same * PAGE_BYTES)
        );
    }
    let _ = writeln!(
        out,
        "  pages     raw {}, lz4 {}, zstd {}, zero {}",
        n(r.pages.raw),
        n(r.pages.lz4),
        n(r.pages.zstd),
        n(r.pages.zero)
    );
    if r.pages.packed > 0 {
        let (pages, bytes) = (n(r.pages.packed), HumanBytes(r.pages.packed * PAGE_BYTES));
        let _ = writeln!(out, "            {pages} pages ({bytes}) as the swap here kept them");
    }
    if r.pages.free > 0 {
        let (pages, bytes) = (n(r.pages.free), HumanBytes(r.pages.free * PAGE_BYTES));
        let _ = writeln!(
            out,
            "            {pages} pages ({bytes}) that the guest called free were left out"
        );
    }
    if r.outcome == OutcomeKind::Completed {
        let verified = match (r.digest_verified, r.memory_differs) {
            (true, _) => {
                format!("the same on both sides (digest compared in {:.0} ms)", r.verify_ms)
            }
            (false, true) => "NOT THE SAME ON BOTH SIDES".into(),
            (false, false) => "not compared".into(),
        };
        let _ = writeln!(out, "  memory    {verified}");
    }
    out
}
