//! `ferry demo`: two hosts on this machine, a busy guest, one move.

use std::io::{BufRead, BufReader};
use std::net::SocketAddr;
use std::path::Path;
use std::process::{Child, Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use ferry_transport::{LinkChoice, PeerRule, pki};

use crate::args::{Demo, DemoGuest, Destination, Migrate, ModeArg, PeerArg, Way};
use crate::protocol::{MachineInfo, Request};
use crate::runtime_dir::RuntimeDir;
use crate::{Failure, machine, migrate, vm};

const NAME: &str = "demo";
/// Of 512 MiB all pages are written once; then 64 MiB are rewritten at 10,000 pages a second.
const WORKLOAD: &str = "pattern=working-set set=64M rate=10000 fill=all fill_random=25 random=25";
/// A guest that has not begun by then will not.
const START_TIMEOUT: Duration = Duration::from_secs(60);

/// A child process that does not outlive the demo.
struct Host(Child);

impl Drop for Host {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

pub(crate) fn main(args: &Demo) -> Result<ExitCode, Failure> {
    let say = |words: &str| {
        if !args.json {
            println!("{words}");
        }
    };
    let guest = match (args.guest, machine::kvm()) {
        (Some(guest), _) => guest,
        (None, Ok(())) => DemoGuest::Kvm,
        (None, Err(why)) => {
            eprintln!("ferry: {why}: moving a process guest instead of a KVM machine");
            DemoGuest::Process
        }
    };
    let (kernel, what) = match guest {
        DemoGuest::Kvm => (":guest", "a KVM machine"),
        DemoGuest::Process => (":process", "a process guest (memory and threads, no KVM)"),
    };
    let dir = tempfile::tempdir()?;
    let dir = dir.path();
    let hosts = ["source".to_owned(), "destination".to_owned()];
    pki::init(&dir.join("pki"), &hosts)?;
    let source = RuntimeDir::open(Some(dir.join("source")))?;
    let destination = RuntimeDir::open(Some(dir.join("destination")))?;

    say("Starting two hosts on this machine, each a process of its own:");
    let (_receiver, to) = receiver(dir)?;
    say(&format!("  destination  ferry receive --listen {to} --identity pki/destination"));
    let _runner = Host(
        ferry(&source)?
            .args(["vm", "run", NAME, "--kernel", kernel, "--memory", "512M", "--cpus", "2"])
            .args(["--cmdline", WORKLOAD])
            .arg("--serial")
            .arg(dir.join("console"))
            .stderr(log(dir, "source.log")?)
            .spawn()?,
    );
    say(&format!("  source       ferry vm run {NAME} --kernel {kernel} --memory 512M --cpus 2"));
    let before = wait_until_busy(&source, dir)?;
    say(&format!(
        "The guest is {what}: 2 vCPUs, 512 MiB, {} MiB in use, rewriting 64 MiB at 10,000 pages/s \
         and checking each page that it comes to.",
        before.resident_bytes >> 20
    ));
    say(&format!("Moving it:\n  ferry migrate {NAME} --to {to} --identity pki/source\n"));
    let report = migrate::migrate(
        &source,
        &Migrate {
            name: NAME.into(),
            way: Way {
                there: Destination {
                    to: to.into(),
                    identity: dir.join("pki/source"),
                    peer: PeerArg {
                        peer: Some(PeerRule::Name("destination".into())),
                        link: LinkChoice::Auto,
                    },
                },
                mode: ModeArg::Auto,
                max_downtime: Duration::from_millis(50),
                max_total: Duration::from_secs(300),
                max_slowdown: 0,
                bandwidth: None,
            },
            resume: false,
            rejoin: Duration::from_secs(120),
            spool: None,
            json: args.json,
        },
    )?;
    if args.json {
        println!("{}", serde_json::to_string_pretty(&report)?);
        return Ok(migrate::exit_code(&report));
    }
    say(&migrate::words(&report, NAME, &to.to_string()));
    if report.machine == ferry_migrate::Whereabouts::RunsAtDestination {
        let (written, checked) = work_of_a_second(&destination)?;
        say(&format!(
            "At the destination it is {}: {written} pages written and {checked} checked within a second, none wrong.",
            vm::info(&destination, NAME)?.state
        ));
        vm::ask_quietly(&destination, NAME, &Request::Stop)?;
    }
    Ok(migrate::exit_code(&report))
}

fn ferry(runtime: &RuntimeDir) -> Result<Command, Failure> {
    let mut command = Command::new(std::env::current_exe()?);
    command.arg("--runtime-dir").arg(runtime.path()).stdin(Stdio::null()).stdout(Stdio::null());
    Ok(command)
}

fn log(dir: &Path, name: &str) -> Result<std::fs::File, Failure> {
    Ok(std::fs::File::create(dir.join(name))?)
}

/// Starts the destination, and finds out where it listens.
fn receiver(dir: &Path) -> Result<(Host, SocketAddr), Failure> {
    let runtime = RuntimeDir::open(Some(dir.join("destination")))?;
    let mut child = Host(
        ferry(&runtime)?
            .args(["receive", "--listen", "127.0.0.1:0", "--once", "--identity"])
            .arg(dir.join("pki/destination"))
            .arg("--serial")
            .arg(dir.join("console"))
            .stderr(Stdio::piped())
            .spawn()?,
    );
    let mut lines =
        BufReader::new(child.0.stderr.take().ok_or_else(|| Failure::words("no pipe"))?).lines();
    let first = lines.next().transpose()?.unwrap_or_default();
    let to = first.split_whitespace().find_map(|word| word.parse().ok());
    let to = to.ok_or_else(|| Failure::words(format!("the destination did not start: {first}")))?;
    // A pipe that nobody reads would block the destination.
    std::thread::spawn(move || lines.for_each(drop));
    Ok((child, to))
}

/// Waits until the guest has filled its memory and follows its pattern.
fn wait_until_busy(source: &RuntimeDir, dir: &Path) -> Result<MachineInfo, Failure> {
    let began = Instant::now();
    let mut last_resident = 0;
    loop {
        std::thread::sleep(Duration::from_millis(300));
        if let Ok(info) = vm::info(source, NAME) {
            let settled = info.resident_bytes == last_resident;
            last_resident = info.resident_bytes;
            if settled && info.pages_checked.is_some_and(|n| n > 0) {
                return Ok(info);
            }
        }
        if began.elapsed() > START_TIMEOUT {
            let log = std::fs::read_to_string(dir.join("source.log")).unwrap_or_default();
            let console = std::fs::read_to_string(dir.join("console")).unwrap_or_default();
            return Err(Failure::words(format!("the guest did not start: {log}{console}")));
        }
    }
}

/// Pages written and checked within a second.
fn work_of_a_second(at: &RuntimeDir) -> Result<(u64, u64), Failure> {
    let first = vm::info(at, NAME)?;
    std::thread::sleep(Duration::from_secs(1));
    let later = vm::info(at, NAME)?;
    let more = |a: Option<u64>, b: Option<u64>| b.unwrap_or(0).saturating_sub(a.unwrap_or(0));
    Ok((
        more(first.pages_written, later.pages_written),
        more(first.pages_checked, later.pages_checked),
    ))
}
