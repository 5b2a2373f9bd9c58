//! The listening side. Handshakes run beside each other: a slow or hostile peer holds up no other.

use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;
use std::time::Duration;

use bytes::BytesMut;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::mpsc;
use tokio::time::{sleep, timeout};
use tokio_rustls::TlsAcceptor;

use super::driver::drive;
use super::flow::Flow;
use super::halves::Shared;
use super::{Io, buffered, errors};
use crate::door::{Accepted, Door};
use crate::fresh::Fresh;
use crate::gate::MAX_HANDSHAKES;
use crate::pki::Identity;
use crate::secure::{self, CLOSE_WAIT, HANDSHAKE_TIMEOUT, UNKNOWN_WINDOW_BYTES, grow_buffers};
use crate::{BoxFuture, LinkError, Listener, Over};

/// How long nobody is taken in when the process has no descriptor left.
const BREATH: Duration = Duration::from_millis(100);

/// Takes connections of TLS over TCP in, of peers that have a certificate of our authority.
///
/// When it is dropped, the connections that it accepted go on; new ones are refused.
pub struct TlsListener {
    local: SocketAddr,
    accepted: mpsc::Receiver<Accepted>,
}

pub(crate) fn bind(addr: SocketAddr) -> Result<TcpListener, LinkError> {
    TcpListener::bind(addr).map_err(|e| LinkError::socket(Over::Tls, addr, &e))
}

impl TlsListener {
    /// Listens on `addr` (port 0: any free one), as `identity`; if its files are replaced, for new connections as
    /// it is then. Connections are driven by the tokio runtime of the caller.
    ///
    /// # Errors
    /// The address is in use or not this host's, or TLS does not take the identity.
    pub fn bind(identity: &Identity, addr: SocketAddr) -> Result<Self, LinkError> {
        Self::on(bind(addr)?, identity, Door::new())
    }

    /// Listens on `socket`; who comes in there passes `door`.
    pub(crate) fn on(
        socket: TcpListener,
        identity: &Identity,
        door: Arc<Door>,
    ) -> Result<Self, LinkError> {
        let local = socket.local_addr().map_err(secure::cannot)?;
        let fail = |e| LinkError::socket(Over::Tls, local, &e);
        grow_buffers(&socket);
        socket.set_nonblocking(true).map_err(fail)?;
        let socket = tokio::net::TcpListener::from_std(socket).map_err(fail)?;
        let make = |identity: &Identity| secure::server_config(identity).map(Arc::new);
        let config = Fresh::new(identity, make)?;
        let (to, accepted) = mpsc::channel(MAX_HANDSHAKES);
        tokio::spawn(take_in(socket, config, door, to));
        Ok(Self { local, accepted })
    }
}

impl Listener for TlsListener {
    fn accept(&mut self) -> BoxFuture<'_, Option<Accepted>> {
        Box::pin(self.accepted.recv())
    }

    fn local_addr(&self) -> Option<SocketAddr> {
        Some(self.local)
    }
}

async fn take_in(
    listener: tokio::net::TcpListener,
    mut config: Fresh<Arc<rustls::ServerConfig>>,
    door: Arc<Door>,
    to: mpsc::Sender<Accepted>,
) {
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = to.closed() => break,
        };
        let Ok((socket, remote)) = accepted else {
            // A peer that is gone already, or no descriptor left.
            sleep(BREATH).await;
            continue;
        };
        // Who answers at an address is there.
        let Ok(place) = door.ask(remote.ip(), true, &to) else {
            // At once, and nothing is kept of it. An honest peer asks again.
            let _ = socket.set_zero_linger();
            continue;
        };
        let (to, config) = (to.clone(), config.config());
        tokio::spawn(async move {
            let accepted = timeout(HANDSHAKE_TIMEOUT, handshake(socket, config, &remote)).await;
            let accepted = accepted.unwrap_or_else(|_| Err(errors::timed_out(&remote.to_string())));
            place.hand_over(accepted, &to).await;
        });
    }
}

async fn handshake(
    socket: TcpStream,
    config: Arc<rustls::ServerConfig>,
    remote: &SocketAddr,
) -> Accepted {
    let remote = remote.to_string();
    let socket = buffered(socket).map_err(|e| errors::io(&e, &remote))?;
    let stream = match TlsAcceptor::from(config).accept(socket).into_fallible().await {
        Ok(stream) => stream,
        Err((e, socket)) => {
            let _ = timeout(CLOSE_WAIT, hang_up(socket)).await;
            return Err(errors::io(&e, &remote));
        }
    };
    if !secure::is_ours(stream.get_ref().1.alpn_protocol()) {
        return Err(errors::not_ferry(&remote));
    }
    let peer = stream.get_ref().1.peer_certificates().and_then(secure::peer_of);
    let peer = peer.ok_or_else(|| errors::lost(&remote, secure::NAMELESS))?;
    // Its first frame tells the peer that it got in.
    let shared = Shared::new(Flow::new(&remote, UNKNOWN_WINDOW_BYTES));
    let channel = shared.channel(peer, &remote);
    drive(stream.into(), BytesMut::new(), shared, remote);
    Ok(channel)
}

/// Ends a connection so that the alert, which says why, is not lost: a socket that is closed before all was read
/// takes back what was sent.
async fn hang_up(mut socket: Io) {
    let _ = socket.shutdown().await;
    let mut nobody = [0; 1024];
    while matches!(socket.read(&mut nobody).await, Ok(1..)) {}
}
