//! Which pages have equals, kept up to date page by page.
//!
//! A page that lasts (was not written for some passes; the scanner decides) is *held*: with its hash, in the
//! group of the pages that are equal to it. Groups are linked lists through the pages themselves, and the
//! table that finds a group by its hash holds nothing but the number of its first page:
//!
//! ```text
//!   table (4 bytes and 1 a place)        pages (16 bytes each: hash, previous, next)
//!     hash ──▶ 7 ───────────────────────▶ 7 ◀──▶ 4099 ◀──▶ 12
//! ```
//!
//! So a page that comes or goes costs one look into the table and two neighbours, however large its group and
//! the machine are. That is 16 bytes for each page of guest memory, and 6 to 12 for each different page held:
//! at most 28 bytes for 4 KiB, 0.7 % (57 MiB for 8 GiB; while the table grows, 5 bytes a page more).
//!
//! Each range of 2 MiB counts how many of its pages have an equal. That is what advice is given by
//! ([`Census::propose`]).

use std::collections::BTreeMap;

use ferry_pages::{Layout, PageSet, Run};
use hashbrown::HashTable;
use hashbrown::hash_table::Entry;

use crate::{Tenant, Twins};

/// Pages of a range: 2 MiB, which is what the kernel holds as one huge page, and splits to merge a part of it.
pub const RANGE_PAGES: u64 = 1 << RANGE_SHIFT;
pub(crate) const RANGE_SHIFT: u32 = 9;

/// Not held.
const ABSENT: u32 = u32::MAX;
/// Nothing before, or nothing behind.
const END: u32 = u32::MAX - 1;
/// Held, and zero: in no group.
const ZERO: u32 = u32::MAX - 2;
/// Held, but with the hash of a page that it is not equal to: in no group.
const ODD: u32 = u32::MAX - 3;
/// No page has a number from here on.
const MOST_PAGES: u64 = 1 << 31;

/// A machine, as a census numbers it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct MachineNo(pub(crate) u32);

/// What a page holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Content {
    /// Zeros.
    Zero,
    /// Anything else, by its hash.
    Hash(u64),
}

/// Whether pages of different tenants may be one.
///
/// A page that is shared is slow to write once, since it is copied first. Who can write a page of a content
/// that it guesses, and measure that, learns whether somebody else on the host has such a page (Suzaki et al.,
/// "Memory Deduplication as a Threat to the Guest OS", 2011); with a fault in the memory chips it can even
/// change it (Razavi et al., "Flip Feng Shui", 2016). Between machines of one tenant that is nobody's loss.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Between {
    /// Pages are equal only to those of the same tenant.
    #[default]
    OneTenant,
    /// Tenants trust each other.
    AllTenants,
}

/// More guest memory than a census can number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "a census counts at most {MOST_PAGES} pages (8 TiB), and {pages} more do not fit: count fewer machines together"
)]
pub struct TooManyPages {
    /// How many came on top.
    pub pages: u64,
}

#[derive(Clone, Copy, Debug)]
struct Page {
    hash: u64,
    /// The page before in its group; or `ABSENT`, `ZERO`, `ODD`; `END` of the first.
    before: u32,
    behind: u32,
}

const NO_PAGE: Page = Page { hash: 0, before: ABSENT, behind: END };

/// What is known of 2 MiB.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Range {
    pub(crate) machine: u32,
    pub(crate) held: u16,
    pub(crate) zero: u16,
    /// Not zero, and equal to another page that is held.
    pub(crate) twins: u16,
    /// Not zero, equal to no page here, but to one elsewhere.
    pub(crate) elsewhere: u16,
    pub(crate) advised: bool,
    /// For how many proposals it was not worth its advice.
    pub(crate) poor: u8,
}

/// A stretch of a machine, from a page number on that begins a range.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Stretch {
    pub(crate) run: Run,
    pub(crate) first: u32,
}

impl Stretch {
    fn ranges(&self) -> std::ops::Range<usize> {
        let first = (self.first >> RANGE_SHIFT) as usize;
        let ranges = self.run.pages.div_ceil(RANGE_PAGES);
        first..first + usize::try_from(ranges).unwrap_or(0)
    }

    /// The frames of each range, with its number.
    pub(crate) fn numbered(&self) -> impl Iterator<Item = (usize, Run)> {
        let run = self.run;
        (run.start..)
            .step_by(1 << RANGE_SHIFT)
            .zip(self.ranges())
            .map(move |(start, no)| (no, Run::new(start, RANGE_PAGES.min(run.end() - start))))
    }
}

