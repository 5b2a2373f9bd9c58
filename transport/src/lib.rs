//! How frames travel: QUIC or TCP with mutual TLS, an in-memory link, identities, allow lists, pacing.
//!
//! A [`Connector`] makes [`Channel`]s to one address and a [`Listener`] takes them in. A channel is one
//! connection with one stream of bytes in each direction: a [`ByteSink`] and a [`ByteSource`], whose
//! peer has proved who it is. A migration uses one channel for control and some more for pages, each a
//! connection of its own, so that they spread over cores and lose packets independently.
//!
//! This crate does not know what the bytes mean: the first ones of a channel say to the engine what it
//! is for.

mod allow;
mod door;
mod either;
mod error;
mod frames;
mod fresh;
mod gate;
pub mod memory;
mod pacing;
mod paths;
mod peer;
pub mod pki;
pub mod quic;
mod secure;
mod tls;

use std::future::Future;
use std::pin::Pin;

use bytes::Bytes;

pub use allow::{Admission, AllowList};
pub use either::{EitherConnector, EitherListener, LinkChoice, Sockets};
pub use error::{CertificateOf, CertificateProblem, LinkError, Over};
pub use frames::{FrameReader, send_message};
pub use pacing::Pacer;
pub use paths::Paths;
pub use peer::{Fingerprint, Peer, PeerRule};
pub use pki::{Identity, PkiError};
pub use quic::{QuicConnector, QuicListener};
pub use secure::{HANDSHAKE_TIMEOUT, IDLE_TIMEOUT};
pub use tls::{TlsConnector, TlsListener};

/// A future in a box, so that links can be chosen while running.
pub type BoxFuture<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;

/// The sending half of a channel: ordered and reliable.
///
/// Dropped without [`finish`](Self::finish), it tells the peer that what came is not complete.
pub trait ByteSink: Send {
    /// Sends all of `bytes`; waits while the link is full.
    fn send(&mut self, bytes: Bytes) -> BoxFuture<'_, Result<(), LinkError>>;
    /// About how many bytes it takes before the link has carried any: how soon they are taken says nothing of the link.
    fn holds_bytes(&self) -> u64;
    /// Tells the peer that everything was sent, and waits until its host has it.
    fn finish(&mut self) -> BoxFuture<'_, Result<(), LinkError>>;
    /// Ends the whole channel at once, in both directions, with a reason for the peer. What the peer
    /// has not read yet may be lost. Waits (a second at most) until the reason is on its way.
    fn close<'a>(&'a mut self, reason: &'a str) -> BoxFuture<'a, ()>;
}

/// The receiving half of a channel.
pub trait ByteSource: Send {
    /// The next bytes, at least one, in pieces of any size. None when the peer finished.
    fn recv(&mut self) -> BoxFuture<'_, Result<Option<Bytes>, LinkError>>;
    /// The next bytes where they are here already: spares a reader the wait.
    fn ready(&mut self) -> Option<Bytes> {
        None
    }
    /// What lets the peer have as much on its way as the link carries. Until it is called, a channel that was
    /// accepted takes little that is not read.
    fn widen(&self) -> Box<dyn FnOnce() + Send> {
        Box::new(|| ())
    }
}

/// One connection to a peer that proved its identity.
pub struct Channel {
    /// Whose certificate the peer showed.
    pub peer: Peer,
    /// Where the peer is, for reports.
    pub remote: String,
    /// To the peer.
    pub sink: Box<dyn ByteSink>,
    /// From the peer.
    pub source: Box<dyn ByteSource>,
}

impl Channel {
    /// This channel, if its peer is `wanted`; None: any peer is.
    pub(crate) async fn to(mut self, wanted: Option<&PeerRule>) -> Result<Self, LinkError> {
        let Some(wanted) = wanted.filter(|wanted| !wanted.fits(&self.peer)) else {
            return Ok(self);
        };
        self.sink.close("this host is not the one that was wanted").await;
        let (found, wanted) = (self.peer.to_string(), wanted.to_string());
        Err(LinkError::OtherPeer { remote: self.remote, found, wanted })
    }
}

impl std::fmt::Debug for Channel {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Channel({} at {})", self.peer.name, self.remote)
    }
}

/// Makes channels to one address.
pub trait Connector: Send + Sync {
    /// Makes a new connection, driven by the tokio runtime of the caller. It is ready, and the peer
    /// has accepted us, when this returns.
    fn connect(&self) -> BoxFuture<'_, Result<Channel, LinkError>>;
    /// Where it leads, for reports.
    fn describe(&self) -> String;
}

/// Takes channels in.
pub trait Listener: Send {
    /// The next peer, or why one did not get in (the listener goes on). None when the listener is gone.
    fn accept(&mut self) -> BoxFuture<'_, Option<Result<Channel, LinkError>>>;
    /// Where it listens, for reports and for a port that the system chose. None in memory.
    fn local_addr(&self) -> Option<std::net::SocketAddr>;
}
