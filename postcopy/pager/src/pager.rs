//! Reading faults, and placing pages.

use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use ferry_memory::{GuestView, MemoryError, MissingPages, Touch, Waiters};
use ferry_pages::{PAGE_BYTES, PageSet, Run};
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::io::{Errno, write};
use rustix::process::setpriority_process;
use rustix::thread::gettid;

use crate::Waits;
use crate::ledger::{Ledger, Todo};

/// Pages placed under one lock: a fault waits no longer than for these.
const PIECE_PAGES: usize = 16;
/// How long to leave the kernel to whoever gives memory back.
const AGAIN: Duration = Duration::from_nanos(AGAIN_NS as u64);
const AGAIN_NS: i64 = 20_000;

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

/// Places the pages of one machine.
///
/// Stop the machine, or bring every page, before it is dropped: memory is plain then, and a missing page
/// would read as zeros.
#[derive(Debug)]
pub struct Pager(Arc<Shared>);

/// Reads the faults of one machine, for whoever has a thread for it.
///
/// It must be read until its [`Pager`] is gone: whoever gives memory back waits for it, too.
#[derive(Debug)]
pub struct Faults {
    shared: Arc<Shared>,
    touches: Vec<Touch>,
    /// Could not be placed yet.
    again: Vec<Run>,
}

/// What is to be done after [`Faults::answer`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Next {
    /// Call it when the descriptor is readable.
    Wait,
    /// Call it soon, whether or not that is readable: memory is being given back.
    Soon,
    /// There is nothing to read any more.
    End,
}

struct Shared {
    missing: MissingPages,
    ledger: Mutex<Ledger>,
    began: Instant,
    ending: AtomicBool,
    /// Wakes a thread that reads faults.
    bell: OwnedFd,
    notify: Box<dyn Fn(Notice) + Send + Sync>,
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Shared").field("missing", &self.missing).finish_non_exhaustive()
    }
}

impl Pager {
    /// Begins to serve the faults of a machine that stands still: pages of `owed` are given back to the host
    /// (older copies must not be seen) and come by [`install`](Self::install); all others are as they are.
    /// `notify` is called by whoever reads the faults and by those that install; it must not wait.
    ///
    /// # Errors
    /// No access to userfaultfd, or memory that another one watches.
    pub fn start(
        view: &GuestView,
        owed: PageSet,
        notify: impl Fn(Notice) + Send + Sync + 'static,
    ) -> Result<(Self, Faults), MemoryError> {
        // What is not here need not be given back, and is most of it.
        let mut older = view.resident()?;
        older.intersect_with(&owed);
        view.discard_all(&older)?;
        // The rest of a huge page is seen when all of it is here.
        for region in view.regions().iter().filter(|region| region.unit > 1) {
            let mut hidden = PageSet::new();
            for run in older.runs_in(region.run) {
                let (first, last) = (region.unit_of(run.start), region.unit_of(run.end() - 1));
                hidden.insert_run(Run::new(first.start, last.end() - first.start));
            }
            for run in hidden.runs() {
                view.hide(run)?;
            }
        }
        let missing = MissingPages::watch(view.clone(), Waiters::All)?;
        let huge = view.regions().iter().filter(|r| r.unit > 1).map(|r| (r.run, r.unit)).collect();
        let bell = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK);
        let bell = bell.map_err(|e| MemoryError::Userfault { source: e.into() })?;
        let shared = Arc::new(Shared {
            missing,
            ledger: Mutex::new(Ledger::new(owed, huge)),
            began: Instant::now(),
            ending: AtomicBool::new(false),
            bell,
            notify: Box::new(notify),
        });
        let faults = Faults { shared: shared.clone(), touches: Vec::new(), again: Vec::new() };
        Ok((Self(shared), faults))
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
            self.0.install(run, Some(piece), &mut taken)?;
            at = run.end();
        }
        Ok(())
    }

    /// Installs the pages of `run`, which are all zeros, as [`install`](Self::install) does.
    ///
    /// # Errors
    /// As [`install`](Self::install).
    pub fn install_zeros(&self, run: Run, mut taken: impl FnMut(u64)) -> Result<(), MemoryError> {
        self.0.install(run, None, &mut taken)
    }

    /// The pages that are owed and not here.
    pub fn missing(&self) -> PageSet {
        self.0.ledger().missing()
    }

    /// The pages that threads wait for, in the order in which they were wanted.
    pub fn outstanding(&self) -> Vec<u64> {
        self.0.ledger().outstanding()
    }

    /// Time since its start, by the clock of [`Waits::waited`].
    pub fn age(&self) -> Duration {
        self.0.began.elapsed()
    }

    /// What was measured so far.
    pub fn waits(&self) -> Waits {
        let ledger = self.0.ledger();
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
        self.0.ending.store(true, Ordering::Release);
        self.0.missing.let_go();
        // An eventfd takes eight bytes, and its counter is far from full.
        let _ = write(&self.0.bell, &1u64.to_ne_bytes());
    }
}

/// The descriptor: readable when there are faults.
impl AsRawFd for Faults {
    fn as_raw_fd(&self) -> RawFd {
        self.shared.missing.fd().as_raw_fd()
    }
}

