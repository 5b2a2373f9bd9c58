//! Which pages the guest named, and giving them back.

use ferry_memory::GuestView;
use ferry_pages::{PAGE_BYTES, PageSet, Run};
use virtio_queue::desc::split::Descriptor;
use vm_memory::{Address, Bytes, GuestMemory};

/// Pages named in one notification. All of them are the machine's.
pub(crate) struct Named<'a> {
    view: &'a GuestView,
    pub(crate) pages: PageSet,
    /// How many more may be named: no more than the machine has, so that time and room are bounded.
    left: u64,
    outside: u64,
    twice: u64,
}

impl<'a> Named<'a> {
    pub(crate) fn new(view: &'a GuestView) -> Self {
        let left = view.regions().iter().map(|r| r.run.pages).sum();
        Self { view, pages: PageSet::new(), left, outside: 0, twice: 0 }
    }

    /// Takes the frame numbers in `buffer`: four bytes each.
    pub(crate) fn list<M: GuestMemory>(
        &mut self,
        ram: &M,
        buffer: &Descriptor,
    ) -> Result<(), String> {
        const STEP_BYTES: usize = 4096;
        if buffer.is_write_only() {
            return Err("a buffer to write to, where a list of pages belongs".into());
        }
        if !buffer.len().is_multiple_of(4) {
            return Err(format!("a list of pages of {} bytes, not whole numbers", buffer.len()));
        }
        let mut bytes = [0; STEP_BYTES];
        let (mut at, mut rest) = (buffer.addr(), u64::from(buffer.len()));
        while rest > 0 {
            let step = usize::try_from(rest).unwrap_or(usize::MAX).min(STEP_BYTES);
            let now = &mut bytes[..step];
            ram.read_slice(now, at)
                .map_err(|_| format!("a list of pages at {:#x}, outside guest memory", at.0))?;
            self.numbers(now)?;
            rest -= step as u64;
            at = match at.checked_add(step as u64) {
                Some(at) => at,
                None if rest == 0 => break,
                None => return Err("a list of pages beyond all addresses".into()),
            };
        }
        Ok(())
    }

    fn numbers(&mut self, bytes: &[u8]) -> Result<(), String> {
        let mut numbers = bytes.chunks_exact(4).map(|b| {
            let (number, _) = b.split_first_chunk().unwrap_or((&[0; 4], b));
            u64::from(u32::from_le_bytes(*number))
        });
        let Some(first) = numbers.next() else { return Ok(()) };
        // Guests give memory back in runs, upwards or downwards.
        let (mut start, mut end) = (first, first + 1);
        for gfn in numbers {
            if gfn == end {
                end += 1;
            } else if gfn + 1 == start {
                start = gfn;
            } else {
                self.run(Run::new(start, end - start))?;
                (start, end) = (gfn, gfn + 1);
            }
        }
        self.run(Run::new(start, end - start))
    }

    /// Takes the whole pages in the range that `buffer` is.
    pub(crate) fn range(&mut self, buffer: &Descriptor) -> Result<(), String> {
        const PAGE: u64 = PAGE_BYTES as u64;
        if !buffer.is_write_only() {
            return Err("a buffer to read from, where free memory belongs".into());
        }
        let at = buffer.addr().raw_value();
        let end = at
            .checked_add(buffer.len().into())
            .ok_or_else(|| format!("free memory at {at:#x}, beyond all addresses"))?;
        let (first, end) = (at.div_ceil(PAGE), end / PAGE);
        if first < end { self.run(Run::new(first, end - first)) } else { Ok(()) }
    }

    fn run(&mut self, run: Run) -> Result<(), String> {
        self.left = self
            .left
            .checked_sub(run.pages)
            .ok_or("more pages in one notification than the machine has")?;
        let mut inside = 0;
        let before = self.pages.len();
        for part in self.view.regions().iter().filter_map(|region| region.overlap(run)) {
            self.pages.insert_run(part);
            inside += part.pages;
        }
        self.outside += run.pages - inside;
        self.twice += inside - (self.pages.len() - before);
        Ok(())
    }

    /// What was wrong with single pages, in words.
    pub(crate) fn objections(&self) -> Vec<String> {
        let words = [
            (self.outside, "pages that the machine does not have"),
            (self.twice, "pages named twice in one notification"),
        ];
        let wrong = words.into_iter().filter(|(pages, _)| *pages > 0);
        wrong.map(|(pages, what)| format!("{pages} {what}")).collect()
    }
}

/// Gives `pages` back to the host, each huge page once all of it is in `free`; how many pages were given back.
pub(crate) fn give_back(
    view: &GuestView,
    pages: &PageSet,
    free: &PageSet,
    mut refused: impl FnMut(String),
) -> u64 {
    let mut given = 0;
    let mut discard = |run: Run| match view.discard(run) {
        Ok(()) => given += run.pages,
        Err(e) => refused(in_words(&e)),
    };
    for region in view.regions() {
        if region.unit == 1 {
            pages.runs_in(region.run).for_each(&mut discard);
            continue;
        }
        let mut whole = PageSet::new();
        for run in pages.runs_in(region.run) {
            let mut unit = region.unit_of(run.start);
            while unit.start < run.end() {
                if free.count_in(unit) == unit.pages {
                    whole.insert_run(unit);
                }
                unit.start = unit.end();
            }
        }
        whole.runs().for_each(&mut discard);
    }
    given
}

fn in_words(error: &dyn std::error::Error) -> String {
    match error.source() {
        None => error.to_string(),
        Some(source) => format!("{error}: {source}"),
    }
}
