//! The device: features, configuration, queues.

use ferry_memory::GuestView;
use ferry_pages::{PAGE_BYTES, PageSet};
use virtio_bindings::virtio_ids;
use virtio_queue::desc::split::Descriptor;
use virtio_queue::{Queue, QueueState, QueueT};
use vm_memory::{Bytes, GuestMemory};

use crate::chains::{self, available, buffers};
use crate::hints::Hints;
use crate::pages::{self, Named};
use crate::statistics::{self, Statistics};
use crate::status::{Status, Troubles};

/// The kind of device, as its registers name it.
pub const DEVICE_ID: u32 = virtio_ids::VIRTIO_ID_BALLOON;
/// How many queues there are.
pub const QUEUES: u16 = 5;
/// Most entries of a queue.
pub const QUEUE_SIZE: u16 = 128;
/// The queue by which pages go into the balloon.
pub const INFLATE: u16 = 0;
/// The queue by which pages come out of it.
pub const DEFLATE: u16 = 1;
/// The queue for statistics.
pub const STATISTICS: u16 = 2;
/// The queue for free page hints.
pub const HINTS: u16 = 3;
/// The queue for free page reports.
pub const REPORTS: u16 = 4;

const CONFIG_BYTES: usize = 16;
const PAGE: u64 = PAGE_BYTES as u64;

/// Features, as bits (virtio 1.2, section 5.5.3).
pub mod feature {
    use virtio_bindings::{virtio_config, virtio_ring};

    /// A page is not used before it was told that it left the balloon.
    pub const MUST_TELL_HOST: u64 = 1;
    /// There is a statistics queue.
    pub const STATISTICS: u64 = 1 << 1;
    /// The guest takes pages out of the balloon before it runs out of memory.
    pub const DEFLATE_ON_OOM: u64 = 1 << 2;
    /// There is a queue for free page hints.
    pub const FREE_PAGE_HINT: u64 = 1 << 3;
    /// The guest says what it fills free pages with.
    pub const PAGE_POISON: u64 = 1 << 4;
    /// There is a queue for free page reports.
    pub const PAGE_REPORTING: u64 = 1 << 5;
    /// A chain's buffers may be listed elsewhere.
    pub const INDIRECT: u64 = 1 << virtio_ring::VIRTIO_RING_F_INDIRECT_DESC;
    /// The device is as of virtio 1.0 or newer; it is no other.
    pub const VERSION_1: u64 = 1 << virtio_config::VIRTIO_F_VERSION_1;
    /// All that this device has.
    pub const OFFERED: u64 = MUST_TELL_HOST
        | STATISTICS
        | DEFLATE_ON_OOM
        | FREE_PAGE_HINT
        | PAGE_POISON
        | PAGE_REPORTING
        | INDIRECT
        | VERSION_1;
}

/// The interrupt that is due.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use = "the guest waits for it"]
pub enum Interrupt {
    /// Buffers were given back to the driver.
    UsedBuffers,
    /// The configuration changed.
    Configuration,
}

impl Interrupt {
    /// Its bit in the transport's register of interrupts.
    pub fn bit(self) -> u32 {
        match self {
            Self::UsedBuffers => virtio_bindings::virtio_mmio::VIRTIO_MMIO_INT_VRING,
            Self::Configuration => virtio_bindings::virtio_mmio::VIRTIO_MMIO_INT_CONFIG,
        }
    }
}

/// Why a balloon does not do what it was asked for.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// Nobody in the guest would do it.
    #[error(
        "no driver in the guest runs the balloon: wait until the guest has started; a Linux guest needs \
         CONFIG_VIRTIO_BALLOON and CONFIG_VIRTIO_MMIO_CMDLINE_DEVICES"
    )]
    NoDriver,
    /// The guest cannot have more than there is.
    #[error(
        "the guest cannot have {target_bytes} bytes of memory: its machine has {memory_bytes}. Ask for that or less"
    )]
    MoreThanMemory {
        /// What was asked for.
        target_bytes: u64,
        /// What there is.
        memory_bytes: u64,
    },
    /// The driver does not do this.
    #[error(
        "the guest's driver does not say which pages are free: use a newer kernel in the guest"
    )]
    NoHints,
    /// Free pages have content that counts.
    #[error(
        "the guest fills free pages with {0:#x} and relies on it: hints are of no use without another boot"
    )]
    Poisoned(u32),
}

