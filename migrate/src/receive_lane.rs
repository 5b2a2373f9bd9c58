//! One lane of the destination: takes frames off the link, verifies them, installs their pages.

use std::sync::Arc;

use bytes::Bytes;
use ferry_codec::{Codec, CodecSet, Decoder, HEADER_BYTES, parse_header};
use ferry_transport::{ByteSink, FrameReader};

use crate::install::{Installed, Installer};
use crate::recall::{Lane, Recalls};
use crate::serve::ACK;

/// How a lane ended.
pub(crate) enum LaneEnd {
    /// The source finished it.
    Finished,
    /// The link was lost.
    Lost(String),
    /// The source sent something that is not a batch of this machine's pages.
    Bad(String),
}

/// Runs a lane to its end; `installed` is told the round of each batch that came before the machine runs,
/// and the source is told on `sink` of each that came after. Where there is an old copy, its pages may be named.
pub(crate) async fn run(
    mut reader: FrameReader,
    mut sink: Option<&mut Box<dyn ByteSink>>,
    installer: &Arc<Installer>,
    codecs: CodecSet,
    old: Option<Recalls>,
    installed: impl Fn(u32),
) -> LaneEnd {
    let allowed = if old.is_some() { codecs.and_same() } else { codecs };
    let mut decoder = Decoder::new(installer.layout().clone(), allowed);
    let mut old = old.map(|old| Lane::new(old, installer.clone()));
    loop {
        let header = match reader.fill(HEADER_BYTES).await {
            Ok(Some(bytes)) => parse_header(bytes),
            Ok(None) => return LaneEnd::Finished,
            Err(e) => return LaneEnd::Lost(e.to_string()),
        };
        let header = match header {
            Ok(header) => header,
            Err(e) => return LaneEnd::Bad(e.to_string()),
        };
        let body = match reader.fill(header.body_bytes()).await {
            Ok(Some(body)) => body,
            Ok(None) => {
                return LaneEnd::Bad("the source finished a lane in the middle of a frame".into());
            }
            Err(e) => return LaneEnd::Lost(e.to_string()),
        };
        let batch = match decoder.decode(&header, body) {
            Ok(batch) => batch,
            Err(e) => return LaneEnd::Bad(e.to_string()),
        };
        let round = batch.round;
        let done = match (batch.codec, &mut old) {
            (Codec::Same, Some(old)) => old.install(&batch),
            _ => installer.install(&batch),
        };
        match done {
            Ok(Installed::Filled) => installed(round),
            Ok(Installed::Paged) => {
                if let Some(sink) = &mut sink
                    && let Err(e) = sink.send(Bytes::from_static(&[ACK])).await
                {
                    return LaneEnd::Lost(e.to_string());
                }
            }
            Ok(Installed::Closed) => {
                return LaneEnd::Bad("pages came after the machine was complete".into());
            }
            Err(e) => return LaneEnd::Bad(crate::words(&e)),
        }
    }
}
