//! `ferry save`: asks the hosting process, shows progress, says what was saved.

use ferry_migrate::SaveReport;
use indicatif::{HumanBytes, HumanCount};

use crate::Failure;
use crate::args::Save;
use crate::protocol::{Conversation, Reply, Request, SaveRequest};
use crate::runtime_dir::RuntimeDir;

pub(crate) fn main(runtime: &RuntimeDir, args: &Save) -> Result<(), Failure> {
    let report = save(runtime, args)?;
    if args.json {
        println!("{}", serde_json::to_string_pretty(&report)?);
    } else {
        print!("{}", words(&report, args));
    }
    Ok(())
}

fn save(runtime: &RuntimeDir, args: &Save) -> Result<SaveReport, Failure> {
    let request = Request::Save(SaveRequest {
        dir: std::path::absolute(&args.dir)?,
        base: args.base.as_ref().map(std::path::absolute).transpose()?,
        stop: args.stop,
        max_stop_ms: u64::try_from(args.max_stop.as_millis()).unwrap_or(u64::MAX),
    });
    let mut host = Conversation::new(runtime.connect(&args.name)?);
    host.say(&request)?;
    loop {
        match host.hear()? {
            Some(Reply::Progress(progress)) => {
                if let (Some(words), false) = (progress.words, args.json) {
                    eprintln!("{words}");
                }
            }
            Some(Reply::Saved(report)) => return Ok(*report),
            Some(Reply::Error(why)) => return Err(Failure::words(why)),
            Some(other) => return Err(crate::vm::unexpected(&other)),
            None => {
                return Err(Failure::words(format!(
                    "the process that hosts `{}` ended during the save: what was at {} before is whole",
                    args.name,
                    args.dir.display()
                )));
            }
        }
    }
}

/// The report for a person.
fn words(r: &SaveReport, args: &Save) -> String {
    let (name, dir) = (&args.name, args.dir.display());
    let seconds = r.total_ms / 1e3;
    let head = if r.runs_on {
        let stop = r.stop_ms;
        format!(
            "machine `{name}` saved to {dir} in {seconds:.2} s; it stood still for {stop:.1} ms"
        )
    } else {
        format!("machine `{name}` saved to {dir} in {seconds:.2} s, and ended")
    };
    let base = r.base.map_or_else(String::new, |base| format!("\n  base    {base}"));
    format!(
        "{head}\n  bundle  {}{base}\n  pages   {} of data, {} read in {} rounds, {} of them in the stop\n  record  {} pages in use: a lazy restore brings them first\n  size    {} of memory, {} of state\n",
        r.id,
        HumanCount(r.data_pages),
        HumanCount(r.pages_read),
        r.rounds,
        HumanCount(r.pages_in_stop),
        HumanCount(r.record_pages),
        HumanBytes(r.memory_bytes),
        HumanBytes(r.state_bytes),
    )
}
