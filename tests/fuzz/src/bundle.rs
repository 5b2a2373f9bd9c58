//! A chain of bundles on a shelf in memory.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use ferry_bundle::{Blob, BundleError, Chain, Haste, Shelf, merge};
use ferry_codec::{FrameError, page_digest};
use ferry_pages::PAGE_BYTES;

use crate::pages::assert_runs;

/// What stands between two files.
pub(crate) const BETWEEN: &[u8] = b"<~>";
/// Sums that are made right in one run: a few for each layer and frame.
const MOST_HEALED: usize = 64;
/// More is not visited.
const MOST_PAGES: u64 = 1 << 12;

/// Manifest, memory and state of each bundle, the newest first, with `BETWEEN` between them.
pub fn bundle(data: &[u8]) {
    let mut shelf = Files::of(data);
    let Some(chain) = shelf.heal(|shelf| Chain::open_on(shelf, Path::new("0"), &[])) else {
        return;
    };
    let layout = chain.spec().layout().expect("a manifest with a layout");
    for extent in layout.extents() {
        // By runs: an extent may be as long as all memory that there is.
        let inside: Vec<_> = chain.data_pages().runs_in(*extent).collect();
        assert_runs(&inside, &layout);
    }
    assert!(chain.record().iter().all(|run| layout.contains(*run)));
    if chain.data_pages().len() > MOST_PAGES {
        return;
    }
    drop(chain);
    let read = shelf.heal(|shelf| {
        let chain = Chain::open_on(shelf, Path::new("0"), &[])?;
        let all = contents(&chain)?;
        chain.verify()?;
        Ok((chain, all))
    });
    let Some((chain, all)) = read else { return };
    assert_eq!(all.len() as u64, chain.data_pages().len());
    let sum = all.iter().fold(0u64, |sum, (gfn, page)| sum.wrapping_add(page_digest(*gfn, page)));
    assert_eq!(sum, chain.manifest().memory.digest.0);
    // In memory where there is such a directory: nothing here is to last.
    let shm = Path::new("/dev/shm");
    let place = if shm.is_dir() { tempfile::tempdir_in(shm) } else { tempfile::tempdir() };
    let place = place.expect("a directory").path().join("merged");
    std::fs::create_dir_all(place.parent().expect("it has one")).expect("a directory");
    let merged = merge(&chain, &place);
    let outcome = merged.and_then(|_| Chain::open(&place, &[])).and_then(|merged| {
        // A page of zeros that is kept as data is none in what is merged.
        let data = all.into_iter().filter(|(_, page)| page.iter().any(|byte| *byte != 0));
        assert!(contents(&merged)? == data.collect());
        assert_eq!((merged.layers().len(), merged.record()), (1, chain.record()));
        assert_eq!(merged.manifest().spec, chain.manifest().spec);
        Ok(())
    });
    let _ = std::fs::remove_dir_all(place.parent().expect("it has one"));
    outcome.expect("what can be read can be merged");
}

fn contents(chain: &Chain) -> Result<BTreeMap<u64, Vec<u8>>, BundleError> {
    let mut all = BTreeMap::new();
    chain.visit(|run, bytes, digests| {
        assert_eq!((bytes.len(), digests.len() as u64), (digests.len() * PAGE_BYTES, run.pages));
        for ((gfn, page), digest) in (run.start..).zip(bytes.chunks(PAGE_BYTES)).zip(digests) {
            assert_eq!((page_digest(gfn, page), chain.digest_of(gfn)), (*digest, *digest));
            assert!(all.insert(gfn, page.to_vec()).is_none());
        }
        Ok::<(), BundleError>(())
    })?;
    Ok(all)
}

/// The files of each bundle by their kind; the newest is in directory `0`, its base in `1`.
struct Files(Vec<[Arc<Vec<u8>>; 3]>);

const KINDS: [&str; 3] = ["manifest", "memory", "state"];

