//! vCPU and device state as sections, each with kind, instance, version and checksum.
//!
//! A reader takes the sections that it knows. One that it does not know is refused if the writer
//! called it mandatory, and left alone otherwise.

use serde::{Serialize, de::DeserializeOwned};
use xxhash_rust::xxh3::xxh3_64;

use crate::wire;

/// No section is larger than this.
pub const MAX_SECTION_BYTES: usize = 16 << 20;
/// No machine has more sections than this.
pub(crate) const MAX_SECTIONS: usize = 8192;

#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
struct Section {
    kind: String,
    instance: u32,
    version: u16,
    min_reader: u16,
    mandatory: bool,
    bytes: Vec<u8>,
    checksum: u64,
}

/// Why state could not be read.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum StateError {
    /// The bytes are not a list of sections.
    #[error("machine state is damaged: {0}")]
    Damaged(String),
    /// A section's content is not what was written.
    #[error(
        "state section {kind}[{instance}] is damaged: checksum {found:#018x}, expected {expected:#018x}"
    )]
    Checksum {
        /// Section kind.
        kind: String,
        /// Section instance.
        instance: u32,
        /// Checksum of the bytes that came.
        found: u64,
        /// Checksum that was sent.
        expected: u64,
    },
    /// A section that is needed is not there.
    #[error("state section {kind}[{instance}] is missing")]
    Missing {
        /// Section kind.
        kind: String,
        /// Section instance.
        instance: u32,
    },
    /// A section needs a newer reader.
    #[error(
        "state section {kind}[{instance}] version {version} needs a reader of version {min_reader}; this one reads {reads}: update this host"
    )]
    TooNew {
        /// Section kind.
        kind: String,
        /// Section instance.
        instance: u32,
        /// Version that was written.
        version: u16,
        /// Oldest reader that understands it.
        min_reader: u16,
        /// Newest version that this reader understands.
        reads: u16,
    },
    /// A mandatory section that nobody here reads.
    #[error(
        "state section {kind}[{instance}] is mandatory and this host does not know it: update this host"
    )]
    Unknown {
        /// Section kind.
        kind: String,
        /// Section instance.
        instance: u32,
    },
    /// A section is too large, or there are too many.
    #[error("machine state is too large: {0}")]
    TooLarge(String),
}

/// Collects the sections of a machine.
#[derive(Debug, Default)]
pub struct StateWriter {
    sections: Vec<Section>,
}

impl StateWriter {
    /// An empty one.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a mandatory section: `value` by serde, readable by readers of `min_reader` and newer.
    ///
    /// # Errors
    /// Larger than [`MAX_SECTION_BYTES`].
    pub fn put<T: Serialize>(
        &mut self,
        kind: &str,
        instance: u32,
        version: u16,
        min_reader: u16,
        value: &T,
    ) -> Result<(), StateError> {
        let bytes = wire::encode(value).map_err(|e| StateError::Damaged(e.to_string()))?;
        if bytes.len() > MAX_SECTION_BYTES || self.sections.len() >= MAX_SECTIONS {
            return Err(StateError::TooLarge(format!("{kind}[{instance}]: {} bytes", bytes.len())));
        }
        let checksum = xxh3_64(&bytes);
        self.sections.push(Section {
            kind: kind.to_owned(),
            instance,
            version,
            min_reader,
            mandatory: true,
            bytes,
            checksum,
        });
        Ok(())
    }

    /// The sections as bytes.
    ///
    /// # Errors
    /// They cannot be encoded.
    pub fn finish(self) -> Result<Vec<u8>, StateError> {
        wire::encode(&self.sections).map_err(|e| StateError::Damaged(e.to_string()))
    }
}

/// Reads the sections of a machine.
#[derive(Debug)]
pub struct StateReader {
    sections: Vec<Section>,
}

impl StateReader {
    /// Takes sections apart and checks every checksum.
    ///
    /// # Errors
    /// Bytes that are not sections, or a section whose checksum is wrong.
    pub fn parse(bytes: &[u8]) -> Result<Self, StateError> {
        let sections: Vec<Section> =
            wire::decode(bytes).map_err(|e| StateError::Damaged(e.to_string()))?;
        if sections.len() > MAX_SECTIONS {
            return Err(StateError::TooLarge(format!("{} sections", sections.len())));
        }
        for s in &sections {
            let found = xxh3_64(&s.bytes);
            if found != s.checksum {
                return Err(StateError::Checksum {
                    kind: s.kind.clone(),
                    instance: s.instance,
                    found,
                    expected: s.checksum,
                });
            }
        }
        Ok(Self { sections })
    }

