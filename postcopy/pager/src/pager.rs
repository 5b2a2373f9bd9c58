//! The thread that reads faults, and the placing of pages.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use ferry_memory::{GuestView, MemoryError, MissingPages, Touch, Waiters};
use ferry_pages::{PAGE_BYTES, PageSet, Run};
use ferry_postcopy::{Demand, Fault};
use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use rustix::io::{Errno, write};
use rustix::process::setpriority_process;
use rustix::thread::gettid;

use crate::Waits;

/// Pages placed under one lock: a fault waits no longer than for these.
const PIECE_PAGES: usize = 16;
/// How long to leave the kernel to whoever gives memory back.
const AGAIN: Duration = Duration::from_micros(20);

/// What a pager tells whoever brings the pages.
#[derive(Debug)]
pub enum Notice {
    /// Threads wait for these pages: bring them before all others. Each is asked for once.
    Ask(Vec<u64>),
    /// Every page is here.
    Complete,
    /// Faults cannot be served any more, and who touches a missing page waits for ever: why.
    Broken(String),
}

/// Serves the faults of one machine.
///
/// Stop the machine, or bring every page, before it is dropped: memory is plain then, and a missing page
/// would read as zeros.
#[derive(Debug)]
pub struct Pager {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

struct Shared {
    missing: MissingPages,
    ledger: Mutex<Ledger>,
    began: Instant,
    ending: AtomicBool,
    /// Wakes the thread.
    bell: OwnedFd,
    notify: Box<dyn Fn(Notice) + Send + Sync>,
}

struct Ledger {
    demand: Demand,
    complete: bool,
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Shared").field("missing", &self.missing).finish_non_exhaustive()
    }
}

impl Pager {
    /// Begins to serve the faults of a machine that stands still: pages of `owed` are given back to the host
    /// (older copies must not be seen) and come by [`install`](Self::install); all others are as they are.
    /// `notify` is called by the pager's thread and by those that install; it must not wait.
    ///
    /// # Errors
    /// No access to userfaultfd, memory that another one watches, or no thread.
    pub fn start(
        view: &GuestView,
        owed: PageSet,
        notify: impl Fn(Notice) + Send + Sync + 'static,
    ) -> Result<Self, MemoryError> {
        // What is not here need not be given back, and is most of it.
        let mut older = view.resident()?;
        older.intersect_with(&owed);
        for run in older.runs() {
            view.discard(run)?;
        }
        let missing = MissingPages::watch(view.clone(), Waiters::All)?;
        let no_thread = |e: std::io::Error| MemoryError::Userfault { source: e };
        let bell = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK);
        let shared = Arc::new(Shared {
            missing,
            ledger: Mutex::new(Ledger { complete: owed.is_empty(), demand: Demand::new(owed) }),
            began: Instant::now(),
            ending: AtomicBool::new(false),
            bell: bell.map_err(|e| no_thread(e.into()))?,
            notify: Box::new(notify),
        });
        let thread = std::thread::Builder::new().name("ferry-pager".into()).spawn({
            let shared = shared.clone();
            move || shared.serve()
        });
        Ok(Self { shared, thread: Some(thread.map_err(no_thread)?) })
    }

    /// Installs pages from frame `gfn` on, whose content is `bytes`, as far as they are owed; `taken` is
    /// told of each that was.
    ///
    /// # Errors
    /// Part of it is not guest memory, or the host is out of memory. Pages that were not taken are still
    /// owed.
    pub fn install(
        &self,
        gfn: u64,
        bytes: &[u8],
        mut taken: impl FnMut(u64),
    ) -> Result<(), MemoryError> {
        let (pieces, mut at) = (bytes.chunks(PIECE_PAGES * PAGE_BYTES), gfn);
        for piece in pieces {
            let run = Run::new(at, (piece.len() / PAGE_BYTES) as u64);
            self.shared.place(run, &mut taken, |part| {
                let first = usize::try_from(part.start - run.start).unwrap_or(0) * PAGE_BYTES;
                let bytes = usize::try_from(part.pages).unwrap_or(0) * PAGE_BYTES;
                let placed = self.shared.missing.place(part.start, &piece[first..first + bytes]);
                placed.map(|placed| placed.pages)
            })?;
            at = run.end();
        }
        Ok(())
    }

    /// Installs the pages of `run`, which are all zeros, as [`install`](Self::install) does.
    ///
    /// # Errors
    /// As [`install`](Self::install).
    pub fn install_zeros(&self, run: Run, mut taken: impl FnMut(u64)) -> Result<(), MemoryError> {
        self.shared.place(run, &mut taken, |part| {
            self.shared.missing.place_zeros(part).map(|placed| placed.pages)
        })
    }

    /// The pages that are owed and not here.
    pub fn missing(&self) -> PageSet {
        self.shared.ledger().demand.missing().clone()
    }

    /// The pages that threads wait for, in the order in which they were wanted.
    pub fn outstanding(&self) -> Vec<u64> {
        self.shared.ledger().demand.outstanding().collect()
    }

    /// Time since its start, by the clock of [`Waits::waited`].
    pub fn age(&self) -> Duration {
        self.shared.began.elapsed()
    }

    /// What was measured so far.
    pub fn waits(&self) -> Waits {
        let ledger = self.shared.ledger();
        Waits {
            counts: ledger.demand.counts(),
            nanos: ledger.demand.wait_nanos().clone(),
            by_thread: ledger.demand.waits().collect(),
            waited: ledger.demand.waited().clone(),
        }
    }
}

