//! `ferry balloon`: how much memory a guest shall have, and how it uses it.

use std::io::IsTerminal;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use ferry_balloon::{Statistics, Status};
use indicatif::{HumanBytes, ProgressBar, ProgressStyle};
use serde::Serialize;

use crate::Failure;
use crate::args::Balloon;
use crate::protocol::{BalloonInfo, BalloonRequest, Reply, Request};
use crate::runtime_dir::RuntimeDir;
use crate::vm::{exchange, unexpected};

const LOOK_EVERY: Duration = Duration::from_millis(200);
/// A guest whose balloon did not change for this long has nothing to give (Linux tries again every 0.2 s).
const STANDS_STILL_AFTER: Duration = Duration::from_secs(10);

#[derive(Serialize)]
struct Shown<'a> {
    name: &'a str,
    /// Whether the guest has what it shall have.
    reached: bool,
    #[serde(flatten)]
    info: &'a BalloonInfo,
}

pub(crate) fn main(runtime: &RuntimeDir, args: &Balloon) -> Result<ExitCode, Failure> {
    let name = &args.name;
    let request = BalloonRequest { target_bytes: args.target, ask_guest: args.target.is_none() };
    let mut info = ask(runtime, name, request)?;
    let waits = args.target.is_some() && !args.no_wait;
    if waits {
        info = follow(runtime, args, info)?;
    }
    let reached = info.balloon.actual_bytes == info.balloon.target_bytes;
    if args.json {
        println!("{}", serde_json::to_string_pretty(&Shown { name, reached, info: &info })?);
    } else if args.target.is_none() {
        print!("{}", words(&info));
    } else if reached || args.no_wait {
        println!("machine `{name}`: {}", line(&info.balloon));
    } else {
        return Err(Failure::words(format!(
            "machine `{name}`: {}, and the guest stands still: it needs what it keeps, or its driver is busy; \
             `ferry balloon {name}` shows how it uses its memory",
            line(&info.balloon)
        )));
    }
    Ok(if reached || !waits { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn ask(runtime: &RuntimeDir, name: &str, request: BalloonRequest) -> Result<BalloonInfo, Failure> {
    match exchange(runtime, name, &Request::Balloon(request))? {
        Reply::Balloon(info) => Ok(*info),
        other => Err(unexpected(&other)),
    }
}

/// Waits until the guest is there, or stands still.
fn follow(
    runtime: &RuntimeDir,
    args: &Balloon,
    mut info: BalloonInfo,
) -> Result<BalloonInfo, Failure> {
    let bar = bar(args, &info.balloon);
    let (mut last, mut since) = (info.balloon.actual_bytes, Instant::now());
    while info.balloon.actual_bytes != info.balloon.target_bytes
        && since.elapsed() < STANDS_STILL_AFTER
    {
        std::thread::sleep(LOOK_EVERY);
        info = ask(runtime, &args.name, BalloonRequest::default())?;
        if info.balloon.actual_bytes != last {
            (last, since) = (info.balloon.actual_bytes, Instant::now());
        }
        if let Some(bar) = &bar {
            bar.set_position(info.balloon.memory_bytes.saturating_sub(last));
            bar.set_message(format!("{} resident", HumanBytes(info.resident_bytes)));
        }
    }
    if let Some(bar) = bar {
        bar.finish_and_clear();
    }
    Ok(info)
}

/// How far the balloon is, on a terminal.
fn bar(args: &Balloon, balloon: &Status) -> Option<ProgressBar> {
    if args.json || !std::io::stderr().is_terminal() {
        return None;
    }
    let bar = ProgressBar::new(balloon.memory_bytes.saturating_sub(balloon.target_bytes));
    // The template is a constant that is known to be right; without it the bar is plain.
    if let Ok(style) = ProgressStyle::with_template(
        "{spinner} {elapsed:>4} {bytes} of {total_bytes} in the balloon, {msg}",
    ) {
        bar.set_style(style);
    }
    bar.enable_steady_tick(Duration::from_millis(100));
    Some(bar)
}

/// How it stands, in a line.
pub(crate) fn line(b: &Status) -> String {
    let (has, shall) = (HumanBytes(b.actual_bytes), HumanBytes(b.target_bytes));
    match b.driver {
        false => "no driver in the guest".into(),
        true if b.actual_bytes == b.target_bytes => {
            format!("the guest has {has} of {}, as it shall", HumanBytes(b.memory_bytes))
        }
        true => {
            format!("the guest has {has} of {}, and shall have {shall}", HumanBytes(b.memory_bytes))
        }
    }
}

/// All of it for a person.
fn words(info: &BalloonInfo) -> String {
    let b = &info.balloon;
    let mut out = format!(
        "balloon    {}\ngiven back {} in the balloon, {} by reports of free pages\nresident   {}\n",
        line(b),
        HumanBytes(b.ballooned_bytes),
        HumanBytes(b.reported_bytes),
        HumanBytes(info.resident_bytes),
    );
    if let Some(statistics) = &b.statistics {
        out.push_str(&format!("guest      {}\n", guest(statistics)));
    }
    if let Some(last) = &b.last_trouble {
        out.push_str(&format!(
            "trouble    {} requests of the guest made no sense, the last: {last}\n",
            b.troubles
        ));
    }
    out
}

/// What the guest says of its memory, those figures that it gives.
fn guest(s: &Statistics) -> String {
    let bytes = [
        (s.total_bytes, "in all"),
        (s.free_bytes, "free"),
        (s.available_bytes, "available"),
        (s.cached_bytes, "of files"),
        (s.swapped_in_bytes, "swapped in"),
        (s.swapped_out_bytes, "swapped out"),
    ];
    let counts = [(s.major_faults, "major faults"), (s.minor_faults, "minor faults")];
    let bytes =
        bytes.into_iter().filter_map(|(n, what)| Some(format!("{} {what}", HumanBytes(n?))));
    let counts = counts.into_iter().filter_map(|(n, what)| Some(format!("{} {what}", n?)));
    bytes.chain(counts).collect::<Vec<_>>().join(", ")
}
