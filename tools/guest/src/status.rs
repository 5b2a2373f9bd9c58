//! The status page: what the guest says about itself, at a fixed place in its memory.
//!
//! Numbers are little-endian `u64`s at the offsets below. The page moves with the guest, so counters
//! go on counting at the destination. The guest writes it and never reads it back but for the state.

use crate::workload::{Kind, Params};

/// Guest-physical address of the status page.
pub const GPA: u64 = 0x10_0000;
/// Its length.
pub const BYTES: usize = 4096;
/// Its first word: `FERRYGST`.
pub const MAGIC: u64 = u64::from_le_bytes(*b"FERRYGST");
/// The layout described here.
pub const LAYOUT_VERSION: u64 = 1;

/// Offsets of the page's words.
pub mod at {
    /// [`MAGIC`](super::MAGIC), once the guest has begun.
    pub const MAGIC: usize = 0;
    /// [`LAYOUT_VERSION`](super::LAYOUT_VERSION).
    pub const LAYOUT_VERSION: usize = 8;
    /// A [`State`](super::State).
    pub const STATE: usize = 16;
    /// vCPUs that work.
    pub const CPUS: usize = 24;
    /// Pages in the arena.
    pub const ARENA_PAGES: usize = 32;
    /// Guest-physical address of the table of expected versions, a `u32` a page.
    pub const EXPECTED: usize = 40;
    /// Frequency of the time-stamp counter that the guest goes by, in kHz; 0 if it knows none.
    pub const TSC_KHZ: usize = 48;
    /// Number of arena extents.
    pub const EXTENTS: usize = 56;
    /// Arena extents, [`MAX_EXTENTS`](super::MAX_EXTENTS) pairs of address and pages.
    pub const EXTENT: usize = 64;
    /// Not 0 once the error record is complete.
    pub const ERROR: usize = 256;
    /// The error record: vCPU, then the fields of a mismatch.
    pub const ERROR_CPU: usize = 264;
    /// A [`Kind`](crate::workload::Kind).
    pub const ERROR_KIND: usize = 272;
    /// The page's index.
    pub const ERROR_PAGE: usize = 280;
    /// The page's guest-physical address.
    pub const ERROR_GPA: usize = 288;
    /// The version that it should have.
    pub const ERROR_VERSION: usize = 296;
    /// Number of the first wrong word.
    pub const ERROR_WORD: usize = 304;
    /// What that word should be.
    pub const ERROR_EXPECTED: usize = 312;
    /// What it was.
    pub const ERROR_FOUND: usize = 320;
    /// Words 0 and 1 of the page, as found.
    pub const ERROR_HEAD: usize = 328;
    /// Pages that are in the balloon; 0 where there is none.
    pub const BALLOONED_PAGES: usize = 344;
    /// Length of the message.
    pub const MESSAGE_BYTES: usize = 376;
    /// Why the guest stopped, in words.
    pub const MESSAGE: usize = 384;
    /// Length of the parameters.
    pub const PARAMS_BYTES: usize = 632;
    /// The parameters as understood, as text.
    pub const PARAMS: usize = 640;
    /// Counters of vCPU 0; those of the others follow at [`COUNTER_BYTES`](super::COUNTER_BYTES).
    pub const COUNTERS: usize = 1024;
    /// Ticks of the time-stamp counter in all [stalls](super::Stalls) together; 0 in guests that did not
    /// count them.
    pub const STALLED: usize = 3072;
    /// How many stalls there were of each length: [`STALL_KINDS`](super::STALL_KINDS) words.
    pub const STALLS: usize = 3080;
}

/// Bytes between the counters of two vCPUs.
pub const COUNTER_BYTES: usize = 64;
/// Most extents of an arena.
pub const MAX_EXTENTS: usize = 8;
/// Longest message.
pub const MAX_MESSAGE_BYTES: usize = at::PARAMS_BYTES - at::MESSAGE;
/// Longest parameters.
pub const MAX_PARAMS_BYTES: usize = at::COUNTERS - at::PARAMS;

