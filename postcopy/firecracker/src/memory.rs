//! Where pages come from: Firecracker's memory file, or a bundle.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use ferry_bundle::{BundleError, Chain, Haste, Pages};
use ferry_pages::{Layout, PAGE_BYTES, PageSet, Run};
use rustix::fs::SeekFrom;
use rustix::io::Errno;

/// The memory of a machine, laid out without holes: byte 0 is the first byte of its lowest memory.
#[derive(Debug)]
pub struct Memory {
    kind: Kind,
    /// Pages of 4096 bytes that may be other than zero. Looked for once: a file that is cut later must be
    /// an error, not a hole.
    data: PageSet,
}

#[derive(Debug)]
enum Kind {
    File { file: File, path: PathBuf, bytes: u64 },
    Bundle { chain: Arc<Chain>, layout: Layout, dir: PathBuf },
}

/// Why a page cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// The system refused.
    #[error("cannot {action} {}: {source}", .path.display())]
    File {
        /// What was being done.
        action: &'static str,
        /// The memory file.
        path: PathBuf,
        /// The system's word.
        source: io::Error,
    },
    /// Not a memory file.
    #[error("{} is not a memory file: it has {bytes} bytes, which is not a number of pages", .path.display())]
    NotPages {
        /// The file.
        path: PathBuf,
        /// Its length.
        bytes: u64,
    },
    /// A bundle that cannot be read, or is damaged.
    #[error(transparent)]
    Bundle(#[from] BundleError),
}

impl ReadError {
    /// Whether it may be had later: the host that has it is not to be reached.
    pub(crate) fn is_away(&self) -> bool {
        matches!(self, Self::Bundle(e) if e.is_away())
    }

    fn file(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::File { action, path, source }
    }
}

impl Memory {
    /// The memory file that Firecracker wrote with a snapshot.
    ///
    /// # Errors
    /// It cannot be opened, or is not made of pages.
    pub fn of_file(path: &Path) -> Result<Self, ReadError> {
        let file = File::open(path).map_err(ReadError::file("open", path))?;
        let bytes = file.metadata().map_err(ReadError::file("read", path))?.len();
        if bytes == 0 || bytes % PAGE_BYTES as u64 != 0 {
            return Err(ReadError::NotPages { path: path.to_owned(), bytes });
        }
        let data = data_of_file(&file, bytes);
        let data = data.map_err(ReadError::file("look for holes in", path))?;
        Ok(Self { kind: Kind::File { file, path: path.to_owned(), bytes }, data })
    }

    /// The bundle at `dir`, whose bases are looked for at their hints, then at `bases`.
    ///
    /// # Errors
    /// It, or a base, is missing or damaged.
    pub fn of_bundle(dir: &Path, bases: &[PathBuf]) -> Result<Self, ReadError> {
        Self::of_chain(Chain::open(dir, bases)?)
    }

    /// A bundle that is open, wherever it lies.
    ///
    /// # Errors
    /// Its machine's memory cannot be.
    pub fn of_chain(chain: Chain) -> Result<Self, ReadError> {
        let dir = chain.layers().first().map(|layer| layer.dir.clone()).unwrap_or_default();
        let layout = chain.spec().layout().map_err(|e| BundleError::Damaged {
            path: dir.join("manifest.json"),
            why: e.to_string(),
        })?;
        // A run may go on in the next extent; it does so here, too.
        let run = |run: Run| Some(Run::new(layout.index_of(run.start)?, run.pages));
        let data = chain.data_pages().runs().filter_map(run).collect();
        let kind = Kind::Bundle { chain: Arc::new(chain), layout, dir };
        Ok(Self { kind, data })
    }

    /// Its length.
    pub fn bytes(&self) -> u64 {
        match &self.kind {
            Kind::File { bytes, .. } => *bytes,
            Kind::Bundle { layout, .. } => layout.pages() * PAGE_BYTES as u64,
        }
    }

    /// What it is, for people.
    pub fn name(&self) -> String {
        match &self.kind {
            Kind::File { path, .. } => format!("the file {}", path.display()),
            Kind::Bundle { dir, .. } => format!("the bundle {}", dir.display()),
        }
    }

    /// Pages of 4096 bytes that may be other than zero.
    pub(crate) fn data(&self) -> &PageSet {
        &self.data
    }

