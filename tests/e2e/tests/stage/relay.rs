//! A link with somebody in the middle, who sees each message and frame and may lose, change or hold it,
//! and who may cut the line after any byte.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};

use bytes::Bytes;
use ferry_codec::{BatchHeader, HEADER_BYTES, parse_header};
use ferry_protocol::{Hello, MAX_HELLO_BYTES, ToDestination, ToSource, wire};
use ferry_transport::{
    BoxFuture, ByteSink, ByteSource, Channel, Connector, FrameReader, LinkError, memory,
};
use tokio::runtime::Handle;
use tokio::sync::watch;

/// What passes.
pub enum Word<'a> {
    Frame(&'a BatchHeader),
    ToDestination(&'a ToDestination),
    ToSource(&'a ToSource),
}

/// What becomes of it.
pub enum Deal {
    Pass,
    /// Lost, without a word.
    Lose,
    /// These bytes instead.
    Instead(Vec<Bytes>),
    /// The line is cut before it.
    Cut,
    /// The line is cut after it.
    PassAndCut,
    /// Nothing passes on this channel from here on, in this direction.
    Stall,
}

type Tamper = dyn Fn(Word<'_>, &Bytes) -> Deal + Send + Sync;

/// Lets everything pass.
pub fn pass(_: Word<'_>, _: &Bytes) -> Deal {
    Deal::Pass
}

struct Line {
    tamper: Box<Tamper>,
    /// Counts the cuts: a channel ends with the cut after its beginning.
    cuts: watch::Sender<u32>,
    /// Bytes that still pass, both ways, before the line is cut.
    budget: AtomicI64,
    reachable: AtomicBool,
    /// Whether new connections are made after a cut.
    mends: bool,
}

impl Line {
    fn cut(&self) {
        self.reachable.store(self.mends, Ordering::SeqCst);
        self.cuts.send_modify(|n| *n += 1);
    }
}

/// A connector with somebody in the middle.
#[derive(Clone)]
pub struct Relay {
    inner: Arc<dyn Connector>,
    runtime: Handle,
    line: Arc<Line>,
}

impl Relay {
    /// `mends`: connections can be made again after a cut.
    pub fn new(
        inner: &Arc<dyn Connector>,
        runtime: Handle,
        mends: bool,
        tamper: impl Fn(Word<'_>, &Bytes) -> Deal + Send + Sync + 'static,
    ) -> Self {
        let line = Arc::new(Line {
            tamper: Box::new(tamper),
            cuts: watch::Sender::new(0),
            budget: AtomicI64::new(i64::MAX),
            reachable: AtomicBool::new(true),
            mends,
        });
        Self { inner: inner.clone(), runtime, line }
    }

    /// Cuts the line once so many bytes have passed.
    #[must_use]
    pub fn cut_after(self, bytes: u64) -> Self {
        self.line.budget.store(i64::try_from(bytes).unwrap(), Ordering::SeqCst);
        self
    }

    /// As a connector.
    pub fn connector(&self) -> Arc<dyn Connector> {
        Arc::new(self.clone())
    }
}

impl Connector for Relay {
    fn connect(&self) -> BoxFuture<'_, Result<Channel, LinkError>> {
        let (inner, line) = (self.inner.clone(), self.line.clone());
        // Not on the caller's runtime: what is under way must not end with it.
        let connecting = self.runtime.spawn(async move {
            if !line.reachable.load(Ordering::SeqCst) {
                return Err(lost("no route"));
            }
            let cuts = line.cuts.subscribe();
            let far = inner.connect().await?;
            let (near, mine) = memory::channel(2);
            let (lane, kind) = tokio::sync::oneshot::channel();
            tokio::spawn(until_cut(
                cuts.clone(),
                up(line.clone(), FrameReader::new(mine.source), far.sink, lane),
            ));
            tokio::spawn(until_cut(cuts, async move {
                if kind.await.unwrap_or(true) {
                    down_lane(line, far.source, mine.sink).await;
                } else {
                    down(line, FrameReader::new(far.source), mine.sink).await;
                }
            }));
            Ok(near)
        });
        Box::pin(async { connecting.await.unwrap_or_else(|e| Err(lost(&e.to_string()))) })
    }

    fn describe(&self) -> String {
        format!("{} with somebody in the middle", self.inner.describe())
    }
}

fn lost(why: &str) -> LinkError {
    LinkError::Lost { remote: "relay".into(), why: why.into() }
}

async fn until_cut(mut cuts: watch::Receiver<u32>, pump: impl Future<Output = ()>) {
    let now = *cuts.borrow();
    // What is dropped unfinished tells both ends that the line is cut.
    tokio::select! {
        biased;
        _ = cuts.wait_for(|n| *n != now) => {}
        () = pump => {}
    }
}

fn message_bytes(message: &[u8]) -> Bytes {
    let length = u32::try_from(message.len()).unwrap();
    [&length.to_le_bytes()[..], message].concat().into()
}

/// Whether frames follow, and not messages.
fn is_lane(hello: &[u8]) -> bool {
    matches!(Hello::decode(hello), Ok(Hello::Lane { .. } | Hello::Urgent { .. }))
}

/// Acknowledgements and requests, back from the destination.
async fn down_lane(line: Arc<Line>, mut source: Box<dyn ByteSource>, mut sink: Box<dyn ByteSink>) {
    loop {
        match source.recv().await {
            Ok(Some(bytes)) => {
                if !put(&line, sink.as_mut(), bytes).await {
                    return;
                }
            }
            Ok(None) => {
                let _ = sink.finish().await;
                return;
            }
            Err(e) => return end(sink, e).await,
        }
    }
}

/// From the source of the migration to its destination.
async fn up(
    line: Arc<Line>,
    mut reader: FrameReader,
    mut sink: Box<dyn ByteSink>,
    kind: tokio::sync::oneshot::Sender<bool>,
) {
    let Ok(Some(hello)) = reader.read_message(MAX_HELLO_BYTES).await else { return };
    let lane = is_lane(&hello);
    let _ = kind.send(lane);
    if !put(&line, sink.as_mut(), message_bytes(&hello)).await {
        return;
    }
    loop {
        let next = if lane { frame(&mut reader).await } else { message(&mut reader).await };
        let (bytes, deal) = match next {
            Ok(Some(Passing::Frame(header, bytes))) => {
                let deal = (line.tamper)(Word::Frame(&header), &bytes);
                (bytes, deal)
            }
            Ok(Some(Passing::Message(bytes))) => {
                let deal = match wire::decode::<ToDestination>(&bytes[4..]) {
                    Ok(m) => (line.tamper)(Word::ToDestination(&m), &bytes),
                    Err(_) => Deal::Pass,
                };
                (bytes, deal)
            }
            Ok(None) => {
                let _ = sink.finish().await;
                return;
            }
            Err(e) => return end(sink, e).await,
        };
        if !carry_out(&line, sink.as_mut(), bytes, deal).await {
            return;
        }
    }
}

/// From the destination back to the source.
async fn down(line: Arc<Line>, mut reader: FrameReader, mut sink: Box<dyn ByteSink>) {
    loop {
        let bytes = match message(&mut reader).await {
            Ok(Some(Passing::Message(bytes) | Passing::Frame(_, bytes))) => bytes,
            Ok(None) => {
                let _ = sink.finish().await;
                return;
            }
            Err(e) => return end(sink, e).await,
        };
        let deal = match wire::decode::<ToSource>(&bytes[4..]) {
            Ok(m) => (line.tamper)(Word::ToSource(&m), &bytes),
            Err(_) => Deal::Pass,
        };
        if !carry_out(&line, sink.as_mut(), bytes, deal).await {
            return;
        }
    }
}

enum Passing {
    Frame(BatchHeader, Bytes),
    Message(Bytes),
}

async fn message(reader: &mut FrameReader) -> Result<Option<Passing>, LinkError> {
    let message = reader.read_message(wire::MAX_MESSAGE_BYTES).await?;
    Ok(message.map(|m| Passing::Message(message_bytes(&m))))
}

async fn frame(reader: &mut FrameReader) -> Result<Option<Passing>, LinkError> {
    let Some(head) = reader.fill(HEADER_BYTES).await? else { return Ok(None) };
    let head = head.to_vec();
    let header = parse_header(&head).map_err(|e| lost(&e.to_string()))?;
    let body = reader.fill(header.body_bytes()).await?.ok_or_else(|| lost("half a frame"))?;
    Ok(Some(Passing::Frame(header, [&head[..], body].concat().into())))
}

async fn end(mut sink: Box<dyn ByteSink>, e: LinkError) {
    if let LinkError::Closed { reason, .. } = e {
        sink.close(&reason).await;
    }
}

async fn carry_out(line: &Line, sink: &mut dyn ByteSink, bytes: Bytes, deal: Deal) -> bool {
    match deal {
        Deal::Pass => put(line, sink, bytes).await,
        Deal::Lose => true,
        Deal::Instead(all) => {
            for bytes in all {
                if !put(line, sink, bytes).await {
                    return false;
                }
            }
            true
        }
        Deal::Cut => {
            line.cut();
            false
        }
        Deal::PassAndCut => {
            put(line, sink, bytes).await;
            // The far end is given the time to take it.
            tokio::time::sleep(std::time::Duration::from_millis(100)).await;
            line.cut();
            false
        }
        Deal::Stall => std::future::pending().await,
    }
}

/// Puts bytes on the far link, as many as the line still carries.
async fn put(line: &Line, sink: &mut dyn ByteSink, bytes: Bytes) -> bool {
    let length = i64::try_from(bytes.len()).unwrap();
    let left = line.budget.fetch_sub(length, Ordering::SeqCst);
    if left >= length {
        return sink.send(bytes).await.is_ok();
    }
    if let Ok(part) = usize::try_from(left)
        && part > 0
    {
        let _ = sink.send(bytes.slice(..part)).await;
    }
    line.budget.store(i64::MAX, Ordering::SeqCst);
    line.cut();
    false
}
