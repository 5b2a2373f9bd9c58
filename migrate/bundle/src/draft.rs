//! Writing: pages are appended as they come, and nothing counts until the manifest is renamed.

use std::fs::{DirBuilder, File, OpenOptions, TryLockError};
use std::io::{self, BufWriter, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

use ferry_codec::{BatchBuilder, Codec, is_zero, page_digest};
use ferry_pages::{PAGE_BYTES, PageSet, Run};
use ferry_protocol::MachineSpec;
use xxhash_rust::xxh3::xxh3_64;

use crate::chain::{HEAD_BYTES, MAGIC};
use crate::index::{Index, PageMap};
use crate::manifest::{Facts, MANIFEST, draft_name, memory_name, state_name, token_of};
use crate::record;
use crate::{
    Base, BundleError, BundleId, Chain, FRAME_PAGES, Manifest, MemoryPart, StatePart, Sum,
};

/// A bundle that is being written. Dropped before [`commit`](Self::commit), it leaves nothing behind.
pub struct Draft {
    dir: PathBuf,
    /// The directory, locked: one writer at a time.
    lock: File,
    made_dir: bool,
    committed: bool,
    token: BundleId,
    spec: MachineSpec,
    base: Option<Arc<Chain>>,
    path: PathBuf,
    memory: BufWriter<File>,
    /// Bytes written to `memory`.
    at: u64,
    builder: BatchBuilder,
    /// Frames below it may be in the batch that is being built.
    next_gfn: u64,
    map: PageMap,
    record: Vec<Run>,
    required: Option<Sum>,
}

/// A bundle that was written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Committed {
    /// Its id.
    pub id: BundleId,
    /// Its memory.
    pub memory: MemoryPart,
    /// Its state.
    pub state: StatePart,
    /// Pages in the record of its working set.
    pub record_pages: u64,
}

