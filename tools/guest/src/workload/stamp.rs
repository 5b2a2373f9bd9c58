//! What a page must contain: every word follows from (seed, page index, version).
//!
//! ```text
//! word 0      version << 32 | index       readable in a dump: which page, which version
//! word 1      tag = hash(seed, index, version)
//! words 2..r  scramble(tag, word number)  `random_percent` of the words: incompressible
//! words r..   tag rotated                 one word repeated: compressible, yet new in each version
//!             or text                     if asked for: a log of words and numbers
//! word 511    !tag                        a page torn anywhere has two different tags
//! ```

/// 64-bit words in a page.
pub const WORDS: usize = 512;

const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;

/// Version of a page that was never written, or was given back to the host since: it is zero.
pub const NEVER_WRITTEN: u32 = 0;
/// Version of a page that was out of use: it may hold anything.
pub const ANYTHING: u32 = u32::MAX;

/// The version after `version`; never one that says that a page was not written.
pub const fn next_version(version: u32) -> u32 {
    // Not 1, which is the fill's.
    if version >= ANYTHING - 1 { 2 } else { version + 1 }
}

/// The content of one page at one version.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stamp {
    head: u64,
    tag: u64,
    random_end: usize,
    text: bool,
}

/// What a log is made of, eight letters each, and a place for eight digits.
const VOCABULARY: [&[u8; 8]; 32] = [
    b" client ",
    b" server ",
    b"request ",
    b" opened ",
    b" closed\n",
    b" failed\n",
    b" as user",
    b" backend",
    b"timeout ",
    b" retried",
    b"  info: ",
    b"  warn: ",
    b" error: ",
    b" status=",
    b" length=",
    b"session ",
    b" address",
    b" of disk",
    b" in pool",
    b" storage",
    b" network",
    b"\n[main] ",
    b"\n[http] ",
    b"\n[auth] ",
    b" process",
    b" started",
    b" stopped",
    b"version=",
    b"  took: ",
    b" seconds",
    b" queued\n",
    b" sent to",
];

impl Stamp {
    /// Content of page `index` at `version` of a guest with these parameters.
    #[inline]
    pub fn of(params: &super::Params, index: u32, version: u32) -> Self {
        let stamp = Self::new(params.seed_of(index), index, version, params.percent_at(version));
        Self { text: params.text, ..stamp }
    }

    /// Content of page `index` at `version`, with `random_percent` (at most 100) of its words random.
    pub fn new(seed: u64, index: u32, version: u32, random_percent: u32) -> Self {
        let head = u64::from(version) << 32 | u64::from(index);
        let random = (WORDS - 3) * random_percent.min(100) as usize / 100;
        Self { head, tag: mix(head ^ mix(seed)), random_end: 2 + random, text: false }
    }

    /// Calls `f(word number, word)` for all words in order until it returns false; the number of the
    /// word that it returned false for.
    #[inline(always)]
    pub fn try_each(&self, mut f: impl FnMut(usize, u64) -> bool) -> Option<usize> {
        if !f(0, self.head) {
            return Some(0);
        }
        if !f(1, self.tag) {
            return Some(1);
        }
        for i in 2..self.random_end {
            if !f(i, self.scrambled(i)) {
                return Some(i);
            }
        }
        for i in self.random_end..WORDS - 1 {
            if !f(i, self.filler(i)) {
                return Some(i);
            }
        }
        (!f(WORDS - 1, !self.tag)).then_some(WORDS - 1)
    }

    /// Word number `i`, below [`WORDS`].
    pub fn word(&self, i: usize) -> u64 {
        match i {
            0 => self.head,
            1 => self.tag,
            _ if i == WORDS - 1 => !self.tag,
            _ if i < self.random_end => self.scrambled(i),
            _ => self.filler(i),
        }
    }

    fn scrambled(&self, i: usize) -> u64 {
        let x = self.tag.wrapping_add((i as u64).wrapping_mul(GOLDEN));
        (x ^ x >> 32).wrapping_mul(0xd6e8_feb8_6659_fd93)
    }

    #[inline(always)]
    fn filler(&self, i: usize) -> u64 {
        if self.text { self.letters(i) } else { self.tag.rotate_left(32) }
    }

    /// Eight letters of the vocabulary or, one time in four, digits.
    fn letters(&self, i: usize) -> u64 {
        let x = self.scrambled(i);
        if x >> 62 == 0 {
            // Three bits to a digit: an octal number.
            let spread = (0..8).fold(0, |digits, n| digits | (x >> (4 * n) & 7) << (8 * n));
            return spread | u64::from_le_bytes(*b"00000000");
        }
        u64::from_le_bytes(*VOCABULARY[(x >> 32) as usize % VOCABULARY.len()])
    }
}

