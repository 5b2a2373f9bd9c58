//! What is the own of TLS over TCP: strangers that speak it, frames that nobody should send, listeners that are busy.

mod hosts;

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use ferry_transport::{
    CertificateOf, CertificateProblem, Channel, Connector, LinkError, Listener, Over,
};
use hosts::{Hosts, LOOPBACK, connector, hosts, listen, other_server};
use rustls::{ClientConnection, StreamOwned};

type Stranger = StreamOwned<ClientConnection, TcpStream>;

/// A client of our own making, which blocks: `identity` for its certificate, or none.
fn stranger(to: SocketAddr, identity: Option<&Path>, alpn: &[u8]) -> Stranger {
    let config = Arc::new(hosts::stranger(identity, alpn));
    let tls = ClientConnection::new(config, "ferry".try_into().unwrap()).unwrap();
    let socket = TcpStream::connect(to).unwrap();
    socket.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    StreamOwned::new(tls, socket)
}

/// A channel that a stranger with a good certificate made, whose frames are its own.
async fn let_in(hosts: &Hosts) -> (Stranger, Channel) {
    let (mut listener, addr) = listen(Over::Tls, &hosts.right);
    let left = hosts.path("left");
    let connecting = tokio::task::spawn_blocking(move || {
        let mut client = stranger(addr, Some(&left), b"ferry/1");
        let mut first = [0; 12];
        client.read_exact(&mut first).unwrap();
        assert_eq!(
            first,
            [1, 8, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0],
            "64 KiB until it is known what for"
        );
        client
    });
    let channel = listener.accept().await.unwrap().unwrap();
    (connecting.await.unwrap(), channel)
}

fn frame(kind: u8, bytes: &[u8]) -> Vec<u8> {
    let length = u32::try_from(bytes.len()).unwrap().to_le_bytes();
    [&[kind], &length[..3], bytes].concat()
}

/// What is left of what the listening side says.
async fn answer(mut client: Stranger) -> Vec<u8> {
    let rest = tokio::task::spawn_blocking(move || {
        let mut bytes = Vec::new();
        let _ = client.read_to_end(&mut bytes);
        bytes
    });
    rest.await.unwrap()
}

#[tokio::test]
async fn a_peer_without_a_certificate_learns_nothing_and_sends_nothing() {
    let hosts = hosts();
    let (mut listener, addr) = listen(Over::Tls, &hosts.right);
    let client = tokio::task::spawn_blocking(move || {
        let mut client = stranger(addr, None, b"ferry/1");
        // Its own half of the handshake may succeed.
        let _ = client.write_all(&frame(0, b"let me in"));
        let mut answer = Vec::new();
        let error = client.read_to_end(&mut answer).unwrap_err();
        assert!(answer.is_empty(), "the stranger was answered");
        error
    });
    let error = listener.accept().await.unwrap().unwrap_err();
    let LinkError::Certificate { whose, problem, .. } = &error else { panic!("{error}") };
    assert_eq!((*whose, problem), (CertificateOf::Peer, &CertificateProblem::Missing), "{error}");
    let said = client.await.unwrap().to_string();
    assert!(said.contains("CertificateRequired"), "{said}");
}

#[tokio::test]
async fn a_peer_that_speaks_something_else_is_told_apart() {
    let hosts = hosts();
    let (mut listener, addr) = listen(Over::Tls, &hosts.right);
    for alpn in [&b"h2"[..], b"ferry/0"] {
        let left = hosts.path("left");
        let client = tokio::task::spawn_blocking(move || {
            let mut client = stranger(addr, Some(&left), alpn);
            client.read_to_end(&mut Vec::new()).unwrap_err()
        });
        let error = listener.accept().await.unwrap().unwrap_err();
        assert!(matches!(error, LinkError::NotFerry { over: Over::Tls, .. }), "{error}");
        client.await.unwrap();
    }
    // No TLS at all.
    let client = tokio::task::spawn_blocking(move || {
        let mut client = TcpStream::connect(addr).unwrap();
        client.write_all(b"GET / HTTP/1.1\r\nHost: ferry\r\n\r\n").unwrap();
        let _ = client.read_to_end(&mut Vec::new());
    });
    let error = listener.accept().await.unwrap().unwrap_err();
    assert!(matches!(error, LinkError::NotFerry { over: Over::Tls, .. }), "{error}");
    client.await.unwrap();

    // A client of ours at a server of another protocol, of none that is named, and of no TLS.
    for protocol in [Some(&b"h2"[..]), None] {
        let mut config = other_server(&hosts.path("right"), b"");
        config.alpn_protocols = protocol.map(<[u8]>::to_vec).into_iter().collect();
        let server = TcpListener::bind(LOOPBACK).unwrap();
        let to = server.local_addr().unwrap();
        let serving = std::thread::spawn(move || {
            let tls = rustls::ServerConnection::new(Arc::new(config)).unwrap();
            let mut stream = StreamOwned::new(tls, server.accept().unwrap().0);
            let _ = stream.read_to_end(&mut Vec::new());
        });
        let error = connector(Over::Tls, &hosts.left, to).connect().await.unwrap_err();
        assert!(matches!(error, LinkError::NotFerry { over: Over::Tls, .. }), "{error}");
        serving.join().unwrap();
    }
    let server = TcpListener::bind(LOOPBACK).unwrap();
    let to = server.local_addr().unwrap();
    let serving = std::thread::spawn(move || {
        let (mut socket, _) = server.accept().unwrap();
        socket.write_all(b"SSH-2.0-OpenSSH_9.2\r\n").unwrap();
        let _ = socket.read_to_end(&mut Vec::new());
    });
    let error = connector(Over::Tls, &hosts.left, to).connect().await.unwrap_err();
    assert!(matches!(error, LinkError::NotFerry { over: Over::Tls, .. }), "{error}");
    serving.join().unwrap();
}

