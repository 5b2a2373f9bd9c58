//! Reading: a bundle with its bases, as one memory.

use std::io::{self, BufReader};
use std::path::{Path, PathBuf};

use ferry_codec::{HEADER_BYTES, RUN_BYTES};
use ferry_pages::{Layout, PAGE_BYTES, PageSet, Run};
use ferry_protocol::{MachineSpec, StateReader, wire};
use xxhash_rust::xxh3::xxh3_64;

use crate::index::Index;
use crate::shelf::{Passage, read_first};
use crate::{Blob, BundleError, BundleId, FRAME_PAGES, Haste, Local, Manifest, Pages, Shelf, Sum};

/// No chain has more bundles: each page of a restore is looked for in all of them.
pub(crate) const MAX_CHAIN: usize = 64;
/// What a memory file begins with, before its token.
pub(crate) const MAGIC: [u8; 16] = *b"ferry memory v1\n";
/// Bytes of magic and token.
pub(crate) const HEAD_BYTES: usize = 32;
/// No writer makes longer frames of data.
const LONGEST_FRAME: u64 = (HEADER_BYTES + FRAME_PAGES * (RUN_BYTES + PAGE_BYTES)) as u64;

/// One bundle of a chain, its files open: it stays readable when the directory is saved over.
#[derive(Debug)]
pub struct Layer {
    /// Its directory.
    pub dir: PathBuf,
    /// What it is.
    pub manifest: Manifest,
    pub(crate) memory: Box<dyn Blob>,
    pub(crate) index: Index,
    record: Vec<Run>,
    state: Box<dyn Blob>,
}

/// A bundle and its bases.
#[derive(Debug)]
pub struct Chain {
    layers: Vec<Layer>,
    layout: Layout,
    /// Every page of data once, with where it is: by bundle, and in it as the file goes.
    pieces: Vec<Piece>,
}

/// Where a page of data is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// Which bundle of the chain, counted from the newest.
    pub layer: usize,
    /// Where its frame begins in that bundle's memory file, in bytes.
    pub at: u64,
    /// Pages of the frame in front of it.
    pub first: usize,
    /// The page's digest.
    pub digest: u64,
}

/// A run of pages in one frame that no newer bundle of the chain has.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Piece {
    layer: usize,
    at: u64,
    pub(crate) first: u64,
    pub(crate) run: Run,
    digest: usize,
}

/// What was read to verify a bundle.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Verified {
    /// Pages of data, in the bundle and its bases.
    pub pages: u64,
    /// Bundles of the chain.
    pub bundles: usize,
    /// Bytes of state.
    pub state_bytes: u64,
}

impl Layer {
    fn open(shelf: &dyn Shelf, dir: &Path) -> Result<Self, BundleError> {
        // A save may replace the files between the look at the manifest and at them.
        const TRIES: usize = 5;
        for _ in 1..TRIES {
            let manifest = Manifest::read_on(shelf, dir)?;
            let token = manifest.token;
            match Self::open_files(shelf, dir, manifest) {
                Err(BundleError::Io { source, .. })
                    if source.kind() == io::ErrorKind::NotFound
                        && Manifest::read_on(shelf, dir)?.token != token => {}
                opened => return opened,
            }
        }
        Self::open_files(shelf, dir, Manifest::read_on(shelf, dir)?)
    }

