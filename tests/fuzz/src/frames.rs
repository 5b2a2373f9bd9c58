//! Page frames: hostile ones, honest ones, and both in pieces of any size.

use std::collections::{BTreeMap, VecDeque};
use std::pin::pin;
use std::task::{Context, Poll, Waker};

use arbitrary::{Result, Unstructured};
use bytes::Bytes;
use ferry_codec::{
    Batch, BatchBuilder, Codec, CodecSet, Decoder, FrameError, HEADER_BYTES, MAX_BATCH_PAGES,
    MAX_FRAME_BYTES, PackedBuilder, PackedPage, Packer, is_zero, page_check, page_digest,
    parse_header, zero_frames,
};
use ferry_pages::{Layout, PAGE_BYTES, PageSet};
use ferry_transport::{BoxFuture, ByteSource, FrameReader, LinkError};

use crate::pages::{assert_runs, layout, page};

/// The first byte says which of the ways.
pub fn frames(data: &[u8]) {
    let Some((way, data)) = data.split_first() else { return };
    match way % 4 {
        0 => hostile(data),
        1 => packed_page(data),
        2 => drop(honest(&mut Unstructured::new(data))),
        _ => drop(in_pieces(&mut Unstructured::new(data))),
    }
}

fn decoder(layout: &Layout) -> Decoder {
    Decoder::new(layout.clone(), CodecSet::ALL.and_same())
}

/// A frame whose sums are made right; zeros where it is too short.
fn hostile(data: &[u8]) {
    let layout = layout();
    let (mut frame, mut reader) = (data.to_vec(), decoder(&layout));
    // The digest is wrong, then the check of it.
    for _ in 0..4 {
        let Ok(header) = parse_header(&frame) else { return };
        let bytes = HEADER_BYTES + header.body_bytes();
        assert!(bytes <= MAX_FRAME_BYTES);
        frame.resize(bytes, 0);
        let sum = match reader.decode(&header, &frame[HEADER_BYTES..]) {
            Err(FrameError::Check { found, .. }) => (32, found),
            Err(FrameError::Digest { found, .. }) => (24, found),
            Err(e) => {
                assert!(e.to_string().starts_with("page frame: "));
                return;
            }
            Ok(batch) => {
                let mut fresh = decoder(&layout);
                assert_eq!(fresh.decode(&header, &frame[HEADER_BYTES..]), Ok(batch.clone()));
                return accepted(&batch, &layout);
            }
        };
        frame[sum.0..sum.0 + 8].copy_from_slice(&sum.1.to_le_bytes());
    }
    panic!("sums that are made right stay wrong");
}

fn accepted(batch: &Batch<'_>, layout: &Layout) {
    assert_runs(batch.runs, layout);
    if matches!(batch.codec, Codec::Zero | Codec::Same) {
        assert!(batch.raw.is_empty() && batch.digests.is_empty());
        return;
    }
    let all: Vec<u64> = batch.runs.iter().flat_map(|run| run.start..run.end()).collect();
    assert!(all.len() <= MAX_BATCH_PAGES && all.len() as u64 == batch.pages());
    assert_eq!((batch.raw.len(), batch.digests.len()), (all.len() * PAGE_BYTES, all.len()));
    let pages: Vec<(u64, &[u8])> = all.into_iter().zip(batch.raw.chunks(PAGE_BYTES)).collect();
    assert!(pages.iter().zip(batch.digests).all(|((gfn, page), d)| page_digest(*gfn, page) == *d));
    assert!(batch.run_bytes().flat_map(|(_, bytes)| bytes).eq(batch.raw));
    let mut packer = Packer::default();
    for (kept, (gfn, page)) in batch.packed().zip(&pages) {
        let mut back = vec![1; PAGE_BYTES];
        packer.unpack(kept.codec, kept.bytes, &mut back).expect("it was unpacked before");
        assert!(kept.gfn == *gfn && back == *page);
    }
    let codec = if batch.codec == Codec::Packed { Codec::Raw } else { batch.codec };
    travels(codec, &pages, layout);
}

