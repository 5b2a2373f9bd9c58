//! Sizes as they are written and said: `3G`, `5.64 GiB`.

use std::fmt;
use std::str::FromStr;

use serde::Deserialize;

/// A number of bytes, read from `512M` and said as `512 MiB`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Deserialize)]
#[serde(try_from = "String")]
pub struct Size(pub u64);

/// A word that is no size.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is not a size: write a whole number with K, M, G or T, such as 512M")]
pub struct NotASize(String);

impl FromStr for Size {
    type Err = NotASize;

    fn from_str(text: &str) -> Result<Self, NotASize> {
        let parse = || {
            let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
            let shift = match text[digits..].trim().to_ascii_uppercase().trim_end_matches("IB") {
                "" | "B" => 0,
                "K" => 10,
                "M" => 20,
                "G" => 30,
                "T" => 40,
                _ => return None,
            };
            text[..digits].parse::<u64>().ok()?.checked_mul(1 << shift)
        };
        parse().map(Self).ok_or_else(|| NotASize(text.to_owned()))
    }
}

impl TryFrom<String> for Size {
    type Error = NotASize;

    fn try_from(text: String) -> Result<Self, NotASize> {
        text.parse()
    }
}

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const UNITS: [(&str, u32); 4] = [("TiB", 40), ("GiB", 30), ("MiB", 20), ("KiB", 10)];
        let Some((unit, shift)) = UNITS.into_iter().find(|(_, shift)| self.0 >> shift > 0) else {
            return write!(f, "{} bytes", self.0);
        };
        // In whole units where that is short: it is exact, and can be written into a plan.
        for (unit, shift) in UNITS {
            let whole = self.0 >> shift;
            if whole << shift == self.0 && whole < 10_000 {
                return write!(f, "{whole} {unit}");
            }
        }
        // Rounded down: what is said to be there is there.
        let hundredths = (u128::from(self.0) * 100) >> shift;
        write!(f, "{}.{:02} {unit}", hundredths / 100, hundredths % 100)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_binary_and_are_said_in_the_unit_that_fits() {
        for (written, bytes, said) in [
            ("0", 0, "0 bytes"),
            ("1023", 1023, "1023 bytes"),
            ("512M", 512 << 20, "512 MiB"),
            ("1536m", 1536 << 20, "1536 MiB"),
            ("4 GiB", 4 << 30, "4 GiB"),
            ("2T", 2 << 40, "2 TiB"),
            ("1025K", 1025 << 10, "1025 KiB"),
            ("10001K", 10001 << 10, "9.76 MiB"),
            ("1000000001", 1_000_000_001, "953.67 MiB"),
            ("18446744073709551615", u64::MAX, "16777215.99 TiB"),
        ] {
            assert_eq!(written.parse(), Ok(Size(bytes)));
            assert_eq!(Size(bytes).to_string(), said);
        }
        for bad in ["", "G", "1X", "-1G", "1.5G", "99999999999999T", "1GG"] {
            assert!(bad.parse::<Size>().is_err(), "{bad}");
        }
    }
}
