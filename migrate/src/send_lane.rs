//! One lane of the source: takes pages from the round, encodes them, puts them on the link.
//!
//! A lane is a connection with a thread and a runtime of its own: encoding and encryption of one lane
//! share a core, and lanes spread over cores.

use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use ferry_codec::{
    BatchBuilder, Codec, CodecChooser, CodecSet, NotTaken, PackedBuilder, zero_frames,
};
use ferry_memory::{GuestView, MemoryError};
use ferry_pages::Run;
use ferry_protocol::Hello;
use ferry_transport::{ByteSink, Channel, Connector, LinkError, Pacer, send_message};
use rustix::time::{ClockId, clock_gettime};
use tokio::sync::mpsc::UnboundedReceiver;
use tokio::sync::watch;

use crate::link_meter::LinkMeter;
use crate::recall::Digests;
use crate::report::PageCounts;
use crate::round::Round;
use crate::serve::{self, Serving};

/// How long a peer that is alive may take to acknowledge the end.
pub(crate) const FAREWELL: Duration = Duration::from_secs(5);

/// What the link is taken for until it was seen, bytes/s: 1 Gbit/s. Pages that went raw until then are missed on a
/// slow link; on a fast one the same pages cost little to compress.
const FIRST_LINK_BYTES_PER_S: f64 = 125e6;

/// What all lanes of a migration share.
pub(crate) struct Shared {
    pub(crate) connector: Arc<dyn Connector>,
    pub(crate) view: GuestView,
    pub(crate) codecs: CodecSet,
    /// Lanes that share the link.
    pub(crate) lanes: u16,
    pub(crate) session: u128,
    pub(crate) link: u64,
    pub(crate) pacer: Mutex<Pacer>,
    /// Bytes put on the link so far, for whoever watches.
    pub(crate) bytes: std::sync::atomic::AtomicU64,
    /// The migration is over: leave the round, even if the peer takes no more bytes.
    pub(crate) stop: watch::Sender<bool>,
    pub(crate) began: Instant,
    /// What the destination has in an old copy.
    pub(crate) recalled: Arc<Digests>,
    /// What is served after a post-copy hand-over, once it is known.
    pub(crate) serving: watch::Sender<Option<Arc<Serving>>>,
}

/// What a lane is to do.
pub(crate) enum Work {
    /// Send its share of a round.
    Round(Arc<Round>),
    /// Push pages of [`Shared::serving`].
    Push,
}

/// What one lane did in one round.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct LaneRound {
    pub(crate) batches: u64,
    pub(crate) bytes: u64,
    pub(crate) pages: PageCounts,
}

/// What a lane tells the engine.
#[derive(Debug)]
pub(crate) enum LaneEvent {
    Open,
    RoundSent { round: u32, done: LaneRound },
    LinkLost(LinkError),
    Failed(String),
}

/// Opens a channel that begins with `hello`, in a runtime of its own, and lets `talk` have it; both not for
/// longer than the migration. `name` is what the lane is called.
pub(crate) fn with_channel(
    shared: &Shared,
    name: &str,
    hello: Hello,
    tell: &dyn Fn(LaneEvent),
    talk: impl AsyncFnOnce(Channel),
) {
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(e) => return tell(LaneEvent::Failed(format!("{name}: no runtime: {e}"))),
    };
    let mut stop = shared.stop.subscribe();
    runtime.block_on(async {
        let opened = tokio::select! {
            opened = open(shared.connector.as_ref(), &hello) => opened,
            _ = stop.wait_for(|stop| *stop) => return,
        };
        match opened {
            Ok(channel) => {
                tell(LaneEvent::Open);
                talk(channel).await;
            }
            Err(e) => tell(LaneEvent::LinkLost(e)),
        }
    });
}

/// Makes a channel that begins with `hello`.
pub(crate) async fn open(connector: &dyn Connector, hello: &Hello) -> Result<Channel, LinkError> {
    let mut channel = connector.connect().await?;
    send_message(channel.sink.as_mut(), &hello.encode()).await?;
    Ok(channel)
}

pub(crate) fn closed(remote: &str) -> LinkError {
    let reason = "the destination closed a lane".to_owned();
    LinkError::Closed { remote: remote.to_owned(), reason }
}