impl Files {
    fn of(data: &[u8]) -> Self {
        let (mut files, mut rest) = (vec![Vec::new()], data);
        while !rest.is_empty() {
            if let Some(after) = rest.strip_prefix(BETWEEN) {
                files.push(Vec::new());
                rest = after;
            } else {
                files.last_mut().expect("one at least").push(rest[0]);
                rest = &rest[1..];
            }
        }
        files.resize(files.len().next_multiple_of(3), Vec::new());
        Self(files.into_iter().map(Arc::new).collect::<Vec<_>>().as_chunks().0.to_vec())
    }

    fn file(&mut self, path: &Path) -> Option<&mut Arc<Vec<u8>>> {
        let (layer, kind) = place(path)?;
        self.0.get_mut(layer)?.get_mut(kind)
    }

    /// What `read` returns once all sums are right; none if that cannot be.
    fn heal<T>(&mut self, read: impl Fn(&Self) -> Result<T, BundleError>) -> Option<T> {
        for _ in 0..MOST_HEALED {
            match read(self) {
                Ok(value) => return Some(value),
                Err(e) => self.mend(&e)?,
            }
        }
        None
    }

    fn mend(&mut self, error: &BundleError) -> Option<()> {
        match error {
            BundleError::Frame { path, at, source } => {
                let (within, sum) = match source {
                    FrameError::Check { found, .. } => (32, found),
                    FrameError::Digest { found, .. } => (24, found),
                    _ => return None,
                };
                let at = usize::try_from(*at).ok()?.checked_add(within)?;
                let file = Arc::make_mut(self.file(path)?);
                file.get_mut(at..at + 8)?.copy_from_slice(&sum.to_le_bytes());
            }
            // `… is 0123…, it says 4567…`: what is said is in this manifest.
            BundleError::Damaged { path, why } => {
                let number = |text: &str| {
                    let digits: String = text.chars().take_while(char::is_ascii_hexdigit).collect();
                    (digits.len() == 16).then_some(digits)
                };
                let after = ["checksum is ", "checksum ", "digest "];
                let found = after.iter().find_map(|word| number(why.split_once(word)?.1))?;
                let said = number(why.split_once(" says ")?.1)?;
                let (layer, _) = place(path)?;
                let manifest = self.0.get_mut(layer)?.first_mut()?;
                let text = String::from_utf8(manifest.to_vec()).ok()?;
                // The manifest's own comes last.
                let at = text.rfind(&format!("\"{said}\""))? + 1;
                Arc::make_mut(manifest)[at..at + 16].copy_from_slice(found.as_bytes());
            }
            _ => return None,
        }
        Some(())
    }
}

/// The layer and the kind of the file at `path`.
fn place(path: &Path) -> Option<(usize, usize)> {
    let name = path.file_name()?.to_str()?;
    let layer = path.parent()?.to_str()?.parse().ok()?;
    Some((layer, KINDS.iter().position(|kind| name.starts_with(kind))?))
}

impl Shelf for Files {
    fn open(&self, path: &Path) -> io::Result<Box<dyn Blob>> {
        let file = place(path).and_then(|(layer, kind)| self.0.get(layer)?.get(kind));
        match file {
            Some(file) => Ok(Box::new(Bytes(Arc::clone(file)))),
            None => Err(io::Error::new(io::ErrorKind::NotFound, "it is not on the shelf")),
        }
    }

    fn beside(&self, dir: &Path, _hint: &str) -> PathBuf {
        let layer = dir.to_str().and_then(|name| name.parse::<usize>().ok()).unwrap_or(0);
        PathBuf::from((layer + 1).to_string())
    }
}

#[derive(Debug)]
struct Bytes(Arc<Vec<u8>>);

impl Blob for Bytes {
    fn bytes(&self) -> io::Result<u64> {
        Ok(self.0.len() as u64)
    }

    fn read_exact_at(&self, out: &mut [u8], at: u64, _: Haste) -> io::Result<()> {
        let from = usize::try_from(at).ok().and_then(|at| self.0.get(at..)?.get(..out.len()));
        out.copy_from_slice(from.ok_or(io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }
}
