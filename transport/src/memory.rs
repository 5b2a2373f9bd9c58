//! A link within the process, for tests and for moves between two guests of one process.

use std::net::SocketAddr;

use bytes::Bytes;
use tokio::sync::{mpsc, watch};

use crate::{
    BoxFuture, ByteSink, ByteSource, Channel, Connector, Fingerprint, LinkError, Listener, Peer,
};

/// What memory calls its peer.
const PEER: &str = "memory";
/// Channels that may wait to be accepted.
const BACKLOG: usize = 64;

/// A connector and the listener that it leads to. Each channel holds up to `pieces` pieces in each
/// direction before a sender waits.
pub fn pair(pieces: usize) -> (MemoryConnector, MemoryListener) {
    let (offer, offered) = mpsc::channel(BACKLOG);
    (
        MemoryConnector { offer, pieces: pieces.max(1), name: PEER.to_owned() },
        MemoryListener { offered },
    )
}

/// The two ends of one channel.
pub fn channel(pieces: usize) -> (Channel, Channel) {
    between(pieces, PEER)
}

/// The two ends of one channel; the second one's peer is `name`.
fn between(pieces: usize, name: &str) -> (Channel, Channel) {
    let (to_right, from_left) = mpsc::channel(pieces);
    let (to_left, from_right) = mpsc::channel(pieces);
    let closed = watch::Sender::new(None);
    let end = |name: &str, to, from| Channel {
        peer: Peer { name: name.to_owned(), fingerprint: Fingerprint::of(name.as_bytes()) },
        remote: PEER.to_owned(),
        sink: Box::new(MemorySink { to: Some(to), closed: closed.clone() }),
        source: Box::new(MemorySource { from, closed: closed.subscribe(), finished: false }),
    };
    (end(PEER, to_right, from_right), end(name, to_left, from_left))
}

/// Makes channels to its [`MemoryListener`].
#[derive(Clone)]
pub struct MemoryConnector {
    offer: mpsc::Sender<Channel>,
    pieces: usize,
    /// Who it is to the listener.
    name: String,
}

impl MemoryConnector {
    /// One that leads to the same listener, as host `name`.
    #[must_use]
    pub fn named(&self, name: &str) -> Self {
        Self { name: name.to_owned(), ..self.clone() }
    }
}

impl Connector for MemoryConnector {
    fn connect(&self) -> BoxFuture<'_, Result<Channel, LinkError>> {
        Box::pin(async {
            let (ours, theirs) = between(self.pieces, &self.name);
            self.offer
                .send(theirs)
                .await
                .map_err(|_| LinkError::Refused { remote: PEER.to_owned() })?;
            Ok(ours)
        })
    }

    fn describe(&self) -> String {
        PEER.to_owned()
    }
}

/// Takes in the channels of its [`MemoryConnector`]s.
pub struct MemoryListener {
    offered: mpsc::Receiver<Channel>,
}

impl Listener for MemoryListener {
    fn accept(&mut self) -> BoxFuture<'_, Option<Result<Channel, LinkError>>> {
        Box::pin(async { self.offered.recv().await.map(Ok) })
    }

    fn local_addr(&self) -> Option<SocketAddr> {
        None
    }
}

/// What a piece has at most, as Ferry uses it.
const PIECE_BYTES: u64 = 1 << 20;

enum Piece {
    Data(Bytes),
    Finish,
}

struct MemorySink {
    /// None after the end.
    to: Option<mpsc::Sender<Piece>>,
    /// Why the channel was closed, once it is.
    closed: watch::Sender<Option<String>>,
}

impl MemorySink {
    async fn put(&mut self, piece: Piece) -> Result<(), LinkError> {
        let Some(to) = &self.to else { return Err(lost("this side finished before")) };
        let mut closed = self.closed.subscribe();
        tokio::select! {
            biased;
            reason = closed.wait_for(Option::is_some) => Err(closed_by_peer(reason.ok().as_deref())),
            sent = to.send(piece) => sent.map_err(|_| lost("the peer is gone")),
        }
    }
}

impl ByteSink for MemorySink {
    fn send(&mut self, bytes: Bytes) -> BoxFuture<'_, Result<(), LinkError>> {
        Box::pin(self.put(Piece::Data(bytes)))
    }

    fn holds_bytes(&self) -> u64 {
        self.to.as_ref().map_or(0, |to| to.max_capacity() as u64 * PIECE_BYTES)
    }

    fn finish(&mut self) -> BoxFuture<'_, Result<(), LinkError>> {
        Box::pin(async {
            let done = self.put(Piece::Finish).await;
            self.to = None;
            done
        })
    }

    fn close<'a>(&'a mut self, reason: &'a str) -> BoxFuture<'a, ()> {
        // The first reason stands.
        self.closed.send_if_modified(|said| {
            let first = said.is_none();
            said.get_or_insert_with(|| reason.to_owned());
            first
        });
        // Now, so that whoever sees the end finds the reason.
        self.to = None;
        Box::pin(async {})
    }
}

struct MemorySource {
    from: mpsc::Receiver<Piece>,
    closed: watch::Receiver<Option<String>>,
    finished: bool,
}

impl ByteSource for MemorySource {
    fn recv(&mut self) -> BoxFuture<'_, Result<Option<Bytes>, LinkError>> {
        Box::pin(async {
            while !self.finished {
                let piece = tokio::select! {
                    biased;
                    Ok(reason) = self.closed.wait_for(Option::is_some) => {
                        return Err(closed_by_peer(Some(&reason)));
                    }
                    piece = self.from.recv() => piece,
                };
                match piece {
                    Some(Piece::Data(bytes)) if bytes.is_empty() => {}
                    Some(Piece::Data(bytes)) => return Ok(Some(bytes)),
                    Some(Piece::Finish) => self.finished = true,
                    None => {
                        // It may have been closed since it was asked above.
                        let reason = self.closed.borrow().clone();
                        return Err(match reason {
                            Some(_) => closed_by_peer(Some(&reason)),
                            None => lost("the peer went away before it finished"),
                        });
                    }
                }
            }
            Ok(None)
        })
    }
}

fn lost(why: &str) -> LinkError {
    LinkError::Lost { remote: PEER.to_owned(), why: why.to_owned() }
}

fn closed_by_peer(reason: Option<&Option<String>>) -> LinkError {
    match reason {
        Some(Some(reason)) => LinkError::Closed { remote: PEER.to_owned(), reason: reason.clone() },
        _ => lost("the peer is gone"),
    }
}
