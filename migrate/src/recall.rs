//! What a destination recalls of a machine that comes back: pages of an old bundle, which need not be sent.
//!
//! The source names a page where its content has the digest that the destination told it, and the sum of the
//! named pages' checks with each frame: 128 bits say that two pages are the same. A guest that makes pages
//! which collide can harm only itself, and the comparison of all memory finds it.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Sender, channel};

use ferry_bundle::{BundleError, BundleId, Chain, Manifest, Pages};
use ferry_codec::{Batch, Codec, page_check};
use ferry_memory::MemoryError;
use ferry_pages::{PAGE_BYTES, PageSet, Run};
use ferry_protocol::Recalled;

use crate::install::{Installed, Installer};
use crate::words;

/// At the source: the digests of the old copy that the destination has.
#[derive(Debug, Default)]
pub(crate) struct Digests {
    /// By the first page of each run.
    runs: BTreeMap<u64, Vec<u64>>,
    forgotten: AtomicBool,
}

impl Digests {
    /// Adds `pages`, which have these digests in their order.
    pub(crate) fn add(&mut self, pages: &PageSet, digests: &[u64]) {
        let mut rest = digests;
        for run in pages.runs() {
            // There are as many digests as pages: the protocol saw to it.
            let count = usize::try_from(run.pages).unwrap_or(usize::MAX).min(rest.len());
            let (these, after) = rest.split_at(count);
            self.runs.insert(run.start, these.to_vec());
            rest = after;
        }
    }

    /// Whether the old copy has a page with that digest there.
    pub(crate) fn has(&self, gfn: u64, digest: u64) -> bool {
        let place = || {
            let (start, digests) = self.runs.range(..=gfn).next_back()?;
            digests.get(usize::try_from(gfn - start).ok()?)
        };
        !self.forgotten.load(Ordering::Relaxed) && place() == Some(&digest)
    }

    /// From now on it has none.
    pub(crate) fn forget(&self) {
        self.forgotten.store(true, Ordering::Relaxed);
    }
}

/// At the destination: an old bundle of the machine that comes.
#[derive(Debug)]
pub(crate) struct OldCopy {
    chain: Arc<Chain>,
    dir: PathBuf,
    /// It was said that pages of it cannot be had.
    said: AtomicBool,
}

impl OldCopy {
    /// The newest bundle of machine number `machine`, with memory at `extents`, that is in `places` (bundles,
    /// or directories of them) and can be opened. `tell` hears of each that is of no use, and why.
    pub(crate) fn find(
        places: &[PathBuf],
        machine: u128,
        extents: &[(u64, u64)],
        mut tell: impl FnMut(&Path, String),
    ) -> Option<Self> {
        let mut bundles = Vec::new();
        for place in places {
            let mut dirs = vec![place.clone()];
            match place.read_dir() {
                Ok(entries) => dirs.extend(entries.flatten().map(|entry| entry.path())),
                Err(e) => tell(place, format!("it cannot be read: {e}")),
            }
            for dir in dirs {
                match Manifest::read(&dir) {
                    Ok(m) if m.machine == BundleId(machine) && m.spec.extents == extents => {
                        bundles.push((m.saved_unix_s, dir));
                    }
                    Ok(_) | Err(BundleError::NotABundle { .. }) => {}
                    Err(e) => tell(&dir, words(&e)),
                }
            }
        }
        bundles.sort();
        let dirs: Vec<PathBuf> = bundles.into_iter().rev().map(|(_, dir)| dir).collect();
        dirs.iter().find_map(|dir| match Chain::open(dir, &dirs) {
            Ok(chain) => Some(Self {
                chain: Arc::new(chain),
                dir: dir.clone(),
                said: AtomicBool::new(false),
            }),
            Err(e) => {
                tell(dir, words(&e));
                None
            }
        })
    }

    pub(crate) fn dir(&self) -> &Path {
        &self.dir
    }

    /// Its pages of data with their digests, as the source is told.
    pub(crate) fn recalled(&self) -> Vec<Recalled> {
        let pages = self.chain.data_pages();
        let gfns = pages.runs().flat_map(|run| run.start..run.end());
        Recalled::pack(gfns.map(|gfn| (gfn, self.chain.digest_of(gfn))))
    }

    fn reader(&self) -> Reader {
        let pages = Pages::new(self.chain.clone());
        Reader {
            chain: self.chain.clone(),
            pages,
            order: Vec::new(),
            raw: Vec::new(),
            digests: Vec::new(),
        }
    }
}

/// Whom to tell of pages that were named and cannot be had: which, whether the machine runs (or is about to),
/// whether they are the first, and why.
type Lacking = dyn Fn(PageSet, bool, bool, String) + Send + Sync;

/// An old copy, and what is done where it lacks pages.
#[derive(Clone)]
pub(crate) struct Recalls {
    pub(crate) old: Arc<OldCopy>,
    pub(crate) lacking: Arc<Lacking>,
}

impl Recalls {
    fn lacks(&self, pages: &[Run], runs: bool, why: String) {
        let first = !self.old.said.swap(true, Ordering::Relaxed);
        (self.lacking)(pages.iter().copied().collect(), runs, first, why);
    }
}

/// Pages that a lane names, and a machine that runs waits for.
struct Named {
    round: u32,
    runs: Vec<Run>,
    checks: u64,
}

