//! The listening side. Handshakes run beside each other: a slow or hostile peer holds up no other.

use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use quinn::crypto::rustls::QuicServerConfig;
use quinn::{Endpoint, Incoming, ServerConfig};
use rustls::server::{NoServerSessionStorage, WebPkiClientVerifier};
use tokio::sync::mpsc;

use super::errors::{self, Phase};
use super::fresh::Fresh;
use super::gate::{Gate, MAX_HANDSHAKES, Pass};
use super::socket::endpoint;
use super::stream::greet;
use super::{
    ALL_EARLY_BYTES, ALPN, EARLY_BYTES, HANDSHAKE_TIMEOUT, UNKNOWN_WINDOW_BYTES, crypto_provider,
    transport_config,
};
use crate::pki::Identity;
use crate::{BoxFuture, Channel, LinkError, Listener};

type Accepted = Result<Channel, LinkError>;

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
        let mut config = Fresh::new(identity, server_config)?;
        let endpoint = endpoint(addr, Some(config.config().as_ref().clone()))?;
        let local =
            endpoint.local_addr().map_err(|e| LinkError::Socket { addr, why: e.to_string() })?;
        let (to, accepted) = mpsc::channel(MAX_HANDSHAKES);
        tokio::spawn(take_in(endpoint, config, to));
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
    let tls = |e: &dyn std::fmt::Display| LinkError::Tls { why: e.to_string() };
    let provider = crypto_provider();
    let verifier =
        WebPkiClientVerifier::builder_with_provider(identity.authority.clone(), provider.clone())
            // A stranger need not learn the authority's name.
            .clear_root_hint_subjects()
            .build()
            .map_err(|e| tls(&e))?;
    let mut config = rustls::ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(|e| tls(&e))?
        .with_client_cert_verifier(verifier)
        .with_cert_resolver(Arc::new(rustls::sign::SingleCertAndKey::from(
            identity.certified.clone(),
        )));
    config.alpn_protocols = vec![ALPN.to_vec()];
    // Every connection shows its certificate.
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    let crypto = QuicServerConfig::try_from(config).map_err(|e| tls(&e))?;
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

/// A place in the gate, until it is dropped.
struct Place {
    gate: Arc<Mutex<Gate>>,
    from: IpAddr,
    proven: bool,
}

impl Drop for Place {
    fn drop(&mut self) {
        lock(&self.gate).done(self.from, self.proven);
    }
}

fn lock(gate: &Mutex<Gate>) -> MutexGuard<'_, Gate> {
    gate.lock().unwrap_or_else(PoisonError::into_inner)
}

async fn take_in(
    endpoint: Endpoint,
    mut config: Fresh<Arc<ServerConfig>>,
    to: mpsc::Sender<Accepted>,
) {
    let (gate, began) = (Arc::new(Mutex::new(Gate::new())), Instant::now());
    loop {
        let incoming = tokio::select! {
            incoming = endpoint.accept() => incoming,
            () = to.closed() => break,
        };
        let Some(incoming) = incoming else { break };
        let (from, proven) = (incoming.remote_address().ip(), incoming.remote_address_validated());
        let pass = lock(&gate).ask(began.elapsed(), from, proven);
        match pass {
            Pass::Accept => {}
            Pass::Prove => {
                // It is not proven, so this cannot fail; and if it did, the peer would try again.
                let _ = incoming.retry();
                continue;
            }
            Pass::Later { first } => {
                let per_s = Gate::PER_ADDRESS_PER_S;
                let remote = from.to_string();
                incoming.ignore();
                if first {
                    drop(to.try_send(Err(LinkError::TooOften { remote, per_s })));
                }
                continue;
            }
            Pass::Busy => {
                incoming.refuse();
                continue;
            }
        }
        let place = Place { gate: gate.clone(), from, proven };
        let (to, config) = (to.clone(), config.config());
        tokio::spawn(async move {
            match handshake(incoming, config).await {
                // The listener may be gone by now, and the channel is dropped with it.
                Ok(channel) => drop(to.send(Ok(channel)).await),
                Err(e) => {
                    tracing::debug!("a peer did not get in: {e}");
                    // Failures that nobody asks for must not keep out others.
                    drop(to.try_send(Err(e)));
                }
            }
            drop(place);
        });
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
