//! Which codec costs the least time, from what was seen so far.
//!
//! A thread encodes a batch and gives it to the link, which empties its buffers while the next one is encoded.
//! For a byte of guest memory a codec costs
//!
//! ```text
//! thread = encode_ns_per_byte + ratio × sending_ns_per_byte   (raw: 0 + 1 × sending)
//! link   = ratio × link_ns_per_byte                           (raw: 1 × link)
//! cost   = the longer of the two + an eighth of the other
//! ```
//! (they overlap, but not quite, and processors have other work), and the cheapest one is taken. Speed and ratio of
//! each codec are moving averages of whole batches,
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

/// What counts of the shorter one of two times that overlap.
const OVERLAPPED: f64 = 1.0 / 8.0;

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
    /// Time of the thread.
    sending_ns_per_byte: f64,
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
        Self { candidates, link_ns_per_byte: 0.0, sending_ns_per_byte: 0.0, batches: 0 }
    }

    /// Tells the rate at which the link takes bytes, in bytes per second: as observed, or the cap that
    /// the operator set where that is lower.
    pub fn set_link_rate(&mut self, bytes_per_second: f64) {
        if bytes_per_second > 0.0 {
            self.link_ns_per_byte = 1e9 / bytes_per_second;
        }
    }

    /// Tells that giving so many `bytes` to the link kept the thread busy for so long.
    pub fn sent(&mut self, bytes: u64, busy: Duration) {
        if bytes > 0 {
            let ns = busy.as_secs_f64() * 1e9 / bytes as f64;
            self.sending_ns_per_byte += BATCH_WEIGHT * (ns - self.sending_ns_per_byte);
        }
    }

    /// Begins a batch; returns the codecs of which it wants a sample.
    pub fn begin_batch(&mut self) -> Vec<Codec> {
        let favourite = self.favourite();
        let explore = self.batches.is_multiple_of(SAMPLE_EVERY);
        self.batches = self.batches.wrapping_add(1);
        let raw = self.cost(0.0, 1.0);
        self.candidates.iter_mut().for_each(|c| c.vetoed = false);
        self.candidates
            .iter()
            .filter(|c| {
                // Even at ratio 0 it must cost less than raw; half its average, which may be too high.
                let has_a_chance = c.ns_per_byte / 2.0 < raw;
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
        let raw = self.cost(0.0, 1.0);
        self.candidates
            .iter()
            .filter_map(|c| Some((self.cost(c.ns_per_byte, c.ratio?), c.codec)))
            .filter(|(cost, _)| *cost < raw)
            .min_by(|a, b| a.0.total_cmp(&b.0))
            .map_or(Codec::Raw, |(_, codec)| codec)
    }

    fn cost(&self, encode_ns_per_byte: f64, ratio: f64) -> f64 {
        let thread = encode_ns_per_byte + ratio * self.sending_ns_per_byte;
        let link = ratio * self.link_ns_per_byte;
        thread.max(link) + OVERLAPPED * thread.min(link)
    }

    fn candidate(&mut self, codec: Codec) -> Option<&mut Candidate> {
        self.candidates.iter_mut().find(|c| c.codec == codec)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::MAX_BATCH_BYTES;

    const PAGE: usize = 4096;
    const GBIT: f64 = 125e6;

    /// Memory in which lz4 and zstd reach these ratios, on a host with these speeds (ns per byte).
    #[derive(Clone, Copy)]
    struct World {
        lz4: (f64, f64),
        zstd: (f64, f64),
    }

    const TEXT: World = World { lz4: (0.45, 1.0 / 0.6), zstd: (0.3, 1.0 / 0.4) };
    const NOISE: World = World { lz4: (1.0, 0.3), zstd: (1.0, 0.5) };

    fn encode(world: World, codec: Codec, raw: usize) -> (usize, Duration) {
        let (ratio, ns) = match codec {
            Codec::Lz4 => world.lz4,
            Codec::Zstd => world.zstd,
            Codec::Zero | Codec::Raw | Codec::Same | Codec::Packed => (1.0, 0.0),
        };
        let times = |by: f64| (raw as f64 * by).round();
        // The tests' sizes and times are small and positive.
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
        (times(ratio) as usize, Duration::from_nanos(times(ns) as u64))
    }

    /// What was chosen for each of `batches`, and how many pages were compressed in all.
    fn run(chooser: &mut CodecChooser, world: World, batches: usize) -> (Vec<Codec>, usize) {
        let mut compressed = 0;
        let chosen = (0..batches).map(|_| {
            for codec in chooser.begin_batch() {
                let (encoded, elapsed) = encode(world, codec, PAGE);
                chooser.sampled(codec, PAGE, encoded, elapsed);
                compressed += 1;
            }
            let codec = chooser.choose();
            let (encoded, elapsed) = encode(world, codec, MAX_BATCH_BYTES);
            chooser.encoded(codec, MAX_BATCH_BYTES, encoded, elapsed);
            if codec != Codec::Raw {
                compressed += 256;
            }
            codec
        });
        let chosen = chosen.collect();
        (chosen, compressed)
    }

    fn chooser(bytes_per_second: f64) -> CodecChooser {
        let mut chooser = CodecChooser::new(CodecSet::ALL);
        chooser.set_link_rate(bytes_per_second);
        chooser
    }

    #[test]
    fn incompressible_pages_travel_raw_on_any_link_and_cost_few_samples() {
        for rate in [0.01 * GBIT, GBIT, 10.0 * GBIT, 2e9] {
            let (chosen, compressed) = run(&mut chooser(rate), NOISE, 640);
            assert!(chosen.iter().all(|codec| *codec == Codec::Raw), "at {rate}");
            assert!(compressed <= 22, "{compressed} pages compressed at {rate}");
        }
    }

    #[test]
    fn text_travels_raw_where_the_link_is_faster_than_the_codec() {
        let (chosen, compressed) = run(&mut chooser(2e9), TEXT, 640);
        assert!(chosen.iter().all(|codec| *codec == Codec::Raw));
        assert!(compressed <= 22, "{compressed}");
    }

    #[test]
    fn text_is_compressed_on_a_slow_link_from_the_first_batch() {
        // 8 ns a byte: raw costs 8, lz4 3.6 + 0.2, zstd 2.5 + 0.3.
        let (chosen, _) = run(&mut chooser(GBIT), TEXT, 100);
        assert!(chosen.iter().all(|codec| *codec != Codec::Raw));
        assert_eq!(chosen[99], Codec::Zstd);
        // 4 ns a byte: raw 4, lz4 1.8 + 0.2, zstd 2.5 + 0.2.
        let (chosen, _) = run(&mut chooser(2.0 * GBIT), TEXT, 100);
        assert_eq!(chosen[99], Codec::Lz4);
        // 1.6 ns a byte: raw 1.6, lz4 1.7 + 0.1.
        let (chosen, _) = run(&mut chooser(5.0 * GBIT), TEXT, 100);
        assert_eq!(chosen[99], Codec::Raw);
    }

    #[test]
    fn what_sending_costs_the_thread_counts_for_each_byte_sent() {
        // Raw 1.6 as the link has it, and 3 as the thread has; lz4 1.7 + 1.35.
        let mut chooser = chooser(5.0 * GBIT);
        (0..100).for_each(|_| chooser.sent(1 << 20, Duration::from_micros(3146)));
        assert_eq!(run(&mut chooser, TEXT, 100).0[99], Codec::Lz4);
        (0..100).for_each(|_| chooser.sent(1 << 20, Duration::ZERO));
        chooser.sent(0, Duration::from_secs(1));
        assert_eq!(run(&mut chooser, TEXT, 100).0[99], Codec::Raw);
    }

    #[test]
    fn only_negotiated_codecs_are_chosen() {
        let mut only_lz4 = CodecChooser::new(CodecSet::from_iter([Codec::Lz4]));
        only_lz4.set_link_rate(GBIT);
        assert_eq!(run(&mut only_lz4, TEXT, 10).0[9], Codec::Lz4);
        let mut none = CodecChooser::new(CodecSet::BASE);
        none.set_link_rate(GBIT);
        assert_eq!(run(&mut none, TEXT, 10), (vec![Codec::Raw; 10], 0));
    }

    #[test]
    fn without_a_link_rate_pages_travel_raw() {
        let (chosen, compressed) = run(&mut CodecChooser::new(CodecSet::ALL), TEXT, 100);
        assert_eq!((chosen, compressed), (vec![Codec::Raw; 100], 0));
    }

    #[test]
    fn a_batch_that_does_not_shrink_is_not_compressed_though_others_are() {
        let mut chooser = chooser(GBIT);
        run(&mut chooser, TEXT, 20);
        assert_eq!(run(&mut chooser, NOISE, 1).0, [Codec::Raw]);
        assert_ne!(run(&mut chooser, TEXT, 1).0, [Codec::Raw]);
    }

    #[test]
    fn a_change_of_memory_or_link_is_noticed() {
        let mut chooser = chooser(GBIT);
        run(&mut chooser, NOISE, 200);
        let (chosen, _) = run(&mut chooser, TEXT, 200);
        assert_ne!(chosen[199], Codec::Raw, "text after noise");
        chooser.set_link_rate(2e9);
        assert_eq!(run(&mut chooser, TEXT, 1).0, [Codec::Raw], "a faster link");
        chooser.set_link_rate(GBIT);
        assert_ne!(run(&mut chooser, TEXT, 1).0, [Codec::Raw], "a slow link again");
    }

    #[test]
    fn only_codecs_that_can_beat_the_link_are_tried_at_first() {
        // Half of 1.7 and of 2.5 ns a byte must be less than what the link takes.
        for (link_ns, tried) in
            [(0.8, &[][..]), (1.0, &[Codec::Lz4]), (1.3, &[Codec::Lz4, Codec::Zstd])]
        {
            assert_eq!(chooser(1e9 / link_ns).begin_batch(), tried, "{link_ns} ns a byte");
        }
    }

    #[test]
    fn a_new_measurement_counts_by_its_weight_and_no_more_than_four_times_what_is_known() {
        let known =
            Candidate { codec: Codec::Lz4, ns_per_byte: 2.0, ratio: Some(0.5), vetoed: false };
        for (encoded, ns, weight, expected) in [
            (500, 4000, 0.25, (2.5, 0.5)),
            (250, 2000, 0.5, (2.0, 0.375)),
            (1000, 1_000_000, 0.25, (3.5, 0.625)),
            (500, 0, 0.5, (1.25, 0.5)),
        ] {
            let mut candidate = known;
            candidate.learn(1000, encoded, Duration::from_nanos(ns), weight);
            let found = (candidate.ns_per_byte, candidate.ratio.unwrap());
            let close = |a: f64, b: f64| (a - b).abs() < 1e-9;
            assert!(close(found.0, expected.0) && close(found.1, expected.1), "{found:?}");
        }
        let mut candidate = known;
        candidate.learn(0, 0, Duration::from_secs(1), 0.5);
        assert!(candidate.ratio == known.ratio, "nothing is learnt from nothing");
    }

    #[test]
    fn a_page_of_the_codec_in_favour_says_little_and_one_of_another_codec_much() {
        let mut chooser = chooser(GBIT);
        run(&mut chooser, TEXT, 20);
        assert_eq!(chooser.choose(), Codec::Zstd);
        // From 0.3 to 0.4 by an eighth, from 0.45 to 0.8 by half.
        for (codec, tenths, least, most) in
            [(Codec::Zstd, 4, 0.305, 0.32), (Codec::Lz4, 8, 0.6, 0.65)]
        {
            chooser.sampled(codec, PAGE, PAGE * tenths / 10, Duration::from_micros(10));
            let ratio = chooser.candidate(codec).unwrap().ratio.unwrap();
            assert!((least..most).contains(&ratio), "{codec}: {ratio}");
        }
    }

    #[test]
    fn a_rate_of_nothing_is_no_rate() {
        let mut chooser = chooser(GBIT);
        run(&mut chooser, TEXT, 64);
        for rate in [0.0, -1.0, f64::NAN] {
            chooser.set_link_rate(rate);
            assert_eq!(run(&mut chooser, TEXT, 1).0, [Codec::Zstd], "as at the rate before");
        }
    }

    #[test]
    fn a_codec_that_is_slow_on_whole_batches_is_dropped_though_its_samples_are_quick() {
        let mut chooser = chooser(GBIT);
        let dropped = (0..20).any(|_| {
            for codec in chooser.begin_batch() {
                chooser.sampled(codec, PAGE, PAGE / 4, Duration::from_micros(4));
            }
            let codec = chooser.choose();
            chooser.encoded(codec, MAX_BATCH_BYTES, MAX_BATCH_BYTES / 4, Duration::from_secs(1));
            codec == Codec::Raw
        });
        assert!(dropped);
    }

    #[test]
    fn one_interruption_does_not_condemn_a_codec() {
        let mut chooser = chooser(GBIT / 2.0);
        run(&mut chooser, TEXT, 50);
        let favourite = chooser.choose();
        chooser.encoded(favourite, MAX_BATCH_BYTES, MAX_BATCH_BYTES / 3, Duration::from_secs(5));
        assert_ne!(run(&mut chooser, TEXT, 1).0, [Codec::Raw]);
    }
}
