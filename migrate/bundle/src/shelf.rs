//! Where bundles lie: what reading one needs of a directory, or of another host.

use std::fmt::Debug;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

/// What no file is read in larger pieces than: what is announced must come before more memory is taken.
const PIECE_BYTES: usize = 1 << 20;

/// Whether somebody waits for what is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Haste {
    /// A thread of a machine waits for it: it goes ahead of all else, and nothing else comes with it.
    Waited,
    /// It is read in passing, and most likely what follows it is read next.
    Ahead,
}

/// A place that has bundles.
pub trait Shelf: Send + Sync {
    /// Opens the file at `path`. What is open stays as it is, whatever is written in its place.
    ///
    /// # Errors
    /// It is not there ([`io::ErrorKind::NotFound`]), or cannot be had.
    fn open(&self, path: &Path) -> io::Result<Box<dyn Blob>>;

    /// Where `hint` leads from the bundle at `dir`, on the host that has it.
    fn beside(&self, dir: &Path, hint: &str) -> PathBuf {
        let place = dir.join(hint);
        // Chains of hints make long ways.
        place.canonicalize().unwrap_or(place)
    }
}

/// A file of a bundle, open for reading.
pub trait Blob: Debug + Send + Sync {
    /// Its length.
    ///
    /// # Errors
    /// The system's word.
    fn bytes(&self) -> io::Result<u64>;

    /// Fills `out` with what is at byte `at` on.
    ///
    /// # Errors
    /// It cannot be read, or ends before.
    fn read_exact_at(&self, out: &mut [u8], at: u64, haste: Haste) -> io::Result<()>;
}

/// The directories of this host.
#[derive(Clone, Copy, Debug)]
pub struct Local;

impl Shelf for Local {
    fn open(&self, path: &Path) -> io::Result<Box<dyn Blob>> {
        Ok(Box::new(File::open(path)?))
    }
}

impl Blob for File {
    fn bytes(&self) -> io::Result<u64> {
        Ok(self.metadata()?.len())
    }

    fn read_exact_at(&self, out: &mut [u8], at: u64, _: Haste) -> io::Result<()> {
        FileExt::read_exact_at(self, out, at)
    }
}

/// The first `bytes` bytes.
pub(crate) fn read_first(blob: &dyn Blob, bytes: u64) -> io::Result<Vec<u8>> {
    let mut all = Vec::new();
    let mut from = Passage { blob, at: 0, end: bytes };
    while from.at < bytes {
        let begun = all.len();
        let piece = usize::try_from(bytes - from.at).unwrap_or(PIECE_BYTES).min(PIECE_BYTES);
        all.resize(begun + piece, 0);
        io::Read::read_exact(&mut from, &mut all[begun..])?;
    }
    Ok(all)
}

/// A stretch of a file, to be read from its beginning to its end.
pub(crate) struct Passage<'a> {
    pub(crate) blob: &'a dyn Blob,
    pub(crate) at: u64,
    pub(crate) end: u64,
}

impl io::Read for Passage<'_> {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        let left = usize::try_from(self.end.saturating_sub(self.at)).unwrap_or(usize::MAX);
        let bytes = out.len().min(left);
        self.blob.read_exact_at(&mut out[..bytes], self.at, Haste::Ahead)?;
        self.at += bytes as u64;
        Ok(bytes)
    }
}
