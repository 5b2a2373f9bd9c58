//! The source after a post-copy hand-over: pages that the destination asks for, at once; all others
//! pushed on the lanes, no faster than the link takes them, so that no queue stands in front of those.

use std::collections::VecDeque;
use std::io;
use std::ops::RangeInclusive;
use std::os::fd::OwnedFd;
use std::sync::atomic::Ordering;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use ferry_codec::{BatchBuilder, Codec, zero_frames};
use ferry_pages::{PAGE_BYTES, PageSet, Run};
use ferry_postcopy::{PushPace, PushQueue};
use ferry_protocol::Hello;
use ferry_transport::{ByteSink, Channel, FrameReader, LinkError};
use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create,
    timerfd_settime,
};
use tokio::io::unix::AsyncFd;

use crate::report::PageCounts;
use crate::send_lane::{LaneEvent, Sender, Shared, closed, with_channel};

/// What one batch of pushed pages may take of the link's time: a page that somebody waits for is sent after
/// the batch that is under way.
const BATCH_TIME: Duration = Duration::from_micros(200);
/// Pages pushed at once, at least and at most.
const PUSH_PAGES: RangeInclusive<u64> = 8..=64;
/// Bytes of a request: the page's frame number, little endian.
const REQUEST_BYTES: usize = 8;
/// What the destination answers to each frame that it installed while it fetches pages.
pub(crate) const ACK: u8 = 0x06;

/// The pages that are owed, as all lanes share them.
pub(crate) struct Serving {
    round: u32,
    owed: PageSet,
    /// Pages of the record.
    record_pages: u64,
    queue: Mutex<PushQueue>,
    pace: Mutex<PushPace>,
    /// What was sent since the hand-over.
    sent: Mutex<PageCounts>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Serving {
    /// `owed`, sent under the number `round`, those in `record` first; `limit` in bytes a second.
    pub(crate) fn new(round: u32, owed: PageSet, record: &[PageSet], limit: Option<u64>) -> Self {
        let mut named = PageSet::new();
        record.iter().for_each(|pages| named.union_with(pages));
        named.intersect_with(&owed);
        let record: Vec<Run> = record.iter().flat_map(PageSet::runs).collect();
        let queue = Mutex::new(PushQueue::new(owed.clone(), record));
        let (pace, sent) = (Mutex::new(PushPace::new(limit)), Mutex::default());
        Self { round, owed, record_pages: named.len(), queue, pace, sent }
    }

    /// No more bytes a second than this from now on.
    pub(crate) fn set_limit(&self, limit: Option<u64>) {
        lock(&self.pace).set_limit(limit);
    }

    /// Pages sent since the hand-over, by codec.
    pub(crate) fn pages(&self) -> PageCounts {
        *lock(&self.sent)
    }

    /// The pages that are owed.
    pub(crate) fn owed(&self) -> &PageSet {
        &self.owed
    }

    /// How many of the owed pages are in the record.
    pub(crate) fn record_pages(&self) -> u64 {
        self.record_pages
    }

    /// The link's rate as the pushes see it, bytes/s.
    pub(crate) fn rate(&self) -> u64 {
        lock(&self.pace).capacity()
    }
}

/// Pushes pages on one lane until none are left and all are acknowledged.
pub(crate) async fn push(
    sender: &mut Sender<'_>,
    serving: &Serving,
    channel: &mut Channel,
) -> Result<(), LaneEvent> {
    let mut pushing = Pushing { shared: sender.shared, serving, on_the_way: VecDeque::new() };
    let mut bytes_per_page = PAGE_BYTES as u64;
    let timer = Timer::new().map_err(|e| LaneEvent::Failed(format!("no timer: {e}")))?;
    loop {
        let (rate, pages, wait) = {
            let mut pace = lock(&serving.pace);
            let rate = pace.rate();
            let pages = batch_pages(rate, bytes_per_page);
            (rate, pages, pace.may_send(pushing.now(), pages * bytes_per_page))
        };
        if !wait.is_zero() {
            tokio::select! {
                heard = channel.source.recv() => pushing.heard(heard, &channel.remote)?,
                () = timer.wait(wait) => {}
            }
            continue;
        }
        sender.set_link_rate(rate);
        let runs = lock(&serving.queue).next(pages);
        if runs.is_empty() {
            if pushing.on_the_way.is_empty() {
                return Ok(());
            }
            // There will be no more: the destination names what it lacks on new lanes.
            pushing.heard(channel.source.recv().await, &channel.remote)?;
            continue;
        }
        let (frames, counts) = sender.build(serving.round, &runs)?;
        let mut bytes = 0;
        for (frame, codec) in frames {
            // What is only named says nothing of the link.
            let weighs = if codec == Codec::Same { 0 } else { frame.len() as u64 };
            bytes += weighs;
            pushing.send(frame, weighs, channel).await?;
        }
        let pages = runs.iter().map(|run| run.pages).sum::<u64>() - counts.same;
        if let Some(each) = bytes.checked_div(pages) {
            bytes_per_page = (bytes_per_page * 7 + each) / 8;
        }
        lock(&serving.sent).merge(counts);
        while let Some(acks) = channel.source.ready() {
            pushing.acknowledged(acks.len());
        }
    }
}

/// One lane that pushes.
struct Pushing<'a> {
    shared: &'a Shared,
    serving: &'a Serving,
    /// Frames that are not acknowledged: when each was handed to the link, and its bytes for the pace.
    on_the_way: VecDeque<(Duration, u64)>,
}

