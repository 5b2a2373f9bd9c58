//! QUIC over loopback: what arrives, who gets in, and what is said of who does not.

use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use bytes::Bytes;
use ferry_transport::pki::{Validity, init, init_for};
use ferry_transport::{
    CertificateOf, CertificateProblem, Channel, Connector, Identity, LinkError, Listener, PkiError,
    QuicConnector, QuicListener,
};
use tempfile::TempDir;

const LOOPBACK: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 0);

struct Hosts {
    dir: TempDir,
    left: Identity,
    right: Identity,
}

fn hosts() -> Hosts {
    let dir = TempDir::new().unwrap();
    init(dir.path(), &["left".to_owned(), "right".to_owned()]).unwrap();
    let load = |name| Identity::load(&dir.path().join(name)).unwrap();
    Hosts { left: load("left"), right: load("right"), dir }
}

/// An identity of the same authority whose time ended half an hour ago.
fn expired(hosts: &Hosts) -> Identity {
    let ago = |minutes: u64| SystemTime::now() - Duration::from_secs(60 * minutes);
    let host = Duration::from_secs(60 * 150);
    let validity = Validity { from: ago(180), host, ..Validity::default() };
    init_for(hosts.dir.path(), &["old".to_owned()], &validity).unwrap();
    let dir = hosts.dir.path().join("old");
    assert!(matches!(Identity::load(&dir), Err(PkiError::Expired { .. })));
    Identity::load_at(&dir, ago(45)).unwrap()
}

fn listen(identity: &Identity) -> (QuicListener, SocketAddr) {
    let listener = QuicListener::bind(identity, LOOPBACK).unwrap();
    let addr = listener.local_addr().unwrap();
    (listener, addr)
}

/// Connects and accepts; both results.
async fn meet(
    from: &Identity,
    to: &Identity,
) -> (Result<Channel, LinkError>, Result<Channel, LinkError>) {
    let (mut listener, addr) = listen(to);
    let connector = QuicConnector::new(from, addr).unwrap();
    let (out, in_) = tokio::join!(connector.connect(), listener.accept());
    (out, in_.unwrap())
}

async fn connected(hosts: &Hosts) -> (Channel, Channel) {
    let (out, in_) = meet(&hosts.left, &hosts.right).await;
    (out.unwrap(), in_.unwrap())
}

async fn read_all(channel: &mut Channel) -> Result<Vec<u8>, LinkError> {
    let mut bytes = Vec::new();
    while let Some(piece) = channel.source.recv().await? {
        bytes.extend_from_slice(&piece);
    }
    Ok(bytes)
}

#[tokio::test(flavor = "multi_thread")]
async fn each_side_knows_the_other_and_bytes_arrive_in_both_directions() {
    let (mut left, mut right) = connected(&hosts()).await;
    assert_eq!((left.peer.name.as_str(), right.peer.name.as_str()), ("right", "left"));
    let bytes: Vec<u8> = (0..=250).cycle().take(20 << 20).collect();
    let sent = Bytes::from(bytes.clone());
    let answer = tokio::spawn(async move {
        let received = read_all(&mut right).await.unwrap();
        right.sink.send(Bytes::from(received)).await.unwrap();
        right.sink.finish().await.unwrap();
        right
    });
    for piece in sent.chunks(1 << 20) {
        left.sink.send(sent.slice_ref(piece)).await.unwrap();
    }
    left.sink.finish().await.unwrap();
    assert!(read_all(&mut left).await.unwrap() == bytes);
    assert_eq!(left.source.recv().await.unwrap(), None);
    answer.await.unwrap();
}

#[tokio::test]
async fn what_was_finished_can_be_read_after_the_sender_left() {
    let (mut left, mut right) = connected(&hosts()).await;
    left.sink.send(Bytes::from_static(b"all of it")).await.unwrap();
    left.sink.finish().await.unwrap();
    drop(left);
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert_eq!(read_all(&mut right).await.unwrap(), b"all of it");
}

#[tokio::test]
async fn a_sink_dropped_without_finish_is_not_a_clean_end() {
    let (mut left, mut right) = connected(&hosts()).await;
    left.sink.send(Bytes::from_static(b"half")).await.unwrap();
    assert_eq!(right.source.recv().await.unwrap().unwrap(), "half");
    let Channel { sink, source: _source, .. } = left;
    drop(sink);
    let error = read_all(&mut right).await.unwrap_err();
    assert!(matches!(error, LinkError::Lost { .. }), "{error}");
}

#[tokio::test]
async fn a_sender_waits_while_the_receiver_does_not_read() {
    let (mut left, _right) = connected(&hosts()).await;
    let piece = Bytes::from(vec![1; 1 << 20]);
    let mut mib = 0;
    while let Ok(sent) =
        tokio::time::timeout(Duration::from_secs(1), left.sink.send(piece.clone())).await
    {
        sent.unwrap();
        mib += 1;
        assert!(mib < 64, "no back-pressure");
    }
}

