//! The link over TCP: TLS 1.3, both sides with a certificate of the same private authority.
//!
//! It costs less than QUIC for each byte, and passes where UDP does not. A connection has a task (`driver`) that reads
//! whatever comes, and a state (`flow`) that says what it means; sink and source only ever touch that state. In
//! TLS 1.3 a client is done before the server has looked at its certificate: it waits for the server's first frame,
//! so that a rejection is the error of [`TlsConnector::connect`](crate::Connector::connect).

mod connector;
mod driver;
mod errors;
mod flow;
mod halves;
mod listener;

use rustix::net::sockopt;
use socket2::SockRef;
use tokio::io::BufReader;
use tokio::net::TcpStream;

pub use connector::TlsConnector;
pub use listener::TlsListener;
pub(crate) use listener::bind;

use crate::secure::IDLE_TIMEOUT;

/// Read from a socket at once: rustls by itself reads 4 KiB.
const READ_BYTES: usize = 64 << 10;

/// What a socket takes beyond what is on its way. More would only stand in line: for a rate or a codec that has changed
/// meanwhile, and before what is urgent.
const NOT_SENT_BYTES: u32 = 512 << 10;

/// What TLS runs on.
type Io = BufReader<TcpStream>;

fn buffered(socket: TcpStream) -> std::io::Result<Io> {
    socket.set_nodelay(true)?;
    // What is left of a connection whose process has ended is not sent for longer than it would be waited for.
    let millis = u32::try_from(IDLE_TIMEOUT.as_millis()).unwrap_or(u32::MAX);
    sockopt::set_tcp_user_timeout(&socket, millis)?;
    SockRef::from(&socket).set_tcp_notsent_lowat(NOT_SENT_BYTES)?;
    Ok(BufReader::with_capacity(READ_BYTES, socket))
}
