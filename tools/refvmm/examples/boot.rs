//! Boots a kernel in this process and, if asked, moves it between machines here, copying memory by hand.
//!
//! ```text
//! boot KERNEL [--initrd FILE] [--cmdline S] [--memory-mib N] [--cpus N] [--dirty-log bitmap|ring|write-protect]
//!      [--until TEXT] [--moves N] [--run-seconds N] [--serial FILE]
//! ```
//! Without `--serial` the console goes to standard output, and `--until` needs `--serial`.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use ferry_migrate::Guest;
use ferry_protocol::{StateReader, StateWriter};
use ferry_refvmm::{Arrival, DirtyLog, Machine, MachineConfig, SerialSink};

#[path = "../tests/carry/mod.rs"]
mod carry;

struct Asked {
    config: MachineConfig,
    until: Option<String>,
    moves: u32,
    run: Duration,
}

fn parse() -> Result<Asked, String> {
    let mut args = std::env::args().skip(1);
    let kernel = args.next().ok_or("which kernel?")?;
    let mut asked = Asked {
        config: MachineConfig {
            name: "boot".into(),
            memory_bytes: 256 << 20,
            huge_pages: false,
            cpus: 1,
            cpu: None,
            kernel: kernel.into(),
            initrd: None,
            cmdline: String::new(),
            dirty_log: DirtyLog::Auto,
            serial: SerialSink::Stdout,
        },
        until: None,
        moves: 0,
        run: Duration::from_secs(5),
    };
    while let Some(flag) = args.next() {
        let value = args.next().ok_or_else(|| format!("{flag} needs a value"))?;
        let number = || value.parse::<u32>().map_err(|e| format!("{flag} {value}: {e}"));
        match flag.as_str() {
            "--initrd" => asked.config.initrd = Some(PathBuf::from(value)),
            "--cmdline" => asked.config.cmdline = value,
            "--memory-mib" => asked.config.memory_bytes = u64::from(number()?) << 20,
            "--cpus" => asked.config.cpus = number()?,
            "--serial" => asked.config.serial = SerialSink::File(PathBuf::from(value)),
            "--until" => asked.until = Some(value),
            "--moves" => asked.moves = number()?,
            "--run-seconds" => asked.run = Duration::from_secs(number()?.into()),
            "--dirty-log" => {
                asked.config.dirty_log = match value.as_str() {
                    "bitmap" => DirtyLog::Bitmap,
                    "ring" => DirtyLog::Ring,
                    "write-protect" => DirtyLog::WriteProtect,
                    _ => return Err(format!("no dirty log {value}")),
                }
            }
            _ => return Err(format!("no flag {flag}")),
        }
    }
    Ok(asked)
}

fn run() -> Result<(), Box<dyn std::error::Error>> {
    let asked = parse()?;
    let begun = Instant::now();
    let mut machine = Machine::boot(&asked.config)?;
    println!("built in {:?}, dirty log {}", begun.elapsed(), machine.dirty_log());
    machine.resume_by_operator()?;
    if let (Some(text), SerialSink::File(path)) = (&asked.until, &asked.config.serial) {
        while !std::fs::read_to_string(path).unwrap_or_default().contains(text) {
            if let Some(status) = machine.wait_ended(Duration::from_millis(100)) {
                return Err(status.to_string().into());
            }
        }
        println!("`{text}` after {:?}", begun.elapsed());
    }
    for _ in 0..asked.moves {
        std::thread::sleep(Duration::from_secs(1));
        machine = step(machine, &asked)?;
    }
    match machine.wait_ended(asked.run) {
        Some(status) => Err(status.to_string().into()),
        None => {
            println!("after {:?}: {}", begun.elapsed(), machine.status());
            Ok(())
        }
    }
}

fn step(mut source: Machine, asked: &Asked) -> Result<Machine, Box<dyn std::error::Error>> {
    let arrival = Arrival {
        serial: asked.config.serial.clone(),
        dirty_log: asked.config.dirty_log,
        ..Default::default()
    };
    let mut times = Vec::new();
    let mut at = Instant::now();
    let mut lap = |what: &str| {
        times.push(format!("{what} {} µs", at.elapsed().as_micros()));
        at = Instant::now();
    };
    let spec = source.spec();
    let mut destination = Machine::arrive(&spec, &arrival).map_err(|r| format!("{r:?}"))?;
    lap("prepare");
    let permit = source.pause()?;
    lap("pause");
    let mut out = StateWriter::new();
    source.save(&mut out)?;
    lap("save");
    let bytes = out.finish()?;
    lap(&format!("encode {} B", bytes.len()));
    carry::memory(&source.memory(), &destination.memory());
    lap("memory");
    let reader = StateReader::parse(&bytes)?;
    lap("decode");
    destination.load(&reader)?;
    lap("load");
    destination.resume(permit).map_err(|(_, e)| e)?;
    lap("resume");
    println!("moved: {}", times.join(", "));
    Ok(destination)
}

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("{e}");
            ExitCode::FAILURE
        }
    }
}
