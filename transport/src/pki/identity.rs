//! A host's identity: its certificate, its key, and the authority that it trusts.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use rustls::RootCertStore;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, UnixTime};
use rustls::server::WebPkiClientVerifier;
use rustls::sign::CertifiedKey;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use x509_parser::prelude::{FromDer, X509Certificate};

use super::private::check_private;
use super::{AUTHORITY_CERT, HOST_CERT, HOST_KEY, PkiError};
use crate::Fingerprint;
use crate::secure::crypto_provider;

/// A certificate whose time ends sooner than this is worth a word.
const EXPIRES_SOON: Duration = Duration::from_secs(30 * 86_400);

/// Who this host is, and whom it trusts.
#[derive(Clone)]
pub struct Identity {
    name: String,
    fingerprint: Fingerprint,
    until: OffsetDateTime,
    dir: PathBuf,
    /// Of the files, before they were read.
    stamps: Stamps,
    pub(crate) certified: Arc<CertifiedKey>,
    pub(crate) authority: Arc<RootCertStore>,
}

impl std::fmt::Debug for Identity {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Identity({})", self.name)
    }
}

impl Identity {
    /// Loads the identity in folder `dir`, and checks that peers will accept it.
    ///
    /// # Errors
    /// What is missing, damaged, expired, or does not fit together.
    pub fn load(dir: &Path) -> Result<Self, PkiError> {
        Self::load_at(dir, SystemTime::now())
    }

    /// As [`load`](Self::load), by another clock.
    ///
    /// # Errors
    /// As [`load`](Self::load).
    pub fn load_at(dir: &Path, now: SystemTime) -> Result<Self, PkiError> {
        if !dir.is_dir() {
            return Err(PkiError::NoDirectory { path: dir.to_owned() });
        }
        let stamps = stamps(dir);
        let cert = read_certificates(dir, HOST_CERT)?.swap_remove(0);
        let authorities = read_certificates(dir, AUTHORITY_CERT)?;
        let (key_path, key_pem) = read(dir, HOST_KEY)?;
        check_private(&key_path)?;
        let key = PrivateKeyDer::from_pem_slice(&key_pem)
            .map_err(|e| content(&key_path, "not a private key in PEM form", e))?;

        let provider = crypto_provider();
        let key = provider
            .key_provider
            .load_private_key(key)
            .map_err(|e| content(&key_path, "not a key that TLS can use", e))?;
        let certified = CertifiedKey::new(vec![cert.der.clone()], key);
        if certified.keys_match().is_err() {
            return Err(PkiError::KeyMismatch {
                path: dir.to_owned(),
                key: HOST_KEY,
                cert: HOST_CERT,
            });
        }
        cert.check_time(now)?;

        let other = |why: String| PkiError::OtherAuthority { path: dir.to_owned(), why };
        let mut roots = RootCertStore::empty();
        let mut of_the_past = None;
        for authority in authorities {
            // Verifiers of TLS do not look at a root's time.
            if let Err(e) = authority.check_time(now) {
                of_the_past = Some(e);
                continue;
            }
            roots
                .add(authority.der)
                .map_err(|e| content(&authority.path, "not an authority's certificate", e))?;
        }
        if let (true, Some(e)) = (roots.is_empty(), of_the_past) {
            return Err(e);
        }
        let roots = Arc::new(roots);
        let since_epoch = now.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        WebPkiClientVerifier::builder_with_provider(roots.clone(), provider)
            .build()
            .map_err(|e| other(e.to_string()))?
            .verify_client_cert(&cert.der, &[], UnixTime::since_unix_epoch(since_epoch))
            .map_err(|e| other(e.to_string()))?;
        let name = peer_name(&cert.der)
            .ok_or_else(|| content(&cert.path, "no host name", "its subject has no common name"))?;
        Ok(Self {
            name,
            fingerprint: Fingerprint::of(&cert.der),
            until: cert.until,
            dir: dir.to_owned(),
            stamps,
            certified: Arc::new(certified),
            authority: roots,
        })
    }