#[tokio::test]
async fn frames_that_break_a_rule_end_their_channel_and_say_which() {
    let hosts = hosts();
    let data = |bytes: usize| frame(0, &vec![7; bytes]);
    for (sends, words) in [
        (frame(99, b""), "is no frame"),
        (frame(0, &vec![0; 65 << 10]), "is no frame"),
        (frame(7, b"x"), "is no frame"),
        (frame(6, &[b'x'; 2000]), "is no frame"),
        ([data(60_000), data(60_000)].concat(), "more than it may"),
        // Little ones cost more than their bytes.
        (data(1).repeat(1009), "more than it may"),
        ([frame(2, b""), data(1)].concat(), "more after the end"),
        ([frame(2, b""), frame(2, b"")].concat(), "ended twice"),
        (frame(3, b""), "has what was not sent"),
    ] {
        let (mut client, mut channel) = let_in(&hosts).await;
        let answer = tokio::task::spawn_blocking(move || {
            client.write_all(&sends).unwrap();
            client
        });
        let answer = answer.await.unwrap();
        let answer = tokio::spawn(self::answer(answer));
        let error = loop {
            match channel.source.recv().await {
                Ok(Some(_)) => tokio::time::sleep(Duration::from_millis(1)).await,
                Ok(None) => match channel.sink.send(bytes::Bytes::from_static(b"x")).await {
                    Ok(()) => tokio::time::sleep(Duration::from_millis(1)).await,
                    Err(e) => break e,
                },
                Err(e) => break e,
            }
        };
        assert!(error.to_string().contains(words), "{words}: {error}");
        drop(channel);
        let said = answer.await.unwrap();
        assert!(String::from_utf8_lossy(&said).contains(words), "{words}: not said");
    }
}

#[tokio::test]
async fn a_peer_sends_little_until_it_is_known_what_for_and_a_window_then() {
    let hosts = hosts();
    let (mut client, channel) = let_in(&hosts).await;
    channel.source.widen()();
    let widened = tokio::task::spawn_blocking(move || {
        let mut allowed = [0; 12];
        client.read_exact(&mut allowed).unwrap();
        allowed
    });
    assert_eq!(widened.await.unwrap(), [1, 8, 0, 0, 0, 0, 128, 0, 0, 0, 0, 0]);
}

#[tokio::test]
async fn peers_that_stall_or_fail_hold_up_nobody() {
    let hosts = hosts();
    let (mut listener, addr) = listen(Over::Tls, &hosts.right);
    // As many as one address may have at once say nothing at all.
    let silent: Vec<TcpStream> = (0..20).map(|_| TcpStream::connect(addr).unwrap()).collect();
    let start = Instant::now();
    let connector = connector(Over::Tls, &hosts.left, addr);
    let good = tokio::spawn(async move { connector.connect().await });
    let channel = listener.accept().await.unwrap().unwrap();
    assert_eq!(channel.peer.name, "left");
    assert!(start.elapsed() < Duration::from_secs(4), "waited for the silent ones");
    good.await.unwrap().unwrap();
    // They are let go, and each is told of.
    for _ in &silent {
        let error = listener.accept().await.unwrap().unwrap_err();
        assert!(matches!(error, LinkError::TimedOut { seconds: 5, .. }), "{error}");
    }
}

#[tokio::test]
async fn who_finds_a_listener_busy_comes_again_until_there_is_a_place() {
    let hosts = hosts();
    let (mut listener, addr) = listen(Over::Tls, &hosts.right);
    let mut silent: Vec<TcpStream> = (0..80).map(|_| TcpStream::connect(addr).unwrap()).collect();
    let connector = connector(Over::Tls, &hosts.left, addr);
    let good = tokio::spawn(async move { connector.connect().await });
    tokio::time::sleep(Duration::from_millis(500)).await;
    assert!(!good.is_finished(), "{:?}", good.await);
    silent.clear();
    loop {
        match listener.accept().await.unwrap() {
            Ok(channel) => break assert_eq!(channel.peer.name, "left"),
            Err(e) => assert!(!matches!(e, LinkError::Certificate { .. }), "{e}"),
        }
    }
    good.await.unwrap().unwrap();
}