    fn open_files(shelf: &dyn Shelf, dir: &Path, manifest: Manifest) -> Result<Self, BundleError> {
        let (path, state_path) = (manifest.memory_path(dir), manifest.state_path(dir));
        let open = |path: &Path| shelf.open(path).map_err(BundleError::io("open", path));
        let (memory, state) = (open(&path)?, open(&state_path)?);
        let damaged = |why: String| BundleError::damaged(&path, why);
        let failed = |e| BundleError::io("read", &path)(e);
        let part = manifest.memory;
        let found = memory.bytes().map_err(failed)?;
        if found != part.bytes {
            return Err(damaged(format!("it has {found} bytes, the manifest says {}", part.bytes)));
        }
        let mut head = [0; HEAD_BYTES];
        memory.read_exact_at(&mut head, 0, Haste::Ahead).map_err(failed)?;
        if head[..16] != MAGIC || head[16..] != manifest.token.0.to_le_bytes() {
            return Err(damaged("it does not begin as the memory of this bundle".into()));
        }
        let frames = HEAD_BYTES as u64..part.frames_end();
        if frames.start > frames.end || part.index_at > part.bytes {
            return Err(damaged(format!("it has no byte {} for its index", part.index_at)));
        }
        let layout = layout_of(&manifest, &path)?;
        let mut record = Vec::new();
        if let Some(part_of_record) = part.record {
            let mut bytes = vec![0; part_of_record.bytes(part.index_at).map_err(damaged)?];
            memory.read_exact_at(&mut bytes, part_of_record.at, Haste::Ahead).map_err(failed)?;
            record = part_of_record.decode(&bytes, &layout).map_err(damaged)?;
        }
        let from = Passage { blob: &*memory, at: part.index_at, end: part.bytes };
        let mut from = BufReader::with_capacity(1 << 20, from);
        let bytes = part.bytes - part.index_at;
        let index = Index::decode(&mut from, bytes, frames, &layout, part.index_checksum)
            .map_err(damaged)?;
        Ok(Self { dir: dir.to_owned(), manifest, memory, index, record, state })
    }

    pub(crate) fn memory_path(&self) -> PathBuf {
        self.manifest.memory_path(&self.dir)
    }

    /// The base that this bundle names, from its hint or one of `bases`.
    fn base(&self, shelf: &dyn Shelf, bases: &[PathBuf]) -> Result<Option<Self>, BundleError> {
        let Some(base) = &self.manifest.base else { return Ok(None) };
        let mut looked = vec![shelf.beside(&self.dir, &base.hint)];
        looked.extend_from_slice(bases);
        let (dir, id) = (self.dir.clone(), base.id);
        let mut another = None;
        for place in &looked {
            match Manifest::read_on(shelf, place) {
                Ok(found) if found.id == id => {
                    let layer = Self::open(shelf, place)?;
                    layer.check_machine(self.manifest.machine, &self.manifest.spec.extents)?;
                    return Ok(Some(layer));
                }
                Ok(found) => another = Some((place.clone(), found.id)),
                Err(BundleError::NotABundle { .. }) => {}
                Err(e) => return Err(e),
            }
        }
        Err(match another {
            Some((base, found)) => BundleError::BaseIsAnother { dir, id, base, found },
            None => BundleError::BaseMissing { dir, id, looked },
        })
    }

    fn check_machine(&self, machine: BundleId, extents: &[(u64, u64)]) -> Result<(), BundleError> {
        let m = &self.manifest;
        let why = if m.machine != machine {
            format!(
                "it is of machine {} (`{}`), not of machine {machine}; a machine that was restored is another one: save it without --base",
                m.machine, m.spec.name
            )
        } else if m.spec.extents != extents {
            "its machine's memory lies at other addresses".to_owned()
        } else {
            return Ok(());
        };
        Err(BundleError::OtherMachine { base: self.dir.clone(), why })
    }
}

/// The layout, with extents that touch each other joined: runs of pages do not stop there.
fn layout_of(manifest: &Manifest, path: &Path) -> Result<Layout, BundleError> {
    let mut joined: Vec<Run> = Vec::new();
    for &(start, pages) in &manifest.spec.extents {
        match joined.last_mut() {
            Some(last) if last.end() == start => last.pages = last.pages.saturating_add(pages),
            _ => joined.push(Run::new(start, pages)),
        }
    }
    Layout::new(joined).map_err(|e| BundleError::damaged(path, e.to_string()))
}

/// Every page of data once, with where it is: by bundle, and in it as the file goes.
fn pieces_of(layers: &[Layer]) -> Vec<Piece> {
    let (mut pieces, mut covered) = (Vec::new(), PageSet::new());
    for (layer, l) in layers.iter().enumerate() {
        let mut fresh = l.index.pages();
        fresh.subtract(&covered);
        for entry in l.index.entries.iter().filter(|e| !e.is_zero()) {
            for run in fresh.runs_in(entry.run) {
                let before = run.start - entry.run.start;
                // No longer than a frame.
                let digest = entry.digest + usize::try_from(before).unwrap_or(0);
                let (at, first) = (entry.at, entry.first + before);
                pieces.push(Piece { layer, at, first, run, digest });
            }
        }
        covered.union_with(&fresh);
    }
    pieces.sort_by_key(|p| (p.layer, p.at, p.first));
    pieces
}

