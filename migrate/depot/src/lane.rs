//! One channel to a depot, for one reader at a time: asks, reads ahead, and comes back when the link is lost.

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::ops::ControlFlow;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use bytes::Bytes;
use ferry_postcopy::PushPace;
use ferry_protocol::{
    Hello, LENDING_VERSION, MAX_READ_BYTES, MAX_TO_READER_BYTES, ToDepot, ToReader, wire,
};
use ferry_transport::{ByteSink, Connector, FrameReader, LinkError, send_message};
use tokio::sync::mpsc;

/// A depot that says nothing for this long is as good as gone.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(30);
/// The first wait before a link is made again; the next ones are longer.
const FIRST_WAIT: Duration = Duration::from_millis(100);
const LONGEST_WAIT: Duration = Duration::from_secs(2);
/// What is asked for at once when it is read ahead.
const PIECE_BYTES: u64 = 64 << 10;
/// Most that is read ahead of one file: 10 Gbit/s over 3 ms.
const WINDOW_BYTES: u64 = 4 << 20;
const OTHER: &str = "that host answered something else than it was asked for";
const REPLACED: &str = "it is not what was opened: the bundle was replaced or removed on that host";
/// Answers that may wait to be taken.
const ANSWERS: usize = 128;

/// A file of the depot, by the number that it has on every channel.
#[derive(Debug)]
pub(crate) struct Opened {
    pub(crate) file: u16,
    /// From the directory that is served.
    pub(crate) path: String,
    /// Its length, once it was opened.
    pub(crate) bytes: OnceLock<u64>,
}

/// How a lane reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ahead {
    /// What is asked for and no more.
    No,
    /// As far as the link takes it without a queue.
    Paced,
    /// As much as may be on its way.
    Free,
}

/// Why something was not read.
enum Trouble {
    /// It may be had by a new link.
    Link(String),
    /// It cannot be had.
    File(io::Error),
    /// What came is not what was asked for: nothing more of this link is believed.
    Nonsense(String),
}

pub(crate) struct Lane {
    connector: Arc<dyn Connector>,
    patience: Duration,
    /// There was a link once: it is worth waiting for.
    has_been: bool,
    link: Option<Link>,
}

impl Lane {
    pub(crate) fn new(connector: Arc<dyn Connector>, patience: Duration) -> Self {
        Self { connector, patience, has_been: false, link: None }
    }

    /// Opens `file`, and says how long it is.
    pub(crate) async fn open(&mut self, file: &Arc<Opened>) -> io::Result<u64> {
        let mut tries = Tries::new(self);
        loop {
            let opened = match self.linked().await {
                Ok(link) => link.open(file).await,
                Err(trouble) => Err(trouble),
            };
            match tries.after(self, opened).await? {
                ControlFlow::Break(bytes) => return Ok(bytes),
                ControlFlow::Continue(()) => {}
            }
        }
    }

    /// Fills `out` with what `file` has at byte `at`.
    pub(crate) async fn read(
        &mut self,
        file: &Arc<Opened>,
        out: &mut [u8],
        at: u64,
        ahead: Ahead,
    ) -> io::Result<()> {
        let mut tries = Tries::new(self);
        loop {
            let read = match self.linked().await {
                Ok(link) => link.read(file, out, at, ahead).await,
                Err(trouble) => Err(trouble),
            };
            match tries.after(self, read).await? {
                ControlFlow::Break(()) => return Ok(()),
                ControlFlow::Continue(()) => {}
            }
        }
    }

    async fn linked(&mut self) -> Result<&mut Link, Trouble> {
        if self.link.is_none() {
            self.link = Some(Link::new(self.connector.as_ref()).await?);
        }
        // It was just made, if there was none.
        self.link.as_mut().ok_or_else(|| Trouble::Link("there is no link".into()))
    }
}

/// How long one read has been tried.
struct Tries {
    began: Option<Instant>,
    patience: Duration,
    wait: Duration,
}

impl Tries {
    fn new(lane: &Lane) -> Self {
        let patience = if lane.has_been { lane.patience } else { Duration::ZERO };
        Self { began: None, patience, wait: FIRST_WAIT }
    }

