//! What a process that listens to other hosts keeps of the file system, and what commands may ask of it then.

use std::path::{Path, PathBuf};

use ferry_sandbox::{Beyond, Demand, Needs, confine, in_force};
use ferry_sharing::Ksm;
use ferry_transport::{LinkChoice, Over};

use crate::Failure;
use crate::args::{BundleServe, Receive, SandboxArg};
use crate::runtime_dir::RuntimeDir;

/// What the kernel tells of this process and this host, and randomness.
const READ: [&str; 6] = [
    "/dev/urandom",
    "/proc/meminfo",
    "/proc/self",
    "/sys/fs/cgroup",
    "/sys/kernel/mm/hugepages",
    "/sys/devices/system/cpu",
];
/// Machines, pages that come later, equal pages.
const UPDATE: [&str; 3] = ["/dev/kvm", "/dev/userfaultfd", "/sys/kernel/mm/ksm"];

/// Confines `ferry receive`. Returns what is in force, in words.
pub(crate) fn receiver(runtime: &RuntimeDir, args: &Receive) -> Result<String, Failure> {
    let mut needs = Needs { read: args.bundles.clone(), ..Needs::default() };
    needs.read.push(args.identity.clone());
    needs.read.extend(args.allow.as_deref().map(around));
    needs.update.extend(there(&UPDATE));
    needs.update.extend(Ksm::default().lock_files());
    needs.update.extend(args.serial.clone());
    needs.write.push(runtime.path().to_owned());
    needs.write.extend(args.files.iter().chain(&args.swap.swap_dir).cloned());
    give_up_all_but(needs, args.sandbox)
}

/// Confines `ferry bundle serve`. Returns what is in force, in words.
pub(crate) fn lender(args: &BundleServe) -> Result<String, Failure> {
    let mut read = vec![args.dir.clone(), args.identity.clone()];
    read.extend(args.allow.as_deref().map(around));
    give_up_all_but(Needs { read, ..Needs::default() }, args.sandbox)
}

/// The directory of a file that is replaced by another of its name.
fn around(file: &Path) -> PathBuf {
    let dir = file.parent().filter(|dir| !dir.as_os_str().is_empty());
    dir.unwrap_or(Path::new(".")).to_owned()
}

fn give_up_all_but(mut needs: Needs, sandbox: SandboxArg) -> Result<String, Failure> {
    let demand = match sandbox {
        SandboxArg::Off => return Ok("NOT CONFINED (--sandbox off)".into()),
        SandboxArg::Auto => Demand::Best,
        SandboxArg::Require => Demand::All,
        SandboxArg::Strict => Demand::Deadly,
    };
    needs.read.extend(there(&READ));
    let confined = confine(&needs, demand).map_err(|e| {
        Failure::words(format!("{}; --sandbox off does without", ferry_migrate::words(&e)))
    })?;
    Ok(confined.to_string())
}

/// Which of them there are differs between kernels.
fn there(paths: &[&'static str]) -> impl Iterator<Item = PathBuf> {
    paths.iter().map(PathBuf::from).filter(|path| path.exists())
}

/// Whether this process may read what is at `path`, and if not, what to do.
pub(crate) fn may_read(path: &Path) -> Result<(), String> {
    in_force().map_or(Ok(()), |confined| confined.may_read(path)).map_err(|e| advice(&e))
}

/// Whether this process may make files at `path`, and if not, what to do.
pub(crate) fn may_write(path: &Path) -> Result<(), String> {
    in_force().map_or(Ok(()), |confined| confined.may_write(path)).map_err(|e| advice(&e))
}

/// What this process may connect over, where `wanted` is asked for, and if not, what to do.
pub(crate) fn link(wanted: LinkChoice) -> Result<LinkChoice, String> {
    match (wanted, in_force()) {
        (LinkChoice::Auto, Some(_)) => Ok(LinkChoice::Only(Over::Quic)),
        (LinkChoice::Only(Over::Tls), Some(_)) => Err(
            "this process was confined when it began to listen, and connects to nobody over TCP: move the machine with \
             --link quic, or to a `ferry receive` that was started with --sandbox off"
                .into(),
        ),
        (wanted, _) => Ok(wanted),
    }
}

fn advice(beyond: &Beyond) -> String {
    format!(
        "{beyond}. Name one of these; or move the machine to a `ferry receive` that was started with --files and a \
         directory above it"
    )
}
