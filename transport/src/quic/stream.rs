//! The two halves of a QUIC channel.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use bytes::Bytes;
use quinn::{Connection, Endpoint, ReadError, ReadExactError, RecvStream, SendStream, VarInt};
use tokio::task::JoinHandle;

use super::GREETING;
use super::errors::{self, Phase};
use crate::secure::{self, CLOSE_WAIT, HANDSHAKE_TIMEOUT, IDLE_TIMEOUT, KEEP_ALIVE, WINDOW_BYTES};
use crate::{BoxFuture, ByteSink, ByteSource, Channel, LinkError, Over, Peer};

/// Pieces that are taken from quinn at once.
const PIECES: usize = 32;
/// The application's error code: only the reason matters.
const CODE: VarInt = VarInt::from_u32(1);

/// Makes a channel of an established connection: `opens` is the side that opens the stream. `endpoint`
/// is the connection's own, where it has one.
pub(super) async fn greet(
    connection: Connection,
    opens: bool,
    endpoint: Option<Endpoint>,
) -> Result<Channel, LinkError> {
    let remote = connection.remote_address().to_string();
    let greeted = tokio::time::timeout(HANDSHAKE_TIMEOUT, async {
        let lost = |e| errors::connection(&e, &remote, Phase::Established);
        let (mut send, mut recv) = if opens {
            connection.open_bi().await.map_err(lost)?
        } else {
            connection.accept_bi().await.map_err(lost)?
        };
        if opens {
            send.write_all(&GREETING).await.map_err(|e| errors::write(e, &remote))?;
        }
        let mut theirs = [0; GREETING.len()];
        match recv.read_exact(&mut theirs).await {
            Ok(()) if theirs == GREETING => {}
            Ok(()) | Err(ReadExactError::FinishedEarly(_)) => {
                return Err(LinkError::NotFerry { over: Over::Quic, remote: remote.clone() });
            }
            Err(ReadExactError::ReadError(e)) => return Err(errors::read(e, &remote)),
        }
        if !opens {
            send.write_all(&GREETING).await.map_err(|e| errors::write(e, &remote))?;
        }
        Ok((send, recv))
    })
    .await;
    let (send, recv) = match greeted {
        Ok(streams) => streams?,
        Err(_) => {
            return Err(LinkError::TimedOut { remote, seconds: HANDSHAKE_TIMEOUT.as_secs() });
        }
    };
    let peer = peer_of(&connection).ok_or_else(|| errors::lost(&remote, secure::NAMELESS))?;
    let heard = Arc::new(Heard::watch(connection, remote.clone()));
    Ok(Channel {
        peer,
        remote,
        sink: Box::new(QuicSink { heard: heard.clone(), endpoint, stream: send, finished: false }),
        source: Box::new(QuicSource { heard, stream: recv, pieces: VecDeque::new() }),
    })
}

fn peer_of(connection: &Connection) -> Option<Peer> {
    let identity = connection.peer_identity()?;
    let chain = identity.downcast::<Vec<rustls::pki_types::CertificateDer<'static>>>().ok()?;
    secure::peer_of(&chain)
}

/// A connection that is given up when its peer was silent for [`IDLE_TIMEOUT`], and lives as long as somebody may
/// read from it or write to it.
///
/// QUIC's own idle time-out is never shorter than three probe time-outs (RFC 9000, 10.1), which grow with the round
/// trip that was measured last: a host that stood still for 16 s took the acknowledgements that waited for it for a
/// round trip of 16 s, and then missed a peer that was gone only after 54 s.
struct Heard {
    connection: Connection,
    remote: String,
    silent: Arc<AtomicBool>,
    watch: JoinHandle<()>,
}

