//! The socket: one machine comes in, and hands its memory over.

use std::io::{self, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use ferry_memory::Userfault;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use crate::peer::peer_of;
use crate::serve::{Cause, Machine};
use crate::{Handover, HandoverError, Memory, Report};

/// Firecracker sends at once when it has connected.
const PATIENCE: Duration = Duration::from_secs(10);
/// More descriptors than any hand-over has; the kernel drops what is beyond.
const MOST_FDS: usize = 8;

/// Why a machine was not served to its end.
#[derive(Debug, thiserror::Error)]
pub enum PagerError {
    /// The system refused something about the socket.
    #[error("cannot {action} {}: {source}", .path.display())]
    Socket {
        /// What was being done.
        action: &'static str,
        /// The socket.
        path: PathBuf,
        /// The system's word.
        source: io::Error,
    },
    /// The process that connected cannot be watched.
    #[error(
        "cannot watch the process that connected: {0}; run the pager in the PID namespace of Firecracker, or in one above it"
    )]
    Peer(io::Error),
    /// What came is no hand-over, and no machine waits for it.
    #[error(transparent)]
    Handover(#[from] HandoverError),
    /// The machine could not go on, and was ended.
    #[error("{cause}; ended the machine (process {pid}): it would have waited for ever")]
    Killed {
        /// Firecracker's.
        pid: i32,
        /// Why.
        cause: Cause,
    },
    /// The machine cannot go on, and could not be ended.
    #[error(
        "{cause}; the machine (process {pid}) waits for ever, and could not be ended: {source}; kill it"
    )]
    NotKilled {
        /// Firecracker's.
        pid: i32,
        /// Why.
        cause: Cause,
        /// The system's word.
        source: io::Error,
    },
}

/// A socket at which one machine is waited for. Its file is removed when the machine has come, or when this
/// is dropped.
#[derive(Debug)]
pub struct Door {
    listener: UnixListener,
    path: PathBuf,
}

/// The process on the other side, by a descriptor that stays its own.
#[derive(Debug)]
pub(crate) struct Peer {
    pub(crate) pid: Pid,
    pidfd: OwnedFd,
}

impl Door {
    /// Listens at `path`. A socket there that nobody listens to, which a pager that was killed left, is
    /// replaced.
    ///
    /// # Errors
    /// There is something else, or the system refuses.
    pub fn open(path: &Path) -> Result<Self, PagerError> {
        let failed =
            |source| PagerError::Socket { action: "listen at", path: path.to_owned(), source };
        let is_socket = std::fs::symlink_metadata(path).is_ok_and(|m| m.file_type().is_socket());
        let dead = |e: io::Error| e.kind() == io::ErrorKind::ConnectionRefused;
        if is_socket && UnixStream::connect(path).is_err_and(dead) {
            std::fs::remove_file(path).map_err(failed)?;
        }
        let listener = UnixListener::bind(path).map_err(failed)?;
        Ok(Self { listener, path: path.to_owned() })
    }

    /// Waits for a machine and serves it from `memory` until it needs no pager any more. With `ahead` pages
    /// that nobody waits for are loaded, too. `stop` is an eventfd: what is written to it asks the pager to
    /// leave, as the crate's documentation says. None if that was before a machine came.
    ///
    /// # Errors
    /// No machine, or one that had to be ended.
    pub fn serve(
        self,
        memory: &Memory,
        ahead: bool,
        stop: BorrowedFd<'_>,
    ) -> Result<Option<Report>, PagerError> {
        let failed = |action, e: Errno| PagerError::Socket {
            action,
            path: self.path.clone(),
            source: e.into(),
        };
        loop {
            let mut fds = [
                PollFd::new(&self.listener, PollFlags::IN),
                PollFd::from_borrowed_fd(stop, PollFlags::IN),
            ];
            match poll(&mut fds, None) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(e) => return Err(failed("wait at", e)),
            }
            if !fds[1].revents().is_empty() {
                return Ok(None);
            }
            if !fds[0].revents().is_empty() {
                break;
            }
        }
        let (stream, _) = self.listener.accept().map_err(|source| PagerError::Socket {
            action: "accept at",
            path: self.path.clone(),
            source,
        })?;
        // A second machine shall be told that there is no pager for it, rather than wait here.
        drop(self);
        let peer = Peer::of(&stream).map_err(PagerError::Peer)?;
        tracing::info!("process {} has connected", peer.pid.as_raw_nonzero());
        let (handover, userfault) = Arrived::receive(&stream).handover(memory, &peer)?;
        let (mib, pages) = (memory.bytes() >> 20, handover.pages());
        tracing::info!(
            "it handed over {mib} MiB, {pages} pages of {} bytes",
            handover.page_bytes()
        );
        match Machine::new(&peer, userfault, handover, memory).and_then(|m| m.serve(ahead, stop)) {
            Ok(report) => Ok(Some(report)),
            Err(cause) => Err(peer.end(cause)),
        }
    }
}

