//! What is QUIC's own: strangers that speak it.

mod hosts;

use std::net::{SocketAddr, UdpSocket};
use std::sync::Arc;
use std::time::{Duration, Instant};

use ferry_transport::{
    CertificateOf, CertificateProblem, Connector, IDLE_TIMEOUT, LinkError, Listener, Over,
};
use hosts::{Hosts, LOOPBACK, connector, hosts, listen, other_server};
use tokio::sync::watch;

/// A QUIC client of our own making: `identity` for its certificate, or none; `alpn` as given.
fn stranger(identity: Option<&Hosts>, alpn: &[u8]) -> quinn::Endpoint {
    let config = hosts::stranger(identity.map(|hosts| hosts.path("left")).as_deref(), alpn);
    let crypto = quinn::crypto::rustls::QuicClientConfig::try_from(config).unwrap();
    let mut endpoint = quinn::Endpoint::client(LOOPBACK).unwrap();
    endpoint.set_default_client_config(quinn::ClientConfig::new(Arc::new(crypto)));
    endpoint
}

#[tokio::test]
async fn a_peer_without_a_certificate_learns_nothing_and_sends_nothing() {
    let hosts = hosts();
    let (mut listener, addr) = listen(Over::Quic, &hosts.right);
    let endpoint = stranger(None, b"ferry/1");
    let client = async {
        // Its own half of the handshake may succeed; nothing that it sends comes out anywhere, and
        // nothing is ever sent to it.
        let connection = endpoint.connect(addr, "ferry").unwrap().await?;
        let (mut send, mut recv) = connection.open_bi().await?;
        let _ = send.write_all(b"ferry/1\nlet me in").await;
        let mut answer = [0; 1];
        let answered = recv.read(&mut answer).await;
        assert!(!matches!(answered, Ok(Some(_))), "the stranger was answered");
        Err::<(), _>(connection.closed().await)
    };
    let (client, accepted) = tokio::join!(client, listener.accept());
    let error = accepted.unwrap().unwrap_err();
    assert!(
        matches!(
            error,
            LinkError::Certificate {
                whose: CertificateOf::Peer,
                problem: CertificateProblem::Missing,
                ..
            }
        ),
        "{error}"
    );
    assert!(client.unwrap_err().to_string().contains("116"), "certificate_required");
}

#[tokio::test]
async fn a_peer_that_speaks_quic_but_not_ferry_is_told_apart() {
    let hosts = hosts();
    let (mut listener, addr) = listen(Over::Quic, &hosts.right);
    // A client of another protocol.
    let endpoint = stranger(Some(&hosts), b"h3");
    let (client, accepted) =
        tokio::join!(endpoint.connect(addr, "ferry").unwrap(), listener.accept());
    assert!(client.is_err());
    let error = accepted.unwrap().unwrap_err();
    assert!(matches!(error, LinkError::NotFerry { .. }), "{error}");

    // A client of ours at a server of another protocol.
    let config = other_server(&hosts.path("right"), b"h3");
    let crypto = quinn::crypto::rustls::QuicServerConfig::try_from(config).unwrap();
    let server =
        quinn::Endpoint::server(quinn::ServerConfig::with_crypto(Arc::new(crypto)), LOOPBACK);
    let server = server.unwrap();
    let connector = connector(Over::Quic, &hosts.left, server.local_addr().unwrap());
    tokio::spawn(async move {
        while let Some(incoming) = server.accept().await {
            let _ = incoming.await;
        }
    });
    let error = connector.connect().await.unwrap_err();
    assert!(matches!(error, LinkError::NotFerry { .. }), "{error}");
}

#[tokio::test]
async fn peers_that_stall_or_fail_hold_up_nobody() {
    let hosts = hosts();
    let (mut listener, addr) = listen(Over::Quic, &hosts.right);
    // Twenty peers that finish the handshake and then say nothing, and some without a certificate.
    let mute = stranger(Some(&hosts), b"ferry/1");
    let bare = stranger(None, b"ferry/1");
    let mut silent = Vec::new();
    for _ in 0..20 {
        silent.push(mute.connect(addr, "ferry").unwrap().await.unwrap());
        let _ = bare.connect(addr, "ferry").unwrap().await;
    }
    let start = Instant::now();
    let connector = connector(Over::Quic, &hosts.left, addr);
    let good = tokio::spawn(async move { connector.connect().await });
    let mut failures = 0;
    let channel = loop {
        match listener.accept().await.unwrap() {
            Ok(channel) => break channel,
            Err(_) => failures += 1,
        }
    };
    assert_eq!(channel.peer.name, "left");
    assert!(start.elapsed() < Duration::from_secs(4), "waited for the silent ones");
    assert!(failures <= 20, "the silent ones have not failed yet");
    good.await.unwrap().unwrap();
    // Noise is no connection at all.
    UdpSocket::bind(LOOPBACK).unwrap().send_to(&[0xff; 1300], addr).unwrap();
}

/// A cable between a client and a server, for UDP: what it does to what comes back is changed on the way.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Cable {
    Whole,
    /// What comes back waits in it.
    Slow,
    Cut,
}

/// The address by which `server` is reached through a cable, and its lever.
async fn cable(server: SocketAddr) -> (SocketAddr, watch::Sender<Cable>) {
    let front = tokio::net::UdpSocket::bind(LOOPBACK).await.unwrap();
    let back = tokio::net::UdpSocket::bind(LOOPBACK).await.unwrap();
    let addr = front.local_addr().unwrap();
    let (lever, mut state) = watch::channel(Cable::Whole);
    tokio::spawn(async move {
        let (mut there, mut here) = ([0; 1 << 16], [0; 1 << 16]);
        let (mut client, mut waiting) = (addr, Vec::new());
        loop {
            let now = *state.borrow();
            tokio::select! {
                Ok((bytes, from)) = front.recv_from(&mut there) => {
                    client = from;
                    if now != Cable::Cut {
                        let _ = back.send_to(&there[..bytes], server).await;
                    }
                }
                Ok((bytes, _)) = back.recv_from(&mut here) => match now {
                    Cable::Whole => drop(front.send_to(&here[..bytes], client).await),
                    Cable::Slow => waiting.push(here[..bytes].to_vec()),
                    Cable::Cut => {}
                },
                Ok(()) = state.changed() => {
                    for datagram in waiting.drain(..) {
                        let _ = front.send_to(&datagram, client).await;
                    }
                }
                else => return,
            }
        }
    });
    (addr, lever)
}

/// QUIC waits for three probe time-outs, which grow with the round trip: as after a stop of this process.
#[tokio::test]
async fn a_peer_that_falls_silent_is_missed_as_soon_after_a_long_round_trip() {
    let hosts = hosts();
    let (mut listener, server) = listen(Over::Quic, &hosts.right);
    let (addr, lever) = cable(server).await;
    let link = connector(Over::Quic, &hosts.left, addr);
    let (here, there) = tokio::join!(link.connect(), listener.accept());
    let (mut here, _there) = (here.unwrap(), there.unwrap().unwrap());
    lever.send(Cable::Slow).unwrap();
    here.sink.send(b"how long does it take?".as_slice().into()).await.unwrap();
    tokio::time::sleep(IDLE_TIMEOUT - Duration::from_secs(1)).await;
    let released = Instant::now();
    lever.send(Cable::Cut).unwrap();
    let error = here.source.recv().await.unwrap_err();
    assert!(matches!(error, LinkError::TimedOut { .. }), "{error}");
    assert!(released.elapsed() < 2 * IDLE_TIMEOUT, "missed after {:?}", released.elapsed());
}
