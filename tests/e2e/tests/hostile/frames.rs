//! Frames that no honest source makes.

use bytes::Bytes;
use ferry_codec::{BatchBuilder, Codec};
use ferry_pages::PAGE_BYTES;
use xxhash_rust::xxh3::xxh3_64;

/// A good frame of one page, all bytes of which are `byte`.
pub(crate) fn data_frame(round: u32, gfn: u64, byte: u8) -> Bytes {
    let mut builder = BatchBuilder::new();
    builder.begin(round);
    builder.push(gfn, |page| page.copy_from_slice(&[byte; PAGE_BYTES])).unwrap();
    builder.finish(Codec::Raw).frame.unwrap()
}

/// A frame whose checksum of header and run table is right, and whatever else is said is said.
pub(crate) fn crafted(
    codec: Codec,
    round: u32,
    runs: &[(u64, u64)],
    pages: u64,
    payload_bytes: u32,
    digest: u64,
    payload: &[u8],
) -> Bytes {
    let mut head = b"fPg1".to_vec();
    head.extend([codec.to_wire(), 0]);
    head.extend(u16::try_from(runs.len()).unwrap().to_le_bytes());
    head.extend(round.to_le_bytes());
    head.extend(payload_bytes.to_le_bytes());
    head.extend(pages.to_le_bytes());
    head.extend(digest.to_le_bytes());
    let table: Vec<u8> = runs
        .iter()
        .flat_map(|(start, n)| [start.to_le_bytes(), n.to_le_bytes()].concat())
        .collect();
    let check = xxh3_64(&[&head[..], &table].concat());
    head.extend(check.to_le_bytes());
    [&head[..], &table, payload].concat().into()
}
