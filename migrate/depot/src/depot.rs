//! The side that has bundles: opens and reads files below one directory, for peers that proved who they are.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use ferry_bundle::{MANIFEST, is_file_of_bundle};
use ferry_protocol::limits::HELLO_TIMEOUT;
use ferry_protocol::{
    Hello, LENDING_VERSION, MAX_HELLO_BYTES, MAX_OPEN_FILES, MAX_PATH_BYTES, MAX_READ_BYTES,
    MAX_TO_DEPOT_BYTES, ToDepot, ToReader, wire,
};
use ferry_transport::{
    Admission, ByteSink, ByteSource, FrameReader, LinkError, Listener, Peer, send_message,
};
use rustix::fs::{Mode, OFlags, ResolveFlags, openat2};
use rustix::io::Errno;
use tokio::sync::Semaphore;

/// Channels that are served at once; a reader has two.
const MAX_CHANNELS: usize = 64;
/// Of them, channels of one identity.
const MAX_CHANNELS_PER_IDENTITY: usize = 48;
/// A peer takes what it asked for within this time.
const TAKE_TIMEOUT: Duration = Duration::from_secs(60);

/// How often a file is opened again that a rename somewhere else came between: microseconds each.
const MOST_TRIES: u32 = 10_000;

/// A directory whose bundles are lent.
#[derive(Debug)]
pub struct Depot {
    root: OwnedFd,
    admission: Admission,
}

/// What the host of a depot is told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DepotEvent {
    /// A peer reads a bundle.
    Reads {
        /// The peer's identity and address.
        peer: String,
        /// The bundle, from the directory that is lent; empty if it is that.
        bundle: String,
    },
    /// A peer was turned away, or a connection came to nothing.
    Turned(String),
}

impl Depot {
    /// Lends what is below `dir`: a bundle, or a directory of bundles.
    ///
    /// # Errors
    /// It is not a directory, or cannot be opened.
    pub fn open(dir: &Path) -> io::Result<Self> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let root = rustix::fs::open(dir, flags, Mode::empty())?;
        Ok(Self { root, admission: Admission::Everyone })
    }

    /// Lends to those only whom `admission` lets read a bundle; names are paths from the directory that is lent.
    /// Asked each time when a file is opened.
    #[must_use]
    pub fn lend_to(self, admission: Admission) -> Self {
        Self { admission, ..self }
    }

    /// The bundle that `file` belongs to, wherever the path to it led: from the directory that is lent.
    fn bundle_of(&self, file: &File) -> io::Result<String> {
        let place = |fd: i32| PathBuf::from(format!("/proc/self/fd/{fd}")).read_link();
        let (root, path) = (place(self.root.as_raw_fd())?, place(file.as_raw_fd())?);
        let within = path.parent().and_then(|dir| dir.strip_prefix(root).ok());
        let within = within.ok_or_else(|| io::Error::other("it was moved away"))?;
        within.to_str().map(str::to_owned).ok_or_else(|| io::Error::other("its name is no text"))
    }

    /// Opens the file of a bundle at `path`.
    fn open_file(&self, path: &str, peer: &Peer) -> Result<(File, u64), ToReader> {
        let failed = |why: &dyn std::fmt::Display| ToReader::Failed { why: why.to_string() };
        let missing = |why: &str| ToReader::Missing { why: why.to_owned() };
        if path.len() > MAX_PATH_BYTES {
            return Err(failed(&"the path is too long"));
        }
        let name = path.rsplit('/').next().unwrap_or_default();
        if !is_file_of_bundle(name) {
            return Err(failed(&"no file of a bundle has that name"));
        }
        // The kernel follows the path and sees to it that no step of it, `..` and symbolic links included,
        // leaves the directory. A pipe must not be waited for.
        let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
        let beneath = ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS;
        // While anything of the host is renamed or mounted, the kernel cannot be sure of a `..`, and says so.
        let mut tries = 0;
        let file = loop {
            match openat2(&self.root, path, flags, Mode::empty(), beneath) {
                Err(Errno::AGAIN | Errno::INTR) if tries < MOST_TRIES => tries += 1,
                opened => break opened,
            }
        };
        let file = file.map(File::from).map_err(|e| match e {
            Errno::NOENT | Errno::NOTDIR => missing("that host has no such file there"),
            Errno::XDEV => missing("it is outside of the directory that host lends bundles of"),
            e => failed(&io::Error::from(e)),
        })?;
        let about = file.metadata().map_err(|e| failed(&e))?;
        if !about.is_file() {
            return Err(failed(&"it is not a file"));
        }
        if !matches!(self.admission, Admission::Everyone) {
            let bundle = self.bundle_of(&file).map_err(|e| failed(&e))?;
            self.admission.admit(peer, "read bundle", &bundle).map_err(|why| failed(&why))?;
        }
        Ok((file, about.len()))
    }
}

