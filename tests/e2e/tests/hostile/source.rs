//! A hostile source against a host that takes machines in.

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use ferry_codec::{BatchBuilder, Codec};
use ferry_migrate::{
    Arrival, Guest, MachineSpec, ReceiveEvent, ReceiveOptions, RunPermit, StateWriter,
};
use ferry_process_guest::{ProcessGuest, ProcessHost};
use ferry_protocol::{Hello, PackedPages, ToDestination, ToSource, Verdict, wire};
use ferry_transport::{ByteSink, Connector, FrameReader, memory, send_message};

use crate::frames::{crafted, data_frame};
use crate::stage::{Destination, Dice, Link, Links, Maker, Subject, goes_on, migrate};
use crate::{PAGES, assert_unharmed, maker, message, options, panics, peak_bytes, spec};

/// What a source that vanishes has brought is thrown away at once.
const KEEP: Duration = Duration::ZERO;

/// A session's control channel, in hostile hands.
pub(crate) struct Session<'a> {
    connector: &'a Arc<dyn Connector>,
    pub(crate) sink: Box<dyn ByteSink>,
    reader: FrameReader,
    pub(crate) token: u128,
}

impl<'a> Session<'a> {
    pub(crate) async fn hello(connector: &'a Arc<dyn Connector>) -> Self {
        let mut channel = connector.connect().await.unwrap();
        send_message(channel.sink.as_mut(), &Hello::control().encode()).await.unwrap();
        Self { connector, sink: channel.sink, reader: FrameReader::new(channel.source), token: 0 }
    }

    pub(crate) async fn offering(connector: &'a Arc<dyn Connector>) -> Self {
        let mut session = Self::hello(connector).await;
        session
            .say(&ToDestination::Offer {
                spec: spec(),
                codecs: 0xf,
                lanes: 2,
                keep: KEEP,
                machine: None,
            })
            .await;
        session
    }

    pub(crate) async fn accepted(connector: &'a Arc<dyn Connector>) -> Self {
        let mut session = Self::offering(connector).await;
        match session.hear().await {
            Some(ToSource::Accepted { session: token, .. }) => session.token = token,
            other => panic!("{other:?}"),
        }
        session
    }

    /// What the other side does of it is what is looked at: it may have hung up.
    pub(crate) async fn say(&mut self, message: &ToDestination) {
        let _ = send_message(self.sink.as_mut(), &wire::encode(message).unwrap()).await;
    }

    pub(crate) async fn hear(&mut self) -> Option<ToSource> {
        let bytes = self.reader.read_message(wire::MAX_MESSAGE_BYTES).await.ok()??;
        Some(wire::decode(&bytes).unwrap())
    }

    pub(crate) async fn lane(&mut self) -> Box<dyn ByteSink> {
        let mut channel = self.connector.connect().await.unwrap();
        let hello = Hello::Lane { session: self.token, link: 0, lane: 0 };
        send_message(channel.sink.as_mut(), &hello.encode()).await.unwrap();
        // Nothing is read of it: what it is told comes by the control channel as well.
        std::mem::forget(channel.source);
        channel.sink
    }

    /// Puts `bytes` on a new lane.
    pub(crate) async fn on_lane(&mut self, bytes: impl Into<Bytes>) -> Box<dyn ByteSink> {
        let mut lane = self.lane().await;
        let _ = lane.send(bytes.into()).await;
        lane
    }
}

/// What the host says next of a peer or a session.
pub(crate) fn word_of(host: &Destination<ProcessGuest>) -> String {
    loop {
        match host.event(Duration::from_secs(8)) {
            Some(ReceiveEvent::Turned(why)) => return why,
            Some(ReceiveEvent::Ended { arrival: Arrival::Void(why), .. }) => return why,
            Some(
                ReceiveEvent::Arriving { .. }
                | ReceiveEvent::Waiting { .. }
                | ReceiveEvent::Recalled { .. },
            ) => {}
            Some(other) => panic!("{other:?}"),
            None => panic!("the host said nothing within 8 s"),
        }
    }
}

type Attack = fn(Arc<dyn Connector>) -> std::pin::Pin<Box<dyn Future<Output = ()> + Send>>;

