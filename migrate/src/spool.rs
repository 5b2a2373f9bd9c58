//! A spool: the pages that only the source has after a hand-over, on its disk, so that the move can be finished
//! when the source's process is gone.
//!
//! It is a bundle of these pages, whose state is a [`Spooled`] with the digest of all memory, and not a machine's. It is written in the
//! background while pages are served, by a thread that stands back behind all others, and counts once it is
//! whole. There is no right to run in it: it can only be served, by [`serve_spool()`].

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use ferry_bundle::{BundleError, Chain, Draft, Manifest};
use ferry_dirtylog::DirtySource;
use ferry_memory::{GuestView, Mapping, MemoryError};
use ferry_pages::{PAGE_BYTES, PageSet};
use ferry_protocol::{MachineSpec, Reattach, RunPermit, Source, Spooled, StateReader, StateWriter};
use ferry_transport::Connector;
use rustix::process::setpriority_process;
use rustix::thread::gettid;

use crate::pinned::Pinned;
use crate::report::{Report, Whereabouts};
use crate::send::{self, Left, SendEvent, SendHandle, SendOptions};
use crate::{Guest, GuestError, words};

/// What a spool says that it is made for: no VMM.
const VMM: &str = "ferry-spool";
const SECTION: &str = "ferry.spool";

/// Why a spool cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum SpoolError {
    /// There is none, or it is damaged.
    #[error("no spool can be served from it: {0}")]
    Bundle(#[from] BundleError),
    /// It is a machine's bundle.
    #[error("{} holds a bundle of machine `{name}`, not a spool", dir.display())]
    NoSpool {
        /// Where.
        dir: PathBuf,
        /// The machine.
        name: String,
    },
    /// What it says does not fit together.
    #[error("the spool at {} is not whole: {why}", dir.display())]
    Damaged {
        /// Where.
        dir: PathBuf,
        /// Why.
        why: String,
    },
    /// No room for its pages.
    #[error(transparent)]
    Memory(#[from] MemoryError),
}

/// A spool that is being written.
pub(crate) struct Spooling {
    dir: PathBuf,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<bool>>,
}

impl Spooling {
    /// Begins to write `owed` pages of `view`, which stand still, to `dir`. `spooled` says what is
    /// served with them; `tell` hears how it ended: bytes, or why it was given up.
    pub(crate) fn start(
        dir: &Path,
        spec: MachineSpec,
        view: GuestView,
        owed: PageSet,
        spooled: Spooled,
        tell: impl FnOnce(Result<u64, String>) + Send + 'static,
    ) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let (to, stopped) = (dir.to_owned(), stop.clone());
        let run = move || {
            // The guest waits for its pages elsewhere: they go first.
            let _ = setpriority_process(Some(gettid()), 10);
            let written = write(&to, spec, &view, &owed, spooled, &stopped);
            let whole = matches!(written, Ok(Some(_)));
            match written {
                Ok(Some(bytes)) => tell(Ok(bytes)),
                Ok(None) => {}
                Err(why) => tell(Err(why)),
            }
            whole
        };
        let thread = std::thread::Builder::new().name("ferry-spool".into()).spawn(run).ok();
        Self { dir: dir.to_owned(), stop, thread }
    }

    /// Ends it: a spool that is needed no more goes.
    pub(crate) fn end(mut self, needed: bool) {
        if !needed {
            self.stop.store(true, Ordering::Relaxed);
        }
        let whole = self.thread.take().is_some_and(|thread| thread.join().unwrap_or(false));
        if whole && !needed {
            remove(&self.dir);
        }
    }
}

/// Whether a spool can be written to `dir`: it is not there, empty, or holds an older spool.
///
/// # Errors
/// A machine's bundle is there, or something else.
pub fn check_spool(dir: &Path) -> Result<(), SpoolError> {
    match Manifest::read(dir) {
        Ok(manifest) if manifest.spec.vmm == VMM => Ok(()),
        Ok(Manifest { spec: MachineSpec { name, .. }, .. }) => {
            Err(SpoolError::NoSpool { dir: dir.to_owned(), name })
        }
        Err(BundleError::NotABundle { .. }) => Ok(()),
        Err(e) => Err(e.into()),
    }
}

fn write(
    dir: &Path,
    spec: MachineSpec,
    view: &GuestView,
    owed: &PageSet,
    spooled: Spooled,
    stop: &AtomicBool,
) -> Result<Option<u64>, String> {
    let fail = |e: &dyn std::error::Error| words(e);
    let spec = MachineSpec { vmm: VMM.into(), ..spec };
    check_spool(dir).map_err(|e| fail(&e))?;
    let mut draft = Draft::begin(dir, spec, None).map_err(|e| fail(&e))?;
    let mut page = vec![0; PAGE_BYTES];
    for gfn in owed.runs().flat_map(|run| run.start..run.end()) {
        if stop.load(Ordering::Relaxed) {
            return Ok(None);
        }
        view.read(gfn, &mut page).map_err(|e| fail(&e))?;
        draft.put(gfn, &page).map_err(|e| fail(&e))?;
    }
    let mut state = StateWriter::new();
    state.put(SECTION, 0, 1, 1, &(spooled, send::digest(view)?)).map_err(|e| fail(&e))?;
    let state = state.finish().map_err(|e| fail(&e))?;
    let bytes = draft.written_bytes();
    // Of no machine: what it holds can never be run.
    draft.commit(0, &state).map_err(|e| fail(&e))?;
    Ok(Some(bytes))
}