impl Drop for Pager {
    fn drop(&mut self) {
        self.shared.ending.store(true, Ordering::Release);
        // An eventfd takes eight bytes, and its counter is far from full.
        let _ = write(&self.shared.bell, &1u64.to_ne_bytes());
        if let Some(thread) = self.thread.take() {
            // It does not panic; if it did, there would be nobody to tell.
            let _ = thread.join();
        }
    }
}

impl Shared {
    fn ledger(&self) -> MutexGuard<'_, Ledger> {
        self.ledger.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn serve(&self) {
        hurry();
        let mut touches = Vec::new();
        loop {
            let fd = self.missing.fd();
            let mut fds = [
                PollFd::new(&fd, PollFlags::IN),
                PollFd::from_borrowed_fd(self.bell.as_fd(), PollFlags::IN),
            ];
            match poll(&mut fds, None) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(e) => return (self.notify)(Notice::Broken(format!("poll: {e}"))),
            }
            if self.ending.load(Ordering::Acquire) {
                return;
            }
            if let Err(why) = self.answer(&mut touches) {
                return (self.notify)(Notice::Broken(why));
            }
        }
    }

    /// Reads what happened and answers it.
    fn answer(&self, touches: &mut Vec<Touch>) -> Result<(), String> {
        let (mut ask, mut zeros) = (Vec::new(), Vec::new());
        let mut ledger = self.ledger();
        // Under the lock: whoever gives pages back goes on once that was read, and no copy of them may be
        // placed after it.
        touches.clear();
        let read = self.missing.read(touches);
        let now = self.began.elapsed();
        for touch in touches.iter() {
            match *touch {
                Touch::Fault { gfn, thread } => match ledger.demand.fault(gfn, now, thread) {
                    Fault::Ask => ask.push(gfn),
                    Fault::Asked => {}
                    // One that is here is left as it is, and who waits is woken. Where it is gone again
                    // (its file was cut), it reads as zero.
                    Fault::Zero | Fault::Here => zeros.push(gfn),
                },
                Touch::Removed(run) => zeros.extend(ledger.demand.discarded(run)),
            }
        }
        let complete = ledger.ends();
        drop(ledger);
        if !ask.is_empty() {
            (self.notify)(Notice::Ask(ask));
        }
        if complete {
            (self.notify)(Notice::Complete);
        }
        let fail = |e: MemoryError| match std::error::Error::source(&e) {
            Some(cause) => format!("{e}: {cause}"),
            None => e.to_string(),
        };
        for gfn in zeros {
            // Where memory is being given back the toucher faults again, later.
            if self.missing.place_zeros(Run::new(gfn, 1)).map_err(fail)?.again {
                self.missing.wake(gfn).map_err(fail)?;
            }
        }
        read.map_err(|e| format!("reading faults: {e}"))
    }

    /// Places the pages of `run` that are owed.
    fn place(
        &self,
        run: Run,
        taken: &mut impl FnMut(u64),
        mut put: impl FnMut(Run) -> Result<u64, MemoryError>,
    ) -> Result<(), MemoryError> {
        let mut rest = run;
        loop {
            let mut ledger = self.ledger();
            let done = ledger.demand.place(rest, || self.began.elapsed(), &mut put, &mut *taken);
            let complete = ledger.ends();
            drop(ledger);
            if complete {
                (self.notify)(Notice::Complete);
            }
            let done = done?;
            rest = Run::new(rest.start + done, rest.pages - done);
            if rest.pages == 0 {
                return Ok(());
            }
            // Memory is being given back.
            std::thread::sleep(AGAIN);
        }
    }
}

/// Lets this thread run before others: somebody waits for what it does, and that is little. Where it is not
/// permitted, it runs as others do.
pub fn hurry() {
    let _ = setpriority_process(Some(gettid()), -10);
}

impl Ledger {
    /// Whether the last page came; true once.
    fn ends(&mut self) -> bool {
        let ends = !self.complete && self.demand.is_complete();
        self.complete |= ends;
        ends
    }
}
