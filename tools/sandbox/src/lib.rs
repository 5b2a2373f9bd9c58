//! A process gives up what it does not need, for good, before it listens to anybody ([`confine`]).
//!
//! Three walls, each of which stands without the others:
//! - files (`files`, landlock): what can be opened is what [`Needs`] names, and no TCP is spoken but on sockets that are there before;
//! - capabilities: those that nothing here uses are dropped, of a process that runs as root;
//! - system calls (`calls`, seccomp): what is not on the list is refused as if the kernel did not have it. No
//!   program is started, no process forked, signalled or traced, no socket connected or made but of UDP and local
//!   streams to listen on, no memory made executable.
//!
//! What was open before stays open. Names and metadata of files are not hidden.
//!
//! Does not know who needs what, and why.

mod calls;
mod files;

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use rustix::thread::{CapabilitySet, CapabilitySets, capabilities, set_capabilities};

/// What a process opens later on. All of it must be there.
#[derive(Clone, Debug, Default)]
pub struct Needs {
    /// Files, and directories with all in them, that are read.
    pub read: Vec<PathBuf>,
    /// Files that are written in place, or devices; directories of such.
    pub update: Vec<PathBuf>,
    /// Directories in which files are made, written and removed.
    pub write: Vec<PathBuf>,
}

/// How much of it must be had.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Demand {
    /// What the kernel has; [`Confined`] says what that is.
    Best,
    /// Files and system calls, or it is an error.
    All,
    /// As `All`; and a system call that is not on the list ends the process.
    Deadly,
}

/// Why a process is not confined. It may be in part: it should end.
#[derive(Debug, thiserror::Error)]
pub enum ConfineError {
    /// A rule's path.
    #[error("cannot allow {} to a confined process: {source}", .path.display())]
    Path {
        /// The path.
        path: PathBuf,
        /// The system's word.
        source: io::Error,
    },
    /// Threads that were started before would keep what the others give up.
    #[error("cannot confine a process that has {0} threads already")]
    NotAlone(usize),
    /// Not [`Demand::Best`], and the kernel does not have it.
    #[error("cannot confine this process: {0}")]
    Lacks(String),
    /// Landlock refused.
    #[error("cannot confine this process to its files: {0}")]
    Files(#[from] landlock::RulesetError),
}

/// A path that the confined process may not use.
#[derive(Debug, thiserror::Error)]
#[error("this process was confined when it began to listen, and may not use {}; it may use: {}", .path.display(), list(.allowed))]
pub struct Beyond {
    /// The path.
    pub path: PathBuf,
    /// Directories and files that it may use in this way.
    pub allowed: Vec<PathBuf>,
}

fn list(paths: &[PathBuf]) -> String {
    let names: Vec<String> = paths.iter().map(|path| path.display().to_string()).collect();
    if names.is_empty() { "nothing".into() } else { names.join(", ") }
}

/// What is in force, for the life of the process.
#[derive(Debug)]
pub struct Confined {
    /// Rules for files, if the kernel has them.
    rules: Option<Rules>,
    /// What is not in force, and why.
    lacks: Vec<String>,
}

/// Paths without links in them.
#[derive(Debug)]
struct Rules {
    read: Vec<PathBuf>,
    write: Vec<PathBuf>,
}

static IN_FORCE: OnceLock<Confined> = OnceLock::new();

/// What is in force in this process, if it was confined.
pub fn in_force() -> Option<&'static Confined> {
    IN_FORCE.get()
}

/// Confines this process, which has no other thread yet: all that it starts are confined as well.
///
/// # Errors
/// A path of `needs` cannot be opened; what is demanded cannot be had.
pub fn confine(needs: &Needs, demand: Demand) -> Result<&'static Confined, ConfineError> {
    let threads = std::fs::read_dir("/proc/self/task").map_or(1, Iterator::count);
    if threads != 1 {
        return Err(ConfineError::NotAlone(threads));
    }
    let rules = Rules::of(needs)?;
    let mut lacks = Vec::new();
    let has_files = files::restrict(needs)?;
    if !has_files {
        lacks.push("files (the kernel has no landlock, or it is off)".to_owned());
    }
    if let Err(e) = drop_capabilities() {
        lacks.push(format!("capabilities ({e})"));
    }
    // The last: the others are system calls that it refuses.
    if let Err(why) = calls::restrict(demand == Demand::Deadly) {
        lacks.push(format!("system calls ({why})"));
    }
    if demand != Demand::Best && !lacks.is_empty() {
        return Err(ConfineError::Lacks(lacks.join(", ")));
    }
    Ok(IN_FORCE.get_or_init(|| Confined { rules: has_files.then_some(rules), lacks }))
}