/// Lengths of stalls that are told apart.
pub const STALL_KINDS: usize = 96;

const _: () = assert!(at::COUNTERS + Params::MAX_CPUS as usize * COUNTER_BYTES <= at::STALLED);
const _: () = assert!(at::STALLS + STALL_KINDS * 8 <= BYTES);
const _: () = assert!(at::EXTENT + MAX_EXTENTS * 16 <= at::ERROR);

/// What the guest is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u64)]
pub enum State {
    /// It sets itself up.
    Booting = 1,
    /// It writes every page of the arena once.
    Filling = 2,
    /// It follows its pattern.
    Running = 3,
    /// It found a wrong page; the error record says which. All vCPUs stopped.
    Corrupt = 4,
    /// It cannot do what its command line asks; the message says why.
    BadParams = 5,
    /// It took an exception, or its own code is wrong; the message says where.
    Fault = 6,
}

impl State {
    const ALL: [Self; 6] =
        [Self::Booting, Self::Filling, Self::Running, Self::Corrupt, Self::BadParams, Self::Fault];
}

/// What one vCPU has done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Counters {
    /// Pages written.
    pub written: u64,
    /// Pages whose content was checked.
    pub checked: u64,
    /// The time-stamp counter when these were written: goes on as long as the vCPU does.
    pub tsc: u64,
    /// 1 once its part of the fill is done.
    pub filled: u64,
}

/// Visits that took long, of all vCPUs: whoever visits a page that is not there, or whose write has to be
/// noted, or is not given the processor, stands still that long.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stalls {
    /// Ticks of the time-stamp counter, all together.
    pub ticks: u64,
    /// How many, by [kind](Self::kind).
    pub counts: [u64; STALL_KINDS],
}

impl Stalls {
    /// A visit that takes fewer ticks than two to this is none.
    const SHORTEST_BITS: u32 = 14;

    /// Which count a visit of so many ticks belongs to: four kinds for each power of two. The last one is
    /// for all longer ones as well.
    #[inline]
    pub fn kind(ticks: u64) -> Option<usize> {
        let bits = ticks.checked_ilog2().filter(|bits| *bits >= Self::SHORTEST_BITS)?;
        let quarter = (ticks >> (bits - 2)) & 3;
        let kind = (bits - Self::SHORTEST_BITS) as usize * 4 + quarter as usize;
        Some(kind.min(STALL_KINDS - 1))
    }

    /// The ticks that a visit of this kind takes less than (the last one may take more).
    pub fn below(kind: usize) -> u64 {
        let bits = Self::SHORTEST_BITS as usize + kind.min(STALL_KINDS - 1) / 4;
        (5 + kind as u64 % 4) << (bits - 2)
    }

    /// Those that came after `before`.
    #[must_use]
    pub fn since(&self, before: &Self) -> Self {
        let mut counts = self.counts;
        counts.iter_mut().zip(&before.counts).for_each(|(n, had)| *n = n.wrapping_sub(*had));
        Self { ticks: self.ticks.wrapping_sub(before.ticks), counts }
    }

    /// Those that surely took so many ticks or more; their sum is estimated from the middle of each kind, to an
    /// eighth.
    #[must_use]
    pub fn of_at_least(&self, ticks: u64) -> Self {
        let mut longer = Self { ticks: 0, counts: [0; STALL_KINDS] };
        for kind in 1..STALL_KINDS {
            let (from, to) = (Self::below(kind - 1), Self::below(kind));
            if from >= ticks {
                longer.counts[kind] = self.counts[kind];
                let sum = self.counts[kind].saturating_mul((from + to) / 2);
                longer.ticks = longer.ticks.saturating_add(sum);
            }
        }
        longer
    }

    /// How many.
    pub fn count(&self) -> u64 {
        self.counts.iter().fold(0, |sum, n| sum.wrapping_add(*n))
    }