    /// What comes after a try that ended like this.
    async fn after<T>(
        &mut self,
        lane: &mut Lane,
        tried: Result<T, Trouble>,
    ) -> io::Result<ControlFlow<T>> {
        let to = lane.connector.describe();
        let why = match tried {
            Ok(done) => {
                if self.began.is_some() {
                    tracing::info!("{to}: the bundle can be read again");
                }
                lane.has_been = true;
                return Ok(ControlFlow::Break(done));
            }
            Err(Trouble::File(e)) => return Err(e),
            Err(Trouble::Nonsense(why)) => {
                lane.link = None;
                return Err(io::Error::new(io::ErrorKind::InvalidData, why));
            }
            Err(Trouble::Link(why)) => why,
        };
        lane.link = None;
        if self.patience.is_zero() {
            return Err(io::Error::other(why));
        }
        let Some(began) = self.began else {
            let seconds = self.patience.as_secs();
            tracing::warn!("{to}: a bundle cannot be read: {why}; trying again for {seconds} s");
            self.began = Some(Instant::now());
            return Ok(ControlFlow::Continue(()));
        };
        if began.elapsed() + self.wait > self.patience {
            let why = format!("{why}; tried for {} s", began.elapsed().as_secs());
            return Err(io::Error::new(io::ErrorKind::TimedOut, why));
        }
        tokio::time::sleep(self.wait).await;
        self.wait = (self.wait * 2).min(LONGEST_WAIT);
        Ok(ControlFlow::Continue(()))
    }
}

/// A channel that holds.
struct Link {
    sink: Box<dyn ByteSink>,
    heard: mpsc::Receiver<Result<Heard, Trouble>>,
    reader: tokio::task::JoinHandle<()>,
    began: Instant,
    /// What each number stands for at the depot.
    known: BTreeMap<u16, Arc<Opened>>,
    /// Reads that are not answered yet, in the order of their answers.
    asked: VecDeque<Asked>,
    streams: BTreeMap<u16, Stream>,
    pace: PushPace,
}

struct Asked {
    file: u16,
    at: u64,
    bytes: u64,
    when: Duration,
}

/// A read that failed where the reader is.
struct Failed {
    file: u16,
    end: u64,
    why: String,
}

/// An answer, and when it was here.
struct Heard {
    answer: ToReader,
    data: Bytes,
    when: Instant,
}

/// What is here and on its way of one file.
#[derive(Default)]
struct Stream {
    /// Where the reader is.
    at: u64,
    /// What is here: pieces, each with its place, from `at` to `here`.
    pieces: VecDeque<(u64, Bytes)>,
    here: u64,
    /// What is here or on its way ends here.
    asked: u64,
    /// How far to read ahead: more, the longer the reader goes straight on.
    window: u64,
}

impl Stream {
    /// The reader goes to `at`, to read `bytes`.
    fn go_to(&mut self, at: u64, bytes: u64) {
        if at < self.at || at > self.asked {
            *self = Self { at, here: at, asked: at, ..Self::default() };
            return;
        }
        self.window = (2 * self.window).max(2 * bytes).min(WINDOW_BYTES);
        self.at = at;
        while self.pieces.front().is_some_and(|(start, piece)| start + piece.len() as u64 <= at) {
            self.pieces.pop_front();
        }
    }

    /// `data`, the piece at byte `at`, is here. It may be of a place that the reader has left.
    fn put(&mut self, at: u64, data: Bytes) {
        if at == self.here && at < self.asked {
            self.here += data.len() as u64;
            if self.here > self.at {
                self.pieces.push_back((at, data));
            }
        }
    }

    /// Nothing that was asked for from byte `at` on comes any more; whether the reader is there.
    fn fail(&mut self, at: u64) -> bool {
        let fails = at == self.here && at < self.asked;
        if fails {
            (self.asked, self.window) = (self.here, 0);
        }
        fails
    }

    /// Copies from where the reader is. None if not all of it is here.
    fn take(&mut self, out: &mut [u8]) -> Option<()> {
        let mut done = 0;
        for (start, piece) in &self.pieces {
            let skip = usize::try_from((self.at + done as u64).saturating_sub(*start)).unwrap_or(0);
            let piece = piece.get(skip..).unwrap_or(&[]);
            let bytes = piece.len().min(out.len() - done);
            out[done..done + bytes].copy_from_slice(&piece[..bytes]);
            done += bytes;
        }
        self.at += done as u64;
        (done == out.len()).then_some(())
    }
}

