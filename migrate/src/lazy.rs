//! Starting a machine from a bundle before its memory is read.
//!
//! ```text
//!  a vCPU touches a page ──▶ Pager ──▶ ferry-demand ──┐  reads the frame that has the page,
//!                                                     ├─ installs the page, then all others
//!  record, around faults, sweep ─────▶ ferry-fill ────┘  of the frame
//!  (PushQueue)
//! ```
//!
//! It is post-copy with a file as the peer. What is read is a frame: its pages come together, so that each
//! frame is decoded about once, whoever asks first. Between two frames `ferry-fill` stands back until
//! nobody waits for a page.
//!
//! **Damage.** What a frame holds is verified before any of it is installed. Of one that is damaged, or
//! cannot be read, no page is ever installed: whoever touches one waits, and all else goes on. So nothing is
//! computed from memory that never was; the host is told which file it is and where, and the machine can
//! only be stopped, since it can be neither saved nor moved without those pages. If it is found while state
//! is being loaded, there is no machine. A bundle of another host that is away for a while is no damage: it
//! is asked again until it is back.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::{Duration, Instant};

use ferry_bundle::{Chain, Pages};
use ferry_pager::{Notice, Pager};
use ferry_pages::PageSet;
use ferry_postcopy::PushQueue;

use crate::fetching::{Bringer, Fetching};
use crate::report::{Paging, paging};
use crate::restore::{self, RestoreError, Restored};
use crate::{Guest, Host, fetch, words};

/// What the host of a machine that was restored lazily is told.
#[derive(Clone, Debug, PartialEq)]
pub enum LazyEvent {
    /// Every page is here. The machine is like any other.
    Complete(Paging),
    /// Some pages never come, and who touches one of them waits for ever: why. Said once;
    /// [`Fetching::trouble`] says it as long as the machine is there.
    Damaged(String),
}

/// Makes the machine of `bundle` on `host`, under the name `name`, with its memory still in the files: it can
/// run at once. `tell` is called by threads that bring pages; it must not wait.
///
/// # Errors
/// As [`restore()`](crate::restore()); or this process has no access to userfaultfd.
pub fn restore_lazily<H: Host>(
    host: &H,
    bundle: Arc<Chain>,
    name: &str,
    tell: impl Fn(LazyEvent) + Send + Sync + 'static,
) -> Result<(Restored<H::Guest>, Fetching), RestoreError> {
    let began = Instant::now();
    let (mut guest, state) = restore::prepare(host, &bundle, name)?;
    let owed = bundle.data_pages();
    let pages = owed.len();
    let desk = Arc::new(Desk::new(owed.clone(), &bundle));
    let notify = {
        let desk = desk.clone();
        move |notice| desk.notice(notice)
    };
    let (pager, faults) =
        Pager::start(&guest.memory(), owed, notify).map_err(RestoreError::NotLazy)?;
    let pager = RwLock::new(Some(pager));
    let lazy = Arc::new(Lazy { bundle, desk, pager, tell: Box::new(tell), began });
    let reading = lazy.spawn("ferry-pager", |_| faults.serve());
    let started = reading.and_then(|()| lazy.spawn("ferry-demand", Lazy::serve)).and_then(|()| {
        let loaded = guest.load(&state);
        lazy.desk.loaded().map_or(Ok(()), |why| Err(RestoreError::Lost(why)))?;
        loaded?;
        lazy.spawn("ferry-fill", Lazy::fill)
    });
    // Nobody may wait for a page of a machine that is not.
    started.inspect_err(|_| lazy.abandon())?;
    Ok((Restored { guest, permit: restore::permit(), pages }, Fetching::new(lazy)))
}

/// Memory that is brought while the machine runs.
struct Lazy {
    bundle: Arc<Chain>,
    desk: Arc<Desk>,
    /// None when all is here, or nothing is to come.
    pager: RwLock<Option<Pager>>,
    tell: Box<dyn Fn(LazyEvent) + Send + Sync>,
    began: Instant,
}

/// What is to be brought.
struct Desk {
    inner: Mutex<Inner>,
    changed: Condvar,
}

struct Inner {
    queue: PushQueue,
    /// Pages that somebody waits for.
    asks: VecDeque<u64>,
    /// One of them is being brought.
    serving: bool,
    /// The machine's state is being loaded: it must not wait for ever.
    loading: bool,
    /// Nothing is to be brought any more.
    over: bool,
    trouble: Option<String>,
    /// Faults are not read any more; why.
    broken: Option<String>,
}

