//! The swap of one machine: what it is made of, what it tells.

use std::collections::{HashMap, VecDeque};
use std::fmt;
use std::io;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Sender};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError, RwLock};
use std::thread::JoinHandle;

use ferry_codec::Packer;
use ferry_dirtylog::Region;
use ferry_memory::{Aside, GuestView, MemoryError, MissingPages};
use ferry_pages::{PAGE_BYTES, PageSet};
use hdrhistogram::Histogram;
use rustix::event::{EventfdFlags, eventfd};
use rustix::fd::OwnedFd;
use rustix::io::write;
use serde::{Deserialize, Serialize};

use crate::ages::Ages;
use crate::arena::SLAB_BYTES;
use crate::evict::BATCH;
use crate::file::SwapFile;
use crate::pool::Pool;
use crate::segments::SEGMENT_BYTES;
use crate::state::State;

/// How much may be away, and where.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Options {
    /// Most bytes of the host's memory for the pool.
    pub pool_bytes: u64,
    /// The directory of the file, on a disk; none, and there is only the pool.
    pub dir: Option<PathBuf>,
    /// Most bytes of the file.
    pub file_bytes: u64,
}

/// Why a machine cannot be swapped.
#[derive(Debug, thiserror::Error)]
pub enum SwapError {
    /// bounds that hold nothing
    #[error(
        "a swap pool of {pool_bytes} bytes and a file of {file_bytes} bytes: the pool needs at least {SLAB_BYTES} \
         bytes, a file at least {} and a directory",
        2 * SEGMENT_BYTES
    )]
    TooSmall {
        /// As asked for.
        pool_bytes: u64,
        /// As asked for.
        file_bytes: u64,
    },
    /// no file
    #[error("no swap file can be made in {}: choose a directory on a disk, which this user may write to", dir.display())]
    File {
        /// Where.
        dir: PathBuf,
        /// The system's word.
        #[source]
        source: io::Error,
    },
    /// memory that cannot be swapped
    #[error("the machine's memory cannot be swapped")]
    Memory(#[from] MemoryError),
    /// another swap has the memory
    #[error("the machine has a swap already, and pages may be in it")]
    Another,
    /// memory that is watched no more
    #[error("the machine's swap was given up: it can only be stopped")]
    LetGo,
    /// no thread
    #[error("a thread for the swap cannot be started")]
    Thread(#[source] io::Error),
}

/// What a swap has done, and holds.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Figures {
    /// Bytes that the machine and its pool may use of the host's memory; none, and nothing is moved out.
    pub limit_bytes: Option<u64>,
    /// Bytes of the machine that are in memory.
    pub resident_bytes: u64,
    /// Bytes of the machine that are away.
    pub swapped_bytes: u64,
    /// Of those, bytes of pages whose content is kept for another page as well.
    pub shared_bytes: u64,
    /// Bytes of the host's memory that the pool uses.
    pub pool_bytes: u64,
    /// Bytes that the file holds.
    pub file_bytes: u64,
    /// Whether the file is written past the page cache.
    pub direct_io: bool,
    /// Pages moved out so far.
    pub pages_out: u64,
    /// Of those, pages of zeros, which were dropped.
    pub zero_pages: u64,
    /// Pages that came back because they were touched.
    pub pages_in: u64,
    /// Pages that came back in a row with others, before they were touched.
    pub prefetched: u64,
    /// Pages that were touched for the first time.
    pub first_touches: u64,
    /// What share of its memory the machine uses, as far as is known: 0 to 1.
    pub active: f64,
    /// Waits for pages of the pool, p50 and p99, in microseconds, from when the touch was read.
    pub pool_wait_us: (f64, f64),
    /// The same for pages of the file.
    pub file_wait_us: (f64, f64),
    /// What is wrong with file or pool, in words.
    pub trouble: Option<String>,
}

/// The swap of one machine, attached to its memory. Clones are handles to the same.
///
/// It lives as long as the [`GuestView`] that it is attached to, or a handle; the machine must not run any more
/// when both are gone.
#[derive(Clone)]
pub struct Swap(Arc<Handle>);

impl fmt::Debug for Swap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Swap")
    }
}

/// Ends the threads when it goes.
pub(crate) struct Handle(pub(crate) Arc<Inner>);

impl fmt::Debug for Handle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Swap")
    }
}

pub(crate) struct Inner {
    pub(crate) memory: GuestView,
    /// Held for writing while pages are moved out.
    pub(crate) stay: RwLock<()>,
    pub(crate) state: Mutex<State>,
    /// Tells the thread that moves pages out.
    pub(crate) wanted: Condvar,
    pub(crate) aside: Mutex<(Aside, Packer)>,
    /// Held while marks of written pages are taken off, until whoever else needs them is told.
    pub(crate) marks: Mutex<()>,
    pub(crate) file: Option<SwapFile>,
    pub(crate) serving: OnceLock<Serving>,
    /// Once at a time.
    begin: Mutex<()>,
    pub(crate) ending: AtomicBool,
    /// Memory is watched no more: see [`Swap::abandon`].
    let_go: AtomicBool,
    /// Pages that are waited for and cannot be placed now, and whether to be written.
    pub(crate) later: Mutex<Vec<(u64, bool)>>,
}