impl Faults {
    /// Reads what happened and answers it, without waiting. Until it says [`Next::Wait`] there may be more, of
    /// which the descriptor gives no new notice.
    pub fn answer(&mut self) -> Next {
        let answered = self.shared.answer(&mut self.touches, &mut self.again);
        if self.shared.ending.load(Ordering::Acquire) {
            return Next::End;
        }
        match answered {
            Err(why) => {
                (self.shared.notify)(Notice::Broken(why));
                Next::End
            }
            Ok(()) if self.again.is_empty() && self.touches.is_empty() => Next::Wait,
            Ok(()) => Next::Soon,
        }
    }

    /// Reads faults until the pager is gone, in this thread.
    pub fn serve(mut self) {
        hurry();
        loop {
            let fd = self.shared.missing.fd();
            let mut fds = [
                PollFd::new(&fd, PollFlags::IN),
                PollFd::from_borrowed_fd(self.shared.bell.as_fd(), PollFlags::IN),
            ];
            let soon = Timespec { tv_sec: 0, tv_nsec: AGAIN_NS };
            match poll(&mut fds, (!self.again.is_empty()).then_some(&soon)) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(e) => return (self.shared.notify)(Notice::Broken(format!("poll: {e}"))),
            }
            if self.answer() == Next::End {
                return;
            }
        }
    }
}

impl Shared {
    fn ledger(&self) -> MutexGuard<'_, Ledger> {
        self.ledger.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Reads what happened and answers it; places what could not be placed before.
    fn answer(&self, touches: &mut Vec<Touch>, again: &mut Vec<Run>) -> Result<(), String> {
        let mut todo = Todo { ask: Vec::new(), place: std::mem::take(again) };
        let mut ledger = self.ledger();
        // Under the lock: whoever gives pages back goes on once that was read, and no copy of them may be
        // placed after it.
        touches.clear();
        let read = self.missing.read(touches);
        let now = self.began.elapsed();
        for touch in touches.iter() {
            match *touch {
                Touch::Fault { gfn, thread, .. } => ledger.fault(gfn, now, thread, &mut todo),
                Touch::Removed(run) => ledger.discarded(run, now, &mut todo),
            }
        }
        let complete = ledger.ends();
        drop(ledger);
        if !todo.ask.is_empty() {
            (self.notify)(Notice::Ask(todo.ask));
        }
        if complete {
            (self.notify)(Notice::Complete);
        }
        for unit in todo.place {
            let placed = self.missing.place_zeros(unit).map_err(|e| {
                let cause = std::error::Error::source(&e).map(|cause| format!(": {cause}"));
                format!("{e}{}", cause.unwrap_or_default())
            })?;
            if placed.again {
                again.push(unit);
            }
        }
        read.map_err(|e| format!("reading faults: {e}"))
    }

    /// Places the pages of `run` that are owed; zeros if there are no `bytes`.
    fn install(
        &self,
        run: Run,
        bytes: Option<&[u8]>,
        taken: &mut impl FnMut(u64),
    ) -> Result<(), MemoryError> {
        let bytes_of = |part: Run| {
            let first = usize::try_from(part.start - run.start).unwrap_or(0) * PAGE_BYTES;
            let len = usize::try_from(part.pages).unwrap_or(0) * PAGE_BYTES;
            bytes.map(|bytes| &bytes[first..first + len])
        };
        let mut rest = run;
        while rest.pages > 0 {
            let mut ledger = self.ledger();
            let stretch = ledger.stretch(rest);
            let unit = ledger.unit_of(stretch.start);
            let done = if unit.pages == 1 {
                let put = |part: Run| match bytes_of(part) {
                    Some(bytes) => self.missing.place(part.start, bytes),
                    None => self.missing.place_zeros(part),
                };
                let put = |part| put(part).map(|placed| placed.pages);
                ledger.demand.place(stretch, || self.began.elapsed(), put, &mut *taken)
            } else {
                self.place_part(&mut ledger, unit, stretch, bytes_of, taken)
            };
            let complete = ledger.ends();
            drop(ledger);
            if complete {
                (self.notify)(Notice::Complete);
            }
            let done = done?;
            rest = Run::new(rest.start + done, rest.pages - done);
            if done < stretch.pages {
                // Memory is being given back.
                std::thread::sleep(AGAIN);
            }
        }
        Ok(())
    }

    /// Takes what is owed of `run`, a part of the huge page `unit`, and places that one if it is whole; how many
    /// pages need no other try.
    fn place_part<'a>(
        &self,
        ledger: &mut Ledger,
        unit: Run,
        run: Run,
        bytes_of: impl Fn(Run) -> Option<&'a [u8]>,
        taken: &mut impl FnMut(u64),
    ) -> Result<u64, MemoryError> {
        for part in ledger.parts_in(run) {
            // Where nothing was written, it is zeros.
            if let Some(bytes) = bytes_of(part) {
                self.missing.write_part(part.start, bytes)?;
            }
            ledger.came(part);
            (part.start..part.end()).for_each(&mut *taken);
        }
        if !ledger.is_whole(unit) {
            return Ok(run.pages);
        }
        let put = |_| self.missing.place_zeros(unit).map(|placed| placed.pages / unit.pages);
        let now = || self.began.elapsed();
        let placed = ledger.demand.place(Run::new(unit.start, 1), now, put, |_| {})?;
        Ok(run.pages * placed)
    }
}

/// Lets this thread run before others: somebody waits for what it does, and that is little. Where it is not
/// permitted, it runs as others do.
pub fn hurry() {
    let _ = setpriority_process(Some(gettid()), -10);
}