impl Chain {
    /// Opens the bundle at `dir` and its bases, looking for each at its hint and then at `bases`.
    /// Manifests and indexes are checked; pages and state are when they are read.
    ///
    /// # Errors
    /// A file that is missing, damaged or too new, or a base that is not the one that is needed.
    pub fn open(dir: &Path, bases: &[PathBuf]) -> Result<Self, BundleError> {
        Self::open_on(&Local, dir, bases)
    }

    /// The same on `shelf`, which opens `dir` and all of `bases`.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub fn open_on(shelf: &dyn Shelf, dir: &Path, bases: &[PathBuf]) -> Result<Self, BundleError> {
        let top = Layer::open(shelf, dir)?;
        let layout = layout_of(&top.manifest, &top.memory_path())?;
        let mut layers = vec![top];
        while let Some(base) = layers.last().map(|l| l.base(shelf, bases)).transpose()?.flatten() {
            if layers.len() == MAX_CHAIN {
                return Err(BundleError::ChainTooLong { dir: dir.to_owned(), max: MAX_CHAIN });
            }
            layers.push(base);
        }
        let pieces = pieces_of(&layers);
        let chain = Self { layers, layout, pieces };
        let (found, expected) = (chain.sum_of_digests(), chain.top().manifest.memory.digest);
        if found != expected {
            let path = chain.top().memory_path();
            let why =
                format!("the pages of the chain have digest {found}, the manifest says {expected}");
            return Err(BundleError::damaged(&path, why));
        }
        Ok(chain)
    }

    fn top(&self) -> &Layer {
        // `open` puts it there.
        &self.layers[0]
    }

    /// What the bundle is.
    pub fn manifest(&self) -> &Manifest {
        &self.top().manifest
    }

    /// The machine.
    pub fn spec(&self) -> &MachineSpec {
        &self.manifest().spec
    }

    /// The bundles, the newest first.
    pub fn layers(&self) -> &[Layer] {
        &self.layers
    }

    pub(crate) fn layout(&self) -> &Layout {
        &self.layout
    }

    /// Whether a save of machine number `machine`, with memory at `extents`, can be based on this.
    ///
    /// # Errors
    /// It is of another machine, or the chain is full.
    pub fn check_base_of(
        &self,
        machine: BundleId,
        extents: &[(u64, u64)],
    ) -> Result<(), BundleError> {
        self.top().check_machine(machine, extents)?;
        if self.layers.len() == MAX_CHAIN {
            return Err(BundleError::ChainTooLong { dir: self.top().dir.clone(), max: MAX_CHAIN });
        }
        Ok(())
    }

    /// Where a page's data is; none if it is zero.
    pub fn place_of(&self, gfn: u64) -> Option<Place> {
        self.layers
            .iter()
            .enumerate()
            .find_map(|(layer, l)| {
                let entry = l.index.find(gfn)?;
                let first =
                    usize::try_from(entry.first + (gfn - entry.run.start)).unwrap_or(usize::MAX);
                Some(Place { layer, at: entry.at, first, digest: l.index.digest(entry, gfn) })
            })
            .filter(|place| place.at != 0)
    }

    /// The digest of a page; 0 if it is zero.
    pub fn digest_of(&self, gfn: u64) -> u64 {
        self.place_of(gfn).map_or(0, |place| place.digest)
    }

    /// The pages that the guest wrote last before it was saved, the latest first; empty where none were
    /// recorded. Some may be zero.
    pub fn record(&self) -> &[Run] {
        &self.top().record
    }

    /// The pages that count of the frame that has page `gfn`, with that page; empty if it is zero.
    pub fn frame_of(&self, gfn: u64) -> impl Iterator<Item = Run> {
        self.place_of(gfn).map_or(&[][..], |place| self.pieces_at(place)).iter().map(|p| p.run)
    }

    pub(crate) fn pieces_at(&self, place: Place) -> &[Piece] {
        let frame = (place.layer, place.at);
        let rest = &self.pieces[self.pieces.partition_point(|p| (p.layer, p.at) < frame)..];
        &rest[..rest.partition_point(|p| (p.layer, p.at) == frame)]
    }

    /// How much to read of bundle `layer` to have the frame at byte `at`, and little else: up to the next
    /// one that counts.
    pub(crate) fn frame_bytes(&self, layer: usize, at: u64) -> usize {
        let next = self.pieces.partition_point(|p| (p.layer, p.at) <= (layer, at));
        let next = self.pieces.get(next).filter(|p| p.layer == layer);
        let end = next.map_or(self.layers[layer].manifest.memory.frames_end(), |p| p.at);
        let bytes = end.saturating_sub(at).clamp(HEADER_BYTES as u64, LONGEST_FRAME);
        usize::try_from(bytes).unwrap_or(HEADER_BYTES)
    }

    /// The pages that hold data; all others are zero.
    pub fn data_pages(&self) -> PageSet {
        self.pieces.iter().map(|piece| piece.run).collect()
    }

    fn sum_of_digests(&self) -> Sum {
        Sum(self.pieces.iter().fold(0, |sum: u64, piece| {
            self.digests(piece).iter().fold(sum, |sum, digest| sum.wrapping_add(*digest))
        }))
    }

    pub(crate) fn digests(&self, piece: &Piece) -> &[u64] {
        let pages = usize::try_from(piece.run.pages).unwrap_or(0);
        // An index has a digest for each page of data of its entries.
        self.layers[piece.layer]
            .index
            .digests
            .get(piece.digest..piece.digest + pages)
            .unwrap_or(&[])
    }

    /// Calls `each` for every page of data once, in runs, verified: the run, its bytes, its digests.
    ///
    /// # Errors
    /// A page that is damaged or cannot be read, or what `each` returned.
    pub fn visit<E: From<BundleError>>(
        &self,
        mut each: impl FnMut(Run, &[u8], &[u64]) -> Result<(), E>,
    ) -> Result<(), E> {
        let mut pages = Pages::new(self);
        for piece in &self.pieces {
            let digests = self.digests(piece);
            let first = usize::try_from(piece.first).unwrap_or(usize::MAX);
            let bytes = pages.run(piece.layer, piece.at, first, digests)?;
            each(piece.run, bytes, digests)?;
        }
        Ok(())
    }

    /// vCPU and device state.
    ///
    /// # Errors
    /// It cannot be read, or is damaged.
    pub fn state(&self) -> Result<Vec<u8>, BundleError> {
        let top = self.top();
        let (path, part) = (top.manifest.state_path(&top.dir), top.manifest.state);
        let failed = |e| BundleError::io("read", &path)(e);
        let length = top.state.bytes().map_err(failed)?;
        if length != part.bytes || length > wire::MAX_MESSAGE_BYTES as u64 {
            let why = format!("it has {length} bytes, the manifest says {}", part.bytes);
            return Err(BundleError::damaged(&path, why));
        }
        let bytes = read_first(&*top.state, length).map_err(failed)?;
        let found = Sum(xxh3_64(&bytes));
        if found != part.checksum {
            let why = format!("its checksum is {found}, the manifest says {}", part.checksum);
            return Err(BundleError::damaged(&path, why));
        }
        Ok(bytes)
    }

    /// Reads everything that a restore of this bundle would, and checks it.
    ///
    /// # Errors
    /// The first thing that is wrong.
    pub fn verify(&self) -> Result<Verified, BundleError> {
        let mut pages = 0;
        self.visit(|run, _, _| {
            pages += run.pages;
            Ok::<(), BundleError>(())
        })?;
        let state = self.state()?;
        let path = self.manifest().state_path(&self.top().dir);
        StateReader::parse(&state).map_err(|e| BundleError::damaged(&path, e.to_string()))?;
        Ok(Verified { pages, bundles: self.layers.len(), state_bytes: state.len() as u64 })
    }
}
