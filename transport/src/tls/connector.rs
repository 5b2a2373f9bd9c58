//! The connecting side.

use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::BytesMut;
use rustls::pki_types::ServerName;
use tokio::io::AsyncReadExt;
use tokio::net::TcpSocket;
use tokio::time::{Instant, sleep, timeout};
use tokio_rustls::client::TlsStream;

use super::driver::drive;
use super::flow::{self, Flow};
use super::halves::Shared;
use super::{Io, buffered, errors};
use crate::fresh::Fresh;
use crate::pki::{Identity, SERVICE_NAME};
use crate::secure::{self, HANDSHAKE_TIMEOUT, WINDOW_BYTES, grow_buffers};
use crate::{BoxFuture, Channel, Connector, LinkError, PeerRule};

/// How soon a listener that is busy is asked again.
const AGAIN: Duration = Duration::from_millis(300);

/// Makes connections of TLS over TCP to one address.
pub struct TlsConnector {
    to: SocketAddr,
    config: Mutex<Fresh<Arc<rustls::ClientConfig>>>,
    /// Who must be there.
    peer: Option<PeerRule>,
}

impl TlsConnector {
    /// Connections to `to`, as `identity`; new ones as it is then, if its files are replaced.
    ///
    /// # Errors
    /// TLS does not take the identity.
    pub fn new(identity: &Identity, to: SocketAddr) -> Result<Self, LinkError> {
        let make = |identity: &Identity| secure::client_config(identity).map(Arc::new);
        let config = Mutex::new(Fresh::new(identity, make)?);
        Ok(Self { to, config, peer: None })
    }

    /// Whoever is there must be `peer`; None: any host of our authority.
    #[must_use]
    pub fn to_peer(self, peer: Option<PeerRule>) -> Self {
        Self { peer, ..self }
    }

    /// A connection that is encrypted, if the listener has a place for it.
    async fn dial(&self, connector: &tokio_rustls::TlsConnector) -> io::Result<TlsStream<Io>> {
        let socket = match self.to {
            SocketAddr::V4(_) => TcpSocket::new_v4(),
            SocketAddr::V6(_) => TcpSocket::new_v6(),
        }?;
        grow_buffers(&socket);
        let socket = buffered(socket.connect(self.to).await?)?;
        let name = ServerName::try_from(SERVICE_NAME).map_err(io::Error::other)?;
        connector.connect(name, socket).await
    }

    /// A connection whose listener has said something, and what.
    async fn shake_hands(&self, remote: &str) -> Result<(TlsStream<Io>, BytesMut), LinkError> {
        let config = self.config.lock().unwrap_or_else(PoisonError::into_inner).config();
        let connector = tokio_rustls::TlsConnector::from(config);
        let refused = || LinkError::Refused { remote: remote.to_owned() };
        let began = Instant::now();
        let mut stream = loop {
            match self.dial(&connector).await {
                Ok(stream) => break stream,
                Err(e) if e.kind() == io::ErrorKind::ConnectionRefused => return Err(refused()),
                Err(e) if !errors::is_hung_up(&e) => return Err(errors::io(&e, remote)),
                // It has no place for us at the moment.
                Err(_) if began.elapsed() + AGAIN < HANDSHAKE_TIMEOUT => sleep(AGAIN).await,
                Err(_) => return Err(refused()),
            }
        };
        if !secure::is_ours(stream.get_ref().1.alpn_protocol()) {
            return Err(errors::not_ferry(remote));
        }
        let mut input = BytesMut::new();
        while input.len() < flow::FIRST_BYTES {
            match stream.read_buf(&mut input).await {
                Ok(1..) => {}
                Ok(0) => return Err(errors::lost(remote, "the peer hung up on us")),
                Err(e) => return Err(errors::io(&e, remote)),
            }
        }
        Ok((stream, input))
    }
}

impl Connector for TlsConnector {
    fn connect(&self) -> BoxFuture<'_, Result<Channel, LinkError>> {
        Box::pin(async {
            let remote = self.to.to_string();
            let done = timeout(HANDSHAKE_TIMEOUT, self.shake_hands(&remote)).await;
            let (stream, input) = done.map_err(|_| errors::no_answer(&remote))??;
            let peer = stream.get_ref().1.peer_certificates().and_then(secure::peer_of);
            let peer = peer.ok_or_else(|| errors::lost(&remote, secure::NAMELESS))?;
            let shared = Shared::new(Flow::new(&remote, WINDOW_BYTES));
            let channel = shared.channel(peer, &remote);
            drive(stream.into(), input, shared, remote);
            channel.to(self.peer.as_ref()).await
        })
    }

    fn describe(&self) -> String {
        format!("TLS to {}", self.to)
    }
}
