//! Makes an authority and host identities. Files appear complete or not at all.

use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose,
};

use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use x509_parser::prelude::{FromDer, X509Certificate};

use super::private::check_private;
use super::{
    AUTHORITY_CERT, AUTHORITY_KEY, DEFAULT_HOST, HOST_CERT, HOST_KEY, PkiError, SERVICE_NAME,
    Validity,
};

/// Something that [`init`] made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Created {
    /// The authority, with its certificate's file.
    Authority(PathBuf),
    /// A host's identity, or a new one in place of the old, with its folder: what `--identity` takes.
    Host(String, PathBuf),
}

/// Makes an authority in `dir`, unless there is one, and an identity for each of `hosts`
/// ([`DEFAULT_HOST`] when there are none). Returns what was made.
///
/// # Errors
/// A bad name, an identity that exists already (then nothing was made), or the file system.
pub fn init(dir: &Path, hosts: &[String]) -> Result<Vec<Created>, PkiError> {
    init_for(dir, hosts, &Validity::default())
}

/// As [`init`], with certificates valid as `validity` says.
///
/// # Errors
/// As [`init`].
pub fn init_for(
    dir: &Path,
    hosts: &[String],
    validity: &Validity,
) -> Result<Vec<Created>, PkiError> {
    let default = [DEFAULT_HOST.to_owned()];
    let hosts = if hosts.is_empty() { &default } else { hosts };
    for name in hosts {
        check_name(name)?;
        let path = dir.join(name);
        if path.symlink_metadata().is_ok() {
            return Err(PkiError::Exists { name: name.clone(), path });
        }
    }
    make_dir(dir, true)?;
    let mut created = Vec::new();
    let (cert, key) = (dir.join(AUTHORITY_CERT), dir.join(AUTHORITY_KEY));
    match (cert.exists(), key.exists()) {
        (true, true) => {}
        (true, false) => return Err(PkiError::HalfAuthority { present: cert, missing: key }),
        (false, true) => return Err(PkiError::HalfAuthority { present: key, missing: cert }),
        (false, false) => {
            make_authority(&cert, &key, validity)?;
            created.push(Created::Authority(cert.clone()));
        }
    }
    let authority = Authority::open(dir)?;
    for name in hosts {
        let path = make_host(dir, name, &authority, &authority.pem, validity, false)?;
        created.push(Created::Host(name.clone(), path));
    }
    Ok(created)
}

/// Gives each of `hosts`, which have an identity in `dir`, a new key and certificate in place of the old. Whom they trust stays as it is, with the authority in `dir` added. Returns what was made.
///
/// # Errors
/// No authority or identity (then nothing was made), or the file system.
pub fn renew(dir: &Path, hosts: &[String], validity: &Validity) -> Result<Vec<Created>, PkiError> {
    for name in hosts {
        check_name(name)?;
        if !dir.join(name).join(HOST_CERT).is_file() {
            return Err(PkiError::Missing { path: dir.join(name), file: HOST_CERT });
        }
    }
    let authority = Authority::open(dir)?;
    let mut created = Vec::new();
    for name in hosts {
        let mut trusted = read(&dir.join(name).join(AUTHORITY_CERT))?;
        if !trusted.contains(authority.pem.trim()) {
            trusted = format!("{}\n{}", trusted.trim_end(), authority.pem);
        }
        let path = make_host(dir, name, &authority, &trusted, validity, true)?;
        created.push(Created::Host(name.clone(), path));
    }
    Ok(created)
}

struct Authority {
    pem: String,
    issuer: Issuer<'static, KeyPair>,
    until: SystemTime,
}

impl Authority {
    fn open(dir: &Path) -> Result<Self, PkiError> {
        let (cert, key) = (dir.join(AUTHORITY_CERT), dir.join(AUTHORITY_KEY));
        check_private(&key)?;
        let pem = read(&cert)?;
        let pair = KeyPair::from_pem(&read(&key)?)
            .map_err(|e| PkiError::Content { path: key, why: format!("not a private key: {e}") })?;
        let not_one = |e: &dyn std::fmt::Display| PkiError::Content {
            path: cert.clone(),
            why: format!("not an authority's certificate: {e}"),
        };
        let der = CertificateDer::from_pem_slice(pem.as_bytes()).map_err(|e| not_one(&e))?;
        let (_, parsed) = X509Certificate::from_der(&der).map_err(|e| not_one(&e))?;
        let until = parsed.validity().not_after.to_datetime().into();
        let issuer = Issuer::from_ca_cert_pem(&pem, pair).map_err(|e| not_one(&e))?;
        Ok(Self { pem, issuer, until })
    }
}

