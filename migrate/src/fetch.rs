//! The destination's urgent lane: asks for pages that somebody waits for, and takes them.

use bytes::Bytes;
use ferry_codec::CodecSet;
use ferry_pager::Waits;
use ferry_pages::PageSet;
use ferry_protocol::{DestinationEvent, Fetched};
use ferry_transport::{ByteSink, FrameReader};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender};

use crate::install::Installer;
use crate::receive_lane::{self, LaneEnd};

/// The way to the urgent lane.
#[derive(Clone, Default)]
pub(crate) struct Asks(Arc<Mutex<Asking>>);

#[derive(Default)]
struct Asking {
    lane: Option<UnboundedSender<u64>>,
    /// Owed pages that were named, and cannot be had from the old copy: they come only if they are asked for.
    lacking: PageSet,
}

impl Asking {
    fn ask(&self, gfns: impl IntoIterator<Item = u64>) {
        // Without a lane, they are asked for when there is one again.
        if let Some(lane) = &self.lane {
            for gfn in gfns {
                let _ = lane.send(gfn);
            }
        }
    }
}

impl Asks {
    fn lock(&self) -> MutexGuard<'_, Asking> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// From now on to `lane`, and at once what of `missing` would not come otherwise.
    pub(crate) fn open(&self, lane: UnboundedSender<u64>, missing: &PageSet) {
        let mut asking = self.lock();
        asking.lane = Some(lane);
        asking.lacking.intersect_with(missing);
        asking.ask(asking.lacking.runs().flat_map(|run| run.start..run.end()));
    }

    /// There is no lane any more.
    pub(crate) fn close(&self) {
        self.lock().lane = None;
    }

    /// Somebody waits for these pages.
    pub(crate) fn ask(&self, gfns: impl IntoIterator<Item = u64>) {
        self.lock().ask(gfns);
    }

    /// These pages, which are owed, were named and cannot be had.
    pub(crate) fn lacking(&self, pages: &PageSet) {
        let mut asking = self.lock();
        asking.lacking.union_with(pages);
        asking.ask(pages.runs().flat_map(|run| run.start..run.end()));
    }
}

/// Asks for the pages in `wanted`, and installs what comes, until either ends; what is to be told of it.
pub(crate) async fn run(
    reader: FrameReader,
    mut sink: Box<dyn ByteSink>,
    mut wanted: UnboundedReceiver<u64>,
    installer: &Arc<Installer>,
    codecs: CodecSet,
) -> Option<DestinationEvent> {
    let ask = async {
        let mut gfns = Vec::new();
        while wanted.recv_many(&mut gfns, 64).await > 0 {
            let bytes: Vec<u8> = gfns.drain(..).flat_map(u64::to_le_bytes).collect();
            if let Err(e) = sink.send(Bytes::from(bytes)).await {
                return LaneEnd::Lost(e.to_string());
            }
        }
        // Another link has taken over, or the session is over.
        LaneEnd::Finished
    };
    let ended = tokio::select! {
        ended = ask => ended,
        ended = receive_lane::run(reader, None, installer, codecs, None, |_| {}) => ended,
    };
    match ended {
        LaneEnd::Finished => {
            let _ = sink.finish().await;
            None
        }
        // All pages are here, and a source that is done closes this lane: it may be seen before its last word
        // on the control channel, which says what becomes of the session.
        LaneEnd::Lost(_) if !installer.is_paging() => None,
        LaneEnd::Lost(why) => Some(DestinationEvent::LinkLost(why)),
        LaneEnd::Bad(why) => {
            sink.close(&why).await;
            Some(DestinationEvent::BadPages(why))
        }
    }
}

/// What a pager measured, for the source's report: of a machine with `vcpus` that began to run `ran_after` the
/// pager.
pub(crate) fn measured(waits: &Waits, took: Duration, vcpus: u32, ran_after: Duration) -> Fetched {
    let nanos = |d: Duration| u64::try_from(d.as_nanos()).unwrap_or(u64::MAX);
    let at = |quantile| waits.nanos.value_at_quantile(quantile);
    Fetched {
        faults: waits.counts.faults,
        requested: waits.counts.requested,
        pushed: waits.counts.pushed,
        late: waits.counts.late,
        zeros: waits.counts.zeros,
        wait_mean_ns: mean(waits),
        wait_p50_ns: at(0.5),
        wait_p90_ns: at(0.9),
        wait_p99_ns: at(0.99),
        wait_max_ns: waits.nanos.max(),
        waited_by_thread_ns: waits.by_thread.iter().map(|(_, wait)| nanos(*wait)).collect(),
        took_ns: nanos(took),
        full_speed_ns: nanos(waits.waited.full_speed_after(vcpus).saturating_sub(ran_after)),
    }
}

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "saturates; not negative"
)]
fn mean(waits: &Waits) -> u64 {
    waits.nanos.mean() as u64
}
