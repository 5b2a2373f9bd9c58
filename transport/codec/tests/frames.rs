//! Frames: what goes in comes out, and nothing else ever does.

use bytes::Bytes;
use ferry_codec::{
    Batch, BatchBuilder, BatchHeader, Codec, CodecChooser, CodecSet, Decoder, FrameError,
    HEADER_BYTES, MAX_BATCH_PAGES, MAX_FRAME_BYTES, MAX_ZERO_RUNS, NotTaken, RUN_BYTES, is_zero,
    page_check, page_digest, parse_header, zero_frames,
};
use ferry_pages::{Layout, PAGE_BYTES, Run};
use proptest::prelude::*;

const FRAMES: u64 = 4096;

fn layout() -> Layout {
    // A hole between, as below 4 GiB on a PC.
    Layout::new(vec![Run::new(0, 1024), Run::new(2048, FRAMES - 2048)]).unwrap()
}

fn decoder() -> Decoder {
    Decoder::new(layout(), CodecSet::ALL)
}

/// A page that compresses for even frames and does not for odd ones; zero for multiples of 7.
fn page(gfn: u64) -> Vec<u8> {
    let mut state = gfn.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut noise = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    match gfn {
        _ if gfn.is_multiple_of(7) => vec![0; PAGE_BYTES],
        _ if gfn.is_multiple_of(2) => {
            format!("page {gfn} of a guest. ").bytes().cycle().take(PAGE_BYTES).collect()
        }
        _ => (0..PAGE_BYTES / 8).flat_map(|_| noise().to_le_bytes()).collect(),
    }
}

fn text(gfn: u64) -> Vec<u8> {
    page(gfn * 14 + 2)
}

/// The frame of the pages at `gfns` by `codec`, and their zero runs.
fn build(
    builder: &mut BatchBuilder,
    gfns: impl IntoIterator<Item = u64>,
    codec: Codec,
    content: impl Fn(u64) -> Vec<u8>,
) -> (Option<Bytes>, Vec<Run>) {
    builder.begin(3);
    for gfn in gfns {
        builder.push(gfn, |to| to.copy_from_slice(&content(gfn))).unwrap();
    }
    let built = builder.finish(codec);
    (built.frame, built.zeros.to_vec())
}

fn decode<'a>(decoder: &'a mut Decoder, frame: &'a [u8]) -> Result<Batch<'a>, FrameError> {
    let header = parse_header(frame)?;
    assert!(HEADER_BYTES + header.body_bytes() <= MAX_FRAME_BYTES);
    decoder.decode(&header, &frame[HEADER_BYTES..])
}

fn pages_of(batch: &Batch<'_>) -> Vec<(u64, Vec<u8>)> {
    let mut pages = Vec::new();
    for (run, bytes) in batch.run_bytes() {
        let bytes = bytes.chunks(PAGE_BYTES).map(<[u8]>::to_vec);
        pages.extend((run.start..run.end()).zip(bytes));
    }
    pages
}

#[test]
fn pages_come_back_by_every_codec_and_zeros_apart() {
    let gfns = || (10u64..60).chain(2100..2200);
    let data: Vec<_> =
        gfns().filter(|gfn| !gfn.is_multiple_of(7)).map(|gfn| (gfn, page(gfn))).collect();
    let zeros: Vec<u64> = gfns().filter(|gfn| gfn.is_multiple_of(7)).collect();
    let (mut builder, mut decoder) = (BatchBuilder::new(), decoder());
    for codec in [Codec::Raw, Codec::Lz4, Codec::Zstd, Codec::Raw] {
        let (frame, zero_runs) = build(&mut builder, gfns(), codec, page);
        let frame = frame.unwrap();
        let batch = decode(&mut decoder, &frame).unwrap();
        assert_eq!((batch.codec, batch.round), (codec, 3));
        assert_eq!(pages_of(&batch), data);
        let digests: Vec<_> = data.iter().map(|(gfn, page)| page_digest(*gfn, page)).collect();
        assert_eq!(batch.digests, digests);
        assert_eq!(
            zero_runs.iter().flat_map(|run| run.start..run.end()).collect::<Vec<_>>(),
            zeros
        );
    }
}