/// A virtio balloon.
#[derive(Debug)]
pub struct Balloon {
    pub(crate) memory_pages: u64,
    /// What the driver accepted; none before.
    pub(crate) features: u64,
    pub(crate) started: bool,
    pub(crate) queues: [Queue; QUEUES as usize],
    /// Pages that shall be in the balloon.
    pub(crate) wanted_pages: u32,
    /// Pages that the guest says are in it.
    pub(crate) actual_pages: u32,
    /// What free pages are filled with.
    pub(crate) poison: u32,
    pub(crate) generation: u32,
    pub(crate) ballooned: PageSet,
    pub(crate) reported_pages: u64,
    pub(crate) hints: Hints,
    /// The chain in which the guest waits to be asked for statistics.
    pub(crate) held: Option<u16>,
    pub(crate) statistics: Option<Statistics>,
    pub(crate) statistics_count: u64,
    pub(crate) troubles: Troubles,
}

impl Balloon {
    /// An empty balloon of a machine with `memory_bytes` of memory.
    pub fn new(memory_bytes: u64) -> Self {
        Self {
            memory_pages: memory_bytes / PAGE,
            features: 0,
            started: false,
            queues: std::array::from_fn(|_| empty_queue()),
            wanted_pages: 0,
            actual_pages: 0,
            poison: 0,
            generation: 0,
            ballooned: PageSet::new(),
            reported_pages: 0,
            hints: Hints::default(),
            held: None,
            statistics: None,
            statistics_count: 0,
            troubles: Troubles::default(),
        }
    }

    /// The driver accepts `features`; whether this device can go by them.
    pub fn accept(&mut self, features: u64) -> bool {
        let fits = features & !feature::OFFERED == 0 && features & feature::VERSION_1 != 0;
        if fits {
            self.features = features;
        } else {
            self.troubles.note(format!(
                "the driver accepts features {features:#x}; offered are {:#x}, with version 1",
                feature::OFFERED
            ));
        }
        fits
    }

    /// The driver is ready. What it put into queues before is done now.
    pub fn start<M: GuestMemory>(&mut self, ram: &M, view: &GuestView) -> Option<Interrupt> {
        self.started = true;
        let mut due = None;
        for queue in 0..QUEUES {
            if self.queues[usize::from(queue)].ready() {
                due = self.notify(queue, ram, view).or(due);
            }
        }
        due
    }

    /// The driver begins anew. No memory changes; which pages are in the balloon is forgotten, and so is
    /// what the driver said. The target stays.
    pub fn reset(&mut self) {
        let old = std::mem::replace(self, Self::new(0));
        self.memory_pages = old.memory_pages;
        self.wanted_pages = old.wanted_pages;
        self.generation = old.generation.wrapping_add(1);
        self.reported_pages = old.reported_pages;
        self.statistics_count = old.statistics_count;
        self.hints = Hints::restored(old.hints.id(), 0);
        self.troubles = old.troubles;
    }

    /// Queue `index`, for the transport to show its registers.
    pub fn queue(&mut self, index: u32) -> Option<&mut Queue> {
        self.queues.get_mut(usize::try_from(index).ok()?)
    }

    /// A number that changes with the configuration.
    pub fn config_generation(&self) -> u32 {
        self.generation
    }

    fn config(&self) -> [u8; CONFIG_BYTES] {
        let words = [self.wanted_pages, self.actual_pages, self.hints.command(), self.poison];
        let mut bytes = [0; CONFIG_BYTES];
        for (place, word) in bytes.chunks_exact_mut(4).zip(words) {
            place.copy_from_slice(&word.to_le_bytes());
        }
        bytes
    }

    /// The guest reads its configuration from byte `offset` on; there are zeros behind it.
    pub fn read_config(&self, offset: u64, out: &mut [u8]) {
        out.fill(0);
        let config = self.config();
        for (place, byte) in out.iter_mut().zip(config.iter().skip(place(offset))) {
            *place = *byte;
        }
    }

    /// The guest writes its configuration: how many pages are in the balloon, and the poison. The rest stays.
    pub fn write_config(&mut self, offset: u64, bytes: &[u8]) {
        let mut config = self.config();
        for (place, byte) in config.iter_mut().skip(place(offset)).zip(bytes) {
            *place = *byte;
        }
        let word = |n: usize| {
            let bytes = config.get(n * 4..n * 4 + 4).and_then(|b| b.try_into().ok());
            bytes.map_or(0, u32::from_le_bytes)
        };
        (self.actual_pages, self.poison) = (word(1), word(3));
    }

    fn change_config(&mut self) -> Interrupt {
        self.generation = self.generation.wrapping_add(1);
        Interrupt::Configuration
    }

