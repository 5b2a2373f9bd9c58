//! Who may do what, and how much of a host one peer can take: seen from a peer that has a certificate and bad
//! intentions.

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use bytes::Bytes;
use ferry_migrate::{
    Admission, Guest, Host, MachineSpec, OutcomeKind, ReceiveEvent, ReceiveOptions, Refusal,
    StateWriter,
};
use ferry_pages::Run;
use ferry_process_guest::{ProcessGuest, ProcessHost};
use ferry_protocol::{Hello, PackedPages, ToDestination, ToSource, Verdict, wire};
use ferry_transport::memory::{self, MemoryConnector};
use ferry_transport::{Connector, FrameReader, send_message};

use crate::frames::data_frame;
use crate::source::{Session, permit, word_of};
use crate::stage::{Destination, Links, Maker, Reader, Subject, eventually, goes_on, migrate};
use crate::{assert_unharmed, maker, message, options, panics, spec};

/// A host, and what leads to it in anybody's name.
fn host_with<H: Host<Guest = G> + 'static, G: Guest + 'static>(
    host: H,
    options: ReceiveOptions,
) -> (Destination<G>, MemoryConnector) {
    let (connector, listener) = memory::pair(4);
    let links = Links { connector: Arc::new(connector.clone()), listener: Box::new(listener) };
    (Destination::start_on(|_| links, host, options), connector)
}

fn host(options: ReceiveOptions) -> (Destination<ProcessGuest>, MemoryConnector) {
    panics();
    host_with(ProcessHost::default(), options)
}

fn named(connector: &MemoryConnector, name: &str) -> Arc<dyn Connector> {
    Arc::new(connector.named(name))
}

/// Says `hello`, and what comes of it: an answer, or why the channel was closed.
async fn says(connector: &Arc<dyn Connector>, hello: Hello) -> Result<ToSource, String> {
    let mut channel = connector.connect().await.unwrap();
    // It may be closed already.
    send_message(channel.sink.as_mut(), &hello.encode()).await.map_err(|e| e.to_string())?;
    let mut reader = FrameReader::new(channel.source);
    match reader.read_message(4096).await {
        Ok(Some(bytes)) => Ok(wire::decode(&bytes).unwrap()),
        Ok(None) => Err("closed".into()),
        Err(e) => Err(e.to_string()),
    }
}

#[test]
fn a_session_token_is_of_no_use_to_another_identity_and_the_session_goes_on() {
    let (host, connector) = host(ReceiveOptions::default());
    let (honest, thief) = (named(&connector, "honest"), named(&connector, "thief"));
    let token = host.handle().block_on(async {
        let mut session = Session::accepted(&honest).await;
        let token = session.token;
        let lane = Hello::Lane { session: token, link: 0, lane: 0 };
        let nothing = Hello::Lane { session: 1, link: 0, lane: 0 };
        let unknown = says(&thief, nothing).await.unwrap_err();
        assert_eq!(says(&thief, lane).await.unwrap_err(), unknown, "it learns that there is one");
        let urgent = Hello::Urgent { session: token, link: 0 };
        assert_eq!(says(&thief, urgent).await.unwrap_err(), unknown);
        for link in [0, 7] {
            let rejoin = Hello::Rejoin { session: token, done: 0, link };
            let answer = says(&thief, rejoin).await;
            assert_eq!(answer, Ok(ToSource::Verdict(Verdict::Unknown)));
        }
        // None of its two lanes was taken, and it is still its first link.
        let _lanes = (session.on_lane(data_frame(1, 3, 9)).await, session.lane().await);
        session.say(&ToDestination::RoundEnd { round: 1, batches: 1 }).await;
        let lacking = PackedPages::default();
        assert_eq!(session.hear().await, Some(ToSource::RoundDone { round: 1, lacking }));
        session.say(&ToDestination::Abort { reason: "enough".into() }).await;
        while session.hear().await.is_some() {}
        token
    });
    let mut foreign = 0;
    while let Some(event) = host.event(Duration::from_secs(8)) {
        match event {
            ReceiveEvent::Turned(why) if why.contains("named a session of honest") => foreign += 1,
            ReceiveEvent::Ended { .. } => break,
            _ => {}
        }
    }
    assert_eq!(foreign, 4);
    // How it ended is nobody else's affair, either.
    host.handle().block_on(async {
        let rejoin = Hello::Rejoin { session: token, done: 0, link: 9 };
        let said = says(&honest, rejoin.clone()).await;
        assert_eq!(said, Ok(ToSource::Verdict(Verdict::NeverRan)));
        assert_eq!(says(&thief, rejoin).await, Ok(ToSource::Verdict(Verdict::Unknown)));
    });
    word_of(&host);
    assert_unharmed(&host);
}

