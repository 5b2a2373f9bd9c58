//! Why a link failed, in words for the person who operates it.

use std::fmt;
use std::io;
use std::net::SocketAddr;

/// Over what a link goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Over {
    /// QUIC, and so UDP.
    Quic,
    /// TLS over TCP.
    Tls,
}

impl Over {
    /// What carries it.
    fn below(self) -> &'static str {
        match self {
            Self::Quic => "UDP",
            Self::Tls => "TCP",
        }
    }
}

impl fmt::Display for Over {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Quic => "QUIC",
            Self::Tls => "TLS",
        })
    }
}

/// Why a link could not be made, or ended.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LinkError {
    /// Nobody answered a connection attempt.
    #[error(
        "nothing speaks {over} at {remote}: no answer within {seconds} s; check the address, that `ferry receive` or `ferry bundle serve` listens there, and that {} passes", .over.below()
    )]
    NoAnswer {
        /// What was tried.
        over: Over,
        /// The address.
        remote: String,
        /// How long it was waited.
        seconds: u64,
    },
    /// The peer takes no connections at the moment.
    #[error("{remote} refuses connections: it is busy with others, or is not receiving; try again")]
    Refused {
        /// The peer.
        remote: String,
    },
    /// The peer speaks something else than Ferry.
    #[error(
        "{remote} speaks {over} but not Ferry's protocol; check the address and the versions on both sides"
    )]
    NotFerry {
        /// What was tried.
        over: Over,
        /// The peer.
        remote: String,
    },
    /// A certificate was not accepted, by us or by the peer.
    #[error("{}", certificate_words(.whose, .remote, .problem))]
    Certificate {
        /// Whose certificate it is.
        whose: CertificateOf,
        /// The peer.
        remote: String,
        /// What is the matter with it.
        problem: CertificateProblem,
    },
    /// The peer was heard from, and then no more.
    #[error(
        "{remote} was not heard from for {seconds} s: the network in between, or the peer, is gone"
    )]
    TimedOut {
        /// The peer.
        remote: String,
        /// How long it was waited.
        seconds: u64,
    },
    /// The peer is not who it has to be.
    #[error(
        "{remote} is host {found}, and has to be `{wanted}`: check the address; nothing was told to it"
    )]
    OtherPeer {
        /// The address.
        remote: String,
        /// Who it is.
        found: String,
        /// Who it has to be.
        wanted: String,
    },
    /// The peer opens connections faster than they are taken.
    #[error(
        "{remote} opens more than {per_s} connections a second: the others are left unanswered until it waits"
    )]
    TooOften {
        /// The peer.
        remote: String,
        /// How many it may.
        per_s: u32,
    },
    /// The peer ended the connection and said why.
    #[error("{remote} closed the connection: {reason}")]
    Closed {
        /// The peer.
        remote: String,
        /// What it said.
        reason: String,
    },
    /// The connection ended without a word of why.
    #[error("the connection to {remote} was lost: {why}")]
    Lost {
        /// The peer.
        remote: String,
        /// What is known.
        why: String,
    },
    /// The address to listen on is taken.
    #[error(
        "cannot listen on {addr}: the address is in use; stop the process that has it (`ss -tulpn` shows it) or choose another port"
    )]
    AddressInUse {
        /// The address.
        addr: SocketAddr,
    },
    /// The address to listen on, or a socket to connect with, is not to be had.
    #[error("cannot open a {} socket on {addr}: {why}", .over.below())]
    Socket {
        /// For what.
        over: Over,
        /// The address.
        addr: SocketAddr,
        /// The system's word.
        why: String,
    },
    /// Neither link could be made.
    #[error("{quic}; and over TCP: {tls}")]
    Neither {
        /// Over QUIC.
        quic: Box<LinkError>,
        /// Over TLS.
        tls: Box<LinkError>,
    },
    /// None of several ways leads to the host.
    #[error("none of the addresses serves: {}", all(.of))]
    NoWay {
        /// Why, for each.
        of: Vec<LinkError>,
    },
    /// TLS cannot be set up with this identity.
    #[error("cannot set up TLS: {why}")]
    Tls {
        /// The library's word.
        why: String,
    },
    /// A message announces more bytes than it may have.
    #[error("a message of {bytes} bytes is announced, at most {max} are allowed here")]
    TooLong {
        /// Announced.
        bytes: u64,
        /// Allowed.
        max: usize,
    },
    /// The peer finished in the middle of a message or frame.
    #[error("the peer finished after {found} of {expected} bytes of a message")]
    Truncated {
        /// Bytes that belong there.
        expected: usize,
        /// Bytes that came.
        found: usize,
    },
}

fn all(errors: &[LinkError]) -> String {
    errors.iter().map(LinkError::to_string).collect::<Vec<_>>().join("; ")
}

impl LinkError {
    /// Whether another link or another address may do better.
    pub(crate) fn is_unanswered(&self) -> bool {
        matches!(
            self,
            Self::Lost { .. }
                | Self::Neither { .. }
                | Self::NoAnswer { .. }
                | Self::NotFerry { .. }
                | Self::Refused { .. }
                | Self::Socket { .. }
                | Self::TimedOut { .. }
        )
    }

    pub(crate) fn socket(over: Over, addr: SocketAddr, e: &io::Error) -> Self {
        match e.kind() {
            io::ErrorKind::AddrInUse => Self::AddressInUse { addr },
            _ => Self::Socket { over, addr, why: e.to_string() },
        }
    }
}

/// Whose certificate was not accepted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CertificateOf {
    /// This host's, by the peer.
    Ours,
    /// The peer's, by this host.
    Peer,
}

/// What is the matter with a certificate.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CertificateProblem {
    /// Another authority signed it.
    OtherAuthority,
    /// Its time is over, or has not come (by the clock of the side that refused it).
    NotInItsTime,
    /// None was shown.
    Missing,
    /// Something else.
    Other(String),
}

fn certificate_words(whose: &CertificateOf, remote: &str, problem: &CertificateProblem) -> String {
    use CertificateProblem::{Missing, NotInItsTime, Other, OtherAuthority};
    match (whose, problem) {
        (CertificateOf::Peer, OtherAuthority) => format!(
            "the certificate of {remote} is from another authority; both hosts need identities made by the same `ferry pki init`"
        ),
        (CertificateOf::Ours, OtherAuthority) => format!(
            "{remote} does not accept this host's certificate: it is from another authority; both hosts need identities made by the same `ferry pki init`"
        ),
        (CertificateOf::Peer, NotInItsTime) => format!(
            "the certificate of {remote} has expired or is not valid yet; give it a new one by `ferry pki renew`, or set the clocks right"
        ),
        (CertificateOf::Ours, NotInItsTime) => format!(
            "{remote} does not accept this host's certificate: it has expired or is not valid yet; make a new one by `ferry pki renew`, or set the clocks right"
        ),
        (CertificateOf::Peer, Missing) => {
            format!("{remote} showed no certificate; it needs an identity from `ferry pki init`")
        }
        (CertificateOf::Ours, Missing) => {
            format!("{remote} asks for a certificate; use an identity from `ferry pki init`")
        }
        (CertificateOf::Peer, Other(why)) => {
            format!("the certificate of {remote} is not accepted: {why}")
        }
        (CertificateOf::Ours, Other(why)) => {
            format!("{remote} does not accept this host's certificate: {why}")
        }
    }
}