    /// The identity as it is now, if its files were replaced since it was loaded.
    pub fn renewed(&self) -> Option<Result<Self, PkiError>> {
        (stamps(&self.dir) != self.stamps).then(|| Self::load(&self.dir))
    }

    /// Of its certificate.
    pub fn fingerprint(&self) -> Fingerprint {
        self.fingerprint
    }

    /// A sentence for the operator if its time ends within 30 days of `now`.
    pub fn expires_soon(&self, now: SystemTime) -> Option<String> {
        let left = self.until - OffsetDateTime::from(now);
        (left < EXPIRES_SOON).then(|| {
            format!(
                "the certificate of `{}` in {} expires on {}: `ferry pki renew` makes a new one, which is used for \
                 new connections as soon as it is there",
                self.name,
                self.dir.display(),
                words(self.until)
            )
        })
    }

    /// The host's name.
    pub fn name(&self) -> &str {
        &self.name
    }
}

/// The host's name in a certificate: its common name.
pub fn peer_name(der: &[u8]) -> Option<String> {
    let (_, cert) = X509Certificate::from_der(der).ok()?;
    let name = cert.subject().iter_common_name().next()?.as_str().ok()?;
    Some(name.to_owned())
}

struct Certificate {
    path: PathBuf,
    der: CertificateDer<'static>,
    from: OffsetDateTime,
    until: OffsetDateTime,
}

impl Certificate {
    fn check_time(&self, now: SystemTime) -> Result<(), PkiError> {
        let now = OffsetDateTime::from(now);
        let path = self.path.clone();
        if now > self.until {
            return Err(PkiError::Expired { path, date: words(self.until) });
        }
        if now < self.from {
            return Err(PkiError::NotYetValid { path, date: words(self.from) });
        }
        Ok(())
    }
}

fn words(at: OffsetDateTime) -> String {
    at.format(&Rfc3339).unwrap_or_else(|_| at.to_string())
}

/// Of each file of an identity: none if it is not there, else what changes when it is replaced.
type Stamps = [Option<(u64, i64, i64, u64)>; 3];

fn stamps(dir: &Path) -> Stamps {
    [HOST_CERT, HOST_KEY, AUTHORITY_CERT].map(|file| {
        let about = fs::metadata(dir.join(file)).ok()?;
        Some((about.ino(), about.ctime(), about.ctime_nsec(), about.size()))
    })
}

/// All of a file; at least one.
fn read_certificates(dir: &Path, file: &'static str) -> Result<Vec<Certificate>, PkiError> {
    let (path, pem) = read(dir, file)?;
    let all: Vec<_> = CertificateDer::pem_slice_iter(&pem)
        .collect::<Result<_, _>>()
        .map_err(|e| content(&path, "not a certificate in PEM form", e))?;
    if all.is_empty() {
        return Err(content(&path, "not a certificate in PEM form", "there is none in it"));
    }
    let read = |der: CertificateDer<'static>| {
        let (from, until) = {
            let (_, cert) = X509Certificate::from_der(&der)
                .map_err(|e| content(&path, "not an X.509 certificate", e))?;
            let validity = cert.validity();
            (validity.not_before.to_datetime(), validity.not_after.to_datetime())
        };
        Ok(Certificate { path: path.clone(), der, from, until })
    };
    all.into_iter().map(read).collect()
}

fn read(dir: &Path, file: &'static str) -> Result<(PathBuf, Vec<u8>), PkiError> {
    let path = dir.join(file);
    match fs::read(&path) {
        Ok(bytes) => Ok((path, bytes)),
        Err(e) if e.kind() == io::ErrorKind::NotFound => {
            Err(PkiError::Missing { path: dir.to_owned(), file })
        }
        Err(e) => Err(PkiError::io("read", &path)(e)),
    }
}

fn content(path: &Path, what: &str, why: impl std::fmt::Display) -> PkiError {
    PkiError::Content { path: path.to_owned(), why: format!("{what} ({why})") }
}