impl Link {
    async fn new(connector: &dyn Connector) -> Result<Self, Trouble> {
        let lost = |e: LinkError| Trouble::Link(e.to_string());
        let mut channel = connector.connect().await.map_err(lost)?;
        let hello = Hello::Bundles { version: LENDING_VERSION }.encode();
        send_message(channel.sink.as_mut(), &hello).await.map_err(lost)?;
        let (tell, heard) = mpsc::channel(ANSWERS);
        let reader = tokio::spawn(hear(FrameReader::new(channel.source), tell));
        let (known, streams) = (BTreeMap::new(), BTreeMap::new());
        let (began, pace) = (Instant::now(), PushPace::new(None));
        let asked = VecDeque::new();
        Ok(Self { sink: channel.sink, heard, reader, began, known, asked, streams, pace })
    }

    /// Sees to it that `file` is open; its length.
    async fn open(&mut self, file: &Arc<Opened>) -> Result<u64, Trouble> {
        if let (Some(known), Some(bytes)) = (self.known.get(&file.file), file.bytes.get())
            && Arc::ptr_eq(known, file)
        {
            return Ok(*bytes);
        }
        self.streams.remove(&file.file);
        self.say(&ToDepot::Open { file: file.file, path: file.path.clone() }).await?;
        // What was asked for before is answered before.
        while !self.asked.is_empty() {
            self.hear().await?;
        }
        match self.next().await?.answer {
            ToReader::Opened { bytes } if *file.bytes.get_or_init(|| bytes) == bytes => {
                self.known.insert(file.file, file.clone());
                Ok(bytes)
            }
            ToReader::Opened { .. } => Err(fails(REPLACED)),
            ToReader::Missing { why } => {
                let gone = file.bytes.get().is_some();
                let why = if gone { REPLACED.to_owned() } else { why };
                Err(Trouble::File(io::Error::new(io::ErrorKind::NotFound, why)))
            }
            ToReader::Failed { why } => Err(fails(why)),
            ToReader::Data { .. } => Err(Trouble::Nonsense(OTHER.into())),
        }
    }

    async fn read(
        &mut self,
        file: &Arc<Opened>,
        out: &mut [u8],
        at: u64,
        ahead: Ahead,
    ) -> Result<(), Trouble> {
        let length = self.open(file).await?;
        let end = at.checked_add(out.len() as u64).filter(|end| *end <= length);
        let Some(end) = end else {
            return Err(Trouble::File(io::Error::from(io::ErrorKind::UnexpectedEof)));
        };
        self.streams.entry(file.file).or_default().go_to(at, end - at);
        loop {
            self.ask(file.file, end, MAX_READ_BYTES.into()).await?;
            self.ask_ahead(file, ahead, length).await?;
            if let Some(stream) = self.streams.get_mut(&file.file)
                && stream.here >= end
            {
                return stream.take(out).ok_or_else(|| Trouble::Nonsense(OTHER.into()));
            }
            match self.hear().await? {
                // What was asked for beyond may be why: what is needed is asked for once more.
                Some(failed) if failed.file == file.file && failed.end <= end => {
                    return Err(fails(failed.why));
                }
                _ => {}
            }
        }
    }

    /// Asks for what of the file was not asked for up to byte `end`, in pieces.
    async fn ask(&mut self, file: u16, end: u64, piece: u64) -> Result<(), Trouble> {
        while let Some(stream) = self.streams.get_mut(&file)
            && stream.asked < end
        {
            let (at, bytes) = (stream.asked, (end - stream.asked).min(piece));
            stream.asked += bytes;
            let when = self.began.elapsed();
            self.pace.sent(when, bytes);
            self.asked.push_back(Asked { file, at, bytes, when });
            let bytes = u32::try_from(bytes).unwrap_or(MAX_READ_BYTES);
            self.say(&ToDepot::Read { file, at, bytes }).await?;
        }
        Ok(())
    }

