//! Numbers that stand as text in a manifest: JSON's own lose digits beyond 2⁵³.

use std::fmt;

use serde::{Deserialize, Serialize};

macro_rules! hex_number {
    ($(#[$doc:meta])* $name:ident($inner:ty), $digits:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $name(pub $inner);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!("{:0", $digits, "x}"), self.0)
            }
        }

        impl $name {
            /// From exactly the digits that it is shown by.
            pub fn parse(text: &str) -> Option<Self> {
                let digits = |c: char| c.is_ascii_digit() || matches!(c, 'a'..='f');
                let right = text.len() == $digits && text.chars().all(digits);
                right.then(|| <$inner>::from_str_radix(text, 16).ok().map(Self)).flatten()
            }
        }

        impl From<$name> for String {
            fn from(number: $name) -> Self {
                number.to_string()
            }
        }

        impl TryFrom<String> for $name {
            type Error = String;
            fn try_from(text: String) -> Result<Self, String> {
                let wrong = || format!(concat!("`{:.40}` is not ", $digits, " hexadecimal digits"), text);
                Self::parse(&text).ok_or_else(wrong)
            }
        }
    };
}

hex_number!(
    /// What names a bundle for ever, whatever its directory is called; or a machine.
    BundleId(u128),
    32
);
hex_number!(
    /// A checksum or a digest.
    Sum(u64),
    16
);

impl BundleId {
    /// A new one, that no other bundle has.
    pub fn random() -> Self {
        Self(rand::random())
    }
}

/// Bytes as hexadecimal text, for the machine's opaque configuration.
pub(crate) mod hex_bytes {
    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    pub(crate) fn serialize<S: Serializer>(bytes: &[u8], to: S) -> Result<S::Ok, S::Error> {
        let text: String = bytes.iter().map(|b| format!("{b:02x}")).collect();
        to.serialize_str(&text)
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Vec<u8>, D::Error> {
        let text = String::deserialize(from)?;
        let digit = |c: u8| char::from(c).to_digit(16).and_then(|d| u8::try_from(d).ok());
        let (pairs, rest) = text.as_bytes().as_chunks::<2>();
        let bytes = pairs.iter().map(|[high, low]| Some(digit(*high)? << 4 | digit(*low)?));
        match (bytes.collect(), rest.is_empty()) {
            (Some(bytes), true) => Ok(bytes),
            _ => Err(D::Error::custom("not hexadecimal bytes")),
        }
    }
}
