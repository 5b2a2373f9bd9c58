//! Reads the pages that last, and keeps the census of them.
//!
//! A pass costs what changed: pages that were written go out of the census, and come in again when they were
//! not written for [`Scanner::new`]'s number of passes. What is written all the time is never read.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use ferry_dirtylog::pagemap::{Categories, Pagemap, Scan};
use ferry_memory::GuestView;
use ferry_pages::{Layout, PAGE_BYTES, PageSet, Run};
use xxhash_rust::xxh3::xxh3_64;

use crate::{Between, Census, Content, MachineNo, ScanError, Tenant};

/// Pages that are hashed before the census is told: so many looks into its table wait for memory together. Each
/// page is copied out by itself, since 4 KiB stay in the nearest cache until they are hashed.
const BLOCK_PAGES: usize = 64;
/// Of so many pages with a known hash one is compared with a page of that hash, byte by byte. By chance two of
/// 2,000,000 different pages have one hash in a ten millionth of all cases. Who makes such pages on purpose, which
/// is easy, gains nothing, since the kernel compares before it merges; and once some were found, all are compared
/// as long as those are held. To compare all in any case would cost half of the time that hashing takes.
const COMPARE_ONE_IN: u64 = 8;

/// Pages that are in memory, as opposed to swapped out; not the page of zeros that the kernel shows.
const IN_MEMORY: Scan = Scan {
    all: Categories::PRESENT,
    none: Categories::ZERO_PAGE,
    any: Categories::NONE,
    tell: Categories::NONE,
    write_protect: false,
};

/// Pages that show the kernel's page of zeros.
const SHOWN_AS_ZERO: Scan = Scan {
    all: Categories::PRESENT.or(Categories::ZERO_PAGE),
    none: Categories::NONE,
    ..IN_MEMORY
};

/// What of a machine is in memory.
struct Present {
    /// Pages with data of their own.
    pages: PageSet,
    /// Pages of zeros that the kernel merged with its own. Were they forgotten, their range would not seem to be
    /// worth its advice, and without it they would be in memory again.
    zeros: PageSet,
}

/// The hash of a page.
pub fn page_hash(page: &[u8]) -> u64 {
    xxh3_64(page)
}

/// A page, copied out. Where it begins matters: if the copy lies 16 bytes further in its page than the original
/// in its own, a load looks as if it depended on the store before it, and copying takes three times as long.
#[repr(align(4096))]
struct Copied([u8; PAGE_BYTES]);

impl Copied {
    fn new() -> Box<Self> {
        Box::new(Self([0; PAGE_BYTES]))
    }
}

/// What one pass over one machine did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Pass {
    /// Pages read and hashed.
    pub scanned_pages: u64,
    /// Of these: compared with another page, byte by byte, since their hashes are equal.
    pub compared_pages: u64,
    /// Pages that are left alone: written in one of the last passes.
    pub unstable_pages: u64,
    /// How long it took.
    pub took: Duration,
}

impl Pass {
    /// Bytes read a second; 0 if nothing was.
    pub fn bytes_per_second(&self) -> f64 {
        let bytes = (self.scanned_pages * PAGE_BYTES as u64) as f64;
        if self.took.is_zero() { 0.0 } else { bytes / self.took.as_secs_f64() }
    }
}

/// A machine that is looked at.
#[derive(Debug)]
struct Watched {
    view: GuestView,
    /// Pages that were written in a pass, the latest last, and not since.
    quiet: VecDeque<PageSet>,
    /// Pages that the census holds.
    held: PageSet,
}

/// The machines of this process and the census of their pages.
#[derive(Debug)]
pub struct Scanner {
    census: Census,
    watched: Vec<Option<Watched>>,
    quiet_passes: usize,
    pagemap: Pagemap,
}