    /// Pages of 4096 bytes that may be other than zero: at most so many are loaded.
    pub fn data_pages(&self) -> u64 {
        self.data.len()
    }

    /// A reader; each thread has its own.
    pub(crate) fn reader(&self, haste: Haste) -> Reader<'_> {
        match &self.kind {
            Kind::File { file, path, .. } => Reader::File { file, path },
            Kind::Bundle { chain, layout, .. } => {
                let pages = match haste {
                    Haste::Waited => Pages::waited_for(chain.clone()),
                    Haste::Ahead => Pages::new(chain.clone()),
                };
                Reader::Bundle { pages: Box::new(pages), layout }
            }
        }
    }
}

pub(crate) enum Reader<'a> {
    File { file: &'a File, path: &'a Path },
    Bundle { pages: Box<Pages<Arc<Chain>>>, layout: &'a Layout },
}

impl Reader<'_> {
    /// Fills `out`, whole pages of 4096 bytes, with the memory from page `first` on.
    pub(crate) fn read(&mut self, first: u64, out: &mut [u8]) -> Result<(), ReadError> {
        match self {
            Self::File { file, path } => file
                .read_exact_at(out, first.saturating_mul(PAGE_BYTES as u64))
                .map_err(ReadError::file("read", path)),
            Self::Bundle { pages, layout } => {
                for (page, out) in (first..).zip(out.chunks_mut(PAGE_BYTES)) {
                    match gfn_of(layout, page).map(|gfn| pages.page(gfn)).transpose()?.flatten() {
                        Some(content) => out.copy_from_slice(content),
                        None => out.fill(0),
                    }
                }
                Ok(())
            }
        }
    }
}

/// The frame of the page that is number `page` of all pages of the machine.
fn gfn_of(layout: &Layout, page: u64) -> Option<u64> {
    let mut rest = page;
    for extent in layout.extents() {
        if rest < extent.pages {
            return Some(extent.start + rest);
        }
        rest -= extent.pages;
    }
    None
}

fn data_of_file(file: &File, bytes: u64) -> io::Result<PageSet> {
    let mut data = PageSet::new();
    let page = PAGE_BYTES as u64;
    let mut at = 0;
    while at < bytes {
        let start = match rustix::fs::seek(file, SeekFrom::Data(at)) {
            Ok(start) => start,
            // No data up to the end.
            Err(Errno::NXIO) => break,
            // The file system does not tell.
            Err(Errno::INVAL | Errno::OPNOTSUPP) => at,
            Err(e) => return Err(e.into()),
        };
        let end = rustix::fs::seek(file, SeekFrom::Hole(start)).unwrap_or(bytes).min(bytes);
        if start >= end {
            break;
        }
        let first = start / page;
        data.insert_run(Run::new(first, end.div_ceil(page) - first));
        at = end;
    }
    Ok(data)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn holes_of_a_file_are_not_data() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("memory");
        let file = File::create(&path).unwrap();
        file.set_len(1 << 20).unwrap();
        file.write_all_at(&[7; 5000], 64 << 10).unwrap();
        file.write_all_at(&[7; 10], (1 << 20) - 10).unwrap();
        let memory = Memory::of_file(&path).unwrap();
        assert_eq!(memory.bytes(), 1 << 20);
        let data = memory.data();
        assert!([16, 17, 255].iter().all(|page| data.contains(*page)), "{data:?}");
        // Not every file system keeps holes; what it says must hold.
        let mut page = [0; PAGE_BYTES];
        for hole in (0..256).filter(|page| !data.contains(*page)) {
            memory.reader(Haste::Ahead).read(hole, &mut page).unwrap();
            assert_eq!(page, [0; PAGE_BYTES]);
        }
    }

    #[test]
    fn a_file_that_is_not_made_of_pages_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("memory");
        for bytes in [0, 1, 4095, 4097] {
            File::create(&path).unwrap().set_len(bytes).unwrap();
            let words = Memory::of_file(&path).unwrap_err().to_string();
            assert!(words.contains(&format!("has {bytes} bytes")), "{words}");
        }
        let gone = Memory::of_file(&dir.path().join("none")).unwrap_err().to_string();
        assert!(gone.contains("cannot open"), "{gone}");
    }
}
