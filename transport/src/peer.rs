//! Who a peer is, by the certificate that it showed, and who it has to be.

use std::fmt;
use std::str::FromStr;

use ring::digest::{SHA256, digest};

/// What stands in front of a fingerprint in words.
const SHA256_MARK: &str = "sha256:";

/// SHA-256 of a certificate in DER form: what `openssl x509 -fingerprint -sha256` shows.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Fingerprint([u8; 32]);

impl Fingerprint {
    /// Of these bytes.
    pub fn of(der: &[u8]) -> Self {
        let mut bytes = [0; 32];
        bytes.copy_from_slice(digest(&SHA256, der).as_ref());
        Self(bytes)
    }
}

impl fmt::Display for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(SHA256_MARK)?;
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// A host that proved who it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Peer {
    /// The name in its certificate, which is the same when the certificate is renewed.
    pub name: String,
    /// Of just this certificate.
    pub fingerprint: Fingerprint,
}

impl fmt::Display for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "`{}` ({})", self.name, self.fingerprint)
    }
}

/// Which peer is meant: by name, or by one certificate of it. Written as `host1` or `sha256:` with 64 hexadecimal
/// digits, with colons or without.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PeerRule {
    /// Whoever has a certificate with this name.
    Name(String),
    /// Whoever has this certificate.
    Fingerprint(Fingerprint),
}

impl PeerRule {
    /// Whether `peer` is meant.
    pub fn fits(&self, peer: &Peer) -> bool {
        match self {
            Self::Name(name) => *name == peer.name,
            Self::Fingerprint(fingerprint) => *fingerprint == peer.fingerprint,
        }
    }
}

impl fmt::Display for PeerRule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Name(name) => f.write_str(name),
            Self::Fingerprint(fingerprint) => fingerprint.fmt(f),
        }
    }
}

impl FromStr for PeerRule {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let marked = text.get(..SHA256_MARK.len());
        if !marked.is_some_and(|mark| mark.eq_ignore_ascii_case(SHA256_MARK)) {
            let good = !text.is_empty() && !text.contains(|c: char| c.is_whitespace() || c == '*');
            return if good {
                Ok(Self::Name(text.to_owned()))
            } else {
                Err(format!("`{text}` is neither a host's name nor `sha256:` and a fingerprint"))
            };
        }
        let digits: Vec<u32> = text[SHA256_MARK.len()..]
            .chars()
            .filter(|c| *c != ':')
            .map(|c| c.to_digit(16))
            .collect::<Option<_>>()
            .unwrap_or_default();
        let mut bytes = [0; 32];
        if digits.len() != 2 * bytes.len() {
            return Err(format!("`{text}` is no fingerprint: `sha256:` and 64 hexadecimal digits"));
        }
        for (byte, pair) in bytes.iter_mut().zip(digits.chunks(2)) {
            *byte = u8::try_from(pair[0] << 4 | pair[1]).unwrap_or(0);
        }
        Ok(Self::Fingerprint(Fingerprint(bytes)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rule_is_a_name_or_one_certificate() {
        let peer = Peer { name: "host1".into(), fingerprint: Fingerprint::of(b"one") };
        let renewed = Peer { fingerprint: Fingerprint::of(b"two"), ..peer.clone() };
        let name: PeerRule = "host1".parse().unwrap();
        assert!(name.fits(&peer) && name.fits(&renewed));
        assert!(!"host11".parse::<PeerRule>().unwrap().fits(&peer));
        let plain = peer.fingerprint.to_string();
        let pairs: Vec<String> = plain.as_bytes()[7..]
            .chunks(2)
            .map(|pair| String::from_utf8_lossy(pair).to_uppercase())
            .collect();
        for text in [plain, format!("SHA256:{}", pairs.join(":"))] {
            let one: PeerRule = text.parse().unwrap();
            assert!(one.fits(&peer) && !one.fits(&renewed), "{text}");
        }
    }

    #[test]
    fn what_is_neither_is_refused() {
        let long = format!("sha256:{}", "a".repeat(65));
        for bad in ["", "a b", "*", "sha256:", "sha256:abc", "sha256:zz", &long] {
            assert!(bad.parse::<PeerRule>().is_err(), "{bad}");
        }
    }

    #[test]
    fn a_fingerprint_is_sha_256() {
        // FIPS 180-2, appendix B.1.
        let abc = "sha256:ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
        assert_eq!(Fingerprint::of(b"abc").to_string(), abc);
    }
}