#[test]
fn a_frame_is_as_large_as_its_pages_whichever_were_zero() {
    let (frame, _) = build(&mut BatchBuilder::new(), 1..14, Codec::Raw, page);
    // 1..7 and 8..14: two runs.
    assert_eq!(frame.unwrap().len(), HEADER_BYTES + 2 * RUN_BYTES + 12 * PAGE_BYTES);
}

#[test]
fn only_zeros_make_no_frame() {
    let (frame, zeros) = build(&mut BatchBuilder::new(), 5..9, Codec::Lz4, |_| vec![0; PAGE_BYTES]);
    assert_eq!((frame, zeros), (None, vec![Run::new(5, 4)]));
}

#[test]
fn what_does_not_shrink_travels_raw() {
    let mut builder = BatchBuilder::new();
    for codec in [Codec::Lz4, Codec::Zstd] {
        let odd = (0..50).map(|i| 14 * i + 1);
        let (frame, _) = build(&mut builder, odd, codec, page);
        assert_eq!(parse_header(&frame.unwrap()).unwrap().codec, Codec::Raw);
    }
}

#[test]
fn a_full_batch_takes_no_more_and_loses_nothing() {
    let mut builder = BatchBuilder::new();
    builder.begin(0);
    for gfn in 0..MAX_BATCH_PAGES as u64 {
        builder.push(gfn, |to| to.fill(9)).unwrap();
    }
    assert_eq!(builder.push(1000, |_| panic!("must not be read")), Err(NotTaken::Full));
    let built = builder.finish(Codec::Raw);
    assert_eq!(built.runs, [Run::new(0, MAX_BATCH_PAGES as u64)]);
    let frame = built.frame.unwrap();
    assert!(frame.len() <= MAX_FRAME_BYTES);
    assert_eq!(decode(&mut decoder(), &frame).unwrap().pages(), MAX_BATCH_PAGES as u64);
}

#[test]
fn frames_that_do_not_ascend_are_not_taken() {
    let mut builder = BatchBuilder::new();
    builder.begin(0);
    builder.push(8, |to| to.fill(1)).unwrap();
    for gfn in [8, 7, 0] {
        assert_eq!(builder.push(gfn, |_| panic!("must not be read")), Err(NotTaken::NotAscending));
    }
    builder.begin(0);
    builder.push(7, |to| to.fill(1)).unwrap();
}

#[test]
fn a_buffer_is_not_used_again_while_the_link_has_it() {
    let mut builder = BatchBuilder::new();
    let mut with_link = Vec::new();
    for start in 0..30u64 {
        let gfns = || (start * 10..).filter(|gfn| gfn % 14 == 1).take(MAX_BATCH_PAGES / 2);
        with_link.push((
            gfns().collect::<Vec<_>>(),
            build(&mut builder, gfns(), Codec::Raw, |gfn| page(gfn | 1)).0,
        ));
        if start % 3 == 0 {
            with_link.remove(0);
        }
    }
    let layout = Layout::new(vec![Run::new(0, 1 << 20)]).unwrap();
    let mut decoder = Decoder::new(layout, CodecSet::ALL);
    for (gfns, frame) in with_link {
        let frame = frame.unwrap();
        let batch = decode(&mut decoder, &frame).unwrap();
        assert_eq!(pages_of(&batch).into_iter().map(|(gfn, _)| gfn).collect::<Vec<_>>(), gfns);
    }
}

#[test]
fn a_buffer_comes_back_when_the_link_lets_go_and_is_not_cleared() {
    let mut builder = BatchBuilder::new();
    let five = || vec![5; PAGE_BYTES];
    let (held, _) = build(&mut builder, 0..256, Codec::Raw, |_| five());
    let mut seen = 0;
    let mut look = |builder: &mut BatchBuilder| {
        builder.begin(0);
        builder.push(0, |to| seen = to[0]).unwrap();
        seen
    };
    assert_eq!(look(&mut builder), 0, "a new one while the link holds the first");
    drop(held);
    drop(build(&mut builder, 0..256, Codec::Raw, |_| vec![6; PAGE_BYTES]));
    assert_eq!(look(&mut builder), 5, "the first again");
}

