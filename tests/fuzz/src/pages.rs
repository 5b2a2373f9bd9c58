//! Pages and lists of pages, out of a fuzzer's bytes.

use arbitrary::{Result, Unstructured};
use ferry_pages::{Layout, PAGE_BYTES, Run};

/// A page that is zero, even, sparse, or hard to compress.
pub(crate) fn page(u: &mut Unstructured<'_>) -> Result<Vec<u8>> {
    let mut page = vec![0; PAGE_BYTES];
    match u.int_in_range(0..=3)? {
        0 => {}
        1 => page.fill(u.arbitrary()?),
        2 => {
            let (at, bytes) = (u.int_in_range(0..=PAGE_BYTES - 32)?, u.int_in_range(0..=32)?);
            let bytes = u.bytes(bytes)?;
            page[at..at + bytes.len()].copy_from_slice(bytes);
        }
        _ => {
            let mut word = u.arbitrary::<u64>()?;
            for byte in &mut page {
                word = word.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                *byte = word.to_le_bytes()[7];
            }
        }
    }
    Ok(page)
}

/// Small and huge extents, with holes, and up to the end of all frames.
pub(crate) fn layout() -> Layout {
    let extents =
        vec![Run::new(0, 300), Run::new(1024, 1 << 20), Run::new(Layout::MAX_FRAME - 16, 16)];
    Layout::new(extents).expect("a layout")
}

/// Insists that runs ascend, do not overlap, and are the machine's.
#[track_caller]
pub(crate) fn assert_runs(runs: &[Run], layout: &Layout) {
    assert!(runs.iter().all(|run| layout.contains(*run)), "{runs:?}");
    assert!(runs.windows(2).all(|two| two[0].end() <= two[1].start), "{runs:?}");
}