#[derive(Debug)]
pub(crate) struct Counted {
    pub(crate) tenant: Tenant,
    /// Groups are of one color: the tenant's number, or 0 for all.
    color: u32,
    pub(crate) stretches: Vec<Stretch>,
    zeros: PageSet,
    pub(crate) elsewhere: Twins,
}

/// How many pages are held, and what they are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Pages held.
    pub held: u64,
    /// Of these: zero.
    pub zero: u64,
    /// Of these: as many could be given back by merging all that are equal, those that are zero aside.
    pub equal: u64,
    /// Of these: have the hash of a page that they are not equal to.
    pub odd: u64,
}

/// The equal pages of several machines in one process.
#[derive(Debug, Default)]
pub struct Census {
    between: Between,
    pages: Vec<Page>,
    pub(crate) ranges: Vec<Range>,
    groups: HashTable<u32>,
    pub(crate) machines: Vec<Option<Counted>>,
    colors: BTreeMap<Tenant, u32>,
    /// Page numbers of machines that are gone: first and how many.
    free: Vec<(u32, u32)>,
    counts: Counts,
    pub(crate) advised: Option<Tenant>,
}

impl Census {
    /// A census of no machine.
    pub fn new(between: Between) -> Self {
        Self { between, ..Self::default() }
    }

    /// Adds a machine of which no page is held.
    ///
    /// # Errors
    /// More memory than can be numbered.
    pub fn add(&mut self, layout: &Layout, tenant: Tenant) -> Result<MachineNo, TooManyPages> {
        let padded: u64 =
            layout.extents().iter().map(|e| e.pages.next_multiple_of(RANGE_PAGES)).sum();
        let mut first = self.room(padded).ok_or(TooManyPages { pages: layout.pages() })?;
        let next_color = u32::try_from(self.colors.len()).unwrap_or(u32::MAX);
        let color = match self.between {
            Between::AllTenants => 0,
            Between::OneTenant => *self.colors.entry(tenant.clone()).or_insert(next_color),
        };
        let slot = self.machines.iter().position(Option::is_none).unwrap_or(self.machines.len());
        let no = u32::try_from(slot).map_err(|_| TooManyPages { pages: layout.pages() })?;
        let mut stretches = Vec::with_capacity(layout.extents().len());
        for run in layout.extents() {
            let stretch = Stretch { run: *run, first };
            for range in &mut self.ranges[stretch.ranges()] {
                *range = Range { machine: no, ..Range::default() };
            }
            stretches.push(stretch);
            // Fits: `room` found as many.
            first += u32::try_from(run.pages.next_multiple_of(RANGE_PAGES)).unwrap_or(0);
        }
        let counted = Counted {
            tenant,
            color,
            stretches,
            zeros: PageSet::new(),
            elsewhere: Twins::default(),
        };
        if slot == self.machines.len() {
            self.machines.push(Some(counted));
        } else {
            self.machines[slot] = Some(counted);
        }
        Ok(MachineNo(no))
    }

    /// Page numbers for as many pages, whole ranges.
    fn room(&mut self, pages: u64) -> Option<u32> {
        let pages = u32::try_from(pages).ok()?;
        if let Some(place) = self.free.iter().position(|(_, free)| *free >= pages) {
            let (first, free) = self.free[place];
            self.free[place] = (first + pages, free - pages);
            self.free.retain(|(_, free)| *free > 0);
            return Some(first);
        }
        let first = self.pages.len();
        let end = first + pages as usize;
        if end as u64 > MOST_PAGES {
            return None;
        }
        self.pages.resize(end, NO_PAGE);
        self.ranges.resize(end >> RANGE_SHIFT, Range::default());
        u32::try_from(first).ok()
    }

    /// Takes a machine out, with all its pages.
    pub fn remove(&mut self, machine: MachineNo) {
        let Some(counted) = self.machine(machine) else { return };
        let stretches = counted.stretches.clone();
        for stretch in stretches {
            let end = stretch.first + u32::try_from(stretch.run.pages).unwrap_or(0);
            for id in stretch.first..end {
                self.drop_page(id);
            }
            let padded = stretch.run.pages.next_multiple_of(RANGE_PAGES);
            self.free.push((stretch.first, u32::try_from(padded).unwrap_or(0)));
            for range in &mut self.ranges[stretch.ranges()] {
                *range = Range::default();
            }
        }
        self.machines[machine.0 as usize] = None;
    }

    pub(crate) fn machine(&self, machine: MachineNo) -> Option<&Counted> {
        self.machines.get(machine.0 as usize)?.as_ref()
    }

    fn page_number(&self, machine: MachineNo, gfn: u64) -> Option<u32> {
        let stretches = &self.machine(machine)?.stretches;
        let stretch = stretches[..stretches.partition_point(|s| s.run.start <= gfn)].last()?;
        let at = gfn - stretch.run.start;
        (at < stretch.run.pages).then(|| stretch.first + u32::try_from(at).unwrap_or(0))
    }