#[test]
fn one_identity_cannot_take_all_places_for_machines() {
    let (host, connector) = host(ReceiveOptions::default());
    let (greedy, other) = (named(&connector, "greedy"), named(&connector, "other"));
    let handle = host.handle();
    let sessions: Vec<_> = (0..24).map(|_| handle.block_on(Session::accepted(&greedy))).collect();
    let one_more = handle.block_on(async { Session::hello(&greedy).await.hear().await });
    assert!(matches!(one_more, Some(ToSource::Refused { .. })), "{one_more:?}");
    let said = word_of(&host);
    assert!(said.contains("24 machines of host `greedy`") && said.contains("try again"), "{said}");
    let mut source = maker().busy_guest();
    let sent = migrate(&mut source, &other, &options());
    assert!(sent.report.digest_verified, "{}", sent.report.reason);
    goes_on(&host.arrival().expect("a machine").0, 1024);
    drop(sessions);
    assert_unharmed(&host);
}

#[test]
fn one_identity_cannot_fill_the_host_with_connections_that_want_nothing() {
    let (host, connector) = host(ReceiveOptions::default());
    let (greedy, other) = (named(&connector, "greedy"), named(&connector, "other"));
    let handle = host.handle();
    let silent: Vec<_> = (0..128).map(|_| handle.block_on(greedy.connect()).unwrap()).collect();
    let said = handle.block_on(says(&greedy, Hello::control())).unwrap_err();
    assert!(said.contains("128 of its connections"), "{said}");
    let mut source = maker().busy_guest();
    let sent = migrate(&mut source, &other, &options());
    assert!(sent.report.digest_verified, "{}", sent.report.reason);
    goes_on(&host.arrival().expect("a machine").0, 1024);
    eventually("the silent ones were let go", || {
        let rejoin = Hello::Rejoin { session: 1, done: 0, link: 7 };
        handle.block_on(says(&greedy, rejoin)).is_ok()
    });
    drop(silent);
    assert_unharmed(&host);
}

#[test]
fn only_those_on_the_list_bring_machines_and_only_those_that_they_may() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("allow");
    std::fs::write(&path, "host1 p1\nhost2 p2\n").unwrap();
    let admission = Admission::File(path.clone());
    let (host, connector) = host(ReceiveOptions { admission, ..ReceiveOptions::default() });
    let host1 = named(&connector, "host1");
    let mut source = maker().busy_guest();
    for (who, words) in [
        ("host2", vec!["`host2`", "may not send machine `p1`", "the line `host2 p1` would"]),
        ("host3", vec!["`host3`", "may not do anything here", "--allow"]),
    ] {
        let sent = migrate(&mut source, &named(&connector, who), &options());
        assert_eq!(sent.report.outcome, OutcomeKind::Refused, "{}", sent.report.reason);
        let said = word_of(&host);
        for word in words {
            assert!(sent.report.reason.contains(word), "{word}: {}", sent.report.reason);
            assert!(said.contains(word), "{word}: {said}");
        }
        assert!(source.runs());
    }
    let handle = host.handle();
    let mut under_way = handle.block_on(Session::accepted(&host1));
    // A broken list lets nobody in, and what is under way goes on.
    std::fs::write(&path, "host1 p1\nhost2\n").unwrap();
    let sent = migrate(&mut source, &host1, &options());
    assert_eq!(sent.report.outcome, OutcomeKind::Refused);
    let why = &sent.report.reason;
    assert!(why.contains("line 2") && why.contains("nobody is let in"), "{why}");
    assert!(word_of(&host).contains("line 2"));
    handle.block_on(async {
        under_way.say(&ToDestination::Prepare).await;
        assert_eq!(under_way.hear().await, Some(ToSource::Ready));
    });
    drop(under_way);
    word_of(&host);
    std::fs::write(&path, "host1 p1\nhost3 *\n").unwrap();
    let sent = migrate(&mut source, &named(&connector, "host3"), &options());
    assert!(sent.report.digest_verified, "{}", sent.report.reason);
    goes_on(&host.arrival().expect("a machine").0, 1024);
}