/// Insists that `pages` come back from the frames that are made of them.
fn travels(codec: Codec, pages: &[(u64, &[u8])], layout: &Layout) {
    let mut builder = BatchBuilder::new();
    builder.begin(7);
    for (gfn, page) in pages {
        builder.push(*gfn, |place| place.copy_from_slice(page)).expect("there is room");
    }
    let built = builder.finish(codec);
    let zeros: Vec<Bytes> = zero_frames(7, built.zeros).collect();
    let mut found: BTreeMap<u64, Vec<u8>> = BTreeMap::new();
    let mut reader = decoder(layout);
    for frame in built.frame.iter().chain(&zeros) {
        let header = parse_header(frame).expect("our own");
        let batch = reader.decode(&header, &frame[HEADER_BYTES..]).expect("our own");
        assert_eq!(batch.round, 7);
        for run in batch.runs.iter().filter(|_| batch.codec == Codec::Zero) {
            found.extend((run.start..run.end()).map(|gfn| (gfn, vec![0; PAGE_BYTES])));
        }
        for (run, bytes) in batch.run_bytes() {
            let bytes = bytes.chunks(PAGE_BYTES).map(<[u8]>::to_vec);
            found.extend((run.start..run.end()).zip(bytes));
        }
    }
    assert_eq!(found.len(), pages.len());
    let same = pages.iter().all(|(gfn, page)| found.get(gfn).is_some_and(|found| found == page));
    assert!(same, "{codec}");
}

/// What a pool kept of one page, or says that it did.
fn packed_page(data: &[u8]) {
    let Some((codec, bytes)) = data.split_first() else { return };
    let Some(codec) = Codec::from_wire(codec % 8) else { return };
    let (mut packer, mut page) = (Packer::default(), vec![1; PAGE_BYTES]);
    if packer.unpack(codec, bytes, &mut page).is_err() {
        return;
    }
    let (codec, kept) = packer.pack(&page);
    let kept = kept.to_vec();
    assert!(kept.len() <= PAGE_BYTES);
    let mut back = vec![2; PAGE_BYTES];
    packer.unpack(codec, &kept, &mut back).expect("our own");
    assert!(back == page);
}

/// Pages, ascending and not too many.
fn some_pages(u: &mut Unstructured<'_>) -> Result<Vec<(u64, Vec<u8>)>> {
    let (mut pages, mut gfn) = (Vec::new(), 0);
    while pages.len() < 40 && !u.is_empty() {
        gfn += if u.ratio(1, 4)? { u.int_in_range(1..=90)? } else { 0 };
        pages.push((gfn, page(u)?));
        gfn += 1;
    }
    // They start behind a hole.
    Ok(pages.into_iter().map(|(gfn, page)| (gfn + 1024, page)).collect())
}

fn honest(u: &mut Unstructured<'_>) -> Result<()> {
    let layout = layout();
    let codec = *u.choose(&Codec::ALL)?;
    let had: u64 = u.arbitrary()?;
    let pages = some_pages(u)?;
    let by_ref: Vec<_> = pages.iter().map(|(gfn, page)| (*gfn, page.as_slice())).collect();
    travels(codec, &by_ref, &layout);
    travels_packed(&by_ref, &layout);

    // Some pages are at the destination already.
    let mut builder = BatchBuilder::new();
    builder.begin(1);
    let (mut same, mut checks) = (PageSet::new(), 0u64);
    for (gfn, page) in &by_ref {
        let has = had >> (gfn % 64) & 1 == 1;
        let room = builder.push_unless(*gfn, |place| place.copy_from_slice(page), |_| has);
        room.expect("there is room");
        if has && !is_zero(page) {
            same.insert(*gfn);
            checks = checks.wrapping_add(page_check(*gfn, page));
        }
    }
    let built = builder.finish(codec);
    assert_eq!(built.same.as_ref().map_or(0, |(_, pages)| *pages), same.len());
    if let Some((frame, _)) = built.same {
        let header = parse_header(&frame).expect("our own");
        let mut reader = decoder(&layout);
        let batch = reader.decode(&header, &frame[HEADER_BYTES..]).expect("our own");
        assert_eq!((batch.runs.iter().copied().collect(), batch.checks), (same, checks));
        let unasked =
            Decoder::new(layout, CodecSet::ALL).decode(&header, &frame[HEADER_BYTES..]).err();
        assert_eq!(unasked, Some(FrameError::CodecNotAllowed(Codec::Same)));
    }
    Ok(())
}