    async fn ask_ahead(&mut self, file: &Opened, ahead: Ahead, length: u64) -> Result<(), Trouble> {
        while let Some(stream) = self.streams.get(&file.file)
            && ahead != Ahead::No
        {
            let end = stream.at.saturating_add(stream.window).min(length);
            let bytes = end.saturating_sub(stream.asked).min(PIECE_BYTES);
            let now = self.began.elapsed();
            let wait = ahead == Ahead::Paced && !self.pace.may_send(now, bytes).is_zero();
            // Short pieces cost as many round trips as long ones.
            if wait || bytes == 0 || (bytes < PIECE_BYTES && end < length) {
                break;
            }
            self.ask(file.file, stream.asked + bytes, PIECE_BYTES).await?;
        }
        Ok(())
    }

    async fn say(&mut self, message: &ToDepot) -> Result<(), Trouble> {
        let bytes = wire::encode(message).map_err(|e| fails(e.to_string()))?;
        let sent = send_message(self.sink.as_mut(), &bytes).await;
        sent.map_err(|e| Trouble::Link(e.to_string()))
    }

    /// Takes the answer to the oldest read, which may be that it failed.
    async fn hear(&mut self) -> Result<Option<Failed>, Trouble> {
        let heard = self.next().await?;
        let Some(asked) = self.asked.pop_front() else { return Ok(None) };
        let why = match heard.answer {
            ToReader::Data { bytes } if u64::from(bytes) == asked.bytes => {
                let now = heard.when.saturating_duration_since(self.began);
                self.pace.acked(now, asked.bytes, now.saturating_sub(asked.when));
                if let Some(stream) = self.streams.get_mut(&asked.file) {
                    stream.put(asked.at, heard.data);
                }
                return Ok(None);
            }
            ToReader::Failed { why } => why,
            ToReader::Data { bytes } => {
                let why = format!("that host sent {bytes} bytes where {} belong", asked.bytes);
                return Err(Trouble::Nonsense(why));
            }
            _ => return Err(Trouble::Nonsense(OTHER.into())),
        };
        let stream = self.streams.get_mut(&asked.file);
        let of_use = stream.is_some_and(|stream| stream.fail(asked.at));
        Ok(of_use.then(|| Failed { file: asked.file, end: asked.at + asked.bytes, why }))
    }

    async fn next(&mut self) -> Result<Heard, Trouble> {
        let heard = tokio::time::timeout(ANSWER_TIMEOUT, self.heard.recv()).await;
        match heard {
            Ok(Some(heard)) => heard,
            Ok(None) => Err(Trouble::Link("the link has ended".into())),
            Err(_) => {
                let seconds = ANSWER_TIMEOUT.as_secs();
                Err(Trouble::Link(format!("no answer within {seconds} s")))
            }
        }
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        self.reader.abort();
    }
}

fn fails(why: impl Into<String>) -> Trouble {
    Trouble::File(io::Error::other(why.into()))
}

/// Takes answers as they come, so that what is measured is the link and not the reader.
async fn hear(mut reader: FrameReader, tell: mpsc::Sender<Result<Heard, Trouble>>) {
    loop {
        let heard = hear_one(&mut reader).await;
        let ended = heard.is_err();
        if tell.send(heard).await.is_err() || ended {
            return;
        }
    }
}

async fn hear_one(reader: &mut FrameReader) -> Result<Heard, Trouble> {
    let lost = |e: LinkError| match e {
        LinkError::TooLong { .. } => Trouble::Nonsense(e.to_string()),
        e => Trouble::Link(e.to_string()),
    };
    let closed = || Trouble::Link("that host closed the connection".into());
    let message = reader.read_message(MAX_TO_READER_BYTES).await.map_err(lost)?;
    let answer = wire::decode(&message.ok_or_else(closed)?)
        .map_err(|e| Trouble::Nonsense(format!("that host sent nonsense: {e}")))?;
    let mut data = Bytes::new();
    if let ToReader::Data { bytes } = answer {
        if bytes > MAX_READ_BYTES {
            return Err(Trouble::Nonsense(format!("that host announces {bytes} bytes at once")));
        }
        let came = reader.fill(usize::try_from(bytes).unwrap_or(0)).await.map_err(lost)?;
        data = Bytes::copy_from_slice(came.ok_or_else(closed)?);
    }
    Ok(Heard { answer, data, when: Instant::now() })
}