/// Runs lane number `lane` until `works` closes.
pub(crate) fn run(
    shared: &Shared,
    lane: u16,
    mut works: UnboundedReceiver<Work>,
    tell: &dyn Fn(LaneEvent),
) {
    let hello = Hello::Lane { session: shared.session, link: shared.link, lane };
    with_channel(shared, &format!("lane {lane}"), hello, tell, async |mut channel| {
        let mut stop = shared.stop.subscribe();
        let mut sender = Sender::new(shared, channel.sink.holds_bytes());
        loop {
            let work = tokio::select! {
                work = works.recv() => work,
                // The destination sends nothing on a lane: whatever comes says that it is lost.
                lost = channel.source.recv() => {
                    let why = lost.err().unwrap_or_else(|| closed(&channel.remote));
                    return tell(LaneEvent::LinkLost(why));
                }
                _ = stop.wait_for(|stop| *stop) => break,
            };
            let Some(work) = work else { break };
            let done = async {
                match work {
                    Work::Round(round) => {
                        let done = sender.send_round(&round, channel.sink.as_mut()).await?;
                        Ok(Some(LaneEvent::RoundSent { round: round.number, done }))
                    }
                    Work::Push => {
                        let serving = shared.serving.borrow().clone();
                        if let Some(serving) = serving {
                            serve::push(&mut sender, &serving, &mut channel).await?;
                        }
                        Ok(None)
                    }
                }
            };
            let done = tokio::select! {
                biased;
                done = done => done,
                _ = stop.wait_for(|stop| *stop) => break,
            };
            match done {
                Ok(event) => event.into_iter().for_each(tell),
                Err(event) => return tell(event),
            }
        }
        if *shared.stop.borrow() {
            channel.sink.close("the migration ended").await;
        } else {
            // Waits until the peer has everything, or is gone.
            let _ = tokio::time::timeout(FAREWELL, channel.sink.finish()).await;
        }
    });
}

pub(crate) struct Sender<'a> {
    pub(crate) shared: &'a Shared,
    builder: BatchBuilder,
    packed: PackedBuilder,
    chooser: CodecChooser,
    zeros: Vec<Run>,
    done: LaneRound,
    link: LinkMeter,
}

/// Time that this thread has had on a processor.
fn on_cpu() -> Duration {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    Duration::try_from(time).unwrap_or_default()
}

impl<'a> Sender<'a> {
    fn new(shared: &'a Shared, holds_bytes: u64) -> Self {
        Self {
            shared,
            builder: BatchBuilder::new(),
            packed: PackedBuilder::default(),
            chooser: CodecChooser::new(shared.codecs),
            zeros: Vec::new(),
            done: LaneRound::default(),
            link: LinkMeter::new(FIRST_LINK_BYTES_PER_S / f64::from(shared.lanes), holds_bytes),
        }
    }

    async fn send_round(
        &mut self,
        round: &Round,
        sink: &mut dyn ByteSink,
    ) -> Result<LaneRound, LaneEvent> {
        self.done = LaneRound::default();
        self.link.begin(self.shared.began.elapsed());
        self.chooser.set_link_rate(self.link.bytes_per_s());
        loop {
            if *self.shared.stop.borrow() {
                return Err(LaneEvent::Failed("the migration is over".into()));
            }
            let runs = round.next_batch().map_err(|e| LaneEvent::Failed(e.to_string()))?;
            if runs.is_empty() {
                break;
            }
            for (frame, codec, pages) in self.encode(round.number, &runs, round.may_name())? {
                self.done.pages.add(codec, pages);
                self.put(frame, sink).await?;
            }
        }
        let mut zeros = std::mem::take(&mut self.zeros);
        // Of what comes last in a round, too.
        zeros.sort_unstable_by_key(|run| run.start);
        for frame in zero_frames(round.number, &zeros) {
            self.put(frame, sink).await?;
        }
        let zero_pages = zeros.iter().map(|r| r.pages).sum();
        self.done.pages.add(Codec::Zero, zero_pages);
        self.zeros = zeros;
        self.zeros.clear();
        Ok(self.done)
    }

    /// The link takes so many bytes a second of all lanes, as far as is known.
    pub(crate) fn set_link_rate(&mut self, bytes_per_s: u64) {
        self.chooser.set_link_rate(bytes_per_s.max(1) as f64 / f64::from(self.shared.lanes));
    }

