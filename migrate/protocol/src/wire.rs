//! The one place that knows how control messages and state are encoded (bincode 2, serde).

use bincode::config::{Configuration, Fixint, Limit, LittleEndian};
use serde::{Serialize, de::DeserializeOwned};

/// No control message, state included, is larger than this.
pub const MAX_MESSAGE_BYTES: usize = 64 << 20;

const CONFIG: Configuration<LittleEndian, Fixint, Limit<MAX_MESSAGE_BYTES>> =
    bincode::config::standard().with_fixed_int_encoding().with_limit::<MAX_MESSAGE_BYTES>();

/// Bytes that are not the message they should be.
#[derive(Debug, thiserror::Error)]
#[error("cannot {action} a message: {why}")]
pub struct WireError {
    action: &'static str,
    why: String,
}

/// Encodes `value`.
///
/// # Errors
/// Larger than [`MAX_MESSAGE_BYTES`].
pub fn encode<T: Serialize>(value: &T) -> Result<Vec<u8>, WireError> {
    bincode::serde::encode_to_vec(value, CONFIG)
        .map_err(|e| WireError { action: "encode", why: e.to_string() })
}

/// Decodes all of `bytes`; what is left over is an error.
///
/// # Errors
/// Bytes that are not a `T`.
pub fn decode<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, WireError> {
    let fail = |why: String| WireError { action: "decode", why };
    let (value, used) =
        bincode::serde::decode_from_slice(bytes, CONFIG).map_err(|e| fail(e.to_string()))?;
    if used != bytes.len() {
        return Err(fail(format!("{} bytes left over", bytes.len() - used)));
    }
    Ok(value)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_behind_a_message_are_an_error() {
        let mut bytes = encode(&(7u8, 9u64)).unwrap();
        assert_eq!(decode::<(u8, u64)>(&bytes).unwrap(), (7, 9));
        bytes.extend([0; 3]);
        let why = decode::<(u8, u64)>(&bytes).unwrap_err().to_string();
        assert_eq!(why, "cannot decode a message: 3 bytes left over");
        assert!(decode::<(u8, u64)>(&bytes[..8]).is_err());
    }
}