#[test]
fn zero_runs_travel_in_as_many_frames_as_they_need() {
    let layout = Layout::new(vec![Run::new(0, 1 << 30)]).unwrap();
    let runs: Vec<_> = (0..MAX_ZERO_RUNS as u64 + 10).map(|i| Run::new(i * 1000, 999)).collect();
    let mut decoder = Decoder::new(layout, CodecSet::BASE);
    let mut back = Vec::new();
    for frame in zero_frames(9, &runs) {
        let batch = decode(&mut decoder, &frame).unwrap();
        assert_eq!((batch.codec, batch.round, batch.raw.len()), (Codec::Zero, 9, 0));
        back.extend_from_slice(batch.runs);
    }
    assert_eq!(back, runs);
    assert_eq!(zero_frames(9, &[]).count(), 0);
}

/// A frame by hand: header fields as given, with a right check.
fn forged(codec: Codec, runs: &[(u64, u64)], pages: u64, payload: &[u8], digest: u64) -> Vec<u8> {
    let mut table = Vec::new();
    for (start, length) in runs {
        table.extend_from_slice(&start.to_le_bytes());
        table.extend_from_slice(&length.to_le_bytes());
    }
    let mut frame = b"fPg1".to_vec();
    frame.extend_from_slice(&[codec.to_wire(), 0]);
    frame.extend_from_slice(&u16::try_from(runs.len()).unwrap().to_le_bytes());
    frame.extend_from_slice(&0u32.to_le_bytes());
    frame.extend_from_slice(&u32::try_from(payload.len()).unwrap().to_le_bytes());
    frame.extend_from_slice(&pages.to_le_bytes());
    frame.extend_from_slice(&digest.to_le_bytes());
    let checked: Vec<u8> = [&frame[..], &table[..]].concat();
    frame.extend_from_slice(&xxhash_rust::xxh3::xxh3_64(&checked).to_le_bytes());
    frame.extend_from_slice(&table);
    frame.extend_from_slice(payload);
    frame
}

#[test]
fn a_forged_frame_that_is_right_is_accepted() {
    // Or else the rejections below would prove nothing.
    let content = page(11);
    let frame = forged(Codec::Raw, &[(11, 1)], 1, &content, page_digest(11, &content));
    assert_eq!(pages_of(&decode(&mut decoder(), &frame).unwrap()), [(11, content)]);
    decode(&mut decoder(), &forged(Codec::Zero, &[(0, 1024), (2048, 5)], 1029, &[], 0)).unwrap();
}

#[test]
fn runs_outside_the_layout_or_overlapping_are_refused() {
    let zero = |runs: &[(u64, u64)]| {
        let pages = runs.iter().fold(0u64, |sum, run| sum.wrapping_add(run.1));
        let frame = forged(Codec::Zero, runs, pages, &[], 0);
        decode(&mut decoder(), &frame).unwrap_err()
    };
    let outside = |runs| matches!(zero(runs), FrameError::OutsideLayout { .. });
    assert!(outside(&[(1024, 1)]), "in the hole");
    assert!(outside(&[(1023, 2)]), "into the hole");
    assert!(outside(&[(FRAMES, 1)]), "after the end");
    assert!(outside(&[(5, 0), (6, 4)]), "an empty run");
    assert!(outside(&[(u64::MAX, 1)]));
    assert!(outside(&[(4, u64::MAX), (8, 3)]), "lengths that wrap to a small sum");
    assert!(matches!(zero(&[(0, 8), (7, 1)]), FrameError::Overlap { index: 1, .. }));
    assert!(matches!(zero(&[(8, 1), (0, 1)]), FrameError::Overlap { index: 1, .. }));
}

