//! The frame on the wire: header, run table, payload.
//!
//! ```text
//!  0 magic u32 | 4 codec u8 | 5 zero u8 | 6 runs u16 | 8 round u32 | 12 payload bytes u32
//! 16 pages u64 | 24 digest u64 | 32 check u64
//! 40 runs × { first frame u64, pages u64 }, ascending and disjoint
//!    payload
//! ```
//! All little endian. `digest` is the wrapping sum of the pages' digests ([`page_digest`]), 0 for zero
//! pages, and of their [`page_check`]s where they are the same as at the destination; `check` is xxh3 of the 32 bytes before it and of the run table. Between them they cover every
//! byte of a frame.
//!
//! [`page_digest`]: crate::page_digest
//! [`page_check`]: crate::page_check

use ferry_pages::{Layout, PAGE_BYTES, Run};
use xxhash_rust::xxh3::Xxh3Default;

use crate::{Codec, MAX_BATCH_BYTES, MAX_BATCH_PAGES, MAX_ZERO_RUNS};

/// Bytes of a frame's header.
pub const HEADER_BYTES: usize = 40;
/// Bytes of one entry of the run table.
pub const RUN_BYTES: usize = 16;

const MAGIC: u32 = u32::from_le_bytes(*b"fPg1");
const CHECKED_BYTES: usize = 32;

/// Why bytes are not a batch of pages that may be given to a guest.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// The stream is not at the beginning of a frame.
    #[error("page frame: begins with {0:#010x}, which is not a frame's magic number")]
    Magic(u32),
    /// A codec that this version does not know.
    #[error("page frame: codec number {0} is unknown")]
    UnknownCodec(u8),
    /// A codec that was not negotiated.
    #[error("page frame: codec {0} was not negotiated for this session")]
    CodecNotAllowed(Codec),
    /// A byte that must be zero is not.
    #[error("page frame: reserved byte is {0:#04x}, must be 0")]
    Reserved(u8),
    /// No runs, or more than one batch may have.
    #[error("page frame: {runs} runs in a {codec} batch, allowed are 1 to {max}")]
    Runs {
        /// The batch's codec.
        codec: Codec,
        /// Runs announced.
        runs: usize,
        /// Most that are allowed.
        max: usize,
    },
    /// Fewer pages than runs, or more than one batch may have.
    #[error(
        "page frame: {pages} pages in {runs} runs of a {codec} batch, allowed are {runs} to {max}"
    )]
    Pages {
        /// The batch's codec.
        codec: Codec,
        /// Runs announced.
        runs: usize,
        /// Pages announced.
        pages: u64,
        /// Most that are allowed.
        max: u64,
    },
    /// A payload that cannot be the one of that many pages.
    #[error("page frame: payload of {payload_bytes} bytes for {pages} pages in a {codec} batch")]
    Payload {
        /// The batch's codec.
        codec: Codec,
        /// Bytes announced.
        payload_bytes: u32,
        /// Pages announced.
        pages: u64,
    },
    /// Fewer or more bytes than the header announces.
    #[error("page frame: {found} bytes where {expected} belong")]
    Length {
        /// Bytes needed.
        expected: usize,
        /// Bytes there.
        found: usize,
    },
    /// Header or run table is not what was sent.
    #[error(
        "page frame: header or run table is damaged: check {found:#018x}, expected {expected:#018x}"
    )]
    Check {
        /// Of what came.
        found: u64,
        /// As sent.
        expected: u64,
    },
    /// A run with pages that the machine does not have.
    #[error(
        "page frame: run {index} (frame {start:#x}, {pages} pages) is empty or outside the machine's memory layout"
    )]
    OutsideLayout {
        /// Place in the run table.
        index: usize,
        /// First frame.
        start: u64,
        /// Length in pages.
        pages: u64,
    },
    /// A run that begins before the one in front of it ends.
    #[error("page frame: run {index} (frame {start:#x}) overlaps or precedes run {}", index - 1)]
    Overlap {
        /// Place in the run table.
        index: usize,
        /// First frame.
        start: u64,
    },
    /// The runs do not add up to the pages announced.
    #[error("page frame: runs hold {found} pages, the header announces {expected}")]
    PageCount {
        /// As announced.
        expected: u64,
        /// Sum over the runs.
        found: u64,
    },
    /// A payload that does not decompress to exactly its pages.
    #[error("page frame: {codec} payload does not decompress to {pages} pages: {why}")]
    Decompress {
        /// The batch's codec.
        codec: Codec,
        /// Pages announced.
        pages: u64,
        /// The decompressor's word.
        why: String,
    },
    /// The pages are not what was sent.
    #[error(
        "page frame: pages from frame {start:#x} are damaged: digest {found:#018x}, expected {expected:#018x}"
    )]
    Digest {
        /// First frame of the batch.
        start: u64,
        /// Of what came.
        found: u64,
        /// As sent.
        expected: u64,
    },
}

