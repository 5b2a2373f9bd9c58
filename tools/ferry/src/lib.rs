//! The `ferry` command: hosts machines, moves them, and shows what happens.
//!
//! It is a library with one entry, [`main`], so that its control socket can be fuzzed ([`fuzzing`]).

mod allocator;
mod args;
mod balloon;
mod bundle;
mod cgroup;
mod confine;
mod cpu;
mod demo;
pub mod fuzzing;
mod hosted;
mod machine;
mod memory;
mod merged;
mod migrate;
mod pager;
mod places;
mod preflight;
mod protocol;
mod receive;
mod restore;
mod route;
mod runtime_dir;
mod save;
mod sharer;
mod vm;

use std::process::ExitCode;

use clap::Parser;
use ferry_transport::pki;

use args::{Cli, Command, Pki};
use protocol::Request;
use runtime_dir::RuntimeDir;

/// Why a command did not do what it was asked for: the sentence that the operator reads.
#[derive(Debug)]
struct Failure(String);

impl Failure {
    fn words(words: impl Into<String>) -> Self {
        Self(words.into())
    }
}

impl std::fmt::Display for Failure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl<E: std::error::Error> From<E> for Failure {
    fn from(e: E) -> Self {
        Self(ferry_migrate::words(&e))
    }
}

/// Runs the command with this process's arguments.
pub fn main() -> ExitCode {
    allocator::give_back_what_is_freed();
    tracing_subscriber::fmt().with_writer(std::io::stderr).with_target(false).init();
    survive_file_size_limits();
    // Memory, keys, control: no file of this process is for others.
    rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o077));
    match run(Cli::parse()) {
        Ok(code) => code,
        Err(e) => {
            eprintln!("ferry: {e}");
            ExitCode::FAILURE
        }
    }
}

/// A file that may not grow (`ulimit -f`) is an error of whoever writes it, not the end of the machine
/// that this process hosts.
fn survive_file_size_limits() {
    extern "C" fn ignore(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}
    // Without it all works but that.
    if let Err(e) = vmm_sys_util::signal::register_signal_handler(libc::SIGXFSZ, ignore) {
        tracing::warn!("cannot ignore SIGXFSZ: {e}");
    }
}

fn run(cli: Cli) -> Result<ExitCode, Failure> {
    let runtime = || RuntimeDir::open(cli.runtime_dir.clone());
    match cli.command {
        Command::Demo(demo) => return demo::main(&demo),
        Command::Pki(Pki::Init { dir, hosts, days }) => pki_init(&dir, &hosts, days)?,
        Command::Pki(Pki::Renew { dir, hosts, days }) => pki_renew(&dir, &hosts, days)?,
        Command::Vm(command) => vm::main(&runtime()?, command)?,
        Command::Cpu(command) => cpu::main(runtime, &command)?,
        Command::Receive(args) => receive::main(runtime()?, &args)?,
        Command::Preflight(args) => return preflight::main(&runtime()?, &args),
        Command::Migrate(args) => return migrate::main(&runtime()?, &args),
        Command::ServeSpool(args) => return migrate::serve_spool(&args),
        Command::Save(args) => save::main(&runtime()?, &args)?,
        Command::Restore(args) => restore::main(&runtime()?, &args)?,
        Command::Bundle(command) => bundle::main(&command)?,
        Command::Memory(command) => return memory::main(&runtime()?, &command),
        Command::Pager(args) => pager::main(&args)?,
        Command::Balloon(args) => return balloon::main(&runtime()?, &args),
        Command::Tune(args) => vm::ask(&runtime()?, &args.name, &Request::Tune(args.tuning()))?,
        Command::Cancel { name } => vm::ask(&runtime()?, &name, &Request::Cancel)?,
    }
    Ok(ExitCode::SUCCESS)
}

fn valid_for(days: u32) -> pki::Validity {
    let host = std::time::Duration::from_secs(u64::from(days) * 86_400);
    pki::Validity { host, ..pki::Validity::default() }
}

fn pki_renew(dir: &std::path::Path, hosts: &[String], days: u32) -> Result<(), Failure> {
    for renewed in pki::renew(dir, hosts, &valid_for(days))? {
        if let pki::Created::Host(name, path) = renewed {
            println!("renewed identity {name}: --identity {}", path.display());
        }
    }
    Ok(())
}

/// Loads an identity that connections will be made with, and says if its time ends soon.
fn load_identity(dir: &std::path::Path) -> Result<pki::Identity, Failure> {
    let identity = pki::Identity::load(dir)?;
    if let Some(soon) = identity.expires_soon(std::time::SystemTime::now()) {
        eprintln!("ferry: {soon}");
    }
    Ok(identity)
}

/// The allow list in `path`, if there is one; it is read now, so that what is wrong with it is said at once.
fn allowed(path: Option<&std::path::PathBuf>) -> Result<ferry_transport::Admission, Failure> {
    let Some(path) = path else { return Ok(ferry_transport::Admission::Everyone) };
    let admission = ferry_transport::Admission::File(std::path::absolute(path)?);
    admission.list().map_err(Failure::words)?;
    Ok(admission)
}

fn pki_init(dir: &std::path::Path, hosts: &[String], days: u32) -> Result<(), Failure> {
    for made in pki::init_for(dir, hosts, &valid_for(days))? {
        match made {
            pki::Created::Authority(path) => println!("made authority {}", path.display()),
            pki::Created::Host(name, path) => {
                println!("made identity {name}: --identity {}", path.display());
            }
        }
    }
    Ok(())
}
