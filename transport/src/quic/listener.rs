//! The listening side. Handshakes run beside each other: a slow or hostile peer holds up no other.

use std::net::{SocketAddr, UdpSocket};
use std::sync::Arc;

use quinn::crypto::rustls::QuicServerConfig;
use quinn::{Endpoint, Incoming, ServerConfig};
use tokio::sync::mpsc;

use super::errors::{self, Phase};
use super::socket::{bind, endpoint};
use super::stream::greet;
use super::{ALL_EARLY_BYTES, EARLY_BYTES, transport_config};
use crate::door::{Accepted, Door};
use crate::fresh::Fresh;
use crate::gate::{MAX_HANDSHAKES, Pass};
use crate::pki::Identity;
use crate::secure::{self, HANDSHAKE_TIMEOUT, UNKNOWN_WINDOW_BYTES};
use crate::{BoxFuture, LinkError, Listener};

/// Takes QUIC connections in, of peers that have a certificate of our authority.
///
/// When it is dropped, the connections that it accepted go on; new ones are refused. The address is
/// free again when the last of them has ended.
pub struct QuicListener {
    local: SocketAddr,
    accepted: mpsc::Receiver<Accepted>,
}

impl QuicListener {
    /// Listens on `addr` (port 0: any free one), as `identity`; if its files are replaced, for new connections as
    /// it is then. Connections are driven by the tokio
    /// runtime of the caller.
    ///
    /// # Errors
    /// The address is in use or not this host's, or TLS does not take the identity.
    pub fn bind(identity: &Identity, addr: SocketAddr) -> Result<Self, LinkError> {
        Self::on(bind(addr)?, identity, Door::new())
    }

    /// Listens on `socket`; who comes in there passes `door`.
    pub(crate) fn on(
        socket: UdpSocket,
        identity: &Identity,
        door: Arc<Door>,
    ) -> Result<Self, LinkError> {
        let mut config = Fresh::new(identity, server_config)?;
        let endpoint = endpoint(socket, Some(config.config().as_ref().clone()))?;
        let local = endpoint.local_addr().map_err(secure::cannot)?;
        let (to, accepted) = mpsc::channel(MAX_HANDSHAKES);
        tokio::spawn(take_in(endpoint, config, door, to));
        Ok(Self { local, accepted })
    }
}

impl Listener for QuicListener {
    fn accept(&mut self) -> BoxFuture<'_, Option<Accepted>> {
        Box::pin(self.accepted.recv())
    }

    fn local_addr(&self) -> Option<SocketAddr> {
        Some(self.local)
    }
}

fn server_config(identity: &Identity) -> Result<Arc<ServerConfig>, LinkError> {
    let tls = secure::server_config(identity)?;
    let crypto = QuicServerConfig::try_from(tls).map_err(secure::cannot)?;
    let mut config = ServerConfig::with_crypto(Arc::new(crypto));
    // Hosts do not move between addresses within seconds.
    config
        .migration(false)
        .transport_config(transport_config(UNKNOWN_WINDOW_BYTES))
        .max_incoming(2 * MAX_HANDSHAKES)
        .incoming_buffer_size(EARLY_BYTES)
        .incoming_buffer_size_total(ALL_EARLY_BYTES);
    Ok(Arc::new(config))
}

async fn take_in(
    endpoint: Endpoint,
    mut config: Fresh<Arc<ServerConfig>>,
    door: Arc<Door>,
    to: mpsc::Sender<Accepted>,
) {
    loop {
        let incoming = tokio::select! {
            incoming = endpoint.accept() => incoming,
            () = to.closed() => break,
        };
        let Some(incoming) = incoming else { break };
        let from = incoming.remote_address().ip();
        let place = match door.ask(from, incoming.remote_address_validated(), &to) {
            Ok(place) => place,
            Err(Pass::Prove) => {
                // It is not proven, so this cannot fail; and if it did, the peer would try again.
                let _ = incoming.retry();
                continue;
            }
            Err(Pass::Later { .. }) => {
                incoming.ignore();
                continue;
            }
            Err(Pass::Busy | Pass::Accept) => {
                incoming.refuse();
                continue;
            }
        };
        let (to, config) = (to.clone(), config.config());
        tokio::spawn(async move { place.hand_over(handshake(incoming, config).await, &to).await });
    }
    loop {
        tokio::select! {
            Some(incoming) = endpoint.accept() => incoming.refuse(),
            () = endpoint.wait_idle() => break,
        }
    }
}

async fn handshake(incoming: Incoming, config: Arc<ServerConfig>) -> Accepted {
    let remote = incoming.remote_address().to_string();
    let fail = |e| errors::connection(&e, &remote, Phase::Established);
    let connecting = incoming.accept_with(config).map_err(fail)?;
    match tokio::time::timeout(HANDSHAKE_TIMEOUT, connecting).await {
        Ok(done) => greet(done.map_err(fail)?, false, None).await,
        Err(_) => Err(LinkError::TimedOut { remote, seconds: HANDSHAKE_TIMEOUT.as_secs() }),
    }
}