macro_rules! attack {
    ($connector:ident => $body:block) => {
        (|connector: Arc<dyn Connector>| {
            Box::pin(async move {
                let $connector = &connector;
                $body
            }) as std::pin::Pin<Box<dyn Future<Output = ()> + Send>>
        }) as Attack
    };
}

/// Says hello in these bytes, and holds the channel open until it is closed.
async fn raw(connector: &Arc<dyn Connector>, bytes: &[u8]) {
    let mut channel = connector.connect().await.unwrap();
    let _ = channel.sink.send(Bytes::copy_from_slice(bytes)).await;
    let _ = channel.source.recv().await;
}

async fn offered(connector: &Arc<dyn Connector>, change: impl FnOnce(&mut MachineSpec)) {
    let mut session = Session::hello(connector).await;
    let mut spec = spec();
    change(&mut spec);
    session
        .say(&ToDestination::Offer { spec, codecs: 0xf, lanes: 1, keep: KEEP, machine: None })
        .await;
    let answer = session.hear().await;
    assert!(
        matches!(answer, Some(ToSource::Refused { .. } | ToSource::Failed { .. })),
        "{answer:?}"
    );
}

/// Puts a frame on a lane of a good session; the source is told why it is over.
async fn framed(connector: &Arc<dyn Connector>, frame: impl Into<Bytes>) {
    let mut session = Session::accepted(connector).await;
    let lane = session.on_lane(frame).await;
    let answer = session.hear().await;
    assert!(matches!(answer, Some(ToSource::Failed { .. })), "{answer:?}");
    drop(lane);
}

pub(crate) fn permit() -> RunPermit {
    RunPermit::for_new_machine(7)
}