    /// Has the guest use no more than `bytes` of its memory (rounded up to pages): it gives the rest back as
    /// it can.
    ///
    /// # Errors
    /// No driver would hear of it, or the machine has less memory.
    pub fn set_target(&mut self, bytes: u64) -> Result<Interrupt, Refused> {
        let memory_bytes = self.memory_pages * PAGE;
        let Some(balloon_bytes) = memory_bytes.checked_sub(bytes) else {
            return Err(Refused::MoreThanMemory { target_bytes: bytes, memory_bytes });
        };
        if !self.started {
            return Err(Refused::NoDriver);
        }
        self.wanted_pages = u32::try_from(balloon_bytes / PAGE).unwrap_or(u32::MAX);
        Ok(self.change_config())
    }

    /// Asks the guest for its statistics, if it waits for that: they come by the queue.
    pub fn ask_statistics<M: GuestMemory>(&mut self, ram: &M) -> Option<Interrupt> {
        let head = self.held.take()?;
        self.give(STATISTICS, ram, &[head])
    }

    /// Asks the guest which pages are free. What was hinted before is forgotten.
    ///
    /// # Errors
    /// The guest does not say, or its free pages are not free to the host.
    pub fn hint_begin(&mut self) -> Result<Interrupt, Refused> {
        match self.poison() {
            _ if !self.started => Err(Refused::NoDriver),
            _ if self.features & feature::FREE_PAGE_HINT == 0 => Err(Refused::NoHints),
            0 => {
                self.hints.begin();
                Ok(self.change_config())
            }
            poison => Err(Refused::Poisoned(poison)),
        }
    }

    /// Adds to `into` the pages that were hinted since this was last called; whether no more will come.
    ///
    /// A hint is a claim: the page was free at some time after [`hint_begin`](Self::hint_begin). Its content
    /// is of no use to the guest only if it was not written since before that.
    pub fn take_hints(&mut self, into: &mut PageSet) -> bool {
        into.union_with(&std::mem::take(&mut self.hints.pages));
        self.hints.is_over()
    }

    /// Lets the guest use hinted pages again.
    pub fn hint_end(&mut self) -> Option<Interrupt> {
        self.hints.end().then(|| self.change_config())
    }

    /// What free pages are filled with: zero where the guest does not care.
    fn poison(&self) -> u32 {
        if self.features & feature::PAGE_POISON == 0 { 0 } else { self.poison }
    }

    /// The pages that are in the balloon.
    pub fn ballooned(&self) -> &PageSet {
        &self.ballooned
    }

    /// How it stands.
    pub fn status(&self) -> Status {
        let left = |pages: u32| self.memory_pages.saturating_sub(pages.into()) * PAGE;
        Status {
            driver: self.started,
            memory_bytes: self.memory_pages * PAGE,
            target_bytes: left(self.wanted_pages),
            actual_bytes: left(self.actual_pages),
            ballooned_bytes: self.ballooned.len() * PAGE,
            reported_bytes: self.reported_pages.saturating_mul(PAGE),
            hinted_bytes: self.hints.count * PAGE,
            statistics: self.statistics,
            statistics_count: self.statistics_count,
            troubles: self.troubles.count,
            last_trouble: self.troubles.last.clone(),
        }
    }

    /// The guest put something into queue `index`: does all of it. `ram` and `view` are the same memory.
    pub fn notify<M: GuestMemory>(
        &mut self,
        index: u16,
        ram: &M,
        view: &GuestView,
    ) -> Option<Interrupt> {
        // What is there before the driver is ready waits for `start`.
        if !self.started {
            return None;
        }
        let needs = match index {
            STATISTICS => feature::STATISTICS,
            HINTS => feature::FREE_PAGE_HINT,
            REPORTS => feature::PAGE_REPORTING,
            _ => 0,
        };
        let queue = self.queues.get_mut(usize::from(index));
        let Some(queue) = queue.filter(|_| self.features & needs == needs) else {
            self.troubles
                .note(format!("there is no queue {index} by the features that were accepted"));
            return None;
        };
        let size = queue.size();
        let chains = match available(queue, ram) {
            Ok(chains) => chains,
            Err(why) => {
                self.troubles.note(format!("queue {index}: {why}"));
                return None;
            }
        };
        let mut named = Named::new(view);
        let mut heads = Vec::with_capacity(chains.len());
        for chain in chains {
            let head = chain.head_index();
            heads.push(head);
            let buffers = match buffers(chain, size) {
                Ok(buffers) => buffers,
                Err(why) => {
                    self.troubles.note(format!("queue {index}: {why}"));
                    continue;
                }
            };
            if index == STATISTICS {
                heads.pop();
                heads.extend(self.held.replace(head));
                self.take_statistics(ram, &buffers);
                continue;
            }
            for buffer in &buffers {
                let done = match index {
                    REPORTS => named.range(buffer),
                    HINTS if buffer.is_write_only() => named.range(buffer),
                    HINTS => {
                        let words = self.hints_until_now(&mut named);
                        self.troubles.of(words);
                        self.answer(ram, buffer)
                    }
                    _ => named.list(ram, buffer),
                };
                self.troubles.of(done);
            }
        }
        named.objections().into_iter().for_each(|words| self.troubles.note(words));
        match index {
            INFLATE => self.inflate(view, &named.pages),
            DEFLATE => self.deflate(&named.pages),
            REPORTS if self.poison() == 0 => {
                let refused = |words| self.troubles.note(words);
                let given = pages::give_back(view, &named.pages, &named.pages, refused);
                self.reported_pages = self.reported_pages.saturating_add(given);
            }
            HINTS => {
                let words = self.hints_until_now(&mut named);
                self.troubles.of(words);
            }
            _ => {}
        }
        self.give(index, ram, &heads)
    }

