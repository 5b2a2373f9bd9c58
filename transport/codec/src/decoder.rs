//! From a frame's bytes to pages that may be given to a guest.

use ferry_pages::{Layout, PAGE_BYTES, Run};

use crate::compress::Decompressor;
use crate::frame::read_table;
use crate::packed::{split, unpack};
use crate::{
    BatchHeader, Codec, CodecSet, FrameError, MAX_BATCH_BYTES, PackedPage, RUN_BYTES, page_digest,
};

/// A batch whose pages were verified, or are named only ([`Codec::Same`]).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Batch<'a> {
    /// The round in which the pages were read at the source.
    pub round: u32,
    /// How they came.
    pub codec: Codec,
    /// Which pages: ascending, disjoint, inside the layout.
    pub runs: &'a [Run],
    /// The bytes of the pages, one after the other in the order of `runs`; empty for [`Codec::Zero`] and
    /// [`Codec::Same`].
    pub raw: &'a [u8],
    /// The digest of each page of `raw`.
    pub digests: &'a [u64],
    /// Of [`Codec::Same`], the wrapping sum of the [`page_check`](crate::page_check)s that the pages must have.
    pub checks: u64,
    /// Of [`Codec::Packed`], how each page came, and its bytes so written.
    pub kept: Vec<(Codec, &'a [u8])>,
}

impl<'a> Batch<'a> {
    /// Each run with its bytes (none where there is no `raw`).
    pub fn run_bytes(&self) -> impl Iterator<Item = (Run, &'a [u8])> + use<'a> {
        let mut rest = self.raw;
        self.runs.iter().map(move |run| {
            // A data batch is no longer than MAX_BATCH_BYTES; others have no bytes to take.
            let bytes = usize::try_from(run.pages).unwrap_or(0).saturating_mul(PAGE_BYTES);
            let (these, after) = rest.split_at(bytes.min(rest.len()));
            rest = after;
            (*run, these)
        })
    }

    /// Of [`Codec::Packed`], each page as it came.
    pub fn packed(&self) -> impl Iterator<Item = PackedPage<'a>> + use<'a, '_> {
        let gfns = self.runs.iter().flat_map(|run| run.start..run.end());
        let pages = gfns.zip(self.digests).zip(&self.kept);
        pages.map(|((gfn, digest), (codec, bytes))| PackedPage {
            gfn,
            codec: *codec,
            bytes,
            digest: *digest,
        })
    }

    /// How many pages.
    pub fn pages(&self) -> u64 {
        self.runs.iter().map(|run| run.pages).sum()
    }
}

/// Takes frames apart. One serves any number of frames of one session; it keeps at most one batch.
pub struct Decoder {
    layout: Layout,
    allowed: CodecSet,
    decompressor: Decompressor,
    runs: Vec<Run>,
    digests: Vec<u64>,
    pages: Vec<u8>,
}

impl Decoder {
    /// A decoder for a machine with memory `layout`, in a session that negotiated `allowed`.
    pub fn new(layout: Layout, allowed: CodecSet) -> Self {
        Self {
            layout,
            allowed,
            decompressor: Decompressor::default(),
            runs: Vec::new(),
            digests: Vec::new(),
            pages: Vec::new(),
        }
    }

    /// Takes apart and verifies one frame; `body` is the [`BatchHeader::body_bytes`] that followed
    /// `header`.
    ///
    /// # Errors
    /// Anything that is not as it should be; no page of such a frame is given out.
    pub fn decode<'a>(
        &'a mut self,
        header: &BatchHeader,
        body: &'a [u8],
    ) -> Result<Batch<'a>, FrameError> {
        let BatchHeader { codec, round, .. } = *header;
        if !self.allowed.contains(codec) {
            return Err(FrameError::CodecNotAllowed(codec));
        }
        if body.len() != header.body_bytes() {
            return Err(FrameError::Length { expected: header.body_bytes(), found: body.len() });
        }
        let (table, payload) = body.split_at(usize::from(header.runs) * RUN_BYTES);
        read_table(header, table, &self.layout, &mut self.runs)?;

        let mut kept = Vec::new();
        let raw = match codec {
            Codec::Zero | Codec::Same => &[],
            Codec::Raw => payload,
            Codec::Lz4 | Codec::Zstd | Codec::Packed => {
                self.pages.resize(MAX_BATCH_BYTES, 0);
                // At most MAX_BATCH_PAGES by the header's bounds; `min` for headers made by hand.
                let bytes = usize::try_from(header.pages)
                    .unwrap_or(usize::MAX)
                    .saturating_mul(PAGE_BYTES)
                    .min(MAX_BATCH_BYTES);
                let out = &mut self.pages[..bytes];
                let unpacked = match codec {
                    Codec::Packed => split(payload, header.pages).and_then(|pages| {
                        kept = pages;
                        let pages = kept.iter().zip(out.as_chunks_mut::<PAGE_BYTES>().0);
                        pages.into_iter().try_for_each(|((codec, bytes), page)| {
                            unpack(&mut self.decompressor, *codec, bytes, page)
                        })
                    }),
                    _ => self.decompressor.decompress(codec, payload, out),
                };
                unpacked.map_err(|why| FrameError::Decompress {
                    codec,
                    pages: header.pages,
                    why,
                })?;
                &*out
            }
        };

        self.digests.clear();
        let gfns = self.runs.iter().flat_map(|run| run.start..run.end());
        let (pages, _) = raw.as_chunks::<PAGE_BYTES>();
        self.digests.extend(gfns.zip(pages).map(|(gfn, page)| page_digest(gfn, page)));
        let found = self.digests.iter().fold(0u64, |sum, digest| sum.wrapping_add(*digest));
        let checks = if codec == Codec::Same { header.digest } else { 0 };
        if found != header.digest && codec != Codec::Same {
            let start = self.runs.first().map_or(0, |run| run.start);
            return Err(FrameError::Digest { start, found, expected: header.digest });
        }
        Ok(Batch { round, codec, runs: &self.runs, raw, digests: &self.digests, checks, kept })
    }
}
