//! From quinn's errors and TLS alerts to words for people.

use quinn::{ConnectionError, ReadError, TransportErrorCode, WriteError};

use super::{HANDSHAKE_TIMEOUT, IDLE_TIMEOUT};
use crate::{CertificateOf, CertificateProblem, LinkError};

/// How far a connection had come when it failed.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Phase {
    /// Nothing was heard from the peer yet.
    Connecting,
    /// The peer is known to be there.
    Established,
}

pub(super) fn no_answer(remote: &str) -> LinkError {
    LinkError::NoAnswer { remote: remote.to_owned(), seconds: HANDSHAKE_TIMEOUT.as_secs() }
}

pub(super) fn lost(remote: &str, why: impl Into<String>) -> LinkError {
    LinkError::Lost { remote: remote.to_owned(), why: why.into() }
}

pub(super) fn connection(error: &ConnectionError, remote: &str, phase: Phase) -> LinkError {
    let remote_name = remote.to_owned();
    match error {
        ConnectionError::TimedOut if phase == Phase::Connecting => no_answer(remote),
        ConnectionError::TimedOut => {
            LinkError::TimedOut { remote: remote_name, seconds: IDLE_TIMEOUT.as_secs() }
        }
        ConnectionError::VersionMismatch => LinkError::NotFerry { remote: remote_name },
        // We did not like what the peer sent.
        ConnectionError::TransportError(e) => {
            by_code(e.code, CertificateOf::Peer, &e.reason, remote)
        }
        // The peer did not like what we sent.
        ConnectionError::ConnectionClosed(close) => {
            by_code(close.error_code, CertificateOf::Ours, &plain(&close.reason), remote)
        }
        ConnectionError::ApplicationClosed(close) if !close.reason.is_empty() => {
            LinkError::Closed { remote: remote_name, reason: plain(&close.reason) }
        }
        ConnectionError::ApplicationClosed(_) => {
            lost(remote, "the peer closed it without a reason")
        }
        ConnectionError::Reset => lost(remote, "the peer has no memory of it (was it restarted?)"),
        ConnectionError::LocallyClosed => lost(remote, "this side closed it"),
        ConnectionError::CidsExhausted => lost(remote, "connection identifiers are exhausted"),
    }
}

/// A peer's words go to the operator's terminal; they fit into a packet.
fn plain(words: &[u8]) -> String {
    String::from_utf8_lossy(words).replace(char::is_control, " ")
}

/// `refused`: whose certificate it is, where the code is about one.
fn by_code(
    code: TransportErrorCode,
    refused: CertificateOf,
    reason: &str,
    remote: &str,
) -> LinkError {
    use CertificateProblem::{Missing, NotInItsTime, Other, OtherAuthority};
    if code == TransportErrorCode::CONNECTION_REFUSED {
        return LinkError::Refused { remote: remote.to_owned() };
    }
    // RFC 9001, 4.8: QUIC carries a TLS alert as 0x100 + the alert's number (RFC 8446, 6).
    let alert = u64::from(code).checked_sub(0x100).and_then(|alert| u8::try_from(alert).ok());
    let problem = match alert {
        Some(120) => return LinkError::NotFerry { remote: remote.to_owned() },
        // unknown_ca; decrypt_error is how a signature by a key of another authority looks.
        Some(48 | 51) => OtherAuthority,
        Some(45) => NotInItsTime,
        Some(116) => Missing,
        Some(42) => Other(format!("bad certificate ({reason})")),
        Some(43) => Other(format!("unsupported certificate ({reason})")),
        Some(44) => Other(format!("revoked ({reason})")),
        Some(46) => Other(format!("certificate unknown ({reason})")),
        _ => return lost(remote, format!("{code} ({reason})")),
    };
    LinkError::Certificate { whose: refused, remote: remote.to_owned(), problem }
}

pub(super) fn write(error: WriteError, remote: &str) -> LinkError {
    match error {
        WriteError::ConnectionLost(e) => connection(&e, remote, Phase::Established),
        WriteError::Stopped(_) => lost(remote, "the peer stopped reading"),
        WriteError::ClosedStream => lost(remote, "this side finished before"),
        WriteError::ZeroRttRejected => lost(remote, "early data was rejected"),
    }
}

pub(super) fn read(error: ReadError, remote: &str) -> LinkError {
    match error {
        ReadError::ConnectionLost(e) => connection(&e, remote, Phase::Established),
        ReadError::Reset(_) => lost(remote, "the peer went away before it finished"),
        other => lost(remote, other.to_string()),
    }
}
