//! Pages that are compressed one by one: as a pool keeps them, and as they travel from there.
//!
//! A page is written by lz4 where that makes a quarter of it, else by whatever is smallest: zstd if that saves
//! a quarter over lz4 (it takes five times as long to read), raw where neither saves a sixteenth. A *packed*
//! batch carries such pages as they are, each as `{ codec u8, bytes u16 }` and its bytes.

use bytes::Bytes;
use ferry_pages::{PAGE_BYTES, Run};

use crate::builder::append;
use crate::compress::{Compressor, Decompressor};
use crate::frame::Preamble;
use crate::{Codec, MAX_BATCH_BYTES, MAX_BATCH_PAGES};

/// Bytes in front of a page in a packed batch.
const HEAD_BYTES: usize = 3;
/// A page that lz4 makes no larger than this is not tried by zstd.
const SMALL_BYTES: usize = PAGE_BYTES / 4;
/// A page that gets no smaller than this is kept raw.
const LARGE_BYTES: usize = PAGE_BYTES / 16 * 15;

/// Compresses and decompresses single pages.
#[derive(Default)]
pub struct Packer {
    lz4: Compressor,
    zstd: Compressor,
    decompressor: Decompressor,
}

impl Packer {
    /// `page` by the codec that suits it: raw, lz4 or zstd.
    pub fn pack<'a>(&'a mut self, page: &'a [u8]) -> (Codec, &'a [u8]) {
        let lz4 = self.lz4.compress(Codec::Lz4, page).unwrap_or(page);
        if lz4.len() <= SMALL_BYTES {
            return (Codec::Lz4, lz4);
        }
        let zstd = self.zstd.compress(Codec::Zstd, page).unwrap_or(page);
        let (codec, best) = match zstd.len() <= lz4.len() / 4 * 3 {
            true => (Codec::Zstd, zstd),
            false => (Codec::Lz4, lz4),
        };
        if best.len() > LARGE_BYTES { (Codec::Raw, page) } else { (codec, best) }
    }

    /// Fills `page` from what [`pack`](Self::pack) made of it.
    ///
    /// # Errors
    /// It does not give exactly one page.
    pub fn unpack(&mut self, codec: Codec, bytes: &[u8], page: &mut [u8]) -> Result<(), String> {
        unpack(&mut self.decompressor, codec, bytes, page)
    }
}

/// See [`Packer::unpack`].
pub(crate) fn unpack(
    decompressor: &mut Decompressor,
    codec: Codec,
    bytes: &[u8],
    page: &mut [u8],
) -> Result<(), String> {
    match codec {
        Codec::Raw if bytes.len() == page.len() => {
            page.copy_from_slice(bytes);
            Ok(())
        }
        Codec::Lz4 | Codec::Zstd => decompressor.decompress(codec, bytes, page),
        _ => Err(format!("{codec} is not how {} bytes of one page are written", bytes.len())),
    }
}

/// A page in a packed batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PackedPage<'a> {
    /// Which page.
    pub gfn: u64,
    /// How it is written: raw, lz4 or zstd.
    pub codec: Codec,
    /// Its bytes so written.
    pub bytes: &'a [u8],
    /// Its [`page_digest`](crate::page_digest).
    pub digest: u64,
}

/// Makes packed frames.
#[derive(Default)]
pub struct PackedBuilder {
    runs: Vec<Run>,
    payload: Vec<u8>,
    pages: usize,
    digest: u64,
}

impl PackedBuilder {
    /// Adds `page`, whose frame comes after all others of the batch; false if there is no room: finish the batch
    /// and begin the next.
    #[must_use]
    pub fn push(&mut self, page: &PackedPage<'_>) -> bool {
        let last = self.runs.last().map_or(0, Run::end);
        let Ok(bytes) = u16::try_from(page.bytes.len()) else { return false };
        let full = self.pages == MAX_BATCH_PAGES
            || self.payload.len() + HEAD_BYTES + page.bytes.len() > MAX_BATCH_BYTES;
        if full || page.gfn < last {
            return false;
        }
        self.payload.push(page.codec.to_wire());
        self.payload.extend_from_slice(&bytes.to_le_bytes());
        self.payload.extend_from_slice(page.bytes);
        self.digest = self.digest.wrapping_add(page.digest);
        self.pages += 1;
        append(&mut self.runs, page.gfn);
        true
    }

    /// The frame of the pages that were added, and their number, if there are any; begins anew.
    pub fn finish(&mut self, round: u32) -> Option<(Bytes, u64)> {
        if self.pages == 0 {
            return None;
        }
        let pages = self.pages as u64;
        let preamble = Preamble { round, runs: &self.runs, digest: self.digest };
        let mut frame = vec![0; preamble.bytes()];
        preamble.write(Codec::Packed, self.payload.len(), &mut frame);
        frame.extend_from_slice(&self.payload);
        self.runs.clear();
        self.payload.clear();
        (self.pages, self.digest) = (0, 0);
        Some((frame.into(), pages))
    }
}

