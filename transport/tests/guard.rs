//! Who is let in while certificates expire and are replaced, and what a peer can take before it said what it wants.

use std::fs;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use bytes::Bytes;
use ferry_transport::pki::{Validity, init, init_for, renew};
use ferry_transport::{
    Channel, Connector, EitherConnector, EitherListener, Fingerprint, Identity, LinkChoice,
    LinkError, Listener, Over, PeerRule, Sockets,
};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject};
use tempfile::TempDir;

const LOOPBACK: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 0);
/// An identity's files are looked at once a second.
const LOOKED: Duration = Duration::from_millis(1100);

fn pki(hosts: &[&str]) -> TempDir {
    let dir = TempDir::new().unwrap();
    let hosts: Vec<String> = hosts.iter().map(|name| (*name).to_owned()).collect();
    init(dir.path(), &hosts).unwrap();
    dir
}

fn load(dir: &Path) -> Identity {
    Identity::load(dir).unwrap()
}

fn listen(over: Over, dir: &Path) -> (EitherListener, SocketAddr) {
    let sockets = Sockets::bind(LOOPBACK, LinkChoice::Only(over)).unwrap();
    let listener = sockets.listen(&load(dir)).unwrap();
    let addr = listener.local_addr().unwrap();
    (listener, addr)
}

fn leading(over: Over, identity: &Identity, to: SocketAddr) -> EitherConnector {
    EitherConnector::new(identity, to, LinkChoice::Only(over)).unwrap()
}

/// A channel, or why there is none, seen from the connecting side.
async fn meet(
    connector: &EitherConnector,
    listener: &mut EitherListener,
) -> Result<(Channel, Channel), LinkError> {
    let (out, in_) = tokio::join!(connector.connect(), listener.accept());
    Ok((out?, in_.unwrap()?))
}

#[tokio::test]
async fn a_host_of_the_same_authority_is_not_taken_for_the_one_that_is_wanted() {
    tokio::join!(not_taken_for_another(Over::Quic), not_taken_for_another(Over::Tls));
}

async fn not_taken_for_another(over: Over) {
    let dir = pki(&["left", "right", "thief"]);
    let at = |name: &str| dir.path().join(name);
    let (mut listener, addr) = listen(over, &at("thief"));
    let thief = load(&at("thief")).fingerprint();
    let right = load(&at("right")).fingerprint();
    let of_file =
        Fingerprint::of(&CertificateDer::from_pem_file(at("thief").join("cert.pem")).unwrap());
    assert_eq!(thief, of_file);
    let mut connect = async |wanted: Option<PeerRule>| {
        let connector = leading(over, &load(&at("left")), addr).to_peer(wanted);
        meet(&connector, &mut listener).await
    };
    for wanted in [PeerRule::Name("right".into()), PeerRule::Fingerprint(right)] {
        let said = connect(Some(wanted.clone())).await.unwrap_err();
        assert!(
            matches!(&said, LinkError::OtherPeer { found, wanted: w, .. }
                if found.contains("`thief`") && *w == wanted.to_string()),
            "{said}"
        );
    }
    for wanted in [None, Some(PeerRule::Name("thief".into())), Some(PeerRule::Fingerprint(thief))] {
        connect(wanted).await.unwrap();
    }
}

#[tokio::test]
async fn a_channel_outlives_its_certificate_and_no_new_one_is_made_with_it() {
    tokio::join!(outlives_its_certificate(Over::Quic), outlives_its_certificate(Over::Tls));
}

