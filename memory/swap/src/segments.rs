//! The file's room, in segments that are written as a whole. Pure.

/// Bytes of a segment.
pub(crate) const SEGMENT_BYTES: usize = 256 << 10;

/// Where a blob is in the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Place {
    pub(crate) segment: u32,
    pub(crate) at: usize,
    pub(crate) bytes: u16,
}

impl Place {
    /// Byte of the file.
    pub(crate) fn offset(self) -> u64 {
        u64::from(self.segment) * SEGMENT_BYTES as u64 + self.at as u64
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Use {
    Free,
    /// Being written.
    Taken,
    /// So many bytes are of use.
    Live(u32),
}

/// What each segment is used for.
#[derive(Debug, Default)]
pub(crate) struct Segments {
    segments: Vec<Use>,
    free: Vec<u32>,
    live: u64,
}

impl Segments {
    /// Whole segments in `bytes`.
    pub(crate) fn new(bytes: u64) -> Self {
        let count = u32::try_from(bytes / SEGMENT_BYTES as u64).unwrap_or(u32::MAX);
        Self {
            segments: vec![Use::Free; count as usize],
            free: (0..count).rev().collect(),
            live: 0,
        }
    }

    pub(crate) fn live_bytes(&self) -> u64 {
        self.live
    }

    /// How many are free.
    pub(crate) fn free(&self) -> usize {
        self.free.len()
    }

    /// Takes a free one to write to.
    pub(crate) fn take(&mut self) -> Option<u32> {
        let segment = self.free.pop()?;
        self.segments[segment as usize] = Use::Taken;
        Some(segment)
    }

    /// A segment that was taken was written, or not: it is free if nothing of it is of use.
    pub(crate) fn settle(&mut self, segment: u32) {
        if matches!(self.segments[segment as usize], Use::Taken | Use::Live(0)) {
            self.segments[segment as usize] = Use::Free;
            self.free.push(segment);
        }
    }

    /// `place` is of use.
    pub(crate) fn fill(&mut self, place: Place) {
        self.live += u64::from(place.bytes);
        let segment = &mut self.segments[place.segment as usize];
        *segment = match *segment {
            Use::Live(bytes) => Use::Live(bytes + u32::from(place.bytes)),
            Use::Free | Use::Taken => Use::Live(place.bytes.into()),
        };
    }

    /// `place` is of no use any more.
    pub(crate) fn release(&mut self, place: Place) {
        let segment = &mut self.segments[place.segment as usize];
        if let Use::Live(bytes) = segment {
            self.live -= u64::from(place.bytes);
            *bytes -= u32::from(place.bytes).min(*bytes);
            if *bytes == 0 {
                self.settle(place.segment);
            }
        }
    }

    /// The two with the least of use, which fit into one.
    pub(crate) fn emptiest_two(&self) -> Vec<u32> {
        let live = (0u32..).zip(&self.segments).filter_map(|(number, used)| match used {
            Use::Live(bytes) => Some((*bytes as usize, number)),
            Use::Free | Use::Taken => None,
        });
        let mut live: Vec<(usize, u32)> = live.collect();
        live.sort_unstable();
        live.truncate(2);
        match live[..] {
            [(a, first), (b, second)] if a + b <= SEGMENT_BYTES => vec![first, second],
            _ => Vec::new(),
        }
    }
}
