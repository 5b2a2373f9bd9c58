//! Two hosts of one authority, and links between them.

#![allow(dead_code, reason = "each test file uses its part")]

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use ferry_transport::pki::{Validity, init, init_for};
use ferry_transport::{
    Channel, Connector, EitherConnector, EitherListener, Identity, LinkChoice, LinkError, Listener,
    Over, PkiError, Sockets,
};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject};
use tempfile::TempDir;

pub(crate) const LOOPBACK: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 0);
/// The links over a network.
pub(crate) const NETWORKS: [Over; 2] = [Over::Quic, Over::Tls];

pub(crate) struct Hosts {
    pub(crate) dir: TempDir,
    pub(crate) left: Identity,
    pub(crate) right: Identity,
}

pub(crate) fn hosts() -> Hosts {
    let dir = TempDir::new().unwrap();
    init(dir.path(), &["left".to_owned(), "right".to_owned()]).unwrap();
    let load = |name| Identity::load(&dir.path().join(name)).unwrap();
    Hosts { left: load("left"), right: load("right"), dir }
}

impl Hosts {
    /// An identity of the same authority whose time ended half an hour ago.
    pub(crate) fn expired(&self) -> Identity {
        let ago = |minutes: u64| SystemTime::now() - Duration::from_secs(60 * minutes);
        let host = Duration::from_secs(60 * 150);
        let validity = Validity { from: ago(180), host, ..Validity::default() };
        init_for(self.dir.path(), &["old".to_owned()], &validity).unwrap();
        let dir = self.dir.path().join("old");
        assert!(matches!(Identity::load(&dir), Err(PkiError::Expired { .. })));
        Identity::load_at(&dir, ago(45)).unwrap()
    }

    pub(crate) fn path(&self, host: &str) -> PathBuf {
        self.dir.path().join(host)
    }
}

pub(crate) fn listen(over: Over, identity: &Identity) -> (EitherListener, SocketAddr) {
    let sockets = Sockets::bind(LOOPBACK, LinkChoice::Only(over)).unwrap();
    let listener = sockets.listen(identity).unwrap();
    let addr = listener.local_addr().unwrap();
    (listener, addr)
}

pub(crate) fn connector(over: Over, identity: &Identity, to: SocketAddr) -> EitherConnector {
    EitherConnector::new(identity, to, LinkChoice::Only(over)).unwrap()
}

/// Connects and accepts; both results.
pub(crate) async fn meet(
    over: Over,
    from: &Identity,
    to: &Identity,
) -> (Result<Channel, LinkError>, Result<Channel, LinkError>) {
    let (mut listener, addr) = listen(over, to);
    let connector = connector(over, from, addr);
    let (out, in_) = tokio::join!(connector.connect(), listener.accept());
    (out, in_.unwrap())
}

/// What a client is told by which it may do as it likes: it takes any server, and shows the certificate in `identity`,
/// or none.
pub(crate) fn stranger(identity: Option<&Path>, alpn: &[u8]) -> rustls::ClientConfig {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = rustls::ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(Anyone));
    let mut config = match identity {
        None => builder.with_no_client_auth(),
        Some(dir) => {
            let (cert, key) = pair(dir);
            builder.with_client_auth_cert(vec![cert], key).unwrap()
        }
    };
    config.alpn_protocols = vec![alpn.to_vec()];
    config
}

/// A server of another protocol, with the certificate in `identity`.
pub(crate) fn other_server(identity: &Path, alpn: &[u8]) -> rustls::ServerConfig {
    let (cert, key) = pair(identity);
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut config = rustls::ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![cert], key)
        .unwrap();
    config.alpn_protocols = vec![alpn.to_vec()];
    config
}

fn pair(dir: &Path) -> (CertificateDer<'static>, PrivateKeyDer<'static>) {
    let cert = CertificateDer::from_pem_file(dir.join("cert.pem")).unwrap();
    (cert, PrivateKeyDer::from_pem_file(dir.join("key.pem")).unwrap())
}

#[derive(Debug)]
struct Anyone;

impl rustls::client::danger::ServerCertVerifier for Anyone {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &rustls::pki_types::ServerName<'_>,
        _: &[u8],
        _: rustls::pki_types::UnixTime,
    ) -> Result<rustls::client::danger::ServerCertVerified, rustls::Error> {
        Ok(rustls::client::danger::ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        by: &CertificateDer<'_>,
        signed: &rustls::DigitallySignedStruct,
    ) -> Result<rustls::client::danger::HandshakeSignatureValid, rustls::Error> {
        self.verify_tls13_signature(message, by, signed)
    }

    fn verify_tls13_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &rustls::DigitallySignedStruct,
    ) -> Result<rustls::client::danger::HandshakeSignatureValid, rustls::Error> {
        Ok(rustls::client::danger::HandshakeSignatureValid::assertion())
    }

    fn supported_verify_schemes(&self) -> Vec<rustls::SignatureScheme> {
        vec![rustls::SignatureScheme::ECDSA_NISTP256_SHA256]
    }
}
