//! The compressors and decompressors, with what they keep between batches.

use std::io;

use lz4_flex::block::{CompressTable, compress_into_with_table, get_maximum_output_size};

use crate::{Codec, MAX_BATCH_BYTES};

/// zstd's fastest ordinary level: the next ones halve the speed for a few per cent.
const ZSTD_LEVEL: i32 = 1;

/// Compresses; its buffers are made at the first use.
#[derive(Default)]
pub(crate) struct Compressor {
    lz4: CompressTable,
    zstd: Option<zstd::bulk::Compressor<'static>>,
    out: Vec<u8>,
}

impl Compressor {
    /// `raw` by `codec`, where that is smaller than `raw`.
    pub(crate) fn compress(&mut self, codec: Codec, raw: &[u8]) -> Option<&[u8]> {
        self.out.resize(get_maximum_output_size(MAX_BATCH_BYTES), 0);
        let written = match codec {
            Codec::Zero | Codec::Raw | Codec::Same | Codec::Packed => None,
            Codec::Lz4 => compress_into_with_table(raw, &mut self.out, &mut self.lz4).ok(),
            Codec::Zstd => {
                // Room for less than the input: zstd gives up where it would grow. Without memory
                // for its context the pages travel raw.
                let room = raw.len().saturating_sub(1).min(self.out.len());
                if self.zstd.is_none() {
                    self.zstd = zstd::bulk::Compressor::new(ZSTD_LEVEL).ok();
                }
                let zstd = self.zstd.as_mut()?;
                zstd.compress_to_buffer(raw, &mut self.out[..room]).ok()
            }
        }?;
        (written < raw.len()).then(|| &self.out[..written])
    }
}

/// Decompresses; its context is made at the first use.
#[derive(Default)]
pub(crate) struct Decompressor {
    zstd: Option<zstd::bulk::Decompressor<'static>>,
}

impl Decompressor {
    /// Fills `out` from `payload`, which must give exactly that many bytes.
    pub(crate) fn decompress(
        &mut self,
        codec: Codec,
        payload: &[u8],
        out: &mut [u8],
    ) -> Result<(), String> {
        let words = |e: io::Error| e.to_string();
        let written = match codec {
            Codec::Zero | Codec::Raw | Codec::Same | Codec::Packed => {
                return Err("not a compressed batch".to_owned());
            }
            Codec::Lz4 => {
                lz4_flex::block::decompress_into(payload, out).map_err(|e| e.to_string())?
            }
            Codec::Zstd => {
                let zstd = match &mut self.zstd {
                    Some(zstd) => zstd,
                    none => none.insert(zstd::bulk::Decompressor::new().map_err(words)?),
                };
                zstd.decompress_to_buffer(payload, out).map_err(words)?
            }
        };
        if written != out.len() {
            return Err(format!("it gives {written} bytes instead of {}", out.len()));
        }
        Ok(())
    }
}
