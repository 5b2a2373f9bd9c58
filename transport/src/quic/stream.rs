//! The two halves of a QUIC channel.

use std::collections::VecDeque;

use bytes::Bytes;
use quinn::{Connection, Endpoint, ReadError, ReadExactError, RecvStream, SendStream, VarInt};

use super::GREETING;
use super::errors::{self, Phase};
use crate::secure::{self, CLOSE_WAIT, HANDSHAKE_TIMEOUT, WINDOW_BYTES};
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
    Ok(Channel {
        peer,
        remote: remote.clone(),
        sink: Box::new(QuicSink {
            connection: connection.clone(),
            endpoint,
            stream: send,
            finished: false,
            remote: remote.clone(),
        }),
        source: Box::new(QuicSource { connection, stream: recv, pieces: VecDeque::new(), remote }),
    })
}

fn peer_of(connection: &Connection) -> Option<Peer> {
    let identity = connection.peer_identity()?;
    let chain = identity.downcast::<Vec<rustls::pki_types::CertificateDer<'static>>>().ok()?;
    secure::peer_of(&chain)
}

struct QuicSink {
    connection: Connection,
    endpoint: Option<Endpoint>,
    stream: SendStream,
    finished: bool,
    remote: String,
}

impl ByteSink for QuicSink {
    fn send(&mut self, bytes: Bytes) -> BoxFuture<'_, Result<(), LinkError>> {
        Box::pin(async {
            self.stream.write_chunk(bytes).await.map_err(|e| errors::write(e, &self.remote))
        })
    }

    fn finish(&mut self) -> BoxFuture<'_, Result<(), LinkError>> {
        Box::pin(async {
            self.stream
                .finish()
                .map_err(|_| errors::lost(&self.remote, "this side finished before"))?;
            self.finished = true;
            match self.stream.stopped().await {
                Ok(None) => Ok(()),
                Ok(Some(_)) => Err(errors::lost(&self.remote, "the peer stopped reading")),
                Err(quinn::StoppedError::ConnectionLost(e)) => {
                    Err(errors::connection(&e, &self.remote, Phase::Established))
                }
                Err(e) => Err(errors::lost(&self.remote, e.to_string())),
            }
        })
    }

    fn close<'a>(&'a mut self, reason: &'a str) -> BoxFuture<'a, ()> {
        Box::pin(async {
            self.connection.close(CODE, reason.as_bytes());
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
    /// Keeps the connection alive as long as somebody may read from it.
    connection: Connection,
    stream: RecvStream,
    pieces: VecDeque<Bytes>,
    remote: String,
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
                Err(e) => return Err(errors::read(e, &self.remote)),
            };
            self.pieces.extend(pieces.into_iter().take(read));
            Ok(self.pieces.pop_front())
        })
    }

    fn ready(&mut self) -> Option<Bytes> {
        self.pieces.pop_front()
    }

    fn widen(&self) -> Box<dyn FnOnce() + Send> {
        let connection = self.connection.clone();
        Box::new(move || connection.set_receive_window(VarInt::from_u32(WINDOW_BYTES)))
    }
}
