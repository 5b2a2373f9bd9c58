//! `ferry vm`: machines of this host.

use std::io::Write;
use std::path::Path;

use ferry_guest::workload::Params;
use ferry_process_guest::{Config, ProcessGuest, Tracker};
use ferry_refvmm::{Machine, MachineConfig, RefHost, SerialSink};

use crate::Failure;
use crate::args::{DirtyLogArg, Run, Vm};
use crate::balloon;
use crate::cpu;
use crate::hosted::{Ending, Hosted};
use crate::machine::AnyMachine;
use crate::memory;
use crate::protocol::{Conversation, LimitRequest, MachineInfo, Reply, Request};
use crate::runtime_dir::RuntimeDir;

pub(crate) fn main(runtime: &RuntimeDir, command: Vm) -> Result<(), Failure> {
    match command {
        Vm::Run(run) => boot(runtime, &run),
        Vm::List { json } => list(runtime, json),
        Vm::Show { name, json } => show(runtime, &name, json),
        Vm::Pause { name } => ask(runtime, &name, &Request::Pause),
        Vm::Resume { name, destination_is_dead } => {
            ask(runtime, &name, &Request::Resume { destination_is_dead })
        }
        Vm::Stop { name } => ask(runtime, &name, &Request::Stop),
    }
}

fn boot(runtime: &RuntimeDir, run: &Run) -> Result<(), Failure> {
    let reservation = runtime.reserve(&run.name)?;
    let machine = if run.kernel == Path::new(":process") { process(run)? } else { kvm(run)? };
    let hosted = Hosted::start(machine.clone(), reservation)?;
    if run.swap.swap_pool.is_some() {
        let limit = LimitRequest { bytes: run.memory_limit, swap: run.swap.options() };
        hosted.limit(&limit).map_err(Failure::words)?;
    }
    machine.begin().map_err(Failure::words)?;
    eprintln!("ferry: machine `{}` runs ({} MiB, {} vCPUs)", run.name, run.memory >> 20, run.cpus);
    finish(&hosted.wait(), hosted.name())
}

fn process(run: &Run) -> Result<AnyMachine, Failure> {
    if !matches!(run.dirty_log, DirtyLogArg::Auto | DirtyLogArg::WriteProtect) {
        return Err(Failure::words(
            "a process guest has no KVM to log its writes: --dirty-log can be write-protect or auto",
        ));
    }
    if run.cpu.is_some() {
        return Err(Failure::words(
            "a process guest is shown no processor, and runs on any: --cpu is not for it",
        ));
    }
    let guest = ProcessGuest::new(Config {
        name: run.name.clone(),
        memory_bytes: run.memory,
        huge_pages: run.huge_pages,
        workers: run.cpus,
        workload: run.cmdline.clone(),
        tracker: Tracker::default(),
    })?;
    Ok(AnyMachine::process(guest))
}

fn kvm(run: &Run) -> Result<AnyMachine, Failure> {
    let cpu = run.cpu.as_deref().map(cpu::read).transpose()?;
    let builtin = run.kernel == Path::new(":guest");
    let (image, cmdline) = if builtin {
        // The guest would say so on its console, and halt.
        Params::parse(&run.cmdline).map_err(|e| Failure::words(e.to_string()))?;
        let mut image = tempfile::NamedTempFile::new()?;
        image.write_all(ferry_guest::ELF)?;
        // Later words win: what the operator says counts.
        let tsc_khz = cpu.as_ref().map_or_else(RefHost::tsc_khz, |cpu| Ok(cpu.tsc_khz))?;
        (Some(image), format!("cpus={} tsc_khz={tsc_khz} {}", run.cpus, run.cmdline))
    } else {
        (None, run.cmdline.clone())
    };
    let machine = Machine::boot(&MachineConfig {
        name: run.name.clone(),
        memory_bytes: run.memory,
        huge_pages: run.huge_pages,
        cpus: run.cpus,
        cpu,
        kernel: image.as_ref().map_or_else(|| run.kernel.clone(), |i| i.path().to_owned()),
        initrd: run.initrd.clone(),
        cmdline: cmdline.trim().to_owned(),
        dirty_log: run.dirty_log.into(),
        serial: run.serial.clone().map_or(SerialSink::Stdout, SerialSink::File),
    })?;
    Ok(AnyMachine::Kvm(machine))
}

