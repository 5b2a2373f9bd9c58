//! The connecting side.

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;

use quinn::ClientConfig;
use quinn::crypto::rustls::QuicClientConfig;
use rustls::client::Resumption;

use super::errors::{self, Phase};
use super::socket::endpoint;
use super::stream::greet;
use super::{ALPN, HANDSHAKE_TIMEOUT, crypto_provider, transport_config};
use crate::pki::{Identity, SERVICE_NAME};
use crate::{BoxFuture, Channel, Connector, LinkError};

/// Makes QUIC connections to one address, each with a UDP socket of its own.
pub struct QuicConnector {
    to: SocketAddr,
    config: ClientConfig,
}

impl QuicConnector {
    /// Connections to `to`, as `identity`.
    ///
    /// # Errors
    /// TLS does not take the identity.
    pub fn new(identity: &Identity, to: SocketAddr) -> Result<Self, LinkError> {
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
        config.transport_config(transport_config());
        Ok(Self { to, config })
    }
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
            let connecting = endpoint
                .connect_with(self.config.clone(), self.to, SERVICE_NAME)
                .map_err(|e| errors::lost(&remote, e.to_string()))?;
            let connection = match tokio::time::timeout(HANDSHAKE_TIMEOUT, connecting).await {
                Ok(done) => done.map_err(|e| errors::connection(&e, &remote, Phase::Connecting))?,
                Err(_) => return Err(errors::no_answer(&remote)),
            };
            greet(connection, true, Some(endpoint)).await
        })
    }

    fn describe(&self) -> String {
        format!("QUIC to {}", self.to)
    }
}
