//! One lane of the destination: takes frames off the link, verifies them, installs their pages.

use ferry_codec::{CodecSet, Decoder, HEADER_BYTES, parse_header};
use ferry_transport::FrameReader;

use crate::install::Installer;

/// How a lane ended.
pub(crate) enum LaneEnd {
    /// The source finished it.
    Finished,
    /// The link was lost.
    Lost(String),
    /// The source sent something that is not a batch of this machine's pages.
    Bad(String),
}

/// Runs a lane to its end; `installed` is told the round of each batch.
pub(crate) async fn run(
    mut reader: FrameReader,
    installer: &Installer,
    codecs: CodecSet,
    installed: impl Fn(u32),
) -> LaneEnd {
    let mut decoder = Decoder::new(installer.layout().clone(), codecs);
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
        match installer.install(&batch) {
            Ok(true) => installed(round),
            Ok(false) => return LaneEnd::Bad("pages came after the machine was complete".into()),
            Err(e) => return LaneEnd::Bad(crate::words(&e)),
        }
    }
}
