//! What the guest says of its memory (virtio 1.2, section 5.5.6.3).

use serde::{Deserialize, Serialize};

/// Bytes of a tag and its value.
pub(crate) const ENTRY_BYTES: usize = 10;
/// More than there are tags: what a guest sends beyond is not read.
pub(crate) const MAX_BYTES: usize = 64 * ENTRY_BYTES;

/// The guest's figures, those of them that it gave.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Statistics {
    /// Bytes swapped in.
    pub swapped_in_bytes: Option<u64>,
    /// Bytes swapped out.
    pub swapped_out_bytes: Option<u64>,
    /// Faults that needed a disk.
    pub major_faults: Option<u64>,
    /// Faults that did not.
    pub minor_faults: Option<u64>,
    /// Bytes that nobody uses.
    pub free_bytes: Option<u64>,
    /// Bytes that the guest has to use.
    pub total_bytes: Option<u64>,
    /// Bytes that could be used without swapping.
    pub available_bytes: Option<u64>,
    /// Bytes of files that can be read again.
    pub cached_bytes: Option<u64>,
    /// Huge pages that were allocated.
    pub huge_page_allocations: Option<u64>,
    /// Huge pages that could not be.
    pub huge_page_failures: Option<u64>,
}

impl Statistics {
    /// The figures in `bytes`; tags that are not known here, and a piece of an entry, are left out.
    pub(crate) fn parse(bytes: &[u8]) -> Self {
        let mut found = Self::default();
        for entry in bytes.chunks_exact(ENTRY_BYTES) {
            let Some((tag, value)) = entry.split_first_chunk::<2>() else { continue };
            let Some(value) = value.first_chunk::<8>() else { continue };
            let place = match u16::from_le_bytes(*tag) {
                0 => &mut found.swapped_in_bytes,
                1 => &mut found.swapped_out_bytes,
                2 => &mut found.major_faults,
                3 => &mut found.minor_faults,
                4 => &mut found.free_bytes,
                5 => &mut found.total_bytes,
                6 => &mut found.available_bytes,
                7 => &mut found.cached_bytes,
                8 => &mut found.huge_page_allocations,
                9 => &mut found.huge_page_failures,
                _ => continue,
            };
            *place = Some(u64::from_le_bytes(*value));
        }
        found
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_tags_are_taken_and_others_left_out() {
        let mut bytes = Vec::new();
        for (tag, value) in [(4u16, 1u64), (99, 2), (5, 3)] {
            bytes.extend(tag.to_le_bytes());
            bytes.extend(value.to_le_bytes());
        }
        bytes.extend([6, 0, 1]);
        let expected =
            Statistics { free_bytes: Some(1), total_bytes: Some(3), ..Statistics::default() };
        assert_eq!(Statistics::parse(&bytes), expected);
    }
}