#[test]
fn a_hostile_source_is_told_off_and_the_host_is_unharmed() {
    panics();
    let attacks: Vec<(&str, &str, Attack)> = vec![
        ("another protocol", "bytes", attack!(c => { raw(c, b"GET / HTTP/1.1\r\n\r\n").await })),
        (
            "another magic",
            "does not speak Ferry",
            attack!(c => { raw(c, &message(b"hello, world")).await }),
        ),
        (
            "half a hello",
            "no hello of Ferry's protocol versions",
            attack!(c => { raw(c, &message(b"ferry\0\r\n")).await }),
        ),
        ("a hello too long", "257 bytes", attack!(c => { raw(c, &message(&[0; 257])).await })),
        ("a hello of 4 GiB", "4294967295 bytes", attack!(c => { raw(c, &[0xff; 4]).await })),
        (
            "no word",
            "without a word",
            attack!(c => {
                let mut channel = c.connect().await.unwrap();
                channel.sink.finish().await.unwrap();
            }),
        ),
        (
            "a version of tomorrow",
            "update the older one",
            attack!(c => {
                let hello = Hello::Control { version_min: 900, version_max: 901 }.encode();
                let mut channel = c.connect().await.unwrap();
                send_message(channel.sink.as_mut(), &hello).await.unwrap();
                let mut reader = FrameReader::new(channel.source);
                let answer = reader.read_message(4096).await.unwrap().unwrap();
                let answer: ToSource = wire::decode(&answer).unwrap();
                assert!(matches!(answer, ToSource::Refused { .. }), "{answer:?}");
            }),
        ),
        (
            "a lane of no session",
            "session that is not open",
            attack!(c => {
                raw(c, &message(&Hello::Lane { session: 1, link: 0, lane: 0 }.encode())).await;
            }),
        ),
        (
            "a second offer",
            "second Offer",
            attack!(c => {
                let mut session = Session::accepted(c).await;
                session.say(&ToDestination::Offer { spec: spec(), codecs: 1, lanes: 1, keep: KEEP, machine: None }).await;
                assert!(matches!(session.hear().await, Some(ToSource::Failed { .. })));
            }),
        ),
        (
            "a commit before the offer",
            "Commit before",
            attack!(c => {
                let mut session = Session::hello(c).await;
                let commit = ToDestination::Commit { permit: permit(), state: vec![], rounds: vec![], owed: PackedPages::default() };
                session.say(&commit).await;
                assert!(matches!(session.hear().await, Some(ToSource::Failed { .. })));
            }),
        ),
        (
            "a round before the offer",
            "RoundEnd before",
            attack!(c => {
                let mut session = Session::hello(c).await;
                session.say(&ToDestination::RoundEnd { round: 1, batches: 0 }).await;
                session.hear().await;
            }),
        ),
        (
            "a verdict before the end",
            "Verified before",
            attack!(c => {
                let mut session = Session::accepted(c).await;
                session.say(&ToDestination::Verified { matches: true }).await;
                session.hear().await;
            }),
        ),
        (
            "a control message of 4 GiB",
            "4294967295 bytes",
            attack!(c => {
                let mut session = Session::accepted(c).await;
                let _ = session.sink.send(Bytes::from_static(&[0xff; 4])).await;
                session.hear().await;
            }),
        ),
        (
            "a control message of nonsense",
            "nonsense",
            attack!(c => {
                let mut session = Session::accepted(c).await;
                let _ = session.sink.send(message(&[0x7f; 100]).into()).await;
                session.hear().await;
            }),
        ),
        (
            "strings longer than the message",
            "nonsense",
            attack!(c => {
                let mut session = Session::hello(c).await;
                let mut offer = 0u32.to_le_bytes().to_vec();
                offer.extend(u64::MAX.to_le_bytes());
                let _ = session.sink.send(message(&offer).into()).await;
                session.hear().await;
            }),
        ),
        (
            "half a frame, finished",
            "middle",
            attack!(c => {
                let mut session = Session::accepted(c).await;
                let frame = data_frame(1, 0, 9);
                let mut lane = session.on_lane(frame.slice(..40)).await;
                let _ = lane.finish().await;
                let mut session = session;
                session.hear().await;
            }),
        ),
        (
            "half a frame, cut",
            "went away",
            attack!(c => {
                let mut session = Session::accepted(c).await;
                let frame = data_frame(1, 0, 9);
                drop(session.on_lane(frame.slice(..1000)).await);
                session.hear().await;
            }),
        ),
        (
            "a frame of 4 GiB",
            "payload of",
            attack!(c => {
                framed(c, crafted(Codec::Lz4, 1, &[(0, 1)], 1, u32::MAX, 0, &[])).await;
            }),
        ),
        (
            "a raw frame larger than its pages",
            "payload of",
            attack!(c => {
                framed(c, crafted(Codec::Raw, 1, &[(0, 1)], 1, 8192, 0, &[0; 8192])).await;
            }),
        ),
        (
            "more pages than a batch may have",
            "pages in",
            attack!(c => {
                framed(c, crafted(Codec::Raw, 1, &[(0, 257)], 257, 257 * 4096, 0, &[])).await;
            }),
        ),
        (
            "a page outside the layout",
            "outside the machine's memory",
            attack!(c => {
                framed(c, data_frame(1, PAGES, 9)).await;
            }),
        ),
        (
            "a page far outside",
            "outside the machine's memory",
            attack!(c => {
                framed(c, crafted(Codec::Zero, 1, &[(u64::MAX, 1)], 1, 0, 0, &[])).await;
            }),
        ),
        (
            "a run that wraps",
            "outside the machine's memory",
            attack!(c => {
                framed(c, crafted(Codec::Zero, 1, &[(PAGES - 1, u64::MAX)], 1, 0, 0, &[])).await;
            }),
        ),
        (
            "runs that overlap",
            "overlaps",
            attack!(c => {
                framed(c, crafted(Codec::Zero, 1, &[(0, 10), (5, 10)], 20, 0, 0, &[])).await;
            }),
        ),
        (
            "fewer pages than announced",
            "announces",
            attack!(c => {
                framed(c, crafted(Codec::Zero, 1, &[(0, 1)], 9, 0, 0, &[])).await;
            }),
        ),
        (
            "pages that the host is to have, of which nobody spoke",
            "was not negotiated",
            attack!(c => {
                framed(c, crafted(Codec::Same, 1, &[(0, 1)], 1, 0, 0, &[])).await;
            }),
        ),
        (
            "a page that is not what was sent",
            "digest",
            attack!(c => {
                let mut frame = data_frame(1, 3, 9).to_vec();
                *frame.last_mut().unwrap() ^= 1;
                framed(c, frame).await;
            }),
        ),
        (
            "a header that is not what was sent",
            "damaged",
            attack!(c => {
                let mut frame = data_frame(1, 3, 9).to_vec();
                frame[40] ^= 1;
                framed(c, frame).await;
            }),
        ),
        (
            "a payload that does not decompress",
            "does not decompress",
            attack!(c => {
                framed(c, crafted(Codec::Zstd, 1, &[(0, 1)], 1, 100, 0, &[0xa5; 100])).await;
            }),
        ),
        (
            "an unknown codec",
            "codec number 9",
            attack!(c => {
                let mut frame = data_frame(1, 3, 9).to_vec();
                frame[4] = 9;
                framed(c, frame).await;
            }),
        ),
        ("no frame", "magic", attack!(c => { framed(c, vec![0; 40]).await })),
        ("a page of round 0", "round 0", attack!(c => { framed(c, data_frame(0, 3, 9)).await })),
        (
            "a page of the last round there could be",
            "round 4294967295",
            attack!(c => {
                framed(c, data_frame(u32::MAX, 3, 9)).await;
            }),
        ),
        (
            "a page of a round that is over",
            "which is over",
            attack!(c => {
                let mut session = Session::accepted(c).await;
                session.say(&ToDestination::RoundEnd { round: 5, batches: 0 }).await;
                let lacking = PackedPages::default();
                assert_eq!(session.hear().await, Some(ToSource::RoundDone { round: 5, lacking }));
                let _lane = session.on_lane(data_frame(4, 3, 9)).await;
                session.hear().await;
            }),
        ),
        (
            "more batches than announced",
            "were announced",
            attack!(c => {
                let mut session = Session::accepted(c).await;
                let mut lane = session.on_lane(data_frame(1, 3, 9)).await;
                let _ = lane.send(data_frame(1, 4, 9)).await;
                tokio::time::sleep(Duration::from_millis(50)).await;
                session.say(&ToDestination::RoundEnd { round: 1, batches: 1 }).await;
                session.hear().await;
            }),
        ),
        (
            "a round that ends twice",
            "out of order",
            attack!(c => {
                let mut session = Session::accepted(c).await;
                session.say(&ToDestination::RoundEnd { round: 2, batches: 0 }).await;
                session.hear().await;
                session.say(&ToDestination::RoundEnd { round: 2, batches: 0 }).await;
                session.hear().await;
            }),
        ),
        (
            "a commit out of order",
            "out of order",
            attack!(c => {
                let mut session = Session::accepted(c).await;
                let rounds = vec![(2, 0), (1, 0)];
                session.say(&ToDestination::Commit { permit: permit(), state: vec![], rounds, owed: PackedPages::default() }).await;
                session.hear().await;
            }),
        ),
        (
            "a commit without state",
            "machine state",
            attack!(c => {
                let mut session = Session::accepted(c).await;
                let commit = ToDestination::Commit { permit: permit(), state: vec![1; 99], rounds: vec![], owed: PackedPages::default() };
                session.say(&commit).await;
                assert!(matches!(session.hear().await, Some(ToSource::CommitRefused { .. })));
            }),
        ),
        (
            "more lanes than offered",
            "more lanes",
            attack!(c => {
                let mut session = Session::accepted(c).await;
                let _lanes = (session.lane().await, session.lane().await, session.lane().await);
                session.hear().await;
            }),
        ),
        (
            "no lanes",
            "0 lanes",
            attack!(c => {
                let mut session = Session::hello(c).await;
                session.say(&ToDestination::Offer { spec: spec(), codecs: 0xf, lanes: 0, keep: KEEP, machine: None }).await;
                session.hear().await;
            }),
        ),
        (
            "65535 lanes",
            "65535 lanes",
            attack!(c => {
                let mut session = Session::hello(c).await;
                session.say(&ToDestination::Offer { spec: spec(), codecs: 0xf, lanes: u16::MAX, keep: KEEP, machine: None }).await;
                session.hear().await;
            }),
        ),
        (
            "no codec in common",
            "codecs 0x80",
            attack!(c => {
                let mut session = Session::hello(c).await;
                session.say(&ToDestination::Offer { spec: spec(), codecs: 0x80, lanes: 1, keep: KEEP, machine: None }).await;
                session.hear().await;
            }),
        ),
        (
            "a machine of 16 EiB",
            "memory",
            attack!(c => {
                offered(c, |s| s.extents = vec![(0, u64::MAX / 4096)]).await;
            }),
        ),
        (
            "a machine of 16 TiB",
            "MiB",
            attack!(c => { offered(c, |s| s.extents = vec![(0, 1 << 32)]).await }),
        ),
        (
            "a machine of 4 PiB",
            "the most that a machine may have",
            attack!(c => { offered(c, |s| s.extents = vec![(0, 1 << 40)]).await }),
        ),
        (
            "memory that overlaps",
            "extent",
            attack!(c => {
                offered(c, |s| s.extents = vec![(0, 4096), (100, 4096)]).await;
            }),
        ),
        (
            "a million extents",
            "at most 1048576 are allowed",
            attack!(c => {
                offered(c, |s| s.extents = (0..1_000_000).map(|n| (n * 2, 1)).collect()).await;
            }),
        ),
        ("no memory", "memory", attack!(c => { offered(c, |s| s.extents = vec![]).await })),
        (
            "4 billion vCPUs",
            "4294967295 vCPUs",
            attack!(c => { offered(c, |s| s.vcpus = u32::MAX).await }),
        ),
        (
            "a name that draws on the terminal",
            "`\\u{1b}[2J\\u{1b}[2J",
            attack!(c => { offered(c, |s| s.name = "\u{1b}[2J".repeat(1000)).await }),
        ),
        ("no vCPU", "0 vCPUs", attack!(c => { offered(c, |s| s.vcpus = 0).await })),
        ("another VMM", "`qemu`", attack!(c => { offered(c, |s| s.vmm = "qemu".into()).await })),
        (
            "a configuration of nonsense",
            "configuration",
            attack!(c => {
                offered(c, |s| s.config = vec![0xff; 1000]).await;
            }),
        ),
        (
            "a configuration of 60 MiB",
            "at most 1048576 are allowed",
            attack!(c => {
                offered(c, |s| s.config = vec![b'['; 60 << 20]).await;
            }),
        ),
    ];
    let host = Destination::start(Link::Memory, ProcessHost::default());
    // Of its own: what panics there is this test.
    let attackers = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .thread_name("attacker")
        .enable_all()
        .build()
        .unwrap();
    let handle = attackers.handle();
    for (name, word, attack) in attacks {
        let attacker = handle.spawn(attack(host.connector.clone()));
        let said = word_of(&host);
        assert!(said.contains(word), "{name}: `{word}` is not in: {said}");
        handle
            .block_on(async { tokio::time::timeout(Duration::from_secs(8), attacker).await })
            .unwrap_or_else(|_| panic!("{name}: the peer was not let go"))
            .unwrap_or_else(|e| panic!("{name}: {e}"));
    }
    assert_unharmed(&host);
    assert!(peak_bytes() < 1 << 30, "{} MiB at the most", peak_bytes() >> 20);
}

