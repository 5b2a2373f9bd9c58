//! How the bytes of a batch are written, and which ways two hosts have in common.

use std::fmt;

/// How the pages of one batch are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(u8)]
pub enum Codec {
    /// Every page is zero: no payload.
    Zero = 0,
    /// The bytes as they are.
    Raw = 1,
    /// One lz4 block for the whole batch.
    Lz4 = 2,
    /// One zstd frame (level 1) for the whole batch.
    Zstd = 3,
    /// Pages of which the destination said before that it has them: no payload. In no set that is negotiated,
    /// see [`CodecSet::and_same`].
    Same = 4,
    /// Each page for itself, as a pool kept it.
    Packed = 5,
}

impl Codec {
    /// Every codec, by its number.
    pub const ALL: [Self; 6] =
        [Self::Zero, Self::Raw, Self::Lz4, Self::Zstd, Self::Same, Self::Packed];

    /// The codec that the wire calls `number`.
    pub fn from_wire(number: u8) -> Option<Self> {
        Self::ALL.get(usize::from(number)).copied()
    }

    /// Its number on the wire.
    pub fn to_wire(self) -> u8 {
        self as u8
    }

    /// Its name, for reports and options.
    pub fn name(self) -> &'static str {
        match self {
            Self::Zero => "zero",
            Self::Raw => "raw",
            Self::Lz4 => "lz4",
            Self::Zstd => "zstd",
            Self::Same => "same",
            Self::Packed => "packed",
        }
    }

    /// The codec called `name`.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|c| c.name() == name)
    }
}

impl fmt::Display for Codec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A set of codecs. [`Codec::Zero`] and [`Codec::Raw`] are in every set: any host reads them.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct CodecSet(u8);

impl CodecSet {
    /// Zero and raw only.
    pub const BASE: Self = Self(0b0011);
    /// Everything that this version reads and writes anywhere.
    pub const ALL: Self = Self(0b10_1111);

    /// From bits, bit `n` for the codec with number `n`. Bits that this version does not know are
    /// dropped: a newer peer may offer more.
    pub fn from_bits(bits: u8) -> Self {
        Self(bits & Self::ALL.0 | Self::BASE.0)
    }

    /// With [`Codec::Same`]: for a decoder of a destination that said which pages it has.
    #[must_use]
    pub fn and_same(self) -> Self {
        Self(self.0 | 1 << Codec::Same.to_wire())
    }

    /// Bit `n` for the codec with number `n`.
    pub fn bits(self) -> u8 {
        self.0
    }

    /// From names; names that this version does not know are dropped.
    pub fn from_names<'a>(names: impl IntoIterator<Item = &'a str>) -> Self {
        names.into_iter().filter_map(Codec::from_name).collect()
    }

    /// The names, by the codecs' numbers.
    pub fn names(self) -> impl Iterator<Item = &'static str> {
        self.iter().map(Codec::name)
    }

    /// The codecs, by their numbers.
    pub fn iter(self) -> impl Iterator<Item = Codec> {
        Codec::ALL.into_iter().filter(move |c| self.contains(*c))
    }

    /// Whether `codec` is in the set.
    pub fn contains(self, codec: Codec) -> bool {
        self.0 & (1 << codec.to_wire()) != 0
    }

    /// The codecs that are in both sets.
    #[must_use]
    pub fn common(self, other: Self) -> Self {
        Self::from_bits(self.0 & other.0)
    }
}

impl Default for CodecSet {
    fn default() -> Self {
        Self::ALL
    }
}

impl FromIterator<Codec> for CodecSet {
    fn from_iter<I: IntoIterator<Item = Codec>>(codecs: I) -> Self {
        Self::from_bits(codecs.into_iter().fold(0, |bits, c| bits | 1 << c.to_wire()))
    }
}

impl fmt::Display for CodecSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, name) in self.names().enumerate() {
            write!(f, "{}{name}", if i == 0 { "" } else { ", " })?;
        }
        Ok(())
    }
}

impl fmt::Debug for CodecSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "CodecSet({self})")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_hosts_always_have_zero_and_raw_in_common() {
        let lz4 = CodecSet::from_names(["lz4", "brotli"]);
        let zstd = CodecSet::from_iter([Codec::Zstd]);
        assert_eq!(lz4.names().collect::<Vec<_>>(), ["zero", "raw", "lz4"]);
        assert_eq!(lz4.common(zstd), CodecSet::BASE);
        assert_eq!(lz4.common(CodecSet::ALL), lz4);
    }

    #[test]
    fn bits_of_a_newer_peer_are_dropped() {
        assert_eq!(CodecSet::from_bits(0xff), CodecSet::ALL);
        assert_eq!(CodecSet::from_bits(0), CodecSet::BASE);
        assert!(!CodecSet::from_bits(0xff).contains(Codec::Same));
    }

    #[test]
    fn what_is_added_twice_is_in_a_set_once() {
        assert!(CodecSet::BASE.and_same().and_same().contains(Codec::Same));
        assert_eq!(CodecSet::from_iter([Codec::Lz4; 2]), CodecSet::from_iter([Codec::Lz4]));
        for set in [CodecSet::BASE, CodecSet::ALL, CodecSet::from_names(["zstd"])] {
            assert_eq!(CodecSet::from_bits(set.bits()), set);
        }
    }

    #[test]
    fn a_set_is_said_by_the_names_of_its_codecs() {
        let set = CodecSet::from_names(["zstd"]);
        assert_eq!((set.to_string(), format!("{set:?}")), {
            ("zero, raw, zstd".to_owned(), "CodecSet(zero, raw, zstd)".to_owned())
        });
        assert_eq!(Codec::Packed.to_string(), "packed");
    }

    #[test]
    fn numbers_and_names_lead_back_to_their_codec() {
        for codec in Codec::ALL {
            assert_eq!(Codec::from_wire(codec.to_wire()), Some(codec));
            assert_eq!(Codec::from_name(codec.name()), Some(codec));
        }
        assert_eq!(Codec::from_wire(6), None);
    }
}
