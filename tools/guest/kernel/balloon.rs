//! The balloon's driver: what the host wants back is given to it, the last pages of each vCPU's part first.
//!
//! ```text
//! vCPU 0, every 50 ms:  how many pages shall be in the balloon?        (one register)
//!   blow up   lower a vCPU's limit ──▶ it says that it goes by it ──▶ hand its pages over, then tell
//!   let off   ask for pages back ──▶ the device has them out ──▶ raise the limit
//! ```
//!
//! vCPU 0 does one small step at a time and visits pages in between; it never waits for the device. A limit
//! is changed only when its vCPU goes by the last one: else an old limit could be taken for a new one that
//! is the same number. Everything here is guest memory, and moves with the machine.

use core::sync::atomic::{AtomicU64, Ordering};

use crate::memory::Memory;
use crate::record;
use crate::virtio::{Device, Page, Queue};
use crate::workload::{
    ANYTHING, Arena, NEVER_WRITTEN, PAGE_BYTES, Params, Part, Worker, expect, expected,
};

const BALLOON: u32 = 5;
/// Tags of figures (virtio 1.2, section 5.5.6.4).
const FREE: u16 = 4;
const TOTAL: u16 = 5;
const AVAILABLE: u16 = 6;
const MUST_TELL_HOST: u64 = 1;
const STATISTICS: u64 = 1 << 1;
/// Words of the configuration: pages wanted, pages that are in the balloon.
const WANTED: u64 = 0;
const ACTUAL: u64 = 1;
/// Page numbers in one buffer.
const BATCH: u64 = 1024;
/// Pages that a vCPU stops using before it looks for other things to do.
const STEP_PAGES: u64 = 1 << 16;
const LOOK_MS: u64 = 50;
/// While vCPUs or the device take their time.
const WAIT_MS: u64 = 1;

static QUEUES: [Page; 3] = [const { Page::new() }; 3];
static NUMBERS: Page = Page::new();
static FIGURES: Page = Page::new();
static LIMITS: [Limit; Params::MAX_CPUS as usize] = [const { Limit::new() }; 32];

/// How many pages of its part a vCPU may use, and how many it uses.
#[repr(align(64))]
struct Limit {
    allowed: AtomicU64,
    used: AtomicU64,
}

impl Limit {
    const fn new() -> Self {
        Self { allowed: AtomicU64::new(0), used: AtomicU64::new(0) }
    }
}

/// Lets every vCPU use all of its part. Before any of them works.
pub(crate) fn set_up(params: &Params, memory: &Memory) {
    for (cpu, limit) in (0..params.cpus).zip(&LIMITS) {
        let pages = Part::of(cpu, params.cpus, memory.pages()).pages;
        limit.allowed.store(pages, Ordering::Release);
        limit.used.store(pages, Ordering::Release);
    }
}

/// Has `worker` keep to its limit; false while it does not yet.
#[inline]
pub(crate) fn keep_to_limit(cpu: u32, worker: &mut Worker, memory: &Memory) -> bool {
    let limit = &LIMITS[cpu as usize];
    let allowed = limit.allowed.load(Ordering::Acquire);
    if allowed == worker.pages_in_use() {
        return true;
    }
    if let Some(given) = worker.fit(allowed, STEP_PAGES) {
        expect(memory, given, ANYTHING);
    }
    limit.used.store(worker.pages_in_use(), Ordering::Release);
    false
}

/// A request that the device has not answered yet.
#[derive(Clone, Copy)]
struct Request {
    owner: usize,
    pages: u64,
    blow_up: bool,
}

/// When there is something to do next.
#[derive(PartialEq)]
enum Next {
    Now,
    /// Once a vCPU or the device has done its part.
    Soon,
    /// When the host wants something else.
    Later,
}

/// The driver, on vCPU 0. Memory has *owners*: the vCPUs, and behind them nobody, who owns what is not arena.
pub(crate) struct Balloon {
    device: Device,
    inflate: Queue,
    deflate: Queue,
    statistics: Option<Queue>,
    memory: Memory,
    cpus: u32,
    ticks_per_ms: u64,
    /// Pages of each owner that are in the balloon, its last ones.
    given: [u64; Params::MAX_CPUS as usize + 1],
    wanted: u64,
    told: u64,
    request: Option<Request>,
    looked: u64,
    stepped: u64,
    pause: u64,
}

impl Balloon {
    /// Takes the device into use, if the machine has one.
    pub(crate) fn find(params: &Params, memory: &Memory, tsc_khz: u64) -> Option<Self> {
        if memory.has(crate::virtio::ADDRESS) {
            return None;
        }
        let device = Device::probe(BALLOON, MUST_TELL_HOST | STATISTICS)?;
        let inflate = device.queue(0, &QUEUES[0])?;
        let deflate = device.queue(1, &QUEUES[1])?;
        let statistics =
            if device.has(STATISTICS) { Some(device.queue(2, &QUEUES[2])?) } else { None };
        device.begin();
        let mut balloon = Self {
            device,
            inflate,
            deflate,
            statistics,
            memory: *memory,
            cpus: params.cpus,
            // Of a clock of unknown speed, only the pauses depend on it.
            ticks_per_ms: if tsc_khz > 0 { tsc_khz } else { 1_000_000 },
            given: [0; Params::MAX_CPUS as usize + 1],
            wanted: 0,
            told: 0,
            request: None,
            looked: 0,
            stepped: 0,
            pause: 0,
        };
        // The device keeps the first figures until it wants others.
        balloon.send_statistics();
        Some(balloon)
    }