/// What there is once the memory is watched.
pub(crate) struct Serving {
    pub(crate) missing: MissingPages,
    /// Wakes the thread that reads faults.
    pub(crate) bell: OwnedFd,
    /// Pages to be read from the file.
    pub(crate) reads: Sender<u64>,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

impl Swap {
    /// A swap for the machine with `memory`, which has no limit yet: pages may come from elsewhere, none is moved
    /// out.
    ///
    /// # Errors
    /// Bounds that hold nothing, no file, memory or a kernel that cannot do it.
    pub fn new(memory: &GuestView, options: &Options) -> Result<Self, SwapError> {
        let Options { pool_bytes, ref dir, file_bytes } = *options;
        let has_file = file_bytes >= 2 * SEGMENT_BYTES as u64;
        if pool_bytes < SLAB_BYTES as u64 || dir.is_some() != has_file {
            return Err(SwapError::TooSmall { pool_bytes, file_bytes });
        }
        if let Some(region) = memory.regions().iter().find(|r| r.unit > 1) {
            return Err(MemoryError::Huge { run: region.run }.into());
        }
        let file = match dir {
            Some(dir) => Some(
                SwapFile::create(dir)
                    .map_err(|source| SwapError::File { dir: dir.clone(), source })?,
            ),
            None => None,
        };
        let aside = Aside::new(BATCH as u64)?;
        let figures = Figures {
            direct_io: file.as_ref().is_some_and(|file| file.direct),
            ..Figures::default()
        };
        let waits = || {
            Histogram::new_with_max(60_000_000_000, 3)
                .unwrap_or_else(|_| unreachable!("bounds are constants"))
        };
        let state = State {
            pool: Pool::new(pool_bytes, file_bytes),
            packer: Packer::default(),
            transit: HashMap::new(),
            ages: Ages::new(memory.regions().iter().map(|r| r.run)),
            victims: VecDeque::new(),
            preferred: PageSet::new(),
            zeros: PageSet::new(),
            suspects: None,
            seen: PageSet::new(),
            limit_pages: None,
            resident: 0,
            came: 0,
            probes: Vec::new(),
            figures,
            pool_waits: waits(),
            file_waits: waits(),
            row: (u64::MAX, 0),
            recent: VecDeque::new(),
            stuck: None,
        };
        let inner = Arc::new(Inner {
            memory: memory.plain(),
            stay: RwLock::new(()),
            state: Mutex::new(state),
            wanted: Condvar::new(),
            aside: Mutex::new((aside, Packer::default())),
            marks: Mutex::new(()),
            file,
            serving: OnceLock::new(),
            begin: Mutex::new(()),
            ending: AtomicBool::new(false),
            let_go: AtomicBool::new(false),
            later: Mutex::default(),
        });
        let handle = Arc::new(Handle(inner));
        if !memory.attach(handle.clone()) {
            return Err(SwapError::Another);
        }
        Ok(Self(handle))
    }

    /// Keeps the machine and its pool within `bytes` of the host's memory from now on; as far as pool and file have
    /// room. None: no limit.
    ///
    /// # Errors
    /// The memory cannot be watched (yet: a machine whose pages are still being fetched is watched by its pager).
    pub fn set_limit(&self, bytes: Option<u64>) -> Result<(), SwapError> {
        if bytes.is_some() {
            Inner::serve(&self.0.0)?;
        }
        self.0.0.state().limit_pages = bytes.map(|bytes| bytes / PAGE_BYTES as u64);
        self.0.0.wanted.notify_all();
        Ok(())
    }

    /// Has cold pages of `pages` moved out before all others when the limit asks for it, in the place of those that
    /// were preferred before. Pages that were just in use stay, preferred or not.
    pub fn prefer(&self, pages: &PageSet) {
        let pages = self.0.0.own(pages);
        let mut state = self.0.0.state();
        state.preferred = pages;
        let State { victims, probes, .. } = &mut *state;
        victims.retain(|gfn| probes.contains(gfn));
    }

    /// Gives back those of `pages` that are of zeros, limit or not; all others stay as they are, or are moved out if
    /// the limit asks for it. It is done a few pages at a time, after this returns.
    ///
    /// # Errors
    /// The memory cannot be watched (yet), as in [`set_limit`](Self::set_limit).
    pub fn give_back_zeros(&self, pages: &PageSet) -> Result<(), SwapError> {
        Inner::serve(&self.0.0)?;
        let pages = self.0.0.own(pages);
        self.0.0.state().zeros.union_with(&pages);
        self.0.0.wanted.notify_all();
        Ok(())
    }