/// The finalizer of SplitMix64 (Steele, Lea, Flood 2014): a bijection.
pub(super) const fn mix(x: u64) -> u64 {
    let x = x.wrapping_add(GOLDEN);
    let x = (x ^ x >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ x >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ x >> 31
}

/// What is wrong with a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u64)]
pub enum Kind {
    /// It has an older version of itself: a lost write.
    Stale = 1,
    /// It has a newer version of itself: the table of versions is stale.
    Newer = 2,
    /// It is another page.
    OtherPage = 3,
    /// It is all zero where it was written before.
    Zero = 4,
    /// It begins as it should and goes on otherwise.
    Torn = 5,
    /// It begins with no stamp.
    Garbage = 6,
    /// It was never written and is not zero.
    NotBlank = 7,
}

impl Kind {
    /// Every kind.
    pub const ALL: [Self; 7] = [
        Self::Stale,
        Self::Newer,
        Self::OtherPage,
        Self::Zero,
        Self::Torn,
        Self::Garbage,
        Self::NotBlank,
    ];

    /// In words.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Stale => "stale",
            Self::Newer => "newer",
            Self::OtherPage => "other-page",
            Self::Zero => "zero",
            Self::Torn => "torn",
            Self::Garbage => "garbage",
            Self::NotBlank => "not-blank",
        }
    }
}

/// A page that does not have the content it must have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mismatch {
    /// What it looks like.
    pub kind: Kind,
    /// The page, counted in the arena.
    pub index: u32,
    /// The version that it should have.
    pub version: u32,
    /// The number of the first wrong word.
    pub word: u32,
    /// What that word should be.
    pub expected: u64,
    /// What it is.
    pub found: u64,
    /// Words 0 and 1 as found: version << 32 | index, and the tag.
    pub head: [u64; 2],
}

impl Mismatch {
    /// Judges a page whose first wrong word is `word`, from its first two words.
    pub(super) fn judge(
        params: &super::Params,
        index: u32,
        version: u32,
        word: usize,
        found: u64,
        head: [u64; 2],
    ) -> Self {
        let of = |index, version| Stamp::of(params, index, version);
        #[expect(clippy::cast_possible_truncation, reason = "the low half is the index")]
        let found_index = head[0] as u32;
        #[expect(clippy::cast_possible_truncation, reason = "a word number is below 512")]
        let number = word as u32;
        let found_version = (head[0] >> 32) as u32;
        let wanted = of(index, version);
        let kind = if version == 0 {
            Kind::NotBlank
        } else if head == [0, 0] {
            Kind::Zero
        } else if head[0] == wanted.head {
            Kind::Torn
        } else if of(found_index, found_version).tag != head[1] {
            Kind::Garbage
        } else if found_index != index {
            Kind::OtherPage
        } else if found_version < version {
            Kind::Stale
        } else {
            Kind::Newer
        };
        let expected = if version == 0 { 0 } else { wanted.word(word) };
        Self { kind, index, version, word: number, expected, found, head }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn page(s: &Stamp) -> Vec<u64> {
        let mut words = vec![0; WORDS];
        assert_eq!(
            s.try_each(|i, w| {
                words[i] = w;
                true
            }),
            None
        );
        words
    }

    #[test]
    fn two_versions_or_two_pages_differ_in_every_word() {
        for percent in [0, 1, 50, 99, 100] {
            let base = page(&Stamp::new(1, 7, 3, percent));
            for (seed, index, version) in [(1, 7, 2), (1, 7, 4), (1, 8, 3), (2, 7, 3)] {
                let other = page(&Stamp::new(seed, index, version, percent));
                let from = usize::from(seed == 2); // the head is the same there
                assert!(
                    (from..WORDS).all(|i| base[i] != other[i]),
                    "{percent} {seed} {index} {version}"
                );
            }
        }
    }

    #[test]
    fn word_and_try_each_agree() {
        for percent in 0..=100 {
            let s = Stamp::new(5, 1000, 77, percent);
            assert_eq!(s.try_each(|i, w| s.word(i) == w), None);
        }
    }

    #[test]
    fn text_is_text_that_no_other_page_or_version_has() {
        let params = super::super::Params::parse("rest=text random=0").unwrap();
        let pages = [(7, 2), (7, 3), (8, 2)].map(|(i, v)| page(&Stamp::of(&params, i, v)));
        for words in &pages {
            let text: Vec<u8> = words[2..WORDS - 1].iter().flat_map(|w| w.to_le_bytes()).collect();
            assert!(text.iter().all(|b| b.is_ascii_graphic() || b" \n".contains(b)));
            let digits = text.iter().filter(|b| b.is_ascii_digit()).count();
            assert!((text.len() / 6..text.len() / 3).contains(&digits), "{digits}");
        }
        for (a, b) in [(0, 1), (0, 2), (1, 2)] {
            let alike = pages[a].iter().zip(&pages[b]).filter(|(a, b)| a == b).count();
            assert!(alike < WORDS / 10, "{alike}");
        }
        let s = Stamp::of(&params, 7, 2);
        assert_eq!(s.try_each(|i, w| s.word(i) == w), None);
    }

    #[test]
    fn the_random_share_is_what_was_asked_for() {
        for (percent, least, most) in [(0, 0, 4), (50, 250, 260), (100, 510, 512)] {
            let words = page(&Stamp::new(5, 1, 1, percent));
            let distinct = words.iter().collect::<std::collections::HashSet<_>>().len();
            assert!((least..=most).contains(&distinct), "{percent} %: {distinct} distinct words");
        }
    }

    #[test]
    fn versions_never_come_back_to_unwritten_or_to_the_fill() {
        assert_eq!(next_version(NEVER_WRITTEN), 1);
        assert_eq!(next_version(ANYTHING), 2);
        assert_eq!(next_version(ANYTHING - 1), 2);
    }
}
