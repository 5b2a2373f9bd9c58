//! What both links over a network have in common: TLS 1.3 with a certificate on both sides, and limits.

use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Duration;

use rustix::net::sockopt;
use rustls::client::Resumption;
use rustls::crypto::CryptoProvider;
use rustls::crypto::ring::{self, cipher_suite};
use rustls::pki_types::CertificateDer;
use rustls::server::{NoServerSessionStorage, WebPkiClientVerifier};
use rustls::sign::SingleCertAndKey;
use rustls::{ClientConfig, ServerConfig};

use crate::pki::{Identity, peer_name};
use crate::{CertificateOf, CertificateProblem, Fingerprint, LinkError, Over, Peer};

/// A silent peer is given up after this long.
pub const IDLE_TIMEOUT: Duration = Duration::from_secs(5);
/// A handshake that takes longer fails.
pub const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(5);
/// Who has nothing to say says that it is there.
pub(crate) const KEEP_ALIVE: Duration = Duration::from_secs(1);
/// How long the close of a connection may take to leave.
pub(crate) const CLOSE_WAIT: Duration = Duration::from_secs(1);

/// The protocol and its version.
const ALPN: &[u8] = b"ferry/1";

/// Bytes on their way, at most, per connection: 10 Gbit/s over 6 ms. Each side keeps up to this
/// much: the sender what is not acknowledged, the receiver what is not read.
pub(crate) const WINDOW_BYTES: u32 = 8 << 20;
/// The same for a connection that was accepted, until it is known what for ([`ByteSource::widen`]).
///
/// [`ByteSource::widen`]: crate::ByteSource::widen
pub(crate) const UNKNOWN_WINDOW_BYTES: u32 = 64 << 10;

/// For the bursts of a fast link; the kernel may grant less.
pub(crate) const SOCKET_BUFFER_BYTES: usize = 16 << 20;

/// The cryptography that TLS uses: ring, with the fastest cipher first.
pub(crate) fn crypto_provider() -> Arc<CryptoProvider> {
    let mut provider = ring::default_provider();
    provider.cipher_suites = vec![
        cipher_suite::TLS13_AES_128_GCM_SHA256,
        cipher_suite::TLS13_AES_256_GCM_SHA384,
        cipher_suite::TLS13_CHACHA20_POLY1305_SHA256,
    ];
    Arc::new(provider)
}

pub(crate) fn cannot(e: impl std::fmt::Display) -> LinkError {
    LinkError::Tls { why: e.to_string() }
}

/// The connecting side, as `identity`.
pub(crate) fn client_config(identity: &Identity) -> Result<ClientConfig, LinkError> {
    let mut config = ClientConfig::builder_with_provider(crypto_provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(cannot)?
        .with_root_certificates(identity.authority.clone())
        .with_client_cert_resolver(Arc::new(SingleCertAndKey::from(identity.certified.clone())));
    config.alpn_protocols = vec![ALPN.to_vec()];
    // Every connection shows its certificate.
    config.resumption = Resumption::disabled();
    Ok(config)
}

/// The listening side, as `identity`.
pub(crate) fn server_config(identity: &Identity) -> Result<ServerConfig, LinkError> {
    let provider = crypto_provider();
    let verifier =
        WebPkiClientVerifier::builder_with_provider(identity.authority.clone(), provider.clone())
            // A stranger need not learn the authority's name.
            .clear_root_hint_subjects()
            .build()
            .map_err(cannot)?;
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(cannot)?
        .with_client_cert_verifier(verifier)
        .with_cert_resolver(Arc::new(SingleCertAndKey::from(identity.certified.clone())));
    config.alpn_protocols = vec![ALPN.to_vec()];
    // Every connection shows its certificate.
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    Ok(config)
}

/// Whether a connection is for Ferry: QUIC insists on a protocol's name, TLS does not.
pub(crate) fn is_ours(alpn: Option<&[u8]>) -> bool {
    alpn == Some(ALPN)
}

/// What is said of a certificate without a name.
pub(crate) const NAMELESS: &str = "the peer's certificate has no host name";

/// Whose certificates these are.
pub(crate) fn peer_of(chain: &[CertificateDer<'_>]) -> Option<Peer> {
    let der = chain.first()?;
    Some(Peer { name: peer_name(der)?, fingerprint: Fingerprint::of(der) })
}

/// What TLS's alert `alert` (RFC 8446, 6) means, if it is about who is there and what is spoken; `whose` certificate it
/// is, where it is about one.
pub(crate) fn refused(
    alert: u8,
    whose: CertificateOf,
    reason: &str,
    over: Over,
    remote: &str,
) -> Option<LinkError> {
    use CertificateProblem::{Missing, NotInItsTime, Other, OtherAuthority};
    let remote = remote.to_owned();
    let problem = match alert {
        // no_application_protocol
        120 => return Some(LinkError::NotFerry { over, remote }),
        // unknown_ca; decrypt_error is how a signature by a key of another authority looks.
        48 | 51 => OtherAuthority,
        45 => NotInItsTime,
        116 => Missing,
        42 => Other(format!("bad certificate ({reason})")),
        43 => Other(format!("unsupported certificate ({reason})")),
        44 => Other(format!("revoked ({reason})")),
        46 => Other(format!("certificate unknown ({reason})")),
        _ => return None,
    };
    Some(LinkError::Certificate { whose, remote, problem })
}

/// A peer's words go to the operator's terminal.
pub(crate) fn plain(words: &[u8]) -> String {
    String::from_utf8_lossy(words).replace(char::is_control, " ")
}

/// Beyond the system's limit, where this process may. The link works with small buffers as well, so a refusal is not
/// an error.
pub(crate) fn grow_buffers(socket: impl AsFd) -> bool {
    sockopt::set_socket_recv_buffer_size_force(&socket, SOCKET_BUFFER_BYTES).is_ok()
        && sockopt::set_socket_send_buffer_size_force(&socket, SOCKET_BUFFER_BYTES).is_ok()
}
