//! What is looked at in every page: is it zero, and what is its digest.

use xxhash_rust::xxh3::{xxh3_64_with_seed, xxh3_128_with_seed};

/// The digest of the page at frame `gfn`, which is not zero.
///
/// xxh3 of the content, seeded with the frame: sums of digests (wrapping) say whether two memories are
/// the same whatever the order in which their pages were added. A zero page has digest 0 by
/// definition, so untouched memory needs no look; no other page has (a computed 0 becomes 1).
pub fn page_digest(gfn: u64, page: &[u8]) -> u64 {
    xxh3_64_with_seed(page, gfn).max(1)
}

/// Another 64 bits of a page: a page that is not sent because the destination has one with the same
/// [`page_digest`] must have the same check as well, so that no accident makes two pages the same.
pub fn page_check(gfn: u64, page: &[u8]) -> u64 {
    (xxh3_128_with_seed(page, !gfn) >> 64) as u64
}

/// Whether every byte of `page` is zero; returns at the first block that is not.
pub fn is_zero(page: &[u8]) -> bool {
    // Blocks of 256 bytes: wide enough to be folded with vector instructions, short enough that a
    // page of data costs a few nanoseconds.
    let (blocks, rest) = page.as_chunks::<256>();
    blocks.iter().all(|block| {
        let (words, _) = block.as_chunks::<8>();
        words.iter().fold(0, |all, word| all | u64::from_ne_bytes(*word)) == 0
    }) && rest.iter().all(|byte| *byte == 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_set_bit_anywhere_is_not_zero() {
        let mut page = vec![0u8; 4096];
        assert!(is_zero(&page));
        for i in 0..4096 {
            page[i] = 1 << (i % 8);
            assert!(!is_zero(&page), "byte {i}");
            page[i] = 0;
        }
        assert!(is_zero(&[]) && is_zero(&[0, 0]) && !is_zero(&[0, 0, 1]));
    }

    #[test]
    fn the_same_content_at_another_frame_has_another_digest() {
        let page = [7u8; 4096];
        assert_ne!(page_digest(1, &page), page_digest(2, &page));
        assert_eq!(page_digest(1, &page), page_digest(1, &page));
    }

    #[test]
    fn what_the_wire_says_of_a_page_never_changes() {
        let page: Vec<u8> = (0..=255).cycle().take(4096).collect();
        let said = [0, 0x12_3456].map(|gfn| (page_digest(gfn, &page), page_check(gfn, &page)));
        let digests = (16_954_781_797_957_734_737, 4_637_347_222_135_008_703);
        let checks = (11_436_093_852_534_486_634, 17_374_209_257_062_135_646);
        assert_eq!(said, [(digests.0, checks.0), (digests.1, checks.1)]);
    }
}
