//! The kernel's merging thread: woken for a burst, and returned to what it was.
//!
//! Its settings are the host's, not ours (Documentation/admin-guide/mm/ksm.rst). So a [`Burst`] notes what they
//! were, in a file that is locked while it lasts, before it changes any, and sets them back when it ends,
//! however it ends. If its process is killed, the lock is gone and the note is still there: whoever locks the
//! file next sets them back first ([`Ksm::recover`]). A setting that somebody else changed meanwhile stays as it
//! is.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, Read, Seek, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use crate::MergeError;

/// Settings of a burst, in the order in which they are set; set back in the opposite one. The advisor would
/// change `pages_to_scan`, and with `smart_scan` pages without an equal are not looked at for a while, so that a
/// new equal of theirs is not found. With `use_zero_pages`, pages of zeros become the kernel's own. A stretch of
/// 8192 pages takes some milliseconds; the settings cannot be changed meanwhile.
const BURST: [(&str, &str); 6] = [
    ("advisor_mode", "none"),
    ("pages_to_scan", "8192"),
    ("sleep_millisecs", "0"),
    ("smart_scan", "0"),
    ("use_zero_pages", "1"),
    ("run", "1"),
];
/// Those that every KSM has.
const NEEDED: [&str; 3] = ["pages_to_scan", "sleep_millisecs", "run"];
/// A first look at a page notes its checksum, a second merges it, if it is the same; and the look that is under
/// way at the beginning may be past it.
const LEAST_SCANS: u64 = 3;
const BURST_LOCK: &str = "ferry-ksm.lock";
pub(crate) const TENANT_LOCK: &str = "ferry-ksm-tenant.lock";
const POLL: Duration = Duration::from_millis(5);
const NOTE_BYTES: u64 = 4096;

/// Where the kernel's merging is controlled, and where its users agree on who does.
#[derive(Clone, Debug)]
pub struct Ksm {
    sysfs: PathBuf,
    locks: PathBuf,
}

/// What the kernel has merged on the whole host.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct HostFigures {
    /// Pages that stand for several.
    pub shared_pages: u64,
    /// Pages that were given back for these.
    pub sharing_pages: u64,
    /// Pages that became the kernel's page of zeros.
    pub zero_pages: u64,
    /// How often all memory was looked at.
    pub full_scans: u64,
    /// Bytes given back, less what the kernel needs to know it.
    pub profit_bytes: i64,
}

/// What the kernel has merged of this process, as `/proc/self/ksm_stat` reads. Pages that were written since
/// count as merged until the kernel's thread comes by, so it is exact only at the end of a burst.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ProcessFigures {
    /// Pages that are one with others.
    pub merging_pages: u64,
    /// Pages that are the kernel's page of zeros.
    pub zero_pages: u64,
    /// Bytes given back, less what the kernel needs to know it.
    pub profit_bytes: i64,
}

/// How a burst ended.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Rest {
    /// Whether merging came to rest: else it ran out of time, or was told to stop.
    pub at_rest: bool,
    /// How often the kernel looked at all memory that is advised.
    pub full_scans: u64,
    /// How long it took.
    pub took: Duration,
}

impl Default for Ksm {
    fn default() -> Self {
        Self { sysfs: "/sys/kernel/mm/ksm".into(), locks: "/run".into() }
    }
}

impl Ksm {
    /// Control files and lock files at other places.
    pub fn at(sysfs: impl Into<PathBuf>, locks: impl Into<PathBuf>) -> Self {
        Self { sysfs: sysfs.into(), locks: locks.into() }
    }

    pub(crate) fn run_path(&self) -> PathBuf {
        self.sysfs.join("run")
    }

    /// Where the file `name` is, which processes of a host lock.
    pub(crate) fn lock_path(&self, name: &str) -> PathBuf {
        self.locks.join(name)
    }

    /// The files by which processes agree, made where this process may: one that is about to give up making
    /// files in their directory can go on using them.
    pub fn lock_files(&self) -> Vec<PathBuf> {
        let paths = [BURST_LOCK, TENANT_LOCK].map(|name| self.lock_path(name));
        paths.into_iter().filter(|path| open_lock(path).is_ok()).collect()
    }

