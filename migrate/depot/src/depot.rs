//! The side that has bundles: opens and reads files below one directory, for peers that proved who they are.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use ferry_bundle::is_file_of_bundle;
use ferry_protocol::{
    Hello, LENDING_VERSION, MAX_HELLO_BYTES, MAX_OPEN_FILES, MAX_PATH_BYTES, MAX_READ_BYTES,
    MAX_TO_DEPOT_BYTES, ToDepot, ToReader, wire,
};
use ferry_transport::{ByteSink, Channel, FrameReader, LinkError, Listener};
use rustix::fs::{Mode, OFlags, ResolveFlags, openat2};
use rustix::io::Errno;
use tokio::sync::Semaphore;

/// Channels that are served at once; a reader has two.
const MAX_CHANNELS: usize = 64;
/// A peer that opened a channel says what it wants within this time.
const HELLO_TIMEOUT: Duration = Duration::from_secs(5);
/// A peer takes what it asked for within this time.
const TAKE_TIMEOUT: Duration = Duration::from_secs(60);

/// A directory whose bundles are lent.
#[derive(Debug)]
pub struct Depot {
    root: OwnedFd,
}

/// What the host of a depot is told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DepotEvent {
    /// A peer reads the bundle in which this file is.
    Reads {
        /// The peer's identity and address.
        peer: String,
        /// The file, from the directory that is served.
        path: String,
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
        Ok(Self { root: rustix::fs::open(dir, flags, Mode::empty())? })
    }

    /// Opens the file of a bundle at `path`.
    fn open_file(&self, path: &str) -> Result<(File, u64), ToReader> {
        let failed = |why: &dyn std::fmt::Display| ToReader::Failed { why: why.to_string() };
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
        let file = openat2(&self.root, path, flags, Mode::empty(), beneath);
        let file = file.map(File::from).map_err(|e| match e {
            Errno::NOENT | Errno::NOTDIR => ToReader::Missing,
            Errno::XDEV => failed(&"it is outside of the directory that is served there"),
            e => failed(&io::Error::from(e)),
        })?;
        let about = file.metadata().map_err(|e| failed(&e))?;
        if !about.is_file() {
            return Err(failed(&"it is not a file"));
        }
        Ok((file, about.len()))
    }
}

/// Lends bundles of `depot` until `listener` ends. Runs on the caller's tokio runtime; files are read by a
/// thread for each channel. `tell` must not wait.
pub async fn serve(
    mut listener: Box<dyn Listener>,
    depot: Depot,
    tell: impl Fn(DepotEvent) + Send + Sync + 'static,
) {
    let (depot, tell) = (Arc::new(depot), Arc::new(tell));
    let places = Arc::new(Semaphore::new(MAX_CHANNELS));
    while let Some(accepted) = listener.accept().await {
        let mut channel = match accepted {
            Ok(channel) => channel,
            Err(e) => {
                tell(DepotEvent::Turned(e.to_string()));
                continue;
            }
        };
        let peer = format!("{} ({})", channel.peer, channel.remote);
        let Ok(place) = places.clone().try_acquire_owned() else {
            tell(DepotEvent::Turned(format!("turned {peer} away: too many read already")));
            tokio::spawn(async move {
                channel.sink.close("too many read bundles there already; try again").await;
            });
            continue;
        };
        let (depot, told, runtime) =
            (depot.clone(), tell.clone(), tokio::runtime::Handle::current());
        let attend = move || {
            runtime.block_on(attend(&depot, channel, &peer, &*told));
            drop(place);
        };
        let thread = std::thread::Builder::new().name("ferry-depot".into());
        if let Err(e) = thread.spawn(attend) {
            tell(DepotEvent::Turned(format!("cannot start a thread for a reader: {e}")));
        }
    }
}

async fn attend(depot: &Depot, channel: Channel, peer: &str, tell: &impl Fn(DepotEvent)) {
    let Channel { mut sink, source, .. } = channel;
    let mut reader = FrameReader::new(source);
    let served = async {
        greeted(&mut reader).await?;
        lend(depot, sink.as_mut(), &mut reader, peer, tell).await
    };
    if let Err(why) = served.await {
        sink.close(&why).await;
        tell(DepotEvent::Turned(format!("turned {peer} away: {why}")));
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

/// Answers requests until the peer has gone.
async fn lend(
    depot: &Depot,
    sink: &mut dyn ByteSink,
    reader: &mut FrameReader,
    peer: &str,
    tell: &impl Fn(DepotEvent),
) -> Result<(), String> {
    let mut files: Vec<Option<File>> = (0..MAX_OPEN_FILES).map(|_| None).collect();
    loop {
        let bytes = match reader.read_message(MAX_TO_DEPOT_BYTES).await {
            Ok(Some(bytes)) => bytes,
            Err(e @ LinkError::TooLong { .. }) => return Err(e.to_string()),
            // That is how a reader leaves.
            Ok(None) | Err(_) => return Ok(()),
        };
        let request: ToDepot =
            wire::decode(&bytes).map_err(|e| format!("it sent nonsense: {e}"))?;
        let mut data = Vec::new();
        let answer = match request {
            ToDepot::Open { file, path } => {
                let place = files.get_mut(usize::from(file)).ok_or("it opens too many files")?;
                match depot.open_file(&path) {
                    Ok((opened, bytes)) => {
                        *place = Some(opened);
                        if path.ends_with("manifest.json") {
                            tell(DepotEvent::Reads { peer: peer.to_owned(), path });
                        }
                        ToReader::Opened { bytes }
                    }
                    Err(why) => why,
                }
            }
            ToDepot::Read { file, at, bytes } => {
                let file = files.get(usize::from(file)).and_then(Option::as_ref);
                let file = file.ok_or("it reads a file that it did not open")?;
                if bytes > MAX_READ_BYTES {
                    return Err(format!("it asks for {bytes} bytes at once"));
                }
                data.resize(usize::try_from(bytes).unwrap_or(0), 0);
                match file.read_exact_at(&mut data, at) {
                    Ok(()) => ToReader::Data { bytes },
                    Err(e) => {
                        data.clear();
                        ToReader::Failed { why: e.to_string() }
                    }
                }
            }
        };
        let message = wire::encode(&answer).map_err(|e| e.to_string())?;
        let sent = async {
            ferry_transport::send_message(sink, &message).await?;
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
