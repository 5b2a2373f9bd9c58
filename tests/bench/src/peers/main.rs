//! Ferry and QEMU side by side: the same guest, machine and links, in turn, measured from outside.
//!
//! `run` measures and writes lines of JSON; `table` makes BENCHMARKS.md of them. Nothing that is compared
//! is measured in two different ways.

mod cases;
mod ferry;
mod goals;
mod measure;
mod needed;
mod qemu;
mod qmp;
mod record;
mod summary;
mod table;
mod trace;
mod watch;
mod wire;

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use clap::{Parser, Subcommand};
use ferry_e2e::Hosts;
use ferry_refvmm::RefHost;

use crate::cases::{CASES, Case, LINKS, Link, Setting, candidates, patience};
use crate::ferry::Ferry;
use crate::measure::measure;
use crate::qemu::{Kit, Qemu};
use crate::record::{Environment, Figures, Line, Move, Who};
use crate::summary::best;
use crate::wire::Wire;

/// Whatever went wrong, in words.
type Failure = Box<dyn std::error::Error + Send + Sync>;

/// Runs Ferry and QEMU side by side.
#[derive(Parser)]
struct Args {
    #[command(subcommand)]
    command: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Measure, and add to the results. What they have already is not measured again.
    Run(Measured),
    /// Write BENCHMARKS.md from the results.
    Table {
        /// What `run` wrote.
        results: PathBuf,
        /// The page to write.
        #[arg(long, default_value = "BENCHMARKS.md")]
        to: PathBuf,
        /// A sentence about these figures, at the top of the page.
        #[arg(long)]
        note: Option<String>,
    },
    /// List cases and links.
    List,
}

#[derive(clap::Args)]
struct Measured {
    /// Cases, separated by commas [default: all].
    #[arg(long, value_delimiter = ',', value_parser = known(CASES.iter().map(|c| c.name)))]
    cases: Vec<String>,
    /// Links, separated by commas [default: all].
    #[arg(long, value_delimiter = ',', value_parser = known(LINKS.iter().map(|l| l.name)))]
    links: Vec<String>,
    /// How often each is moved, in turn [default: 5, or 3 with --quick].
    #[arg(long)]
    repeats: Option<u32>,
    /// Some cases, links and settings only.
    #[arg(long)]
    quick: bool,
    /// Where QEMU is, or is installed: a Debian tree.
    #[arg(long, value_name = "DIR")]
    tree: PathBuf,
    /// Where results go.
    #[arg(long, value_name = "FILE")]
    results: PathBuf,
}

fn known(names: impl Iterator<Item = &'static str>) -> clap::builder::PossibleValuesParser {
    names.collect::<Vec<_>>().into()
}

fn main() -> ExitCode {
    let done = match Args::parse().command {
        Task::Run(args) => run(&args),
        Task::Table { results, to, note } => table(&results, &to, note.as_deref()),
        Task::List => {
            CASES.iter().for_each(|c| println!("{:<16} {}", c.name, c.what));
            LINKS.iter().for_each(|l| println!("{:<16} {}", l.name, l.what));
            Ok(())
        }
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("{e}");
            ExitCode::FAILURE
        }
    }
}

fn table(results: &Path, to: &Path, note: Option<&str>) -> Result<(), Failure> {
    let page = table::page(&record::read(results)?, note)?;
    std::fs::write(to, page).map_err(|e| format!("{}: {e}", to.display()))?;
    println!("wrote {}", to.display());
    Ok(())
}

/// What is missing for a run here, all of it at once.
fn missing(tree: &Path) -> Vec<String> {
    let mut missing = Vec::new();
    if !rustix::process::geteuid().is_root() {
        missing.push("root: network namespaces, and looking into other processes".to_owned());
    }
    if let Err(e) = std::fs::File::options().read(true).write(true).open("/dev/kvm") {
        missing.push(format!("/dev/kvm: {e}"));
    }
    let mut tools = vec![
        ("ip", "iproute2"),
        ("tc", "iproute2"),
        ("unshare", "util-linux"),
        ("setpriv", "util-linux"),
    ];
    if !tree.exists() {
        tools.push(("debootstrap", "debootstrap"));
    }
    for (tool, package) in tools {
        if let Err(e) = Command::new(tool).arg("--version").output() {
            missing.push(format!("{tool}: {e} (Debian's package {package})"));
        }
    }
    missing
}

fn run(args: &Measured) -> Result<(), Failure> {
    let missing = missing(&args.tree);
    if !missing.is_empty() {
        return Err(format!("this cannot run here; it needs\n  {}", missing.join("\n  ")).into());
    }
    let mut hosts = Hosts::new();
    let tsc_khz = RefHost::tsc_khz()?;
    let kit = Kit::new(&args.tree, &hosts, tsc_khz)?;
    let environment = Line::Environment(environment(&kit, args.quick)?);
    record::append(&args.results, &environment)?;
    let wanted = |names: &[String], name: &str, quick: bool| match names.is_empty() {
        true => quick || !args.quick,
        false => names.iter().any(|n| n == name),
    };
    for link in LINKS.iter().filter(|l| wanted(&args.links, l.name, l.quick)) {
        let wire = Wire::new(link)?;
        (hosts.source.before, hosts.destination.before) = (wire.at(0), wire.at(1));
        for case in CASES.iter().filter(|c| wanted(&args.cases, c.name, c.quick)) {
            let bench = Bench { args, hosts: &hosts, kit: &kit, tsc_khz, wire: &wire, case, link };
            bench.run()?;
        }
    }
    Ok(())
}

