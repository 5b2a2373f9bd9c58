//! Who gets in over a network, and what is said of who does not: over QUIC and over TLS in the same words.

mod hosts;

use std::net::{TcpListener, UdpSocket};

use bytes::Bytes;
use ferry_transport::{
    CertificateOf, CertificateProblem, Connector, LinkChoice, LinkError, Listener, Over, Sockets,
};
use hosts::{LOOPBACK, NETWORKS, connector, hosts, listen, meet};

#[tokio::test]
async fn each_side_knows_the_other() {
    let hosts = hosts();
    for over in NETWORKS {
        let (left, right) = meet(over, &hosts.left, &hosts.right).await;
        let (left, right) = (left.unwrap(), right.unwrap());
        assert_eq!((left.peer.name.as_str(), right.peer.name.as_str()), ("right", "left"));
        assert_eq!(left.peer.fingerprint, hosts.right.fingerprint());
        assert_eq!(right.peer.fingerprint, hosts.left.fingerprint());
    }
}

#[tokio::test]
async fn a_certificate_of_another_authority_is_refused_on_both_sides() {
    let (here, elsewhere) = (hosts(), hosts());
    for over in NETWORKS {
        let (out, in_) = meet(over, &elsewhere.left, &here.right).await;
        // The connecting side looks first.
        for (error, of) in [(out, CertificateOf::Peer), (in_, CertificateOf::Ours)] {
            let error = error.unwrap_err();
            let LinkError::Certificate { whose, problem, .. } = &error else { panic!("{error}") };
            assert_eq!((*whose, problem), (of, &CertificateProblem::OtherAuthority), "{error}");
        }
    }
}

#[tokio::test]
async fn an_expired_certificate_is_refused_and_both_sides_say_whose() {
    let hosts = hosts();
    let old = hosts.expired();
    let of = |error: &LinkError| match error {
        LinkError::Certificate { whose, problem: CertificateProblem::NotInItsTime, .. } => *whose,
        other => panic!("{other}"),
    };
    for over in NETWORKS {
        let (out, in_) = meet(over, &old, &hosts.right).await;
        assert_eq!(of(&out.unwrap_err()), CertificateOf::Ours);
        assert_eq!(of(&in_.unwrap_err()), CertificateOf::Peer);
        let (out, in_) = meet(over, &hosts.left, &old).await;
        assert_eq!(of(&out.unwrap_err()), CertificateOf::Peer);
        assert_eq!(of(&in_.unwrap_err()), CertificateOf::Ours);
    }
}

#[tokio::test]
async fn an_address_where_nobody_answers_is_named() {
    let hosts = hosts();
    let (udp, tcp) = (UdpSocket::bind(LOOPBACK).unwrap(), TcpListener::bind(LOOPBACK).unwrap());
    let at = [udp.local_addr().unwrap(), tcp.local_addr().unwrap()];
    for (over, addr) in NETWORKS.into_iter().zip(at) {
        let error = connector(over, &hosts.left, addr).connect().await.unwrap_err();
        assert_eq!(error, LinkError::NoAnswer { over, remote: addr.to_string(), seconds: 5 });
        assert!(error.to_string().contains(&addr.to_string()));
    }
}

#[tokio::test]
async fn an_address_in_use_is_named() {
    let hosts = hosts();
    for over in NETWORKS {
        let (_listener, addr) = listen(over, &hosts.left);
        let error = Sockets::bind(addr, LinkChoice::Only(over)).err().unwrap();
        assert_eq!(error, LinkError::AddressInUse { addr });
        let error = Sockets::bind(addr, LinkChoice::Auto).err().unwrap();
        assert_eq!(error, LinkError::AddressInUse { addr });
        let nowhere = "192.0.2.1:0".parse().unwrap();
        let error = Sockets::bind(nowhere, LinkChoice::Only(over)).err().unwrap();
        assert!(matches!(error, LinkError::Socket { .. }), "{error}");
    }
}

#[tokio::test]
async fn a_listener_that_is_gone_refuses_new_peers_and_keeps_the_old() {
    let hosts = hosts();
    for over in NETWORKS {
        let (mut listener, addr) = listen(over, &hosts.right);
        let connector = connector(over, &hosts.left, addr);
        let (left, right) = tokio::join!(connector.connect(), listener.accept());
        let (mut left, mut right) = (left.unwrap(), right.unwrap().unwrap());
        drop(listener);
        let error = loop {
            match connector.connect().await {
                // Its task has not noticed yet.
                Ok(_) => {}
                Err(e) => break e,
            }
        };
        assert!(matches!(error, LinkError::Refused { .. } | LinkError::Lost { .. }), "{error}");
        let error = connector.connect().await.unwrap_err();
        assert!(matches!(error, LinkError::Refused { .. }), "{over}: {error}");
        left.sink.send(Bytes::from_static(b"on")).await.unwrap();
        assert_eq!(right.source.recv().await.unwrap().unwrap(), "on");
    }
}

#[tokio::test]
async fn two_links_at_one_address_have_one_port_and_auto_takes_what_answers() {
    let hosts = hosts();
    for (listens, over) in [
        (LinkChoice::Auto, "TLS to"),
        (LinkChoice::Only(Over::Tls), "TLS to"),
        (LinkChoice::Only(Over::Quic), "QUIC to"),
    ] {
        let mut listener = Sockets::bind(LOOPBACK, listens).unwrap().listen(&hosts.right).unwrap();
        let addr = listener.local_addr().unwrap();
        let auto =
            ferry_transport::EitherConnector::new(&hosts.left, addr, LinkChoice::Auto).unwrap();
        for _ in 0..2 {
            let (out, in_) = tokio::join!(auto.connect(), listener.accept());
            let (mut out, mut in_) = (out.unwrap(), in_.unwrap().unwrap());
            out.sink.send(Bytes::from_static(b"over")).await.unwrap();
            assert_eq!(in_.source.recv().await.unwrap().unwrap(), "over");
            assert!(auto.describe().starts_with(over), "{}", auto.describe());
        }
    }
}

#[tokio::test]
async fn auto_says_what_failed_over_both_links_and_a_certificate_only_once() {
    let (here, elsewhere) = (hosts(), hosts());
    let auto =
        |to| ferry_transport::EitherConnector::new(&here.left, to, LinkChoice::Auto).unwrap();
    let udp = UdpSocket::bind(LOOPBACK).unwrap();
    let error = auto(udp.local_addr().unwrap()).connect().await.unwrap_err().to_string();
    for words in ["nothing speaks QUIC", "over TCP", "refuses connections"] {
        assert!(error.contains(words), "{error}");
    }
    let sockets = Sockets::bind(LOOPBACK, LinkChoice::Auto).unwrap();
    let mut listener = sockets.listen(&elsewhere.right).unwrap();
    let to = listener.local_addr().unwrap();
    let auto = auto(to);
    let (error, _) = tokio::join!(auto.connect(), listener.accept());
    let error = error.unwrap_err();
    assert!(matches!(error, LinkError::Certificate { .. }), "{error}");
}
