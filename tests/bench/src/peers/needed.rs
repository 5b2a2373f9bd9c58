//! How many bytes a guest's pages need at least: what a good codec makes of them.

use ferry_guest::workload::{Params, Stamp, WORDS};

use crate::Failure;
use crate::cases::Case;

/// Pages that are compressed together: as many as a codec can without keeping others waiting.
const BATCH: u32 = 16;
const BATCHES: u32 = 16;
/// zstd's own default.
const LEVEL: i32 = 3;

/// Bytes that zstd makes of the arena as the fill writes it.
pub(crate) fn bytes(case: &Case) -> Result<f64, Failure> {
    let params = Params::parse(case.workload).map_err(|e| e.to_string())?;
    if params.fill_zeros {
        return Ok(0.0);
    }
    let mut sum = 0;
    for batch in 0..BATCHES {
        let pages = batch * BATCH..(batch + 1) * BATCH;
        let stamps = pages.map(|index| Stamp::of(&params, index, 1));
        let words = stamps.flat_map(|stamp| (0..WORDS).map(move |i| stamp.word(i)));
        let raw: Vec<u8> = words.flat_map(u64::to_le_bytes).collect();
        sum += zstd::bulk::compress(&raw, LEVEL)?.len().min(raw.len());
    }
    let raw = u64::from(BATCH * BATCHES) * 4096;
    Ok(params.arena_bytes as f64 * sum as f64 / raw as f64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cases::case;

    #[test]
    fn what_is_random_is_needed_whole_and_what_repeats_is_not() {
        let share = |name| {
            let case = case(name).unwrap();
            let arena = Params::parse(case.workload).unwrap().arena_bytes;
            bytes(case).unwrap() / arena as f64
        };
        assert!((0.999..=1.0).contains(&share("random")), "{}", share("random"));
        assert!((0.25..0.28).contains(&share("idle")), "{}", share("idle"));
        assert!((0.1..0.4).contains(&share("text")), "{}", share("text"));
        assert_eq!(share("zero"), 0.0);
    }
}