#[test]
fn who_comes_back_to_a_session_that_never_was_is_told_that_it_is_unknown() {
    let host = Destination::start(Link::Memory, ProcessHost::default());
    let answer = host.handle().block_on(async {
        let mut channel = host.connector.connect().await.unwrap();
        let hello = Hello::Rejoin { session: 99, done: 0, link: 7 }.encode();
        send_message(channel.sink.as_mut(), &hello).await.unwrap();
        FrameReader::new(channel.source).read_message(4096).await.unwrap().unwrap()
    });
    let answer: ToSource = wire::decode(&answer).unwrap();
    assert_eq!(answer, ToSource::Verdict(Verdict::Unknown));
}

#[test]
fn random_bytes_in_any_place_end_their_session_only() {
    let host = Destination::start(Link::Memory, ProcessHost::default());
    let handle = host.handle();
    for seed in 0..300 {
        let mut dice = Dice(seed);
        let length = 1 + usize::try_from(dice.below(3000)).unwrap();
        let noise: Vec<u8> = (0..length).map(|_| dice.roll().to_le_bytes()[0]).collect();
        let connector = host.connector.clone();
        handle.block_on(async {
            match seed % 4 {
                0 => drop(connector.connect().await.unwrap().sink.send(noise.into()).await),
                1 => {
                    let mut session = Session::hello(&connector).await;
                    let _ = session.sink.send(message(&noise).into()).await;
                }
                2 => {
                    let mut session = Session::accepted(&connector).await;
                    let _ = session.sink.send(noise.into()).await;
                }
                _ => {
                    // A good frame, damaged somewhere.
                    let mut session = Session::accepted(&connector).await;
                    let mut frame = data_frame(1, 3, 9).to_vec();
                    let at = usize::try_from(dice.below(frame.len() as u64)).unwrap();
                    frame[at] ^= 1 << dice.below(8);
                    let _lane = session.on_lane(frame).await;
                }
            }
        });
        let said = word_of(&host);
        assert!(said.len() > 10, "seed {seed}: {said}");
    }
    assert_unharmed(&host);
}