/// Says how a machine's stay ended; an error if the guest did not end well.
pub(crate) fn finish(ending: &Ending, name: &str) -> Result<(), Failure> {
    match ending {
        Ending::Moved(to) => eprintln!("ferry: machine `{name}` moved to {to}"),
        Ending::Saved(to) => {
            eprintln!("ferry: machine `{name}` was saved to {} and ended", to.display());
        }
        Ending::Stopped => eprintln!("ferry: machine `{name}` was stopped"),
        Ending::Ended(how) if how.starts_with("crashed") => {
            return Err(Failure::words(format!("machine `{name}` {how}")));
        }
        Ending::Ended(how) => eprintln!("ferry: machine `{name}` {how}"),
    }
    Ok(())
}

fn list(runtime: &RuntimeDir, json: bool) -> Result<(), Failure> {
    let mut machines = Vec::new();
    for name in runtime.names()? {
        // One that ended meanwhile is not listed.
        if let Ok(info) = info(runtime, &name) {
            machines.push(info);
        }
    }
    if json {
        println!("{}", serde_json::to_string_pretty(&machines)?);
        return Ok(());
    }
    if machines.is_empty() {
        println!("no machine runs here (runtime directory {})", runtime.path().display());
        return Ok(());
    }
    println!(
        "{:<20} {:<8} {:>4} {:>10} {:>10}  STATE",
        "NAME", "KIND", "CPUS", "MEMORY", "RESIDENT"
    );
    for m in machines {
        let (memory, resident) = (mib(m.memory_bytes), mib(m.resident_bytes));
        println!(
            "{:<20} {:<8} {:>4} {memory:>10} {resident:>10}  {}",
            m.name, m.kind, m.cpus, m.state
        );
    }
    Ok(())
}

fn show(runtime: &RuntimeDir, name: &str, json: bool) -> Result<(), Failure> {
    let m = info(runtime, name)?;
    if json {
        println!("{}", serde_json::to_string_pretty(&m)?);
        return Ok(());
    }
    println!("name       {}", m.name);
    println!("state      {}", m.state);
    if let Some(to) = m.migrating_to {
        println!("moving to  {to}");
    }
    if let Some(to) = m.saving_to {
        println!("saving to  {}", to.display());
    }
    println!("kind       {}, {} vCPUs", m.kind, m.cpus);
    println!("memory     {}, {} resident", mib(m.memory_bytes), mib(m.resident_bytes));
    if let Some(swap) = &m.swap {
        println!("swap       {}", memory::swap_line(swap));
    }
    if let Some(balloon) = &m.balloon {
        println!("balloon    {}", balloon::line(balloon));
    }
    if let Some(sharing) = &m.sharing {
        println!("sharing    {}", memory::sharing_line(sharing));
        let saves = m.merged_saves_bytes + m.merged_zero_bytes;
        println!("merged     {}, saves {}", mib(m.merged_bytes + m.merged_zero_bytes), mib(saves));
        if let Some(why) = memory::not_shared(sharing) {
            println!("not merged {why}");
        }
    }
    println!("dirty log  {}", m.dirty_log);
    if let (Some(written), Some(checked)) = (m.pages_written, m.pages_checked) {
        println!("workload   {written} pages written, {checked} checked");
    }
    println!("process    {}", m.pid);
    Ok(())
}

fn mib(bytes: u64) -> String {
    format!("{} MiB", bytes >> 20)
}

pub(crate) fn info(runtime: &RuntimeDir, name: &str) -> Result<MachineInfo, Failure> {
    match exchange(runtime, name, &Request::Show)? {
        Reply::Machine(info) => Ok(*info),
        other => Err(unexpected(&other)),
    }
}

/// Asks for something that is done at once, and prints what was done.
pub(crate) fn ask(runtime: &RuntimeDir, name: &str, request: &Request) -> Result<(), Failure> {
    println!("{}", ask_quietly(runtime, name, request)?);
    Ok(())
}

/// Asks for something that is done at once; returns what was done, in words.
pub(crate) fn ask_quietly(
    runtime: &RuntimeDir,
    name: &str,
    request: &Request,
) -> Result<String, Failure> {
    match exchange(runtime, name, request)? {
        Reply::Done(words) => Ok(words),
        other => Err(unexpected(&other)),
    }
}

pub(crate) fn exchange(
    runtime: &RuntimeDir,
    name: &str,
    request: &Request,
) -> Result<Reply, Failure> {
    let mut host = Conversation::new(runtime.connect(name)?);
    host.say(request)?;
    let gone =
        || Failure::words(format!("the process that hosts `{name}` ended without an answer"));
    match host.hear()?.ok_or_else(gone)? {
        Reply::Error(why) => Err(Failure::words(why)),
        reply => Ok(reply),
    }
}

pub(crate) fn unexpected(reply: &Reply) -> Failure {
    Failure::words(format!(
        "the hosting process answered something else ({reply:?}): is it another version?"
    ))
}
