//! What can go wrong with a bundle: each says which file, why, and what to do.

use std::io;
use std::path::{Path, PathBuf};

use ferry_codec::FrameError;

use crate::BundleId;

/// Why a bundle could not be written or read.
#[derive(Debug, thiserror::Error)]
pub enum BundleError {
    /// The system refused.
    #[error("cannot {action} {}: {source}", .path.display())]
    Io {
        /// What was being done.
        action: &'static str,
        /// To what.
        path: PathBuf,
        /// The system's word.
        source: io::Error,
    },
    /// There is no bundle.
    #[error("{} is not a bundle: {why}", .dir.display())]
    NotABundle {
        /// The directory.
        dir: PathBuf,
        /// Why not.
        why: String,
    },
    /// The directory holds something that must not be replaced.
    #[error("will not save to {}: {why}; name a new directory, an empty one, or a bundle", .dir.display())]
    Occupied {
        /// The directory.
        dir: PathBuf,
        /// What is in it.
        why: String,
    },
    /// Another process writes there.
    #[error("another save is writing to {}: wait until it ends", .dir.display())]
    Busy {
        /// The directory.
        dir: PathBuf,
    },
    /// Written by a newer version.
    #[error("{} has format version {version}; this ferry reads up to {reads}: update it", .dir.display())]
    Newer {
        /// The bundle.
        dir: PathBuf,
        /// Its version.
        version: u64,
        /// The newest version that is known here.
        reads: u32,
    },
    /// A file is not what was written.
    #[error("{} is damaged: {why}; use another copy of the bundle", .path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        why: String,
    },
    /// A frame of pages is not what was written.
    #[error("{} is damaged at byte {at}: {source}; use another copy of the bundle", .path.display())]
    Frame {
        /// The file.
        path: PathBuf,
        /// Where the frame begins.
        at: u64,
        /// What is wrong with it.
        source: FrameError,
    },
    /// The base is nowhere.
    #[error(
        "the bundle {} needs its base {id}, which is not at {}: put it there, or say where it is by --base",
        .dir.display(), places(.looked)
    )]
    BaseMissing {
        /// The bundle.
        dir: PathBuf,
        /// The base that it names.
        id: BundleId,
        /// Where it was looked for.
        looked: Vec<PathBuf>,
    },
    /// What is in the base's place is another bundle.
    #[error(
        "the bundle {} needs its base {id}, but {} is bundle {found}: it was saved over, or is another one; say where the base is by --base",
        .dir.display(), .base.display()
    )]
    BaseIsAnother {
        /// The bundle.
        dir: PathBuf,
        /// The base that it names.
        id: BundleId,
        /// What was found in its place.
        base: PathBuf,
        /// Its id.
        found: BundleId,
    },
    /// A base of another machine.
    #[error("{} cannot be the base: {why}", .base.display())]
    OtherMachine {
        /// The base.
        base: PathBuf,
        /// How they differ.
        why: String,
    },
    /// A chain that does not end, or is too long to be read quickly.
    #[error("the chain of {} has more than {max} bundles: `ferry bundle merge` it", .dir.display())]
    ChainTooLong {
        /// The bundle.
        dir: PathBuf,
        /// Most that a chain may have.
        max: usize,
    },
}

impl BundleError {
    /// Whether the host that has the bundle was not to be reached for all the time that a read is tried: it
    /// may be later.
    pub fn is_away(&self) -> bool {
        matches!(self, Self::Io { source, .. } if source.kind() == io::ErrorKind::TimedOut)
    }

    pub(crate) fn io(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Io { action, path, source }
    }

    pub(crate) fn damaged(path: &Path, why: impl Into<String>) -> Self {
        Self::Damaged { path: path.to_owned(), why: why.into() }
    }
}

fn places(looked: &[PathBuf]) -> String {
    let all: Vec<_> = looked.iter().map(|p| p.display().to_string()).collect();
    all.join(" nor ")
}