/// Removes the spool at `dir`.
fn remove(dir: &Path) {
    let removed = ferry_bundle::remove(dir);
    if let Err(e) = removed {
        tracing::warn!("a spool that is needed no more is left: {}", words(&e));
    }
}

/// A spool, opened: what a source left that ended while it owed pages.
#[derive(Debug)]
pub struct Spool {
    dir: PathBuf,
    spec: MachineSpec,
    view: GuestView,
    reattach: Reattach,
    /// Of all memory, of which only a part is here.
    digest: u64,
    pages: u64,
}

impl Spool {
    /// Opens the spool at `dir`, and reads its pages.
    ///
    /// # Errors
    /// It is no spool, it is damaged, or memory has no room for its pages.
    pub fn open(dir: &Path) -> Result<Self, SpoolError> {
        let chain = Chain::open(dir, &[])?;
        let spec = chain.spec().clone();
        if spec.vmm != VMM {
            return Err(SpoolError::NoSpool { dir: dir.to_owned(), name: spec.name });
        }
        let damaged = |why: String| SpoolError::Damaged { dir: dir.to_owned(), why };
        let state = StateReader::parse(&chain.state()?).map_err(|e| damaged(e.to_string()))?;
        let (spooled, digest): (Spooled, u64) =
            state.read(SECTION, 0, 1).map_err(|e| damaged(e.to_string()))?;
        let layout = spec.layout().map_err(|e| damaged(e.to_string()))?;
        let reattach = spooled.reattach(&layout).map_err(damaged)?;
        let mappings = layout.extents().iter().map(|e| Ok((e.start, Mapping::anonymous(e.pages)?)));
        let view = GuestView::of(mappings.collect::<Result<_, MemoryError>>()?)?;
        let mut pages = 0;
        chain.visit(|run, bytes, _| -> Result<(), SpoolError> {
            pages += run.pages;
            Ok(view.write(run.start, bytes)?)
        })?;
        Ok(Self { dir: dir.to_owned(), spec, view, reattach, digest, pages })
    }

    /// Name of the machine at its source.
    pub fn machine(&self) -> &str {
        &self.spec.name
    }

    /// Pages of data in it.
    pub fn pages(&self) -> u64 {
        self.pages
    }
}

/// Goes on where a source ended that left `spool`: serves the destination that `connector` reaches. When all
/// pages are there, the spool is removed; otherwise it can be served again.
pub fn serve_spool(
    spool: Spool,
    connector: Arc<dyn Connector>,
    options: &SendOptions,
    handle: &SendHandle,
    watch: &mut dyn FnMut(SendEvent),
) -> Report {
    let Spool { dir, spec, view, reattach, digest, .. } = spool;
    let machine = Source::reattach(reattach, options.goals, options.rejoin_for);
    let (mut remains, digest) = (Remains { spec, view }, Some(digest));
    let options = SendOptions { spool: None, ..options.clone() };
    let connector = Arc::new(Pinned::new(connector, None));
    let sent = send::go_on(&mut remains, machine, digest, connector, &options, handle, watch);
    let mut report = sent.report;
    match sent.left {
        Left::Nothing => remove(&dir),
        Left::Running | Left::Stopped(..) => {
            // The destination's word that it never ran it. Nobody does.
            report.machine = Whereabouts::Unknown;
            report.reason +=
                ". The machine is lost: its source ended, and a spool holds no machine";
        }
        Left::InDoubt(_) | Left::Detached(_) => {
            report.reason += &format!(". The spool at {} can be served again", dir.display());
        }
    }
    report
}

/// What is left of a machine: memory that nobody runs on.
struct Remains {
    spec: MachineSpec,
    view: GuestView,
}

fn none() -> GuestError {
    GuestError::new("a spool holds no machine")
}

impl Guest for Remains {
    fn spec(&self) -> MachineSpec {
        self.spec.clone()
    }
    fn memory(&self) -> GuestView {
        self.view.clone()
    }
    fn dirty_sources(&mut self) -> Result<Vec<Box<dyn DirtySource>>, GuestError> {
        Err(none())
    }
    fn pause(&mut self) -> Result<RunPermit, GuestError> {
        Err(none())
    }
    fn resume(&mut self, permit: RunPermit) -> Result<(), (RunPermit, GuestError)> {
        Err((permit, none()))
    }
    fn save(&mut self, _: &mut StateWriter) -> Result<(), GuestError> {
        Err(none())
    }
    fn load(&mut self, _: &StateReader) -> Result<(), GuestError> {
        Err(none())
    }
}