    /// What it holds and has done.
    pub fn figures(&self) -> Figures {
        self.0.0.figures()
    }

    /// Lets those go that wait for pages which cannot be read, to pages of zeros: of a machine that is stopped for
    /// good.
    pub fn abandon(&self) {
        self.0.0.abandon();
    }
}

impl Inner {
    pub(crate) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The region of page `gfn`.
    pub(crate) fn region_of(&self, gfn: u64) -> Option<&Region> {
        self.memory.regions().iter().find(|r| r.run.start <= gfn && gfn < r.run.end())
    }

    /// Those of `pages` that are this machine's.
    fn own(&self, pages: &PageSet) -> PageSet {
        let mut own: PageSet = self.memory.regions().iter().map(|r| r.run).collect();
        own.intersect_with(pages);
        own
    }

    fn figures(&self) -> Figures {
        let page = PAGE_BYTES as u64;
        let state = self.state();
        let holds = state.pool.holds();
        let us = |histogram: &Histogram<u64>| {
            let at = |q| histogram.value_at_quantile(q) as f64 / 1000.0;
            (at(0.5), at(0.99))
        };
        Figures {
            limit_bytes: state.limit_pages.map(|pages| pages * page),
            resident_bytes: state.resident * page,
            swapped_bytes: holds.pages * page,
            shared_bytes: holds.pages.saturating_sub(holds.blobs) * page,
            pool_bytes: holds.arena_bytes,
            file_bytes: holds.file_bytes,
            pool_wait_us: us(&state.pool_waits),
            file_wait_us: us(&state.file_waits),
            ..state.figures.clone()
        }
    }

    /// Watches the memory and starts the threads, if that was not done.
    pub(crate) fn serve(inner: &Arc<Self>) -> Result<(), SwapError> {
        let _once = inner.begin.lock().unwrap_or_else(PoisonError::into_inner);
        if inner.is_let_go() {
            return Err(SwapError::LetGo);
        }
        if inner.serving.get().is_some() {
            return Ok(());
        }
        let missing = MissingPages::watch_for_swap(inner.memory.clone())?;
        let bell = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK);
        let bell = bell.map_err(|e| MemoryError::Userfault { source: e.into() })?;
        let (reads, to_read) = mpsc::channel();
        let serving = Serving { missing, bell, reads, threads: Mutex::default() };
        let resident = inner.memory.resident()?.len();
        inner.state().resident = resident;
        // Set once: `begin` is held.
        let _ = inner.serving.set(serving);
        let mut threads = Vec::new();
        let mut spawn = |name: &str, run: Box<dyn FnOnce(&Inner) + Send>| {
            let inner = inner.clone();
            let thread = std::thread::Builder::new().name(name.into()).spawn(move || run(&inner));
            thread.map(|thread| threads.push(thread)).map_err(SwapError::Thread)
        };
        let started = spawn("swap-out", Box::new(Self::move_out))
            .and_then(|()| spawn("swap-faults", Box::new(Self::serve_faults)))
            .and_then(|()| match inner.file {
                Some(_) => spawn("swap-in", Box::new(move |inner| inner.read_file(&to_read))),
                None => Ok(()),
            });
        if started.is_err() {
            inner.abandon();
        }
        if let Some(serving) = inner.serving.get() {
            *serving.threads.lock().unwrap_or_else(PoisonError::into_inner) = threads;
        }
        started
    }

    /// Watches memory no more, and moves nothing out.
    fn abandon(&self) {
        self.let_go.store(true, Ordering::Release);
        {
            let mut state = self.state();
            state.limit_pages = None;
            state.zeros.clear();
        }
        if let Some(serving) = self.serving.get() {
            serving.missing.let_go();
        }
    }

    pub(crate) fn is_let_go(&self) -> bool {
        self.let_go.load(Ordering::Acquire)
    }

    pub(crate) fn is_ending(&self) -> bool {
        self.ending.load(Ordering::Acquire)
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        let inner = &self.0;
        {
            // Whoever is about to wait sees it, or the call that follows.
            let _state = inner.state();
            inner.ending.store(true, Ordering::Release);
        }
        inner.wanted.notify_all();
        let Some(serving) = inner.serving.get() else { return };
        let mut threads =
            std::mem::take(&mut *serving.threads.lock().unwrap_or_else(PoisonError::into_inner));
        // The first is the one that moves pages out: what it has in hand is put back while memory is watched.
        if !threads.is_empty() {
            let _ = threads.remove(0).join();
        }
        serving.missing.let_go();
        // An eventfd takes eight bytes, and its counter is far from full.
        let _ = write(&serving.bell, &1u64.to_ne_bytes());
        // Wakes who waits for pages to read.
        let _ = serving.reads.send(u64::MAX);
        for thread in threads {
            // One that panicked said so on standard error.
            let _ = thread.join();
        }
    }
}
