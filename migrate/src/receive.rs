//! The destination's engine: accepts channels and takes each to its session.
//!
//! Channels live on the caller's runtime; each session has a thread, which runs the state machine and
//! touches the guest. A channel's first message says whether it begins a session, joins one as a lane,
//! or asks what became of one. A session is its identity's that began it: to others it is as if it were not there.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use ferry_codec::CodecSet;
use ferry_protocol::limits::{
    HELLO_TIMEOUT, LOAD_TIMEOUT, MAX_ARRIVING, MAX_ARRIVING_PER_IDENTITY, MAX_HELLO_BYTES,
    MAX_UNKNOWN_PER_IDENTITY, REMEMBERED,
};
use ferry_protocol::{
    Arrival, Hello, MachineSpec, Refusal, ToSource, VERSION_MAX, VERSION_MIN, Verdict, wire,
};
use ferry_transport::{
    Admission, ByteSink, Channel, FrameReader, LinkError, Listener, Peer, send_message,
};

use crate::Host;
use crate::arriving::{Arriving, Message};
use crate::fetching::Fetching;

/// How long a new session waits until the one in its way is gone.
const SUPERSEDE_TIMEOUT: Duration = Duration::from_secs(5);

/// How to receive.
#[derive(Clone, Debug)]
pub struct ReceiveOptions {
    /// Codecs that may be used.
    pub codecs: CodecSet,
    /// Take in one machine; refuse others while it arrives and once it runs.
    pub once: bool,
    /// Bundles, or directories of bundles: pages of an old one of the machine that comes are not sent.
    pub bundles: Vec<PathBuf>,
    /// Who may send which machines. Asked when a session begins; one that runs goes on.
    pub admission: Admission,
    /// Most memory, in bytes, of machines that are on their way in at once; none: what the host has available.
    pub max_memory_bytes: Option<u64>,
    /// Loading a machine's state does not wait for longer than this for pages that its source owes.
    pub load_timeout: Duration,
}

impl Default for ReceiveOptions {
    fn default() -> Self {
        Self {
            codecs: CodecSet::ALL,
            once: false,
            bundles: Vec::new(),
            admission: Admission::Everyone,
            max_memory_bytes: None,
            load_timeout: LOAD_TIMEOUT,
        }
    }
}

/// What the host is told.
#[derive(Debug)]
pub enum ReceiveEvent<G> {
    /// A machine is on its way in.
    Arriving {
        /// Its name at the source.
        name: String,
        /// The source's identity and address.
        peer: String,
    },
    /// An old bundle of a machine that comes, or one of no use.
    Recalled {
        /// The machine's name at the source.
        name: String,
        /// The bundle.
        bundle: PathBuf,
        /// Pages of data that it has; or why it, or some of its pages, cannot be used: they are sent.
        pages: Result<u64, String>,
    },
    /// A machine runs here now: it is the host's.
    Arrived {
        /// The machine.
        guest: G,
        /// What it is.
        spec: MachineSpec,
        /// Pages of it still come, if any do; `Ended` says when all are here.
        fetching: Option<Fetching>,
    },
    /// The link to a machine's source was lost, and the source may come back.
    Waiting {
        /// Its name at the source.
        name: String,
        /// Pages that the machine lacks, if it runs here: who touches one of them waits.
        missing: Option<u64>,
        /// How the link was lost.
        why: String,
    },
    /// A session is over.
    Ended {
        /// The machine's name at the source.
        name: String,
        /// How.
        arrival: Arrival,
    },
    /// A peer was turned away, or a connection came to nothing.
    Turned(String),
}

/// Who opened a channel, from where.
pub(crate) struct Caller {
    pub(crate) peer: Peer,
    place: String,
}

impl std::fmt::Display for Caller {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} ({})", self.peer.name, self.place)
    }
}

type Tell<G> = Arc<dyn Fn(ReceiveEvent<G>) + Send + Sync>;

struct Session {
    /// The name in the certificate of whoever began it: the only one who may join it or hear of it.
    identity: String,
    /// Bytes of a machine that has not run here.
    memory_bytes: u64,
    verdict: Verdict,
    /// Where lanes join; none when it is over.
    door: Option<Sender<Message>>,
    /// The machine and its source's identity, while it has not run here and its source is away.
    away: Option<(String, String)>,
}

#[derive(Default)]
struct Sessions {
    by_token: HashMap<u128, Session>,
    /// Tokens in the order in which they came.
    order: Vec<u128>,
    taken: usize,
    /// What all machines on their way in may have, where there is no other limit: as of the last time when there was
    /// none, less what has begun to run since.
    available_bytes: u64,
    /// Channels that have not said what they are for, by identity.
    unknown: HashMap<String, usize>,
}