    /// What is merged on the host.
    ///
    /// # Errors
    /// There is no KSM.
    pub fn figures(&self) -> Result<HostFigures, MergeError> {
        let figure = |name: &str| -> Option<i64> { self.setting(name).ok()?.parse().ok() };
        let count = |name: &str| figure(name).and_then(|n| u64::try_from(n).ok());
        let path = self.sysfs.join("pages_sharing");
        Ok(HostFigures {
            shared_pages: count("pages_shared").unwrap_or(0),
            sharing_pages: count("pages_sharing").ok_or(MergeError::NoKsm { path })?,
            zero_pages: count("ksm_zero_pages").unwrap_or(0),
            full_scans: count("full_scans").unwrap_or(0),
            profit_bytes: figure("general_profit").unwrap_or(0),
        })
    }

    /// What is merged of this process; zeros where the kernel does not tell (before Linux 6.1).
    pub fn own_figures() -> ProcessFigures {
        let text = fs::read_to_string("/proc/self/ksm_stat").unwrap_or_default();
        parse_own(&text)
    }

    /// Sets back what a process left behind that was killed in a burst; whether there was something. Every burst
    /// begins with it.
    ///
    /// # Errors
    /// A burst is under way, or the settings cannot be written.
    pub fn recover(&self) -> Result<bool, MergeError> {
        let (mut file, path) = self.lock(Duration::ZERO)?;
        self.set_back(&mut file, &path)
    }

    /// Wakes the kernel's thread and lets it run as fast as it can, on one core, until the [`Burst`] is dropped.
    /// Waits up to `patience` for another process that does the same.
    ///
    /// # Errors
    /// There is no KSM, it is turned off, its settings may not be written, or another process is at it.
    pub fn burst(&self, patience: Duration) -> Result<Burst, MergeError> {
        let run = self.sysfs.join("run");
        if !run.exists() {
            return Err(MergeError::NoKsm { path: run });
        }
        // Asked first, so that who may not is told so, and not of a lock that only root can make.
        OpenOptions::new().write(true).open(&run).map_err(|e| denied(&run, e))?;
        let (mut file, path) = self.lock(patience)?;
        self.set_back(&mut file, &path)?;
        if self.setting("run")? == "2" {
            return Err(MergeError::TurnedOff { path: run });
        }
        let mut note = String::new();
        for (name, _) in BURST {
            match self.setting(name) {
                Ok(value) => note.push_str(&format!("{name} {value}\n")),
                Err(e) if NEEDED.contains(&name) => return Err(e),
                // Older kernels lack it.
                Err(_) => {}
            }
        }
        let noted = file.write_all(note.as_bytes()).and_then(|()| file.flush());
        noted.map_err(|source| MergeError::File { path: path.clone(), source })?;
        let burst = Burst { ksm: self.clone(), file, path };
        for (name, value) in BURST {
            if note.lines().any(|line| line.split(' ').next() == Some(name)) {
                self.set(name, value)?;
            }
        }
        Ok(burst)
    }

    /// The file of bursts, locked.
    fn lock(&self, patience: Duration) -> Result<(File, PathBuf), MergeError> {
        let path = self.lock_path(BURST_LOCK);
        let file = open_lock(&path)?;
        let until = Instant::now() + patience;
        loop {
            match file.try_lock() {
                Ok(()) => return Ok((file, path)),
                Err(TryLockError::WouldBlock) if Instant::now() < until => thread::sleep(POLL),
                Err(TryLockError::WouldBlock) => return Err(MergeError::Busy { path }),
                Err(TryLockError::Error(source)) => return Err(MergeError::File { path, source }),
            }
        }
    }

    /// Sets back what the note in the file says; whether it says something.
    fn set_back(&self, file: &mut File, path: &Path) -> Result<bool, MergeError> {
        let failed = |source| MergeError::File { path: path.to_owned(), source };
        let mut note = String::new();
        file.rewind().map_err(failed)?;
        file.take(NOTE_BYTES).read_to_string(&mut note).map_err(failed)?;
        let mut trouble = None;
        for (name, burst) in BURST.into_iter().rev() {
            let was =
                note.lines().filter_map(|line| line.split_once(' ')).find(|(n, _)| *n == name);
            // Nothing but a number or a word is ever written, whatever the file says.
            let was = was.map(|(_, was)| was).filter(|was| {
                was.len() <= 20 && was.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-')
            });
            if let Some(was) = was
                && self.setting(name).is_ok_and(|now| now == burst)
                && let Err(e) = self.set(name, was)
            {
                trouble = Some(e);
            }
        }
        // Kept if it could not be followed: the next one tries again.
        if let Some(e) = trouble {
            return Err(e);
        }
        file.set_len(0).map_err(failed)?;
        file.rewind().map_err(failed)?;
        Ok(!note.is_empty())
    }