#[test]
fn a_peer_that_says_nothing_is_let_go_and_holds_up_nobody() {
    let host = Destination::start(Link::Memory, ProcessHost::default());
    let silent: Vec<_> =
        (0..20).map(|_| host.handle().block_on(host.connector.connect()).unwrap()).collect();
    let began = Instant::now();
    let mut source = maker().busy_guest();
    let sent = migrate(&mut source, &host.connector, &options());
    assert!(sent.report.digest_verified && began.elapsed() < Duration::from_secs(5));
    goes_on(&host.arrival().expect("a machine").0, 1024);
    for _ in &silent {
        assert!(word_of(&host).contains("said nothing"));
    }
    assert!(began.elapsed() < Duration::from_secs(10));
}

#[test]
fn more_arrivals_than_a_host_takes_are_refused_and_room_comes_back() {
    let (connector, listener) = memory::pair(4);
    let links = Links { connector: Arc::new(connector.clone()), listener: Box::new(listener) };
    let host = Destination::start_on(|_| links, ProcessHost::default(), ReceiveOptions::default());
    let handle = host.handle();
    let hosts: [Arc<dyn Connector>; 2] =
        ["a", "b"].map(|name| Arc::new(connector.named(name)) as _);
    let mut sessions: Vec<_> =
        (0..32).map(|n| handle.block_on(Session::accepted(&hosts[n % 2]))).collect();
    let one_more = handle.block_on(async { Session::hello(&host.connector).await.hear().await });
    assert!(matches!(one_more, Some(ToSource::Refused { .. })), "{one_more:?}");
    assert!(word_of(&host).contains("32 machines"));
    drop(sessions.split_off(0));
    for _ in 0..32 {
        word_of(&host);
    }
    assert_unharmed(&host);
}

