//! Which codec costs the least time, from what was seen so far.
//!
//! One thread encodes a batch and then gives it to the link, so the two times add up. For a byte of
//! guest memory a codec costs
//!
//! ```text
//! cost = encode_ns_per_byte + ratio × link_ns_per_byte        (raw: 0 + 1 × link)
//! ```
//! and the cheapest one is taken. Speed and ratio of each codec are moving averages of whole batches,
//! and of *samples*: one page of a batch compressed to see whether the batch is worth it. The codec in
//! favour is sampled in every batch (a 256th of its work) and stands back from a batch whose sample
//! does not shrink; the others are sampled once in [`SAMPLE_EVERY`] batches, and only while the link is
//! slow enough for them to have a chance. So no batch is burned on a hopeless codec, and a change in
//! what memory holds or in the link's rate is noticed soon.

use std::time::Duration;

use crate::{Codec, CodecSet};

/// Batches between two samples of a codec that is not in favour.
const SAMPLE_EVERY: u32 = 64;
/// Weight of a new whole batch in the averages.
const BATCH_WEIGHT: f64 = 0.25;
/// Weight of a new sample of the codec in favour: a page is noisy.
const SAMPLE_WEIGHT: f64 = 0.125;
/// Weight of a new sample of another codec: it is all that is known of it.
const EXPLORE_WEIGHT: f64 = 0.5;
/// A sample with a larger ratio calls its batch incompressible.
const HOPELESS_RATIO: f64 = 0.95;
/// Being interrupted makes a codec seem slow: a measured time counts for no more than this many times
/// the average so far, and for no less than its inverse.
const OUTLIER: f64 = 4.0;

#[derive(Clone, Copy, Debug)]
struct Candidate {
    codec: Codec,
    ns_per_byte: f64,
    /// None until it was sampled.
    ratio: Option<f64>,
    vetoed: bool,
}

impl Candidate {
    fn learn(&mut self, raw: usize, encoded: usize, elapsed: Duration, weight: f64) {
        if raw == 0 {
            return;
        }
        let raw = raw as f64;
        let ratio = encoded as f64 / raw;
        let ns = (elapsed.as_secs_f64() * 1e9 / raw)
            .clamp(self.ns_per_byte / OUTLIER, self.ns_per_byte * OUTLIER);
        self.ns_per_byte += weight * (ns - self.ns_per_byte);
        self.ratio = Some(self.ratio.map_or(ratio, |old| old + weight * (ratio - old)));
    }

    fn cost(&self, link_ns_per_byte: f64) -> f64 {
        self.ratio.map_or(f64::INFINITY, |ratio| self.ns_per_byte + ratio * link_ns_per_byte)
    }
}

/// Chooses a codec for each batch.
///
/// For each batch: [`begin_batch`](Self::begin_batch), a [`sampled`](Self::sampled) for each codec that
/// it asks for, [`choose`](Self::choose), [`encoded`](Self::encoded).
/// [`BatchBuilder::finish_chosen`](crate::BatchBuilder::finish_chosen) does all four.
#[derive(Clone, Debug)]
pub struct CodecChooser {
    /// The compressing codecs that were negotiated.
    candidates: Vec<Candidate>,
    link_ns_per_byte: f64,
    batches: u32,
}

impl CodecChooser {
    /// A chooser among the `allowed` codecs, which knows nothing yet: it takes raw until the link's rate
    /// is told.
    pub fn new(allowed: CodecSet) -> Self {
        // Where the averages begin: single-core speeds on small inputs, corrected by what is seen.
        let candidates = [(Codec::Lz4, 1.7), (Codec::Zstd, 2.5)]
            .into_iter()
            .filter(|(codec, _)| allowed.contains(*codec))
            .map(|(codec, ns_per_byte)| Candidate {
                codec,
                ns_per_byte,
                ratio: None,
                vetoed: false,
            })
            .collect();
        Self { candidates, link_ns_per_byte: 0.0, batches: 0 }
    }

    /// Tells the rate at which the link takes bytes, in bytes per second: as observed, or the cap that
    /// the operator set where that is lower.
    pub fn set_link_rate(&mut self, bytes_per_second: f64) {
        if bytes_per_second > 0.0 {
            self.link_ns_per_byte = 1e9 / bytes_per_second;
        }
    }

    /// Begins a batch; returns the codecs of which it wants a sample.
    pub fn begin_batch(&mut self) -> Vec<Codec> {
        let favourite = self.favourite();
        let explore = self.batches.is_multiple_of(SAMPLE_EVERY);
        self.batches = self.batches.wrapping_add(1);
        let link = self.link_ns_per_byte;
        self.candidates.iter_mut().for_each(|c| c.vetoed = false);
        self.candidates
            .iter()
            .filter(|c| {
                // Even at ratio 0 it must cost less than raw; half its average, which may be too high.
                let has_a_chance = c.ns_per_byte / 2.0 < link;
                c.codec == favourite || has_a_chance && (explore || c.ratio.is_none())
            })
            .map(|c| c.codec)
            .collect()
    }

    /// Tells that one page of `raw` bytes became `encoded` bytes in `elapsed`.
    pub fn sampled(&mut self, codec: Codec, raw: usize, encoded: usize, elapsed: Duration) {
        let weight = if codec == self.favourite() { SAMPLE_WEIGHT } else { EXPLORE_WEIGHT };
        if let Some(candidate) = self.candidate(codec) {
            candidate.learn(raw, encoded, elapsed, weight);
            candidate.vetoed = encoded as f64 > HOPELESS_RATIO * raw as f64;
        }
    }

    /// The codec for this batch.
    pub fn choose(&self) -> Codec {
        // What one codec could not shrink, another will not to any use.
        if self.candidates.iter().any(|c| c.vetoed) { Codec::Raw } else { self.favourite() }
    }

    /// Tells that a batch of `raw` bytes became `encoded` bytes in `elapsed` by `codec` (`encoded` =
    /// `raw` where it did not shrink).
    pub fn encoded(&mut self, codec: Codec, raw: usize, encoded: usize, elapsed: Duration) {
        if let Some(candidate) = self.candidate(codec) {
            candidate.learn(raw, encoded, elapsed, BATCH_WEIGHT);
        }
    }

    fn favourite(&self) -> Codec {
        self.candidates
            .iter()
            .map(|c| (c.cost(self.link_ns_per_byte), c.codec))
            .filter(|(cost, _)| *cost < self.link_ns_per_byte)
            .min_by(|a, b| a.0.total_cmp(&b.0))
            .map_or(Codec::Raw, |(_, codec)| codec)
    }

    fn candidate(&mut self, codec: Codec) -> Option<&mut Candidate> {
        self.candidates.iter_mut().find(|c| c.codec == codec)
    }
}
