//! One machine on its way in: its channels, its state machine, its memory.

use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use ferry_codec::CodecSet;
use ferry_memory::{MissingPages, Waiters};
use ferry_pager::{Notice, Pager};
use ferry_pages::PageSet;
use ferry_protocol::limits::{MAX_MESSAGE_BYTES, MAX_WAITING_MESSAGES, max_commit_bytes};
use ferry_protocol::{
    Arrival, Built, Destination, DestinationAction, DestinationEvent, MachineSpec, Refusal,
    StateReader, ToDestination, is_machine_name, wire,
};
use ferry_transport::{ByteSink, FrameReader, LinkError, send_message};
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};

use crate::fetch::Asks;
use crate::fetching::{Bringer, Fetching};
use crate::install::Installer;
use crate::recall::{OldCopy, Recalls};
use crate::receive::{Caller, ReceiveEvent, Server};
use crate::receive_lane::{self, LaneEnd};
use crate::send_lane::FAREWELL;
use crate::{Guest, Host, fetch, words};

/// The source of a machine brings its pages.
struct FromSource {
    installer: Arc<Installer>,
    door: Sender<Message>,
}

impl Bringer for FromSource {
    fn missing(&self) -> PageSet {
        self.installer.pager(Pager::missing).unwrap_or_default()
    }

    fn abandon(&self) {
        self.installer.drain();
        let _ = self.door.send(Message::Abandoned);
    }

    fn trouble(&self) -> Option<String> {
        // A source may come back.
        None
    }
}

/// State that is being loaded, which may touch a page that is still to come: when the link is lost, it
/// must not wait for ever.
#[derive(Clone, Default)]
struct Loading(Arc<Mutex<Option<Arc<Installer>>>>);

impl Loading {
    fn slot(&self) -> MutexGuard<'_, Option<Arc<Installer>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn begin(&self, installer: Option<Arc<Installer>>) {
        *self.slot() = installer;
    }

    /// Whether the link held all the while.
    fn end(&self) -> bool {
        self.slot().take().is_some()
    }

    /// The link was lost: whoever loads goes on, with pages of zeros, and [`end`](Self::end) says so.
    fn link_lost(&self) {
        if let Some(installer) = self.slot().take() {
            installer.drain();
        }
    }
}

/// What a session's thread is told.
pub(crate) enum Message {
    /// From a channel of link number `epoch`; those of a link before the present one count no more.
    Link {
        epoch: u64,
        event: DestinationEvent,
    },
    /// From the control channel, which is read on while few of these wait.
    Said {
        epoch: u64,
        event: DestinationEvent,
        _turn: Option<OwnedSemaphorePermit>,
    },
    /// A lane, with the sink that says to the source that somebody is here.
    Lane {
        link: u64,
        reader: FrameReader,
        sink: Box<dyn ByteSink>,
    },
    /// The lane on which pages are asked for.
    Urgent {
        link: u64,
        reader: FrameReader,
        sink: Box<dyn ByteSink>,
    },
    /// A new control channel of a source that lost the one before, and knows these rounds to be done.
    Rejoin {
        link: u64,
        reader: FrameReader,
        sink: Box<dyn ByteSink>,
        done: u32,
    },
    /// A session that waits for its source is in another's way, which waits until the sender is dropped.
    Superseded(Sender<()>),
    Pager(Notice),
    Abandoned,
}

/// Ends when nothing more is to come of a link: at once when there is another, and a moment after its session's end,
/// so that last words are heard.
async fn over(mut link: watch::Receiver<bool>) {
    if link.wait_for(|over| *over).await.is_err() {
        // In a task: on a thread of its own, a timer panics when the runtime ends first.
        let _ = tokio::spawn(tokio::time::sleep(FAREWELL)).await;
    }
}

async fn write(mut sink: Box<dyn ByteSink>, mut messages: UnboundedReceiver<Vec<u8>>) {
    while let Some(bytes) = messages.recv().await {
        if send_message(sink.as_mut(), &bytes).await.is_err() {
            // The reader learns of it and says so.
            return;
        }
    }
    let _ = sink.finish().await;
}

