//! The threads that place pages: one answers faults, one loads what nobody has asked for.

use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread::{Scope, sleep};
use std::time::{Duration, Instant};

use ferry_bundle::Haste;
use ferry_memory::Userfault;
use ferry_pages::{PAGE_BYTES, Run};
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::io::{Errno, read, write};

use crate::door::Peer;
use crate::ledger::{Ledger, larger};
use crate::memory::Reader;
use crate::{Handover, HandoverError, Memory, ReadError};

/// Bytes that are loaded ahead at a time: a fault waits no longer than for these.
const AHEAD_BYTES: u64 = 64 << 10;
/// How long to leave the kernel to whoever gives memory back.
const AGAIN: Duration = Duration::from_micros(20);
/// A process that ends loses its memory a moment before it counts as ended.
const ENDING: Duration = Duration::from_secs(1);

/// Why a machine cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum Cause {
    /// Its memory is not served.
    #[error(transparent)]
    Handover(HandoverError),
    /// A page that it needs cannot be had.
    #[error("{0}; the machine needs a page of it")]
    Read(ReadError),
    /// The kernel refused.
    #[error("cannot {action} the machine: {source}")]
    Kernel {
        /// What was being done.
        action: &'static str,
        /// The system's word.
        source: io::Error,
    },
    /// A fault where no memory was handed over.
    #[error("it touched {0:#x}, which is watched, but was not handed over")]
    Outside(u64),
    /// The pager was asked to leave at once.
    #[error("the pager was asked twice to stop, {left} pages before the machine could go on alone")]
    Asked {
        /// Pages that were not loaded.
        left: u64,
    },
}

impl Cause {
    fn kernel(action: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Kernel { action, source }
    }
}

/// Why a machine needs no pager any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// Its process has ended.
    Machine,
    /// All its memory is loaded; it goes on alone.
    Whole,
}

/// How a machine was served.
#[derive(Clone, Copy, Debug)]
pub struct Report {
    /// Why it was not served any longer.
    pub ended: Ended,
    /// Bytes in a page of the machine; all counts are of these.
    pub page_bytes: u64,
    /// Touches of missing pages.
    pub faults: u64,
    /// Of these, answered by a page of zeros.
    pub zeros: u64,
    /// Pages loaded before anybody touched them.
    pub ahead: u64,
    /// Pages that the machine gave back before they were loaded.
    pub given_back: u64,
    /// Pages of data that were not loaded.
    pub left: u64,
    /// How long pages of data were waited for.
    pub waits: Waits,
}

/// Waits for pages of data, each from reading the fault to placing the page.
#[derive(Clone, Copy, Debug)]
pub struct Waits {
    /// How many.
    pub count: u64,
    /// Half of them were no longer.
    pub median: Duration,
    /// 99 of a hundred were no longer.
    pub p99: Duration,
    /// The longest.
    pub longest: Duration,
}

/// A machine that is served.
pub(crate) struct Machine<'a> {
    peer: &'a Peer,
    userfault: Userfault,
    handover: Handover,
    memory: &'a Memory,
    ledger: Mutex<Ledger>,
    began: Instant,
    /// Faults are being answered: loading ahead lets the ledger be.
    answering: AtomicBool,
    /// Ends loading ahead.
    ending: AtomicBool,
    /// Rung when loading ahead has ended.
    bell: OwnedFd,
    failed: Mutex<Option<Cause>>,
}

/// A page that could not be placed yet is tried again.
type Wanted = Vec<u64>;

