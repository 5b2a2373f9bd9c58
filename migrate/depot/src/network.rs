//! The shelf that has the bundles of every host.

use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use ferry_bundle::{Blob, Haste, Local, Shelf};
use ferry_protocol::MAX_OPEN_FILES;
use ferry_transport::Connector;
use tokio::runtime::{Builder, Handle, Runtime};

use crate::lane::{Ahead, Lane, Opened};

/// How long a read is tried again when the link is lost.
pub const PATIENCE: Duration = Duration::from_secs(120);
/// What the path of a file of another host begins with.
const SCHEME: &str = "ferry://";

type Connect = dyn Fn(&str) -> io::Result<Arc<dyn Connector>> + Send + Sync;

/// This host's directories, and bundles of other hosts: `ferry://HOST:PORT/PATH`.
///
/// Files are read by blocking calls, which must not be made on a thread of an async runtime.
pub struct Network {
    connect: Box<Connect>,
    patience: Duration,
    hosts: Mutex<BTreeMap<String, Arc<Host>>>,
}

impl Network {
    /// Hosts are reached by what `connect` makes of `HOST:PORT`; when a link is lost, a read is tried again
    /// for `patience`.
    pub fn new(
        connect: impl Fn(&str) -> io::Result<Arc<dyn Connector>> + Send + Sync + 'static,
        patience: Duration,
    ) -> Self {
        Self { connect: Box::new(connect), patience, hosts: Mutex::default() }
    }

    /// Whether `path` is of another host.
    pub fn is_remote(path: &Path) -> bool {
        split(path).is_some()
    }

    fn host(&self, address: &str) -> io::Result<Arc<Host>> {
        let mut hosts = lock(&self.hosts);
        if let Some(host) = hosts.get(address) {
            return Ok(host.clone());
        }
        let host = Arc::new(Host::new(&(self.connect)(address)?, self.patience)?);
        hosts.insert(address.to_owned(), host.clone());
        Ok(host)
    }
}

/// Address and path, of a path of another host.
fn split(path: &Path) -> Option<(&str, &str)> {
    let rest = path.to_str()?.strip_prefix(SCHEME)?;
    Some(rest.split_once('/').unwrap_or((rest, "")))
}

impl Shelf for Network {
    fn open(&self, path: &Path) -> io::Result<Box<dyn Blob>> {
        match split(path) {
            // `//` and a slash at the end come of bundles that are the served directory itself.
            Some((address, path)) => self.host(address)?.open(path.trim_start_matches('/')),
            None => Local.open(path),
        }
    }

    fn beside(&self, dir: &Path, hint: &str) -> PathBuf {
        match split(dir) {
            // Not `join`: an absolute path would lead to this host.
            Some(_) => PathBuf::from(format!("{}/{hint}", dir.display())),
            None => Local.beside(dir, hint),
        }
    }
}

/// Another host, and the channels to it.
struct Host {
    /// Taken when it is dropped.
    runtime: Option<Runtime>,
    /// For what is waited for.
    demand: Mutex<Lane>,
    /// For all else.
    ahead: Mutex<Lane>,
    /// Somebody has waited for a page.
    demanded: AtomicBool,
    /// Numbers of files that are open.
    numbers: Mutex<Vec<bool>>,
}

impl Host {
    fn new(connector: &Arc<dyn Connector>, patience: Duration) -> io::Result<Self> {
        // A thread for each connection.
        let runtime = Builder::new_multi_thread()
            .worker_threads(2)
            .thread_name("ferry-bundles")
            .enable_all()
            .build()?;
        let lane = || Mutex::new(Lane::new(connector.clone(), patience));
        Ok(Self {
            runtime: Some(runtime),
            demand: lane(),
            ahead: lane(),
            demanded: AtomicBool::new(false),
            numbers: Mutex::new(vec![false; MAX_OPEN_FILES.into()]),
        })
    }

    fn runtime(&self) -> io::Result<&Runtime> {
        if Handle::try_current().is_ok() {
            return Err(io::Error::other("a bundle of another host cannot be read on this thread"));
        }
        self.runtime.as_ref().ok_or_else(|| io::Error::other("the runtime has ended"))
    }

    /// Opens a file on both channels at once: what is replaced later stays as it was.
    fn open(self: &Arc<Self>, path: &str) -> io::Result<Box<dyn Blob>> {
        let runtime = self.runtime()?;
        let number = Number { host: self.clone(), file: self.number()? };
        let (path, bytes) = (path.to_owned(), OnceLock::new());
        let file = Arc::new(Opened { file: number.file, path, bytes });
        let (mut ahead, mut demand) = (lock(&self.ahead), lock(&self.demand));
        let opened = async { tokio::join!(ahead.open(&file), demand.open(&file)) };
        let (length, other) = runtime.block_on(opened);
        let bytes = other.and(length)?;
        drop((ahead, demand));
        Ok(Box::new(RemoteFile { number, file, bytes }))
    }

    /// A number that no open file has.
    fn number(&self) -> io::Result<u16> {
        let mut numbers = lock(&self.numbers);
        let free = (0..MAX_OPEN_FILES).zip(numbers.iter_mut()).find(|(_, taken)| !**taken);
        let (file, taken) = free.ok_or_else(|| io::Error::other("too many files are open"))?;
        *taken = true;
        Ok(file)
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        // An ordinary drop would wait, which a thread of another runtime must not.
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

/// A number, for as long as a file has it.
struct Number {
    host: Arc<Host>,
    file: u16,
}

impl Drop for Number {
    fn drop(&mut self) {
        if let Some(taken) = lock(&self.host.numbers).get_mut(usize::from(self.file)) {
            *taken = false;
        }
    }
}

/// A file of another host.
struct RemoteFile {
    number: Number,
    file: Arc<Opened>,
    bytes: u64,
}

impl fmt::Debug for RemoteFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "RemoteFile({})", self.file.path)
    }
}

impl Blob for RemoteFile {
    fn bytes(&self) -> io::Result<u64> {
        Ok(self.bytes)
    }

    fn read_exact_at(&self, out: &mut [u8], at: u64, haste: Haste) -> io::Result<()> {
        let host = &self.number.host;
        let (lane, ahead) = match haste {
            Haste::Waited => {
                host.demanded.store(true, Ordering::Relaxed);
                (&host.demand, Ahead::No)
            }
            Haste::Ahead if host.demanded.load(Ordering::Relaxed) => (&host.ahead, Ahead::Paced),
            Haste::Ahead => (&host.ahead, Ahead::Free),
        };
        host.runtime()?.block_on(lock(lane).read(&self.file, out, at, ahead))
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