impl Scanner {
    /// A scanner that holds pages that were not written for `quiet_passes` passes (at least one).
    ///
    /// # Errors
    /// The kernel does not tell what is in memory.
    pub fn new(between: Between, quiet_passes: usize) -> Result<Self, ScanError> {
        let pagemap = Pagemap::open().map_err(ScanError::Pagemap)?;
        let quiet_passes = quiet_passes.max(1);
        Ok(Self { census: Census::new(between), watched: Vec::new(), quiet_passes, pagemap })
    }

    /// Adds a machine, of which nothing is read yet.
    ///
    /// # Errors
    /// More guest memory than can be counted.
    pub fn add(&mut self, view: GuestView, tenant: Tenant) -> Result<MachineNo, ScanError> {
        let extents = view.regions().iter().map(|r| r.run).collect();
        let no = self.census.add(&Layout::new(extents)?, tenant)?;
        let slot = no.0 as usize;
        if self.watched.len() <= slot {
            self.watched.resize_with(slot + 1, || None);
        }
        let quiet = VecDeque::new();
        self.watched[slot] = Some(Watched { view, quiet, held: PageSet::new() });
        Ok(no)
    }

    /// Takes a machine out.
    pub fn remove(&mut self, machine: MachineNo) {
        self.census.remove(machine);
        if let Some(watched) = self.watched.get_mut(machine.0 as usize) {
            *watched = None;
        }
    }

    /// The census.
    pub fn census(&self) -> &Census {
        &self.census
    }

    /// The census, to propose from it and to tell it of other processes.
    pub fn census_mut(&mut self) -> &mut Census {
        &mut self.census
    }

    /// The pages of `machine` that were not written for some passes: what may be swapped out, as far as writes
    /// go. Whether they are read nobody knows.
    pub fn unwritten(&self, machine: MachineNo) -> PageSet {
        let watched = self.watched.get(machine.0 as usize).and_then(Option::as_ref);
        watched.map(|w| w.held.clone()).unwrap_or_default()
    }

    /// One pass over `machine`, of which `written` was written since the last one: all that its trackers
    /// collected, and re-armed before this call. Pages that came or went since are found without.
    ///
    /// No page is brought into memory, with one exception that does no harm: one that is given back at the very
    /// moment when it is read. Not while pages are missing that only this thread could bring.
    ///
    /// # Errors
    /// The kernel does not tell what is in memory.
    pub fn pass(&mut self, machine: MachineNo, written: &PageSet) -> Result<Pass, ScanError> {
        let began = Instant::now();
        let slot = machine.0 as usize;
        let Some(mut watched) = self.watched.get_mut(slot).and_then(Option::take) else {
            return Ok(Pass::default());
        };
        let due = match self.present(machine, &watched.view) {
            Ok(present) => self.due(machine, &mut watched, written, &present),
            Err(e) => {
                self.watched[slot] = Some(watched);
                return Err(e);
            }
        };
        let unstable_pages = watched.quiet.iter().map(PageSet::len).sum();
        watched.held.union_with(&due);
        // In its place again before pages are compared with each other.
        self.watched[slot] = Some(watched);
        self.census.reserve(due.len());
        let compared_pages = self.read(machine, &due)?;
        let scanned_pages = due.len();
        Ok(Pass { scanned_pages, compared_pages, unstable_pages, took: began.elapsed() })
    }

    fn present(&mut self, machine: MachineNo, view: &GuestView) -> Result<Present, ScanError> {
        let pages = found(&mut self.pagemap, view, IN_MEMORY)?;
        let mut zeros = self.census.advised_pages(machine);
        if !zeros.is_empty() {
            zeros.intersect_with(&found(&mut self.pagemap, view, SHOWN_AS_ZERO)?);
        }
        Ok(Present { pages, zeros })
    }

