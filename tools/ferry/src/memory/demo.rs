//! `ferry memory demo`: the textbook case. Three machines of 3 in 6, and what that costs them.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use ferry_overcommit::{Outlook, Plan, Size, hold};
use indicatif::HumanBytes;
use serde::Serialize;

use crate::args::MemoryDemo;
use crate::cgroup::{Hierarchy, Usage};
use crate::memory::stage::{Stage, mind_signals};
use crate::memory::table;
use crate::protocol::MachineInfo;
use crate::{Failure, machine};

const NAMES: [&str; 3] = ["a", "b", "c"];
/// Units of memory.
const MACHINE: u64 = 3;
const BUDGET: u64 = 6;
const ALL: u64 = MACHINE * NAMES.len() as u64;
/// How long machines may take to have what they use in memory, before their speed is measured; and how long it is.
const SETTLES: Duration = Duration::from_secs(15);
const MEASURED: Duration = Duration::from_secs(6);
const SAY_EVERY: Duration = Duration::from_secs(2);

/// What is shown of one machine.
#[derive(Debug, Serialize)]
struct Fate {
    name: String,
    size_bytes: u64,
    resident_bytes: u64,
    swapped_bytes: u64,
    pool_bytes: u64,
    file_bytes: u64,
    /// Pages that its guest found right; it stops at the first that is not.
    pages_checked: u64,
    /// Pages that had been moved out and came back because they were touched.
    pages_in: u64,
    /// Pages checked in a second: with memory enough, with a manager, and after it was killed.
    checked_per_s: [f64; 3],
}

/// What `--json` prints.
#[derive(Debug, Serialize)]
struct Report {
    /// `kvm` or `process`.
    guest: &'static str,
    unit_bytes: u64,
    /// The limit of the control group.
    budget_bytes: u64,
    /// What the guests see, in all.
    machines_bytes: u64,
    /// The most that the group ever used.
    peak_bytes: u64,
    /// What it used at the end.
    used_bytes: u64,
    /// How often its limit was run against.
    limit_hits: u64,
    oom_kills: u64,
    /// What each machine took beside its memory and its pool: with memory enough, and at the end.
    overhead_bytes: [u64; 2],
    machines: Vec<Fate>,
    /// How many times as long the machines took for the same work as with memory enough: with a manager, and after it
    /// was killed.
    slow_down: [f64; 2],
    /// The same of CPU time, what moves pages included: other processes of a busy host matter less.
    slow_down_cpu: [f64; 2],
    /// What other processes took of this host's CPUs: with memory enough, with a manager, after it was killed.
    others_percent: [f64; 3],
    /// GiB of machines for each GiB of memory that was used.
    carried_by_1_gib: f64,
    /// What is not as it should be.
    wrong: Vec<String>,
}

/// Where and what.
struct Scene {
    unit: u64,
    kvm: bool,
    dir: PathBuf,
    hierarchy: Hierarchy,
    json: bool,
}

/// How fast the machines are.
#[derive(Clone, Copy, Debug)]
struct Speed {
    /// Pages checked in a second, of each.
    pages_per_s: [f64; 3],
    /// CPU time for a page, of all.
    ticks_per_page: f64,
    /// What others took of this host's CPUs meanwhile, in percent.
    others_percent: f64,
}

impl Speed {
    /// How many times as long the same work took.
    fn slow_down(&self, enough: &Self) -> f64 {
        let all = |of: &Self| of.pages_per_s.iter().sum::<f64>();
        all(enough) / all(self).max(1e-9)
    }
}