#[tokio::test]
async fn a_peer_that_closes_says_why() {
    let (mut left, mut right) = connected(&hosts()).await;
    left.sink.close("cancelled by the operator").await;
    let error = read_all(&mut right).await.unwrap_err();
    assert!(
        matches!(&error, LinkError::Closed { reason, .. } if reason == "cancelled by the operator"),
        "{error}"
    );
    let error = right.sink.send(Bytes::from_static(b"x")).await.unwrap_err();
    assert!(matches!(error, LinkError::Closed { .. }), "{error}");
}

#[tokio::test]
async fn a_peer_that_falls_silent_is_given_up_in_seconds() {
    let hosts = hosts();
    // The connecting side lives on a runtime that stops being driven, as a stopped process would.
    let (mut listener, addr) = listen(&hosts.right);
    let connector = QuicConnector::new(&hosts.left, addr).unwrap();
    let (stop, stopped) = std::sync::mpsc::channel::<()>();
    let thread = std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let channel = runtime.block_on(connector.connect()).unwrap();
        let _ = stopped.recv();
        drop((runtime, channel));
    });
    let mut channel = listener.accept().await.unwrap().unwrap();
    let start = Instant::now();
    let error = read_all(&mut channel).await.unwrap_err();
    assert!(matches!(error, LinkError::TimedOut { seconds: 5, .. }), "{error}");
    assert!(start.elapsed() >= Duration::from_secs(4), "{:?}", start.elapsed());
    drop(stop);
    thread.join().unwrap();
}

#[tokio::test]
async fn an_idle_channel_stays_open() {
    let (mut left, mut right) = connected(&hosts()).await;
    tokio::time::sleep(Duration::from_secs(7)).await;
    left.sink.send(Bytes::from_static(b"still here")).await.unwrap();
    assert_eq!(right.source.recv().await.unwrap().unwrap(), "still here");
}

#[tokio::test]
async fn an_address_where_nobody_answers_is_named() {
    let hosts = hosts();
    let mute = UdpSocket::bind(LOOPBACK).unwrap();
    let addr = mute.local_addr().unwrap();
    let error = QuicConnector::new(&hosts.left, addr).unwrap().connect().await.unwrap_err();
    assert_eq!(error, LinkError::NoAnswer { remote: addr.to_string(), seconds: 5 });
    assert!(error.to_string().contains(&addr.to_string()));
}

#[tokio::test]
async fn an_address_in_use_is_named() {
    let hosts = hosts();
    let (_listener, addr) = listen(&hosts.left);
    let error = QuicListener::bind(&hosts.right, addr).err().unwrap();
    assert_eq!(error, LinkError::AddressInUse { addr });
    let nowhere = "192.0.2.1:0".parse().unwrap();
    let error = QuicListener::bind(&hosts.right, nowhere).err().unwrap();
    assert!(matches!(error, LinkError::Socket { .. }), "{error}");
}

#[tokio::test]
async fn a_listener_that_is_gone_refuses_new_peers_and_keeps_the_old() {
    let hosts = hosts();
    let (mut listener, addr) = listen(&hosts.right);
    let connector = QuicConnector::new(&hosts.left, addr).unwrap();
    let (left, right) = tokio::join!(connector.connect(), listener.accept());
    let (mut left, mut right) = (left.unwrap(), right.unwrap().unwrap());
    drop(listener);
    let error = connector.connect().await.unwrap_err();
    assert!(matches!(error, LinkError::Refused { .. }), "{error}");
    left.sink.send(Bytes::from_static(b"on")).await.unwrap();
    assert_eq!(right.source.recv().await.unwrap().unwrap(), "on");
}

#[tokio::test]
async fn a_certificate_of_another_authority_is_refused_on_both_sides() {
    let (here, elsewhere) = (hosts(), hosts());
    let (out, in_) = meet(&elsewhere.left, &here.right).await;
    // The connecting side looks first.
    let error = out.unwrap_err();
    assert!(
        matches!(
            error,
            LinkError::Certificate {
                whose: CertificateOf::Peer,
                problem: CertificateProblem::OtherAuthority,
                ..
            }
        ),
        "{error}"
    );
    let error = in_.unwrap_err();
    assert!(
        matches!(
            error,
            LinkError::Certificate {
                whose: CertificateOf::Ours,
                problem: CertificateProblem::OtherAuthority,
                ..
            }
        ),
        "{error}"
    );
}

#[tokio::test]
async fn an_expired_certificate_is_refused_and_both_sides_say_whose() {
    let hosts = hosts();
    let old = expired(&hosts);
    let of = |error: &LinkError| match error {
        LinkError::Certificate { whose, problem: CertificateProblem::NotInItsTime, .. } => *whose,
        other => panic!("{other}"),
    };
    let (out, in_) = meet(&old, &hosts.right).await;
    assert_eq!(of(&out.unwrap_err()), CertificateOf::Ours);
    assert_eq!(of(&in_.unwrap_err()), CertificateOf::Peer);
    let (out, in_) = meet(&hosts.left, &old).await;
    assert_eq!(of(&out.unwrap_err()), CertificateOf::Peer);
    assert_eq!(of(&in_.unwrap_err()), CertificateOf::Ours);
}