#[test]
fn counts_and_lengths_out_of_bounds_are_refused_from_the_header_alone() {
    let header = |codec, runs: usize, pages, payload: usize| {
        let table: Vec<_> = (0..runs as u64).map(|i| (i * 2, 1)).collect();
        parse_header(&forged(codec, &table, pages, &vec![0; payload], 0)[..HEADER_BYTES])
    };
    let max = MAX_BATCH_PAGES;
    assert!(header(Codec::Raw, 1, 2, 2 * PAGE_BYTES).is_ok());
    assert!(matches!(header(Codec::Raw, 0, 0, 0), Err(FrameError::Runs { .. })));
    assert!(matches!(header(Codec::Raw, max + 1, 257, 0), Err(FrameError::Runs { .. })));
    assert!(matches!(
        header(Codec::Zero, MAX_ZERO_RUNS + 1, 5000, 0),
        Err(FrameError::Runs { .. })
    ));
    assert!(matches!(header(Codec::Raw, 2, 1, PAGE_BYTES), Err(FrameError::Pages { .. })));
    assert!(matches!(header(Codec::Lz4, 1, max as u64 + 1, 9), Err(FrameError::Pages { .. })));
    assert!(matches!(header(Codec::Zero, 1, u64::MAX, 0), Err(FrameError::Pages { .. })));
    assert!(matches!(header(Codec::Zero, 1, 1, 1), Err(FrameError::Payload { .. })));
    assert!(matches!(header(Codec::Same, 1, 1, 1), Err(FrameError::Payload { .. })));
    assert!(matches!(header(Codec::Same, 1, max as u64 + 1, 0), Err(FrameError::Pages { .. })));
    assert!(matches!(header(Codec::Raw, 1, 2, PAGE_BYTES), Err(FrameError::Payload { .. })));
    assert!(matches!(header(Codec::Zstd, 1, 1, PAGE_BYTES), Err(FrameError::Payload { .. })));
    assert!(matches!(header(Codec::Zstd, 1, 1, 0), Err(FrameError::Payload { .. })));
    let most = max * PAGE_BYTES;
    for (payload, fits) in [(0, false), (1, true), (most, true), (most + 1, false)] {
        assert_eq!(header(Codec::Packed, 1, 1, payload).is_ok(), fits, "{payload} bytes packed");
    }
}

#[test]
fn pages_that_the_destination_has_are_named_and_only_where_that_was_arranged() {
    let mut builder = BatchBuilder::new();
    builder.begin(3);
    for gfn in 1..14 {
        let has = |digest| gfn % 2 == 0 && digest == page_digest(gfn, &page(gfn));
        builder.push_unless(gfn, |to| to.copy_from_slice(&page(gfn)), has).unwrap();
    }
    let built = builder.finish(Codec::Raw);
    assert_eq!(built.runs.iter().map(|run| run.pages).sum::<u64>(), 6);
    assert_eq!(built.zeros, [Run::new(7, 1)]);
    let (frame, pages) = built.same.unwrap();
    assert_eq!((pages, frame.len()), (6, HEADER_BYTES + 6 * RUN_BYTES));
    let mut arranged = Decoder::new(layout(), CodecSet::BASE.and_same());
    let batch = decode(&mut arranged, &frame).unwrap();
    assert_eq!((batch.codec, batch.round, batch.raw.len()), (Codec::Same, 3, 0));
    assert!(batch.runs.iter().map(|run| run.start).eq([2, 4, 6, 8, 10, 12]));
    let checks = batch.runs.iter().map(|run| page_check(run.start, &page(run.start)));
    assert_eq!(batch.checks, checks.fold(0, u64::wrapping_add));
    let refused = decode(&mut decoder(), &frame).unwrap_err();
    assert_eq!(refused, FrameError::CodecNotAllowed(Codec::Same));
    builder.begin(4);
    assert!(builder.finish(Codec::Raw).same.is_none(), "of a batch before");
}

