//! The link over QUIC: TLS 1.3, both sides with a certificate of the same private authority.
//!
//! When both sides have verified each other, the connecting side opens the connection's only stream and
//! writes a greeting; the listening side answers with the same. In TLS 1.3 a client is done before the
//! server has looked at its certificate: with the answer it knows that it was accepted, so a rejection
//! is the error of [`QuicConnector::connect`](crate::Connector::connect) and not of some later read.

mod connector;
mod errors;
mod fresh;
mod gate;
mod listener;
mod socket;
mod stream;

use std::sync::Arc;
use std::time::Duration;

use quinn::congestion::CubicConfig;
use quinn::{AckFrequencyConfig, MtuDiscoveryConfig, TransportConfig, VarInt};
use rustls::crypto::CryptoProvider;
use rustls::crypto::ring::{self, cipher_suite};

pub use connector::QuicConnector;
pub use listener::QuicListener;

/// A silent peer is given up after this long.
pub const IDLE_TIMEOUT: Duration = Duration::from_secs(5);
/// A handshake that takes longer fails.
pub const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(5);
const KEEP_ALIVE: Duration = Duration::from_secs(1);

const ALPN: &[u8] = b"ferry/1";
const GREETING: [u8; 8] = *b"ferry/1\n";

/// Bytes on their way, at most, per connection: 10 Gbit/s over 6 ms. Each side keeps up to this
/// much: the sender what is not acknowledged, the receiver what is not read.
const WINDOW_BYTES: u32 = 8 << 20;
/// The same for a connection that was accepted, until it is known what for ([`ByteSource::widen`]).
///
/// [`ByteSource::widen`]: crate::ByteSource::widen
const UNKNOWN_WINDOW_BYTES: u32 = 64 << 10;
/// Early packets of peers whose handshake has not begun: for one, and for all.
const EARLY_BYTES: u64 = 16 << 10;
const ALL_EARLY_BYTES: u64 = 1 << 20;
/// What may leave before the first acknowledgement: a machine's state, in one flight. The window does
/// not grow on a control channel, which is mostly silent, and the guest stands still meanwhile.
const INITIAL_WINDOW_BYTES: u64 = 64 << 10;
/// Fewer packets than are acknowledged together are acknowledged after this long. At the usual 25 ms a
/// sender with a small window would stand still for as long.
const MAX_ACK_DELAY: Duration = Duration::from_millis(1);
/// The largest UDP payload that is tried. Ten segments, which is how many quinn hands to the kernel at
/// once, must stay below 64 KiB.
const MAX_UDP_PAYLOAD_BYTES: u16 = 6500;
/// For the bursts of a fast link; the kernel may grant less.
const SOCKET_BUFFER_BYTES: usize = 16 << 20;

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

/// `window`: bytes that are not read yet, at first.
fn transport_config(window: u32) -> Arc<TransportConfig> {
    let mut mtu = MtuDiscoveryConfig::default();
    mtu.upper_bound(MAX_UDP_PAYLOAD_BYTES);
    let mut acks = AckFrequencyConfig::default();
    acks.ack_eliciting_threshold(VarInt::from_u32(20)).max_ack_delay(Some(MAX_ACK_DELAY));
    let mut congestion = CubicConfig::default();
    congestion.initial_window(INITIAL_WINDOW_BYTES);
    let mut config = TransportConfig::default();
    config
        .max_concurrent_bidi_streams(VarInt::from_u32(1))
        .max_concurrent_uni_streams(VarInt::from_u32(0))
        .datagram_receive_buffer_size(None)
        .stream_receive_window(VarInt::from_u32(WINDOW_BYTES))
        .receive_window(VarInt::from_u32(window))
        .send_window(WINDOW_BYTES.into())
        .max_idle_timeout(Some(VarInt::from_u32(5_000).into()))
        .keep_alive_interval(Some(KEEP_ALIVE))
        .mtu_discovery_config(Some(mtu))
        .ack_frequency_config(Some(acks))
        // On a busy loopback Cubic carried about a third more than quinn's BBR, for the same CPU time.
        // Not compared on a path with delay or loss.
        .congestion_controller_factory(Arc::new(congestion));
    Arc::new(config)
}
