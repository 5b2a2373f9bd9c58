//! Where running machines are found: a directory with a socket and a lock for each.
//!
//! The lock, held for the life of the hosting process, says that a name is taken; a socket without a
//! held lock is what a process left that was killed.

use std::fs::{DirBuilder, File, OpenOptions, TryLockError};
use std::io;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

use ferry_migrate::is_machine_name;
use rustix::net::{Shutdown, shutdown};

/// Why the runtime directory did not help.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RuntimeError {
    #[error("cannot use the runtime directory {}: {source}; choose another by --runtime-dir", .dir.display())]
    Dir { dir: PathBuf, source: io::Error },
    #[error(
        "`{0}` cannot name a machine: use 1 to 64 letters, digits, `.`, `_` or `-`, not beginning with `.` or `-`"
    )]
    BadName(String),
    #[error("the name `{name}` is taken: a machine of that name runs here (runtime directory {})", .dir.display())]
    Taken { name: String, dir: PathBuf },
    #[error("no machine `{name}` runs here (runtime directory {}); `ferry vm list` lists what does", .dir.display())]
    NoSuch { name: String, dir: PathBuf },
    #[error("cannot make the control socket {}: {source}", .path.display())]
    Socket { path: PathBuf, source: io::Error },
}

/// The directory of one host.
#[derive(Clone, Debug)]
pub(crate) struct RuntimeDir(PathBuf);

/// A name that is ours as long as this lives.
#[derive(Debug)]
pub(crate) struct Reservation {
    name: String,
    dir: PathBuf,
    lock: File,
    /// The control socket, once there is one.
    listener: OnceLock<UnixListener>,
    released: AtomicBool,
}

impl RuntimeDir {
    /// `chosen`, or `$XDG_RUNTIME_DIR/ferry`, or `/run/ferry`; made if it is not there.
    pub(crate) fn open(chosen: Option<PathBuf>) -> Result<Self, RuntimeError> {
        let dir = chosen
            .or_else(|| Some(PathBuf::from(std::env::var_os("XDG_RUNTIME_DIR")?).join("ferry")))
            .unwrap_or_else(|| "/run/ferry".into());
        let made = DirBuilder::new().recursive(true).mode(0o700).create(&dir);
        made.map_err(|source| RuntimeError::Dir { dir: dir.clone(), source })?;
        Ok(Self(dir))
    }

    pub(crate) fn path(&self) -> &Path {
        &self.0
    }

    /// Takes `name` for a machine of this process.
    pub(crate) fn reserve(&self, name: &str) -> Result<Reservation, RuntimeError> {
        if !is_machine_name(name) {
            return Err(RuntimeError::BadName(name.to_owned()));
        }
        let fail = |source| RuntimeError::Dir { dir: self.0.clone(), source };
        let path = self.0.join(format!("{name}.lock"));
        let lock = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .mode(0o600)
            .open(path)
            .map_err(fail)?;
        match lock.try_lock() {
            Ok(()) => Ok(Reservation {
                name: name.to_owned(),
                dir: self.0.clone(),
                lock,
                listener: OnceLock::new(),
                released: AtomicBool::new(false),
            }),
            Err(TryLockError::WouldBlock) => {
                Err(RuntimeError::Taken { name: name.to_owned(), dir: self.0.clone() })
            }
            Err(TryLockError::Error(e)) => Err(fail(e)),
        }
    }

    /// Names of the machines that answer here, ascending.
    pub(crate) fn names(&self) -> Result<Vec<String>, RuntimeError> {
        let fail = |source| RuntimeError::Dir { dir: self.0.clone(), source };
        let mut names = Vec::new();
        for entry in std::fs::read_dir(&self.0).map_err(fail)? {
            let name = entry.map_err(fail)?.file_name();
            if let Some(name) = name.to_str().and_then(|n| n.strip_suffix(".sock")) {
                names.push(name.to_owned());
            }
        }
        names.retain(|name| self.connect(name).is_ok());
        names.sort();
        Ok(names)
    }

    /// Connects to the process that hosts `name`.
    pub(crate) fn connect(&self, name: &str) -> Result<UnixStream, RuntimeError> {
        if !is_machine_name(name) {
            return Err(RuntimeError::BadName(name.to_owned()));
        }
        UnixStream::connect(self.0.join(format!("{name}.sock")))
            .map_err(|_| RuntimeError::NoSuch { name: name.to_owned(), dir: self.0.clone() })
    }
}

impl Reservation {
    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// The machine's control socket; accepting ends with an error when the name is given back.
    pub(crate) fn listen(&self) -> Result<UnixListener, RuntimeError> {
        let path = self.socket();
        // Nobody else has the name: what is there was left behind.
        let _ = std::fs::remove_file(&path);
        let listener = UnixListener::bind(&path).and_then(|l| Ok((l.try_clone()?, l)));
        let (ours, listener) = listener.map_err(|source| RuntimeError::Socket { path, source })?;
        // There is one for each reservation.
        let _ = self.listener.set(ours);
        Ok(listener)
    }

    /// Gives the name back before the machine is gone: another one may take it from here on.
    pub(crate) fn release(&self) {
        if self.released.swap(true, Ordering::SeqCst) {
            return;
        }
        // The lock's file stays: removing it would let two processes lock two files of one name.
        let _ = std::fs::remove_file(self.socket());
        if let Some(listener) = self.listener.get() {
            // Whoever waits for a client in `accept` would wait for ever.
            let _ = shutdown(listener, Shutdown::Both);
        }
        let _ = self.lock.unlock();
    }

    pub(crate) fn is_released(&self) -> bool {
        self.released.load(Ordering::SeqCst)
    }

    fn socket(&self) -> PathBuf {
        self.dir.join(format!("{}.sock", self.name))
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        self.release();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_taken_once_and_free_again_when_its_holder_is_gone() {
        let dir = tempfile::tempdir().unwrap();
        let runtime = RuntimeDir::open(Some(dir.path().join("run"))).unwrap();
        let first = runtime.reserve("a").unwrap();
        let _listener = first.listen().unwrap();
        assert_eq!(runtime.names().unwrap(), ["a"]);
        assert!(matches!(runtime.reserve("a"), Err(RuntimeError::Taken { .. })));
        drop(first);
        assert!(runtime.names().unwrap().is_empty());
        runtime.reserve("a").unwrap();
    }

    #[test]
    fn a_name_that_is_given_back_can_be_taken_while_its_holder_lives_and_nobody_listens_for_it() {
        let dir = tempfile::tempdir().unwrap();
        let runtime = RuntimeDir::open(Some(dir.path().join("run"))).unwrap();
        let first = runtime.reserve("a").unwrap();
        let listener = first.listen().unwrap();
        let accepting = std::thread::spawn(move || listener.accept().is_err());
        first.release();
        assert!(accepting.join().unwrap());
        let second = runtime.reserve("a").unwrap();
        let _listener = second.listen().unwrap();
        drop(first);
        assert_eq!(runtime.names().unwrap(), ["a"]);
    }

    #[test]
    fn a_name_that_is_a_path_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let runtime = RuntimeDir::open(Some(dir.path().to_owned())).unwrap();
        assert!(matches!(runtime.reserve("../x"), Err(RuntimeError::BadName(_))));
        assert!(matches!(runtime.connect("../x"), Err(RuntimeError::BadName(_))));
    }
}