/// The header of a batch frame. Its lengths and counts are within bounds when it comes from
/// [`parse_header`]; that its run table and pages are right is known after [`Decoder::decode`].
///
/// [`Decoder::decode`]: crate::Decoder::decode
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BatchHeader {
    /// How the payload is written.
    pub codec: Codec,
    /// The round in which the pages were read.
    pub round: u32,
    /// Entries of the run table.
    pub runs: u16,
    /// Pages in all runs.
    pub pages: u64,
    /// Bytes after the run table.
    pub payload_bytes: u32,
    /// Wrapping sum of the pages' digests, or checks.
    pub digest: u64,
    /// xxh3 of the header up to here and of the run table.
    pub check: u64,
}

impl BatchHeader {
    /// Bytes of run table and payload: what follows the header.
    pub fn body_bytes(&self) -> usize {
        // 32 bits fit a usize on every host that Ferry runs on.
        usize::from(self.runs) * RUN_BYTES + self.payload_bytes as usize
    }

    pub(crate) fn check_of(&self, table: &[u8]) -> u64 {
        let mut hash = Xxh3Default::new();
        hash.update(&self.to_bytes()[..CHECKED_BYTES]);
        hash.update(table);
        hash.digest()
    }

    pub(crate) fn to_bytes(self) -> [u8; HEADER_BYTES] {
        let mut out = [0; HEADER_BYTES];
        out[0..4].copy_from_slice(&MAGIC.to_le_bytes());
        out[4] = self.codec.to_wire();
        out[6..8].copy_from_slice(&self.runs.to_le_bytes());
        out[8..12].copy_from_slice(&self.round.to_le_bytes());
        out[12..16].copy_from_slice(&self.payload_bytes.to_le_bytes());
        out[16..24].copy_from_slice(&self.pages.to_le_bytes());
        out[24..32].copy_from_slice(&self.digest.to_le_bytes());
        out[32..40].copy_from_slice(&self.check.to_le_bytes());
        out
    }

    /// Checks that counts and lengths are within their bounds and fit each other.
    fn bounded(self) -> Result<Self, FrameError> {
        let Self { codec, pages, payload_bytes, .. } = self;
        let runs = usize::from(self.runs);
        let (max_runs, max_pages) = match codec {
            Codec::Zero => (MAX_ZERO_RUNS, Layout::MAX_FRAME),
            Codec::Raw | Codec::Lz4 | Codec::Zstd | Codec::Same | Codec::Packed => {
                (MAX_BATCH_PAGES, MAX_BATCH_PAGES as u64)
            }
        };
        if runs == 0 || runs > max_runs {
            return Err(FrameError::Runs { codec, runs, max: max_runs });
        }
        if pages < runs as u64 || pages > max_pages {
            return Err(FrameError::Pages { codec, runs, pages, max: max_pages });
        }
        let raw = pages * PAGE_BYTES as u64;
        let payload = u64::from(payload_bytes);
        let fits = match codec {
            Codec::Zero | Codec::Same => payload == 0,
            Codec::Raw => payload == raw,
            Codec::Lz4 | Codec::Zstd => payload > 0 && payload < raw,
            Codec::Packed => payload > 0 && payload <= MAX_BATCH_BYTES as u64,
        };
        if !fits {
            return Err(FrameError::Payload { codec, payload_bytes, pages });
        }
        Ok(self)
    }
}