    /// Frames of pages that no longer change: data, names and zeros, each with its codec.
    pub(crate) fn build(
        &mut self,
        round: u32,
        runs: &[Run],
    ) -> Result<(Vec<(Bytes, Codec)>, PageCounts), LaneEvent> {
        let mut counts = PageCounts::default();
        let mut frames = Vec::new();
        for (frame, codec, pages) in self.encode(round, runs, true)? {
            counts.add(codec, pages);
            frames.push((frame, codec));
        }
        counts.add(Codec::Zero, self.zeros.iter().map(|run| run.pages).sum());
        frames.extend(zero_frames(round, &self.zeros).map(|frame| (frame, Codec::Zero)));
        self.zeros.clear();
        Ok((frames, counts))
    }

    /// The frames of the data pages of `runs`, if there are any, each with its codec and their number: of
    /// those that the destination has, if they `may` be `named`, of those that are kept elsewhere than in memory,
    /// as they are kept, and of all others. Zero pages are added to `zeros`.
    fn encode(
        &mut self,
        round: u32,
        runs: &[Run],
        may_name: bool,
    ) -> Result<impl Iterator<Item = (Bytes, Codec, u64)> + use<>, LaneEvent> {
        self.builder.begin(round);
        let away = self.shared.view.away();
        let away = away.filter(|_| self.shared.codecs.contains(Codec::Packed));
        let mut packed = Vec::new();
        let has = |gfn, digest| may_name && self.shared.recalled.has(gfn, digest);
        for gfn in runs.iter().flat_map(|r| r.start..r.end()) {
            let view = &self.shared.view;
            let fail = |e: MemoryError| LaneEvent::Failed(e.to_string());
            if let Some(away) = &away {
                let mut full = None;
                let is_away = away.packed(gfn, &mut |page| {
                    if !self.packed.push(page) {
                        full = self.packed.finish(round);
                        // An empty one takes any page.
                        let _ = self.packed.push(page);
                    }
                });
                packed.extend(full);
                if is_away.map_err(fail)? {
                    continue;
                }
            }
            let mut read = Ok(());
            let taken = if view.is_zero(gfn).map_err(fail)? {
                self.builder.push_zero(gfn)
            } else {
                let fill = |page: &mut [u8]| read = view.read(gfn, page);
                self.builder.push_unless(gfn, fill, |digest| has(gfn, digest))
            };
            read.map_err(fail)?;
            // A round hands out ascending pages, no more than a batch takes.
            taken.map_err(|e: NotTaken| LaneEvent::Failed(format!("frame {gfn:#x}: {e}")))?;
        }
        let built = self.builder.finish_chosen(&mut self.chooser, on_cpu);
        for zero in built.zeros {
            match self.zeros.last_mut() {
                Some(last) if last.end() == zero.start => last.pages += zero.pages,
                _ => self.zeros.push(*zero),
            }
        }
        let pages = built.runs.iter().map(|r| r.pages).sum();
        let data = built.frame.map(|frame| (frame, built.codec, pages));
        let same = built.same.map(|(frame, pages)| (frame, Codec::Same, pages));
        packed.extend(self.packed.finish(round));
        let packed = packed.into_iter().map(|(frame, pages)| (frame, Codec::Packed, pages));
        Ok(data.into_iter().chain(same).chain(packed))
    }

    async fn put(&mut self, frame: Bytes, sink: &mut dyn ByteSink) -> Result<(), LaneEvent> {
        let bytes = frame.len() as u64;
        let (before, cpu_before) = (self.shared.began.elapsed(), on_cpu());
        let pacer = &self.shared.pacer;
        let delay = pacer.lock().unwrap_or_else(PoisonError::into_inner).delay(before, bytes);
        if !delay.is_zero() {
            tokio::time::sleep(delay).await;
        }
        sink.send(frame).await.map_err(LaneEvent::LinkLost)?;
        self.done.batches += 1;
        self.done.bytes += bytes;
        self.shared.bytes.fetch_add(bytes, Ordering::Relaxed);
        let (now, busy) = (self.shared.began.elapsed(), on_cpu().saturating_sub(cpu_before));
        self.link.sent(now, (now - before).saturating_sub(busy), bytes);
        self.chooser.set_link_rate(self.link.bytes_per_s());
        self.chooser.sent(bytes, busy);
        Ok(())
    }
}