#[test]
fn machines_on_their_way_have_no_more_memory_in_all_than_the_host_gives() {
    let max_memory_bytes = Some(40 << 20);
    let (host, connector) = host(ReceiveOptions { max_memory_bytes, ..ReceiveOptions::default() });
    let one = named(&connector, "one");
    let handle = host.handle();
    let offer = || ToDestination::Offer {
        spec: spec(),
        codecs: 0xf,
        lanes: 1,
        keep: Duration::ZERO,
        machine: None,
    };
    let mut sessions: Vec<_> = (0..2).map(|_| handle.block_on(Session::accepted(&one))).collect();
    let refused = handle.block_on(async {
        let mut third = Session::hello(&one).await;
        third.say(&offer()).await;
        third.hear().await
    });
    assert!(matches!(refused, Some(ToSource::Refused { .. })), "{refused:?}");
    let said = word_of(&host);
    for word in ["16 MiB", "32 MiB of others", "40 MiB at once", "--max-memory"] {
        assert!(said.contains(word), "{word}: {said}");
    }
    sessions.pop();
    word_of(&host);
    assert_unharmed(&host);
    // The one that arrived is the host's own affair: there is room again for another.
    sessions.push(handle.block_on(Session::accepted(&one)));
}

#[test]
fn a_message_is_small_until_there_is_a_machine_and_then_one_may_be_as_large_as_it() {
    let (host, connector) = host(ReceiveOptions::default());
    let one = named(&connector, "one");
    let handle = host.handle();
    let commit = |mib: usize| ToDestination::Commit {
        permit: permit(),
        state: vec![1; mib << 20],
        rounds: vec![],
        owed: PackedPages::default(),
    };
    let answers = |accepted: bool, mib: usize| {
        handle.block_on(async {
            let mut session = match accepted {
                false => Session::hello(&one).await,
                true => Session::accepted(&one).await,
            };
            session.say(&commit(mib)).await;
            session.hear().await
        })
    };
    for (accepted, mib, most) in [(false, 1, 1 << 20), (true, 18, 17 << 20)] {
        let answer = answers(accepted, mib);
        assert!(matches!(answer, Some(ToSource::Failed { .. })), "{answer:?}");
        let said = word_of(&host);
        assert!(said.contains(&format!("at most {most} are allowed")), "{said}");
    }
    let answer = answers(true, 16);
    assert!(matches!(answer, Some(ToSource::CommitRefused { .. })), "{answer:?}");
    word_of(&host);
    assert_unharmed(&host);
}

/// Builds a machine when it is told to.
struct Slow(Mutex<std::sync::mpsc::Receiver<()>>);

impl Host for Slow {
    type Guest = ProcessGuest;

    fn prepare(&self, spec: &MachineSpec) -> Result<ProcessGuest, Vec<Refusal>> {
        let _ = self.0.lock().unwrap().recv();
        ProcessHost::default().prepare(spec)
    }
}

#[test]
fn a_source_that_talks_on_while_its_machine_is_built_is_not_read_on() {
    let (go, gone) = std::sync::mpsc::channel();
    let (host, connector) = host_with(Slow(Mutex::new(gone)), ReceiveOptions::default());
    let one = named(&connector, "one");
    host.handle().block_on(async {
        let mut session = Session::offering(&one).await;
        let abort = ToDestination::Abort { reason: "x".repeat(1 << 19) };
        let bytes = Bytes::from(message(&wire::encode(&abort).unwrap()));
        let mut taken = 0;
        let soon = Duration::from_millis(500);
        while tokio::time::timeout(soon, session.sink.send(bytes.clone())).await.is_ok() {
            taken += 1;
            assert!(taken < 20, "messages are taken in without end");
        }
        go.send(()).unwrap();
        while session.hear().await.is_some() {}
    });
    word_of(&host);
}