    /// Reads section `kind[instance]` as a reader of version `reads`.
    ///
    /// # Errors
    /// It is missing, too new, or does not decode.
    pub fn read<T: DeserializeOwned>(
        &self,
        kind: &str,
        instance: u32,
        reads: u16,
    ) -> Result<T, StateError> {
        let s = self
            .sections
            .iter()
            .find(|s| s.kind == kind && s.instance == instance)
            .ok_or_else(|| StateError::Missing { kind: kind.to_owned(), instance })?;
        if s.min_reader > reads {
            return Err(StateError::TooNew {
                kind: kind.to_owned(),
                instance,
                version: s.version,
                min_reader: s.min_reader,
                reads,
            });
        }
        wire::decode(&s.bytes)
            .map_err(|e| StateError::Damaged(format!("section {kind}[{instance}]: {e}")))
    }

    /// Refuses mandatory sections whose kind is not among `known`.
    ///
    /// # Errors
    /// The first such section.
    pub fn require_known(&self, known: &[&str]) -> Result<(), StateError> {
        match self.sections.iter().find(|s| s.mandatory && !known.contains(&s.kind.as_str())) {
            None => Ok(()),
            Some(s) => Err(StateError::Unknown { kind: s.kind.clone(), instance: s.instance }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn one() -> Vec<u8> {
        let mut w = StateWriter::new();
        w.put("serial", 0, 2, 2, &(7u8, "x".to_owned())).unwrap();
        w.finish().unwrap()
    }

    #[test]
    fn a_section_comes_back_as_it_was_written() {
        let r = StateReader::parse(&one()).unwrap();
        assert_eq!(r.read::<(u8, String)>("serial", 0, 2).unwrap(), (7, "x".to_owned()));
        assert!(matches!(r.read::<u8>("serial", 1, 2), Err(StateError::Missing { .. })));
    }

    #[test]
    fn a_section_that_nobody_needs_may_be_unknown() {
        let mut w = StateWriter::new();
        w.put("serial", 0, 2, 2, &7u8).unwrap();
        w.sections[0].mandatory = false;
        let r = StateReader::parse(&w.finish().unwrap()).unwrap();
        assert_eq!(r.require_known(&[]), Ok(()));
    }

    #[test]
    fn sections_are_bounded_in_size_and_number() {
        // A sequence is its length in 8 bytes and its bytes.
        let fits = vec![0u8; MAX_SECTION_BYTES - 8];
        let mut w = StateWriter::new();
        assert_eq!(w.put("disk", 0, 1, 1, &fits), Ok(()));
        let large = vec![0u8; MAX_SECTION_BYTES - 7];
        assert!(matches!(w.put("disk", 1, 1, 1, &large), Err(StateError::TooLarge(_))));
        let mut w = StateWriter::new();
        for instance in 0..8192 {
            assert_eq!(w.put("x", instance, 1, 1, &()), Ok(()));
        }
        assert!(matches!(w.put("x", 8192, 1, 1, &()), Err(StateError::TooLarge(_))));
        let one_more = w.sections[0].clone();
        let most = wire::encode(&w.sections).unwrap();
        assert!(StateReader::parse(&most).is_ok());
        w.sections.push(one_more);
        let too_many = StateReader::parse(&w.finish().unwrap()).unwrap_err().to_string();
        assert!(too_many.contains("8193 sections"), "{too_many}");
    }

    #[test]
    fn a_section_that_is_too_new_or_unknown_is_refused_by_name() {
        let r = StateReader::parse(&one()).unwrap();
        let e = r.read::<(u8, String)>("serial", 0, 1).unwrap_err().to_string();
        assert!(e.contains("serial[0]") && e.contains("version 2"), "{e}");
        assert!(matches!(r.require_known(&["lapic"]), Err(StateError::Unknown { .. })));
        assert_eq!(r.require_known(&["serial"]), Ok(()));
    }

    #[test]
    fn any_flipped_or_missing_byte_is_an_error_and_never_a_panic() {
        let good = one();
        for i in 0..good.len() {
            let mut bad = good.clone();
            bad[i] ^= 0x10;
            if let Ok(r) = StateReader::parse(&bad) {
                // A flip in a name or a version passes the content's checksum; the reader then does
                // not find what it needs.
                let same = r.read::<(u8, String)>("serial", 0, 2) == Ok((7, "x".to_owned()));
                assert!(!same || r.sections != StateReader::parse(&good).unwrap().sections);
            }
            assert!(StateReader::parse(&good[..i]).is_err());
        }
    }
}
