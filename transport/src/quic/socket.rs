//! UDP sockets with room for bursts.

use std::io;
use std::net::{SocketAddr, UdpSocket};
use std::sync::Arc;

use quinn::{Endpoint, EndpointConfig, ServerConfig, TokioRuntime};
use rustix::net::sockopt;

use super::{MAX_UDP_PAYLOAD_BYTES, SOCKET_BUFFER_BYTES};
use crate::LinkError;

/// An endpoint on `addr`, driven by the tokio runtime of the caller.
pub(super) fn endpoint(
    addr: SocketAddr,
    server: Option<ServerConfig>,
) -> Result<Endpoint, LinkError> {
    let fail = |e: io::Error| match e.kind() {
        io::ErrorKind::AddrInUse => LinkError::AddressInUse { addr },
        _ => LinkError::Socket { addr, why: e.to_string() },
    };
    let socket = UdpSocket::bind(addr).map_err(fail)?;
    grow_buffers(&socket);
    let mut config = EndpointConfig::default();
    config
        .max_udp_payload_size(MAX_UDP_PAYLOAD_BYTES)
        .map_err(|e| LinkError::Socket { addr, why: e.to_string() })?;
    Endpoint::new(config, server, socket, Arc::new(TokioRuntime)).map_err(fail)
}

/// Beyond the system's limit where this process may, up to it otherwise. The link works with small
/// buffers as well, so a refusal is not an error.
fn grow_buffers(socket: &UdpSocket) {
    if sockopt::set_socket_recv_buffer_size_force(socket, SOCKET_BUFFER_BYTES).is_err() {
        let _ = sockopt::set_socket_recv_buffer_size(socket, SOCKET_BUFFER_BYTES);
    }
    if sockopt::set_socket_send_buffer_size_force(socket, SOCKET_BUFFER_BYTES).is_err() {
        let _ = sockopt::set_socket_send_buffer_size(socket, SOCKET_BUFFER_BYTES);
    }
}