/// Installs pages that one lane names.
pub(crate) struct Lane {
    recalls: Recalls,
    installer: Arc<Installer>,
    reader: Reader,
    /// To a thread that reads beside the lane.
    beside: Option<Sender<Named>>,
}

impl Lane {
    pub(crate) fn new(recalls: Recalls, installer: Arc<Installer>) -> Self {
        let reader = recalls.old.reader();
        Self { recalls, installer, reader, beside: None }
    }

    /// Installs the pages that `named` names, as [`Installer::install`] does those that come. Once the machine
    /// runs that is done later: what is behind them on the lane, and its acknowledgement, must not wait for a
    /// disk.
    pub(crate) fn install(&mut self, named: &Batch<'_>) -> Result<Installed, MemoryError> {
        if !self.installer.is_paging() {
            let (batch, lacks) = match self.reader.batch(named) {
                Ok(batch) => (batch, None),
                Err(why) => (Batch { runs: &[], ..named.clone() }, Some(why)),
            };
            let installed = self.installer.install(&batch)?;
            if let Some(why) = lacks {
                self.recalls.lacks(named.runs, installed == Installed::Paged, why);
            }
            return Ok(installed);
        }
        let later = Named { round: named.round, runs: named.runs.to_vec(), checks: named.checks };
        if let Some(beside) = &self.beside {
            // It ends only when nothing is missing any more.
            let _ = beside.send(later);
        } else if !self.start_beside(later) {
            self.recalls.lacks(named.runs, true, "no thread could be started to read it".into());
        }
        Ok(Installed::Paged)
    }

    fn start_beside(&mut self, first: Named) -> bool {
        let (sender, receiver) = channel();
        let (recalls, installer) = (self.recalls.clone(), self.installer.clone());
        let run = move || {
            let mut reader = recalls.old.reader();
            for Named { round, runs, checks } in receiver {
                let (codec, raw, digests) = (Codec::Same, [].as_slice(), [].as_slice());
                let kept = Vec::new();
                let named = Batch { round, codec, runs: &runs, raw, digests, checks, kept };
                let read = reader.batch(&named);
                if let Err(why) =
                    read.and_then(|batch| installer.install(&batch).map_err(|e| words(&e)))
                {
                    recalls.lacks(&runs, true, why);
                }
                if !installer.is_paging() {
                    // All is here, or nobody waits any more.
                    return;
                }
            }
        };
        let started = std::thread::Builder::new().name("ferry-recall".into()).spawn(run).is_ok();
        if started && sender.send(first).is_ok() {
            self.beside = Some(sender);
        }
        started
    }
}

/// Takes named pages out of an old copy.
struct Reader {
    chain: Arc<Chain>,
    pages: Pages<Arc<Chain>>,
    /// The pages of a batch as they lie in files, each with its place in the batch.
    order: Vec<((usize, u64), usize, u64)>,
    raw: Vec<u8>,
    digests: Vec<u64>,
}

impl Reader {
    /// The pages that `named` names, verified, as if they had come.
    ///
    /// # Errors
    /// One of them cannot be read, or is not the one that the source has, in words: none is given out.
    fn batch<'a>(&'a mut self, named: &Batch<'a>) -> Result<Batch<'a>, String> {
        self.order.clear();
        self.digests.clear();
        for gfn in named.runs.iter().flat_map(|run| run.start..run.end()) {
            let place = self.chain.place_of(gfn);
            let place = place.ok_or_else(|| format!("it has no page at frame {gfn:#x}"))?;
            self.order.push(((place.layer, place.at), self.digests.len(), gfn));
            self.digests.push(place.digest);
        }
        // A frame is decoded once, whichever of its pages count.
        self.order.sort_unstable();
        self.raw.resize(self.digests.len() * PAGE_BYTES, 0);
        let mut checks = 0u64;
        for (_, number, gfn) in &self.order {
            let page = self.pages.page(*gfn).map_err(|e| words(&e))?.unwrap_or(&[]);
            let to = &mut self.raw[number * PAGE_BYTES..][..PAGE_BYTES];
            if page.len() != to.len() {
                return Err(format!("its page at frame {gfn:#x} is none"));
            }
            to.copy_from_slice(page);
            checks = checks.wrapping_add(page_check(*gfn, page));
        }
        if checks != named.checks {
            return Err("pages have the same digest as at the source and another content".into());
        }
        Ok(Batch {
            codec: Codec::Raw,
            raw: &self.raw,
            digests: &self.digests,
            checks: 0,
            ..named.clone()
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_is_named_only_where_its_own_digest_was_told() {
        let mut digests = Digests::default();
        let pages: PageSet = [Run::new(3, 2), Run::new(9, 1)].into_iter().collect();
        digests.add(&pages, &[30, 40, 90]);
        digests.add(&std::iter::once(Run::new(5, 1)).collect(), &[50]);
        for (gfn, digest) in [(3, 30), (4, 40), (5, 50), (9, 90)] {
            assert!(digests.has(gfn, digest));
            assert!(!digests.has(gfn, digest + 1) && !digests.has(gfn + 1, digest));
        }
        assert!(!digests.has(0, 0) && !digests.has(6, 0) && !digests.has(u64::MAX, 90));
        digests.forget();
        assert!(!digests.has(3, 30));
    }
}
