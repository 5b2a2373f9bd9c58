//! Page codecs, batch frames and the choice of codec (pure).
//!
//! A *batch frame* carries pages of one machine, all by one [`Codec`]: a header of fixed size, a table
//! of runs (which pages), and a payload (their bytes). [`BatchBuilder`] makes frames out of guest pages
//! with one copy, one zero test and one hash of each page; [`Decoder`] takes frames apart and believes
//! nothing in them; [`CodecChooser`] says which codec costs the least time.
//!
//! No clock, thread, socket or `unsafe`. This crate does not know where a page lives on the host, nor
//! what carries the frames.

mod builder;
mod chooser;
mod codec;
mod compress;
mod decoder;
mod frame;
mod packed;
mod page;

pub use builder::{BatchBuilder, Built, NotTaken, zero_frames};
pub use chooser::CodecChooser;
pub use codec::{Codec, CodecSet};
pub use decoder::{Batch, Decoder};
pub use frame::{BatchHeader, FrameError, HEADER_BYTES, RUN_BYTES, parse_header};
pub use packed::{PackedBuilder, PackedPage, Packer};
pub use page::{is_zero, page_check, page_digest};

use ferry_pages::PAGE_BYTES;

/// Most pages in one data batch (raw, lz4, zstd): 1 MiB of guest memory.
pub const MAX_BATCH_PAGES: usize = 256;
/// Most runs in one zero batch. A run may be as long as the layout allows.
pub const MAX_ZERO_RUNS: usize = 4096;
/// Most bytes of pages in one data batch.
pub const MAX_BATCH_BYTES: usize = MAX_BATCH_PAGES * PAGE_BYTES;
/// No frame is larger than this, header included.
pub const MAX_FRAME_BYTES: usize = HEADER_BYTES + MAX_BATCH_PAGES * RUN_BYTES + MAX_BATCH_BYTES;
