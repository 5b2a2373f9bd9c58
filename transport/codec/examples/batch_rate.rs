//! How fast batches are built and taken apart, by codec and content, in one thread.
//!
//! `cargo run --release -p ferry-codec --example batch_rate`

use std::time::Instant;

use ferry_codec::{
    BatchBuilder, Codec, CodecSet, Decoder, HEADER_BYTES, MAX_BATCH_PAGES, parse_header,
};
use ferry_pages::{Layout, PAGE_BYTES, Run};

const PAGES: usize = 64 << 10;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut state = 88_172_645_463_325_252u64;
    let noise = std::iter::repeat_with(|| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    });
    let noise: Vec<u8> = noise.take(PAGES * PAGE_BYTES / 8).flatten().collect();
    // Words of a small vocabulary, in random order.
    let words = ["guest ", "page ", "memory ", "fault ", "the ", "0x00 ", "of ", "dirty "];
    let text = noise.iter().flat_map(|byte| words[usize::from(byte % 8)].bytes());
    let text: Vec<u8> = text.take(PAGES * PAGE_BYTES).collect();
    let mut zeros = vec![1; PAGES * PAGE_BYTES];
    zeros.fill(0);
    let layout = Layout::new(vec![Run::new(0, PAGES as u64)])?;
    for (name, memory) in [("noise", &noise), ("text", &text), ("zero", &zeros)] {
        for codec in [Codec::Raw, Codec::Lz4, Codec::Zstd] {
            let mut builder = BatchBuilder::new();
            let mut decoder = Decoder::new(layout.clone(), CodecSet::ALL);
            let (mut build, mut decode, mut bytes) = (0.0, 0.0, 0);
            for (i, batch) in memory.chunks(MAX_BATCH_PAGES * PAGE_BYTES).enumerate() {
                let start = Instant::now();
                builder.begin(0);
                let first = (i * MAX_BATCH_PAGES) as u64;
                for (gfn, page) in (first..).zip(batch.chunks(PAGE_BYTES)) {
                    builder.push(gfn, |to| to.copy_from_slice(page))?;
                }
                let frame = builder.finish(codec).frame;
                build += start.elapsed().as_secs_f64();
                let Some(frame) = frame else { continue };
                bytes += frame.len();
                let start = Instant::now();
                let header = parse_header(&frame)?;
                let batch = decoder.decode(&header, &frame[HEADER_BYTES..])?;
                std::hint::black_box(batch);
                decode += start.elapsed().as_secs_f64();
            }
            let gigabytes = memory.len() as f64 / 1e9;
            println!(
                "{name:5} {codec:4}  build {:5.2} GB/s ({:4.0} ns/page)  decode {:5.2} GB/s  ratio {:.3}",
                gigabytes / build,
                build * 1e9 / PAGES as f64,
                gigabytes / decode,
                bytes as f64 / memory.len() as f64,
            );
        }
    }
    Ok(())
}
