//! `manifest.json`: what a bundle is, for people and for the reader.

use std::io;
use std::path::{Path, PathBuf};

use ferry_protocol::MachineSpec;
use serde::{Deserialize, Serialize};
use xxhash_rust::xxh3::xxh3_64;

use crate::number::hex_bytes;
use crate::shelf::read_first;
use crate::{BundleError, BundleId, Local, RecordPart, Shelf, Sum};

/// The format's version that is written, and the newest that is read.
pub const VERSION: u32 = 2;
/// What a bundle says that it is.
const FORMAT: &str = "ferry-bundle";
/// A specification of the largest machine is far smaller.
const MAX_MANIFEST_BYTES: u64 = 64 << 20;
/// The name of a bundle's manifest.
pub const MANIFEST: &str = "manifest.json";

/// What a bundle is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// `ferry-bundle`.
    format: String,
    /// Of the format.
    pub version: u32,
    /// The bundle's id. A bundle that was merged with its bases keeps it: its content is the same.
    pub id: BundleId,
    /// What the names of its files end with.
    pub(crate) token: BundleId,
    /// When it was saved, in seconds since 1970 (UTC).
    pub saved_unix_s: u64,
    /// The lasting number of the machine that was saved.
    pub machine: BundleId,
    /// The bundle that this one tells the difference to.
    pub base: Option<Base>,
    /// The machine.
    #[serde(with = "SpecText")]
    pub spec: MachineSpec,
    /// The file of memory.
    pub memory: MemoryPart,
    /// The file of state.
    pub state: StatePart,
    /// xxh3 of this manifest, as compact JSON, with 0 here.
    checksum: Sum,
}

/// The bundle that another one tells the difference to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Base {
    /// Its id.
    pub id: BundleId,
    /// Where it was, seen from this bundle's directory.
    pub hint: String,
}

/// The file of memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MemoryPart {
    /// Its length.
    pub bytes: u64,
    /// Pages of data in its index.
    pub data_pages: u64,
    /// Pages in its index that are zero, and are not in the base.
    pub zero_pages: u64,
    /// The record of the working set, if there is one: from version 2 on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub record: Option<RecordPart>,
    /// Where its index begins.
    pub index_at: u64,
    /// xxh3 of the index.
    pub index_checksum: Sum,
    /// Wrapping sum of the digests of all pages of the machine, those of the bases included.
    pub digest: Sum,
}

impl MemoryPart {
    /// Where its frames end.
    pub(crate) fn frames_end(&self) -> u64 {
        self.record.map_or(self.index_at, |record| record.at)
    }
}

/// The file of state.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StatePart {
    /// Its length.
    pub bytes: u64,
    /// xxh3 of it.
    pub checksum: Sum,
}

/// [`MachineSpec`] with its opaque part as hexadecimal text.
#[derive(Serialize, Deserialize)]
#[serde(remote = "MachineSpec", deny_unknown_fields)]
struct SpecText {
    name: String,
    vmm: String,
    extents: Vec<(u64, u64)>,
    vcpus: u32,
    cpu_features: Vec<String>,
    devices: Vec<ferry_protocol::DeviceSpec>,
    #[serde(with = "hex_bytes")]
    config: Vec<u8>,
}

/// All that is believed of a manifest before its version is known.
#[derive(Deserialize)]
struct Head {
    format: String,
    version: u64,
}

/// What a manifest is made from.
pub(crate) struct Facts {
    pub(crate) id: BundleId,
    pub(crate) token: BundleId,
    pub(crate) saved_unix_s: u64,
    pub(crate) machine: BundleId,
    pub(crate) base: Option<Base>,
    pub(crate) spec: MachineSpec,
    pub(crate) memory: MemoryPart,
    pub(crate) state: StatePart,
}

impl Manifest {
    pub(crate) fn new(facts: Facts) -> Self {
        let Facts { id, token, saved_unix_s, machine, base, spec, memory, state } = facts;
        let (format, checksum) = (FORMAT.to_owned(), Sum(0));
        let mut manifest = Self {
            format,
            version: VERSION,
            id,
            token,
            saved_unix_s,
            machine,
            base,
            spec,
            memory,
            state,
            checksum,
        };
        manifest.checksum = manifest.sum();
        manifest
    }