async fn outlives_its_certificate(over: Over) {
    let dir = pki(&["right"]);
    let left = dir.path().join("left");
    let from = SystemTime::now() - Duration::from_secs(60);
    let validity = Validity { from, host: Duration::from_secs(63), ..Validity::default() };
    init_for(dir.path(), &["left".to_owned()], &validity).unwrap();
    let (mut listener, addr) = listen(over, &dir.path().join("right"));
    let identity = load(&left);
    let said = identity.expires_soon(SystemTime::now()).unwrap();
    assert!(said.contains("`left`") && said.contains("ferry pki renew"), "{said}");
    let right = load(&dir.path().join("right"));
    assert_eq!(right.expires_soon(SystemTime::now()), None);
    let connector = leading(over, &identity, addr);
    let (mut out, mut in_) = meet(&connector, &mut listener).await.unwrap();
    tokio::time::sleep(Duration::from_secs(5)).await;
    let said = meet(&connector, &mut listener).await.unwrap_err();
    assert!(matches!(said, LinkError::Certificate { .. }), "{said}");
    assert!(said.to_string().contains("ferry pki renew"), "{said}");
    out.sink.send(Bytes::from_static(b"on")).await.unwrap();
    assert_eq!(in_.source.recv().await.unwrap().unwrap(), "on");

    // Renewed, it is let in again, by the connector that has been there all the while.
    renew(dir.path(), &["left".to_owned()], &Validity::default()).unwrap();
    tokio::time::sleep(LOOKED).await;
    let (_, again) = meet(&connector, &mut listener).await.unwrap();
    assert_eq!(again.peer.name, "left");
    assert_ne!(again.peer.fingerprint, in_.peer.fingerprint);
}

#[tokio::test]
async fn files_that_are_replaced_count_for_new_channels_and_half_of_them_for_none() {
    tokio::join!(counts_for_new_channels(Over::Quic), counts_for_new_channels(Over::Tls));
}

async fn counts_for_new_channels(over: Over) {
    let dir = pki(&["left", "right"]);
    let right = dir.path().join("right");
    let (mut listener, addr) = listen(over, &right);
    let connector = leading(over, &load(&dir.path().join("left")), addr);
    let (first, _keep) = meet(&connector, &mut listener).await.unwrap();
    // The new key is there, the new certificate is not.
    let old_key = fs::read(right.join("key.pem")).unwrap();
    fs::copy(dir.path().join("left/key.pem"), right.join("key.pem")).unwrap();
    tokio::time::sleep(LOOKED).await;
    let (half, _) = meet(&connector, &mut listener).await.unwrap();
    assert_eq!(half.peer, first.peer);
    fs::write(right.join("key.pem"), old_key).unwrap();
    renew(dir.path(), &["right".to_owned()], &Validity::default()).unwrap();
    tokio::time::sleep(LOOKED).await;
    let (second, _) = meet(&connector, &mut listener).await.unwrap();
    assert_eq!(second.peer.name, "right");
    assert_ne!(second.peer.fingerprint, first.peer.fingerprint);
    assert_eq!(second.peer.fingerprint, load(&right).fingerprint());
}

#[tokio::test]
async fn hosts_go_over_to_another_authority_one_by_one_without_a_stop() {
    tokio::join!(
        goes_over_to_another_authority(Over::Quic),
        goes_over_to_another_authority(Over::Tls)
    );
}

async fn goes_over_to_another_authority(over: Over) {
    let (old, new) = (pki(&["left", "right"]), pki(&["left", "right"]));
    let at = |dir: &TempDir, name: &str| dir.path().join(name);
    let (left, right) = (at(&old, "left"), at(&old, "right"));
    let (mut listener, addr) = listen(over, &right);
    let connector = leading(over, &load(&left), addr);
    let strange = leading(over, &load(&at(&new, "left")), addr);
    meet(&connector, &mut listener).await.unwrap();
    meet(&strange, &mut listener).await.unwrap_err();
    // Both hosts trust both; then one has the new identity, then the other.
    let both = [&old, &new].map(|d| fs::read_to_string(d.path().join("authority.pem")).unwrap());
    for host in [&left, &right] {
        fs::write(host.join("authority.pem"), both.concat()).unwrap();
    }
    for host in ["right", "left"] {
        for file in ["key.pem", "cert.pem"] {
            fs::copy(at(&new, host).join(file), at(&old, host).join(file)).unwrap();
        }
        tokio::time::sleep(LOOKED).await;
        meet(&connector, &mut listener).await.unwrap();
    }
    // The old authority is let go: who still has an identity of it stays outside.
    fs::write(right.join("authority.pem"), &both[1]).unwrap();
    tokio::time::sleep(LOOKED).await;
    meet(&connector, &mut listener).await.unwrap();
    let renewed = fs::read_to_string(left.join("authority.pem")).unwrap();
    assert_eq!(renewed, both.concat());
    let last = pki(&["left"]);
    fs::write(
        at(&last, "left").join("authority.pem"),
        format!("{}{}", both[1], {
            fs::read_to_string(last.path().join("authority.pem")).unwrap()
        }),
    )
    .unwrap();
    let strange = leading(over, &load(&at(&last, "left")), addr);
    let said = meet(&strange, &mut listener).await.unwrap_err();
    assert!(said.to_string().contains("another authority"), "{said}");
}

