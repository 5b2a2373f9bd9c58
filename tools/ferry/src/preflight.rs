//! `ferry preflight`: what a move would come to, without it.

use std::fmt::Write;
use std::process::ExitCode;

use ferry_migrate::{Foreseen, Foretold, OutcomeKind, Report};
use indicatif::{HumanBytes, HumanCount};

use crate::Failure;
use crate::args::PreflightArgs;
use crate::migrate::{self, whole};
use crate::runtime_dir::RuntimeDir;

pub(crate) fn main(runtime: &RuntimeDir, args: &PreflightArgs) -> Result<ExitCode, Failure> {
    let report = migrate::look(runtime, args)?;
    let (name, to) = (&args.name, args.way.there.to.to_string());
    if args.json {
        println!("{}", serde_json::to_string_pretty(&report)?);
    } else {
        print!("{}", words(&report, name, &to));
    }
    let good =
        foreseen(&report).is_some_and(|f| f.ways.first().is_some_and(|w| w.misses.is_none()));
    Ok(if good { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// What was foreseen, unless the operator ended it.
fn foreseen(report: &Report) -> Option<&Foreseen> {
    report.foreseen.as_ref().filter(|_| report.outcome == OutcomeKind::Cancelled)
}

fn words(report: &Report, name: &str, to: &str) -> String {
    let Some(foreseen) = foreseen(report) else {
        return format!("machine `{name}` would not move to {to}: {}\n", report.reason);
    };
    let mut out = String::new();
    let Some(way) = foreseen.ways.first() else { return out };
    let verdict = match &way.misses {
        None => "would move".to_owned(),
        Some(_) if way.downtime_ms > 0.0 => "would move and miss its goals".to_owned(),
        Some(_) => "would not move".to_owned(),
    };
    // Writing to a string cannot fail.
    let _ =
        writeln!(out, "machine `{name}` {verdict} to {to} by --mode {} ({})", way.asked, way.mode);
    let _ = writeln!(
        out,
        "  link      {:.2} Gbit/s over {}, acknowledged in {:.2} ms",
        foreseen.link_bytes_per_s * 8.0 / 1e9,
        report.link,
        foreseen.round_trip_ms
    );
    let _ = writeln!(
        out,
        "  guest     {} pages hold data, {:.0} bytes each on the link; it writes {} different ones in a second",
        HumanCount(foreseen.pages),
        foreseen.bytes_per_page,
        HumanCount(whole(foreseen.dirty_pages_per_s))
    );
    if let Some(why) = &foreseen.no_post_copy {
        let _ = writeln!(out, "  note      no page can come after the hand-over: {why}");
    }
    let _ = writeln!(
        out,
        "  mode          until it runs there  stands still  all pages there      on the link  vCPUs held back"
    );
    for way in &foreseen.ways {
        let _ = writeln!(out, "  {:<12}  {}", way.asked, row(way));
        if let Some(misses) = &way.misses {
            let _ = writeln!(out, "                {misses}");
        }
    }
    out
}

fn row(way: &Foretold) -> String {
    if way.downtime_ms == 0.0 {
        return "would not arrive".into();
    }
    format!(
        "{:>17.2} s  {:>9.1} ms  {:>13.2} s  {:>15}  {:>13} %",
        way.total_ms / 1e3,
        way.downtime_ms,
        (way.total_ms + way.fetching_ms) / 1e3,
        HumanBytes(way.bytes).to_string(),
        way.slowed_percent
    )
}