    /// Reads the manifest of the bundle at `dir`.
    ///
    /// # Errors
    /// There is none, it is of a newer version, or damaged.
    pub fn read(dir: &Path) -> Result<Self, BundleError> {
        Self::read_on(&Local, dir)
    }

    /// The same on `shelf`.
    pub(crate) fn read_on(shelf: &dyn Shelf, dir: &Path) -> Result<Self, BundleError> {
        let path = dir.join(MANIFEST);
        let file = match shelf.open(&path) {
            Ok(file) => file,
            Err(e)
                if matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) =>
            {
                let why = if e.get_ref().is_some() {
                    // Another host's word.
                    e.to_string()
                } else if dir.is_dir() {
                    "it has no manifest.json".to_owned()
                } else {
                    "there is no such directory".to_owned()
                };
                return Err(BundleError::NotABundle { dir: dir.to_owned(), why });
            }
            Err(e) => return Err(BundleError::io("open", &path)(e)),
        };
        let bytes = file.bytes().map(|bytes| bytes.min(MAX_MANIFEST_BYTES));
        let bytes = bytes.and_then(|bytes| read_first(&*file, bytes));
        Self::parse(dir, &bytes.map_err(BundleError::io("read", &path))?)
    }

    fn parse(dir: &Path, bytes: &[u8]) -> Result<Self, BundleError> {
        let path = dir.join(MANIFEST);
        let damaged = |why: String| BundleError::damaged(&path, why);
        let head: Head = serde_json::from_slice(bytes).map_err(|e| damaged(e.to_string()))?;
        if head.format != FORMAT {
            let why = format!("its manifest is of a `{:.40}`", head.format);
            return Err(BundleError::NotABundle { dir: dir.to_owned(), why });
        }
        if head.version > u64::from(VERSION) {
            return Err(BundleError::Newer {
                dir: dir.to_owned(),
                version: head.version,
                reads: VERSION,
            });
        }
        let manifest: Self = serde_json::from_slice(bytes).map_err(|e| damaged(e.to_string()))?;
        let found = manifest.sum();
        if found != manifest.checksum {
            return Err(damaged(format!("its checksum is {found}, it says {}", manifest.checksum)));
        }
        manifest.spec.layout().map_err(|e| damaged(e.to_string()))?;
        Ok(manifest)
    }

    /// As it is written: for people to read.
    pub(crate) fn to_text(&self) -> Vec<u8> {
        // Strings and numbers: it cannot fail, and an empty manifest would be refused by the reader.
        let mut text = serde_json::to_vec_pretty(self).unwrap_or_default();
        text.push(b'\n');
        text
    }

    fn sum(&self) -> Sum {
        let blank = Self { checksum: Sum(0), ..self.clone() };
        Sum(xxh3_64(&serde_json::to_vec(&blank).unwrap_or_default()))
    }

    pub(crate) fn memory_path(&self, dir: &Path) -> PathBuf {
        dir.join(memory_name(self.token))
    }

    pub(crate) fn state_path(&self, dir: &Path) -> PathBuf {
        dir.join(state_name(self.token))
    }
}

pub(crate) fn memory_name(token: BundleId) -> String {
    format!("memory-{token}")
}

pub(crate) fn state_name(token: BundleId) -> String {
    format!("state-{token}")
}

/// The manifest's name until the commit.
pub(crate) fn draft_name(token: BundleId) -> String {
    format!("manifest-{token}")
}

/// Whether a file of a bundle that is written can have this name.
pub fn is_file_of_bundle(name: &str) -> bool {
    name == MANIFEST || (token_of(name).is_some() && !name.starts_with("manifest"))
}

/// The token of a file that a writing makes, by its name.
pub(crate) fn token_of(name: &str) -> Option<BundleId> {
    let (kind, token) = name.split_once('-')?;
    matches!(kind, "memory" | "state" | "manifest").then(|| BundleId::parse(token)).flatten()
}