    /// Sorts out what was written, came and went; the pages that are quiet now.
    fn due(
        &mut self,
        machine: MachineNo,
        watched: &mut Watched,
        written: &PageSet,
        present: &Present,
    ) -> PageSet {
        let mut known = watched.held.clone();
        for pages in &watched.quiet {
            known.union_with(pages);
        }
        let mut restless = present.pages.clone();
        restless.subtract(&known);
        let mut rewritten = written.clone();
        rewritten.intersect_with(&present.pages);
        restless.union_with(&rewritten);
        // Zero as long as they are shown so: they need not be read.
        let mut zeros = watched.held.clone();
        zeros.subtract(written);
        zeros.intersect_with(&present.zeros);
        let mut new_zeros = present.zeros.clone();
        new_zeros.subtract(&zeros);
        let mut gone = known;
        gone.subtract(&present.pages);
        gone.subtract(&zeros);
        gone.union_with(&restless);
        for pages in &mut watched.quiet {
            pages.subtract(&gone);
        }
        gone.intersect_with(&watched.held);
        self.census.drop_pages(machine, &gone);
        watched.held.subtract(&gone);
        for gfn in new_zeros.runs().flat_map(|run| run.start..run.end()) {
            self.census.hold(machine, gfn, Content::Zero, |_, _| false);
        }
        watched.held.union_with(&new_zeros);
        watched.quiet.push_back(restless);
        if watched.quiet.len() > self.quiet_passes {
            watched.quiet.pop_front().unwrap_or_default()
        } else {
            PageSet::new()
        }
    }

    /// Reads `pages` and holds them; how many were compared.
    fn read(&mut self, machine: MachineNo, pages: &PageSet) -> Result<u64, ScanError> {
        let Self { census, watched, .. } = self;
        let view_of = |no: MachineNo| watched.get(no.0 as usize)?.as_ref().map(|w| &w.view);
        let Some(view) = view_of(machine) else { return Ok(0) };
        let zero_hash = page_hash(&[0; PAGE_BYTES]);
        let (mut page, mut other) = (Copied::new(), Copied::new());
        let mut contents = Vec::with_capacity(BLOCK_PAGES);
        let mut compared = 0;
        for block in pages.runs().flat_map(blocks) {
            for gfn in block.start..block.end() {
                view.read(gfn, &mut page.0)?;
                contents.push(match page_hash(&page.0) {
                    hash if hash == zero_hash && page.0.iter().all(|b| *b == 0) => Content::Zero,
                    hash => Content::Hash(hash),
                });
            }
            census.look_ahead(&contents);
            let compare_all = census.counts().odd > 0;
            for (gfn, content) in (block.start..).zip(contents.drain(..)) {
                census.hold(machine, gfn, content, |no, at| {
                    if !compare_all && !gfn.is_multiple_of(COMPARE_ONE_IN) {
                        return true;
                    }
                    compared += 1;
                    let other_read = view_of(no).is_some_and(|v| v.read(at, &mut other.0).is_ok());
                    if !other_read || view.read(gfn, &mut page.0).is_err() {
                        return false;
                    }
                    // One that was written since it was hashed goes out in the next pass, and says nothing of
                    // the other.
                    let was = |page: &[u8]| Content::Hash(page_hash(page)) == content;
                    page.0 == other.0 || !was(&page.0) || !was(&other.0)
                });
            }
        }
        Ok(compared)
    }
}

/// A run in parts of at most a block.
fn blocks(run: Run) -> impl Iterator<Item = Run> {
    let starts = (run.start..run.end()).step_by(BLOCK_PAGES);
    starts.map(move |start| Run::new(start, (run.end() - start).min(BLOCK_PAGES as u64)))
}

/// The pages of `view` that `scan` finds.
fn found(pagemap: &mut Pagemap, view: &GuestView, scan: Scan) -> Result<PageSet, ScanError> {
    let mut pages = PageSet::new();
    for region in view.regions() {
        let found = |first: u64, count: u64| {
            pages.insert_run(Run::new(region.run.start + first, count));
        };
        pagemap.scan(region.host, region.run.pages, scan, found).map_err(ScanError::Pagemap)?;
    }
    Ok(pages)
}