/// A case on a link.
struct Bench<'a> {
    args: &'a Measured,
    hosts: &'a Hosts,
    kit: &'a Kit,
    tsc_khz: u32,
    wire: &'a Wire,
    case: &'a Case,
    link: &'a Link,
}

impl Bench<'_> {
    fn run(&self) -> Result<(), Failure> {
        for setting in candidates(self.case.kind, self.args.quick) {
            self.once(Who::Qemu(setting), None, || self.qemu(&setting))?;
        }
        let moves = self.moves()?;
        let settings = [true, false].map(|tls| best(&moves, self.case.name, self.link.name, tls));
        for turn in 0..self.args.repeats.unwrap_or(if self.args.quick { 3 } else { 5 }) {
            let ferry = || self.once(Who::Ferry, Some(turn), || self.ferry());
            if turn % 2 == 0 {
                ferry()?;
            }
            for setting in settings.into_iter().flatten() {
                self.once(Who::Qemu(setting), Some(turn), || self.qemu(&setting))?;
            }
            if turn % 2 == 1 {
                ferry()?;
            }
        }
        Ok(())
    }

    fn moves(&self) -> Result<Vec<Move>, Failure> {
        Ok(summary::moves(&record::read(&self.args.results)?))
    }

    /// Measures what was not measured yet, and writes it down.
    fn once(
        &self,
        who: Who,
        turn: Option<u32>,
        measure: impl FnOnce() -> Result<Figures, Failure>,
    ) -> Result<(), Failure> {
        let (case, link) = (self.case.name.to_owned(), self.link.name.to_owned());
        let mut this = Move { case, link, who, turn, outcome: Err(String::new()) };
        if self.moves()?.iter().any(|m| m.is_like(&this) && m.turn == turn) {
            return Ok(());
        }
        this.outcome = measure().map_err(|e| e.to_string());
        let name = match who {
            Who::Ferry => "Ferry".to_owned(),
            Who::Qemu(s) => format!("QEMU {}{}", s.words(), if s.tls { ", TLS" } else { "" }),
        };
        let what = format!("{} over {}: {name}", self.case.name, self.link.name);
        match &this.outcome {
            Ok(f) => println!(
                "{what}: {:.0} ms, downtime {:.1} ms, {:.1} MB, speed {:.0} %, CPU {:.2} s",
                f.total_ms,
                f.downtime_ms,
                f.bytes as f64 / 1e6,
                100.0 * f.speed,
                f.cpu_s
            ),
            Err(why) => println!("{what}: {why}"),
        }
        record::append(&self.args.results, &Line::Move(Box::new(this)))
    }

    fn ferry(&self) -> Result<Figures, Failure> {
        let here = Ferry::boot(self.hosts, self.case)?;
        let (there, to) = Ferry::prepare(self.hosts, self.wire);
        measure(self.case, self.wire, here.processes(&there), self.tsc_khz, |watch| {
            Ferry::migrate(self.hosts, to, self.case, watch, patience(self.case))
        })
    }

    fn qemu(&self, setting: &Setting) -> Result<Figures, Failure> {
        let mut here = Qemu::boot(self.kit, self.wire, self.case)?;
        let mut there = here.prepare(self.kit, self.wire, self.case, setting)?;
        let processes = here.processes(&there);
        measure(self.case, self.wire, processes, self.tsc_khz, |watch| {
            here.migrate(&mut there, self.wire, watch, setting, patience(self.case))
        })
    }
}

fn environment(kit: &Kit, quick: bool) -> Result<Environment, Failure> {
    let text = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
    let said = |program: &str, args: &[&str]| {
        let out = Command::new(program).args(args).output();
        out.map(|out| String::from_utf8_lossy(&out.stdout).trim().to_owned()).unwrap_or_default()
    };
    let cpu = text("/proc/cpuinfo");
    let cpu = cpu.lines().find_map(|l| l.strip_prefix("model name")?.split_once(": "));
    Ok(Environment {
        date: said("date", &["-u", "+%Y-%m-%d %H:%M UTC"]),
        commit: said("git", &["describe", "--always", "--dirty", "--abbrev=12"]),
        cpu: cpu.map_or_else(String::new, |(_, name)| name.to_owned()),
        cores: std::thread::available_parallelism().map_or(1, std::num::NonZero::get),
        kernel: said("uname", &["-sr"]),
        qemu: kit.version()?,
        load: text("/proc/loadavg").split(' ').take(3).collect::<Vec<_>>().join(" "),
        quick,
    })
}