/// Where each page of a packed payload is, and how it is written; what is wrong with it otherwise.
pub(crate) fn split(payload: &[u8], pages: u64) -> Result<Vec<(Codec, &[u8])>, String> {
    let mut rest = payload;
    let mut all = Vec::new();
    for _ in 0..pages {
        let Some(([codec, low, high], after)) = rest.split_first_chunk::<HEAD_BYTES>() else {
            return Err(format!("it ends after {} pages", all.len()));
        };
        let bytes = usize::from(u16::from_le_bytes([*low, *high]));
        let codec = match Codec::from_wire(*codec) {
            Some(codec @ (Codec::Raw | Codec::Lz4 | Codec::Zstd)) => codec,
            _ => return Err(format!("codec number {codec} of page {}", all.len())),
        };
        let Some((page, after)) = after.split_at_checked(bytes) else {
            return Err(format!("page {} of {bytes} bytes is cut off", all.len()));
        };
        all.push((codec, page));
        rest = after;
    }
    if !rest.is_empty() {
        return Err(format!("{} bytes follow the last page", rest.len()));
    }
    Ok(all)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{CodecSet, Decoder, HEADER_BYTES, page_digest, parse_header};
    use ferry_pages::Layout;

    /// Text-like, repetitive, and without any pattern.
    fn pages() -> Vec<Vec<u8>> {
        let noise = |seed: u64| {
            let mut x = seed;
            (0..PAGE_BYTES)
                .map(|_| {
                    x = x.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                    x.to_le_bytes()[7]
                })
                .collect::<Vec<u8>>()
        };
        let nibbles = noise(3).iter().map(|b| b"etaoin srhldcmu"[usize::from(*b % 15)]).collect();
        vec![vec![7; PAGE_BYTES], nibbles, noise(1)]
    }

    #[test]
    fn each_page_is_kept_by_what_suits_it_and_comes_back() {
        let mut packer = Packer::default();
        for (page, expected) in pages().iter().zip([Codec::Lz4, Codec::Zstd, Codec::Raw]) {
            let (codec, bytes) = packer.pack(page);
            assert_eq!(codec, expected);
            let bytes = bytes.to_vec();
            let mut back = vec![1; PAGE_BYTES];
            packer.unpack(codec, &bytes, &mut back).unwrap();
            assert_eq!(&back, page);
            assert!(packer.unpack(codec, &bytes[1..], &mut back).is_err() || back != *page);
        }
        assert!(packer.unpack(Codec::Same, &[], &mut [0; PAGE_BYTES]).is_err());
    }

    #[test]
    fn zstd_is_worth_its_time_only_where_lz4_leaves_much_and_it_saves_a_quarter() {
        let [_, nibbles, noise] = &pages()[..] else { panic!("three") };
        for (content, bytes, expected) in
            [(nibbles, 600, Codec::Lz4), (nibbles, 3000, Codec::Zstd), (noise, 3000, Codec::Lz4)]
        {
            let mut page = content[..bytes].to_vec();
            page.resize(PAGE_BYTES, 0);
            assert_eq!(Packer::default().pack(&page).0, expected, "{bytes} bytes");
        }
    }

    #[test]
    fn a_batch_takes_pages_while_they_ascend_and_fit_and_no_more() {
        let bytes = [1; PAGE_BYTES];
        let page = |gfn, bytes| PackedPage { gfn, codec: Codec::Raw, bytes, digest: 0 };
        let mut small = PackedBuilder::default();
        for gfn in 0..MAX_BATCH_PAGES as u64 {
            assert!(small.push(&page(gfn, &bytes[..1])));
            assert!(!small.push(&page(gfn, &bytes[..1])), "it does not ascend");
        }
        assert!(!small.push(&page(1000, &bytes[..1])), "too many pages");
        let rest = MAX_BATCH_BYTES - 255 * (HEAD_BYTES + PAGE_BYTES) - HEAD_BYTES;
        for (last, taken) in [(rest, true), (rest + 1, false), (PAGE_BYTES, false)] {
            let mut large = PackedBuilder::default();
            assert!((0..255).all(|gfn| large.push(&page(gfn, &bytes))));
            assert_eq!(large.push(&page(255, &bytes[..last])), taken, "{last} bytes more");
        }
    }

    fn frame() -> Vec<u8> {
        let (mut packer, mut builder) = (Packer::default(), PackedBuilder::default());
        for (gfn, page) in [3, 4, 9].into_iter().zip(pages()) {
            let digest = page_digest(gfn, &page);
            let (codec, bytes) = packer.pack(&page);
            assert!(builder.push(&PackedPage { gfn, codec, bytes, digest }));
        }
        let (frame, pages) = builder.finish(2).unwrap();
        assert_eq!(pages, 3);
        assert!(builder.finish(2).is_none());
        frame.to_vec()
    }

    fn decoder() -> Decoder {
        Decoder::new(Layout::new(vec![Run::new(0, 16)]).unwrap(), CodecSet::ALL)
    }

    #[test]
    fn packed_pages_arrive_as_they_were_kept_and_verified() {
        let frame = frame();
        let header = parse_header(&frame).unwrap();
        let mut decoder = decoder();
        let batch = decoder.decode(&header, &frame[HEADER_BYTES..]).unwrap();
        assert_eq!(batch.runs, [Run::new(3, 2), Run::new(9, 1)]);
        assert_eq!(batch.raw, pages().concat());
        let kept: Vec<_> = batch.packed().map(|page| (page.gfn, page.codec)).collect();
        assert_eq!(kept, [(3, Codec::Lz4), (4, Codec::Zstd), (9, Codec::Raw)]);
        let mut packer = Packer::default();
        for (page, expected) in batch.packed().zip(pages()) {
            let mut back = vec![0; PAGE_BYTES];
            packer.unpack(page.codec, page.bytes, &mut back).unwrap();
            assert_eq!(back, expected);
            assert_eq!(page.digest, page_digest(page.gfn, &back));
        }
    }

    #[test]
    fn a_flipped_byte_anywhere_is_an_error() {
        let whole = frame();
        for at in 0..whole.len() {
            let mut frame = whole.clone();
            frame[at] ^= 0x11;
            let Ok(header) = parse_header(&frame) else { continue };
            let body = &frame[HEADER_BYTES..];
            assert!(decoder().decode(&header, body).is_err(), "byte {at}");
        }
    }
}