pub(crate) fn main(args: &MemoryDemo) -> Result<ExitCode, Failure> {
    mind_signals()?;
    let kvm = match machine::kvm() {
        _ if args.process => false,
        Ok(()) => true,
        Err(why) => {
            eprintln!("ferry: {why}: with process guests instead of KVM machines");
            false
        }
    };
    let unit = unit(args.unit, kvm)?;
    let hierarchy = Hierarchy::mounted()?;
    let dir = on_disk()?;
    // What is in the page cache already is not counted as the machines'.
    std::io::copy(&mut std::fs::File::open(std::env::current_exe()?)?, &mut std::io::sink())?;
    let scene = Scene { unit, kvm, dir: dir.path().to_owned(), hierarchy, json: args.json };
    let size = |units| Size(units * unit);
    scene.say(&format!(
        "Three machines of {} ({}) in {}. Each guest fills all of its memory, then reads and rewrites {} of it as fast \
         as it can, which move on through all of it, and checks each page that it comes to. None gives memory back.\n",
        size(MACHINE),
        if kvm { "KVM" } else { "process guests: memory and threads, no KVM" },
        size(BUDGET),
        size(1),
    ));
    let (enough, overhead) = scene.with_enough()?;
    let report = scene.with_less(enough, overhead)?;
    if args.json {
        println!("{}", serde_json::to_string_pretty(&report)?);
    } else {
        print!("{}", words(&report));
    }
    for wrong in &report.wrong {
        eprintln!("ferry: {wrong}");
    }
    Ok(if report.wrong.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Whole MiB of a unit: as asked for, or what suits this host.
fn unit(asked: Option<u64>, kvm: bool) -> Result<u64, Failure> {
    const MIB: u64 = 1 << 20;
    // With less, what runs the machines takes so much of the budget that they cannot work.
    const LEAST: u64 = 32 * MIB;
    let text = std::fs::read_to_string("/proc/meminfo")?;
    let available = text
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"))
        .and_then(|rest| rest.split_whitespace().next()?.parse::<u64>().ok()?.checked_mul(1024));
    let available = available.ok_or_else(|| Failure::words("/proc/meminfo has no MemAvailable"))?;
    // Once they have all of it; and what runs them.
    let most = available / (ALL + 3) / MIB * MIB;
    let unit =
        asked.unwrap_or_else(|| most.min(if kvm { 64 * MIB } else { 128 * MIB })) / MIB * MIB;
    if unit < LEAST || unit > most {
        return Err(Failure::words(format!(
            "a unit of {} cannot be: it must be {} at least, and twelve of them are needed for a moment, but only {} \
             are available here",
            Size(unit),
            Size(LEAST),
            Size(available),
        )));
    }
    Ok(unit)
}

/// A directory for swap files: what is in memory is none.
fn on_disk() -> Result<tempfile::TempDir, Failure> {
    const IN_MEMORY: [u64; 2] = [0x0102_1994, 0x8584_58f6];
    let temp = std::env::temp_dir();
    for dir in [temp.as_path(), Path::new("/var/tmp")] {
        let kind = rustix::fs::statfs(dir).map(|s| u64::try_from(s.f_type).unwrap_or(0));
        if kind.is_ok_and(|kind| !IN_MEMORY.contains(&kind)) {
            return Ok(tempfile::tempdir_in(dir)?);
        }
    }
    Err(Failure::words(format!(
        "{} and /var/tmp are in memory: set TMPDIR to a directory on a disk, where swap files can be",
        temp.display()
    )))
}

impl Scene {
    fn say(&self, words: &str) {
        if !self.json {
            println!("{words}");
        }
    }

    /// Starts all machines; `more` are words for `ferry vm run`.
    fn start(&self, stage: &mut Stage, more: &[String]) -> Result<(), Failure> {
        for (seed, name) in (1..).zip(NAMES) {
            let cmdline = format!(
                "pattern=moving-set set={} dwell=1000 random=25 fill=all seed={seed}",
                self.unit
            );
            let memory = (MACHINE * self.unit).to_string();
            let kernel = if self.kvm { ":guest" } else { ":process" };
            let console = self.dir.join(format!("{name}.console")).display().to_string();
            let args = ["--kernel", kernel, "--memory", &memory, "--cmdline", &cmdline];
            let args = args.into_iter().chain(["--serial", &console]);
            stage.run(name, &args.map(str::to_owned).chain(more.to_vec()).collect::<Vec<_>>())?;
        }
        Ok(())
    }

    /// Watches for `long`, and says how things stand now and then.
    fn measure(&self, stage: &mut Stage, long: Duration) -> Result<Speed, Failure> {
        let (first, ticks, host) = (stage.look()?, stage.cpu_ticks()?, host_ticks()?);
        let (began, mut said) = (Instant::now(), Instant::now());
        let last = stage.watch("time passes", |all, usage| {
            if said.elapsed() >= SAY_EVERY {
                said = Instant::now();
                self.say(&line(all, usage, began));
            }
            began.elapsed() >= long
        })?;
        let (seconds, ticks) = (began.elapsed().as_secs_f64(), stage.cpu_ticks()? - ticks);
        let host = {
            let now = host_ticks()?;
            (now.0 - host.0, now.1.saturating_sub(host.1))
        };
        let mut pages = [0; 3];
        for ((pages, first), last) in pages.iter_mut().zip(&first).zip(&last) {
            let of = |m: &MachineInfo| m.pages_checked.unwrap_or(0);
            *pages = of(last).saturating_sub(of(first));
        }
        Ok(Speed {
            pages_per_s: pages.map(|pages| pages as f64 / seconds),
            ticks_per_page: ticks as f64 / pages.iter().sum::<u64>().max(1) as f64,
            others_percent: 100.0 * host.1.saturating_sub(ticks) as f64 / host.0.max(1) as f64,
        })
    }

    fn filled(&self, stage: &mut Stage) -> Result<Vec<MachineInfo>, Failure> {
        let (began, mut said) = (Instant::now(), Instant::now());
        stage.watch("guests fill their memory", |all, usage| {
            if said.elapsed() >= SAY_EVERY {
                said = Instant::now();
                self.say(&line(all, usage, began));
            }
            // A page is checked when it is visited again.
            all.iter().all(|m| m.pages_checked.is_some_and(|pages| pages > 0))
        })
    }

    /// Watches until machines have in memory what they use: hardly a page comes back within a second, or for long enough.
    fn settled(&self, stage: &mut Stage) -> Result<(), Failure> {
        let (began, mut said, mut looked) = (Instant::now(), Instant::now(), Instant::now());
        let (mut before, hardly) = (0, self.unit / 4096 / 16);
        stage.watch("machines settle", |all, usage| {
            if said.elapsed() >= SAY_EVERY {
                said = Instant::now();
                self.say(&line(all, usage, began));
            }
            if looked.elapsed() < Duration::from_secs(1) {
                return false;
            }
            looked = Instant::now();
            let back = |m: &MachineInfo| m.swap.as_ref().map_or(0, |swap| swap.pages_in);
            let now: u64 = all.iter().map(back).sum();
            let few = now - std::mem::replace(&mut before, now) <= hardly * all.len() as u64;
            few || began.elapsed() >= SETTLES
        })?;
        Ok(())
    }

    /// How fast the machines are if they have all of their memory, and what each takes beside it, in bytes.
    fn with_enough(&self) -> Result<(Speed, u64), Failure> {
        self.say(&format!("First with memory enough ({}):", Size(ALL * self.unit)));
        let limit = (ALL + 3) * self.unit + (1 << 30);
        let mut stage = Stage::new(&self.dir.join("enough"), &self.hierarchy, limit)?;
        self.start(&mut stage, &[])?;
        self.filled(&mut stage)?;
        self.settled(&mut stage)?;
        let speed = self.measure(&mut stage, MEASURED)?;
        let overhead = overhead(&stage.look()?, stage.usage()?);
        stage.stop()?;
        Ok((speed, overhead))
    }

    fn plan(&self, overhead: u64) -> Result<(PathBuf, Plan), Failure> {
        let swap = self.dir.join("swap");
        std::fs::create_dir_all(&swap)?;
        // Where pages are away, what finds and compresses them.
        let overhead = overhead + (4 << 20) + MACHINE * self.unit / 48;
        let mut text = format!(
            "[host]\nbudget = \"{}\"\noverhead = \"{overhead}\"\n\n[swap]\ndir = {:?}\nsize = \"{}\"\n",
            BUDGET * self.unit,
            swap,
            ALL * self.unit,
        );
        for name in NAMES {
            let size = MACHINE * self.unit;
            text +=
                &format!("\n[[machine]]\nname = \"{name}\"\nsize = \"{size}\"\nballoon = false\n");
        }
        let file = self.dir.join("plan.toml");
        std::fs::write(&file, &text)?;
        let plan = Plan::parse(&text)?;
        hold(&plan.host, &plan.machines)?;
        Ok((file, plan))
    }

    fn with_less(&self, enough: Speed, overhead_bytes: u64) -> Result<Report, Failure> {
        let budget = BUDGET * self.unit;
        let (file, plan) = self.plan(overhead_bytes)?;
        let outlook = Outlook::of(&plan);
        self.say(&format!(
            "\nNow in a control group that may have {}, what runs them included (about {} each):",
            Size(budget),
            HumanBytes(plan.host.overhead_bytes),
        ));
        let mut stage = Stage::new(&self.dir.join("less"), &self.hierarchy, budget)?;
        let swap = plan.swap.as_ref().map_or(0, |swap| swap.pool_bytes) / NAMES.len() as u64;
        let swap_dir = self.dir.join("swap").display().to_string();
        let more = [
            ("--memory-limit", outlook.machines[0].all_busy_bytes.to_string()),
            ("--swap-pool", swap.to_string()),
            ("--swap-dir", swap_dir),
            ("--swap-size", (MACHINE * self.unit).to_string()),
        ];
        let more: Vec<String> =
            more.into_iter().flat_map(|(key, value)| [key.to_owned(), value]).collect();
        let run = ["memory", "run"].map(OsStr::new);
        let mut manager = stage.start(&[&run[..], &[file.as_os_str()]].concat(), "manager.log")?;
        self.start(&mut stage, &more)?;
        self.filled(&mut stage)?;
        self.settled(&mut stage)?;
        let managed = self.measure(&mut stage, MEASURED)?;
        manager.must_run("`ferry memory run`")?;
        drop(manager);
        self.say("The manager is killed (SIGKILL); the machines go on:");
        let unmanaged = self.measure(&mut stage, MEASURED)?;
        let (all, usage) = (stage.look()?, stage.usage()?);
        let mut wrong = Vec::new();
        if let Err(e) = stage.stop() {
            wrong.push(e.to_string());
        }
        let Usage { bytes, peak_bytes, limit_hits, oom_kills } = usage;
        let peak_bytes = peak_bytes.unwrap_or(bytes);
        if oom_kills > 0 || limit_hits > 0 || peak_bytes > budget {
            wrong.push(format!(
                "the budget was not kept: its limit was run against {limit_hits} times, {oom_kills} processes were killed"
            ));
        }
        let all_speeds = [enough, managed, unmanaged];
        let speeds = all_speeds.map(|speed| speed.pages_per_s);
        for (name, i) in NAMES.iter().zip(0..) {
            if speeds.iter().any(|of| of[i] <= 0.0) {
                wrong.push(format!("machine `{name}` stood still: {speeds:?} pages/s"));
            }
        }
        let fate = |(i, m): (usize, &MachineInfo)| {
            let swap = m.swap.clone().unwrap_or_default();
            Fate {
                name: m.name.clone(),
                size_bytes: m.memory_bytes,
                resident_bytes: m.resident_bytes,
                swapped_bytes: swap.swapped_bytes,
                pool_bytes: swap.pool_bytes,
                file_bytes: swap.file_bytes,
                pages_checked: m.pages_checked.unwrap_or(0),
                pages_in: swap.pages_in,
                checked_per_s: speeds.map(|of| of[i]),
            }
        };
        Ok(Report {
            guest: if self.kvm { "kvm" } else { "process" },
            unit_bytes: self.unit,
            budget_bytes: budget,
            machines_bytes: ALL * self.unit,
            peak_bytes,
            used_bytes: bytes,
            limit_hits,
            oom_kills,
            overhead_bytes: [overhead_bytes, overhead(&all, usage)],
            machines: all.iter().enumerate().map(fate).collect(),
            slow_down: [managed, unmanaged].map(|speed| speed.slow_down(&enough)),
            slow_down_cpu: [managed, unmanaged]
                .map(|speed| speed.ticks_per_page / enough.ticks_per_page.max(1e-9)),
            others_percent: all_speeds.map(|speed| speed.others_percent),
            carried_by_1_gib: (ALL * self.unit) as f64 / bytes.max(1) as f64,
            wrong,
        })
    }
}

/// Ticks of all CPUs of this host, and those in which they did something.
fn host_ticks() -> Result<(u64, u64), Failure> {
    let stat = std::fs::read_to_string("/proc/stat")?;
    let line = stat.lines().next().unwrap_or_default();
    // user, nice, system, idle, iowait, irq, softirq, steal; guests are counted in user already.
    let ticks: Vec<u64> = line.split_whitespace().skip(1).take(8).flat_map(str::parse).collect();
    let all: u64 = ticks.iter().sum();
    Ok((all, all - ticks.iter().skip(3).take(2).sum::<u64>()))
}

/// What each machine takes beside its memory and its pool, in bytes.
fn overhead(all: &[MachineInfo], usage: Usage) -> u64 {
    let held = |m: &MachineInfo| m.resident_bytes + m.swap.as_ref().map_or(0, |s| s.pool_bytes);
    usage.bytes.saturating_sub(all.iter().map(held).sum()) / all.len().max(1) as u64
}

/// How things stand, in a line.
fn line(all: &[MachineInfo], usage: Usage, began: Instant) -> String {
    let mut out =
        format!("  {:>3} s  {:>5} MiB used", began.elapsed().as_secs(), usage.bytes >> 20);
    for m in all {
        let swap = m.swap.clone().unwrap_or_default();
        out += &format!(
            "   {}: {:>4} here {:>4} away",
            m.name,
            m.resident_bytes >> 20,
            swap.swapped_bytes >> 20
        );
    }
    out
}

fn words(r: &Report) -> String {
    let head = [
        "machine",
        "size",
        "in memory",
        "in pool",
        "taking",
        "in file",
        "came back",
        "checked",
        "wrong",
        "of its speed",
    ];
    let mut rows = vec![head.map(str::to_owned)];
    rows.extend(r.machines.iter().map(|m| {
        let bytes = |bytes: u64| HumanBytes(bytes).to_string();
        let percent = |i: usize| 100.0 * m.checked_per_s[i] / m.checked_per_s[0].max(1e-9);
        [
            m.name.clone(),
            bytes(m.size_bytes),
            bytes(m.resident_bytes),
            bytes(m.swapped_bytes),
            bytes(m.pool_bytes),
            bytes(m.file_bytes),
            m.pages_in.to_string(),
            m.pages_checked.to_string(),
            "0".to_owned(),
            format!("{:.0} %, {:.0} % without the manager", percent(1), percent(2)),
        ]
    }));
    format!(
        "\n{}\npeak       {} of {} ({:.1} %); the limit was run against {} times, {} processes were killed for it\n\
         overhead   {} a machine, {} once pages are away\n\
         slow-down  {:.2} times the time for the same work ({:.2} times the CPU time); {:.2} ({:.2}) without the manager\n\
         others     took {:.0} % of this host's CPUs with memory enough, {:.0} % with less, {:.0} % without the manager\n\n\
         1 GiB of this host's memory carries {:.2} GiB of machines.\n",
        table(&rows),
        HumanBytes(r.peak_bytes),
        HumanBytes(r.budget_bytes),
        100.0 * r.peak_bytes as f64 / r.budget_bytes as f64,
        r.limit_hits,
        r.oom_kills,
        HumanBytes(r.overhead_bytes[0]),
        HumanBytes(r.overhead_bytes[1]),
        r.slow_down[0],
        r.slow_down_cpu[0],
        r.slow_down[1],
        r.slow_down_cpu[1],
        r.others_percent[0],
        r.others_percent[1],
        r.others_percent[2],
        r.carried_by_1_gib,
    )
}