/// A source that goes on sending pages after the machine runs: they do not reach it.
#[test]
fn pages_after_the_commit_do_not_touch_a_machine_that_runs() {
    let host = Destination::start(Link::Memory, ProcessHost::default());
    let mut source = maker().busy_guest();
    let permit = source.pause().unwrap();
    let mut state = StateWriter::new();
    source.save(&mut state).unwrap();
    let state = state.finish().unwrap();
    let memory = source.memory();
    let resident = memory.resident().unwrap();
    let poison = |gfn| data_frame(1, gfn, 0xee);
    host.handle().block_on(async {
        let mut session = Session::accepted(&host.connector).await;
        let mut lanes = [session.lane().await, session.lane().await];
        let mut batches = 0;
        let mut builder = BatchBuilder::new();
        for run in resident.runs() {
            for gfn in run.start..run.end() {
                builder.begin(1);
                builder.push(gfn, |page| memory.read(gfn, page).unwrap()).unwrap();
                if let Some(frame) = builder.finish(Codec::Raw).frame {
                    lanes[batches % 2].send(frame).await.unwrap();
                    batches += 1;
                }
            }
        }
        let rounds = vec![(1, batches as u64)];
        session
            .say(&ToDestination::Commit { permit, state, rounds, owed: PackedPages::default() })
            .await;
        let answer = session.hear().await;
        assert!(matches!(answer, Some(ToSource::Running { .. })), "{answer:?}");
        for lane in &mut lanes {
            for gfn in [PAGES - 1, 1, 2, 3, 500] {
                let _ = lane.send(poison(gfn)).await;
            }
        }
        // An abort, a second commit: nothing takes the machine back or runs it twice.
        session.say(&ToDestination::Abort { reason: "never mind".into() }).await;
        tokio::time::sleep(Duration::from_millis(100)).await;
    });
    let (arrived, _) = host.arrival().expect("a machine");
    assert!(arrived.runs());
    goes_on(&arrived, 2048);
    let there = arrived.memory().resident().unwrap();
    assert!(!there.contains(PAGES - 1), "a page came into being after the machine ran");
    assert_unharmed(&host);
}