    /// Does what is due at `now`, in no more than a few accesses to the device; whether there is more to do
    /// at once.
    #[inline]
    pub(crate) fn step(&mut self, now: u64) -> bool {
        // Wrapping: a clock that was set back makes it due.
        if now.wrapping_sub(self.stepped) < self.pause {
            return false;
        }
        self.stepped = now;
        self.act(now)
    }

    #[inline(never)]
    fn act(&mut self, now: u64) -> bool {
        if now.wrapping_sub(self.looked) >= LOOK_MS * self.ticks_per_ms {
            self.looked = now;
            self.wanted = self.device.config(WANTED).into();
            if self.statistics.as_ref().is_some_and(Queue::done) {
                self.send_statistics();
            }
        }
        let next = self.advance();
        let given = self.given.iter().sum();
        if next == Next::Later && given != self.told {
            self.told = given;
            self.device.set_config(ACTUAL, u32::try_from(given).unwrap_or(u32::MAX));
        }
        record::ballooned(given);
        self.pause = self.ticks_per_ms
            * match next {
                Next::Now => 0,
                Next::Soon => WAIT_MS,
                Next::Later => LOOK_MS,
            };
        next == Next::Now
    }

    fn advance(&mut self) -> Next {
        if let Some(Request { owner, pages, blow_up }) = self.request {
            let queue = if blow_up { &self.inflate } else { &self.deflate };
            if !queue.done() {
                return Next::Soon;
            }
            self.request = None;
            let given = &mut self.given[owner];
            *given = if blow_up { *given + pages } else { *given - pages };
        }
        let mut next = Next::Later;
        for owner in 0..=self.cpus {
            match self.serve(owner) {
                Next::Now => return Next::Now,
                Next::Soon => next = Next::Soon,
                Next::Later => {}
            }
        }
        next
    }

    /// One step towards what is wanted of one owner.
    fn serve(&mut self, owner: u32) -> Next {
        let slot = owner as usize;
        let (pages, given, wanted) =
            (self.pages_of(owner), self.given[slot], self.wanted_of(owner));
        // What leaves the balloon is used when all of it has left: one change of the limit, not many.
        if owner < self.cpus && given <= wanted {
            let limit = &LIMITS[slot];
            let (allowed, may) = (limit.allowed.load(Ordering::Relaxed), pages - wanted);
            if allowed != may && limit.used.load(Ordering::Acquire) == allowed {
                limit.allowed.store(may, Ordering::Release);
            }
            if limit.used.load(Ordering::Acquire) != may
                || limit.allowed.load(Ordering::Relaxed) != may
            {
                return Next::Soon;
            }
        }
        if given == wanted {
            return Next::Later;
        }
        let blow_up = given < wanted;
        let count = given.abs_diff(wanted).min(BATCH);
        let first = if blow_up { pages - given - count } else { pages - given };
        for (place, page) in (first..first + count).enumerate() {
            let frame = self.address(owner, page) / PAGE_BYTES;
            // Below 2^32: the machine's memory lies below 64 GiB.
            NUMBERS.put(place, u32::try_from(frame).unwrap_or(u32::MAX));
        }
        let queue = if blow_up { &mut self.inflate } else { &mut self.deflate };
        queue.send(&NUMBERS, count as usize * size_of::<u32>());
        self.request = Some(Request { owner: slot, pages: count, blow_up });
        Next::Now
    }

    fn part(&self, owner: u32) -> Part {
        Part::of(owner, self.cpus, self.memory.pages())
    }

    fn pages_of(&self, owner: u32) -> u64 {
        if owner == self.cpus { self.memory.spare_pages() } else { self.part(owner).pages }
    }

    /// How many pages of an owner shall be in the balloon: of nobody's memory first, and each vCPU keeps one.
    fn wanted_of(&self, owner: u32) -> u64 {
        let spare = self.wanted.min(self.memory.spare_pages());
        if owner == self.cpus {
            return spare;
        }
        let share = Part::of(owner, self.cpus, self.wanted - spare).pages;
        share.min(self.part(owner).pages - 1)
    }

    fn address(&self, owner: u32, page: u64) -> u64 {
        if owner == self.cpus {
            self.memory.spare(page)
        } else {
            self.memory.page(self.part(owner).first + page) as u64
        }
    }

    /// Tells how much memory there is, and how much of it holds nothing.
    fn send_statistics(&mut self) {
        let Some(queue) = &mut self.statistics else { return };
        let given = self.given.iter().sum::<u64>();
        let spare = self.memory.spare_pages();
        // Pages in the balloon are expected to hold nothing of use, too.
        let unused = (0..self.memory.pages())
            .filter(|page| [NEVER_WRITTEN, ANYTHING].contains(&expected(&self.memory, *page)))
            .count() as u64;
        let free = (unused + spare).saturating_sub(given) * PAGE_BYTES;
        let total = (self.memory.pages() + spare).saturating_sub(given) * PAGE_BYTES;
        let figures = [(FREE, free), (TOTAL, total), (AVAILABLE, free)];
        // A tag of two bytes and a value of eight, packed.
        for (entry, (tag, value)) in figures.into_iter().enumerate() {
            FIGURES.put(5 * entry, tag);
            for word in 0..4 {
                FIGURES.put(5 * entry + 1 + word, (value >> (16 * word)) as u16);
            }
        }
        queue.send(&FIGURES, 10 * figures.len());
    }
}