fn make_authority(cert: &Path, key: &Path, validity: &Validity) -> Result<(), PkiError> {
    let fail =
        |e: rcgen::Error| PkiError::Make { name: "the authority".into(), why: e.to_string() };
    let pair = KeyPair::generate().map_err(fail)?;
    let mut params = params(validity.from, validity.authority);
    // A name of its own for each authority: a certificate of another one is then "from another
    // authority", and not "badly signed".
    let id: String =
        params.key_identifier(&pair).iter().take(6).map(|byte| format!("{byte:02x}")).collect();
    params.distinguished_name.push(DnType::CommonName, format!("Ferry authority {id}"));
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    let signed = params.self_signed(&pair).map_err(fail)?;
    write_new(key, &pair.serialize_pem(), 0o600)?;
    write_new(cert, &signed.pem(), 0o644)
}

fn make_host(
    dir: &Path,
    name: &str,
    authority: &Authority,
    trusted_pem: &str,
    validity: &Validity,
    replace: bool,
) -> Result<PathBuf, PkiError> {
    let fail = |e: rcgen::Error| PkiError::Make { name: name.to_owned(), why: e.to_string() };
    let pair = KeyPair::generate().map_err(fail)?;
    let mut params = params(validity.from, validity.host);
    // A verifier does not look at an authority's time: nothing outlives it.
    params.not_after = params.not_after.min(authority.until.into());
    params.distinguished_name.push(DnType::CommonName, name);
    let mut dns_names = vec![SERVICE_NAME, name];
    dns_names.dedup();
    for dns_name in dns_names {
        let dns_name = dns_name.try_into().map_err(fail)?;
        params.subject_alt_names.push(rcgen::SanType::DnsName(dns_name));
    }
    params.use_authority_key_identifier_extension = true;
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages =
        vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
    let signed = params.signed_by(&pair, &authority.issuer).map_err(fail)?;

    let path = dir.join(name);
    let unfinished = dir.join(format!(".{name}.{}", std::process::id()));
    make_dir(&unfinished, false)?;
    let made = write_new(&unfinished.join(HOST_KEY), &pair.serialize_pem(), 0o600)
        .and_then(|()| write_new(&unfinished.join(HOST_CERT), &signed.pem(), 0o644))
        .and_then(|()| write_new(&unfinished.join(AUTHORITY_CERT), trusted_pem, 0o644))
        .and_then(|()| {
            if replace { exchange(&unfinished, &path) } else { rename(&unfinished, &path, name) }
        });
    if made.is_err() {
        // What failed is told; a folder that stays behind as well is not worth a word.
        let _ = fs::remove_dir_all(&unfinished);
    }
    made.map(|()| path)
}

fn rename(unfinished: &Path, path: &Path, name: &str) -> Result<(), PkiError> {
    match fs::rename(unfinished, path) {
        Err(e) if matches!(e.kind(), io::ErrorKind::DirectoryNotEmpty) => {
            Err(PkiError::Exists { name: name.to_owned(), path: path.to_owned() })
        }
        renamed => renamed.map_err(PkiError::io("create", path)),
    }
}

/// File by file: the directory stays the one that a confined process may read. A key and a certificate that do not
/// belong together are taken by nobody.
fn exchange(unfinished: &Path, path: &Path) -> Result<(), PkiError> {
    for file in [AUTHORITY_CERT, HOST_CERT, HOST_KEY] {
        let to = path.join(file);
        fs::rename(unfinished.join(file), &to).map_err(PkiError::io("replace", &to))?;
    }
    fs::remove_dir(unfinished).map_err(PkiError::io("remove", unfinished))
}

fn params(from: SystemTime, valid: Duration) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = rcgen::DistinguishedName::new();
    params.not_before = from.into();
    params.not_after = (from + valid).into();
    params
}

fn check_name(name: &str) -> Result<(), PkiError> {
    let edge = |c: Option<char>| c.is_some_and(|c| c.is_ascii_alphanumeric());
    let good = name.len() <= 63
        && edge(name.chars().next())
        && edge(name.chars().last())
        && name.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '.'))
        && !name.contains("..")
        && ![AUTHORITY_CERT, AUTHORITY_KEY].contains(&name);
    if good { Ok(()) } else { Err(PkiError::Name { name: name.to_owned() }) }
}

fn make_dir(path: &Path, with_parents: bool) -> Result<(), PkiError> {
    fs::DirBuilder::new()
        .mode(0o700)
        .recursive(with_parents)
        .create(path)
        .map_err(PkiError::io("create", path))
}

/// Writes a file that is not there yet: complete under its name, or not at all.
fn write_new(path: &Path, content: &str, mode: u32) -> Result<(), PkiError> {
    let temporary = path.with_extension(format!("new.{}", std::process::id()));
    let write = || {
        let mut file =
            OpenOptions::new().write(true).create_new(true).mode(mode).open(&temporary)?;
        file.write_all(content.as_bytes())?;
        file.sync_all()?;
        fs::rename(&temporary, path)
    };
    write().map_err(|e| {
        // As above.
        let _ = fs::remove_file(&temporary);
        PkiError::io("write", path)(e)
    })
}

fn read(path: &Path) -> Result<String, PkiError> {
    fs::read_to_string(path).map_err(PkiError::io("read", path))
}