impl Draft {
    /// Begins a bundle of machine `spec` at `dir`, which is made, or empty, or a bundle to be replaced;
    /// as the difference to `base` if there is one.
    ///
    /// # Errors
    /// The directory cannot be used, holds something else, or is written to by somebody else.
    pub fn begin(
        dir: &Path,
        spec: MachineSpec,
        base: Option<Arc<Chain>>,
    ) -> Result<Self, BundleError> {
        let made_dir = make_dir(dir)?;
        let lock = File::open(dir).map_err(BundleError::io("open", dir))?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(BundleError::Busy { dir: dir.to_owned() }),
            Err(TryLockError::Error(e)) => return Err(BundleError::io("lock", dir)(e)),
        }
        check_private(dir, &lock)?;
        let kept = kept_token(dir)?;
        if let Some(base) = &base {
            for layer in base.layers() {
                if same_dir(&layer.dir, dir) {
                    let why = "it is in the chain of the base, which this would replace".to_owned();
                    return Err(BundleError::Occupied { dir: dir.to_owned(), why });
                }
            }
        }
        remove_others(dir, kept);
        let token = BundleId::random();
        let path = dir.join(memory_name(token));
        let file = create(&path).inspect_err(|_| {
            if made_dir {
                let _ = std::fs::remove_dir(dir);
            }
        });
        let mut memory = BufWriter::with_capacity(1 << 20, file?);
        let written =
            memory.write_all(&MAGIC).and_then(|()| memory.write_all(&token.0.to_le_bytes()));
        let mut draft = Self {
            dir: dir.to_owned(),
            lock,
            made_dir,
            committed: false,
            token,
            spec,
            base,
            path,
            memory,
            at: HEAD_BYTES as u64,
            builder: BatchBuilder::new(),
            next_gfn: 0,
            map: PageMap::default(),
            record: Vec::new(),
            required: None,
        };
        draft.builder.begin(0);
        written.map_err(BundleError::io("write", &draft.path)).map(|()| draft)
    }

    /// The page at frame `gfn` has this content now. Pages may come in any order and again: the last
    /// one counts. Ascending order makes fewer and better frames.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn put(&mut self, gfn: u64, page: &[u8]) -> Result<(), BundleError> {
        if is_zero(page) {
            return self.put_zero(gfn);
        }
        if gfn < self.next_gfn {
            self.flush()?;
        }
        if let Some(base) = &self.base
            && base.digest_of(gfn) == page_digest(gfn, page)
        {
            self.map.forget(gfn);
            return Ok(());
        }
        let pushed = self.builder.push(gfn, |place| place.copy_from_slice(page));
        pushed.map_err(io::Error::other).map_err(BundleError::io("write", &self.path))?;
        self.next_gfn = gfn.saturating_add(1);
        if self.builder.data_pages() == FRAME_PAGES { self.flush() } else { Ok(()) }
    }

    /// The page at frame `gfn` is zero now.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn put_zero(&mut self, gfn: u64) -> Result<(), BundleError> {
        if gfn < self.next_gfn {
            self.flush()?;
        }
        if self.base.as_ref().is_some_and(|base| base.digest_of(gfn) != 0) {
            self.map.set_zero(gfn);
        } else {
            self.map.forget(gfn);
        }
        Ok(())
    }

    /// The guest touched these pages while it was saved, the last set of them last: the latest of them are
    /// the record of its working set.
    pub fn record<'a>(&mut self, harvests: impl DoubleEndedIterator<Item = &'a PageSet>) {
        self.record = record::latest_first(harvests);
    }

    /// The digest that all memory must have, from whoever can tell without this bundle: [`commit`] fails
    /// where it has another.
    ///
    /// [`commit`]: Self::commit
    pub fn require_digest(&mut self, digest: Sum) {
        self.required = Some(digest);
    }

    /// Bytes of memory written so far.
    pub fn written_bytes(&self) -> u64 {
        self.at
    }

    fn flush(&mut self) -> Result<(), BundleError> {
        let built = self.builder.finish(Codec::Lz4);
        if let Some(frame) = built.frame {
            self.memory.write_all(&frame).map_err(BundleError::io("write", &self.path))?;
            let gfns = built.runs.iter().flat_map(|run| run.start..run.end());
            for (first, (gfn, digest)) in gfns.zip(built.digests).enumerate() {
                self.map.set(gfn, self.at, first, *digest);
            }
            self.at += frame.len() as u64;
        }
        self.builder.begin(0);
        self.next_gfn = 0;
        Ok(())
    }

    /// The bundle is whole: `machine` is the lasting number of the machine, `state` the sections of a
    /// `StateWriter`. When this returns, the bundle is on the disk and what was there before is gone.
    ///
    /// # Errors
    /// A file cannot be written or synced; what was there before is still whole.
    pub fn commit(self, machine: u128, state: &[u8]) -> Result<Committed, BundleError> {
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
        let saved_unix_s = now.map_or(0, |since| since.as_secs());
        self.commit_as(BundleId::random(), BundleId(machine), saved_unix_s, state)
    }

    fn commit_as(
        mut self,
        id: BundleId,
        machine: BundleId,
        saved_unix_s: u64,
        state: &[u8],
    ) -> Result<Committed, BundleError> {
        let memory = self.finish_memory()?;
        if let Some(required) = self.required
            && required != memory.digest
        {
            let why = format!(
                "the memory that was written has digest {}, the machine's {required}",
                memory.digest
            );
            return Err(BundleError::damaged(&self.path, why));
        }
        let state_part = StatePart { bytes: state.len() as u64, checksum: Sum(xxh3_64(state)) };
        write_synced(&self.dir.join(state_name(self.token)), state)?;
        let base = self
            .base
            .as_ref()
            .and_then(|b| b.layers().first())
            .map(|layer| Base { id: layer.manifest.id, hint: relative(&self.dir, &layer.dir) });
        let manifest = Manifest::new(Facts {
            id,
            token: self.token,
            saved_unix_s,
            machine,
            base,
            spec: self.spec.clone(),
            memory,
            state: state_part,
        });
        let draft = self.dir.join(draft_name(self.token));
        write_synced(&draft, &manifest.to_text())?;
        self.lock.sync_all().map_err(BundleError::io("sync", &self.dir))?;
        let path = self.dir.join(MANIFEST);
        std::fs::rename(&draft, &path).map_err(BundleError::io("replace", &path))?;
        // From here on the new manifest is what a reader finds: its files must stay.
        self.committed = true;
        self.lock.sync_all().map_err(BundleError::io("sync", &self.dir))?;
        remove_others(&self.dir, Some(self.token));
        let record_pages = self.record.iter().map(|run| run.pages).sum();
        Ok(Committed { id, memory, state: state_part, record_pages })
    }

    /// Writes what is left, and the index; syncs.
    fn finish_memory(&mut self) -> Result<MemoryPart, BundleError> {
        self.flush()?;
        let index = self.map.finish();
        let memory = &mut self.memory;
        let record = record::encode(&self.record, self.at);
        let record = record.map(|(bytes, part)| {
            self.at += bytes.len() as u64;
            memory.write_all(&bytes).map(|()| part)
        });
        let record = record.transpose().map_err(BundleError::io("write", &self.path))?;
        let (index_at, mut bytes) = (self.at, self.at);
        let written = index.encode(|piece| {
            bytes += piece.len() as u64;
            memory.write_all(piece)
        });
        let synced = written.and_then(|sum| {
            memory.flush()?;
            memory.get_ref().sync_all()?;
            Ok(sum)
        });
        let index_checksum = synced.map_err(BundleError::io("write", &self.path))?;
        Ok(MemoryPart {
            bytes,
            data_pages: index.digests.len() as u64,
            zero_pages: index.zero_pages(),
            record,
            index_at,
            index_checksum,
            digest: self.digest(&index),
        })
    }

    /// Of all pages: those of the base, less those that are in the index, and these instead.
    fn digest(&self, index: &Index) -> Sum {
        let own = index.digests.iter().fold(0u64, |sum, digest| sum.wrapping_add(*digest));
        let Some(base) = &self.base else { return Sum(own) };
        let gfns = index.entries.iter().flat_map(|e| e.run.start..e.run.end());
        let replaced = gfns.fold(0u64, |sum, gfn| sum.wrapping_add(base.digest_of(gfn)));
        Sum(base.manifest().memory.digest.0.wrapping_sub(replaced).wrapping_add(own))
    }
}