    fn inflate(&mut self, view: &GuestView, pages: &PageSet) {
        let before = self.ballooned.len();
        self.ballooned.union_with(pages);
        let again = pages.len() - (self.ballooned.len() - before);
        if again > 0 {
            self.troubles.note(format!("{again} pages that were in the balloon already"));
        }
        pages::give_back(view, pages, &self.ballooned, |words| self.troubles.note(words));
    }

    fn deflate(&mut self, pages: &PageSet) {
        let before = self.ballooned.len();
        self.ballooned.subtract(pages);
        let missing = pages.len() - (before - self.ballooned.len());
        if missing > 0 {
            self.troubles.note(format!("{missing} pages leave the balloon that were not in it"));
        }
    }

    /// The pages hinted so far belong to the command before the one that comes next.
    fn hints_until_now(&mut self, named: &mut Named<'_>) -> Result<(), String> {
        let pages = std::mem::take(&mut named.pages);
        if self.poison() == 0 { self.hints.add(&pages) } else { Ok(()) }
    }

    fn answer<M: GuestMemory>(&mut self, ram: &M, buffer: &Descriptor) -> Result<(), String> {
        if buffer.len() != 4 {
            return Err(format!("a hint command of {} bytes, not 4", buffer.len()));
        }
        let mut id = [0; 4];
        ram.read_slice(&mut id, buffer.addr()).map_err(|_| {
            format!("a hint command at {:#x}, outside guest memory", buffer.addr().0)
        })?;
        self.hints.answer(u32::from_le_bytes(id))
    }

    fn take_statistics<M: GuestMemory>(&mut self, ram: &M, buffers: &[Descriptor]) {
        let mut bytes = Vec::new();
        for buffer in buffers.iter().filter(|b| !b.is_write_only()) {
            let room = statistics::MAX_BYTES - bytes.len();
            let length = usize::try_from(buffer.len()).unwrap_or(usize::MAX).min(room);
            let mut part = [0; statistics::MAX_BYTES];
            let Some(part) = part.get_mut(..length) else { continue };
            if ram.read_slice(part, buffer.addr()).is_ok() {
                bytes.extend_from_slice(part);
            } else {
                let at = buffer.addr().0;
                self.troubles.note(format!("statistics at {at:#x}, outside guest memory"));
            }
        }
        self.statistics = Some(Statistics::parse(&bytes));
        self.statistics_count = self.statistics_count.saturating_add(1);
    }

    /// Gives chains back to the driver.
    fn give<M: GuestMemory>(&mut self, queue: u16, ram: &M, heads: &[u16]) -> Option<Interrupt> {
        let mut due = None;
        for head in heads {
            match chains::used(&mut self.queues[usize::from(queue)], ram, *head) {
                Ok(true) => due = Some(Interrupt::UsedBuffers),
                Ok(false) => {}
                Err(why) => self.troubles.note(format!("queue {queue}: {why}")),
            }
        }
        due
    }
}

/// A place in the configuration.
fn place(offset: u64) -> usize {
    usize::try_from(offset).unwrap_or(usize::MAX)
}

/// A queue that the driver did not set up.
pub(crate) fn empty_queue() -> Queue {
    // Of this state nothing can be wrong: the size is a power of two.
    let state = QueueState { max_size: QUEUE_SIZE, size: QUEUE_SIZE, ..QueueState::default() };
    Queue::try_from(state).unwrap_or_default()
}
