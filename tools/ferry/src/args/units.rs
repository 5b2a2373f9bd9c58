//! Sizes and rates, as they are written.

/// How much memory a machine may use; none: as much as it likes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limit(pub(crate) Option<u64>);

pub(super) fn parse_limit(text: &str) -> Result<Limit, String> {
    match text {
        "none" => Ok(Limit(None)),
        text => parse_bytes(text).map(|bytes| Limit(Some(bytes))),
    }
}

/// A size such as `512M`: bytes, with K, M, G or T for 1024, 1024², …
pub(super) fn parse_bytes(text: &str) -> Result<u64, String> {
    let shift = |unit: &str| match unit.to_ascii_uppercase().trim_end_matches("IB") {
        "" | "B" => Some(0),
        "K" => Some(10),
        "M" => Some(20),
        "G" => Some(30),
        "T" => Some(40),
        _ => None,
    };
    scaled(text, |number, unit| number.checked_mul(1 << shift(unit)?)).ok_or_else(|| {
        format!("`{text}` is not a size; write a whole number with K, M, G or T, such as 512M")
    })
}

/// A rate such as `1Gbit`, in bytes a second.
pub(super) fn parse_rate(text: &str) -> Result<u64, String> {
    let bits = |unit: &str| match unit.to_ascii_lowercase().as_str() {
        "bit" => Some(1),
        "kbit" => Some(1000),
        "mbit" => Some(1_000_000),
        "gbit" => Some(1_000_000_000u64),
        _ => None,
    };
    scaled(text, |number, unit| Some(number.checked_mul(bits(unit)?)? / 8))
        .filter(|rate| *rate > 0)
        .ok_or_else(|| format!("`{text}` is not a rate; write a whole number with kbit, Mbit or Gbit, such as 1Gbit"))
}

/// A rate, or 0 for none.
pub(super) fn parse_bandwidth(text: &str) -> Result<u64, String> {
    if text == "none" { Ok(0) } else { parse_rate(text) }
}

fn scaled(text: &str, scale: impl Fn(u64, &str) -> Option<u64>) -> Option<u64> {
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    scale(text[..digits].parse().ok()?, text[digits..].trim())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_binary_and_rates_are_decimal_bits() {
        assert_eq!(parse_bytes("512M"), Ok(512 << 20));
        assert_eq!(parse_bytes("4GiB"), Ok(4 << 30));
        assert_eq!(parse_bytes("4096"), Ok(4096));
        assert_eq!(parse_rate("1Gbit"), Ok(125_000_000));
        for bad in ["", "G", "1X", "-1G", "1.5G", "99999999999999T"] {
            assert!(parse_bytes(bad).is_err(), "{bad}");
        }
        for bad in ["1", "1GB", "0Mbit", "fast"] {
            assert!(parse_rate(bad).is_err(), "{bad}");
        }
    }
}