    /// The ticks that so many of a hundred stay below, to a quarter of a power of two; 0 of none.
    pub fn percentile(&self, percent: u64) -> u64 {
        let wanted = u128::from(self.count()) * u128::from(percent);
        let mut sum = 0_u128;
        for (kind, n) in self.counts.iter().enumerate() {
            sum += u128::from(*n);
            if *n > 0 && sum * 100 >= wanted {
                return Self::below(kind);
            }
        }
        0
    }
}

/// A wrong page, as the guest recorded it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ErrorRecord {
    /// The vCPU that found it.
    pub cpu: u64,
    /// What it looks like.
    pub kind: Kind,
    /// The page, counted in the arena.
    pub page: u64,
    /// Its guest-physical address.
    pub gpa: u64,
    /// The version that it should have.
    pub version: u64,
    /// Number of the first wrong 64-bit word.
    pub word: u64,
    /// What that word should be.
    pub expected: u64,
    /// What it was.
    pub found: u64,
    /// Words 0 and 1 of the page: version << 32 | index, and tag.
    pub head: [u64; 2],
}

/// A status page, read from the host's side.
#[derive(Clone, Copy, Debug)]
pub struct StatusView<'a>(&'a [u8]);

/// Bytes that are not a status page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NotStatus {
    /// Fewer than [`BYTES`].
    Short(usize),
    /// Another first word: the guest has not begun, or it is another program.
    Magic(u64),
    /// Another layout.
    Layout(u64),
}

impl core::fmt::Display for NotStatus {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        match self {
            Self::Short(n) => write!(f, "the guest's status page has {n} bytes, not {BYTES}"),
            Self::Magic(found) => write!(
                f,
                "no status page of the test guest at {GPA:#x} (found {found:#x}, expected {MAGIC:#x}): \
                 it has not begun, or the machine runs another kernel"
            ),
            Self::Layout(found) => {
                write!(
                    f,
                    "the guest's status page has layout {found}; this host reads {LAYOUT_VERSION}"
                )
            }
        }
    }
}

impl core::error::Error for NotStatus {}

impl<'a> StatusView<'a> {
    /// Takes the [`BYTES`] bytes at [`GPA`].
    ///
    /// # Errors
    /// They are not a status page.
    pub fn parse(bytes: &'a [u8]) -> Result<Self, NotStatus> {
        let page = bytes.get(..BYTES).ok_or(NotStatus::Short(bytes.len()))?;
        let view = Self(page);
        match (view.at(at::MAGIC), view.at(at::LAYOUT_VERSION)) {
            (MAGIC, LAYOUT_VERSION) => Ok(view),
            (MAGIC, other) => Err(NotStatus::Layout(other)),
            (other, _) => Err(NotStatus::Magic(other)),
        }
    }

    /// What the guest is doing; `None` for a number that means nothing.
    pub fn state(&self) -> Option<State> {
        let number = self.at(at::STATE);
        State::ALL.into_iter().find(|s| *s as u64 == number)
    }

    /// vCPUs that work.
    pub fn cpus(&self) -> usize {
        usize::try_from(self.at(at::CPUS)).unwrap_or(usize::MAX).min(Params::MAX_CPUS as usize)
    }

    /// Pages in the arena.
    pub fn arena_pages(&self) -> u64 {
        self.at(at::ARENA_PAGES)
    }

    /// Pages that are in the balloon.
    pub fn ballooned_pages(&self) -> u64 {
        self.at(at::BALLOONED_PAGES)
    }

    /// Frequency of the time-stamp counter in kHz; 0 if the guest knows none.
    pub fn tsc_khz(&self) -> u64 {
        self.at(at::TSC_KHZ)
    }

