//! From the system's and rustls's errors to words for people.

use std::io;

use rustls::{AlertDescription, Error};

use crate::secure::{HANDSHAKE_TIMEOUT, IDLE_TIMEOUT, refused};
use crate::{CertificateOf, LinkError, Over};

/// What is said of a peer whose socket is closed.
pub(super) const NO_WORD: &str = "the peer went away without a word";

pub(super) fn no_answer(remote: &str) -> LinkError {
    let seconds = HANDSHAKE_TIMEOUT.as_secs();
    LinkError::NoAnswer { over: Over::Tls, remote: remote.to_owned(), seconds }
}

pub(super) fn timed_out(remote: &str) -> LinkError {
    LinkError::TimedOut { remote: remote.to_owned(), seconds: IDLE_TIMEOUT.as_secs() }
}

pub(super) fn not_ferry(remote: &str) -> LinkError {
    LinkError::NotFerry { over: Over::Tls, remote: remote.to_owned() }
}

pub(super) fn lost(remote: &str, why: impl Into<String>) -> LinkError {
    LinkError::Lost { remote: remote.to_owned(), why: why.into() }
}

/// Whether the peer hung up before it said anything: a listener that is busy does.
pub(super) fn is_hung_up(e: &io::Error) -> bool {
    use io::ErrorKind::{BrokenPipe, ConnectionAborted, ConnectionReset, UnexpectedEof};
    matches!(e.kind(), BrokenPipe | ConnectionAborted | ConnectionReset | UnexpectedEof)
}

pub(super) fn io(e: &io::Error, remote: &str) -> LinkError {
    if let Some(tls) = e.get_ref().and_then(|e| e.downcast_ref::<Error>()) {
        return of_tls(tls, remote);
    }
    match e.kind() {
        io::ErrorKind::TimedOut => timed_out(remote),
        _ if is_hung_up(e) => lost(remote, NO_WORD),
        _ => lost(remote, e.to_string()),
    }
}

fn of_tls(e: &Error, remote: &str) -> LinkError {
    let (alert, whose) = match e {
        // The peer did not like what we sent.
        Error::AlertReceived(alert) => (*alert, CertificateOf::Ours),
        // We did not like what the peer sent.
        Error::InvalidCertificate(why) => (why.clone().into(), CertificateOf::Peer),
        Error::NoCertificatesPresented => {
            (AlertDescription::CertificateRequired, CertificateOf::Peer)
        }
        Error::NoApplicationProtocol | Error::InvalidMessage(_) | Error::PeerIncompatible(_) => {
            return not_ferry(remote);
        }
        _ => return lost(remote, e.to_string()),
    };
    refused(alert.into(), whose, &e.to_string(), Over::Tls, remote)
        .unwrap_or_else(|| lost(remote, e.to_string()))
}