#[test]
fn an_authority_whose_time_is_over_is_trusted_no_more_and_nothing_outlives_one() {
    let (here, past) = (pki(&["a"]), TempDir::new().unwrap());
    let day = Duration::from_secs(86_400);
    let from = SystemTime::now() - 2 * day;
    let validity = Validity { from, authority: day, host: 90 * day };
    init_for(past.path(), &["b".to_owned()], &validity).unwrap();
    let b = past.path().join("b");
    Identity::load_at(&b, from + day / 2).unwrap();
    let said = Identity::load_at(&b, from + day + day / 2).unwrap_err().to_string();
    assert!(said.contains("cert.pem: the certificate expired"), "{said}");
    let a = here.path().join("a");
    let own = fs::read_to_string(a.join("authority.pem")).unwrap();
    let old = fs::read_to_string(past.path().join("authority.pem")).unwrap();
    fs::write(a.join("authority.pem"), own.clone() + &old).unwrap();
    load(&a);
    fs::write(a.join("authority.pem"), old).unwrap();
    let said = Identity::load(&a).unwrap_err().to_string();
    assert!(said.contains("authority.pem: the certificate expired"), "{said}");
}

#[test]
fn a_renewed_identity_is_of_the_same_host_and_trusts_whom_it_trusted() {
    let dir = pki(&["a", "b"]);
    let a = dir.path().join("a");
    let (before, key) = (load(&a), fs::read(a.join("key.pem")).unwrap());
    let trusted = fs::read(a.join("authority.pem")).unwrap();
    renew(dir.path(), &["a".to_owned()], &Validity::default()).unwrap();
    let after = load(&a);
    assert_eq!(after.name(), "a");
    assert_ne!(after.fingerprint(), before.fingerprint());
    assert_ne!(fs::read(a.join("key.pem")).unwrap(), key);
    assert_eq!(fs::read(a.join("authority.pem")).unwrap(), trusted);
    assert!(renew(dir.path(), &["c".to_owned()], &Validity::default()).is_err());
    let mut names: Vec<_> =
        fs::read_dir(dir.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    names.sort();
    assert_eq!(names, ["a", "authority.key", "authority.pem", "b"]);
}

/// Trust comes from the identity's folder and from nowhere else: what would bring a system's or a browser's
/// authorities is not among the dependencies.
#[test]
fn no_authority_of_the_system_is_ever_trusted() {
    let lock = include_str!("../../Cargo.lock");
    for package in
        ["rustls-native-certs", "webpki-roots", "rustls-platform-verifier", "openssl", "native-tls"]
    {
        assert!(!lock.contains(&format!("name = \"{package}\"")), "{package}");
    }
}

/// A client with `left`'s certificate at an address of its own, which does as it likes.
fn stranger(dir: &TempDir, from: Ipv4Addr) -> quinn::Endpoint {
    let left = dir.path().join("left");
    let mut roots = rustls::RootCertStore::empty();
    roots.add(CertificateDer::from_pem_file(left.join("authority.pem")).unwrap()).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut config = rustls::ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_root_certificates(roots)
        .with_client_auth_cert(
            vec![CertificateDer::from_pem_file(left.join("cert.pem")).unwrap()],
            PrivateKeyDer::from_pem_file(left.join("key.pem")).unwrap(),
        )
        .unwrap();
    config.alpn_protocols = vec![b"ferry/1".to_vec()];
    let crypto = quinn::crypto::rustls::QuicClientConfig::try_from(config).unwrap();
    let mut endpoint = quinn::Endpoint::client((from, 0).into()).unwrap();
    endpoint.set_default_client_config(quinn::ClientConfig::new(Arc::new(crypto)));
    endpoint
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_peer_that_connects_in_a_loop_is_slowed_down_and_others_are_served_meanwhile() {
    let dir = pki(&["left", "right"]);
    let (mut listener, addr) = listen(Over::Quic, &dir.path().join("right"));
    let endpoint = stranger(&dir, Ipv4Addr::new(127, 0, 0, 2));
    let began = Instant::now();
    let looping = tokio::spawn(async move {
        let (mut served, mut unanswered) = (0, 0);
        while began.elapsed() < Duration::from_secs(30) {
            let connecting = endpoint.connect(addr, "ferry").unwrap();
            // Two handshakes in the time that one takes to be asked for again.
            match tokio::time::timeout(Duration::from_millis(100), connecting).await {
                Ok(Ok(connection)) => {
                    served += 1;
                    connection.close(0u32.into(), b"");
                }
                Ok(Err(_)) => {}
                // Once more or less is not told.
                Err(_) if served > 256 && unanswered > 10 => break,
                Err(_) => unanswered += 1,
            }
        }
        (served, began.elapsed())
    });
    let connector = leading(Over::Quic, &load(&dir.path().join("left")), addr);
    let (mut honest, mut told) = (0, false);
    while !looping.is_finished() {
        let connect = connector.connect();
        tokio::pin!(connect);
        let mut accepted = Vec::new();
        let channel = loop {
            tokio::select! {
                done = &mut connect => break done,
                Some(new) = listener.accept() => match new {
                    Err(LinkError::TooOften { remote, .. }) => {
                        assert_eq!(remote, "127.0.0.2");
                        told = true;
                    }
                    other => accepted.push(other),
                },
            }
        };
        channel.unwrap();
        honest += 1;
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    let (served, took) = looping.await.unwrap();
    // It may be over before anybody listens again.
    while !told
        && let Ok(Some(new)) = tokio::time::timeout(Duration::from_secs(5), listener.accept()).await
    {
        told = matches!(new, Err(LinkError::TooOften { .. }));
    }
    // 64 with an unproven address and as many a second as all such get; 256 with a proven one, and 32 a second.
    let most = 64.0 + 256.0 + (32.0 + 32.0) * took.as_secs_f64() + 1.0;
    assert!(f64::from(served) <= most, "{served} in {took:?}");
    assert!(told && honest > 0, "{served} in {took:?}, {honest} honest ones, told: {told}");
}

#[tokio::test]
async fn a_peer_opens_one_stream_and_takes_little_until_it_is_known_what_for() {
    let dir = pki(&["left", "right"]);
    let (mut listener, addr) = listen(Over::Quic, &dir.path().join("right"));
    let endpoint = stranger(&dir, Ipv4Addr::LOCALHOST);
    let connection = endpoint.connect(addr, "ferry").unwrap().await.unwrap();
    let (mut send, _recv) = connection.open_bi().await.unwrap();
    send.write_all(b"ferry/1\n").await.unwrap();
    let channel = listener.accept().await.unwrap().unwrap();
    let soon = Duration::from_millis(300);
    assert!(tokio::time::timeout(soon, connection.open_bi()).await.is_err(), "a second stream");
    assert!(tokio::time::timeout(soon, connection.open_uni()).await.is_err(), "a one-way stream");
    let mut taken = 0;
    while let Ok(written) = tokio::time::timeout(soon, send.write(&[0; 4096])).await {
        taken += written.unwrap();
        assert!(taken <= 64 << 10, "{taken} bytes that nobody reads");
    }
    channel.source.widen()();
    while let Ok(written) = tokio::time::timeout(soon, send.write(&[0; 4096])).await {
        taken += written.unwrap();
    }
    assert!(taken > 4 << 20 && taken <= 8 << 20, "{taken}");
}