/// A QUIC client of our own making: `identity` for its certificate, or none; `alpn` as given.
fn stranger(identity: Option<&Hosts>, alpn: &[u8]) -> quinn::Endpoint {
    use rustls::pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject};
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = rustls::ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(Anyone));
    let mut config = match identity {
        None => builder.with_no_client_auth(),
        Some(hosts) => {
            let dir = hosts.dir.path().join("left");
            let cert = CertificateDer::from_pem_file(dir.join("cert.pem")).unwrap();
            let key = PrivateKeyDer::from_pem_file(dir.join("key.pem")).unwrap();
            builder.with_client_auth_cert(vec![cert], key).unwrap()
        }
    };
    config.alpn_protocols = vec![alpn.to_vec()];
    let crypto = quinn::crypto::rustls::QuicClientConfig::try_from(config).unwrap();
    let mut endpoint = quinn::Endpoint::client(LOOPBACK).unwrap();
    endpoint.set_default_client_config(quinn::ClientConfig::new(Arc::new(crypto)));
    endpoint
}

#[derive(Debug)]
struct Anyone;

impl rustls::client::danger::ServerCertVerifier for Anyone {
    fn verify_server_cert(
        &self,
        _: &rustls::pki_types::CertificateDer<'_>,
        _: &[rustls::pki_types::CertificateDer<'_>],
        _: &rustls::pki_types::ServerName<'_>,
        _: &[u8],
        _: rustls::pki_types::UnixTime,
    ) -> Result<rustls::client::danger::ServerCertVerified, rustls::Error> {
        Ok(rustls::client::danger::ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &rustls::pki_types::CertificateDer<'_>,
        _: &rustls::DigitallySignedStruct,
    ) -> Result<rustls::client::danger::HandshakeSignatureValid, rustls::Error> {
        Ok(rustls::client::danger::HandshakeSignatureValid::assertion())
    }

    fn verify_tls13_signature(
        &self,
        _: &[u8],
        _: &rustls::pki_types::CertificateDer<'_>,
        _: &rustls::DigitallySignedStruct,
    ) -> Result<rustls::client::danger::HandshakeSignatureValid, rustls::Error> {
        Ok(rustls::client::danger::HandshakeSignatureValid::assertion())
    }

    fn supported_verify_schemes(&self) -> Vec<rustls::SignatureScheme> {
        vec![rustls::SignatureScheme::ECDSA_NISTP256_SHA256]
    }
}

#[tokio::test]
async fn a_peer_without_a_certificate_learns_nothing_and_sends_nothing() {
    let hosts = hosts();
    let (mut listener, addr) = listen(&hosts.right);
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
    let (mut listener, addr) = listen(&hosts.right);
    // A client of another protocol.
    let endpoint = stranger(Some(&hosts), b"h3");
    let (client, accepted) =
        tokio::join!(endpoint.connect(addr, "ferry").unwrap(), listener.accept());
    assert!(client.is_err());
    let error = accepted.unwrap().unwrap_err();
    assert!(matches!(error, LinkError::NotFerry { .. }), "{error}");

    // A client of ours at a server of another protocol.
    use rustls::pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject};
    let dir = hosts.dir.path().join("right");
    let mut config = rustls::ServerConfig::builder_with_provider(Arc::new(
        rustls::crypto::ring::default_provider(),
    ))
    .with_protocol_versions(&[&rustls::version::TLS13])
    .unwrap()
    .with_no_client_auth()
    .with_single_cert(
        vec![CertificateDer::from_pem_file(dir.join("cert.pem")).unwrap()],
        PrivateKeyDer::from_pem_file(dir.join("key.pem")).unwrap(),
    )
    .unwrap();
    config.alpn_protocols = vec![b"h3".to_vec()];
    let crypto = quinn::crypto::rustls::QuicServerConfig::try_from(config).unwrap();
    let server =
        quinn::Endpoint::server(quinn::ServerConfig::with_crypto(Arc::new(crypto)), LOOPBACK);
    let server = server.unwrap();
    let connector = QuicConnector::new(&hosts.left, server.local_addr().unwrap()).unwrap();
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
    let (mut listener, addr) = listen(&hosts.right);
    // Twenty peers that finish the handshake and then say nothing, and some without a certificate.
    let mute = stranger(Some(&hosts), b"ferry/1");
    let bare = stranger(None, b"ferry/1");
    let mut silent = Vec::new();
    for _ in 0..20 {
        silent.push(mute.connect(addr, "ferry").unwrap().await.unwrap());
        let _ = bare.connect(addr, "ferry").unwrap().await;
    }
    let start = Instant::now();
    let connector = QuicConnector::new(&hosts.left, addr).unwrap();
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
