//! A way in for `tests/fuzz`: what one end of a control socket makes of what the other says.

use std::io::{self, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;

use serde::{Serialize, de::DeserializeOwned};

use crate::protocol::{Conversation, Reply, Request};

/// Hears `bytes` as requests, then as replies, to the first line that is none; how many there were.
///
/// # Errors
/// The system has no socket.
///
/// # Panics
/// What was heard is not heard again when it is said.
pub fn hear(bytes: &[u8]) -> io::Result<usize> {
    let same = |one: &Request, other: &Request| assert_eq!(one, other);
    // Figures with a fraction lose their last bit on the way through text.
    Ok(hear_as(bytes, same)? + hear_as(bytes, |_: &Reply, _| {})?)
}

fn hear_as<T: Serialize + DeserializeOwned>(
    bytes: &[u8],
    same: impl Fn(&T, &T),
) -> io::Result<usize> {
    let (mut heard, mut there) = (0, said(bytes)?);
    while let Ok(Some(value)) = there.hear::<T>() {
        let line = serde_json::to_vec(&value).expect("what was heard can be said");
        let again = said(&line)?.hear::<T>().expect("what is said is heard");
        same(&value, &again.expect("something was said"));
        heard += 1;
    }
    Ok(heard)
}

/// The end of a conversation of which the other said `bytes` and left.
fn said(bytes: &[u8]) -> io::Result<Conversation> {
    let (mut here, there) = UnixStream::pair()?;
    here.set_nonblocking(true)?;
    // What does not fit into the socket is not said.
    let _ = here.write(bytes);
    here.shutdown(Shutdown::Write)?;
    Ok(Conversation::new(there))
}
