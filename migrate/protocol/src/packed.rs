//! Which pages, in few bytes: the list of pages that a source still owes travels while the guest stands
//! still.
//!
//! Runs, ascending, each as two numbers in LEB128: pages since the end of the run before it, and its
//! length. A run costs two to six bytes.

use ferry_pages::{Layout, PageSet, Run};
use serde::{Deserialize, Serialize};

use crate::limits::MAX_MESSAGE_BYTES;

/// A set of pages as it travels.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PackedPages(Vec<u8>);

impl PackedPages {
    /// Packs `pages`.
    pub fn pack(pages: &PageSet) -> Self {
        let (mut out, mut end) = (Vec::new(), 0);
        for run in pages.runs() {
            put(&mut out, run.start - end);
            put(&mut out, run.pages);
            end = run.end();
        }
        Self(out)
    }

    /// Packs `pages` in parts, each of which fits into a message.
    pub(crate) fn parts(pages: &PageSet) -> impl Iterator<Item = Self> {
        /// Of at most six bytes each.
        const RUNS: usize = MAX_MESSAGE_BYTES / 8;
        let mut runs = pages.runs().peekable();
        std::iter::from_fn(move || {
            runs.peek()?;
            Some(Self::pack(&runs.by_ref().take(RUNS).collect()))
        })
    }

    /// Whether there is no page in it.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The pages, all of which `layout` has.
    ///
    /// # Errors
    /// Not packed pages, or pages outside the layout, in words.
    pub fn unpack(&self, layout: &Layout) -> Result<PageSet, String> {
        self.unpack_if(|run| inside(layout, run))
    }

    /// The pages, all of which are in `pages`.
    ///
    /// # Errors
    /// As [`unpack`](Self::unpack).
    pub(crate) fn unpack_within(&self, pages: &PageSet) -> Result<PageSet, String> {
        self.unpack_if(|run| run.pages > 0 && pages.count_in(run) == run.pages)
    }

    fn unpack_if(&self, fits: impl Fn(Run) -> bool) -> Result<PageSet, String> {
        let (mut pages, mut end) = (PageSet::new(), 0u64);
        let mut rest = self.0.as_slice();
        while !rest.is_empty() {
            let start = end.saturating_add(take(&mut rest)?);
            let run = Run::new(start, take(&mut rest)?);
            if !fits(run) {
                return Err(format!(
                    "{} pages from frame {start:#x} are not among those that there can be",
                    run.pages
                ));
            }
            pages.insert_run(run);
            end = run.end();
        }
        Ok(pages)
    }
}

/// Whether every page of `run`, which may span extents that touch, is the machine's.
fn inside(layout: &Layout, run: Run) -> bool {
    let within = |e: &Run| e.end().min(run.end()).saturating_sub(e.start.max(run.start));
    run.pages > 0 && layout.extents().iter().map(within).sum::<u64>() == run.pages
}

fn put(out: &mut Vec<u8>, mut number: u64) {
    loop {
        let low = u8::try_from(number & 0x7f).unwrap_or(0);
        number >>= 7;
        if number == 0 {
            return out.push(low);
        }
        out.push(low | 0x80);
    }
}

fn take(rest: &mut &[u8]) -> Result<u64, String> {
    let mut number = 0u64;
    for shift in (0..63).step_by(7) {
        let Some((byte, after)) = rest.split_first() else {
            return Err("a list of pages ends in the middle of a number".into());
        };
        *rest = after;
        number |= u64::from(byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            return Ok(number);
        }
    }
    Err("a list of pages has a number of more than 63 bits".into())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layout() -> Layout {
        Layout::new(vec![Run::new(0, 1000), Run::new(1 << 20, 1 << 18)]).unwrap()
    }

    #[test]
    fn what_is_packed_is_unpacked() {
        for runs in [
            vec![],
            vec![Run::new(0, 1000)],
            (0..500).map(|i| Run::new(i * 2, 1)).collect(),
            vec![Run::new(7, 1), Run::new(999, 1), Run::new((1 << 20) + 5, (1 << 18) - 5)],
        ] {
            let pages: PageSet = runs.iter().copied().collect();
            let packed = PackedPages::pack(&pages);
            assert_eq!(packed.is_empty(), pages.is_empty());
            assert_eq!(packed.unpack_within(&pages), Ok(pages.clone()));
            assert_eq!(packed.unpack(&layout()), Ok(pages));
            assert!(packed.0.len() <= runs.len() * 7, "{} bytes", packed.0.len());
        }
    }

    #[test]
    fn parts_fit_into_messages_and_are_all_of_it() {
        assert_eq!(PackedPages::parts(&PageSet::new()).count(), 0);
        // Far apart, as lists are longest.
        let pages: PageSet = (0..300_000).map(|i| Run::new(i << 13, 1)).collect();
        let all = Layout::new(vec![Run::new(0, 1 << 32)]).unwrap();
        let mut together = PageSet::new();
        for part in PackedPages::parts(&pages) {
            let bytes = part.0.len();
            assert!(bytes < MAX_MESSAGE_BYTES, "{bytes}");
            together.union_with(&part.unpack(&all).unwrap());
        }
        assert_eq!(together, pages);
        assert_eq!(PackedPages::parts(&pages).count(), 3);
    }

    #[test]
    fn pages_that_are_not_among_those_expected_are_refused() {
        let expected: PageSet = [Run::new(5, 3), Run::new(9, 1)].into_iter().collect();
        for (run, fits) in [
            (Run::new(5, 3), true),
            (Run::new(6, 1), true),
            (Run::new(5, 4), false),
            (Run::new(4, 2), false),
            (Run::new(8, 1), false),
            (Run::new(1 << 45, 1), false),
        ] {
            let packed = PackedPages::pack(&[run].into_iter().collect());
            assert_eq!(packed.unpack_within(&expected).is_ok(), fits, "{run:?}");
        }
        assert!(PackedPages(vec![5, 0]).unpack_within(&expected).is_err(), "an empty run");
    }

    #[test]
    fn what_is_not_a_list_of_the_machines_pages_is_refused() {
        for bytes in [
            vec![5],
            vec![0x80],
            vec![0xff; 12],
            vec![0, 0x80],
            // Past the end of the layout, empty, and so far that it wraps.
            vec![0, 0xe9, 0x07],
            vec![0, 0],
            [vec![0xff; 8], vec![0x7f, 1]].concat(),
            [vec![0], vec![0xff; 8], vec![0x7f]].concat(),
        ] {
            assert!(PackedPages(bytes.clone()).unpack(&layout()).is_err(), "{bytes:?}");
        }
    }
}