/// Reads a frame's header: the first [`HEADER_BYTES`] of `bytes`. What follows it on the wire is
/// [`BatchHeader::body_bytes`] long, no more than [`MAX_FRAME_BYTES`](crate::MAX_FRAME_BYTES).
///
/// # Errors
/// Not a header, or one with a count or length out of bounds.
pub fn parse_header(bytes: &[u8]) -> Result<BatchHeader, FrameError> {
    let Some(header) = bytes.first_chunk::<HEADER_BYTES>() else {
        return Err(FrameError::Length { expected: HEADER_BYTES, found: bytes.len() });
    };
    let u16_at = |i: usize| u16::from_le_bytes([header[i], header[i + 1]]);
    let u32_at = |i: usize| u32::from(u16_at(i)) | u32::from(u16_at(i + 2)) << 16;
    let u64_at = |i: usize| u64::from(u32_at(i)) | u64::from(u32_at(i + 4)) << 32;
    if u32_at(0) != MAGIC {
        return Err(FrameError::Magic(u32_at(0)));
    }
    let codec = Codec::from_wire(header[4]).ok_or(FrameError::UnknownCodec(header[4]))?;
    if header[5] != 0 {
        return Err(FrameError::Reserved(header[5]));
    }
    BatchHeader {
        codec,
        runs: u16_at(6),
        round: u32_at(8),
        payload_bytes: u32_at(12),
        pages: u64_at(16),
        digest: u64_at(24),
        check: u64_at(32),
    }
    .bounded()
}

/// What goes in front of a payload.
pub(crate) struct Preamble<'a> {
    pub(crate) round: u32,
    /// At most [`MAX_ZERO_RUNS`].
    pub(crate) runs: &'a [Run],
    pub(crate) digest: u64,
}

impl Preamble<'_> {
    /// Bytes of header and run table.
    pub(crate) fn bytes(&self) -> usize {
        HEADER_BYTES + self.runs.len() * RUN_BYTES
    }

    /// Writes header and run table into `out`, which is [`bytes`](Self::bytes) long.
    pub(crate) fn write(&self, codec: Codec, payload_bytes: usize, out: &mut [u8]) {
        let (head, table) = out.split_at_mut(HEADER_BYTES);
        for (run, entry) in self.runs.iter().zip(table.as_chunks_mut::<RUN_BYTES>().0) {
            entry[..8].copy_from_slice(&run.start.to_le_bytes());
            entry[8..].copy_from_slice(&run.pages.to_le_bytes());
        }
        let mut header = BatchHeader {
            codec,
            round: self.round,
            runs: u16::try_from(self.runs.len()).expect("a batch has at most 4096 runs"),
            pages: self.runs.iter().map(|run| run.pages).sum(),
            payload_bytes: u32::try_from(payload_bytes).expect("a payload is at most 1 MiB"),
            digest: self.digest,
            check: 0,
        };
        header.check = header.check_of(table);
        head.copy_from_slice(&header.to_bytes());
    }
}

/// Reads a run table into `runs`, checking every run against `layout` and its neighbours.
pub(crate) fn read_table(
    header: &BatchHeader,
    table: &[u8],
    layout: &Layout,
    runs: &mut Vec<Run>,
) -> Result<(), FrameError> {
    let found = header.check_of(table);
    if found != header.check {
        return Err(FrameError::Check { found, expected: header.check });
    }
    runs.clear();
    let (mut end, mut pages) = (0, 0);
    for (index, entry) in table.as_chunks::<RUN_BYTES>().0.iter().enumerate() {
        let [start, length] =
            [0, 8].map(|at| u64::from_le_bytes(std::array::from_fn(|i| entry[at + i])));
        let run = Run::new(start, length);
        if !layout.contains(run) {
            return Err(FrameError::OutsideLayout { index, start, pages: length });
        }
        if start < end {
            return Err(FrameError::Overlap { index, start });
        }
        end = run.end();
        pages += length;
        runs.push(run);
    }
    if pages != header.pages {
        return Err(FrameError::PageCount { expected: header.pages, found: pages });
    }
    Ok(())
}