#[test]
fn a_source_that_offers_nothing_or_comes_byte_by_byte_is_let_go() {
    let (host, connector) = host(ReceiveOptions::default());
    let one = named(&connector, "one");
    let handle = host.handle();
    let _mute = handle.block_on(Session::hello(&one));
    let began = Instant::now();
    let slow = handle.block_on(async {
        let mut channel = one.connect().await.unwrap();
        for byte in message(&Hello::control().encode()) {
            if channel.sink.send(Bytes::copy_from_slice(&[byte])).await.is_err() {
                break;
            }
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
        began.elapsed()
    });
    assert!(slow < Duration::from_secs(15), "{slow:?}");
    let said = [word_of(&host), word_of(&host)].join("; ");
    for word in ["connected and silent for 5 s", "said nothing for 5 s"] {
        assert!(said.contains(word), "{word}: {said}");
    }
    assert_unharmed(&host);
}

#[test]
fn lanes_do_not_outlive_their_session() {
    let (host, connector) = host(ReceiveOptions::default());
    let one = named(&connector, "one");
    host.handle().block_on(async {
        let mut session = Session::accepted(&one).await;
        let hello = Hello::Lane { session: session.token, link: 0, lane: 0 };
        let mut lane = one.connect().await.unwrap();
        send_message(lane.sink.as_mut(), &hello.encode()).await.unwrap();
        session.say(&ToDestination::Abort { reason: "enough".into() }).await;
        let closed = tokio::time::timeout(Duration::from_secs(20), lane.source.recv()).await;
        assert!(!matches!(closed.expect("the lane is still open"), Ok(Some(_))));
    });
    word_of(&host);
    assert_unharmed(&host);
}

#[test]
fn a_source_that_ends_the_move_behind_the_loss_of_a_lane_is_not_waited_for() {
    let (host, connector) = host(ReceiveOptions::default());
    let one = named(&connector, "one");
    let why = host.handle().block_on(async {
        let mut session = Session::hello(&one).await;
        let keep = Duration::from_secs(600);
        let offer =
            ToDestination::Offer { spec: spec(), codecs: 0xf, lanes: 2, keep, machine: None };
        session.say(&offer).await;
        let Some(ToSource::Accepted { session: token, .. }) = session.hear().await else {
            panic!()
        };
        session.token = token;
        drop(session.lane().await);
        // It lost the link: it closes its side.
        while session.hear().await.is_some() {}
        session.say(&ToDestination::Abort { reason: "enough".into() }).await;
        word_of(&host)
    });
    assert_eq!(why, "the source ended the migration: enough");
    assert_unharmed(&host);
}

#[test]
fn a_source_that_hands_over_and_never_brings_what_loading_needs_keeps_its_machine() {
    let load_timeout = Duration::from_millis(300);
    let options = ReceiveOptions { load_timeout, ..ReceiveOptions::default() };
    let (host, connector) = host_with(Reader(5), options);
    let one = named(&connector, "one");
    let mut source = maker().busy_guest();
    let permit = source.pause().unwrap();
    let mut state = StateWriter::new();
    source.save(&mut state).unwrap();
    let state = state.finish().unwrap();
    let answer = host.handle().block_on(async {
        let mut session = Session::accepted(&one).await;
        let owed = PackedPages::pack(&std::iter::once(Run::new(5, 1)).collect());
        let commit = ToDestination::Commit { permit, state, rounds: vec![], owed };
        session.say(&commit).await;
        session.hear().await
    });
    match answer {
        Some(ToSource::CommitRefused { reason }) => {
            assert!(reason.contains("within 0 s"), "{reason}")
        }
        other => panic!("{other:?}"),
    }
    assert!(host.void().contains("did not come"));
}