impl Drop for Door {
    fn drop(&mut self) {
        // Another may have removed it; one that stays is replaced by the next pager.
        let _ = std::fs::remove_file(&self.path);
    }
}

impl Peer {
    /// Whoever connected.
    fn of(stream: &UnixStream) -> io::Result<Self> {
        let unseen = || io::Error::other("it is in a PID namespace that cannot be seen from here");
        let pid = peer_of(stream)?.ok_or_else(unseen)?;
        Ok(Self { pid, pidfd: pidfd_open(pid, PidfdFlags::empty())? })
    }

    /// Readable when the process has ended.
    pub(crate) fn fd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }

    /// Whether the process ends within `time`.
    pub(crate) fn ends_within(&self, time: Duration) -> bool {
        wait(self.fd(), time).unwrap_or(false)
    }

    /// Ends the process, whose memory cannot be had.
    fn end(&self, cause: Cause) -> PagerError {
        let pid = self.pid.as_raw_nonzero().get();
        match pidfd_send_signal(&self.pidfd, Signal::KILL) {
            Ok(()) => PagerError::Killed { pid, cause },
            Err(e) => PagerError::NotKilled { pid, cause, source: e.into() },
        }
    }
}

/// What a connection brought.
struct Arrived {
    said: Result<Handover, HandoverError>,
    fds: Vec<OwnedFd>,
}

impl Arrived {
    fn receive(stream: &UnixStream) -> Self {
        let (mut text, mut fds) = (Vec::new(), Vec::new());
        let until = Instant::now() + PATIENCE;
        let said = loop {
            match Handover::parse(&text) {
                Ok(Some(handover)) => break Ok(handover),
                Ok(None) => {}
                Err(e) => break Err(e),
            }
            let left = until.saturating_duration_since(Instant::now());
            match wait(stream.as_fd(), left) {
                Ok(true) => {}
                Ok(false) => break Err(HandoverError::Slow { seconds: PATIENCE.as_secs() }),
                Err(_) => break Err(HandoverError::Cut(text.len())),
            }
            match receive_some(stream, &mut text, &mut fds) {
                Ok(0) | Err(_) => break Err(HandoverError::Cut(text.len())),
                Ok(_) => {}
            }
        };
        Self { said, fds }
    }

    /// The hand-over, if it is one of a machine with `memory`.
    fn handover(self, memory: &Memory, peer: &Peer) -> Result<(Handover, Userfault), PagerError> {
        let count = self.fds.len();
        let mut adopted: Vec<_> = self.fds.into_iter().map(Userfault::adopt).collect();
        // Only who has handed a userfaultfd over waits for us.
        let waits = adopted.iter().any(Result::is_ok);
        let one = match adopted.pop() {
            Some(one) if count == 1 => one.map_err(HandoverError::NotUserfault),
            _ => Err(HandoverError::Descriptors(count)),
        };
        // What it said explains what it sent.
        let accepted = self.said.and_then(|handover| {
            handover.check(memory.bytes(), &memory.name())?;
            Ok((handover, one?))
        });
        accepted.map_err(
            |e| {
                if waits { peer.end(Cause::Handover(e)) } else { PagerError::Handover(e) }
            },
        )
    }
}

/// Appends what has come to `text` and `fds`; how many bytes it was.
fn receive_some(
    stream: &UnixStream,
    text: &mut Vec<u8>,
    fds: &mut Vec<OwnedFd>,
) -> io::Result<usize> {
    let mut bytes = [0; 4096];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MOST_FDS))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut parts = [IoSliceMut::new(&mut bytes)];
    let got = loop {
        match recvmsg(stream, &mut parts, &mut control, RecvFlags::CMSG_CLOEXEC) {
            Err(Errno::INTR) => {}
            got => break got?,
        }
    };
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = message {
            fds.extend(rights);
        }
    }
    text.extend_from_slice(&bytes[..got.bytes]);
    Ok(got.bytes)
}

/// Whether something can be read from `fd` within `time`.
fn wait(fd: BorrowedFd<'_>, time: Duration) -> io::Result<bool> {
    let until = Instant::now() + time;
    loop {
        let left = until.saturating_duration_since(Instant::now());
        let left = Timespec::try_from(left).map_err(io::Error::other)?;
        let mut fds = [PollFd::from_borrowed_fd(fd, PollFlags::IN)];
        match poll(&mut fds, Some(&left)) {
            Ok(ready) => return Ok(ready > 0),
            Err(Errno::INTR) => {}
            Err(e) => return Err(e.into()),
        }
    }
}