impl Pushing<'_> {
    fn now(&self) -> Duration {
        self.shared.began.elapsed()
    }

    /// Hands `frame` to the link, and hears acknowledgements meanwhile: a peer that waits until they are read
    /// takes no more frames.
    async fn send(
        &mut self,
        frame: Bytes,
        weighs: u64,
        channel: &mut Channel,
    ) -> Result<(), LaneEvent> {
        let now = self.now();
        if weighs > 0 {
            lock(&self.serving.pace).sent(now, weighs);
        }
        self.on_the_way.push_back((now, weighs));
        self.shared.bytes.fetch_add(frame.len() as u64, Ordering::Relaxed);
        let Channel { sink, source, remote, .. } = channel;
        let mut sending = sink.send(frame);
        loop {
            tokio::select! {
                biased;
                sent = &mut sending => return sent.map_err(LaneEvent::LinkLost),
                heard = source.recv() => self.heard(heard, remote)?,
            }
        }
    }

    fn heard(
        &mut self,
        heard: Result<Option<Bytes>, LinkError>,
        remote: &str,
    ) -> Result<(), LaneEvent> {
        let acks = heard.map_err(LaneEvent::LinkLost)?;
        let acks = acks.ok_or_else(|| LaneEvent::LinkLost(closed(remote)))?;
        self.acknowledged(acks.len());
        Ok(())
    }

    fn acknowledged(&mut self, frames: usize) {
        let (now, frames) = (self.now(), frames.min(self.on_the_way.len()));
        let mut pace = lock(&self.serving.pace);
        for (at, bytes) in self.on_the_way.drain(..frames).filter(|(_, bytes)| *bytes > 0) {
            pace.acked(now, bytes, now.saturating_sub(at));
        }
    }
}

/// How many pages take about [`BATCH_TIME`] at `rate`.
fn batch_pages(rate: u64, bytes_per_page: u64) -> u64 {
    let micros = u64::try_from(BATCH_TIME.as_micros()).unwrap_or(u64::MAX);
    let bytes = rate.saturating_mul(micros) / 1_000_000;
    (bytes / bytes_per_page.max(64)).clamp(*PUSH_PAGES.start(), *PUSH_PAGES.end())
}

/// A timer that is exact to microseconds; the runtime's own is to a millisecond, in which a fast link
/// carries two batches.
struct Timer(AsyncFd<OwnedFd>);

impl Timer {
    #[expect(
        deprecated,
        reason = "unsound for a type that changes or closes its descriptor, which an OwnedFd does not"
    )]
    fn new() -> io::Result<Self> {
        let fd = timerfd_create(
            TimerfdClockId::Monotonic,
            TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK,
        )?;
        AsyncFd::new(fd).map(Self)
    }

    async fn wait(&self, wait: Duration) {
        let nothing = Timespec { tv_sec: 0, tv_nsec: 0 };
        // Zero would disarm it.
        let at = Timespec::try_from(wait.max(Duration::from_nanos(1))).unwrap_or(nothing);
        let at = Itimerspec { it_interval: nothing, it_value: at };
        if timerfd_settime(&self.0, TimerfdTimerFlags::empty(), &at).is_err() {
            return tokio::time::sleep(wait).await;
        }
        if let Ok(mut ready) = self.0.readable().await {
            // Setting it again makes it unreadable, too.
            ready.clear_ready();
        }
    }
}

/// Runs the urgent lane: a thread of its own, which serves one request after the other.
pub(crate) fn run_urgent(shared: &Shared, tell: &dyn Fn(LaneEvent)) {
    ferry_pager::hurry();
    let hello = Hello::Urgent { session: shared.session, link: shared.link };
    with_channel(shared, "urgent lane", hello, tell, async |channel| {
        let Channel { mut sink, source, .. } = channel;
        let mut stop = shared.stop.subscribe();
        let ended = tokio::select! {
            ended = answer(shared, FrameReader::new(source), sink.as_mut()) => ended,
            _ = stop.wait_for(|stop| *stop) => Ok(()),
        };
        if let Err(event) = ended {
            tell(event);
        }
        sink.close("the migration ended").await;
    });
}

async fn answer(
    shared: &Shared,
    mut requests: FrameReader,
    sink: &mut dyn ByteSink,
) -> Result<(), LaneEvent> {
    let mut serving = shared.serving.subscribe();
    let mut builder = BatchBuilder::new();
    while let Some(request) = requests.fill(REQUEST_BYTES).await.map_err(LaneEvent::LinkLost)? {
        let gfn = request.try_into().map_or(u64::MAX, u64::from_le_bytes);
        // The guest's first fault may be faster than the engine here.
        let Ok(serving) = serving.wait_for(Option::is_some).await.map(|s| s.clone()) else { break };
        let Some(serving) = serving else { break };
        if !serving.owed.contains(gfn) {
            return Err(LaneEvent::Failed(format!(
                "the destination asked for frame {gfn:#x}, which is not owed"
            )));
        }
        lock(&serving.queue).fault(gfn);
        let fail = |e: &dyn std::fmt::Display| LaneEvent::Failed(format!("frame {gfn:#x}: {e}"));
        builder.begin(serving.round);
        let mut read = Ok(());
        builder.push(gfn, |page| read = shared.view.read(gfn, page)).map_err(|e| fail(&e))?;
        read.map_err(|e| fail(&e))?;
        let built = builder.finish(Codec::Raw);
        let (codec, frame) = match built.frame {
            Some(frame) => (Codec::Raw, Some(frame)),
            None => (Codec::Zero, zero_frames(serving.round, built.zeros).next()),
        };
        let Some(frame) = frame else { continue };
        let bytes = frame.len() as u64;
        lock(&serving.sent).add(codec, 1);
        shared.bytes.fetch_add(bytes, Ordering::Relaxed);
        lock(&serving.pace).urgent(shared.began.elapsed(), bytes);
        sink.send(frame).await.map_err(LaneEvent::LinkLost)?;
    }
    Ok(())
}