impl Desk {
    fn new(owed: PageSet, bundle: &Chain) -> Self {
        let over = owed.is_empty();
        let inner = Inner {
            queue: PushQueue::new(owed, bundle.record().to_vec()),
            asks: VecDeque::new(),
            serving: false,
            loading: true,
            over,
            trouble: None,
            broken: None,
        };
        Self { inner: Mutex::new(inner), changed: Condvar::new() }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn notice(&self, notice: Notice) {
        let mut inner = self.lock();
        match notice {
            Notice::Ask(gfns) => inner.asks.extend(gfns),
            Notice::Complete => inner.over = true,
            Notice::Broken(why) => inner.broken = Some(why),
        }
        self.changed.notify_all();
    }

    /// The next page that somebody waits for; none at the end.
    ///
    /// # Errors
    /// There is no telling any more; why.
    fn next_ask(&self) -> Result<Option<u64>, String> {
        let mut inner = self.lock();
        inner.serving = false;
        loop {
            if inner.over {
                return Ok(None);
            }
            if let Some(why) = inner.broken.take() {
                return Err(format!("faults cannot be served any more: {why}"));
            }
            if let Some(gfn) = inner.asks.pop_front() {
                inner.serving = true;
                inner.queue.fault(gfn);
                return Ok(Some(gfn));
            }
            self.changed.notify_all();
            inner = self.changed.wait(inner).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// The next page to bring unasked, when nobody waits for another; none when there is none left.
    fn next_push(&self) -> Option<u64> {
        let mut inner = self.lock();
        while !inner.over && (inner.serving || !inner.asks.is_empty()) {
            inner = self.changed.wait(inner).unwrap_or_else(PoisonError::into_inner);
        }
        if inner.over { None } else { inner.queue.next(1).first().map(|run| run.start) }
    }

    /// Whether what cannot be had now may come later.
    fn may_wait(&self) -> bool {
        let inner = self.lock();
        !inner.loading && !inner.over
    }

    fn end(&self) {
        self.lock().over = true;
        self.changed.notify_all();
    }

    /// State is loaded; why it is not what it was, if a page of it could not be had.
    fn loaded(&self) -> Option<String> {
        let mut inner = self.lock();
        inner.loading = false;
        inner.trouble.clone()
    }
}

impl Lazy {
    fn spawn(
        self: &Arc<Self>,
        name: &str,
        run: impl FnOnce(&Self) + Send + 'static,
    ) -> Result<(), RestoreError> {
        let lazy = self.clone();
        let thread = std::thread::Builder::new().name(name.into());
        thread.spawn(move || run(&lazy)).map(drop).map_err(RestoreError::Thread)
    }

    /// Brings what is waited for, until all is here.
    fn serve(&self) {
        let mut pages = Pages::waited_for(self.bundle.clone());
        loop {
            match self.desk.next_ask() {
                Ok(Some(gfn)) => self.bring(&mut pages, gfn),
                Ok(None) => break,
                Err(why) => self.cannot(why),
            }
        }
        if let Some(pager) = self.take_pager() {
            let took = self.began.elapsed();
            let vcpus = self.bundle.spec().vcpus;
            // Who restores it starts it, and at once.
            let fetched = fetch::measured(&pager.waits(), took, vcpus, Duration::ZERO);
            let measured = paging(&fetched);
            drop(pager);
            (self.tell)(LazyEvent::Complete(measured));
        }
    }

    /// Brings all else.
    fn fill(&self) {
        let mut pages = Pages::new(self.bundle.clone());
        while let Some(gfn) = self.desk.next_push() {
            self.bring(&mut pages, gfn);
        }
    }

    /// Brings the page at frame `gfn`, and then those that lie with it.
    fn bring(&self, pages: &mut Pages<Arc<Chain>>, gfn: u64) {
        {
            let mut inner = self.desk.lock();
            for run in self.bundle.frame_of(gfn) {
                inner.queue.remove(run);
            }
        }
        loop {
            let brought = pages.frame(gfn, |first, bytes| -> Result<(), RestoreError> {
                match &*self.pager.read().unwrap_or_else(PoisonError::into_inner) {
                    Some(pager) => Ok(pager.install(first, bytes, |_| {})?),
                    None => Ok(()),
                }
            });
            match brought {
                // Whoever touches a page waits until it comes, be it long: the host may come back.
                Err(RestoreError::Bundle(e)) if e.is_away() && self.desk.may_wait() => {}
                Err(why) => return self.cannot(words(&why)),
                Ok(()) => return,
            }
        }
    }

    fn cannot(&self, why: String) {
        let mut inner = self.desk.lock();
        let (first, loading) = (inner.trouble.is_none(), inner.loading);
        inner.trouble.get_or_insert_with(|| why.clone());
        drop(inner);
        if loading {
            // Whoever loads goes on, with pages of zeros, and finds the trouble.
            self.abandon();
        } else if first {
            (self.tell)(LazyEvent::Damaged(why));
        }
    }

    fn take_pager(&self) -> Option<Pager> {
        self.pager.write().unwrap_or_else(PoisonError::into_inner).take()
    }
}

impl Bringer for Lazy {
    fn missing(&self) -> PageSet {
        let pager = self.pager.read().unwrap_or_else(PoisonError::into_inner);
        pager.as_ref().map(Pager::missing).unwrap_or_default()
    }

    fn abandon(&self) {
        drop(self.take_pager());
        self.desk.end();
    }

    fn trouble(&self) -> Option<String> {
        self.desk.lock().trouble.clone()
    }
}
