//! One stretch of the frame space of a [`PageSet`](crate::PageSet): full, or a bitmap.

use crate::Run;

/// Frames in a chunk: 128 MiB of guest memory, a bitmap of 4 KiB.
pub(crate) const CHUNK_FRAMES: u64 = 1 << CHUNK_SHIFT;
pub(crate) const CHUNK_SHIFT: u32 = 15;
const WORDS: usize = 512;
/// A frame's place in its chunk and a chunk's population both fit.
pub(crate) const CHUNK_FRAMES_U32: u32 = 1 << CHUNK_SHIFT;

/// What one chunk holds; never nothing, and `Bits` never everything.
#[derive(Clone, PartialEq, Eq)]
pub(crate) enum Chunk {
    Full,
    Bits(Bits),
}

#[derive(Clone, PartialEq, Eq)]
pub(crate) struct Bits {
    pub(crate) count: u32,
    pub(crate) words: Box<[u64; WORDS]>,
}

/// A stretch of frames inside one chunk: `lo..hi`, counted from the chunk's first frame.
#[derive(Clone, Copy)]
pub(crate) struct Piece {
    pub(crate) chunk: u64,
    pub(crate) lo: u32,
    pub(crate) hi: u32,
}

impl Piece {
    pub(crate) fn is_whole(self) -> bool {
        self.lo == 0 && self.hi == CHUNK_FRAMES_U32
    }

    /// The words that the piece touches, each with the mask of its bits in the piece.
    pub(crate) fn words(self) -> impl Iterator<Item = (usize, u64)> {
        let (first, last) = (self.lo / 64, self.hi.div_ceil(64));
        (first..last).map(move |w| {
            let low = self.lo.saturating_sub(w * 64);
            let high = (self.hi - w * 64).min(64);
            (w as usize, (u64::MAX >> (64 - (high - low))) << low)
        })
    }
}

/// Place of `gfn` inside its chunk.
pub(crate) fn offset(gfn: u64) -> u32 {
    (gfn & (CHUNK_FRAMES - 1)) as u32
}

/// Cuts a run at chunk borders.
pub(crate) fn pieces(run: Run) -> impl Iterator<Item = Piece> {
    let (mut at, end) = (run.start, run.end());
    std::iter::from_fn(move || {
        if at >= end {
            return None;
        }
        let (chunk, lo) = (at >> CHUNK_SHIFT, offset(at));
        let pages = (end - at).min(u64::from(CHUNK_FRAMES_U32 - lo));
        at += pages;
        let hi =
            if pages == u64::from(CHUNK_FRAMES_U32 - lo) { CHUNK_FRAMES_U32 } else { offset(at) };
        Some(Piece { chunk, lo, hi })
    })
}

impl Bits {
    pub(crate) fn empty() -> Self {
        Self { count: 0, words: Box::new([0; WORDS]) }
    }

    pub(crate) fn full() -> Self {
        Self { count: CHUNK_FRAMES_U32, words: Box::new([u64::MAX; WORDS]) }
    }

    pub(crate) fn or(&mut self, word: usize, bits: u64) {
        let w = &mut self.words[word];
        self.count += (bits & !*w).count_ones();
        *w |= bits;
    }

    pub(crate) fn clear(&mut self, word: usize, bits: u64) {
        let w = &mut self.words[word];
        self.count -= (bits & *w).count_ones();
        *w &= !bits;
    }

    /// The first member, or non-member if `flip` is all ones, in `from..limit`.
    pub(crate) fn find(&self, from: u32, limit: u32, flip: u64) -> Option<u32> {
        if from >= limit {
            return None;
        }
        let mut word = from / 64;
        let mut bits = (self.words[word as usize] ^ flip) & (u64::MAX << (from % 64));
        while bits == 0 {
            word += 1;
            if word * 64 >= limit {
                return None;
            }
            bits = self.words[word as usize] ^ flip;
        }
        Some(word * 64 + bits.trailing_zeros()).filter(|found| *found < limit)
    }
}

impl Chunk {
    pub(crate) fn count(&self) -> u32 {
        match self {
            Self::Full => CHUNK_FRAMES_U32,
            Self::Bits(bits) => bits.count,
        }
    }

    /// Makes a bitmap the chunk that it stands for; `None` is the empty one.
    pub(crate) fn canonical(bits: Bits) -> Option<Self> {
        match bits.count {
            0 => None,
            CHUNK_FRAMES_U32 => Some(Self::Full),
            _ => Some(Self::Bits(bits)),
        }
    }

    pub(crate) fn into_bits(self) -> Bits {
        match self {
            Self::Full => Bits::full(),
            Self::Bits(bits) => bits,
        }
    }

    pub(crate) fn contains(&self, at: u32) -> bool {
        match self {
            Self::Full => true,
            Self::Bits(bits) => bits.words[(at / 64) as usize] >> (at % 64) & 1 == 1,
        }
    }

    pub(crate) fn count_in(&self, piece: Piece) -> u32 {
        match self {
            Self::Full => piece.hi - piece.lo,
            Self::Bits(bits) if piece.is_whole() => bits.count,
            Self::Bits(bits) => {
                piece.words().map(|(w, mask)| (bits.words[w] & mask).count_ones()).sum()
            }
        }
    }
}

/// Numbers of the chunks that `run` touches.
pub(crate) fn chunk_range(run: Run) -> std::ops::Range<u64> {
    if run.end() <= run.start {
        return 0..0;
    }
    run.start >> CHUNK_SHIFT..((run.end() - 1) >> CHUNK_SHIFT) + 1
}