    fn setting(&self, name: &str) -> Result<String, MergeError> {
        let path = self.sysfs.join(name);
        match fs::read_to_string(&path) {
            Ok(text) => Ok(chosen(text.trim()).to_owned()),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Err(MergeError::NoKsm { path }),
            Err(source) => Err(MergeError::File { path, source }),
        }
    }

    fn set(&self, name: &str, value: &str) -> Result<(), MergeError> {
        let path = self.sysfs.join(name);
        fs::write(&path, value).map_err(|e| denied(&path, e))
    }
}

/// A file to lock, which is ours and no link to anything else.
pub(crate) fn open_lock(path: &Path) -> Result<File, MergeError> {
    let mut options = OpenOptions::new();
    options.read(true).write(true).create(true).truncate(false).mode(0o600);
    options.custom_flags(libc::O_NOFOLLOW).open(path).map_err(|e| denied(path, e))
}

fn denied(path: &Path, source: io::Error) -> MergeError {
    let path = path.to_owned();
    match source.kind() {
        io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => {
            MergeError::NoPermission { path, source }
        }
        _ => MergeError::File { path, source },
    }
}

/// Of several words the one in brackets, which is how the kernel tells a choice.
fn chosen(text: &str) -> &str {
    let inner = text.split_once('[').and_then(|(_, rest)| rest.split_once(']'));
    inner.map_or(text, |(inner, _)| inner)
}

fn parse_own(text: &str) -> ProcessFigures {
    let figure = |name: &str| {
        let line = text.lines().find_map(|l| l.strip_prefix(name))?;
        line.trim_start_matches(':').trim().parse::<i64>().ok()
    };
    let count = |name| figure(name).and_then(|n| u64::try_from(n).ok()).unwrap_or(0);
    ProcessFigures {
        merging_pages: count("ksm_merging_pages"),
        zero_pages: count("ksm_zero_pages"),
        profit_bytes: figure("ksm_process_profit").unwrap_or(0),
    }
}

/// The kernel's thread at full speed. When this is dropped, its settings are what they were.
#[derive(Debug)]
pub struct Burst {
    ksm: Ksm,
    /// Locked, with the note.
    file: File,
    path: PathBuf,
}

impl Burst {
    /// Waits until merging has come to rest, `patience` is over, or `stop` says so.
    ///
    /// # Errors
    /// The kernel does not tell any more.
    pub fn wait(&self, patience: Duration, stop: &dyn Fn() -> bool) -> Result<Rest, MergeError> {
        let began = Instant::now();
        let first = self.ksm.figures()?;
        let (mut last, mut rested) = (first, false);
        while !rested && began.elapsed() < patience && !stop() {
            thread::sleep(POLL);
            let now = self.ksm.figures()?;
            if now.full_scans > last.full_scans {
                let merged = |f: HostFigures| f.sharing_pages + f.shared_pages + f.zero_pages;
                rested =
                    now.full_scans > first.full_scans + LEAST_SCANS && merged(now) <= merged(last);
                last = now;
            }
        }
        let full_scans = last.full_scans - first.full_scans;
        Ok(Rest { at_rest: rested, full_scans, took: began.elapsed() })
    }

    /// Sets back what was changed, and says if that failed; dropping does the same, silently.
    ///
    /// # Errors
    /// The settings cannot be written any more. The note stays, for the next burst or [`Ksm::recover`].
    pub fn end(mut self) -> Result<(), MergeError> {
        self.ksm.set_back(&mut self.file, &self.path).map(|_| ())
    }
}

impl Drop for Burst {
    fn drop(&mut self) {
        // A note that is gone means that it was done. One that stays is for the next to follow.
        let _ = self.ksm.set_back(&mut self.file, &self.path);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_words_are_understood() {
        assert_eq!(chosen("[none] scan-time"), "none");
        assert_eq!(chosen("none [scan-time]"), "scan-time");
        assert_eq!(chosen("100"), "100");
        let text =
            "ksm_rmap_items 8\nksm_zero_pages 3\nksm_merging_pages 5\nksm_process_profit -512\n";
        let own = ProcessFigures { merging_pages: 5, zero_pages: 3, profit_bytes: -512 };
        assert_eq!(parse_own(text), own);
        assert_eq!(parse_own("what"), ProcessFigures::default());
    }
}
