//! Where running machines are found: a directory with a socket and a lock for each.
//!
//! The lock, held for the life of the hosting process, says that a name is taken; a socket without a
//! held lock is what a process left that was killed.
//!
//! Who can write here can take a machine's place, and who reaches its socket commands it: the directory and all
//! in it are their owner's alone, and a hosting process asks the kernel who has connected.

use std::fs::{DirBuilder, File, OpenOptions, TryLockError};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

use ferry_migrate::is_machine_name;
use rustix::fs::{Mode, fchmod};
use rustix::net::sockopt::socket_peercred;
use rustix::net::{
    AddressFamily, Shutdown, SocketAddrUnix, SocketFlags, SocketType, bind, listen, shutdown,
    socket_with,
};
use rustix::process::{Uid, geteuid};

/// Commands that wait to be heard.
const BACKLOG: i32 = 128;

/// Why the runtime directory did not help.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RuntimeError {
    #[error("cannot use the runtime directory {}: {source}; choose another by --runtime-dir", .dir.display())]
    Dir { dir: PathBuf, source: io::Error },
    #[error(
        "the runtime directory {} belongs to user {owner}, who could take the place of machines: run as that user, or \
         choose another by --runtime-dir",
        .dir.display()
    )]
    NotOurs { dir: PathBuf, owner: u32 },
    #[error(
        "the runtime directory {0} is open to other users: `chmod 700 {0}`, or choose another by --runtime-dir",
        .dir.display()
    )]
    Open { dir: PathBuf },
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
        let about = made.and_then(|()| std::fs::metadata(&dir));
        let about = about.map_err(|source| RuntimeError::Dir { dir: dir.clone(), source })?;
        if about.uid() != geteuid().as_raw() {
            return Err(RuntimeError::NotOurs { dir, owner: about.uid() });
        }
        if about.mode() & 0o077 != 0 {
            return Err(RuntimeError::Open { dir });
        }
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
        let listener = private_socket(&path).and_then(|l| Ok((l.try_clone()?, l)));
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

/// A socket at `path` that was never anybody else's to connect to.
fn private_socket(path: &Path) -> io::Result<UnixListener> {
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
    // The socket's file has the socket's mode from its first moment.
    fchmod(&socket, Mode::RUSR | Mode::WUSR)?;
    bind(&socket, &SocketAddrUnix::new(path)?)?;
    listen(&socket, BACKLOG)?;
    Ok(socket.into())
}

/// Whether the process at the other end of a control socket may command this one.
///
/// # Errors
/// It may not, in words.
pub(crate) fn check_peer(stream: &UnixStream) -> Result<(), String> {
    let peer = socket_peercred(stream).map_err(|e| format!("who asks cannot be told: {e}"))?.uid;
    let own = geteuid();
    if peer == own || peer == Uid::ROOT {
        return Ok(());
    }
    Err(format!(
        "user {} may not command a machine of user {}: run as that user, or as root",
        peer.as_raw(),
        own.as_raw()
    ))
}

impl Drop for Reservation {
    fn drop(&mut self) {
        self.release();
    }
}

#[cfg(test)]
mod tests {
    use std::fs::Permissions;
    use std::os::unix::fs::PermissionsExt;

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
    fn a_directory_that_others_can_enter_is_refused_with_what_to_do() {
        let dir = tempfile::tempdir().unwrap();
        let run = dir.path().join("run");
        RuntimeDir::open(Some(run.clone())).unwrap();
        for mode in [0o701, 0o710, 0o722, 0o755, 0o777] {
            std::fs::set_permissions(&run, Permissions::from_mode(mode)).unwrap();
            let refused = RuntimeDir::open(Some(run.clone())).unwrap_err().to_string();
            assert!(refused.contains(&format!("chmod 700 {}", run.display())), "{refused}");
        }
        std::fs::set_permissions(&run, Permissions::from_mode(0o700)).unwrap();
        RuntimeDir::open(Some(run)).unwrap();
    }

    #[test]
    fn a_directory_of_another_user_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let run = dir.path().join("run");
        RuntimeDir::open(Some(run.clone())).unwrap();
        if std::os::unix::fs::chown(&run, Some(65_534), None).is_err() {
            println!("SKIP: only root gives directories away");
            return;
        }
        let refused = RuntimeDir::open(Some(run)).unwrap_err();
        assert!(matches!(refused, RuntimeError::NotOurs { owner: 65_534, .. }), "{refused}");
    }

    #[test]
    fn another_user_who_reaches_the_socket_is_told_apart() {
        let dir = tempfile::tempdir().unwrap();
        let runtime = RuntimeDir::open(Some(dir.path().join("run"))).unwrap();
        let machine = runtime.reserve("a").unwrap();
        let listener = machine.listen().unwrap();
        let path = machine.socket();
        assert_eq!(std::fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
        let _own = runtime.connect("a").unwrap();
        check_peer(&listener.accept().unwrap().0).unwrap();
        if geteuid() != Uid::ROOT {
            println!("SKIP: only root can be another user");
            return;
        }
        // All that else keeps others out is opened.
        std::fs::set_permissions(&path, Permissions::from_mode(0o666)).unwrap();
        std::fs::set_permissions(runtime.path(), Permissions::from_mode(0o755)).unwrap();
        std::fs::set_permissions(dir.path(), Permissions::from_mode(0o755)).unwrap();
        // A thread may be somebody else than its process.
        let nobody = std::thread::spawn(move || {
            let uid = Uid::from_raw(65_534);
            rustix::thread::set_thread_res_uid(uid, uid, uid).unwrap();
            UnixStream::connect(path).unwrap()
        });
        let _connected = nobody.join().unwrap();
        let refused = check_peer(&listener.accept().unwrap().0).unwrap_err();
        assert!(refused.contains("user 65534 may not"), "{refused}");
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
        let runtime = RuntimeDir::open(Some(dir.path().join("run"))).unwrap();
        assert!(matches!(runtime.reserve("../x"), Err(RuntimeError::BadName(_))));
        assert!(matches!(runtime.connect("../x"), Err(RuntimeError::BadName(_))));
    }
}