    /// The machine and frame of a page that has a number.
    fn place_of(&self, id: u32) -> (MachineNo, u64) {
        let machine = MachineNo(self.ranges[(id >> RANGE_SHIFT) as usize].machine);
        let stretches = self.machine(machine).map_or(&[][..], |m| &m.stretches);
        let stretch =
            stretches.iter().find(|s| id >= s.first && u64::from(id - s.first) < s.run.pages);
        (machine, stretch.map_or(u64::MAX, |s| s.run.start + u64::from(id - s.first)))
    }

    /// Makes room for `pages` pages more at once.
    pub fn reserve(&mut self, pages: u64) {
        let pages_of = &self.pages;
        let additional = usize::try_from(pages).unwrap_or(0);
        self.groups.reserve(additional, |id| pages_of[*id as usize].hash);
    }

    /// Looks where `contents` would be in the table, so that [`hold`](Self::hold) finds it in the cache: of looks
    /// that depend on nothing, many wait for memory together.
    pub fn look_ahead(&self, contents: &[Content]) {
        for content in contents {
            if let Content::Hash(hash) = content {
                std::hint::black_box(
                    self.groups.find(*hash, |id| self.pages[*id as usize].hash == *hash),
                );
            }
        }
    }

    /// Holds page `gfn` of `machine`, which has `content`. Before it counts as equal to another, `same` is
    /// asked whether the two are, byte by byte. A page that is held already is taken as new; one that the
    /// machine does not have is not taken.
    pub fn hold(
        &mut self,
        machine: MachineNo,
        gfn: u64,
        content: Content,
        mut same: impl FnMut(MachineNo, u64) -> bool,
    ) {
        let Some(id) = self.page_number(machine, gfn) else { return };
        self.drop_page(id);
        let Content::Hash(hash) = content else {
            self.pages[id as usize] = Page { hash: 0, before: ZERO, behind: END };
            self.account(id, true);
            if let Some(counted) = &mut self.machines[machine.0 as usize] {
                counted.zeros.insert(gfn);
            }
            return;
        };
        self.pages[id as usize] = Page { hash, before: END, behind: END };
        if let Some(first) = self.join(id) {
            let (other, at) = self.place_of(first);
            if same(other, at) {
                self.link(first, id);
            } else {
                self.pages[id as usize].before = ODD;
            }
        }
        self.account(id, true);
    }

    /// The first page of the group of page `id`, by hash and color; or none, and it is the first.
    fn join(&mut self, id: u32) -> Option<u32> {
        let Self { groups, pages, ranges, machines, .. } = self;
        let color = |id: u32| color(ranges, machines, id);
        let (hash, own) = (pages[id as usize].hash, color(id));
        let equal = |other: &u32| pages[*other as usize].hash == hash && color(*other) == own;
        match groups.entry(hash, equal, |id| pages[*id as usize].hash) {
            Entry::Occupied(first) => Some(*first.get()),
            Entry::Vacant(place) => {
                place.insert(id);
                None
            }
        }
    }

    /// Puts a page behind the first of a group.
    fn link(&mut self, first: u32, id: u32) {
        let second = self.pages[first as usize].behind;
        if second == END {
            // Alone until now: it becomes a twin.
            self.account(first, false);
        } else {
            self.pages[second as usize].before = id;
        }
        self.pages[id as usize].before = first;
        self.pages[id as usize].behind = second;
        self.pages[first as usize].behind = id;
        if second == END {
            self.account(first, true);
        }
    }

    /// Forgets `pages` of `machine`: they were written, or are gone.
    pub fn drop_pages(&mut self, machine: MachineNo, pages: &PageSet) {
        let stretches = self.machine(machine).map(|m| m.stretches.clone()).unwrap_or_default();
        for Stretch { run, first } in stretches {
            for part in pages.runs_in(run) {
                let begin = first + u32::try_from(part.start - run.start).unwrap_or(0);
                for id in begin..begin + u32::try_from(part.pages).unwrap_or(0) {
                    self.drop_page(id);
                }
            }
        }
    }

