//! From quinn's errors and TLS alerts to words for people.

use quinn::{ConnectionError, ReadError, TransportErrorCode, WriteError};

use crate::secure::{HANDSHAKE_TIMEOUT, IDLE_TIMEOUT, plain, refused};
use crate::{CertificateOf, LinkError, Over};

/// How far a connection had come when it failed.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Phase {
    /// Nothing was heard from the peer yet.
    Connecting,
    /// The peer is known to be there.
    Established,
}

pub(super) fn no_answer(remote: &str) -> LinkError {
    let seconds = HANDSHAKE_TIMEOUT.as_secs();
    LinkError::NoAnswer { over: Over::Quic, remote: remote.to_owned(), seconds }
}

/// Nothing was heard from the peer for too long.
pub(super) fn silent(remote: &str) -> LinkError {
    LinkError::TimedOut { remote: remote.to_owned(), seconds: IDLE_TIMEOUT.as_secs() }
}

pub(super) fn lost(remote: &str, why: impl Into<String>) -> LinkError {
    LinkError::Lost { remote: remote.to_owned(), why: why.into() }
}

pub(super) fn connection(error: &ConnectionError, remote: &str, phase: Phase) -> LinkError {
    let remote_name = remote.to_owned();
    match error {
        ConnectionError::TimedOut if phase == Phase::Connecting => no_answer(remote),
        ConnectionError::TimedOut => silent(remote),
        ConnectionError::VersionMismatch => {
            LinkError::NotFerry { over: Over::Quic, remote: remote_name }
        }
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

/// `whose`: whose certificate it is, where the code is about one.
fn by_code(
    code: TransportErrorCode,
    whose: CertificateOf,
    reason: &str,
    remote: &str,
) -> LinkError {
    if code == TransportErrorCode::CONNECTION_REFUSED {
        return LinkError::Refused { remote: remote.to_owned() };
    }
    // RFC 9001, 4.8: QUIC carries a TLS alert as 0x100 + the alert's number.
    let alert = u64::from(code).checked_sub(0x100).and_then(|alert| u8::try_from(alert).ok());
    alert
        .and_then(|alert| refused(alert, whose, reason, Over::Quic, remote))
        .unwrap_or_else(|| lost(remote, format!("{code} ({reason})")))
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