impl Heard {
    fn watch(connection: Connection, remote: String) -> Self {
        let silent = Arc::new(AtomicBool::new(false));
        let watch = tokio::spawn({
            let (connection, silent) = (connection.clone(), silent.clone());
            async move {
                let mut quiet = Duration::ZERO;
                let mut heard = 0;
                while quiet < IDLE_TIMEOUT {
                    // Time in which this process stood still counts once: what came meanwhile is yet to be read.
                    tokio::time::sleep(KEEP_ALIVE).await;
                    let datagrams = connection.stats().udp_rx.datagrams;
                    quiet = if datagrams == heard { quiet + KEEP_ALIVE } else { Duration::ZERO };
                    heard = datagrams;
                }
                // If it was lost before, that is known by now.
                silent.store(connection.close_reason().is_none(), Ordering::Release);
                connection.close(CODE, b"nothing was heard");
            }
        });
        Self { connection, remote, silent, watch }
    }

    /// Why the connection is lost, if `error` only says that it was given up here.
    fn why(&self, error: LinkError) -> LinkError {
        match self.silent.load(Ordering::Acquire) {
            true => errors::silent(&self.remote),
            false => error,
        }
    }
}

impl Drop for Heard {
    fn drop(&mut self) {
        self.watch.abort();
        // As quinn does when nobody has the connection any more.
        self.connection.close(VarInt::from_u32(0), b"");
    }
}

struct QuicSink {
    heard: Arc<Heard>,
    endpoint: Option<Endpoint>,
    stream: SendStream,
    finished: bool,
}

impl ByteSink for QuicSink {
    fn send(&mut self, bytes: Bytes) -> BoxFuture<'_, Result<(), LinkError>> {
        Box::pin(async {
            let Heard { remote, .. } = &*self.heard;
            let sent = self.stream.write_chunk(bytes).await;
            sent.map_err(|e| self.heard.why(errors::write(e, remote)))
        })
    }

    fn holds_bytes(&self) -> u64 {
        WINDOW_BYTES.into()
    }

    fn finish(&mut self) -> BoxFuture<'_, Result<(), LinkError>> {
        Box::pin(async {
            let Heard { remote, .. } = &*self.heard;
            self.stream.finish().map_err(|_| errors::lost(remote, "this side finished before"))?;
            self.finished = true;
            match self.stream.stopped().await {
                Ok(None) => Ok(()),
                Ok(Some(_)) => Err(errors::lost(remote, "the peer stopped reading")),
                Err(quinn::StoppedError::ConnectionLost(e)) => {
                    Err(self.heard.why(errors::connection(&e, remote, Phase::Established)))
                }
                Err(e) => Err(errors::lost(remote, e.to_string())),
            }
        })
    }

    fn close<'a>(&'a mut self, reason: &'a str) -> BoxFuture<'a, ()> {
        Box::pin(async {
            self.heard.connection.close(CODE, reason.as_bytes());
            if let Some(endpoint) = &self.endpoint {
                // The peer may be gone: then there is nobody to wait for.
                let _ = tokio::time::timeout(CLOSE_WAIT, endpoint.wait_idle()).await;
            }
        })
    }
}

impl Drop for QuicSink {
    fn drop(&mut self) {
        // quinn takes a dropped stream for a finished one; here only `finish` finishes.
        if !self.finished {
            let _ = self.stream.reset(CODE);
        }
    }
}

struct QuicSource {
    heard: Arc<Heard>,
    stream: RecvStream,
    pieces: VecDeque<Bytes>,
}

impl ByteSource for QuicSource {
    fn recv(&mut self) -> BoxFuture<'_, Result<Option<Bytes>, LinkError>> {
        Box::pin(async {
            if let Some(piece) = self.pieces.pop_front() {
                return Ok(Some(piece));
            }
            let mut pieces = [const { Bytes::new() }; PIECES];
            let read = match self.stream.read_chunks(&mut pieces).await {
                Ok(read) => read.unwrap_or(0),
                // After the end was read once.
                Err(ReadError::ClosedStream) => 0,
                Err(e) => return Err(self.heard.why(errors::read(e, &self.heard.remote))),
            };
            self.pieces.extend(pieces.into_iter().take(read));
            Ok(self.pieces.pop_front())
        })
    }

    fn ready(&mut self) -> Option<Bytes> {
        self.pieces.pop_front()
    }

    fn widen(&self) -> Box<dyn FnOnce() + Send> {
        let connection = self.heard.connection.clone();
        Box::new(move || connection.set_receive_window(VarInt::from_u32(WINDOW_BYTES)))
    }
}