    /// The arena as (guest-physical address, pages), ascending.
    pub fn extents(&self) -> impl Iterator<Item = (u64, u64)> + use<'a> {
        let view = *self;
        let count = usize::try_from(self.at(at::EXTENTS)).unwrap_or(usize::MAX).min(MAX_EXTENTS);
        (0..count).map(move |i| (view.at(at::EXTENT + 16 * i), view.at(at::EXTENT + 16 * i + 8)))
    }

    /// Guest-physical address of arena page `index`.
    pub fn page_gpa(&self, index: u64) -> Option<u64> {
        let mut left = Some(index).filter(|i| *i < self.arena_pages())?;
        for (gpa, pages) in self.extents() {
            if left < pages {
                return gpa.checked_add(left.checked_mul(crate::workload::PAGE_BYTES)?);
            }
            left -= pages;
        }
        None
    }

    /// Guest-physical address of the `u32` that says which version page `index` should have.
    pub fn expected_gpa(&self, index: u64) -> Option<u64> {
        let inside = index < self.arena_pages();
        index.checked_mul(4).filter(|_| inside).and_then(|at| self.at(at::EXPECTED).checked_add(at))
    }

    /// What vCPU `cpu` has done; zero beyond the last.
    pub fn counters(&self, cpu: usize) -> Counters {
        if cpu >= self.cpus() {
            return Counters::default();
        }
        let word = |i: usize| self.at(at::COUNTERS + cpu * COUNTER_BYTES + 8 * i);
        Counters { written: word(0), checked: word(1), tsc: word(2), filled: word(3) }
    }

    /// Sum over all vCPUs; `tsc` is the oldest.
    pub fn total(&self) -> Counters {
        (0..self.cpus())
            .map(|c| self.counters(c))
            .reduce(|a, b| Counters {
                written: a.written.wrapping_add(b.written),
                checked: a.checked.wrapping_add(b.checked),
                tsc: a.tsc.min(b.tsc),
                filled: a.filled.wrapping_add(b.filled),
            })
            .unwrap_or_default()
    }

    /// Visits that took long so far.
    pub fn stalls(&self) -> Stalls {
        let counts = core::array::from_fn(|kind| self.at(at::STALLS + 8 * kind));
        Stalls { ticks: self.at(at::STALLED), counts }
    }

    /// The wrong page, once one was found.
    pub fn error(&self) -> Option<ErrorRecord> {
        if self.at(at::ERROR) == 0 {
            return None;
        }
        let kind = self.at(at::ERROR_KIND);
        Some(ErrorRecord {
            cpu: self.at(at::ERROR_CPU),
            kind: Kind::ALL.into_iter().find(|k| *k as u64 == kind).unwrap_or(Kind::Garbage),
            page: self.at(at::ERROR_PAGE),
            gpa: self.at(at::ERROR_GPA),
            version: self.at(at::ERROR_VERSION),
            word: self.at(at::ERROR_WORD),
            expected: self.at(at::ERROR_EXPECTED),
            found: self.at(at::ERROR_FOUND),
            head: [self.at(at::ERROR_HEAD), self.at(at::ERROR_HEAD + 8)],
        })
    }

    /// Why the guest stopped; empty while it works.
    pub fn message(&self) -> &'a str {
        self.text(at::MESSAGE_BYTES, at::MESSAGE, MAX_MESSAGE_BYTES)
    }

    /// The parameters as the guest understood them.
    pub fn params(&self) -> &'a str {
        self.text(at::PARAMS_BYTES, at::PARAMS, MAX_PARAMS_BYTES)
    }

    fn at(&self, offset: usize) -> u64 {
        let mut word = [0; 8];
        word.copy_from_slice(&self.0[offset..offset + 8]);
        u64::from_le_bytes(word)
    }

    fn text(&self, length: usize, from: usize, most: usize) -> &'a str {
        let bytes = usize::try_from(self.at(length)).unwrap_or(usize::MAX).min(most);
        core::str::from_utf8(&self.0[from..from + bytes]).unwrap_or("(not text)")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn page(words: &[(usize, u64)]) -> Vec<u8> {
        let mut page = vec![0; BYTES];
        for (offset, value) in
            [(at::MAGIC, MAGIC), (at::LAYOUT_VERSION, LAYOUT_VERSION)].iter().chain(words)
        {
            page[*offset..offset + 8].copy_from_slice(&value.to_le_bytes());
        }
        page
    }

    #[test]
    fn an_index_beyond_an_extent_lies_in_the_next() {
        let words = [(at::EXTENTS, 2), (64, 0x30_0000), (72, 10), (80, 1 << 32), (88, 5)];
        let page =
            page(&[&words[..], &[(at::ARENA_PAGES, 15), (at::EXPECTED, 0x20_0000)]].concat());
        let view = StatusView::parse(&page).unwrap();
        assert_eq!(view.page_gpa(9), Some(0x30_9000));
        assert_eq!(view.page_gpa(10), Some(1 << 32));
        assert_eq!(view.page_gpa(15), None);
        assert_eq!(view.expected_gpa(14), Some(0x20_0038));
        assert_eq!(view.expected_gpa(15), None);
    }

    #[test]
    fn counters_are_summed_over_the_vcpus_that_work() {
        let second = at::COUNTERS + COUNTER_BYTES;
        let page = page(&[
            (at::CPUS, 2),
            (at::STATE, State::Running as u64),
            (at::COUNTERS, 7),
            (second, 8),
            (second + 16, 3),
            (second + COUNTER_BYTES, 99),
        ]);
        let view = StatusView::parse(&page).unwrap();
        assert_eq!(view.state(), Some(State::Running));
        assert_eq!(view.total().written, 15);
        assert_eq!(view.total().tsc, 0);
        assert_eq!(view.error(), None);
    }

    #[test]
    fn a_stall_is_counted_below_the_next_quarter_of_a_power_of_two() {
        assert_eq!(Stalls::kind((1 << 14) - 1), None);
        assert_eq!((Stalls::kind(0), Stalls::kind(u64::MAX)), (None, Some(STALL_KINDS - 1)));
        for ticks in [1 << 14, 20_479, 20_480, 1_000_000, 123_456_789, (1 << 37) + 5] {
            let kind = Stalls::kind(ticks).unwrap();
            assert!(ticks < Stalls::below(kind), "{ticks}");
            assert!(kind == 0 || ticks >= Stalls::below(kind - 1), "{ticks}");
        }
        let kinds = [(20_000_u64, 98), (1_000_000, 1), (5_000_000, 1)];
        let words = kinds.map(|(ticks, n)| (at::STALLS + 8 * Stalls::kind(ticks).unwrap(), n));
        let page = page(&words);
        let stalls = StatusView::parse(&page).unwrap().stalls();
        assert_eq!(stalls.count(), 100);
        assert_eq!(stalls.percentile(50), 20_480);
        assert_eq!(stalls.percentile(99), Stalls::below(Stalls::kind(1_000_000).unwrap()));
        assert!(stalls.percentile(100) > 5_000_000);
        let long = stalls.of_at_least(100_000);
        assert_eq!((long.count(), long.percentile(1)), (2, stalls.percentile(99)));
        assert!(long.ticks.abs_diff(6_000_000) < 6_000_000 / 8, "{}", long.ticks);
        let none = stalls.since(&stalls);
        assert_eq!((none.count(), none.percentile(99)), (0, 0));
    }

    #[test]
    fn no_bytes_make_the_reader_panic() {
        assert!(matches!(StatusView::parse(&[0; 100]), Err(NotStatus::Short(100))));
        assert!(matches!(StatusView::parse(&[0; BYTES]), Err(NotStatus::Magic(0))));
        let mut wild = vec![0xff; BYTES];
        wild[..16].copy_from_slice(&page(&[])[..16]);
        let view = StatusView::parse(&wild).unwrap();
        assert_eq!((view.state(), view.cpus()), (None, 32));
        assert_eq!(view.message(), "(not text)");
        let _ = (view.params(), view.total(), view.error(), view.page_gpa(7), view.expected_gpa(7));
        let stalls = view.stalls();
        assert_eq!(stalls.percentile(100), stalls.percentile(100));
        assert_eq!(view.page_gpa(u64::MAX), None);
    }
}
