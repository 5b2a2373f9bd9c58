//! Pages of a chain by their place: a frame at a time, the last one kept.

use std::ops::Deref;

use ferry_codec::{CodecSet, Decoder, HEADER_BYTES, parse_header};
use ferry_pages::PAGE_BYTES;

use crate::{BundleError, Chain, Haste};

/// Reads pages of a chain, in any order. Each thread has its own; the chain is shared.
pub struct Pages<C> {
    chain: C,
    haste: Haste,
    decoder: Decoder,
    /// The bytes of a frame, and perhaps some that follow it.
    bytes: Vec<u8>,
    /// The frame that is in `raw`: its layer, and where it begins.
    now: Option<(usize, u64)>,
    raw: Vec<u8>,
    digests: Vec<u64>,
}

impl<C: Deref<Target = Chain>> Pages<C> {
    /// A reader of `chain`, which is an `Arc` where it must outlive its owner's scope.
    pub fn new(chain: C) -> Self {
        let decoder = Decoder::new(chain.layout().clone(), CodecSet::ALL);
        let (bytes, raw, digests) = (Vec::new(), Vec::new(), Vec::new());
        Self { chain, haste: Haste::Ahead, decoder, bytes, now: None, raw, digests }
    }

    /// A reader of pages that a machine waits for.
    pub fn waited_for(chain: C) -> Self {
        Self { haste: Haste::Waited, ..Self::new(chain) }
    }

    /// The content of the page at frame `gfn`, verified; none if it is zero.
    ///
    /// # Errors
    /// Its frame cannot be read, or is damaged.
    pub fn page(&mut self, gfn: u64) -> Result<Option<&[u8]>, BundleError> {
        let Some(place) = self.chain.place_of(gfn) else { return Ok(None) };
        self.run(place.layer, place.at, place.first, &[place.digest]).map(Some)
    }

    /// Calls `each` with the first page and the content of `gfn`, and then of every run of pages that counts
    /// of the same frame, verified: reading one page has read them all. Not at all if the page is zero.
    ///
    /// # Errors
    /// The frame cannot be read, or is damaged; or what `each` returned.
    pub fn frame<E: From<BundleError>>(
        &mut self,
        gfn: u64,
        mut each: impl FnMut(u64, &[u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        let Some(place) = self.chain.place_of(gfn) else { return Ok(()) };
        each(gfn, self.run(place.layer, place.at, place.first, &[place.digest])?)?;
        for number in 0..self.chain.pieces_at(place).len() {
            let piece = self.chain.pieces_at(place)[number];
            let first = usize::try_from(piece.first).unwrap_or(usize::MAX);
            let digests = self.chain.digests(&piece).to_vec();
            each(piece.run.start, self.run(place.layer, place.at, first, &digests)?)?;
        }
        Ok(())
    }

    /// The pages from number `first` of the frame at `at` of bundle `layer`: as many as `digests`, which
    /// they must have.
    pub(crate) fn run(
        &mut self,
        layer: usize,
        at: u64,
        first: usize,
        digests: &[u64],
    ) -> Result<&[u8], BundleError> {
        if self.now != Some((layer, at)) {
            self.now = None;
            self.load(layer, at)?;
            self.now = Some((layer, at));
        }
        // The digest of a page depends on its frame number: these are the pages that are meant.
        let pages = first..first.saturating_add(digests.len());
        if self.digests.get(pages.clone()) != Some(digests) {
            let path = self.chain.layers()[layer].memory_path();
            let why =
                format!("the frame of pages at byte {at} is not the one that the index means");
            return Err(BundleError::damaged(&path, why));
        }
        Ok(&self.raw[pages.start * PAGE_BYTES..pages.end * PAGE_BYTES])
    }

    fn load(&mut self, layer: usize, at: u64) -> Result<(), BundleError> {
        let guess = self.chain.frame_bytes(layer, at);
        let layer = &self.chain.layers()[layer];
        let path = layer.memory_path();
        let failed = |e| BundleError::io("read", &path)(e);
        let wrong = |source| BundleError::Frame { path: path.clone(), at, source };
        // Header and body at once: on another host's disk, each read costs a round trip.
        self.bytes.resize(guess, 0);
        layer.memory.read_exact_at(&mut self.bytes, at, self.haste).map_err(failed)?;
        let header = parse_header(&self.bytes).map_err(wrong)?;
        // At most a little more than 1 MiB, by the header's bounds.
        self.bytes.resize(HEADER_BYTES + header.body_bytes(), 0);
        if let Some(rest) = self.bytes.get_mut(guess..).filter(|rest| !rest.is_empty()) {
            let rest_at = at.saturating_add(guess as u64);
            layer.memory.read_exact_at(rest, rest_at, self.haste).map_err(failed)?;
        }
        let batch = self.decoder.decode(&header, &self.bytes[HEADER_BYTES..]).map_err(wrong)?;
        self.raw.clear();
        self.raw.extend_from_slice(batch.raw);
        self.digests.clear();
        self.digests.extend_from_slice(batch.digests);
        Ok(())
    }
}