/// Lends bundles of `depot` until `listener` ends. Runs on the caller's tokio runtime. `tell` must not wait.
pub async fn serve(
    mut listener: Box<dyn Listener>,
    depot: Depot,
    tell: impl Fn(DepotEvent) + Send + Sync + 'static,
) {
    let (depot, tell) = (Arc::new(depot), Arc::new(tell));
    let places = Arc::new(Semaphore::new(MAX_CHANNELS));
    let mut own_places = HashMap::<String, Arc<Semaphore>>::new();
    while let Some(accepted) = listener.accept().await {
        let mut channel = match accepted {
            Ok(channel) => channel,
            Err(e) => {
                tell(DepotEvent::Turned(e.to_string()));
                continue;
            }
        };
        let who = channel.peer.clone();
        let peer = format!("{} ({})", who.name, channel.remote);
        let own = own_places.entry(who.name.clone());
        let own = own.or_insert_with(|| Arc::new(Semaphore::new(MAX_CHANNELS_PER_IDENTITY)));
        let place = (own.clone().try_acquire_owned(), places.clone().try_acquire_owned());
        let (depot, tell) = (depot.clone(), tell.clone());
        tokio::spawn(async move {
            let why = match place {
                (Ok(_own), Ok(_place)) => {
                    let reads = |bundle| tell(DepotEvent::Reads { peer: peer.clone(), bundle });
                    attend(depot, who, &mut channel.sink, channel.source, reads).await
                }
                (Err(_), _) => Err(format!(
                    "it has {MAX_CHANNELS_PER_IDENTITY} connections here already, the most of one host; try again"
                )),
                (_, Err(_)) => {
                    Err(format!("{MAX_CHANNELS} connections read bundles here already; try again"))
                }
            };
            if let Err(why) = why {
                channel.sink.close(&why).await;
                tell(DepotEvent::Turned(format!("turned {peer} away: {why}")));
            }
        });
    }
}

/// Serves a peer until it has gone.
async fn attend(
    depot: Arc<Depot>,
    peer: Peer,
    sink: &mut Box<dyn ByteSink>,
    source: Box<dyn ByteSource>,
    reads: impl Fn(String),
) -> Result<(), String> {
    let mut reader = FrameReader::new(source);
    greeted(&mut reader).await?;
    depot.admission.knows(&peer)?;
    let files = (0..MAX_OPEN_FILES).map(|_| None).collect();
    let mut desk = Desk { depot, peer, files, told: false };
    loop {
        let bytes = match reader.read_message(MAX_TO_DEPOT_BYTES).await {
            Ok(Some(bytes)) => bytes,
            Err(e @ LinkError::TooLong { .. }) => return Err(e.to_string()),
            // That is how a reader leaves.
            Ok(None) | Err(_) => return Ok(()),
        };
        let request = wire::decode(&bytes).map_err(|e| format!("it sent nonsense: {e}"))?;
        let (answer, data) = match request {
            ToDepot::Open { file, path } => (desk.open(file, path).await?, Vec::new()),
            ToDepot::Read { file, at, bytes } => desk.read(file, at, bytes, &reads).await?,
        };
        let message = wire::encode(&answer).map_err(|e| e.to_string())?;
        let sent = async {
            send_message(sink.as_mut(), &message).await?;
            if data.is_empty() { Ok(()) } else { sink.send(data.into()).await }
        };
        // A peer that reads nothing must not keep its place.
        match tokio::time::timeout(TAKE_TIMEOUT, sent).await {
            Ok(Ok(())) => {}
            Ok(Err(_)) => return Ok(()),
            Err(_) => {
                let seconds = TAKE_TIMEOUT.as_secs();
                return Err(format!("it did not take what it asked for within {seconds} s"));
            }
        }
    }
}

async fn greeted(reader: &mut FrameReader) -> Result<(), String> {
    let hello = tokio::time::timeout(HELLO_TIMEOUT, reader.read_message(MAX_HELLO_BYTES)).await;
    let hello = hello.map_err(|_| format!("it said nothing for {} s", HELLO_TIMEOUT.as_secs()))?;
    let hello =
        hello.map_err(|e| e.to_string())?.ok_or("it closed the connection without a word")?;
    match Hello::decode(&hello).map_err(|e| e.to_string())? {
        Hello::Bundles { version: LENDING_VERSION } => Ok(()),
        Hello::Bundles { version } => Err(format!(
            "it reads bundles by version {version}, this host lends them by {LENDING_VERSION}: update the older one"
        )),
        _ => Err("this host lends bundles; it takes in no machines: `ferry receive` does".into()),
    }
}

/// What one channel has open.
struct Desk {
    depot: Arc<Depot>,
    peer: Peer,
    /// With the bundle of which it is the manifest.
    files: Vec<Option<(Arc<File>, Option<String>)>>,
    /// A bundle is read.
    told: bool,
}