fn travels_packed(pages: &[(u64, &[u8])], layout: &Layout) {
    let (mut packer, mut builder) = (Packer::default(), PackedBuilder::default());
    for (gfn, page) in pages {
        let (codec, bytes) = packer.pack(page);
        let digest = page_digest(*gfn, page);
        assert!(builder.push(&PackedPage { gfn: *gfn, codec, bytes, digest }));
    }
    let Some((frame, count)) = builder.finish(3) else { return assert!(pages.is_empty()) };
    let header = parse_header(&frame).expect("our own");
    let mut reader = decoder(layout);
    let batch = reader.decode(&header, &frame[HEADER_BYTES..]).expect("our own");
    assert_eq!((count, batch.pages()), (pages.len() as u64, pages.len() as u64));
    assert!(batch.raw.chunks(PAGE_BYTES).eq(pages.iter().map(|(_, page)| *page)));
}

/// Bytes of a peer, in the pieces in which they came.
struct Pieces(VecDeque<Bytes>);

impl ByteSource for Pieces {
    fn recv(&mut self) -> BoxFuture<'_, std::result::Result<Option<Bytes>, LinkError>> {
        Box::pin(std::future::ready(Ok(self.0.pop_front())))
    }
}

fn now<T>(future: impl Future<Output = T>) -> T {
    match pin!(future).poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(value) => value,
        Poll::Pending => panic!("it waits for bytes that are here"),
    }
}

/// Messages, as a reader has them: the same whatever pieces the bytes came in.
fn in_pieces(u: &mut Unstructured<'_>) -> Result<()> {
    const MAX: usize = 300;
    let cuts: Vec<usize> =
        (0..u.int_in_range(0..=12)?).map(|_| u.int_in_range(1..=70)).collect::<Result<_>>()?;
    let data = u.bytes(u.len())?;
    let (mut pieces, mut rest) = (VecDeque::new(), data);
    for cut in cuts.into_iter().cycle() {
        let (piece, after) = rest.split_at(cut.min(rest.len()));
        if piece.is_empty() {
            break;
        }
        pieces.push_back(Bytes::copy_from_slice(piece));
        rest = after;
    }
    if !rest.is_empty() {
        pieces.push_back(Bytes::copy_from_slice(rest));
    }
    let mut reader = FrameReader::new(Box::new(Pieces(pieces)));
    let mut rest = data;
    loop {
        let expected = rest.split_first_chunk::<4>().map(|(length, after)| {
            let bytes = u32::from_le_bytes(*length) as usize;
            (bytes <= MAX).then(|| after.split_at_checked(bytes)).flatten()
        });
        match (now(reader.read_message(MAX)), expected) {
            (Ok(Some(message)), Some(Some((expected, after)))) => {
                assert_eq!(message, expected);
                rest = after;
            }
            (Ok(None), None) => {
                assert!(rest.is_empty());
                return Ok(());
            }
            (Err(LinkError::Truncated { .. }), None | Some(None))
            | (Err(LinkError::TooLong { .. }), Some(None)) => return Ok(()),
            (got, expected) => panic!("{got:?} where {expected:?} is"),
        }
    }
}