#[test]
fn what_is_not_a_frame_is_told_why() {
    let frame = forged(Codec::Zero, &[(0, 1)], 1, &[], 0);
    let with = |at: usize, byte: u8| {
        let mut bad = frame.clone();
        bad[at] = byte;
        parse_header(&bad)
    };
    assert!(matches!(with(0, b'G'), Err(FrameError::Magic(_))));
    assert!(matches!(with(4, 77), Err(FrameError::UnknownCodec(77))));
    assert!(matches!(with(5, 1), Err(FrameError::Reserved(1))));
    assert!(matches!(
        parse_header(&frame[..39]),
        Err(FrameError::Length { expected: 40, found: 39 })
    ));
    let header = parse_header(&frame).unwrap();
    for body in
        [&frame[HEADER_BYTES..frame.len() - 1], &[frame.as_slice(), &[0]].concat()[HEADER_BYTES..]]
    {
        let mut decoder = decoder();
        assert!(matches!(decoder.decode(&header, body), Err(FrameError::Length { .. })));
    }
}

#[test]
fn a_codec_that_was_not_negotiated_is_refused() {
    let (frame, _) = build(&mut BatchBuilder::new(), 1..6, Codec::Zstd, text);
    let frame = frame.unwrap();
    let mut decoder = Decoder::new(layout(), CodecSet::from_iter([Codec::Lz4]));
    let error = decode(&mut decoder, &frame).unwrap_err();
    assert_eq!(error, FrameError::CodecNotAllowed(Codec::Zstd));
}

#[test]
fn a_payload_that_gives_more_or_fewer_bytes_than_announced_is_refused() {
    let bomb = vec![0x41; 64 << 20];
    let short = vec![0x41; PAGE_BYTES - 1];
    for content in [&bomb, &short] {
        let zstd = zstd::bulk::compress(content, 1).unwrap();
        let lz4 = lz4_flex::block::compress(&content[..content.len().min(4 << 20)]);
        for (codec, payload) in [(Codec::Zstd, zstd), (Codec::Lz4, lz4)] {
            let pages = 1 + (payload.len() / PAGE_BYTES) as u64;
            let frame = forged(codec, &[(0, pages)], pages, &payload, 0);
            let error = decode(&mut decoder(), &frame).unwrap_err();
            assert!(matches!(error, FrameError::Decompress { .. }), "{codec}: {error}");
        }
    }
}

#[test]
fn a_page_that_changed_on_the_way_is_never_given_out() {
    let (frame, _) = build(&mut BatchBuilder::new(), [11, 13], Codec::Raw, page);
    let mut frame = frame.unwrap().to_vec();
    let last = frame.len() - 1;
    frame[last] ^= 1;
    assert!(matches!(decode(&mut decoder(), &frame), Err(FrameError::Digest { start: 11, .. })));
}

#[test]
fn pages_in_each_others_place_are_noticed() {
    let (a, b) = (page(11), page(13));
    let digest = page_digest(11, &a).wrapping_add(page_digest(13, &b));
    let swapped = [b, a].concat();
    let frame = forged(Codec::Raw, &[(11, 1), (13, 1)], 2, &swapped, digest);
    assert!(matches!(decode(&mut decoder(), &frame), Err(FrameError::Digest { .. })));
}

#[test]
fn a_header_made_by_hand_is_no_way_around_the_bounds() {
    let header = BatchHeader {
        codec: Codec::Lz4,
        round: 0,
        runs: 1,
        pages: u64::MAX,
        payload_bytes: 4,
        digest: 0,
        check: 0,
    };
    assert!(decoder().decode(&header, &[0; RUN_BYTES + 4]).is_err());
    assert!(decoder().decode(&header, &[]).is_err());
}

/// Sets of pages with their content: zero, text or noise.
fn batches() -> impl Strategy<Value = Vec<(u64, u8)>> {
    proptest::collection::btree_map(
        (0u64..3072).prop_map(|i| if i < 1024 { i } else { i + 1024 }),
        0u8..3,
        1..MAX_BATCH_PAGES,
    )
    .prop_map(|pages| pages.into_iter().collect())
}

