//! What of a machine's memory is one with others, as the kernel's page tables have it.
//!
//! `/proc/self/ksm_stat` counts a page that was written since it was merged until the kernel's thread comes by,
//! which it does only when it is woken. So it is good for a first look; `/proc/self/smaps` is exact (`KSM`, Linux
//! 6.8), but looks at each page.

use std::ops::Range;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use ferry_memory::GuestView;
use ferry_sharing::Ksm;

use crate::machine::PAGE_BYTES;

/// Looking takes no more of a processor's time than one in so many parts.
const REST: u32 = 50;

/// In bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Merged {
    /// Pages that are one with others, here or elsewhere.
    pub(crate) bytes: u64,
    /// This machine's part of what that saves: of a page that n share, each saves 1/n of n - 1 pages.
    pub(crate) saves_bytes: u64,
    /// Pages that became the kernel's page of zeros.
    pub(crate) zero_bytes: u64,
}

/// Measures, and remembers for a moment.
#[derive(Debug, Default)]
pub(crate) struct Meter(Mutex<Option<(Instant, Duration, Merged)>>);

impl Meter {
    /// What is merged of the memory that `view` sees.
    pub(crate) fn read(&self, view: &GuestView) -> Merged {
        let own = Ksm::own_figures();
        let zero_bytes = own.zero_pages * PAGE_BYTES;
        if own.merging_pages == 0 {
            return Merged { zero_bytes, ..Merged::default() };
        }
        let mut last = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((at, took, merged)) = &*last
            && at.elapsed() < took.saturating_mul(REST)
        {
            return Merged { zero_bytes, ..*merged };
        }
        let began = Instant::now();
        let spans: Vec<Range<u64>> = view.regions().iter().map(|r| span(r.host_span())).collect();
        let smaps = std::fs::read_to_string("/proc/self/smaps").unwrap_or_default();
        let (bytes, saves_bytes) = parse(&smaps, &spans);
        // Older kernels do not tell it here.
        let bytes = bytes.unwrap_or(own.merging_pages * PAGE_BYTES);
        let merged = Merged { bytes, saves_bytes, zero_bytes };
        *last = Some((Instant::now(), began.elapsed(), merged));
        merged
    }
}

fn span((start, bytes): (*mut std::ffi::c_void, usize)) -> Range<u64> {
    start as u64..start as u64 + bytes as u64
}

/// Merged bytes, if the kernel tells, and how many that saves, of the mappings in `spans`. Private memory of a
/// process is shared by nothing but merging.
fn parse(smaps: &str, spans: &[Range<u64>]) -> (Option<u64>, u64) {
    let (mut merged, mut saves) = (None, 0);
    let (mut is_guest, mut rss) = (false, 0);
    for line in smaps.lines() {
        let mut words = line.split_ascii_whitespace();
        let Some(first) = words.next() else { continue };
        let Some(field) = first.strip_suffix(':') else {
            let hex = |text: &str| u64::from_str_radix(text, 16).ok();
            let range = first.split_once('-').and_then(|(a, b)| Some(hex(a)?..hex(b)?));
            is_guest = range.is_some_and(|range| {
                spans.iter().any(|span| span.start < range.end && range.start < span.end)
            });
            continue;
        };
        let bytes = words.next().and_then(|word| word.parse::<u64>().ok()).unwrap_or(0) << 10;
        match field {
            _ if !is_guest => {}
            "Rss" => rss = bytes,
            "Pss" => saves += rss.saturating_sub(bytes),
            "KSM" => merged = Some(merged.unwrap_or(0) + bytes),
            _ => {}
        }
    }
    (merged, saves)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_guests_memory_counts() {
        let smaps = "7f00-8000 rw-p 00000000 00:00 0 \nRss: 8 kB\nPss: 4 kB\nKSM: 4 kB\n\
                     8000-a000 rw-p 00000000 00:00 0 \nRss: 100 kB\nPss: 40 kB\nPss_Dirty: 9 kB\nKSM: 64 kB\n\
                     a000-b000 rw-p 00000000 00:00 0 [heap]\nRss: 12 kB\nPss: 2 kB\nKSM: 8 kB\n";
        let of = |text, start, end| parse(text, std::slice::from_ref(&(start..end)));
        assert_eq!(of(smaps, 0x8000, 0xa000), (Some(64 << 10), 60 << 10));
        assert_eq!(of(smaps, 0x9000, 0xb000), (Some(72 << 10), 70 << 10));
        assert_eq!(of("what\n", 0x8000, 0xa000), (None, 0));
    }
}