impl Sessions {
    fn arriving(&self) -> impl Iterator<Item = &Session> {
        self.by_token.values().filter(|s| s.door.is_some())
    }

    fn forget_oldest(&mut self) {
        while self.order.len() > REMEMBERED {
            let token = self.order.remove(0);
            self.by_token.remove(&token);
        }
    }
}

/// Where sessions are known by their tokens.
pub(crate) struct Server<H: Host> {
    pub(crate) host: Arc<H>,
    pub(crate) options: ReceiveOptions,
    pub(crate) tell: Tell<H::Guest>,
    sessions: Mutex<Sessions>,
}

/// Takes in machines until `listener` ends. Runs on the caller's tokio runtime, which should have more
/// than one thread: pages are verified and installed on it.
pub async fn receive<H: Host + 'static>(
    mut listener: Box<dyn Listener>,
    host: Arc<H>,
    options: ReceiveOptions,
    tell: impl Fn(ReceiveEvent<H::Guest>) + Send + Sync + 'static,
) {
    let server = Arc::new(Server {
        host,
        options,
        tell: Arc::new(tell),
        sessions: Mutex::new(Sessions::default()),
    });
    while let Some(accepted) = listener.accept().await {
        match accepted {
            Ok(channel) => {
                let place = Unknown::new(&server, &channel.peer.name);
                tokio::spawn(welcome(server.clone(), channel, place));
            }
            Err(e) => (server.tell)(ReceiveEvent::Turned(e.to_string())),
        }
    }
}

async fn welcome<H: Host + 'static>(
    server: Arc<Server<H>>,
    channel: Channel,
    place: Option<Unknown<H>>,
) {
    let Channel { source, sink, peer, remote, .. } = channel;
    let peer = Caller { peer, place: remote };
    let Some(_place) = place else {
        let most = MAX_UNKNOWN_PER_IDENTITY;
        let why = format!("{most} of its connections have not said what they want; wait a moment");
        return server.turn_away(&peer, sink, &why).await;
    };
    let mut reader = FrameReader::new(source);
    let hello = tokio::time::timeout(HELLO_TIMEOUT, reader.read_message(MAX_HELLO_BYTES)).await;
    let why = match hello {
        Ok(Ok(Some(bytes))) => match Hello::decode(&bytes) {
            Ok(hello) => return greet(&server, hello, peer, reader, sink).await,
            Err(e) => e.to_string(),
        },
        Ok(Ok(None)) => "it closed the connection without a word".into(),
        Ok(Err(e)) => e.to_string(),
        Err(_) => format!("it said nothing for {} s", HELLO_TIMEOUT.as_secs()),
    };
    server.turn_away(&peer, sink, &why).await;
}

/// A channel that has not said what it is for, or is told that it cannot be.
struct Unknown<H: Host>(Arc<Server<H>>, String);

impl<H: Host + 'static> Unknown<H> {
    fn new(server: &Arc<Server<H>>, identity: &str) -> Option<Self> {
        let mut sessions = server.sessions();
        let unknown = sessions.unknown.entry(identity.to_owned()).or_default();
        if *unknown >= MAX_UNKNOWN_PER_IDENTITY {
            return None;
        }
        *unknown += 1;
        Some(Self(server.clone(), identity.to_owned()))
    }
}

impl<H: Host> Drop for Unknown<H> {
    fn drop(&mut self) {
        let mut sessions = self.0.sessions();
        if let Some(unknown) = sessions.unknown.get_mut(&self.1) {
            *unknown -= 1;
            if *unknown == 0 {
                sessions.unknown.remove(&self.1);
            }
        }
    }
}

async fn greet<H: Host + 'static>(
    server: &Arc<Server<H>>,
    hello: Hello,
    peer: Caller,
    reader: FrameReader,
    mut sink: Box<dyn ByteSink>,
) {
    match hello {
        Hello::Control { version_min, version_max } => {
            let admitted = if version_min > VERSION_MAX || version_max < VERSION_MIN {
                let why = format!(
                    "the source speaks protocol versions {version_min} to {version_max}, this host \
                     {VERSION_MIN} to {VERSION_MAX}: update the older one"
                );
                Err(Refusal::new("version", why))
            } else {
                server.admit(&peer.peer)
            };
            match admitted {
                Ok((token, receiver, door)) => {
                    server.begin(token, receiver, door, peer, reader, sink)
                }
                Err(refusal) => {
                    let why = refusal.why.clone();
                    // The source learns why; if it does not, it learns that the channel was closed.
                    let _ =
                        say_last(&mut sink, reader, &ToSource::Refused { reasons: vec![refusal] })
                            .await;
                    server.turn_away(&peer, sink, &why).await;
                }
            }
        }
        Hello::Lane { session, link, .. } => {
            let lane = |reader, sink| Message::Lane { link, reader, sink };
            server.join(session, peer, reader, sink, lane).await;
        }
        Hello::Urgent { session, link } => {
            let lane = |reader, sink| Message::Urgent { link, reader, sink };
            server.join(session, peer, reader, sink, lane).await;
        }
        Hello::Rejoin { session, done, link } => {
            let open = server
                .sessions()
                .by_token
                .get(&session)
                .is_some_and(|s| s.door.is_some() && s.identity == peer.peer.name);
            if open {
                let rejoin = move |reader, sink| Message::Rejoin { link, reader, sink, done };
                server.join(session, peer, reader, sink, rejoin).await;
            } else {
                server.answer_verdict(session, &peer, reader, sink).await;
            }
        }
        Hello::Bundles { .. } => {
            let why = "it asks for bundles, and this host takes in machines: `ferry bundle serve` lends bundles";
            server.turn_away(&peer, sink, why).await;
        }
    }
}