fn content(gfn: u64, kind: u8) -> Vec<u8> {
    match kind {
        0 => vec![0; PAGE_BYTES],
        1 => text(gfn),
        _ => page(gfn * 14 + 1),
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    #[test]
    fn any_batch_comes_back_as_it_was(pages in batches(), codec in 1u8..4) {
        let codec = Codec::from_wire(codec).unwrap();
        let mut builder = BatchBuilder::new();
        builder.begin(1);
        for (gfn, kind) in &pages {
            builder.push(*gfn, |to| to.copy_from_slice(&content(*gfn, *kind))).unwrap();
        }
        let built = builder.finish(codec);
        let mut back: Vec<(u64, Vec<u8>)> = built
            .zeros
            .iter()
            .flat_map(|run| run.start..run.end())
            .map(|gfn| (gfn, vec![0; PAGE_BYTES]))
            .collect();
        if let Some(frame) = &built.frame {
            let mut decoder = decoder();
            let batch = decode(&mut decoder, frame).unwrap();
            prop_assert_eq!(batch.digests, built.digests);
            prop_assert!(batch.raw.chunks(PAGE_BYTES).all(|page| !is_zero(page)));
            back.extend(pages_of(&batch));
        }
        back.sort();
        let sent: Vec<_> = pages.iter().map(|(gfn, kind)| (*gfn, content(*gfn, *kind))).collect();
        prop_assert!(back == sent);
    }

    #[test]
    fn a_damaged_frame_is_an_error_and_never_a_panic(
        pages in batches(),
        codec in 0u8..4,
        damage in proptest::collection::vec((any::<prop::sample::Index>(), 1u8..=255), 1..4),
        cut in proptest::option::of(any::<prop::sample::Index>()),
    ) {
        let codec = Codec::from_wire(codec).unwrap();
        let frame = if codec == Codec::Zero {
            let runs: Vec<_> = pages.iter().map(|(gfn, _)| Run::new(*gfn, 1)).collect();
            zero_frames(1, &runs).next()
        } else {
            build(&mut BatchBuilder::new(), pages.iter().map(|p| p.0), codec, text).0
        };
        let frame = frame.unwrap();
        let mut bad = frame.to_vec();
        for (at, flip) in damage {
            // Mostly in header and table, where the rules are.
            let reach = if flip % 4 == 0 { bad.len() } else { bad.len().min(200) };
            bad[at.index(reach)] ^= flip;
        }
        if let Some(cut) = cut {
            bad.truncate(cut.index(bad.len()));
        }
        if bad != frame {
            prop_assert!(decode(&mut decoder(), &bad).is_err());
        }
    }

    #[test]
    fn any_bytes_behind_a_right_check_are_an_error_or_a_batch_inside_the_layout(
        codec in 0u8..4,
        runs in proptest::collection::vec((0u64..5000, 0u64..40), 1..20),
        wrong in -1i64..=1,
        payload in proptest::collection::vec(any::<u8>(), 0..300),
        digest in any::<u64>(),
    ) {
        let codec = Codec::from_wire(codec).unwrap();
        let pages = runs.iter().map(|run| run.1).sum::<u64>().saturating_add_signed(wrong);
        let frame = forged(codec, &runs, pages, &payload, digest);
        let mut decoder = decoder();
        if let Ok(batch) = decode(&mut decoder, &frame) {
            prop_assert!(batch.runs.iter().all(|run| layout().contains(*run)));
            prop_assert!(batch.runs.is_sorted_by(|a, b| a.end() <= b.start));
            prop_assert_eq!(batch.pages(), pages);
        }
    }
}

#[test]
fn a_page_seen_to_be_zero_is_as_one_that_was_copied() {
    let built = |seen: bool| {
        let mut builder = BatchBuilder::new();
        builder.begin(3);
        for gfn in 1..60 {
            if seen && gfn % 7 == 0 {
                builder.push_zero(gfn).unwrap();
                assert_eq!(builder.push_zero(gfn), Err(NotTaken::NotAscending));
            } else {
                builder.push(gfn, |to| to.copy_from_slice(&page(gfn))).unwrap();
            }
        }
        let built = builder.finish(Codec::Raw);
        (built.frame, built.zeros.to_vec())
    };
    assert_eq!(built(true), built(false));
    let mut builder = BatchBuilder::new();
    builder.begin(1);
    let taken = (0..).take_while(|i| builder.push_zero(2 * i).is_ok()).count();
    assert_eq!(taken, MAX_ZERO_RUNS);
}

#[test]
fn no_frame_is_larger_than_the_largest() {
    let mut builder = BatchBuilder::new();
    let gfns = (0..MAX_BATCH_PAGES as u64).map(|i| i * 2);
    let (frame, _) = build(&mut builder, gfns, Codec::Raw, |_| vec![9; PAGE_BYTES]);
    assert_eq!(frame.unwrap().len(), MAX_FRAME_BYTES);
    assert_eq!((builder.data_pages(), builder.room()), (MAX_BATCH_PAGES, 0));
}

#[test]
fn a_small_frame_does_not_keep_the_buffer() {
    let mut builder = BatchBuilder::new();
    let (held, _) = build(&mut builder, 0..5, Codec::Raw, |_| vec![5; PAGE_BYTES]);
    let mut seen = 0;
    builder.begin(0);
    builder.push(0, |to| seen = to[0]).unwrap();
    assert_eq!(
        seen,
        5,
        "the same buffer, though the frame of {} bytes is held",
        held.unwrap().len()
    );
}

#[test]
fn what_does_not_shrink_by_a_single_byte_travels_raw() {
    // From what grows to what shrinks, a byte at a time: on the way it is as long as before.
    let mut seen = std::collections::BTreeSet::new();
    for zeros in 0..128 {
        let mut content = page(1);
        content[PAGE_BYTES - zeros..].fill(0);
        for codec in [Codec::Lz4, Codec::Zstd] {
            let (frame, _) = build(&mut BatchBuilder::new(), [1], codec, |_| content.clone());
            let frame = frame.unwrap();
            let mut decoder = decoder();
            let batch = decode(&mut decoder, &frame).unwrap();
            assert_eq!(batch.raw, content, "{codec}, {zeros} zeros");
            seen.insert(batch.codec);
        }
    }
    assert!(seen.into_iter().eq([Codec::Raw, Codec::Lz4, Codec::Zstd]));
}

#[test]
fn a_sample_is_one_page_of_the_batch_another_one_each_time() {
    let mut builder = BatchBuilder::new();
    let alone = |gfn| {
        let (frame, _) = build(&mut BatchBuilder::new(), [gfn], Codec::Lz4, page);
        frame.unwrap().len() - HEADER_BYTES - RUN_BYTES
    };
    assert_eq!((alone(2) < PAGE_BYTES, alone(1)), (true, PAGE_BYTES));
    build(&mut builder, [1, 2], Codec::Raw, page);
    let sampled: Vec<_> = (0..4).map(|_| builder.sample(Codec::Lz4)).collect();
    assert_eq!(sampled, [alone(2), alone(1), alone(2), alone(1)].map(|is| Some((PAGE_BYTES, is))));
    builder.begin(1);
    assert_eq!(builder.sample(Codec::Lz4), None, "there is no page");
}

/// Whether each of `batches` batches of text was compressed, on a link that takes 2 ns a byte, by a clock in which a sample takes
/// 4 µs and a batch `batch_us`.
fn compressed(batches: usize, batch_us: u64) -> Vec<bool> {
    let mut chooser = CodecChooser::new(CodecSet::from_iter([Codec::Lz4]));
    chooser.set_link_rate(500e6);
    let mut builder = BatchBuilder::new();
    let (mut at, mut calls) = (0, 0);
    let mut now = || {
        // Before and after the sample, before and after the batch.
        at += [0, 4, 0, batch_us][calls % 4];
        calls += 1;
        std::time::Duration::from_micros(at)
    };
    let one = |_| {
        builder.begin(1);
        for gfn in 0..MAX_BATCH_PAGES as u64 {
            builder.push(gfn, |to| to.copy_from_slice(&text(gfn))).unwrap();
        }
        builder.finish_chosen(&mut chooser, &mut now).codec == Codec::Lz4
    };
    // The codec out of favour is not sampled, and the clock out of step.
    (0..batches).map(one).take_while(|compressed| *compressed).collect()
}

#[test]
fn what_whole_batches_took_and_became_is_what_the_next_is_chosen_by() {
    assert_eq!(compressed(40, 1000).len(), 40, "quick, and small");
    assert!(compressed(20, 1_000_000).len() < 20, "a second for each");
}