impl Drop for Draft {
    fn drop(&mut self) {
        if self.committed {
            return;
        }
        // What cannot be removed now is removed by the next writing.
        for name in [memory_name, state_name, draft_name] {
            let _ = std::fs::remove_file(self.dir.join(name(self.token)));
        }
        if self.made_dir {
            let _ = std::fs::remove_dir(&self.dir);
        }
    }
}

/// Removes the bundle at `dir`, and the directory if nothing else is in it.
///
/// # Errors
/// There is none, it is written to by somebody else, or it cannot be removed.
pub fn remove(dir: &Path) -> Result<(), BundleError> {
    Manifest::read(dir)?;
    let lock = File::open(dir).map_err(BundleError::io("open", dir))?;
    if lock.try_lock().is_err() {
        return Err(BundleError::Busy { dir: dir.to_owned() });
    }
    let manifest = dir.join(MANIFEST);
    std::fs::remove_file(&manifest).map_err(BundleError::io("remove", &manifest))?;
    remove_others(dir, None);
    // Something else may be in it.
    let _ = std::fs::remove_dir(dir);
    Ok(())
}

/// Writes `chain` to `to` as one bundle that needs no base; `to` may be a directory of the chain. The id
/// stays, and with it the bundles that are based on it: the content is the same.
///
/// # Errors
/// A bundle of the chain is damaged, or `to` cannot be written.
pub fn merge(chain: &Chain, to: &Path) -> Result<Committed, BundleError> {
    let manifest = chain.manifest();
    let state = chain.state()?;
    let mut draft = Draft::begin(to, chain.spec().clone(), None)?;
    // It was read before the directory was locked.
    let top = chain.layers().first().filter(|top| same_dir(&top.dir, to));
    if top.is_some() && Manifest::read(to)?.token != manifest.token {
        let why = "it was saved over meanwhile".to_owned();
        return Err(BundleError::Occupied { dir: to.to_owned(), why });
    }
    draft.require_digest(manifest.memory.digest);
    draft.record = chain.record().to_vec();
    chain.visit(|run, bytes, _| {
        (run.start..)
            .zip(bytes.chunks_exact(PAGE_BYTES))
            .try_for_each(|(gfn, page)| draft.put(gfn, page))
    })?;
    draft.commit_as(manifest.id, manifest.machine, manifest.saved_unix_s, &state)
}