/// Says the last word of a channel, and holds it open until the peer has read it and hung up: what is not
/// read yet when a channel is closed may be lost.
async fn say_last(
    sink: &mut Box<dyn ByteSink>,
    reader: FrameReader,
    message: &ToSource,
) -> Result<(), LinkError> {
    let bytes = wire::encode(message).unwrap_or_default();
    let (mut source, _) = reader.into_parts();
    let farewell = async {
        send_message(sink.as_mut(), &bytes).await?;
        sink.finish().await?;
        while let Ok(Some(_)) = source.recv().await {}
        Ok(())
    };
    // A peer that stays has had its time.
    tokio::time::timeout(HELLO_TIMEOUT, farewell).await.unwrap_or(Ok(()))
}

impl<H: Host> Server<H> {
    fn sessions(&self) -> MutexGuard<'_, Sessions> {
        self.sessions.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<H: Host + 'static> Server<H> {
    /// Whose source is away from now on, or is back.
    pub(crate) fn set_away(&self, token: u128, away: Option<(String, String)>) {
        if let Some(session) = self.sessions().by_token.get_mut(&token) {
            session.away = away;
        }
    }

    /// Ends each session that waits for its source in the way of `name`, which `identity` brings anew; with
    /// `--once`, every one that waits. Returns when their machines are gone.
    pub(crate) fn supersede(&self, name: &str, identity: &str) {
        let (gone, all_gone) = channel::<()>();
        for session in self.sessions().by_token.values() {
            let in_the_way =
                |(n, i): &(String, String)| self.options.once || n == name && i == identity;
            if let (Some(door), true) =
                (&session.door, session.away.as_ref().is_some_and(in_the_way))
            {
                let _ = door.send(Message::Superseded(gone.clone()));
            }
        }
        drop(gone);
        // Each holds its end until its machine is dropped.
        let _ = all_gone.recv_timeout(SUPERSEDE_TIMEOUT);
    }

    /// What whoever asks for this session is told from now on.
    pub(crate) fn set_verdict(&self, token: u128, verdict: Verdict) {
        if let Some(session) = self.sessions().by_token.get_mut(&token) {
            session.verdict = verdict;
        }
    }

    /// No channel joins this session any more; whether its machine stays here.
    pub(crate) fn session_ends(&self, token: u128, stays: bool) {
        let mut sessions = self.sessions();
        if let Some(session) = sessions.by_token.get_mut(&token) {
            session.door = None;
            session.away = None;
            session.memory_bytes = 0;
        }
        if !stays {
            sessions.taken -= 1;
        }
    }

    /// Sets memory aside for the machine of this session.
    pub(crate) fn make_room(&self, token: u128, bytes: u64) -> Result<(), Refusal> {
        let mut sessions = self.sessions();
        let others: u64 = sessions.by_token.values().map(|s| s.memory_bytes).sum();
        if others == 0 {
            sessions.available_bytes = self.host.available_bytes();
        }
        let most_bytes = self.options.max_memory_bytes.unwrap_or(sessions.available_bytes);
        if others.saturating_add(bytes) > most_bytes {
            let [needs, others, most] = [bytes, others, most_bytes].map(|bytes| bytes >> 20);
            let why = match bytes > most_bytes {
                true => format!(
                    "the machine has {needs} MiB, and this host can take {most} MiB: see `ferry receive --max-memory`"
                ),
                false => format!(
                    "the machine has {needs} MiB, and {others} MiB of others are on their way; this host takes in \
                     {most} MiB at once: try again when they are here, or see `ferry receive --max-memory`"
                ),
            };
            return Err(Refusal::new("memory", why));
        }
        if let Some(session) = sessions.by_token.get_mut(&token) {
            session.memory_bytes = bytes;
        }
        Ok(())
    }

