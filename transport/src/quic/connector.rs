//! The connecting side.

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};

use quinn::ClientConfig;
use quinn::crypto::rustls::QuicClientConfig;
use rustls::client::Resumption;

use super::errors::{self, Phase};
use super::fresh::Fresh;
use super::socket::endpoint;
use super::stream::greet;
use super::{ALPN, HANDSHAKE_TIMEOUT, WINDOW_BYTES, crypto_provider, transport_config};
use crate::pki::{Identity, SERVICE_NAME};
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
    let tls = |e: &dyn std::fmt::Display| LinkError::Tls { why: e.to_string() };
    let mut config = rustls::ClientConfig::builder_with_provider(crypto_provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(|e| tls(&e))?
        .with_root_certificates(identity.authority.clone())
        .with_client_cert_resolver(Arc::new(rustls::sign::SingleCertAndKey::from(
            identity.certified.clone(),
        )));
    config.alpn_protocols = vec![ALPN.to_vec()];
    // Every connection shows its certificate.
    config.resumption = Resumption::disabled();
    let crypto = QuicClientConfig::try_from(config).map_err(|e| tls(&e))?;
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
            let endpoint = endpoint(local, None)?;
            let config = self.config.lock().unwrap_or_else(PoisonError::into_inner).config();
            let connecting = endpoint
                .connect_with(config, self.to, SERVICE_NAME)
                .map_err(|e| errors::lost(&remote, e.to_string()))?;
            let connection = match tokio::time::timeout(HANDSHAKE_TIMEOUT, connecting).await {
                Ok(done) => done.map_err(|e| errors::connection(&e, &remote, Phase::Connecting))?,
                Err(_) => return Err(errors::no_answer(&remote)),
            };
            let mut channel = greet(connection, true, Some(endpoint)).await?;
            if let Some(wanted) = self.peer.as_ref().filter(|wanted| !wanted.fits(&channel.peer)) {
                channel.sink.close("this host is not the one that was wanted").await;
                let (found, wanted) = (channel.peer.to_string(), wanted.to_string());
                return Err(LinkError::OtherPeer { remote, found, wanted });
            }
            Ok(channel)
        })
    }

    fn describe(&self) -> String {
        format!("QUIC to {}", self.to)
    }
}
