//! Messages and frames out of a stream of bytes, and messages into it.

use bytes::{Buf, Bytes};

use crate::{ByteSink, ByteSource, LinkError};

/// Bytes of the length in front of a message.
const PREFIX_BYTES: usize = 4;

/// Sends `message` with its length in front (u32, little endian).
///
/// # Errors
/// The link failed, or the message is longer than 4 GiB.
pub async fn send_message(sink: &mut dyn ByteSink, message: &[u8]) -> Result<(), LinkError> {
    let Ok(length) = u32::try_from(message.len()) else {
        return Err(LinkError::TooLong { bytes: message.len() as u64, max: u32::MAX as usize });
    };
    let mut bytes = Vec::with_capacity(PREFIX_BYTES + message.len());
    bytes.extend_from_slice(&length.to_le_bytes());
    bytes.extend_from_slice(message);
    sink.send(bytes.into()).await
}

/// Reads a given number of bytes, or whole messages, from a [`ByteSource`].
///
/// Buffers grow with the bytes that arrive, not with what a peer announces.
pub struct FrameReader {
    source: Box<dyn ByteSource>,
    /// The rest of the piece that was received last.
    piece: Bytes,
    /// What [`fill`](Self::fill) gives out, where it lies in one piece.
    whole: Bytes,
    /// What [`fill`](Self::fill) gives out, where it had to be put together. Kept for the next.
    gathered: Vec<u8>,
}

impl FrameReader {
    /// A reader of `source`.
    pub fn new(source: Box<dyn ByteSource>) -> Self {
        Self { source, piece: Bytes::new(), whole: Bytes::new(), gathered: Vec::new() }
    }

    /// The next `n` bytes. None when the peer finished before the first of them.
    ///
    /// The caller bounds `n`. Not to be cancelled: bytes that were read by then are lost.
    ///
    /// # Errors
    /// The link failed, or the peer finished in the middle.
    pub async fn fill(&mut self, n: usize) -> Result<Option<&[u8]>, LinkError> {
        if n > 0 && !self.next_piece().await? {
            return Ok(None);
        }
        if self.piece.len() >= n {
            self.whole = self.piece.split_to(n);
            return Ok(Some(&self.whole));
        }
        let mut gathered = std::mem::take(&mut self.gathered);
        gathered.clear();
        let result = self.gather(n, &mut gathered).await;
        self.gathered = gathered;
        result.map(|()| Some(self.gathered.as_slice()))
    }

    /// The next message with its length in front; at most `max` bytes. None when the peer finished
    /// before it.
    ///
    /// # Errors
    /// The link failed, the peer finished in the middle, or the message is too long.
    pub async fn read_message(&mut self, max: usize) -> Result<Option<Bytes>, LinkError> {
        self.read_message_within(|| max).await
    }

    /// As [`read_message`](Self::read_message), where `max` is asked for once the message begins.
    ///
    /// # Errors
    /// As [`read_message`](Self::read_message).
    pub async fn read_message_within(
        &mut self,
        max: impl FnOnce() -> usize,
    ) -> Result<Option<Bytes>, LinkError> {
        let Some(prefix) = self.fill(PREFIX_BYTES).await? else { return Ok(None) };
        let length = prefix.try_into().map_or(0, u32::from_le_bytes);
        let (bytes, max) = (usize::try_from(length).unwrap_or(usize::MAX), max());
        if bytes > max {
            return Err(LinkError::TooLong { bytes: length.into(), max });
        }
        if self.piece.len() >= bytes {
            return Ok(Some(self.piece.split_to(bytes)));
        }
        let mut message = Vec::new();
        self.gather(bytes, &mut message).await?;
        Ok(Some(message.into()))
    }

    /// See [`ByteSource::widen`].
    pub fn widen(&self) -> Box<dyn FnOnce() + Send> {
        self.source.widen()
    }

    /// The link's source, and what was received from it but not read.
    pub fn into_parts(self) -> (Box<dyn ByteSource>, Bytes) {
        (self.source, self.piece)
    }

    /// Appends to `into` until it has `n` bytes.
    async fn gather(&mut self, n: usize, into: &mut Vec<u8>) -> Result<(), LinkError> {
        while into.len() < n {
            if !self.next_piece().await? {
                return Err(LinkError::Truncated { expected: n, found: into.len() });
            }
            let take = self.piece.len().min(n - into.len());
            into.extend_from_slice(&self.piece[..take]);
            self.piece.advance(take);
        }
        Ok(())
    }

    /// Sees to it that `piece` has bytes; false when the peer finished.
    async fn next_piece(&mut self) -> Result<bool, LinkError> {
        while self.piece.is_empty() {
            self.piece = match self.source.ready() {
                Some(piece) => piece,
                None => match self.source.recv().await? {
                    Some(piece) => piece,
                    None => return Ok(false),
                },
            };
        }
        Ok(true)
    }
}