impl Desk {
    async fn open(&mut self, file: u16, path: String) -> Result<ToReader, String> {
        let place = self.files.get_mut(usize::from(file)).ok_or("it opens too many files")?;
        let bundle = path.strip_suffix(MANIFEST).map(|dir| dir.trim_end_matches('/').to_owned());
        let (depot, peer) = (self.depot.clone(), self.peer.clone());
        let (opened, bytes) = match blocking(move || depot.open_file(&path, &peer)).await? {
            Ok(opened) => opened,
            Err(why) => return Ok(why),
        };
        *place = Some((Arc::new(opened), bundle));
        Ok(ToReader::Opened { bytes })
    }

    async fn read(
        &mut self,
        file: u16,
        at: u64,
        bytes: u32,
        reads: &impl Fn(String),
    ) -> Result<(ToReader, Vec<u8>), String> {
        let opened = self.files.get(usize::from(file)).and_then(Option::as_ref);
        let (opened, bundle) = opened.cloned().ok_or("it reads a file that it did not open")?;
        // Said once: bases are no news, and a reader's other channel reads no manifest.
        if let Some(bundle) = bundle
            && !std::mem::replace(&mut self.told, true)
        {
            reads(bundle);
        }
        if bytes > MAX_READ_BYTES {
            return Err(format!("it asks for {bytes} bytes at once"));
        }
        let mut data = vec![0; usize::try_from(bytes).unwrap_or(0)];
        let read = blocking(move || opened.read_exact_at(&mut data, at).map(|()| data)).await?;
        Ok(match read {
            Ok(data) => (ToReader::Data { bytes }, data),
            Err(e) => (ToReader::Failed { why: e.to_string() }, Vec::new()),
        })
    }
}

/// A disk may take its time, which the other channels shall not wait for.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, String> {
    tokio::task::spawn_blocking(work).await.map_err(|e| e.to_string())
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};

    use super::*;
    use ferry_transport::Fingerprint;

    fn peer(name: &str) -> Peer {
        Peer { name: name.into(), fingerprint: Fingerprint::of(name.as_bytes()) }
    }

    #[test]
    fn a_peer_reads_the_bundles_that_it_may_read_whatever_way_leads_to_them() {
        let dir = tempfile::tempdir().unwrap();
        for bundle in ["one", "two", "team/three"] {
            std::fs::create_dir_all(dir.path().join(bundle)).unwrap();
            std::fs::write(dir.path().join(bundle).join(MANIFEST), "{}").unwrap();
        }
        std::fs::write(dir.path().join(MANIFEST), "{}").unwrap();
        std::os::unix::fs::symlink("two", dir.path().join("one/link")).unwrap();
        std::os::unix::fs::symlink("../two", dir.path().join("one/out")).unwrap();
        let list = "a *\nb one\nc team".parse().unwrap();
        let depot = Depot::open(dir.path()).unwrap().lend_to(Admission::List(list));
        for (who, path, may) in [
            ("a", "one", true),
            ("a", ".", true),
            ("b", "one", true),
            ("b", "two/../one", true),
            ("b", "one/../two", false),
            ("b", "one/out", false),
            ("b", "two", false),
            ("b", ".", false),
            ("c", "team/three", true),
            ("c", "one/../team/three", true),
            ("c", "one", false),
            ("d", "one", false),
        ] {
            let opened = depot.open_file(&format!("{path}/{MANIFEST}"), &peer(who));
            assert_eq!(opened.is_ok(), may, "{who} {path}: {opened:?}");
            if let Err(ToReader::Failed { why }) = opened {
                assert!(why.contains(&format!("`{who}`")) && why.contains("may not"), "{why}");
            }
        }
    }

    #[test]
    fn a_path_by_a_parent_is_followed_while_files_are_renamed() {
        let dir = tempfile::tempdir().unwrap();
        let [one, two] = ["one", "two"].map(|name| dir.path().join(name));
        std::fs::create_dir(&one).unwrap();
        std::fs::create_dir(&two).unwrap();
        std::fs::write(one.join(MANIFEST), "{}").unwrap();
        let depot = Depot::open(dir.path()).unwrap();
        let (end, from, to) = (AtomicBool::new(false), two.join("from"), two.join("to"));
        std::fs::write(&from, "").unwrap();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !end.load(Ordering::Relaxed) {
                    std::fs::rename(&from, &to).unwrap();
                    std::fs::rename(&to, &from).unwrap();
                }
            });
            let path = format!("two/../one/{MANIFEST}");
            let peer = peer("a");
            let failed = (0..20_000).filter(|_| depot.open_file(&path, &peer).is_err()).count();
            end.store(true, Ordering::Relaxed);
            assert_eq!(failed, 0);
        });
    }
}