/// Makes the directory, for its owner alone: a machine's memory is a secret. Whether it was missing.
fn make_dir(dir: &Path) -> Result<bool, BundleError> {
    if dir.is_dir() {
        return Ok(false);
    }
    DirBuilder::new()
        .mode(0o700)
        .create(dir)
        .map_err(BundleError::io("make the directory", dir))?;
    let parent = match dir.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let synced = File::open(parent).and_then(|parent| parent.sync_all());
    synced.map_err(BundleError::io("sync", parent)).map(|()| true)
}

/// Files here are their owner's alone, but who can write to the directory can put others in their place.
fn check_private(dir: &Path, opened: &File) -> Result<(), BundleError> {
    let about = opened.metadata().map_err(BundleError::io("look at", dir))?;
    if about.mode() & 0o002 == 0 {
        return Ok(());
    }
    let why = format!(
        "every user of this host could replace what is written there: `chmod o-w {}`",
        dir.display()
    );
    Err(BundleError::Occupied { dir: dir.to_owned(), why })
}

/// The token of the bundle at `dir`, if there is one; an error if there is something else.
fn kept_token(dir: &Path) -> Result<Option<BundleId>, BundleError> {
    let occupied = |why: String| BundleError::Occupied { dir: dir.to_owned(), why };
    if dir.join(MANIFEST).exists() {
        let manifest = Manifest::read(dir).map_err(|e| match e {
            newer @ BundleError::Newer { .. } => newer,
            e => occupied(e.to_string()),
        })?;
        return Ok(Some(manifest.token));
    }
    for entry in std::fs::read_dir(dir).map_err(BundleError::io("list", dir))? {
        let name = entry.map_err(BundleError::io("list", dir))?.file_name();
        // What a writing left that was killed.
        if name.to_str().and_then(token_of).is_none() {
            return Err(occupied(format!("it has `{}` and no manifest", name.display())));
        }
    }
    Ok(None)
}

/// Removes files of writings but those of `kept`. What cannot be removed is in nobody's way.
fn remove_others(dir: &Path, kept: Option<BundleId>) {
    for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
        let token = entry.file_name().to_str().and_then(token_of);
        if token.is_some() && token != kept {
            let _ = std::fs::remove_file(entry.path());
        }
    }
}

fn create(path: &Path) -> Result<File, BundleError> {
    let opened = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path);
    opened.map_err(BundleError::io("create", path))
}

fn write_synced(path: &Path, bytes: &[u8]) -> Result<(), BundleError> {
    let mut file = create(path)?;
    let written = file.write_all(bytes).and_then(|()| file.sync_all());
    written.map_err(BundleError::io("write", path))
}

fn same_dir(a: &Path, b: &Path) -> bool {
    matches!((a.canonicalize(), b.canonicalize()), (Ok(a), Ok(b)) if a == b)
}

/// The way from directory `from` to `to`, both of which exist.
fn relative(from: &Path, to: &Path) -> String {
    let (Ok(from), Ok(to)) = (from.canonicalize(), to.canonicalize()) else {
        return to.display().to_string();
    };
    let common = from.components().zip(to.components()).take_while(|(a, b)| a == b).count();
    let up = from.components().skip(common).map(|_| Path::new(".."));
    let down = to.components().skip(common).collect::<PathBuf>();
    up.chain([down.as_path()]).collect::<PathBuf>().display().to_string()
}