/// `largest`: bytes that one message, the commit, may have; none of the others has more than `MAX_MESSAGE_BYTES`.
async fn read(
    mut reader: FrameReader,
    door: Sender<Message>,
    epoch: u64,
    loading: Loading,
    largest: Arc<AtomicUsize>,
) {
    let turns = Arc::new(Semaphore::new(MAX_WAITING_MESSAGES));
    let mut committed = false;
    loop {
        let turn = turns.clone().acquire_owned().await.ok();
        let max = || if committed { MAX_MESSAGE_BYTES } else { largest.load(Ordering::Relaxed) };
        let event = match reader.read_message_within(max).await {
            Ok(Some(bytes)) => match wire::decode::<ToDestination>(&bytes) {
                Ok(message) => {
                    committed |= matches!(message, ToDestination::Commit { .. })
                        || bytes.len() > MAX_MESSAGE_BYTES;
                    DestinationEvent::Message(message.plain())
                }
                Err(e) => DestinationEvent::BadPages(format!("the source sent nonsense: {e}")),
            },
            Ok(None) => DestinationEvent::LinkLost("the source closed the control channel".into()),
            Err(e @ LinkError::TooLong { .. }) => DestinationEvent::BadPages(e.to_string()),
            Err(e) => DestinationEvent::LinkLost(e.to_string()),
        };
        let over = !matches!(event, DestinationEvent::Message(_));
        if over {
            loading.link_lost();
        }
        if door.send(Message::Said { epoch, event, _turn: turn }).is_err() || over {
            return;
        }
    }
}

/// One machine on its way in.
pub(crate) struct Arriving<H: Host> {
    server: Arc<Server<H>>,
    token: u128,
    peer: Caller,
    door: Sender<Message>,
    /// Counts links: one for each control channel.
    epoch: u64,
    /// What lanes of the present link name; none is awaited without one.
    link: Option<u64>,
    /// The present link was not found lost.
    linked: bool,
    /// True when the present link is given up, or another one takes its place.
    replaced: watch::Sender<bool>,
    /// True when another control channel is read. One of a link that was given up is read until then: a lane may be
    /// found lost before the source's word is read that it ends the migration.
    silenced: watch::Sender<bool>,
    /// Lets the control channel carry as much as it can.
    widen: Option<Box<dyn FnOnce() + Send>>,
    /// Bytes that the commit may have; see `read`.
    largest: Arc<AtomicUsize>,
    /// To the control channel.
    outgoing: Option<UnboundedSender<Vec<u8>>>,
    /// To the urgent lane.
    asks: Asks,
    urgent_allowed: bool,
    /// By the pager's clock.
    resumed_at: Duration,
    /// The guest gave pages up before they came: the sum is not that of the source's memory.
    discarded: bool,
    loading: Loading,
    runtime: tokio::runtime::Handle,
    machine: Destination,
    began: Instant,
    spec: Option<MachineSpec>,
    guest: Option<H::Guest>,
    installer: Option<Arc<Installer>>,
    old: Option<Arc<OldCopy>>,
    codecs: CodecSet,
    lanes_allowed: u16,
    arrival: Option<Arrival>,
    running: bool,
    /// Dropped with the machine.
    superseded_by: Vec<Sender<()>>,
}