    fn drop_page(&mut self, id: u32) {
        let Page { hash, before, behind } = self.pages[id as usize];
        if before == ABSENT {
            return;
        }
        self.account(id, false);
        if before == ZERO {
            let (machine, gfn) = self.place_of(id);
            if let Some(counted) = &mut self.machines[machine.0 as usize] {
                counted.zeros.remove(gfn);
            }
        } else if before != ODD {
            // Of two the other is left alone.
            let alone = match (before, behind) {
                (END, END) => None,
                (END, other) => Some(other).filter(|o| self.pages[*o as usize].behind == END),
                (other, END) => Some(other).filter(|o| self.pages[*o as usize].before == END),
                _ => None,
            };
            if let Some(other) = alone {
                self.account(other, false);
            }
            if before == END {
                self.lose_first(hash, id, behind);
            } else {
                self.pages[before as usize].behind = behind;
            }
            if behind != END {
                self.pages[behind as usize].before = before;
            }
            if let Some(other) = alone {
                self.account(other, true);
            }
        }
        self.pages[id as usize] = NO_PAGE;
    }

    /// The group of page `id`, its first, begins at `behind` from now on, or is no more.
    fn lose_first(&mut self, hash: u64, id: u32, behind: u32) {
        if let Ok(mut entry) = self.groups.find_entry(hash, |other| *other == id) {
            if behind == END {
                entry.remove();
            } else {
                *entry.get_mut() = behind;
            }
        }
    }

    /// Adds a held page to the counts of its range and of all, or takes it out of them; called around each
    /// change of what it is.
    fn account(&mut self, id: u32, adds: bool) {
        let page = self.pages[id as usize];
        let linked = page.before < ODD || page.behind < ODD;
        let range = &mut self.ranges[(id >> RANGE_SHIFT) as usize];
        let step16 = |n: &mut u16| *n = if adds { *n + 1 } else { *n - 1 };
        let step64 = |n: &mut u64| *n = if adds { *n + 1 } else { *n - 1 };
        step16(&mut range.held);
        step64(&mut self.counts.held);
        if page.before == ZERO {
            step16(&mut range.zero);
            step64(&mut self.counts.zero);
        } else if linked {
            step16(&mut range.twins);
        } else {
            if page.before == ODD {
                step64(&mut self.counts.odd);
            }
            let counted = self.machines[range.machine as usize].as_ref();
            if counted.is_some_and(|m| m.elsewhere.contains(page.hash)) {
                step16(&mut range.elsewhere);
            }
        }
    }

    /// Takes note of which pages have equals in other processes. What was said before is forgotten. This one
    /// call costs a look at every page of the machine.
    pub fn set_elsewhere(&mut self, machine: MachineNo, elsewhere: Twins) {
        let Some(counted) = self.machines.get_mut(machine.0 as usize).and_then(Option::as_mut)
        else {
            return;
        };
        counted.elsewhere = elsewhere;
        for Stretch { run, first } in counted.stretches.clone() {
            for no in (Stretch { run, first }).ranges() {
                self.ranges[no].elsewhere = 0;
            }
            for id in first..first + u32::try_from(run.pages).unwrap_or(0) {
                let Page { hash, before, behind } = self.pages[id as usize];
                let alone = before == ODD || (before, behind) == (END, END);
                let known = self.machines[machine.0 as usize].as_ref();
                if alone && known.is_some_and(|m| m.elsewhere.contains(hash)) {
                    self.ranges[(id >> RANGE_SHIFT) as usize].elsewhere += 1;
                }
            }
        }
    }

    /// What is held, all machines together.
    pub fn counts(&self) -> Counts {
        let linked = self.counts.held - self.counts.zero - self.counts.odd;
        Counts { equal: linked - self.groups.len() as u64, ..self.counts }
    }

    /// The pages of `machine` that are held and zero.
    pub fn zeros(&self, machine: MachineNo) -> PageSet {
        self.machine(machine).map(|m| m.zeros.clone()).unwrap_or_default()
    }

    /// The hashes of the pages of `machine` that are held and not zero.
    pub(crate) fn hashes(&self, machine: MachineNo) -> impl Iterator<Item = u64> {
        let stretches = self.machine(machine).map_or(&[][..], |m| &m.stretches);
        let pages = stretches.iter().flat_map(|s| {
            let first = s.first as usize;
            &self.pages[first..first + usize::try_from(s.run.pages).unwrap_or(0)]
        });
        pages.filter(|p| p.before != ABSENT && p.before != ZERO).map(|p| p.hash)
    }

    pub(crate) fn keeps_tenants_apart(&self) -> bool {
        self.between == Between::OneTenant
    }

    /// Bytes that the census takes.
    pub fn bytes(&self) -> usize {
        self.pages.capacity() * size_of::<Page>()
            + self.ranges.capacity() * size_of::<Range>()
            + self.groups.allocation_size()
    }
}

/// Which groups a page may be in.
fn color(ranges: &[Range], machines: &[Option<Counted>], id: u32) -> u32 {
    let machine = ranges[(id >> RANGE_SHIFT) as usize].machine;
    machines[machine as usize].as_ref().map_or(0, |m| m.color)
}
