//! The link over QUIC: TLS 1.3, both sides with a certificate of the same private authority.
//!
//! When both sides have verified each other, the connecting side opens the connection's only stream and
//! writes a greeting; the listening side answers with the same. In TLS 1.3 a client is done before the
//! server has looked at its certificate: with the answer it knows that it was accepted, so a rejection
//! is the error of [`QuicConnector::connect`](crate::Connector::connect) and not of some later read.

mod connector;
mod errors;
mod listener;
mod socket;
mod stream;

use std::sync::Arc;
use std::time::Duration;

use quinn::congestion::CubicConfig;
use quinn::{AckFrequencyConfig, MtuDiscoveryConfig, TransportConfig, VarInt};

pub use connector::QuicConnector;
pub use listener::QuicListener;
pub(crate) use socket::bind;

use crate::secure::{KEEP_ALIVE, WINDOW_BYTES};

const GREETING: [u8; 8] = *b"ferry/1\n";

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