impl<'a> Machine<'a> {
    pub(crate) fn new(
        peer: &'a Peer,
        userfault: Userfault,
        handover: Handover,
        memory: &'a Memory,
    ) -> Result<Self, Cause> {
        let owed = larger(memory.data(), handover.page_bytes());
        let bell = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK);
        Ok(Self {
            peer,
            userfault,
            handover,
            memory,
            ledger: Mutex::new(Ledger::new(owed)),
            began: Instant::now(),
            answering: AtomicBool::new(false),
            ending: AtomicBool::new(false),
            bell: bell.map_err(|e| Cause::kernel("make an eventfd for")(e.into()))?,
            failed: Mutex::new(None),
        })
    }

    /// Serves it until it needs no pager any more.
    pub(crate) fn serve(&self, ahead: bool, stop: BorrowedFd<'_>) -> Result<Report, Cause> {
        let ended = std::thread::scope(|scope| {
            let ended = self.answer(scope, ahead, stop);
            self.ending.store(true, Ordering::Release);
            ended
        });
        let ended = match ended {
            // What is refused of a process that is ending is no failure.
            Err(Cause::Kernel { .. }) if self.peer.ends_within(ENDING) => Ended::Machine,
            ended => ended?,
        };
        let ledger = self.ledger();
        let (counts, nanos) = (ledger.demand.counts(), ledger.demand.wait_nanos());
        Ok(Report {
            ended,
            page_bytes: self.handover.page_bytes(),
            faults: counts.faults,
            zeros: counts.zeros,
            ahead: counts.pushed,
            given_back: counts.discarded,
            left: ledger.demand.missing().len(),
            waits: Waits {
                count: nanos.len(),
                median: Duration::from_nanos(nanos.value_at_quantile(0.5)),
                p99: Duration::from_nanos(nanos.value_at_quantile(0.99)),
                longest: Duration::from_nanos(nanos.max()),
            },
        })
    }

    fn ledger(&self) -> MutexGuard<'_, Ledger> {
        self.ledger.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn answer<'scope>(
        &'scope self,
        scope: &'scope Scope<'scope, '_>,
        ahead: bool,
        stop: BorrowedFd<'_>,
    ) -> Result<Ended, Cause> {
        let mut reader = self.memory.reader(Haste::Waited);
        let mut wanted = Wanted::new();
        let mut asked = 0;
        let mut loading = ahead;
        if ahead {
            self.load_ahead(scope)?;
        }
        loop {
            if wanted.is_empty() && self.ledger().demand.is_complete() {
                self.let_go()?;
                return Ok(Ended::Whole);
            }
            let userfault = self.userfault.fd();
            let mut fds = [
                PollFd::new(&userfault, PollFlags::IN),
                PollFd::from_borrowed_fd(self.peer.fd(), PollFlags::IN),
                PollFd::from_borrowed_fd(stop, PollFlags::IN),
                PollFd::new(&self.bell, PollFlags::IN),
            ];
            // Pages that could not be placed are tried again, once the kernel had a moment.
            let now = Timespec { tv_sec: 0, tv_nsec: 0 };
            match poll(&mut fds, (!wanted.is_empty()).then_some(&now)) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(e) => return Err(Cause::kernel("wait for")(e.into())),
            }
            let [touched, ended, stop_rung, bell_rung] = fds.map(|fd| !fd.revents().is_empty());
            if ended {
                return Ok(Ended::Machine);
            }
            if bell_rung {
                taken(&self.bell);
                self.loaded_ahead()?;
            }
            if stop_rung {
                asked += taken(stop);
                let left = self.ledger().demand.missing().len();
                if asked > 1 {
                    return Err(Cause::Asked { left });
                }
                tracing::warn!(
                    "asked to stop: the machine would hang without its last {left} pages; leaving when they are loaded (asked again, the machine is ended)"
                );
                if !loading {
                    loading = true;
                    self.load_ahead(scope)?;
                }
            }
            self.answering.store(true, Ordering::Relaxed);
            if touched {
                self.take_in(&mut wanted)?;
            }
            self.fetch(&mut reader, &mut wanted)?;
            self.answering.store(false, Ordering::Relaxed);
        }
    }

    /// Reads what happened. Pages to be read are appended to `wanted`.
    fn take_in(&self, wanted: &mut Wanted) -> Result<(), Cause> {
        let mut ledger = self.ledger();
        // Under the lock: whoever gives pages back goes on once that was read, and no copy of them may be
        // placed after it.
        let touches = self.userfault.read().map_err(Cause::kernel("read faults of"))?;
        let now = self.began.elapsed();
        let todo = ledger.take_in(&touches, &self.handover, now).map_err(Cause::Outside)?;
        drop(ledger);
        wanted.extend(todo.wanted);
        let page_bytes = self.handover.page_bytes();
        for (address, _) in todo.zeros.iter().filter_map(|page| self.handover.address_of(*page)) {
            let bytes = usize::try_from(page_bytes).unwrap_or(PAGE_BYTES);
            let placed = self.userfault.place_zeros(address, bytes, bytes);
            if placed.map_err(Cause::kernel("place a page of zeros in"))? == 0 {
                // Memory is being given back: who waits touches it again, later.
                let woken = self.userfault.wake(address, bytes);
                woken.map_err(Cause::kernel("wake"))?;
            }
        }
        Ok(())
    }

    /// Reads and places the pages that are wanted; those that could not be placed stay.
    fn fetch(&self, reader: &mut Reader<'_>, wanted: &mut Wanted) -> Result<(), Cause> {
        let mut bytes = Vec::new();
        let mut again = Wanted::new();
        for page in wanted.drain(..) {
            // It may have come, or have been given back, meanwhile.
            if !self.ledger().demand.missing().contains(page) {
                continue;
            }
            let run = Run::new(page, 1);
            self.load(reader, run, &mut bytes).map_err(Cause::Read)?;
            if self.place(run, &bytes)? == 0 {
                again.push(page);
            }
        }
        if !again.is_empty() {
            sleep(AGAIN);
        }
        *wanted = again;
        Ok(())
    }

    fn load(&self, reader: &mut Reader<'_>, run: Run, into: &mut Vec<u8>) -> Result<(), ReadError> {
        let page_bytes = self.handover.page_bytes();
        into.resize(usize::try_from(run.pages * page_bytes).unwrap_or(0), 0);
        reader.read(run.start * (page_bytes / PAGE_BYTES as u64), into)
    }

    /// Places what is owed of the pages of `run`, whose content is `bytes`; how many need no other try.
    fn place(&self, run: Run, bytes: &[u8]) -> Result<u64, Cause> {
        let page_bytes = usize::try_from(self.handover.page_bytes()).unwrap_or(PAGE_BYTES);
        let bytes_to = |page: u64| usize::try_from(page - run.start).unwrap_or(0) * page_bytes;
        let put = |part: Run| {
            let mut at = part.start;
            while at < part.end() {
                let Some((address, pages)) = self.handover.address_of(at) else { break };
                let end = part.end().min(at.saturating_add(pages));
                let bytes = &bytes[bytes_to(at)..bytes_to(end)];
                let there = (self.userfault.place(address, bytes, page_bytes)? / page_bytes) as u64;
                at += there;
                if at < end {
                    break;
                }
            }
            Ok(at - part.start)
        };
        let mut ledger = self.ledger();
        ledger
            .demand
            .place(run, || self.began.elapsed(), put, |_| {})
            .map_err(Cause::kernel("place a page in the memory of"))
    }

    /// Loads all pages that nobody has asked for, in a thread of its own.
    fn load_ahead<'scope>(&'scope self, scope: &'scope Scope<'scope, '_>) -> Result<(), Cause> {
        let thread = std::thread::Builder::new().name("ferry-ahead".into());
        let spawned = thread.spawn_scoped(scope, || {
            if let Err(cause) = self.load_all() {
                *self.failed.lock().unwrap_or_else(PoisonError::into_inner) = Some(cause);
            }
            ring(&self.bell);
        });
        spawned.map(drop).map_err(Cause::kernel("start a thread for"))
    }

    fn load_all(&self) -> Result<(), Cause> {
        let mut reader = self.memory.reader(Haste::Ahead);
        let mut bytes = Vec::new();
        let most = (AHEAD_BYTES / self.handover.page_bytes()).max(1);
        loop {
            let runs = self.ledger().queue.next(most);
            if runs.is_empty() {
                return Ok(());
            }
            for run in runs {
                while let Err(e) = self.load(&mut reader, run, &mut bytes) {
                    // A host that is away may come back; nobody waits for these pages.
                    if !e.is_away() {
                        return Err(Cause::Read(e));
                    }
                    if self.ending.load(Ordering::Acquire) {
                        return Ok(());
                    }
                }
                let mut at = 0;
                while at < run.pages {
                    if self.answering.load(Ordering::Relaxed) {
                        // A lock goes to who is awake, which would be this thread again and again.
                        sleep(AGAIN);
                    }
                    if self.ending.load(Ordering::Acquire) {
                        return Ok(());
                    }
                    let rest = Run::new(run.start + at, run.pages - at);
                    let from = usize::try_from(at * self.handover.page_bytes()).unwrap_or(0);
                    at += self.place(rest, &bytes[from..])?;
                    if at < run.pages {
                        sleep(AGAIN);
                    }
                }
            }
        }
    }

    /// The thread that loads ahead is through, or failed.
    fn loaded_ahead(&self) -> Result<(), Cause> {
        match self.failed.lock().unwrap_or_else(PoisonError::into_inner).take() {
            None => Ok(()),
            // The machine may never want the page.
            Some(Cause::Read(e)) => {
                let left = self.ledger().demand.missing().len();
                tracing::warn!(
                    "{e}; {left} pages are loaded only when the machine needs them, and one that cannot be had then ends it"
                );
                Ok(())
            }
            Some(cause) => Err(cause),
        }
    }

    /// Ends watching. Every page of data is there.
    fn let_go(&self) -> Result<(), Cause> {
        for region in self.handover.regions() {
            let bytes = region.run.pages * self.handover.page_bytes();
            let bytes = usize::try_from(bytes).unwrap_or(usize::MAX);
            let gone = self.userfault.let_go(region.host, bytes);
            gone.map_err(Cause::kernel("end watching the memory of"))?;
            // Ending wakes who waits before it ends: where the kernel takes faults under the lock of a single
            // mapping, a thread may begin to wait in between, and would wait for ever.
            let woken = self.userfault.wake(region.host, bytes);
            woken.map_err(Cause::kernel("wake"))?;
        }
        // Who began to give memory back before that waits until it is read. Firecracker holds the
        // descriptor, too: that we close ours frees nobody.
        while self.userfault.is_removing() {
            self.userfault.read().map_err(Cause::kernel("read faults of"))?;
            sleep(AGAIN);
        }
        Ok(())
    }
}

/// What was written to an eventfd that is ready.
fn taken(eventfd: impl std::os::fd::AsFd) -> u64 {
    let mut count = [0; 8];
    match read(eventfd, &mut count) {
        Ok(_) => u64::from_ne_bytes(count),
        Err(_) => 0,
    }
}

fn ring(bell: &OwnedFd) {
    // An eventfd takes eight bytes, and its counter is far from full.
    let _ = write(bell, &1u64.to_ne_bytes());
}
