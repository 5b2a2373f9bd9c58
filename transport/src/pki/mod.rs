//! The private authority and the identities of hosts.
//!
//! ```text
//! DIR/authority.pem   the authority's certificate          DIR/NAME/cert.pem       a host's certificate
//! DIR/authority.key   its key: stays where it was made     DIR/NAME/key.pem        its key
//!                                                          DIR/NAME/authority.pem  whom it trusts
//! ```
//! Hosts trust exactly this authority, or, while they change from one to another, all in that file; no authority of the
//! system. Every host certificate carries the DNS name [`SERVICE_NAME`], so
//! that a destination may have any address, and the host's own name, by which peers report it.

mod identity;
mod init;
mod private;

use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

pub use identity::{Identity, peer_name};
pub use init::{Created, init, init_for, renew};

/// The DNS name that every host's certificate carries.
pub const SERVICE_NAME: &str = "ferry";
/// The host that is made when none is named.
pub const DEFAULT_HOST: &str = "host";

const AUTHORITY_CERT: &str = "authority.pem";
const AUTHORITY_KEY: &str = "authority.key";
const HOST_CERT: &str = "cert.pem";
const HOST_KEY: &str = "key.pem";

const DAY: Duration = Duration::from_secs(86_400);

/// From when and for how long new certificates are valid.
#[derive(Clone, Copy, Debug)]
pub struct Validity {
    /// From when.
    pub from: SystemTime,
    /// How long the authority.
    pub authority: Duration,
    /// How long a host.
    pub host: Duration,
}

impl Default for Validity {
    /// From an hour ago (clocks differ), ten years for the authority, two for a host.
    fn default() -> Self {
        let now = SystemTime::now();
        Self {
            from: now.checked_sub(Duration::from_secs(3600)).unwrap_or(now),
            authority: DAY * 3652,
            host: DAY * 730,
        }
    }
}

/// Why identities could not be made or loaded.
#[derive(Debug, thiserror::Error)]
pub enum PkiError {
    /// A name that cannot be a host's.
    #[error(
        "{name:?} cannot be a host's name: use 1 to 63 letters, digits, `-` and `.`, beginning and ending with a letter or digit"
    )]
    Name {
        /// The name.
        name: String,
    },
    /// A host that has an identity.
    #[error("{} exists: it is not overwritten; `ferry pki renew` gives {name} a new key and certificate", path.display())]
    Exists {
        /// The host.
        name: String,
        /// Its folder.
        path: PathBuf,
    },
    /// An authority of which only a part is there.
    #[error("{} is there but {} is not: restore it, or make a new authority in an empty directory", present.display(), missing.display())]
    HalfAuthority {
        /// The file that is there.
        present: PathBuf,
        /// The file that is not.
        missing: PathBuf,
    },
    /// A directory that is not there.
    #[error("no identity at {}: there is no such directory; `ferry pki init` makes identities", path.display())]
    NoDirectory {
        /// The directory.
        path: PathBuf,
    },
    /// A file of an identity that is not there.
    #[error("identity {}: {file} is missing; point to a host's folder made by `ferry pki init`", path.display())]
    Missing {
        /// The identity's folder.
        path: PathBuf,
        /// The file.
        file: &'static str,
    },
    /// A file that does not hold what its name says.
    #[error("{}: {why}", path.display())]
    Content {
        /// The file.
        path: PathBuf,
        /// What is the matter.
        why: String,
    },
    /// A key that is not its owner's alone.
    #[error("others than its owner can reach the key {} (mode {mode:o}): `chmod 600 {}`, and make a new one if it may have been read", path.display(), path.display())]
    Exposed {
        /// The key's file.
        path: PathBuf,
        /// Its permissions.
        mode: u32,
    },
    /// A key that belongs to another certificate.
    #[error("identity {}: {key} is not the key of {cert}", path.display())]
    KeyMismatch {
        /// The folder.
        path: PathBuf,
        /// The key's file.
        key: &'static str,
        /// The certificate's file.
        cert: &'static str,
    },
    /// A certificate whose time is over.
    #[error("{}: the certificate expired on {date}; make a new one by `ferry pki renew`", path.display())]
    Expired {
        /// The file.
        path: PathBuf,
        /// When.
        date: String,
    },
    /// A certificate whose time has not come.
    #[error("{}: the certificate is not valid before {date}; check this host's clock", path.display())]
    NotYetValid {
        /// The file.
        path: PathBuf,
        /// From when.
        date: String,
    },
    /// A certificate that its authority did not sign.
    #[error("identity {}: the authority in authority.pem did not sign cert.pem ({why})", path.display())]
    OtherAuthority {
        /// The folder.
        path: PathBuf,
        /// The verifier's word.
        why: String,
    },
    /// Reading or writing failed.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// `read`, `write`, `create`, `replace`, `remove`.
        action: &'static str,
        /// The file or directory.
        path: PathBuf,
        /// The system's word.
        source: io::Error,
    },
    /// The cryptography library refused.
    #[error("cannot make a certificate for {name}: {why}")]
    Make {
        /// For whom.
        name: String,
        /// The library's word.
        why: String,
    },
}

impl PkiError {
    fn io(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Io { action, path, source }
    }
}