impl<H: Host + 'static> Arriving<H> {
    pub(crate) fn new(
        server: Arc<Server<H>>,
        token: u128,
        peer: Caller,
        door: Sender<Message>,
        runtime: tokio::runtime::Handle,
    ) -> Self {
        let machine = Destination::new(token, server.options.codecs.bits());
        Self {
            server,
            token,
            peer,
            door,
            epoch: 0,
            link: Some(0),
            linked: true,
            replaced: watch::Sender::new(false),
            silenced: watch::Sender::new(false),
            widen: None,
            largest: Arc::new(AtomicUsize::new(MAX_MESSAGE_BYTES)),
            outgoing: None,
            asks: Asks::default(),
            urgent_allowed: false,
            resumed_at: Duration::ZERO,
            discarded: false,
            loading: Loading::default(),
            runtime,
            machine,
            began: Instant::now(),
            spec: None,
            guest: None,
            installer: None,
            old: None,
            codecs: CodecSet::from_bits(0),
            lanes_allowed: 0,
            arrival: None,
            running: false,
            superseded_by: Vec::new(),
        }
    }

    pub(crate) fn run(mut self, receiver: &Receiver<Message>) {
        while self.arrival.is_none() {
            let message = match self.machine.deadline() {
                Some(at) => receiver.recv_timeout(at.saturating_sub(self.began.elapsed())),
                None => receiver.recv().map_err(RecvTimeoutError::from),
            };
            match message {
                Ok(Message::Link { epoch, event } | Message::Said { epoch, event, .. })
                    if epoch == self.epoch =>
                {
                    if let DestinationEvent::LinkLost(why) = &event {
                        let why = why.clone();
                        self.handle(event);
                        self.waits(why);
                    } else {
                        self.handle(event);
                    }
                }
                // A source that says so is gone: it has no later link.
                Ok(Message::Said {
                    event: event @ DestinationEvent::Message(ToDestination::Abort { .. }),
                    ..
                }) => self.handle(event),
                Ok(Message::Link { .. } | Message::Said { .. }) => {}
                // Of a link that was given up; dropped, it is closed.
                Ok(Message::Lane { link, .. } | Message::Urgent { link, .. })
                    if Some(link) != self.link => {}
                Ok(Message::Lane { reader, sink, .. }) => self.lane(reader, sink),
                Ok(Message::Urgent { reader, sink, .. }) => self.urgent(reader, sink),
                Ok(Message::Rejoin { link, reader, sink, done }) => {
                    self.link = Some(link);
                    self.asks.close();
                    self.server.set_away(self.token, None);
                    self.control(reader, sink);
                    let owed = self.missing().map(|(missing, _)| missing);
                    let held = match (&self.installer, &owed) {
                        (Some(installer), None) => installer.held(done),
                        _ => PageSet::new(),
                    };
                    let owed = owed.unwrap_or_default();
                    self.handle(DestinationEvent::Rejoined { held, owed });
                }
                Ok(Message::Superseded(by)) => {
                    self.superseded_by.push(by);
                    self.handle(DestinationEvent::Superseded);
                    if self.arrival.is_none() {
                        // Its source came back first.
                        self.superseded_by.clear();
                    }
                }
                Err(RecvTimeoutError::Timeout) => self.handle(DestinationEvent::Tick),
                Ok(Message::Pager(notice)) => self.notice(notice),
                Ok(Message::Abandoned) => self.handle(DestinationEvent::Abandoned),
                // This session holds a sender.
                Err(RecvTimeoutError::Disconnected) => {
                    self.handle(DestinationEvent::BadPages("the host is shutting down".into()))
                }
            }
            self.hand_over();
        }
        let stays = !matches!(self.arrival, Some(Arrival::Void(_)));
        self.server.session_ends(self.token, stays);
        // A machine that did not arrive is gone before anyone is told.
        drop(self.guest.take());
        let name = self.name();
        if let Some(arrival) = self.arrival.take() {
            (self.server.tell)(ReceiveEvent::Ended { name, arrival });
        }
    }

    fn handle(&mut self, event: DestinationEvent) {
        let mut event = Some(event);
        while let Some(e) = event.take() {
            self.machine.handle(self.began.elapsed(), e);
            // Before any action: whoever asks from now on is told what will be.
            self.server.set_verdict(self.token, self.machine.verdict());
            while let Some(action) = self.machine.poll() {
                if let Some(answer) = self.act(action) {
                    event = Some(answer);
                }
            }
        }
    }

    fn act(&mut self, action: DestinationAction) -> Option<DestinationEvent> {
        match action {
            DestinationAction::Send(message) => {
                match wire::encode(&message) {
                    Ok(bytes) => {
                        if let Some(outgoing) = &self.outgoing {
                            let _ = outgoing.send(bytes);
                        }
                    }
                    Err(e) => tracing::error!("{e}"),
                }
                None
            }
            DestinationAction::Build { spec, machine } => {
                Some(DestinationEvent::Built(self.build(spec, machine)))
            }
            DestinationAction::AcceptLanes { codecs, lanes } => {
                self.codecs = CodecSet::from_bits(codecs);
                self.lanes_allowed = lanes;
                self.urgent_allowed = true;
                if let Some(widen) = self.widen.take() {
                    widen();
                }
                None
            }
            DestinationAction::Hold => {
                self.epoch += 1;
                self.outgoing = None;
                self.asks.close();
                self.replaced.send_replace(true);
                self.link = None;
                if let Some(spec) = &self.spec {
                    let (name, who) = (spec.name.clone(), self.peer.peer.name.clone());
                    self.server.set_away(self.token, Some((name, who)));
                }
                None
            }
            DestinationAction::Clear(stale) => {
                let cleared = self.installer.as_ref().map(|installer| installer.clear(&stale));
                // What stays is given back when the pages are owed, and then the guest waits for it.
                if let Some(Err(e)) = cleared {
                    tracing::warn!("pages that are stale are not given back yet: {}", words(&e));
                }
                None
            }
            DestinationAction::Page { owed, after } => {
                Some(DestinationEvent::Paging(self.page(owed, after)))
            }
            DestinationAction::Load(state) => Some(DestinationEvent::Loaded(self.load(&state))),
            DestinationAction::Resume(permit) => {
                self.resumed_at = self.pager(Pager::age).unwrap_or_default();
                let Some(guest) = &mut self.guest else {
                    return Some(DestinationEvent::Resumed(Err("there is no machine".into())));
                };
                let resumed = guest.resume(permit).map_err(|(_permit, e)| words(&e));
                self.running = resumed.is_ok();
                Some(DestinationEvent::Resumed(resumed))
            }
            DestinationAction::Digest => {
                self.hand_over();
                let discarded = self.pager(|pager| pager.waits().counts.discarded).unwrap_or(0);
                // Asked for again on another link, there is no pager any more.
                self.discarded |= discarded > 0;
                let installer = self.installer.as_ref();
                installer.inspect(|installer| installer.drain());
                let sum = installer.map_or(0, |i| i.digest_sum());
                Some(DestinationEvent::Digest((!self.discarded).then_some(sum)))
            }
            DestinationAction::Finish(arrival) => {
                self.arrival = Some(arrival);
                None
            }
        }
    }

    /// Talks on this control channel from now on.
    pub(crate) fn control(&mut self, reader: FrameReader, sink: Box<dyn ByteSink>) {
        self.epoch += 1;
        self.linked = true;
        self.replaced.send_replace(true);
        self.replaced = watch::Sender::new(false);
        self.silenced.send_replace(true);
        self.silenced = watch::Sender::new(false);
        self.widen = Some(reader.widen());
        let (outgoing, messages) = unbounded_channel();
        let (loading, largest) = (self.loading.clone(), self.largest.clone());
        let read = read(reader, self.door.clone(), self.epoch, loading, largest);
        let (of_reader, of_writer) = (self.silenced.subscribe(), self.replaced.subscribe());
        self.runtime.spawn(async move {
            tokio::select! { () = read => {}, () = over(of_reader) => {} }
        });
        self.runtime.spawn(async move {
            tokio::select! { () = write(sink, messages) => {}, () = over(of_writer) => {} }
        });
        self.outgoing = Some(outgoing);
    }

    fn pager<T>(&self, ask: impl FnOnce(&Pager) -> T) -> Option<T> {
        self.installer.as_ref().and_then(|installer| installer.pager(ask))
    }

    /// What the source owes; see [`Installer::missing`].
    fn missing(&self) -> Option<(PageSet, Vec<u64>)> {
        self.installer.as_ref().and_then(|installer| installer.missing())
    }

    /// Its name at the source, once that was said.
    fn name(&self) -> String {
        self.spec.as_ref().map_or_else(|| "?".into(), |spec| spec.name.clone())
    }

    /// Tells that a machine lost its source, which may come back; once for each link.
    fn waits(&mut self, why: String) {
        let missing = self.missing().map(|(missing, _)| missing.len());
        let waits = self.machine.is_alone() || missing.is_some() && self.running;
        if !waits || !std::mem::take(&mut self.linked) {
            return;
        }
        let name = self.name();
        (self.server.tell)(ReceiveEvent::Waiting { name, missing, why });
    }

    fn page(&mut self, owed: PageSet, after: u32) -> Result<(), String> {
        let installer = self.installer.as_ref().ok_or("there is no machine")?;
        let door = self.door.clone();
        let asks = self.asks.clone();
        let notify = move |notice| match notice {
            // Straight to the urgent lane.
            Notice::Ask(gfns) => asks.ask(gfns),
            other => drop(door.send(Message::Pager(other))),
        };
        installer.page(&self.runtime, (owed, after), notify).map_err(|e| words(&e))
    }

    fn notice(&mut self, notice: Notice) {
        match notice {
            Notice::Ask(_) => {}
            Notice::Complete => {
                let vcpus = self.spec.as_ref().map_or(1, |spec| spec.vcpus);
                let resumed_at = self.resumed_at;
                let measured =
                    |pager: &Pager| fetch::measured(&pager.waits(), pager.age(), vcpus, resumed_at);
                let fetched = self.pager(measured);
                self.handle(DestinationEvent::AllHere(fetched.unwrap_or_default()));
            }
            Notice::Broken(why) => self.handle(DestinationEvent::PagingBroken(why)),
        }
    }

    /// The lane on which pages are asked for, and come before all others.
    fn urgent(&mut self, reader: FrameReader, sink: Box<dyn ByteSink>) {
        let Some(installer) = self.installer.clone() else { return };
        if !std::mem::take(&mut self.urgent_allowed) {
            return self.handle(DestinationEvent::BadPages("more than one urgent lane".into()));
        }
        let (asks, wanted) = unbounded_channel();
        let (missing, waited) = self.missing().unwrap_or_default();
        self.asks.open(asks, &missing);
        self.asks.ask(waited);
        let (codecs, door, epoch) = (self.codecs, self.door.clone(), self.epoch);
        let (loading, replaced) = (self.loading.clone(), self.replaced.subscribe());
        reader.widen()();
        self.runtime.spawn(async move {
            let event = tokio::select! {
                event = fetch::run(reader, sink, wanted, &installer, codecs) => event,
                () = over(replaced) => return,
            };
            if let Some(event) = event {
                loading.link_lost();
                let _ = door.send(Message::Link { epoch, event });
            }
        });
    }

    fn build(&mut self, spec: MachineSpec, machine: Option<u128>) -> Result<Built, Vec<Refusal>> {
        let name = spec.name.clone();
        let peer = self.peer.to_string();
        if !is_machine_name(&name) {
            let why = format!("`{:.64}` cannot name a machine", name.escape_debug().to_string());
            return Err(vec![Refusal::new("name", why)]);
        }
        (self.server.tell)(ReceiveEvent::Arriving { name: name.clone(), peer });
        let admission = &self.server.options.admission;
        let admitted = admission.admit(&self.peer.peer, "send machine", &spec.name);
        admitted.map_err(|why| vec![Refusal::new("identity", why)])?;
        let layout = spec.layout().map_err(|e| vec![Refusal::new("memory", e.to_string())])?;
        self.server.supersede(&spec.name, &self.peer.peer.name);
        self.server.make_room(self.token, spec.memory_bytes()).map_err(|no| vec![no])?;
        let guest = self.server.host.prepare(&spec)?;
        self.installer = Some(Arc::new(Installer::new(guest.memory(), layout)));
        self.guest = Some(guest);
        self.largest.store(max_commit_bytes(spec.memory_bytes()), Ordering::Relaxed);
        let mut recalled = Vec::new();
        if let Some(machine) = machine {
            let tell = |bundle: &Path, pages| {
                let (name, bundle) = (name.clone(), bundle.to_owned());
                (self.server.tell)(ReceiveEvent::Recalled { name, bundle, pages });
            };
            let places = &self.server.options.bundles;
            let useless = |bundle: &Path, why| tell(bundle, Err(why));
            let old = OldCopy::find(places, machine, &spec.extents, useless);
            self.old = old.map(Arc::new);
            if let Some(old) = &self.old {
                recalled = old.recalled();
                tell(old.dir(), Ok(recalled.iter().map(|old| old.digests.len() as u64).sum()));
            }
        }
        self.spec = Some(spec);
        let no_post_copy = MissingPages::available(Waiters::All).err().map(|e| words(&e));
        Ok(Built { no_post_copy, recalled })
    }

    fn load(&mut self, state: &[u8]) -> Result<(), String> {
        if let Some(installer) = &self.installer
            && !installer.is_paging()
        {
            // From here on memory is the guest's.
            installer.close();
            if let Some(away) = installer.view().away() {
                away.serve().map_err(|e| words(&e))?;
            }
        }
        let guest = self.guest.as_mut().ok_or("there is no machine")?;
        let state = StateReader::parse(state).map_err(|e| e.to_string())?;
        self.loading.begin(self.installer.clone());
        let (loading, limit) = (self.loading.clone(), self.server.options.load_timeout);
        // Without pages that are owed, nothing of the source's can hold up loading.
        let owes = self.installer.as_ref().is_some_and(|installer| installer.is_paging());
        let watchdog = owes.then(|| {
            self.runtime.spawn(async move {
                tokio::time::sleep(limit).await;
                loading.link_lost();
            })
        });
        let loaded = guest.load(&state).map_err(|e| words(&e));
        watchdog.inspect(|watchdog| watchdog.abort());
        if self.loading.end() {
            loaded
        } else {
            let s = limit.as_secs_f64();
            Err(format!(
                "the link was lost while state was loaded, or pages for it did not come within {s:.0} s"
            ))
        }
    }

    /// The old copy, for a lane of the present link, and what is done where it lacks pages.
    fn recalls(&self, installer: &Arc<Installer>) -> Option<Recalls> {
        let old = self.old.clone()?;
        let (asks, server, installer) = (self.asks.clone(), self.server.clone(), installer.clone());
        let (dir, door, epoch) = (old.dir().to_owned(), self.door.clone(), self.epoch);
        let name = self.name();
        let lacking = move |mut pages: PageSet, runs, first, why| {
            if first {
                let (name, bundle) = (name.clone(), dir.clone());
                (server.tell)(ReceiveEvent::Recalled { name, bundle, pages: Err(why) });
            }
            if runs {
                pages.intersect_with(&installer.missing().unwrap_or_default().0);
                asks.lacking(&pages);
            } else {
                let event = DestinationEvent::Lacking(pages);
                let _ = door.send(Message::Link { epoch, event });
            }
        };
        Some(Recalls { old, lacking: Arc::new(lacking) })
    }

    fn lane(&mut self, reader: FrameReader, mut sink: Box<dyn ByteSink>) {
        let Some(installer) = self.installer.clone() else { return };
        if self.lanes_allowed == 0 {
            return self.handle(DestinationEvent::BadPages("more lanes than were offered".into()));
        }
        self.lanes_allowed -= 1;
        let (codecs, door, epoch) = (self.codecs, self.door.clone(), self.epoch);
        let old = self.recalls(&installer);
        // A thread of its own: on the runtime's threads, the lane's connection would stand still while
        // pages are verified and written.
        let (runtime, replaced) = (self.runtime.clone(), self.replaced.subscribe());
        reader.widen()();
        let run = async move {
            let installed = |round| {
                let event = DestinationEvent::Installed { round };
                let _ = door.send(Message::Link { epoch, event });
            };
            let acks = Some(&mut sink);
            let ended = receive_lane::run(reader, acks, &installer, codecs, old, installed).await;
            let event = match ended {
                // All was read: to wait until a source that is gone hears so would hold the machine's memory.
                LaneEnd::Finished => return,
                LaneEnd::Lost(why) => DestinationEvent::LinkLost(why),
                LaneEnd::Bad(why) => {
                    sink.close(&why).await;
                    DestinationEvent::BadPages(why)
                }
            };
            let _ = door.send(Message::Link { epoch, event });
        };
        let thread = std::thread::Builder::new().name("ferry-install".into());
        let run = async move {
            tokio::select! {
                () = run => {}
                () = over(replaced) => {}
            }
        };
        if let Err(e) = thread.spawn(move || runtime.block_on(run)) {
            let why = format!("cannot start a thread for a lane: {e}");
            self.handle(DestinationEvent::LinkLost(why));
        }
    }

    /// Gives a machine that runs to the host.
    fn hand_over(&mut self) {
        if !self.running {
            return;
        }
        if let (Some(guest), Some(spec)) = (self.guest.take(), &self.spec) {
            let pages = self.installer.clone().filter(|i| i.is_paging());
            let fetching = pages.map(|installer| {
                let door = self.door.clone();
                Fetching::new(Arc::new(FromSource { installer, door }))
            });
            let spec = spec.clone();
            self.server.has_arrived(self.token);
            (self.server.tell)(ReceiveEvent::Arrived { guest, spec, fetching });
        }
    }
}
