//! Runs seeds of the simulator, or replays one with all that happens in it.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::io::{IsTerminal, Write};
use std::process::ExitCode;
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use clap::Parser;
use ferry_sim::{End, Failure, Listener, Plant, Runs, Tally, World};

/// Events that are shown of a seed that fails.
const LAST_EVENTS: usize = 40;

/// The migration protocol in virtual time: every seed is one machine's move, and what goes wrong in it.
#[derive(Parser)]
struct Args {
    /// How many seeds.
    #[arg(long, default_value_t = 100_000)]
    seeds: u64,
    /// The first of them.
    #[arg(long, default_value_t = 0)]
    from: u64,
    /// Replay this one alone, and print each of its events.
    #[arg(long, conflicts_with_all = ["seeds", "from"])]
    seed: Option<u64>,
    /// A fault of our own that must be found.
    #[arg(long, value_enum, default_value_t)]
    plant: Plant,
}

fn main() -> ExitCode {
    let args = Args::parse();
    match args.seed {
        Some(seed) => replay(seed, args.plant),
        None => run(&args),
    }
}

fn replay(seed: u64, plant: Plant) -> ExitCode {
    // A closed pipe ends the listing, not the run.
    let print: Listener = Box::new(|line| drop(writeln!(std::io::stdout(), "{line}")));
    match World::new(seed, plant).heard_by(print).run() {
        Ok(end) => {
            println!("seed {seed}: {end:?}");
            ExitCode::SUCCESS
        }
        Err(broken) => {
            println!("seed {seed} breaks a rule: {broken}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: &Args) -> ExitCode {
    let runs = Runs::new(args.from, args.seeds, args.plant);
    let (began, over) = (Instant::now(), AtomicBool::new(false));
    let result = std::thread::scope(|scope| {
        if std::io::stderr().is_terminal() {
            scope.spawn(|| show_progress(&runs, args.seeds, began, &over));
        }
        let result = runs.run();
        over.store(true, Ordering::Relaxed);
        result
    });
    match result {
        Ok(tally) => {
            show(&tally, args.from, began.elapsed());
            ExitCode::SUCCESS
        }
        Err(failure) => {
            show_failure(&failure, args.plant);
            ExitCode::FAILURE
        }
    }
}

fn show_progress(runs: &Runs, seeds: u64, began: Instant, over: &AtomicBool) {
    while !over.load(Ordering::Relaxed) {
        let (done, s) = (runs.begun(), began.elapsed().as_secs_f64());
        eprint!("\r{done} of {seeds} seeds, {:.0} seeds/s ", done as f64 / s.max(1e-3));
        std::thread::sleep(Duration::from_millis(200));
    }
    eprint!("\r\x1b[K");
}

fn show(tally: &Tally, from: u64, took: Duration) {
    let seeds: u64 = tally.values().sum();
    for (end, count) in tally {
        println!("{:<24} {count:>10}  {:>5.2} %", format!("{end:?}"), percent(*count, seeds));
    }
    for end in End::ALL.iter().filter(|end| !tally.contains_key(end)) {
        println!("{:<24} {:>10}", format!("{end:?}"), "never");
    }
    let s = took.as_secs_f64();
    println!(
        "{seeds} seeds from {from} on kept every rule, in {s:.1} s ({:.0} seeds/s)",
        seeds as f64 / s.max(1e-3)
    );
}

fn percent(part: u64, all: u64) -> f64 {
    part as f64 * 100.0 / (all.max(1)) as f64
}

fn show_failure(Failure { seed, broken }: &Failure, plant: Plant) {
    let last = Rc::new(RefCell::new(VecDeque::new()));
    let heard = last.clone();
    let keep: Listener = Box::new(move |line| {
        let mut heard = heard.borrow_mut();
        heard.push_back(line.to_owned());
        if heard.len() > LAST_EVENTS {
            heard.pop_front();
        }
    });
    let world = World::new(*seed, plant).heard_by(keep);
    // It may panic, and has then told what led there.
    let _ = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| world.run()));
    for line in last.borrow().iter() {
        println!("{line}");
    }
    let planted = match plant {
        Plant::Nothing => String::new(),
        plant => {
            use clap::ValueEnum;
            let name = plant.to_possible_value();
            name.map(|name| format!(" PLANT={}", name.get_name())).unwrap_or_default()
        }
    };
    println!("\nseed {seed} breaks a rule: {broken}");
    println!("all of it: make sim SEED={seed}{planted}");
}
