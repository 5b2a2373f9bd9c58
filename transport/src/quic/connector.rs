//! The connecting side.

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};

use quinn::ClientConfig;
use quinn::crypto::rustls::QuicClientConfig;

use super::errors::{self, Phase};
use super::socket::{bind, endpoint};
use super::stream::greet;
use super::transport_config;
use crate::fresh::Fresh;
use crate::pki::{Identity, SERVICE_NAME};
use crate::secure::{self, HANDSHAKE_TIMEOUT, WINDOW_BYTES};
use crate::{BoxFuture, Channel, Connector, LinkError, PeerRule};

/// Makes QUIC connections to one address, each with a UDP socket of its own.
pub struct QuicConnector {
    to: SocketAddr,
    config: Mutex<Fresh<ClientConfig>>,
    /// Who must be there.
    peer: Option<PeerRule>,
}

impl QuicConnector {
    /// Connections to `to`, as `identity`; new ones as it is then, if its files are replaced.
    ///
    /// # Errors
    /// TLS does not take the identity.
    pub fn new(identity: &Identity, to: SocketAddr) -> Result<Self, LinkError> {
        let config = Mutex::new(Fresh::new(identity, client_config)?);
        Ok(Self { to, config, peer: None })
    }

    /// Whoever is there must be `peer`; None: any host of our authority.
    #[must_use]
    pub fn to_peer(self, peer: Option<PeerRule>) -> Self {
        Self { peer, ..self }
    }
}

fn client_config(identity: &Identity) -> Result<ClientConfig, LinkError> {
    let tls = secure::client_config(identity)?;
    let crypto = QuicClientConfig::try_from(tls).map_err(secure::cannot)?;
    let mut config = ClientConfig::new(Arc::new(crypto));
    config.transport_config(transport_config(WINDOW_BYTES));
    Ok(config)
}

impl Connector for QuicConnector {
    fn connect(&self) -> BoxFuture<'_, Result<Channel, LinkError>> {
        Box::pin(async {
            let remote = self.to.to_string();
            let local: SocketAddr = match self.to {
                SocketAddr::V4(_) => (Ipv4Addr::UNSPECIFIED, 0).into(),
                SocketAddr::V6(_) => (Ipv6Addr::UNSPECIFIED, 0).into(),
            };
            let endpoint = endpoint(bind(local)?, None)?;
            let config = self.config.lock().unwrap_or_else(PoisonError::into_inner).config();
            let connecting = endpoint
                .connect_with(config, self.to, SERVICE_NAME)
                .map_err(|e| errors::lost(&remote, e.to_string()))?;
            let connection = match tokio::time::timeout(HANDSHAKE_TIMEOUT, connecting).await {
                Ok(done) => done.map_err(|e| errors::connection(&e, &remote, Phase::Connecting))?,
                Err(_) => return Err(errors::no_answer(&remote)),
            };
            greet(connection, true, Some(endpoint)).await?.to(self.peer.as_ref()).await
        })
    }

    fn describe(&self) -> String {
        format!("QUIC to {}", self.to)
    }
}