/// Keeps what is used: files of other users where the rules allow the path, socket buffers beyond the system's
/// limit, threads that go before others; and where there is no device for it, userfaultfd.
fn drop_capabilities() -> io::Result<()> {
    let mut kept = CapabilitySet::DAC_OVERRIDE | CapabilitySet::NET_ADMIN | CapabilitySet::SYS_NICE;
    kept.set(CapabilitySet::SYS_PTRACE, !Path::new("/dev/userfaultfd").exists());
    let had = capabilities(None)?;
    let permitted = had.permitted & kept;
    let effective = had.effective & kept;
    Ok(set_capabilities(
        None,
        CapabilitySets { permitted, effective, inheritable: CapabilitySet::empty() },
    )?)
}

impl Rules {
    fn of(needs: &Needs) -> Result<Self, ConfineError> {
        let whole = |path: &PathBuf| {
            path.canonicalize().map_err(|source| ConfineError::Path { path: path.clone(), source })
        };
        let write = needs.write.iter().map(whole).collect::<Result<Vec<_>, _>>()?;
        let mut read = needs.read.iter().map(whole).collect::<Result<Vec<_>, _>>()?;
        read.extend(write.iter().cloned());
        Ok(Self { read, write })
    }

    fn check(allowed: &[PathBuf], path: &Path) -> Result<(), Beyond> {
        // What is not there yet is where its directory is.
        let there = path.ancestors().find_map(|path| path.canonicalize().ok());
        let is_allowed = |there: &PathBuf| allowed.iter().any(|allowed| there.starts_with(allowed));
        if there.as_ref().is_some_and(is_allowed) {
            return Ok(());
        }
        Err(Beyond { path: path.to_owned(), allowed: allowed.to_vec() })
    }
}

impl Confined {
    /// Whether files at the absolute `path` can be read.
    ///
    /// # Errors
    /// They cannot.
    pub fn may_read(&self, path: &Path) -> Result<(), Beyond> {
        self.rules.as_ref().map_or(Ok(()), |rules| Rules::check(&rules.read, path))
    }

    /// Whether files at the absolute `path` can be made.
    ///
    /// # Errors
    /// They cannot.
    pub fn may_write(&self, path: &Path) -> Result<(), Beyond> {
        self.rules.as_ref().map_or(Ok(()), |rules| Rules::check(&rules.write, path))
    }

    /// Whether all three walls stand.
    pub fn is_whole(&self) -> bool {
        self.lacks.is_empty()
    }
}

impl fmt::Display for Confined {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.lacks.is_empty() {
            return f.write_str("confined in files, capabilities and system calls");
        }
        write!(f, "NOT CONFINED in {}", self.lacks.join(", "))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_beneath_an_allowed_directory_is_named_with_what_is() {
        let dir = tempfile::tempdir().unwrap();
        let (inside, outside) = (dir.path().join("in"), dir.path().join("out"));
        std::fs::create_dir(&inside).unwrap();
        std::fs::create_dir(&outside).unwrap();
        std::os::unix::fs::symlink(&outside, inside.join("link")).unwrap();
        let needs = Needs { write: vec![inside.clone()], ..Needs::default() };
        let confined = Confined { rules: Some(Rules::of(&needs).unwrap()), lacks: Vec::new() };
        for (path, may) in [
            (inside.clone(), true),
            (inside.join("new/bundle"), true),
            (dir.path().join("in2"), false),
            (inside.join("link/bundle"), false),
            (inside.join("../out/bundle"), false),
        ] {
            assert_eq!(confined.may_write(&path).is_ok(), may, "{}", path.display());
            assert_eq!(confined.may_read(&path).is_ok(), may, "{}", path.display());
        }
        let words = confined.may_write(&outside).unwrap_err().to_string();
        assert!(words.contains(outside.to_str().unwrap()), "{words}");
        assert!(words.contains(inside.to_str().unwrap()), "{words}");
    }
}