    /// The machine of this session runs here: its memory is the host's affair.
    pub(crate) fn has_arrived(&self, token: u128) {
        let mut sessions = self.sessions();
        let session = sessions.by_token.get_mut(&token);
        let bytes = session.map_or(0, |s| std::mem::take(&mut s.memory_bytes));
        sessions.available_bytes = sessions.available_bytes.saturating_sub(bytes);
    }

    /// Says that `peer` named a session of another identity, if it did.
    fn tell_foreign(&self, session: u128, peer: &Caller) {
        let whose = self.sessions().by_token.get(&session).map(|s| s.identity.clone());
        if let Some(whose) = whose.filter(|whose| *whose != peer.peer.name) {
            let said = format!(
                "{peer} named a session of {whose} and was told nothing of it: how did it come by that number?"
            );
            (self.tell)(ReceiveEvent::Turned(said));
        }
    }

    /// Takes a channel to its session, as `message`.
    async fn join(
        &self,
        session: u128,
        peer: Caller,
        reader: FrameReader,
        sink: Box<dyn ByteSink>,
        message: impl FnOnce(FrameReader, Box<dyn ByteSink>) -> Message,
    ) {
        let door = {
            let sessions = self.sessions();
            let own = sessions.by_token.get(&session).filter(|s| s.identity == peer.peer.name);
            own.and_then(|s| s.door.clone())
        };
        let message = message(reader, sink);
        let joined = match door {
            Some(door) => door.send(message).map_err(|e| e.0),
            None => Err(message),
        };
        if let Err(
            Message::Lane { sink, .. }
            | Message::Urgent { sink, .. }
            | Message::Rejoin { sink, .. },
        ) = joined
        {
            self.tell_foreign(session, &peer);
            self.turn_away(&peer, sink, "a lane for a session that is not open here").await;
        }
    }

    async fn answer_verdict(
        &self,
        session: u128,
        peer: &Caller,
        reader: FrameReader,
        mut sink: Box<dyn ByteSink>,
    ) {
        self.tell_foreign(session, peer);
        let verdict = {
            let sessions = self.sessions();
            let own = sessions.by_token.get(&session).filter(|s| s.identity == peer.peer.name);
            own.map_or(Verdict::Unknown, |s| s.verdict)
        };
        if let Err(e) = say_last(&mut sink, reader, &ToSource::Verdict(verdict)).await {
            tracing::debug!("{peer} did not hear how its session ended: {e}");
        }
    }

    async fn turn_away(&self, peer: &Caller, mut sink: Box<dyn ByteSink>, why: &str) {
        sink.close(why).await;
        (self.tell)(ReceiveEvent::Turned(format!("turned {peer} away: {why}")));
    }

    fn begin(
        self: &Arc<Self>,
        token: u128,
        receiver: Receiver<Message>,
        door: Sender<Message>,
        peer: Caller,
        reader: FrameReader,
        sink: Box<dyn ByteSink>,
    ) {
        let runtime = tokio::runtime::Handle::current();
        let mut arriving = Arriving::new(self.clone(), token, peer, door, runtime);
        arriving.control(reader, sink);
        let thread = std::thread::Builder::new().name("ferry-arrival".into());
        if let Err(e) = thread.spawn(move || arriving.run(&receiver)) {
            // What was moved into the thread is dropped, and the source sees the channel close.
            (self.tell)(ReceiveEvent::Turned(format!("cannot start a thread for a machine: {e}")));
        }
    }

    fn admit(&self, peer: &Peer) -> Result<(u128, Receiver<Message>, Sender<Message>), Refusal> {
        self.options.admission.knows(peer).map_err(|why| Refusal::new("identity", why))?;
        let mut sessions = self.sessions();
        let busy = |why: String| Err(Refusal::new("host", why));
        let away = sessions.by_token.values().filter(|s| s.away.is_some()).count();
        if self.options.once && sessions.taken > away {
            return busy("this host takes in one machine, and has it (--once)".into());
        }
        if sessions.arriving().count() >= MAX_ARRIVING {
            return busy(format!("{MAX_ARRIVING} machines are on their way in already; try again"));
        }
        let own = sessions.arriving().filter(|s| s.identity == peer.name).count();
        if own >= MAX_ARRIVING_PER_IDENTITY {
            return busy(format!(
                "{own} machines of host `{}` are on their way in already, the most of one host; try again",
                peer.name
            ));
        }
        let (door, receiver) = channel();
        let token = rand::random();
        sessions.by_token.insert(
            token,
            Session {
                identity: peer.name.clone(),
                memory_bytes: 0,
                verdict: Verdict::Unknown,
                door: Some(door.clone()),
                away: None,
            },
        );
        sessions.order.push(token);
        sessions.taken += 1;
        sessions.forget_oldest();
        Ok((token, receiver, door))
    }
}
