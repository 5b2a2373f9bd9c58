//! UDP sockets with room for bursts.

use std::net::{SocketAddr, UdpSocket};
use std::sync::Arc;

use quinn::{Endpoint, EndpointConfig, ServerConfig, TokioRuntime};
use rustix::net::sockopt;

use super::MAX_UDP_PAYLOAD_BYTES;
use crate::secure::{self, SOCKET_BUFFER_BYTES, grow_buffers};
use crate::{LinkError, Over};

/// An endpoint of `socket`, driven by the tokio runtime of the caller.
pub(super) fn endpoint(
    socket: UdpSocket,
    server: Option<ServerConfig>,
) -> Result<Endpoint, LinkError> {
    let about = socket.local_addr();
    let fail = |why: String| match &about {
        Ok(addr) => LinkError::Socket { over: Over::Quic, addr: *addr, why },
        Err(e) => secure::cannot(e),
    };
    if !grow_buffers(&socket) {
        // Up to the system's limit, then.
        let _ = sockopt::set_socket_recv_buffer_size(&socket, SOCKET_BUFFER_BYTES);
        let _ = sockopt::set_socket_send_buffer_size(&socket, SOCKET_BUFFER_BYTES);
    }
    let mut config = EndpointConfig::default();
    config.max_udp_payload_size(MAX_UDP_PAYLOAD_BYTES).map_err(|e| fail(e.to_string()))?;
    let runtime = Arc::new(TokioRuntime);
    Endpoint::new(config, server, socket, runtime).map_err(|e| fail(e.to_string()))
}

pub(crate) fn bind(addr: SocketAddr) -> Result<UdpSocket, LinkError> {
    UdpSocket::bind(addr).map_err(|e| LinkError::socket(Over::Quic, addr, &e))
}
